//! Runs scenarios of agents on a real control plane and prints one line for each.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Parser;
use support::controlplane::scenarios::{SCENARIOS, Scenario, Stage};

/// Agents on a real control plane.
#[derive(Debug, Parser)]
struct Options {
    /// The agent's program.
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,
    /// The directory that tests/support/controlplane/build prints.
    #[arg(long, value_name = "DIRECTORY")]
    programs: PathBuf,
    /// Run the short set.
    #[arg(long)]
    short: bool,
    /// List the scenarios.
    #[arg(long)]
    list: bool,
    /// The scenarios to run; all without a name.
    names: Vec<String>,
}

// The control plane ends with the thread that started it, so there is only one.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let options = Options::parse();
    if options.list {
        for scenario in SCENARIOS {
            println!("{}{}", scenario.name, if scenario.short { "  (short)" } else { "" });
        }
        return ExitCode::SUCCESS;
    }
    match run(&options).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("controlplane: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> anyhow::Result<bool> {
    let mut chosen: Vec<&Scenario> = Vec::new();
    for name in &options.names {
        let found = SCENARIOS.iter().find(|scenario| scenario.name == name);
        chosen.push(found.with_context(|| format!("there is no scenario `{name}`: see --list"))?);
    }
    if chosen.is_empty() {
        chosen.extend(SCENARIOS.iter().filter(|scenario| scenario.short || !options.short));
    } else if options.short {
        bail!("--short takes no names");
    }
    println!("{:<24} {:<6} {:>8} {:>9} {:>7}", "scenario", "result", "seconds", "requests", "writes");
    let began = Instant::now();
    let (patient, busy): (Vec<_>, Vec<_>) = chosen.iter().partition(|scenario| scenario.patient);
    let (patient, busy) = tokio::join!(play(options, &patient), play(options, &busy));
    let (failed, all) = (patient? + busy?, chosen.len());
    println!("{} of {all} passed in {:.0} s", all - failed, began.elapsed().as_secs_f64());
    Ok(failed == 0)
}

/// Runs these one after the other; returns how many failed.
async fn play(options: &Options, scenarios: &[&Scenario]) -> anyhow::Result<usize> {
    let mut failed = 0;
    for scenario in scenarios {
        // Short: there are sockets in it.
        let directory = tempfile::Builder::new().prefix("cp-").tempdir()?;
        let stage = Stage {
            agent: options.agent.clone(),
            programs: options.programs.clone(),
            directory: directory.path().to_owned(),
        };
        let start = Instant::now();
        let result = scenario.run(&stage).await;
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(outcome) => {
                let (requests, writes, note) = (outcome.requests, outcome.writes, outcome.note);
                println!("{:<24} {:<6} {seconds:>8.1} {requests:>9} {writes:>7}  {note}", scenario.name, "ok");
            }
            Err(error) => {
                failed += 1;
                println!("{:<24} {:<6} {seconds:>8.1}", scenario.name, "FAILED");
                println!("    {error:#}\n    its logs are in {}", directory.keep().display());
            }
        }
    }
    Ok(failed)
}
