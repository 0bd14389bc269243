//! Classifying a failed transaction by the daemon's text.

use rebase_agent::model::{Fault, Reason, Severity};
use support::image::digest;
use support::machine::Engine;
use support::policy::{Policy, RegistriesD, Requirement};
use support::sign::{KeyKind, Signer};

use crate::lab::{Lab, stage};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_of_a_real_pull_are_classified() {
    let lab = Lab::new().await;
    let (daemon, store) = (lab.machine.rpm_ostreed(), lab.store);
    let dir = tempfile::tempdir().unwrap();
    let reason = async |image: &str| {
        let error = lab.stage(image).await.unwrap_err();
        assert_eq!(lab.staged(), None);
        (error.reason(), error.to_string())
    };

    // The pull's policy names another key than the agent's.
    let stranger = dir.path().join("stranger.pub");
    Signer::generate(KeyKind::P256).write_public(&stranger).unwrap();
    let stricter = dir.path().join("stricter.json");
    let demanded = [Requirement::sigstore_key_path(&stranger)];
    Policy::accept_by_default().scope(&store.scope, demanded).write(&stricter).unwrap();
    daemon.set_engine(Engine { policy: stricter, ..store.engine.clone() });
    let (found, text) = reason("2").await;
    assert_eq!(found, Reason::SignatureRejected, "{text}");

    // The pull does not know where the signatures are.
    let without = dir.path().join("registries.d");
    RegistriesD::new().attachments(&store.scope, false).write(&without.join("os.yaml")).unwrap();
    daemon.set_engine(Engine { registries_d: without, ..store.engine.clone() });
    let (found, text) = reason("2").await;
    assert_eq!(found, Reason::SignatureMissing, "{text}");

    daemon.set_engine(store.engine.clone());
    let (found, text) = reason("unbootable").await;
    assert_eq!(found, Reason::NotBootable, "{text}");

    // The image was deleted between verification and pull.
    let (found, text) = reason("gone").await;
    assert_eq!(found, Reason::RegistryUnreachable, "{text}");

    // The pull runs without the registry's CA.
    daemon.set_engine(Engine { cert_dir: dir.path().to_owned(), ..store.engine.clone() });
    let (found, text) = reason("2").await;
    assert_eq!(found, Reason::RegistryUnreachable, "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_known_only_by_their_text_are_classified() {
    let lab = Lab::new().await;
    let twice = "Creating importer: failed to invoke method OpenImage: failed to invoke method OpenImage: ";
    for (text, reason) in [
        ("Importing: Writing content object: No space left on device".to_owned(), Reason::DiskFull),
        ("min-free-space-percent '3%' would be exceeded, at least 1 MB requested".to_owned(), Reason::DiskFull),
        ("Operation was cancelled".to_owned(), Reason::Cancelled),
        (format!("{twice}reading manifest {} in q.io/o: manifest unknown", digest(b"x")), Reason::ManifestMissing),
        (format!("{twice}unable to retrieve auth token: invalid username/password"), Reason::RegistryDenied),
        (format!("{twice}pinging container registry q.io: Get \"https://q.io/v2/\": EOF"), Reason::RegistryUnreachable),
        ("something new".to_owned(), Reason::StageFailed),
        (String::new(), Reason::StageFailed),
    ] {
        lab.machine.rpm_ostreed().fail_next(text.clone());
        let error = lab.stage("2").await.unwrap_err();
        assert_eq!(error.reason(), reason, "{text}: {error}");
    }
    // The daemon refuses to register the client as well; reading still works.
    lab.machine.rpm_ostreed().distrust(true);
    lab.read().await;
    let error = lab.stage("2").await.unwrap_err();
    assert!(error.reason().severity() == Severity::Fatal && error.to_string().contains("uid 0"), "{error}");
    assert!(error.to_string().contains("rpmostreed OS operation Rebase not allowed for user"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_error_is_bounded_and_printable() {
    let lab = Lab::new().await;
    lab.machine.rpm_ostreed().fail_next(format!("\u{1b}[2J{}", "x\n".repeat(50_000)));
    let error = stage(&lab.host, lab.verified("2")).await.unwrap_err();
    let message = Fault::from(&error).message;
    assert!(message.chars().count() < 600, "{}", message.len());
    assert!(!message.chars().any(char::is_control), "{message}");
}
