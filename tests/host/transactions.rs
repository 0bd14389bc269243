//! Transactions and their failures.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rebase_agent::host::HostError;
use rebase_agent::model::{Reason, Severity};
use support::events::Event;
use tokio::sync::watch;

use crate::lab::{Lab, count, dict, never, stage, until};

fn started(event: &Event) -> bool {
    matches!(event, Event::TransactionStarted { .. })
}

fn requested(event: &Event, wanted: &str) -> bool {
    matches!(event, Event::TransactionRequested { method, .. } if method == wanted)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn staging_reports_progress_and_releases_the_daemon_at_once() {
    let lab = Lab::new().await;
    let seen = lab.record();
    let (_never, mut cancel) = never();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let to = lines.clone();
    lab.host.stage(lab.verified("2"), &mut cancel, &move |line| to.lock().unwrap().push(line)).await.unwrap();
    // The daemon would wait half a minute for a client that keeps its socket.
    let ended = Instant::now();
    lab.idle().await;
    assert!(ended.elapsed() < Duration::from_secs(5), "{:?}", ended.elapsed());
    assert!(lines.lock().unwrap().iter().any(|line| line.starts_with("Importing")), "{lines:?}");
    assert_eq!(lab.staged(), Some(lab.digest("2")));
    let title = format!("rebase-agent {}", lab.digest("2"));
    assert_eq!(count(&seen, |event| *event == Event::TransactionStarted { title: title.clone() }), 1);
    assert_eq!(lab.read().await.transaction, None);
    assert!(lab.machine.rpm_ostreed().idle_exit().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signals_before_the_reply_to_start_count_and_foreign_ones_do_not() {
    let lab = Lab::new().await;
    // More signals than a client's queue holds, followed by a `Finished` of another interface.
    lab.machine.rpm_ostreed().chatter(500);
    lab.stage("2").await.unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("2")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn busy_error_names_the_tool_that_holds_the_lock() {
    let lab = Lab::new().await;
    lab.machine.sysroot().set_locked(true);
    let error = lab.stage("2").await.unwrap_err();
    assert!(matches!(&error, HostError::Busy(why) if why.contains("System transaction in progress")), "{error}");
    lab.machine.sysroot().set_locked(false);
    lab.stage("2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_transaction_is_reported_and_not_touched() {
    let lab = Lab::new().await;
    let foreign = lab.machine.rpm_ostreed().foreign("upgrade\u{1b}[2J").await.unwrap();
    let active = lab.read().await.transaction.unwrap();
    assert_eq!((active.title.as_str(), active.ours), ("upgrade\\u{1b}[2J", None));
    assert!(matches!(lab.stage("2").await.unwrap_err(), HostError::Busy(_)));
    lab.host.cancel_transaction().await.unwrap();
    assert!(lab.machine.rpm_ostreed().active_transaction().is_some(), "a foreign transaction is not cancelled");
    foreign.finish();
    lab.idle().await;
    lab.stage("2").await.unwrap();
}

/// Requests a transaction for this client without starting it; returns its address.
async fn request(lab: &Lab, client: &zbus::Connection, image: &str, title: &str) -> String {
    let options = std::collections::BTreeMap::from([
        ("allow-downgrade", zbus::Variant::from(true)),
        ("initiating-command-line", zbus::Variant::from(title.to_owned())),
        ("lock-finalization", zbus::Variant::from(true)),
    ]);
    let body = (options, lab.verified(image).to_pull(), Vec::<String>::new());
    let reply = client
        .call_method(
            Some("org.projectatomic.rpmostree1"),
            "/org/projectatomic/rpmostree1/rhcos",
            Some("org.projectatomic.rpmostree1.OS"),
            "Rebase",
            &body,
        )
        .await
        .unwrap();
    reply.body().deserialize::<(String,)>().unwrap().0
}

async fn client(lab: &Lab) -> zbus::Connection {
    zbus::connection::Builder::address(lab.machine.bus_address().as_str()).build().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transaction_that_is_never_started_is_reported_and_not_awaited() {
    let lab = Lab::new().await;
    let other = client(&lab).await;
    request(&lab, &other, "2", "rpm-ostree rebase").await;
    let began = Instant::now();
    // The transaction gets its title when it starts.
    assert_eq!(lab.read().await.transaction.unwrap().title, "new-deployment");
    assert!(matches!(lab.stage("2").await.unwrap_err(), HostError::Busy(_)));
    assert!(began.elapsed() < Duration::from_secs(10));
    // Reading the transaction did not start it.
    other.close().await.unwrap();
    lab.idle().await;
    assert_eq!(lab.staged(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identical_rebase_calls_join_one_transaction() {
    let lab = Lab::new().await;
    let daemon = lab.machine.rpm_ostreed();
    let seen = lab.record();
    // The daemon joins requests that are equal byte for byte. The transaction starts between the agent's look and its
    // call.
    let unseen = || daemon.show_once("ActiveTransactionPath", "");
    daemon.hang_at("Importing");
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let first = tokio::spawn(async move { stage(&host, image).await });
    lab.hanging().await;
    unseen();
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let second = tokio::spawn(async move { stage(&host, image).await });
    until("both have requested", || count(&seen, |event| requested(event, "rebase")) == 2).await;
    daemon.release();
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();
    assert_eq!(count(&seen, started), 1);
    lab.idle().await;
    let other = client(&lab).await;
    let title = format!("rebase-agent {}", lab.digest("3"));
    request(&lab, &other, "3", &title).await;
    unseen();
    lab.stage("3").await.unwrap();
    assert_eq!(count(&seen, started), 2);
    assert_eq!(lab.staged(), Some(lab.digest("3")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarted_agent_attaches_to_its_transaction_at_any_point() {
    let lab = Lab::new().await;
    let daemon = lab.machine.rpm_ostreed();
    let seen = lab.record();
    daemon.hang_at("Importing");
    // The first agent dies during the pull.
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let first = tokio::spawn(async move { stage(&host, image).await });
    lab.hanging().await;
    first.abort();
    let _ = first.await;
    let active = lab.read().await.transaction.unwrap();
    assert_eq!(active.ours.as_ref().map(|digest| digest.as_str()), Some(lab.digest("2").as_str()));
    assert!(matches!(lab.stage("3").await.unwrap_err(), HostError::Busy(_)), "own transaction of another image");
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let second = tokio::spawn(async move { stage(&host, image).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    daemon.release();
    second.await.unwrap().unwrap();
    assert_eq!(count(&seen, |event| requested(event, "rebase")), 1);
    // A finished transaction that a slow client keeps: a late Start gets its end once more.
    let other = client(&lab).await;
    let address = request(&lab, &other, "3", &format!("rebase-agent {}", lab.digest("3"))).await;
    let peer = zbus::connection::Builder::address(address.as_str()).p2p().build().await.unwrap();
    let transaction = Some("org.projectatomic.rpmostree1.Transaction");
    peer.call_method(None::<&str>, "/", transaction, "Start", &()).await.unwrap();
    until("staged", || lab.staged() == Some(lab.digest("3"))).await;
    until("ended", || count(&seen, |event| matches!(event, Event::TransactionFinished { .. })) == 2).await;
    lab.machine.sysroot().drop_staged().unwrap();
    let error = lab.stage("3").await.unwrap_err();
    assert!(
        matches!(error, HostError::Busy(_) | HostError::NoEffect { .. }),
        "success of an old transaction, and nothing staged: {error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_reply_cancels_the_transaction() {
    let lab = Lab::new().await;
    lab.machine.rpm_ostreed().lose_reply();
    let host = lab.hasty(|deadlines| deadlines.reply = Duration::from_secs(1));
    let error = stage(&host, lab.verified("2")).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DeadlineExceeded, "{error}");
    lab.idle().await;
    stage(&host, lab.verified("2")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wait_for_the_reply_can_be_cancelled() {
    let lab = Lab::new().await;
    lab.machine.rpm_ostreed().lose_reply();
    let (sender, mut cancel) = watch::channel(false);
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let staging = tokio::spawn(async move { host.stage(image, &mut cancel, &|_| {}).await });
    until("requested", || lab.machine.rpm_ostreed().active_transaction().is_some()).await;
    sender.send_replace(true);
    assert!(matches!(staging.await.unwrap().unwrap_err(), HostError::Cancelled(_)));
    lab.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_is_retried_after_an_idle_exit() {
    let lab = Lab::new().await;
    let daemon = lab.machine.rpm_ostreed();
    daemon.start().await.unwrap();
    daemon.idle_exit_on_next_call();
    lab.read().await;
    daemon.idle_exit_on_next_call();
    lab.stage("2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn error_of_a_daemon_that_keeps_dying_names_its_journal() {
    let lab = Lab::new().await;
    lab.machine.rpm_ostreed().crash_on_calls(4);
    let error = lab.host.read().await.unwrap_err();
    let said = error.to_string();
    assert!(error.reason() == Reason::HostUnreachable, "{said}");
    assert!(said.starts_with("rpm-ostreed.service exits at every call (4 times; "), "{said}");
    assert!(said.ends_with("; see `journalctl -u rpm-ostreed`"), "{said}");
    // Fewer crashes are retried.
    lab.machine.rpm_ostreed().crash_on_calls(3);
    lab.read().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slowly_starting_daemon_is_awaited() {
    let lab = Lab::new().await;
    lab.machine.rpm_ostreed().set_start_delay(Duration::from_millis(1500));
    assert!(!lab.machine.rpm_ostreed().is_running());
    lab.read().await;
    // The wait has a limit.
    assert!(lab.machine.rpm_ostreed().idle_exit().await);
    let host = lab.hasty(|deadlines| deadlines.reply = Duration::from_millis(300));
    assert_eq!(host.read().await.unwrap_err().reason(), Reason::DeadlineExceeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_bus_activation_is_retried() {
    let lab = Lab::new().await;
    let path = lab.path().join("bus.conf");
    let impatient = "<limit name=\"service_start_timeout\">500</limit></busconfig>";
    let config = std::fs::read_to_string(&path).unwrap().replace("</busconfig>", impatient);
    std::fs::write(path, config).unwrap();
    let bus = Some("org.freedesktop.DBus");
    client(&lab).await.call_method(bus, "/org/freedesktop/DBus", bus, "ReloadConfig", &()).await.unwrap();
    lab.machine.rpm_ostreed().set_start_delay(Duration::from_millis(1200));
    lab.read().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transaction_that_ends_between_two_calls_causes_another_read() {
    let lab = Lab::new().await;
    let daemon = lab.machine.rpm_ostreed();
    daemon.show_once("ActiveTransactionPath", "unix:path=/nowhere/ended");
    assert_eq!(lab.read().await.transaction, None);
    let gone = dict(vec![
        ("id", "rhcos-gone.0".into()),
        ("osname", "rhcos".into()),
        ("checksum", "gone".into()),
        ("staged", true.into()),
    ]);
    daemon.show_once("Deployments", vec![gone]);
    assert_eq!(lab.read().await.staged(), None);
    daemon.show_once("ActiveTransactionPath", "unix:path=/nowhere/ended");
    lab.host.cancel_transaction().await.unwrap();
    // The retries have a limit.
    daemon.show("ActiveTransactionPath", "unix:path=/nowhere/listed");
    assert_eq!(lab.host.read().await.unwrap_err().reason(), Reason::HostUnreachable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deployments_show_the_result_after_a_crash() {
    let lab = Lab::new().await;
    let daemon = lab.machine.rpm_ostreed();
    daemon.crash_at("Importing");
    let error = lab.stage("2").await.unwrap_err();
    assert!(matches!(error, HostError::Vanished(_)) && error.reason().severity() == Severity::Transient, "{error}");
    lab.stage("2").await.unwrap();
    // At this point the new deployment has replaced the old one and its image was pruned: the work is done.
    daemon.crash_at("Pruned images");
    lab.stage("3").await.unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("3")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn success_without_a_new_deployment_is_an_error() {
    let lab = Lab::new().await;
    lab.machine.rpm_ostreed().no_change_next();
    let error = lab.stage("2").await.unwrap_err();
    assert!(matches!(error, HostError::NoEffect { .. }) && error.reason().severity() == Severity::Transient, "{error}");
    // Another image is staged by hand before the transaction's end is read.
    lab.stage("2").await.unwrap();
    lab.machine.rpm_ostreed().hang_at("Pruned images");
    let (host, image) = (lab.host.clone(), lab.verified("3"));
    let staging = tokio::spawn(async move { stage(&host, image).await });
    lab.hanging().await;
    assert_eq!(lab.staged(), Some(lab.digest("3")));
    lab.machine.rpm_ostreed().stage_behind(&lab.typed("index")).await.unwrap();
    lab.machine.rpm_ostreed().release();
    let error = staging.await.unwrap().unwrap_err();
    assert!(matches!(error, HostError::NoEffect { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_references_are_never_sent() {
    let lab = Lab::new().await;
    let seen = lab.record();
    let equal = |event: &Event| matches!(event, Event::TransactionFinished { error: Some(text), .. } if text.contains("refs are equal"));
    // The image is booted already.
    lab.stage("1").await.unwrap();
    assert_eq!(count(&seen, |event| requested(event, "rebase")), 0);
    // The image is booted by tag: the same image under another name.
    let booted = lab.machine.booted().unwrap();
    let by_tag = format!("ostree-unverified-registry:{}:1", lab.store.image("1").pushed.repository());
    let origin = lab.machine.sysroot().tree(&booted).with_extension(format!("{}.origin", booted.serial));
    std::fs::write(origin, format!("[origin]\ncontainer-image-reference={by_tag}\n")).unwrap();
    assert_eq!(lab.read().await.booted().unwrap().reference.as_deref(), by_tag.split_once(':').map(|(_, name)| name));
    lab.stage("1").await.unwrap();
    assert_eq!(count(&seen, |event| requested(event, "rebase")), 0);
    // The image was staged by hand already.
    lab.machine.human_stage(&lab.verified("2").to_pull()).await.unwrap();
    lab.idle().await;
    lab.stage("2").await.unwrap();
    assert_eq!(count(&seen, |event| requested(event, "rebase")), 1);
    // The deployment is finalized, and the boot loader fell back from it: first in boot order, neither staged nor
    // booted.
    lab.machine.fall_back();
    assert!(lab.machine.shut_down().await);
    lab.machine.power_on().await.unwrap();
    assert!(lab.machine.deployments()[1].booted);
    lab.stage("2").await.unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("2")));
    assert_eq!(count(&seen, equal), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_ends_the_transaction_or_times_out() {
    let lab = Lab::new().await;
    let daemon = lab.machine.rpm_ostreed();
    let begin = async |host: &rebase_agent::host::Host, image: &str| {
        daemon.hang_at("Importing");
        let (sender, mut cancel) = watch::channel(false);
        let (host, image) = (host.clone(), lab.verified(image));
        let staging = tokio::spawn(async move { host.stage(image, &mut cancel, &|_| {}).await });
        lab.hanging().await;
        (sender, staging)
    };
    let (sender, staging) = begin(&lab.host, "2").await;
    sender.send_replace(true);
    assert!(matches!(staging.await.unwrap().unwrap_err(), HostError::Cancelled(_)));
    lab.idle().await;
    assert_eq!(lab.staged(), None);
    // The daemon's text depends on its locale.
    daemon.say_when_cancelled("Vorgang wurde abgebrochen");
    let (sender, staging) = begin(&lab.host, "2").await;
    sender.send_replace(true);
    assert!(matches!(staging.await.unwrap().unwrap_err(), HostError::Cancelled(_)));
    lab.idle().await;
    // The cancel comes too late: the transaction succeeds.
    daemon.ignore_cancel(true);
    let (sender, staging) = begin(&lab.host, "2").await;
    sender.send_replace(true);
    tokio::time::sleep(Duration::from_millis(50)).await;
    daemon.release();
    staging.await.unwrap().unwrap();
    // The transaction does not end.
    let host = lab.hasty(|deadlines| deadlines.cancel = Duration::from_millis(300));
    let (sender, staging) = begin(&host, "3").await;
    sender.send_replace(true);
    assert_eq!(staging.await.unwrap().unwrap_err().reason(), Reason::DeadlineExceeded);
    daemon.release();
    lab.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn obsolete_transaction_of_an_earlier_run_is_cancelled() {
    let lab = Lab::new().await;
    let daemon = lab.machine.rpm_ostreed();
    lab.host.cancel_transaction().await.unwrap();
    daemon.hang_at("Importing");
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let first = tokio::spawn(async move { stage(&host, image).await });
    lab.hanging().await;
    first.abort();
    lab.host.cancel_transaction().await.unwrap();
    lab.idle().await;
    assert_eq!(lab.staged(), None);
    // Cancelling does not start a transaction that was never started.
    let seen = lab.record();
    let other = client(&lab).await;
    request(&lab, &other, "2", &format!("rebase-agent {}", lab.digest("2"))).await;
    lab.host.cancel_transaction().await.unwrap();
    other.close().await.unwrap();
    lab.idle().await;
    assert_eq!(count(&seen, started), 0);
    assert_eq!(lab.staged(), None);
    // A transaction that ignores the cancel causes a timeout.
    daemon.ignore_cancel(true);
    daemon.hang_at("Importing");
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let first = tokio::spawn(async move { stage(&host, image).await });
    lab.hanging().await;
    first.abort();
    let host = lab.hasty(|deadlines| deadlines.cancel = Duration::from_millis(200));
    assert_eq!(host.cancel_transaction().await.unwrap_err().reason(), Reason::DeadlineExceeded);
    daemon.release();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_and_duration_of_a_transaction_are_limited() {
    let lab = Lab::new().await;
    let daemon = lab.machine.rpm_ostreed();
    for shrink in [
        |deadlines: &mut rebase_agent::host::Deadlines| deadlines.stall = Duration::from_millis(500),
        |deadlines: &mut rebase_agent::host::Deadlines| deadlines.whole = Duration::from_millis(500),
    ] {
        daemon.hang_at("Importing");
        let error = stage(&lab.hasty(shrink), lab.verified("2")).await.unwrap_err();
        assert_eq!(error.reason(), Reason::DeadlineExceeded, "{error}");
        // The transaction was cancelled as well.
        lab.idle().await;
    }
    assert_eq!(lab.staged(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transaction_address_must_be_a_local_socket() {
    let lab = Lab::new().await;
    let witness = lab.machine.root().join("witness");
    for address in [
        "tcp:host=127.0.0.1,port=1".to_owned(),
        format!("unixexec:path=/usr/bin/touch,argv1={}", witness.display()),
        String::new(),
    ] {
        lab.machine.rpm_ostreed().answer_address(Some(&address));
        let error = lab.stage("2").await.unwrap_err();
        assert_eq!(error.reason(), Reason::HostConfused, "{address}: {error}");
        lab.idle().await;
    }
    assert!(!witness.exists());
    // The socket does not exist: the daemon died after its reply.
    lab.machine.rpm_ostreed().answer_address(Some("unix:path=/nowhere/socket"));
    let error = lab.stage("2").await.unwrap_err();
    assert!(matches!(error, HostError::Vanished(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drop_spares_another_staged_deployment() {
    let lab = Lab::new().await;
    let (_never, mut cancel) = never();
    lab.stage("2").await.unwrap();
    lab.host.drop_pending("another checksum", &mut cancel).await.unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("2")));
    let checksum = lab.read().await.staged().unwrap().checksum.clone();
    lab.machine.rpm_ostreed().no_change_next();
    let error = lab.host.drop_pending(&checksum, &mut cancel).await.unwrap_err();
    assert!(matches!(error, HostError::NoEffect { .. }), "{error}");
    lab.host.drop_pending(&checksum, &mut cancel).await.unwrap();
    assert_eq!(lab.staged(), None);
    lab.host.drop_pending(&checksum, &mut cancel).await.unwrap();
}
