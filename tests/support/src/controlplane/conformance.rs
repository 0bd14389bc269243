//! The requests that agents make, and the mistakes they could make, sent to the double of the API server and to the real
//! one. Both must answer the same, or the tests on the double would prove little.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use reqwest::header::{ACCEPT, CONTENT_TYPE, DATE, HeaderMap, RETRY_AFTER};
use reqwest::{Certificate, Identity, Method, Response};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::scenarios::{Outcome, Stage};
use super::{ControlPlane, Options, Program};
use crate::apiserver::ApiServer;
use crate::events::Events;
use crate::pki::Pki;

const METADATA: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
const FULL: &str = "application/json";
const MERGE: &str = "application/merge-patch+json";

const OWN: &str = "/api/v1/nodes/worker-0";
const OTHER: &str = "/api/v1/nodes/worker-1";
const LIST: &str = "/api/v1/nodes?fieldSelector=metadata.name%3Dworker-0";
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
        match self {
            Self::Double(api) => api.store().create_node(name, &[("example.org/first", "1")]),
            Self::Real(plane) => {
                // Of a Node without any field, later writers are not recorded.
                let annotations = json!({"example.org/first": "1"});
                let node =
                    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "annotations": annotations}});
                plane.admin().create("/api/v1/nodes", &node).await?;
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
    async fn send(&self, method: Method, path: &str, accept: &str, body: Option<&str>) -> anyhow::Result<Response> {
        let mut request = self.agent.request(method, self.side.url() + path).header(ACCEPT, accept);
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, MERGE).body(body.to_owned());
        }
        Ok(timeout(DEADLINE, request.send()).await??)
    }

    async fn step(
        &mut self,
        name: &str,
        method: Method,
        path: &str,
        accept: &str,
        body: Option<&str>,
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
        self.step(name, Method::PATCH, &path, METADATA, Some(&patch.to_string())).await
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
    let written: Vec<_> = metadata["managedFields"].as_array().into_iter().flatten().collect();
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
    replay.step("patch that is not JSON", Method::PATCH, OWN, METADATA, Some("{")).await?;
    replay.step("delete", Method::DELETE, OWN, FULL, None).await?;

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

/// Replays the log against both, and compares.
pub(super) async fn scenario(stage: &Stage) -> anyhow::Result<Outcome> {
    let pki = Pki::new();
    let double = replay(&pki, Side::Double(ApiServer::start(&pki, Events::new())?)).await.context("the double")?;
    let options = Options { programs: stage.programs.clone(), gated: false, api_arguments: Vec::new() };
    let plane = ControlPlane::start(&stage.directory.join("plane"), &pki, options).await?;
    let real = replay(&pki, Side::Real(Box::new(plane))).await.context("the real server")?;
    let mut differences = String::new();
    for ((name, double), (_, real)) in double.iter().zip(&real) {
        if double != real {
            differences += &format!("\n{name}:\n  double {double}\n  real   {real}");
        }
    }
    ensure!(differences.is_empty(), "the double answers otherwise than the real server:{differences}");
    Ok(Outcome { note: format!("{} requests answered alike", real.len()), ..Outcome::default() })
}
