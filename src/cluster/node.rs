//! Parses the parts of the Node object that the protocol needs. Pure.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::{ClusterError, MANAGER};
use crate::model::annotations::{ATTEMPT, HOLD, LAST_UPDATE, MCO, PREFETCH, RETRY, UNTRUSTED, VERIFIED};
use crate::model::{NodeFacts, OtherWriter, Pullspec, printable};

/// Longest annotation that is read, in bytes; the protocol's longest is a reason of 2000 characters.
const MAX_VALUE: usize = 8192;

/// The annotations that report the node's state. Only the daemon in charge of the node writes them.
pub(super) const VERDICT: [&str; 2] = ["state", "currentConfig"];

/// A Node as one answer of the API server shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeObject {
    /// The facts that the rules use.
    pub facts: NodeFacts,
    /// Distinguishes a Node from one of the same name that was created after it was deleted.
    pub uid: String,
    /// Opaque, except that a larger number is a later state (KEP-5504).
    pub resource_version: String,
    /// The API server's time of our last write, in milliseconds since the epoch; 0 if this answer does not have it.
    pub(super) wrote: u64,
    heard: Heard,
}

/// The times of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// When it was requested; `None` for an event of a watch.
    pub asked: Option<Instant>,
    /// When it was received.
    pub at: Instant,
    /// The API server's time of this process's last write of `state` or `currentConfig`, in milliseconds since the
    /// epoch; 0 before the first write.
    pub wrote: u64,
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
    /// Parses a Node, or only its metadata.
    ///
    /// # Errors
    /// [`ClusterError::Confused`].
    pub fn parse(json: &[u8], heard: Heard) -> Result<Self, ClusterError> {
        let object: Object = serde_json::from_slice(json)
            .map_err(|e| ClusterError::Confused { what: "the Node", why: printable(&e.to_string(), 200) })?;
        let metadata = object.metadata;
        let annotation = |key: &str| metadata.annotations.get(key);
        let mco = |key: &str| annotation(&format!("{MCO}{key}")).map(|value| bounded(value));
        let filled = |key: &str| mco(key).filter(|value| !value.is_empty());
        let wrote = last_write(&metadata.managed_fields);
        let since = if heard.wrote > 0 { heard.wrote } else { wrote };
        let facts = NodeFacts {
            name: metadata.name.clone(),
            // MCC treats an empty config as none.
            desired_config: filled("desiredConfig"),
            current_config: filled("currentConfig"),
            desired_image: mco("desiredImage").map(Pullspec::from),
            current_image: mco("currentImage"),
            state: mco("state"),
            reason: mco("reason"),
            desired_drain: mco("desiredDrain"),
            last_applied_drain: mco("lastAppliedDrain"),
            topology: mco("controlPlaneTopology"),
            attempt: annotation(ATTEMPT).and_then(|text| own(ATTEMPT, text)),
            last_update: annotation(LAST_UPDATE).and_then(|text| own(LAST_UPDATE, text)),
            hold: annotation(HOLD).map(|value| bounded(value)),
            verified: annotation(VERIFIED).and_then(|text| own(VERIFIED, text)),
            untrusted: annotation(UNTRUSTED).map(|value| bounded(value)),
            prefetch: annotation(PREFETCH).map(|value| Pullspec::from(bounded(value))),
            retry: annotation(RETRY).map(|value| bounded(value)),
            schedulable: object.spec.map(|spec| !spec.unschedulable),
            other_writer: other_writer(&metadata.managed_fields, since),
        };
        Ok(Self { facts, uid: metadata.uid, resource_version: metadata.resource_version, wrote, heard })
    }

    /// When this was requested; `None` for an event of a watch.
    #[must_use]
    pub fn asked(&self) -> Option<Instant> {
        self.heard.asked
    }

    /// Whether `self` is an older state of the same Node than `other`: a watch may deliver a state after the reply that
    /// had it. An answer that was requested after `other` was received is never older, even if its version is smaller:
    /// versions go back when the database is restored from a backup.
    #[must_use]
    pub fn is_older_than(&self, other: &Self) -> bool {
        let number = |version: &str| version.parse::<u64>().ok();
        self.uid == other.uid
            && self.heard.asked.is_none_or(|asked| asked < other.heard.at)
            && matches!((number(&self.resource_version), number(&other.resource_version)), (Some(a), Some(b)) if a < b)
    }
}

/// The value, printable and of bounded length. A value that is changed becomes invalid as an image or name, so that the
/// agent does not follow a shortened one.
fn bounded(value: &str) -> String {
    let mut out = String::new();
    for c in value.chars() {
        if out.len() >= MAX_VALUE {
            out.push('…');
            break;
        }
        if c.is_control() {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

/// Parses an annotation of our own. A malformed one counts as none, and the next one overwrites it.
fn own<T: DeserializeOwned>(key: &str, text: &str) -> Option<T> {
    if text.len() > MAX_VALUE {
        return None;
    }
    match serde_json::from_str(text) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::debug!(
                "ignoring the annotation {key}, which cannot be parsed: {}",
                printable(&error.to_string(), 200)
            );
            None
        }
    }
}

/// The API server's time of our last write; 0 once other managers have changed all fields that we wrote.
fn last_write(fields: &[ManagedFields]) -> u64 {
    fields.iter().filter(|entry| entry.manager == MANAGER).filter_map(stamp).max().unwrap_or_default()
}

fn stamp(entry: &ManagedFields) -> Option<u64> {
    entry.time.as_deref().and_then(crate::time::unix)
}

/// The manager that took over `state` or `currentConfig` after our last write of them at `since`. After a restart,
/// `since` is our last write of any field. The API server moves a field's ownership to the manager that changes its
/// value, and stamps all fields of a manager with its last change. `kubectl` and `oc` are ignored: a person who once set
/// one of the two and now annotates something else is not a daemon.
fn other_writer(fields: &[ManagedFields], since: u64) -> Option<OtherWriter> {
    let owns = |entry: &ManagedFields| {
        let annotations = entry.fields_v1.get("f:metadata").and_then(|metadata| metadata.get("f:annotations"));
        annotations.is_some_and(|owned| VERDICT.iter().any(|key| owned.get(format!("f:{MCO}{key}")).is_some()))
    };
    let others = fields
        .iter()
        .filter(|entry| !(entry.manager == MANAGER || entry.manager.starts_with("kubectl")) && owns(entry));
    let latest = others.filter_map(|entry| Some((stamp(entry)?, entry))).max_by_key(|(time, _)| *time)?;
    (since > 0 && latest.0 > since).then(|| OtherWriter { manager: printable(&latest.1.manager, 100), unix: latest.0 })
}

/// Parses an HTTP `Date`, `Sun, 06 Nov 1994 08:49:37 GMT`, to milliseconds since the epoch.
pub(super) fn http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let parts: Vec<&str> = text.split(' ').collect();
    let [_, day, month, year, time, "GMT"] = parts.as_slice() else { return None };
    let month = MONTHS.iter().position(|known| known == month)?.checked_add(1)?;
    crate::time::unix(&format!("{year}-{month:02}-{day}T{time}Z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(annotations: &str, more: &str) -> NodeObject {
        let json = format!(
            r#"{{"kind":"PartialObjectMetadata","metadata":{{"name":"n","uid":"u","resourceVersion":"7",
            "annotations":{{{annotations}}}{more}}}}}"#
        );
        parse(json.as_bytes()).unwrap()
    }

    fn parse(json: &[u8]) -> Result<NodeObject, ClusterError> {
        NodeObject::parse(json, Heard { asked: None, at: Instant::now(), wrote: 0 })
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
        assert!(parse(b"{}").is_err());
        assert!(parse(br#"{"metadata":{"name":1}}"#).is_err());
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
    fn a_manager_that_took_over_our_fields_is_another_daemon() {
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
        let person = fields("kubectl-annotate", "2026-08-22T10:00:01Z", "currentConfig");
        assert_eq!(other(&[ours.clone(), later.clone()]).unwrap().unix, 1_787_392_801_000);
        assert_eq!(other(&[ours.clone(), earlier]), None);
        assert_eq!(other(&[ours.clone(), controller]), None);
        assert_eq!(other(&[ours, person]), None);
        assert_eq!(other(&[later]), None);
    }

    #[test]
    fn http_dates_are_parsed() {
        assert_eq!(http_date("Sun, 22 Nov 2026 08:00:00 GMT"), crate::time::unix("2026-11-22T08:00:00Z"));
        for bad in [
            "",
            "GMT",
            "Sun, 22 Nov 2026 08:00:00 CET",
            "Sun, 22 Foo 2026 08:00:00 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
        ] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }
}
