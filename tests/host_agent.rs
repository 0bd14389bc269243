//! The agent as a process on a machine whose daemons, boot loader and power supply fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use support::events::Event;
use support::image::Pushed;
use support::logind::Inhibitor;
use support::machine::{Engine, MachineOptions};
use support::mcc::{MANAGER, PREFIX, annotation, is_node_done};
use support::policy::{Policy, Requirement};
use support::rpmostreed::Version;
use support::sign::{KeyKind, Signer};
use support::world::{DEADLINE, NODE, World, WorldOptions};

const FINALIZER: &str = "ostree-finalize-staged.service";
const UPDATE: &str = "bootloader-update.service";
const ATTEMPT: &str = "rebase-agent.openshift.io/attempt";
const HOLD: &str = "rebase-agent.openshift.io/hold";

/// A world whose node is Done on the installed image, and all events from then on.
struct Stage {
    world: World,
    seen: Arc<Mutex<Vec<Event>>>,
}

impl Stage {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: fn(&mut MachineOptions)) -> Self {
        let mut options = WorldOptions::new(Path::new(env!("CARGO_BIN_EXE_rebase-agent-under-test")));
        options.machine = change;
        // An idle agent asks a lost API server again within one poll.
        options.env.push(("REBASE_AGENT_POLL".to_owned(), "30".to_owned()));
        let world = World::new(options).await.unwrap();
        world.target("1", &world.installed);
        world.machine.power_on().await.unwrap();
        world.wait_installed().await.unwrap();
        let seen = Arc::<Mutex<Vec<Event>>>::default();
        let to = seen.clone();
        world.events.listen(move |event| to.lock().unwrap().push(event.clone()));
        Self { world, seen }
    }

    /// Pushes a signed image and makes it the pool's target.
    async fn target(&self, version: &str) -> Pushed {
        let image = self.world.signed(version).await.unwrap();
        self.world.target(version, &image);
        image
    }

    /// Writes the desired annotations as MCC does, without waiting for the node's turn.
    fn retarget(&self, version: &str, image: &Pushed) {
        self.world.pool.pause(true);
        let annotations = json!({
            format!("{PREFIX}desiredConfig"): format!("rendered-worker-{version}"),
            format!("{PREFIX}desiredImage"): image.pullspec(),
        });
        self.world.store().patch_as(MANAGER, NODE, json!({ "metadata": { "annotations": annotations } })).unwrap();
    }

    fn count(&self, choose: impl Fn(&Event) -> bool) -> usize {
        self.seen.lock().unwrap().iter().filter(|event| choose(event)).count()
    }

    fn position(&self, choose: impl Fn(&Event) -> bool) -> usize {
        self.seen.lock().unwrap().iter().position(choose).expect("it happened")
    }

    async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + DEADLINE;
        while !condition() {
            assert!(Instant::now() < end, "never: {what}; {:#?}", self.said());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The agent's journal.
    fn said(&self) -> Vec<String> {
        let line = |event: &Event| match event {
            Event::AgentLine(line) => Some(line.clone()),
            _ => None,
        };
        self.seen.lock().unwrap().iter().filter_map(line).collect()
    }

    async fn says(&self, words: &str) {
        self.until(words, || self.said().iter().any(|line| line.contains(words))).await;
    }

    fn cordoned(&self) -> bool {
        self.world.store().node(NODE).unwrap()["spec"]["unschedulable"] == true
    }

    /// Reboots the machine as a person does.
    async fn reboots_into_the_old_image(&self) {
        let boots = self.boots();
        self.world.machine.logind().reboot().await;
        self.until("booted", || self.boots() == boots + 1).await;
        assert_eq!(self.world.machine.booted().unwrap().digest, self.world.installed.digest);
    }

    fn boots(&self) -> usize {
        self.count(|event| matches!(event, Event::Booted { .. }))
    }

    fn staged(&self) -> Option<String> {
        self.world.machine.deployments().into_iter().find(|deployment| deployment.staged).map(|staged| staged.digest)
    }

    fn booted(&self) -> String {
        self.world.machine.booted().unwrap().digest
    }

    fn annotate(&self, key: &str, value: Option<&str>) {
        self.world.store().annotate("kubectl-annotate", NODE, key, value).unwrap();
    }

    /// Calls `then` once, during the first event that `choose` accepts.
    fn once(&self, choose: impl Fn(&Event) -> bool + Send + Sync + 'static, then: impl Fn() + Send + Sync + 'static) {
        let armed = AtomicBool::new(true);
        self.world.events.listen(move |event| {
            if choose(event) && armed.swap(false, Ordering::SeqCst) {
                then();
            }
        });
    }

    async fn done(&self, image: &Pushed) {
        if let Err(error) = self.world.wait_done(image).await {
            panic!("{error:#}\n{:#?}", self.said());
        }
        assert_eq!(self.booted(), image.digest);
        assert_eq!(self.staged(), None);
        assert!(!self.cordoned());
        assert_eq!(self.world.store().annotation(NODE, ATTEMPT), None);
    }

    async fn refused(&self, word: &str) -> String {
        let reason = match self.world.wait_reason(word).await {
            Ok(reason) => reason,
            Err(error) => panic!("{error:#}\n{:#?}", self.said()),
        };
        self.until("Degraded", || self.world.annotation("state").as_deref() == Some("Degraded")).await;
        self.until("uncordoned", || !self.cordoned()).await;
        reason
    }
}

fn wrote(event: &Event, key: &str, prefix: &str) -> bool {
    matches!(event, Event::NodeChanged { manager, changes, .. } if manager == "rebase-agent"
        && changes.get(key).is_some_and(|value| value.as_deref().is_some_and(|value| value.starts_with(prefix))))
}

fn drain_requested(event: &Event) -> bool {
    wrote(event, &format!("{PREFIX}desiredDrain"), "drain-")
}

fn attempt_recorded(event: &Event) -> bool {
    wrote(event, ATTEMPT, "{")
}

fn importing(event: &Event) -> bool {
    matches!(event, Event::TransactionMessage(text) if text.starts_with("Importing"))
}

fn rebase_requested(event: &Event) -> bool {
    matches!(event, Event::TransactionRequested { method, .. } if method == "rebase")
}

// --- reboots that do not reach the image
// --------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn image_is_refused_after_two_failed_finalizations() {
    let stage = Stage::new().await;
    let machine = stage.world.machine.clone();
    let fail = move || machine.fail_finalize("Installing kernel: regfile copy: No space left on device");
    fail();
    stage.once(|event| *event == Event::Down, fail);
    let image = stage.target("2").await;
    let reason = stage.refused("NeverCameUp").await;
    assert!(reason.contains("could not finalize") && reason.contains(ATTEMPT), "{reason}");
    assert_eq!((stage.boots(), stage.booted()), (2, stage.world.installed.digest.clone()));
    // An operator made room and removed the attempt.
    stage.annotate(ATTEMPT, None);
    stage.done(&image).await;
    assert_eq!(stage.boots(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn image_is_refused_after_a_fall_back_until_the_attempt_is_cleared() {
    let stage = Stage::new().await;
    stage.world.machine.fall_back();
    let image = stage.target("2").await;
    let reason = stage.refused("RolledBack").await;
    assert!(reason.contains(ATTEMPT), "{reason}");
    assert_eq!((stage.boots(), stage.world.drains.drains()), (1, 1));
    stage.annotate(ATTEMPT, None);
    stage.done(&image).await;
    assert_eq!((stage.boots(), stage.world.drains.drains()), (2, 2));
}

async fn power_fails(choose: fn(&Event) -> bool) {
    let stage = Stage::new().await;
    let plug = stage.world.machine.clone();
    stage.once(choose, move || plug.power_cut());
    let image = stage.target("2").await;
    stage.until("dark", || stage.count(|event| *event == Event::Down) == 1).await;
    stage.world.machine.power_on().await.unwrap();
    assert_eq!(stage.booted(), stage.world.installed.digest);
    stage.done(&image).await;
    assert_eq!(stage.boots(), 2, "{:#?}", stage.seen.lock().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_fails_after_staging() {
    power_fails(|event| matches!(event, Event::Staged { .. })).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_fails_after_the_attempt_is_recorded() {
    power_fails(attempt_recorded).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_fails_during_the_shutdown() {
    power_fails(|event| matches!(event, Event::AgentExited { .. })).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_kubelet_keeps_the_node_cordoned() {
    let stage = Stage::new().await;
    stage.world.machine.kubelet_fails(true);
    let image = stage.target("2").await;
    stage.world.wait_reason("HealthPending").await.unwrap();
    assert_eq!(stage.booted(), image.digest);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(stage.cordoned());
    assert_eq!(stage.world.annotation("state").as_deref(), Some("Working"));
    stage.world.machine.systemd().set("kubelet.service", "active", "running");
    stage.done(&image).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_reboot_of_a_held_node_boots_the_old_image() {
    let stage = Stage::new().await;
    stage.annotate(HOLD, Some("not tonight"));
    let image = stage.target("2").await;
    stage.world.wait_reason("Held").await.unwrap();
    assert_eq!((stage.staged(), stage.world.drains.drains()), (None, 0));
    stage.reboots_into_the_old_image().await;
    stage.annotate(HOLD, None);
    stage.done(&image).await;
    assert_eq!((stage.boots(), stage.world.drains.drains()), (2, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_reboot_during_the_drain_boots_the_old_image() {
    let stage = Stage::new().await;
    stage.world.drains.block_drains(true);
    let image = stage.target("2").await;
    stage.until("staged", || stage.staged() == Some(image.digest.clone())).await;
    stage.world.wait_reason("DrainPending").await.unwrap();
    stage.reboots_into_the_old_image().await;
    stage.world.drains.block_drains(false);
    stage.done(&image).await;
    assert_eq!(stage.boots(), 2);
}

/// rpm-ostree before 2025.7 knows a staged image by its ostree commit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn image_is_unlocked_by_its_commit_where_the_daemon_is_older() {
    let stage = Stage::new().await;
    stage.world.machine.rpm_ostreed().set_version(Version::FinalizesByCommit);
    let image = stage.target("2").await;
    stage.done(&image).await;
    let unlocked = |event: &Event| matches!(event, Event::Unlocked { .. });
    assert_eq!((stage.boots(), stage.count(unlocked)), (1, 1));
}

/// rpm-ostree as old as it gets has no lock: a hold that comes after the staging drops the image.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hold_drops_an_image_that_is_staged_without_a_lock() {
    let stage = Stage::new().await;
    stage.world.machine.rpm_ostreed().set_version(Version::WithoutLock);
    stage.world.drains.block_drains(true);
    let image = stage.target("2").await;
    stage.until("staged", || stage.staged() == Some(image.digest.clone())).await;
    stage.annotate(HOLD, Some("not tonight"));
    stage.until("dropped", || stage.staged().is_none()).await;
    stage.reboots_into_the_old_image().await;
    stage.world.drains.block_drains(false);
    stage.annotate(HOLD, None);
    stage.done(&image).await;
}

// --- rpm-ostree -------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_stage_is_dropped_once_and_then_left_alone() {
    let stage = Stage::new().await;
    let other = stage.world.signed("9").await.unwrap();
    let typed = format!("ostree-unverified-registry:{}", other.pullspec());
    stage.world.machine.human_stage(&typed).await.unwrap();
    let idle = || stage.world.machine.rpm_ostreed().active_transaction().is_none();
    stage.until("dropped", || stage.staged().is_none() && idle()).await;
    let dropped = |event: &Event| matches!(event, Event::TransactionRequested { method, .. } if method == "cleanup");
    stage.world.machine.human_stage(&typed).await.unwrap();
    stage.says("was staged again by hand").await;
    // A new target waits as well.
    let image = stage.target("2").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((stage.staged(), stage.count(dropped)), (Some(other.digest), 1));
    stage.world.machine.sysroot().drop_staged().unwrap();
    stage.done(&image).await;
    assert_eq!(stage.count(dropped), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retarget_during_staging_cancels_the_transaction() {
    let stage = Stage::new().await;
    let three = stage.world.signed("3").await.unwrap();
    stage.world.machine.rpm_ostreed().hang_at("Importing");
    stage.target("2").await;
    stage.until("hangs", || stage.world.machine.rpm_ostreed().is_hanging()).await;
    stage.retarget("3", &three);
    stage.done(&three).await;
    // One pull that is cancelled; then one pull and one staging.
    assert_eq!((stage.boots(), stage.count(rebase_requested)), (1, 3));
    let cancelled = |event: &Event| matches!(event, Event::TransactionFinished { error: Some(text), .. } if text.contains("cancelled"));
    assert_eq!(stage.count(cancelled), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retarget_to_the_booted_image_ends_without_a_reboot() {
    let stage = Stage::new().await;
    stage.world.machine.rpm_ostreed().hang_at("Importing");
    stage.target("2").await;
    stage.until("hangs", || stage.world.machine.rpm_ostreed().is_hanging()).await;
    let installed = stage.world.installed.clone();
    stage.retarget("1", &installed);
    stage.done(&installed).await;
    stage.until("no transaction", || stage.world.machine.rpm_ostreed().active_transaction().is_none()).await;
    assert_eq!((stage.boots(), stage.world.drains.drains()), (0, 0));
    assert_eq!(stage.staged(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn obsolete_transaction_of_a_killed_agent_is_cancelled() {
    let stage = Stage::new().await;
    let three = stage.world.signed("3").await.unwrap();
    stage.world.machine.rpm_ostreed().hang_at("Importing");
    stage.target("2").await;
    stage.until("hangs", || stage.world.machine.rpm_ostreed().is_hanging()).await;
    stage.world.machine.kill_agent();
    stage.retarget("3", &three);
    stage.done(&three).await;
    assert_eq!(stage.boots(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rebase_is_retried_after_the_daemon_crashes() {
    let stage = Stage::new().await;
    stage.world.machine.rpm_ostreed().crash_at("Importing");
    let image = stage.target("2").await;
    stage.done(&image).await;
    assert_eq!((stage.boots(), stage.count(rebase_requested)), (1, 3));
}

/// `journalctl -p warning` shows what the agent cannot read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreadable_host_and_api_server_are_logged_as_warnings() {
    let stage = Stage::new().await;
    stage.world.machine.stop_agent().await;
    stage.world.machine.rpm_ostreed().crash_on_calls(usize::MAX);
    stage.world.machine.start_agent();
    stage.says("WARN HostUnreachable: ").await;
    stage.world.machine.rpm_ostreed().crash_on_calls(0);
    stage.world.api.stop().await;
    stage.says("WARN ClusterUnreachable: ").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layered_host_is_refused_without_a_drain() {
    let stage = Stage::new().await;
    stage.world.machine.sysroot().layer_packages(&["vim"]).unwrap();
    stage.target("2").await;
    let reason = stage.refused("LayeredPackages").await;
    assert!(reason.contains("rpm-ostree reset"), "{reason}");
    assert_eq!((stage.world.drains.drains(), stage.count(rebase_requested)), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pull_with_a_stricter_policy_is_refused_without_a_drain() {
    let stage = Stage::new().await;
    let path = stage.world.path();
    Signer::generate(KeyKind::P256).write_public(&path.join("stranger.pub")).unwrap();
    let demanded = [Requirement::sigstore_key_path(&path.join("stranger.pub"))];
    let policy = path.join("stricter.json");
    let scope = format!("{}/example", stage.world.registry.host());
    Policy::accept_by_default().scope(&scope, demanded).write(&policy).unwrap();
    stage.world.machine.rpm_ostreed().set_engine(Engine {
        skopeo: support::tools::skopeo().unwrap(),
        policy,
        registries_d: path.join("containers/registries.d"),
        cert_dir: stage.world.registry.cert_dir(),
    });
    stage.target("2").await;
    stage.refused("SignatureRejected").await;
    assert_eq!((stage.world.drains.drains(), stage.staged()), (0, None));
}

// --- systemd and logind -----------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn finalizer_is_started_before_the_drain() {
    let stage = Stage::new().await;
    stage.world.machine.rpm_ostreed().finalizer_stays_inactive(true);
    let image = stage.target("2").await;
    stage.done(&image).await;
    let started = stage.position(|event| *event == Event::UnitStarted(FINALIZER.to_owned()));
    assert!(started < stage.position(drain_requested));
    assert_eq!(stage.boots(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_is_not_drained_while_the_finalizer_cannot_start() {
    let stage = Stage::new().await;
    stage.world.machine.rpm_ostreed().finalizer_stays_inactive(true);
    stage.world.machine.systemd().refuse_start(FINALIZER, Some("exit-code"));
    let image = stage.target("2").await;
    let reason = stage.world.wait_reason("Finalizer").await.unwrap();
    stage.until("finalizer named", || stage.world.annotation("reason").is_some_and(|r| r.contains(FINALIZER))).await;
    assert!(stage.world.drains.drains() == 0 && !stage.cordoned(), "{reason}");
    stage.world.machine.systemd().refuse_start(FINALIZER, None);
    stage.done(&image).await;
}

async fn inhibited(root_overrides: bool) {
    let stage = Stage::new().await;
    let logind = stage.world.machine.logind();
    logind.root_overrides_inhibitors(root_overrides);
    logind.add_inhibitor(Inhibitor::block("backup", "copying the database"));
    let image = stage.target("2").await;
    let reason = stage.world.wait_reason("Inhibited").await.unwrap();
    assert!(reason.contains("backup") && reason.contains("copying the database"), "{reason}");
    assert_eq!(stage.staged(), None);
    assert!(stage.world.drains.drains() == 0 && !stage.cordoned());
    logind.remove_inhibitor("backup");
    stage.done(&image).await;
    assert_eq!(stage.world.drains.drains(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_is_not_drained_while_inhibited_on_252() {
    inhibited(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_is_not_drained_while_inhibited_on_257() {
    inhibited(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inhibitor_after_the_drain_delays_the_reboot() {
    let stage = Stage::new().await;
    let logind = stage.world.machine.logind();
    let late = logind.clone();
    stage.once(attempt_recorded, move || late.add_inhibitor(Inhibitor::block("backup", "copying")));
    let image = stage.target("2").await;
    stage.world.wait_reason("Inhibited").await.unwrap();
    assert!(stage.cordoned() && stage.boots() == 0);
    logind.remove_inhibitor("backup");
    stage.done(&image).await;
    assert_eq!((stage.boots(), stage.world.drains.drains()), (1, 1));
    assert_eq!(stage.count(attempt_recorded), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_reboot_is_reported_and_retried() {
    let stage = Stage::new().await;
    let logind = stage.world.machine.logind();
    let denied = "org.freedesktop.DBus.Error.AccessDenied";
    logind.refuse_reboot(Some((denied, "Access denied due to active block inhibitor")));
    let image = stage.target("2").await;
    let reason = stage.world.wait_reason("RebootRefused").await.unwrap();
    assert!(reason.contains("systemd-inhibit --list"), "{reason}");
    assert!(stage.cordoned() && stage.boots() == 0);
    assert_eq!(stage.staged(), Some(image.digest.clone()));
    logind.refuse_reboot(None);
    stage.done(&image).await;
    assert_eq!((stage.boots(), stage.world.drains.drains()), (1, 1));
    assert_eq!(stage.count(attempt_recorded), 1, "one boot, one attempt");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_reply_to_the_reboot_call_counts_no_second_attempt() {
    let stage = Stage::with(|machine| machine.shutdown_delay = Duration::from_secs(2)).await;
    stage.world.machine.logind().lose_reboot_reply();
    let image = stage.target("2").await;
    stage.until("accepted", || stage.count(|event| *event == Event::RebootAccepted) == 1).await;
    let wall = stage.world.machine.logind().wall_message().unwrap();
    assert!(wall.1 && wall.0.contains(image.digest.get(..19).unwrap()), "{wall:?}");
    stage.done(&image).await;
    assert_eq!((stage.boots(), stage.count(attempt_recorded)), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn boot_loader_is_updated_once_before_the_reboot() {
    let stage = Stage::with(|machine| machine.bootloader_update = true).await;
    let image = stage.target("2").await;
    stage.done(&image).await;
    let updated = |event: &Event| *event == Event::UnitStarted(UPDATE.to_owned());
    assert_eq!(stage.count(updated), 1);
    assert!(stage.position(updated) < stage.position(|event| *event == Event::RebootAccepted));
    // As with the MCD, a failed boot loader update is reported and does not stop the update.
    stage.world.machine.systemd().refuse_start(UPDATE, Some("exit-code"));
    let image = stage.target("3").await;
    stage.done(&image).await;
    assert_eq!(stage.count(updated), 2);
    stage.says(&format!("{UPDATE} ended with")).await;
}

// --- the agent's own process ------------------------------------------------------------------------------------------

/// Sends SIGTERM, as an update of the agent does; the next start resumes unfinished work.
async fn terminated(choose: fn(&Event) -> bool) {
    let stage = Stage::new().await;
    let machine = stage.world.machine.clone();
    stage.once(choose, move || machine.signal_agent(Signal::SIGTERM));
    let image = stage.target("2").await;
    stage.done(&image).await;
    let first = stage.position(|event| matches!(event, Event::AgentExited { .. }));
    assert_eq!(stage.seen.lock().unwrap()[first], Event::AgentExited { code: 0 });
    assert!(first < stage.position(|event| *event == Event::RebootAccepted), "it was terminated before the reboot");
    assert_eq!((stage.boots(), stage.world.drains.drains()), (1, 1));
    // A pull and the staging; a second pull if the first one ended before the next agent could attach to it.
    assert!((2..=3).contains(&stage.count(rebase_requested)));
    assert_eq!(stage.count(attempt_recorded), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_terminated_while_verifying_resumes() {
    terminated(|event| matches!(event, Event::AgentStatus(status) if status.starts_with("Verifying"))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_terminated_while_staging_resumes() {
    terminated(importing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_terminated_while_draining_resumes() {
    terminated(drain_requested).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_terminated_before_the_reboot_resumes() {
    terminated(attempt_recorded).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchdog_accepts_long_work_and_kills_a_frozen_agent() {
    let stage = Stage::with(|machine| machine.watchdog = Some(Duration::from_secs(2))).await;
    let daemon = stage.world.machine.rpm_ostreed();
    daemon.hang_at("Importing");
    let image = stage.target("2").await;
    stage.until("hangs", || daemon.is_hanging()).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let exited = |event: &Event| matches!(event, Event::AgentExited { .. });
    assert_eq!(stage.count(exited), 0, "{:#?}", stage.said());
    stage.world.machine.signal_agent(Signal::SIGSTOP);
    stage.until("killed", || stage.count(exited) == 1).await;
    daemon.release();
    stage.done(&image).await;
    assert!(is_node_done(&stage.world.store().node(NODE).unwrap()));
    assert_eq!(annotation(&stage.world.store().node(NODE).unwrap(), "reason"), Some(""));
    // The next agent attached to the pull, or pulled again if it had ended.
    assert!((2..=3).contains(&stage.count(rebase_requested)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_stage_is_dropped_after_every_retarget() {
    let stage = Stage::new().await;
    stage.world.drains.block_drains(true);
    let images = [stage.world.signed("2").await.unwrap(), stage.world.signed("3").await.unwrap()];
    for turn in 0..5 {
        let index = turn % 2;
        stage.retarget(["2", "3"][index], &images[index]);
        stage.until(&format!("turn {turn}"), || stage.staged() == Some(images[index].digest.clone())).await;
        stage.world.wait_reason("DrainPending").await.unwrap();
    }
}
