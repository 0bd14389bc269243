//! Checks of the shipped units on a real systemd, one line each.

mod bootc;

use std::future::Future;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;

use super::container::{Container, Options};
use super::directives;
use super::node::{self, PROGRAM};
use super::outside::{DEADLINE, Outside};
use super::sandbox::Process;
use crate::image::Pushed;
use crate::mcc::annotation;
use crate::rpmostreed::{Deployment, Sysroot};
use crate::world::NODE;

const AGENT: &str = "rebase-agent.service";
const FAULTY: &str = "/usr/libexec/rebase-agent-faulty";
const RPM_OSTREED: &str = "rpm-ostreed.service";
const FINALIZER: &str = "ostree-finalize-staged.service";
const OTHER_UPDATERS: [&str; 3] =
    ["zincati.service", "rpm-ostreed-automatic.service", "bootc-fetch-apply-updates.service"];
const METRICS: &str = "rebase-agent-metrics.socket";
const METRICS_SERVICE: &str = "rebase-agent-metrics@0.service";
const METRICS_PATH: &str = "/run/rebase-agent/public/metrics.promsock";
const HOLD: &str = "rebase-agent.openshift.io/hold";
const ATTEMPT: &str = "rebase-agent.openshift.io/attempt";
/// The shipped timeouts are too long for a test; their values are compared before this drop-in is installed.
const QUICK: &str = "[Service]\nRestartSec=1\n";
/// Up to two thirds of it may pass between two watchdog pings.
const WATCHDOG: &str = "[Service]\nWatchdogSec=6\n";
/// Exposure by `systemd-analyze security`, with and without `PrivateUsers=`.
const MOST_EXPOSED: f64 = 1.5;
const MOST_EXPOSED_WITHOUT_PRIVATE_USERS: f64 = 1.7;

/// Settings of the story.
#[derive(Clone, Debug)]
pub struct Plan {
    /// systemd's major version.
    pub version: u32,
    /// The node's disk, with the agent installed; it is changed.
    pub root: PathBuf,
    /// The agent that `tests/support/faulty` builds.
    pub faulty: PathBuf,
    /// The directory for console, registry and all other files outside of the disk.
    pub directory: PathBuf,
}

/// Prints a line for each check that passes.
struct Teller {
    version: u32,
    began: Instant,
}

impl Teller {
    async fn step(&self, what: &str, check: impl Future<Output = Result<String>>) -> Result<()> {
        let start = Instant::now();
        let outcome = check.await;
        let took = start.elapsed().as_secs_f64();
        match outcome {
            Ok(note) => {
                println!(
                    "booted {}: ok {took:6.1} s  {what}{}{note}",
                    self.version,
                    if note.is_empty() { "" } else { ": " }
                );
                Ok(())
            }
            Err(error) => {
                println!("booted {}: FAILED {took:.1} s  {what}", self.version);
                Err(error).with_context(|| what.to_owned())
            }
        }
    }
}

/// Runs the whole story; the container is removed at its end.
pub async fn tell(plan: &Plan) -> Result<()> {
    let teller = Teller { version: plan.version, began: Instant::now() };
    node::furnish(&plan.root)?;
    let outside = Outside::new(&plan.directory, &plan.root).await.context("the stage cannot be set")?;
    let options = Options {
        root: plan.root.clone(),
        name: format!("rebase-{}-{}", plan.version, std::process::id()),
        console: plan.directory.join("console.log"),
        binds: vec![(std::env::current_exe()?, PROGRAM), (plan.faulty.clone(), FAULTY)],
    };
    outside.target("1", &outside.installed);
    let mut node = Node { container: Container::boot(options).await?, outside: &outside, plan, updates: 0 };
    let told = node.tell(&teller).await;
    let stopped = node.container.stop().await;
    told?;
    stopped.context("powering off")?;
    println!("booted {}: all steps in {:.1} s", plan.version, teller.began.elapsed().as_secs_f64());
    Ok(())
}

struct Node<'a> {
    container: Container,
    outside: &'a Outside,
    plan: &'a Plan,
    /// The number of updates so far.
    updates: usize,
}

impl Node<'_> {
    async fn tell(&mut self, teller: &Teller) -> Result<()> {
        teller.step("systemd is PID 1, the agent's unit is READY", self.is_ready()).await?;
        teller.step("systemd-analyze verify finds no fault", self.verifies()).await?;
        teller.step("systemd-analyze security", self.is_little_exposed()).await?;
        teller.step("every directive is in force", self.has_every_directive()).await?;
        teller.step("the kernel's view of the process", self.is_confined()).await?;
        teller.step("first boot", self.is_done_first()).await?;
        teller
            .step("another user is refused by rpm-ostreed, root without capabilities is not", self.uid_counts())
            .await?;
        teller.step("an unsigned image is refused, nothing is touched", self.refuses()).await?;
        let two = self.outside.signed("3").await?;
        teller.step("a signed image is verified, pulled and held; SIGKILL changes nothing", self.holds(&two)).await?;
        let boot = self.boot_id().await?;
        teller.step("released: drained, down through logind, up again", self.releases(false)).await?;
        teller.step("the new deployment is booted, the node uncordoned and Done", self.arrives(&two, &boot)).await?;
        teller
            .step("a missed watchdog ping: killed, restarted, in the same state", self.survives_the_watchdog(&two))
            .await?;
        teller.step("the journal explains the messages", self.journal_explains()).await?;
        teller.step("rebase-agent status", self.status()).await?;
        teller.step("the metrics come from systemd's socket", self.has_metrics()).await?;
        teller.step("a policy that asks for GPG", self.verifies_gpg(&two)).await?;
        teller.step("a deliberate write is stopped", self.writes_are_stopped()).await?;
        teller.step("other updaters are skipped while the agent is enabled", self.excludes_others()).await?;
        self.tell_of_bootc(teller, &two).await
    }

    async fn boot_id(&self) -> Result<String> {
        self.container.ok(&["cat", "/proc/sys/kernel/random/boot_id"]).await
    }

    async fn is_ready(&self) -> Result<String> {
        let version = self.container.ok(&["systemctl", "--version"]).await?;
        let version = version.lines().next().unwrap_or_default();
        ensure!(version.starts_with(&format!("systemd {} ", self.plan.version)), "PID 1 is {version}");
        self.outside.set_up(Some(&self.boot_id().await?));
        // Type=notify: active means that READY=1 came.
        // The boot has finished, so the start has ended: in `running`, or with a failure.
        let ended = |state: &str| matches!(state, "running" | "auto-restart" | "failed" | "dead");
        let state = self.container.wait_property(AGENT, "SubState", DEADLINE, ended).await?;
        ensure!(state == "running", "the agent is {state}");
        self.nothing_failed().await?;
        Ok(version.to_owned())
    }

    async fn nothing_failed(&self) -> Result<()> {
        let failed = self.container.ok(&["systemctl", "list-units", "--failed", "--plain", "--no-legend"]).await?;
        ensure!(failed.is_empty(), "units failed: {failed}");
        Ok(())
    }

    async fn verifies(&self) -> Result<String> {
        // systemd-analyze checks that the program of bootc's units exists.
        let verify = "ln -s /bin/false /usr/bin/bootc; trap 'rm /usr/bin/bootc' EXIT; \
                      systemd-analyze verify --man=no /usr/lib/systemd/system/rebase-agent*";
        let output = self.container.run(&["bash", "-c", verify]).await?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        ensure!(output.status.success() && said.trim().is_empty(), "{}: {said}", output.status);
        Ok(String::new())
    }

    async fn is_little_exposed(&self) -> Result<String> {
        let private = self.container.property(AGENT, "PrivateUsers").await? == "yes";
        let most = if private { MOST_EXPOSED } else { MOST_EXPOSED_WITHOUT_PRIVATE_USERS };
        let table = self.container.ok(&["systemd-analyze", "security", "--no-pager", AGENT]).await?;
        let figure = table.lines().find_map(|line| line.split_once("Overall exposure level")?.1.split_once(": "));
        let exposure: f64 =
            figure.context("no overall exposure level")?.1.split(' ').next().unwrap_or_default().parse()?;
        println!("{}", table.lines().filter(|line| line.starts_with('✗')).collect::<Vec<_>>().join("\n"));
        ensure!(exposure <= most, "exposure {exposure} is more than {most}");
        Ok(format!("exposure {exposure}, PrivateUsers {}", if private { "yes" } else { "no" }))
    }

    async fn has_every_directive(&self) -> Result<String> {
        Ok(format!("{} of them", directives::compare(&self.container, AGENT).await?))
    }

    async fn is_confined(&self) -> Result<String> {
        let process = Process::of(&self.container, AGENT).await?;
        let privileges = process.has_no_privileges()?;
        let writable = process.writes_only(&[])?;
        let seen = process.reads("/proc/sys/kernel/random/boot_id")?;
        ensure!(seen == self.boot_id().await?, "inside, the boot id is {seen}");
        let landlock = |text: &str| text.contains("Landlock");
        let word = self.container.wait_property(AGENT, "StatusText", DEADLINE, landlock).await?;
        ensure!(word.contains("Landlock denies every write"), "{word}");
        // A neighbouring file without a bind mount of this test.
        process.reads("/proc/sys/kernel/random/uuid")?;
        let fips = match process.reads("/proc/sys/crypto/fips_enabled") {
            Ok(fips) => fips,
            Err(error) if Path::new("/proc/sys/crypto/fips_enabled").exists() => return Err(error),
            Err(_) => "unknown to this kernel".to_owned(),
        };
        Ok(format!("{privileges}; writable: {}; boot id readable, FIPS {fips}", writable.join(", ")))
    }

    async fn is_done_first(&self) -> Result<String> {
        self.outside.wait_done(&self.outside.installed).await?;
        ensure!(self.booted()?.digest == self.outside.installed.digest, "something else is booted");
        Ok(String::new())
    }

    async fn uid_counts(&self) -> Result<String> {
        const SYSROOT: [&str; 5] = [
            "busctl",
            "call",
            "org.projectatomic.rpmostree1",
            "/org/projectatomic/rpmostree1/Sysroot",
            "org.projectatomic.rpmostree1.Sysroot",
        ];
        let other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
        let root = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"];
        // The daemon's other call to this object, Reload, is open to everyone.
        let call = |user: &[&'static str]| [user, &SYSROOT, &["RegisterClient", "a{sv}", "0"]].concat();
        let refused = self.container.run(&call(&other)).await?;
        ensure!(!refused.status.success(), "a user without root registered as a client");
        self.container.ok(&call(&root)).await?;
        let journal = ["journalctl", "--quiet", "--output=cat", "--unit", RPM_OSTREED];
        let callers = self.container.ok(&journal).await?;
        for caller in ["RegisterClient is called by uid 65534", "RegisterClient is called by uid 0"] {
            ensure!(callers.contains(caller), "rpm-ostreed did not see that {caller}: {callers}");
        }
        Ok(String::new())
    }

    /// The changes that were requested from rpm-ostreed, from its own journal.
    async fn requests(&self) -> Result<Vec<String>> {
        let lines = self.container.ok(&["journalctl", "--quiet", "--output=cat", "--unit", RPM_OSTREED]).await?;
        Ok(lines.lines().filter_map(|line| line.strip_prefix("requested: ")).map(str::to_owned).collect())
    }

    async fn refuses(&self) -> Result<String> {
        let unsigned = self.outside.unsigned("2").await?;
        let boot = self.boot_id().await?;
        self.outside.target("2", &unsigned);
        self.outside.wait_reason("SignatureMissing").await?;
        self.outside.wait("Degraded", |node| annotation(node, "state") == Some("Degraded")).await?;
        let requests = self.requests().await?;
        ensure!(requests.is_empty(), "rpm-ostreed was asked for {requests:?}");
        ensure!(self.outside.drains.drains() == 0, "the node was drained");
        ensure!(self.boot_id().await? == boot, "the machine was rebooted");
        Ok(annotation(&self.outside.node()?, "reason").unwrap_or_default().chars().take(60).collect())
    }

    async fn holds(&self, image: &Pushed) -> Result<String> {
        self.container.drop_in(AGENT, "60-quick", QUICK).await?;
        self.outside.store().annotate("kubectl-annotate", NODE, HOLD, Some("held by the test"))?;
        self.outside.target("3", image);
        self.outside.wait_reason("Held").await?;
        let main = self.container.property(AGENT, "MainPID").await?;
        self.container.ok(&["systemctl", "kill", "--signal=KILL", "--kill-whom=main", AGENT]).await?;
        self.is_back(&main, "Held").await?;
        let requests = self.requests().await?;
        // Each process asks once: rpm-ostreed has the image, or pulls it.
        let pulls = requests.len() == 2 && requests.iter().all(|request| request.ends_with(&image.pullspec()));
        ensure!(pulls, "rpm-ostreed was asked for {requests:?}");
        ensure!(self.deployments()?.iter().all(|d| !d.staged), "something is staged on a held node");
        ensure!(self.outside.drains.drains() == 0, "the held node was drained");
        Ok(format!("{} restart, nothing staged, 0 drains", self.container.property(AGENT, "NRestarts").await?))
    }

    /// Waits until a new main process in place of `main` runs and its status contains this word.
    async fn is_back(&self, main: &str, word: &str) -> Result<()> {
        let another = |pid: &str| pid != "0" && pid != main;
        self.container.wait_property(AGENT, "MainPID", DEADLINE, another).await?;
        self.container.wait_property(AGENT, "ActiveState", DEADLINE, |state| state == "active").await?;
        self.container.wait_property(AGENT, "StatusText", DEADLINE, |text| text.contains(word)).await?;
        Ok(())
    }

    async fn releases(&mut self, was_blocked: bool) -> Result<String> {
        self.outside.store().annotate("kubectl-annotate", NODE, HOLD, None)?;
        self.outside.drains.block_drains(false);
        let rebooting = |node: &Value| node["metadata"]["annotations"][ATTEMPT].is_string();
        self.outside.wait("the reboot", rebooting).await?;
        // Each try of a blocked drain counts.
        self.updates = if was_blocked { self.outside.drains.drains() } else { self.updates + 1 };
        self.was_drained_for_each()?;
        let start = Instant::now();
        self.container.reboot(|| self.outside.set_up(None)).await?;
        Ok(format!("1 drain, {:.1} s to be up again", start.elapsed().as_secs_f64()))
    }

    async fn arrives(&self, image: &Pushed, before: &str) -> Result<String> {
        let boot = self.boot_id().await?;
        self.outside.set_up(Some(&boot));
        self.outside.wait_done(image).await?;
        ensure!(boot != before, "Done without a reboot");
        self.is_arrived(image)?;
        let journal = ["journalctl", "--quiet", "--output=cat", "--boot=-1"];
        let log = self.container.ok(&journal).await?;
        let lines: Vec<&str> = log.lines().collect();
        let at =
            |text: &str| lines.iter().rposition(|line| line.contains(text)).with_context(|| format!("no `{text}`"));
        // The unit's ordering keeps the agent from the deployments while they are finalized.
        let after = self.container.property(AGENT, "After").await?;
        ensure!(after.split(' ').any(|unit| unit == FINALIZER), "the agent is not ordered after {FINALIZER}");
        let order =
            [at("Stopped rebase-agent.service")?, at(&format!("Stopping {FINALIZER}"))?, at("Finalized deployment")?];
        ensure!(order.is_sorted(), "the agent was stopped after the finalizer had started");
        ensure!(log.contains("System is rebooting"), "logind did not log the reboot");
        Ok("stopped before it was finalized".to_owned())
    }

    fn deployments(&self) -> Result<Vec<Deployment>> {
        Ok(Sysroot::running(&self.container.path("/"), node::OSNAME)?.load())
    }

    fn booted(&self) -> Result<Deployment> {
        self.deployments()?.into_iter().find(|deployment| deployment.booted).context("nothing is booted")
    }

    /// Checks a node that reports Done after an update.
    fn is_arrived(&self, image: &Pushed) -> Result<()> {
        let node = self.outside.node()?;
        let digest = self.booted()?.digest;
        ensure!(digest == image.digest, "Done on {} while {digest} is booted", image.digest);
        ensure!(self.deployments()?.iter().all(|d| !d.staged), "Done while something is staged");
        ensure!(annotation(&node, "state") == Some("Done"), "the state is {:?}", annotation(&node, "state"));
        ensure!(node["spec"]["unschedulable"] != true, "Done while cordoned");
        ensure!(annotation(&node, "reason").unwrap_or_default().is_empty(), "Done with a reason");
        let drain = (annotation(&node, "desiredDrain"), annotation(&node, "lastAppliedDrain"));
        ensure!(drain.0 == drain.1, "Done while a drain is open: {drain:?}");
        ensure!(node["metadata"]["annotations"][ATTEMPT].is_null(), "Done with an attempt left over");
        self.was_drained_for_each()
    }

    fn was_drained_for_each(&self) -> Result<()> {
        let (drains, updates) = (self.outside.drains.drains(), self.updates);
        ensure!(drains == updates, "the node was drained {drains} times for {updates} updates");
        Ok(())
    }

    async fn survives_the_watchdog(&self, image: &Pushed) -> Result<String> {
        self.container.drop_in(AGENT, "60-quick", &format!("{QUICK}{WATCHDOG}")).await?;
        self.container.ok(&["systemctl", "restart", AGENT]).await?;
        self.container.wait_property(AGENT, "StatusText", DEADLINE, |text| text.contains("Done")).await?;
        let (boot, requests) = (self.boot_id().await?, self.requests().await?);
        let main = self.container.property(AGENT, "MainPID").await?;
        let start = Instant::now();
        self.container.ok(&["systemctl", "kill", "--signal=STOP", "--kill-whom=main", AGENT]).await?;
        self.is_back(&main, "Done").await?;
        let took = start.elapsed();
        let log = self.container.ok(&["journalctl", "--quiet", "--output=cat", "--boot", "--unit", AGENT]).await?;
        ensure!(log.contains("Watchdog timeout"), "the watchdog did not fire: {log}");
        self.is_arrived(image)?;
        ensure!(self.boot_id().await? == boot, "the machine was rebooted");
        ensure!(self.requests().await? == requests, "rpm-ostreed was asked for something");
        // The later steps need no watchdog.
        self.container.drop_in(AGENT, "60-quick", QUICK).await?;
        Ok(format!("back after {:.1} s, nothing repeated", took.as_secs_f64()))
    }

    async fn journal_explains(&self) -> Result<String> {
        let catalog = std::fs::read_to_string(self.container.path("/usr/lib/systemd/catalog/rebase-agent.catalog"))?;
        let entries = entries(&catalog);
        ensure!(!entries.is_empty(), "the catalog is empty");
        let explained = self.container.ok(&["journalctl", "--quiet", "-x", "--unit", "rebase-agent"]).await?;
        ensure!(!explained.contains("@REBASE_AGENT_"), "a field of the catalog is in no message");
        let mut logged = 0;
        for (id, subject, body) in &entries {
            let by_id = format!("MESSAGE_ID={id}");
            let found = self.container.run(&["journalctl", "--quiet", "--output=cat", &by_id]).await?;
            if found.stdout.is_empty() {
                continue;
            }
            logged += 1;
            ensure!(explained.contains(body), "journalctl -x does not explain `{subject}`");
        }
        for subject in ["started", "refuses", "verified", "staged", "reboot", "desired"] {
            let known = entries.iter().find(|(_, text, _)| text.contains(subject));
            let (id, ..) = known.with_context(|| format!("no message has the subject `{subject}`"))?;
            let by_id = format!("MESSAGE_ID={id}");
            self.container.ok(&["journalctl", "--quiet", "--output=cat", "--unit", AGENT, &by_id]).await?;
        }
        Ok(format!("{logged} of {} kinds, found by MESSAGE_ID, explained by -x", entries.len()))
    }

    async fn status(&self) -> Result<String> {
        let own = self.container.property(AGENT, "StatusText").await?;
        // `status` wraps lines as for a terminal.
        let text = self.container.ok(&["rebase-agent", "status"]).await?;
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let parts: Vec<&str> = own.split(" | ").collect();
        let lacks = parts.iter().find(|part| part.is_empty() || !text.contains(**part));
        ensure!(lacks.is_none(), "`status` does not show the service's `{own}`: {text}");
        Ok(format!("shows the service's status `{own}`"))
    }

    async fn has_metrics(&self) -> Result<String> {
        self.container.ok(&["systemctl", "preset", "--quiet", METRICS]).await?;
        self.container.ok(&["systemctl", "start", METRICS]).await?;
        let mut directives = 0;
        for unit in [METRICS, METRICS_SERVICE] {
            directives += directives::compare(&self.container, unit).await.context(unit)?;
        }
        let mode = std::fs::metadata(self.container.path(METRICS_PATH))?.permissions().mode() & 0o777;
        ensure!(mode == 0o660, "the socket's mode is {mode:o}");
        let mut text = String::new();
        let read = async {
            let mut connection = UnixStream::connect(self.container.path(METRICS_PATH)).await?;
            connection.read_to_string(&mut text).await
        };
        tokio::time::timeout(DEADLINE, read).await.context("the metrics do not end")??;
        for sample in ["rebase_agent_up 1", "rebase_agent_state{state=\"Done\"} 1", "# EOF"] {
            ensure!(text.lines().any(|line| line == sample), "no `{sample}` in {text}");
        }
        ensure!(!text.contains("rebase_agent_error"), "{text}");
        Ok(format!("{directives} directives, mode {mode:o}, {} bytes", text.len()))
    }

    /// In the shipped unit GnuPG has no writable directory; the drop-in grants exactly one.
    async fn verifies_gpg(&self, image: &Pushed) -> Result<String> {
        const EXAMPLE: &str = "/usr/share/doc/rebase-agent/examples/rebase-agent.service.d/10-gpg.conf";
        const PLACE: &str = "/run/rebase-agent-gnupg";
        self.outside.demand_gpg(&self.container.path("/"), image, "3")?;
        self.container.ok(&["systemctl", "restart", AGENT]).await?;
        let refused = |text: &str| text.contains("RunsUntrusted: ") && text.contains("GpgNeedsScratch");
        self.container.wait_property(AGENT, "StatusText", DEADLINE, refused).await?;
        let example = std::fs::read_to_string(self.container.path(EXAMPLE))?;
        self.container.drop_in(AGENT, "10-gpg", &example).await?;
        self.container.ok(&["systemctl", "restart", AGENT]).await?;
        let verified = |text: &str| text.contains("its signature was verified");
        self.container.wait_property(AGENT, "StatusText", DEADLINE, verified).await?;
        Process::of(&self.container, AGENT).await?.writes_only(&[PLACE])?;
        self.container.drop_out(AGENT, "10-gpg").await?;
        Ok(format!("refused in the shipped unit, verified with 10-gpg.conf, whose only writable mount is {PLACE}"))
    }

    /// A build that tries to write, in three sandboxes; without both guards the write must succeed, otherwise the other
    /// two prove nothing.
    async fn writes_are_stopped(&self) -> Result<String> {
        const NO_LANDLOCK: &str =
            "SystemCallFilter=~landlock_create_ruleset landlock_add_rule landlock_restrict_self\n";
        const NO_PROTECTION: &str = "ProtectSystem=no\nReadOnlyPaths=\n";
        let guards = [
            ("Landlock alone", NO_PROTECTION.to_owned(), "Permission denied"),
            ("ProtectSystem= alone", NO_LANDLOCK.to_owned(), "Read-only file system"),
            ("neither", format!("{NO_LANDLOCK}{NO_PROTECTION}"), "written"),
        ];
        for (guard, changes, outcome) in &guards {
            let text = format!(
                "[Service]\nExecStart=\nExecStart={FAULTY} run\nEnvironment=REBASE_AGENT_FAULT=write\n{changes}"
            );
            self.container.drop_in(AGENT, "70-fault", &text).await?;
            self.container.ok(&["systemctl", "restart", AGENT]).await?;
            let invocation = self.container.property(AGENT, "InvocationID").await?;
            let invocation = format!("_SYSTEMD_INVOCATION_ID={invocation}");
            let log = self.container.ok(&["journalctl", "--quiet", "--output=cat", &invocation]).await?;
            let tries: Vec<&str> = log.lines().filter(|line| line.starts_with("deliberate write: ")).collect();
            ensure!(!tries.is_empty(), "with {guard}, nothing was tried: {log}");
            let other: Vec<_> = tries.iter().filter(|line| !line.contains(outcome)).collect();
            ensure!(other.is_empty(), "with {guard}, each write should end with `{outcome}`: {other:?}");
            let written =
                self.container.run(&["bash", "-c", "ls /{etc,run,usr/bin,var/lib}/rebase-agent-fault"]).await?;
            ensure!(
                written.stdout.is_empty() == (*outcome != "written"),
                "with {guard}, the disk shows another result"
            );
        }
        self.container.ok(&["bash", "-c", "rm /{etc,run,usr/bin,var/lib}/rebase-agent-fault"]).await?;
        self.container.drop_out(AGENT, "70-fault").await?;
        self.container.ok(&["systemctl", "restart", AGENT]).await?;
        Ok("by Landlock alone, by ProtectSystem= alone, not without both".to_owned())
    }

    async fn excludes_others(&self) -> Result<String> {
        for enabled in [true, false] {
            self.container.ok(&["systemctl", if enabled { "enable" } else { "disable" }, AGENT]).await?;
            for unit in OTHER_UPDATERS {
                self.container.ok(&["systemctl", "start", unit]).await?;
                let state = self.container.property(unit, "ActiveState").await?;
                let met = self.container.property(unit, "ConditionResult").await?;
                let wanted = if enabled { ("inactive", "no") } else { ("active", "yes") };
                ensure!(
                    (state.as_str(), met.as_str()) == wanted,
                    "{unit} is {state}, its condition {met}; enabled: {enabled}"
                );
            }
        }
        Ok("and run once it is disabled".to_owned())
    }
}

/// Id, subject and first line of the body of each entry of a journal catalog.
fn entries(catalog: &str) -> Vec<(String, String, String)> {
    catalog
        .split("\n-- ")
        .skip(1)
        .filter_map(|entry| {
            let (head, body) = entry.split_once("\n\n")?;
            let subject = head.lines().find_map(|line| line.strip_prefix("Subject: "))?;
            let line = body.lines().find(|line| !line.is_empty() && !line.contains('@'))?;
            Some((head.lines().next()?.trim().to_owned(), subject.to_owned(), line.to_owned()))
        })
        .collect()
}
