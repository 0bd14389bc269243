//! Rows 4 to 9: is there an image to follow, and what must stop or go because it is not that one.

use super::limits::{MINUTE, OTHER_DAEMON_QUIET, SOON};
use super::{Decision, Rule, Rules, Wanted, by};
use crate::model::annotations::MCO;
use crate::model::{
    Action, Annotate, NodeState, PinnedImage, Pullspec, Reason, Work, is_image, is_named, name_of, parse, printable,
};

impl<'a> Rules<'a> {
    pub(super) fn other_daemon(&self) -> Option<Decision> {
        let other = self.node.other_writer.as_ref()?;
        let quiet_in = other.unix.saturating_add(OTHER_DAEMON_QUIET).saturating_sub(self.now.unix);
        (quiet_in > 0).then(|| {
            let who = printable(&other.manager, 100);
            let message = format!(
                "`{who}` writes this node's state; standing aside until it has been silent for 15 min. Take the node \
                 out of its DaemonSet, or disable rebase-agent.service"
            );
            self.rest(by(Rule::OtherDaemon, Reason::OtherDaemon, message).wake(quiet_in.min(MINUTE)))
        })
    }

    pub(super) fn wanted(&self) -> Result<Wanted<'a>, Box<Decision>> {
        let node = self.node;
        if node.current_config.is_none() {
            return Err(Box::new(self.first_boot()));
        }
        let desired = match (&node.desired_image, &node.current_image) {
            (Some(desired), _) => desired,
            (None, None) => {
                let message = "this pool has no layered image; waiting until it gets one";
                return Err(Box::new(by(Rule::NotLayered, Reason::NotLayered, message)));
            }
            (None, Some(_)) => {
                let message = "the pool left layering, and going back to a non-layered OS needs files written on the \
                               node: hand it back to the Machine Config Daemon (see README, hand-back), or give the \
                               pool a MachineOSConfig again, and raise the pool's maxUnavailable until this node has its \
                               image, because MCC gives a stuck node an image only where a slot is free";
                let decision =
                    by(Rule::LayeringReverted, Reason::LayeringReverted, message).state(NodeState::Unreconcilable);
                return Err(Box::new(self.rest(decision)));
            }
        };
        let image = desired.image().map_err(|error| {
            let message = format!(
                "desiredImage cannot be followed: {error}. It is copied from the MachineOSConfig's \
                 status.currentImagePullSpec; correct it there"
            );
            Box::new(self.refuse(Rule::Malformed, Reason::ImageMalformed, message))
        })?;
        let config = node.desired_config.as_deref().ok_or_else(|| {
            let message =
                "desiredImage is set and desiredConfig is not; the machine-config-controller writes both, see its log";
            Box::new(self.refuse(Rule::Malformed, Reason::ConfigMissing, message))
        })?;
        let facts = self.memory.verified.get(image);
        Ok(Wanted { image, config, facts })
    }

    /// Row 5: what this node was installed with is not published yet.
    fn first_boot(&self) -> Decision {
        const KEYS: [&str; 5] = ["currentConfig", "desiredConfig", "currentImage", "desiredImage", "state"];
        // Of an image booted into a custom pool, MCC labels the Node for that pool by it.
        const FIRST_PIVOT: &str = "firstPivotConfig";
        let Some(booted) = self.host.booted() else {
            return by(
                Rule::FirstBoot,
                Reason::HostNotImageMode,
                "no deployment is booted, so there is nothing to publish",
            );
        };
        let value = |key: &str| self.machine.first_boot.as_ref()?.get(&format!("{MCO}{key}"));
        let publish = |mut pairs: Vec<(&str, String)>| {
            pairs.extend(value(FIRST_PIVOT).map(|config| (FIRST_PIVOT, config.clone())));
            let annotations = pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
            by(Rule::FirstBoot, Reason::FirstBoot, "publishing what this node was installed with")
                .doing(Annotate::FirstBoot { annotations })
        };
        if self.machine.first_boot.is_some() {
            let Some(image) = value("currentImage") else {
                return by(
                    Rule::NotLayered,
                    Reason::NotLayered,
                    "this node was installed without a layered image; waiting for one",
                );
            };
            let is_booted = |image| is_image(booted, &image, None) || is_named(booted, &image);
            if parse(image).is_ok_and(is_booted) && value("currentConfig").is_some() {
                // What MCC has already decided stays.
                let decided = |key: &str| match key {
                    "desiredConfig" => self.node.desired_config.is_some(),
                    "desiredImage" => self.node.desired_image.is_some(),
                    _ => false,
                };
                let keys = KEYS.iter().filter(|key| !decided(key));
                return publish(keys.filter_map(|key| Some((*key, value(key)?.clone()))).collect());
            }
        }
        let name = booted.reference.as_deref().map(name_of);
        match (name, &booted.digest, &booted.rendered_config) {
            (Some(name), Some(digest), Some(config)) => {
                let image = format!("{name}@{digest}");
                publish(vec![
                    ("currentConfig", config.clone()),
                    ("desiredConfig", self.node.desired_config.clone().unwrap_or_else(|| config.clone())),
                    ("currentImage", image.clone()),
                    ("desiredImage", self.node.desired_image.clone().map_or(image, Pullspec::into)),
                    ("state", NodeState::Done.as_str().to_owned()),
                ])
            }
            _ => {
                let message = "the booted image carries no `machineconfig` label, so it cannot be told which rendered \
                               config it stands for; build it with on-cluster layering, or annotate the Node with \
                               currentConfig and currentImage";
                by(Rule::FirstBoot, Reason::BootedConfigUnknown, message).state(NodeState::Degraded)
            }
        }
    }

    /// While nothing valid is desired, what was begun for an image is stopped; a node that was drained is given back
    /// first.
    pub(super) fn without_work(&self, decision: Decision) -> Decision {
        match &self.observed.running {
            Some(running) if for_image(running).is_some() && decision.action == Action::Nothing => {
                decision.doing(Action::Abort)
            }
            _ => decision,
        }
    }

    /// Row 9, what we do ourselves for an image that is no longer desired.
    pub(super) fn obsolete(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        if let Some(running) = &self.observed.running {
            if let Some(image) = for_image(running).filter(|image| *image != wanted.image) {
                let message = format!("{image} is no longer desired; stopping the work on it");
                return Some(by(Rule::NotDesired, Reason::Cancelled, message).doing(Action::Abort));
            }
            if !matches!(running, Work::CancelTransaction { .. }) {
                return None;
            }
        }
        let ours = self.host.transaction.as_ref()?.ours.as_ref()?;
        if ours == wanted.image.digest() {
            return None;
        }
        let message = format!("the transaction for {} is obsolete; cancelling it", ours.short());
        let decision = by(Rule::NotDesired, Reason::Cancelled, message).wake(SOON);
        if self.observed.running.is_some() {
            return Some(decision);
        }
        Some(self.begin(decision, Work::CancelTransaction { digest: ours.clone() }))
    }

    /// Row 9. Packages that a person layered onto the desired image make it another one, and a rebase would carry them
    /// along. What is locked does not boot, and staging replaces it.
    pub(super) fn staged_by_other(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let Some(staged) = self.host.staged() else { return self.left_first(wanted) };
        let unverified = wanted.facts.is_none() && is_named(staged, wanted.image);
        if !staged.layered && (staged.locked || unverified || self.is_wanted(staged, wanted)) {
            return None;
        }
        let checksum = staged.checksum.clone();
        let mut what = staged.reference.as_deref().map_or_else(|| checksum.clone(), |text| printable(text, 200));
        if staged.layered {
            what.push_str(" with packages layered by hand");
        }
        if !self.host.backend.drops_staged() {
            return self.stage_over(wanted, &checksum, &what);
        }
        self.drop_other(wanted, checksum, &what)
    }

    /// Row 9 for a deployment of this agent's that the host went back from: the boot loader's fall-back leaves it first
    /// in boot order. While it is desired, row 16 drops it.
    fn left_first(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let attempted = self.node.attempt.as_ref()?.deployment.as_ref()?;
        let first = self.host.next_boot().filter(|next| !next.booted && next.id == *attempted)?;
        let dropped = self.is_wanted(first, wanted) || !self.host.backend.drops_staged();
        if dropped { None } else { self.drop_other(wanted, first.checksum.clone(), &first.id) }
    }

    fn drop_other(&self, wanted: &Wanted<'_>, checksum: String, what: &str) -> Option<Decision> {
        let stages = matches!(self.observed.running, Some(Work::Stage { .. }));
        if stages || self.host.transaction.is_some() {
            // On the way row 19 waits for it; what has arrived must not settle meanwhile.
            let arrived = self.host.booted().is_some_and(|booted| self.is_wanted(booted, wanted));
            let message =
                format!("{what} boots next and is not desired; dropping it when the host's transaction has ended");
            return arrived.then(|| by(Rule::NotDesired, Reason::StagedByOther, message).wake(SOON));
        }
        if self.memory.dropped.contains(&checksum) {
            return Some(self.staged_again(what));
        }
        let drop = Work::DropStaged { checksum };
        let message = match self.failure(&drop) {
            Some(failure) if !self.is_running(&drop) => {
                format!("{what} boots next and is not desired, and cannot be dropped: {}", failure.fault.message)
            }
            _ => format!("dropping {what}, which boots next and is not desired"),
        };
        let decision = by(Rule::NotDesired, Reason::StagedByOther, message);
        Some(if self.is_running(&drop) { decision } else { self.begin(decision, drop) })
    }

    fn staged_again(&self, what: &str) -> Decision {
        let message = format!(
            "{what} was staged again by hand after it had been dropped; waiting. {} drops it; a pool's own image is set \
             in its MachineOSConfig",
            self.host.backend.drop_by_hand()
        );
        by(Rule::NotDesired, Reason::StagedByOther, message)
    }

    /// Row 9 where nothing can be dropped: the desired image is staged over what is not desired. On the way, rows 17 to
    /// 21 do that anyway. Where it runs already it is staged once more: that changes the host, so it is verified first.
    fn stage_over(&self, wanted: &Wanted<'_>, checksum: &str, what: &str) -> Option<Decision> {
        let arrived = self.host.booted().is_some_and(|booted| self.is_wanted(booted, wanted));
        let message = format!("staging the running image over {what}, which is staged and not desired");
        let decision = by(Rule::NotDesired, Reason::StagedByOther, message);
        if self.observed.running.is_some() || self.host.transaction.is_some() {
            return arrived.then(|| decision.wake(SOON));
        }
        if self.memory.dropped.iter().any(|dropped| dropped == checksum) {
            return Some(self.staged_again(what));
        }
        if !arrived {
            return None;
        }
        let by_hand = |why: &str| {
            let message = format!(
                "{what} is staged and not desired, and the running image cannot be staged over it: {why}. {} drops it",
                self.host.backend.drop_by_hand()
            );
            by(Rule::NotDesired, Reason::StagedByOther, message)
        };
        let work = match wanted.facts {
            None => Work::Verify { image: wanted.image.clone() },
            Some(facts) if facts.bootable && facts.architecture == self.machine.architecture => {
                Work::Stage { image: wanted.image.clone() }
            }
            Some(_) => return Some(by_hand("it says of itself that this machine cannot boot it")),
        };
        Some(match self.failure(&work) {
            None => decision.doing(work),
            Some(failure) => {
                let mut decision = by_hand(&printable(&failure.fault.message, 600));
                // A node that is Done stays Done when a person stages something on it.
                if self.is_coherently_done() {
                    decision = self.report_trust(decision, failure);
                } else {
                    let state = self.failed(Rule::NotDesired, failure).state;
                    decision = self.rest_if_refused(Decision { state, ..decision });
                }
                self.when_due(decision, failure, work)
            }
        })
    }
}

/// The image that `work` prepares the host for.
fn for_image(work: &Work) -> Option<&PinnedImage> {
    match work {
        Work::Verify { image } | Work::Stage { image } | Work::SetKernelArguments { image, .. } => Some(image),
        _ => None,
    }
}
