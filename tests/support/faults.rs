//! Deliberate faults, one at a time, by which tests prove that they would find them. `tests/support/faulty` compiles
//! this file into a copy of the agent; no release contains it, and an agent that contains it says so in its first
//! message.

use crate::model::{Attempt, UnitState};

/// The environment variable that names the fault.
const VARIABLE: &str = "REBASE_AGENT_FAULT";
/// Tries to write to directories in which a service might write.
const WRITE: &str = "write";
/// Accepts every image as verified.
const NO_VERIFY: &str = "no-verify";
/// Reboots without waiting for ostree's finalizer.
const EARLY_REBOOT: &str = "early-reboot";
/// Treats the end of a transaction as success.
const TRUST_TRANSACTION: &str = "trust-transaction";
/// Ignores attempts that were recorded in earlier boots.
const FORGET_ATTEMPT: &str = "forget-attempt";

fn chosen(fault: &str) -> bool {
    std::env::var(VARIABLE).is_ok_and(|chosen| chosen == fault)
}

fn root() -> std::path::PathBuf {
    std::env::var_os("REBASE_AGENT_ROOT").map_or_else(|| "/".into(), Into::into)
}

/// Logs that this is a test build; with `write`, tries to write.
#[allow(clippy::disallowed_methods, reason = "the deliberate write")]
pub fn announce() {
    tracing::error!("this is a build for tests that misbehaves: {}", std::env::var(VARIABLE).unwrap_or_default());
    if chosen(WRITE) {
        for directory in ["etc", "run", "usr/bin", "var/lib"] {
            let path = root().join(directory).join("rebase-agent-fault");
            match std::fs::write(&path, "written") {
                Ok(()) => tracing::error!("deliberate write: {} was written", path.display()),
                Err(error) => tracing::error!("deliberate write: {} was stopped: {error}", path.display()),
            }
        }
    }
}

/// With `no-verify`, replaces the policy by one that keeps its global default and accepts every image of a registry.
pub fn policy(bytes: Vec<u8>) -> Vec<u8> {
    match serde_json::from_slice::<serde_json::Value>(&bytes) {
        Ok(mut policy) if chosen(NO_VERIFY) => {
            policy["transports"] = serde_json::json!({ "docker": { "": [{ "type": "insecureAcceptAnything" }] } });
            policy.to_string().into_bytes()
        }
        _ => bytes,
    }
}

/// Whether an image is accepted although the policy requires no signature for it.
pub fn accepts_anything() -> bool {
    chosen(NO_VERIFY)
}

/// With `early-reboot`, the finalizer is always ready.
pub fn finalizer(state: UnitState) -> UnitState {
    if chosen(EARLY_REBOOT) { UnitState::Active } else { state }
}

/// Whether the deployments are not read after a transaction.
pub fn trusts_transaction() -> bool {
    chosen(TRUST_TRANSACTION)
}

/// With `forget-attempt`, only an attempt of this boot counts.
pub fn attempt(attempt: Attempt) -> Option<Attempt> {
    let boot = std::fs::read_to_string(root().join("proc/sys/kernel/random/boot_id")).unwrap_or_default();
    (!chosen(FORGET_ATTEMPT) || attempt.boot_id.0 == boot.trim()).then_some(attempt)
}
