//! One guest and the cluster around it: API server, controllers and registry on the host's loopback, which the guest
//! sees as another machine.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use support::apiserver::{ApiServer, RequestRecord, Store};
use support::events::{Event, Events};
use support::image::Pushed;
use support::mcc::{Delays, DrainController, MANAGER, PREFIX, PoolController, PoolSpec, annotation};
use support::pki::{rotate_client_pem, write_kubeconfig};
use support::registry::{Credentials, Registry};
use support::sign::{Signer, sign};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;

use crate::backend::Backend;
use crate::oci::{Extra, Layout};
use crate::trust::{API_IN_GUEST, KEY_IN_GUEST, REPOSITORY, Trust};
use crate::vm::{BOOT, Emulator, Provision, Vm};

/// The node's name.
pub const NODE: &str = "worker-0";
/// The annotation in which the agent records a reboot before it requests one.
pub const ATTEMPT: &str = "rebase-agent.openshift.io/attempt";
/// The operator's annotation that keeps the agent from rebooting.
pub const HOLD: &str = "rebase-agent.openshift.io/hold";
/// The annotation that names the image to pull before the node's turn.
pub const HINT: &str = "rebase-agent.openshift.io/prefetch";
/// Longest work of the agent without a reboot: a verification and a pull take 10 s on an idle machine.
pub const WORK: Duration = Duration::from_secs(90);
/// Longest time from a new target to the guest's shutdown: verification, pull, staging, drain. On an idle machine 25 s.
pub const UPDATE: Duration = Duration::from_secs(150);

/// Polling interval where no notification exists.
pub const LOOK: Duration = Duration::from_millis(200);
const KUBELET: &str = "/var/lib/kubelet";
const CLIENT: &str = "/var/lib/kubelet/pki/kubelet-client-current.pem";

/// The parts that a lab is made from.
#[derive(Clone, Debug)]
pub struct Stock {
    /// Builds images: vm-tests/run.
    pub builder: PathBuf,
    /// The host tool in the guest.
    pub backend: Backend,
    /// More options for the builder.
    pub image_options: Vec<String>,
    /// Keys and names.
    pub keys: PathBuf,
    /// Keeps the registry's port for as long as there are labs.
    pub _port: Arc<UdpSocket>,
    /// The directory for the labs' files.
    pub runs: PathBuf,
    /// The emulator.
    pub emulator: Emulator,
}

/// Kinds of guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Unchanged.
    Plain,
    /// SELinux enforces the agent's domain.
    Selinux,
    /// The agent has deliberate faults.
    Faults,
}

impl Stock {
    /// Whether images have an overlay, which may bring a real host tool.
    #[must_use]
    pub fn has_overlay(&self) -> bool {
        self.image_options.iter().any(|option| option == "--overlay")
    }

    /// The directory of the image, which is built if necessary.
    pub async fn image(&self, kind: Kind) -> Result<PathBuf> {
        let builds = self.builds(kind).spawn().with_context(|| format!("running {}", self.builder.display()))?;
        let output = builds.wait_with_output().await?;
        ensure!(output.status.success(), "the image {kind:?} was not built");
        Ok(String::from_utf8(output.stdout)?.trim().into())
    }

    /// The command that builds the image and prints its directory.
    #[must_use]
    pub fn builds(&self, kind: Kind) -> tokio::process::Command {
        let kind = match kind {
            Kind::Plain => "plain",
            Kind::Selinux => "selinux",
            Kind::Faults => "faults",
        };
        let mut command = tokio::process::Command::new(&self.builder);
        command.args(["--build-image", kind, "--backend", self.backend.name(), "--keys"]).arg(&self.keys);
        command.args(&self.image_options).stdout(Stdio::piped());
        command
    }
}

/// A guest and its cluster.
pub struct Lab {
    /// The machine.
    pub vm: Vm,
    /// The guest's host tool.
    pub backend: Backend,
    /// The API server.
    pub api: ApiServer,
    /// The pool's half of MCC.
    pub pool: PoolController,
    /// The drain controller's half of MCC.
    pub drains: DrainController,
    /// A real registry.
    pub registry: Registry,
    /// The trusted keys.
    pub trust: Trust,
    /// The image that the guest was installed with.
    pub installed: Pushed,
    /// The events of the cluster.
    pub events: Events,
    /// Set once an image contained another key: later images contain that one.
    pub key_from_image: Option<String>,
    layout: Layout,
    images: u32,
    /// The pool's latest target.
    target: Mutex<(Pushed, u32)>,
    /// The image with which the node was last Done.
    settled: Mutex<(Pushed, u32)>,
    began: Instant,
}

impl Lab {
    /// Starts everything except the guest.
    pub async fn new(stock: &Stock, name: &str, kind: Kind, fault: Option<&str>) -> Result<Self> {
        let image = stock.image(kind).await?;
        let dir = stock.runs.join(name);
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => std::fs::create_dir_all(&dir)?,
        }
        let trust = Trust::load(&stock.keys)?;
        let layout = Layout::open(&image.join("oci"))?;
        let registry =
            Registry::start_on(&image.join("registry"), trust.registry_tls(), Some(Credentials::PULLER), trust.port)
                .await?;
        layout.push(&registry, REPOSITORY).await.context("pushing the installed image")?;
        let installed = Pushed {
            host: trust.registry_in_guest(),
            repo: REPOSITORY.into(),
            digest: layout.digest().to_owned(),
            instance_digests: Default::default(),
        };
        let identity = format!("{}:1", installed.repository());
        sign(&registry, &installed.digest, REPOSITORY, &identity, &trust.signer).await?;

        let events = Events::new();
        let api = ApiServer::start(&trust.pki, events.clone())?;
        let store = api.store();
        store.create_node(NODE, &[]);
        let pool = PoolController::start(store.clone(), PoolSpec::worker(&[NODE]));
        let delays = Delays { evict: Duration::from_secs(1), give_up: Duration::from_secs(30), ..Delays::short() };
        let drains = DrainController::start(store, delays);
        pool.set_target("rendered-worker-1", installed.pullspec().as_str());
        let mut provision = provision(&dir, &trust, &api, &installed)?;
        if let Some(fault) = fault {
            provision = provision
                .drop_in("rebase-agent.service", &format!("[Service]\nEnvironment=REBASE_AGENT_FAULT={fault}\n"));
        }
        let vm = Vm::new(&dir, &image.join("disk.raw"), &stock.emulator, &provision)?;
        Ok(Self {
            vm,
            backend: stock.backend,
            api,
            pool,
            drains,
            registry,
            trust,
            events,
            key_from_image: None,
            layout,
            images: 1,
            target: Mutex::new((installed.clone(), 1)),
            settled: Mutex::new((installed.clone(), 1)),
            installed,
            began: Instant::now(),
        })
    }

    /// Starts everything, with the guest settled on the installed image.
    pub async fn start(stock: &Stock, name: &str, kind: Kind, fault: Option<&str>) -> Result<Self> {
        let mut lab = Self::new(stock, name, kind, fault).await?;
        if let Err(error) = lab.first_boot().await {
            let kept = lab.keep_evidence().await;
            return Err(error).with_context(|| format!("console, journal and disk are in {}", kept.display()));
        }
        Ok(lab)
    }

    async fn first_boot(&mut self) -> Result<()> {
        self.power_on().await?;
        let installed = self.installed.clone();
        self.wait_done(&installed).await.context("the first boot")
    }

    /// The API server's objects.
    #[must_use]
    pub fn store(&self) -> Store {
        self.api.store()
    }

    /// The Node.
    pub fn node(&self) -> Result<Value> {
        self.store().node(NODE).context("the Node is gone")
    }

    /// One of the agent's or MCO's annotations of the Node.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<String> {
        let node = self.store().node(NODE)?;
        match key.contains('/') {
            true => node["metadata"]["annotations"][key].as_str().map(str::to_owned),
            false => annotation(&node, key).map(str::to_owned),
        }
    }

    /// Annotates the Node as another client than the agent.
    pub fn annotate(&self, key: &str, value: Option<&str>) -> Result<()> {
        self.store()
            .annotate(MANAGER, NODE, key, value)
            .map(drop)
            .map_err(|error| anyhow::anyhow!("annotating {key}: {error:?}"))
    }

    // --- images ---

    /// A name for the next image.
    fn next(&mut self) -> String {
        self.images += 1;
        self.images.to_string()
    }

    /// The content of every derived image: a unique version, also across runs, and its rendered config.
    fn extra(&self, version: &str) -> Extra {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        let extra = match &self.key_from_image {
            Some(key) => Extra::default().file(KEY_IN_GUEST, 0o644, key.as_str()),
            None => Extra::default(),
        };
        extra
            .file("usr/share/vm-tests/version", 0o644, format!("{version} {now}\n"))
            .label("org.opencontainers.image.version", version)
            .label("machineconfig", &format!("rendered-worker-{version}"))
    }

    /// A new, unsigned image.
    pub async fn unsigned(&mut self) -> Result<Pushed> {
        self.unsigned_with(Extra::default()).await
    }

    /// The same with more content.
    pub async fn unsigned_with(&mut self, more: Extra) -> Result<Pushed> {
        let version = self.next();
        let mut extra = self.extra(&version);
        extra.files.extend(more.files);
        extra.labels.extend(more.labels);
        let host = self.trust.registry_in_guest();
        self.layout.push_derived(&self.registry, &host, REPOSITORY, &version, &extra).await
    }

    /// A new image, signed with the key that the guest's policy names.
    pub async fn signed(&mut self) -> Result<Pushed> {
        self.signed_with(Extra::default()).await
    }

    /// The same with more content.
    pub async fn signed_with(&mut self, more: Extra) -> Result<Pushed> {
        let image = self.unsigned_with(more).await?;
        let signer = self.trust.signer.clone();
        self.sign(&image, &signer).await?;
        Ok(image)
    }

    /// A new image behind an index; both are signed.
    pub async fn signed_index(&mut self) -> Result<Pushed> {
        let version = self.next();
        let (extra, host) = (self.extra(&version), self.trust.registry_in_guest());
        let image = self.layout.push_index(&self.registry, &host, REPOSITORY, &version, &extra).await?;
        let identity = format!("{}:{version}", image.repository());
        support::sign::sign_all(&self.registry, &image, &identity, &self.trust.signer).await?;
        Ok(image)
    }

    /// Signs an image as the tag of the latest one.
    pub async fn sign(&self, image: &Pushed, signer: &Signer) -> Result<()> {
        let identity = format!("{}:{}", image.repository(), self.images);
        sign(&self.registry, &image.digest, REPOSITORY, &identity, signer).await
    }

    /// Makes the latest image the pool's target. The config changes with the image, as in real builds.
    pub fn target(&self, image: &Pushed) {
        self.target_as(image, self.images);
    }

    /// Makes an image that was built from `rendered-worker-<version>` the pool's target.
    pub fn target_as(&self, image: &Pushed, version: u32) {
        *lock(&self.target) = (image.clone(), version);
        self.pool.set_target(&format!("rendered-worker-{version}"), image.pullspec().as_str());
    }

    /// The pool's latest target.
    #[must_use]
    pub fn last_target(&self) -> Pushed {
        lock(&self.target).0.clone()
    }

    /// The image with which the node was last Done.
    #[must_use]
    pub fn settled(&self) -> Pushed {
        lock(&self.settled).0.clone()
    }

    /// Targets the image that is already booted, which needs no reboot.
    pub async fn return_to_settled(&mut self) -> Result<()> {
        let (image, version) = lock(&self.settled).clone();
        let boot = self.vm.boot_id().to_owned();
        self.target_as(&image, version);
        self.wait_done(&image).await.context("back to the booted image")?;
        ensure!(self.vm.boot_id() == boot && self.vm.is_on(), "a reboot into the booted image");
        self.arrived(&image).await
    }

    /// The number of the latest image.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.images
    }

    // --- the node's steps ---

    /// Switches the guest on and reports the Node ready, as the kubelet would.
    pub async fn power_on(&mut self) -> Result<Duration> {
        let took = self.vm.power_on().await?;
        let store = self.store();
        store.set_boot_id(NODE, self.vm.boot_id());
        store.set_ready(NODE, true);
        Ok(took)
    }

    /// Waits for the guest's own reboot, and boots it again.
    pub async fn reboot_of_its_own(&mut self, deadline: Duration) -> Result<Duration> {
        self.vm.wait_off(deadline).await.context("no reboot")?;
        self.store().set_ready(NODE, false);
        self.power_on().await
    }

    /// Makes `image` the target and follows the node until it is Done.
    pub async fn update(&mut self, image: &Pushed, version: u32) -> Result<()> {
        let (before, drains) = (self.vm.boot_id().to_owned(), self.drains.drains());
        self.target_as(image, version);
        self.vm.wait_off(UPDATE).await.context("no reboot")?;
        ensure!(self.annotation(ATTEMPT).is_some(), "a reboot without an attempt on record");
        self.store().set_ready(NODE, false);
        self.power_on().await?;
        self.wait_done(image).await?;
        ensure!(self.vm.boot_id() != before, "Done without a new boot");
        ensure!(self.drains.drains() == drains + 1, "{} drains instead of one", self.drains.drains() - drains);
        self.arrived(image).await
    }

    /// Waits until `predicate` accepts the Node; the error shows its last state.
    pub async fn wait(&self, what: &str, deadline: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        self.store().wait_for(NODE, deadline, wanted).await.with_context(|| {
            let annotations = self.store().node(NODE).map(|node| node["metadata"]["annotations"].clone());
            format!("{what} did not happen within {deadline:?}; the Node has {annotations:#?}")
        })
    }

    /// Waits until the Node reports that `image` is booted and the node schedulable.
    pub async fn wait_done(&self, image: &Pushed) -> Result<()> {
        let pullspec = image.pullspec();
        let done = |node: &Value| {
            annotation(node, "currentImage") == Some(pullspec.as_str())
                && annotation(node, "state") == Some("Done")
                && annotation(node, "currentConfig") == annotation(node, "desiredConfig")
                && annotation(node, "desiredDrain") == annotation(node, "lastAppliedDrain")
                && node["spec"]["unschedulable"] != true
        };
        self.wait(&format!("Done on {pullspec}"), BOOT + WORK, done).await?;
        let target = lock(&self.target).clone();
        if target.0 == *image {
            *lock(&self.settled) = target;
        }
        Ok(())
    }

    /// Waits for the first event in `queue` that `is_it` accepts.
    pub async fn wait_event(
        &self,
        queue: &mut Receiver<Event>,
        deadline: Duration,
        what: &str,
        is_it: impl Fn(&Event) -> bool,
    ) -> Result<()> {
        let wait = async {
            loop {
                match queue.recv().await {
                    Ok(event) if is_it(&event) => return Ok(()),
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => bail!("the event source has ended"),
                }
            }
        };
        timeout(deadline, wait).await.with_context(|| format!("{what} did not happen within {deadline:?}"))?
    }

    /// Waits for a request since the `mark`th that `is_it` accepts.
    pub async fn wait_request(
        &self,
        mark: usize,
        deadline: Duration,
        what: &str,
        is_it: impl Fn(&RequestRecord) -> bool,
    ) -> Result<()> {
        let wait = async {
            while !self.api.requests().iter().skip(mark).any(&is_it) {
                tokio::time::sleep(LOOK).await;
            }
        };
        timeout(deadline, wait).await.with_context(|| format!("no request with {what} within {deadline:?}"))
    }

    /// Waits until a command succeeds in the guest.
    pub async fn wait_guest(&mut self, what: &str, deadline: Duration, command: &str) -> Result<()> {
        let end = Instant::now() + deadline;
        while self.vm.status(command).await?.0 != 0 {
            ensure!(Instant::now() < end, "not within {deadline:?}: {what}");
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Prints a line of progress.
    pub fn say(&self, text: &str) {
        println!("{:>12} s  {text}", self.began.elapsed().as_secs());
    }

    /// Waits for a state and a reason that begins with `word`.
    pub async fn wait_reason(&self, state: &str, word: &str, deadline: Duration) -> Result<String> {
        let is_it = |node: &Value| {
            annotation(node, "state") == Some(state)
                && annotation(node, "reason").is_some_and(|reason| reason.starts_with(word))
        };
        let node = self.wait(&format!("{state} because of {word}"), deadline, is_it).await?;
        Ok(annotation(&node, "reason").unwrap_or_default().to_owned())
    }

    /// Waits until the agent waits for the end of a hold.
    pub async fn wait_held(&self) -> Result<()> {
        let held = |node: &Value| annotation(node, "reason").is_some_and(|reason| reason.starts_with("Held"));
        self.wait("Held", BOOT + UPDATE, held).await.map(drop)
    }

    /// Checks a guest whose Node reports Done.
    pub async fn arrived(&mut self, image: &Pushed) -> Result<()> {
        let node = self.node()?;
        ensure!(annotation(&node, "reason").unwrap_or_default().is_empty(), "Done with a reason");
        ensure!(self.annotation(ATTEMPT).is_none(), "Done with an attempt left over");
        let booted = self.booted_digest().await?;
        let is_it = booted == image.digest || image.instance_digests.values().any(|instance| *instance == booted);
        ensure!(is_it, "Done on {} while {booted} is booted", image.digest);
        ensure!(!self.is_staged().await?, "Done while something is staged");
        Ok(())
    }

    /// The manifest digest of the booted image, from the guest's repository.
    pub async fn booted_digest(&mut self) -> Result<String> {
        const SCRIPT: &str = "set -e
            path=$(readlink -f \"/$(tr ' ' '\\n' </proc/cmdline | sed -n 's,^ostree=/,,p')\")
            checksum=${path##*/}
            ostree show --repo=/ostree/repo --print-metadata-key=ostree.manifest-digest \"${checksum%.*}\"";
        Ok(self.vm.run(SCRIPT).await?.trim().trim_matches('\'').to_owned())
    }

    /// Whether a deployment is staged.
    pub async fn is_staged(&mut self) -> Result<bool> {
        Ok(self.vm.status("test -e /run/ostree/staged-deployment").await?.0 == 0)
    }

    /// Deployments as the guest's own tool lists them.
    pub async fn deployments(&mut self) -> Result<String> {
        self.vm.run("ostree admin status").await
    }

    /// Replaces the kubelet's client certificate, as the kubelet does from time to time.
    pub async fn install_client(&mut self, pem: &str) -> Result<()> {
        let pem = openssl::base64::encode_block(pem.as_bytes());
        let script = format!(
            "set -e; cd {KUBELET}/pki; new=kubelet-client-$(date +%s%N).pem; umask 077; base64 -d >$new <<<{pem}
             ln -s {KUBELET}/pki/$new kubelet-client-updated.pem; mv -T kubelet-client-updated.pem {CLIENT}"
        );
        self.vm.run(&script).await.map(drop)
    }

    /// Removes a lab that is no longer needed.
    pub async fn end(mut self, keep: bool) {
        // Processes and files that cannot be removed are gone already.
        let _ = self.vm.power_cut().await;
        if !keep {
            let _ = std::fs::remove_dir_all(self.vm.dir());
        }
    }

    /// Keeps the evidence of a failure and returns its directory.
    pub async fn keep_evidence(mut self) -> PathBuf {
        let dir = self.vm.dir().to_owned();
        let write = |name: &str, text: String| drop(std::fs::write(dir.join(name), text));
        if self.vm.is_on() {
            const SCRIPT: &str = "journalctl --boot --no-pager; ostree admin status; systemctl --failed --no-pager
                systemctl status --no-pager rebase-agent rpm-ostreed 'rebase-agent-bootc*' ostree-finalize-staged; findmnt; df -h";
            if let Ok((_, text)) = self.vm.status(SCRIPT).await {
                write("guest.txt", text);
            }
        }
        let _ = self.vm.power_cut().await;
        let journal = dir.join("journal-on-disk");
        let _ = std::fs::create_dir_all(&journal);
        let _ = self.vm.disk.recover().and_then(|()| self.vm.disk.extract_journal(&journal));
        write("node.json", self.store().node(NODE).map(|node| format!("{node:#}")).unwrap_or_default());
        let requests = self
            .api
            .requests()
            .into_iter()
            .map(|r| format!("{} {} {} {}\n", r.status, r.method, r.path_and_query, r.body));
        write("requests.txt", requests.collect());
        dir
    }

    /// Cuts the power; the Node becomes not ready.
    pub async fn power_cut(&mut self) -> Result<()> {
        self.vm.power_cut().await?;
        self.store().set_ready(NODE, false);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The files that Ignition and the kubelet's bootstrap leave on a node.
fn provision(dir: &Path, trust: &Trust, api: &ApiServer, installed: &Pushed) -> Result<Provision> {
    let made = tempfile::tempdir_in(dir)?;
    let kubeconfig = made.path().join("kubeconfig");
    let url = format!("https://{API_IN_GUEST}:{}", api.address().port());
    write_kubeconfig(&kubeconfig, &url, &trust.pki.ca_pem(), Path::new(CLIENT));
    let client = rotate_client_pem(&made.path().join("pki"), &trust.pki.kubelet_pem(NODE));
    let first: Value = [
        ("currentConfig", "rendered-worker-1"),
        ("desiredConfig", "rendered-worker-1"),
        ("currentImage", &installed.pullspec()),
        ("desiredImage", &installed.pullspec()),
        ("state", "Done"),
    ]
    .into_iter()
    .map(|(key, value)| (format!("{PREFIX}{key}"), Value::from(value)))
    .collect();
    let issued = format!("{KUBELET}/pki/kubelet-client-2026-01-01-00-00-00.pem");
    Ok(Provision::default()
        .file(&format!("{KUBELET}/kubeconfig"), 0o600, &std::fs::read(&kubeconfig)?)
        .file(&issued, 0o600, &std::fs::read(client)?)
        .link(CLIENT, &issued)
        .file(&format!("{KUBELET}/config.json"), 0o600, trust.pull_secret().as_bytes())
        .file("/etc/machine-config-daemon/node-annotations.json", 0o644, first.to_string().as_bytes()))
}
