//! Images: digests, pullspecs pinned by digest, and the comparison of deployments with images.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Backend, Deployment};
use crate::text::printable;

/// Longest reference accepted, in characters. MCO's own admission accepts 447 characters before the digest.
const MAX_LENGTH: usize = 520;

/// Longest repository without its host, in characters.
const MAX_REPOSITORY: usize = 255;

/// An OCI manifest digest, `sha256:` and 64 lowercase hex digits. No other algorithm is accepted: the signature
/// engine, both host tools and MCO's own admission use this one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Parses the canonical spelling; `None` for any other text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?;
        let valid = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        valid.then(|| Self(text.to_owned()))
    }

    /// `sha256:<64 hex>`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `sha256:` and the first twelve digits, for people.
    #[must_use]
    pub fn short(&self) -> &str {
        self.0.get(..19).unwrap_or(&self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("`{text}` is not sha256:<64 lowercase hex digits>"))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A canonical image reference pinned by digest, `host[:port]/repository@sha256:<64 hex>`. Only [`parse`] creates one; the
/// name is canonical (no tag, `docker.io` spelt out).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PinnedImage {
    name: String,
    digest: Digest,
}

impl PinnedImage {
    /// `host[:port]/repository`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The pinned manifest (or index) digest.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.digest
    }
}

impl TryFrom<String> for PinnedImage {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        parse(&text).map_err(|e| e.to_string())
    }
}

impl From<PinnedImage> for String {
    fn from(image: PinnedImage) -> Self {
        image.to_string()
    }
}

impl fmt::Display for PinnedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.digest)
    }
}

impl fmt::Debug for PinnedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text is not an accepted reference.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant's message is its documentation")]
pub enum ReferenceError {
    #[error("the image reference has {0} characters, more than {MAX_LENGTH}")]
    TooLong(usize),
    #[error("`{0}` is not pinned: expected host/repository@sha256:<64 hex digits>")]
    NotPinned(String),
    #[error("`{text}` is not a valid image reference: {why}")]
    Malformed { text: String, why: String },
}

/// Parses `host[:port]/repository@sha256:<64 hex>` and nothing else: no tag, no short name, no other digest, no IPv6
/// literal. An accepted text can also not be read as an option, a shell word or a systemd specifier.
///
/// # Errors
/// Says what is wrong with the text.
pub fn parse(text: &str) -> Result<PinnedImage, ReferenceError> {
    if text.len() > MAX_LENGTH {
        return Err(ReferenceError::TooLong(text.len()));
    }
    let malformed = |why: &str| ReferenceError::Malformed { text: printable(text, MAX_LENGTH), why: why.to_owned() };
    let (name, digest) = text.split_once('@').ok_or_else(|| ReferenceError::NotPinned(printable(text, MAX_LENGTH)))?;
    let digest =
        Digest::parse(digest).ok_or_else(|| malformed("the digest is not sha256:<64 lowercase hex digits>"))?;
    let (host, path) = name.split_once('/').ok_or_else(|| malformed("the registry host is missing"))?;
    if path.contains(':') {
        return Err(malformed("a tag beside a digest is refused by the host tools; leave the tag out"));
    }
    // containers/image treats a first component without dot, colon or "localhost" as a namespace of docker.io.
    if !(host.contains(['.', ':']) || host == "localhost") {
        return Err(malformed("the registry host must be spelt out"));
    }
    if !is_host(host) {
        return Err(malformed("the registry host is not a host name with an optional port"));
    }
    if !path.split('/').all(is_component) {
        return Err(malformed("the repository is not in lower case with single separators"));
    }
    let (host, path) = match host {
        "docker.io" | "index.docker.io" if !path.contains('/') => ("docker.io", format!("library/{path}")),
        "index.docker.io" => ("docker.io", path.to_owned()),
        _ => (host, path.to_owned()),
    };
    // Checked in the canonical spelling, so that an accepted reference is accepted again when it is read back.
    if path.len() > MAX_REPOSITORY {
        return Err(malformed("the repository's name is too long"));
    }
    Ok(PinnedImage { name: format!("{host}/{path}"), digest })
}

/// Whether `host` follows the specification's grammar. Not a regular expression, which takes 15 MiB while the process
/// runs.
fn is_host(host: &str) -> bool {
    let (name, port) = host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port)));
    let label = |label: &str| {
        label.starts_with(|c: char| c.is_ascii_alphanumeric())
            && label.ends_with(|c: char| c.is_ascii_alphanumeric())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let digits = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    name.split('.').all(label) && port.is_none_or(digits)
}

/// Whether `component` is runs of letters and digits with one dot, one or two underscores or any number of dashes between
/// them.
fn is_component(component: &str) -> bool {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separator = |between: &str| matches!(between, "." | "_" | "__") || between.bytes().all(|b| b == b'-');
    component.starts_with(word) && component.ends_with(word) && component.split(word).all(separator)
}

/// The name part of `host/repository[:tag][@digest]`.
#[must_use]
pub fn name_of(reference: &str) -> &str {
    let name = reference.split_once('@').map_or(reference, |(name, _)| name);
    match name.rsplit_once(':') {
        Some((before, after)) if !after.contains('/') && before.contains('/') => before,
        _ => name,
    }
}

/// `desiredImage` as the cluster wrote it, parsed when it is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Pullspec {
    text: String,
    image: Result<PinnedImage, ReferenceError>,
}

impl Pullspec {
    /// The text, as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The image that it names.
    ///
    /// # Errors
    /// Why the text is not an accepted reference.
    pub fn image(&self) -> Result<&PinnedImage, &ReferenceError> {
        self.image.as_ref()
    }
}

impl From<String> for Pullspec {
    fn from(text: String) -> Self {
        Self { image: parse(&text), text }
    }
}

impl From<Pullspec> for String {
    fn from(pullspec: Pullspec) -> Self {
        pullspec.text
    }
}

/// The facts in an image's manifest and config, all covered by the verified digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// The verified image.
    pub image: PinnedImage,
    /// The manifest of this machine's architecture: the pinned digest itself, or the index's instance.
    pub instance: Digest,
    /// The image config's architecture, by its OCI name.
    pub architecture: String,
    /// Whether the image has the label of a bootable ostree or bootc image.
    pub bootable: bool,
    /// The `machineconfig` label.
    pub rendered_config: Option<String>,
    /// The time of creation in the image's config, in milliseconds since the epoch; `None` if it has no usable one.
    #[serde(default)]
    pub created: Option<u64>,
    /// Compressed size of all layers, in bytes.
    pub size: u64,
    /// The policy scope whose requirements the signature met, e.g. `docker "quay.io/org"`.
    pub vouched_by: String,
}

/// Whether a deployment is `image`, by the manifest digest that the pull recorded: the image's own, or that of the
/// instance in the verified index. The reference counts only if no digest was recorded: an origin can be edited, but the
/// recorded digest is part of the commit.
#[must_use]
pub fn is_image(deployment: &Deployment, image: &PinnedImage, facts: Option<&ImageFacts>) -> bool {
    match &deployment.digest {
        Some(recorded) => {
            recorded == image.digest()
                || facts.is_some_and(|facts| facts.image == *image && *recorded == facts.instance)
        }
        None => is_named(deployment, image),
    }
}

/// Whether a deployment's reference names `image`. Until an index is verified, this is no proof that the deployment is
/// its instance.
#[must_use]
pub fn is_named(deployment: &Deployment, image: &PinnedImage) -> bool {
    deployment.reference.as_deref().and_then(|text| parse(text).ok()).is_some_and(|named| named == *image)
}

/// Whether a deployment is staged, is `image` without local changes, and can be booted by `backend`: it is not locked, or the
/// host tool can unlock it.
#[must_use]
pub fn is_staged(deployment: &Deployment, image: &PinnedImage, facts: Option<&ImageFacts>, backend: Backend) -> bool {
    let usable = !deployment.locked || backend.unlocks();
    deployment.staged && usable && !deployment.layered && is_image(deployment, image, facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn accepts_pinned_names_in_their_canonical_spelling() {
        for (text, name) in [
            ("quay.io/org/os", "quay.io/org/os"),
            ("127.0.0.1:5000/ns/os", "127.0.0.1:5000/ns/os"),
            ("localhost/os", "localhost/os"),
            ("image-registry.svc:5000/a/b/c-d_e/f", "image-registry.svc:5000/a/b/c-d_e/f"),
            ("docker.io/fedora", "docker.io/library/fedora"),
            ("index.docker.io/org/os", "docker.io/org/os"),
        ] {
            let image = parse(&format!("{text}@sha256:{HEX}")).unwrap();
            assert_eq!(image.name(), name);
            assert_eq!(image.to_string(), format!("{name}@sha256:{HEX}"));
            assert_eq!(parse(&image.to_string()).unwrap(), image);
        }
    }

    #[test]
    fn refuses_everything_else() {
        for text in [
            "quay.io/org/os".to_owned(),
            "quay.io/org/os:latest".to_owned(),
            format!("quay.io/org/os:latest@sha256:{HEX}"),
            format!("org/os@sha256:{HEX}"),
            format!("os@sha256:{HEX}"),
            format!("quay.io/Org/os@sha256:{HEX}"),
            format!("quay.io/org/os@sha256:{}", HEX.to_uppercase()),
            format!("quay.io/org/os@sha512:{HEX}{HEX}"),
            "quay.io/org/os@sha256:abc".to_owned(),
            format!("[::1]:5000/os@sha256:{HEX}"),
            format!("-quay.io/os@sha256:{HEX}"),
            format!("quay.io/$HOME/os@sha256:{HEX}"),
            format!("quay.io/%i/os@sha256:{HEX}"),
            format!("quay.io/org/os@sha256:{HEX}\n"),
            format!("docker://quay.io/org/os@sha256:{HEX}"),
            format!("quay.io//os@sha256:{HEX}"),
            format!("quay.io/{}@sha256:{HEX}", "a/".repeat(300)),
            format!("quay.io/{}@sha256:{HEX}", "a".repeat(MAX_REPOSITORY + 1)),
            // The canonical spelling has the prefix `library/`.
            format!("docker.io/{}@sha256:{HEX}", "a".repeat(MAX_REPOSITORY)),
            String::new(),
        ] {
            assert!(parse(&text).is_err(), "{text}");
        }
    }

    /// The specification's regular expression, and the additional rules of this module.
    fn by_the_specification(text: &str) -> bool {
        use ostree_ext::oci_spec::distribution::Reference;
        let pinned = text.split_once('@').and_then(|(name, digest)| Some((name, Digest::parse(digest)?)));
        // A first component that is not a host name would be read as a namespace of docker.io.
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':');
        let explicit = |host: &str| host.contains(['.', ':']) || host == "localhost";
        let hosted = |(host, _): (&str, &str)| explicit(host) && host.bytes().all(allowed);
        pinned.is_some_and(|(name, _)| name.split_once('/').is_some_and(hosted))
            && Reference::try_from(text).is_ok_and(|reference| reference.tag().is_none())
    }

    proptest::proptest! {
        #[test]
        fn agrees_with_the_specification_on_anything(name in "[a-cA-C0-9._:/@-]{0,16}") {
            let text = format!("{name}@sha256:{HEX}");
            proptest::prop_assert_eq!(parse(&text).is_ok(), by_the_specification(&text), "{}", text);
        }

        #[test]
        fn agrees_with_the_specification_on_what_is_nearly_right(
            name in "[a-cA0-9.-]{1,6}(\\.[a-c-]{0,3})?(:[0-9a]{0,4})?(/[a-b0-1]{1,2}([._-]{0,3}[a-bB0-1]{1,2}){0,3}){0,3}[:/-]?"
        ) {
            let text = format!("{name}@sha256:{HEX}");
            proptest::prop_assert_eq!(parse(&text).is_ok(), by_the_specification(&text), "{}", text);
        }
    }

    #[test]
    fn names_end_before_tag_and_digest() {
        assert_eq!(name_of("quay.io/o/i:t"), "quay.io/o/i");
        assert_eq!(name_of("host:5000/o/i"), "host:5000/o/i");
        assert_eq!(name_of("host:5000/o/i@sha256:00"), "host:5000/o/i");
    }

    #[test]
    fn digests_have_one_spelling() {
        let hex = "0a".repeat(32);
        assert_eq!(Digest::parse(&format!("sha256:{hex}")).unwrap().short(), "sha256:0a0a0a0a0a0a");
        for bad in
            [hex.clone(), format!("sha256:{}", hex.to_uppercase()), format!("sha256:{hex}0"), format!("sha512:{hex}")]
        {
            assert_eq!(Digest::parse(&bad), None, "{bad}");
        }
    }
}
