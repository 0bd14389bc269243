//! The guest's disk between boots: the files that a boot loader would read, read by debugfs, without root and mounts.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use support::tools;

/// One Boot Loader Specification entry.
#[derive(Clone, Debug)]
pub struct Entry {
    /// `version`: the entry with the highest one boots.
    pub version: u64,
    /// `linux`, below /boot.
    pub linux: String,
    /// `initrd`, below /boot.
    pub initrd: String,
    /// Kernel arguments.
    pub options: String,
}

/// A raw image of one ext4 file system.
#[derive(Clone, Debug)]
pub struct Disk(PathBuf);

impl Disk {
    /// A writable copy of `original`.
    pub fn copy(original: &Path, to: &Path) -> Result<Self> {
        run(Command::new("cp").arg("--sparse=always").arg("--reflink=auto").arg(original).arg(to))?;
        Ok(Self(to.to_owned()))
    }

    /// The disk at that path, read-only.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Replays the journal of a file system whose power was cut; debugfs does not.
    pub fn recover(&self) -> Result<()> {
        let output = Command::new(program("e2fsck")?).arg("-p").arg(&self.0).output().context("running e2fsck")?;
        // Exit code 1: errors were corrected.
        ensure!(
            matches!(output.status.code(), Some(0 | 1)),
            "e2fsck ends with {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// The entry that boots next.
    pub fn entry(&self) -> Result<Entry> {
        let mut entries = self.entries()?;
        entries.sort_by_key(|entry| entry.version);
        entries.pop().context("no boot loader entry on the disk")
    }

    /// All entries.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        const DIRECTORY: &str = "/boot/loader/entries";
        let listing = self.debugfs(&format!("ls -p {DIRECTORY}"))?;
        // /inode/mode/uid/gid/name/size/
        let names = listing.lines().filter_map(|line| line.split('/').nth(5)).filter(|name| name.ends_with(".conf"));
        names.map(|name| parse(&self.debugfs(&format!("cat {DIRECTORY}/{name}"))?)).collect()
    }

    /// Copies a file or a directory out of the file system, if it is there.
    pub fn extract(&self, from: &str, to: &Path) -> Result<()> {
        // debugfs reports success for a missing file, too.
        match std::fs::remove_file(to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).context("an earlier copy"),
            _ => {}
        }
        self.debugfs(&format!("dump {from} {}", to.display()))?;
        ensure!(to.exists(), "{from} is not on the disk");
        Ok(())
    }

    /// Copies the journal's files out.
    pub fn extract_journal(&self, to: &Path) -> Result<()> {
        self.debugfs(&format!("rdump /ostree/deploy/default/var/log/journal {}", to.display()))?;
        Ok(())
    }

    fn debugfs(&self, request: &str) -> Result<String> {
        let output =
            Command::new(program("debugfs")?).args(["-R", request]).arg(&self.0).output().context("running debugfs")?;
        if !output.status.success() {
            bail!("debugfs {request}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn parse(text: &str) -> Result<Entry> {
    let field = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
            .map(|value| value.trim().to_owned())
            .with_context(|| format!("a boot loader entry without {key}: {text}"))
    };
    Ok(Entry {
        version: field("version")?.parse().context("version")?,
        linux: field("linux")?,
        initrd: field("initrd")?,
        options: field("options")?,
    })
}

/// The kernel's view of a boot loader entry's `options`. GRUB and zipl remove quotes, and put some around a whole
/// argument with a space in it.
#[must_use]
pub fn as_boot_loaders_pass(options: &str) -> String {
    let (mut arguments, mut argument, mut is_quoted) = (Vec::new(), String::new(), false);
    for character in options.chars().chain([' ']) {
        match character {
            '"' => is_quoted = !is_quoted,
            ' ' if !is_quoted => match std::mem::take(&mut argument) {
                empty if empty.is_empty() => {}
                spaced if spaced.contains(' ') => arguments.push(format!("\"{spaced}\"")),
                plain => arguments.push(plain),
            },
            other => argument.push(other),
        }
    }
    arguments.join(" ")
}

/// Debian keeps these programs outside of users' PATH.
fn program(name: &str) -> Result<PathBuf> {
    tools::on_path(name)
        .or_else(|| Some(Path::new("/usr/sbin").join(name)).filter(|path| path.exists()))
        .with_context(|| format!("no {name}: install e2fsprogs"))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("running {command:?}"))?;
    ensure!(status.success(), "{command:?} ends with {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read() {
        let entry = parse(
            "title Debian\nversion 2\noptions root=/dev/vda rw ostree=/ostree/boot.1/default/ab/0\n\
             linux /ostree/default-ab/vmlinuz-6.12\ninitrd /ostree/default-ab/initramfs-6.12.img\n",
        )
        .unwrap();
        assert_eq!((entry.version, entry.linux.as_str()), (2, "/ostree/default-ab/vmlinuz-6.12"));
        assert!(entry.options.starts_with("root=/dev/vda rw ostree="));
        assert!(parse("title x\nversion 1\n").is_err());
    }

    #[test]
    fn boot_loaders_take_quotes_away_or_move_them() {
        for (options, passed) in [
            ("ro cgroup_no_v1=\"all\"  psi=0", "ro cgroup_no_v1=all psi=0"),
            ("bar=\"hello world\" x", "\"bar=hello world\" x"),
            ("", ""),
        ] {
            assert_eq!(as_boot_loaders_pass(options), passed);
        }
    }
}
