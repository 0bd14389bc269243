//! Kernel arguments of the staged deployment.

use rebase_agent::model::Reason;
use support::events::Event;
use support::rpmostreed::Version;

use crate::lab::{Lab, never};

fn list(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|&argument| argument.to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kernel_arguments_reach_the_next_boot() {
    let lab = Lab::new().await;
    // Without a lock, the shutdown boots it.
    lab.machine.rpm_ostreed().set_version(Version::WithoutLock);
    lab.stage("3").await.unwrap();
    let staged = lab.read().await.staged().unwrap().clone();
    assert_eq!(staged.wanted_arguments.unwrap(), ["nosmt", "a=b"]);
    assert_eq!(staged.arguments.unwrap()[..3], ["root=UUID=0a1b", "rw", "console=ttyS0"]);
    let seen = lab.record();
    let (_never, mut cancel) = never();
    let (append, delete) = (list(&["nosmt", "a=b"]), list(&["console=ttyS0"]));
    lab.host.set_kernel_arguments(lab.verified("3"), &append, &delete, &mut cancel).await.unwrap();
    let asked = seen.lock().unwrap().iter().find_map(|event| match event {
        Event::TransactionRequested { method, argument } => Some((method.clone(), argument.clone())),
        _ => None,
    });
    assert_eq!(asked.unwrap(), ("kernel-args".to_owned(), "=[root=UUID=0a1b rw nosmt a=b]".to_owned()));
    let staged = lab.read().await.staged().unwrap().clone();
    assert_eq!(staged.digest.unwrap().as_str(), lab.digest("3"), "the image is still the same");
    assert_eq!(staged.arguments.unwrap()[..4], ["root=UUID=0a1b", "rw", "nosmt", "a=b"]);
    assert!(lab.machine.shut_down().await);
    lab.machine.power_on().await.unwrap();
    let line = lab.host.read_machine().await.unwrap().command_line;
    assert!(line.contains(&"nosmt".to_owned()) && !line.contains(&"console=ttyS0".to_owned()), "{line:?}");
    assert_eq!(lab.machine.booted().unwrap().digest, lab.digest("3"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_kernel_arguments_keep_the_deployment_locked() {
    let lab = Lab::new().await;
    lab.stage("2").await.unwrap();
    let (_never, mut cancel) = never();
    lab.host.set_kernel_arguments(lab.verified("2"), &list(&["nosmt"]), &[], &mut cancel).await.unwrap();
    let staged = lab.read().await.staged().unwrap().clone();
    assert!(staged.locked && staged.arguments.unwrap().contains(&"nosmt".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kernel_arguments_that_cannot_be_changed_are_reported() {
    let lab = Lab::new().await;
    let (_never, mut cancel) = never();
    let mut set = async |append: &[&str], delete: &[&str]| {
        lab.host.set_kernel_arguments(lab.verified("2"), &list(append), &list(delete), &mut cancel).await
    };
    let error = set(&["x"], &[]).await.unwrap_err();
    assert!(error.to_string().contains("the image is not staged any more"), "{error}");
    lab.stage("3").await.unwrap();
    let error = set(&["x"], &[]).await.unwrap_err();
    assert!(error.to_string().contains("the image is not staged any more"), "{error}");
    lab.stage("2").await.unwrap();
    // MCO has the same rule: `--delete-if-present`.
    set(&[], &["never-there"]).await.unwrap();
    let error = set(&["a=\"b"], &[]).await.unwrap_err();
    assert!(error.to_string().contains("an unclosed quote"), "{error}");
    lab.machine.rpm_ostreed().no_change_next();
    let error = set(&["x"], &[]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::HostConfused, "{error}");
    lab.machine.rpm_ostreed().crash_at("Staging");
    assert_eq!(set(&["x"], &[]).await.unwrap_err().reason(), Reason::HostUnreachable);
    set(&["x"], &[]).await.unwrap();
}

/// `ostree admin deploy --stage` records no arguments. The host stays readable; the deployment cannot be edited, so it
/// is dropped and staged again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn staged_deployment_without_options_does_not_hide_the_others() {
    let lab = Lab::new().await;
    lab.stage("3").await.unwrap();
    lab.machine.sysroot().forget_staged_arguments().unwrap();
    let staged = lab.read().await.staged().unwrap().clone();
    assert_eq!(staged.arguments, None);
    let (_never, mut cancel) = never();
    let error = lab.host.set_kernel_arguments(lab.verified("3"), &list(&["x"]), &[], &mut cancel).await.unwrap_err();
    assert!(error.to_string().contains("so it was dropped and will be staged again"), "{error}");
    assert!(lab.read().await.staged().is_none());
    assert!(lab.machine.rpm_ostreed().is_running());
}

/// Of two equal arguments the platform's comes first and stays in its place; spaces and quotes are kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_repetition_and_quotes_reach_the_next_boot() {
    let lab = Lab::new().await;
    lab.machine.rpm_ostreed().set_version(Version::WithoutLock);
    lab.stage("2").await.unwrap();
    let (_never, mut cancel) = never();
    let mut set = async |append: &[&str], delete: &[&str]| {
        lab.host.set_kernel_arguments(lab.verified("2"), &list(append), &list(delete), &mut cancel).await.unwrap();
    };
    set(&["console=tty0", "console=ttyS0", "dyndbg=\"file a.c +p; file b.c +p\"", "x=a=b", "empty="], &[]).await;
    set(&["hugepagesz=1G", "hugepages=4", "hugepagesz=2M", "hugepages=4"], &["console=ttyS0", "empty="]).await;
    assert!(lab.machine.shut_down().await);
    lab.machine.power_on().await.unwrap();
    let expected = [
        "root=UUID=0a1b",
        "rw",
        "console=ttyS0",
        "console=tty0",
        "dyndbg=\"file a.c +p; file b.c +p\"",
        "x=a=b",
        "hugepagesz=1G",
        "hugepages=4",
        "hugepagesz=2M",
        "hugepages=4",
    ];
    let line = lab.host.read_machine().await.unwrap().command_line;
    assert_eq!(line[1..line.len() - 1], expected, "{line:?}");
    let entry = lab.read().await.booted().unwrap().arguments.clone().unwrap();
    assert_eq!(entry[..entry.len() - 1], expected, "the arguments come from the boot entry");
}
