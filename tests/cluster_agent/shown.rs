//! What a cluster sees of an update: the MachineConfigNode, Events, and who vouched for the image.

use support::apiserver::Crd;
use support::machine::MachineOptions;
use support::mcc::Delays;

use super::*;

/// Slow enough that no write of the drain controller meets one of the agent's, as with the original's five seconds.
fn unhurried() -> Delays {
    Delays { enqueue: Duration::from_millis(800), evict: Duration::from_millis(800), ..Delays::short() }
}

fn condition<'a>(mcn: &'a Value, kind: &str) -> Option<&'a Value> {
    mcn["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)
}

fn status(mcn: &Value, kind: &str) -> String {
    condition(mcn, kind).and_then(|it| it["status"].as_str()).unwrap_or("").to_owned()
}

/// The requests for MachineConfigNodes by this method.
fn mcn_requests(world: &World, method: &str) -> Vec<RequestRecord> {
    let of =
        |request: &RequestRecord| request.path_and_query.contains("/machineconfignodes/") && request.method == method;
    world.api.requests().into_iter().filter(of).collect()
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("{what} did not happen"));
}

/// Waits until the MachineConfigNode shows `kind` with this status.
async fn shows(world: &World, kind: &str, expected: &str) -> Value {
    let shown = || world.store().mcn(NODE).is_some_and(|mcn| status(&mcn, kind) == expected);
    until(&format!("{kind}={expected} in {:#?}", world.store().mcn(NODE)), shown).await;
    world.store().mcn(NODE).unwrap()
}

/// Waits until the MachineConfigNode says that the node runs the image of `version`, as MCC counts it.
pub(super) async fn shows_done(world: &World, version: &str) -> Value {
    let config = format!("rendered-worker-{version}");
    let counted = || {
        world.store().mcn(NODE).is_some_and(|mcn| {
            status(&mcn, "Updated") == "True"
                && status(&mcn, "NodeDegraded") == "False"
                && mcn["status"]["configVersion"] == json!({"current": config, "desired": config})
        })
    };
    until(&format!("the end of the update in {:#?}", world.store().mcn(NODE)), counted).await;
    world.store().mcn(NODE).unwrap()
}

/// The lines of the agent's journal with these words.
fn journal(world: &World, words: &'static str) -> Arc<std::sync::Mutex<Vec<String>>> {
    let lines = Arc::<std::sync::Mutex<Vec<String>>>::default();
    let seen = lines.clone();
    world.events.listen(move |event| {
        if let Event::AgentLine(line) = event
            && line.contains(words)
        {
            seen.lock().unwrap().push(line.clone());
        }
    });
    lines
}

/// One line per state, as `kubectl get machineconfignodes -w` prints them.
fn transcript(states: &[Value]) -> String {
    const COLUMNS: [(&str, &str); 10] = [
        ("UPDATED", "Updated"),
        ("PREPARED", "UpdatePrepared"),
        ("EXECUTED", "UpdateExecuted"),
        ("APPLIED", "AppliedFilesAndOS"),
        ("CORDONED", "Cordoned"),
        ("DRAINED", "Drained"),
        ("REBOOTED", "RebootedNode"),
        ("RESUMED", "Resumed"),
        ("UNCORDONED", "Uncordoned"),
        ("COMPLETE", "UpdateComplete"),
    ];
    let row = |current: &str, values: [String; 10]| {
        let cells = COLUMNS.iter().zip(values).map(|((title, _), value)| format!("{value:0$}", title.len() + 2));
        format!("{current:19}{}", cells.collect::<String>()).trim_end().to_owned()
    };
    let mut lines = vec![row("CURRENTCONFIG", COLUMNS.map(|(title, _)| title.to_owned()))];
    for state in states {
        let current = state["status"]["configVersion"]["current"].as_str().unwrap_or_default();
        let line = row(current, COLUMNS.map(|(_, kind)| status(state, kind)));
        if lines.last() != Some(&line) {
            lines.push(line);
        }
    }
    lines.join("\n") + "\n"
}

#[tokio::test]
async fn transcript_of_an_update() {
    // The kubelet is slow too, so that the boot shows before the uncordon.
    let machine = |machine: &mut MachineOptions| machine.kubelet_delay = Duration::from_millis(1500);
    let world = settled(WorldOptions { delays: unhurried(), machine, ..options() }).await;
    shows_done(&world, "1").await;
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
    shows_done(&world, "2").await;
    // The second update also shows whether anything is left of the first.
    let before = world.store().mcn_history(NODE).len() - 1;
    let count = || (mcn_requests(&world, "GET").len(), mcn_requests(&world, "PATCH").len());
    let (reads, writes) = count();
    let three = world.signed("3").await.unwrap();
    world.target("3", &three);
    arrived(&world, &three).await;
    shows_done(&world, "3").await;
    let (reads, writes) = (count().0 - reads, count().1 - writes);
    eprintln!("{reads} reads and {writes} writes of the MachineConfigNode");
    assert!(writes <= 7 && reads <= writes + 2, "{reads} reads, {writes} writes");
    let transcript = transcript(&world.store().mcn_history(NODE)[before..]);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster_agent/machineconfignodes.txt");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&file, &transcript).unwrap();
    }
    assert_eq!(transcript, std::fs::read_to_string(&file).unwrap());
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let shown: String = transcript.lines().map(|line| format!("    {line}\n")).collect();
    assert!(readme.contains(&shown), "README.md has another transcript than {}", file.display());
    let patches = mcn_requests(&world, "PATCH");
    // The first write asks whether the CRD has the feature gate's field, because a new object does not show it.
    let refused: Vec<_> = patches.iter().filter(|patch| patch.status != 200).map(|patch| patch.status).collect();
    assert_eq!(refused, [500], "{patches:#?}");
    assert!(patches.iter().all(|patch| !patch.body.contains("observedGeneration")));
    let path = format!(
        "/apis/machineconfiguration.openshift.io/v1/machineconfignodes/{NODE}/status?fieldManager=rebase-agent&force=true"
    );
    assert!(patches.iter().all(|patch| patch.path_and_query == path));
}

#[tokio::test]
async fn the_feature_gate_counts_the_node_by_its_images() {
    let world = settled(WorldOptions { mcns: (Crd::ImageMode, true), delays: unhurried(), ..options() }).await;
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
    let mcn = shows_done(&world, "2").await;
    let pullspec = two.pullspec();
    assert_eq!(
        mcn["status"]["configImage"],
        json!({"currentImage": pullspec.as_str(), "desiredImage": pullspec.as_str()})
    );
    assert_eq!(status(&mcn, "AppliedFilesAndOS"), "", "a condition of clusters without the gate");
    let history = world.store().mcn_history(NODE);
    for kind in ["AppliedFiles", "AppliedOSImage", "ImagePulledFromRegistry"] {
        let seen: Vec<_> = history.iter().map(|state| status(state, kind)).collect();
        let order = ["Unknown", "True", "False"].map(|status| seen.iter().rposition(|it| it == status).unwrap());
        assert!(order.is_sorted(), "{kind}: {seen:?}");
    }
}

#[tokio::test]
async fn a_refusal_is_shown_with_its_sentence() {
    let world = settled(options()).await;
    let two = world.unsigned("2").await.unwrap();
    world.target("2", &two);
    let mcn = shows(&world, "NodeDegraded", "True").await;
    let degraded = condition(&mcn, "NodeDegraded").unwrap();
    assert_eq!(degraded["reason"], "SignatureMissing");
    assert!(degraded["message"].as_str().unwrap().starts_with("SignatureMissing: "), "{degraded}");
    assert_eq!(status(&mcn, "Updated"), "False");
    world.sign(&two, "2").await.unwrap();
    world.store().annotate("kubectl-annotate", NODE, RETRY, Some("signed")).unwrap();
    arrived(&world, &two).await;
    shows_done(&world, "2").await;
}

#[tokio::test]
async fn a_restarted_agent_reads_it_once_and_repeats_nothing() {
    let world = settled(WorldOptions { delays: unhurried(), ..options() }).await;
    let two = world.signed("2").await.unwrap();
    world.store().annotate("kubectl-annotate", NODE, HOLD, Some("for the test")).unwrap();
    world.target("2", &two);
    world.wait_reason("Held").await.unwrap();
    shows(&world, "AppliedFilesAndOS", "Unknown").await;
    let (reads, writes) = (mcn_requests(&world, "GET").len(), mcn_requests(&world, "PATCH").len());
    world.machine.stop_agent().await;
    let held = happens(&world, "the hold", |event| matches!(event, Event::AgentStatus(s) if s.starts_with("Held")));
    tokio::join!(held, async { world.machine.start_agent() });
    until("the reads", || mcn_requests(&world, "GET").len() >= reads + 2).await;
    // A new process verifies the image again, and then finds it pulled: it compares what it would write.
    assert_eq!(mcn_requests(&world, "PATCH").len(), writes, "{:#?}", mcn_requests(&world, "PATCH"));
    for _ in 0..200 {
        world.store().heartbeat(NODE);
    }
    world.store().annotate("kubectl-annotate", NODE, HOLD, None).unwrap();
    arrived(&world, &two).await;
    shows_done(&world, "2").await;
}

#[tokio::test]
async fn a_missing_crd_is_said_once_and_stops_nothing() {
    let world = World::new(WorldOptions { mcns: (Crd::Absent, true), ..options() }).await.unwrap();
    let said = journal(&world, "no MachineConfigNode for this node");
    world.target("1", &world.installed);
    world.machine.power_on().await.unwrap();
    world.wait_done(&world.installed).await.unwrap();
    until("the sentence", || said.lock().unwrap().len() == 1).await;
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
    // Once by each of the two processes, which are before and after the reboot.
    assert!(said.lock().unwrap().len() <= 2, "{:#?}", said.lock().unwrap());
    let asked = mcn_requests(&world, "GET").len();
    assert!(asked <= 3, "{asked} requests for an object that does not exist");
}

#[tokio::test]
async fn missing_rights_are_said_once_and_tried_again_for_the_next_image() {
    let world = World::new(WorldOptions { mcns: (Crd::Default, false), ..options() }).await.unwrap();
    let said = journal(&world, "the MachineConfigNode is not written");
    world.target("1", &world.installed);
    world.machine.power_on().await.unwrap();
    world.wait_done(&world.installed).await.unwrap();
    until("the sentence", || said.lock().unwrap().len() == 1).await;
    assert!(said.lock().unwrap()[0].contains("systemd/cluster"), "{:?}", said.lock().unwrap());
    let asked = mcn_requests(&world, "GET").len();
    for _ in 0..300 {
        world.store().heartbeat(NODE);
    }
    world.store().set_mcns(Crd::Default, true);
    let two = world.signed("2").await.unwrap();
    let before = mcn_requests(&world, "GET").len();
    assert_eq!(before, asked, "a refused request is not repeated");
    world.target("2", &two);
    arrived(&world, &two).await;
    shows_done(&world, "2").await;
    assert_eq!(said.lock().unwrap().len(), 1);
}

/// The annotations do not wait for an API server that answers nothing about MachineConfigNodes.
#[tokio::test]
async fn hanging_answers_delay_nothing() {
    let world = settled(options()).await;
    shows_done(&world, "1").await;
    world.store().inject(Scope::Mcn, usize::MAX, Fault::Hang);
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
    world.store().clear_faults();
    shows_done(&world, "2").await;
}

/// Type and reason of the Events, in order.
fn told(world: &World) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    world.store().told().iter().map(|event| (text(&event["type"]), text(&event["reason"]))).collect()
}

fn tells(world: &World, kind: &str, reason: &str) -> bool {
    told(world).contains(&(kind.to_owned(), reason.to_owned()))
}

#[tokio::test]
async fn events_of_an_update() {
    let world = settled(options()).await;
    until("the first Event", || !told(&world).is_empty()).await;
    let before = told(&world).len();
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
    shows_done(&world, "2").await;
    until("the last Event", || tells(&world, "Normal", "NodeDone")).await;
    let events = world.store().told();
    let mut reasons: Vec<_> = told(&world)[before..].iter().map(|(kind, reason)| format!("{kind} {reason}")).collect();
    // Those of one second may arrive in any order. The pull and the staging have the same word.
    reasons.sort();
    reasons.dedup();
    let expected = ["Drain", "NodeDone", "OSUpdateStaged", "OSUpdateStarted", "Reboot", "Verified"];
    assert_eq!(reasons, expected.map(|reason| format!("Normal {reason}")));
    let node = world.store().node(NODE).unwrap();
    for event in &events {
        assert_eq!(event["involvedObject"]["uid"], node["metadata"]["uid"]);
        assert_eq!(event["source"], json!({"component": "rebase-agent", "host": NODE}));
    }
    // A restarted agent repeats none, and heartbeats cause none.
    world.machine.stop_agent().await;
    let ready = happens(&world, "a new agent", |event| matches!(event, Event::AgentStatus(s) if s.starts_with("Done")));
    tokio::join!(ready, async { world.machine.start_agent() });
    for _ in 0..200 {
        world.store().heartbeat(NODE);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.store().told().len(), events.len(), "{:#?}", told(&world));
}

#[tokio::test]
async fn events_of_a_refusal_and_of_a_hold() {
    let world = settled(options()).await;
    let two = world.unsigned("2").await.unwrap();
    world.target("2", &two);
    world.wait("the refusal", |node| annotation(node, "state") == Some("Degraded")).await.unwrap();
    until("the refusal's Event", || tells(&world, "Warning", "SignatureMissing")).await;
    world.store().annotate("kubectl-annotate", NODE, HOLD, Some("until Monday")).unwrap();
    world.sign(&two, "2").await.unwrap();
    world.store().annotate("kubectl-annotate", NODE, RETRY, Some("signed")).unwrap();
    until("the hold's Event", || tells(&world, "Normal", "Held")).await;
    let held = world.store().told().into_iter().find(|event| event["reason"] == "Held").unwrap();
    assert!(held["message"].as_str().unwrap().contains("until Monday"), "{held:#}");
    // Setting it again says nothing new.
    for hold in [None, Some("until Monday")] {
        world.store().annotate("kubectl-annotate", NODE, HOLD, hold).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.store().annotate("kubectl-annotate", NODE, HOLD, None).unwrap();
    arrived(&world, &two).await;
    assert!(told(&world).iter().filter(|(_, reason)| reason == "Held").count() <= 1);
}

#[tokio::test]
async fn refused_events_are_dropped_and_delay_nothing() {
    let world = World::new(options()).await.unwrap();
    let said = journal(&world, "was not created and is dropped");
    world.store().inject(Scope::Event, usize::MAX, Fault::Status { code: 403, retry_after: None });
    world.target("1", &world.installed);
    world.machine.power_on().await.unwrap();
    world.wait_done(&world.installed).await.unwrap();
    let two = world.signed("2").await.unwrap();
    world.target("2", &two);
    arrived(&world, &two).await;
    until("the last Event", || said.lock().unwrap().iter().any(|line| line.contains("NodeDone"))).await;
    let posts = world.api.requests().into_iter().filter(|request| request.method == "POST").count();
    assert_eq!(posts, said.lock().unwrap().len(), "one request and one line for each: {:#?}", said.lock().unwrap());
    assert!(world.store().told().is_empty());
}

#[tokio::test]
async fn who_vouched_is_said_by_annotation_event_and_status() {
    let world = settled(options()).await;
    let two = world.signed("2").await.unwrap();
    let before = writes(&world).len();
    world.target("2", &two);
    arrived(&world, &two).await;
    let patches = writes(&world).split_off(before);
    assert_eq!(patches.iter().filter(|patch| patch.body.contains(VERIFIED)).count(), 1, "{patches:#?}");
    let text = world.store().annotation(NODE, VERIFIED).unwrap();
    let verified: Value = serde_json::from_str(&text).unwrap();
    let fingerprint = world.signer.fingerprint();
    assert_eq!(verified["image"], two.pullspec().as_str());
    assert_eq!(verified["rule"], format!("docker \"{}/example\"", world.registry.host()));
    assert_eq!(verified["key"], format!("key sha256:{fingerprint}"));
    let event = world.store().told().into_iter().rfind(|event| event["reason"] == "Verified").unwrap();
    let message = event["message"].as_str().unwrap();
    assert!(message.contains(&fingerprint) && message.contains(two.pullspec().as_str()), "{message}");
    let (_, shown, _) = world.command(&["status"]).await.unwrap();
    let row = shown.split("Verified").nth(1).unwrap();
    assert!(row.contains(&fingerprint) && row.contains(&two.digest), "{shown}");
    let (_, json, _) = world.command(&["status", "--json"]).await.unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["cluster"]["known"]["verified"], verified);

    // The policy no longer accepts the key: the annotation goes with the warning.
    Policy::reject_by_default().write(&world.path().join("containers/policy.json")).unwrap();
    world.store().annotate("kubectl-annotate", NODE, RETRY, Some("other policy")).unwrap();
    let withdrawn = |node: &Value| {
        let annotations = &node["metadata"]["annotations"];
        annotations[VERIFIED].is_null() && !annotations["rebase-agent.openshift.io/untrusted"].is_null()
    };
    world.wait("the end of the trust", withdrawn).await.unwrap();
    until("the Event", || tells(&world, "Warning", "RunsUntrusted")).await;
}
