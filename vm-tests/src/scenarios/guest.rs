//! The guest itself.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};

use crate::lab::Lab;

/// What the unit asks systemd for and `systemctl show` must say it got.
const SANDBOX: [(&str, &str); 23] = [
    ("ActiveState", "active"),
    ("Type", "notify"),
    ("CapabilityBoundingSet", ""),
    ("AmbientCapabilities", ""),
    ("NoNewPrivileges", "yes"),
    ("ProtectSystem", "strict"),
    ("ReadOnlyPaths", "/run /dev"),
    ("ProtectHome", "yes"),
    ("PrivateDevices", "yes"),
    ("ProtectClock", "yes"),
    ("ProtectControlGroups", "yes"),
    ("ProtectHostname", "yes"),
    ("ProtectKernelLogs", "yes"),
    ("ProtectKernelTunables", "yes"),
    ("ProtectProc", "invisible"),
    ("LockPersonality", "yes"),
    ("MemoryDenyWriteExecute", "yes"),
    ("RestrictNamespaces", "yes"),
    ("RestrictRealtime", "yes"),
    ("RestrictSUIDSGID", "yes"),
    ("UMask", "0077"),
    ("LimitCORE", "0"),
    ("StateDirectory", ""),
];

/// A booted ostree deployment of the installed image, nothing failed, and the agent confined as its unit says.
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

    let names: Vec<&str> = SANDBOX.iter().map(|(name, _)| *name).collect();
    let shown =
        vm.run(&format!("systemctl show rebase-agent.service -p MainPID,SystemCallFilter,{}", names.join(","))).await?;
    let shown: BTreeMap<&str, &str> = shown.lines().filter_map(|line| line.split_once('=')).collect();
    for (name, wanted) in SANDBOX {
        let is = shown.get(name).copied().unwrap_or_default();
        ensure!(is == wanted, "systemctl show says {name}={is} instead of {wanted}");
    }
    ensure!(
        shown.get("SystemCallFilter").is_some_and(|calls| calls.contains("read") && !calls.contains(" mount ")),
        "no filter"
    );

    // And what the kernel says of the process.
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
    let started = started.last().context("the agent does not say that it started")?.message();
    ensure!(started.contains("Landlock denies every write"), "{started}");

    // Nobody but root may ask the daemon for anything, and the node reports what it runs.
    let (code, output) = lab.vm.status("rebase-agent status").await?;
    ensure!(code == 0, "`rebase-agent status` of a node that is Done: status {code}, {output}");
    let installed = lab.installed.digest.clone();
    let booted = lab.booted_digest().await?;
    ensure!(lab.version() > 1 || booted == installed, "{booted} is booted instead of {installed}");
    Ok(())
}
