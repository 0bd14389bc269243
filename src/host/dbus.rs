//! Typed proxies for every D-Bus call, property and signal that the agent uses. It uses no others.

use std::collections::{BTreeMap, HashMap};

use zbus::proxy::{CacheProperties, Defaults, ProxyImpl};
use zbus::{Connection, OwnedObjectPath, OwnedVariant, Variant};

/// `a{sv}` as it is sent. Ordered, because rpm-ostreed compares the marshalled bytes: only an identical request joins a
/// running transaction.
pub(super) type Options<'a> = BTreeMap<&'static str, Variant<'a>>;
/// `a{sv}` as it is received.
pub(super) type Dict = HashMap<String, OwnedVariant>;
/// A row of `ListInhibitors`: what, who, why, mode, uid, pid.
pub(super) type InhibitorRow = (String, String, String, String, u32, u32);
/// A row of `ListUnits…`: name, description, load state, active state, and six more.
pub(super) type UnitRow =
    (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// rpm-ostreed's name on the bus.
pub(super) const RPM_OSTREE: &str = "org.projectatomic.rpmostree1";
/// The interface whose properties describe the deployments.
pub(super) const SYSROOT: &str = "org.projectatomic.rpmostree1.Sysroot";
/// The interface of a transaction's private socket.
pub(super) const TRANSACTION: &str = "org.projectatomic.rpmostree1.Transaction";
/// systemd's name on the bus, and the prefix of its error names.
pub(super) const SYSTEMD: &str = "org.freedesktop.systemd1";

/// The bus itself.
#[zbus::proxy(
    interface = "org.freedesktop.DBus",
    default_service = "org.freedesktop.DBus",
    default_path = "/org/freedesktop/DBus"
)]
pub(super) trait Bus {
    fn name_has_owner(&self, name: &str) -> zbus::Result<bool>;
    fn list_activatable_names(&self) -> zbus::Result<Vec<String>>;
}

/// All properties of an interface in one answer.
#[zbus::proxy(interface = "org.freedesktop.DBus.Properties", assume_defaults = false)]
pub(super) trait Properties {
    fn get_all(&self, interface: &str) -> zbus::Result<Dict>;
}

/// systemd's manager.
#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
pub(super) trait Manager {
    fn list_units_by_names(&self, names: &[&str]) -> zbus::Result<Vec<UnitRow>>;
    fn list_units_by_patterns(&self, states: &[&str], patterns: &[&str]) -> zbus::Result<Vec<UnitRow>>;
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;
    fn subscribe(&self) -> zbus::Result<()>;
    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: String, result: String) -> zbus::Result<()>;
}

/// A systemd unit.
#[zbus::proxy(interface = "org.freedesktop.systemd1.Unit", default_service = "org.freedesktop.systemd1")]
pub(super) trait Unit {
    #[zbus(property)]
    fn active_state(&self) -> zbus::Result<String>;
}

/// A systemd service.
#[zbus::proxy(interface = "org.freedesktop.systemd1.Service", default_service = "org.freedesktop.systemd1")]
pub(super) trait Service {
    #[zbus(property)]
    fn exec_main_status(&self) -> zbus::Result<i32>;
    #[zbus(property)]
    fn result(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn status_text(&self) -> zbus::Result<String>;
}

/// logind.
#[zbus::proxy(
    interface = "org.freedesktop.login1.Manager",
    default_service = "org.freedesktop.login1",
    default_path = "/org/freedesktop/login1"
)]
pub(super) trait Login {
    fn list_inhibitors(&self) -> zbus::Result<Vec<InhibitorRow>>;
    fn set_wall_message(&self, message: &str, enable: bool) -> zbus::Result<()>;
    fn reboot(&self, interactive: bool) -> zbus::Result<()>;
    #[zbus(property)]
    fn preparing_for_shutdown(&self) -> zbus::Result<bool>;
}

/// rpm-ostreed: client registration, and the deployments.
#[zbus::proxy(
    interface = "org.projectatomic.rpmostree1.Sysroot",
    default_service = "org.projectatomic.rpmostree1",
    default_path = "/org/projectatomic/rpmostree1/Sysroot"
)]
pub(super) trait Sysroot {
    fn register_client(&self, options: &Options<'_>) -> zbus::Result<()>;
    fn reload(&self) -> zbus::Result<()>;
}

/// rpm-ostreed: the booted stateroot. Each call creates a transaction and returns its address.
#[zbus::proxy(interface = "org.projectatomic.rpmostree1.OS", default_service = "org.projectatomic.rpmostree1")]
pub(super) trait Os {
    fn cleanup(&self, what: &[&str]) -> zbus::Result<String>;
    fn finalize_deployment(&self, options: &Options<'_>) -> zbus::Result<String>;
    fn kernel_args(
        &self,
        existing: &str,
        append: &[&str],
        replace: &[&str],
        delete: &[&str],
        options: &Options<'_>,
    ) -> zbus::Result<String>;
    fn rebase(&self, options: &Options<'_>, reference: &str, packages: &[&str]) -> zbus::Result<String>;
}

/// rpm-ostreed: a transaction, on its own socket. Its signals are read as plain messages, which keeps their order.
#[zbus::proxy(
    interface = "org.projectatomic.rpmostree1.Transaction",
    default_service = "org.projectatomic.rpmostree1",
    default_path = "/"
)]
pub(super) trait Transaction {
    /// Waits for no reply: the reply would only be read after the messages queued before it.
    #[zbus(no_reply)]
    fn cancel(&self) -> zbus::Result<()>;
    fn start(&self) -> zbus::Result<bool>;
    #[zbus(property)]
    fn title(&self) -> zbus::Result<String>;
}

/// A proxy without a property cache: cached properties lag behind the daemon's other answers.
pub(super) async fn proxy<P>(bus: &Connection) -> zbus::Result<P>
where
    P: ProxyImpl<'static> + From<zbus::Proxy<'static>> + Defaults,
{
    zbus::proxy::Builder::<P>::new(bus).cache_properties(CacheProperties::No).build().await
}

/// [`proxy`] for an object with a path of its own.
pub(super) async fn proxy_at<P>(bus: &Connection, path: &str) -> zbus::Result<P>
where
    P: ProxyImpl<'static> + From<zbus::Proxy<'static>> + Defaults,
{
    let builder = zbus::proxy::Builder::<P>::new(bus).cache_properties(CacheProperties::No);
    builder.path(path.to_owned()).build().await
}

/// Closes a connection.
pub(super) async fn close(connection: Connection) {
    // The other end may have closed it first, which does no harm.
    if let Err(error) = connection.close().await {
        tracing::trace!("closing a bus connection: {error}");
    }
}
