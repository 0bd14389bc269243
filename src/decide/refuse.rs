//! Refusals and long waits: the node is uncordoned, and a refused image is kept from booting.

use super::limits::{MAX_REFUSAL, MAX_WAIT, OUT_OF_SERVICE_PATIENCE, SOON};
use super::{Clock, Decision, Rule, Rules, Wanted, by};
use crate::backoff::Backoff;
use crate::model::{Action, Annotate, Deployment, NodeState, Reason, Work, is_named, printable};

/// How a stuck node gets an image that was set in its pool. MCC counts such a node as unavailable, never as failing.
pub(super) const NEEDS_SLOT: &str = "raise the pool's maxUnavailable until this node has it, because MCC gives a stuck \
                                     node another image only if a slot is free";
/// Suffix that makes an uncordon request differ from an acknowledged one. The drain controller does not interpret it.
pub(super) const AGAIN: &str = "-again";

impl Rules<'_> {
    pub(super) fn refuse(&self, rule: Rule, reason: Reason, message: impl Into<String>) -> Decision {
        self.rest(by(rule, reason, message).state(NodeState::Degraded))
    }

    /// Rows 12 and 24: refuses an image whose rendered config cannot be used, because its kernel arguments are unknown.
    pub(super) fn config_fault(&self, rule: Rule, deployment: &Deployment) -> Option<Decision> {
        let why = printable(deployment.config_fault.as_deref()?, 400);
        let message = format!(
            "the rendered config inside the image cannot be used, {why}; build the image again, set it in the pool, and {NEEDS_SLOT}"
        );
        Some(self.refuse(rule, Reason::ImageInvalid, message))
    }

    /// Uncordons a drained node if the decision is a refusal.
    pub(super) fn rest_if_refused(&self, decision: Decision) -> Decision {
        if decision.state == Some(NodeState::Degraded) { self.rest(decision) } else { decision }
    }

    /// Makes `decision` a refusal: it is reported at once, and a node that the agent has drained is uncordoned.
    pub(super) fn rest(&self, decision: Decision) -> Decision {
        let config = self.node.desired_config.as_deref().or(self.node.current_config.as_deref()).unwrap_or("unknown");
        match self.node.desired_drain.as_deref() {
            Some(drain) if drain.starts_with("drain-") => {
                decision.doing(Annotate::RequestUncordon { value: self.uncordon(config) }).wake(SOON)
            }
            // The uncordon is not acknowledged yet, so the decision's own action waits.
            Some(_) if self.node.desired_drain != self.node.last_applied_drain => {
                Decision { action: Action::Nothing, ..decision }
            }
            _ => decision,
        }
    }

    /// Limits how long a drained node waits: then it is Degraded and uncordoned, and drained again after the wait. Rows 25
    /// and 26 have their own limits, the uptime floor ends by itself, and a hold is the operator's decision.
    pub(super) fn not_for_ever(&self, decision: Decision) -> Decision {
        let drain = self.node.desired_drain.as_ref().filter(|drain| drain.starts_with("drain-"));
        let limited =
            matches!(decision.rule, Rule::Drain | Rule::Reboot) || decision.state == Some(NodeState::Degraded);
        let wished = matches!(decision.reason, Reason::Held | Reason::UptimeFloor);
        let Some(drain) = drain.filter(|_| !limited && !wished) else { return decision };
        let (clock, subject) = decision.clock.clone().unwrap_or_else(|| (Clock::OutOfService, drain.clone()));
        let waited = self.waited(clock, &subject);
        if waited < OUT_OF_SERVICE_PATIENCE {
            let wake = decision.wake.unwrap_or(u64::MAX).min(OUT_OF_SERVICE_PATIENCE.saturating_sub(waited));
            return decision.clock(clock, subject).wake(wake);
        }
        let message = format!(
            "{}. The node has been drained and waiting for over 30 min, so it is uncordoned now and drained again after \
             the wait; see `journalctl -u rebase-agent`",
            printable(decision.message.trim_end_matches('.'), MAX_WAIT)
        );
        self.rest(Decision { message, ..decision }.state(NodeState::Degraded).clock(clock, subject))
    }

    /// The value of the uncordon request. The drain controller compares strings: a value that it acknowledged before the
    /// last drain would count as done, and the node would stay cordoned.
    pub(super) fn uncordon(&self, config: &str) -> String {
        let value = format!("uncordon-{config}");
        let stale = self.node.last_applied_drain.as_ref() == Some(&value);
        if stale && self.node.desired_drain.as_ref() != Some(&value) { value + AGAIN } else { value }
    }

    /// Drops the refused or held deployment `rejected`, so that it does not boot at the next orderly reboot. This comes before
    /// the decision's own action.
    pub(super) fn keep_from_booting(&self, decision: Decision, rejected: &Deployment) -> Decision {
        let checksum = &rejected.checksum;
        if !self.host.backend.drops_staged() || self.memory.dropped.contains(checksum) {
            let (why, command) =
                (printable(decision.message.trim_end_matches('.'), MAX_REFUSAL), self.host.backend.drop_by_hand());
            let message = match rejected.staged {
                true => format!("{why}. This image is staged, and any reboot boots it; drop it with {command}"),
                false => {
                    format!("{why}. This image is first in boot order, and any reboot boots it; drop it with {command}")
                }
            };
            return Decision { message, ..decision };
        }
        if self.observed.running.is_some() || self.host.transaction.is_some() {
            let wake = decision.wake.unwrap_or(SOON).min(SOON);
            return decision.wake(wake);
        }
        let drop = Work::DropStaged { checksum: checksum.clone() };
        match self.failure(&drop) {
            None => Decision { wake: None, ..decision.doing(drop) },
            Some(failure) => match self.due_in(failure, Backoff::TRANSIENT) {
                0 => Decision { wake: None, ..decision.doing(drop) },
                due => {
                    let wake = decision.wake.unwrap_or(due).min(due);
                    decision.wake(wake)
                }
            },
        }
    }

    /// Applies [`Rules::keep_from_booting`] to a refusal of the desired image, if that is staged or boots next.
    pub(super) fn refused_on_disk(&self, decision: Decision, wanted: &Wanted<'_>) -> Decision {
        let is_it = |next: &&Deployment| self.is_wanted(next, wanted) || is_named(next, wanted.image);
        let staged = self.host.staged().filter(|staged| !staged.locked || self.host.backend.drops_staged());
        match staged.or_else(|| self.host.next_boot()).filter(|next| !next.booted).filter(is_it) {
            Some(next) if decision.reason.refuses_image() => self.keep_from_booting(decision, next),
            _ => decision,
        }
    }
}
