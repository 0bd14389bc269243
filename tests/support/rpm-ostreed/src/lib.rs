//! rpm-ostree's daemon as its clients see it: objects, signatures, options, errors and the life of a transaction, after
//! rpm-ostree 2026.2 (src/daemon). A [`Host`] does the work: a made-up disk in the tests of one node, libostree in the
//! guest of vm-tests.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use zbus::message::Message;
use zbus::{Connection, MessageStream, ObjectPath, OwnedVariant};

pub mod bus;
mod deployment;
mod job;
mod transaction;

pub use deployment::Deployment;
pub use job::{Finalize, Job, KernelArguments, Rebase};
pub use transaction::{Request, Transaction};

use bus::{Answer, Call, Dict, Failure, Interface, Service, lookup_str, variant};

/// The daemon's bus name.
pub const NAME: &str = "org.projectatomic.rpmostree1";
/// The path of the sysroot's object.
pub const SYSROOT_PATH: &str = "/org/projectatomic/rpmostree1/Sysroot";
/// Its interface.
pub const SYSROOT: &str = "org.projectatomic.rpmostree1.Sysroot";
/// The interface of a stateroot's object.
pub const OS: &str = "org.projectatomic.rpmostree1.OS";
/// The interface of a transaction, at `/` of its own socket.
pub const TRANSACTION: &str = "org.projectatomic.rpmostree1.Transaction";
/// The name of `G_IO_ERROR_BUSY`.
pub const BUSY: &str = "org.gtk.GDBus.UnmappedGError.Quark._g_2dio_2derror_2dquark.Code26";

/// `G_IO_ERROR_FAILED`.
#[must_use]
pub fn failed(text: impl Into<String>) -> Failure {
    Failure::new("org.gtk.GDBus.UnmappedGError.Quark._g_2dio_2derror_2dquark.Code0", text)
}

/// `G_IO_ERROR_NOT_FOUND`.
fn not_found(text: impl Into<String>) -> Failure {
    Failure::new("org.gtk.GDBus.UnmappedGError.Quark._g_2dio_2derror_2dquark.Code1", text)
}

/// `G_IO_ERROR_BUSY`: another transaction, or another program with the sysroot's lock.
#[must_use]
pub fn busy(text: impl Into<String>) -> Failure {
    Failure::new(BUSY, text)
}

/// Another program holds the sysroot's lock.
#[must_use]
pub fn sysroot_is_locked() -> Failure {
    busy("System transaction in progress")
}

/// Connects to a transaction, starts it and waits for its end, as the command line does. An error is the daemon's text.
pub async fn follow(address: &str, mut say: impl FnMut(&str)) -> Result<(), String> {
    let error = |error: zbus::Error| error.to_string();
    let peer = zbus::connection::Builder::address(address).p2p().build().await.map_err(error)?;
    // Subscribed before the start, so that no signal is missed.
    let mut stream = MessageStream::from(&peer);
    peer.call_method(None::<&str>, "/", Some(TRANSACTION), "Start", &()).await.map_err(error)?;
    while let Some(Ok(message)) = bus::next(&mut stream).await {
        match message.header().member().map(|member| member.as_str()) {
            Some("Message") => say(&message.body().deserialize::<(String,)>().map_err(error)?.0),
            Some("Finished") => {
                let (success, text): (bool, String) = message.body().deserialize().map_err(error)?;
                let _ = peer.close().await;
                return if success { Ok(()) } else { Err(text) };
            }
            _ => {}
        }
    }
    Err("the daemon went away".to_owned())
}

/// The original's escaping of names in object paths; clients must not compute it.
#[must_use]
pub fn os_path(osname: &str) -> String {
    let escaped: String = osname
        .bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
            b'-' | b'/' => "_".to_owned(),
            other => format!("_{other:02X}"),
        })
        .collect();
    format!("/org/projectatomic/rpmostree1/{escaped}")
}

/// What a daemon of some version can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// 2026.2.
    #[default]
    Current,
    /// 2025.6 and older: `FinalizeDeployment` compares the ostree commit, also of a container image.
    FinalizesByCommit,
    /// Older than any that knows `lock-finalization` and `FinalizeDeployment`.
    WithoutLock,
}

impl Version {
    fn locks(self) -> bool {
        self != Self::WithoutLock
    }
}

/// What happens; heard before any client hears it.
#[derive(Clone, Copy, Debug)]
pub enum Happened<'a> {
    /// A method that creates a transaction was called.
    Requested(&'a Job),
    /// The transaction of this request started.
    Started(&'a Request),
    /// The transaction reports this to its clients.
    Said(&'a str),
    /// The daemon writes this to its journal.
    Logged(&'a str),
    /// The transaction of this request ended, with its error.
    Finished(&'a Request, Option<&'a str>),
}

/// The host below the daemon. The methods with a default are where a double misbehaves.
pub trait Host: Send + Sync + Sized + 'static {
    /// The sysroot's lock, which a transaction holds from its request to its end.
    type Lock: Send + 'static;

    /// Reads the deployments: the staged one, then the others in boot order.
    fn load(&self) -> impl Future<Output = Vec<Deployment>> + Send;

    /// Takes the sysroot's lock.
    fn lock(&self) -> impl Future<Output = Result<Self::Lock, Failure>> + Send;

    /// Does the work of a started transaction, until it is done or cancelled.
    fn work(
        &self,
        transaction: &Arc<Transaction<Self>>,
        lock: Self::Lock,
    ) -> impl Future<Output = Result<(), String>> + Send;

    /// `systemctl reboot`.
    fn reboot(&self) -> impl Future<Output = ()> + Send;

    /// The path for the next transaction's socket.
    fn socket(&self) -> PathBuf;

    /// Hears what happens.
    fn hear(&self, happened: Happened<'_>);

    /// Acts on something that was just said or logged.
    fn disturb(&self, daemon: &Arc<Daemon<Self>>, text: &str) -> impl Future<Output = ()> + Send {
        let _ = (daemon, text);
        async {}
    }

    /// Whether this user may change the host. Other users may do what polkit allows, which is nothing here.
    fn trusts(&self, member: &str, uid: u32) -> bool {
        let _ = member;
        uid == 0
    }

    /// What this daemon can do.
    fn version(&self) -> Version {
        Version::Current
    }

    /// Whether the daemon exits instead of answering the next call.
    fn leaves(&self, daemon: &Arc<Daemon<Self>>) -> impl Future<Output = bool> + Send {
        let _ = daemon;
        async { false }
    }

    /// Answers the request of a transaction with its address.
    fn hand_out(&self, call: &Call, address: String) -> Answer {
        call.reply(&(address,))
    }

    /// Changes the shown properties of the sysroot.
    fn amend(&self, properties: &mut [(&'static str, OwnedVariant)]) {
        let _ = properties;
    }

    /// Sends messages to a client before its `Start` is answered.
    fn chatter(&self, client: &Connection) -> impl Future<Output = zbus::Result<()>> + Send {
        let _ = client;
        async { Ok(()) }
    }

    /// The error of a cancelled transaction; `None` if it can no longer be cancelled.
    fn cancel(&self) -> Option<String> {
        Some("Operation was cancelled".to_owned())
    }

    /// Longest time for clients to stay after the end (rpmostreed-sysroot.cxx, `FORCE_CLOSE_TXN_TIMEOUT_SECS`).
    fn patience(&self) -> Duration {
        Duration::from_secs(30)
    }

    /// Whether the machine runs: without power nothing ends.
    fn has_power(&self) -> bool {
        true
    }
}

struct State<H: Host> {
    connection: Option<Connection>,
    active: Option<Arc<Transaction<H>>>,
    deployments: Vec<Deployment>,
    clients: HashMap<String, String>,
    rebooting: bool,
}

/// The daemon.
pub struct Daemon<H: Host> {
    /// The host below it.
    pub host: H,
    state: Mutex<State<H>>,
    changed: Notify,
}

impl<H: Host> fmt::Debug for Daemon<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Daemon").finish_non_exhaustive()
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<H: Host> Daemon<H> {
    /// A daemon that is not started.
    pub fn new(host: H) -> Self {
        let state = State {
            connection: None,
            active: None,
            deployments: Vec::new(),
            clients: HashMap::new(),
            rebooting: false,
        };
        Self { host, state: Mutex::new(state), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State<H>> {
        lock(&self.state)
    }

    /// Reads the sysroot and takes the name.
    pub async fn start(self: &Arc<Self>, connection: Connection) -> zbus::Result<()> {
        let deployments = self.host.load().await;
        {
            let mut state = self.state();
            state.deployments = deployments;
            state.connection = Some(connection.clone());
        }
        tokio::spawn(bus::serve(MessageStream::from(&connection), self.clone()));
        bus::bus_call(&connection, "AddMatch", &("type='signal',member='NameOwnerChanged'",)).await?;
        connection.request_name(NAME).await
    }

    /// Ends the process: the connection first, then the rest of a transaction.
    pub async fn stop(self: &Arc<Self>) {
        let (connection, active) = {
            let mut state = self.state();
            state.clients.clear();
            state.rebooting = false;
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

    /// Whether it has started.
    pub fn is_running(&self) -> bool {
        self.state().connection.is_some()
    }

    /// The transaction that runs or waits for its start.
    pub fn active(&self) -> Option<Arc<Transaction<H>>> {
        self.state().active.clone()
    }

    /// Whether it has neither clients nor a transaction.
    pub fn is_idle(&self) -> bool {
        let state = self.state();
        state.clients.is_empty() && state.active.is_none()
    }

    /// Waits until clients, the transaction or the deployments change.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Reads the sysroot again and reports changes.
    pub(crate) async fn refresh(&self) {
        let deployments = self.host.load().await;
        let old = std::mem::replace(&mut self.state().deployments, deployments.clone());
        if old != deployments {
            self.tell().await;
        }
    }

    async fn tell(&self) {
        self.changed.notify_one();
        let connection = self.state().connection.clone();
        let Some(connection) = connection else { return };
        let paths: BTreeSet<String> = self.state().deployments.iter().map(|one| os_path(&one.osname)).collect();
        for path in [SYSROOT_PATH.to_owned()].into_iter().chain(paths) {
            for interface in self.at(&path) {
                bus::properties_changed(&connection, &path, &interface).await;
            }
        }
    }

    /// Runs when the transaction is over and its clients have left.
    pub(crate) async fn closed(&self, transaction: &Arc<Transaction<H>>) {
        let mine = self.state().active.take_if(|active| Arc::ptr_eq(active, transaction));
        if mine.is_some() {
            self.tell().await;
        }
    }

    /// Creates a transaction, which gets the sysroot's lock.
    pub async fn create(self: &Arc<Self>, request: Request, lock: H::Lock) -> Result<Arc<Transaction<H>>, Failure> {
        let transaction = Transaction::listen(self, request, lock).map_err(|error| failed(error.to_string()))?;
        self.state().active = Some(transaction.clone());
        self.tell().await;
        Ok(transaction)
    }

    /// Creates the transaction of a call, or joins an equal one.
    async fn transact(self: &Arc<Self>, call: &Call, (job, title): (Job, String)) -> Answer {
        self.host.hear(Happened::Requested(&job));
        if self.state().rebooting {
            return Err(failed("Reboot initiated, cannot start new transaction"));
        }
        if let Some(active) = self.active() {
            if active.is_of(call) {
                return call.reply(&(active.address(),));
            }
            return Err(busy(format!(
                "Transaction in progress: {}\n You can cancel the current transaction with `rpm-ostree cancel`",
                active.shown_title()
            )));
        }
        let lock = self.host.lock().await?;
        self.refresh().await;
        let id = self.state().clients.get(&call.sender).cloned().unwrap_or_default();
        let client = match id.as_str() {
            "" => format!("client(dbus{} uid:0)", call.sender),
            id => format!("client(id:{id} dbus{} uid:0)", call.sender),
        };
        let request = Request {
            method: call.member.clone(),
            parameters: call.message.body().data().bytes().to_vec(),
            sender: call.sender.clone(),
            object: call.path.clone(),
            client,
            title,
            job,
        };
        let transaction = self.create(request, lock).await?;
        self.host.hand_out(call, transaction.address())
    }

    /// Does the work of a started transaction.
    pub(crate) async fn execute(
        self: &Arc<Self>,
        transaction: &Arc<Transaction<H>>,
        lock: H::Lock,
    ) -> Result<(), String> {
        let deployments = self.host.load().await;
        let first = deployments.first();
        match &transaction.request.job {
            Job::Rebase(rebase) => {
                rebase.check()?;
                // The first in boot order, not the booted one; the texts are compared.
                if first.is_some_and(|first| first.reference == rebase.reference) {
                    return Err(format!("Old and new refs are equal: {}", rebase.reference));
                }
                self.host.work(transaction, lock).await
            }
            Job::Finalize(finalize) => {
                let into = self.may_finalize(first, finalize).await?;
                let unlocked = self.host.work(transaction, lock).await;
                unlocked.map_err(|error| format!("Failed to unlock finalization of staged deployment: {error}"))?;
                let text = format!("Finalized deployment; rebooting into {into}");
                self.host.hear(Happened::Logged(&text));
                self.host.disturb(self, &text).await;
                self.state().rebooting = true;
                Ok(())
            }
            _ => self.host.work(transaction, lock).await,
        }
    }

    /// The checks before the unlocking, in the original's order; returns what boots.
    async fn may_finalize(&self, first: Option<&Deployment>, finalize: &Finalize) -> Result<String, String> {
        let first = first.ok_or("No deployments found")?;
        if !first.staged {
            return Err("No pending staged deployment found".to_owned());
        }
        let base = first.base_checksum.as_ref().unwrap_or(&first.checksum);
        let by_commit = self.host.version() == Version::FinalizesByCommit;
        let found = if by_commit || first.reference.is_empty() { base } else { &first.digest };
        match &finalize.checksum {
            None if !finalize.allow_missing_checksum => return Err("Missing expected checksum".to_owned()),
            Some(wanted) if wanted != found => {
                return Err(format!("Expected staged base checksum {wanted}, but found {found}"));
            }
            _ => {}
        }
        let connection = self.state().connection.clone().ok_or("the daemon stops")?;
        check_inhibitors(&connection).await?;
        if !first.locked && !finalize.allow_unlocked {
            return Err("Staged deployment already unlocked".to_owned());
        }
        Ok(found.clone())
    }

    /// A finished transaction's clients know its end: the reboot that it asked for begins.
    pub(crate) async fn reboot_if_due(&self) {
        if self.state().rebooting {
            self.host.hear(Happened::Logged("Initiating reboot requested from transaction"));
            self.host.reboot().await;
        }
    }

    async fn authorize(&self, connection: &Connection, call: &Call) -> Result<(), Failure> {
        let reply = bus::bus_call(connection, "GetConnectionUnixUser", &(call.sender.as_str(),)).await?;
        let (uid,): (u32,) = reply.body().deserialize()?;
        if self.host.trusts(&call.member, uid) || ["GetOS", "Reload"].contains(&call.member.as_str()) {
            return Ok(());
        }
        let object = if call.path == SYSROOT_PATH { "Sysroot" } else { "OS" };
        let text = format!("rpmostreed {object} operation {} not allowed for user", call.member);
        Err(Failure::new("org.freedesktop.DBus.Error.AccessDenied", text))
    }

    async fn call_sysroot(&self, call: &Call) -> Answer {
        let body = call.message.body();
        match call.member.as_str() {
            "RegisterClient" => {
                let (options,): (Dict,) = body.deserialize()?;
                let id = lookup_str(&options, "id").filter(|id| id != "cli").unwrap_or_default();
                self.state().clients.insert(call.sender.clone(), id);
                self.changed.notify_one();
                call.reply(&())
            }
            "UnregisterClient" => {
                let (_options,): (Dict,) = body.deserialize()?;
                self.state().clients.remove(&call.sender);
                self.changed.notify_one();
                call.reply(&())
            }
            "Reload" => {
                self.refresh().await;
                call.reply(&())
            }
            "GetOS" => {
                let (name,): (String,) = body.deserialize()?;
                if !self.state().deployments.iter().any(|one| one.osname == name) {
                    return Err(not_found(format!("OS name \"{name}\" not found")));
                }
                call.reply(&(ObjectPath::try_from(os_path(&name))?,))
            }
            _ => call.unknown(),
        }
    }
}

/// `check_sd_inhibitor_locks` (rpmostreed-utils.cxx).
async fn check_inhibitors(connection: &Connection) -> Result<(), String> {
    type Inhibitor = (String, String, String, String, u32, u32);
    let manager = "org.freedesktop.login1.Manager";
    let asked = connection
        .call_method(Some("org.freedesktop.login1"), "/org/freedesktop/login1", Some(manager), "ListInhibitors", &())
        .await;
    let listed = asked.and_then(|reply| reply.body().deserialize::<(Vec<Inhibitor>,)>());
    let (all,) = listed.map_err(|error| format!("Checking systemd inhibitor locks: {error}"))?;
    let mut blocking = all.iter().filter(|(what, _, _, mode, ..)| what.contains("shutdown") && mode == "block");
    let Some((_, who, why, ..)) = blocking.next() else { return Ok(()) };
    let mut text = format!("Reboot blocked by a systemd inhibitor lock in `block` mode\nHeld by: {who}\nReason: {why}");
    let others = blocking.count();
    if others > 0 {
        text.push_str(&format!(
            "\nand {others} other blocking inhibitor lock(s)\nUse `systemd-inhibit --list` to see details"
        ));
    }
    Err(text)
}

const SYSROOT_MEMBERS: &str = r#"
<method name="RegisterClient"><arg name="options" type="a{sv}" direction="in"/></method>
<method name="UnregisterClient"><arg name="options" type="a{sv}" direction="in"/></method>
<method name="Reload"/>
<method name="GetOS"><arg name="name" type="s" direction="in"/><arg name="object_path" type="o" direction="out"/></method>
"#;

macro_rules! old_os_members {
    () => {
        r#"
<method name="Rebase"><arg name="options" type="a{sv}" direction="in"/><arg name="refspec" type="s" direction="in"/><arg name="packages" type="as" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>
<method name="Cleanup"><arg name="elements" type="as" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>
<method name="KernelArgs"><arg name="existing_kernel_arg_string" type="s" direction="in"/><arg name="kernel_args_added" type="as" direction="in"/><arg name="kernel_args_replaced" type="as" direction="in"/><arg name="kernel_args_removed" type="as" direction="in"/><arg name="options" type="a{sv}" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>
<method name="Rollback"><arg name="options" type="a{sv}" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>
<method name="Upgrade"><arg name="options" type="a{sv}" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>
"#
    };
}

const OLD_OS_MEMBERS: &str = old_os_members!();

const OS_MEMBERS: &str = concat!(
    old_os_members!(),
    r#"<method name="FinalizeDeployment"><arg name="options" type="a{sv}" direction="in"/><arg name="transaction_address" type="s" direction="out"/></method>"#
);

impl<H: Host> Service for Daemon<H> {
    fn at(&self, path: &str) -> Vec<Interface> {
        let state = self.state();
        let deployments = &state.deployments;
        let dict = |found: Option<&Deployment>| variant(found.map(Deployment::dict).unwrap_or_default());
        let booted = deployments.iter().position(|deployment| deployment.booted);
        let path_of = |deployment: &Deployment| os_path(&deployment.osname);
        if path == SYSROOT_PATH {
            let active = match state.active.as_ref().map(|active| &active.request) {
                Some(request) => (request.method.clone(), request.sender.clone(), request.object.clone()),
                None => Default::default(),
            };
            let address = state.active.as_ref().map(|active| active.address()).unwrap_or_default();
            let os = booted.and_then(|index| deployments.get(index)).map_or("/".to_owned(), path_of);
            let list: Vec<Dict> = deployments.iter().map(Deployment::dict).collect();
            let mut properties = vec![
                ("Booted", variant(ObjectPath::try_from(os).expect("an escaped path is one"))),
                ("Path", variant("/")),
                ("ActiveTransaction", variant(active)),
                ("ActiveTransactionPath", variant(address)),
                ("AutomaticUpdatePolicy", variant("none")),
                ("Deployments", variant(list)),
            ];
            self.host.amend(&mut properties);
            return vec![Interface { name: SYSROOT, members: SYSROOT_MEMBERS, properties }];
        }
        let Some(name) = deployments.iter().find(|one| path_of(one) == path).map(|one| one.osname.clone()) else {
            return Vec::new();
        };
        vec![Interface {
            name: OS,
            members: if self.host.version().locks() { OS_MEMBERS } else { OLD_OS_MEMBERS },
            properties: vec![
                ("Name", variant(name)),
                ("BootedDeployment", dict(booted.and_then(|index| deployments.get(index)))),
                ("DefaultDeployment", dict(deployments.first())),
                ("RollbackDeployment", dict(booted.and_then(|index| deployments.get(index + 1)))),
            ],
        }]
    }

    async fn leaves(self: &Arc<Self>) -> bool {
        self.host.leaves(self).await
    }

    async fn call(self: &Arc<Self>, connection: &Connection, call: &Call) -> Answer {
        self.authorize(connection, call).await?;
        if call.path == SYSROOT_PATH {
            return self.call_sysroot(call).await;
        }
        let is_os = self.state().deployments.iter().any(|one| os_path(&one.osname) == call.path);
        match Job::of(call, self.host.version())? {
            Some(job) if is_os => self.transact(call, job).await,
            _ => call.unknown(),
        }
    }

    async fn signal(self: &Arc<Self>, message: &Message) {
        let Ok((name, _, new)) = message.body().deserialize::<(String, String, String)>() else { return };
        if !new.is_empty() {
            return;
        }
        let active = {
            let mut state = self.state();
            state.clients.remove(&name);
            state.active.clone()
        };
        self.changed.notify_one();
        if let Some(active) = active
            && active.request.sender == name
            && active.is_waiting()
        {
            active.abandon().await;
        }
    }
}
