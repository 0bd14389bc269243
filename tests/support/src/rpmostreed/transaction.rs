//! One transaction: its peer-to-peer socket, its clients, its states.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use zbus::connection::Builder;
use zbus::{Connection, Guid};

use super::{Inner, Work};
use crate::bus::{self, Answer, Call, Interface, Service, variant};
use crate::events::Event;

pub(crate) const INTERFACE: &str = "org.projectatomic.rpmostree1.Transaction";

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Running,
    Finished(bool, String),
}

/// A transaction.
pub(crate) struct Transaction {
    pub(crate) method: String,
    pub(crate) parameters: Vec<u8>,
    pub(crate) title: String,
    pub(crate) sender: String,
    pub(crate) object: String,
    pub(crate) client: String,
    pub(crate) socket: PathBuf,
    daemon: Weak<Inner>,
    phase: Mutex<Phase>,
    work: Mutex<Option<Work>>,
    cancelled: watch::Sender<bool>,
    peers: Mutex<HashMap<u64, Connection>>,
    next_peer: AtomicU64,
    tasks: Mutex<Vec<AbortHandle>>,
}

/// Settings of a new transaction.
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) parameters: Vec<u8>,
    pub(crate) title: String,
    pub(crate) sender: String,
    pub(crate) object: String,
    pub(crate) client: String,
    pub(crate) work: Work,
}

impl Transaction {
    /// Listens on `socket` for the transaction's clients.
    pub(crate) fn listen(daemon: &Arc<Inner>, socket: PathBuf, request: Request) -> std::io::Result<Arc<Self>> {
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        let this = Arc::new(Self {
            method: request.method,
            parameters: request.parameters,
            title: request.title,
            sender: request.sender,
            object: request.object,
            client: request.client,
            socket,
            daemon: Arc::downgrade(daemon),
            phase: Mutex::new(Phase::Waiting),
            work: Mutex::new(Some(request.work)),
            cancelled: watch::channel(false).0,
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

    pub(crate) fn address(&self) -> String {
        format!("unix:path={}", self.socket.display())
    }

    fn keep<T>(&self, task: tokio::task::JoinHandle<T>) {
        self.tasks.lock().unwrap().push(task.abort_handle());
    }

    /// Serves one client until it disconnects.
    async fn attend(self: &Arc<Self>, stream: std::os::unix::net::UnixStream) {
        let built = Builder::unix_stream(stream).server(Guid::generate()).p2p().build_message_stream().await;
        let Ok(stream) = built else { return };
        let id = self.next_peer.fetch_add(1, Ordering::SeqCst);
        self.peers.lock().unwrap().insert(id, Connection::from(&stream));
        bus::serve(stream, Arc::new(Peer { transaction: self.clone() })).await;
        self.peers.lock().unwrap().remove(&id);
        self.close_if_done().await;
    }

    pub(crate) fn is_waiting(&self) -> bool {
        *self.phase.lock().unwrap() == Phase::Waiting
    }

    /// Starts the transaction unless it was started; returns whether this call did.
    pub(crate) fn start(self: &Arc<Self>) -> bool {
        {
            let mut phase = self.phase.lock().unwrap();
            if *phase != Phase::Waiting {
                return false;
            }
            *phase = Phase::Running;
        }
        let Some(daemon) = self.daemon.upgrade() else { return false };
        daemon.events.emit(Event::TransactionStarted { title: self.title.clone() });
        let work = self.work.lock().unwrap().take();
        let this = self.clone();
        self.keep(tokio::spawn(async move {
            let mut cancelled = this.cancelled.subscribe();
            let outcome = tokio::select! {
                biased;
                _ = cancelled.wait_for(|cancelled| *cancelled) => Err(daemon.cancel_text()),
                outcome = daemon.execute(&this, work.unwrap_or(Work::Nothing)) => outcome,
            };
            drop(daemon);
            this.finish(outcome).await;
        }));
        true
    }

    pub(crate) fn cancel(&self) {
        if self.daemon.upgrade().is_some_and(|daemon| daemon.ignores_cancel()) {
            return;
        }
        self.cancelled.send_replace(true);
    }

    /// The client that requested it left the bus before the start: the transaction ends without a signal.
    pub(crate) async fn abandon(self: &Arc<Self>) {
        *self.phase.lock().unwrap() = Phase::Finished(false, String::new());
        self.force_close().await;
    }

    /// The title that clients see: a deploying transaction gets its own when it starts.
    pub(crate) fn shown_title(&self) -> &str {
        let deploys = ["Rebase", "Upgrade"].contains(&self.method.as_str());
        if deploys && self.is_waiting() { "new-deployment" } else { &self.title }
    }

    async fn finish(self: &Arc<Self>, outcome: Result<(), String>) {
        let Some(daemon) = self.daemon.upgrade() else { return };
        if !daemon.has_power() {
            return;
        }
        if outcome.is_ok() {
            daemon.refresh().await;
        }
        let (success, text) = match &outcome {
            Ok(()) => (true, String::new()),
            Err(text) => (false, text.clone()),
        };
        daemon.events.emit(Event::TransactionFinished { title: self.title.clone(), error: outcome.err() });
        *self.phase.lock().unwrap() = Phase::Finished(success, text.clone());
        self.signal("Finished", &(success, text)).await;
        let (this, patience) = (self.clone(), daemon.force_close_after());
        tokio::spawn(async move {
            tokio::time::sleep(patience).await;
            this.force_close().await;
        });
        self.close_if_done().await;
    }

    async fn close_if_done(self: &Arc<Self>) {
        let done = matches!(*self.phase.lock().unwrap(), Phase::Finished(..)) && self.peers.lock().unwrap().is_empty();
        if done {
            self.close().await;
        }
    }

    async fn close(self: &Arc<Self>) {
        if let Some(daemon) = self.daemon.upgrade() {
            daemon.closed(self).await;
        }
        for task in self.tasks.lock().unwrap().drain(..) {
            task.abort();
        }
    }

    /// Disconnects every client, as the daemon does some time after the end and a crash does at once.
    pub(crate) async fn force_close(self: &Arc<Self>) {
        let peers: Vec<Connection> = self.peers.lock().unwrap().drain().map(|(_, peer)| peer).collect();
        for peer in peers {
            let _ = peer.close().await;
        }
        self.close().await;
    }

    async fn signal<B: serde::Serialize + zbus::DynamicType>(&self, name: &str, body: &B) {
        let peers: Vec<Connection> = self.peers.lock().unwrap().values().cloned().collect();
        for peer in peers {
            let send = peer.emit_signal(None::<&str>, "/", INTERFACE, name, body);
            // A client that does not read must not block the daemon.
            let _ = tokio::time::timeout(Duration::from_secs(1), send).await;
        }
    }

    async fn tell(self: &Arc<Self>, signal: &str, text: &str) {
        let Some(daemon) = self.daemon.upgrade() else { return };
        daemon.events.emit(Event::TransactionMessage(text.to_owned()));
        self.signal(signal, &(text,)).await;
        daemon.disturb(text).await;
    }

    pub(crate) async fn message(self: &Arc<Self>, text: &str) {
        self.tell("Message", text).await;
    }

    pub(crate) async fn task_begin(self: &Arc<Self>, text: &str) {
        self.tell("TaskBegin", text).await;
    }

    pub(crate) async fn task_end(&self, text: &str) {
        self.signal("TaskEnd", &(text,)).await;
    }

    pub(crate) async fn percent(&self, text: &str, percentage: u32) {
        self.signal("PercentProgress", &(text, percentage)).await;
        if percentage == 100 {
            self.signal("ProgressEnd", &()).await;
        }
    }
}

struct Peer {
    transaction: Arc<Transaction>,
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

impl Service for Peer {
    fn at(&self, path: &str) -> Vec<Interface> {
        if path != "/" {
            return Vec::new();
        }
        vec![Interface {
            name: INTERFACE,
            members: MEMBERS,
            properties: vec![
                ("Title", variant(self.transaction.shown_title())),
                ("InitiatingClientDescription", variant(self.transaction.client.as_str())),
            ],
        }]
    }

    async fn call(self: &Arc<Self>, connection: &Connection, call: &Call) -> Answer {
        if call.path != "/" {
            return call.unknown();
        }
        match call.member.as_str() {
            "Start" => {
                if let Some(messages) = self.transaction.daemon.upgrade().map(|daemon| daemon.chatters()) {
                    for number in 0..messages {
                        let text = format!("message {number}");
                        connection.emit_signal(None::<&str>, "/", INTERFACE, "Message", &(text,)).await?;
                    }
                    if messages > 0 {
                        let stranger = "org.example.Stranger";
                        connection.emit_signal(None::<&str>, "/", stranger, "Finished", &(true, "")).await?;
                    }
                }
                let started = self.transaction.start();
                let reply = call.reply(&(started,))?;
                let finished = match &*self.transaction.phase.lock().unwrap() {
                    Phase::Finished(success, text) if !started => Some((*success, text.clone())),
                    _ => None,
                };
                let Some(finished) = finished else { return Ok(reply) };
                // A late client gets the end again, after the reply and on its own connection only.
                if let Some(reply) = reply {
                    connection.send(&reply).await?;
                }
                connection.emit_signal(None::<&str>, "/", INTERFACE, "Finished", &finished).await?;
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
