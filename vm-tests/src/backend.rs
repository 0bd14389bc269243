//! The host tool that stages images in the guest, and its properties for the tests.

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
    /// Its name, as the agent and the image's build use it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RpmOstree => "rpm-ostree",
            Self::Bootc => "bootc",
        }
    }

    /// `rebase-agent status` on the choice: the tool, and the reason. A guest may have both real tools, which is
    /// another reason.
    #[must_use]
    pub fn chosen(self) -> &'static str {
        match self {
            Self::RpmOstree => "rpm-ostree: ",
            Self::Bootc => "bootc: rpm-ostree is not on the system bus",
        }
    }

    /// The command with which root stages an image without the agent.
    #[must_use]
    pub fn pull(self, pullspec: &str) -> String {
        match self {
            Self::RpmOstree => format!("rpm-ostree rebase ostree-unverified-registry:{pullspec}"),
            Self::Bootc => format!("bootc switch --quiet -- {pullspec}"),
        }
    }

    /// A command that succeeds if no image is being pulled or staged.
    #[must_use]
    pub fn pulls_nothing(self) -> &'static str {
        match self {
            Self::RpmOstree => {
                "busctl get-property org.projectatomic.rpmostree1 /org/projectatomic/rpmostree1/Sysroot \
                 org.projectatomic.rpmostree1.Sysroot ActiveTransactionPath | grep -qx 's \"\"'"
            }
            Self::Bootc => {
                "! systemctl list-units --plain --no-legend --state=activating 'rebase-agent-bootc*' | grep -q ."
            }
        }
    }

    /// Whether it can drop a staged deployment; otherwise the agent stages the desired image over it.
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

    /// A pattern for its journal message about a successful stage. rpm-ostree also names the object
    /// (rpmostreed-transaction.cxx: `Txn %s on %s successful`).
    #[must_use]
    pub fn ended_well(self) -> &'static str {
        match self {
            Self::RpmOstree => "^Txn Rebase (on [^ ]+ )?successful$",
            Self::Bootc => "^Finished .*Stage",
        }
    }

    /// A script after which staging reports success and stages nothing. For rpm-ostree it needs the stand-in.
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

    /// The script that reverts it.
    #[must_use]
    pub fn change_again(self) -> &'static str {
        match self {
            Self::RpmOstree => "rm /run/rpm-ostreed-changes-nothing",
            Self::Bootc => "rm -r /run/systemd/system/rebase-agent-bootc@.service.d && systemctl daemon-reload",
        }
    }

    /// The agent's reason when the registry dies during a pull: it does not see bootc's messages.
    #[must_use]
    pub fn lost_registry(self) -> &'static str {
        match self {
            Self::RpmOstree => "RegistryUnreachable",
            Self::Bootc => "StageFailed",
        }
    }
}
