//! Facts about the OS: deployments, the host tool and its transaction, kernel, systemd and logind.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Digest;

/// The kernel's `boot_id`. It is new for every boot, and the only proof that a reboot happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootId(pub String);

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The host tool that lists deployments and stages images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// rpm-ostreed, over D-Bus.
    #[default]
    RpmOstree,
    /// bootc, in units that systemd starts.
    Bootc,
}

impl Backend {
    /// The value of `--backend`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RpmOstree => "rpm-ostree",
            Self::Bootc => "bootc",
        }
    }

    /// Whether it can drop a staged deployment. bootc has only `rollback`, which also reverses the boot order, and reverses
    /// it back at the next call. With bootc another image is staged over the deployment instead.
    #[must_use]
    pub fn drops_staged(self) -> bool {
        self == Self::RpmOstree
    }

    /// Whether it can unlock a locked deployment and boot it. `bootc switch` neither locks nor unlocks.
    #[must_use]
    pub fn unlocks(self) -> bool {
        self == Self::RpmOstree
    }

    /// The command that drops a staged deployment.
    pub(crate) fn drop_by_hand(self) -> &'static str {
        match self {
            Self::RpmOstree => "`rpm-ostree cleanup -p`",
            Self::Bootc => "`ostree admin undeploy 0`",
        }
    }

    /// The command that reverses the boot order of the booted deployment and the rollback.
    pub(crate) fn turn_boot_order(self) -> &'static str {
        match self {
            Self::RpmOstree => "`rpm-ostree rollback`",
            Self::Bootc => "`bootc rollback`",
        }
    }

    /// The command that removes the rollback deployment.
    pub(crate) fn remove_rollback(self) -> &'static str {
        match self {
            Self::RpmOstree => "`rpm-ostree cleanup -r`",
            Self::Bootc => "`ostree admin undeploy INDEX`",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One ostree deployment, as the host tool reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Deployment {
    /// `<osname>-<checksum>.<serial>`, the host tool's name for it.
    pub id: String,
    /// The stateroot.
    pub osname: String,
    /// The ostree commit.
    pub checksum: String,
    /// The deployment is booted.
    pub booted: bool,
    /// The deployment is staged: it is finalized at shutdown and boots next.
    pub staged: bool,
    /// The deployment is staged but locked: it does not boot until it is unlocked.
    pub locked: bool,
    /// The deployment is kept until it is unpinned.
    pub pinned: bool,
    /// Image version label, for people.
    pub version: Option<String>,
    /// `host/repository[:tag|@digest]` without the signature prefix.
    pub reference: Option<String>,
    /// Manifest digest that the host recorded at the pull; for an index, that of the instance.
    pub digest: Option<Digest>,
    /// The deployment has packages, overrides or a local initramfs on top of the image.
    pub layered: bool,
    /// The image's `machineconfig` label: the rendered config it was built from.
    pub rendered_config: Option<String>,
    /// `spec.kernelArguments` of the rendered config inside the image, split; `None` if the image has no rendered config.
    pub wanted_arguments: Option<Vec<String>>,
    /// Why the rendered config inside the image cannot be used. Its kernel arguments are then unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_fault: Option<String>,
    /// The kernel arguments of the boot entry, or of the future one of a staged deployment. Only set for the booted and
    /// the staged deployment.
    pub arguments: Option<Vec<String>>,
}

/// The host tool's active transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transaction {
    /// The title, `rebase-agent <digest>` for our own.
    pub title: String,
    /// The client that started it, as the host tool describes it.
    pub client: String,
    /// The digest in the title, if the transaction is ours.
    pub ours: Option<Digest>,
}

/// The facts from rpm-ostree or bootc. Reading them starts a daemon, so they are read only when something may have
/// changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostFacts {
    /// The host tool that was asked, and that makes all changes.
    pub backend: Backend,
    /// Boot order: staged first, then the next boot's default.
    pub deployments: Vec<Deployment>,
    /// The active transaction.
    pub transaction: Option<Transaction>,
}

impl HostFacts {
    /// The booted deployment.
    #[must_use]
    pub fn booted(&self) -> Option<&Deployment> {
        self.deployments.iter().find(|d| d.booted)
    }

    /// The staged deployment, also while it is locked.
    #[must_use]
    pub fn staged(&self) -> Option<&Deployment> {
        self.deployments.iter().find(|d| d.staged)
    }

    /// The deployment that an orderly reboot boots: the first in boot order that is not locked.
    #[must_use]
    pub fn next_boot(&self) -> Option<&Deployment> {
        self.deployments.iter().find(|d| !d.locked)
    }

    /// The first deployment after the booted one, of the same stateroot.
    #[must_use]
    pub fn rollback(&self) -> Option<&Deployment> {
        let booted = self.booted()?;
        self.deployments.iter().skip_while(|d| !d.booted).skip(1).find(|d| d.osname == booted.osname)
    }
}

/// The state of a systemd unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names are systemd's ActiveState values")]
pub enum UnitState {
    Active,
    Activating,
    #[default]
    Inactive,
    Failed,
    /// No unit file of that name, or a masked unit.
    Absent,
}

/// A block-mode inhibitor lock that covers shutdown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inhibitor {
    /// The program that holds it, by its own name.
    pub who: String,
    /// The reason that the program gives.
    pub why: String,
}

/// The facts from the kernel, systemd and logind. Reading them is cheap and starts no daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// The id of this boot.
    pub boot_id: BootId,
    /// Milliseconds since the kernel started.
    pub uptime: u64,
    /// The machine's architecture by its OCI name.
    pub architecture: String,
    /// The running kernel's arguments.
    pub command_line: Vec<String>,
    /// Bytes free for root on `/boot`.
    pub boot_free: Option<u64>,
    /// Bytes that the running kernel and its initramfs take on `/boot`: the estimate for the next kernel.
    pub boot_needed: Option<u64>,
    /// Bytes free for root on `/sysroot`.
    #[serde(default)]
    pub sysroot_free: Option<u64>,
    /// `ostree-finalize-staged.service`.
    pub finalizer: UnitState,
    /// `kubelet.service`.
    pub kubelet: UnitState,
    /// `bootloader-update.service`.
    pub bootloader_update: UnitState,
    /// `ostree-boot-complete.service` failed: the previous boot's staged deployment could not be finalized.
    pub finalize_failed: bool,
    /// Block-mode shutdown inhibitors.
    #[serde(default)]
    pub inhibitors: Vec<Inhibitor>,
    /// logind is preparing a shutdown.
    #[serde(default)]
    pub shutting_down: bool,
    /// The first-boot annotations, which Ignition wrote; `None` if the file does not exist.
    #[serde(default)]
    pub first_boot: Option<BTreeMap<String, String>>,
}
