//! `metadata.managedFields` as the API server keeps it for writes of operation `Update`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

type Path = Vec<String>;

/// The tracked fields of an object: annotations, labels and those of `spec`.
fn leaves(object: &Value) -> BTreeMap<Path, Value> {
    let mut leaves = BTreeMap::new();
    for map in ["annotations", "labels"] {
        if let Some(entries) = object.pointer(&format!("/metadata/{map}")).and_then(Value::as_object) {
            let base = ["f:metadata".to_owned(), format!("f:{map}")];
            leaves.insert([&base[..], &[".".to_owned()]].concat(), Value::Null);
            for (key, value) in entries {
                leaves.insert([&base[..], &[format!("f:{key}")]].concat(), value.clone());
            }
        }
    }
    for (key, value) in object.pointer("/spec").and_then(Value::as_object).into_iter().flatten() {
        leaves.insert(vec!["f:spec".to_owned(), format!("f:{key}")], value.clone());
    }
    leaves
}

pub(super) fn parse(fields: &Value, prefix: &Path, into: &mut BTreeSet<Path>) {
    for (key, below) in fields.as_object().into_iter().flatten() {
        let path = [&prefix[..], std::slice::from_ref(key)].concat();
        if below.as_object().is_none_or(Map::is_empty) {
            into.insert(path);
        } else {
            parse(below, &path, into);
        }
    }
}

pub(super) fn render(paths: &BTreeSet<Path>) -> Value {
    let mut root = Map::new();
    for path in paths {
        let mut at = &mut root;
        for part in path {
            at = at.entry(part).or_insert_with(|| json!({})).as_object_mut().unwrap();
        }
    }
    Value::Object(root)
}

/// Updates the managed fields of `new` after `manager` turned `old` into it. New and changed values move to the
/// manager, removed values are removed from all managers, and a manager gets a new time only when it took a value.
pub(super) fn update(old: Option<&Value>, new: &mut Value, manager: &str, now: &str) {
    let before = old.map(leaves).unwrap_or_default();
    let after = leaves(new);
    let taken: BTreeSet<Path> =
        after.iter().filter(|(path, value)| before.get(*path) != Some(*value)).map(|(path, _)| path.clone()).collect();

    let mut entries = old.and_then(|o| o.pointer("/metadata/managedFields")?.as_array().cloned()).unwrap_or_default();
    let mut own = taken.clone();
    entries.retain_mut(|entry| {
        if entry.get("subresource").is_some() {
            return true;
        }
        let mut owned = BTreeSet::new();
        parse(&entry["fieldsV1"], &Vec::new(), &mut owned);
        owned.retain(|path| after.contains_key(path));
        if entry["manager"] == manager && !taken.is_empty() {
            own.extend(owned);
            return false;
        }
        owned.retain(|path| !taken.contains(path));
        entry["fieldsV1"] = render(&owned);
        !owned.is_empty()
    });
    if !taken.is_empty() {
        entries.push(entry(manager, "", now, render(&own)));
    }
    sort(&mut entries);
    new["metadata"]["managedFields"] = Value::Array(entries);
}

/// Marks a write of `manager` to the status subresource.
pub(super) fn touch_status(new: &mut Value, manager: &str, now: &str) {
    let mut entries = new["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    entries.retain(|entry| entry["manager"] != manager || entry["subresource"] != "status");
    let fields = json!({"f:status": {"f:conditions": {}, "f:nodeInfo": {}}});
    entries.push(entry(manager, "status", now, fields));
    sort(&mut entries);
    new["metadata"]["managedFields"] = Value::Array(entries);
}

fn entry(manager: &str, subresource: &str, now: &str, fields: Value) -> Value {
    let mut entry = json!({
        "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": fields,
        "manager": manager, "operation": "Update", "time": now,
    });
    if !subresource.is_empty() {
        entry["subresource"] = json!(subresource);
    }
    entry
}

fn sort(entries: &mut [Value]) {
    entries.sort_by_key(|entry| (entry["time"].to_string(), entry["manager"].to_string()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(annotations: Value) -> Value {
        json!({"metadata": {"annotations": annotations}})
    }

    fn owner<'a>(node: &'a Value, key: &str) -> Vec<(&'a str, &'a str)> {
        let entries = node["metadata"]["managedFields"].as_array().unwrap();
        let path = format!("/fieldsV1/f:metadata/f:annotations/f:{key}");
        let owning = entries.iter().filter(|entry| entry.pointer(&path).is_some());
        owning.map(|entry| (entry["manager"].as_str().unwrap(), entry["time"].as_str().unwrap())).collect()
    }

    #[test]
    fn changed_values_move_and_unchanged_ones_stay() {
        let mut first = node(json!({"a": "1", "b": "1"}));
        update(None, &mut first, "one", "t1");
        let mut second = first.clone();
        second["metadata"]["annotations"]["b"] = json!("2");
        update(Some(&first), &mut second, "two", "t2");
        assert_eq!(owner(&second, "a"), [("one", "t1")]);
        assert_eq!(owner(&second, "b"), [("two", "t2")]);

        let mut third = second.clone();
        third["metadata"]["annotations"]["c"] = json!("3");
        update(Some(&second), &mut third, "one", "t3");
        assert_eq!(owner(&third, "a"), [("one", "t3")]);
        assert_eq!(owner(&third, "b"), [("two", "t2")]);

        let mut fourth = third.clone();
        fourth["metadata"]["annotations"].as_object_mut().unwrap().remove("b");
        update(Some(&third), &mut fourth, "one", "t4");
        assert_eq!(owner(&fourth, "b"), []);
        assert_eq!(owner(&fourth, "a"), [("one", "t3")], "a removal takes over no field");
        assert_eq!(fourth["metadata"]["managedFields"].as_array().unwrap().len(), 1, "an empty manager disappears");
    }
}
