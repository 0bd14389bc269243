//! One transaction: its peer-to-peer socket, its clients, its states.

use std::collections::HashMap;
use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use zbus::connection::Builder;
use zbus::{Connection, Guid};

use crate::bus::{self, Answer, Call, Interface, Service, variant};
use crate::{Daemon, Happened, Host, Job, TRANSACTION, lock};

/// Longest time for one client to read a message: a client that does not read must not block the daemon.
const TELLING: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Running,
    Finished(bool, String),
}

/// The request of a transaction.
#[derive(Debug)]
pub struct Request {
    /// The method.
    pub method: String,
    /// The serialized parameters: an equal request joins the transaction.
    pub parameters: Vec<u8>,
    /// The name of the requesting client on the bus.
    pub sender: String,
    /// The object that was called.
    pub object: String,
    /// The description of the client.
    pub client: String,
    /// The title.
    pub title: String,
    /// The work.
    pub job: Job,
}

/// A transaction.
pub struct Transaction<H: Host> {
    pub(crate) request: Request,
    socket: PathBuf,
    daemon: Weak<Daemon<H>>,
    phase: Mutex<Phase>,
    lock: Mutex<Option<H::Lock>>,
    cancelled: watch::Sender<Option<String>>,
    peers: Mutex<HashMap<u64, Connection>>,
    next_peer: AtomicU64,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl<H: Host> fmt::Debug for Transaction<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transaction").field("request", &self.request).finish_non_exhaustive()
    }
}

impl<H: Host> Transaction<H> {
    /// Listens for the transaction's clients.
    pub(crate) fn listen(daemon: &Arc<Daemon<H>>, request: Request, held: H::Lock) -> std::io::Result<Arc<Self>> {
        let socket = daemon.host.socket();
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666))?;
        let this = Arc::new(Self {
            request,
            socket,
            daemon: Arc::downgrade(daemon),
            phase: Mutex::new(Phase::Waiting),
            lock: Mutex::new(Some(held)),
            cancelled: watch::channel(None).0,
            peers: Mutex::default(),
            next_peer: AtomicU64::new(0),
            tasks: Mutex::default(),
        });
        let accepting = this.clone();
        this.keep(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let transaction = accepting.clone();
                tokio::spawn(async move {
                    if let Ok(stream) = stream.into_std() {
                        transaction.attend(stream).await;
                    }
                });
            }
        }));
        Ok(this)
    }

    /// The address of its socket.
    pub fn address(&self) -> String {
        format!("unix:path={}", self.socket.display())
    }

    fn keep<T>(&self, task: tokio::task::JoinHandle<T>) {
        lock(&self.tasks).push(task.abort_handle());
    }

    /// Serves one client until it disconnects.
    async fn attend(self: &Arc<Self>, stream: std::os::unix::net::UnixStream) {
        let built = Builder::unix_stream(stream).server(Guid::generate()).p2p().build_message_stream().await;
        let Ok(stream) = built else { return };
        let id = self.next_peer.fetch_add(1, Ordering::SeqCst);
        lock(&self.peers).insert(id, Connection::from(&stream));
        bus::serve(stream, Arc::new(Peer { transaction: self.clone() })).await;
        lock(&self.peers).remove(&id);
        self.close_if_done().await;
    }

    /// Whether `request` is this one.
    pub(crate) fn is_of(&self, call: &Call) -> bool {
        self.request.method == call.member && self.request.parameters == call.message.body().data().bytes()
    }

    pub(crate) fn is_waiting(&self) -> bool {
        *lock(&self.phase) == Phase::Waiting
    }

    /// Starts the transaction unless it was started; returns whether this call did.
    pub fn start(self: &Arc<Self>) -> bool {
        {
            let mut phase = lock(&self.phase);
            if *phase != Phase::Waiting {
                return false;
            }
            *phase = Phase::Running;
        }
        let held = lock(&self.lock).take();
        let (Some(daemon), Some(held)) = (self.daemon.upgrade(), held) else { return false };
        daemon.host.hear(Happened::Started(&self.request));
        let this = self.clone();
        self.keep(tokio::spawn(async move {
            let outcome = daemon.execute(&this, held).await;
            this.finish(&daemon, outcome).await;
        }));
        true
    }

    /// Waits until the transaction is cancelled; returns the error of its end.
    pub async fn cancelled(&self) -> String {
        let mut cancelled = self.cancelled.subscribe();
        let text = cancelled.wait_for(Option::is_some).await;
        text.ok().and_then(|text| text.clone()).unwrap_or_default()
    }

    fn cancel(&self) {
        if let Some(text) = self.daemon.upgrade().and_then(|daemon| daemon.host.cancel()) {
            self.cancelled.send_replace(Some(text));
        }
    }

    /// The client that requested it left the bus before the start: the transaction ends without a signal.
    pub(crate) async fn abandon(self: &Arc<Self>) {
        *lock(&self.phase) = Phase::Finished(false, String::new());
        drop(lock(&self.lock).take());
        self.force_close().await;
    }

    /// The title that clients see: a deploying transaction gets its own when it starts.
    pub(crate) fn shown_title(&self) -> &str {
        let waits = self.request.job.deploys() && self.is_waiting();
        if waits { "new-deployment" } else { &self.request.title }
    }

    /// The work.
    pub fn job(&self) -> &Job {
        &self.request.job
    }

    /// The title after the start.
    pub fn title(&self) -> &str {
        &self.request.title
    }

    async fn finish(self: &Arc<Self>, daemon: &Arc<Daemon<H>>, outcome: Result<(), String>) {
        if !daemon.host.has_power() {
            return;
        }
        daemon.refresh().await;
        daemon.host.hear(Happened::Finished(&self.request, outcome.as_ref().err().map(String::as_str)));
        let (success, text) = (outcome.is_ok(), outcome.err().unwrap_or_default());
        *lock(&self.phase) = Phase::Finished(success, text.clone());
        self.signal("Finished", &(success, text)).await;
        let (this, daemon, patience) = (self.clone(), daemon.clone(), daemon.host.patience());
        tokio::spawn(async move {
            daemon.reboot_if_due().await;
            tokio::time::sleep(patience).await;
            this.force_close().await;
        });
        self.close_if_done().await;
    }

    async fn close_if_done(self: &Arc<Self>) {
        let done = matches!(*lock(&self.phase), Phase::Finished(..)) && lock(&self.peers).is_empty();
        if done {
            self.close().await;
        }
    }

    async fn close(self: &Arc<Self>) {
        if let Some(daemon) = self.daemon.upgrade() {
            let _ = std::fs::remove_file(&self.socket);
            daemon.closed(self).await;
        }
        for task in lock(&self.tasks).drain(..) {
            task.abort();
        }
    }

    /// Disconnects every client, as the daemon does some time after the end and a crash does at once.
    pub(crate) async fn force_close(self: &Arc<Self>) {
        let peers: Vec<Connection> = lock(&self.peers).drain().map(|(_, peer)| peer).collect();
        for peer in peers {
            let _ = peer.close().await;
        }
        self.close().await;
    }

    async fn signal<B: serde::Serialize + zbus::DynamicType>(&self, name: &str, body: &B) {
        let peers: Vec<Connection> = lock(&self.peers).values().cloned().collect();
        for peer in peers {
            let send = peer.emit_signal(None::<&str>, "/", TRANSACTION, name, body);
            let _ = tokio::time::timeout(TELLING, send).await;
        }
    }

    async fn tell(self: &Arc<Self>, signal: &str, text: &str) {
        let Some(daemon) = self.daemon.upgrade() else { return };
        daemon.host.hear(Happened::Said(text));
        self.signal(signal, &(text,)).await;
        daemon.host.disturb(&daemon, text).await;
    }

    /// Tells clients something.
    pub async fn message(self: &Arc<Self>, text: &str) {
        self.tell("Message", text).await;
    }

    /// Tells clients that a part of the work starts.
    pub async fn task_begin(self: &Arc<Self>, text: &str) {
        self.tell("TaskBegin", text).await;
    }

    /// Tells clients that a part of the work is done.
    pub async fn task_end(&self, text: &str) {
        self.signal("TaskEnd", &(text,)).await;
    }

    /// Tells clients how much of a part is done.
    pub async fn percent(&self, text: &str, percentage: u32) {
        self.signal("PercentProgress", &(text, percentage)).await;
        if percentage == 100 {
            self.signal("ProgressEnd", &()).await;
        }
    }
}

struct Peer<H: Host> {
    transaction: Arc<Transaction<H>>,
}

const MEMBERS: &str = r#"
<method name="Start"><arg name="started" type="b" direction="out"/></method>
<method name="Cancel"/>
<signal name="Finished"><arg name="success" type="b"/><arg name="error_message" type="s"/></signal>
<signal name="Message"><arg name="text" type="s"/></signal>
<signal name="TaskBegin"><arg name="text" type="s"/></signal>
<signal name="TaskEnd"><arg name="text" type="s"/></signal>
<signal name="PercentProgress"><arg name="text" type="s"/><arg name="percentage" type="u"/></signal>
<signal name="ProgressEnd"/>
"#;

impl<H: Host> Service for Peer<H> {
    fn at(&self, path: &str) -> Vec<Interface> {
        if path != "/" {
            return Vec::new();
        }
        vec![Interface {
            name: TRANSACTION,
            members: MEMBERS,
            properties: vec![
                ("Title", variant(self.transaction.shown_title())),
                ("InitiatingClientDescription", variant(self.transaction.request.client.as_str())),
            ],
        }]
    }

    async fn call(self: &Arc<Self>, connection: &Connection, call: &Call) -> Answer {
        if call.path != "/" {
            return call.unknown();
        }
        match call.member.as_str() {
            "Start" => {
                if let Some(daemon) = self.transaction.daemon.upgrade() {
                    daemon.host.chatter(connection).await?;
                }
                let started = self.transaction.start();
                let reply = call.reply(&(started,))?;
                let finished = match &*lock(&self.transaction.phase) {
                    Phase::Finished(success, text) if !started => Some((*success, text.clone())),
                    _ => None,
                };
                let Some(finished) = finished else { return Ok(reply) };
                // A late client gets the end again, after the reply and on its own connection only.
                if let Some(reply) = reply {
                    connection.send(&reply).await?;
                }
                connection.emit_signal(None::<&str>, "/", TRANSACTION, "Finished", &finished).await?;
                Ok(None)
            }
            "Cancel" => {
                self.transaction.cancel();
                call.reply(&())
            }
            _ => call.unknown(),
        }
    }
}
