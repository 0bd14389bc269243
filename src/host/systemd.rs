//! systemd's manager: unit states, and starting the few units that the agent may start.

use std::time::Duration;

use futures_util::StreamExt;
use zbus::{Connection, OwnedObjectPath, Proxy};

use super::{CALL, HostError, call_failed, close, proxy, system_bus};
use crate::model::{UnitState, printable};

const NAME: &str = "org.freedesktop.systemd1";
const UNIT: &str = "init.scope";
/// The finalizer's start does nothing and the bootloader update copies some megabytes.
const JOB: Duration = Duration::from_secs(120);

/// One row of `ListUnitsByNames`.
type Listed = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

async fn manager(bus: &Connection) -> Result<Proxy<'static>, HostError> {
    proxy(bus, NAME, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
        .await
        .map_err(|e| call_failed("systemd", UNIT, CALL, &e))
}

/// The states of `names`, in their order.
pub(super) async fn states<const N: usize>(bus: &Connection, names: [&str; N]) -> Result<[UnitState; N], HostError> {
    const WHAT: &str = "systemd's ListUnitsByNames";
    let listed: Vec<Listed> = manager(bus)
        .await?
        .call("ListUnitsByNames", &(names.as_slice(),))
        .await
        .map_err(|e| call_failed(WHAT, UNIT, CALL, &e))?;
    Ok(names.map(|name| match listed.iter().find(|row| row.0 == name) {
        Some(row) => state(&row.2, &row.3),
        None => UnitState::Absent,
    }))
}

/// systemd adds words between releases, so unknown ones count as not active. Pure.
fn state(load: &str, active: &str) -> UnitState {
    match (load, active) {
        ("not-found" | "masked", _) => UnitState::Absent,
        (_, "active" | "reloading") => UnitState::Active,
        (_, "activating") => UnitState::Activating,
        (_, "failed") => UnitState::Failed,
        _ => UnitState::Inactive,
    }
}

/// Starts `unit` and waits for the job's end.
pub(super) async fn start(unit: &'static str) -> Result<(), HostError> {
    let bus = system_bus(CALL).await?;
    let result = match tokio::time::timeout(JOB, start_and_wait(&bus, unit)).await {
        Ok(result) => result,
        Err(_) => Err(HostError::Deadline { what: "systemd's StartUnit", seconds: JOB.as_secs() }),
    };
    close(bus).await;
    result
}

async fn start_and_wait(bus: &Connection, unit: &'static str) -> Result<(), HostError> {
    let failed = |e: zbus::Error| call_failed("systemd's StartUnit", UNIT, CALL, &e);
    let manager = manager(bus).await?;
    // Signals are broadcast to subscribers only, and the job may be removed before the reply names it.
    let _: () = manager.call("Subscribe", &()).await.map_err(failed)?;
    let mut removed = manager.receive_signal("JobRemoved").await.map_err(failed)?;
    let job: OwnedObjectPath = manager.call("StartUnit", &(unit, "fail")).await.map_err(failed)?;
    while let Some(message) = removed.next().await {
        let body = message.body();
        let Ok((_, path, _, result)) = body.deserialize::<(u32, OwnedObjectPath, String, String)>() else { continue };
        if path == job {
            return match result.as_str() {
                "done" => Ok(()),
                _ => Err(HostError::Unit { unit, result: printable(&result, 50) }),
            };
        }
    }
    Err(HostError::Call { what: "systemd's StartUnit", unit: UNIT, why: "the bus closed".to_owned() })
}

/// `StatusText` and `ActiveState` of a service.
pub(super) async fn status_text(unit: &str) -> Result<(String, String), HostError> {
    const WHAT: &str = "systemd's LoadUnit";
    let failed = |e: zbus::Error| call_failed(WHAT, UNIT, CALL, &e);
    let bus = system_bus(CALL).await?;
    let path: OwnedObjectPath = manager(&bus).await?.call("LoadUnit", &(unit,)).await.map_err(failed)?;
    let property = async |interface: &'static str, name: &str| -> Result<String, HostError> {
        let proxy = proxy(&bus, NAME, path.as_str(), interface).await.map_err(failed)?;
        proxy.get_property(name).await.map_err(failed)
    };
    let text = property("org.freedesktop.systemd1.Service", "StatusText").await?;
    let active = property("org.freedesktop.systemd1.Unit", "ActiveState").await?;
    close(bus).await;
    Ok((printable(&text, 500), printable(&active, 20)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_states_are_an_open_set() {
        for (load, active, expected) in [
            ("loaded", "active", UnitState::Active),
            ("loaded", "activating", UnitState::Activating),
            ("loaded", "failed", UnitState::Failed),
            ("loaded", "inactive", UnitState::Inactive),
            ("loaded", "frozen-in-time", UnitState::Inactive),
            ("not-found", "inactive", UnitState::Absent),
            ("masked", "inactive", UnitState::Absent),
        ] {
            assert_eq!(state(load, active), expected, "{load} {active}");
        }
    }
}
