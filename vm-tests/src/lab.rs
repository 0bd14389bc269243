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
/// The agent's note of a reboot that it asks for.
pub const ATTEMPT: &str = "rebase-agent.openshift.io/attempt";
/// A person's annotation that the agent is not to reboot.
pub const HOLD: &str = "rebase-agent.openshift.io/hold";
/// For anything that the agent does without a reboot: a verification and a pull take 10 s when it is quiet.
pub const WORK: Duration = Duration::from_secs(90);
/// From a new target to the guest's going down: verification, pull, staging, drain. Quiet, it takes 25 s.
pub const UPDATE: Duration = Duration::from_secs(150);

/// Between two looks at what does not tell when it changes.
pub const LOOK: Duration = Duration::from_millis(200);
const KUBELET: &str = "/var/lib/kubelet";
const CLIENT: &str = "/var/lib/kubelet/pki/kubelet-client-current.pem";

/// Where everything is that a lab is made from.
#[derive(Clone, Debug)]
pub struct Stock {
    /// Builds images: vm-tests/run.
    pub builder: PathBuf,
    /// What stages images in the guest.
    pub backend: Backend,
    /// What the builder is to know of the image besides.
    pub image_options: Vec<String>,
    /// Keys and names.
    pub keys: PathBuf,
    /// Keeps the registry's port for as long as there are labs.
    pub _port: Arc<UdpSocket>,
    /// Where labs keep what they leave.
    pub runs: PathBuf,
    /// The emulator.
    pub emulator: Emulator,
}

/// Kinds of guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As it is.
    Plain,
    /// SELinux enforces the agent's domain.
    Selinux,
    /// The agent can be told to misbehave.
    Faults,
}

impl Stock {
    /// The directory of the image, which is built if it was not.
    pub async fn image(&self, kind: Kind) -> Result<PathBuf> {
        let builds = self.builds(kind).spawn().with_context(|| format!("running {}", self.builder.display()))?;
        let output = builds.wait_with_output().await?;
        ensure!(output.status.success(), "the image {kind:?} was not built");
        Ok(String::from_utf8(output.stdout)?.trim().into())
    }

    /// The command that builds it and prints where it is.
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
    /// What stages images in it.
    pub backend: Backend,
    /// The API server.
    pub api: ApiServer,
    /// The pool's half of MCC.
    pub pool: PoolController,
    /// The drain controller's half of MCC.
    pub drains: DrainController,
    /// A real registry.
    pub registry: Registry,
    /// Who is trusted.
    pub trust: Trust,
    /// The image that the guest was installed with.
    pub installed: Pushed,
    /// What happens in the cluster.
    pub events: Events,
    /// Set once an image brought another key: what is built from then on brings that one.
    pub key_from_image: Option<String>,
    layout: Layout,
    images: u32,
    /// What the pool was last told to run.
    target: Mutex<(Pushed, u32)>,
    /// What the node was last Done with.
    settled: Mutex<(Pushed, u32)>,
    began: Instant,
}

impl Lab {
    /// Everything but power.
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

    /// Everything, with the guest settled on the installed image.
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

    /// Annotates the Node as somebody other than the agent.
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

    /// What every derived image has: a version of its own, also between runs, and the config it was built from.
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

    /// A new image that nobody signed.
    pub async fn unsigned(&mut self) -> Result<Pushed> {
        self.unsigned_with(Extra::default()).await
    }

    /// The same with more in it.
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

    /// The same with more in it.
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

    /// Signs an image as the last one's tag.
    pub async fn sign(&self, image: &Pushed, signer: &Signer) -> Result<()> {
        let identity = format!("{}:{}", image.repository(), self.images);
        sign(&self.registry, &image.digest, REPOSITORY, &identity, signer).await
    }

    /// Makes the last image the pool's target. The config keeps step with the image, as builds have it.
    pub fn target(&self, image: &Pushed) {
        self.target_as(image, self.images);
    }

    /// Makes an image the pool's target that was built from `rendered-worker-<version>`.
    pub fn target_as(&self, image: &Pushed, version: u32) {
        *lock(&self.target) = (image.clone(), version);
        self.pool.set_target(&format!("rendered-worker-{version}"), image.pullspec().as_str());
    }

    /// What the pool was last told to run.
    #[must_use]
    pub fn last_target(&self) -> Pushed {
        lock(&self.target).0.clone()
    }

    /// What the node was last Done with.
    #[must_use]
    pub fn settled(&self) -> Pushed {
        lock(&self.settled).0.clone()
    }

    /// The pool goes back to what runs, which takes no reboot.
    pub async fn return_to_settled(&mut self) -> Result<()> {
        let (image, version) = lock(&self.settled).clone();
        let boot = self.vm.boot_id().to_owned();
        self.target_as(&image, version);
        self.wait_done(&image).await.context("back to what runs")?;
        ensure!(self.vm.boot_id() == boot && self.vm.is_on(), "a reboot into what runs already");
        self.arrived(&image).await
    }

    /// The number of the last image.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.images
    }

    // --- the node's ways ---

    /// Switches the guest on; the kubelet's part is to say that the Node is ready.
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

    /// Makes `image` the target and sees the node through to it.
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

    /// Waits until the Node is as wanted; the error shows how it was instead.
    pub async fn wait(&self, what: &str, deadline: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        self.store().wait_for(NODE, deadline, wanted).await.with_context(|| {
            let annotations = self.store().node(NODE).map(|node| node["metadata"]["annotations"].clone());
            format!("{what} did not happen within {deadline:?}; the Node has {annotations:#?}")
        })
    }

    /// Waits until the cluster hears that the node runs `image` and takes workloads.
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

    /// Waits for the first event in `queue` that `is_it` recognizes.
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
                    Err(RecvError::Closed) => bail!("nobody tells any more"),
                }
            }
        };
        timeout(deadline, wait).await.with_context(|| format!("{what} did not happen within {deadline:?}"))?
    }

    /// Waits until a request since the `mark`th is as wanted.
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
            ensure!(Instant::now() < end, "not so within {deadline:?}: {what}");
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// A line for whoever looks on.
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

    /// What must be true of a guest whose Node says Done.
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

    /// The manifest digest of what is booted, from the guest's repository.
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

    /// The kubelet's client certificate is replaced, as it does itself from time to time.
    pub async fn install_client(&mut self, pem: &str) -> Result<()> {
        let pem = openssl::base64::encode_block(pem.as_bytes());
        let script = format!(
            "set -e; cd {KUBELET}/pki; new=kubelet-client-$(date +%s%N).pem; umask 077; base64 -d >$new <<<{pem}
             ln -s {KUBELET}/pki/$new kubelet-client-updated.pem; mv -T kubelet-client-updated.pem {CLIENT}"
        );
        self.vm.run(&script).await.map(drop)
    }

    /// The end of a lab that nobody needs any more.
    pub async fn end(mut self, keep: bool) {
        // What cannot be killed or removed is gone already.
        let _ = self.vm.power_cut().await;
        if !keep {
            let _ = std::fs::remove_dir_all(self.vm.dir());
        }
    }

    /// Leaves what a person needs to find out what went wrong, and says where.
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

    /// Cuts the power; the Node goes with it.
    pub async fn power_cut(&mut self) -> Result<()> {
        self.vm.power_cut().await?;
        self.store().set_ready(NODE, false);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What Ignition and the kubelet's bootstrap leave on a node.
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
