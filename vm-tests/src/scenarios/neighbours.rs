//! The agent's peers go away, change their mind, or belong to another party.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use support::mcc::PREFIX;
use tokio::time::timeout;

use crate::backend::Backend;
use crate::journal::Entry;
use crate::lab::{HOLD, LOOK, Lab, NODE, Stock, UPDATE, WORK};
use crate::oci::Extra;
use crate::scenarios::power::STAGED;

/// Interval at which an idle agent checks for a foreign stage and for a changed policy.
pub(super) const HOUSEKEEPING: Duration = Duration::from_secs(180);
/// Lifetime in seconds of a certificate that is to expire.
const LIFE: i64 = 5;
/// Large enough to interrupt its pull.
const PAYLOAD: usize = 48 << 20;
/// Additional time for a pull of the payload: 256 KiB/s, which a busy machine without KVM still reaches.
pub(super) const PULL: Duration = Duration::from_secs(PAYLOAD as u64 / (256 << 10));
/// Longer than a verification.
const FETCHED: u64 = 4 << 20;

/// The target's digest is that of an index: the booted image is the instance that the index selects.
pub async fn index_digest(lab: &mut Lab) -> Result<()> {
    let image = lab.signed_index().await?;
    let version = lab.version();
    lab.update(&image, version).await?;
    let booted = lab.booted_digest().await?;
    ensure!(booted != image.digest, "the index itself cannot be booted");
    Ok(())
}

/// The registry dies in the middle of a layer and comes back.
pub async fn registry_gone(lab: &mut Lab) -> Result<()> {
    let image = lab.signed_with(payload(lab.version())).await?;
    let (mark, before, reason) = (lab.vm.journal.mark(), received(lab).await?, lab.backend.lost_registry());
    lab.target(&image);
    wait_fetching(lab, before).await?;
    lab.registry.stop();
    lab.vm
        .journal
        .wait(mark, WORK + PULL, "the agent reports the lost registry", |entry| {
            entry.is_agents() && entry.field("REBASE_AGENT_REASON") == Some(reason)
        })
        .await?;
    ensure!(!lab.is_staged().await?, "half an image is staged");
    lab.registry.restart().await?;
    lab.reboot_of_its_own(UPDATE + PULL).await?;
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}

/// The API server is away while the node boots the new image.
pub async fn api_gone_at_boot(lab: &mut Lab) -> Result<()> {
    let image = lab.signed().await?;
    lab.target(&image);
    lab.vm.wait_off(UPDATE).await?;
    lab.api.stop().await;
    let mark = lab.vm.journal.mark();
    lab.power_on().await?;
    lab.vm
        .journal
        .wait(mark, WORK, "the cluster cannot be read", |entry| {
            entry.is_agents() && entry.field("REBASE_AGENT_REASON") == Some("ClusterUnreachable")
        })
        .await?;
    let (_, active) = lab.vm.status("systemctl is-active rebase-agent").await?;
    ensure!(active.trim() == "active", "the agent is {active}");
    lab.api.restart().await;
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}

/// The kubelet's certificate expires in the middle of an update and is replaced.
pub async fn certificate_rotates(lab: &mut Lab) -> Result<()> {
    // The update is held in the middle.
    lab.annotate(HOLD, Some("until the certificate is replaced"))?;
    let image = lab.signed().await?;
    lab.target(&image);
    lab.wait_reason("Working", "Held", UPDATE).await?;
    let expiring = lab.trust.pki.kubelet_pem_valid(NODE, -3600, LIFE);
    lab.install_client(&expiring).await?;
    let mark = lab.api.requests().len();
    let expired = async {
        loop {
            // The agent reads its certificate when it starts to watch.
            lab.store().end_watches();
            if lab.wait_request(mark, LOOK, "a refused certificate", |request| request.status == 401).await.is_ok() {
                return;
            }
        }
    };
    timeout(WORK, expired).await.context("the certificate does not expire")?;
    let refused = lab.api.requests().len();
    let good = lab.trust.pki.kubelet_pem(NODE);
    lab.install_client(&good).await?;
    lab.annotate(HOLD, None)?;
    lab.reboot_of_its_own(UPDATE).await?;
    lab.wait_done(&image).await?;
    let good = lab.api.requests().iter().skip(refused).filter(|request| request.status == 200).count();
    ensure!(good > 0, "the new certificate was not used");
    lab.arrived(&image).await
}

/// An operator's own commit on the branch `human`.
const COMMIT: &str = "set -e
    booted=$(ostree admin status | sed -n 's/^\\* default \\([0-9a-f]\\{64\\}\\).*/\\1/p')
    unshare --mount sh -ec \"mount -o remount,rw /sysroot
        ostree commit --repo=/ostree/repo --branch=human --bootable --tree=ref=${booted:?nothing is booted}\"";
/// Stages it, which leaves no kernel arguments in libostree's record.
const STAGE: &str = "ostree admin deploy --stage --os=default human";

/// A foreign image is staged by hand: the agent drops it once, and reports it and waits when it is staged again. With a
/// backend that cannot drop it, the booted image is staged over it.
pub async fn human_deploys(lab: &mut Lab) -> Result<()> {
    lab.vm.run(COMMIT).await.context("the foreign commit")?;
    let boot = lab.vm.boot_id().to_owned();
    let once = lab.vm.journal.mark();
    lab.vm.run(STAGE).await.context("staging it the first time")?;
    let gone = match lab.backend.drops_staged() {
        true => "test ! -e /run/ostree/staged-deployment".to_owned(),
        false => format!(
            "staged=$(ostree admin status | sed -n 's/^ *default \\([0-9a-f]*\\.[0-9]*\\) (staged)$/\\1/p')
             grep -q {} /ostree/deploy/default/deploy/${{staged:?nothing is}}.origin",
            lab.settled().digest
        ),
    };
    lab.wait_guest("the foreign stage is removed", HOUSEKEEPING + WORK, &gone).await?;
    if !lab.backend.drops_staged() {
        // A second stage before the agent has checked its own one would be staged over once more.
        lab.vm.journal.wait(once, WORK, "the agent reports its stage", |entry| entry.has_id(STAGED)).await?;
    }
    let again = lab.vm.journal.mark();
    lab.vm.run(STAGE).await.context("staging it the second time")?;
    lab.vm
        .journal
        .wait(again, HOUSEKEEPING + WORK, "the agent reports the foreign stage", |entry| {
            entry.is_agents()
                && entry.field("REBASE_AGENT_RULE") == Some("not-desired (9)")
                && entry.message().contains("staged again by hand")
        })
        .await?;
    lab.vm.run("ostree admin undeploy 0").await?;
    lab.wait_guest("the foreign stage is gone", WORK, "test ! -e /run/ostree/staged-deployment").await?;
    ensure!(lab.vm.boot_id() == boot, "a reboot");
    let image = lab.settled();
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}

/// A foreign stage without kernel arguments: the host stays readable, and an update works.
pub async fn staged_without_arguments(lab: &mut Lab) -> Result<()> {
    lab.vm.run(COMMIT).await.context("the foreign commit")?;
    let mark = lab.vm.journal.mark();
    lab.vm.run(STAGE).await?;
    lab.vm.run("! grep -qa kargs /run/ostree/staged-deployment").await.context("the record has kernel arguments")?;
    let image = lab.signed().await?;
    let version = lab.version();
    lab.update(&image, version).await?;
    let unreadable = |entry: &Entry| {
        entry.is_agents()
            && entry
                .field("REBASE_AGENT_REASON")
                .is_some_and(|reason| matches!(reason, "HostUnreachable" | "HostConfused"))
    };
    let unreadable = lab.vm.journal.since(mark, unreadable);
    ensure!(unreadable.is_empty(), "the host could not be read: {:?}", unreadable.first().map(Entry::message));
    let dropped = |entry: &Entry| entry.is_agents() && entry.field("REBASE_AGENT_RULE") == Some("not-desired (9)");
    let dropped = !lab.vm.journal.since(mark, dropped).is_empty();
    ensure!(dropped || !lab.backend.drops_staged(), "the agent does not report that it drops the foreign stage");
    Ok(())
}

/// The desired image was staged by hand and its finalization is locked, so that no reboot would boot it: it is staged
/// again, unlocked, before the drain.
pub async fn staged_locked(lab: &mut Lab) -> Result<()> {
    const LOCK: &str = "unshare --mount sh -ec 'mount -o remount,rw /sysroot; ostree admin lock-finalization'";
    let image = lab.signed().await?;
    let version = lab.version();
    lab.vm.run("systemctl stop rebase-agent.service").await?;
    let by_hand = lab.backend.pull(&image.pullspec());
    lab.vm.run(&by_hand).await.context("staging by hand")?;
    lab.vm.run(LOCK).await.context("locking")?;
    let is_locked = "test -e /run/ostree/staged-deployment-locked || grep -qa locked /run/ostree/staged-deployment";
    lab.vm.run(is_locked).await.context("the finalization is not locked")?;
    lab.vm.run("systemctl start rebase-agent.service").await?;
    lab.update(&image, version).await
}

/// The target changes while the first image is pulled: only the second one is ever booted.
pub async fn retarget(lab: &mut Lab) -> Result<()> {
    let first = lab.signed_with(payload(lab.version())).await?;
    let second = lab.signed().await?;
    let version = lab.version();
    let (before, mark) = (received(lab).await?, lab.vm.journal.mark());
    lab.target_as(&first, version - 1);
    wait_fetching(lab, before).await?;
    // The pool would wait for its turn, because the updating node uses up the capacity.
    lab.target_as(&second, version);
    for (key, value) in [("desiredConfig", format!("rendered-worker-{version}")), ("desiredImage", second.pullspec())] {
        lab.annotate(&format!("{PREFIX}{key}"), Some(&value))?;
    }
    // The first pull may end before it is cancelled.
    lab.reboot_of_its_own(UPDATE + PULL).await?;
    ensure!(lab.booted_digest().await? == second.digest, "the obsolete image boots");
    let staged = |entry: &Entry| entry.has_id(STAGED) && entry.message().contains(&first.digest);
    ensure!(lab.vm.journal.since(mark, staged).is_empty(), "the first image was staged before the target changed");
    lab.wait_done(&second).await?;
    lab.arrived(&second).await
}

/// The finalizer cannot start, so a reboot would lose the staged deployment: the agent waits and does not drain before.
pub async fn finalizer_late(lab: &mut Lab) -> Result<()> {
    const MAY: &str = "/run/vm-tests-finalizer-may-start";
    const DIRECTORY: &str = "/run/systemd/system/ostree-finalize-staged.service.d";
    lab.vm
        .run(&format!(
            "mkdir -p {DIRECTORY}; printf '[Unit]\nConditionPathExists={MAY}\n' >{DIRECTORY}/late.conf
             systemctl daemon-reload; systemctl stop ostree-finalize-staged.service"
        ))
        .await?;
    let (boot, drains) = (lab.vm.boot_id().to_owned(), lab.drains.drains());
    let image = lab.signed().await?;
    let mark = lab.vm.journal.mark();
    lab.target(&image);
    lab.vm
        .journal
        .wait(mark, WORK, "the agent reports the inactive finalizer", |entry| {
            entry.is_agents() && entry.field("REBASE_AGENT_REASON").is_some_and(|reason| reason.contains("Finalizer"))
        })
        .await?;
    // Waits twice as long, so that a faulty agent would have gone on.
    let skipped = |entry: &Entry| {
        entry.field("UNIT") == Some("ostree-finalize-staged.service") && entry.message().contains("skipped")
    };
    lab.vm.journal.wait(mark, WORK, "the finalizer is skipped", skipped).await?;
    let once = lab.vm.journal.mark();
    lab.vm.journal.wait(once, WORK, "the finalizer is tried again", skipped).await?;
    ensure!(lab.is_staged().await?, "no deployment is staged");
    ensure!(lab.drains.drains() == drains, "a drain before a reboot that cannot come");
    ensure!(lab.vm.boot_id() == boot, "a reboot that loses the staged deployment");
    lab.vm.run(&format!("touch {MAY}")).await?;
    lab.reboot_of_its_own(UPDATE).await?;
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}

/// Why staging cannot be made to end well and stage nothing, if it cannot.
pub(super) fn cannot_change_nothing(stock: &Stock) -> Option<&'static str> {
    let is_overlaid = stock.backend == Backend::RpmOstree && stock.has_overlay();
    is_overlaid
        .then_some("only the stand-in of rpm-ostree can be told to stage nothing, and the overlay may replace it")
}

/// The backend reports success without a change, as the original does when it finds nothing to do; the deployments show
/// that.
pub async fn no_effect(lab: &mut Lab) -> Result<()> {
    lab.vm.run(lab.backend.change_nothing()).await?;
    let began = lab.vm.run("date +%s").await?;
    let (boot, drains) = (lab.vm.boot_id().to_owned(), lab.drains.drains());
    let image = lab.signed().await?;
    let mark = lab.vm.journal.mark();
    lab.target(&image);
    let (units, pattern) = (lab.backend.units(), lab.backend.ended_well());
    let ended = format!("journalctl --quiet {units} --since=@{} --grep='{pattern}'", began.trim());
    lab.wait_guest("staging reports success", WORK, &ended).await?;
    lab.vm
        .journal
        .wait(mark, WORK, "the agent reports the missing change", |entry| {
            entry.is_agents() && entry.field("REBASE_AGENT_REASON") == Some("HostConfused")
        })
        .await?;
    ensure!(lab.drains.drains() == drains, "a drain with nothing staged");
    ensure!(lab.vm.boot_id() == boot, "a reboot with nothing staged");
    lab.vm.run(lab.backend.change_again()).await?;
    lab.reboot_of_its_own(UPDATE).await?;
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}

/// The number of bytes that the guest has received.
pub(super) async fn received(lab: &mut Lab) -> Result<u64> {
    let text = lab.vm.run("cat /sys/class/net/en*/statistics/rx_bytes").await?;
    text.trim().parse().with_context(|| format!("bytes received: {text}"))
}

/// Waits until a layer is being pulled; the backends do not report that in the same way.
pub(super) async fn wait_fetching(lab: &mut Lab, before: u64) -> Result<()> {
    let enough = before + FETCHED;
    lab.wait_guest(
        "a layer is fetched",
        WORK,
        &format!("test $(cat /sys/class/net/en*/statistics/rx_bytes) -gt {enough}"),
    )
    .await
}

/// A file that takes a while to pull.
pub(super) fn payload(seed: u32) -> Extra {
    // Incompressible, so that the pull takes a while.
    let key = openssl::sha::sha256(format!("{seed} {:?}", std::time::SystemTime::now()).as_bytes());
    let cipher = openssl::symm::Cipher::aes_256_ctr();
    let noise = openssl::symm::encrypt(cipher, &key, Some(&[0; 16]), &vec![0; PAYLOAD]).unwrap_or_default();
    Extra::default().file("usr/share/vm-tests/payload", 0o644, noise)
}
