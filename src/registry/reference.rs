//! Image references: the desired one, which must be pinned, and those that the host reports. Pure.

use ostree_ext::container::{ImageReference, OstreeImageReference, SignatureSource, Transport};

use crate::model::{Digest, PinnedImage, printable};

/// Longest reference accepted. MCO's own admission stops at 447 characters before the digest.
const MAX_LENGTH: usize = 520;
/// Longest repository, without its host.
const MAX_REPOSITORY: usize = 255;

/// Why a text is no reference that may be followed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// Longer than any real one.
    #[error("the image reference has {0} characters, more than {MAX_LENGTH}")]
    TooLong(usize),
    /// No `@sha256:`.
    #[error("`{0}` is not pinned: expected host/repository@sha256:<64 hex digits>")]
    NotPinned(String),
    /// Outside the grammar.
    #[error("`{text}` is not a valid image reference: {why}")]
    Malformed {
        /// The text, made printable.
        text: String,
        /// What is wrong with it.
        why: String,
    },
}

/// Parses `host[:port]/repository@sha256:<64 hex>` and nothing else: no tag, no short name, no other digest, no IPv6
/// literal. What passes cannot be read as an option, a shell word or a systemd specifier either.
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
    // containers/image takes a first component without dot, colon or "localhost" for a docker.io namespace.
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
    // As it is spelt in full: what is accepted must be accepted when it is read back.
    if path.len() > MAX_REPOSITORY {
        return Err(malformed("the repository's name is too long"));
    }
    Ok(PinnedImage::new(format!("{host}/{path}"), digest))
}

/// The specification's own grammar, without the regular expression for it: compiled, that takes 15 MiB for as long as
/// the process lives.
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

/// Runs of letters and digits, with one dot, up to two underscores or any number of dashes between them.
fn is_component(component: &str) -> bool {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separator = |between: &str| matches!(between, "." | "_" | "__") || between.bytes().all(|b| b == b'-');
    component.starts_with(word) && component.ends_with(word) && component.split(word).all(separator)
}

/// The image part of a deployment's `container-image-reference`, without signature prefix and transport; `None` for
/// what does not come from a registry.
#[must_use]
pub fn of_deployment(text: &str) -> Option<String> {
    let reference = OstreeImageReference::try_from(text).ok()?;
    (reference.imgref.transport == Transport::Registry).then_some(reference.imgref.name)
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

/// The reference to hand to the host tools, in the canonical spelling that they store.
///
/// `ostree-image-signed:` is refused by ostree-ext wherever the policy's global default is a lone
/// `insecureAcceptAnything`, even for an image whose own scope demands a signature and gets it; stock OpenShift has
/// that default. The other prefix still has the policy evaluated at the pull.
#[must_use]
pub fn to_pull(image: &PinnedImage, default_is_insecure: bool) -> String {
    let sigverify = if default_is_insecure {
        SignatureSource::ContainerPolicyAllowInsecure
    } else {
        SignatureSource::ContainerPolicy
    };
    let imgref = ImageReference { transport: Transport::Registry, name: image.to_string() };
    OstreeImageReference { sigverify, imgref }.to_string()
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
            // Spelt in full, it has `library/` before it.
            format!("docker.io/{}@sha256:{HEX}", "a".repeat(MAX_REPOSITORY)),
            String::new(),
        ] {
            assert!(parse(&text).is_err(), "{text}");
        }
    }

    /// The specification's expression, and the further rules of this module.
    fn by_the_specification(text: &str) -> bool {
        use ostree_ext::oci_spec::distribution::Reference;
        let pinned = text.split_once('@').and_then(|(name, digest)| Some((name, Digest::parse(digest)?)));
        // What is no host name would be read as a namespace of docker.io.
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
    fn strips_what_the_host_puts_before_a_reference() {
        for (text, expected) in [
            ("ostree-unverified-registry:quay.io/o/i:t", Some("quay.io/o/i:t")),
            ("ostree-image-signed:docker://quay.io/o/i@sha256:00", Some("quay.io/o/i@sha256:00")),
            ("ostree-unverified-image:docker://quay.io/o/i", Some("quay.io/o/i")),
            ("ostree-remote-registry:fedora:quay.io/o/i", Some("quay.io/o/i")),
            ("ostree-unverified-image:oci:/var/x", None),
            ("fedora:fedora/stable", None),
        ] {
            assert_eq!(of_deployment(text).as_deref(), expected, "{text}");
        }
        assert_eq!(name_of("quay.io/o/i:t"), "quay.io/o/i");
        assert_eq!(name_of("host:5000/o/i"), "host:5000/o/i");
        assert_eq!(name_of("host:5000/o/i@sha256:00"), "host:5000/o/i");
    }

    #[test]
    fn the_prefix_follows_the_global_default() {
        let image = parse(&format!("quay.io/org/os@sha256:{HEX}")).unwrap();
        assert_eq!(to_pull(&image, true), format!("ostree-unverified-registry:{image}"));
        assert_eq!(to_pull(&image, false), format!("ostree-image-signed:docker://{image}"));
    }
}
