//! The host tools that can stage an image, and what each of them offers to people. Data only; [`crate::model`]
//! re-exports it.

use std::fmt;

use serde::{Deserialize, Serialize};

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
            Self::Bootc => "`ostree admin undeploy`",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
