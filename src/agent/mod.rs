//! The loop: observe, decide, act, report, then wait for a change, a deadline or a poll. The loop itself never blocks:
//! slow operations run as tokio tasks and send an [`Event`].
//!
//! | task or thread | started by | sends |
//! |---|---|---|
//! | `follow`: list and watch our Node, poll it | [`run`], once | [`Event::Node`], on its own channel |
//! | a read of host, machine and, for a reboot, the whole Node | [`looking`], one at a time | [`Event::Looked`] |
//! | the agent's work: verify, stage, … reboot | [`task`], one at a time | [`Event::Progress`], [`Event::Ended`] |
//! | a patch of our Node's annotations | [`reporting`], one at a time | [`Event::Patched`] |
//! | a write of our MachineConfigNode | [`telling`], one at a time | [`Event::Shown`] |
//! | a read of the pool's MachineOSConfig | [`pool`], one at a time | [`Event::Pool`] |
//! | the thread `notify`, which writes to systemd | [`log`], once | nothing |
//!
//! `events` carries all events but the Node's changes. Both channels hold [`QUEUE`] events and are only read here.

mod log;
mod looking;
mod pool;
mod reporting;
mod task;
mod telling;
mod timing;

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::backoff::{full_jitter, jittered, random};
use crate::cluster::event::Event as News;
use crate::cluster::node::NodeObject;
use crate::cluster::{Told, follow};
use crate::confine::Confinement;
use crate::decide::{Decision, Limits, Memory, decide, limits};
use crate::journal::id;
use crate::lane::Lane;
use crate::model::{Action, Fault, Now, Observed, PinnedImage, Reading, Reason, Work};
use crate::observe::Neighbours;
use crate::report::Patch;
use crate::trust::VerifiedImage;
use log::Notice;
use looking::{Look, Readings, Sight};
use pool::{Pool, PoolImage};
use reporting::Cluster;
use task::{Ended, Task};
use telling::Teller;
use timing::Timing;

/// The longest sleep, after which the agent checks for changes without a signal: a deployment written by hand, a changed
/// policy. It is the only timer of an idle agent; tokio's timer wheel splits it into up to three wake-ups, one a minute.
const HOUSEKEEPING: Duration = Duration::from_secs(180);
/// The latest time of `READY=1`, even if the Node or the host could not be read yet.
const FIRST_PASS: Duration = Duration::from_secs(30);
/// How long to wait before the whole Node is read again, if a newer state arrived during the read.
const OVERTAKEN: Duration = Duration::from_secs(1);
/// Most queued events of each channel.
const QUEUE: usize = 64;
/// How long the process waits at its end until systemd accepts the last notifications.
const FLUSH: Duration = Duration::from_secs(1);

/// An event from one of the tasks.
enum Event {
    Node(Told),
    Looked(Box<Readings>),
    Patched(Told, Patch),
    Shown(telling::Told),
    Pool(PoolImage),
    Progress(String),
    /// The number of the task, and its result.
    Ended(u64, Box<Ended>),
}

/// The settings of the agent.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The limits that an operator may set.
    pub limits: Limits,
    /// Time between two reads of our Node.
    pub poll: Duration,
    /// Longest random wait before the pool's new image is fetched, in milliseconds.
    pub prefetch_spread: u64,
    /// How far the kernel confines this process.
    pub confinement: Confinement,
}

struct Agent {
    neighbours: Neighbours,
    settings: Settings,
    events: mpsc::Sender<Event>,
    began: Instant,
    memory: Memory,
    /// The proofs of the desired image and of the next one.
    proofs: BTreeMap<PinnedImage, VerifiedImage>,
    node: Option<NodeObject>,
    observed: Observed,
    /// Whether the API server has answered at least once, and whether the host has been read.
    node_seen: bool,
    host_seen: bool,
    task: Option<Task>,
    /// Number of tasks started so far.
    tasks: u64,
    systemd: Lane<Notice>,
    sight: Sight,
    cluster: Cluster,
    teller: Teller,
    timing: Timing,
    pool: Pool,
    last: Option<Decision>,
    progress: Option<String>,
    status: String,
    wake: Instant,
}

/// Runs until SIGTERM or SIGINT. The next start resumes unfinished work.
///
/// # Errors
/// When the process cannot listen to signals.
pub async fn run(neighbours: Neighbours, settings: Settings) -> io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (events, mut queue) = mpsc::channel(QUEUE);

    let (told, mut node) = mpsc::channel(QUEUE);
    let following = tokio::spawn(follow(neighbours.api.clone(), settings.poll, told));
    let mut agent = Agent::new(neighbours, settings, events, log::systemd()?);
    agent.look(Look::Host);
    let mut timer = Timer::new(agent.began, sd_notify::watchdog_enabled());
    loop {
        for notice in timer.due(Instant::now(), agent.has_seen_all()) {
            agent.systemd.send(notice);
        }
        tokio::select! {
            Some(event) = queue.recv() => agent.hear(event),
            Some(told) = node.recv() => agent.hear(Event::Node(told)),
            () = tokio::time::sleep_until(timer.next(Instant::now(), agent.wake)) => agent.tick(),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    agent.systemd.send(Notice::Stopping);
    tracing::info!(message_id = id::STOPPING, "stopping; the next start resumes unfinished work");
    following.abort();
    if let Some(task) = agent.task {
        task.handle.abort();
    }
    agent.systemd.flush(FLUSH);
    Ok(())
}

/// The times of the notifications of systemd, and of the loop's next wake-up.
struct Timer {
    began: Instant,
    ready: bool,
    /// Half of `WatchdogSec=`, and the time of the next ping.
    watchdog: Option<(Duration, Instant)>,
}

impl Timer {
    fn new(began: Instant, watchdog: Option<Duration>) -> Self {
        Self { began, ready: false, watchdog: watchdog.map(|limit| (limit / 2, began)) }
    }

    /// The notifications that are due. The service is ready when Node and host have been read once, or after
    /// [`FIRST_PASS`].
    fn due(&mut self, now: Instant, seen_all: bool) -> Vec<Notice> {
        let mut notices = Vec::new();
        if let Some((period, ping)) = self.watchdog.as_mut().filter(|(_, ping)| now >= *ping) {
            *ping = now + *period;
            notices.push(Notice::Watchdog);
        }
        if !self.ready && (seen_all || now >= self.began + FIRST_PASS) {
            self.ready = true;
            notices.push(Notice::Ready);
        }
        notices
    }

    /// The time of the next wake-up without an event, `wake` at the latest.
    fn next(&self, now: Instant, wake: Instant) -> Instant {
        let wake = wake.min(now + HOUSEKEEPING);
        let wake = self.watchdog.map_or(wake, |(_, ping)| wake.min(ping));
        if self.ready { wake } else { wake.min(self.began + FIRST_PASS) }
    }
}

impl Agent {
    fn new(neighbours: Neighbours, settings: Settings, events: mpsc::Sender<Event>, systemd: Lane<Notice>) -> Self {
        fn unread<T>(reason: Reason) -> Reading<T> {
            Reading::Unknown(Fault { reason, message: "not read yet".to_owned() })
        }
        let sight = Sight::new(neighbours.host.root().deployments_stamp());
        let (began, poll) = (Instant::now(), settings.poll);
        let memory = Memory {
            spread: full_jitter(limits::RESTORE_SPREAD, random()),
            prefetch_delay: full_jitter(settings.prefetch_spread, random()),
            ..Memory::default()
        };
        Self {
            neighbours,
            settings,
            events,
            began,
            memory,
            proofs: BTreeMap::new(),
            node: None,
            observed: Observed {
                cluster: unread(Reason::ClusterUnreachable),
                host: unread(Reason::HostUnreachable),
                machine: unread(Reason::HostUnreachable),
                pool_image: None,
                running: None,
            },
            node_seen: false,
            host_seen: false,
            task: None,
            tasks: 0,
            systemd,
            sight,
            cluster: Cluster::new(began),
            teller: Teller::new(began),
            timing: Timing::default(),
            pool: Pool::new(began, poll),
            last: None,
            progress: None,
            status: String::new(),
            wake: began + HOUSEKEEPING,
        }
    }

    fn has_seen_all(&self) -> bool {
        self.node_seen && self.host_seen
    }

    fn now(&self) -> Now {
        let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let here = || SystemTime::now().duration_since(UNIX_EPOCH).map(milliseconds).unwrap_or_default();
        Now { mono: milliseconds(self.began.elapsed()), unix: self.neighbours.api.time().unwrap_or_else(here) }
    }

    /// Whether the agent only waits for the next change, which the watch reports.
    fn is_idle(&self) -> bool {
        self.task.is_none()
            && self.last.as_ref().is_some_and(|last| last.reason.is_at_rest() || last.reason == Reason::NotLayered)
    }

    fn tick(&mut self) {
        let unknown = self.observed.host.known().is_none();
        let busy = self.observed.host.known().is_some_and(|host| host.transaction.is_some());
        if !self.is_idle() && self.task.is_none() {
            self.look(if unknown || busy { Look::Host } else { Look::Machine });
        }
        self.step();
    }

    fn hear(&mut self, event: Event) {
        match event {
            Event::Node(told) => {
                if !self.take_node(told) {
                    return;
                }
            }
            Event::Looked(readings) => self.looked(*readings),
            Event::Patched(told, patch) => self.patched(told, &patch),
            Event::Shown(told) => self.shown(told),
            Event::Pool(image) => self.take_pool(image),
            Event::Progress(line) => {
                self.progress = Some(line);
                self.tell_status();
                return;
            }
            Event::Ended(number, ended) => self.ended(number, *ended),
        }
        self.step();
        self.sight.decided();
    }

    /// Decides, logs, reports and acts.
    fn step(&mut self) {
        if !self.has_seen_all() && self.began.elapsed() < FIRST_PASS {
            return;
        }
        self.check_stamps();
        // Wait for the result of the patch, or of the read after a change.
        if self.cluster.patching || self.sight.is_stale() {
            return;
        }
        let now = self.now();
        if let Some(node) = self.observed.cluster.known() {
            self.memory.heed_retry(node);
        }
        self.observed.running = self.running().cloned();
        let decision = decide(&self.observed, &self.memory, &self.settings.limits, now);
        self.memory.note(&self.observed, &decision, now);
        self.timing.decided(self.observed.cluster.known(), decision.rule, now);
        if self.observed.cluster.known().is_some() {
            self.proofs.retain(|image, _| self.observed.concerns(image));
            self.sight.trust.retain(|image, _| self.observed.concerns(image));
        }
        self.say(&decision);
        let wake = decision.wake.map_or(HOUSEKEEPING, |wake| Duration::from_millis(jittered(wake, random())));
        self.wake = Instant::now() + wake;
        self.ask_for_the_pools_image(&decision);
        self.report(&decision);
        self.show(&decision);
        if let Some(news) = News::of(&decision) {
            self.tell(&news);
        }
        self.act(&decision.action);
        self.last = Some(decision);
        self.tell_status();
    }

    fn act(&mut self, action: &Action) {
        match action {
            // `report` writes the annotations.
            Action::Nothing | Action::Annotate(_) => {}
            Action::Abort => self.abort(),
            Action::ConfirmDrain => self.confirm(),
            // Read everything again first. Only a decision on that read begins the reboot.
            Action::Begin(Work::Reboot { .. }) if !self.sight.is_confirmed() => self.confirm(),
            Action::Begin(work) if self.task.is_none() => self.begin(work.clone()),
            Action::Begin(_) => {}
        }
    }

    /// Reads everything, as soon as the API server may be asked.
    fn confirm(&mut self) {
        if Instant::now() >= self.cluster.not_before {
            self.look(Look::Everything);
        } else {
            self.wake = self.wake.min(self.cluster.not_before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(notices: &[Notice]) -> Vec<&'static str> {
        let word = |notice: &Notice| match notice {
            Notice::Ready => "ready",
            Notice::Stopping => "stopping",
            Notice::Watchdog => "watchdog",
            Notice::Status(_) => "status",
        };
        notices.iter().map(word).collect()
    }

    #[test]
    fn systemd_hears_ready_once_when_all_is_seen_or_the_first_pass_is_over() {
        let began = Instant::now();
        let mut timer = Timer::new(began, None);
        assert!(timer.due(began, false).is_empty());
        assert_eq!(timer.next(began, began + HOUSEKEEPING), began + FIRST_PASS);
        assert_eq!(words(&timer.due(began + FIRST_PASS, false)), ["ready"]);
        assert!(timer.due(began + FIRST_PASS, true).is_empty());
        assert_eq!(words(&Timer::new(began, None).due(began, true)), ["ready"]);
    }

    #[test]
    fn the_watchdog_is_pinged_at_half_its_time_however_many_events_there_are() {
        let began = Instant::now();
        let mut timer = Timer::new(began, Some(Duration::from_secs(20)));
        let mut pings = 0;
        for millisecond in 0..60_000 {
            let notices = timer.due(began + Duration::from_millis(millisecond), true);
            pings += words(&notices).iter().filter(|word| **word == "watchdog").count();
        }
        assert_eq!(pings, 6);
        let now = began + Duration::from_secs(55);
        assert_eq!(timer.next(now, now + HOUSEKEEPING), began + Duration::from_secs(60));
    }

    #[test]
    fn no_sleep_is_longer_than_housekeeping() {
        let began = Instant::now();
        let mut timer = Timer::new(began, None);
        timer.due(began, true);
        assert_eq!(timer.next(began, began + 10 * HOUSEKEEPING), began + HOUSEKEEPING);
        assert_eq!(timer.next(began, began + FIRST_PASS / 2), began + FIRST_PASS / 2);
    }
}
