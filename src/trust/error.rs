//! Errors of verification.

use std::path::PathBuf;

use crate::model::{Fault, PinnedImage, Reason, printable};

/// Why an image is not verified. Every error refuses the image; the variant decides how soon verification is retried.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message is its documentation")]
pub enum TrustError {
    #[error("cannot read the signature policy {path}: {source}")]
    ReadPolicy { path: PathBuf, source: std::io::Error },
    /// The gate or the engine cannot use the policy file.
    #[error("the signature policy {path} is not usable: {why}")]
    Policy { path: PathBuf, why: String },
    /// The gate: the policy demands no signature. `hint` names scopes that were probably meant.
    #[error(
        "{path} accepts {image} without a signature (rule {scope}); give its scope a sigstoreSigned or signedBy requirement, \
         with a ClusterImagePolicy or in the image{hint}"
    )]
    AcceptsAnything { path: PathBuf, image: PinnedImage, scope: String, hint: String },
    /// The gate or the engine: the policy rejects every image of this scope. `hint` names scopes that were probably
    /// meant.
    #[error(
        "{path} rejects {image} (rule {scope}); if it is to be trusted, give its scope a sigstoreSigned or signedBy \
         requirement and no reject{hint}"
    )]
    Rejects { path: PathBuf, image: PinnedImage, scope: String, hint: String },
    #[error("the signature engine {skopeo} cannot be used: {why}")]
    Engine { skopeo: PathBuf, why: String },
    /// `hint` says where to sign, and how.
    #[error("{image} has no signature and rule {scope} requires one; {hint}")]
    SignatureMissing { image: PinnedImage, scope: String, hint: String },
    /// `hint` names the probable cause.
    #[error("the signature of {image} is not accepted by rule {scope}: {why}{hint}")]
    SignatureRejected { image: PinnedImage, scope: String, why: String, hint: String },
    #[error(
        "rule {scope} demands a GPG signature, which needs a writable directory: enable the drop-in 10-gpg.conf ({why})"
    )]
    GpgScratch { scope: String, why: String },
    /// The files with the places of images and signatures. `why` has the file, the line and the fault.
    #[error(
        "the node's registry configuration is not usable: {why}; correct the file in the image, or the resource that \
         MCO writes it from (ImageDigestMirrorSet, ImageTagMirrorSet, ClusterImagePolicy)"
    )]
    Config { why: String },
    /// The proxy in front of the registry. `why` never has the URL, which may contain a password.
    #[error(
        "{name} in {place} is not a usable proxy: {why}; correct it at its source (`oc edit proxy.config/cluster` for \
         proxy.env), with `%` as %25, `#` as %23, `/` as %2F and `?` as %3F in user and password"
    )]
    Proxy { name: &'static str, place: String, why: &'static str },
    #[error("this node has no file descriptor, process or memory left to verify an image: {why}")]
    Scarce { why: String },
    #[error("{place} has no manifest {image}; push the image, or mirror it")]
    ManifestMissing { image: PinnedImage, place: String },
    /// `what` is the image or its signature. `credentials` says which were used.
    #[error("{place} refuses to serve {what}: {why}; {credentials}: check the pull secret")]
    Denied { place: String, what: String, why: String, credentials: String },
    #[error("{place} serves {image} with a certificate that this node does not trust: {why}; {}", cure(why))]
    Untrusted { image: PinnedImage, place: String, why: String },
    /// The network, TLS, a server error, or an unknown failure.
    #[error("cannot read {image} from its registry: {why}")]
    Unreachable { image: PinnedImage, why: String },
    #[error(
        "verifying {image} took longer than {seconds} s: its registry, or a proxy before it, accepts connections and \
         does not answer; if it is only slow, raise REBASE_AGENT_VERIFY_TIMEOUT"
    )]
    Deadline { image: PinnedImage, seconds: u64 },
    #[error("{image} has no image for this machine's architecture: {why}; build the pool's image for it")]
    NoInstance { image: PinnedImage, why: String },
    /// The content does not match the digest, or is not a manifest or config.
    #[error("{image} is damaged or not an OS image: {why}")]
    Invalid { image: PinnedImage, why: String },
}

/// What to do about the certificate, by the error of Go's TLS library.
fn cure(why: &str) -> &'static str {
    if why.contains("x509: certificate has expired or is not yet valid") {
        "renew it, or correct this node's clock"
    } else if why.contains("x509: certificate is valid for ") || why.contains("x509: cannot validate certificate for ")
    {
        "issue it for the name by which the node reaches the registry"
    } else {
        "add its CA to certs.d"
    }
}

impl TrustError {
    /// The reason word of this error.
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
