//! Every time and number that the rules go by.

use serde::{Deserialize, Serialize};

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
            signature_grace: SIGNATURE_GRACE,
            uptime_floor: UPTIME_FLOOR,
            minimum_created: None,
        }
    }
}

/// In milliseconds, as all times here.
pub const SECOND: u64 = 1_000;
/// In milliseconds.
pub const MINUTE: u64 = 60 * SECOND;
/// Default of `--poll`: time between two reads of our Node, which the watch makes quicker.
pub const POLL: u64 = 5 * MINUTE;
/// Default of `--signature-grace`.
pub const SIGNATURE_GRACE: u64 = 15 * MINUTE;
/// Default of `--uptime-floor`.
pub const UPTIME_FLOOR: u64 = 5 * MINUTE;
/// How long the host may be unreadable before that is reported: rpm-ostreed may take five minutes to start.
pub const HOST_PATIENCE: u64 = 10 * MINUTE;
/// How long the host may be unreadable before a Node that says Working says so; rpm-ostreed restarts in seconds.
pub const HOST_TOLD: u64 = MINUTE;
/// How long another daemon must not have written before we go on.
pub const OTHER_DAEMON_QUIET: u64 = 15 * MINUTE;
/// An accepted reboot that has not begun by then is asked for again; the kubelet may delay a shutdown for long.
pub const REBOOT_PATIENCE: u64 = 30 * MINUTE;
/// MCD's own limit for the uncordon.
pub const UNCORDON_PATIENCE: u64 = 10 * MINUTE;
/// How long transient failures are merely retried before they are reported as Degraded.
pub const TRANSIENT_PATIENCE: u64 = 15 * MINUTE;
/// MCD's own limit for the drain.
pub const DRAIN_PATIENCE: u64 = 60 * MINUTE;
/// How long somebody else's transaction is merely waited for.
pub const TRANSACTION_PATIENCE: u64 = 30 * MINUTE;
/// How long a node that is drained, or asked to be, merely waits: its workloads need it back.
pub const OUT_OF_SERVICE_PATIENCE: u64 = 30 * MINUTE;
/// How long the kubelet may take to become active.
pub const HEALTH_PATIENCE: u64 = 10 * MINUTE;
/// How soon the kubelet's unit is looked at again while it starts.
pub const HEALTH_POLL: u64 = 2 * SECOND;
/// `Working` for so long lets a rebuild start; a Degraded pool refuses to build.
pub const CONFIG_AHEAD_WORKING: u64 = 30 * MINUTE;
/// `Degraded` for so long lets MCC retarget; in an update it frees the slot.
pub const CONFIG_AHEAD_DEGRADED: u64 = 5 * MINUTE;
/// Longest wait before a drain that no fresh write of MCC asked for, in milliseconds.
pub const RESTORE_SPREAD: u64 = 30 * MINUTE;
/// How soon daemons without a signal to wait for are asked again while an update is under way.
pub const SOON: u64 = 10 * SECOND;
/// Boots of one image after which it is given up.
pub const MAX_BOOTS: u32 = 2;
/// Longest deployment id that is recorded, in bytes; a real one has about 80. The annotation has to be read back.
pub const MAX_ID: usize = 512;
/// Head room on `/boot` beyond the kernel itself, in bytes.
pub const BOOT_MARGIN: u64 = 1 << 20;
/// Longest refusal, in characters, that still leaves room for how to drop the image by hand.
pub const MAX_REFUSAL: usize = 800;
/// Longest sentence about a wait, in characters, that still leaves room for what follows from it.
pub const MAX_WAIT: usize = 700;
/// Longest sentence about a failed verification, in characters, that still leaves room for what follows from it.
pub const MAX_FAILURE: usize = 500;
/// Longest sentence about an untrusted image, in characters.
pub const MAX_UNTRUSTED: usize = 890;
