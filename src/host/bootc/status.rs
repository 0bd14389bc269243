//! Parses `bootc status --format=json --format-version=1`. Unknown fields are ignored, missing and mistyped ones count as
//! absent, enumerations are open strings. Pure.

use serde_json::Value;

use super::super::HostError;
use crate::model::{Deployment, Digest, printable};

const WHAT: &str = "`bootc status`";
/// The API version whose fields are read; bootc adds fields to it and removes none.
const API: &str = "org.containers.bootc/v1";
/// The transport of an image that was pulled from a registry.
const REGISTRY: &str = "registry";
/// bootc's default stateroot, for versions that do not report it.
const STATEROOT: &str = "default";

/// The deployments in boot order: staged, then the next boot's default.
///
/// # Errors
/// [`HostError::NotBootc`], [`HostError::Composefs`], and [`HostError::Confused`] for any other document.
pub fn parse(json: &[u8]) -> Result<Vec<Deployment>, HostError> {
    let host: Value = serde_json::from_slice(json).map_err(|error| HostError::confused(WHAT, error))?;
    let api = text(&host, "/apiVersion").unwrap_or_default();
    if !api.starts_with(API) {
        return Err(HostError::confused(WHAT, format!("its apiVersion is `{api}`, not `{API}`")));
    }
    let entry = |path: &str| host.pointer(path).filter(|entry| entry.is_object());
    let Some(booted) = entry("/status/booted").filter(|_| text(&host, "/status/type") == Some("bootcHost")) else {
        return Err(HostError::NotBootc);
    };
    if entry("/status/booted/composefs").is_some() {
        return Err(HostError::Composefs);
    }
    let no_checksum = |why| move || HostError::confused(WHAT, why);
    let booted = deployment(booted).ok_or_else(no_checksum("the booted deployment has no ostree checksum"))?;
    let booted = Deployment { booted: true, ..booted };
    let staged = entry("/status/staged").map(|staged| {
        let staged = deployment(staged).ok_or_else(no_checksum("the staged deployment has no ostree checksum"))?;
        Ok(Deployment { staged: true, ..staged })
    });
    let staged = staged.transpose()?;
    let rollback = entry("/status/rollback").and_then(deployment);
    let (first, second) = match flag(&host, "/status/rollbackQueued") {
        true => (rollback, Some(booted)),
        false => (Some(booted), rollback),
    };
    let others = host.pointer("/status/otherDeployments").and_then(Value::as_array);
    let others = others.into_iter().flatten().filter_map(deployment);
    Ok(staged.into_iter().chain(first).chain(second).chain(others).collect())
}

/// Parses one entry; `None` if it is not an ostree deployment.
fn deployment(entry: &Value) -> Option<Deployment> {
    let checksum = text(entry, "/ostree/checksum")?;
    let serial = entry.pointer("/ostree/deploySerial").and_then(Value::as_u64).unwrap_or_default();
    let osname = text(entry, "/ostree/stateroot").unwrap_or(STATEROOT);
    let from_registry = text(entry, "/image/image/transport").is_none_or(|transport| transport == REGISTRY);
    Some(Deployment {
        id: format!("{osname}-{checksum}.{serial}"),
        osname: osname.to_owned(),
        checksum: checksum.to_owned(),
        locked: flag(entry, "/downloadOnly"),
        pinned: flag(entry, "/pinned"),
        version: text(entry, "/image/version").map(|version| printable(version, 100)),
        reference: text(entry, "/image/image/image").filter(|_| from_registry).map(str::to_owned),
        digest: text(entry, "/image/imageDigest").and_then(Digest::parse),
        // Packages or overrides of rpm-ostree, which bootc would silently drop.
        layered: flag(entry, "/incompatible"),
        ..Deployment::default()
    })
}

fn text<'v>(value: &'v Value, path: &str) -> Option<&'v str> {
    value.pointer(path).and_then(Value::as_str)
}

fn flag(value: &Value, path: &str) -> bool {
    value.pointer(path).and_then(Value::as_bool).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOTED: &str = "1111111111111111111111111111111111111111111111111111111111111111";

    /// One file for each shape, written after the documented schema of the release in its name; none is a recording.
    fn fixture(name: &str) -> Result<Vec<Deployment>, HostError> {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/host/bootc-status");
        parse(&std::fs::read(format!("{directory}/{name}.json")).unwrap())
    }

    /// The version and the flags of each deployment.
    fn shape(deployments: &[Deployment]) -> Vec<String> {
        let words = |d: &Deployment| {
            let flags = [
                (d.staged, "staged"),
                (d.locked, "locked"),
                (d.booted, "booted"),
                (d.pinned, "pinned"),
                (d.layered, "layered"),
            ];
            let flags = flags.into_iter().filter(|(is, _)| *is).map(|(_, word)| word);
            [d.version.as_deref().unwrap_or("-")].into_iter().chain(flags).collect::<Vec<_>>().join(" ")
        };
        deployments.iter().map(words).collect()
    }

    #[test]
    fn every_shape_of_a_host_is_parsed() {
        for (name, expected) in [
            ("1.1-booted", &["9.6.1 booted"][..]),
            ("1.16-booted", &["9.6.1 booted", "9.6.0"]),
            ("1.16-staged", &["9.6.2 staged", "9.6.1 booted", "9.6.0"]),
            ("1.16-soft-reboot", &["9.6.2 staged", "9.6.1 booted"]),
            ("1.16-download-only", &["9.6.2 staged locked", "9.6.1 booted"]),
            ("1.16-rollback-queued", &["9.6.0", "9.6.1 booted"]),
            ("1.16-pinned-and-others", &["9.6.1 booted pinned", "9.6.0", "9.5.0 pinned", "9.4.0"]),
            ("1.16-incompatible", &["- booted layered", "9.6.0"]),
            ("1.16-cached-update", &["9.6.1 booted"]),
            ("1.16-usr-overlay", &["9.6.1 booted"]),
            ("1.16-oci-transport", &["9.6.1 booted"]),
            ("from-the-future", &["9.6.2 staged", "9.6.1 booted"]),
        ] {
            let parsed = fixture(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(shape(&parsed), expected, "{name}");
        }
    }

    #[test]
    fn unsupported_hosts_and_other_documents_are_refused() {
        assert!(matches!(fixture("1.16-composefs"), Err(HostError::Composefs)));
        assert!(matches!(fixture("1.16-not-bootc"), Err(HostError::NotBootc)));
        for garbage in ["", "{", "null", "[]", "{}", r#"{"apiVersion":"org.containers.other/v1"}"#] {
            assert!(matches!(parse(garbage.as_bytes()), Err(HostError::Confused { .. })), "{garbage}");
        }
        let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        assert!(matches!(parse(deep.as_bytes()), Err(HostError::Confused { .. })));
    }

    #[test]
    fn an_entry_has_the_fields_that_the_rules_need() {
        let booted = fixture("1.16-booted").unwrap().remove(0);
        assert_eq!(booted.id, format!("default-{BOOTED}.0"));
        assert_eq!((booted.osname.as_str(), booted.checksum.as_str()), ("default", BOOTED));
        let digest = format!("sha256:{}", "a1".repeat(32));
        assert_eq!(booted.digest.as_ref().map(Digest::as_str), Some(digest.as_str()));
        assert_eq!(booted.reference, Some(format!("quay.io/example/os@{digest}")));
        // Only an image from a registry can be the desired one; the names of other transports are ignored.
        assert_eq!(fixture("1.16-oci-transport").unwrap().remove(0).reference, None);
        let layered = fixture("1.16-incompatible").unwrap().remove(0);
        assert_eq!((layered.reference, layered.digest), (None, None));
    }

    #[test]
    fn missing_and_mistyped_fields_count_as_absent() {
        let entry = |more: &str| {
            format!(
                r#"{{"apiVersion":"org.containers.bootc/v1","status":{{"type":"bootcHost","booted":
                {{"ostree":{{"checksum":"c"}}{more}}}}}}}"#
            )
        };
        let least = parse(entry("").as_bytes()).unwrap().remove(0);
        assert_eq!(least.id, "default-c.0");
        assert!(least.booted && !least.layered && !least.pinned && least.reference.is_none());
        for odd in [
            r#","image":"quay.io/o/i""#,
            r#","image":{"image":{"image":7},"imageDigest":["sha256:"],"version":{}}"#,
            r#","pinned":"yes","incompatible":1,"composefs":null,"softRebootCapable":[]"#,
        ] {
            let parsed = parse(entry(odd).as_bytes()).unwrap().remove(0);
            assert_eq!(parsed, Deployment { booted: true, ..least.clone() }, "{odd}");
        }
        let none = entry("").replace("\"checksum\"", "\"sum\"");
        assert!(matches!(parse(none.as_bytes()), Err(HostError::Confused { .. })));
    }
}
