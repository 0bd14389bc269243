//! Reads the Node, the host and the machine, and tracks how current the results are.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::{Agent, Event, OVERTAKEN};
use crate::cluster::Told;
use crate::host::boot::DeploymentsStamp;
use crate::model::{HostFacts, MachineFacts, PinnedImage, Reading, Work};
use crate::observe;
use crate::trust::TrustStamp;

/// The extent of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Look {
    /// Kernel, systemd, logind.
    Machine,
    /// Also the deployments.
    Host,
    /// Also the whole Node, as a reboot needs.
    Everything,
}

/// The results of one read.
pub(super) struct Readings {
    node: Option<Told>,
    /// With the stamp from before the read, so that a change during the read is noticed.
    host: Option<(DeploymentsStamp, Reading<HostFacts>)>,
    machine: Reading<MachineFacts>,
}

/// The age of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Age {
    /// The deployments have changed since they were read. The agent decides nothing until they are read again.
    Stale,
    /// No change since the read is known. This is enough for all actions but a reboot.
    Current,
    /// Everything has just been read, also the whole Node. The next decision may begin a reboot.
    Confirmed,
}

/// The state of reading: the age of the results, the running read, and the stamps of the files.
#[derive(Debug)]
pub(super) struct Sight {
    age: Age,
    /// A read is running.
    looking: bool,
    /// The next read: the running one may have begun before the change that requested it.
    next: Option<Look>,
    /// The stamp of the deployments before they were read.
    deployments: DeploymentsStamp,
    /// The stamp of the trust files before the last verification of each image, successful or not.
    pub(super) trust: BTreeMap<PinnedImage, TrustStamp>,
}

impl Sight {
    pub(super) fn new(deployments: DeploymentsStamp) -> Self {
        Self { age: Age::Current, looking: false, next: None, deployments, trust: BTreeMap::new() }
    }

    /// Whether a read may begin now. If not, it follows the running one.
    fn may_look(&mut self, how: Look) -> bool {
        if self.looking {
            self.next = self.next.max(Some(how));
            return false;
        }
        self.looking = true;
        true
    }

    /// Records the end of a read. `deployments` is set if it read them; `confirmed` if it read the whole Node and no newer
    /// state arrived meanwhile.
    fn looked(&mut self, deployments: Option<DeploymentsStamp>, confirmed: bool) {
        self.looking = false;
        self.age = match (deployments, self.age) {
            (Some(stamp), _) => {
                self.deployments = stamp;
                if confirmed { Age::Confirmed } else { Age::Current }
            }
            (None, Age::Stale) => Age::Stale,
            (None, _) => Age::Current,
        };
    }

    /// Takes the read that was requested while another one ran, limited to `furthest`.
    fn take_next(&mut self, furthest: Look) -> Option<Look> {
        let how = self.next.take()?.min(furthest);
        if how >= Look::Host {
            self.age = Age::Stale;
        }
        Some(how)
    }

    /// Records that the deployments have changed.
    pub(super) fn spoil(&mut self) {
        self.age = Age::Stale;
    }

    /// Records that a decision was made. A confirmed read serves only one.
    pub(super) fn decided(&mut self) {
        if self.age == Age::Confirmed {
            self.age = Age::Current;
        }
    }

    pub(super) fn is_stale(&self) -> bool {
        self.age == Age::Stale
    }

    pub(super) fn is_confirmed(&self) -> bool {
        self.age == Age::Confirmed
    }
}

impl Agent {
    pub(super) fn look(&mut self, how: Look) {
        if !self.sight.may_look(how) {
            return;
        }
        let (neighbours, events) = (self.neighbours.clone(), self.events.clone());
        tokio::spawn(async move {
            let node = async { if how == Look::Everything { Some(neighbours.api.full().await) } else { None } };
            let host = async {
                let stamp = neighbours.host.root().deployments_stamp();
                if how >= Look::Host { Some((stamp, observe::deployments(&neighbours.host).await)) } else { None }
            };
            let (node, host, machine) = tokio::join!(node, host, observe::machine(&neighbours.host));
            let _ = events.send(Event::Looked(Box::new(Readings { node, host, machine }))).await;
        });
    }

    pub(super) fn looked(&mut self, readings: Readings) {
        let mut confirmed = false;
        match readings.node {
            Some(Ok(node)) => {
                self.cluster.failures = 0;
                confirmed = !self.is_outdated(&node);
                if !confirmed {
                    self.cluster.not_before = self.cluster.not_before.max(Instant::now() + OVERTAKEN);
                }
                self.take_node(Ok(node));
            }
            // The watch reports a deleted Node, so a failed read is only retried.
            Some(Err(error)) => self.cluster_failed(&error, "cannot read the Node"),
            None => {}
        }
        let stamp = readings.host.map(|(stamp, host)| {
            self.host_seen = true;
            self.observed.host = host;
            stamp
        });
        self.observed.machine = readings.machine;
        self.sight.looked(stamp, confirmed);
        // The next decision requests the Node again if it still needs it.
        let furthest = if Instant::now() < self.cluster.not_before { Look::Host } else { Look::Everything };
        if let Some(how) = self.sight.take_next(furthest) {
            self.look(how);
        }
    }

    /// Discards the verified image when a file that verification depends on has changed, and reads the deployments again
    /// when they have changed. This costs a few calls of stat(2), so every step begins with it, also the last one before
    /// the reboot.
    pub(super) fn check_stamps(&mut self) {
        let settings = self.neighbours.engine.settings();
        let changed = self.sight.trust.values().find_map(|trust| trust.changed(settings));
        if let Some(path) = changed {
            tracing::info!("{} changed, and verification depends on it; verifying the image again", path.display());
            self.withdraw_proofs();
            // The running verification may have read the file before the change.
            if matches!(self.running(), Some(Work::Verify { .. })) {
                self.abort();
            }
        }
        // Our own changes of the host are read when the task has ended.
        let changes_host = self.running().is_some_and(|work| !matches!(work, Work::Verify { .. }));
        if !self.sight.is_stale()
            && !changes_host
            && self.neighbours.host.root().deployments_stamp() != self.sight.deployments
        {
            self.sight.spoil();
            self.look(Look::Host);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::boot::Root;

    fn stamp() -> DeploymentsStamp {
        Root::new("/nowhere".into()).deployments_stamp()
    }

    #[test]
    fn a_look_asked_for_during_another_follows_it() {
        let mut sight = Sight::new(stamp());
        assert!(sight.may_look(Look::Machine), "none is under way");
        assert!(!sight.may_look(Look::Host) && !sight.may_look(Look::Machine), "one at a time");
        sight.looked(None, false);
        assert_eq!(sight.take_next(Look::Everything), Some(Look::Host), "the furthest that was asked for");
        assert!(sight.is_stale(), "nothing is decided on deployments that are about to be read again");
        assert_eq!(sight.take_next(Look::Everything), None);
    }

    #[test]
    fn a_look_at_everything_waits_for_the_api_server() {
        let mut sight = Sight::new(stamp());
        assert!(sight.may_look(Look::Machine) && !sight.may_look(Look::Everything));
        sight.looked(None, false);
        assert_eq!(sight.take_next(Look::Host), Some(Look::Host));
    }

    #[test]
    fn only_a_read_of_the_deployments_makes_them_current() {
        let mut sight = Sight::new(stamp());
        sight.spoil();
        sight.looked(None, false);
        assert!(sight.is_stale(), "a look at the machine says nothing about deployments");
        sight.looked(Some(stamp()), false);
        assert!(!sight.is_stale() && !sight.is_confirmed());
    }

    #[test]
    fn a_confirmation_serves_one_decision() {
        let mut sight = Sight::new(stamp());
        sight.looked(Some(stamp()), true);
        assert!(sight.is_confirmed());
        sight.decided();
        assert!(!sight.is_confirmed() && !sight.is_stale());
    }
}
