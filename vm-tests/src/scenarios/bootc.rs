//! Scenarios for bootc only.

use anyhow::{Result, ensure};

use crate::journal::Entry;
use crate::lab::Lab;

const PLAIN_UNIT: &str = "rebase-agent-bootc@";
const SIGNED_UNIT: &str = "rebase-agent-bootc-signed@";

/// Where the policy accepts images by default, bootc enforces nothing and says so; elsewhere, the origin of the image
/// that the agent stages requires a signature.
pub async fn signed(lab: &mut Lab) -> Result<()> {
    let image = lab.signed().await?;
    let enforced = format!("bootc switch --quiet --enforce-container-sigpolicy -- {}", image.pullspec());
    let (code, said) = lab.vm.status(&enforced).await?;
    ensure!(code == 1 && said.contains("insecureAcceptAnything"), "enforcing on a lax policy: status {code}, {said}");
    ensure!(!lab.is_staged().await?, "the refused image is staged");

    lab.vm.run("sed -i s/insecureAcceptAnything/reject/ /etc/containers/policy.json").await?;
    let mark = lab.vm.journal.mark();
    let version = lab.version();
    lab.update(&image, version).await?;
    ensure!(spoke(lab, mark, SIGNED_UNIT), "bootc did not run with policy enforcement");
    ensure!(!spoke(lab, mark, PLAIN_UNIT), "bootc ran without enforcing the policy");
    let origin =
        lab.vm.run("cat $(readlink -f \"/$(tr ' ' '\\n' </proc/cmdline | sed -n 's,^ostree=/,,p')\").origin").await?;
    let wanted = format!("container-image-reference=ostree-image-signed:docker://{}", image.pullspec());
    ensure!(origin.lines().any(|line| line == wanted), "the origin is {origin}");
    lab.vm.run("bootc status --format=json | grep -q '\"signature\":\"containerPolicy\"'").await.map(drop)
}

/// Whether a unit of that name logged a message since `mark`.
fn spoke(lab: &Lab, mark: usize, unit: &str) -> bool {
    let is_its = |entry: &Entry| entry.field("_SYSTEMD_UNIT").is_some_and(|name| name.starts_with(unit));
    !lab.vm.journal.since(mark, is_its).is_empty()
}
