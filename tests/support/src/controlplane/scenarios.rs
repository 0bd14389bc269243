//! What happens to a pool of agents on a real control plane. Each scenario ends with the pool `Updated=True` or with the
//! documented refusal, or it fails.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::site::{DEADLINE, MCNS, has_condition, role};
use super::{Client, Options, Program, Site, SiteOptions, conformance, until};
use crate::events::Event;
use crate::image::Pushed;
use crate::machine::MachineOptions;
use crate::mcc::annotation;
use crate::world::World;

/// Longest scenario; one that hangs fails after this.
const LIMIT: Duration = Duration::from_secs(900);
/// The documented way to have a refusal checked again at once.
const RETRY: &str = "rebase-agent.openshift.io/retry";

/// What a scenario gets.
#[derive(Clone, Debug)]
pub struct Stage {
    /// The agent's program.
    pub agent: PathBuf,
    /// The directory that `tests/support/controlplane/build` prints.
    pub programs: PathBuf,
    /// A directory for the scenario's files; a short path.
    pub directory: PathBuf,
}

impl Stage {
    async fn site(&self, change: impl FnOnce(&mut SiteOptions)) -> anyhow::Result<Site> {
        let plane = Options { programs: self.programs.clone(), gated: false };
        let mut options = SiteOptions {
            agent: self.agent.clone(),
            plane,
            nodes: 1,
            pool: "worker".to_owned(),
            max_unavailable: 1,
            topology: "HighlyAvailable".to_owned(),
            machine: |_| {},
        };
        change(&mut options);
        Site::new(&self.directory, options).await
    }

    /// A site whose nodes are up and done on the installed image.
    async fn settled(&self, change: impl FnOnce(&mut SiteOptions)) -> anyhow::Result<Site> {
        let site = self.site(change).await?;
        site.power_on().await?;
        site.wait_updated(&site.installed).await.context("the first boot")?;
        Ok(site)
    }
}

/// What a scenario measured.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The agents' requests, from the server's audit log.
    pub requests: usize,
    /// Those that write.
    pub writes: usize,
    /// What else is worth a line.
    pub note: String,
}

type Running<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Outcome>> + 'a>>;

/// A scenario.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// Whether it belongs to the short set.
    pub short: bool,
    /// Whether it only waits, so that others may run beside it.
    pub patient: bool,
    run: fn(&Stage) -> Running<'_>,
}

impl Scenario {
    /// Runs it.
    ///
    /// # Errors
    /// Any deviation from the expected course.
    pub async fn run(&self, stage: &Stage) -> anyhow::Result<Outcome> {
        timeout(LIMIT, (self.run)(stage)).await.with_context(|| format!("not finished after {LIMIT:?}"))?
    }
}

macro_rules! scenarios {
    ($($name:literal $(($kind:ident))? => $run:path),* $(,)?) => {
        /// All scenarios, in the order of the table.
        pub const SCENARIOS: &[Scenario] = &[$(
            Scenario {
                name: $name,
                short: scenarios!(@ short $($kind)?),
                patient: scenarios!(@ patient $($kind)?),
                run: |stage| Box::pin($run(stage)),
            },
        )*];
    };
    (@ short short) => { true };
    (@ patient patient) => { true };
    (@ $($other:tt)*) => { false };
}

scenarios! {
    "conformance" (short) => conformance::scenario,
    "first-boot" (short) => first_boot,
    "machineconfignodes" (short) => machine_config_nodes,
    "custom-pool" => custom_pool,
    "two-nodes" => two_nodes,
    "three-nodes" => three_nodes,
    "unsigned-then-signed" => unsigned_then_signed,
    "paused" => paused,
    "disruption-budget" => disruption_budget,
    "retarget-while-staging" => retarget_while_staging,
    "file-only-config" => file_only_config,
    "layering-reverted" => layering_reverted,
    "node-recreated" => node_recreated,
    "server-stopped" => server_stopped,
    "server-killed" => server_killed,
    "database-restored" => database_restored,
    "certificate-rotated" => certificate_rotated,
    "certificate-expired" => certificate_expired,
    "watch-expired" => watch_expired,
    "single-replica" => single_replica,
    "mcc-away" => mcc_away,
    "image-mode-status" => image_mode_status,
    "idle" (patient) => idle,
}

/// Right after its start, kube-apiserver forbids what it has not read the roles for yet.
const STARTING: &[u16] = &[403];

/// The end of a scenario: no request was refused but with these statuses, and every agent stops.
async fn close(site: Site, note: String, allowed: &[u16]) -> anyhow::Result<Outcome> {
    let audit = site.plane.audit()?;
    for request in audit.of_agents(None) {
        let refused = (400..500).contains(&request.status) && !allowed.contains(&request.status);
        ensure!(!refused, "the server answered {} to {} {}", request.status, request.verb, request.uri);
    }
    let requests = audit.of_agents(None).count();
    let writes = audit.of_agents(None).filter(|request| request.is_write()).count();
    for worker in &site.workers {
        worker.machine.stop_agent().await;
    }
    Ok(Outcome { requests, writes, note })
}

/// Signs and sets a target, and waits for the pool.
async fn update(site: &Site, version: &str) -> anyhow::Result<Pushed> {
    let image = site.signed(version).await?;
    site.target(version, &image).await?;
    site.wait_updated(&image).await?;
    Ok(image)
}

fn drain_of(version: &str) -> impl Fn(&Value) -> bool {
    let wanted = format!("drain-rendered-worker-{version}");
    move |node| annotation(node, "desiredDrain") == Some(&wanted)
}

async fn first_boot(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|_| {}).await?;
    let node = site.node(site.only()).await?.context("the Node is gone")?;
    ensure!(annotation(&node, "firstPivotConfig") == Some("rendered-worker-1"), "no firstPivotConfig: {node:#}");
    let before = site.plane.audit()?.of_agents(None).count();
    let writes =
        |site: &Site| anyhow::Ok(site.plane.audit()?.of_agents(None).filter(|request| request.is_write()).count());
    let written = writes(&site)?;
    update(&site, "2").await?;
    let node = site.node(site.only()).await?.context("the Node is gone")?;
    ensure!(annotation(&node, "lastAppliedDrain") == Some("uncordon-rendered-worker-2"), "not uncordoned: {node:#}");
    let requests = site.plane.audit()?.of_agents(None).count() - before;
    let note = format!("an update took {requests} requests, {} of them writes", writes(&site)? - written);
    close(site, note, &[]).await
}

async fn machine_config_nodes(stage: &Stage) -> anyhow::Result<Outcome> {
    // The kubelet is slow too, so that the boot shows before the uncordon.
    let slow = |machine: &mut MachineOptions| machine.kubelet_delay = Duration::from_millis(2500);
    let site = stage.settled(|options| options.machine = slow).await?;
    update(&site, "2").await?;
    let shown = async || {
        let mcn = site.plane.admin().get(&format!("{MCNS}/{}", site.only().name)).await?.ok()?;
        Ok(has_condition(&mcn, "Updated", "True").then_some(()))
    };
    until("the end of the first update", DEADLINE, shown).await?;
    let mut kubectl = tokio::process::Command::new(stage.programs.join("kubectl"));
    kubectl.arg("--kubeconfig").arg(site.plane.kubeconfig());
    kubectl.args(["get", "machineconfignodes", "--output=wide", "--watch"]);
    let file = stage.directory.join("machineconfignodes.txt");
    let mut kubectl = kubectl.stdout(std::fs::File::create(&file)?).kill_on_drop(true).spawn()?;
    update(&site, "3").await?;
    until("the end of the second update", DEADLINE, shown).await?;
    kubectl.kill().await?;
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster_agent/machineconfignodes.txt");
    let golden = std::fs::read_to_string(golden)?;
    let golden: Vec<Vec<&str>> = golden.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    let shown = std::fs::read_to_string(&file)?;
    let rows = columns(&shown)?;
    // A busy agent leaves out a state that is over.
    let mut expected = golden.iter();
    let in_order = rows.iter().all(|row| expected.any(|golden| golden == row));
    ensure!(
        in_order && rows.len() + 2 >= golden.len(),
        "kubectl shows {rows:#?}, the golden transcript is {golden:#?}"
    );
    ensure!(rows.last() == golden.last(), "the last line is {:?}", rows.last());
    close(site, format!("kubectl shows {} of the {} golden lines", rows.len(), golden.len()), &[]).await
}

/// The columns of the golden transcript, from what `kubectl get machineconfignodes --output=wide --watch` printed.
fn columns(shown: &str) -> anyhow::Result<Vec<Vec<&str>>> {
    const COLUMNS: [&str; 11] = [
        "CURRENTCONFIG",
        "UPDATED",
        "UPDATEPREPARED",
        "UPDATEEXECUTED",
        "UPDATEDFILESANDOS",
        "CORDONEDNODE",
        "DRAINEDNODE",
        "REBOOTEDNODE",
        "RESUMED",
        "UNCORDONEDNODE",
        "UPDATECOMPLETE",
    ];
    let mut lines = shown.lines();
    let header = lines.next().context("kubectl printed nothing")?;
    let titles: Vec<&str> = header.split_whitespace().collect();
    let places = COLUMNS.map(|column| titles.iter().position(|title| *title == column));
    let mut starts: Vec<usize> = Vec::new();
    for title in &titles {
        let from = starts.last().map_or(0, |last| last + 1);
        starts.push(from + header[from..].find(title).context("a title")?);
    }
    starts.push(usize::MAX);
    let mut rows: Vec<Vec<&str>> = Vec::new();
    for line in lines {
        let cell = |place: Option<usize>| {
            let place = place.context("kubectl lacks a column")?;
            let end = starts[place + 1].min(line.len());
            anyhow::Ok(line.get(starts[place]..end).unwrap_or_default().trim())
        };
        let row = places.into_iter().map(cell).collect::<anyhow::Result<Vec<_>>>()?;
        if rows.last() != Some(&row) {
            rows.push(row);
        }
    }
    Ok(rows)
}

async fn custom_pool(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.site(|options| options.pool = "infra".to_owned()).await?;
    site.power_on().await?;
    let first = |node: &Value| annotation(node, "firstPivotConfig") == Some("rendered-infra-1");
    site.wait(site.only(), "the first-boot annotations", first).await?;
    // Newer controllers do this when they see `firstPivotConfig`.
    let labels = json!({"metadata": {"labels": {role("infra"): ""}}});
    site.plane.admin().merge(&format!("/api/v1/nodes/{}", site.only().name), &labels).await?;
    site.wait_updated(&site.installed).await?;
    update(&site, "2").await?;
    close(site, String::new(), &[]).await
}

async fn nodes(stage: &Stage, nodes: usize) -> anyhow::Result<Outcome> {
    let site = stage.settled(|options| options.nodes = nodes).await?;
    let two = site.signed("2").await?;
    site.target("2", &two).await?;
    let seen = site.wait_updated(&two).await?;
    ensure!(seen.cordoned == 1 && seen.unavailable == 1, "maxUnavailable is 1, and at once there were {seen:?}");
    close(site, String::new(), &[]).await
}

async fn two_nodes(stage: &Stage) -> anyhow::Result<Outcome> {
    nodes(stage, 2).await
}

async fn three_nodes(stage: &Stage) -> anyhow::Result<Outcome> {
    nodes(stage, 3).await
}

async fn unsigned_then_signed(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|_| {}).await?;
    let worker = site.only();
    let two = site.unsigned("2").await?;
    site.target("2", &two).await?;
    let refused = |node: &Value| {
        let reason = annotation(node, "reason").unwrap_or_default();
        annotation(node, "state") == Some("Degraded") && reason.starts_with("SignatureMissing")
    };
    let node = site.wait(worker, "the refusal", refused).await?;
    ensure!(
        node["spec"]["unschedulable"] != true
            && annotation(&node, "desiredDrain").is_none_or(|drain| !drain.starts_with("drain-")),
        "drained for an unsigned image"
    );
    ensure!(worker.machine.deployments().iter().all(|deployment| !deployment.staged), "an unsigned image is staged");
    let degraded = async || {
        let pool = site.pool().await?;
        let conditions = pool["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let is = |condition: &Value| condition["type"] == "NodeDegraded" && condition["status"] == "True";
        Ok(conditions.into_iter().find(is))
    };
    let condition = until("the pool's NodeDegraded", DEADLINE, degraded).await?;
    ensure!(condition["message"].as_str().is_some_and(|text| text.contains("SignatureMissing")), "{condition}");
    site.sign(&two, "2").await?;
    site.annotate(worker, RETRY, Some("signed")).await?;
    site.wait_updated(&two).await?;
    close(site, String::new(), &[]).await
}

async fn paused(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|_| {}).await?;
    site.pause(true).await?;
    let two = site.signed("2").await?;
    site.target("2", &two).await?;
    let writes =
        |site: &Site| anyhow::Ok(site.plane.audit()?.of_agents(None).filter(|request| request.is_write()).count());
    let before = writes(&site)?;
    let waits = async || {
        let pool = site.pool().await?;
        Ok(pool["status"].to_string().contains("Pool is paused; will not update").then_some(()))
    };
    until("MCC's sync of the paused pool", DEADLINE, waits).await?;
    sleep(Duration::from_secs(5)).await;
    ensure!(writes(&site)? == before, "the agent wrote while the pool was paused");
    ensure!(site.only().boots().len() == 1, "the node of a paused pool booted again");
    site.pause(false).await?;
    site.wait_updated(&two).await?;
    close(site, String::new(), &[]).await
}

async fn disruption_budget(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|_| {}).await?;
    let worker = site.only();
    let admin = site.plane.admin();
    let labels = json!({"app": "database"});
    let pod = json!({
        "metadata": {"name": "database", "labels": labels},
        "spec": {
            "nodeName": worker.name, "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "database", "image": "registry.example/database"}],
        },
    });
    admin.create("/api/v1/namespaces/default/pods", &pod).await?;
    let running = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    admin.strategic("/api/v1/namespaces/default/pods/database/status", &running).await?;
    let budget =
        json!({"metadata": {"name": "database"}, "spec": {"minAvailable": 1, "selector": {"matchLabels": labels}}});
    let budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    admin.create(budgets, &budget).await?;
    let two = site.signed("2").await?;
    site.target("2", &two).await?;
    site.wait(worker, "the drain request", drain_of("2")).await?;
    site.wait(worker, "the cordon", |node| node["spec"]["unschedulable"] == true).await?;
    // Longer than one attempt of the drain controller.
    sleep(Duration::from_secs(20)).await;
    let node = site.node(worker).await?.context("the Node is gone")?;
    ensure!(annotation(&node, "lastAppliedDrain") != annotation(&node, "desiredDrain"), "the budget did not hold");
    ensure!(annotation(&node, "reason").is_some_and(|reason| reason.starts_with("DrainPending")), "{node:#}");
    ensure!(worker.boots().len() == 1, "booted without a drain");
    admin.delete(&format!("{budgets}/database")).await?;
    site.wait_updated(&two).await?;
    ensure!(admin.get("/api/v1/namespaces/default/pods/database").await?.found()?.is_none(), "booted with the pod");
    close(site, String::new(), &[]).await
}

async fn retarget_while_staging(stage: &Stage) -> anyhow::Result<Outcome> {
    // With 1, MCC gives a node that is not done no other target.
    let site = stage.settled(|options| options.max_unavailable = 2).await?;
    let worker = site.only();
    let (two, three) = (site.signed("2").await?, site.signed("3").await?);
    worker.machine.rpm_ostreed().hang_at("Importing");
    site.target("2", &two).await?;
    let hangs = async || Ok(worker.machine.rpm_ostreed().is_hanging().then_some(()));
    until("the staging of image 2", DEADLINE, hangs).await?;
    site.target("3", &three).await?;
    let wanted = three.pullspec();
    site.wait(worker, "MCC's new target", |node| annotation(node, "desiredImage") == Some(&*wanted)).await?;
    worker.machine.rpm_ostreed().release();
    site.wait_updated(&three).await?;
    let boots = worker.boots();
    ensure!(boots.len() == 2 && boots[1].contains(&three.digest), "booted {boots:?}");
    close(site, String::new(), &[]).await
}

async fn file_only_config(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|options| options.max_unavailable = 2).await?;
    let worker = site.only();
    // MCO reuses the image for a config that differs only in files.
    site.target("2", &site.installed).await?;
    let node = site.wait_reason(worker, "ConfigAheadOfImage").await?;
    ensure!(annotation(&node, "state") == Some("Working"), "the state is not Working: {node:#}");
    ensure!(node["spec"]["unschedulable"] != true && worker.boots().len() == 1, "drained or rebooted for nothing");
    // The rebuild of the same config.
    update(&site, "2").await?;
    close(site, "the rebuilt image needs a second slot (maxUnavailable 2)".to_owned(), &[]).await
}

async fn layering_reverted(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|options| options.max_unavailable = 2).await?;
    let worker = site.only();
    let two = update(&site, "2").await?;
    site.unlayer().await?;
    let node = site.wait_reason(worker, "LayeringReverted").await?;
    ensure!(annotation(&node, "desiredImage").is_none(), "desiredImage is still there: {node:#}");
    ensure!(node["spec"]["unschedulable"] != true, "cordoned although nothing is to be done");
    ensure!(worker.boots().len() == 2, "booted for a pool without an image");
    site.layer().await?;
    site.target("2", &two).await?;
    site.wait_updated(&two).await?;
    update(&site, "3").await?;
    close(site, String::new(), &[]).await
}

async fn node_recreated(stage: &Stage) -> anyhow::Result<Outcome> {
    let mut site = stage.settled(|_| {}).await?;
    let worker = site.only().clone();
    let two = update(&site, "2").await?;
    site.plane.admin().delete(&format!("/api/v1/nodes/{}", worker.name)).await?;
    let gone = async || {
        let status = worker.machine.systemd().unit("rebase-agent.service").map(|unit| unit.status_text);
        Ok(status.filter(|text| text.contains("NodeNotFound")))
    };
    until("the agent's NodeNotFound", DEADLINE, gone).await?;
    site.register(&worker).await?;
    site.wait_updated(&two).await?;
    update(&site, "3").await?;
    close(site, String::new(), &[404]).await
}

/// Waits for the drain request, has `trouble` happen to the control plane, and waits for the pool.
async fn in_the_middle(
    mut site: Site,
    allowed: &[u16],
    trouble: impl AsyncFnOnce(&mut Site) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let two = site.signed("2").await?;
    site.target("2", &two).await?;
    site.wait(&site.workers[0], "the drain request", drain_of("2")).await?;
    trouble(&mut site).await?;
    site.wait_updated(&two).await?;
    update(&site, "3").await?;
    close(site, String::new(), allowed).await
}

/// The annotation that holds a node before its drain.
const HOLD: &str = "rebase-agent.openshift.io/hold";

async fn server_stopped(stage: &Stage) -> anyhow::Result<Outcome> {
    let mut site = stage.settled(|_| {}).await?;
    let worker = site.only().clone();
    // Not during the drain request: MCC forgets one whose cordon fails five times.
    site.annotate(&worker, HOLD, Some("the API server is upgraded")).await?;
    let two = site.signed("2").await?;
    site.target("2", &two).await?;
    site.wait_reason(&worker, "Held").await?;
    site.plane.stop_program(Program::ApiServer, Signal::SIGTERM).await?;
    site.plane.start_program(Program::ApiServer).await?;
    site.annotate(&worker, HOLD, None).await?;
    site.wait_updated(&two).await?;
    update(&site, "3").await?;
    close(site, String::new(), STARTING).await
}

async fn server_killed(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|_| {}).await?;
    in_the_middle(site, STARTING, async |site| {
        site.plane.stop_program(Program::ApiServer, Signal::SIGKILL).await?;
        site.plane.start_program(Program::ApiServer).await
    })
    .await
}

async fn database_restored(stage: &Stage) -> anyhow::Result<Outcome> {
    // MCC gives two nodes that are not done another target only when there is a third slot.
    let change = |options: &mut SiteOptions| (options.nodes, options.max_unavailable) = (2, 3);
    let mut site = stage.settled(change).await?;
    let backup = site.plane.backup().await?;
    let two = update(&site, "2").await?;
    // The restored annotations name image 1 as current and desired on nodes that run image 2. MCC does not take nodes that
    // have their target already one after the other, so every agent waits a random time of up to 30 minutes.
    site.plane.restore(&backup).await?;
    for worker in &site.workers {
        site.wait_reason(worker, "RestoreSpread").await?;
    }
    site.target("2", &two).await?;
    site.wait_updated(&two).await?;
    // The random time of one node may be short.
    let boots: Vec<_> = site.workers.iter().map(|worker| worker.boots().len()).collect();
    ensure!(boots.contains(&2), "the restore rebooted every node at once: {boots:?} boots");
    close(site, "nodes wait (RestoreSpread), and return without a reboot".to_owned(), STARTING).await
}

async fn certificate_rotated(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|_| {}).await?;
    in_the_middle(site, &[], async |site| {
        site.workers[0].rotate(site.plane.pki(), 24 * 3600);
        Ok(())
    })
    .await
}

async fn certificate_expired(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|_| {}).await?;
    let worker = site.only();
    worker.machine.stop_agent().await;
    worker.rotate(site.plane.pki(), 15);
    worker.machine.start_agent();
    let two = site.signed("2").await?;
    // Nothing to write before the certificate has expired.
    let mut events = worker.events.subscribe();
    sleep(Duration::from_secs(20)).await;
    site.target("2", &two).await?;
    let says = |event: &Event| matches!(event, Event::AgentLine(line) if line.contains("expired at")).then_some(());
    World::wait_event(&mut events, "the agent's sentence about the expired certificate", says).await?;
    worker.rotate(site.plane.pki(), 24 * 3600);
    site.wait_updated(&two).await?;
    close(site, String::new(), &[401]).await
}

/// Fake nodes whose kubelets report.
const CROWD: usize = 500;

async fn watch_expired(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|options| options.machine = |machine| machine.watchdog = None).await?;
    let worker = site.only();
    let admin = site.plane.admin();
    let nodes = admin.get("/api/v1/nodes").await?.ok()?;
    let old = nodes["metadata"]["resourceVersion"].as_str().context("no version")?.to_owned();
    let two = site.signed("2").await?;
    // The agent sleeps while its watch window passes.
    worker.machine.signal_agent(Signal::SIGSTOP);
    for number in 0..CROWD {
        let node = json!({"metadata": {"name": format!("crowd-{number}")}});
        admin.create("/api/v1/nodes", &node).await?;
    }
    let mut reports = 0;
    let expired = async {
        loop {
            for number in 0..CROWD {
                let condition = json!({"type": "Ready", "status": "True", "message": format!("report {reports}")});
                let path = format!("/api/v1/nodes/crowd-{number}/status");
                admin.strategic(&path, &json!({"status": {"conditions": [condition]}})).await?;
                reports += 1;
            }
            if has_expired(admin, &old).await? {
                return anyhow::Ok(());
            }
        }
    };
    timeout(Duration::from_secs(400), expired).await.context("the watch window does not pass")??;
    site.target("2", &two).await?;
    worker.machine.signal_agent(Signal::SIGCONT);
    site.wait_updated(&two).await?;
    close(site, format!("{reports} reports of {CROWD} nodes"), &[]).await
}

async fn has_expired(admin: &Client, version: &str) -> anyhow::Result<bool> {
    let path =
        format!("/api/v1/nodes?watch=1&fieldSelector=metadata.name%3Dnone&timeoutSeconds=1&resourceVersion={version}");
    let answer = admin.send(Method::GET, &path, None).await?;
    // Without a matching event the body is empty; an expired watch is HTTP 200 with an ERROR event.
    Ok(answer.status == 200 && answer.body["type"] == "ERROR" && answer.body["object"]["code"] == 410)
}

async fn single_replica(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|options| options.topology = "SingleReplica".to_owned()).await?;
    let worker = site.only();
    let two = site.signed("2").await?;
    site.target("2", &two).await?;
    let seen = site.wait_updated(&two).await?;
    ensure!(seen.cordoned == 0, "a single node was cordoned");
    let node = site.node(worker).await?.context("the Node is gone")?;
    ensure!(annotation(&node, "controlPlaneTopology") == Some("SingleReplica"), "{node:#}");
    ensure!(annotation(&node, "lastAppliedDrain") == Some("uncordon-rendered-worker-2"), "no uncordon: {node:#}");
    close(site, String::new(), &[]).await
}

async fn mcc_away(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|_| {}).await?;
    let two = site.signed("2").await?;
    site.target("2", &two).await?;
    let wanted = two.pullspec();
    site.wait(site.only(), "MCC's target", |node| annotation(node, "desiredImage") == Some(&*wanted)).await?;
    let mut site = site;
    site.plane.stop_program(Program::Mco, Signal::SIGKILL).await?;
    let worker = site.only();
    site.wait(worker, "the drain request", drain_of("2")).await?;
    sleep(Duration::from_secs(15)).await;
    let node = site.node(worker).await?.context("the Node is gone")?;
    ensure!(node["spec"]["unschedulable"] != true && worker.boots().len() == 1, "went on without MCC: {node:#}");
    ensure!(annotation(&node, "reason").is_some_and(|reason| reason.starts_with("DrainPending")), "{node:#}");
    site.plane.start_program(Program::Mco).await?;
    site.wait_updated(&two).await?;
    close(site, String::new(), &[]).await
}

async fn image_mode_status(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|options| options.plane.gated = true).await?;
    let worker = site.only();
    update(&site, "2").await?;
    let path = format!("{MCNS}/{}", worker.name);
    let shown = async |wanted: &str, version: &str, image: &Pushed| {
        let config = format!("rendered-worker-{version}");
        let shows = async || {
            let mcn = site.plane.admin().get(&path).await?.ok()?;
            Ok((counted(&mcn, &config, &image.pullspec()) == Some(wanted)).then_some(()))
        };
        until(&format!("the MachineConfigNode's {wanted} on {}", image.digest), DEADLINE, shows).await
    };
    let three = site.unsigned("3").await?;
    site.target("3", &three).await?;
    shown("NodeDegraded", "3", &three).await?;
    site.sign(&three, "3").await?;
    site.annotate(worker, RETRY, Some("signed")).await?;
    site.wait_updated(&three).await?;
    shown("Updated", "3", &three).await?;
    close(site, String::new(), &[]).await
}

/// How MCC counts a node by its MachineConfigNode with the feature gate ImageModeStatusReporting, which the controllers of
/// this revision lack: the first of two conditions in the order of the list, if config and image are the pool's.
fn counted<'a>(mcn: &'a Value, config: &str, image: &str) -> Option<&'a str> {
    let status = &mcn["status"];
    let mut kinds = status["conditions"].as_array()?.iter().filter(|condition| condition["status"] == "True");
    let kind = kinds.find_map(|it| it["type"].as_str().filter(|kind| ["Updated", "NodeDegraded"].contains(kind)))?;
    let ours = status["configVersion"]["desired"] == config && status["configImage"]["desiredImage"] == image;
    (kind == "NodeDegraded" || ours).then_some(kind)
}

/// How long the idle agents are watched: more than two of their polls.
const IDLE: Duration = Duration::from_secs(660);

async fn idle(stage: &Stage) -> anyhow::Result<Outcome> {
    let site = stage.settled(|options| options.nodes = 3).await?;
    let before = site.plane.audit()?.of_agents(None).count();
    // The kubelets report every five minutes: twice in this time.
    for report in 0..2 {
        sleep(IDLE / 3).await;
        for worker in &site.workers {
            let condition = json!({"type": "DiskPressure", "status": "False", "message": format!("report {report}")});
            let path = format!("/api/v1/nodes/{}/status", worker.name);
            site.plane.admin().strategic(&path, &json!({"status": {"conditions": [condition]}})).await?;
        }
    }
    sleep(IDLE / 3).await;
    let audit = site.plane.audit()?;
    let requests: Vec<_> = audit.of_agents(None).skip(before).collect();
    ensure!(requests.iter().all(|request| !request.is_write()), "an idle agent wrote");
    // At most three polls, each with a list, a watch and a look at the pool's image.
    let (count, nodes) = (requests.len(), site.workers.len());
    ensure!((nodes..=9 * nodes).contains(&count), "{nodes} idle agents made {count} requests");
    let note = format!("{count} requests of {nodes} idle nodes in {} s", IDLE.as_secs());
    close(site, note, &[]).await
}
