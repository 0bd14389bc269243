//! rpm-ostree over D-Bus: deployments, and transactions on their private sockets.
//!
//! A transaction succeeded if the deployments that are read after it show so. Its own report is not enough: it is also
//! success when nothing changed.

mod deployments;
mod pull;
mod transaction;

use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;
use zbus::{Connection, OwnedObjectPath, Variant};

use super::dbus::{Options, OsProxy, SysrootProxy, proxy, proxy_at};
use super::{Cancel, Host, HostError, Progress, TITLE, call_failed, cancelled, logind};
use crate::kernel_arguments::{apply, join};
use crate::model::{Backend, Deployment, HostFacts, is_image, is_staged, printable};
use crate::trust::VerifiedImage;
use deployments::Snapshot;
use pull::Pull;
#[cfg(fuzzing)]
pub use {deployments::deployment, deployments::property, transaction::heard};

pub(super) const UNIT: &str = "rpm-ostreed.service";

/// The error of `FinalizeDeployment` for another checksum than the staged one.
const OTHER_CHECKSUM: &str = "Expected staged base checksum ";

/// Most tries of the first call. The daemon may exit as idle and drop the call, or the bus may time out while the daemon
/// still loads.
const FIRST_CALLS: u32 = 4;

/// A registered client of the daemon for one operation. The registration prevents the daemon's idle exit; closing the
/// connection discards a transaction that was not started.
pub(super) struct Client<'h> {
    host: &'h Host,
    bus: &'h Connection,
    sysroot: SysrootProxy<'static>,
}

impl<'h> Client<'h> {
    pub(super) async fn register(host: &'h Host, bus: &'h Connection) -> Result<Self, HostError> {
        let failed =
            |error: &zbus::Error| call_failed("rpm-ostree's RegisterClient", UNIT, host.deadlines.reply, error);
        let sysroot: SysrootProxy<'_> = proxy(bus).await.map_err(|error| failed(&error))?;
        let options: Options<'_> = Options::from([("id", Variant::from("rebase-agent"))]);
        let mut tries = 1;
        loop {
            match sysroot.register_client(&options).await {
                Ok(()) => break,
                Err(error) if is_lost(&error) && tries < FIRST_CALLS => tries += 1,
                // A timeout of the bus is no sign that the daemon exited.
                Err(error) if is_lost(&error) && !is_timeout(&error) => {
                    let why = printable(&error.to_string(), 300);
                    return Err(HostError::Dies { unit: UNIT, tries, why });
                }
                Err(error) => match failed(&error) {
                    // Transactions also work without registration.
                    HostError::Denied { .. } => break,
                    error => return Err(error),
                },
            }
        }
        Ok(Self { host, bus, sysroot })
    }

    fn failed(&self, what: &'static str, error: &zbus::Error) -> HostError {
        call_failed(what, UNIT, self.host.deadlines.reply, error)
    }

    /// The snapshot to act on, and whether our own transaction for `image` was awaited, which an earlier run started.
    async fn ready(
        &self,
        what: &'static str,
        image: &VerifiedImage,
        cancel: &mut Cancel,
        progress: &Progress<'_>,
    ) -> Result<(Snapshot, bool), HostError> {
        let before = self.snapshot().await?;
        match (&before.facts.transaction, &before.address) {
            (Some(active), Some(address)) if active.ours.as_ref() == Some(image.image().digest()) => {
                self.follow(what, address, cancel, progress).await?;
                Ok((self.snapshot().await?, true))
            }
            (Some(active), _) => Err(HostError::Busy(format!("transaction `{}` is active", active.title))),
            (None, _) => Ok((before, false)),
        }
    }

    /// Pulls `image` into the repository. The transaction ends before a deployment is made; if the image is there, it asks
    /// no registry (rpm-ostree 2026.2, `deploy_transaction_execute`).
    pub(super) async fn fetch(
        &self,
        image: &VerifiedImage,
        cancel: &mut Cancel,
        progress: &Progress<'_>,
    ) -> Result<(), HostError> {
        const WHAT: &str = "pulling the image";
        let (before, awaited) = self.ready(WHAT, image, cancel, progress).await?;
        // The awaited transaction has pulled it, and perhaps staged it as well.
        if awaited || before.facts.deployments.iter().any(|it| is_image(it, image.image(), Some(image.facts()))) {
            return Ok(());
        }
        self.rebase(WHAT, image, &before.os, "download-only", cancel, progress).await
    }

    /// Starts a rebase to `image` with one more option, and waits until it ends.
    async fn rebase(
        &self,
        what: &'static str,
        image: &VerifiedImage,
        os: &OwnedObjectPath,
        option: &'static str,
        cancel: &mut Cancel,
        progress: &Progress<'_>,
    ) -> Result<(), HostError> {
        let title = format!("{TITLE}{}", image.image().digest());
        let options: Options<'_> = Options::from([
            ("initiating-command-line", Variant::from(title.as_str())),
            // Without this the daemon refuses an older image.
            ("allow-downgrade", Variant::from(true)),
            (option, Variant::from(true)),
        ]);
        let reference = image.to_pull();
        let os = self.os(os).await?;
        let (began, pull) = (Instant::now(), Mutex::new(Pull::default()));
        let summed = |line: String| {
            progress(pull.lock().unwrap_or_else(PoisonError::into_inner).line(&line, began.elapsed()));
        };
        self.transact(what, os.rebase(&options, &reference, &[]), cancel, &summed).await
    }

    /// Stages `image`, locked: no reboot boots it before [`Self::reboot`]. A daemon that knows no lock stages it unlocked.
    pub(super) async fn stage(
        &self,
        image: &VerifiedImage,
        cancel: &mut Cancel,
        progress: &Progress<'_>,
    ) -> Result<(), HostError> {
        const WHAT: &str = "staging the image";
        let is_it = |deployment: &Deployment| is_image(deployment, image.image(), Some(image.facts()));
        let is_ready = |facts: &HostFacts| {
            facts
                .staged()
                .is_some_and(|staged| is_staged(staged, image.image(), Some(image.facts()), Backend::RpmOstree))
        };
        let boots_next = |facts: &HostFacts| facts.deployments.first().filter(|first| is_it(first)).cloned();
        let (mut before, _) = self.ready(WHAT, image, cancel, progress).await?;
        // The daemon refuses a rebase to the reference that is first in boot order: "Old and new refs are equal".
        match boots_next(&before.facts) {
            Some(first) if first.booted || is_ready(&before.facts) => return Ok(()),
            // It has packages layered, or the host went back from it: drop it and stage it again.
            Some(_) => {
                self.clean_up(WHAT, &before.os, cancel).await?;
                before = self.snapshot().await?;
            }
            None => {}
        }
        let outcome = self.rebase(WHAT, image, &before.os, "lock-finalization", cancel, progress).await;
        self.judge(WHAT, outcome, is_ready, "the image is not staged").await
    }

    /// Unlocks the staged `image` if it is locked, and reboots. The daemon checks the inhibitors, unlocks, and then runs
    /// `systemctl reboot` (rpm-ostree 2026.2, `finalize_deployment_transaction_execute`). It does not report how that ends, so
    /// the agent asks logind as well; a reboot that has begun meanwhile counts as accepted.
    pub(super) async fn reboot(&self, image: &VerifiedImage, message: &str) -> Result<(), HostError> {
        const WHAT: &str = "unlocking the staged image";
        let before = self.snapshot().await?;
        let staged =
            before.facts.staged().filter(|it| is_staged(it, image.image(), Some(image.facts()), Backend::RpmOstree));
        let Some(staged) = staged.filter(|staged| staged.locked) else {
            return logind::reboot(self.host, message).await;
        };
        if !logind::announce(self.host, message).await? {
            return Ok(());
        }
        let os = self.os(&before.os).await?;
        let (_sender, mut cancel) = tokio::sync::watch::channel(false);
        let mut unlock = async |checksum: &str| {
            let options: Options<'_> = Options::from([("checksum", Variant::from(checksum))]);
            self.transact(WHAT, os.finalize_deployment(&options), &mut cancel, &|_| {}).await
        };
        let digest = staged.digest.as_ref().map_or_else(|| staged.checksum.clone(), ToString::to_string);
        let unlocked = match unlock(&digest).await {
            // Before 2025.7 the daemon compares the ostree commit, also for a container image.
            Err(HostError::Transaction { why, .. }) if why.starts_with(OTHER_CHECKSUM) => {
                unlock(&staged.checksum).await
            }
            unlocked => unlocked,
        };
        match unlocked {
            Ok(()) => logind::reboot(self.host, message).await,
            Err(HostError::Transaction { why, .. }) => Err(HostError::Reboot(why)),
            Err(error) => Err(error),
        }
    }

    /// Removes the deployments before the booted one in boot order, if the first of them still is `checksum`.
    pub(super) async fn drop_pending(&self, checksum: &str, cancel: &mut Cancel) -> Result<(), HostError> {
        const WHAT: &str = "dropping the pending deployment";
        let is_it = |facts: &HostFacts| facts.deployments.first().is_some_and(|d| !d.booted && d.checksum == checksum);
        let before = self.snapshot().await?;
        if !is_it(&before.facts) {
            return Ok(());
        }
        let outcome = self.clean_up(WHAT, &before.os, cancel).await;
        self.judge(WHAT, outcome, |facts| !is_it(facts), "it is still first in boot order").await
    }

    async fn clean_up(&self, what: &'static str, os: &OwnedObjectPath, cancel: &mut Cancel) -> Result<(), HostError> {
        let os = self.os(os).await?;
        self.transact(what, os.cleanup(&["pending-deploy"]), cancel, &|_| {}).await
    }

    /// Changes the staged deployment's kernel arguments, and keeps it locked. Sends the whole final list instead of changes:
    /// given changes, the daemon deletes the first of two equal arguments, which is the platform's, and a deletion of
    /// `quiet` also deletes `quiet=1`.
    pub(super) async fn set_kernel_arguments(
        &self,
        image: &VerifiedImage,
        append: &[String],
        delete: &[String],
        cancel: &mut Cancel,
    ) -> Result<(), HostError> {
        const WHAT: &str = "changing kernel arguments";
        let no_effect = |why| HostError::no_effect(WHAT, why);
        let before = self.snapshot().await?;
        let staged = before.facts.staged().filter(|staged| is_image(staged, image.image(), Some(image.facts())));
        let staged = staged.ok_or_else(|| no_effect("the image is not staged any more"))?;
        let Some(existing) = staged.arguments.clone() else {
            // The daemon cannot edit a list that does not exist. A deployment that it stages itself has arguments.
            self.clean_up(WHAT, &before.os, cancel).await?;
            return Err(no_effect(
                "the deployment was staged without kernel arguments, so it was dropped and will be staged again",
            ));
        };
        let existing = without_target(existing);
        let wanted = apply(&existing, append, delete);
        let lines = join(&existing).zip(join(&wanted));
        let (line, last) = lines.ok_or_else(|| no_effect("a kernel argument has an unclosed quote"))?;
        let options: Options<'_> = Options::from([
            ("initiating-command-line", Variant::from("rebase-agent kernel arguments")),
            ("final-kernel-args", Variant::from(last.as_str())),
            ("lock-finalization", Variant::from(true)),
        ]);
        let os = self.os(&before.os).await?;
        let set = os.kernel_args(&line, &[], &[], &[], &options);
        let outcome = self.transact(WHAT, set, cancel, &|_| {}).await;
        let has_them = |facts: &HostFacts| {
            let arguments = facts.staged().and_then(|staged| staged.arguments.clone());
            arguments.is_some_and(|arguments| without_target(arguments) == wanted)
        };
        self.judge(WHAT, outcome, has_them, "the staged deployment does not have the new kernel arguments").await
    }

    /// Cancels the transaction that an earlier run of the agent started.
    pub(super) async fn cancel_ours(&self) -> Result<(), HostError> {
        const WHAT: &str = "cancelling an obsolete transaction";
        let before = self.snapshot().await?;
        let ours = before.facts.transaction.is_some_and(|transaction| transaction.ours.is_some());
        let Some(address) = before.address.filter(|_| ours) else { return Ok(()) };
        let (_sender, mut cancel) = tokio::sync::watch::channel(true);
        match self.follow(WHAT, &address, &mut cancel, &|_| {}).await {
            // The transaction has ended with some outcome; the deployments are read next.
            Ok(()) | Err(HostError::Cancelled(_) | HostError::Vanished(_) | HostError::Transaction { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn os(&self, path: &OwnedObjectPath) -> Result<OsProxy<'static>, HostError> {
        proxy_at(self.bus, path.as_str()).await.map_err(|error| self.failed("rpm-ostree", &error))
    }

    /// Creates a transaction with `call`, a method of the OS object, and waits until it ends.
    async fn transact(
        &self,
        what: &'static str,
        call: impl Future<Output = zbus::Result<String>>,
        cancel: &mut Cancel,
        progress: &Progress<'_>,
    ) -> Result<(), HostError> {
        let address = tokio::select! {
            reply = call => reply.map_err(|error| self.failed(what, &error))?,
            () = cancelled(cancel) => return Err(HostError::Cancelled(what)),
        };
        self.follow(what, &address, cancel, progress).await
    }

    /// Decides by the deployments whether a transaction succeeded, if it reported success or its outcome is unknown.
    async fn judge(
        &self,
        what: &'static str,
        outcome: Result<(), HostError>,
        reached: impl Fn(&HostFacts) -> bool,
        otherwise: &str,
    ) -> Result<(), HostError> {
        let after = match outcome {
            Ok(()) | Err(HostError::Vanished(_)) => self.snapshot().await,
            Err(error) => return Err(error),
        };
        match (outcome, after) {
            (_, Ok(after)) if reached(&after.facts) => Ok(()),
            (Ok(()), Ok(_)) => Err(HostError::no_effect(what, otherwise)),
            (Ok(()), Err(error)) | (Err(error), _) => Err(error),
        }
    }
}

/// Removes the `ostree=` argument, which names the deployment: libostree sets it when it writes the boot entry.
fn without_target(mut arguments: Vec<String>) -> Vec<String> {
    arguments.retain(|argument| !argument.starts_with("ostree="));
    arguments
}

/// Whether the call was lost because the daemon exited or has not claimed its name yet.
fn is_lost(error: &zbus::Error) -> bool {
    use zbus::fdo::Error as Fdo;
    matches!(error, zbus::Error::FDO(fdo)
        if matches!(**fdo, Fdo::NoReply(_) | Fdo::ServiceUnknown(_) | Fdo::NameHasNoOwner(_) | Fdo::TimedOut(_)))
}

fn is_timeout(error: &zbus::Error) -> bool {
    matches!(error, zbus::Error::FDO(fdo) if matches!(**fdo, zbus::fdo::Error::TimedOut(_)))
}
