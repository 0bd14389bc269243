//! bootc, which has only a command line. systemd runs it: `bootc switch` as a unit that the agent starts, `bootc status`
//! behind a socket. Neither is a child of the agent, because the agent's confinement would break it.
//!
//! The outcome of a switch is read from `bootc status`, never from its exit code: 0 is also "nothing to do", and 1 may
//! still have staged the image. Every bootc command waits for the sysroot lock without limit, so the agent does not ask
//! for the status while a switch runs. It never calls `bootc rollback`, which discards the staged deployment and
//! reverses the boot order; the next call reverses it back.

mod status;
mod unit;

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::{Cancel, Host, HostError, Progress, TITLE, cancelled, staged, systemd, within};
use crate::model::{Backend, Deployment, HostFacts, Reason, Transaction, UnitState, is_image, is_staged, printable};
use crate::trust::VerifiedImage;

/// The program that the shipped units run.
pub(super) const PROGRAM: &str = "usr/bin/bootc";
/// The socket unit that runs `bootc status` once for each connection.
pub(super) const STATUS_UNIT: &str = "rebase-agent-bootc-status.socket";
/// The path of that socket.
const STATUS_SOCKET: &str = "run/rebase-agent/bootc-status.sock";
const STATUS: &str = "`bootc status`";
const SWITCH: &str = "`bootc switch`";
const PULL: &str = "`ostree container image pull`";
/// Largest status read, in bytes; a deployment has about one kilobyte.
const MAX_STATUS: u64 = 1 << 20;
/// Stands for the result of a job whose signal was lost.
const UNTOLD: &str = "an unknown result";
/// Interval of the checks on a held lock; the kernel does not signal its release.
const LOCK_POLL: Duration = Duration::from_millis(200);

#[cfg(fuzzing)]
pub use {status::parse as parse_status, unit::image as image_of_unit};

/// Reads the deployments, and which transaction holds the sysroot lock.
pub(super) async fn read(host: &Host) -> Result<HostFacts, HostError> {
    let transaction = transaction(host).await?;
    let deployments = match &transaction {
        None => status(host).await?,
        // Use the last status of this process. While our own switch runs, none is needed.
        Some(active) => match host.seen.borrow().clone() {
            seen if seen.is_empty() && active.ours.is_none() => return Err(busy(active)),
            seen => seen,
        },
    };
    Ok(HostFacts { backend: Backend::Bootc, deployments, transaction })
}

/// Pulls `image` into the repository, or waits for our own unit that pulls or stages it. Makes no deployment.
pub(super) async fn fetch(
    host: &Host,
    image: &VerifiedImage,
    cancel: &mut Cancel,
    progress: &Progress<'_>,
) -> Result<(), HostError> {
    const WHAT: &str = "pulling the image";
    let unit = match transaction(host).await? {
        Some(active) if active.ours.as_ref() == Some(image.image().digest()) => active.client,
        Some(active) => return Err(busy(&active)),
        None => unit::of(unit::Task::Pull, image)?,
    };
    match run(host, WHAT, &unit, cancel, progress).await?.as_str() {
        "done" | UNTOLD => Ok(()),
        "canceled" => Err(HostError::Cancelled(WHAT)),
        result => Err(failure(host, PULL, unit, result).await),
    }
}

/// Starts `unit`, or joins its running job, and returns systemd's word for its end.
async fn run(
    host: &Host,
    what: &'static str,
    unit: &str,
    cancel: &mut Cancel,
    progress: &Progress<'_>,
) -> Result<String, HostError> {
    progress(format!("{unit} runs"));
    tokio::select! {
        result = systemd::job(host, systemd::Verb::Start, unit) => result,
        () = gone(host, unit) => Ok(UNTOLD.to_owned()),
        () = cancelled(cancel) => {
            stop(host, unit).await?;
            Err(HostError::Cancelled(what))
        }
        () = tokio::time::sleep(host.deadlines.whole) => {
            stop(host, unit).await?;
            Err(HostError::deadline(what, host.deadlines.whole))
        }
    }
}

/// Stages `image` or waits for our own unit that does.
pub(super) async fn stage(
    host: &Host,
    image: &VerifiedImage,
    cancel: &mut Cancel,
    progress: &Progress<'_>,
) -> Result<(), HostError> {
    const WHAT: &str = "staging the image";
    let is_it = |deployment: &Deployment| is_image(deployment, image.image(), Some(image.facts()));
    let is_ready = |deployment: &Deployment| is_staged(deployment, image.image(), Some(image.facts()), Backend::Bootc);
    let unit = unit::of(unit::Task::Switch, image)?;
    match transaction(host).await? {
        // Starting the unit again joins the running job.
        Some(active) if active.client == unit => {}
        Some(active) => return Err(busy(&active)),
        None => {
            let before = tokio::select! {
                status = status(host) => status?,
                () = cancelled(cancel) => return Err(HostError::Cancelled(WHAT)),
            };
            if before.iter().any(|deployment| deployment.booted && deployment.layered) {
                let why = "packages are layered on this host, and `bootc switch` would silently drop them".to_owned();
                return Err(HostError::Transaction { what: WHAT, reason: Reason::LayeredPackages, why });
            }
            if before.first().is_some_and(|first| is_it(first) && (first.booted || is_ready(first))) {
                return Ok(());
            }
        }
    }
    let result = run(host, WHAT, &unit, cancel, progress).await?;
    let after = status(host).await;
    let found = after.as_ref().ok().and_then(|after| after.iter().find(|d| d.staged && is_it(d)));
    let staged = found.is_some();
    // A switch does not unlock a download-only deployment of the same image.
    if found.is_some_and(|found| found.locked) {
        return Err(HostError::no_effect(
            SWITCH,
            "the image was staged for download only and stays out of the next boot; `bootc upgrade --from-downloaded` \
             unlocks it",
        ));
    }
    match result.as_str() {
        "done" | UNTOLD if staged => Ok(()),
        "done" => {
            after?;
            let why = format!("the image is not staged; see `journalctl -u '{unit}'`");
            Err(HostError::no_effect(SWITCH, why))
        }
        "canceled" if !staged => Err(HostError::Cancelled(WHAT)),
        result => {
            let error = failure(host, SWITCH, unit, result).await;
            if !staged {
                return Err(error);
            }
            tracing::warn!("{error}; the image is staged nevertheless");
            Ok(())
        }
    }
}

/// Stops the unit that an earlier run of the agent started.
pub(super) async fn cancel_ours(host: &Host) -> Result<(), HostError> {
    match transaction(host).await? {
        Some(active) if active.ours.is_some() => stop(host, &active.client).await,
        _ => Ok(()),
    }
}

/// The error for a change of kernel arguments: bootc has no command for it, the image brings them.
pub(super) fn set_kernel_arguments(append: &[String], delete: &[String]) -> HostError {
    let list = |arguments: &[String]| printable(&arguments.join(" "), 200);
    let parts = [("bring", append), ("drop", delete)].into_iter().filter(|(_, arguments)| !arguments.is_empty());
    let parts: Vec<String> = parts.map(|(verb, arguments)| format!("{verb} `{}`", list(arguments))).collect();
    HostError::KernelArguments(parts.join(" and "))
}

/// Returns when a started unit has ended. The signal of its end may be lost while systemd re-executes itself, as for
/// its own update.
async fn gone(host: &Host, unit: &str) {
    loop {
        tokio::time::sleep(host.deadlines.look).await;
        match systemd::matching(host, &unit::PATTERNS).await {
            Ok(units) if units.iter().any(|(name, state)| name == unit && is_running(*state)) => {}
            Ok(_) => return,
            Err(error) => tracing::debug!("cannot read whether {unit} still runs: {error}"),
        }
    }
}

fn is_running(state: UnitState) -> bool {
    matches!(state, UnitState::Active | UnitState::Activating)
}

/// The holder of the sysroot lock: our own unit, or an unknown program, for which `bootc status` would wait.
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

/// Whether the sysroot stays locked. A command that only reads, also our own `bootc status`, holds the lock for a moment.
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
    let (title, client) = (&active.title, &active.client);
    HostError::Busy(format!(
        "`{title}` of {client} is active; if it does not end, see `lslocks` and `systemctl list-units '*bootc*'`, and \
         end the program that holds the lock"
    ))
}

async fn status(host: &Host) -> Result<Vec<Deployment>, HostError> {
    let path = host.root.join(STATUS_SOCKET);
    let ask = async {
        let mut json = Vec::new();
        UnixStream::connect(&path).await?.take(MAX_STATUS.saturating_add(1)).read_to_end(&mut json).await?;
        Ok::<_, std::io::Error>(json)
    };
    let json = within(STATUS, host.deadlines.status, ask).await?.map_err(|error| {
        let why = printable(&format!("{}: {error}", path.display()), 300);
        HostError::Call { what: STATUS, unit: STATUS_UNIT, why }
    })?;
    let mut deployments = match u64::try_from(json.len()) {
        Ok(1..=MAX_STATUS) => status::parse(&json)?,
        Ok(0) => {
            return Err(HostError::confused(STATUS, "it is empty; see `journalctl -u 'rebase-agent-bootc-status@*'`"));
        }
        _ => return Err(HostError::confused(STATUS, format!("it has more than {MAX_STATUS} bytes"))),
    };
    for deployment in &mut deployments {
        // The status has no labels; the rendered config inside the image has the same name.
        deployment.rendered_config = host.root.read_config(deployment);
        if deployment.staged {
            let note = staged::read(&host.root, &deployment.id).unwrap_or_default();
            deployment.arguments = note.arguments;
            deployment.locked |= note.locked;
        }
    }
    host.seen.send_replace(deployments.clone());
    Ok(deployments)
}

async fn stop(host: &Host, unit: &str) -> Result<(), HostError> {
    let stop = systemd::job(host, systemd::Verb::Stop, unit);
    match within("stopping the unit of bootc", host.deadlines.cancel, stop).await? {
        // A unit that is no longer loaded has ended.
        Err(HostError::Unit { result, .. }) if result == "NoSuchUnit" => Ok(()),
        stopped => stopped.map(|_| ()),
    }
}

/// Why the unit failed, as far as systemd knows; bootc's own message is in its journal. The unit's failed state is
/// reset, because the agent reports the failure.
async fn failure(host: &Host, what: &'static str, unit: String, result: &str) -> HostError {
    let failure = systemd::take_failure(host, &unit).await.unwrap_or_else(|error| {
        tracing::debug!("cannot read why {unit} failed: {error}");
        None
    });
    let ended = failure.map_or_else(|| result.to_owned(), |(result, status)| format!("{result} {status}"));
    let reason = if ended.starts_with("timeout") { Reason::DeadlineExceeded } else { Reason::StageFailed };
    HostError::Command { what, unit, result: printable(&ended, 50), reason }
}
