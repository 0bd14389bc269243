//! The work of the stand-ins, done by the originals' libraries: import under the container policy through ostree-ext
//! and skopeo, staging and pruning through libostree.

use std::path::Path;
use std::pin::pin;

use anyhow::{Context as _, Result};
use ostree_ext::container::OstreeImageReference;
use ostree_ext::container::deploy::{ORIGIN_CONTAINER, prune};
use ostree_ext::container::store::{ImageImporter, ImportProgress, LayeredImageState, PrepareResult, query_image};
use ostree_ext::ostree::gio::Cancellable;
use ostree_ext::ostree::{self, glib};
use ostree_ext::sysroot::SysrootLock;

/// libostree's record of the staged deployment.
const RECORD: &str = "/run/ostree/staged-deployment";
const LOCK_FILE: &str = "/run/ostree/staged-deployment-locked";

/// Progress of an import and a stage.
pub enum Said {
    /// A line for users.
    Message(String),
    /// A part of the work starts.
    TaskBegin(String),
    /// A part of the work is done.
    TaskEnd(String),
}

/// Opens the system's sysroot. The caller has its own mount namespace, in which libostree may remount the file systems
/// that it writes to.
pub fn open() -> Result<ostree::Sysroot> {
    let sysroot = ostree::Sysroot::new_default();
    sysroot.set_mount_namespace_in_use();
    sysroot.load(Cancellable::NONE)?;
    Ok(sysroot)
}

/// Imports an image into the repository, unless it is there.
pub async fn import(
    sysroot: &SysrootLock,
    imgref: &OstreeImageReference,
    mut say: impl FnMut(Said),
) -> Result<Box<LayeredImageState>> {
    say(Said::Message(format!("Pulling manifest: {imgref}")));
    // The originals' newer library asks no registry for a digest that is there.
    let there = query_image(&sysroot.repo(), &imgref.imgref)?;
    if let Some(image) = there.filter(|image| imgref.imgref.name.ends_with(&format!("@{}", image.manifest_digest))) {
        return Ok(image);
    }
    let mut importer = ImageImporter::new(&sysroot.repo(), imgref, Default::default()).await?;
    importer.require_bootable();
    let mut progress = importer.request_progress();
    let prepared = match importer.prepare().await? {
        PrepareResult::AlreadyPresent(image) => return Ok(image),
        PrepareResult::Ready(prepared) => prepared,
    };
    say(Said::Message(format!("Importing: {imgref} (digest: {})", prepared.manifest_digest)));
    let needed = prepared.layers_to_fetch().collect::<Result<Vec<_>>>()?;
    let bytes: u64 = needed.iter().map(|(layer, _)| layer.layer().size()).sum();
    say(Said::Message(format!("layers needed: {} ({bytes} bytes)", needed.len())));
    drop(needed);
    let mut import = pin!(importer.import(prepared));
    loop {
        tokio::select! {
            imported = &mut import => return imported.context("Importing"),
            Some(layer) = progress.recv() => match layer {
                ImportProgress::OstreeChunkStarted(layer) | ImportProgress::DerivedLayerStarted(layer) => {
                    say(Said::TaskBegin(format!("Fetching layer {}", layer.digest())));
                }
                ImportProgress::OstreeChunkCompleted(layer) | ImportProgress::DerivedLayerCompleted(layer) => {
                    say(Said::TaskEnd(format!("Fetching layer {}", layer.digest())));
                }
            },
        }
    }
}

/// The origin of a deployment of that image.
#[must_use]
pub fn origin(imgref: &OstreeImageReference) -> glib::KeyFile {
    let origin = glib::KeyFile::new();
    origin.set_string("origin", ORIGIN_CONTAINER, &imgref.to_string());
    origin
}

/// Stages a commit with the `merge` deployment's changes in /etc; a reboot does not boot a locked one.
pub fn stage(
    sysroot: &SysrootLock,
    commit: &str,
    origin: &glib::KeyFile,
    merge: &ostree::Deployment,
    arguments: &[String],
    locked: bool,
) -> Result<()> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let options = ostree::SysrootDeployTreeOpts { override_kernel_argv: Some(&arguments), ..Default::default() };
    sysroot
        .stage_tree_with_options(Some(&merge.osname()), commit, Some(origin), Some(merge), &options, Cancellable::NONE)
        .context("Staging deployment")?;
    if locked { lock_staged(true) } else { Ok(()) }
}

/// The locks of the staged deployment.
pub struct Lock {
    /// libostree's record says so.
    pub in_record: bool,
    /// The file of an older libostree is there, or of `ostree admin`.
    pub by_file: bool,
}

/// Reads them.
#[must_use]
pub fn is_locked() -> Lock {
    let record = record().and_then(|record| Ok(record.lookup("locked")?));
    Lock { in_record: record.ok().flatten().unwrap_or(false), by_file: Path::new(LOCK_FILE).exists() }
}

/// Locks the staged deployment in libostree's record as `OstreeSysrootDeployTreeOpts.locked` does, or unlocks it as
/// `ostree_sysroot_change_finalization` does. The bindings have neither.
pub fn lock_staged(locked: bool) -> Result<()> {
    let record = record()?;
    record.insert("locked", locked);
    let new = format!("{RECORD}.new");
    std::fs::write(&new, record.end().data())?;
    std::fs::rename(new, RECORD)?;
    if !locked && Path::new(LOCK_FILE).exists() {
        std::fs::remove_file(LOCK_FILE)?;
    }
    Ok(())
}

fn record() -> Result<glib::VariantDict> {
    let bytes = glib::Bytes::from_owned(std::fs::read(RECORD).with_context(|| format!("Reading {RECORD}"))?);
    Ok(glib::VariantDict::new(Some(&glib::Variant::from_bytes_with_type(&bytes, glib::VariantTy::VARDICT))))
}

/// Removes images that no deployment uses, with the objects that only they needed.
pub fn tidy(sysroot: &SysrootLock) -> Result<()> {
    sysroot.load_if_changed(Cancellable::NONE)?;
    sysroot.cleanup(Cancellable::NONE).context("Cleaning up")?;
    let pruned = prune(sysroot).context("Pruning")?;
    if !pruned.is_empty() {
        println!("Pruned images: {} (layers: {})", pruned.n_images, pruned.n_layers);
    }
    Ok(())
}

/// The image of a deployment, if it has one.
#[must_use]
pub fn origin_reference(deployment: &ostree::Deployment) -> Option<String> {
    let origin = deployment.origin()?;
    origin.string("origin", ORIGIN_CONTAINER).ok().map(Into::into)
}

/// Kernel arguments, without the one that libostree sets itself.
#[must_use]
pub fn arguments(deployment: &ostree::Deployment) -> Vec<String> {
    let options = deployment.bootconfig().and_then(|boot| boot.get("options"));
    let options: String = options.map(Into::into).unwrap_or_default();
    let all = ostree::KernelArgs::from_string(&options).to_strv();
    all.into_iter().map(|one| one.to_string()).filter(|one| !one.starts_with("ostree=")).collect()
}
