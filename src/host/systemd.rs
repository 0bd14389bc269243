//! systemd's manager: unit states, and starting the few units that the agent may start.

use std::pin::pin;

use futures_util::StreamExt;
use zbus::Connection;

use super::dbus::{ManagerProxy, SYSTEMD, ServiceProxy, UnitProxy, UnitRow, proxy, proxy_at};
use super::{Host, HostError, call_failed, within};
use crate::model::{UnitState, printable};

const UNIT: &str = "init.scope";

/// The states of `names`, in their order.
pub(super) async fn states<const N: usize>(
    host: &Host,
    bus: &Connection,
    names: [&str; N],
) -> Result<[UnitState; N], HostError> {
    const WHAT: &str = "systemd's ListUnitsByNames";
    let failed = |e: zbus::Error| call_failed(WHAT, UNIT, host.deadlines.call, &e);
    let manager: ManagerProxy<'_> = proxy(bus).await.map_err(failed)?;
    let listed = manager.list_units_by_names(&names).await.map_err(failed)?;
    // One row for each name, in order. A row has the unit's main name, which differs where an alias was asked for.
    let rows = <[UnitRow; N]>::try_from(listed);
    let rows = rows.map_err(|rows| HostError::confused(WHAT, format!("{} rows for {N} names", rows.len())))?;
    Ok(rows.map(|row| state(&row.2, &row.3)))
}

/// The unit's state. systemd adds states between releases, so unknown ones count as inactive. Pure.
fn state(load: &str, active: &str) -> UnitState {
    match (load, active) {
        ("not-found" | "masked", _) => UnitState::Absent,
        (_, "active" | "reloading") => UnitState::Active,
        (_, "activating") => UnitState::Activating,
        (_, "failed") => UnitState::Failed,
        _ => UnitState::Inactive,
    }
}

/// The loaded units whose name matches one of `patterns`, and their states. A unit that is being stopped counts as
/// running.
pub(super) async fn matching(host: &Host, patterns: &[&str]) -> Result<Vec<(String, UnitState)>, HostError> {
    let list =
        async |bus: &Connection| proxy::<ManagerProxy<'_>>(bus).await?.list_units_by_patterns(&[], patterns).await;
    let listed = host.ask("systemd's ListUnitsByPatterns", UNIT, list).await?;
    let running = |active: &str| if active == "deactivating" { UnitState::Activating } else { state("loaded", active) };
    Ok(listed.into_iter().map(|row| (row.0, running(&row.3))).collect())
}

/// `Result` and `ExecMainStatus` of a failed unit, whose failed state is then reset; `None` if it has not failed.
pub(super) async fn take_failure(host: &Host, unit: &str) -> Result<Option<(String, i32)>, HostError> {
    host.ask("systemd's LoadUnit", UNIT, async |bus| {
        let manager: ManagerProxy<'_> = proxy(bus).await?;
        let path = manager.load_unit(unit).await?;
        let service: ServiceProxy<'_> = proxy_at(bus, path.as_str()).await?;
        let result = service.result().await?;
        if result == "success" {
            return Ok(None);
        }
        let status = service.exec_main_status().await?;
        manager.reset_failed_unit(unit).await?;
        Ok(Some((printable(&result, 50), status)))
    })
    .await
}

/// Starts `unit` and waits until the job ends.
pub(super) async fn start(host: &Host, unit: &'static str) -> Result<(), HostError> {
    match within(unit, host.deadlines.job, job(host, Verb::Start, unit)).await?? {
        result if result == "done" => Ok(()),
        result => Err(HostError::Unit { unit: unit.to_owned(), result }),
    }
}

/// A job for a unit. A start joins a queued start and fails if a stop is queued; a stop replaces a queued start.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verb {
    Start,
    Stop,
}

/// Queues a job for `unit`, or joins an equal one, waits until it ends and returns its result.
pub(super) async fn job(host: &Host, verb: Verb, unit: &str) -> Result<String, HostError> {
    host.on_bus(host.deadlines.call, async |bus| job_on(host, bus, verb, unit).await).await
}

async fn job_on(host: &Host, bus: &Connection, verb: Verb, unit: &str) -> Result<String, HostError> {
    const WHAT: &str = "systemd's manager";
    let failed = |error: zbus::Error| match &error {
        // The unit does not exist, is masked, or has a conflicting job.
        zbus::Error::MethodError(name, ..) if name.as_str().starts_with(SYSTEMD) => {
            let result = name.as_str().trim_start_matches(SYSTEMD).trim_start_matches('.');
            HostError::Unit { unit: unit.to_owned(), result: printable(result, 50) }
        }
        _ => call_failed(WHAT, UNIT, host.deadlines.call, &error),
    };
    let manager: ManagerProxy<'_> = proxy(bus).await.map_err(failed)?;
    // Subscribe first: systemd sends signals to subscribers only, and the job may end before the reply names it.
    manager.subscribe().await.map_err(failed)?;
    let mut removed = manager.receive_job_removed().await.map_err(failed)?;
    // Read reply and signals together: unread signals would block the reply behind them.
    let mut call = pin!(async {
        match verb {
            Verb::Start => manager.start_unit(unit, "fail").await,
            Verb::Stop => manager.stop_unit(unit, "replace").await,
        }
    });
    let mut job = None;
    let mut ended = Vec::new();
    loop {
        tokio::select! {
            reply = &mut call, if job.is_none() => job = Some(reply.map_err(failed)?),
            signal = removed.next() => {
                let Some(signal) = signal else { break };
                // Compare the job, not the unit: the signal has the unit's main name, and `unit` may be an alias.
                if let Ok(removed) = signal.args()
                    && job.as_ref().is_none_or(|job| *job == removed.job)
                {
                    ended.push((removed.job, removed.result));
                }
            }
        }
        if let Some((_, result)) = ended.iter().find(|(path, _)| Some(path) == job.as_ref()) {
            return Ok(printable(result, 50));
        }
    }
    Err(HostError::Call { what: WHAT, unit: UNIT, why: "the bus closed the connection".to_owned() })
}

/// `StatusText` and `ActiveState` of a service.
pub(super) async fn status_text(host: &Host, unit: &str) -> Result<(String, String), HostError> {
    host.ask("systemd's LoadUnit", UNIT, async |bus| {
        let path = proxy::<ManagerProxy<'_>>(bus).await?.load_unit(unit).await?;
        let text = proxy_at::<ServiceProxy<'_>>(bus, path.as_str()).await?.status_text().await?;
        let active = proxy_at::<UnitProxy<'_>>(bus, path.as_str()).await?.active_state().await?;
        Ok((printable(&text, 500), printable(&active, 20)))
    })
    .await
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
