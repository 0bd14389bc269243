//! A double of the rpm-ostree daemon: its objects on the bus, its transactions on private sockets, its exits.
//!
//! The pull is real: the policy-enforcing skopeo of the [`Engine`] gets the image, and its layers are unpacked into
//! the deployment.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use zbus::message::Message;
use zbus::{Connection, MessageStream, ObjectPath, OwnedVariant};

mod pull;
mod sysroot;
mod transaction;

pub(crate) use pull::{Image, Reference};
pub use sysroot::{Deployment, Sysroot};
use transaction::{Request, Transaction};

use crate::bus::{self, Answer, Call, Dict, Failure, Interface, Service, lookup_bool, lookup_str, variant};
use crate::events::{Event, Events};
use crate::machine::Engine;
use crate::systemd::Systemd;

/// The daemon's bus name.
pub const NAME: &str = "org.projectatomic.rpmostree1";
const SYSROOT_PATH: &str = "/org/projectatomic/rpmostree1/Sysroot";
const SYSROOT: &str = "org.projectatomic.rpmostree1.Sysroot";
const OS: &str = "org.projectatomic.rpmostree1.OS";
const BUSY: &str = "org.gtk.GDBus.UnmappedGError.Quark._g_2dio_2derror_2dquark.Code26";
const NOT_FOUND: &str = "org.gtk.GDBus.UnmappedGError.Quark._g_2dio_2derror_2dquark.Code1";
const FAILED: &str = "org.gtk.GDBus.UnmappedGError.Quark._g_2dio_2derror_2dquark.Code0";
/// An error of the daemon's own domain.
const INVALID: &str = "org.projectatomic.rpmostreed.Error.Failed";
const FINALIZER: &str = "ostree-finalize-staged.service";
const UNIT: &str = "rpm-ostreed.service";

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
            Self::Real => {
                let mut command = tokio::process::Command::new("systemctl");
                command.args(["start", unit]).stdin(Stdio::null()).kill_on_drop(true);
                let output = command.output().await.map_err(|error| error.to_string())?;
                if output.status.success() {
                    return Ok(());
                }
                Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
            }
        }
    }
}

/// The work of a transaction after its start.
pub(crate) enum Work {
    Rebase { options: Dict, reference: String },
    Cleanup(Vec<String>),
    KernelArgs { existing: String, changes: ArgumentChanges, locked: bool },
    Rollback,
    Upgrade,
    Foreign(Arc<Notify>),
    Nothing,
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
}

#[derive(Default)]
struct State {
    connection: Option<Connection>,
    active: Option<Arc<Transaction>>,
    deployments: Vec<Deployment>,
    clients: HashMap<String, String>,
}

pub(crate) struct Inner {
    address: String,
    dir: PathBuf,
    pub(crate) events: Events,
    sysroot: Arc<Sysroot>,
    engine: Mutex<Engine>,
    units: Units,
    state: Mutex<State>,
    faults: Mutex<Faults>,
    hanging: AtomicBool,
    release: Notify,
    lazy_finalizer: AtomicBool,
    force_close: Mutex<Duration>,
    transactions: std::sync::atomic::AtomicU64,
}

/// The handle to the double.
#[derive(Clone)]
pub struct RpmOstreed {
    inner: Arc<Inner>,
}

impl fmt::Debug for RpmOstreed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RpmOstreed").field("sysroot", &self.inner.sysroot).finish_non_exhaustive()
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
        let weak = Arc::downgrade(&this.inner);
        systemd.on_start(UNIT, move || {
            let weak = weak.clone();
            async move {
                match weak.upgrade() {
                    Some(inner) => inner.start().await,
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
        let inner = Arc::new(Inner {
            address,
            dir: dir.to_owned(),
            events,
            sysroot,
            engine: Mutex::new(engine),
            units,
            state: Mutex::default(),
            faults: Mutex::default(),
            hanging: AtomicBool::new(false),
            release: Notify::new(),
            lazy_finalizer: AtomicBool::new(false),
            force_close: Mutex::new(Duration::from_secs(30)),
            transactions: std::sync::atomic::AtomicU64::new(0),
        });
        Self { inner }
    }

    /// Uses another engine for later pulls.
    pub fn set_engine(&self, engine: Engine) {
        *self.inner.engine.lock().unwrap() = engine;
    }

    /// The next started transaction fails with `text`, which may be long.
    pub fn fail_next(&self, text: impl Into<String>) {
        self.inner.faults.lock().unwrap().fail = Some(text.into());
    }

    /// Every started transaction fails with `text`; `None` ends that.
    pub fn fail_all(&self, text: Option<&str>) {
        self.inner.faults.lock().unwrap().fail_all = text.map(str::to_owned);
    }

    /// Sets how long the daemon loads the sysroot before it takes its name.
    pub fn set_start_delay(&self, delay: Duration) {
        self.inner.faults.lock().unwrap().start_delay = delay;
    }

    /// The next started transaction succeeds without doing anything.
    pub fn no_change_next(&self) {
        self.inner.faults.lock().unwrap().no_change = true;
    }

    /// A running transaction stops at the first message that contains `text`, until [`RpmOstreed::release`].
    pub fn hang_at(&self, text: &str) {
        self.inner.faults.lock().unwrap().hang = Some(text.to_owned());
    }

    /// Whether a transaction hangs now.
    #[must_use]
    pub fn is_hanging(&self) -> bool {
        self.inner.hanging.load(Ordering::SeqCst)
    }

    /// Continues a hanging transaction.
    pub fn release(&self) {
        self.inner.faults.lock().unwrap().hang = None;
        self.inner.release.notify_waiters();
    }

    /// The daemon crashes at the first message of a running transaction that contains `text`.
    pub fn crash_at(&self, text: &str) {
        self.inner.faults.lock().unwrap().crash = Some(text.to_owned());
    }

    /// The next transaction is created, but its address never reaches the caller.
    pub fn lose_reply(&self) {
        self.inner.faults.lock().unwrap().lose_reply = true;
    }

    /// Calls that create a transaction are answered with this address; `None` ends that.
    pub fn answer_address(&self, address: Option<&str>) {
        self.inner.faults.lock().unwrap().address = address.map(str::to_owned);
    }

    /// Whether calls that create a transaction are answered with a number.
    pub fn answer_garbage(&self, garbage: bool) {
        self.inner.faults.lock().unwrap().garbage_reply = garbage;
    }

    /// Whether `Cancel` has no effect, as on a transaction that can no longer be cancelled.
    pub fn ignore_cancel(&self, ignored: bool) {
        self.inner.faults.lock().unwrap().ignore_cancel = ignored;
    }

    /// The text of a cancelled transaction, in place of `Operation was cancelled`.
    pub fn say_when_cancelled(&self, text: &str) {
        self.inner.faults.lock().unwrap().cancel_text = Some(text.to_owned());
    }

    /// Whether all callers count as users that polkit does not know.
    pub fn distrust(&self, strangers: bool) {
        self.inner.faults.lock().unwrap().strangers = strangers;
    }

    /// The number of messages before `Start` is answered and before a foreign signal.
    pub fn chatter(&self, messages: u32) {
        self.inner.faults.lock().unwrap().chatter = messages;
    }

    /// Shows another value of a property of the sysroot object.
    pub fn show(&self, property: &str, value: impl Into<zbus::Variant<'static>>) {
        self.inner.faults.lock().unwrap().properties.insert(property.to_owned(), variant(value));
    }

    /// Shows another value once, as if it had changed right after it was read.
    pub fn show_once(&self, property: &str, value: impl Into<zbus::Variant<'static>>) {
        self.inner.faults.lock().unwrap().properties_once.insert(property.to_owned(), variant(value));
    }

    /// Crashes the daemon now: clients of a transaction see their socket close, the bus name is lost.
    pub async fn crash(&self) {
        self.inner.crash().await;
    }

    /// The daemon exits when idle: the name is released, running calls are lost. Returns `false` during a transaction;
    /// registered clients do not prevent the exit, as when an administrator stops the unit.
    pub async fn idle_exit(&self) -> bool {
        self.inner.idle_exit().await
    }

    /// The daemon exits on the next call without answering it: a client's race with the idle exit.
    pub fn idle_exit_on_next_call(&self) {
        self.inner.faults.lock().unwrap().exit_on_call = true;
    }

    /// The daemon crashes on this many calls without answering them; bus activation restarts it.
    pub fn crash_on_calls(&self, calls: usize) {
        self.inner.faults.lock().unwrap().crash_on_calls = calls;
    }

    /// Whether the daemon runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.inner.state.lock().unwrap().connection.is_some()
    }

    /// Starts the daemon as its unit does.
    pub async fn start(&self) -> Result<(), String> {
        match &self.inner.units {
            Units::Double(systemd) => systemd.activate(UNIT).await,
            Units::Real => self.inner.start().await,
        }
    }

    /// The title of the active transaction.
    #[must_use]
    pub fn active_transaction(&self) -> Option<String> {
        self.inner.state.lock().unwrap().active.as_ref().map(|transaction| transaction.title.clone())
    }

    /// The address of the active transaction.
    #[must_use]
    pub fn active_transaction_path(&self) -> Option<String> {
        self.inner.state.lock().unwrap().active.as_ref().map(|transaction| transaction.address())
    }

    /// Starts a foreign transaction, e.g. `upgrade`, which runs until the handle ends it or a client cancels it.
    pub async fn foreign(&self, title: &str) -> anyhow::Result<Foreign> {
        self.start().await.map_err(anyhow::Error::msg)?;
        let end = Arc::new(Notify::new());
        let transaction = self.inner.create(Request {
            method: "Upgrade".to_owned(),
            parameters: Vec::new(),
            title: title.to_owned(),
            sender: ":1.9999".to_owned(),
            object: self.inner.os_path(),
            client: "client(id:cli dbus:1.9999 uid:0)".to_owned(),
            work: Work::Foreign(end.clone()),
        })?;
        transaction.start();
        self.inner.changed().await;
        Ok(Foreign { end })
    }

    /// `true` reproduces OCPBUGS-51150: the finalizer is not active after staging until it is started explicitly.
    pub fn finalizer_stays_inactive(&self, lazy: bool) {
        self.inner.lazy_finalizer.store(lazy, Ordering::SeqCst);
    }

    /// Sets how long a finished transaction waits for its clients to disconnect.
    pub fn set_force_close(&self, after: Duration) {
        *self.inner.force_close.lock().unwrap() = after;
    }

    /// Pulls and deploys `reference` outside of the daemon, as an installer does, with `engine`.
    pub async fn install(&self, engine: &Engine, reference: &str, kernel_arguments: &[String]) -> anyhow::Result<()> {
        install(&self.inner.sysroot, engine, reference, kernel_arguments).await
    }

    /// Pulls `reference` into the store with this engine, outside of the daemon, as bootc does.
    pub(crate) async fn import(&self, reference: &Reference) -> Result<Image, String> {
        let engine = self.inner.engine.lock().unwrap().clone();
        pull::pull(&engine, &self.inner.sysroot, reference, &reference.canonical(), None).await
    }

    /// Stages an imported image with the kernel arguments of the booted deployment, as bootc does.
    pub(crate) async fn stage_imported(&self, image: Image) -> Result<(), String> {
        let booted = self.inner.sysroot.load().into_iter().find(|deployment| deployment.booted);
        let arguments = booted.map(|booted| booted.kernel_arguments).unwrap_or_default();
        self.inner.stage(image, arguments, false).await.map(|_| ())
    }

    /// Pulls and stages `reference` without the daemon, as bootc does: the daemon notices after `Reload`.
    pub async fn stage_behind(&self, reference: &str) -> anyhow::Result<()> {
        let inner = &self.inner;
        let parsed = Reference::parse(reference).map_err(anyhow::Error::msg)?;
        let engine = inner.engine.lock().unwrap().clone();
        inner.sysroot.set_locked(true);
        let pulled = pull::pull(&engine, &inner.sysroot, &parsed, &parsed.canonical(), None).await;
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
        self.human_rebase(reference, false).await
    }

    /// The same with `--lock-finalization`.
    pub async fn human_stage_locked(&self, reference: &str) -> anyhow::Result<()> {
        self.human_rebase(reference, true).await
    }

    async fn human_rebase(&self, reference: &str, locked: bool) -> anyhow::Result<()> {
        self.start().await.map_err(anyhow::Error::msg)?;
        let connection = bus::connect(&self.inner.address).await?;
        let options: HashMap<&str, OwnedVariant> = HashMap::from([
            ("initiating-command-line", variant(format!("rpm-ostree rebase {reference}"))),
            ("lock-finalization", variant(locked)),
        ]);
        let none: Vec<&str> = Vec::new();
        let reply = connection
            .call_method(Some(NAME), self.inner.os_path(), Some(OS), "Rebase", &(options, reference, none))
            .await?;
        let (address,): (String,) = reply.body().deserialize()?;
        run_transaction(&address).await
    }
}

/// Pulls `reference` with `engine` and deploys it as the only deployment of `sysroot`, as an installer does.
pub async fn install(
    sysroot: &Sysroot,
    engine: &Engine,
    reference: &str,
    kernel_arguments: &[String],
) -> anyhow::Result<()> {
    let parsed = Reference::parse(reference).map_err(anyhow::Error::msg)?;
    let image = pull::pull(engine, sysroot, &parsed, &parsed.canonical(), None).await.map_err(anyhow::Error::msg)?;
    sysroot.install(&image, kernel_arguments)?;
    Ok(())
}

/// Connects to a transaction, starts it and waits for its end, as the command line does.
pub async fn run_transaction(address: &str) -> anyhow::Result<()> {
    let peer = zbus::connection::Builder::address(address).p2p().build().await?;
    let mut stream = MessageStream::from(&peer);
    peer.call_method(None::<&str>, "/", Some(transaction::INTERFACE), "Start", &()).await?;
    while let Some(Ok(message)) = bus::next(&mut stream).await {
        if message.header().member().is_some_and(|member| member.as_str() == "Finished") {
            let (success, text): (bool, String) = message.body().deserialize()?;
            let _ = peer.close().await;
            anyhow::ensure!(success, "{text}");
            return Ok(());
        }
    }
    anyhow::bail!("the daemon went away")
}

impl Inner {
    /// Takes the name.
    async fn start(self: &Arc<Self>) -> Result<(), String> {
        if self.state.lock().unwrap().connection.is_some() {
            return Ok(());
        }
        let failed = |_| "exit-code".to_owned();
        let delay = self.faults.lock().unwrap().start_delay;
        tokio::time::sleep(delay).await;
        // The exit was requested again meanwhile.
        if self.state.lock().unwrap().connection.is_some() {
            return Ok(());
        }
        let connection = bus::connect(&self.address).await.map_err(failed)?;
        {
            let mut state = self.state.lock().unwrap();
            state.deployments = self.sysroot.load();
            state.connection = Some(connection.clone());
        }
        let stream = MessageStream::from(&connection);
        tokio::spawn(bus::serve(stream, self.clone()));
        bus::bus_call(&connection, "AddMatch", &("type='signal',member='NameOwnerChanged'",)).await.map_err(failed)?;
        connection.request_name(NAME).await.map_err(failed)?;
        Ok(())
    }

    /// Ends the process: the rest of a transaction first, then the connection.
    async fn stop(self: &Arc<Self>) {
        let (connection, active) = {
            let mut state = self.state.lock().unwrap();
            state.clients.clear();
            (state.connection.take(), state.active.take())
        };
        if let Some(connection) = connection {
            let _ = connection.close().await;
        }
        if let Some(active) = active {
            // The transaction's tasks may include the caller: they are detached, so that every client is disconnected.
            let _ = tokio::spawn(async move { active.force_close().await }).await;
        }
    }

    async fn crash(self: &Arc<Self>) {
        if let Units::Double(systemd) = &self.units {
            systemd.fail(UNIT, "signal");
        }
        self.stop().await;
    }

    async fn idle_exit(self: &Arc<Self>) -> bool {
        if self.state.lock().unwrap().active.is_some() {
            return false;
        }
        if let Units::Double(systemd) = &self.units {
            systemd.set(UNIT, "inactive", "dead");
        }
        self.stop().await;
        true
    }

    pub(crate) fn has_power(&self) -> bool {
        self.sysroot.is_powered()
    }

    pub(crate) fn force_close_after(&self) -> Duration {
        *self.force_close.lock().unwrap()
    }

    fn os_path(&self) -> String {
        let mut path = String::from("/org/projectatomic/rpmostree1/");
        for character in self.sysroot.osname().bytes() {
            match character {
                b'-' | b'/' => path.push('_'),
                b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => path.push(char::from(character)),
                other => path.push_str(&format!("_{other:02X}")),
            }
        }
        path
    }

    /// Reads the sysroot again and reports changes.
    pub(crate) async fn refresh(&self) {
        let deployments = self.sysroot.load();
        let changed = {
            let mut state = self.state.lock().unwrap();
            std::mem::replace(&mut state.deployments, deployments.clone()) != deployments
        };
        if changed {
            self.changed().await;
        }
    }

    async fn changed(&self) {
        let connection = self.state.lock().unwrap().connection.clone();
        let Some(connection) = connection else { return };
        for path in [SYSROOT_PATH.to_owned(), self.os_path()] {
            for interface in self.at(&path) {
                bus::properties_changed(&connection, &path, &interface).await;
            }
        }
    }

    /// Runs when the transaction is over and its clients have left.
    pub(crate) async fn closed(&self, transaction: &Arc<Transaction>) {
        let mine = {
            let mut state = self.state.lock().unwrap();
            let mine = state.active.as_ref().is_some_and(|active| Arc::ptr_eq(active, transaction));
            if mine {
                state.active = None;
            }
            mine
        };
        if mine {
            let _ = std::fs::remove_file(&transaction.socket);
            self.changed().await;
        }
    }

    /// Applies the faults that belong to a message.
    pub(crate) async fn disturb(self: &Arc<Self>, text: &str) {
        // Created first, so that no later release is missed.
        let released = self.release.notified();
        let (hang, crash) = {
            let mut faults = self.faults.lock().unwrap();
            let crash = faults.crash.take_if(|wanted| text.contains(wanted.as_str())).is_some();
            (faults.hang.take_if(|wanted| text.contains(wanted.as_str())).is_some(), crash)
        };
        if !self.has_power() {
            std::future::pending::<()>().await;
        }
        if crash {
            let this = self.clone();
            tokio::spawn(async move { this.crash().await });
            std::future::pending::<()>().await;
        }
        if hang {
            self.hanging.store(true, Ordering::SeqCst);
            let guard = HangGuard(&self.hanging);
            released.await;
            drop(guard);
        }
    }

    pub(crate) fn ignores_cancel(&self) -> bool {
        self.faults.lock().unwrap().ignore_cancel
    }

    pub(crate) fn cancel_text(&self) -> String {
        let text = self.faults.lock().unwrap().cancel_text.clone();
        text.unwrap_or_else(|| "Operation was cancelled".to_owned())
    }

    pub(crate) fn chatters(&self) -> u32 {
        self.faults.lock().unwrap().chatter
    }

    /// Root, which is the user that runs the daemon, may do everything; the bus tells who calls. Other users may do
    /// what polkit allows, which is nothing here.
    async fn authorize(&self, connection: &Connection, call: &Call) -> Result<(), Failure> {
        let reply = bus::bus_call(connection, "GetConnectionUnixUser", &(call.sender.as_str(),)).await?;
        let (uid,): (u32,) = reply.body().deserialize()?;
        if matches!(self.units, Units::Real) {
            println!("{} is called by uid {uid}", call.member);
        }
        let open = ["GetOS", "Reload", "GetDeploymentBootConfig"].contains(&call.member.as_str());
        let trusted = uid == nix::unistd::getuid().as_raw() && !self.faults.lock().unwrap().strangers;
        if open || trusted {
            return Ok(());
        }
        let object = if call.path == SYSROOT_PATH { "Sysroot" } else { "OS" };
        let text = format!("rpmostreed {object} operation {} not allowed for user", call.member);
        Err(Failure::new("org.freedesktop.DBus.Error.AccessDenied", text))
    }

    fn create(self: &Arc<Self>, request: Request) -> Result<Arc<Transaction>, Failure> {
        // Sockets of dead daemons remain; each transaction gets its own path.
        let number = self.transactions.fetch_add(1, Ordering::SeqCst);
        let socket = self.dir.join(format!("rpm-ostree-transaction-{number}.sock"));
        let transaction =
            Transaction::listen(self, socket, request).map_err(|error| Failure::new(FAILED, error.to_string()))?;
        self.state.lock().unwrap().active = Some(transaction.clone());
        Ok(transaction)
    }

    async fn transaction(
        self: &Arc<Self>,
        call: &Call,
        name: &str,
        argument: String,
        title: Option<String>,
        work: Work,
    ) -> Answer {
        self.events.emit(Event::TransactionRequested { method: name.to_owned(), argument });
        let parameters = call.message.body().data().bytes().to_vec();
        let active = self.state.lock().unwrap().active.clone();
        if let Some(active) = active {
            if active.method == call.member && active.parameters == parameters {
                return call.reply(&(active.address(),));
            }
            return Err(Failure::new(
                BUSY,
                format!(
                    "Transaction in progress: {}\n You can cancel the current transaction with `rpm-ostree cancel`",
                    active.shown_title()
                ),
            ));
        }
        if self.sysroot.is_locked() {
            return Err(Failure::new(BUSY, "System transaction in progress"));
        }
        self.refresh().await;
        let id = self.state.lock().unwrap().clients.get(&call.sender).cloned().unwrap_or_default();
        let client = match id.as_str() {
            "" => format!("client(dbus{} uid:0)", call.sender),
            id => format!("client(id:{id} dbus{} uid:0)", call.sender),
        };
        let transaction = self.create(Request {
            method: call.member.clone(),
            parameters,
            title: title.unwrap_or_else(|| name.to_owned()),
            sender: call.sender.clone(),
            object: call.path.clone(),
            client,
            work,
        })?;
        self.changed().await;
        let (lost, garbage, address) = {
            let mut faults = self.faults.lock().unwrap();
            (std::mem::take(&mut faults.lose_reply), faults.garbage_reply, faults.address.clone())
        };
        if lost {
            return Ok(None);
        }
        if garbage {
            return call.reply(&(7_u32,));
        }
        call.reply(&(address.unwrap_or_else(|| transaction.address()),))
    }

    /// Does the work of a started transaction.
    pub(crate) async fn execute(self: &Arc<Self>, transaction: &Arc<Transaction>, work: Work) -> Result<(), String> {
        if !matches!(work, Work::Foreign(_)) {
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
        }
        match work {
            Work::Rebase { options, reference } => self.rebase(transaction, &options, &reference).await,
            Work::Cleanup(kinds) => self.cleanup(transaction, &kinds).await,
            Work::KernelArgs { existing, changes, locked } => {
                let Some(mut arguments) = edit_arguments(&existing, &changes)? else {
                    transaction.message("No changes.").await;
                    return Ok(());
                };
                // libostree inserts the right value when it writes the boot entry.
                arguments.retain(|word| !word.starts_with("ostree="));
                let first = self.sysroot.load().into_iter().next().ok_or("No deployments found")?;
                let image = Image::stored(&self.sysroot, &first.reference)?;
                self.deploy(transaction, image, arguments, locked).await
            }
            Work::Rollback => {
                transaction.message("Moving the rollback deployment to be first in boot order").await;
                self.sysroot.roll_back().map_err(|error| error.to_string())
            }
            Work::Upgrade => {
                transaction.message("No upgrade available.").await;
                Ok(())
            }
            Work::Foreign(end) => {
                end.notified().await;
                Ok(())
            }
            Work::Nothing => Ok(()),
        }
    }

    /// Kernel arguments of the deployment that a new one is based on: the first in boot order.
    fn merge_arguments(&self) -> Vec<String> {
        self.sysroot.load().into_iter().next().map(|first| first.kernel_arguments).unwrap_or_default()
    }

    async fn rebase(
        self: &Arc<Self>,
        transaction: &Arc<Transaction>,
        options: &Dict,
        reference: &str,
    ) -> Result<(), String> {
        let deployments = self.sysroot.load();
        let first = deployments.first();
        let parsed = Reference::parse(reference)?;
        if first.is_some_and(|first| first.reference == reference) {
            return Err(format!("Old and new refs are equal: {reference}"));
        }
        if deployments.iter().any(|deployment| deployment.booted && !deployment.requested_packages.is_empty()) {
            return Err("Updating rpm-md repo 'updates': cannot update repo 'updates': Cannot download repomd.xml: \
                        Cannot download repodata/repomd.xml: All mirrors were tried"
                .to_owned());
        }
        let source = match lookup_str(options, "revision").filter(|revision| !revision.is_empty()) {
            Some(revision) => parsed.at(&revision),
            None => parsed.clone(),
        };
        let engine = self.engine.lock().unwrap().clone();
        let image = pull::pull(&engine, &self.sysroot, &source, &parsed.canonical(), Some(transaction)).await?;
        if lookup_bool(options, "allow-downgrade") == Some(false)
            && first.is_some_and(|first| image.timestamp < first.timestamp)
        {
            return Err("While checking against deployment timestamp: Upgrade target revision is older".to_owned());
        }
        if lookup_bool(options, "download-only") == Some(true) {
            transaction.message("Update downloaded.").await;
            return Ok(());
        }
        let locked = lookup_bool(options, "lock-finalization") == Some(true);
        let arguments = self.merge_arguments();
        self.deploy(transaction, image, arguments, locked).await
    }

    async fn deploy(
        self: &Arc<Self>,
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
    async fn stage(self: &Arc<Self>, image: Image, arguments: Vec<String>, locked: bool) -> Result<Deployment, String> {
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

    async fn cleanup(self: &Arc<Self>, transaction: &Arc<Transaction>, kinds: &[String]) -> Result<(), String> {
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

    /// The same as in the daemon: by index, or the base of a new deployment; an error where a staged deployment has no
    /// recorded arguments.
    async fn boot_config(
        self: &Arc<Self>,
        index: &str,
        pending: bool,
    ) -> Result<BTreeMap<String, OwnedVariant>, Failure> {
        let deployments = self.sysroot.load();
        if index.bytes().any(|byte| !byte.is_ascii_digit()) {
            let text = format!("Invalid deployment index {index}, must be a number and >= 0");
            return Err(Failure::new(INVALID, text));
        }
        let number: usize = match index {
            "" if pending => 0,
            "" => deployments.iter().position(|deployment| deployment.booted).unwrap_or(0),
            index => index.parse().unwrap_or(usize::MAX),
        };
        let Some(deployment) = deployments.get(number) else {
            let text = format!("Out of range deployment index {number}, expected < {}", deployments.len());
            return Err(Failure::new(INVALID, text));
        };
        if deployment.staged && !self.sysroot.notes_arguments() {
            self.crash().await;
            return Err(Failure::new(
                "org.freedesktop.DBus.Error.NoReply",
                "Message recipient disconnected".to_owned(),
            ));
        }
        let mut config = BTreeMap::from([
            ("staged".to_owned(), variant(deployment.staged)),
            ("options".to_owned(), variant(deployment.options())),
        ]);
        if !deployment.staged {
            config.insert("title".to_owned(), variant(format!("{} {}", deployment.osname, deployment.checksum)));
            config.insert("linux".to_owned(), variant(format!("/ostree/{}/vmlinuz", deployment.checksum)));
        }
        Ok(config)
    }

    async fn call_sysroot(self: &Arc<Self>, call: &Call) -> Answer {
        let body = call.message.body();
        match call.member.as_str() {
            "RegisterClient" => {
                let (options,): (Dict,) = body.deserialize()?;
                let id = lookup_str(&options, "id").filter(|id| id != "cli").unwrap_or_default();
                self.state.lock().unwrap().clients.insert(call.sender.clone(), id);
                call.reply(&())
            }
            "UnregisterClient" => {
                let (_options,): (Dict,) = body.deserialize()?;
                self.state.lock().unwrap().clients.remove(&call.sender);
                call.reply(&())
            }
            "Reload" => {
                self.refresh().await;
                call.reply(&())
            }
            "GetOS" => {
                let (name,): (String,) = body.deserialize()?;
                if name != self.sysroot.osname() {
                    return Err(Failure::new(NOT_FOUND, format!("OS name \"{name}\" not found")));
                }
                call.reply(&(ObjectPath::try_from(self.os_path())?,))
            }
            _ => call.unknown(),
        }
    }

    async fn call_os(self: &Arc<Self>, call: &Call) -> Answer {
        let body = call.message.body();
        match call.member.as_str() {
            "Rebase" => {
                let (options, reference, _packages): (Dict, String, Vec<String>) = body.deserialize()?;
                let title = lookup_str(&options, "initiating-command-line");
                let work = Work::Rebase { options, reference: reference.clone() };
                self.transaction(call, "rebase", reference, title, work).await
            }
            "Cleanup" => {
                let (kinds,): (Vec<String>,) = body.deserialize()?;
                let known = ["base", "pending-deploy", "rollback-deploy", "repomd"];
                let is_idle = self.state.lock().unwrap().active.is_none();
                if let Some(kind) = kinds.iter().find(|kind| is_idle && !known.contains(&kind.as_str())) {
                    return Err(Failure::new(FAILED, format!("Invalid cleanup type: {kind}")));
                }
                let title = Some("cleanup".to_owned());
                self.transaction(call, "cleanup", kinds.join(","), title, Work::Cleanup(kinds)).await
            }
            "KernelArgs" => {
                type Strings = Vec<String>;
                let (existing, added, replaced, removed, options): (String, Strings, Strings, Strings, Dict) =
                    body.deserialize()?;
                let title = lookup_str(&options, "initiating-command-line").or(Some("kargs".to_owned()));
                let locked = lookup_bool(&options, "lock-finalization") == Some(true);
                let last = lookup_str(&options, "final-kernel-args");
                let argument = match &last {
                    Some(last) => format!("=[{last}]"),
                    None => format!("+[{}] ~[{}] -[{}]", added.join(" "), replaced.join(" "), removed.join(" ")),
                };
                let changes = ArgumentChanges { added, replaced, removed, last };
                let work = Work::KernelArgs { existing, changes, locked };
                self.transaction(call, "kernel-args", argument, title, work).await
            }
            "Rollback" => {
                let (_options,): (Dict,) = body.deserialize()?;
                self.transaction(call, "rollback", String::new(), None, Work::Rollback).await
            }
            "Upgrade" => {
                let (options,): (Dict,) = body.deserialize()?;
                let title = lookup_str(&options, "initiating-command-line");
                self.transaction(call, "upgrade", String::new(), title, Work::Upgrade).await
            }
            "GetDeploymentBootConfig" => {
                let (index, pending): (String, bool) = body.deserialize()?;
                let config = self.boot_config(&index, pending).await?;
                call.reply(&(config,))
            }
            _ => call.unknown(),
        }
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
        self.inner.stop().await;
        self.inner.sysroot.set_locked(false);
    }
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> Self {
        anyhow::anyhow!("{}: {}", failure.name, failure.text)
    }
}

/// The arguments of a `KernelArgs` call; `last` is the option `final-kernel-args`.
#[derive(Debug)]
pub(crate) struct ArgumentChanges {
    added: Vec<String>,
    replaced: Vec<String>,
    removed: Vec<String>,
    last: Option<String>,
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
fn edit_arguments(existing: &str, changes: &ArgumentChanges) -> Result<Option<Vec<String>>, String> {
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

const SYSROOT_MEMBERS: &str = r#"
<method name="RegisterClient"><arg name="options" type="a{sv}" direction="in"/></method>
<method name="UnregisterClient"><arg name="options" type="a{sv}" direction="in"/></method>
<method name="Reload"/>
<method name="GetOS"><arg name="name" type="s" direction="in"/><arg name="object_path" type="o" direction="out"/></method>
"#;

const OS_MEMBERS: &str = r#"
<method name="Rebase"><arg name="options" type="a{sv}" direction="in"/><arg name="refspec" type="s" direction="in"/><arg name="packages" type="as" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>
<method name="Cleanup"><arg name="elements" type="as" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>
<method name="KernelArgs"><arg name="existing_kernel_arg" type="s" direction="in"/><arg name="kernel_args_added" type="as" direction="in"/><arg name="kernel_args_replaced" type="as" direction="in"/><arg name="kernel_args_removed" type="as" direction="in"/><arg name="options" type="a{sv}" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>
<method name="Rollback"><arg name="options" type="a{sv}" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>
<method name="Upgrade"><arg name="options" type="a{sv}" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>
<method name="GetDeploymentBootConfig"><arg name="deployid" type="s" direction="in"/><arg name="is_pending" type="b" direction="in"/><arg name="bootconfig" type="a{sv}" direction="out"/></method>
"#;

impl Service for Inner {
    fn at(&self, path: &str) -> Vec<Interface> {
        let state = self.state.lock().unwrap();
        let deployments = &state.deployments;
        let dict = |found: Option<&Deployment>| variant(found.map(Deployment::dict).unwrap_or_default());
        let booted = deployments.iter().position(|deployment| deployment.booted);
        if path == SYSROOT_PATH {
            let active = match &state.active {
                Some(active) => (active.method.clone(), active.sender.clone(), active.object.clone()),
                None => Default::default(),
            };
            let address = state.active.as_ref().map(|active| active.address()).unwrap_or_default();
            let os = if booted.is_some() { self.os_path() } else { "/".to_owned() };
            let list: Vec<Dict> = deployments.iter().map(Deployment::dict).collect();
            let mut properties = vec![
                ("Booted", variant(ObjectPath::try_from(os).expect("a valid path"))),
                ("Path", variant("/")),
                ("ActiveTransaction", variant(active)),
                ("ActiveTransactionPath", variant(address)),
                ("AutomaticUpdatePolicy", variant("none")),
                ("Deployments", variant(list)),
            ];
            let mut faults = self.faults.lock().unwrap();
            for (name, value) in &mut properties {
                let once = faults.properties_once.remove(*name);
                if let Some(other) = once.or_else(|| faults.properties.get(*name).cloned()) {
                    *value = other;
                }
            }
            return vec![Interface { name: SYSROOT, members: SYSROOT_MEMBERS, properties }];
        }
        if path == self.os_path() && !deployments.is_empty() {
            return vec![Interface {
                name: OS,
                members: OS_MEMBERS,
                properties: vec![
                    ("Name", variant(self.sysroot.osname())),
                    ("BootedDeployment", dict(booted.and_then(|index| deployments.get(index)))),
                    ("DefaultDeployment", dict(deployments.first())),
                    ("RollbackDeployment", dict(booted.and_then(|index| deployments.get(index + 1)))),
                ],
            }];
        }
        Vec::new()
    }

    async fn leaves(self: &Arc<Self>) -> bool {
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
            self.crash().await;
            return true;
        }
        exits && self.idle_exit().await
    }

    async fn call(self: &Arc<Self>, connection: &Connection, call: &Call) -> Answer {
        self.authorize(connection, call).await?;
        if call.path == SYSROOT_PATH {
            self.call_sysroot(call).await
        } else if call.path == self.os_path() {
            self.call_os(call).await
        } else {
            call.unknown()
        }
    }

    async fn signal(self: &Arc<Self>, message: &Message) {
        let Ok((name, _, new)) = message.body().deserialize::<(String, String, String)>() else { return };
        if !new.is_empty() {
            return;
        }
        let active = {
            let mut state = self.state.lock().unwrap();
            state.clients.remove(&name);
            state.active.clone()
        };
        if let Some(active) = active
            && active.sender == name
            && active.is_waiting()
        {
            active.abandon().await;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::bus::Bus;

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
            self.daemon.inner.sysroot.load()
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
        let reply = peer.call_method(None::<&str>, "/", Some(transaction::INTERFACE), "Start", &()).await.unwrap();
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
        let tree = host.daemon.inner.sysroot.tree(staged);
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
        let reply =
            client.call_method(Some(NAME), OS_PATH, Some(OS), "GetDeploymentBootConfig", &("", false)).await.unwrap();
        let (config,): (Dict,) = reply.body().deserialize().unwrap();
        assert!(lookup_str(&config, "options").unwrap().starts_with("rw quiet ostree=/ostree/boot.1/fedora-coreos/"));
        host.daemon.stage_behind(&reference(&host.layouts.image("2", true))).await.unwrap();
        for (index, pending, staged) in [("", false, false), ("", true, true), ("0", false, true), ("1", true, false)] {
            let body = (index, pending);
            let reply =
                client.call_method(Some(NAME), OS_PATH, Some(OS), "GetDeploymentBootConfig", &body).await.unwrap();
            let (config,): (Dict,) = reply.body().deserialize().unwrap();
            assert_eq!(lookup_bool(&config, "staged"), Some(staged), "{index} {pending}");
        }
        let id = ("fedora-coreos-1.0", true);
        let error =
            client.call_method(Some(NAME), OS_PATH, Some(OS), "GetDeploymentBootConfig", &id).await.unwrap_err();
        assert!(error.to_string().contains("Invalid deployment index fedora-coreos-1.0, must be"), "{error}");
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
        peer.call_method(None::<&str>, "/", Some(transaction::INTERFACE), "Cancel", &()).await.unwrap();
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
        host.daemon.inner.sysroot.drop_staged().unwrap();
        host.daemon.inner.sysroot.layer_packages(&["vim"]).unwrap();
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
            let changes = ArgumentChanges { added, replaced, removed, last: None };
            edit_arguments(existing, &changes).map(|words| words.map(|words| words.join(" ")))
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
