//! rpm-ostree over D-Bus: deployments, and transactions on their private peer socket.
//!
//! What ends a transaction well is the deployments read afterwards, never the transaction's own word: it also says
//! success when nothing changed.

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;

use futures_util::StreamExt;
use tokio::time::{Instant, sleep_until};
use zbus::message::Type;
use zbus::{Connection, MessageStream, OwnedObjectPath, OwnedVariant, Proxy, Variant};

use super::{Cancel, Host, HostError, Progress, TITLE, call_failed, cancelled, close, digest_in_title, staged};
use crate::kernel_arguments::{apply, join};
use crate::model::{Backend, Deployment, Digest, HostFacts, Reason, Transaction, is_image, is_staged, printable};
use crate::trust::{VerifiedImage, reference, rendered_config_label, without_queries};

pub(super) const NAME: &str = "org.projectatomic.rpmostree1";
const SYSROOT: &str = "org.projectatomic.rpmostree1.Sysroot";
const OS: &str = "org.projectatomic.rpmostree1.OS";
const TRANSACTION: &str = "org.projectatomic.rpmostree1.Transaction";
pub(super) const UNIT: &str = "rpm-ostreed.service";

/// A first call may meet the daemon's idle exit and be dropped, or be given up by the bus while the daemon still loads.
const FIRST_CALLS: u32 = 4;
/// What was listed may be gone by the time it is asked for.
const LOOKS: u32 = 3;
/// Largest JSON document taken out of commit metadata, in bytes.
const MAX_METADATA: usize = 4 << 20;

pub(super) type Dict = HashMap<String, OwnedVariant>;
/// Ordered: the daemon tells an identical request, which joins, from another by the marshalled bytes.
type Options<'a> = BTreeMap<&'static str, Variant<'a>>;

/// A client of the daemon for the length of one operation. Being registered holds off the daemon's idle exit; leaving
/// the bus takes back a transaction that was not started.
struct Client<'h> {
    host: &'h Host,
    bus: Connection,
    sysroot: Proxy<'static>,
}

/// What the daemon says, with what the operations need besides.
struct Snapshot {
    facts: HostFacts,
    os: OwnedObjectPath,
    /// Peer address of the active transaction.
    address: Option<String>,
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
        let path = "/org/projectatomic/rpmostree1/Sysroot";
        let sysroot = super::proxy(&bus, NAME, path, SYSROOT).await.map_err(|error| failed(&error))?;
        let options: Options<'_> = Options::from([("id", Variant::from("rebase-agent"))]);
        let mut tries = 1;
        loop {
            let registered: Result<(), zbus::Error> = sysroot.call("RegisterClient", &(&options,)).await;
            match registered {
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

    async fn object(&self, path: &str, interface: &'static str) -> Result<Proxy<'static>, HostError> {
        super::proxy(&self.bus, NAME, path, interface).await.map_err(|error| self.failed("rpm-ostree", &error))
    }

    async fn snapshot(&self) -> Result<Snapshot, HostError> {
        let mut looks = 1;
        loop {
            match self.look(looks == LOOKS).await {
                Err(HostError::Call { .. } | HostError::Vanished(_)) if looks < LOOKS => looks += 1,
                seen => return seen,
            }
        }
    }

    /// The `last` look takes a staged deployment without a note as it is.
    async fn look(&self, last: bool) -> Result<Snapshot, HostError> {
        // Mandatory after bootc or `ostree admin` acted; properties do not follow by themselves.
        let _: () =
            self.sysroot.call("Reload", &()).await.map_err(|error| self.failed("rpm-ostree's Reload", &error))?;
        let properties: Dict = self
            .object(self.sysroot.path().as_str(), "org.freedesktop.DBus.Properties")
            .await?
            .call("GetAll", &(SYSROOT,))
            .await
            .map_err(|error| self.failed("rpm-ostree's properties", &error))?;
        let os: OwnedObjectPath = property(&properties, "Booted")
            .ok_or_else(|| HostError::confused("rpm-ostree", "Sysroot has no property Booted"))?;
        if os.as_str() == "/" {
            return Err(HostError::NotImageMode);
        }
        let dicts: Vec<Dict> = property(&properties, "Deployments")
            .ok_or_else(|| HostError::confused("rpm-ostree", "Sysroot has no property Deployments"))?;
        let mut deployments = Vec::with_capacity(dicts.len());
        for dict in &dicts {
            let mut parsed = deployment(dict)
                .ok_or_else(|| HostError::confused("rpm-ostree", "a deployment has no id, osname or checksum"))?;
            if parsed.booted || parsed.staged {
                let directory = parsed.id.strip_prefix(&format!("{}-", parsed.osname)).unwrap_or_default();
                match self.host.root.rendered_config(&parsed.osname, directory) {
                    Ok(config) => parsed.wanted_arguments = config.map(|config| config.arguments),
                    Err(why) => parsed.config_fault = Some(why),
                }
            }
            if parsed.staged {
                // Not from the daemon: its GetDeploymentBootConfig aborts it where there are no arguments, and its
                // `finalization-locked` only knows the lock of an older libostree.
                let note = match staged::read(&self.host.root, &parsed.id) {
                    // Staged, dropped or finalized since the daemon was asked.
                    None if !last => return Err(HostError::Vanished("reading the deployments")),
                    note => note.unwrap_or_default(),
                };
                (parsed.arguments, parsed.locked) = (note.arguments, parsed.locked || note.locked);
            }
            deployments.push(parsed);
        }
        let address = property::<String>(&properties, "ActiveTransactionPath").filter(|path| !path.is_empty());
        let transaction = match &address {
            Some(address) => {
                let active: Option<(String, String, String)> = property(&properties, "ActiveTransaction");
                let title = self.title(address).await?;
                let client = active.map(|(_, client, _)| printable(&client, 200)).unwrap_or_default();
                Some(Transaction { ours: digest_in_title(&title), title: printable(&title, 200), client })
            }
            None => None,
        };
        Ok(Snapshot { facts: HostFacts { backend: Backend::RpmOstree, deployments, transaction }, os, address })
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
        let body = (options, image.to_pull(), Vec::<String>::new());
        let outcome = self.transact(WHAT, &before.os, "Rebase", &body, cancel, progress).await;
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
        self.transact(what, os, "Cleanup", &(["pending-deploy"].as_slice(),), cancel, &|_| {}).await
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
        let none: &[String] = &[];
        let body = (line, none, none, none, options);
        let outcome = self.transact(WHAT, &before.os, "KernelArgs", &body, cancel, &|_| {}).await;
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

    /// Calls a method of the OS object that makes a transaction, and sees that through.
    async fn transact<B>(
        &self,
        what: &'static str,
        os: &OwnedObjectPath,
        method: &'static str,
        body: &B,
        cancel: &mut Cancel,
        progress: &Progress,
    ) -> Result<(), HostError>
    where
        B: serde::Serialize + zbus::Type,
    {
        let os = self.object(os.as_str(), OS).await?;
        let address: String = tokio::select! {
            reply = os.call(method, body) => reply.map_err(|error| self.failed(what, &error))?,
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
        #[cfg(feature = "faults")]
        if crate::faults::chosen(crate::faults::TRUST_TRANSACTION) {
            return outcome;
        }
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

    /// Starts or joins the transaction at `address` and waits for its end. The peer connection is closed at once then:
    /// a kept one keeps the daemon busy for everybody.
    async fn follow(
        &self,
        what: &'static str,
        address: &str,
        cancel: &mut Cancel,
        progress: &Progress,
    ) -> Result<(), HostError> {
        let peer = self.peer(address).await.map_err(|error| match error {
            // The daemon died between its reply and now.
            HostError::Call { .. } => HostError::Vanished(what),
            error => error,
        })?;
        let outcome = self.attend(what, &peer, cancel, progress).await;
        close(peer).await;
        outcome
    }

    async fn attend(
        &self,
        what: &'static str,
        peer: &Connection,
        cancel: &mut Cancel,
        progress: &Progress,
    ) -> Result<(), HostError> {
        let deadlines = &self.host.deadlines;
        // Before Start: a transaction that has ended already tells so once more, in answer to it.
        let mut messages = MessageStream::from(peer);
        let transaction = self.transaction(peer).await?;
        // Its effect is what is waited for; a reply would only be read after what is queued before it.
        let ask_to_end = async || {
            let asked: Result<(), zbus::Error> = transaction.call_noreply("Cancel", &()).await;
            asked.map_err(|error| self.failed("rpm-ostree's Cancel", &error))
        };
        let mut asked = *cancel.borrow();
        if asked {
            ask_to_end().await?;
        }
        // Either answer will do: false only means that this call did not start it.
        let mut start = pin!(transaction.call::<_, _, bool>("Start", &()));
        let mut started = false;
        let whole = Instant::now() + deadlines.whole;
        let (mut until, mut limit) = match asked {
            true => (Instant::now() + deadlines.cancel, deadlines.cancel),
            false => (Instant::now() + deadlines.stall, deadlines.stall),
        };
        loop {
            if !asked && until > whole {
                (until, limit) = (whole, deadlines.whole);
            }
            tokio::select! {
                answer = &mut start, if !started => {
                    started = true;
                    match answer {
                        Ok(_) => {}
                        // The end of the stream tells more.
                        Err(zbus::Error::InputOutput(io)) if io.kind() != std::io::ErrorKind::TimedOut => {}
                        Err(error) => return Err(call_failed(what, UNIT, deadlines.call, &error)),
                    }
                }
                message = messages.next() => {
                    let Some(Ok(message)) = message else { return Err(HostError::Vanished(what)) };
                    if !asked {
                        (until, limit) = (Instant::now() + deadlines.stall, deadlines.stall);
                    }
                    match heard(what, &message, progress) {
                        // The daemon's word for it depends on its locale, and on what was interrupted.
                        Some(Err(HostError::Transaction { .. })) if asked => return Err(HostError::Cancelled(what)),
                        Some(outcome) => return outcome,
                        None => {}
                    }
                }
                () = cancelled(cancel), if !asked => {
                    asked = true;
                    (until, limit) = (Instant::now() + deadlines.cancel, deadlines.cancel);
                    ask_to_end().await?;
                }
                () = sleep_until(until) => {
                    if !asked {
                        ask_to_end().await?;
                    }
                    return Err(HostError::deadline(what, limit));
                }
            }
        }
    }

    async fn title(&self, address: &str) -> Result<String, HostError> {
        let peer = self.peer(address).await?;
        let title = match self.transaction(&peer).await {
            Ok(transaction) => {
                transaction.get_property("Title").await.map_err(|error| self.failed("rpm-ostree's Title", &error))
            }
            Err(error) => Err(error),
        };
        close(peer).await;
        title
    }

    async fn transaction(&self, peer: &Connection) -> Result<Proxy<'static>, HostError> {
        super::proxy(peer, NAME, "/", TRANSACTION).await.map_err(|error| self.failed("rpm-ostree", &error))
    }

    async fn peer(&self, address: &str) -> Result<Connection, HostError> {
        const WHAT: &str = "rpm-ostree's transaction socket";
        // Other kinds of address start programs or leave the machine.
        if !address.starts_with("unix:") {
            return Err(HostError::confused(WHAT, format!("`{address}` is no local socket")));
        }
        let builder = zbus::connection::Builder::address(address).p2p().method_timeout(self.host.deadlines.call);
        self.host.connect(builder, WHAT, UNIT).await
    }
}

/// What a message of a transaction says: progress, or how it ended.
pub(super) fn heard(what: &'static str, message: &zbus::Message, progress: &Progress) -> Option<Result<(), HostError>> {
    let header = message.header();
    if message.message_type() != Type::Signal || header.interface().is_none_or(|name| name.as_str() != TRANSACTION) {
        return None;
    }
    let body = message.body();
    match header.member()?.as_str() {
        "Finished" => Some(match body.deserialize::<(bool, String)>() {
            Ok((success, text)) => finished(what, success, &text),
            Err(error) => Err(HostError::confused("rpm-ostree's Finished", error)),
        }),
        "Message" | "TaskBegin" => {
            if let Ok(text) = body.deserialize::<String>() {
                progress(printable(&text, 200));
            }
            None
        }
        _ => None,
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

pub(super) fn property<T: TryFrom<OwnedVariant>>(dict: &Dict, key: &str) -> Option<T> {
    T::try_from(dict.get(key)?.try_clone().ok()?).ok()
}

/// One dictionary of `Deployments`; keys that are missing or of another type count as absent. Pure.
pub(super) fn deployment(dict: &Dict) -> Option<Deployment> {
    let flag = |key: &str| property::<bool>(dict, key).unwrap_or(false);
    let text = |key: &str| property::<String>(dict, key);
    let id = text("id")?;
    let metadata: Dict = property(dict, "base-commit-meta").unwrap_or_default();
    let document = |key: &str| property::<String>(&metadata, key).filter(|text| text.len() <= MAX_METADATA);
    let digest = |text: Option<String>| Digest::parse(&text?);
    Some(Deployment {
        id,
        osname: text("osname")?,
        checksum: text("checksum")?,
        booted: flag("booted"),
        staged: flag("staged"),
        locked: flag("finalization-locked"),
        pinned: flag("pinned"),
        version: text("version").map(|version| printable(&version, 100)),
        reference: text("container-image-reference").and_then(|text| reference::of_deployment(&text)),
        digest: digest(text("container-image-reference-digest")).or_else(|| digest(document("ostree.manifest-digest"))),
        layered: is_layered(dict),
        rendered_config: document("ostree.container.image-config").and_then(|json| rendered_config_label(&json)),
        wanted_arguments: None,
        config_fault: None,
        arguments: None,
    })
}

fn is_layered(dict: &Dict) -> bool {
    let listed = |key: &str| match dict.get(key).map(|value| &**value) {
        Some(Variant::Array(array)) => !array.is_empty(),
        Some(Variant::Dict(dict)) => dict.iter().next().is_some(),
        _ => false,
    };
    const BASE: [&str; 3] = ["base-removals", "base-local-replacements", "base-remote-replacements"];
    dict.contains_key("base-checksum")
        || property::<bool>(dict, "regenerate-initramfs").unwrap_or(false)
        || dict.keys().any(|key| (key.starts_with("requested-") || BASE.contains(&key.as_str())) && listed(key))
}

/// The end of a transaction. Its text is English prose and only a hint at the class. The daemon's own words come first;
/// what follows [`PROXY`] is skopeo's, and behind its first words a registry's, which may say anything. Pure.
fn finished(what: &'static str, success: bool, text: &str) -> Result<(), HostError> {
    if success {
        return Ok(());
    }
    let proxy = PROXY.iter().filter_map(|word| text.find(word)).min();
    let (own, theirs) = text.split_at(proxy.unwrap_or(text.len()));
    // GIO's word, which the daemon also uses itself, and libdnf's where packages are layered.
    const CANCELLED: [&str; 2] = ["Operation was cancelled", "cancelled by user action"];
    if theirs.is_empty() && CANCELLED.iter().any(|end| own.ends_with(end)) {
        return Err(HostError::Cancelled(what));
    }
    // Where both ends of a layer failed, the importer's own words follow skopeo's.
    let both = theirs.strip_prefix(BOTH_FAILED).and_then(|both| both.rsplit_once(" and client error: "));
    let client = both.map_or("", |(_, client)| client);
    let own_has = |parts: &[&str]| parts.iter().any(|part| own.contains(part) || client.contains(part));
    let reason = if own_has(&["No space left on device", "would be exceeded", "quota exceeded"]) {
        Reason::DiskFull
    } else if own_has(&["does not have ostree.bootable label"]) {
        Reason::NotBootable
    } else if own_has(&["Unhandled layer type", "No ostree.final-diffid label"]) {
        let why = "the host tool cannot import an image of this form: build it `FROM` a bootable base image with gzip or \
                   zstd layers, and set it as the desired image";
        let why = format!("{why} ({})", printable(&without_queries(text), 300));
        return Err(HostError::Transaction { what, reason: Reason::ImageInvalid, why });
    } else {
        of_proxy(theirs)
    };
    Err(HostError::Transaction { what, reason, why: printable(&without_queries(text), 500) })
}

/// Where the daemon's own words end.
const PROXY: [&str; 5] = [
    BOTH_FAILED,
    "failed to invoke method ",
    "Failed to invoke skopeo proxy method ",
    "remote error: ",
    "proxy request returned error: ",
];
/// What begins the words of skopeo that the importer's own follow.
const BOTH_FAILED: &str = "proxy failure: ";

/// The class of what skopeo says, by its first words. Pure.
fn of_proxy(text: &str) -> Reason {
    let mut rest = text;
    while let Some(stripped) = PROXY.iter().find_map(|word| rest.strip_prefix(word)) {
        // A method's name is one word.
        rest =
            stripped.split_once(": ").filter(|(method, _)| METHODS.contains(method)).map_or(stripped, |(_, rest)| rest);
    }
    let starts = |text: &str, anchors: &[&str]| anchors.iter().any(|anchor| text.starts_with(anchor));
    // `reading manifest sha256:… in host/name: …`
    let is_manifest = rest.starts_with("reading manifest ");
    let answer = if is_manifest { rest.split_once(": ").map_or("", |(_, answer)| answer) } else { rest };
    const DENIED: [&str; 4] =
        ["unable to retrieve auth token", "unauthorized", "denied", "requested access to the resource is denied"];
    if starts(rest, &["A signature was required"]) {
        Reason::SignatureMissing
    } else if starts(
        rest,
        &["Source image rejected", "cryptographic signature verification", "Signature for ", "None of the"],
    ) {
        Reason::SignatureRejected
    } else if is_manifest && starts(answer, &["manifest unknown", "name unknown"]) {
        Reason::ManifestMissing
    } else if starts(answer, &DENIED) {
        Reason::RegistryDenied
    } else if is_manifest || starts(rest, &UNREACHABLE) {
        Reason::RegistryUnreachable
    } else {
        Reason::StageFailed
    }
}

/// The proxy's methods that a pull calls.
const METHODS: [&str; 7] =
    ["OpenImage", "OpenImageOptional", "GetManifest", "GetFullConfig", "GetBlob", "GetRawBlob", "FinishPipe"];
/// How skopeo begins when the registry does not answer, or stops in the middle of a layer.
const UNREACHABLE: [&str; 9] = [
    "pinging container registry ",
    "unexpected EOF",
    "happened during read: ",
    "reading blob ",
    "fetching blob",
    "Get \"",
    "read tcp ",
    "dial tcp ",
    "(Mirrors also failed: ",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn dict(entries: Vec<(&str, Variant<'static>)>) -> Dict {
        entries.into_iter().map(|(key, value)| (key.to_owned(), value.try_into().unwrap())).collect()
    }

    fn least() -> Vec<(&'static str, Variant<'static>)> {
        vec![("id", "rhcos-abc.0".into()), ("osname", "rhcos".into()), ("checksum", "abc".into())]
    }

    #[test]
    fn a_deployment_needs_little() {
        let parsed = deployment(&dict(least())).unwrap();
        assert_eq!(parsed.id, "rhcos-abc.0");
        assert!(!parsed.booted && !parsed.staged && !parsed.layered);
        assert_eq!((parsed.reference, parsed.digest, parsed.version), (None, None, None));
        for missing in 0..3 {
            let mut entries = least();
            entries.remove(missing);
            assert!(deployment(&dict(entries)).is_none());
        }
    }

    #[test]
    fn mistyped_keys_count_as_absent() {
        let mut entries = least();
        entries.extend([
            ("booted", "yes".into()),
            ("version", 1u32.into()),
            ("container-image-reference", true.into()),
        ]);
        let parsed = deployment(&dict(entries)).unwrap();
        assert!(!parsed.booted);
        assert_eq!((parsed.reference, parsed.version), (None, None));
    }

    #[test]
    fn the_digest_and_label_come_from_the_metadata() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        let config = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"history":[],
            "config":{"Labels":{"machineconfig":"rendered-worker-1"}}}"#;
        let metadata: HashMap<String, Variant<'static>> = HashMap::from([
            ("ostree.manifest-digest".to_owned(), Variant::from(digest.clone())),
            ("ostree.container.image-config".to_owned(), Variant::from(config.to_owned())),
        ]);
        let mut entries = least();
        entries.push(("base-commit-meta", Variant::from(metadata)));
        entries.push(("container-image-reference", "ostree-unverified-registry:quay.io/o/i:latest".into()));
        let parsed = deployment(&dict(entries)).unwrap();
        assert_eq!(parsed.digest.unwrap().as_str(), digest);
        assert_eq!(parsed.rendered_config.as_deref(), Some("rendered-worker-1"));
        assert_eq!(parsed.reference.as_deref(), Some("quay.io/o/i:latest"));
    }

    #[test]
    fn local_changes_make_it_layered() {
        for (key, value, expected) in [
            ("requested-packages", Variant::from(vec!["vim"]), true),
            ("requested-packages", Variant::from(Vec::<String>::new()), false),
            ("requested-base-removals", Variant::from(vec!["x"]), true),
            ("base-checksum", "def".into(), true),
            ("regenerate-initramfs", true.into(), true),
            ("regenerate-initramfs", false.into(), false),
            ("packages", Variant::from(vec!["vim"]), false),
            ("base-commit-meta", Variant::from(HashMap::from([("a", "b")])), false),
        ] {
            let mut entries = least();
            entries.push((key, value));
            assert_eq!(deployment(&dict(entries)).unwrap().layered, expected, "{key}");
        }
    }

    #[test]
    fn the_end_of_a_transaction_is_classified() {
        let twice = "Creating importer: failed to invoke method OpenImage: failed to invoke method OpenImage: ";
        let layer = "Importing: Parsing layer blob sha256:ab: proxy failure: failed to invoke method FinishPipe:";
        for (text, reason) in [
            (format!("{twice}A signature was required, but no signature exists"), Reason::SignatureMissing),
            (format!("{twice}cryptographic signature verification failed: x"), Reason::SignatureRejected),
            (format!("{twice}pinging container registry x: dial tcp"), Reason::RegistryUnreachable),
            ("Importing: writing: No space left on device".to_owned(), Reason::DiskFull),
            ("Operation was cancelled".to_owned(), Reason::Cancelled),
            ("Image x does not have ostree.bootable label".to_owned(), Reason::NotBootable),
            ("Old and new refs are equal: x".to_owned(), Reason::StageFailed),
            (
                "Importing: Parsing layer blob sha256:ab: proxy failure: failed to invoke method FinishPipe: \
                 unexpected EOF (while reconnecting: Get \"https://q.io/v2/\": dial tcp 192.0.2.1:443: connect: \
                 connection refused)"
                    .to_owned(),
                Reason::RegistryUnreachable,
            ),
            (format!("{twice}reading manifest sha256:ab in q.io:5000/o: manifest unknown"), Reason::ManifestMissing),
            (format!("{twice}reading manifest sha256:ab in q.io:5000/o: denied: no"), Reason::RegistryDenied),
            // A registry's words are no class.
            (
                format!("{twice}reading manifest sha256:ab in q.io/o: x: No space left on device"),
                Reason::RegistryUnreachable,
            ),
            (format!("{twice}reading manifest v1 in q.io/o: x: manifest unknown"), Reason::RegistryUnreachable),
            (format!("{twice}x: Operation was refused: unauthorized"), Reason::StageFailed),
            ("Importing: Unhandled layer type: application/x".to_owned(), Reason::ImageInvalid),
            ("Preparing import: No ostree.final-diffid label found".to_owned(), Reason::ImageInvalid),
            // The importer's own half comes last, after skopeo's.
            (
                format!("{layer} unexpected EOF and client error: Processing tar: Copying: No space left on device"),
                Reason::DiskFull,
            ),
            (
                format!("{layer} unexpected EOF and client error: Processing tar: failed to fill whole buffer"),
                Reason::RegistryUnreachable,
            ),
            (
                format!("{layer} x and client error: No space left on device and client error: Processing tar: x"),
                Reason::StageFailed,
            ),
            (format!("{twice}x and client error: No space left on device"), Reason::StageFailed),
            // skopeo's own end, with what it wrote to its standard error.
            (
                "Importing: proxy request returned error: proxy failed: exit status: 1\nNo space left on device"
                    .to_owned(),
                Reason::StageFailed,
            ),
            // Cancelled in the middle of something, or before it began.
            ("Checking out tree: Operation was cancelled".to_owned(), Reason::Cancelled),
            ("Downloading metadata for 'updates': cancelled by user action".to_owned(), Reason::Cancelled),
            ("Operation was cancelled at 12:00".to_owned(), Reason::StageFailed),
            (format!("{twice}denied: Operation was cancelled"), Reason::RegistryDenied),
            (String::new(), Reason::StageFailed),
        ] {
            assert_eq!(finished("staging", false, &text).unwrap_err().reason(), reason, "{text}");
        }
        assert!(finished("staging", true, "No change.").is_ok());
        let presigned = finished("staging", false, "Get \"https://cdn/blob?Signature=secret\": EOF").unwrap_err();
        assert!(!presigned.to_string().contains("secret") && presigned.to_string().ends_with("EOF"), "{presigned}");
        let error = finished("staging", false, &"x\n".repeat(100_000)).unwrap_err();
        assert!(error.to_string().len() < 1_200);
    }
}
