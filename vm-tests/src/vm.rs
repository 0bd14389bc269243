//! The machine: a QEMU process per boot, its boot loader, its power, and a way to run commands in it.
//!
//! The kernel is booted directly: the entry that a boot loader would choose is read from the disk before every start,
//! so the end of the process is exactly the reboot, and the disk can be read in between.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use openssl::base64::{decode_block, encode_block};
use support::tools;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use crate::disk::{Disk, as_boot_loaders_pass};
use crate::journal::Journal;

/// Longest time from power-on to accepting commands. On an idle machine 15 s.
pub const BOOT: Duration = Duration::from_secs(120);
/// Longest command in the guest; most take under a second.
pub const COMMAND: Duration = Duration::from_secs(60);
/// Longest shutdown, finalization included. On an idle machine 5 s.
pub const SHUTDOWN: Duration = Duration::from_secs(90);
/// Attempts to boot when QEMU itself dies: without KVM, an assertion of its own (`iotlb_to_section`) was seen to fail.
const BOOTS: u32 = 3;
/// Longest time for QEMU to make its sockets.
const START: Duration = Duration::from_secs(10);
/// Polling interval for a socket.
const LOOK: Duration = Duration::from_millis(20);
/// Longest time for the guest kernel's first line under KVM. Where KVM works, it takes a fraction of a second.
const FIRST_LINE: Duration = Duration::from_secs(3);
/// A part of the kernel's first line.
const KERNEL: &[u8] = b"Linux version ";
const MEMORY_MIB: u32 = 1024;

/// The emulator and its start options.
#[derive(Clone, Debug)]
pub struct Emulator {
    program: PathBuf,
    firmware: Vec<PathBuf>,
    /// Unknown until a kernel was tried with it.
    kvm: Arc<OnceCell<bool>>,
}

impl Emulator {
    /// The emulator at `tree`, if that is given, or else the system's.
    pub fn find(tree: Option<&Path>) -> Result<Self> {
        let (program, firmware) = match tree {
            Some(tree) => {
                (tree.join("qemu"), ["qemu", "seabios"].map(|name| tree.join("root/usr/share").join(name)).to_vec())
            }
            None => (tools::on_path("qemu-system-x86_64").context("no qemu-system-x86_64 on PATH")?, Vec::new()),
        };
        Ok(Self { program, firmware, kvm: Arc::default() })
    }

    /// Its name in a report.
    #[must_use]
    pub fn describe(&self) -> &'static str {
        match self.kvm.get() {
            Some(true) => "KVM",
            Some(false) => "TCG",
            None => "nothing booted",
        }
    }

    /// Whether KVM boots this kernel. The device alone is not enough, nor is firmware: on some hosts firmware runs
    /// under KVM and a kernel does not.
    async fn has_kvm(&self, kernel: &Path) -> bool {
        *self.kvm.get_or_init(|| self.boots_with_kvm(kernel)).await
    }

    async fn boots_with_kvm(&self, kernel: &Path) -> bool {
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return false;
        }
        let mut command = self.command();
        command.args(["-accel", "kvm", "-cpu", "host", "-machine", "pc", "-nodefaults", "-no-user-config"]);
        command.args(["-display", "none", "-no-reboot", "-m", "512", "-serial", "stdio", "-kernel"]).arg(kernel);
        command.args(["-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let Ok(mut qemu) = command.spawn() else { return false };
        let Some(mut serial) = qemu.stdout.take() else { return false };
        let is_said = async {
            let mut said = Vec::new();
            while serial.read_buf(&mut said).await.is_ok_and(|bytes| bytes > 0) {
                if said.windows(KERNEL.len()).any(|part| part == KERNEL) {
                    return true;
                }
            }
            false
        };
        let boots = timeout(FIRST_LINE, is_said).await.unwrap_or(false);
        let _ = qemu.kill().await;
        boots
    }

    fn command(&self) -> Command {
        let mut command = Command::from(tools::child(&self.program));
        for directory in &self.firmware {
            command.arg("-L").arg(directory);
        }
        command
    }
}

/// The files of the guest's first boot in /etc and /var, as from Ignition: lines of tmpfiles.d, which do not change
/// existing files.
#[derive(Clone, Debug, Default)]
pub struct Provision {
    lines: Vec<String>,
    drop_ins: Vec<(String, String)>,
}

impl Provision {
    /// Adds this file, owned by root.
    #[must_use]
    pub fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Self {
        self.lines.push(format!("f~ {path} {mode:04o} root root - {}", encode_block(content)));
        self
    }

    /// Adds this symbolic link.
    #[must_use]
    pub fn link(mut self, path: &str, to: &str) -> Self {
        self.lines.push(format!("L {path} - - - - {to}"));
        self
    }

    /// Adds this drop-in for a unit, in every boot.
    #[must_use]
    pub fn drop_in(mut self, unit: &str, text: &str) -> Self {
        self.drop_ins.push((unit.to_owned(), text.to_owned()));
        self
    }

    /// The form in which systemd takes credentials from the firmware.
    fn credentials(&self) -> Vec<String> {
        let of =
            |name: &str, text: &str| format!("io.systemd.credential.binary:{name}={}", encode_block(text.as_bytes()));
        let lines = of("tmpfiles.extra", &format!("{}\n", self.lines.join("\n")));
        let drop_ins = self.drop_ins.iter().map(|(unit, text)| of(&format!("systemd.unit-dropin.{unit}"), text));
        [lines].into_iter().chain(drop_ins).collect()
    }
}

/// A machine.
pub struct Vm {
    /// Its disk.
    pub disk: Disk,
    /// Its journal of all boots.
    pub journal: Journal,
    dir: PathBuf,
    emulator: Emulator,
    sockets: TempDir,
    credentials: Vec<PathBuf>,
    boots: u32,
    running: Option<Running>,
}

struct Running {
    qemu: Child,
    channel: BufReader<UnixStream>,
    boot_id: String,
}

impl Vm {
    /// A new machine with a copy of that disk; `dir` keeps all its files.
    pub fn new(dir: &Path, disk: &Path, emulator: &Emulator, provision: &Provision) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let mut credentials = Vec::new();
        for (number, text) in provision.credentials().into_iter().enumerate() {
            let path = dir.join(format!("credential-{number}"));
            fs::write(&path, text)?;
            credentials.push(path);
        }
        Ok(Self {
            disk: Disk::copy(disk, &dir.join("disk.raw"))?,
            journal: Journal::new(),
            dir: dir.to_owned(),
            emulator: emulator.clone(),
            // Addresses of Unix sockets must be short.
            sockets: tempfile::Builder::new().prefix("vm-").tempdir()?,
            credentials,
            boots: 0,
            running: None,
        })
    }

    /// The directory of console and journal.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// This boot's id.
    #[must_use]
    pub fn boot_id(&self) -> &str {
        self.running.as_ref().map_or("", |running| running.boot_id.as_str())
    }

    /// Whether it is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.running.is_some()
    }

    /// Boots the entry that a boot loader would choose, and waits until the guest accepts commands.
    pub async fn power_on(&mut self) -> Result<Duration> {
        ensure!(!self.is_on(), "the machine is already on");
        let began = Instant::now();
        for _ in 0..BOOTS {
            if self.boot().await? {
                return Ok(began.elapsed());
            }
            println!("{:>14}  QEMU died by a signal while the guest booted; booting again", "");
        }
        bail!("QEMU died {BOOTS} times while the guest booted; see {}", self.dir.join("qemu.log").display())
    }

    /// False if the emulator ended the boot, not the guest.
    async fn boot(&mut self) -> Result<bool> {
        self.disk.recover()?;
        let entry = self.disk.entry()?;
        let (kernel, initrd) = (self.dir.join("kernel"), self.dir.join("initrd"));
        self.disk.extract(&format!("/boot{}", entry.linux), &kernel)?;
        self.disk.extract(&format!("/boot{}", entry.initrd), &initrd)?;
        self.boots += 1;
        let socket = |name: &str| self.sockets.path().join(format!("{name}-{}", self.boots));
        let (command, journal) = (socket("command"), socket("journal"));

        let mut qemu = self.emulator.command();
        match self.emulator.has_kvm(&kernel).await {
            true => qemu.args(["-accel", "kvm", "-cpu", "host"]),
            // Without cx16 because QEMU 7.2 emulates it wrongly between threads: the guest's kernel dies of it.
            false => qemu.args(["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-cx16"]),
        };
        qemu.args(["-machine", "pc", "-smp", "2", "-m", &MEMORY_MIB.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-nic", "user,model=virtio-net-pci,ipv6=off", "-device", "virtio-rng-pci"])
            .args(["-device", "virtio-serial-pci"])
            .arg("-drive")
            .arg(format!("file={},if=virtio,format=raw,cache=unsafe", self.disk.path().display()))
            .arg("-serial")
            .arg(format!("file:{}", self.dir.join(format!("console-{}.log", self.boots)).display()))
            .arg("-kernel")
            .arg(&kernel)
            .arg("-initrd")
            .arg(&initrd)
            .arg("-append")
            .arg(as_boot_loaders_pass(&entry.options));
        for path in &self.credentials {
            qemu.arg("-smbios").arg(format!("type=11,path={}", path.display()));
        }
        for (name, path) in [("command", &command), ("journal", &journal)] {
            qemu.arg("-chardev").arg(format!("socket,id={name},path={},server=on,wait=off", path.display()));
            qemu.arg("-device").arg(format!("virtserialport,chardev={name},name=vmtest.{name}"));
        }
        let log = File::options().create(true).append(true).open(self.dir.join("qemu.log"))?;
        let mut qemu = qemu.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true).spawn()?;
        let kept = File::options().create(true).append(true).open(self.dir.join("journal.jsonl"))?;
        self.journal.read(connect(&journal).await?, kept);
        let mut channel = BufReader::new(connect(&command).await?);
        let ready = tokio::select! {
            ready = timeout(BOOT, ready(&mut channel)) => ready
                .with_context(|| format!("no boot within {BOOT:?}; see {}", self.dir.display()))
                .and_then(|ready| ready),
            status = qemu.wait() => match status? {
                status if status.signal().is_some() => return Ok(false),
                status => Err(anyhow::anyhow!("QEMU ends with {status} while booting; see {}", self.dir.display())),
            },
        };
        let boot_id = ready?;
        self.running = Some(Running { qemu, channel, boot_id });
        Ok(true)
    }

    /// Runs a script in the guest; every failure is an error with its output.
    pub async fn run(&mut self, script: &str) -> Result<String> {
        match self.status(script).await? {
            (0, output) => Ok(output),
            (status, output) => bail!("in the guest, status {status} from `{script}`: {output}"),
        }
    }

    /// Runs a script in the guest: its status and its output.
    pub async fn status(&mut self, script: &str) -> Result<(i32, String)> {
        let running = self.running.as_mut().context("the guest is off")?;
        let exchange = async {
            running.channel.write_all(format!("{}\n", encode_block(script.as_bytes())).as_bytes()).await?;
            let mut line = String::new();
            while line.trim().is_empty() {
                line.clear();
                ensure!(running.channel.read_line(&mut line).await? > 0, "the guest went down");
            }
            let (status, output) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
            let output = String::from_utf8_lossy(&decode_block(output)?).into_owned();
            Ok((status.parse().with_context(|| format!("answer `{line}`"))?, output))
        };
        timeout(COMMAND, exchange).await.with_context(|| format!("no answer within {COMMAND:?}: `{script}`"))?
    }

    /// Reads a file of the guest.
    pub async fn read(&mut self, path: &str) -> Result<Vec<u8>> {
        let text = self.run(&format!("base64 -w 0 {path}")).await?;
        decode_block(&text).with_context(|| format!("reading {path}"))
    }

    /// Waits until the guest is off by itself, as after a reboot.
    pub async fn wait_off(&mut self, deadline: Duration) -> Result<()> {
        let running = self.running.as_mut().context("the guest is off already")?;
        let status = timeout(deadline, running.qemu.wait())
            .await
            .with_context(|| format!("the guest did not go down within {deadline:?}"))??;
        self.running = None;
        ensure!(status.success(), "QEMU ends with {status}; see {}", self.dir.join("qemu.log").display());
        Ok(())
    }

    /// Cuts the power.
    pub async fn power_cut(&mut self) -> Result<()> {
        if let Some(mut running) = self.running.take() {
            running.qemu.kill().await?;
        }
        Ok(())
    }
}

async fn connect(path: &Path) -> Result<UnixStream> {
    let connect = async {
        loop {
            if let Ok(stream) = UnixStream::connect(path).await {
                return stream;
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    timeout(START, connect).await.with_context(|| format!("QEMU makes no socket {}", path.display()))
}

/// The line `READY boot-id uptime`.
async fn ready(channel: &mut BufReader<UnixStream>) -> Result<String> {
    let mut line = String::new();
    loop {
        line.clear();
        if channel.read_line(&mut line).await? == 0 {
            // The end of the process gives the better error.
            std::future::pending::<()>().await;
        }
        if let Some(rest) = line.trim().strip_prefix("READY ") {
            return Ok(rest.split(' ').next().unwrap_or_default().to_owned());
        }
    }
}
