//! The agent as a process on a machine with bootc and without rpm-ostree.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use support::events::Event;
use support::image::{ImageSpec, Pushed};
use support::machine::HostTools;
use support::mcc::{MANAGER, PREFIX};
use support::policy::{Policy, Requirement};
use support::world::{DEADLINE, NODE, REPOSITORY, World, WorldOptions};

const ATTEMPT: &str = "rebase-agent.openshift.io/attempt";

/// A world whose node is Done on the installed image, and all events from then on.
struct Stage {
    world: World,
    seen: Arc<Mutex<Vec<Event>>>,
}

impl Stage {
    async fn new() -> Self {
        let mut options = WorldOptions::new(Path::new(env!("CARGO_BIN_EXE_rebase-agent-under-test")));
        options.host_tools = HostTools::Bootc;
        let world = World::new(options).await.unwrap();
        world.target("1", &world.installed);
        world.machine.power_on().await.unwrap();
        world.wait_installed().await.unwrap();
        let seen = Arc::<Mutex<Vec<Event>>>::default();
        let to = seen.clone();
        world.events.listen(move |event| to.lock().unwrap().push(event.clone()));
        Self { world, seen }
    }

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

    fn said(&self) -> Vec<String> {
        let line = |event: &Event| match event {
            Event::AgentLine(line) => Some(line.clone()),
            _ => None,
        };
        self.seen.lock().unwrap().iter().filter_map(line).collect()
    }

    async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + DEADLINE;
        while !condition() {
            assert!(Instant::now() < end, "never: {what}; {:#?}", self.said());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn says(&self, words: &str) {
        self.until(words, || self.said().iter().any(|line| line.contains(words))).await;
    }

    /// Waits until the agent logs `then` after the last time it logged `first`.
    async fn says_after(&self, first: &str, then: &str) {
        let is_so = || {
            let said = self.said();
            let from = said.iter().rposition(|line| line.contains(first));
            from.is_some_and(|from| said.iter().skip(from).any(|line| line.contains(then)))
        };
        self.until(then, is_so).await;
    }

    fn boots(&self) -> usize {
        self.count(|event| matches!(event, Event::Booted { .. }))
    }

    fn staged(&self) -> Option<String> {
        self.world.machine.deployments().into_iter().find(|deployment| deployment.staged).map(|staged| staged.digest)
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
        assert_eq!(self.world.machine.booted().unwrap().digest, image.digest);
        assert_ne!(self.world.store().node(NODE).unwrap()["spec"]["unschedulable"], true);
        assert_eq!(self.world.store().annotation(NODE, ATTEMPT), None);
        // A status call during the switch would have waited for the agent's own lock.
        assert!(!self.world.machine.bootc().was_asked_while_locked());
    }

    async fn refused(&self, word: &str) -> String {
        let reason = match self.world.wait_reason(word).await {
            Ok(reason) => reason,
            Err(error) => panic!("{error:#}\n{:#?}", self.said()),
        };
        self.until("Degraded", || self.world.annotation("state").as_deref() == Some("Degraded")).await;
        assert_eq!(self.world.drains.drains(), 0);
        reason
    }
}

fn switched(event: &Event) -> bool {
    matches!(event, Event::TransactionRequested { method, .. } if method == "switch")
}

fn importing(event: &Event) -> bool {
    matches!(event, Event::TransactionMessage(text) if text.starts_with("Importing"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retarget_during_the_pull_stops_it() {
    let stage = Stage::new().await;
    let three = stage.world.signed("3").await.unwrap();
    stage.world.machine.bootc().hang();
    stage.target("2").await;
    stage.until("hangs", || stage.world.machine.bootc().is_hanging()).await;
    stage.retarget("3", &three);
    stage.done(&three).await;
    assert_eq!((stage.boots(), stage.count(switched)), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn obsolete_pull_of_a_killed_agent_is_stopped() {
    let stage = Stage::new().await;
    let three = stage.world.signed("3").await.unwrap();
    stage.world.machine.bootc().hang();
    stage.target("2").await;
    stage.until("hangs", || stage.world.machine.bootc().is_hanging()).await;
    stage.world.machine.kill_agent();
    stage.retarget("3", &three);
    stage.done(&three).await;
    assert_eq!((stage.boots(), stage.count(switched)), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switch_goes_on_without_the_agent() {
    let stage = Stage::new().await;
    let bootc = stage.world.machine.bootc();
    bootc.hang();
    let image = stage.target("2").await;
    stage.until("hangs", || bootc.is_hanging()).await;
    stage.world.machine.signal_agent(Signal::SIGTERM);
    stage.until("the next one waits", || stage.world.machine.systemd().merged() == 1).await;
    bootc.release();
    stage.done(&image).await;
    assert_eq!((stage.boots(), stage.count(switched)), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retarget_to_the_booted_image_ends_without_a_reboot() {
    let stage = Stage::new().await;
    stage.world.drains.block_drains(true);
    let installed = stage.world.installed.clone();
    let image = stage.target("2").await;
    stage.until("staged", || stage.staged() == Some(image.digest.clone())).await;
    stage.world.wait_reason("DrainPending").await.unwrap();
    stage.retarget("1", &installed);
    stage.world.drains.block_drains(false);
    stage.done(&installed).await;
    // bootc cannot drop the stage, so the booted image is staged over it.
    assert_eq!(stage.staged(), Some(installed.digest.clone()));
    assert_eq!((stage.boots(), stage.count(switched)), (0, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_stage_is_staged_over_once_and_then_left_alone() {
    let stage = Stage::new().await;
    let (other, installed) = (stage.world.signed("9").await.unwrap(), stage.world.installed.digest.clone());
    let bootc = stage.world.machine.bootc();
    bootc.human_switch(&other.pullspec(), false).await.unwrap();
    stage.until("staged over", || stage.staged() == Some(installed.clone())).await;
    // A manual switch right after the agent's own could hold the lock while the agent reads the status.
    stage.says_after(&format!("staged {}", stage.world.installed.pullspec()), "Done: ").await;
    bootc.human_switch(&other.pullspec(), false).await.unwrap();
    stage.says("was staged again by hand").await;
    assert!(stage.said().iter().any(|line| line.contains("drop it with `ostree admin undeploy 0`")));
    // The node was Done all the time.
    let told = |event: &Event| matches!(event, Event::NodeChanged { manager, .. } if manager == "rebase-agent");
    assert_eq!(stage.count(told), 0, "{:#?}", stage.seen.lock().unwrap());
    assert_eq!((stage.staged(), stage.count(switched)), (Some(other.digest), 3));
    stage.world.machine.sysroot().drop_staged().unwrap();
    let image = stage.target("2").await;
    stage.done(&image).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_switches_are_retried_and_the_deployments_decide() {
    let stage = Stage::new().await;
    // The pull and the first switch: where only pulling fails, the switch pulls.
    stage.world.machine.bootc().fail_next();
    stage.world.machine.bootc().fail_next();
    stage.world.machine.bootc().fail_after_staging();
    let image = stage.target("2").await;
    let reason = stage.world.wait_reason("StageFailed").await.unwrap();
    assert!(reason.contains("journalctl -u 'rebase-agent-bootc@"), "{reason}");
    // `systemctl status` shows the unit's name unescaped, so that it can be pasted.
    let told = || {
        stage
            .world
            .machine
            .systemd()
            .unit("rebase-agent.service")
            .is_some_and(|unit| unit.status_text.contains(r"\x40sha256:") && !unit.status_text.contains(r"\\x40"))
    };
    stage.until("StatusText has the unit's name", told).await;
    stage.done(&image).await;
    stage.says("the image is staged nevertheless").await;
    assert_eq!((stage.boots(), stage.count(switched)), (1, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layered_host_is_refused_without_a_drain() {
    let stage = Stage::new().await;
    stage.world.machine.sysroot().layer_packages(&["vim"]).unwrap();
    stage.target("2").await;
    let reason = stage.refused("LayeredPackages").await;
    assert!(reason.contains("silently drop them"), "{reason}");
    assert_eq!(stage.count(switched), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_kernel_arguments_are_named_and_refused_without_a_drain() {
    let stage = Stage::new().await;
    let push = async |version: &str, argument: &str| {
        let config = format!("rendered-worker-{version}");
        let spec = ImageSpec::new(version).rendered_config(&config).kernel_arguments([argument]);
        let image = stage.world.registry.push(REPOSITORY, version, &spec).await.unwrap();
        stage.world.sign(&image, version).await.unwrap();
        image
    };
    let missing = push("2", "nosmt").await;
    stage.world.target("2", &missing);
    let reason = stage.refused("KernelArgumentsUnsupported").await;
    assert!(reason.contains("bring `nosmt`") && reason.contains("/usr/lib/bootc/kargs.d"), "{reason}");
    // Arguments that the host has already are inherited.
    let there = push("3", "console=ttyS0").await;
    stage.world.target("3", &there);
    stage.retarget("3", &there);
    stage.done(&there).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_sysroot_lock_is_awaited() {
    let stage = Stage::new().await;
    stage.world.machine.sysroot().set_locked(true);
    let image = stage.target("2").await;
    let reason = stage.world.wait_reason("ForeignTransaction").await.unwrap();
    assert!(reason.contains("sysroot lock"), "{reason}");
    assert_eq!(stage.count(switched), 0);
    stage.world.machine.sysroot().set_locked(false);
    stage.done(&image).await;
}

async fn power_fails(choose: fn(&Event) -> bool) {
    let stage = Stage::new().await;
    let plug = stage.world.machine.clone();
    stage.once(choose, move || plug.power_cut());
    let image = stage.target("2").await;
    stage.until("dark", || stage.count(|event| *event == Event::Down) == 1).await;
    stage.world.machine.power_on().await.unwrap();
    assert_eq!(stage.world.machine.booted().unwrap().digest, stage.world.installed.digest);
    stage.done(&image).await;
    assert_eq!(stage.boots(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_fails_while_importing() {
    power_fails(importing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_fails_after_staging() {
    power_fails(|event| matches!(event, Event::Staged { .. })).await;
}

/// The policy of a hardened fleet: reject by default, and signed origins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reject_by_default_policy_gives_signed_origins() {
    let stage = Stage::new().await;
    let scope = format!("{}/example", stage.world.registry.host());
    let demanded = [Requirement::sigstore_key_path(&stage.world.path().join("os.pub"))];
    let policy = Policy::reject_by_default().scope(&scope, demanded);
    policy.write(&stage.world.path().join("containers/policy.json")).unwrap();
    let image = stage.target("2").await;
    stage.done(&image).await;
    let booted = stage.world.machine.booted().unwrap();
    assert_eq!(booted.reference, format!("ostree-image-signed:docker://{}", image.pullspec()));
    let signed = |unit: &String| unit.starts_with("rebase-agent-bootc-signed@");
    assert_eq!(stage.world.machine.systemd().started().iter().filter(|unit| signed(unit)).count(), 1);
}
