//! The machine's ostree sysroot on disk: deployments, their boot order, the staged one, the image store.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use glib::VariantDict;
use rpm_ostreed::Deployment;
use serde::{Deserialize, Serialize};

use super::pull::Image;

/// The kernel command line of its boot loader entry.
fn options(deployment: &Deployment) -> String {
    let mut words = deployment.kernel_arguments.clone();
    words.push(format!("ostree=/ostree/boot.1/{}/{}/{}", deployment.osname, deployment.checksum, deployment.serial));
    words.join(" ")
}

/// The command line that the kernel reports.
fn command_line(deployment: &Deployment) -> String {
    format!("BOOT_IMAGE=(hd0,gpt3)/ostree/{}/vmlinuz {}\n", deployment.checksum, options(deployment))
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    digest: String,
    version: Option<String>,
    timestamp: u64,
    manifest: String,
    config: String,
    kernel_arguments: Vec<String>,
}

/// libostree's record of the staged deployment.
struct Note {
    /// `<checksum>.<serial>`.
    key: String,
    locked: bool,
    arguments: Option<Vec<String>>,
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    openssl::sha::sha256(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The sysroot lock; released when dropped.
#[derive(Debug)]
pub struct Lock {
    sysroot: Arc<Sysroot>,
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.sysroot.locked.store(false, Ordering::SeqCst);
        self.sysroot.list_lock();
    }
}

/// The tree that replaces the machine's disk and memory file systems.
#[derive(Debug)]
pub struct Sysroot {
    root: PathBuf,
    osname: String,
    locked: AtomicBool,
    /// Another program, outside of the doubles, holds the lock.
    locked_by_another: AtomicBool,
    powered: AtomicBool,
    disk: Mutex<()>,
}

impl Sysroot {
    /// Lays out an empty tree at `root`.
    pub fn create(root: &Path, osname: &str) -> anyhow::Result<Self> {
        for dir in ["boot/loader/entries", "boot/ostree", "ostree/repo/images", "run/ostree", "etc", "sysroot"] {
            fs::create_dir_all(root.join(dir))?;
        }
        let this = Self {
            root: root.to_owned(),
            osname: osname.to_owned(),
            locked: AtomicBool::new(false),
            locked_by_another: AtomicBool::new(false),
            powered: AtomicBool::new(false),
            disk: Mutex::default(),
        };
        fs::write(root.join("ostree/lock"), "")?;
        fs::create_dir_all(this.deploy_dir())?;
        fs::create_dir_all(root.join("ostree/boot.1").join(osname))?;
        let link = root.join("sysroot/ostree");
        if fs::symlink_metadata(&link).is_err() {
            std::os::unix::fs::symlink("../ostree", link)?;
        }
        Ok(this)
    }

    /// The tree of the running machine that this process is on.
    pub fn running(root: &Path, osname: &str) -> anyhow::Result<Self> {
        let this = Self::create(root, osname)?;
        this.powered.store(true, Ordering::SeqCst);
        Ok(this)
    }

    /// The root of the tree.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The stateroot's name.
    #[must_use]
    pub fn osname(&self) -> &str {
        &self.osname
    }

    /// Takes or releases the lock that `ostree admin` and bootc hold while they work.
    pub fn set_locked(&self, locked: bool) {
        self.locked_by_another.store(locked, Ordering::SeqCst);
        self.list_lock();
    }

    /// Waits for that lock without a limit, like bootc.
    pub async fn lock(self: &Arc<Self>) -> Lock {
        while self.locked_by_another.load(Ordering::SeqCst)
            || self.locked.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst).is_err()
        {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.list_lock();
        Lock { sysroot: self.clone() }
    }

    /// Writes the kernel's list of locks.
    fn list_lock(&self) {
        let path = self.root.join("proc/locks");
        let mut text = "1: POSIX  ADVISORY  READ 1 00:00:1 128 128\n".to_owned();
        if let (true, Ok(file)) = (self.is_locked(), fs::metadata(self.root.join("ostree/lock"))) {
            let (major, minor) = (nix::sys::stat::major(file.dev()), nix::sys::stat::minor(file.dev()));
            text.push_str(&format!("2: OFDLCK ADVISORY  WRITE -1 {major:02x}:{minor:02x}:{} 0 EOF\n", file.ino()));
        }
        let _ = fs::create_dir_all(self.root.join("proc"));
        let _ = fs::write(path, text);
    }

    /// Whether another tool holds the lock.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.locked.load(Ordering::SeqCst) || self.locked_by_another.load(Ordering::SeqCst)
    }

    fn deploy_dir(&self) -> PathBuf {
        self.root.join("ostree/deploy").join(&self.osname).join("deploy")
    }

    /// libostree's record of the staged deployment, with the data that the finalizer needs.
    fn staged_path(&self) -> PathBuf {
        self.root.join("run/ostree/staged-deployment")
    }

    /// An older libostree's lock of the staged deployment.
    fn lock_path(&self) -> PathBuf {
        self.root.join("run/ostree/staged-deployment-locked")
    }

    pub(crate) fn images_dir(&self) -> PathBuf {
        self.root.join("ostree/repo/images")
    }

    /// Nothing is written to the disk until the next boot.
    pub(crate) fn cut_power(&self) {
        self.powered.store(false, Ordering::SeqCst);
    }

    /// Whether the machine runs.
    pub(crate) fn is_powered(&self) -> bool {
        self.powered.load(Ordering::SeqCst)
    }

    fn disk(&self) -> MutexGuard<'_, ()> {
        self.disk.lock().unwrap()
    }

    /// The disk of a machine that runs.
    fn live_disk(&self) -> anyhow::Result<MutexGuard<'_, ()>> {
        let guard = self.disk();
        if !self.is_powered() {
            bail!("the machine is off");
        }
        Ok(guard)
    }

    /// Every deployment: staged first, then in boot order.
    #[must_use]
    pub fn load(&self) -> Vec<Deployment> {
        let _disk = self.disk();
        self.scan()
    }

    fn scan(&self) -> Vec<Deployment> {
        let booted = self.booted_key();
        let mut list = Vec::new();
        if let Some(note) = self.note()
            && let Ok(mut deployment) = self.read(&note.key)
        {
            deployment.staged = true;
            deployment.locked_by_file = self.lock_path().exists();
            deployment.locked = note.locked || deployment.locked_by_file;
            list.push(deployment);
        }
        for key in self.boot_order() {
            if let Ok(mut deployment) = self.read(&key) {
                deployment.booted = booted.as_deref() == Some(key.as_str());
                list.push(deployment);
            }
        }
        list
    }

    fn note(&self) -> Option<Note> {
        let bytes = glib::Bytes::from_owned(fs::read(self.staged_path()).ok()?);
        let note = VariantDict::new(Some(&glib::Variant::from_bytes_with_type(&bytes, glib::VariantTy::VARDICT)));
        let target = VariantDict::new(Some(&note.lookup_value("target", None)?));
        Some(Note {
            key: target.lookup("name").ok()??,
            locked: note.lookup("locked").ok().flatten().unwrap_or(false),
            arguments: note.lookup("kargs").ok().flatten(),
        })
    }

    fn key_of_command_line(line: &str) -> Option<String> {
        let path = line.split_whitespace().find_map(|word| word.strip_prefix("ostree=/ostree/boot.1/"))?;
        let mut parts = path.split('/').skip(1);
        Some(format!("{}.{}", parts.next()?, parts.next()?))
    }

    fn booted_key(&self) -> Option<String> {
        if !self.root.join("run/ostree-booted").exists() {
            return None;
        }
        Self::key_of_command_line(&fs::read_to_string(self.root.join("proc/cmdline")).ok()?)
    }

    fn boot_order(&self) -> Vec<String> {
        let mut entries: Vec<(u32, String)> = Vec::new();
        for entry in fs::read_dir(self.root.join("boot/loader/entries")).expect("a boot directory") {
            // An entry may be replaced while the directory is read.
            let Some(text) = entry.ok().and_then(|entry| fs::read_to_string(entry.path()).ok()) else { continue };
            let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            if let (Some(version), Some(options)) = (field("version "), field("options "))
                && let (Ok(version), Some(key)) = (version.parse(), Self::key_of_command_line(options))
            {
                entries.push((version, key));
            }
        }
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.0));
        entries.into_iter().map(|(_, key)| key).collect()
    }

    fn read(&self, key: &str) -> anyhow::Result<Deployment> {
        let dir = self.deploy_dir();
        let record: Record = serde_json::from_slice(&fs::read(dir.join(format!("{key}.json")))?)?;
        let origin = fs::read_to_string(dir.join(format!("{key}.origin")))?;
        let field = |name: &str| origin.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let (checksum, serial) = key.split_once('.').context("a key without a serial")?;
        let requested_packages: Vec<String> = field("requested")
            .map(|list| list.split(';').filter(|name| !name.is_empty()).map(str::to_owned).collect())
            .unwrap_or_default();
        Ok(Deployment {
            osname: self.osname.clone(),
            checksum: checksum.to_owned(),
            base_checksum: (!requested_packages.is_empty()).then(|| sha256_hex(checksum.as_bytes())),
            serial: serial.parse()?,
            pinned: field("pinned") == Some("true"),
            unlocked: "none".to_owned(),
            reference: field("container-image-reference").unwrap_or_default().to_owned(),
            digest: record.digest,
            version: record.version,
            timestamp: record.timestamp,
            manifest: record.manifest,
            config: record.config,
            kernel_arguments: record.kernel_arguments,
            requested_packages,
            ..Deployment::default()
        })
    }

    fn write_origin(&self, deployment: &Deployment) -> anyhow::Result<()> {
        let mut text = format!("[origin]\ncontainer-image-reference={}\n", deployment.reference);
        if !deployment.requested_packages.is_empty() {
            text.push_str(&format!("\n[packages]\nrequested={};\n", deployment.requested_packages.join(";")));
        }
        if deployment.pinned {
            text.push_str("\n[libostree-transient]\npinned=true\n");
        }
        fs::write(self.deploy_dir().join(format!("{}.origin", deployment.key())), text)?;
        Ok(())
    }

    /// Checks an image out as a deployment without a boot entry.
    fn check_out(&self, image: &Image, kernel_arguments: &[String]) -> anyhow::Result<Deployment> {
        let checksum = sha256_hex(format!("commit of {}", image.digest).as_bytes());
        let mut serial = 0;
        while self.deploy_dir().join(format!("{checksum}.{serial}")).exists() {
            serial += 1;
        }
        let deployment = Deployment {
            osname: self.osname.clone(),
            checksum,
            serial,
            unlocked: "none".to_owned(),
            reference: image.reference.clone(),
            digest: image.digest.clone(),
            version: image.version.clone(),
            timestamp: image.timestamp,
            manifest: image.manifest.clone(),
            config: image.config.clone(),
            kernel_arguments: kernel_arguments.to_vec(),
            ..Deployment::default()
        };
        let tree = self.deploy_dir().join(deployment.key());
        fs::create_dir_all(&tree)?;
        for (path, compressed) in &image.layers {
            unpack(path, *compressed, &tree).with_context(|| format!("Unpacking {}", path.display()))?;
        }
        let defaults = tree.join("usr/etc");
        if defaults.is_dir() {
            copy_tree(&defaults, &tree.join("etc"))?;
        }
        self.write_origin(&deployment)?;
        let record = Record {
            digest: deployment.digest.clone(),
            version: deployment.version.clone(),
            timestamp: deployment.timestamp,
            manifest: deployment.manifest.clone(),
            config: deployment.config.clone(),
            kernel_arguments: deployment.kernel_arguments.clone(),
        };
        fs::write(self.deploy_dir().join(format!("{}.json", deployment.key())), serde_json::to_vec_pretty(&record)?)?;
        Ok(deployment)
    }

    /// Stages an image; an unpinned staged deployment is discarded.
    pub(crate) fn stage(&self, image: &Image, kernel_arguments: &[String], locked: bool) -> anyhow::Result<Deployment> {
        let _disk = self.live_disk()?;
        self.discard_staged()?;
        let mut deployment = self.check_out(image, kernel_arguments)?;
        if !self.is_powered() {
            bail!("the machine is off");
        }
        self.note_staged(&deployment, locked, true)?;
        self.touch()?;
        deployment.staged = true;
        deployment.locked = locked;
        Ok(deployment)
    }

    /// Removes the arguments from the record, as after `ostree admin deploy --stage`.
    pub fn forget_staged_arguments(&self) -> anyhow::Result<()> {
        let _disk = self.live_disk()?;
        let staged = self.scan().into_iter().find(|deployment| deployment.staged).context("nothing is staged")?;
        self.note_staged(&staged, staged.locked, false)
    }

    /// A GVariant in libostree's format.
    fn note_staged(&self, deployment: &Deployment, locked: bool, with_arguments: bool) -> anyhow::Result<()> {
        let note = VariantDict::new(None);
        let target = VariantDict::new(None);
        target.insert("name", deployment.key());
        target.insert("osname", &deployment.osname);
        target.insert("bootcsum", &deployment.checksum);
        note.insert_value("target", &target.end());
        if locked {
            note.insert("locked", true);
        }
        if with_arguments {
            note.insert("kargs", &deployment.kernel_arguments);
        }
        let temporary = self.staged_path().with_extension("tmp");
        fs::write(&temporary, note.end().data())?;
        fs::rename(temporary, self.staged_path())?;
        Ok(())
    }

    /// `ostree_sysroot_change_finalization` on a locked deployment; does nothing to one that is not locked.
    pub(crate) fn unlock(&self) -> anyhow::Result<Deployment> {
        let _disk = self.live_disk()?;
        let staged = self.scan().into_iter().find(|deployment| deployment.staged).context("nothing is staged")?;
        let with_arguments = self.note().is_some_and(|note| note.arguments.is_some());
        self.note_staged(&staged, false, with_arguments)?;
        let _ = fs::remove_file(self.lock_path());
        self.touch()?;
        Ok(staged)
    }

    /// Locks the staged deployment as an older libostree does, with a file and nothing in the record.
    pub fn lock_with_file(&self) -> anyhow::Result<()> {
        let _disk = self.live_disk()?;
        fs::write(self.lock_path(), "")?;
        self.touch()
    }

    /// Deploys an image as the only one, as an installer does.
    pub(crate) fn install(&self, image: &Image, kernel_arguments: &[String]) -> anyhow::Result<Deployment> {
        let _disk = self.disk();
        let deployment = self.check_out(image, kernel_arguments)?;
        self.write_boot_order(std::slice::from_ref(&deployment))?;
        Ok(deployment)
    }

    fn write_boot_order(&self, order: &[Deployment]) -> anyhow::Result<()> {
        let entries = self.root.join("boot/loader/entries");
        let old: Vec<PathBuf> = fs::read_dir(&entries)?.filter_map(Result::ok).map(|entry| entry.path()).collect();
        for path in old {
            fs::remove_file(path)?;
        }
        for (index, deployment) in order.iter().enumerate() {
            let version = order.len() - index;
            let title = deployment.version.clone().unwrap_or_else(|| deployment.checksum.clone());
            fs::write(
                entries.join(format!("ostree-{version}.conf")),
                format!(
                    "title {} {title} (ostree:{index})\nversion {version}\noptions {}\nlinux /ostree/{}/vmlinuz\n",
                    deployment.osname,
                    options(deployment),
                    deployment.checksum,
                ),
            )?;
            let link = self.root.join("ostree/boot.1").join(&deployment.osname).join(&deployment.checksum);
            fs::create_dir_all(&link)?;
            let link = link.join(deployment.serial.to_string());
            if fs::symlink_metadata(&link).is_err() {
                let target = format!("../../../deploy/{}/deploy/{}", deployment.osname, deployment.key());
                std::os::unix::fs::symlink(target, link)?;
            }
        }
        self.collect()?;
        self.touch()
    }

    /// Deletes every deployment without a boot entry.
    fn collect(&self) -> anyhow::Result<()> {
        let mut live = self.boot_order();
        live.extend(self.note().map(|note| note.key));
        for entry in fs::read_dir(self.deploy_dir())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if live.iter().any(|key| name == *key || name.starts_with(&format!("{key}."))) {
                continue;
            }
            if path.is_dir() {
                fs::remove_dir_all(&path)?;
            } else {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Deletes imported images that no deployment's origin names; returns their number.
    pub(crate) fn prune_images(&self) -> anyhow::Result<usize> {
        let _disk = self.live_disk()?;
        let live: Vec<String> =
            self.scan().iter().map(|deployment| super::pull::store_key(&deployment.reference)).collect();
        let mut pruned = 0;
        for entry in fs::read_dir(self.images_dir())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !live.contains(&name) {
                // A killed download may still write for a moment.
                let _ = fs::remove_dir_all(&path);
                pruned += usize::from(!name.starts_with("incoming"));
            }
        }
        Ok(pruned)
    }

    /// Changes the modification time of the deployment directory, by which other programs notice a change.
    pub fn touch(&self) -> anyhow::Result<()> {
        let directory = fs::File::open(self.root.join("ostree/deploy"))?;
        let old = directory.metadata()?.modified()?;
        let now = SystemTime::now();
        directory.set_modified(if now > old { now } else { old + Duration::from_nanos(1) })?;
        Ok(())
    }

    /// Drops the staged deployment; returns whether there was one.
    pub fn drop_staged(&self) -> anyhow::Result<bool> {
        let _disk = self.live_disk()?;
        self.discard_staged()
    }

    fn discard_staged(&self) -> anyhow::Result<bool> {
        let existed = self.staged_path().exists();
        let _ = fs::remove_file(self.staged_path());
        let _ = fs::remove_file(self.lock_path());
        self.collect()?;
        if existed {
            self.touch()?;
        }
        Ok(existed)
    }

    fn in_boot_order(&self) -> Vec<Deployment> {
        self.scan().into_iter().filter(|deployment| !deployment.staged).collect()
    }

    /// Drops the deployment that boots next but is not booted: the staged one, or a finalized one before the booted
    /// one.
    pub(crate) fn drop_pending(&self) -> anyhow::Result<bool> {
        let _disk = self.live_disk()?;
        let mut changed = self.discard_staged()?;
        let order = self.in_boot_order();
        if let Some(booted) = order.iter().position(|deployment| deployment.booted)
            && order[..booted].iter().any(|deployment| !deployment.pinned)
        {
            let kept: Vec<Deployment> = order
                .iter()
                .enumerate()
                .filter(|(index, deployment)| *index >= booted || deployment.pinned)
                .map(|(_, deployment)| deployment.clone())
                .collect();
            self.write_boot_order(&kept)?;
            changed = true;
        }
        Ok(changed)
    }

    /// Drops unpinned deployments after the booted one.
    pub(crate) fn drop_rollback(&self) -> anyhow::Result<bool> {
        let _disk = self.live_disk()?;
        let order = self.in_boot_order();
        let Some(booted) = order.iter().position(|deployment| deployment.booted) else { return Ok(false) };
        let kept: Vec<Deployment> = order
            .iter()
            .enumerate()
            .filter(|(index, deployment)| *index <= booted || deployment.pinned)
            .map(|(_, deployment)| deployment.clone())
            .collect();
        if kept.len() == order.len() {
            return Ok(false);
        }
        self.write_boot_order(&kept)?;
        Ok(true)
    }

    /// `rpm-ostree rollback`, run by hand.
    pub fn turn_boot_order(&self) -> anyhow::Result<()> {
        self.roll_back()
    }

    /// Moves the rollback deployment to the front at once.
    pub(crate) fn roll_back(&self) -> anyhow::Result<()> {
        let _disk = self.live_disk()?;
        let mut order = self.in_boot_order();
        if self.note().is_some() {
            bail!("Staged deployment (remove with cleanup -p)");
        }
        if order.len() < 2 {
            bail!("No rollback deployment found");
        }
        order.swap(0, 1);
        self.write_boot_order(&order)
    }

    /// The finalizer's work at shutdown: the staged deployment becomes the first to boot, the booted one the rollback.
    /// A locked one is not finalized.
    pub fn finalize(&self) -> anyhow::Result<Option<Deployment>> {
        let _disk = self.live_disk()?;
        let list = self.scan();
        let Some(staged) = list.iter().find(|deployment| deployment.staged).cloned() else { return Ok(None) };
        if staged.locked {
            return Ok(None);
        }
        fs::remove_file(self.staged_path())?;
        let mut order = vec![staged.clone()];
        order.extend(
            list.into_iter().filter(|deployment| !deployment.staged && (deployment.booted || deployment.pinned)),
        );
        self.write_boot_order(&order)?;
        Ok(Some(staged))
    }

    /// The work of boot loader and initramfs: boots entry `index` of the boot order, with an empty `/run`.
    pub(crate) fn boot(&self, index: usize) -> anyhow::Result<Deployment> {
        let _disk = self.disk();
        self.powered.store(true, Ordering::SeqCst);
        self.locked.store(false, Ordering::SeqCst);
        self.set_locked(false);
        let run = self.root.join("run");
        let _ = fs::remove_dir_all(&run);
        fs::create_dir_all(run.join("ostree"))?;
        let order = self.in_boot_order();
        let deployment = order.get(index).or(order.first()).context("nothing to boot")?.clone();
        fs::create_dir_all(self.root.join("proc/sys/kernel/random"))?;
        fs::write(self.root.join("proc/cmdline"), command_line(&deployment))?;
        fs::write(run.join("ostree-booted"), "")?;
        let usr = self.root.join("usr");
        let _ = fs::remove_file(&usr);
        std::os::unix::fs::symlink(
            format!("ostree/deploy/{}/deploy/{}/usr", deployment.osname, deployment.key()),
            usr,
        )?;
        self.collect()?;
        Ok(Deployment { booted: true, ..deployment })
    }

    /// The kernel command line of the first boot entry, as the boot loader passes it on.
    pub fn command_line(&self) -> anyhow::Result<String> {
        let _disk = self.disk();
        Ok(command_line(self.in_boot_order().first().context("nothing to boot")?))
    }

    /// Layers packages on the booted deployment.
    pub fn layer_packages(&self, packages: &[&str]) -> anyhow::Result<()> {
        let _disk = self.disk();
        let mut booted = self.scan().into_iter().find(|deployment| deployment.booted).context("not booted")?;
        booted.requested_packages = packages.iter().map(|&name| name.to_owned()).collect();
        self.write_origin(&booted)?;
        self.touch()
    }

    /// Pins or unpins the deployment at `index` of [`Sysroot::load`].
    pub fn pin(&self, index: usize, pinned: bool) -> anyhow::Result<()> {
        let _disk = self.disk();
        let mut deployment = self.scan().get(index).context("no such deployment")?.clone();
        deployment.pinned = pinned;
        self.write_origin(&deployment)?;
        self.touch()
    }

    /// The directory of a deployment's files.
    #[must_use]
    pub fn tree(&self, deployment: &Deployment) -> PathBuf {
        self.deploy_dir().join(deployment.key())
    }
}

fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            let _ = fs::remove_file(&target);
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Applies one layer, `/etc` going to `/usr/etc` as in an ostree commit.
fn unpack(layer: &Path, compressed: bool, tree: &Path) -> anyhow::Result<()> {
    let file = fs::File::open(layer)?;
    let reader: Box<dyn std::io::Read> =
        if compressed { Box::new(flate2::read::MultiGzDecoder::new(file)) } else { Box::new(file) };
    let mut archive = tar::Archive::new(reader);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let mut path: PathBuf = path.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect();
        if path.as_os_str().is_empty() {
            continue;
        }
        if path.starts_with("etc") {
            path = Path::new("usr").join(path);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = tree.join(&path);
        let parent = target.parent().context("no parent")?;
        if let Some(removed) = name.strip_prefix(".wh.") {
            if removed == ".wh..opq" {
                let _ = fs::remove_dir_all(parent);
                fs::create_dir_all(parent)?;
            } else {
                let removed = parent.join(removed);
                if fs::remove_file(&removed).is_err() {
                    let _ = fs::remove_dir_all(&removed);
                }
            }
            continue;
        }
        fs::create_dir_all(parent)?;
        match entry.header().entry_type() {
            tar::EntryType::Directory => fs::create_dir_all(&target)?,
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                let _ = fs::remove_file(&target);
                let mut content = Vec::new();
                entry.read_to_end(&mut content)?;
                fs::write(&target, content)?;
            }
            tar::EntryType::Symlink => {
                let _ = fs::remove_file(&target);
                std::os::unix::fs::symlink(entry.link_name()?.context("a link without target")?, &target)?;
            }
            tar::EntryType::Link => {
                let source: PathBuf = entry.link_name()?.context("a link without target")?.into_owned();
                let mut source: PathBuf =
                    source.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect();
                if source.starts_with("etc") {
                    source = Path::new("usr").join(source);
                }
                let _ = fs::remove_file(&target);
                fs::hard_link(tree.join(source), &target)?;
            }
            _ => {}
        }
    }
    Ok(())
}
