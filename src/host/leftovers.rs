//! Files that the Machine Config Daemon wrote to `/etc` and that differ from the image. They hide the files of later
//! images, because the merge of `/etc` keeps local changes. Only `status` reports them.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use serde::Serialize;
use serde_json::Value;

use super::boot::{MAX_CONFIG, Root};
use crate::files::read_bounded;

/// The rendered config that the MCD applied last, or else the image's own.
const CONFIGS: [&str; 2] = ["etc/machine-config-daemon/currentconfig", "usr/etc/machine-config-daemon/currentconfig"];
/// Largest file compared, in bytes; a whole Ignition config has a few megabytes.
const MAX_FILE: u64 = 4 << 20;
/// Most paths compared; a rendered config has about a hundred.
const MAX_PATHS: usize = 4_000;

/// Paths in `/etc` that a rendered config names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Leftovers {
    /// Number of paths that the rendered config names.
    pub managed: usize,
    /// Paths whose file differs in `/usr/etc` or is missing there.
    pub differing: Vec<String>,
}

/// Compares `/etc` with `/usr/etc`. `None` if the MCD never ran here, or its config cannot be parsed.
#[must_use]
pub fn leftovers(root: &Root) -> Option<Leftovers> {
    let config = CONFIGS.iter().find_map(|path| read_bounded(&root.join(path), MAX_CONFIG).ok())?;
    let paths = paths(&config)?;
    let differs = |path: &&String| {
        let live = read_bounded(&root.join("etc").join(path), MAX_FILE).ok();
        let pristine = read_bounded(&root.join("usr/etc").join(path), MAX_FILE).ok();
        live != pristine
    };
    let differing = paths.iter().filter(differs).map(|path| format!("/etc/{path}")).collect();
    Some(Leftovers { managed: paths.len(), differing })
}

/// The paths that a rendered config writes below `/etc`, relative to it; `None` for any other document. Pure.
fn paths(config: &[u8]) -> Option<BTreeSet<String>> {
    let config: Value = serde_json::from_slice(config).ok()?;
    config.get("spec")?;
    fn list<'v>(value: &'v Value, at: &str) -> &'v [Value] {
        value.pointer(at).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }
    fn text<'v>(value: &'v Value, key: &str) -> &'v str {
        value.get(key).and_then(Value::as_str).unwrap_or_default()
    }
    let mut paths: Vec<String> = list(&config, "/spec/config/storage/files")
        .iter()
        .filter_map(|file| Some(text(file, "path").strip_prefix("/etc/")?.to_owned()))
        .collect();
    for unit in list(&config, "/spec/config/systemd/units") {
        let path = format!("systemd/system/{}", text(unit, "name"));
        let dropins = list(unit, "/dropins").iter();
        paths.extend(dropins.map(|dropin| format!("{path}.d/{}", text(dropin, "name"))));
        if !text(unit, "contents").is_empty() {
            paths.push(path);
        }
    }
    let inside = |path: &String| Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    Some(paths.into_iter().filter(inside).take(MAX_PATHS).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{"spec":{"config":{
        "storage":{"files":[{"path":"/etc/same"},{"path":"/etc/changed"},{"path":"/etc/gone"},{"path":"/etc/neither"},
                            {"path":"/var/lib/kubelet/config.json"},{"path":"/etc/../secret"}]},
        "systemd":{"units":[{"name":"a.service","contents":"[Unit]\n","dropins":[{"name":"10-b.conf"}]},
                            {"name":"masked.service","mask":true}]}}}}"#;

    #[test]
    fn files_that_differ_from_the_image_are_found() {
        let tree = tempfile::tempdir().unwrap();
        let root = Root::new(tree.path().to_owned());
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(leftovers(&root), None);
        put(CONFIGS[1], CONFIG);
        put("usr/etc/same", "1");
        put("etc/same", "1");
        put("usr/etc/changed", "1");
        put("etc/changed", "2");
        put("usr/etc/gone", "1");
        put("etc/systemd/system/a.service", "[Unit]\n");
        put("secret", "1");
        let found = leftovers(&root).unwrap();
        assert_eq!(found.managed, 6);
        assert_eq!(found.differing, ["/etc/changed", "/etc/gone", "/etc/systemd/system/a.service"]);
        // The config that the MCD applied last takes precedence.
        put(CONFIGS[0], r#"{"spec":{"config":{"storage":{"files":[{"path":"/etc/same"}]}}}}"#);
        assert_eq!(leftovers(&root), Some(Leftovers { managed: 1, differing: Vec::new() }));
        put(CONFIGS[0], "{");
        assert_eq!(leftovers(&root), None);
    }

    #[test]
    fn configs_without_files_are_read_tolerantly() {
        assert!(paths(br#"{"spec":{}}"#).unwrap().is_empty());
        assert!(paths(br#"{"spec":{"config":{"storage":{},"systemd":{"units":[]}}}}"#).unwrap().is_empty());
        assert_eq!(paths(b"[]"), None);
    }
}
