//! The loop: observe, decide, act, report, then wait for a change, a deadline or a poll. Everything that may take time
//! runs as a task and comes back as an event, so the loop itself never waits for anybody.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::cli::CONFINEMENT;
use crate::cluster::node::NodeObject;
use crate::cluster::{ClusterError, Told, follow};
use crate::confine::Confinement;
use crate::decide::{RESTORE_SPREAD, decide};
use crate::host::boot::DeploymentsStamp;
use crate::journal::id;
use crate::lane::Lane;
use crate::model::{
    Action, Clock, Decision, Fault, HostFacts, Limits, MachineFacts, Memory, NodeState, Now, Observed, PinnedImage,
    Reading, Reason, Running, Since, Step, printable,
};
use crate::observe::{self, Neighbours};
use crate::registry::{TrustStamp, Verified};
use crate::report::{Patch, report};
use crate::schedule::{Backoff, full_jitter, jittered, random};
use crate::{act, model};

/// The longest sleep: what nobody tells us (a deployment written by hand, a changed policy) is noticed by then. Also
/// the one own timer of an idle agent, which tokio's wheel splits into up to three: one a minute.
const HOUSEKEEPING: Duration = Duration::from_secs(180);
/// systemd hears `READY=1` by then, whatever is still unknown.
const FIRST_PASS: Duration = Duration::from_secs(30);
/// A read of the whole Node that an event overtook is not repeated before that.
const OVERTAKEN: Duration = Duration::from_secs(1);
/// Events that may wait for the loop.
const QUEUE: usize = 64;
/// How long the end of the process waits for systemd to take its last notices.
const FLUSH: Duration = Duration::from_secs(1);
/// How many dropped checksums are remembered; a host has few deployments.
const DROPPED: usize = 32;
/// Longest rule in `STATUS=`, in characters.
const STATUS: usize = 400;

/// What a task came to.
enum Event {
    Node(Told),
    Looked(Box<Readings>),
    Patched(Told, Patch),
    Progress(String),
    /// The number of the task, and what it came to.
    Ended(u64, Box<Result<Option<Verified<PinnedImage>>, Fault>>),
}

/// What systemd is told.
enum Notice {
    Ready,
    Stopping,
    Watchdog,
    Status(String),
}

/// One look around, as far as it went.
struct Readings {
    node: Option<Told>,
    /// With the stamps from before it was read: what changes meanwhile must be read once more.
    host: Option<(DeploymentsStamp, Reading<HostFacts>)>,
    machine: Reading<MachineFacts>,
}

/// What the agent was started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What an operator may set.
    pub limits: Limits,
    /// Time between two reads of our Node.
    pub poll: Duration,
    /// How far the kernel confines this process.
    pub confinement: Confinement,
}

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Look {
    /// Kernel, systemd, logind.
    Machine,
    /// The deployments, too.
    Host,
    /// And the whole Node: what a reboot needs.
    Everything,
}

struct Task {
    /// Tells it from one for the same subject that was dropped, whose end may still be on its way.
    number: u64,
    running: Running,
    handle: JoinHandle<()>,
    cancel: watch::Sender<bool>,
}

struct Agent {
    neighbours: Neighbours,
    settings: Settings,
    events: mpsc::Sender<Event>,
    began: Instant,
    memory: Memory,
    proofs: BTreeMap<PinnedImage, Verified<PinnedImage>>,
    node: Option<NodeObject>,
    observed: Observed,
    /// What has been asked at least once.
    seen: (bool, bool),
    task: Option<Task>,
    /// Tasks begun so far.
    tasks: u64,
    systemd: Lane<Notice>,
    /// A look is under way.
    looking: bool,
    /// Another was asked for meanwhile: what is under way may not see what happened since.
    again: Option<Look>,
    /// The deployments are known to have changed and not read yet: nothing is decided on the old ones.
    stale: bool,
    patching: bool,
    /// The readings are of now: a reboot may follow from them.
    confirmed: bool,
    cluster_failures: u32,
    /// No request of our own to the API server before that.
    cluster_after: Instant,
    /// When our last request to the API server failed, and until when it told us to stay away.
    cluster_failed: Option<(Instant, Instant)>,
    stamps: Stamps,
    last: Option<Decision>,
    progress: Option<String>,
    status: String,
    wake: Instant,
}

/// What identified the files that our knowledge comes from. Nothing is decided on what has changed since.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamps {
    /// From before the deployments were read.
    deployments: DeploymentsStamp,
    /// From before the last verification began, whichever way it ended.
    trust: Option<TrustStamp>,
}

/// Runs until SIGTERM or SIGINT. Whatever is under way then can be taken up by the next start.
///
/// # Errors
/// When the process cannot listen to signals.
pub async fn run(neighbours: Neighbours, settings: Settings) -> io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (events, mut queue) = mpsc::channel(QUEUE);
    let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);

    let (told, mut node) = mpsc::channel(QUEUE);
    let following = tokio::spawn(follow(neighbours.api.clone(), settings.poll, told));
    let mut agent = Agent::new(neighbours, settings, events, systemd()?);
    agent.look(Look::Host);
    let mut ready = false;
    let mut ping = Instant::now();
    loop {
        // On a timer, however many events there are.
        if let Some(period) = watchdog.filter(|_| Instant::now() >= ping) {
            agent.systemd.send(Notice::Watchdog);
            ping = Instant::now() + period;
        }
        if !ready && (agent.seen == (true, true) || agent.began.elapsed() >= FIRST_PASS) {
            ready = true;
            agent.systemd.send(Notice::Ready);
        }
        let wake = agent.wake.min(Instant::now() + HOUSEKEEPING);
        let wake = if watchdog.is_some() { wake.min(ping) } else { wake };
        let wake = if ready { wake } else { wake.min(agent.began + FIRST_PASS) };
        tokio::select! {
            Some(event) = queue.recv() => agent.hear(event),
            Some(told) = node.recv() => agent.hear(Event::Node(told)),
            () = tokio::time::sleep_until(wake) => agent.tick(),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    agent.systemd.send(Notice::Stopping);
    tracing::info!(message_id = id::STOPPING, "stopping; whatever was begun is taken up by the next start");
    following.abort();
    if let Some(task) = agent.task {
        task.handle.abort();
    }
    agent.systemd.flush(FLUSH);
    Ok(())
}

/// The thread that tells systemd, which may be slow to listen.
fn systemd() -> io::Result<Lane<Notice>> {
    let work = |notice| {
        let state = match &notice {
            Notice::Ready => NotifyState::Ready,
            Notice::Stopping => NotifyState::Stopping,
            Notice::Watchdog => NotifyState::Watchdog,
            Notice::Status(text) => NotifyState::Status(text),
        };
        if let Err(error) = sd_notify::notify(&[state]) {
            tracing::debug!("systemd cannot be notified: {error}");
        }
    };
    let lost = |number| {
        tracing::warn!(message_id = id::FAILED, "{number} notices were dropped: systemd did not take them in time");
    };
    Lane::new("notify", work, lost)
}

impl Agent {
    fn new(neighbours: Neighbours, settings: Settings, events: mpsc::Sender<Event>, systemd: Lane<Notice>) -> Self {
        fn unread(reason: Reason) -> Fault {
            Fault { reason, message: "not read yet".to_owned(), retryable: true }
        }
        let stamps = Stamps { deployments: neighbours.host.root().deployments_stamp(), trust: None };
        let began = Instant::now();
        Self {
            neighbours,
            settings,
            events,
            began,
            memory: Memory { spread: full_jitter(RESTORE_SPREAD, random()), ..Memory::default() },
            proofs: BTreeMap::new(),
            node: None,
            observed: Observed {
                cluster: Reading::Unknown(unread(Reason::ClusterUnreachable)),
                host: Reading::Unknown(unread(Reason::HostUnreachable)),
                machine: Reading::Unknown(unread(Reason::HostUnreachable)),
                running: None,
            },
            seen: (false, false),
            task: None,
            tasks: 0,
            systemd,
            looking: false,
            again: None,
            stale: false,
            patching: false,
            confirmed: false,
            cluster_failures: 0,
            cluster_after: began,
            cluster_failed: None,
            stamps,
            last: None,
            progress: None,
            status: String::new(),
            wake: began + HOUSEKEEPING,
        }
    }

    fn now(&self) -> Now {
        let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Now {
            mono: milliseconds(self.began.elapsed()),
            unix: self
                .neighbours
                .api
                .time()
                .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map(milliseconds).unwrap_or_default()),
        }
    }

    /// Nothing has to be followed up: the next change will be told.
    fn is_idle(&self) -> bool {
        self.task.is_none()
            && self.last.as_ref().is_some_and(|last| last.reason.is_at_rest() || last.reason == Reason::NotLayered)
    }

    // --- observe --------------------------------------------------------------------------------------------------

    fn look(&mut self, how: Look) {
        if self.looking {
            self.again = self.again.max(Some(how));
            return;
        }
        self.looking = true;
        let (neighbours, events) = (self.neighbours.clone(), self.events.clone());
        tokio::spawn(async move {
            let node = async { if how == Look::Everything { Some(neighbours.api.full().await) } else { None } };
            let host = async {
                let stamps = neighbours.host.root().deployments_stamp();
                if how >= Look::Host { Some((stamps, observe::deployments(&neighbours.host).await)) } else { None }
            };
            let (node, host, machine) = tokio::join!(node, host, observe::machine(&neighbours.host));
            let _ = events.send(Event::Looked(Box::new(Readings { node, host, machine }))).await;
        });
    }

    fn tick(&mut self) {
        let unknown = self.observed.host.known().is_none();
        let busy = self.observed.host.known().is_some_and(|host| host.transaction.is_some());
        if !self.is_idle() && self.task.is_none() {
            self.look(if unknown || busy { Look::Host } else { Look::Machine });
        }
        self.step();
    }

    /// Withdraws the proof when a file that it rests on is not what it was, and has the deployments read again when
    /// they changed. Costs a few calls of stat(2), so every step begins with it: also the last before the reboot.
    fn check_stamps(&mut self) {
        let settings = self.neighbours.engine.settings();
        let changed = self.stamps.trust.as_ref().and_then(|trust| trust.changed(settings));
        if let Some(path) = changed {
            tracing::info!("{} changed, which decides about signatures; verifying again", path.display());
            self.withdraw_proofs();
            self.memory.succeeded(Step::Verify);
            // What is being verified may have read the file before it changed.
            if self.is_running(|step| step == Step::Verify) {
                self.abort();
            }
        }
        // What we change ourselves is read when that has ended.
        let changes_host = self.is_running(|step| step != Step::Verify);
        if !self.stale && !changes_host && self.neighbours.host.root().deployments_stamp() != self.stamps.deployments {
            self.stale = true;
            self.look(Look::Host);
        }
    }

    fn withdraw_proofs(&mut self) {
        self.stamps.trust = None;
        self.memory.verified.clear();
        self.proofs.clear();
    }

    fn is_running(&self, step: impl Fn(Step) -> bool) -> bool {
        self.task.as_ref().is_some_and(|task| step(task.running.step))
    }

    fn hear(&mut self, event: Event) {
        match event {
            Event::Node(told) => {
                if !self.take_node(told) {
                    return;
                }
            }
            Event::Looked(readings) => {
                self.looking = false;
                self.confirmed = false;
                match readings.node {
                    Some(Ok(node)) => {
                        self.cluster_failures = 0;
                        self.confirmed = !self.is_outdated(&node);
                        if !self.confirmed {
                            self.cluster_after = self.cluster_after.max(Instant::now() + OVERTAKEN);
                        }
                        self.take_node(Ok(node));
                    }
                    // The watch is the one to say that the Node is gone; this only has to be asked again.
                    Some(Err(error)) => self.cluster_failed(&error, "the Node cannot be read"),
                    None => {}
                }
                if let Some((stamps, host)) = readings.host {
                    self.seen.1 = true;
                    self.stale = false;
                    self.observed.host = host;
                    self.stamps.deployments = stamps;
                }
                self.observed.machine = readings.machine;
                if let Some(how) = self.again.take() {
                    // The decision that follows asks for the Node again, if it still needs it.
                    let how = if Instant::now() < self.cluster_after { how.min(Look::Host) } else { how };
                    self.stale |= how >= Look::Host;
                    self.look(how);
                }
            }
            Event::Patched(told, patch) => {
                self.patching = false;
                match told {
                    Ok(node) => {
                        self.cluster_failures = 0;
                        log_report(&patch);
                        self.take_node(Ok(node));
                    }
                    Err(error) => self.cluster_failed(&error, "the Node's annotations cannot be changed"),
                }
            }
            Event::Progress(line) => {
                self.progress = Some(line);
                self.tell_status();
                return;
            }
            Event::Ended(number, outcome) => self.ended(number, *outcome),
        }
        self.step();
        self.confirmed = false;
    }

    fn is_outdated(&self, node: &NodeObject) -> bool {
        self.node.as_ref().is_some_and(|current| node.is_older_than(current))
    }

    /// Takes a state of our Node over, unless it is an older one; true if anything changed.
    fn take_node(&mut self, told: Told) -> bool {
        let first = !std::mem::replace(&mut self.seen.0, true);
        match told {
            Ok(node) => {
                let answers = self.heed_answer(&node);
                if self.is_outdated(&node) {
                    return first || answers;
                }
                let before = self.observed.cluster.known().map(|node| node.desired_image.clone());
                let retargeted = before.is_some_and(|before| before != node.facts.desired_image);
                let facts = observe::cluster(Ok(node.facts.clone()));
                let changed = facts != self.observed.cluster;
                if changed {
                    // A write whose reply was lost may be what we see.
                    self.cluster_failures = 0;
                }
                self.observed.cluster = facts;
                self.node = Some(node);
                if retargeted {
                    self.look(Look::Host);
                }
                changed || first || answers
            }
            Err(error) => {
                let unknown = observe::cluster(Err(error));
                let changed = unknown != self.observed.cluster;
                self.observed.cluster = unknown;
                changed || first
            }
        }
    }

    /// A read that was asked for after our last request failed, and answered: what failed may be tried at once, except
    /// where the server named a time. An event of a watch proves nothing: one that is open outlives its certificate.
    fn heed_answer(&mut self, node: &NodeObject) -> bool {
        let Some(asked) = node.asked() else { return false };
        let Some((_, until)) = self.cluster_failed.take_if(|(at, _)| asked > *at) else { return false };
        self.cluster_after = self.cluster_after.min(until.max(Instant::now()));
        true
    }

    fn cluster_failed(&mut self, error: &ClusterError, what: &str) {
        self.cluster_failures = self.cluster_failures.saturating_add(1);
        let delay = Duration::from_millis(jittered(Backoff::CLUSTER.delay(self.cluster_failures), random()));
        let (now, asked_for) = (Instant::now(), error.retry_after().unwrap_or_default());
        self.cluster_failed = Some((now, now + asked_for));
        self.cluster_after = now + delay.max(asked_for);
        tracing::warn!(message_id = id::FAILED, rebase_agent_reason = error.reason().as_str(), "{what}: {error}");
    }

    // --- decide, report, act ----------------------------------------------------------------------------------------

    fn step(&mut self) {
        if self.seen != (true, true) && self.began.elapsed() < FIRST_PASS {
            return;
        }
        self.check_stamps();
        // What is being written, or was just done, decides what is true next.
        if self.patching || self.stale {
            return;
        }
        let now = self.now();
        if let Some(node) = self.observed.cluster.known() {
            self.memory.heed_retry(node);
        }
        self.observed.running = self.task.as_ref().map(|task| task.running.clone());
        #[cfg(feature = "faults")]
        crate::faults::twist(&mut self.observed);
        let decision = decide(&self.observed, &self.memory, &self.settings.limits, now);
        self.memory.note(&self.observed, &decision, now);
        self.say(&decision);
        let wake = decision.wake.map_or(HOUSEKEEPING, |wake| Duration::from_millis(jittered(wake, random())));
        self.wake = Instant::now() + wake;
        self.report(&decision);
        self.act(&decision);
        self.last = Some(decision);
        self.tell_status();
    }

    fn report(&mut self, decision: &Decision) {
        let Some(node) = &self.node else { return };
        if self.observed.cluster.known().is_none() {
            return;
        }
        let patch = report(&node.facts, decision);
        if patch.is_empty() {
            return;
        }
        if Instant::now() < self.cluster_after {
            self.wake = self.wake.min(self.cluster_after);
            return;
        }
        self.patching = true;
        let (api, events, uid) = (self.neighbours.api.clone(), self.events.clone(), node.uid.clone());
        tokio::spawn(async move {
            let told = api.patch(&uid, &patch).await;
            let _ = events.send(Event::Patched(told, patch)).await;
        });
    }

    fn act(&mut self, decision: &Decision) {
        match &decision.action {
            Action::AbortTask => self.abort(),
            Action::ConfirmDrain => self.confirm(),
            // Everything is looked at once more, and only what is decided on that look is done.
            Action::Reboot { .. } if !self.confirmed => self.confirm(),
            action => {
                let desired = self.desired().map(|image| image.to_string()).unwrap_or_default();
                if self.task.is_none()
                    && let Some((step, subject)) = act::step(action, &desired)
                {
                    self.begin(action.clone(), Running { step, subject });
                }
            }
        }
    }

    /// Looks at everything, as soon as the API server may be asked.
    fn confirm(&mut self) {
        if Instant::now() >= self.cluster_after {
            self.look(Look::Everything);
        } else {
            self.wake = self.wake.min(self.cluster_after);
        }
    }

    fn desired(&self) -> Option<PinnedImage> {
        let desired = self.observed.cluster.known()?.desired_image.as_ref()?;
        crate::registry::reference::parse(desired).ok()
    }

    fn begin(&mut self, action: Action, running: Running) {
        if let Action::Verify { image } = &action {
            // An older proof is of another image, and from here on only the files of this one are watched.
            self.withdraw_proofs();
            self.stamps.trust = Some(TrustStamp::read(self.neighbours.engine.settings(), image));
        }
        let proof = self.desired().and_then(|image| self.proofs.get(&image)).cloned();
        let (cancel, cancelled) = watch::channel(false);
        self.tasks = self.tasks.saturating_add(1);
        let (neighbours, events, number) = (self.neighbours.clone(), self.events.clone(), self.tasks);
        let handle = tokio::spawn(async move {
            let telling = events.clone();
            let progress = move |line: String| {
                // A full queue loses a line of progress, nothing else.
                let _ = telling.try_send(Event::Progress(line));
            };
            let outcome = act::perform(action, &neighbours, proof, cancelled, &progress).await;
            let _ = events.send(Event::Ended(number, Box::new(outcome))).await;
        });
        self.progress = None;
        self.task = Some(Task { number, running, handle, cancel });
    }

    /// Verification is simply dropped; a transaction must be cancelled at its daemon, and its end awaited.
    fn abort(&mut self) {
        let Some(task) = &self.task else { return };
        if task.running.step == Step::Verify {
            task.handle.abort();
            self.task = None;
            self.wake = Instant::now();
        } else {
            task.cancel.send_replace(true);
        }
    }

    fn ended(&mut self, number: u64, outcome: Result<Option<Verified<PinnedImage>>, Fault>) {
        // A task that was dropped may have ended just before.
        let Some(task) = self.task.take_if(|task| task.number == number) else { return };
        let running = &task.running;
        self.progress = None;
        let now = self.now();
        let asked_to_stop = *task.cancel.borrow();
        match outcome {
            Ok(verified) => {
                self.memory.succeeded(running.step);
                if let Some(verified) = verified {
                    self.admit(verified);
                }
                match running.step {
                    Step::DropStaged => {
                        self.memory.dropped.truncate(DROPPED);
                        self.memory.dropped.insert(0, running.subject.clone());
                    }
                    Step::UpdateBootloader => self.memory.bootloader_updated_for = self.desired(),
                    Step::Reboot => {
                        tracing::info!(message_id = id::REBOOTING, "the reboot was accepted");
                        let since = Since { subject: running.subject.clone(), mono: now.mono };
                        self.memory.clocks.insert(Clock::RebootAccepted, since);
                    }
                    Step::Stage => {
                        let image = &running.subject;
                        tracing::info!(message_id = id::STAGED, rebase_agent_image = %image, "staged {image}");
                    }
                    Step::Verify | Step::CancelTransaction | Step::KernelArguments | Step::StartFinalizer => {}
                }
            }
            Err(_) if asked_to_stop => self.memory.gave_up(running.step),
            Err(fault) => {
                let reason = fault.reason.as_str();
                // Of every other step, the decision that follows says the same.
                if matches!(running.step, Step::UpdateBootloader | Step::CancelTransaction) {
                    tracing::warn!(message_id = id::FAILED, rebase_agent_reason = reason, "{}", fault.message);
                }
                if running.step == Step::UpdateBootloader {
                    // As the MCD: an old boot loader is reported and does not keep the node from its update.
                    self.memory.bootloader_updated_for = self.desired();
                } else {
                    self.memory.failed(running.step, &running.subject, fault, now);
                }
            }
        }
        if running.step != Step::Verify {
            self.stale = true;
            self.look(Look::Host);
        }
    }

    fn admit(&mut self, verified: Verified<PinnedImage>) {
        let facts = verified.facts();
        let (image, rule) = (&facts.image, &facts.vouched_by);
        tracing::info!(
            message_id = id::VERIFIED,
            rebase_agent_image = %image,
            "verified {image}: signed as rule {rule} of the node's policy requires; {} MiB, built from {}",
            facts.size >> 20,
            facts.rendered_config.as_deref().unwrap_or("no rendered config")
        );
        // What is not desired is verified again should it ever be.
        self.memory.verified = BTreeMap::from([(image.clone(), facts.clone())]);
        self.proofs = BTreeMap::from([(image.clone(), verified)]);
    }

    // --- telling people ---------------------------------------------------------------------------------------------

    fn say(&self, decision: &Decision) {
        let refuses = |of: &Decision| matches!(of.state, Some(NodeState::Degraded | NodeState::Unreconcilable));
        let words = |of: &Decision| (of.reason, of.message.clone(), refuses(of));
        let same = |last: &Decision| words(last) == words(decision);
        if self.last.as_ref().is_some_and(same) {
            return;
        }
        let (reason, rule, message) = (decision.reason.as_str(), &decision.rule, &decision.message);
        let message_id = match decision.reason {
            _ if refuses(decision) => id::REFUSED,
            Reason::Done => id::DONE,
            Reason::RunsUntrusted => id::UNTRUSTED,
            _ => id::DECIDED,
        };
        if refuses(decision) || matches!(decision.reason, Reason::RunsUntrusted | Reason::RollbackQueued) {
            tracing::warn!(message_id, rebase_agent_reason = reason, rebase_agent_rule = %rule, "{reason}: {message}");
        } else {
            tracing::info!(message_id, rebase_agent_reason = reason, rebase_agent_rule = %rule, "{reason}: {message}");
        }
    }

    fn tell_status(&mut self) {
        let Some(last) = &self.last else { return };
        let progress = self.progress.as_deref().map(|line| format!(" [{line}]")).unwrap_or_default();
        let status = model::printable(&format!("{}: {}{progress}", last.reason, last.message), STATUS);
        let status = format!("{status}{CONFINEMENT}{}", self.settings.confinement.sentence());
        if status != self.status {
            // systemd takes a message apart as it does command lines, and takes single backslashes out.
            self.systemd.send(Notice::Status(status.replace('\\', r"\\")));
            self.status = status;
        }
    }
}

/// The reason is left out: the decision was logged with the same words.
fn log_report(patch: &Patch) {
    let changes: Vec<String> = patch
        .iter()
        .map(|(key, value)| (key.rsplit_once('/').map_or(key.as_str(), |(_, key)| key), value))
        .filter(|(key, _)| *key != "reason")
        .map(|(key, value)| {
            format!("{key}={}", value.as_deref().map_or("(removed)".to_owned(), |value| printable(value, 200)))
        })
        .collect();
    if !changes.is_empty() {
        tracing::info!(message_id = id::REPORTED, "told the cluster: {}", changes.join(", "));
    }
}
