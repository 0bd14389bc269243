//! `bootc status --format=json --format-version=1`, from the existing deployments.

use anyhow::Result;
use ostree_ext::container::store::query_image_commit;
use ostree_ext::container::{OstreeImageReference, SignatureSource};
use ostree_ext::ostree::{self, Deployment};
use ostree_ext::sysroot::SysrootLock;
use serde_json::{Value, json};

/// Groups of rpm-ostree in an origin, which bootc does not support.
const INCOMPATIBLE: [&str; 4] = ["rpmostree", "packages", "overrides", "modules"];

/// The deployments by their role.
pub struct Host {
    repo: ostree::Repo,
    /// The booted deployment.
    pub booted: Option<Deployment>,
    staged: Option<Deployment>,
    rollback: Option<Deployment>,
    others: Vec<Deployment>,
    rollback_queued: bool,
}

impl Host {
    /// Reads a sysroot.
    pub fn of(sysroot: &SysrootLock) -> Result<Self> {
        let booted = sysroot.booted_deployment();
        let (mut related, mut others): (Vec<_>, Vec<_>) = sysroot
            .deployments()
            .into_iter()
            .filter(|one| booted.as_ref().is_none_or(|booted| !booted.equal(one)))
            .partition(|one| booted.as_ref().is_none_or(|booted| booted.osname() == one.osname()));
        let staged = related.iter().position(Deployment::is_staged).map(|place| related.remove(place));
        let mut related = related.into_iter();
        let rollback = related.next();
        others.splice(..0, related);
        let rollback_queued = match (&booted, &rollback) {
            (Some(booted), Some(rollback)) => rollback.index() < booted.index(),
            (None, rollback) => rollback.is_some(),
            (Some(_), None) => false,
        };
        Ok(Self { repo: sysroot.repo(), booted, staged, rollback, others, rollback_queued })
    }

    /// The image that is to run: the staged one, or else the booted one.
    pub fn specified(&self) -> Option<OstreeImageReference> {
        self.staged.as_ref().or(self.booted.as_ref()).and_then(image)
    }

    fn entry(&self, deployment: &Deployment) -> Result<Value> {
        let is_incompatible =
            deployment.origin().is_some_and(|origin| INCOMPATIBLE.iter().any(|it| origin.has_group(it)));
        let reference = image(deployment).filter(|_| !is_incompatible);
        let shown = match &reference {
            None => Value::Null,
            Some(reference) => {
                let state = query_image_commit(&self.repo, &deployment.csum())?;
                json!({
                    "image": specification(reference),
                    "version": state.version(),
                    "timestamp": state.configuration.created(),
                    "imageDigest": state.manifest_digest.to_string(),
                    "architecture": state.configuration.architecture().to_string(),
                })
            }
        };
        let lock = guest::is_locked();
        Ok(json!({
            "image": shown,
            "cachedUpdate": null,
            "incompatible": is_incompatible,
            "pinned": deployment.is_pinned(),
            "softRebootCapable": false,
            "downloadOnly": deployment.is_staged() && (lock.in_record || lock.by_file),
            "store": reference.map(|_| "ostreeContainer"),
            "ostree": {
                "checksum": deployment.csum().as_str(),
                "deploySerial": deployment.deployserial(),
                "stateroot": deployment.osname().as_str(),
            },
            "composefs": null,
        }))
    }

    fn document(&self) -> Result<Value> {
        let entry = |deployment: &Option<Deployment>| deployment.as_ref().map(|one| self.entry(one)).transpose();
        let mut status = json!({
            "staged": entry(&self.staged)?,
            "booted": entry(&self.booted)?,
            "rollback": entry(&self.rollback)?,
            "rollbackQueued": self.rollback_queued,
            "type": self.booted.as_ref().map(|_| "bootcHost"),
            "usrOverlay": null,
        });
        if !self.others.is_empty() {
            let others: Result<Vec<Value>> = self.others.iter().map(|one| self.entry(one)).collect();
            status["otherDeployments"] = others?.into();
        }
        Ok(json!({
            "apiVersion": "org.containers.bootc/v1",
            "kind": "BootcHost",
            "metadata": { "name": "host" },
            "spec": {
                "image": self.specified().as_ref().map(specification),
                "bootOrder": if self.rollback_queued { "rollback" } else { "default" },
            },
            "status": status,
        }))
    }
}

/// Prints it.
pub fn print(sysroot: &SysrootLock) -> Result<()> {
    println!("{}", Host::of(sysroot)?.document()?);
    Ok(())
}

fn image(deployment: &Deployment) -> Option<OstreeImageReference> {
    guest::origin_reference(deployment)?.as_str().try_into().ok()
}

fn specification(reference: &OstreeImageReference) -> Value {
    let mut shown = json!({
        "image": reference.imgref.name,
        "transport": reference.imgref.transport.serializable_name(),
    });
    match &reference.sigverify {
        SignatureSource::OstreeRemote(remote) => shown["signature"] = json!({ "ostreeRemote": remote }),
        SignatureSource::ContainerPolicy => shown["signature"] = "containerPolicy".into(),
        SignatureSource::ContainerPolicyAllowInsecure => {}
    }
    shown
}
