//! A real control plane on the loopback interface: etcd, kube-apiserver with the node authorizer and `NodeRestriction`,
//! and the node and drain controllers of the Machine Config Operator. `tests/support/controlplane/build` makes the
//! programs.

mod audit;
mod client;
pub mod conformance;
pub mod scenarios;
mod site;

use std::cell::RefCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::sleep;

pub use audit::{Audit, Request};
pub use client::{Answer, Client};
pub use site::{Site, SiteOptions, Worker};

use crate::pki::{Pki, rotate_client_pem, write_kubeconfig};
use crate::tools;

/// Longest start of a program, also on a busy machine.
const START: Duration = Duration::from_secs(180);
/// Longest end of a program after `SIGTERM`. kube-apiserver waits a minute for its open watches.
const STOP: Duration = Duration::from_secs(120);
/// Interval of polls for a state.
const POLL: Duration = Duration::from_millis(100);

const AUDIT_POLICY: &str = "apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
";

/// Settings of a control plane.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory that `tests/support/controlplane/build` prints.
    pub programs: PathBuf,
    /// MachineConfigNodes as with the feature gate ImageModeStatusReporting.
    pub gated: bool,
}

/// The processes of a control plane, until this is dropped. Their logs and data are in the directory.
pub struct ControlPlane {
    options: Options,
    directory: PathBuf,
    pki: Pki,
    port: u16,
    etcd: (u16, u16),
    processes: RefCell<Vec<(Program, Child)>>,
    admin: Client,
}

/// A program of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// etcd.
    Etcd,
    /// kube-apiserver.
    ApiServer,
    /// MCO's node and drain controllers.
    Mco,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::ApiServer => "kube-apiserver",
            Self::Mco => "mco",
        }
    }
}

impl ControlPlane {
    /// Starts etcd and kube-apiserver, and creates the CRDs; MCO's controllers do not run yet. Everything that starts ends
    /// with the calling thread at the latest, so call this from a thread that lives long enough.
    ///
    /// # Errors
    /// If a program does not start; the error names its log.
    pub async fn start(directory: &Path, pki: &Pki, options: Options) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        let directory = directory.to_owned();
        let port = tools::free_port();
        let url = format!("https://127.0.0.1:{port}");
        let admin = Client::new(&url, pki, "admin", &["system:masters"])?;
        let etcd = (tools::free_port(), tools::free_port());
        let mut plane = Self { options, directory, pki: pki.clone(), port, etcd, processes: RefCell::default(), admin };
        plane.write_files()?;
        plane.spawn(Program::Etcd)?;
        plane.start_api().await?;
        let crds = if plane.options.gated { vec!["crds-gated", "crds"] } else { vec!["crds"] };
        for crds in crds {
            let mut command = tokio::process::Command::new(plane.options.programs.join("mco"));
            command.arg("--kubeconfig").arg(plane.directory.join("kubeconfig"));
            command.arg("--crds").arg(plane.options.programs.join(crds));
            tools::run_ok(command, START).await?;
        }
        Ok(plane)
    }

    fn write_files(&self) -> anyhow::Result<()> {
        let write = |name: &str, text: &str| fs::write(self.directory.join(name), text);
        let (certificate, key) = self.pki.server(&[]);
        write("ca.pem", &self.pki.ca_pem())?;
        write("server.pem", &certificate)?;
        write("server.key", &key)?;
        let (certificate, key) = self.pki.client("etcd-client", &[]);
        write("etcd-client.pem", &certificate)?;
        write("etcd-client.key", &key)?;
        write("audit-policy.yaml", AUDIT_POLICY)?;
        let hour = 3600;
        let pem = self.pki.client_pem("machine-config-controller", &["system:masters"], -hour, 24 * hour);
        let link = rotate_client_pem(&self.directory.join("pki"), &pem);
        write_kubeconfig(&self.directory.join("kubeconfig"), &self.url(), &self.pki.ca_pem(), &link);
        Ok(())
    }

    fn spawn(&mut self, program: Program) -> anyhow::Result<()> {
        let directory = &self.directory;
        let file = |name: &str| directory.join(name).display().to_string();
        let log = directory.join(format!("{}.log", program.name()));
        let log = File::options().create(true).append(true).open(&log)?;
        let mut command = tools::child(&self.options.programs.join(program.name()));
        let (client, peer) = self.etcd;
        let etcd = format!("https://127.0.0.1:{client}");
        match program {
            Program::Etcd => {
                command.args([
                    format!("--data-dir={}", file("etcd")),
                    format!("--listen-client-urls={etcd}"),
                    format!("--advertise-client-urls={etcd}"),
                    format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                    format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
                    format!("--initial-cluster=default=http://127.0.0.1:{peer}"),
                    format!("--cert-file={}", file("server.pem")),
                    format!("--key-file={}", file("server.key")),
                    format!("--trusted-ca-file={}", file("ca.pem")),
                    "--client-cert-auth=true".to_owned(),
                    "--unsafe-no-fsync".to_owned(),
                ]);
            }
            Program::ApiServer => {
                command.args([
                    format!("--etcd-servers={etcd}"),
                    format!("--etcd-cafile={}", file("ca.pem")),
                    format!("--etcd-certfile={}", file("etcd-client.pem")),
                    format!("--etcd-keyfile={}", file("etcd-client.key")),
                    "--bind-address=127.0.0.1".to_owned(),
                    format!("--secure-port={}", self.port),
                    format!("--tls-cert-file={}", file("server.pem")),
                    format!("--tls-private-key-file={}", file("server.key")),
                    format!("--client-ca-file={}", file("ca.pem")),
                    "--authorization-mode=Node,RBAC".to_owned(),
                    "--enable-admission-plugins=NodeRestriction".to_owned(),
                    // Its accounts come from kube-controller-manager.
                    "--disable-admission-plugins=ServiceAccount".to_owned(),
                    "--endpoint-reconciler-type=none".to_owned(),
                    "--service-cluster-ip-range=10.0.0.0/24".to_owned(),
                    "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                    format!("--service-account-key-file={}", file("server.pem")),
                    format!("--service-account-signing-key-file={}", file("server.key")),
                    format!("--audit-policy-file={}", file("audit-policy.yaml")),
                    format!("--audit-log-path={}", file("audit.log")),
                ]);
            }
            Program::Mco => {
                command.arg(format!("--kubeconfig={}", file("kubeconfig")));
                command.args(["--update-delay=1s", "--drain-requeue-delay=5s", "--drain-timeout=10s"]);
                // A cordon whose PATCH fails once is only repeated in the controller's cache, until all tries are used up.
                command.arg("--cordon-backoff=1s");
            }
        }
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        let child = child.with_context(|| format!("starting {}", program.name()))?;
        self.processes.get_mut().push((program, child));
        Ok(())
    }

    /// Starts the program if it does not run; kube-apiserver is ready when this returns.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn start_program(&mut self, program: Program) -> anyhow::Result<()> {
        if self.processes.get_mut().iter().any(|(running, _)| *running == program) {
            return Ok(());
        }
        if program == Program::ApiServer { self.start_api().await } else { self.spawn(program) }
    }

    async fn start_api(&mut self) -> anyhow::Result<()> {
        self.spawn(Program::ApiServer)?;
        let began = Instant::now();
        loop {
            match self.admin.get("/readyz").await {
                Ok(answer) if answer.status == 200 => return Ok(()),
                _ if began.elapsed() > START => bail!("kube-apiserver is not ready after {START:?}: see its log"),
                _ => {}
            }
            self.check()?;
            sleep(POLL).await;
        }
    }

    /// Whether every program still runs.
    ///
    /// # Errors
    /// If one has ended by itself; the error names its log.
    pub fn check(&self) -> anyhow::Result<()> {
        for (program, child) in self.processes.borrow_mut().iter_mut() {
            let log = self.directory.join(format!("{}.log", program.name()));
            ensure!(child.try_wait()?.is_none(), "{} ended; its log is {}", program.name(), log.display());
        }
        Ok(())
    }

    /// Ends the program with `signal` and waits for its end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub async fn stop_program(&mut self, program: Program, signal: Signal) -> anyhow::Result<()> {
        let processes = self.processes.get_mut();
        let Some(at) = processes.iter().position(|(running, _)| *running == program) else { return Ok(()) };
        let (_, mut child) = processes.remove(at);
        kill(Pid::from_raw(i32::try_from(child.id())?), signal)?;
        let began = Instant::now();
        while child.try_wait()?.is_none() {
            if began.elapsed() > STOP {
                let _ = child.kill();
                bail!("{} does not end after {signal}", program.name());
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Copies the database while etcd is stopped, and starts everything again. Watches end.
    ///
    /// # Errors
    /// If a program does not stop or start.
    pub async fn backup(&mut self) -> anyhow::Result<PathBuf> {
        let copy = self.directory.join("backup");
        self.with_stopped_etcd(|data| copy_directory(data, &copy)).await?;
        Ok(copy)
    }

    /// Puts the database back to a backup, as an administrator does after losing a quorum.
    ///
    /// # Errors
    /// If a program does not stop or start.
    pub async fn restore(&mut self, backup: &Path) -> anyhow::Result<()> {
        self.with_stopped_etcd(|data| {
            fs::remove_dir_all(data)?;
            copy_directory(backup, data)
        })
        .await
    }

    async fn with_stopped_etcd(&mut self, work: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
        for program in [Program::Mco, Program::ApiServer] {
            self.stop_program(program, Signal::SIGKILL).await?;
        }
        self.stop_program(Program::Etcd, Signal::SIGTERM).await?;
        work(&self.directory.join("etcd"))?;
        for program in [Program::Etcd, Program::ApiServer, Program::Mco] {
            self.start_program(program).await?;
        }
        Ok(())
    }

    /// `https://127.0.0.1:port`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// A client with every right.
    #[must_use]
    pub fn admin(&self) -> &Client {
        &self.admin
    }

    /// Gives nodes the rights that the manifests in systemd/cluster grant, and limits each to its own objects.
    ///
    /// # Errors
    /// If kubectl fails.
    pub async fn grant(&self) -> anyhow::Result<()> {
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../systemd/cluster");
        let mut kubectl = tokio::process::Command::new(self.options.programs.join("kubectl"));
        kubectl.arg("--kubeconfig").arg(self.kubeconfig()).arg("apply");
        for file in ["rbac.yaml", "prefetch-rbac.yaml", "machineconfignode-policy.yaml", "node-policy.yaml"] {
            kubectl.arg("-f").arg(manifests.join(file));
        }
        tools::run_ok(kubectl, START).await.map(drop)
    }

    /// The authority of all certificates.
    #[must_use]
    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// A kubeconfig with every right, as for `kubectl --kubeconfig`.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.join("kubeconfig")
    }

    /// The server's record of all requests so far.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn audit(&self) -> anyhow::Result<Audit> {
        Audit::read(&self.directory.join("audit.log"))
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // etcd last: the others would only complain.
        for (_, child) in self.processes.get_mut().iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn copy_directory(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_directory(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Polls until `look` gives a value.
async fn until<T, F: Future<Output = anyhow::Result<Option<T>>>>(
    what: &str,
    deadline: Duration,
    mut look: impl FnMut() -> F,
) -> anyhow::Result<T> {
    let began = Instant::now();
    loop {
        // The API server may be away for a while.
        let last = match look().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if began.elapsed() > deadline {
            let what = format!("{what} did not happen within {deadline:?}");
            return Err(last.map_or_else(|| anyhow::anyhow!(what.clone()), |error| error.context(what.clone())));
        }
        sleep(POLL).await;
    }
}
