//! The load of many nodes on the API server, in virtual time: each node is the agent's own client, with its own kubelet's
//! files, over TLS. A balancer stands before three servers, as a cluster's does, and counts bytes and connections.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rebase_agent::backoff::{full_jitter, random};
use rebase_agent::cluster::pool::{first_read, next_read};
use rebase_agent::cluster::{Api, Timing, follow};
use rebase_agent::decide::limits;
use support::apiserver::{ApiServer, RequestRecord, Store};
use support::events::Events;
use support::mcc::PREFIX;
use support::pki::{Pki, rotate_client_pem, write_kubeconfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep};

/// The kubelet's status report without a change.
const HEARTBEAT: Duration = Duration::from_secs(300);
/// How long a restarted API server does not answer.
const OUTAGE: Duration = Duration::from_secs(10);
/// How long one server of the control plane is away during an update, and how long until the next one is.
const UPDATE: Duration = Duration::from_secs(60);
const APART: Duration = Duration::from_secs(180);
/// Until every node is back.
const BACK: Duration = Duration::from_secs(10 * 60);
const SERVERS: usize = 3;
const POOL: &str = "worker";
/// Annotations of the network and of storage, in bytes, which make a real Node's metadata as large as it is.
const FOREIGN: usize = 4096;

/// Requests of a node in an hour, and the bytes of the answers' bodies.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    pub requests: f64,
    pub bytes: f64,
}

/// How the nodes come back after their watches broke off.
#[derive(Clone, Copy, Debug)]
pub struct Return {
    /// Most requests within a second.
    pub requests: usize,
    /// Most new connections within a second.
    pub connections: usize,
    /// From the first node that asks again to the last one.
    pub spread: Duration,
}

/// The load of all nodes.
#[derive(Debug)]
pub struct Herd {
    /// Reads and watches of the own Node.
    pub node: Rate,
    /// Reads of the pool's MachineOSConfig.
    pub pool: Rate,
    /// Bytes of a node in an hour on the wire, both ways, with TLS and headers, without TCP.
    pub wire: f64,
    /// New connections of a node in an hour.
    pub connections: f64,
    /// Most requests within a second of the idle hour.
    pub busiest: usize,
    /// After a restart of the only API server.
    pub restart: Return,
    /// While three servers restart one after the other.
    pub update: Return,
}

/// Measures `nodes` idle nodes for an hour, and then outages. Runs on a paused clock.
///
/// # Errors
/// When files cannot be written or ports cannot be bound.
pub async fn measure(nodes: usize, directory: &Path) -> io::Result<Herd> {
    let pki = Pki::new();
    let server = ApiServer::start(&pki, Events::new()).map_err(io::Error::other)?;
    let store = server.store();
    store.set_pool_image(POOL, &image());
    let balancer = Balancer::start(server.address()).await?;
    let url = format!("https://{}", balancer.address);
    let mut tasks = JoinSet::new();
    for at in 0..nodes {
        let name = format!("worker-{at}");
        create(&store, &name);
        let files = directory.join(&name);
        std::fs::create_dir(&files)?;
        let pem = rotate_client_pem(&files, &pki.kubelet_pem(&name));
        write_kubeconfig(&files.join("kubeconfig"), &url, &pki.ca_pem(), &pem);
        let api = Arc::new(Api::new(files.join("kubeconfig"), None, Timing::default()));
        let (told, mut heard) = mpsc::channel(64);
        // As in a cluster that has run for long, each node is anywhere in its poll.
        let start = Duration::from_millis(full_jitter(limits::POLL, random()));
        let follower = api.clone();
        tasks.spawn(async move {
            sleep(start).await;
            follow(follower, poll(), told).await;
        });
        tasks.spawn(async move { while heard.recv().await.is_some() {} });
        tasks.spawn(async move {
            sleep(start + first_read(poll(), random())).await;
            loop {
                let _ = api.pool_image(POOL).await;
                sleep(next_read(poll(), random())).await;
            }
        });
    }
    let beats = store.clone();
    tasks.spawn(async move {
        loop {
            sleep(HEARTBEAT).await;
            (0..nodes).for_each(|at| beats.heartbeat(&format!("worker-{at}")));
        }
    });

    sleep(2 * poll()).await;
    let before = Count::of(&server, &balancer);
    sleep(Duration::from_secs(3600)).await;
    let after = Count::of(&server, &balancer);
    let each = |now: f64, then: f64| (now - then) / nodes as f64;
    let rate = |of: fn(&Count) -> (usize, u64)| Rate {
        requests: each(of(&after).0 as f64, of(&before).0 as f64),
        bytes: each(of(&after).1 as f64, of(&before).1 as f64),
    };
    let idle: Vec<_> = server.requests().into_iter().filter(|request| request.at >= before.at).collect();

    let restarted = Instant::now();
    server.stop().await;
    sleep(OUTAGE).await;
    server.restart().await;
    sleep(BACK).await;
    let restart = returned(&server, &balancer, restarted);

    let updated = Instant::now();
    for one in 0..SERVERS {
        balancer.stop(one);
        sleep(UPDATE).await;
        balancer.restart(one);
        sleep(APART - UPDATE).await;
    }
    let update = returned(&server, &balancer, updated);
    Ok(Herd {
        node: rate(|count| count.node),
        pool: rate(|count| count.pool),
        wire: each(after.wire as f64, before.wire as f64),
        connections: each(after.connections as f64, before.connections as f64),
        busiest: busiest(idle.iter().map(|request| request.at)),
        restart,
        update,
    })
}

fn poll() -> Duration {
    Duration::from_millis(limits::POLL)
}

fn image() -> String {
    format!("registry.example.com/os@sha256:{}", "a".repeat(64))
}

/// A node that is Done.
fn create(store: &Store, name: &str) {
    let config = format!("rendered-{POOL}-{}", "a".repeat(32));
    let (image, drain, foreign) = (image(), format!("uncordon-{config}"), "x".repeat(FOREIGN));
    let of_mco = [
        ("currentConfig", config.as_str()),
        ("desiredConfig", &config),
        ("currentImage", &image),
        ("desiredImage", &image),
        ("desiredDrain", &drain),
        ("lastAppliedDrain", &drain),
        ("state", "Done"),
        ("reason", ""),
    ]
    .map(|(key, value)| (format!("{PREFIX}{key}"), value));
    let mut all: Vec<_> = of_mco.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    all.push(("k8s.ovn.org/node-subnets", &foreign));
    store.create_node(name, &all);
}

/// What the servers have counted so far.
struct Count {
    at: Instant,
    node: (usize, u64),
    pool: (usize, u64),
    wire: u64,
    connections: usize,
}

impl Count {
    fn of(server: &ApiServer, balancer: &Balancer) -> Self {
        let (of_pool, of_node): (Vec<_>, Vec<_>) =
            server.requests().into_iter().partition(|request| request.path_and_query.contains("machineosconfigs"));
        let sum = |requests: &[RequestRecord]| (requests.len(), requests.iter().map(|request| request.bytes).sum());
        Self {
            at: Instant::now(),
            node: sum(&of_node),
            pool: sum(&of_pool),
            wire: balancer.shared.bytes.load(Relaxed),
            connections: balancer.shared.accepted.lock().unwrap().len(),
        }
    }
}

/// Most of these within a second.
fn busiest(at: impl Iterator<Item = Instant>) -> usize {
    let mut at: Vec<_> = at.collect();
    at.sort();
    let second = Duration::from_secs(1);
    let until = |from: &Instant| at.partition_point(|other| *other < *from + second);
    at.iter().enumerate().map(|(first, from)| until(from) - first).max().unwrap_or_default()
}

fn returned(server: &ApiServer, balancer: &Balancer, since: Instant) -> Return {
    let requests: Vec<_> = server.requests().into_iter().filter(|request| request.at > since).collect();
    let mut first = BTreeMap::new();
    for request in &requests {
        first.entry(request.user.clone()).or_insert(request.at);
    }
    let (earliest, latest) = (first.values().min(), first.values().max());
    let spread = earliest.zip(latest).map_or(Duration::ZERO, |(earliest, latest)| *latest - *earliest);
    let accepted = balancer.shared.accepted.lock().unwrap();
    let connections = busiest(accepted.iter().copied().filter(|at| *at > since));
    Return { requests: busiest(requests.iter().map(|request| request.at)), connections, spread }
}

/// Passes connections on to one API server as if it were several: each connection belongs to one of them, and ends when
/// that one stops.
struct Balancer {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: AbortHandle,
}

struct Shared {
    /// The connections of each server; `None` while it is away.
    servers: Mutex<[Option<JoinSet<()>>; SERVERS]>,
    accepted: Mutex<Vec<Instant>>,
    bytes: AtomicU64,
}

impl Balancer {
    async fn start(server: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((server.ip(), 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            servers: Mutex::new(std::array::from_fn(|_| Some(JoinSet::new()))),
            accepted: Mutex::default(),
            bytes: AtomicU64::new(0),
        });
        let to = shared.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                to.accepted.lock().unwrap().push(Instant::now());
                let mut servers = to.servers.lock().unwrap();
                let mut running: Vec<_> = servers.iter_mut().flatten().collect();
                let count = running.len() as u64;
                // Without a server the connection closes.
                if let Some(connections) = random().checked_rem(count).and_then(|one| running.get_mut(one as usize)) {
                    connections.spawn(pass_on(client, server, to.clone()));
                }
            }
        });
        Ok(Self { address, shared, task: task.abort_handle() })
    }

    fn stop(&self, server: usize) {
        self.shared.servers.lock().unwrap()[server] = None;
    }

    fn restart(&self, server: usize) {
        self.shared.servers.lock().unwrap()[server] = Some(JoinSet::new());
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass_on(client: TcpStream, server: SocketAddr, shared: Arc<Shared>) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
    }
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let copy = async |mut from: tokio::net::tcp::OwnedReadHalf, mut to: tokio::net::tcp::OwnedWriteHalf| {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            shared.bytes.fetch_add(length as u64, Relaxed);
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    };
    // Either side ends the connection.
    tokio::select! {
        () = copy(from_client, to_server) => {}
        () = copy(from_server, to_client) => {}
    }
}
