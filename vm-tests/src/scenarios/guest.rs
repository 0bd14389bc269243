//! The guest itself.

use anyhow::{Context as _, Result, ensure};

use crate::lab::Lab;

/// A booted ostree deployment of the installed image, no failed unit, and Landlock in force. The unit's other directives
/// are compared in the containers of tests/booted, with two versions of systemd.
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
