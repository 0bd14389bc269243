//! The agent as a process while its inputs change: the files that decide about signatures, and the deployments.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::disallowed_methods, reason = "tests may make calls that the agent must not")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use support::events::Event;
use support::image::Pushed;
use support::mcc::{PREFIX, annotation};
use support::policy::{Policy, RegistriesD, Requirement};
use support::sign::{KeyKind, Signer};
use support::world::{NODE, World, WorldOptions};

const HOLD: &str = "rebase-agent.openshift.io/hold";
const ATTEMPT: &str = "rebase-agent.openshift.io/attempt";

/// A node that is Done on the installed image, has another one staged, and is held.
struct Held {
    world: World,
    image: Pushed,
    seen: Arc<Mutex<Vec<Event>>>,
    /// The digest that was staged at each drain request.
    staged_at_drain: Arc<Mutex<Vec<Option<String>>>>,
}

impl Held {
    async fn new() -> Self {
        let world = settled(&[]).await;
        let (seen, staged_at_drain) = (Arc::<Mutex<Vec<Event>>>::default(), Arc::<Mutex<Vec<_>>>::default());
        let (all, drains, machine) = (seen.clone(), staged_at_drain.clone(), world.machine.clone());
        world.events.listen(move |event| {
            all.lock().unwrap().push(event.clone());
            if wrote(event, &format!("{PREFIX}desiredDrain"), "drain-") {
                let staged = machine.deployments().into_iter().find(|deployment| deployment.staged);
                drains.lock().unwrap().push(staged.map(|staged| staged.digest));
            }
        });
        world.store().annotate("kubectl-annotate", NODE, HOLD, Some("not tonight")).unwrap();
        let image = world.signed("2").await.unwrap();
        world.target("2", &image);
        world.wait_reason("Held").await.unwrap();
        Self { world, image, seen, staged_at_drain }
    }

    fn go_on(&self) {
        self.world.store().annotate("kubectl-annotate", NODE, HOLD, None).unwrap();
    }

    fn count(&self, choose: impl Fn(&Event) -> bool) -> usize {
        self.seen.lock().unwrap().iter().filter(|event| choose(event)).count()
    }

    fn said(&self, words: &str) -> usize {
        self.count(|event| matches!(event, Event::AgentLine(line) if line.contains(words)))
    }

    fn files(&self) -> Files {
        let path = self.world.path().to_owned();
        Files { scope: format!("{}/example", self.world.registry.host()), path }
    }

    /// Waits until the node is refused for `word`; checks that it is schedulable and was not rebooted.
    async fn refused(&self, word: &str) {
        let given_back = |node: &Value| {
            annotation(node, "reason").is_some_and(|reason| reason.starts_with(word))
                && annotation(node, "state") == Some("Degraded")
                && node["spec"]["unschedulable"] != true
        };
        if let Err(error) = self.world.wait(word, given_back).await {
            panic!("{error:#}\n{:#?}", self.seen.lock().unwrap());
        }
        assert_eq!(self.count(|event| matches!(event, Event::RebootAccepted | Event::Booted { .. })), 0);
        assert_eq!(self.world.machine.booted().unwrap().digest, self.world.installed.digest);
    }

    async fn arrives(&self) {
        if let Err(error) = self.world.wait_done(&self.image).await {
            panic!("{error:#}\n{:#?}", self.seen.lock().unwrap());
        }
        assert_eq!(self.count(|event| matches!(event, Event::Booted { .. })), 1);
    }
}

/// A node that is Done on the installed image.
async fn settled(env: &[(&str, &str)]) -> World {
    let mut options = WorldOptions::new(Path::new(env!("CARGO_BIN_EXE_rebase-agent-under-test")));
    options.env.extend(env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let world = World::new(options).await.unwrap();
    world.target("1", &world.installed);
    world.machine.power_on().await.unwrap();
    world.wait_installed().await.unwrap();
    world
}

fn wrote(event: &Event, key: &str, prefix: &str) -> bool {
    matches!(event, Event::NodeChanged { manager, changes, .. } if manager == "rebase-agent"
        && changes.get(key).is_some_and(|value| value.as_deref().is_some_and(|value| value.starts_with(prefix))))
}

/// The files that decide about signatures on this node.
struct Files {
    scope: String,
    path: PathBuf,
}

impl Files {
    fn policy(&self) -> PathBuf {
        self.path.join("containers/policy.json")
    }

    /// A policy that demands a key which signed none of the images.
    fn stranger(&self) -> Policy {
        let key = self.path.join("stranger.pub");
        Signer::generate(KeyKind::P256).write_public(&key).unwrap();
        Policy::accept_by_default().scope(&self.scope, [Requirement::sigstore_key_path(&key)])
    }
}

/// Replaces `path` by a file that `write` writes, and keeps the old modification time.
fn replace(path: &Path, write: impl Fn(&Path)) {
    let new = path.with_extension("new");
    write(&new);
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    File::options().append(true).open(&new).unwrap().set_modified(modified).unwrap();
    fs::rename(&new, path).unwrap();
    assert_eq!(fs::metadata(path).unwrap().modified().unwrap(), modified);
}

// --- trust ------------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn image_is_verified_against_a_policy_rewritten_after_staging() {
    let held = Held::new().await;
    let files = held.files();
    files.stranger().write(&files.policy()).unwrap();
    held.go_on();
    held.refused("SignatureRejected").await;
    assert_eq!(held.staged_at_drain.lock().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policy_replaced_with_its_old_mtime_is_noticed() {
    let held = Held::new().await;
    let files = held.files();
    replace(&files.policy(), |new| files.stranger().write(new).unwrap());
    held.go_on();
    held.refused("SignatureRejected").await;
    assert_eq!(held.staged_at_drain.lock().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn key_file_replaced_with_its_old_mtime_is_noticed() {
    let held = Held::new().await;
    replace(&held.world.path().join("os.pub"), |new| Signer::generate(KeyKind::P256).write_public(new).unwrap());
    held.go_on();
    held.refused("SignatureRejected").await;
    assert_eq!(held.staged_at_drain.lock().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changed_file_in_registries_d_is_noticed() {
    let held = Held::new().await;
    let files = held.files();
    let directory = files.path.join("containers/registries.d");
    replace(&directory.join("os.yaml"), |new| {
        RegistriesD::new().attachments(&files.scope, false).write(new).unwrap();
    });
    held.go_on();
    held.refused("SignatureMissing").await;
    assert_eq!(held.staged_at_drain.lock().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_file_in_registries_d_is_noticed() {
    let held = Held::new().await;
    let files = held.files();
    let more = files.path.join("containers/registries.d/more.yaml");
    let scope = format!("{}/os", files.scope);
    RegistriesD::new().attachments(&scope, false).write(&more).unwrap();
    held.go_on();
    held.refused("SignatureMissing").await;
}

/// Changes the key at the first event that `choose` accepts, before the agent's write is answered.
async fn key_changes_at(choose: impl Fn(&Event) -> bool + Send + Sync + 'static) {
    let held = Held::new().await;
    let (key, armed) = (held.world.path().join("os.pub"), AtomicBool::new(true));
    held.world.events.listen(move |event| {
        if choose(event) && armed.swap(false, Ordering::SeqCst) {
            replace(&key, |new| Signer::generate(KeyKind::P256).write_public(new).unwrap());
        }
    });
    held.go_on();
    held.refused("SignatureRejected").await;
    assert_eq!(held.staged_at_drain.lock().unwrap().as_slice(), [Some(held.image.digest.clone())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn key_changed_during_the_drain_uncordons_the_node() {
    key_changes_at(|event| wrote(event, &format!("{PREFIX}desiredDrain"), "drain-")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn key_changed_just_before_the_reboot_stops_it() {
    key_changes_at(|event| wrote(event, ATTEMPT, "{")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identical_replacement_files_cause_one_more_verification() {
    let held = Held::new().await;
    for path in [held.files().policy(), held.world.path().join("os.pub")] {
        let bytes = fs::read(&path).unwrap();
        replace(&path, |new| fs::write(new, &bytes).unwrap());
    }
    let verified = format!("verified {}", held.image.pullspec());
    assert_eq!(held.said(&verified), 1);
    held.go_on();
    held.arrives().await;
    assert_eq!(held.said(&verified), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signed_image_created_before_the_floor_is_refused() {
    // The registry's images have a creation time of 1970; the age of the booted image does not count.
    let floor = "2026-11-01T00:00:00.5+01:00";
    let world = settled(&[("REBASE_AGENT_MINIMUM_CREATED", floor)]).await;
    let image = world.signed("2").await.unwrap();
    world.target("2", &image);
    let reason = world.wait_reason("TooOld").await.unwrap();
    for part in ["1970-01-01T00:00:00Z", "2026-10-31T23:00:00Z", "--minimum-created"] {
        assert!(reason.contains(part), "{reason}");
    }
    assert!(!world.machine.deployments().iter().any(|deployment| deployment.staged));
    assert_eq!(world.drains.drains(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unsigned_image_is_degraded_after_the_grace_although_it_is_retried() {
    // The second try, after 5 s, must not forget when the first one failed.
    let world = settled(&[("REBASE_AGENT_SIGNATURE_GRACE", "8")]).await;
    let image = world.unsigned("2").await.unwrap();
    world.target("2", &image);
    let degraded = |node: &Value| {
        annotation(node, "state") == Some("Degraded")
            && annotation(node, "reason").is_some_and(|reason| reason.starts_with("SignatureMissing"))
    };
    world.wait("a Degraded node", degraded).await.unwrap();
}

// --- deployments ------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stage_dropped_by_hand_is_staged_again_before_the_drain() {
    let held = Held::new().await;
    held.world.machine.sysroot().drop_staged().unwrap();
    held.go_on();
    held.arrives().await;
    assert_eq!(held.staged_at_drain.lock().unwrap().as_slice(), [Some(held.image.digest.clone())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_stage_is_replaced_before_the_drain() {
    let held = Held::new().await;
    let other = held.world.signed("9").await.unwrap();
    let typed = format!("ostree-unverified-registry:{}", other.pullspec());
    held.world.machine.human_stage(&typed).await.unwrap();
    held.go_on();
    held.arrives().await;
    assert_eq!(held.staged_at_drain.lock().unwrap().as_slice(), [Some(held.image.digest.clone())]);
}
