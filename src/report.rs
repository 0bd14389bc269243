//! Makes the smallest patch of our own Node's annotations that reports a decision. Pure.

use std::collections::BTreeMap;

use crate::decide::Decision;
use crate::model::annotations::{ATTEMPT, MCO, UNTRUSTED, VERIFIED};
use crate::model::{Action, Annotate, NodeFacts, NodeState, Verified, printable};

/// MCC's own limit for the reason annotation, in characters.
const MAX_REASON: usize = 2000;

/// Annotations to change: a full key and its new value, `None` to delete it.
pub type Patch = BTreeMap<String, Option<String>>;

/// The patch for `decision`; empty if the Node already has all values.
#[must_use]
pub fn report(node: &NodeFacts, decision: &Decision) -> Patch {
    let mut patch = Patch::new();
    let mut set = |key: &str, current: Option<&str>, value: &str| {
        if current != Some(value) {
            patch.insert(format!("{MCO}{key}"), Some(value.to_owned()));
        }
    };
    if let Some(state) = decision.state {
        set("state", node.state.as_deref(), effective(node, state, decision.unsticks));
        let reason = match state {
            NodeState::Done => String::new(),
            _ => printable(&format!("{}: {}", decision.reason, decision.message), MAX_REASON),
        };
        // A Done node that never had the annotation does not need an empty one.
        if !(reason.is_empty() && node.reason.is_none()) {
            set("reason", node.reason.as_deref(), &reason);
        }
    }
    let Action::Annotate(annotate) = &decision.action else { return patch };
    match annotate {
        Annotate::FirstBoot { annotations } => {
            for (key, value) in annotations {
                set(key, None, value);
            }
        }
        Annotate::RequestDrain { value } | Annotate::RequestUncordon { value } => {
            set("desiredDrain", node.desired_drain.as_deref(), value);
        }
        Annotate::Settle => {
            // In one patch: MCC reads a part of it as a node that is not done, or done with the wrong image.
            if let (Some(config), Some(image)) = (&node.desired_config, &node.desired_image) {
                set("currentConfig", node.current_config.as_deref(), config);
                set("currentImage", node.current_image.as_deref(), image.as_str());
            }
            if node.attempt.is_some() {
                patch.insert(ATTEMPT.to_owned(), None);
            }
            // It is about the image before.
            if node.untrusted.is_some() {
                patch.insert(UNTRUSTED.to_owned(), None);
            }
        }
        Annotate::RecordAttempt { attempt } => {
            // Serializing cannot fail: an Attempt has plain fields and parsed JSON.
            if let Ok(text) = serde_json::to_string(attempt) {
                patch.insert(ATTEMPT.to_owned(), Some(text));
            }
        }
        Annotate::ReportTrust { untrusted } => {
            if node.untrusted != *untrusted {
                patch.insert(UNTRUSTED.to_owned(), untrusted.clone());
            }
            // The policy that vouched for the image no longer does.
            if untrusted.is_some() && node.verified.is_some() {
                patch.insert(VERIFIED.to_owned(), None);
            }
        }
    }
    patch
}

/// Adds who vouched, unless the Node says so already. The time of an unchanged answer stays.
pub fn vouch(patch: &mut Patch, node: &NodeFacts, verified: &Verified) {
    let known = node.verified.as_ref().map(|known| (&known.image, &known.rule, &known.key));
    // Serializing cannot fail: it has four strings.
    if known != Some((&verified.image, &verified.rule, &verified.key))
        && let Ok(text) = serde_json::to_string(verified)
    {
        patch.insert(VERIFIED.to_owned(), Some(text));
    }
}

/// The state to write. Degraded and Unreconcilable stay until Done, as with the MCD: MCC treats a node that goes back to
/// Working as one that no longer fails.
pub(crate) fn effective(node: &NodeFacts, wanted: NodeState, unsticks: bool) -> &str {
    let sticky = [NodeState::Degraded.as_str(), NodeState::Unreconcilable.as_str()];
    match node.state.as_deref() {
        Some(current) if wanted == NodeState::Working && !unsticks && sticky.contains(&current) => current,
        Some(current)
            if wanted == NodeState::Degraded && current == NodeState::Unreconcilable.as_str() && !unsticks =>
        {
            current
        }
        _ => wanted.as_str(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::Rule;
    use crate::model::Reason;

    fn decision(state: Option<NodeState>, action: impl Into<Action>) -> Decision {
        Decision {
            rule: Rule::Stage,
            action: action.into(),
            reason: Reason::Staging,
            message: "m\u{1b}\n".repeat(2000),
            state,
            unsticks: false,
            wake: None,
            clock: None,
        }
    }

    #[test]
    fn says_nothing_twice() {
        let decision = decision(Some(NodeState::Working), Annotate::RequestDrain { value: "drain-r".into() });
        let mut node = NodeFacts::default();
        let patch = report(&node, &decision);
        assert_eq!(patch.len(), 3);
        let value = |key: &str| patch[&format!("{MCO}{key}")].clone();
        (node.state, node.reason, node.desired_drain) = (value("state"), value("reason"), value("desiredDrain"));
        assert!(report(&node, &decision).is_empty());
        let reason = node.reason.unwrap();
        assert!(reason.chars().count() <= MAX_REASON + 1 && !reason.contains(['\n', '\u{1b}']), "{reason}");
    }

    #[test]
    fn who_vouched_is_written_once_and_withdrawn_with_the_trust() {
        let image = "q.io/o/i@sha256:ab".to_owned();
        let now = |time: &str, key: &str| Verified {
            image: image.clone(),
            rule: "docker \"q.io\"".to_owned(),
            key: key.to_owned(),
            time: time.to_owned(),
        };
        let (mut node, mut patch) = (NodeFacts::default(), Patch::new());
        vouch(&mut patch, &node, &now("t1", "key sha256:1"));
        let text = patch.remove(VERIFIED).flatten().unwrap();
        assert_eq!(text, r#"{"image":"q.io/o/i@sha256:ab","rule":"docker \"q.io\"","key":"key sha256:1","time":"t1"}"#);
        node.verified = serde_json::from_str(&text).ok();
        vouch(&mut patch, &node, &now("t2", "key sha256:1"));
        assert!(patch.is_empty(), "the same answer at another time");
        vouch(&mut patch, &node, &now("t2", "key sha256:2"));
        assert!(patch.contains_key(VERIFIED));
        let withdrawn = decision(None, Annotate::ReportTrust { untrusted: Some("PolicyRejects: no".to_owned()) });
        assert_eq!(report(&node, &withdrawn).get(VERIFIED), Some(&None));
    }

    #[test]
    fn degraded_sticks_until_done() {
        let mut node = NodeFacts { state: Some("Degraded".into()), ..NodeFacts::default() };
        let state = |node: &NodeFacts, decision: &Decision| report(node, decision).remove(&format!("{MCO}state"));
        let mut working = decision(Some(NodeState::Working), Action::Nothing);
        assert_eq!(state(&node, &working), None);
        working.unsticks = true;
        assert_eq!(state(&node, &working), Some(Some("Working".into())));
        assert_eq!(state(&node, &decision(Some(NodeState::Done), Annotate::Settle)), Some(Some("Done".into())));
        node.state = Some("Unreconcilable".into());
        assert_eq!(state(&node, &decision(Some(NodeState::Degraded), Action::Nothing)), None);
        assert_eq!(state(&node, &decision(None, Action::Nothing)), None);
    }
}
