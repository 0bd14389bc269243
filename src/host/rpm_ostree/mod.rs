//! rpm-ostree over D-Bus: deployments, and transactions on their private peer socket.
//!
//! What ends a transaction well is the deployments read afterwards, never the transaction's own word: it also says
//! success when nothing changed.

mod deployments;
mod transaction;

use zbus::{Connection, OwnedObjectPath, Variant};

use super::dbus::{Options, OsProxy, SysrootProxy, close, proxy, proxy_at};
use super::{Cancel, Host, HostError, Progress, TITLE, call_failed, cancelled};
use crate::kernel_arguments::{apply, join};
use crate::model::{Deployment, HostFacts, is_image, is_staged, printable};
use crate::trust::VerifiedImage;
#[cfg(fuzzing)]
pub(super) use deployments::{deployment, property};
#[cfg(fuzzing)]
pub(super) use transaction::heard;

pub(super) const UNIT: &str = "rpm-ostreed.service";

/// A first call may meet the daemon's idle exit and be dropped, or be given up by the bus while the daemon still loads.
const FIRST_CALLS: u32 = 4;

/// A client of the daemon for the length of one operation. Being registered holds off the daemon's idle exit; leaving
/// the bus takes back a transaction that was not started.
struct Client<'h> {
    host: &'h Host,
    bus: Connection,
    sysroot: SysrootProxy<'static>,
}

/// Reads deployments and transaction.
pub(super) async fn read(host: &Host) -> Result<HostFacts, HostError> {
    let client = Client::connect(host).await?;
    let snapshot = client.snapshot().await;
    client.close().await;
    Ok(snapshot?.facts)
}

/// Stages `image` or attaches to our own transaction that does.
pub(super) async fn stage(
    host: &Host,
    image: &VerifiedImage,
    cancel: &mut Cancel,
    progress: &Progress,
) -> Result<(), HostError> {
    let client = Client::connect(host).await?;
    let outcome = client.stage(image, cancel, progress).await;
    client.close().await;
    outcome
}

/// Removes what is before the booted deployment in boot order if the first of it still is `checksum`.
pub(super) async fn drop_pending(host: &Host, checksum: &str, cancel: &mut Cancel) -> Result<(), HostError> {
    let client = Client::connect(host).await?;
    let outcome = client.drop_pending(checksum, cancel).await;
    client.close().await;
    outcome
}

/// Changes the staged deployment's kernel arguments.
pub(super) async fn set_kernel_arguments(
    host: &Host,
    image: &VerifiedImage,
    append: &[String],
    delete: &[String],
    cancel: &mut Cancel,
) -> Result<(), HostError> {
    let client = Client::connect(host).await?;
    let outcome = client.set_kernel_arguments(image, append, delete, cancel).await;
    client.close().await;
    outcome
}

/// Cancels a transaction of ours that an earlier run of the agent started.
pub(super) async fn cancel_ours(host: &Host) -> Result<(), HostError> {
    let client = Client::connect(host).await?;
    let outcome = client.cancel_ours().await;
    client.close().await;
    outcome
}

impl<'h> Client<'h> {
    async fn connect(host: &'h Host) -> Result<Self, HostError> {
        const WHAT: &str = "rpm-ostree's RegisterClient";
        let bus = host.connect_to_bus(host.deadlines.reply).await?;
        let failed = |error: &zbus::Error| call_failed(WHAT, UNIT, host.deadlines.reply, error);
        let sysroot: SysrootProxy<'_> = proxy(&bus).await.map_err(|error| failed(&error))?;
        let options: Options<'_> = Options::from([("id", Variant::from("rebase-agent"))]);
        let mut tries = 1;
        loop {
            match sysroot.register_client(&options).await {
                Ok(()) => break,
                Err(error) if is_lost(&error) && tries < FIRST_CALLS => tries += 1,
                // A bus that gave up waiting says nothing of the daemon's end.
                Err(error) if is_lost(&error) && !is_timeout(&error) => {
                    let why = printable(&error.to_string(), 300);
                    return Err(HostError::Dies { unit: UNIT, tries, why });
                }
                Err(error) => match failed(&error) {
                    // Transactions work unregistered, too.
                    HostError::Denied { .. } => break,
                    error => return Err(error),
                },
            }
        }
        Ok(Self { host, bus, sysroot })
    }

    async fn close(self) {
        drop(self.sysroot);
        close(self.bus).await;
    }

    fn failed(&self, what: &'static str, error: &zbus::Error) -> HostError {
        call_failed(what, UNIT, self.host.deadlines.reply, error)
    }

    async fn stage(&self, image: &VerifiedImage, cancel: &mut Cancel, progress: &Progress) -> Result<(), HostError> {
        const WHAT: &str = "staging the image";
        let is_it = |deployment: &Deployment| is_image(deployment, image.image(), Some(image.facts()));
        let is_ready = |facts: &HostFacts| {
            facts.staged().is_some_and(|staged| is_staged(staged, image.image(), Some(image.facts())))
        };
        let boots_next = |facts: &HostFacts| facts.deployments.first().filter(|first| is_it(first)).cloned();
        let mut before = self.snapshot().await?;
        match (&before.facts.transaction, &before.address) {
            (Some(active), Some(address)) if active.ours.as_ref() == Some(image.image().digest()) => {
                let outcome = self.follow(WHAT, address, cancel, progress).await;
                return self.judge(WHAT, outcome, is_ready, "the image is not staged").await;
            }
            (Some(active), _) => return Err(HostError::Busy(format!("transaction `{}` is active", active.title))),
            (None, _) => {}
        }
        // Sending the reference that is first in boot order already is an error: "Old and new refs are equal".
        match boots_next(&before.facts) {
            Some(first) if first.booted || is_ready(&before.facts) => return Ok(()),
            // Locked, with packages layered, or finalized and fallen back from: it is dropped and staged again.
            Some(_) => {
                self.clean_up(WHAT, &before.os, cancel).await?;
                before = self.snapshot().await?;
            }
            None => {}
        }
        let title = format!("{TITLE}{}", image.image().digest());
        let options: Options<'_> = Options::from([
            ("initiating-command-line", Variant::from(title.as_str())),
            // Going back to an older image is refused otherwise.
            ("allow-downgrade", Variant::from(true)),
        ]);
        let reference = image.to_pull();
        let os = self.os(&before.os).await?;
        let outcome = self.transact(WHAT, os.rebase(&options, &reference, &[]), cancel, progress).await;
        self.judge(WHAT, outcome, is_ready, "the image is not staged").await
    }

    async fn drop_pending(&self, checksum: &str, cancel: &mut Cancel) -> Result<(), HostError> {
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

    /// The whole list is given, not what to delete and append: of equal arguments the daemon deletes the first, which is
    /// the platform's, and `quiet` deletes a lone `quiet=1`.
    async fn set_kernel_arguments(
        &self,
        image: &VerifiedImage,
        append: &[String],
        delete: &[String],
        cancel: &mut Cancel,
    ) -> Result<(), HostError> {
        const WHAT: &str = "changing kernel arguments";
        let no_effect = |why: &str| HostError::NoEffect { what: WHAT, why: why.to_owned() };
        let before = self.snapshot().await?;
        let staged = before.facts.staged().filter(|staged| is_image(staged, image.image(), Some(image.facts())));
        let staged = staged.ok_or_else(|| no_effect("the image is not staged any more"))?;
        let Some(existing) = staged.arguments.clone() else {
            // What the daemon would edit is not there; an image that it stages has arguments.
            self.clean_up(WHAT, &before.os, cancel).await?;
            return Err(no_effect("the deployment was staged without any; it was dropped, to be staged again"));
        };
        let existing = without_target(existing);
        let wanted = apply(&existing, append, delete);
        let lines = join(&existing).zip(join(&wanted));
        let (line, last) = lines.ok_or_else(|| no_effect("an argument has a quote that is never closed"))?;
        let options: Options<'_> = Options::from([
            ("initiating-command-line", Variant::from("rebase-agent kernel arguments")),
            ("final-kernel-args", Variant::from(last.as_str())),
        ]);
        let os = self.os(&before.os).await?;
        let set = os.kernel_args(&line, &[], &[], &[], &options);
        let outcome = self.transact(WHAT, set, cancel, &|_| {}).await;
        let has_them = |facts: &HostFacts| {
            let arguments = facts.staged().and_then(|staged| staged.arguments.clone());
            arguments.is_some_and(|arguments| without_target(arguments) == wanted)
        };
        self.judge(WHAT, outcome, has_them, "the staged deployment does not have them").await
    }

    async fn cancel_ours(&self) -> Result<(), HostError> {
        const WHAT: &str = "cancelling an obsolete transaction";
        let before = self.snapshot().await?;
        let ours = before.facts.transaction.is_some_and(|transaction| transaction.ours.is_some());
        let Some(address) = before.address.filter(|_| ours) else { return Ok(()) };
        let (_sender, mut cancel) = tokio::sync::watch::channel(true);
        match self.follow(WHAT, &address, &mut cancel, &|_| {}).await {
            // Whatever it came to, it has ended, and the deployments are read next.
            Ok(()) | Err(HostError::Cancelled(_) | HostError::Vanished(_) | HostError::Transaction { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn os(&self, path: &OwnedObjectPath) -> Result<OsProxy<'static>, HostError> {
        proxy_at(&self.bus, path.as_str()).await.map_err(|error| self.failed("rpm-ostree", &error))
    }

    /// Makes a transaction with `call`, a method of the OS object, and sees it through.
    async fn transact(
        &self,
        what: &'static str,
        call: impl Future<Output = zbus::Result<String>>,
        cancel: &mut Cancel,
        progress: &Progress,
    ) -> Result<(), HostError> {
        let address = tokio::select! {
            reply = call => reply.map_err(|error| self.failed(what, &error))?,
            () = cancelled(cancel) => return Err(HostError::Cancelled(what)),
        };
        self.follow(what, &address, cancel, progress).await
    }

    /// What a transaction came to is what the deployments say after it, where it may have come to anything.
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
            (Ok(()), Ok(_)) => Err(HostError::NoEffect { what, why: otherwise.to_owned() }),
            (Ok(()), Err(error)) | (Err(error), _) => Err(error),
        }
    }
}

/// Without the argument that names the deployment itself: libostree sets it when it writes the boot entry.
fn without_target(mut arguments: Vec<String>) -> Vec<String> {
    arguments.retain(|argument| !argument.starts_with("ostree="));
    arguments
}

/// The daemon let go of its name while our call was on its way, or does not have it yet.
fn is_lost(error: &zbus::Error) -> bool {
    use zbus::fdo::Error as Fdo;
    matches!(error, zbus::Error::FDO(fdo)
        if matches!(**fdo, Fdo::NoReply(_) | Fdo::ServiceUnknown(_) | Fdo::NameHasNoOwner(_) | Fdo::TimedOut(_)))
}

fn is_timeout(error: &zbus::Error) -> bool {
    matches!(error, zbus::Error::FDO(fdo) if matches!(**fdo, zbus::fdo::Error::TimedOut(_)))
}
