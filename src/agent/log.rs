//! What people and systemd are told.

use std::io;

use sd_notify::NotifyState;

use super::Agent;
use crate::cli::CONFINEMENT;
use crate::decide::Decision;
use crate::journal::id;
use crate::lane::Lane;
use crate::model::{NodeState, Reason, Severity, printable};
use crate::report::Patch;

/// Longest rule in `STATUS=`, in characters.
const STATUS: usize = 400;

/// What systemd is told.
pub(super) enum Notice {
    Ready,
    Stopping,
    Watchdog,
    Status(String),
}

/// The thread that tells systemd, which may be slow to listen.
pub(super) fn systemd() -> io::Result<Lane<Notice>> {
    let work = |notice| {
        let state = match &notice {
            Notice::Ready => NotifyState::Ready,
            Notice::Stopping => NotifyState::Stopping,
            Notice::Watchdog => NotifyState::Watchdog,
            Notice::Status(text) => NotifyState::Status(text),
        };
        if let Err(error) = sd_notify::notify(&[state]) {
            tracing::debug!("systemd cannot be notified: {error}");
        }
    };
    let lost = |number| {
        tracing::warn!(message_id = id::FAILED, "{number} notices were dropped: systemd did not take them in time");
    };
    Lane::new("notify", work, lost)
}

impl Agent {
    /// Logs a decision that differs from the last one in its words.
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
        let warns = matches!(decision.reason, Reason::RunsUntrusted | Reason::RollbackQueued);
        if refuses(decision) || unreadable || warns {
            tracing::warn!(message_id, rebase_agent_reason = reason, rebase_agent_rule = %rule, "{reason}: {message}");
        } else {
            tracing::info!(message_id, rebase_agent_reason = reason, rebase_agent_rule = %rule, "{reason}: {message}");
        }
    }

    /// Gives systemd the last decision and the progress of its work as the unit's status.
    pub(super) fn tell_status(&mut self) {
        let Some(last) = &self.last else { return };
        let progress = self.progress.as_deref().map(|line| format!(" [{line}]")).unwrap_or_default();
        let status = printable(&format!("{}: {}{progress}", last.reason, last.message), STATUS);
        let status = format!("{status}{CONFINEMENT}{}", self.settings.confinement.sentence());
        if status != self.status {
            // systemd takes a message apart as it does command lines, and takes single backslashes out.
            self.systemd.send(Notice::Status(status.replace('\\', r"\\")));
            self.status = status;
        }
    }
}

/// Logs annotations that were changed. The reason is left out: the decision was logged with the same words.
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
