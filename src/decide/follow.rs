//! Rows 4 to 9: the desired image, and the work and deployments of other images, which the agent stops and drops.

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
                "`{who}` writes this node's state; the agent does nothing until `{who}` has not written for 15 min. Take \
                 the node out of its DaemonSet, or disable rebase-agent.service"
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
                let message = "this pool has no layered image; the agent waits until it has one";
                return Err(Box::new(by(Rule::NotLayered, Reason::NotLayered, message)));
            }
            (None, Some(_)) => {
                let message = "the pool no longer has a layered image, and going back to a non-layered OS needs files \
                               written on the node: hand it back to the Machine Config Daemon (see README, hand-back), \
                               or give the pool a MachineOSConfig again, and raise the pool's maxUnavailable until this \
                               node has its image, because MCC gives a stuck node an image only if a slot is free";
                let decision =
                    by(Rule::LayeringReverted, Reason::LayeringReverted, message).state(NodeState::Unreconcilable);
                return Err(Box::new(self.rest(decision)));
            }
        };
        let image = desired.image().map_err(|error| {
            let message = format!(
                "desiredImage is not usable: {error}. It is copied from the MachineOSConfig's \
                 status.currentImagePullSpec; correct it there"
            );
            Box::new(self.refuse(Rule::Malformed, Reason::ImageMalformed, message))
        })?;
        let config = node.desired_config.as_deref().ok_or_else(|| {
            let message =
                "desiredImage is set but desiredConfig is not; see the log of the machine-config-controller, which writes \
                 both";
            Box::new(self.refuse(Rule::Malformed, Reason::ConfigMissing, message))
        })?;
        let facts = self.memory.verified.get(image);
        Ok(Wanted { image, config, facts })
    }

    /// Row 5: the annotations of the installed image are not published yet.
    fn first_boot(&self) -> Decision {
        const KEYS: [&str; 5] = ["currentConfig", "desiredConfig", "currentImage", "desiredImage", "state"];
        // MCC uses it to label a Node that was installed into a custom pool.
        const FIRST_PIVOT: &str = "firstPivotConfig";
        let Some(booted) = self.host.booted() else {
            return by(
                Rule::FirstBoot,
                Reason::HostNotImageMode,
                "no deployment is booted, so the agent has no image to publish",
            );
        };
        let value = |key: &str| self.machine.first_boot.as_ref()?.get(&format!("{MCO}{key}"));
        let publish = |mut pairs: Vec<(&str, String)>| {
            pairs.extend(value(FIRST_PIVOT).map(|config| (FIRST_PIVOT, config.clone())));
            let annotations = pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
            by(
                Rule::FirstBoot,
                Reason::FirstBoot,
                "publishing the annotations of the image that this node was installed with",
            )
            .doing(Annotate::FirstBoot { annotations })
        };
        if self.machine.first_boot.is_some() {
            let Some(image) = value("currentImage") else {
                return by(
                    Rule::NotLayered,
                    Reason::NotLayered,
                    "this node was installed without a layered image; the agent waits until the pool has one",
                );
            };
            let is_booted = |image| is_image(booted, &image, None) || is_named(booted, &image);
            if parse(image).is_ok_and(is_booted) && value("currentConfig").is_some() {
                // Values that MCC has already written stay.
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
                let message = "the booted image has no `machineconfig` label, so the rendered config that it was built \
                               from is unknown; build it with on-cluster layering, or annotate the Node with \
                               currentConfig and currentImage";
                by(Rule::FirstBoot, Reason::BootedConfigUnknown, message).state(NodeState::Degraded)
            }
        }
    }

    /// Stops work on an image while no valid image is desired. The uncordon of a drained node comes first.
    pub(super) fn without_work(&self, decision: Decision) -> Decision {
        match &self.observed.running {
            Some(running) if for_image(running).is_some() && decision.action == Action::Nothing => {
                decision.doing(Action::Abort)
            }
            _ => decision,
        }
    }

    /// Row 9: our own work on an image that is no longer desired.
    pub(super) fn obsolete(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        if let Some(running) = &self.observed.running {
            if let Some(image) = for_image(running).filter(|image| *image != wanted.image && !self.prefetches(image)) {
                let message = format!("{image} is no longer desired; cancelling the work on it");
                return Some(by(Rule::NotDesired, Reason::Cancelled, message).doing(Action::Abort));
            }
            if !matches!(running, Work::CancelTransaction { .. }) {
                return None;
            }
        }
        let ours = self.host.transaction.as_ref()?.ours.as_ref()?;
        let prefetched = self.observed.hint().is_some_and(|hint| hint.digest() == ours && self.prefetches(hint));
        if ours == wanted.image.digest() || prefetched {
            return None;
        }
        let message = format!("the transaction for {} is obsolete; cancelling it", ours.short());
        let decision = by(Rule::NotDesired, Reason::Cancelled, message).wake(SOON);
        if self.observed.running.is_some() {
            return Some(decision);
        }
        Some(self.begin(decision, Work::CancelTransaction { digest: ours.clone() }))
    }

    /// Row 9: a staged deployment that is not desired. The desired image with packages layered on it counts as another
    /// one, because a rebase would keep the packages. A locked deployment does not boot, so it may stay where it cannot be
    /// dropped.
    pub(super) fn staged_by_other(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let Some(staged) = self.host.staged() else { return self.left_first(wanted) };
        let unverified = wanted.facts.is_none() && is_named(staged, wanted.image);
        let harmless = staged.locked && !self.host.backend.drops_staged();
        if !staged.layered && (harmless || unverified || self.is_wanted(staged, wanted)) {
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

    /// Row 9: a deployment of an earlier attempt that the host went back from. The boot loader's fall-back leaves it first
    /// in boot order. While its image is desired, row 16 drops it.
    fn left_first(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let attempted = self.node.attempt.as_ref()?.deployment.as_ref()?;
        let first = self.host.next_boot().filter(|next| !next.booted && next.id == *attempted)?;
        let dropped = self.is_wanted(first, wanted) || !self.host.backend.drops_staged();
        if dropped { None } else { self.drop_other(wanted, first.checksum.clone(), &first.id) }
    }

    fn drop_other(&self, wanted: &Wanted<'_>, checksum: String, what: &str) -> Option<Decision> {
        let stages = matches!(self.observed.running, Some(Work::Stage { .. }));
        if stages || self.host.transaction.is_some() {
            // If the desired image is not booted yet, row 19 waits for it. If it is, it must not settle meanwhile.
            let arrived = self.host.booted().is_some_and(|booted| self.is_wanted(booted, wanted));
            let message =
                format!("{what} is pending and not desired; the agent drops it when the host's transaction has ended");
            return arrived.then(|| by(Rule::NotDesired, Reason::StagedByOther, message).wake(SOON));
        }
        if self.memory.dropped.contains(&checksum) {
            return Some(self.staged_again(what));
        }
        let drop = Work::DropStaged { checksum };
        let message = match self.failure(&drop) {
            Some(failure) if !self.is_running(&drop) => {
                format!("{what} is pending and not desired; dropping it failed: {}", failure.fault.message)
            }
            _ => format!("dropping {what}, which is pending and not desired"),
        };
        let decision = by(Rule::NotDesired, Reason::StagedByOther, message);
        Some(if self.is_running(&drop) { decision } else { self.begin(decision, drop) })
    }

    fn staged_again(&self, what: &str) -> Decision {
        let message = format!(
            "{what} was staged again by hand after the agent had dropped it; drop it with {}. To run another image, set \
             it in the pool's MachineOSConfig",
            self.host.backend.drop_by_hand()
        );
        by(Rule::NotDesired, Reason::StagedByOther, message)
    }

    /// Row 9 for a backend that cannot drop: the desired image is staged over the other one. If it is not booted, rows 17
    /// to 21 do that anyway. If it is booted, it is staged again, and verified first, because that changes the host.
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
                "{what} is staged and not desired, and the running image cannot be staged over it: {why}. Drop it with \
                 {}",
                self.host.backend.drop_by_hand()
            );
            by(Rule::NotDesired, Reason::StagedByOther, message)
        };
        let work = match wanted.facts {
            None => Work::Verify { image: wanted.image.clone() },
            Some(facts) if facts.bootable && facts.architecture == self.machine.architecture => {
                Work::Stage { image: wanted.image.clone() }
            }
            Some(_) => return Some(by_hand("it is built for another architecture or is not bootable")),
        };
        Some(match self.failure(&work) {
            None => decision.doing(work),
            Some(failure) => {
                let mut decision = by_hand(&printable(&failure.fault.message, 600));
                // A node that is Done stays Done when a person stages another image on it.
                if self.node.is_done() {
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
        Work::Verify { image }
        | Work::Fetch { image }
        | Work::Stage { image }
        | Work::SetKernelArguments { image, .. } => Some(image),
        _ => None,
    }
}
