//! The observations that the rules decide on, and the actions that they decide.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Attempt, Digest, HostFacts, MachineFacts, NodeFacts, PinnedImage, Pullspec, Reason};

/// Two clocks in milliseconds: a monotonic one for waits, and the calendar's for timestamps of servers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Now {
    /// Milliseconds since an arbitrary time in this process.
    pub mono: u64,
    /// Milliseconds since the UNIX epoch.
    pub unix: u64,
}

/// The error of a failed read or action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The reason word.
    pub reason: Reason,
    /// One sentence: what, where, what to do. Printable and bounded.
    pub message: String,
}

/// The result of a read: its answer or its error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reading<T> {
    /// The last answer.
    Known(T),
    /// Why there is no answer.
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

/// The observations that [`crate::decide::decide`] uses, besides memory, limits and the time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Our own Node, from the API server.
    pub cluster: Reading<NodeFacts>,
    /// Deployments and transaction, from the host tool.
    pub host: Reading<HostFacts>,
    /// Facts from kernel, systemd and logind.
    pub machine: Reading<MachineFacts>,
    /// The pool's newest image, from its MachineOSConfig.
    #[serde(default)]
    pub pool_image: Option<Pullspec>,
    /// The work of the agent's running task.
    #[serde(default)]
    pub running: Option<Work>,
}

impl Observed {
    /// Whether the agent works with `image`: it is desired, or it may be fetched before the node's turn.
    #[must_use]
    pub fn concerns(&self, image: &PinnedImage) -> bool {
        self.hint() == Some(image) || self.cluster.known().is_some_and(|node| node.desired() == Some(image))
    }

    /// The image that the node may fetch before its turn: that of the prefetch annotation, else the pool's.
    #[must_use]
    pub fn hint(&self) -> Option<&PinnedImage> {
        let annotated = self.cluster.known()?.prefetch.as_ref();
        annotated.or(self.pool_image.as_ref())?.image().ok()
    }
}

/// Work that runs as a task. It may take long, and is retried when it fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// Verify the image's signature.
    Verify {
        /// The image.
        image: PinnedImage,
    },
    /// Pull the image into the host's storage, or attach to the transaction that does. Makes no deployment.
    Fetch {
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
    /// Cancel the host's transaction, which an earlier run of this agent started.
    CancelTransaction {
        /// The digest that the transaction stages.
        digest: Digest,
    },
    /// Change the staged deployment's kernel arguments.
    SetKernelArguments {
        /// The image that is staged.
        image: PinnedImage,
        /// The arguments to append.
        append: Vec<String>,
        /// The arguments to delete.
        delete: Vec<String>,
    },
    /// Start the unit that finalizes the staged deployment when it is stopped.
    StartFinalizer,
    /// Start `bootloader-update.service` and wait for it.
    UpdateBootloader {
        /// The image that boots next.
        image: PinnedImage,
    },
    /// Unlock the staged image if it is locked, and reboot into it.
    Reboot {
        /// The image that boots next.
        image: PinnedImage,
    },
}

impl Work {
    /// Whether `other` is the same work, so that a failure of one counts for the other. The arguments of
    /// [`Work::SetKernelArguments`] are not compared, because they follow from the image.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::SetKernelArguments { image, .. }, Self::SetKernelArguments { image: other, .. }) => image == other,
            _ => self == other,
        }
    }

    /// The image that the work is for.
    #[must_use]
    pub fn image(&self) -> Option<&PinnedImage> {
        match self {
            Self::Verify { image }
            | Self::Fetch { image }
            | Self::Stage { image }
            | Self::SetKernelArguments { image, .. }
            | Self::UpdateBootloader { image }
            | Self::Reboot { image } => Some(image),
            Self::DropStaged { .. } | Self::CancelTransaction { .. } | Self::StartFinalizer => None,
        }
    }

    /// Whether `other` is work of the same kind, on any object.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// An action that only changes annotations of our own Node.
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
    /// Write currentConfig, currentImage and Done in one patch.
    Settle,
    /// Write or delete the annotation that says why the policy refuses the booted image.
    ReportTrust {
        /// The reason word and its sentence; `None` deletes it.
        untrusted: Option<String>,
    },
}

/// The next action.
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
