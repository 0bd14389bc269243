//! The rules, in order; the first that matches wins. Pure: no clock, no randomness, no I/O, no panic.
//!
//! Rule names are the rows of the design's table. A *resting* rule gives the node back to its workloads first: MCC
//! never retargets a cordoned node, so a refusal on a node that we drained would hold it for ever.

mod arrived;
mod travelling;

pub use travelling::RESTORE_SPREAD;

use crate::host::{is_image, is_named, is_staged};
use crate::model::{
    Action, Clock, Decision, Deployment, Failure, Fault, HostFacts, ImageFacts, Limits, MachineFacts, Memory,
    NodeFacts, NodeState, Now, Observed, PinnedImage, Reading, Reason, Step, printable,
};
use crate::registry::reference;
use crate::report::MCO;
use crate::schedule::Backoff;

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;

/// How long the host may be unreadable before that is reported: rpm-ostreed may take five minutes to start.
const HOST_PATIENCE: u64 = 10 * MINUTE;
/// How long another daemon must not have written before we go on.
const OTHER_DAEMON_QUIET: u64 = 15 * MINUTE;
/// An accepted reboot that has not begun by then is asked for again; the kubelet may delay a shutdown for long.
const REBOOT_PATIENCE: u64 = 30 * MINUTE;
/// MCD's own limit for the uncordon.
const UNCORDON_PATIENCE: u64 = 10 * MINUTE;
/// How long transient failures are merely retried before they are reported as Degraded.
const TRANSIENT_PATIENCE: u64 = 15 * MINUTE;
/// Longest refusal, in characters, that still leaves room for how to drop the image by hand.
const MAX_REFUSAL: usize = 800;
/// Longest sentence about a wait, in characters, that still leaves room for what follows from it.
const MAX_WAIT: usize = 700;
/// Makes an uncordon differ from one that was acknowledged before; to the controller the rest is opaque.
const AGAIN: &str = "-again";
/// How long a node that is drained, or asked to be, merely waits: its workloads need it back.
const OUT_OF_SERVICE_PATIENCE: u64 = 30 * MINUTE;
/// How another image reaches a node that is stuck: MCC counts it as unavailable and never as failing.
const RETARGET: &str = "set another image in the pool, and raise the pool's maxUnavailable until this node has it, \
                        because MCC gives a stuck node another image only where a slot is free";
/// How soon daemons without a signal to wait for are asked again while an update is under way.
const SOON: u64 = 10 * SECOND;

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
        (Reading::Unknown(fault), _) | (_, Reading::Unknown(fault)) => {
            return host_unreadable(node, fault, memory, now);
        }
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

fn host_unreadable(node: &NodeFacts, fault: &Fault, memory: &Memory, now: Now) -> Decision {
    let decision = unreadable("3", fault).clock(Clock::HostUnreadable, "").wake(SOON);
    let waited = memory.clocks.get(&Clock::HostUnreadable).map_or(0, |since| now.mono.saturating_sub(since.mono));
    // A node that follows no image, or another daemon, is not ours to degrade.
    let ours = node.desired_image.is_some() && node.other_writer.is_none();
    if ours && waited >= HOST_PATIENCE { decision.state(NodeState::Degraded) } else { decision }
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
            Err(decision) => return self.without_work(*decision),
        };
        if let Some(decision) = self.obsolete(&wanted).or_else(|| self.staged_by_other(&wanted)) {
            return self.not_for_ever(decision);
        }
        match self.host.booted().filter(|booted| self.runs(booted, &wanted)) {
            Some(booted) => self.arrived(&wanted, booted),
            None => self.not_for_ever(self.refused_on_disk(self.travelling(&wanted), &wanted)),
        }
    }

    // --- helpers --------------------------------------------------------------------------------------------------

    fn is_wanted(&self, deployment: &Deployment, wanted: &Wanted<'_>) -> bool {
        is_image(deployment, &wanted.image, wanted.facts)
    }

    /// Whether the booted deployment is the desired image. Of an index that this process has not verified yet, the
    /// reference is believed where this agent booted it or has reported Done for it before.
    fn runs(&self, booted: &Deployment, wanted: &Wanted<'_>) -> bool {
        let tried =
            self.node.attempt.as_ref().is_some_and(|attempt| {
                attempt.image == wanted.image && attempt.deployment.as_ref() == Some(&booted.id)
            });
        let believed = wanted.facts.is_none() && (tried || self.is_coherently_done());
        self.is_wanted(booted, wanted) || believed && is_named(booted, &wanted.image)
    }

    /// Whether the Node says Done for exactly what is desired.
    fn is_coherently_done(&self) -> bool {
        self.node.state.as_deref() == Some(NodeState::Done.as_str())
            && self.node.current_config == self.node.desired_config
            && self.node.current_image == self.node.desired_image
    }

    /// The staged deployment, if it is the desired image as it was verified and boots next.
    fn staged(&self, wanted: &Wanted<'_>) -> Option<&'a Deployment> {
        self.host.staged().filter(|staged| is_staged(staged, &wanted.image, wanted.facts))
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

    /// Work that has failed, in the failure's own words.
    fn failed(&self, name: &str, failure: &Failure, patience: u64) -> Decision {
        let decision = rule(name, failure.fault.reason, failure.fault.message.clone());
        match self.failing_state(failure, patience) {
            NodeState::Working => {
                let left = failure.first.saturating_add(patience).saturating_sub(self.now.mono);
                decision.state(NodeState::Working).wake(left)
            }
            state => decision.state(state),
        }
    }

    /// `decision` until `failure` may be tried again, then `action`; what the decision itself has to do comes first.
    fn when_due(&self, decision: Decision, failure: &Failure, action: Action) -> Decision {
        let backoff = if failure.fault.retryable { Backoff::TRANSIENT } else { Backoff::REFUSAL };
        match self.due_in(failure, backoff) {
            0 if decision.action == Action::Nothing => Decision { wake: None, ..decision.doing(action) },
            due => {
                let wake = decision.wake.unwrap_or(u64::MAX).min(due).max(1);
                decision.wake(wake)
            }
        }
    }

    /// Gives the node back if the decision is a refusal.
    fn rest_if_refused(&self, decision: Decision) -> Decision {
        if decision.state == Some(NodeState::Degraded) { self.rest(decision) } else { decision }
    }

    /// A refusal: reported at once, and the node given back if we had drained it.
    fn rest(&self, decision: Decision) -> Decision {
        let config = self.node.desired_config.as_deref().or(self.node.current_config.as_deref()).unwrap_or("unknown");
        match self.node.desired_drain.as_deref() {
            Some(drain) if drain.starts_with("drain-") => {
                decision.doing(Action::RequestUncordon { value: self.uncordon(config) }).wake(SOON)
            }
            // Not acknowledged yet: the decision's own action waits.
            Some(_) if self.node.desired_drain != self.node.last_applied_drain => {
                Decision { action: Action::Nothing, ..decision }
            }
            _ => decision,
        }
    }

    /// No wait keeps a drained node out of service for ever: in the end it is Degraded and given back, and drained again
    /// once the wait is over. Rows 24 and 25 have limits of their own, the uptime floor ends by itself, and a hold is an
    /// operator's wish.
    fn not_for_ever(&self, decision: Decision) -> Decision {
        let drain = self.node.desired_drain.as_ref().filter(|drain| drain.starts_with("drain-"));
        let limited = matches!(decision.rule.as_str(), "24" | "25") || decision.state == Some(NodeState::Degraded);
        let wished = matches!(decision.reason, Reason::Held | Reason::UptimeFloor);
        let Some(drain) = drain.filter(|_| !limited && !wished) else { return decision };
        let (clock, subject) = decision.clock.clone().unwrap_or_else(|| (Clock::OutOfService, drain.clone()));
        let waited = self.waited(clock, &subject);
        if waited < OUT_OF_SERVICE_PATIENCE {
            let wake = decision.wake.unwrap_or(u64::MAX).min(OUT_OF_SERVICE_PATIENCE.saturating_sub(waited));
            return decision.clock(clock, subject).wake(wake);
        }
        let message = format!(
            "{}. The node has waited drained for over 30 min, so it is uncordoned, and drained again when it need not \
             wait; see `journalctl -u rebase-agent`",
            printable(decision.message.trim_end_matches('.'), MAX_WAIT)
        );
        self.rest(Decision { message, ..decision }.state(NodeState::Degraded).clock(clock, subject))
    }

    /// The uncordon to ask for. The drain controller compares strings: one that it acknowledged before a drain that it
    /// may have begun would count as done already, and the node would stay cordoned.
    fn uncordon(&self, config: &str) -> String {
        let value = format!("uncordon-{config}");
        let stale = self.node.last_applied_drain.as_ref() == Some(&value);
        if stale && self.node.desired_drain.as_ref() != Some(&value) { value + AGAIN } else { value }
    }

    fn refuse(&self, name: &str, reason: Reason, message: impl Into<String>) -> Decision {
        self.rest(rule(name, reason, message).state(NodeState::Degraded))
    }

    /// A refusal reaches the disk: what is refused must not boot at the next orderly reboot either. Dropping it goes
    /// before the decision's own action. `rejected` is what would boot next.
    fn keep_from_booting(&self, decision: Decision, rejected: &Deployment) -> Decision {
        let checksum = &rejected.checksum;
        if !self.host.backend.drops_staged() || self.memory.dropped.contains(checksum) {
            let how = if rejected.staged { "is staged" } else { "is first in boot order" };
            let message = format!(
                "{}. It {how} and boots next all the same; drop it with {}",
                printable(decision.message.trim_end_matches('.'), MAX_REFUSAL),
                self.host.backend.drop_by_hand()
            );
            return Decision { message, ..decision };
        }
        if self.observed.running.is_some() || self.host.transaction.is_some() {
            let wake = decision.wake.unwrap_or(SOON).min(SOON);
            return decision.wake(wake);
        }
        let drop = Action::DropStaged { checksum: checksum.clone() };
        match self.failure(Step::DropStaged, checksum) {
            None => Decision { wake: None, ..decision.doing(drop) },
            Some(failure) => match self.due_in(failure, Backoff::TRANSIENT) {
                0 => Decision { wake: None, ..decision.doing(drop) },
                due => {
                    let wake = decision.wake.unwrap_or(due).min(due);
                    decision.wake(wake)
                }
            },
        }
    }

    /// [`Rules::keep_from_booting`] for a refusal of the desired image, if that boots next.
    fn refused_on_disk(&self, decision: Decision, wanted: &Wanted<'_>) -> Decision {
        let is_it = |next: &&Deployment| self.is_wanted(next, wanted) || is_named(next, &wanted.image);
        match self.host.next_boot().filter(|next| !next.booted).filter(is_it) {
            Some(next) if decision.reason.refuses_image() => self.keep_from_booting(decision, next),
            _ => decision,
        }
    }

    /// Rows 12 and 22 for an image whose rendered config cannot be used: its demands are not known, which is not none.
    fn config_fault(&self, name: &str, deployment: &Deployment) -> Option<Decision> {
        let why = printable(deployment.config_fault.as_deref()?, 400);
        let message =
            format!("the image carries a rendered config that cannot be used, {why}; build it again and {RETARGET}");
        Some(self.refuse(name, Reason::ImageInvalid, message))
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
                               pool a MachineOSConfig again, and raise the pool's maxUnavailable until this node has its \
                               image, because MCC gives a stuck node an image only where a slot is free";
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
            let message =
                "desiredImage is set and desiredConfig is not; the machine-config-controller writes both, see its log";
            Box::new(self.refuse("8", Reason::ConfigMissing, message))
        })?;
        let facts = self.memory.verified.get(&image);
        Ok(Wanted { image, config, facts })
    }

    /// Row 5: nobody has published yet what this node was installed with.
    fn first_boot(&self) -> Decision {
        const KEYS: [&str; 5] = ["currentConfig", "desiredConfig", "currentImage", "desiredImage", "state"];
        // Of an image booted into a custom pool, MCC labels the Node for that pool by it.
        const FIRST_PIVOT: &str = "firstPivotConfig";
        let Some(booted) = self.host.booted() else {
            return rule("5", Reason::HostNotImageMode, "no deployment is booted, so there is nothing to publish");
        };
        let value = |key: &str| self.machine.first_boot.as_ref()?.get(&format!("{MCO}{key}"));
        let publish = |mut pairs: Vec<(&str, String)>| {
            pairs.extend(value(FIRST_PIVOT).map(|config| (FIRST_PIVOT, config.clone())));
            let annotations = pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
            rule("5", Reason::FirstBoot, "publishing what this node was installed with")
                .doing(Action::Publish { annotations })
        };
        if self.machine.first_boot.is_some() {
            let Some(image) = value("currentImage") else {
                return rule(
                    "6",
                    Reason::NotLayered,
                    "this node was installed without a layered image; waiting for one",
                );
            };
            let is_booted = |image| is_image(booted, &image, None) || is_named(booted, &image);
            if reference::parse(image).is_ok_and(is_booted) && value("currentConfig").is_some() {
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

    /// While nothing valid is desired, what was begun for an image is stopped; a node that was drained is given back
    /// first.
    fn without_work(&self, decision: Decision) -> Decision {
        match &self.observed.running {
            Some(running) if is_for_an_image(running.step) && decision.action == Action::Nothing => {
                decision.doing(Action::AbortTask)
            }
            _ => decision,
        }
    }

    // --- what must go before anything else ---------------------------------------------------------------------------

    /// Row 19, the part that cannot wait for row 17: what we do for an image that is no longer desired.
    fn obsolete(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let subject = wanted.image.to_string();
        if let Some(running) = &self.observed.running {
            if is_for_an_image(running.step) && running.subject != subject {
                let message = format!("{} is no longer desired; stopping the work on it", running.subject);
                return Some(rule("19", Reason::Cancelled, message).doing(Action::AbortTask));
            }
            if running.step != Step::CancelTransaction {
                return None;
            }
        }
        let ours = self.host.transaction.as_ref()?.ours.as_ref()?;
        if ours == wanted.image.digest() {
            return None;
        }
        let message = format!("the transaction for {} is obsolete; cancelling it", ours.short());
        let decision = rule("19", Reason::Cancelled, message).wake(SOON);
        if self.observed.running.is_some() {
            return Some(decision);
        }
        match self.failure(Step::CancelTransaction, &subject).map(|failure| self.due_in(failure, Backoff::TRANSIENT)) {
            Some(due) if due > 0 => Some(decision.wake(due)),
            _ => Some(decision.doing(Action::CancelTransaction)),
        }
    }

    /// Row 9. Packages that a person layered onto the desired image make it another one, and a rebase would carry them
    /// along. What is locked does not boot, and staging replaces it.
    fn staged_by_other(&self, wanted: &Wanted<'_>) -> Option<Decision> {
        let Some(staged) = self.host.staged() else { return self.left_first(wanted) };
        let unverified = wanted.facts.is_none() && is_named(staged, &wanted.image);
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
        let stages = self.observed.running.as_ref().is_some_and(|running| running.step == Step::Stage);
        if stages || self.host.transaction.is_some() {
            // On the way row 19 waits for it; what has arrived must not settle meanwhile.
            let arrived = self.host.booted().is_some_and(|booted| self.is_wanted(booted, wanted));
            let message =
                format!("{what} boots next and is not desired; dropping it when the host's transaction has ended");
            return arrived.then(|| rule("9", Reason::StagedByOther, message).wake(SOON));
        }
        if self.running(Step::DropStaged, &checksum) {
            return Some(rule(
                "9",
                Reason::StagedByOther,
                format!("dropping {what}, which boots next and is not desired"),
            ));
        }
        if let Some(failure) = self.failure(Step::DropStaged, &checksum) {
            let due = self.due_in(failure, Backoff::TRANSIENT);
            let message =
                format!("{what} boots next and is not desired, and cannot be dropped: {}", failure.fault.message);
            let decision = rule("9", Reason::StagedByOther, message).wake(due.max(1));
            return Some(if due > 0 { decision } else { decision.doing(Action::DropStaged { checksum }) });
        }
        if self.memory.dropped.contains(&checksum) {
            return Some(self.staged_again(what));
        }
        let message = format!("dropping {what}, which boots next and is not desired");
        Some(rule("9", Reason::StagedByOther, message).doing(Action::DropStaged { checksum }))
    }

    fn staged_again(&self, what: &str) -> Decision {
        let message = format!(
            "{what} was staged again by hand after it had been dropped; waiting. {} drops it; a pool's own image is set \
             in its MachineOSConfig",
            self.host.backend.drop_by_hand()
        );
        rule("9", Reason::StagedByOther, message)
    }

    /// Row 9 where nothing can be dropped: the desired image is staged over what is not desired. On the way, rows 17 to
    /// 21 do that anyway. Where it runs already it is staged once more: that changes the host, so it is verified first.
    fn stage_over(&self, wanted: &Wanted<'_>, checksum: &str, what: &str) -> Option<Decision> {
        let arrived = self.host.booted().is_some_and(|booted| self.is_wanted(booted, wanted));
        let subject = wanted.image.to_string();
        let message = format!("staging the running image over {what}, which is staged and not desired");
        let decision = rule("9", Reason::StagedByOther, message);
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
            rule("9", Reason::StagedByOther, message)
        };
        let (step, action) = match wanted.facts {
            None => (Step::Verify, Action::Verify { image: wanted.image.clone() }),
            Some(facts) if facts.bootable && facts.architecture == self.machine.architecture => {
                (Step::Stage, Action::Stage { image: wanted.image.clone() })
            }
            Some(_) => return Some(by_hand("it says of itself that this machine cannot boot it")),
        };
        Some(match self.failure(step, &subject) {
            None => decision.doing(action),
            Some(failure) => {
                let mut decision = by_hand(&printable(&failure.fault.message, 600));
                // A node that is Done stays Done when a person stages something on it.
                if self.is_coherently_done() {
                    decision = self.report_trust(decision, failure);
                } else {
                    decision = self.rest_if_refused(decision.state(self.failing_state(failure, TRANSIENT_PATIENCE)));
                }
                self.when_due(decision, failure, action)
            }
        })
    }
}

fn is_for_an_image(step: Step) -> bool {
    matches!(step, Step::Verify | Step::Stage | Step::KernelArguments)
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
            | Reason::RegistryConfigInvalid
            | Reason::GpgNeedsScratch
            | Reason::ImageInvalid
            | Reason::NotBootable
            | Reason::DiskFull
            | Reason::HostNotImageMode
            | Reason::HostUnsupported
    )
}
