//! The OS: deployments, the host tool and its transaction, kernel, systemd and logind.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Digest;

/// The kernel's `boot_id`: a new one for every boot, and the only proof that a reboot happened.
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
    /// rpm-ostreed, over its own D-Bus interface.
    #[default]
    RpmOstree,
    /// bootc, as units that systemd is asked to start.
    Bootc,
}

impl Backend {
    /// As in `--backend`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RpmOstree => "rpm-ostree",
            Self::Bootc => "bootc",
        }
    }

    /// Whether it can take away what is staged. bootc has only `rollback`, which besides turns the boot order around,
    /// and back when it is called again; what is staged is staged over instead.
    #[must_use]
    pub fn drops_staged(self) -> bool {
        self == Self::RpmOstree
    }

    /// What drops a staged deployment by hand.
    pub(crate) fn drop_by_hand(self) -> &'static str {
        match self {
            Self::RpmOstree => "`rpm-ostree cleanup -p`",
            Self::Bootc => "`ostree admin undeploy 0`",
        }
    }

    /// What gives the kernel its arguments.
    pub(crate) fn set_arguments(self) -> &'static str {
        match self {
            Self::RpmOstree => "put them at the end with `rpm-ostree kargs --editor` and reboot",
            Self::Bootc => "let the image bring them in `/usr/lib/bootc/kargs.d`",
        }
    }

    /// What turns the boot order of two deployments around.
    pub(crate) fn turn_boot_order(self) -> &'static str {
        match self {
            Self::RpmOstree => "`rpm-ostree rollback`",
            Self::Bootc => "`bootc rollback`",
        }
    }

    /// What goes back to the image before.
    pub(crate) fn go_back(self) -> &'static str {
        match self {
            Self::RpmOstree => "`rpm-ostree rollback`",
            Self::Bootc => "`bootc rollback`, once,",
        }
    }

    /// Where to look for a transaction that does not end.
    pub(crate) fn end_transaction(self) -> &'static str {
        match self {
            Self::RpmOstree => "see `rpm-ostree status`, end it with `rpm-ostree cancel`",
            Self::Bootc => "see `lslocks` and `systemctl list-units '*bootc*'`, and end what holds it",
        }
    }

    /// What takes layered packages away.
    pub(crate) fn unlayer(self) -> &'static str {
        match self {
            Self::RpmOstree => "and a rebase would drag them along; remove them with `rpm-ostree reset`",
            Self::Bootc => "and a switch would silently drop them; remove them with `rpm-ostree reset`",
        }
    }

    /// What removes the rollback deployment.
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

/// One ostree deployment, as the host's own tool reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Deployment {
    /// `<osname>-<checksum>.<serial>`, the host tool's name for it.
    pub id: String,
    /// The stateroot.
    pub osname: String,
    /// The ostree commit.
    pub checksum: String,
    /// This is what runs.
    pub booted: bool,
    /// This is finalized at shutdown and boots next.
    pub staged: bool,
    /// Staged, and left out of the next boot until it is unlocked.
    pub locked: bool,
    /// Kept until unpinned.
    pub pinned: bool,
    /// Image version label, for people.
    pub version: Option<String>,
    /// `host/repository[:tag|@digest]` without the signature prefix.
    pub reference: Option<String>,
    /// Manifest digest that the host recorded at the pull; for an index, the instance's.
    pub digest: Option<Digest>,
    /// Packages, overrides or a local initramfs on top of the image.
    pub layered: bool,
    /// The image's `machineconfig` label: the rendered config it was built from.
    pub rendered_config: Option<String>,
    /// `spec.kernelArguments` of the rendered config that the image carries, split; `None` if it carries none.
    pub wanted_arguments: Option<Vec<String>>,
    /// Why the rendered config that the image carries cannot be used: which arguments it wants is not known then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_fault: Option<String>,
    /// The kernel arguments of its boot entry, for the staged one those that it will have; read for these two only.
    pub arguments: Option<Vec<String>>,
}

/// The host tool's active transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transaction {
    /// Its title: for ours `rebase-agent <digest>`.
    pub title: String,
    /// Who started it, as the host tool describes them.
    pub client: String,
    /// The digest in the title, if the transaction is ours.
    pub ours: Option<Digest>,
}

/// What rpm-ostree or bootc say. Reading it wakes their daemon, so it is read around changes only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostFacts {
    /// Who was asked, and will be asked to change anything.
    pub backend: Backend,
    /// Boot order: staged first, then the next boot's default.
    pub deployments: Vec<Deployment>,
    /// What the host tool is busy with.
    pub transaction: Option<Transaction>,
}

impl HostFacts {
    /// What runs now.
    #[must_use]
    pub fn booted(&self) -> Option<&Deployment> {
        self.deployments.iter().find(|d| d.booted)
    }

    /// What is staged, also while it is locked.
    #[must_use]
    pub fn staged(&self) -> Option<&Deployment> {
        self.deployments.iter().find(|d| d.staged)
    }

    /// What an orderly reboot boots: the first in boot order that is not locked.
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

/// systemd's view of one unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names are systemd's ActiveState values")]
pub enum UnitState {
    Active,
    Activating,
    #[default]
    Inactive,
    Failed,
    /// No unit file of that name.
    Absent,
}

/// A block-mode inhibitor lock that covers shutdown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inhibitor {
    /// Who holds it, in their own words.
    pub who: String,
    /// Why, in their own words.
    pub why: String,
}

/// What the kernel, systemd and logind say. Cheap: all of them run anyway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// This boot.
    pub boot_id: BootId,
    /// Milliseconds since the kernel started.
    pub uptime: u64,
    /// The machine's architecture by its OCI name.
    pub architecture: String,
    /// The running kernel's arguments.
    pub command_line: Vec<String>,
    /// Bytes free for root on `/boot`.
    pub boot_free: Option<u64>,
    /// Bytes that the running kernel and its initramfs take, the measure of what the next one needs.
    pub boot_needed: Option<u64>,
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
    /// The Ignition-written first-boot annotations, if the file is there.
    #[serde(default)]
    pub first_boot: Option<BTreeMap<String, String>>,
}
