//! Proves that the agent's processes opened no file for writing during one whole update.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::lab::{Lab, WORK};

const UNIT: &str = "rebase-agent.service";
/// A unit that does write, to check that the watch sees it.
const CONTROL: &str = "vmtest-writer.service";
const CONTROL_WRITE: &str = "systemd-run --quiet --wait --collect --unit=vmtest-writer.service \
    sh -c 'echo x >/var/tmp/x; mkdir /run/x; rmdir /run/x; rm /var/tmp/x'";
/// systemd's own program in the unit's control group, before the unit's program.
const EXECUTOR: &str = "/usr/lib/systemd/systemd-executor";
/// /dev/null, which Landlock allows.
const ALLOWED: &str = "null";

/// From the agent's start in the old image to Done in the new one.
pub async fn none(lab: &mut Lab) -> Result<()> {
    lab.vm.run("touch /etc/vm-tests-watch-writes && systemctl start watch-writes.service").await?;
    lab.vm.run(CONTROL_WRITE).await?;
    let control = written(&listing(lab).await?, CONTROL);
    lab.say(&format!("the watch sees the writes of another unit: {control:?}"));
    for (path, did) in [("x", "had it open for writing"), ("x", "created"), ("x", "deleted")] {
        let seen = control.keys().any(|(_, seen, how)| seen == path && how.contains(did));
        ensure!(seen, "the watch does not see that {path} was {did}: {control:?}");
    }

    lab.vm.run("systemctl restart rebase-agent.service").await?;
    let image = lab.signed().await?;
    let version = lab.version();
    let old = lab.vm.boot_id().to_owned();
    lab.update(&image, version).await?;
    // The control writes again at the end.
    lab.vm.run(CONTROL_WRITE).await?;
    let second = listing(lab).await?;
    ensure!(!written(&second, CONTROL).is_empty(), "the watch did not see the update to its end");
    let first = lines(
        &lab.vm.run(&format!("journalctl -o cat -u watch-writes.service _BOOT_ID={}", old.replace('-', ""))).await?,
    );

    let gone = "journalctl -q -u watch-writes.service -g 'Failed with result|events were lost'";
    ensure!(lab.vm.status(gone).await?.0 != 0, "the watch did not live to the end of a boot");
    let lost = first.iter().chain(&second).filter(|line| line.get("lost").is_some()).count();
    lab.say(&format!("files that the kernel would not open for the watch: {lost}"));

    // The root, /etc and /var are one file system with /sysroot; the agent has its own /dev.
    for listing in [&first, &second] {
        let watched =
            |point: &str| listing.iter().filter(|line| line["filesystem"] == point && line["is"] == "watched").count();
        ensure!(
            watched("/sysroot") == 1 && watched("/run") == 1 && watched("/dev") == 2,
            "not all is watched: {listing:?}"
        );
        let not: Vec<_> =
            listing.iter().filter(|line| line["is"].as_str().is_some_and(|is| is.starts_with("not"))).collect();
        ensure!(not.is_empty(), "not watched: {not:?}");
    }
    let mut writes = written(&first, UNIT);
    writes.extend(written(&second, UNIT));
    let programs: Vec<&str> = writes.keys().map(|(program, _, _)| program.as_str()).collect();
    lab.say(&format!("seen in {UNIT} before it is the agent: {}", programs.iter().filter(|p| **p == EXECUTOR).count()));
    let agents: Vec<_> =
        writes.iter().filter(|((program, path, _), _)| program != EXECUTOR && path != ALLOWED).collect();
    for ((program, path, did), times) in writes.iter().filter(|((program, _, _), _)| program != EXECUTOR) {
        lab.say(&format!("{program} {did} {path} ({times} times)"));
    }
    lab.say(&format!("files written by the agent in one whole update: {}", agents.len()));
    ensure!(agents.is_empty(), "the agent wrote: {agents:#?}");
    lab.vm.run("rm /etc/vm-tests-watch-writes; systemctl stop watch-writes.service").await?;
    lab.wait_guest("the agent runs", WORK, "systemctl is-active rebase-agent.service").await
}

async fn listing(lab: &mut Lab) -> Result<Vec<Value>> {
    Ok(lines(
        &lab.vm.run("journalctl --sync; journalctl -b -o cat -u watch-writes.service").await.context("the watch")?,
    ))
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The writes of a unit's processes: program, path and operation, with their number.
fn written(lines: &[Value], unit: &str) -> BTreeMap<(String, String, String), usize> {
    let mut writes = BTreeMap::new();
    for line in lines.iter().filter(|line| line["unit"] == unit) {
        let text = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
        let did: Vec<&str> = line["did"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        *writes.entry((text("program"), text("path"), did.join(", "))).or_default() += 1;
    }
    writes
}
