//! Every time limit and bound of the rules.

use serde::{Deserialize, Serialize};

/// The limits that an operator may set; see `rebase-agent run --help`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Report Done although the desired config is newer than the image.
    pub accept_config_ahead: bool,
    /// How long the agent waits for a missing signature or manifest before the node is Degraded, in milliseconds.
    pub signature_grace: u64,
    /// Uptime before a drain or reboot, in milliseconds.
    pub uptime_floor: u64,
    /// Oldest accepted time of creation of an image, in milliseconds since the epoch.
    pub minimum_created: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            accept_config_ahead: false,
            signature_grace: SIGNATURE_GRACE,
            uptime_floor: UPTIME_FLOOR,
            minimum_created: None,
        }
    }
}

/// One second in milliseconds, the unit of all times here.
pub const SECOND: u64 = 1_000;
/// One minute.
pub const MINUTE: u64 = 60 * SECOND;
/// Default of `--poll`: time between two reads of our Node, beside the watch.
pub const POLL: u64 = 5 * MINUTE;
/// Default of `--prefetch-spread`: longest random wait before the pool's new image is fetched.
pub const PREFETCH_SPREAD: u64 = 15 * MINUTE;
/// How long a fetched image counts as present. Another program's cleanup may remove it without a sign.
pub const FETCHED_LASTS: u64 = 24 * 60 * MINUTE;
/// Bytes that stay free on `/sysroot` beyond the unpacked image when it is fetched before the node's turn.
pub const PREFETCH_FLOOR: u64 = 2 << 30;
/// Size of an unpacked image in the repository, as a multiple of its compressed layers.
pub const UNPACKED: u64 = 3;
/// Default of `--signature-grace`.
pub const SIGNATURE_GRACE: u64 = 15 * MINUTE;
/// Default of `--uptime-floor`.
pub const UPTIME_FLOOR: u64 = 5 * MINUTE;
/// How long the host may be unreadable before the node is Degraded: rpm-ostreed may take five minutes to start.
pub const HOST_PATIENCE: u64 = 10 * MINUTE;
/// How long the host may be unreadable before a Node that says Working reports it; rpm-ostreed restarts in seconds.
pub const HOST_TOLD: u64 = MINUTE;
/// How long another daemon must not have written before the agent continues.
pub const OTHER_DAEMON_QUIET: u64 = 15 * MINUTE;
/// How long an accepted reboot may take to begin before it is requested again. The kubelet may delay a shutdown for long.
pub const REBOOT_PATIENCE: u64 = 30 * MINUTE;
/// MCD's own limit for the uncordon.
pub const UNCORDON_PATIENCE: u64 = 10 * MINUTE;
/// How long transient failures are retried before the node is Degraded.
pub const TRANSIENT_PATIENCE: u64 = 15 * MINUTE;
/// MCD's own limit for the drain.
pub const DRAIN_PATIENCE: u64 = 60 * MINUTE;
/// How long the agent waits for a foreign transaction before it says how to end it.
pub const TRANSACTION_PATIENCE: u64 = 30 * MINUTE;
/// How long a drained node may wait before it is Degraded and uncordoned for its workloads.
pub const OUT_OF_SERVICE_PATIENCE: u64 = 30 * MINUTE;
/// How long the kubelet may take to become active.
pub const HEALTH_PATIENCE: u64 = 10 * MINUTE;
/// Interval of the checks on the kubelet's unit while it starts.
pub const HEALTH_POLL: u64 = 2 * SECOND;
/// How long the node is Working, so that a rebuild can start: MCO does not build for a Degraded pool.
pub const CONFIG_AHEAD_WORKING: u64 = 30 * MINUTE;
/// How long the node is then Degraded, so that MCC can set another image; during an update this frees the slot.
pub const CONFIG_AHEAD_DEGRADED: u64 = 5 * MINUTE;
/// Longest random wait before a drain after a restore of etcd.
pub const RESTORE_SPREAD: u64 = 30 * MINUTE;
/// Interval of reads during an update, of state that no signal reports.
pub const SOON: u64 = 10 * SECOND;
/// Boots of one image after which the agent gives it up.
pub const MAX_BOOTS: u32 = 2;
/// Longest deployment id that is recorded, in bytes, so that the annotation can be read back. A real id has about 80.
pub const MAX_ID: usize = 512;
/// Free space on `/boot` that is needed beyond the kernel itself, in bytes.
pub const BOOT_MARGIN: u64 = 1 << 20;
/// Longest refusal before the sentence that says how to drop the image by hand, in characters.
pub const MAX_REFUSAL: usize = 800;
/// Longest sentence about a wait before the sentence about its consequence, in characters.
pub const MAX_WAIT: usize = 700;
/// Longest sentence about a failed verification before the sentence about the remedy, in characters.
pub const MAX_FAILURE: usize = 500;
/// Longest sentence about the running image before the one about the next, in characters.
pub const MAX_RUNNING: usize = 550;
/// Longest error of a prefetch, in characters.
pub const MAX_PREFETCH: usize = 250;
/// Longest sentence about an untrusted image, in characters.
pub const MAX_UNTRUSTED: usize = 890;
