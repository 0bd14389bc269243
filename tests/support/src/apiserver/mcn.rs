//! MachineConfigNodes: server-side apply on the status of a custom resource, as the API server does it, with the checks
//! of its CRD.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::store::{Store, uid};
use super::{ApiError, fields};

/// The group and version in an object.
pub(super) const API: &str = "machineconfiguration.openshift.io/v1";
const RESOURCE: &str = "machineconfignodes.machineconfiguration.openshift.io";
const REASON: &str = "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$";

/// The CRD of MachineConfigNodes in the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Crd {
    /// There is none.
    #[default]
    Absent,
    /// The one of feature set `Default`, without `configImage`.
    Default,
    /// The one with feature gate `ImageModeStatusReporting`.
    ImageMode,
}

/// The cluster's MachineConfigNodes.
#[derive(Clone, Default)]
pub(super) struct Mcns {
    pub crd: Crd,
    /// Nodes may read MachineConfigNodes and patch their status.
    pub granted: bool,
    pub objects: BTreeMap<String, Value>,
    /// Every state of every object, in order.
    pub history: Vec<Value>,
}

/// An error as the API server words it for this resource.
pub(super) fn error(code: u16, name: &str, why: &str) -> ApiError {
    let message = match code {
        404 if name.is_empty() => "404 page not found".to_owned(),
        404 => format!("{RESOURCE} \"{name}\" not found"),
        403 => format!("{RESOURCE} \"{name}\" is forbidden: {why}"),
        422 => format!("MachineConfigNode.machineconfiguration.openshift.io \"{name}\" is invalid: {why}"),
        _ => why.to_owned(),
    };
    let error = ApiError::new(code, Some(name).filter(|name| !name.is_empty()), message);
    ApiError { kind: RESOURCE.split('.').next().unwrap_or_default(), ..error }
}

impl Store {
    /// Installs the CRD, and tells whether nodes have the rights that the agent's manifests grant.
    pub fn set_mcns(&self, crd: Crd, granted: bool) {
        let mut state = self.state();
        (state.mcns.crd, state.mcns.granted) = (crd, granted);
        if crd == Crd::Absent {
            state.mcns.objects.clear();
        }
    }

    /// The installed CRD.
    #[must_use]
    pub fn crd(&self) -> Crd {
        self.state().mcns.crd
    }

    /// A MachineConfigNode.
    #[must_use]
    pub fn mcn(&self, name: &str) -> Option<Value> {
        self.state().mcns.objects.get(name).cloned()
    }

    /// Every state that a MachineConfigNode has had, as a watch shows them.
    #[must_use]
    pub fn mcn_history(&self, name: &str) -> Vec<Value> {
        let state = self.state();
        state.mcns.history.iter().filter(|object| object["metadata"]["name"] == name).cloned().collect()
    }

    /// Creates or replaces the spec as a controller does; `None` deletes the object. Without a CRD this does nothing.
    pub fn set_mcn(&self, name: &str, spec: Option<Value>) {
        let crd = self.crd();
        let (Some(mut spec), true) = (spec, crd != Crd::Absent) else {
            self.state().mcns.objects.remove(name);
            return;
        };
        if crd == Crd::Default {
            spec.as_object_mut().unwrap().remove("configImage");
        }
        self.change_mcn(name, |object| {
            let generation = object["metadata"]["generation"].as_u64().unwrap_or_default();
            if object["spec"] != spec {
                object["spec"] = spec;
                object["metadata"]["generation"] = json!(generation + 1);
            }
            Ok(())
        })
        .unwrap();
    }

    /// Server-side apply of the object's status, as `manager`.
    ///
    /// # Errors
    /// The error that the API server would answer.
    pub fn apply_mcn(&self, manager: &str, name: &str, object: &Value, force: bool) -> Result<Value, ApiError> {
        let (crd, now) = (self.crd(), self.date_rfc3339());
        if crd == Crd::Absent {
            return Err(error(404, "", ""));
        }
        if object["apiVersion"] != API || object["kind"] != "MachineConfigNode" {
            return Err(error(400, name, "invalid object type"));
        }
        if object["metadata"]["name"] != name {
            let why = format!(
                "the name of the object ({}) does not match the name on the URL ({name})",
                object["metadata"]["name"].as_str().unwrap_or_default()
            );
            return Err(error(400, name, &why));
        }
        if self.mcn(name).is_none() {
            return Err(error(404, name, ""));
        }
        let known = ["conditions", "configVersion", "configImage", "observedGeneration", "pinnedImageSets"];
        let undeclared =
            |key: &&String| !known.contains(&key.as_str()) || *key == "configImage" && crd != Crd::ImageMode;
        if let Some(key) = object["status"].as_object().into_iter().flat_map(Map::keys).find(undeclared) {
            let why = format!(
                "failed to create typed patch object (/{name}; {API}, Kind=MachineConfigNode): .status.{key}: field not \
                 declared in schema"
            );
            return Err(ApiError { reason: "", ..error(500, name, &why) });
        }
        self.change_mcn(name, |live| apply(live, manager, &object["status"], force, &now, name))
    }

    fn change_mcn(&self, name: &str, edit: impl FnOnce(&mut Value) -> Result<(), ApiError>) -> Result<Value, ApiError> {
        let now = self.date_rfc3339();
        let mut state = self.state();
        let old = state.mcns.objects.get(name).cloned();
        let mut new = old.clone().unwrap_or_else(|| {
            json!({
                "apiVersion": API, "kind": "MachineConfigNode",
                "metadata": {"name": name, "uid": uid(), "creationTimestamp": now, "generation": 0},
            })
        });
        edit(&mut new)?;
        if old.as_ref() == Some(&new) {
            return Ok(new);
        }
        state.version += 1;
        new["metadata"]["resourceVersion"] = json!(state.version.to_string());
        state.mcns.objects.insert(name.to_owned(), new.clone());
        state.mcns.history.push(new.clone());
        let version = state.version;
        drop(state);
        self.announce(version);
        Ok(new)
    }
}

type Path = Vec<String>;

/// The fields of a status with their values. The list of conditions is a map by type.
fn leaves(value: &Value, path: &Path, into: &mut BTreeMap<Path, Value>) {
    let below = |key: String| [&path[..], &[key]].concat();
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| leaves(value, &below(format!("f:{key}")), into)),
        Value::Array(list) if path.last().is_some_and(|last| last == "f:conditions") => {
            for condition in list {
                let item = below(format!("k:{}", json!({"type": condition["type"]})));
                into.insert([&item[..], &[".".to_owned()]].concat(), Value::Null);
                leaves(condition, &item, into);
            }
        }
        value => drop(into.insert(path.clone(), value.clone())),
    }
}

/// The place of a path, made if it is missing.
fn place<'a>(mut at: &'a mut Value, path: &[String]) -> &'a mut Value {
    for part in path {
        at = if let Some(key) = part.strip_prefix("f:") {
            if at.is_null() {
                *at = json!({});
            }
            at.as_object_mut().unwrap().entry(key).or_insert(Value::Null)
        } else {
            let item: Value = serde_json::from_str(part.strip_prefix("k:").unwrap()).unwrap();
            if at.is_null() {
                *at = json!([]);
            }
            let list = at.as_array_mut().unwrap();
            let index = list.iter().position(|known| known["type"] == item["type"]).unwrap_or_else(|| {
                list.push(item);
                list.len() - 1
            });
            &mut list[index]
        };
    }
    at
}

fn remove(status: &mut Value, path: &[String]) {
    let (last, above) = path.split_last().unwrap();
    if last == "." {
        let (item, above) = above.split_last().unwrap();
        let item: Value = serde_json::from_str(item.strip_prefix("k:").unwrap()).unwrap();
        if let Some(list) = place(status, above).as_array_mut() {
            list.retain(|known| known["type"] != item["type"]);
        }
    } else if let Some(map) = place(status, above).as_object_mut() {
        map.remove(last.strip_prefix("f:").unwrap());
    }
}

fn apply(live: &mut Value, manager: &str, status: &Value, force: bool, now: &str, name: &str) -> Result<(), ApiError> {
    let root = vec!["f:status".to_owned()];
    let (mut before, mut wanted) = (BTreeMap::new(), BTreeMap::new());
    leaves(&live["status"], &root, &mut before);
    leaves(status, &root, &mut wanted);
    let mut entries = live["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let is_ours = |entry: &Value| entry["manager"] == manager && entry["operation"] == "Apply";
    let owned = |entry: &Value| {
        let mut owned = BTreeSet::new();
        fields::parse(&entry["fieldsV1"], &Vec::new(), &mut owned);
        owned
    };
    let changed: BTreeSet<Path> =
        wanted.iter().filter(|(path, value)| before.get(*path) != Some(*value)).map(|(path, _)| path.clone()).collect();
    let mut others = BTreeSet::new();
    for entry in entries.iter_mut().filter(|entry| !is_ours(entry)) {
        let mut fields = owned(entry);
        if let Some(path) = fields.iter().find(|path| !force && changed.contains(*path)) {
            let why = format!("Apply failed with 1 conflict: conflict with {}: .{}", entry["manager"], path.join("."));
            return Err(error(409, name, &why));
        }
        fields.retain(|path| !changed.contains(path));
        entry["fieldsV1"] = fields::render(&fields);
        others.extend(fields);
    }
    let gone: Vec<Path> = entries.iter().filter(|entry| is_ours(entry)).flat_map(owned).collect();
    let mut new = live["status"].clone();
    // New conditions come in the order in which they were applied.
    for condition in status["conditions"].as_array().into_iter().flatten() {
        let item = format!("k:{}", json!({"type": condition["type"]}));
        place(&mut new, &["f:conditions".to_owned(), item]);
    }
    for (path, value) in wanted.iter().filter(|(path, _)| path.last().is_some_and(|last| last != ".")) {
        *place(&mut new, &path[1..]) = value.clone();
    }
    // A condition goes after its fields, and stays with its type if anyone else owns one of them.
    let unowned = |path: &&Path| !wanted.contains_key(*path) && !others.contains(*path);
    for path in gone.iter().rev().filter(unowned) {
        let item = &path[..path.len() - 1];
        let last = path.last().map(String::as_str);
        let needed = last == Some(".") && others.iter().any(|other| other.starts_with(item));
        if last != Some("f:type") && !needed {
            remove(&mut new, &path[1..]);
        }
    }
    if let Some(fields) = new.as_object_mut() {
        fields.retain(|_, field| field.as_object().is_none_or(|field| !field.is_empty()));
    }
    validate(&live["status"], &new).map_err(|why| error(422, name, &why))?;

    let mine = json!({
        "apiVersion": API, "fieldsType": "FieldsV1", "manager": manager, "operation": "Apply", "subresource": "status",
        "fieldsV1": fields::render(&wanted.keys().cloned().collect()),
    });
    let same = |entry: &Value| is_ours(entry) && entry["fieldsV1"] == mine["fieldsV1"];
    if new == live["status"] && entries.iter().any(same) {
        return Ok(());
    }
    entries.retain(|entry| !is_ours(entry) && entry["fieldsV1"].as_object().is_some_and(|fields| !fields.is_empty()));
    let mut mine = mine;
    mine["time"] = json!(now);
    entries.push(mine);
    live["metadata"]["managedFields"] = json!(entries);
    live["status"] = new;
    Ok(())
}

/// The checks of the CRD.
fn validate(old: &Value, new: &Value) -> Result<(), String> {
    let conditions = new["conditions"].as_array().cloned().unwrap_or_default();
    if conditions.len() > 20 {
        return Err(format!("status.conditions: Too many: {}: must have at most 20 items", conditions.len()));
    }
    for (index, condition) in conditions.iter().enumerate() {
        let text = |key: &str| condition[key].as_str();
        for key in ["lastTransitionTime", "message", "reason", "status", "type"] {
            if text(key).is_none() {
                return Err(format!("status.conditions[{index}].{key}: Required value"));
            }
        }
        let (status, reason) = (text("status").unwrap(), text("reason").unwrap());
        if !["True", "False", "Unknown"].contains(&status) {
            return Err(format!(
                "status.conditions[{index}].status: Unsupported value: \"{status}\": supported values: \"True\", \"False\", \"Unknown\""
            ));
        }
        let body = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ',' | ':');
        let fits = reason.starts_with(|c: char| c.is_ascii_alphabetic())
            && reason.chars().all(body)
            && !reason.ends_with([',', ':']);
        if !fits {
            return Err(format!(
                "status.conditions[{index}].reason: Invalid value: \"{reason}\": status.conditions[{index}].reason in body should match '{REASON}'"
            ));
        }
        if text("message").unwrap().chars().count() > 32768 {
            return Err(format!("status.conditions[{index}].message: Too long: may not be more than 32768 bytes"));
        }
        let time = text("lastTransitionTime").unwrap();
        if time.len() < 20 || !time.ends_with('Z') || time.as_bytes()[10] != b'T' {
            return Err(format!(
                "status.conditions[{index}].lastTransitionTime: Invalid value: \"{time}\": must be of type date-time"
            ));
        }
    }
    for (key, image) in new["configImage"].as_object().into_iter().flatten() {
        let image = image.as_str().unwrap_or_default();
        let digest = |digest: &str| digest.len() == 64 && digest.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
        let why = match image.split_once("@sha256:") {
            Some((name, hex)) if digest(hex) && is_image_name(name) => continue,
            Some((_, hex)) if digest(hex) => {
                "the OCI Image name should follow the host[:port][/namespace]/name format, resembling a valid URL without the scheme"
            }
            _ => {
                "the OCI Image reference must end with a valid '@sha256:<digest>' suffix, where '<digest>' is 64 characters long"
            }
        };
        return Err(format!("status.configImage.{key}: Invalid value: \"{image}\": {why}"));
    }
    if new["configVersion"].is_object() && new["configVersion"]["desired"].as_str().is_none() {
        return Err("status.configVersion.desired: Required value".to_owned());
    }
    if new["observedGeneration"].as_u64() < old["observedGeneration"].as_u64() {
        let value = &new["observedGeneration"];
        return Err(format!("status.observedGeneration: Invalid value: {value}: observedGeneration must not decrease"));
    }
    Ok(())
}

/// `^([a-zA-Z0-9-]+\.)+[a-zA-Z0-9-]+(:[0-9]{2,5})?/([a-zA-Z0-9-_]{0,61}/)?[a-zA-Z0-9-_.]*?$`
fn is_image_name(name: &str) -> bool {
    let Some((host, path)) = name.split_once('/') else { return false };
    let (host, port) = host.split_once(':').unwrap_or((host, "443"));
    let word = |text: &str, more: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c));
    let labels: Vec<_> = host.split('.').collect();
    let (namespace, rest) = path.split_once('/').unwrap_or(("", path));
    labels.len() > 1
        && labels.iter().all(|label| !label.is_empty() && word(label, "-"))
        && (2..=5).contains(&port.len())
        && port.chars().all(|c| c.is_ascii_digit())
        && namespace.len() <= 61
        && word(namespace, "-_")
        && word(rest, "-_.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Events;

    fn condition(kind: &str, status: &str) -> Value {
        json!({
            "type": kind, "status": status, "reason": kind, "message": status,
            "lastTransitionTime": "2026-11-29T12:00:00Z",
        })
    }

    fn object(conditions: &[Value]) -> Value {
        json!({
            "apiVersion": API, "kind": "MachineConfigNode", "metadata": {"name": "n"},
            "status": {"conditions": conditions},
        })
    }

    fn store(crd: Crd) -> Store {
        let store = Store::new(Events::new());
        store.set_mcns(crd, true);
        store.set_mcn("n", Some(json!({"node": {"name": "n"}, "configVersion": {"desired": "a"}})));
        store
    }

    fn shown(store: &Store) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mcn = store.mcn("n").unwrap();
        let list = mcn["status"]["conditions"].as_array().cloned().unwrap_or_default();
        list.iter().map(|it| (text(&it["type"]), text(&it["status"]))).collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn managers_own_their_conditions() {
        let store = store(Crd::Default);
        store.apply_mcn("one", "n", &object(&[condition("A", "True"), condition("B", "False")]), true).unwrap();
        store.apply_mcn("two", "n", &object(&[condition("C", "True")]), true).unwrap();
        assert_eq!(shown(&store), pairs(&[("A", "True"), ("B", "False"), ("C", "True")]));
        // Left out and owned by no one else: gone.
        store.apply_mcn("one", "n", &object(&[condition("A", "True")]), true).unwrap();
        assert_eq!(shown(&store), pairs(&[("A", "True"), ("C", "True")]));
        // Without force the other's value wins.
        let error = store.apply_mcn("two", "n", &object(&[condition("A", "False")]), false).unwrap_err();
        assert_eq!(error.code, 409, "{error}");
        // The same value is owned by both, and stays when one leaves it out.
        store.apply_mcn("two", "n", &object(&[condition("A", "True"), condition("C", "True")]), false).unwrap();
        store.apply_mcn("one", "n", &object(&[]), true).unwrap();
        assert_eq!(shown(&store), pairs(&[("A", "True"), ("C", "True")]));
        let version = store.mcn("n").unwrap()["metadata"]["resourceVersion"].clone();
        store.apply_mcn("two", "n", &object(&[condition("A", "True"), condition("C", "True")]), true).unwrap();
        assert_eq!(store.mcn("n").unwrap()["metadata"]["resourceVersion"], version, "nothing changed");
    }

    #[test]
    fn half_a_condition_is_refused() {
        let store = store(Crd::Default);
        store.apply_mcn("one", "n", &object(&[condition("A", "True")]), true).unwrap();
        // `type` and `reason` still belong to the first.
        store.apply_mcn("two", "n", &object(&[condition("A", "False")]), true).unwrap();
        let error = store.apply_mcn("two", "n", &object(&[]), true).unwrap_err();
        assert!(error.code == 422 && error.message.contains("Required value"), "{error}");
    }

    #[test]
    fn the_crd_checks_what_is_applied() {
        let image = format!("quay.io/o/i@sha256:{}", "ab".repeat(32));
        let with = |image: &str| {
            let mut object = object(&[]);
            object["status"]["configImage"] = json!({"desiredImage": image});
            object
        };
        let old = store(Crd::Default).apply_mcn("one", "n", &with(&image), true).unwrap_err();
        assert!(old.code == 500 && old.message.contains(".status.configImage: field not declared"), "{old}");
        let store = store(Crd::ImageMode);
        store.apply_mcn("one", "n", &with(&image), true).unwrap();
        for bad in [image.replace("quay.io/o", "quay.io/o/p"), image.replace("quay.io", "quay"), "quay.io/o/i:t".into()]
        {
            assert_eq!(store.apply_mcn("one", "n", &with(&bad), true).unwrap_err().code, 422, "{bad}");
        }
        let mut odd = condition("A", "True");
        odd["reason"] = json!("not a word");
        assert_eq!(store.apply_mcn("one", "n", &object(&[odd]), true).unwrap_err().code, 422);
        let mut generation = object(&[]);
        for (value, code) in [(3, None), (2, Some(422))] {
            generation["status"]["observedGeneration"] = json!(value);
            let answer = store.apply_mcn("one", "n", &generation, true);
            assert_eq!(answer.err().map(|error| error.code), code);
        }
    }
}
