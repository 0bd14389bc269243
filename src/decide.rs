//! The rules, in order; the first that matches wins. Pure: no clock, no randomness, no I/O, no panic.
//!
//! Rule names are the rows of the design's table. A *resting* rule gives the node back to its workloads first: MCC
//! never retargets a cordoned node, so a refusal on a node that we drained would hold it for ever.

use crate::host::is_image;
use crate::model::{
    Action, Attempt, Clock, Decision, Deployment, Failure, Fault, HostFacts, ImageFacts, Limits, MachineFacts, Memory,
    NodeFacts, NodeState, Now, Observed, PinnedImage, Reading, Reason, Step, UnitState, printable,
};
use crate::registry::reference;
use crate::schedule::Backoff;

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;

/// How long the host may be unreadable before that is reported: rpm-ostreed may take five minutes to start.
const HOST_PATIENCE: u64 = 10 * MINUTE;
/// How long another daemon must not have written before we go on.
const OTHER_DAEMON_QUIET: u64 = 15 * MINUTE;
/// An accepted reboot that has not begun by then is asked for again; the kubelet may delay a shutdown for long.
const REBOOT_PATIENCE: u64 = 30 * MINUTE;
/// How long the kubelet may take to become active.
const HEALTH_PATIENCE: u64 = 10 * MINUTE;
/// MCD's own limit for the uncordon.
const UNCORDON_PATIENCE: u64 = 10 * MINUTE;
/// MCD's own limit for the drain.
const DRAIN_PATIENCE: u64 = 60 * MINUTE;
/// How long somebody else's transaction is merely waited for.
const TRANSACTION_PATIENCE: u64 = 30 * MINUTE;
/// How long transient failures are merely retried before they are reported as Degraded.
const TRANSIENT_PATIENCE: u64 = 15 * MINUTE;
/// `Working` for so long lets a rebuild start; a Degraded pool refuses to build.
const CONFIG_AHEAD_WORKING: u64 = 30 * MINUTE;
/// `Degraded` for so long lets MCC retarget; in an update it frees the slot.
const CONFIG_AHEAD_DEGRADED: u64 = 5 * MINUTE;
/// Boots of one image after which it is given up.
const MAX_BOOTS: u32 = 2;
/// How soon the kubelet's unit is looked at again while it starts.
const HEALTH_POLL: u64 = 2 * SECOND;
/// How soon daemons without a signal to wait for are asked again while an update is under way.
const SOON: u64 = 10 * SECOND;
/// Head room on `/boot` beyond the kernel itself, in bytes.
const BOOT_MARGIN: u64 = 1 << 20;

const HOLD: &str = "rebase-agent.openshift.io/hold";
const ATTEMPT: &str = "rebase-agent.openshift.io/attempt";

/// The one next action, why, and what to report.
#[must_use]
pub fn decide(observed: &Observed, memory: &Memory, limits: &Limits, now: Now) -> Decision {
    let node = match &observed.cluster {
        Reading::Known(node) => node,
        Reading::Unknown(fault) => {
            let shutting_down = observed.machine.known().is_some_and(|machine| machine.shutting_down);
            return if shutting_down || going_down(memory, now) { shutting() } else { unreadable("2", fault) };
        }
    };
    if observed.machine.known().is_some_and(|machine| machine.shutting_down) || going_down(memory, now) {
        return shutting();
    }
    let (host, machine) = match (&observed.host, &observed.machine) {
        (Reading::Known(host), Reading::Known(machine)) => (host, machine),
        (Reading::Unknown(fault), _) | (_, Reading::Unknown(fault)) => return host_unreadable(fault, memory, now),
    };
    Rules { observed, node, host, machine, memory, limits, now }.decide()
}

fn rule(rule: &str, reason: Reason, message: impl Into<String>) -> Decision {
    Decision {
        rule: rule.to_owned(),
        action: Action::Nothing,
        reason,
        message: message.into(),
        state: None,
        unsticks: false,
        wake: None,
        clock: None,
    }
}

impl Decision {
    fn doing(self, action: Action) -> Self {
        Self { action, ..self }
    }
    fn state(self, state: NodeState) -> Self {
        Self { state: Some(state), ..self }
    }
    fn wake(self, wake: u64) -> Self {
        Self { wake: Some(wake), ..self }
    }
    fn clock(self, clock: Clock, subject: impl Into<String>) -> Self {
        Self { clock: Some((clock, subject.into())), ..self }
    }
}

/// An accepted reboot keeps everything else still, but not for ever.
fn going_down(memory: &Memory, now: Now) -> bool {
    memory.clocks.get(&Clock::RebootAccepted).is_some_and(|since| now.mono.saturating_sub(since.mono) < REBOOT_PATIENCE)
}

fn shutting() -> Decision {
    rule("1", Reason::ShuttingDown, "the machine is going down; nothing is begun any more").wake(MINUTE)
}

fn unreadable(name: &str, fault: &Fault) -> Decision {
    rule(name, fault.reason, fault.message.clone())
}

fn host_unreadable(fault: &Fault, memory: &Memory, now: Now) -> Decision {
    let decision = unreadable("3", fault).clock(Clock::HostUnreadable, "").wake(SOON);
    let waited = memory.clocks.get(&Clock::HostUnreadable).map_or(0, |since| now.mono.saturating_sub(since.mono));
    if waited >= HOST_PATIENCE { decision.state(NodeState::Degraded) } else { decision }
}

struct Rules<'a> {
    observed: &'a Observed,
    node: &'a NodeFacts,
    host: &'a HostFacts,
    machine: &'a MachineFacts,
    memory: &'a Memory,
    limits: &'a Limits,
    now: Now,
}

/// What is wanted, once rows 5 to 8 are past.
struct Wanted<'a> {
    image: PinnedImage,
    config: &'a str,
    facts: Option<&'a ImageFacts>,
}

impl<'a> Rules<'a> {
    fn decide(&self) -> Decision {
        if let Some(decision) = self.other_daemon() {
            return decision;
        }
        let wanted = match self.wanted() {
            Ok(wanted) => wanted,
            Err(decision) => return *decision,
        };
        self.obsolete(&wanted).or_else(|| self.staged_by_other(&wanted)).unwrap_or_else(|| {
            match self.host.booted().filter(|booted| self.is_wanted(booted, &wanted)) {
                Some(booted) => self.arrived(&wanted, booted),
                None => self.travelling(&wanted),
            }
        })
    }

    // --- helpers --------------------------------------------------------------------------------------------------

    fn is_wanted(&self, deployment: &Deployment, wanted: &Wanted<'_>) -> bool {
        is_image(deployment, &wanted.image, wanted.facts)
    }

    fn waited(&self, clock: Clock, subject: &str) -> u64 {
        let since = self.memory.clocks.get(&clock).filter(|since| since.subject == subject);
        since.map_or(0, |since| self.now.mono.saturating_sub(since.mono))
    }

    fn failure(&self, step: Step, subject: &str) -> Option<&'a Failure> {
        self.memory.failures.get(&step).filter(|failure| failure.subject == subject)
    }

    /// Milliseconds until `failure` may be tried again.
    fn due_in(&self, failure: &Failure, backoff: Backoff) -> u64 {
        failure.last.saturating_add(backoff.delay(failure.count)).saturating_sub(self.now.mono)
    }

    fn running(&self, step: Step, subject: &str) -> bool {
        self.observed.running.as_ref().is_some_and(|running| running.step == step && running.subject == subject)
    }

    /// The state for work that has failed as `failure` says.
    fn failing_state(&self, failure: &Failure, patience: u64) -> NodeState {
        let lasted = self.now.mono.saturating_sub(failure.first) >= patience;
        let transient = failure.fault.retryable && !degrades_at_once(failure.fault.reason);
        if transient && !lasted { NodeState::Working } else { NodeState::Degraded }
    }

    /// A refusal: reported at once, and the node given back if we had drained it.
    fn rest(&self, decision: Decision) -> Decision {
        let config = self.node.desired_config.as_deref().or(self.node.current_config.as_deref()).unwrap_or("unknown");
        match self.node.desired_drain.as_deref() {
            Some(drain) if drain.starts_with("drain-") => {
                decision.doing(Action::RequestUncordon { value: format!("uncordon-{config}") }).wake(SOON)
            }
            // Not acknowledged yet: the decision's own action waits.
            Some(_) if self.node.desired_drain != self.node.last_applied_drain => {
                Decision { action: Action::Nothing, ..decision }
            }
            _ => decision,
        }
    }

    fn refuse(&self, name: &str, reason: Reason, message: impl Into<String>) -> Decision {
        self.rest(rule(name, reason, message).state(NodeState::Degraded))
    }

    // --- rows 4 to 8: is there anything to follow? ------------------------------------------------------------------

    fn other_daemon(&self) -> Option<Decision> {
        let other = self.node.other_writer.as_ref()?;
        let quiet_in = other.unix.saturating_add(OTHER_DAEMON_QUIET).saturating_sub(self.now.unix);
        (quiet_in > 0).then(|| {
            let who = printable(&other.manager, 100);
            let message = format!(
                "`{who}` writes this node's state; standing aside until it has been silent for 15 min. Take the node \
                 out of its DaemonSet, or disable rebase-agent.service"
            );
            self.rest(rule("4", Reason::OtherDaemon, message).wake(quiet_in.min(MINUTE)))
        })
    }

    fn wanted(&self) -> Result<Wanted<'a>, Box<Decision>> {
        let node = self.node;
        if node.current_config.is_none() {
            return Err(Box::new(self.first_boot()));
        }
        let desired = match (&node.desired_image, &node.current_image) {
            (Some(desired), _) => desired,
            (None, None) => {
                let message = "this pool has no layered image; waiting until it gets one";
                return Err(Box::new(rule("6", Reason::NotLayered, message)));
            }
            (None, Some(_)) => {
                let message = "the pool left layering, and going back to a non-layered OS needs files written on the \
                               node: hand it back to the Machine Config Daemon (see README, hand-back), or give the \
                               pool a MachineOSConfig again";
                let decision = rule("7", Reason::LayeringReverted, message).state(NodeState::Unreconcilable);
                return Err(Box::new(self.rest(decision)));
            }
        };
        let image = reference::parse(desired).map_err(|error| {
            let message = format!(
                "desiredImage cannot be followed: {error}. It is copied from the MachineOSConfig's \
                 status.currentImagePullSpec; correct it there"
            );
            Box::new(self.refuse("8", Reason::ImageMalformed, message))
        })?;
        let config = node.desired_config.as_deref().ok_or_else(|| {
            let message = "desiredImage is set and desiredConfig is not; the machine-config-controller writes both";
            Box::new(self.refuse("8", Reason::ConfigMissing, message))
        })?;
        let facts = self.memory.verified.get(&image);
        Ok(Wanted { image, config, facts })
    }

    /// Row 5: nobody has published yet what this node was installed with.
    fn first_boot(&self) -> Decision {
        const KEYS: [&str; 5] = ["currentConfig", "desiredConfig", "currentImage", "desiredImage", "state"];
        let Some(booted) = self.host.booted() else {
            return rule("5", Reason::HostNotImageMode, "no deployment is booted, so there is nothing to publish");
        };
        let publish = |pairs: Vec<(&str, String)>| {
            let annotations = pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
            rule("5", Reason::FirstBoot, "publishing what this node was installed with")
                .doing(Action::Publish { annotations })
        };
        if let Some(file) = &self.machine.first_boot {
            let value = |key: &str| file.get(&format!("machineconfiguration.openshift.io/{key}"));
            let Some(image) = value("currentImage") else {
                return rule(
                    "6",
                    Reason::NotLayered,
                    "this node was installed without a layered image; waiting for one",
                );
            };
            if reference::parse(image).is_ok_and(|image| is_image(booted, &image, None))
                && value("currentConfig").is_some()
            {
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
        let name = booted.reference.as_deref().map(reference::name_of);
        match (name, &booted.digest, &booted.rendered_config) {
            (Some(name), Some(digest), Some(config)) => {
                let image = format!("{name}@{digest}");
                publish(vec![
                    ("currentConfig", config.clone()),
                    ("desiredConfig", self.node.desired_config.clone().unwrap_or_else(|| config.clone())),
                    ("currentImage", image.clone()),
                    ("desiredImage", self.node.desired_image.clone().unwrap_or(image)),
                    ("state", NodeState::Done.as_str().to_owned()),
                ])
            }
            _ => {
                let message = "the booted image carries no `machineconfig` label, so it cannot be told which rendered \
                               config it stands for; build it with on-cluster layering, or annotate the Node with \
                               currentConfig and currentImage";
                rule("5", Reason::BootedConfigUnknown, message).state(NodeState::Degraded)
            }
        }
    }

    // --- what must go before anything else ---------------------------------------------------------------------------

    /// Row 19, the part that cannot wait for row 17: what we do for an image that is no longer desired.
    fn obsolete(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let subject = wanted.image.to_string();
        if let Some(running) = &self.observed.running {
            let for_an_image = matches!(running.step, Step::Verify | Step::Stage | Step::KernelArguments);
            if for_an_image && running.subject != subject {
                let message = format!("{} is no longer desired; stopping the work on it", running.subject);
                return Some(rule("19", Reason::Cancelled, message).doing(Action::AbortTask));
            }
            return None;
        }
        let ours = self.host.transaction.as_ref()?.ours.as_ref()?;
        if ours == wanted.image.digest() {
            return None;
        }
        let subject = ours.as_str();
        let message = format!("the transaction for {} is obsolete; cancelling it", ours.short());
        let decision = rule("19", Reason::Cancelled, message).wake(SOON);
        if self.running(Step::CancelTransaction, subject) {
            return Some(decision);
        }
        match self.failure(Step::CancelTransaction, subject).map(|failure| self.due_in(failure, Backoff::TRANSIENT)) {
            Some(due) if due > 0 => Some(decision.wake(due)),
            _ => Some(decision.doing(Action::CancelTransaction)),
        }
    }

    /// Row 9.
    fn staged_by_other(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let staged = self.host.staged().filter(|staged| !self.is_wanted(staged, wanted))?;
        if self.host.transaction.is_some() || self.observed.running.as_ref().is_some_and(|r| r.step == Step::Stage) {
            return None;
        }
        let checksum = staged.checksum.clone();
        let what = staged.reference.as_deref().map_or_else(|| checksum.clone(), |text| printable(text, 200));
        if self.running(Step::DropStaged, &checksum) {
            return Some(rule("9", Reason::StagedByOther, format!("dropping {what}, which is staged and not desired")));
        }
        if let Some(failure) = self.failure(Step::DropStaged, &checksum) {
            let due = self.due_in(failure, Backoff::TRANSIENT);
            let message = format!("{what} is staged and not desired, and cannot be dropped: {}", failure.fault.message);
            let decision = rule("9", Reason::StagedByOther, message).wake(due.max(1));
            return Some(if due > 0 { decision } else { decision.doing(Action::DropStaged { checksum }) });
        }
        if self.memory.dropped.contains(&checksum) {
            let message = format!(
                "{what} was staged again by hand after it had been dropped; waiting. `rpm-ostree cleanup -p` drops it; \
                 a pool's own image is set in its MachineOSConfig"
            );
            return Some(rule("9", Reason::StagedByOther, message));
        }
        let message = format!("dropping {what}, which is staged and not desired");
        Some(rule("9", Reason::StagedByOther, message).doing(Action::DropStaged { checksum }))
    }

    // --- rows 10 to 15: the desired image runs -----------------------------------------------------------------------

    fn arrived(&self, wanted: &Wanted<'_>, booted: &Deployment) -> Decision {
        let node = self.node;
        if node.state.as_deref() == Some(NodeState::Done.as_str())
            && node.current_config == node.desired_config
            && node.current_image == node.desired_image
        {
            return self.done(wanted);
        }
        if let Some(decision) = self.config_ahead("11", wanted, booted.rendered_config.as_deref()) {
            return decision;
        }
        if let Some(missing) =
            booted.wanted_arguments.iter().flatten().find(|argument| !self.machine.command_line.contains(argument))
        {
            let message = format!(
                "the kernel runs without `{}`, which {} demands; set it with `rpm-ostree kargs --append-if-missing` \
                 and reboot, or take it out of the config",
                printable(missing, 200),
                printable(wanted.config, 253)
            );
            return self.refuse("12", Reason::KernelArgumentMissing, message);
        }
        if self.machine.kubelet != UnitState::Active {
            return self.unhealthy(wanted);
        }
        self.uncordon_and_settle(wanted)
    }

    /// Row 10. The booted image's trust is looked at in the background; whatever it is, it cannot be undone.
    fn done(&self, wanted: &Wanted<'_>) -> Decision {
        let subject = wanted.image.to_string();
        let asleep = |trust: &str| {
            rule("10", Reason::Done, format!("runs {} for {}; {trust}", wanted.image.digest().short(), wanted.config))
        };
        if wanted.facts.is_some() {
            return asleep("its signature was verified");
        }
        if self.observed.running.is_some() {
            return asleep("its signature is being verified");
        }
        match self.failure(Step::Verify, &subject) {
            None => asleep("its signature is being verified").doing(Action::Verify { image: wanted.image.clone() }),
            Some(failure) => {
                let decision = asleep(&format!("its signature is not verified: {}", failure.fault.reason));
                match self.due_in(failure, Backoff::REFUSAL) {
                    0 => decision.doing(Action::Verify { image: wanted.image.clone() }),
                    due => decision.wake(due),
                }
            }
        }
    }

    /// Rows 11 and 18: MCC reuses an image for a change of files only, which an agent that writes none cannot apply.
    fn config_ahead(&self, name: &str, wanted: &Wanted<'_>, label: Option<&str>) -> Option<Decision> {
        let built_from = label.filter(|label| *label != wanted.config)?;
        if self.limits.accept_config_ahead {
            return None;
        }
        let subject = format!("{} {}", wanted.image, wanted.config);
        let waited = self.waited(Clock::ConfigAhead, &subject);
        let phase = waited.checked_rem(CONFIG_AHEAD_WORKING + CONFIG_AHEAD_DEGRADED).unwrap_or(0);
        let (state, left) = match CONFIG_AHEAD_WORKING.checked_sub(phase) {
            Some(left) if left > 0 => (NodeState::Working, left),
            _ => (NodeState::Degraded, (CONFIG_AHEAD_WORKING + CONFIG_AHEAD_DEGRADED).saturating_sub(phase)),
        };
        let message = format!(
            "the image was built from {} and the pool wants {}: it changes files only and nobody rebuilt. Annotate the \
             pool's MachineOSConfig with machineconfiguration.openshift.io/rebuild",
            printable(built_from, 253),
            printable(wanted.config, 253)
        );
        let decision = rule(name, Reason::ConfigAheadOfImage, message).state(state).wake(left);
        Some(Decision { unsticks: true, ..self.rest(decision) }.clock(Clock::ConfigAhead, subject))
    }

    /// Row 13: the one refusal that keeps the node cordoned.
    fn unhealthy(&self, wanted: &Wanted<'_>) -> Decision {
        let subject = wanted.image.to_string();
        let waited = self.waited(Clock::Health, &subject);
        if waited < HEALTH_PATIENCE {
            return rule("13", Reason::HealthPending, "waiting for kubelet.service to become active")
                .state(NodeState::Working)
                .clock(Clock::Health, subject)
                .wake(HEALTH_POLL);
        }
        let message = "kubelet.service did not become active in this image, so the node stays cordoned; see \
                       `journalctl -u kubelet`. `rpm-ostree rollback` and a reboot go back, and set the pool back first";
        rule("13", Reason::HealthFailed, message).state(NodeState::Degraded).clock(Clock::Health, subject).wake(SOON)
    }

    /// Rows 14 and 15. MCD asks for the uncordon on every update, on single-replica clusters too.
    fn uncordon_and_settle(&self, wanted: &Wanted<'_>) -> Decision {
        let value = format!("uncordon-{}", wanted.config);
        if self.node.desired_drain.as_deref() != Some(value.as_str()) {
            return rule("14", Reason::UncordonPending, "waiting for the drain controller to uncordon the node")
                .state(NodeState::Working)
                .clock(Clock::Uncordon, value.clone())
                .doing(Action::RequestUncordon { value });
        }
        if self.node.last_applied_drain.as_deref() != Some(value.as_str()) {
            return self.uncordon_pending("14", value);
        }
        rule("15", Reason::Settling, "runs the desired image; reporting it")
            .state(NodeState::Done)
            .doing(Action::Settle)
    }

    fn uncordon_pending(&self, name: &str, value: String) -> Decision {
        let waited = self.waited(Clock::Uncordon, &value);
        let decision = if waited < UNCORDON_PATIENCE {
            rule(name, Reason::UncordonPending, "waiting for the drain controller to uncordon the node")
                .state(NodeState::Working)
                .wake(UNCORDON_PATIENCE.saturating_sub(waited))
        } else {
            let message = "the drain controller has not uncordoned the node; see the machine-config-controller's log. \
                           The request stands";
            rule(name, Reason::UncordonLate, message).state(NodeState::Degraded)
        };
        decision.clock(Clock::Uncordon, value)
    }

    // --- rows 16 to 25: on the way to the desired image -----------------------------------------------------------

    fn travelling(&self, wanted: &Wanted<'_>) -> Decision {
        if let Some(decision) = self.given_up(wanted) {
            return decision;
        }
        let facts = match self.verified(wanted) {
            Ok(facts) => facts,
            Err(decision) => return *decision,
        };
        self.unfit(wanted, facts).or_else(|| self.transaction(wanted)).unwrap_or_else(|| {
            match self.host.staged().filter(|staged| self.is_wanted(staged, wanted)) {
                None => self.stage(wanted),
                Some(staged) => self
                    .kernel_arguments(wanted, staged)
                    .or_else(|| self.hindrance(wanted))
                    .or_else(|| self.drain(wanted))
                    .unwrap_or_else(|| self.reboot(wanted)),
            }
        })
    }

    /// Row 16.
    fn given_up(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let attempt = self.node.attempt.as_ref()?;
        if attempt.image != wanted.image || attempt.boot_id == self.machine.boot_id {
            return None;
        }
        let finalized = self.host.deployments.iter().any(|d| !d.booted && !d.staged && self.is_wanted(d, wanted));
        let cause = if self.machine.finalize_failed {
            ". The previous boot could not finalize it: see `journalctl -b -1 -u ostree-finalize-staged`"
        } else {
            ""
        };
        let out = format!("set another image, or delete the annotation {ATTEMPT} to try again");
        let image = wanted.image.digest().short();
        if finalized {
            let message = format!("{image} was booted and the host went back to the image before it{cause}; {out}");
            return Some(self.refuse("16", Reason::RolledBack, message));
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
                let decision = self.unverified(failure);
                let backoff = if failure.fault.retryable { Backoff::TRANSIENT } else { Backoff::REFUSAL };
                match self.due_in(failure, backoff) {
                    // A drained node is given back first; looking again can wait for that.
                    0 if decision.action == Action::Nothing => {
                        decision.doing(Action::Verify { image: wanted.image.clone() })
                    }
                    due => Decision { wake: Some(due.max(1)), ..decision },
                }
            }
        }))
    }

    fn unverified(&self, failure: &Failure) -> Decision {
        let awaited = matches!(failure.fault.reason, Reason::SignatureMissing | Reason::ManifestMissing);
        let patience = if awaited { self.limits.signature_grace } else { TRANSIENT_PATIENCE };
        let decision = rule("17", failure.fault.reason, failure.fault.message.clone());
        match self.failing_state(failure, patience) {
            NodeState::Degraded => self.rest(decision.state(NodeState::Degraded)),
            state => decision.state(state),
        }
    }

    /// Row 18.
    fn unfit(&self, wanted: &Wanted<'_>, facts: &ImageFacts) -> Option<Decision> {
        let image = wanted.image.digest().short();
        if facts.architecture != self.machine.architecture {
            let message = format!(
                "{image} is built for {} and this machine is {}; build the pool's image for it",
                printable(&facts.architecture, 50),
                self.machine.architecture
            );
            return Some(self.refuse("18", Reason::WrongArchitecture, message));
        }
        if !facts.bootable {
            let message = format!(
                "{image} is not a bootable image: it carries neither the label ostree.bootable nor containers.bootc"
            );
            return Some(self.refuse("18", Reason::NotBootable, message));
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
            return Some(
                rule("19", Reason::Staging, self.staging(wanted))
                    .state(NodeState::Working)
                    .doing(Action::Stage { image: wanted.image.clone() }),
            );
        }
        let waited = self.waited(Clock::ForeignTransaction, &subject);
        let message = if waited < TRANSACTION_PATIENCE {
            format!("waiting for the transaction `{}` to end", active.title)
        } else {
            format!(
                "the transaction `{}` of {} has blocked the update for over 30 min; see `rpm-ostree status`, end it \
                 with `rpm-ostree cancel`",
                active.title, active.client
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
            let message = "packages are layered on this host by hand, and a rebase would drag them along; remove them \
                           with `rpm-ostree reset`, or put them into the image";
            return self.refuse("20", Reason::LayeredPackages, message);
        }
        if let (Some(free), Some(needed)) = (self.machine.boot_free, self.machine.boot_needed) {
            // The rollback's kernel makes room at finalization (libostree 2023.7 and later).
            let reclaimable = self.host.rollback().filter(|rollback| !rollback.pinned).map_or(0, |_| needed);
            if free.saturating_add(reclaimable) < needed.saturating_add(BOOT_MARGIN) {
                let message = format!(
                    "/boot has {} MiB free and another kernel needs {}; remove deployments with `rpm-ostree cleanup -r`",
                    free >> 20,
                    needed >> 20
                );
                return self.refuse("20", Reason::BootFull, message);
            }
        }
        let stage = Action::Stage { image: wanted.image.clone() };
        match self.failure(Step::Stage, &wanted.image.to_string()) {
            None => rule("21", Reason::Staging, self.staging(wanted)).state(NodeState::Working).doing(stage),
            Some(failure) => {
                let backoff = if failure.fault.retryable { Backoff::TRANSIENT } else { Backoff::REFUSAL };
                let decision = rule("21", failure.fault.reason, failure.fault.message.clone());
                let decision = match self.failing_state(failure, TRANSIENT_PATIENCE) {
                    NodeState::Degraded => self.rest(decision.state(NodeState::Degraded)),
                    state => decision.state(state),
                };
                match self.due_in(failure, backoff) {
                    0 if decision.action == Action::Nothing => decision.doing(stage),
                    due => Decision { wake: Some(due.max(1)), ..decision },
                }
            }
        }
    }

    /// Row 22.
    fn kernel_arguments(&self, wanted: &Wanted<'_>, staged: &Deployment) -> Option<Decision> {
        let (demanded, actual) = (staged.wanted_arguments.as_ref()?, staged.arguments.as_ref()?);
        let append: Vec<String> = demanded.iter().filter(|argument| !actual.contains(argument)).cloned().collect();
        // What the running image's config demanded and the new one does not.
        let before = self.host.booted().and_then(|booted| booted.wanted_arguments.as_deref()).unwrap_or_default();
        let delete: Vec<String> = before
            .iter()
            .filter(|argument| !demanded.contains(argument) && actual.contains(argument))
            .cloned()
            .collect();
        if append.is_empty() && delete.is_empty() {
            return None;
        }
        let subject = wanted.image.to_string();
        let action = Action::SetKernelArguments { append, delete };
        match self.failure(Step::KernelArguments, &subject) {
            None => {
                let message = format!("giving the staged image the kernel arguments of {}", wanted.config);
                Some(rule("22", Reason::KernelArguments, message).state(NodeState::Working).doing(action))
            }
            Some(failure) => {
                let decision = rule("22", failure.fault.reason, failure.fault.message.clone());
                let decision = match self.failing_state(failure, TRANSIENT_PATIENCE) {
                    NodeState::Degraded => self.rest(decision.state(NodeState::Degraded)),
                    state => decision.state(state),
                };
                Some(match self.due_in(failure, Backoff::TRANSIENT) {
                    0 if decision.action == Action::Nothing => decision.doing(action),
                    due => Decision { wake: Some(due.max(1)), ..decision },
                })
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
                        let decision = Decision { message: failure.fault.message.clone(), ..decision }
                            .state(self.failing_state(failure, TRANSIENT_PATIENCE));
                        match self.due_in(failure, Backoff::TRANSIENT) {
                            0 => decision.doing(Action::StartFinalizer),
                            due => decision.wake(due),
                        }
                    }
                })
            }
        }
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
        match self.node.schedulable {
            Some(false) => None,
            // Part of the reboot already; the cluster is told when it is certain.
            None => Some(rebooting(wanted).doing(Action::ConfirmDrain)),
            Some(true) => {
                let message = "somebody uncordoned the node after it was drained; it is uncordoned for good, then \
                               drained again";
                Some(
                    pending(Reason::UncordonedByOther, message.to_owned())
                        .doing(Action::RequestUncordon { value: format!("uncordon-{}", wanted.config) }),
                )
            }
        }
    }

    /// Row 25.
    fn reboot(&self, wanted: &Wanted<'_>) -> Decision {
        let image = wanted.image.clone();
        let decision = rule("25", Reason::Rebooting, format!("rebooting into {}", image.digest().short()))
            .state(NodeState::Working);
        let updates_bootloader = self.machine.bootloader_update != UnitState::Absent;
        if updates_bootloader && self.memory.bootloader_updated_for.as_ref() != Some(&image) {
            return decision.doing(Action::UpdateBootloader);
        }
        let boot_id = self.machine.boot_id.clone();
        let earlier = self.node.attempt.as_ref().filter(|attempt| attempt.image == image);
        if earlier.is_none_or(|attempt| attempt.boot_id != boot_id) {
            let count = earlier.map_or(0, |attempt| attempt.count).saturating_add(1);
            let unknown = self.node.attempt.as_ref().map(|attempt| attempt.unknown.clone()).unwrap_or_default();
            return decision.doing(Action::RecordAttempt { attempt: Attempt { image, boot_id, count, unknown } });
        }
        match self.failure(Step::Reboot, &image.to_string()) {
            None => decision.doing(Action::Reboot { image }),
            Some(failure) => {
                let decision = rule("25", failure.fault.reason, failure.fault.message.clone())
                    .state(self.failing_state(failure, TRANSIENT_PATIENCE));
                match self.due_in(failure, Backoff::TRANSIENT) {
                    0 => decision.doing(Action::Reboot { image }),
                    due => decision.wake(due),
                }
            }
        }
    }
}

fn rebooting(wanted: &Wanted<'_>) -> Decision {
    rule("25", Reason::Rebooting, format!("rebooting into {}", wanted.image.digest().short()))
}

/// Failures that waiting does not mend.
fn degrades_at_once(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::SignatureRejected
            | Reason::PolicyRejects
            | Reason::PolicyAcceptsAnything
            | Reason::PolicyInvalid
            | Reason::EngineUnfit
            | Reason::GpgNeedsScratch
            | Reason::ImageInvalid
            | Reason::NotBootable
            | Reason::DiskFull
            | Reason::HostNotImageMode
    )
}
