//! The images: the one that the guest was installed from, and others derived from it by one more layer, which takes a
//! fraction of a second and needs no ostree.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use support::image::{Blob, Manifest, Media, Pushed, digest, host_architecture};
use support::registry::Registry;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// The additional content of a derived image.
#[derive(Clone, Debug, Default)]
pub struct Extra {
    /// Path without leading slash, with mode and content.
    pub files: BTreeMap<String, (u32, Vec<u8>)>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

impl Extra {
    /// With this file.
    #[must_use]
    pub fn file(mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        self.files.insert(path.trim_start_matches('/').to_owned(), (mode, content.into()));
        self
    }

    /// With this label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }
}

/// The installed image, in the OCI layout of the build.
pub struct Layout {
    dir: PathBuf,
    manifest: Manifest,
}

impl Layout {
    /// Opens the layout, which holds one image.
    pub fn open(dir: &Path) -> Result<Self> {
        let index: Value = serde_json::from_slice(&fs::read(dir.join("index.json")).context("no index.json")?)?;
        let named = index["manifests"][0]["digest"].as_str().context("an index without manifests")?;
        let Blob { digest, bytes } = Blob::new(fs::read(blob_path(dir, named))?);
        Ok(Self { dir: dir.to_owned(), manifest: Manifest { media_type: Media::Oci.manifest().into(), digest, bytes } })
    }

    /// The digest of the installed image.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.manifest.digest
    }

    fn document(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.manifest.bytes)?)
    }

    fn blob(&self, digest: &str) -> Result<Blob> {
        Ok(Blob::new(fs::read(blob_path(&self.dir, digest)).with_context(|| format!("reading blob {digest}"))?))
    }

    /// Uploads the installed image, unless the registry has it.
    pub async fn push(&self, registry: &Registry, repo: &str) -> Result<()> {
        if registry.manifest(repo, self.digest()).await?.is_some() {
            return Ok(());
        }
        let document = self.document()?;
        let layers = document["layers"].as_array().context("a manifest without layers")?;
        for descriptor in layers.iter().chain([&document["config"]]) {
            let digest = descriptor["digest"].as_str().context("a descriptor without digest")?;
            registry.put_blob(repo, &self.blob(digest)?).await?;
        }
        registry.put_manifest(repo, "1", &self.manifest).await
    }

    /// Uploads an image with one more layer. `host` is the guest's name for the registry.
    pub async fn push_derived(
        &self,
        registry: &Registry,
        host: &str,
        repo: &str,
        tag: &str,
        extra: &Extra,
    ) -> Result<Pushed> {
        let manifest = self.derive(registry, repo, extra).await?;
        registry.put_manifest(repo, tag, &manifest).await?;
        let instance_digests = BTreeMap::from([(host_architecture().to_owned(), manifest.digest.clone())]);
        Ok(Pushed { host: host.to_owned(), repo: repo.to_owned(), digest: manifest.digest, instance_digests })
    }

    /// The same behind an index, whose digest differs from its image's.
    pub async fn push_index(
        &self,
        registry: &Registry,
        host: &str,
        repo: &str,
        tag: &str,
        extra: &Extra,
    ) -> Result<Pushed> {
        let manifest = self.derive(registry, repo, extra).await?;
        registry.put_manifest(repo, &manifest.digest, &manifest).await?;
        let index = Manifest::new(
            Media::Oci.index(),
            &json!({ "schemaVersion": 2, "mediaType": Media::Oci.index(), "manifests": [{
                "mediaType": manifest.media_type,
                "digest": manifest.digest,
                "size": manifest.bytes.len(),
                "platform": { "architecture": host_architecture(), "os": "linux" },
            }] }),
        );
        registry.put_manifest(repo, tag, &index).await?;
        let instance_digests = BTreeMap::from([(host_architecture().to_owned(), manifest.digest)]);
        Ok(Pushed { host: host.to_owned(), repo: repo.to_owned(), digest: index.digest, instance_digests })
    }

    async fn derive(&self, registry: &Registry, repo: &str, extra: &Extra) -> Result<Manifest> {
        let mut document = self.document()?;
        let installed = document["config"]["digest"].as_str().context("a manifest without config")?;
        let mut config: Value = serde_json::from_slice(&self.blob(installed)?.bytes)?;

        let tar = archive(&extra.files)?;
        let mut compressed = GzBuilder::new().mtime(0).write(Vec::new(), Compression::fast());
        compressed.write_all(&tar)?;
        let layer = Blob::new(compressed.finish()?);
        push_to(&mut document["layers"], layer.descriptor(LAYER))?;
        push_to(&mut config["rootfs"]["diff_ids"], digest(&tar).into())?;
        push_to(&mut config["history"], json!({ "created_by": "derived by a test" }))?;
        for (key, value) in &extra.labels {
            config["config"]["Labels"][key] = value.as_str().into();
        }
        let config = Blob::new(config.to_string().into_bytes());
        document["config"] = config.descriptor(CONFIG);
        registry.put_blob(repo, &layer).await?;
        registry.put_blob(repo, &config).await?;
        Ok(Manifest::new(Media::Oci.manifest(), &document))
    }
}

fn blob_path(dir: &Path, digest: &str) -> PathBuf {
    dir.join("blobs").join(digest.replacen(':', "/", 1))
}

fn push_to(array: &mut Value, value: Value) -> Result<()> {
    array.as_array_mut().context("the image is not as expected")?.push(value);
    Ok(())
}

fn archive(files: &BTreeMap<String, (u32, Vec<u8>)>) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, (mode, content)) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        archive.append_data(&mut header, path, content.as_slice())?;
    }
    Ok(archive.into_inner()?)
}
