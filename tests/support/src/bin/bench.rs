//! Cost and speed of the agent on this machine: one table, each figure beside its target.
//!
//! Four nodes run side by side. One is left alone for a minute, one is polled quickly, one is traced, and the fourth
//! gets images. Idle nodes use almost no time, so they do not disturb the fourth; it does not wake them either.

#![allow(clippy::disallowed_methods, reason = "they are disallowed in the agent, not in its benchmark")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use containers_image_proxy::{ImageProxy, ImageProxyConfig};
use landlock::{ABI, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _};
use serde_json::{Value, json};
use support::apiserver::RequestRecord;
use support::events::Event;
use support::image::{ImageSpec, Pushed};
use support::machine::{AgentCommand, MachineOptions};
use support::mcc::{MANAGER, PREFIX, annotation, is_node_done};
use support::rpmostreed::RpmOstreed;
use support::tools;
use support::world::{DEADLINE, NODE, REPOSITORY, World, WorldOptions};
use tokio::signal::unix::{SignalKind, signal};
use zbus::MessageStream;
use zbus::export::futures_core::Stream as _;
use zbus::message::Type;

/// Measures the agent and prints one table.
#[derive(Debug, Parser)]
struct Options {
    /// The agent's program, as it is shipped.
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,
    /// Crates in the agent's dependency tree, as counted by cargo.
    #[arg(long, value_name = "N")]
    crates: Option<usize>,
    /// Those of them that are procedural macros, or only needed by one.
    #[arg(long, value_name = "N")]
    macros: Option<usize>,
    /// Fewer rounds and smaller images.
    #[arg(long)]
    quick: bool,
    /// Open this image with the engine alone, print the seconds and end.
    #[arg(long, value_name = "IMAGE", hide = true)]
    bare: Option<String>,
    /// Keep strace's output about the sleeps of an idle agent.
    #[arg(long, value_name = "FILE")]
    strace: Option<PathBuf>,
    /// Exit with 3 when a target is missed.
    #[arg(long)]
    strict: bool,
}

/// Exit code of `--strict` when a target is missed; 1 means that a measurement failed.
const MISSED: u8 = 3;
/// Observation time of idle nodes.
const WINDOW: Duration = Duration::from_secs(60);
/// `--poll` of the node that is polled quickly, and the default, in seconds.
const POLLS: (u32, f64) = (5, 300.0);
/// Mean of the agent's jitter (0 to 25 %), and of its pause between two watches, in seconds.
const JITTER: (f64, f64) = (1.125, 0.5);
/// Data of an idle hour's watches: a bookmark a minute, and the kubelet's status every five.
const TOLD: (f64, f64) = (60.0, 12.0);
/// Longest wait for an update with a large image.
const UPDATE: Duration = Duration::from_secs(180);
const HOLD: &str = "rebase-agent.openshift.io/hold";
const RPM_OSTREED: &str = "org.projectatomic.rpmostree1";

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(image) = &options.bare {
        return match bare_engine(image) {
            Ok(taken) => {
                println!("{}", taken.as_secs_f64());
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    tokio::runtime::Runtime::new().expect("the system has threads").block_on(run(options))
}

async fn run(options: Options) -> ExitCode {
    let load_before = load();
    let began = Instant::now();
    let mut table = Table::default();
    table.program(&options);
    tokio::select! {
        () = measure(&options, &mut table) => {}
        // Running processes are ended on the way out.
        () = stopped() => return ExitCode::FAILURE,
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{}", table.text());
    println!(
        "{cores} cores; load average {load_before} before, {} after; {:.0} s",
        load(),
        began.elapsed().as_secs_f64()
    );
    if let Some(per_core) = load_before.parse::<f64>().ok().map(|load| load / cores as f64).filter(|load| *load > 0.5) {
        println!("the machine was busy before this began ({per_core:.1} per core): times are those of a busy machine");
    }
    let count = |wanted: Verdict| table.rows.iter().filter(|row| row.verdict == wanted).count();
    let (missed, failed) = (count(Verdict::Missed), count(Verdict::Failed));
    match (failed, missed) {
        (0, 0) => println!("bench: every target is met"),
        (0, _) => println!("bench: targets missed: {missed}"),
        _ => println!("bench: targets missed: {missed}, measurements that could not be taken: {failed}"),
    }
    match (failed, missed) {
        (0, missed) if missed > 0 && options.strict => ExitCode::from(MISSED),
        (0, _) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

async fn stopped() {
    let mut terminate = signal(SignalKind::terminate()).expect("signals can be listened to");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    say("stopped");
}

async fn measure(options: &Options, table: &mut Table) {
    // Long enough for threads without work to end, and for connections that close after use.
    let settle = Duration::from_secs(if options.quick { 12 } else { 20 });
    say("four nodes boot; three of them are then watched doing nothing");
    let quiet = tokio::spawn(quiet(options.agent.clone(), settle));
    let polled = tokio::spawn(polled(options.agent.clone(), settle));
    let traced = tokio::spawn(traced(options.agent.clone(), settle, options.strace.clone()));
    let worked = work(options).await;
    say("waiting for the idle minute to end");
    let polled = joined(polled.await);
    let traced = joined(traced.await);
    let quiet = joined(quiet.await);
    // Measured now, because other agents would share pages with it.
    let memory = match &quiet {
        Ok((world, _, _)) => world.machine.agent_pid().context("the idle agent is gone").and_then(memory),
        Err(_) => Err(anyhow::anyhow!("the idle node did not come up")),
    };
    let quiet = quiet.map(|(_, quiet, _)| quiet);
    table.memory(memory, worked.as_ref().ok().map(|worked| &worked.memory));
    table.wakes(&quiet, &traced);
    table.activations(&quiet, &polled);
    table.idle_api(&polled);
    table.work(&worked);
}

fn joined<T>(result: std::result::Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    result.context("the measurement broke off")?
}

fn say(text: &str) {
    eprintln!("bench: {text}");
}

// --- measurements ------------------------------------------------------------------------------------------------

/// A node that is Done. Its agent runs with the unit's watchdog, and under strace if there is a file for its output.
async fn node(agent: &Path, env: &[(&str, &str)], strace: Option<&Path>) -> Result<World> {
    let mut options = WorldOptions::new(agent);
    options.env = env.iter().map(|(name, value)| (format!("REBASE_AGENT_{name}"), (*value).to_owned())).collect();
    options.machine = |machine: &mut MachineOptions| machine.watchdog = watchdog();
    let world = World::new(options).await.context("the stage cannot be set")?;
    if let Some(output) = strace {
        let traced = ["-f", "-ttt", "-T", "-e", "signal=none", "-e", "trace=epoll_wait,epoll_pwait,epoll_pwait2", "-o"];
        let mut args: Vec<String> = traced.map(str::to_owned).to_vec();
        args.extend([output.display().to_string(), world.agent.program.display().to_string()]);
        args.extend(world.agent.args.clone());
        world.machine.set_agent(AgentCommand { program: "strace".into(), args, env: world.agent.env.clone() });
    }
    world.target("1", &world.installed);
    world.machine.power_on().await?;
    world.wait_done(&world.installed).await?;
    // The test writes the desired annotations from here on.
    world.pool.pause(true);
    Ok(world)
}

/// `WatchdogSec=` of the unit: the agent must wake up after half of it.
fn watchdog() -> Option<Duration> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../systemd/rebase-agent.service");
    let unit = std::fs::read_to_string(unit).unwrap_or_default();
    let seconds = unit.lines().find_map(|line| line.strip_prefix("WatchdogSec="))?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

struct Quiet {
    window: Duration,
    switches: u64,
    involuntary: u64,
    cpu: Duration,
    activations: usize,
    calls: usize,
}

/// Leaves a node alone. Its program is a copy, so that no other agent shares its pages.
async fn quiet(agent: PathBuf, settle: Duration) -> Result<(World, Quiet, tempfile::TempDir)> {
    let directory = tempfile::tempdir()?;
    let copy = directory.path().join("rebase-agent");
    std::fs::copy(&agent, &copy).with_context(|| format!("copying {}", agent.display()))?;
    let world = node(&copy, &[], None).await?;
    let pid = world.machine.agent_pid().context("no agent runs")?;
    tokio::time::sleep(settle).await;
    let host = Host::sleep(&world).await?;
    let (before, began) = (tasks(pid)?, Instant::now());
    tokio::time::sleep(WINDOW).await;
    let (after, window) = (tasks(pid)?, began.elapsed());
    ensure!(world.machine.agent_pid() == Some(pid), "the idle agent was restarted");
    let difference = |of: fn(&Task) -> u64| -> u64 {
        after.iter().map(|(tid, task)| of(task).saturating_sub(before.get(tid).map_or(0, of))).sum()
    };
    let (activations, calls) = host.woken();
    let quiet = Quiet {
        window,
        switches: difference(|task| task.voluntary),
        involuntary: difference(|task| task.involuntary),
        cpu: Duration::from_nanos(difference(|task| task.nanoseconds)),
        activations,
        calls,
    };
    Ok((world, quiet, directory))
}

/// Calls to the host's daemons; rpm-ostreed is not running at first.
struct Host {
    rpm_ostreed: RpmOstreed,
    calls: Arc<AtomicUsize>,
    to_rpm_ostreed: Arc<AtomicUsize>,
    listener: tokio::task::JoinHandle<()>,
}

impl Host {
    async fn sleep(world: &World) -> Result<Self> {
        let rpm_ostreed = world.machine.rpm_ostreed();
        ensure!(rpm_ostreed.idle_exit().await || !rpm_ostreed.is_running(), "rpm-ostreed is busy on an idle node");
        let bus = zbus::connection::Builder::address(world.machine.bus_address().as_str()).build().await?;
        let mut messages = MessageStream::from(&bus);
        let all: Vec<&str> = Vec::new();
        let (dbus, path) = (Some("org.freedesktop.DBus"), "/org/freedesktop/DBus");
        bus.call_method(dbus, path, Some("org.freedesktop.DBus.Monitoring"), "BecomeMonitor", &(all, 0_u32))
            .await
            .context("the bus cannot be monitored")?;
        let (calls, to_rpm_ostreed) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (all, some) = (calls.clone(), to_rpm_ostreed.clone());
        let listener = tokio::spawn(async move {
            let _open = bus;
            while let Some(Ok(message)) =
                std::future::poll_fn(|context| std::pin::Pin::new(&mut messages).poll_next(context)).await
            {
                let header = message.header();
                if header.message_type() == Type::MethodCall {
                    all.fetch_add(1, Ordering::SeqCst);
                    if header.destination().is_some_and(|name| name.as_str() == RPM_OSTREED) {
                        some.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
        });
        Ok(Self { rpm_ostreed, calls, to_rpm_ostreed, listener })
    }

    /// Calls to rpm-ostreed (one, if it was only woken), and all calls on the bus.
    fn woken(self) -> (usize, usize) {
        self.listener.abort();
        let to_rpm_ostreed = self.to_rpm_ostreed.load(Ordering::SeqCst);
        (to_rpm_ostreed.max(usize::from(self.rpm_ostreed.is_running())), self.calls.load(Ordering::SeqCst))
    }
}

#[derive(Default)]
struct Task {
    voluntary: u64,
    involuntary: u64,
    nanoseconds: u64,
}

/// Every thread of the process, with its number of sleeps and its CPU time.
fn tasks(pid: u32) -> Result<BTreeMap<String, Task>> {
    let mut tasks = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        let status = std::fs::read_to_string(path.join("status")).unwrap_or_default();
        let number =
            |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok()).unwrap_or_default();
        let used = std::fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        let task = Task {
            voluntary: number("voluntary_ctxt_switches:"),
            involuntary: number("nonvoluntary_ctxt_switches:"),
            nanoseconds: used.split(' ').next().and_then(|used| used.parse().ok()).unwrap_or_default(),
        };
        tasks.insert(path.display().to_string(), task);
    }
    Ok(tasks)
}

/// MiB.
struct Memory {
    rss: f64,
    pss: f64,
    private: f64,
    anonymous: f64,
    threads: usize,
}

fn memory(pid: u32) -> Result<Memory> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .context("/proc/PID/smaps_rollup of the agent cannot be read")?;
    let of = |key: &str| -> Result<f64> {
        let line = rollup.lines().find_map(|line| line.strip_prefix(key)?.strip_suffix("kB"));
        let kib: f64 = line.with_context(|| format!("smaps_rollup has no {key}"))?.trim().parse()?;
        Ok(kib / 1024.0)
    };
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"))?.count();
    let private = of("Private_Clean:")? + of("Private_Dirty:")?;
    Ok(Memory { rss: of("Rss:")?, pss: of("Pss:")?, private, anonymous: of("Anonymous:")?, threads })
}

struct Polled {
    cycles: usize,
    window: Duration,
    /// Requests of one cycle.
    requests: f64,
    read: u64,
    watch: u64,
    heartbeat: u64,
    activations: usize,
}

/// Lets a node be polled quickly.
async fn polled(agent: PathBuf, settle: Duration) -> Result<Polled> {
    let poll = POLLS.0.to_string();
    let world = node(&agent, &[("POLL", &poll)], None).await?;
    tokio::time::sleep(settle).await;
    let ours = || -> Vec<RequestRecord> { world.api.requests().into_iter().filter(is_agents).collect() };
    let mut heartbeats = Vec::new();
    for _ in 0..60 {
        let before = ours();
        world.store().heartbeat(NODE);
        tokio::time::sleep(Duration::from_millis(200)).await;
        let after = ours();
        if before.len() == after.len()
            && let (Some(before), Some(after)) = (before.last(), after.last())
            && after.is_watch()
            && after.bytes > before.bytes
        {
            heartbeats.push(after.bytes - before.bytes);
        }
        if heartbeats.len() == 3 {
            break;
        }
    }
    ensure!(!heartbeats.is_empty(), "no watch told of a status report of the kubelet");
    // From the end of the watch that got the heartbeats.
    let known = ours().len();
    let wait = async {
        while ours().len() == known {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.context("the agent stopped polling")?;
    let host = Host::sleep(&world).await?;
    let began = Instant::now();
    tokio::time::sleep(WINDOW.saturating_sub(Duration::from_secs(8))).await;
    let mut requests = ours().split_off(known);
    // The current cycle.
    let last = requests.iter().rposition(|request| !request.is_watch()).unwrap_or_default();
    requests.truncate(last);
    let reads: Vec<u64> = requests.iter().filter(|request| !request.is_watch()).map(|request| request.bytes).collect();
    let watches: Vec<u64> = requests.iter().filter(|request| request.is_watch()).map(|request| request.bytes).collect();
    ensure!(reads.len() >= 3 && !watches.is_empty(), "only {} poll cycles in {WINDOW:?}", reads.len());
    let (activations, _) = host.woken();
    Ok(Polled {
        cycles: reads.len(),
        window: began.elapsed(),
        requests: requests.len() as f64 / reads.len() as f64,
        read: median(&reads),
        watch: median(&watches),
        heartbeat: median(&heartbeats),
        activations,
    })
}

fn is_agents(request: &RequestRecord) -> bool {
    request.user.ends_with(NODE) && request.user_agent.starts_with("rebase-agent")
}

struct Wakes {
    timers: usize,
    others: usize,
}

/// The ends of the process's sleeps in a minute; `None` without strace.
async fn traced(agent: PathBuf, settle: Duration, keep: Option<PathBuf>) -> Result<Option<Wakes>> {
    let mut version = tokio::process::Command::new("strace");
    version.arg("--version");
    if tools::run(version, DEADLINE).await.is_err() {
        return Ok(None);
    }
    let directory = tempfile::tempdir()?;
    let output = directory.path().join("strace");
    let world = node(&agent, &[], Some(&output)).await.context("a node whose agent runs under strace")?;
    tokio::time::sleep(settle).await;
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let began = now();
    tokio::time::sleep(WINDOW).await;
    let ended = now();
    world.machine.stop_agent().await;
    let text = std::fs::read_to_string(&output).context("strace wrote nothing")?;
    if let Some(keep) = keep {
        std::fs::write(keep, format!("idle from {began:.6} to {ended:.6}\n{text}"))?;
    }
    ensure!(text.contains("epoll"), "strace saw no epoll call");
    let woken = text.lines().filter_map(wake).filter(|(at, _)| (began..=ended).contains(at));
    let (timers, others): (Vec<_>, Vec<_>) = woken.partition(|(_, timer)| *timer);
    Ok(Some(Wakes { timers: timers.len(), others: others.len() }))
}

/// When a sleep in epoll ended, and whether by its own time limit. `None` for other lines, and for calls that did not
/// sleep: `812 1763800000.123456 epoll_wait(3, [], 1024, 59873) = 0 <59.932514>`, or the second half of such a line.
fn wake(line: &str) -> Option<(f64, bool)> {
    let mut words = line.split_whitespace();
    let at: f64 = words.nth(1)?.parse().ok()?;
    let (call, result) = line.rsplit_once(") = ")?;
    let limit = call.rsplit_once(']')?.1.split(", ").nth(2)?;
    let slept: f64 = result.rsplit_once('<')?.1.strip_suffix('>')?.parse().ok()?;
    if limit == "0" || slept < 0.0001 {
        return None;
    }
    let at = if line.contains("resumed>") { at } else { at + slept };
    Some((at, result.split_whitespace().next()? == "0"))
}

/// All events of a node, with their times.
#[derive(Clone, Default)]
struct Trace(Arc<Mutex<Vec<(Instant, Event)>>>);

impl Trace {
    fn of(world: &World) -> Self {
        let trace = Self::default();
        let told = trace.clone();
        world.events.listen(move |event| told.0.lock().unwrap().push((Instant::now(), event.clone())));
        trace
    }

    /// The current position.
    fn mark(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn first(&self, from: usize, is: impl Fn(&Event) -> bool) -> Option<Instant> {
        self.0.lock().unwrap().iter().skip(from).find(|(_, event)| is(event)).map(|(at, _)| *at)
    }

    async fn see(&self, from: usize, what: &str, is: impl Fn(&Event) -> bool) -> Result<Instant> {
        let wait = async {
            loop {
                if let Some(at) = self.first(from, &is) {
                    return at;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.with_context(|| format!("{what} did not happen"))
    }
}

/// Milliseconds of each round.
#[derive(Default)]
struct Latency {
    notice: Vec<f64>,
    verify: Vec<f64>,
    bare: Vec<f64>,
    decide: Vec<f64>,
    whole: Vec<f64>,
}

struct Update {
    reads: usize,
    watches: usize,
    writes: usize,
    /// Seconds.
    staging: f64,
    out: f64,
    whole: f64,
}

struct Work {
    latency: Result<Latency>,
    memory: Result<Memory>,
    /// Payload in MiB, and the cost of an update with it.
    updates: Result<Vec<(u32, Vec<Update>)>>,
}

async fn work(options: &Options) -> Result<Work> {
    let world = node(&options.agent, &[], None).await?;
    let trace = Trace::of(&world);
    let rounds = if options.quick { 10 } else { 20 };
    say(&format!("from the annotation to the Rebase call, {rounds} times"));
    let latency = latency(&world, &trace, rounds).await;
    let memory = world.machine.agent_pid().context("the agent is gone").and_then(memory);
    let updates = match &latency {
        Ok(_) => updates(&world, &trace, options.quick).await,
        Err(_) => Err(anyhow::anyhow!("not tried after the failure before")),
    };
    Ok(Work { latency, memory, updates })
}

/// The annotations that MCC writes.
fn desire(world: &World, config: &str, image: &Pushed) -> Result<Instant> {
    let annotations: BTreeMap<String, String> =
        [("desiredConfig", config.to_owned()), ("desiredImage", image.pullspec())]
            .into_iter()
            .map(|(key, value)| (format!("{PREFIX}{key}"), value))
            .collect();
    let began = Instant::now();
    world.store().patch_as(MANAGER, NODE, json!({ "metadata": { "annotations": annotations } }))?;
    Ok(began)
}

fn requests_rebase(event: &Event) -> bool {
    matches!(event, Event::TransactionRequested { method, .. } if method == "rebase")
}

/// Gives a held node one fresh image after the other, and lets it return to its own in between.
async fn latency(world: &World, trace: &Trace, rounds: usize) -> Result<Latency> {
    world.store().annotate("kubectl-annotate", NODE, HOLD, Some("the benchmark"))?;
    let installed = world.installed.clone();
    let mut latency = Latency::default();
    // The first round includes skopeo's version check and fills caches; it is not counted.
    for round in 0..=rounds {
        let version = (100 + round).to_string();
        let image = world.signed(&version).await?;
        // Once to fill the registry's caches, once for the measurement; the agent comes third.
        bare(world, &image).await?;
        let alone = bare(world, &image).await?;
        let from = trace.mark();
        let began = desire(world, &format!("rendered-worker-{version}"), &image)?;
        trace.see(from, "the Rebase call", requests_rebase).await?;
        trace.see(from, "staging", |event| matches!(event, Event::Staged { .. })).await?;
        world.wait_reason("Held").await?;
        let noticed = trace
            .first(from, |event| matches!(event, Event::AgentStatus(status) if status.starts_with("Verifying")))
            .context("the agent did not say that it verifies")?;
        let verified = trace
            .first(from, |event| matches!(event, Event::AgentLine(line) if line.contains(" verified ")))
            .context("the agent did not say that it verified")?;
        let requested = trace.first(from, requests_rebase).context("no Rebase call")?;
        desire(world, "rendered-worker-1", &installed)?;
        world.wait_done(&installed).await?;
        let wait = async {
            while world.machine.deployments().iter().any(|deployment| deployment.staged) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.context("the staged deployment is not dropped")?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        if round == 0 {
            continue;
        }
        let between = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
        latency.notice.push(between(began, noticed));
        latency.verify.push(between(noticed, verified));
        latency.decide.push(between(verified, requested));
        latency.whole.push(between(began, requested));
        latency.bare.push(alone);
    }
    world.store().annotate("kubectl-annotate", NODE, HOLD, None)?;
    Ok(latency)
}

/// The engine alone, in its own process, which is as small as the agent's.
async fn bare(world: &World, image: &Pushed) -> Result<f64> {
    let mut command = tokio::process::Command::new(std::env::current_exe()?);
    command.arg("--agent").arg(&world.agent.program).arg("--bare").arg(image.pullspec());
    command.envs(world.agent.env.iter().cloned());
    Ok(tools::run_ok(command, DEADLINE).await?.trim().parse::<f64>()? * 1e3)
}

/// Runs the engine without the agent: the same skopeo, policy and requests. This process cannot write either; otherwise
/// the engine would keep a cache on disk, which it cannot for the agent.
fn bare_engine(image: &str) -> Result<Duration> {
    let null = PathBeneath::new(PathFd::new("/dev/null")?, AccessFs::WriteFile);
    Ruleset::default().handle_access(AccessFs::from_write(ABI::V5))?.create()?.add_rule(null)?.restrict_self()?;
    let setting = |name: &str| {
        let name = format!("REBASE_AGENT_{name}");
        std::env::var(&name).with_context(|| format!("{name} is not set"))
    };
    let mut command = std::process::Command::new(setting("SKOPEO")?);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/nonexistent");
    command.arg("--policy").arg(setting("POLICY")?).arg("--registries.d").arg(setting("REGISTRIES_D")?);
    let mut config = ImageProxyConfig::default();
    config.auth_anonymous = true;
    config.certificate_directory = Some(setting("CERT_DIR")?.into());
    config.skopeo_cmd = Some(command);
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let began = Instant::now();
        let proxy = ImageProxy::new_with_config(config).await?;
        let opened = proxy.open_image(&format!("docker://{image}")).await?;
        proxy.fetch_manifest_raw_oci(&opened).await?;
        proxy.fetch_config_raw(&opened).await?;
        proxy.finalize().await?;
        Ok(began.elapsed())
    })
}

/// Complete updates, with a small and a large image in turns.
async fn updates(world: &World, trace: &Trace, quick: bool) -> Result<Vec<(u32, Vec<Update>)>> {
    let (sizes, rounds) = if quick { ([5, 50], 3) } else { ([50, 500], 3) };
    // Each image is stored in the registry, in the image store, and in the deployment.
    let needed = sizes.iter().sum::<u32>() * rounds * 3;
    let disk = nix::sys::statvfs::statvfs(world.path())?;
    let free = disk.blocks_available().saturating_mul(disk.fragment_size()) >> 20;
    if free < u64::from(needed) {
        bail!("{} has {free} MiB free, {needed} are needed; choose another place with TMPDIR", world.path().display());
    }
    let mut updates: Vec<(u32, Vec<Update>)> = sizes.iter().map(|size| (*size, Vec::new())).collect();
    for round in 0..rounds {
        for (index, (size, taken)) in updates.iter_mut().enumerate() {
            say(&format!("a whole update with {size} MiB, {} of {rounds}", round + 1));
            let version = format!("{}", 200 + 10 * round + u32::try_from(index)?);
            let config = format!("rendered-worker-{version}");
            let spec = ImageSpec::new(&version).rendered_config(&config).payload_mib(*size);
            let image = world.registry.push(REPOSITORY, &version, &spec).await?;
            drop(spec);
            world.sign(&image, &version).await?;
            taken.push(update(world, trace, &config, &image).await?);
        }
    }
    Ok(updates)
}

async fn update(world: &World, trace: &Trace, config: &str, image: &Pushed) -> Result<Update> {
    let (from, requests) = (trace.mark(), world.api.requests().len());
    let began = desire(world, config, image)?;
    let pullspec = image.pullspec();
    let done = |node: &Value| is_node_done(node) && annotation(node, "currentImage") == Some(pullspec.as_str());
    world.store().wait_for(NODE, UPDATE, done).await.context("the update did not end")?;
    let whole = began.elapsed().as_secs_f64();
    // The last writes may still be running.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let requests: Vec<RequestRecord> = world.api.requests().into_iter().skip(requests).filter(is_agents).collect();
    let first = |what: &str, is: &dyn Fn(&Event) -> bool| trace.first(from, is).with_context(|| what.to_owned());
    let requested = first("no Rebase call", &requests_rebase)?;
    let staged = first("nothing was staged", &|event| matches!(event, Event::Staged { .. }))?;
    let drain = first("no drain was asked for", &|event| {
        matches!(event, Event::NodeChanged { manager, changes, .. } if manager == "rebase-agent"
        && changes.get(&format!("{PREFIX}desiredDrain")).is_some_and(|value| {
            value.as_deref().is_some_and(|value| value.starts_with("drain-"))
        }))
    })?;
    let rebooted = first("no reboot", &|event| *event == Event::RebootAccepted)?;
    let seconds = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
    let of_node = |request: &&RequestRecord| request.path_and_query.starts_with("/api/v1/nodes");
    let writes = requests.iter().filter(of_node).filter(|request| request.method == "PATCH").count();
    let watches = requests.iter().filter(|request| request.is_watch()).count();
    Ok(Update {
        reads: requests.iter().filter(|request| request.method == "GET").count() - watches,
        watches,
        writes,
        staging: seconds(requested, staged),
        out: seconds(drain, rebooted),
        whole,
    })
}

// --- output ------------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Met,
    Missed,
    /// No target exists.
    Shown,
    /// A needed tool is missing.
    Absent,
    Failed,
}

struct Row {
    what: &'static str,
    measured: String,
    target: String,
    verdict: Verdict,
    note: String,
}

#[derive(Default)]
struct Table {
    rows: Vec<Row>,
}

impl Table {
    fn row(&mut self, what: &'static str, measured: String, target: &str, met: Option<bool>, note: String) {
        let verdict = match met {
            Some(true) => Verdict::Met,
            Some(false) => Verdict::Missed,
            None => Verdict::Shown,
        };
        self.rows.push(Row { what, measured, target: target.to_owned(), verdict, note });
    }

    fn without(&mut self, what: &'static str, target: &str, verdict: Verdict, why: String) {
        self.rows.push(Row { what, measured: "n/a".to_owned(), target: target.to_owned(), verdict, note: why });
    }

    fn failed(&mut self, what: &'static str, target: &str, error: &anyhow::Error) {
        self.without(what, target, Verdict::Failed, format!("{error:#}"));
    }

    fn program(&mut self, options: &Options) {
        const WHAT: &str = "size of the program, stripped";
        match std::fs::metadata(&options.agent).with_context(|| options.agent.display().to_string()) {
            Ok(file) => {
                let size = file.len() as f64 / 1e6;
                self.row(WHAT, format!("{size:.2} MB"), "<= 4 MB", Some(size <= 4.0), String::new());
            }
            Err(error) => self.failed(WHAT, "<= 4 MB", &error),
        }
        const CRATES: &str = "crates in its tree";
        match (options.crates, options.macros) {
            (Some(crates), macros) => {
                let note = macros.map(|macros| {
                    format!("itself included; {macros} of them are procedural macros or serve one, and are not in the program")
                });
                self.row(CRATES, crates.to_string(), "-", None, note.unwrap_or_default());
            }
            (None, _) => {
                self.without(CRATES, "-", Verdict::Absent, "--crates was not given; tests/bench does".to_owned())
            }
        }
    }

    fn memory(&mut self, idle: Result<Memory>, later: Option<&Result<Memory>>) {
        const WHAT: &str = "memory when idle, PSS";
        let text = |memory: &Memory| {
            format!(
                "RSS {:.1}, private {:.1} (anonymous {:.1}) MiB, threads {}",
                memory.rss, memory.private, memory.anonymous, memory.threads
            )
        };
        match idle {
            Ok(memory) => {
                let note = format!(
                    "{}; its program is not shared, its libraries are shared with this benchmark",
                    text(&memory)
                );
                self.row(WHAT, format!("{:.1} MiB", memory.pss), "<= 8 MiB", Some(memory.pss <= 8.0), note);
            }
            Err(error) => self.failed(WHAT, "<= 8 MiB", &error),
        }
        if let Some(Ok(memory)) = later {
            let note = format!("{}; other agents run meanwhile and share its program", text(memory));
            self.row("after the verifications below, PSS", format!("{:.1} MiB", memory.pss), "-", None, note);
        }
    }

    fn wakes(&mut self, quiet: &Result<Quiet>, traced: &Result<Option<Wakes>>) {
        const TIMERS: &str = "own timers a minute, idle";
        match traced {
            Ok(Some(wakes)) => {
                let note = format!(
                    "sleeps in epoll that ended by their time limit, seen by strace; {} more ended by an event. tokio cuts one \
                     long timer into as many as three",
                    wakes.others
                );
                self.row(TIMERS, wakes.timers.to_string(), "<= 1", Some(wakes.timers <= 1), note);
            }
            Ok(None) => self.without(TIMERS, "<= 1", Verdict::Absent, "strace is not installed".to_owned()),
            Err(error) => self.failed(TIMERS, "<= 1", error),
        }
        const WAKES: &str = "wake-ups a minute, idle";
        match quiet {
            Ok(quiet) => {
                let per_minute = quiet.switches as f64 * 60.0 / quiet.window.as_secs_f64();
                let note = format!(
                    "voluntary context switches of all threads, the API server's bookmark a minute included; {} \
                     involuntary, {:.1} ms of processor time",
                    quiet.involuntary,
                    quiet.cpu.as_secs_f64() * 1e3
                );
                self.row(WAKES, format!("{per_minute:.0}"), "<= 5", Some(per_minute.round() <= 5.0), note);
            }
            Err(error) => self.failed(WAKES, "<= 5", error),
        }
    }

    fn activations(&mut self, quiet: &Result<Quiet>, polled: &Result<Polled>) {
        const WHAT: &str = "rpm-ostreed activations an idle hour";
        match (quiet, polled) {
            (Ok(quiet), Ok(polled)) => {
                // Each minute of the hour is like the observed one, and each poll like the observed ones.
                let polls = 3600.0 / (POLLS.1 * JITTER.0 + JITTER.1);
                let hourly = quiet.activations as f64 * 60.0 + polled.activations as f64 * polls / polled.cycles as f64;
                let note = format!(
                    "from an idle minute and {} polls in {:.0} s, the daemon having exited before; {} D-Bus calls of any \
                     kind in that minute",
                    polled.cycles,
                    polled.window.as_secs_f64(),
                    quiet.calls
                );
                self.row(WHAT, format!("{hourly:.0}"), "0", Some(hourly == 0.0), note);
            }
            (Err(error), _) | (_, Err(error)) => self.failed(WHAT, "0", error),
        }
    }

    fn idle_api(&mut self, polled: &Result<Polled>) {
        const WHAT: &str = "API requests an idle hour";
        match polled {
            Ok(polled) => {
                let polls = 3600.0 / (POLLS.1 * JITTER.0 + JITTER.1);
                let bytes = polls * (polled.read + polled.watch) as f64
                    + TOLD.0 * polled.watch as f64
                    + TOLD.1 * polled.heartbeat as f64;
                let note = format!(
                    "{:.1} a poll, counted over {} polls with --poll {} and scaled to the default of 300 s and its jitter",
                    polled.requests, polled.cycles, POLLS.0
                );
                self.row(WHAT, format!("{:.1}", polls * polled.requests), "-", None, note);
                let note = format!(
                    "bodies: {} a read, {} a watch that tells nothing; with a bookmark a minute and 12 kubelet reports \
                     of {} an hour",
                    polled.read, polled.watch, polled.heartbeat
                );
                self.row("API bytes an idle hour", format!("{:.1} kB", bytes / 1e3), "-", None, note);
            }
            Err(error) => self.failed(WHAT, "-", error),
        }
    }

    fn work(&mut self, work: &Result<Work>) {
        const NOTICE: &str = "annotation to Verifying";
        const API: &str = "writes of the Node in a whole update";
        match work {
            Ok(work) => {
                match &work.latency {
                    Ok(latency) => self.latency(latency),
                    Err(error) => self.failed(NOTICE, "<= 50 ms", error),
                }
                match &work.updates {
                    Ok(updates) => self.updates(updates),
                    Err(error) => self.failed(API, "<= 8", error),
                }
            }
            Err(error) => self.failed(NOTICE, "<= 50 ms", error),
        }
    }

    fn latency(&mut self, latency: &Latency) {
        let of = |times: &[f64]| format!("{:.0} ms", median(times));
        let range = |times: &[f64]| {
            let (least, most) = ends(times);
            format!("median of {}, {least:.0} to {most:.0} ms", times.len())
        };
        let notice = median(&latency.notice);
        let note = range(&latency.notice);
        self.row("annotation to Verifying", of(&latency.notice), "<= 50 ms", Some(notice <= 50.0), note);
        let ratios: Vec<f64> = latency.verify.iter().zip(&latency.bare).map(|(agent, alone)| agent / alone).collect();
        let ratio = median(&ratios);
        let note = format!(
            "median of each round's ratio; {} through the agent, {} by the engine alone just before (medians; {:.0} to \
             {:.0} ms and {:.0} to {:.0} ms)",
            of(&latency.verify),
            of(&latency.bare),
            ends(&latency.verify).0,
            ends(&latency.verify).1,
            ends(&latency.bare).0,
            ends(&latency.bare).1
        );
        let what = "verification, to the engine alone";
        self.row(what, format!("x {ratio:.2}"), "<= x 1.3", Some(ratio <= 1.3), note);
        let note = format!("{}; the deployments are read once more in it", range(&latency.decide));
        self.row("verified to the Rebase call", of(&latency.decide), "-", None, note);
        let note = range(&latency.whole);
        self.row("annotation to the Rebase call", of(&latency.whole), "-", None, note);
    }

    fn updates(&mut self, updates: &[(u32, Vec<Update>)]) {
        let all = || updates.iter().flat_map(|(_, taken)| taken);
        let most = |of: fn(&Update) -> usize| all().map(of).max().unwrap_or_default();
        let counts = |of: fn(&Update) -> usize| {
            let mut counts: Vec<usize> = all().map(of).collect();
            counts.sort_unstable();
            (counts.first().copied().unwrap_or_default(), counts.last().copied().unwrap_or_default())
        };
        let span = |(least, most): (usize, usize)| {
            if least == most { format!("{most}") } else { format!("{least} to {most}") }
        };
        let writes = most(|update| update.writes);
        let note = format!("the most of {} updates; from the new annotation to Done, a reboot between", all().count());
        self.row("writes of the Node in a whole update", writes.to_string(), "<= 8", Some(writes <= 8), note);
        let (reads, watches) = (counts(|update| update.reads), counts(|update| update.watches));
        let note = format!("and {} watches opened", span(watches));
        self.row("API reads of a whole update", span(reads), "-", None, note);
        let mut text = (Vec::new(), Vec::new(), Vec::new());
        for (size, taken) in updates {
            let of = |what: fn(&Update) -> f64| -> f64 { median(&taken.iter().map(what).collect::<Vec<f64>>()) };
            text.0.push(format!("{:.2} s", of(|update| update.out)));
            text.1.push(format!("{size} MiB: {:.1} s", of(|update| update.staging)));
            text.2.push(format!("{:.1} s", of(|update| update.whole)));
        }
        let out: Vec<Vec<f64>> =
            updates.iter().map(|(_, taken)| taken.iter().map(|update| update.out).collect()).collect();
        let [small, large] = out.as_slice() else { return };
        // The tolerance: the spread between runs of the same size, or the resolution of the doubles.
        let spread = [small, large].map(|times| ends(times).1 - ends(times).0).into_iter().fold(0.0, f64::max);
        let apart = (median(small) - median(large)).abs();
        let note = format!(
            "drain request to accepted reboot, medians of {} each; {:.0} ms apart, where runs of one size are up to {:.0} \
             ms apart (that much, or 50 ms, is noise); the eviction of the drain double takes 300 ms of it",
            small.len(),
            apart * 1e3,
            spread * 1e3
        );
        let what = "out of service before the reboot";
        self.row(what, text.0.join(" / "), "the same", Some(apart <= spread.max(0.05)), note);
        let note = format!(
            "in service; {} from the annotation to Done. The pull is real, the deployment a double's",
            text.2.join(" / ")
        );
        self.row("staging beside it", text.1.join(" / "), "-", None, note);
    }

    fn text(&self) -> String {
        let width =
            |of: fn(&Row) -> &str| self.rows.iter().map(|row| of(row).chars().count()).max().unwrap_or_default();
        let (what, measured) = (width(|row| row.what), width(|row| &row.measured).max(8));
        let target = width(|row| &row.target).max(6);
        let mut text = format!("{:what$}  {:measured$}  {:target$}  verdict\n", "", "measured", "target");
        for row in &self.rows {
            let verdict = match row.verdict {
                Verdict::Met => "met",
                Verdict::Missed => "MISSED",
                Verdict::Shown => "-",
                Verdict::Absent => "n/a",
                Verdict::Failed => "FAILED",
            };
            let (name, found, wanted) = (row.what, &row.measured, &row.target);
            let _ = writeln!(text, "{name:what$}  {found:measured$}  {wanted:target$}  {verdict}");
            for line in wrapped(&row.note, 108) {
                let _ = writeln!(text, "    {line}");
            }
        }
        text
    }
}

/// Cuts at spaces.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + word.chars().count() < width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn median<T: Copy + PartialOrd + Default>(values: &[T]) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn ends(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, 0.0), |(least, most), value| (value.min(least), value.max(most)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_are_read_from_strace() {
        let close = |line: &str, at: f64, timer: bool| {
            let (found, by_timer) = wake(line).unwrap();
            assert!((found - at).abs() < 1e-6 && by_timer == timer, "{line}");
        };
        close("812 1000.500000 epoll_wait(3, [], 1024, 59873) = 0 <59.900000>", 1060.4, true);
        let event = "812 1000.5 epoll_wait(3, [{events=EPOLLIN, data={u32=1, u64=1}}], 1024, -1) = 1 <2.5>";
        close(event, 1003.0, false);
        close("812 1002.000000 <... epoll_wait resumed>[], 1024, 1000) = 0 <1.000000>", 1002.0, true);
        close("812 1000.000000 epoll_pwait(3, [], 1024, 1000, NULL, 8) = 0 <1.000000>", 1001.0, true);
        for other in [
            "812 1000.500000 epoll_wait(3, [], 1024, 0) = 0 <0.000004>",
            "812 1000.500000 epoll_wait(3,  <unfinished ...>",
            "812 1000.500000 +++ exited with 0 +++",
            "",
        ] {
            assert!(wake(other).is_none(), "{other}");
        }
    }
}
