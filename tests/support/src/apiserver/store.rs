//! The nodes, their history, and the switches that make the API server misbehave.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::ApiError;
use super::fields;
use super::mcn::Mcns;
use crate::events::{Event, Events};

const ANNOTATIONS_LIMIT: usize = 256 * 1024;

/// Which requests a fault applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every request for Nodes.
    Any,
    /// GET of Nodes that is not a watch.
    Read,
    /// Watches of Nodes.
    Watch,
    /// PATCH of Nodes.
    Write,
    /// Requests for MachineConfigNodes.
    Mcn,
    /// Requests for Events.
    Event,
}

/// A fault of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Refused with a `Status` object before anything is done.
    Status {
        /// The HTTP status.
        code: u16,
        /// The `Retry-After` header, in seconds.
        retry_after: Option<u32>,
    },
    /// Refused by a proxy in between, with a page that is not a `Status` object.
    Page {
        /// The HTTP status.
        code: u16,
        /// Sent as `text/html`.
        body: String,
    },
    /// Never answered; nothing is done.
    Hang,
    /// The connection closes without an answer; nothing is done.
    Drop,
    /// Carried out, and then the connection closes without an answer.
    Lost,
    /// Carried out, and the connection closes half-way through the answer. A watch ends in the middle of an event.
    Cut,
    /// Carried out after a while.
    Delay(Duration),
}

/// The way in which a watch learns that its resource version is older than the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expired {
    /// HTTP 200, then an `ERROR` event.
    Event,
    /// HTTP 410.
    Response,
}

/// One request that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestRecord {
    /// The method.
    pub method: String,
    /// Path and query as sent.
    pub path_and_query: String,
    /// The authenticated user, `system:anonymous` without a certificate, empty for a bad one.
    pub user: String,
    /// The `User-Agent` header.
    pub user_agent: String,
    /// The body, as far as it is text.
    pub body: String,
    /// The answer's status; 0 before there is one.
    pub status: u16,
    /// Bytes of the body sent to the connection so far; grows during a watch.
    pub bytes: u64,
    /// When it arrived.
    pub at: Instant,
}

impl RequestRecord {
    /// Whether this was a watch.
    #[must_use]
    pub fn is_watch(&self) -> bool {
        self.path_and_query.contains("watch=1") || self.path_and_query.contains("watch=true")
    }
}

/// The cluster's database at one point in time.
#[derive(Clone, Debug)]
pub struct Snapshot {
    version: u64,
    nodes: BTreeMap<String, Value>,
}

#[derive(Clone)]
pub(super) struct Change {
    pub version: u64,
    pub at: Instant,
    pub kind: &'static str,
    pub name: String,
    pub object: Value,
}

pub(super) struct State {
    pub version: u64,
    /// Changes up to this version have left the history.
    pub floor: u64,
    pub history: VecDeque<Change>,
    pub expired: Expired,
    /// `None`: bookmarks only shortly before a watch's end.
    pub bookmarks: Option<Duration>,
    /// How far the server's clock is ahead of this machine's, in seconds.
    pub clock: i64,
    pub requests: Vec<RequestRecord>,
    pub tokens: BTreeMap<String, (String, Vec<String>)>,
    /// The image of each pool that has a MachineOSConfig.
    pub pools: BTreeMap<String, String>,
    capacity: usize,
    window: Duration,
    pub nodes: BTreeMap<String, Value>,
    pub mcns: Mcns,
    /// The core/v1 Events, in the order of their creation.
    pub told: Vec<Value>,
    faults: Vec<(Scope, usize, Fault)>,
    watches: u64,
    mute_below: u64,
    frozen: bool,
    end_below: u64,
}

struct Inner {
    state: Mutex<State>,
    /// Held from a change until it is reported, so that events come in the order of the changes.
    order: Mutex<()>,
    events: Events,
    version: watch::Sender<u64>,
    /// Increased when a switch that open watches obey was changed.
    pub control: watch::Sender<u64>,
    down: watch::Sender<bool>,
}

/// The cluster's nodes. Clones share them.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

pub(super) enum Fate {
    Live,
    Mute,
    Ended,
}

impl Store {
    /// An empty cluster that reports every change to `events`. Listeners may read the store but not write to it.
    #[must_use]
    pub fn new(events: Events) -> Self {
        let state = State {
            version: 48_000,
            floor: 48_000,
            history: VecDeque::new(),
            expired: Expired::Event,
            bookmarks: Some(Duration::from_secs(59)),
            clock: 0,
            requests: Vec::new(),
            tokens: BTreeMap::new(),
            pools: BTreeMap::new(),
            capacity: 1000,
            window: Duration::from_secs(300),
            nodes: BTreeMap::new(),
            mcns: Mcns::default(),
            told: Vec::new(),
            faults: Vec::new(),
            watches: 0,
            mute_below: 0,
            frozen: false,
            end_below: 0,
        };
        Self(Arc::new(Inner {
            state: Mutex::new(state),
            order: Mutex::new(()),
            events,
            version: watch::Sender::new(48_000),
            control: watch::Sender::new(0),
            down: watch::Sender::new(false),
        }))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.0.state.lock().unwrap();
        state.trim();
        state
    }

    /// Registers a node as its kubelet does: Ready, schedulable, with these annotations (of manager `kubelet`).
    pub fn create_node(&self, name: &str, annotations: &[(&str, &str)]) {
        let annotations: Map<_, _> = annotations.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        let now = rfc3339();
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "lastHeartbeatTime": now, "lastTransitionTime": now});
        let object = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": name, "uid": uid(), "creationTimestamp": now, "annotations": annotations,
                "labels": {
                    "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
                    "node-role.kubernetes.io/worker": "", "topology.kubernetes.io/zone": "zone-a",
                },
            },
            "spec": {"providerID": format!("test:///{name}")},
            "status": {
                "conditions": [
                    condition("MemoryPressure", "False"), condition("DiskPressure", "False"),
                    condition("PIDPressure", "False"), condition("Ready", "True"),
                ],
                "nodeInfo": {"architecture": "amd64", "bootID": uid(), "kubeletVersion": "v1.36.0", "operatingSystem": "linux"},
            },
        });
        self.write("kubelet", name, false, |old| match old {
            Some(_) => Err(ApiError::new(409, Some(name), format!("nodes \"{name}\" already exists"))),
            None => Ok(Some(object)),
        })
        .unwrap();
    }

    /// Removes a node; returns whether it existed.
    pub fn delete_node(&self, name: &str) -> bool {
        self.write("admin", name, false, |old| if old.is_some() { Ok(None) } else { Err(ApiError::not_found(name)) })
            .is_ok()
    }

    /// The current state of a node.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<Value> {
        self.state().nodes.get(name).cloned()
    }

    /// All nodes, by name.
    #[must_use]
    pub fn nodes(&self) -> Vec<Value> {
        self.list(None).1
    }

    /// The version, and all nodes or the one of this name.
    pub(super) fn list(&self, name: Option<&str>) -> (u64, Vec<Value>) {
        let state = self.state();
        let selected = state.nodes.iter().filter(|(node, _)| name.is_none_or(|name| name == *node));
        (state.version, selected.map(|(_, node)| node.clone()).collect())
    }

    /// One annotation of a node.
    #[must_use]
    pub fn annotation(&self, name: &str, key: &str) -> Option<String> {
        Some(self.state().nodes.get(name)?["metadata"]["annotations"].get(key)?.as_str()?.to_owned())
    }

    /// Merges `patch` into a node as an administrator or a controller under the field manager `manager`.
    ///
    /// # Errors
    /// The error that the API server would answer.
    pub fn patch_as(&self, manager: &str, name: &str, patch: Value) -> Result<Value, ApiError> {
        self.patch(manager, name, &patch, None)
    }

    /// Sets or removes one annotation as `manager`.
    ///
    /// # Errors
    /// The error that the API server would answer.
    pub fn annotate(&self, manager: &str, name: &str, key: &str, value: Option<&str>) -> Result<Value, ApiError> {
        self.patch_as(manager, name, json!({"metadata": {"annotations": {key: value}}}))
    }

    /// Reports the node ready or not, as the kubelet does.
    pub fn set_ready(&self, name: &str, ready: bool) {
        self.set_condition(name, "Ready", if ready { "True" } else { "Unknown" });
    }

    /// Sets the status of one condition.
    pub fn set_condition(&self, name: &str, kind: &str, status: &str) {
        self.write_status(name, |node| {
            let conditions = node["status"]["conditions"].as_array_mut().unwrap();
            if !conditions.iter().any(|condition| condition["type"] == kind) {
                conditions.push(json!({"type": kind}));
            }
            let condition = conditions.iter_mut().find(|condition| condition["type"] == kind).unwrap();
            if condition["status"] != status {
                condition["status"] = json!(status);
                condition["lastTransitionTime"] = json!(rfc3339());
            }
        });
    }

    /// Reports a boot, as the kubelet does.
    pub fn set_boot_id(&self, name: &str, boot_id: &str) {
        self.write_status(name, |node| node["status"]["nodeInfo"]["bootID"] = json!(boot_id));
    }

    /// Cordons or uncordons the node, as an administrator does.
    pub fn set_unschedulable(&self, name: &str, unschedulable: bool) {
        self.patch_as("kubectl", name, json!({"spec": {"unschedulable": unschedulable}})).unwrap();
    }

    /// The kubelet's status report: a new resource version without a relevant change.
    pub fn heartbeat(&self, name: &str) {
        self.write_status(name, |node| {
            let beat = node["status"]["beat"].as_u64().unwrap_or(0);
            node["status"]["beat"] = json!(beat + 1);
        });
    }

    /// The core/v1 Events, in the order of their creation.
    #[must_use]
    pub fn told(&self) -> Vec<Value> {
        self.state().told.clone()
    }

    /// Creates a core/v1 Event.
    pub(super) fn tell_event(&self, namespace: &str, mut event: Value) -> Result<Value, ApiError> {
        let refused =
            |code: u16, name: &str, why: String| ApiError { kind: "events", ..ApiError::new(code, Some(name), why) };
        let name = event["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        if event["apiVersion"] != "v1" || event["kind"] != "Event" {
            return Err(refused(400, &name, "the object provided is unrecognized".to_owned()));
        }
        let about = event["involvedObject"]["namespace"].as_str().unwrap_or_default().to_owned();
        if !(about == namespace || about.is_empty() && namespace == "default") {
            let why = format!("involvedObject.namespace: Invalid value: \"{about}\": does not match event.namespace");
            return Err(refused(422, &name, format!("Event \"{name}\" is invalid: {why}")));
        }
        let mut state = self.state();
        if state.told.iter().any(|known| known["metadata"]["name"] == name.as_str()) {
            return Err(ApiError {
                reason: "AlreadyExists",
                ..refused(409, &name, format!("events \"{name}\" already exists"))
            });
        }
        event["metadata"]["namespace"] = json!(namespace);
        event["metadata"]["uid"] = json!(uid());
        state.told.push(event.clone());
        Ok(event)
    }

    /// The server's time in an object.
    pub(super) fn date_rfc3339(&self) -> String {
        format_time(seconds().saturating_add_signed(self.state().clock))
    }

    /// Tells controllers about a change of something other than Nodes.
    pub(super) fn announce(&self, version: u64) {
        self.0.version.send_replace(version);
    }

    fn write_status(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        self.write("kubelet", name, true, |old| {
            let mut node = old.ok_or_else(|| ApiError::not_found(name))?.clone();
            edit(&mut node);
            Ok(Some(node))
        })
        .unwrap();
    }

    /// The store's resource version, with a notice of every new one.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    pub(super) fn controlled(&self) -> watch::Receiver<u64> {
        self.0.control.subscribe()
    }

    /// Waits until `predicate` holds for the node, at most `deadline`.
    ///
    /// # Errors
    /// With the node's annotations as they were at the deadline.
    pub async fn wait_for(&self, name: &str, deadline: Duration, predicate: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut changed = self.changed();
        let wait = async {
            loop {
                changed.borrow_and_update();
                if let Some(node) = self.node(name).filter(&predicate) {
                    return node;
                }
                changed.changed().await.unwrap();
            }
        };
        match tokio::time::timeout(deadline, wait).await {
            Ok(node) => Ok(node),
            Err(_) => {
                let node = self.node(name).with_context(|| format!("there is no node {name}"))?;
                bail!("node {name} is not as awaited after {deadline:?}: {:#}", node["metadata"]["annotations"])
            }
        }
    }

    /// Waits until an annotation has a value, at most `deadline`.
    ///
    /// # Errors
    /// As [`Store::wait_for`].
    pub async fn wait_for_annotation(&self, name: &str, key: &str, value: &str, deadline: Duration) -> Result<Value> {
        self.wait_for(name, deadline, |node| node["metadata"]["annotations"][key] == value).await
    }

    // Switches.

    /// The next `count` requests in `scope` meet `fault`. Faults queue; the first that applies is used up first.
    pub fn inject(&self, scope: Scope, count: usize, fault: Fault) {
        self.state().faults.push((scope, count, fault));
    }

    /// Removes all remaining faults.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    pub(super) fn next_fault(&self, scope: Scope) -> Option<Fault> {
        let mut state = self.state();
        let faults = &mut state.faults;
        let any = !matches!(scope, Scope::Mcn | Scope::Event);
        let at = faults.iter().position(|(wanted, _, _)| *wanted == scope || *wanted == Scope::Any && any)?;
        faults[at].1 = faults[at].1.saturating_sub(1);
        let fault = faults[at].2.clone();
        if faults[at].1 == 0 {
            faults.remove(at);
        }
        Some(fault)
    }

    /// While true, no watch sends anything, and connections stay open. A watch that was open then stays silent for
    /// good, as behind a half-open connection; a later one works.
    pub fn freeze_watches(&self, frozen: bool) {
        {
            let mut state = self.state();
            state.frozen = frozen;
            state.mute_below = state.watches;
        }
        self.0.control.send_modify(|n| *n += 1);
    }

    /// Ends all open watches properly, as a server does when it shuts down.
    pub fn end_watches(&self) {
        {
            let mut state = self.state();
            state.end_below = state.watches;
        }
        self.0.control.send_modify(|n| *n += 1);
    }

    pub(super) fn open_watch(&self) -> u64 {
        let mut state = self.state();
        state.watches += 1;
        state.watches - 1
    }

    pub(super) fn fate(&self, watch: u64) -> Fate {
        let state = self.state();
        if state.frozen || watch < state.mute_below {
            Fate::Mute
        } else if watch < state.end_below {
            Fate::Ended
        } else {
            Fate::Live
        }
    }

    /// Keeps the last `capacity` changes for watches.
    pub fn set_history(&self, capacity: usize) {
        let mut state = self.state();
        state.capacity = capacity;
        state.trim();
    }

    /// Keeps changes for this long, 300 s by default. Real servers keep between 75 and 300 s.
    pub fn set_history_window(&self, window: Duration) {
        self.state().window = window;
    }

    /// Sets how far the server's clock is ahead of this machine's, in seconds: its time stamps and its `Date`.
    pub fn set_clock(&self, ahead: i64) {
        self.state().clock = ahead;
    }

    /// The server's time for the `Date` header.
    pub(super) fn date(&self) -> String {
        let stamp = format_time(seconds().saturating_add_signed(self.state().clock));
        const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        let month = MONTHS[stamp[5..7].parse::<usize>().unwrap() - 1];
        // No client reads the weekday.
        format!("Sun, {} {month} {} {} GMT", &stamp[8..10], &stamp[..4], &stamp[11..19])
    }

    /// Forgets all changes so far, as a compaction does; a watch from an older resource version is expired.
    pub fn compact(&self) {
        let mut state = self.state();
        state.history.clear();
        state.floor = state.version;
    }

    /// Takes a backup.
    #[must_use]
    pub fn backup(&self) -> Snapshot {
        let state = self.state();
        Snapshot { version: state.version, nodes: state.nodes.clone() }
    }

    /// Restores a backup: later writes are lost, resource versions continue from the backup's, and open watches end.
    pub fn restore(&self, backup: &Snapshot) {
        let _order = self.0.order.lock().unwrap();
        let before = {
            let mut state = self.state();
            (state.version, state.floor) = (backup.version, backup.version);
            state.history.clear();
            std::mem::replace(&mut state.nodes, backup.nodes.clone())
        };
        let names = before.keys().chain(backup.nodes.keys()).collect::<BTreeSet<_>>();
        for name in names {
            self.tell("restore", name, before.get(name), backup.nodes.get(name));
        }
        self.0.version.send_replace(backup.version);
        self.end_watches();
    }

    /// Sets how expired watches fail.
    pub fn set_expired(&self, expired: Expired) {
        self.state().expired = expired;
    }

    /// Sets how often a watch that allows bookmarks gets one: with etcd 3.6 every 59 s, the default; with etcd 3.4
    /// (`None`) never. About 2 s before a watch's end there is always one.
    pub fn set_bookmarks(&self, period: impl Into<Option<Duration>>) {
        self.state().bookmarks = period.into();
    }

    /// Accepts this bearer token as `user`, a member of `groups`.
    pub fn accept_token(&self, token: &str, user: &str, groups: &[&str]) {
        let groups = groups.iter().map(|group| (*group).to_owned()).collect();
        self.state().tokens.insert(token.to_owned(), (user.to_owned(), groups));
    }

    /// Gives a pool a MachineOSConfig whose newest image is `image`. Before the first one, nodes have no right to read any.
    pub fn set_pool_image(&self, pool: &str, image: &str) {
        self.state().pools.insert(pool.to_owned(), image.to_owned());
    }

    /// Forgets all bearer tokens.
    pub fn revoke_tokens(&self) {
        self.state().tokens.clear();
    }

    /// Closes the listener and all connections, or opens the listener again on the same port, without any history.
    /// [`super::ApiServer::stop`] does the same and waits for it.
    pub fn set_down(&self, down: bool) {
        if !down {
            self.compact();
        }
        self.0.down.send_replace(down);
    }

    pub(super) fn downs(&self) -> watch::Receiver<bool> {
        self.0.down.subscribe()
    }

    /// Every request so far.
    #[must_use]
    pub fn requests(&self) -> Vec<RequestRecord> {
        self.state().requests.clone()
    }

    // Writing.

    /// Merges a patch; `node` is the node whose credentials made the request, to which `NodeRestriction` applies.
    pub(super) fn patch(
        &self,
        manager: &str,
        name: &str,
        patch: &Value,
        node: Option<&str>,
    ) -> Result<Value, ApiError> {
        if !patch.is_object() {
            return Err(ApiError::new(400, None, "error decoding patch: the patch is not an object"));
        }
        let written = self.write(manager, name, false, |old| {
            let old = old.ok_or_else(|| ApiError::not_found(name))?;
            if let Some(node) = node.filter(|node| *node != name) {
                let why = format!("node \"{node}\" is not allowed to modify node \"{name}\"");
                return Err(ApiError::forbidden(name, &why));
            }
            patched(old, name, patch, node).map(Some)
        })?;
        Ok(written.expect("a patch does not delete"))
    }

    fn write(
        &self,
        manager: &str,
        name: &str,
        status: bool,
        edit: impl FnOnce(Option<&Value>) -> Result<Option<Value>, ApiError>,
    ) -> Result<Option<Value>, ApiError> {
        let _order = self.0.order.lock().unwrap();
        let mut state = self.state();
        let old = state.nodes.get(name).cloned();
        let mut new = edit(old.as_ref())?;
        if old == new {
            return Ok(new);
        }
        state.version += 1;
        let version = state.version;
        let (kind, object) = match &mut new {
            None => {
                let mut last = old.clone().unwrap();
                last["metadata"]["resourceVersion"] = json!(version.to_string());
                state.nodes.remove(name);
                ("DELETED", last)
            }
            Some(node) => {
                let now = format_time(seconds().saturating_add_signed(state.clock));
                if status {
                    fields::touch_status(node, manager, &now);
                } else {
                    fields::update(old.as_ref(), node, manager, &now);
                }
                node["metadata"]["resourceVersion"] = json!(version.to_string());
                state.nodes.insert(name.to_owned(), node.clone());
                (if old.is_some() { "MODIFIED" } else { "ADDED" }, node.clone())
            }
        };
        state.history.push_back(Change { version, at: Instant::now(), kind, name: name.to_owned(), object });
        state.trim();
        drop(state);

        self.tell(manager, name, old.as_ref(), new.as_ref());
        self.0.version.send_replace(version);
        Ok(new)
    }

    fn tell(&self, manager: &str, name: &str, old: Option<&Value>, new: Option<&Value>) {
        let changes = difference(old, new);
        if !changes.is_empty() {
            let (manager, node) = (manager.to_owned(), name.to_owned());
            self.0.events.emit(Event::NodeChanged { manager, node, changes });
        }
    }
}

impl State {
    /// Forgets changes that are too many or too old; the original does it by time.
    fn trim(&mut self) {
        let window = self.window;
        let old = |change: &Change| change.at.elapsed() > window;
        while self.history.len() > self.capacity || self.history.front().is_some_and(old) {
            self.floor = self.history.pop_front().unwrap().version;
        }
    }
}

/// RFC 7386.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let target = target.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

fn patched(old: &Value, name: &str, patch: &Value, node: Option<&str>) -> Result<Value, ApiError> {
    let mut new = old.clone();
    merge(&mut new, patch);

    let (was, is) = (&old["metadata"], &new["metadata"]);
    if is["name"] != was["name"] {
        let why = "the name of the object does not match the name on the URL";
        return Err(ApiError::new(400, Some(name), why));
    }
    if let Some(asked) = is.get("uid").filter(|uid| **uid != was["uid"]) {
        let why = format!("metadata.uid: Invalid value: {asked}: field is immutable");
        return Err(ApiError::invalid(name, &why));
    }
    if is.get("resourceVersion").is_some_and(|version| *version != was["resourceVersion"]) {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        return Err(ApiError::conflict(name, why));
    }
    for key in ["uid", "resourceVersion", "creationTimestamp", "managedFields"] {
        if let Some(value) = was.get(key) {
            new["metadata"][key] = value.clone();
        }
    }
    // The main resource's strategy keeps the status.
    new["status"] = old["status"].clone();
    new["apiVersion"] = old["apiVersion"].clone();
    new["kind"] = old["kind"].clone();
    check_annotations(name, &new)?;
    check_spec(name, old, &mut new)?;
    if let Some(node) = node {
        restrict(name, node, old, &new)?;
    }
    Ok(new)
}

fn check_annotations(name: &str, new: &Value) -> Result<(), ApiError> {
    let Some(annotations) = new["metadata"].get("annotations") else { return Ok(()) };
    let Some(annotations) = annotations.as_object() else {
        return Err(ApiError::new(
            422,
            None,
            " \"\" is invalid: patch: Invalid value: annotations is no map of strings",
        ));
    };
    let mut size = 0;
    for (key, value) in annotations {
        let Some(value) = value.as_str() else {
            let why = "json: cannot unmarshal into Go struct field ObjectMeta.metadata.annotations of type string";
            return Err(ApiError::new(422, None, format!(" \"\" is invalid: patch: Invalid value: {why}")));
        };
        if !qualified(key) {
            let why = format!(
                "metadata.annotations: Invalid value: \"{key}\": name part must consist of alphanumeric characters, '-', '_' or '.'"
            );
            return Err(ApiError::invalid(name, &why));
        }
        size += key.len() + value.len();
    }
    if size > ANNOTATIONS_LIMIT {
        let why = format!("metadata.annotations: Too long: may not be more than {ANNOTATIONS_LIMIT} bytes");
        return Err(ApiError::invalid(name, &why));
    }
    Ok(())
}

fn qualified(key: &str) -> bool {
    let (prefix, local) = key.split_once('/').map_or((None, key), |(prefix, local)| (Some(prefix), local));
    let ends = |text: &str| {
        let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        alphanumeric(text.chars().next()) && alphanumeric(text.chars().last())
    };
    let local_ok = ends(local)
        && local.len() <= 63
        && local.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    let prefix_ok = prefix.is_none_or(|prefix| {
        ends(prefix)
            && prefix.len() <= 253
            && prefix.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.'))
    });
    local_ok && prefix_ok
}

fn check_spec(name: &str, old: &Value, new: &mut Value) -> Result<(), ApiError> {
    if !new["spec"].is_object() {
        new["spec"] = json!({});
    }
    let spec = new["spec"].as_object_mut().unwrap();
    match spec.get("unschedulable") {
        Some(Value::Bool(false)) => drop(spec.remove("unschedulable")),
        None | Some(Value::Bool(true)) => {}
        Some(_) => {
            return Err(ApiError::new(
                422,
                None,
                " \"\" is invalid: patch: Invalid value: spec.unschedulable is no bool",
            ));
        }
    }
    let rest = |spec: &Value| {
        let mut spec = spec.as_object().cloned().unwrap_or_default();
        spec.retain(|key, _| !matches!(key.as_str(), "unschedulable" | "taints"));
        spec
    };
    if rest(&old["spec"]) != rest(&new["spec"]) {
        return Err(ApiError::invalid(
            name,
            "spec: Forbidden: node updates may only change labels, taints, or capacity",
        ));
    }
    Ok(())
}

/// The admission plugin `NodeRestriction`, for changes that `node` makes to itself.
fn restrict(name: &str, node: &str, old: &Value, new: &Value) -> Result<(), ApiError> {
    if old["spec"].get("taints") != new["spec"].get("taints") {
        return Err(ApiError::forbidden(name, &format!("node \"{node}\" is not allowed to modify taints")));
    }
    let labels = |object: &Value| object["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    let (was, is) = (labels(old), labels(new));
    let changed = was.keys().chain(is.keys()).filter(|key| was.get(*key) != is.get(*key));
    let mut refused: Vec<_> = changed.filter(|key| restricted(key)).map(String::as_str).collect();
    refused.sort_unstable();
    refused.dedup();
    if !refused.is_empty() {
        let why = format!("is not allowed to modify labels: {}", refused.join(", "));
        return Err(ApiError::forbidden(name, &why));
    }
    Ok(())
}

fn restricted(label: &str) -> bool {
    const KUBELET: [&str; 12] = [
        "beta.kubernetes.io/arch",
        "beta.kubernetes.io/instance-type",
        "beta.kubernetes.io/os",
        "failure-domain.beta.kubernetes.io/region",
        "failure-domain.beta.kubernetes.io/zone",
        "kubernetes.io/arch",
        "kubernetes.io/hostname",
        "kubernetes.io/os",
        "node.kubernetes.io/instance-type",
        "topology.kubernetes.io/region",
        "topology.kubernetes.io/zone",
        "node.kubernetes.io/windows-build",
    ];
    let Some((prefix, _)) = label.split_once('/') else { return false };
    let within = |domain: &str| prefix == domain || prefix.ends_with(&format!(".{domain}"));
    (within("kubernetes.io") || within("k8s.io"))
        && !(within("node.kubernetes.io") || within("kubelet.kubernetes.io"))
        && !KUBELET.contains(&label)
}

fn difference(old: Option<&Value>, new: Option<&Value>) -> BTreeMap<String, Option<String>> {
    let view = |object: Option<&Value>| {
        let mut view = BTreeMap::new();
        if let Some(object) = object {
            for (key, value) in object["metadata"]["annotations"].as_object().into_iter().flatten() {
                view.insert(key.clone(), value.as_str().unwrap_or_default().to_owned());
            }
            let unschedulable = object["spec"]["unschedulable"] == true;
            view.insert("spec.unschedulable".to_owned(), unschedulable.to_string());
        }
        view
    };
    let (old, new) = (view(old), view(new));
    let changed = old.keys().chain(new.keys()).filter(|key| old.get(*key) != new.get(*key));
    changed.map(|key| (key.clone(), new.get(key).cloned())).collect()
}

pub(super) fn uid() -> String {
    let mut bytes = [0; 16];
    openssl::rand::rand_bytes(&mut bytes).unwrap();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-4{}-a{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..])
}

/// Now, in whole seconds.
pub(crate) fn rfc3339() -> String {
    format_time(seconds())
}

pub(super) fn seconds() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()
}

fn format_time(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, in eras of 400 years.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{date:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc3339() {
        assert_eq!(format_time(0), "1970-01-01T00:00:00Z");
        assert_eq!(format_time(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(format_time(1_798_761_599), "2026-12-31T23:59:59Z");
    }

    #[test]
    fn merging_follows_rfc7386() {
        let mut target = json!({"a": {"b": 1, "c": 2}, "d": [1]});
        merge(&mut target, &json!({"a": {"b": null, "e": {"f": null, "g": 1}}, "d": [2]}));
        assert_eq!(target, json!({"a": {"c": 2, "e": {"g": 1}}, "d": [2]}));
    }

    #[test]
    fn annotation_keys_are_qualified_names() {
        assert!(qualified("machineconfiguration.openshift.io/state"));
        assert!(qualified("plain"));
        assert!(!qualified("Upper.io/x"));
        assert!(!qualified("a/b/c"));
        assert!(!qualified("x/"));
    }
}
