//! The OS: deployments and transactions through rpm-ostree or bootc, units through systemd, the reboot through logind,
//! boot facts from the kernel. Only this module uses D-Bus.
//!
//! Every operation opens its own connection to the system bus and closes it when it ends. rpm-ostreed counts the
//! connection as a client: closing it lets the daemon exit when idle and discards a transaction whose reply was lost.
//! No connection can go stale.

pub mod boot;
mod bootc;
mod choose;
mod dbus;
mod error;
pub mod leftovers;
mod logind;
mod rpm_ostree;
mod staged;
mod systemd;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OnceCell, watch};
use zbus::Connection;

use crate::model::{Backend, Deployment, Digest, HostFacts, MachineFacts, printable};
use crate::trust::VerifiedImage;
use boot::Root;
pub use choose::Chosen;
use dbus::close;
pub use error::HostError;
use error::call_failed;

/// Time limits for the host's daemons. zbus has none of its own.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// Connecting to a bus or a peer, which takes milliseconds where it exists.
    pub connect: Duration,
    /// An ordinary call.
    pub call: Duration,
    /// A call to rpm-ostreed on the bus. The daemon loads the sysroot before it claims its name (`TimeoutStartSec=5m`),
    /// and its own client waits as long.
    pub reply: Duration,
    /// Starting a unit. Starting the finalizer does nothing; the bootloader update copies some megabytes.
    pub job: Duration,
    /// Longest silence of a running transaction. A container pull reports progress per layer, and a layer may have
    /// gigabytes.
    pub stall: Duration,
    /// Interval of the checks on a running unit, in case the signal of its end is lost.
    pub look: Duration,
    /// How long the sysroot lock may be held before it counts as busy: every `bootc status` takes it for a moment.
    pub lock: Duration,
    /// `bootc status`, which may wait while another program holds the sysroot lock.
    pub status: Duration,
    /// A whole transaction. The unit of `bootc switch` has its own, shorter limit.
    pub whole: Duration,
    /// The end of a cancelled transaction.
    pub cancel: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            call: Duration::from_secs(25),
            reply: Duration::from_secs(300),
            job: Duration::from_secs(120),
            stall: Duration::from_secs(30 * 60),
            look: Duration::from_secs(60),
            lock: Duration::from_secs(5),
            status: Duration::from_secs(60),
            whole: Duration::from_secs(3 * 60 * 60),
            cancel: Duration::from_secs(60),
        }
    }
}

/// Prefix of the title of our transactions, followed by the digest. A restarted agent recognises its own by it.
const TITLE: &str = "rebase-agent ";

/// Becomes true when the running task must stop.
pub type Cancel = watch::Receiver<bool>;

/// Waits for `work` until `limit` has passed.
async fn within<T>(what: &'static str, limit: Duration, work: impl Future<Output = T>) -> Result<T, HostError> {
    tokio::time::timeout(limit, work).await.map_err(|_| HostError::deadline(what, limit))
}

/// Returns when cancellation is requested; never, if the sender is gone.
async fn cancelled(cancel: &mut Cancel) {
    if cancel.wait_for(|asked| *asked).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Receives each line of progress, made printable.
pub type Progress<'a> = dyn Fn(String) + Send + Sync + 'a;

/// The host.
#[derive(Clone, Debug)]
pub struct Host {
    root: Root,
    bus: Option<String>,
    deadlines: Deadlines,
    backend: Option<Backend>,
    chosen: Arc<OnceCell<Chosen>>,
    /// The last `bootc status`, which must not run while a switch does.
    seen: watch::Sender<Vec<Deployment>>,
}

impl Host {
    /// `root` is `/` in production. `bus` is a D-Bus address; `None` is the system bus.
    #[must_use]
    pub fn new(root: Root, bus: Option<String>) -> Self {
        let (chosen, seen) = (Arc::default(), watch::Sender::default());
        Self { root, bus, deadlines: Deadlines::default(), backend: None, chosen, seen }
    }

    /// Sets the backend; `None` detects it.
    #[must_use]
    pub fn with_backend(self, backend: Option<Backend>) -> Self {
        Self { backend, chosen: Arc::default(), ..self }
    }

    /// Sets the deadlines.
    #[must_use]
    pub fn with_deadlines(self, deadlines: Deadlines) -> Self {
        Self { deadlines, ..self }
    }

    /// The file system that it reads.
    #[must_use]
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// The backend. The first successful detection is kept.
    ///
    /// # Errors
    /// [`HostError::NoBackend`], and errors of the bus or systemd.
    pub async fn backend(&self) -> Result<Chosen, HostError> {
        let choose = async || match self.backend {
            Some(backend) => Ok(Chosen { backend, why: "it is set with --backend" }),
            None => choose::probe(self).await,
        };
        self.chosen.get_or_try_init(choose).await.cloned()
    }

    /// Checks that a backend can change this kind of host.
    ///
    /// # Errors
    /// [`HostError::Composefs`] and [`HostError::NotImageMode`].
    pub fn check_kind(&self) -> Result<(), HostError> {
        match self.root.is_image_mode() {
            true => Ok(()),
            false if self.root.is_composefs_native() => Err(HostError::Composefs),
            false => Err(HostError::NotImageMode),
        }
    }

    /// Reads the deployments and the transaction. Starts rpm-ostreed, or runs `bootc status` once.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn read(&self) -> Result<HostFacts, HostError> {
        self.check_kind()?;
        let mut facts = match self.backend().await?.backend {
            Backend::RpmOstree => self.as_client(async |client| Ok(client.snapshot().await?.facts)).await,
            Backend::Bootc => bootc::read(self).await,
        }?;
        if let Some(booted) = facts.deployments.iter_mut().find(|deployment| deployment.booted) {
            booted.arguments = self.root.boot_entry();
        }
        Ok(facts)
    }

    /// Reads the facts of the kernel, systemd and logind. Starts no daemon.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn read_machine(&self) -> Result<MachineFacts, HostError> {
        let file = |what| move |source| HostError::Read { what, source };
        let units = [FINALIZER, KUBELET, BOOTLOADER_UPDATE, BOOT_COMPLETE];
        let ask =
            async |bus: &Connection| Ok((systemd::states(self, bus, units).await?, logind::read(self, bus).await?));
        let ([finalizer, kubelet, bootloader_update, boot_complete], login) =
            self.on_bus(self.deadlines.call, ask).await?;
        Ok(MachineFacts {
            boot_id: self.root.boot_id().map_err(file("/proc/sys/kernel/random/boot_id"))?,
            uptime: self.root.uptime().map_err(file("/proc/uptime"))?,
            architecture: boot::architecture().map_err(file("uname"))?,
            command_line: self.root.command_line().map_err(file("/proc/cmdline"))?,
            boot_free: self.root.boot_free(),
            boot_needed: self.root.boot_needed(),
            sysroot_free: self.root.sysroot_free(),
            finalizer,
            kubelet,
            bootloader_update,
            finalize_failed: boot_complete == crate::model::UnitState::Failed,
            inhibitors: login.inhibitors,
            shutting_down: login.shutting_down,
            first_boot: self.root.first_boot(),
        })
    }

    /// Pulls `image` into the host's storage without making a deployment, or waits for our own transaction that does.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn fetch(
        &self,
        image: &VerifiedImage,
        cancel: &mut Cancel,
        progress: &Progress<'_>,
    ) -> Result<(), HostError> {
        match self.backend().await?.backend {
            Backend::RpmOstree => self.as_client(async |client| client.fetch(image, cancel, progress).await).await,
            Backend::Bootc => bootc::fetch(self, image, cancel, progress).await,
        }
    }

    /// Stages `image`, locked if the host tool can. Succeeds only if the deployments then show it.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn stage(
        &self,
        image: &VerifiedImage,
        cancel: &mut Cancel,
        progress: &Progress<'_>,
    ) -> Result<(), HostError> {
        match self.backend().await?.backend {
            Backend::RpmOstree => self.as_client(async |client| client.stage(image, cancel, progress).await).await,
            Backend::Bootc => bootc::stage(self, image, cancel, progress).await,
        }
    }

    /// Removes the deployment that boots next, staged or first in boot order, if it still is `checksum` and is not
    /// booted. The rules never call this for bootc, which cannot drop a deployment.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn drop_pending(&self, checksum: &str, cancel: &mut Cancel) -> Result<(), HostError> {
        match self.backend().await?.backend {
            Backend::RpmOstree => self.as_client(async |client| client.drop_pending(checksum, cancel).await).await,
            Backend::Bootc => Err(HostError::no_effect(
                "dropping the pending deployment",
                "bootc cannot drop a staged deployment, only stage another image over it",
            )),
        }
    }

    /// Cancels a transaction that an earlier run of the agent started.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn cancel_transaction(&self) -> Result<(), HostError> {
        match self.backend().await?.backend {
            Backend::RpmOstree => self.as_client(async |client| client.cancel_ours().await).await,
            Backend::Bootc => bootc::cancel_ours(self).await,
        }
    }

    /// Changes the kernel arguments of the staged deployment as [`apply`](crate::kernel_arguments::apply) does. The
    /// staged deployment must be of `image`.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn set_kernel_arguments(
        &self,
        image: &VerifiedImage,
        append: &[String],
        delete: &[String],
        cancel: &mut Cancel,
    ) -> Result<(), HostError> {
        match self.backend().await?.backend {
            Backend::RpmOstree => {
                self.as_client(async |client| client.set_kernel_arguments(image, append, delete, cancel).await).await
            }
            Backend::Bootc => Err(bootc::set_kernel_arguments(append, delete)),
        }
    }

    /// Starts the unit that finalizes the staged deployment when it is stopped.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn start_finalizer(&self) -> Result<(), HostError> {
        systemd::start(self, FINALIZER).await
    }

    /// Runs the bootloader update.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn update_bootloader(&self) -> Result<(), HostError> {
        systemd::start(self, BOOTLOADER_UPDATE).await
    }

    /// Notifies logged-in users, unlocks the staged `image` and requests the reboot into it. Success means that the request
    /// was accepted.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn reboot(&self, image: &VerifiedImage) -> Result<(), HostError> {
        let message = format!("rebooting into the desired OS image {}", image.image().digest().short());
        match self.backend().await?.backend {
            Backend::RpmOstree => self.as_client(async |client| client.reboot(image, &message).await).await,
            Backend::Bootc => logind::reboot(self, &message).await,
        }
    }

    /// The service's `StatusText` and `ActiveState`.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn service_status(&self) -> Result<(String, String), HostError> {
        systemd::status_text(self, "rebase-agent.service").await
    }

    /// Runs `work` as a client of rpm-ostreed.
    async fn as_client<T>(
        &self,
        work: impl AsyncFnOnce(&rpm_ostree::Client<'_>) -> Result<T, HostError>,
    ) -> Result<T, HostError> {
        let limit = self.deadlines.reply;
        self.on_bus(limit, async |bus| work(&rpm_ostree::Client::register(self, bus).await?).await).await
    }

    /// Runs `work`, which calls one daemon, on a connection to the bus. A failed call is an error of `what`, which `unit`
    /// provides.
    async fn ask<T>(
        &self,
        what: &'static str,
        unit: &'static str,
        work: impl AsyncFnOnce(&Connection) -> zbus::Result<T>,
    ) -> Result<T, HostError> {
        let limit = self.deadlines.call;
        let failed = |error| call_failed(what, unit, limit, &error);
        self.on_bus(limit, async |bus| work(bus).await.map_err(failed)).await
    }

    /// Runs `work` on a connection to the bus, then closes it. Each call on it may take `limit`.
    async fn on_bus<T>(
        &self,
        limit: Duration,
        work: impl AsyncFnOnce(&Connection) -> Result<T, HostError>,
    ) -> Result<T, HostError> {
        let builder = match &self.bus {
            Some(address) => zbus::connection::Builder::address(address.as_str()),
            None => zbus::connection::Builder::system(),
        };
        let bus = self.connect(builder.method_timeout(limit), "the system bus", "dbus.socket").await?;
        let outcome = work(&bus).await;
        close(bus).await;
        outcome
    }

    async fn connect(
        &self,
        builder: zbus::connection::Builder<'_>,
        what: &'static str,
        unit: &'static str,
    ) -> Result<Connection, HostError> {
        let connected = within(what, self.deadlines.connect, builder.build()).await?;
        connected.map_err(|error| HostError::Call { what, unit, why: printable(&error.to_string(), 300) })
    }
}

const FINALIZER: &str = "ostree-finalize-staged.service";
const KUBELET: &str = "kubelet.service";
const BOOTLOADER_UPDATE: &str = "bootloader-update.service";
const BOOT_COMPLETE: &str = "ostree-boot-complete.service";

/// The digest in the title of one of our transactions. Pure.
fn digest_in_title(title: &str) -> Option<Digest> {
    Digest::parse(title.strip_prefix(TITLE)?)
}

/// The private parsers, for tests/fuzz.
#[cfg(fuzzing)]
pub mod fuzzing {
    pub use super::bootc::{image_of_unit, parse_status as bootc_status};
    pub use super::rpm_ostree::{deployment, heard, property};
    pub use super::staged::parse as staged_record;
}
