//! Row 26: the reboot.

use super::limits::MAX_ID;
use super::{Decision, Rule, Rules, Wanted, by};
use crate::model::{Annotate, Attempt, Deployment, NodeState, Reason, UnitState, Work};

impl Rules<'_> {
    pub(super) fn reboot(&self, wanted: &Wanted<'_>, staged: &Deployment) -> Decision {
        let image = wanted.image.clone();
        let decision = rebooting(wanted).state(NodeState::Working);
        let updates_bootloader = self.machine.bootloader_update != UnitState::Absent;
        if updates_bootloader && self.memory.bootloader_updated_for.as_ref() != Some(&image) {
            return decision.doing(Work::UpdateBootloader { image });
        }
        let boot_id = self.machine.boot_id.clone();
        let deployment = Some(staged.id.clone()).filter(|id| id.len() <= MAX_ID);
        let earlier = self.node.attempt.as_ref().filter(|attempt| attempt.image == image);
        let recorded = earlier.filter(|attempt| attempt.boot_id == boot_id);
        if recorded.is_none_or(|attempt| attempt.deployment != deployment) {
            let count = earlier.map_or(0, |attempt| attempt.count).saturating_add(u32::from(recorded.is_none()));
            let unknown = self.node.attempt.as_ref().map(|attempt| attempt.unknown.clone()).unwrap_or_default();
            let attempt = Attempt { image, boot_id, count, deployment, rolled_back: false, unknown };
            return decision.doing(Annotate::RecordAttempt { attempt });
        }
        let reboot = Work::Reboot { image };
        match self.failure(&reboot) {
            None => decision.doing(reboot),
            Some(failure) => self.when_due(self.failed(Rule::Reboot, failure), failure, reboot),
        }
    }
}

pub(super) fn rebooting(wanted: &Wanted<'_>) -> Decision {
    by(Rule::Reboot, Reason::Rebooting, format!("rebooting into {}", wanted.image.digest().short()))
}
