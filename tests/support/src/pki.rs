//! Certificates as a cluster has them: an authority, the API server's certificate, the kubelet's rotating client
//! certificate, and the kubeconfig that the kubelet generates for itself.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use openssl::asn1::{Asn1Integer, Asn1Time};
use openssl::base64::encode_block;
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName, SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509Name, X509NameBuilder};

const HOUR: i64 = 3600;

/// A certificate authority (P-256) that signs servers and clients.
#[derive(Clone)]
pub struct Pki {
    certificate: X509,
    key: PKey<Private>,
}

impl Pki {
    /// A new authority with a new key.
    #[must_use]
    pub fn new() -> Self {
        let key = PKey::from_ec_key(generate()).unwrap();
        let subject = name("test-kube-apiserver-signer", &["openshift"]);
        let mut builder = builder(&subject, &subject, &key, -HOUR, 10 * 365 * 24 * HOUR);
        builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        let usage = KeyUsage::new().critical().key_cert_sign().crl_sign().digital_signature().build().unwrap();
        builder.append_extension(usage).unwrap();
        let id = SubjectKeyIdentifier::new().build(&builder.x509v3_context(None, None)).unwrap();
        builder.append_extension(id).unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        Self { certificate: builder.build(), key }
    }

    /// An authority from the texts of [`Pki::ca_pem`] and [`Pki::key_pem`].
    ///
    /// # Errors
    /// If the texts are not a certificate and its key.
    pub fn from_pem(ca_pem: &str, key_pem: &str) -> Result<Self, openssl::error::ErrorStack> {
        let key = PKey::private_key_from_pem(key_pem.as_bytes())?;
        Ok(Self { certificate: X509::from_pem(ca_pem.as_bytes())?, key })
    }

    /// The authority's private key.
    #[must_use]
    pub fn key_pem(&self) -> String {
        text(self.key.private_key_to_pem_pkcs8())
    }

    /// The authority's certificate.
    #[must_use]
    pub fn ca_pem(&self) -> String {
        text(self.certificate.to_pem())
    }

    /// The authority's certificate, parsed.
    #[must_use]
    pub fn ca(&self) -> X509 {
        self.certificate.clone()
    }

    /// A server certificate for `names` (host names or addresses) besides `127.0.0.1`, `::1` and `localhost`, and its
    /// key in PKCS#8.
    #[must_use]
    pub fn server(&self, names: &[&str]) -> (String, String) {
        self.server_valid(names, -HOUR, 365 * 24 * HOUR)
    }

    /// Like [`Pki::server`], valid from `from` to `until` seconds after now; negative lies in the past.
    #[must_use]
    pub fn server_valid(&self, names: &[&str], from: i64, until: i64) -> (String, String) {
        let key = PKey::from_ec_key(generate()).unwrap();
        let subject = name("api-int", &["kube-master"]);
        let mut builder = builder(&subject, self.certificate.subject_name(), &key, from, until);
        builder.append_extension(ExtendedKeyUsage::new().server_auth().build().unwrap()).unwrap();
        let mut alternative = SubjectAlternativeName::new();
        for name in ["localhost", "127.0.0.1", "::1"].iter().chain(names) {
            if name.parse::<IpAddr>().is_ok() {
                alternative.ip(name);
            } else {
                alternative.dns(name);
            }
        }
        let alternative = alternative.build(&builder.x509v3_context(Some(&self.certificate), None)).unwrap();
        builder.append_extension(alternative).unwrap();
        self.name_issuer(&mut builder);
        builder.sign(&self.key, MessageDigest::sha256()).unwrap();
        (text(builder.build().to_pem()), text(key.private_key_to_pem_pkcs8()))
    }

    /// The content of `kubelet-client-current.pem` for `node`: certificate, then SEC1 key. Every call makes a new key
    /// and serial number, as a rotation does.
    #[must_use]
    pub fn kubelet_pem(&self, node: &str) -> String {
        self.kubelet_pem_valid(node, -HOUR, 24 * HOUR)
    }

    /// Like [`Pki::kubelet_pem`], valid from `from` to `until` seconds after now; negative lies in the past.
    #[must_use]
    pub fn kubelet_pem_valid(&self, node: &str, from: i64, until: i64) -> String {
        self.client_pem(&format!("system:node:{node}"), &["system:nodes"], from, until)
    }

    /// A combined client PEM for any user and groups, for example group `system:masters`.
    #[must_use]
    pub fn client_pem(&self, user: &str, groups: &[&str], from: i64, until: i64) -> String {
        let ec = generate();
        let key = PKey::from_ec_key(ec.clone()).unwrap();
        self.client_certificate(&key, user, groups, from, until) + &text(ec.private_key_to_pem())
    }

    /// A client certificate for any user and groups, valid for a day, and its key in PKCS#8.
    #[must_use]
    pub fn client(&self, user: &str, groups: &[&str]) -> (String, String) {
        self.client_valid(user, groups, -HOUR, 24 * HOUR)
    }

    /// Like [`Pki::client`], valid from `from` to `until` seconds after now; negative lies in the past.
    #[must_use]
    pub fn client_valid(&self, user: &str, groups: &[&str], from: i64, until: i64) -> (String, String) {
        let key = PKey::from_ec_key(generate()).unwrap();
        (self.client_certificate(&key, user, groups, from, until), text(key.private_key_to_pem_pkcs8()))
    }

    /// Only the certificate, for a key of any kind.
    #[must_use]
    pub fn client_certificate(
        &self,
        key: &PKey<Private>,
        user: &str,
        groups: &[&str],
        from: i64,
        until: i64,
    ) -> String {
        let subject = name(user, groups);
        let mut builder = builder(&subject, self.certificate.subject_name(), key, from, until);
        builder.append_extension(BasicConstraints::new().critical().build().unwrap()).unwrap();
        builder.append_extension(KeyUsage::new().critical().digital_signature().build().unwrap()).unwrap();
        builder.append_extension(ExtendedKeyUsage::new().client_auth().build().unwrap()).unwrap();
        self.name_issuer(&mut builder);
        builder.sign(&self.key, MessageDigest::sha256()).unwrap();
        text(builder.build().to_pem())
    }

    /// Derived from the key: all authorities of a cluster have the same name, before and after a rotation.
    fn name_issuer(&self, builder: &mut X509Builder) {
        let context = builder.x509v3_context(Some(&self.certificate), None);
        let issuer = AuthorityKeyIdentifier::new().keyid(true).build(&context).unwrap();
        builder.append_extension(issuer).unwrap();
    }
}

impl Default for Pki {
    fn default() -> Self {
        Self::new()
    }
}

fn generate() -> EcKey<Private> {
    EcKey::generate(&EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap()).unwrap()
}

fn text(pem: Result<Vec<u8>, openssl::error::ErrorStack>) -> String {
    String::from_utf8(pem.unwrap()).unwrap()
}

fn name(common: &str, organisations: &[&str]) -> X509Name {
    let mut name = X509NameBuilder::new().unwrap();
    for organisation in organisations {
        name.append_entry_by_nid(Nid::ORGANIZATIONNAME, organisation).unwrap();
    }
    name.append_entry_by_nid(Nid::COMMONNAME, common).unwrap();
    name.build()
}

fn builder(
    subject: &openssl::x509::X509NameRef,
    issuer: &openssl::x509::X509NameRef,
    key: &PKey<Private>,
    from: i64,
    until: i64,
) -> X509Builder {
    let now = i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap();
    let mut serial = BigNum::new().unwrap();
    serial.rand(127, MsbOption::MAYBE_ZERO, false).unwrap();
    let mut builder = X509Builder::new().unwrap();
    builder.set_version(2).unwrap();
    builder.set_serial_number(&Asn1Integer::from_bn(&serial).unwrap()).unwrap();
    builder.set_subject_name(subject).unwrap();
    builder.set_issuer_name(issuer).unwrap();
    builder.set_pubkey(key).unwrap();
    builder.set_not_before(&Asn1Time::from_unix(now + from).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::from_unix(now + until).unwrap()).unwrap();
    builder
}

/// Writes the kubeconfig that the kubelet generates after its bootstrap: the authority inline, certificate and key
/// both in `client_pem_path`. Like the kubelet, it overwrites in place, with mode 0600.
pub fn write_kubeconfig(path: &Path, server: &str, ca_pem: &str, client_pem_path: &Path) {
    let (authority, client) = (encode_block(ca_pem.as_bytes()), client_pem_path.display());
    let mut yaml = String::new();
    write!(
        yaml,
        "apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: {authority}
    server: {server}
  name: default-cluster
contexts:
- context:
    cluster: default-cluster
    namespace: default
    user: default-auth
  name: default-context
current-context: default-context
kind: Config
preferences: {{}}
users:
- name: default-auth
  user:
    client-certificate: {client}
    client-key: {client}
"
    )
    .unwrap();
    write_private(path, &yaml).unwrap();
}

/// Stores a client PEM as the kubelet does: a new file in `directory`, then `kubelet-client-current.pem` is switched to
/// it. Returns the path of the link.
pub fn rotate_client_pem(directory: &Path, pem: &str) -> PathBuf {
    fs::create_dir_all(directory).unwrap();
    let link = directory.join("kubelet-client-current.pem");
    let count = fs::read_dir(directory).unwrap().count();
    let file = directory.join(format!("kubelet-client-2026-01-01-00-00-{count:02}.pem"));
    write_private(&file, pem).unwrap();
    let updated = directory.join("kubelet-client-updated.pem");
    symlink(&file, &updated).unwrap();
    fs::rename(&updated, &link).unwrap();
    link
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use openssl::x509::X509;

    #[test]
    fn kubelet_pem_is_a_certificate_then_a_sec1_key() {
        let pki = Pki::new();
        let pem = pki.kubelet_pem("worker-0");
        let certificate = X509::from_pem(pem.as_bytes()).unwrap();
        let subject = |nid| {
            let entry = certificate.subject_name().entries_by_nid(nid).next().unwrap();
            entry.data().to_string().unwrap()
        };
        assert_eq!(subject(Nid::COMMONNAME), "system:node:worker-0");
        assert_eq!(subject(Nid::ORGANIZATIONNAME), "system:nodes");
        assert!(pem.find("BEGIN CERTIFICATE").unwrap() < pem.find("BEGIN EC PRIVATE KEY").unwrap());
        assert!(
            certificate
                .verify(
                    &PKey::public_key_from_pem(&pki.ca().public_key().unwrap().public_key_to_pem().unwrap()).unwrap()
                )
                .unwrap()
        );
        assert!(PKey::private_key_from_pem(pem.as_bytes()).unwrap().public_eq(&certificate.public_key().unwrap()));
        let other = X509::from_pem(pki.kubelet_pem("worker-0").as_bytes()).unwrap();
        let serial = |x: &X509| x.serial_number().to_bn().unwrap().to_string();
        assert_ne!(serial(&certificate), serial(&other));
    }

    #[test]
    fn rotation_flips_the_link_and_the_kubeconfig_names_it_twice() {
        let directory = tempfile::tempdir().unwrap();
        let pki = Pki::new();
        let first = pki.kubelet_pem("worker-0");
        let link = rotate_client_pem(directory.path(), &first);
        assert_eq!(fs::read_to_string(&link).unwrap(), first);
        let second = pki.kubelet_pem("worker-0");
        assert_eq!(rotate_client_pem(directory.path(), &second), link);
        assert_eq!(fs::read_to_string(&link).unwrap(), second);
        let path = directory.path().join("kubeconfig");
        write_kubeconfig(&path, "https://api-int.example:6443", &pki.ca_pem(), &link);
        let yaml = fs::read_to_string(path).unwrap();
        assert_eq!(yaml.matches("kubelet-client-current.pem").count(), 2);
        assert!(yaml.contains("current-context: default-context\nkind: Config\npreferences: {}\n"));
    }
}
