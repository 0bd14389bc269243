//! The files that define the images a node trusts and their places: `policy.json`, `registries.d`, `registries.conf`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// One requirement of a `policy.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Requirement(Value);

impl Requirement {
    /// `insecureAcceptAnything`
    pub fn accept() -> Self {
        Self(json!({ "type": "insecureAcceptAnything" }))
    }

    /// `reject`
    pub fn reject() -> Self {
        Self(json!({ "type": "reject" }))
    }

    /// `sigstoreSigned` by the key in that file.
    pub fn sigstore_key_path(path: &Path) -> Self {
        Self(json!({ "type": "sigstoreSigned", "keyPath": path }))
    }

    /// `sigstoreSigned` by one of the keys in these files.
    pub fn sigstore_key_paths<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Self {
        Self(json!({ "type": "sigstoreSigned", "keyPaths": paths.into_iter().collect::<Vec<_>>() }))
    }

    /// `sigstoreSigned` by that key, which the policy itself contains.
    pub fn sigstore_key_data(pem: &str) -> Self {
        Self(json!({ "type": "sigstoreSigned", "keyData": openssl::base64::encode_block(pem.as_bytes()) }))
    }

    /// `signedBy` one of the GPG keys in that file.
    pub fn gpg_key_path(path: &Path) -> Self {
        Self(json!({ "type": "signedBy", "keyType": "GPGKeys", "keyPath": path }))
    }

    /// Any other requirement, in the file's format.
    pub fn raw(value: Value) -> Self {
        Self(value)
    }

    /// With that `signedIdentity` instead of the default, [`Identity::MatchRepoDigestOrExact`].
    pub fn identity(mut self, identity: &Identity) -> Self {
        self.0["signedIdentity"] = identity.to_json();
        self
    }
}

/// `signedIdentity`: the reference that a signature must name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// Exactly the reference.
    MatchExact,
    /// The same repository with any tag if the reference has a digest; otherwise exactly the reference.
    MatchRepoDigestOrExact,
    /// The same repository. The strictest rule that accepts cosign's identities, which have no tag.
    MatchRepository,
    /// That reference.
    ExactReference(String),
    /// That repository.
    ExactRepository(String),
    /// As [`Identity::MatchRepoDigestOrExact`], after `prefix` was replaced by `signed_prefix`.
    RemapIdentity {
        /// Prefix of references.
        prefix: String,
        /// Prefix of the signatures' identities.
        signed_prefix: String,
    },
}

impl Identity {
    fn to_json(&self) -> Value {
        match self {
            Self::MatchExact => json!({ "type": "matchExact" }),
            Self::MatchRepoDigestOrExact => json!({ "type": "matchRepoDigestOrExact" }),
            Self::MatchRepository => json!({ "type": "matchRepository" }),
            Self::ExactReference(reference) => json!({ "type": "exactReference", "dockerReference": reference }),
            Self::ExactRepository(repository) => json!({ "type": "exactRepository", "dockerRepository": repository }),
            Self::RemapIdentity { prefix, signed_prefix } => {
                json!({ "type": "remapIdentity", "prefix": prefix, "signedPrefix": signed_prefix })
            }
        }
    }
}

/// A `policy.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    default: Vec<Requirement>,
    transports: BTreeMap<String, BTreeMap<String, Vec<Requirement>>>,
}

impl Policy {
    /// With that global default.
    pub fn new(default: impl IntoIterator<Item = Requirement>) -> Self {
        Self { default: default.into_iter().collect(), transports: BTreeMap::new() }
    }

    /// Accepts images without a scope of their own, as OpenShift's policy does.
    pub fn accept_by_default() -> Self {
        Self::new([Requirement::accept()])
    }

    /// Rejects images without a scope of their own.
    pub fn reject_by_default() -> Self {
        Self::new([Requirement::reject()])
    }

    /// With these requirements for a scope of the `docker` transport; all of them must be met.
    pub fn scope(self, scope: &str, requirements: impl IntoIterator<Item = Requirement>) -> Self {
        self.transport_scope("docker", scope, requirements)
    }

    /// With these requirements for a scope of any transport.
    pub fn transport_scope(
        mut self,
        transport: &str,
        scope: &str,
        requirements: impl IntoIterator<Item = Requirement>,
    ) -> Self {
        let scopes = self.transports.entry(transport.into()).or_default();
        scopes.insert(scope.into(), requirements.into_iter().collect());
        self
    }

    /// The document.
    pub fn to_json(&self) -> Value {
        let list = |requirements: &[Requirement]| requirements.iter().map(|one| one.0.clone()).collect::<Value>();
        let transports = self.transports.iter().map(|(transport, scopes)| {
            let scopes = scopes.iter().map(|(scope, requirements)| (scope.clone(), list(requirements)));
            (transport.clone(), Value::Object(scopes.collect()))
        });
        json!({ "default": list(&self.default), "transports": transports.collect::<Map<_, _>>() })
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        write(path, &format!("{:#}\n", self.to_json()))
    }
}

/// A file of `registries.d`: the places of signatures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistriesD {
    scopes: BTreeMap<String, BTreeMap<&'static str, String>>,
}

impl RegistriesD {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether signatures attached in the registry are read for the scope; by default they are not.
    pub fn attachments(self, scope: &str, used: bool) -> Self {
        self.set(scope, "use-sigstore-attachments", used.to_string())
    }

    /// The base URL of the scope's GPG signatures.
    pub fn lookaside(self, scope: &str, url: &str) -> Self {
        self.set(scope, "lookaside", quoted(url))
    }

    fn set(mut self, scope: &str, key: &'static str, value: String) -> Self {
        self.scopes.entry(scope.into()).or_default().insert(key, value);
        self
    }

    /// The document.
    pub fn to_yaml(&self) -> String {
        let mut yaml = String::from(if self.scopes.is_empty() { "docker: {}\n" } else { "docker:\n" });
        for (scope, settings) in &self.scopes {
            yaml += &format!("  {}:\n", quoted(scope));
            for (key, value) in settings {
                yaml += &format!("    {key}: {value}\n");
            }
        }
        yaml
    }

    /// Writes the file, which must be in a `registries.d` and end in `.yaml`.
    pub fn write(&self, path: &Path) -> Result<()> {
        write(path, &self.to_yaml())
    }
}

/// A `registries.conf`: mirrors and blocked registries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistriesConf {
    registries: Vec<String>,
}

impl RegistriesConf {
    /// An empty configuration, in which short names do not resolve.
    pub fn new() -> Self {
        Self::default()
    }

    /// References that begin with `prefix` are fetched from these mirrors first, in order.
    pub fn mirrors<'a>(self, prefix: &str, mirrors: impl IntoIterator<Item = &'a str>) -> Self {
        let mirrors = mirrors.into_iter().map(|at| format!("[[registry.mirror]]\nlocation = {}\n", quoted(at)));
        let mirrors = mirrors.collect::<String>();
        self.registry(prefix, &mirrors)
    }

    /// References that begin with `prefix` are refused.
    pub fn blocked(self, prefix: &str) -> Self {
        self.registry(prefix, "blocked = true\n")
    }

    fn registry(mut self, prefix: &str, settings: &str) -> Self {
        self.registries.push(format!("\n[[registry]]\nprefix = {0}\nlocation = {0}\n{settings}", quoted(prefix)));
        self
    }

    /// The document.
    pub fn to_toml(&self) -> String {
        format!("unqualified-search-registries = []\n{}", self.registries.concat())
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        write(path, &self.to_toml())
    }
}

/// A string in JSON, which is also one in YAML and, without control characters, in TOML.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// Replaces the file as a whole: a reader sees either the old or the new one.
fn write(path: &Path, text: &str) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || {
        fs::create_dir_all(dir)?;
        let mut file = tempfile::Builder::new().prefix(".new").tempfile_in(dir)?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.persist(path).map_err(|error| error.error)?;
        std::io::Result::Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_has_a_default_and_scopes() {
        let key = Path::new("/etc/key.pub");
        let policy = Policy::reject_by_default()
            .scope("registry.example/os", [Requirement::sigstore_key_path(key).identity(&Identity::MatchRepository)])
            .transport_scope("atomic", "registry.example", [Requirement::accept(), Requirement::gpg_key_path(key)]);
        let expected = json!({
            "default": [{ "type": "reject" }],
            "transports": {
                "docker": { "registry.example/os": [{
                    "type": "sigstoreSigned",
                    "keyPath": "/etc/key.pub",
                    "signedIdentity": { "type": "matchRepository" },
                }] },
                "atomic": { "registry.example": [
                    { "type": "insecureAcceptAnything" },
                    { "type": "signedBy", "keyType": "GPGKeys", "keyPath": "/etc/key.pub" },
                ] },
            },
        });
        assert_eq!(policy.to_json(), expected);
    }

    #[test]
    fn registries_d_names_scopes() {
        let yaml = RegistriesD::new().attachments("127.0.0.1:5000/os", true).lookaside("a.example", "file:///s");
        assert_eq!(
            yaml.to_yaml(),
            "docker:\n  \"127.0.0.1:5000/os\":\n    use-sigstore-attachments: true\n  \
             \"a.example\":\n    lookaside: \"file:///s\"\n"
        );
        assert_eq!(RegistriesD::new().to_yaml(), "docker: {}\n");
    }

    #[test]
    fn registries_conf_lists_mirrors() {
        let conf = RegistriesConf::new().mirrors("a.example/os", ["b.example/os"]).blocked("c.example");
        assert_eq!(
            conf.to_toml(),
            "unqualified-search-registries = []\n\
             \n[[registry]]\nprefix = \"a.example/os\"\nlocation = \"a.example/os\"\n\
             [[registry.mirror]]\nlocation = \"b.example/os\"\n\
             \n[[registry]]\nprefix = \"c.example\"\nlocation = \"c.example\"\nblocked = true\n"
        );
    }

    #[test]
    fn files_are_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containers/policy.json");
        Policy::accept_by_default().write(&path).unwrap();
        Policy::reject_by_default().write(&path).unwrap();
        let read: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(read["default"][0]["type"], "reject");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
