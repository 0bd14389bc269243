//! Three neighbours into one [`Observed`]. A neighbour that cannot be read leaves an unknown in its place; it fails no
//! pass and hides nobody else.

use std::sync::Arc;

use crate::cluster::{Api, ClusterError};
use crate::host::{Host, HostError};
use crate::model::{Fault, HostFacts, MachineFacts, NodeFacts, Observed, Reading};
use crate::trust::Engine;

/// The three neighbours.
#[derive(Clone, Debug)]
pub struct Neighbours {
    /// The API server.
    pub api: Arc<Api>,
    /// The OS.
    pub host: Host,
    /// The image's judge.
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

/// Everything at once, for the commands that only look.
pub async fn everything(neighbours: &Neighbours) -> Observed {
    let (node, deployments, machine) =
        tokio::join!(neighbours.api.full(), deployments(&neighbours.host), machine(&neighbours.host));
    Observed { cluster: cluster(node.map(|node| node.facts)), host: deployments, machine, running: None }
}
