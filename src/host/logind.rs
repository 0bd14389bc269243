//! logind: inhibitor locks, the wall message, the reboot.
//!
//! Not systemd's own `Reboot`, which starts reboot.target at once and skips the delay locks that the kubelet's
//! graceful node shutdown relies on.

use zbus::Connection;

use super::dbus::{InhibitorRow, LoginProxy, close, proxy};
use super::{Host, HostError, call_failed};
use crate::model::{Inhibitor, printable};

const WHAT: &str = "logind";
const UNIT: &str = "systemd-logind.service";

pub(super) struct Login {
    pub inhibitors: Vec<Inhibitor>,
    pub shutting_down: bool,
}

pub(super) async fn read(host: &Host, bus: &Connection) -> Result<Login, HostError> {
    let asked = async {
        let logind: LoginProxy<'_> = proxy(bus).await?;
        let listed = logind.list_inhibitors().await?;
        let shutting_down = logind.preparing_for_shutdown().await?;
        Ok(Login { inhibitors: listed.iter().filter_map(blocks_shutdown).collect(), shutting_down })
    };
    asked.await.map_err(|error| call_failed(WHAT, UNIT, host.deadlines.call, &error))
}

/// systemd 257 lets block-mode locks bind root too; before, root overrode them. We respect them on both. Pure.
fn blocks_shutdown(row: &InhibitorRow) -> Option<Inhibitor> {
    let (what, who, why, mode, ..) = row;
    (mode == "block" && what.split(':').any(|what| what == "shutdown"))
        .then(|| Inhibitor { who: printable(who, 100), why: printable(why, 200) })
}

pub(super) async fn reboot(host: &Host, message: &str) -> Result<(), HostError> {
    let bus = host.connect_to_bus(host.deadlines.call).await?;
    let asked = ask(host, &bus, message).await;
    close(bus).await;
    asked
}

async fn ask(host: &Host, bus: &Connection, message: &str) -> Result<(), HostError> {
    let failed = |error: &zbus::Error| call_failed(WHAT, UNIT, host.deadlines.call, error);
    let before = read(host, bus).await?;
    // Already on its way down is what we want, whatever inhibits it now.
    if before.shutting_down {
        return Ok(());
    }
    // Before systemd 257 root overrides what appeared since the last look.
    if let Some(inhibitor) = before.inhibitors.first() {
        return Err(HostError::Reboot(format!("`{}` inhibits it: {}", inhibitor.who, inhibitor.why)));
    }
    let logind: LoginProxy<'_> = proxy(bus).await.map_err(|error| failed(&error))?;
    if let Err(error) = logind.set_wall_message(message, true).await {
        tracing::warn!("logged-in users are not told of the reboot: {}", printable(&error.to_string(), 200));
    }
    let Err(error) = logind.reboot(false).await else { return Ok(()) };
    // The reply may be lost where the request was not; `OperationInProgress` is also the answer during a suspend.
    if logind.preparing_for_shutdown().await.unwrap_or(false) {
        return Ok(());
    }
    Err(match &error {
        // Whatever the name: systemd 258 has one of its own for inhibitors.
        zbus::Error::MethodError(_, Some(why), _) => HostError::Reboot(printable(why, 300)),
        _ => match failed(&error) {
            HostError::Denied { why, .. } => HostError::Reboot(why),
            error => error,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_block_mode_locks_on_shutdown_count() {
        let row = |what: &str, mode: &str| (what.to_owned(), "w".to_owned(), "y".to_owned(), mode.to_owned(), 0, 1);
        assert!(blocks_shutdown(&row("shutdown", "block")).is_some());
        assert!(blocks_shutdown(&row("sleep:shutdown:idle", "block")).is_some());
        assert!(blocks_shutdown(&row("sleep", "block")).is_none());
        assert!(blocks_shutdown(&row("shutdown", "delay")).is_none());
        assert!(blocks_shutdown(&row("shutdown", "block-weak")).is_none());
    }
}
