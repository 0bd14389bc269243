//! Units of systemd: states, jobs and aliases.

use std::time::Duration;

use rebase_agent::host::boot::Root;
use rebase_agent::host::{Host, HostError};
use rebase_agent::model::{Reason, UnitState};
use support::events::Event;

use crate::lab::{Lab, count, until};

const FINALIZER: &str = "ostree-finalize-staged.service";
const UPDATE: &str = "bootloader-update.service";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn job_may_be_removed_before_the_reply() {
    let lab = Lab::new().await;
    let seen = lab.record();
    for early in [true, false] {
        lab.machine.systemd().job_removed_early(early);
        for _ in 0..2 {
            lab.host.update_bootloader().await.unwrap();
        }
    }
    assert_eq!(count(&seen, |event| *event == Event::UnitStarted(UPDATE.to_owned())), 4);
    lab.host.start_finalizer().await.unwrap();
    assert_eq!(lab.host.read_machine().await.unwrap().finalizer, UnitState::Active);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_jobs_are_reported() {
    let lab = Lab::new().await;
    let systemd = lab.machine.systemd();
    for result in ["failed", "timeout", "canceled", "dependency", "skipped", "frozen"] {
        systemd.end_jobs(FINALIZER, Some(result));
        let error = lab.host.start_finalizer().await.unwrap_err();
        assert_eq!(error.reason(), Reason::UnitFailed);
        assert!(error.to_string().contains(&format!("{FINALIZER} ended with `{result}`")), "{error}");
    }
    systemd.end_jobs(FINALIZER, None);
    systemd.refuse_start(FINALIZER, Some("exit-code"));
    let error = lab.host.start_finalizer().await.unwrap_err();
    assert!(matches!(&error, HostError::Unit { result, .. } if result == "failed"), "{error}");
    assert_eq!(lab.host.read_machine().await.unwrap().finalizer, UnitState::Failed);
    systemd.uninstall(FINALIZER);
    let error = lab.host.start_finalizer().await.unwrap_err();
    assert!(matches!(&error, HostError::Unit { result, .. } if result == "NoSuchUnit"), "{error}");
    assert_eq!(lab.host.read_machine().await.unwrap().finalizer, UnitState::Absent);
    systemd.update(FINALIZER, |unit| "masked".clone_into(&mut unit.load));
    let error = lab.host.start_finalizer().await.unwrap_err();
    assert!(matches!(&error, HostError::Unit { result, .. } if result == "UnitMasked"), "{error}");
    assert_eq!(lab.host.read_machine().await.unwrap().finalizer, UnitState::Absent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unit_alias_is_followed() {
    let lab = Lab::new().await;
    let systemd = lab.machine.systemd();
    systemd.uninstall(UPDATE);
    systemd.alias(UPDATE, "loader-update.service");
    systemd.set("loader-update.service", "inactive", "dead");
    // The rows of a list and the signal at a job's end both use the unit's real name.
    for early in [true, false] {
        systemd.job_removed_early(early);
        let host = lab.hasty(|deadlines| deadlines.job = Duration::from_secs(5));
        host.update_bootloader().await.unwrap();
    }
    assert_eq!(systemd.started(), ["loader-update.service", "loader-update.service"]);
    assert_eq!(lab.host.read_machine().await.unwrap().bootloader_update, UnitState::Active);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unit_start_has_a_deadline() {
    let lab = Lab::new().await;
    lab.machine.systemd().on_start(UPDATE, std::future::pending::<Result<(), String>>);
    let host = lab.hasty(|deadlines| deadlines.job = Duration::from_millis(300));
    let error = host.update_bootloader().await.unwrap_err();
    assert_eq!(error.reason(), Reason::DeadlineExceeded);
    assert!(error.to_string().contains(UPDATE), "{error}");
    assert_eq!(lab.host.read_machine().await.unwrap().bootloader_update, UnitState::Activating);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_signal_ends_no_job() {
    let lab = Lab::new().await;
    let systemd = lab.machine.systemd();
    let go = std::sync::Arc::new(tokio::sync::Notify::new());
    let hook = go.clone();
    systemd.on_start(UPDATE, move || {
        let go = hook.clone();
        async move {
            go.notified().await;
            Ok(())
        }
    });
    let host = lab.host.clone();
    let running = tokio::spawn(async move { host.update_bootloader().await });
    until("the unit starts", || systemd.unit(UPDATE).unwrap().active == "activating").await;
    let stranger = zbus::connection::Builder::address(lab.machine.bus_address().as_str()).build().await.unwrap();
    for job in 0..20_u32 {
        let path = zbus::ObjectPath::try_from(format!("/org/freedesktop/systemd1/job/{job}")).unwrap();
        let manager = "org.freedesktop.systemd1.Manager";
        let body = (job, path, UPDATE, "failed");
        stranger.emit_signal(None::<&str>, "/org/freedesktop/systemd1", manager, "JobRemoved", &body).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!running.is_finished());
    go.notify_one();
    running.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_versions_of_systemd_are_read_the_same() {
    let lab = Lab::new().await;
    let systemd = lab.machine.systemd();
    until("kubelet", || systemd.unit("kubelet.service").unwrap().active == "active").await;
    until("the agent", || systemd.unit("rebase-agent.service").unwrap().active == "activating").await;
    systemd.fail("ostree-boot-complete.service", "exit-code");
    for version in ["252-51.el9", "257.3-1.el10"] {
        systemd.set_version(version);
        let facts = lab.host.read_machine().await.unwrap();
        assert_eq!((facts.kubelet, facts.finalizer), (UnitState::Active, UnitState::Inactive), "{version}");
        assert!(facts.finalize_failed);
        assert_eq!(facts.boot_id.0, lab.machine.boot_id());
        let (_, active) = lab.host.service_status().await.unwrap();
        assert_eq!(active, "activating");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_bus_is_reported() {
    let lab = Lab::new().await;
    let host = Host::new(Root::new(lab.machine.root()), Some("unix:path=/nowhere/bus".to_owned()));
    let reboot = host.reboot(lab.verified("2")).await;
    for error in [host.read().await.err(), host.read_machine().await.err(), reboot.err()] {
        let error = error.unwrap();
        assert_eq!(error.reason(), Reason::HostUnreachable);
        assert!(error.to_string().contains("dbus.socket"), "{error}");
    }
}
