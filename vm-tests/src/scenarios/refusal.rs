//! Images that must not run, and keys that change.

use anyhow::{Context as _, Result, bail, ensure};
use support::image::Pushed;
use support::sign::{KeyKind, Signer};

use crate::journal::Entry;
use crate::lab::{Lab, WORK};
use crate::oci::Extra;
use crate::trust::KEY_IN_GUEST;

/// Refused by the agent and by the pull itself; nothing staged, nobody drained, no reboot.
pub async fn unsigned(lab: &mut Lab) -> Result<()> {
    let before = Untouched::of(lab).await?;
    let image = lab.unsigned().await?;
    let mark = lab.vm.journal.mark();
    lab.target(&image);
    let is_asked = |entry: &Entry| entry.message().contains(&image.digest) && !entry.is_agents();
    tokio::select! {
        reason = lab.wait_reason("Degraded", "SignatureMissing", WORK) => drop(reason?),
        Ok(asked) = lab.vm.journal.wait(mark, WORK, "", is_asked) => {
            bail!("the daemon was asked for an unverified image: {}", asked.message());
        }
    }
    // The backend, asked without the agent, finds the same policy in its way.
    let (code, said) = pull(lab, &image).await?;
    ensure!(code != 0 && said.contains("A signature was required"), "the pull: status {code}, {said}");
    before.holds(lab).await?;
    lab.return_to_settled().await
}

/// A key that the policy does not name is as good as none.
pub async fn strange_key(lab: &mut Lab) -> Result<()> {
    let before = Untouched::of(lab).await?;
    let image = lab.unsigned().await?;
    lab.sign(&image, &Signer::generate(KeyKind::P256)).await?;
    lab.target(&image);
    lab.wait_reason("Degraded", "SignatureRejected", WORK).await?;
    before.holds(lab).await?;
    lab.return_to_settled().await
}

/// An image brings the next key: it is signed with the old one, and what comes after it needs the new one.
pub async fn key_rotation(lab: &mut Lab) -> Result<()> {
    let old = lab.trust.signer.clone();
    let new = Signer::generate(KeyKind::P256);
    let bringing = lab.signed_with(Extra::default().file(KEY_IN_GUEST, 0o644, new.public_key_pem())).await?;
    let version = lab.version();
    lab.update(&bringing, version).await.context("the image with the new key")?;

    let before = Untouched::of(lab).await?;
    let stale = lab.unsigned().await?;
    lab.sign(&stale, &old).await?;
    lab.target(&stale);
    lab.wait_reason("Degraded", "SignatureRejected", WORK).await.context("an image with the old key's signature")?;
    before.holds(lab).await?;

    lab.trust.signer = new;
    // Every image from now on has the new key, or the next update would bring back the old one.
    lab.key_from_image = Some(lab.trust.signer.public_key_pem());
    let image = lab.signed().await?;
    let version = lab.version();
    lab.update(&image, version).await.context("an image with the new key's signature")
}

/// By anybody with root: its status and what was said.
async fn pull(lab: &mut Lab, image: &Pushed) -> Result<(i32, String)> {
    lab.vm.status(&lab.backend.pull(&image.pullspec())).await
}

/// What a refusal must leave as it was.
struct Untouched {
    boot: String,
    drains: usize,
    deployments: String,
}

impl Untouched {
    async fn of(lab: &mut Lab) -> Result<Self> {
        Ok(Self {
            boot: lab.vm.boot_id().to_owned(),
            drains: lab.drains.drains(),
            deployments: lab.deployments().await?,
        })
    }

    async fn holds(&self, lab: &mut Lab) -> Result<()> {
        let now = Self::of(lab).await?;
        ensure!(now.boot == self.boot, "a reboot");
        ensure!(now.drains == self.drains, "a drain");
        ensure!(!lab.is_staged().await?, "something is staged");
        ensure!(now.deployments == self.deployments, "{} became {}", self.deployments, now.deployments);
        Ok(())
    }
}
