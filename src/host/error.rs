//! Errors of reading or changing the host.

use std::time::Duration;

use crate::model::{Fault, PinnedImage, Reason, printable};

/// An error of reading or changing the host.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message is its documentation")]
pub enum HostError {
    #[error("cannot read {what}: {source}")]
    Read { what: &'static str, source: std::io::Error },
    #[error("{what} does not answer: {why}; see `systemctl status {unit}` and `journalctl -u {unit}`")]
    Call { what: &'static str, unit: &'static str, why: String },
    /// The daemon exits at every call, or does not start.
    #[error("{unit} exits at every call ({tries} times; {why}); see `journalctl -u {}`", unit.trim_end_matches(".service"))]
    Dies { unit: &'static str, tries: u32, why: String },
    #[error("{what} is refused: {why}; the agent must run as uid 0 in its own unit")]
    Denied { what: &'static str, why: String },
    #[error("{what} returned an unexpected answer: {why}")]
    Confused { what: &'static str, why: String },
    #[error(
        "this host is not image-mode (no ostree deployment is booted), so the agent has nothing to do; `systemctl disable --now rebase-agent` turns it off"
    )]
    NotImageMode,
    #[error(
        "the host was booted from a composefs-native image, which rpm-ostree cannot change and this agent does not \
         follow yet; install the node with bootc's ostree backend"
    )]
    Composefs,
    #[error(
        "bootc reports that it does not manage the booted deployment; `bootc status` shows it. Install the node from a \
         bootc image, or use `--backend rpm-ostree`"
    )]
    NotBootc,
    #[error("this host has no tool to stage an image: {0}")]
    NoBackend(&'static str),
    /// A transaction or lock of another program.
    #[error("the host is busy: {0}")]
    Busy(String),
    #[error("{what} failed: {why}")]
    Transaction { what: &'static str, reason: Reason, why: String },
    /// The command logs the cause to its journal only; `result` is systemd's result word and the exit code.
    #[error("{what} ended with `{result}`; see `journalctl -u '{unit}'`")]
    Command { what: &'static str, unit: String, result: String, reason: Reason },
    #[error(
        "the name of the unit that switches to {image} would have {length} characters and systemd accepts {longest}; \
         push the image under a shorter name, with fewer dashes (each takes four)"
    )]
    NameTooLong { image: PinnedImage, length: usize, longest: usize },
    #[error("bootc cannot change kernel arguments: let the image {0} in `/usr/lib/bootc/kargs.d` and build it again")]
    KernelArguments(String),
    /// Cancelled by the agent or by a local user.
    #[error("{0} was cancelled")]
    Cancelled(&'static str),
    #[error("rpm-ostreed exited during {0}; the agent reads the deployments again")]
    Vanished(&'static str),
    /// The tool reported success but the deployments did not change.
    #[error("{what} had no effect: {why}")]
    NoEffect { what: &'static str, why: String },
    #[error("{what} took longer than {seconds} s")]
    Deadline { what: &'static str, seconds: u64 },
    #[error("{unit} ended with `{result}`; see `journalctl -u {unit}`")]
    Unit { unit: String, result: String },
    #[error("logind refused the reboot: {0}; see `systemd-inhibit --list`")]
    Reboot(String),
}

impl HostError {
    /// The reason word of this error.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Read { .. } | Self::Call { .. } | Self::Dies { .. } | Self::Vanished(_) => Reason::HostUnreachable,
            Self::Denied { .. } => Reason::HostDenied,
            Self::Confused { .. } | Self::NoEffect { .. } => Reason::HostConfused,
            Self::NotImageMode => Reason::HostNotImageMode,
            Self::Busy(_) => Reason::HostBusy,
            Self::Composefs | Self::NotBootc | Self::NoBackend(_) => Reason::HostUnsupported,
            Self::Transaction { reason, .. } | Self::Command { reason, .. } => *reason,
            Self::NameTooLong { .. } => Reason::ImageNameTooLong,
            Self::KernelArguments(_) => Reason::KernelArgumentsUnsupported,
            Self::Cancelled(_) => Reason::Cancelled,
            Self::Deadline { .. } => Reason::DeadlineExceeded,
            Self::Unit { .. } => Reason::UnitFailed,
            Self::Reboot(_) => Reason::RebootRefused,
        }
    }

    pub(super) fn deadline(what: &'static str, limit: Duration) -> Self {
        Self::Deadline { what, seconds: limit.as_secs() }
    }

    pub(super) fn no_effect(what: &'static str, why: impl Into<String>) -> Self {
        Self::NoEffect { what, why: why.into() }
    }

    pub(super) fn confused(what: &'static str, why: impl std::fmt::Display) -> Self {
        Self::Confused { what, why: printable(&why.to_string(), 300) }
    }
}

impl From<&HostError> for Fault {
    fn from(error: &HostError) -> Self {
        Self { reason: error.reason(), message: printable(&error.to_string(), 900) }
    }
}

/// Classifies a D-Bus error by its name.
pub(super) fn call_failed(what: &'static str, unit: &'static str, limit: Duration, error: &zbus::Error) -> HostError {
    use zbus::fdo::Error as Fdo;
    let why = printable(&error.to_string(), 900);
    match error {
        zbus::Error::InputOutput(io) if io.kind() == std::io::ErrorKind::TimedOut => HostError::deadline(what, limit),
        zbus::Error::FDO(fdo) => match &**fdo {
            Fdo::AccessDenied(_) | Fdo::InteractiveAuthorizationRequired(_) => HostError::Denied { what, why },
            _ => HostError::Call { what, unit, why },
        },
        zbus::Error::MethodError(name, text, _) => {
            let text = printable(text.as_deref().unwrap_or(name.as_str()), 900);
            // GIO errors have no registered D-Bus names; 26 is G_IO_ERROR_BUSY.
            if name.as_str().starts_with("org.gtk.GDBus.UnmappedGError.") && name.as_str().ends_with(".Code26") {
                HostError::Busy(text)
            } else {
                HostError::Call { what, unit, why: text }
            }
        }
        zbus::Error::InputOutput(_)
        | zbus::Error::Connection(..)
        | zbus::Error::Handshake(_)
        | zbus::Error::Address(_) => HostError::Call { what, unit, why },
        // The rest are answers that do not match the call.
        _ => HostError::Confused { what, why },
    }
}
