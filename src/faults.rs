//! Ways to misbehave, one at a time, so that tests can prove that they would notice. Only a build with the feature
//! `faults` has them; no release does, and such a build says what it is in its first message.

use crate::host::boot::Root;
use crate::model::{Observed, Reading, UnitState};

/// What the fault is chosen with.
const VARIABLE: &str = "REBASE_AGENT_FAULT";

/// Tries to write to what a service could be thought to write to.
pub const WRITE: &str = "write";
/// Takes any image for verified.
pub const NO_VERIFY: &str = "no-verify";
/// Reboots whether or not the finalizer waits for it.
pub const EARLY_REBOOT: &str = "early-reboot";
/// Takes the end of a transaction for its success.
pub const TRUST_TRANSACTION: &str = "trust-transaction";
/// Knows nothing of attempts in earlier boots.
pub const FORGET_ATTEMPT: &str = "forget-attempt";

/// Whether this fault was chosen.
#[must_use]
pub fn chosen(fault: &str) -> bool {
    std::env::var(VARIABLE).is_ok_and(|chosen| chosen == fault)
}

/// Says what kind of build this is, and writes where it was told to.
#[allow(clippy::disallowed_methods, reason = "the deliberate write")]
pub fn announce(root: &Root) {
    tracing::error!("this is a build for tests that misbehaves: {}", std::env::var(VARIABLE).unwrap_or_default());
    if chosen(WRITE) {
        for directory in ["etc", "run", "usr/bin", "var/lib"] {
            let path = root.join(directory).join("rebase-agent-fault");
            match std::fs::write(&path, "written") {
                Ok(()) => tracing::error!("deliberate write: {} was written", path.display()),
                Err(error) => tracing::error!("deliberate write: {} was stopped: {error}", path.display()),
            }
        }
    }
}

/// Makes the rules see something else than there is.
pub fn twist(observed: &mut Observed) {
    let boot = observed.machine.known().map(|machine| machine.boot_id.clone());
    if let Reading::Known(machine) = &mut observed.machine
        && chosen(EARLY_REBOOT)
    {
        machine.finalizer = UnitState::Active;
    }
    if let Reading::Known(node) = &mut observed.cluster
        && chosen(FORGET_ATTEMPT)
    {
        node.attempt = node.attempt.take().filter(|attempt| Some(&attempt.boot_id) == boot.as_ref());
    }
}
