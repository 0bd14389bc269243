//! Rows 10 to 15: the desired image runs. Pure.

use super::{AGAIN, MINUTE, Rules, SECOND, SOON, UNCORDON_PATIENCE, Wanted, rule};
use crate::kernel_arguments::{missing, not_in_effect};
use crate::model::{
    Action, Clock, Decision, Deployment, Failure, Fault, NodeState, Reason, Step, UnitState, printable,
};
use crate::schedule::Backoff;

/// How long the kubelet may take to become active.
const HEALTH_PATIENCE: u64 = 10 * MINUTE;
/// How soon the kubelet's unit is looked at again while it starts.
const HEALTH_POLL: u64 = 2 * SECOND;
/// `Working` for so long lets a rebuild start; a Degraded pool refuses to build.
const CONFIG_AHEAD_WORKING: u64 = 30 * MINUTE;
/// `Degraded` for so long lets MCC retarget; in an update it frees the slot.
const CONFIG_AHEAD_DEGRADED: u64 = 5 * MINUTE;

/// Longest sentence about an untrusted image, in characters.
const MAX_UNTRUSTED: usize = 890;

impl Rules<'_> {
    pub(super) fn arrived(&self, wanted: &Wanted<'_>, booted: &Deployment) -> Decision {
        if self.is_coherently_done() {
            return self.done(wanted, booted);
        }
        if let Some(decision) = self.config_ahead("11", wanted, booted.rendered_config.as_deref()) {
            return decision;
        }
        if let Some(decision) = self.config_fault("12", booted) {
            return decision;
        }
        let demanded = booted.wanted_arguments.as_deref().unwrap_or_default();
        if let Some(first) = not_in_effect(demanded, &self.machine.command_line, booted.arguments.as_deref()) {
            let help = match booted.arguments.as_deref().is_some_and(|entry| missing(demanded, entry).is_none()) {
                true => "its boot entry has them, so correct what the boot loader makes of them and reboot",
                false => self.host.backend.set_arguments(),
            };
            let message = format!(
                "the kernel runs without `{}`, or not with all of `{}` in this order, which {} demands; {help}, or take \
                 them out of the config",
                printable(first, 200),
                printable(&demanded.join(" "), 300),
                printable(wanted.config, 253)
            );
            return self.refuse("12", Reason::KernelArgumentMissing, message);
        }
        if self.machine.kubelet != UnitState::Active {
            return self.unhealthy(wanted);
        }
        self.uncordon_and_settle(wanted)
    }

    /// Row 10. The booted image's trust is looked at in the background; the boot cannot be undone. A refusal is reported
    /// on the Node and at warning, and a queued rollback is shown.
    fn done(&self, wanted: &Wanted<'_>, booted: &Deployment) -> Decision {
        let subject = wanted.image.to_string();
        let ahead = match booted.rendered_config.as_deref().filter(|label| *label != wanted.config) {
            Some(label) => {
                format!("; warning: it was built from {}, so newer files are missing", printable(label, 253))
            }
            None => String::new(),
        };
        let image = wanted.image.digest().short();
        let queued = self.host.next_boot().filter(|next| !next.booted && !next.staged);
        let asleep = |trust: &str| match queued {
            None => rule("10", Reason::Done, format!("runs {image} for {}; {trust}{ahead}", wanted.config)),
            Some(next) => {
                let message = format!(
                    "runs {image} for {}; {trust}{ahead}; the next boot is {}, which is first in boot order: {} \
                     turns that round",
                    wanted.config,
                    printable(next.reference.as_deref().unwrap_or(&next.id), 200),
                    self.host.backend.turn_boot_order()
                );
                rule("10", Reason::RollbackQueued, message)
            }
        };
        let reported = self.node.untrusted.is_some();
        if wanted.facts.is_some() {
            let decision = asleep("its signature was verified");
            return if reported { decision.doing(Action::ReportTrust { untrusted: None }) } else { decision };
        }
        if self.observed.running.is_some() {
            return asleep("its signature is being verified");
        }
        match self.failure(Step::Verify, &subject) {
            None => asleep("its signature is being verified").doing(Action::Verify { image: wanted.image.clone() }),
            Some(failure) => {
                let reason = failure.fault.reason;
                let decision = if reason.refuses_image() {
                    let message = format!(
                        "runs {image} for {}, which the node's policy refuses: {reason}: {}",
                        wanted.config, failure.fault.message
                    );
                    rule("10", Reason::RunsUntrusted, printable(&message, MAX_UNTRUSTED))
                } else {
                    asleep(&format!("its signature is not verified: {reason}"))
                };
                let decision = self.report_trust(decision, failure);
                match self.due_in(failure, Backoff::REFUSAL) {
                    _ if decision.action != Action::Nothing => decision,
                    0 => decision.doing(Action::Verify { image: wanted.image.clone() }),
                    due => decision.wake(due),
                }
            }
        }
    }

    /// `decision`, but first the Node says that the image that runs is refused, as `failure` of its verification says.
    pub(super) fn report_trust(&self, decision: Decision, failure: &Failure) -> Decision {
        let Fault { reason, message, .. } = &failure.fault;
        let untrusted = reason.refuses_image().then(|| printable(&format!("{reason}: {message}"), MAX_UNTRUSTED));
        if untrusted.is_none() || self.node.untrusted == untrusted {
            return decision;
        }
        decision.doing(Action::ReportTrust { untrusted })
    }

    /// Rows 11 and 18: MCC reuses an image for a change of files only, which an agent that writes none cannot apply.
    pub(super) fn config_ahead(&self, name: &str, wanted: &Wanted<'_>, label: Option<&str>) -> Option<Decision> {
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
            "the image was built from {} and the pool wants {}: it changes files only and nobody rebuilt. Annotate the \
             pool's MachineOSConfig with machineconfiguration.openshift.io/rebuild",
            printable(built_from, 253),
            printable(wanted.config, 253)
        );
        let decision = rule(name, Reason::ConfigAheadOfImage, message).state(state).wake(left);
        Some(Decision { unsticks: true, ..self.rest(decision) }.clock(Clock::ConfigAhead, subject))
    }

    /// Row 13: the one refusal that keeps the node cordoned.
    fn unhealthy(&self, wanted: &Wanted<'_>) -> Decision {
        let subject = wanted.image.to_string();
        let waited = self.waited(Clock::Health, &subject);
        if waited < HEALTH_PATIENCE {
            return rule("13", Reason::HealthPending, "waiting for kubelet.service to become active")
                .state(NodeState::Working)
                .clock(Clock::Health, subject)
                .wake(HEALTH_POLL);
        }
        let message = format!(
            "kubelet.service did not become active in this image, so the node stays cordoned; see `journalctl -u \
             kubelet`. {} and a reboot go back, and set the pool back first",
            self.host.backend.go_back()
        );
        rule("13", Reason::HealthFailed, message).state(NodeState::Degraded).clock(Clock::Health, subject).wake(SOON)
    }

    /// Rows 14 and 15. MCD asks for the uncordon on every update, on single-replica clusters too.
    fn uncordon_and_settle(&self, wanted: &Wanted<'_>) -> Decision {
        let asked = self.node.desired_drain.as_deref().filter(|drain| {
            let config = drain.strip_prefix("uncordon-").map(|rest| rest.strip_suffix(AGAIN).unwrap_or(rest));
            config == Some(wanted.config)
        });
        let value = asked.map_or_else(|| self.uncordon(wanted.config), str::to_owned);
        if asked.is_none() {
            return rule("14", Reason::UncordonPending, "waiting for the drain controller to uncordon the node")
                .state(NodeState::Working)
                .clock(Clock::Uncordon, value.clone())
                .doing(Action::RequestUncordon { value });
        }
        if self.node.last_applied_drain.as_deref() != Some(value.as_str()) {
            return self.uncordon_pending("14", value);
        }
        rule("15", Reason::Settling, "runs the desired image; reporting it")
            .state(NodeState::Done)
            .doing(Action::Settle)
    }

    pub(super) fn uncordon_pending(&self, name: &str, value: String) -> Decision {
        let waited = self.waited(Clock::Uncordon, &value);
        let decision = if waited < UNCORDON_PATIENCE {
            rule(name, Reason::UncordonPending, "waiting for the drain controller to uncordon the node")
                .state(NodeState::Working)
                .wake(UNCORDON_PATIENCE.saturating_sub(waited))
        } else {
            let message = "the drain controller has not uncordoned the node; see the machine-config-controller's log. \
                           The request stands";
            rule(name, Reason::UncordonLate, message).state(NodeState::Degraded)
        };
        decision.clock(Clock::Uncordon, value)
    }
}
