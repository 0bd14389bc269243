//! Chooses the host tool: the one set with `--backend`, or the one that is found. It is found by probing, not by the
//! name or version of the OS.

use zbus::Connection;

use super::dbus::{BusProxy, RPM_OSTREE, proxy};
use super::{Host, HostError, call_failed, systemd};
use crate::model::{Backend, UnitState};

/// The backend and why it was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The backend.
    pub backend: Backend,
    /// Why it was chosen, for people.
    pub why: &'static str,
}

/// Prefers rpm-ostree: it has a D-Bus interface, reports progress and the cause of a failure, drops staged deployments
/// and changes kernel arguments.
pub(super) async fn probe(host: &Host) -> Result<Chosen, HostError> {
    let units = [super::rpm_ostree::UNIT, super::bootc::STATUS_UNIT];
    let ask = async |bus: &Connection| {
        let [daemon, socket] = systemd::states(host, bus, units).await?;
        Ok((is_on_bus(host, bus, RPM_OSTREE, daemon != UnitState::Absent).await?, socket))
    };
    let (rpm_ostree, socket) = host.on_bus(host.deadlines.call, ask).await?;
    let bootc = host.root.join(super::bootc::PROGRAM).exists();
    choose(rpm_ostree, bootc, socket == UnitState::Active)
}

/// Chooses by what was found on the host. Pure.
fn choose(rpm_ostree: bool, bootc: bool, socket: bool) -> Result<Chosen, HostError> {
    let chosen = |backend, why| Ok(Chosen { backend, why });
    match (rpm_ostree, bootc, socket) {
        (true, true, true) => {
            chosen(Backend::RpmOstree, "both tools are installed, and rpm-ostree has a D-Bus interface")
        }
        (true, ..) => chosen(Backend::RpmOstree, "rpm-ostree is on the system bus"),
        (false, true, true) => chosen(Backend::Bootc, "rpm-ostree is not on the system bus"),
        (false, true, false) => Err(HostError::NoBackend(
            "rpm-ostree is not on the system bus, and the socket for bootc is not active: `systemctl enable --now \
             rebase-agent-bootc-status.socket`",
        )),
        (false, false, _) => Err(HostError::NoBackend(
            "rpm-ostree is not on the system bus and there is no `/usr/bin/bootc`; build the image from an image-mode \
             base that has one of them",
        )),
    }
}

/// Whether `name` has an owner on the bus, or a call would start one. A masked unit cannot be started.
async fn is_on_bus(host: &Host, bus: &Connection, name: &str, activated: bool) -> Result<bool, HostError> {
    let asked = async {
        let daemon: BusProxy<'_> = proxy(bus).await?;
        let owned = daemon.name_has_owner(name).await?;
        let activatable = daemon.list_activatable_names().await?;
        Ok(owned || activated && activatable.iter().any(|activatable| activatable == name))
    };
    asked.await.map_err(|error| call_failed("the system bus", "dbus.service", host.deadlines.call, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_installed_tool_is_used_and_rpm_ostree_is_preferred() {
        let backend = |rpm_ostree, bootc, socket| choose(rpm_ostree, bootc, socket).map(|chosen| chosen.backend);
        for (bootc, socket) in [(false, false), (true, false), (true, true)] {
            assert_eq!(backend(true, bootc, socket).unwrap(), Backend::RpmOstree);
        }
        assert_eq!(backend(false, true, true).unwrap(), Backend::Bootc);
        for (bootc, socket, word) in [(true, false, "rebase-agent-bootc-status.socket"), (false, false, "image-mode")] {
            let error = backend(false, bootc, socket).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
