//! Rows 16 to 21, 23 and 24: from the desired image to a staged deployment.

use super::limits::{BOOT_MARGIN, MAX_BOOTS, MAX_FAILURE, SOON, TRANSACTION_PATIENCE};
use super::refuse::NEEDS_SLOT;
use super::{Clock, Decision, Failure, Rule, Rules, Wanted, by};
use crate::kernel_arguments::{Change, Update};
use crate::model::annotations::ATTEMPT;
use crate::model::{Annotate, Attempt, Backend, Deployment, ImageFacts, NodeState, Reason, Work, is_staged, printable};
use crate::time;

impl<'a> Rules<'a> {
    pub(super) fn travelling(&self, wanted: &Wanted<'_>) -> Decision {
        if let Some(decision) = self.given_up(wanted) {
            return decision;
        }
        let facts = match self.verified(wanted) {
            Ok(facts) => facts,
            Err(decision) => return *decision,
        };
        if let Some(decision) = self.unfit(wanted, facts).or_else(|| self.transaction(wanted)) {
            return decision;
        }
        let Some(staged) = self.staged(wanted) else {
            return self
                .no_room()
                .or_else(|| self.fetch(wanted))
                .or_else(|| self.hindrance(wanted, None))
                .unwrap_or_else(|| self.stage(wanted));
        };
        self.hindrance(wanted, Some(staged))
            .or_else(|| self.kernel_arguments(wanted, staged))
            .or_else(|| self.drain(wanted))
            .unwrap_or_else(|| self.reboot(wanted, staged))
    }

    /// Row 16.
    fn given_up(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let attempt = self.node.attempt.as_ref()?;
        if attempt.image != *wanted.image || attempt.boot_id == self.machine.boot_id {
            return None;
        }
        let was_to_boot = |d: &Deployment| match &attempt.deployment {
            Some(id) => d.id == *id,
            // The id was too long, or an older agent did not record it.
            None => self.is_wanted(d, wanted),
        };
        // After a failed finalization an existing deployment of the image is an older one.
        let finalized = !self.machine.finalize_failed
            && self.host.deployments.iter().any(|d| !d.booted && !d.staged && was_to_boot(d));
        let out =
            format!("delete the annotation {ATTEMPT} to try again, or set another image in the pool and {NEEDS_SLOT}");
        let image = wanted.image.digest().short();
        if finalized || attempt.rolled_back {
            let message = format!("the host booted {image} and went back to the image before it; {out}");
            let decision = self.refuse(Rule::GivenUp, Reason::RolledBack, message);
            // The boot loader's fall-back leaves it first in boot order, so the next reboot would boot it again.
            let Some(first) = self.host.next_boot().filter(|next| !next.booted && !next.staged && was_to_boot(next))
            else {
                return Some(decision);
            };
            if self.host.backend.drops_staged() && !attempt.rolled_back {
                let attempt = Attempt { rolled_back: true, ..attempt.clone() };
                return Some(decision.doing(Annotate::RecordAttempt { attempt }));
            }
            return Some(self.keep_from_booting(decision, first));
        }
        (attempt.count >= MAX_BOOTS).then(|| {
            let message = match self.machine.finalize_failed {
                true => format!(
                    "{image} did not come up in {MAX_BOOTS} boots, because the host could not finalize it: see `journalctl \
                     -b -1 -u ostree-finalize-staged`; {out}"
                ),
                false => format!("{image} did not come up in {MAX_BOOTS} boots; {out}"),
            };
            self.refuse(Rule::GivenUp, Reason::NeverCameUp, message)
        })
    }

    /// Row 17.
    fn verified(&self, wanted: &Wanted<'a>) -> Result<&'a ImageFacts, Box<Decision>> {
        if let Some(facts) = wanted.facts {
            return Ok(facts);
        }
        let verify = Work::Verify { image: wanted.image.clone() };
        let verifying = || {
            by(Rule::Verify, Reason::Verifying, format!("verifying the signature of {}", wanted.image.digest().short()))
                .state(NodeState::Working)
        };
        if self.is_running(&verify) {
            // While the retry runs, keep reporting the failure.
            return Err(Box::new(match self.failure(&verify) {
                Some(failure) => self.unverified(failure),
                None => verifying(),
            }));
        }
        Err(Box::new(match self.failure(&verify) {
            None => verifying().doing(verify),
            Some(failure) => self.when_due(self.unverified(failure), failure, verify),
        }))
    }

    fn unverified(&self, failure: &Failure) -> Decision {
        let mut decision = self.failed(Rule::Verify, failure);
        if matches!(decision.reason, Reason::ImageInvalid | Reason::WrongArchitecture) {
            decision.message = format!(
                "{}; set another image in the pool, and {NEEDS_SLOT}",
                printable(&decision.message, MAX_FAILURE)
            );
        }
        self.rest_if_refused(decision)
    }

    /// Row 18.
    fn unfit(&self, wanted: &Wanted<'_>, facts: &ImageFacts) -> Option<Decision> {
        let image = wanted.image.digest().short();
        if facts.architecture != self.machine.architecture {
            let message = format!(
                "{image} is built for {} but this machine is {}; build an image for it, set it in the pool, and {NEEDS_SLOT}",
                printable(&facts.architecture, 50),
                self.machine.architecture
            );
            return Some(self.refuse(Rule::Unfit, Reason::WrongArchitecture, message));
        }
        if !facts.bootable {
            let message = format!(
                "{image} is not a bootable image: it has neither the label ostree.bootable nor containers.bootc; build \
                 an image from an image-mode base, set it in the pool, and {NEEDS_SLOT}"
            );
            return Some(self.refuse(Rule::Unfit, Reason::NotBootable, message));
        }
        if let Some(floor) = self.limits.minimum_created
            && facts.created.is_none_or(|created| created < floor)
        {
            let floor = time::text(floor);
            let message = match facts.created.map(time::text) {
                Some(created) => format!(
                    "{image} was created at {created}, before --minimum-created {floor}; lower that \
                     (REBASE_AGENT_MINIMUM_CREATED in a drop-in of the unit), or build and sign a newer image, set it in the pool, and {NEEDS_SLOT}"
                ),
                None => format!(
                    "{image} has no usable time of creation in its config, and --minimum-created is {floor}; unset that \
                     (REBASE_AGENT_MINIMUM_CREATED in a drop-in of the unit), or build and sign a newer image, set it in the pool, and {NEEDS_SLOT}"
                ),
            };
            return Some(self.refuse(Rule::Unfit, Reason::TooOld, message));
        }
        // It was staged once and dropped for this fault, which the same digest has again.
        let unusable =
            self.memory.unusable.as_ref().filter(|it| is_staged(it, wanted.image, wanted.facts, self.host.backend));
        if let Some(refusal) = unusable.and_then(|deployment| self.config_fault(Rule::Unfit, deployment)) {
            return Some(refusal);
        }
        self.config_ahead(Rule::Unfit, wanted, facts.rendered_config.as_deref())
    }

    /// Row 19, for work and transactions that are not obsolete.
    fn transaction(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let subject = wanted.image.to_string();
        if let Some(running) = &self.observed.running {
            let (reason, message) = match running {
                Work::Fetch { .. } => (Reason::Fetching, fetching(wanted)),
                Work::Stage { .. } => (Reason::Staging, staging(wanted)),
                Work::SetKernelArguments { .. } => (Reason::KernelArguments, "applying kernel arguments".to_owned()),
                Work::StartFinalizer => (Reason::Finalizer, "starting ostree-finalize-staged.service".to_owned()),
                Work::UpdateBootloader { .. } => {
                    (Reason::Rebooting, "updating the boot loader before the reboot".to_owned())
                }
                Work::Reboot { .. } => (Reason::Rebooting, format!("rebooting into {}", wanted.image.digest().short())),
                Work::Verify { .. } | Work::DropStaged { .. } | Work::CancelTransaction { .. } => {
                    (Reason::HostBusy, "finishing the running task".to_owned())
                }
            };
            return Some(by(Rule::Transaction, reason, message).state(NodeState::Working));
        }
        let active = self.host.transaction.as_ref()?;
        if active.ours.is_some() {
            // An earlier run of the agent started it, to fetch or to stage; the fetch attaches to either.
            let decision = by(Rule::Transaction, Reason::Fetching, fetching(wanted)).state(NodeState::Working);
            return Some(self.begin(decision, Work::Fetch { image: wanted.image.clone() }));
        }
        let waited = self.waited(Clock::ForeignTransaction, &subject);
        let (title, client) = (&active.title, &active.client);
        let message = match self.host.backend {
            _ if waited < TRANSACTION_PATIENCE => format!("waiting for the transaction `{title}` to end"),
            Backend::RpmOstree => format!(
                "the transaction `{title}` of {client} has blocked the update for over 30 min; see `rpm-ostree status` \
                 and end it with `rpm-ostree cancel`"
            ),
            Backend::Bootc => format!(
                "the transaction `{title}` of {client} has blocked the update for over 30 min; see `lslocks` and \
                 `systemctl list-units '*bootc*'`, and end the program that holds the lock"
            ),
        };
        Some(
            by(Rule::Transaction, Reason::ForeignTransaction, message)
                .state(NodeState::Working)
                .clock(Clock::ForeignTransaction, subject)
                .wake(SOON),
        )
    }

    /// Row 20.
    fn no_room(&self) -> Option<Decision> {
        if self.host.booted().is_some_and(|booted| booted.layered) {
            let message = match self.host.backend {
                Backend::RpmOstree => {
                    "packages are layered on this host by hand, and a rebase would keep them; remove them with \
                     `rpm-ostree reset`, or put them into the image"
                }
                Backend::Bootc => {
                    "packages are layered on this host by hand, and `bootc switch` would silently drop them; remove them \
                     with `rpm-ostree reset`, or put them into the image"
                }
            };
            return Some(self.refuse(Rule::NoRoom, Reason::LayeredPackages, message));
        }
        if let (Some(free), Some(needed)) = (self.machine.boot_free, self.machine.boot_needed) {
            // Finalization removes the rollback's kernel if it needs the space (libostree 2023.7 and later).
            let reclaimable = self.host.rollback().filter(|rollback| !rollback.pinned).map_or(0, |_| needed);
            if free.saturating_add(reclaimable) < needed.saturating_add(BOOT_MARGIN) {
                let message = format!(
                    "/boot has {} MiB free but another kernel needs {} MiB; remove the rollback deployment with {}",
                    free >> 20,
                    needed >> 20,
                    self.host.backend.remove_rollback()
                );
                return Some(self.refuse(Rule::NoRoom, Reason::BootFull, message));
            }
        }
        None
    }

    /// Row 21.
    fn fetch(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let fetch = Work::Fetch { image: wanted.image.clone() };
        // Staging pulls, too, so a host tool that cannot only pull does not block the update.
        let fails = |failure: &Failure| matches!(failure.fault.reason, Reason::StageFailed | Reason::UnitFailed);
        if self.has_fetched(wanted.image) || self.failure(&fetch).is_some_and(fails) {
            return None;
        }
        let decision = by(Rule::Fetch, Reason::Fetching, fetching(wanted)).state(NodeState::Working);
        Some(self.begin_or_retry(decision, fetch))
    }

    /// Row 23.
    fn stage(&self, wanted: &Wanted<'_>) -> Decision {
        let decision = by(Rule::Stage, Reason::Staging, staging(wanted)).state(NodeState::Working);
        self.begin_or_retry(decision, Work::Stage { image: wanted.image.clone() })
    }

    /// `decision` with `work` as its action; after a failure of it the decision about that, and a retry when it is due.
    fn begin_or_retry(&self, decision: Decision, work: Work) -> Decision {
        match self.failure(&work) {
            None => decision.doing(work),
            Some(failure) => {
                let decision = self.rest_if_refused(self.failed(decision.rule, failure));
                self.when_due(decision, failure, work)
            }
        }
    }

    /// Row 24.
    fn kernel_arguments(&self, wanted: &Wanted<'_>, staged: &Deployment) -> Option<Decision> {
        if let Some(decision) = self.config_fault(Rule::KernelArguments, staged) {
            return Some(decision);
        }
        let demanded = staged.wanted_arguments.as_ref()?;
        let booted = self.host.booted();
        let entry = booted.and_then(|booted| booted.arguments.as_deref());
        let update = Update {
            booted: entry.unwrap_or(&self.machine.command_line),
            old: booted.and_then(|booted| booted.wanted_arguments.as_deref()),
            // If the staged arguments are unknown, compare with the boot entry. A backend that cannot set them refuses.
            staged: staged.arguments.as_deref().or(entry).unwrap_or_default(),
            new: demanded,
        };
        let Change { append, delete } = match self.host.backend {
            Backend::RpmOstree => update.change(),
            Backend::Bootc => update.shortfall(),
        }?;
        let set = Work::SetKernelArguments { image: wanted.image.clone(), append, delete };
        let message = format!("setting the kernel arguments of {} on the staged image", wanted.config);
        let decision = by(Rule::KernelArguments, Reason::KernelArguments, message).state(NodeState::Working);
        Some(self.begin_or_retry(decision, set))
    }
}

fn fetching(wanted: &Wanted<'_>) -> String {
    format!("pulling {} while workloads run", wanted.image.digest().short())
}

fn staging(wanted: &Wanted<'_>) -> String {
    format!("staging {} while workloads run", wanted.image.digest().short())
}
