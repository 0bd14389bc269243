//! Signatures as cosign 2 attaches them: a "simple signing" document, signed, in an image of its own whose tag is
//! derived from the signed digest.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use openssl::base64::encode_block;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Private};
use openssl::rsa::Rsa;
use serde_json::{Map, Value, json};

use crate::image::{Blob, Manifest, Media, Pushed};
use crate::registry::Registry;

const PAYLOAD_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";

/// Kinds of keys that containers policies accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// ECDSA over NIST P-256: what cosign generates.
    P256,
    /// ECDSA over NIST P-384.
    P384,
    /// RSA of 2048 bits, PKCS #1 v1.5.
    Rsa2048,
    /// Ed25519.
    Ed25519,
}

impl KeyKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::P256, Self::P384, Self::Rsa2048, Self::Ed25519];
}

/// A private key that signs images.
#[derive(Clone, Debug)]
pub struct Signer {
    pub(crate) key: PKey<Private>,
}

impl Signer {
    /// A new key.
    pub fn generate(kind: KeyKind) -> Self {
        let ec = |curve| PKey::from_ec_key(EcKey::generate(&EcGroup::from_curve_name(curve).unwrap()).unwrap());
        let key = match kind {
            KeyKind::P256 => ec(Nid::X9_62_PRIME256V1),
            KeyKind::P384 => ec(Nid::SECP384R1),
            KeyKind::Rsa2048 => PKey::from_rsa(Rsa::generate(2048).unwrap()),
            KeyKind::Ed25519 => PKey::generate_ed25519(),
        };
        Self { key: key.unwrap() }
    }

    /// A key from the text of [`Signer::private_key_pem`].
    pub fn from_pem(pem: &str) -> Result<Self> {
        Ok(Self { key: PKey::private_key_from_pem(pem.as_bytes()).context("not a private key")? })
    }

    /// The private half.
    pub fn private_key_pem(&self) -> String {
        String::from_utf8(self.key.private_key_to_pem_pkcs8().unwrap()).unwrap()
    }

    /// The public half, for a policy's `keyData` (in base64) or `keyPath`.
    pub fn public_key_pem(&self) -> String {
        String::from_utf8(self.key.public_key_to_pem().unwrap()).unwrap()
    }

    /// Writes the public half to a file.
    pub fn write_public(&self, path: &Path) -> Result<()> {
        fs::write(path, self.public_key_pem()).with_context(|| format!("writing {}", path.display()))
    }

    /// A signature of these bytes: with SHA-256, except for Ed25519, which has its own hash.
    pub fn sign_bytes(&self, bytes: &[u8]) -> Vec<u8> {
        let signer = match self.key.id() {
            Id::ED25519 => openssl::sign::Signer::new_without_digest(&self.key),
            _ => openssl::sign::Signer::new(MessageDigest::sha256(), &self.key),
        };
        signer.unwrap().sign_oneshot_to_vec(bytes).unwrap()
    }
}

/// Signs the manifest or index of that digest in that repository of the registry. The identity is the reference in the
/// signature: `cosign sign` writes `host/repo`, podman and skopeo write `host/repo:tag`. Existing signatures stay.
pub async fn sign(registry: &Registry, digest: &str, repo: &str, identity: &str, signer: &Signer) -> Result<()> {
    sign_claiming(registry, digest, repo, identity, digest, signer).await
}

/// Signs the manifest that the image's reference names, an index or the only manifest, and every architecture's
/// manifest, as `cosign sign --recursive` does.
pub async fn sign_all(registry: &Registry, pushed: &Pushed, identity: &str, signer: &Signer) -> Result<()> {
    sign(registry, &pushed.digest, &pushed.repo, identity, signer).await?;
    for digest in pushed.instance_digests.values().filter(|digest| **digest != pushed.digest) {
        sign(registry, digest, &pushed.repo, identity, signer).await?;
    }
    Ok(())
}

/// Attaches a valid signature of another digest, `claimed_digest`, to `digest`.
pub async fn sign_claiming(
    registry: &Registry,
    digest: &str,
    repo: &str,
    identity: &str,
    claimed_digest: &str,
    signer: &Signer,
) -> Result<()> {
    let payload = payload(identity, claimed_digest);
    let signature = signer.sign_bytes(&payload);
    attach(registry, digest, repo, payload, &signature).await
}

/// Attaches a signature with a wrong last bit to `digest`.
pub async fn sign_badly(registry: &Registry, digest: &str, repo: &str, identity: &str, signer: &Signer) -> Result<()> {
    let payload = payload(identity, digest);
    let mut signature = signer.sign_bytes(&payload);
    *signature.last_mut().unwrap() ^= 1;
    attach(registry, digest, repo, payload, &signature).await
}

/// Removes all signatures of that digest.
pub async fn unsign(registry: &Registry, digest: &str, repo: &str) -> Result<()> {
    let attached = registry.manifest(repo, &signature_tag(digest)).await?.context("there is no signature")?;
    registry.delete_manifest(repo, &attached.digest).await
}

/// The tag of the signatures of a digest.
pub fn signature_tag(digest: &str) -> String {
    format!("{}.sig", digest.replace(':', "-"))
}

/// The signed document.
pub fn payload(identity: &str, digest: &str) -> Vec<u8> {
    json!({
        "critical": {
            "identity": { "docker-reference": identity },
            "image": { "docker-manifest-digest": digest },
            "type": "cosign container image signature",
        },
        "optional": null,
    })
    .to_string()
    .into_bytes()
}

/// Attaches arbitrary bytes as a signed document, and arbitrary bytes as its signature.
pub async fn attach(registry: &Registry, digest: &str, repo: &str, payload: Vec<u8>, signature: &[u8]) -> Result<()> {
    attach_annotated(registry, digest, repo, payload, signature, Map::new()).await
}

/// The same as [`attach`], with more data beside the signature, such as a certificate.
pub async fn attach_annotated(
    registry: &Registry,
    digest: &str,
    repo: &str,
    payload: Vec<u8>,
    signature: &[u8],
    mut annotations: Map<String, Value>,
) -> Result<()> {
    annotations.insert(SIGNATURE.into(), encode_block(signature).into());
    let tag = signature_tag(digest);
    let payload = Blob::new(payload);
    registry.put_blob(repo, &payload).await?;
    let mut layers = match registry.manifest(repo, &tag).await? {
        Some(attached) => layers(&attached)?,
        None => Vec::new(),
    };
    let mut layer = payload.descriptor(PAYLOAD_TYPE);
    layer["annotations"] = annotations.into();
    layers.push(layer);

    let diff_ids: Vec<_> = layers.iter().map(|layer| &layer["digest"]).collect();
    let config = json!({
        "architecture": "",
        "config": {},
        "created": "0001-01-01T00:00:00Z",
        "history": [],
        "os": "",
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = Blob::new(config.to_string().into_bytes());
    registry.put_blob(repo, &config).await?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": Media::Oci.manifest(),
        "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    });
    registry.put_manifest(repo, &tag, &Manifest::new(Media::Oci.manifest(), &manifest)).await
}

fn layers(manifest: &Manifest) -> Result<Vec<Value>> {
    let mut manifest: Value = serde_json::from_slice(&manifest.bytes)?;
    serde_json::from_value(manifest["layers"].take()).context("an attachment without layers")
}

/// Tests of the signatures with the real engine.
#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::path::PathBuf;
    use std::process::Stdio;
    use std::time::Duration;

    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt::ReceiveTimeout,
    };
    use nix::sys::time::{TimeVal, TimeValLike};
    use tempfile::TempDir;

    use super::*;
    use crate::image::ImageSpec;
    use crate::policy::{Identity, Policy, RegistriesConf, RegistriesD, Requirement};
    use crate::{registry, tools};

    const REPO: &str = "ns/os";
    const UNSIGNED: &str = "A signature was required, but no signature exists";

    /// A registry, and a node's configuration that trusts one key for all its images.
    struct Node {
        dir: TempDir,
        registry: Registry,
        signer: Signer,
    }

    impl Node {
        async fn new(kind: KeyKind) -> Self {
            let (dir, registry) = registry::testing::registry().await;
            let signer = Signer::generate(kind);
            signer.write_public(&dir.path().join("key.pub")).unwrap();
            let requirement = Requirement::sigstore_key_path(&dir.path().join("key.pub"));
            let attachments = RegistriesD::new().attachments(&registry.host(), true);
            attachments.write(&dir.path().join("registries.d/tests.yaml")).unwrap();
            RegistriesConf::new().write(&dir.path().join("registries.conf")).unwrap();
            let node = Self { dir, registry, signer };
            node.require(requirement.identity(&Identity::MatchRepository));
            node
        }

        fn require(&self, requirement: Requirement) {
            let policy = Policy::accept_by_default().scope(&self.registry.host(), [requirement]);
            policy.write(&self.dir.path().join("policy.json")).unwrap();
        }

        async fn push(&self, spec: &ImageSpec) -> Pushed {
            self.registry.push(REPO, "tag", spec).await.unwrap()
        }

        /// Signs with the trusted key and cosign's identity.
        async fn sign(&self, pushed: &Pushed) {
            sign(&self.registry, &pushed.digest, REPO, &pushed.repository(), &self.signer).await.unwrap();
        }

        fn skopeo(&self) -> PathBuf {
            tools::skopeo().unwrap()
        }

        /// `--registries-conf` is hidden, but both versions have it.
        fn options(&self) -> Vec<String> {
            ["policy", "policy.json", "registries.d", "registries.d", "registries-conf", "registries.conf"]
                .chunks(2)
                .map(|pair| format!("--{}={}", pair[0], self.dir.path().join(pair[1]).display()))
                .collect()
        }

        /// `skopeo copy`: the error text, if it failed.
        async fn copy(&self, pullspec: &str) -> Result<(), String> {
            let mut command = tokio::process::Command::new(self.skopeo());
            command.args(self.options()).arg("copy").arg("--quiet");
            command.arg(format!("--src-cert-dir={}", self.registry.cert_dir().display()));
            command.arg(format!("docker://{pullspec}"));
            let destination = tempfile::tempdir().unwrap();
            command.arg(format!("dir:{}", destination.path().display()));
            let done = tools::run_ok(command, Duration::from_secs(30)).await;
            done.map(drop).map_err(|error| error.to_string())
        }

        /// OpenImage through the image proxy: the error text, if it failed.
        fn open(&self, pullspec: &str) -> Result<(), String> {
            self.open_with(&self.skopeo(), pullspec)
        }

        fn open_with(&self, skopeo: &Path, pullspec: &str) -> Result<(), String> {
            let (ours, theirs) =
                socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
            setsockopt(&ours, ReceiveTimeout, &TimeVal::seconds(30)).unwrap();
            let mut child = tools::child(skopeo)
                .args(self.options())
                .args(["experimental-image-proxy", "--cert-dir"])
                .arg(self.registry.cert_dir())
                .env("HOME", self.dir.path())
                .stdin(Stdio::from(theirs))
                .spawn()
                .unwrap();
            let opened = call(&ours, "Initialize", json!([]))
                .and_then(|_| call(&ours, "OpenImage", json!([format!("docker://{pullspec}")])));
            child.kill().unwrap();
            child.wait().unwrap();
            opened.map(drop)
        }
    }

    /// One call of the proxy's protocol.
    fn call(socket: &OwnedFd, method: &str, args: Value) -> Result<Value, String> {
        let request = json!({ "method": method, "args": args }).to_string();
        send(socket.as_raw_fd(), request.as_bytes(), MsgFlags::empty()).unwrap();
        let mut buffer = vec![0; 64 * 1024];
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        let reply: Value = serde_json::from_slice(&buffer[..length]).unwrap();
        match reply["success"].as_bool() {
            Some(true) => Ok(reply["value"].clone()),
            _ => Err(reply["error"].as_str().unwrap().to_string()),
        }
    }

    #[tokio::test]
    async fn every_kind_of_key_is_accepted_and_another_key_is_not() {
        for kind in KeyKind::ALL {
            let node = Node::new(kind).await;
            let pushed = node.push(&ImageSpec::default()).await;
            assert_eq!(node.open(&pushed.pullspec()).unwrap_err(), UNSIGNED, "{kind:?}");
            let other = Signer::generate(kind);
            sign(&node.registry, &pushed.digest, REPO, &pushed.repository(), &other).await.unwrap();
            let refusal = node.open(&pushed.pullspec()).unwrap_err();
            assert!(refusal.starts_with("cryptographic signature verification failed"), "{kind:?}: {refusal}");
            node.sign(&pushed).await;
            node.open(&pushed.pullspec()).unwrap_or_else(|refusal| panic!("{kind:?}: {refusal}"));
            node.copy(&pushed.pullspec()).await.unwrap_or_else(|refusal| panic!("{kind:?}: {refusal}"));
        }
    }

    #[tokio::test]
    async fn policy_may_hold_several_inline_keys() {
        let node = Node::new(KeyKind::P256).await;
        let pushed = node.push(&ImageSpec::default()).await;
        node.sign(&pushed).await;
        let pem = node.signer.public_key_pem();
        node.require(Requirement::sigstore_key_data(&pem).identity(&Identity::MatchRepository));
        node.open(&pushed.pullspec()).unwrap();
        let other = node.dir.path().join("other.pub");
        Signer::generate(KeyKind::Ed25519).write_public(&other).unwrap();
        let paths = [other.as_path(), &node.dir.path().join("key.pub")];
        node.require(Requirement::sigstore_key_paths(paths).identity(&Identity::MatchRepository));
        node.open(&pushed.pullspec()).unwrap();
        node.require(Requirement::reject());
        assert!(node.open(&pushed.pullspec()).unwrap_err().ends_with("is rejected by policy."));
    }

    #[tokio::test]
    async fn signed_identity_must_match() {
        let node = Node::new(KeyKind::P256).await;
        let pushed = node.push(&ImageSpec::default()).await;
        sign(&node.registry, &pushed.digest, REPO, "a.example/os", &node.signer).await.unwrap();
        let refusal = node.open(&pushed.pullspec()).unwrap_err();
        assert_eq!(refusal, "Signature for identity \"a.example/os\" is not accepted");

        unsign(&node.registry, &pushed.digest, REPO).await.unwrap();
        assert_eq!(node.open(&pushed.pullspec()).unwrap_err(), UNSIGNED);

        // The default rule needs a tag, which cosign's identity does not have.
        node.require(Requirement::sigstore_key_path(&node.dir.path().join("key.pub")));
        node.sign(&pushed).await;
        assert!(node.open(&pushed.pullspec()).unwrap_err().ends_with("is not accepted"));
        let tagged = format!("{}:tag", pushed.repository());
        sign(&node.registry, &pushed.digest, REPO, &tagged, &node.signer).await.unwrap();
        node.open(&pushed.pullspec()).unwrap();
    }

    #[tokio::test]
    async fn signature_covers_one_digest_and_must_be_intact() {
        let node = Node::new(KeyKind::P256).await;
        let pushed = node.push(&ImageSpec::new("1")).await;
        let identity = pushed.repository();
        let other = node.push(&ImageSpec::new("2")).await.digest;
        sign_claiming(&node.registry, &pushed.digest, REPO, &identity, &other, &node.signer).await.unwrap();
        let refusal = node.open(&pushed.pullspec()).unwrap_err();
        assert_eq!(refusal, format!("Signature for digest {other} does not match"));

        unsign(&node.registry, &pushed.digest, REPO).await.unwrap();
        sign_badly(&node.registry, &pushed.digest, REPO, &identity, &node.signer).await.unwrap();
        let refusal = node.open(&pushed.pullspec()).unwrap_err();
        assert!(refusal.starts_with("cryptographic signature verification failed"), "{refusal}");
    }

    /// The proxy needs a signed index, a copy needs a signed instance.
    #[tokio::test]
    async fn index_and_instances_are_signed_separately() {
        let node = Node::new(KeyKind::P256).await;
        let pushed = node.push(&ImageSpec::default().index()).await;
        node.sign(&pushed).await;
        node.open(&pushed.pullspec()).unwrap();
        assert!(node.copy(&pushed.pullspec()).await.unwrap_err().contains(UNSIGNED));
        sign_all(&node.registry, &pushed, &pushed.repository(), &node.signer).await.unwrap();
        node.copy(&pushed.pullspec()).await.unwrap();
    }

    #[tokio::test]
    async fn signature_attachments_must_be_enabled() {
        let node = Node::new(KeyKind::P256).await;
        let pushed = node.push(&ImageSpec::default()).await;
        node.sign(&pushed).await;
        RegistriesD::new().write(&node.dir.path().join("registries.d/tests.yaml")).unwrap();
        assert_eq!(node.open(&pushed.pullspec()).unwrap_err(), UNSIGNED);
    }

    /// The reason for the agent's check of the proxy's version: this one opens an image that the policy rejects.
    #[tokio::test]
    async fn old_proxy_evaluates_no_policy() {
        let node = Node::new(KeyKind::P256).await;
        let pushed = node.push(&ImageSpec::default()).await;
        node.require(Requirement::reject());
        let Some(old) = tools::unenforcing_skopeo() else {
            panic!("no skopeo that evaluates no policy: run tests/support/install (on a Debian)");
        };
        node.open_with(&old, &pushed.pullspec()).unwrap();
        node.open(&pushed.pullspec()).unwrap_err();
    }
}
