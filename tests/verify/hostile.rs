//! A registry that lies, stalls or breaks: the image is always refused.

use std::sync::Arc;

use support::hostile_registry::{HostileRegistry, Place, Trick};
use support::sign::signature_tag;
use tokio::task::JoinSet;

use super::engine::claims;
use super::*;

/// Longest verification with an answering registry, in seconds: more than any machine needs.
const ANSWERED: u64 = 30;
/// Deadline of a verification with a silent registry, in seconds.
const UNANSWERED: u64 = 3;
/// Seconds that a busy machine may add.
const SLACK: u64 = 4;

/// Verifies a signed image through a registry that plays a trick.
async fn through(node: &Node, pushed: &Pushed, place: Place, trick: Trick, seconds: u64) -> Outcome {
    let hostile = HostileRegistry::start(&node.tls, &node.registry.host(), place, trick).await.unwrap();
    let deadline = seconds.to_string();
    let env = [("REBASE_AGENT_VERIFY_TIMEOUT", deadline.as_str())];
    node.verify_with(&format!("{}/{REPO}@{}", hostile.host(), pushed.digest), &env).await
}

/// A node whose policy requires the honest registry's signature for every image.
async fn node() -> (Node, Pushed) {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let identity = Identity::ExactRepository(pushed.repository());
    node.policy(&Policy::new([Requirement::sigstore_key_path(&node.key()).identity(&identity)]));
    // The ports are not known yet, so the default applies to these registries.
    fs::write(node.path("registries.d/default.yaml"), "default-docker:\n  use-sigstore-attachments: true\n").unwrap();
    (node, pushed)
}

#[tokio::test]
async fn every_false_answer_is_refused_with_its_reason() {
    use Place::{Config, Manifest, Payload, Ping, Signature};
    let (node, pushed) = node().await;
    let other = node.push(&ImageSpec::new("other")).await;
    node.sign(&other).await;
    through(&node, &pushed, Ping, Trick::Honest, ANSWERED).await.facts();

    let portal = "<html><title>A signature was required, but no signature exists</title></html>";
    let error = |status, code| Trick::Error(status, code, "msg".to_owned());
    let fake = "A signature was required, but no signature exists\n\u{1b}[2J fake log line".to_owned();
    let swapped = format!("/v2/{REPO}/manifests/{}", other.digest);
    let other_signature = format!("/v2/{REPO}/manifests/{}", signature_tag(&other.digest));
    let (unreachable, denied, missing) = (Reason::RegistryUnreachable, Reason::RegistryDenied, Reason::ManifestMissing);
    for (place, trick, reason) in [
        (Ping, Trick::Token(401), denied),
        (Ping, Trick::Token(403), denied),
        (Ping, Trick::Token(503), unreachable),
        (Ping, error(500, "X"), unreachable),
        (Ping, Trick::Page(503, "busy"), unreachable),
        (Ping, Trick::Cut, unreachable),
        (Manifest, Trick::Tamper, Reason::ImageInvalid),
        (Manifest, Trick::Swap(swapped), Reason::ImageInvalid),
        (Manifest, error(401, "UNAUTHORIZED"), denied),
        (Manifest, error(403, "DENIED"), denied),
        (Manifest, error(403, "X"), unreachable),
        (Manifest, error(404, "MANIFEST_UNKNOWN"), missing),
        (Manifest, error(404, "NAME_UNKNOWN"), missing),
        (Manifest, error(404, "X"), unreachable),
        (Manifest, error(500, "X"), unreachable),
        (Manifest, error(502, "X"), unreachable),
        (Manifest, error(503, "X"), unreachable),
        (Manifest, Trick::Error(404, "X", fake.clone()), unreachable),
        (Manifest, Trick::Error(404, "MANIFEST_UNKNOWN", "A".repeat(200_000)), unreachable),
        (Manifest, Trick::Page(200, portal), Reason::ImageInvalid),
        (Manifest, Trick::Page(404, portal), missing),
        (Manifest, Trick::Cut, unreachable),
        (Manifest, Trick::Inflate, Reason::ImageInvalid),
        (Signature, error(404, "MANIFEST_UNKNOWN"), Reason::SignatureMissing),
        (Signature, error(401, "UNAUTHORIZED"), denied),
        (Signature, error(500, "X"), unreachable),
        (Signature, Trick::Error(500, "X", fake), unreachable),
        (Signature, Trick::Swap(other_signature), Reason::SignatureRejected),
        (Signature, Trick::Page(200, portal), unreachable),
        (Signature, Trick::Cut, unreachable),
        (Signature, Trick::Inflate, Reason::ImageInvalid),
        (Payload, Trick::Tamper, unreachable),
        (Payload, Trick::Inflate, unreachable),
        (Payload, error(500, "X"), unreachable),
        (Config, Trick::Tamper, Reason::ImageInvalid),
        (Config, Trick::Inflate, Reason::ImageInvalid),
        (Config, Trick::Page(200, portal), Reason::ImageInvalid),
        (Config, error(404, "BLOB_UNKNOWN"), Reason::ImageInvalid),
        (Config, Trick::Cut, unreachable),
    ] {
        let shown = format!("{:.60}", format!("{place:?} {trick:?}"));
        let outcome = through(&node, &pushed, place, trick, ANSWERED).await;
        assert_eq!(outcome.said["reason"], reason.as_str(), "{shown}: {outcome:?}");
        outcome.refused(reason);
        assert!(outcome.took.as_secs() < ANSWERED, "{shown}: {:?}", outcome.took);
    }
}

#[tokio::test]
async fn registry_silence_ends_at_the_deadline() {
    let (node, pushed) = node().await;
    let node = Arc::new(node);
    let mut tasks = JoinSet::new();
    for place in [Place::Ping, Place::Manifest, Place::Signature, Place::Payload, Place::Config] {
        let (node, pushed) = (Arc::clone(&node), pushed.clone());
        tasks.spawn(async move { (place, through(&node, &pushed, place, Trick::Hang, UNANSWERED).await) });
    }
    {
        // containers/image waits half a minute before it retries after a 429.
        let (node, pushed) = (Arc::clone(&node), pushed.clone());
        let busy = Trick::Error(429, "TOOMANYREQUESTS", "later".into());
        tasks.spawn(async move { (Place::Manifest, through(&node, &pushed, Place::Manifest, busy, UNANSWERED).await) });
    }
    while let Some(done) = tasks.join_next().await {
        let (place, outcome) = done.unwrap();
        let said = outcome.refused(Reason::DeadlineExceeded);
        assert!(said.contains(&format!("{UNANSWERED} s")), "{place:?}: {said}");
        assert!((UNANSWERED..=UNANSWERED + SLACK).contains(&outcome.took.as_secs()), "{place:?}: {:?}", outcome.took);
    }
}

/// An engine that dies while another process keeps its socket open fails one verification and not the agent.
#[tokio::test]
async fn engine_that_dies_during_a_call_fails_only_that_verification() {
    let (node, pushed) = node().await;
    let hostile = HostileRegistry::start(&node.tls, &node.registry.host(), Place::Config, Trick::Hang).await.unwrap();
    let asked = node.path("asked");
    let body = format!(
        "exec 3<&0\n$REAL \"$@\" <&3 2>/dev/null &\nengine=$!\nuntil [ -e {} ]; do sleep 0.05; done\nsleep 60 <&3 >/dev/null 2>&1 &\n\
         kill -9 $engine; exit 3",
        asked.display()
    );
    let engine = node.engine("leaves", &claims("1.18.0", &body));
    let pullspec = format!("{}/{REPO}@{}", hostile.host(), pushed.digest);
    let env = [("REBASE_AGENT_SKOPEO", text(&engine))];
    let (outcome, ()) = tokio::join!(node.verify_with(&pullspec, &env), async {
        while hostile.played() == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        fs::write(&asked, "").unwrap();
    });
    let said = outcome.refused(Reason::RegistryUnreachable);
    assert!(said.contains("exit status: 3"), "{said}");
}
