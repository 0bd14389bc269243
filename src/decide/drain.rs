//! Rows 22 and 25: the hindrances of the update, and the drain.

use super::limits::{DRAIN_PATIENCE, MINUTE, RESTORE_SPREAD, SOON};
use super::reboot::rebooting;
use super::{Clock, Decision, Rule, Rules, Wanted, by};
use crate::backoff::Backoff;
use crate::model::annotations::HOLD;
use crate::model::{Action, Annotate, Deployment, NodeState, Reason, UnitState, Work, printable};

impl Rules<'_> {
    /// Row 22: nothing is staged before nothing holds up the reboot, because any reboot boots what is staged and not locked.
    /// With a staged image the hindrances are checked again before the drain and before the reboot.
    pub(super) fn hindrance(&self, wanted: &Wanted<'_>, staged: Option<&Deployment>) -> Option<Decision> {
        let working = |reason, message: String| by(Rule::Hindrance, reason, message).state(NodeState::Working);
        let image = wanted.image.digest().short();
        if let Some(why) = &self.node.hold {
            let message = format!(
                "the update to {image} is held: {}. Remove the annotation {HOLD} to continue",
                printable(why, 200)
            );
            let decision = working(Reason::Held, message);
            return Some(match staged.filter(|staged| !staged.locked) {
                Some(staged) => self.keep_from_booting(decision, staged),
                None => decision,
            });
        }
        if let Some(inhibitor) = self.machine.inhibitors.first() {
            let message = format!(
                "the update to {image} waits: `{}` inhibits the shutdown: {}. See `systemd-inhibit --list`",
                inhibitor.who, inhibitor.why
            );
            return Some(working(Reason::Inhibited, message).wake(SOON));
        }
        if let Some(left) = self.limits.uptime_floor.checked_sub(self.machine.uptime).filter(|left| *left > 0) {
            let minutes = self.limits.uptime_floor / MINUTE;
            let message = format!("the update to {image} waits until the machine has been up for {minutes} min");
            return Some(working(Reason::UptimeFloor, message).wake(left));
        }
        if let Some(decision) = self.restored(wanted) {
            return Some(decision);
        }
        // The finalizer runs while a deployment is staged.
        match staged.map(|_| self.machine.finalizer) {
            None | Some(UnitState::Active) => None,
            Some(_) => {
                let decision =
                    working(Reason::Finalizer, format!("{image} is staged; starting ostree-finalize-staged.service"))
                        .wake(SOON);
                Some(match self.failure(&Work::StartFinalizer) {
                    None => decision.doing(Work::StartFinalizer),
                    Some(failure) => {
                        let decision = self.rest_if_refused(self.failed(Rule::Hindrance, failure));
                        self.when_due(decision, failure, Work::StartFinalizer)
                    }
                })
            }
        }
    }

    /// Row 22: after a restore of etcd, all Nodes name an older image as current. MCC counts them as done, so it does not
    /// apply maxUnavailable. A random wait spreads the drains instead.
    fn restored(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let node = self.node;
        let asked_for = !node.is_current_image_desired() || node.desired_config != node.current_config;
        let drained = node.desired_drain.as_deref().is_some_and(|drain| drain.starts_with("drain-"));
        if asked_for || drained || node.topology.as_deref() == Some("SingleReplica") {
            return None;
        }
        let subject = wanted.image.to_string();
        let left =
            self.memory.spread.checked_sub(self.waited(Clock::RestoreSpread, &subject)).filter(|left| *left > 0)?;
        let message = format!(
            "the Node names {} as current but another image runs, as after a restore of etcd; the update \
             waits a random time of up to {} min so that not all nodes drain at once",
            wanted.image.digest().short(),
            RESTORE_SPREAD / MINUTE
        );
        let decision = by(Rule::Hindrance, Reason::RestoreSpread, message).state(NodeState::Working);
        Some(decision.clock(Clock::RestoreSpread, subject).wake(left))
    }

    /// Row 25.
    pub(super) fn drain(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        // On a single-node cluster the workloads cannot move to another node.
        if self.node.topology.as_deref() == Some("SingleReplica") {
            return None;
        }
        let value = format!("drain-{}", wanted.config);
        let image = wanted.image.digest().short();
        let (desired, applied) = (self.node.desired_drain.as_deref(), self.node.last_applied_drain.as_deref());
        let pending = |reason, message: String| {
            by(Rule::Drain, reason, message).state(NodeState::Working).clock(Clock::Drain, value.clone())
        };
        if desired != Some(value.as_str()) {
            // The controller compares strings: a drain that is requested before the uncordon is acknowledged would count
            // as done.
            if let Some(uncordon) =
                desired.filter(|desired| desired.starts_with("uncordon-") && applied != Some(*desired))
            {
                return Some(self.uncordon_pending(Rule::Drain, uncordon.to_owned()));
            }
            let message = format!("{image} is staged; waiting for the drain controller to drain the node");
            return Some(pending(Reason::DrainPending, message).doing(Annotate::RequestDrain { value: value.clone() }));
        }
        if applied != Some(value.as_str()) {
            let waited = self.waited(Clock::Drain, &value);
            return Some(if waited < DRAIN_PATIENCE {
                let message = format!("{image} is staged; waiting for the drain controller to drain the node");
                pending(Reason::DrainPending, message).wake(DRAIN_PATIENCE.saturating_sub(waited))
            } else {
                let message = "the drain has taken over an hour; look for a PodDisruptionBudget that allows no \
                               eviction (`oc get pdb -A`) and see the machine-config-controller's log. The drain \
                               controller keeps trying";
                pending(Reason::DrainStuck, message.to_owned()).state(NodeState::Degraded)
            });
        }
        // While the retry of a failed reboot is not due, another read is useless and would toggle the reason.
        let reboot = self.failure(&Work::Reboot { image: wanted.image.clone() });
        let not_due = reboot.is_some_and(|failure| self.due_in(failure, Backoff::TRANSIENT) > 0);
        match self.node.schedulable {
            Some(false) => None,
            None if not_due => None,
            // This read belongs to the reboot, so no state is reported before its result.
            None => Some(rebooting(wanted).doing(Action::ConfirmDrain)),
            Some(true) => {
                let message = "the node was uncordoned by hand after the drain; the agent requests the uncordon and \
                               then the drain again";
                Some(
                    pending(Reason::UncordonedByOther, message.to_owned())
                        .doing(Annotate::RequestUncordon { value: self.uncordon(wanted.config) }),
                )
            }
        }
    }
}
