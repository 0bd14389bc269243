//! Laws that hold for every decision, and ends that every run must reach.
//!
//! Two methods: random situations, most of which never occur, and a small world that the loop acts in (drain
//! controller, host, registry, operators, power cuts), explored breadth-first within budgets and by random walks
//! beyond.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests; the generated values are well formed"
)]

mod ways_out;

use std::cell::RefCell;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::sync::Mutex;

use proptest::prelude::*;
use rebase_agent::backoff::Backoff;
use rebase_agent::decide::{Clock, Decision, Failure, Limits, Memory, Outcome, Since, decide};
use rebase_agent::kernel_arguments::{self, missing};
use rebase_agent::model::annotations::{ATTEMPT, MCO, UNTRUSTED};
use rebase_agent::model::{
    Action, Annotate, Attempt, Backend, BootId, Deployment, Digest, Fault, HostFacts, ImageFacts, Inhibitor,
    MachineFacts, NodeFacts, NodeState, Now, Observed, OtherWriter, PinnedImage, Pullspec, Reading, Reason, Severity,
    Transaction, UnitState, Work, is_image, is_staged,
};
use rebase_agent::report::{Patch, report};
use ways_out::names_a_way_out;

const MINUTE: u64 = 60_000;
const BACKENDS: [Backend; 2] = [Backend::RpmOstree, Backend::Bootc];

fn digest(letter: char) -> Digest {
    Digest::parse(&format!("sha256:{}", letter.to_string().repeat(64))).unwrap()
}

thread_local! {
    /// Parsing a reference is the slowest operation here, and there are only a few.
    static PARSED: RefCell<HashMap<String, Option<PinnedImage>>> = RefCell::default();
}

fn parsed(text: &str) -> Option<PinnedImage> {
    PARSED.with_borrow_mut(|known| match known.get(text) {
        Some(image) => image.clone(),
        None => {
            let image = PinnedImage::try_from(text.to_owned()).ok();
            known.insert(text.to_owned(), image.clone());
            image
        }
    })
}

fn image(letter: char) -> PinnedImage {
    parsed(&format!("registry.example.com/os@{}", digest(letter))).unwrap()
}

fn facts(letter: char, config: &str) -> ImageFacts {
    ImageFacts {
        image: image(letter),
        instance: digest(letter),
        architecture: "amd64".into(),
        bootable: true,
        rendered_config: Some(config.into()),
        created: None,
        size: 1,
        vouched_by: "docker \"registry.example.com\"".into(),
    }
}

fn fault(reason: Reason) -> Fault {
    Fault { reason, message: format!("it went wrong ({reason}); see `journalctl -u rebase-agent`") }
}

fn apply(patch: &Patch, node: &mut NodeFacts) {
    for (key, value) in patch {
        let value = value.clone();
        if key == UNTRUSTED {
            node.untrusted = value;
            continue;
        }
        if key == ATTEMPT {
            node.attempt = value.map(|text| serde_json::from_str(&text).expect("an attempt that can be read back"));
            continue;
        }
        match key.strip_prefix(MCO).expect("one of MCO's annotations") {
            "state" => node.state = value,
            "reason" => node.reason = value,
            "desiredDrain" => node.desired_drain = value,
            "currentConfig" => node.current_config = value,
            "currentImage" => node.current_image = value,
            "desiredConfig" => node.desired_config = value,
            "desiredImage" => node.desired_image = value.map(Pullspec::from),
            odd => panic!("{odd} is not ours to write"),
        }
    }
}

// --- laws for every decision
// ------------------------------------------------------------------------------------------

/// The first law that `decision` breaks.
fn broken(seen: &Observed, memory: &Memory, limits: &Limits, now: Now, decision: &Decision) -> Result<(), String> {
    let law = |holds: bool, law: &str| if holds { Ok(()) } else { Err(law.to_owned()) };
    let message = &decision.message;
    law(!message.chars().any(char::is_control) && message.chars().count() <= 900, "a message is one short line")?;
    law(matches!(seen.cluster, Reading::Known(_)) || decision.action == Action::Nothing, "no action without the Node")?;
    let refuses = matches!(decision.state, Some(NodeState::Degraded | NodeState::Unreconcilable));
    if refuses {
        names_a_way_out(message)?;
    }
    let (Reading::Known(node), Reading::Known(host), Reading::Known(machine)) =
        (&seen.cluster, &seen.host, &seen.machine)
    else {
        return law(decision.action == Action::Nothing, "no action on an unreadable host");
    };
    if machine.shutting_down {
        return law(decision.action == Action::Nothing && decision.state.is_none(), "no action at shutdown");
    }
    let wanted = node.desired().cloned();
    let config = node.desired_config.as_deref().unwrap_or_default();
    let proof = wanted.as_ref().and_then(|image| memory.verified.get(image));
    let is = |deployment: &Deployment| wanted.as_ref().is_some_and(|image| is_image(deployment, image, proof));
    let booted = host.booted().is_some_and(is);
    let drops = host.backend.drops_staged();
    let staged_other = host.staged().is_some_and(|staged| staged.layered || !(is(staged) || staged.locked && !drops));
    let is_ours = |s: &Deployment| wanted.as_ref().is_some_and(|image| is_staged(s, image, proof, host.backend));
    let boots_next = host.staged().is_some_and(|s| is_ours(s) && (!s.locked || host.backend == Backend::RpmOstree));
    let unheld = node.hold.is_none() && machine.inhibitors.is_empty() && machine.uptime >= limits.uptime_floor;
    let next = |image: &PinnedImage| seen.hint() == Some(image) && Some(image) != wanted.as_ref();
    let fit = proof.is_some_and(|facts| facts.architecture == machine.architecture && facts.bootable);
    let idle = seen.running.is_none();
    match &decision.action {
        Action::Begin(Work::Reboot { image }) => {
            let staged = host.staged().ok_or("no deployment is staged at a reboot")?;
            law(boots_next && wanted.as_ref() == Some(image), "the desired image boots next at a reboot")?;
            law(fit, "this process verified the image before the reboot")?;
            if let Some(demanded) = &staged.wanted_arguments {
                let entry = host.booted().and_then(|booted| booted.arguments.as_deref());
                let there = staged.arguments.as_deref().or(entry).unwrap_or_default();
                law(missing(demanded, there).is_none(), "the next boot has the kernel arguments, in order")?;
            }
            let drain = Some(format!("drain-{config}"));
            let drained =
                node.desired_drain == drain && node.last_applied_drain == drain && node.schedulable == Some(false);
            law(drained || node.topology.as_deref() == Some("SingleReplica"), "a node is drained before it reboots")?;
            let counted = node.attempt.as_ref().is_some_and(|a| a.image == *image && a.boot_id == machine.boot_id);
            law(counted, "an attempt is recorded before the reboot")?;
            law(unheld, "no hold, no inhibitor and no uptime floor at a reboot")?;
            law(machine.finalizer == UnitState::Active, "the finalizer is active at a reboot")?;
            law(idle && host.transaction.is_none(), "no task and no transaction runs at a reboot")?;
        }
        Action::Begin(Work::Stage { image }) => {
            law(wanted.as_ref() == Some(image) && fit, "only a verified, desired, fitting image is staged")?;
            let over = staged_other && !host.backend.drops_staged();
            law(!booted || over, "the booted image is staged only over a stage that cannot be dropped")?;
            law(unheld || over, "nothing is staged before nothing holds up the reboot")?;
            law(idle, "one task at a time")?;
        }
        Action::Begin(Work::Fetch { image }) => {
            let verified = memory.verified.contains_key(image);
            let done = node.state.as_deref() == Some("Done");
            law(verified && idle, "only a verified image is fetched")?;
            law(
                wanted.as_ref() == Some(image) && !booted || next(image) && done && booted,
                "only a desired or next image is fetched",
            )?;
            law(decision.state.is_none() || !booted, "a prefetch reports no state")?;
        }
        Action::Begin(Work::SetKernelArguments { image, .. }) => {
            let same = wanted.as_ref() == Some(image);
            law(fit && same && boots_next, "only the verified, desired image is changed")?;
        }
        Action::Begin(Work::Verify { image }) => {
            law(wanted.as_ref() == Some(image) || next(image), "only the desired or the next image is verified")?
        }
        Action::Begin(Work::DropStaged { checksum }) => {
            let next = host.deployments.iter().find(|next| next.checksum == *checksum && (next.staged || !next.booted));
            let refused =
                decision.reason.refuses_image() || matches!(decision.reason, Reason::RolledBack | Reason::Held);
            let left = next
                .is_some_and(|n| !is(n) && node.attempt.as_ref().and_then(|a| a.deployment.as_ref()) == Some(&n.id));
            let other = left || staged_other && host.staged().unwrap().checksum == *checksum;
            law(other || refused && next.is_some_and(|n| !n.booted), "only an unwanted deployment is dropped")?;
            law(
                decision.reason != Reason::RolledBack || node.attempt.as_ref().is_some_and(|a| a.rolled_back),
                "proof",
            )?;
            law(host.transaction.is_none(), "no drop during a transaction")?;
            law(host.backend.drops_staged(), "no drop with bootc, which has none")?;
        }
        Action::Begin(Work::CancelTransaction { digest }) => {
            let ours = host.transaction.as_ref().and_then(|transaction| transaction.ours.as_ref());
            law(
                ours == Some(digest) && wanted.as_ref().is_some_and(|w| w.digest() != digest),
                "only own, obsolete ones are cancelled",
            )?;
        }
        Action::Abort => law(!idle, "an abort needs a running task")?,
        Action::Annotate(Annotate::RequestDrain { value }) => {
            law(boots_next && fit, "no drain before the image is verified and staged")?;
            law(unheld, "no hold, no inhibitor and no uptime floor at a drain")?;
            law(value.strip_prefix("drain-") == Some(config), "a drain is for the desired config")?;
        }
        Action::Annotate(Annotate::RequestUncordon { value }) => {
            law(value.starts_with("uncordon-"), "an uncordon request begins with its prefix")?;
            law(node.desired_drain.as_ref() != Some(value), "an uncordon is requested once")?;
            law(node.last_applied_drain.as_ref() != Some(value), "a new uncordon differs from the acknowledged one")?;
        }
        Action::Annotate(Annotate::RecordAttempt { attempt }) if attempt.rolled_back => {
            law(decision.reason == Reason::RolledBack, "a fall-back is recorded with the reason RolledBack")?;
        }
        Action::Annotate(Annotate::RecordAttempt { attempt }) => {
            // Staging again in the same boot is the same attempt, even if the annotation was edited by hand.
            let earlier = node
                .attempt
                .as_ref()
                .filter(|earlier| earlier.image == attempt.image && earlier.boot_id == attempt.boot_id);
            let counted = earlier.is_some_and(|earlier| earlier.count == attempt.count);
            law(
                (attempt.count <= 2 || counted) && attempt.boot_id == machine.boot_id,
                "at most two attempts per image",
            )?;
            law(boots_next && fit && node.hold.is_none(), "an attempt is recorded only right before its reboot")?;
            let length = serde_json::to_string(attempt).map_or(0, |text| text.len());
            law(length < 8192, "a recorded attempt can be read back")?;
        }
        Action::Annotate(Annotate::Settle) => {
            law(booted && !staged_other, "Done is reported for the booted image only, and no other image is staged")?;
            let drain = node.desired_drain.as_deref().unwrap_or_default();
            law(drain.starts_with("uncordon-"), "Done comes after the uncordon")?;
            law(node.desired_drain == node.last_applied_drain, "Done comes after the uncordon's acknowledgement")?;
            law(machine.kubelet == UnitState::Active, "Done is healthy")?;
        }
        Action::Annotate(Annotate::ReportTrust { untrusted }) => {
            law(booted && node.untrusted != *untrusted, "trust is reported for the booted image, when it changed")?;
        }
        Action::Annotate(Annotate::FirstBoot { .. }) => {
            law(node.current_config.is_none(), "only a new node is published")?
        }
        Action::Begin(Work::UpdateBootloader { image }) => {
            law(boots_next && wanted.as_ref() == Some(image), "the boot loader is updated for the next boot")?;
        }
        Action::Nothing | Action::ConfirmDrain | Action::Begin(Work::StartFinalizer) => {}
    }
    // A refusal reaches the disk: a refused deployment that could boot next is dropped, unless a reason against it is
    // known.
    let held = decision.reason == Reason::Held && boots_next && host.staged().is_some_and(|s| !s.locked);
    let refused =
        refuses && decision.reason.refuses_image() && host.staged().is_some_and(|s| is(s) && (drops || !s.locked));
    let boots_refused = held || refused;
    let boots_refused = boots_refused && !booted;
    let waits = host.staged().is_some_and(|staged| {
        memory.dropped.contains(&staged.checksum)
            || memory.failure(&Work::DropStaged { checksum: staged.checksum.clone() }).is_some()
    });
    if boots_refused && idle && host.transaction.is_none() && host.backend.drops_staged() && !waits {
        law(
            matches!(decision.action, Action::Begin(Work::DropStaged { .. })),
            "a refused or held image does not boot next",
        )?;
    }
    let drain = node.desired_drain.as_deref().unwrap_or_default();
    let waits = decision.action == Action::Nothing && decision.state == Some(NodeState::Working);
    let wished = matches!(decision.reason, Reason::Held | Reason::UptimeFloor | Reason::Rebooting);
    if drain.starts_with("drain-") && waits && !wished && machine.kubelet == UnitState::Active {
        law(decision.clock.is_some() || decision.wake.is_some(), "a drained node waits for a limited time only")?;
    }
    law(
        !boots_refused || host.backend.drops_staged() || message.contains("undeploy"),
        "with bootc, the message says how to undeploy",
    )?;
    law(
        decision.state != Some(NodeState::Done) || decision.action == Annotate::Settle.into(),
        "only settling reports Done",
    )?;
    // A step that has just failed is not retried at once.
    if let (true, Action::Begin(work)) = (idle, &decision.action)
        && let Some(failure) = memory.failure(work)
    {
        law(failure.last.saturating_add(1_000) <= now.mono, "a failure is followed by a pause")?;
    }
    Ok(())
}

// --- (a) random situations ----------------------------------------------------------------------------------------

/// Choices, mostly the first of each list: situations close to one where the agent acts.
struct Tape<'a>(std::slice::Iter<'a, u8>);

impl Tape<'_> {
    fn pick<T: Clone>(&mut self, choices: &[T]) -> T {
        let byte = usize::from(self.0.next().copied().unwrap_or_default());
        let index = if byte < 200 || choices.len() == 1 { 0 } else { 1 + (byte - 200) % (choices.len() - 1) };
        choices[index].clone()
    }

    fn even<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.0.next().copied().unwrap_or_default()) % choices.len()].clone()
    }

    fn flag(&mut self) -> bool {
        self.pick(&[false, true])
    }
}

fn deployment(tape: &mut Tape<'_>, letter: char) -> Deployment {
    let letter = tape.pick(&[letter, 'a', 'b', 'c', 'd']);
    let arguments = vec!["nosmt".to_owned(), "quiet".to_owned()];
    Deployment {
        id: tape.pick(&[format!("os-{letter}.0"), format!("os-{letter}.{}", "0".repeat(8192))]),
        osname: "os".into(),
        checksum: letter.to_string(),
        booted: false,
        staged: false,
        locked: false,
        pinned: tape.flag(),
        version: None,
        reference: tape.pick(&[
            Some(image(letter).to_string()),
            None,
            Some("registry.example.com/os:latest".into()),
            Some("%%%".into()),
        ]),
        digest: tape.pick(&[Some(digest(letter)), None]),
        layered: tape.flag(),
        rendered_config: tape.pick(&[Some("r2".into()), Some("r1".into()), None]),
        wanted_arguments: tape.pick(&[None, Some(arguments.clone()), Some(vec!["nosmt".into()])]),
        config_fault: tape.pick(&[None, Some("is no JSON".into())]),
        arguments: tape.pick(&[Some(arguments.clone()), Some(vec!["quiet".into()]), Some(vec![]), None]),
    }
}

fn situation(bytes: &[u8]) -> (Observed, Memory, Limits, Now) {
    let tape = &mut Tape(bytes.iter());
    let now = Now { mono: 100 * MINUTE, unix: 1_000 * MINUTE };
    let arrived = tape.even(&[false, true]);
    let drains = ["drain-r2", "uncordon-r2", "drain-r1", "uncordon-r1", "nonsense"].map(|text| Some(text.to_owned()));
    let drains = if arrived {
        [drains[1].clone(), drains[0].clone(), None]
    } else {
        [drains[0].clone(), drains[1].clone(), drains[2].clone()]
    };
    let images = [image('b'), image('a'), image('d')].map(|image| Some(image.to_string()));
    let attempt = Attempt {
        image: tape.pick(&[image('b'), image('a')]),
        boot_id: BootId(tape.pick(&["now", "before"]).into()),
        count: tape.pick(&[1, 2, 3]),
        deployment: tape.pick(&[None, Some("os-b.0".into()), Some("os-b.1".into())]),
        rolled_back: false,
        unknown: BTreeMap::new(),
    };
    let node = NodeFacts {
        name: "worker-0".into(),
        desired_config: tape.pick(&[Some("r2".into()), Some("r1".into()), None]),
        current_config: tape.pick(&[Some("r1".into()), Some("r2".into()), None]),
        desired_image: tape
            .pick(&[images[0].clone(), images[1].clone(), images[2].clone(), None, Some("x:y".into())])
            .map(Pullspec::from),
        current_image: tape.pick(&[images[1].clone(), images[0].clone(), None]),
        state: tape.pick(&["Working", "Done", "Degraded", "Unreconcilable", "what"]).to_owned().into(),
        reason: tape.pick(&[None, Some("Staging: x".into())]),
        desired_drain: tape.pick(&drains),
        last_applied_drain: tape.pick(&drains),
        topology: tape.pick(&[None, Some("SingleReplica".into()), Some("HighlyAvailable".into())]),
        attempt: tape.pick(&[Some(attempt), None]),
        last_update: None,
        prefetch: tape
            .pick(&[
                None,
                Some(image('d').to_string()),
                Some(image('b').to_string()),
                Some(String::new()),
                Some("x:y".into()),
            ])
            .map(Pullspec::from),
        retry: None,
        hold: tape.pick(&[None, Some(String::new()), Some("because\nI say so".into())]),
        verified: None,
        untrusted: tape.pick(&[None, Some("SignatureRejected: x".into())]),
        schedulable: tape.pick(&[Some(false), Some(true), None]),
        other_writer: tape.pick(&[
            None,
            Some(OtherWriter { manager: "machine-config-daemon".into(), unix: now.unix - 1 }),
            Some(OtherWriter { manager: "machine-config-daemon".into(), unix: 1 }),
        ]),
    };
    let mut booted = deployment(tape, if arrived { 'b' } else { 'a' });
    booted.booted = true;
    let mut deployments = vec![booted];
    if tape.pick(&[!arrived, arrived]) {
        let mut staged = deployment(tape, 'b');
        staged.staged = true;
        staged.locked = tape.flag();
        deployments.insert(0, staged);
    }
    if tape.flag() {
        deployments.push(deployment(tape, 'b'));
    }
    let transaction = |ours| Some(Transaction { title: "t".into(), client: "c".into(), ours });
    let transactions = [None, transaction(None), transaction(Some(digest('b'))), transaction(Some(digest('c')))];
    let transaction = tape.pick(&transactions);
    let host = HostFacts { backend: tape.even(&BACKENDS), deployments, transaction };
    let machine = MachineFacts {
        boot_id: BootId("now".into()),
        uptime: tape.pick(&[10 * MINUTE, MINUTE]),
        architecture: tape.pick(&["amd64".to_owned(), "arm64".to_owned()]),
        command_line: tape.pick(&[vec!["nosmt".into(), "quiet".into()], vec![]]),
        boot_free: tape.pick(&[Some(u64::MAX), Some(0), None]),
        boot_needed: tape.pick(&[Some(1 << 20), Some(u64::MAX), None]),
        sysroot_free: tape.pick(&[Some(u64::MAX), Some(0), None]),
        finalizer: tape.pick(&[UnitState::Active, UnitState::Inactive, UnitState::Failed, UnitState::Absent]),
        kubelet: tape.pick(&[UnitState::Active, UnitState::Activating, UnitState::Failed]),
        bootloader_update: tape.pick(&[UnitState::Absent, UnitState::Inactive, UnitState::Failed]),
        finalize_failed: tape.flag(),
        inhibitors: tape.pick(&[vec![], vec![Inhibitor { who: "w".into(), why: "y".into() }]]),
        shutting_down: tape.flag(),
        first_boot: None,
    };
    let works = |tape: &mut Tape<'_>| {
        let image = tape.even(&[image('b'), image('a'), image('d')]);
        let checksum = tape.even(&["b".to_owned(), "c".to_owned()]);
        let (append, delete) = (vec!["nosmt".to_owned()], Vec::new());
        tape.even(&[
            Work::Verify { image: image.clone() },
            Work::Fetch { image: image.clone() },
            Work::Stage { image: image.clone() },
            Work::DropStaged { checksum },
            Work::CancelTransaction { digest: digest('c') },
            Work::SetKernelArguments { image: image.clone(), append, delete },
            Work::StartFinalizer,
            Work::UpdateBootloader { image: image.clone() },
            Work::Reboot { image },
        ])
    };
    let running = works(tape);
    let mut memory = Memory {
        spread: tape.pick(&[0, 30 * MINUTE]),
        fetched: tape.even(&[Some((image('b'), 0)), None, Some((image('d'), now.mono))]),
        prefetch_delay: tape.pick(&[0, MINUTE]),
        ..Memory::default()
    };
    if tape.flag() {
        memory.verified.insert(image('d'), facts('d', "r3"));
    }
    if tape.pick(&[true, false]) {
        let mut known = facts('b', "r2");
        known.architecture = tape.pick(&["amd64".into(), "arm64".into()]);
        known.bootable = tape.pick(&[true, false]);
        known.rendered_config = tape.pick(&[Some("r2".into()), Some("r1".into()), None]);
        memory.verified.insert(known.image.clone(), known);
    }
    for _ in 0..tape.even(&[0, 0, 1, 2]) {
        let reasons = [Reason::HostBusy, Reason::SignatureMissing, Reason::SignatureRejected, Reason::DiskFull];
        let last = now.mono - tape.even(&[1_000, 5_000, 10 * MINUTE]);
        let failure = Failure {
            work: works(tape),
            fault: fault(tape.even(&reasons)),
            first: last - tape.even(&[0, 20 * MINUTE]),
            last,
            count: tape.even(&[1, 2, u32::MAX]),
        };
        if memory.failures.iter().all(|other| !other.work.is(&failure.work)) {
            memory.failures.push(failure);
        }
    }
    let clocks = [
        Clock::HostUnreadable,
        Clock::Health,
        Clock::Drain,
        Clock::Uncordon,
        Clock::ConfigAhead,
        Clock::RebootAccepted,
        Clock::OutOfService,
        Clock::ForeignTransaction,
        Clock::RestoreSpread,
        Clock::Prefetch,
    ];
    for _ in 0..tape.even(&[0, 0, 1, 2]) {
        let subject =
            tape.even(&[image('b').to_string(), format!("{} r2", image('b')), "drain-r2".into(), String::new()]);
        // A clock in the future survived a bug and must do no harm.
        let mono = tape.even(&[now.mono - 31 * MINUTE, 0, now.mono, u64::MAX]);
        memory.clocks.insert(tape.even(&clocks), Since { subject, mono });
    }
    if tape.flag() {
        memory.dropped.push("c".into());
    }
    let unknown = |tape: &mut Tape<'_>| tape.pick(&[false, false, false, true]);
    let observed = Observed {
        cluster: if unknown(tape) { Reading::Unknown(fault(Reason::ClusterUnreachable)) } else { Reading::Known(node) },
        host: if unknown(tape) { Reading::Unknown(fault(Reason::HostUnreachable)) } else { Reading::Known(host) },
        machine: if unknown(tape) { Reading::Unknown(fault(Reason::HostUnreachable)) } else { Reading::Known(machine) },
        pool_image: tape.pick(&[None, Some(image('d').to_string().into())]),
        running: tape.pick(&[None, Some(running)]),
    };
    if tape.flag() {
        let mut unusable = deployment(tape, 'b');
        unusable.config_fault = Some("is no JSON".into());
        memory.unusable = Some(unusable);
    }
    let minimum_created = tape.pick(&[None, Some(1)]);
    let limits = Limits { accept_config_ahead: tape.flag(), minimum_created, ..Limits::default() };
    (observed, memory, limits, now)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_decision_breaks_a_law(bytes in prop::collection::vec(any::<u8>(), 120)) {
        let (mut observed, mut memory, limits, now) = situation(&bytes);
        let decision = decide(&observed, &memory, &limits, now);
        prop_assert_eq!(&decision, &decide(&observed, &memory, &limits, now));
        if let Err(law) = broken(&observed, &memory, &limits, now, &decision) {
            prop_assert!(false, "{}: {:#?}\n{:#?}\n{:#?}", law, decision, observed, memory);
        }
        // Reporting ends by itself and repeats no patch.
        for round in 0.. {
            let decision = decide(&observed, &memory, &limits, now);
            memory.note(&observed, &decision, now);
            let Reading::Known(node) = &mut observed.cluster else { break };
            let patch = report(node, &decision);
            if patch.is_empty() {
                break;
            }
            let before = node.clone();
            apply(&patch, node);
            prop_assert_ne!(&before, &*node, "a patch that changes nothing: {:?} for {:?}", patch, decision);
            prop_assert!(round < 8, "writing the Node does not end: {:?} for {:?}", patch, decision);
        }
    }
}

#[test]
fn repeated_drain_request_starts_a_new_wait() {
    let (mut observed, mut memory, limits, now) = situation(&[]);
    let Reading::Known(node) = &mut observed.cluster else { panic!() };
    (node.desired_drain, node.last_applied_drain) = (Some("uncordon-r2".into()), Some("uncordon-r2".into()));
    // The node was drained for r2 earlier and then uncordoned.
    let long_ago = now.mono - 70 * MINUTE;
    memory.clocks.insert(Clock::Drain, Since { subject: "drain-r2".into(), mono: long_ago });
    memory.clocks.insert(Clock::Uncordon, Since { subject: "uncordon-r2".into(), mono: long_ago });
    for _ in 0..3 {
        let decision = decide(&observed, &memory, &limits, now);
        memory.note(&observed, &decision, now);
        let Reading::Known(node) = &mut observed.cluster else { panic!() };
        apply(&report(node, &decision), node);
        assert_eq!((decision.reason, decision.state), (Reason::DrainPending, Some(NodeState::Working)));
    }
    assert!(!memory.clocks.contains_key(&Clock::Uncordon), "the uncordon was acknowledged");
}

// --- (b) a small world ----------------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Signature {
    Good,
    Missing,
    Rejected,
}

/// How B behaves when it boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nature {
    Sound,
    /// Boots, fails and is rolled back.
    RollsBack,
    /// Boots, fails, and the boot loader falls back without changing the boot order.
    FallsBack,
    /// The boot loader never gets an entry for it.
    NeverFinalized,
    /// Boots; its kubelet never becomes active.
    Unhealthy,
}

/// How many faults of each kind are left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Budget {
    retargets: u8,
    failures: u8,
    restarts: u8,
    uncordons: u8,
    holds: u8,
    human_stages: u8,
    foreign_transactions: u8,
    power_cuts: u8,
    orderly_reboots: u8,
    revocations: u8,
    hints: u8,
}

#[derive(Clone, Copy, Debug)]
struct Scenario {
    name: &'static str,
    backend: Backend,
    signature: Signature,
    nature: Nature,
    same_config: bool,
    single: bool,
    kernel_arguments: bool,
    /// The host tool can stage an image locked, so that no reboot boots it.
    locks: bool,
    budget: Budget,
}

const PLAIN: Scenario = Scenario {
    name: "plain",
    backend: Backend::RpmOstree,
    signature: Signature::Good,
    nature: Nature::Sound,
    same_config: false,
    single: false,
    kernel_arguments: false,
    locks: true,
    budget: Budget {
        retargets: 0,
        failures: 0,
        restarts: 0,
        uncordons: 0,
        holds: 0,
        human_stages: 0,
        foreign_transactions: 0,
        power_cuts: 0,
        orderly_reboots: 0,
        revocations: 0,
        hints: 0,
    },
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Agent,
    TaskSucceeds,
    TaskFails,
    ControllerBegins,
    ControllerEnds,
    TransactionEnds,
    Reboots,
    Time,
    LongTime,
    Retarget,
    Sign,
    Hold,
    Release,
    Uncordon,
    Restart,
    HumanStages,
    HumanCleansUp,
    ForeignTransaction,
    PowerCut,
    OrderlyReboot,
    /// The policy stops accepting B.
    Revoke,
    /// The pool has a new image, B or A, before the node's turn.
    Hint,
    Withdraw,
}

const EVENTS: &[Event] = &[
    Event::Agent,
    Event::TaskSucceeds,
    Event::TaskFails,
    Event::ControllerBegins,
    Event::ControllerEnds,
    Event::TransactionEnds,
    Event::Reboots,
    Event::Time,
    Event::LongTime,
    Event::Retarget,
    Event::Sign,
    Event::Hold,
    Event::Release,
    Event::Uncordon,
    Event::Restart,
    Event::HumanStages,
    Event::ForeignTransaction,
    Event::PowerCut,
    Event::OrderlyReboot,
    Event::Revoke,
    Event::Hint,
    Event::Withdraw,
];

#[derive(Clone)]
struct World {
    scenario: Scenario,
    budget: Budget,
    signature: Signature,
    node: NodeFacts,
    cordoned: bool,
    host: HostFacts,
    /// This process has no status of bootc yet and cannot ask for it now.
    blind: bool,
    finalizer: UnitState,
    arguments: Vec<String>,
    boot: u32,
    going_down: bool,
    now: Now,
    memory: Memory,
    task: Option<Work>,
    /// All facts are read once more, as before a reboot.
    confirm: bool,
    /// The agent is idle until something changes.
    quiet: bool,
    wake: u64,
    last: Option<Decision>,
    /// Boots of B that the agent requested while B was desired without interruption.
    boots: u8,
    counted_in: Option<u32>,
    /// The deployments that were finalized.
    finalized: BTreeSet<String>,
    /// The transaction of an earlier run only fetches.
    fetches: bool,
}

fn plain(letter: char) -> Deployment {
    Deployment {
        id: format!("{letter}.0"),
        osname: "os".into(),
        checksum: letter.to_string(),
        digest: Some(digest(letter)),
        ..Deployment::default()
    }
}

impl World {
    fn new(scenario: Scenario) -> Self {
        let node = NodeFacts {
            desired_config: Some("r1".into()),
            current_config: Some("r1".into()),
            desired_image: Some(image('a').to_string().into()),
            current_image: Some(image('a').to_string()),
            state: Some("Done".into()),
            desired_drain: Some("uncordon-r1".into()),
            last_applied_drain: Some("uncordon-r1".into()),
            topology: scenario.single.then(|| "SingleReplica".to_owned()),
            ..NodeFacts::default()
        };
        let mut world = Self {
            scenario,
            budget: scenario.budget,
            signature: scenario.signature,
            node,
            cordoned: false,
            host: HostFacts {
                backend: scenario.backend,
                deployments: vec![Deployment { booted: true, ..plain('a') }],
                transaction: None,
            },
            blind: false,
            finalizer: UnitState::Inactive,
            arguments: Vec::new(),
            boot: 1,
            going_down: false,
            now: Now { mono: MINUTE, unix: MINUTE },
            memory: Memory::default(),
            task: None,
            confirm: false,
            quiet: false,
            wake: 0,
            last: None,
            boots: 0,
            counted_in: None,
            finalized: BTreeSet::new(),
            fetches: false,
        };
        world.retarget();
        world
    }

    fn desired(&self) -> char {
        if self.node.desired().is_some_and(|desired| *desired == image('a')) { 'a' } else { 'b' }
    }

    fn booted(&self) -> char {
        self.host.booted().unwrap().checksum.chars().next().unwrap()
    }

    fn retarget(&mut self) {
        let (letter, config) = if self.desired() == 'a' { ('b', "r2") } else { ('a', "r1") };
        self.node.desired_image = Some(image(letter).to_string().into());
        self.node.desired_config = Some(if self.scenario.same_config { "r1" } else { config }.to_owned());
        self.boots = 0;
    }

    fn observed(&self) -> Observed {
        let node = NodeFacts { schedulable: self.confirm.then_some(!self.cordoned), ..self.node.clone() };
        let unhealthy = self.scenario.nature == Nature::Unhealthy && self.booted() == 'b';
        Observed {
            cluster: Reading::Known(node),
            host: match &self.host.transaction {
                Some(active) if self.blind && active.ours.is_none() => Reading::Unknown(fault(Reason::HostBusy)),
                Some(_) if self.blind => Reading::Known(HostFacts { deployments: Vec::new(), ..self.host.clone() }),
                _ => Reading::Known(self.host.clone()),
            },
            machine: Reading::Known(MachineFacts {
                boot_id: BootId(self.boot.to_string()),
                uptime: 60 * MINUTE,
                architecture: "amd64".into(),
                command_line: self.arguments.clone(),
                boot_free: None,
                boot_needed: None,
                sysroot_free: None,
                finalizer: self.finalizer,
                kubelet: if unhealthy { UnitState::Failed } else { UnitState::Active },
                // Only one of the two backends has the unit.
                bootloader_update: match self.scenario.backend {
                    Backend::RpmOstree => UnitState::Inactive,
                    Backend::Bootc => UnitState::Absent,
                },
                finalize_failed: false,
                inhibitors: Vec::new(),
                shutting_down: self.going_down,
                first_boot: None,
            }),
            pool_image: None,
            running: self.task.clone(),
        }
    }

    /// One pass of the loop: decide, note, report, act.
    fn agent(&mut self) -> Result<(), String> {
        let observed = self.observed();
        let limits = Limits::default();
        let decision = decide(&observed, &self.memory, &limits, self.now);
        broken(&observed, &self.memory, &limits, self.now, &decision)?;
        if decision.reason == Reason::RolledBack {
            let attempted = self.node.attempt.as_ref().and_then(|attempt| attempt.deployment.as_ref());
            if !attempted.is_some_and(|id| self.finalized.contains(id)) {
                return Err(format!("{attempted:?} is given up as rolled back and was never finalized"));
            }
        }
        self.memory.note(&observed, &decision, self.now);
        let Reading::Known(node) = &observed.cluster else { panic!("the world has a Node") };
        let patch = report(node, &decision);
        apply(&patch, &mut self.node);
        self.quiet = patch.is_empty();
        let confirmed = std::mem::take(&mut self.confirm);
        match &decision.action {
            Action::Abort => {
                if let Some(work) = self.task.take() {
                    self.memory.finished(&work, Outcome::GaveUp, self.now);
                }
                self.quiet = false;
            }
            Action::ConfirmDrain => self.confirm = true,
            Action::Begin(Work::Reboot { .. }) if !confirmed => self.confirm = true,
            Action::Annotate(Annotate::Settle) => {
                if self.cordoned {
                    return Err("the node is Done and cordoned, and no uncordon is requested".into());
                }
                if self.booted() != self.desired() {
                    return Err("the node is Done with another image".into());
                }
            }
            Action::Begin(work) if self.task.is_none() => self.begin(work.clone())?,
            Action::Nothing | Action::Annotate(_) | Action::Begin(_) => {}
        }
        self.quiet &= !self.confirm;
        self.wake = decision.wake.unwrap_or(MINUTE);
        self.last = Some(decision);
        Ok(())
    }

    fn begin(&mut self, work: Work) -> Result<(), String> {
        let signed = self.desired() == 'a' || self.signature == Signature::Good;
        if matches!(work, Work::Stage { .. } | Work::Reboot { .. }) && !signed {
            return Err("an unsigned image was staged".into());
        }
        if matches!(work, Work::Reboot { .. }) {
            if !(self.cordoned || self.scenario.single) {
                return Err("the node reboots without a drain".into());
            }
            if self.counted_in.replace(self.boot) != Some(self.boot) {
                self.boots += 1;
                if self.boots > 2 {
                    return Err("the same image boots a third time".into());
                }
            }
        }
        self.task = Some(work);
        self.quiet = false;
        Ok(())
    }

    fn stage(&mut self, letter: char) {
        self.host.deployments.retain(|deployment| !deployment.staged);
        // As libostree numbers the deployments of one commit.
        let is_free = |id: &String| self.host.deployments.iter().all(|deployment| deployment.id != *id);
        let id = (0..).map(|serial| format!("{letter}.{serial}")).find(is_free).unwrap();
        let locked = self.scenario.locks && self.scenario.backend == Backend::RpmOstree && letter != 'c';
        let mut staged = Deployment { id, staged: true, locked, arguments: Some(Vec::new()), ..plain(letter) };
        if self.scenario.kernel_arguments && letter == 'b' {
            staged.wanted_arguments = Some(vec!["nosmt".into()]);
        }
        self.host.deployments.insert(0, staged);
    }

    /// The loop's reaction to a task that ends without an error.
    fn succeed(&mut self) {
        let Some(work) = self.task.take() else { return };
        let mut outcome = Outcome::Succeeded(None);
        match &work {
            Work::Verify { image: wanted } => {
                let letter = if *wanted == image('a') { 'a' } else { 'b' };
                let config = if letter == 'a' || self.scenario.same_config { "r1" } else { "r2" };
                outcome = match self.signature {
                    Signature::Missing if letter == 'b' => Outcome::Failed(fault(Reason::SignatureMissing)),
                    Signature::Rejected if letter == 'b' => Outcome::Failed(fault(Reason::SignatureRejected)),
                    _ => Outcome::Succeeded(Some(facts(letter, config))),
                };
            }
            Work::Stage { image: wanted } => {
                self.host.transaction = None;
                self.stage(if *wanted == image('a') { 'a' } else { 'b' });
            }
            Work::DropStaged { .. } => {
                // Drops all deployments before the booted one, as rpm-ostree does.
                let booted = self.host.deployments.iter().position(|deployment| deployment.booted).unwrap();
                self.host.deployments.drain(..booted);
            }
            Work::CancelTransaction { .. } => self.host.transaction = None,
            Work::SetKernelArguments { .. } if self.scenario.backend == Backend::Bootc => {
                outcome = Outcome::Failed(fault(Reason::KernelArgumentsUnsupported));
            }
            Work::SetKernelArguments { append, delete, .. } => {
                if let Some(staged) = self.host.deployments.iter_mut().find(|deployment| deployment.staged) {
                    let before = staged.arguments.as_deref().unwrap_or_default();
                    staged.arguments = Some(kernel_arguments::apply(before, append, delete));
                }
            }
            Work::StartFinalizer => self.finalizer = UnitState::Active,
            Work::Reboot { .. } => {
                self.going_down = true;
                self.host.deployments.iter_mut().for_each(|deployment| deployment.locked = false);
            }
            Work::Fetch { .. } => self.host.transaction = None,
            Work::UpdateBootloader { .. } => {}
        }
        self.memory.finished(&work, outcome, self.now);
    }

    fn start_over(&mut self) {
        self.memory = Memory::default();
        self.task = None;
        self.confirm = false;
    }

    /// Shutdown and boot; a staged deployment boots if it was finalized.
    fn boots(&mut self, finalized: bool) -> Result<(), String> {
        let (asked, before) = (self.counted_in == Some(self.boot), self.booted());
        let idle = self.quiet && self.task.is_none() && self.host.transaction.is_none();
        let heard = self.node.hold.is_some() && idle && self.memory.failures.is_empty();
        self.boot += 1;
        self.start_over();
        self.host.transaction = None;
        self.going_down = false;
        let staged = self.host.staged().cloned();
        self.host.deployments.retain(|deployment| !deployment.staged);
        let nature = self.scenario.nature;
        if let Some(mut staged) = staged.filter(|staged| {
            finalized
                && !staged.locked
                && self.finalizer == UnitState::Active
                && !(staged.checksum == "b" && nature == Nature::NeverFinalized)
        }) {
            let falls_back = staged.checksum == "b" && nature == Nature::FallsBack;
            let fails = falls_back || staged.checksum == "b" && nature == Nature::RollsBack;
            self.finalized.insert(staged.id.clone());
            let mut before = self.host.booted().unwrap().clone();
            before.booted = fails;
            staged.staged = false;
            staged.booted = !fails;
            if !fails {
                self.arguments = staged.arguments.clone().unwrap_or_default();
            }
            // Only the booted deployment and its rollback are kept.
            let first = if fails && !falls_back { [before, staged] } else { [staged, before] };
            self.host.deployments = first.into();
        }
        self.finalizer = UnitState::Inactive;
        let ours = self.booted() != before && self.booted() != 'c';
        if ours && self.scenario.backend == Backend::RpmOstree {
            if self.scenario.locks && !asked {
                return Err("a reboot that the agent did not request boots its image".into());
            }
            if heard && !asked {
                return Err("a held node boots the held image".into());
            }
        }
        Ok(())
    }

    /// Applies `event`, or returns `false` if it cannot happen now.
    fn happen(&mut self, event: Event) -> Result<bool, String> {
        fn spend(budget: &mut u8) -> bool {
            let left = *budget > 0;
            *budget = budget.saturating_sub(1);
            left
        }
        if self.going_down && !matches!(event, Event::Agent | Event::Reboots | Event::Retarget | Event::Time) {
            return Ok(false);
        }
        let drain = self.node.desired_drain.clone().unwrap_or_default();
        let asked = self.node.desired_drain != self.node.last_applied_drain;
        let stages = matches!(self.task, Some(Work::Stage { .. }));
        let happened = match event {
            Event::Agent => {
                if self.quiet {
                    return Ok(false);
                }
                self.agent()?;
                return Ok(true);
            }
            Event::TaskSucceeds => {
                let busy = self.task.is_some();
                self.succeed();
                busy
            }
            Event::TaskFails => {
                let fails = self.task.is_some() && spend(&mut self.budget.failures);
                if let Some(work) = self.task.take_if(|_| fails) {
                    let verifies = matches!(work, Work::Verify { .. });
                    let reason = if verifies { Reason::RegistryUnreachable } else { Reason::HostBusy };
                    self.memory.finished(&work, Outcome::Failed(fault(reason)), self.now);
                }
                fails
            }
            Event::ControllerBegins => {
                let begins = asked && drain.starts_with("drain-") && !self.cordoned;
                self.cordoned |= begins;
                begins
            }
            Event::ControllerEnds => {
                let ends = asked && (drain.starts_with("uncordon-") || self.cordoned);
                if ends {
                    self.cordoned = drain.starts_with("drain-");
                    self.node.last_applied_drain = Some(drain);
                }
                ends
            }
            Event::TransactionEnds => match self.host.transaction.take() {
                Some(transaction) => {
                    if let Some(ours) = transaction.ours.filter(|_| !self.fetches) {
                        self.stage(if ours == digest('a') { 'a' } else { 'b' });
                    }
                    true
                }
                None => false,
            },
            Event::Reboots => {
                let reboots = self.going_down;
                if reboots {
                    self.boots(true)?;
                }
                reboots
            }
            Event::Time => {
                let waits = self.quiet;
                self.now.mono += if waits { self.wake.max(1) } else { 0 };
                waits
            }
            Event::LongTime => {
                let waits = self.quiet;
                self.now.mono += if waits { 61 * MINUTE } else { 0 };
                waits
            }
            Event::Retarget => {
                let changes = spend(&mut self.budget.retargets);
                if changes {
                    self.retarget();
                }
                changes
            }
            Event::Sign => {
                let signs = self.signature == Signature::Missing;
                if signs {
                    self.signature = Signature::Good;
                }
                signs
            }
            Event::Hold => {
                let holds = self.node.hold.is_none() && spend(&mut self.budget.holds);
                if holds {
                    self.node.hold = Some("maintenance".into());
                }
                holds
            }
            Event::Release => self.node.hold.take().is_some(),
            Event::Uncordon => {
                let uncordons = self.cordoned && spend(&mut self.budget.uncordons);
                self.cordoned &= !uncordons;
                uncordons
            }
            Event::Restart => {
                let restarts = spend(&mut self.budget.restarts);
                if restarts {
                    // The host tool goes on without the agent.
                    if let Some(Work::Stage { image } | Work::Fetch { image }) = &self.task {
                        self.fetches = matches!(self.task, Some(Work::Fetch { .. }));
                        let ours = Some(image.digest().clone());
                        self.host.transaction =
                            Some(Transaction { title: "rebase-agent".into(), client: "c".into(), ours });
                    }
                    self.start_over();
                    self.blind = self.scenario.backend == Backend::Bootc && self.host.transaction.is_some();
                }
                restarts
            }
            Event::HumanStages => {
                let stages = !stages && self.host.transaction.is_none() && spend(&mut self.budget.human_stages);
                if stages {
                    self.stage('c');
                }
                stages
            }
            Event::HumanCleansUp => {
                let stays =
                    |checksum: &str| !self.host.backend.drops_staged() && checksum != self.desired().to_string();
                let cleans = self.host.staged().is_some_and(|s| s.checksum == "c" || stays(&s.checksum));
                if cleans {
                    self.host.deployments.retain(|deployment| !deployment.staged);
                }
                cleans
            }
            Event::ForeignTransaction => {
                let begins = self.task.is_none()
                    && self.host.transaction.is_none()
                    && spend(&mut self.budget.foreign_transactions);
                if begins {
                    self.host.transaction = Some(Transaction { title: "t".into(), client: "root".into(), ours: None });
                }
                begins
            }
            Event::Revoke => {
                let revokes = self.signature == Signature::Good && spend(&mut self.budget.revocations);
                if revokes {
                    self.signature = Signature::Rejected;
                    // The loop's reaction to changed policy files.
                    self.memory.withdraw();
                    self.task.take_if(|work| matches!(work, Work::Verify { .. }));
                }
                revokes
            }
            Event::Hint => {
                let hints = self.node.prefetch.is_none() && spend(&mut self.budget.hints);
                if hints {
                    let next = if self.desired() == 'a' { 'b' } else { 'a' };
                    self.node.prefetch = Some(image(next).to_string().into());
                }
                hints
            }
            Event::Withdraw => self.node.prefetch.take().is_some(),
            Event::PowerCut => {
                let cut = spend(&mut self.budget.power_cuts);
                if cut {
                    self.boots(false)?;
                }
                cut
            }
            Event::OrderlyReboot => {
                let reboots = spend(&mut self.budget.orderly_reboots);
                if reboots {
                    self.boots(true)?;
                }
                reboots
            }
        };
        self.quiet &= !happened;
        Ok(happened)
    }

    /// A hash of the state without irrelevant parts: absolute times become "over or not", boots "this one or not".
    fn key(&self) -> u64 {
        let mut text = String::with_capacity(400);
        let node = &self.node;
        let letter = |image: &Option<String>| image.as_ref().and_then(|text| text.chars().last());
        let this_boot = self.boot.to_string();
        let attempt =
            node.attempt.as_ref().map(|a| (a.count, a.boot_id.0 == this_boot, a.image.digest(), &a.deployment));
        write!(
            text,
            "{:?}{:?}{:?}{:?}{:?}{:?}{attempt:?}{:?}",
            letter(&node.desired_image.clone().map(String::from)),
            letter(&node.current_image),
            node.state,
            node.desired_drain,
            node.last_applied_drain,
            node.current_config,
            (node.hold.is_some(), node.prefetch.is_some(), &self.memory.fetched.as_ref().map(|(image, _)| image)),
        )
        .unwrap();
        for d in &self.host.deployments {
            write!(text, "{}{}{}{}{:?}", d.id, d.booted, d.staged, d.locked, d.arguments).unwrap();
        }
        let transaction = self.host.transaction.as_ref().map(|t| t.ours.as_ref());
        write!(
            text,
            "{transaction:?}{}{:?}{:?}{:?}",
            self.fetches,
            self.finalizer,
            self.task,
            self.memory.verified.keys()
        )
        .unwrap();
        for failure in &self.memory.failures {
            let fatal = failure.fault.reason.severity() == Severity::Fatal;
            let backoff = if fatal { Backoff::REFUSAL } else { Backoff::TRANSIENT };
            let due = failure.last.saturating_add(backoff.delay(failure.count)) <= self.now.mono;
            let old = self.now.mono.saturating_sub(failure.first) >= 15 * MINUTE;
            write!(text, "{:?}{:?}{due}{old}", failure.work, failure.fault.reason).unwrap();
        }
        for (clock, since) in &self.memory.clocks {
            let over = self.now.mono.saturating_sub(since.mono) >= 60 * MINUTE;
            write!(text, "{clock:?}{}{over}", since.subject).unwrap();
        }
        let mut dropped: Vec<_> = self.memory.dropped.iter().collect();
        dropped.sort_unstable();
        dropped.dedup();
        write!(
            text,
            "{dropped:?}{}{}{}{}{}{}{:?}{:?}{:?}",
            self.blind && self.host.transaction.is_some(),
            self.cordoned,
            self.going_down,
            self.confirm,
            self.quiet,
            self.boots,
            self.finalized,
            self.counted_in.map(|boot| boot == self.boot),
            self.signature,
        )
        .unwrap();
        let mut hasher = DefaultHasher::new();
        (text, self.budget).hash(&mut hasher);
        hasher.finish()
    }

    /// The next event of a fair run, in which every party does its duty and none does harm; `None` at the end.
    fn fair(&self) -> Option<Event> {
        if !self.quiet {
            return Some(Event::Agent);
        }
        if self.going_down {
            return Some(Event::Reboots);
        }
        if self.task.is_some() {
            return Some(Event::TaskSucceeds);
        }
        let asked = self.node.desired_drain != self.node.last_applied_drain;
        if asked {
            let drains = self.node.desired_drain.as_deref().is_some_and(|drain| drain.starts_with("drain-"));
            return Some(if drains && !self.cordoned { Event::ControllerBegins } else { Event::ControllerEnds });
        }
        if self.host.transaction.is_some() {
            return Some(Event::TransactionEnds);
        }
        let last = self.last.as_ref()?;
        match last.reason {
            // A step that failed by chance is retried.
            _ if self.is_pending(last) => Some(Event::Time),
            reason if reason.is_at_rest() && last.action == Action::Nothing && self.verification_is_over() => None,
            Reason::Held => None,
            // The operator who staged by hand follows the way out that the message names.
            Reason::StagedByOther
                if last.action == Action::Nothing
                    && (last.wake.is_none() || self.verification_failed(Reason::SignatureRejected)) =>
            {
                Some(Event::HumanCleansUp)
            }
            // Failures by chance are retried; every other refusal stays.
            Reason::RegistryUnreachable | Reason::HostBusy => Some(Event::Time),
            _ if last.state == Some(NodeState::Degraded) => None,
            _ => Some(Event::Time),
        }
    }

    /// Whether verifying the booted image or dropping the next one failed by chance and is due again.
    fn is_pending(&self, last: &Decision) -> bool {
        let next = self.host.next_boot().filter(|next| !next.booted);
        let drop = |next: &Deployment| Work::DropStaged { checksum: next.checksum.clone() };
        let drops = next.is_some_and(|next| self.memory.failure(&drop(next)).is_some());
        let verifies = self.verification_failed(Reason::RegistryUnreachable);
        last.wake.is_some() && (drops || verifies && last.reason.is_at_rest())
    }

    fn verification_failed(&self, reason: Reason) -> bool {
        let failed = |f: &Failure| matches!(f.work, Work::Verify { .. }) && f.fault.reason == reason;
        self.memory.failures.iter().any(failed)
    }

    /// Whether the booted image was verified or refused.
    fn verification_is_over(&self) -> bool {
        !self.memory.verified.is_empty() || self.memory.failures.iter().any(|f| matches!(f.work, Work::Verify { .. }))
    }

    /// Whether a fair run may end in this state.
    fn ends_well(&self) -> Result<(), String> {
        let last = self.last.as_ref().unwrap();
        let held = matches!(last.reason, Reason::Held | Reason::HealthFailed);
        if self.cordoned && !held {
            return Err(format!("the run ends with a cordoned node: {}: {}", last.reason, last.message));
        }
        let refused = self.signature == Signature::Rejected || last.reason == Reason::RolledBack;
        let next = self.host.next_boot().filter(|next| !next.booted && next.checksum == "b");
        let by_hand = last.message.contains("drop it with");
        if refused && self.desired() == 'b' && next.is_some() && !by_hand {
            return Err("a refused image boots next".into());
        }
        if self.booted() == 'b' && self.desired() == 'b' && self.signature == Signature::Rejected {
            let shown = last.reason == Reason::RunsUntrusted && self.node.untrusted.is_some();
            if !shown && last.reason.is_at_rest() {
                return Err("the booted image is refused and the Node does not report it".into());
            }
        }
        if last.reason.is_at_rest() {
            let said = self.node.state.as_deref() == Some("Done")
                && self.node.is_current_image_desired()
                && self.node.current_config == self.node.desired_config
                && self.booted() == self.desired();
            return if said { Ok(()) } else { Err("the agent is at rest and the Node is not Done".into()) };
        }
        let told = self.node.reason.as_deref() == Some(format!("{}: {}", last.reason, last.message).as_str());
        if last.reason != Reason::Held && self.node.state.as_deref() != Some("Degraded") {
            return Err(format!("the run ends without a report to the cluster: {}", last.message));
        }
        if told {
            names_a_way_out(&last.message)
        } else {
            Err(format!("the last message is not on the Node: {}", last.message))
        }
    }
}

/// More events than any fair run needs; half of them are retries before the patience ends.
const LONGEST_RUN: usize = 900;

/// Follows the fair run from `world` to its end, or to a state from which runs are known to end well.
fn follow(world: &World, ending: &mut HashSet<u64>, trace: &mut Vec<Event>) -> Result<&'static str, String> {
    let mut world = world.clone();
    let mut keys = Vec::new();
    for _ in 0..LONGEST_RUN {
        let key = world.key();
        if ending.contains(&key) {
            ending.extend(keys);
            return Ok("known");
        }
        keys.push(key);
        match world.fair() {
            None => {
                world.ends_well()?;
                ending.extend(keys);
                return Ok(world.last.as_ref().unwrap().reason.as_str());
            }
            Some(event) => {
                trace.push(event);
                if !world.happen(event)? {
                    return Err(format!("no event is possible: {:?}", world.last));
                }
            }
        }
    }
    Err(format!("the run does not end: {:?}", world.last))
}

/// Result of an exploration: states, steps between them, and the ends of fair runs.
type Seen = (usize, usize, BTreeMap<&'static str, usize>);

/// Every order of events within the budgets, up to `most` states.
fn explore(scenario: Scenario, most: usize) -> Result<Seen, String> {
    let mut parents: HashMap<u64, (u64, Event)> = HashMap::new();
    let mut queue = VecDeque::from([World::new(scenario)]);
    let (mut seen, mut ending) = (HashSet::from([queue[0].key()]), HashSet::new());
    let (mut transitions, mut ends) = (0, BTreeMap::new());
    let path = |parents: &HashMap<u64, (u64, Event)>, mut key: u64| {
        let mut events = VecDeque::new();
        while let Some((parent, event)) = parents.get(&key) {
            events.push_front(*event);
            key = *parent;
        }
        events
    };
    while let Some(world) = queue.pop_front() {
        let key = world.key();
        let mut trace = Vec::new();
        match follow(&world, &mut ending, &mut trace) {
            Ok(end) => *ends.entry(end).or_default() += 1,
            Err(why) => return Err(format!("{why}\nafter {:?}\nthen {trace:?}", path(&parents, key))),
        }
        if seen.len() >= most {
            continue;
        }
        for event in EVENTS {
            let mut next = world.clone();
            match next.happen(*event) {
                Err(why) => return Err(format!("{why}\nafter {:?}, {event:?}", path(&parents, key))),
                Ok(false) => {}
                Ok(true) => {
                    transitions += 1;
                    let next_key = next.key();
                    if seen.insert(next_key) {
                        parents.insert(next_key, (key, *event));
                        queue.push_back(next);
                    }
                }
            }
        }
    }
    ends.remove("known");
    Ok((seen.len(), transitions, ends))
}

/// All faults at once, for the random walks.
const UNKIND: Budget = Budget {
    retargets: 4,
    failures: 4,
    restarts: 3,
    uncordons: 2,
    holds: 2,
    human_stages: 2,
    foreign_transactions: 2,
    power_cuts: 2,
    orderly_reboots: 2,
    revocations: 1,
    hints: 2,
};

fn scenarios() -> Vec<Scenario> {
    let none = PLAIN.budget;
    let with = |name, budget| Scenario { name, budget, ..PLAIN };
    vec![
        with("failures and restarts", Budget { failures: 2, restarts: 2, ..none }),
        with("retargets", Budget { retargets: 4, ..none }),
        Scenario { same_config: true, ..with("retargets within one config", Budget { retargets: 4, ..none }) },
        with("retargets, failures and restarts", Budget { retargets: 2, failures: 1, restarts: 1, ..none }),
        Scenario { signature: Signature::Missing, ..with("signed late", Budget { retargets: 2, restarts: 1, ..none }) },
        Scenario {
            signature: Signature::Rejected,
            ..with("never accepted", Budget { retargets: 3, failures: 1, ..none })
        },
        Scenario { nature: Nature::RollsBack, ..with("rolls back", Budget { retargets: 2, restarts: 1, ..none }) },
        Scenario { nature: Nature::FallsBack, ..with("falls back", Budget { retargets: 2, restarts: 1, ..none }) },
        with("revoked", Budget { revocations: 1, holds: 1, orderly_reboots: 1, failures: 1, ..none }),
        Scenario {
            nature: Nature::NeverFinalized,
            ..with("never finalized", Budget { retargets: 1, restarts: 1, power_cuts: 1, ..none })
        },
        Scenario { nature: Nature::Unhealthy, ..with("unhealthy", Budget { retargets: 2, restarts: 1, ..none }) },
        Scenario {
            single: true,
            kernel_arguments: true,
            ..with("single node", Budget { retargets: 2, failures: 1, restarts: 1, ..none })
        },
        Scenario { kernel_arguments: true, ..with("kernel arguments", Budget { retargets: 1, failures: 2, ..none }) },
        with("holds and uncordons", Budget { holds: 1, uncordons: 2, restarts: 1, ..none }),
        Scenario {
            locks: false,
            ..with("holds without a lock", Budget { holds: 2, orderly_reboots: 1, restarts: 1, ..none })
        },
        with("prefetch", Budget { hints: 2, retargets: 2, failures: 1, ..none }),
        with("prefetch and hold", Budget { hints: 1, holds: 1, restarts: 1, orderly_reboots: 1, retargets: 1, ..none }),
        with("human hands", Budget { human_stages: 2, foreign_transactions: 1, retargets: 1, ..none }),
        with("unplanned reboots", Budget { power_cuts: 1, orderly_reboots: 1, retargets: 2, ..none }),
    ]
}

#[test]
fn every_fair_run_ends_well() {
    let both = scenarios().into_iter().flat_map(|scenario| BACKENDS.map(|backend| Scenario { backend, ..scenario }));
    let queue = Mutex::new(both.collect::<Vec<_>>());
    let outcomes = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(scenario) = queue.lock().unwrap().pop() else { break };
                    let outcome = explore(scenario, 10_000);
                    outcomes.lock().unwrap().push((format!("{}, {}", scenario.name, scenario.backend), outcome));
                }
            });
        }
    });
    let (mut total, mut wrong) = (0, String::new());
    for (name, outcome) in outcomes.into_inner().unwrap() {
        match outcome {
            Ok((states, steps, ends)) => {
                total += states;
                eprintln!("{name}: {states} states, {steps} steps, ends {ends:?}");
            }
            Err(why) => write!(wrong, "\n{name}: {why}\n").unwrap(),
        }
    }
    eprintln!("{total} states in all");
    assert!(wrong.is_empty(), "{wrong}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_walk_ends_well(
        which in any::<prop::sample::Index>(),
        same_config in any::<bool>(),
        bootc in any::<bool>(),
        bytes in prop::collection::vec(any::<u8>(), 0..250),
    ) {
        let scenarios = scenarios();
        let backend = BACKENDS[usize::from(bootc)];
        let scenario = Scenario { backend, budget: UNKIND, same_config, ..*which.get(&scenarios) };
        let mut world = World::new(scenario);
        let mut trace = Vec::new();
        for byte in bytes {
            // Every second event is the agent's; events that cannot happen are skipped.
            let event = if byte % 2 == 0 { Event::Agent } else { EVENTS[usize::from(byte / 2) % EVENTS.len()] };
            match world.happen(event) {
                Ok(true) => trace.push(event),
                Ok(false) => {}
                Err(why) => prop_assert!(false, "{}: {why}\nafter {trace:?}, {event:?}", scenario.name),
            }
        }
        let mut rest = Vec::new();
        if let Err(why) = follow(&world, &mut HashSet::new(), &mut rest) {
            prop_assert!(false, "{}: {why}\nafter {trace:?}\nthen {rest:?}", scenario.name);
        }
    }
}
