//! A pool's rollout in virtual time. Every node is an agent's own decisions and memory on a Node that its own parser
//! reads and its own patches change; the pool hands out slots by the double's rules for it, and the host is a few waits.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash as _, Hasher as _};
use std::time::Duration;

use rebase_agent::backoff::{full_jitter, jittered};
use rebase_agent::cluster::node::{Heard, NodeObject};
use rebase_agent::cluster::pool::{next_read, pool_of};
use rebase_agent::decide::{Decision, Limits, Memory, Outcome, decide, limits};
use rebase_agent::model::annotations::{MCO, PREFETCH};
use rebase_agent::model::{
    Action, BootId, Deployment, Digest, HostFacts, ImageFacts, MachineFacts, NodeFacts, Now, Observed, PinnedImage,
    Pullspec, Reading, UnitState, Work,
};
use rebase_agent::report::{Patch, report};
use serde_json::{Value, json};
use support::mcc::{Target, get_candidates, is_node_done, is_targeted, is_unavailable_for_update};
use tokio::time::Instant;

const MINUTE: u64 = limits::MINUTE;
/// The part of the pull in which the signature is verified, and the part of the reboot in which the image is staged.
const SECONDS: u64 = 5 * limits::SECOND;
/// The agent's longest sleep.
const HOUSEKEEPING: u64 = 3 * MINUTE;
/// Longest rollout; a rollout that takes longer is stuck.
const LONGEST: u64 = 365 * 24 * 60 * MINUTE;
/// Most decisions between two changes of a node's surroundings.
const MOST_STEPS: usize = 20;
const MIB: u64 = 1 << 20;

/// How the nodes learn of the pool's new image before their turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// They do not.
    None,
    /// Each reads the pool's MachineOSConfig, every other `--poll`.
    Pool,
    /// All Nodes are annotated at once.
    Annotation,
}

/// A pool and its times, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Nodes in the pool.
    pub nodes: usize,
    /// How many of them may be unavailable.
    pub unavailable: usize,
    /// Verifying and pulling an image that the host does not have.
    pub pull: u64,
    /// From the request of a drain to its acknowledgement.
    pub drain: u64,
    /// Staging an image that the host has, shutting down, and booting until the node is Ready.
    pub reboot: u64,
    /// `--prefetch-spread`.
    pub spread: u64,
    /// How the nodes learn of the image.
    pub hint: Hint,
}

/// What a rollout cost.
#[derive(Debug)]
pub struct Rollout {
    /// From the pool's new image to the last node that is Done, in milliseconds.
    pub took: u64,
    /// When a node began to pull from the registry, in order.
    pub pulls: Vec<u64>,
}

impl Plan {
    /// The longest time that a rollout with prefetch should take.
    pub fn goal(&self) -> u64 {
        let turns = self.nodes.div_ceil(self.unavailable) as u64;
        turns * (self.drain + self.reboot) + self.pull + self.spread
    }

    /// Simulates the rollout; `seed` stands for the agents' random numbers.
    pub fn simulate(&self, seed: u64) -> Result<Rollout, String> {
        Fleet::new(*self, seed).run()
    }
}

impl Rollout {
    /// The most pulls that begin within a minute.
    pub fn worst_minute(&self) -> usize {
        let within = |from: u64| self.pulls.iter().filter(|at| (from..from + MINUTE).contains(*at)).count();
        self.pulls.iter().map(|from| within(*from)).max().unwrap_or_default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The agent decides again, if this is the latest time planned for it.
    Look,
    /// The agent's task ends.
    Ends,
    /// The drain controller has drained the node.
    Drained,
    /// The machine is up again, and the agent starts.
    Boots,
    /// The agent reads the pool's MachineOSConfig, if it is idle.
    ReadsPool,
}

struct Node {
    facts: NodeFacts,
    observed: Observed,
    memory: Memory,
    /// Images in the host's storage, deployed or not.
    pulled: Vec<PinnedImage>,
    booted_at: u64,
    boots: u32,
    look: Option<u64>,
    /// The whole Node was read for the next decision.
    confirmed: bool,
    at_rest: bool,
    arrived: bool,
}

struct Fleet {
    plan: Plan,
    target: Target,
    image: PinnedImage,
    nodes: Vec<Node>,
    /// The Nodes as MCC reads them.
    objects: Vec<Value>,
    queue: BinaryHeap<Reverse<(u64, u64, Event, usize)>>,
    number: u64,
    seed: u64,
    pulls: Vec<u64>,
    /// A slot may be free.
    freed: bool,
    /// Nodes that are Done with the target.
    arrived: usize,
}

fn config(letter: char) -> String {
    format!("rendered-worker-{}", letter.to_string().repeat(32))
}

fn digest(letter: char) -> Digest {
    Digest::parse(&format!("sha256:{}", letter.to_string().repeat(64))).expect("a digest")
}

fn image(letter: char) -> PinnedImage {
    PinnedImage::try_from(format!("registry.example.com/os@{}", digest(letter))).expect("an image")
}

fn deployment(letter: char) -> Deployment {
    Deployment {
        id: format!("os-{letter}.0"),
        osname: "os".into(),
        checksum: letter.to_string(),
        reference: Some(image(letter).to_string()),
        digest: Some(digest(letter)),
        rendered_config: Some(config(letter)),
        ..Deployment::default()
    }
}

fn verified(letter: char) -> ImageFacts {
    ImageFacts {
        image: image(letter),
        instance: digest(letter),
        architecture: "amd64".into(),
        bootable: true,
        rendered_config: Some(config(letter)),
        created: None,
        size: 1200 * MIB,
        vouched_by: "docker".into(),
    }
}

impl Fleet {
    fn new(plan: Plan, seed: u64) -> Self {
        let target = Target { config: config('b'), image: Some(image('b').to_string()) };
        let mut fleet = Self {
            plan,
            target,
            image: image('b'),
            nodes: Vec::new(),
            objects: Vec::new(),
            queue: BinaryHeap::new(),
            number: 0,
            seed,
            pulls: Vec::new(),
            freed: true,
            arrived: 0,
        };
        for at in 0..plan.nodes {
            let node = fleet.node(at);
            fleet.nodes.push(node);
            fleet.plan_event(0, Event::Look, at);
            if plan.hint == Hint::Pool {
                // The agents have been running for long, so each is anywhere between two reads.
                let between = u64::try_from(next_read(poll(), fleet.random()).as_millis()).unwrap_or(u64::MAX);
                let due = full_jitter(between, fleet.random());
                fleet.plan_event(due, Event::ReadsPool, at);
            }
        }
        fleet
    }

    /// A node that is Done on image A, and its Node.
    fn node(&mut self, at: usize) -> Node {
        let (name, config, installed) = (format!("worker-{at}"), config('a'), image('a').to_string());
        let annotations = json!({
            format!("{MCO}currentConfig"): config,
            format!("{MCO}desiredConfig"): config,
            format!("{MCO}currentImage"): installed,
            format!("{MCO}desiredImage"): installed,
            format!("{MCO}state"): "Done",
            format!("{MCO}desiredDrain"): format!("uncordon-{config}"),
            format!("{MCO}lastAppliedDrain"): format!("uncordon-{config}"),
        });
        let mut object = json!({
            "metadata": {"name": name, "uid": name, "resourceVersion": "1", "annotations": annotations},
            "spec": {},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        });
        if self.plan.hint == Hint::Annotation {
            object["metadata"]["annotations"][PREFETCH] = json!(self.image.to_string());
        }
        let facts = parse(&object, false);
        self.objects.push(object);
        let machine = MachineFacts {
            boot_id: BootId("0".into()),
            uptime: 0,
            architecture: "amd64".into(),
            command_line: Vec::new(),
            boot_free: None,
            boot_needed: None,
            sysroot_free: Some(100_000 * MIB),
            finalizer: UnitState::Inactive,
            kubelet: UnitState::Active,
            bootloader_update: UnitState::Absent,
            finalize_failed: false,
            inhibitors: Vec::new(),
            shutting_down: false,
            first_boot: None,
        };
        let mut memory = self.memory();
        memory.verified.insert(image('a'), verified('a'));
        let deployments = vec![Deployment { booted: true, ..deployment('a') }];
        Node {
            observed: Observed {
                cluster: Reading::Known(facts.clone()),
                host: Reading::Known(HostFacts { deployments, ..HostFacts::default() }),
                machine: Reading::Known(machine),
                pool_image: None,
                running: None,
            },
            facts,
            memory,
            pulled: vec![image('a')],
            booted_at: 0,
            boots: 0,
            look: Some(0),
            confirmed: false,
            at_rest: false,
            arrived: false,
        }
    }

    /// A new process's memory.
    fn memory(&mut self) -> Memory {
        Memory {
            spread: full_jitter(limits::RESTORE_SPREAD, self.random()),
            prefetch_delay: full_jitter(self.plan.spread, self.random()),
            ..Memory::default()
        }
    }

    fn random(&mut self) -> u64 {
        self.number += 1;
        let mut hasher = DefaultHasher::new();
        (self.seed, self.number).hash(&mut hasher);
        hasher.finish()
    }

    fn plan_event(&mut self, at: u64, event: Event, node: usize) {
        self.number += 1;
        self.queue.push(Reverse((at, self.number, event, node)));
    }

    fn run(mut self) -> Result<Rollout, String> {
        let mut now = 0;
        while self.arrived < self.plan.nodes {
            let next = self.queue.peek().map(|Reverse((at, ..))| *at);
            if self.freed && next != Some(now) {
                self.hand_out(now)?;
                continue;
            }
            let Some(Reverse((at, _, event, node))) = self.queue.pop().filter(|_| next < Some(LONGEST)) else { break };
            now = at;
            self.happen(now, event, node)?;
        }
        if self.arrived == self.plan.nodes {
            return Ok(Rollout { took: now, pulls: self.pulls });
        }
        let stuck = self.objects.iter().find(|object| !is_node_done(object));
        Err(format!("the rollout does not end; this node is not Done: {stuck:#?}"))
    }

    /// What MCC does after a change: the next nodes get the target.
    fn hand_out(&mut self, now: u64) -> Result<(), String> {
        self.freed = false;
        let names: Vec<_> = get_candidates(&self.objects, &self.target, self.plan.unavailable)
            .iter()
            .filter_map(|node| node["metadata"]["name"].as_str()?.strip_prefix("worker-")?.parse().ok())
            .collect();
        for node in names {
            self.annotate(now, node, "desiredConfig", &config('b'));
            self.annotate(now, node, "desiredImage", &image('b').to_string());
        }
        let out = self.objects.iter().filter(|node| is_unavailable_for_update(node)).count();
        if out > self.plan.unavailable {
            return Err(format!("{out} nodes are unavailable at once"));
        }
        Ok(())
    }

    fn annotate(&mut self, now: u64, node: usize, key: &str, value: &str) {
        self.objects[node]["metadata"]["annotations"][format!("{MCO}{key}")] = json!(value);
        self.changed(now, node);
    }

    /// The agent hears of its changed Node, and MCC of a free slot.
    fn changed(&mut self, now: u64, node: usize) {
        let object = &self.objects[node];
        self.freed |= !is_unavailable_for_update(object);
        let arrived = is_node_done(object) && is_targeted(object, &self.target);
        self.arrived += usize::from(arrived && !std::mem::replace(&mut self.nodes[node].arrived, arrived));
        self.nodes[node].facts = parse(&self.objects[node], false);
        self.look(now, node);
    }

    fn look(&mut self, at: u64, node: usize) {
        self.nodes[node].look = Some(at);
        self.plan_event(at, Event::Look, node);
    }

    fn happen(&mut self, now: u64, event: Event, at: usize) -> Result<(), String> {
        let node = &mut self.nodes[at];
        match event {
            Event::Look if node.look == Some(now) => return self.step(now, at),
            Event::Look => {}
            Event::Ends => {
                self.end(now, at)?;
                self.look(now, at);
            }
            Event::Drained => {
                let drain = node.facts.desired_drain.clone().unwrap_or_default();
                self.annotate(now, at, "lastAppliedDrain", &drain);
            }
            Event::Boots => {
                node.boots += 1;
                node.booted_at = now;
                node.observed.pool_image = None;
                let boot_id = BootId(node.boots.to_string());
                let (host, machine) = known(&mut node.observed)?;
                (machine.boot_id, machine.finalizer, machine.shutting_down) = (boot_id, UnitState::Inactive, false);
                if let Some(booted) = host.deployments.iter().position(|deployment| !deployment.locked) {
                    host.deployments.iter_mut().for_each(|deployment| deployment.booted = false);
                    let next = &mut host.deployments[booted];
                    (next.booted, next.staged) = (true, false);
                }
                let memory = self.memory();
                self.nodes[at].memory = memory;
                self.objects[at]["status"]["conditions"][0]["status"] = json!("True");
                self.changed(now, at);
            }
            Event::ReadsPool => {
                let pool = node.facts.desired_config.as_deref().and_then(pool_of);
                if pool == Some("worker") && node.at_rest && node.facts.prefetch.is_none() {
                    node.observed.pool_image = Some(Pullspec::from(self.image.to_string()));
                    self.look(now, at);
                } else {
                    let next = u64::try_from(next_read(poll(), self.random()).as_millis()).unwrap_or(u64::MAX);
                    self.plan_event(now + next, Event::ReadsPool, at);
                }
            }
        }
        Ok(())
    }

    /// The agent decides, reports and acts, until it waits.
    fn step(&mut self, now: u64, at: usize) -> Result<(), String> {
        self.nodes[at].look = None;
        for _ in 0..MOST_STEPS {
            let node = &mut self.nodes[at];
            let (clocks, facts) = (Now { mono: now, unix: now }, &node.facts);
            let schedulable = node.confirmed.then(|| parse(&self.objects[at], true).schedulable).flatten();
            node.observed.cluster = Reading::Known(NodeFacts { schedulable, ..facts.clone() });
            known(&mut node.observed)?.1.uptime = now - node.booted_at + 60 * MINUTE;
            let decision = decide(&node.observed, &node.memory, &Limits::default(), clocks);
            node.memory.note(&node.observed, &decision, clocks);
            node.at_rest = decision.reason.is_at_rest();
            let confirmed = std::mem::take(&mut node.confirmed);
            let patch = report(facts, &decision);
            let quiet = patch.is_empty();
            self.write(now, at, &patch)?;
            let acted = self.act(now, at, &decision, confirmed)?;
            if quiet && !acted {
                if let Some(wake) = decision.wake {
                    // The agent sleeps in pieces, and adds jitter to the last one.
                    let (last, random) = (wake.min(HOUSEKEEPING), self.random());
                    self.look(now + wake - last + jittered(last, random).max(1), at);
                }
                return Ok(());
            }
        }
        Err(format!("the agent of a node does not come to rest: {:#?}", self.nodes[at].observed))
    }

    /// The API server's and the drain controller's part of a patch.
    fn write(&mut self, now: u64, at: usize, patch: &Patch) -> Result<(), String> {
        if patch.is_empty() {
            return Ok(());
        }
        let object = &mut self.objects[at];
        let annotations = object["metadata"]["annotations"].as_object_mut().ok_or("a Node has annotations")?;
        for (key, value) in patch {
            match value {
                Some(value) => annotations.insert(key.clone(), json!(value)),
                None => annotations.remove(key),
            };
        }
        if let Some(Some(asked)) = patch.get(&format!("{MCO}desiredDrain")) {
            let drains = asked.starts_with("drain-");
            object["spec"]["unschedulable"] = json!(drains);
            if drains {
                self.plan_event(now + self.plan.drain, Event::Drained, at);
            } else {
                object["metadata"]["annotations"][format!("{MCO}lastAppliedDrain")] = json!(asked);
            }
        }
        self.changed(now, at);
        Ok(())
    }

    /// Carries out the agent's action. Returns whether it decides again at once.
    fn act(&mut self, now: u64, at: usize, decision: &Decision, confirmed: bool) -> Result<bool, String> {
        let node = &mut self.nodes[at];
        let work = match &decision.action {
            Action::Nothing | Action::Annotate(_) => return Ok(false),
            Action::ConfirmDrain => {
                node.confirmed = true;
                return Ok(true);
            }
            Action::Begin(Work::Reboot { .. }) if !confirmed => {
                node.confirmed = true;
                return Ok(true);
            }
            Action::Begin(work) if node.observed.running.is_none() => work,
            Action::Begin(_) => return Ok(false),
            Action::Abort => return Err(format!("the agent aborts its task: {}", decision.message)),
        };
        let takes = match work {
            Work::Verify { .. } | Work::Stage { .. } => SECONDS,
            Work::Fetch { image } if node.pulled.contains(image) => SECONDS,
            Work::Fetch { .. } => {
                self.pulls.push(now);
                self.plan.pull.saturating_sub(SECONDS)
            }
            Work::StartFinalizer | Work::Reboot { .. } => 0,
            other => return Err(format!("a rollout needs no {other:?}: {}", decision.message)),
        };
        node.observed.running = Some(work.clone());
        self.plan_event(now + takes, Event::Ends, at);
        Ok(true)
    }

    fn end(&mut self, now: u64, at: usize) -> Result<(), String> {
        let node = &mut self.nodes[at];
        let work = node.observed.running.take().ok_or("a task ends that did not begin")?;
        let (host, machine) = known(&mut node.observed)?;
        let mut outcome = Outcome::Succeeded(None);
        match &work {
            Work::Verify { .. } => outcome = Outcome::Succeeded(Some(verified('b'))),
            Work::Fetch { image } if !node.pulled.contains(image) => node.pulled.push(image.clone()),
            Work::Stage { .. } => {
                let staged = Deployment { staged: true, locked: true, arguments: Some(Vec::new()), ..deployment('b') };
                host.deployments.insert(0, staged);
            }
            Work::StartFinalizer => machine.finalizer = UnitState::Active,
            Work::Reboot { .. } => {
                host.deployments.iter_mut().for_each(|deployment| deployment.locked = false);
                machine.shutting_down = true;
                self.objects[at]["status"]["conditions"][0]["status"] = json!("Unknown");
                let back = now + self.plan.reboot.saturating_sub(SECONDS);
                self.plan_event(back, Event::Boots, at);
            }
            _ => {}
        }
        let clocks = Now { mono: now, unix: now };
        self.nodes[at].memory.finished(&work, outcome, clocks);
        Ok(())
    }
}

fn known(observed: &mut Observed) -> Result<(&mut HostFacts, &mut MachineFacts), String> {
    match (&mut observed.host, &mut observed.machine) {
        (Reading::Known(host), Reading::Known(machine)) => Ok((host, machine)),
        _ => Err("the simulated host can always be read".to_owned()),
    }
}

/// The Node as the agent reads it: its metadata, or all of it.
fn parse(object: &Value, whole: bool) -> NodeFacts {
    let read = if whole { object.clone() } else { json!({"metadata": object["metadata"]}) };
    let heard = Heard { asked: None, at: Instant::now(), wrote: 0 };
    NodeObject::parse(read.to_string().as_bytes(), heard).expect("a Node").facts
}

fn poll() -> Duration {
    Duration::from_millis(limits::POLL)
}
