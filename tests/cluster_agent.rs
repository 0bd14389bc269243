//! The agent in a complete world: the API server, its controllers and operators act on a node during an update.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]
#![allow(clippy::disallowed_methods, reason = "tests may make calls that the agent must not")]

#[path = "cluster_agent/shown.rs"]
mod shown;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use support::apiserver::{Fault, RequestRecord, Scope};
use support::events::Event;
use support::image::Pushed;
use support::mcc::{PREFIX, PoolController, PoolSpec, annotation, is_node_done};
use support::pki::{Pki, rotate_client_pem, write_kubeconfig};
use support::policy::Policy;
use support::sign::{self, KeyKind, Signer};
use support::world::{DEADLINE, NODE, World, WorldOptions};

const HOLD: &str = "rebase-agent.openshift.io/hold";
const VERIFIED: &str = "rebase-agent.openshift.io/verified";
const RETRY: &str = "rebase-agent.openshift.io/retry";
const MCD: &str = "machine-config-daemon";

fn options() -> WorldOptions {
    WorldOptions::new(Path::new(env!("CARGO_BIN_EXE_rebase-agent-under-test")))
}

/// A world whose node is up and Done on the installed image.
async fn settled(options: WorldOptions) -> World {
    let world = World::new(options).await.unwrap();
    world.target("1", &world.installed);
    world.machine.power_on().await.unwrap();
    world.wait_installed().await.unwrap();
    world
}

fn is_node(request: &RequestRecord) -> bool {
    request.path_and_query.starts_with("/api/v1/nodes")
}

/// The patches of the Node.
fn writes(world: &World) -> Vec<RequestRecord> {
    world.api.requests().into_iter().filter(|request| request.method == "PATCH" && is_node(request)).collect()
}

fn desired_drain(event: &Event, prefix: &str) -> bool {
    wrote(event, "desiredDrain", prefix)
}

fn wrote(event: &Event, key: &str, prefix: &str) -> bool {
    let Event::NodeChanged { changes, .. } = event else { return false };
    let value = changes.get(&format!("{PREFIX}{key}")).and_then(Option::as_deref);
    value.is_some_and(|value| value.starts_with(prefix))
}

/// Waits for `event`, from now on.
async fn happens(world: &World, what: &str, event: impl Fn(&Event) -> bool) {
    let mut queue = world.events.subscribe();
    World::wait_event(&mut queue, what, |seen| event(seen).then_some(())).await.unwrap();
}

/// Checks that the node is Done on `image`, booted, schedulable, and that no drain is open.
async fn arrived(world: &World, image: &Pushed) {
    world.wait_done(image).await.unwrap();
    let node = world.store().node(NODE).unwrap();
    assert_eq!(world.machine.booted().unwrap().digest, image.digest);
    assert_ne!(node["spec"]["unschedulable"], true);
    assert_eq!(annotation(&node, "desiredDrain"), annotation(&node, "lastAppliedDrain"));
}

/// The server's time stamps have whole seconds: waits until they are later than the agent's latest write.
async fn next_second(world: &World) {
    let stamp = |manager: &str| {
        let node = world.store().node(NODE).unwrap();
        let fields = node["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
        let times =
            fields.iter().filter(|entry| entry["manager"] == manager).filter_map(|entry| entry["time"].as_str());
        times.max().map(str::to_owned)
    };
    let ours = stamp("rebase-agent");
    assert!(ours.is_some());
    let later = async {
        for tick in 0_u32.. {
            world.store().annotate("clock", NODE, "test.example/tick", Some(&tick.to_string())).unwrap();
            if stamp("clock") > ours {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, later).await.unwrap();
}

#[tokio::test]
async fn few_requests_and_at_most_eight_writes_in_an_update() {
    let world = settled(options()).await;
    let (requests, patches) = (world.api.requests().len(), writes(&world).len());
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
    let requests = world.api.requests().len() - requests;
    let patches = &writes(&world)[patches..];
    for patch in patches {
        eprintln!("{} {}", patch.status, patch.body);
    }
    eprintln!("{requests} requests, {} of them writes", patches.len());
    assert!(patches.len() <= 8, "{patches:#?}");
    assert!(patches.iter().all(|patch| patch.status == 200));

    // Heartbeats cause no requests.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = world.api.requests().len();
    for _ in 0..300 {
        world.store().heartbeat(NODE);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(&world.api.requests()[before..], []);
}

#[tokio::test]
async fn agent_starts_without_an_api_server_and_waits_for_it() {
    let world = World::new(options()).await.unwrap();
    world.target("1", &world.installed);
    world.api.stop().await;
    let mut queue = world.events.subscribe();
    world.machine.power_on().await.unwrap();
    let ready = |event: &Event| matches!(event, Event::AgentReady).then_some(());
    World::wait_event(&mut queue, "READY=1 without a cluster", ready).await.unwrap();
    world.api.restart().await;
    world.wait_done(&world.installed).await.unwrap();
}

#[tokio::test]
async fn credentials_rotated_in_the_middle_of_an_update() {
    let world = settled(options()).await;
    let two = world.signed("2").await.unwrap();
    world.drains.block_drains(true);
    world.target("2", &two);
    world
        .wait("the drain request", |node| annotation(node, "desiredDrain") == Some("drain-rendered-worker-2"))
        .await
        .unwrap();
    // Both sides get another authority, and every connection is closed.
    let new = Pki::new();
    world.api.rotate(&new).unwrap();
    world.api.stop().await;
    let kubelet = world.path().join("kubelet");
    let pem = rotate_client_pem(&kubelet.join("pki"), &new.kubelet_pem(NODE));
    write_kubeconfig(&kubelet.join("kubeconfig"), &world.api.url(), &new.ca_pem(), &pem);
    world.api.restart().await;
    world.drains.block_drains(false);
    arrived(&world, &two).await;
}

#[tokio::test]
async fn poll_notices_changes_while_watches_are_frozen() {
    let mut options = options();
    options.env.push(("REBASE_AGENT_POLL".to_owned(), "5".to_owned()));
    let world = settled(options).await;
    world.store().freeze_watches(true);
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    world
        .wait("the drain request", |node| annotation(node, "desiredDrain") == Some("drain-rendered-worker-2"))
        .await
        .unwrap();
    world
        .wait("the uncordon", |node| annotation(node, "desiredDrain") == Some("uncordon-rendered-worker-2"))
        .await
        .unwrap();
    arrived(&world, &two).await;
}

#[tokio::test]
async fn writes_of_the_mcd_stop_the_agent() {
    let world = settled(options()).await;
    let two = world.signed("2").await.unwrap();
    world.store().annotate("kubectl-annotate", NODE, HOLD, Some("for the test")).unwrap();
    world.target("2", &two);
    world.wait_reason("Held").await.unwrap();
    next_second(&world).await;
    let aside = happens(
        &world,
        "standing aside",
        |event| matches!(event, Event::AgentStatus(s) if s.starts_with("OtherDaemon")),
    );
    let done = json!({"metadata": {"annotations": {
        format!("{PREFIX}state"): "Done", format!("{PREFIX}reason"): "", format!("{PREFIX}currentConfig"): "rendered-worker-1",
    }}});
    tokio::join!(aside, async { world.store().patch_as(MCD, NODE, done).unwrap() });
    let (before, boot) = (writes(&world).len(), world.machine.boot_id());
    world.store().annotate("kubectl-annotate", NODE, HOLD, None).unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(writes(&world).len(), before, "{:#?}", writes(&world));
    assert_eq!((world.machine.boot_id(), world.drains.drains()), (boot, 0));
}

#[tokio::test]
async fn single_replica_is_not_drained_and_is_uncordoned() {
    let world = settled(WorldOptions { topology: "SingleReplica".to_owned(), ..options() }).await;
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
    assert_eq!(world.drains.drains(), 0);
    let acknowledged = world.annotation("lastAppliedDrain");
    assert_eq!(acknowledged.as_deref(), Some("uncordon-rendered-worker-2"));
}

#[tokio::test]
async fn node_cordoned_by_an_admin_is_updated_only_when_already_chosen() {
    let world = settled(options()).await;
    let two = world.signed("2").await.unwrap();
    world.store().set_unschedulable(NODE, true);
    let before = writes(&world).len();
    world.target("2", &two);
    world.pool.settle().await;
    assert_ne!(world.annotation("desiredImage").unwrap(), two.pullspec().as_str(), "MCC does not choose it");
    assert_eq!(writes(&world).len(), before);
    world.store().set_unschedulable(NODE, false);
    world.store().annotate("kubectl-annotate", NODE, HOLD, Some("until cordoned")).unwrap();
    world.wait_reason("Held").await.unwrap();
    // Cordoned after MCC chose it: the node is drained anyway.
    world.store().set_unschedulable(NODE, true);
    world.store().annotate("kubectl-annotate", NODE, HOLD, None).unwrap();
    arrived(&world, &two).await;
    assert_eq!(world.drains.drains(), 1);
}

#[tokio::test]
async fn node_uncordoned_after_the_drain_is_drained_again() {
    let world = settled(options()).await;
    let two = world.signed("2").await.unwrap();
    // Uncordons the node when the drain is acknowledged, before the agent reads it.
    let (meddled, store) = (Arc::new(AtomicBool::new(false)), world.store());
    let runtime = tokio::runtime::Handle::current();
    let (once, drains) = (meddled.clone(), world.store());
    world.events.listen(move |event| {
        if wrote(event, "lastAppliedDrain", "drain-") && !once.swap(true, Ordering::SeqCst) {
            let store = drains.clone();
            // Delays the agent's next read until after the uncordon.
            store.inject(Scope::Read, 1, Fault::Delay(Duration::from_millis(300)));
            // Listeners must not write.
            runtime.spawn_blocking(move || store.set_unschedulable(NODE, false));
        }
    });
    let rebooted = Arc::new(AtomicBool::new(false));
    let (seen, at_reboot) = (rebooted.clone(), store.clone());
    world.events.listen(move |event| {
        if matches!(event, Event::RebootAccepted) {
            let node = at_reboot.node(NODE).unwrap();
            seen.store(node["spec"]["unschedulable"] == true, Ordering::SeqCst);
        }
    });
    let again = happens(&world, "the uncordon for good", |event| desired_drain(event, "uncordon-rendered-worker-2"));
    tokio::join!(again, async { world.target("2", &two) });
    arrived(&world, &two).await;
    assert!(meddled.load(Ordering::SeqCst));
    assert!(rebooted.load(Ordering::SeqCst), "cordoned when the reboot was accepted");
    assert!(world.drains.drains() >= 2, "{} drains", world.drains.drains());
}

#[tokio::test]
async fn retarget_while_draining_boots_only_the_new_target() {
    let world = settled(options()).await;
    let (two, three) = (world.signed("2").await.unwrap(), world.signed("3").await.unwrap());
    let boot = world.machine.boot_id();
    world.drains.block_drains(true);
    world.target("2", &two);
    world
        .wait("the drain request", |node| annotation(node, "desiredDrain") == Some("drain-rendered-worker-2"))
        .await
        .unwrap();
    // MCC would wait for the node; an operator who sets the annotations by hand does not.
    let wanted = json!({"metadata": {"annotations": {
        format!("{PREFIX}desiredConfig"): "rendered-worker-3", format!("{PREFIX}desiredImage"): three.pullspec().as_str(),
    }}});
    let boots = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = boots.clone();
    world.events.listen(move |event| {
        if let Event::Booted { reference, .. } = event {
            seen.lock().unwrap().push(reference.clone());
        }
    });
    world.target("3", &three);
    world.store().patch_as("machine-config-controller", NODE, wanted).unwrap();
    world.drains.block_drains(false);
    arrived(&world, &three).await;
    assert_ne!(world.machine.boot_id(), boot);
    let boots = boots.lock().unwrap();
    assert!(boots.len() == 1 && boots[0].contains(&three.digest), "{boots:?}");
}

#[tokio::test]
async fn node_of_a_paused_pool_is_left_alone() {
    let world = settled(options()).await;
    let two = world.signed("2").await.unwrap();
    world.pool.pause(true);
    let before = writes(&world).len();
    world.target("2", &two);
    world.pool.settle().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(writes(&world).len(), before);
    assert!(world.store().node(NODE).is_some_and(|node: Value| is_node_done(&node)));
    world.pool.pause(false);
    arrived(&world, &two).await;
}

#[tokio::test]
async fn restored_database_is_followed() {
    let mut options = options();
    // An idle node comes back within this time.
    options.env.push(("REBASE_AGENT_POLL".to_owned(), "5".to_owned()));
    let world = settled(options).await;
    let backup = world.store().backup();
    for _ in 0..500 {
        world.store().heartbeat(NODE);
    }
    // Long enough for the agent to receive all of them.
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.store().restore(&backup);
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
}

#[tokio::test]
async fn drained_node_is_uncordoned_once_for_the_mcd() {
    let world = settled(options()).await;
    let two = world.signed("2").await.unwrap();
    world.drains.block_drains(true);
    world.target("2", &two);
    world.wait_reason("DrainPending").await.unwrap();
    next_second(&world).await;
    let before = writes(&world).len();
    world.store().annotate(MCD, NODE, &format!("{PREFIX}state"), Some("Done")).unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    // The node is uncordoned once, and the message keeps its cause.
    let [given_back] = &writes(&world)[before..] else { panic!("{:#?}", &writes(&world)[before..]) };
    assert!(given_back.body.contains("\"uncordon-rendered-worker-2\"") && !given_back.body.contains("state"));
    assert_eq!(world.annotation("lastAppliedDrain").as_deref(), Some("uncordon-rendered-worker-2"));
    assert_eq!(world.annotation("state").as_deref(), Some("Done"), "the state that the MCD wrote is kept");
}

#[tokio::test]
async fn lost_replies_and_a_busy_server_only_delay_the_update() {
    let world = settled(options()).await;
    let before = writes(&world).len();
    let two = world.signed("2").await.unwrap();
    let busy = Fault::Status { code: 429, retry_after: Some(1) };
    for fault in [Fault::Lost, busy.clone(), Fault::Cut] {
        world.store().inject(Scope::Write, 1, fault);
    }
    world.store().inject(Scope::Read, 2, busy);
    world.target("2", &two);
    arrived(&world, &two).await;
    let writes = writes(&world).len() - before;
    assert!(writes <= 8 + 3, "{writes} writes");
    assert_eq!(world.drains.drains(), 1);
}

/// One request, then silence for as long as the server asks. Without a drain only the full read before the reboot is
/// left.
#[tokio::test]
async fn full_read_refused_with_retry_after_is_not_repeated() {
    let world = settled(WorldOptions { topology: "SingleReplica".to_owned(), ..options() }).await;
    let two = world.signed("2").await.unwrap();
    let reads = |world: &World| {
        let read = |request: &&RequestRecord| request.method == "GET" && !request.is_watch() && is_node(request);
        world.api.requests().iter().filter(read).count()
    };
    let before = reads(&world);
    world.store().inject(Scope::Read, usize::MAX, Fault::Status { code: 429, retry_after: Some(30) });
    world.target("2", &two);
    let mut refused = world.events.subscribe();
    World::wait_event(&mut refused, "the attempt", |event| wrote_attempt(event).then_some(())).await.unwrap();
    let more = async {
        while reads(&world) - before <= 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let third = tokio::time::timeout(Duration::from_secs(10), more).await;
    let asked = reads(&world) - before;
    eprintln!("{asked} requests in 10 s under 429");
    assert!(third.is_err() && asked >= 1, "{asked} requests in 10 s");
    world.store().clear_faults();
    arrived(&world, &two).await;
}

fn wrote_attempt(event: &Event) -> bool {
    let Event::NodeChanged { changes, .. } = event else { return false };
    changes.get("rebase-agent.openshift.io/attempt").is_some_and(Option::is_some)
}

#[tokio::test]
async fn new_retry_annotation_verifies_a_refused_image_at_once() {
    let world = settled(options()).await;
    let two = world.unsigned("2").await.unwrap();
    let (identity, foreign) = (format!("{}:2", two.repository()), Signer::generate(KeyKind::P256));
    sign::sign(&world.registry, &two.digest, &two.repo, &identity, &foreign).await.unwrap();
    world.target("2", &two);
    world.wait_reason("SignatureRejected").await.unwrap();
    // Without the annotation, a refused image is verified again after ten minutes.
    sign::unsign(&world.registry, &two.digest, &two.repo).await.unwrap();
    world.sign(&two, "2").await.unwrap();
    world.store().annotate("kubectl-annotate", NODE, RETRY, Some("signed it")).unwrap();
    arrived(&world, &two).await;
}

/// Two failed PATCHes delay the third by 2 s or more; a successful read sends it at once.
#[tokio::test]
async fn successful_read_retries_a_failed_patch() {
    let world = settled(options()).await;
    let two = world.signed("2").await.unwrap();
    world.store().inject(Scope::Write, 6, Fault::Status { code: 503, retry_after: None });
    world.target("2", &two);
    let failing = async {
        while world.api.requests().iter().filter(|request| request.status == 503).count() < 5 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(90), failing).await.unwrap();
    // The fifth failure delays the next PATCH by 16 s or more.
    world.store().clear_faults();
    let began = std::time::Instant::now();
    world.store().end_watches();
    world.wait("a PATCH", |node| annotation(node, "state") == Some("Working")).await.unwrap();
    eprintln!("{:?} from the end of the watch to the PATCH", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    arrived(&world, &two).await;
}

/// systemd needs a watchdog ping twice per limit, not one per event.
#[tokio::test]
async fn ten_thousand_events_send_a_handful_of_datagrams() {
    let world =
        settled(WorldOptions { machine: |options| options.watchdog = Some(Duration::from_secs(4)), ..options() }).await;
    let before = world.machine.pings();
    let began = std::time::Instant::now();
    for _ in 0..10_000 {
        world.store().heartbeat(NODE);
        tokio::task::yield_now().await;
    }
    // The agent has received all events when it reacts to this one.
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
    let (pings, seconds) = (world.machine.pings() - before, began.elapsed().as_secs());
    eprintln!("{pings} WATCHDOG datagrams in {seconds} s with 10,000 events");
    // One ping every 2 s, and one when the agent starts after the reboot.
    assert!(pings <= seconds / 2 + 3, "{pings} datagrams in {seconds} s");
}

/// A server whose clock is 16 min behind stamps a current write as 16 min old.
#[tokio::test]
async fn silence_of_the_mcd_is_measured_by_the_servers_clock() {
    let world = World::new(options()).await.unwrap();
    world.store().set_clock(-16 * 60);
    world.target("1", &world.installed);
    world.machine.power_on().await.unwrap();
    world.wait_done(&world.installed).await.unwrap();
    next_second(&world).await;
    let aside = happens(
        &world,
        "standing aside",
        |event| matches!(event, Event::AgentStatus(s) if s.starts_with("OtherDaemon")),
    );
    let patch = json!({"metadata": {"annotations": { format!("{PREFIX}state"): "Working" }}});
    tokio::join!(aside, async { world.store().patch_as(MCD, NODE, patch).unwrap() });
}

#[tokio::test]
async fn recreated_node_is_published_again() {
    let world = settled(options()).await;
    let uid = world.store().node(NODE).unwrap()["metadata"]["uid"].clone();
    world.store().delete_node(NODE);
    tokio::time::sleep(Duration::from_millis(500)).await;
    world.store().create_node(NODE, &[]);
    world.wait_done(&world.installed).await.unwrap();
    // MCC uses this annotation to find the custom pool that the node was booted into.
    assert_eq!(world.annotation("firstPivotConfig").as_deref(), Some("rendered-worker-1"));
    assert_ne!(world.store().node(NODE).unwrap()["metadata"]["uid"], uid);
    shown::shows_done(&world, "1").await;
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
}

/// MCC finds the custom pool of a node by the first-boot annotations that the agent publishes.
#[tokio::test]
async fn node_booted_into_a_custom_pool_joins_it() {
    let world = World::new(WorldOptions { pool: "infra".to_owned(), ..options() }).await.unwrap();
    let told = Arc::new(AtomicBool::new(false));
    let seen = told.clone();
    world.events.listen(move |event| {
        if wrote(event, "desiredConfig", "rendered-worker-") {
            seen.store(true, Ordering::SeqCst);
        }
    });
    world.machine.power_on().await.unwrap();
    // A real node is not Ready earlier, so no pool targets it before.
    world.wait("the first boot's annotations", |node| annotation(node, "currentConfig").is_some()).await.unwrap();
    let two = world.signed("2").await.unwrap();
    let workers = PoolSpec { custom: vec!["infra".to_owned()], ..PoolSpec::worker(&[NODE]) };
    let workers = PoolController::start(world.store(), workers);
    workers.set_target("rendered-worker-2", two.pullspec().as_str());
    let is_labelled = |node: &Value| node["metadata"]["labels"]["node-role.kubernetes.io/infra"] == "";
    world.wait("the custom pool's label", is_labelled).await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
    assert_eq!(world.annotation("currentConfig").as_deref(), Some("rendered-infra-2"));
    assert!(!told.load(Ordering::SeqCst), "the pool worker targeted the node");
}

/// A verdict under an old policy does not count, even when it was requested before the change.
#[tokio::test]
async fn policy_change_ends_a_running_verification() {
    let tools = tempfile::tempdir().unwrap();
    let (gate, engine) = (tools.path().join("gate"), tools.path().join("skopeo"));
    let real = support::tools::skopeo().unwrap().display().to_string();
    let waits = format!(
        "case $1 in --version) exec {real} --version;; esac\nuntil [ -e {} ]; do sleep 0.1; done",
        gate.display()
    );
    std::fs::write(&engine, format!("#!/bin/sh\n{waits}\nexec {real} \"$@\"\n")).unwrap();
    std::fs::set_permissions(&engine, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(&gate, "").unwrap();

    let world = settled(WorldOptions { agent_skopeo: Some(engine), ..options() }).await;
    std::fs::remove_file(&gate).unwrap();
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    world.wait_reason("Verifying").await.unwrap();
    Policy::reject_by_default().write(&world.path().join("containers/policy.json")).unwrap();
    // The engine still waits, so this reason comes from the new policy.
    world.wait_reason("PolicyRejects").await.unwrap();
    std::fs::write(&gate, "").unwrap();
    let three = world.unsigned("3").await.unwrap();
    world.target("3", &three);
    // The answer for image 3 comes after all output of the first engine.
    let short = &three.digest[..19];
    let rejected = |reason: &str| reason.starts_with("PolicyRejects") && reason.contains(short);
    world.wait("an answer for image 3", |node| annotation(node, "reason").is_some_and(rejected)).await.unwrap();
    assert!(world.machine.deployments().iter().all(|d| !d.staged), "an image was staged under the old policy");
}
