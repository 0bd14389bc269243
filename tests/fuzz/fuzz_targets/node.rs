//! The Node: for any annotations there is one decision, and its report is bounded and written once.
//!
//! The first byte describes the host and the agent's memory, one bit for each fact; the rest is the Node.
#![no_main]

use std::sync::LazyLock;

use fuzz::{bounded, shown};
use libfuzzer_sys::fuzz_target;
use rebase_agent::cluster::node::{Heard, NodeObject};
use rebase_agent::decide::{Limits, Memory, Outcome, decide};
use rebase_agent::model::annotations::{ATTEMPT, MCO};
use rebase_agent::model::{
    Action, Annotate, Attempt, Fault, HostFacts, MachineFacts, NodeFacts, Now, Observed, PinnedImage, Reading, Reason,
    Work, parse,
};
use rebase_agent::report::report;
use serde_json::json;
use tokio::time::Instant;

const A: &str = "registry.example.com/fleet/os@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const B: &str = "registry.example.com/fleet/os@sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";
const NOW: Now = Now { mono: 10_000_000, unix: 1_800_000_000_000 };

fn situation(bits: u8) -> (HostFacts, MachineFacts, Memory) {
    let bit = |n: u8| bits & (1 << n) != 0;
    let deployment = |image: &str, letter: &str| {
        let digest = image.split_once('@').map(|(_, digest)| digest);
        json!({"id": format!("rhcos-commit-{letter}.0"), "osname": "rhcos", "checksum": format!("commit-{letter}"),
            "version": "9.6", "reference": image, "digest": digest, "rendered_config": format!("rendered-worker-{letter}")})
    };
    let (mut a, mut b) = (deployment(A, "a"), deployment(B, "b"));
    a["booted"] = json!(!bit(0));
    b["booted"] = json!(bit(0));
    b["staged"] = json!(!bit(0) && bit(1));
    let order = if bit(0) || bit(1) { [b, a] } else { [a, b] };
    let transaction = bit(2).then(|| json!({"title": "upgrade", "client": "root"}));
    let host = json!({"deployments": order, "transaction": transaction});
    let machine = json!({
        "boot_id": if bit(0) { "boot-2" } else { "boot-1" }, "uptime": 3_600_000, "architecture": "amd64",
        "command_line": ["root=UUID=1"], "boot_free": 200_000_000, "boot_needed": 100_000_000,
        "finalizer": if bit(3) { "active" } else { "inactive" }, "kubelet": if bit(4) { "activating" } else { "active" },
        "bootloader_update": "absent", "finalize_failed": bit(5),
    });
    let facts = |image: &str| {
        let digest = image.split_once('@').map(|(_, digest)| digest);
        json!({"image": image, "instance": digest, "architecture": "amd64", "bootable": true, "size": 1_000_000_000,
            "rendered_config": "rendered-worker-b", "vouched_by": "default"})
    };
    let verified = if bit(6) { json!({A: facts(A), B: facts(B)}) } else { json!({}) };
    let mut memory: Memory = serde_json::from_value(json!({ "verified": verified })).unwrap();
    if bit(7) {
        let fault = Fault { reason: Reason::SignatureMissing, message: "no signature".to_owned() };
        let image: PinnedImage = parse(B).unwrap();
        for work in [
            Work::Verify { image: image.clone() },
            Work::Stage { image: image.clone() },
            Work::Reboot { image: image.clone() },
        ] {
            memory.finished(&work, Outcome::Failed(fault.clone()), Now { mono: 1, unix: 1 });
        }
    }
    (serde_json::from_value(host).unwrap(), serde_json::from_value(machine).unwrap(), memory)
}

static SITUATIONS: LazyLock<Vec<(HostFacts, MachineFacts, Memory)>> =
    LazyLock::new(|| (0..=u8::MAX).map(situation).collect());

/// The values that the rules read are printable, or cannot be mistaken for another value.
fn harmless(node: &NodeFacts) {
    let texts = [&node.desired_config, &node.current_config, &node.current_image, &node.state];
    if let Some(desired) = &node.desired_image {
        shown(desired.as_str(), 8203);
    }
    let more = [&node.reason, &node.desired_drain, &node.last_applied_drain, &node.topology, &node.hold];
    for text in texts.into_iter().chain(more).flatten() {
        shown(text, 8203);
    }
    if let Some(attempt) = &node.attempt {
        let text = serde_json::to_string(attempt).unwrap();
        assert_eq!(serde_json::from_str::<Attempt>(&text).unwrap(), *attempt);
    }
    if let Some(other) = &node.other_writer {
        shown(&other.manager, 100);
    }
}

fn told(node: &NodeFacts, host: &HostFacts, machine: &MachineFacts, memory: &Memory, limits: &Limits) {
    let observed = Observed {
        cluster: Reading::Known(node.clone()),
        host: Reading::Known(host.clone()),
        machine: Reading::Known(machine.clone()),
        pool_image: None,
        running: None,
    };
    let decision = decide(&observed, memory, limits, NOW);
    assert_eq!(decision, decide(&observed, memory, limits, NOW));
    assert_ne!(decision.wake, Some(0), "{decision:?}");
    if let Action::Begin(Work::Stage { image } | Work::Reboot { image }) = &decision.action {
        assert_eq!(node.desired(), Some(image));
    }
    if let Action::Begin(Work::Verify { image } | Work::Fetch { image }) = &decision.action {
        assert!(observed.concerns(image), "{image}");
    }
    let first_boot = matches!(decision.action, Action::Annotate(Annotate::FirstBoot { .. }));
    let patch = report(node, &decision);
    let mut after = node.clone();
    for (key, value) in &patch {
        if key == ATTEMPT {
            continue;
        }
        let value = value.as_deref().unwrap();
        shown(value, 8300);
        match key.strip_prefix(MCO).unwrap() {
            "state" => after.state = Some(value.to_owned()),
            "reason" => {
                shown(value, 2000);
                after.reason = Some(value.to_owned());
            }
            "desiredDrain" => after.desired_drain = Some(value.to_owned()),
            "currentConfig" => after.current_config = Some(value.to_owned()),
            "currentImage" => after.current_image = Some(value.to_owned()),
            "desiredConfig" | "desiredImage" => assert!(first_boot),
            other => panic!("{other} is not ours to write"),
        }
    }
    if !first_boot {
        let again = report(&after, &decision);
        assert!(again.keys().all(|key| key == ATTEMPT), "{again:?} is reported twice");
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((bits, json)) = data.split_first() else { return };
    let heard = Heard { asked: None, at: Instant::now(), wrote: 0 };
    let node = match bounded(json.len(), 256, || NodeObject::parse(json, heard)) {
        Ok(node) => node,
        Err(error) => return shown(&Fault::from(&error).message, 500),
    };
    assert!(!node.is_older_than(&node));
    harmless(&node.facts);
    let (host, machine, memory) = &SITUATIONS[usize::from(*bits)];
    for accept_config_ahead in [false, true] {
        told(&node.facts, host, machine, memory, &Limits { accept_config_ahead, ..Limits::default() });
    }
});
