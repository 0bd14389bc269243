//! Boot facts, read from the kernel and the file system without any daemon. Read-only.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::stat;
use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;
use serde::Deserialize;

use crate::files::{Stamp, invalid, read_beneath, read_bounded};
pub use crate::kernel_arguments::split as split_arguments;
use crate::model::{BootId, Deployment, printable};

/// Largest rendered MachineConfig read, in bytes. etcd limits the compressed object to 1.5 MB.
pub(super) const MAX_CONFIG: u64 = 16 << 20;
/// Longest `spec.kernelArguments` accepted, in bytes with a space after each. It is the kernel's own limit for its
/// command line (`COMMAND_LINE_SIZE`): 2048 bytes on x86, arm64 and ppc64, 4096 on s390x.
const MAX_ARGUMENTS: usize = 4096;
/// Largest of the small files read, in bytes.
const MAX_SMALL: u64 = 64 << 10;
/// Most boot entries read; libostree writes one for each deployment.
const MAX_ENTRIES: usize = 64;
/// The first annotations, which the machine-config-server writes through Ignition. The MCD renames the file once it has
/// applied them.
const FIRST_BOOT: &str = "etc/machine-config-daemon/node-annotations.json";
/// Where MCO's image build puts the rendered config. Read from the pristine copy of `/etc`, because the live file may be
/// an old one of the MCD.
const RENDERED_CONFIG: &str = "usr/etc/machine-config-daemon/currentconfig";

/// Files that libostree copies to `/boot` beside the kernel, from the same directory, if they exist.
const BESIDE_THE_KERNEL: [&str; 3] = ["initramfs.img", "aboot.img", ".vmlinuz.hmac"];
/// Most files and directories of device trees counted; an aarch64 kernel has about 1,500.
const MAX_DEVICE_TREES: usize = 20_000;

/// Total size of the files below a directory, in bytes; 0 if it does not exist. Reads at most `left` entries and follows
/// no symbolic link to a directory.
fn size_of_tree(directory: &Path, left: &mut usize) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    let mut sum: u64 = 0;
    for entry in entries.filter_map(Result::ok) {
        let Some(fewer) = left.checked_sub(1) else { break };
        *left = fewer;
        let size = match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size_of_tree(&entry.path(), left),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        };
        sum = sum.saturating_add(size);
    }
    sum
}

fn read_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read_bounded(path, MAX_SMALL)?).map_err(invalid)
}

/// Identifies a state of the deployments; see [`Root::deployments_stamp`].
pub type DeploymentsStamp = [Stamp; 3];

/// The root of the file system that the agent reads: `/`, or a directory tree in tests.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// The root at `path`, which is `/` in production.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// `path` below the root. `path` has no leading slash.
    #[must_use]
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.join(path)
    }

    /// Whether the machine was booted from an ostree deployment.
    #[must_use]
    pub fn is_image_mode(&self) -> bool {
        self.join("run/ostree-booted").exists()
    }

    /// Whether the machine was booted from a composefs-native image, which bootc stores without ostree. Such an image
    /// has its digest on the kernel's command line.
    #[must_use]
    pub fn is_composefs_native(&self) -> bool {
        let native = |line: Vec<String>| line.iter().any(|argument| argument.starts_with("composefs="));
        !self.is_image_mode() && self.command_line().is_ok_and(native)
    }

    /// Whether a program holds the sysroot lock, which `bootc status` would wait for. Read from the kernel's list of
    /// locks; false also on a file system whose device number the list shows differently.
    #[must_use]
    pub fn is_sysroot_locked(&self) -> bool {
        let Ok(lock) = std::fs::metadata(self.join("ostree/lock")) else { return false };
        read_text(&self.join("proc/locks")).is_ok_and(|locks| is_locked(&locks, lock.dev(), lock.ino()))
    }

    /// The id of this boot.
    ///
    /// # Errors
    /// When the file cannot be read or holds no id.
    pub fn boot_id(&self) -> io::Result<BootId> {
        let text = read_text(&self.join("proc/sys/kernel/random/boot_id"))?;
        let text = text.trim();
        if text.is_empty() || text.len() > 64 || !text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
            return Err(invalid("boot_id is not a UUID"));
        }
        Ok(BootId(text.to_owned()))
    }

    /// Milliseconds since the kernel started.
    ///
    /// # Errors
    /// When `/proc/uptime` cannot be read or holds no number.
    pub fn uptime(&self) -> io::Result<u64> {
        let text = read_text(&self.join("proc/uptime"))?;
        let seconds = text.split_whitespace().next().and_then(|first| first.parse().ok());
        let uptime = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let uptime = uptime.and_then(|uptime| u64::try_from(uptime.as_millis()).ok());
        uptime.ok_or_else(|| invalid("/proc/uptime holds no number"))
    }

    /// The running kernel's arguments.
    ///
    /// # Errors
    /// When `/proc/cmdline` cannot be read.
    pub fn command_line(&self) -> io::Result<Vec<String>> {
        Ok(split_arguments(&read_text(&self.join("proc/cmdline"))?))
    }

    /// The arguments in the boot entry of the running system, as libostree wrote them; `None` if the entry is not found.
    /// The boot loader may have changed them before it passed them to the kernel.
    #[must_use]
    pub fn boot_entry(&self) -> Option<Vec<String>> {
        let line = self.command_line().ok()?;
        let target = line.iter().find(|argument| argument.starts_with("ostree="))?;
        let entries = std::fs::read_dir(self.join("boot/loader/entries")).ok()?;
        entries.take(MAX_ENTRIES).find_map(|entry| {
            let text = read_text(&entry.ok()?.path()).ok()?;
            let options = text.lines().find_map(|line| line.strip_prefix("options")).map(split_arguments)?;
            options.contains(target).then_some(options)
        })
    }

    /// Free space on `/boot`, in bytes.
    #[must_use]
    pub fn boot_free(&self) -> Option<u64> {
        self.free("boot")
    }

    /// Bytes free for root on `/sysroot`, where images are stored.
    #[must_use]
    pub fn sysroot_free(&self) -> Option<u64> {
        self.free("sysroot")
    }

    fn free(&self, directory: &str) -> Option<u64> {
        let stat = statvfs(&self.join(directory)).ok()?;
        stat.blocks_available().checked_mul(stat.fragment_size())
    }

    /// Size of the running kernel on `/boot`, in bytes: all that libostree's `install_deployment_kernel` copies. It is
    /// the estimate for the next kernel. Read below the booted deployment, because the unit hides `/usr/lib/modules`.
    #[must_use]
    pub fn boot_needed(&self) -> Option<u64> {
        let release = uname().ok()?.release().to_owned();
        let arguments = self.command_line().ok()?;
        let booted = arguments.iter().find_map(|argument| argument.strip_prefix("ostree=/"))?;
        let directory = self.join(booted).join("usr/lib/modules").join(release);
        let size = |name: &str| std::fs::metadata(directory.join(name)).map(|m| m.len()).ok();
        let beside = BESIDE_THE_KERNEL.iter().filter_map(|name| size(name)).fold(0, u64::saturating_add);
        let mut left = MAX_DEVICE_TREES;
        let device_trees = match size("devicetree") {
            Some(only) => only,
            None => size_of_tree(&directory.join("dtb"), &mut left),
        };
        Some(size("vmlinuz")?.saturating_add(beside).saturating_add(device_trees))
    }

    /// The first-boot annotations; `None` if the file does not exist or cannot be parsed. The latter is logged.
    #[must_use]
    pub fn first_boot(&self) -> Option<BTreeMap<String, String>> {
        let bytes = read_bounded(&self.join(FIRST_BOOT), MAX_SMALL).ok()?;
        let warn = |error: &serde_json::Error| {
            let why = printable(&error.to_string(), 200);
            tracing::warn!("ignoring /{FIRST_BOOT}, which cannot be parsed: {why}");
        };
        serde_json::from_slice(&bytes).inspect_err(warn).ok()
    }

    /// Reads the arguments that the rendered config inside a booted or staged deployment demands, and returns the
    /// config's name.
    pub(super) fn read_config(&self, deployment: &mut Deployment) -> Option<String> {
        if !deployment.booted && !deployment.staged {
            return None;
        }
        let directory = deployment.id.strip_prefix(&format!("{}-", deployment.osname)).unwrap_or_default();
        let config = self.rendered_config(&deployment.osname, directory).unwrap_or_else(|why| {
            deployment.config_fault = Some(why);
            None
        })?;
        deployment.wanted_arguments = Some(config.arguments);
        config.name
    }

    /// The rendered config inside a deployment; `None` if it has none.
    ///
    /// # Errors
    /// Why the rendered config cannot be used. Then the kernel arguments that it demands are unknown.
    fn rendered_config(&self, osname: &str, directory: &str) -> Result<Option<RenderedConfig>, String> {
        let plain = |name: &str| !name.is_empty() && !name.contains('/') && name != "..";
        if !plain(osname) || !plain(directory) {
            return Ok(None);
        }
        let deployment = self.join("ostree/deploy").join(osname).join("deploy").join(directory);
        let config = match read_beneath(&deployment, Path::new(RENDERED_CONFIG), MAX_CONFIG) {
            Ok(bytes) => rendered_config(&bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => Err(error.to_string()),
        };
        config.map(Some).map_err(|why| printable(&format!("/{RENDERED_CONFIG} of {directory}: {why}"), 300))
    }

    /// Changes whenever a deployment is written, staged, locked or dropped: libostree then touches the directory or
    /// changes its record of the staged deployment. An older libostree has a separate file for the lock.
    #[must_use]
    pub fn deployments_stamp(&self) -> DeploymentsStamp {
        ["ostree/deploy", "run/ostree/staged-deployment", "run/ostree/staged-deployment-locked"]
            .map(|path| Stamp::of(&self.join(path)))
    }
}

/// The fields that the agent uses of the rendered config in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct RenderedConfig {
    /// `metadata.name`.
    name: Option<String>,
    /// `spec.kernelArguments`, each split into single arguments.
    arguments: Vec<String>,
}

/// Whether `/proc/locks` lists a write lock on the file that is held, not only waited for. Pure.
fn is_locked(locks: &str, device: u64, inode: u64) -> bool {
    let file = format!("{:02x}:{:02x}:{inode}", stat::major(device), stat::minor(device));
    locks.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        let kind = words.next();
        matches!(kind, Some("FLOCK" | "OFDLCK" | "POSIX"))
            && words.nth(1) == Some("WRITE")
            && words.nth(1) == Some(file.as_str())
    })
}

/// Parses a MachineConfig. Pure.
fn rendered_config(config: &[u8]) -> Result<RenderedConfig, String> {
    #[derive(Deserialize)]
    struct MachineConfig {
        #[serde(default)]
        metadata: Metadata,
        spec: Spec,
    }
    #[derive(Default, Deserialize)]
    struct Metadata {
        #[serde(default)]
        name: Option<String>,
    }
    #[derive(Deserialize)]
    struct Spec {
        #[serde(default, rename = "kernelArguments")]
        kernel_arguments: Option<Vec<String>>,
    }
    let config: MachineConfig = serde_json::from_slice(config).map_err(|error| error.to_string())?;
    let name = config.metadata.name.filter(|name| !name.is_empty()).map(|name| printable(&name, 253));
    let arguments = config.spec.kernel_arguments.unwrap_or_default();
    let length = arguments.iter().fold(0, |sum: usize, entry| sum.saturating_add(entry.len()).saturating_add(1));
    if length > MAX_ARGUMENTS {
        let count = arguments.len();
        return Err(format!(
            "its {count} kernelArguments are {length} bytes long, and no kernel accepts more than {MAX_ARGUMENTS}"
        ));
    }
    Ok(RenderedConfig { name, arguments: arguments.iter().flat_map(|entry| split_arguments(entry)).collect() })
}

/// This machine's architecture by its OCI name.
///
/// # Errors
/// When uname(2) fails.
pub fn architecture() -> io::Result<String> {
    let machine = uname()?.machine().to_string_lossy().into_owned();
    Ok(match machine.as_str() {
        "x86_64" => "amd64".to_owned(),
        "aarch64" => "arm64".to_owned(),
        _ => machine,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rendered_configs_are_read_tolerantly() {
        let parsed = |json: &str| rendered_config(json.as_bytes()).map(|config| (config.name, config.arguments));
        let whole = r#"{"kind":"MachineConfig","metadata":{"name":"rendered-worker-1","uid":"x"},
            "spec":{"kernelArguments":["a b","c"],"fips":true}}"#;
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        assert_eq!(parsed(whole).unwrap(), (Some("rendered-worker-1".to_owned()), words(&["a", "b", "c"])));
        assert_eq!(parsed(r#"{"spec":{"kernelArguments":null}}"#).unwrap(), (None, Vec::new()));
        assert_eq!(parsed(r#"{"metadata":{"name":""},"spec":{}}"#).unwrap(), (None, Vec::new()));
        assert!(parsed("{}").is_err());
        assert!(parsed("").is_err());
    }

    #[test]
    fn arguments_that_no_kernel_takes_are_refused() {
        let config = |count: usize| format!(r#"{{"spec":{{"kernelArguments":[{}"x"]}}}}"#, "\"a\",".repeat(count));
        assert_eq!(rendered_config(config(2047).as_bytes()).unwrap().arguments.len(), 2048);
        for count in [2048, 1_200_000] {
            let why = rendered_config(config(count).as_bytes()).unwrap_err();
            assert!(why.contains(&format!("its {} kernelArguments", count + 1)) && why.contains("4096"), "{why}");
        }
    }

    #[test]
    fn no_link_is_followed_inside_an_image() {
        let tree = tempfile::tempdir().unwrap();
        let root = Root::new(tree.path().to_owned());
        let outside = root.join("outside/machine-config-daemon");
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::write(outside.join("currentconfig"), r#"{"spec":{"kernelArguments":["x"]}}"#).unwrap();
        let deployed = |name: &str| root.join("ostree/deploy/os/deploy").join(name).join("usr");
        let link = |target: &Path, at: &Path| {
            std::fs::create_dir_all(at.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(target, at).unwrap();
        };
        link(&outside.join("currentconfig"), &deployed("file.0").join("etc/machine-config-daemon/currentconfig"));
        link(&outside, &deployed("directory.0").join("etc/machine-config-daemon"));
        link(&root.join("outside"), &deployed("etc.0").join("etc"));
        link(Path::new("/nonexistent"), &deployed("dangling.0").join("etc/machine-config-daemon/currentconfig"));
        for name in ["file.0", "directory.0", "etc.0", "dangling.0"] {
            let why = root.rendered_config("os", name).unwrap_err();
            assert!(why.contains("is a symbolic link") && why.contains(name), "{why}");
        }
    }

    #[test]
    fn locks_are_found_in_the_kernels_list() {
        let device = stat::makedev(0xfd, 1);
        for (line, locked) in [
            ("1: FLOCK  ADVISORY  WRITE 812 fd:01:77 0 EOF", true),
            ("4: OFDLCK ADVISORY  WRITE -1 fd:01:77 0 EOF", true),
            ("1: FLOCK  ADVISORY  READ  812 fd:01:77 0 EOF", false),
            ("1: -> FLOCK  ADVISORY  WRITE 813 fd:01:77 0 EOF", false),
            ("1: FLOCK  ADVISORY  WRITE 812 fd:01:777 0 EOF", false),
            ("1: FLOCK  ADVISORY  WRITE 812 fd:00:77 0 EOF", false),
            ("1: LEASE  ACTIVE    WRITE 812 fd:01:77 0 EOF", false),
            ("nonsense", false),
            ("", false),
        ] {
            assert_eq!(
                is_locked(&format!("9: POSIX  ADVISORY  READ 1 00:1a:2 128 128\n{line}\n"), device, 77),
                locked,
                "{line}"
            );
        }
    }

    #[test]
    fn a_real_lock_is_found() {
        let lock = tempfile::NamedTempFile::new().unwrap();
        let metadata = lock.as_file().metadata().unwrap();
        let held = || is_locked(&std::fs::read_to_string("/proc/locks").unwrap(), metadata.dev(), metadata.ino());
        assert!(!held());
        lock.as_file().lock().unwrap();
        if held() {
            lock.as_file().unlock().unwrap();
            assert!(!held());
        } else {
            // In some containers and sandboxes the list shows other device numbers, or is empty.
            crate::skip::skip("this kernel's /proc/locks does not show the lock of a temporary file");
        }
    }

    #[test]
    fn all_facts_are_read_below_the_given_root() {
        let tree = tempfile::tempdir().unwrap();
        let root = Root::new(tree.path().to_owned());
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert!(!root.is_image_mode());
        put("run/ostree-booted", "");
        put("proc/sys/kernel/random/boot_id", "0f0e2c3a-0000-4000-8000-000000000001\n");
        put("proc/uptime", "12.34 99.0\n");
        put("proc/cmdline", "root=UUID=1 ro ostree=/ostree/boot.1/rhcos/abc/0\n");
        let modules = format!("ostree/boot.1/rhcos/abc/0/usr/lib/modules/{}", uname().unwrap().release().display());
        put(&format!("{modules}/vmlinuz"), "1234");
        put(&format!("{modules}/initramfs.img"), "123456");
        put(FIRST_BOOT, r#"{"machineconfiguration.openshift.io/state":"Done"}"#);
        put(&format!("ostree/deploy/rhcos/deploy/abc.0/{RENDERED_CONFIG}"), r#"{"spec":{"kernelArguments":["x"]}}"#);
        assert!(root.is_image_mode());
        assert_eq!(root.boot_id().unwrap().0, "0f0e2c3a-0000-4000-8000-000000000001");
        assert_eq!(root.uptime().unwrap(), 12_340);
        assert_eq!(root.command_line().unwrap(), ["root=UUID=1", "ro", "ostree=/ostree/boot.1/rhcos/abc/0"]);
        assert_eq!(root.boot_needed(), Some(10));
        // All files that libostree copies count, also device trees in subdirectories.
        put(&format!("{modules}/dtb/vendor/board.dtb"), "1234567");
        put(&format!("{modules}/dtb/other.dtb"), "12");
        put(&format!("{modules}/.vmlinuz.hmac"), "1");
        put(&format!("{modules}/config"), "not copied");
        assert_eq!(root.boot_needed(), Some(20));
        assert_eq!(root.first_boot().unwrap().len(), 1);
        assert_eq!(root.rendered_config("rhcos", "abc.0").unwrap().unwrap().arguments, ["x"]);
        assert_eq!(root.rendered_config("..", "abc.0"), Ok(None));
        assert_eq!(root.rendered_config("rhcos", "abc.1"), Ok(None));
        put("proc/sys/kernel/random/boot_id", "\u{1b}[2J");
        assert!(root.boot_id().is_err());
        put(FIRST_BOOT, "[]");
        assert_eq!(root.first_boot(), None);
        put(FIRST_BOOT, &"x".repeat(70_000));
        assert_eq!(root.first_boot(), None);
    }
}
