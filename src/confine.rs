//! Landlock: this process and its children cannot change the file system, independent of the unit file. Applied before
//! any thread exists and before any untrusted input is read.

use std::path::Path;

use landlock::{
    ABI, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};

/// The kernel's list of security modules, if securityfs is mounted.
const MODULES: &str = "/sys/kernel/security/lsm";
/// The first Landlock ABI that covers every change of a file: it adds truncation (Linux 6.2).
const WRITES: ABI = ABI::V3;

/// The confinement that the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// All rights that the agent asks to deny are denied.
    On,
    /// No file can be changed; the kernel is too old to deny device ioctls or the binding of ports.
    FilesOnly,
    /// The kernel is too old to deny truncation.
    Partial,
    /// The kernel has Landlock, but a seccomp filter or another sandbox denies its system calls.
    Denied,
    /// The kernel was built without Landlock, or Landlock is switched off.
    Lacking,
    /// Denied or lacking; without securityfs the two cannot be distinguished.
    Unclear,
}

impl Confinement {
    /// Whether no file can be created, deleted, written or truncated.
    #[must_use]
    pub fn holds(self) -> bool {
        matches!(self, Self::On | Self::FilesOnly)
    }

    /// A sentence for people, at the end of `StatusText` and of the first log message.
    #[must_use]
    pub fn sentence(self) -> &'static str {
        match self {
            Self::On => "Landlock denies every write",
            Self::FilesOnly => "Landlock denies every write to files; this kernel cannot deny more",
            Self::Partial => "Landlock denies every write but truncation, which this kernel is too old to deny",
            Self::Denied => "a sandbox denies Landlock's system calls: check SystemCallFilter= in the unit's drop-ins",
            Self::Lacking => "this kernel lacks Landlock; only the unit's own sandbox confines the agent",
            Self::Unclear => "Landlock's system calls fail: this kernel lacks Landlock, or a sandbox denies them",
        }
    }
}

/// An error of confinement.
#[allow(missing_docs, reason = "each variant's message is its documentation")]
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("cannot set no_new_privs: {0}")]
    NoNewPrivileges(#[from] nix::Error),
    #[error("cannot restrict file access with Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    #[error("cannot open a path that must stay writable: {0}")]
    Path(#[from] landlock::PathFdError),
    #[error("--require-landlock is set, but {}", .0.sentence())]
    Required(Confinement),
}

/// Gives up every right to write, create, delete, link or truncate files, to use devices and to listen on TCP ports. Only
/// `/dev/null`, for the output of children, and `scratch`, which a unit drop-in sets, stay writable. If `required`, a
/// kernel that cannot deny every change of a file is an error.
///
/// # Errors
/// See [`ConfineError`].
pub fn confine(scratch: Option<&Path>, required: bool) -> Result<Confinement, ConfineError> {
    nix::sys::prctl::set_no_new_privs()?;
    let changes = AccessFs::from_write(ABI::V5);
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(changes)?
        .handle_access(AccessNet::BindTcp)?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/dev/null")?, AccessFs::WriteFile))?;
    if let Some(scratch) = scratch {
        ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(scratch)?, changes))?;
    }
    let status = ruleset.restrict_self()?;
    let modules = std::fs::read_to_string(MODULES).ok();
    let confinement = classify(&status.landlock, &status.ruleset, modules.as_deref());
    match confinement.holds() || !required {
        true => Ok(confinement),
        false => Err(ConfineError::Required(confinement)),
    }
}

/// Classifies the result. A denied system call looks like one that the kernel lacks; the kernel's list of modules
/// distinguishes them. Pure.
fn classify(kernel: &LandlockStatus, ruleset: &RulesetStatus, modules: Option<&str>) -> Confinement {
    let listed = modules.map(|modules| modules.trim().split(',').any(|module| module == "landlock"));
    match (kernel, ruleset) {
        (LandlockStatus::Available { .. }, RulesetStatus::FullyEnforced) => Confinement::On,
        (LandlockStatus::Available { effective_abi, .. }, RulesetStatus::PartiallyEnforced) => {
            if *effective_abi >= WRITES { Confinement::FilesOnly } else { Confinement::Partial }
        }
        (LandlockStatus::NotEnabled, _) => Confinement::Lacking,
        _ => match listed {
            Some(true) => Confinement::Denied,
            Some(false) => Confinement::Lacking,
            None => Confinement::Unclear,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_landlock_status_is_classified() {
        use RulesetStatus::{FullyEnforced, NotEnforced, PartiallyEnforced};
        let kernel = |effective_abi| LandlockStatus::Available { effective_abi, kernel_abi: None };
        let modules = Some("lockdown,capability,landlock,selinux\n");
        assert_eq!(classify(&kernel(ABI::V5), &FullyEnforced, modules), Confinement::On);
        assert_eq!(classify(&kernel(ABI::V3), &PartiallyEnforced, modules), Confinement::FilesOnly);
        assert_eq!(classify(&kernel(ABI::V2), &PartiallyEnforced, modules), Confinement::Partial);
        assert_eq!(classify(&LandlockStatus::NotImplemented, &NotEnforced, modules), Confinement::Denied);
        assert_eq!(
            classify(&LandlockStatus::NotImplemented, &NotEnforced, Some("capability,selinux\n")),
            Confinement::Lacking
        );
        assert_eq!(classify(&LandlockStatus::NotEnabled, &NotEnforced, None), Confinement::Lacking);
        assert_eq!(classify(&LandlockStatus::NotImplemented, &NotEnforced, None), Confinement::Unclear);
        // A kernel with Landlock that did not enforce it confines nothing.
        assert!(!classify(&kernel(ABI::V5), &NotEnforced, modules).holds());
        assert!(Confinement::FilesOnly.holds() && !Confinement::Partial.holds());
    }
}
