//! The scope gate: finds the requirements of a containers policy for an image, and refuses the image if they demand no
//! signature. Pure.
//!
//! It chooses the scope exactly as containers/image does. Keys and identities are left to the engine, which parses the
//! same bytes strictly.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::{TrustError, engine};
use crate::files::read_bounded;
use crate::model::{PinnedImage, name_of, printable};

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

pub(super) type Requirement = UniqueMap<serde_json::Value>;

/// The effect of the applicable requirements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// No signature is demanded.
    AcceptsAnything,
    /// At least one requirement demands a signature.
    RequiresSignature,
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
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
#[allow(missing_docs, reason = "the names are those of the policy")]
pub enum Identity {
    /// The default.
    MatchRepoDigestOrExact,
    MatchExact,
    MatchRepository,
    ExactReference {
        docker_reference: String,
    },
    ExactRepository {
        docker_repository: String,
    },
    RemapIdentity {
        prefix: String,
        signed_prefix: String,
    },
}

impl Policy {
    /// Parses the file. Duplicate keys and unknown top-level keys are errors, as they are for the engine.
    ///
    /// # Errors
    /// The text is not the JSON that containers/image accepts; the message has the place.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|error| error.to_string())
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
    pub fn gate(&self, image: &PinnedImage) -> Result<Gate, String> {
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
        let scopes = self.docker().into_iter().flat_map(|docker| docker.0.keys());
        let looks_alike = |scope: &&String| {
            let bare = bare(scope);
            !bare.is_empty() && !applicable.contains(*scope) && wanted.contains(&bare)
        };
        scopes.filter(looks_alike).map(String::as_str).collect()
    }

    fn docker(&self) -> Option<&UniqueMap<Vec<Requirement>>> {
        self.transports.as_ref()?.0.get("docker")
    }

    pub(super) fn applicable(&self, image: &PinnedImage) -> (String, &[Requirement]) {
        let scoped = self.docker().and_then(|docker| {
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
    name_of(name.trim_end_matches('/')).trim_end_matches('/').to_owned()
}

/// The engine refuses an identity that cannot be parsed.
fn identity(requirement: &Requirement) -> Identity {
    let parsed = requirement.0.get("signedIdentity").map(Identity::deserialize);
    parsed.and_then(Result::ok).unwrap_or(Identity::MatchRepoDigestOrExact)
}

fn kind(requirement: &Requirement) -> Option<&str> {
    requirement.0.get("type").and_then(serde_json::Value::as_str)
}

/// The effect of a list: an image must meet all of its requirements.
fn verdict(scope: &str, requirements: &[Requirement]) -> Result<Verdict, String> {
    if requirements.is_empty() {
        return Err(format!("the list of requirements for {scope} is empty"));
    }
    let mut verdicts = requirements.iter().map(|requirement| match kind(requirement) {
        Some("insecureAcceptAnything") => Ok(Verdict::AcceptsAnything),
        Some("signedBy" | "sigstoreSigned") => Ok(Verdict::RequiresSignature),
        // containers/image never implemented signedBaseLayer and always rejects it.
        Some("reject" | "signedBaseLayer") => Ok(Verdict::AlwaysRejects),
        Some(other) => Err(format!("the requirement type {other:?} for {scope} is unknown")),
        None => Err(format!("a requirement for {scope} has no type")),
    });
    verdicts.try_fold(Verdict::AcceptsAnything, |strictest, verdict| Ok(strictest.max(verdict?)))
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
#[derive(Debug)]
pub(super) struct UniqueMap<T>(pub(super) BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self(BTreeMap::new()))
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for UniqueMap<T> {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut access: A) -> Result<Self, A::Error> {
        while let Some((key, value)) = access.next_entry::<String, T>()? {
            if self.0.contains_key(&key) {
                return Err(A::Error::custom(format!("duplicate key {key:?}")));
            }
            self.0.insert(key, value);
        }
        Ok(self)
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
        Self::parse(bytes, path)
    }

    /// Parses the content of the file at `path`.
    pub(super) fn parse(bytes: Vec<u8>, path: &Path) -> Result<Self, TrustError> {
        let policy = Policy::parse(&bytes).map_err(|why| unusable(path, &why))?;
        Ok(Self { bytes, policy, path: path.to_owned() })
    }

    /// The rule that applies to `image`, which must demand a signature.
    ///
    /// # Errors
    /// [`TrustError::AcceptsAnything`], [`TrustError::Rejects`] and [`TrustError::Policy`].
    pub fn gate(&self, image: &PinnedImage) -> Result<String, TrustError> {
        let gate = self.policy.gate(image).map_err(|why| unusable(&self.path, &why))?;
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

fn unusable(path: &Path, why: &str) -> TrustError {
    TrustError::Policy { path: path.to_owned(), why: printable(why, 300) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::reference;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn gate(policy: &str, name: &str) -> Result<Gate, String> {
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
                demand(true, Identity::MatchRepoDigestOrExact),
                demand(false, Identity::RemapIdentity { prefix: "a".into(), signed_prefix: "b".into() }),
                demand(false, Identity::ExactReference { docker_reference: "r:t".into() }),
                demand(false, Identity::MatchRepoDigestOrExact),
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
        assert_eq!(with("").unwrap_err(), "the list of requirements for default is empty");
        assert_eq!(with(r#"{"type":"weird"}"#).unwrap_err(), "the requirement type \"weird\" for default is unknown");
        assert_eq!(with("{}").unwrap_err(), "a requirement for default has no type");
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
