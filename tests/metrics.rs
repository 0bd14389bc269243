//! `rebase-agent metrics`: OpenMetrics text about a node that updates, loses its API server, and is not image-mode.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]
#![allow(clippy::disallowed_methods, reason = "tests may make calls that the agent must not")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use support::world::{NODE, World, WorldOptions};

const AGENT: &str = env!("CARGO_BIN_EXE_rebase-agent-under-test");
const HOLD: &str = "rebase-agent.openshift.io/hold";

/// The samples by name and labels. Fails unless the text is OpenMetrics 1.0 as far as gauges use it, and the older text
/// format of Prometheus as well.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let is_name = |name: &str| {
        let mut bytes = name.bytes();
        let first = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
        first && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    let body = text.strip_suffix("# EOF\n").unwrap_or_else(|| panic!("the last line is not `# EOF`: {text}"));
    let (mut samples, mut family, mut families) = (BTreeMap::new(), String::new(), BTreeSet::new());
    let mut described = BTreeSet::new();
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let (keyword, rest) = comment.split_once(' ').unwrap();
            let (name, rest) = rest.split_once(' ').unwrap();
            assert!(is_name(name) && !rest.is_empty() && !rest.contains('\\'), "{line}");
            match keyword {
                "TYPE" => {
                    assert_eq!(rest, "gauge", "readers of the older format know no info and no stateset: {line}");
                    assert!(families.insert(name.to_owned()), "the family {name} is given twice");
                    name.clone_into(&mut family);
                }
                "UNIT" => assert!(name.ends_with(&format!("_{rest}")), "the name does not end with the unit: {line}"),
                "HELP" => assert!(described.insert(name.to_owned()), "{line}"),
                _ => panic!("no keyword of OpenMetrics: {line}"),
            }
            assert_eq!(name, family, "metadata outside of its family: {line}");
            continue;
        }
        let (key, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
        let (name, labels) = key.split_once('{').unwrap_or((key, "}"));
        assert_eq!(name, family, "a sample outside of its family: {line}");
        let mut rest = labels.strip_suffix('}').unwrap_or_else(|| panic!("labels do not end: {line}"));
        let mut names = BTreeSet::new();
        while !rest.is_empty() {
            let (label, quoted) = rest.split_once("=\"").unwrap_or_else(|| panic!("no label: {line}"));
            assert!(is_name(label) && names.insert(label.to_owned()), "{line}");
            let mut escaped = false;
            let end = quoted.find(|c| {
                let ends = c == '"' && !escaped;
                assert!(!escaped || ['\\', '"', 'n'].contains(&c), "an unknown escape: {line}");
                escaped = c == '\\' && !escaped;
                ends
            });
            rest = quoted
                .split_at(end.unwrap_or_else(|| panic!("a label does not end: {line}")))
                .1
                .strip_prefix('"')
                .unwrap();
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
        assert!(samples.insert(key.to_owned(), value).is_none(), "the sample is given twice: {line}");
    }
    assert_eq!(families, described, "a family without help, or help without a family");
    samples
}

#[test]
fn parser_refuses_what_openmetrics_forbids() {
    let good = "# TYPE a_seconds gauge\n# UNIT a_seconds seconds\n# HELP a_seconds x\na_seconds{b=\"\\\"}\",c=\"\"} 1\n# EOF\n";
    assert_eq!(parse(good).len(), 1);
    for (from, to) in [
        ("# EOF\n", ""),
        (" gauge", " stateset"),
        ("a_seconds seconds", "a_seconds bytes"),
        ("a_seconds{", "b_seconds{"),
        ("c=\"\"", "b=\"\""),
        ("\\\"}", "\\x}"),
        ("\\\"}", "\"}"),
        ("# HELP a_seconds x\n", ""),
        ("} 1\n", "} one\n"),
        ("# TYPE", "# TIPE"),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good);
        assert!(std::panic::catch_unwind(|| parse(&bad)).is_err(), "{bad}");
    }
}

async fn metrics(world: &World) -> BTreeMap<String, f64> {
    let (code, out, err) = world.command(&["metrics"]).await.unwrap();
    assert_eq!(code, 0, "{out}{err}");
    parse(&out)
}

/// Every metric that an alert uses is one that this program prints, or comes from a source that the rules name.
fn alerts_use_known_metrics(printed: &BTreeMap<String, f64>) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd/cluster/alerts.yaml");
    let alerts = std::fs::read_to_string(file).unwrap();
    let names = alerts.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let used: BTreeSet<&str> = names.filter(|word| word.starts_with("rebase_agent_")).collect();
    let names: BTreeSet<&str> = printed.keys().map(|key| key.split('{').next().unwrap()).collect();
    assert!(used.len() >= 4 && used.is_subset(&names), "alerts use {used:?}, the agent prints {names:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_tell_the_node_and_never_guess() {
    let world = World::new(WorldOptions::new(Path::new(AGENT))).await.unwrap();
    world.target("1", &world.installed);
    world.machine.power_on().await.unwrap();
    world.wait_done(&world.installed).await.unwrap();
    let is = |samples: &BTreeMap<String, f64>, key: &str, value: f64| {
        assert_eq!(samples.get(key), Some(&value), "{key} in {samples:#?}");
    };
    let done = metrics(&world).await;
    is(&done, "rebase_agent_up", 1.0);
    is(&done, "rebase_agent_state{state=\"Done\"}", 1.0);
    is(&done, "rebase_agent_desired_image_booted", 1.0);
    is(&done, "rebase_agent_reason{reason=\"Done\",severity=\"progress\"}", 1.0);
    let booted = done.keys().find(|key| key.starts_with("rebase_agent_booted_image_info{")).unwrap();
    assert!(booted.contains(&world.installed.digest) && booted.contains("config=\"rendered-worker-1\""), "{booted}");
    alerts_use_known_metrics(&done);

    world.store().annotate("kubectl-annotate", NODE, HOLD, Some("\"quoted\" \\ text")).unwrap();
    let image = world.signed("2").await.unwrap();
    world.target("2", &image);
    world.wait_reason("Held").await.unwrap();
    let held = metrics(&world).await;
    is(&held, "rebase_agent_state{state=\"Working\"}", 1.0);
    is(&held, "rebase_agent_state{state=\"Done\"}", 0.0);
    is(&held, "rebase_agent_held", 1.0);
    is(&held, "rebase_agent_desired_image_booted", 0.0);

    // The times of the update are on the Node, because the agent is not the same process after the reboot.
    world.store().annotate("kubectl-annotate", NODE, HOLD, None).unwrap();
    world.wait_done(&image).await.unwrap();
    let updated = metrics(&world).await;
    for rule in ["verify", "stage", "drain", "reboot", "uncordon"] {
        let key = format!("rebase_agent_last_update_rule_seconds{{rule=\"{rule}\"}}");
        assert!(updated.contains_key(&key), "no {key} in {updated:#?}");
    }
    let out = updated["rebase_agent_last_update_out_of_service_seconds"];
    assert!(out > 0.0 && out < support::world::DEADLINE.as_secs_f64(), "{out} s out of service");
    is(&updated, "rebase_agent_desired_image_booted", 1.0);
    is(&updated, "rebase_agent_desired_image_verified", 1.0);
    let vouched = updated.keys().find(|key| key.starts_with("rebase_agent_verified_timestamp_seconds{")).unwrap();
    assert!(vouched.contains(&image.digest) && vouched.contains("key=\"key sha256:"), "{vouched}");

    // Without the Node there is no state, and the error says why.
    world.store().delete_node(NODE);
    let lost = metrics(&world).await;
    is(&lost, "rebase_agent_readable{source=\"node\"}", 0.0);
    is(&lost, "rebase_agent_readable{source=\"host\"}", 1.0);
    is(&lost, "rebase_agent_error{source=\"node\",reason=\"NodeNotFound\"}", 1.0);
    for absent in ["rebase_agent_state", "rebase_agent_held", "rebase_agent_desired_image"] {
        assert!(!lost.keys().any(|key| key.starts_with(absent)), "{absent} in {lost:#?}");
    }

    // Another host: one line instead of metrics, and the exit code of all commands.
    let mut command = tokio::process::Command::new(AGENT);
    command.arg("metrics").env("REBASE_AGENT_ROOT", world.path());
    let foreign = support::tools::run(command, support::world::DEADLINE).await.unwrap();
    let said = String::from_utf8(foreign.stdout).unwrap();
    assert_eq!(foreign.status.code(), Some(5), "{said}");
    assert!(said.starts_with("HostNotImageMode: ") && said.lines().count() == 1, "{said}");
}
