//! One node and its surroundings with default settings, for the demo and for the tests that run the agent as a process.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::broadcast::error::RecvError;

use crate::apiserver::{ApiServer, Crd, Store};
use crate::events::{Event, Events};
use crate::image::{ImageSpec, Pushed};
use crate::machine::{AgentCommand, Engine, HostTools, Machine, MachineOptions};
use crate::mcc::{self, Delays, DrainController, PREFIX, PoolController, PoolSpec};
use crate::pki::{Pki, rotate_client_pem, write_kubeconfig};
use crate::policy::{Policy, RegistriesD, Requirement};
use crate::registry::{Registry, ServerTls};
use crate::sign::{KeyKind, Signer, sign};
use crate::tools;
use crate::trace;

/// The node's name.
pub const NODE: &str = "worker-0";
/// The name of a second one, which exists only after [`World::neighbour`].
pub const NEIGHBOUR: &str = "worker-1";
/// Repository of the OS images.
pub const REPOSITORY: &str = "example/os";
/// Longest wait for the agent or a double; an update takes a few seconds.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Settings of a world.
#[derive(Debug)]
pub struct WorldOptions {
    /// The agent's program.
    pub agent: PathBuf,
    /// `controlPlaneTopology`.
    pub topology: String,
    /// The pool that the node is booted into: `worker` or a custom one.
    pub pool: String,
    /// Variables for the agent; they override the world's own.
    pub env: Vec<(String, String)>,
    /// `policy.json` of the node; the default is OpenShift's own with one scope that requires a signature.
    pub policy: Option<Policy>,
    /// The agent's engine; the pull always uses the enforcing one.
    pub agent_skopeo: Option<PathBuf>,
    /// The node's host tools.
    pub host_tools: HostTools,
    /// The CRD of MachineConfigNodes, and whether the agent's manifests are applied.
    pub mcns: (Crd, bool),
    /// The drain controller's delays.
    pub delays: Delays,
    /// Changes to the machine.
    pub machine: fn(&mut MachineOptions),
}

impl WorldOptions {
    /// The defaults, for this agent.
    #[must_use]
    pub fn new(agent: &Path) -> Self {
        Self {
            agent: agent.to_owned(),
            topology: "HighlyAvailable".to_owned(),
            pool: "worker".to_owned(),
            env: Vec::new(),
            policy: None,
            agent_skopeo: None,
            host_tools: HostTools::RpmOstree,
            mcns: (Crd::Default, true),
            delays: Delays { evict: Duration::from_millis(300), ..Delays::short() },
            machine: |_| {},
        }
    }
}

/// The whole world; it ends when this is dropped.
pub struct World {
    /// The events.
    pub events: Events,
    /// The certificate authority.
    pub pki: Pki,
    /// The API server.
    pub api: ApiServer,
    /// The pool's half of MCC.
    pub pool: PoolController,
    /// The drain controller's half of MCC.
    pub drains: DrainController,
    /// A real registry.
    pub registry: Registry,
    /// The key that the node's policy names.
    pub signer: Signer,
    /// The node.
    pub machine: Machine,
    /// The image that the node was installed with, built from `rendered-<pool>-1`, signed.
    pub installed: Pushed,
    /// The agent's command.
    pub agent: AgentCommand,
    /// The pool's name.
    name: String,
    engine: Engine,
    host_tools: HostTools,
    setup: fn(&mut MachineOptions),
    directory: TempDir,
}

/// A further node of a world's pool.
pub struct Neighbour {
    /// Its events; those of its Node are the world's.
    pub events: Events,
    /// Its machine.
    pub machine: Machine,
}

impl World {
    /// Builds everything; the machine is installed and off.
    pub async fn new(options: WorldOptions) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("rebase-").tempdir()?;
        let path = directory.path().to_owned();
        let events = Events::new();
        let pki = Pki::new();

        let Trust { registry, signer, engine } = Trust::new(&path, &pki, options.policy).await?;

        let api = ApiServer::start(&pki, events.clone())?;
        let store = api.store();
        store.set_mcns(options.mcns.0, options.mcns.1);
        store.create_node(NODE, &[]);
        let kubelet = path.join("kubelet");
        let pem = rotate_client_pem(&kubelet.join("pki"), &pki.kubelet_pem(NODE));
        write_kubeconfig(&kubelet.join("kubeconfig"), &api.url(), &pki.ca_pem(), &pem);

        let mut env = agent_env(&kubelet.join("kubeconfig"), &engine);
        if let Some(skopeo) = &options.agent_skopeo {
            env.push(("REBASE_AGENT_SKOPEO".to_owned(), skopeo.display().to_string()));
        }
        env.extend(options.env);
        let agent = AgentCommand { program: options.agent, args: vec!["run".to_owned()], env };
        let mut machine = MachineOptions::new(&path, engine.clone(), events.clone(), agent.clone());
        machine.watchdog = Some(Duration::from_secs(20));
        machine.host_tools = options.host_tools;
        (options.machine)(&mut machine);
        let machine = Machine::new(machine).await?;

        let name = options.pool;
        let custom = if name == "worker" { Vec::new() } else { vec![name.clone()] };
        let spec =
            PoolSpec { name: name.clone(), custom, topology: options.topology, ..PoolSpec::worker(&[NODE, NEIGHBOUR]) };
        let pool = PoolController::start(store.clone(), spec);
        let drains = DrainController::start(store.clone(), options.delays);
        let config = format!("rendered-{name}-1");
        let installed = push(&registry, "1", &ImageSpec::new("1").rendered_config(&config)).await?;
        sign(&registry, &installed.digest, &installed.repo, &format!("{}:1", installed.repository()), &signer).await?;
        machine.install(&format!("ostree-unverified-registry:{}", installed.pullspec())).await?;
        write_first_boot(&machine.root(), &config, &installed.pullspec())?;
        tokio::spawn(report_ready(NODE, events.subscribe(), store));
        let (host_tools, setup) = (options.host_tools, options.machine);
        Ok(Self {
            events,
            pki,
            api,
            pool,
            drains,
            registry,
            signer,
            machine,
            installed,
            agent,
            name,
            engine,
            host_tools,
            setup,
            directory,
        })
    }

    /// Adds the node [`NEIGHBOUR`] to the pool, installed with `image` for `rendered-<pool>-<version>` and switched on.
    pub async fn neighbour(&self, version: &str, image: &Pushed) -> anyhow::Result<Neighbour> {
        let path = self.path().join("n");
        let (store, events) = (self.store(), Events::new());
        store.create_node(NEIGHBOUR, &[]);
        let kubelet = path.join("kubelet");
        let pem = rotate_client_pem(&kubelet.join("pki"), &self.pki.kubelet_pem(NEIGHBOUR));
        let kubeconfig = kubelet.join("kubeconfig");
        write_kubeconfig(&kubeconfig, &self.api.url(), &self.pki.ca_pem(), &pem);
        let mut agent = self.agent.clone();
        agent.env.push(("REBASE_AGENT_KUBECONFIG".to_owned(), kubeconfig.display().to_string()));
        let mut machine = MachineOptions::new(&path, self.engine.clone(), events.clone(), agent);
        machine.host_tools = self.host_tools;
        (self.setup)(&mut machine);
        let machine = Machine::new(machine).await?;
        machine.install(&format!("ostree-unverified-registry:{}", image.pullspec())).await?;
        write_first_boot(&machine.root(), &format!("rendered-{}-{version}", self.name), &image.pullspec())?;
        tokio::spawn(report_ready(NEIGHBOUR, events.subscribe(), store));
        machine.power_on().await?;
        Ok(Neighbour { events, machine })
    }

    /// The API server's objects.
    #[must_use]
    pub fn store(&self) -> Store {
        self.api.store()
    }

    /// The directory of this world's files.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A new, unsigned image for `rendered-<pool>-<version>`.
    pub async fn unsigned(&self, version: &str) -> anyhow::Result<Pushed> {
        let spec = ImageSpec::new(version).rendered_config(&format!("rendered-{}-{version}", self.name));
        push(&self.registry, version, &spec).await
    }

    /// The same, signed with the key that the policy names.
    pub async fn signed(&self, version: &str) -> anyhow::Result<Pushed> {
        let image = self.unsigned(version).await?;
        self.sign(&image, version).await?;
        Ok(image)
    }

    /// Signs `image` as its tag.
    pub async fn sign(&self, image: &Pushed, tag: &str) -> anyhow::Result<()> {
        sign(&self.registry, &image.digest, &image.repo, &format!("{}:{tag}", image.repository()), &self.signer).await
    }

    /// Gives the pool a new target.
    pub fn target(&self, version: &str, image: &Pushed) {
        self.pool.set_target(&format!("rendered-{}-{version}", self.name), image.pullspec().as_str());
    }

    /// An annotation of the node, MCO's prefix left out.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<String> {
        let node = self.store().node(NODE)?;
        mcc::annotation(&node, key).map(str::to_owned)
    }

    /// Waits until `predicate` accepts the Node; the error shows its last state.
    pub async fn wait(&self, what: &str, predicate: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        match self.store().wait_for(NODE, DEADLINE, predicate).await {
            Ok(node) => Ok(node),
            Err(error) => {
                let annotations = self.store().node(NODE).map(|node| node["metadata"]["annotations"].clone());
                Err(error).with_context(|| format!("{what} did not happen; the Node has {annotations:#?}"))
            }
        }
    }

    /// Waits until the node reports Done on `image`.
    pub async fn wait_done(&self, image: &Pushed) -> anyhow::Result<()> {
        let pullspec = image.pullspec();
        let done =
            |node: &Value| mcc::is_node_done(node) && mcc::annotation(node, "currentImage") == Some(pullspec.as_str());
        self.wait(&format!("Done on {}", image.digest), done).await.map(|_| ())
    }

    /// Waits until the node reports Done on the installed image, and who vouched for it: the agent's last write before it
    /// rests.
    pub async fn wait_installed(&self) -> anyhow::Result<()> {
        self.wait_done(&self.installed).await?;
        let vouched = |node: &Value| !node["metadata"]["annotations"]["rebase-agent.openshift.io/verified"].is_null();
        self.wait("the annotation about the verification", vouched).await.map(|_| ())
    }

    /// Waits until the reason starts with this word.
    pub async fn wait_reason(&self, word: &str) -> anyhow::Result<String> {
        let starts = |node: &Value| mcc::annotation(node, "reason").is_some_and(|reason| reason.starts_with(word));
        let node = self.wait(&format!("the reason {word}"), starts).await?;
        Ok(mcc::annotation(&node, "reason").unwrap_or_default().to_owned())
    }

    /// Waits for the first event in `queue` that `choose` accepts.
    pub async fn wait_event<T>(
        queue: &mut tokio::sync::broadcast::Receiver<Event>,
        what: &str,
        choose: impl Fn(&Event) -> Option<T>,
    ) -> anyhow::Result<T> {
        let wait = async {
            loop {
                match queue.recv().await {
                    Ok(event) => {
                        if let Some(chosen) = choose(&event) {
                            return Ok(chosen);
                        }
                    }
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => bail!("the event source has ended"),
                }
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.with_context(|| format!("{what} did not happen"))?
    }

    /// Runs a command of the agent in the service's environment: exit code, standard output and error.
    pub async fn command(&self, args: &[&str]) -> anyhow::Result<(i32, String, String)> {
        let mut command = tokio::process::Command::from(trace::agent(&self.agent.program));
        command.args(args).envs(self.agent.env.iter().cloned());
        command
            .env("DBUS_SYSTEM_BUS_ADDRESS", self.machine.bus_address())
            .env("REBASE_AGENT_ROOT", self.machine.root());
        let output = tools::run(command, DEADLINE).await?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr)))
    }
}

/// The registry, the key that signs its images, and the engine of a node whose policy demands that key.
pub struct Trust {
    /// A real registry.
    pub registry: Registry,
    /// The key that the node's policy names.
    pub signer: Signer,
    /// The engine, with the node's policy.
    pub engine: Engine,
}

impl Trust {
    /// Starts the registry and writes the node's files below `path`. The default policy is OpenShift's own with one scope
    /// that requires a signature.
    pub async fn new(path: &Path, pki: &Pki, policy: Option<Policy>) -> anyhow::Result<Self> {
        let (cert_pem, key_pem) = pki.server(&[]);
        let tls = ServerTls { cert_pem, key_pem, ca_pem: pki.ca_pem() };
        let registry = Registry::start(&path.join("registry"), tls).await?;
        let signer = Signer::generate(KeyKind::P256);
        let key = path.join("os.pub");
        signer.write_public(&key)?;
        let scope = format!("{}/example", registry.host());
        let file = path.join("containers/policy.json");
        let stock = || Policy::accept_by_default().scope(&scope, [Requirement::sigstore_key_path(&key)]);
        policy.unwrap_or_else(stock).write(&file)?;
        let registries_d = path.join("containers/registries.d");
        RegistriesD::new().attachments(&scope, true).write(&registries_d.join("os.yaml"))?;
        let engine = Engine { skopeo: tools::skopeo()?, policy: file, registries_d, cert_dir: registry.cert_dir() };
        Ok(Self { registry, signer, engine })
    }
}

/// The variables of an agent that uses this kubeconfig and this engine.
#[must_use]
pub fn agent_env(kubeconfig: &Path, engine: &Engine) -> Vec<(String, String)> {
    let text = |path: &Path| path.display().to_string();
    let pairs = [
        ("KUBECONFIG", text(kubeconfig)),
        ("POLICY", text(&engine.policy)),
        ("REGISTRIES_D", text(&engine.registries_d)),
        ("SKOPEO", text(&engine.skopeo)),
        ("CERT_DIR", text(&engine.cert_dir)),
        ("SIGNATURE_GRACE", "2".to_owned()),
        ("UPTIME_FLOOR", "60".to_owned()),
    ];
    pairs.into_iter().map(|(name, value)| (format!("REBASE_AGENT_{name}"), value)).collect()
}

async fn push(registry: &Registry, tag: &str, spec: &ImageSpec) -> anyhow::Result<Pushed> {
    registry.push(REPOSITORY, tag, spec).await
}

/// Writes the file that MCS leaves on a node.
///
/// # Errors
/// If the file cannot be written.
pub fn write_first_boot(root: &Path, config: &str, image: &str) -> anyhow::Result<()> {
    let pairs = [
        ("currentConfig", config),
        ("desiredConfig", config),
        ("firstPivotConfig", config),
        ("currentImage", image),
        ("desiredImage", image),
        ("state", "Done"),
    ];
    let annotations: Value = pairs.iter().map(|(key, value)| (format!("{PREFIX}{key}"), Value::from(*value))).collect();
    let directory = root.join("etc/machine-config-daemon");
    std::fs::create_dir_all(&directory)?;
    std::fs::write(directory.join("node-annotations.json"), annotations.to_string())?;
    Ok(())
}

/// The kubelet's part: the Node is Ready while the machine is up.
async fn report_ready(node: &'static str, mut queue: tokio::sync::broadcast::Receiver<Event>, store: Store) {
    loop {
        match queue.recv().await {
            Ok(Event::Down) => store.set_ready(node, false),
            Ok(Event::Booted { boot_id, .. }) => {
                store.set_boot_id(node, &boot_id);
                store.set_ready(node, true);
            }
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}
