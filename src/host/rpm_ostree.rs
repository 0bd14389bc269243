//! rpm-ostree over D-Bus: deployments, and transactions on their private peer socket.
//!
//! What ends a transaction well is the deployments read afterwards, never the transaction's own word: it also says
//! success when nothing changed.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures_util::StreamExt;
use zbus::message::Type;
use zbus::{Connection, MessageStream, OwnedObjectPath, OwnedVariant, Proxy, Variant};

use super::boot::{Root, split_arguments};
use super::{
    CALL, Cancel, HostError, Progress, TITLE, call_failed, cancelled, close, connect, digest_in_title, is_image,
    system_bus,
};
use crate::model::{Deployment, Digest, HostFacts, PinnedImage, Reason, Transaction, printable};
use crate::registry::{Verified, reference, rendered_config_label};

const NAME: &str = "org.projectatomic.rpmostree1";
const SYSROOT: &str = "org.projectatomic.rpmostree1.Sysroot";
const OS: &str = "org.projectatomic.rpmostree1.OS";
const TRANSACTION: &str = "org.projectatomic.rpmostree1.Transaction";
const UNIT: &str = "rpm-ostreed.service";

/// The daemon loads the sysroot before it claims its name (`TimeoutStartSec=5m`); its own client waits as long.
const REPLY: Duration = Duration::from_secs(300);
/// A first call may meet the daemon's idle exit and be dropped.
const IDLE_EXIT_RETRIES: u32 = 3;
/// Longest silence of a running transaction. Container pulls tell layer by layer, and one layer may be gigabytes.
const STALL: Duration = Duration::from_secs(30 * 60);
/// Longest transaction.
const WHOLE: Duration = Duration::from_secs(3 * 60 * 60);
/// How long a cancelled transaction may take to end.
const CANCEL: Duration = Duration::from_secs(60);
/// Largest JSON document taken out of commit metadata, in bytes.
const MAX_METADATA: usize = 4 << 20;

type Dict = HashMap<String, OwnedVariant>;
/// Ordered: the daemon tells an identical request, which joins, from another by the marshalled bytes.
type Options<'a> = BTreeMap<&'static str, Variant<'a>>;

/// A client of the daemon for the length of one operation.
struct Client {
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

impl Client {
    async fn connect() -> Result<Self, HostError> {
        let bus = system_bus(REPLY).await?;
        let sysroot = proxy(&bus, "/org/projectatomic/rpmostree1/Sysroot", SYSROOT).await?;
        let options: Options<'_> = Options::from([("id", Variant::from("rebase-agent"))]);
        let mut tries = 0;
        loop {
            let registered: Result<(), zbus::Error> = sysroot.call("RegisterClient", &(&options,)).await;
            match registered {
                Ok(()) => break,
                Err(error) if idle_exit(&error) && tries < IDLE_EXIT_RETRIES => tries += 1,
                Err(error) => match failed("rpm-ostree's RegisterClient", &error) {
                    // Transactions work unregistered, too; registration only holds off the idle exit.
                    HostError::Denied { .. } => break,
                    error => return Err(error),
                },
            }
        }
        Ok(Self { bus, sysroot })
    }

    async fn snapshot(&self, root: &Root) -> Result<Snapshot, HostError> {
        const WHAT: &str = "rpm-ostree's Reload";
        // Mandatory after bootc or `ostree admin` acted; properties do not follow by themselves.
        let _: () = self.sysroot.call("Reload", &()).await.map_err(|e| failed(WHAT, &e))?;
        let properties: Dict = proxy(&self.bus, self.sysroot.path().as_str(), "org.freedesktop.DBus.Properties")
            .await?
            .call("GetAll", &(SYSROOT,))
            .await
            .map_err(|e| failed("rpm-ostree's properties", &e))?;
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
                parsed.wanted_arguments = root.wanted_arguments(&parsed.osname, directory);
            }
            if parsed.staged {
                parsed.arguments = Some(split_arguments(&self.boot_arguments(&os, &parsed.id).await?));
            }
            deployments.push(parsed);
        }
        let address = property::<String>(&properties, "ActiveTransactionPath").filter(|path| !path.is_empty());
        let active: Option<(String, String, String)> = property(&properties, "ActiveTransaction");
        let transaction = match (&address, active) {
            (Some(address), Some((_, client, _))) => {
                let title = title(address).await?;
                let ours = digest_in_title(&title);
                Some(Transaction { title: printable(&title, 200), client: printable(&client, 200), ours })
            }
            _ => None,
        };
        Ok(Snapshot { facts: HostFacts { deployments, transaction }, os, address })
    }

    async fn boot_arguments(&self, os: &OwnedObjectPath, id: &str) -> Result<String, HostError> {
        const WHAT: &str = "rpm-ostree's GetDeploymentBootConfig";
        let config: Dict = proxy(&self.bus, os.as_str(), OS)
            .await?
            .call("GetDeploymentBootConfig", &(id, true))
            .await
            .map_err(|e| failed(WHAT, &e))?;
        property(&config, "options").ok_or_else(|| HostError::confused(WHAT, "there are no `options`"))
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
        let os = proxy(&self.bus, os.as_str(), OS).await?;
        let address: String = os.call(method, body).await.map_err(|e| failed(what, &e))?;
        follow(what, &address, cancel, progress).await
    }

    async fn close(self) {
        drop(self.sysroot);
        close(self.bus).await;
    }
}

/// Reads deployments and transaction.
pub(super) async fn read(root: &Root) -> Result<HostFacts, HostError> {
    let client = Client::connect().await?;
    let snapshot = client.snapshot(root).await;
    client.close().await;
    Ok(snapshot?.facts)
}

/// Stages `image` or attaches to our own transaction that does.
pub(super) async fn stage(
    root: &Root,
    image: &Verified<PinnedImage>,
    cancel: &mut Cancel,
    progress: &Progress,
) -> Result<(), HostError> {
    const WHAT: &str = "staging the image";
    let wanted =
        |facts: &HostFacts| facts.staged().is_some_and(|staged| is_image(staged, image.get(), Some(image.facts())));
    let client = Client::connect().await?;
    let before = client.snapshot(root).await?;
    if wanted(&before.facts) {
        // Sending the reference again would be an error: "Old and new refs are equal".
        return Ok(());
    }
    let outcome = match (&before.facts.transaction, &before.address) {
        (Some(active), Some(address)) if active.ours.as_ref() == Some(image.get().digest()) => {
            follow(WHAT, address, cancel, progress).await
        }
        (Some(active), _) => return Err(HostError::Busy(format!("transaction `{}` is active", active.title))),
        _ => {
            let title = format!("{TITLE}{}", image.get().digest());
            let options: Options<'_> = Options::from([
                ("initiating-command-line", Variant::from(title.as_str())),
                // Going back to an older image is refused otherwise.
                ("allow-downgrade", Variant::from(true)),
            ]);
            let body = (options, image.to_pull(), Vec::<String>::new());
            client.transact(WHAT, &before.os, "Rebase", &body, cancel, progress).await
        }
    };
    let after = match &outcome {
        Ok(()) | Err(HostError::Vanished(_)) => client.snapshot(root).await,
        Err(_) => return outcome,
    };
    client.close().await;
    match (outcome, after) {
        (_, Ok(after)) if wanted(&after.facts) => Ok(()),
        (Ok(()), Ok(_)) => Err(HostError::NoEffect { what: WHAT, why: "the image is not staged".to_owned() }),
        (Ok(()), Err(error)) | (Err(error), _) => Err(error),
    }
}

/// Removes the staged deployment if it still is `checksum`.
pub(super) async fn drop_staged(root: &Root, checksum: &str, cancel: &mut Cancel) -> Result<(), HostError> {
    let is_it = |facts: &HostFacts| facts.staged().is_some_and(|staged| staged.checksum == checksum);
    const WHAT: &str = "dropping the staged deployment";
    let client = Client::connect().await?;
    let before = client.snapshot(root).await?;
    if !is_it(&before.facts) {
        return Ok(());
    }
    client.transact(WHAT, &before.os, "Cleanup", &(["pending-deploy"].as_slice(),), cancel, &|_| {}).await?;
    let after = client.snapshot(root).await?;
    client.close().await;
    if is_it(&after.facts) {
        return Err(HostError::NoEffect { what: WHAT, why: format!("{checksum} is still staged") });
    }
    Ok(())
}

/// Changes the staged deployment's kernel arguments.
pub(super) async fn set_kernel_arguments(
    root: &Root,
    append: &[String],
    delete: &[String],
    cancel: &mut Cancel,
) -> Result<(), HostError> {
    const WHAT: &str = "changing kernel arguments";
    let client = Client::connect().await?;
    let before = client.snapshot(root).await?;
    let Some(staged) = before.facts.staged() else {
        return Err(HostError::NoEffect { what: WHAT, why: "nothing is staged any more".to_owned() });
    };
    let existing = client.boot_arguments(&before.os, &staged.id).await?;
    let options: Options<'_> =
        Options::from([("initiating-command-line", Variant::from("rebase-agent kernel arguments"))]);
    let body = (existing, append, Vec::<String>::new(), delete, options);
    client.transact(WHAT, &before.os, "KernelArgs", &body, cancel, &|_| {}).await?;
    let after = client.snapshot(root).await?;
    client.close().await;
    let arguments = after.facts.staged().and_then(|staged| staged.arguments.as_deref()).unwrap_or_default();
    if append.iter().all(|argument| arguments.contains(argument)) && delete.iter().all(|a| !arguments.contains(a)) {
        Ok(())
    } else {
        Err(HostError::NoEffect { what: WHAT, why: "the staged deployment does not have them".to_owned() })
    }
}

/// Cancels a transaction of ours that an earlier run of the agent started.
pub(super) async fn cancel_ours() -> Result<(), HostError> {
    const WHAT: &str = "cancelling an obsolete transaction";
    let client = Client::connect().await?;
    let address: String = client
        .sysroot
        .get_property("ActiveTransactionPath")
        .await
        .map_err(|e| failed("rpm-ostree's properties", &e))?;
    if !address.is_empty() && digest_in_title(&title(&address).await?).is_some() {
        let (sender, mut cancel) = tokio::sync::watch::channel(true);
        let outcome = follow(WHAT, &address, &mut cancel, &|_| {}).await;
        drop(sender);
        match outcome {
            // Whatever it came to, it has ended, and the deployments are read next.
            Ok(()) | Err(HostError::Cancelled(_) | HostError::Vanished(_) | HostError::Transaction { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    client.close().await;
    Ok(())
}

/// Starts or joins the transaction at `address` and waits for its end. The peer connection is closed at once then:
/// a kept one keeps the daemon busy for everybody.
async fn follow(what: &'static str, address: &str, cancel: &mut Cancel, progress: &Progress) -> Result<(), HostError> {
    let peer = peer(address).await.map_err(|error| match error {
        // The daemon died between its reply and now.
        HostError::Call { .. } => HostError::Vanished(what),
        error => error,
    })?;
    let whole = async {
        match tokio::time::timeout(WHOLE, started(what, &peer, cancel, progress)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(HostError::Deadline { what, seconds: WHOLE.as_secs() }),
        }
    };
    let outcome = whole.await;
    if let Err(HostError::Deadline { .. }) = outcome {
        let _ = tokio::time::timeout(CANCEL, call_cancel(&peer)).await;
    }
    close(peer).await;
    outcome
}

async fn started(
    what: &'static str,
    peer: &Connection,
    cancel: &mut Cancel,
    progress: &Progress,
) -> Result<(), HostError> {
    // Before Start: a transaction that has ended already tells so once more, in answer to it.
    let mut messages = MessageStream::from(peer);
    let start = proxy(peer, "/", TRANSACTION).await?;
    let begun: Result<bool, zbus::Error> = start.call("Start", &()).await;
    match begun {
        // Either way it runs or has run: false only means that this call did not start it.
        Ok(_) => {}
        Err(zbus::Error::InputOutput(_)) => return Err(HostError::Vanished(what)),
        Err(error) => return Err(failed(what, &error)),
    }
    let mut asked = false;
    loop {
        let limit = if asked { CANCEL } else { STALL };
        tokio::select! {
            message = tokio::time::timeout(limit, messages.next()) => {
                let message = match message {
                    Ok(Some(Ok(message))) => message,
                    Ok(_) => return Err(HostError::Vanished(what)),
                    Err(_) => return Err(HostError::Deadline { what, seconds: limit.as_secs() }),
                };
                if message.message_type() != Type::Signal {
                    continue;
                }
                let header = message.header();
                let body = message.body();
                match header.member().map(|member| member.as_str()) {
                    Some("Finished") => {
                        let (success, text): (bool, String) =
                            body.deserialize().map_err(|e| HostError::confused("rpm-ostree's Finished", e))?;
                        return finished(what, success, &text);
                    }
                    Some("Message" | "TaskBegin") => {
                        if let Ok(text) = body.deserialize::<String>() {
                            progress(printable(&text, 200));
                        }
                    }
                    _ => {}
                }
            }
            () = cancelled(cancel), if !asked => {
                asked = true;
                call_cancel(peer).await?;
            }
        }
    }
}

async fn call_cancel(peer: &Connection) -> Result<(), HostError> {
    let transaction = proxy(peer, "/", TRANSACTION).await?;
    transaction.call("Cancel", &()).await.map_err(|e| failed("rpm-ostree's Cancel", &e))
}

async fn title(address: &str) -> Result<String, HostError> {
    let peer = peer(address).await?;
    let title = match proxy(&peer, "/", TRANSACTION).await {
        Ok(transaction) => transaction.get_property("Title").await.map_err(|e| failed("rpm-ostree's Title", &e)),
        Err(error) => Err(error),
    };
    close(peer).await;
    title
}

async fn peer(address: &str) -> Result<Connection, HostError> {
    const WHAT: &str = "rpm-ostree's transaction socket";
    if !address.starts_with("unix:") {
        return Err(HostError::confused(WHAT, format!("`{address}` is no local socket")));
    }
    let builder = zbus::connection::Builder::address(address).p2p().method_timeout(CALL);
    connect(builder, WHAT, UNIT).await
}

async fn proxy(bus: &Connection, path: &str, interface: &'static str) -> Result<Proxy<'static>, HostError> {
    super::proxy(bus, NAME, path, interface).await.map_err(|e| failed("rpm-ostree", &e))
}

fn failed(what: &'static str, error: &zbus::Error) -> HostError {
    call_failed(what, UNIT, REPLY, error)
}

/// The daemon let go of its name while our call was on its way.
fn idle_exit(error: &zbus::Error) -> bool {
    use zbus::fdo::Error as Fdo;
    matches!(error, zbus::Error::FDO(fdo)
        if matches!(**fdo, Fdo::NoReply(_) | Fdo::ServiceUnknown(_) | Fdo::NameHasNoOwner(_)))
}

fn property<T: TryFrom<OwnedVariant>>(dict: &Dict, key: &str) -> Option<T> {
    T::try_from(dict.get(key)?.try_clone().ok()?).ok()
}

/// One dictionary of `Deployments`; keys that are missing or of another type count as absent. Pure.
fn deployment(dict: &Dict) -> Option<Deployment> {
    let flag = |key: &str| property::<bool>(dict, key).unwrap_or(false);
    let text = |key: &str| property::<String>(dict, key);
    let id = text("id")?;
    let metadata: Dict = property(dict, "base-commit-meta").unwrap_or_default();
    let document = |key: &str| property::<String>(&metadata, key).filter(|text| text.len() <= MAX_METADATA);
    let digest = text("container-image-reference-digest").or_else(|| document("ostree.manifest-digest"));
    Some(Deployment {
        id,
        osname: text("osname")?,
        checksum: text("checksum")?,
        booted: flag("booted"),
        staged: flag("staged"),
        pinned: flag("pinned"),
        version: text("version").map(|version| printable(&version, 100)),
        reference: text("container-image-reference").and_then(|text| reference::of_deployment(&text)),
        digest: digest.and_then(|digest| Digest::parse(&digest)),
        layered: is_layered(dict),
        rendered_config: document("ostree.container.image-config").and_then(|json| rendered_config_label(&json)),
        wanted_arguments: None,
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

/// The end of a transaction. Its text is English prose and only a hint at the class. Pure.
fn finished(what: &'static str, success: bool, text: &str) -> Result<(), HostError> {
    const PREFIXES: [&str; 6] = [
        "Creating importer: ",
        "Preparing import: ",
        "Fetching manifest: ",
        "failed to invoke method OpenImage: ",
        "Failed to invoke skopeo proxy method OpenImage: ",
        "remote error: ",
    ];
    if success {
        return Ok(());
    }
    let mut rest = text;
    while let Some(stripped) = PREFIXES.iter().find_map(|prefix| rest.strip_prefix(prefix)) {
        rest = stripped;
    }
    let starts = |anchors: &[&str]| anchors.iter().any(|anchor| rest.starts_with(anchor));
    let has = |parts: &[&str]| parts.iter().any(|part| text.contains(part));
    let reason = if text.contains("Operation was cancelled") {
        return Err(HostError::Cancelled(what));
    } else if starts(&["A signature was required"]) {
        Reason::SignatureMissing
    } else if starts(&[
        "Source image rejected",
        "cryptographic signature verification",
        "Signature for ",
        "None of the",
    ]) {
        Reason::SignatureRejected
    } else if has(&["No space left on device", "would be exceeded", "Insufficient free space for", "quota exceeded"]) {
        Reason::DiskFull
    } else if has(&["does not have ostree.bootable label"]) {
        Reason::NotBootable
    } else if starts(&["pinging container registry", "reading manifest"]) {
        Reason::RegistryUnreachable
    } else {
        Reason::StageFailed
    };
    Err(HostError::Transaction { what, reason, why: printable(text, 500) })
}

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
        for (text, reason) in [
            (format!("{twice}A signature was required, but no signature exists"), Reason::SignatureMissing),
            (format!("{twice}cryptographic signature verification failed: x"), Reason::SignatureRejected),
            (format!("{twice}pinging container registry x: dial tcp"), Reason::RegistryUnreachable),
            ("Importing: writing: No space left on device".to_owned(), Reason::DiskFull),
            ("Operation was cancelled".to_owned(), Reason::Cancelled),
            ("Image x does not have ostree.bootable label".to_owned(), Reason::NotBootable),
            ("Old and new refs are equal: x".to_owned(), Reason::StageFailed),
            (String::new(), Reason::StageFailed),
        ] {
            assert_eq!(finished("staging", false, &text).unwrap_err().reason(), reason, "{text}");
        }
        assert!(finished("staging", true, "No change.").is_ok());
        let error = finished("staging", false, &"x\n".repeat(100_000)).unwrap_err();
        assert!(error.to_string().len() < 1_200);
    }
}
