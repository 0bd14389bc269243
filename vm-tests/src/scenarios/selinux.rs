//! The agent under SELinux.

use anyhow::{Result, ensure};

use crate::lab::Lab;
use crate::scenarios::update;

const DOMAIN: &str = "rebase_agent_t";

/// An update in enforcing mode: the agent runs in its domain before and after, and no access was denied.
pub async fn update(lab: &mut Lab) -> Result<()> {
    is_enforced(lab).await?;
    update::forward(lab).await?;
    is_enforced(lab).await
}

async fn is_enforced(lab: &mut Lab) -> Result<()> {
    let mode = lab.vm.run("cat /sys/fs/selinux/enforce").await?;
    ensure!(mode.trim() == "1", "SELinux does not enforce: {mode}");
    let context = lab.vm.run("cat /proc/$(systemctl show --value -p MainPID rebase-agent)/attr/current").await?;
    ensure!(context.contains(&format!(":{DOMAIN}:")), "the agent runs as {context}");
    // In all boots, from the kernel, from D-Bus and from systemd, including permissive domains.
    let (_, denied) = lab.vm.status("journalctl -o cat -g 'avc: +denied'").await?;
    let scontext = format!("scontext=system_u:system_r:{DOMAIN}");
    let denied: Vec<&str> = denied.lines().filter(|line| line.contains(&scontext)).collect();
    ensure!(denied.is_empty(), "denied to the agent: {denied:#?}");
    Ok(())
}
