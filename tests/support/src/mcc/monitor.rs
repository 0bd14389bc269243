//! The controllers' writes of MachineConfigNodes: the drain controller's conditions, with what the original resets,
//! copies and leaves out.

use serde_json::{Value, json};

use super::{annotation, rfc3339};
use crate::apiserver::{Crd, Store};

/// The field manager of MCO's server-side apply.
const MANAGER: &str = "machine-config-operator";

const KINDS: [&str; 13] = [
    "UpdatePrepared",
    "UpdateExecuted",
    "UpdatePostActionComplete",
    "UpdateComplete",
    "Resumed",
    "Drained",
    "Cordoned",
    "RebootedNode",
    "Updated",
    "Uncordoned",
    "NodeDegraded",
    "PinnedImageSetsDegraded",
    "PinnedImageSetsProgressing",
];

/// The conditions with or without the feature gate.
fn kinds(crd: Crd) -> impl Iterator<Item = &'static str> {
    let applied: &[&str] = match crd {
        Crd::ImageMode => &["AppliedFiles", "AppliedOSImage", "ImagePulledFromRegistry"],
        _ => &["AppliedFilesAndOS"],
    };
    KINDS.into_iter().chain(applied.iter().copied())
}

fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": rfc3339()})
}

/// Writes a parent condition and its child on the MachineConfigNode of `node`, which may be missing.
pub(super) fn write(
    store: &Store,
    node: &Value,
    (parent, status, message): (&str, &str, &str),
    child: (&str, &str, &str),
) {
    let name = node["metadata"]["name"].as_str().unwrap();
    let Some(mcn) = store.mcn(name) else { return };
    let parent = condition(parent, status, child.0, message);
    let reason = format!("{}{}", parent["type"].as_str().unwrap(), child.0);
    let child = condition(child.0, child.1, &reason, child.2);
    let mut list = mcn["status"]["conditions"].as_array().cloned().unwrap_or_default();
    if list.is_empty() {
        list = vec![parent.clone(), child.clone()];
        for kind in kinds(store.crd()) {
            if list.iter().all(|known| known["type"] != kind) {
                let message = format!("This node has not yet entered the {kind} phase");
                list.push(condition(kind, "False", "NotYetOccurred", &message));
            }
        }
    } else {
        for known in &mut list {
            if known["type"] == "Updated" && known["status"] == "True" {
                let message = "This node is not updated, sensed disruption via a manual update.";
                *known = condition("Updated", "False", "Updated", message);
            } else if known["type"] == child["type"] {
                *known = child.clone();
            } else if known["type"] == parent["type"] {
                if known["status"] == parent["status"] && known["message"] == parent["message"] {
                    // The original writes nothing then, not even the child.
                    return;
                }
                *known = parent.clone();
            }
        }
        for new in [child, parent] {
            if list.iter().all(|known| known["type"] != new["type"]) {
                list.push(new);
            }
        }
    }
    let text = |key: &str| annotation(node, key).filter(|text| !text.is_empty());
    let mut status = json!({
        "conditions": list,
        "observedGeneration": mcn["metadata"]["generation"].as_u64().unwrap_or_default() + 1,
        "configVersion": {"desired": text("desiredConfig").unwrap_or("not-yet-set")},
    });
    if let Some(current) = text("currentConfig") {
        status["configVersion"]["current"] = json!(current);
    }
    if store.crd() == Crd::ImageMode {
        for (field, key) in [("currentImage", "currentImage"), ("desiredImage", "desiredImage")] {
            if let Some(image) = text(key) {
                status["configImage"][field] = json!(image);
            }
        }
    }
    let object = json!({
        "apiVersion": "machineconfiguration.openshift.io/v1", "kind": "MachineConfigNode",
        "metadata": {"name": name}, "status": status,
    });
    // The original logs a refused write and goes on.
    let _ = store.apply_mcn(MANAGER, name, &object, true);
}

/// Sets the desired config and image, as MCC does before it changes the Node, or as the operator does for a new Node.
pub(super) fn set_spec(store: &Store, name: &str, pool: &str, config: Option<&str>, image: Option<&str>) {
    let config = config.unwrap_or("not-yet-set");
    let mut spec = json!({"node": {"name": name}, "pool": {"name": pool}, "configVersion": {"desired": config}});
    if let Some(image) = image {
        spec["configImage"] = json!({"desiredImage": image});
    }
    store.set_mcn(name, Some(spec));
}
