//! The keys and names in the guest's image, made once: the image contains its policy, its key and its registry's name
//! as an operating system does, so they are older than every run.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;

use anyhow::{Context as _, Result};
use support::pki::Pki;
use support::policy::{Policy, RegistriesD, Requirement};
use support::registry::{Credentials, ServerTls};
use support::sign::{KeyKind, Signer};
use support::tools;

/// The guest's address for the host's 127.0.0.1 under QEMU.
pub const HOST_IN_GUEST: &str = "10.0.2.2";
/// The API server's name, which is in the guest's /etc/hosts.
pub const API_IN_GUEST: &str = "api-int.test.example";
/// Repository of the OS images.
pub const REPOSITORY: &str = "os";
/// The place of the key that the guest's policy names.
pub const KEY_IN_GUEST: &str = "/etc/containers/os.pub";

/// Keys, authority and the registry's port.
pub struct Trust {
    /// Signs the trusted images.
    pub signer: Signer,
    /// Signs the certificates of the API server, the registry and the kubelet.
    pub pki: Pki,
    /// The registry's port on the host's loopback.
    pub port: u16,
}

impl Trust {
    /// Reads the files that `make` wrote.
    pub fn load(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        Ok(Self {
            signer: Signer::from_pem(&read("private/signer.pem")?)?,
            pki: Pki::from_pem(&read("private/ca.pem")?, &read("private/ca.key")?)?,
            port: read_port(dir)?,
        })
    }

    /// Makes keys and, for the image, `etc/` and `reference`. Does nothing if that was done and the registry's port is
    /// free: the image contains the port, so another port needs another image.
    pub fn make(dir: &Path) -> Result<()> {
        if dir.join("reference").exists() {
            let port = read_port(dir)?;
            if reserve(port).is_ok() && TcpListener::bind(("127.0.0.1", port)).is_ok() {
                return Ok(());
            }
        }
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).context("the old keys"),
            _ => {}
        }
        let trust = Self { signer: Signer::generate(KeyKind::P256), pki: Pki::new(), port: tools::free_port() };
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().context("a file in a directory")?)?;
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
        };
        write("private/signer.pem", &trust.signer.private_key_pem())?;
        write("private/ca.pem", &trust.pki.ca_pem())?;
        write("private/ca.key", &trust.pki.key_pem())?;
        write("private/port", &trust.port.to_string())?;
        let host = trust.registry_in_guest();
        write(&format!("etc{}", KEY_IN_GUEST.trim_start_matches("/etc")), &trust.signer.public_key_pem())?;
        write(&format!("etc/containers/certs.d/{host}/ca.crt"), &trust.pki.ca_pem())?;
        // OpenShift's own policy, with one scope that requires a signature.
        Policy::accept_by_default()
            .scope(&host, [Requirement::sigstore_key_path(Path::new(KEY_IN_GUEST))])
            .write(&dir.join("etc/containers/policy.json"))?;
        RegistriesD::new().attachments(&host, true).write(&dir.join("etc/containers/registries.d/os.yaml"))?;
        // Written last: its existence shows that all files above are complete.
        write("reference", &format!("{host}/{REPOSITORY}"))
    }

    /// Keeps the registry's port for this run, also while the registry is stopped, until the socket is dropped.
    pub fn reserve(dir: &Path) -> Result<UdpSocket> {
        reserve(read_port(dir)?)
    }

    /// `10.0.2.2:PORT`, the first part of references to images.
    #[must_use]
    pub fn registry_in_guest(&self) -> String {
        format!("{HOST_IN_GUEST}:{}", self.port)
    }

    /// The registry's certificate for both sides.
    #[must_use]
    pub fn registry_tls(&self) -> ServerTls {
        let (cert_pem, key_pem) = self.pki.server(&[HOST_IN_GUEST]);
        ServerTls { cert_pem, key_pem, ca_pem: self.pki.ca_pem() }
    }

    /// The node's pull secret.
    #[must_use]
    pub fn pull_secret(&self) -> String {
        Credentials::PULLER.auth_file(&self.registry_in_guest()).to_string()
    }
}

fn read_port(dir: &Path) -> Result<u16> {
    let path = dir.join("private/port");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    text.trim().parse().with_context(|| format!("{} is no port", path.display()))
}

/// Takes the UDP port of that number, which no other program uses: runs of all checkouts on this machine check it.
fn reserve(port: u16) -> Result<UdpSocket> {
    UdpSocket::bind(("127.0.0.1", port)).with_context(|| {
        format!("port {port} of 127.0.0.1, which the image names, belongs to another run: run it again")
    })
}
