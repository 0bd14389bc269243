//! A really booted, really rebooted ostree host, and the world around it; vm-tests/run builds what this needs.
#![allow(clippy::disallowed_methods, clippy::print_stdout, reason = "the harness is not the agent")]

mod demo;
mod disk;
mod journal;
mod lab;
mod oci;
mod scenarios;
mod trust;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};

use lab::{Lab, Stock};
use scenarios::{ALL, Guest, Scenario};
use trust::Trust;
use vm::Emulator;

#[derive(Debug, Parser)]
#[command(name = "vm-tests")]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make what the image trusts, once.
    Keys {
        /// Where.
        dir: PathBuf,
    },
    /// List the scenarios.
    List,
    /// Run scenarios.
    Run(Run),
    /// Tell one update as a story.
    Demo(Built),
}

/// Where the build left things.
#[derive(Debug, Args)]
struct Built {
    /// What vm-tests/image/build printed.
    #[arg(long)]
    image: PathBuf,
    /// What `keys` made.
    #[arg(long)]
    keys: PathBuf,
    /// Where runs leave what they leave.
    #[arg(long)]
    runs: PathBuf,
    /// What vm-tests/image/qemu printed.
    #[arg(long)]
    qemu: Option<PathBuf>,
}

impl Built {
    async fn stock(self) -> Result<Stock> {
        Ok(Stock {
            emulator: Emulator::find(self.qemu.as_deref()).await?,
            image: self.image,
            keys: self.keys,
            runs: self.runs,
        })
    }
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    built: Built,
    /// Only those that every change has to pass.
    #[arg(long)]
    short: bool,
    /// Keep disk and logs also of what went well.
    #[arg(long)]
    keep: bool,
    /// Numbers or names; without any, all but those that run on demand.
    scenarios: Vec<String>,
}

/// One thread, because QEMU and the registry end with the thread that started them.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let done = match Options::parse().command {
        Command::Keys { dir } => Trust::make(&dir).map(|()| true),
        Command::List => {
            list();
            Ok(true)
        }
        Command::Run(run) => run_scenarios(run).await,
        Command::Demo(built) => show(built).await,
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vm-tests: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn list() {
    for Scenario { number, name, about, short, on_demand, .. } in ALL {
        let when = match (short, on_demand) {
            (true, _) => "short",
            (_, true) => "on demand",
            _ => "",
        };
        println!("{number:02}  {name:<22} {when:<10} {about}");
    }
}

async fn show(built: Built) -> Result<bool> {
    demo::tell(&built.stock().await?).await.map(|()| true)
}

/// Those that are asked for, and 00 first whatever is asked for.
fn chosen(run: &Run) -> Result<Vec<&'static Scenario>> {
    for wanted in &run.scenarios {
        if !ALL.iter().any(|one| is_called(one, wanted)) {
            bail!("no scenario `{wanted}`; see vm-tests/run --list");
        }
    }
    let is_chosen = |one: &&Scenario| match run.scenarios.as_slice() {
        [] => !one.on_demand && (one.short || !run.short),
        wanted => one.number == 0 || wanted.iter().any(|wanted| is_called(one, wanted)),
    };
    Ok(ALL.iter().filter(is_chosen).collect())
}

fn is_called(scenario: &Scenario, wanted: &str) -> bool {
    scenario.name == wanted || wanted.parse() == Ok(scenario.number)
}

async fn run_scenarios(run: Run) -> Result<bool> {
    let chosen = chosen(&run)?;
    let keep = run.keep;
    let stock = run.built.stock().await?;
    let (began, mut failed, mut shared) = (Instant::now(), Vec::new(), None);
    for scenario in &chosen {
        let name = format!("{:02}-{}", scenario.number, scenario.name);
        let start = Instant::now();
        println!("vm-tests: {name:<26} {}", scenario.about);
        let outcome = one(&stock, scenario, &name, &mut shared, keep).await;
        let seconds = start.elapsed().as_secs();
        match outcome {
            Ok(()) => println!("vm-tests: {name:<26} ok      {seconds:4} s"),
            Err(error) => {
                println!("vm-tests: {name:<26} FAILED  {seconds:4} s\n{error:#}");
                failed.push(name);
            }
        }
    }
    if let Some(lab) = shared {
        lab.end(keep).await;
    }
    let seconds = began.elapsed().as_secs();
    let how = stock.emulator.describe();
    match failed.as_slice() {
        [] => println!("vm-tests: {} scenarios passed ({seconds} s, {how})", chosen.len()),
        some => {
            println!("vm-tests: {} of {} FAILED ({seconds} s, {how}): {}", some.len(), chosen.len(), some.join(" "))
        }
    }
    Ok(failed.is_empty())
}

async fn one(stock: &Stock, scenario: &Scenario, name: &str, shared: &mut Option<Lab>, keep: bool) -> Result<()> {
    let mut lab = match shared.take() {
        Some(lab) if scenario.guest == Guest::Shared => lab,
        other => {
            // One machine at a time.
            if let Some(lab) = other {
                lab.end(keep).await;
            }
            Lab::start(stock, name).await?
        }
    };
    match (scenario.run)(&mut lab).await {
        Ok(()) if scenario.guest == Guest::Shared => *shared = Some(lab),
        Ok(()) => lab.end(keep).await,
        Err(error) => {
            let kept = lab.keep_evidence().await;
            return Err(error).with_context(|| format!("console, journal and disk are in {}", kept.display()));
        }
    }
    Ok(())
}
