//! Reads the API server and the OS into one [`Observed`]. A failed read becomes an unknown reading and does not affect
//! the others.

use std::sync::Arc;

use crate::cluster::{Api, ClusterError};
use crate::host::{Host, HostError};
use crate::model::{Fault, HostFacts, MachineFacts, NodeFacts, Observed, Reading};
use crate::trust::Engine;

/// The systems that the agent works with.
#[derive(Clone, Debug)]
pub struct Neighbours {
    /// The API server.
    pub api: Arc<Api>,
    /// The OS.
    pub host: Host,
    /// The signature engine.
    pub engine: Arc<Engine>,
}

fn reading<T, E>(answer: Result<T, E>) -> Reading<T>
where
    for<'e> Fault: From<&'e E>,
{
    match answer {
        Ok(value) => Reading::Known(value),
        Err(error) => Reading::Unknown(Fault::from(&error)),
    }
}

/// Our Node, as an answer of the API server shows it.
#[must_use]
pub fn cluster(answer: Result<NodeFacts, ClusterError>) -> Reading<NodeFacts> {
    reading(answer)
}

/// Deployments and transaction.
pub async fn deployments(host: &Host) -> Reading<HostFacts> {
    let answer: Result<HostFacts, HostError> = host.read().await;
    reading(answer)
}

/// Kernel, systemd, logind.
pub async fn machine(host: &Host) -> Reading<MachineFacts> {
    reading(host.read_machine().await)
}

/// Reads everything at once, for the commands that change nothing.
pub async fn everything(neighbours: &Neighbours) -> Observed {
    let (node, deployments, machine) =
        tokio::join!(neighbours.api.full(), deployments(&neighbours.host), machine(&neighbours.host));
    Observed {
        cluster: cluster(node.map(|node| node.facts)),
        host: deployments,
        machine,
        pool_image: None,
        running: None,
    }
}
