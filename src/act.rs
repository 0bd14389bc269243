//! The only place with effects beyond the Node object: one arm per action, each bounded in time and safe to repeat.

use crate::host::{Cancel, Progress};
use crate::model::{Action, Fault, PinnedImage, Reason, Step};
use crate::observe::Neighbours;
use crate::registry::{Verified, verify};

/// Which step an action is, and for what; `None` for actions that only change the Node object or this process.
#[must_use]
pub fn step(action: &Action, desired: &str) -> Option<(Step, String)> {
    let for_desired = |step| Some((step, desired.to_owned()));
    match action {
        Action::Nothing
        | Action::Publish { .. }
        | Action::AbortTask
        | Action::ConfirmDrain
        | Action::RequestDrain { .. }
        | Action::RequestUncordon { .. }
        | Action::RecordAttempt { .. }
        | Action::ReportTrust { .. }
        | Action::Settle => None,
        Action::Verify { image } => Some((Step::Verify, image.to_string())),
        Action::Stage { image } => Some((Step::Stage, image.to_string())),
        Action::DropStaged { checksum } => Some((Step::DropStaged, checksum.clone())),
        Action::CancelTransaction => for_desired(Step::CancelTransaction),
        Action::SetKernelArguments { image, .. } => Some((Step::KernelArguments, image.to_string())),
        Action::StartFinalizer => Some((Step::StartFinalizer, String::new())),
        Action::UpdateBootloader => for_desired(Step::UpdateBootloader),
        Action::Reboot { image } => Some((Step::Reboot, image.to_string())),
    }
}

/// Does `action`. What changes the host's image, its kernel arguments or its boot needs `proof`, which only verification
/// gives.
///
/// # Errors
/// The neighbour's, as a fault.
pub async fn perform(
    action: Action,
    neighbours: &Neighbours,
    proof: Option<Verified<PinnedImage>>,
    mut cancel: Cancel,
    progress: &Progress,
) -> Result<Option<Verified<PinnedImage>>, Fault> {
    let host = &neighbours.host;
    let done = match action {
        Action::Verify { image } => {
            return verify(&neighbours.engine, &image).await.map(Some).map_err(|error| Fault::from(&error));
        }
        Action::Stage { image } => host.stage(&proven(proof, &image)?, &mut cancel, progress).await,
        Action::DropStaged { checksum } => host.drop_pending(&checksum, &mut cancel).await,
        Action::CancelTransaction => host.cancel_transaction().await,
        Action::SetKernelArguments { image, append, delete } => {
            host.set_kernel_arguments(&proven(proof, &image)?, &append, &delete, &mut cancel).await
        }
        Action::StartFinalizer => host.start_finalizer().await,
        Action::UpdateBootloader => host.update_bootloader().await,
        Action::Reboot { image } => host.reboot(&proven(proof, &image)?).await,
        // The rest only changes the Node object or this process; `step` names each.
        _ => Ok(()),
    };
    done.map(|()| None).map_err(|error| Fault::from(&error))
}

/// The proof, if it is of `image`. The policy may have changed between decision and deed; the next pass verifies again.
fn proven(proof: Option<Verified<PinnedImage>>, image: &PinnedImage) -> Result<Verified<PinnedImage>, Fault> {
    proof.filter(|proof| proof.get() == image).ok_or_else(|| {
        let message = format!("{image} must be verified again first");
        Fault { reason: Reason::Verifying, message, retryable: true }
    })
}
