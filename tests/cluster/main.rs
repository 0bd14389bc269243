//! The agent's API client against a server with all faults of the original: the kubeconfig, following a Node through
//! interruptions, and the scope of a patch.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]
#![allow(clippy::disallowed_methods, reason = "tests write the files that the agent reads")]

mod kubeconfig;
mod mcn;
mod patch;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rebase_agent::cluster::node::NodeObject;
use rebase_agent::cluster::{Api, ClusterError, Timing, Told, follow};
use support::apiserver::{ApiServer, Store};
use support::events::Events;
use support::mcc::PREFIX;
use support::pki::{Pki, rotate_client_pem, write_kubeconfig};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// The node of these tests.
const NODE: &str = "worker-0.example.com";
/// Longest wait for an expected event.
const DEADLINE: Duration = Duration::from_secs(60);

/// An API server with one Node, and a kubelet's files.
struct Stage {
    pki: Pki,
    server: ApiServer,
    store: Store,
    directory: TempDir,
}

impl Stage {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let pki = Pki::new();
        let server = ApiServer::start(&pki, Events::new()).unwrap();
        let store = server.store();
        store.create_node(NODE, &[]);
        let stage = Self { pki, server, store, directory };
        stage.write(&stage.pki.clone(), &stage.pki.kubelet_pem(NODE));
        stage
    }

    /// Writes the kubelet's files with this authority and this client PEM.
    fn write(&self, authority: &Pki, pem: &str) {
        let link = rotate_client_pem(&self.directory.path().join("pki"), pem);
        write_kubeconfig(&self.kubeconfig(), &self.server.url(), &authority.ca_pem(), &link);
    }

    fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    fn api(&self) -> Api {
        Api::new(self.kubeconfig(), None, quick())
    }

    fn follow(&self, poll: Duration) -> Following {
        self.follow_with(poll, quick())
    }

    fn follow_with(&self, poll: Duration, timing: Timing) -> Following {
        let (sender, told) = mpsc::channel(1024);
        let api = Arc::new(Api::new(self.kubeconfig(), None, timing));
        Following { told, task: tokio::spawn(follow(api, poll, sender)) }
    }

    fn annotate(&self, key: &str, value: &str) {
        self.store.annotate("admin", NODE, &format!("{PREFIX}{key}"), Some(value)).unwrap();
    }

    /// The number of requests of this kind.
    fn count(&self, watches: bool) -> usize {
        self.server.requests().iter().filter(|request| request.is_watch() == watches).count()
    }

    /// Waits until a watch is open: later changes come through it.
    async fn watched(&self) {
        let open = || self.server.requests().iter().any(|request| request.is_watch() && request.status == 200);
        timeout(DEADLINE, async {
            while !open() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
    }
}

/// The service's time limits without the first wait.
fn quick() -> Timing {
    Timing { first: Duration::ZERO, ..Timing::default() }
}

/// A task that follows a Node until this is dropped.
struct Following {
    told: mpsc::Receiver<Told>,
    task: JoinHandle<()>,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Following {
    /// The next Node that `is` accepts; errors before it are ignored.
    async fn node(&mut self, what: &str, is: impl Fn(&NodeObject) -> bool) -> NodeObject {
        let wait = async {
            loop {
                match self.told.recv().await.expect("following never ends") {
                    Ok(node) if is(&node) => return node,
                    _ => {}
                }
            }
        };
        timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("{what} was not reported"))
    }

    async fn state(&mut self, state: &str) -> NodeObject {
        self.node(state, |node| node.facts.state.as_deref() == Some(state)).await
    }

    /// The next error.
    async fn error(&mut self) -> ClusterError {
        let wait = async {
            loop {
                if let Err(error) = self.told.recv().await.expect("following never ends") {
                    return error;
                }
            }
        };
        timeout(DEADLINE, wait).await.expect("an error arrives in time")
    }
}
