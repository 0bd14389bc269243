//! Row 10, in the background: the pool's next image is verified and fetched before this node's turn.

use super::limits::{FETCHED_LASTS, MAX_PREFETCH, MAX_RUNNING, PREFETCH_FLOOR, UNPACKED};
use super::{Clock, Decision, Failure, Rules, Wanted};
use crate::backoff::Backoff;
use crate::model::{Action, ImageFacts, PinnedImage, Reason, Work, is_image, printable};

impl Rules<'_> {
    /// Adds the next step of the prefetch to `decision`, the one of a Node that is Done. Nothing of it is staged, so nothing
    /// of it boots.
    pub(super) fn prefetch(&self, decision: Decision, wanted: &Wanted<'_>) -> Decision {
        let decision = self.unusable_hint(decision);
        let Some(image) = self.observed.hint().filter(|image| *image != wanted.image) else { return decision };
        let facts = self.memory.verified.get(image);
        let is_it = |deployment| is_image(deployment, image, facts);
        // The background check of the booted image comes first.
        if decision.action != Action::Nothing || self.host.deployments.iter().any(is_it) {
            return decision;
        }
        let next = image.digest().short();
        let clock = (Clock::Prefetch, image.to_string());
        let tell = |reason: Reason, text: String, wake: u64| {
            // A warning about the running image is more important.
            let reason = if decision.reason == Reason::Done { reason } else { decision.reason };
            let message = format!("{}; {text}", printable(&decision.message, MAX_RUNNING));
            let wake = decision.wake.unwrap_or(u64::MAX).min(wake);
            Decision { reason, message, clock: Some(clock.clone()), ..decision.clone() }.wake(wake)
        };
        if let Some(running) = &self.observed.running {
            let ours = matches!(running, Work::Verify { image: it } | Work::Fetch { image: it } if it == image);
            return if ours {
                tell(Reason::Prefetching, format!("prefetching {next}"), FETCHED_LASTS)
            } else {
                decision
            };
        }
        if self.has_fetched(image) {
            return tell(Reason::Done, format!("{next} is prefetched"), FETCHED_LASTS);
        }
        let waited = self.waited(clock.0, &clock.1);
        if let Some(left) = self.memory.prefetch_delay.checked_sub(waited).filter(|left| *left > 0) {
            return tell(Reason::Done, format!("the prefetch of {next} waits a random time"), left);
        }
        let work = match facts {
            None => Work::Verify { image: image.clone() },
            Some(facts) if !self.is_fit(facts) => {
                return tell(
                    Reason::PrefetchFailed,
                    format!("{next} is not for this machine, or too old"),
                    FETCHED_LASTS,
                );
            }
            Some(facts) => {
                let needed = facts.size.saturating_mul(UNPACKED).saturating_add(PREFETCH_FLOOR);
                if let Some(free) = self.machine.sysroot_free.filter(|free| *free < needed) {
                    let text = format!(
                        "{next} is not prefetched, because /sysroot has {} MiB free and needs {} MiB",
                        free >> 20,
                        needed >> 20
                    );
                    return tell(Reason::PrefetchNoSpace, text, Backoff::REFUSAL.delay(1));
                }
                Work::Fetch { image: image.clone() }
            }
        };
        // A person's transaction comes first.
        let is_busy = |failure: &Failure| failure.fault.reason == Reason::HostBusy;
        let retry = |failure: &Failure| if is_busy(failure) { Backoff::TRANSIENT } else { Backoff::REFUSAL };
        match self.failure(&work).map(|failure| (failure, self.due_in(failure, retry(failure)))) {
            Some((failure, due)) if due > 0 => {
                let (reason, why) = (failure.fault.reason, printable(&failure.fault.message, MAX_PREFETCH));
                match is_busy(failure) {
                    true => tell(Reason::Done, format!("the prefetch of {next} waits: {why}"), due),
                    false => tell(Reason::PrefetchFailed, format!("prefetching {next} failed: {reason}: {why}"), due),
                }
            }
            _ => tell(Reason::Prefetching, format!("prefetching {next}"), FETCHED_LASTS).doing(work),
        }
    }

    /// Whether the node may work on `image` although it is not desired.
    pub(super) fn prefetches(&self, image: &PinnedImage) -> bool {
        self.observed.hint() == Some(image) && self.node.is_done()
    }

    /// Whether this process has fetched `image` and may still count on it.
    pub(super) fn has_fetched(&self, image: &PinnedImage) -> bool {
        self.memory
            .fetched
            .as_ref()
            .is_some_and(|(fetched, at)| fetched == image && self.now.mono.saturating_sub(*at) < FETCHED_LASTS)
    }

    fn is_fit(&self, facts: &ImageFacts) -> bool {
        let recent = |floor| facts.created.is_some_and(|created| created >= floor);
        facts.bootable
            && facts.architecture == self.machine.architecture
            && self.limits.minimum_created.is_none_or(recent)
    }

    fn unusable_hint(&self, decision: Decision) -> Decision {
        let hint = self.node.prefetch.as_ref().map(|hint| (hint, "the annotation rebase-agent.openshift.io/prefetch"));
        let pool =
            self.observed.pool_image.as_ref().map(|hint| (hint, "status.currentImagePullSpec of the MachineOSConfig"));
        match hint.or(pool).map(|(hint, place)| (hint.as_str(), hint.image(), place)) {
            Some((text, Err(error), place)) if !text.is_empty() => {
                let message = format!("{}; {place} is not usable: {error}", printable(&decision.message, MAX_RUNNING));
                Decision { message, ..decision }
            }
            _ => decision,
        }
    }
}
