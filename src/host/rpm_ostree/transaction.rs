//! Follows a transaction of rpm-ostreed on its own socket until it ends, and classifies a failure by its message.

use std::pin::pin;

use futures_util::StreamExt;
use tokio::time::{Instant, sleep_until};
use zbus::message::Type;
use zbus::{Connection, MessageStream};

use super::{Client, UNIT};
use crate::host::dbus::{TRANSACTION, TransactionProxy, close, proxy};
use crate::host::{Cancel, HostError, Progress, call_failed, cancelled};
use crate::model::{Reason, printable};
use crate::trust::without_queries;

impl Client<'_> {
    /// Starts or joins the transaction at `address` and waits until it ends. Then the connection is closed at once,
    /// because the daemon stays busy while it is open.
    pub(super) async fn follow(
        &self,
        what: &'static str,
        address: &str,
        cancel: &mut Cancel,
        progress: &Progress<'_>,
    ) -> Result<(), HostError> {
        let peer = self.peer(address).await.map_err(|error| match error {
            // The daemon exited after its reply.
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
        progress: &Progress<'_>,
    ) -> Result<(), HostError> {
        let deadlines = &self.host.deadlines;
        // Listen before Start: in answer to it, a transaction that has already ended repeats its last signal.
        let mut messages = MessageStream::from(peer);
        let transaction = self.transaction(peer).await?;
        let ask_to_end =
            async || transaction.cancel().await.map_err(|error| self.failed("rpm-ostree's Cancel", &error));
        let mut asked = *cancel.borrow();
        if asked {
            ask_to_end().await?;
        }
        // Both answers are fine: false means that the transaction had been started before.
        let mut start = pin!(transaction.start());
        let mut started = false;
        let whole = Instant::now() + deadlines.whole;
        let after = |limit| (Instant::now() + limit, limit);
        let (mut until, mut limit) = after(if asked { deadlines.cancel } else { deadlines.stall });
        loop {
            if !asked && until > whole {
                (until, limit) = (whole, deadlines.whole);
            }
            tokio::select! {
                answer = &mut start, if !started => {
                    started = true;
                    match answer {
                        Ok(_) => {}
                        // The message stream reports the end of the connection.
                        Err(zbus::Error::InputOutput(io)) if io.kind() != std::io::ErrorKind::TimedOut => {}
                        Err(error) => return Err(call_failed(what, UNIT, deadlines.call, &error)),
                    }
                }
                message = messages.next() => {
                    let Some(Ok(message)) = message else { return Err(HostError::Vanished(what)) };
                    if !asked {
                        (until, limit) = after(deadlines.stall);
                    }
                    match heard(what, &message, progress) {
                        // The daemon's message for this depends on its locale and on the interrupted step.
                        Some(Err(HostError::Transaction { .. })) if asked => return Err(HostError::Cancelled(what)),
                        Some(outcome) => return outcome,
                        None => {}
                    }
                }
                () = cancelled(cancel), if !asked => {
                    asked = true;
                    (until, limit) = after(deadlines.cancel);
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

    pub(super) async fn title(&self, address: &str) -> Result<String, HostError> {
        let peer = self.peer(address).await?;
        let title = match self.transaction(&peer).await {
            Ok(transaction) => transaction.title().await.map_err(|error| self.failed("rpm-ostree's Title", &error)),
            Err(error) => Err(error),
        };
        close(peer).await;
        title
    }

    async fn transaction(&self, peer: &Connection) -> Result<TransactionProxy<'static>, HostError> {
        proxy(peer).await.map_err(|error| self.failed("rpm-ostree", &error))
    }

    async fn peer(&self, address: &str) -> Result<Connection, HostError> {
        const WHAT: &str = "rpm-ostree's transaction socket";
        // Other kinds of address start programs or connect to other machines.
        if !address.starts_with("unix:") {
            return Err(HostError::confused(WHAT, format!("`{address}` is not a local socket")));
        }
        let builder = zbus::connection::Builder::address(address).p2p().method_timeout(self.host.deadlines.call);
        self.host.connect(builder, WHAT, UNIT).await
    }
}

/// Handles a message of a transaction: passes on progress, and returns the outcome when it has ended.
pub fn heard(what: &'static str, message: &zbus::Message, progress: &Progress<'_>) -> Option<Result<(), HostError>> {
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

/// Classifies the end of a transaction by its text, for which there are no error codes. The text begins with the daemon's
/// own message. The part after [`PROXY`] is skopeo's, and its later words are a registry's and not trusted. Pure.
fn finished(what: &'static str, success: bool, text: &str) -> Result<(), HostError> {
    if success {
        return Ok(());
    }
    let proxy = PROXY.iter().filter_map(|word| text.find(word)).min();
    let (own, theirs) = text.split_at(proxy.unwrap_or(text.len()));
    // The text of GIO and the daemon, and that of libdnf where packages are layered.
    const CANCELLED: [&str; 2] = ["Operation was cancelled", "cancelled by user action"];
    if theirs.is_empty() && CANCELLED.iter().any(|end| own.ends_with(end)) {
        return Err(HostError::Cancelled(what));
    }
    // If both skopeo and the importer failed on a layer, the importer's message follows skopeo's.
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

/// The end of the daemon's own message: skopeo's begins with one of these.
const PROXY: [&str; 5] = [
    BOTH_FAILED,
    "failed to invoke method ",
    "Failed to invoke skopeo proxy method ",
    "remote error: ",
    "proxy request returned error: ",
];

/// The prefix of skopeo's message if the importer's own message follows it.
const BOTH_FAILED: &str = "proxy failure: ";

/// The methods of skopeo's proxy that a pull calls.
const METHODS: [&str; 7] =
    ["OpenImage", "OpenImageOptional", "GetManifest", "GetFullConfig", "GetBlob", "GetRawBlob", "FinishPipe"];

/// The first words of skopeo's message.
const ERRORS: [(&str, Reason); 14] = [
    ("A signature was required", Reason::SignatureMissing),
    ("Source image rejected", Reason::SignatureRejected),
    ("cryptographic signature verification", Reason::SignatureRejected),
    ("Signature for ", Reason::SignatureRejected),
    ("None of the", Reason::SignatureRejected),
    // The registry does not answer, or stops in the middle of a layer.
    ("pinging container registry ", Reason::RegistryUnreachable),
    ("unexpected EOF", Reason::RegistryUnreachable),
    ("happened during read: ", Reason::RegistryUnreachable),
    ("reading blob ", Reason::RegistryUnreachable),
    ("fetching blob", Reason::RegistryUnreachable),
    ("Get \"", Reason::RegistryUnreachable),
    ("read tcp ", Reason::RegistryUnreachable),
    ("dial tcp ", Reason::RegistryUnreachable),
    ("(Mirrors also failed: ", Reason::RegistryUnreachable),
];

/// The first words of a registry's refusal.
const DENIED: [&str; 4] =
    ["unable to retrieve auth token", "unauthorized", "denied", "requested access to the resource is denied"];

/// Classifies skopeo's message by its first words. Pure.
fn of_proxy(text: &str) -> Reason {
    let mut rest = text;
    while let Some(stripped) = PROXY.iter().find_map(|word| rest.strip_prefix(word)) {
        // Skip the name of the method.
        rest =
            stripped.split_once(": ").filter(|(method, _)| METHODS.contains(method)).map_or(stripped, |(_, rest)| rest);
    }
    let starts = |text: &str, anchors: &[&str]| anchors.iter().any(|anchor| text.starts_with(anchor));
    let Some(manifest) = rest.strip_prefix("reading manifest ") else {
        let known = ERRORS.iter().find(|(words, _)| rest.starts_with(words)).map(|(_, reason)| *reason);
        return known.unwrap_or(if starts(rest, &DENIED) { Reason::RegistryDenied } else { Reason::StageFailed });
    };
    // `reading manifest sha256:… in host/name: …`
    match manifest.split_once(": ") {
        Some((_, answer)) if starts(answer, &["manifest unknown", "name unknown"]) => Reason::ManifestMissing,
        Some((_, answer)) if starts(answer, &DENIED) => Reason::RegistryDenied,
        _ => Reason::RegistryUnreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            // A registry's own words do not decide the class.
            (
                format!("{twice}reading manifest sha256:ab in q.io/o: x: No space left on device"),
                Reason::RegistryUnreachable,
            ),
            (format!("{twice}reading manifest v1 in q.io/o: x: manifest unknown"), Reason::RegistryUnreachable),
            (format!("{twice}x: Operation was refused: unauthorized"), Reason::StageFailed),
            ("Importing: Unhandled layer type: application/x".to_owned(), Reason::ImageInvalid),
            ("Preparing import: No ostree.final-diffid label found".to_owned(), Reason::ImageInvalid),
            // The importer's message comes last, after skopeo's.
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
            // skopeo exited; the text has its standard error.
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
