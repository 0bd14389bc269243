//! What the process remembers between two decisions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Decision;
use crate::model::{
    Action, Annotate, Deployment, Fault, HostFacts, ImageFacts, NodeFacts, Now, Observed, PinnedImage, Reason,
    Severity, UnitState, Work,
};

/// How many dropped checksums are remembered; a host has few deployments.
const DROPPED: usize = 32;

/// How work has failed so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What failed; it says nothing of work on something else.
    pub work: Work,
    /// The last error.
    pub fault: Fault,
    /// When the first of an unbroken row happened, on the monotonic clock.
    pub first: u64,
    /// When the last one happened.
    pub last: u64,
    /// How many there were.
    pub count: u32,
}

/// How a task ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it was for. Verification found out what is given here.
    Succeeded(Option<ImageFacts>),
    /// It was told to stop, and did.
    GaveUp,
    /// It failed.
    Failed(Fault),
}

/// A wait whose length matters.
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
}

/// Since when, and for what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Since {
    /// A change of subject restarts the clock.
    pub subject: String,
    /// On the monotonic clock.
    pub mono: u64,
}

/// What the process remembers. All of it may be lost at any moment without harm.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Images verified in this process.
    pub verified: BTreeMap<PinnedImage, ImageFacts>,
    /// Failures that have not been followed by a success; at most one of each kind of work.
    pub failures: Vec<Failure>,
    /// Waits that are under way.
    pub clocks: BTreeMap<Clock, Since>,
    /// Staged checksums that were dropped once.
    pub dropped: Vec<String>,
    /// The deployment that was dropped because its rendered config cannot be used. A digest never changes.
    pub unusable: Option<Deployment>,
    /// The bootloader update unit has run for this image.
    pub bootloader_updated_for: Option<PinnedImage>,
    /// The retry annotation when it was last looked at, empty for none; `None` before the first look.
    pub retry: Option<String>,
    /// How long this process waits before a drain that only a restored database asks for, in milliseconds; chosen at
    /// random when it starts.
    pub spread: u64,
}

impl Memory {
    /// How `work` has failed so far.
    #[must_use]
    pub fn failure(&self, work: &Work) -> Option<&Failure> {
        self.failures.iter().find(|failure| failure.work.is(work))
    }

    /// Takes in how a task ended.
    pub fn finished(&mut self, work: &Work, outcome: Outcome, now: Now) {
        match outcome {
            Outcome::Succeeded(verified) => {
                self.forget(work);
                if let Some(facts) = verified {
                    // An image that is no longer desired is verified again if it is desired later.
                    self.verified = BTreeMap::from([(facts.image.clone(), facts)]);
                }
                match work {
                    Work::DropStaged { checksum } => {
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
            // As the MCD: an old boot loader does not keep the node from its update.
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
                // An outage before it must not use up the time that a pipeline has to sign what it pushed.
                let awaited = |reason: Reason| reason.severity() == Severity::Awaited;
                let restarts = awaited(fault.reason) && !awaited(old.fault.reason);
                let first = if restarts { now.mono } else { old.first };
                Failure { work: work.clone(), fault, first, last: now.mono, count: old.count.saturating_add(1) }
            }
            None => Failure { work: work.clone(), fault, first: now.mono, last: now.mono, count: 1 },
        });
    }

    /// What was not staged has dropped nothing.
    fn gave_up(&mut self, work: &Work) {
        if matches!(work, Work::Stage { .. }) {
            self.dropped.clear();
        }
    }

    /// Forgets how work of this kind failed.
    fn forget(&mut self, work: &Work) {
        self.failures.retain(|failure| !failure.work.is_like(work));
    }

    /// Withdraws what was verified, and makes verification due: a file that it rests on has changed.
    pub fn withdraw(&mut self) {
        self.verified.clear();
        self.failures.retain(|failure| !matches!(failure.work, Work::Verify { .. }));
    }

    /// Makes all failed work due if the retry annotation has a new value. What it says when the process starts is no
    /// request, nor is its removal.
    pub fn heed_retry(&mut self, node: &NodeFacts) {
        let now = node.retry.clone().unwrap_or_default();
        let before = self.retry.replace(now.clone());
        if before.is_some_and(|before| before != now) && !now.is_empty() {
            // No delay follows no failure; `first` stays, and with it what has been waited for.
            self.failures.iter_mut().for_each(|failure| failure.count = 0);
            self.unusable = None;
        }
    }

    /// Starts, keeps or restarts the clock that `decision` waits on; stops those whose cause is visibly gone.
    pub fn note(&mut self, observed: &Observed, decision: &Decision, now: Now) {
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
        if let Action::Begin(Work::DropStaged { checksum }) = &decision.action {
            let staged = observed.host.known().and_then(HostFacts::staged);
            let unusable = staged.filter(|staged| staged.checksum == *checksum && staged.config_fault.is_some());
            self.unusable = unusable.cloned().or(self.unusable.take());
        }
        if matches!(decision.action, Action::Begin(Work::Stage { .. })) {
            // What we stage ourselves may be dropped again; what it is staged over is dropped by that.
            let staged = observed.host.known().and_then(HostFacts::staged);
            self.dropped = staged.map(|staged| staged.checksum.clone()).into_iter().collect();
        }
        if decision.action == Action::Annotate(Annotate::Settle) || decision.reason.is_at_rest() {
            self.clocks.clear();
            self.failures.retain(|failure| matches!(failure.work, Work::Verify { .. }));
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
        // What is there at start is no request, the same value again is none, nor is its removal.
        let values = [Some("a"), Some("a"), Some("b"), None, Some("b"), Some(""), Some("c"), Some("c")];
        assert_eq!(values.map(&mut heed), [false, false, true, false, true, false, true, false]);
    }
}
