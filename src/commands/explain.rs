//! `explain`: prints the rule that applies to the current observations, or the meaning of a reason.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::json;

use super::{Decided, Seen, exit_code, foreign, line, now, print, rule, see};
use crate::cli::Look;
use crate::decide::decide;
use crate::model::{NodeState, Observed, Reason};
use crate::observe::Neighbours;
use crate::report::{Patch, report};

/// Prints the rule that applies and returns the exit code.
pub(super) async fn explain(neighbours: &Neighbours, look: &Look) -> u8 {
    if let Some(code) = foreign(neighbours, look.json) {
        return code;
    }
    let Seen { observed, memory, .. } = see(neighbours, look).await;
    let decision = decide(&observed, &memory, &look.tuning.limits(), now(neighbours));
    let code = exit_code(&observed, &decision);
    let patch = observed.cluster.known().map(|node| report(node, &decision)).unwrap_or_default();
    let explanation = Explanation { observed, decision: Decided::from(&decision), row: decision.rule.row(), patch };
    print(look.json, &explanation, || explanation.text());
    code
}

/// Prints the meaning of `reason` and its remedy.
pub(super) fn reason(reason: Reason, json: bool) -> u8 {
    let (severity, meaning, help) = (reason.severity().as_str(), reason.meaning(), reason.help());
    let value = json!({ "reason": reason, "severity": severity, "meaning": meaning, "help": help });
    print(json, &value, || {
        let mut out = String::new();
        let _ = writeln!(out, "{reason} ({severity})");
        line(&mut out, "Meaning", meaning);
        line(&mut out, "Help", help);
        out
    });
    0
}

/// The output of `explain`.
#[derive(Debug, Serialize)]
struct Explanation {
    /// The observations, in the form of the golden cases.
    observed: Observed,
    /// The decision on them.
    decision: Decided,
    /// The rule's row: when, then, state.
    row: [&'static str; 3],
    /// The annotations that the service would write.
    patch: Patch,
}

impl Explanation {
    /// The text for people.
    fn text(&self) -> String {
        let mut out = String::new();
        line(&mut out, "Rule", &rule(&self.decision));
        let [when, then, state] = self.row;
        line(&mut out, "", &format!("when {when}: {then}; state {state}"));
        let action = serde_json::to_string(&self.decision.action).unwrap_or_default();
        line(&mut out, "Action", action.trim_matches('"'));
        let state = self.decision.state.map_or("unchanged", NodeState::as_str);
        line(&mut out, "State", state);
        if self.patch.is_empty() {
            line(&mut out, "Patch", "none");
        }
        for (index, (key, value)) in self.patch.iter().enumerate() {
            let label = if index == 0 { "Patch" } else { "" };
            line(&mut out, label, &format!("{key}={}", value.as_deref().unwrap_or("(removed)")));
        }
        let wake = self.decision.next_look.map_or_else(
            || "when something changes".to_owned(),
            |seconds| format!("in {seconds} s, or when something changes"),
        );
        line(&mut out, "Next look", &wake);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_the_fields_of_its_version() {
        let (observed, decision) = super::super::tests::decided();
        let patch = Patch::from([("key".to_owned(), None)]);
        let explanation = Explanation { observed, decision: Decided::from(&decision), row: decision.rule.row(), patch };
        super::super::tests::check_fields("tests/json/explain", &explanation);
    }
}
