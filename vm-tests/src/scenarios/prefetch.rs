//! The image is there before the node's turn, and nothing boots it before its moment.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use support::image::Pushed;
use support::mcc::annotation;

use crate::lab::{HINT, HOLD, Lab, UPDATE, WORK};
use crate::scenarios::neighbours::{PULL, payload, received, wait_fetching};
use crate::scenarios::power::{STAGED, arrive};

/// rpm-ostreed's last words before it asks systemd for the reboot.
const UNLOCKED: &str = "Finalized deployment; rebooting into";
/// libostree's words for a deployment that it does not finalize.
const KEPT: &str = "Not finalizing; deployment is locked for finalization";

/// A command that succeeds if the image is in the repository.
fn has(image: &Pushed) -> String {
    let hex = image.digest.trim_start_matches("sha256:");
    format!("ostree refs --repo=/ostree/repo | grep -q '^ostree/container/image/.*{hex}'")
}

/// Nothing of the update is to be seen: a settled node.
async fn is_untouched(lab: &mut Lab, boot: &str, drains: usize) -> Result<()> {
    lab.wait("Done without a reason", WORK, |node| {
        annotation(node, "state") == Some("Done") && annotation(node, "reason").unwrap_or_default().is_empty()
    })
    .await?;
    ensure!(!lab.is_staged().await?, "something is staged");
    ensure!(lab.drains.drains() == drains, "a drain");
    ensure!(lab.vm.is_on() && lab.vm.boot_id() == boot, "a reboot");
    Ok(())
}

/// The image is pulled before the node's turn; at its turn the registry is away.
pub async fn before_the_turn(lab: &mut Lab) -> Result<()> {
    let (boot, drains) = (lab.vm.boot_id().to_owned(), lab.drains.drains());
    let image = lab.signed().await?;
    lab.annotate(HINT, Some(&image.pullspec()))?;
    lab.wait_guest("the image is in the repository", UPDATE, &has(&image)).await?;
    is_untouched(lab, &boot, drains).await.context("after the pull")?;
    lab.registry.stop();
    let (mark, began) = (lab.vm.journal.mark(), Instant::now());
    lab.target(&image);
    lab.vm.journal.wait(mark, WORK, "the image is staged", |entry| entry.has_id(STAGED)).await?;
    lab.say(&format!("staged {:.1} s after its turn began, without a registry", began.elapsed().as_secs_f64()));
    lab.vm.wait_off(UPDATE).await.context("no reboot")?;
    lab.registry.restart().await?;
    lab.store().set_ready(crate::lab::NODE, false);
    lab.power_on().await?;
    lab.wait_done(&image).await?;
    lab.annotate(HINT, None)?;
    lab.arrived(&image).await
}

/// The hint is withdrawn while its image is pulled: the pull ends, and nothing is left of it.
pub async fn withdrawn(lab: &mut Lab) -> Result<()> {
    let (boot, drains) = (lab.vm.boot_id().to_owned(), lab.drains.drains());
    let image = lab.signed_with(payload(lab.version())).await?;
    let before = received(lab).await?;
    lab.annotate(HINT, Some(&image.pullspec()))?;
    wait_fetching(lab, before).await?;
    lab.annotate(HINT, None)?;
    let idle = lab.backend.pulls_nothing();
    lab.wait_guest("the pull ends", WORK, idle).await?;
    ensure!(lab.vm.status(&has(&image)).await?.0 != 0, "the whole image was pulled");
    is_untouched(lab, &boot, drains).await?;
    // The same image may be wanted again.
    let version = lab.version();
    lab.target_as(&image, version);
    lab.reboot_of_its_own(UPDATE + PULL).await?;
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}

/// A held node that goes down for another cause boots the old image, also in an orderly reboot.
pub async fn held(lab: &mut Lab) -> Result<()> {
    let (old, drains) = (lab.booted_digest().await?, lab.drains.drains());
    let image = lab.signed().await?;
    lab.annotate(HOLD, Some("held by the test"))?;
    lab.target(&image);
    for by_hand in [true, false] {
        lab.wait_held().await?;
        if by_hand {
            lab.vm.run("systemctl --no-block reboot").await?;
            lab.reboot_of_its_own(WORK).await?;
        } else {
            lab.power_cut().await?;
            lab.power_on().await?;
        }
        ensure!(lab.booted_digest().await? == old, "a held node boots the new image");
    }
    lab.wait_held().await?;
    ensure!(lab.drains.drains() == drains, "a held node was drained");
    lab.annotate(HOLD, None)?;
    lab.reboot_of_its_own(UPDATE).await?;
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}

/// The image is staged and waits for the drain: an orderly reboot by hand boots the old one.
pub async fn locked(lab: &mut Lab) -> Result<()> {
    let old = lab.booted_digest().await?;
    let image = lab.signed().await?;
    lab.drains.block_drains(true);
    let mark = lab.vm.journal.mark();
    lab.target(&image);
    lab.vm.journal.wait(mark, UPDATE, "the image is staged", |entry| entry.has_id(STAGED)).await?;
    lab.vm.run("systemctl --no-block reboot").await?;
    lab.reboot_of_its_own(WORK).await?;
    ensure!(lab.booted_digest().await? == old, "an undrained node boots the new image");
    ensure!(!lab.vm.journal.since(mark, |entry| entry.message().starts_with(KEPT)).is_empty(), "it was not locked");
    lab.drains.block_drains(false);
    arrive(lab).await
}

/// A power cut after the unlocking: whichever image boots, the node arrives.
pub async fn cut_after_unlocking(lab: &mut Lab) -> Result<()> {
    let image = lab.signed().await?;
    let mark = lab.vm.journal.mark();
    lab.target(&image);
    lab.vm.journal.wait(mark, UPDATE, "the unlocking", |entry| entry.message().starts_with(UNLOCKED)).await?;
    lab.power_cut().await?;
    lab.power_on().await?;
    if lab.booted_digest().await? == image.digest {
        lab.wait_done(&image).await?;
        return lab.arrived(&image).await;
    }
    arrive(lab).await
}
