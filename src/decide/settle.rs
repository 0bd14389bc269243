//! Rows 10 to 15: the desired image is booted.

use super::limits::{
    CONFIG_AHEAD_DEGRADED, CONFIG_AHEAD_WORKING, HEALTH_PATIENCE, HEALTH_POLL, MAX_UNTRUSTED, SOON, UNCORDON_PATIENCE,
};
use super::refuse::AGAIN;
use super::{Clock, Decision, Failure, Rule, Rules, Wanted, by};
use crate::backoff::Backoff;
use crate::kernel_arguments::{missing, not_in_effect};
use crate::model::{Action, Annotate, Backend, Deployment, Fault, NodeState, Reason, UnitState, Work, printable};

impl Rules<'_> {
    pub(super) fn arrived(&self, wanted: &Wanted<'_>, booted: &Deployment) -> Decision {
        if self.node.is_done() {
            return self.prefetch(self.done(wanted, booted), wanted);
        }
        if let Some(decision) = self.config_ahead(Rule::ConfigAhead, wanted, booted.rendered_config.as_deref()) {
            return decision;
        }
        if let Some(decision) = self.config_fault(Rule::ArgumentsMissing, booted) {
            return decision;
        }
        let demanded = booted.wanted_arguments.as_deref().unwrap_or_default();
        if let Some(first) = not_in_effect(demanded, &self.machine.command_line, booted.arguments.as_deref()) {
            let in_entry = booted.arguments.as_deref().is_some_and(|entry| missing(demanded, entry).is_none());
            let help = match (in_entry, self.host.backend) {
                (true, _) => {
                    "The boot entry has them, so correct the boot loader's configuration, which changes them, and \
                     reboot, or remove them from the config"
                }
                (false, Backend::RpmOstree) => {
                    "Put them at the end with `rpm-ostree kargs --editor` and reboot, or remove them from the config"
                }
                (false, Backend::Bootc) => {
                    "Let the image bring them in `/usr/lib/bootc/kargs.d`, or remove them from the config"
                }
            };
            let message = format!(
                "the running kernel lacks `{}`, or does not have all of `{}` in this order, which {} demands. {help}",
                printable(first, 200),
                printable(&demanded.join(" "), 300),
                printable(wanted.config, 253)
            );
            return self.refuse(Rule::ArgumentsMissing, Reason::KernelArgumentMissing, message);
        }
        if self.machine.kubelet != UnitState::Active {
            return self.unhealthy(wanted);
        }
        self.uncordon_and_settle(wanted)
    }

    /// Row 10. The booted image is verified in the background; the boot cannot be undone. A refusal is reported on the Node
    /// and logged as a warning. A queued rollback is reported, too.
    fn done(&self, wanted: &Wanted<'_>, booted: &Deployment) -> Decision {
        let verify = Work::Verify { image: wanted.image.clone() };
        let ahead = match booted.rendered_config.as_deref().filter(|label| *label != wanted.config) {
            Some(label) => {
                format!("; warning: it was built from {}, so newer files are missing", printable(label, 253))
            }
            None => String::new(),
        };
        let image = wanted.image.digest().short();
        let queued = self.host.next_boot().filter(|next| !next.booted && !next.staged);
        let asleep = |trust: &str| match queued {
            None => by(Rule::Done, Reason::Done, format!("runs {image} for {}; {trust}{ahead}", wanted.config)),
            Some(next) => {
                let message = format!(
                    "runs {image} for {}; {trust}{ahead}; the next boot is {}, which is first in boot order: reverse the \
                     boot order with {}",
                    wanted.config,
                    printable(next.reference.as_deref().unwrap_or(&next.id), 200),
                    self.host.backend.turn_boot_order()
                );
                by(Rule::Done, Reason::RollbackQueued, message)
            }
        };
        let reported = self.node.untrusted.is_some();
        if wanted.facts.is_some() {
            let decision = asleep("its signature was verified");
            return if reported { decision.doing(Annotate::ReportTrust { untrusted: None }) } else { decision };
        }
        let idle = self.observed.running.is_none();
        if self.is_running(&verify) {
            return asleep("its signature is being verified");
        }
        match self.failure(&verify) {
            None if idle => asleep("its signature is being verified").doing(verify),
            None => asleep("its signature will be verified"),
            Some(failure) => {
                let reason = failure.fault.reason;
                let decision = if reason.refuses_image() {
                    let message = format!(
                        "runs {image} for {}, but the node's policy refuses the image: {reason}: {}",
                        wanted.config, failure.fault.message
                    );
                    by(Rule::Done, Reason::RunsUntrusted, printable(&message, MAX_UNTRUSTED))
                } else {
                    asleep(&format!("its signature is not verified: {reason}"))
                };
                let decision = self.report_trust(decision, failure);
                match self.due_in(failure, Backoff::REFUSAL) {
                    _ if decision.action != Action::Nothing => decision,
                    0 if idle => decision.doing(verify),
                    due => decision.wake(due.max(1)),
                }
            }
        }
    }

    /// `decision`, with the action to report on the Node that the policy refuses the booted image. `failure` is the failure
    /// of its verification.
    pub(super) fn report_trust(&self, decision: Decision, failure: &Failure) -> Decision {
        let Fault { reason, message, .. } = &failure.fault;
        let untrusted = reason.refuses_image().then(|| printable(&format!("{reason}: {message}"), MAX_UNTRUSTED));
        if untrusted.is_none() || self.node.untrusted == untrusted {
            return decision;
        }
        decision.doing(Annotate::ReportTrust { untrusted })
    }

    /// Rows 11 and 18: MCC reuses an image if a new config only changes files. The agent writes no files, so it waits for a
    /// rebuild.
    pub(super) fn config_ahead(&self, rule: Rule, wanted: &Wanted<'_>, label: Option<&str>) -> Option<Decision> {
        let built_from = label.filter(|label| *label != wanted.config)?;
        if self.limits.accept_config_ahead {
            return None;
        }
        let subject = format!("{} {}", wanted.image, wanted.config);
        let waited = self.waited(Clock::ConfigAhead, &subject);
        let phase = waited.checked_rem(CONFIG_AHEAD_WORKING + CONFIG_AHEAD_DEGRADED).unwrap_or(0);
        let (state, left) = match CONFIG_AHEAD_WORKING.checked_sub(phase) {
            Some(left) if left > 0 => (NodeState::Working, left),
            _ => (NodeState::Degraded, (CONFIG_AHEAD_WORKING + CONFIG_AHEAD_DEGRADED).saturating_sub(phase)),
        };
        let message = format!(
            "the image was built from {} but the pool wants {}, which only changes files, so MCO did not rebuild the \
             image. Annotate the pool's MachineOSConfig with machineconfiguration.openshift.io/rebuild",
            printable(built_from, 253),
            printable(wanted.config, 253)
        );
        let decision = by(rule, Reason::ConfigAheadOfImage, message).state(state).wake(left);
        Some(Decision { unsticks: true, ..self.rest(decision) }.clock(Clock::ConfigAhead, subject))
    }

    /// Row 13. This is the only refusal that keeps the node cordoned.
    fn unhealthy(&self, wanted: &Wanted<'_>) -> Decision {
        let subject = wanted.image.to_string();
        let waited = self.waited(Clock::Health, &subject);
        if waited < HEALTH_PATIENCE {
            return by(Rule::Health, Reason::HealthPending, "waiting for kubelet.service to become active")
                .state(NodeState::Working)
                .clock(Clock::Health, subject)
                .wake(HEALTH_POLL);
        }
        let message = match self.host.backend {
            Backend::RpmOstree => {
                "kubelet.service did not become active in this image, so the node stays cordoned; see `journalctl -u \
                 kubelet`. To go back, set the pool back first, then run `rpm-ostree rollback` and reboot"
            }
            Backend::Bootc => {
                "kubelet.service did not become active in this image, so the node stays cordoned; see `journalctl -u \
                 kubelet`. To go back, set the pool back first, then run `bootc rollback` once and reboot"
            }
        };
        by(Rule::Health, Reason::HealthFailed, message)
            .state(NodeState::Degraded)
            .clock(Clock::Health, subject)
            .wake(SOON)
    }

    /// Rows 14 and 15. As the MCD, the agent requests the uncordon after every update, also on single-node clusters.
    fn uncordon_and_settle(&self, wanted: &Wanted<'_>) -> Decision {
        let asked = self.node.desired_drain.as_deref().filter(|drain| {
            let config = drain.strip_prefix("uncordon-").map(|rest| rest.strip_suffix(AGAIN).unwrap_or(rest));
            config == Some(wanted.config)
        });
        let value = asked.map_or_else(|| self.uncordon(wanted.config), str::to_owned);
        if asked.is_none() {
            return by(
                Rule::Uncordon,
                Reason::UncordonPending,
                "waiting for the drain controller to uncordon the node",
            )
            .state(NodeState::Working)
            .clock(Clock::Uncordon, value.clone())
            .doing(Annotate::RequestUncordon { value });
        }
        if self.node.last_applied_drain.as_deref() != Some(value.as_str()) {
            return self.uncordon_pending(Rule::Uncordon, value);
        }
        by(Rule::Settle, Reason::Settling, "runs the desired image; reporting Done")
            .state(NodeState::Done)
            .doing(Annotate::Settle)
    }

    pub(super) fn uncordon_pending(&self, rule: Rule, value: String) -> Decision {
        let waited = self.waited(Clock::Uncordon, &value);
        let decision = if waited < UNCORDON_PATIENCE {
            by(rule, Reason::UncordonPending, "waiting for the drain controller to uncordon the node")
                .state(NodeState::Working)
                .wake(UNCORDON_PATIENCE.saturating_sub(waited))
        } else {
            let message = "the drain controller has not uncordoned the node for 10 min; see the \
                           machine-config-controller's log. The agent keeps waiting";
            by(rule, Reason::UncordonLate, message).state(NodeState::Degraded)
        };
        decision.clock(Clock::Uncordon, value)
    }
}
