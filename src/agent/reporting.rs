//! Our Node: takes over its states from the API server, and patches its annotations.

use std::time::Duration;

use tokio::time::Instant;

use super::looking::Look;
use super::{Agent, Event, log};
use crate::backoff::{Backoff, jittered, random};
use crate::cluster::event::Event as News;
use crate::cluster::node::NodeObject;
use crate::cluster::{ClusterError, Told};
use crate::decide::{Decision, Rule};
use crate::journal::id;
use crate::model::Verified;
use crate::model::annotations::VERIFIED;
use crate::observe;
use crate::report::{Patch, report, vouch};
use crate::time;
use crate::trust::VerifiedImage;

/// When the API server may be asked again.
pub(super) struct Cluster {
    /// Number of our own requests that have failed in a row.
    pub(super) failures: u32,
    /// Earliest time of the next own request.
    pub(super) not_before: Instant,
    /// Time of the last failed request, and the end of the wait that the server requested.
    failed: Option<(Instant, Instant)>,
    /// A patch is running, so the agent decides nothing until its result.
    pub(super) patching: bool,
}

impl Cluster {
    pub(super) fn new(now: Instant) -> Self {
        Self { failures: 0, not_before: now, failed: None, patching: false }
    }
}

impl Agent {
    pub(super) fn is_outdated(&self, node: &NodeObject) -> bool {
        self.node.as_ref().is_some_and(|current| node.is_older_than(current))
    }

    /// Takes over a state of our Node, unless it is older than the current one. Returns whether a new decision is due.
    pub(super) fn take_node(&mut self, told: Told) -> bool {
        let first = !std::mem::replace(&mut self.node_seen, true);
        match told {
            Ok(node) => {
                let answers = self.heed_answer(&node);
                if self.is_outdated(&node) {
                    return first || answers;
                }
                let before = self.observed.cluster.known().map(|node| node.desired_image.clone());
                let retargeted = before.is_some_and(|before| before != node.facts.desired_image);
                let facts = observe::cluster(Ok(node.facts.clone()));
                let changed = facts != self.observed.cluster;
                if changed {
                    // The change may be a patch of ours whose reply was lost.
                    self.cluster.failures = 0;
                }
                self.observed.cluster = facts;
                self.node = Some(node);
                if retargeted {
                    self.look(Look::Host);
                }
                changed || first || answers
            }
            Err(error) => {
                let unknown = observe::cluster(Err(error));
                let changed = unknown != self.observed.cluster;
                self.observed.cluster = unknown;
                changed || first
            }
        }
    }

    /// Makes the retry of a failed request due at once after a read that was requested later and succeeded, unless the
    /// server requested a wait. An event of a watch is no proof, because an open watch outlives its certificate.
    fn heed_answer(&mut self, node: &NodeObject) -> bool {
        let Some(asked) = node.asked() else { return false };
        let Some((_, until)) = self.cluster.failed.take_if(|(at, _)| asked > *at) else { return false };
        self.cluster.not_before = self.cluster.not_before.min(until.max(Instant::now()));
        true
    }

    pub(super) fn cluster_failed(&mut self, error: &ClusterError, what: &str) {
        self.cluster.failures = self.cluster.failures.saturating_add(1);
        let delay = Duration::from_millis(jittered(Backoff::CLUSTER.delay(self.cluster.failures), random()));
        let (now, asked_for) = (Instant::now(), error.retry_after().unwrap_or_default());
        self.cluster.failed = Some((now, now + asked_for));
        self.cluster.not_before = now + delay.max(asked_for);
        tracing::warn!(message_id = id::FAILED, rebase_agent_reason = error.reason().as_str(), "{what}: {error}");
    }

    pub(super) fn report(&mut self, decision: &Decision) {
        let Some(node) = &self.node else { return };
        if self.observed.cluster.known().is_none() {
            return;
        }
        let mut patch = report(&node.facts, decision);
        // It goes with another change. A node that is Done has no other.
        if let Some(proof) = self.proof().filter(|_| !patch.is_empty() || decision.rule == Rule::Done) {
            let time = time::text(self.now().unix);
            let (image, rule) = (proof.image().to_string(), proof.facts().vouched_by.clone());
            vouch(&mut patch, &node.facts, &Verified { image, rule, key: proof.vouchers().to_owned(), time });
        }
        if patch.is_empty() {
            return;
        }
        if Instant::now() < self.cluster.not_before {
            self.wake = self.wake.min(self.cluster.not_before);
            return;
        }
        self.timing.add(&mut patch, &node.facts, &decision.action, self.now());
        self.cluster.patching = true;
        let (api, events, uid) = (self.neighbours.api.clone(), self.events.clone(), node.uid.clone());
        tokio::spawn(async move {
            let told = api.patch(&uid, &patch).await;
            let _ = events.send(Event::Patched(told, patch)).await;
        });
    }

    /// The proof of the desired image.
    fn proof(&self) -> Option<&VerifiedImage> {
        self.proofs.get(self.observed.cluster.known()?.desired()?)
    }

    pub(super) fn patched(&mut self, told: Told, patch: &Patch) {
        self.cluster.patching = false;
        match told {
            Ok(node) => {
                self.cluster.failures = 0;
                log::patched(patch);
                if patch.get(VERIFIED).is_some_and(Option::is_some)
                    && let Some(message) = self.proof().map(VerifiedImage::sentence)
                {
                    self.tell(&News { word: "Verified", warns: false, message });
                }
                self.take_node(Ok(node));
            }
            Err(error) => self.cluster_failed(&error, "cannot change the Node's annotations"),
        }
    }
}
