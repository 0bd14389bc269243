//! The command line, and what the commands that only look print.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::decide::{Decision, Limits};
use crate::host::leftovers::Leftovers;
use crate::model::{
    Backend, Deployment, Digest, HostFacts, ImageFacts, MachineFacts, NodeFacts, NodeState, Observed, PinnedImage,
    Reading, Reason, printable,
};
use crate::registry::{NodePolicy, reference};
use crate::report::Patch;

/// Width of a terminal nobody made wider.
const WIDTH: usize = 80;
/// What stands in `StatusText` before the sentence about confinement.
pub const CONFINEMENT: &str = " | ";
/// Column where values begin.
const INDENT: usize = 10;

/// Follows the pool's desired OS image on this node: verifies its signature, has it staged, drains, reboots, reports.
#[derive(Debug, Parser)]
#[command(name = "rebase-agent", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Where things are.
    #[command(flatten)]
    pub paths: Paths,
    /// error, warn, info, debug or trace.
    #[arg(long, global = true, env = "REBASE_AGENT_LOG", default_value = "info", value_name = "LEVEL")]
    pub log: tracing::Level,
    /// Do not start unless Landlock denies every change of a file.
    #[arg(long, global = true, env = "REBASE_AGENT_REQUIRE_LANDLOCK",
          value_parser = clap::builder::FalseyValueParser::new())]
    pub require_landlock: bool,
}

const EXIT_CODES: &str = "Every option has an environment form, so a unit drop-in is the configuration.

Exit codes:
  0  run: stopped by a signal; status, explain: Done, or nothing to follow; verify: verified
  1  something needed for the answer could not be read
  2  the command line is wrong
  3  status, explain: refused (Degraded, Unreconcilable), or the policy refuses what runs; verify: refused
  4  status, explain: on the way (Working); verify: cannot tell yet, try again
  5  this host is not image-mode (no ostree deployment is booted); nothing to do here";

/// Exit code: something could not be read.
pub const UNREADABLE: u8 = 1;
/// Exit code: refused.
pub const REFUSED: u8 = 3;
/// Exit code: not yet.
pub const NOT_YET: u8 = 4;
/// Exit code: not image-mode.
pub const NOT_IMAGE_MODE: u8 = 5;

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Be the service.
    Run(Tuning),
    /// What is desired, booted, staged, and what the node waits for.
    Status(Look),
    /// Which rule applies to what is observed now, and what it would do; changes nothing.
    Explain(Look),
    /// Verify an image as the service would; changes nothing.
    Verify {
        /// host/repository@sha256:<64 hex digits>
        pullspec: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Options of the commands that look.
#[derive(Debug, Args)]
pub struct Look {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Verify the desired image first, instead of showing verification as the next step.
    #[arg(long)]
    pub verify: bool,
    /// What the rules depend on.
    #[command(flatten)]
    pub tuning: Tuning,
}

/// What an operator may tune.
#[derive(Debug, Args)]
pub struct Tuning {
    /// Seconds between two reads of the Node; the watch in between only makes it quicker.
    #[arg(long, env = "REBASE_AGENT_POLL", default_value_t = 300, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(5..=86_400))]
    pub poll: u64,
    /// Seconds for which a missing signature or manifest is awaited before the node is Degraded.
    #[arg(long, env = "REBASE_AGENT_SIGNATURE_GRACE", default_value_t = 900, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub signature_grace: u64,
    /// Seconds the machine must have been up before it is drained and rebooted.
    #[arg(long, env = "REBASE_AGENT_UPTIME_FLOOR", default_value_t = 300, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub uptime_floor: u64,
    /// Refuse an image whose config says that it was created before this RFC 3339 time, or does not say when.
    #[arg(long, env = "REBASE_AGENT_MINIMUM_CREATED", value_name = "TIME", value_parser = time)]
    pub minimum_created: Option<u64>,
    /// When the desired config is newer than the image: wait for a rebuild, or accept the image as it is.
    #[arg(long, env = "REBASE_AGENT_CONFIG_AHEAD", default_value = "wait", value_name = "WHAT")]
    pub config_ahead: ConfigAhead,
}

impl Tuning {
    /// As the rules take them.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            accept_config_ahead: matches!(self.config_ahead, ConfigAhead::Accept),
            signature_grace: self.signature_grace.saturating_mul(1000),
            uptime_floor: self.uptime_floor.saturating_mul(1000),
            minimum_created: self.minimum_created,
        }
    }
}

fn time(text: &str) -> Result<u64, String> {
    crate::time::unix(text).ok_or_else(|| "a time from 1970 on as in 2026-11-22T08:00:00Z is expected".to_owned())
}

/// What to do about a config that is newer than its image.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ConfigAhead {
    /// Wait for a rebuild.
    Wait,
    /// Report Done although files of the config are missing.
    Accept,
}

/// The host tool to use.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum BackendOption {
    /// What is there.
    Auto,
    /// rpm-ostreed.
    RpmOstree,
    /// bootc.
    Bootc,
}

impl BackendOption {
    /// The one that was asked for.
    #[must_use]
    pub fn backend(self) -> Option<Backend> {
        match self {
            Self::Auto => None,
            Self::RpmOstree => Some(Backend::RpmOstree),
            Self::Bootc => Some(Backend::Bootc),
        }
    }
}

/// Where things are on the node.
#[derive(Clone, Debug, Args)]
pub struct Paths {
    /// The kubelet's kubeconfig.
    #[arg(long, global = true, env = "REBASE_AGENT_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The Node's name, for a kubeconfig whose credentials are not the kubelet's and do not tell it.
    #[arg(long, global = true, env = "REBASE_AGENT_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// What lists deployments and stages images: rpm-ostree, bootc, or what is there (rpm-ostree where both are).
    #[arg(long, global = true, env = "REBASE_AGENT_BACKEND", default_value = "auto", value_name = "TOOL")]
    pub backend: BackendOption,
    /// The signature policy, as rpm-ostreed sees it.
    #[arg(long, global = true, env = "REBASE_AGENT_POLICY", value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Signature storage per registry.
    #[arg(long, global = true, env = "REBASE_AGENT_REGISTRIES_D", value_name = "DIRECTORY")]
    pub registries_d: Option<PathBuf>,
    /// The signature engine, 1.14 or later.
    #[arg(long, global = true, env = "REBASE_AGENT_SKOPEO", value_name = "FILE")]
    pub skopeo: Option<PathBuf>,
    /// A directory with registry certificates, beside the system's certs.d.
    #[arg(long, global = true, env = "REBASE_AGENT_CERT_DIR", value_name = "DIRECTORY")]
    pub cert_dir: Option<PathBuf>,
    /// Seconds that one verification may take.
    #[arg(long, global = true, env = "REBASE_AGENT_VERIFY_TIMEOUT", default_value_t = 60, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub verify_timeout: u64,
    /// Writable directory for GnuPG; set by the drop-in 10-gpg.conf.
    #[arg(long, global = true, env = "REBASE_AGENT_SCRATCH", value_name = "DIRECTORY", hide = true)]
    pub scratch: Option<PathBuf>,
    /// A tree that stands in for /.
    #[arg(long, global = true, env = "REBASE_AGENT_ROOT", value_name = "DIRECTORY", hide = true)]
    pub root: Option<PathBuf>,
}

// --- status -----------------------------------------------------------------------------------------------------------

/// Everything `status` shows; the text is made from it, and `--json` prints it.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Which host tool is used, and why that one; or why none.
    pub backend: String,
    /// The Node, or why it cannot be read.
    pub cluster: Reading<NodeFacts>,
    /// Deployments, or why they cannot be read.
    pub host: Reading<HostFacts>,
    /// The machine, or why it cannot be read.
    pub machine: Reading<MachineFacts>,
    /// The rule of the policy that the desired image must meet, or why it cannot.
    pub trust: Option<Trust>,
    /// What the MCD left in `/etc`.
    pub leftovers: Option<Leftovers>,
    /// What the running service says of itself.
    pub service: Service,
    /// The rule that applies to what is shown here.
    pub decision: Decision,
}

/// What is known of the desired image's signature without, or with, asking the registry.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trust {
    /// This rule demands a signature; not checked by this command.
    Required(String),
    /// Checked by this command.
    Verified(Box<ImageFacts>),
    /// Refused, and why.
    Refused(String),
}

/// systemd's word on rebase-agent.service.
#[derive(Debug, Serialize)]
pub struct Service {
    /// `ActiveState`.
    pub active: String,
    /// `StatusText`: the rule that the running service applies.
    pub status: String,
    /// How far the kernel confines it, in its own words.
    pub confinement: Option<String>,
}

impl Service {
    /// From systemd's properties of the running service.
    #[must_use]
    pub fn new(active: String, status_text: &str) -> Self {
        let (status, confinement) = match status_text.rsplit_once(CONFINEMENT) {
            Some((status, confinement)) => (status, Some(confinement.to_owned())),
            None => (status_text, None),
        };
        Self { active, status: status.to_owned(), confinement }
    }
}

/// What the policy demands of `desired`; asks nobody. `None` while nothing valid is desired.
#[must_use]
pub fn required(policy: &std::path::Path, desired: Option<&PinnedImage>) -> Option<Trust> {
    let image = desired?;
    Some(match NodePolicy::read(policy).and_then(|policy| policy.gate(image)) {
        Ok(scope) => Trust::Required(scope),
        Err(error) => Trust::Refused(error.to_string()),
    })
}

/// The exit code for a decision.
#[must_use]
pub fn exit_code(observed: &Observed, decision: &Decision) -> u8 {
    let not_image_mode = matches!(&observed.host, Reading::Unknown(fault) if fault.reason == Reason::HostNotImageMode);
    let unsupported = matches!(&observed.host, Reading::Unknown(fault) if fault.reason == Reason::HostUnsupported);
    match decision.state {
        _ if not_image_mode => NOT_IMAGE_MODE,
        _ if unsupported => REFUSED,
        Some(NodeState::Degraded | NodeState::Unreconcilable) => REFUSED,
        Some(NodeState::Working | NodeState::Done) => NOT_YET,
        None if observed.cluster.known().is_none() || observed.host.known().is_none() => UNREADABLE,
        None if decision.reason == Reason::RunsUntrusted => REFUSED,
        None if decision.reason.is_at_rest() || decision.reason == Reason::NotLayered => 0,
        None => NOT_YET,
    }
}

impl Status {
    /// For people: at a glance, in 80 columns.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        match &self.cluster {
            Reading::Known(node) => self.node(&mut out, node),
            Reading::Unknown(fault) => line(&mut out, "Node", &format!("unknown: {}", fault.message)),
        }
        match &self.host {
            // bootc cannot be asked while it works.
            Reading::Known(host) if host.deployments.is_empty() && host.transaction.is_some() => {
                line(&mut out, "Host", "not readable until the transaction has ended");
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
                // Usually clear from the rows above: what is staged, or else what is booted.
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
            None => "nothing to trust: no valid image is desired".to_owned(),
            Some(Trust::Required(scope)) => {
                format!("rule {scope} demands a signature (`status --verify` checks it)")
            }
            Some(Trust::Verified(facts)) => {
                format!("verified: signed as rule {} demands, {} MiB", facts.vouched_by, facts.size >> 20)
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
        // The service has seen more than a command that just came; its own word goes, unless it is another.
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
            (Some(text), None) => format!("`{}`, which cannot be followed", text.as_str()),
        };
        let config = node.desired_config.as_deref().unwrap_or("no config");
        line(out, "Desired", &format!("{image} for {config}"));
    }
}

/// The running service's rule is in its status text; this is the rule for what was just read, by a fresh process.
fn rule(decision: &Decision) -> String {
    format!("{} {}: {}", decision.rule, decision.reason, decision.message)
}

fn describe(deployment: &Deployment, desired: Option<&PinnedImage>) -> String {
    let name = deployment.reference.as_deref().map_or("no container image", reference::name_of);
    let digest = deployment.digest.as_ref().map_or("", Digest::short);
    let mut text = format!("{name} {digest}");
    if desired.is_some_and(|desired| crate::model::is_image(deployment, desired, None)) {
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
        text.push_str(", locked: no reboot boots it");
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
        None => "unknown whether cordoned",
    };
    match (&node.desired_drain, &node.last_applied_drain) {
        (None, _) => cordoned.to_owned(),
        (Some(desired), Some(applied)) if desired == applied => format!("{cordoned}; {desired}, done"),
        (Some(desired), _) => format!("{cordoned}; {desired}, not yet done"),
    }
}

/// Files of the MCD in `/etc` that shadow the image's.
fn shadows(Leftovers { managed, differing }: &Leftovers) -> String {
    const SHOWN: usize = 3;
    let mut text = format!("{} of the {managed} paths in /etc that the config names differ", differing.len());
    text.push_str(" from the image's /usr/etc and shadow it: ");
    text.push_str(&differing.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", "));
    if differing.len() > SHOWN {
        text.push_str(", … (`--json` lists them)");
    }
    printable(&text, 900)
}

/// `label`, then `value` wrapped and indented.
fn line(out: &mut String, label: &str, value: &str) {
    let mut column = INDENT;
    let _ = write!(out, "{label:INDENT$}");
    for (index, word) in value.split(' ').enumerate() {
        let length = word.chars().count();
        if index > 0 && column.saturating_add(length).saturating_add(1) > WIDTH {
            let _ = write!(out, "\n{:INDENT$}", "");
            column = INDENT;
        } else if index > 0 {
            out.push(' ');
            column = column.saturating_add(1);
        }
        out.push_str(word);
        column = column.saturating_add(length);
    }
    out.push('\n');
}

// --- explain ----------------------------------------------------------------------------------------------------------

/// Everything `explain` shows.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// What was observed; in the form of the golden cases.
    pub observed: Observed,
    /// What follows from it.
    pub decision: Decision,
    /// What the cluster would be told.
    pub patch: Patch,
}

impl Explanation {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        line(&mut out, "Rule", &rule(&self.decision));
        let action = serde_json::to_string(&self.decision.action).unwrap_or_default();
        line(&mut out, "Action", action.trim_matches('"'));
        let state = self.decision.state.map_or("left as it is", NodeState::as_str);
        line(&mut out, "State", state);
        if self.patch.is_empty() {
            line(&mut out, "Patch", "none");
        }
        for (index, (key, value)) in self.patch.iter().enumerate() {
            let label = if index == 0 { "Patch" } else { "" };
            line(&mut out, label, &format!("{key}={}", value.as_deref().unwrap_or("(removed)")));
        }
        let wake = self.decision.wake.map_or_else(
            || "when something changes".to_owned(),
            |wake| format!("in {} s, or when something changes", wake.div_ceil(1000)),
        );
        line(&mut out, "Next look", &wake);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_has_an_environment_form() {
        let mut commands = vec![Cli::command()];
        while let Some(command) = commands.pop() {
            commands.extend(command.get_subcommands().cloned());
            for option in command.get_arguments() {
                let only_here = ["json", "verify", "help", "version"].contains(&option.get_id().as_str());
                if let (Some(long), false) = (option.get_long(), only_here) {
                    let expected = format!("REBASE_AGENT_{}", long.to_uppercase().replace('-', "_"));
                    assert_eq!(option.get_env().and_then(|env| env.to_str()), Some(expected.as_str()), "--{long}");
                }
            }
        }
    }

    #[test]
    fn text_stays_in_its_columns() {
        let mut out = String::new();
        line(&mut out, "Label", &"word ".repeat(60));
        line(&mut out, "", &"x".repeat(200));
        let lines: Vec<_> = out.lines().collect();
        assert!(lines[0].starts_with("Label     word word"));
        assert!(lines[..lines.len() - 1].iter().all(|line| line.chars().count() <= WIDTH));
        assert!(lines[1].starts_with("          word"));
    }
}
