//! OS images, built in memory: layers, config, manifest, and an index over several architectures. The same
//! specification always gives the same digests.

use std::collections::BTreeMap;
use std::io::Write;

use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};

/// The media types of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Media {
    /// OCI image manifest and index.
    #[default]
    Oci,
    /// Docker image manifest version 2, schema 2, and manifest list.
    Docker2,
}

impl Media {
    /// The media type of a manifest.
    pub fn manifest(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
            Self::Docker2 => "application/vnd.docker.distribution.manifest.v2+json",
        }
    }

    /// The media type of an index.
    pub fn index(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.index.v1+json",
            Self::Docker2 => "application/vnd.docker.distribution.manifest.list.v2+json",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.config.v1+json",
            Self::Docker2 => "application/vnd.docker.container.image.v1+json",
        }
    }

    fn layer(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Docker2 => "application/vnd.docker.image.rootfs.diff.tar.gzip",
        }
    }
}

/// The content of an OS image. The default is a bootable image of the host's architecture without a rendered
/// MachineConfig.
#[derive(Clone, Debug)]
pub struct ImageSpec {
    /// The OS version, in os-release and as a label.
    pub version: String,
    /// The MachineConfig the image was built from: content of `currentconfig`, and a label.
    pub rendered_config: Option<String>,
    /// `spec.kernelArguments` of that MachineConfig.
    pub kernel_arguments: Vec<String>,
    /// `spec.osImageURL` of that MachineConfig.
    pub os_image_url: String,
    /// Size of an incompressible file in a layer of its own; none when 0.
    pub payload_mib: u32,
    /// OCI names, as in `amd64`.
    pub architectures: Vec<String>,
    /// Whether there is an index even with one architecture. Several architectures always have one.
    pub index: bool,
    /// Whether the labels say that the image can be booted.
    pub bootable: bool,
    /// More labels; they override those from the fields above.
    pub extra_labels: BTreeMap<String, String>,
    /// The media types.
    pub media: Media,
}

impl Default for ImageSpec {
    fn default() -> Self {
        Self {
            version: "9.6.20251122-0".into(),
            rendered_config: None,
            kernel_arguments: Vec::new(),
            os_image_url: String::new(),
            payload_mib: 0,
            architectures: vec![host_architecture().into()],
            index: false,
            bootable: true,
            extra_labels: BTreeMap::new(),
            media: Media::Oci,
        }
    }
}

impl ImageSpec {
    /// The default image with that version.
    pub fn new(version: &str) -> Self {
        Self { version: version.into(), ..Self::default() }
    }

    /// Built from that rendered MachineConfig.
    pub fn rendered_config(mut self, name: &str) -> Self {
        self.rendered_config = Some(name.into());
        self
    }

    /// With these kernel arguments in the MachineConfig.
    pub fn kernel_arguments<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.kernel_arguments = arguments.into_iter().map(String::from).collect();
        self
    }

    /// With that `osImageURL` in the MachineConfig.
    pub fn os_image_url(mut self, url: &str) -> Self {
        self.os_image_url = url.into();
        self
    }

    /// With that many MiB that do not compress.
    pub fn payload_mib(mut self, mib: u32) -> Self {
        self.payload_mib = mib;
        self
    }

    /// For these architectures, in OCI's names.
    pub fn architectures<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        self.architectures = names.into_iter().map(String::from).collect();
        self
    }

    /// With an index even over one architecture.
    pub fn index(mut self) -> Self {
        self.index = true;
        self
    }

    /// Without the labels of a bootable image.
    pub fn not_bootable(mut self) -> Self {
        self.bootable = false;
        self
    }

    /// With one more label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.extra_labels.insert(key.into(), value.into());
        self
    }

    /// With these media types.
    pub fn media(mut self, media: Media) -> Self {
        self.media = media;
        self
    }

    /// The labels in the image's config.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::from([
            ("org.opencontainers.image.version".into(), self.version.clone()),
            ("version".into(), self.version.clone()),
        ]);
        if self.bootable {
            labels.insert("containers.bootc".into(), "1".into());
            labels.insert("ostree.bootable".into(), "1".into());
        }
        if let Some(rendered) = &self.rendered_config {
            labels.insert("machineconfig".into(), rendered.clone());
            if let Some(pool) = pool_of(rendered) {
                labels.insert("machineconfigpool".into(), pool.into());
            }
        }
        labels.extend(self.extra_labels.clone());
        labels
    }

    /// The MachineConfig in `usr/etc/machine-config-daemon/currentconfig`, if there is one.
    pub fn current_config(&self) -> Option<Value> {
        let name = self.rendered_config.as_ref()?;
        Some(json!({
            "apiVersion": "machineconfiguration.openshift.io/v1",
            "kind": "MachineConfig",
            "metadata": { "name": name },
            "spec": {
                "config": { "ignition": { "version": "3.4.0" } },
                "extensions": [],
                "fips": false,
                "kernelArguments": self.kernel_arguments,
                "kernelType": "default",
                "osImageURL": self.os_image_url,
            },
        }))
    }

    /// Builds everything that is pushed to a registry.
    pub fn build(&self) -> Image {
        assert!(!self.architectures.is_empty(), "an image without architectures");
        let mut blobs = Vec::new();
        let mut instances = BTreeMap::new();
        let mut manifests = Vec::new();
        for architecture in &self.architectures {
            let instance = self.instance(architecture, &mut blobs);
            manifests.push(json!({
                "mediaType": instance.media_type,
                "digest": instance.digest,
                "size": instance.bytes.len(),
                "platform": { "architecture": architecture, "os": "linux" },
            }));
            instances.insert(architecture.clone(), instance);
        }
        let index = (self.index || instances.len() > 1).then(|| {
            Manifest::new(
                self.media.index(),
                &json!({ "schemaVersion": 2, "mediaType": self.media.index(), "manifests": manifests }),
            )
        });
        Image { blobs, instances, index }
    }

    fn instance(&self, architecture: &str, blobs: &mut Vec<Blob>) -> Manifest {
        let mut descriptors = Vec::new();
        let mut diff_ids = Vec::new();
        let mut history = Vec::new();
        for (purpose, layer) in self.layers(architecture) {
            diff_ids.push(layer.diff_id);
            history.push(json!({ "created": "1970-01-01T00:00:00Z", "created_by": purpose }));
            descriptors.push(layer.blob.descriptor(self.media.layer()));
            blobs.push(layer.blob);
        }
        let config = Blob::new(
            json!({
                "created": "1970-01-01T00:00:00Z",
                "architecture": architecture,
                "os": "linux",
                "config": { "Labels": self.labels() },
                "rootfs": { "type": "layers", "diff_ids": diff_ids },
                "history": history,
            })
            .to_string()
            .into_bytes(),
        );
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": self.media.manifest(),
            "config": config.descriptor(self.media.config()),
            "layers": descriptors,
        });
        blobs.push(config);
        Manifest::new(self.media.manifest(), &manifest)
    }

    fn layers(&self, architecture: &str) -> Vec<(&'static str, Layer)> {
        let kernel = format!("5.14.0-570.el9_6.{}", machine_name(architecture));
        let mut files = vec![
            ("usr/lib/os-release".to_string(), self.os_release().into_bytes()),
            (format!("usr/lib/modules/{kernel}/vmlinuz"), format!("not a kernel: {kernel}\n").into_bytes()),
        ];
        if let Some(config) = self.current_config() {
            files.push(("usr/etc/machine-config-daemon/currentconfig".into(), config.to_string().into_bytes()));
        }
        let mut layers = vec![("base", Layer::new(&files, Compression::fast()))];
        if self.payload_mib > 0 {
            let bytes = noise(&format!("{} {architecture}", self.version), self.payload_mib);
            // Compression would not make it smaller, only slower.
            layers.push(("payload", Layer::new(&[("usr/share/payload".into(), bytes)], Compression::none())));
        }
        layers
    }

    fn os_release(&self) -> String {
        format!(
            "NAME=\"Red Hat Enterprise Linux CoreOS\"\nID=\"rhcos\"\nVARIANT_ID=coreos\nVERSION=\"{0}\"\n\
             VERSION_ID=\"{0}\"\nOSTREE_VERSION=\"{0}\"\nPRETTY_NAME=\"Red Hat Enterprise Linux CoreOS {0}\"\n",
            self.version
        )
    }
}

/// An image ready to be pushed.
#[derive(Clone, Debug)]
pub struct Image {
    /// Layers and configs.
    pub blobs: Vec<Blob>,
    /// The manifest of each architecture.
    pub instances: BTreeMap<String, Manifest>,
    /// The index over them, if the image has one.
    pub index: Option<Manifest>,
}

impl Image {
    /// The manifest that a reference to the image names: its index, or its only manifest.
    pub fn top(&self) -> &Manifest {
        self.index.as_ref().unwrap_or_else(|| self.instances.values().next().expect("an architecture"))
    }
}

/// Bytes and their digest.
#[derive(Clone, Debug)]
pub struct Blob {
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// The content.
    pub bytes: Vec<u8>,
}

impl Blob {
    /// These bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { digest: digest(&bytes), bytes }
    }

    /// The descriptor by which a manifest refers to them.
    pub fn descriptor(&self, media_type: &str) -> Value {
        json!({ "mediaType": media_type, "digest": self.digest, "size": self.bytes.len() })
    }
}

/// A manifest or an index in its stored form.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Its media type.
    pub media_type: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// The JSON.
    pub bytes: Vec<u8>,
}

impl Manifest {
    /// That document.
    pub fn new(media_type: &str, document: &Value) -> Self {
        let bytes = document.to_string().into_bytes();
        Self { media_type: media_type.into(), digest: digest(&bytes), bytes }
    }
}

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The registry, as in `127.0.0.1:5000`.
    pub host: String,
    /// The repository, without the registry.
    pub repo: String,
    /// The digest of the index, or else of the only manifest.
    pub digest: String,
    /// The digest of each architecture's manifest.
    pub instance_digests: BTreeMap<String, String>,
}

impl Pushed {
    /// `host/repo@digest`.
    pub fn pullspec(&self) -> String {
        format!("{}@{}", self.repository(), self.digest)
    }

    /// `host/repo`, which is also the identity that `cosign sign` uses by default.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.host, self.repo)
    }

    /// `host/repo@digest` of one architecture's manifest.
    pub fn instance_pullspec(&self, architecture: &str) -> String {
        format!("{}@{}", self.repository(), self.instance_digests[architecture])
    }
}

/// The SHA-256 of bytes, as registries write it.
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = openssl::sha::sha256(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// OCI's name of the architecture the tests run on.
pub fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// The kernel's name of an architecture that OCI has a name for.
fn machine_name(architecture: &str) -> &str {
    match architecture {
        "amd64" => "x86_64",
        "arm64" => "aarch64",
        other => other,
    }
}

/// `worker` of `rendered-worker-<hash>`.
fn pool_of(rendered: &str) -> Option<&str> {
    Some(rendered.strip_prefix("rendered-")?.rsplit_once('-')?.0)
}

struct Layer {
    diff_id: String,
    blob: Blob,
}

impl Layer {
    /// Files and the directories above them, owned by root, with modification time 0.
    fn new(files: &[(String, Vec<u8>)], compression: Compression) -> Self {
        let mut entries = BTreeMap::new();
        for (path, content) in files {
            for (end, _) in path.match_indices('/') {
                entries.insert(&path[..end], None);
            }
            entries.insert(path, Some(content));
        }
        let mut archive = tar::Builder::new(Vec::new());
        for (path, content) in entries {
            let mut header = tar::Header::new_ustar();
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_entry_type(if content.is_some() { tar::EntryType::Regular } else { tar::EntryType::Directory });
            header.set_mode(if content.is_some() { 0o644 } else { 0o755 });
            let content = content.map(Vec::as_slice).unwrap_or_default();
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, path, content).unwrap();
        }
        let tar = archive.into_inner().unwrap();
        let mut compressed = GzBuilder::new().mtime(0).write(Vec::with_capacity(tar.len() / 4), compression);
        compressed.write_all(&tar).unwrap();
        Self { diff_id: digest(&tar), blob: Blob::new(compressed.finish().unwrap()) }
    }
}

/// Bytes that do not compress: a stream cipher's output, which is fast even in a debug build.
fn noise(seed: &str, mib: u32) -> Vec<u8> {
    use openssl::symm::{Cipher, encrypt};
    let key = openssl::sha::sha256(seed.as_bytes());
    encrypt(Cipher::aes_256_ctr(), &key, Some(&[0; 16]), &vec![0; mib as usize * 1024 * 1024]).unwrap()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn files(blob: &Blob) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(blob.bytes.as_slice()));
        let mut files = BTreeMap::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            assert_eq!((entry.header().mtime().unwrap(), entry.header().uid().unwrap()), (0, 0));
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            files.insert(entry.path().unwrap().to_str().unwrap().to_string(), content);
        }
        files
    }

    #[test]
    fn equal_image_specs_give_equal_digests() {
        let spec = ImageSpec::new("9.6.1").rendered_config("rendered-worker-0a").payload_mib(1);
        assert_eq!(spec.build().top().digest, spec.build().top().digest);
        assert_ne!(spec.build().top().digest, ImageSpec { version: "9.6.2".into(), ..spec }.build().top().digest);
    }

    #[test]
    fn layer_has_the_files_that_agent_and_host_read() {
        let spec = ImageSpec::new("9.6.1").rendered_config("rendered-infra-gpu-0a").kernel_arguments(["nosmt"]);
        let files = files(&spec.architectures(["amd64"]).build().blobs[0]);
        assert!(files["usr/lib/os-release"].windows(15).any(|line| line == b"VERSION=\"9.6.1\""));
        assert!(files.contains_key("usr/lib/modules/5.14.0-570.el9_6.x86_64/vmlinuz"));
        let config: Value = serde_json::from_slice(&files["usr/etc/machine-config-daemon/currentconfig"]).unwrap();
        assert_eq!(config["metadata"]["name"], "rendered-infra-gpu-0a");
        assert_eq!(config["spec"]["kernelArguments"], json!(["nosmt"]));
    }

    #[test]
    fn labels_follow_the_image_spec() {
        let spec = ImageSpec::new("9.6.1").rendered_config("rendered-infra-gpu-0a").label("version", "other");
        let labels = spec.labels();
        assert_eq!(labels["ostree.bootable"], "1");
        assert_eq!(labels["machineconfigpool"], "infra-gpu");
        assert_eq!(labels["version"], "other");
        assert!(!spec.not_bootable().labels().contains_key("containers.bootc"));
    }

    #[test]
    fn image_of_several_architectures_has_an_index() {
        let image = ImageSpec::default().architectures(["amd64", "arm64"]).media(Media::Docker2).build();
        let index: Value = serde_json::from_slice(&image.top().bytes).unwrap();
        assert_eq!(index["mediaType"], Media::Docker2.index());
        assert_eq!(index["manifests"][1]["digest"], image.instances["arm64"].digest);
        assert_ne!(image.instances["amd64"].digest, image.instances["arm64"].digest);
        assert!(ImageSpec::default().build().index.is_none() && ImageSpec::default().index().build().index.is_some());
    }
}
