//! A double of the rpm-ostree daemon: [`rpm_ostreed`] over a made-up disk, with the faults that tests ask for.
//!
//! The pull is real: the policy-enforcing skopeo of the [`Engine`] gets the image, and its layers are unpacked into
//! the deployment.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rpm_ostreed::{Daemon, Happened, Host, Job, KernelArguments, OS, Rebase, Request, TRANSACTION, os_path};
pub use rpm_ostreed::{Deployment, NAME, Version};
use tokio::sync::Notify;
use zbus::{Connection, OwnedVariant};

mod pull;
mod sysroot;

pub(crate) use pull::{Image, Reference};
pub use sysroot::Sysroot;

use crate::bus::{self, Answer, Call, Failure, variant};
use crate::events::{Event, Events};
use crate::machine::Engine;
use crate::systemd::Systemd;

const FINALIZER: &str = "ostree-finalize-staged.service";
const UNIT: &str = "rpm-ostreed.service";
/// A text that [`RpmOstreed::crash_at`] and [`RpmOstreed::hang_at`] find right after the unlocking.
pub const UNLOCKED: &str = "Finalized deployment; rebooting into";

type Transaction = rpm_ostreed::Transaction<Double>;

/// The runner of the units that the daemon needs.
enum Units {
    /// The double of systemd, which also runs the daemon.
    Double(Systemd),
    /// The systemd that runs this process as a service.
    Real,
}

impl Units {
    async fn activate(&self, unit: &str) -> Result<(), String> {
        match self {
            Self::Double(systemd) => systemd.activate(unit).await,
            Self::Real => systemctl(&["start", unit]).await,
        }
    }
}

async fn systemctl(arguments: &[&str]) -> Result<(), String> {
    let mut command = tokio::process::Command::new("systemctl");
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

#[derive(Default)]
struct Faults {
    fail: Option<String>,
    fail_all: Option<String>,
    start_delay: Duration,
    no_change: bool,
    hang: Option<String>,
    crash: Option<String>,
    lose_reply: bool,
    exit_on_call: bool,
    /// The number of calls that still crash the daemon.
    crash_on_calls: usize,
    address: Option<String>,
    garbage_reply: bool,
    ignore_cancel: bool,
    cancel_text: Option<String>,
    strangers: bool,
    chatter: u32,
    properties: HashMap<String, OwnedVariant>,
    properties_once: HashMap<String, OwnedVariant>,
    version: Version,
}

/// The host below the daemon.
pub(crate) struct Double {
    address: String,
    dir: PathBuf,
    events: Events,
    sysroot: Arc<Sysroot>,
    engine: Mutex<Engine>,
    units: Units,
    faults: Mutex<Faults>,
    hanging: AtomicBool,
    release: Notify,
    lazy_finalizer: AtomicBool,
    force_close: Mutex<Duration>,
    transactions: AtomicU64,
    /// Ends the foreign transaction that is about to start.
    foreign: Mutex<Option<Arc<Notify>>>,
}

/// The handle to the double.
#[derive(Clone)]
pub struct RpmOstreed {
    daemon: Arc<Daemon<Double>>,
}

impl fmt::Debug for RpmOstreed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RpmOstreed").field("sysroot", &self.double().sysroot).finish_non_exhaustive()
    }
}

/// A foreign transaction, which runs until this ends it.
#[derive(Debug)]
pub struct Foreign {
    end: Arc<Notify>,
}

impl Foreign {
    /// Ends the transaction successfully.
    pub fn finish(self) {
        self.end.notify_one();
    }
}

impl RpmOstreed {
    /// Prepares the daemon; it takes its name when its unit is started or its name is called.
    #[must_use]
    pub fn new(
        address: String,
        dir: &Path,
        events: Events,
        sysroot: Arc<Sysroot>,
        engine: Engine,
        systemd: Systemd,
    ) -> Self {
        let this = Self::with(address, dir, events, sysroot, engine, Units::Double(systemd.clone()));
        let weak = Arc::downgrade(&this.daemon);
        systemd.on_start(UNIT, move || {
            let weak = weak.clone();
            async move {
                match weak.upgrade() {
                    Some(daemon) => start(&daemon).await,
                    None => Err("resources".to_owned()),
                }
            }
        });
        this
    }

    /// The daemon as the main process of a real `rpm-ostreed.service` on a real system bus: that systemd starts the
    /// finalizer, and only root is answered.
    #[must_use]
    pub fn service(address: String, dir: &Path, events: Events, sysroot: Arc<Sysroot>, engine: Engine) -> Self {
        Self::with(address, dir, events, sysroot, engine, Units::Real)
    }

    fn with(address: String, dir: &Path, events: Events, sysroot: Arc<Sysroot>, engine: Engine, units: Units) -> Self {
        let double = Double {
            address,
            dir: dir.to_owned(),
            events,
            sysroot,
            engine: Mutex::new(engine),
            units,
            faults: Mutex::default(),
            hanging: AtomicBool::new(false),
            release: Notify::new(),
            lazy_finalizer: AtomicBool::new(false),
            force_close: Mutex::new(Duration::from_secs(30)),
            transactions: AtomicU64::new(0),
            foreign: Mutex::default(),
        };
        Self { daemon: Arc::new(Daemon::new(double)) }
    }

    fn double(&self) -> &Double {
        &self.daemon.host
    }

    fn faults(&self) -> std::sync::MutexGuard<'_, Faults> {
        self.double().faults.lock().unwrap()
    }

    /// Sets what the daemon can do.
    pub fn set_version(&self, version: Version) {
        self.faults().version = version;
    }

    /// Uses another engine for later pulls.
    pub fn set_engine(&self, engine: Engine) {
        *self.double().engine.lock().unwrap() = engine;
    }

    /// The next started transaction fails with `text`, which may be long.
    pub fn fail_next(&self, text: impl Into<String>) {
        self.faults().fail = Some(text.into());
    }

    /// Every started transaction fails with `text`; `None` ends that.
    pub fn fail_all(&self, text: Option<&str>) {
        self.faults().fail_all = text.map(str::to_owned);
    }

    /// Sets how long the daemon loads the sysroot before it takes its name.
    pub fn set_start_delay(&self, delay: Duration) {
        self.faults().start_delay = delay;
    }

    /// The next started transaction succeeds without doing anything.
    pub fn no_change_next(&self) {
        self.faults().no_change = true;
    }

    /// A running transaction stops at the first message that contains `text`, until [`RpmOstreed::release`].
    pub fn hang_at(&self, text: &str) {
        self.faults().hang = Some(text.to_owned());
    }

    /// Whether a transaction hangs now.
    #[must_use]
    pub fn is_hanging(&self) -> bool {
        self.double().hanging.load(Ordering::SeqCst)
    }

    /// Continues a hanging transaction.
    pub fn release(&self) {
        self.faults().hang = None;
        self.double().release.notify_waiters();
    }

    /// The daemon crashes at the first message of a running transaction that contains `text`.
    pub fn crash_at(&self, text: &str) {
        self.faults().crash = Some(text.to_owned());
    }

    /// The next transaction is created, but its address never reaches the caller.
    pub fn lose_reply(&self) {
        self.faults().lose_reply = true;
    }

    /// Calls that create a transaction are answered with this address; `None` ends that.
    pub fn answer_address(&self, address: Option<&str>) {
        self.faults().address = address.map(str::to_owned);
    }

    /// Whether calls that create a transaction are answered with a number.
    pub fn answer_garbage(&self, garbage: bool) {
        self.faults().garbage_reply = garbage;
    }

    /// Whether `Cancel` has no effect, as on a transaction that can no longer be cancelled.
    pub fn ignore_cancel(&self, ignored: bool) {
        self.faults().ignore_cancel = ignored;
    }

    /// The text of a cancelled transaction, in place of `Operation was cancelled`.
    pub fn say_when_cancelled(&self, text: &str) {
        self.faults().cancel_text = Some(text.to_owned());
    }

    /// Whether all callers count as users that polkit does not know.
    pub fn distrust(&self, strangers: bool) {
        self.faults().strangers = strangers;
    }

    /// The number of messages before `Start` is answered and before a foreign signal.
    pub fn chatter(&self, messages: u32) {
        self.faults().chatter = messages;
    }

    /// Shows another value of a property of the sysroot object.
    pub fn show(&self, property: &str, value: impl Into<zbus::Variant<'static>>) {
        self.faults().properties.insert(property.to_owned(), variant(value));
    }

    /// Shows another value once, as if it had changed right after it was read.
    pub fn show_once(&self, property: &str, value: impl Into<zbus::Variant<'static>>) {
        self.faults().properties_once.insert(property.to_owned(), variant(value));
    }

    /// Crashes the daemon now: clients of a transaction see their socket close, the bus name is lost.
    pub async fn crash(&self) {
        crash(&self.daemon).await;
    }

    /// The daemon exits when idle: the name is released, running calls are lost. Returns `false` during a transaction;
    /// registered clients do not prevent the exit, as when an administrator stops the unit.
    pub async fn idle_exit(&self) -> bool {
        idle_exit(&self.daemon).await
    }

    /// The daemon exits on the next call without answering it: a client's race with the idle exit.
    pub fn idle_exit_on_next_call(&self) {
        self.faults().exit_on_call = true;
    }

    /// The daemon crashes on this many calls without answering them; bus activation restarts it.
    pub fn crash_on_calls(&self, calls: usize) {
        self.faults().crash_on_calls = calls;
    }

    /// Whether the daemon runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.daemon.is_running()
    }

    /// Starts the daemon as its unit does.
    pub async fn start(&self) -> Result<(), String> {
        match &self.double().units {
            Units::Double(systemd) => systemd.activate(UNIT).await,
            Units::Real => start(&self.daemon).await,
        }
    }

    /// The title of the active transaction.
    #[must_use]
    pub fn active_transaction(&self) -> Option<String> {
        self.daemon.active().map(|transaction| transaction.title().to_owned())
    }

    /// The address of the active transaction.
    #[must_use]
    pub fn active_transaction_path(&self) -> Option<String> {
        self.daemon.active().map(|transaction| transaction.address())
    }

    /// Starts a foreign transaction, e.g. `upgrade`, which runs until the handle ends it or a client cancels it.
    pub async fn foreign(&self, title: &str) -> anyhow::Result<Foreign> {
        self.start().await.map_err(anyhow::Error::msg)?;
        let end = Arc::new(Notify::new());
        *self.double().foreign.lock().unwrap() = Some(end.clone());
        let request = Request {
            method: "Upgrade".to_owned(),
            parameters: Vec::new(),
            title: title.to_owned(),
            sender: ":1.9999".to_owned(),
            object: self.os_path(),
            client: "client(id:cli dbus:1.9999 uid:0)".to_owned(),
            job: Job::Upgrade,
        };
        self.daemon.create(request, ()).await?.start();
        Ok(Foreign { end })
    }

    fn os_path(&self) -> String {
        os_path(self.double().sysroot.osname())
    }

    /// `true` reproduces OCPBUGS-51150: the finalizer is not active after staging until it is started explicitly.
    pub fn finalizer_stays_inactive(&self, lazy: bool) {
        self.double().lazy_finalizer.store(lazy, Ordering::SeqCst);
    }

    /// Sets how long a finished transaction waits for its clients to disconnect.
    pub fn set_force_close(&self, after: Duration) {
        *self.double().force_close.lock().unwrap() = after;
    }

    /// Pulls and deploys `reference` outside of the daemon, as an installer does, with `engine`.
    pub async fn install(&self, engine: &Engine, reference: &str, kernel_arguments: &[String]) -> anyhow::Result<()> {
        install(&self.double().sysroot, engine, reference, kernel_arguments).await
    }

    /// Pulls `reference` into the store with this engine, outside of the daemon, as bootc does.
    pub(crate) async fn import(&self, reference: &Reference) -> Result<Image, String> {
        let engine = self.double().engine.lock().unwrap().clone();
        pull::pull(&engine, &self.double().sysroot, reference, None).await
    }

    /// Stages an imported image with the kernel arguments of the booted deployment, as bootc does.
    pub(crate) async fn stage_imported(&self, image: Image) -> Result<(), String> {
        let booted = self.double().sysroot.load().into_iter().find(|deployment| deployment.booted);
        let arguments = booted.map(|booted| booted.kernel_arguments).unwrap_or_default();
        self.double().stage(image, arguments, false).await.map(|_| ())
    }

    /// Pulls and stages `reference` without the daemon, as bootc does: the daemon notices after `Reload`.
    pub async fn stage_behind(&self, reference: &str) -> anyhow::Result<()> {
        let inner = self.double();
        let parsed = Reference::parse(reference).map_err(anyhow::Error::msg)?;
        let engine = inner.engine.lock().unwrap().clone();
        inner.sysroot.set_locked(true);
        let pulled = pull::pull(&engine, &inner.sysroot, &parsed, None).await;
        let arguments = inner.merge_arguments();
        let staged = match pulled {
            Ok(image) => inner.stage(image, arguments, false).await.map(|_| ()),
            Err(error) => Err(error),
        };
        inner.sysroot.set_locked(false);
        staged.map_err(anyhow::Error::msg)
    }

    /// Runs `rpm-ostree rebase` by hand: a transaction of another client, to its end.
    pub async fn human_stage(&self, reference: &str) -> anyhow::Result<()> {
        self.human_rebase(reference, &[]).await
    }

    /// The same with `--lock-finalization`.
    pub async fn human_stage_locked(&self, reference: &str) -> anyhow::Result<()> {
        self.human_rebase(reference, &["lock-finalization"]).await
    }

    /// The same with `--download-only`.
    pub async fn human_download(&self, reference: &str) -> anyhow::Result<()> {
        self.human_rebase(reference, &["download-only"]).await
    }

    /// The same with these options.
    async fn human_rebase(&self, reference: &str, flags: &[&'static str]) -> anyhow::Result<()> {
        let mut options = titled(&format!("rpm-ostree rebase {reference}"));
        options.extend(flags.iter().map(|&flag| (flag, variant(true))));
        self.human("Rebase", &(options, reference, Vec::<&str>::new())).await
    }

    /// Runs `rpm-ostree finalize-deployment CHECKSUM` by hand; a reboot follows.
    pub async fn human_finalize(&self, checksum: &str) -> anyhow::Result<()> {
        let mut options = titled(&format!("rpm-ostree finalize-deployment {checksum}"));
        options.insert("checksum", variant(checksum));
        self.human("FinalizeDeployment", &(options,)).await
    }

    async fn human<B: serde::Serialize + zbus::DynamicType>(&self, method: &str, body: &B) -> anyhow::Result<()> {
        self.start().await.map_err(anyhow::Error::msg)?;
        let connection = bus::connect(&self.double().address).await?;
        let reply = connection.call_method(Some(NAME), self.os_path(), Some(OS), method, body).await?;
        let (address,): (String,) = reply.body().deserialize()?;
        let outcome = run_transaction(&address).await;
        // Until the daemon has noticed that its client left, it refuses the next one.
        while self.active_transaction_path().as_ref() == Some(&address) {
            self.daemon.changed().await;
        }
        outcome
    }
}

fn titled(title: &str) -> HashMap<&'static str, OwnedVariant> {
    HashMap::from([("initiating-command-line", variant(title))])
}

/// Pulls `reference` with `engine` and deploys it as the only deployment of `sysroot`, as an installer does.
pub async fn install(
    sysroot: &Sysroot,
    engine: &Engine,
    reference: &str,
    kernel_arguments: &[String],
) -> anyhow::Result<()> {
    let parsed = Reference::parse(reference).map_err(anyhow::Error::msg)?;
    let image = pull::pull(engine, sysroot, &parsed, None).await.map_err(anyhow::Error::msg)?;
    sysroot.install(&image, kernel_arguments)?;
    Ok(())
}

async fn run_transaction(address: &str) -> anyhow::Result<()> {
    rpm_ostreed::follow(address, |_| {}).await.map_err(anyhow::Error::msg)
}

/// Takes the name.
async fn start(daemon: &Arc<Daemon<Double>>) -> Result<(), String> {
    if daemon.is_running() {
        return Ok(());
    }
    let delay = daemon.host.faults.lock().unwrap().start_delay;
    tokio::time::sleep(delay).await;
    // The exit was requested again meanwhile.
    if daemon.is_running() {
        return Ok(());
    }
    let failed = |_| "exit-code".to_owned();
    let connection = bus::connect(&daemon.host.address).await.map_err(failed)?;
    daemon.start(connection).await.map_err(failed)
}

async fn crash(daemon: &Arc<Daemon<Double>>) {
    if let Units::Double(systemd) = &daemon.host.units {
        systemd.fail(UNIT, "signal");
    }
    daemon.stop().await;
}

async fn idle_exit(daemon: &Arc<Daemon<Double>>) -> bool {
    if daemon.active().is_some() {
        return false;
    }
    if let Units::Double(systemd) = &daemon.host.units {
        systemd.set(UNIT, "inactive", "dead");
    }
    daemon.stop().await;
    true
}

impl Host for Double {
    type Lock = ();

    async fn load(&self) -> Vec<Deployment> {
        self.sysroot.load()
    }

    async fn lock(&self) -> Result<(), Failure> {
        if self.sysroot.is_locked() { Err(rpm_ostreed::sysroot_is_locked()) } else { Ok(()) }
    }

    async fn work(&self, transaction: &Arc<Transaction>, (): ()) -> Result<(), String> {
        tokio::select! {
            biased;
            text = transaction.cancelled() => Err(text),
            outcome = self.execute(transaction) => outcome,
        }
    }

    async fn reboot(&self) {
        if matches!(self.units, Units::Real) {
            let _ = systemctl(&["reboot"]).await;
            return;
        }
        let Ok(connection) = bus::connect(&self.address).await else { return };
        let (name, manager) = ("org.freedesktop.login1", "org.freedesktop.login1.Manager");
        let _ = connection.call_method(Some(name), "/org/freedesktop/login1", Some(manager), "Reboot", &(false,)).await;
    }

    fn socket(&self) -> PathBuf {
        // Sockets of dead daemons remain; each transaction gets its own path.
        let number = self.transactions.fetch_add(1, Ordering::SeqCst);
        self.dir.join(format!("rpm-ostree-transaction-{number}.sock"))
    }

    fn hear(&self, happened: Happened<'_>) {
        self.events.emit(match happened {
            Happened::Requested(job) => requested(job),
            Happened::Started(request) => Event::TransactionStarted { title: request.title.clone() },
            Happened::Said(text) => Event::TransactionMessage(text.to_owned()),
            Happened::Finished(request, error) => {
                Event::TransactionFinished { title: request.title.clone(), error: error.map(str::to_owned) }
            }
            Happened::Logged(_) => return,
        });
    }

    /// Applies the faults that belong to a text.
    async fn disturb(&self, daemon: &Arc<Daemon<Self>>, text: &str) {
        // Created first, so that no later release is missed.
        let released = self.release.notified();
        let (hangs, crashes) = {
            let mut faults = self.faults.lock().unwrap();
            let crashes = faults.crash.take_if(|wanted| text.contains(wanted.as_str())).is_some();
            (faults.hang.take_if(|wanted| text.contains(wanted.as_str())).is_some(), crashes)
        };
        if !self.has_power() {
            std::future::pending::<()>().await;
        }
        if crashes {
            let daemon = daemon.clone();
            tokio::spawn(async move { crash(&daemon).await });
            std::future::pending::<()>().await;
        }
        if hangs {
            self.hanging.store(true, Ordering::SeqCst);
            let guard = HangGuard(&self.hanging);
            released.await;
            drop(guard);
        }
    }

    fn cancel(&self) -> Option<String> {
        let faults = self.faults.lock().unwrap();
        let text = faults.cancel_text.clone().unwrap_or_else(|| "Operation was cancelled".to_owned());
        Some(text).filter(|_| !faults.ignore_cancel)
    }

    async fn chatter(&self, client: &Connection) -> zbus::Result<()> {
        let messages = self.faults.lock().unwrap().chatter;
        for number in 0..messages {
            let text = format!("message {number}");
            client.emit_signal(None::<&str>, "/", TRANSACTION, "Message", &(text,)).await?;
        }
        if messages > 0 {
            client.emit_signal(None::<&str>, "/", "org.example.Stranger", "Finished", &(true, "")).await?;
        }
        Ok(())
    }

    /// Root is the user that runs the daemon.
    fn trusts(&self, member: &str, uid: u32) -> bool {
        if matches!(self.units, Units::Real) {
            println!("{member} is called by uid {uid}");
        }
        uid == nix::unistd::getuid().as_raw() && !self.faults.lock().unwrap().strangers
    }

    fn version(&self) -> Version {
        self.faults.lock().unwrap().version
    }

    fn hand_out(&self, call: &Call, address: String) -> Answer {
        let (lost, garbage, other) = {
            let mut faults = self.faults.lock().unwrap();
            (std::mem::take(&mut faults.lose_reply), faults.garbage_reply, faults.address.clone())
        };
        match (lost, garbage) {
            (true, _) => Ok(None),
            (false, true) => call.reply(&(7_u32,)),
            (false, false) => call.reply(&(other.unwrap_or(address),)),
        }
    }

    fn amend(&self, properties: &mut [(&'static str, OwnedVariant)]) {
        let mut faults = self.faults.lock().unwrap();
        for (name, value) in properties {
            let once = faults.properties_once.remove(*name);
            if let Some(other) = once.or_else(|| faults.properties.get(*name).cloned()) {
                *value = other;
            }
        }
    }

    fn patience(&self) -> Duration {
        *self.force_close.lock().unwrap()
    }

    fn has_power(&self) -> bool {
        self.sysroot.is_powered()
    }

    async fn leaves(&self, daemon: &Arc<Daemon<Self>>) -> bool {
        let (exits, crashes) = {
            let mut faults = self.faults.lock().unwrap();
            let crashes = faults.crash_on_calls > 0;
            faults.crash_on_calls = faults.crash_on_calls.saturating_sub(1);
            (std::mem::take(&mut faults.exit_on_call), crashes)
        };
        if crashes {
            // A unit that dies during its start would count as running.
            while let Units::Double(systemd) = &self.units
                && systemd.unit(UNIT).is_some_and(|unit| unit.active == "activating")
            {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            crash(daemon).await;
            return true;
        }
        exits && idle_exit(daemon).await
    }
}

fn requested(job: &Job) -> Event {
    let (method, argument) = match job {
        Job::Rebase(rebase) => ("rebase", rebase.reference.clone()),
        Job::Cleanup(kinds) => ("cleanup", kinds.join(",")),
        Job::KernelArguments(KernelArguments { last: Some(last), .. }) => ("kernel-args", format!("=[{last}]")),
        Job::KernelArguments(changes) => {
            let [added, replaced, removed] =
                [&changes.added, &changes.replaced, &changes.removed].map(|list| list.join(" "));
            ("kernel-args", format!("+[{added}] ~[{replaced}] -[{removed}]"))
        }
        Job::Rollback => ("rollback", String::new()),
        Job::Upgrade => ("upgrade", String::new()),
        Job::Finalize(finalize) => ("finalize-deployment", finalize.checksum.clone().unwrap_or_default()),
    };
    Event::TransactionRequested { method: method.to_owned(), argument }
}

impl Double {
    async fn execute(&self, transaction: &Arc<Transaction>) -> Result<(), String> {
        let foreign = self.foreign.lock().unwrap().take();
        if let Some(end) = foreign {
            end.notified().await;
            return Ok(());
        }
        let (fail, no_change) = {
            let mut faults = self.faults.lock().unwrap();
            let fail = faults.fail.take().or_else(|| faults.fail_all.clone());
            (fail, std::mem::take(&mut faults.no_change))
        };
        if let Some(text) = fail {
            return Err(text);
        }
        if no_change {
            transaction.message("No change.").await;
            return Ok(());
        }
        match transaction.job() {
            Job::Rebase(rebase) => self.rebase(transaction, rebase).await,
            Job::Cleanup(kinds) => self.cleanup(transaction, kinds).await,
            Job::KernelArguments(changes) => {
                let Some(mut arguments) = edit_arguments(changes)? else {
                    transaction.message("No changes.").await;
                    return Ok(());
                };
                // libostree inserts the right value when it writes the boot entry.
                arguments.retain(|word| !word.starts_with("ostree="));
                let first = self.sysroot.load().into_iter().next().ok_or("No deployments found")?;
                let image = Image::stored(&self.sysroot, &first.reference)?;
                self.deploy(transaction, image, arguments, changes.locked).await
            }
            Job::Rollback => {
                transaction.message("Moving the rollback deployment to be first in boot order").await;
                self.sysroot.roll_back().map_err(|error| error.to_string())
            }
            Job::Upgrade => {
                transaction.message("No upgrade available.").await;
                Ok(())
            }
            Job::Finalize(_) => {
                let unlocked = self.sysroot.unlock().map_err(|error| format!("{error:#}"))?;
                self.events.emit(Event::Unlocked { reference: unlocked.reference });
                Ok(())
            }
        }
    }

    /// Kernel arguments of the deployment that a new one is based on: the first in boot order.
    fn merge_arguments(&self) -> Vec<String> {
        self.sysroot.load().into_iter().next().map(|first| first.kernel_arguments).unwrap_or_default()
    }

    async fn rebase(&self, transaction: &Arc<Transaction>, rebase: &Rebase) -> Result<(), String> {
        let deployments = self.sysroot.load();
        let parsed = Reference::parse(&rebase.reference)?;
        if deployments.iter().any(|deployment| deployment.booted && !deployment.requested_packages.is_empty()) {
            return Err("Updating rpm-md repo 'updates': cannot update repo 'updates': Cannot download repomd.xml: \
                        Cannot download repodata/repomd.xml: All mirrors were tried"
                .to_owned());
        }
        let engine = self.engine.lock().unwrap().clone();
        let image = pull::pull(&engine, &self.sysroot, &parsed, Some(transaction)).await?;
        if rebase.download_only {
            let changes = deployments.first().is_none_or(|first| first.digest != image.digest);
            transaction.message(if changes { "Update downloaded." } else { "No changes." }).await;
            return Ok(());
        }
        let arguments = self.merge_arguments();
        self.deploy(transaction, image, arguments, rebase.locked).await
    }

    async fn deploy(
        &self,
        transaction: &Arc<Transaction>,
        image: Image,
        arguments: Vec<String>,
        locked: bool,
    ) -> Result<(), String> {
        transaction.task_begin("Staging deployment").await;
        transaction.percent("Checking out tree", 100).await;
        self.stage(image, arguments, locked).await?;
        transaction.task_end("done").await;
        self.prune(transaction).await
    }

    /// Stages an image, reports it, and has systemd start the finalizer.
    async fn stage(&self, image: Image, arguments: Vec<String>, locked: bool) -> Result<Deployment, String> {
        let sysroot = self.sysroot.clone();
        let staged = tokio::task::spawn_blocking(move || sysroot.stage(&image, &arguments, locked))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("{error:#}"))?;
        self.events.emit(Event::Staged { reference: staged.reference.clone(), checksum: staged.checksum.clone() });
        if !self.lazy_finalizer.load(Ordering::SeqCst) {
            self.units.activate(FINALIZER).await.map_err(|result| format!("{FINALIZER}: {result}"))?;
        }
        Ok(staged)
    }

    async fn cleanup(&self, transaction: &Arc<Transaction>, kinds: &[String]) -> Result<(), String> {
        let mut changed = false;
        for kind in kinds {
            let done = match kind.as_str() {
                "pending-deploy" => self.sysroot.drop_pending(),
                "rollback-deploy" => self.sysroot.drop_rollback(),
                _ => Ok(false),
            };
            changed |= done.map_err(|error| format!("{error:#}"))?;
        }
        if !changed {
            transaction.message("Deployments unchanged.").await;
            return Ok(());
        }
        self.prune(transaction).await
    }

    async fn prune(&self, transaction: &Arc<Transaction>) -> Result<(), String> {
        let pruned = self.sysroot.prune_images().map_err(|error| error.to_string())?;
        if pruned > 0 {
            transaction.message(&format!("Pruned images: {pruned} (layers: {pruned})")).await;
        }
        Ok(())
    }
}

struct HangGuard<'a>(&'a AtomicBool);

impl Drop for HangGuard<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl RpmOstreed {
    /// The daemon ends with the machine.
    pub(crate) async fn power_off(&self) {
        self.daemon.stop().await;
        self.double().sysroot.set_locked(false);
    }
}

/// Splits at blanks outside quotes, as libostree does.
fn split_arguments(text: &str) -> Vec<String> {
    let mut quoted = false;
    let words = text.split(|c: char| {
        quoted ^= c == '"';
        c == ' ' && !quoted
    });
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn key_and_value(word: &str) -> (&str, Option<&str>) {
    word.split_once('=').map_or((word, None), |(key, value)| (key, Some(value)))
}

/// rpm-ostreed's `kernel_arg_transaction_execute` with libostree's `ostree_kernel_args_delete` and `_new_replace`: the
/// client names the existing arguments, deleting comes before replacing and appending, and of equal arguments the first
/// is deleted. `None` without a change.
fn edit_arguments(changes: &KernelArguments) -> Result<Option<Vec<String>>, String> {
    let existing = &changes.existing;
    if let Some(last) = &changes.last {
        return Ok((last != existing).then(|| split_arguments(last)));
    }
    let mut words = split_arguments(existing);
    let removed =
        changes.removed.iter().flat_map(|given| split_arguments(given).into_iter().map(move |word| (given, word)));
    for (given, argument) in removed {
        let (key, value) = key_and_value(&argument);
        let same_key: Vec<usize> = (0..words.len()).filter(|&at| key_and_value(&words[at]).0 == key).collect();
        let at = match same_key[..] {
            [] => return Err(format!("No key '{key}' found")),
            [only] if value.is_none_or(|_| words[only] == argument) => only,
            [_] => return Err(format!("No karg '{argument}' found")),
            _ => match same_key.into_iter().find(|&at| words[at] == argument) {
                Some(at) => at,
                None if value.is_none() => return Err(format!("Multiple values for key '{given}' found")),
                None => return Err(format!("No karg '{given}' found")),
            },
        };
        words.remove(at);
    }
    for argument in changes.replaced.iter().flat_map(|argument| split_arguments(argument)) {
        let (key, value) = key_and_value(&argument);
        let same_key: Vec<usize> = (0..words.len()).filter(|&at| key_and_value(&words[at]).0 == key).collect();
        let (at, new) = match (value.and_then(|value| value.split_once('=')), &same_key[..]) {
            (_, []) => return Err(format!("No key '{key}' found")),
            (Some((old, new)), all) => {
                let old = format!("{key}={old}");
                let at = all.iter().find(|&&at| words[at] == old).ok_or_else(|| format!("No karg '{old}' found"))?;
                (*at, format!("{key}={new}"))
            }
            (None, [only]) => (*only, argument.clone()),
            (None, _) => return Err(format!("Multiple values for key '{key}' found")),
        };
        words[at] = new;
    }
    words.extend(changes.added.iter().flat_map(|argument| split_arguments(argument)));
    let nothing = changes.added.is_empty() && changes.replaced.is_empty() && changes.removed.is_empty();
    Ok((!nothing).then_some(words))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use std::collections::BTreeMap;

    use rpm_ostreed::{BUSY, SYSROOT, SYSROOT_PATH};
    use zbus::MessageStream;

    use super::*;
    use crate::bus::{Bus, Dict, lookup_bool, lookup_str};

    /// Images in OCI layouts, and a script in place of skopeo that serves them.
    pub(crate) struct Layouts {
        dir: PathBuf,
    }

    fn write_blob(layout: &Path, content: &[u8]) -> (String, usize) {
        let digest = sysroot::sha256_hex(content);
        let dir = layout.join("blobs/sha256");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(&digest), content).unwrap();
        (format!("sha256:{digest}"), content.len())
    }

    impl Layouts {
        pub(crate) fn new(dir: &Path) -> Self {
            std::fs::create_dir_all(dir.join("layouts")).unwrap();
            Self { dir: dir.to_owned() }
        }

        /// Adds an image with one file; returns its digest.
        pub(crate) fn image(&self, version: &str, bootable: bool) -> String {
            let layout = self.dir.join("building");
            let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
            for (path, content) in [("etc/version", version), ("usr/lib/version", version)] {
                let mut header = tar::Header::new_gnu();
                header.set_size(content.len() as u64);
                header.set_mode(0o644);
                archive.append_data(&mut header, path, content.as_bytes()).unwrap();
            }
            let layer = archive.into_inner().unwrap().finish().unwrap();
            let (layer, layer_size) = write_blob(&layout, &layer);
            let architecture = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
            let mut labels = serde_json::json!({ "org.opencontainers.image.version": version });
            if bootable {
                labels["ostree.bootable"] = "true".into();
            }
            let config = serde_json::json!({
                "architecture": architecture,
                "os": "linux",
                "created": "2026-01-01T00:00:00Z",
                "config": { "Labels": labels },
            });
            let (config, config_size) = write_blob(&layout, config.to_string().as_bytes());
            let manifest = serde_json::json!({
                "schemaVersion": 2,
                "config": { "digest": config, "size": config_size },
                "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": layer, "size": layer_size }],
            });
            let (manifest, _) = write_blob(&layout, manifest.to_string().as_bytes());
            let index = serde_json::json!({ "schemaVersion": 2, "manifests": [{ "digest": manifest }] });
            std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
            std::fs::rename(&layout, self.dir.join("layouts").join(&manifest)).unwrap();
            manifest
        }

        pub(crate) fn engine(&self) -> Engine {
            use std::os::unix::fs::PermissionsExt as _;
            let skopeo = self.dir.join("skopeo");
            let script = format!(
                "#!/bin/sh\nfor last; do from=\"$to\"; to=\"$last\"; done\nto=\"${{to#oci:}}\"; to=\"${{to%:x}}\"\n\
                 layout=\"{}/${{from#*@}}\"\n[ -d \"$layout\" ] || {{ echo 'time=\"x\" level=fatal msg=\"reading manifest in \
                 q.io: manifest unknown\"' >&2; exit 1; }}\ncp -r \"$layout\" \"$to\"\n",
                self.dir.join("layouts").display()
            );
            std::fs::write(&skopeo, script).unwrap();
            std::fs::set_permissions(&skopeo, std::fs::Permissions::from_mode(0o755)).unwrap();
            let policy = self.dir.join("policy.json");
            std::fs::write(&policy, r#"{"default":[{"type":"reject"}]}"#).unwrap();
            Engine { skopeo, policy, registries_d: self.dir.clone(), cert_dir: self.dir.clone() }
        }
    }

    pub(crate) fn reference(digest: &str) -> String {
        format!("ostree-image-signed:docker://q.io/os/node@{digest}")
    }

    struct Host {
        _dir: tempfile::TempDir,
        bus: Bus,
        systemd: Systemd,
        daemon: RpmOstreed,
        layouts: Layouts,
        events: tokio::sync::broadcast::Receiver<Event>,
        booted: String,
    }

    impl Host {
        async fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let layouts = Layouts::new(dir.path());
            let booted = layouts.image("1", true);
            let bus = Bus::start(dir.path()).unwrap();
            bus.activatable(NAME, UNIT).unwrap();
            bus.reload().await.unwrap();
            let events = Events::new();
            let receiver = events.subscribe();
            let systemd = Systemd::start(&bus, events.clone()).await.unwrap();
            let sysroot = Arc::new(Sysroot::create(&dir.path().join("root"), "fedora-coreos").unwrap());
            let engine = layouts.engine();
            let daemon =
                RpmOstreed::new(bus.address(), dir.path(), events, sysroot.clone(), engine.clone(), systemd.clone());
            let arguments = ["rw".to_owned(), "quiet".to_owned()];
            daemon.install(&engine, &reference(&booted), &arguments).await.unwrap();
            sysroot.boot(0).unwrap();
            Self { _dir: dir, bus, systemd, daemon, layouts, events: receiver, booted }
        }

        fn load(&self) -> Vec<Deployment> {
            self.daemon.double().sysroot.load()
        }
    }

    async fn get(client: &Connection, path: &str, interface: &str, name: &str) -> zbus::Result<OwnedVariant> {
        let reply = client
            .call_method(Some(NAME), path, Some("org.freedesktop.DBus.Properties"), "Get", &(interface, name))
            .await?;
        let (value,): (OwnedVariant,) = reply.body().deserialize()?;
        Ok(value)
    }

    const OS_PATH: &str = "/org/projectatomic/rpmostree1/fedora_coreos";

    async fn rebase_titled(client: &Connection, reference: &str, title: &str) -> zbus::Result<String> {
        // Sorted: two spellings of a dictionary are different requests.
        let options: BTreeMap<&str, OwnedVariant> = BTreeMap::from([
            ("initiating-command-line", variant(title)),
            // A value of the wrong type is ignored.
            ("download-only", variant("true")),
        ]);
        let none: Vec<&str> = Vec::new();
        let reply = client.call_method(Some(NAME), OS_PATH, Some(OS), "Rebase", &(options, reference, none)).await?;
        let (address,): (String,) = reply.body().deserialize()?;
        Ok(address)
    }

    async fn rebase(client: &Connection, reference: &str) -> zbus::Result<String> {
        rebase_titled(client, reference, "test").await
    }

    async fn peer(address: &str) -> (Connection, MessageStream) {
        let peer = zbus::connection::Builder::address(address).p2p().build().await.unwrap();
        let stream = MessageStream::from(&peer);
        (peer, stream)
    }

    async fn start(peer: &Connection) -> bool {
        let reply = peer.call_method(None::<&str>, "/", Some(TRANSACTION), "Start", &()).await.unwrap();
        reply.body().deserialize::<(bool,)>().unwrap().0
    }

    async fn finished(stream: &mut MessageStream) -> Option<(bool, String)> {
        tokio::time::timeout(Duration::from_secs(10), async {
            while let Some(Ok(message)) = bus::next(stream).await {
                if message.header().member().is_some_and(|member| member.as_str() == "Finished") {
                    return Some(message.body().deserialize().unwrap());
                }
            }
            None
        })
        .await
        .unwrap()
    }

    async fn until(what: &str, mut condition: impl FnMut() -> bool) {
        for _ in 0..1000 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("never: {what}");
    }

    #[tokio::test]
    async fn rebase_stages_a_deployment() {
        let mut host = Host::new().await;
        let target = host.layouts.image("2", true);
        let client = host.bus.connect().await;
        // systemd activates the daemon.
        let booted = get(&client, SYSROOT_PATH, SYSROOT, "Booted").await.unwrap();
        assert_eq!(zbus::OwnedObjectPath::try_from(booted).unwrap().as_str(), OS_PATH);
        assert_eq!(host.systemd.unit(UNIT).unwrap().active, "active");
        let address = rebase(&client, &reference(&target)).await.unwrap();
        let (peer, mut stream) = peer(&address).await;
        assert!(start(&peer).await);
        assert_eq!(finished(&mut stream).await.unwrap(), (true, String::new()));
        assert_eq!(
            host.daemon.active_transaction().as_deref(),
            Some("test"),
            "the transaction is active until the client leaves"
        );
        peer.close().await.unwrap();
        until("idle", || host.daemon.active_transaction().is_none()).await;
        let list = get(&client, SYSROOT_PATH, SYSROOT, "Deployments").await.unwrap();
        assert_eq!(list.value_signature().to_string(), "aa{sv}");
        let list: Vec<Dict> = list.try_into().unwrap();
        assert_eq!(list.len(), 2);
        assert_eq!(lookup_bool(&list[0], "staged"), Some(true));
        assert_eq!(lookup_str(&list[0], "container-image-reference-digest").unwrap(), target);
        assert_eq!(lookup_str(&list[1], "container-image-reference-digest").unwrap(), host.booted);
        assert_eq!(lookup_bool(&list[1], "booted"), Some(true));
        let meta: Dict = list[0]["base-commit-meta"].clone().try_into().unwrap();
        assert_eq!(lookup_str(&meta, "ostree.manifest-digest").unwrap(), target);
        assert_eq!(host.systemd.unit(FINALIZER).unwrap().active, "active");
        let staged = &host.load()[0];
        assert_eq!(staged.kernel_arguments, ["rw", "quiet"]);
        let tree = host.daemon.double().sysroot.tree(staged);
        assert_eq!(std::fs::read_to_string(tree.join("usr/etc/version")).unwrap(), "2");
        let mut seen = Vec::new();
        while let Ok(event) = host.events.try_recv() {
            seen.push(event);
        }
        let position = |wanted: fn(&Event) -> bool| seen.iter().position(wanted).unwrap();
        assert!(
            position(|event| matches!(event, Event::Staged { .. }))
                < position(|event| matches!(event, Event::TransactionFinished { .. }))
        );
    }

    #[tokio::test]
    async fn interfaces_are_typed_like_the_original() {
        let host = Host::new().await;
        let client = host.bus.connect().await;
        host.daemon.start().await.unwrap();
        for (path, wanted) in [
            (
                SYSROOT_PATH,
                &[
                    r#"<property name="ActiveTransaction" type="(sss)" access="read"/>"#,
                    r#"<property name="ActiveTransactionPath" type="s" access="read"/>"#,
                    r#"<property name="Booted" type="o" access="read"/>"#,
                    r#"<property name="Deployments" type="aa{sv}" access="read"/>"#,
                    r#"<method name="RegisterClient"><arg name="options" type="a{sv}" direction="in"/></method>"#,
                ][..],
            ),
            (
                OS_PATH,
                &[
                    r#"<property name="BootedDeployment" type="a{sv}" access="read"/>"#,
                    r#"<property name="RollbackDeployment" type="a{sv}" access="read"/>"#,
                    r#"<method name="Rebase"><arg name="options" type="a{sv}" direction="in"/><arg name="refspec" type="s""#,
                ][..],
            ),
        ] {
            let reply = client
                .call_method(Some(NAME), path, Some("org.freedesktop.DBus.Introspectable"), "Introspect", &())
                .await
                .unwrap();
            let (xml,): (String,) = reply.body().deserialize().unwrap();
            for line in wanted {
                assert!(xml.contains(line), "{line} is not in {xml}");
            }
        }
    }

    #[tokio::test]
    async fn rebase_to_equal_references_and_bad_images_fails() {
        let host = Host::new().await;
        let client = host.bus.connect().await;
        let unbootable = host.layouts.image("3", false);
        for (reference, text) in [
            (reference(&host.booted), "Old and new refs are equal: ostree-image-signed:docker://q.io/os/node@"),
            (reference(&format!("sha256:{}", "0".repeat(64))), "OpenImage: reading manifest in q.io: manifest unknown"),
            (reference(&unbootable), "does not have ostree.bootable label"),
        ] {
            let address = rebase(&client, &reference).await.unwrap();
            let (peer, mut stream) = peer(&address).await;
            start(&peer).await;
            let (success, error) = finished(&mut stream).await.unwrap();
            assert!(!success && error.contains(text), "{error}");
            peer.close().await.unwrap();
            until("idle", || host.daemon.active_transaction().is_none()).await;
        }
        assert_eq!(host.load().len(), 1);
    }

    #[tokio::test]
    async fn identical_request_joins_and_another_is_refused_as_busy() {
        let host = Host::new().await;
        let target = host.layouts.image("2", true);
        let (one, two) = (host.bus.connect().await, host.bus.connect().await);
        let address = rebase(&one, &reference(&target)).await.unwrap();
        assert_eq!(rebase(&two, &reference(&target)).await.unwrap(), address);
        let busy = async |title: &str| {
            let error = rebase_titled(&two, &reference(&target), "other").await.unwrap_err();
            let zbus::Error::MethodError(name, text, _) = error else { panic!("{error}") };
            assert_eq!(name.as_str(), BUSY);
            let hint = "You can cancel the current transaction with `rpm-ostree cancel`";
            assert_eq!(text.unwrap(), format!("Transaction in progress: {title}\n {hint}"));
        };
        // A deploying transaction gets its title when it starts.
        busy("new-deployment").await;
        // A client that attaches late gets the end again.
        host.daemon.hang_at("Importing");
        let (first, mut first_stream) = peer(&address).await;
        let (second, mut second_stream) = peer(&address).await;
        assert!(start(&first).await);
        busy("test").await;
        assert!(!start(&second).await);
        until("hanging", || host.daemon.is_hanging()).await;
        host.daemon.release();
        assert!(finished(&mut first_stream).await.unwrap().0);
        assert!(finished(&mut second_stream).await.unwrap().0);
        let (late, mut late_stream) = peer(&address).await;
        assert!(!start(&late).await);
        assert!(finished(&mut late_stream).await.unwrap().0);
    }

    #[tokio::test]
    async fn cancel_and_force_close_end_a_transaction() {
        let host = Host::new().await;
        host.daemon.set_force_close(Duration::from_millis(100));
        let target = host.layouts.image("2", true);
        let client = host.bus.connect().await;
        host.daemon.hang_at("Importing");
        let address = rebase(&client, &reference(&target)).await.unwrap();
        let (peer, mut stream) = peer(&address).await;
        start(&peer).await;
        until("hanging", || host.daemon.is_hanging()).await;
        peer.call_method(None::<&str>, "/", Some(TRANSACTION), "Cancel", &()).await.unwrap();
        assert_eq!(finished(&mut stream).await.unwrap(), (false, "Operation was cancelled".to_owned()));
        peer.closed().await;
        until("idle", || host.daemon.active_transaction().is_none()).await;
        assert_eq!(host.load().len(), 1);
    }

    #[tokio::test]
    async fn client_that_disconnects_before_start_cancels_its_transaction() {
        let host = Host::new().await;
        let target = host.layouts.image("2", true);
        let client = host.bus.connect().await;
        rebase(&client, &reference(&target)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(host.daemon.active_transaction().is_some(), "a transaction that is never started stays active");
        let (_peer, mut stream) = peer(&host.daemon.active_transaction_path().unwrap()).await;
        client.close().await.unwrap();
        assert_eq!(finished(&mut stream).await, None, "the transaction ends without a signal");
        until("idle", || host.daemon.active_transaction().is_none()).await;
    }

    #[tokio::test]
    async fn only_root_may_change_the_host() {
        let host = Host::new().await;
        let client = host.bus.connect().await;
        host.daemon.start().await.unwrap();
        host.daemon.distrust(true);
        let sysroot = async |method: &str| {
            let options: HashMap<&str, OwnedVariant> = HashMap::new();
            let called = match method {
                "Reload" => client.call_method(Some(NAME), SYSROOT_PATH, Some(SYSROOT), method, &()).await,
                _ => client.call_method(Some(NAME), SYSROOT_PATH, Some(SYSROOT), method, &(options,)).await,
            };
            called.map(drop).map_err(|error| error.to_string())
        };
        sysroot("Reload").await.unwrap();
        get(&client, SYSROOT_PATH, SYSROOT, "Deployments").await.unwrap();
        let error = sysroot("RegisterClient").await.unwrap_err();
        assert!(error.contains("rpmostreed Sysroot operation RegisterClient not allowed for user"), "{error}");
        let error = rebase(&client, &reference(&host.booted)).await.unwrap_err().to_string();
        assert!(error.contains("AccessDenied: rpmostreed OS operation Rebase not allowed for user"), "{error}");
    }

    #[tokio::test]
    async fn crashed_daemon_disconnects_clients_and_is_activated_again() {
        let host = Host::new().await;
        let target = host.layouts.image("2", true);
        let client = host.bus.connect().await;
        host.daemon.crash_at("Importing");
        let address = rebase(&client, &reference(&target)).await.unwrap();
        let (peer, mut stream) = peer(&address).await;
        start(&peer).await;
        assert_eq!(finished(&mut stream).await, None);
        until("failed", || host.systemd.unit(UNIT).unwrap().active == "failed").await;
        until("gone", || !host.daemon.is_running()).await;
        get(&client, SYSROOT_PATH, SYSROOT, "Path").await.unwrap();
        assert!(host.daemon.idle_exit().await);
        host.daemon.start().await.unwrap();
        host.daemon.idle_exit_on_next_call();
        let error = get(&client, SYSROOT_PATH, SYSROOT, "Path").await.unwrap_err();
        assert!(
            matches!(&error, zbus::Error::FDO(error) if matches!(**error, zbus::fdo::Error::NoReply(_))),
            "{error}"
        );
        run_transaction(&rebase(&client, &reference(&target)).await.unwrap()).await.unwrap();
        assert!(host.load()[0].staged);
    }

    #[tokio::test]
    async fn foreign_transactions_lost_replies_and_layered_packages_are_simulated() {
        let host = Host::new().await;
        let target = host.layouts.image("2", true);
        let client = host.bus.connect().await;
        let foreign = host.daemon.foreign("upgrade").await.unwrap();
        let error = rebase(&client, &reference(&target)).await.unwrap_err().to_string();
        assert!(error.contains("Transaction in progress: upgrade"), "{error}");
        foreign.finish();
        until("idle", || host.daemon.active_transaction().is_none()).await;
        host.daemon.lose_reply();
        let lost = tokio::time::timeout(Duration::from_millis(100), rebase(&client, &reference(&target))).await;
        assert!(lost.is_err());
        run_transaction(&host.daemon.active_transaction_path().unwrap()).await.unwrap();
        until("idle", || host.daemon.active_transaction().is_none()).await;
        host.daemon.double().sysroot.drop_staged().unwrap();
        host.daemon.double().sysroot.layer_packages(&["vim"]).unwrap();
        let list: Vec<Dict> = {
            client.call_method(Some(NAME), SYSROOT_PATH, Some(SYSROOT), "Reload", &()).await.unwrap();
            get(&client, SYSROOT_PATH, SYSROOT, "Deployments").await.unwrap().try_into().unwrap()
        };
        assert_eq!(Vec::<String>::try_from(list[0]["requested-packages"].clone()).unwrap(), ["vim"]);
    }

    #[test]
    fn kernel_arguments_are_edited_as_libostree_does() {
        let edit = |existing: &str, removed: &[&str], replaced: &[&str], added: &[&str]| {
            let list = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
            let (added, replaced, removed) = (list(added), list(replaced), list(removed));
            let existing = existing.to_owned();
            let changes = KernelArguments { existing, added, replaced, removed, last: None, locked: false };
            edit_arguments(&changes).map(|words| words.map(|words| words.join(" ")))
        };
        let ok = |text: &str| Ok(Some(text.to_owned()));
        assert_eq!(edit("a b", &[], &[], &[]), Ok(None));
        assert_eq!(edit("a=1 b a=1", &["a=1"], &[], &["a=1"]), ok("b a=1 a=1"));
        assert_eq!(edit("a=1 b", &["a"], &[], &[]), ok("b"));
        assert_eq!(edit("a=1 a a=2", &["a"], &[], &[]), ok("a=1 a=2"));
        assert_eq!(edit("x=\"p q\" b", &["x=\"p q\""], &[], &["y=\"r s\" z"]), ok("b y=\"r s\" z"));
        assert_eq!(edit("a=1 a=2", &[], &["a=1=3"], &[]), ok("a=3 a=2"));
        assert_eq!(edit("a=1", &[], &["a=4"], &[]), ok("a=4"));
        for (existing, removed, replaced, why) in [
            ("a=1 a=2", "a", "", "Multiple values for key 'a' found"),
            ("a=1", "a=2", "", "No karg 'a=2' found"),
            ("b", "a", "", "No key 'a' found"),
            ("a=1 a=2", "", "a=3", "Multiple values for key 'a' found"),
        ] {
            assert_eq!(edit(existing, &[removed], &[replaced], &[]).unwrap_err(), why, "{existing}");
        }
    }

    #[tokio::test]
    async fn kernel_arguments_are_set_and_cleanup_drops_the_stage() {
        let host = Host::new().await;
        let client = host.bus.connect().await;
        let options: HashMap<&str, OwnedVariant> = HashMap::new();
        let reply = client
            .call_method(
                Some(NAME),
                OS_PATH,
                Some(OS),
                "KernelArgs",
                &("rw quiet ostree=/x", vec!["nosmt"], Vec::<&str>::new(), vec!["quiet"], options),
            )
            .await
            .unwrap();
        let (address,): (String,) = reply.body().deserialize().unwrap();
        run_transaction(&address).await.unwrap();
        let staged = host.load()[0].clone();
        assert!(staged.staged);
        assert_eq!(staged.serial, 1);
        assert_eq!(staged.kernel_arguments, ["rw", "nosmt"]);
        until("idle", || host.daemon.active_transaction().is_none()).await;
        let reply =
            client.call_method(Some(NAME), OS_PATH, Some(OS), "Cleanup", &(vec!["pending-deploy"],)).await.unwrap();
        let (address,): (String,) = reply.body().deserialize().unwrap();
        run_transaction(&address).await.unwrap();
        assert_eq!(host.load().len(), 1);
        until("idle", || host.daemon.active_transaction().is_none()).await;
        // Staged without the daemon, which notices after a reload only.
        let target = host.layouts.image("2", true);
        host.daemon.stage_behind(&reference(&target)).await.unwrap();
        let count = async || -> usize {
            let list = get(&client, SYSROOT_PATH, SYSROOT, "Deployments").await.unwrap();
            Vec::<Dict>::try_from(list).unwrap().len()
        };
        assert_eq!(count().await, 1);
        client.call_method(Some(NAME), SYSROOT_PATH, Some(SYSROOT), "Reload", &()).await.unwrap();
        assert_eq!(count().await, 2);
        host.daemon.human_stage(&reference(&host.layouts.image("4", true))).await.unwrap();
        assert_eq!(host.load()[0].version.as_deref(), Some("4"));
    }

    #[tokio::test]
    async fn downloaded_image_needs_no_registry_until_it_is_pruned() {
        let host = Host::new().await;
        let target = reference(&host.layouts.image("2", true));
        host.daemon.human_download(&target).await.unwrap();
        assert_eq!(host.load().len(), 1, "a download makes no deployment");
        let both = host.daemon.human_rebase(&target, &["download-only", "cache-only"]).await.unwrap_err();
        assert_eq!(both.to_string(), "Can't specify cache-only and download-only");
        let off = Engine { skopeo: "/bin/false".into(), ..host.layouts.engine() };
        host.daemon.set_engine(off.clone());
        host.daemon.human_stage(&target).await.unwrap();
        assert_eq!(host.load()[0].reference, target);
        host.daemon.set_engine(host.layouts.engine());
        let unused = reference(&host.layouts.image("3", true));
        host.daemon.human_download(&unused).await.unwrap();
        host.daemon.human_rebase(&reference(&host.booted), &[]).await.unwrap();
        host.daemon.set_engine(off);
        for gone in [target, unused] {
            let error = host.daemon.human_stage(&gone).await.unwrap_err().to_string();
            assert!(error.contains("OpenImage"), "{gone} was not pruned: {error}");
        }
    }

    #[tokio::test]
    async fn locks_are_kept_shown_and_refused_as_in_the_original() {
        let host = Host::new().await;
        let target = host.layouts.image("2", true);
        let client = host.bus.connect().await;
        let finalize = async |checksum: &str| host.daemon.human_finalize(checksum).await.unwrap_err().to_string();
        assert_eq!(finalize(&target).await, "No pending staged deployment found");
        host.daemon.human_stage_locked(&reference(&target)).await.unwrap();
        let shows_lock = async || {
            let list = get(&client, SYSROOT_PATH, SYSROOT, "Deployments").await.unwrap();
            Vec::<Dict>::try_from(list).unwrap()[0].contains_key("finalization-locked")
        };
        assert!(host.load()[0].locked && !shows_lock().await, "a lock in the record is not shown");
        let (old, new) = (&host.booted, &target);
        assert_eq!(finalize(old).await, format!("Expected staged base checksum {old}, but found {new}"));
        assert!(finalize(new).await.starts_with("Checking systemd inhibitor locks: "), "logind is not running");
        assert_eq!(host.daemon.double().sysroot.finalize().unwrap(), None, "a locked deployment is not finalized");
        host.daemon.set_version(Version::FinalizesByCommit);
        let commit = &host.load()[0].checksum;
        assert_eq!(finalize(new).await, format!("Expected staged base checksum {new}, but found {commit}"));
        host.daemon.set_version(Version::WithoutLock);
        assert!(finalize(new).await.contains("No such method “FinalizeDeployment”"));
        // Staged again, to the daemon's default: an option that it does not know is ignored.
        host.daemon.human_stage_locked(&reference(&host.layouts.image("3", true))).await.unwrap();
        assert!(!host.load()[0].locked);
        host.daemon.double().sysroot.lock_with_file().unwrap();
        client.call_method(Some(NAME), SYSROOT_PATH, Some(SYSROOT), "Reload", &()).await.unwrap();
        assert!(host.load()[0].locked && shows_lock().await, "the older file is a lock that is shown");
    }

    #[tokio::test]
    async fn policy_file_decides_which_prefix_is_accepted() {
        let host = Host::new().await;
        let client = host.bus.connect().await;
        let target = host.layouts.image("2", true);
        let engine = host.layouts.engine();
        std::fs::write(&engine.policy, r#"{"default":[{"type":"insecureAcceptAnything"}]}"#).unwrap();
        let error = run_transaction(&rebase(&client, &reference(&target)).await.unwrap()).await.unwrap_err();
        assert!(error.to_string().contains("specifies a default of `insecureAcceptAnything`"), "{error}");
        until("idle", || host.daemon.active_transaction().is_none()).await;
        let unverified = format!("ostree-unverified-image:docker://q.io/os/node@{target}");
        run_transaction(&rebase(&client, &unverified).await.unwrap()).await.unwrap();
        assert_eq!(host.load()[0].reference, format!("ostree-unverified-registry:q.io/os/node@{target}"));
        until("idle", || host.daemon.active_transaction().is_none()).await;
        // The image was imported already: neither registry nor policy is asked again.
        std::fs::write(&engine.skopeo, "#!/bin/sh\nexit 1\n").unwrap();
        std::fs::write(&engine.policy, r#"{"default":[{"type":"reject"}]}"#).unwrap();
        run_transaction(&rebase(&client, &reference(&target)).await.unwrap()).await.unwrap();
        assert_eq!(host.load()[0].reference, reference(&target));
        until("idle", || host.daemon.active_transaction().is_none()).await;
        let long = "x".repeat(100_000);
        host.daemon.fail_next(long.clone());
        let unverified = format!("ostree-unverified-registry:q.io/os/node@{target}");
        let error = run_transaction(&rebase(&client, &unverified).await.unwrap()).await.unwrap_err();
        assert_eq!(error.to_string(), long);
    }
}
