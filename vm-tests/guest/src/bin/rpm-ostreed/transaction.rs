//! One transaction: its private socket, its clients, its states.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures_util::StreamExt as _;
use guest::Said;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot, watch};
use zbus::connection::Builder;
use zbus::object_server::ResponseDispatchNotifier;
use zbus::{Connection, Guid, MessageStream};

use crate::Daemon;
use crate::work::{Job, Worker};

/// The path of the only transaction's socket.
const SOCKET: &str = "/run/rpm-ostree-transaction.sock";
const INTERFACE: &str = "org.projectatomic.rpmostree1.Transaction";
/// Longest time for clients to stay after the end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest time for one client to read a message.
const TELLING: Duration = Duration::from_secs(1);

/// The request of a transaction; an equal request joins.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub job: Job,
    pub title: String,
}

enum Phase {
    Waiting(oneshot::Sender<()>),
    Running,
    Finished(bool, String),
}

pub struct Transaction {
    pub request: Request,
    /// The method's name, for `ActiveTransaction`.
    pub method: &'static str,
    /// The bus name of the requesting client.
    pub client: String,
    phase: Mutex<Phase>,
    cancelled: watch::Sender<bool>,
    peers: Mutex<HashMap<u64, Connection>>,
    next_peer: AtomicU64,
    daemon: Weak<Daemon>,
}

impl Transaction {
    /// Listens for clients. The work starts when one of them calls `Start`.
    pub fn listen(
        daemon: &Arc<Daemon>,
        request: Request,
        method: &'static str,
        client: String,
        worker: Worker,
        said: mpsc::UnboundedReceiver<Said>,
        cancelled: watch::Sender<bool>,
    ) -> std::io::Result<Arc<Self>> {
        match std::fs::remove_file(SOCKET) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(SOCKET)?;
        std::fs::set_permissions(Path::new(SOCKET), std::fs::Permissions::from_mode(0o666))?;
        println!("Initiated txn {} for client {client}: {}", method, request.title);
        let this = Arc::new(Self {
            request,
            method,
            client,
            phase: Mutex::new(Phase::Waiting(worker.go)),
            cancelled,
            peers: Mutex::default(),
            next_peer: AtomicU64::new(0),
            daemon: Arc::downgrade(daemon),
        });
        tokio::spawn(this.clone().live(listener, worker.outcome, said));
        Ok(this)
    }

    /// The address of the socket.
    pub fn address() -> String {
        format!("unix:path={SOCKET}")
    }

    /// The title that clients see: a deploying transaction gets its own when it starts.
    pub fn title(&self) -> &str {
        let waits = matches!(*self.phase.lock().expect("not poisoned"), Phase::Waiting(_));
        if waits && self.method == "Rebase" { "new-deployment" } else { &self.request.title }
    }

    /// The requesting client left before the start.
    pub fn abandon(&self) {
        let mut phase = self.phase.lock().expect("not poisoned");
        if matches!(*phase, Phase::Waiting(_)) {
            // Dropping the sender ends the worker.
            *phase = Phase::Finished(false, String::new());
        }
    }

    async fn live(
        self: Arc<Self>,
        listener: UnixListener,
        outcome: oneshot::Receiver<Result<(), String>>,
        said: mpsc::UnboundedReceiver<Said>,
    ) {
        let accepting = tokio::spawn(self.clone().accept(listener));
        let talking = tokio::spawn(self.clone().talk(said));
        // An error means that the worker was never started: the transaction ends without a signal.
        if let Ok(outcome) = outcome.await {
            // All messages come before the end.
            let _ = talking.await;
            match &outcome {
                Ok(()) => println!("Txn {} successful", self.method),
                Err(text) => println!("Txn {} failed: {text}", self.method),
            }
            let Some(daemon) = self.daemon.upgrade() else { return };
            daemon.reload().await;
            let finished = (outcome.is_ok(), outcome.err().unwrap_or_default());
            *self.phase.lock().expect("not poisoned") = Phase::Finished(finished.0, finished.1.clone());
            self.signal("Finished", &finished).await;
            // The transaction counts as active until the last client disconnects.
            let _ = tokio::time::timeout(PATIENCE, self.left()).await;
        }
        accepting.abort();
        let peers: Vec<Connection> = self.peers.lock().expect("not poisoned").drain().map(|(_, peer)| peer).collect();
        for peer in peers {
            let _ = peer.close().await;
        }
        if let Some(daemon) = self.daemon.upgrade() {
            daemon.closed(&self);
        }
    }

    async fn left(&self) {
        while !self.peers.lock().expect("not poisoned").is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn accept(self: Arc<Self>, listener: UnixListener) {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(self.clone().attend(stream));
        }
    }

    /// Serves one client until it disconnects.
    async fn attend(self: Arc<Self>, stream: tokio::net::UnixStream) {
        let Ok(stream) = stream.into_std() else { return };
        let built =
            Builder::unix_stream(stream).server(Guid::generate()).p2p().serve_at("/", Peer(self.clone())).build().await;
        let Ok(connection) = built else { return };
        let id = self.next_peer.fetch_add(1, Ordering::SeqCst);
        self.peers.lock().expect("not poisoned").insert(id, connection.clone());
        let mut messages = MessageStream::from(&connection);
        drop(connection);
        while let Some(Ok(_)) = messages.next().await {}
        self.peers.lock().expect("not poisoned").remove(&id);
    }

    async fn talk(self: Arc<Self>, mut said: mpsc::UnboundedReceiver<Said>) {
        while let Some(said) = said.recv().await {
            let (signal, text) = match said {
                Said::Message(text) => ("Message", text),
                Said::TaskBegin(text) => ("TaskBegin", text),
                Said::TaskEnd(text) => ("TaskEnd", text),
            };
            println!("{signal}: {text}");
            self.signal(signal, &(text,)).await;
        }
    }

    async fn signal<B: serde::Serialize + zbus::DynamicType>(&self, name: &str, body: &B) {
        let peers: Vec<Connection> = self.peers.lock().expect("not poisoned").values().cloned().collect();
        for peer in peers {
            // A client that does not read must not block the daemon.
            let _ = tokio::time::timeout(TELLING, peer.emit_signal(None::<&str>, "/", INTERFACE, name, body)).await;
        }
    }

    /// Starts the transaction unless it was started; otherwise sends the end, if it has come.
    fn start(&self) -> (bool, Option<(bool, String)>) {
        let mut phase = self.phase.lock().expect("not poisoned");
        match std::mem::replace(&mut *phase, Phase::Running) {
            Phase::Waiting(go) => (go.send(()).is_ok(), None),
            Phase::Running => (false, None),
            Phase::Finished(success, text) => {
                *phase = Phase::Finished(success, text.clone());
                (false, Some((success, text)))
            }
        }
    }
}

struct Peer(Arc<Transaction>);

#[zbus::interface(name = "org.projectatomic.rpmostree1.Transaction")]
impl Peer {
    async fn start(&self, #[zbus(connection)] connection: &Connection) -> ResponseDispatchNotifier<bool> {
        let (started, finished) = self.0.start();
        let (response, sent) = ResponseDispatchNotifier::new(started);
        if let Some(finished) = finished {
            // A late client gets the end again.
            let connection = connection.clone();
            tokio::spawn(async move {
                sent.await;
                let _ = connection.emit_signal(None::<&str>, "/", INTERFACE, "Finished", &finished).await;
            });
        }
        response
    }

    fn cancel(&self) {
        self.0.cancelled.send_replace(true);
    }

    #[zbus(property)]
    fn title(&self) -> String {
        self.0.title().to_owned()
    }

    #[zbus(property)]
    fn initiating_client_description(&self) -> String {
        self.0.client.clone()
    }
}
