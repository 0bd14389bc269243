//! Measures a fleet: the time of a pool's rollout with and without prefetch, and the load of its nodes on registry and
//! API server. tests/fleet describes and runs it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::disallowed_methods, reason = "they are disallowed in the agent, not in its tests")]

mod herd;
mod rollout;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use herd::{Herd, Return};
use rebase_agent::decide::limits;
use rollout::{Hint, Plan};

const MINUTE: u64 = limits::MINUTE;
/// The sizes of the pools.
const POOLS: [usize; 3] = [10, 100, 1000];
/// Requests of an idle node in an hour.
const READS: f64 = 30.0;
/// From the first to the last node that comes back after a restart of the API server.
const SPREAD: Duration = Duration::from_secs(60);

/// Measures a fleet of agents.
#[derive(Debug, Parser)]
struct Options {
    /// Minutes to verify and pull an image.
    #[arg(long, value_name = "MINUTES", default_value_t = 10)]
    pull: u64,
    /// Minutes to drain a node.
    #[arg(long, value_name = "MINUTES", default_value_t = 5)]
    drain: u64,
    /// Minutes to stage an image that is there, shut down, and boot until the node is Ready.
    #[arg(long, value_name = "MINUTES", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    reboot: u64,
    /// --prefetch-spread of the agents, in minutes.
    #[arg(long, value_name = "MINUTES", default_value_t = limits::PREFETCH_SPREAD / MINUTE)]
    spread: u64,
    /// Nodes that load the API server; 0 leaves it out.
    #[arg(long, value_name = "N", default_value_t = 200)]
    nodes: usize,
    /// What the random numbers of the rollouts begin with.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let began = Instant::now();
    let missed = rollouts(&options).and_then(|missed| Ok(missed + api(&options)?));
    match missed {
        Ok(missed) => {
            let took = began.elapsed().as_secs();
            println!("\nfleet: {missed} goals missed; {took} s");
            if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("fleet: {error}");
            ExitCode::from(2)
        }
    }
}

/// Prints the table of rollouts. Returns how many take longer than their goal.
fn rollouts(options: &Options) -> Result<usize, String> {
    let Options { pull, drain, reboot, spread, seed, .. } = *options;
    println!("Pull {pull} min, drain {drain} min, reboot {reboot} min, --prefetch-spread {spread} min; hours\n");
    println!("| nodes | maxUnavailable | without prefetch | with prefetch | goal |");
    println!("|---|---|---|---|---|");
    let plan = |nodes, unavailable, hint| Plan {
        nodes,
        unavailable,
        pull: pull * MINUTE,
        drain: drain * MINUTE,
        reboot: reboot * MINUTE,
        spread: spread * MINUTE,
        hint,
    };
    let mut missed = 0;
    for nodes in POOLS {
        // Both are one node in the smallest pool.
        let percent = Some((nodes / 10, "10 %")).filter(|(count, _)| *count > 1);
        for (unavailable, name) in [(1, "1")].into_iter().chain(percent) {
            let without = plan(nodes, unavailable, Hint::None).simulate(seed)?.took;
            let with = plan(nodes, unavailable, Hint::Pool);
            let (goal, took) = (with.goal(), with.simulate(seed)?.took);
            missed += usize::from(took > goal);
            let verdict = if took > goal { "missed: " } else { "" };
            let hours = |time: u64| format!("{:.1}", time as f64 / (60 * MINUTE) as f64);
            println!("| {nodes} | {name} | {} | {} | {verdict}{} |", hours(without), hours(took), hours(goal));
        }
    }
    println!("\nPulls that begin in the worst minute, with maxUnavailable 10 %\n");
    println!(
        "| nodes | without prefetch | pool's image, no spread | with spread | all annotated at once, no spread | with spread |"
    );
    println!("|---|---|---|---|---|---|");
    for nodes in POOLS {
        let spread = spread * MINUTE;
        let kinds =
            [(Hint::None, 0), (Hint::Pool, 0), (Hint::Pool, spread), (Hint::Annotation, 0), (Hint::Annotation, spread)];
        let mut row = format!("| {nodes} |");
        for (hint, spread) in kinds {
            let rollout = Plan { spread, ..plan(nodes, (nodes / 10).max(1), hint) }.simulate(seed)?;
            row += &format!(" {} |", rollout.worst_minute());
        }
        println!("{row}");
    }
    Ok(missed)
}

/// Prints the table of the load on the API server. Returns how many goals it misses.
fn api(options: &Options) -> Result<usize, String> {
    if options.nodes == 0 {
        return Ok(0);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
    let measured = runtime.map_err(|error| error.to_string())?.block_on(herd::measure(options.nodes, directory.path()));
    let Herd { node, pool, wire, connections, busiest, restart, update } =
        measured.map_err(|error| error.to_string())?;
    let nodes = options.nodes;
    let kib = |bytes: f64| bytes / 1024.0;
    println!("\n| API server | measured | goal |\n|---|---|---|");
    let reads = node.requests + pool.requests;
    println!("| requests of an idle node in an hour, without the pool's image | {:.1} | |", node.requests);
    println!("| with the pool's image | {reads:.1} | {READS} |");
    println!(
        "| bodies of the answers | {:.0} KiB, the pool's image {:.0} KiB of them | |",
        kib(node.bytes + pool.bytes),
        kib(pool.bytes)
    );
    println!("| all bytes with TLS, both ways | {:.0} KiB, {connections:.1} connections | |", kib(wire));
    println!("| busiest second of {nodes} idle nodes | {busiest} requests | |");
    let worst = |name: &str, Return { requests, connections, .. }: Return| {
        println!("| {name}, worst second | {requests} requests, {connections} connections | |");
    };
    worst("restart of the API server", restart);
    println!("| first to last of {nodes} nodes | {:.0} s | {} s |", restart.spread.as_secs_f64(), SPREAD.as_secs());
    worst("update of three API servers", update);
    Ok(usize::from(reads > READS) + usize::from(restart.spread < SPREAD))
}
