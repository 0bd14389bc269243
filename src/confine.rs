//! Landlock: this process and its children cannot change the file system, whatever the unit file says. Applied before
//! any thread exists and before any byte from outside is read.

use std::path::Path;

use landlock::{
    ABI, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};

/// Where the kernel lists its security modules, if securityfs is mounted.
const MODULES: &str = "/sys/kernel/security/lsm";
/// The first ABI that knows every way to change a file: it adds truncation. Linux 6.2.
const WRITES: ABI = ABI::V3;

/// How far the kernel went along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// Every right to change something that this agent knows of is given up.
    On,
    /// No file can be changed; the kernel knows no rights yet for device ioctls, or for binding ports.
    FilesOnly,
    /// The kernel is so old that it knows no right to truncate.
    Partial,
    /// The kernel has Landlock, but a seccomp filter, or whoever else made this sandbox, denies its calls.
    Denied,
    /// The kernel was built without Landlock, or it is switched off.
    Lacking,
    /// One of the two; without securityfs they cannot be told apart.
    Unclear,
}

impl Confinement {
    /// Whether no file can be created, deleted, written or truncated.
    #[must_use]
    pub fn holds(self) -> bool {
        matches!(self, Self::On | Self::FilesOnly)
    }

    /// For people: `StatusText` and the first message of a run end with it.
    #[must_use]
    pub fn sentence(self) -> &'static str {
        match self {
            Self::On => "Landlock denies every write",
            Self::FilesOnly => "Landlock denies every write to files; this kernel cannot deny more",
            Self::Partial => "Landlock denies what this old kernel knows of writing, which is not truncation",
            Self::Denied => "Landlock's calls are denied: is SystemCallFilter= of a drop-in in the way?",
            Self::Lacking => "this kernel lacks Landlock; the unit's own sandbox is all there is",
            Self::Unclear => "Landlock's calls fail: this kernel lacks it, or a sandbox denies them",
        }
    }
}

/// Why confinement failed.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// prctl(2).
    #[error("cannot set no_new_privs: {0}")]
    NoNewPrivileges(#[from] nix::Error),
    /// Landlock's own calls.
    #[error("cannot restrict file access with Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// A path that must stay writable.
    #[error("cannot open a path that stays writable: {0}")]
    Path(#[from] landlock::PathFdError),
    /// It was demanded.
    #[error("--require-landlock: {}", .0.sentence())]
    Required(Confinement),
}

/// Gives up every right to write, create, delete, link or truncate, to use devices and to listen on TCP ports; all
/// that stays writable is `/dev/null`, which children get for their output, and `scratch`, which only a unit drop-in
/// sets. Whatever falls short of that for files is an error if it is `required`.
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

/// A denied call looks like one that the kernel does not know; the kernel's own list of modules tells them apart. Pure.
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
    fn kernels_are_told_apart() {
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
        // Whatever the kernel could do: what it did not do does not hold.
        assert!(!classify(&kernel(ABI::V5), &NotEnforced, modules).holds());
        assert!(Confinement::FilesOnly.holds() && !Confinement::Partial.holds());
    }
}
