//! The scope gate, for the reference in the first line and the policy in the others, compared with a simple reading of
//! the same JSON.
#![no_main]

use std::path::Path;

use fuzz::{bounded, first_line, shown};
use libfuzzer_sys::fuzz_target;
use rebase_agent::model::{Fault, PinnedImage, Reason};
use rebase_agent::trust::gate::{Policy, Verdict};
use rebase_agent::trust::{fuzzing, reference};
use serde_json::Value;

const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Whether a rule of that name applies to `image`.
fn covers(name: &str, image: &PinnedImage) -> bool {
    let host = image.name().split(['/', ':']).next().unwrap_or_default();
    let above = image.name().strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let wildcard = name.strip_prefix('*').is_some_and(|suffix| suffix.starts_with('.') && host.ends_with(suffix));
    name.is_empty() || above || wildcard || image.to_string() == name
}

fn verdict(rules: &Value) -> Option<Verdict> {
    let kinds: Option<Vec<&str>> = rules.as_array()?.iter().map(|rule| rule.get("type")?.as_str()).collect();
    let kinds = kinds.filter(|kinds| !kinds.is_empty())?;
    const KNOWN: [&str; 5] = ["insecureAcceptAnything", "reject", "signedBaseLayer", "signedBy", "sigstoreSigned"];
    let has = |known: &[&str]| kinds.iter().any(|kind| known.contains(kind));
    kinds.iter().all(|kind| KNOWN.contains(kind)).then(|| match (has(&KNOWN[1..3]), has(&KNOWN[3..])) {
        (true, _) => Verdict::AlwaysRejects,
        (false, true) => Verdict::RequiresSignature,
        (false, false) => Verdict::AcceptsAnything,
    })
}

fuzz_target!(|data: &[u8]| {
    let (name, json) = first_line(data);
    let name = String::from_utf8_lossy(name);
    let Ok(image) = reference::parse(&format!("{name}@{DIGEST}")) else { return };
    let policy = match bounded(json.len(), 256, || Policy::parse(json)) {
        Ok(policy) => policy,
        Err(_) => {
            let error = fuzzing::policy(json, Path::new("/etc/containers/policy.json")).map(|_| ()).unwrap_err();
            assert_eq!(error.reason(), Reason::PolicyInvalid);
            return shown(&error.to_string(), 400);
        }
    };
    let plain: Value = serde_json::from_slice(json).unwrap();
    let rules = plain.get("transports").and_then(|transports| transports.get("docker"));
    let applying = rules.and_then(Value::as_object).into_iter().flatten().filter(|(name, _)| covers(name, &image));
    // The exact reference, then the longest name above it, then the longest wildcard, then the transport's own.
    let rank = |name: &str| (name == image.to_string(), !name.is_empty() && !name.starts_with('*'), name.len());
    let (scope, list) = match applying.max_by_key(|(name, _)| rank(name)) {
        Some((name, list)) => (format!("docker \"{name}\""), list),
        None => ("default".to_owned(), &plain["default"]),
    };
    match policy.gate(&image) {
        Ok(gate) => assert_eq!((gate.scope, Some(gate.verdict)), (scope, verdict(list))),
        Err(_) => assert_eq!(verdict(list), None),
    }
    for file in policy.files(&image) {
        assert!(list.to_string().contains(&Value::from(file).to_string()), "{file}");
    }
    let policy = fuzzing::policy(json, Path::new("/etc/containers/policy.json")).unwrap();
    match policy.gate(&image) {
        Ok(_) => assert_eq!(verdict(list), Some(Verdict::RequiresSignature)),
        Err(error) => shown(&Fault::from(&error).message, 900),
    }
});
