//! `status`: prints the desired, booted and staged image, and the rule that the node waits on.

use std::fmt::Write as _;

use serde::Serialize;

use super::{Decided, Seen, exit_code, foreign, line, now, print, rule, see};
use crate::cli::{CONFINEMENT, Look};
use crate::decide::decide;
use crate::host::leftovers::{Leftovers, leftovers};
use crate::model::{
    Deployment, Digest, HostFacts, ImageFacts, MachineFacts, NodeFacts, Observed, PinnedImage, Reading, is_image,
    name_of, printable,
};
use crate::observe::Neighbours;
use crate::trust::NodePolicy;

/// Longest row about who vouched for the image, in characters.
const MAX_VERIFIED: usize = 800;

/// Prints the status and returns the exit code.
pub(super) async fn status(neighbours: &Neighbours, look: &Look) -> u8 {
    if let Some(code) = foreign(neighbours, look.json) {
        return code;
    }
    let (seen, service) = tokio::join!(see(neighbours, look), neighbours.host.service_status());
    let Seen { observed, memory, trust } = seen;
    let decision = decide(&observed, &memory, &look.tuning.limits(), now(neighbours));
    let code = exit_code(&observed, &decision);
    let service = match service {
        Ok((status, active)) => Service::new(active, &status),
        Err(error) => Service::new("unknown".to_owned(), &error.to_string()),
    };
    let Observed { cluster, host, machine, .. } = observed;
    let backend = match neighbours.host.backend().await {
        Ok(chosen) => format!("{}: {}", chosen.backend, chosen.why),
        Err(error) => format!("none: {error}"),
    };
    let leftovers = leftovers(neighbours.host.root());
    let decision = Decided::from(&decision);
    let status = Status { backend, cluster, host, machine, trust, leftovers, service, decision };
    print(look.json, &status, || status.text());
    code
}

/// The output of `status`.
#[derive(Debug, Serialize)]
struct Status {
    /// The host tool and why it was chosen, or why there is none.
    backend: String,
    /// The Node, or why it cannot be read.
    cluster: Reading<NodeFacts>,
    /// Deployments, or why they cannot be read.
    host: Reading<HostFacts>,
    /// The machine, or why it cannot be read.
    machine: Reading<MachineFacts>,
    /// The rule of the policy that demands a signature of the desired image, or why the image is refused.
    trust: Option<Trust>,
    /// The files of the MCD in `/etc`.
    leftovers: Option<Leftovers>,
    /// The status of the running service.
    service: Service,
    /// The decision of a new process on these facts.
    decision: Decided,
}

/// The result of the policy for the desired image.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Trust {
    /// This rule demands a signature, which was not checked.
    Required(String),
    /// The signature was verified by this command.
    Verified(Box<ImageFacts>),
    /// The image is refused, for this reason.
    Refused(String),
}

/// The state of rebase-agent.service.
#[derive(Debug, Serialize)]
struct Service {
    /// `ActiveState`.
    active: String,
    /// `StatusText`: the rule that the running service applies.
    status: String,
    /// The sentence about its confinement, from its status text.
    confinement: Option<String>,
}

impl Service {
    /// Splits the status text into the rule and the sentence about confinement.
    fn new(active: String, status_text: &str) -> Self {
        let split = status_text.rsplit_once(CONFINEMENT);
        let (status, confinement) = split.map_or((status_text, None), |(status, said)| (status, Some(said.to_owned())));
        Self { active, status: status.to_owned(), confinement }
    }
}

/// Returns the rule of the policy that applies to `desired`, without asking the registry; `None` if no valid image is
/// desired.
pub(super) fn required(policy: &std::path::Path, desired: Option<&PinnedImage>) -> Option<Trust> {
    let image = desired?;
    Some(match NodePolicy::read(policy).and_then(|policy| policy.gate(image)) {
        Ok(scope) => Trust::Required(scope),
        Err(error) => Trust::Refused(error.to_string()),
    })
}

impl Status {
    /// The text for people, in 80 columns.
    fn text(&self) -> String {
        let mut out = String::new();
        match &self.cluster {
            Reading::Known(node) => self.node(&mut out, node),
            Reading::Unknown(fault) => line(&mut out, "Node", &format!("unknown: {}", fault.message)),
        }
        match &self.host {
            // `bootc status` cannot run during a transaction.
            Reading::Known(host) if host.deployments.is_empty() && host.transaction.is_some() => {
                line(&mut out, "Host", "bootc cannot report it until the transaction has ended");
                busy(&mut out, host);
            }
            Reading::Known(host) => {
                let desired = self.desired();
                let row = |deployment: Option<&Deployment>| {
                    deployment.map_or_else(|| "none".to_owned(), |d| describe(d, desired.as_ref()))
                };
                line(&mut out, "Booted", &row(host.booted()));
                line(&mut out, "Staged", &row(host.staged()));
                line(&mut out, "Rollback", &row(host.rollback()));
                // Only shown if it is neither the staged nor the booted deployment.
                if let Some(next) = host.next_boot().filter(|next| !next.booted && !next.staged) {
                    let text = format!("{}; it is first in boot order", describe(next, desired.as_ref()));
                    line(&mut out, "Next boot", &text);
                }
                busy(&mut out, host);
            }
            Reading::Unknown(fault) => line(&mut out, "Host", &format!("unknown: {}", fault.message)),
        }
        line(&mut out, "Backend", &self.backend);
        let trust = match &self.trust {
            None => "no valid image is desired".to_owned(),
            Some(Trust::Required(scope)) => {
                format!("rule {scope} demands a signature (`status --verify` checks it)")
            }
            Some(Trust::Verified(facts)) => {
                format!("verified: the signature meets rule {}, {} MiB", facts.vouched_by, facts.size >> 20)
            }
            Some(Trust::Refused(why)) => format!("refused: {why}"),
        };
        line(&mut out, "Trust", &trust);
        if let Reading::Known(node) = &self.cluster {
            line(&mut out, "Drain", &drain(node));
            let attempt = node.attempt.as_ref().map_or_else(
                || "none".to_owned(),
                |attempt| {
                    format!("{} of {} in boot {}", attempt.count, attempt.image.digest().short(), attempt.boot_id)
                },
            );
            line(&mut out, "Attempt", &attempt);
            line(&mut out, "Hold", node.hold.as_deref().unwrap_or("none"));
            if let Some(verified) = &node.verified {
                let image = verified.image.split_once('@').map_or(verified.image.as_str(), |(_, digest)| digest);
                let text = format!("{} by rule {}, {}, {}", image, verified.rule, verified.key, verified.time);
                line(&mut out, "Verified", &printable(&text, MAX_VERIFIED));
            }
            if let Some(next) = &node.prefetch {
                line(&mut out, "Prefetch", if next.as_str().is_empty() { "none" } else { next.as_str() });
            }
            if let Some(why) = &node.untrusted {
                line(&mut out, "Untrusted", why);
            }
        }
        if let Some(leftovers) = self.leftovers.as_ref().filter(|leftovers| !leftovers.differing.is_empty()) {
            line(&mut out, "MCD", &shadows(leftovers));
        }
        let service = match self.service.status.as_str() {
            "" => self.service.active.clone(),
            status => format!("{}; {status}", self.service.active),
        };
        line(&mut out, "Service", &service);
        if let Some(confinement) = &self.service.confinement {
            line(&mut out, "Confined", confinement);
        }
        // The running service knows more than this command. Print this command's rule only if it differs.
        if !self.service.status.starts_with(self.decision.reason.as_str()) {
            line(&mut out, "Rule", &rule(&self.decision));
        }
        out
    }

    fn desired(&self) -> Option<PinnedImage> {
        self.cluster.known()?.desired().cloned()
    }

    fn node(&self, out: &mut String, node: &NodeFacts) {
        let state = node.state.as_deref().unwrap_or("no state yet");
        line(out, "Node", &format!("{}: {state}", node.name));
        if let Some(reason) = node.reason.as_deref().filter(|reason| !reason.is_empty()) {
            line(out, "", reason);
        }
        let image = match (&node.desired_image, self.desired()) {
            (None, _) => "no image".to_owned(),
            (Some(_), Some(image)) => format!("{} {}", image.name(), image.digest().short()),
            (Some(text), None) => format!("`{}`, which is not usable", text.as_str()),
        };
        let config = node.desired_config.as_deref().unwrap_or("no config");
        line(out, "Desired", &format!("{image} for {config}"));
    }
}

fn describe(deployment: &Deployment, desired: Option<&PinnedImage>) -> String {
    let name = deployment.reference.as_deref().map_or("no container image", name_of);
    let digest = deployment.digest.as_ref().map_or("", Digest::short);
    let mut text = format!("{name} {digest}");
    if desired.is_some_and(|desired| is_image(deployment, desired, None)) {
        text.push_str(" (desired)");
    }
    if let Some(config) = &deployment.rendered_config {
        let _ = write!(text, ", built from {config}");
    }
    if let Some(version) = &deployment.version {
        let _ = write!(text, ", version {version}");
    }
    if deployment.layered {
        text.push_str(", with packages layered by hand");
    }
    if deployment.locked {
        text.push_str(", locked: no reboot boots it before it is unlocked");
    } else if deployment.staged {
        text.push_str(", not locked: any reboot boots it");
    }
    text
}

fn busy(out: &mut String, host: &HostFacts) {
    if let Some(active) = &host.transaction {
        line(out, "Busy", &format!("transaction `{}` of {}", active.title, active.client));
    }
}

fn drain(node: &NodeFacts) -> String {
    let cordoned = match node.schedulable {
        Some(true) => "schedulable",
        Some(false) => "cordoned",
        None => "not known whether cordoned",
    };
    match (&node.desired_drain, &node.last_applied_drain) {
        (None, _) => cordoned.to_owned(),
        (Some(desired), Some(applied)) if desired == applied => format!("{cordoned}; {desired}, done"),
        (Some(desired), _) => format!("{cordoned}; {desired}, not yet done"),
    }
}

/// Lists files of the MCD in `/etc` that hide the image's.
fn shadows(Leftovers { managed, differing }: &Leftovers) -> String {
    const SHOWN: usize = 3;
    let mut text = format!("{} of the {managed} paths in /etc that the rendered config names differ", differing.len());
    text.push_str(" from the image's /usr/etc and hide its files: ");
    text.push_str(&differing.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", "));
    if differing.len() > SHOWN {
        text.push_str(", … (`--json` lists them)");
    }
    printable(&text, 900)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_the_fields_of_its_version() {
        let (observed, decision) = super::super::tests::decided();
        let Observed { cluster, host, machine, .. } = observed;
        let status = Status {
            backend: String::new(),
            cluster,
            host,
            machine,
            trust: Some(Trust::Required(String::new())),
            leftovers: Some(Leftovers { managed: 0, differing: vec![String::new()] }),
            service: Service::new(String::new(), ""),
            decision: Decided::from(&decision),
        };
        super::super::tests::check_fields("tests/json/status", &status);
    }

    #[test]
    fn a_staged_deployment_says_whether_it_is_locked() {
        let says = |staged, locked| describe(&Deployment { staged, locked, ..Deployment::default() }, None);
        assert!(says(true, true).ends_with("locked: no reboot boots it before it is unlocked"));
        assert!(says(true, false).ends_with("not locked: any reboot boots it"));
        assert!(!says(false, false).contains("locked"));
    }
}
