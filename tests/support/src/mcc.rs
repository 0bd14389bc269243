//! The machine-config-controller's part: choosing nodes and setting their targets, and answering drain requests. It
//! reacts to changes of the store and waits only where the original does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::apiserver::{ApiError, Store, rfc3339};

mod monitor;

/// The field manager of everything that the controllers write.
pub const MANAGER: &str = "machine-config-controller";

/// Prefix of the protocol's annotation keys.
pub const PREFIX: &str = "machineconfiguration.openshift.io/";

const TAINT: &str = "UpdateInProgress";
/// Set with the labels of the custom pool that a node was booted into.
const LABELS_APPLIED: &str = "customPoolLabelsApplied";

/// One annotation of the protocol, without the prefix in the key.
#[must_use]
pub fn annotation<'a>(node: &'a Value, key: &str) -> Option<&'a str> {
    node["metadata"]["annotations"].get(format!("{PREFIX}{key}"))?.as_str()
}

fn patch_of(annotations: &[(&str, Option<&str>)]) -> Value {
    let annotations: BTreeMap<_, _> =
        annotations.iter().map(|(key, value)| (format!("{PREFIX}{key}"), value)).collect();
    json!({"metadata": {"annotations": annotations}})
}

/// Whether current and desired config are set, not empty, and equal.
#[must_use]
pub fn is_node_config_done(node: &Value) -> bool {
    let current = annotation(node, "currentConfig").filter(|config| !config.is_empty());
    current.is_some() && current == annotation(node, "desiredConfig")
}

/// Whether neither image is set, or both are and are the same string.
#[must_use]
pub fn is_node_image_done(node: &Value) -> bool {
    match (annotation(node, "currentImage"), annotation(node, "desiredImage")) {
        (None, None) => true,
        (current, desired) => current.is_some_and(|current| !current.is_empty()) && current == desired,
    }
}

/// Whether config and image are done and the state is `Done`.
#[must_use]
pub fn is_node_done(node: &Value) -> bool {
    is_node_config_done(node) && is_node_image_done(node) && annotation(node, "state") == Some("Done")
}

/// Whether the node is Ready, without disk pressure, with a network, and schedulable.
#[must_use]
pub fn is_node_ready(node: &Value) -> bool {
    let conditions = node["status"]["conditions"].as_array();
    let good = |condition: &Value| match condition["type"].as_str() {
        Some("Ready") => condition["status"] == "True",
        Some("DiskPressure" | "NetworkUnavailable") => condition["status"] == "False",
        _ => true,
    };
    conditions.is_none_or(|conditions| conditions.iter().all(good)) && node["spec"]["unschedulable"] != true
}

/// Whether the update to another config failed. An update of the image alone never counts as failing.
#[must_use]
pub fn is_node_mcd_failing(node: &Value) -> bool {
    annotation(node, "currentConfig") != annotation(node, "desiredConfig") && is_degraded_state(node)
}

fn is_degraded_state(node: &Value) -> bool {
    matches!(annotation(node, "state"), Some("Degraded" | "Unreconcilable"))
}

/// Whether the node counts as unavailable for the pool.
#[must_use]
pub fn is_unavailable_for_update(node: &Value) -> bool {
    !is_node_ready(node) || (!is_node_done(node) && !is_node_mcd_failing(node))
}

/// The target of a pool's nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The rendered config.
    pub config: String,
    /// The pull specification of a layered pool's image.
    pub image: Option<String>,
}

/// Whether the node already has the target.
#[must_use]
pub fn is_targeted(node: &Value, target: &Target) -> bool {
    annotation(node, "desiredConfig") == Some(&target.config)
        && annotation(node, "desiredImage") == target.image.as_deref()
}

/// Whether the node may get the target: it does not have it yet, and it is ready.
#[must_use]
pub fn is_candidate(node: &Value, target: &Target) -> bool {
    !is_targeted(node, target) && is_node_ready(node)
}

/// All candidates and how many of them may be taken now. A `max_unavailable` of 0 counts as 1.
#[must_use]
pub fn get_all_candidates<'a>(nodes: &'a [Value], target: &Target, max_unavailable: usize) -> (Vec<&'a Value>, usize) {
    let unavailable = nodes.iter().filter(|node| is_unavailable_for_update(node)).count();
    let failing = nodes.iter().filter(|node| is_targeted(node, target) && is_node_mcd_failing(node)).count();
    let capacity = max_unavailable.max(1).saturating_sub(unavailable).saturating_sub(failing);
    if capacity == 0 {
        return (Vec::new(), 0);
    }
    (nodes.iter().filter(|node| is_candidate(node, target)).collect(), capacity)
}

/// The candidates that get the target now: by zone, then age, then name.
#[must_use]
pub fn get_candidates<'a>(nodes: &'a [Value], target: &Target, max_unavailable: usize) -> Vec<&'a Value> {
    let (mut candidates, capacity) = get_all_candidates(nodes, target, max_unavailable);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    candidates.sort_by_cached_key(|node| {
        let metadata = &node["metadata"];
        let zone = text(&metadata["labels"]["topology.kubernetes.io/zone"]);
        (zone, text(&metadata["creationTimestamp"]), text(&metadata["name"]))
    });
    candidates.truncate(capacity);
    candidates
}

/// A pool of nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// The pool's name.
    pub name: String,
    /// The nodes that may be in it; they need not exist yet.
    pub nodes: Vec<String>,
    /// The number of nodes that may be unavailable at a time; 0 counts as 1.
    pub max_unavailable: usize,
    /// `HighlyAvailable`, `SingleReplica` and so on.
    pub topology: String,
    /// The custom pools of the cluster. A node is in the first of them whose role it has, else in `worker`.
    pub custom: Vec<String>,
}

impl PoolSpec {
    /// A `HighlyAvailable` pool `worker` of these nodes that updates one at a time.
    #[must_use]
    pub fn worker(nodes: &[&str]) -> Self {
        Self {
            name: "worker".to_owned(),
            nodes: nodes.iter().map(|node| (*node).to_owned()).collect(),
            max_unavailable: 1,
            topology: "HighlyAvailable".to_owned(),
            custom: Vec::new(),
        }
    }
}

/// A pool's counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStatus {
    /// Nodes done with the target.
    pub updated: usize,
    /// Nodes in state `Degraded` or `Unreconcilable`.
    pub degraded: usize,
    /// Nodes that count against `max_unavailable`.
    pub unavailable: usize,
    /// All nodes.
    pub machine_count: usize,
}

#[derive(Clone, Debug, Default)]
struct PoolControl {
    target: Option<Target>,
    paused: bool,
    /// The last sync requested, and the last one done.
    asked: u64,
    synced: u64,
}

/// The node controller for one pool, until it is dropped.
pub struct PoolController {
    store: Store,
    pool: PoolSpec,
    control: watch::Sender<PoolControl>,
    task: JoinHandle<()>,
}

impl PoolController {
    /// Starts without a target. Must be called inside a Tokio runtime.
    #[must_use]
    pub fn start(store: Store, pool: PoolSpec) -> Self {
        let control = watch::Sender::new(PoolControl::default());
        let task = tokio::spawn(run_pool(store.clone(), pool.clone(), control.clone()));
        Self { store, pool, control, task }
    }

    /// Sets the target for all nodes; without an image the pool is not layered.
    pub fn set_target<'a>(&self, config: &str, image: impl Into<Option<&'a str>>) {
        let target = Target { config: config.to_owned(), image: image.into().map(str::to_owned) };
        self.control.send_modify(|control| control.target = Some(target));
    }

    /// While paused, no node gets a new target; nodes that have one continue.
    pub fn pause(&self, paused: bool) {
        self.control.send_modify(|control| control.paused = paused);
    }

    /// The pool's current counts.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        let nodes = nodes_of(&self.store, &self.pool);
        let target = self.control.borrow().target.clone();
        let count = |predicate: &dyn Fn(&Value) -> bool| nodes.iter().filter(|node| predicate(node)).count();
        PoolStatus {
            updated: count(&|node| {
                is_node_done(node) && target.as_ref().is_some_and(|target| is_targeted(node, target))
            }),
            degraded: count(&|node| {
                annotation(node, "desiredConfig").is_some_and(|config| !config.is_empty()) && is_degraded_state(node)
            }),
            unavailable: count(&is_unavailable_for_update),
            machine_count: nodes.len(),
        }
    }

    /// Waits until `predicate` accepts the counts; returns whether that happened within `deadline`.
    pub async fn wait_for_status(&self, deadline: Duration, predicate: impl Fn(&PoolStatus) -> bool) -> bool {
        let mut changed = self.store.changed();
        let wait = async {
            while !predicate(&self.status()) {
                let _ = changed.changed().await;
            }
        };
        timeout(deadline, wait).await.is_ok()
    }

    /// Waits until the controller has handled all writes and settings before this call.
    pub async fn settle(&self) {
        self.control.send_modify(|control| control.asked += 1);
        let asked = self.control.borrow().asked;
        let _ = self.control.subscribe().wait_for(|control| control.synced >= asked).await;
    }
}

impl Drop for PoolController {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn nodes_of(store: &Store, pool: &PoolSpec) -> Vec<Value> {
    let is_in = |node: &Value| {
        let has_role = |custom: &&String| !node["metadata"]["labels"][role(custom)].is_null();
        pool.custom.iter().find(has_role).map_or("worker", String::as_str) == pool.name
    };
    pool.nodes.iter().filter_map(|name| store.node(name)).filter(is_in).collect()
}

/// The label by which a custom pool selects its nodes.
fn role(pool: &str) -> String {
    format!("node-role.kubernetes.io/{pool}")
}

/// The custom pool that a node was booted into and is not yet labelled for: the owner of its `firstPivotConfig`, taken
/// from the name `rendered-<pool>-<hash>` here.
#[must_use]
pub fn booted_pool<'a>(node: &Value, custom: &'a [String]) -> Option<&'a String> {
    if annotation(node, LABELS_APPLIED).is_some() {
        return None;
    }
    let config = annotation(node, "firstPivotConfig")?.strip_prefix("rendered-")?;
    custom.iter().find(|pool| config.strip_prefix(pool.as_str()).is_some_and(|rest| rest.starts_with('-')))
}

async fn run_pool(store: Store, pool: PoolSpec, control: watch::Sender<PoolControl>) {
    let mut changed = store.changed();
    let mut controlled = control.subscribe();
    loop {
        changed.borrow_and_update();
        let now = controlled.borrow_and_update().clone();
        // A failed write (the node went away) is repeated at the next change.
        let _ = sync_pool(&store, &pool, &now);
        if now.synced < now.asked {
            control.send_modify(|control| control.synced = now.asked);
        }
        tokio::select! {
            _ = changed.changed() => {}
            _ = controlled.changed() => {}
        }
    }
}

fn sync_pool(store: &Store, pool: &PoolSpec, control: &PoolControl) -> Result<(), ApiError> {
    sync_mcns(store, pool);
    let Some(target) = control.target.as_ref().filter(|_| !control.paused) else { return Ok(()) };
    let mut nodes = nodes_of(store, pool);
    for node in &nodes {
        let name = node["metadata"]["name"].as_str().unwrap();
        if annotation(node, "controlPlaneTopology") != Some(&pool.topology) {
            store.patch_as(MANAGER, name, patch_of(&[("controlPlaneTopology", Some(&pool.topology))]))?;
        }
        // Set on nodes that wait for their turn, removed from nodes that have the target.
        let mut taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
        let before = taints.len();
        taints.retain(|taint| taint["key"] != TAINT);
        if !is_targeted(node, target) {
            taints.push(json!({"key": TAINT, "effect": "PreferNoSchedule"}));
        }
        if taints.len() != before {
            let taints = if taints.is_empty() { Value::Null } else { Value::Array(taints) };
            store.patch_as(MANAGER, name, json!({"spec": {"taints": taints}}))?;
        }
    }
    // A candidate that was booted into a custom pool gets that pool's label instead of the target.
    let (candidates, _) = get_all_candidates(&nodes, target, pool.max_unavailable);
    let booted =
        candidates.iter().filter_map(|node| Some((node["metadata"]["name"].clone(), booted_pool(node, &pool.custom)?)));
    let booted: Vec<_> = booted.collect();
    for (name, custom) in &booted {
        let labels = json!({ role(custom): "" });
        let annotations = json!({ format!("{PREFIX}{LABELS_APPLIED}"): "" });
        let patch = json!({"metadata": {"labels": labels, "annotations": annotations}});
        store.patch_as(MANAGER, name.as_str().unwrap(), patch)?;
    }
    nodes.retain(|node| booted.iter().all(|(name, _)| *name != node["metadata"]["name"]));
    for node in get_candidates(&nodes, target, pool.max_unavailable) {
        let name = node["metadata"]["name"].as_str().unwrap();
        let wanted = [("desiredConfig", Some(target.config.as_str())), ("desiredImage", target.image.as_deref())];
        monitor::set_spec(store, name, &pool.name, Some(&target.config), target.image.as_deref());
        store.patch_as(MANAGER, name, patch_of(&wanted))?;
    }
    Ok(())
}

/// The operator's part: a MachineConfigNode for each Node, and none for a Node that is gone.
fn sync_mcns(store: &Store, pool: &PoolSpec) {
    for name in &pool.nodes {
        match (store.node(name), store.mcn(name)) {
            (None, Some(_)) => store.set_mcn(name, None),
            (Some(node), None) => {
                monitor::set_spec(store, name, &pool.name, annotation(&node, "desiredConfig"), None);
            }
            _ => {}
        }
    }
}

/// The drain controller's delays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delays {
    /// From a change to the sync.
    pub enqueue: Duration,
    /// From a failure to the next attempt.
    pub retry: Duration,
    /// To evict a node's pods.
    pub evict: Duration,
    /// Time after which hanging evictions count as failed.
    pub give_up: Duration,
}

impl Delays {
    /// Too short to wait for, long enough to lose a race.
    #[must_use]
    pub const fn short() -> Self {
        Self {
            enqueue: Duration::from_millis(5),
            retry: Duration::from_millis(20),
            evict: Duration::from_millis(5),
            give_up: Duration::from_millis(100),
        }
    }
}

impl Default for Delays {
    /// The original's: 5 seconds, a minute, and 90 seconds for evictions, which take half a minute.
    fn default() -> Self {
        let [enqueue, retry, evict, give_up] = [5, 60, 30, 90].map(Duration::from_secs);
        Self { enqueue, retry, evict, give_up }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Evictions {
    blocked: bool,
    failing: bool,
}

#[derive(Default)]
struct DrainLog {
    drains: usize,
    evicted: usize,
    errors: Vec<String>,
    ongoing: BTreeSet<String>,
}

#[derive(Clone)]
struct Drainer {
    store: Store,
    delays: Delays,
    evictions: watch::Receiver<Evictions>,
    log: Arc<Mutex<DrainLog>>,
}

/// The drain controller, until it is dropped. Dropping it and starting another is a restart: its knowledge of running
/// drains is lost.
pub struct DrainController {
    evictions: watch::Sender<Evictions>,
    log: Arc<Mutex<DrainLog>>,
    task: JoinHandle<()>,
}

impl DrainController {
    /// Starts for all nodes of the store. Must be called inside a Tokio runtime.
    #[must_use]
    pub fn start(store: Store, delays: Delays) -> Self {
        let evictions = watch::Sender::new(Evictions::default());
        let log = Arc::<Mutex<DrainLog>>::default();
        let drainer = Drainer { store, delays, evictions: evictions.subscribe(), log: Arc::clone(&log) };
        let task = tokio::spawn(drainer.run());
        Self { evictions, log, task }
    }

    /// While blocked, evictions hang, as with a disruption budget that allows none. An attempt fails after
    /// [`Delays::give_up`], and the next one, for the request at that time, starts after [`Delays::retry`].
    pub fn block_drains(&self, blocked: bool) {
        self.evictions.send_modify(|evictions| evictions.blocked = blocked);
    }

    /// While failing, evictions fail and are retried after [`Delays::retry`].
    pub fn fail_drains(&self, failing: bool) {
        self.evictions.send_modify(|evictions| evictions.failing = failing);
    }

    /// The number of evictions that were started.
    #[must_use]
    pub fn drains(&self) -> usize {
        self.log.lock().unwrap().drains
    }

    /// The number of evictions that were finished.
    #[must_use]
    pub fn evicted(&self) -> usize {
        self.log.lock().unwrap().evicted
    }

    /// The failed drains that will be retried.
    #[must_use]
    pub fn errors(&self) -> Vec<String> {
        self.log.lock().unwrap().errors.clone()
    }
}

impl Drop for DrainController {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drainer {
    async fn run(self) {
        let mut changed = self.store.changed();
        let mut known: BTreeMap<String, (Option<String>, bool)> = BTreeMap::new();
        let mut queues: BTreeMap<String, Arc<Notify>> = BTreeMap::new();
        let mut workers = JoinSet::new();
        loop {
            changed.borrow_and_update();
            let nodes = self.store.nodes();
            known.retain(|name, _| nodes.iter().any(|node| node["metadata"]["name"] == **name));
            for node in nodes {
                let name = node["metadata"]["name"].as_str().unwrap().to_owned();
                let now = (annotation(&node, "desiredDrain").map(str::to_owned), node["spec"]["unschedulable"] == true);
                if known.get(&name) == Some(&now) {
                    continue;
                }
                known.insert(name.clone(), now);
                let queue = queues.entry(name.clone()).or_insert_with(|| {
                    let queue = Arc::new(Notify::new());
                    workers.spawn(self.clone().work(name, Arc::clone(&queue)));
                    queue
                });
                queue.notify_one();
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// One node's queue: any number of changes leads to one sync.
    async fn work(self, node: String, queue: Arc<Notify>) {
        let mut failed = false;
        loop {
            // An earlier change goes before the next attempt.
            let retry = async {
                if failed {
                    sleep(self.delays.retry).await;
                } else {
                    std::future::pending().await
                }
            };
            tokio::select! {
                () = queue.notified() => sleep(self.delays.enqueue).await,
                () = retry => {}
            }
            failed = match self.sync(&node).await {
                Ok(()) => false,
                Err(error) => {
                    self.log.lock().unwrap().errors.push(format!("{node}: {error}"));
                    true
                }
            };
        }
    }

    async fn sync(&self, name: &str) -> anyhow::Result<()> {
        let Some(node) = self.store.node(name) else { return Ok(()) };
        let desired = annotation(&node, "desiredDrain");
        if desired == annotation(&node, "lastAppliedDrain") {
            return Ok(());
        }
        let desired = desired.unwrap_or_default();
        match desired.split('-').next() {
            Some("drain") => self.drain(name).await?,
            Some("uncordon") => {
                self.cordon(name, false)?;
                monitor::write(
                    &self.store,
                    &node,
                    ("UpdateComplete", "True", "Uncordoned Node as part of completing upgrade phase"),
                    ("Uncordoned", "True", "UnCordoned node. The node is reporting Unschedulable = false"),
                );
                self.log.lock().unwrap().ongoing.remove(name);
            }
            verb => anyhow::bail!("unknown drain action {verb:?} in {desired:?}"),
        }
        self.store.patch_as(MANAGER, name, patch_of(&[("lastAppliedDrain", Some(desired))]))?;
        Ok(())
    }

    fn cordon(&self, name: &str, cordon: bool) -> Result<Value, ApiError> {
        self.store.patch_as(MANAGER, name, json!({"spec": {"unschedulable": cordon}}))
    }

    fn is_cordoned(&self, name: &str) -> bool {
        self.store.node(name).is_some_and(|node| node["spec"]["unschedulable"] == true)
    }

    async fn drain(&self, name: &str) -> anyhow::Result<()> {
        let ongoing = !self.log.lock().unwrap().ongoing.insert(name.to_owned());
        let told = |message: &str, child: (&str, &str, &str)| {
            let Some(node) = self.store.node(name) else { return };
            monitor::write(&self.store, &node, ("UpdateExecuted", "Unknown", message), child);
        };
        if !ongoing || !self.is_cordoned(name) {
            self.cordon(name, true)?;
            let cordoned = ("Cordoned", "True", "Cordoned node. The node is reporting Unschedulable = true");
            told("Cordoned Node as part of update executed phase", cordoned);
        }
        let begins = ("Drained", "Unknown", "Draining node. The drain will not be complete until it is acknowledged");
        told("Draining Node as part of update executed phase", begins);
        self.log.lock().unwrap().drains += 1;
        sleep(self.delays.evict).await;
        let mut evictions = self.evictions.clone();
        let released = evictions.wait_for(|evictions| !evictions.blocked || evictions.failing);
        let ended = timeout(self.delays.give_up, released).await.context("drain did not complete within timeout");
        let failing = ended.as_ref().is_ok_and(|evictions| evictions.as_ref().is_ok_and(|it| it.failing));
        if failing || ended.is_err() {
            told("Node Drain has not succeeded", ("Drained", "Unknown", "Error: Node Drain has not succeeded."));
        }
        ended??;
        anyhow::ensure!(!failing, "cannot evict pod as it would violate the pod's disruption budget");
        told(
            "Drained Node as part of update executed phase",
            ("Drained", "True", "Drained node. The drain is complete"),
        );
        self.log.lock().unwrap().evicted += 1;
        anyhow::ensure!(self.is_cordoned(name), "the node was uncordoned during the drain");
        self.log.lock().unwrap().ongoing.remove(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Event, Events};

    const DEADLINE: Duration = Duration::from_secs(10);

    fn node(annotations: &[(&str, &str)]) -> Value {
        let annotations: BTreeMap<_, _> =
            annotations.iter().map(|(key, value)| (format!("{PREFIX}{key}"), *value)).collect();
        let conditions = json!([{"type": "Ready", "status": "True"}, {"type": "DiskPressure", "status": "False"}]);
        json!({
            "metadata": {"name": "n", "annotations": annotations},
            "spec": {}, "status": {"conditions": conditions},
        })
    }

    fn done(config: &str, image: &str) -> Value {
        let (current, desired) = (("currentConfig", config), ("desiredConfig", config));
        node(&[current, desired, ("currentImage", image), ("desiredImage", image), ("state", "Done")])
    }

    fn target(config: &str, image: &str) -> Target {
        Target { config: config.into(), image: Some(image.into()) }
    }

    #[test]
    fn config_is_done_when_current_equals_desired() {
        assert!(is_node_config_done(&node(&[("currentConfig", "a"), ("desiredConfig", "a")])));
        assert!(!is_node_config_done(&node(&[("currentConfig", "a"), ("desiredConfig", "b")])));
        assert!(!is_node_config_done(&node(&[("currentConfig", ""), ("desiredConfig", "")])));
        assert!(!is_node_config_done(&node(&[("desiredConfig", "a")])));
        assert!(!is_node_config_done(&node(&[])));
    }

    #[test]
    fn image_is_done_when_absent_or_the_same_string() {
        assert!(is_node_image_done(&node(&[])));
        assert!(is_node_image_done(&node(&[("currentImage", "a"), ("desiredImage", "a")])));
        assert!(!is_node_image_done(&node(&[("currentImage", "a"), ("desiredImage", "b")])));
        assert!(!is_node_image_done(&node(&[("currentImage", ""), ("desiredImage", "")])));
        assert!(!is_node_image_done(&node(&[("desiredImage", "a")])));
        assert!(
            !is_node_image_done(&node(&[("currentImage", "a")])),
            "a current image without a desired one is not done"
        );
    }

    #[test]
    fn node_is_done_only_with_state_done() {
        let mut node = done("a", "i");
        assert!(is_node_done(&node));
        node["metadata"]["annotations"][format!("{PREFIX}state")] = json!("Working");
        assert!(!is_node_done(&node));
        node["metadata"]["annotations"].as_object_mut().unwrap().remove(&format!("{PREFIX}state"));
        assert!(!is_node_done(&node));
    }

    #[test]
    fn readiness_depends_on_conditions_and_cordon() {
        let good = done("a", "i");
        assert!(is_node_ready(&good));
        for (at, status) in [(0, "False"), (0, "Unknown"), (1, "True"), (1, "Unknown")] {
            let mut node = good.clone();
            node["status"]["conditions"][at]["status"] = json!(status);
            assert!(!is_node_ready(&node), "{at} {status}");
        }
        let mut cordoned = good;
        cordoned["spec"]["unschedulable"] = json!(true);
        assert!(!is_node_ready(&cordoned));
    }

    #[test]
    fn only_a_failed_config_counts_as_failing() {
        let failing = node(&[("currentConfig", "a"), ("desiredConfig", "b"), ("state", "Degraded")]);
        assert!(is_node_mcd_failing(&failing) && !is_unavailable_for_update(&failing));
        let image_only = node(&[
            ("currentConfig", "a"),
            ("desiredConfig", "a"),
            ("currentImage", "i"),
            ("desiredImage", "j"),
            ("state", "Degraded"),
        ]);
        assert!(!is_node_mcd_failing(&image_only) && is_unavailable_for_update(&image_only));
    }

    #[test]
    fn capacity_excludes_unavailable_and_failing_nodes() {
        let to = target("b", "j");
        let working =
            node(&[("currentConfig", "a"), ("desiredConfig", "b"), ("desiredImage", "j"), ("state", "Working")]);
        let failing =
            node(&[("currentConfig", "a"), ("desiredConfig", "b"), ("desiredImage", "j"), ("state", "Degraded")]);
        let old = done("a", "i");
        let count = |nodes: &[Value], max| {
            let (candidates, capacity) = get_all_candidates(nodes, &to, max);
            (candidates.len(), capacity)
        };
        assert_eq!(count(&[old.clone(), old.clone()], 0), (2, 1));
        assert_eq!(count(&[old.clone(), old.clone(), working.clone()], 1), (0, 0));
        assert_eq!(count(&[old.clone(), old.clone(), working.clone()], 2), (2, 1));
        assert_eq!(count(&[old.clone(), failing.clone()], 1), (0, 0));
        assert_eq!(count(&[old.clone(), failing, working], 3), (1, 1));
        assert_eq!(count(&[done("b", "j"), old], 1), (1, 1));
    }

    fn store(nodes: &[&str]) -> (Store, Events) {
        let events = Events::new();
        let store = Store::new(events.clone());
        for name in nodes {
            let keys = [("currentConfig", "a"), ("desiredConfig", "a"), ("currentImage", "i"), ("desiredImage", "i")];
            store.create_node(name, &[]);
            let keys = keys.iter().chain(&[("state", "Done")]).map(|(key, value)| (*key, Some(*value)));
            store.patch_as("machine-config-daemon", name, patch_of(&keys.collect::<Vec<_>>())).unwrap();
        }
        (store, events)
    }

    /// The agent's answer to a new target.
    fn finish(store: &Store, name: &str, config: &str, image: &str) {
        let keys = [("state", Some("Done")), ("currentConfig", Some(config)), ("currentImage", Some(image))];
        store.patch_as("rebase-agent", name, patch_of(&keys)).unwrap();
    }

    async fn until(store: &Store, name: &str, key: &str, value: &str) {
        store.wait_for_annotation(name, &format!("{PREFIX}{key}"), value, DEADLINE).await.unwrap();
    }

    #[tokio::test]
    async fn nodes_are_targeted_one_after_the_other() {
        let (store, events) = store(&["w0", "w1"]);
        let mut told = events.subscribe();
        let pool = PoolController::start(store.clone(), PoolSpec::worker(&["w0", "w1", "not-yet"]));
        pool.set_target("b", "j");
        until(&store, "w0", "desiredImage", "j").await;
        pool.settle().await;
        assert_eq!(annotation(&store.node("w1").unwrap(), "desiredImage"), Some("i"));
        assert_eq!(annotation(&store.node("w1").unwrap(), "controlPlaneTopology"), Some("HighlyAvailable"));
        assert_eq!(store.node("w1").unwrap()["spec"]["taints"][0]["key"], TAINT);
        assert!(store.node("w0").unwrap()["spec"].get("taints").is_none());
        let status = PoolStatus { updated: 0, degraded: 0, unavailable: 1, machine_count: 2 };
        assert_eq!(pool.status(), status);
        let both = std::iter::from_fn(|| told.try_recv().ok()).any(|event| {
            matches!(event, Event::NodeChanged { manager, changes, .. } if manager == MANAGER
                && changes.contains_key(&format!("{PREFIX}desiredConfig"))
                && changes.contains_key(&format!("{PREFIX}desiredImage")))
        });
        assert!(both, "config and image come in one write");

        finish(&store, "w0", "b", "j");
        until(&store, "w1", "desiredImage", "j").await;
        finish(&store, "w1", "b", "j");
        assert!(pool.wait_for_status(DEADLINE, |status| status.updated == 2 && status.unavailable == 0).await);
    }

    #[tokio::test]
    async fn a_node_booted_into_a_custom_pool_is_labelled_for_it() {
        let (store, _) = store(&["w0", "i0"]);
        store.patch_as("rebase-agent", "i0", patch_of(&[("firstPivotConfig", Some("rendered-infra-1"))])).unwrap();
        store.patch_as("rebase-agent", "w0", patch_of(&[("firstPivotConfig", Some("rendered-infrared-1"))])).unwrap();
        let custom = vec!["infra".to_owned()];
        let all = PoolSpec { max_unavailable: 2, custom, ..PoolSpec::worker(&["w0", "i0"]) };
        let workers = PoolController::start(store.clone(), all.clone());
        let infra = PoolController::start(store.clone(), PoolSpec { name: "infra".to_owned(), ..all });
        workers.set_target("rendered-worker-2", "j");
        until(&store, "w0", "desiredImage", "j").await;
        until(&store, "i0", LABELS_APPLIED, "").await;
        workers.settle().await;
        let node = store.node("i0").unwrap();
        assert_eq!(
            (annotation(&node, "desiredImage"), &node["metadata"]["labels"][role("infra")]),
            (Some("i"), &json!(""))
        );
        assert_eq!((workers.status().machine_count, infra.status().machine_count), (1, 1));
        infra.set_target("rendered-infra-2", "k");
        until(&store, "i0", "desiredImage", "k").await;
        // The label is set once: a removed label stays removed.
        store.patch_as("admin", "i0", json!({"metadata": {"labels": {role("infra"): null}}})).unwrap();
        finish(&store, "i0", "rendered-infra-2", "k");
        until(&store, "i0", "desiredImage", "j").await;
    }

    #[tokio::test]
    async fn pause_and_unready_nodes_stop_the_rollout() {
        let (store, _) = store(&["w0", "w1"]);
        let pool = PoolController::start(store.clone(), PoolSpec::worker(&["w0", "w1"]));
        pool.pause(true);
        pool.set_target("a", "j");
        pool.settle().await;
        assert_eq!(annotation(&store.node("w0").unwrap(), "desiredImage"), Some("i"));
        store.set_ready("w0", false);
        pool.pause(false);
        pool.settle().await;
        assert_eq!(pool.status().unavailable, 1);
        for name in ["w0", "w1"] {
            assert_eq!(annotation(&store.node(name).unwrap(), "desiredImage"), Some("i"), "w0 uses up the capacity");
        }
        store.set_ready("w0", true);
        until(&store, "w0", "desiredImage", "j").await;
        pool.set_target("a", None);
        pool.settle().await;
        assert_eq!(annotation(&store.node("w0").unwrap(), "desiredImage"), Some("j"), "not done, so no capacity");
    }

    fn ask(store: &Store, drain: &str) {
        store.patch_as("rebase-agent", "w0", patch_of(&[("desiredDrain", Some(drain))])).unwrap();
    }

    #[tokio::test]
    async fn drains_then_uncordons() {
        let (store, _) = store(&["w0"]);
        let drainer = DrainController::start(store.clone(), Delays::short());
        ask(&store, "drain-b");
        until(&store, "w0", "lastAppliedDrain", "drain-b").await;
        assert_eq!(store.node("w0").unwrap()["spec"]["unschedulable"], true);
        ask(&store, "uncordon-b");
        until(&store, "w0", "lastAppliedDrain", "uncordon-b").await;
        assert!(store.node("w0").unwrap()["spec"].get("unschedulable").is_none());
        assert_eq!((drainer.drains(), drainer.evicted()), (1, 1));
    }

    #[tokio::test]
    async fn foreign_uncordon_causes_another_drain() {
        let (store, _) = store(&["w0"]);
        let drainer = DrainController::start(store.clone(), Delays::short());
        drainer.block_drains(true);
        ask(&store, "drain-b");
        store.wait_for("w0", DEADLINE, |node| node["spec"]["unschedulable"] == true).await.unwrap();
        store.set_unschedulable("w0", false);
        drainer.block_drains(false);
        until(&store, "w0", "lastAppliedDrain", "drain-b").await;
        assert_eq!(store.node("w0").unwrap()["spec"]["unschedulable"], true);
        assert!(drainer.drains() >= 2);
    }

    #[tokio::test]
    async fn a_blocked_drain_can_be_withdrawn() {
        let (store, _) = store(&["w0"]);
        let drainer = DrainController::start(store.clone(), Delays::short());
        drainer.block_drains(true);
        ask(&store, "drain-b");
        store.wait_for("w0", DEADLINE, |node| node["spec"]["unschedulable"] == true).await.unwrap();
        ask(&store, "uncordon-b");
        until(&store, "w0", "lastAppliedDrain", "uncordon-b").await;
        assert_eq!(drainer.evicted(), 0);
    }

    #[tokio::test]
    async fn failed_drains_are_retried_without_limit() {
        let (store, _) = store(&["w0"]);
        let drainer = DrainController::start(store.clone(), Delays::short());
        drainer.fail_drains(true);
        ask(&store, "drain-b");
        let failed = async {
            while drainer.errors().len() < 2 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(DEADLINE, failed).await.unwrap();
        assert!(annotation(&store.node("w0").unwrap(), "lastAppliedDrain").is_none());
        drainer.fail_drains(false);
        until(&store, "w0", "lastAppliedDrain", "drain-b").await;
        ask(&store, "reboot-b");
        let before = drainer.errors().len();
        let failed = async {
            while drainer.errors().len() < before + 2 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(DEADLINE, failed).await.unwrap();
        assert!(drainer.errors().last().unwrap().contains("unknown drain action"));
    }
}
