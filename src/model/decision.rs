//! What is observed, and what may be done about it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Attempt, Digest, HostFacts, MachineFacts, NodeFacts, PinnedImage, Reason};
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
    pub running: Option<Work>,
}

/// What runs as a task, may take long, may fail and is tried again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
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
    /// Remove the deployment that would boot next: the staged one, or one that is first in boot order and not booted.
    DropStaged {
        /// Its ostree checksum.
        checksum: String,
    },
    /// Cancel the host's transaction that an earlier run of this agent started.
    CancelTransaction {
        /// The digest that the transaction stages.
        digest: Digest,
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
    /// Start `bootloader-update.service` and wait for it.
    UpdateBootloader {
        /// The image that boots next.
        image: PinnedImage,
    },
    /// Ask logind to reboot.
    Reboot {
        /// Into what.
        image: PinnedImage,
    },
}

impl Work {
    /// Whether `other` is the same work: a failure of one says something about the other. The arguments of
    /// [`Work::SetKernelArguments`] follow from the image.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::SetKernelArguments { image, .. }, Self::SetKernelArguments { image: other, .. }) => image == other,
            _ => self == other,
        }
    }

    /// Whether `other` is work of the same kind, perhaps on something else.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// What changes nothing but annotations of our own Node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Annotate {
    /// Publish first-boot annotations.
    FirstBoot {
        /// Annotation (without prefix) to value.
        annotations: BTreeMap<String, String>,
    },
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
    /// Write the attempt annotation.
    RecordAttempt {
        /// The new value.
        attempt: Attempt,
    },
    /// Write the one Done patch.
    Settle,
    /// Write, or delete, the annotation that says that the policy refuses what runs.
    ReportTrust {
        /// The reason word and its sentence; `None` deletes it.
        untrusted: Option<String>,
    },
}

/// What to do next: one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Nothing; wait.
    Nothing,
    /// Write annotations.
    Annotate(Annotate),
    /// Begin a task.
    Begin(Work),
    /// Abort the agent's own task.
    Abort,
    /// Read the whole Node, not only its metadata.
    ConfirmDrain,
}

impl From<Annotate> for Action {
    fn from(annotate: Annotate) -> Self {
        Self::Annotate(annotate)
    }
}

impl From<Work> for Action {
    fn from(work: Work) -> Self {
        Self::Begin(work)
    }
}
