//! The guest itself.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};

use crate::lab::Lab;

/// The shipped unit.
const UNIT: &str = include_str!("../../../systemd/rebase-agent.service");
/// Directives that are no sandbox, or that systemd shows in another form and that are checked separately.
const NOT_COMPARED: [&str; 8] = [
    "EnvironmentFile",
    "ExecStart",
    "RestartSec",
    "RestartPreventExitStatus",
    "RestrictAddressFamilies",
    "SystemCallErrorNumber",
    "SystemCallFilter",
    "WatchdogSec",
];

/// A booted ostree deployment of the installed image, no failed unit, and the agent confined as its unit says.
pub async fn is_what_it_claims(lab: &mut Lab) -> Result<()> {
    let vm = &mut lab.vm;
    vm.run("test -e /run/ostree-booted").await.context("not booted from a deployment")?;
    for path in ["/usr/x", "/sysroot/x"] {
        let (status, output) = vm.status(&format!("touch {path}")).await?;
        ensure!(status != 0 && output.contains("Read-only file system"), "touch {path}: status {status}, {output}");
    }
    let (_, state) = vm.status("systemctl is-system-running --wait").await?;
    if state.trim() != "running" {
        let failed = vm.run("systemctl --failed --no-legend --plain; journalctl -b -p err --no-pager").await?;
        anyhow::bail!("the system is {}: {failed}", state.trim());
    }
    let skopeo = vm.run("skopeo --version").await?;
    ensure!(skopeo.starts_with("skopeo version 1."), "{skopeo}");

    // systemd shows the values that the unit demands.
    let service = UNIT.split("[Service]").nth(1).and_then(|rest| rest.split("\n[").next()).context("no [Service]")?;
    let wanted: BTreeMap<&str, &str> = service
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .filter(|(key, _)| !NOT_COMPARED.contains(key))
        .collect();
    ensure!(wanted.get("ProtectSystem") == Some(&"strict"), "the unit lacks the expected directives: {wanted:?}");
    let shown = vm.run("systemctl show --all rebase-agent.service").await?;
    let shown: BTreeMap<&str, &str> = shown.lines().filter_map(|line| line.split_once('=')).collect();
    for (key, value) in wanted {
        let is = shown.get(key).copied().with_context(|| format!("systemctl show does not know {key}"))?;
        ensure!(is == value, "systemctl show says {key}={is} instead of {value}");
    }
    let calls: Vec<&str> = shown.get("SystemCallFilter").context("no SystemCallFilter")?.split(' ').collect();
    ensure!(calls.contains(&"read") && !calls.contains(&"mount"), "SystemCallFilter={calls:?}");
    ensure!(shown.get("ActiveState") == Some(&"active"), "the agent is {:?}", shown.get("ActiveState"));

    // The kernel shows the same for the process.
    let pid = shown.get("MainPID").context("no MainPID")?;
    let status = vm.run(&format!("cat /proc/{pid}/status")).await?;
    let status: BTreeMap<&str, &str> =
        status.lines().filter_map(|line| line.split_once(':')).map(|(key, value)| (key, value.trim())).collect();
    for (key, wanted) in [
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Uid", "0\t0\t0\t0"),
    ] {
        let is = status.get(key).copied().unwrap_or_default();
        ensure!(is == wanted, "/proc/{pid}/status says {key} {is} instead of {wanted}");
    }
    let started = lab.vm.journal.since(0, |entry| entry.is_agents() && entry.message().contains("Landlock"));
    let started = started.last().context("the agent did not log its start")?.message();
    ensure!(started.contains("Landlock denies every write"), "{started}");

    // The node reports the booted image.
    let (code, output) = lab.vm.status("rebase-agent status").await?;
    ensure!(code == 0, "`rebase-agent status` of a node that is Done: status {code}, {output}");
    ensure!(
        output.contains(lab.backend.chosen()),
        "`rebase-agent status` does not say which backend and why: {output}"
    );
    let installed = lab.installed.digest.clone();
    let booted = lab.booted_digest().await?;
    ensure!(lab.version() > 1 || booted == installed, "{booted} is booted instead of {installed}");
    Ok(())
}
