//! `run`: runs the service.

use std::time::Duration;

use crate::agent;
use crate::cli::{Tuning, exit};
use crate::confine::Confinement;
use crate::journal::id;
use crate::observe::Neighbours;

/// Runs the service until a signal stops it and returns the exit code.
pub(super) async fn run(neighbours: Neighbours, confinement: Confinement, tuning: &Tuning) -> u8 {
    if let Err(error) = neighbours.host.check_kind() {
        tracing::error!("{error}");
        return exit::NOT_IMAGE_MODE;
    }
    let (version, landlock) = (env!("CARGO_PKG_VERSION"), confinement.sentence());
    tracing::info!(message_id = id::STARTED, "rebase-agent {version}; {landlock}");
    let settings = agent::Settings {
        limits: tuning.limits(),
        poll: Duration::from_secs(tuning.poll),
        prefetch_spread: tuning.prefetch_spread.saturating_mul(1000),
        confinement,
    };
    match agent::run(neighbours, settings).await {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!("{error}");
            exit::UNREADABLE
        }
    }
}
