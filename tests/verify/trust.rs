//! Requirements of a policy, and images that meet or break them.

use std::os::unix::fs::PermissionsExt;

use openssl::base64::encode_block;
use serde_json::json;
use support::gpg::GpgSigner;
use support::image::{Blob, Manifest, Media, host_architecture};
use support::sign::{sign_all, sign_badly, sign_claiming, unsign};
use support::sigstore::{Authority, Leaf, Log, sign_certified, sign_keyed};

use super::*;

#[tokio::test]
async fn signed_image_yields_its_facts() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let facts = node.verify(&pushed.pullspec()).await.facts();
    assert_eq!(facts.image.to_string(), pushed.pullspec());
    assert_eq!(facts.instance.as_str(), pushed.digest);
    assert_eq!(facts.architecture, host_architecture());
    assert_eq!(facts.rendered_config.as_deref(), Some("rendered-worker-1"));
    assert_eq!(facts.vouched_by, format!("docker \"{}\"", node.registry.host()));
    assert!(facts.bootable && facts.size > 0, "{facts:?}");

    let spec = ImageSpec::new("2").not_bootable().architectures(["s390x"]).media(Media::Docker2);
    let pushed = node.push(&spec).await;
    node.sign(&pushed).await;
    let facts = node.verify(&pushed.pullspec()).await.facts();
    assert_eq!((facts.architecture.as_str(), facts.bootable, facts.rendered_config), ("s390x", false, None));
    assert_eq!(facts.instance.as_str(), pushed.digest);

    // A signed image can still contain text that is unsafe to print.
    let odd = node.push(&ImageSpec::new("3").architectures(["a\n\u{1b}[2J"]).rendered_config("r\n\u{1b}")).await;
    node.sign(&odd).await;
    let facts = node.verify(&odd.pullspec()).await.facts();
    assert_eq!(facts.architecture, "a \\u{1b}[2J");
    assert_eq!(facts.rendered_config.as_deref(), Some("r \\u{1b}"));
}

#[tokio::test]
async fn refusals_have_different_reasons() {
    let node = Node::new().await;
    let pushed = node.push(&ImageSpec::default()).await;
    let spec = pushed.pullspec();
    let identity = pushed.repository();
    let message = |outcome: Outcome, reason| outcome.refused(reason).to_owned();

    let said = message(node.verify(&spec).await, Reason::SignatureMissing);
    assert!(said.contains(&spec) && said.contains("--new-bundle-format=false"), "{said}");

    node.sign_as(&pushed, &identity, &Signer::generate(KeyKind::P256)).await;
    let said = message(node.verify(&spec).await, Reason::SignatureRejected);
    assert!(said.contains("cryptographic signature verification failed"), "{said}");
    sign_badly(&node.registry, &pushed.digest, REPO, &identity, &node.signer).await.unwrap();
    let said = message(node.verify(&spec).await, Reason::SignatureRejected);
    assert!(said.contains("None of the signatures were accepted"), "{said}");
    node.sign(&pushed).await;
    node.verify(&spec).await.facts();

    unsign(&node.registry, &pushed.digest, REPO).await.unwrap();
    let other = node.push(&ImageSpec::new("other")).await.digest;
    sign_claiming(&node.registry, &pushed.digest, REPO, &identity, &other, &node.signer).await.unwrap();
    let said = message(node.verify(&spec).await, Reason::SignatureRejected);
    assert!(said.contains(&format!("Signature for digest {other} does not match")), "{said}");

    node.require([Requirement::reject()]);
    let said = message(node.verify(&spec).await, Reason::PolicyRejects);
    assert!(said.contains("policy.json") && said.contains(&node.registry.host()), "{said}");
    node.require([Requirement::accept()]);
    let said = message(node.verify(&spec).await, Reason::PolicyAcceptsAnything);
    assert!(said.contains("ClusterImagePolicy"), "{said}");
    node.policy(&Policy::accept_by_default());
    message(node.verify(&spec).await, Reason::PolicyAcceptsAnything);
    node.policy(&Policy::reject_by_default());
    message(node.verify(&spec).await, Reason::PolicyRejects);
}

/// The engine ignores cosign 3's default attachments, and all attachments while they are not enabled.
#[tokio::test]
async fn signatures_that_the_engine_ignores_cause_a_hint() {
    let node = Node::new().await;
    let pushed = node.push(&ImageSpec::default()).await;
    let bundle = Blob::new(br#"{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json"}"#.to_vec());
    let empty = Blob::new(b"{}".to_vec());
    for blob in [&bundle, &empty] {
        node.registry.put_blob(REPO, blob).await.unwrap();
    }
    let artifact = Manifest::new(
        Media::Oci.manifest(),
        &json!({
            "schemaVersion": 2,
            "mediaType": Media::Oci.manifest(),
            "artifactType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "config": empty.descriptor("application/vnd.oci.empty.v1+json"),
            "layers": [bundle.descriptor("application/vnd.dev.sigstore.bundle.v0.3+json")],
            "subject": { "mediaType": Media::Oci.manifest(), "digest": pushed.digest, "size": 1 },
        }),
    );
    node.registry.put_manifest(REPO, &artifact.digest, &artifact).await.unwrap();
    let descriptor = json!({
        "mediaType": artifact.media_type, "digest": artifact.digest, "size": artifact.bytes.len(),
    });
    let index = json!({ "schemaVersion": 2, "mediaType": Media::Oci.index(), "manifests": [descriptor] });
    let referrers = Manifest::new(Media::Oci.index(), &index);
    node.registry.put_manifest(REPO, &pushed.digest.replace(':', "-"), &referrers).await.unwrap();
    let outcome = node.verify(&pushed.pullspec()).await;
    let said = outcome.refused(Reason::SignatureMissing);
    assert!(said.contains("cosign 3: with --new-bundle-format=false"), "{said}");

    node.sign(&pushed).await;
    node.attachments(&RegistriesD::new().attachments(&node.registry.host(), false));
    let outcome = node.verify(&pushed.pullspec()).await;
    let said = outcome.refused(Reason::SignatureMissing);
    assert!(said.contains("enable use-sigstore-attachments for that place in registries.d"), "{said}");
    fs::remove_dir_all(node.path("registries.d")).unwrap();
    node.verify(&pushed.pullspec()).await.refused(Reason::SignatureMissing);
}

#[tokio::test]
async fn identity_mismatch_hint_knows_cosign() {
    let node = Node::new().await;
    let pushed = node.push(&ImageSpec::default()).await;
    node.sign_as(&pushed, "a.example/os", &node.signer).await;
    let outcome = node.verify(&pushed.pullspec()).await;
    let said = outcome.refused(Reason::SignatureRejected);
    assert!(said.contains("\"a.example/os\" is not accepted") && !said.contains("matchRepository"), "{said}");

    // MCO's default identity rule needs a tag, which cosign does not write.
    unsign(&node.registry, &pushed.digest, REPO).await.unwrap();
    node.sign(&pushed).await;
    node.require([Requirement::sigstore_key_path(&node.key())]);
    let outcome = node.verify(&pushed.pullspec()).await;
    let said = outcome.refused(Reason::SignatureRejected);
    assert!(said.contains("matchRepository"), "{said}");
    node.sign_as(&pushed, &format!("{}:tag", pushed.repository()), &node.signer).await;
    node.verify(&pushed.pullspec()).await.facts();
}

#[tokio::test]
async fn every_key_type_works_inline_and_from_a_file() {
    let node = Node::new().await;
    for (index, kind) in KeyKind::ALL.into_iter().enumerate() {
        let signer = Signer::generate(kind);
        let (file, other) = (node.path(&format!("{kind:?}.pub")), node.path(&format!("{kind:?}-other.pub")));
        signer.write_public(&file).unwrap();
        Signer::generate(kind).write_public(&other).unwrap();
        let pushed = node.push(&ImageSpec::new(&index.to_string())).await;
        node.sign_as(&pushed, &pushed.repository(), &signer).await;
        for requirement in [
            Requirement::sigstore_key_data(&signer.public_key_pem()),
            Requirement::sigstore_key_path(&file),
            Requirement::sigstore_key_paths([other.as_path(), &file]),
        ] {
            node.require([requirement.identity(&Identity::MatchRepository)]);
            node.verify(&pushed.pullspec()).await.facts();
        }
        node.require([Requirement::sigstore_key_path(&other).identity(&Identity::MatchRepository)]);
        node.verify(&pushed.pullspec()).await.refused(Reason::SignatureRejected);
    }
    // A key of another type is another key.
    let pushed = node.push(&ImageSpec::new("ed25519")).await;
    node.sign_as(&pushed, &pushed.repository(), &Signer::generate(KeyKind::Ed25519)).await;
    node.require([node.requirement()]);
    node.verify(&pushed.pullspec()).await.refused(Reason::SignatureRejected);
}

#[tokio::test]
async fn all_requirements_of_a_scope_must_be_met() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let second = Signer::generate(KeyKind::Rsa2048);
    let demanded = Requirement::sigstore_key_data(&second.public_key_pem()).identity(&Identity::MatchRepository);
    node.require([Requirement::accept(), node.requirement(), demanded]);
    node.verify(&pushed.pullspec()).await.refused(Reason::SignatureRejected);
    node.sign_as(&pushed, &pushed.repository(), &second).await;
    node.verify(&pushed.pullspec()).await.facts();
    node.require([node.requirement(), Requirement::reject()]);
    node.verify(&pushed.pullspec()).await.refused(Reason::PolicyRejects);
}

fn certified(kind: &str, mut members: serde_json::Value, log: Option<&Log>) -> Requirement {
    let identity = json!({ "type": "matchRepository" });
    let mut requirement = json!({ "type": "sigstoreSigned", "signedIdentity": identity });
    if let Some(log) = log {
        requirement["rekorPublicKeyData"] = encode_block(log.public_key_pem().as_bytes()).into();
    }
    requirement[kind] = members.take();
    Requirement::raw(requirement)
}

#[tokio::test]
async fn fulcio_and_rekor_are_checked_offline() {
    let node = Node::new().await;
    let (authority, log) = (Authority::generate(), Log::generate());
    let leaf = Leaf { issuer: Some("https://issuer.test.example"), ..Leaf::new("os@test.example") };
    let rule = |email: &str, issuer: &str, authority: &Authority, log: &Log| {
        let ca = encode_block(authority.pem().as_bytes());
        certified("fulcio", json!({ "caData": ca, "subjectEmail": email, "oidcIssuer": issuer }), Some(log))
    };
    let (email, issuer) = (leaf.email, leaf.issuer.unwrap());
    let good = rule(email, issuer, &authority, &log);
    node.require([good.clone()]);
    let pushed = node.push(&ImageSpec::default()).await;
    let identity = pushed.repository();
    sign_certified(&node.registry, &pushed, &identity, &authority.issue(&leaf), Some(&log)).await.unwrap();
    let facts = node.verify(&pushed.pullspec()).await.facts();
    assert_eq!(facts.vouched_by, format!("docker \"{}\"", node.registry.host()));

    let (other_authority, other_log) = (Authority::generate(), Log::generate());
    for (wrong, why) in [
        (rule("other@test.example", issuer, &authority, &log), "Required email"),
        (rule(email, "https://other.test.example", &authority, &log), "Unexpected Fulcio OIDC issuer"),
        (rule(email, issuer, &other_authority, &log), "certificate signed by unknown authority"),
        (rule(email, issuer, &authority, &other_log), "verification of Rekor SET failed"),
    ] {
        node.require([wrong]);
        let outcome = node.verify(&pushed.pullspec()).await;
        let said = outcome.refused(Reason::SignatureRejected);
        assert!(said.contains(why), "{said}");
    }

    node.require([good]);
    for (name, leaf, log, why) in [
        ("unlogged", leaf, None, "missing dev.sigstore.cosign/bundle annotation"),
        ("expired", Leaf { until: -60, ..leaf }, Some(&log), "has expired"),
        ("no issuer", Leaf { issuer: None, ..leaf }, Some(&log), "missing the issuer extension"),
        ("no code", Leaf { code_signing: false, ..leaf }, Some(&log), "incompatible key usage"),
    ] {
        let pushed = node.push(&ImageSpec::new(name)).await;
        sign_certified(&node.registry, &pushed, &identity, &authority.issue(&leaf), log).await.unwrap();
        let outcome = node.verify(&pushed.pullspec()).await;
        let said = outcome.refused(Reason::SignatureRejected);
        assert!(said.contains(why), "{name}: {said}");
    }
    let pushed = node.push(&ImageSpec::new("keyed")).await;
    node.sign(&pushed).await;
    node.verify(&pushed.pullspec()).await.refused(Reason::SignatureRejected);
}

#[tokio::test]
async fn private_authority_is_checked_offline() {
    let node = Node::new().await;
    let authority = Authority::generate();
    let rule = |members: &[(&str, &str)], authority: &Authority| {
        let mut pki = json!({ "caRootsData": encode_block(authority.pem().as_bytes()) });
        for (name, value) in members {
            pki[*name] = (*value).into();
        }
        certified("pki", pki, None)
    };
    let email = [("subjectEmail", "os@test.example")];
    node.require([rule(&email, &authority)]);
    let pushed = node.push(&ImageSpec::default()).await;
    let signer = authority.issue(&Leaf::new("os@test.example"));
    sign_certified(&node.registry, &pushed, &pushed.repository(), &signer, None).await.unwrap();
    node.verify(&pushed.pullspec()).await.facts();
    for (wrong, why) in [
        (rule(&[("subjectEmail", "x@test.example")], &authority), "Required email"),
        (rule(&[("subjectHostname", "test.example")], &authority), "Unexpected subject hostname"),
        (rule(&email, &Authority::generate()), "certificate signed by unknown authority"),
    ] {
        node.require([wrong]);
        let outcome = node.verify(&pushed.pullspec()).await;
        let said = outcome.refused(Reason::SignatureRejected);
        assert!(said.contains(why), "{said}");
    }
}

#[tokio::test]
async fn key_with_mandatory_log_entry_is_checked() {
    let node = Node::new().await;
    let (log, other) = (Log::generate(), Log::generate());
    let key = encode_block(node.signer.public_key_pem().as_bytes());
    node.require([certified("keyData", json!(key), Some(&log))]);
    let pushed = node.signed().await;
    node.verify(&pushed.pullspec()).await.refused(Reason::SignatureRejected);
    let pushed = node.push(&ImageSpec::new("other log")).await;
    sign_keyed(&node.registry, &pushed, &pushed.repository(), &node.signer, &other).await.unwrap();
    let outcome = node.verify(&pushed.pullspec()).await;
    assert!(outcome.refused(Reason::SignatureRejected).contains("No public key verified against the RekorSET"));
    sign_keyed(&node.registry, &pushed, &pushed.repository(), &node.signer, &log).await.unwrap();
    node.verify(&pushed.pullspec()).await.facts();
}

/// `/tmp` is writable in this test; the agent's own confinement of the engine makes the difference.
#[tokio::test]
async fn gpg_is_refused_without_scratch_space_and_works_with_it() {
    let node = Node::new().await;
    let (signer, stranger) = (GpgSigner::generate().unwrap(), GpgSigner::generate().unwrap());
    signer.write_public(&node.path("os.gpg")).unwrap();
    stranger.write_public(&node.path("stranger.gpg")).unwrap();
    let host = node.registry.host();
    node.attachments(&RegistriesD::new().lookaside(&host, &format!("file://{}", text(&node.path("lookaside")))));
    let rule = |key: &str| Requirement::gpg_key_path(&node.path(key)).identity(&Identity::MatchRepository);
    node.require([rule("os.gpg")]);
    let pushed = node.push(&ImageSpec::default()).await;
    let scratch = node.path("scratch");
    fs::create_dir(&scratch).unwrap();
    let scratch = [("REBASE_AGENT_SCRATCH", text(&scratch))];
    node.verify_with(&pushed.pullspec(), &scratch).await.refused(Reason::SignatureMissing);

    signer.sign(&node.path("lookaside"), &pushed, &format!("{}:tag", pushed.repository())).unwrap();
    let outcome = node.verify(&pushed.pullspec()).await;
    assert!(outcome.refused(Reason::GpgNeedsScratch).contains("10-gpg.conf"), "{outcome:?}");
    node.verify_with(&pushed.pullspec(), &scratch).await.facts();
    assert_eq!(fs::read_dir(node.path("scratch")).unwrap().count(), 0, "GnuPG's home was left behind");
    node.require([rule("stranger.gpg")]);
    let outcome = node.verify_with(&pushed.pullspec(), &scratch).await;
    assert!(outcome.refused(Reason::SignatureRejected).contains("Invalid GPG signature"), "{outcome:?}");
}

/// The engine checks the digest that the reference names, and nothing below it.
#[tokio::test]
async fn desired_digest_itself_must_be_signed() {
    let node = Node::new().await;
    let pushed = node.push(&ImageSpec::default().architectures(["amd64", "arm64", "s390x"])).await;
    let own = pushed.instance_pullspec(host_architecture());
    let instance = &pushed.instance_digests[host_architecture()];
    node.sign(&pushed).await;
    let facts = node.verify(&pushed.pullspec()).await.facts();
    assert_eq!((facts.image.digest().as_str(), facts.instance.as_str()), (pushed.digest.as_str(), instance.as_str()));
    assert_eq!(facts.architecture, host_architecture());
    node.verify(&own).await.refused(Reason::SignatureMissing);

    unsign(&node.registry, &pushed.digest, REPO).await.unwrap();
    sign(&node.registry, instance, REPO, &pushed.repository(), &node.signer).await.unwrap();
    node.verify(&pushed.pullspec()).await.refused(Reason::SignatureMissing);
    let facts = node.verify(&own).await.facts();
    assert_eq!(facts.image.digest(), &facts.instance);
    sign_all(&node.registry, &pushed, &pushed.repository(), &node.signer).await.unwrap();
    node.verify(&pushed.pullspec()).await.facts();
    node.verify(&own).await.facts();

    let foreign = node.push(&ImageSpec::new("foreign").architectures(["s390x", "ppc64le"])).await;
    node.sign(&foreign).await;
    let outcome = node.verify(&foreign.pullspec()).await;
    assert!(outcome.refused(Reason::WrongArchitecture).contains(host_architecture()), "{outcome:?}");
}

#[tokio::test]
async fn rebase_prefix_follows_the_global_default() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let (host, demanded) = (node.registry.host(), [node.requirement()]);
    let accept = Requirement::accept;
    for (policy, prefix) in [
        (Policy::accept_by_default().scope(&host, demanded.clone()), "ostree-unverified-registry:"),
        (Policy::reject_by_default().scope(&host, demanded.clone()), "ostree-image-signed:docker://"),
        (
            Policy::new([accept(), Requirement::reject()]).scope(&host, demanded.clone()),
            "ostree-image-signed:docker://",
        ),
        (Policy::new([accept(), accept()]).scope(&host, demanded.clone()), "ostree-image-signed:docker://"),
        (Policy::new(demanded.clone()), "ostree-image-signed:docker://"),
    ] {
        node.policy(&policy);
        let output = tools::run(node.command(&pushed.pullspec()), Duration::from_secs(30)).await.unwrap();
        let shown = String::from_utf8(output.stdout).unwrap();
        assert!(shown.contains(&format!("pulled as    {prefix}{}\n", pushed.pullspec())), "{shown}");
    }
}

/// The pull runs the engine as an unprivileged user.
#[tokio::test]
async fn key_that_the_pull_cannot_read_is_reported() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let outcome = node.verify(&pushed.pullspec()).await;
    assert!(outcome.code == 0 && !outcome.stderr.contains("key.pub"), "{outcome:?}");
    fs::set_permissions(node.key(), fs::Permissions::from_mode(0o600)).unwrap();
    let outcome = node.verify(&pushed.pullspec()).await;
    outcome.facts();
    assert!(outcome.stderr.contains("key.pub") && outcome.stderr.contains("chmod"), "{outcome:?}");
    let other = Policy::accept_by_default()
        .scope(
            &node.registry.host(),
            [Requirement::sigstore_key_data(&node.signer.public_key_pem()).identity(&Identity::MatchRepository)],
        )
        .scope("other.example", [node.requirement()]);
    node.policy(&other);
    let outcome = node.verify(&pushed.pullspec()).await;
    assert!(outcome.code == 0 && !outcome.stderr.contains("key.pub"), "the key of another scope: {outcome:?}");
}

#[tokio::test]
async fn unusable_policy_error_names_file_and_cause() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let host = node.registry.host();
    let scoped = |requirement: &str| {
        format!(r#"{{"default":[{{"type":"reject"}}],"transports":{{"docker":{{"{host}":[{requirement}]}}}}}}"#)
    };
    for (policy, why) in [
        (String::new(), "EOF"),
        ("{}".to_owned(), "default"),
        (scoped(""), "empty"),
        (scoped(r#"{"type":"weird"}"#), "weird"),
        // These pass the gate, which leaves keys to the engine.
        (scoped(r#"{"type":"sigstoreSigned","keyPath":"/nonexistent.pub"}"#), "/nonexistent.pub: no such file"),
        (scoped(r#"{"type":"sigstoreSigned","keyData":"eHg="}"#), "PEM decoding failed"),
        (scoped(r#"{"type":"sigstoreSigned","keyPath":"/k","extra":1}"#), "Unknown key \"extra\""),
        (scoped(r#"{"type":"signedBy","keyType":"GPGKeys"}"#), "Exactly one of"),
    ] {
        fs::write(node.path("policy.json"), &policy).unwrap();
        let outcome = node.verify(&pushed.pullspec()).await;
        let said = outcome.refused(Reason::PolicyInvalid);
        assert!(said.contains("policy.json") && said.contains(why) && !said.contains("/proc/"), "{policy}: {said}");
    }
    fs::remove_file(node.path("policy.json")).unwrap();
    let outcome = node.verify(&pushed.pullspec()).await;
    assert_eq!(outcome.code, 1, "an unreadable policy is not a refusal: {outcome:?}");
    let said = format!("{outcome:?}");
    assert!(said.contains("PolicyInvalid") && said.contains("No such file"), "{said}");
}
