//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::decide::{Limits, limits};
use crate::model::{Backend, Reason};

/// Separates the sentence about confinement from the rest of `StatusText`.
pub const CONFINEMENT: &str = " | ";

/// Updates this node to the pool's desired OS image: verifies its signature, stages it, drains, reboots, reports.
#[derive(Debug, Parser)]
#[command(name = "rebase-agent", version, after_help = notes())]
pub struct Cli {
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
    /// Paths and settings of the node.
    #[command(flatten)]
    pub paths: Paths,
    /// Log level: error, warn, info, debug or trace.
    #[arg(long, global = true, env = "REBASE_AGENT_LOG", default_value = "info", value_name = "LEVEL")]
    pub log: tracing::Level,
    /// Exit with an error unless Landlock denies every change of a file.
    #[arg(long, global = true, env = "REBASE_AGENT_REQUIRE_LANDLOCK",
          value_parser = clap::builder::FalseyValueParser::new())]
    pub require_landlock: bool,
}

/// The exit codes and their meanings.
pub const EXIT_CODES: &[(&str, &str)] = &[
    ("0", "run: stopped by a signal; status, explain: Done, or nothing to follow; metrics: printed; verify: verified"),
    ("1", "the Node, the host, or a file that is needed cannot be read"),
    ("2", "the command line is wrong"),
    (
        "3",
        "status, explain: refused (Degraded, Unreconcilable), or the policy refuses the booted image; verify: refused",
    ),
    ("4", "status, explain: update in progress (Working); verify: no result yet, try again"),
    ("5", "this host is not image-mode (no ostree deployment is booted)"),
];

fn notes() -> String {
    let codes: String = EXIT_CODES.iter().map(|(code, text)| format!("\n  {code}  {text}")).collect();
    format!("Every option has an environment variable, so a unit drop-in is the configuration.\n\nExit codes:{codes}")
}

/// Exit codes beyond success.
pub mod exit {
    /// The Node, the host, or a file that is needed cannot be read.
    pub const UNREADABLE: u8 = 1;
    /// The image is refused.
    pub const REFUSED: u8 = 3;
    /// The update is in progress, or there is no result yet.
    pub const NOT_YET: u8 = 4;
    /// The host is not image-mode.
    pub const NOT_IMAGE_MODE: u8 = 5;
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the service.
    Run(Tuning),
    /// Show the desired, booted and staged image, and what the node waits for.
    Status(Look),
    /// Show which rule applies now and what it would do, or what a reason means. Changes nothing.
    Explain {
        /// The reason to explain, as in the Node's `reason` annotation and in the journal.
        #[arg(value_parser = reason)]
        reason: Option<Reason>,
        /// Options of the output.
        #[command(flatten)]
        look: Look,
    },
    /// Print OpenMetrics text for a scraper, as rebase-agent-metrics.socket does for each connection. Changes nothing.
    Metrics,
    /// Verify an image as the service does. Changes nothing.
    Verify {
        /// The image: host/repository@sha256:<64 hex digits>
        pullspec: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Options of `status` and `explain`.
#[derive(Debug, Args)]
pub struct Look {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Verify the desired image first; without it the output shows verification as the next step.
    #[arg(long)]
    pub verify: bool,
    /// Settings of the rules.
    #[command(flatten)]
    pub tuning: Tuning,
}

/// Settings of the rules.
#[derive(Debug, Args)]
pub struct Tuning {
    /// Seconds between two reads of the Node; a watch reports changes sooner.
    #[arg(long, env = "REBASE_AGENT_POLL", default_value_t = limits::POLL / limits::SECOND,
          value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(5..=86_400))]
    pub poll: u64,
    /// Longest random wait in seconds before the pool's new image is fetched ahead of the node's turn.
    #[arg(long, env = "REBASE_AGENT_PREFETCH_SPREAD", default_value_t = limits::PREFETCH_SPREAD / limits::SECOND,
          value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub prefetch_spread: u64,
    /// Seconds to wait for a missing signature or manifest before the node is Degraded.
    #[arg(long, env = "REBASE_AGENT_SIGNATURE_GRACE", default_value_t = limits::SIGNATURE_GRACE / limits::SECOND,
          value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub signature_grace: u64,
    /// Seconds that the machine must have been up before it is drained and rebooted.
    #[arg(long, env = "REBASE_AGENT_UPTIME_FLOOR", default_value_t = limits::UPTIME_FLOOR / limits::SECOND,
          value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub uptime_floor: u64,
    /// Refuse an image that was created before this RFC 3339 time by its config, or whose config has no such time.
    #[arg(long, env = "REBASE_AGENT_MINIMUM_CREATED", value_name = "TIME", value_parser = time)]
    pub minimum_created: Option<u64>,
    /// When the desired config is newer than the image: wait for a rebuild, or accept the image as it is.
    #[arg(long, env = "REBASE_AGENT_CONFIG_AHEAD", default_value = "wait", value_name = "WHAT")]
    pub config_ahead: ConfigAhead,
}

impl Tuning {
    /// The limits for the rules.
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
    Reason::ALL
        .iter()
        .find(named)
        .copied()
        .ok_or_else(|| "there is no reason of this name; README lists all reasons".to_owned())
}

fn time(text: &str) -> Result<u64, String> {
    crate::time::unix(text).ok_or_else(|| "it must be a time since 1970 such as 2026-11-22T08:00:00Z".to_owned())
}

/// How to handle a config that is newer than its image.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ConfigAhead {
    /// Wait for a rebuild.
    Wait,
    /// Report Done although the files of the new config are missing.
    Accept,
}

/// The host tool to use.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum BackendOption {
    /// The installed one; rpm-ostree if both are.
    Auto,
    /// rpm-ostreed.
    RpmOstree,
    /// bootc.
    Bootc,
}

impl BackendOption {
    /// The backend, or `None` to detect it.
    #[must_use]
    pub fn backend(self) -> Option<Backend> {
        match self {
            Self::Auto => None,
            Self::RpmOstree => Some(Backend::RpmOstree),
            Self::Bootc => Some(Backend::Bootc),
        }
    }
}

/// Paths and settings of the node.
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
    /// The Node's name, if the credentials in the kubeconfig are not the kubelet's and do not contain it.
    #[arg(long, global = true, env = "REBASE_AGENT_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// The tool that lists deployments and stages images; auto uses the installed one, and rpm-ostree if both are.
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
    /// Writable directory for GnuPG, which the drop-in 10-gpg.conf sets.
    #[arg(long, global = true, env = "REBASE_AGENT_SCRATCH", value_name = "DIRECTORY", hide = true)]
    pub scratch: Option<PathBuf>,
    /// Directory to use instead of /.
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
