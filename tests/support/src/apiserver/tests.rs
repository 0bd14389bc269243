use std::time::Duration;

use reqwest::{Certificate, Client, Identity, RequestBuilder, Response};
use serde_json::{Value, json};

use super::*;
use crate::events::{Event, Events};
use crate::pki::Pki;

const METADATA: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";
const DEADLINE: Duration = Duration::from_secs(10);

struct Cluster {
    pki: Pki,
    server: ApiServer,
    store: Store,
    client: Client,
    events: Events,
}

fn client(pki: &Pki, pem: Option<&str>) -> Client {
    let builder = Client::builder()
        .no_proxy()
        .user_agent("rebase-agent/0.1.0 (linux)")
        .tls_certs_only([Certificate::from_pem(pki.ca_pem().as_bytes()).unwrap()]);
    let Some(pem) = pem else { return builder.build().unwrap() };
    let key = openssl::pkey::PKey::private_key_from_pem(pem.as_bytes()).unwrap();
    let identity = Identity::from_pkcs8_pem(pem.as_bytes(), &key.private_key_to_pem_pkcs8().unwrap()).unwrap();
    builder.identity(identity).build().unwrap()
}

fn cluster() -> Cluster {
    let (pki, events) = (Pki::new(), Events::new());
    let server = ApiServer::start(&pki, events.clone()).unwrap();
    let store = server.store();
    store.create_node("worker-0", &[("machineconfiguration.openshift.io/state", "Done")]);
    store.create_node("worker-1", &[]);
    let client = client(&pki, Some(&pki.kubelet_pem("worker-0")));
    Cluster { pki, server, store, client, events }
}

impl Cluster {
    fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(format!("{}{path}", self.server.url())).header("accept", METADATA)
    }

    fn patch(&self, name: &str, patch: &Value) -> RequestBuilder {
        self.client
            .patch(format!("{}/api/v1/nodes/{name}?fieldManager=rebase-agent", self.server.url()))
            .header("accept", METADATA)
            .header("content-type", "application/merge-patch+json")
            .body(patch.to_string())
    }

    async fn watch(&self, more: &str) -> Watching {
        let path = format!("/api/v1/nodes?watch=true&fieldSelector=metadata.name%3Dworker-0{more}");
        Watching { response: self.get(&path).send().await.unwrap(), buffer: Vec::new() }
    }

    fn version(&self) -> String {
        self.store.node("worker-0").unwrap()["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
    }
}

async fn body(response: Response) -> (u16, Value) {
    (response.status().as_u16(), serde_json::from_slice(&response.bytes().await.unwrap()).unwrap())
}

async fn refused(request: RequestBuilder, code: u16, reason: &str, message: &str) {
    let (status, body) = body(request.send().await.unwrap()).await;
    assert_eq!((status, &body["code"], &body["reason"]), (code, &json!(code), &json!(reason)), "{body}");
    assert_eq!((&body["kind"], &body["status"]), (&json!("Status"), &json!("Failure")));
    assert!(body["message"].as_str().unwrap().contains(message), "{body}");
}

struct Watching {
    response: Response,
    buffer: Vec<u8>,
}

impl Watching {
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let chunk = tokio::time::timeout(DEADLINE, self.response.chunk()).await.unwrap().ok()??;
            self.buffer.extend_from_slice(&chunk);
        }
    }

    async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(150), self.response.chunk()).await.is_err()
    }
}

fn annotate(key: &str, value: Value) -> Value {
    json!({"metadata": {"annotations": {key: value}}})
}

#[tokio::test]
async fn get_and_list_answer_in_every_format() {
    let cluster = cluster();
    let (status, node) = body(cluster.get("/api/v1/nodes/worker-0").send().await.unwrap()).await;
    assert_eq!((status, &node["kind"]), (200, &json!("PartialObjectMetadata")));
    assert_eq!(node["apiVersion"], "meta.k8s.io/v1");
    assert_eq!(node["metadata"]["annotations"]["machineconfiguration.openshift.io/state"], "Done");
    assert!(node.get("spec").is_none() && node.get("status").is_none());

    let full = cluster.client.get(format!("{}/api/v1/nodes/worker-0", cluster.server.url()));
    let (_, node) = body(full.header("accept", "application/json").send().await.unwrap()).await;
    assert_eq!((&node["kind"], &node["status"]["conditions"][3]["type"]), (&json!("Node"), &json!("Ready")));

    let list = "/api/v1/nodes?fieldSelector=metadata.name%3Dworker-0";
    let request = cluster.client.get(format!("{}{list}", cluster.server.url()));
    let accept = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
    let (_, nodes) = body(request.header("accept", accept).send().await.unwrap()).await;
    assert_eq!((&nodes["kind"], nodes["items"].as_array().unwrap().len()), (&json!("PartialObjectMetadataList"), 1));
    assert_eq!(nodes["items"][0]["kind"], "PartialObjectMetadata");
    refused(cluster.get(list), 406, "NotAcceptable", "is a list").await;
    let record = cluster.server.requests().remove(0);
    assert_eq!((record.user.as_str(), record.status), ("system:node:worker-0", 200));
    assert!(record.bytes > 100 && record.user_agent.starts_with("rebase-agent/"));
}

#[tokio::test]
async fn node_credentials_reach_only_their_own_node() {
    let cluster = cluster();
    refused(cluster.get("/api/v1/nodes/worker-1"), 403, "Forbidden", "only its own Node object").await;
    refused(cluster.get("/api/v1/nodes"), 403, "Forbidden", "cannot list").await;
    refused(cluster.get("/api/v1/nodes?watch=1"), 403, "Forbidden", "cannot watch").await;
    refused(cluster.get("/api/v1/nodes?fieldSelector=metadata.name%3Dworker-1"), 403, "Forbidden", "").await;
    refused(cluster.get("/api/v1/secrets"), 403, "Forbidden", "").await;
    let patch = annotate("x", json!("y"));
    refused(cluster.patch("worker-1", &patch), 403, "Forbidden", "not allowed to modify node \"worker-1\"").await;
    let taints = json!({"spec": {"taints": [{"key": "x", "effect": "NoSchedule"}]}});
    refused(cluster.patch("worker-0", &taints), 403, "Forbidden", "taints").await;
    let label = json!({"metadata": {"labels": {"node-role.kubernetes.io/master": ""}}});
    refused(cluster.patch("worker-0", &label), 403, "Forbidden", "labels: node-role.kubernetes.io/master").await;
    let spec = json!({"spec": {"providerID": "other"}});
    refused(cluster.patch("worker-0", &spec), 422, "Invalid", "spec: Forbidden").await;
    assert_eq!(
        cluster.patch("worker-0", &json!({"spec": {"unschedulable": true}})).send().await.unwrap().status(),
        200
    );
    cluster.store.delete_node("worker-0");
    refused(cluster.get("/api/v1/nodes/worker-0"), 404, "NotFound", "nodes \"worker-0\" not found").await;
}

#[tokio::test]
async fn certificates_are_checked_for_each_request() {
    let cluster = cluster();
    let get = |client: &Client| client.get(format!("{}/api/v1/nodes/worker-0", cluster.server.url()));
    refused(get(&client(&cluster.pki, None)), 403, "Forbidden", "system:anonymous").await;
    let expired = cluster.pki.kubelet_pem_valid("worker-0", -7200, -3600);
    refused(get(&client(&cluster.pki, Some(&expired))), 401, "Unauthorized", "Unauthorized").await;
    let foreign = Pki::new().kubelet_pem("worker-0");
    refused(get(&client(&cluster.pki, Some(&foreign))), 401, "Unauthorized", "Unauthorized").await;
    let admin = cluster.pki.client_pem("admin", &["system:masters"], -60, 60);
    assert_eq!(get(&client(&cluster.pki, Some(&admin))).send().await.unwrap().status(), 200);
    let next = Pki::new();
    cluster.server.rotate(&next).unwrap();
    let fresh = client(&cluster.pki, Some(&cluster.pki.kubelet_pem("worker-0")));
    assert!(get(&fresh).send().await.unwrap_err().is_connect());
    assert_eq!(get(&client(&next, Some(&next.kubelet_pem("worker-0")))).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn patches_merge_with_preconditions_and_emit_events_before_the_answer() {
    let cluster = cluster();
    let mut told = cluster.events.subscribe();
    let (status, node) = body(cluster.patch("worker-0", &annotate("x", json!("y"))).send().await.unwrap()).await;
    assert_eq!((status, &node["kind"]), (200, &json!("PartialObjectMetadata")));
    assert_eq!(node["metadata"]["annotations"]["x"], "y");
    let Event::NodeChanged { manager, node: name, changes } = told.try_recv().unwrap() else { panic!() };
    assert_eq!((manager.as_str(), name.as_str()), ("rebase-agent", "worker-0"));
    assert_eq!(changes, [("x".to_owned(), Some("y".to_owned()))].into());

    let version = cluster.version();
    cluster.patch("worker-0", &annotate("x", json!("y"))).send().await.unwrap();
    assert_eq!(cluster.version(), version, "a patch without a change creates no version");
    assert!(told.try_recv().is_err());
    cluster.patch("worker-0", &annotate("x", Value::Null)).send().await.unwrap();
    assert_eq!(cluster.store.annotation("worker-0", "x"), None);

    let stale = json!({"metadata": {"resourceVersion": version, "annotations": {"x": "z"}}});
    refused(cluster.patch("worker-0", &stale), 409, "Conflict", "the object has been modified").await;
    let recreated = json!({"metadata": {"uid": "other", "annotations": {"x": "z"}}});
    refused(cluster.patch("worker-0", &recreated), 422, "Invalid", "field is immutable").await;
    let uid = cluster.store.node("worker-0").unwrap()["metadata"]["uid"].clone();
    let good = json!({"metadata": {"uid": uid, "resourceVersion": cluster.version(), "annotations": {"x": "z"}}});
    assert_eq!(cluster.patch("worker-0", &good).send().await.unwrap().status(), 200);

    refused(cluster.patch("worker-0", &annotate("x", json!(1))), 422, "Invalid", "").await;
    refused(cluster.patch("worker-0", &annotate("a b", json!("1"))), 422, "Invalid", "metadata.annotations").await;
    refused(cluster.patch("worker-0", &annotate("x", json!("z".repeat(262_144)))), 422, "Invalid", "Too long").await;
    let request = cluster.client.patch(format!("{}/api/v1/nodes/worker-0", cluster.server.url()));
    let request = request.header("content-type", "application/json").body("{}");
    refused(request, 415, "UnsupportedMediaType", "application/merge-patch+json").await;
    refused(cluster.patch("worker-0", &json!("x")), 400, "BadRequest", "").await;
}

#[tokio::test]
async fn managed_fields_name_the_last_writer_of_a_value() {
    let cluster = cluster();
    cluster.patch("worker-0", &annotate("x", json!("1"))).send().await.unwrap();
    let owners = |key: &str| {
        let node = cluster.store.node("worker-0").unwrap();
        let path = format!("/fieldsV1/f:metadata/f:annotations/f:{key}");
        let entries = node["metadata"]["managedFields"].as_array().unwrap().clone();
        let owning = entries.into_iter().filter(|entry| entry.pointer(&path).is_some());
        owning.map(|entry| entry["manager"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(owners("x"), ["rebase-agent"]);
    cluster.store.annotate("machine-config-daemon", "worker-0", "x", Some("1")).unwrap();
    assert_eq!(owners("x"), ["rebase-agent"], "an unchanged value keeps its manager");
    cluster.store.annotate("machine-config-daemon", "worker-0", "x", Some("2")).unwrap();
    assert_eq!(owners("x"), ["machine-config-daemon"]);
    let url = format!("{}/api/v1/nodes/worker-0", cluster.server.url());
    let patch = cluster.client.patch(url).header("content-type", "application/strategic-merge-patch+json");
    patch.body(annotate("y", json!("1")).to_string()).send().await.unwrap();
    assert_eq!(owners("y"), ["rebase-agent"], "the user agent up to the slash");
}

#[tokio::test]
async fn watches_replay_follow_and_end() {
    let cluster = cluster();
    let version = cluster.version();
    cluster.store.annotate("x", "worker-0", "a", Some("1")).unwrap();
    cluster.store.annotate("x", "worker-1", "a", Some("other")).unwrap();
    let mut replay =
        cluster.watch(&format!("&resourceVersion={version}&allowWatchBookmarks=true&timeoutSeconds=1")).await;
    let event = replay.next().await.unwrap();
    assert_eq!((&event["type"], &event["object"]["kind"]), (&json!("MODIFIED"), &json!("PartialObjectMetadata")));
    assert_eq!(event["object"]["metadata"]["annotations"]["a"], "1");
    cluster.store.heartbeat("worker-0");
    assert_eq!(replay.next().await.unwrap()["object"]["metadata"]["resourceVersion"], cluster.version());
    let bookmark = replay.next().await.unwrap();
    assert_eq!((&bookmark["type"], &bookmark["object"]["kind"]), (&json!("BOOKMARK"), &json!("PartialObjectMetadata")));
    assert_eq!(bookmark["object"]["metadata"]["resourceVersion"], cluster.version());
    assert_eq!(replay.next().await, None, "ends at the timeout");

    let mut fresh = cluster.watch("&resourceVersion=0").await;
    assert_eq!(fresh.next().await.unwrap()["type"], "ADDED");
    cluster.store.delete_node("worker-0");
    assert_eq!(fresh.next().await.unwrap()["type"], "DELETED");
    cluster.store.end_watches();
    assert_eq!(fresh.next().await, None);
}

#[tokio::test]
async fn expired_watches_fail_with_410_or_an_error_event() {
    let cluster = cluster();
    let version = cluster.version();
    cluster.store.set_history(1);
    cluster.store.heartbeat("worker-0");
    cluster.store.heartbeat("worker-0");
    let mut watch = cluster.watch(&format!("&resourceVersion={version}")).await;
    assert_eq!(watch.response.status(), 200);
    let error = watch.next().await.unwrap();
    assert_eq!(
        (&error["type"], &error["object"]["code"], &error["object"]["reason"]),
        (&json!("ERROR"), &json!(410), &json!("Expired"))
    );
    assert_eq!(watch.next().await, None);
    cluster.store.set_expired(Expired::Response);
    let path = format!("/api/v1/nodes?watch=true&fieldSelector=metadata.name%3Dworker-0&resourceVersion={version}");
    refused(cluster.get(&path), 410, "Expired", "too old resource version").await;
}

/// The history has a time limit: an idle node's own version expires, the version of a list does not.
#[tokio::test]
async fn versions_expire_by_time_and_by_a_restart() {
    let cluster = cluster();
    cluster.store.heartbeat("worker-1");
    let version = cluster.version();
    let listed = async || {
        let list =
            cluster.client.get(format!("{}/api/v1/nodes?fieldSelector=metadata.name%3Dworker-0", cluster.server.url()));
        let (_, list) = body(list.send().await.unwrap()).await;
        list["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
    };
    let first = async |version: &str| {
        cluster
            .watch(&format!("&allowWatchBookmarks=true&timeoutSeconds=1&resourceVersion={version}"))
            .await
            .next()
            .await
    };
    assert_eq!(first(&version).await.unwrap()["type"], "BOOKMARK", "the version is in the history");
    cluster.store.set_history_window(Duration::ZERO);
    assert_eq!(first(&version).await.unwrap()["object"]["reason"], "Expired");
    assert_eq!(first(&listed().await).await.unwrap()["type"], "BOOKMARK");
    cluster.store.set_history_window(Duration::from_secs(300));
    let version = listed().await;
    cluster.store.heartbeat("worker-1");
    cluster.server.stop().await;
    cluster.server.restart().await;
    assert_eq!(first(&version).await.unwrap()["object"]["reason"], "Expired");
    assert_eq!(first("999999").await, None, "a watch from a future version stays silent");
}

#[tokio::test]
async fn frozen_watches_stay_silent_and_later_ones_work() {
    let cluster = cluster();
    let mut watch = cluster.watch("").await;
    assert_eq!(watch.next().await.unwrap()["type"], "ADDED");
    cluster.store.freeze_watches(true);
    cluster.store.heartbeat("worker-0");
    assert!(watch.is_silent().await);
    cluster.store.freeze_watches(false);
    cluster.store.heartbeat("worker-0");
    assert!(watch.is_silent().await);
    assert_eq!(cluster.watch("").await.next().await.unwrap()["type"], "ADDED");
}

#[tokio::test]
async fn requests_fail_as_injected() {
    let cluster = cluster();
    let path = "/api/v1/nodes/worker-0";
    cluster.store.inject(Scope::Read, 1, Fault::Status { code: 429, retry_after: Some(7) });
    let response = cluster.get(path).send().await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["retry-after"]), (429, &"7".parse().unwrap()));
    cluster.store.inject(Scope::Any, 2, Fault::Status { code: 500, retry_after: None });
    refused(cluster.get(path), 500, "InternalError", "").await;
    refused(cluster.get(path), 500, "InternalError", "").await;
    cluster.store.inject(Scope::Read, 1, Fault::Page { code: 502, body: "<html>".into() });
    assert_eq!(cluster.get(path).send().await.unwrap().text().await.unwrap(), "<html>");
    cluster.store.inject(Scope::Read, 1, Fault::Cut);
    let response = cluster.get(path).send().await.unwrap();
    assert_eq!(response.status(), 200);
    response.bytes().await.unwrap_err();
    cluster.store.inject(Scope::Read, 1, Fault::Hang);
    assert!(cluster.get(path).timeout(Duration::from_millis(200)).send().await.unwrap_err().is_timeout());
    cluster.store.inject(Scope::Write, 1, Fault::Lost);
    assert_eq!(cluster.get(path).send().await.unwrap().status(), 200, "reads are not affected");
    cluster.patch("worker-0", &annotate("x", json!("1"))).send().await.unwrap_err();
    assert_eq!(
        cluster.store.annotation("worker-0", "x").unwrap(),
        "1",
        "the patch is applied although the answer is lost"
    );
    cluster.store.inject(Scope::Watch, 1, Fault::Cut);
    let mut watch = cluster.watch("").await;
    assert_eq!(watch.next().await, None);
    assert!(!watch.buffer.is_empty(), "half an event");
    assert_eq!(cluster.get(path).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn restarted_server_keeps_its_port() {
    let cluster = cluster();
    let mut watch = cluster.watch("").await;
    assert_eq!(watch.next().await.unwrap()["type"], "ADDED");
    cluster.server.stop().await;
    assert_eq!(watch.next().await, None);
    assert!(cluster.get("/readyz").send().await.unwrap_err().is_connect());
    cluster.server.restart().await;
    assert_eq!(cluster.get("/readyz").send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn wait_ends_with_the_change_or_the_deadline() {
    let store = Store::new(Events::new());
    store.create_node("worker-0", &[]);
    let writer = store.clone();
    let task = tokio::spawn(async move { writer.wait_for_annotation("worker-0", "a", "1", DEADLINE).await });
    store.annotate("x", "worker-0", "a", Some("1")).unwrap();
    task.await.unwrap().unwrap();
    let late = store.wait_for_annotation("worker-0", "a", "2", Duration::from_millis(10)).await;
    assert!(late.unwrap_err().to_string().contains("not as awaited"));
}

#[tokio::test]
async fn restored_backup_loses_later_changes_and_versions() {
    let cluster = cluster();
    let backup = cluster.store.backup();
    let version = cluster.version();
    cluster.store.annotate("x", "worker-0", "a", Some("1")).unwrap();
    let mut watch = cluster.watch(&format!("&resourceVersion={}", cluster.version())).await;
    cluster.store.restore(&backup);
    assert_eq!(watch.next().await, None);
    assert_eq!((cluster.version(), cluster.store.annotation("worker-0", "a")), (version, None));
}
