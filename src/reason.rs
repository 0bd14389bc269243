//! The words for everything that the agent can be up to or up against. Data only; [`crate::model`] re-exports it.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Every reason the agent can give, in one word that never changes its meaning: first word of the `reason`
        /// annotation, `REBASE_AGENT_REASON` in the journal, later condition reason and metric label.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Reason { $($(#[$doc])* $name,)* }

        impl Reason {
            /// All of them, for the catalog test.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The word.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }
        }
    };
}

reasons! {
    /// The node runs what is desired and has said so.
    Done,
    /// The node runs what is desired, and its policy refuses the image.
    RunsUntrusted,
    /// The node runs what is desired, and another deployment is first in boot order.
    RollbackQueued,
    /// A shutdown is under way.
    ShuttingDown,
    /// The API server cannot be reached or does not answer sense.
    ClusterUnreachable,
    /// The API server answers with a certificate that is not trusted.
    ClusterUntrusted,
    /// The API server refuses the node's credentials, or forbids the request.
    ClusterForbidden,
    /// The Node object does not exist.
    NodeNotFound,
    /// The whole Node is larger than the agent reads.
    NodeTooLarge,
    /// The kubelet's kubeconfig or certificate cannot be used.
    KubeconfigInvalid,
    /// rpm-ostree, systemd or logind cannot be read.
    HostUnreachable,
    /// The host is not image-mode: no booted deployment.
    HostNotImageMode,
    /// The host is of a kind that no backend can change.
    HostUnsupported,
    /// The host tool is busy with somebody else's transaction.
    HostBusy,
    /// The host tool answered something that makes no sense.
    HostConfused,
    /// Another daemon writes this node's state.
    OtherDaemon,
    /// The Node carries no current config yet.
    FirstBoot,
    /// It cannot be told which rendered config the booted image was built from.
    BootedConfigUnknown,
    /// The pool has no image.
    NotLayered,
    /// The pool had an image and has none any more.
    LayeringReverted,
    /// The desired image is no reference pinned by digest.
    ImageMalformed,
    /// The desired image's name does not fit into the name of a unit.
    ImageNameTooLong,
    /// The desired image was given without a desired config.
    ConfigMissing,
    /// Somebody staged another image.
    StagedByOther,
    /// The desired config is newer than the image.
    ConfigAheadOfImage,
    /// A kernel argument of the rendered config is not in effect.
    KernelArgumentMissing,
    /// The kubelet is not active yet.
    HealthPending,
    /// The kubelet did not become active.
    HealthFailed,
    /// The drain controller has not confirmed the uncordon yet.
    UncordonPending,
    /// The drain controller has not confirmed the uncordon for long.
    UncordonLate,
    /// Everything holds; being reported.
    Settling,
    /// The host rolled back from this image.
    RolledBack,
    /// The image never came up.
    NeverCameUp,
    /// The signature is being checked.
    Verifying,
    /// A signature is required and there is none.
    SignatureMissing,
    /// There is a signature and it is not accepted.
    SignatureRejected,
    /// The policy rejects this image outright.
    PolicyRejects,
    /// The policy accepts anything for this image.
    PolicyAcceptsAnything,
    /// The policy file cannot be used.
    PolicyInvalid,
    /// The engine does not enforce the policy.
    EngineUnfit,
    /// The policy asks for GPG and there is no scratch space for it.
    GpgNeedsScratch,
    /// The node's registries.conf or registries.d cannot be used, or blocks the image's registry.
    RegistryConfigInvalid,
    /// The node has no file descriptor, process or memory left to start the engine with.
    ResourcesExhausted,
    /// The registry has no such manifest.
    ManifestMissing,
    /// The registry refuses the credentials.
    RegistryDenied,
    /// The registry's certificate is not trusted.
    RegistryUntrusted,
    /// The registry cannot be reached or does not answer sense.
    RegistryUnreachable,
    /// The manifest or config of the image makes no sense.
    ImageInvalid,
    /// The image is for another architecture.
    WrongArchitecture,
    /// The image is not a bootable one.
    NotBootable,
    /// The image was built before the operator's floor, or does not say when.
    TooOld,
    /// Another transaction of the host tool is in the way.
    ForeignTransaction,
    /// The image is being staged.
    Staging,
    /// The host has layered packages.
    LayeredPackages,
    /// `/boot` cannot hold another kernel.
    BootFull,
    /// The disk cannot hold the image.
    DiskFull,
    /// The host tool failed to stage the image.
    StageFailed,
    /// The transaction was cancelled.
    Cancelled,
    /// Kernel arguments are being applied.
    KernelArguments,
    /// The backend cannot give the staged image its kernel arguments.
    KernelArgumentsUnsupported,
    /// An operator holds the node.
    Held,
    /// A shutdown inhibitor is in the way.
    Inhibited,
    /// The machine has not been up long enough.
    UptimeFloor,
    /// The finalizer is being started.
    Finalizer,
    /// The Node says that it runs another image than it does; the drain waits a random time.
    RestoreSpread,
    /// The drain controller has not confirmed the drain yet.
    DrainPending,
    /// The drain controller has not confirmed the drain for long.
    DrainStuck,
    /// Somebody uncordoned the node after the drain.
    UncordonedByOther,
    /// Everything holds; rebooting.
    Rebooting,
    /// logind refused the reboot.
    RebootRefused,
    /// A unit did not do what it was started for.
    UnitFailed,
    /// A call took longer than its deadline.
    DeadlineExceeded,
}

impl Reason {
    /// Whether the image itself is refused, rather than that no answer could be had.
    #[must_use]
    pub fn refuses_image(self) -> bool {
        matches!(
            self,
            Self::SignatureMissing
                | Self::SignatureRejected
                | Self::PolicyRejects
                | Self::PolicyAcceptsAnything
                | Self::PolicyInvalid
                | Self::EngineUnfit
                | Self::GpgNeedsScratch
                | Self::ImageInvalid
                | Self::WrongArchitecture
                | Self::NotBootable
                | Self::TooOld
        )
    }

    /// Whether the node runs what is desired and nothing is left to do, even where a warning remains.
    #[must_use]
    pub fn is_at_rest(self) -> bool {
        matches!(self, Self::Done | Self::RunsUntrusted | Self::RollbackQueued)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
