//! What stages images in the guest, and all that tests have to know of it.

use clap::ValueEnum;

/// A host tool, or its stand-in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// A daemon on the system bus.
    RpmOstree,
    /// A program that systemd runs.
    Bootc,
}

impl Backend {
    /// Its name, as the agent and the image's build know it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RpmOstree => "rpm-ostree",
            Self::Bootc => "bootc",
        }
    }

    /// What `rebase-agent status` says of it: which, and why. There may be a real bootc beside a real rpm-ostree, which
    /// is another reason.
    #[must_use]
    pub fn chosen(self) -> &'static str {
        match self {
            Self::RpmOstree => "rpm-ostree: ",
            Self::Bootc => "bootc: rpm-ostree is not on the system bus",
        }
    }

    /// The command with which anybody with root has it stage an image, without the agent.
    #[must_use]
    pub fn pull(self, pullspec: &str) -> String {
        match self {
            Self::RpmOstree => format!("rpm-ostree rebase ostree-unverified-registry:{pullspec}"),
            Self::Bootc => format!("bootc switch --quiet -- {pullspec}"),
        }
    }

    /// Whether it can drop what is staged; otherwise the agent stages the desired image over it.
    #[must_use]
    pub fn drops_staged(self) -> bool {
        self == Self::RpmOstree
    }

    /// Its units, as arguments of journalctl.
    #[must_use]
    pub fn units(self) -> &'static str {
        match self {
            Self::RpmOstree => "--unit=rpm-ostreed.service",
            Self::Bootc => "--unit='rebase-agent-bootc*'",
        }
    }

    /// What its journal says when it has done what it was asked for, as a pattern. rpm-ostree names the object, too
    /// (rpmostreed-transaction.cxx: `Txn %s on %s successful`).
    #[must_use]
    pub fn ended_well(self) -> &'static str {
        match self {
            Self::RpmOstree => "^Txn Rebase (on [^ ]+ )?successful$",
            Self::Bootc => "^Finished .*Stage",
        }
    }

    /// A script after which staging ends well and stages nothing. That of rpm-ostree depends on the stand-in.
    #[must_use]
    pub fn change_nothing(self) -> &'static str {
        match self {
            Self::RpmOstree => "touch /run/rpm-ostreed-changes-nothing",
            Self::Bootc => {
                "mkdir /run/systemd/system/rebase-agent-bootc@.service.d && cd $_ &&
                 printf '[Service]\\nExecStart=\\nExecStart=/bin/true\\n' >nothing.conf && systemctl daemon-reload"
            }
        }
    }

    /// The script that undoes it.
    #[must_use]
    pub fn change_again(self) -> &'static str {
        match self {
            Self::RpmOstree => "rm /run/rpm-ostreed-changes-nothing",
            Self::Bootc => "rm -r /run/systemd/system/rebase-agent-bootc@.service.d && systemctl daemon-reload",
        }
    }

    /// The reason that the agent gives when the registry dies while an image is pulled: it sees none of bootc's words.
    #[must_use]
    pub fn lost_registry(self) -> &'static str {
        match self {
            Self::RpmOstree => "RegistryUnreachable",
            Self::Bootc => "StageFailed",
        }
    }
}
