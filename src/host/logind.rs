//! logind: inhibitor locks, the wall message, the reboot.
//!
//! systemd's own `Reboot` is not used: it starts reboot.target at once and skips the delay locks that the kubelet's
//! graceful node shutdown needs.

use zbus::Connection;

use super::dbus::{InhibitorRow, LoginProxy, proxy};
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

/// The lock, if it blocks the shutdown. Block-mode locks bind root since systemd 257; before, root overrides them. The
/// agent respects them on both. Pure.
fn blocks_shutdown(row: &InhibitorRow) -> Option<Inhibitor> {
    let (what, who, why, mode, ..) = row;
    (mode == "block" && what.split(':').any(|what| what == "shutdown"))
        .then(|| Inhibitor { who: printable(who, 100), why: printable(why, 200) })
}

pub(super) async fn reboot(host: &Host, message: &str) -> Result<(), HostError> {
    host.on_bus(host.deadlines.call, async |bus| ask(host, bus, message).await).await
}

/// Sets the message that logged-in users get when the machine goes down. `false` if it goes down already.
pub(super) async fn announce(host: &Host, message: &str) -> Result<bool, HostError> {
    host.on_bus(host.deadlines.call, async |bus| Ok(may_reboot(host, bus, message).await?.is_some())).await
}

/// Checks the inhibitors and announces the reboot; `None` if the machine goes down already, which no inhibitor changes.
async fn may_reboot(host: &Host, bus: &Connection, message: &str) -> Result<Option<LoginProxy<'static>>, HostError> {
    let failed = |error: &zbus::Error| call_failed(WHAT, UNIT, host.deadlines.call, error);
    let before = read(host, bus).await?;
    if before.shutting_down {
        return Ok(None);
    }
    // Before systemd 257 the call would override an inhibitor that appeared since the last read.
    if let Some(inhibitor) = before.inhibitors.first() {
        return Err(HostError::Reboot(format!("`{}` inhibits the shutdown: {}", inhibitor.who, inhibitor.why)));
    }
    let logind: LoginProxy<'_> = proxy(bus).await.map_err(|error| failed(&error))?;
    if let Err(error) = logind.set_wall_message(message, true).await {
        tracing::warn!("cannot notify logged-in users of the reboot: {}", printable(&error.to_string(), 200));
    }
    Ok(Some(logind))
}

async fn ask(host: &Host, bus: &Connection, message: &str) -> Result<(), HostError> {
    let failed = |error: &zbus::Error| call_failed(WHAT, UNIT, host.deadlines.call, error);
    let Some(logind) = may_reboot(host, bus, message).await? else { return Ok(()) };
    let Err(error) = logind.reboot(false).await else { return Ok(()) };
    // logind may have accepted the request although the reply was lost. `OperationInProgress` is no proof of that: it
    // is also the answer during a suspend.
    if logind.preparing_for_shutdown().await.unwrap_or(false) {
        return Ok(());
    }
    Err(match &error {
        // Under any error name: systemd 258 has its own for inhibitors.
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
