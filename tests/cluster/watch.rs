//! Following the Node through watches that end, break, send invalid data or fall silent, and without any watch.

use std::time::Instant;

use rebase_agent::model::Reason;
use support::apiserver::{Expired, Fault, Scope};
use support::mcc::PREFIX;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
/// Much less than the minute after which the poll would follow, and enough for a busy machine.
const SOON: Duration = Duration::from_secs(30);

fn page(body: impl Into<String>) -> Fault {
    Fault::Page { code: 200, body: body.into() }
}

fn status(code: u16) -> Fault {
    Fault::Status { code, retry_after: None }
}

#[tokio::test]
async fn one_read_and_one_watch_report_every_change() {
    let stage = Stage::new();
    stage.store.set_bookmarks(Duration::from_millis(50));
    let mut following = stage.follow(MINUTE);
    following.node("the first read", |_| true).await;
    stage.watched().await;
    for state in ["Working", "Degraded", "Done"] {
        stage.annotate("state", state);
        following.state(state).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(following.told.try_recv().is_err(), "bookmarks are not reported");
    assert_eq!((stage.count(false), stage.count(true)), (1, 1));
}

#[tokio::test]
async fn clean_end_is_followed_by_a_read() {
    let stage = Stage::new();
    let mut following = stage.follow(MINUTE);
    stage.watched().await;
    stage.store.end_watches();
    stage.annotate("state", "Working");
    following.state("Working").await;
    // The server ends watches by its own timeout, too.
    let mut following = stage.follow(Duration::from_secs(1));
    following.node("the first read", |_| true).await;
    following.node("the second", |_| true).await;
    following.node("the third", |_| true).await;
}

#[tokio::test]
async fn expired_version_causes_a_new_read() {
    for expired in [Expired::Event, Expired::Response] {
        let stage = Stage::new();
        stage.store.set_expired(expired);
        stage.store.inject(Scope::Watch, 1, Fault::Delay(Duration::from_millis(300)));
        let mut following = stage.follow(MINUTE);
        following.node("the first read", |_| true).await;
        stage.annotate("state", "Working");
        stage.store.compact();
        following.state("Working").await;
        assert_eq!(stage.count(false), 2, "{expired:?}");
    }
}

#[tokio::test]
async fn broken_and_invalid_watches_are_closed() {
    let huge = "x".repeat(5 << 20);
    let foreign = r#"{"type":"MODIFIED","object":{"metadata":{"name":"x","uid":"u","resourceVersion":"9"}}}"#;
    let mut tasks = Vec::new();
    for fault in [
        Fault::Drop,
        Fault::Cut,
        page(""),
        page("<html>\u{0}\u{ff}\n"),
        page(r#"{"type":"MODIFIED","object":{"metadata":"#),
        page(huge),
        page(format!("{foreign}\n")),
        page("{\"type\":\"ERROR\",\"object\":{}}\n"),
        page("\n".repeat(100_000)),
        status(500),
        status(404),
        status(401),
    ] {
        tasks.push(tokio::spawn(async move {
            let stage = Stage::new();
            stage.store.inject(Scope::Watch, 1, fault.clone());
            let mut following = stage.follow(MINUTE);
            following.node("the first read", |_| true).await;
            // Cut breaks the connection in the middle of this event.
            stage.annotate("state", "Working");
            let began = Instant::now();
            following.state("Working").await;
            let kind = format!("{fault:?}");
            let kind = kind.get(..40).unwrap_or(&kind);
            assert!(began.elapsed() < SOON, "{kind} took {:?}", began.elapsed());
            stage.annotate("state", "Done");
            following.state("Done").await;
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

/// Real API servers keep 75 to 300 s of history, and an idle Node changes every 5 min.
#[tokio::test(start_paused = true)]
async fn idle_node_in_a_busy_cluster_keeps_its_watch() {
    let stage = Stage::new();
    stage.store.set_history_window(Duration::from_secs(75));
    stage.store.create_node("worker-1", &[]);
    tokio::time::sleep(Duration::from_secs(200)).await;
    stage.store.heartbeat("worker-1");
    tokio::time::sleep(Duration::from_secs(100)).await;
    let mut following = stage.follow(Duration::from_secs(300));
    following.node("the first read", |_| true).await;
    stage.watched().await;
    tokio::time::sleep(Duration::from_secs(200)).await;
    stage.annotate("state", "Working");
    let began = tokio::time::Instant::now();
    following.state("Working").await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!((stage.count(false), stage.count(true)), (1, 1));
    for request in stage.server.requests().iter().filter(|request| request.is_watch()) {
        let version = request.path_and_query.split("resourceVersion=").nth(1).unwrap();
        assert!(version.starts_with(|c: char| matches!(c, '1'..='9')), "{}", request.path_and_query);
    }
}

#[tokio::test(start_paused = true)]
async fn server_restarted_without_history_is_watched_at_once() {
    let stage = Stage::new();
    let mut following = stage.follow(Duration::from_secs(300));
    following.node("the first read", |_| true).await;
    stage.watched().await;
    stage.store.create_node("worker-1", &[]);
    stage.server.stop().await;
    stage.server.restart().await;
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert_eq!(stage.count(true), 2, "one watch before the restart and one after it");
    stage.annotate("state", "Working");
    let began = tokio::time::Instant::now();
    following.state("Working").await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

/// With etcd 3.4 the only bookmark comes about 2 s before the end.
/// A restarted API server ends the watches of all nodes at once.
#[tokio::test(start_paused = true)]
async fn idle_node_comes_back_at_a_random_time_and_a_busy_one_at_once() {
    let stage = Stage::new();
    for key in ["currentConfig", "desiredConfig"] {
        stage.annotate(key, "rendered-worker-1");
    }
    let until = async |more: &dyn Fn() -> bool| {
        while !more() {
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    };
    for clean in [true, false] {
        for (state, shortest, longest) in [("Working", 0, 2), ("Done", 30, 92)] {
            stage.annotate("state", state);
            let mut pause = Duration::ZERO;
            for _ in 0..12 {
                let watches = stage.count(true);
                let _following = stage.follow(Duration::from_secs(300));
                until(&|| stage.count(true) > watches).await;
                let (reads, began) = (stage.count(false), tokio::time::Instant::now());
                if clean {
                    stage.store.end_watches();
                } else {
                    stage.server.stop().await;
                    stage.server.restart().await;
                }
                until(&|| stage.count(false) > reads).await;
                pause = pause.max(began.elapsed());
            }
            let seconds = pause.as_secs();
            assert!((shortest..=longest).contains(&seconds), "{state}, clean end {clean}: {pause:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn silence_within_a_watchs_timeout_is_no_fault() {
    let stage = Stage::new();
    stage.store.set_bookmarks(None);
    let mut following = stage.follow(Duration::from_secs(300));
    following.node("the first read", |_| true).await;
    stage.watched().await;
    tokio::time::sleep(Duration::from_secs(290)).await;
    assert_eq!((stage.count(false), stage.count(true)), (1, 1));
    stage.annotate("state", "Working");
    following.state("Working").await;
    assert_eq!((stage.count(false), stage.count(true)), (1, 1));
}

/// A watch from a version that the server does not have yet is silent as well.
#[tokio::test(start_paused = true)]
async fn silent_watch_is_closed_after_its_timeout() {
    let stage = Stage::new();
    let mut following = stage.follow(Duration::from_secs(300));
    following.node("the first read", |_| true).await;
    stage.watched().await;
    stage.store.freeze_watches(true);
    stage.store.freeze_watches(false);
    stage.annotate("state", "Working");
    let began = tokio::time::Instant::now();
    tokio::time::timeout(Duration::from_secs(400), async {
        while !matches!(following.told.recv().await, Some(Ok(node)) if node.facts.state.is_some()) {}
    })
    .await
    .expect("the poll reports the change");
    // The longest watch and its grace.
    assert!(began.elapsed() <= Duration::from_secs(375 + 5), "{:?}", began.elapsed());
}

#[tokio::test]
async fn hanging_requests_end_in_bounded_time() {
    for scope in [Scope::Read, Scope::Watch] {
        let stage = Stage::new();
        stage.store.inject(scope, 1, Fault::Hang);
        let timing = Timing { request: Duration::from_millis(500), ..quick() };
        let mut following = stage.follow_with(MINUTE, timing);
        tokio::time::sleep(Duration::from_millis(300)).await;
        stage.annotate("state", "Working");
        let began = Instant::now();
        following.state("Working").await;
        assert!(began.elapsed() < SOON, "{scope:?}: {:?}", began.elapsed());
    }
}

#[tokio::test]
async fn poll_notices_changes_while_watches_are_frozen() {
    let stage = Stage::new();
    stage.store.freeze_watches(true);
    let timing = Timing { grace: Duration::from_millis(200), ..quick() };
    let mut following = stage.follow_with(Duration::from_secs(1), timing);
    for state in ["Working", "Done"] {
        following.node("a read", |_| true).await;
        stage.annotate("state", state);
        let began = Instant::now();
        following.state(state).await;
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn poll_notices_changes_while_the_watch_is_forbidden() {
    let stage = Stage::new();
    stage.store.inject(Scope::Watch, 1000, status(403));
    let mut following = stage.follow(Duration::from_secs(1));
    let began = Instant::now();
    for state in ["Working", "Done", "Degraded"] {
        stage.annotate("state", state);
        following.state(state).await;
    }
    let seconds = usize::try_from(began.elapsed().as_secs()).unwrap();
    assert!(stage.count(false) <= seconds + 2, "{} reads in {seconds} s", stage.count(false));
    assert!(following.told.try_recv().is_err(), "no error is reported");
}

#[tokio::test]
async fn server_faults_cause_only_a_handful_of_requests() {
    // Every fault causes only a few requests in five seconds.
    let mut tasks = Vec::new();
    for (scope, fault) in [
        (Scope::Watch, page("")),
        (Scope::Watch, Fault::Drop),
        (Scope::Watch, page("garbage\n")),
        (Scope::Watch, status(410)),
        (Scope::Any, Fault::Drop),
        (Scope::Any, status(500)),
        (Scope::Any, status(401)),
        (Scope::Any, status(403)),
        (Scope::Any, page("{}")),
    ] {
        tasks.push(tokio::spawn(async move {
            let stage = Stage::new();
            stage.store.inject(scope, usize::MAX, fault.clone());
            let following = stage.follow(MINUTE);
            while stage.server.requests().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(Duration::from_secs(5)).await;
            drop(following);
            let count = stage.server.requests().len();
            assert!((1..=30).contains(&count), "{scope:?} {fault:?}: {count} requests");
            eprintln!("{scope:?} {fault:?}: {count} requests in 5 s");
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn watch_survives_a_rotated_certificate() {
    let stage = Stage::new();
    let mut following = stage.follow(MINUTE);
    stage.watched().await;
    stage.write(&stage.pki, &stage.pki.kubelet_pem(NODE));
    stage.annotate("state", "Working");
    following.state("Working").await;
    stage.store.end_watches();
    stage.annotate("state", "Done");
    following.state("Done").await;
    // The server rejects the old certificate; a single 401 is not reported.
    stage.store.inject(Scope::Read, 1, status(401));
    stage.store.end_watches();
    stage.annotate("state", "Degraded");
    following.state("Degraded").await;
    assert!(following.told.try_recv().is_err());
}

#[tokio::test]
async fn expired_certificate_is_reported_until_it_is_replaced() {
    let stage = Stage::new();
    stage.write(&stage.pki, &stage.pki.kubelet_pem_valid(NODE, -7200, -3600));
    let mut following = stage.follow(MINUTE);
    let error = following.error().await;
    assert_eq!(error.reason(), Reason::ClusterForbidden);
    let said = error.to_string();
    assert!(said.contains("kubelet-client-current.pem expired at ") && said.contains("oc get csr"), "{said}");
    stage.write(&stage.pki, &stage.pki.kubelet_pem(NODE));
    following.node("the Node", |_| true).await;
}

#[tokio::test]
async fn watch_survives_a_rotated_authority() {
    let stage = Stage::new();
    let mut following = stage.follow(MINUTE);
    stage.watched().await;
    let new = Pki::new();
    stage.server.rotate(&new).unwrap();
    stage.annotate("state", "Working");
    following.state("Working").await;
    stage.server.stop().await;
    stage.server.restart().await;
    let error = following.error().await;
    assert!(matches!(&error, ClusterError::Untrusted(why) if why.contains("by another CA")), "{error}");
    stage.write(&new, &new.kubelet_pem(NODE));
    stage.annotate("state", "Done");
    following.state("Done").await;
}

#[tokio::test]
async fn retry_after_is_honoured() {
    for code in [429, 503] {
        let stage = Stage::new();
        stage.store.inject(Scope::Any, 1, Fault::Status { code, retry_after: Some(2) });
        let mut following = stage.follow(MINUTE);
        following.error().await;
        let began = Instant::now();
        following.node("the Node", |_| true).await;
        assert!((Duration::from_secs(2)..SOON).contains(&began.elapsed()), "{:?}", began.elapsed());
        assert_eq!(stage.count(false), 2);
    }
}

#[tokio::test]
async fn forbidden_requests_are_reported_and_retried() {
    let stage = Stage::new();
    // A restarted API server answers 403 until it has read its roles.
    stage.store.inject(Scope::Any, 2, status(403));
    let mut following = stage.follow(Duration::from_secs(300));
    for _ in 0..2 {
        let error = following.error().await;
        assert!(matches!(error, ClusterError::Forbidden(_)), "{error}");
    }
    following.node("the Node", |_| true).await;
}

#[tokio::test(start_paused = true)]
async fn hour_without_an_api_server_is_survived() {
    let stage = Stage::new();
    stage.server.stop().await;
    let mut following = stage.follow(Duration::from_secs(300));
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let mut failures = 0;
    while let Ok(told) = following.told.try_recv() {
        assert!(matches!(told, Err(ClusterError::Connection(_))), "{told:?}");
        failures += 1;
    }
    assert!((48..=70).contains(&failures), "{failures} attempts in an hour");
    stage.server.restart().await;
    tokio::time::advance(Duration::from_secs(75)).await;
    tokio::time::resume();
    following.node("the Node", |_| true).await;
    eprintln!("{failures} attempts in an hour");
}

#[tokio::test]
async fn recreated_node_is_followed() {
    let stage = Stage::new();
    let mut following = stage.follow(MINUTE);
    let old = following.node("the Node", |_| true).await;
    stage.watched().await;
    stage.store.delete_node(NODE);
    assert!(matches!(following.error().await, ClusterError::NotFound(_)));
    assert!(matches!(following.error().await, ClusterError::NotFound(_)), "the read reports it as well");
    stage.store.create_node(NODE, &[]);
    let new = following.node("the new Node", |node| node.uid != old.uid).await;
    assert!(!new.is_older_than(&old));
}

#[tokio::test]
async fn restored_database_is_followed() {
    let stage = Stage::new();
    stage.annotate("state", "Done");
    let backup = stage.store.backup();
    for _ in 0..20 {
        stage.store.heartbeat(NODE);
    }
    stage.annotate("state", "Working");
    let mut following = stage.follow(MINUTE);
    let before = following.state("Working").await;
    stage.watched().await;
    stage.store.restore(&backup);
    let after = following.state("Done").await;
    assert_eq!(after.uid, before.uid);
    assert!(after.resource_version < before.resource_version);
    assert!(!after.is_older_than(&before), "the read was sent later");
    stage.annotate("state", "Degraded");
    let next = following.state("Degraded").await;
    assert!(!next.is_older_than(&after), "the watch continues from the restored version");
    assert!(next.is_older_than(&before), "so the read must replace the old state");
}

#[tokio::test]
async fn late_event_does_not_overwrite_a_newer_reply() {
    let stage = Stage::new();
    let mut following = stage.follow(MINUTE);
    let first = following.node("the Node", |_| true).await;
    stage.watched().await;
    stage.annotate("state", "Done");
    let patch = [(format!("{PREFIX}state"), Some("Working".to_owned()))].into();
    let reply = stage.api().patch(&first.uid, &patch).await.unwrap();
    let late = following.state("Done").await;
    assert!(late.is_older_than(&reply) && !reply.is_older_than(&late));
    // The same holds for a read that was under way during the patch.
    let (slow, reply) = {
        let api = Arc::new(stage.api());
        let reading = tokio::spawn(async move { api.metadata().await.unwrap().0 });
        let patch = [(format!("{PREFIX}state"), Some("Degraded".to_owned()))].into();
        let reply = stage.api().patch(&first.uid, &patch).await.unwrap();
        (reading.await.unwrap(), reply)
    };
    assert_eq!(slow.is_older_than(&reply), slow.resource_version < reply.resource_version);
}
