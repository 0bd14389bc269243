//! Verifies images. The node's own signature engine evaluates the node's containers policy; the gate adds that the
//! policy must demand a signature. All other modules only handle a [`VerifiedImage`].

mod engine;
mod engine_text;
mod error;
pub mod gate;
pub mod mirrors;
pub mod proxy;
pub mod reference;
mod stamp;
mod voucher;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ostree_ext::oci_spec::image::ImageManifest;
use serde::Deserialize;

use crate::model::{Digest, ImageFacts, PinnedImage, printable};

pub use engine::Engine;
use engine::Fetched;
pub(crate) use engine_text::without_queries;
pub use error::TrustError;
pub use gate::NodePolicy;
pub use stamp::TrustStamp;

/// The label that MCO's image build sets to the rendered config that the image was built from.
const CONFIG_LABEL: &str = "machineconfig";

/// The settings of verification. The paths are the node's; tests set others.
#[derive(Clone, Debug)]
pub struct Settings {
    /// containers-policy.json(5).
    pub policy: PathBuf,
    /// containers-registries.d(5).
    pub registries_d: PathBuf,
    /// skopeo(1).
    pub skopeo: PathBuf,
    /// Extra directory with a registry's CA, for skopeo's `--cert-dir`.
    pub cert_dir: Option<PathBuf>,
    /// Candidates for containers-auth.json(5). Only the first that exists is used, as in ostree-ext; without one, access
    /// is anonymous.
    pub auth_files: Vec<PathBuf>,
    /// `/etc`, which has the proxy's variables in `mco/proxy.env` and the mirrors in `containers/registries.conf`. The
    /// mirrors are read for messages only.
    pub etc: PathBuf,
    /// Writable directory for GnuPG, if a drop-in grants one.
    pub scratch: Option<PathBuf>,
    /// Time limit of one verification.
    pub deadline: Duration,
}

impl Settings {
    /// The directory in which GnuPG creates its home.
    fn scratch(&self) -> &Path {
        self.scratch.as_deref().unwrap_or(Path::new("/tmp"))
    }
}

/// A verified image. Only [`verify`] creates one, and no code can change one. Every function that changes the host's
/// image, its kernel arguments or its boot takes one; `tests/proofs.rs` shows that code without one does not compile.
#[derive(Clone, Debug)]
pub struct VerifiedImage {
    facts: ImageFacts,
    vouchers: String,
    default_is_insecure: bool,
}

impl VerifiedImage {
    /// The verified image.
    #[must_use]
    pub fn image(&self) -> &PinnedImage {
        &self.facts.image
    }

    /// The facts in the verified manifest and config.
    #[must_use]
    pub fn facts(&self) -> &ImageFacts {
        &self.facts
    }

    /// The keys and identities that the rule accepts: with one key, the key that signed the image.
    #[must_use]
    pub fn vouchers(&self) -> &str {
        &self.vouchers
    }

    /// Who vouched for what, in a sentence.
    #[must_use]
    pub fn sentence(&self) -> String {
        let ImageFacts { image, vouched_by, .. } = &self.facts;
        format!("verified {image}: its signature meets rule {vouched_by} of the node's policy, by {}", self.vouchers)
    }

    /// The reference for the host tools, with the prefix that they accept under this policy.
    #[must_use]
    pub fn to_pull(&self) -> String {
        reference::to_pull(&self.facts.image, self.default_is_insecure)
    }

    /// Whether the origin of the deployment requires a signature.
    #[must_use]
    pub fn is_signed_origin(&self) -> bool {
        !self.default_is_insecure
    }
}

/// Verifies `image` against the node's policy and reads its manifest and config. Writes nothing.
///
/// # Errors
/// See [`TrustError`]; every error refuses the image.
pub async fn verify(engine: &Engine, image: &PinnedImage) -> Result<VerifiedImage, TrustError> {
    let policy = NodePolicy::read(&engine.settings().policy)?;
    let scope = policy.gate(image)?;
    TrustStamp::check(engine.settings(), image)?;
    let fetched = engine.fetch(&policy, image, &scope).await?;
    for file in policy.policy.files(image).into_iter().filter(|file| root_only(file)) {
        tracing::warn!(
            "{file}, which rule {scope} needs, is not readable by everyone; rpm-ostree pulls as an unprivileged user \
             and will refuse {image}: chmod a+r {file}"
        );
    }
    let facts = facts(image, scope, &fetched)?;
    let vouchers = voucher::vouchers(&policy.policy, image);
    Ok(VerifiedImage { facts, vouchers, default_is_insecure: policy.policy.default_is_insecure() })
}

fn root_only(file: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(file).is_ok_and(|metadata| metadata.mode() & 0o004 == 0)
}

/// Parses the manifest and the config. Pure.
fn facts(image: &PinnedImage, vouched_by: String, fetched: &Fetched) -> Result<ImageFacts, TrustError> {
    let Fetched { instance, manifest, config } = fetched;
    let invalid = |why: String| TrustError::Invalid { image: image.clone(), why: printable(&why, 300) };
    let instance = Digest::parse(instance)
        .ok_or_else(|| invalid(format!("the engine reports `{instance}`, which is not a digest")))?;
    let manifest: ImageManifest =
        serde_json::from_slice(manifest).map_err(|e| invalid(format!("its manifest cannot be parsed: {e}")))?;
    let config: ImageConfig =
        serde_json::from_slice(config).map_err(|e| invalid(format!("its config cannot be parsed: {e}")))?;
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

/// The `machineconfig` label in the JSON of an OCI image config, which the host has for its deployments. Pure.
#[must_use]
pub fn rendered_config_label(config: &str) -> Option<String> {
    serde_json::from_str::<ImageConfig>(config).ok()?.rendered_config()
}

/// The fields that the agent uses of an image's config. Builders leave out optional fields such as `history`.
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

/// The private parsers, for tests/fuzz.
#[cfg(fuzzing)]
#[allow(missing_docs, missing_debug_implementations, reason = "the names are those of the parsers")]
pub mod fuzzing {
    use super::{Engine, NodePolicy, PinnedImage, TrustError, engine_text};

    pub fn policy(bytes: &[u8], path: &std::path::Path) -> Result<NodePolicy, TrustError> {
        NodePolicy::parse(bytes.to_vec(), path)
    }

    pub fn classify(text: &str, by: &Engine, policy: &NodePolicy, image: &PinnedImage, scope: &str) -> TrustError {
        engine_text::classify_text("OpenImage", text, &by.question(policy, image, scope))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Fault;

    #[test]
    fn the_message_of_a_fault_is_short_and_printable() {
        let image = || reference::parse(&format!("quay.io/o/i@sha256:{}", "ab".repeat(32))).unwrap();
        let long = TrustError::Unreachable { image: image(), why: "\u{1b}".repeat(5000) };
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
            let (manifest, config) = (manifest.clone().into_bytes(), config.into_bytes());
            let fetched = Fetched { instance: digest.clone(), manifest, config };
            facts(&image, "default".to_owned(), &fetched).unwrap().created
        };
        assert_eq!(created(r#""created":"2026-11-22T09:30:00.123456789+01:30","#), Some(1_795_334_400_123));
        for none in ["", r#""created":"yesterday","#, r#""created":"0001-01-01T00:00:00Z","#] {
            assert_eq!(created(none), None, "{none}");
        }
    }
}
