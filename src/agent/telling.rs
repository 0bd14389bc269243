//! What people see in the cluster besides the Node's annotations: our MachineConfigNode, and Events. Nothing waits for
//! them.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::{Agent, Event};
use crate::backoff::{Backoff, jittered, random};
use crate::cluster::ClusterError;
use crate::cluster::event::Event as News;
use crate::cluster::mcn::{Wanted, obstacle};
use crate::decide::Decision;
use crate::journal::id;
use crate::model::is_image;

/// Most Events in [`EVENTS_PERIOD`]; an update needs seven.
const MAX_EVENTS: usize = 30;
const EVENTS_PERIOD: Duration = Duration::from_secs(60 * 60);

/// The state of our MachineConfigNode and of the Events.
pub(super) struct Teller {
    /// The uid of the Node that the next fields are about.
    uid: String,
    /// What the last request applied or tried to apply.
    tried: Option<Wanted>,
    /// The last request succeeded, so the object shows `tried`.
    shown: bool,
    running: bool,
    failures: u32,
    not_before: Instant,
    /// The last sentence about it in the journal.
    said: Option<String>,
    /// The names of the Events that were sent, or are one too many, since the time beside them.
    events: (Instant, BTreeSet<String>),
}

/// The answer to a write of our MachineConfigNode.
pub(super) type Told = Result<Option<String>, ClusterError>;

impl Teller {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            uid: String::new(),
            tried: None,
            shown: false,
            running: false,
            failures: 0,
            not_before: now,
            said: None,
            events: (now, BTreeSet::new()),
        }
    }

    /// Whether `wanted` is to be written now.
    fn is_due(&self, wanted: &Wanted, now: Instant) -> bool {
        match &self.tried {
            _ if self.running => false,
            Some(tried) if self.shown => tried != wanted,
            Some(tried) if tried.has_target_of(wanted) => now >= self.not_before,
            _ => true,
        }
    }

    /// Whether the Event of this name is sent: not twice, and not more than [`MAX_EVENTS`].
    fn takes(&mut self, name: &str, now: Instant) -> bool {
        let (since, sent) = &mut self.events;
        if now.duration_since(*since) >= EVENTS_PERIOD {
            (*since, *sent) = (now, BTreeSet::new());
        }
        if sent.len() > MAX_EVENTS || !sent.insert(name.to_owned()) {
            return false;
        }
        let fits = sent.len() <= MAX_EVENTS;
        if !fits {
            tracing::warn!(
                message_id = id::UNSHOWN,
                "the agent sent {MAX_EVENTS} Events within an hour and sends no more of them in that hour; see this journal"
            );
        }
        fits
    }
}

impl Agent {
    /// Writes our MachineConfigNode if `decision` changes it. A new process reads it first, and writes only a difference.
    pub(super) fn show(&mut self, decision: &Decision) {
        let (Some(node), Some(object)) = (self.observed.cluster.known(), &self.node) else { return };
        if self.teller.uid != object.uid {
            // A Node that was created again has a new MachineConfigNode.
            (self.teller.uid, self.teller.tried) = (object.uid.clone(), None);
        }
        let staged = self.observed.host.known().and_then(|host| host.staged());
        let staged = staged.is_some_and(|staged| node.desired().is_some_and(|image| is_image(staged, image, None)));
        let Some(wanted) = Wanted::of(node, decision, staged) else { return };
        if !self.teller.is_due(&wanted, Instant::now()) {
            if !self.teller.shown && !self.teller.running {
                self.wake = self.wake.min(self.teller.not_before);
            }
            return;
        }
        self.teller.running = true;
        self.teller.tried = Some(wanted.clone());
        let (api, events, now) = (self.neighbours.api.clone(), self.events.clone(), self.now().unix);
        tokio::spawn(async move {
            let told = api.show(&wanted, now).await;
            let _ = events.send(Event::Shown(told)).await;
        });
    }

    /// Sends an Event about our Node, unless it was sent before. A failed one is dropped.
    pub(super) fn tell(&mut self, news: &News) {
        let Some(node) = &self.node else { return };
        let name = &node.facts.name;
        let boot = self.observed.machine.known().map_or("", |machine| machine.boot_id.0.as_str());
        let called = news.name(name, boot);
        if !self.teller.takes(&called, Instant::now()) {
            return;
        }
        let object = news.object(&called, name, &node.uid, self.now().unix);
        let (api, word) = (self.neighbours.api.clone(), news.word);
        tokio::spawn(async move {
            if let Err(error) = api.tell(&object).await {
                tracing::warn!(message_id = id::UNSHOWN, "the Event {word} was not created and is dropped: {error}");
            }
        });
    }

    pub(super) fn shown(&mut self, told: Told) {
        let teller = &mut self.teller;
        teller.running = false;
        teller.shown = told.is_ok();
        let sentence = match &told {
            Ok(sentence) => sentence.clone(),
            Err(error) => obstacle(error),
        };
        teller.failures = if told.is_ok() { 0 } else { teller.failures.saturating_add(1) };
        let backoff = if sentence.is_some() { Backoff::CLUSTER_REFUSAL } else { Backoff::CLUSTER };
        let pause = Duration::from_millis(jittered(backoff.delay(teller.failures), random()));
        teller.not_before = Instant::now() + pause;
        match (sentence, told) {
            (Some(sentence), _) => {
                if teller.said.as_ref() != Some(&sentence) {
                    tracing::warn!(message_id = id::UNSHOWN, "{sentence}");
                }
                teller.said = Some(sentence);
            }
            (None, Err(error)) => tracing::debug!("cannot write the MachineConfigNode: {error}"),
            (None, Ok(_)) => teller.said = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_sent_once_and_not_without_end() {
        let now = Instant::now();
        let mut teller = Teller::new(now);
        let mut sent = |name: &str, at: Instant| teller.takes(name, at);
        assert!(sent("n.0", now) && !sent("n.0", now));
        let more = (1..1000).filter(|number| sent(&format!("n.{number}"), now)).count();
        assert_eq!(more + 1, MAX_EVENTS);
        assert!(!sent("n.0", now + EVENTS_PERIOD / 2));
        assert!(sent("n.0", now + EVENTS_PERIOD), "the next hour begins with none");
    }
}
