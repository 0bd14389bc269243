//! Identifies the files that decide about an image, as they were when its verification began. The result of a
//! verification is valid until one of them changes.

use std::path::{Path, PathBuf};

use super::gate::{MAX_POLICY, Policy};
use super::{Settings, TrustError};
use crate::files::{Stamp, read_bounded};
use crate::model::PinnedImage;

/// containers-registries.conf(5), which names mirrors, where signatures are then looked up, and blocked registries. The
/// engine reads no others: the agent passes none, and the engine has no home directory.
const REGISTRIES_CONF: [&str; 2] = ["/etc/containers/registries.conf", "/etc/containers/registries.conf.d"];
/// Most files that one directory may have, or one policy may name; a node has a few.
const MAX_FILES: usize = 1024;

/// Identifies the policy, the files that it names for an image, and the settings of the engine's signature lookup. Taken
/// before verification reads them, so that a change during verification is noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustStamp {
    /// The policy and the files that it names.
    files: Vec<(PathBuf, Stamp)>,
    /// The settings: directories with their entries, and files.
    settings: Vec<(PathBuf, Stamp)>,
    /// The first directory or policy with more than [`MAX_FILES`].
    excess: Option<PathBuf>,
}

impl TrustStamp {
    /// Reads the stamps of all files that decide about `image`.
    #[must_use]
    pub fn read(settings: &Settings, image: &PinnedImage) -> Self {
        // The stamp is taken before the file is read.
        let policy = stamped(settings.policy.clone());
        let (looked_up, mut excess) = lookup(settings);
        let bytes = read_bounded(&settings.policy, MAX_POLICY).unwrap_or_default();
        let parsed = Policy::parse(&bytes).ok();
        let mut named: Vec<PathBuf> = parsed.iter().flat_map(|policy| policy.files(image)).map(PathBuf::from).collect();
        named.sort();
        named.dedup();
        if named.len() > MAX_FILES {
            named.clear();
            excess = excess.or_else(|| Some(settings.policy.clone()));
        }
        let files = std::iter::once(policy).chain(named.into_iter().map(stamped)).collect();
        Self { files, settings: looked_up, excess }
    }

    /// Reads the stamps again and returns the first file that has changed.
    #[must_use]
    pub fn changed(&self, settings: &Settings) -> Option<PathBuf> {
        let differs = |(path, stamp): &&(PathBuf, Stamp)| Stamp::of(path) != *stamp;
        if let Some((path, _)) = self.files.iter().find(differs) {
            return Some(path.clone());
        }
        let (now, _) = lookup(settings);
        if now == self.settings {
            return None;
        }
        let differs = |this: &[(PathBuf, Stamp)], other: &[(PathBuf, Stamp)]| {
            this.iter().find(|entry| !other.contains(entry)).map(|(path, _)| path.clone())
        };
        differs(&self.settings, &now).or_else(|| differs(&now, &self.settings))
    }

    /// Refuses a policy or directory with too many files to watch.
    pub(super) fn check(settings: &Settings, image: &PinnedImage) -> Result<(), TrustError> {
        let Some(path) = Self::read(settings, image).excess else { return Ok(()) };
        let why = format!("it has or names more than {MAX_FILES} files, more than the agent watches; remove some");
        Err(TrustError::Policy { path, why })
    }
}

fn stamped(path: PathBuf) -> (PathBuf, Stamp) {
    let stamp = Stamp::of(&path);
    (path, stamp)
}

fn lookup(settings: &Settings) -> (Vec<(PathBuf, Stamp)>, Option<PathBuf>) {
    let mut found = Vec::new();
    let mut excess = None;
    for path in std::iter::once(settings.registries_d.as_path()).chain(REGISTRIES_CONF.map(Path::new)) {
        found.push(stamped(path.to_owned()));
        let mut entries: Vec<PathBuf> = std::fs::read_dir(path)
            .into_iter()
            .flat_map(|entries| entries.take(MAX_FILES.saturating_add(1)))
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        if entries.len() > MAX_FILES {
            excess = excess.or_else(|| Some(path.to_owned()));
            continue;
        }
        entries.sort();
        found.extend(entries.into_iter().map(stamped));
    }
    (found, excess)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::trust::reference;

    struct Lab {
        directory: tempfile::TempDir,
        settings: Settings,
        image: PinnedImage,
    }

    impl Lab {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = |name: &str| directory.path().join(name);
            std::fs::create_dir(path("registries.d")).unwrap();
            std::fs::write(path("registries.d/a.yaml"), "docker: {}").unwrap();
            let settings = Settings {
                policy: path("policy.json"),
                registries_d: path("registries.d"),
                skopeo: path("skopeo"),
                cert_dir: None,
                auth_files: Vec::new(),
                scratch: None,
                etc: path("etc"),
                deadline: Duration::from_secs(1),
            };
            let image = reference::parse(&format!("quay.io/o/i@sha256:{}", "ab".repeat(32))).unwrap();
            let lab = Self { directory, settings, image };
            lab.policy(&["key"]);
            std::fs::write(lab.path("key"), "one").unwrap();
            lab
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn policy(&self, keys: &[&str]) {
            let keys: Vec<_> = keys.iter().map(|key| self.path(key)).collect();
            let policy = serde_json::json!({"default": [{"type": "sigstoreSigned", "keyPaths": keys}]});
            std::fs::write(&self.settings.policy, policy.to_string()).unwrap();
        }

        fn read(&self) -> TrustStamp {
            TrustStamp::read(&self.settings, &self.image)
        }
    }

    #[test]
    fn every_file_that_decides_is_watched() {
        let lab = Lab::new();
        let (yaml, more) = (lab.path("registries.d/a.yaml"), lab.path("registries.d/b.yaml"));
        let changes: [(&dyn Fn(), PathBuf); 6] = [
            (&|| std::fs::write(lab.path("key"), "another").unwrap(), lab.path("key")),
            (&|| std::fs::remove_file(lab.path("key")).unwrap(), lab.path("key")),
            (&|| lab.policy(&["key", "more"]), lab.path("policy.json")),
            (&|| std::fs::write(lab.path("more"), "not there before").unwrap(), lab.path("more")),
            (&|| std::fs::write(&yaml, "docker: {a: {}}").unwrap(), yaml.clone()),
            (&|| std::fs::write(&more, "").unwrap(), lab.path("registries.d")),
        ];
        for (change, path) in changes {
            let stamp = lab.read();
            assert_eq!(stamp.changed(&lab.settings), None);
            change();
            assert_eq!(stamp.changed(&lab.settings), Some(path));
        }
    }

    #[test]
    fn a_pipe_in_place_of_a_watched_file_does_not_block() {
        let lab = Lab::new();
        let pipe = |name: &str| {
            let _ = std::fs::remove_file(lab.path(name));
            nix::unistd::mkfifo(&lab.path(name), nix::sys::stat::Mode::S_IRUSR).unwrap();
        };
        for name in ["key", "registries.d/a.yaml", "policy.json"] {
            let before = lab.read();
            pipe(name);
            assert!(before.changed(&lab.settings).is_some(), "{name}");
            assert_eq!(lab.read().changed(&lab.settings), None);
        }
    }

    #[test]
    fn more_files_than_are_watched_are_refused() {
        let lab = Lab::new();
        TrustStamp::check(&lab.settings, &lab.image).unwrap();
        let names: Vec<String> = (0..=MAX_FILES).map(|number| number.to_string()).collect();
        lab.policy(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let error = TrustStamp::check(&lab.settings, &lab.image).unwrap_err().to_string();
        assert!(error.contains("policy.json") && error.contains("remove some"), "{error}");
        lab.policy(&["key"]);
        for name in names {
            std::fs::write(lab.path("registries.d").join(name), "").unwrap();
        }
        let error = TrustStamp::check(&lab.settings, &lab.image).unwrap_err().to_string();
        assert!(error.contains("registries.d"), "{error}");
    }
}
