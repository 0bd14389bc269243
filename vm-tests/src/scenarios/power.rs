//! Power cuts at the worst moments, and failing finalization.

use anyhow::{Context as _, Result, ensure};
use support::events::Event;
use support::image::Pushed;

use crate::lab::{ATTEMPT, Lab, UPDATE, WORK};
use crate::oci::Extra;
use crate::scenarios::update;
use crate::vm::SHUTDOWN;

/// The agent's message that an image is staged.
pub(super) const STAGED: &str = "5c0e7f9a2d4b4163885f3a6b9d1c7e20";
/// libostree's message that finalization starts.
const FINALIZING: &str = "e8646cd63dff4625b77909a8e7a40994";

/// The staged deployment is lost with the boot; it is staged again.
pub async fn after_staging(lab: &mut Lab) -> Result<()> {
    let old = lab.booted_digest().await?;
    let image = lab.signed().await?;
    let mark = lab.vm.journal.mark();
    lab.target(&image);
    lab.vm.journal.wait(mark, UPDATE, "an image is staged", |entry| entry.has_id(STAGED)).await?;
    lab.power_cut().await?;
    lab.power_on().await?;
    ensure!(lab.booted_digest().await? == old, "a deployment boots that was not finalized");
    arrive(lab).await
}

/// The attempt is recorded and the reboot was not requested yet: it counts, and another one is made.
pub async fn after_the_attempt(lab: &mut Lab) -> Result<()> {
    let image = lab.signed().await?;
    let version = lab.version();
    lose_the_attempt(lab, &image, version).await
}

/// The same on the way back to the previous image, whose older deployment is not a sign of a rollback.
pub async fn on_the_way_back(lab: &mut Lab) -> Result<()> {
    let (old, version) = update::two(lab).await?;
    let deployments = lab.deployments().await?;
    ensure!(deployments.matches(" default ").count() == 2, "the old image has no deployment: {deployments}");
    lose_the_attempt(lab, &old, version).await.context("back")
}

async fn lose_the_attempt(lab: &mut Lab, image: &Pushed, version: u32) -> Result<()> {
    let before = lab.booted_digest().await?;
    let mut events = lab.events.subscribe();
    lab.target_as(image, version);
    lab.wait_event(
        &mut events,
        UPDATE,
        "an attempt on record",
        |event| matches!(event, Event::NodeChanged { changes, .. } if matches!(changes.get(ATTEMPT), Some(Some(_)))),
    )
    .await?;
    lab.power_cut().await?;
    let mark = lab.api.requests().len();
    lab.power_on().await?;
    ensure!(lab.booted_digest().await? == before, "a deployment boots that was not finalized");
    arrive(lab).await?;
    let second = lab.api.requests().iter().skip(mark).any(|request| request.body.contains(r#"\"count\":2"#));
    ensure!(second, "the first attempt does not count");
    Ok(())
}

/// The node arrives in every state that the boot loader may find.
pub async fn during_finalization(lab: &mut Lab) -> Result<()> {
    let image = lab.signed().await?;
    let mark = lab.vm.journal.mark();
    lab.target(&image);
    lab.vm.journal.wait(mark, UPDATE, "finalization begins", |entry| entry.has_id(FINALIZING)).await?;
    lab.power_cut().await?;
    lab.power_on().await?;
    if lab.booted_digest().await? == image.digest {
        lab.say("the new image boots: its boot loader entry was written in time");
        lab.wait_done(&image).await?;
        return lab.arrived(&image).await;
    }
    lab.say("the old image boots: finalization did not come that far");
    arrive(lab).await
}

/// /boot cannot be written: the old image boots twice more, then the node reports why it stays there.
pub async fn finalization_fails(lab: &mut Lab) -> Result<()> {
    let old = lab.booted_digest().await?;
    let other = other_initramfs(lab).await?;
    lab.vm.run("chattr +i /boot").await.context("making /boot immutable")?;
    let image = lab.signed_with(other).await?;
    lab.target(&image);
    for attempt in 1..=2 {
        lab.reboot_of_its_own(UPDATE).await.with_context(|| format!("attempt {attempt}"))?;
        ensure!(lab.booted_digest().await? == old, "the new image boots after a failed finalization");
        let (_, failed) = lab.vm.status("systemctl is-failed ostree-boot-complete.service").await?;
        ensure!(failed.trim() == "failed", "ostree-boot-complete.service is {failed}, so nothing failed");
    }
    let reason = lab.wait_reason("Degraded", "", WORK).await?;
    lab.say(&format!("the Node says: {reason}"));
    ensure!(reason.contains("finaliz"), "the reason does not name the finalization: {reason}");
    let boot = lab.vm.boot_id().to_owned();

    // The way out: the cause is removed, and the pool gets another image.
    lab.vm.run("chattr -i /boot").await?;
    let image = lab.signed().await?;
    let version = lab.version();
    ensure!(lab.vm.boot_id() == boot, "a third attempt");
    lab.update(&image, version).await.context("after /boot can be written again")
}

/// A new kernel for libostree: if neither the kernel nor the number of deployments changes, finalization leaves /boot
/// alone and only changes a symbolic link in /ostree.
async fn other_initramfs(lab: &mut Lab) -> Result<Extra> {
    let release = lab.vm.run("uname -r").await?;
    let path = format!("usr/lib/modules/{}/initramfs.img", release.trim());
    let mut initramfs = lab.vm.read(&format!("/{path}")).await?;
    // The kernel skips this content.
    initramfs.extend_from_slice(&[0; 512]);
    Ok(Extra::default().file(&path, 0o644, initramfs))
}

/// The second and last attempt for the current target.
pub(super) async fn arrive(lab: &mut Lab) -> Result<()> {
    lab.reboot_of_its_own(UPDATE + SHUTDOWN).await?;
    let image = lab.last_target();
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}
