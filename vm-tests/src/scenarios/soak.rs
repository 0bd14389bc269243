//! Many updates, and their leftovers.

use anyhow::{Context as _, Result, ensure};

use crate::lab::Lab;

const UPDATES: u32 = 10;
/// Updates that fill everything that is filled only once: two deployments, the layers of both.
const SETTLING: u32 = 2;
/// Growth of the disk after that which is allowed. A leftover update would be several times as large.
const DISK_KIB: u64 = 8 << 10;
/// The agent's memory limit, resident.
const MEMORY_KIB: u64 = 32 << 10;

/// Ten updates: deployments, disk and memory at the end are the same as after the second.
pub async fn ten(lab: &mut Lab) -> Result<()> {
    let mut settled = None;
    for number in 1..=UPDATES {
        let image = lab.signed().await?;
        let version = lab.version();
        lab.update(&image, version).await.with_context(|| format!("update {number}"))?;
        let residue = Residue::of(lab).await?;
        lab.say(&format!("update {number}: {residue:?}"));
        ensure!(residue.memory < MEMORY_KIB, "the agent uses {} KiB", residue.memory);
        ensure!(residue.errors.is_empty(), "errors in the journal: {}", residue.errors);
        match &settled {
            None if number == SETTLING => settled = Some(residue),
            Some(Residue { disk, deployments, images, .. }) => {
                ensure!(residue.disk <= disk + DISK_KIB, "the disk went from {disk} to {} KiB", residue.disk);
                ensure!(
                    residue.deployments == *deployments,
                    "{deployments} deployments became {}",
                    residue.deployments
                );
                ensure!(residue.images == *images, "{images} images became {}", residue.images);
            }
            None => {}
        }
    }
    Ok(())
}

#[derive(Debug)]
struct Residue {
    disk: u64,
    deployments: u64,
    images: u64,
    memory: u64,
    /// Of the agent and of the units that work for it.
    errors: String,
}

impl Residue {
    async fn of(lab: &mut Lab) -> Result<Self> {
        let mut number = async |what: &str, script: &str| -> Result<u64> {
            let text = lab.vm.run(script).await?;
            text.trim().parse().with_context(|| format!("{what}: {text}"))
        };
        Ok(Self {
            // Without the journal, which has its own limit.
            disk: number("disk", "sync; du -sk --exclude=journal /sysroot/ostree /sysroot/boot | awk '{ s += $1 } END { print s }'").await?,
            deployments: number("deployments", "ls -d /ostree/deploy/default/deploy/*.[0-9] | wc -l").await?,
            images: number("images", "ostree refs --repo=/ostree/repo --list ostree/container/image | wc -l").await?,
            memory: number("memory", "awk '/^VmRSS/ { print $2 }' /proc/$(systemctl show --value -p MainPID rebase-agent)/status").await?,
            errors: lab
                .vm
                .run(&format!(
                    "journalctl -p err -q --no-pager -u rebase-agent {} -u ostree-finalize-staged -u ostree-boot-complete",
                    lab.backend.units()
                ))
                .await?
                .trim()
                .to_owned(),
        })
    }
}
