//! The command line, and what the commands that only look print.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::decide::{Limits, limits};
use crate::model::{Backend, Reason};

/// What stands in `StatusText` before the sentence about confinement.
pub const CONFINEMENT: &str = " | ";

/// Follows the pool's desired OS image on this node: verifies its signature, has it staged, drains, reboots, reports.
#[derive(Debug, Parser)]
#[command(name = "rebase-agent", version, after_help = notes())]
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

/// Exit codes, and what each says.
pub const EXIT_CODES: &[(&str, &str)] = &[
    ("0", "run: stopped by a signal; status, explain: Done, or nothing to follow; verify: verified"),
    ("1", "something needed for the answer could not be read"),
    ("2", "the command line is wrong"),
    ("3", "status, explain: refused (Degraded, Unreconcilable), or the policy refuses what runs; verify: refused"),
    ("4", "status, explain: on the way (Working); verify: not known yet, try again"),
    ("5", "this host is not image-mode (no ostree deployment is booted)"),
];

/// What the agent reads, and who writes it.
pub const FILES: &[(&str, &str)] = &[
    ("/var/lib/kubelet/kubeconfig", "The kubelet's credentials for the API server; the kubelet writes it."),
    ("/etc/containers/policy.json", "The signature policy, and the keys that it names; MCO writes it."),
    (
        "/etc/containers/registries.d, /etc/containers/registries.conf",
        "Where signatures are, mirrors; MCO writes them.",
    ),
    (
        "/run/ostree/auth.json, /etc/ostree/auth.json, /usr/lib/ostree/auth.json",
        "Registry credentials, the first that is there.",
    ),
    ("/etc/systemd/system/rebase-agent.service.d/*.conf", "Drop-ins with REBASE_AGENT_ variables: the configuration."),
];

fn notes() -> String {
    let codes: Vec<String> = EXIT_CODES.iter().map(|(code, text)| format!("  {code}  {text}")).collect();
    format!(
        "Every option has an environment form, so a unit drop-in is the configuration.

Exit codes:
{}",
        codes.join(
            "
"
        )
    )
}

/// Exit codes beyond success.
pub mod exit {
    /// Something could not be read.
    pub const UNREADABLE: u8 = 1;
    /// Refused.
    pub const REFUSED: u8 = 3;
    /// Not yet.
    pub const NOT_YET: u8 = 4;
    /// Not image-mode.
    pub const NOT_IMAGE_MODE: u8 = 5;
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Be the service.
    Run(Tuning),
    /// What is desired, booted, staged, and what the node waits for.
    Status(Look),
    /// Which rule applies to what is observed now, and what it would do; or what a reason means. Changes nothing.
    Explain {
        /// The reason to explain, as in the Node's `reason` annotation and in the journal.
        #[arg(value_parser = reason)]
        reason: Option<Reason>,
        /// How to look.
        #[command(flatten)]
        look: Look,
    },
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
    #[arg(long, env = "REBASE_AGENT_POLL", default_value_t = limits::POLL / limits::SECOND,
          value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(5..=86_400))]
    pub poll: u64,
    /// Seconds for which a missing signature or manifest is awaited before the node is Degraded.
    #[arg(long, env = "REBASE_AGENT_SIGNATURE_GRACE", default_value_t = limits::SIGNATURE_GRACE / limits::SECOND,
          value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub signature_grace: u64,
    /// Seconds the machine must have been up before it is drained and rebooted.
    #[arg(long, env = "REBASE_AGENT_UPTIME_FLOOR", default_value_t = limits::UPTIME_FLOOR / limits::SECOND,
          value_name = "SECONDS",
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

fn reason(text: &str) -> Result<Reason, String> {
    let named = |reason: &&Reason| reason.as_str().eq_ignore_ascii_case(text);
    Reason::ALL.iter().find(named).copied().ok_or_else(|| "no reason of this name; README lists them".to_owned())
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
    #[arg(
        long,
        global = true,
        env = "REBASE_AGENT_KUBECONFIG",
        default_value = "/var/lib/kubelet/kubeconfig",
        value_name = "FILE"
    )]
    pub kubeconfig: PathBuf,
    /// The Node's name, for a kubeconfig whose credentials are not the kubelet's and do not tell it.
    #[arg(long, global = true, env = "REBASE_AGENT_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// What lists deployments and stages images: rpm-ostree, bootc, or what is there (rpm-ostree where both are).
    #[arg(long, global = true, env = "REBASE_AGENT_BACKEND", default_value = "auto", value_name = "TOOL")]
    pub backend: BackendOption,
    /// The signature policy, as rpm-ostreed sees it.
    #[arg(
        long,
        global = true,
        env = "REBASE_AGENT_POLICY",
        default_value = "/etc/containers/policy.json",
        value_name = "FILE"
    )]
    pub policy: PathBuf,
    /// Signature storage per registry.
    #[arg(
        long,
        global = true,
        env = "REBASE_AGENT_REGISTRIES_D",
        default_value = "/etc/containers/registries.d",
        value_name = "DIRECTORY"
    )]
    pub registries_d: PathBuf,
    /// The signature engine, 1.14 or later.
    #[arg(long, global = true, env = "REBASE_AGENT_SKOPEO", default_value = "/usr/bin/skopeo", value_name = "FILE")]
    pub skopeo: PathBuf,
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
    #[arg(long, global = true, env = "REBASE_AGENT_ROOT", default_value = "/", value_name = "DIRECTORY", hide = true)]
    pub root: PathBuf,
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
}
