//! The work of transactions; parts that bootc's stand-in also needs are in the library.
//!
//! libostree's objects stay on the thread that made them, so each transaction has its own thread.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail};
use guest::{Said, arguments, import, open, origin, origin_reference, stage, tidy};
use ostree_ext::container::OstreeImageReference;
use ostree_ext::ostree::gio::Cancellable;
use ostree_ext::ostree::{self, glib};
use ostree_ext::sysroot::SysrootLock;
use tokio::sync::{mpsc, oneshot, watch};
use zbus::{OwnedVariant, Variant};

/// While this file exists, a rebase succeeds without a change, as the original's does when it finds nothing to do.
const CHANGES_NOTHING: &str = "/run/rpm-ostreed-changes-nothing";

pub type Dict = HashMap<String, OwnedVariant>;

/// The operation of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Job {
    Rebase {
        reference: String,
    },
    Cleanup {
        kinds: Vec<String>,
    },
    /// `last` is the option `final-kernel-args`, which replaces all others but `existing`.
    KernelArguments {
        existing: String,
        added: Vec<String>,
        replaced: Vec<String>,
        removed: Vec<String>,
        last: Option<String>,
    },
    Rollback,
}

/// One entry of the boot order, as shown on the bus.
pub struct Deployment {
    pub osname: String,
    pub booted: bool,
    /// Keys of its boot loader entry.
    pub boot: Vec<(&'static str, String)>,
    pub dict: Dict,
}

/// A transaction's thread, which holds the sysroot's lock.
pub struct Worker {
    /// A message starts the work; a dropped sender means that no client will.
    pub go: oneshot::Sender<()>,
    pub outcome: oneshot::Receiver<Result<(), String>>,
}

/// The reason why a transaction cannot be created.
pub enum Refusal {
    /// Another program has the sysroot's lock.
    Busy,
    Failed(String),
}

/// Reads the deployments.
pub fn load() -> Result<Vec<Deployment>> {
    let sysroot = open()?;
    let booted = sysroot.booted_deployment();
    let repo = sysroot.repo();
    sysroot.deployments().iter().map(|deployment| describe(&repo, deployment, booted.as_ref())).collect()
}

/// Takes the sysroot's lock and waits for the start.
pub async fn prepare(
    job: Job,
    said: mpsc::UnboundedSender<Said>,
    cancelled: watch::Receiver<bool>,
) -> Result<Worker, Refusal> {
    let (locked, is_locked) = oneshot::channel();
    let (go, may_go) = oneshot::channel();
    let (told, outcome) = oneshot::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async move {
            let sysroot = match lock() {
                Ok(sysroot) => sysroot,
                Err(refusal) => return drop(locked.send(Err(refusal))),
            };
            let _ = locked.send(Ok(()));
            if may_go.await.is_ok() {
                let _ = told.send(run(&sysroot, &job, &said, cancelled).await);
            }
        });
    });
    match is_locked.await {
        Ok(Ok(())) => Ok(Worker { go, outcome }),
        Ok(Err(refusal)) => Err(refusal),
        Err(_) => Err(Refusal::Failed("the transaction's thread died".to_owned())),
    }
}

fn lock() -> Result<SysrootLock, Refusal> {
    let failed = |error: &dyn std::fmt::Display| Refusal::Failed(error.to_string());
    let sysroot = open().map_err(|error| failed(&format!("{error:#}")))?;
    if !sysroot.try_lock().map_err(|error| failed(&error))? {
        return Err(Refusal::Busy);
    }
    // The previous holder of the lock may have changed the sysroot.
    sysroot.load_if_changed(Cancellable::NONE).map_err(|error| failed(&error))?;
    Ok(SysrootLock::from_assumed_locked(&sysroot))
}

async fn run(
    sysroot: &SysrootLock,
    job: &Job,
    said: &mpsc::UnboundedSender<Said>,
    mut cancelled: watch::Receiver<bool>,
) -> Result<(), String> {
    let work = async {
        match job {
            Job::Rebase { .. } if std::path::Path::new(CHANGES_NOTHING).exists() => Ok(()),
            Job::Rebase { reference } => rebase(sysroot, reference, said).await,
            Job::Cleanup { kinds } => cleanup(sysroot, kinds, said),
            Job::KernelArguments { existing, added, replaced, removed, last } => {
                match final_arguments(existing, [removed, replaced, added], last.as_deref())? {
                    Some(arguments) => kernel_arguments(sysroot, &arguments),
                    None => {
                        let _ = said.send(Said::Message("No changes.".to_owned()));
                        Ok(())
                    }
                }
            }
            Job::Rollback => rollback(sysroot),
        }
    };
    let outcome = tokio::select! {
        biased;
        outcome = work => outcome.map_err(|error| format!("{error:#}")),
        _ = cancelled.wait_for(|cancelled| *cancelled) => Err("Operation was cancelled".to_owned()),
    };
    sysroot.unlock();
    outcome
}

async fn rebase(sysroot: &SysrootLock, reference: &str, said: &mpsc::UnboundedSender<Said>) -> Result<()> {
    let say = |said_now: Said| drop(said.send(said_now));
    let imgref = OstreeImageReference::try_from(reference)?;
    let first = first_deployment(sysroot)?;
    if origin_reference(&first).is_some_and(|old| old == imgref.to_string()) {
        bail!("Old and new refs are equal: {imgref}");
    }
    let image = import(sysroot, &imgref, say).await?;
    say(Said::TaskBegin("Staging deployment".to_owned()));
    stage(sysroot, &image.merge_commit, &origin(&imgref), &booted(sysroot)?, &arguments(&first))?;
    say(Said::TaskEnd("Staging deployment".to_owned()));
    tidy(sysroot)
}

fn cleanup(sysroot: &SysrootLock, kinds: &[String], said: &mpsc::UnboundedSender<Said>) -> Result<()> {
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
fn final_arguments(existing: &str, changes: [&[String]; 3], last: Option<&str>) -> Result<Option<Vec<String>>> {
    let [removed, replaced, added] = changes;
    let changed = last.map_or(changes.iter().any(|list| !list.is_empty()), |last| last != existing);
    let arguments = ostree::KernelArgs::from_string(last.unwrap_or(existing));
    if last.is_none() {
        removed.iter().try_for_each(|one| arguments.delete(one))?;
        replaced.iter().try_for_each(|one| arguments.new_replace(one))?;
        added.iter().for_each(|one| arguments.append(one));
    }
    let list = arguments.to_strv().into_iter().map(|argument| argument.to_string());
    Ok(changed.then(|| list.collect()))
}

fn kernel_arguments(sysroot: &SysrootLock, arguments: &[String]) -> Result<()> {
    let first = first_deployment(sysroot)?;
    let origin = first.origin().context("The deployment has no origin")?;
    stage(sysroot, &first.csum(), &origin, &booted(sysroot)?, arguments)?;
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
    let (osname, serial) = (deployment.osname().to_string(), deployment.deployserial());
    let id = format!("{osname}-{checksum}.{serial}");
    let is_booted = booted.is_some_and(|booted| booted.equal(deployment));
    let (commit, _) = repo.load_commit(&checksum)?;
    let metadata = glib::VariantDict::new(Some(&commit.child_value(0)));
    let text = |key: &str| metadata.lookup::<String>(key).ok().flatten();

    let mut dict = Dict::new();
    let mut set = |key: &str, value: Variant<'static>| -> Result<()> {
        dict.insert(key.to_owned(), OwnedVariant::try_from(value)?);
        Ok(())
    };
    set("id", id.into())?;
    set("osname", osname.clone().into())?;
    set("checksum", checksum.into())?;
    set("serial", serial.into())?;
    set("booted", is_booted.into())?;
    set("staged", deployment.is_staged().into())?;
    set("pinned", deployment.is_pinned().into())?;
    set("unlocked", ostree::Deployment::unlocked_state_to_string(deployment.unlocked()).to_string().into())?;
    set("timestamp", ostree::commit_get_timestamp(&commit).into())?;
    if let Some(version) = text("version") {
        set("version", version.into())?;
    }
    if let Some(reference) = origin_reference(deployment) {
        set("container-image-reference", reference.into())?;
    }
    if let Some(digest) = text("ostree.manifest-digest") {
        set("container-image-reference-digest", digest.into())?;
    }
    const OF_IMAGES: [&str; 3] = ["ostree.manifest-digest", "ostree.manifest", "ostree.container.image-config"];
    let shown: HashMap<String, Variant<'static>> =
        OF_IMAGES.iter().filter_map(|key| Some(((*key).to_owned(), Variant::from(text(key)?)))).collect();
    set("base-commit-meta", Variant::from(shown))?;
    // Always there, even after the smallest change.
    for key in ["requested-packages", "requested-local-packages", "requested-base-removals", "packages"] {
        set(key, Variant::from(Vec::<String>::new()))?;
    }
    set("regenerate-initramfs", false.into())?;

    const OF_BOOT: [&str; 5] = ["title", "version", "linux", "initrd", "options"];
    let config = deployment.bootconfig();
    let boot = OF_BOOT.iter().filter_map(|key| Some((*key, config.as_ref()?.get(key)?.to_string()))).collect();
    Ok(Deployment { osname, booted: is_booted, boot, dict })
}
