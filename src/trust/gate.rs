//! The scope gate: finds the requirements of a containers policy for an image, and refuses the image if they demand no
//! signature. Pure.
//!
//! It chooses the scope exactly as containers/image does. Keys and identities are left to the engine, which parses the
//! same bytes strictly.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::{TrustError, engine};
use crate::files::read_bounded;
use crate::model::{PinnedImage, printable};

/// Largest policy file read, in bytes; ClusterImagePolicies with inline keys have some tens of kilobytes.
pub const MAX_POLICY: u64 = 1 << 20;

/// A parsed `policy.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    default: Vec<Requirement>,
    #[serde(default)]
    transports: Option<UniqueMap<UniqueMap<Vec<Requirement>>>>,
}

type Requirement = UniqueMap<serde_json::Value>;

/// The effect of the applicable requirements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// At least one requirement demands a signature.
    RequiresSignature,
    /// No signature is demanded.
    AcceptsAnything,
    /// Every image is rejected.
    AlwaysRejects,
}

/// The requirements that apply to one image.
#[derive(Debug, PartialEq, Eq)]
pub struct Gate {
    /// Their scope, for example `docker "quay.io/org"` or `default`.
    pub scope: String,
    /// Their effect.
    pub verdict: Verdict,
}

/// One demand for a signature, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// True for `signedBy`, false for `sigstoreSigned`.
    pub gpg: bool,
    /// `signedIdentity`.
    pub identity: Identity,
}

/// The identity that a signature must have: `signedIdentity` of containers-policy.json(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// `matchRepoDigestOrExact`, the default.
    RepoDigestOrExact,
    /// `matchExact`.
    Exact,
    /// `matchRepository`.
    Repository,
    /// `exactReference`.
    ExactReference(String),
    /// `exactRepository`.
    ExactRepository(String),
    /// `remapIdentity`.
    Remap {
        /// Prefix of the reference.
        prefix: String,
        /// Prefix of the identity in its place.
        signed_prefix: String,
    },
}

/// An error of a policy.
#[allow(missing_docs, reason = "each variant's message is its documentation")]
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PolicyError {
    /// Not the JSON that containers/image accepts.
    #[error("{0}")]
    Json(String),
    #[error("the list of requirements for {0} is empty")]
    Empty(String),
    #[error("the requirement type {kind} for {scope} is unknown")]
    UnknownType { scope: String, kind: String },
}

impl Policy {
    /// Parses the file. Duplicate keys and unknown top-level keys are errors, as they are for the engine.
    ///
    /// # Errors
    /// [`PolicyError::Json`], with the place of the error.
    pub fn parse(bytes: &[u8]) -> Result<Self, PolicyError> {
        serde_json::from_slice(bytes).map_err(|e| PolicyError::Json(e.to_string()))
    }

    /// Whether the default is only `insecureAcceptAnything`. Then ostree-ext refuses `ostree-image-signed:`, even if the
    /// image's own scope demands a signature.
    #[must_use]
    pub fn default_is_insecure(&self) -> bool {
        matches!(self.default.as_slice(), [only] if kind(only) == Some("insecureAcceptAnything"))
    }

    /// The requirements for pulling `image` over the docker transport.
    ///
    /// # Errors
    /// When the applicable list is empty or has a requirement of unknown type.
    pub fn gate(&self, image: &PinnedImage) -> Result<Gate, PolicyError> {
        let (scope, requirements) = self.applicable(image);
        let verdict = verdict(&scope, requirements)?;
        Ok(Gate { scope, verdict })
    }

    /// The files with keys and certificates that the requirements for `image` name.
    #[must_use]
    pub fn files(&self, image: &PinnedImage) -> Vec<&str> {
        let (_, requirements) = self.applicable(image);
        let mut files = Vec::new();
        for (name, value) in requirements.iter().flat_map(|requirement| &requirement.0) {
            named_files(name, value, &mut files);
        }
        files
    }

    /// The demands for a signature that apply to `image`.
    #[must_use]
    pub fn demands(&self, image: &PinnedImage) -> Vec<Demand> {
        let (_, requirements) = self.applicable(image);
        let signed = requirements.iter().filter_map(|requirement| match kind(requirement) {
            Some("signedBy") => Some((true, requirement)),
            Some("sigstoreSigned") => Some((false, requirement)),
            _ => None,
        });
        signed.map(|(gpg, requirement)| Demand { gpg, identity: identity(requirement) }).collect()
    }

    /// Scopes of the docker transport that were probably meant for `image` and do not apply to it: they differ from an
    /// applicable one by case, or by a tag, a digest, `docker://` or a `/` at the end.
    #[must_use]
    pub fn lookalikes(&self, image: &PinnedImage) -> Vec<&str> {
        let applicable = scopes(image);
        let wanted: Vec<_> = applicable.iter().map(|scope| scope.to_lowercase()).collect();
        let docker = self.transports.as_ref().and_then(|transports| transports.0.get("docker"));
        let scopes = docker.into_iter().flat_map(|docker| docker.0.keys());
        let looks_alike = |scope: &&String| {
            let bare = bare(scope);
            !bare.is_empty() && !applicable.contains(*scope) && wanted.contains(&bare)
        };
        scopes.filter(looks_alike).map(String::as_str).collect()
    }

    fn applicable(&self, image: &PinnedImage) -> (String, &[Requirement]) {
        let docker = self.transports.as_ref().and_then(|transports| transports.0.get("docker"));
        let scoped = docker.and_then(|docker| {
            let named = |name: String| Some((format!("docker \"{name}\""), docker.0.get(&name)?.as_slice()));
            scopes(image).into_iter().find_map(named)
        });
        scoped.unwrap_or_else(|| ("default".to_owned(), &self.default))
    }
}

/// Collects the values of `keyPath`, `keyPaths`, `rekorPublicKeyPath`, and of `caPath`, `caRootsPath` and the like in
/// `fulcio` and `pki`.
fn named_files<'a>(name: &str, value: &'a serde_json::Value, files: &mut Vec<&'a str>) {
    if let Some(members) = value.as_object() {
        members.iter().for_each(|(name, value)| named_files(name, value, files));
    } else if name.ends_with("Path") {
        files.extend(value.as_str());
    } else if name.ends_with("Paths") {
        files.extend(value.as_array().into_iter().flatten().filter_map(serde_json::Value::as_str));
    }
}

/// The scope in the spelling that containers/image compares, without parts that a scope cannot have.
fn bare(scope: &str) -> String {
    let lower = scope.trim().to_lowercase();
    let name = ["docker://", "https://", "http://"].iter().find_map(|scheme| lower.strip_prefix(scheme));
    let name = name.unwrap_or(&lower);
    let name = name.split_once('@').map_or(name, |(name, _)| name).trim_end_matches('/');
    match name.rsplit_once(':') {
        // A colon before the first slash begins a port.
        Some((untagged, tag)) if untagged.contains('/') && !tag.contains('/') => untagged.to_owned(),
        _ => name.to_owned(),
    }
}

fn identity(requirement: &Requirement) -> Identity {
    let Some(identity) = requirement.0.get("signedIdentity") else { return Identity::RepoDigestOrExact };
    let text = |key: &str| identity.get(key).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
    match identity.get("type").and_then(serde_json::Value::as_str) {
        Some("matchExact") => Identity::Exact,
        Some("matchRepository") => Identity::Repository,
        Some("exactReference") => Identity::ExactReference(text("dockerReference")),
        Some("exactRepository") => Identity::ExactRepository(text("dockerRepository")),
        Some("remapIdentity") => Identity::Remap { prefix: text("prefix"), signed_prefix: text("signedPrefix") },
        // The engine refuses all others.
        _ => Identity::RepoDigestOrExact,
    }
}

fn kind(requirement: &Requirement) -> Option<&str> {
    requirement.0.get("type").and_then(serde_json::Value::as_str)
}

/// The effect of a list: an image must meet all of its requirements.
fn verdict(scope: &str, requirements: &[Requirement]) -> Result<Verdict, PolicyError> {
    if requirements.is_empty() {
        return Err(PolicyError::Empty(scope.to_owned()));
    }
    let mut verdict = Verdict::AcceptsAnything;
    for requirement in requirements {
        match kind(requirement) {
            // containers/image never implemented signedBaseLayer and always rejects it.
            Some("reject" | "signedBaseLayer") => verdict = Verdict::AlwaysRejects,
            Some("signedBy" | "sigstoreSigned") if verdict == Verdict::AcceptsAnything => {
                verdict = Verdict::RequiresSignature;
            }
            Some("signedBy" | "sigstoreSigned" | "insecureAcceptAnything") => {}
            other => {
                let kind = other.map_or_else(|| "(none)".to_owned(), |kind| format!("{kind:?}"));
                return Err(PolicyError::UnknownType { scope: scope.to_owned(), kind });
            }
        }
    }
    Ok(verdict)
}

/// Scope names, most specific first. Only the first that exists is used. `""` is the transport's default.
fn scopes(image: &PinnedImage) -> Vec<String> {
    let mut names = vec![image.to_string()];
    let mut name = image.name();
    names.push(name.to_owned());
    while let Some((parent, _)) = name.rsplit_once('/') {
        name = parent;
        names.push(name.to_owned());
    }
    let mut host = name.split_once(':').map_or(name, |(host, _)| host);
    while let Some((_, parent)) = host.split_once('.') {
        host = parent;
        names.push(format!("*.{host}"));
    }
    names.push(String::new());
    names
}

/// A JSON object that refuses duplicate keys, as containers/image does.
struct UniqueMap<T>(BTreeMap<String, T>);

impl<T: fmt::Debug> fmt::Debug for UniqueMap<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Unique<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Unique<T> {
            type Value = UniqueMap<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((key, value)) = access.next_entry::<String, T>()? {
                    if map.contains_key(&key) {
                        return Err(A::Error::custom(format!("duplicate key {key:?}")));
                    }
                    map.insert(key, value);
                }
                Ok(UniqueMap(map))
            }
        }
        deserializer.deserialize_map(Unique(PhantomData))
    }
}

/// The policy file, read once, so that gate and engine use the same bytes.
#[derive(Debug)]
pub struct NodePolicy {
    pub(super) bytes: Vec<u8>,
    pub(super) policy: Policy,
    pub(super) path: PathBuf,
}

impl NodePolicy {
    /// Reads and parses the file.
    ///
    /// # Errors
    /// [`TrustError::ReadPolicy`] and [`TrustError::Policy`].
    pub fn read(path: &Path) -> Result<Self, TrustError> {
        let bytes = read_bounded(path, MAX_POLICY).map_err(|source| match engine::is_scarce(&source) {
            true => TrustError::Scarce { why: format!("{}: {source}", path.display()) },
            false => TrustError::ReadPolicy { path: path.to_owned(), source },
        })?;
        let policy = Policy::parse(&bytes).map_err(|e| unusable(path, &e))?;
        Ok(Self { bytes, policy, path: path.to_owned() })
    }

    /// The rule that applies to `image`, which must demand a signature.
    ///
    /// # Errors
    /// [`TrustError::AcceptsAnything`], [`TrustError::Rejects`] and [`TrustError::Policy`].
    pub fn gate(&self, image: &PinnedImage) -> Result<String, TrustError> {
        let gate = self.policy.gate(image).map_err(|e| unusable(&self.path, &e))?;
        let hint = match self.policy.lookalikes(image).as_slice() {
            [] => String::new(),
            alike => printable(
                &format!(
                    "; the scope {} is similar but does not apply: a scope must match exactly, without docker://, tag \
                     or / at its end",
                    alike.join(", ")
                ),
                400,
            ),
        };
        let (path, image, scope) = (self.path.clone(), image.clone(), gate.scope);
        match gate.verdict {
            Verdict::RequiresSignature => Ok(scope),
            Verdict::AcceptsAnything => Err(TrustError::AcceptsAnything { path, image, scope, hint }),
            Verdict::AlwaysRejects => Err(TrustError::Rejects { path, image, scope, hint }),
        }
    }
}

pub(super) fn unusable(path: &Path, error: &PolicyError) -> TrustError {
    TrustError::Policy { path: path.to_owned(), why: printable(&error.to_string(), 300) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::reference;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn gate(policy: &str, name: &str) -> Result<Gate, PolicyError> {
        Policy::parse(policy.as_bytes())?.gate(&reference::parse(&format!("{name}@sha256:{HEX}")).unwrap())
    }

    fn policy(scopes: &[(&str, &str)]) -> String {
        let scopes: Vec<_> = scopes.iter().map(|(scope, kind)| format!(r#""{scope}":[{{"type":"{kind}"}}]"#)).collect();
        format!(r#"{{"default":[{{"type":"reject"}}],"transports":{{"docker":{{{}}}}}}}"#, scopes.join(","))
    }

    #[test]
    fn the_most_specific_scope_wins_alone() {
        let digest = format!("quay.io/org/os@sha256:{HEX}");
        let all = [
            (digest.as_str(), "sigstoreSigned"),
            ("quay.io/org/os", "insecureAcceptAnything"),
            ("quay.io/org", "sigstoreSigned"),
            ("quay.io", "insecureAcceptAnything"),
            ("*.io", "sigstoreSigned"),
            ("", "insecureAcceptAnything"),
        ];
        for (first, (scope, kind)) in all.iter().enumerate() {
            let gate = gate(&policy(&all[first..]), "quay.io/org/os").unwrap();
            assert_eq!(gate.scope, format!("docker \"{scope}\""));
            assert_eq!(gate.verdict == Verdict::RequiresSignature, *kind == "sigstoreSigned");
        }
        assert_eq!(
            gate(&policy(&[]), "quay.io/org/os").unwrap(),
            Gate { scope: "default".into(), verdict: Verdict::AlwaysRejects }
        );
    }

    #[test]
    fn scopes_that_look_alike_do_not_apply() {
        for scope in
            ["quay.io/or", "quay.io/org/os/x", "quay.io/org/os:tag", "Quay.io", "*.quay.io", "*", "quay.io:443"]
        {
            assert_eq!(
                gate(&policy(&[(scope, "sigstoreSigned")]), "quay.io/org/os").unwrap().scope,
                "default",
                "{scope}"
            );
        }
        let wildcard = policy(&[("*.example.com", "sigstoreSigned")]);
        assert_eq!(gate(&wildcard, "a.b.example.com:5000/os").unwrap().scope, "docker \"*.example.com\"");
    }

    #[test]
    fn scopes_that_look_alike_are_named() {
        let alike = |scope: &str, name: &str| {
            let policy = policy(&[(scope, "sigstoreSigned")]);
            let image = reference::parse(&format!("{name}@sha256:{HEX}")).unwrap();
            !Policy::parse(policy.as_bytes()).unwrap().lookalikes(&image).is_empty()
        };
        for scope in [
            "Quay.io/org",
            "quay.io/ORG/os",
            "docker://quay.io/org",
            "quay.io/org/",
            "quay.io/org/os:latest",
            "https://quay.io",
            "*.IO",
        ] {
            assert!(alike(scope, "quay.io/org/os"), "{scope}");
        }
        for scope in ["quay.io/org", "quay.io/or", "*.quay.io", "", "/", "quay.io:443", "docker://"] {
            assert!(!alike(scope, "quay.io/org/os"), "{scope}");
        }
        assert!(alike("R.example:5000/org:tag", "r.example:5000/org/os"));
    }

    #[test]
    fn demands_have_their_kind_and_identity() {
        let list = r#"{"type":"insecureAcceptAnything"},{"type":"signedBy"},
            {"type":"sigstoreSigned","signedIdentity":{"type":"remapIdentity","prefix":"a","signedPrefix":"b"}},
            {"type":"sigstoreSigned","signedIdentity":{"type":"exactReference","dockerReference":"r:t"}},
            {"type":"sigstoreSigned","signedIdentity":7}"#;
        let policy = Policy::parse(format!(r#"{{"default":[{list}]}}"#).as_bytes()).unwrap();
        let demand = |gpg, identity| Demand { gpg, identity };
        assert_eq!(
            policy.demands(&reference::parse(&format!("quay.io/org/os@sha256:{HEX}")).unwrap()),
            [
                demand(true, Identity::RepoDigestOrExact),
                demand(false, Identity::Remap { prefix: "a".into(), signed_prefix: "b".into() }),
                demand(false, Identity::ExactReference("r:t".into())),
                demand(false, Identity::RepoDigestOrExact),
            ]
        );
    }

    #[test]
    fn an_image_must_meet_all_requirements() {
        let with = |list: &str| gate(&format!(r#"{{"default":[{list}]}}"#), "quay.io/org/os").map(|gate| gate.verdict);
        let (any, signed, reject) =
            (r#"{"type":"insecureAcceptAnything"}"#, r#"{"type":"signedBy"}"#, r#"{"type":"reject"}"#);
        assert_eq!(with(any), Ok(Verdict::AcceptsAnything));
        assert_eq!(with(&format!("{any},{signed}")), Ok(Verdict::RequiresSignature));
        assert_eq!(with(&format!("{reject},{signed}")), Ok(Verdict::AlwaysRejects));
        assert_eq!(with(&format!("{signed},{reject}")), Ok(Verdict::AlwaysRejects));
        assert!(matches!(with(""), Err(PolicyError::Empty(_))));
        assert!(matches!(with(r#"{"type":"weird"}"#), Err(PolicyError::UnknownType { .. })));
        assert!(matches!(with("{}"), Err(PolicyError::UnknownType { .. })));
    }

    #[test]
    fn the_files_that_a_rule_names_are_listed() {
        let rule = r#"[{"type":"sigstoreSigned","keyPaths":["/a","/b"],"rekorPublicKeyPath":"/c"},
            {"type":"sigstoreSigned","fulcio":{"caPath":"/d","oidcIssuer":"Path"}},{"type":"signedBy","keyPath":"/e"}]"#;
        let policy = format!(
            r#"{{"default":[{{"type":"signedBy","keyPath":"/z"}}],"transports":{{"docker":{{"quay.io":{rule}}}}}}}"#
        );
        let policy = Policy::parse(policy.as_bytes()).unwrap();
        let image = |name: &str| reference::parse(&format!("{name}@sha256:{HEX}")).unwrap();
        let mut files = policy.files(&image("quay.io/org/os"));
        files.sort_unstable();
        assert_eq!(files, ["/a", "/b", "/c", "/d", "/e"]);
        assert_eq!(policy.files(&image("other.io/org/os")), ["/z"]);
    }

    #[test]
    fn policies_that_the_engine_refuses_are_refused() {
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"default":[{"type":"reject"}],"default":[{"type":"reject"}]}"#,
            r#"{"default":[{"type":"reject","type":"reject"}]}"#,
            r#"{"default":[{"type":"reject"}],"extra":1}"#,
            r#"{"default":[{"type":"reject"}],"transports":{"docker":{"a":[],"a":[]}}}"#,
        ] {
            assert!(Policy::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_default_of_only_insecure_accept_anything_is_recognized() {
        let insecure = |default: &str| Policy::parse(format!(r#"{{"default":{default}}}"#).as_bytes()).unwrap();
        assert!(insecure(r#"[{"type":"insecureAcceptAnything"}]"#).default_is_insecure());
        assert!(!insecure(r#"[{"type":"reject"}]"#).default_is_insecure());
        assert!(!insecure(r#"[{"type":"insecureAcceptAnything"},{"type":"reject"}]"#).default_is_insecure());
    }
}
