//! Image references as the host tools spell them. Pure.

use ostree_ext::container::{ImageReference, OstreeImageReference, SignatureSource, Transport};

use crate::model::PinnedImage;
pub use crate::model::{ReferenceError, name_of, parse};

/// The image part of a deployment's `container-image-reference`, without signature prefix and transport; `None` if the
/// image is not from a registry.
#[must_use]
pub fn of_deployment(text: &str) -> Option<String> {
    let reference = OstreeImageReference::try_from(text).ok()?;
    (reference.imgref.transport == Transport::Registry).then_some(reference.imgref.name)
}

/// The reference for the host tools, in the canonical spelling that they store.
///
/// ostree-ext refuses `ostree-image-signed:` if the policy's default is only `insecureAcceptAnything`, even for an image
/// whose own scope demands a signature. Stock OpenShift has that default. With the other prefix the pull still evaluates
/// the policy.
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
    fn prefixes_of_a_deployments_reference_are_removed() {
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
    }

    #[test]
    fn the_prefix_depends_on_the_policys_default() {
        let image = parse(&format!("quay.io/org/os@sha256:{HEX}")).unwrap();
        assert_eq!(to_pull(&image, true), format!("ostree-unverified-registry:{image}"));
        assert_eq!(to_pull(&image, false), format!("ostree-image-signed:docker://{image}"));
    }
}
