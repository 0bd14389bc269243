//! The reason words, each with its severity, its meaning and its help.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The severity of a reason, which also decides how failed work is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The update makes progress, or is done.
    Progress,
    /// The agent waits for something that it does not control.
    Waiting,
    /// The signature or image is expected to arrive later. Retried with backoff; Degraded after `--signature-grace`.
    Awaited,
    /// The error may pass by itself. Retried with backoff; Degraded after 15 minutes, for an unreadable host after 10.
    Transient,
    /// A person must act. Degraded at once, and retried every 10 minutes.
    Fatal,
}

impl Severity {
    /// The word, in lower case.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Progress => "progress",
            Self::Waiting => "waiting",
            Self::Awaited => "awaited",
            Self::Transient => "transient",
            Self::Fatal => "fatal",
        }
    }
}

macro_rules! reasons {
    ($(#[doc = $meaning:literal] $name:ident: $severity:ident, $help:literal;)*) => {
        /// Every reason that the agent reports, in one word whose meaning never changes: the first word of the `reason`
        /// annotation, and `REBASE_AGENT_REASON` in the journal.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Reason { $(#[doc = $meaning] $name,)* }

        impl Reason {
            /// All reasons.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The word.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// The severity.
            #[must_use]
            pub fn severity(self) -> Severity {
                match self { $(Self::$name => Severity::$severity,)* }
            }

            /// The meaning, in one sentence.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => $meaning.trim_ascii(),)* }
            }

            /// The remedy, for people.
            #[must_use]
            pub fn help(self) -> &'static str {
                match self { $(Self::$name => $help,)* }
            }
        }
    };
}

reasons! {
    /// The node runs the desired image and has reported it.
    Done: Progress, "Nothing to do.";
    /// The node runs the desired image, but the node's policy refuses it.
    RunsUntrusted: Waiting, "Sign the image, correct the policy, or set another image in the pool. The annotation `rebase-agent.openshift.io/untrusted` says why.";
    /// The node runs the desired image, but another deployment boots next.
    RollbackQueued: Waiting, "Reverse the boot order with `rpm-ostree rollback` or `bootc rollback`, or set the pool to that image.";
    /// The machine is going down; the agent starts nothing.
    ShuttingDown: Progress, "Nothing to do.";
    /// The API server does not answer, or its answer cannot be understood.
    ClusterUnreachable: Transient, "Check the network and the address in the kubelet's kubeconfig: `journalctl -u kubelet`.";
    /// The API server answers with a certificate that is not trusted.
    ClusterUntrusted: Transient, "The message says why: correct the node's clock, the CA in the kubelet's kubeconfig, or the server's name.";
    /// The API server rejects the kubelet's certificate or forbids the request.
    ClusterForbidden: Transient, "Approve the node's certificate (`oc get csr`) and see `journalctl -u kubelet`.";
    /// The API server has no Node of this name.
    NodeNotFound: Transient, "The kubelet creates the Node: see `journalctl -u kubelet`.";
    /// The Node object is over 4 MiB, so the drain cannot be confirmed.
    NodeTooLarge: Transient, "Lower `nodeStatusMaxImages` in the pool's KubeletConfig.";
    /// The kubelet's kubeconfig or certificate cannot be used.
    KubeconfigInvalid: Fatal, "The message names the file: see `journalctl -u kubelet`, which writes it.";
    /// rpm-ostree, systemd or logind does not answer.
    HostUnreachable: Transient, "See `systemctl status` and `journalctl -u` of the unit that the message names.";
    /// rpm-ostree, systemd or logind refuses the agent's call.
    HostDenied: Fatal, "The agent has to run as root: see `systemctl cat rebase-agent` for what a drop-in changes.";
    /// No ostree deployment is booted.
    HostNotImageMode: Fatal, "The agent has nothing to do on this host: `systemctl disable --now rebase-agent`.";
    /// The host has no tool that can rebase it.
    HostUnsupported: Fatal, "Composefs-native hosts are not supported; else install rpm-ostree or bootc in the image, as the message says.";
    /// The host tool is in use, or a task is being finished.
    HostBusy: Transient, "Wait, or see the active transaction in `rpm-ostree status`.";
    /// The host tool gave an answer that cannot be right.
    HostConfused: Transient, "Compare `rpm-ostree status --json` and `journalctl -u rpm-ostreed`.";
    /// Another daemon writes this Node's state, so the agent does nothing.
    OtherDaemon: Waiting, "Keep the Machine Config Daemon off the node, or run `systemctl disable --now rebase-agent`.";
    /// The annotations of a new Node are being published.
    FirstBoot: Progress, "Nothing to do.";
    /// The rendered config of the booted image is not known.
    BootedConfigUnknown: Fatal, "Build the image with on-cluster layering, or annotate the Node with `currentConfig` and `currentImage`.";
    /// The pool has no layered image, so there is nothing to follow.
    NotLayered: Waiting, "Give the pool a MachineOSConfig if it needs a layered image.";
    /// The pool no longer has a layered image.
    LayeringReverted: Fatal, "Hand the node back to the Machine Config Daemon, or give the pool a MachineOSConfig again and raise `maxUnavailable` for a while.";
    /// `desiredImage` is not a pullspec pinned by digest.
    ImageMalformed: Fatal, "Correct `status.currentImagePullSpec` of the pool's MachineOSConfig.";
    /// The image's name is too long for the name of a systemd unit (bootc only).
    ImageNameTooLong: Fatal, "Push the image under a shorter name and set that in the pool.";
    /// `desiredImage` is set and `desiredConfig` is not.
    ConfigMissing: Fatal, "The machine-config-controller writes both: see its log.";
    /// An image that is not desired is staged by hand.
    StagedByOther: Waiting, "The agent drops it once and waits if it is staged again: `rpm-ostree cleanup -p`, for bootc `ostree admin undeploy 0`.";
    /// The desired rendered config is newer than the image.
    ConfigAheadOfImage: Waiting, "Rebuild: annotate the MachineOSConfig with `machineconfiguration.openshift.io/rebuild`.";
    /// A kernel argument of the rendered config is not in effect.
    KernelArgumentMissing: Fatal, "Put it at the end with `rpm-ostree kargs --editor` and reboot, or take it out of the config.";
    /// kubelet.service is not active yet.
    HealthPending: Waiting, "Wait; after 10 minutes the node is Degraded.";
    /// kubelet.service was not active for 10 minutes, so the node stays cordoned.
    HealthFailed: Fatal, "See `journalctl -u kubelet`. To go back, set the pool back, run `rpm-ostree rollback` and reboot.";
    /// The agent waits for the drain controller to uncordon the node.
    UncordonPending: Waiting, "Wait; after 10 minutes the node is Degraded.";
    /// The drain controller has not uncordoned the node for 10 minutes.
    UncordonLate: Fatal, "See the machine-config-controller's log. The agent keeps waiting.";
    /// The node runs the desired image and reports it.
    Settling: Progress, "Nothing to do.";
    /// The host booted the image and went back to the one before.
    RolledBack: Fatal, "See `journalctl -b -1`. Set another image in the pool, or delete the annotation `rebase-agent.openshift.io/attempt`.";
    /// Two boots did not come up in the image.
    NeverCameUp: Fatal, "See `journalctl -b -1 -u ostree-finalize-staged`. Set another image in the pool, or delete the annotation `rebase-agent.openshift.io/attempt`.";
    /// The image's signature is being verified.
    Verifying: Progress, "Nothing to do.";
    /// The policy requires a signature and the registry has none.
    SignatureMissing: Awaited, "Sign the image (cosign 3 with `--new-bundle-format=false`), and enable attachments in registries.d for the registry and its mirrors.";
    /// The image is signed, but not by the key or identity that the policy accepts.
    SignatureRejected: Fatal, "Sign with the policy's key. cosign's default identity has no tag: sign as `repository:tag`, or use `matchRepository` in the policy.";
    /// The policy rejects the image outright.
    PolicyRejects: Fatal, "Change the policy with a ClusterImagePolicy, or set another image in the pool.";
    /// The policy accepts the image without a signature.
    PolicyAcceptsAnything: Fatal, "Create a ClusterImagePolicy for the image's repository.";
    /// The signature policy, or a key that it names, cannot be read or parsed.
    PolicyInvalid: Fatal, "The message names the file and what is wrong with it.";
    /// The engine, skopeo, is missing, is too old, or does not start.
    EngineUnfit: Fatal, "Build the image with skopeo 1.14 or later.";
    /// The policy asks for GPG, which needs a directory that can be written.
    GpgNeedsScratch: Fatal, "Put the drop-in `10-gpg.conf` into the image, or sign with sigstore.";
    /// The node's registries.conf or registries.d has an error, or blocks the registry.
    RegistryConfigInvalid: Fatal, "The message names the file and the line.";
    /// The node has no file descriptor, process or memory left for the engine.
    ResourcesExhausted: Transient, "Find the process that uses them: `systemctl status`, `free`, `cat /proc/sys/fs/file-nr`.";
    /// The registry does not have the image.
    ManifestMissing: Awaited, "Push the image, or mirror it by digest.";
    /// The registry rejects the credentials.
    RegistryDenied: Transient, "Correct the ostree auth file, `/etc/ostree/auth.json`, which is the pull secret.";
    /// The registry's certificate is not trusted.
    RegistryUntrusted: Transient, "Add its CA to `/etc/containers/certs.d`, and check the node's clock.";
    /// The registry does not answer, or its answer cannot be understood.
    RegistryUnreachable: Transient, "Check the network, the proxy and the registry that the message names.";
    /// The image's manifest or config is damaged, missing or too large, or not that of an OS image.
    ImageInvalid: Fatal, "Build or push the image again.";
    /// The image is built for another architecture.
    WrongArchitecture: Fatal, "Build the image for this architecture, or as an index of several.";
    /// The image has neither the label `ostree.bootable` nor `containers.bootc`.
    NotBootable: Fatal, "Build the image from an image-mode base.";
    /// The image was created before `--minimum-created`, or has no usable time of creation.
    TooOld: Fatal, "Build and sign a newer image, or lower `--minimum-created`.";
    /// A transaction or lock of another program blocks the host tool.
    ForeignTransaction: Waiting, "See `rpm-ostree status`, and end it with `rpm-ostree cancel`.";
    /// The image is pulled while workloads run. It is not staged yet.
    Fetching: Progress, "Nothing to do: `systemctl status rebase-agent` shows the progress.";
    /// The node runs the desired image and pulls the pool's next one before its turn.
    Prefetching: Progress, "Nothing to do. To stop it, set the annotation `rebase-agent.openshift.io/prefetch` to an empty value.";
    /// The disk has no room to pull the pool's next image before this node's turn.
    PrefetchNoSpace: Waiting, "Free space in `/sysroot`: `df -h /sysroot`, `rpm-ostree cleanup -r`. At its turn the node tries all the same.";
    /// The pool's next image cannot be pulled before this node's turn.
    PrefetchFailed: Waiting, "The message says why. The agent tries again every 10 minutes, and at the node's turn.";
    /// The image is staged while workloads run.
    Staging: Progress, "Nothing to do: `systemctl status rebase-agent` shows the progress.";
    /// Packages are layered on the host by hand.
    LayeredPackages: Fatal, "Remove them with `rpm-ostree reset`, or put them into the image.";
    /// `/boot` has no room for another kernel.
    BootFull: Fatal, "Remove the rollback deployment with `rpm-ostree cleanup -r`.";
    /// The disk has no room for the image.
    DiskFull: Fatal, "Free space in `/sysroot`: `df -h /sysroot`, `rpm-ostree cleanup -r`.";
    /// The host tool could not stage the image.
    StageFailed: Transient, "The message has rpm-ostree's error; for bootc see the journal of the unit that it names.";
    /// The transaction was cancelled.
    Cancelled: Transient, "Nothing to do: it is started again if the image is still desired.";
    /// The agent sets the kernel arguments of the rendered config on the staged image.
    KernelArguments: Progress, "Nothing to do.";
    /// bootc cannot set the kernel arguments of the staged image.
    KernelArgumentsUnsupported: Fatal, "Let the image bring them in `/usr/lib/bootc/kargs.d`.";
    /// The hold annotation keeps the image from being staged, and the node from drain and reboot.
    Held: Waiting, "Remove the annotation `rebase-agent.openshift.io/hold`.";
    /// A block inhibitor keeps the machine from rebooting.
    Inhibited: Waiting, "See `systemd-inhibit --list` for the program that holds it.";
    /// The machine has not been up for `--uptime-floor`.
    UptimeFloor: Waiting, "Wait.";
    /// `ostree-finalize-staged.service` is started; without it the image would not boot.
    Finalizer: Progress, "Nothing to do.";
    /// The Node names an image as current that is not booted, as after a restore of etcd; the drain waits a random time.
    RestoreSpread: Waiting, "Wait; at most 30 minutes.";
    /// The agent waits for the drain controller to drain the node.
    DrainPending: Waiting, "Wait; after an hour the node is Degraded.";
    /// The drain has taken over an hour.
    DrainStuck: Fatal, "Look for a PodDisruptionBudget that allows no eviction: `oc get pdb -A`. The drain controller keeps trying.";
    /// The node was uncordoned by hand after the drain, and is drained again.
    UncordonedByOther: Waiting, "Use the annotation `rebase-agent.openshift.io/hold` to keep the node in service.";
    /// The machine is being rebooted.
    Rebooting: Progress, "Nothing to do.";
    /// logind refused the reboot.
    RebootRefused: Transient, "See `systemd-inhibit --list` and `journalctl -u systemd-logind`.";
    /// A unit that was started has failed.
    UnitFailed: Transient, "See `journalctl -u` of the unit that the message names.";
    /// A call took longer than its deadline.
    DeadlineExceeded: Transient, "The registry or daemon that the message names accepts calls and does not answer.";
}

impl Reason {
    /// Whether the image itself is refused, as opposed to an error that gave no result.
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

    /// Whether the node runs the desired image and the agent has nothing left to do, also if it reports a warning.
    #[must_use]
    pub fn is_at_rest(self) -> bool {
        matches!(
            self,
            Self::Done
                | Self::RunsUntrusted
                | Self::RollbackQueued
                | Self::Prefetching
                | Self::PrefetchNoSpace
                | Self::PrefetchFailed
        )
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
