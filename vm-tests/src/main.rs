//! Tests on a really booted and rebooted ostree host, with the cluster around it; vm-tests/run builds the needed parts.
#![allow(clippy::disallowed_methods, clippy::print_stdout, reason = "the harness is not the agent")]

mod backend;
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
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};

use backend::Backend;
use lab::{Kind, Lab, Stock};
use scenarios::{ALL, Run, Scenario};
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
    /// Make the keys that the image trusts, once.
    Keys {
        /// Their directory.
        dir: PathBuf,
    },
    /// List the scenarios.
    List,
    /// Run scenarios.
    Run(Wanted),
    /// Run one update as a story.
    Demo(Sources),
}

/// The parts that labs are made from.
#[derive(Debug, Args)]
struct Sources {
    /// vm-tests/run, which builds images.
    #[arg(long)]
    builder: PathBuf,
    /// The directory of `keys`.
    #[arg(long)]
    keys: PathBuf,
    /// The directory for the runs' files.
    #[arg(long)]
    runs: PathBuf,
    /// The directory that vm-tests/image/qemu printed.
    #[arg(long)]
    qemu: Option<PathBuf>,
    /// The host tool in the guest.
    #[arg(long, default_value = "rpm-ostree")]
    backend: Backend,
    /// A tree for the image.
    #[arg(long)]
    overlay: Option<String>,
    /// Packages for the image.
    #[arg(long)]
    packages: Option<String>,
}

impl Sources {
    fn stock(self) -> Result<Stock> {
        let option = |name: &str, value: Option<String>| value.map(|value| [name.to_owned(), value]);
        let image_options =
            [option("--overlay", self.overlay), option("--packages", self.packages)].into_iter().flatten().flatten();
        Ok(Stock {
            emulator: Emulator::find(self.qemu.as_deref())?,
            _port: Arc::new(Trust::reserve(&self.keys)?),
            builder: self.builder,
            backend: self.backend,
            image_options: image_options.collect(),
            keys: self.keys,
            runs: self.runs,
        })
    }
}

#[derive(Debug, Args)]
struct Wanted {
    #[command(flatten)]
    sources: Sources,
    /// Only those that every change must pass.
    #[arg(long)]
    short: bool,
    /// Also keep disk and logs of scenarios that passed.
    #[arg(long)]
    keep: bool,
    /// Numbers or names; without any, all that do not run on demand.
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
        Command::Demo(sources) => show(sources).await,
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
    for Scenario { number, name, about, short, on_demand, only, .. } in ALL {
        let when = match (short, on_demand, only) {
            (true, ..) => "short",
            (_, true, _) => "on demand",
            (.., Some(backend)) => backend.name(),
            _ => "",
        };
        println!("{number:02}  {name:<22} {when:<10} {about}");
    }
}

async fn show(sources: Sources) -> Result<bool> {
    demo::tell(&sources.stock()?).await.map(|()| true)
}

/// The requested scenarios, always with 00 first.
fn chosen(run: &Wanted) -> Result<Vec<&'static Scenario>> {
    for wanted in &run.scenarios {
        match ALL.iter().find(|one| is_called(one, wanted)) {
            None => bail!("no scenario `{wanted}`; see vm-tests/run --list"),
            Some(Scenario { only: Some(only), .. }) if *only != run.sources.backend => {
                bail!("scenario `{wanted}` needs --backend {}", only.name());
            }
            Some(_) => {}
        }
    }
    let fits = |one: &&Scenario| one.only.is_none_or(|only| only == run.sources.backend);
    let is_chosen = |one: &&Scenario| match run.scenarios.as_slice() {
        [] => !one.on_demand && (one.short || !run.short),
        wanted => one.number == 0 || wanted.iter().any(|wanted| is_called(one, wanted)),
    };
    Ok(ALL.iter().filter(fits).filter(is_chosen).collect())
}

fn is_called(scenario: &Scenario, wanted: &str) -> bool {
    scenario.name == wanted || wanted.parse() == Ok(scenario.number)
}

async fn run_scenarios(run: Wanted) -> Result<bool> {
    let chosen = chosen(&run)?;
    let keep = run.keep;
    let stock = run.sources.stock()?;
    let (began, mut failed, mut skipped, mut shared) = (Instant::now(), Vec::new(), 0, None);
    for scenario in &chosen {
        let name = format!("{:02}-{}", scenario.number, scenario.name);
        if let Some(why) = (scenario.skip)(&stock) {
            println!("vm-tests: {name:<26} skipped: {why}");
            skipped += 1;
            continue;
        }
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
    end(&mut shared, keep).await;
    let seconds = began.elapsed().as_secs();
    let how = stock.emulator.describe();
    match failed.as_slice() {
        [] => println!("vm-tests: {} scenarios passed ({seconds} s, {how})", chosen.len() - skipped),
        some => {
            println!("vm-tests: {} of {} FAILED ({seconds} s, {how}): {}", some.len(), chosen.len(), some.join(" "))
        }
    }
    Ok(failed.is_empty())
}

async fn one(stock: &Stock, scenario: &Scenario, name: &str, shared: &mut Option<Lab>, keep: bool) -> Result<()> {
    let kind = match scenario.run {
        Run::Shared(_) => None,
        Run::Own(kind, _) => Some(kind),
        Run::Itself(run) => {
            end(shared, keep).await;
            return run(stock).await;
        }
    };
    let mut lab = match (shared.take(), kind) {
        (Some(lab), None) => lab,
        (other, kind) => {
            *shared = other;
            // One machine at a time.
            end(shared, keep).await;
            Lab::start(stock, name, kind.unwrap_or(Kind::Plain), None).await?
        }
    };
    let (Run::Shared(run) | Run::Own(_, run)) = scenario.run else { return Ok(()) };
    match run(&mut lab).await {
        Ok(()) if kind.is_none() => *shared = Some(lab),
        Ok(()) => lab.end(keep).await,
        Err(error) => {
            let kept = lab.keep_evidence().await;
            return Err(error).with_context(|| format!("console, journal and disk are in {}", kept.display()));
        }
    }
    Ok(())
}

async fn end(lab: &mut Option<Lab>, keep: bool) {
    if let Some(lab) = lab.take() {
        lab.end(keep).await;
    }
}
