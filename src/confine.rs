//! Landlock: this process and its children cannot change the file system, whatever the unit file says. Applied before
//! any thread exists and before any byte from outside is read.

use std::path::Path;

use landlock::{
    ABI, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus,
};

/// How far the kernel went along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// Every write right that this agent knows of is denied.
    Full,
    /// The kernel is older and knows fewer rights.
    Partial,
    /// The kernel has no Landlock, or it is switched off.
    Absent,
}

/// Why confinement failed although the kernel offers it.
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
}

/// Gives up every right to write, create, delete, link or truncate; all that stays writable is `/dev/null`, which
/// children get for their output, and `scratch`, which only a unit drop-in sets.
///
/// # Errors
/// See [`ConfineError`].
pub fn confine(scratch: Option<&Path>) -> Result<Confinement, ConfineError> {
    nix::sys::prctl::set_no_new_privs()?;
    let writes = AccessFs::from_write(ABI::V5);
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(writes)?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/dev/null")?, AccessFs::WriteFile))?;
    if let Some(scratch) = scratch {
        ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(scratch)?, writes))?;
    }
    Ok(match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Confinement::Full,
        RulesetStatus::PartiallyEnforced => Confinement::Partial,
        RulesetStatus::NotEnforced => Confinement::Absent,
    })
}
