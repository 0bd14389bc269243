//! The kernel's view of a confined process.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::container::Container;

/// Known writable mounts, each with its reason.
const KNOWN: [(&str, &str); 2] = [
    ("/proc", "the kernel's own; its files that change the system are read-only"),
    // One file through which a service may register for memory pressure with systemd 257.
    ("/sys/fs/cgroup/system.slice/rebase-agent.service/memory.pressure", "systemd's memory pressure protocol"),
];

/// A service's main process, seen from the host.
#[derive(Debug)]
pub struct Process {
    directory: PathBuf,
}

impl Process {
    /// The main process of `unit`.
    pub async fn of(container: &Container, unit: &str) -> Result<Self> {
        let pid = container.property(unit, "MainPID").await?;
        ensure!(pid != "0", "{unit} has no main process");
        Ok(Self { directory: container.path("proc").join(pid) })
    }

    /// A file at a path as the process sees it, in its own mounts.
    pub fn reads(&self, path: &str) -> Result<String> {
        let path = self.directory.join("root").join(path.trim_start_matches('/'));
        Ok(fs::read_to_string(&path).with_context(|| path.display().to_string())?.trim().to_owned())
    }

    /// Fails unless it has no capability, cannot gain any, and has a system call filter; returns the values.
    pub fn has_no_privileges(&self) -> Result<String> {
        let status = fs::read_to_string(self.directory.join("status"))?;
        let mut seen = Vec::new();
        for (field, wanted) in [
            ("CapInh", "0000000000000000"),
            ("CapPrm", "0000000000000000"),
            ("CapEff", "0000000000000000"),
            ("CapBnd", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
        ] {
            let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            let value = line.with_context(|| format!("no {field} in its status"))?.trim();
            ensure!(value == wanted, "{field} is {value} instead of {wanted}");
            seen.push(format!("{field} {}", value.trim_start_matches("000000000000000")));
        }
        Ok(seen.join(", "))
    }

    /// Fails if an unknown mount is writable, or if `granted` is not; returns the writable ones.
    pub fn writes_only(&self, granted: &[&str]) -> Result<Vec<String>> {
        let mounts = fs::read_to_string(self.directory.join("mountinfo"))?;
        let mut writable = BTreeSet::new();
        for line in mounts.lines() {
            let mount_point = line.split(' ').nth(4).context("a mount without a mount point")?.replace("\\040", " ");
            let path = self.directory.join("root").join(mount_point.trim_start_matches('/'));
            // Another mount may cover it or its parent; only the visible mount counts.
            match statvfs(&path) {
                Ok(found) if found.flags().contains(FsFlags::ST_RDONLY) => {}
                Ok(_) => drop(writable.insert(mount_point)),
                // Hidden below another mount.
                Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => {}
                Err(error) => return Err(error).context(mount_point),
            }
        }
        let known = |path: &str| KNOWN.iter().any(|(known, _)| *known == path);
        let found: Vec<&str> = writable.iter().map(String::as_str).filter(|path| !known(path)).collect();
        ensure!(found == granted, "it can write to {found:?} instead of {granted:?}");
        ensure!(!writable.contains("/") && Path::new(&self.directory).exists(), "the process has exited");
        let why = |path: &String| KNOWN.iter().find(|(known, _)| known == path).map_or("granted", |(_, why)| *why);
        Ok(writable.iter().map(|path| format!("{path} ({})", why(path))).collect())
    }
}
