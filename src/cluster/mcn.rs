//! Our own MachineConfigNode: people and the console look at it, and with the feature gate ImageModeStatusReporting MCC
//! counts it. [`Wanted::apply`] is pure and builds what is applied; [`Api::show`] applies it.
//!
//! The conditions and their meaning are MCO's: a step is False before it is reached, Unknown while it runs and True when
//! it is done. All of them are False again when `Updated` becomes True.

use std::collections::BTreeSet;

use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Api, ClusterError, FULL, MANAGER, Session};
use crate::decide::{Decision, Rule};
use crate::model::{NodeFacts, NodeState, printable};
use crate::report::effective;
use crate::time;

const APPLY_PATCH: &str = "application/apply-patch+yaml";
/// Longest message that the agent writes into a condition, in characters.
const MAX_MESSAGE: usize = 2000;
const UPDATED: &str = "Updated";
const DEGRADED: &str = "NodeDegraded";
const REBOOTED: &str = "RebootedNode";
const CONFIG_IMAGE: &str = "configImage";
/// The conditions that the drain controller sets and the node's daemon resets. MCC leaves out its write of `Uncordoned`
/// while `UpdateComplete` is still True from the update before.
const DRAIN: [&str; 4] = ["Cordoned", "Drained", "UpdateComplete", "Uncordoned"];

/// How far an update is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Begun,
    Prepared,
    Applying,
    Applied,
    Rebooting,
    Booted,
    Resumed,
    Updated,
}

/// The condition for one step of an update.
struct Step {
    kind: &'static str,
    reason: &'static str,
    /// The first phase in which it is Unknown, and its message.
    runs: Option<(Phase, &'static str)>,
    /// The first phase in which it is True, and its message.
    done: (Phase, &'static str),
    /// Exists only with, or only without, the feature gate.
    gate: Option<bool>,
}

const fn step(kind: &'static str, phase: Phase, done: &'static str) -> Step {
    Step { kind, reason: kind, runs: None, done: (phase, done), gate: None }
}

const fn applies(kind: &'static str, reason: &'static str, gate: bool) -> Step {
    let runs = Some((Phase::Applying, "The image is being staged while workloads run"));
    Step { kind, reason, runs, done: (Phase::Applied, "The image is staged"), gate: Some(gate) }
}

const STEPS: [Step; 8] = [
    step("UpdatePrepared", Phase::Prepared, "The signature of the image was verified"),
    Step {
        runs: Some((Phase::Applying, "The image is being staged, or the node is being drained")),
        ..step("UpdateExecuted", Phase::Rebooting, "The image is staged and the node is drained")
    },
    applies("AppliedFilesAndOS", "UpdateExecutedAppliedFilesAndOS", false),
    applies("AppliedFiles", "UpdateExecutedAppliedFiles", true),
    applies("AppliedOSImage", "UpdateExecutedAppliedOSImage", true),
    applies("ImagePulledFromRegistry", "ImagePulledFromRegistry", true),
    Step {
        runs: Some((Phase::Rebooting, "The node reboots into the image")),
        ..step(REBOOTED, Phase::Booted, "The node has booted the image")
    },
    step("Resumed", Phase::Resumed, "The node runs the image and its kubelet is active"),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Status {
    False,
    Unknown,
    True,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: Status,
    reason: String,
    message: String,
    last_transition_time: String,
}

/// The object as the API server shows it.
#[derive(Debug)]
pub struct Shown {
    conditions: Vec<Condition>,
    version: Value,
    image: Value,
    /// Whether the feature gate is on, if the object shows it.
    gate: Option<bool>,
    /// The conditions that we applied before. They are applied again: if one is left out, the API server removes those of
    /// its fields that no one else applied, and then refuses the rest as incomplete.
    ours: BTreeSet<String>,
}

impl Shown {
    /// Parses a MachineConfigNode.
    ///
    /// # Errors
    /// [`ClusterError::Confused`].
    pub fn parse(json: &[u8]) -> Result<Self, ClusterError> {
        #[derive(Default, Deserialize)]
        #[serde(default, rename_all = "camelCase")]
        struct Fields {
            conditions: Vec<Condition>,
            config_version: Value,
            config_image: Value,
        }
        #[derive(Deserialize)]
        struct Object {
            metadata: Value,
            #[serde(default)]
            spec: Fields,
            #[serde(default)]
            status: Fields,
        }
        let Object { metadata, spec, status } = serde_json::from_slice(json).map_err(|e| ClusterError::Confused {
            what: "the MachineConfigNode",
            why: printable(&e.to_string(), 200),
        })?;
        let managed = metadata.get("managedFields").and_then(Value::as_array).into_iter().flatten();
        let applied = managed
            .filter(|entry| {
                entry.get("manager").is_some_and(|it| it == MANAGER)
                    && entry.get("operation").is_some_and(|it| it == "Apply")
            })
            .filter_map(|entry| entry.pointer("/fieldsV1/f:status/f:conditions")?.as_object())
            .flat_map(|conditions| conditions.keys());
        // `k:{"type":"Updated"}`
        let key = |key: &String| serde_json::from_str::<Value>(key.strip_prefix("k:")?).ok()?.get("type").cloned();
        let ours = applied.filter_map(key).filter_map(|kind| Some(kind.as_str()?.to_owned())).collect();
        let has = |gate: bool| {
            let mut steps = STEPS.iter().filter(|step| step.gate == Some(gate));
            steps.any(|step| status.conditions.iter().any(|condition| condition.kind == step.kind))
        };
        let image_mode = !spec.config_image.is_null() || !status.config_image.is_null() || has(true);
        let gate = if image_mode { Some(true) } else { has(false).then_some(false) };
        let Fields { conditions, config_version, config_image } = status;
        Ok(Self { conditions, version: config_version, image: config_image, gate, ours })
    }

    fn get(&self, kind: &str) -> Option<&Condition> {
        self.conditions.iter().find(|condition| condition.kind == kind)
    }
}

/// What the state of the node's update says about `NodeDegraded`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Well,
    /// Still Degraded, although the current step does not fail. The sentence of the failure is kept.
    StillFailing,
    /// The reason word and the sentence.
    Fails(String, String),
}

/// What our MachineConfigNode should show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    node: String,
    /// `None` if the rule says nothing about the update.
    phase: Option<Phase>,
    /// The node was rebooted for this image.
    rebooted: bool,
    verdict: Verdict,
    /// Current and desired config.
    configs: [Option<String>; 2],
    /// Current and desired image.
    images: [Option<String>; 2],
}

impl Wanted {
    /// What `decision` says about the update; `None` if it says nothing. `staged` tells whether the desired image is staged.
    #[must_use]
    pub fn of(node: &NodeFacts, decision: &Decision, staged: bool) -> Option<Self> {
        let phase = match decision.rule {
            Rule::ConfigAhead | Rule::GivenUp | Rule::Verify | Rule::Unfit => Some(Phase::Begun),
            Rule::Fetch | Rule::Stage | Rule::Transaction | Rule::KernelArguments => Some(Phase::Applying),
            Rule::Hindrance | Rule::Drain if staged => Some(Phase::Applied),
            Rule::NoRoom | Rule::Hindrance | Rule::Drain => Some(Phase::Prepared),
            Rule::Reboot => Some(Phase::Rebooting),
            Rule::ArgumentsMissing | Rule::Health => Some(Phase::Booted),
            Rule::Uncordon | Rule::Settle => Some(Phase::Resumed),
            Rule::Done => Some(Phase::Updated),
            _ => None,
        };
        let fails = |state: &str| state == NodeState::Degraded.as_str() || state == NodeState::Unreconcilable.as_str();
        let state = match decision.state {
            Some(state) => Some(effective(node, state, decision.unsticks)),
            None => node.state.as_deref(),
        };
        let verdict = match decision.state {
            Some(state) if fails(state.as_str()) => {
                let sentence = format!("{}: {}", decision.reason, decision.message);
                Verdict::Fails(decision.reason.as_str().to_owned(), printable(&sentence, MAX_MESSAGE))
            }
            _ if state.is_some_and(fails) => Verdict::StillFailing,
            _ => Verdict::Well,
        };
        if phase.is_none() && !matches!(verdict, Verdict::Fails(..)) {
            return None;
        }
        Some(Self {
            node: node.name.clone(),
            phase,
            rebooted: node.attempt.as_ref().is_some_and(|attempt| Some(&attempt.image) == node.desired()),
            verdict,
            configs: [node.current_config.clone(), node.desired_config.clone()],
            images: [node.current_image.clone(), node.desired_image.as_ref().map(|image| image.as_str().to_owned())],
        })
    }

    /// Whether both are about the same desired image and config.
    #[must_use]
    pub fn has_target_of(&self, other: &Self) -> bool {
        (&self.configs[1], &self.images[1]) == (&other.configs[1], &other.images[1])
    }

    /// The object to apply; `None` if `shown` has all of it. `gate` tells whether the feature gate is on. Within one update no
    /// step goes back, because a restarted agent verifies a staged image again.
    #[must_use]
    pub fn apply(&self, shown: &Shown, gate: bool, now: u64) -> Option<Value> {
        let [_, config] = &self.configs;
        let [_, image] = &self.images;
        let target = image.as_deref().or(config.as_deref()).unwrap_or_default();
        let updating = printable(&format!("Node {} is being updated to {target}", self.node), MAX_MESSAGE);
        let same_update = shown.get(UPDATED).is_some_and(|it| it.status == Status::False && it.message == updating);
        let ends = self.phase == Some(Phase::Updated);
        let resets = ends || self.phase.is_some() && !same_update;

        // An unchanged status keeps its time, and its words too unless they are `exact`.
        let set = |kind: &str, status: Status, reason: &str, message: &str, exact: bool| {
            let before = shown.get(kind).filter(|before| before.status == status);
            if let Some(before) = before.filter(|before| !exact || before.message == message) {
                return before.clone();
            }
            let since = before.map_or_else(|| time::text(now), |before| before.last_transition_time.clone());
            let [kind, reason, message] = [kind, reason, message].map(str::to_owned);
            Condition { kind, status, reason, message, last_transition_time: since }
        };
        let reset = |kind: &str| match shown.get(kind) {
            Some(before) => {
                let message = printable(&format!("During the update to {target}: {}", before.message), MAX_MESSAGE);
                set(kind, Status::False, kind, &message, false)
            }
            None => {
                let message = format!("This node has not yet entered the {kind} phase");
                set(kind, Status::False, "NotYetOccurred", &message, false)
            }
        };
        let kept = |kind: &str| shown.get(kind).cloned().unwrap_or_else(|| reset(kind));

        let steps = STEPS.iter().filter(|step| step.gate.is_none_or(|only| only == gate)).map(|step| {
            let (status, message) = self.at(step);
            match shown.get(step.kind) {
                Some(before) if !resets && before.status > status => before.clone(),
                _ if status == Status::False => reset(step.kind),
                _ => set(step.kind, status, step.reason, message, false),
            }
        });
        let mut list: Vec<_> = steps.collect();
        list.push(match self.phase {
            None => kept(UPDATED),
            Some(Phase::Updated) => {
                set(UPDATED, Status::True, UPDATED, &format!("Node {} runs {target}", self.node), true)
            }
            Some(_) => set(UPDATED, Status::False, UPDATED, &updating, true),
        });
        list.push(match &self.verdict {
            Verdict::Well => reset(DEGRADED),
            Verdict::StillFailing => kept(DEGRADED),
            Verdict::Fails(reason, message) => set(DEGRADED, Status::True, reason, message, true),
        });
        for other in &shown.conditions {
            if list.iter().any(|condition| condition.kind == other.kind) {
            } else if resets && other.status != Status::False && DRAIN.contains(&other.kind.as_str()) {
                list.push(reset(&other.kind));
            } else if shown.ours.contains(&other.kind) {
                list.push(other.clone());
            }
        }

        let mut status = Map::new();
        if config.is_some() {
            status.insert("configVersion".to_owned(), pair(["current", "desired"], &self.configs));
        }
        if gate && self.images != [None, None] {
            status.insert(CONFIG_IMAGE.to_owned(), pair(["currentImage", "desiredImage"], &self.images));
        }
        let same = status.get("configVersion").is_none_or(|version| *version == shown.version)
            && status.get(CONFIG_IMAGE).is_none_or(|image| *image == shown.image)
            && list.iter().all(|condition| shown.get(&condition.kind) == Some(condition));
        status.insert("conditions".to_owned(), serde_json::to_value(list).ok()?);
        (!same).then(|| {
            json!({
                "apiVersion": "machineconfiguration.openshift.io/v1", "kind": "MachineConfigNode",
                "metadata": { "name": self.node }, "status": status,
            })
        })
    }

    /// The status of `step` in our phase, and its message.
    fn at(&self, step: &Step) -> (Status, &'static str) {
        match (self.phase, step.runs) {
            (None | Some(Phase::Updated), _) => (Status::False, ""),
            (Some(phase), _) if step.kind == REBOOTED && phase >= Phase::Booted && !self.rebooted => {
                (Status::False, "")
            }
            (Some(phase), _) if phase >= step.done.0 => (Status::True, step.done.1),
            (Some(phase), Some((first, message))) if phase >= first => (Status::Unknown, message),
            _ => (Status::False, ""),
        }
    }
}

fn pair(names: [&str; 2], values: &[Option<String>; 2]) -> Value {
    let filled =
        names.into_iter().zip(values).filter_map(|(name, value)| Some((name.to_owned(), json!(value.as_ref()?))));
    Value::Object(filled.collect())
}

impl Api {
    /// Applies what our MachineConfigNode does not show yet. The answer is a sentence if the object could be applied only
    /// in part.
    ///
    /// # Errors
    /// See [`ClusterError`]. [`obstacle`] tells those that last from those that pass.
    pub async fn show(&self, wanted: &Wanted, now: u64) -> Result<Option<String>, ClusterError> {
        let read = |session: &Session| session.mcn("");
        let (json, _, _) = self.ask(Method::GET, FULL, read, None).await?;
        let shown = Shown::parse(&json)?;
        let Some(mut object) = wanted.apply(&shown, shown.gate.unwrap_or(true), now) else { return Ok(None) };
        let refused = match self.apply(&object).await {
            Err(error) if error.to_string().contains(CONFIG_IMAGE) => error,
            answer => return answer.map(|()| None),
        };
        if let ClusterError::Refused(why) = refused {
            if let Some(status) = object.get_mut("status").and_then(Value::as_object_mut) {
                status.remove(CONFIG_IMAGE);
            }
            self.apply(&object).await?;
            return Ok(Some(format!(
                "the MachineConfigNode cannot show the image, because its CRD refuses the name: {why}. Push the image as \
                 HOST.DOMAIN/NAMESPACE/NAME, with at most one namespace"
            )));
        }
        // The field exists only with the feature gate, and the object did not show whether that is on.
        if let Some(object) = wanted.apply(&shown, false, now) {
            self.apply(&object).await?;
        }
        Ok(None)
    }

    async fn apply(&self, object: &Value) -> Result<(), ClusterError> {
        let url = |session: &Session| session.mcn(&format!("/status?fieldManager={MANAGER}&force=true"));
        self.ask(Method::PATCH, FULL, url, Some((APPLY_PATCH, object.to_string()))).await.map(|_| ())
    }
}

/// The sentence about an error that lasts until a person acts; `None` if it may pass by itself.
#[must_use]
pub fn obstacle(error: &ClusterError) -> Option<String> {
    match error {
        ClusterError::Forbidden(_) => Some(format!(
            "the MachineConfigNode is not written: {error}. `oc apply -k systemd/cluster` in the agent's checkout grants \
             this with rbac.yaml; the node is updated without it"
        )),
        ClusterError::NotFound(_) => Some(
            "the cluster has no MachineConfigNode for this node, so only the annotations show its update; the \
             machine-config-operator creates it: `oc get machineconfignodes`"
                .to_owned(),
        ),
        ClusterError::Refused(why) => Some(format!(
            "the MachineConfigNode is not written, because the API server refuses the object: {why}. Compare \
             `oc get crd machineconfignodes.machineconfiguration.openshift.io`; the node is updated without it"
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::Rule;
    use crate::model::{Action, Reason};

    const THEN: &str = "2026-11-29T12:00:00Z";
    const NOW: u64 = 1_795_953_600_000;

    fn image(hex: &str) -> String {
        format!("quay.io/o/i@sha256:{}", hex.repeat(32))
    }

    fn node(desired: &str, attempted: bool) -> NodeFacts {
        let attempt = json!({"image": image(desired), "bootID": "b", "count": 1});
        let mut node = json!({
            "name": "n", "desired_config": "r-2", "current_config": "r-1", "state": "Working",
            "desired_image": image(desired), "current_image": image("aa"),
        });
        if attempted {
            node["attempt"] = attempt;
        }
        serde_json::from_value(node).unwrap()
    }

    fn decision(rule: Rule, state: Option<NodeState>) -> Decision {
        let (action, reason, message) = (Action::Nothing, Reason::BootFull, "no room".to_owned());
        Decision { rule, action, reason, message, state, unsticks: false, wake: None, clock: None }
    }

    fn wanted(rule: Rule) -> Wanted {
        let state = if rule == Rule::Done { None } else { Some(NodeState::Working) };
        let attempted = rule >= Rule::Reboot || (Rule::ArgumentsMissing..=Rule::Settle).contains(&rule);
        Wanted::of(&node("bb", attempted), &decision(rule, state), rule >= Rule::KernelArguments).unwrap()
    }

    /// The object after the API server has merged `applied` into `before`.
    fn merged(before: &Value, applied: &Value) -> Value {
        let mut after = before.clone();
        for (key, value) in applied["status"].as_object().unwrap() {
            if key != "conditions" {
                after["status"][key] = value.clone();
            }
        }
        let mut list = before["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let mut owned = Map::new();
        for new in applied["status"]["conditions"].as_array().unwrap() {
            match list.iter_mut().find(|old| old["type"] == new["type"]) {
                Some(old) => *old = new.clone(),
                None => list.push(new.clone()),
            }
            owned.insert(format!("k:{}", json!({"type": new["type"]})), json!({}));
        }
        after["status"]["conditions"] = json!(list);
        let fields = json!({"f:status": {"f:conditions": owned}});
        after["metadata"]["managedFields"] = json!([{"manager": MANAGER, "operation": "Apply", "fieldsV1": fields}]);
        after
    }

    fn parse(object: &Value) -> Shown {
        Shown::parse(object.to_string().as_bytes()).unwrap()
    }

    fn status(object: &Value, kind: &str) -> String {
        let list = object["status"]["conditions"].as_array().unwrap();
        let found = list.iter().find(|condition| condition["type"] == kind);
        found.map_or("-", |condition| condition["status"].as_str().unwrap()).to_owned()
    }

    fn empty() -> Value {
        json!({"metadata": {"name": "n"}, "spec": {}, "status": {}})
    }

    #[test]
    fn each_step_of_an_update_shows_in_its_condition() {
        let mut object = empty();
        let kinds = ["Updated", "UpdatePrepared", "UpdateExecuted", "AppliedFilesAndOS", "RebootedNode", "Resumed"];
        for (rule, expected) in [
            (Rule::Done, "True False False False False False"),
            (Rule::Verify, "False False False False False False"),
            (Rule::Stage, "False True Unknown Unknown False False"),
            (Rule::Drain, "False True Unknown True False False"),
            // A restarted agent verifies again.
            (Rule::Verify, "False True Unknown True False False"),
            (Rule::Reboot, "False True True True Unknown False"),
            (Rule::Health, "False True True True True False"),
            (Rule::Uncordon, "False True True True True True"),
            (Rule::Done, "True False False False False False"),
        ] {
            let applied = wanted(rule).apply(&parse(&object), false, NOW);
            if let Some(applied) = &applied {
                object = merged(&object, applied);
            }
            assert_eq!(kinds.map(|kind| status(&object, kind)).join(" "), expected, "{rule}");
            assert_eq!(
                wanted(rule).apply(&parse(&object), false, NOW + 9000),
                None,
                "{rule}: nothing is written twice"
            );
        }
        assert_eq!(status(&object, "NodeDegraded"), "False");
        assert_eq!(object["status"]["configVersion"], json!({"current": "r-1", "desired": "r-2"}));
        assert_eq!(object["status"].get("configImage"), None);
    }

    #[test]
    fn the_feature_gate_decides_between_two_sets_of_conditions() {
        let mut object = empty();
        assert_eq!(parse(&object).gate, None);
        let applied = wanted(Rule::Drain).apply(&parse(&object), true, NOW).unwrap();
        object = merged(&object, &applied);
        assert_eq!(parse(&object).gate, Some(true));
        let kinds = ["AppliedOSImage", "AppliedFiles", "ImagePulledFromRegistry", "AppliedFilesAndOS"];
        assert_eq!(kinds.map(|kind| status(&object, kind)), ["True", "True", "True", "-"]);
        let images = json!({"currentImage": image("aa"), "desiredImage": image("bb")});
        assert_eq!(object["status"]["configImage"], images);
        let old = merged(&empty(), &wanted(Rule::Drain).apply(&parse(&empty()), false, NOW).unwrap());
        assert_eq!(parse(&old).gate, Some(false));
    }

    #[test]
    fn a_refusal_is_shown_with_its_sentence_until_the_node_recovers() {
        let mut object = empty();
        let mut facts = node("bb", false);
        for (rule, state, annotation, expected) in [
            (Rule::NoRoom, Some(NodeState::Degraded), "Working", "True"),
            // Degraded is kept in the annotation, so here too.
            (Rule::Stage, Some(NodeState::Working), "Degraded", "True"),
            (Rule::Done, None, "Done", "False"),
            (Rule::LayeringReverted, Some(NodeState::Unreconcilable), "Done", "True"),
        ] {
            facts.state = Some(annotation.to_owned());
            let wanted = Wanted::of(&facts, &decision(rule, state), false).unwrap();
            object = merged(&object, &wanted.apply(&parse(&object), false, NOW).unwrap());
            assert_eq!(status(&object, "NodeDegraded"), expected, "{rule}");
        }
        let shown = parse(&object);
        let degraded = shown.get(DEGRADED).unwrap();
        assert_eq!((degraded.reason.as_str(), degraded.message.as_str()), ("BootFull", "BootFull: no room"));
        assert_eq!(status(&object, "Updated"), "True", "a rule that says nothing about the update leaves it");
        assert!(Wanted::of(&facts, &decision(Rule::OtherDaemon, None), false).is_none());
    }

    #[test]
    fn times_change_only_with_the_status() {
        let object = merged(&empty(), &wanted(Rule::Verify).apply(&parse(&empty()), false, NOW).unwrap());
        let other = Wanted::of(&node("cc", false), &decision(Rule::Verify, Some(NodeState::Working)), false).unwrap();
        let after = merged(&object, &other.apply(&parse(&object), false, NOW + 60_000).unwrap());
        let (before, after) = (parse(&object), parse(&after));
        let (before, after) = (before.get(UPDATED).unwrap(), after.get(UPDATED).unwrap());
        assert_ne!(before.message, after.message);
        assert_eq!(before.last_transition_time, after.last_transition_time);
        assert_eq!(before.last_transition_time, time::text(NOW));
    }

    #[test]
    fn the_drain_controllers_conditions_are_reset_and_otherwise_kept() {
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "reason": kind, "message": "m", "lastTransitionTime": THEN});
        let mut object = empty();
        object["status"]["conditions"] =
            json!([condition("Cordoned", "True"), condition("UpdateComplete", "False"), condition("Other", "True")]);
        let kinds = |applied: &Value| -> Vec<String> {
            let list = applied["status"]["conditions"].as_array().unwrap();
            list.iter().map(|it| it["type"].as_str().unwrap().to_owned()).collect()
        };
        let begun = wanted(Rule::Verify).apply(&parse(&object), false, NOW).unwrap();
        assert!(kinds(&begun).contains(&"Cordoned".to_owned()), "{begun:#}");
        for kind in ["UpdateComplete", "Other"] {
            assert!(!kinds(&begun).contains(&kind.to_owned()), "{kind} is not ours");
        }
        object = merged(&object, &begun);
        assert_eq!(status(&object, "Cordoned"), "False");
        // The drain controller sets it again. The agent applied it once, so it goes on, with the controller's value.
        let list = object["status"]["conditions"].as_array_mut().unwrap();
        *list.iter_mut().find(|it| it["type"] == "Cordoned").unwrap() = condition("Cordoned", "True");
        let drained = wanted(Rule::Reboot).apply(&parse(&object), false, NOW).unwrap();
        let kept = drained["status"]["conditions"].as_array().unwrap();
        assert!(kept.contains(&condition("Cordoned", "True")), "{drained:#}");
    }
}
