//! Every annotation of the Node that the agent reads or writes, each with its writer.

/// The prefix of MCO's annotations. MCC, the machine-config-controller, writes `desiredConfig`, `desiredImage`,
/// `lastAppliedDrain` and `controlPlaneTopology`. The agent writes `currentConfig`, `currentImage`, `state`, `reason` and
/// `desiredDrain`, and on a new node also the annotations of the first-boot file.
pub const MCO: &str = "machineconfiguration.openshift.io/";

/// Written by the agent: the attempts to boot an image, see [`super::Attempt`]. Deleting it allows two more.
pub const ATTEMPT: &str = "rebase-agent.openshift.io/attempt";
/// Written by an operator: holds the update before its image is staged. The value is the reason.
pub const HOLD: &str = "rebase-agent.openshift.io/hold";
/// Written by a person or a controller: the image that the node fetches before its turn, by digest. Empty: fetch none. Without
/// it, the pool's image counts.
pub const PREFETCH: &str = "rebase-agent.openshift.io/prefetch";
/// Written by an operator: a new value makes the agent retry failed work at once.
pub const RETRY: &str = "rebase-agent.openshift.io/retry";
/// Written by the agent: who vouched for the image that was verified last, see [`super::Verified`].
pub const VERIFIED: &str = "rebase-agent.openshift.io/verified";
/// Written by the agent: how long the last update took, see [`super::LastUpdate`].
pub const LAST_UPDATE: &str = "rebase-agent.openshift.io/last-update";
/// Written by the agent: why the policy refuses the booted image.
pub const UNTRUSTED: &str = "rebase-agent.openshift.io/untrusted";
