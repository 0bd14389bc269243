//! The agent's one task at a time: the only place with effects beyond the Node object. Each kind of work is bounded in
//! time and safe to repeat.

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::looking::Look;
use super::{Agent, Event};
use crate::decide::Outcome;
use crate::host::{Cancel, Progress};
use crate::journal::id;
use crate::model::{Fault, PinnedImage, Reason, Work};
use crate::observe::Neighbours;
use crate::trust::{TrustStamp, VerifiedImage, verify};

/// Work that is under way.
pub(super) struct Task {
    /// Tells it from an aborted task of the same work, whose end may still be on its way.
    number: u64,
    pub(super) work: Work,
    pub(super) handle: JoinHandle<()>,
    cancel: watch::Sender<bool>,
}

/// How a task ended: verification gives the proof.
pub(super) type Ended = Result<Option<VerifiedImage>, Fault>;

impl Agent {
    pub(super) fn running(&self) -> Option<&Work> {
        self.task.as_ref().map(|task| &task.work)
    }

    pub(super) fn begin(&mut self, work: Work) {
        if let Work::Verify { image } = &work {
            // From here on only the files that this verification rests on are watched.
            self.withdraw_proof();
            self.sight.trust = Some(TrustStamp::read(self.neighbours.engine.settings(), image));
        }
        let (cancel, cancelled) = watch::channel(false);
        self.tasks = self.tasks.saturating_add(1);
        let (neighbours, events, number) = (self.neighbours.clone(), self.events.clone(), self.tasks);
        let (proof, done) = (self.proof.clone(), work.clone());
        let handle = tokio::spawn(async move {
            let telling = events.clone();
            let progress = move |line: String| {
                // A full queue loses a line of progress, nothing else.
                let _ = telling.try_send(Event::Progress(line));
            };
            let outcome = perform(done, &neighbours, proof, cancelled, &progress).await;
            let _ = events.send(Event::Ended(number, Box::new(outcome))).await;
        });
        self.progress = None;
        self.task = Some(Task { number, work, handle, cancel });
    }

    /// Verification is simply dropped; a transaction must be cancelled at its daemon, and its end awaited.
    pub(super) fn abort(&mut self) {
        let Some(task) = &self.task else { return };
        if matches!(task.work, Work::Verify { .. }) {
            task.handle.abort();
            self.task = None;
            self.wake = Instant::now();
        } else {
            task.cancel.send_replace(true);
        }
    }

    pub(super) fn ended(&mut self, number: u64, ended: Ended) {
        // The end of an aborted task may still have been on its way.
        let Some(Task { work, cancel, .. }) = self.task.take_if(|task| task.number == number) else { return };
        self.progress = None;
        let outcome = match ended {
            Ok(verified) => {
                match (&work, &verified) {
                    (Work::Stage { image }, _) => {
                        tracing::info!(message_id = id::STAGED, rebase_agent_image = %image, "staged {image}");
                    }
                    (Work::Reboot { .. }, _) => {
                        tracing::info!(message_id = id::REBOOTING, "the reboot was accepted");
                    }
                    (_, Some(verified)) => log_verified(verified),
                    _ => {}
                }
                let facts = verified.as_ref().map(|verified| verified.facts().clone());
                self.proof = verified.or(self.proof.take());
                Outcome::Succeeded(facts)
            }
            Err(_) if *cancel.borrow() => Outcome::GaveUp,
            Err(fault) => {
                // Of every other work, the decision that follows says the same.
                if matches!(work, Work::UpdateBootloader { .. } | Work::CancelTransaction { .. }) {
                    let reason = fault.reason.as_str();
                    tracing::warn!(message_id = id::FAILED, rebase_agent_reason = reason, "{}", fault.message);
                }
                Outcome::Failed(fault)
            }
        };
        let now = self.now();
        self.memory.finished(&work, outcome, now);
        if !matches!(work, Work::Verify { .. }) {
            self.sight.spoil();
            self.look(Look::Host);
        }
    }

    pub(super) fn withdraw_proof(&mut self) {
        self.sight.trust = None;
        self.proof = None;
        self.memory.withdraw();
    }
}

fn log_verified(verified: &VerifiedImage) {
    let facts = verified.facts();
    let (image, rule) = (&facts.image, &facts.vouched_by);
    tracing::info!(
        message_id = id::VERIFIED,
        rebase_agent_image = %image,
        "verified {image}: signed as rule {rule} of the node's policy requires; {} MiB, built from {}",
        facts.size >> 20,
        facts.rendered_config.as_deref().unwrap_or("no rendered config")
    );
}

/// Does `work`. What changes the host's image, its kernel arguments or its boot needs `proof`, which only verification
/// gives.
async fn perform(
    work: Work,
    neighbours: &Neighbours,
    proof: Option<VerifiedImage>,
    mut cancel: Cancel,
    progress: &Progress,
) -> Ended {
    let host = &neighbours.host;
    let done = match work {
        Work::Verify { image } => {
            return verify(&neighbours.engine, &image).await.map(Some).map_err(|error| Fault::from(&error));
        }
        Work::Stage { image } => host.stage(&proven(proof, &image)?, &mut cancel, progress).await,
        Work::DropStaged { checksum } => host.drop_pending(&checksum, &mut cancel).await,
        Work::CancelTransaction { .. } => host.cancel_transaction().await,
        Work::SetKernelArguments { image, append, delete } => {
            host.set_kernel_arguments(&proven(proof, &image)?, &append, &delete, &mut cancel).await
        }
        Work::StartFinalizer => host.start_finalizer().await,
        Work::UpdateBootloader { .. } => host.update_bootloader().await,
        Work::Reboot { image } => host.reboot(&proven(proof, &image)?).await,
    };
    done.map(|()| None).map_err(|error| Fault::from(&error))
}

/// The proof, if it is of `image`. The policy may have changed between decision and deed; the next step verifies again.
fn proven(proof: Option<VerifiedImage>, image: &PinnedImage) -> Result<VerifiedImage, Fault> {
    proof.filter(|proof| proof.image() == image).ok_or_else(|| {
        let message = format!("{image} must be verified again first");
        Fault { reason: Reason::Verifying, message }
    })
}
