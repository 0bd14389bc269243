//! systemd's manager: unit states, and starting the few units that the agent may start.

use std::pin::pin;

use futures_util::StreamExt;
use zbus::{Connection, OwnedObjectPath, Proxy};

use super::{Host, HostError, call_failed, close, proxy};
use crate::model::{UnitState, printable};

const NAME: &str = "org.freedesktop.systemd1";
const UNIT: &str = "init.scope";

/// One row of `ListUnitsByNames`.
type Listed = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

async fn manager(bus: &Connection) -> zbus::Result<Proxy<'static>> {
    proxy(bus, NAME, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager").await
}

/// The states of `names`, in their order.
pub(super) async fn states<const N: usize>(
    host: &Host,
    bus: &Connection,
    names: [&str; N],
) -> Result<[UnitState; N], HostError> {
    const WHAT: &str = "systemd's ListUnitsByNames";
    let failed = |e: zbus::Error| call_failed(WHAT, UNIT, host.deadlines.call, &e);
    let manager = manager(bus).await.map_err(failed)?;
    let listed: Vec<Listed> = manager.call("ListUnitsByNames", &(names.as_slice(),)).await.map_err(failed)?;
    // One row for each, in order; a row has the unit's own name, which another one may stand for.
    let rows = <[Listed; N]>::try_from(listed);
    let rows = rows.map_err(|rows| HostError::confused(WHAT, format!("{} rows for {N} names", rows.len())))?;
    Ok(rows.map(|row| state(&row.2, &row.3)))
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

/// The loaded units whose name matches one of `patterns`, and their states. One that is being stopped still runs.
pub(super) async fn matching(host: &Host, patterns: &[&str]) -> Result<Vec<(String, UnitState)>, HostError> {
    const WHAT: &str = "systemd's ListUnitsByPatterns";
    let bus = host.connect_to_bus(host.deadlines.call).await?;
    let asked = async {
        let none: [&str; 0] = [];
        manager(&bus).await?.call("ListUnitsByPatterns", &(none.as_slice(), patterns)).await
    };
    let listed: zbus::Result<Vec<Listed>> = asked.await;
    close(bus).await;
    let listed = listed.map_err(|error| call_failed(WHAT, UNIT, host.deadlines.call, &error))?;
    let running = |active: &str| if active == "deactivating" { UnitState::Activating } else { state("loaded", active) };
    Ok(listed.into_iter().map(|row| (row.0, running(&row.3))).collect())
}

/// `Result` and `ExecMainStatus` of a unit that failed, which is then forgotten; `None` for one that has not.
pub(super) async fn take_failure(host: &Host, unit: &str) -> Result<Option<(String, i32)>, HostError> {
    let bus = host.connect_to_bus(host.deadlines.call).await?;
    let asked = async {
        let manager = manager(&bus).await?;
        let path: OwnedObjectPath = manager.call("LoadUnit", &(unit,)).await?;
        let service = proxy(&bus, NAME, path.as_str(), "org.freedesktop.systemd1.Service").await?;
        let result: String = service.get_property("Result").await?;
        if result == "success" {
            return Ok(None);
        }
        let status: i32 = service.get_property("ExecMainStatus").await?;
        let _: () = manager.call("ResetFailedUnit", &(unit,)).await?;
        Ok(Some((printable(&result, 50), status)))
    };
    let told = asked.await.map_err(|e| call_failed("systemd's LoadUnit", UNIT, host.deadlines.call, &e));
    close(bus).await;
    told
}

/// Starts `unit` and waits for the job's end.
pub(super) async fn start(host: &Host, unit: &'static str) -> Result<(), HostError> {
    let limit = host.deadlines.job;
    match tokio::time::timeout(limit, job(host, START, unit)).await {
        Ok(Ok(result)) if result == "done" => Ok(()),
        Ok(Ok(result)) => Err(HostError::Unit { unit: unit.to_owned(), result }),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(HostError::deadline(unit, limit)),
    }
}

/// What is done with a unit, and how it gets on with a job that there is. A start joins its like and gives way to a
/// stop; a stop takes the place of a start, which it would contradict.
pub(super) type Verb = (&'static str, &'static str);
/// Starts.
pub(super) const START: Verb = ("StartUnit", "fail");
/// Stops.
pub(super) const STOP: Verb = ("StopUnit", "replace");

/// Makes a job for `unit`, or joins the one that does the same, and waits for its end: the job's result.
pub(super) async fn job(host: &Host, verb: Verb, unit: &str) -> Result<String, HostError> {
    let bus = host.connect_to_bus(host.deadlines.call).await?;
    let result = job_on(host, &bus, verb, unit).await;
    close(bus).await;
    result
}

async fn job_on(host: &Host, bus: &Connection, verb: Verb, unit: &str) -> Result<String, HostError> {
    const WHAT: &str = "systemd's manager";
    let (method, mode) = verb;
    let failed = |error: zbus::Error| match &error {
        // No such unit, masked, at odds with a job that is queued.
        zbus::Error::MethodError(name, ..) if name.as_str().starts_with(NAME) => {
            let result = name.as_str().trim_start_matches(NAME).trim_start_matches('.');
            HostError::Unit { unit: unit.to_owned(), result: printable(result, 50) }
        }
        _ => call_failed(WHAT, UNIT, host.deadlines.call, &error),
    };
    let manager = manager(bus).await.map_err(failed)?;
    // Signals are broadcast to subscribers only, and the job may be removed before the reply names it.
    let _: () = manager.call("Subscribe", &()).await.map_err(failed)?;
    let mut removed = manager.receive_signal("JobRemoved").await.map_err(failed)?;
    // Both are listened to at once: signals that nobody takes would keep the reply from being read.
    let body = (unit, mode);
    let mut call = pin!(manager.call::<_, _, OwnedObjectPath>(method, &body));
    let mut job = None;
    let mut ended = Vec::new();
    loop {
        tokio::select! {
            reply = &mut call, if job.is_none() => job = Some(reply.map_err(failed)?),
            message = removed.next() => {
                let Some(message) = message else { break };
                let body = message.body();
                // Told apart by the job: the signal has the unit's own name, which another one may stand for.
                if let Ok((_, path, _, result)) = body.deserialize::<(u32, OwnedObjectPath, String, String)>()
                    && job.as_ref().is_none_or(|job| *job == path)
                {
                    ended.push((path, result));
                }
            }
        }
        if let Some((_, result)) = ended.iter().find(|(path, _)| Some(path) == job.as_ref()) {
            return Ok(printable(result, 50));
        }
    }
    Err(HostError::Call { what: WHAT, unit: UNIT, why: "the bus closed".to_owned() })
}

/// `StatusText` and `ActiveState` of a service.
pub(super) async fn status_text(host: &Host, unit: &str) -> Result<(String, String), HostError> {
    let bus = host.connect_to_bus(host.deadlines.call).await?;
    let asked = async {
        let path: OwnedObjectPath = manager(&bus).await?.call("LoadUnit", &(unit,)).await?;
        let property = async |interface: &'static str, name: &str| -> zbus::Result<String> {
            proxy(&bus, NAME, path.as_str(), interface).await?.get_property(name).await
        };
        let text = property("org.freedesktop.systemd1.Service", "StatusText").await?;
        let active = property("org.freedesktop.systemd1.Unit", "ActiveState").await?;
        Ok((printable(&text, 500), printable(&active, 20)))
    };
    let told = asked.await.map_err(|e| call_failed("systemd's LoadUnit", UNIT, host.deadlines.call, &e));
    close(bus).await;
    told
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
