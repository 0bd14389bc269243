//! Golden decisions: every directory of `tests/cases` holds one situation and the decision that the rules make.
//!
//! `given.json` is a base of `tests/cases/base` and merge patches (RFC 7386) over it; `expected.json` is the result of
//! `decide` and `report`. Two conveniences keep both short: words in angle brackets stand for long strings
//! (`base/words.json`), and an array element `{"like": "B", …}` is a patch over the deployment of that name
//! (`base/deployments.json`). In `expected.json`, `<told>` is the reason annotation `reason: message`, and `says` lists
//! texts that the message must contain. `UPDATE_CASES=1` rewrites `expected.json`, except `says`.
//!
//! Every case runs with both backends, unless it names one. Where bootc's decision differs, the fields in `bootc` of
//! `expected.json` replace those of the same name.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that rewrites its own expectations"
)]

mod ways_out;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use rebase_agent::decide::{Decision, Limits, Memory, Rule, decide};
use rebase_agent::model::{Backend, HostFacts, NodeState, Now, Observed, Reading};
use rebase_agent::report::report;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use ways_out::names_a_way_out;

/// Longest message, in characters: `systemctl status`, annotations and Events all show it completely.
const LONGEST: usize = 900;

type Words = BTreeMap<String, String>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases")
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn parse(path: &Path, words: &Words) -> Result<Value, String> {
    let text = words.iter().fold(read(path)?, |text, (word, meaning)| text.replace(word, meaning));
    serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))
}

/// RFC 7386. Deleting a key that does not exist is a typing error.
fn merge(target: &mut Value, patch: &Value, at: &str) -> Result<(), String> {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return Ok(());
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    for (key, change) in changes {
        let at = format!("{at}.{key}");
        if change.is_null() {
            target.as_object_mut().unwrap().remove(key).ok_or(format!("{at} is deleted and was not there"))?;
        } else {
            merge(&mut target[key], change, &at)?;
        }
    }
    Ok(())
}

/// Replaces `{"like": name, …}` by the deployment of that name, patched.
fn expand(value: &mut Value, named: &Value) -> Result<(), String> {
    match value {
        Value::Array(items) => items.iter_mut().try_for_each(|item| expand(item, named)),
        Value::Object(fields) => {
            if let Some(Value::String(name)) = fields.remove("like") {
                let mut whole = named.get(&name).ok_or(format!("no deployment is called {name}"))?.clone();
                merge(&mut whole, &Value::Object(std::mem::take(fields)), &name)?;
                *value = whole;
                return Ok(());
            }
            fields.values_mut().try_for_each(|field| expand(field, named))
        }
        _ => Ok(()),
    }
}

/// Every given key must come back from the model; otherwise it is a typing error.
fn known(given: &Value, understood: &Value, at: &str) -> Result<(), String> {
    match (given, understood) {
        (Value::Object(given), Value::Object(understood)) => given.iter().try_for_each(|(key, value)| {
            let at = format!("{at}.{key}");
            let understood = understood.get(key).ok_or(format!("the model has no {at}"))?;
            known(value, understood, &at)
        }),
        (Value::Array(given), Value::Array(understood)) => {
            given.iter().zip(understood).try_for_each(|(given, understood)| known(given, understood, at))
        }
        _ => Ok(()),
    }
}

fn model<T: DeserializeOwned + Serialize>(value: &Value, at: &str) -> Result<T, String> {
    let model: T = serde_json::from_value(value.clone()).map_err(|error| format!("{at}: {error}"))?;
    known(value, &serde_json::to_value(&model).map_err(|error| error.to_string())?, at)?;
    Ok(model)
}

struct Situation {
    observed: Observed,
    memory: Memory,
    limits: Limits,
    now: Now,
}

const PARTS: [&str; 4] = ["observed", "memory", "limits", "now"];

/// A case or a base, merged with everything it builds on.
fn load(path: &Path, words: &Words, named: &Value) -> Result<Value, String> {
    let mut given = parse(path, words)?;
    expand(&mut given, named)?;
    let fields = given.as_object().ok_or("given.json is no object")?;
    if let Some(odd) = fields.keys().find(|key| !PARTS.contains(&key.as_str()) && *key != "about" && *key != "base") {
        return Err(format!("{} knows no `{odd}`", path.display()));
    }
    if given["about"].as_str().is_none_or(str::is_empty) {
        return Err(format!("{} has no text in `about`", path.display()));
    }
    let mut whole = match given["base"].as_str() {
        Some(base) => load(&root().join("base").join(format!("{base}.json")), words, named)?,
        None => Value::Null,
    };
    for part in PARTS {
        if let Some(patch) = given.get(part) {
            merge(&mut whole[part], patch, part)?;
        }
    }
    Ok(whole)
}

fn situation(path: &Path, words: &Words, named: &Value) -> Result<Situation, String> {
    let whole = load(path, words, named)?;
    Ok(Situation {
        observed: model(&whole["observed"], "observed")?,
        memory: model(&whole["memory"], "memory")?,
        limits: model(&whole["limits"], "limits")?,
        now: model(&whole["now"], "now")?,
    })
}

/// The compared fields, with `says` copied from the expectation.
fn answer(situation: &Situation, decision: &Decision, says: Option<&Value>) -> Value {
    let told = format!("{}: {}", decision.reason, decision.message);
    let patch: BTreeMap<String, Option<String>> = match situation.observed.cluster.known() {
        None => BTreeMap::new(),
        Some(node) => report(node, decision)
            .into_iter()
            .map(|(key, value)| (key, value.map(|value| if value == told { "<told>".to_owned() } else { value })))
            .collect(),
    };
    let mut answer = json!({
        "rule": decision.rule,
        "action": decision.action,
        "reason": decision.reason,
        "state": decision.state,
        "wake": decision.wake,
        "patch": patch,
    });
    if let Some(says) = says {
        answer["says"] = says.clone();
    }
    answer
}

fn shorten(value: &Value, words: &Words) -> String {
    let text = format!("{}\n", serde_json::to_string_pretty(value).unwrap());
    // Longest first: an image contains its digest.
    let mut words: Vec<_> = words.iter().collect();
    words.sort_by_key(|(_, meaning)| std::cmp::Reverse(meaning.len()));
    words.into_iter().fold(text, |text, (word, meaning)| text.replace(meaning, word))
}

/// The lines that only one side has, in order.
fn difference(expected: &str, actual: &str) -> String {
    let (expected, actual): (Vec<_>, Vec<_>) = (expected.lines().collect(), actual.lines().collect());
    let mut out = String::new();
    expected.iter().filter(|line| !actual.contains(line)).for_each(|line| writeln!(out, "  - {line}").unwrap());
    actual.iter().filter(|line| !expected.contains(line)).for_each(|line| writeln!(out, "  + {line}").unwrap());
    out
}

/// Checks that hold for every decision.
fn sound(decision: &Decision, says: &[String]) -> Result<(), String> {
    let message = &decision.message;
    if message.chars().count() > LONGEST || message.chars().any(char::is_control) {
        return Err(format!("the message is too long or not one line: {message}"));
    }
    let refuses = matches!(decision.state, Some(NodeState::Degraded | NodeState::Unreconcilable));
    if refuses {
        names_a_way_out(message)?;
    }
    match says.iter().find(|part| !message.contains(*part)) {
        Some(part) => Err(format!("the message does not say `{part}`: {message}")),
        None => Ok(()),
    }
}

/// The same situation with the other backend, or `None` if the backend makes no difference.
fn with_bootc(situation: &Situation) -> Option<Situation> {
    let Reading::Known(host) = &situation.observed.host else { return None };
    let host = HostFacts { backend: Backend::Bootc, ..host.clone() };
    let observed = Observed { host: Reading::Known(host), ..situation.observed.clone() };
    let Situation { memory, limits, now, .. } = situation;
    (observed != situation.observed).then(|| Situation {
        observed,
        memory: memory.clone(),
        limits: limits.clone(),
        now: *now,
    })
}

/// `whole` with `fields` in place of those of the same name.
fn instead(mut whole: Value, fields: Option<&Value>) -> Value {
    for (key, field) in fields.and_then(Value::as_object).into_iter().flatten() {
        whole[key] = field.clone();
    }
    whole
}

fn check(directory: &Path, words: &Words, named: &Value, update: bool) -> Result<(), String> {
    let situation = situation(&directory.join("given.json"), words, named)?;
    let file = directory.join("expected.json");
    let mut expected = if file.exists() { parse(&file, words)? } else { Value::Null };
    if expected.is_null() && !update {
        return Err("expected.json is missing; UPDATE_CASES=1 writes it".into());
    }
    let bootc = expected.as_object_mut().and_then(|fields| fields.remove("bootc"));
    let mut actual = check_one(&situation, &expected, words, update)?;
    match with_bootc(&situation) {
        Some(situation) => {
            let expected = instead(expected, bootc.as_ref());
            let other = check_one(&situation, &expected, words, update).map_err(|why| format!("with bootc: {why}"))?;
            let differs = |(key, field): &(&String, &Value)| actual[*key] != **field;
            let fields: Map<String, Value> = other.as_object().unwrap().iter().filter(differs).map(owned).collect();
            if !fields.is_empty() {
                actual["bootc"] = Value::Object(fields);
            }
        }
        None if bootc.is_some() => return Err("it is not decided for bootc as well".into()),
        None => {}
    }
    let rule: Rule = serde_json::from_value(actual["rule"].clone()).map_err(|error| format!("rule: {error}"))?;
    let prefix = format!("{:02}-", rule.number());
    if !directory.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)) {
        return Err(format!("rule {rule} decides, so the directory's name must begin with {prefix}"));
    }
    if update {
        std::fs::write(&file, shorten(&actual, words)).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn owned((key, field): (&String, &Value)) -> (String, Value) {
    (key.clone(), field.clone())
}

/// Decides one situation and compares the result with the expectation.
fn check_one(situation: &Situation, expected: &Value, words: &Words, update: bool) -> Result<Value, String> {
    let Situation { observed, memory, limits, now } = situation;
    let decision = decide(observed, memory, limits, *now);
    if decision != decide(observed, memory, limits, *now) {
        return Err("the same situation was decided in two ways".into());
    }
    let actual = answer(situation, &decision, expected.get("says"));
    if !update && *expected != actual {
        let (expected, actual) = (shorten(expected, words), shorten(&actual, words));
        return Err(format!("{}\n  message: {}", difference(&expected, &actual), decision.message));
    }
    let says: Vec<String> = match expected.get("says") {
        Some(says) => serde_json::from_value(says.clone()).map_err(|error| format!("says: {error}"))?,
        None => Vec::new(),
    };
    sound(&decision, &says)?;
    Ok(actual)
}

#[test]
fn every_case_is_decided_as_expected() {
    let base = root().join("base");
    let words: Words = serde_json::from_str(&read(&base.join("words.json")).unwrap()).unwrap();
    let named = parse(&base.join("deployments.json"), &words).unwrap();
    let update = std::env::var_os("UPDATE_CASES").is_some();
    let mut directories: Vec<PathBuf> = std::fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path()).collect();
    directories.retain(|path| path.is_dir() && *path != base);
    directories.sort();
    let mut wrong = String::new();
    for directory in &directories {
        if let Err(why) = check(directory, &words, &named, update) {
            write!(wrong, "\ntests/cases/{}\n{why}\n", directory.file_name().unwrap().to_string_lossy()).unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(directories.len() >= 70, "only {} cases were found", directories.len());
}

/// Counts the expected rules; [`check`] ensures that they are the deciding ones.
#[test]
fn every_rule_decides_a_case() {
    let expected = |directory: PathBuf| -> Option<Rule> {
        let text = std::fs::read_to_string(directory.join("expected.json")).ok()?;
        let expected: Value = serde_json::from_str(&text).ok()?;
        serde_json::from_value(expected["rule"].clone()).ok()
    };
    let decided: Vec<Rule> =
        std::fs::read_dir(root()).unwrap().filter_map(|entry| expected(entry.unwrap().path())).collect();
    let missing: Vec<String> = Rule::ALL.iter().filter(|rule| !decided.contains(rule)).map(Rule::to_string).collect();
    assert!(missing.is_empty(), "no case is decided by {}", missing.join(", "));
}

#[test]
fn typing_errors_are_found() {
    let given = json!({"now": {"mono": 1, "unix": 2, "mnoo": 3}});
    assert_eq!(model::<Now>(&given["now"], "now"), Err("the model has no now.mnoo".to_owned()));
    let mut target = json!({"a": 1});
    assert!(merge(&mut target, &json!({"b": null}), "x").is_err());
    merge(&mut target, &json!({"a": null, "c": {"d": 2}}), "x").unwrap();
    assert_eq!(target, json!({"c": {"d": 2}}));
}
