//! Rows 16 to 25: on the way to the desired image. Pure.

use super::{MINUTE, RETARGET, Rules, SOON, TRANSIENT_PATIENCE, Wanted, rule};
use crate::host::is_staged;
use crate::kernel_arguments::{Change, Update};
use crate::model::{
    Action, Attempt, Backend, Clock, Decision, Deployment, Failure, ImageFacts, NodeState, Reason, Step, UnitState,
    printable,
};
use crate::report::{ATTEMPT, HOLD};
use crate::schedule::Backoff;
use crate::time;

/// MCD's own limit for the drain.
const DRAIN_PATIENCE: u64 = 60 * MINUTE;
/// How long somebody else's transaction is merely waited for.
const TRANSACTION_PATIENCE: u64 = 30 * MINUTE;
/// Longest sentence about a failed verification, in characters, that still leaves room for what follows from it.
const MAX_FAILURE: usize = 500;
/// Boots of one image after which it is given up.
const MAX_BOOTS: u32 = 2;
/// Longest deployment id that is recorded, in bytes; a real one has about 80. The annotation has to be read back.
const MAX_ID: usize = 512;
/// Longest wait before a drain that no fresh write of MCC asked for, in milliseconds.
pub const RESTORE_SPREAD: u64 = 30 * MINUTE;
/// Head room on `/boot` beyond the kernel itself, in bytes.
const BOOT_MARGIN: u64 = 1 << 20;

impl<'a> Rules<'a> {
    pub(super) fn travelling(&self, wanted: &Wanted<'_>) -> Decision {
        if let Some(decision) = self.given_up(wanted) {
            return decision;
        }
        let facts = match self.verified(wanted) {
            Ok(facts) => facts,
            Err(decision) => return *decision,
        };
        self.unfit(wanted, facts).or_else(|| self.transaction(wanted)).unwrap_or_else(|| match self.staged(wanted) {
            None => self.stage(wanted),
            Some(staged) => self
                .kernel_arguments(wanted, staged)
                .or_else(|| self.hindrance(wanted))
                .or_else(|| self.restored(wanted))
                .or_else(|| self.drain(wanted))
                .unwrap_or_else(|| self.reboot(wanted, staged)),
        })
    }

    /// Row 16.
    fn given_up(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let attempt = self.node.attempt.as_ref()?;
        if attempt.image != wanted.image || attempt.boot_id == self.machine.boot_id {
            return None;
        }
        let was_to_boot = |d: &Deployment| match &attempt.deployment {
            Some(id) => d.id == *id,
            // Too long, or of an agent that did not record it.
            None => self.is_wanted(d, wanted),
        };
        // A failed finalization left none, so one that is there is an older one.
        let finalized = !self.machine.finalize_failed
            && self.host.deployments.iter().any(|d| !d.booted && !d.staged && was_to_boot(d));
        let cause = if self.machine.finalize_failed {
            ". The previous boot could not finalize it: see `journalctl -b -1 -u ostree-finalize-staged`"
        } else {
            ""
        };
        let out = format!("delete the annotation {ATTEMPT} to try again, or {RETARGET}");
        let image = wanted.image.digest().short();
        if finalized || attempt.rolled_back {
            let message = format!("{image} was booted and the host went back to the image before it; {out}");
            let decision = self.refuse("16", Reason::RolledBack, message);
            // A fall-back of the boot loader leaves it first in boot order: the next reboot would boot it again.
            let Some(first) = self.host.next_boot().filter(|next| !next.booted && !next.staged && was_to_boot(next))
            else {
                return Some(decision);
            };
            if self.host.backend.drops_staged() && !attempt.rolled_back {
                let attempt = Attempt { rolled_back: true, ..attempt.clone() };
                return Some(decision.doing(Action::RecordAttempt { attempt }));
            }
            return Some(self.keep_from_booting(decision, first));
        }
        (attempt.count >= MAX_BOOTS).then(|| {
            let message = format!("{image} did not come up in {MAX_BOOTS} boots{cause}; {out}");
            self.refuse("16", Reason::NeverCameUp, message)
        })
    }

    /// Row 17.
    fn verified(&self, wanted: &Wanted<'a>) -> Result<&'a ImageFacts, Box<Decision>> {
        if let Some(facts) = wanted.facts {
            return Ok(facts);
        }
        let subject = wanted.image.to_string();
        let verifying = || {
            rule("17", Reason::Verifying, format!("verifying the signature of {}", wanted.image.digest().short()))
                .state(NodeState::Working)
        };
        if self.running(Step::Verify, &subject) {
            // Looking again must not turn a failure that is being looked at back into a new beginning.
            return Err(Box::new(match self.failure(Step::Verify, &subject) {
                Some(failure) => self.unverified(failure),
                None => verifying(),
            }));
        }
        Err(Box::new(match self.failure(Step::Verify, &subject) {
            None => verifying().doing(Action::Verify { image: wanted.image.clone() }),
            Some(failure) => {
                self.when_due(self.unverified(failure), failure, Action::Verify { image: wanted.image.clone() })
            }
        }))
    }

    fn unverified(&self, failure: &Failure) -> Decision {
        let awaited = matches!(failure.fault.reason, Reason::SignatureMissing | Reason::ManifestMissing);
        let patience = if awaited { self.limits.signature_grace } else { TRANSIENT_PATIENCE };
        let mut decision = self.failed("17", failure, patience);
        if matches!(decision.reason, Reason::ImageInvalid | Reason::WrongArchitecture) {
            decision.message = format!("{}; {RETARGET}", printable(&decision.message, MAX_FAILURE));
        }
        self.rest_if_refused(decision)
    }

    /// Row 18.
    fn unfit(&self, wanted: &Wanted<'_>, facts: &ImageFacts) -> Option<Decision> {
        let image = wanted.image.digest().short();
        if facts.architecture != self.machine.architecture {
            let message = format!(
                "{image} is built for {} and this machine is {}; build one for it, {RETARGET}",
                printable(&facts.architecture, 50),
                self.machine.architecture
            );
            return Some(self.refuse("18", Reason::WrongArchitecture, message));
        }
        if !facts.bootable {
            let message = format!(
                "{image} is not a bootable image: it carries neither the label ostree.bootable nor containers.bootc; \
                 build one from an image-mode base, {RETARGET}"
            );
            return Some(self.refuse("18", Reason::NotBootable, message));
        }
        if let Some(floor) = self.limits.minimum_created
            && facts.created.is_none_or(|created| created < floor)
        {
            let created = match facts.created {
                Some(created) => format!("was created at {}", time::text(created)),
                None => "has no usable time of creation in its config".to_owned(),
            };
            let message = format!(
                "{image} {created}, and no image from before {} may be booted; lower --minimum-created \
                 (REBASE_AGENT_MINIMUM_CREATED in a drop-in of the unit), or build and sign a newer one, {RETARGET}",
                time::text(floor)
            );
            return Some(self.refuse("18", Reason::TooOld, message));
        }
        // It was staged once, and dropped for this; to stage it again would only find the same.
        let unusable = self.memory.unusable.as_ref().filter(|it| is_staged(it, &wanted.image, wanted.facts));
        if let Some(refusal) = unusable.and_then(|deployment| self.config_fault("18", deployment)) {
            return Some(refusal);
        }
        self.config_ahead("18", wanted, facts.rendered_config.as_deref())
    }

    /// Row 19, as far as it is not obsolete.
    fn transaction(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let subject = wanted.image.to_string();
        if let Some(running) = &self.observed.running {
            let (reason, message) = match running.step {
                Step::Stage => (Reason::Staging, self.staging(wanted)),
                Step::KernelArguments => (Reason::KernelArguments, "applying kernel arguments".to_owned()),
                Step::StartFinalizer => (Reason::Finalizer, "starting the finalizer".to_owned()),
                Step::UpdateBootloader => (Reason::Rebooting, "updating the boot loader before the reboot".to_owned()),
                Step::Reboot => (Reason::Rebooting, format!("rebooting into {}", wanted.image.digest().short())),
                Step::Verify | Step::DropStaged | Step::CancelTransaction => {
                    (Reason::HostBusy, "finishing what was begun".to_owned())
                }
            };
            return Some(rule("19", reason, message).state(NodeState::Working));
        }
        let active = self.host.transaction.as_ref()?;
        if active.ours.is_some() {
            // Row 19 of an earlier run of the agent: staging attaches to it.
            let decision = rule("19", Reason::Staging, self.staging(wanted)).state(NodeState::Working);
            let stage = Action::Stage { image: wanted.image.clone() };
            return Some(match self.failure(Step::Stage, &subject) {
                None => decision.doing(stage),
                Some(failure) => self.when_due(decision, failure, stage),
            });
        }
        let waited = self.waited(Clock::ForeignTransaction, &subject);
        let message = if waited < TRANSACTION_PATIENCE {
            format!("waiting for the transaction `{}` to end", active.title)
        } else {
            format!(
                "the transaction `{}` of {} has blocked the update for over 30 min; {}",
                active.title,
                active.client,
                self.host.backend.end_transaction()
            )
        };
        Some(
            rule("19", Reason::ForeignTransaction, message)
                .state(NodeState::Working)
                .clock(Clock::ForeignTransaction, subject)
                .wake(SOON),
        )
    }

    fn staging(&self, wanted: &Wanted<'_>) -> String {
        format!("staging {} while workloads run", wanted.image.digest().short())
    }

    /// Rows 20 and 21.
    fn stage(&self, wanted: &Wanted<'_>) -> Decision {
        if self.host.booted().is_some_and(|booted| booted.layered) {
            let message = format!(
                "packages are layered on this host by hand, {}, or put them into the image",
                self.host.backend.unlayer()
            );
            return self.refuse("20", Reason::LayeredPackages, message);
        }
        if let (Some(free), Some(needed)) = (self.machine.boot_free, self.machine.boot_needed) {
            // The rollback's kernel makes room at finalization (libostree 2023.7 and later).
            let reclaimable = self.host.rollback().filter(|rollback| !rollback.pinned).map_or(0, |_| needed);
            if free.saturating_add(reclaimable) < needed.saturating_add(BOOT_MARGIN) {
                let message = format!(
                    "/boot has {} MiB free and another kernel needs {}; remove deployments with {}",
                    free >> 20,
                    needed >> 20,
                    self.host.backend.remove_rollback()
                );
                return self.refuse("20", Reason::BootFull, message);
            }
        }
        let stage = Action::Stage { image: wanted.image.clone() };
        match self.failure(Step::Stage, &wanted.image.to_string()) {
            None => rule("21", Reason::Staging, self.staging(wanted)).state(NodeState::Working).doing(stage),
            Some(failure) => {
                let decision = self.rest_if_refused(self.failed("21", failure, TRANSIENT_PATIENCE));
                self.when_due(decision, failure, stage)
            }
        }
    }

    /// Row 22.
    fn kernel_arguments(&self, wanted: &Wanted<'_>, staged: &Deployment) -> Option<Decision> {
        if let Some(decision) = self.config_fault("22", staged) {
            return Some(decision);
        }
        let demanded = staged.wanted_arguments.as_ref()?;
        let booted = self.host.booted();
        let entry = booted.and_then(|booted| booted.arguments.as_deref());
        let update = Update {
            booted: entry.unwrap_or(&self.machine.command_line),
            old: booted.and_then(|booted| booted.wanted_arguments.as_deref()),
            // What is not known is set: a backend that cannot says so.
            staged: staged.arguments.as_deref().or(entry).unwrap_or_default(),
            new: demanded,
        };
        let Change { append, delete } = match self.host.backend {
            Backend::RpmOstree => update.change(),
            Backend::Bootc => update.shortfall(),
        }?;
        let subject = wanted.image.to_string();
        let action = Action::SetKernelArguments { image: wanted.image.clone(), append, delete };
        match self.failure(Step::KernelArguments, &subject) {
            None => {
                let message = format!("giving the staged image the kernel arguments of {}", wanted.config);
                Some(rule("22", Reason::KernelArguments, message).state(NodeState::Working).doing(action))
            }
            Some(failure) => {
                let decision = self.rest_if_refused(self.failed("22", failure, TRANSIENT_PATIENCE));
                Some(self.when_due(decision, failure, action))
            }
        }
    }

    /// Row 23: everything that may hold up the reboot holds it up before the drain.
    fn hindrance(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let working = |reason, message: String| rule("23", reason, message).state(NodeState::Working);
        let image = wanted.image.digest().short();
        if let Some(why) = &self.node.hold {
            let message =
                format!("{image} is staged and held: {}. Remove the annotation {HOLD} to go on", printable(why, 200));
            return Some(working(Reason::Held, message));
        }
        if let Some(inhibitor) = self.machine.inhibitors.first() {
            let message = format!(
                "{image} is staged; `{}` inhibits the shutdown: {}. See `systemd-inhibit --list`",
                inhibitor.who, inhibitor.why
            );
            return Some(working(Reason::Inhibited, message).wake(SOON));
        }
        if let Some(left) = self.limits.uptime_floor.checked_sub(self.machine.uptime).filter(|left| *left > 0) {
            let minutes = self.limits.uptime_floor / MINUTE;
            let message = format!("{image} is staged; no reboot before the machine has been up {minutes} min");
            return Some(working(Reason::UptimeFloor, message).wake(left));
        }
        match self.machine.finalizer {
            UnitState::Active => None,
            _ => {
                let decision =
                    working(Reason::Finalizer, format!("{image} is staged; starting its finalizer")).wake(SOON);
                Some(match self.failure(Step::StartFinalizer, "") {
                    None => decision.doing(Action::StartFinalizer),
                    Some(failure) => {
                        let decision = self.rest_if_refused(self.failed("23", failure, TRANSIENT_PATIENCE));
                        self.when_due(decision, failure, Action::StartFinalizer)
                    }
                })
            }
        }
    }

    /// Row 23: after a restore of etcd, Nodes say that they run an older image. MCC takes them for done, so it does not
    /// keep them to maxUnavailable; chance has to.
    fn restored(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let node = self.node;
        let asked_for = node.desired_image != node.current_image || node.desired_config != node.current_config;
        let drained = node.desired_drain.as_deref().is_some_and(|drain| drain.starts_with("drain-"));
        if asked_for || drained || node.topology.as_deref() == Some("SingleReplica") {
            return None;
        }
        let subject = wanted.image.to_string();
        let left =
            self.memory.spread.checked_sub(self.waited(Clock::RestoreSpread, &subject)).filter(|left| *left > 0)?;
        let message = format!(
            "the Node names {} as current and another image runs, as after a restore of etcd; it is staged, and the \
             drain waits a random time of up to {} min so that not all nodes drain at once",
            wanted.image.digest().short(),
            RESTORE_SPREAD / MINUTE
        );
        let decision = rule("23", Reason::RestoreSpread, message).state(NodeState::Working);
        Some(decision.clock(Clock::RestoreSpread, subject).wake(left))
    }

    /// Row 24.
    fn drain(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        // The workloads of a single node have nowhere to go.
        if self.node.topology.as_deref() == Some("SingleReplica") {
            return None;
        }
        let value = format!("drain-{}", wanted.config);
        let image = wanted.image.digest().short();
        let (desired, applied) = (self.node.desired_drain.as_deref(), self.node.last_applied_drain.as_deref());
        let pending = |reason, message: String| {
            rule("24", reason, message).state(NodeState::Working).clock(Clock::Drain, value.clone())
        };
        if desired != Some(value.as_str()) {
            // The controller compares strings: a drain asked for before the uncordon is acknowledged would count as done.
            if let Some(uncordon) =
                desired.filter(|desired| desired.starts_with("uncordon-") && applied != Some(*desired))
            {
                return Some(self.uncordon_pending("24", uncordon.to_owned()));
            }
            let message = format!("{image} is staged; waiting for the drain controller to drain the node");
            return Some(pending(Reason::DrainPending, message).doing(Action::RequestDrain { value: value.clone() }));
        }
        if applied != Some(value.as_str()) {
            let waited = self.waited(Clock::Drain, &value);
            return Some(if waited < DRAIN_PATIENCE {
                let message = format!("{image} is staged; waiting for the drain controller to drain the node");
                pending(Reason::DrainPending, message).wake(DRAIN_PATIENCE.saturating_sub(waited))
            } else {
                let message = "the drain has taken over an hour; look for a PodDisruptionBudget that allows no \
                               eviction: `oc adm drain --dry-run`, and the machine-config-controller's log. The \
                               request stands";
                pending(Reason::DrainStuck, message.to_owned()).state(NodeState::Degraded)
            });
        }
        // A reboot that may not be tried yet needs no fresh look, and a look would change the reason to and fro.
        let reboot = self.failure(Step::Reboot, &wanted.image.to_string());
        let not_due = reboot.is_some_and(|failure| self.due_in(failure, Backoff::TRANSIENT) > 0);
        match self.node.schedulable {
            Some(false) => None,
            None if not_due => None,
            // Part of the reboot already; the cluster is told when it is certain.
            None => Some(rebooting(wanted).doing(Action::ConfirmDrain)),
            Some(true) => {
                let message = "somebody uncordoned the node after it was drained; it is uncordoned for good, then \
                               drained again";
                Some(
                    pending(Reason::UncordonedByOther, message.to_owned())
                        .doing(Action::RequestUncordon { value: self.uncordon(wanted.config) }),
                )
            }
        }
    }

    /// Row 25.
    fn reboot(&self, wanted: &Wanted<'_>, staged: &Deployment) -> Decision {
        let image = wanted.image.clone();
        let decision = rule("25", Reason::Rebooting, format!("rebooting into {}", image.digest().short()))
            .state(NodeState::Working);
        let updates_bootloader = self.machine.bootloader_update != UnitState::Absent;
        if updates_bootloader && self.memory.bootloader_updated_for.as_ref() != Some(&image) {
            return decision.doing(Action::UpdateBootloader);
        }
        let boot_id = self.machine.boot_id.clone();
        let deployment = Some(staged.id.clone()).filter(|id| id.len() <= MAX_ID);
        let earlier = self.node.attempt.as_ref().filter(|attempt| attempt.image == image);
        let recorded = earlier.filter(|attempt| attempt.boot_id == boot_id);
        if recorded.is_none_or(|attempt| attempt.deployment != deployment) {
            let count = earlier.map_or(0, |attempt| attempt.count).saturating_add(u32::from(recorded.is_none()));
            let unknown = self.node.attempt.as_ref().map(|attempt| attempt.unknown.clone()).unwrap_or_default();
            let attempt = Attempt { image, boot_id, count, deployment, rolled_back: false, unknown };
            return decision.doing(Action::RecordAttempt { attempt });
        }
        match self.failure(Step::Reboot, &image.to_string()) {
            None => decision.doing(Action::Reboot { image }),
            Some(failure) => {
                self.when_due(self.failed("25", failure, TRANSIENT_PATIENCE), failure, Action::Reboot { image })
            }
        }
    }
}

fn rebooting(wanted: &Wanted<'_>) -> Decision {
    rule("25", Reason::Rebooting, format!("rebooting into {}", wanted.image.digest().short()))
}
