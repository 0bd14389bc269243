//! Runs the agent's work, one task at a time. This is the only module with effects beyond the Node object. Each kind of
//! work has a time limit and is safe to repeat.

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::looking::Look;
use super::{Agent, Event};
use crate::cluster::event::Event as News;
use crate::decide::Outcome;
use crate::host::{Cancel, Progress};
use crate::journal::id;
use crate::model::{Fault, PinnedImage, Reason, Work};
use crate::observe::Neighbours;
use crate::trust::{TrustStamp, VerifiedImage, verify};

/// A running task.
pub(super) struct Task {
    /// Distinguishes it from an aborted task of the same work, whose last event may still be queued.
    number: u64,
    pub(super) work: Work,
    pub(super) handle: JoinHandle<()>,
    cancel: watch::Sender<bool>,
}

/// The result of a task. Verification returns the verified image.
pub(super) type Ended = Result<Option<VerifiedImage>, Fault>;

impl Agent {
    pub(super) fn running(&self) -> Option<&Work> {
        self.task.as_ref().map(|task| &task.work)
    }

    pub(super) fn begin(&mut self, work: Work) {
        if let Work::Verify { image } = &work {
            // From now on the files of this verification are watched. Its earlier failures stay.
            self.proofs.remove(image);
            self.memory.verified.remove(image);
            self.sight.trust.insert(image.clone(), TrustStamp::read(self.neighbours.engine.settings(), image));
        }
        let (cancel, cancelled) = watch::channel(false);
        self.tasks = self.tasks.saturating_add(1);
        let (neighbours, events, number) = (self.neighbours.clone(), self.events.clone(), self.tasks);
        let (proof, done) = (work.image().and_then(|image| self.proofs.get(image)).cloned(), work.clone());
        let handle = tokio::spawn(async move {
            let telling = events.clone();
            let progress = move |line: String| {
                // If the queue is full, only a line of progress is lost.
                let _ = telling.try_send(Event::Progress(line));
            };
            let outcome = perform(done, &neighbours, proof, cancelled, &progress).await;
            let _ = events.send(Event::Ended(number, Box::new(outcome))).await;
        });
        self.progress = None;
        self.task = Some(Task { number, work, handle, cancel });
    }

    /// Aborts a verification at once. Other work is cancelled, and ends when its daemon has cancelled the transaction.
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
        // The event may be from an aborted task.
        let Some(Task { work, cancel, .. }) = self.task.take_if(|task| task.number == number) else { return };
        self.progress = None;
        let outcome = match ended {
            Ok(verified) => {
                match (&work, &verified) {
                    (Work::Stage { image }, _) => {
                        tracing::info!(message_id = id::STAGED, rebase_agent_image = %image, "staged {image}");
                        self.tell(&News { word: "OSUpdateStaged", warns: false, message: format!("staged {image}") });
                    }
                    (Work::Fetch { image }, _) => {
                        tracing::info!(message_id = id::FETCHED, rebase_agent_image = %image, "pulled {image}; nothing is staged");
                    }
                    (Work::Reboot { .. }, _) => {
                        tracing::info!(message_id = id::REBOOTING, "the reboot was accepted");
                    }
                    (_, Some(verified)) => log_verified(verified),
                    _ => {}
                }
                let facts = verified.as_ref().map(|verified| verified.facts().clone());
                self.proofs.extend(verified.map(|verified| (verified.image().clone(), verified)));
                Outcome::Succeeded(facts)
            }
            Err(_) if *cancel.borrow() => Outcome::GaveUp,
            Err(fault) => {
                // For all other work the next decision has the same message.
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

    pub(super) fn withdraw_proofs(&mut self) {
        self.sight.trust.clear();
        self.proofs.clear();
        self.memory.withdraw();
    }
}

fn log_verified(verified: &VerifiedImage) {
    let facts = verified.facts();
    tracing::info!(
        message_id = id::VERIFIED,
        rebase_agent_image = %facts.image,
        "{}; {} MiB, built from {}",
        verified.sentence(),
        facts.size >> 20,
        facts.rendered_config.as_deref().unwrap_or("no rendered config")
    );
}

/// Performs `work`. A change of the host's image, its kernel arguments or its boot needs `proof`, which only verification
/// returns.
async fn perform(
    work: Work,
    neighbours: &Neighbours,
    proof: Option<VerifiedImage>,
    mut cancel: Cancel,
    progress: &Progress<'_>,
) -> Ended {
    let host = &neighbours.host;
    let done = match work {
        Work::Verify { image } => {
            return verify(&neighbours.engine, &image).await.map(Some).map_err(|error| Fault::from(&error));
        }
        Work::Fetch { image } => host.fetch(&proven(proof, &image)?, &mut cancel, progress).await,
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

/// The proof, if it is for `image`. The policy may have changed since the decision; then the next step verifies again.
fn proven(proof: Option<VerifiedImage>, image: &PinnedImage) -> Result<VerifiedImage, Fault> {
    proof.ok_or_else(|| {
        let message = format!("{image} must be verified again before this step");
        Fault { reason: Reason::Verifying, message }
    })
}
