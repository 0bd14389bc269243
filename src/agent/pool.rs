//! Reads the pool's newest image while the node has nothing to do, so that it is fetched before the node's turn.

use std::time::Duration;

use tokio::time::Instant;

use super::{Agent, Event};
use crate::backoff::random;
use crate::cluster::ClusterError;
use crate::cluster::pool::{first_read, next_read, pool_of};
use crate::decide::Decision;
use crate::journal::id;
use crate::model::Pullspec;

/// The result of one read.
pub(super) type PoolImage = Result<Option<Pullspec>, ClusterError>;

/// When the pool's image is read next.
pub(super) struct Pool {
    due: Instant,
    asking: bool,
    /// The last error was logged.
    told: bool,
}

impl Pool {
    pub(super) fn new(now: Instant, poll: Duration) -> Self {
        Self { due: now + first_read(poll, random()), asking: false, told: false }
    }
}

impl Agent {
    /// Begins a read if one is due. A node that is at work, or whose annotation names the next image, needs none.
    pub(super) fn ask_for_the_pools_image(&mut self, decision: &Decision) {
        let Some(node) = self.observed.cluster.known() else { return };
        let pool = node.desired_config.as_deref().and_then(pool_of).map(str::to_owned);
        let Some(pool) = pool.filter(|_| decision.reason.is_at_rest() && node.prefetch.is_none()) else { return };
        let now = Instant::now();
        if !self.pool.asking && now >= self.pool.due.max(self.cluster.not_before) {
            self.pool.asking = true;
            self.pool.due = now + next_read(self.settings.poll, random());
            let (api, events) = (self.neighbours.api.clone(), self.events.clone());
            tokio::spawn(async move {
                let _ = events.send(Event::Pool(api.pool_image(&pool).await)).await;
            });
        }
        self.wake = self.wake.min(self.pool.due);
    }

    pub(super) fn take_pool(&mut self, image: PoolImage) {
        self.pool.asking = false;
        match image {
            Ok(image) => {
                self.observed.pool_image = image;
                self.pool.told = false;
            }
            Err(error) => {
                if matches!(error, ClusterError::NotFound(_) | ClusterError::Forbidden(_)) {
                    self.observed.pool_image = None;
                }
                let why = match &error {
                    ClusterError::NotFound(_) => "it does not exist".to_owned(),
                    error => error.to_string(),
                };
                if !std::mem::replace(&mut self.pool.told, true) {
                    tracing::info!(
                        message_id = id::DECIDED,
                        "the pool's MachineOSConfig cannot be read, so the node prefetches only what its annotation \
                         rebase-agent.openshift.io/prefetch names: {why}. systemd/cluster/prefetch-rbac.yaml gives nodes \
                         the right to read it"
                    );
                }
            }
        }
    }
}
