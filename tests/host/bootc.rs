//! bootc behind systemd's units.

use std::time::{Duration, Instant};

use rebase_agent::host::{Deadlines, Host, HostError};
use rebase_agent::model::{Fault, Reason, Severity};
use support::events::Event;
use support::image::Pushed;
use support::machine::HostTools;
use tokio::sync::watch;

use crate::lab::{Lab, count, never, stage, until, verified};

async fn lab() -> Lab {
    Lab::with(HostTools::Bootc, false).await
}

/// The unit's name, escaped as by systemd-escape(1).
fn unit(template: &str, image: &Pushed) -> String {
    let escaped = image.pullspec().replace('-', "\\x2d").replace('@', "\\x40").replace('/', "-");
    format!("{template}@{escaped}.service")
}

fn plain(lab: &Lab, image: &str) -> String {
    unit("rebase-agent-bootc", &lab.store.image(image).pushed)
}

fn switched(event: &Event) -> bool {
    matches!(event, Event::TransactionRequested { method, .. } if method == "switch")
}

/// A restarted agent, which has no memory.
fn another(lab: &Lab) -> Host {
    Host::new(lab.host.root().clone(), Some(lab.machine.bus_address()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unit_stages_the_image() {
    let lab = lab().await;
    let seen = lab.record();
    let (_never, mut cancel) = never();
    let lines = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let to = lines.clone();
    lab.host.stage(lab.verified("3"), &mut cancel, &move |line| to.lock().unwrap().push(line)).await.unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("3")));
    assert_eq!(count(&seen, |event| *event == Event::UnitStarted(plain(&lab, "3"))), 1);
    assert_eq!(lines.lock().unwrap().len(), 1);
    let facts = lab.read().await;
    let staged = facts.staged().unwrap();
    assert_eq!(staged.rendered_config.as_deref(), Some("rendered-worker-3"));
    assert_eq!(staged.wanted_arguments.as_deref().unwrap(), ["nosmt", "a=b"]);
    assert_eq!(staged.arguments.as_deref().unwrap(), ["root=UUID=0a1b", "rw", "console=ttyS0"]);
    assert_eq!(facts.transaction, None);
    assert!(!lab.machine.bootc().was_asked_while_locked());
    // The image is staged already: no unit is started.
    lab.stage("3").await.unwrap();
    assert_eq!(count(&seen, switched), 1);
    // Another image is staged over it.
    lab.stage("2").await.unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("2")));
}

/// bootc unlocks no download-only deployment by `switch`, so one of the image does not count as staged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn download_only_deployment_does_not_count_as_staged() {
    let lab = lab().await;
    let seen = lab.record();
    lab.stage("2").await.unwrap();
    lab.machine.sysroot().lock_with_file().unwrap();
    let outcome = lab.stage("2").await;
    assert_eq!(count(&seen, switched), 2, "the host tool is asked again");
    let locked = lab.read().await.staged().unwrap().locked;
    assert_eq!(outcome.is_err(), locked, "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signed_origin_is_kept_where_the_policy_allows() {
    let lab = Lab::with(HostTools::Bootc, true).await;
    let signature = |part: &str| lab.machine.bootc().status()["status"][part]["image"]["image"]["signature"].clone();
    assert_eq!(signature("booted"), "containerPolicy");
    let pushed = &lab.store.image("2").pushed;
    let strict = verified(&lab.store.strict, pushed).await;
    stage(&lab.host, &strict).await.unwrap();
    assert_eq!(signature("staged"), "containerPolicy");
    assert!(lab.machine.systemd().started().contains(&unit("rebase-agent-bootc-signed", pushed)));
    assert_eq!(lab.read().await.staged().unwrap().digest.as_ref().unwrap().as_str(), pushed.digest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deployments_decide_and_not_the_exit_code() {
    let lab = lab().await;
    let bootc = lab.machine.bootc();
    // Exit code 0, nothing staged.
    bootc.do_nothing_next();
    let error = lab.stage("2").await.unwrap_err();
    assert!(matches!(&error, HostError::NoEffect { why, .. } if why.contains(&plain(&lab, "2"))), "{error}");
    // Exit code 1, image staged.
    bootc.fail_after_staging();
    lab.stage("2").await.unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("2")));
    let left = lab.machine.systemd().unit(&plain(&lab, "2")).unwrap();
    assert_eq!(left.active, "inactive", "the unit does not stay failed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_name_the_journal_of_the_unit() {
    let lab = lab().await;
    let bootc = lab.machine.bootc();
    for (result, reason) in [("exit-code", Reason::StageFailed), ("timeout", Reason::DeadlineExceeded)] {
        bootc.fail_next();
        bootc.fail_with(result);
        let error = lab.stage("2").await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        let way_out = format!("`{result} 1`; see `journalctl -u '{}'`", plain(&lab, "2"));
        assert!(error.to_string().contains(&way_out), "{error}");
        assert!(error.reason().severity() == Severity::Transient && Fault::from(&error).message.len() < 900);
        assert_eq!(lab.machine.systemd().unit(&plain(&lab, "2")).unwrap().active, "inactive");
    }
    // A unit that failed in an earlier run does not stop the next start.
    lab.machine.systemd().fail(&plain(&lab, "2"), "exit-code");
    lab.stage("2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unusual_job_results_are_reported() {
    let lab = lab().await;
    let name = plain(&lab, "2");
    for result in ["canceled", "dependency", "timeout", "frozen"] {
        lab.machine.systemd().end_jobs(&name, Some(result));
        let error = lab.stage("2").await.unwrap_err();
        let expected = match result {
            "canceled" => Reason::Cancelled,
            "timeout" => Reason::DeadlineExceeded,
            _ => Reason::StageFailed,
        };
        assert_eq!(error.reason(), expected, "{result}: {error}");
    }
    lab.machine.systemd().end_jobs(&name, None);
    for early in [true, false] {
        lab.machine.systemd().job_removed_early(early);
        let image = if early { "2" } else { "3" };
        lab.stage(image).await.unwrap();
        assert_eq!(lab.staged(), Some(lab.digest(image)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarted_agent_awaits_the_running_unit() {
    let lab = lab().await;
    let seen = lab.record();
    lab.machine.bootc().hang();
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let killed = tokio::spawn(async move { stage(&host, image).await });
    until("it hangs", || lab.machine.bootc().is_hanging()).await;
    killed.abort();
    let host = another(&lab);
    let facts = host.read().await.unwrap();
    let active = facts.transaction.unwrap();
    assert_eq!(active.ours.unwrap().as_str(), lab.digest("2"));
    assert_eq!(active.client, plain(&lab, "2"));
    assert!(facts.deployments.is_empty(), "bootc cannot be asked now");
    let waiting = tokio::spawn(async move { stage(&host, image).await });
    until("the second start joins the job", || lab.machine.systemd().merged() == 1).await;
    // Another image has to wait.
    let error = stage(&another(&lab), lab.verified("3")).await.unwrap_err();
    assert!(matches!(&error, HostError::Busy(why) if why.contains(&lab.digest("2"))), "{error}");
    lab.machine.bootc().release();
    waiting.await.unwrap().unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("2")));
    assert_eq!(count(&seen, switched), 1);
    assert!(!lab.machine.bootc().was_asked_while_locked());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn last_status_is_kept_while_the_switch_runs() {
    let lab = lab().await;
    let before = lab.read().await.deployments;
    lab.machine.bootc().hang();
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let running = tokio::spawn(async move { stage(&host, image).await });
    until("it hangs", || lab.machine.bootc().is_hanging()).await;
    let facts = lab.read().await;
    assert_eq!(facts.deployments, before);
    assert!(facts.transaction.is_some());
    lab.machine.bootc().release();
    running.await.unwrap().unwrap();
    assert!(!lab.machine.bootc().was_asked_while_locked());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn obsolete_switch_is_stopped() {
    let lab = lab().await;
    let bootc = lab.machine.bootc();
    // Stopped by the agent that waits for it.
    bootc.hang();
    let (sender, mut cancel) = watch::channel(false);
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let running = tokio::spawn(async move { host.stage(image, &mut cancel, &|_| {}).await });
    until("it hangs", || bootc.is_hanging()).await;
    sender.send_replace(true);
    assert!(matches!(running.await.unwrap().unwrap_err(), HostError::Cancelled(_)));
    assert!(!bootc.is_hanging());
    assert_eq!(lab.read().await.transaction, None);
    // Stopped by a later process.
    bootc.hang();
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let killed = tokio::spawn(async move { stage(&host, image).await });
    until("it hangs", || bootc.is_hanging()).await;
    killed.abort();
    another(&lab).cancel_transaction().await.unwrap();
    assert_eq!(lab.read().await.transaction, None);
    another(&lab).cancel_transaction().await.unwrap();
    assert_eq!(lab.staged(), None);
    lab.stage("2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn end_of_the_job_without_a_signal_is_noticed() {
    let lab = lab().await;
    lab.machine.systemd().lose_signals(true);
    let host = lab.hasty(|deadlines| deadlines.look = Duration::from_millis(200));
    stage(&host, lab.verified("2")).await.unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("2")));
    lab.machine.bootc().fail_next();
    let error = stage(&host, lab.verified("3")).await.unwrap_err();
    assert!(error.to_string().contains("`exit-code 1`"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switch_stopped_by_an_operator_is_retried_later() {
    let lab = lab().await;
    lab.machine.bootc().hang();
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let running = tokio::spawn(async move { stage(&host, image).await });
    until("it hangs", || lab.machine.bootc().is_hanging()).await;
    let systemctl = zbus::connection::Builder::address(lab.machine.bus_address().as_str()).build().await.unwrap();
    let stop = async |mode: &'static str| {
        let (name, manager) = ("org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager");
        let body = (plain(&lab, "2"), mode);
        systemctl.call_method(Some(name), "/org/freedesktop/systemd1", Some(manager), "StopUnit", &body).await
    };
    // systemd refuses a stop that contradicts a queued start, unless the stop may replace it.
    let error = stop("fail").await.unwrap_err();
    assert!(error.to_string().contains("TransactionIsDestructive"), "{error}");
    stop("replace").await.unwrap();
    let error = running.await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::Cancelled, "{error}");
    lab.stage("2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switch_that_never_ends_is_stopped() {
    let lab = lab().await;
    lab.machine.bootc().hang();
    let host = lab.hasty(|deadlines| deadlines.whole = Duration::from_millis(1500));
    let error = stage(&host, lab.verified("2")).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DeadlineExceeded, "{error}");
    assert!(!lab.machine.bootc().is_hanging());
    assert_eq!((lab.staged(), lab.read().await.transaction), (None, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_lock_is_reported_and_not_awaited() {
    let lab = lab().await;
    lab.read().await;
    let moment = Duration::from_millis(300);
    let host = lab.hasty(|deadlines| deadlines.lock = moment);
    let hasty = Deadlines { lock: moment, ..Deadlines::default() };
    lab.machine.sysroot().set_locked(true);
    let began = Instant::now();
    let facts = host.read().await.unwrap();
    let active = facts.transaction.as_ref().unwrap();
    assert_eq!((active.title.as_str(), &active.ours), ("sysroot lock", &None));
    assert!(facts.booted().is_some(), "the last status is kept");
    let strangers =
        [stage(&host, lab.verified("2")).await.err(), another(&lab).with_deadlines(hasty).read().await.err()];
    for error in strangers.map(Option::unwrap) {
        assert!(matches!(&error, HostError::Busy(why) if why.contains("sysroot lock")), "{error}");
    }
    // A foreign lock is not cancelled.
    host.cancel_transaction().await.unwrap();
    assert!(lab.machine.sysroot().is_locked());
    assert!(began.elapsed() < Duration::from_secs(10) && !lab.machine.bootc().was_asked_while_locked());
    // A short lock is not reported.
    let (patient, sysroot) = (lab.host.clone(), lab.machine.sysroot());
    let reading = tokio::spawn(async move { patient.read().await });
    tokio::time::sleep(moment).await;
    assert!(!reading.is_finished());
    sysroot.set_locked(false);
    assert_eq!(reading.await.unwrap().unwrap().transaction, None);
    lab.stage("2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_taken_during_the_switch_is_awaited() {
    let lab = lab().await;
    let seen = lab.record();
    let sysroot = lab.machine.sysroot();
    // The lock is taken between the agent's look and bootc's own.
    lab.events.listen(move |event| {
        if matches!(event, Event::UnitStarted(_)) {
            sysroot.set_locked(true);
        }
    });
    let (host, image) = (lab.host.clone(), lab.verified("2"));
    let running = tokio::spawn(async move { stage(&host, image).await });
    until("bootc was started", || count(&seen, switched) == 1).await;
    let started = |event: &Event| matches!(event, Event::TransactionStarted { .. });
    assert_eq!(count(&seen, started), 0, "the switch waits");
    lab.machine.sysroot().set_locked(false);
    running.await.unwrap().unwrap();
    assert_eq!(count(&seen, started), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unusable_bootc_status_is_reported() {
    let lab = lab().await;
    let bootc = lab.machine.bootc();
    bootc.mute(true);
    let hasty = lab.hasty(|deadlines| deadlines.status = Duration::from_millis(300));
    let error = hasty.read().await.unwrap_err();
    assert_eq!(error.reason(), Reason::DeadlineExceeded, "{error}");
    bootc.mute(false);
    for (answer, words) in [
        (Vec::new(), "journalctl"),
        (b"{\"apiVersion\":".to_vec(), "unexpected"),
        (vec![b' '; 3 << 20], "more than"),
        (vec![0xff; 100], "unexpected"),
    ] {
        bootc.answer(Some(answer));
        let error = lab.host.read().await.unwrap_err();
        assert_eq!(error.reason(), Reason::HostConfused, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    let mut composefs = bootc.status();
    composefs["status"]["booted"]["ostree"] = serde_json::Value::Null;
    composefs["status"]["booted"]["composefs"] = serde_json::json!({ "verity": "x", "bootType": "Bls" });
    bootc.answer(Some(composefs.to_string().into_bytes()));
    assert!(matches!(lab.host.read().await.unwrap_err(), HostError::Composefs));
    bootc.answer(Some(br#"{"apiVersion":"org.containers.bootc/v1","status":{"type":null}}"#.to_vec()));
    assert!(matches!(lab.host.read().await.unwrap_err(), HostError::NotBootc));
    bootc.answer(None);
    std::fs::remove_file(lab.machine.root().join("run/rebase-agent/bootc-status.sock")).unwrap();
    let error = lab.host.read().await.unwrap_err();
    assert_eq!(error.reason(), Reason::HostUnreachable);
    assert!(error.to_string().contains("systemctl status rebase-agent-bootc-status.socket"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layered_packages_are_never_dropped_silently() {
    let lab = lab().await;
    lab.machine.sysroot().layer_packages(&["vim"]).unwrap();
    let seen = lab.record();
    assert!(lab.read().await.booted().unwrap().layered);
    let error = lab.stage("2").await.unwrap_err();
    assert_eq!(error.reason(), Reason::LayeredPackages, "{error}");
    assert_eq!((count(&seen, switched), lab.staged()), (0, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_that_bootc_lacks_are_refused_by_name() {
    let lab = lab().await;
    let seen = lab.record();
    let (_never, mut cancel) = never();
    let arguments = |list: &[&str]| list.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    let (append, delete) = (arguments(&["nosmt", "a=b"]), arguments(&["quiet"]));
    let error = lab.host.set_kernel_arguments(lab.verified("2"), &append, &delete, &mut cancel).await.unwrap_err();
    assert_eq!(error.reason(), Reason::KernelArgumentsUnsupported);
    let text = error.to_string();
    assert!(text.contains("bring `nosmt a=b` and drop `quiet`") && text.contains("/usr/lib/bootc/kargs.d"), "{text}");
    let error = lab.stage("long").await.unwrap_err();
    assert_eq!(error.reason(), Reason::ImageNameTooLong, "{error}");
    assert!(error.to_string().contains("255"), "{error}");
    assert!(lab.host.drop_pending("0", &mut cancel).await.is_err());
    assert_eq!(count(&seen, |event| matches!(event, Event::UnitStarted(_))), 0, "no unit was started");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_stage_and_queued_rollback_are_staged_over() {
    let lab = Lab::with(HostTools::Both, false).await;
    let host = lab.host.clone().with_backend(Some(rebase_agent::model::Backend::Bootc));
    lab.machine.human_stage(&lab.typed("3")).await.unwrap();
    until("rpm-ostreed has ended", || lab.machine.rpm_ostreed().active_transaction().is_none()).await;
    assert_eq!(host.read().await.unwrap().staged().unwrap().digest.as_ref().unwrap().as_str(), lab.digest("3"));
    stage(&host, lab.verified("2")).await.unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("2")));
    // The booted image is staged again, over the staged one.
    stage(&host, lab.verified("1")).await.unwrap();
    assert_eq!(lab.staged(), Some(lab.digest("1")));
    lab.machine.sysroot().drop_staged().unwrap();
    stage(&host, lab.verified("2")).await.unwrap();
    lab.machine.shut_down().await;
    lab.machine.power_on().await.unwrap();
    assert_eq!(host.read().await.unwrap().booted().unwrap().digest.as_ref().unwrap().as_str(), lab.digest("2"));
    lab.machine.bootc().human_rollback().unwrap();
    let facts = host.read().await.unwrap();
    assert!(!facts.deployments[0].booted && !facts.deployments[0].staged && facts.deployments[1].booted);
    stage(&host, lab.verified("3")).await.unwrap();
    assert_eq!(host.read().await.unwrap().deployments[0].digest.as_ref().unwrap().as_str(), lab.digest("3"));
}
