//! Reboots and inhibitors.

use std::time::Duration;

use rebase_agent::host::HostError;
use rebase_agent::model::{Reason, Severity};
use support::logind::Inhibitor;

use crate::lab::Lab;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reboot_is_announced_and_may_be_repeated() {
    let lab = Lab::new().await;
    let logind = lab.machine.logind();
    // The machine itself stays up, so that later calls are answered.
    logind.on_reboot(|| {});
    assert!(!lab.host.read_machine().await.unwrap().shutting_down);
    lab.host.reboot(lab.verified("2")).await.unwrap();
    let told = format!("rebooting into the desired OS image {}", lab.verified("2").image().digest().short());
    assert_eq!(logind.wall_message(), Some((told, true)));
    assert!(lab.host.read_machine().await.unwrap().shutting_down);
    // logind answers OperationInProgress, and a new inhibitor comes too late.
    lab.host.reboot(lab.verified("2")).await.unwrap();
    logind.add_inhibitor(Inhibitor::block("backup", "x"));
    lab.host.reboot(lab.verified("2")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn running_suspend_is_not_a_reboot() {
    let lab = Lab::new().await;
    let logind = lab.machine.logind();
    logind.on_reboot(|| {});
    logind.suspend(true);
    for overrides in [true, false] {
        logind.root_overrides_inhibitors(overrides);
        let error = lab.host.reboot(lab.verified("2")).await.unwrap_err();
        assert!(matches!(&error, HostError::Reboot(why) if why.contains("in progress")), "{error}");
    }
    assert!(!lab.host.read_machine().await.unwrap().shutting_down);
    logind.suspend(false);
    lab.host.reboot(lab.verified("2")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_reply_of_an_accepted_reboot_is_success() {
    let lab = Lab::new().await;
    let logind = lab.machine.logind();
    logind.on_reboot(|| {});
    logind.lose_reboot_reply();
    let host = lab.hasty(|deadlines| deadlines.call = Duration::from_millis(300));
    host.reboot(lab.verified("2")).await.unwrap();
    assert!(logind.preparing_for_shutdown());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inhibitors_apply_with_either_semantics() {
    let lab = Lab::new().await;
    let logind = lab.machine.logind();
    logind.on_reboot(|| {});
    let hostile = Inhibitor::block("backup\u{1b}[2J", &"why ".repeat(1000));
    logind.add_inhibitor(Inhibitor { what: "sleep".to_owned(), ..Inhibitor::block("lid", "x") });
    logind.add_inhibitor(Inhibitor { mode: "delay".to_owned(), ..Inhibitor::block("kubelet", "x") });
    logind.add_inhibitor(Inhibitor { mode: "block-weak".to_owned(), ..Inhibitor::block("desktop", "x") });
    assert!(lab.host.read_machine().await.unwrap().inhibitors.is_empty());
    logind.add_inhibitor(Inhibitor { what: "idle:shutdown".to_owned(), ..hostile });
    // systemd 252 lets root override the inhibitor; the agent does not.
    for overrides in [true, false] {
        logind.root_overrides_inhibitors(overrides);
        let seen = lab.host.read_machine().await.unwrap().inhibitors;
        assert_eq!(seen.len(), 1);
        assert!(seen[0].who.starts_with("backup\\u{1b}") && seen[0].why.chars().count() <= 200, "{seen:?}");
        let error = lab.host.reboot(lab.verified("2")).await.unwrap_err();
        assert!(matches!(&error, HostError::Reboot(why) if why.contains("backup")), "{error}");
        assert!(!logind.preparing_for_shutdown());
    }
    logind.remove_inhibitor("backup\u{1b}[2J");
    lab.host.reboot(lab.verified("2")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_reboot_and_silent_logind_are_distinguished() {
    let lab = Lab::new().await;
    let logind = lab.machine.logind();
    for name in [
        "org.freedesktop.DBus.Error.AccessDenied",
        "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
        "org.freedesktop.login1.BlockedByInhibitorLock",
        "org.freedesktop.login1.SomethingNew",
    ] {
        logind.refuse_reboot(Some((name, "not now")));
        let error = lab.host.reboot(lab.verified("2")).await.unwrap_err();
        assert_eq!(error.reason(), Reason::RebootRefused, "{name}: {error}");
        assert!(error.reason().severity() == Severity::Transient && error.to_string().contains("not now"), "{error}");
    }
}
