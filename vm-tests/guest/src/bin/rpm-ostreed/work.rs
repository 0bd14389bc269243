//! The work of transactions; parts that bootc's stand-in also needs are in the library.
//!
//! libostree's objects stay on the thread that made them, so each transaction has its own thread.

use anyhow::{Context as _, Result, bail};
use guest::{Said, arguments, import, is_locked, open, origin, origin_reference, stage, tidy};
use ostree_ext::container::OstreeImageReference;
use ostree_ext::ostree::gio::Cancellable;
use ostree_ext::ostree::{self, glib};
use ostree_ext::sysroot::SysrootLock;
use rpm_ostreed::bus::Failure;
use rpm_ostreed::{Deployment, Job, KernelArguments, Rebase, failed, sysroot_is_locked};
use tokio::sync::{mpsc, oneshot};

/// While this file exists, a rebase succeeds without a change, as the original's does when it finds nothing to do.
const CHANGES_NOTHING: &str = "/run/rpm-ostreed-changes-nothing";

type Saying = mpsc::UnboundedSender<Said>;
type Outcome = Result<(), String>;

/// The order to a transaction's thread.
struct Start {
    job: Job,
    said: Saying,
    cancelled: oneshot::Receiver<String>,
    done: oneshot::Sender<Outcome>,
}

/// A transaction's thread, which holds the sysroot's lock. It ends when this is dropped.
pub struct Worker(oneshot::Sender<Start>);

impl Worker {
    /// Starts the work; `said` is closed when it is over.
    pub fn start(self, job: Job, said: Saying) -> (oneshot::Sender<String>, oneshot::Receiver<Outcome>) {
        let ((cancel, cancelled), (done, outcome)) = (oneshot::channel(), oneshot::channel());
        let _ = self.0.send(Start { job, said, cancelled, done });
        (cancel, outcome)
    }
}

/// Reads the deployments.
pub fn load() -> Result<Vec<Deployment>> {
    let sysroot = open()?;
    let booted = sysroot.booted_deployment();
    let repo = sysroot.repo();
    sysroot.deployments().iter().map(|deployment| describe(&repo, deployment, booted.as_ref())).collect()
}

/// Takes the sysroot's lock, in a thread that waits for its work.
pub async fn lock() -> Result<Worker, Failure> {
    let ((locked, is_locked), (start, starts)) = (oneshot::channel(), oneshot::channel::<Start>());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async move {
            let sysroot = match try_lock() {
                Ok(sysroot) => sysroot,
                Err(failure) => return drop(locked.send(Err(failure))),
            };
            let _ = locked.send(Ok(()));
            if let Ok(Start { job, said, mut cancelled, done }) = starts.await {
                let outcome = tokio::select! {
                    biased;
                    outcome = run(&sysroot, &job, &said) => outcome.map_err(|error| format!("{error:#}")),
                    Ok(text) = &mut cancelled => Err(text),
                };
                sysroot.unlock();
                let _ = done.send(outcome);
            }
        });
    });
    match is_locked.await {
        Ok(Ok(())) => Ok(Worker(start)),
        Ok(Err(failure)) => Err(failure),
        Err(_) => Err(failed("the transaction's thread died")),
    }
}

fn try_lock() -> Result<SysrootLock, Failure> {
    let sysroot = open().map_err(|error| failed(format!("{error:#}")))?;
    if !sysroot.try_lock().map_err(|error| failed(error.to_string()))? {
        return Err(sysroot_is_locked());
    }
    // The previous holder of the lock may have changed the sysroot.
    sysroot.load_if_changed(Cancellable::NONE).map_err(|error| failed(error.to_string()))?;
    Ok(SysrootLock::from_assumed_locked(&sysroot))
}

async fn run(sysroot: &SysrootLock, job: &Job, said: &Saying) -> Result<()> {
    let message = |text: &str| drop(said.send(Said::Message(text.to_owned())));
    match job {
        Job::Rebase(_) if std::path::Path::new(CHANGES_NOTHING).exists() => Ok(()),
        Job::Rebase(wanted) => rebase(sysroot, wanted, said).await,
        Job::Cleanup(kinds) => cleanup(sysroot, kinds, said),
        Job::KernelArguments(changes) => match final_arguments(changes)? {
            Some(arguments) => kernel_arguments(sysroot, &arguments, changes.locked),
            None => Ok(message("No changes.")),
        },
        Job::Rollback => rollback(sysroot),
        Job::Upgrade => Ok(message("No upgrade available.")),
        Job::Finalize(_) => {
            guest::lock_staged(false)?;
            // Like a new deployment, this is a change that other programs notice.
            Ok(std::fs::File::open("/ostree/deploy")?.set_modified(std::time::SystemTime::now())?)
        }
    }
}

async fn rebase(sysroot: &SysrootLock, wanted: &Rebase, said: &Saying) -> Result<()> {
    let say = |said_now: Said| drop(said.send(said_now));
    let imgref = OstreeImageReference::try_from(wanted.reference.as_str())?;
    let first = first_deployment(sysroot)?;
    let image = import(sysroot, &imgref, say).await?;
    if wanted.download_only {
        let changes = first.csum() != image.merge_commit;
        say(Said::Message(if changes { "Update downloaded." } else { "No changes." }.to_owned()));
        return Ok(());
    }
    say(Said::TaskBegin("Staging deployment".to_owned()));
    let arguments = arguments(&first);
    stage(sysroot, &image.merge_commit, &origin(&imgref), &booted(sysroot)?, &arguments, wanted.locked)?;
    say(Said::TaskEnd("Staging deployment".to_owned()));
    tidy(sysroot)
}

fn cleanup(sysroot: &SysrootLock, kinds: &[String], said: &Saying) -> Result<()> {
    let has = |kind: &str| kinds.iter().any(|wanted| wanted == kind);
    let booted = booted(sysroot)?;
    let all = sysroot.deployments();
    let place = all.iter().position(|one| one.equal(&booted)).context("The booted deployment is not listed")?;
    let mut kept = Vec::new();
    for (index, one) in all.iter().enumerate() {
        let goes = (index < place && has("pending-deploy")) || (index > place && has("rollback-deploy"));
        if !goes || one.is_pinned() || one.osname() != booted.osname() {
            kept.push(one.clone());
        }
    }
    let changed = kept.len() < all.len();
    if changed {
        sysroot.write_deployments(&kept, Cancellable::NONE)?;
    } else if has("pending-deploy") || has("rollback-deploy") {
        let _ = said.send(Said::Message("Deployments unchanged.".to_owned()));
    }
    if changed || has("base") { tidy(sysroot) } else { Ok(()) }
}

/// The same as rpm-ostreed's `kernel_arg_transaction_execute`: the client names the existing arguments. `None` without
/// a change.
fn final_arguments(wanted: &KernelArguments) -> Result<Option<Vec<String>>> {
    let KernelArguments { existing, added, replaced, removed, last, .. } = wanted;
    let edits = [added, replaced, removed].iter().any(|list| !list.is_empty());
    let changed = last.as_ref().map_or(edits, |last| last != existing);
    let arguments = ostree::KernelArgs::from_string(last.as_ref().unwrap_or(existing));
    if last.is_none() {
        removed.iter().try_for_each(|one| arguments.delete(one))?;
        replaced.iter().try_for_each(|one| arguments.new_replace(one))?;
        added.iter().for_each(|one| arguments.append(one));
    }
    let list = arguments.to_strv().into_iter().map(|argument| argument.to_string());
    Ok(changed.then(|| list.collect()))
}

fn kernel_arguments(sysroot: &SysrootLock, arguments: &[String], locked: bool) -> Result<()> {
    let first = first_deployment(sysroot)?;
    let origin = first.origin().context("The deployment has no origin")?;
    stage(sysroot, &first.csum(), &origin, &booted(sysroot)?, arguments, locked)?;
    tidy(sysroot)
}

fn rollback(sysroot: &SysrootLock) -> Result<()> {
    let mut all = sysroot.deployments();
    if all.first().is_some_and(ostree::Deployment::is_staged) {
        bail!("Staged deployment (remove with cleanup -p)");
    }
    let booted = booted(sysroot)?;
    let place = all.iter().position(|one| one.equal(&booted)).context("The booted deployment is not listed")?;
    // The deployment after the booted one, or the booted one if it is not first.
    let chosen = if place > 0 { place } else { 1 };
    if chosen >= all.len() {
        bail!("No rollback deployment found");
    }
    let first = all.remove(chosen);
    all.insert(0, first);
    sysroot.write_deployments(&all, Cancellable::NONE)?;
    Ok(())
}

/// The first in boot order, which may be staged: origin and kernel arguments come from it.
fn first_deployment(sysroot: &SysrootLock) -> Result<ostree::Deployment> {
    sysroot.deployments().into_iter().next().context("Nothing is deployed")
}

/// The booted deployment: /etc comes from it. A staged one, which staging replaces, could not be finalized from.
fn booted(sysroot: &SysrootLock) -> Result<ostree::Deployment> {
    sysroot.booted_deployment().context("Not booted into a deployment")
}

fn describe(
    repo: &ostree::Repo,
    deployment: &ostree::Deployment,
    booted: Option<&ostree::Deployment>,
) -> Result<Deployment> {
    let checksum = deployment.csum().to_string();
    let (commit, _) = repo.load_commit(&checksum)?;
    let metadata = glib::VariantDict::new(Some(&commit.child_value(0)));
    let text = |key: &str| metadata.lookup::<String>(key).ok().flatten();
    let lock = is_locked();
    Ok(Deployment {
        osname: deployment.osname().to_string(),
        checksum,
        serial: deployment.deployserial(),
        booted: booted.is_some_and(|booted| booted.equal(deployment)),
        staged: deployment.is_staged(),
        locked: deployment.is_staged() && (lock.in_record || lock.by_file),
        locked_by_file: lock.by_file,
        pinned: deployment.is_pinned(),
        unlocked: ostree::Deployment::unlocked_state_to_string(deployment.unlocked()).to_string(),
        version: text("version"),
        timestamp: ostree::commit_get_timestamp(&commit),
        reference: origin_reference(deployment).unwrap_or_default(),
        digest: text("ostree.manifest-digest").unwrap_or_default(),
        manifest: text("ostree.manifest").unwrap_or_default(),
        config: text("ostree.container.image-config").unwrap_or_default(),
        ..Deployment::default()
    })
}
