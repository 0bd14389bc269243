//! Bounded reads of files, and stamps that identify a file without reading it, to notice a change.

use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Device, inode, time of change in seconds and nanoseconds, size in bytes. The time of modification is not used: ostree
/// sets it to the same value for all files, and every writer of a file can set it.
type Identity = (u64, u64, i64, i64, u64);

/// Identifies the file at a path: the name itself, which may be a symbolic link, and the file that it leads to. Each is
/// `None` if it does not exist or is not accessible. Opens no file, so a pipe does not block it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    name: Option<Identity>,
    file: Option<Identity>,
}

impl Stamp {
    /// The current stamp of `path`.
    #[must_use]
    pub fn of(path: &Path) -> Self {
        let identity = |metadata: Metadata| {
            (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec(), metadata.size())
        };
        let name = std::fs::symlink_metadata(path).ok().map(identity);
        Self { name, file: std::fs::metadata(path).ok().map(identity) }
    }
}

/// An error of a file's content.
pub fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Reads a regular file of at most `limit` bytes; a longer file is an error.
///
/// # Errors
/// Errors of the file system, and `InvalidData` for a file that is longer or not regular.
pub fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    // Opening a pipe would block.
    if !std::fs::metadata(path)?.is_file() {
        return Err(invalid("not a regular file"));
    }
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit {
        return Err(invalid(format!("longer than {limit} bytes")));
    }
    Ok(bytes)
}

/// Reads a file of a deployment, whose content is the image's. Follows no symbolic link, because an image may contain
/// links to files outside of it.
pub fn read_beneath(directory: &Path, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut at = directory.to_owned();
    for component in path.components() {
        at.push(component);
        if std::fs::symlink_metadata(&at)?.is_symlink() {
            let why = format!("{} is a symbolic link, which the agent does not follow inside an image", at.display());
            return Err(invalid(why));
        }
    }
    read_bounded(&at, limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_differs_even_with_its_old_time_and_size() {
        let directory = tempfile::tempdir().unwrap();
        let (path, new) = (directory.path().join("key"), directory.path().join("new"));
        std::fs::write(&path, "one").unwrap();
        let before = Stamp::of(&path);
        assert_eq!(before, Stamp::of(&path));
        let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
        std::fs::write(&new, "two").unwrap();
        std::fs::File::open(&new).unwrap().set_modified(modified).unwrap();
        std::fs::rename(&new, &path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), modified);
        assert_ne!(before, Stamp::of(&path));
        let replaced = Stamp::of(&path);
        std::fs::remove_file(&path).unwrap();
        assert_ne!(replaced, Stamp::of(&path));
    }

    #[test]
    fn a_link_that_leads_elsewhere_differs_and_so_does_what_it_leads_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let link = |to: &str| {
            let _ = std::fs::remove_file(path("link"));
            std::os::unix::fs::symlink(path(to), path("link")).unwrap();
        };
        std::fs::write(path("a"), "a").unwrap();
        std::fs::write(path("b"), "b").unwrap();
        link("a");
        let a = Stamp::of(&path("link"));
        std::fs::write(path("a"), "changed").unwrap();
        assert_ne!(a, Stamp::of(&path("link")));
        let a = Stamp::of(&path("link"));
        link("b");
        assert_ne!(a, Stamp::of(&path("link")));
        link("nothing");
        let nothing = Stamp::of(&path("link"));
        assert!(nothing.name.is_some() && nothing.file.is_none());
        // Replacing a directory on the path changes the file at its end.
        std::fs::create_dir(path("one")).unwrap();
        std::fs::create_dir(path("two")).unwrap();
        std::fs::write(path("one/key"), "a").unwrap();
        std::fs::write(path("two/key"), "a").unwrap();
        link("one");
        let one = Stamp::of(&path("link/key"));
        link("two");
        assert_ne!(one, Stamp::of(&path("link/key")));
    }

    #[test]
    fn a_pipe_does_not_block() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(Stamp::of(&path), Stamp::of(&path));
    }
}
