//! The journal: structured fields and stable message ids when standard error is the journal, plain text otherwise.

use std::io;
use std::os::fd::AsFd;

use tracing::Level;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format;
use tracing_subscriber::prelude::*;

/// `MESSAGE_ID`s; each is explained in the journal catalog, so none ever changes its meaning.
pub mod id {
    /// The agent started.
    pub const STARTED: &str = "4d6ba9b1f6f94b0a9e4c6a7d2f0c1e35";
    /// The agent stops.
    pub const STOPPING: &str = "0c9a2f4be7d84e6f8f1f3c5d7a90b264";
    /// Another rule applies now.
    pub const DECIDED: &str = "b3f1d2c47a5e4f0c9b8e6d1a2c3f4e57";
    /// The node is Degraded or Unreconcilable now.
    pub const REFUSED: &str = "7e2c4a9d1b3f4856a0c9e8d7f6b5a413";
    /// An image's signature was verified.
    pub const VERIFIED: &str = "e5a8c1d03f7b4926b4d7f0a1c2e3d486";
    /// An action failed and will be tried again.
    pub const FAILED: &str = "19d4b7e2c5f04a83966e1f0d8c7b2a35";
    /// The image is staged.
    pub const STAGED: &str = "5c0e7f9a2d4b4163885f3a6b9d1c7e20";
    /// The Node's annotations were changed.
    pub const REPORTED: &str = "a1f3c5e7092b4d6f8a0c2e4f61738594";
    /// The reboot was accepted.
    pub const REBOOTING: &str = "d8e6f4a2c0b94715936e5d7c8b1a0f42";
    /// The node runs what is desired.
    pub const DONE: &str = "62b0d9f8e7c6453a94b1a2d3c4e5f607";

    /// The node runs what is desired, and its policy refuses the image.
    pub const UNTRUSTED: &str = "f0a6d3b81c2e4795a8b4c7d9e1f20356";

    /// All of them with their names, for the catalog test.
    pub const ALL: &[(&str, &str)] = &[
        ("STARTED", STARTED),
        ("STOPPING", STOPPING),
        ("DECIDED", DECIDED),
        ("REFUSED", REFUSED),
        ("VERIFIED", VERIFIED),
        ("FAILED", FAILED),
        ("STAGED", STAGED),
        ("REPORTED", REPORTED),
        ("REBOOTING", REBOOTING),
        ("DONE", DONE),
        ("UNTRUSTED", UNTRUSTED),
    ];
}

/// Sets up logging for the whole process.
///
/// # Errors
/// When the journal's socket is gone.
pub fn init(level: Level) -> io::Result<()> {
    let registry = tracing_subscriber::registry().with(LevelFilter::from_level(level));
    if stderr_is_journal() {
        registry.with(tracing_journald::layer()?.with_field_prefix(None)).init();
    } else {
        // A person reads this: the sentence alone, without the fields that repeat it for programs.
        let fields = format::debug_fn(|writer, field, value| match field.name() {
            "message" => write!(writer, "{value:?}"),
            _ => Ok(()),
        });
        let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
        registry.with(layer.without_time().with_target(false).fmt_fields(fields)).init();
    }
    Ok(())
}

/// systemd sets `JOURNAL_STREAM` to device and inode of the stream it connected; a redirected one differs.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    nix::sys::stat::fstat(io::stderr().as_fd()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::id;

    #[test]
    fn message_ids_are_unique_128_bit_words() {
        let mut ids: Vec<_> = id::ALL.iter().map(|(_, id)| *id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), id::ALL.len());
        for id in ids {
            assert!(id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')), "{id}");
        }
    }
}
