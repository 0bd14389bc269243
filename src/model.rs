//! What the agent knows and what it concludes, as plain data. Depends on no neighbour and does nothing.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::backend::Backend;
pub use crate::reason::Reason;
pub use crate::text::printable;

/// An OCI manifest digest, `sha256:` and 64 lowercase hex digits. No other algorithm is accepted: the signature
/// engine, both host tools and MCO's own admission use this one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Parses the canonical spelling; anything else is `None`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?;
        let valid = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        valid.then(|| Self(text.to_owned()))
    }

    /// `sha256:<64 hex>`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `sha256:` and the first twelve digits, for people.
    #[must_use]
    pub fn short(&self) -> &str {
        self.0.get(..19).unwrap_or(&self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("`{text}` is not sha256:<64 lowercase hex digits>"))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A canonical image reference pinned by digest, `host[:port]/repository@sha256:<64 hex>`. Made by
/// [`crate::registry::reference::parse`]; the name is canonical (no tag, `docker.io` spelt out).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PinnedImage {
    name: String,
    digest: Digest,
}

impl PinnedImage {
    pub(crate) fn new(name: String, digest: Digest) -> Self {
        Self { name, digest }
    }

    /// `host[:port]/repository`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The pinned manifest (or index) digest.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.digest
    }
}

impl TryFrom<String> for PinnedImage {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        crate::registry::reference::parse(&text).map_err(|e| e.to_string())
    }
}

impl From<PinnedImage> for String {
    fn from(image: PinnedImage) -> Self {
        image.to_string()
    }
}

impl fmt::Display for PinnedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.digest)
    }
}

impl fmt::Debug for PinnedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The kernel's `boot_id`: a new one for every boot, and the only proof that a reboot happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootId(pub String);

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Two clocks, both in milliseconds: one that never jumps, for every wait, and the calendar, for what servers stamp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Now {
    /// Milliseconds since an arbitrary start in this process.
    pub mono: u64,
    /// Milliseconds since the UNIX epoch.
    pub unix: u64,
}

/// Why a neighbour could not be read, or an action failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The stable word.
    pub reason: Reason,
    /// One sentence: what, where, what to do. Sanitised and bounded.
    pub message: String,
    /// Whether the same call may succeed later without anybody changing anything.
    pub retryable: bool,
}

/// A neighbour's answer, or why there is none. Never both, never silently neither.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reading<T> {
    /// What it said when it was last asked.
    Known(T),
    /// Why nothing is known.
    Unknown(Fault),
}

impl<T> Reading<T> {
    /// The answer, if there is one.
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Unknown(_) => None,
        }
    }
}

/// The four values of the `machineconfiguration.openshift.io/state` annotation; no fifth exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the annotation's own values")]
pub enum NodeState {
    Working,
    Done,
    Degraded,
    Unreconcilable,
}

impl NodeState {
    /// The annotation's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Working => "Working",
            Self::Done => "Done",
            Self::Degraded => "Degraded",
            Self::Unreconcilable => "Unreconcilable",
        }
    }
}

/// What the agent remembers across reboots, kept in its annotation on its own Node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// The image whose boot was attempted.
    pub image: PinnedImage,
    /// The boot in which the attempt was recorded.
    #[serde(rename = "bootID")]
    pub boot_id: BootId,
    /// How many boots have tried this image, this one included.
    pub count: u32,
    /// The [`Deployment::id`] that was to boot: the image may have another deployment, the one before the booted one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment: Option<String>,
    /// The host went back from it. Recorded before that deployment is dropped, which was the proof.
    #[serde(default, rename = "rolledBack", skip_serializing_if = "std::ops::Not::not")]
    pub rolled_back: bool,
    /// Fields of a newer agent, kept as they are.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

/// Someone else who wrote `state` or `currentConfig` after our last write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherWriter {
    /// The field manager, for the MCD `machine-config-daemon`.
    pub manager: String,
    /// When the API server stamped its write, in milliseconds since the epoch.
    pub unix: u64,
}

/// The node's own Node object, as far as the protocol goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeFacts {
    /// `metadata.name`.
    pub name: String,
    /// `desiredConfig`, the rendered config MCC wants.
    pub desired_config: Option<String>,
    /// `currentConfig`, the rendered config last reported.
    pub current_config: Option<String>,
    /// `desiredImage`, verbatim.
    pub desired_image: Option<String>,
    /// `currentImage`, verbatim.
    pub current_image: Option<String>,
    /// `state`, verbatim.
    pub state: Option<String>,
    /// `reason`, verbatim.
    pub reason: Option<String>,
    /// `desiredDrain`: `drain-…` or `uncordon-…`.
    pub desired_drain: Option<String>,
    /// `lastAppliedDrain`: the drain controller's copy of what it has done.
    pub last_applied_drain: Option<String>,
    /// `controlPlaneTopology`.
    pub topology: Option<String>,
    /// The attempt, if the annotation is there and well formed.
    pub attempt: Option<Attempt>,
    /// The reason given in the hold annotation.
    pub hold: Option<String>,
    /// Why the policy refuses what runs, as this agent reported it.
    pub untrusted: Option<String>,
    /// The retry annotation; a new value asks for failed work to be tried at once.
    pub retry: Option<String>,
    /// `!spec.unschedulable`, known only after a full GET.
    pub schedulable: Option<bool>,
    /// Another daemon that writes our fields.
    pub other_writer: Option<OtherWriter>,
}

/// One ostree deployment, as the host's own tool reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Deployment {
    /// `<osname>-<checksum>.<serial>`, the host tool's name for it.
    pub id: String,
    /// The stateroot.
    pub osname: String,
    /// The ostree commit.
    pub checksum: String,
    /// This is what runs.
    pub booted: bool,
    /// This is finalized at shutdown and boots next.
    pub staged: bool,
    /// Staged, and left out of the next boot until it is unlocked.
    pub locked: bool,
    /// Kept until unpinned.
    pub pinned: bool,
    /// Image version label, for people.
    pub version: Option<String>,
    /// `host/repository[:tag|@digest]` without the signature prefix.
    pub reference: Option<String>,
    /// Manifest digest that the host recorded at the pull; for an index, the instance's.
    pub digest: Option<Digest>,
    /// Packages, overrides or a local initramfs on top of the image.
    pub layered: bool,
    /// The image's `machineconfig` label: the rendered config it was built from.
    pub rendered_config: Option<String>,
    /// `spec.kernelArguments` of the rendered config that the image carries, split; `None` if it carries none.
    pub wanted_arguments: Option<Vec<String>>,
    /// Why the rendered config that the image carries cannot be used: which arguments it wants is not known then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_fault: Option<String>,
    /// The kernel arguments of its boot entry, for the staged one those that it will have; read for these two only.
    pub arguments: Option<Vec<String>>,
}

/// The host tool's active transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transaction {
    /// Its title: for ours `rebase-agent <digest>`.
    pub title: String,
    /// Who started it, as the host tool describes them.
    pub client: String,
    /// The digest in the title, if the transaction is ours.
    pub ours: Option<Digest>,
}

/// What rpm-ostree or bootc say. Reading it wakes their daemon, so it is read around changes only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostFacts {
    /// Who was asked, and will be asked to change anything.
    pub backend: Backend,
    /// Boot order: staged first, then the next boot's default.
    pub deployments: Vec<Deployment>,
    /// What the host tool is busy with.
    pub transaction: Option<Transaction>,
}

impl HostFacts {
    /// What runs now.
    #[must_use]
    pub fn booted(&self) -> Option<&Deployment> {
        self.deployments.iter().find(|d| d.booted)
    }

    /// What is staged, also while it is locked.
    #[must_use]
    pub fn staged(&self) -> Option<&Deployment> {
        self.deployments.iter().find(|d| d.staged)
    }

    /// What an orderly reboot boots: the first in boot order that is not locked.
    #[must_use]
    pub fn next_boot(&self) -> Option<&Deployment> {
        self.deployments.iter().find(|d| !d.locked)
    }

    /// The first deployment after the booted one, of the same stateroot.
    #[must_use]
    pub fn rollback(&self) -> Option<&Deployment> {
        let booted = self.booted()?;
        self.deployments.iter().skip_while(|d| !d.booted).skip(1).find(|d| d.osname == booted.osname)
    }
}

/// systemd's view of one unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names are systemd's ActiveState values")]
pub enum UnitState {
    Active,
    Activating,
    #[default]
    Inactive,
    Failed,
    /// No unit file of that name.
    Absent,
}

/// A block-mode inhibitor lock that covers shutdown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inhibitor {
    /// Who holds it, in their own words.
    pub who: String,
    /// Why, in their own words.
    pub why: String,
}

/// What the kernel, systemd and logind say. Cheap: all of them run anyway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// This boot.
    pub boot_id: BootId,
    /// Milliseconds since the kernel started.
    pub uptime: u64,
    /// The machine's architecture by its OCI name.
    pub architecture: String,
    /// The running kernel's arguments.
    pub command_line: Vec<String>,
    /// Bytes free for root on `/boot`.
    pub boot_free: Option<u64>,
    /// Bytes that the running kernel and its initramfs take, the measure of what the next one needs.
    pub boot_needed: Option<u64>,
    /// `ostree-finalize-staged.service`.
    pub finalizer: UnitState,
    /// `kubelet.service`.
    pub kubelet: UnitState,
    /// `bootloader-update.service`.
    pub bootloader_update: UnitState,
    /// `ostree-boot-complete.service` failed: the previous boot's staged deployment could not be finalized.
    pub finalize_failed: bool,
    /// Block-mode shutdown inhibitors.
    #[serde(default)]
    pub inhibitors: Vec<Inhibitor>,
    /// logind is preparing a shutdown.
    #[serde(default)]
    pub shutting_down: bool,
    /// The Ignition-written first-boot annotations, if the file is there.
    #[serde(default)]
    pub first_boot: Option<BTreeMap<String, String>>,
}

/// What verification found out about an image, all of it covered by the verified digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// What was verified.
    pub image: PinnedImage,
    /// The manifest that this architecture boots: the pinned digest itself, or the index's instance.
    pub instance: Digest,
    /// The image config's architecture, by its OCI name.
    pub architecture: String,
    /// Whether the image says it is a bootable ostree or bootc image.
    pub bootable: bool,
    /// The `machineconfig` label.
    pub rendered_config: Option<String>,
    /// When the image was created, as its config says, in milliseconds since the epoch; `None` if it does not say so.
    #[serde(default)]
    pub created: Option<u64>,
    /// Compressed size of all layers, in bytes.
    pub size: u64,
    /// The policy scope whose requirements the signature met, e.g. `docker "quay.io/org"`.
    pub vouched_by: String,
}

/// What the agent's own task is busy with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Which.
    pub step: Step,
    /// For which image, checksum or request.
    pub subject: String,
}

/// Everything that [`crate::decide::decide`] may look at, besides memory, limits and the time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Neighbour 1, the API server: our own Node.
    pub cluster: Reading<NodeFacts>,
    /// Neighbour 3, the OS: deployments.
    pub host: Reading<HostFacts>,
    /// Neighbour 3, the OS: kernel, systemd, logind.
    pub machine: Reading<MachineFacts>,
    /// The agent's own task.
    #[serde(default)]
    pub running: Option<Running>,
}

/// The kinds of work that can fail and be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "one per Action with an effect outside the Node object")]
pub enum Step {
    Verify,
    Stage,
    DropStaged,
    CancelTransaction,
    KernelArguments,
    StartFinalizer,
    UpdateBootloader,
    Reboot,
}

/// How a step has failed so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The image, checksum or unit it was about; a failure of another subject says nothing.
    pub subject: String,
    /// The last error.
    pub fault: Fault,
    /// When the first of an unbroken row happened, on the monotonic clock.
    pub first: u64,
    /// When the last one happened.
    pub last: u64,
    /// How many there were.
    pub count: u32,
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
    /// Failures that have not been followed by a success.
    pub failures: BTreeMap<Step, Failure>,
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
    /// Records that `step` failed for `subject`.
    pub fn failed(&mut self, step: Step, subject: &str, fault: Fault, now: Now) {
        let failure = match self.failures.remove(&step) {
            Some(old) if old.subject == subject => {
                // An outage before it must not use up the time that a pipeline has to sign what it pushed.
                let awaited = |reason| matches!(reason, Reason::SignatureMissing | Reason::ManifestMissing);
                let first = if awaited(fault.reason) && !awaited(old.fault.reason) { now.mono } else { old.first };
                Failure { fault, first, last: now.mono, count: old.count.saturating_add(1), ..old }
            }
            _ => Failure { subject: subject.to_owned(), fault, first: now.mono, last: now.mono, count: 1 },
        };
        self.failures.insert(step, failure);
        self.gave_up(step);
    }

    /// Makes all failed work due if the retry annotation has a new value. What it says when the process starts is no
    /// request, nor is its removal.
    pub fn heed_retry(&mut self, node: &NodeFacts) {
        let now = node.retry.clone().unwrap_or_default();
        let before = self.retry.replace(now.clone());
        if before.is_some_and(|before| before != now) && !now.is_empty() {
            // No delay follows no failure; `first` stays, and with it what has been waited for.
            self.failures.values_mut().for_each(|failure| failure.count = 0);
            self.unusable = None;
        }
    }

    /// Records that `step` ended without having done anything: what was not staged has dropped nothing.
    pub fn gave_up(&mut self, step: Step) {
        if step == Step::Stage {
            self.dropped.clear();
        }
    }

    /// Records that `step` succeeded.
    pub fn succeeded(&mut self, step: Step) {
        self.failures.remove(&step);
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
        if let Action::DropStaged { checksum } = &decision.action {
            let staged = observed.host.known().and_then(HostFacts::staged);
            let unusable = staged.filter(|staged| staged.checksum == *checksum && staged.config_fault.is_some());
            self.unusable = unusable.cloned().or(self.unusable.take());
        }
        if matches!(decision.action, Action::Stage { .. }) {
            // What we stage ourselves may be dropped again; what it is staged over is dropped by that.
            let staged = observed.host.known().and_then(HostFacts::staged);
            self.dropped = staged.map(|staged| staged.checksum.clone()).into_iter().collect();
        }
        if matches!(decision.action, Action::Settle) || decision.reason.is_at_rest() {
            self.clocks.clear();
            self.failures.retain(|step, _| *step == Step::Verify);
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

/// What an operator may set; see `rebase-agent run --help`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Settle although the desired config is newer than the image.
    pub accept_config_ahead: bool,
    /// How long a missing signature or manifest is merely awaited, in milliseconds.
    pub signature_grace: u64,
    /// No drain and no reboot before the machine has been up this long, in milliseconds.
    pub uptime_floor: u64,
    /// An image that was created before this time is refused; in milliseconds since the epoch.
    pub minimum_created: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            accept_config_ahead: false,
            signature_grace: 15 * 60_000,
            uptime_floor: 5 * 60_000,
            minimum_created: None,
        }
    }
}

/// What to do next: one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Nothing; wait.
    Nothing,
    /// Publish first-boot annotations.
    Publish {
        /// Annotation (without prefix) to value.
        annotations: BTreeMap<String, String>,
    },
    /// Abort the agent's own task.
    AbortTask,
    /// Cancel the host's transaction that an earlier run of this agent started.
    CancelTransaction,
    /// Remove the deployment that would boot next: the staged one, or one that is first in boot order and not booted.
    DropStaged {
        /// Its ostree checksum.
        checksum: String,
    },
    /// Verify the image's signature.
    Verify {
        /// The image.
        image: PinnedImage,
    },
    /// Stage the image, or attach to the transaction that does.
    Stage {
        /// The image.
        image: PinnedImage,
    },
    /// Change the staged deployment's kernel arguments.
    SetKernelArguments {
        /// The image that is staged.
        image: PinnedImage,
        /// To append.
        append: Vec<String>,
        /// To delete.
        delete: Vec<String>,
    },
    /// Start the unit whose stop finalizes the staged deployment.
    StartFinalizer,
    /// Read the whole Node, not only its metadata.
    ConfirmDrain,
    /// Write `desiredDrain=drain-…`.
    RequestDrain {
        /// The whole value.
        value: String,
    },
    /// Write `desiredDrain=uncordon-…`.
    RequestUncordon {
        /// The whole value.
        value: String,
    },
    /// Start `bootloader-update.service` and wait for it.
    UpdateBootloader,
    /// Write the attempt annotation.
    RecordAttempt {
        /// The new value.
        attempt: Attempt,
    },
    /// Ask logind to reboot.
    Reboot {
        /// Into what.
        image: PinnedImage,
    },
    /// Write the one Done patch.
    Settle,
    /// Write, or delete, the annotation that says that the policy refuses what runs.
    ReportTrust {
        /// The reason word and its sentence; `None` deletes it.
        untrusted: Option<String>,
    },
}

/// What [`crate::decide::decide`] concludes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The rule that matched, by its name in the design's table.
    pub rule: String,
    /// The one thing to do.
    pub action: Action,
    /// The stable word.
    pub reason: Reason,
    /// A sentence with the way out. The same situation gives the same words: no counters, no clock times.
    pub message: String,
    /// The state to report; `None` leaves what is there.
    pub state: Option<NodeState>,
    /// May replace Degraded or Unreconcilable by Working.
    pub unsticks: bool,
    /// Look again at the latest after so many milliseconds; `None`: when something changes.
    pub wake: Option<u64>,
    /// The clock this decision waits on, and its subject.
    pub clock: Option<(Clock, String)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_retry_annotation_makes_failed_work_due() {
        let fault = Fault { reason: Reason::SignatureRejected, message: "x".into(), retryable: false };
        let failed = Failure { subject: "b".into(), fault, first: 1, last: 2, count: 7 };
        let mut memory = Memory { failures: [(Step::Verify, failed)].into(), ..Memory::default() };
        let mut heed = |retry: Option<&str>| {
            memory.heed_retry(&NodeFacts { retry: retry.map(str::to_owned), ..NodeFacts::default() });
            let failure = memory.failures.get_mut(&Step::Verify).unwrap();
            assert_eq!((failure.first, failure.last), (1, 2), "what was waited for stays");
            std::mem::replace(&mut failure.count, 7) == 0
        };
        // What is there at start is no request, the same value again is none, nor is its removal.
        let values = [Some("a"), Some("a"), Some("b"), None, Some("b"), Some(""), Some("c"), Some("c")];
        assert_eq!(values.map(&mut heed), [false, false, true, false, true, false, true, false]);
    }

    #[test]
    fn digests_have_one_spelling() {
        let hex = "0a".repeat(32);
        assert_eq!(Digest::parse(&format!("sha256:{hex}")).unwrap().short(), "sha256:0a0a0a0a0a0a");
        for bad in
            [hex.clone(), format!("sha256:{}", hex.to_uppercase()), format!("sha256:{hex}0"), format!("sha512:{hex}")]
        {
            assert_eq!(Digest::parse(&bad), None, "{bad}");
        }
    }
}
