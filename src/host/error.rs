//! Why the host could not be read or changed.

use std::time::Duration;

use crate::model::{Fault, PinnedImage, Reason, printable};

/// Why the host could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file of the kernel's or the system's.
    #[error("cannot read {what}: {source}")]
    Read {
        /// Which.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The bus or the daemon behind it does not answer.
    #[error("{what} does not answer: {why}; see `systemctl status {unit}` and `journalctl -u {unit}`")]
    Call {
        /// The call.
        what: &'static str,
        /// The unit to look at.
        unit: &'static str,
        /// The bus's words.
        why: String,
    },
    /// The daemon ends at every call, or does not start.
    #[error("{unit} ends each time it is asked ({tries} times; {why}); see `journalctl -u {}`", unit.trim_end_matches(".service"))]
    Dies {
        /// Its unit.
        unit: &'static str,
        /// How often it was asked.
        tries: u32,
        /// The bus's words.
        why: String,
    },
    /// The daemon refuses us.
    #[error("{what} is refused: {why}; the agent must run as uid 0 in its own unit")]
    Denied {
        /// The call.
        what: &'static str,
        /// The daemon's words.
        why: String,
    },
    /// The daemon answered something unexpected.
    #[error("{what} answered something unexpected: {why}")]
    Confused {
        /// The call.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Not an ostree system.
    #[error(
        "this host is not image-mode (no ostree deployment is booted), so the agent has nothing to do; `systemctl disable --now rebase-agent` turns it off"
    )]
    NotImageMode,
    /// An image kept without ostree.
    #[error(
        "the host was booted from a composefs-native image, which rpm-ostree cannot change and this agent does not \
         follow yet; install the node with bootc's ostree backend"
    )]
    Composefs,
    /// bootc does not manage what is booted.
    #[error(
        "bootc says that it does not manage what is booted; `bootc status` shows it. Install the node from a bootc \
         image, or use `--backend rpm-ostree`"
    )]
    NotBootc,
    /// No host tool.
    #[error("nothing here can stage an image: {0}")]
    NoBackend(&'static str),
    /// Somebody else's transaction.
    #[error("the host is busy: {0}")]
    Busy(String),
    /// The transaction failed.
    #[error("{what} failed: {why}")]
    Transaction {
        /// Which.
        what: &'static str,
        /// The class of the failure.
        reason: Reason,
        /// The daemon's words.
        why: String,
    },
    /// `bootc switch` failed; it says why in its journal only.
    #[error("`bootc switch` ended with `{result}`; see `journalctl -u '{unit}'`")]
    Switch {
        /// Its unit.
        unit: String,
        /// systemd's word and the exit code.
        result: String,
        /// The class of the failure.
        reason: Reason,
    },
    /// The image's name does not fit into the name of the unit that would switch to it.
    #[error(
        "{image} makes a unit name of {length} characters and systemd takes {longest}; push the image under a shorter \
         name, with fewer dashes (each takes four)"
    )]
    NameTooLong {
        /// The image.
        image: PinnedImage,
        /// How long the name would be.
        length: usize,
        /// How long it may be.
        longest: usize,
    },
    /// bootc does not change kernel arguments.
    #[error("bootc cannot change kernel arguments: let the image {0} in `/usr/lib/bootc/kargs.d` and build it again")]
    KernelArguments(String),
    /// We, or any local user, cancelled the transaction.
    #[error("{0} was cancelled")]
    Cancelled(&'static str),
    /// The daemon went away before it told the outcome.
    #[error("rpm-ostreed went away during {0}; the outcome is read anew")]
    Vanished(&'static str),
    /// Success was told and is not there.
    #[error("{what} ended well, but {why}")]
    NoEffect {
        /// Which.
        what: &'static str,
        /// What is missing.
        why: String,
    },
    /// No answer, or no progress.
    #[error("{what} took longer than {seconds} s")]
    Deadline {
        /// What.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// A unit that was started and failed.
    #[error("{unit} ended with `{result}`; see `journalctl -u {unit}`")]
    Unit {
        /// Which.
        unit: String,
        /// The job's result.
        result: String,
    },
    /// logind does not reboot.
    #[error("logind refused the reboot: {0}; see `systemd-inhibit --list`")]
    Reboot(String),
}

impl HostError {
    /// The stable word.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Read { .. } | Self::Call { .. } | Self::Dies { .. } | Self::Vanished(_) => Reason::HostUnreachable,
            Self::Denied { .. } => Reason::HostDenied,
            Self::Confused { .. } | Self::NoEffect { .. } => Reason::HostConfused,
            Self::NotImageMode => Reason::HostNotImageMode,
            Self::Busy(_) => Reason::HostBusy,
            Self::Composefs | Self::NotBootc | Self::NoBackend(_) => Reason::HostUnsupported,
            Self::Transaction { reason, .. } | Self::Switch { reason, .. } => *reason,
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

    pub(super) fn confused(what: &'static str, why: impl std::fmt::Display) -> Self {
        Self::Confused { what, why: printable(&why.to_string(), 300) }
    }
}

impl From<&HostError> for Fault {
    fn from(error: &HostError) -> Self {
        Self { reason: error.reason(), message: printable(&error.to_string(), 900) }
    }
}

/// A D-Bus error, told apart as far as its name goes.
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
        // What is left is about bytes that are no answer to what was asked.
        _ => HostError::Confused { what, why },
    }
}
