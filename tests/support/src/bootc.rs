//! A double of bootc as the agent uses it: the template units of `bootc switch` and of `ostree container image pull`,
//! and the socket behind which `bootc status` answers. It uses the same disk as the double of rpm-ostree, with the same real pull.

use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::events::{Event, Events};
use crate::rpmostreed::{Deployment, Reference, RpmOstreed, Sysroot};
use crate::systemd::Systemd;

/// The socket's unit.
pub const STATUS_UNIT: &str = "rebase-agent-bootc-status.socket";
const SOCKET: &str = "run/rebase-agent/bootc-status.sock";
const SWITCH: &str = "rebase-agent-bootc@";
const SWITCH_SIGNED: &str = "rebase-agent-bootc-signed@";
const PULL: &str = "rebase-agent-pull@";
const PULL_SIGNED: &str = "rebase-agent-pull-signed@";

#[derive(Default)]
struct Faults {
    /// Fails with exit code 1, before or after the image is staged.
    fail_before: usize,
    fail_after: bool,
    /// systemd's word for the failure.
    result: Option<String>,
    /// Ends with exit code 0 without staging.
    idle: bool,
    hang: bool,
    mute: bool,
    answer: Option<Vec<u8>>,
}

impl Faults {
    /// Whether this command fails.
    fn fails(&mut self) -> bool {
        let fails = self.fail_before > 0;
        self.fail_before = self.fail_before.saturating_sub(1);
        fails
    }
}

struct Inner {
    events: Events,
    sysroot: Arc<Sysroot>,
    rpm_ostreed: RpmOstreed,
    systemd: Systemd,
    faults: Mutex<Faults>,
    hanging: AtomicBool,
    release: Notify,
    listener: Mutex<Option<JoinHandle<()>>>,
    asked_while_locked: AtomicBool,
    /// Status holds the lock for a moment.
    telling: AtomicBool,
}

/// The handle to the double.
#[derive(Clone)]
pub struct Bootc {
    inner: Arc<Inner>,
}

impl fmt::Debug for Bootc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bootc").field("sysroot", &self.inner.sysroot).finish_non_exhaustive()
    }
}

impl Bootc {
    /// Installs the units; the socket listens only after [`Bootc::boot`].
    pub(crate) fn new(events: Events, sysroot: Arc<Sysroot>, rpm_ostreed: RpmOstreed, systemd: &Systemd) -> Self {
        let inner = Arc::new(Inner {
            events,
            sysroot,
            rpm_ostreed,
            systemd: systemd.clone(),
            faults: Mutex::default(),
            hanging: AtomicBool::new(false),
            release: Notify::new(),
            listener: Mutex::default(),
            asked_while_locked: AtomicBool::new(false),
            telling: AtomicBool::new(false),
        });
        for (template, signed, pulls) in
            [(SWITCH, false, false), (SWITCH_SIGNED, true, false), (PULL, false, true), (PULL_SIGNED, true, true)]
        {
            let weak = Arc::downgrade(&inner);
            systemd.install_template(template, move |instance| {
                let weak = weak.clone();
                async move {
                    let Some(inner) = weak.upgrade() else { return Err("resources".to_owned()) };
                    let image = unescape(&instance);
                    if pulls { inner.pull(&image, signed).await } else { inner.switch(&image, signed).await }
                }
            });
        }
        Self { inner }
    }

    /// The parts that systemd and the image provide at boot: the program and the socket.
    pub(crate) fn boot(&self) -> anyhow::Result<()> {
        let root = self.inner.sysroot.root();
        // This file is only there to be found; the double does the work.
        let program = root.join("usr/bin/bootc");
        std::fs::create_dir_all(program.parent().expect("a directory"))?;
        std::fs::write(program, "#!/bin/false\n")?;
        let path: PathBuf = root.join(SOCKET);
        std::fs::create_dir_all(path.parent().expect("a directory"))?;
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        self.inner.systemd.set(STATUS_UNIT, "active", "listening");
        let weak = Arc::downgrade(&self.inner);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Some(inner) = weak.upgrade() else { return };
                tokio::spawn(async move { inner.status(stream).await });
            }
        });
        self.power_off();
        *self.inner.listener.lock().unwrap() = Some(task);
        Ok(())
    }

    /// Closes the socket.
    pub(crate) fn power_off(&self) {
        if let Some(task) = self.inner.listener.lock().unwrap().take() {
            task.abort();
        }
    }

    /// The next switch or pull ends with exit code 1 and does nothing; each further call lets one more fail.
    pub fn fail_next(&self) {
        self.inner.faults.lock().unwrap().fail_before += 1;
    }

    /// The next switch ends with exit code 1 after staging: a bound image could not be pulled.
    pub fn fail_after_staging(&self) {
        self.inner.faults.lock().unwrap().fail_after = true;
    }

    /// systemd ends the next failing switch with this result, e.g. `timeout`.
    pub fn fail_with(&self, result: &str) {
        self.inner.faults.lock().unwrap().result = Some(result.to_owned());
    }

    /// The next switch ends with exit code 0 without staging.
    pub fn do_nothing_next(&self) {
        self.inner.faults.lock().unwrap().idle = true;
    }

    /// The next switch stops after its pull, holding the lock, and the next pull at its end, until [`Bootc::release`] or until its unit is stopped.
    pub fn hang(&self) {
        self.inner.faults.lock().unwrap().hang = true;
    }

    /// Whether a switch or a pull hangs now.
    #[must_use]
    pub fn is_hanging(&self) -> bool {
        self.inner.hanging.load(Ordering::SeqCst)
    }

    /// Continues a hanging switch.
    pub fn release(&self) {
        self.inner.release.notify_waiters();
    }

    /// Whether status accepts connections and never answers.
    pub fn mute(&self, mute: bool) {
        self.inner.faults.lock().unwrap().mute = mute;
    }

    /// Status answers with these bytes; `None` ends that.
    pub fn answer(&self, bytes: Option<Vec<u8>>) {
        self.inner.faults.lock().unwrap().answer = bytes;
    }

    /// Whether status was ever asked while a switch or another program held the lock, so that it had to wait.
    #[must_use]
    pub fn was_asked_while_locked(&self) -> bool {
        self.inner.asked_while_locked.load(Ordering::SeqCst)
    }

    /// Runs `bootc switch` by hand, with `--enforce-container-sigpolicy` if `signed`: to its end, without a unit.
    pub async fn human_switch(&self, image: &str, signed: bool) -> anyhow::Result<()> {
        self.inner.switch(image, signed).await.map_err(|result| anyhow::anyhow!("bootc switch: {result}"))
    }

    /// Runs `bootc rollback` by hand: the boot order is swapped, and the staged deployment is dropped.
    pub fn human_rollback(&self) -> anyhow::Result<()> {
        self.inner.sysroot.drop_staged()?;
        self.inner.sysroot.roll_back()
    }

    /// The output of `bootc status --format=json`.
    #[must_use]
    pub fn status(&self) -> Value {
        status(&self.inner.sysroot.load())
    }
}

impl Inner {
    async fn switch(self: &Arc<Self>, image: &str, signed: bool) -> Result<(), String> {
        let target = Reference { signed, name: image.to_owned() };
        let reference = target.canonical();
        self.events.emit(Event::TransactionRequested { method: "switch".to_owned(), argument: reference.clone() });
        let lock = self.sysroot.lock().await;
        self.events.emit(Event::TransactionStarted { title: format!("bootc switch {image}") });
        let outcome = self.switch_locked(&target).await;
        drop(lock);
        let error = outcome.as_ref().err().cloned();
        self.events.emit(Event::TransactionFinished { title: format!("bootc switch {image}"), error });
        outcome.map_err(|_| self.faults.lock().unwrap().result.take().unwrap_or_else(|| "exit-code".to_owned()))
    }

    async fn switch_locked(self: &Arc<Self>, target: &Reference) -> Result<(), String> {
        let reference = target.canonical();
        let deployments = self.sysroot.load();
        // `host.spec` is the staged image, or else the booted one.
        let spec = deployments.iter().find(|d| d.staged).or(deployments.iter().find(|d| d.booted));
        let (idle, fails_before, hangs) = {
            let mut faults = self.faults.lock().unwrap();
            (std::mem::take(&mut faults.idle), faults.fails(), std::mem::take(&mut faults.hang))
        };
        if idle || spec.is_some_and(|spec| spec.reference == reference) {
            return Ok(());
        }
        if fails_before {
            return Err("error: Switching: Pulling: something went wrong".to_owned());
        }
        let image = self.rpm_ostreed.import(target).await?;
        self.events.emit(Event::TransactionMessage(format!("Importing: {reference} (digest: {})", image.digest)));
        if hangs {
            self.hang().await;
        }
        self.rpm_ostreed.stage_imported(image).await?;
        if std::mem::take(&mut self.faults.lock().unwrap().fail_after) {
            return Err("error: Switching: Pulling bound image".to_owned());
        }
        let _ = self.sysroot.prune_images();
        std::fs::write(self.sysroot.root().join("run/reboot-required"), "").map_err(|error| error.to_string())
    }

    async fn hang(&self) {
        let released = self.release.notified();
        self.hanging.store(true, Ordering::SeqCst);
        let hanging = Hanging(self);
        released.await;
        drop(hanging);
    }

    /// `ostree container image pull`, which does not take the sysroot's lock.
    async fn pull(&self, image: &str, signed: bool) -> Result<(), String> {
        let target = Reference { signed, name: image.to_owned() };
        let (fails, hangs) = {
            let mut faults = self.faults.lock().unwrap();
            (faults.fails(), std::mem::take(&mut faults.hang))
        };
        let method = "pull".to_owned();
        self.events.emit(Event::TransactionRequested { method, argument: target.canonical() });
        let done = !fails && self.rpm_ostreed.import(&target).await.is_ok();
        if hangs {
            self.hang().await;
        }
        let result = || self.faults.lock().unwrap().result.take().unwrap_or_else(|| "exit-code".to_owned());
        if done { Ok(()) } else { Err(result()) }
    }

    async fn status(self: &Arc<Self>, mut stream: UnixStream) {
        if self.sysroot.is_locked() && !self.telling.load(Ordering::SeqCst) {
            self.asked_while_locked.store(true, Ordering::SeqCst);
        }
        let lock = self.sysroot.lock().await;
        self.telling.store(true, Ordering::SeqCst);
        let (mute, answer) = {
            let faults = self.faults.lock().unwrap();
            (faults.mute, faults.answer.clone())
        };
        if mute {
            self.telling.store(false, Ordering::SeqCst);
            drop(lock);
            return std::future::pending().await;
        }
        let bytes = answer.unwrap_or_else(|| status(&self.sysroot.load()).to_string().into_bytes());
        self.telling.store(false, Ordering::SeqCst);
        drop(lock);
        let _ = stream.write_all(&bytes).await;
    }
}

/// Reports that a switch hangs, also when it is killed in that state.
struct Hanging<'i>(&'i Inner);

impl Drop for Hanging<'_> {
    fn drop(&mut self) {
        self.0.hanging.store(false, Ordering::SeqCst);
    }
}

/// systemd's reading of an instance name for `%I`.
fn unescape(instance: &str) -> String {
    let mut out = Vec::new();
    let bytes = instance.as_bytes();
    let mut index = 0;
    while index < bytes.len() {
        match bytes[index] {
            b'-' => out.push(b'/'),
            b'\\' if bytes.get(index + 1) == Some(&b'x') => {
                let digits = instance.get(index + 2..index + 4).unwrap_or("3f");
                out.push(u8::from_str_radix(digits, 16).unwrap_or(b'?'));
                index += 3;
            }
            byte => out.push(byte),
        }
        index += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn entry(deployment: &Deployment) -> Value {
    let layered = !deployment.requested_packages.is_empty();
    let image = Reference::parse(&deployment.reference).map(|reference| {
        json!({
            "image": {
                "image": reference.name,
                "transport": "registry",
                "signature": if reference.signed { "containerPolicy" } else { "insecure" },
            },
            "version": deployment.version,
            "timestamp": null,
            "imageDigest": deployment.digest,
            "architecture": "amd64",
        })
    });
    json!({
        "image": image.ok().filter(|_| !layered),
        "cachedUpdate": null,
        "incompatible": layered,
        "pinned": deployment.pinned,
        "softRebootCapable": false,
        "downloadOnly": deployment.staged && deployment.locked,
        "store": if layered { Value::Null } else { json!("ostreeContainer") },
        "ostree": {
            "checksum": deployment.checksum,
            "deploySerial": deployment.serial,
            "stateroot": deployment.osname,
        },
        "composefs": null,
    })
}

pub(crate) fn status(deployments: &[Deployment]) -> Value {
    let staged = deployments.iter().find(|deployment| deployment.staged);
    let order: Vec<&Deployment> = deployments.iter().filter(|deployment| !deployment.staged).collect();
    let booted = order.iter().position(|deployment| deployment.booted);
    let queued = booted.is_some_and(|booted| booted > 0);
    let rollback = if queued { Some(0) } else { booted.map(|booted| booted + 1) };
    let others = order.iter().enumerate().filter(|(index, _)| Some(*index) != booted && Some(*index) != rollback);
    let spec = staged.or(booted.map(|index| order[index])).map(entry);
    json!({
        "apiVersion": "org.containers.bootc/v1",
        "kind": "BootcHost",
        "metadata": { "name": "host" },
        "spec": {
            "image": spec.as_ref().and_then(|entry| entry.pointer("/image/image")),
            "bootOrder": if queued { "rollback" } else { "default" },
        },
        "status": {
            "staged": staged.map(entry),
            "booted": booted.map(|index| entry(order[index])),
            "rollback": rollback.and_then(|index| order.get(index)).map(|deployment| entry(deployment)),
            "otherDeployments": others.map(|(_, deployment)| entry(deployment)).collect::<Vec<_>>(),
            "rollbackQueued": queued,
            "type": booted.map(|_| "bootcHost"),
            "usrOverlay": null,
            "readOnly": true,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Bus;
    use crate::machine::Engine;
    use crate::rpmostreed::tests::{Layouts, reference};

    #[test]
    fn instances_are_unescaped() {
        assert_eq!(unescape(r"quay.io-a-b\x2dc\x40sha256:00"), "quay.io/a/b-c@sha256:00");
        assert_eq!(unescape(r"\x2d\x2dapply"), "--apply");
    }

    #[tokio::test]
    async fn pulled_image_is_switched_to_without_the_registry() {
        let dir = tempfile::tempdir().unwrap();
        let layouts = Layouts::new(dir.path());
        let (old, new) = (layouts.image("1", true), layouts.image("2", true));
        let bus = Bus::start(dir.path()).unwrap();
        let events = Events::new();
        let systemd = Systemd::start(&bus, events.clone()).await.unwrap();
        let sysroot = Arc::new(Sysroot::create(&dir.path().join("root"), "default").unwrap());
        let (address, engine) = (bus.address(), layouts.engine());
        let daemon =
            RpmOstreed::new(address, dir.path(), events.clone(), sysroot.clone(), engine.clone(), systemd.clone());
        daemon.install(&engine, &reference(&old), &[]).await.unwrap();
        sysroot.boot(0).unwrap();
        let bootc = Bootc::new(events, sysroot, daemon.clone(), &systemd);
        let escaped = |text: &str| text.replace('-', r"\x2d").replace('/', "-");
        let image = format!("q.io/os/node@{new}");
        bootc.fail_next();
        let unit = format!("{PULL_SIGNED}{}.service", escaped(&image));
        assert_eq!(systemd.activate(&unit).await, Err("exit-code".to_owned()));
        systemd.activate(&unit).await.unwrap();
        assert_eq!(bootc.status()["status"]["staged"], Value::Null);
        daemon.set_engine(Engine { skopeo: "/bin/false".into(), ..engine });
        bootc.human_switch(&image, true).await.unwrap();
        let staged = &bootc.status()["status"]["staged"];
        assert_eq!((&staged["image"]["imageDigest"], &staged["downloadOnly"]), (&json!(new), &json!(false)));
    }
}
