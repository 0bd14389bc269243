//! logind: inhibitor locks, the wall message, the reboot.
//!
//! Not systemd's own `Reboot`, which starts reboot.target at once and skips the delay locks that the kubelet's
//! graceful node shutdown relies on.

use zbus::{Connection, Proxy};

use super::{CALL, HostError, call_failed, close, proxy, system_bus};
use crate::model::{Inhibitor, printable};

const WHAT: &str = "logind";
const UNIT: &str = "systemd-logind.service";

/// One row of `ListInhibitors`: what, who, why, mode, uid, pid.
type Listed = (String, String, String, String, u32, u32);

pub(super) struct Login {
    pub inhibitors: Vec<Inhibitor>,
    pub shutting_down: bool,
}

async fn manager(bus: &Connection) -> Result<Proxy<'static>, HostError> {
    proxy(bus, "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
        .await
        .map_err(|e| call_failed(WHAT, UNIT, CALL, &e))
}

pub(super) async fn read(bus: &Connection) -> Result<Login, HostError> {
    let failed = |e: zbus::Error| call_failed(WHAT, UNIT, CALL, &e);
    let manager = manager(bus).await?;
    let listed: Vec<Listed> = manager.call("ListInhibitors", &()).await.map_err(failed)?;
    let shutting_down = manager.get_property("PreparingForShutdown").await.map_err(failed)?;
    Ok(Login { inhibitors: listed.iter().filter_map(blocks_shutdown).collect(), shutting_down })
}

/// systemd 257 lets block-mode locks bind root too; before, root overrode them. We respect them on both. Pure.
fn blocks_shutdown(row: &Listed) -> Option<Inhibitor> {
    let (what, who, why, mode, ..) = row;
    (mode == "block" && what.split(':').any(|what| what == "shutdown"))
        .then(|| Inhibitor { who: printable(who, 100), why: printable(why, 200) })
}

pub(super) async fn reboot(message: &str) -> Result<(), HostError> {
    let bus = system_bus(CALL).await?;
    let manager = manager(&bus).await?;
    let told: Result<(), zbus::Error> = manager.call("SetWallMessage", &(message, true)).await;
    if let Err(error) = told {
        tracing::warn!("logged-in users are not told of the reboot: {}", printable(&error.to_string(), 200));
    }
    let asked: Result<(), zbus::Error> = manager.call("Reboot", &(false,)).await;
    close(bus).await;
    match asked {
        Ok(()) => Ok(()),
        // Already on its way down is what we want.
        Err(zbus::Error::MethodError(name, ..)) if name.as_str() == "org.freedesktop.login1.OperationInProgress" => {
            Ok(())
        }
        Err(error) => match call_failed(WHAT, UNIT, CALL, &error) {
            HostError::Denied { why, .. } => Err(HostError::Reboot(why)),
            other => Err(other),
        },
    }
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
