//! A double of the rpm-ostree daemon: its objects on the bus, its transactions on private sockets, its exits.
//!
//! The pull is real: the policy-enforcing skopeo of the [`Engine`] gets the image, and its layers are unpacked into
//! the deployment.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use zbus::message::Message;
use zbus::{Connection, MessageStream, ObjectPath, OwnedVariant};

mod pull;
mod sysroot;
mod transaction;

use pull::{Image, Reference};
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
const FINALIZER: &str = "ostree-finalize-staged.service";
const UNIT: &str = "rpm-ostreed.service";

/// What a transaction does once started.
pub(crate) enum Work {
    Rebase { options: Dict, reference: String },
    Cleanup(Vec<String>),
    KernelArgs { existing: String, added: Vec<String>, replaced: Vec<String>, removed: Vec<String>, locked: bool },
    Rollback,
    Upgrade,
    Foreign(Arc<Notify>),
    Nothing,
}

#[derive(Default)]
struct Faults {
    fail: Option<String>,
    no_change: bool,
    hang: Option<String>,
    crash: Option<String>,
    lose_reply: bool,
    exit_on_call: bool,
    refuse: Option<(String, String)>,
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
    systemd: Systemd,
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

/// A transaction of somebody else; it ends when this says so.
#[derive(Debug)]
pub struct Foreign {
    end: Arc<Notify>,
}

impl Foreign {
    /// Lets it end successfully.
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
        let inner = Arc::new(Inner {
            address,
            dir: dir.to_owned(),
            events,
            sysroot,
            engine: Mutex::new(engine),
            systemd: systemd.clone(),
            state: Mutex::default(),
            faults: Mutex::default(),
            hanging: AtomicBool::new(false),
            release: Notify::new(),
            lazy_finalizer: AtomicBool::new(false),
            force_close: Mutex::new(Duration::from_secs(30)),
            transactions: std::sync::atomic::AtomicU64::new(0),
        });
        let weak = Arc::downgrade(&inner);
        systemd.on_start(UNIT, move || {
            let weak = weak.clone();
            async move {
                match weak.upgrade() {
                    Some(inner) => inner.start().await,
                    None => Err("resources".to_owned()),
                }
            }
        });
        Self { inner }
    }

    /// Another engine for the pulls from now on.
    pub fn set_engine(&self, engine: Engine) {
        *self.inner.engine.lock().unwrap() = engine;
    }

    /// The next started transaction fails with `text`, however long.
    pub fn fail_next(&self, text: impl Into<String>) {
        self.inner.faults.lock().unwrap().fail = Some(text.into());
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

    /// Lets a hanging transaction go on.
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

    /// Calls that make a transaction fail with this D-Bus error; `None` ends that.
    pub fn refuse(&self, error: Option<(&str, &str)>) {
        self.inner.faults.lock().unwrap().refuse = error.map(|(name, text)| (name.to_owned(), text.to_owned()));
    }

    /// The daemon crashes now: clients of a transaction see their socket close, the bus name is lost.
    pub async fn crash(&self) {
        self.inner.crash().await;
    }

    /// The daemon exits for idleness: name released, calls under way are lost. Not during a transaction, when it says
    /// `false`.
    pub async fn idle_exit(&self) -> bool {
        self.inner.idle_exit().await
    }

    /// The daemon exits on the next call without answering it: the race of a client with idle exit.
    pub fn idle_exit_on_next_call(&self) {
        self.inner.faults.lock().unwrap().exit_on_call = true;
    }

    /// Whether the daemon runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.inner.state.lock().unwrap().connection.is_some()
    }

    /// Starts the daemon as its unit does.
    pub async fn start(&self) -> Result<(), String> {
        self.inner.systemd.activate(UNIT).await
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

    /// Somebody else's transaction runs, e.g. `upgrade`, until the handle ends it or somebody cancels it.
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

    /// `true` reproduces OCPBUGS-51150: the finalizer is not active after staging until somebody starts it.
    pub fn finalizer_stays_inactive(&self, lazy: bool) {
        self.inner.lazy_finalizer.store(lazy, Ordering::SeqCst);
    }

    /// How long after its end a transaction waits for its clients to disconnect.
    pub fn set_force_close(&self, after: Duration) {
        *self.inner.force_close.lock().unwrap() = after;
    }

    /// Pulls and deploys `reference` outside of the daemon, as an installer does, with `engine`.
    pub async fn install(&self, engine: &Engine, reference: &str, kernel_arguments: &[String]) -> anyhow::Result<()> {
        let parsed = Reference::parse(reference).map_err(anyhow::Error::msg)?;
        let image = pull::pull(engine, &self.inner.sysroot, &parsed, &parsed.canonical(), None)
            .await
            .map_err(anyhow::Error::msg)?;
        self.inner.sysroot.install(&image, kernel_arguments)?;
        Ok(())
    }

    /// Pulls and stages `reference` behind the daemon's back, as bootc does: the daemon knows after `Reload`.
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

    /// Somebody types `rpm-ostree rebase`: a transaction of another client, waited for.
    pub async fn human_stage(&self, reference: &str) -> anyhow::Result<()> {
        self.start().await.map_err(anyhow::Error::msg)?;
        let connection = bus::connect(&self.inner.address).await?;
        let options: HashMap<&str, OwnedVariant> =
            HashMap::from([("initiating-command-line", variant(format!("rpm-ostree rebase {reference}")))]);
        let none: Vec<&str> = Vec::new();
        let reply = connection
            .call_method(Some(NAME), self.inner.os_path(), Some(OS), "Rebase", &(options, reference, none))
            .await?;
        let (address,): (String,) = reply.body().deserialize()?;
        run_transaction(&address).await
    }
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

    /// Ends the process: what is left of a transaction, then the connection.
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
            // The tasks of the transaction may include the caller: detached, so that every client is cut off.
            let _ = tokio::spawn(async move { active.force_close().await }).await;
        }
    }

    async fn crash(self: &Arc<Self>) {
        self.systemd.fail(UNIT, "signal");
        self.stop().await;
    }

    async fn idle_exit(self: &Arc<Self>) -> bool {
        if self.state.lock().unwrap().active.is_some() {
            return false;
        }
        self.systemd.set(UNIT, "inactive", "dead");
        self.stop().await;
        true
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

    /// Reads the sysroot again and tells what changed.
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

    /// The transaction is over and its clients have left.
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

    /// Applies the faults that are bound to a message.
    pub(crate) async fn disturb(self: &Arc<Self>, text: &str) {
        // Made first: a release from here on is not missed.
        let released = self.release.notified();
        let (hang, crash) = {
            let mut faults = self.faults.lock().unwrap();
            let crash = faults.crash.take_if(|wanted| text.contains(wanted.as_str())).is_some();
            (faults.hang.take_if(|wanted| text.contains(wanted.as_str())).is_some(), crash)
        };
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

    fn create(self: &Arc<Self>, request: Request) -> Result<Arc<Transaction>, Failure> {
        // Sockets of dead daemons stay behind; each transaction gets a path of its own.
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
        let refuse = self.faults.lock().unwrap().refuse.clone();
        if let Some((error, text)) = refuse {
            return Err(Failure::new(&error, text));
        }
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
                    active.title
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
        if std::mem::take(&mut self.faults.lock().unwrap().lose_reply) {
            return Ok(None);
        }
        call.reply(&(transaction.address(),))
    }

    /// Does the work of a started transaction.
    pub(crate) async fn execute(self: &Arc<Self>, transaction: &Arc<Transaction>, work: Work) -> Result<(), String> {
        if !matches!(work, Work::Foreign(_)) {
            let (fail, no_change) = {
                let mut faults = self.faults.lock().unwrap();
                (faults.fail.take(), std::mem::take(&mut faults.no_change))
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
            Work::KernelArgs { existing, added, replaced, removed, locked } => {
                let arguments = edit_arguments(&existing, &added, &replaced, &removed)?;
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

    /// Kernel arguments of the deployment that a new one starts from: the first in boot order.
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
        let pruned = self.sysroot.prune_images().map_err(|error| error.to_string())?;
        if pruned > 0 {
            transaction.message(&format!("Pruned images: {pruned} (layers: {pruned})")).await;
        }
        Ok(())
    }

    /// Stages an image, tells about it, and has systemd start the finalizer.
    async fn stage(self: &Arc<Self>, image: Image, arguments: Vec<String>, locked: bool) -> Result<Deployment, String> {
        let sysroot = self.sysroot.clone();
        let staged = tokio::task::spawn_blocking(move || sysroot.stage(&image, &arguments, locked))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("{error:#}"))?;
        self.events.emit(Event::Staged { reference: staged.reference.clone(), checksum: staged.checksum.clone() });
        if !self.lazy_finalizer.load(Ordering::SeqCst) {
            self.systemd.activate(FINALIZER).await.map_err(|result| format!("{FINALIZER}: {result}"))?;
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
        let pruned = self.sysroot.prune_images().map_err(|error| error.to_string())?;
        transaction
            .message(if changed { "Deployments changed" } else { "Deployments unchanged." })
            .await;
        if pruned > 0 {
            transaction.message(&format!("Pruned images: {pruned} (layers: {pruned})")).await;
        }
        Ok(())
    }

    fn boot_config(&self, id: &str, pending: bool) -> Result<BTreeMap<String, OwnedVariant>, Failure> {
        let deployments = self.sysroot.load();
        let found = match id {
            "" if pending => deployments.first(),
            "" => deployments.iter().find(|deployment| deployment.booted).or(deployments.first()),
            id => deployments.iter().find(|deployment| deployment.id() == id),
        };
        let deployment = found.ok_or_else(|| Failure::new(FAILED, format!("Invalid deployment id {id}")))?;
        Ok(BTreeMap::from([
            ("options".to_owned(), variant(deployment.options())),
            ("title".to_owned(), variant(format!("{} {}", deployment.osname, deployment.checksum))),
            ("linux".to_owned(), variant(format!("/ostree/{}/vmlinuz", deployment.checksum))),
        ]))
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
                for kind in &kinds {
                    if !["base", "pending-deploy", "rollback-deploy", "repomd"].contains(&kind.as_str()) {
                        return Err(Failure::new(FAILED, format!("Invalid cleanup type: {kind}")));
                    }
                }
                self.transaction(call, "cleanup", kinds.join(","), None, Work::Cleanup(kinds)).await
            }
            "KernelArgs" => {
                type Strings = Vec<String>;
                let (existing, added, replaced, removed, options): (String, Strings, Strings, Strings, Dict) =
                    body.deserialize()?;
                let title = lookup_str(&options, "initiating-command-line").or(Some("kargs".to_owned()));
                let locked = lookup_bool(&options, "lock-finalization") == Some(true);
                let argument = format!("+[{}] ~[{}] -[{}]", added.join(" "), replaced.join(" "), removed.join(" "));
                let work = Work::KernelArgs { existing, added, replaced, removed, locked };
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
                let (id, pending): (String, bool) = body.deserialize()?;
                let config = self.boot_config(&id, pending)?;
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
    /// Everything of the daemon dies with the machine.
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

/// Applies an edit to a kernel command line; `ostree=` is not part of the result.
fn edit_arguments(
    existing: &str,
    added: &[String],
    replaced: &[String],
    removed: &[String],
) -> Result<Vec<String>, String> {
    let mut words: Vec<String> = existing.split_whitespace().map(str::to_owned).collect();
    for argument in removed {
        let index = words
            .iter()
            .position(|word| word == argument || word.split('=').next() == Some(argument.as_str()))
            .ok_or_else(|| format!("No key '{argument}' found"))?;
        words.remove(index);
    }
    for argument in replaced {
        let (key, value) = argument.split_once('=').unwrap_or((argument, ""));
        let new = match value.split_once('=') {
            Some((_, new)) => format!("{key}={new}"),
            None => argument.clone(),
        };
        let index = words
            .iter()
            .position(|word| word.split('=').next() == Some(key))
            .ok_or_else(|| format!("No key '{key}' found"))?;
        words[index] = new;
    }
    words.extend(added.iter().cloned());
    words.retain(|word| !word.starts_with("ostree=") && !word.starts_with("BOOT_IMAGE="));
    Ok(words)
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
            return vec![Interface {
                name: SYSROOT,
                members: SYSROOT_MEMBERS,
                properties: vec![
                    ("Booted", variant(ObjectPath::try_from(os).expect("a valid path"))),
                    ("Path", variant("/")),
                    ("ActiveTransaction", variant(active)),
                    ("ActiveTransactionPath", variant(address)),
                    ("AutomaticUpdatePolicy", variant("none")),
                    ("Deployments", variant(list)),
                ],
            }];
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

    async fn call(self: &Arc<Self>, _connection: &Connection, call: &Call) -> Answer {
        if std::mem::take(&mut self.faults.lock().unwrap().exit_on_call) {
            self.idle_exit().await;
            return Ok(None);
        }
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
