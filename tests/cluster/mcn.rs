//! The write of the MachineConfigNode against every answer of the API server.

use rebase_agent::cluster::mcn::{Wanted, obstacle};
use rebase_agent::decide::{Decision, Rule};
use rebase_agent::model::{Action, NodeFacts, NodeState, Reason};
use serde_json::{Value, json};
use support::apiserver::{Crd, Fault, RequestRecord, Scope};

use super::*;

/// 2026-11-29T12:00:00Z.
const NOW: u64 = 1_795_953_600_000;

fn wanted(image: &str) -> Wanted {
    let node: NodeFacts = serde_json::from_value(json!({
        "name": NODE, "current_config": "r-1", "desired_config": "r-2", "current_image": image, "desired_image": image,
        "state": "Working",
    }))
    .unwrap();
    let (action, reason, message) = (Action::Nothing, Reason::Staging, String::new());
    let state = Some(NodeState::Working);
    let decision =
        Decision { rule: Rule::Stage, action, reason, message, state, unsticks: false, wake: None, clock: None };
    Wanted::of(&node, &decision, false).unwrap()
}

fn image(name: &str) -> String {
    format!("{name}@sha256:{}", "ab".repeat(32))
}

impl Stage {
    fn with(crd: Crd) -> Self {
        let stage = Self::new();
        stage.store.set_mcns(crd, true);
        let spec = json!({"node": {"name": NODE}, "pool": {"name": "worker"}, "configVersion": {"desired": "r-2"}});
        stage.store.set_mcn(NODE, Some(spec));
        stage
    }

    fn applied(&self) -> Vec<RequestRecord> {
        self.server.requests().into_iter().filter(|request| request.method == "PATCH").collect()
    }

    fn shown(&self) -> Value {
        self.store.mcn(NODE).unwrap()["status"].clone()
    }
}

#[tokio::test]
async fn a_write_has_only_our_conditions_configs_and_images() {
    let stage = Stage::with(Crd::ImageMode);
    let (api, image) = (stage.api(), image("quay.io/o/i"));
    assert_eq!(api.show(&wanted(&image), NOW).await.unwrap(), None);
    let [request] = &stage.applied()[..] else { panic!("one write") };
    let query = "status?fieldManager=rebase-agent&force=true";
    let path = format!("/apis/machineconfiguration.openshift.io/v1/machineconfignodes/{NODE}/{query}");
    assert_eq!(request.path_and_query, path);
    let body: Value = serde_json::from_str(&request.body).unwrap();
    assert_eq!(body["status"]["configImage"], json!({"currentImage": image, "desiredImage": image}));
    assert_eq!(body["status"]["configVersion"], json!({"current": "r-1", "desired": "r-2"}));
    assert_eq!(body["status"].as_object().unwrap().len(), 3);
    assert_eq!(body["metadata"], json!({"name": NODE}));
    // The same again is only read.
    api.show(&wanted(&image), NOW + 1).await.unwrap();
    assert_eq!(stage.applied().len(), 1);
}

#[tokio::test]
async fn a_crd_without_the_gate_gets_no_images() {
    let stage = Stage::with(Crd::Default);
    let api = stage.api();
    assert_eq!(api.show(&wanted(&image("quay.io/o/i")), NOW).await.unwrap(), None);
    let statuses: Vec<_> = stage.applied().iter().map(|request| request.status).collect();
    assert_eq!(statuses, [500, 200], "a new object does not show whether the gate is on");
    assert_eq!(stage.shown().get("configImage"), None);
    assert!(stage.shown()["conditions"].to_string().contains("AppliedFilesAndOS"));
    api.show(&wanted(&image("quay.io/o/j")), NOW).await.unwrap();
    assert_eq!(stage.applied().len(), 3, "the object shows it now");
}

#[tokio::test]
async fn an_image_name_that_the_crd_refuses_costs_only_the_images() {
    let stage = Stage::with(Crd::ImageMode);
    for name in ["registry:5000/o/i", "quay.io/o/p/i"] {
        let sentence = stage.api().show(&wanted(&image(name)), NOW).await.unwrap().unwrap();
        assert!(sentence.contains("one namespace") && sentence.contains(name), "{sentence}");
        assert!(!stage.shown()["conditions"].as_array().unwrap().is_empty());
        assert_eq!(stage.shown().get("configImage"), None);
    }
}

#[tokio::test]
async fn lasting_obstacles_have_a_way_out_and_others_pass() {
    let stage = Stage::with(Crd::Default);
    let (api, wanted) = (stage.api(), wanted(&image("quay.io/o/i")));
    let error = async || api.show(&wanted, NOW).await.unwrap_err();
    stage.store.set_mcns(Crd::Default, false);
    let forbidden = obstacle(&error().await).unwrap();
    assert!(forbidden.contains("systemd/cluster") && forbidden.contains("cannot get resource"), "{forbidden}");
    stage.store.set_mcns(Crd::Default, true);
    stage.store.set_mcn(NODE, None);
    let missing = obstacle(&error().await).unwrap();
    assert!(missing.contains("machine-config-operator"), "{missing}");
    stage.store.set_mcns(Crd::Absent, true);
    assert_eq!(obstacle(&error().await), Some(missing));
    for code in [429, 500, 503] {
        stage.store.inject(Scope::Mcn, 1, Fault::Status { code, retry_after: None });
        assert_eq!(obstacle(&error().await), None, "{code}");
    }
    stage.store.inject(Scope::Mcn, 1, Fault::Status { code: 422, retry_after: None });
    assert!(obstacle(&error().await).unwrap().contains("oc get crd"));
}

#[tokio::test]
async fn nonsensical_objects_are_not_written_over() {
    let stage = Stage::with(Crd::Default);
    let huge = json!({"metadata": {}, "status": {"conditions": vec![0; 3_000_000]}}).to_string();
    for body in ["", "[]", "null", "{}", r#"{"metadata":{},"status":{"conditions":[{"type":1}]}}"#, &huge] {
        stage.store.inject(Scope::Mcn, 1, Fault::Page { code: 200, body: body.to_owned() });
        let error = stage.api().show(&wanted(&image("quay.io/o/i")), NOW).await.unwrap_err();
        let text = error.to_string();
        assert!(text.len() < 600 && !text.chars().any(char::is_control), "{text}");
    }
    assert!(stage.applied().is_empty());
}
