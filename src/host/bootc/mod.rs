//! bootc, which has no interface but its command line: `bootc switch` runs as a unit that systemd is asked to start,
//! `bootc status` behind a socket of systemd's. Neither is ever our child, which confinement would not let work.
//!
//! What a switch came to is what `bootc status` says after it, never its exit code: 0 is also "nothing to do", and 1
//! may still have staged. Every command of bootc's takes the sysroot lock and waits for it without limit, so status is
//! not asked while a switch runs. `bootc rollback` is never called at all: it discards what is staged and turns the
//! boot order around, and the next call turns it back.

mod status;
mod unit;

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::{Cancel, Host, HostError, Progress, TITLE, cancelled, staged, systemd};
use crate::model::{Backend, Deployment, HostFacts, Reason, Transaction, UnitState, is_image, is_staged, printable};
use crate::trust::VerifiedImage;

/// Where the shipped units run it.
pub(super) const PROGRAM: &str = "usr/bin/bootc";
/// Listens for us; every connection runs `bootc status` once.
pub(super) const STATUS_UNIT: &str = "rebase-agent-bootc-status.socket";
/// What it listens on.
const STATUS_SOCKET: &str = "run/rebase-agent/bootc-status.sock";
const STATUS: &str = "`bootc status`";
const SWITCH: &str = "`bootc switch`";
/// Largest status read, in bytes: a deployment takes about one kilobyte.
const MAX_STATUS: u64 = 1 << 20;
/// In place of a job's result.
const UNTOLD: &str = "an unknown result";
/// How often a lock that is held is looked at again; nobody tells of its end.
const LOCK_POLL: Duration = Duration::from_millis(200);

#[cfg(fuzzing)]
pub(super) use {status::parse as parse_status, unit::image as image_of_unit};

/// Reads deployments and what the sysroot is locked for.
pub(super) async fn read(host: &Host) -> Result<HostFacts, HostError> {
    let transaction = transaction(host).await?;
    let deployments = match &transaction {
        None => status(host).await?,
        // What bootc said last, if this process has asked before. Of our own switch it is enough to know that it runs.
        Some(active) => match host.deployments_seen() {
            seen if seen.is_empty() && active.ours.is_none() => return Err(busy(active)),
            seen => seen,
        },
    };
    Ok(HostFacts { backend: Backend::Bootc, deployments, transaction })
}

/// Stages `image` or waits for our own unit that does.
pub(super) async fn stage(
    host: &Host,
    image: &VerifiedImage,
    cancel: &mut Cancel,
    progress: &Progress,
) -> Result<(), HostError> {
    const WHAT: &str = "staging the image";
    let is_it = |deployment: &Deployment| is_image(deployment, image.image(), Some(image.facts()));
    let is_ready = |deployment: &Deployment| is_staged(deployment, image.image(), Some(image.facts()));
    let unit = unit::of(image)?;
    match transaction(host).await? {
        // Starting it once more joins the job that runs.
        Some(active) if active.client == unit => {}
        Some(active) => return Err(busy(&active)),
        None => {
            let before = tokio::select! {
                status = status(host) => status?,
                () = cancelled(cancel) => return Err(HostError::Cancelled(WHAT)),
            };
            if before.iter().any(|deployment| deployment.booted && deployment.layered) {
                let why = "packages are layered on this host, and a switch would silently drop them".to_owned();
                return Err(HostError::Transaction { what: WHAT, reason: Reason::LayeredPackages, why });
            }
            if before.first().is_some_and(|first| is_it(first) && (first.booted || is_ready(first))) {
                return Ok(());
            }
        }
    }
    progress(format!("{SWITCH} runs as {unit}"));
    let result = tokio::select! {
        result = systemd::job(host, systemd::Verb::Start, &unit) => result?,
        () = gone(host, &unit) => UNTOLD.to_owned(),
        () = cancelled(cancel) => {
            stop(host, &unit).await?;
            return Err(HostError::Cancelled(WHAT));
        }
        () = tokio::time::sleep(host.deadlines.whole) => {
            stop(host, &unit).await?;
            return Err(HostError::deadline(SWITCH, host.deadlines.whole));
        }
    };
    let after = status(host).await;
    let found = after.as_ref().ok().and_then(|after| after.iter().find(|d| d.staged && is_it(d)));
    let staged = found.is_some_and(|found| !found.locked);
    // To bootc the image is already what is to run, and a switch changes nothing.
    if found.is_some_and(|found| found.locked) {
        let why = "the image was staged for download only and stays out of the next boot; `bootc upgrade \
                   --from-downloaded` unlocks it"
            .to_owned();
        return Err(HostError::NoEffect { what: SWITCH, why });
    }
    match result.as_str() {
        "done" | UNTOLD if staged => Ok(()),
        "done" => {
            after?;
            let why = format!("the image is not staged; see `journalctl -u '{unit}'`");
            Err(HostError::NoEffect { what: SWITCH, why })
        }
        "canceled" if !staged => Err(HostError::Cancelled(WHAT)),
        result => {
            let error = failure(host, unit, result).await;
            if !staged {
                return Err(error);
            }
            tracing::warn!("{error}; the image is staged all the same");
            Ok(())
        }
    }
}

/// Stops a unit of ours that an earlier run of the agent started.
pub(super) async fn cancel_ours(host: &Host) -> Result<(), HostError> {
    match transaction(host).await? {
        Some(active) if active.ours.is_some() => stop(host, &active.client).await,
        _ => Ok(()),
    }
}

/// bootc has no command for it: arguments come with the image.
pub(super) fn set_kernel_arguments(append: &[String], delete: &[String]) -> HostError {
    let list = |arguments: &[String]| printable(&arguments.join(" "), 200);
    let parts = [("bring", append), ("drop", delete)].into_iter().filter(|(_, arguments)| !arguments.is_empty());
    let parts: Vec<String> = parts.map(|(verb, arguments)| format!("{verb} `{}`", list(arguments))).collect();
    HostError::KernelArguments(parts.join(" and "))
}

/// Ends when a unit that was started does not run any more. The signal that says so may be lost: a systemd that
/// executes itself anew, as for its own update, may send none.
async fn gone(host: &Host, unit: &str) {
    loop {
        tokio::time::sleep(host.deadlines.look).await;
        match systemd::matching(host, &unit::PATTERNS).await {
            Ok(units) if units.iter().any(|(name, state)| name == unit && is_running(*state)) => {}
            Ok(_) => return,
            Err(error) => tracing::debug!("whether {unit} still runs is not known: {error}"),
        }
    }
}

fn is_running(state: UnitState) -> bool {
    matches!(state, UnitState::Active | UnitState::Activating)
}

/// What the sysroot is locked for: our own unit, or something unknown that status would wait for.
async fn transaction(host: &Host) -> Result<Option<Transaction>, HostError> {
    let units = systemd::matching(host, &unit::PATTERNS).await?;
    let running = units.into_iter().find(|(_, state)| is_running(*state));
    Ok(match running {
        Some((unit, _)) => {
            let ours = unit::image(&unit).map(|image| image.digest().clone());
            let title = ours.as_ref().map_or_else(|| printable(&unit, 200), |digest| format!("{TITLE}{digest}"));
            Some(Transaction { title, client: unit, ours })
        }
        None if is_locked(host).await => {
            let (title, client) = ("sysroot lock".to_owned(), "another program".to_owned());
            Some(Transaction { title, client, ours: None })
        }
        None => None,
    })
}

/// Whether the sysroot stays locked: what only looks at it has it for a moment, our own status as well.
async fn is_locked(host: &Host) -> bool {
    let until = Instant::now() + host.deadlines.lock;
    while host.root.is_sysroot_locked() {
        if Instant::now() >= until {
            return true;
        }
        tokio::time::sleep(LOCK_POLL).await;
    }
    false
}

fn busy(active: &Transaction) -> HostError {
    let how = Backend::Bootc.end_transaction();
    HostError::Busy(format!("`{}` of {} is active; if it does not end, {how}", active.title, active.client))
}

async fn status(host: &Host) -> Result<Vec<Deployment>, HostError> {
    let path = host.root.join(STATUS_SOCKET);
    let ask = async {
        let mut json = Vec::new();
        UnixStream::connect(&path).await?.take(MAX_STATUS.saturating_add(1)).read_to_end(&mut json).await?;
        Ok::<_, std::io::Error>(json)
    };
    let json = match tokio::time::timeout(host.deadlines.status, ask).await {
        Ok(Ok(json)) => json,
        Ok(Err(error)) => {
            let why = format!("{}: {error}", path.display());
            return Err(HostError::Call { what: STATUS, unit: STATUS_UNIT, why: printable(&why, 300) });
        }
        Err(_) => return Err(HostError::deadline(STATUS, host.deadlines.status)),
    };
    match u64::try_from(json.len()) {
        Ok(1..=MAX_STATUS) => {}
        Ok(0) => return Err(HostError::confused(STATUS, "nothing; see `journalctl -u 'rebase-agent-bootc-status@*'`")),
        _ => return Err(HostError::confused(STATUS, format!("more than {MAX_STATUS} bytes"))),
    }
    let mut deployments = status::parse(&json)?;
    for deployment in deployments.iter_mut().filter(|deployment| deployment.booted || deployment.staged) {
        let directory = deployment.id.strip_prefix(&format!("{}-", deployment.osname)).unwrap_or_default();
        // Status tells no labels; the config that the image carries has the same name.
        match host.root.rendered_config(&deployment.osname, directory) {
            Ok(Some(config)) => {
                deployment.rendered_config = config.name;
                deployment.wanted_arguments = Some(config.arguments);
            }
            Ok(None) => {}
            Err(why) => deployment.config_fault = Some(why),
        }
        if deployment.staged {
            let note = staged::read(&host.root, &deployment.id).unwrap_or_default();
            deployment.arguments = note.arguments;
            deployment.locked |= note.locked;
        }
    }
    host.see_deployments(&deployments);
    Ok(deployments)
}

async fn stop(host: &Host, unit: &str) -> Result<(), HostError> {
    let limit = host.deadlines.cancel;
    match tokio::time::timeout(limit, systemd::job(host, systemd::Verb::Stop, unit)).await {
        Ok(Ok(_)) => Ok(()),
        // Not loaded any more: it has ended.
        Ok(Err(HostError::Unit { result, .. })) if result == "NoSuchUnit" => Ok(()),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(HostError::deadline("stopping `bootc switch`", limit)),
    }
}

/// Why the unit failed, as far as systemd knows; bootc's own words are in its journal. It does not linger as failed:
/// the agent's own reports tell of it.
async fn failure(host: &Host, unit: String, result: &str) -> HostError {
    let ended = match systemd::take_failure(host, &unit).await {
        Ok(Some((result, status))) => format!("{result} {status}"),
        Ok(None) => result.to_owned(),
        Err(error) => {
            tracing::debug!("why {unit} failed is not known: {error}");
            result.to_owned()
        }
    };
    let reason = if ended.starts_with("timeout") { Reason::DeadlineExceeded } else { Reason::StageFailed };
    HostError::Switch { unit, result: printable(&ended, 50), reason }
}
