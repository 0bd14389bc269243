//! Successful updates.

use anyhow::{Context as _, Result, ensure};
use support::image::Pushed;

use crate::lab::Lab;
use crate::oci::Extra;

/// From the booted image to a new one.
pub async fn forward(lab: &mut Lab) -> Result<()> {
    let image = lab.signed().await?;
    let version = lab.version();
    let mark = lab.vm.journal.mark();
    lab.update(&image, version).await?;
    let shown = lab.vm.run("cat /usr/share/vm-tests/version").await?;
    ensure!(shown.starts_with(&format!("{version} ")), "the image's content is not booted: {shown}");
    let finalized = lab.vm.journal.since(mark, |entry| entry.has_id("dd440e3e549083b63d0efc7dc15255f1"));
    ensure!(finalized.len() == 1, "libostree finalized {} deployments instead of one", finalized.len());
    let (code, output) = lab.vm.status("rebase-agent status").await?;
    ensure!(code == 0, "`rebase-agent status` of a node that is Done: status {code}, {output}");
    Ok(())
}

/// To a new image, and back to the previous one.
pub async fn back(lab: &mut Lab) -> Result<()> {
    let (old, version) = two(lab).await?;
    lab.update(&old, version).await.context("back")
}

/// Two updates: returns the image to go back to, and its version.
pub async fn two(lab: &mut Lab) -> Result<(Pushed, u32)> {
    let old = lab.signed().await?;
    let old_version = lab.version();
    lab.update(&old, old_version).await.context("there")?;
    let new = lab.signed().await?;
    let new_version = lab.version();
    lab.update(&new, new_version).await.context("further")?;
    Ok((old, old_version))
}

/// The image contains another build of the agent: the old one starts the update, the new one finishes it.
pub async fn of_the_agent(lab: &mut Lab) -> Result<()> {
    const RUNNING: &str = "sha256sum </proc/$(systemctl show --value -p MainPID rebase-agent)/exe";
    const AGENT: &str = "/usr/bin/rebase-agent";
    let old = lab.vm.run(RUNNING).await?;
    // Additional bytes at the end change the program's digest only.
    let mut program = lab.vm.read(AGENT).await?;
    program.extend_from_slice(format!("another build, in image {}", lab.version()).as_bytes());
    let wanted = support::image::digest(&program);
    let image = lab.signed_with(Extra::default().file(AGENT, 0o755, program)).await?;
    let version = lab.version();
    lab.update(&image, version).await?;
    let new = lab.vm.run(RUNNING).await?;
    ensure!(new != old, "the old program is still running");
    ensure!(wanted.ends_with(new.split(' ').next().unwrap_or_default()), "{new} runs instead of {wanted}");
    Ok(())
}
