//! Reads the deployments and the active transaction from rpm-ostreed.

use zbus::{OwnedObjectPath, OwnedVariant, Variant};

use super::Client;
use crate::host::dbus::{Dict, PropertiesProxy, RPM_OSTREE, SYSROOT};
use crate::host::{HostError, digest_in_title, staged};
use crate::model::{Backend, Deployment, Digest, HostFacts, Transaction, printable};
use crate::trust::{reference, rendered_config_label};

/// Most reads: a transaction or staged deployment that was listed may be gone before its details are read.
const LOOKS: u32 = 3;

/// Largest JSON document read from commit metadata, in bytes.
const MAX_METADATA: usize = 4 << 20;

/// The daemon's answer, with the paths that the operations need.
pub(in crate::host) struct Snapshot {
    pub(in crate::host) facts: HostFacts,
    pub(super) os: OwnedObjectPath,
    /// Peer address of the active transaction.
    pub(super) address: Option<String>,
}

impl Client<'_> {
    pub(in crate::host) async fn snapshot(&self) -> Result<Snapshot, HostError> {
        let mut looks = 1;
        loop {
            match self.look(looks == LOOKS).await {
                Err(HostError::Call { .. } | HostError::Vanished(_)) if looks < LOOKS => looks += 1,
                seen => return seen,
            }
        }
    }

    /// Reads once. The `last` read accepts a staged deployment without libostree's record.
    async fn look(&self, last: bool) -> Result<Snapshot, HostError> {
        // The daemon does not notice changes by bootc or `ostree admin` by itself.
        self.sysroot.reload().await.map_err(|error| self.failed("rpm-ostree's Reload", &error))?;
        let properties = async {
            let path = self.sysroot.inner().path().to_string();
            let builder = PropertiesProxy::builder(self.bus).destination(RPM_OSTREE).path(path);
            builder.cache_properties(zbus::proxy::CacheProperties::No).build().await?.get_all(SYSROOT).await
        };
        let properties = properties.await.map_err(|error| self.failed("rpm-ostree's properties", &error))?;
        let os: OwnedObjectPath = property(&properties, "Booted")
            .ok_or_else(|| HostError::confused("rpm-ostree", "Sysroot has no property Booted"))?;
        if os.as_str() == "/" {
            return Err(HostError::NotImageMode);
        }
        let dicts: Vec<Dict> = property(&properties, "Deployments")
            .ok_or_else(|| HostError::confused("rpm-ostree", "Sysroot has no property Deployments"))?;
        let mut deployments = Vec::with_capacity(dicts.len());
        for dict in &dicts {
            let mut parsed = deployment(dict)
                .ok_or_else(|| HostError::confused("rpm-ostree", "a deployment has no id, osname or checksum"))?;
            self.host.root.read_config(&mut parsed);
            if parsed.staged {
                // Read from libostree's record: the daemon's GetDeploymentBootConfig crashes the daemon if there are no
                // arguments, and its `finalization-locked` only shows the lock of an older libostree.
                let note = match staged::read(&self.host.root, &parsed.id) {
                    // The deployment was staged, dropped or finalized since the daemon answered.
                    None if !last => return Err(HostError::Vanished("reading the deployments")),
                    note => note.unwrap_or_default(),
                };
                (parsed.arguments, parsed.locked) = (note.arguments, parsed.locked || note.locked);
            }
            deployments.push(parsed);
        }
        let address = property::<String>(&properties, "ActiveTransactionPath").filter(|path| !path.is_empty());
        let transaction = match &address {
            Some(address) => {
                let active: Option<(String, String, String)> = property(&properties, "ActiveTransaction");
                let title = self.title(address).await?;
                let client = active.map(|(_, client, _)| printable(&client, 200)).unwrap_or_default();
                Some(Transaction { ours: digest_in_title(&title), title: printable(&title, 200), client })
            }
            None => None,
        };
        Ok(Snapshot { facts: HostFacts { backend: Backend::RpmOstree, deployments, transaction }, os, address })
    }
}

/// The value of `key`, if it has the type `T`.
pub fn property<T: TryFrom<OwnedVariant>>(dict: &Dict, key: &str) -> Option<T> {
    T::try_from(dict.get(key)?.try_clone().ok()?).ok()
}

/// Parses one dictionary of `Deployments`. Keys that are missing or of another type count as absent. Pure.
#[must_use]
pub fn deployment(dict: &Dict) -> Option<Deployment> {
    let flag = |key: &str| property::<bool>(dict, key).unwrap_or(false);
    let text = |key: &str| property::<String>(dict, key);
    let id = text("id")?;
    let metadata: Dict = property(dict, "base-commit-meta").unwrap_or_default();
    let document = |key: &str| property::<String>(&metadata, key).filter(|text| text.len() <= MAX_METADATA);
    let digest = |text: Option<String>| Digest::parse(&text?);
    Some(Deployment {
        id,
        osname: text("osname")?,
        checksum: text("checksum")?,
        booted: flag("booted"),
        staged: flag("staged"),
        locked: flag("finalization-locked"),
        pinned: flag("pinned"),
        version: text("version").map(|version| printable(&version, 100)),
        reference: text("container-image-reference").and_then(|text| reference::of_deployment(&text)),
        digest: digest(text("container-image-reference-digest")).or_else(|| digest(document("ostree.manifest-digest"))),
        layered: is_layered(dict),
        rendered_config: document("ostree.container.image-config").and_then(|json| rendered_config_label(&json)),
        wanted_arguments: None,
        config_fault: None,
        arguments: None,
    })
}

fn is_layered(dict: &Dict) -> bool {
    let listed = |key: &str| match dict.get(key).map(|value| &**value) {
        Some(Variant::Array(array)) => !array.is_empty(),
        Some(Variant::Dict(dict)) => dict.iter().next().is_some(),
        _ => false,
    };
    const BASE: [&str; 3] = ["base-removals", "base-local-replacements", "base-remote-replacements"];
    dict.contains_key("base-checksum")
        || property::<bool>(dict, "regenerate-initramfs").unwrap_or(false)
        || dict.keys().any(|key| (key.starts_with("requested-") || BASE.contains(&key.as_str())) && listed(key))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn dict(entries: Vec<(&str, Variant<'static>)>) -> Dict {
        entries.into_iter().map(|(key, value)| (key.to_owned(), value.try_into().unwrap())).collect()
    }

    fn least() -> Vec<(&'static str, Variant<'static>)> {
        vec![("id", "rhcos-abc.0".into()), ("osname", "rhcos".into()), ("checksum", "abc".into())]
    }

    #[test]
    fn a_deployment_needs_only_id_osname_and_checksum() {
        let parsed = deployment(&dict(least())).unwrap();
        assert_eq!(parsed.id, "rhcos-abc.0");
        assert!(!parsed.booted && !parsed.staged && !parsed.layered);
        assert_eq!((parsed.reference, parsed.digest, parsed.version), (None, None, None));
        for missing in 0..3 {
            let mut entries = least();
            entries.remove(missing);
            assert!(deployment(&dict(entries)).is_none());
        }
    }

    #[test]
    fn mistyped_keys_count_as_absent() {
        let mut entries = least();
        entries.extend([
            ("booted", "yes".into()),
            ("version", 1u32.into()),
            ("container-image-reference", true.into()),
        ]);
        let parsed = deployment(&dict(entries)).unwrap();
        assert!(!parsed.booted);
        assert_eq!((parsed.reference, parsed.version), (None, None));
    }

    #[test]
    fn the_digest_and_label_come_from_the_metadata() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        let config = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"history":[],
            "config":{"Labels":{"machineconfig":"rendered-worker-1"}}}"#;
        let metadata: HashMap<String, Variant<'static>> = HashMap::from([
            ("ostree.manifest-digest".to_owned(), Variant::from(digest.clone())),
            ("ostree.container.image-config".to_owned(), Variant::from(config.to_owned())),
        ]);
        let mut entries = least();
        entries.push(("base-commit-meta", Variant::from(metadata)));
        entries.push(("container-image-reference", "ostree-unverified-registry:quay.io/o/i:latest".into()));
        let parsed = deployment(&dict(entries)).unwrap();
        assert_eq!(parsed.digest.unwrap().as_str(), digest);
        assert_eq!(parsed.rendered_config.as_deref(), Some("rendered-worker-1"));
        assert_eq!(parsed.reference.as_deref(), Some("quay.io/o/i:latest"));
    }

    #[test]
    fn a_deployment_with_local_changes_counts_as_layered() {
        for (key, value, expected) in [
            ("requested-packages", Variant::from(vec!["vim"]), true),
            ("requested-packages", Variant::from(Vec::<String>::new()), false),
            ("requested-base-removals", Variant::from(vec!["x"]), true),
            ("base-checksum", "def".into(), true),
            ("regenerate-initramfs", true.into(), true),
            ("regenerate-initramfs", false.into(), false),
            ("packages", Variant::from(vec!["vim"]), false),
            ("base-commit-meta", Variant::from(HashMap::from([("a", "b")])), false),
        ] {
            let mut entries = least();
            entries.push((key, value));
            assert_eq!(deployment(&dict(entries)).unwrap().layered, expected, "{key}");
        }
    }
}
