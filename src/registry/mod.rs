//! Neighbour 2, the image: may it be booted? The containers policy of the node decides, evaluated by the node's own
//! engine; the gate adds that the policy must demand a signature. Everything else only handles [`Verified`] images.

mod engine;
mod engine_text;
pub mod mirrors;
pub mod policy;
pub mod proxy;
pub mod reference;
mod trust;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ostree_ext::oci_spec::image::ImageManifest;
use serde::Deserialize;

use crate::model::{Digest, Fault, ImageFacts, PinnedImage, Reason, printable};
use policy::{MAX_POLICY, Policy, PolicyError, Verdict};

pub use engine::Engine;
pub(crate) use engine_text::without_queries;
pub use trust::TrustStamp;

/// The label that MCO's image build puts on an image: the rendered config it was built from.
const CONFIG_LABEL: &str = "machineconfig";

/// How an image is verified; the paths are the node's, overridable for tests.
#[derive(Clone, Debug)]
pub struct Settings {
    /// containers-policy.json(5).
    pub policy: PathBuf,
    /// containers-registries.d(5).
    pub registries_d: PathBuf,
    /// skopeo(1).
    pub skopeo: PathBuf,
    /// Extra directory with a registry's CA, as skopeo's `--cert-dir`.
    pub cert_dir: Option<PathBuf>,
    /// containers-auth.json(5) candidates; the first that exists is used alone, as by ostree-ext; none is anonymous.
    pub auth_files: Vec<PathBuf>,
    /// `/etc`, with the proxy's variables in `mco/proxy.env` and the mirrors in `containers/registries.conf`, which are
    /// read to be named.
    pub etc: PathBuf,
    /// Writable directory for GnuPG, if a drop-in grants one.
    pub scratch: Option<PathBuf>,
    /// How long one verification may take.
    pub deadline: Duration,
}

/// An image that verification vouches for. Only [`verify`] makes one, nothing alters one, and what changes the host's
/// image, its kernel arguments or its boot takes one; `tests/proofs.rs` shows that code which does otherwise is not
/// compiled.
#[derive(Clone, Debug)]
pub struct VerifiedImage {
    facts: ImageFacts,
    default_is_insecure: bool,
}

impl VerifiedImage {
    /// What was verified.
    #[must_use]
    pub fn image(&self) -> &PinnedImage {
        &self.facts.image
    }

    /// What the verified manifest and config say.
    #[must_use]
    pub fn facts(&self) -> &ImageFacts {
        &self.facts
    }

    /// The reference for the host tools, with the prefix that this policy admits.
    #[must_use]
    pub fn to_pull(&self) -> String {
        reference::to_pull(&self.facts.image, self.default_is_insecure)
    }

    /// Whether that prefix makes the deployment's origin a signed one.
    #[must_use]
    pub fn is_signed_origin(&self) -> bool {
        !self.default_is_insecure
    }
}

/// Why an image is not verified. Anything but success refuses; the class only decides how soon to look again.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The policy file cannot be read.
    #[error("cannot read the signature policy {path}: {source}")]
    ReadPolicy {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The policy file makes no sense, to the gate or to the engine.
    #[error("the signature policy {path} is not usable: {why}")]
    Policy {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The gate: nothing is demanded of this image.
    #[error(
        "{path} accepts anything for {image} (rule {scope}); give its scope a sigstoreSigned or signedBy requirement, \
         with a ClusterImagePolicy or in the image{hint}"
    )]
    AcceptsAnything {
        /// The policy file.
        path: PathBuf,
        /// The image.
        image: PinnedImage,
        /// The rule.
        scope: String,
        /// Scopes that were probably meant.
        hint: String,
    },
    /// The gate or the engine: nothing can pass.
    #[error(
        "{path} rejects {image} (rule {scope}); if it is to be trusted, give its scope a sigstoreSigned or signedBy \
         requirement and no reject{hint}"
    )]
    Rejects {
        /// The policy file.
        path: PathBuf,
        /// The image.
        image: PinnedImage,
        /// The rule.
        scope: String,
        /// Scopes that were probably meant.
        hint: String,
    },
    /// The engine cannot be used or does not enforce.
    #[error("the signature engine {skopeo} cannot be used: {why}")]
    Engine {
        /// The program.
        skopeo: PathBuf,
        /// Why.
        why: String,
    },
    /// No signature where one is required.
    #[error("{image} has no signature and rule {scope} requires one; {hint}")]
    SignatureMissing {
        /// The image.
        image: PinnedImage,
        /// The rule.
        scope: String,
        /// Of which kind, and where.
        hint: String,
    },
    /// A signature that is not accepted.
    #[error("the signature of {image} is not accepted by rule {scope}: {why}{hint}")]
    SignatureRejected {
        /// The image.
        image: PinnedImage,
        /// The rule.
        scope: String,
        /// The engine's words.
        why: String,
        /// What is usually the matter.
        hint: String,
    },
    /// GnuPG needs a writable directory.
    #[error("rule {scope} asks for a GPG signature, which needs scratch space: enable the drop-in 10-gpg.conf ({why})")]
    GpgScratch {
        /// The rule.
        scope: String,
        /// The engine's words.
        why: String,
    },
    /// The files that say where images and signatures are.
    #[error(
        "the node's registry configuration does not work: {why}; correct the file in the image, or what writes it \
         (ImageDigestMirrorSet, ImageTagMirrorSet, ClusterImagePolicy)"
    )]
    Config {
        /// The file, the line and what is wrong.
        why: String,
    },
    /// The proxy on the way to the registry.
    #[error(
        "{name} in {place} is no proxy that can be used: {why}; correct it where it comes from (`oc edit \
         proxy.config/cluster` for proxy.env), with `%` as %25, `#` as %23, `/` as %2F and `?` as %3F in user and password"
    )]
    Proxy {
        /// The variable.
        name: &'static str,
        /// The file, or whose environment.
        place: String,
        /// What is wrong, without the URL: it may hold a password.
        why: &'static str,
    },
    /// No file descriptor, process or memory left.
    #[error("this node is short of file descriptors, processes or memory, so nothing can be verified now: {why}")]
    Scarce {
        /// What failed.
        why: String,
    },
    /// No such manifest.
    #[error("{place} has no manifest {image}; push the image, or mirror it")]
    ManifestMissing {
        /// The image.
        image: PinnedImage,
        /// Who said so.
        place: String,
    },
    /// Credentials.
    #[error("{place} refuses to serve {what}{image} {why}; check the pull secret")]
    Denied {
        /// The image.
        image: PinnedImage,
        /// `the signature of `, if only that is refused.
        what: &'static str,
        /// Who refuses.
        place: String,
        /// With which credentials it was asked, and the engine's words.
        why: String,
    },
    /// The registry's certificate.
    #[error("{place} serves {image} with a certificate that this node does not trust: {why}; {}", cure(why))]
    Untrusted {
        /// The image.
        image: PinnedImage,
        /// Who does.
        place: String,
        /// The engine's words.
        why: String,
    },
    /// The network, TLS, a server error, or anything unknown.
    #[error("cannot read {image} from its registry: {why}")]
    Unreachable {
        /// The image.
        image: PinnedImage,
        /// The engine's words.
        why: String,
    },
    /// The engine took too long.
    #[error(
        "verifying {image} took longer than {seconds} s: its registry, or a proxy before it, accepts connections and \
         does not answer; if it is only slow, raise REBASE_AGENT_VERIFY_TIMEOUT"
    )]
    Deadline {
        /// The image.
        image: PinnedImage,
        /// The limit.
        seconds: u64,
    },
    /// An index without this machine's architecture.
    #[error("{image} has nothing for this machine: {why}; build the pool's image for it")]
    NoInstance {
        /// The image.
        image: PinnedImage,
        /// The engine's words.
        why: String,
    },
    /// Bytes that do not match the digest, or are no manifest or config.
    #[error("{image} is damaged or no OS image: {why}")]
    Invalid {
        /// The image.
        image: PinnedImage,
        /// What is wrong.
        why: String,
    },
}

/// What to do about a certificate, by Go's words for what is wrong with it.
fn cure(why: &str) -> &'static str {
    if why.contains("x509: certificate has expired or is not yet valid") {
        "renew it, or correct this node's clock"
    } else if why.contains("x509: certificate is valid for ") || why.contains("x509: cannot validate certificate for ")
    {
        "give it the name by which the registry is asked"
    } else {
        "add its CA to certs.d"
    }
}

impl RegistryError {
    /// The stable word.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::ReadPolicy { .. } | Self::Policy { .. } => Reason::PolicyInvalid,
            Self::AcceptsAnything { .. } => Reason::PolicyAcceptsAnything,
            Self::Rejects { .. } => Reason::PolicyRejects,
            Self::Engine { .. } => Reason::EngineUnfit,
            Self::SignatureMissing { .. } => Reason::SignatureMissing,
            Self::SignatureRejected { .. } => Reason::SignatureRejected,
            Self::GpgScratch { .. } => Reason::GpgNeedsScratch,
            Self::Config { .. } | Self::Proxy { .. } => Reason::RegistryConfigInvalid,
            Self::Scarce { .. } => Reason::ResourcesExhausted,
            Self::ManifestMissing { .. } => Reason::ManifestMissing,
            Self::Denied { .. } => Reason::RegistryDenied,
            Self::Untrusted { .. } => Reason::RegistryUntrusted,
            Self::Unreachable { .. } => Reason::RegistryUnreachable,
            Self::Deadline { .. } => Reason::DeadlineExceeded,
            Self::NoInstance { .. } => Reason::WrongArchitecture,
            Self::Invalid { .. } => Reason::ImageInvalid,
        }
    }
}

impl From<&RegistryError> for Fault {
    fn from(error: &RegistryError) -> Self {
        Self { reason: error.reason(), message: printable(&error.to_string(), 900) }
    }
}

/// The policy file as read once: gate and engine see the same bytes.
#[derive(Debug)]
pub struct NodePolicy {
    bytes: Vec<u8>,
    policy: Policy,
    path: PathBuf,
}

impl NodePolicy {
    /// Reads and parses the file.
    ///
    /// # Errors
    /// [`RegistryError::ReadPolicy`] and [`RegistryError::Policy`].
    pub fn read(path: &std::path::Path) -> Result<Self, RegistryError> {
        let bytes =
            crate::host::boot::read_bounded(path, MAX_POLICY).map_err(|source| match engine::is_scarce(&source) {
                true => RegistryError::Scarce { why: format!("{}: {source}", path.display()) },
                false => RegistryError::ReadPolicy { path: path.to_owned(), source },
            })?;
        let policy = Policy::parse(&bytes).map_err(|e| unusable(path, &e))?;
        Ok(Self { bytes, policy, path: path.to_owned() })
    }

    /// The rule that applies to `image`, which must demand a signature.
    ///
    /// # Errors
    /// [`RegistryError::AcceptsAnything`], [`RegistryError::Rejects`] and [`RegistryError::Policy`].
    pub fn gate(&self, image: &PinnedImage) -> Result<String, RegistryError> {
        let gate = self.policy.gate(image).map_err(|e| unusable(&self.path, &e))?;
        let hint = match self.policy.lookalikes(image).as_slice() {
            [] => String::new(),
            alike => printable(
                &format!(
                    "; {} looks like it and does not apply: a scope is compared letter for letter, without docker://, \
                     tag or / at its end",
                    alike.join(", ")
                ),
                400,
            ),
        };
        let (path, image, scope) = (self.path.clone(), image.clone(), gate.scope);
        match gate.verdict {
            Verdict::RequiresSignature => Ok(scope),
            Verdict::AcceptsAnything => Err(RegistryError::AcceptsAnything { path, image, scope, hint }),
            Verdict::AlwaysRejects => Err(RegistryError::Rejects { path, image, scope, hint }),
        }
    }
}

fn unusable(path: &std::path::Path, error: &PolicyError) -> RegistryError {
    RegistryError::Policy { path: path.to_owned(), why: printable(&error.to_string(), 300) }
}

/// Verifies `image` against the node's policy and reads its manifest and config. Writes nothing.
///
/// # Errors
/// Every variant of [`RegistryError`]; none of them may be taken for success.
pub async fn verify(engine: &Engine, image: &PinnedImage) -> Result<VerifiedImage, RegistryError> {
    let policy = NodePolicy::read(&engine.settings().policy)?;
    #[cfg(feature = "faults")]
    if crate::faults::chosen(crate::faults::NO_VERIFY) {
        return unverified(engine, policy, image).await;
    }
    let scope = policy.gate(image)?;
    TrustStamp::check(engine.settings(), image)?;
    let fetched = engine.fetch(&policy, image, &scope).await?;
    for file in policy.policy.files(image).into_iter().filter(|file| root_only(file)) {
        tracing::warn!(
            "{file}, which rule {scope} needs, is not readable by everyone; rpm-ostree pulls as an unprivileged user \
             and will refuse {image}: chmod a+r {file}"
        );
    }
    let facts = facts(image, scope, &fetched.instance, &fetched.manifest, &fetched.config)?;
    Ok(VerifiedImage { facts, default_is_insecure: policy.policy.default_is_insecure() })
}

#[cfg(feature = "faults")]
async fn unverified(engine: &Engine, node: NodePolicy, image: &PinnedImage) -> Result<VerifiedImage, RegistryError> {
    let bytes = br#"{"default":[{"type":"insecureAcceptAnything"}]}"#.to_vec();
    let policy = NodePolicy { policy: Policy::parse(&bytes).map_err(|e| unusable(&node.path, &e))?, bytes, ..node };
    let fetched = engine.fetch(&policy, image, "").await?;
    let facts = facts(image, String::new(), &fetched.instance, &fetched.manifest, &fetched.config)?;
    Ok(VerifiedImage { facts, default_is_insecure: node.policy.default_is_insecure() })
}

fn root_only(file: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(file).is_ok_and(|metadata| metadata.mode() & 0o004 == 0)
}

/// What the manifest and config say. Pure.
fn facts(
    image: &PinnedImage,
    vouched_by: String,
    instance: &str,
    manifest: &[u8],
    config: &[u8],
) -> Result<ImageFacts, RegistryError> {
    let invalid = |why: String| RegistryError::Invalid { image: image.clone(), why: printable(&why, 300) };
    let instance =
        Digest::parse(instance).ok_or_else(|| invalid(format!("the engine names it `{instance}`, not a digest")))?;
    let manifest: ImageManifest =
        serde_json::from_slice(manifest).map_err(|e| invalid(format!("its manifest does not parse: {e}")))?;
    let config: ImageConfig =
        serde_json::from_slice(config).map_err(|e| invalid(format!("its config does not parse: {e}")))?;
    Ok(ImageFacts {
        image: image.clone(),
        instance,
        architecture: printable(&config.architecture, 64),
        bootable: ["ostree.bootable", "containers.bootc"].iter().any(|name| config.label(name).is_some()),
        rendered_config: config.rendered_config(),
        created: config.created.as_deref().and_then(crate::time::unix),
        size: manifest.layers().iter().fold(0, |sum: u64, layer| sum.saturating_add(layer.size())),
        vouched_by,
    })
}

/// The `machineconfig` label in an OCI image config's JSON, for what the host reports of its deployments. Pure.
#[must_use]
pub fn rendered_config_label(config: &str) -> Option<String> {
    serde_json::from_str::<ImageConfig>(config).ok()?.rendered_config()
}

/// What counts of an image's config. Builders leave out what the specification calls optional, such as `history`.
#[derive(Deserialize)]
struct ImageConfig {
    architecture: String,
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    config: Option<RunConfig>,
}

#[derive(Deserialize)]
struct RunConfig {
    #[serde(default, rename = "Labels")]
    labels: Option<BTreeMap<String, String>>,
}

impl ImageConfig {
    fn label(&self, name: &str) -> Option<&String> {
        self.config.as_ref()?.labels.as_ref()?.get(name)
    }

    fn rendered_config(&self) -> Option<String> {
        self.label(CONFIG_LABEL).filter(|name| !name.is_empty()).map(|name| printable(name, 253))
    }
}

/// What tests/fuzz reaches of the private parsers.
#[cfg(fuzzing)]
#[allow(missing_docs, missing_debug_implementations, reason = "the names are those of the parsers")]
pub mod fuzzing {
    use super::{Engine, NodePolicy, PinnedImage, Policy, RegistryError, engine_text, unusable};

    pub fn policy(bytes: &[u8], path: &std::path::Path) -> Result<NodePolicy, RegistryError> {
        let policy = Policy::parse(bytes).map_err(|e| unusable(path, &e))?;
        Ok(NodePolicy { bytes: bytes.to_vec(), policy, path: path.to_owned() })
    }

    pub fn classify(text: &str, by: &Engine, policy: &NodePolicy, image: &PinnedImage, scope: &str) -> RegistryError {
        engine_text::classify_text("OpenImage", text, &by.question(policy, image, scope))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_of_a_fault_is_short_and_printable() {
        let image = || reference::parse(&format!("quay.io/o/i@sha256:{}", "ab".repeat(32))).unwrap();
        let long = RegistryError::Unreachable { image: image(), why: "\u{1b}".repeat(5000) };
        let message = Fault::from(&long).message;
        assert!(message.chars().count() <= 900 && !message.contains('\u{1b}'), "{message}");
    }

    #[test]
    fn the_time_of_creation_is_the_verified_configs() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        let image = reference::parse(&format!("quay.io/o/i@{digest}")).unwrap();
        let blob = |media: &str| format!(r#"{{"mediaType":"{media}","digest":"{digest}","size":1}}"#);
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{},"layers":[]}}"#,
            blob("application/vnd.oci.image.config.v1+json")
        );
        let created = |field: &str| {
            let config = format!(
                r#"{{{field}"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[]}},"history":[]}}"#
            );
            let facts = facts(&image, "default".to_owned(), &digest, manifest.as_bytes(), config.as_bytes());
            facts.unwrap().created
        };
        assert_eq!(created(r#""created":"2026-11-22T09:30:00.123456789+01:30","#), Some(1_795_334_400_123));
        for none in ["", r#""created":"yesterday","#, r#""created":"0001-01-01T00:00:00Z","#] {
            assert_eq!(created(none), None, "{none}");
        }
    }
}
