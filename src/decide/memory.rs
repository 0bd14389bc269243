//! The memory of the process between two decisions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Decision;
use crate::model::{
    Action, Annotate, Deployment, Fault, HostFacts, ImageFacts, NodeFacts, Now, Observed, PinnedImage, Reason,
    Severity, UnitState, Work,
};

/// Most dropped checksums that are remembered; a host has few deployments.
const DROPPED: usize = 32;

/// The failures of one piece of work so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The failed work. The failure does not count for the same kind of work on another object.
    pub work: Work,
    /// The last error.
    pub fault: Fault,
    /// Time of the first failure without a success since, on the monotonic clock.
    pub first: u64,
    /// Time of the last failure.
    pub last: u64,
    /// Number of failures since the first.
    pub count: u32,
}

/// The outcome of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The work succeeded. Verification returns the facts of the image.
    Succeeded(Option<ImageFacts>),
    /// The task was cancelled.
    GaveUp,
    /// The work failed.
    Failed(Fault),
}

/// A wait whose duration is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "named after the rule that waits")]
pub enum Clock {
    HostUnreadable,
    Health,
    Drain,
    Uncordon,
    ForeignTransaction,
    ConfigAhead,
    RebootAccepted,
    RestoreSpread,
    OutOfService,
    Prefetch,
}

/// The start of a wait, and its subject.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Since {
    /// The subject. A new one restarts the clock.
    pub subject: String,
    /// The start, on the monotonic clock.
    pub mono: u64,
}

/// The memory of the process. Its loss at a restart does no harm.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Images verified in this process.
    pub verified: BTreeMap<PinnedImage, ImageFacts>,
    /// Failures without a success since; at most one for each kind of work, and one for each image that is verified.
    pub failures: Vec<Failure>,
    /// The current waits.
    pub clocks: BTreeMap<Clock, Since>,
    /// Checksums of deployments that the agent has dropped.
    pub dropped: Vec<String>,
    /// The deployment that was dropped because its rendered config cannot be used. Another pull of the same digest would
    /// have the same fault.
    pub unusable: Option<Deployment>,
    /// The image for which the bootloader update has run.
    pub bootloader_updated_for: Option<PinnedImage>,
    /// The image that this process has fetched last, and when, on the monotonic clock.
    pub fetched: Option<(PinnedImage, u64)>,
    /// How long this process waits before it fetches the pool's new image, in milliseconds. Random for each process.
    pub prefetch_delay: u64,
    /// The last value of the retry annotation, empty if there was none; `None` before the first read.
    pub retry: Option<String>,
    /// How long this process waits before a drain after a restore of etcd, in milliseconds. Random for each process.
    pub spread: u64,
}

impl Memory {
    /// The failures of `work` so far.
    #[must_use]
    pub fn failure(&self, work: &Work) -> Option<&Failure> {
        self.failures.iter().find(|failure| failure.work.is(work))
    }

    /// Records the outcome of a task.
    pub fn finished(&mut self, work: &Work, outcome: Outcome, now: Now) {
        match outcome {
            Outcome::Succeeded(verified) => {
                self.forget(work);
                if let Some(facts) = verified {
                    self.verified.insert(facts.image.clone(), facts);
                }
                match work {
                    Work::Fetch { image } => self.fetched = Some((image.clone(), now.mono)),
                    Work::DropStaged { checksum } => {
                        // The host tool removes images that no deployment uses.
                        self.fetched = None;
                        self.dropped.truncate(DROPPED);
                        self.dropped.insert(0, checksum.clone());
                    }
                    Work::UpdateBootloader { image } => self.bootloader_updated_for = Some(image.clone()),
                    Work::Reboot { image } => {
                        let since = Since { subject: image.to_string(), mono: now.mono };
                        self.clocks.insert(Clock::RebootAccepted, since);
                    }
                    _ => {}
                }
            }
            // As in the MCD, a failed update of the boot loader does not prevent the update of the OS.
            Outcome::Failed(_) if let Work::UpdateBootloader { image } = work => {
                self.bootloader_updated_for = Some(image.clone());
            }
            Outcome::Failed(fault) => {
                self.failed(work, fault, now);
                self.gave_up(work);
            }
            Outcome::GaveUp => self.gave_up(work),
        }
    }

    fn failed(&mut self, work: &Work, fault: Fault, now: Now) {
        let old = self.failure(work).cloned();
        self.forget(work);
        self.failures.push(match old {
            Some(old) => {
                // An earlier outage must not count against the time that a pipeline has to sign a pushed image.
                let awaited = |reason: Reason| reason.severity() == Severity::Awaited;
                let restarts = awaited(fault.reason) && !awaited(old.fault.reason);
                let first = if restarts { now.mono } else { old.first };
                Failure { work: work.clone(), fault, first, last: now.mono, count: old.count.saturating_add(1) }
            }
            None => Failure { work: work.clone(), fault, first: now.mono, last: now.mono, count: 1 },
        });
    }

    /// Staging that failed has replaced no deployment, so the checksums noted for it are forgotten.
    fn gave_up(&mut self, work: &Work) {
        if matches!(work, Work::Stage { .. }) {
            self.dropped.clear();
        }
    }

    /// Forgets the failures of this kind of work. Verification and fetch have two objects, the desired image and the next.
    fn forget(&mut self, work: &Work) {
        let two = matches!(work, Work::Verify { .. } | Work::Fetch { .. });
        self.failures.retain(|failure| if two { !failure.work.is(work) } else { !failure.work.is_like(work) });
    }

    /// Forgets what concerns images that are neither desired nor to be fetched. If one is desired again, it is verified
    /// again.
    fn forget_others(&mut self, observed: &Observed) {
        if observed.cluster.known().is_none() {
            return;
        }
        self.verified.retain(|image, _| observed.concerns(image));
        self.failures.retain(|failure| match &failure.work {
            Work::Verify { image } | Work::Fetch { image } => observed.concerns(image),
            _ => true,
        });
    }

    /// Discards the verified images and makes verification due, because a file that it depends on has changed.
    pub fn withdraw(&mut self) {
        self.verified.clear();
        self.failures.retain(|failure| !matches!(failure.work, Work::Verify { .. }));
    }

    /// Makes all failed work due if the retry annotation has a new value. The value at the start of the process and the
    /// removal of the annotation are no requests.
    pub fn heed_retry(&mut self, node: &NodeFacts) {
        let now = node.retry.clone().unwrap_or_default();
        let before = self.retry.replace(now.clone());
        if before.is_some_and(|before| before != now) && !now.is_empty() {
            // A count of 0 has no delay. `first` stays, so that the time until Degraded goes on.
            self.failures.iter_mut().for_each(|failure| failure.count = 0);
            self.unusable = None;
        }
    }

    /// Starts, keeps or restarts the clock of `decision`, and removes clocks whose cause is gone.
    pub fn note(&mut self, observed: &Observed, decision: &Decision, now: Now) {
        self.forget_others(observed);
        if observed.host.known().is_some() && observed.machine.known().is_some() {
            self.clocks.remove(&Clock::HostUnreadable);
        }
        if observed.host.known().is_some_and(|h| h.transaction.is_none()) {
            self.clocks.remove(&Clock::ForeignTransaction);
        }
        if observed.machine.known().is_some_and(|m| m.kubelet == UnitState::Active) {
            self.clocks.remove(&Clock::Health);
        }
        if let Some(node) = observed.cluster.known() {
            let drain = node.desired_drain.as_deref().unwrap_or_default();
            let answered = node.desired_drain == node.last_applied_drain;
            if answered || !drain.starts_with("drain-") {
                self.clocks.remove(&Clock::Drain);
            }
            if answered || !drain.starts_with("uncordon-") {
                self.clocks.remove(&Clock::Uncordon);
            }
        }
        let waits = |clock| decision.clock.as_ref().is_some_and(|(waits, _)| *waits == clock);
        let read = observed.cluster.known().is_some() && observed.host.known().is_some();
        if read && !waits(Clock::OutOfService) {
            self.clocks.remove(&Clock::OutOfService);
        }
        if read && !waits(Clock::Prefetch) {
            self.clocks.remove(&Clock::Prefetch);
        }
        if let Action::Begin(Work::DropStaged { checksum }) = &decision.action {
            let staged = observed.host.known().and_then(HostFacts::staged);
            let unusable = staged.filter(|staged| staged.checksum == *checksum && staged.config_fault.is_some());
            self.unusable = unusable.cloned().or(self.unusable.take());
        }
        if matches!(decision.action, Action::Begin(Work::Stage { .. })) {
            // The image that the agent stages now may be dropped again later. Staging drops the deployment that is staged
            // now.
            let staged = observed.host.known().and_then(HostFacts::staged);
            self.dropped = staged.map(|staged| staged.checksum.clone()).into_iter().collect();
        }
        if decision.action == Action::Annotate(Annotate::Settle) || decision.reason.is_at_rest() {
            self.clocks.retain(|clock, _| *clock == Clock::Prefetch);
            self.failures.retain(|failure| matches!(failure.work, Work::Verify { .. } | Work::Fetch { .. }));
        }
        if let Some((clock, subject)) = &decision.clock {
            let fresh = || Since { subject: subject.clone(), mono: now.mono };
            let since = self.clocks.entry(*clock).or_insert_with(fresh);
            if since.subject != *subject {
                *since = fresh();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_retry_annotation_makes_failed_work_due() {
        let fault = Fault { reason: Reason::SignatureRejected, message: "x".into() };
        let failed = Failure { work: Work::StartFinalizer, fault, first: 1, last: 2, count: 7 };
        let mut memory = Memory { failures: vec![failed], ..Memory::default() };
        let mut heed = |retry: Option<&str>| {
            memory.heed_retry(&NodeFacts { retry: retry.map(str::to_owned), ..NodeFacts::default() });
            let failure = memory.failures.first_mut().unwrap();
            assert_eq!((failure.first, failure.last), (1, 2), "what was waited for stays");
            std::mem::replace(&mut failure.count, 7) == 0
        };
        // The first value, an unchanged value and the removal are no requests.
        let values = [Some("a"), Some("a"), Some("b"), None, Some("b"), Some(""), Some("c"), Some("c")];
        assert_eq!(values.map(&mut heed), [false, false, true, false, true, false, true, false]);
    }
}
