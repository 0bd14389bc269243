//! One node: its disk, its bus with the host's daemons, and the agent as a supervised child process, through boots,
//! shutdowns and power cuts.

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::UnixDatagram;
use tokio::task::JoinHandle;

use crate::bootc::Bootc;
use crate::bus::Bus;
use crate::events::{Event, Events};
use crate::logind::Logind;
use crate::rpmostreed::{self, Deployment, RpmOstreed, Sysroot};
use crate::systemd::Systemd;
use crate::trace;

const AGENT: &str = "rebase-agent.service";
const KUBELET: &str = "kubelet.service";
const FINALIZER: &str = "ostree-finalize-staged.service";
const BOOT_COMPLETE: &str = "ostree-boot-complete.service";
const STAMP: &str = "boot/ostree/finalize-failure.stamp";
/// Longest time for a process to exit after `SIGTERM`.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The program that pulls images, and the files it uses.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The `skopeo` binary.
    pub skopeo: PathBuf,
    /// Its `policy.json`.
    pub policy: PathBuf,
    /// Its `registries.d`.
    pub registries_d: PathBuf,
    /// The directory with the registry's certificate authority.
    pub cert_dir: PathBuf,
}

/// The command that runs the agent.
#[derive(Clone, Debug, Default)]
pub struct AgentCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables in addition to those that the machine sets.
    pub env: Vec<(String, String)>,
}

/// The host tools of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostTools {
    /// rpm-ostree alone.
    RpmOstree,
    /// bootc alone.
    Bootc,
    /// Both, as in most images.
    Both,
}

/// Settings of a machine.
#[derive(Clone, Debug)]
pub struct MachineOptions {
    /// The directory of its disk, sockets and bus; a short path, because of the sockets.
    pub dir: PathBuf,
    /// The stateroot.
    pub osname: String,
    /// The engine of rpm-ostreed's pulls.
    pub engine: Engine,
    /// The engine of the installer's pull, if it is another one.
    pub installer: Option<Engine>,
    /// The receiver of events.
    pub events: Events,
    /// Time from an accepted reboot to `SIGTERM`, in which delay inhibitors act.
    pub shutdown_delay: Duration,
    /// Time from boot to an active kubelet.
    pub kubelet_delay: Duration,
    /// `RestartSec=` of the agent.
    pub restart_delay: Duration,
    /// `WatchdogSec=` of the agent.
    pub watchdog: Option<Duration>,
    /// The content of `/proc/uptime`; it does not grow.
    pub uptime: Duration,
    /// Kernel arguments of the installed deployment.
    pub kernel_arguments: Vec<String>,
    /// The host tools.
    pub host_tools: HostTools,
    /// Whether the machine has a bootloader-update.service.
    pub bootloader_update: bool,
    /// The agent.
    pub agent: AgentCommand,
}

impl MachineOptions {
    /// Defaults with short times.
    #[must_use]
    pub fn new(dir: &Path, engine: Engine, events: Events, agent: AgentCommand) -> Self {
        Self {
            dir: dir.to_owned(),
            osname: "rhcos".to_owned(),
            engine,
            installer: None,
            events,
            shutdown_delay: Duration::from_millis(50),
            kubelet_delay: Duration::from_millis(50),
            restart_delay: Duration::from_millis(50),
            watchdog: None,
            uptime: Duration::from_secs(3600),
            kernel_arguments: vec!["root=UUID=0a1b".to_owned(), "rw".to_owned(), "console=ttyS0".to_owned()],
            host_tools: HostTools::RpmOstree,
            bootloader_update: false,
            agent,
        }
    }
}

#[derive(Debug)]
struct Inner {
    options: MachineOptions,
    bus: Bus,
    systemd: Systemd,
    logind: Logind,
    rpm_ostreed: RpmOstreed,
    bootc: Bootc,
    sysroot: Arc<Sysroot>,
    runtime: tokio::runtime::Handle,
    agent: Mutex<AgentCommand>,
    /// Process and group of the running agent, 0 if none. Atomic, so that a listener can kill from anywhere.
    pid: AtomicI32,
    wanted: AtomicBool,
    /// Power is on.
    on: AtomicBool,
    /// Every process of the last boot is gone.
    down: AtomicBool,
    boot: AtomicU64,
    last_ping: Mutex<Instant>,
    pings: AtomicU64,
    supervisor: Mutex<Option<JoinHandle<()>>>,
    finalize_failure: Mutex<Option<String>>,
    fall_back: AtomicBool,
    kubelet_fails: AtomicBool,
}

/// A machine. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Machine {
    inner: Arc<Inner>,
}

impl Machine {
    /// Builds a machine that is off and has no operating system yet.
    pub async fn new(options: MachineOptions) -> anyhow::Result<Self> {
        let root = options.dir.join("root");
        std::fs::create_dir_all(&root)?;
        let sysroot = Arc::new(Sysroot::create(&root, &options.osname)?);
        let bus = Bus::start(&options.dir)?;
        if options.host_tools != HostTools::Bootc {
            bus.activatable(rpmostreed::NAME, "rpm-ostreed.service")?;
        }
        bus.reload().await?;
        let systemd = Systemd::start(&bus, options.events.clone()).await?;
        let logind = Logind::start(&bus, options.events.clone()).await?;
        let rpm_ostreed = RpmOstreed::new(
            bus.address(),
            &options.dir,
            options.events.clone(),
            sysroot.clone(),
            options.engine.clone(),
            systemd.clone(),
        );
        let bootc = Bootc::new(options.events.clone(), sysroot.clone(), rpm_ostreed.clone(), &systemd);
        let socket = options.dir.join("notify.sock");
        let _ = std::fs::remove_file(&socket);
        let notifications = UnixDatagram::bind(&socket)?;
        let agent = Mutex::new(options.agent.clone());
        let inner = Arc::new(Inner {
            options,
            bus,
            systemd,
            logind,
            rpm_ostreed,
            bootc,
            sysroot,
            runtime: tokio::runtime::Handle::current(),
            agent,
            pid: AtomicI32::new(0),
            wanted: AtomicBool::new(false),
            on: AtomicBool::new(false),
            down: AtomicBool::new(true),
            boot: AtomicU64::new(0),
            last_ping: Mutex::new(Instant::now()),
            pings: AtomicU64::new(0),
            supervisor: Mutex::default(),
            finalize_failure: Mutex::default(),
            fall_back: AtomicBool::new(false),
            kubelet_fails: AtomicBool::new(false),
        });
        tokio::spawn(hear(Arc::downgrade(&inner), notifications));
        let weak = Arc::downgrade(&inner);
        inner.logind.on_reboot(move || {
            if let Some(inner) = weak.upgrade()
                && inner.on.load(Ordering::SeqCst)
            {
                let boot = inner.boot.load(Ordering::SeqCst);
                let runtime = inner.runtime.clone();
                runtime.spawn(async move { Machine { inner }.reboot(boot).await });
            }
        });
        Ok(Self { inner })
    }

    /// Installs `reference` as the first deployment, before the first boot.
    pub async fn install(&self, reference: &str) -> anyhow::Result<()> {
        let options = &self.inner.options;
        let engine = options.installer.as_ref().unwrap_or(&options.engine);
        self.inner.rpm_ostreed.install(engine, reference, &options.kernel_arguments).await
    }

    /// Boots: new boot id, empty `/run`, the first boot entry, units, agent.
    pub async fn power_on(&self) -> anyhow::Result<()> {
        let inner = &self.inner;
        while !inner.down.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        if inner.on.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        inner.down.store(false, Ordering::SeqCst);
        let boot = inner.boot.fetch_add(1, Ordering::SeqCst) + 1;
        let index = usize::from(inner.fall_back.swap(false, Ordering::SeqCst));
        let deployment = inner.sysroot.boot(index)?;
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("a new boot id")?;
        let proc = self.root().join("proc");
        std::fs::write(proc.join("sys/kernel/random/boot_id"), &boot_id)?;
        let uptime = inner.options.uptime.as_secs_f64();
        std::fs::write(proc.join("uptime"), format!("{uptime:.2} {uptime:.2}\n"))?;
        inner.systemd.reset(inner.options.bootloader_update);
        inner.logind.reset();
        match inner.options.host_tools {
            HostTools::RpmOstree => {}
            HostTools::Bootc => {
                inner.systemd.uninstall("rpm-ostreed.service");
                inner.bootc.boot()?;
            }
            HostTools::Both => inner.bootc.boot()?,
        }
        let stamp = self.root().join(STAMP);
        if stamp.exists() {
            std::fs::remove_file(stamp)?;
            inner.systemd.fail(BOOT_COMPLETE, "exit-code");
        }
        inner.systemd.set(KUBELET, "activating", "start-pre");
        let (weak, delay) = (Arc::downgrade(inner), inner.options.kubelet_delay);
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            if let Some(inner) = weak.upgrade()
                && inner.boot.load(Ordering::SeqCst) == boot
            {
                if inner.kubelet_fails.load(Ordering::SeqCst) {
                    inner.systemd.fail(KUBELET, "exit-code");
                } else {
                    inner.systemd.set(KUBELET, "active", "running");
                }
            }
        });
        inner
            .options
            .events
            .emit(Event::Booted { boot_id: boot_id.trim().to_owned(), reference: deployment.reference });
        if inner.on.load(Ordering::SeqCst) {
            self.start_agent();
        }
        Ok(())
    }

    /// The shutdown that follows an accepted reboot.
    async fn reboot(&self, boot: u64) {
        tokio::time::sleep(self.inner.options.shutdown_delay).await;
        if self.inner.boot.load(Ordering::SeqCst) != boot || !self.inner.on.load(Ordering::SeqCst) {
            return;
        }
        if self.shut_down().await {
            self.power_on().await.expect("a machine that booted once boots again");
        }
    }

    /// Shuts down in an orderly way and stays off; returns `false` when power was cut meanwhile.
    pub async fn shut_down(&self) -> bool {
        let inner = &self.inner;
        // A power cut takes this boot's number away, and the machine may be on again by now.
        let boot = inner.boot.load(Ordering::SeqCst);
        let is_over = || inner.boot.load(Ordering::SeqCst) != boot;
        self.stop_agent().await;
        if is_over() || !inner.on.load(Ordering::SeqCst) {
            return false;
        }
        let finalizes = inner.systemd.unit(FINALIZER).is_some_and(|unit| unit.active == "active");
        let failure = inner.finalize_failure.lock().unwrap().clone();
        let staged = inner.sysroot.load().iter().any(|deployment| deployment.staged);
        inner.systemd.stop_jobs();
        inner.bootc.power_off();
        inner.rpm_ostreed.power_off().await;
        if is_over() {
            return false;
        }
        match failure {
            Some(text) if finalizes && staged => {
                *inner.finalize_failure.lock().unwrap() = None;
                let _ = inner.sysroot.drop_staged();
                std::fs::write(self.root().join(STAMP), text).expect("room on /boot");
            }
            // The write fails only after a power cut.
            _ if finalizes && inner.sysroot.finalize().is_err() => return false,
            _ => {}
        }
        if inner.boot.compare_exchange(boot, boot + 1, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return false;
        }
        inner.sysroot.cut_power();
        inner.on.store(false, Ordering::SeqCst);
        inner.options.events.emit(Event::Down);
        inner.down.store(true, Ordering::SeqCst);
        true
    }

    /// Cuts the power at once: nothing is finalized, the staged deployment is lost. May be called from a listener;
    /// [`Machine::power_on`] waits until every process is dead.
    pub fn power_cut(&self) {
        let inner = self.inner.clone();
        if !inner.on.swap(false, Ordering::SeqCst) {
            return;
        }
        inner.sysroot.cut_power();
        inner.boot.fetch_add(1, Ordering::SeqCst);
        inner.wanted.store(false, Ordering::SeqCst);
        self.kill_agent();
        inner.systemd.stop_jobs();
        inner.bootc.power_off();
        let this = self.clone();
        inner.runtime.clone().spawn(async move {
            inner.rpm_ostreed.power_off().await;
            this.supervised().await;
            inner.options.events.emit(Event::Down);
            inner.down.store(true, Ordering::SeqCst);
        });
    }

    /// Kills the agent with `SIGKILL`; systemd's double restarts it. May be called from a listener.
    pub fn kill_agent(&self) {
        self.signal_agent(Signal::SIGKILL);
    }

    /// Sends the agent (its process group) a signal. May be called from a listener.
    pub fn signal_agent(&self, signal: Signal) {
        self.inner.signal(signal);
    }

    /// The agent's process id.
    #[must_use]
    pub fn agent_pid(&self) -> Option<u32> {
        u32::try_from(self.inner.pid.load(Ordering::SeqCst)).ok().filter(|pid| *pid != 0)
    }

    /// Starts the agent unless it runs.
    pub fn start_agent(&self) {
        let inner = &self.inner;
        inner.wanted.store(true, Ordering::SeqCst);
        let mut supervisor = inner.supervisor.lock().unwrap();
        let running = supervisor.as_ref().is_some_and(|task| !task.is_finished());
        if !running {
            *supervisor = Some(inner.runtime.spawn(supervise(Arc::downgrade(inner))));
        }
    }

    /// Stops the agent as systemd does and waits until it is gone.
    pub async fn stop_agent(&self) {
        self.inner.wanted.store(false, Ordering::SeqCst);
        self.signal_agent(Signal::SIGTERM);
        if tokio::time::timeout(STOP_TIMEOUT, self.supervised()).await.is_err() {
            self.kill_agent();
            self.supervised().await;
        }
    }

    /// Waits until no agent runs and none is about to start.
    async fn supervised(&self) {
        loop {
            let running = self.inner.supervisor.lock().unwrap().as_ref().is_some_and(|task| !task.is_finished());
            if !running {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Uses another program or other arguments from the next start of the agent.
    pub fn set_agent(&self, agent: AgentCommand) {
        *self.inner.agent.lock().unwrap() = agent;
    }

    /// The next finalization fails with this text: the old deployment boots and ostree-boot-complete.service fails.
    pub fn fail_finalize(&self, text: &str) {
        *self.inner.finalize_failure.lock().unwrap() = Some(text.to_owned());
    }

    /// The next boot runs the second boot entry, as boot counting or an operator at the console does.
    pub fn fall_back(&self) {
        self.inner.fall_back.store(true, Ordering::SeqCst);
    }

    /// Whether kubelet.service fails on later boots.
    pub fn kubelet_fails(&self, fails: bool) {
        self.inner.kubelet_fails.store(fails, Ordering::SeqCst);
    }

    /// Every deployment on the disk: staged first, then in boot order.
    #[must_use]
    pub fn deployments(&self) -> Vec<Deployment> {
        self.inner.sysroot.load()
    }

    /// The booted deployment.
    #[must_use]
    pub fn booted(&self) -> Option<Deployment> {
        self.deployments().into_iter().find(|deployment| deployment.booted)
    }

    /// The root of the machine's file tree.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.inner.sysroot.root().to_owned()
    }

    /// The address of its system bus.
    #[must_use]
    pub fn bus_address(&self) -> String {
        self.inner.bus.address()
    }

    /// The number of watchdog pings that the service manager got from the agent.
    #[must_use]
    pub fn pings(&self) -> u64 {
        self.inner.pings.load(Ordering::SeqCst)
    }

    /// The boot id.
    #[must_use]
    pub fn boot_id(&self) -> String {
        let path = self.root().join("proc/sys/kernel/random/boot_id");
        std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
    }

    /// Whether power is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.inner.on.load(Ordering::SeqCst)
    }

    /// The disk.
    #[must_use]
    pub fn sysroot(&self) -> Arc<Sysroot> {
        self.inner.sysroot.clone()
    }

    /// The rpm-ostree daemon.
    #[must_use]
    pub fn rpm_ostreed(&self) -> RpmOstreed {
        self.inner.rpm_ostreed.clone()
    }

    /// bootc.
    #[must_use]
    pub fn bootc(&self) -> Bootc {
        self.inner.bootc.clone()
    }

    /// The service manager.
    #[must_use]
    pub fn systemd(&self) -> Systemd {
        self.inner.systemd.clone()
    }

    /// The login manager.
    #[must_use]
    pub fn logind(&self) -> Logind {
        self.inner.logind.clone()
    }

    /// Runs `rpm-ostree rebase` by hand, to its end.
    pub async fn human_stage(&self, reference: &str) -> anyhow::Result<()> {
        self.inner.rpm_ostreed.human_stage(reference).await
    }
}

impl Inner {
    fn signal(&self, signal: Signal) {
        let pid = self.pid.load(Ordering::SeqCst);
        if pid > 0 {
            let _ = killpg(Pid::from_raw(pid), signal);
        }
    }

    fn spawn_agent(&self) -> std::io::Result<tokio::process::Child> {
        let agent = self.agent.lock().unwrap().clone();
        let mut command = tokio::process::Command::from(trace::agent(&agent.program));
        command
            .args(&agent.args)
            .env("DBUS_SYSTEM_BUS_ADDRESS", self.bus.address())
            .env("NOTIFY_SOCKET", self.options.dir.join("notify.sock"))
            .env("REBASE_AGENT_ROOT", self.sysroot.root())
            .env_remove("WATCHDOG_PID")
            .env_remove("WATCHDOG_USEC")
            .envs(agent.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        if let Some(watchdog) = self.options.watchdog {
            command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        }
        command.spawn()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
    }
}

/// Runs the agent and restarts it while it is wanted.
async fn supervise(weak: Weak<Inner>) {
    loop {
        let Some(inner) = weak.upgrade() else { return };
        if !inner.wanted.load(Ordering::SeqCst) || !inner.on.load(Ordering::SeqCst) {
            break;
        }
        let mut child = match inner.spawn_agent() {
            Ok(child) => child,
            Err(error) => {
                inner.options.events.emit(Event::AgentLine(format!("cannot start: {error}")));
                inner.systemd.fail(AGENT, "exit-code");
                return;
            }
        };
        let pid = child.id().unwrap_or_default();
        *inner.last_ping.lock().unwrap() = Instant::now();
        inner.pid.store(i32::try_from(pid).unwrap_or_default(), Ordering::SeqCst);
        inner.systemd.update(AGENT, |unit| {
            "activating".clone_into(&mut unit.active);
            "start".clone_into(&mut unit.sub);
            "success".clone_into(&mut unit.result);
            unit.status_text.clear();
            unit.main_pid = pid;
        });
        inner.options.events.emit(Event::AgentStarted { pid });
        // A stop that came before the process id was known.
        if !inner.wanted.load(Ordering::SeqCst) {
            inner.signal(Signal::SIGTERM);
        }
        let (watchdog, restart, events) =
            (inner.options.watchdog, inner.options.restart_delay, inner.options.events.clone());
        drop(inner);
        let lines = child.stderr.take().map(|stderr| {
            let events = events.clone();
            tokio::spawn(async move {
                let mut lines = BufReader::new(stderr).lines();
                while let Ok(Some(line)) = lines.next_line().await {
                    events.emit(Event::AgentLine(line));
                }
            })
        });
        let mut missed = false;
        let status = loop {
            let tick = watchdog.map_or(Duration::from_millis(200), |limit| limit / 4);
            match tokio::time::timeout(tick, child.wait()).await {
                Ok(status) => break status,
                Err(_) => {
                    let Some(inner) = weak.upgrade() else { return };
                    let silent = inner.last_ping.lock().unwrap().elapsed();
                    // A process that ignores the first signal is killed by the second.
                    if watchdog.is_some_and(|limit| silent > 2 * limit) {
                        inner.signal(Signal::SIGKILL);
                    } else if watchdog.is_some_and(|limit| silent > limit) && !missed {
                        missed = true;
                        inner.signal(Signal::SIGABRT);
                    }
                }
            }
        };
        // The unit's control group ends with its main process.
        let group = i32::try_from(pid).unwrap_or_default();
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        if let Some(lines) = lines {
            let _ = tokio::time::timeout(Duration::from_millis(500), lines).await;
        }
        let status = status.expect("a child can be waited for");
        let code = status.code().unwrap_or_else(|| -status.signal().unwrap_or_default());
        let Some(inner) = weak.upgrade() else { return };
        inner.pid.store(0, Ordering::SeqCst);
        let wanted = inner.wanted.load(Ordering::SeqCst);
        inner.systemd.update(AGENT, |unit| {
            let result = match code {
                0 => "success",
                _ if missed => "watchdog",
                code if code < 0 => "signal",
                _ => "exit-code",
            };
            result.clone_into(&mut unit.result);
            unit.exec_main_status = code.abs();
            unit.main_pid = 0;
            let (active, sub) = if wanted { ("activating", "auto-restart") } else { ("inactive", "dead") };
            active.clone_into(&mut unit.active);
            sub.clone_into(&mut unit.sub);
        });
        inner.options.events.emit(Event::AgentExited { code });
        drop(inner);
        if wanted {
            tokio::time::sleep(restart).await;
        }
    }
}

/// systemd's observed handling of a message: a backslash is removed, the next character is kept.
fn unescaped(text: &str) -> String {
    let mut escaped = false;
    text.chars()
        .filter(|c| {
            escaped = !escaped && *c == '\\';
            !escaped
        })
        .collect()
}

/// Reads the agent's messages to its service manager.
async fn hear(weak: Weak<Inner>, socket: UnixDatagram) {
    let mut buffer = vec![0; 65_536];
    loop {
        let received = tokio::time::timeout(Duration::from_millis(500), socket.recv(&mut buffer)).await;
        let Some(inner) = weak.upgrade() else { return };
        let Ok(Ok(size)) = received else { continue };
        let text = String::from_utf8_lossy(&buffer[..size]).into_owned();
        for line in text.lines() {
            match line.split_once('=') {
                Some(("READY", "1")) => {
                    inner.systemd.set(AGENT, "active", "running");
                    inner.options.events.emit(Event::AgentReady);
                }
                Some(("STATUS", status)) => {
                    let status = &unescaped(status);
                    inner.systemd.update(AGENT, |unit| status.clone_into(&mut unit.status_text));
                    inner.options.events.emit(Event::AgentStatus(status.to_owned()));
                }
                Some(("WATCHDOG", "1")) => {
                    *inner.last_ping.lock().unwrap() = Instant::now();
                    inner.pings.fetch_add(1, Ordering::SeqCst);
                }
                Some(("WATCHDOG", "trigger")) => inner.signal(Signal::SIGABRT),
                Some(("STOPPING", "1")) => inner.systemd.set(AGENT, "deactivating", "stop-sigterm"),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logind::Inhibitor;
    use crate::rpmostreed::tests::{Layouts, reference};

    struct Lab {
        _dir: tempfile::TempDir,
        machine: Machine,
        events: tokio::sync::broadcast::Receiver<Event>,
        old: String,
        new: String,
    }

    impl Lab {
        async fn new(script: &str, change: impl FnOnce(&mut MachineOptions)) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let layouts = Layouts::new(dir.path());
            let (old, new) = (layouts.image("1", true), layouts.image("2", true));
            let agent = AgentCommand {
                program: "/bin/sh".into(),
                args: vec!["-c".to_owned(), script.to_owned()],
                env: vec![("GREETING".to_owned(), "hello".to_owned())],
            };
            let events = Events::new();
            let receiver = events.subscribe();
            let mut options = MachineOptions::new(dir.path(), layouts.engine(), events, agent);
            change(&mut options);
            let machine = Machine::new(options).await.unwrap();
            machine.install(&reference(&old)).await.unwrap();
            Self { _dir: dir, machine, events: receiver, old, new }
        }

        async fn see(&mut self, wanted: impl Fn(&Event) -> bool) -> Event {
            tokio::time::timeout(Duration::from_secs(20), async {
                loop {
                    let event = self.events.recv().await.unwrap();
                    if wanted(&event) {
                        return event;
                    }
                }
            })
            .await
            .unwrap()
        }
    }

    const SLEEPER: &str = "echo \"$GREETING\" >&2; exec sleep 1000";

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn reboot_finalizes_the_staged_deployment() {
        let mut lab = Lab::new(SLEEPER, |_| {}).await;
        let machine = lab.machine.clone();
        machine.power_on().await.unwrap();
        let first = machine.boot_id();
        assert_eq!(machine.booted().unwrap().digest, lab.old);
        lab.see(|event| *event == Event::AgentLine("hello".to_owned())).await;
        machine.human_stage(&reference(&lab.new)).await.unwrap();
        machine.logind().reboot().await;
        lab.see(|event| *event == Event::AgentExited { code: -15 }).await;
        lab.see(|event| *event == Event::Down).await;
        lab.see(|event| matches!(event, Event::Booted { .. })).await;
        lab.see(|event| matches!(event, Event::AgentStarted { .. })).await;
        assert_ne!(machine.boot_id(), first);
        let deployments = machine.deployments();
        assert_eq!(deployments[0].digest, lab.new);
        assert!(deployments[0].booted && !deployments[0].staged);
        assert_eq!(deployments[1].digest, lab.old);
        assert!(!machine.logind().preparing_for_shutdown());
        let command_line = std::fs::read_to_string(machine.root().join("proc/cmdline")).unwrap();
        assert!(command_line.contains("console=ttyS0 ostree=/ostree/boot.1/rhcos/"), "{command_line}");
        assert_eq!(std::fs::read_to_string(machine.root().join("usr/lib/version")).unwrap(), "2");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn locked_deployment_boots_only_after_its_finalization() {
        let mut lab = Lab::new(SLEEPER, |_| {}).await;
        let (machine, target) = (lab.machine.clone(), lab.new.clone());
        let daemon = machine.rpm_ostreed();
        machine.power_on().await.unwrap();
        lab.see(|event| matches!(event, Event::Booted { .. })).await;
        daemon.human_stage_locked(&reference(&target)).await.unwrap();
        machine.logind().reboot().await;
        lab.see(|event| matches!(event, Event::Booted { .. })).await;
        assert_eq!(machine.deployments().len(), 1, "the locked deployment is dropped at the boot");
        assert_eq!(machine.booted().unwrap().digest, lab.old);
        daemon.human_stage_locked(&reference(&target)).await.unwrap();
        machine.logind().add_inhibitor(Inhibitor::block("someone", "a backup"));
        let refused = daemon.human_finalize(&target).await.unwrap_err().to_string();
        let text = "Reboot blocked by a systemd inhibitor lock in `block` mode\nHeld by: someone\nReason: a backup";
        assert_eq!(refused, text);
        machine.logind().remove_inhibitor("someone");
        assert!(machine.deployments()[0].locked, "a refusal unlocked it");
        // The client learns of the success before the reboot begins; later clients are refused.
        machine.logind().refuse_reboot(Some(("org.example.Refused", "not now")));
        daemon.human_finalize(&target).await.unwrap();
        let late = daemon.human_finalize(&target).await.unwrap_err().to_string();
        assert!(late.contains("Reboot initiated, cannot start new transaction"), "{late}");
        daemon.crash().await;
        machine.logind().refuse_reboot(None);
        assert_eq!(daemon.human_finalize(&target).await.unwrap_err().to_string(), "Staged deployment already unlocked");
        daemon.human_stage(&reference(&lab.old)).await.unwrap();
        daemon.human_stage_locked(&reference(&target)).await.unwrap();
        daemon.human_finalize(&target).await.unwrap();
        lab.see(|event| matches!(event, Event::Unlocked { .. })).await;
        lab.see(|event| *event == Event::RebootAccepted).await;
        lab.see(|event| matches!(event, Event::Booted { .. })).await;
        assert_eq!(machine.booted().unwrap().digest, target);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn staged_deployment_is_lost_without_a_finalizer() {
        let mut lab = Lab::new(SLEEPER, |_| {}).await;
        let machine = lab.machine.clone();
        machine.power_on().await.unwrap();
        // OCPBUGS-51150.
        machine.rpm_ostreed().finalizer_stays_inactive(true);
        machine.human_stage(&reference(&lab.new)).await.unwrap();
        assert_eq!(machine.systemd().unit(FINALIZER).unwrap().active, "inactive");
        machine.logind().reboot().await;
        lab.see(|event| *event == Event::Down).await;
        lab.see(|event| matches!(event, Event::AgentStarted { .. })).await;
        assert_eq!(machine.deployments().len(), 1);
        assert_eq!(machine.booted().unwrap().digest, lab.old);
        // An explicitly started finalizer works, but the boot loader may still fall back.
        machine.human_stage(&reference(&lab.new)).await.unwrap();
        machine.systemd().activate(FINALIZER).await.unwrap();
        machine.fall_back();
        machine.logind().reboot().await;
        lab.see(|event| *event == Event::Down).await;
        lab.see(|event| matches!(event, Event::AgentStarted { .. })).await;
        let deployments = machine.deployments();
        assert_eq!(deployments[0].digest, lab.new);
        assert!(!deployments[0].booted && deployments[1].booted);
        // A power cut loses the staged deployment.
        machine.rpm_ostreed().finalizer_stays_inactive(false);
        let other = machine.deployments().len();
        machine.power_cut();
        machine.power_on().await.unwrap();
        assert_eq!(machine.deployments().len(), other);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn failed_finalization_is_reported_after_the_boot() {
        let mut lab = Lab::new(SLEEPER, |_| {}).await;
        let machine = lab.machine.clone();
        machine.power_on().await.unwrap();
        machine.human_stage(&reference(&lab.new)).await.unwrap();
        machine.fail_finalize("Installing kernel: regfile copy: No space left on device");
        machine.logind().reboot().await;
        lab.see(|event| *event == Event::Down).await;
        lab.see(|event| matches!(event, Event::AgentStarted { .. })).await;
        assert_eq!(machine.booted().unwrap().digest, lab.old);
        let unit = machine.systemd().unit(BOOT_COMPLETE).unwrap();
        assert_eq!((unit.active.as_str(), unit.result.as_str()), ("failed", "exit-code"));
        let machine = lab.machine.clone();
        let mut seen = false;
        for _ in 0..200 {
            seen |= machine.systemd().unit(KUBELET).unwrap().active == "active";
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(seen);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn agent_is_restarted_when_it_dies() {
        let mut lab = Lab::new(SLEEPER, |options| options.watchdog = Some(Duration::from_millis(200))).await;
        let machine = lab.machine.clone();
        // The agent is killed from inside a listener.
        let killer = machine.clone();
        let once = AtomicBool::new(true);
        machine.inner.options.events.listen(move |event| {
            if matches!(event, Event::AgentLine(_)) && once.swap(false, Ordering::SeqCst) {
                killer.kill_agent();
            }
        });
        machine.power_on().await.unwrap();
        lab.see(|event| *event == Event::AgentExited { code: -9 }).await;
        lab.see(|event| matches!(event, Event::AgentStarted { .. })).await;
        // This agent never pings.
        lab.see(|event| *event == Event::AgentExited { code: -6 }).await;
        assert_eq!(machine.systemd().unit(AGENT).unwrap().result, "watchdog");
        machine.stop_agent().await;
        assert_eq!(machine.agent_pid(), None);
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let path = machine.inner.options.dir.join("notify.sock");
        socket.send_to(b"READY=1\nSTATUS=watching a\\x40 b\\\\x40", path).unwrap();
        lab.see(|event| *event == Event::AgentReady).await;
        lab.see(|event| *event == Event::AgentStatus(r"watching ax40 b\x40".to_owned())).await;
        assert_eq!(machine.systemd().unit(AGENT).unwrap().status_text, r"watching ax40 b\x40");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn power_may_fail_at_any_event() {
        for point in ["Importing", "Staging deployment"] {
            let mut lab = Lab::new(SLEEPER, |_| {}).await;
            let machine = lab.machine.clone();
            let plug = machine.clone();
            machine.inner.options.events.listen(move |event| {
                if matches!(event, Event::TransactionMessage(text) if text.contains(point)) {
                    plug.power_cut();
                }
            });
            machine.power_on().await.unwrap();
            machine.human_stage(&reference(&lab.new)).await.unwrap_err();
            lab.see(|event| *event == Event::Down).await;
            assert!(!machine.is_on() && machine.agent_pid().is_none());
            machine.power_on().await.unwrap();
            assert_eq!(machine.deployments().len(), 1);
            assert_eq!(machine.booted().unwrap().digest, lab.old);
            lab.see(|event| matches!(event, Event::AgentStarted { .. })).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn power_may_fail_during_shutdown() {
        let mut lab = Lab::new(SLEEPER, |_| {}).await;
        let machine = lab.machine.clone();
        machine.power_on().await.unwrap();
        lab.see(|event| matches!(event, Event::AgentLine(_))).await;
        machine.human_stage(&reference(&lab.new)).await.unwrap();
        let plug = machine.clone();
        machine.inner.options.events.listen(move |event| {
            if matches!(event, Event::AgentExited { .. }) {
                plug.power_cut();
            }
        });
        machine.logind().reboot().await;
        lab.see(|event| *event == Event::Down).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!machine.is_on(), "the machine stays off without a power-on");
        machine.power_on().await.unwrap();
        assert_eq!(machine.booted().unwrap().digest, lab.old);
        assert_eq!(machine.deployments().len(), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn dropped_machine_leaves_nothing_behind() {
        let mut lab = Lab::new(SLEEPER, |_| {}).await;
        lab.machine.power_on().await.unwrap();
        let Event::AgentStarted { pid } = lab.see(|event| matches!(event, Event::AgentStarted { .. })).await else {
            unreachable!()
        };
        let address = lab.machine.bus_address();
        drop(lab.machine);
        let alive = || std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
        for _ in 0..400 {
            if !alive() && crate::bus::connect(&address).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("agent {pid} or the bus is left");
    }
}
