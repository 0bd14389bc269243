//! Our own Node object, as far as the protocol goes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{BootId, PinnedImage, Pullspec};

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
    /// `desiredImage`.
    pub desired_image: Option<Pullspec>,
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

impl NodeFacts {
    /// Whether `currentImage` and `desiredImage` are the same text.
    #[must_use]
    pub fn is_current_image_desired(&self) -> bool {
        self.current_image.as_deref() == self.desired_image.as_ref().map(Pullspec::as_str)
    }

    /// The desired image, if there is one that can be followed.
    #[must_use]
    pub fn desired(&self) -> Option<&PinnedImage> {
        self.desired_image.as_ref()?.image().ok()
    }
}
