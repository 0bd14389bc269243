//! systemd as PID 1 of a container on its own disk, across reboots.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::process::{Child, Command};

use crate::tools;

/// Longest boot or shutdown; each takes about a second on an idle machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// Longest command in the container.
const COMMAND_DEADLINE: Duration = Duration::from_secs(120);
/// Polling interval where no notification exists.
pub const TICK: Duration = Duration::from_millis(50);
/// Exit code of systemd-nspawn after a reboot of the container.
const REBOOT: i32 = 133;

/// System calls that systemd-nspawn 252 is too old to allow.
const LANDLOCK: &str = "landlock_create_ruleset landlock_add_rule landlock_restrict_self";

/// systemd needs the unified hierarchy, which not every host mounts at that place; the host's mounts stay unchanged.
/// systemd-nspawn finds this mount only.
const ENTER: &str = r#"
mount --make-rprivate /
umount --recursive /sys/fs/cgroup 2>/dev/null || :
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# Its directories go with it.
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
exec systemd-nspawn "$@"
"#;

/// A running container. It is killed when this is dropped, and with this process.
#[derive(Debug)]
pub struct Container {
    options: Options,
    child: Child,
    leader: u32,
}

/// Settings of a container.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its disk.
    pub root: PathBuf,
    /// Its name, unique among running containers.
    pub name: String,
    /// The file for its console's output.
    pub console: PathBuf,
    /// Files of the host, and their places in the container.
    pub binds: Vec<(PathBuf, &'static str)>,
}

impl Container {
    /// Boots, and waits until systemd reports that it is up.
    pub async fn boot(options: Options) -> Result<Self> {
        let child = start(&options)?;
        let mut this = Self { options, child, leader: 0 };
        this.wait_up().await?;
        Ok(this)
    }

    async fn wait_up(&mut self) -> Result<()> {
        let began = Instant::now();
        while !self.is_up().await? {
            ensure!(began.elapsed() < BOOT_DEADLINE, "systemd is not up after {BOOT_DEADLINE:?}");
            tokio::time::sleep(TICK).await;
        }
        Ok(())
    }

    async fn is_up(&mut self) -> Result<bool> {
        if let Some(status) = self.child.try_wait()? {
            let console = fs::read_to_string(&self.options.console).unwrap_or_default();
            bail!("systemd-nspawn ended with {status}; its console: {console}");
        }
        let Some(leader) = self.child.id().and_then(leader_of) else { return Ok(false) };
        self.leader = leader;
        // A container without a bus is not up yet.
        let Ok(output) = self.run(&["systemctl", "is-system-running"]).await else { return Ok(false) };
        Ok(matches!(String::from_utf8_lossy(&output.stdout).trim(), "running" | "degraded"))
    }

    /// Waits for the shutdown of a reboot, reports it through `down`, and boots again.
    pub async fn reboot(&mut self, down: impl FnOnce()) -> Result<()> {
        let status = self.ended().await?;
        down();
        ensure!(status.code() == Some(REBOOT), "the machine went down with {status} instead of a reboot");
        self.child = start(&self.options)?;
        self.wait_up().await
    }

    /// Powers off, so that the journal is written to the disk.
    pub async fn stop(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            self.run(&["systemctl", "--no-block", "poweroff"]).await?;
            self.ended().await?;
        }
        Ok(())
    }

    async fn ended(&mut self) -> Result<ExitStatus> {
        let ended = tokio::time::timeout(BOOT_DEADLINE, self.child.wait()).await;
        Ok(ended.with_context(|| format!("not down after {BOOT_DEADLINE:?}"))??)
    }

    /// Runs a command in the container; its exit status is not checked.
    pub async fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.leader.to_string(), "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup"]);
        command.args(["--", "/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"]);
        command.args(["SYSTEMD_COLORS=0", "SYSTEMD_PAGER=", "SYSTEMD_URLIFY=0"]).args(arguments);
        tools::run(command, COMMAND_DEADLINE).await
    }

    /// Runs a command in the container that must succeed; returns its standard output.
    pub async fn ok(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(arguments).await?;
        let text = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`{}` ended with {}: {text}{error}", arguments.join(" "), output.status);
        Ok(text)
    }

    /// One property of a unit.
    pub async fn property(&self, unit: &str, name: &str) -> Result<String> {
        self.ok(&["systemctl", "show", "--value", "--property", name, unit]).await
    }

    /// Waits until `wanted` accepts a property of a unit; the error shows its last value.
    pub async fn wait_property(
        &self,
        unit: &str,
        name: &str,
        deadline: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let began = Instant::now();
        loop {
            let value = self.property(unit, name).await?;
            if wanted(&value) {
                return Ok(value);
            }
            ensure!(began.elapsed() < deadline, "after {deadline:?}, {name} of {unit} still is `{value}`");
            tokio::time::sleep(TICK).await;
        }
    }

    /// The host's path for a path of the container, including memory file systems.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.leader)).join(path.trim_start_matches('/'))
    }

    /// Installs a drop-in or replaces the one of that name; it lasts until the next boot.
    pub async fn drop_in(&self, unit: &str, name: &str, text: &str) -> Result<()> {
        let directory = self.path("run/systemd/system").join(format!("{unit}.d"));
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(format!("{name}.conf")), text)?;
        self.ok(&["systemctl", "daemon-reload"]).await.map(|_| ())
    }

    /// Removes the drop-in.
    pub async fn drop_out(&self, unit: &str, name: &str) -> Result<()> {
        fs::remove_file(self.path("run/systemd/system").join(format!("{unit}.d/{name}.conf")))?;
        self.ok(&["systemctl", "daemon-reload"]).await.map(|_| ())
    }
}

fn start(options: &Options) -> Result<Child> {
    let mut command = tools::child(Path::new("/usr/bin/unshare"));
    // A killed systemd-nspawn leaves its container running; the first process of a PID namespace takes all others with
    // it.
    command.args(["--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]);
    command.args(["bash", "-euc", ENTER, "nspawn"]);
    // There is no machined to register with, and the container sees only the named files of the host.
    command.args(["--quiet", "--register=no", "--keep-unit", "--console=pipe", "--settings=no"]);
    command.args(["--link-journal=no", "--resolv-conf=off", "--timezone=off", "--boot"]);
    command.arg(format!("--system-call-filter={LANDLOCK}"));
    command.arg(format!("--directory={}", options.root.display())).arg(format!("--machine={}", options.name));
    for (from, to) in &options.binds {
        command.arg(format!("--bind-ro={}:{to}", from.display()));
    }
    let console = fs::File::options().create(true).append(true).open(&options.console)?;
    command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
    let mut command = Command::from(command);
    command.kill_on_drop(true).spawn().context("starting systemd-nspawn")
}

/// PID 1 of the container that was started by the process `outer`: unshare, whose child is systemd-nspawn.
fn leader_of(outer: u32) -> Option<u32> {
    let is_leader = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        field("NSpid:").split_whitespace().last() == Some("1") && field("Name:") == "systemd"
    };
    children(outer).into_iter().flat_map(children).find(is_leader)
}

fn children(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}
