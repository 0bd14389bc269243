//! The kubelet's kubeconfig and certificate: where the API server is, and who we are. Pure but for the readers.

use std::path::{Path, PathBuf};

use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::X509;
use serde::Deserialize;

use super::ClusterError;
use crate::host::boot::read_bounded;
use crate::model::printable;

/// Largest kubeconfig or PEM file, in bytes; the CA bundle in it may hold dozens of certificates.
const MAX_FILE: u64 = 1 << 20;
/// A kubelet's user name is this and the node's name.
const NODE_USER: &str = "system:node:";

/// What a connection needs, read anew whenever one is made: the kubelet rotates its certificate, and the CA changes.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Access {
    /// `https://host:port`.
    pub server: String,
    /// PEM bundle that the server's certificate must chain to.
    pub ca: Vec<u8>,
    /// PEM client certificate and chain.
    pub certificate: Vec<u8>,
    /// PKCS#8 PEM key.
    pub key: Vec<u8>,
    /// From the certificate's CN: hostname and node name differ on some platforms.
    pub node: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Config {
    current_context: String,
    clusters: Vec<NamedCluster>,
    contexts: Vec<NamedContext>,
    users: Vec<NamedUser>,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    proxy_url: Option<String>,
    tls_server_name: Option<String>,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Deserialize)]
struct Context {
    cluster: String,
    user: String,
}

#[derive(Deserialize)]
struct NamedUser {
    name: String,
    user: User,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    client_certificate: Option<PathBuf>,
    client_key: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key_data: Option<String>,
}

/// Reads the kubeconfig and everything that it names.
///
/// # Errors
/// [`ClusterError::Kubeconfig`], with the file and what is wrong with it.
pub(super) fn load(path: &Path) -> Result<Access, ClusterError> {
    let fail = |path: &Path, why: String| ClusterError::Kubeconfig { path: path.to_owned(), why: printable(&why, 300) };
    let invalid = |why: &str| fail(path, why.to_owned());
    let read = |path: &Path| read_bounded(path, MAX_FILE).map_err(|e| fail(path, e.to_string()));
    let text = String::from_utf8(read(path)?).map_err(|_| invalid("it is not UTF-8"))?;
    let config: Config = serde_saphyr::from_str(&text).map_err(|e| fail(path, e.to_string()))?;
    let context = config.contexts.iter().find(|c| c.name == config.current_context).map(|c| &c.context);
    let context = context.ok_or_else(|| invalid("current-context names no context"))?;
    let cluster = config.clusters.iter().find(|c| c.name == context.cluster).map(|c| &c.cluster);
    let cluster = cluster.ok_or_else(|| invalid("the context names no cluster"))?;
    let user = config.users.iter().find(|u| u.name == context.user).map(|u| &u.user);
    let user = user.ok_or_else(|| invalid("the context names no user"))?;

    if cluster.insecure_skip_tls_verify {
        return Err(invalid(
            "insecure-skip-tls-verify is not supported; give the cluster's certificate-authority-data",
        ));
    }
    if cluster.proxy_url.is_some() || cluster.tls_server_name.is_some() {
        return Err(invalid("proxy-url and tls-server-name are not supported yet"));
    }
    if !cluster.server.starts_with("https://") {
        return Err(invalid("the server is not an https:// URL"));
    }
    // Relative paths are relative to the kubeconfig, as for every client.
    let beside = |file: &Path| path.parent().unwrap_or(Path::new("/")).join(file);
    let either = |data: &Option<String>, file: &Option<PathBuf>, what: &str| match (data, file) {
        (Some(data), _) => {
            let data: String = data.split_whitespace().collect();
            openssl::base64::decode_block(&data).map_err(|_| invalid(&format!("{what}-data is not base64")))
        }
        (None, Some(file)) => read(&beside(file)),
        (None, None) => {
            Err(invalid(&format!("there is no {what}; the agent needs the kubelet's own client certificate")))
        }
    };
    let ca = either(&cluster.certificate_authority_data, &cluster.certificate_authority, "certificate-authority")?;
    let certificate = either(&user.client_certificate_data, &user.client_certificate, "client-certificate")?;
    let key = either(&user.client_key_data, &user.client_key, "client-key")?;
    let (certificate, node) = identity(&certificate).map_err(|why| fail(path, why))?;
    let key = pkcs8(&key).map_err(|why| fail(path, why))?;
    Ok(Access { server: cluster.server.trim_end_matches('/').to_owned(), ca, certificate, key, node })
}

/// The certificates of a PEM file that also holds the key, and the node's name.
fn identity(pem: &[u8]) -> Result<(Vec<u8>, String), String> {
    let chain = X509::stack_from_pem(pem).map_err(|e| format!("the client certificate does not parse: {e}"))?;
    let leaf = chain.first().ok_or("the client certificate file holds no certificate")?;
    let name = leaf.subject_name().entries_by_nid(Nid::COMMONNAME).next().and_then(|cn| cn.data().to_string().ok());
    let name = name.unwrap_or_default();
    let node = name.strip_prefix(NODE_USER).filter(|node| is_dns_name(node)).ok_or_else(|| {
        format!("the client certificate is for `{}`, not for {NODE_USER}<name>", printable(&name, 100))
    })?;
    let mut certificates = Vec::new();
    for certificate in &chain {
        certificates.extend(certificate.to_pem().map_err(|e| e.to_string())?);
    }
    Ok((certificates, node.to_owned()))
}

/// RFC 1123 subdomain, the grammar of node names: nothing of it can leave the path of a URL.
fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// The kubelet writes its key as SEC1 (`EC PRIVATE KEY`), and reqwest's OpenSSL side takes PKCS#8 only.
fn pkcs8(pem: &[u8]) -> Result<Vec<u8>, String> {
    // The callback stands in for a question on the terminal: an encrypted key is refused.
    let key = PKey::private_key_from_pem_callback(pem, |_| Ok(0)).map_err(|_| "the client key does not parse")?;
    key.private_key_to_pem_pkcs8().map_err(|e| format!("the client key cannot be converted: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use support::pki::{Pki, write_kubeconfig};

    fn tree() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let (config, pem) = (directory.path().join("kubeconfig"), directory.path().join("kubelet.pem"));
        let pki = Pki::new();
        std::fs::write(&pem, pki.kubelet_pem("worker-0.example.com")).unwrap();
        write_kubeconfig(&config, "https://127.0.0.1:6443/", &pki.ca_pem(), &pem);
        (directory, config, pem)
    }

    #[test]
    fn reads_what_a_kubelet_writes() {
        let (_directory, config, _) = tree();
        let access = load(&config).unwrap();
        assert_eq!(access.server, "https://127.0.0.1:6443");
        assert_eq!(access.node, "worker-0.example.com");
        assert!(access.key.starts_with(b"-----BEGIN PRIVATE KEY-----"));
        assert!(access.certificate.starts_with(b"-----BEGIN CERTIFICATE-----"));
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        let (_directory, config, pem) = tree();
        let good = std::fs::read_to_string(&config).unwrap();
        for (from, to, expected) in [
            ("https://", "http://", "https://"),
            ("current-context: ", "current-context: x", "current-context"),
            ("client-key: ", "client-kex: ", "client-key"),
            ("kind: Config", "kind: [", "kubeconfig"),
            ("certificate-authority-data: ", "certificate-authority-data: \"?\" #", "base64"),
        ] {
            std::fs::write(&config, good.replacen(from, to, 1)).unwrap();
            let error = load(&config).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(expected), "{from}: {error}");
        }
        std::fs::write(&config, &good).unwrap();
        std::fs::write(&pem, Pki::new().client_pem("admin", &["system:masters"], 0, 600)).unwrap();
        assert!(load(&config).map(|_| ()).unwrap_err().to_string().contains("`admin`"));
        std::fs::remove_file(&pem).unwrap();
        assert!(load(&config).map(|_| ()).unwrap_err().to_string().contains("kubelet.pem"));
    }

    #[test]
    fn node_names_cannot_leave_the_path() {
        for name in ["a", "worker-0", "ip-10-0-0-1.ec2.internal"] {
            assert!(is_dns_name(name), "{name}");
        }
        for name in ["", "a/b", "..", "a?b", "A", "-a", "a-", "a..b", "a b", &"a".repeat(300)] {
            assert!(!is_dns_name(name), "{name}");
        }
    }
}
