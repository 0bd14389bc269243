//! The rest of the node inside the container, one process each: the boot loader and the initramfs, rpm-ostreed or
//! bootc, and the finalizer.

pub mod bootc;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};

use crate::events::{Event, Events};
use crate::machine::Engine;
use crate::rpmostreed::{NAME, RpmOstreed, Sysroot};

/// The stateroot.
pub const OSNAME: &str = "rhcos";
/// The place of this program in the container.
pub const PROGRAM: &str = "/usr/libexec/booted";
/// The directory of the registry's certificate authority; its only subdirectory has the registry's name.
const CERTS_D: &str = "/etc/containers/certs.d";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Replacements for the kernel's own files.
const PROC: &str = "/run/proc";

/// The services around the agent, each with its path and content.
const FILES: [(&str, &str); 10] = [
    // Debian's systemd does not know ostree. The kernel was not booted with the command line of a boot entry, so the
    // whole container sees the one that a boot loader would have passed on, from before the first read of the boot id.
    (
        "usr/lib/systemd/system/ostree-prepare-root.service",
        "[Unit]\nDescription=OSTree Prepare OS/\nDefaultDependencies=no\n\
         Before=systemd-journald.service sysinit.target\n\
         [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/libexec/booted node boot\n",
    ),
    (
        "usr/lib/systemd/system/rpm-ostreed.service",
        "[Unit]\nDescription=rpm-ostree System Management Daemon\nConditionPathExists=/ostree\n\
         [Service]\nType=dbus\nBusName=org.projectatomic.rpmostree1\nRuntimeDirectory=rpm-ostree\n\
         ExecStart=/usr/libexec/booted node rpm-ostreed\n",
    ),
    (
        "usr/lib/systemd/system/ostree-finalize-staged.service",
        "[Unit]\nDescription=OSTree Finalize Staged Deployment\nConditionPathExists=/run/ostree-booted\n\
         RequiresMountsFor=/sysroot /boot\nAfter=local-fs.target\n\
         [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n\
         ExecStop=/usr/libexec/booted node finalize\nTimeoutStopSec=5m\n",
    ),
    (
        "usr/lib/systemd/system/kubelet.service",
        "[Unit]\nDescription=Kubernetes Kubelet\n[Service]\nExecStart=/usr/bin/sleep infinity\n",
    ),
    (
        "usr/share/dbus-1/system-services/org.projectatomic.rpmostree1.service",
        include_str!(
            "../../../../vm-tests/image/stand-ins/rpm-ostree/usr/share/dbus-1/system-services/org.projectatomic.rpmostree1.service"
        ),
    ),
    // Root owns the name; the daemon decides about permissions.
    (
        "usr/share/dbus-1/system.d/org.projectatomic.rpmostree1.conf",
        include_str!(
            "../../../../vm-tests/image/stand-ins/rpm-ostree/usr/share/dbus-1/system.d/org.projectatomic.rpmostree1.conf"
        ),
    ),
    // Other updaters, which must not run while the agent is enabled.
    ("usr/lib/systemd/system/zincati.service", UPDATER),
    ("usr/lib/systemd/system/rpm-ostreed-automatic.service", UPDATER),
    ("usr/lib/systemd/system/bootc-fetch-apply-updates.service", UPDATER),
    // On systemd 252 the proc file system of ProtectProc= is the kernel's own: without the container's boot id and the
    // boot loader's command line. Waiting for the host's uptime is useless.
    (
        "etc/systemd/system/rebase-agent.service.d/50-container.conf",
        "[Service]\nBindReadOnlyPaths=/proc/cmdline /proc/sys/kernel/random/boot_id\n\
         Environment=REBASE_AGENT_UPTIME_FLOOR=0 REBASE_AGENT_SIGNATURE_GRACE=2\n",
    ),
];

/// Units and the targets that want them.
const WANTED: [(&str, &str); 2] =
    [("ostree-prepare-root.service", "sysinit.target"), ("kubelet.service", "multi-user.target")];

const UPDATER: &str = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n";

/// Installs the services around the agent on the disk at `root`.
pub fn furnish(root: &Path) -> Result<()> {
    for (path, text) in FILES {
        let path = root.join(path);
        fs::create_dir_all(path.parent().context("a file in no directory")?)?;
        fs::write(path, text)?;
    }
    for (unit, target) in WANTED {
        let wants = root.join("usr/lib/systemd/system").join(format!("{target}.wants"));
        fs::create_dir_all(&wants)?;
        std::os::unix::fs::symlink(format!("../{unit}"), wants.join(unit))?;
    }
    // The mount point of this program.
    fs::write(root.join(PROGRAM.trim_start_matches('/')), "")?;
    Ok(())
}

/// The work of the boot loader and the initramfs.
pub fn boot() -> Result<()> {
    let sysroot = Sysroot::running(Path::new("/"), OSNAME)?;
    show("cmdline", &sysroot.command_line()?)?;
    // systemd-nspawn made a boot id for this boot, from a file that it deleted: nothing can be mounted from it or over
    // it.
    let boot_id = fs::read_to_string(BOOT_ID)?;
    run("umount", &[BOOT_ID])?;
    show("sys/kernel/random/boot_id", &boot_id)?;
    fs::write("/run/ostree-booted", "")?;
    Ok(())
}

fn show(name: &str, text: &str) -> Result<()> {
    let file = Path::new(PROC).join(name);
    fs::create_dir_all(file.parent().context("a file in no directory")?)?;
    fs::write(&file, text)?;
    run("mount", &["--bind", &file.display().to_string(), &format!("/proc/{name}")])
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program).args(arguments).status()?;
    ensure!(status.success(), "{program} {}: {status}", arguments.join(" "));
    Ok(())
}

/// The work of `ostree admin finalize-staged`.
pub fn finalize() -> Result<()> {
    match Sysroot::running(Path::new("/"), OSNAME)?.finalize()? {
        Some(deployment) => println!("Finalized deployment {} of {}", deployment.checksum, deployment.reference),
        None => println!("Nothing to finalize"),
    }
    Ok(())
}

/// Runs the daemon until it is stopped.
pub async fn rpm_ostreed() -> Result<()> {
    let events = Events::new();
    events.listen(|event| match event {
        Event::TransactionRequested { method, argument } => println!("requested: {method} {argument}"),
        Event::Staged { reference, .. } => println!("staged: {reference}"),
        Event::TransactionFinished { title, error: Some(error) } => println!("failed: {title}: {error}"),
        _ => {}
    });
    let sysroot = Arc::new(Sysroot::running(Path::new("/"), OSNAME)?);
    let daemon = daemon(events, sysroot)?;
    daemon.start().await.map_err(anyhow::Error::msg).with_context(|| format!("cannot be {NAME}"))?;
    std::future::pending().await
}

/// A daemon that pulls and stages with the node's own engine, policy and systemd.
fn daemon(events: Events, sysroot: Arc<Sysroot>) -> Result<RpmOstreed> {
    let cert_dir = fs::read_dir(CERTS_D)?.next().context("no registry is trusted")??.path();
    let engine = Engine {
        skopeo: "/usr/bin/skopeo".into(),
        policy: "/etc/containers/policy.json".into(),
        registries_d: "/etc/containers/registries.d".into(),
        cert_dir,
    };
    let address = "unix:path=/run/dbus/system_bus_socket".to_owned();
    Ok(RpmOstreed::service(address, Path::new("/run/rpm-ostree"), events, sysroot, engine))
}
