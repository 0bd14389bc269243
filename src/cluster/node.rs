//! The Node object: what of it the protocol needs. Pure.

use std::collections::BTreeMap;

use openssl::asn1::Asn1Time;
use serde::Deserialize;

use super::{ClusterError, MANAGER};
use crate::model::{Attempt, NodeFacts, OtherWriter, printable};
use crate::report::{ATTEMPT, HOLD, MCO};

/// A Node as one answer of the API server showed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeObject {
    /// What the rules look at.
    pub facts: NodeFacts,
    /// Tells a Node from its namesake that was created after it was deleted.
    pub uid: String,
    /// Opaque, except that a larger number is a later state (KEP-5504 makes official what has always been so).
    pub resource_version: String,
}

#[derive(Deserialize)]
struct Object {
    metadata: Metadata,
    spec: Option<Spec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    uid: String,
    resource_version: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    managed_fields: Vec<ManagedFields>,
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    unschedulable: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ManagedFields {
    #[serde(default)]
    manager: String,
    time: Option<String>,
    #[serde(default)]
    fields_v1: serde_json::Value,
}

impl NodeObject {
    /// Parses a Node or its metadata alone.
    ///
    /// # Errors
    /// [`ClusterError::Confused`].
    pub fn parse(json: &[u8]) -> Result<Self, ClusterError> {
        let object: Object = serde_json::from_slice(json)
            .map_err(|e| ClusterError::Confused { what: "the Node", why: printable(&e.to_string(), 200) })?;
        let metadata = object.metadata;
        let mco = |key: &str| metadata.annotations.get(&format!("{MCO}{key}")).cloned();
        let filled = |key: &str| mco(key).filter(|value| !value.is_empty());
        let facts = NodeFacts {
            name: metadata.name.clone(),
            // MCC takes an empty config for none.
            desired_config: filled("desiredConfig"),
            current_config: filled("currentConfig"),
            desired_image: mco("desiredImage"),
            current_image: mco("currentImage"),
            state: mco("state"),
            reason: mco("reason"),
            desired_drain: mco("desiredDrain"),
            last_applied_drain: mco("lastAppliedDrain"),
            topology: mco("controlPlaneTopology"),
            attempt: metadata.annotations.get(ATTEMPT).and_then(|text| attempt(text)),
            hold: metadata.annotations.get(HOLD).cloned(),
            schedulable: object.spec.map(|spec| !spec.unschedulable),
            other_writer: other_writer(&metadata.managed_fields),
        };
        Ok(Self { facts, uid: metadata.uid, resource_version: metadata.resource_version })
    }

    /// Whether `self` is an older state of the same Node than `other`: a watch may tell late what a reply told before.
    #[must_use]
    pub fn is_older_than(&self, other: &Self) -> bool {
        let number = |version: &str| version.parse::<u64>().ok();
        self.uid == other.uid
            && matches!((number(&self.resource_version), number(&other.resource_version)), (Some(a), Some(b)) if a < b)
    }
}

/// A malformed attempt counts as none: the agent never half-acts on it, and overwrites it with the next one.
fn attempt(text: &str) -> Option<Attempt> {
    match serde_json::from_str(text) {
        Ok(attempt) => Some(attempt),
        Err(error) => {
            tracing::debug!("the attempt annotation is ignored: {}", printable(&error.to_string(), 200));
            None
        }
    }
}

/// Whoever took `state` or `currentConfig` over after our last write; the API server moves a field's ownership to the
/// writer that changes its value.
fn other_writer(fields: &[ManagedFields]) -> Option<OtherWriter> {
    let stamp = |entry: &ManagedFields| entry.time.as_deref().and_then(unix);
    let ours = fields.iter().filter(|entry| entry.manager == MANAGER).filter_map(stamp).max()?;
    let owns = |entry: &ManagedFields| {
        let annotations = entry.fields_v1.get("f:metadata").and_then(|metadata| metadata.get("f:annotations"));
        annotations.is_some_and(|owned| {
            ["state", "currentConfig"].iter().any(|key| owned.get(format!("f:{MCO}{key}")).is_some())
        })
    };
    let others = fields.iter().filter(|entry| entry.manager != MANAGER && owns(entry));
    let latest = others.filter_map(|entry| Some((stamp(entry)?, entry))).max_by_key(|(time, _)| *time)?;
    (latest.0 > ours).then(|| OtherWriter { manager: printable(&latest.1.manager, 100), unix: latest.0 })
}

/// `2026-08-22T10:00:00Z`, the one form that the API server stamps, in milliseconds since the epoch.
fn unix(text: &str) -> Option<u64> {
    let digits: String = text.strip_suffix('Z')?.chars().filter(char::is_ascii_digit).collect();
    if digits.len() != 14 {
        return None;
    }
    let time = Asn1Time::from_str(&format!("{digits}Z")).ok()?;
    let since = Asn1Time::from_unix(0).ok()?.diff(&time).ok()?;
    let seconds = i64::from(since.days).checked_mul(86_400)?.checked_add(i64::from(since.secs))?;
    u64::try_from(seconds).ok()?.checked_mul(1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(annotations: &str, more: &str) -> NodeObject {
        let json = format!(
            r#"{{"kind":"PartialObjectMetadata","metadata":{{"name":"n","uid":"u","resourceVersion":"7",
            "annotations":{{{annotations}}}{more}}}}}"#
        );
        NodeObject::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn metadata_alone_suffices() {
        let parsed = node(
            r#""machineconfiguration.openshift.io/desiredConfig":"r-2","machineconfiguration.openshift.io/currentConfig":"",
            "rebase-agent.openshift.io/hold":"""#,
            "",
        );
        assert_eq!(parsed.facts.desired_config.as_deref(), Some("r-2"));
        assert_eq!(parsed.facts.current_config, None);
        assert_eq!(parsed.facts.hold.as_deref(), Some(""));
        assert_eq!(parsed.facts.schedulable, None);
        assert!(NodeObject::parse(b"{}").is_err());
        assert!(NodeObject::parse(br#"{"metadata":{"name":1}}"#).is_err());
    }

    #[test]
    fn malformed_attempts_count_as_none_and_unknown_fields_are_kept() {
        let image = format!("quay.io/o/i@sha256:{}", "ab".repeat(32));
        let with =
            |text: &str| node(&format!("\"{ATTEMPT}\":{}", serde_json::to_string(text).unwrap()), "").facts.attempt;
        let text = format!(r#"{{"image":"{image}","bootID":"b","count":2,"later":{{"x":1}}}}"#);
        let attempt = with(&text).unwrap();
        assert_eq!(attempt.count, 2);
        let again: serde_json::Value = serde_json::from_str(&serde_json::to_string(&attempt).unwrap()).unwrap();
        assert_eq!(again, serde_json::from_str::<serde_json::Value>(&text).unwrap());
        for bad in ["", "{}", "null", "[]", r#"{"image":"x","bootID":"b","count":1}"#, r#"{"count":-1}"#] {
            assert_eq!(with(bad), None, "{bad}");
        }
    }

    #[test]
    fn whoever_took_our_fields_after_us_is_another_daemon() {
        let fields = |manager: &str, time: &str, key: &str| {
            format!(
                r#"{{"manager":"{manager}","operation":"Update","time":"{time}","fieldsV1":{{"f:metadata":{{"f:annotations":
                {{"f:machineconfiguration.openshift.io/{key}":{{}}}}}}}}}}"#
            )
        };
        let other = |list: &[String]| node("", &format!(r#","managedFields":[{}]"#, list.join(","))).facts.other_writer;
        let ours = fields(MANAGER, "2026-08-22T10:00:00Z", "reason");
        let later = fields("machine-config-daemon", "2026-08-22T10:00:01Z", "state");
        let earlier = fields("machine-config-daemon", "2026-08-22T09:59:59Z", "state");
        let controller = fields("machine-config-controller", "2026-08-22T10:00:01Z", "desiredConfig");
        assert_eq!(other(&[ours.clone(), later.clone()]).unwrap().unix, 1_787_392_801_000);
        assert_eq!(other(&[ours.clone(), earlier]), None);
        assert_eq!(other(&[ours, controller]), None);
        assert_eq!(other(&[later]), None);
    }

    #[test]
    fn times_are_parsed() {
        assert_eq!(unix("1970-01-01T00:00:01Z"), Some(1000));
        assert_eq!(unix("2026-11-22T08:00:00Z"), Some(1_795_334_400_000));
        for bad in ["", "Z", "2026-11-22", "2026-13-22T08:00:00Z", "1969-12-31T23:59:59Z", "2026-11-22T08:00:00.5Z"] {
            assert_eq!(unix(bad), None, "{bad}");
        }
    }
}
