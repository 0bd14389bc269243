//! The story of one node, told by the agent's own journal lines and by the Node's annotations as they change. Any
//! deviation ends it with an error that names the deviation.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use serde_json::Value;
use support::events::Event;
use support::image::Pushed;
use support::machine::HostTools;
use support::mcc::{MANAGER, PREFIX, annotation, is_node_done};
use support::world::{DEADLINE, NEIGHBOUR, NODE, Neighbour, World, WorldOptions};

/// Shows a node from its first boot through refusal, update and hold, and a second one that pulls before its turn.
#[derive(Debug, Parser)]
struct Options {
    /// The agent's program.
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,
    /// The host tool that the node has.
    #[arg(long, value_name = "TOOL", default_value = "rpm-ostree", value_parser = ["rpm-ostree", "bootc"])]
    backend: String,
    /// Kill the agent with SIGKILL at this point of the story; it must reach the same end.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=POINTS.len() as u64))]
    kill_at: Option<u64>,
    /// List the points.
    #[arg(long)]
    list_points: bool,
    /// Also show the doubles' events.
    #[arg(long)]
    verbose: bool,
}

type Point = (&'static str, fn(&Event) -> bool);

/// Points at which the agent may be killed: always before it learns that its request succeeded.
const POINTS: [Point; 12] = [
    ("the unsigned image is being refused", |event| {
        wrote(event, "rebase-agent", "reason", |reason| reason.starts_with("SignatureMissing"))
    }),
    ("the pull was requested, its reply is not out", |event| requested(event, &["rebase", "pull"])),
    (
        "layers are being imported",
        |event| matches!(event, Event::TransactionMessage(text) if text.starts_with("Importing")),
    ),
    ("the image is staged", |event| matches!(event, Event::Staged { .. })),
    ("the drain was requested", |event| wrote(event, "rebase-agent", "desiredDrain", |v| v.starts_with("drain-"))),
    ("the drain was acknowledged", |event| wrote(event, MANAGER, "lastAppliedDrain", |v| v.starts_with("drain-"))),
    ("the attempt was recorded", |event| {
        matches!(event, Event::NodeChanged { changes, .. }
            if matches!(changes.get("rebase-agent.openshift.io/attempt"), Some(Some(_))))
    }),
    ("the unlocking was requested, its reply is not out", |event| requested(event, &["finalize-deployment"])),
    ("the image is unlocked", |event| matches!(event, Event::Unlocked { .. })),
    ("the reboot was accepted", |event| matches!(event, Event::RebootAccepted)),
    ("the uncordon was requested", |event| {
        wrote(event, "rebase-agent", "desiredDrain", |v| v.starts_with("uncordon-"))
    }),
    ("Done was written", |event| wrote(event, "rebase-agent", "currentImage", |_| true)),
];

/// Points that only rpm-ostree has: bootc cannot lock a stage.
const OF_THE_LOCK: RangeInclusive<u64> = 8..=9;

/// Longest time from a node's turn until its prefetched image is staged.
const IN_SECONDS: Duration = Duration::from_secs(5);

/// Points before this one belong to the refusal; the others to the first update.
const FIRST_OF_UPDATE: u64 = 2;

fn requested(event: &Event, methods: &[&str]) -> bool {
    matches!(event, Event::TransactionRequested { method, .. } if methods.contains(&method.as_str()))
}

fn wrote(event: &Event, by: &str, key: &str, is: fn(&str) -> bool) -> bool {
    matches!(event, Event::NodeChanged { manager, changes, .. } if manager == by
        && changes.get(&format!("{PREFIX}{key}")).is_some_and(|value| value.as_deref().is_some_and(is)))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let options = Options::parse();
    if options.list_points {
        for (number, (name, _)) in POINTS.iter().enumerate() {
            println!("{:2}  {name}", number + 1);
        }
        return ExitCode::SUCCESS;
    }
    if options.backend == "bootc" && options.kill_at.is_some_and(|point| OF_THE_LOCK.contains(&point)) {
        println!("demo: bootc has no such point, because it cannot lock what is staged");
        return ExitCode::FAILURE;
    }
    let began = Instant::now();
    match story(&options, began).await {
        Ok(digest) => {
            println!("demo: {NODE} is Done on {digest}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("demo: the story went another way: {error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Teller {
    began: Instant,
}

impl Teller {
    fn line(&self, who: &str, text: &str) {
        println!("{:5.1}s  {who:<8} {text}", self.began.elapsed().as_secs_f64());
    }

    fn chapter(&self, title: &str) {
        println!("\n{:5.1}s  == {title}", self.began.elapsed().as_secs_f64());
    }
}

async fn story(options: &Options, began: Instant) -> anyhow::Result<String> {
    let mut world_options = WorldOptions::new(&options.agent);
    world_options.machine = |machine| machine.restart_delay = Duration::from_millis(300);
    world_options.host_tools = if options.backend == "bootc" { HostTools::Bootc } else { HostTools::RpmOstree };
    let spread = ("REBASE_AGENT_PREFETCH_SPREAD".to_owned(), "0".to_owned());
    world_options.env.push(spread);
    let mut world = World::new(world_options).await.context("the stage cannot be set")?;
    let teller = Arc::new(Teller { began });
    listen(&world, &teller, options.verbose);
    let armed = arm(&world, &teller, options.kill_at);

    let one = world.installed.clone();
    teller.chapter("a node is installed with image 1, signed, and boots for the first time");
    world.target("1", &one);
    world.machine.power_on().await?;
    world.wait_done(&one).await?;

    teller.chapter("the pool gets image 2, which is not signed: refused, nothing touched");
    let two = world.unsigned("2").await?;
    let before = fingerprint(&world);
    let mut queue = world.events.subscribe();
    armed.store(options.kill_at.is_some_and(|point| point < FIRST_OF_UPDATE), Ordering::SeqCst);
    world.target("2", &two);
    world.wait_reason("SignatureMissing").await?;
    world
        .wait("Degraded", |node| annotation(node, "state") == Some("Degraded"))
        .await
        .context("the unsigned image was not refused in time")?;
    ensure!(fingerprint(&world) == before, "the refusal changed the host: {before:?} became {:?}", fingerprint(&world));
    while let Ok(event) = queue.try_recv() {
        let touches =
            matches!(event, Event::TransactionRequested { .. } | Event::RebootAccepted | Event::Staged { .. });
        ensure!(!touches, "the unsigned image led to {event:?}");
    }
    ensure!(world.drains.drains() == 0, "the node was drained for an unsigned image");

    teller.chapter("the pool gets image 3, signed: verified, staged while workloads run, drained, rebooted into");
    let three = world.signed("3").await?;
    let boot = world.machine.boot_id();
    let staging = stages_undrained(&world);
    armed.store(options.kill_at.is_some_and(|point| point >= FIRST_OF_UPDATE), Ordering::SeqCst);
    world.target("3", &three);
    world.wait_done(&three).await?;
    arrived(&world, &three, &boot, 1)?;
    ensure!(staging.load(Ordering::SeqCst), "image 3 was staged on a node that was already drained");
    if let Some(point) = options.kill_at {
        ensure!(!armed.load(Ordering::SeqCst), "point {point} never came, so nothing was killed");
    }

    teller.chapter("an operator holds the node; the pool gets image 4: pulled, and no further");
    let hold = "rebase-agent.openshift.io/hold";
    world.store().annotate("kubectl-annotate", NODE, hold, Some("database failover in progress"))?;
    let four = world.signed("4").await?;
    let boot = world.machine.boot_id();
    world.target("4", &four);
    world.wait_reason("Held").await?;
    let (_, status, errors) = world.command(&["status"]).await?;
    println!("\n$ rebase-agent status\n{status}{errors}");
    ensure!(status.contains("database failover in progress"), "`status` does not show the hold");
    ensure!(status.contains(&format!("Backend   {}: ", options.backend)), "`status` does not show the backend");
    ensure!(world.drains.drains() == 1 && world.machine.boot_id() == boot, "the held node was drained or rebooted");
    ensure!(world.machine.deployments().iter().all(|d| !d.staged), "an image is staged on a held node");

    teller.chapter("the operator releases it");
    world.store().annotate("kubectl-annotate", NODE, hold, None)?;
    world.wait_done(&four).await?;
    arrived(&world, &four, &boot, 2)?;

    teller.chapter("a second node joins the pool with image 4");
    let neighbour = world.neighbour("4", &four).await?;
    tell_neighbour(&neighbour, &teller);
    done(&world, NEIGHBOUR, &four).await?;

    teller.chapter("image 5 is built: the second node pulls it before its turn, and stages nothing");
    let five = world.signed("5").await?;
    let mut queue = neighbour.events.subscribe();
    let deployments = neighbour.machine.deployments().len();
    let prefetch = "rebase-agent.openshift.io/prefetch";
    world.store().annotate("kubectl-annotate", NEIGHBOUR, prefetch, Some(five.pullspec().as_str()))?;
    let pulled =
        |event: &Event| matches!(event, Event::AgentLine(line) if line.contains("nothing is staged")).then_some(());
    World::wait_event(&mut queue, "the prefetch", pulled).await?;
    ensure!(neighbour.machine.deployments().len() == deployments, "the prefetch changed the deployments");
    done(&world, NEIGHBOUR, &four).await?;

    teller.chapter("the first node has the slot; then it is the second node's turn, and the registry is down");
    let boot = world.machine.boot_id();
    let mut first = world.events.subscribe();
    let turn = turn_of_neighbour(&world);
    world.target("5", &five);
    let staged = |event: &Event| matches!(event, Event::Staged { .. }).then_some(());
    World::wait_event(&mut first, "the staging on the first node", staged).await?;
    world.registry.stop();
    World::wait_event(&mut queue, "the staging on the second node", staged).await?;
    let came = turn.lock().unwrap_or_else(PoisonError::into_inner).context("the second node was never its turn")?;
    let took = came.elapsed();
    ensure!(took < IN_SECONDS, "staging a prefetched image took {took:?}");
    done(&world, NEIGHBOUR, &five).await?;
    done(&world, NODE, &five).await?;
    arrived(&world, &five, &boot, 4)?;
    teller.line("demo", &format!("the second node had image 5 staged {} ms after its turn came", took.as_millis()));
    world.registry.restart().await?;

    teller.chapter("the pool goes back to image 3");
    let boot = world.machine.boot_id();
    world.target("3", &three);
    done(&world, NODE, &three).await?;
    done(&world, NEIGHBOUR, &three).await?;
    arrived(&world, &three, &boot, 6)?;
    let (code, status, errors) = world.command(&["status"]).await?;
    println!("\n$ rebase-agent status\n{status}{errors}");
    ensure!(code == 0, "`status` of a node that is Done exits with {code}");
    world.machine.stop_agent().await;
    Ok(three.digest)
}

/// Waits until `node` reports Done on `image`.
async fn done(world: &World, node: &str, image: &Pushed) -> anyhow::Result<()> {
    let pullspec = image.pullspec();
    let done = |node: &Value| is_node_done(node) && annotation(node, "currentImage") == Some(pullspec.as_str());
    world.store().wait_for(node, DEADLINE, done).await.with_context(|| format!("{node} is not Done on {pullspec}"))?;
    Ok(())
}

/// When MCC gives the second node its next image.
fn turn_of_neighbour(world: &World) -> Arc<Mutex<Option<Instant>>> {
    let turn = Arc::<Mutex<Option<Instant>>>::default();
    let seen = turn.clone();
    world.events.listen(move |event| {
        if matches!(event, Event::NodeChanged { node, .. } if node == NEIGHBOUR)
            && wrote(event, MANAGER, "desiredImage", |_| true)
        {
            *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    });
    turn
}

fn tell_neighbour(neighbour: &Neighbour, teller: &Arc<Teller>) {
    let teller = teller.clone();
    neighbour.events.listen(move |event| match event {
        Event::AgentLine(line) => teller.line("agent-1", line.trim_start()),
        Event::Booted { reference, .. } => teller.line("machine1", &format!("boots {}", shorten(reference))),
        _ => {}
    });
}

/// The deployments, as read from the host.
fn fingerprint(world: &World) -> Vec<String> {
    world.machine.deployments().iter().map(|d| format!("{} {}", d.reference, d.staged)).collect()
}

/// Whether the node still ran workloads when an image was staged.
fn stages_undrained(world: &World) -> Arc<AtomicBool> {
    let (undrained, store) = (Arc::new(AtomicBool::new(false)), world.store());
    let seen = undrained.clone();
    world.events.listen(move |event| {
        if matches!(event, Event::Staged { .. })
            && store.node(NODE).is_some_and(|node| node["spec"]["unschedulable"] != true)
        {
            seen.store(true, Ordering::SeqCst);
        }
    });
    undrained
}

/// Checks a node that reports Done.
fn arrived(world: &World, image: &Pushed, boot_before: &str, drains: usize) -> anyhow::Result<()> {
    let node = world.store().node(NODE).context("the Node is gone")?;
    let booted = world.machine.booted().context("nothing is booted")?;
    ensure!(booted.digest == image.digest, "Done on {} while {} is booted", image.digest, booted.digest);
    ensure!(world.machine.boot_id() != boot_before, "Done on {} without a reboot", image.digest);
    ensure!(world.machine.deployments().iter().all(|d| !d.staged), "Done while something is staged");
    ensure!(node["spec"]["unschedulable"] != true, "Done while cordoned");
    ensure!(annotation(&node, "reason").unwrap_or_default().is_empty(), "Done with a reason");
    ensure!(annotation(&node, "desiredDrain") == annotation(&node, "lastAppliedDrain"), "Done while a drain is open");
    let attempt = &node["metadata"]["annotations"]["rebase-agent.openshift.io/attempt"];
    ensure!(attempt.is_null(), "Done with an attempt left over: {attempt}");
    match world.drains.drains() {
        count if count == drains => Ok(()),
        count => bail!("the node was drained {count} times instead of {drains}"),
    }
}

/// Kills the agent when the chosen point comes after arming.
fn arm(world: &World, teller: &Arc<Teller>, point: Option<u64>) -> Arc<AtomicBool> {
    let armed = Arc::new(AtomicBool::new(false));
    let chosen = point.and_then(|point| usize::try_from(point - 1).ok()).and_then(|index| POINTS.get(index));
    if let Some((name, is_point)) = chosen.copied() {
        let (armed, machine, teller) = (armed.clone(), world.machine.clone(), teller.clone());
        world.events.listen(move |event| {
            if is_point(event) && armed.swap(false, Ordering::SeqCst) {
                teller.line("demo", &format!("kill -9: {name}"));
                machine.kill_agent();
            }
        });
    }
    armed
}

fn listen(world: &World, teller: &Arc<Teller>, verbose: bool) {
    let teller = teller.clone();
    world.events.listen(move |event| match event {
        Event::AgentLine(line) => teller.line("agent", line.trim_start()),
        Event::NodeChanged { manager, changes, node } => {
            let who = if node == NODE { "node" } else { "node-1" };
            for (key, value) in changes {
                let key = key.rsplit_once('/').map_or(key.as_str(), |(_, key)| key);
                let value = value.as_deref().map_or("(removed)".to_owned(), shorten);
                teller.line(who, &format!("{key}={value}   ({manager})"));
            }
        }
        Event::Booted { reference, .. } => teller.line("machine", &format!("boots {}", shorten(reference))),
        Event::Down => teller.line("machine", "is down"),
        Event::AgentExited { code } if *code < 0 => teller.line("machine", &format!("agent: signal {}", -code)),
        other if verbose => teller.line("double", &format!("{other:?}")),
        _ => {}
    });
}

/// Shortens digests to twelve digits, as in the rest of the output.
fn shorten(text: &str) -> String {
    match text.split_once("@sha256:") {
        Some((name, digest)) => {
            let (short, rest) = digest.split_at(digest.len().min(12));
            let rest: String = rest.chars().skip_while(char::is_ascii_hexdigit).collect();
            format!("{name}@sha256:{short}{rest}")
        }
        None => text.to_owned(),
    }
}
