//! The methods that create a transaction, with the options that the daemon reads.

use crate::bus::{Call, Dict, Failure, lookup_bool, lookup_str};
use crate::{Version, failed};

/// The work of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Job {
    /// Pulls an image and stages it.
    Rebase(Rebase),
    /// Drops deployments of these kinds.
    Cleanup(Vec<String>),
    /// Stages the first deployment again, with other arguments.
    KernelArguments(KernelArguments),
    /// Makes the rollback deployment the first in boot order.
    Rollback,
    /// Looks for a newer image of the same name.
    Upgrade,
    /// Unlocks the staged deployment and reboots.
    Finalize(Finalize),
}

/// The parameters of `Rebase`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebase {
    /// The image.
    pub reference: String,
    /// `download-only`: ends before a deployment is made.
    pub download_only: bool,
    /// `cache-only`: has no effect on a container image.
    pub cache_only: bool,
    /// `lock-finalization`: the deployment is staged locked.
    pub locked: bool,
}

/// The parameters of `KernelArgs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelArguments {
    /// The arguments that the client found.
    pub existing: String,
    /// Appended.
    pub added: Vec<String>,
    /// Replaced.
    pub replaced: Vec<String>,
    /// Deleted.
    pub removed: Vec<String>,
    /// `final-kernel-args`: replaces all others but `existing`.
    pub last: Option<String>,
    /// `lock-finalization`.
    pub locked: bool,
}

/// The options of `FinalizeDeployment`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finalize {
    /// `checksum`: of a container image, the digest of its manifest.
    pub checksum: Option<String>,
    /// `allow-missing-checksum`.
    pub allow_missing_checksum: bool,
    /// `allow-unlocked`.
    pub allow_unlocked: bool,
}

/// The kinds of `Cleanup`.
const KINDS: [&str; 4] = ["base", "pending-deploy", "rollback-deploy", "repomd"];

impl Job {
    /// The job of a method call, with its title; `None` for another method.
    pub(crate) fn of(call: &Call, version: Version) -> Result<Option<(Self, String)>, Failure> {
        let body = call.message.body();
        let (job, options, title) = match call.member.as_str() {
            "Rebase" => {
                let (options, reference, _packages): (Dict, String, Vec<String>) = body.deserialize()?;
                let job = Rebase {
                    reference,
                    download_only: flag(&options, "download-only"),
                    cache_only: flag(&options, "cache-only"),
                    locked: version.locks() && flag(&options, "lock-finalization"),
                };
                (Self::Rebase(job), options, "rebase")
            }
            "Cleanup" => {
                let (kinds,): (Vec<String>,) = body.deserialize()?;
                if let Some(kind) = kinds.iter().find(|kind| !KINDS.contains(&kind.as_str())) {
                    return Err(failed(format!("Invalid cleanup type: {kind}")));
                }
                (Self::Cleanup(kinds), Dict::new(), "cleanup")
            }
            "KernelArgs" => {
                type Strings = Vec<String>;
                let (existing, added, replaced, removed, options): (String, Strings, Strings, Strings, Dict) =
                    body.deserialize()?;
                let last = lookup_str(&options, "final-kernel-args");
                let locked = version.locks() && flag(&options, "lock-finalization");
                (
                    Self::KernelArguments(KernelArguments { existing, added, replaced, removed, last, locked }),
                    options,
                    "kargs",
                )
            }
            "Rollback" => (Self::Rollback, body.deserialize::<(Dict,)>()?.0, "rollback"),
            "Upgrade" => (Self::Upgrade, body.deserialize::<(Dict,)>()?.0, "upgrade"),
            "FinalizeDeployment" if version.locks() => {
                let (options,): (Dict,) = body.deserialize()?;
                let job = Finalize {
                    checksum: lookup_str(&options, "checksum"),
                    allow_missing_checksum: flag(&options, "allow-missing-checksum"),
                    allow_unlocked: flag(&options, "allow-unlocked"),
                };
                (Self::Finalize(job), options, "finalize-deployment")
            }
            _ => return Ok(None),
        };
        check_options(&options)?;
        let title = lookup_str(&options, "initiating-command-line").unwrap_or_else(|| title.to_owned());
        Ok(Some((job, title)))
    }

    /// Whether it makes a deployment: such a transaction gets its title when it starts.
    pub(crate) fn deploys(&self) -> bool {
        matches!(self, Self::Rebase(_) | Self::Upgrade)
    }
}

impl Rebase {
    /// Options that exclude each other.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.cache_only && self.download_only {
            return Err("Can't specify cache-only and download-only".to_owned());
        }
        Ok(())
    }
}

fn flag(options: &Dict, key: &str) -> bool {
    lookup_bool(options, key) == Some(true)
}

/// Options of the original that the stand-ins do not support are refused, so that no test relies on them. Options that
/// the original does not know are ignored.
fn check_options(options: &Dict) -> Result<(), Failure> {
    const FLAGS: [&str; 4] = ["no-pull-base", "dry-run", "reboot", "apply-live"];
    const OTHERS: [&str; 3] = ["revision", "append-if-missing", "delete-if-present"];
    let set = FLAGS.into_iter().find(|key| flag(options, key));
    let present = OTHERS.into_iter().find(|key| options.contains_key(*key));
    let older = Some("allow-downgrade").filter(|key| lookup_bool(options, key) == Some(false));
    match set.or(present).or(older) {
        Some(key) => Err(failed(format!("the stand-in for rpm-ostree does not do `{key}`"))),
        None => Ok(()),
    }
}
