//! The requests that agents make, and the mistakes they could make, sent to the double of the API server and to the real
//! one. Both must answer the same, or the tests on the double would prove little.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use reqwest::header::{ACCEPT, CONTENT_TYPE, DATE, HeaderMap, RETRY_AFTER};
use reqwest::{Certificate, Identity, Method, Response};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::scenarios::{Outcome, Stage};
use super::site::{MCNS, object};
use super::{ControlPlane, Options, POLL, Program};
use crate::apiserver::{ApiServer, Crd};
use crate::events::Events;
use crate::pki::Pki;

const METADATA: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
const FULL: &str = "application/json";
const MERGE: &str = "application/merge-patch+json";
const APPLY: &str = "application/apply-patch+yaml";

const OWN: &str = "/api/v1/nodes/worker-0";
const OTHER: &str = "/api/v1/nodes/worker-1";
const LIST: &str = "/api/v1/nodes?fieldSelector=metadata.name%3Dworker-0";
const EVENTS: &str = "/api/v1/namespaces/default/events";
const DEADLINE: Duration = Duration::from_secs(30);
const DAY: i64 = 24 * 3600;

/// A server under test.
enum Side {
    Double(ApiServer),
    Real(Box<ControlPlane>),
}

impl Side {
    fn url(&self) -> String {
        match self {
            Self::Double(api) => api.url(),
            Self::Real(plane) => plane.url(),
        }
    }

    async fn create(&self, name: &str) -> anyhow::Result<()> {
        let spec = json!({"node": {"name": name}, "pool": {"name": "worker"}, "configVersion": {"desired": "r-1"}});
        match self {
            Self::Double(api) => {
                api.store().set_mcns(Crd::ImageMode, true);
                api.store().create_node(name, &[("example.org/first", "1")]);
                api.store().set_mcn(name, Some(spec));
            }
            Self::Real(plane) => {
                // Of a Node without any field, later writers are not recorded.
                let metadata = json!({"name": name, "annotations": {"example.org/first": "1"}});
                let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata});
                plane.admin().create("/api/v1/nodes", &node).await?;
                plane.admin().create(MCNS, &object("MachineConfigNode", name, spec)).await?;
            }
        }
        Ok(())
    }

    /// An annotation that somebody else sets.
    async fn annotate(&self, value: &str) -> anyhow::Result<()> {
        let patch = json!({"metadata": {"annotations": {"example.org/other": value}}});
        match self {
            Self::Double(api) => drop(api.store().patch_as("kubectl", "worker-0", patch)?),
            Self::Real(plane) => drop(plane.admin().merge(OWN, &patch).await?),
        }
        Ok(())
    }

    /// A report of the kubelet's.
    async fn heartbeat(&self, name: &str, number: u32) -> anyhow::Result<()> {
        match self {
            Self::Double(api) => api.store().heartbeat(name),
            Self::Real(plane) => {
                let condition = json!({"type": "Ready", "status": "True", "message": format!("report {number}")});
                let path = format!("/api/v1/nodes/{name}/status");
                plane.admin().strategic(&path, &json!({"status": {"conditions": [condition]}})).await?;
            }
        }
        Ok(())
    }

    async fn delete(&self) -> anyhow::Result<()> {
        match self {
            Self::Double(api) => ensure!(api.store().delete_node("worker-0"), "no node"),
            Self::Real(plane) => plane.admin().delete(OWN).await?,
        }
        Ok(())
    }

    async fn restart(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Double(api) => {
                api.stop().await;
                api.restart().await;
            }
            Self::Real(plane) => {
                plane.stop_program(Program::ApiServer, Signal::SIGKILL).await?;
                plane.start_program(Program::ApiServer).await?;
            }
        }
        Ok(())
    }
}

/// The answers of one server, by the name of the step.
struct Replay {
    side: Side,
    agent: reqwest::Client,
    answers: Vec<(String, Value)>,
    bookmarks: Vec<Value>,
}

impl Replay {
    async fn send(
        &self,
        method: Method,
        path: &str,
        accept: &str,
        body: Option<(&str, &str)>,
    ) -> anyhow::Result<Response> {
        let mut request = self.agent.request(method, self.side.url() + path).header(ACCEPT, accept);
        if let Some((kind, body)) = body {
            request = request.header(CONTENT_TYPE, kind).body(body.to_owned());
        }
        Ok(timeout(DEADLINE, request.send()).await??)
    }

    async fn step(
        &mut self,
        name: &str,
        method: Method,
        path: &str,
        accept: &str,
        body: Option<(&str, &str)>,
    ) -> anyhow::Result<Value> {
        let response = self.send(method, path, accept, body).await.with_context(|| name.to_owned())?;
        let (status, headers) = (response.status().as_u16(), headers(response.headers()));
        let text = response.text().await?;
        let body: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        self.answers.push((name.to_owned(), json!({"status": status, "headers": headers, "body": shape(&body)})));
        Ok(body)
    }

    async fn get(&mut self, name: &str, path: &str, accept: &str) -> anyhow::Result<Value> {
        self.step(name, Method::GET, path, accept, None).await
    }

    async fn patch(&mut self, name: &str, path: &str, patch: &Value) -> anyhow::Result<Value> {
        let path = format!("{path}?fieldManager=rebase-agent");
        self.step(name, Method::PATCH, &path, METADATA, Some((MERGE, &patch.to_string()))).await
    }

    /// Server-side apply of a MachineConfigNode's status.
    async fn apply(&mut self, name: &str, node: &str, status: Value) -> anyhow::Result<()> {
        let path = format!("{MCNS}/{node}/status?fieldManager=rebase-agent&force=true");
        let object = with_status(node, status);
        self.step(name, Method::PATCH, &path, FULL, Some((APPLY, &object.to_string()))).await.map(drop)
    }

    async fn event(&mut self, name: &str, path: &str, event: &Value) -> anyhow::Result<()> {
        self.step(name, Method::POST, path, FULL, Some((FULL, &event.to_string()))).await.map(drop)
    }

    async fn version(&self) -> anyhow::Result<u64> {
        let list: Value =
            serde_json::from_str(&self.send(Method::GET, LIST, METADATA_LIST, None).await?.text().await?)?;
        list["metadata"]["resourceVersion"].as_str().context("no version")?.parse().context("not a number")
    }

    /// Watches from `version` for `seconds`, while `meanwhile` happens.
    async fn watch(
        &mut self,
        name: &str,
        version: u64,
        seconds: u64,
        meanwhile: impl AsyncFnOnce(&Side) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let path =
            format!("{LIST}&watch=1&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds={seconds}");
        let response = self.send(Method::GET, &path, METADATA, None).await.with_context(|| name.to_owned())?;
        let (status, headers) = (response.status().as_u16(), headers(response.headers()));
        meanwhile(&self.side).await?;
        let text =
            timeout(DEADLINE, response.text()).await.with_context(|| format!("{name}: the watch does not end"))??;
        let mut events = Vec::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            let event = json!({"type": event["type"], "object": shape(&event["object"])});
            // Any write to the database, of the server's own leases too, may cause one.
            if event["type"] == "BOOKMARK" {
                self.bookmarks.push(event);
            } else {
                events.push(event);
            }
        }
        self.answers.push((name.to_owned(), json!({"status": status, "headers": headers, "events": events})));
        Ok(())
    }

    /// One request with another client certificate, or none.
    async fn stranger(&mut self, name: &str, pki: &Pki, pem: Option<(String, String)>) -> anyhow::Result<()> {
        let stranger = client(pki, pem)?;
        let agent = std::mem::replace(&mut self.agent, stranger);
        let asked = self.get(name, LIST, METADATA_LIST).await;
        self.agent = agent;
        asked.map(drop)
    }
}

fn client(pki: &Pki, pem: Option<(String, String)>) -> anyhow::Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder().no_proxy().user_agent("rebase-agent/0");
    builder = builder.tls_certs_only([Certificate::from_pem(pki.ca_pem().as_bytes())?]);
    if let Some((certificate, key)) = pem {
        builder = builder.identity(Identity::from_pkcs8_pem(certificate.as_bytes(), key.as_bytes())?);
    }
    Ok(builder.build()?)
}

fn headers(headers: &HeaderMap) -> Value {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    json!({"content-type": text(CONTENT_TYPE), "retry-after": text(RETRY_AFTER), "date": text(DATE).is_some()})
}

/// What an agent can see of a body: kinds, names, annotations, who wrote them, errors. Identifiers, versions and times
/// differ from server to server, and so do messages, which are for people.
fn shape(body: &Value) -> Value {
    let text = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
    let version =
        |metadata: &Value| metadata["resourceVersion"].as_str().is_some_and(|version| version.parse::<u64>().is_ok());
    let metadata = &body["metadata"];
    let kind = json!([body["kind"], body["apiVersion"]]);
    if body["kind"] == "Status" {
        return json!({
            "kind": kind, "status": body["status"], "reason": body["reason"], "code": body["code"],
            "message": text(&body["message"]),
        });
    }
    if let Some(items) = body["items"].as_array() {
        return json!({"kind": kind, "version": version(metadata), "items": items.iter().map(shape).collect::<Vec<_>>()});
    }
    if metadata["name"].is_null() {
        return json!({"kind": kind, "version": version(metadata)});
    }
    if body["kind"] == "Event" {
        let about = [&body["involvedObject"], &body["reason"], &body["message"], &body["type"], &body["source"]];
        return json!({"kind": kind, "name": metadata["name"], "namespace": metadata["namespace"], "about": about});
    }
    let mcn =
        |field: &str| if body["kind"] == "MachineConfigNode" { body["status"][field].clone() } else { Value::Null };
    let written: Vec<_> = metadata["managedFields"].as_array().into_iter().flatten().collect();
    let applied = written.iter().find(|entry| entry["manager"] == "rebase-agent" && entry["operation"] == "Apply");
    let ours = written.iter().filter(|entry| entry["manager"] == "rebase-agent").map(|entry| {
        let fields = &entry["fieldsV1"]["f:metadata"]["f:annotations"];
        let fields: Vec<_> = fields.as_object().into_iter().flat_map(|fields| fields.keys()).collect();
        json!({"operation": entry["operation"], "time": text(&entry["time"]), "fields": fields})
    });
    json!({
        "kind": kind, "version": version(metadata), "uid": text(&metadata["uid"]), "name": metadata["name"],
        "annotations": metadata["annotations"], "ours": ours.collect::<Vec<_>>(),
        "deleted": metadata["deletionTimestamp"].is_string(), "spec": body["spec"].is_object(),
        "status": body["status"].is_object(), "unschedulable": body["spec"]["unschedulable"],
        "conditions": mcn("conditions"), "configVersion": mcn("configVersion"), "configImage": mcn("configImage"),
        "applied": applied.map(|entry| json!([entry["subresource"], entry["fieldsV1"]])),
    })
}

/// The log of requests.
async fn replay(pki: &Pki, side: Side) -> anyhow::Result<Vec<(String, Value)>> {
    let user = "system:node:worker-0";
    let nodes = ["system:nodes"];
    side.create("worker-0").await?;
    side.create("worker-1").await?;
    let agent = client(pki, Some(pki.client(user, &nodes)))?;
    let mut replay = Replay { side, agent, answers: Vec::new(), bookmarks: Vec::new() };
    let annotations = |value: Value| json!({"metadata": {"annotations": value}});

    // Reads.
    let list = replay.get("list of our Node", LIST, METADATA_LIST).await?;
    let uid = list["items"][0]["metadata"]["uid"].clone();
    replay.get("list of another Node", "/api/v1/nodes?fieldSelector=metadata.name%3Dworker-1", METADATA_LIST).await?;
    replay.get("list of all Nodes", "/api/v1/nodes", METADATA_LIST).await?;
    replay.get("list by an unknown field", "/api/v1/nodes?fieldSelector=spec.nothing%3Dx", METADATA_LIST).await?;
    replay.get("list as a single object", LIST, METADATA).await?;
    replay.get("whole Node", OWN, FULL).await?;
    replay.get("whole Node of another", OTHER, FULL).await?;
    replay.get("one Node as a list", OWN, METADATA_LIST).await?;
    replay.get("a path that is not there", "/api/v1/nothing", FULL).await?;

    // Writes.
    let ours = json!({"metadata": {"uid": uid, "annotations": {"example.org/ours": "1", "example.org/gone": "x"}}});
    replay.patch("own annotations", OWN, &ours).await?;
    replay.patch("own annotations once more", OWN, &ours).await?;
    replay.patch("removal of an annotation", OWN, &annotations(json!({"example.org/gone": null}))).await?;
    let stranger = json!({"metadata": {"uid": "00000000-0000-0000-0000-000000000000", "annotations": {"a": "b"}}});
    replay.patch("another uid", OWN, &stranger).await?;
    replay.patch("annotation of another Node", OTHER, &annotations(json!({"a": "b"}))).await?;
    replay
        .patch("annotation of a Node that is not there", "/api/v1/nodes/worker-9", &annotations(json!({"a": "b"})))
        .await?;
    replay.patch("annotation that is a number", OWN, &annotations(json!({"a": 1}))).await?;
    replay.patch("annotation with a bad key", OWN, &annotations(json!({"a b": "c"}))).await?;
    replay.patch("annotations that are too large", OWN, &annotations(json!({"a": "x".repeat(300 * 1024)}))).await?;
    let label = json!({"metadata": {"labels": {"node-restriction.kubernetes.io/a": "b"}}});
    replay.patch("restricted label", OWN, &label).await?;
    let taint = json!({"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}});
    replay.patch("taint", OWN, &taint).await?;
    replay.step("patch that is not JSON", Method::PATCH, OWN, METADATA, Some((MERGE, "{"))).await?;
    replay.step("delete", Method::DELETE, OWN, FULL, None).await?;

    machine_config_nodes(&mut replay).await?;
    events(&mut replay).await?;

    // Credentials.
    replay.stranger("no certificate", pki, None).await?;
    let expired = pki.client_valid(user, &nodes, -2 * DAY, -DAY);
    replay.stranger("expired certificate", pki, Some(expired)).await?;
    let foreign = Pki::new().client(user, &nodes);
    replay.stranger("certificate of another authority", pki, Some(foreign)).await?;
    replay.stranger("certificate of another node", pki, Some(pki.client("system:node:worker-1", &nodes))).await?;
    replay.stranger("certificate without the group", pki, Some(pki.client(user, &[]))).await?;

    // Watches.
    let version = replay.version().await?;
    replay
        .watch("watch of changes", version, 4, async |side| {
            side.annotate("1").await?;
            side.heartbeat("worker-0", 1).await?;
            side.heartbeat("worker-1", 1).await
        })
        .await?;
    replay.watch("watch from an earlier version", version, 4, async |_| Ok(())).await?;
    // The last report, of another Node, is news without an event.
    ensure!(!replay.bookmarks.is_empty(), "the watch ended without a bookmark");
    let version = replay.version().await?;
    replay.watch("watch in silence", version, 4, async |_| Ok(())).await?;
    replay.watch("watch from a future version", version + 1_000_000, 4, async |_| Ok(())).await?;
    let other = "/api/v1/nodes?fieldSelector=metadata.name%3Dworker-1&watch=1&timeoutSeconds=2";
    replay.get("watch of another Node", other, METADATA).await?;
    replay.side.annotate("2").await?;
    replay.side.restart().await?;
    replay.watch("watch from a version before a restart", version, 4, async |_| Ok(())).await?;
    replay.watch("watch from an old version", 1, 4, async |_| Ok(())).await?;
    let version = replay.version().await?;
    replay.watch("watch of a deletion", version, 4, async |side| side.delete().await).await?;
    replay.get("list of a deleted Node", LIST, METADATA_LIST).await?;
    replay.get("deleted Node", OWN, FULL).await?;
    replay.patch("annotation of a deleted Node", OWN, &annotations(json!({"a": "b"}))).await?;
    replay.bookmarks.dedup();
    replay.answers.push(("bookmarks".to_owned(), json!(replay.bookmarks)));
    Ok(replay.answers)
}

/// What a node applies to its MachineConfigNode.
fn with_status(node: &str, status: Value) -> Value {
    let mut object = object("MachineConfigNode", node, Value::Null);
    object["status"] = status;
    object.as_object_mut().expect("an object").remove("spec");
    object
}

async fn machine_config_nodes(replay: &mut Replay) -> anyhow::Result<()> {
    let condition = |kind: &str, status: &str| {
        let time = "2026-11-29T12:00:00Z";
        json!({"type": kind, "status": status, "reason": kind, "message": "for the test", "lastTransitionTime": time})
    };
    let image = |name: &str| format!("{name}@sha256:{}", "ab".repeat(32));
    let (good, versions) = (image("quay.io/o/i"), json!({"current": "r-1", "desired": "r-2"}));
    let (updated, well) = (condition("Updated", "True"), condition("NodeDegraded", "False"));
    let both = json!({
        "conditions": [updated, well], "configVersion": versions,
        "configImage": {"currentImage": good, "desiredImage": good},
    });
    // The real server enforces a new policy after a while.
    for attempt in 0.. {
        let path = format!("{MCNS}/worker-1/status?fieldManager=rebase-agent&force=true");
        let forged = with_status("worker-1", json!({"conditions": [updated]}));
        let answer = replay.send(Method::PATCH, &path, FULL, Some((APPLY, &forged.to_string()))).await?;
        if answer.status() == 403 {
            break;
        }
        ensure!(attempt < 100, "a node may write another's MachineConfigNode");
        sleep(POLL).await;
    }
    replay.get("own MachineConfigNode", &format!("{MCNS}/worker-0"), FULL).await?;
    replay.get("MachineConfigNode that is not there", &format!("{MCNS}/worker-9"), FULL).await?;
    replay.apply("status of a MachineConfigNode", "worker-0", both.clone()).await?;
    replay.apply("the same status again", "worker-0", both.clone()).await?;
    replay.apply("status with one condition less", "worker-0", json!({"conditions": [updated]})).await?;
    replay.apply("status of another node", "worker-1", both.clone()).await?;
    replay.apply("field that the CRD lacks", "worker-0", json!({"nothing": 1})).await?;
    for name in ["quay/i", "quay.io/o/p/i"] {
        let status = json!({"configImage": {"desiredImage": image(name)}});
        replay.apply(&format!("image with the name {name}"), "worker-0", status).await?;
    }
    let mut half = updated.clone();
    half.as_object_mut().context("an object")?.remove("reason");
    replay.apply("condition without a reason", "worker-0", json!({"conditions": [half]})).await?;
    let mut odd = updated;
    odd["reason"] = json!("no word");
    replay.apply("condition with an odd reason", "worker-0", json!({"conditions": [odd]})).await?;
    replay.apply("no config", "worker-0", json!({"configVersion": {"current": "r-1"}})).await?;
    replay.get("own MachineConfigNode afterwards", &format!("{MCNS}/worker-0"), FULL).await.map(drop)
}

async fn events(replay: &mut Replay) -> anyhow::Result<()> {
    let event = |name: &str, namespace: &str| {
        let mut about = json!({"kind": "Node", "apiVersion": "v1", "name": "worker-0"});
        if !namespace.is_empty() {
            about["namespace"] = json!(namespace);
        }
        json!({
            "kind": "Event", "apiVersion": "v1", "metadata": {"name": name}, "involvedObject": about, "reason": "Reboot",
            "message": "for the test", "type": "Normal", "source": {"component": "rebase-agent", "host": "worker-0"},
            "firstTimestamp": "2026-11-29T12:00:00Z", "lastTimestamp": "2026-11-29T12:00:00Z", "count": 1,
        })
    };
    replay.event("event", EVENTS, &event("worker-0.1", "")).await?;
    replay.event("the same event again", EVENTS, &event("worker-0.1", "")).await?;
    replay.event("event about another namespace", EVENTS, &event("worker-0.2", "elsewhere")).await?;
    replay.event("event with a bad name", EVENTS, &event("worker 0", "")).await
}

/// Replays the log against both, and compares.
pub(super) async fn scenario(stage: &Stage) -> anyhow::Result<Outcome> {
    let pki = Pki::new();
    let options = Options { programs: stage.programs.clone(), gated: true };
    let plane = ControlPlane::start(&stage.directory.join("plane"), &pki, options).await?;
    plane.grant().await?;
    let double = replay(&pki, Side::Double(ApiServer::start(&pki, Events::new())?));
    let real = replay(&pki, Side::Real(Box::new(plane)));
    let (double, real) = tokio::join!(double, real);
    let (double, real) = (double.context("the double")?, real.context("the real server")?);
    let mut differences = String::new();
    for ((name, double), (_, real)) in double.iter().zip(&real) {
        if double != real {
            differences += &format!("\n{name}:\n  double {double}\n  real   {real}");
        }
    }
    ensure!(differences.is_empty(), "the double answers otherwise than the real server:{differences}");
    Ok(Outcome { note: format!("{} requests answered alike", real.len()), ..Outcome::default() })
}
