//! core/v1 Events about our Node. The kubelet's rights suffice for them.

use openssl::sha::sha256;
use reqwest::Method;
use serde_json::{Value, json};

use super::{Api, ClusterError, FULL, MANAGER, Session};
use crate::decide::Decision;
use crate::model::{NodeState, Reason, printable};
use crate::time;

/// Longest message, in characters: what the newer Events API allows.
const MAX_MESSAGE: usize = 1000;

/// An Event to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The word, which is the MCD's where the meaning is the same.
    pub word: &'static str,
    /// Whether its type is `Warning`.
    pub warns: bool,
    /// The sentence.
    pub message: String,
}

impl Event {
    /// The Event of a decision: every refusal, hold, veto, reboot and rollback, and the steps that the MCD reports.
    #[must_use]
    pub fn of(decision: &Decision) -> Option<Self> {
        let refuses = matches!(decision.state, Some(NodeState::Degraded | NodeState::Unreconcilable));
        let (word, warns) = match decision.reason {
            Reason::DrainStuck if refuses => ("FailedToDrain", true),
            Reason::UncordonLate if refuses => ("FailedToUncordon", true),
            reason if refuses => (reason.as_str(), true),
            reason @ (Reason::RunsUntrusted
            | Reason::RollbackQueued
            | Reason::PrefetchNoSpace
            | Reason::PrefetchFailed) => (reason.as_str(), true),
            reason @ (Reason::Held
            | Reason::Inhibited
            | Reason::UptimeFloor
            | Reason::RestoreSpread
            | Reason::StagedByOther
            | Reason::OtherDaemon
            | Reason::UncordonedByOther
            | Reason::ConfigAheadOfImage
            | Reason::Prefetching) => (reason.as_str(), false),
            Reason::Fetching | Reason::Staging => ("OSUpdateStarted", false),
            Reason::DrainPending => ("Drain", false),
            Reason::Rebooting => ("Reboot", false),
            Reason::Settling => ("NodeDone", false),
            _ => return None,
        };
        Some(Self { word, warns, message: decision.message.clone() })
    }

    /// A name for the same Event of the same boot, so that a restarted agent does not create it twice.
    #[must_use]
    pub fn name(&self, node: &str, boot: &str) -> String {
        let digest = sha256(format!("{boot}\n{}\n{}", self.word, self.message).as_bytes());
        let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        format!("{node}.{hex}")
    }

    /// The object. `kubectl describe node` finds Events by the Node's uid and without a namespace.
    #[must_use]
    pub fn object(&self, name: &str, node: &str, uid: &str, now: u64) -> Value {
        let (now, message) = (time::text(now), printable(&self.message, MAX_MESSAGE));
        json!({
            "apiVersion": "v1", "kind": "Event", "metadata": { "name": name, "namespace": "default" },
            "involvedObject": { "apiVersion": "v1", "kind": "Node", "name": node, "uid": uid },
            "type": if self.warns { "Warning" } else { "Normal" }, "reason": self.word, "message": message,
            "source": { "component": MANAGER, "host": node }, "count": 1, "firstTimestamp": now, "lastTimestamp": now,
            "reportingComponent": MANAGER, "reportingInstance": node,
        })
    }
}

impl Api {
    /// Creates an Event. One that exists already is no error.
    ///
    /// # Errors
    /// See [`ClusterError`].
    pub async fn tell(&self, object: &Value) -> Result<(), ClusterError> {
        let url = |session: &Session| format!("{}/api/v1/namespaces/default/events", session.access.server);
        match self.ask(Method::POST, FULL, url, Some((FULL, object.to_string()))).await {
            Err(ClusterError::Refused(why)) if why.contains("already exists") => Ok(()),
            answer => answer.map(|_| ()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::Rule;
    use crate::model::Action;

    fn decision(reason: Reason, state: Option<NodeState>) -> Decision {
        let message = "m\u{1b}\n".repeat(2000);
        let action = Action::Nothing;
        Decision { rule: Rule::Stage, action, reason, message, state, unsticks: false, wake: None, clock: None }
    }

    #[test]
    fn refusals_warn_and_steps_have_the_mcds_words() {
        let (working, degraded) = (Some(NodeState::Working), Some(NodeState::Degraded));
        for (reason, state, expected) in [
            (Reason::SignatureMissing, degraded, Some(("SignatureMissing", true))),
            (Reason::SignatureMissing, working, None),
            (Reason::RolledBack, degraded, Some(("RolledBack", true))),
            (Reason::LayeringReverted, Some(NodeState::Unreconcilable), Some(("LayeringReverted", true))),
            (Reason::DrainStuck, degraded, Some(("FailedToDrain", true))),
            (Reason::RunsUntrusted, None, Some(("RunsUntrusted", true))),
            (Reason::Held, working, Some(("Held", false))),
            (Reason::Inhibited, working, Some(("Inhibited", false))),
            (Reason::OtherDaemon, None, Some(("OtherDaemon", false))),
            (Reason::Staging, working, Some(("OSUpdateStarted", false))),
            (Reason::DrainPending, working, Some(("Drain", false))),
            (Reason::Rebooting, working, Some(("Reboot", false))),
            (Reason::Settling, Some(NodeState::Done), Some(("NodeDone", false))),
            (Reason::Done, None, None),
            (Reason::ClusterUnreachable, None, None),
        ] {
            let event = Event::of(&decision(reason, state)).map(|event| (event.word, event.warns));
            assert_eq!(event, expected, "{reason}");
        }
    }

    #[test]
    fn the_same_sentence_in_the_same_boot_has_the_same_name() {
        let held = Event::of(&decision(Reason::Held, None)).unwrap();
        let name = held.name("n", "b");
        assert_eq!(name, held.clone().name("n", "b"));
        assert!(name.starts_with("n.") && name.len() == 18, "{name}");
        let other = Event { message: "m".to_owned(), ..held.clone() };
        let names = [name, held.name("n", "c"), other.name("n", "b"), Event { word: "Drain", ..other }.name("n", "b")];
        assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), names.len());
        let message = held.object("x", "n", "u", 0)["message"].as_str().unwrap().to_owned();
        assert!(message.chars().count() <= MAX_MESSAGE && !message.contains(['\n', '\u{1b}']), "{message}");
    }
}
