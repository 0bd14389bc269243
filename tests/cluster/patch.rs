//! The scope of a patch, and a patch whose reply is lost.

use std::collections::BTreeMap;

use rebase_agent::model::annotations::{ATTEMPT, MCO};
use rebase_agent::model::{Fault as Told, Reason};
use rebase_agent::report::Patch;
use serde_json::{Value, json};
use support::apiserver::{Fault, RequestRecord, Scope};

use super::*;

fn patch(key: &str, value: &str) -> Patch {
    BTreeMap::from([(format!("{MCO}{key}"), Some(value.to_owned()))])
}

impl Stage {
    fn patches(&self) -> Vec<RequestRecord> {
        self.server.requests().into_iter().filter(|request| request.method == "PATCH").collect()
    }

    /// The Node without the fields that every write changes.
    fn rest(&self) -> Value {
        let mut node = self.store.node(NODE).unwrap();
        for key in ["annotations", "managedFields", "resourceVersion"] {
            node["metadata"].as_object_mut().unwrap().remove(key);
        }
        node
    }
}

#[tokio::test]
async fn patch_has_only_annotations_with_uid_and_field_manager() {
    let stage = Stage::new();
    let api = stage.api();
    let node = api.metadata().await.unwrap().0;
    let before = stage.rest();
    let mut two = patch("state", "Working");
    two.insert(ATTEMPT.to_owned(), None);
    let patched = api.patch(&node.uid, &two).await.unwrap();
    assert_eq!(patched.facts.state.as_deref(), Some("Working"));
    assert_eq!(stage.rest(), before);
    let [request] = &stage.patches()[..] else { panic!("one patch") };
    assert_eq!(request.path_and_query, format!("/api/v1/nodes/{NODE}?fieldManager=rebase-agent"));
    let body: Value = serde_json::from_str(&request.body).unwrap();
    let annotations = json!({format!("{MCO}state"): "Working", ATTEMPT: null});
    assert_eq!(body, json!({"metadata": {"uid": node.uid, "annotations": annotations}}));
    assert!(request.user_agent.starts_with("rebase-agent/"), "{}", request.user_agent);
}

#[tokio::test]
async fn lost_reply_is_repaired_by_the_same_patch() {
    let stage = Stage::new();
    let api = stage.api();
    let node = api.metadata().await.unwrap().0;
    for fault in [Fault::Lost, Fault::Cut] {
        stage.store.inject(Scope::Write, 1, fault);
        let error = api.patch(&node.uid, &patch("state", "Working")).await.unwrap_err();
        assert!(matches!(error, ClusterError::Connection(_)), "{error}");
        let version = stage.store.node(NODE).unwrap()["metadata"]["resourceVersion"].clone();
        let patched = api.patch(&node.uid, &patch("state", "Working")).await.unwrap();
        assert_eq!(patched.facts.state.as_deref(), Some("Working"));
        assert_eq!(version, patched.resource_version, "the second one changes nothing");
    }
    assert_eq!(stage.patches().len(), 4);
}

#[tokio::test]
async fn patch_for_a_replaced_node_changes_nothing() {
    let stage = Stage::new();
    let api = stage.api();
    let old = api.metadata().await.unwrap().0;
    stage.store.delete_node(NODE);
    assert!(matches!(api.patch(&old.uid, &patch("state", "Done")).await, Err(ClusterError::NotFound(_))));
    stage.store.create_node(NODE, &[]);
    let error = api.patch(&old.uid, &patch("state", "Done")).await.unwrap_err();
    assert!(matches!(error, ClusterError::Refused(_)), "{error}");
    assert_eq!(stage.store.annotation(NODE, &format!("{MCO}state")), None);
    let new = api.metadata().await.unwrap().0;
    assert_ne!(new.uid, old.uid);
    assert!(!new.is_older_than(&old));
    api.patch(&new.uid, &patch("state", "Done")).await.unwrap();
}

#[tokio::test]
async fn full_annotations_refuse_more() {
    let stage = Stage::new();
    let api = stage.api();
    let node = api.metadata().await.unwrap().0;
    stage.store.annotate("somebody", NODE, "example.com/all", Some(&"x".repeat(256 * 1024 - 100))).unwrap();
    let error = api.patch(&node.uid, &patch("reason", &"r".repeat(500))).await.unwrap_err();
    assert!(matches!(&error, ClusterError::Refused(why) if why.contains("Too long")), "{error}");
    assert_eq!(Told::from(&error).reason, Reason::ClusterUnreachable);
    assert!(api.metadata().await.is_ok(), "the Node can still be read");
}

#[tokio::test]
async fn refusals_have_different_reasons() {
    let stage = Stage::new();
    let api = stage.api();
    let node = api.metadata().await.unwrap().0;
    for (code, reason) in [
        (403, Reason::ClusterForbidden),
        (404, Reason::NodeNotFound),
        (409, Reason::ClusterUnreachable),
        (422, Reason::ClusterUnreachable),
        (429, Reason::ClusterUnreachable),
        (500, Reason::ClusterUnreachable),
        (504, Reason::ClusterUnreachable),
    ] {
        stage.store.inject(Scope::Write, 1, Fault::Status { code, retry_after: None });
        let error = api.patch(&node.uid, &patch("state", "Done")).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{code}");
    }
    let huge = "x".repeat(5 << 20);
    for (code, body) in [
        (200, "<html>\u{1b}[2J"),
        (502, "<html>Bad Gateway"),
        (302, "elsewhere"),
        (200, "{}"),
        (200, &huge),
        (500, &huge),
    ] {
        stage.store.inject(Scope::Write, 1, Fault::Page { code, body: body.to_owned() });
        let text = api.patch(&node.uid, &patch("state", "Done")).await.unwrap_err().to_string();
        assert!(!text.chars().any(char::is_control) && text.len() < 600, "{text:?}");
    }
    assert_eq!(stage.store.annotation(NODE, &format!("{MCO}state")), None);
    api.patch(&node.uid, &patch("state", "Done")).await.unwrap();
}

#[tokio::test]
async fn nonsensical_retry_after_is_ignored() {
    let stage = Stage::new();
    let api = stage.api();
    for (asked, believed) in [(7, 7), (u32::MAX, 600)] {
        stage.store.inject(Scope::Read, 1, Fault::Status { code: 429, retry_after: Some(asked) });
        let error = api.metadata().await.unwrap_err();
        assert_eq!(error.retry_after(), Some(Duration::from_secs(believed)));
    }
}

#[tokio::test]
async fn annotations_are_bounded_and_escaped() {
    let stage = Stage::new();
    let api = stage.api();
    let long = "x".repeat(200 * 1024);
    let image = format!("quay.io/o/i@sha256:{}", "ab".repeat(32));
    for (key, value) in [
        ("desiredConfig", "-rf\u{1b}[2J\n"),
        ("desiredImage", &format!("{image}\n")),
        ("state", "\u{0}\u{7f}\u{9b}"),
        ("reason", &long),
    ] {
        stage.annotate(key, value);
    }
    let facts = api.metadata().await.unwrap().0.facts;
    let desired = facts.desired_image.unwrap();
    let values = [&facts.desired_config, &facts.state, &facts.reason].map(|value| value.as_deref().unwrap());
    for value in values.into_iter().chain([desired.as_str()]) {
        assert!(value.len() < 9000 && !value.chars().any(char::is_control), "{value:?}");
    }
    // A reference that was cleaned to a valid image would be followed and would never equal MCC's.
    assert!(desired.image().is_err(), "{desired:?}");
    stage.annotate("reason", "");
    stage.annotate("desiredImage", &(image.clone() + &long));
    let desired = api.metadata().await.unwrap().0.facts.desired_image.unwrap();
    assert!(desired.image().is_err(), "{desired:?}");
    stage.annotate("desiredImage", &image);
    assert_eq!(api.metadata().await.unwrap().0.facts.desired_image.unwrap().as_str(), image);

    let attempt = json!({"image": image, "bootID": "b", "count": 1, "more": long}).to_string();
    stage.store.annotate("admin", NODE, ATTEMPT, Some(&attempt)).unwrap();
    assert_eq!(api.metadata().await.unwrap().0.facts.attempt, None);
    // No API server sends this answer; a proxy in between might.
    let odd = r#"{"metadata":{"resourceVersion":"1"},"items":[{"metadata":
        {"name":"x","uid":"u","resourceVersion":"1","annotations":{"a":5}}}]}"#;
    stage.store.inject(Scope::Read, 1, Fault::Page { code: 200, body: odd.to_owned() });
    assert!(matches!(api.metadata().await, Err(ClusterError::Confused { .. })));
    let other = odd.replace("{\"a\":5}", "{}");
    stage.store.inject(Scope::Read, 1, Fault::Page { code: 200, body: other });
    let text = api.metadata().await.unwrap_err().to_string();
    assert!(text.contains("it is about the Node x"), "{text}");
}

/// Some Nodes list more images than the agent reads; the error must not blame the network.
#[tokio::test]
async fn whole_node_that_is_too_large_has_its_own_reason() {
    let stage = Stage::new();
    let api = stage.api();
    let images: Vec<_> =
        (0..40_000).map(|n| json!({"names": [format!("registry.example.com/{n}/{}", "x".repeat(90))]})).collect();
    let mut node = stage.store.node(NODE).unwrap();
    node["status"]["images"] = json!(images);
    let body = node.to_string();
    assert!(body.len() > 5_000_000);
    stage.store.inject(Scope::Read, 1, Fault::Page { code: 200, body: body.clone() });
    let error = api.full().await.unwrap_err();
    assert_eq!(error.reason(), Reason::NodeTooLarge);
    assert!(error.to_string().contains("nodeStatusMaxImages"), "{error}");
    // A large page from a proxy is not a Node.
    stage.store.inject(Scope::Read, 1, Fault::Page { code: 502, body });
    assert_eq!(api.full().await.unwrap_err().reason(), Reason::ClusterUnreachable);
}

#[tokio::test]
async fn time_is_that_of_the_server() {
    let stage = Stage::new();
    let api = stage.api();
    assert_eq!(api.time(), None);
    let here = || i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_millis()).unwrap();
    for ahead in [0, 7200, -7200] {
        stage.store.set_clock(ahead);
        api.metadata().await.unwrap();
        let time = i64::try_from(api.time().unwrap()).unwrap();
        assert!((time - here() - ahead * 1000).abs() < 5000, "{ahead}: {time}");
    }
}

#[tokio::test]
async fn other_daemons_are_recognized_by_later_writes() {
    let stage = Stage::new();
    let api = stage.api();
    let node = api.metadata().await.unwrap().0;
    let daemon = "machine-config-daemon";
    let other = async || api.metadata().await.unwrap().0.facts.other_writer;
    // The server's time stamps have whole seconds.
    let later = || tokio::time::sleep(Duration::from_millis(1100));

    stage.store.annotate(daemon, NODE, &format!("{MCO}currentConfig"), Some("r-1")).unwrap();
    stage.store.annotate(daemon, NODE, &format!("{MCO}state"), Some("Done")).unwrap();
    assert_eq!(other().await, None, "the earlier write does not count");
    api.patch(&node.uid, &patch("state", "Working")).await.unwrap();
    assert_eq!(other().await, None);
    later().await;
    for (manager, key, value) in [
        ("machine-config-controller", "machineconfiguration.openshift.io/desiredConfig", Some("r-2")),
        ("machine-config-controller", "machineconfiguration.openshift.io/lastAppliedDrain", Some("drain-r-2")),
        ("kubectl-annotate", "rebase-agent.openshift.io/hold", Some("x")),
        ("kubectl-annotate", ATTEMPT, Some("{}")),
        ("kubectl-annotate", ATTEMPT, None),
        // A manual repair followed by another write: a manager has one time stamp for all its fields.
        ("kubectl-annotate", "machineconfiguration.openshift.io/currentConfig", Some("r-0")),
        ("kubectl-annotate", "rebase-agent.openshift.io/hold", None),
        ("kubelet", "volumes.kubernetes.io/controller-managed-attach-detach", Some("true")),
    ] {
        stage.store.annotate(manager, NODE, key, value).unwrap();
        assert_eq!(other().await, None, "{manager} {key}");
    }
    stage.store.set_unschedulable(NODE, true);
    stage.store.heartbeat(NODE);
    assert_eq!(other().await, None);

    stage.store.annotate(daemon, NODE, &format!("{MCO}state"), Some("Degraded")).unwrap();
    let seen = other().await.expect("the daemon came back");
    assert_eq!(seen.manager, daemon);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis();
    assert!(now.abs_diff(u128::from(seen.unix)) < 5000, "{} {now}", seen.unix);
    // Writing the same value again takes over no field.
    later().await;
    api.patch(&node.uid, &patch("state", "Working")).await.unwrap();
    later().await;
    stage.store.annotate(daemon, NODE, &format!("{MCO}state"), Some("Working")).unwrap();
    assert_eq!(other().await, None);
}
