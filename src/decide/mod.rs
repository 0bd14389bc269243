//! The rules, which make one decision. Pure: no clock, no randomness, no I/O, no panic.
//!
//! [`Rule`] is the table: its variants are evaluated in their order, and the first that applies decides. A *refusal*
//! uncordons a drained node first: MCC never gives a cordoned node another image, so the node would be stuck for ever.

mod drain;
mod follow;
pub mod limits;
mod memory;
mod prefetch;
mod reboot;
mod refuse;
mod settle;
mod update;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use limits::Limits;
pub use memory::{Clock, Failure, Memory, Outcome, Since};

use crate::backoff::Backoff;
use crate::model::{
    Action, Deployment, Fault, HostFacts, ImageFacts, MachineFacts, NodeFacts, NodeState, Now, Observed, PinnedImage,
    Reading, Reason, Severity, Work, is_image, is_named, is_staged,
};
use limits::{HOST_PATIENCE, HOST_TOLD, MINUTE, REBOOT_PATIENCE, SOON, TRANSIENT_PATIENCE};

macro_rules! rules {
    ($($name:ident $word:literal: when $when:literal, then $then:literal, state $state:literal;)*) => {
        /// The rules in the order of their evaluation. A rule's number is its position, from 1.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Rule {
            $(#[doc = concat!("When ", $when, ": ", $then, ". State: ", $state, ".")] $name,)*
        }

        impl Rule {
            /// All rules, in order.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name in output.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }

            /// The row of the table: when the rule applies, what it does, and the state that it reports.
            #[must_use]
            pub fn row(self) -> [&'static str; 3] {
                match self { $(Self::$name => [$when, $then, $state],)* }
            }
        }
    };
}

rules! {
    Shutdown "shutdown":
        when "the machine is going down, or logind accepted our reboot less than 30 min ago",
        then "do nothing",
        state "unchanged";
    ClusterUnreadable "cluster-unreadable":
        when "our Node cannot be read, or does not exist",
        then "wait; a running task may finish",
        state "unchanged";
    HostUnreadable "host-unreadable":
        when "deployments, kernel, systemd or logind cannot be read",
        then "wait",
        state "unchanged; Working after 1 min if it was Working, Degraded after 10 min";
    OtherDaemon "other-daemon":
        when "another daemon wrote `state` or `currentConfig` in the last 15 min",
        then "do nothing; uncordon a drained node",
        state "unchanged";
    FirstBoot "first-boot":
        when "`currentConfig` is missing",
        then "publish the first-boot file's annotations if its image is booted, else those of the booted image",
        state "as published; Degraded if the booted image's rendered config is unknown";
    NotLayered "not-layered":
        when "neither `desiredImage` nor `currentImage` is set",
        then "wait: the pool has no image",
        state "unchanged";
    LayeringReverted "layering-reverted":
        when "`currentImage` is set and `desiredImage` is gone",
        then "refuse",
        state "Unreconcilable";
    Malformed "malformed":
        when "`desiredImage` is not `name@sha256:<64 hex>`, or `desiredConfig` is missing",
        then "refuse",
        state "Degraded";
    NotDesired "not-desired":
        when "our own work is for another image than the desired one, or another one boots next",
        then "abort that work; drop what boots next, once per checksum (bootc: stage over it)",
        state "unchanged";
    Done "done":
        when "the desired image is booted and the Node says Done for it",
        then "wait for a change; in the background verify the booted image, then fetch the pool's next one",
        state "unchanged";
    ConfigAhead "config-ahead":
        when "the desired image is booted and was built from another rendered config than `desiredConfig`",
        then "wait for a rebuild, unless `--config-ahead accept`",
        state "Working for 30 min, Degraded for 5 min, in turns";
    ArgumentsMissing "arguments-missing":
        when "the desired image is booted without a kernel argument of its rendered config",
        then "refuse",
        state "Degraded";
    Health "health":
        when "the desired image is booted and kubelet.service is not active",
        then "wait; after 10 min hold the node cordoned",
        state "Working, then Degraded";
    Uncordon "uncordon":
        when "the desired image is booted and the node is not uncordoned for its config",
        then "request the uncordon and wait for it",
        state "Working, Degraded after 10 min";
    Settle "settle":
        when "the desired image is booted and the node is uncordoned",
        then "write currentConfig, currentImage and Done in one patch",
        state "Done";
    GivenUp "given-up":
        when "the host booted this image and went back from it, or two boots did not reach it",
        then "refuse; drop it if it is still first in boot order",
        state "Degraded";
    Verify "verify":
        when "this process has not verified the image",
        then "verify its signature",
        state "Working; Degraded by the severity of the error";
    Unfit "unfit":
        when "the verified image is for another architecture, is not bootable, is too old, or was built from another config",
        then "refuse, or wait for a rebuild",
        state "Degraded, or as config-ahead";
    Transaction "transaction":
        when "a task of ours runs, or the host tool has a transaction",
        then "attach to ours; wait for a foreign one and say after 30 min how to end it",
        state "Working";
    NoRoom "no-room":
        when "the image is not staged, and packages are layered on the host or /boot is full",
        then "refuse",
        state "Degraded";
    Fetch "fetch":
        when "the image is not staged, and this process has not fetched it",
        then "pull it while workloads run; nothing is staged",
        state "Working; Degraded by the severity of the error";
    Hindrance "hindrance":
        when "a hold, a block inhibitor, the uptime floor, an inactive finalizer or a restored database holds up the update",
        then "drop a held image that is staged and not locked; start the finalizer; else wait",
        state "Working";
    Stage "stage":
        when "the image is not staged",
        then "stage it while workloads run, locked where the host tool can",
        state "Working; Degraded by the severity of the error";
    KernelArguments "kernel-arguments":
        when "the staged deployment's kernel arguments differ from its rendered config",
        then "set them (rpm-ostree), or refuse (bootc)",
        state "Working, or Degraded";
    Drain "drain":
        when "the node is not drained, or no longer drained",
        then "request the drain and wait for it; confirm it by a read of the whole Node",
        state "Working, Degraded after 1 h";
    Reboot "reboot":
        when "no other rule applies",
        then "record the attempt, update the boot loader, read everything again, unlock the image and reboot",
        state "Working, Degraded if logind refuses for 15 min";
}

impl Rule {
    /// The position in the table, from 1.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8 + 1
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.number())
    }
}

/// The result of [`decide`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The rule that applies.
    pub rule: Rule,
    /// The next action.
    pub action: Action,
    /// The reason word.
    pub reason: Reason,
    /// A sentence that also says what to do. It has no counters and no times, so that it is the same for the same
    /// situation.
    pub message: String,
    /// The state to report; `None` keeps the current one.
    pub state: Option<NodeState>,
    /// The state may replace Degraded or Unreconcilable by Working.
    pub unsticks: bool,
    /// Decide again after this time at the latest, in milliseconds; `None` waits for a change.
    pub wake: Option<u64>,
    /// The clock this decision waits on, and its subject.
    pub clock: Option<(Clock, String)>,
}

/// Decides the next action, the reason for it, and the state to report.
#[must_use]
pub fn decide(observed: &Observed, memory: &Memory, limits: &Limits, now: Now) -> Decision {
    let node = match &observed.cluster {
        Reading::Known(node) => node,
        Reading::Unknown(fault) => {
            let shutting_down = observed.machine.known().is_some_and(|machine| machine.shutting_down);
            return if shutting_down || going_down(memory, now) {
                shutting()
            } else {
                unreadable(Rule::ClusterUnreadable, fault)
            };
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

fn by(rule: Rule, reason: Reason, message: impl Into<String>) -> Decision {
    Decision {
        rule,
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
    fn doing(self, action: impl Into<Action>) -> Self {
        Self { action: action.into(), ..self }
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

/// Whether an accepted reboot is still expected to begin. Until then the agent starts no other work.
fn going_down(memory: &Memory, now: Now) -> bool {
    memory.clocks.get(&Clock::RebootAccepted).is_some_and(|since| now.mono.saturating_sub(since.mono) < REBOOT_PATIENCE)
}

fn shutting() -> Decision {
    by(Rule::Shutdown, Reason::ShuttingDown, "the machine is going down; the agent starts nothing").wake(MINUTE)
}

fn unreadable(rule: Rule, fault: &Fault) -> Decision {
    by(rule, fault.reason, fault.message.clone())
}

fn host_unreadable(node: &NodeFacts, fault: &Fault, memory: &Memory, now: Now) -> Decision {
    let decision = unreadable(Rule::HostUnreadable, fault).clock(Clock::HostUnreadable, "").wake(SOON);
    let waited = memory.clocks.get(&Clock::HostUnreadable).map_or(0, |since| now.mono.saturating_sub(since.mono));
    // The agent does not report a node that follows no image, or that another daemon manages.
    let ours = node.desired_image.is_some() && node.other_writer.is_none();
    let works = node.state.as_deref() == Some(NodeState::Working.as_str());
    match waited {
        HOST_PATIENCE.. if ours => decision.state(NodeState::Degraded),
        // Otherwise the Node would keep the reason from before, for example that the image is being staged.
        HOST_TOLD.. if ours && works => decision.state(NodeState::Working),
        _ => decision,
    }
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

/// The desired image and config. They are known if none of rows 5 to 8 applies.
struct Wanted<'a> {
    image: &'a PinnedImage,
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

    fn is_wanted(&self, deployment: &Deployment, wanted: &Wanted<'_>) -> bool {
        is_image(deployment, wanted.image, wanted.facts)
    }

    /// Whether the booted deployment is the desired image. For an index that this process has not verified yet, the
    /// reference is enough if this agent booted it or has reported Done for it.
    fn runs(&self, booted: &Deployment, wanted: &Wanted<'_>) -> bool {
        let tried =
            self.node.attempt.as_ref().is_some_and(|attempt| {
                attempt.image == *wanted.image && attempt.deployment.as_ref() == Some(&booted.id)
            });
        let believed = wanted.facts.is_none() && (tried || self.node.is_done());
        self.is_wanted(booted, wanted) || believed && is_named(booted, wanted.image)
    }

    /// The staged deployment, if it is the desired image as it was verified and the host tool can boot it.
    fn staged(&self, wanted: &Wanted<'_>) -> Option<&'a Deployment> {
        self.host.staged().filter(|staged| is_staged(staged, wanted.image, wanted.facts, self.host.backend))
    }

    fn waited(&self, clock: Clock, subject: &str) -> u64 {
        let since = self.memory.clocks.get(&clock).filter(|since| since.subject == subject);
        since.map_or(0, |since| self.now.mono.saturating_sub(since.mono))
    }

    fn failure(&self, work: &Work) -> Option<&'a Failure> {
        self.memory.failure(work)
    }

    /// Milliseconds until the failed work is retried.
    fn due_in(&self, failure: &Failure, backoff: Backoff) -> u64 {
        failure.last.saturating_add(backoff.delay(failure.count)).saturating_sub(self.now.mono)
    }

    fn is_running(&self, work: &Work) -> bool {
        self.observed.running.as_ref().is_some_and(|running| running.is(work))
    }

    /// How long work that fails with `reason` is retried before the node is Degraded.
    fn patience(&self, reason: Reason) -> u64 {
        match reason.severity() {
            Severity::Fatal => 0,
            Severity::Awaited => self.limits.signature_grace,
            Severity::Progress | Severity::Waiting | Severity::Transient => TRANSIENT_PATIENCE,
        }
    }

    /// The decision for failed work, with the message of the failure.
    fn failed(&self, rule: Rule, failure: &Failure) -> Decision {
        let decision = by(rule, failure.fault.reason, failure.fault.message.clone());
        let lasts = failure.first.saturating_add(self.patience(failure.fault.reason));
        match lasts.saturating_sub(self.now.mono) {
            0 => decision.state(NodeState::Degraded),
            left => decision.state(NodeState::Working).wake(left),
        }
    }

    /// `decision` with `work` as its action, unless the work has failed and its retry is not due.
    fn begin(&self, decision: Decision, work: Work) -> Decision {
        match self.failure(&work) {
            None => decision.doing(work),
            Some(failure) => self.when_due(decision, failure, work),
        }
    }

    /// `decision`, with `work` as its action once the retry is due. An action that the decision already has comes first.
    fn when_due(&self, decision: Decision, failure: &Failure, work: Work) -> Decision {
        let fatal = failure.fault.reason.severity() == Severity::Fatal;
        match self.due_in(failure, if fatal { Backoff::REFUSAL } else { Backoff::TRANSIENT }) {
            0 if decision.action == Action::Nothing => Decision { wake: None, ..decision.doing(work) },
            due => {
                let wake = decision.wake.unwrap_or(u64::MAX).min(due).max(1);
                decision.wake(wake)
            }
        }
    }
}
