//! A stand-in for rpm-ostree's daemon, which Debian does not have: its interface on the system bus, thin, over real
//! work. It keeps the original's guarantees: the sysroot is loaded before the name is claimed, transactions have a
//! private socket and begin with `Start`, an equal request joins, another one is refused as busy, a client that
//! disconnects takes its unstarted transaction with it, and an idle daemon exits.

mod transaction;
mod work;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use tokio::sync::{Notify, mpsc, watch};
use zbus::message::Header;
use zbus::names::{BusName, ErrorName};
use zbus::{Connection, DBusError, Message, OwnedObjectPath, OwnedVariant};

use transaction::{Request, Transaction};
use work::{Deployment, Dict, Job, Refusal};

const NAME: &str = "org.projectatomic.rpmostree1";
const SYSROOT: &str = "/org/projectatomic/rpmostree1/Sysroot";
/// Without clients and transaction, the daemon exits after this long.
const IDLE: Duration = Duration::from_secs(60);

/// An error in its form on the bus.
#[derive(Debug)]
struct Failure {
    name: &'static str,
    text: String,
}

impl Failure {
    /// `G_IO_ERROR_FAILED`.
    fn failed(text: impl Into<String>) -> Self {
        Self { name: "org.gtk.GDBus.UnmappedGError.Quark._g_2dio_2derror_2dquark.Code0", text: text.into() }
    }

    /// `G_IO_ERROR_NOT_FOUND`.
    fn not_found(text: impl Into<String>) -> Self {
        Self { name: "org.gtk.GDBus.UnmappedGError.Quark._g_2dio_2derror_2dquark.Code1", text: text.into() }
    }

    /// `G_IO_ERROR_BUSY`.
    fn busy(text: impl Into<String>) -> Self {
        Self { name: "org.gtk.GDBus.UnmappedGError.Quark._g_2dio_2derror_2dquark.Code26", text: text.into() }
    }

    /// An error of the daemon's own domain.
    fn invalid(text: impl Into<String>) -> Self {
        Self { name: "org.projectatomic.rpmostreed.Error.Failed", text: text.into() }
    }

    fn denied(text: impl Into<String>) -> Self {
        Self { name: "org.freedesktop.DBus.Error.AccessDenied", text: text.into() }
    }
}

impl DBusError for Failure {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
        Message::error(call, self.name()).build(&(self.text.as_str(),))
    }

    fn name(&self) -> ErrorName<'_> {
        ErrorName::from_static_str_unchecked(self.name)
    }

    fn description(&self) -> Option<&str> {
        Some(&self.text)
    }
}

/// The daemon.
pub struct Daemon {
    state: Mutex<State>,
    /// Notified when clients or the transaction change.
    changed: Notify,
}

#[derive(Default)]
struct State {
    deployments: Vec<Deployment>,
    clients: BTreeSet<String>,
    active: Option<Arc<Transaction>>,
}

impl Daemon {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("not poisoned")
    }

    /// Reads the sysroot again.
    async fn reload(&self) {
        match tokio::task::spawn_blocking(work::load).await {
            Ok(Ok(deployments)) => self.state().deployments = deployments,
            Ok(Err(error)) => eprintln!("reading the sysroot: {error:#}"),
            Err(error) => eprintln!("reading the sysroot: {error}"),
        }
    }

    /// The last client of a finished transaction disconnected.
    fn closed(&self, transaction: &Arc<Transaction>) {
        let mut state = self.state();
        if state.active.as_ref().is_some_and(|active| Arc::ptr_eq(active, transaction)) {
            state.active = None;
        }
        drop(state);
        self.changed.notify_one();
    }

    /// A name left the bus.
    fn left(&self, name: &str) {
        let mut state = self.state();
        state.clients.remove(name);
        if let Some(active) = state.active.as_ref().filter(|active| active.client == name) {
            active.abandon();
        }
        drop(state);
        self.changed.notify_one();
    }

    fn is_idle(&self) -> bool {
        let state = self.state();
        state.clients.is_empty() && state.active.is_none()
    }

    /// Creates a transaction, or joins an equal one; returns its address.
    async fn transact(
        self: &Arc<Self>,
        method: &'static str,
        job: Job,
        options: &HashMap<String, OwnedVariant>,
        header: &Header<'_>,
    ) -> Result<String, Failure> {
        let otherwise = if method == "KernelArgs" { "kargs".to_owned() } else { method.to_lowercase() };
        let title = text(options, "initiating-command-line").unwrap_or(otherwise);
        let client = header.sender().map(|sender| sender.to_string()).unwrap_or_default();
        let request = Request { job, title };
        if let Some(active) = &self.state().active {
            if active.request == request {
                return Ok(Transaction::address());
            }
            return Err(Failure::busy(format!(
                "Transaction in progress: {}\n You can cancel the current transaction with `rpm-ostree cancel`",
                active.title()
            )));
        }
        let (said, saying) = mpsc::unbounded_channel();
        let (cancelled, is_cancelled) = watch::channel(false);
        let worker = work::prepare(request.job.clone(), said, is_cancelled).await.map_err(|refusal| match refusal {
            Refusal::Busy => Failure::busy("System transaction in progress"),
            Refusal::Failed(text) => Failure::failed(text),
        })?;
        let transaction = Transaction::listen(self, request, method, client, worker, saying, cancelled)
            .map_err(|error| Failure::failed(error.to_string()))?;
        self.state().active = Some(transaction);
        Ok(Transaction::address())
    }
}

/// An option of a known type: another type counts as absent.
fn text(options: &HashMap<String, OwnedVariant>, key: &str) -> Option<String> {
    String::try_from(options.get(key)?.try_clone().ok()?).ok()
}

fn flag(options: &HashMap<String, OwnedVariant>, key: &str) -> Option<bool> {
    bool::try_from(options.get(key)?.try_clone().ok()?).ok()
}

/// Options of the original that this stand-in does not support: refused, so that no test relies on them (these bindings
/// of libostree cannot lock a stage). Options that the original does not know are ignored.
fn check_options(options: &HashMap<String, OwnedVariant>) -> Result<(), Failure> {
    const FLAGS: [&str; 7] =
        ["lock-finalization", "download-only", "no-pull-base", "dry-run", "cache-only", "reboot", "apply-live"];
    const OTHERS: [&str; 3] = ["revision", "append-if-missing", "delete-if-present"];
    let set = FLAGS.into_iter().find(|key| flag(options, key) == Some(true));
    let present = OTHERS.into_iter().find(|key| options.contains_key(*key));
    let older = Some("allow-downgrade").filter(|key| flag(options, key) == Some(false));
    match set.or(present).or(older) {
        Some(key) => Err(Failure::failed(format!("the stand-in for rpm-ostree does not do `{key}`"))),
        None => Ok(()),
    }
}

/// Root may do everything; the bus tells who calls. Other users may do what polkit allows, which is nothing here.
async fn authorize(bus: &Connection, header: &Header<'_>, object: &str) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::failed(format!("Failed direct authorization: {error}"));
    let sender = header.sender().ok_or_else(|| failed(&"no sender"))?;
    let daemon = zbus::fdo::DBusProxy::new(bus).await.map_err(|error| failed(&error))?;
    let uid = daemon.get_connection_unix_user(BusName::Unique(sender.to_owned())).await;
    if uid.map_err(|error| failed(&error))? == 0 {
        return Ok(());
    }
    let member = header.member().map(|member| member.to_string()).unwrap_or_default();
    Err(Failure::denied(format!("rpmostreed {object} operation {member} not allowed for user")))
}

/// The original's escaping of names in object paths; clients must not compute it.
fn os_path(osname: &str) -> String {
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

fn copy(dict: &Dict) -> Dict {
    dict.iter().filter_map(|(key, value)| Some((key.clone(), value.try_clone().ok()?))).collect()
}

struct Sysroot(Arc<Daemon>);

#[zbus::interface(name = "org.projectatomic.rpmostree1.Sysroot")]
impl Sysroot {
    async fn register_client(
        &self,
        _options: HashMap<String, OwnedVariant>,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<(), Failure> {
        authorize(bus, &header, "Sysroot").await?;
        if let Some(sender) = header.sender() {
            self.0.state().clients.insert(sender.to_string());
        }
        self.0.changed.notify_one();
        Ok(())
    }

    async fn unregister_client(
        &self,
        _options: HashMap<String, OwnedVariant>,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<(), Failure> {
        authorize(bus, &header, "Sysroot").await?;
        if let Some(sender) = header.sender() {
            self.0.state().clients.remove(sender.as_str());
        }
        self.0.changed.notify_one();
        Ok(())
    }

    async fn reload(&self) {
        self.0.reload().await;
    }

    #[zbus(name = "GetOS")]
    fn get_os(&self, name: &str) -> Result<OwnedObjectPath, Failure> {
        if !self.0.state().deployments.iter().any(|one| one.osname == name) {
            return Err(Failure::not_found(format!("OS name \"{name}\" not found")));
        }
        OwnedObjectPath::try_from(os_path(name)).map_err(|error| Failure::failed(error.to_string()))
    }

    #[zbus(property)]
    fn booted(&self) -> OwnedObjectPath {
        let state = self.0.state();
        let path = state.deployments.iter().find(|one| one.booted).map_or("/".to_owned(), |one| os_path(&one.osname));
        OwnedObjectPath::try_from(path).expect("an escaped path is one")
    }

    #[zbus(property)]
    fn path(&self) -> &str {
        "/"
    }

    #[zbus(property)]
    fn automatic_update_policy(&self) -> &str {
        "none"
    }

    #[zbus(property)]
    fn active_transaction(&self) -> (String, String, String) {
        match &self.0.state().active {
            Some(active) => (active.method.to_owned(), active.client.clone(), "/".to_owned()),
            None => Default::default(),
        }
    }

    #[zbus(property)]
    fn active_transaction_path(&self) -> String {
        self.0.state().active.as_ref().map(|_| Transaction::address()).unwrap_or_default()
    }

    #[zbus(property)]
    fn deployments(&self) -> Vec<Dict> {
        self.0.state().deployments.iter().map(|one| copy(&one.dict)).collect()
    }
}

struct Os(Arc<Daemon>);

#[zbus::interface(name = "org.projectatomic.rpmostree1.OS")]
impl Os {
    async fn rebase(
        &self,
        options: HashMap<String, OwnedVariant>,
        refspec: String,
        _packages: Vec<String>,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<String, Failure> {
        authorize(bus, &header, "OS").await?;
        check_options(&options)?;
        let job = Job::Rebase { reference: refspec };
        self.0.transact("Rebase", job, &options, &header).await
    }

    async fn cleanup(
        &self,
        kinds: Vec<String>,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<String, Failure> {
        const KINDS: [&str; 4] = ["base", "pending-deploy", "rollback-deploy", "repomd"];
        authorize(bus, &header, "OS").await?;
        if let Some(kind) = kinds.iter().find(|kind| !KINDS.contains(&kind.as_str())) {
            return Err(Failure::failed(format!("Invalid cleanup type: {kind}")));
        }
        self.0.transact("Cleanup", Job::Cleanup { kinds }, &HashMap::new(), &header).await
    }

    #[allow(clippy::too_many_arguments, reason = "as many as the original's method has, and two of the bus's")]
    async fn kernel_args(
        &self,
        existing: String,
        added: Vec<String>,
        replaced: Vec<String>,
        removed: Vec<String>,
        options: HashMap<String, OwnedVariant>,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<String, Failure> {
        authorize(bus, &header, "OS").await?;
        check_options(&options)?;
        let last = text(&options, "final-kernel-args");
        let job = Job::KernelArguments { existing, added, replaced, removed, last };
        self.0.transact("KernelArgs", job, &options, &header).await
    }

    async fn rollback(
        &self,
        options: HashMap<String, OwnedVariant>,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<String, Failure> {
        authorize(bus, &header, "OS").await?;
        check_options(&options)?;
        self.0.transact("Rollback", Job::Rollback, &options, &header).await
    }

    /// By index, also where the original's XML names it otherwise, or the base of a new deployment; an error where a
    /// deployment lacks a key.
    fn get_deployment_boot_config(
        &self,
        index: &str,
        is_pending: bool,
    ) -> Result<HashMap<String, OwnedVariant>, Failure> {
        let state = self.0.state();
        if index.bytes().any(|byte| !byte.is_ascii_digit()) {
            return Err(Failure::invalid(format!("Invalid deployment index {index}, must be a number and >= 0")));
        }
        let number = match index {
            "" if is_pending => 0,
            "" => state.deployments.iter().position(|one| one.booted).unwrap_or(0),
            index => index.parse().unwrap_or(usize::MAX),
        };
        let deployment = state.deployments.get(number).ok_or_else(|| {
            let count = state.deployments.len();
            Failure::invalid(format!("Out of range deployment index {number}, expected < {count}"))
        })?;
        if !deployment.boot.iter().any(|(key, _)| *key == "options") {
            eprintln!("os_handle_get_deployment_boot_config: assertion failed: (value)");
            std::process::abort();
        }
        let value = |text: &String| OwnedVariant::try_from(zbus::Variant::from(text.clone()));
        deployment
            .boot
            .iter()
            .map(|(key, text)| Ok(((*key).to_owned(), value(text).map_err(|e| Failure::invalid(e.to_string()))?)))
            .collect()
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let daemon = Arc::new(Daemon { state: Mutex::default(), changed: Notify::new() });
    let deployments = tokio::task::spawn_blocking(work::load).await?.context("Opening the sysroot")?;
    let names: BTreeSet<String> = deployments.iter().map(|one| one.osname.clone()).collect();
    daemon.state().deployments = deployments;

    let bus = Connection::system().await?;
    let watch = zbus::fdo::DBusProxy::new(&bus).await?;
    let mut changes = watch.receive_name_owner_changed().await?;
    let server = bus.object_server();
    server.at(SYSROOT, Sysroot(daemon.clone())).await?;
    for name in names {
        server.at(os_path(&name), Os(daemon.clone())).await?;
    }
    bus.request_name(NAME).await?;

    let watched = daemon.clone();
    tokio::spawn(async move {
        while let Some(change) = changes.next().await {
            if let Ok(args) = change.args()
                && args.new_owner().is_none()
            {
                watched.left(args.name().as_str());
            }
        }
    });
    // Idle for long enough: exit, to be activated again.
    loop {
        let changed = tokio::time::timeout(IDLE, daemon.changed.notified()).await;
        if changed.is_err() && daemon.is_idle() {
            println!("In idle state; will auto-exit");
            bus.release_name(NAME).await?;
            return Ok(());
        }
    }
}
