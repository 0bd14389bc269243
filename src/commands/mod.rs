//! The commands: each reads its facts, makes one value from them, and prints it as text or as JSON.
//!
//! The JSON is a contract: its `version` changes when a field is renamed or removed, not when one is added.

mod explain;
mod metrics;
mod run;
mod status;
mod verify;

use std::fmt::Write as _;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;

use crate::cli::{Command, Look, exit};
use crate::confine::Confinement;
use crate::decide::{Decision, Memory, Outcome};
use crate::host::HostError;
use crate::model::{Action, Fault, NodeState, Now, Observed, Reading, Reason, Work};
use crate::observe::{Neighbours, everything};
use crate::trust;
use status::Trust;

/// The version of all JSON output.
const VERSION: u32 = 1;
/// Width of the output, in characters.
const WIDTH: usize = 80;
/// Column of the values.
const INDENT: usize = 10;

/// Runs `command`.
pub async fn dispatch(command: Command, neighbours: Neighbours, confinement: Confinement) -> ExitCode {
    let code = match command {
        Command::Run(tuning) => run::run(neighbours, confinement, &tuning).await,
        Command::Status(look) => status::status(&neighbours, &look).await,
        Command::Explain { reason: Some(reason), look } => explain::reason(reason, look.json),
        Command::Explain { reason: None, look } => explain::explain(&neighbours, &look).await,
        Command::Metrics => metrics::metrics(&neighbours).await,
        Command::Verify { pullspec, json } => verify::verify(&neighbours, &pullspec, json).await,
    };
    ExitCode::from(code)
}

/// The current observations, and the memory of a new process: empty, or the result of `--verify`.
struct Seen {
    observed: Observed,
    memory: Memory,
    trust: Option<Trust>,
}

async fn see(neighbours: &Neighbours, look: &Look) -> Seen {
    let observed = everything(neighbours).await;
    let desired = observed.cluster.known().and_then(|node| node.desired().cloned());
    let mut memory = Memory::default();
    let trust = match desired {
        Some(image) if look.verify => {
            let (outcome, trust) = match trust::verify(&neighbours.engine, &image).await {
                Ok(verified) => {
                    let facts = verified.facts().clone();
                    (Outcome::Succeeded(Some(facts.clone())), Trust::Verified(Box::new(facts)))
                }
                Err(error) => {
                    let fault = Fault::from(&error);
                    (Outcome::Failed(fault.clone()), Trust::Refused(fault.message))
                }
            };
            memory.finished(&Work::Verify { image }, outcome, now(neighbours));
            Some(trust)
        }
        desired => status::required(&neighbours.engine.settings().policy, desired.as_ref()),
    };
    Seen { observed, memory, trust }
}

/// The time for a decision. A command measures no waits, so its monotonic clock is zero.
fn now(neighbours: &Neighbours) -> Now {
    let unix = neighbours.api.time().unwrap_or_else(|| {
        let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(unix.as_millis()).unwrap_or(u64::MAX)
    });
    Now { mono: 0, unix }
}

/// A decision in the JSON output.
#[derive(Debug, Serialize)]
struct Decided {
    /// The rule's name and number.
    rule: &'static str,
    number: u8,
    action: Action,
    reason: Reason,
    message: String,
    /// The state to report; `null` keeps the current one.
    state: Option<NodeState>,
    /// Seconds until the service decides again at the latest; `null` waits for a change.
    next_look: Option<u64>,
}

impl From<&Decision> for Decided {
    fn from(decision: &Decision) -> Self {
        Self {
            rule: decision.rule.name(),
            number: decision.rule.number(),
            action: decision.action.clone(),
            reason: decision.reason,
            message: decision.message.clone(),
            state: decision.state,
            next_look: decision.wake.map(|wake| wake.div_ceil(1000)),
        }
    }
}

/// On a host that is not image-mode, prints one line that says so and returns the exit code.
fn foreign(neighbours: &Neighbours, json: bool) -> Option<u8> {
    let error = neighbours.host.check_kind().err()?;
    let code = if matches!(error, HostError::NotImageMode) { exit::NOT_IMAGE_MODE } else { exit::REFUSED };
    Some(answer(json, error.reason().as_str(), &error.to_string(), code))
}

fn answer(json: bool, reason: &str, message: &str, code: u8) -> u8 {
    print(json, &json!({ "reason": reason, "message": message }), || format!("{reason}: {message}\n"));
    code
}

/// A value with the version of its fields.
#[derive(Serialize)]
struct Versioned<'a, T> {
    version: u32,
    #[serde(flatten)]
    value: &'a T,
}

impl<'a, T> Versioned<'a, T> {
    fn new(value: &'a T) -> Self {
        Self { version: VERSION, value }
    }
}

fn print(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) {
    use std::io::Write as _;
    let out = if json {
        serde_json::to_string_pretty(&Versioned::new(value)).unwrap_or_else(|error| error.to_string()) + "\n"
    } else {
        text()
    };
    // A closed pipe is not an error of the command.
    let _ = std::io::stdout().write_all(out.as_bytes());
}

/// The exit code of a decision.
fn exit_code(observed: &Observed, decision: &Decision) -> u8 {
    let is = |reason| matches!(&observed.host, Reading::Unknown(fault) if fault.reason == reason);
    match decision.state {
        _ if is(Reason::HostNotImageMode) => exit::NOT_IMAGE_MODE,
        _ if is(Reason::HostUnsupported) => exit::REFUSED,
        Some(NodeState::Degraded | NodeState::Unreconcilable) => exit::REFUSED,
        Some(NodeState::Working | NodeState::Done) => exit::NOT_YET,
        None if observed.cluster.known().is_none() || observed.host.known().is_none() => exit::UNREADABLE,
        None if decision.reason == Reason::RunsUntrusted => exit::REFUSED,
        None if decision.reason.is_at_rest() || decision.reason == Reason::NotLayered => 0,
        None => exit::NOT_YET,
    }
}

/// The rule that a new process applies to the current observations. The running service's rule is in its status text.
fn rule(decision: &Decided) -> String {
    format!("{} ({}): {}: {}", decision.rule, decision.number, decision.reason, decision.message)
}

/// Writes `label`, then `value` wrapped and indented.
fn line(out: &mut String, label: &str, value: &str) {
    let mut column = INDENT;
    let _ = write!(out, "{label:INDENT$}");
    for (index, word) in value.split(' ').enumerate() {
        let length = word.chars().count();
        if index > 0 && column.saturating_add(length).saturating_add(1) > WIDTH {
            let _ = write!(out, "\n{:INDENT$}", "");
            column = INDENT;
        } else if index > 0 {
            out.push(' ');
            column = column.saturating_add(1);
        }
        out.push_str(word);
        column = column.saturating_add(length);
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::decide::Limits;

    /// The paths of all fields, with `[]` for the elements of a list.
    fn fields(at: &str, value: &serde_json::Value, found: &mut BTreeSet<String>) {
        match value {
            serde_json::Value::Object(object) => {
                let dot = if at.is_empty() { "" } else { "." };
                object.iter().for_each(|(key, value)| fields(&format!("{at}{dot}{key}"), value, found));
            }
            serde_json::Value::Array(list) => list.iter().for_each(|value| fields(&format!("{at}[]"), value, found)),
            _ => {
                found.insert(at.to_owned());
            }
        }
    }

    fn observed() -> Observed {
        let attempt = json!({"image": IMAGE, "bootID": "b", "count": 1, "deployment": "d", "rolledBack": true});
        let verified = json!({"image": IMAGE, "rule": "r", "key": "k", "time": "t"});
        let update = json!({"image": IMAGE, "took": {"verify": 1}, "outOfService": 1});
        serde_json::from_value(json!({
            "cluster": {"known": {"name": "n", "attempt": attempt, "last_update": update, "verified": verified,
                                  "other_writer": {"manager": "m", "unix": 1}}},
            "host": {"known": {
                "deployments": [{"id": "d", "config_fault": "f"}],
                "transaction": {"title": "t", "client": "c", "ours": null},
            }},
            "machine": {"known": {
                "boot_id": "b", "uptime": 1, "architecture": "amd64", "command_line": ["rw"], "boot_free": 1,
                "boot_needed": 1, "finalizer": "active", "kubelet": "active", "bootloader_update": "absent",
                "finalize_failed": false, "inhibitors": [{"who": "w", "why": "y"}],
            }},
        }))
        .unwrap()
    }

    const IMAGE: &str = "q.io/o/i@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    /// Observations with every field, and the decision on them.
    pub(super) fn decided() -> (Observed, Decision) {
        let decision = crate::decide::decide(&observed(), &Memory::default(), &Limits::default(), Now::default());
        (observed(), decision)
    }

    /// Compares the fields of `output` with the list at `path`. A field that is missing in the output was renamed or
    /// removed: that needs another [`VERSION`].
    pub(super) fn check_fields(path: &str, output: &impl Serialize) {
        let mut found = BTreeSet::new();
        fields("", &serde_json::to_value(Versioned::new(output)).unwrap(), &mut found);
        let text = found.iter().fold(String::new(), |text, field| text + field + "\n");
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&file, &text).unwrap();
        }
        assert_eq!(text, std::fs::read_to_string(&file).unwrap(), "{path}");
    }

    #[test]
    fn text_stays_in_its_columns() {
        let mut out = String::new();
        line(&mut out, "Label", &"word ".repeat(60));
        line(&mut out, "", &"x".repeat(200));
        let lines: Vec<_> = out.lines().collect();
        assert!(lines[0].starts_with("Label     word word"));
        assert!(lines[..lines.len() - 1].iter().all(|line| line.chars().count() <= WIDTH));
        assert!(lines[1].starts_with("          word"));
    }
}
