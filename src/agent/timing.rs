//! Measures how long the rules of an update apply, for the annotation `last-update`. Pure.

use std::collections::BTreeMap;

use crate::decide::Rule;
use crate::model::annotations::LAST_UPDATE;
use crate::model::{Action, Annotate, LastUpdate, NodeFacts, Now, Pullspec};
use crate::report::Patch;

/// The times of the update that this process is at. A restart loses those that are not on the Node yet.
#[derive(Debug, Default)]
pub(super) struct Timing {
    /// The desired image.
    image: Option<Pullspec>,
    /// Milliseconds for which each rule has applied.
    spent: BTreeMap<&'static str, u64>,
    /// The last rule, and the monotonic time until which it is counted.
    last: Option<(Rule, u64)>,
}

impl Timing {
    /// Counts the time since the last decision, and begins again for another image and after Done.
    pub(super) fn decided(&mut self, node: Option<&NodeFacts>, rule: Rule, now: Now) {
        if let Some((last, since)) = self.last.replace((rule, now.mono)).filter(|(last, _)| *last != Rule::Done) {
            let spent = self.spent.entry(last.name()).or_default();
            *spent = spent.saturating_add(now.mono.saturating_sub(since));
        }
        let image = node.and_then(|node| node.desired_image.clone());
        if rule == Rule::Done || (image.is_some() && image != self.image) {
            self.spent.clear();
            self.image = image;
        }
    }

    /// Adds the times to a patch that records the attempt to reboot, or Done after it.
    pub(super) fn add(&self, patch: &mut Patch, node: &NodeFacts, action: &Action, now: Now) {
        let Some(image) = &node.desired_image else { return };
        let earlier = node.last_update.as_ref().filter(|update| update.image == image.as_str());
        let earlier = earlier.filter(|update| update.out_of_service.is_none());
        let mut update = match (action, earlier) {
            // A drain that this process saw is the one before this reboot.
            (Action::Annotate(Annotate::RecordAttempt { .. }), earlier) => LastUpdate {
                image: image.as_str().to_owned(),
                drained: match earlier {
                    Some(earlier) if !self.spent.contains_key(Rule::Drain.name()) => earlier.drained,
                    _ => now.unix.saturating_sub(self.spent.get(Rule::Reboot.name()).copied().unwrap_or_default()),
                },
                took: earlier.map(|earlier| earlier.took.clone()).unwrap_or_default(),
                out_of_service: None,
            },
            (Action::Annotate(Annotate::Settle), Some(earlier)) => {
                LastUpdate { out_of_service: Some(now.unix.saturating_sub(earlier.drained)), ..earlier.clone() }
            }
            _ => return,
        };
        update.took.extend(self.spent.iter().map(|(rule, spent)| ((*rule).to_owned(), *spent)));
        // Serializing cannot fail: the fields are plain.
        if let Ok(text) = serde_json::to_string(&update) {
            patch.insert(LAST_UPDATE.to_owned(), Some(text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Attempt, BootId};

    const IMAGE: &str = "q.io/o/i@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn node(last_update: Option<LastUpdate>) -> NodeFacts {
        NodeFacts { desired_image: Some(IMAGE.to_owned().into()), last_update, ..NodeFacts::default() }
    }

    fn record() -> Action {
        let image = Pullspec::from(IMAGE.to_owned()).image().unwrap().clone();
        let boot_id = BootId("b".to_owned());
        let attempt =
            Attempt { image, boot_id, count: 1, deployment: None, rolled_back: false, unknown: BTreeMap::new() };
        Annotate::RecordAttempt { attempt }.into()
    }

    /// A process that saw these rules from these monotonic times on; they are the API server's, too.
    fn timing(node: &NodeFacts, rules: &[(Rule, u64)]) -> Timing {
        let mut timing = Timing::default();
        rules.iter().for_each(|(rule, mono)| timing.decided(Some(node), *rule, Now { mono: *mono, unix: 0 }));
        timing
    }

    fn written(timing: &Timing, node: &NodeFacts, action: &Action, unix: u64) -> Option<LastUpdate> {
        let mut patch = Patch::new();
        timing.add(&mut patch, node, action, Now { mono: 0, unix });
        patch.remove(LAST_UPDATE).map(|text| serde_json::from_str(&text.unwrap()).unwrap())
    }

    const BEFORE: [(Rule, u64); 6] = [
        (Rule::Done, 0),
        (Rule::Verify, 5_000),
        (Rule::Stage, 6_000),
        (Rule::Drain, 20_000),
        (Rule::Reboot, 50_000),
        (Rule::Reboot, 51_000),
    ];

    #[test]
    fn times_go_on_after_the_reboot() {
        let first = written(&timing(&node(None), &BEFORE), &node(None), &record(), 51_000).unwrap();
        let took = |update: &LastUpdate, rule: Rule| update.took.get(rule.name()).copied();
        assert_eq!(took(&first, Rule::Verify), Some(1_000));
        assert_eq!(took(&first, Rule::Stage), Some(14_000));
        assert_eq!(took(&first, Rule::Drain), Some(30_000));
        assert_eq!((first.drained, first.out_of_service), (50_000, None), "drained when rule reboot began");
        assert_eq!(took(&first, Rule::Done), None, "the time before the update does not count");
        let booted = node(Some(first));
        let after = timing(&booted, &[(Rule::Health, 0), (Rule::Uncordon, 4_000), (Rule::Settle, 9_000)]);
        let done = written(&after, &booted, &Annotate::Settle.into(), 120_000).unwrap();
        assert_eq!(done.out_of_service, Some(70_000));
        assert_eq!((took(&done, Rule::Stage), took(&done, Rule::Health)), (Some(14_000), Some(4_000)));
        assert_eq!(written(&after, &node(Some(done)), &Annotate::Settle.into(), 130_000), None, "only once");
    }

    #[test]
    fn a_second_boot_keeps_the_first_end_of_the_drain() {
        let earlier = LastUpdate { image: IMAGE.to_owned(), drained: 7, ..LastUpdate::default() };
        let node = node(Some(earlier));
        let again = timing(&node, &[(Rule::Verify, 0), (Rule::Reboot, 2_000), (Rule::Reboot, 3_000)]);
        assert_eq!(written(&again, &node, &record(), 100_000).unwrap().drained, 7);
        let drained_again = timing(&node, &BEFORE);
        assert_eq!(written(&drained_again, &node, &record(), 100_000).unwrap().drained, 99_000);
    }

    #[test]
    fn another_image_and_other_actions_take_no_times_over() {
        let other = LastUpdate { image: "other".to_owned(), drained: 7, ..LastUpdate::default() };
        let before = timing(&node(None), &BEFORE);
        assert_eq!(written(&before, &node(Some(other)), &Annotate::Settle.into(), 1), None);
        assert_eq!(written(&before, &node(None), &Action::Nothing, 1), None);
        let mut retargeted = timing(&node(None), &BEFORE);
        let next = NodeFacts { desired_image: Some("x".to_owned().into()), ..NodeFacts::default() };
        retargeted.decided(Some(&next), Rule::Verify, Now { mono: 60_000, unix: 0 });
        assert!(retargeted.spent.is_empty());
    }
}
