//! A private system bus: a real `dbus-daemon`.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, bail};
pub(crate) use rpm_ostreed::bus::*;
use zbus::Connection;

/// A running `dbus-daemon`. It is killed when this is dropped, and with this process.
#[derive(Debug)]
pub struct Bus {
    child: Child,
    dir: PathBuf,
    address: String,
}

impl Bus {
    /// Starts a bus whose socket, configuration and service files are in `dir`.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        let services = dir.join("bus-services");
        std::fs::create_dir_all(&services)?;
        let socket = dir.join("bus.sock");
        let _ = std::fs::remove_file(&socket);
        let config = dir.join("bus.conf");
        std::fs::write(
            &config,
            format!(
                r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <servicedir>{services}</servicedir>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_type="method_call"/>
    <allow send_type="method_return"/>
    <allow send_type="error"/>
    <allow send_type="signal"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
  </policy>
</busconfig>
"#,
                socket = socket.display(),
                services = services.display(),
            ),
        )?;
        // The bus asks systemd to activate a service, as on a real node.
        // The shell holds a pipe from this process: the daemon ends with this process in every case.
        let mut child = Command::new("sh")
            .args(["-c", "dbus-daemon \"$@\" & exec >&-; read -r line; kill $!; wait", "bus"])
            .arg(format!("--config-file={}", config.display()))
            .args(["--nofork", "--nopidfile", "--print-address=1", "--systemd-activation"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("starting dbus-daemon")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no pipe")?).read_line(&mut line)?;
        if line.trim().is_empty() {
            drop(child.stdin.take());
            let _ = child.wait();
            bail!("dbus-daemon refused {}", config.display());
        }
        Ok(Self { child, dir: dir.to_owned(), address: format!("unix:path={}", socket.display()) })
    }

    /// The value for `DBUS_SYSTEM_BUS_ADDRESS`.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// A new connection to this bus.
    pub async fn connect(&self) -> Connection {
        connect(&self.address).await.expect("the private bus answers")
    }

    /// Makes `name` activatable through systemd's `unit`.
    pub fn activatable(&self, name: &str, unit: &str) -> anyhow::Result<()> {
        std::fs::write(
            self.dir.join("bus-services").join(format!("{name}.service")),
            format!("[D-BUS Service]\nName={name}\nExec=/bin/false\nUser=root\nSystemdService={unit}\n"),
        )?;
        Ok(())
    }

    /// Makes the bus read its service files again.
    pub async fn reload(&self) -> anyhow::Result<()> {
        bus_call(&self.connect().await, "ReloadConfig", &()).await?;
        Ok(())
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bus_answers_and_dies() {
        let dir = tempfile::tempdir().unwrap();
        let bus = Bus::start(dir.path()).unwrap();
        let connection = bus.connect().await;
        assert!(connection.unique_name().is_some());
        assert!(bus.address().starts_with("unix:path="));
        drop(bus);
        connection.closed().await;
    }
}
