//! Neighbour 3, the OS: deployments and transactions through rpm-ostree, units through systemd, the reboot through
//! logind, boot facts from the kernel. The only place that speaks D-Bus.
//!
//! Every operation makes its own connection to the system bus and drops it at its end. That registers and
//! unregisters us with rpm-ostreed, lets it exit when idle, takes back a transaction whose reply was lost, and leaves
//! nothing that could go stale.

pub mod boot;
mod login;
mod rpm_ostree;
mod systemd;

use std::time::Duration;

use tokio::sync::watch;
use zbus::proxy::CacheProperties;
use zbus::{Connection, Proxy};

use crate::model::{Digest, Fault, HostFacts, ImageFacts, MachineFacts, PinnedImage, Reason, printable};
use crate::registry::{Verified, reference};
use boot::Root;

/// Connecting to a bus or a peer that exists takes milliseconds.
const CONNECT: Duration = Duration::from_secs(10);
/// Reply to an ordinary call. zbus has no limit of its own.
const CALL: Duration = Duration::from_secs(25);

/// Title of our transactions before the digest: how a restarted agent knows its own.
const TITLE: &str = "rebase-agent ";

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
    #[error("{what} does not answer: {why}; see `systemctl status {unit}`")]
    Call {
        /// The call.
        what: &'static str,
        /// The unit to look at.
        unit: &'static str,
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
    #[error("the host is not booted from an ostree deployment, so there is nothing to rebase")]
    NotImageMode,
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
        unit: &'static str,
        /// The job's result.
        result: String,
    },
    /// logind does not reboot.
    #[error("logind refused the reboot: {0}; see `systemd-inhibit --list`")]
    Reboot(String),
}

impl HostError {
    /// Whether the same call may succeed later without anybody changing anything.
    #[must_use]
    pub fn retryable(&self) -> bool {
        !matches!(self, Self::Denied { .. } | Self::NotImageMode)
    }

    /// The stable word.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Read { .. } | Self::Call { .. } | Self::Denied { .. } | Self::Vanished(_) => Reason::HostUnreachable,
            Self::Confused { .. } | Self::NoEffect { .. } => Reason::HostConfused,
            Self::NotImageMode => Reason::HostNotImageMode,
            Self::Busy(_) => Reason::HostBusy,
            Self::Transaction { reason, .. } => *reason,
            Self::Cancelled(_) => Reason::Cancelled,
            Self::Deadline { .. } => Reason::DeadlineExceeded,
            Self::Unit { .. } => Reason::UnitFailed,
            Self::Reboot(_) => Reason::RebootRefused,
        }
    }

    fn confused(what: &'static str, why: impl std::fmt::Display) -> Self {
        Self::Confused { what, why: printable(&why.to_string(), 300) }
    }
}

impl From<&HostError> for Fault {
    fn from(error: &HostError) -> Self {
        Self { reason: error.reason(), message: printable(&error.to_string(), 900), retryable: error.retryable() }
    }
}

/// Set to true when what is running is no longer wanted.
pub type Cancel = watch::Receiver<bool>;

/// Ends when cancellation is asked for; never, if nobody can ask any more.
async fn cancelled(cancel: &mut Cancel) {
    if cancel.wait_for(|asked| *asked).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Where progress is told: one line, made printable.
pub type Progress = dyn Fn(String) + Send + Sync;

/// The host.
#[derive(Clone, Debug)]
pub struct Host {
    root: Root,
}

impl Host {
    /// `root` is `/` in production; the bus is the system bus.
    #[must_use]
    pub fn new(root: Root) -> Self {
        Self { root }
    }

    /// The file system it looks at.
    #[must_use]
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Reads deployments and transaction. Wakes rpm-ostreed.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn read(&self) -> Result<HostFacts, HostError> {
        if !self.root.is_image_mode() {
            return Err(HostError::NotImageMode);
        }
        rpm_ostree::read(&self.root).await
    }

    /// Reads what the kernel, systemd and logind know. Wakes nobody.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn read_machine(&self) -> Result<MachineFacts, HostError> {
        let file = |what| move |source| HostError::Read { what, source };
        let bus = system_bus(CALL).await?;
        let units = systemd::states(&bus, [FINALIZER, KUBELET, BOOTLOADER_UPDATE, BOOT_COMPLETE]).await?;
        let [finalizer, kubelet, bootloader_update, boot_complete] = units;
        let login = login::read(&bus).await?;
        close(bus).await;
        Ok(MachineFacts {
            boot_id: self.root.boot_id().map_err(file("/proc/sys/kernel/random/boot_id"))?,
            uptime: self.root.uptime().map_err(file("/proc/uptime"))?,
            architecture: boot::architecture().map_err(file("uname"))?,
            command_line: self.root.command_line().map_err(file("/proc/cmdline"))?,
            boot_free: self.root.boot_free(),
            boot_needed: self.root.boot_needed(),
            finalizer,
            kubelet,
            bootloader_update,
            finalize_failed: boot_complete == crate::model::UnitState::Failed,
            inhibitors: login.inhibitors,
            shutting_down: login.shutting_down,
            first_boot: self.root.first_boot(),
        })
    }

    /// Stages `image`, or attaches to our own transaction that does. Ends well only when the deployments say so.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn stage(
        &self,
        image: &Verified<PinnedImage>,
        cancel: &mut Cancel,
        progress: &Progress,
    ) -> Result<(), HostError> {
        rpm_ostree::stage(&self.root, image, cancel, progress).await
    }

    /// Removes the staged deployment if it still is `checksum`.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn drop_staged(&self, checksum: &str, cancel: &mut Cancel) -> Result<(), HostError> {
        rpm_ostree::drop_staged(&self.root, checksum, cancel).await
    }

    /// Cancels a transaction that an earlier run of the agent started.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn cancel_transaction(&self) -> Result<(), HostError> {
        rpm_ostree::cancel_ours().await
    }

    /// Changes the staged deployment's kernel arguments.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn set_kernel_arguments(
        &self,
        append: &[String],
        delete: &[String],
        cancel: &mut Cancel,
    ) -> Result<(), HostError> {
        rpm_ostree::set_kernel_arguments(&self.root, append, delete, cancel).await
    }

    /// Starts the unit whose stop finalizes the staged deployment.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn start_finalizer(&self) -> Result<(), HostError> {
        systemd::start(FINALIZER).await
    }

    /// Runs the bootloader update.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn update_bootloader(&self) -> Result<(), HostError> {
        systemd::start(BOOTLOADER_UPDATE).await
    }

    /// Tells logged-in users and asks for the reboot. Success means that it was accepted, no more.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn reboot(&self, message: &str) -> Result<(), HostError> {
        login::reboot(message).await
    }

    /// The running service's `StatusText` and `ActiveState`, for the commands beside it.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn service_status(&self) -> Result<(String, String), HostError> {
        systemd::status_text("rebase-agent.service").await
    }
}

const FINALIZER: &str = "ostree-finalize-staged.service";
const KUBELET: &str = "kubelet.service";
const BOOTLOADER_UPDATE: &str = "bootloader-update.service";
const BOOT_COMPLETE: &str = "ostree-boot-complete.service";

/// Whether a deployment is `image`: by canonical reference, by manifest digest, or by the instance that the verified
/// index selects. Never by spelling alone. Pure.
#[must_use]
pub fn is_image(deployment: &crate::model::Deployment, image: &PinnedImage, facts: Option<&ImageFacts>) -> bool {
    let referenced = deployment.reference.as_deref().and_then(|text| reference::parse(text).ok());
    let recorded = deployment.digest.as_ref();
    referenced.is_some_and(|pinned| pinned == *image)
        || recorded == Some(image.digest())
        || facts.is_some_and(|facts| facts.image == *image && recorded == Some(&facts.instance))
}

/// The digest in a transaction title of ours. Pure.
fn digest_in_title(title: &str) -> Option<Digest> {
    Digest::parse(title.strip_prefix(TITLE)?)
}

/// A connection of its own, whose every call is limited to `limit`.
async fn system_bus(limit: Duration) -> Result<Connection, HostError> {
    connect(zbus::connection::Builder::system().method_timeout(limit), "the system bus", "dbus.socket").await
}

async fn connect(
    builder: zbus::connection::Builder<'_>,
    what: &'static str,
    unit: &'static str,
) -> Result<Connection, HostError> {
    match tokio::time::timeout(CONNECT, builder.build()).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(HostError::Call { what, unit, why: printable(&error.to_string(), 300) }),
        Err(_) => Err(HostError::Deadline { what, seconds: CONNECT.as_secs() }),
    }
}

/// A proxy without a property cache: cached properties lag behind the daemon's other answers.
async fn proxy(
    bus: &Connection,
    destination: &'static str,
    path: &str,
    interface: &'static str,
) -> Result<Proxy<'static>, zbus::Error> {
    zbus::proxy::Builder::<Proxy<'static>>::new(bus)
        .destination(destination)
        .path(path.to_owned())
        .interface(interface)
        .cache_properties(CacheProperties::No)
        .build()
        .await
}

async fn close(connection: Connection) {
    // The other end may have closed first; there is nothing to do about either.
    if let Err(error) = connection.close().await {
        tracing::trace!("closing a bus connection: {error}");
    }
}

/// A D-Bus error, told apart as far as its name goes.
fn call_failed(what: &'static str, unit: &'static str, limit: Duration, error: &zbus::Error) -> HostError {
    let why = printable(&error.to_string(), 900);
    match error {
        zbus::Error::InputOutput(io) if io.kind() == std::io::ErrorKind::TimedOut => {
            HostError::Deadline { what, seconds: limit.as_secs() }
        }
        zbus::Error::FDO(fdo) if matches!(**fdo, zbus::fdo::Error::AccessDenied(_)) => HostError::Denied { what, why },
        zbus::Error::MethodError(name, text, _) => {
            let text = printable(text.as_deref().unwrap_or(name.as_str()), 900);
            // GIO errors have no registered D-Bus names; 26 is G_IO_ERROR_BUSY.
            if name.as_str().starts_with("org.gtk.GDBus.UnmappedGError.") && name.as_str().ends_with(".Code26") {
                HostError::Busy(text)
            } else {
                HostError::Call { what, unit, why: text }
            }
        }
        zbus::Error::IncorrectType | zbus::Error::SignatureMismatch(..) => HostError::Confused { what, why },
        _ => HostError::Call { what, unit, why },
    }
}
