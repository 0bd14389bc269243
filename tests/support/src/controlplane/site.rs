//! A pool with real agents on a real control plane. The node's host tools, the builder, the render controller and the
//! kubelet are doubles; they write to the API server as the originals do.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;

use super::{Client, ControlPlane, Options, Program, until};
use crate::events::{Event, Events};
use crate::image::{ImageSpec, Pushed};
use crate::machine::{AgentCommand, Machine, MachineOptions};
use crate::mcc::annotation;
use crate::pki::{Pki, rotate_client_pem, write_kubeconfig};
use crate::sign::sign;
use crate::world::{REPOSITORY, Trust, agent_env, write_first_boot};

/// Longest wait for a pool or a node; an update of one node takes 10 to 20 seconds on a free machine.
pub(super) const DEADLINE: Duration = Duration::from_secs(150);

/// The collection of MachineConfigNodes.
pub(super) const MCNS: &str = "/apis/machineconfiguration.openshift.io/v1/machineconfignodes";

const MCO: &str = "/apis/machineconfiguration.openshift.io/v1";

/// Settings of a site.
#[derive(Clone, Debug)]
pub struct SiteOptions {
    /// The agent's program.
    pub agent: PathBuf,
    /// The control plane.
    pub plane: Options,
    /// The number of nodes.
    pub nodes: usize,
    /// The pool of the nodes: `worker` or a custom one.
    pub pool: String,
    /// The pool's `maxUnavailable`.
    pub max_unavailable: usize,
    /// `controlPlaneTopology`.
    pub topology: String,
    /// Changes to each machine.
    pub machine: fn(&mut MachineOptions),
}

/// A node of the site.
pub struct Worker {
    /// Its name.
    pub name: String,
    /// The machine with the agent.
    pub machine: Machine,
    /// What happens on the machine.
    pub events: Events,
    directory: PathBuf,
    boots: Mutex<Vec<String>>,
}

impl Worker {
    /// The images booted so far, without the one of the installation.
    #[must_use]
    pub fn boots(&self) -> Vec<String> {
        self.boots.lock().unwrap().clone()
    }

    /// Gives the agent another client certificate, as the kubelet's rotation does; valid for `seconds` from now.
    pub fn rotate(&self, pki: &Pki, seconds: i64) {
        let pem = pki.kubelet_pem_valid(&self.name, -3600, seconds);
        rotate_client_pem(&self.directory.join("kubelet/pki"), &pem);
    }
}

/// The highest numbers that were seen while waiting.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Nodes that were cordoned or not Ready.
    pub unavailable: usize,
    /// Nodes that were cordoned.
    pub cordoned: usize,
}

/// A pool with its nodes and everything around it, until this is dropped.
pub struct Site {
    /// The control plane.
    pub plane: ControlPlane,
    /// Registry and keys.
    pub trust: Trust,
    /// The nodes.
    pub workers: Vec<std::sync::Arc<Worker>>,
    /// The image that the nodes were installed with, of the config `rendered-<pool>-1`.
    pub installed: Pushed,
    options: SiteOptions,
    builds: std::cell::Cell<u32>,
    kubelets: JoinSet<()>,
}

impl Site {
    /// Builds everything below `directory`, a short path. The nodes are registered and off.
    ///
    /// # Errors
    /// If anything does not start.
    pub async fn new(directory: &Path, options: SiteOptions) -> anyhow::Result<Self> {
        let pki = Pki::new();
        let plane = ControlPlane::start(&directory.join("plane"), &pki, options.plane.clone()).await?;
        let trust = Trust::new(directory, &pki, None).await?;
        let installed = push(&trust, &options.pool, "1", 0).await?;
        sign_as(&trust, &installed, "1").await?;
        let mut site = Self {
            plane,
            trust,
            workers: Vec::new(),
            installed: installed.clone(),
            options,
            builds: std::cell::Cell::default(),
            kubelets: JoinSet::new(),
        };
        site.create_cluster_objects().await?;
        site.plane.grant().await?;
        for number in 0..site.options.nodes {
            let worker = std::sync::Arc::new(site.worker(directory, number).await?);
            site.register(&worker).await?;
            site.workers.push(worker);
        }
        site.target("1", &installed).await?;
        site.plane.start_program(Program::Mco).await?;
        Ok(site)
    }

    /// What the installer and the operators of OpenShift create, as far as MCO's two controllers read it.
    async fn create_cluster_objects(&self) -> anyhow::Result<()> {
        let admin = self.plane.admin();
        let namespace = json!({"metadata": {"name": "openshift-machine-config-operator"}});
        admin.create("/api/v1/namespaces", &namespace).await?;
        let topology = &self.options.topology;
        let infra = json!({
            "apiVersion": "config.openshift.io/v1", "kind": "Infrastructure", "metadata": {"name": "cluster"}, "spec": {},
            "status": {
                "controlPlaneTopology": topology, "infrastructureTopology": topology, "cpuPartitioning": "None",
                "apiServerURL": self.plane.url(), "apiServerInternalURI": self.plane.url(),
                "infrastructureName": "test", "etcdDiscoveryDomain": "",
            },
        });
        let spec = json!({
            "additionalTrustBundle": null, "baseOSContainerImage": "", "cloudProviderCAData": null,
            "cloudProviderConfig": "", "clusterDNSIP": "10.0.0.10", "dns": null, "images": {}, "infra": infra,
            "ipFamilies": "IPv4", "kubeAPIServerServingCAData": "AA==", "network": null, "proxy": null, "releaseImage": "",
            "rootCAData": "AA==",
        });
        admin
            .create(&format!("{MCO}/controllerconfigs"), &object("ControllerConfig", "machine-config-controller", spec))
            .await?;
        let mut pools = vec!["worker"];
        if self.options.pool != "worker" {
            pools.push(&self.options.pool);
        }
        for pool in pools {
            let spec = json!({
                "configuration": {"name": format!("rendered-{pool}-1")},
                "machineConfigSelector": {"matchLabels": {"machineconfiguration.openshift.io/role": pool}},
                "maxUnavailable": self.options.max_unavailable,
                "nodeSelector": {"matchLabels": {role(pool): ""}},
                // Until the first target is set.
                "paused": pool == self.options.pool,
            });
            admin.create(&format!("{MCO}/machineconfigpools"), &object("MachineConfigPool", pool, spec)).await?;
        }
        self.layer().await
    }

    /// Gives the pool a MachineOSConfig.
    pub(super) async fn layer(&self) -> anyhow::Result<()> {
        let spec = json!({
            "machineConfigPool": {"name": self.options.pool},
            "imageBuilder": {"imageBuilderType": "Job"},
            "renderedImagePushSecret": {"name": "push"},
            "renderedImagePushSpec": format!("{}/{REPOSITORY}:latest", self.trust.registry.host()),
        });
        let object = object("MachineOSConfig", &self.options.pool, spec);
        self.plane.admin().create(&format!("{MCO}/machineosconfigs"), &object).await.map(drop)
    }

    /// Takes the pool's MachineOSConfig and its builds away.
    pub(super) async fn unlayer(&self) -> anyhow::Result<()> {
        self.plane.admin().delete(&format!("{MCO}/machineosconfigs/{}", self.options.pool)).await?;
        self.delete_builds(|_| true).await
    }

    async fn delete_builds(&self, which: impl Fn(&Value) -> bool) -> anyhow::Result<()> {
        let builds = self.plane.admin().get(&format!("{MCO}/machineosbuilds")).await?.ok()?;
        for build in builds["items"].as_array().into_iter().flatten().filter(|build| which(build)) {
            let name = build["metadata"]["name"].as_str().unwrap_or_default();
            self.plane.admin().delete(&format!("{MCO}/machineosbuilds/{name}")).await?;
        }
        Ok(())
    }

    async fn worker(&self, directory: &Path, number: usize) -> anyhow::Result<Worker> {
        let name = format!("worker-{number}");
        let directory = directory.join(number.to_string());
        let kubelet = directory.join("kubelet");
        let pki = self.plane.pki();
        let pem = rotate_client_pem(&kubelet.join("pki"), &pki.kubelet_pem(&name));
        write_kubeconfig(&kubelet.join("kubeconfig"), &self.plane.url(), &pki.ca_pem(), &pem);
        let env = agent_env(&kubelet.join("kubeconfig"), &self.trust.engine);
        let agent = AgentCommand { program: self.options.agent.clone(), args: vec!["run".to_owned()], env };
        let events = Events::new();
        write_log(&events, &directory.join("agent.log"))?;
        let mut options = MachineOptions::new(&directory, self.trust.engine.clone(), events.clone(), agent);
        options.watchdog = Some(Duration::from_secs(60));
        (self.options.machine)(&mut options);
        let machine = Machine::new(options).await?;
        machine.install(&format!("ostree-unverified-registry:{}", self.installed.pullspec())).await?;
        write_first_boot(&machine.root(), &format!("rendered-{}-1", self.options.pool), &self.installed.pullspec())?;
        Ok(Worker { name, machine, events, directory, boots: Mutex::default() })
    }

    /// The node joins: the Node that a kubelet creates, the labels that an approver adds, the MachineConfigNode that the
    /// operator creates, and the kubelet's reports from now on.
    pub(super) async fn register(&mut self, worker: &std::sync::Arc<Worker>) -> anyhow::Result<()> {
        let name = &worker.name;
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status});
        let labels = json!({
            "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", role("worker"): "",
        });
        let annotations = json!({"volumes.kubernetes.io/controller-managed-attach-detach": "true"});
        let metadata = json!({"name": name, "labels": labels, "annotations": annotations});
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {},
            "status": {"conditions": [condition("DiskPressure", "False"), condition("Ready", "True")]},
        });
        let node = self.plane.admin().create("/api/v1/nodes", &node).await?;
        let spec = json!({
            "node": {"name": name}, "pool": {"name": self.options.pool}, "configVersion": {"desired": "not-yet-set"},
        });
        let mut mcn = object("MachineConfigNode", name, spec);
        mcn["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "v1", "kind": "Node", "name": name, "uid": node["metadata"]["uid"]}]);
        // Without a garbage collector the one of an earlier Node is still there.
        self.plane.admin().delete(&format!("{MCNS}/{name}")).await?;
        self.plane.admin().create(MCNS, &mcn).await?;
        if self.workers.iter().all(|known| known.name != *name) {
            self.kubelets.spawn(report(self.plane.admin().clone(), worker.clone()));
        }
        Ok(())
    }

    /// Boots every node.
    ///
    /// # Errors
    /// If a machine cannot be booted.
    pub async fn power_on(&self) -> anyhow::Result<()> {
        for worker in &self.workers {
            worker.machine.power_on().await?;
        }
        Ok(())
    }

    /// The only node.
    pub(super) fn only(&self) -> &std::sync::Arc<Worker> {
        &self.workers[0]
    }

    /// A new image for `rendered-<pool>-<version>`, not signed.
    ///
    /// # Errors
    /// If the registry does not take it.
    pub async fn unsigned(&self, version: &str) -> anyhow::Result<Pushed> {
        self.builds.set(self.builds.get() + 1);
        push(&self.trust, &self.options.pool, version, self.builds.get()).await
    }

    /// The same, signed with the key that the nodes' policy names.
    ///
    /// # Errors
    /// If the registry does not take it.
    pub async fn signed(&self, version: &str) -> anyhow::Result<Pushed> {
        let image = self.unsigned(version).await?;
        self.sign(&image, version).await?;
        Ok(image)
    }

    /// Signs `image` as its tag.
    pub(super) async fn sign(&self, image: &Pushed, version: &str) -> anyhow::Result<()> {
        sign_as(&self.trust, image, version).await
    }

    /// Gives the pool the config `rendered-<pool>-<version>` and the image, as the render controller and the builder do
    /// when a build has succeeded.
    ///
    /// # Errors
    /// If the server refuses a write.
    pub async fn target(&self, version: &str, image: &Pushed) -> anyhow::Result<()> {
        let admin = self.plane.admin();
        let (pool, pullspec) = (&self.options.pool, image.pullspec());
        let config = format!("rendered-{pool}-{version}");
        let path = format!("{MCO}/machineconfigpools/{pool}");
        let now = admin.get(&path).await?.ok()?;
        ensure!(!has_condition(&now, "Degraded", "True"), "the builder builds nothing for a pool that is Degraded");
        let paused = now["spec"]["paused"] == true;
        let first = paused && admin.get(&format!("{MCO}/machineosconfigs/{pool}")).await?.ok()?["status"].is_null();
        // These controllers read the pool from their cache and config and build from the server, and could mix two targets.
        let paused_pool =
            admin.merge(&path, &json!({"spec": {"paused": true, "configuration": {"name": config}}})).await?;
        if !first {
            let generation = paused_pool["metadata"]["generation"].as_u64();
            let synced = async || {
                let observed = self.pool().await?["status"]["observedGeneration"].as_u64();
                Ok((observed >= generation).then_some(()))
            };
            until("MCC's sync of the paused pool", DEADLINE, synced).await?;
        }
        self.delete_builds(|build| build["spec"]["machineConfig"]["name"] == config).await?;
        self.builds.set(self.builds.get() + 1);
        let name = format!("{pool}-{}", self.builds.get());
        let spec = json!({
            "machineConfig": {"name": config}, "machineOSConfig": {"name": pool},
            "renderedImagePushSpec": format!("{}/{REPOSITORY}:{name}", self.trust.registry.host()),
        });
        admin.create(&format!("{MCO}/machineosbuilds"), &object("MachineOSBuild", &name, spec)).await?;
        let condition = json!({
            "type": "Succeeded", "status": "True", "reason": "Ready", "message": "Build Ready",
            "lastTransitionTime": "2026-11-29T00:01:00Z",
        });
        let status = json!({
            "buildStart": "2026-11-29T00:00:00Z", "buildEnd": "2026-11-29T00:01:00Z",
            "conditions": [condition], "digestedImagePushSpec": pullspec,
        });
        admin.merge(&format!("{MCO}/machineosbuilds/{name}/status"), &json!({"status": status})).await?;
        let status = json!({"status": {"currentImagePullSpec": pullspec}});
        admin.merge(&format!("{MCO}/machineosconfigs/{pool}/status"), &status).await?;
        admin.merge(&path, &json!({"spec": {"paused": paused && !first}})).await?;
        Ok(())
    }

    /// Pauses or unpauses the pool.
    pub(super) async fn pause(&self, paused: bool) -> anyhow::Result<()> {
        let path = format!("{MCO}/machineconfigpools/{}", self.options.pool);
        self.plane.admin().merge(&path, &json!({"spec": {"paused": paused}})).await.map(drop)
    }

    /// The pool.
    pub(super) async fn pool(&self) -> anyhow::Result<Value> {
        self.plane.admin().get(&format!("{MCO}/machineconfigpools/{}", self.options.pool)).await?.ok()
    }

    /// The Node.
    pub(super) async fn node(&self, worker: &Worker) -> anyhow::Result<Option<Value>> {
        self.plane.admin().get(&format!("/api/v1/nodes/{}", worker.name)).await?.found()
    }

    /// Sets or removes an annotation, as an administrator does.
    pub(super) async fn annotate(&self, worker: &Worker, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        let patch = json!({"metadata": {"annotations": {key: value}}});
        self.plane.admin().merge(&format!("/api/v1/nodes/{}", worker.name), &patch).await.map(drop)
    }

    /// Waits until `predicate` accepts the Node; the error shows its annotations.
    pub(super) async fn wait(
        &self,
        worker: &Worker,
        what: &str,
        predicate: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        let found = until(what, DEADLINE, async || Ok(self.node(worker).await?.filter(|node| predicate(node)))).await;
        match found {
            Ok(node) => Ok(node),
            Err(error) => {
                let node = self.node(worker).await.ok().flatten().unwrap_or_default();
                Err(error).context(format!("{} has {:#}", worker.name, node["metadata"]["annotations"]))
            }
        }
    }

    /// Waits until the Node's reason starts with this word.
    pub(super) async fn wait_reason(&self, worker: &Worker, word: &str) -> anyhow::Result<Value> {
        let starts = |node: &Value| annotation(node, "reason").is_some_and(|reason| reason.starts_with(word));
        self.wait(worker, &format!("the reason {word}"), starts).await
    }

    /// Waits until MCC counts the pool complete on `image`, and every node has booted it, reports it and is in service.
    ///
    /// # Errors
    /// If that does not happen in time.
    pub async fn wait_updated(&self, image: &Pushed) -> anyhow::Result<Seen> {
        let mut seen = Seen::default();
        let began = Instant::now();
        loop {
            self.plane.check()?;
            // The API server may be away for a while.
            let looked = self.look().await;
            let missing = match &looked {
                Ok((nodes, pool)) => {
                    let cordoned = |node: &&Value| node["spec"]["unschedulable"] == true;
                    let away = |node: &&Value| cordoned(node) || !has_condition(node, "Ready", "True");
                    seen.cordoned = seen.cordoned.max(nodes.iter().filter(cordoned).count());
                    seen.unavailable = seen.unavailable.max(nodes.iter().filter(away).count());
                    self.missing(nodes, pool, image)
                }
                Err(error) => Some(format!("{error:#}")),
            };
            let Some(missing) = missing else { return Ok(seen) };
            if began.elapsed() > DEADLINE {
                let (nodes, pool) = looked.unwrap_or_default();
                let nodes: Vec<_> = nodes.iter().map(|node| &node["metadata"]["annotations"]).collect();
                let (nodes, status) = (json!(nodes), &pool["status"]);
                anyhow::bail!("{missing} after {DEADLINE:?}: {status:#}, nodes {nodes:#}");
            }
            tokio::time::sleep(super::POLL).await;
        }
    }

    /// What is missing to a pool that is complete on `image`.
    fn missing(&self, nodes: &[Value], pool: &Value, image: &Pushed) -> Option<String> {
        let pullspec = image.pullspec();
        if !is_updated(pool, &pullspec, self.workers.len()) {
            return Some(format!("the pool is not Updated on {pullspec}"));
        }
        if nodes.len() != self.workers.len() {
            return Some("a Node is missing".to_owned());
        }
        let of = |(worker, node): (&std::sync::Arc<Worker>, &Value)| {
            let name = &worker.name;
            let booted = worker.machine.booted().map(|booted| booted.digest).unwrap_or_default();
            let missing = if booted != image.digest {
                format!("{name} runs {booted}")
            } else if annotation(node, "currentImage") != Some(&*pullspec) {
                format!("{name} reports another image")
            } else if node["spec"]["unschedulable"] == true {
                format!("{name} is cordoned")
            } else if annotation(node, "desiredDrain") != annotation(node, "lastAppliedDrain") {
                format!("{name} waits for its drain request")
            } else {
                let reason = annotation(node, "reason").filter(|reason| !reason.is_empty())?;
                format!("{name} has the reason {reason}")
            };
            Some(missing)
        };
        self.workers.iter().zip(nodes).find_map(of)
    }

    async fn look(&self) -> anyhow::Result<(Vec<Value>, Value)> {
        let mut nodes = Vec::new();
        for worker in &self.workers {
            nodes.extend(self.node(worker).await?);
        }
        Ok((nodes, self.pool().await?))
    }
}

/// Whether MCC counts all `nodes` as updated with this image. The message has the image, and so cannot be an old one.
fn is_updated(pool: &Value, image: &str, nodes: usize) -> bool {
    let (spec, status) = (&pool["spec"], &pool["status"]);
    let conditions = status["conditions"].as_array();
    let updated = conditions.into_iter().flatten().find(|condition| condition["type"] == "Updated");
    status["updatedMachineCount"] == nodes
        && status["machineCount"] == nodes
        && status["configuration"]["name"] == spec["configuration"]["name"]
        && updated
            .is_some_and(|it| it["status"] == "True" && it["message"].as_str().is_some_and(|it| it.contains(image)))
        && has_condition(pool, "Updating", "False")
        && has_condition(pool, "Degraded", "False")
}

/// An object of MCO's API group.
pub(super) fn object(kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "machineconfiguration.openshift.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// Whether the object has the condition with this status.
pub(super) fn has_condition(object: &Value, kind: &str, status: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|condition| condition["type"] == kind && condition["status"] == status)
}

/// The label that a pool selects.
pub(super) fn role(pool: &str) -> String {
    format!("node-role.kubernetes.io/{pool}")
}

/// Images with the same version differ by the number of their build.
async fn push(trust: &Trust, pool: &str, version: &str, build: u32) -> anyhow::Result<Pushed> {
    let spec = ImageSpec::new(version).rendered_config(&format!("rendered-{pool}-{version}"));
    trust.registry.push(REPOSITORY, version, &spec.label("build", &build.to_string())).await
}

async fn sign_as(trust: &Trust, image: &Pushed, tag: &str) -> anyhow::Result<()> {
    sign(&trust.registry, &image.digest, &image.repo, &format!("{}:{tag}", image.repository()), &trust.signer).await
}

/// Writes the agent's lines and the machine's boots to a file, for the time after a failure.
fn write_log(events: &Events, path: &Path) -> anyhow::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let file = Mutex::new(File::create(path)?);
    let began = Instant::now();
    events.listen(move |event| {
        let line = match event {
            Event::AgentLine(line) => line.trim_start().to_owned(),
            Event::AgentStatus(_) => return,
            other => format!("-- {other:?}"),
        };
        let _ = writeln!(file.lock().unwrap(), "{:7.1}s {line}", began.elapsed().as_secs_f64());
    });
    Ok(())
}

/// The kubelet's reports: Ready while the machine is up, and the boot id. A down machine is noticed by the control plane.
async fn report(client: Client, worker: std::sync::Arc<Worker>) {
    let mut queue = worker.events.subscribe();
    let path = format!("/api/v1/nodes/{}/status", worker.name);
    loop {
        let mut status: BTreeMap<&str, Value> = BTreeMap::new();
        let ready = match queue.recv().await {
            Ok(Event::Down) => "Unknown",
            Ok(Event::Booted { boot_id, reference }) => {
                worker.boots.lock().unwrap().push(reference);
                status.insert("nodeInfo", json!({"bootID": boot_id}));
                "True"
            }
            Ok(_) | Err(RecvError::Lagged(_)) => continue,
            Err(RecvError::Closed) => return,
        };
        status.insert("conditions", json!([{"type": "Ready", "status": ready}]));
        let patch = json!({"status": status});
        // The server may be away, and so may the Node.
        let told = async || Ok(client.strategic(&path, &patch).await.ok());
        let _ = until("the kubelet's report", DEADLINE, told).await;
    }
}
