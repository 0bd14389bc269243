//! What the agent talks to goes away, changes its mind, or is somebody else's.

use anyhow::{Context as _, Result, ensure};
use support::mcc::{MANAGER, PREFIX};

use crate::lab::{Lab, NODE, UPDATE, WORK};
use crate::oci::Extra;

/// How many seconds a certificate lives that is to expire.
const LIFE: i64 = 20;
/// Large enough to be in the middle of it.
const PAYLOAD: usize = 48 << 20;
/// The daemon says so when a layer is on its way.
const FETCHING: &str = "Fetching layer";

/// A digest that names an index: what is booted in the end is the instance that the index selects.
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
    let mark = lab.vm.journal.mark();
    lab.target(&image);
    lab.vm.journal.wait(mark, WORK, "a layer is fetched", |entry| entry.message().contains(FETCHING)).await?;
    lab.registry.stop();
    lab.vm
        .journal
        .wait(mark, WORK, "the transaction fails", |entry| entry.message().contains("Txn Rebase failed"))
        .await?;
    lab.vm
        .journal
        .wait(mark, WORK, "the agent tells that it failed", |entry| {
            entry.is_agents() && entry.field("PRIORITY").is_some_and(|priority| priority <= "4")
        })
        .await?;
    ensure!(!lab.is_staged().await?, "half an image is staged");
    lab.registry.restart().await?;
    lab.reboot_of_its_own(UPDATE).await?;
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}

/// The API server is away while the node comes up in the new image.
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
    // It lives long enough to be picked up, and no longer.
    let short = lab.trust.pki.kubelet_pem_valid(NODE, -3600, LIFE);
    lab.install_client(&short).await?;
    let serial = lab.api.requests().len();
    lab.store().end_watches();
    let image = lab.signed().await?;
    lab.target(&image);
    lab.wait_request(serial, UPDATE, "a refused certificate", |request| request.status == 401).await?;
    let refused = lab.api.requests().len();
    let good = lab.trust.pki.kubelet_pem(NODE);
    lab.install_client(&good).await?;
    lab.reboot_of_its_own(UPDATE).await?;
    lab.wait_done(&image).await?;
    let good = lab.api.requests().iter().skip(refused).filter(|request| request.status == 200).count();
    ensure!(good > 0, "nothing was asked for with the new certificate");
    lab.arrived(&image).await
}

/// Somebody stages something else by hand: dropped once, told about and waited out when done again.
pub async fn human_deploys(lab: &mut Lab) -> Result<()> {
    const STAGE: &str = "set -e
        commit=$(ostree admin status | sed -n 's/^ *default \\([0-9a-f]\\{64\\}\\).*(rollback).*/\\1/p')
        ostree admin deploy --stage --os=default \"${commit:?there is no rollback}\"";
    let boot = lab.vm.boot_id().to_owned();
    let mark = lab.vm.journal.mark();
    lab.vm.run(STAGE).await.context("the first time")?;
    lab.wait_guest("the agent drops it", WORK, "test ! -e /run/ostree/staged-deployment").await?;
    lab.vm.run(STAGE).await.context("the second time")?;
    lab.vm
        .journal
        .wait(mark, WORK, "the agent tells the human", |entry| {
            entry.is_agents() && entry.field("REBASE_AGENT_RULE") == Some("9")
        })
        .await?;
    lab.vm.run("ostree admin undeploy 0").await?;
    lab.wait_guest("it is gone", WORK, "test ! -e /run/ostree/staged-deployment").await?;
    ensure!(lab.vm.boot_id() == boot, "a reboot");
    let image = lab.settled();
    lab.wait_done(&image).await?;
    lab.arrived(&image).await
}

/// The target changes while the first one is pulled: only the second one is ever booted.
pub async fn retarget(lab: &mut Lab) -> Result<()> {
    let first = lab.signed_with(payload(lab.version())).await?;
    let second = lab.signed().await?;
    let version = lab.version();
    let mark = lab.vm.journal.mark();
    lab.target_as(&first, version - 1);
    lab.vm.journal.wait(mark, WORK, "a layer is fetched", |entry| entry.message().contains(FETCHING)).await?;
    // The pool would wait for its turn: the one who is updating uses up the one that may.
    lab.target_as(&second, version);
    for (key, value) in [("desiredConfig", format!("rendered-worker-{version}")), ("desiredImage", second.pullspec())] {
        lab.store()
            .annotate(MANAGER, NODE, &format!("{PREFIX}{key}"), Some(&value))
            .map_err(|error| anyhow::anyhow!("{error:?}"))?;
    }
    lab.reboot_of_its_own(UPDATE).await?;
    ensure!(lab.booted_digest().await? == second.digest, "the obsolete image boots");
    lab.wait_done(&second).await?;
    lab.arrived(&second).await
}

fn payload(seed: u32) -> Extra {
    // Incompressible, so that it takes its time.
    let key = openssl::sha::sha256(format!("{seed} {:?}", std::time::SystemTime::now()).as_bytes());
    let cipher = openssl::symm::Cipher::aes_256_ctr();
    let noise = openssl::symm::encrypt(cipher, &key, Some(&[0; 16]), &vec![0; PAYLOAD]).unwrap_or_default();
    Extra::default().file("usr/share/vm-tests/payload", 0o644, noise)
}
