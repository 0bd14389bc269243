//! Classifies the engine's error texts, for which there are no codes. Pure.
//!
//! Only the start of a text is matched, because its rest may come from a registry. A registry can therefore only choose
//! among the classes of a registry's answer (missing, denied, untrusted, unreachable), never one that blames the node.

use std::path::PathBuf;
use std::sync::Arc;

use super::gate::{Demand, Identity};
use super::{Settings, TrustError};
use crate::model::{PinnedImage, name_of, printable};

/// The method that reads manifest and signatures; the others read the config.
const OPEN_IMAGE: &str = "OpenImage";
/// Longest part of the engine's text in a message, in characters.
const WORDS: usize = 500;

/// A request to the engine.
#[derive(Clone, Debug)]
pub(super) struct Question {
    pub image: PinnedImage,
    pub settings: Arc<Settings>,
    /// The rule that applies.
    pub scope: String,
    /// The demands of that rule.
    pub demands: Vec<Demand>,
    /// The ostree auth file and its content.
    pub auth: Option<(PathBuf, Vec<u8>)>,
    /// The mirrors of the image by `registries.conf`.
    pub mirrors: Vec<String>,
}

/// Facts about an image without a signature, found by opening it without the policy. For the message only.
#[derive(Debug, Default)]
pub(super) struct Unsigned {
    /// Whether all mirrors were tried.
    pub looked: bool,
    /// The mirror that has the image.
    pub mirror: Option<String>,
    /// Whether the tag of its sigstore signature exists.
    pub attached: bool,
    /// The kind of the image.
    pub level: Level,
}

/// The kind of object that a reference names.
#[derive(Debug, Default)]
pub(super) enum Level {
    /// It was not found out.
    #[default]
    Unknown,
    /// One image.
    Image,
    /// An index.
    Index,
    /// An index. The value is the digest of this machine's instance, which has the signature that the policy demands.
    SignedInstance(String),
}

/// One place that the engine asked, and the error.
struct Attempt<'a> {
    /// `host/repository`, without digest.
    place: &'a str,
    mirror: bool,
    text: &'a str,
}

/// Classifies the error of a failed request.
pub(super) fn classify_text(method: &str, text: &str, asked: &Question) -> TrustError {
    const REJECTED: [&str; 17] = [
        "cryptographic signature verification ",
        "invalid signature when validating",
        "Signature for identity ",
        "Signature for digest ",
        "Signature by ",
        "None of the signatures were accepted",
        "Invalid GPG signature",
        "No public keys imported",
        "parsing signature ",
        "Required email ",
        "Unexpected subject hostname",
        "veryfing leaf certificate failed",
        "parsing leaf certificate",
        "missing dev.sigstore.cosign/",
        "Unexpected Fulcio OIDC issuer",
        "Fulcio certificate is missing the issuer extension",
        "No public key verified against the RekorSET",
    ];
    const UNUSABLE: [&str; 5] =
        ["invalid policy in ", "open ", "parsing public key ", "Unknown key ", "no policy.json file"];
    const DAMAGED: [&str; 2] = ["Manifest does not match provided manifest digest", "Download config.json digest "];
    const NO_INSTANCE: [&str; 2] = ["no image found in image index for ", "no image found in manifest list for "];
    let (image, scope, path) = (asked.image.clone(), asked.scope.clone(), asked.settings.policy.clone());
    let text = without_queries(text);
    let text = text.as_str();
    let why = printable(text, WORDS);
    if text.starts_with("A signature was required, but no signature exists") {
        TrustError::SignatureMissing { image, scope, hint: where_to_sign(asked, &Unsigned::default()) }
    } else if starts(text, &REJECTED) {
        TrustError::SignatureRejected { image, scope, why, hint: identity_hint(text, asked) }
    } else if text == format!("Running image docker://{image} is rejected by policy.") {
        TrustError::Rejects { path, image, scope, hint: String::new() }
    } else if text.starts_with(&format!("mkdir {}/containers-ephemeral-gpg-", asked.settings.scratch().display())) {
        TrustError::GpgScratch { scope, why }
    } else if let Some(why) = configuration(text, asked) {
        TrustError::Config { why }
    } else if text.starts_with("open ") && is_scarcity(text) {
        TrustError::Scarce { why }
    } else if text.starts_with("open /proc/") {
        let why = format!("it cannot read the policy ({why}); make /proc visible to rebase-agent.service");
        TrustError::Engine { skopeo: asked.settings.skopeo.clone(), why }
    } else if starts(text, &UNUSABLE) {
        // The engine's text names our file descriptor instead of the policy's path.
        let named = text.strip_prefix("invalid policy in ").and_then(|rest| rest.split_once(": "));
        let why = named.map_or(why, |(_, rest)| printable(rest, WORDS));
        TrustError::Policy { path, why }
    } else if starts(text, &DAMAGED) {
        TrustError::Invalid { image, why }
    } else if let Some(why) = unfit(method, text) {
        TrustError::Invalid { image, why }
    } else if starts(text, &NO_INSTANCE) {
        TrustError::NoInstance { image, why }
    } else {
        answered(method, text, why, asked)
    }
}

fn starts(text: &str, anchors: &[&str]) -> bool {
    anchors.iter().any(|anchor| text.starts_with(anchor))
}

/// Whether the kernel has no file descriptor, process or memory left. Only for texts that no registry can choose.
pub(super) fn is_scarcity(text: &str) -> bool {
    const WORDS: [&str; 5] = [
        "too many open files",
        "too many open files in system",
        "resource temporarily unavailable",
        "cannot allocate memory",
        "errno=11)",
    ];
    let text = text.trim_end().to_ascii_lowercase();
    WORDS.iter().any(|words| text.ends_with(words))
}

/// The fault of `registries.conf` or `registries.d`, which the engine reads before it contacts a registry.
fn configuration(text: &str, asked: &Question) -> Option<String> {
    const TWICE: &str = "Error parsing signature storage configuration: ";
    const LOADING: &str = "loading registries configuration: ";
    let registries_d = asked.settings.registries_d.display();
    let local = if let Some(rest) = text.strip_prefix(TWICE).or_else(|| text.strip_prefix(LOADING)) {
        // The rest is a dump of the whole file.
        rest.split_once(": sysregistriesv2.").map_or(rest, |(rest, _)| rest)
    } else if text.starts_with(&format!("parsing {registries_d}/"))
        || is_blocked(text)
        || text.starts_with(&format!("open {registries_d}")) && !is_scarcity(text)
    {
        text
    } else {
        return None;
    };
    // The engine's home does not exist, so the path in the text would mislead.
    let local = local.replace("/nonexistent/.config/containers/", "/etc/containers/");
    Some(printable(&local, WORDS))
}

/// Whether the text is `registry X is blocked in F or D`. X is from the reference and the file, not from a registry.
fn is_blocked(text: &str) -> bool {
    text.strip_prefix("registry ")
        .and_then(|rest| rest.split_once(' '))
        .is_some_and(|(_, rest)| rest.starts_with("is blocked in "))
}

/// The fault of an answer that is not an image, or one that no engine reads.
fn unfit(method: &str, text: &str) -> Option<String> {
    const ARTIFACT: &str = "unsupported image-specific operation on artifact with type ";
    const NESTED: &str = "unsupported manifest MIME type: ";
    let subject = if method == OPEN_IMAGE { "its manifest or that of its signature" } else { "its config" };
    if let Some(kind) = text.strip_prefix(ARTIFACT) {
        Some(format!("it is an artifact of type {}, not an image; name the image", printable(kind, 100)))
    } else if let Some(kind) = text.strip_prefix(NESTED) {
        Some(format!(
            "this machine's entry in the index is not an image manifest but {}; an index within an index cannot be \
             pulled, so name the inner one",
            printable(kind, 100)
        ))
    } else if text.starts_with("exceeded maximum allowed size of ") {
        Some(format!("{subject} is larger than the 4 MiB that the engine reads"))
    } else if method != OPEN_IMAGE && blob(text).is_some_and(|rest| is_missing(rest, "")) {
        Some(format!("its config is not in the registry; push the image again ({})", printable(text, 200)))
    } else {
        None
    }
}

fn blob(text: &str) -> Option<&str> {
    text.strip_prefix("fetching blob: ")
}

/// Whether a registry reports that it does not have the object: in the words of the specification, as the page of a proxy
/// or gateway, as registry.redhat.io, or as Harbor (`path` is the repository without its host, and the digest).
fn is_missing(rest: &str, path: &str) -> bool {
    let harbor = rest.strip_prefix("unknown: ").is_some_and(|said| {
        said == "Not Found"
            || said == format!("artifact {path} not found")
            || path.split_once('@').is_some_and(|(name, _)| said == format!("repository {name} not found"))
    });
    harbor || starts(rest, &["manifest unknown", "name unknown", "blob unknown", "StatusCode: 404, "])
}

fn is_denied(rest: &str) -> bool {
    starts(rest, &["authentication required", "unauthorized", "denied", "StatusCode: 401, ", "StatusCode: 403, "])
}

impl Attempt<'_> {
    /// The error of a place that answered; `None` if it gave no answer about the image.
    fn error(&self, method: &str, asked: &Question, elsewhere: &str) -> Option<TrustError> {
        const DENIED: [&str; 3] = [
            "unable to retrieve auth token",
            "Requesting bearer token: invalid status code from registry 403 ",
            "getting username and password: ",
        ];
        const DISTRUST: [&str; 2] = ["tls: failed to verify certificate: ", "x509: "];
        let (image, digest) = (asked.image.clone(), asked.image.digest().as_str());
        let place = format!("{} {}", if self.mirror { "the mirror" } else { "the registry" }, self.place);
        let why = format!("{}{elsewhere}", printable(self.text, WORDS));
        let reading = |what: &str| {
            let (place, rest) = self.text.strip_prefix(&format!("reading manifest {what} in "))?.split_once(": ")?;
            (!place.contains(' ')).then_some((place, rest))
        };
        let manifest = reading(digest);
        let is_absent = |(place, rest): (&str, &str)| {
            let path = place.split_once('/').map_or(place, |(_, path)| path);
            is_missing(rest, &format!("{path}@{digest}"))
        };
        if manifest.is_some_and(is_absent) {
            return Some(TrustError::ManifestMissing { image, place });
        }
        // The first blob that is read is the signature's payload.
        let attached = reading(&signature_tag(digest)).map(|(_, rest)| rest);
        let of_signature = attached.or(blob(self.text).filter(|_| method == OPEN_IMAGE)).is_some_and(is_denied);
        let of_image = manifest.map(|(_, rest)| rest).or(blob(self.text)).is_some_and(is_denied);
        if of_signature || of_image || starts(self.text, &DENIED) {
            let what = if of_signature { format!("the signature of {image}") } else { image.to_string() };
            let credentials = credentials(asked.auth.as_ref(), self.place);
            return Some(TrustError::Denied { place, what, why, credentials });
        }
        let (host, rest) = self.text.strip_prefix("pinging container registry ")?.split_once(": ")?;
        let fault = rest.strip_prefix(&format!("Get \"https://{host}/v2/\": "))?;
        starts(fault, &DISTRUST).then_some(TrustError::Untrusted { image, place, why })
    }
}

/// Splits `(Mirrors also failed: [A: why]\n[B: why]): SOURCE: why`, or the text of a single place.
fn attempts<'a>(text: &'a str, image: &'a PinnedImage) -> Vec<Attempt<'a>> {
    fn attempt<'a>(text: &'a str, at: &str, mirror: bool) -> Option<Attempt<'a>> {
        let (reference, text) = text.split_once(": ")?;
        Some(Attempt { place: reference.strip_suffix(at)?, mirror, text })
    }
    let at = format!("@{}", image.digest());
    let several = text.strip_prefix("(Mirrors also failed: [").and_then(|rest| {
        let (mirrors, source) = rest.rsplit_once("]): ")?;
        let mirrors = mirrors.split("]\n[").filter_map(|text| attempt(text, &at, true));
        let mut all: Vec<_> = mirrors.collect();
        all.push(attempt(source, &at, false)?);
        Some(all)
    });
    several.unwrap_or_else(|| vec![Attempt { place: image.name(), mirror: false, text }])
}

/// The tag under which cosign attaches an image's signatures.
pub(super) fn signature_tag(digest: &str) -> String {
    format!("{}.sig", digest.replace(':', "-"))
}

/// Classifies by the source's answer, or else by the answer of the last mirror that gave one.
fn answered(method: &str, text: &str, why: String, asked: &Question) -> TrustError {
    let attempts = attempts(text, &asked.image);
    let elsewhere = if attempts.len() > 1 { "; no other place serves it" } else { "" };
    let answer = attempts.iter().rev().find_map(|attempt| attempt.error(method, asked, elsewhere));
    answer.unwrap_or(TrustError::Unreachable { image: asked.image.clone(), why })
}

/// Removes the queries of URLs: presigned URLs of a blob store are secret, and so long that they hide the cause.
pub(crate) fn without_queries(text: &str) -> String {
    let mut parts = text.split('?');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(['"', ' ']).unwrap_or(part.len());
        out.push_str("?…");
        out.push_str(part.get(end..).unwrap_or_default());
    }
    out
}

/// What to do about a missing signature, in clauses. The engine looks for it only at the place that it read the image
/// from, and does not report which place that is.
pub(super) fn where_to_sign(asked: &Question, found: &Unsigned) -> String {
    let source = asked.image.name();
    let place = match (&found.mirror, asked.mirrors.as_slice()) {
        (Some(mirror), _) => format!("it is read from the mirror {mirror}"),
        (None, []) => format!("it is read from the registry {source}"),
        (None, _) if found.looked => format!("it is read from the registry {source}, as no mirror has it"),
        (None, mirrors) => {
            format!("it is read from the first that has it of {} (mirrors) and {source}", mirrors.join(", "))
        }
    };
    let mut clauses = vec![printable(&place, 300)];
    let mut say = |clause: &str| clauses.push(clause.to_owned());
    if asked.demands.iter().any(|demand| demand.gpg) {
        say("the rule asks for a GPG signature: write one to the lookaside that registries.d names for that place");
    }
    if !asked.demands.iter().all(|demand| demand.gpg) {
        say(match found.attached {
            true => {
                "the sigstore signature that is attached there is not used: enable use-sigstore-attachments for that \
                 place in registries.d"
            }
            false => {
                "no sigstore signature is attached there: sign it there or copy the signature too (cosign 3: with \
                 --new-bundle-format=false), and enable use-sigstore-attachments for that place in registries.d"
            }
        });
    }
    match &found.level {
        Level::Unknown => {}
        Level::Image => say("a signature of an index that has this image does not count for it"),
        Level::Index => say("this is an index, which needs a signature of its own (cosign sign --recursive)"),
        Level::SignedInstance(instance) => say(&format!(
            "this is an index, and only this machine's instance {instance} is signed: sign the index, too (cosign sign \
             --recursive)"
        )),
    }
    clauses.join("; ")
}

/// The probable cause of a signature whose identity is not accepted; empty for any other failure.
fn identity_hint(text: &str, asked: &Question) -> String {
    let reasons = text.strip_prefix("None of the signatures were accepted, reasons: ").unwrap_or(text);
    let identity = reasons
        .split("; ")
        .find_map(|reason| reason.strip_prefix("Signature for identity \"")?.strip_suffix("\" is not accepted"));
    let Some(identity) = identity else { return String::new() };
    let name = asked.image.name();
    let tagless = name_of(identity) == identity;
    let mut hint = String::new();
    for demand in &asked.demands {
        hint = match &demand.identity {
            Identity::ExactReference { docker_reference: wanted } => format!(
                "; the rule accepts only the identity {wanted}: sign as that, or use exactRepository {}",
                name_of(wanted)
            ),
            Identity::ExactRepository { docker_repository: wanted } => {
                format!("; the rule accepts only signatures for {wanted}")
            }
            Identity::RemapIdentity { prefix, signed_prefix } => {
                let wanted = name.strip_prefix(prefix.as_str()).map(|rest| format!("{signed_prefix}{rest}"));
                match wanted {
                    Some(wanted) if tagless && identity == wanted => format!(
                        "; it has no tag, as cosign's default identity, and remapIdentity needs one: use \
                         exactRepository {wanted}, or sign with --sign-container-identity and a tag"
                    ),
                    Some(wanted) => {
                        format!("; remapIdentity maps {name} to {wanted}, so sign it as that")
                    }
                    None => format!("; remapIdentity does not apply, as {name} does not begin with {prefix}"),
                }
            }
            Identity::MatchRepository | Identity::MatchRepoDigestOrExact | Identity::MatchExact
                if name_of(identity) != name =>
            {
                format!(
                    "; it was made for {0}, so this is a copy: use exactRepository {0} or remapIdentity, or sign it \
                     as {name}",
                    name_of(identity)
                )
            }
            Identity::MatchExact if !tagless => {
                "; matchExact never accepts a reference by digest: use matchRepoDigestOrExact".to_owned()
            }
            Identity::MatchRepoDigestOrExact | Identity::MatchExact if tagless => {
                "; it has no tag, as cosign's default identity: use signedIdentity matchRepository, or sign with \
                 --sign-container-identity and a tag"
                    .to_owned()
            }
            Identity::MatchRepository | Identity::MatchRepoDigestOrExact | Identity::MatchExact => continue,
        };
    }
    printable(&hint, WORDS)
}

/// A clause about the credentials that were used for `place`.
fn credentials(auth: Option<&(PathBuf, Vec<u8>)>, place: &str) -> String {
    let Some((path, bytes)) = auth else {
        return "it was asked without credentials, as there is no ostree auth file".to_owned();
    };
    let path = path.display();
    let Ok(serde_json::Value::Object(file)) = serde_json::from_slice(bytes) else {
        return format!("the auth file {path} is not a JSON object");
    };
    let host = place.split_once('/').map_or(place, |(host, _)| host);
    let applies = |key: &str| {
        let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
        let key = key.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches("/v2");
        key == host || place == key || place.strip_prefix(key).is_some_and(|rest| rest.starts_with('/'))
    };
    let object = |key: &str| file.get(key).and_then(serde_json::Value::as_object);
    let entry = |key: &str| object(key)?.keys().find(|key| applies(key));
    if entry("credHelpers").is_some() {
        return format!("{path} leaves {host} to a credential helper (credHelpers), which is not run here");
    }
    match entry("auths") {
        Some(key) => format!("it was asked with the entry for {} in {path}", printable(key, 200)),
        None if file.contains_key("credsStore") => {
            format!("{path} leaves credentials to a credential store (credsStore), which is not run here")
        }
        None if object("auths").is_none() && file.keys().any(|key| applies(key)) => format!(
            "{path} is in the old form of .dockercfg, which is not read: put its entries into an object named auths"
        ),
        None => format!("it was asked without credentials, as {path} has no entry for {host}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Reason;
    use crate::trust::reference;

    fn asked() -> Question {
        let hex = "ab".repeat(32);
        Question {
            image: reference::parse(&format!("quay.io/o/i@sha256:{hex}")).unwrap(),
            settings: Arc::new(Settings {
                policy: "/etc/containers/policy.json".into(),
                registries_d: "/etc/containers/registries.d".into(),
                skopeo: "/usr/bin/skopeo".into(),
                cert_dir: None,
                auth_files: Vec::new(),
                etc: "/etc".into(),
                scratch: None,
                deadline: std::time::Duration::ZERO,
            }),
            scope: "default".into(),
            demands: vec![Demand { gpg: false, identity: Identity::MatchRepoDigestOrExact }],
            auth: None,
            mirrors: Vec::new(),
        }
    }

    #[test]
    fn engine_texts_are_classified_by_their_start_only() {
        use Reason::{
            EngineUnfit, GpgNeedsScratch, ImageInvalid, ManifestMissing, PolicyInvalid, PolicyRejects,
            RegistryConfigInvalid, RegistryDenied, RegistryUnreachable, RegistryUntrusted, ResourcesExhausted,
            SignatureMissing, SignatureRejected,
        };
        let asked = asked();
        let image = &asked.image;
        let digest = image.digest();
        let (manifest, m) = (format!("reading manifest {digest} in quay.io/o/i: "), format!("m.example/i@{digest}"));
        let mirrored =
            |mirror: &str, source: &str| format!("(Mirrors also failed: [{m}: {mirror}]): {image}: {source}");
        let at_mirror = format!("reading manifest {digest} in m.example/i: ");
        let signature = format!("reading manifest {}.sig in quay.io/o/i: ", digest.as_str().replace(':', "-"));
        let ping =
            |host: &str, rest: &str| format!("pinging container registry {host}: Get \"https://{host}/v2/\": {rest}");
        let refused = ping("quay.io", "dial tcp 192.0.2.1:443: connect: connection refused");
        let blocked = "registry quay.io/o/i is blocked in /etc/containers/registries.conf or \
                       /nonexistent/.config/containers/registries.conf.d";
        let unknown = "tls: failed to verify certificate: x509: certificate signed by unknown authority";
        let loading =
            "loading registries configuration: loading registries configuration \"/etc/containers/registries.conf\": ";
        let storage = "Error parsing signature storage configuration: ";
        for (text, reason) in [
            ("A signature was required, but no signature exists".to_owned(), SignatureMissing),
            ("Signature for identity \"x\" is not accepted".to_owned(), SignatureRejected),
            ("cryptographic signature verification failed: x".to_owned(), SignatureRejected),
            ("None of the signatures were accepted, reasons: a; b".to_owned(), SignatureRejected),
            (format!("Running image docker://{image} is rejected by policy."), PolicyRejects),
            ("open /etc/key.pub: no such file or directory".to_owned(), PolicyInvalid),
            ("open /etc/key.pub: too many open files".to_owned(), ResourcesExhausted),
            ("open /proc/self/fd/9: no such file or directory".to_owned(), EngineUnfit),
            ("mkdir /tmp/containers-ephemeral-gpg-1: read-only file system".to_owned(), GpgNeedsScratch),
            ("mkdir /var/containers-ephemeral-gpg-1: no space left on device".to_owned(), RegistryUnreachable),
            // One place.
            (format!("{manifest}manifest unknown"), ManifestMissing),
            (format!("{manifest}authentication required"), RegistryDenied),
            (format!("{manifest}StatusCode: 404, \"<html>\""), ManifestMissing),
            (format!("{manifest}StatusCode: 403, \"<html>\""), RegistryDenied),
            (format!("{manifest}unknown: artifact o/i@{digest} not found"), ManifestMissing),
            (format!("{manifest}unknown: repository o/i not found"), ManifestMissing),
            (format!("{manifest}unknown: Not Found"), ManifestMissing),
            (format!("{manifest}unknown: a proxy was not found"), RegistryUnreachable),
            (format!("{manifest}received unexpected HTTP status: 503 Service Unavailable"), RegistryUnreachable),
            (format!("{manifest}unknown: A signature was required, but no signature exists"), RegistryUnreachable),
            (format!("{manifest}unknown: too many open files"), RegistryUnreachable),
            (format!("{manifest}unknown: {blocked}"), RegistryUnreachable),
            ("reading manifest x: manifest unknown".to_owned(), RegistryUnreachable),
            ("pinging container registry h: dial tcp".to_owned(), RegistryUnreachable),
            (ping("quay.io", "x509: certificate has expired"), RegistryUntrusted),
            // `location` differs from `prefix`.
            (format!("{at_mirror}manifest unknown"), ManifestMissing),
            // Errors of the signature.
            (format!("{signature}unauthorized: msg"), RegistryDenied),
            (format!("{signature}StatusCode: 403, \"<html>\""), RegistryDenied),
            (format!("{signature}unknown: denied: x"), RegistryUnreachable),
            ("fetching blob: denied: msg".to_owned(), RegistryDenied),
            ("fetching blob: blob unknown: msg".to_owned(), RegistryUnreachable),
            // Mirrors.
            (mirrored(&format!("{at_mirror}authentication required"), &refused), RegistryDenied),
            (mirrored(&format!("{at_mirror}authentication required"), blocked), RegistryDenied),
            (mirrored(&format!("{at_mirror}manifest unknown"), blocked), ManifestMissing),
            (mirrored(&ping("m.example", unknown), &refused), RegistryUntrusted),
            (
                mirrored(&format!("{at_mirror}authentication required"), &format!("{manifest}manifest unknown")),
                ManifestMissing,
            ),
            (mirrored("reading manifest", &format!("{manifest}manifest unknown")), ManifestMissing),
            (mirrored(&ping("m.example", "EOF"), blocked), RegistryUnreachable),
            (
                mirrored(
                    &format!("{at_mirror}denied: x]\n[n.example/i@{digest}: {}", ping("n.example", "EOF")),
                    &refused,
                ),
                RegistryDenied,
            ),
            (
                format!("(Mirrors also failed: [m]): {image}: A signature was required, but no signature exists"),
                RegistryUnreachable,
            ),
            (format!("(Mirrors also failed: [{m}: x]): y"), RegistryUnreachable),
            // Errors of this node's files.
            (blocked.to_owned(), RegistryConfigInvalid),
            (format!("{loading}toml: line 2: expected end of table"), RegistryConfigInvalid),
            (
                format!("{loading}mixing sysregistry v1/v2 is not supported: sysregistriesv2.tomlConfig{{}}"),
                RegistryConfigInvalid,
            ),
            (
                format!("{storage}\"docker\" namespace \"a\" defined both in \"x.yaml\" and \"y.yaml\""),
                RegistryConfigInvalid,
            ),
            (
                "parsing /etc/containers/registries.d/a.yaml: yaml: line 2: found character".to_owned(),
                RegistryConfigInvalid,
            ),
            ("open /etc/containers/registries.d/a.yaml: permission denied".to_owned(), RegistryConfigInvalid),
            ("open /etc/containers/registries.d/a.yaml: too many open files".to_owned(), ResourcesExhausted),
            // The image.
            ("Manifest does not match provided manifest digest sha256:0".to_owned(), ImageInvalid),
            ("exceeded maximum allowed size of 4194304 bytes".to_owned(), ImageInvalid),
            ("unsupported image-specific operation on artifact with type \"a/b\"".to_owned(), ImageInvalid),
            ("unsupported manifest MIME type: application/vnd.oci.image.index.v1+json".to_owned(), ImageInvalid),
            (String::new(), RegistryUnreachable),
        ] {
            assert_eq!(classify_text(OPEN_IMAGE, &text, &asked).reason(), reason, "{text}");
        }
        for (text, reason) in [
            ("fetching blob: blob unknown: msg", ImageInvalid),
            ("fetching blob: StatusCode: 404, \"<html>\"", ImageInvalid),
            ("fetching blob: denied: msg", RegistryDenied),
            ("fetching blob: EOF", RegistryUnreachable),
        ] {
            let error = classify_text("GetFullConfig", text, &asked);
            assert!(error.reason() == reason && !error.to_string().contains("signature"), "{text}: {error}");
        }
        let presigned = format!("Get \"https://cdn.example/blob?Signature={}&Token=t\": EOF", "s".repeat(900));
        let error = classify_text(OPEN_IMAGE, &presigned, &asked).to_string();
        assert!(error.ends_with("Get \"https://cdn.example/blob?…\": EOF"), "{error}");
        let error = classify_text(OPEN_IMAGE, "x\n\u{1b}[2J fake", &asked);
        assert!(!error.to_string().contains(['\n', '\u{1b}']), "{error}");
        let error = classify_text(OPEN_IMAGE, blocked, &asked).to_string();
        assert!(error.contains(" or /etc/containers/registries.conf.d;"), "{error}");
    }

    #[test]
    fn an_identity_that_is_not_accepted_is_explained() {
        let remap = || Identity::RemapIdentity { prefix: "quay.io".into(), signed_prefix: "s.example".into() };
        for (identity, rule, hint) in [
            (
                "quay.io/o/i",
                Identity::MatchRepoDigestOrExact,
                "has no tag, as cosign's default identity: use signedIdentity matchRepository",
            ),
            ("quay.io/o/i", Identity::MatchExact, "matchRepository"),
            ("quay.io/o/i:t", Identity::MatchExact, "matchExact never accepts a reference by digest"),
            ("s.example/o/i", remap(), "remapIdentity needs one: use exactRepository s.example/o/i"),
            ("quay.io/o/i:t", remap(), "remapIdentity maps quay.io/o/i to s.example/o/i"),
            (
                "quay.io/o/i",
                Identity::ExactReference { docker_reference: "quay.io/o/i:t".into() },
                "only the identity quay.io/o/i:t: sign as that, or use exactRepository quay.io/o/i",
            ),
            (
                "quay.io/o/i:t",
                Identity::ExactRepository { docker_repository: "q.example/x".into() },
                "only signatures for q.example/x",
            ),
            (
                "b.example:5000/o/i:t",
                Identity::MatchRepoDigestOrExact,
                "this is a copy: use exactRepository b.example:5000/o/i",
            ),
            ("b.example/o/i", Identity::MatchRepository, "this is a copy: use exactRepository b.example/o/i"),
        ] {
            let asked = Question { demands: vec![Demand { gpg: false, identity: rule.clone() }], ..asked() };
            for text in [
                format!("Signature for identity \"{identity}\" is not accepted"),
                format!(
                    "None of the signatures were accepted, reasons: x; Signature for identity \"{identity}\" is not accepted"
                ),
            ] {
                let error = classify_text(OPEN_IMAGE, &text, &asked).to_string();
                assert!(error.contains(hint), "{identity} {rule:?}: {error}");
            }
            assert_eq!(identity_hint("cryptographic signature verification failed", &asked), "");
        }
    }

    #[test]
    fn the_message_says_which_credentials_were_used() {
        let said = |text: &str, place: &str| credentials(Some(&("/run/ostree/auth.json".into(), text.into())), place);
        let entry = r#"{"auths":{"a.example":{"auth":"x"},"b.example/team":{},"https://c.example/v1/":{}}}"#;
        for (text, place, expected) in [
            (entry, "a.example/o/i", "with the entry for a.example in /run/ostree/auth.json"),
            (entry, "b.example/team/i", "with the entry for b.example/team in"),
            (entry, "b.example/teams/i", "has no entry for b.example"),
            (entry, "c.example/i", "with the entry for https://c.example/v1/ in"),
            (
                r#"{"auths":{}}"#,
                "a.example/i",
                "without credentials, as /run/ostree/auth.json has no entry for a.example",
            ),
            (r#"{"auths":{},"credsStore":"x"}"#, "a.example/i", "(credsStore), which is not run here"),
            (r#"{"auths":{},"credHelpers":{"a.example":"x"}}"#, "a.example/i", "(credHelpers), which is not run here"),
            (r#"{"a.example":{"auth":"x"}}"#, "a.example/i", "old form of .dockercfg"),
            ("no JSON", "a.example/i", "is not a JSON object"),
            ("[]", "a.example/i", "is not a JSON object"),
        ] {
            assert!(said(text, place).contains(expected), "{text} {place}: {}", said(text, place));
        }
        assert!(credentials(None, "a.example/i").contains("no ostree auth file"));
    }

    #[test]
    fn the_message_says_where_to_sign() {
        let mirrored = Question { mirrors: vec!["m.example/i".into()], ..asked() };
        let said = where_to_sign(&mirrored, &Unsigned::default());
        assert!(said.contains("the first that has it of m.example/i (mirrors) and quay.io/o/i"), "{said}");
        let said = where_to_sign(&mirrored, &Unsigned { looked: true, ..Unsigned::default() });
        assert!(said.contains("read from the registry quay.io/o/i, as no mirror has it"), "{said}");
        let demands = |kinds: &[bool]| {
            let demands = kinds.iter().map(|gpg| Demand { gpg: *gpg, identity: Identity::MatchExact });
            where_to_sign(&Question { demands: demands.collect(), ..asked() }, &Unsigned::default())
        };
        let (gpg, both) = (demands(&[true]), demands(&[true, false]));
        assert!(gpg.contains("lookaside") && !gpg.contains("cosign"), "{gpg}");
        assert!(both.contains("lookaside") && both.contains("cosign 3"), "{both}");
    }
}
