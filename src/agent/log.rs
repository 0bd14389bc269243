//! Log messages, and the notifications of systemd.

use std::io;

use sd_notify::NotifyState;

use super::Agent;
use crate::cli::CONFINEMENT;
use crate::decide::Decision;
use crate::journal::id;
use crate::lane::Lane;
use crate::model::{NodeState, Reason, Severity, printable};
use crate::report::Patch;

/// Longest decision in `STATUS=`, in characters.
const STATUS: usize = 400;

/// A notification of systemd.
pub(super) enum Notice {
    Ready,
    Stopping,
    Watchdog,
    Status(String),
}

/// Starts the thread that notifies systemd, whose socket may block.
pub(super) fn systemd() -> io::Result<Lane<Notice>> {
    let work = |notice| {
        let state = match &notice {
            Notice::Ready => NotifyState::Ready,
            Notice::Stopping => NotifyState::Stopping,
            Notice::Watchdog => NotifyState::Watchdog,
            Notice::Status(text) => NotifyState::Status(text),
        };
        if let Err(error) = sd_notify::notify(&[state]) {
            tracing::debug!("cannot notify systemd: {error}");
        }
    };
    let lost = |number| {
        tracing::warn!(
            message_id = id::FAILED,
            "{number} notifications were dropped, because systemd did not accept them in time"
        );
    };
    Lane::new("notify", work, lost)
}

impl Agent {
    /// Logs a decision whose message or state differs from the last one.
    pub(super) fn say(&self, decision: &Decision) {
        let refuses = |of: &Decision| matches!(of.state, Some(NodeState::Degraded | NodeState::Unreconcilable));
        let words = |of: &Decision| (of.reason, of.message.clone(), refuses(of));
        let same = |last: &Decision| words(last) == words(decision);
        if self.last.as_ref().is_some_and(same) {
            return;
        }
        let (reason, rule, message) = (decision.reason.as_str(), decision.rule, &decision.message);
        let message_id = match decision.reason {
            _ if refuses(decision) => id::REFUSED,
            Reason::Done => id::DONE,
            Reason::RunsUntrusted => id::UNTRUSTED,
            _ => id::DECIDED,
        };
        let unreadable =
            decision.state.is_none() && matches!(decision.reason.severity(), Severity::Transient | Severity::Fatal);
        let warns = matches!(
            decision.reason,
            Reason::RunsUntrusted | Reason::RollbackQueued | Reason::PrefetchNoSpace | Reason::PrefetchFailed
        );
        if refuses(decision) || unreadable || warns {
            tracing::warn!(message_id, rebase_agent_reason = reason, rebase_agent_rule = %rule, "{reason}: {message}");
        } else {
            tracing::info!(message_id, rebase_agent_reason = reason, rebase_agent_rule = %rule, "{reason}: {message}");
        }
    }

    /// Sets the unit's status to the last decision and the progress of the work.
    pub(super) fn tell_status(&mut self) {
        let Some(last) = &self.last else { return };
        let progress = self.progress.as_deref().map(|line| format!(" [{line}]")).unwrap_or_default();
        let status = printable(&format!("{}: {}{progress}", last.reason, last.message), STATUS);
        let status = format!("{status}{CONFINEMENT}{}", self.settings.confinement.sentence());
        if status != self.status {
            // systemd parses the message like a command line and removes single backslashes.
            self.systemd.send(Notice::Status(status.replace('\\', r"\\")));
            self.status = status;
        }
    }
}

/// Logs the changed annotations, except the reason, which was logged with the decision.
pub(super) fn patched(patch: &Patch) {
    let changes: Vec<String> = patch
        .iter()
        .map(|(key, value)| (key.rsplit_once('/').map_or(key.as_str(), |(_, key)| key), value))
        .filter(|(key, _)| *key != "reason")
        .map(|(key, value)| {
            format!("{key}={}", value.as_deref().map_or("(removed)".to_owned(), |value| printable(value, 200)))
        })
        .collect();
    if !changes.is_empty() {
        tracing::info!(message_id = id::REPORTED, "updated annotations: {}", changes.join(", "));
    }
}
