//! The parts of our own Node object that the protocol uses.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{BootId, PinnedImage, Pullspec};

/// The four values of the `machineconfiguration.openshift.io/state` annotation.
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

/// The attempt to boot an image. Kept across reboots in an annotation of our Node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// The image whose boot was attempted.
    pub image: PinnedImage,
    /// The boot in which the attempt was recorded.
    #[serde(rename = "bootID")]
    pub boot_id: BootId,
    /// Number of boots into this image that were attempted, including this one.
    pub count: u32,
    /// The [`Deployment::id`] that should have booted: the image may also have an older deployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment: Option<String>,
    /// The host went back from the image. Recorded before the deployment is dropped, because the deployment is the proof.
    #[serde(default, rename = "rolledBack", skip_serializing_if = "std::ops::Not::not")]
    pub rolled_back: bool,
    /// Fields of a newer agent, kept as they are.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

/// Who vouched for an image, in an annotation of our Node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// The image.
    pub image: String,
    /// The rule of the node's policy that demanded the signature.
    pub rule: String,
    /// The keys and identities that the rule accepts.
    pub key: String,
    /// When the agent first verified it so, by the API server's clock.
    pub time: String,
}

/// How long the last update took, in milliseconds: written with the attempt to reboot and completed with Done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LastUpdate {
    /// The desired image.
    pub image: String,
    /// How long each rule applied, by the rule's name.
    pub took: BTreeMap<String, u64>,
    /// The end of the drain, since the epoch by the API server's clock.
    pub drained: u64,
    /// From the end of the drain to Done; `None` before Done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out_of_service: Option<u64>,
}

/// Another manager that wrote `state` or `currentConfig` after our last write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherWriter {
    /// The field manager, `machine-config-daemon` for the MCD.
    pub manager: String,
    /// The API server's time of its write, in milliseconds since the epoch.
    pub unix: u64,
}

/// The parts of our own Node object that the protocol uses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeFacts {
    /// `metadata.name`.
    pub name: String,
    /// `desiredConfig`, the rendered config that MCC wants.
    pub desired_config: Option<String>,
    /// `currentConfig`, the rendered config that was last reported.
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
    /// `lastAppliedDrain`: the drain controller's copy of the last request that it has finished.
    pub last_applied_drain: Option<String>,
    /// `controlPlaneTopology`.
    pub topology: Option<String>,
    /// The attempt, if the annotation exists and is well formed.
    pub attempt: Option<Attempt>,
    /// How long the last update took, if the annotation exists and is well formed.
    pub last_update: Option<LastUpdate>,
    /// The reason given in the hold annotation.
    pub hold: Option<String>,
    /// Who vouched for the image that was verified last.
    pub verified: Option<Verified>,
    /// The annotation with the reason why the policy refuses the booted image.
    pub untrusted: Option<String>,
    /// The image to fetch before this node's turn, from the prefetch annotation; empty for none.
    pub prefetch: Option<Pullspec>,
    /// The retry annotation. A new value makes the agent retry failed work at once.
    pub retry: Option<String>,
    /// `!spec.unschedulable`, known only after a full GET.
    pub schedulable: Option<bool>,
    /// Another daemon that writes our annotations.
    pub other_writer: Option<OtherWriter>,
}

impl NodeFacts {
    /// Whether `currentImage` and `desiredImage` are the same text.
    #[must_use]
    pub fn is_current_image_desired(&self) -> bool {
        self.current_image.as_deref() == self.desired_image.as_ref().map(Pullspec::as_str)
    }

    /// Whether the Node reports Done for the desired image and config.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.state.as_deref() == Some(NodeState::Done.as_str())
            && self.current_config.is_some()
            && self.current_config == self.desired_config
            && self.is_current_image_desired()
    }

    /// The desired image, if its pullspec is valid.
    #[must_use]
    pub fn desired(&self) -> Option<&PinnedImage> {
        self.desired_image.as_ref()?.image().ok()
    }
}
