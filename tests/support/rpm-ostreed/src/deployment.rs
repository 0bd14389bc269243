//! A deployment as rpm-ostreed describes it.

use std::collections::BTreeMap;

use zbus::Variant;

use crate::bus::{Dict, variant};

/// One deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deployment {
    /// The stateroot.
    pub osname: String,
    /// The ostree checksum.
    pub checksum: String,
    /// The checksum of the image's commit, where packages are layered on it.
    pub base_checksum: Option<String>,
    /// Number among deployments of the same checksum.
    pub serial: i32,
    /// Whether the machine runs it.
    pub booted: bool,
    /// Whether it waits for the finalizer.
    pub staged: bool,
    /// Whether its finalization is locked, by libostree's record or by the older file.
    pub locked: bool,
    /// Whether the older file locks it: the only lock that the dictionary shows.
    pub locked_by_file: bool,
    /// Whether it was pinned by an administrator.
    pub pinned: bool,
    /// The state of its /usr, e.g. `none`.
    pub unlocked: String,
    /// The image's version label.
    pub version: Option<String>,
    /// Seconds since the epoch.
    pub timestamp: u64,
    /// The image that its origin names; empty if it names none.
    pub reference: String,
    /// Digest of the image's manifest.
    pub digest: String,
    /// The manifest.
    pub manifest: String,
    /// The image configuration.
    pub config: String,
    /// Kernel arguments without `ostree=`; the dictionary does not show them.
    pub kernel_arguments: Vec<String>,
    /// Layered packages.
    pub requested_packages: Vec<String>,
}

impl Deployment {
    /// `<checksum>.<serial>`, the name of its directory.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}.{}", self.checksum, self.serial)
    }

    /// The dictionary of the `Deployments` property (rust/src/daemon.rs, rpmostreed-deployment-utils.cxx).
    #[must_use]
    pub fn dict(&self) -> Dict {
        let mut dict = Dict::new();
        let mut put = |key: &str, value: Variant<'static>| dict.insert(key.to_owned(), variant(value));
        put("id", format!("{}-{}", self.osname, self.key()).into());
        put("osname", self.osname.clone().into());
        put("checksum", self.checksum.clone().into());
        put("serial", self.serial.into());
        put("booted", self.booted.into());
        put("staged", self.staged.into());
        if self.staged && self.locked_by_file {
            put("finalization-locked", true.into());
        }
        put("pinned", self.pinned.into());
        put("unlocked", self.unlocked.clone().into());
        put("timestamp", self.timestamp.into());
        if let Some(version) = &self.version {
            put("version", version.clone().into());
        }
        let mut meta: BTreeMap<String, Variant<'static>> = BTreeMap::new();
        if !self.reference.is_empty() {
            put("container-image-reference", self.reference.clone().into());
            put("container-image-reference-digest", self.digest.clone().into());
            for (key, value) in [
                ("ostree.manifest-digest", &self.digest),
                ("ostree.manifest", &self.manifest),
                ("ostree.container.image-config", &self.config),
            ] {
                meta.insert(key.to_owned(), value.clone().into());
            }
        }
        put("base-commit-meta", meta.into());
        put("requested-packages", self.requested_packages.clone().into());
        put("packages", self.requested_packages.clone().into());
        // Always there, even after the smallest change.
        for key in [
            "requested-local-packages",
            "requested-local-fileoverride-packages",
            "requested-base-removals",
            "requested-base-local-replacements",
        ] {
            put(key, Vec::<String>::new().into());
        }
        put("regenerate-initramfs", false.into());
        put("base-removals", Vec::<Variant<'static>>::new().into());
        put("base-local-replacements", Vec::<(Variant<'static>, Variant<'static>)>::new().into());
        put("base-remote-replacements", BTreeMap::<String, Variant<'static>>::new().into());
        if let Some(base) = &self.base_checksum {
            put("base-checksum", base.clone().into());
            put("base-timestamp", self.timestamp.into());
        }
        dict
    }
}
