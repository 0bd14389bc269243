//! Deployments as the daemon reports them.

use rebase_agent::host::HostError;
use rebase_agent::model::Reason;
use rebase_agent::model::is_image;
use support::events::Event;
use support::rpmostreed::Version;
use zbus::{ObjectPath, Variant};

use crate::lab::{Dict, Lab, dict};

const HEX: &str = "0f0e0d0c0b0a09080706050403020100f0e0d0c0b0a090807060504030201000";

fn entry(id: &'static str, more: Vec<(&'static str, Variant<'static>)>) -> Dict {
    let mut entries = vec![("id", id.into()), ("osname", "rhcos".into()), ("checksum", "abc".into())];
    entries.extend(more);
    dict(entries)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_and_mistyped_keys_count_as_absent() {
    let lab = Lab::new().await;
    let daemon = lab.machine.rpm_ostreed();
    let mistyped = entry(
        "rhcos-abc.1",
        vec![
            ("booted", "true".into()),
            ("staged", 1_u32.into()),
            ("pinned", "x".into()),
            ("version", true.into()),
            ("base-commit-meta", "no dictionary".into()),
            ("container-image-reference", 5_i32.into()),
            ("container-image-reference-digest", "sha256:short".into()),
        ],
    );
    daemon.show("Deployments", vec![entry("rhcos-abc.0", Vec::new()), mistyped]);
    let facts = lab.read().await;
    assert_eq!(facts.deployments.len(), 2);
    for deployment in &facts.deployments {
        assert!(!deployment.booted && !deployment.staged && !deployment.pinned && !deployment.layered);
        assert_eq!((&deployment.reference, &deployment.digest, &deployment.version), (&None, &None, &None));
    }
    // A deployment without a name cannot be skipped: the whole answer is rejected.
    daemon.show("Deployments", vec![dict(vec![("id", 1_u32.into())])]);
    assert_eq!(lab.host.read().await.unwrap_err().reason(), Reason::HostConfused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stateroots_pins_layers_and_digests_are_distinguished() {
    let lab = Lab::new().await;
    let digest = format!("sha256:{HEX}");
    let layered = entry("rhcos-abc.2", vec![("requested-packages", vec!["vim"].into()), ("booted", true.into())]);
    let elsewhere = dict(vec![("id", "fedora-def.0".into()), ("osname", "fedora".into()), ("checksum", "def".into())]);
    let pinned = entry("rhcos-abc.3", vec![("pinned", true.into())]);
    let metadata = dict(vec![("ostree.manifest-digest", digest.clone().into())]);
    // The first digest is damaged; the commit's metadata has the same digest.
    let from_metadata = entry(
        "rhcos-abc.4",
        vec![
            ("container-image-reference-digest", "damaged".into()),
            ("container-image-reference", "ostree-image-signed:docker://quay.io/o/i:latest".into()),
            ("base-commit-meta", metadata.into()),
        ],
    );
    let list = vec![layered, elsewhere, pinned, from_metadata];
    lab.machine.rpm_ostreed().show("Deployments", list);
    let facts = lab.read().await;
    assert!(facts.booted().unwrap().layered);
    assert_eq!(facts.rollback().unwrap().id, "rhcos-abc.3", "a deployment of another stateroot is no rollback");
    assert!(facts.rollback().unwrap().pinned);
    let last = &facts.deployments[3];
    assert_eq!(last.digest.as_ref().unwrap().as_str(), digest);
    assert_eq!(last.reference.as_deref(), Some("quay.io/o/i:latest"));
    let image = rebase_agent::trust::reference::parse(&format!("quay.io/other/name@{digest}")).unwrap();
    assert!(is_image(last, &image, None), "the digest counts, not the name");
    assert!(!is_image(&facts.deployments[2], &image, None), "a deployment without a digest matches no image");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn index_is_recognized_by_its_instance() {
    let lab = Lab::new().await;
    lab.stage("index").await.unwrap();
    let image = lab.verified("index");
    assert_ne!(image.facts().instance, *image.image().digest());
    let mut staged = lab.read().await.staged().unwrap().clone();
    assert_eq!(staged.digest.as_ref(), Some(&image.facts().instance));
    assert!(!is_image(&staged, image.image(), None), "the reference proves nothing before the index is verified");
    staged.reference = Some("quay.io/o/i:latest".to_owned());
    assert!(is_image(&staged, image.image(), Some(image.facts())), "the verified instance matches");
    assert!(!is_image(&staged, image.image(), None), "an unverified instance does not match");
    // The image is staged already: no rebase is requested.
    let seen = lab.record();
    lab.stage("index").await.unwrap();
    assert!(seen.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_megabytes_of_metadata_and_two_hundred_deployments_are_read() {
    let lab = Lab::new().await;
    let digest = format!("sha256:{HEX}");
    let metadata = dict(vec![
        ("ostree.manifest-digest", digest.clone().into()),
        ("ostree.container.image-config", format!("{{\"x\":\"{}\"}}", "x".repeat(10 << 20)).into()),
    ]);
    let mut list = vec![entry("rhcos-abc.0", vec![("booted", true.into()), ("base-commit-meta", metadata.into())])];
    list.extend((1..200).map(|_| entry("rhcos-abc.1", Vec::new())));
    lab.machine.rpm_ostreed().show("Deployments", list);
    let facts = lab.read().await;
    assert_eq!(facts.deployments.len(), 200);
    let booted = facts.booted().unwrap();
    assert_eq!(booted.digest.as_ref().unwrap().as_str(), digest);
    assert_eq!(booted.rendered_config, None, "a document of that size is not parsed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_may_have_no_deployments_or_no_booted_one() {
    let lab = Lab::new().await;
    let daemon = lab.machine.rpm_ostreed();
    daemon.show("Deployments", Vec::<Dict>::new());
    let facts = lab.read().await;
    assert!(facts.deployments.is_empty() && facts.booted().is_none() && facts.rollback().is_none());
    daemon.show("Booted", Variant::from(ObjectPath::try_from("/").unwrap()));
    assert!(matches!(lab.host.read().await.unwrap_err(), HostError::NotImageMode));
    std::fs::remove_file(lab.machine.root().join("run/ostree-booted")).unwrap();
    assert!(matches!(lab.host.read().await.unwrap_err(), HostError::NotImageMode));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_of_a_wrong_type_are_reported_as_host_confused() {
    for (property, value) in [
        ("Deployments", Variant::from("none")),
        ("Deployments", Variant::from(vec![1_u32])),
        ("Booted", Variant::from(true)),
        ("ActiveTransactionPath", Variant::from("tcp:host=203.0.113.1,port=1")),
        ("ActiveTransactionPath", Variant::from("unixexec:path=/bin/false")),
    ] {
        let lab = Lab::new().await;
        lab.machine.rpm_ostreed().show(property, value);
        let error = lab.host.read().await.unwrap_err();
        assert_eq!(error.reason(), Reason::HostConfused, "{property}: {error}");
    }
    let lab = Lab::new().await;
    lab.machine.rpm_ostreed().show("ActiveTransaction", 3_u32);
    lab.machine.rpm_ostreed().show("ActiveTransactionPath", 3_u32);
    assert_eq!(lab.read().await.transaction, None);
    lab.machine.rpm_ostreed().answer_garbage(true);
    let error = lab.stage("2").await.unwrap_err();
    assert_eq!(error.reason(), Reason::HostConfused, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn demanded_arguments_may_be_missing_huge_or_malformed() {
    let lab = Lab::new().await;
    let booted = lab.machine.booted().unwrap();
    let path = lab.machine.sysroot().tree(&booted).join("usr/etc/machine-config-daemon/currentconfig");
    let wanted = async || lab.read().await.booted().unwrap().wanted_arguments.clone();
    let fault = async || lab.read().await.booted().unwrap().config_fault.clone().unwrap_or_default();
    assert_eq!(wanted().await, Some(Vec::new()));
    std::fs::write(&path, r#"{"spec":{"kernelArguments":["a=b c","d"]}}"#).unwrap();
    assert_eq!(wanted().await.unwrap(), ["a=b", "c", "d"]);
    std::fs::write(&path, "no json").unwrap();
    assert_eq!(wanted().await, None);
    assert!(fault().await.contains("currentconfig of"), "{}", fault().await);
    std::fs::write(&path, format!(r#"{{"spec":{{"x":"{}"}}}}"#, "x".repeat(17 << 20))).unwrap();
    assert_eq!(wanted().await, None);
    assert!(fault().await.contains("longer than"), "{}", fault().await);
    std::fs::remove_file(&path).unwrap();
    assert_eq!((wanted().await, fault().await), (None, String::new()));
    // Opening a pipe would wait for a writer.
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    assert_eq!(wanted().await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locked_stage_is_reported_and_counts_as_staged() {
    let lab = Lab::new().await;
    lab.machine.rpm_ostreed().human_stage_locked(&lab.typed("2")).await.unwrap();
    lab.idle().await;
    let staged = lab.read().await.staged().unwrap().clone();
    assert!(staged.locked);
    // The reboot unlocks it, also if a person locked it.
    lab.stage("2").await.unwrap();
    assert_eq!(lab.read().await.staged(), Some(&staged));
}

/// logind would boot the old image, after the drain.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locked_stage_without_a_digest_is_not_rebooted_into_by_logind() {
    let lab = Lab::new().await;
    let reference = lab.typed("2");
    let staged = entry(
        "rhcos-abc.0",
        vec![
            ("staged", true.into()),
            ("finalization-locked", true.into()),
            ("container-image-reference", reference.into()),
        ],
    );
    lab.machine.rpm_ostreed().show("Deployments", vec![staged]);
    let facts = lab.read().await;
    assert!(facts.staged().is_some_and(|staged| staged.locked && staged.digest.is_none()));
    let seen = lab.record();
    let error = lab.host.reboot(lab.verified("2")).await.unwrap_err();
    assert_eq!(error.reason(), Reason::RebootRefused, "{error}");
    assert!(!seen.lock().unwrap().iter().any(|event| matches!(event, Event::RebootAccepted)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pending_deployment_first_in_boot_order_is_reported_and_dropped() {
    let lab = Lab::new().await;
    let (_never, mut cancel) = crate::lab::never();
    lab.machine.rpm_ostreed().set_version(Version::WithoutLock);
    lab.stage("2").await.unwrap();
    assert!(lab.machine.shut_down().await);
    lab.machine.power_on().await.unwrap();
    // A manual `rpm-ostree rollback`.
    lab.machine.sysroot().turn_boot_order().unwrap();
    let facts = lab.read().await;
    let first = facts.deployments[0].clone();
    assert!(!first.booted && !first.staged && facts.deployments[1].booted);
    assert_eq!(first.digest.unwrap().as_str(), lab.digest("1"));
    lab.host.drop_pending(&first.checksum, &mut cancel).await.unwrap();
    let facts = lab.read().await;
    assert!(facts.deployments[0].booted && facts.deployments.len() == 1);
    // The booted deployment is never dropped.
    lab.host.drop_pending(&facts.deployments[0].checksum, &mut cancel).await.unwrap();
}
