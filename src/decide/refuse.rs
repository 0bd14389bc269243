//! What a refusal and a long wait have in common: the node goes back into service, and what is refused does not boot.

use super::limits::{MAX_REFUSAL, MAX_WAIT, OUT_OF_SERVICE_PATIENCE, SOON};
use super::{Clock, Decision, Rule, Rules, Wanted, by};
use crate::backoff::Backoff;
use crate::model::{Action, Annotate, Deployment, NodeState, Reason, Work, is_named, printable};

/// How another image reaches a node that is stuck: MCC counts it as unavailable and never as failing.
pub(super) const RETARGET: &str = "set another image in the pool, and raise the pool's maxUnavailable until this node \
                                   has it, because MCC gives a stuck node another image only where a slot is free";
/// Makes an uncordon differ from one that was acknowledged before; to the controller the rest is opaque.
pub(super) const AGAIN: &str = "-again";

impl Rules<'_> {
    pub(super) fn refuse(&self, rule: Rule, reason: Reason, message: impl Into<String>) -> Decision {
        self.rest(by(rule, reason, message).state(NodeState::Degraded))
    }

    /// Rows 12 and 22 for an image whose rendered config cannot be used: its demands are not known, which is not none.
    pub(super) fn config_fault(&self, rule: Rule, deployment: &Deployment) -> Option<Decision> {
        let why = printable(deployment.config_fault.as_deref()?, 400);
        let message =
            format!("the image carries a rendered config that cannot be used, {why}; build it again and {RETARGET}");
        Some(self.refuse(rule, Reason::ImageInvalid, message))
    }

    /// Gives the node back if the decision is a refusal.
    pub(super) fn rest_if_refused(&self, decision: Decision) -> Decision {
        if decision.state == Some(NodeState::Degraded) { self.rest(decision) } else { decision }
    }

    /// A refusal: reported at once, and the node given back if we had drained it.
    pub(super) fn rest(&self, decision: Decision) -> Decision {
        let config = self.node.desired_config.as_deref().or(self.node.current_config.as_deref()).unwrap_or("unknown");
        match self.node.desired_drain.as_deref() {
            Some(drain) if drain.starts_with("drain-") => {
                decision.doing(Annotate::RequestUncordon { value: self.uncordon(config) }).wake(SOON)
            }
            // Not acknowledged yet: the decision's own action waits.
            Some(_) if self.node.desired_drain != self.node.last_applied_drain => {
                Decision { action: Action::Nothing, ..decision }
            }
            _ => decision,
        }
    }

    /// No wait keeps a drained node out of service for ever: in the end it is Degraded and given back, and drained again
    /// once the wait is over. Rows 24 and 25 have limits of their own, the uptime floor ends by itself, and a hold is an
    /// operator's wish.
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
            "{}. The node has waited drained for over 30 min, so it is uncordoned, and drained again when it need not \
             wait; see `journalctl -u rebase-agent`",
            printable(decision.message.trim_end_matches('.'), MAX_WAIT)
        );
        self.rest(Decision { message, ..decision }.state(NodeState::Degraded).clock(clock, subject))
    }

    /// The uncordon to ask for. The drain controller compares strings: one that it acknowledged before a drain that it
    /// may have begun would count as done already, and the node would stay cordoned.
    pub(super) fn uncordon(&self, config: &str) -> String {
        let value = format!("uncordon-{config}");
        let stale = self.node.last_applied_drain.as_ref() == Some(&value);
        if stale && self.node.desired_drain.as_ref() != Some(&value) { value + AGAIN } else { value }
    }

    /// A refusal reaches the disk: what is refused must not boot at the next orderly reboot either. Dropping it goes
    /// before the decision's own action. `rejected` is what would boot next.
    pub(super) fn keep_from_booting(&self, decision: Decision, rejected: &Deployment) -> Decision {
        let checksum = &rejected.checksum;
        if !self.host.backend.drops_staged() || self.memory.dropped.contains(checksum) {
            let how = if rejected.staged { "is staged" } else { "is first in boot order" };
            let message = format!(
                "{}. It {how} and boots next all the same; drop it with {}",
                printable(decision.message.trim_end_matches('.'), MAX_REFUSAL),
                self.host.backend.drop_by_hand()
            );
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

    /// [`Rules::keep_from_booting`] for a refusal of the desired image, if that boots next.
    pub(super) fn refused_on_disk(&self, decision: Decision, wanted: &Wanted<'_>) -> Decision {
        let is_it = |next: &&Deployment| self.is_wanted(next, wanted) || is_named(next, wanted.image);
        match self.host.next_boot().filter(|next| !next.booted).filter(is_it) {
            Some(next) if decision.reason.refuses_image() => self.keep_from_booting(decision, next),
            _ => decision,
        }
    }
}
