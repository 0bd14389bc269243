//! Why an image is not verified.

use std::path::PathBuf;

use crate::model::{Fault, PinnedImage, Reason, printable};

/// Why an image is not verified. Anything but success refuses; the class only decides how soon to look again.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
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

impl TrustError {
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

impl From<&TrustError> for Fault {
    fn from(error: &TrustError) -> Self {
        Self { reason: error.reason(), message: printable(&error.to_string(), 900) }
    }
}
