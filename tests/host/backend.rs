//! The choice of the host tool.

use rebase_agent::host::{Host, HostError};
use rebase_agent::model::{Backend, Reason, Severity};
use support::bootc::STATUS_UNIT;
use support::machine::HostTools;

use crate::lab::Lab;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn installed_host_tool_is_used() {
    for (tools, backend, why) in [
        (HostTools::RpmOstree, Backend::RpmOstree, "on the system bus"),
        (HostTools::Bootc, Backend::Bootc, "rpm-ostree is not on the system bus"),
        (HostTools::Both, Backend::RpmOstree, "both tools are installed"),
    ] {
        let lab = Lab::with(tools, false).await;
        let chosen = lab.host.backend().await.unwrap();
        assert_eq!(chosen.backend, backend, "{tools:?}");
        assert!(chosen.why.contains(why), "{}", chosen.why);
        assert_eq!(lab.read().await.backend, backend);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn masked_daemon_counts_as_absent() {
    let lab = Lab::with(HostTools::Both, false).await;
    lab.machine.systemd().update("rpm-ostreed.service", |unit| "masked".clone_into(&mut unit.load));
    assert_eq!(lab.host.backend().await.unwrap().backend, Backend::Bootc);
    assert_eq!(lab.read().await.backend, Backend::Bootc);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn configured_host_tool_is_used() {
    let lab = Lab::with(HostTools::Both, false).await;
    let host = lab.host.clone().with_backend(Some(Backend::Bootc));
    let (rpm_ostree, bootc) = (lab.read().await, host.read().await.unwrap());
    assert_eq!((rpm_ostree.backend, bootc.backend), (Backend::RpmOstree, Backend::Bootc));
    // Both tools report the same host.
    let told = |facts: rebase_agent::model::HostFacts| {
        let mut booted = facts.booted().unwrap().clone();
        booted.version = None;
        booted
    };
    assert_eq!(told(rpm_ostree), told(bootc));
    assert_eq!(host.backend().await.unwrap().why, "it is set with --backend");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_without_either_tool_reports_what_is_missing() {
    let lab = Lab::with(HostTools::Bootc, false).await;
    lab.machine.systemd().set(STATUS_UNIT, "inactive", "dead");
    let error = lab.host.read().await.unwrap_err();
    assert!(matches!(&error, HostError::NoBackend(_)), "{error}");
    assert_eq!(error.reason(), Reason::HostUnsupported);
    assert!(error.to_string().contains("systemctl enable --now rebase-agent-bootc-status.socket"), "{error}");
    // The agent looks again until it finds a host tool.
    lab.machine.systemd().set(STATUS_UNIT, "active", "listening");
    lab.read().await;
    std::fs::remove_file(lab.machine.root().join("usr/bin/bootc")).unwrap();
    let other = Host::new(lab.host.root().clone(), Some(lab.machine.bus_address()));
    let error = other.read().await.unwrap_err();
    assert!(error.to_string().contains("/usr/bin/bootc"), "{error}");
    assert!(lab.host.read().await.is_ok(), "the choice is kept as long as the process runs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unsupported_hosts_are_distinguished() {
    let lab = Lab::with(HostTools::Bootc, false).await;
    let root = lab.machine.root();
    std::fs::remove_file(root.join("run/ostree-booted")).unwrap();
    let error = lab.host.read().await.unwrap_err();
    assert!(matches!(error, HostError::NotImageMode), "{error}");
    std::fs::write(root.join("proc/cmdline"), format!("rw composefs={}\n", "c".repeat(128))).unwrap();
    let error = lab.host.read().await.unwrap_err();
    assert!(matches!(error, HostError::Composefs) && error.reason().severity() == Severity::Fatal, "{error}");
    assert_eq!(error.reason(), Reason::HostUnsupported);
}
