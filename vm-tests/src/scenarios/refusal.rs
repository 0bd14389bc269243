//! Images that must not run, and changed keys.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use support::image::Pushed;
use support::mcc::annotation;
use support::policy::{Policy, Requirement};
use support::sign::{KeyKind, Signer};

use crate::journal::Entry;
use crate::lab::{ATTEMPT, Lab, UPDATE, WORK};
use crate::oci::Extra;
use crate::scenarios::neighbours::HOUSEKEEPING;
use crate::trust::KEY_IN_GUEST;
use crate::vm::{BOOT, SHUTDOWN};

/// An unsigned image is refused by the agent and by the pull itself: no stage, no drain, no reboot.
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
    // The backend's own pull, without the agent, is refused by the same policy.
    let (code, said) = pull(lab, &image).await?;
    ensure!(code != 0 && said.contains("A signature was required"), "the pull: status {code}, {said}");
    before.holds(lab).await?;
    lab.return_to_settled().await
}

/// A signature of a key that the policy does not name does not count.
pub async fn strange_key(lab: &mut Lab) -> Result<()> {
    let before = Untouched::of(lab).await?;
    let image = lab.unsigned().await?;
    lab.sign(&image, &Signer::generate(KeyKind::P256)).await?;
    lab.target(&image);
    lab.wait_reason("Degraded", "SignatureRejected", WORK).await?;
    before.holds(lab).await?;
    lab.return_to_settled().await
}

/// An image contains the next key: it is signed with the old one, and later images need the new one.
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
    // Every later image has the new key; otherwise the next update would restore the old one.
    lab.key_from_image = Some(lab.trust.signer.public_key_pem());
    let image = lab.signed().await?;
    let version = lab.version();
    lab.update(&image, version).await.context("an image with the new key's signature")
}

/// The policy rejects an image that is staged already: it is dropped, so that no later reboot boots it. Where it cannot
/// be dropped, the journal warns and the Node shows it, before the reboot and after it.
pub async fn staged_then_refused(lab: &mut Lab) -> Result<()> {
    let old = lab.booted_digest().await?;
    let image = staged_and_undrained(lab).await?;
    let mark = lab.vm.journal.mark();
    reject(lab, "").await?;
    // The agent notices only by its own check of the files.
    lab.wait_reason("Degraded", "PolicyRejects", HOUSEKEEPING + WORK).await?;
    refusal_reached_the_disk(lab, mark).await?;

    // A reboot by an operator or a power button.
    let mark = lab.vm.journal.mark();
    // The reply may be lost with the guest.
    let _ = lab.vm.status("systemctl --no-block reboot").await;
    lab.reboot_of_its_own(SHUTDOWN).await?;
    if lab.backend.drops_staged() {
        ensure!(lab.booted_digest().await? == old, "the refused image boots");
        lab.wait_reason("Degraded", "PolicyRejects", BOOT + WORK).await?;
        ensure!(!lab.is_staged().await?, "the refused image is staged again");
        return allow_and_arrive(lab, &image).await;
    }
    ensure!(lab.booted_digest().await? == image.digest, "bootc's staged image does not boot");
    warned(lab, mark, "runs", "/untrusted", "PolicyRejects").await?;
    accept(lab).await?;
    lab.drains.block_drains(false);
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}

/// The policy is replaced while the node is drained, with the modification time of the old one. The old policy verifies
/// nothing after the drain.
pub async fn policy_replaced_while_draining(lab: &mut Lab) -> Result<()> {
    let image = staged_and_undrained(lab).await?;
    let (boot, mark) = (lab.vm.boot_id().to_owned(), lab.vm.journal.mark());
    reject(lab, "touch --reference=policy.json policy.json.new").await?;
    lab.drains.block_drains(false);
    let is_decided = |node: &Value| {
        annotation(node, "state") == Some("Degraded") || !node["metadata"]["annotations"][ATTEMPT].is_null()
    };
    let node = lab.wait("an attempt or a refusal", UPDATE, is_decided).await?;
    ensure!(node["metadata"]["annotations"][ATTEMPT].is_null(), "an attempt for an image that is rejected now");
    lab.wait_reason("Degraded", "PolicyRejects", WORK).await?;
    refusal_reached_the_disk(lab, mark).await?;
    ensure!(lab.vm.boot_id() == boot && lab.vm.is_on(), "a reboot");
    allow_and_arrive(lab, &image).await
}

/// A new target that is staged and waits for its drain.
async fn staged_and_undrained(lab: &mut Lab) -> Result<Pushed> {
    lab.drains.block_drains(true);
    let image = lab.signed().await?;
    lab.target(&image);
    lab.wait_reason("Working", "DrainPending", UPDATE).await?;
    ensure!(lab.is_staged().await?, "a drain without a staged image");
    Ok(image)
}

/// A refused image is dropped, or reported where it cannot be dropped.
async fn refusal_reached_the_disk(lab: &mut Lab, mark: usize) -> Result<()> {
    if lab.backend.drops_staged() {
        const GONE: &str = "test ! -e /run/ostree/staged-deployment";
        lab.wait_guest("the refused image is dropped", WORK, GONE).await?;
        // libostree's note goes first; a shutdown that meets the rest of the work may find /boot frozen for good.
        let has_ended = |entry: &Entry| {
            let said = entry.message();
            said.starts_with("Txn Cleanup ") && said.ends_with(" successful")
        };
        return lab.vm.journal.wait(mark, WORK, "the end of the cleanup", has_ended).await.map(drop);
    }
    ensure!(lab.is_staged().await?, "bootc cannot drop a stage, but it is gone");
    warned(lab, mark, "staged", "/reason", "staged").await
}

/// The agent's warning with `word` in the journal, and `shown` in the Node's annotation whose name ends with `key`.
async fn warned(lab: &Lab, mark: usize, word: &str, key: &str, shown: &str) -> Result<()> {
    let is_it = |entry: &Entry| {
        let is_warning = matches!(entry.field("PRIORITY"), Some("4" | "3"));
        entry.is_agents() && is_warning && entry.message().contains(word)
    };
    lab.vm.journal.wait(mark, BOOT + WORK, &format!("a warning with `{word}`"), is_it).await?;
    let shows = |node: &Value| {
        let annotations = node["metadata"]["annotations"].as_object();
        annotations.is_some_and(|all| {
            all.iter().any(|(name, value)| name.ends_with(key) && value.as_str().is_some_and(|v| v.contains(shown)))
        })
    };
    lab.wait(&format!("a Node that shows `{shown}`"), WORK, shows).await.map(drop)
}

/// The policy rejects every image of the registry from now on. `prepare` runs before the new policy replaces the old
/// one.
async fn reject(lab: &mut Lab, prepare: &str) -> Result<()> {
    let host = lab.trust.registry_in_guest();
    let policy = Policy::accept_by_default().scope(&host, [Requirement::reject()]).to_json().to_string();
    let policy = openssl::base64::encode_block(policy.as_bytes());
    let script = format!(
        "set -e; cd /etc/containers; cp -p policy.json policy.json.before; base64 -d >policy.json.new <<<{policy}
         chmod --reference=policy.json policy.json.new; {prepare}
         mv policy.json.new policy.json"
    );
    lab.vm.run(&script).await.map(drop)
}

async fn accept(lab: &mut Lab) -> Result<()> {
    lab.vm.run("mv /etc/containers/policy.json.before /etc/containers/policy.json").await.map(drop)
}

/// The way out of the refusal: the policy accepts the image again.
async fn allow_and_arrive(lab: &mut Lab, image: &Pushed) -> Result<()> {
    accept(lab).await?;
    lab.drains.block_drains(false);
    // Nothing tells the agent of the policy where the drain is over already.
    lab.reboot_of_its_own(HOUSEKEEPING + UPDATE).await?;
    lab.wait_done(image).await?;
    lab.arrived(image).await
}

/// Runs the pull as root: its status and its output.
async fn pull(lab: &mut Lab, image: &Pushed) -> Result<(i32, String)> {
    lab.vm.status(&lab.backend.pull(&image.pullspec())).await
}

/// The state that a refusal must not change.
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
        ensure!(!lab.is_staged().await?, "an image is staged");
        ensure!(now.deployments == self.deployments, "{} became {}", self.deployments, now.deployments);
        Ok(())
    }
}
