//! Every annotation of the Node that the agent reads or writes, and who writes it.

/// The prefix of MCO's annotations. MCC, the machine-config-controller, writes `desiredConfig`, `desiredImage`,
/// `lastAppliedDrain` and `controlPlaneTopology`; the agent writes `currentConfig`, `currentImage`, `state`, `reason`
/// and `desiredDrain`, and of a new node also what the first-boot file holds.
pub const MCO: &str = "machineconfiguration.openshift.io/";

/// Written by the agent: the boots that have tried an image, see [`super::Attempt`]. Deleting it allows two more.
pub const ATTEMPT: &str = "rebase-agent.openshift.io/attempt";
/// Written by an operator: holds drain and reboot, and says why.
pub const HOLD: &str = "rebase-agent.openshift.io/hold";
/// Written by an operator: any new value has failed work tried at once.
pub const RETRY: &str = "rebase-agent.openshift.io/retry";
/// Written by the agent: why the policy refuses the image that runs.
pub const UNTRUSTED: &str = "rebase-agent.openshift.io/untrusted";
