//! Errors that name the faulty party: a mirror, the source, the place of the signature, the image, or the node's own
//! configuration. They are checked with the real engine, whose texts `src/registry/engine_text.rs` parses.

use serde_json::json;
use support::hostile_registry::{HostileRegistry, Place, Trick};
use support::image::{Blob, Manifest, Media};
use support::policy::RegistriesConf;

use super::*;

/// A source that does not answer.
const CLOSED: &str = "127.0.0.1:1/team/os";

/// The engine with a `registries.conf` of its own, which the agent also reads to name the mirrors.
fn configured(node: &Node) -> (PathBuf, PathBuf) {
    let conf = node.path("root/etc/containers/registries.conf");
    fs::create_dir_all(conf.parent().unwrap()).unwrap();
    let engine = node.engine("configured", &format!("exec $REAL --registries-conf {} \"$@\"", conf.display()));
    (engine, conf)
}

/// A `registries.conf` with one mirror.
fn mirrored(mirror: &str, blocked: bool) -> String {
    let toml = RegistriesConf::new().mirrors(CLOSED, [mirror]).to_toml();
    if blocked { toml.replace("[[registry.mirror]]", "blocked = true\n[[registry.mirror]]") } else { toml }
}

#[tokio::test]
async fn mirrors_error_counts_when_the_source_gives_none() {
    let node = Node::with(Some(Credentials::PULLER)).await;
    let pushed = node.signed().await;
    let (mirror, spec) = (pushed.repository(), format!("{CLOSED}@{}", pushed.digest));
    let (engine, conf) = configured(&node);
    let env = [("REBASE_AGENT_SKOPEO", text(&engine))];
    node.policy(&Policy::new([node.requirement()]));
    for blocked in [false, true] {
        fs::write(&conf, mirrored(&mirror, blocked)).unwrap();
        let outcome = node.verify_with(&spec, &env).await;
        let said = outcome.refused(Reason::RegistryDenied);
        assert!(said.contains(&format!("the mirror {mirror} refuses to serve {spec}: ")), "{said}");
        assert!(said.contains("it was asked without credentials"), "{said}");
        let outcome = node.verify_with(&spec, &[env[0], ("REBASE_AGENT_CERT_DIR", "")]).await;
        let said = outcome.refused(Reason::RegistryUntrusted);
        assert!(
            said.starts_with(&format!("the mirror {mirror} serves ")) && said.contains("unknown authority"),
            "{said}"
        );
    }
    let auth = node.path("root/etc/ostree/auth.json");
    fs::create_dir_all(auth.parent().unwrap()).unwrap();
    fs::write(&auth, Credentials::PULLER.auth_file(&node.registry.host()).to_string()).unwrap();
    let zeros = format!("{CLOSED}@sha256:{}", "0".repeat(64));
    let outcome = node.verify_with(&zeros, &env).await;
    let said = outcome.refused(Reason::ManifestMissing);
    assert!(said.contains(&format!("the mirror {mirror} has no manifest {zeros}")), "{said}");
}

/// The place, the kind and the level of a missing signature, none of which the engine reports.
#[tokio::test]
async fn missing_signature_error_names_place_kind_and_level() {
    let node = Node::new().await;
    let source = Registry::start(&node.path("source"), node.tls.clone()).await.unwrap();
    let ca = node.path("ca");
    fs::create_dir(&ca).unwrap();
    fs::write(ca.join("ca.crt"), &node.tls.ca_pem).unwrap();
    let (engine, conf) = configured(&node);
    let mut env = vec![("REBASE_AGENT_SKOPEO", text(&engine)), ("REBASE_AGENT_CERT_DIR", text(&ca))];
    let both = RegistriesD::new().attachments(&node.registry.host(), true).attachments(&source.host(), true);
    node.attachments(&both);
    let exact = Identity::ExactRepository("build.example/os".to_owned());
    let sigstore = Requirement::sigstore_key_path(&node.key()).identity(&exact);
    node.policy(&Policy::new([sigstore.clone()]));

    // The image is signed at its source; the mirror serves it without the signature.
    RegistriesConf::new().write(&conf).unwrap();
    let spec = ImageSpec::new("mirrored");
    let pushed = source.push(REPO, "tag", &spec).await.unwrap();
    sign(&source, &pushed.digest, REPO, "build.example/os", &node.signer).await.unwrap();
    node.verify_with(&pushed.pullspec(), &env).await.facts();
    let mirror = format!("{}/{REPO}", node.registry.host());
    RegistriesConf::new().mirrors(&pushed.repository(), [mirror.as_str()]).write(&conf).unwrap();
    // The mirror does not have the image yet.
    node.verify_with(&pushed.pullspec(), &env).await.facts();
    let copied = node.push(&spec).await;
    assert_eq!(copied.digest, pushed.digest);
    let outcome = node.verify_with(&pushed.pullspec(), &env).await;
    let said = outcome.refused(Reason::SignatureMissing);
    assert!(said.contains(&format!("read from the mirror {mirror}; no sigstore signature is attached")), "{said}");
    assert!(said.contains("does not count for it"), "{said}");
    // The image is signed nowhere and is not in the mirror.
    let other = source.push(REPO, "other", &ImageSpec::new("other")).await.unwrap();
    let outcome = node.verify_with(&other.pullspec(), &env).await;
    let said = outcome.refused(Reason::SignatureMissing);
    assert!(said.contains(&format!("read from the registry {}, as no mirror", other.repository())), "{said}");
    // The image is signed in the mirror, where attachments are not enabled.
    sign(&node.registry, &pushed.digest, REPO, "build.example/os", &node.signer).await.unwrap();
    node.attachments(&RegistriesD::new().attachments(&source.host(), true));
    let outcome = node.verify_with(&pushed.pullspec(), &env).await;
    let said = outcome.refused(Reason::SignatureMissing);
    assert!(
        said.contains(&format!("the mirror {mirror}; the sigstore signature that is attached there is not")),
        "{said}"
    );
    node.attachments(&both);
    node.verify_with(&pushed.pullspec(), &env).await.facts();

    // An index: unsigned, with a signed instance, and signed itself.
    let pushed = node.push(&ImageSpec::new("index").architectures([support::image::host_architecture()]).index()).await;
    let instance = &pushed.instance_digests[support::image::host_architecture()];
    let outcome = node.verify_with(&pushed.pullspec(), &env).await;
    assert!(outcome.refused(Reason::SignatureMissing).contains("this is an index, which needs"), "{outcome:?}");
    sign(&node.registry, instance, REPO, "build.example/os", &node.signer).await.unwrap();
    let outcome = node.verify_with(&pushed.pullspec(), &env).await;
    let said = outcome.refused(Reason::SignatureMissing);
    assert!(said.contains(&format!("only this machine's instance {instance} is signed")), "{said}");
    support::sign::unsign(&node.registry, instance, REPO).await.unwrap();
    sign(&node.registry, &pushed.digest, REPO, "build.example/os", &node.signer).await.unwrap();
    node.verify_with(&pushed.pullspec(), &env).await.facts();
    let own = pushed.instance_pullspec(support::image::host_architecture());
    let outcome = node.verify_with(&own, &env).await;
    let said = outcome.refused(Reason::SignatureMissing);
    assert!(said.contains("a signature of an index that has this image does not count"), "{said}");

    // A rule that requires a GnuPG signature.
    let signer = support::gpg::GpgSigner::generate().unwrap();
    signer.write_public(&node.path("os.gpg")).unwrap();
    node.policy(&Policy::new([Requirement::gpg_key_path(&node.path("os.gpg")).identity(&exact)]));
    let scratch = node.path("scratch");
    fs::create_dir(&scratch).unwrap();
    env.push(("REBASE_AGENT_SCRATCH", text(&scratch)));
    let outcome = node.verify_with(&copied.pullspec(), &env).await;
    let said = outcome.refused(Reason::SignatureMissing);
    assert!(said.contains(&format!("read from the registry {mirror}; the rule asks for a GPG")), "{said}");
    assert!(said.contains("lookaside") && !said.contains("cosign"), "{said}");
}

#[tokio::test]
async fn error_names_the_nodes_own_configuration() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let spec = pushed.pullspec();
    let (engine, conf) = configured(&node);
    let env = [("REBASE_AGENT_SKOPEO", text(&engine))];
    let mirrors = RegistriesConf::new().mirrors(&pushed.repository(), ["m.example/os"]).to_toml();
    for (toml, why) in [
        (RegistriesConf::new().blocked(&pushed.repository()).to_toml(), "is blocked in"),
        ("[[registry]\nprefix = \n".to_owned(), "line 2"),
        (format!("[registries.search]\nregistries = []\n{mirrors}"), "mixing sysregistry v1/v2"),
        (format!("{mirrors}pull-from-mirror = \"sometimes\"\n"), "pull-from-mirror value \"sometimes\""),
        (mirrors.replace("m.example", "https://m.example"), "URI schemes are not supported"),
        ("unqualified-search-registries = 1\n".to_owned(), "unqualified-search-registries"),
    ] {
        fs::write(&conf, &toml).unwrap();
        let outcome = node.verify_with(&spec, &env).await;
        let said = outcome.refused(Reason::RegistryConfigInvalid);
        assert!(
            said.contains(why) && said.contains(text(&conf)) && !said.contains("sysregistriesv2"),
            "{toml}: {said}"
        );
    }
    fs::remove_file(&conf).unwrap();
    let attached = "docker:\n  a.example:\n    use-sigstore-attachments: true\n";
    for (files, why) in [
        ([("a.yaml", attached), ("b.yaml", attached)], "defined both in"),
        ([("a.yaml", "docker:\n\ta.example:\n"), ("b.yaml", "")], "a.yaml: yaml: line 2"),
        ([("a.yaml", "docker: []\n"), ("b.yaml", "")], "a.yaml: yaml"),
    ] {
        for (name, yaml) in files {
            fs::write(node.path("registries.d").join(name), yaml).unwrap();
        }
        let outcome = node.verify(&spec).await;
        let said = outcome.refused(Reason::RegistryConfigInvalid);
        assert!(said.contains(why) && said.contains("registries.d/a.yaml"), "{said}");
    }
}

/// Documents that are not OS images, even with a valid signature.
#[tokio::test]
async fn artifacts_are_reported_and_images_without_history_pass() {
    let node = Node::new().await;
    let host = node.registry.host();
    let put = async |manifest: &Manifest| {
        node.registry.put_manifest(REPO, &manifest.digest, manifest).await.unwrap();
        sign(&node.registry, &manifest.digest, REPO, &format!("{host}/{REPO}"), &node.signer).await.unwrap();
        format!("{host}/{REPO}@{}", manifest.digest)
    };
    let (layer, empty) = (Blob::new(b"layer".to_vec()), Blob::new(b"{}".to_vec()));
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Labels": { "ostree.bootable": "1", "machineconfig": "rendered-worker-1" } },
        "rootfs": { "type": "layers", "diff_ids": [] },
    });
    let config = Blob::new(config.to_string().into_bytes());
    for blob in [&layer, &empty, &config] {
        node.registry.put_blob(REPO, blob).await.unwrap();
    }
    let manifest = |config: serde_json::Value| {
        let layers = [layer.descriptor("application/vnd.oci.image.layer.v1.tar")];
        let media = Media::Oci.manifest();
        Manifest::new(media, &json!({ "schemaVersion": 2, "mediaType": media, "config": config, "layers": layers }))
    };
    let artifact = manifest(empty.descriptor("application/vnd.cncf.helm.config.v1+json"));
    let outcome = node.verify(&put(&artifact).await).await;
    let said = outcome.refused(Reason::ImageInvalid);
    assert!(said.contains("an artifact of type") && said.contains("helm"), "{said}");

    let inner = node.push(&ImageSpec::default().index()).await;
    let bytes = node.registry.manifest(REPO, &inner.digest).await.unwrap().unwrap().bytes;
    let media = Media::Oci.index();
    let platform = json!({ "architecture": support::image::host_architecture(), "os": "linux" });
    let entry = json!({ "mediaType": media, "digest": inner.digest, "size": bytes.len(), "platform": platform });
    let nested = Manifest::new(media, &json!({ "schemaVersion": 2, "mediaType": media, "manifests": [entry] }));
    let outcome = node.verify(&put(&nested).await).await;
    assert!(outcome.refused(Reason::ImageInvalid).contains("an index within an index"), "{outcome:?}");

    let minimal = manifest(config.descriptor("application/vnd.oci.image.config.v1+json"));
    let facts = node.verify(&put(&minimal).await).await.facts();
    assert!(facts.bootable && facts.rendered_config.as_deref() == Some("rendered-worker-1"), "{facts:?}");
}

/// Registries' errors about the image, its signature or its config, in their known formats.
#[tokio::test]
async fn errors_name_the_missing_or_denied_resource() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let identity = Identity::ExactRepository(pushed.repository());
    node.policy(&Policy::new([Requirement::sigstore_key_path(&node.key()).identity(&identity)]));
    fs::write(node.path("registries.d/default.yaml"), "default-docker:\n  use-sigstore-attachments: true\n").unwrap();
    let harbor = format!("artifact {REPO}@{} not found", pushed.digest);
    let error = |status, code, message: &str| Trick::Error(status, code, message.to_owned());
    for (place, trick, reason, why) in [
        (Place::Manifest, error(404, "NOT_FOUND", &harbor), Reason::ManifestMissing, "has no manifest"),
        (Place::Manifest, Trick::Page(404, "<html>"), Reason::ManifestMissing, "has no manifest"),
        (Place::Manifest, Trick::Page(403, "<html>"), Reason::RegistryDenied, "refuses to serve 127"),
        (Place::Manifest, Trick::Inflate, Reason::ImageInvalid, "larger than the 4 MiB"),
        (Place::Signature, error(401, "UNAUTHORIZED", "x"), Reason::RegistryDenied, "serve the signature of"),
        (Place::Signature, error(403, "DENIED", "x"), Reason::RegistryDenied, "serve the signature of"),
        (Place::Signature, Trick::Page(403, "<html>"), Reason::RegistryDenied, "serve the signature of"),
        (Place::Payload, error(403, "DENIED", "x"), Reason::RegistryDenied, "serve the signature of"),
        (Place::Config, error(404, "BLOB_UNKNOWN", "x"), Reason::ImageInvalid, "its config is not in the registry"),
        (Place::Config, Trick::Page(404, "<html>"), Reason::ImageInvalid, "its config is not in the registry"),
        (Place::Config, error(403, "DENIED", "x"), Reason::RegistryDenied, "refuses to serve 127"),
        (Place::Config, Trick::Inflate, Reason::ImageInvalid, "its config is larger"),
    ] {
        let shown = format!("{place:?} {trick:?}");
        let hostile = HostileRegistry::start(&node.tls, &node.registry.host(), place, trick).await.unwrap();
        let outcome = node.verify(&format!("{}/{REPO}@{}", hostile.host(), pushed.digest)).await;
        let said = outcome.refused(reason);
        assert!(said.contains(why), "{shown}: {said}");
    }
}

/// The identity in a signature, as the engine prints it, and the hint for it.
#[tokio::test]
async fn identity_mismatch_comes_with_a_hint() {
    let node = Node::new().await;
    let pushed = node.push(&ImageSpec::default()).await;
    let (own, host) = (pushed.repository(), node.registry.host());
    let copied = "build.example/team/os:1".to_owned();
    let remap = Identity::RemapIdentity { prefix: host.clone(), signed_prefix: "s.example".to_owned() };
    for (identity, rule, hint) in [
        (own.clone(), Identity::MatchRepoDigestOrExact, "matchRepository"),
        (format!("s.example/{REPO}"), remap, "remapIdentity needs one"),
        (own.clone(), Identity::ExactReference(format!("{own}:v1")), "accepts only the identity"),
        (own.clone(), Identity::ExactRepository("q.example/os".to_owned()), "accepts only signatures for q.example/os"),
        (copied, Identity::MatchRepository, "this is a copy"),
        (format!("{own}:tag"), Identity::MatchExact, "matchExact never accepts a reference by digest"),
    ] {
        // The first round has no signature to remove.
        let _ = support::sign::unsign(&node.registry, &pushed.digest, REPO).await;
        node.sign_as(&pushed, &identity, &node.signer).await;
        node.require([Requirement::sigstore_key_path(&node.key()).identity(&rule)]);
        let outcome = node.verify(&pushed.pullspec()).await;
        let said = outcome.refused(Reason::SignatureRejected);
        assert!(said.contains(hint), "{identity} {rule:?}: {said}");
    }
}

#[tokio::test]
async fn scope_that_does_not_match_is_named() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    for scope in [
        format!("docker://{}", pushed.host),
        format!("{}:tag", pushed.repository()),
        format!("{}/", pushed.host),
        format!("{}/NS", pushed.host),
    ] {
        for (policy, reason) in [
            (Policy::reject_by_default(), Reason::PolicyRejects),
            (Policy::accept_by_default(), Reason::PolicyAcceptsAnything),
        ] {
            node.policy(&policy.scope(&scope, [node.requirement()]));
            let outcome = node.verify(&pushed.pullspec()).await;
            let said = outcome.refused(reason);
            assert!(said.contains(&format!("; the scope {scope} is similar but does not apply")), "{said}");
        }
    }
}
