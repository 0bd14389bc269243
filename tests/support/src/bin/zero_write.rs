//! Judges traces of the agent: no file was changed, or only in allowed places.
#![allow(clippy::disallowed_methods, reason = "tests may make calls that the agent must not")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use anyhow::{Context as _, bail, ensure};
use clap::{Parser, Subcommand};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::trace::{Findings, traced};

/// strace's simulation of a kernel without Landlock.
const WITHOUT_LANDLOCK: &str = "--inject=landlock_create_ruleset:error=ENOSYS";
/// The paths that the test build writes to on demand.
const DELIBERATE: &str = "rebase-agent-fault";

/// Judges traces of the agent.
#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Read the traces of a run.
    Judge {
        /// The directory of the traces.
        traces: PathBuf,
        /// Text that the path of every change must contain; there must be a change.
        #[arg(long)]
        only: Option<String>,
    },
    /// Prove that a deliberate write is stopped by Landlock alone, and that it is found where nothing stops it.
    Deliberate {
        /// The agent that `tests/support/faulty` builds.
        agent: PathBuf,
    },
}

fn main() -> ExitCode {
    let outcome = match Options::parse().command {
        Command::Judge { traces, only } => judge(&traces, only.as_deref()),
        Command::Deliberate { agent } => deliberate(&agent),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("zero-write: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn judge(traces: &Path, only: Option<&str>) -> anyhow::Result<()> {
    let findings = Findings::read(traces)?;
    findings.is_not_blind()?;
    let programs: Vec<String> = findings.programs.iter().map(|(name, count)| format!("{name} x {count}")).collect();
    println!("  programs   {}", programs.join(", "));
    println!("  looked at  {} calls that could change something", findings.calls);
    println!("  no files   {}", join(&findings.devices));
    println!("  in memory  {}", join(&findings.in_memory));
    for (call, count) in &findings.stopped {
        println!("  stopped    {call} x {count}");
    }
    let allowed = |change: &&String| only.is_some_and(|only| change.contains(only));
    let (allowed, refused): (Vec<_>, Vec<_>) = findings.changes.iter().partition(allowed);
    for change in refused.iter().take(20) {
        println!("  CHANGED    {change}");
    }
    ensure!(refused.is_empty(), "{} changes of the file system", refused.len());
    match only {
        Some(only) => {
            ensure!(!allowed.is_empty(), "nothing was changed below {only}, so this run proves nothing");
            println!("  changed    {} times, and only below {only}", allowed.len());
        }
        None => println!("  changed    nothing"),
    }
    Ok(())
}

fn join<'a>(words: impl IntoIterator<Item = &'a String>) -> String {
    words.into_iter().cloned().collect::<Vec<_>>().join(", ")
}

fn deliberate(agent: &Path) -> anyhow::Result<()> {
    let stopped = attempt(agent, &[])?;
    ensure!(stopped.changes.is_empty(), "Landlock let through {:?}", stopped.changes);
    ensure!(stopped.stopped.keys().any(|call| call.ends_with(": EACCES")), "nothing was tried: {:?}", stopped.stopped);
    println!("  with Landlock     the write is stopped: {}", join(stopped.stopped.keys()));
    let written = attempt(agent, &[WITHOUT_LANDLOCK])?;
    let found = written.changes.iter().filter(|change| change.contains(DELIBERATE)).count();
    ensure!(found > 0, "without Landlock the deliberate write was not found: {:?}", written.changes);
    println!("  without Landlock  the write is found: {}", written.changes.first().map_or("", String::as_str));
    Ok(())
}

/// Runs the agent on an empty machine until it has tried to write.
fn attempt(agent: &Path, arguments: &[&str]) -> anyhow::Result<Findings> {
    let stage = tempfile::tempdir()?;
    let (root, traces) = (stage.path().join("root"), stage.path().join("traces"));
    for directory in ["etc", "run", "usr/bin", "var/lib"] {
        std::fs::create_dir_all(root.join(directory))?;
    }
    std::fs::create_dir(&traces)?;
    std::fs::write(root.join("run/ostree-booted"), "")?;
    let mut child = traced(agent, &traces, arguments)
        .arg("run")
        .env("REBASE_AGENT_ROOT", &root)
        .env("REBASE_AGENT_FAULT", "write")
        .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("strace")?;
    let lines = BufReader::new(child.stderr.take().context("standard error is not ours")?).lines();
    let said: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.contains("var/lib")).collect();
    // Not SIGTERM: the agent is about to take that over, and a signal within that moment is lost.
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGKILL)?;
    child.wait()?;
    if !said.iter().any(|line| line.contains("deliberate write")) {
        bail!("{} was not built by tests/support/faulty: {said:#?}", agent.display());
    }
    Findings::read(&traces)
}
