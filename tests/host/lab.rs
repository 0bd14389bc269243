//! One machine without an agent, and images that are verified once for all tests.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use rebase_agent::host::boot::Root;
use rebase_agent::host::{Cancel, Deadlines, Host, HostError};
use rebase_agent::model::HostFacts;
use rebase_agent::trust::{Engine as Verifier, Settings, VerifiedImage, reference, verify};
use support::events::{Event, Events};
use support::image::{ImageSpec, Pushed};
use support::machine::{AgentCommand, Engine, HostTools, Machine, MachineOptions};
use support::pki::Pki;
use support::policy::{Policy, RegistriesD, Requirement};
use support::registry::{Registry, ServerTls};
use support::sign::{KeyKind, Signer, sign_all};
use support::tools;
use tokio::sync::watch;
use zbus::{OwnedVariant, Variant};

/// Longest wait of a test.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// An image in the registry, verified.
pub struct Signed {
    pub pushed: Pushed,
    pub verified: VerifiedImage,
}

/// Real images, in a registry that lives as long as the process.
pub struct Store {
    pub engine: Engine,
    /// The same engine with a policy that rejects by default.
    pub strict: Engine,
    pub scope: String,
    images: BTreeMap<&'static str, Signed>,
}

impl Store {
    /// A thread that never ends fills the store: the registry ends with the thread that started it.
    pub fn get() -> &'static Self {
        static STORE: OnceLock<Store> = OnceLock::new();
        STORE.get_or_init(|| {
            let (sender, receiver) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let dir = tempfile::Builder::new().prefix("rebase-host-").tempdir().unwrap();
                    let (_registry, store) = fill(dir.path()).await;
                    sender.send(store).unwrap();
                    std::future::pending::<()>().await;
                });
            });
            receiver.recv().unwrap()
        })
    }

    pub fn image(&self, name: &str) -> &Signed {
        &self.images[name]
    }
}

async fn fill(dir: &Path) -> (Registry, Store) {
    let pki = Pki::new();
    let tls = || {
        let (cert_pem, key_pem) = pki.server(&[]);
        ServerTls { cert_pem, key_pem, ca_pem: pki.ca_pem() }
    };
    let signer = Signer::generate(KeyKind::P256);
    let key = dir.join("os.pub");
    signer.write_public(&key).unwrap();
    let registry = Registry::start(&dir.join("registry"), tls()).await.unwrap();
    let mut gone = Registry::start(&dir.join("gone"), tls()).await.unwrap();
    let scope = registry.host();
    let demanded = || [Requirement::sigstore_key_path(&key)];
    let policy = Policy::accept_by_default().scope(&scope, demanded()).scope(&gone.host(), demanded());
    policy.write(&dir.join("policy.json")).unwrap();
    let registries_d = dir.join("registries.d");
    let attachments = RegistriesD::new().attachments(&scope, true).attachments(&gone.host(), true);
    attachments.write(&registries_d.join("os.yaml")).unwrap();
    let engine = Engine {
        skopeo: tools::skopeo().unwrap(),
        policy: dir.join("policy.json"),
        registries_d,
        cert_dir: registry.cert_dir(),
    };
    let strict = Engine { policy: dir.join("strict.json"), ..engine.clone() };
    Policy::reject_by_default().scope(&scope, demanded()).write(&strict.policy).unwrap();
    let specs = [
        ("1", &registry, ImageSpec::new("1").rendered_config("rendered-worker-1")),
        ("2", &registry, ImageSpec::new("2").rendered_config("rendered-worker-2")),
        ("3", &registry, ImageSpec::new("3").rendered_config("rendered-worker-3").kernel_arguments(["nosmt a=b"])),
        ("index", &registry, ImageSpec::new("4").index()),
        ("unbootable", &registry, ImageSpec::new("5").not_bootable()),
        ("gone", &gone, ImageSpec::new("6")),
        ("long", &registry, ImageSpec::new("7")),
    ];
    let mut images = BTreeMap::new();
    for (name, registry, spec) in specs {
        // Too long for a unit name.
        let repository = if name == "long" { "o".repeat(140) } else { "os".to_owned() };
        let pushed = registry.push(&repository, name, &spec).await.unwrap();
        sign_all(registry, &pushed, &format!("{}:{name}", pushed.repository()), &signer).await.unwrap();
        let engine = Engine { cert_dir: registry.cert_dir(), ..engine.clone() };
        let verified = verified(&engine, &pushed).await;
        images.insert(name, Signed { pushed, verified });
    }
    gone.stop();
    (registry, Store { engine, strict, scope, images })
}

/// Verifies `image` under the policy of `engine`.
pub async fn verified(engine: &Engine, image: &Pushed) -> VerifiedImage {
    let verifier = Verifier::new(Settings {
        policy: engine.policy.clone(),
        registries_d: engine.registries_d.clone(),
        skopeo: engine.skopeo.clone(),
        cert_dir: Some(engine.cert_dir.clone()),
        auth_files: Vec::new(),
        etc: "/nonexistent".into(),
        scratch: None,
        deadline: PATIENCE,
    });
    verify(&verifier, &reference::parse(&image.pullspec()).unwrap()).await.unwrap()
}

/// A machine that runs image 1, and the host adapter under test.
pub struct Lab {
    pub machine: Machine,
    pub host: Host,
    pub events: Events,
    pub store: &'static Store,
    dir: tempfile::TempDir,
}

impl Lab {
    pub async fn new() -> Self {
        Self::with(HostTools::RpmOstree, false).await
    }

    /// Uses these host tools; `signed` installs with a signed origin, as bootc's installer does on request.
    pub async fn with(host_tools: HostTools, signed: bool) -> Self {
        let store = tokio::task::spawn_blocking(Store::get).await.unwrap();
        let dir = tempfile::Builder::new().prefix("rebase-").tempdir().unwrap();
        let events = Events::new();
        let agent = AgentCommand { program: "/bin/sleep".into(), args: vec!["1000".to_owned()], env: Vec::new() };
        let mut options = MachineOptions::new(dir.path(), store.engine.clone(), events.clone(), agent);
        options.bootloader_update = true;
        options.host_tools = host_tools;
        if signed {
            options.engine = store.strict.clone();
        }
        let machine = Machine::new(options).await.unwrap();
        let prefix = if signed { "ostree-image-signed:docker://" } else { "ostree-unverified-registry:" };
        machine.install(&format!("{prefix}{}", store.image("1").pushed.pullspec())).await.unwrap();
        machine.power_on().await.unwrap();
        let host = Host::new(Root::new(machine.root()), Some(machine.bus_address()));
        Self { machine, host, events, store, dir }
    }

    /// The directory of the machine's bus.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The host adapter with changed time limits.
    pub fn hasty(&self, change: impl FnOnce(&mut Deadlines)) -> Host {
        let mut deadlines = Deadlines::default();
        change(&mut deadlines);
        self.host.clone().with_deadlines(deadlines)
    }

    pub fn verified(&self, image: &str) -> &'static VerifiedImage {
        &self.store.image(image).verified
    }

    pub fn digest(&self, image: &str) -> String {
        self.store.image(image).pushed.digest.clone()
    }

    /// The reference as an operator would type it.
    pub fn typed(&self, image: &str) -> String {
        format!("ostree-unverified-registry:{}", self.store.image(image).pushed.pullspec())
    }

    pub async fn stage(&self, image: &str) -> Result<(), HostError> {
        stage(&self.host, self.verified(image)).await
    }

    pub async fn read(&self) -> HostFacts {
        self.host.read().await.unwrap()
    }

    /// The digest of the deployment that is staged on the disk.
    pub fn staged(&self) -> Option<String> {
        self.machine.deployments().into_iter().find(|deployment| deployment.staged).map(|staged| staged.digest)
    }

    /// Records all events from now on.
    pub fn record(&self) -> Arc<Mutex<Vec<Event>>> {
        let seen = Arc::<Mutex<Vec<Event>>>::default();
        let to = seen.clone();
        self.events.listen(move |event| to.lock().unwrap().push(event.clone()));
        seen
    }

    pub async fn idle(&self) {
        until("no transaction", || self.machine.rpm_ostreed().active_transaction().is_none()).await;
    }

    pub async fn hanging(&self) {
        until("a transaction hangs", || self.machine.rpm_ostreed().is_hanging()).await;
    }
}

pub async fn stage(host: &Host, image: &VerifiedImage) -> Result<(), HostError> {
    let (_never, mut cancel) = never();
    host.stage(image, &mut cancel, &|_| {}).await
}

/// A cancel channel that never fires while the sender lives.
pub fn never() -> (watch::Sender<bool>, Cancel) {
    watch::channel(false)
}

pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < end, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The number of recorded events that `choose` accepts.
pub fn count(seen: &Arc<Mutex<Vec<Event>>>, choose: impl Fn(&Event) -> bool) -> usize {
    seen.lock().unwrap().iter().filter(|event| choose(event)).count()
}

pub type Dict = HashMap<String, OwnedVariant>;

pub fn dict(entries: Vec<(&str, Variant<'static>)>) -> Dict {
    entries.into_iter().map(|(key, value)| (key.to_owned(), value.try_into().unwrap())).collect()
}
