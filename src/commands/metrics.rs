//! `metrics`: prints what `status` reads as OpenMetrics text, for a scraper that connects to the socket of
//! rebase-agent-metrics.socket.
//!
//! Every family is a gauge, because readers of the older Prometheus format reject OpenMetrics' own types. What cannot be
//! read has no sample, so that a missing fact never looks like a value.

use std::fmt::Write as _;
use std::time::Duration;

use super::foreign;
use crate::decide::Rule;
use crate::host::HostError;
use crate::model::{
    Deployment, Fault, HostFacts, NodeFacts, NodeState, PinnedImage, Reading, Reason, Severity, is_image, is_named,
    printable,
};
use crate::observe::{self, Neighbours};

/// The longest wait for one source. Prometheus gives up a scrape after 10 seconds.
const PATIENCE: Duration = Duration::from_secs(8);
/// Longest value of a label that has foreign text, in characters.
const MAX_LABEL: usize = 500;

/// Prints the metrics and returns the exit code.
pub(super) async fn metrics(neighbours: &Neighbours) -> u8 {
    if let Some(code) = foreign(neighbours, false) {
        return code;
    }
    let host = &neighbours.host;
    let (node, host, service) = tokio::join!(
        within("the API server", async {
            observe::cluster(neighbours.api.metadata().await.map(|(node, _)| node.facts))
        }),
        within("the host tool", observe::deployments(host)),
        within("systemd", async { service(host.service_status().await) }),
    );
    let text = Seen { node, host, service }.text();
    // A closed connection is not an error of the command.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
    0
}

async fn within<T>(what: &str, read: impl Future<Output = Reading<T>>) -> Reading<T> {
    tokio::time::timeout(PATIENCE, read).await.unwrap_or_else(|_| {
        let message = format!("{what} does not answer within {} s", PATIENCE.as_secs());
        Reading::Unknown(Fault { reason: Reason::DeadlineExceeded, message })
    })
}

/// What systemd knows about rebase-agent.service.
struct Service {
    active: bool,
    /// The first word of its status text, while it is active.
    reason: Option<Reason>,
}

fn service(answer: Result<(String, String), HostError>) -> Reading<Service> {
    match answer {
        Ok((status, active)) => {
            let word = status.split(':').next().unwrap_or_default();
            let reason = Reason::ALL.iter().find(|reason| reason.as_str() == word).copied();
            let active = active == "active";
            // systemd keeps the text of a service that has ended.
            Reading::Known(Service { active, reason: reason.filter(|_| active) })
        }
        Err(error) => Reading::Unknown(Fault::from(&error)),
    }
}

fn fault<T>(reading: &Reading<T>) -> Option<Reason> {
    match reading {
        Reading::Known(_) => None,
        Reading::Unknown(fault) => Some(fault.reason),
    }
}

struct Seen {
    node: Reading<NodeFacts>,
    host: Reading<HostFacts>,
    service: Reading<Service>,
}

/// OpenMetrics text: families of gauges.
struct Text(String);

/// The labels of a sample, and its value.
type Sample<'a> = (Vec<(&'a str, &'a str)>, f64);

impl Text {
    /// Adds a family, unless it has no samples.
    fn family(&mut self, name: &str, help: &str, samples: &[Sample<'_>]) {
        if samples.is_empty() {
            return;
        }
        let _ = writeln!(self.0, "# TYPE rebase_agent_{name} gauge");
        if name.ends_with("_seconds") {
            let _ = writeln!(self.0, "# UNIT rebase_agent_{name} seconds");
        }
        let _ = writeln!(self.0, "# HELP rebase_agent_{name} {help}");
        for (labels, value) in samples {
            let labels: Vec<String> =
                labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ = writeln!(self.0, "rebase_agent_{name}{labels} {value}");
        }
    }

    fn number(&mut self, name: &str, help: &str, value: Option<f64>) {
        self.family(name, help, &value.map(|value| (vec![], value)).into_iter().collect::<Vec<_>>());
    }
}

fn truth(is: bool) -> f64 {
    f64::from(u8::from(is))
}

fn seconds(milliseconds: u64) -> f64 {
    Duration::from_millis(milliseconds).as_secs_f64()
}

/// A label's value. [`printable`] leaves no line break.
fn escaped(value: &str) -> String {
    printable(value, MAX_LABEL).replace('\\', r"\\").replace('"', "\\\"")
}

impl Seen {
    fn text(&self) -> String {
        let mut text = Text(String::new());
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        text.family("build_info", "The version of the program.", &[(version, 1.0)]);
        self.sources(&mut text);
        self.node(&mut text);
        self.images(&mut text);
        text.0.push_str("# EOF\n");
        text.0
    }

    /// What could be read, and what is wrong.
    fn sources(&self, text: &mut Text) {
        let service = self.service.known();
        let (node, host) = (self.node.known(), self.host.known());
        let up = service.map(|service| truth(service.active));
        text.number("up", "Whether rebase-agent.service is active.", up);
        let known = [("node", node.is_some()), ("host", host.is_some()), ("service", service.is_some())];
        let readable = known.map(|(source, known)| (vec![("source", source)], truth(known)));
        text.family(
            "readable",
            "Whether the API server (node), the host tool (host) and systemd (service) answered.",
            &readable,
        );

        let reason = service.and_then(|service| service.reason);
        let now =
            reason.map(|reason| (vec![("reason", reason.as_str()), ("severity", reason.severity().as_str())], 1.0));
        text.family("reason", "The reason that the running service gives in its status.", now.as_slice());
        let fails = |reason: &Reason| !matches!(reason.severity(), Severity::Progress | Severity::Waiting);
        let errors = [
            ("node", fault(&self.node)),
            ("host", fault(&self.host)),
            ("service", fault(&self.service).or(reason.filter(fails))),
        ];
        let errors: Vec<Sample<'_>> = errors
            .iter()
            .filter_map(|(source, reason)| Some((vec![("source", *source), ("reason", (*reason)?.as_str())], 1.0)))
            .collect();
        let help = "Why a source could not be read, or why the running service refuses or retries.";
        text.family("error", help, &errors);
    }

    /// What the Node's annotations say.
    fn node(&self, text: &mut Text) {
        let Some(node) = self.node.known() else { return };
        const STATES: [NodeState; 4] =
            [NodeState::Working, NodeState::Done, NodeState::Degraded, NodeState::Unreconcilable];
        let current = node.state.as_deref();
        let states = STATES.map(|state| (vec![("state", state.as_str())], truth(current == Some(state.as_str()))));
        text.family("state", "The Node's state: 1 for the current one.", &states);
        let held = truth(node.hold.is_some());
        text.number("held", "Whether the hold annotation keeps the node from drain and reboot.", Some(held));
        let attempts = node.attempt.as_ref().map_or(0.0, |attempt| attempt.count.into());
        text.number(
            "boot_attempts",
            "Boots into the image of the attempt annotation that were attempted.",
            Some(attempts),
        );
        let refused = truth(node.untrusted.is_some());
        text.number("booted_image_refused", "Whether the policy refuses the image that runs.", Some(refused));
        let vouched = |image: &PinnedImage| node.verified.as_ref().is_some_and(|by| by.image == image.to_string());
        let verified = node.desired().map(|desired| truth(vouched(desired)));
        text.number("desired_image_verified", "Whether the agent has verified the desired image.", verified);
        if let Some(by) = &node.verified
            && let Some(time) = crate::time::unix(&by.time)
        {
            let labels = vec![("image", by.image.as_str()), ("rule", by.rule.as_str()), ("key", by.key.as_str())];
            let help = "When an image was verified, and who vouched for it.";
            text.family("verified_timestamp_seconds", help, &[(labels, seconds(time))]);
        }

        let Some(update) = &node.last_update else { return };
        let Some(out_of_service) = update.out_of_service else { return };
        let took = |rule: &Rule| Some((vec![("rule", rule.name())], seconds(*update.took.get(rule.name())?)));
        let took: Vec<Sample<'_>> = Rule::ALL.iter().filter_map(took).collect();
        text.family("last_update_rule_seconds", "How long each rule applied during the last update.", &took);
        let help = "From the end of the drain to Done, in the last update.";
        text.number("last_update_out_of_service_seconds", help, Some(seconds(out_of_service)));
        let done = seconds(update.drained.saturating_add(out_of_service));
        text.number("last_update_done_timestamp_seconds", "When the last update was done.", Some(done));
    }

    /// What the host's deployments are.
    fn images(&self, text: &mut Text) {
        let Some(host) = self.host.known() else { return };
        let booted = host.booted();
        if let Some(booted) = booted {
            let digest = booted.digest.as_ref().map(ToString::to_string).unwrap_or_default();
            let labels = vec![
                ("image", booted.reference.as_deref().unwrap_or_default()),
                ("digest", &digest),
                ("config", booted.rendered_config.as_deref().unwrap_or_default()),
                ("version", booted.version.as_deref().unwrap_or_default()),
                ("backend", host.backend.as_str()),
            ];
            text.family("booted_image_info", "The image that runs, and the host tool.", &[(labels, 1.0)]);
        }
        let Some(desired) = self.node.known().and_then(NodeFacts::desired) else { return };
        // The digest that the host recorded for an index is that of the instance; then only the reference names it.
        let is_desired = |found: &Deployment| truth(is_image(found, desired, None) || is_named(found, desired));
        let booted = Some(booted.map_or(0.0, is_desired));
        let staged = Some(host.staged().map_or(0.0, is_desired));
        text.number("desired_image_booted", "Whether the desired image runs.", booted);
        text.number("desired_image_staged", "Whether the desired image is staged.", staged);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const IMAGE: &str = "q.io/o/i@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn unknown<T>(reason: Reason) -> Reading<T> {
        Reading::Unknown(Fault { reason, message: "x".to_owned() })
    }

    fn seen() -> Seen {
        let update = json!({"image": IMAGE, "took": {"verify": 312, "stage": 14_000, "unknown": 1}, "drained": 5_000,
            "outOfService": 90_500});
        let verified =
            json!({"image": IMAGE, "rule": "docker \"q.io\"", "key": "key sha256:1", "time": "1970-01-01T00:00:07Z"});
        let node = json!({"state": "Working", "desired_image": IMAGE, "hold": "why", "last_update": update, "verified": verified});
        let host = json!({"deployments": [
            {"id": "b", "booted": true, "reference": "q.io/o/i:1", "version": "a\"\\\n{b} c"},
            {"id": "s", "staged": true, "reference": IMAGE},
        ]});
        Seen {
            node: Reading::Known(serde_json::from_value(node).unwrap()),
            host: Reading::Known(serde_json::from_value(host).unwrap()),
            service: service(Ok(("Held: x is held".to_owned(), "active".to_owned()))),
        }
    }

    fn has(text: &str, sample: &str) {
        assert!(text.lines().any(|line| line == sample), "no `{sample}` in\n{text}");
    }

    #[test]
    fn a_node_on_its_way_is_shown_by_its_annotations_and_deployments() {
        let text = seen().text();
        for sample in [
            "rebase_agent_up 1",
            "rebase_agent_readable{source=\"node\"} 1",
            "rebase_agent_state{state=\"Working\"} 1",
            "rebase_agent_state{state=\"Done\"} 0",
            "rebase_agent_reason{reason=\"Held\",severity=\"waiting\"} 1",
            "rebase_agent_held 1",
            "rebase_agent_boot_attempts 0",
            "rebase_agent_desired_image_booted 0",
            "rebase_agent_desired_image_staged 1",
            "rebase_agent_desired_image_verified 1",
            &format!(
                "rebase_agent_verified_timestamp_seconds{{image=\"{IMAGE}\",rule=\"docker \\\"q.io\\\"\",key=\"key sha256:1\"}} 7"
            ),
            "rebase_agent_last_update_rule_seconds{rule=\"verify\"} 0.312",
            "rebase_agent_last_update_rule_seconds{rule=\"stage\"} 14",
            "rebase_agent_last_update_out_of_service_seconds 90.5",
            "rebase_agent_last_update_done_timestamp_seconds 95.5",
        ] {
            has(&text, sample);
        }
        assert!(!text.contains("rebase_agent_error"), "{text}");
        assert!(text.ends_with("\n# EOF\n"), "{text}");
    }

    #[test]
    fn foreign_text_stays_inside_its_label() {
        has(
            &seen().text(),
            r#"rebase_agent_booted_image_info{image="q.io/o/i:1",digest="",config="",version="a\"\\ {b} c",backend="rpm-ostree"} 1"#,
        );
    }

    #[test]
    fn what_cannot_be_read_has_no_sample() {
        let text = Seen {
            node: unknown(Reason::ClusterUnreachable),
            host: unknown(Reason::HostUnreachable),
            service: unknown(Reason::DeadlineExceeded),
        }
        .text();
        for (source, reason) in
            [("node", "ClusterUnreachable"), ("host", "HostUnreachable"), ("service", "DeadlineExceeded")]
        {
            has(&text, &format!("rebase_agent_readable{{source=\"{source}\"}} 0"));
            has(&text, &format!("rebase_agent_error{{source=\"{source}\",reason=\"{reason}\"}} 1"));
        }
        let families = text.lines().filter(|line| line.starts_with("# TYPE")).count();
        assert_eq!(families, 3, "only build_info, readable and error are known:\n{text}");
    }

    #[test]
    fn the_status_of_a_service_that_has_ended_is_no_reason() {
        let told = |status: &str, active: &str| service(Ok((status.to_owned(), active.to_owned())));
        let reason = |reading: Reading<Service>| reading.known().map(|service| (service.active, service.reason));
        assert_eq!(reason(told("Held: x", "active")), Some((true, Some(Reason::Held))));
        assert_eq!(reason(told("Held: x", "failed")), Some((false, None)));
        assert_eq!(reason(told("", "active")), Some((true, None)));
    }
}
