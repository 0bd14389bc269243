//! Reads the kubelet's kubeconfig and certificate: the address of the API server, and the agent's credentials. Only the
//! functions that read files are not pure.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use openssl::asn1::Asn1Time;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::{X509, X509Ref};
use reqwest::Url;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::ClusterError;
use crate::files::read_bounded;
use crate::model::printable;

/// Largest kubeconfig or PEM file, in bytes; its CA bundle may have dozens of certificates.
const MAX_FILE: u64 = 1 << 20;
/// Prefix of a kubelet's user name, followed by the node's name.
const NODE_USER: &str = "system:node:";

/// The parameters of a connection. Read again for each connection, because the kubelet rotates its certificate and the
/// CA changes.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Access {
    /// `https://host:port`; the server's certificate must be for this host.
    pub server: String,
    /// The host to connect to, if `tls-server-name` differs from it.
    pub host: Option<String>,
    /// `http://host:port`, optionally with user and password.
    pub proxy: Option<Url>,
    /// PEM bundle of the CAs that may sign the server's certificate.
    pub ca: Vec<u8>,
    /// The agent's own credentials.
    pub credentials: Credentials,
    /// The field of our certificate, and the file that it names, if any. For messages.
    pub certificate: Option<String>,
    /// The node's name, from the certificate's CN: on some platforms the hostname differs from it.
    pub node: String,
}

#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    /// PEM file with the certificate chain, and the key in PKCS#8 PEM.
    Certificate { chain: Vec<u8>, key: Vec<u8> },
    /// Bearer token.
    Token(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Config {
    current_context: String,
    clusters: Vec<Named>,
    contexts: Vec<Named>,
    users: Vec<Named>,
}

/// An element of `clusters`, `contexts` or `users`, which has the field of that kind.
#[derive(Deserialize)]
struct Named {
    name: String,
    cluster: Option<Cluster>,
    context: Option<Context>,
    user: Option<User>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority: Option<String>,
    certificate_authority_data: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    proxy_url: Option<String>,
    tls_server_name: Option<String>,
}

#[derive(Deserialize)]
struct Context {
    cluster: String,
    user: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    client_certificate: Option<String>,
    client_key: Option<String>,
    client_certificate_data: Option<String>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<String>,
    exec: Option<IgnoredAny>,
    auth_provider: Option<IgnoredAny>,
    r#as: Option<IgnoredAny>,
}

/// Reads the kubeconfig and the files that it names. `node` is the node's name, for credentials that do not contain it.
///
/// # Errors
/// [`ClusterError::Kubeconfig`]: the file, the field, what is wrong with it and what to do.
pub(super) fn load(path: &Path, node: Option<&str>) -> Result<Access, ClusterError> {
    access(path, node).map_err(|why| ClusterError::Kubeconfig { path: path.to_owned(), why: printable(&why, 400) })
}

fn access(path: &Path, node: Option<&str>) -> Result<Access, String> {
    let text = read_bounded(path, MAX_FILE).map_err(|e| match e.kind() {
        std::io::ErrorKind::PermissionDenied => format!("{e}; only root may read it, so run this as root"),
        _ => format!("{e}; the kubelet writes it when the node joins"),
    })?;
    let text = String::from_utf8(text).map_err(|_| "it is not UTF-8")?;
    let options = serde_saphyr::options! {
        // The lines around an error may contain a key or a token.
        with_snippet: false,
        // A kubeconfig has no aliases, and the library's default limit takes seconds to reach.
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 1_000 },
    };
    let config: Config = serde_saphyr::from_str_with_options(&text, options).map_err(|e| e.to_string())?;
    let context = config.contexts.iter().find(|c| c.name == config.current_context).and_then(|c| c.context.as_ref());
    let context = context.ok_or("current-context: there is no context of this name")?;
    let cluster = config.clusters.iter().find(|c| c.name == context.cluster).and_then(|c| c.cluster.as_ref());
    let cluster = cluster.ok_or("the current context's cluster: there is no cluster of this name")?;
    let user = config.users.iter().find(|u| u.name == context.user).and_then(|u| u.user.as_ref());
    let user = user.ok_or("the current context's user: there is no user of this name")?;
    for (field, used) in
        [("exec", user.exec.is_some()), ("auth-provider", user.auth_provider.is_some()), ("as", user.r#as.is_some())]
    {
        if used {
            return Err(format!(
                "{field}: not supported, because the agent starts no plugin and impersonates no user; set \
                 client-certificate and client-key"
            ));
        }
    }
    let mut files = Files { base: path.parent().unwrap_or(Path::new("/")), read: BTreeMap::new() };

    let (server, host) = server(cluster)?;
    let proxy = given(&cluster.proxy_url).map(proxy).transpose()?;
    if proxy.is_some() && host.is_some() {
        return Err("tls-server-name: not supported together with proxy-url; name the server as its certificate does"
            .to_owned());
    }
    let ca = files.either("certificate-authority", &cluster.certificate_authority_data, &cluster.certificate_authority);
    let (ca, label) =
        ca?.ok_or("certificate-authority: it is missing; set certificate-authority-data to the cluster's CA bundle")?;
    if X509::stack_from_pem(&ca).map_err(|e| format!("{label}: {e}"))?.is_empty() {
        return Err(format!("{label}: it has no certificate; set it to the cluster's CA bundle in PEM"));
    }

    let certificate = files.either("client-certificate", &user.client_certificate_data, &user.client_certificate)?;
    let place = certificate.as_ref().map(|(_, label)| label.clone());
    let (credentials, own) = match certificate {
        Some((pem, label)) => {
            let (public, name) = identity(&pem).map_err(|why| format!("{label}: {why}"))?;
            let key = files.either("client-key", &user.client_key_data, &user.client_key)?;
            let (key, label) = key.ok_or("client-key: it is missing; set it to the key of client-certificate")?;
            let key = pkcs8(&key, &public).map_err(|why| format!("{label}: {why}"))?;
            (Credentials::Certificate { chain: pem, key }, name)
        }
        // The API server also prefers a certificate over a token.
        None => (Credentials::Token(token(user, &mut files)?), "a token".to_owned()),
    };
    let node = match (own.strip_prefix(NODE_USER), node) {
        (Some(own), Some(node)) if own != node => {
            return Err(format!("client-certificate: it belongs to the node {own}, and --node-name is {node}"));
        }
        (Some(node), _) | (None, Some(node)) => node,
        (None, None) => {
            return Err(format!(
                "client-certificate: the user is {own}, not {NODE_USER}<name>; use the kubelet's kubeconfig, or name \
                 the node with --node-name"
            ));
        }
    };
    if !is_dns_name(node) {
        return Err(format!("`{}` is not a valid node name", printable(node, 100)));
    }
    Ok(Access { server, host, proxy, ca, credentials, certificate: place, node: node.to_owned() })
}

impl Access {
    /// A sentence with the time of expiry, if our certificate has expired by this node's clock.
    pub(super) fn expired(&self) -> Option<String> {
        let Credentials::Certificate { chain, .. } = &self.credentials else { return None };
        let certificate = X509::from_pem(chain).ok()?;
        let now = Asn1Time::days_from_now(0).ok()?;
        let expired = certificate.not_after().compare(&now).ok()? == Ordering::Less;
        let place = self.certificate.as_deref().unwrap_or_default();
        expired.then(|| format!("{place} expired at {}", certificate.not_after()))
    }
}

/// The value, if it is not empty: every Kubernetes client treats an empty value as absent.
fn given(value: &Option<String>) -> Option<&str> {
    value.as_deref().filter(|value| !value.is_empty())
}

/// The URL of the server, and the host to connect to if it differs.
fn server(cluster: &Cluster) -> Result<(String, Option<String>), String> {
    if cluster.insecure_skip_tls_verify {
        return Err("insecure-skip-tls-verify: it is not supported; set certificate-authority-data".to_owned());
    }
    let mut url = Url::parse(&cluster.server).map_err(|e| format!("server: {e}; it must be https://host:port"))?;
    let bare = url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
    if url.scheme() != "https" || !bare || url.password().is_some() {
        return Err("server: it must be https://host:port and nothing else".to_owned());
    }
    let mut host = None;
    if let Some(name) = given(&cluster.tls_server_name) {
        host = url.host_str().map(|host| host.trim_matches(['[', ']']).to_owned());
        if !is_dns_name(name) || url.set_host(Some(name)).is_err() || url.domain().is_none() {
            return Err(
                "tls-server-name: it is not a host name; set a name that the server's certificate has".to_owned()
            );
        }
    }
    Ok((url.as_str().trim_end_matches('/').to_owned(), host))
}

/// Parses the proxy's URL. Only plain HTTP to the proxy is supported; the connection through it is TLS from end to end.
fn proxy(text: &str) -> Result<Url, String> {
    const ESCAPE: &str = "write `%` as %25, `#` as %23, `/` as %2F and `?` as %3F in user and password";
    let url = Url::parse(text).map_err(|e| format!("proxy-url: {e}; it must be http://host:port, and {ESCAPE}"))?;
    if url.scheme() != "http" || url.host_str().is_none() {
        return Err("proxy-url: it must be http://host:port, with or without user:password@".to_owned());
    }
    // An unescaped one of these would silently cut off or change the password.
    let is_escaped = |part: &str| part.get(..2).is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
    let raw = text.split('%').skip(1).any(|part| !is_escaped(part));
    if raw || url.fragment().is_some() || url.query().is_some() || !matches!(url.path(), "" | "/") {
        return Err(format!("proxy-url: it must be http://user:password@host:port; {ESCAPE}"));
    }
    Ok(url)
}

fn token(user: &User, files: &mut Files<'_>) -> Result<String, String> {
    // The file takes precedence, because it is renewed.
    let (token, label) = match (given(&user.token_file), given(&user.token)) {
        (Some(file), _) => {
            let label = format!("tokenFile {file}");
            let bytes = files.read(file).map_err(|e| format!("{label}: {e}"))?;
            (String::from_utf8(bytes).unwrap_or_default(), label)
        }
        (None, Some(token)) => (token.to_owned(), "token".to_owned()),
        (None, None) => {
            let why = "client-certificate and token: both are missing; use the kubelet's kubeconfig";
            return Err(why.to_owned());
        }
    };
    let token = token.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!("{label}: it has no bearer token"));
    }
    Ok(token.to_owned())
}

/// Reads every file once: the kubelet's certificate and key are in one file, which may be replaced at any time.
struct Files<'a> {
    base: &'a Path,
    read: BTreeMap<PathBuf, Vec<u8>>,
}

impl Files<'_> {
    /// Reads a file. Relative paths are relative to the kubeconfig, as in every Kubernetes client.
    fn read(&mut self, file: &str) -> std::io::Result<Vec<u8>> {
        let path = self.base.join(file);
        if let Some(bytes) = self.read.get(&path) {
            return Ok(bytes.clone());
        }
        let bytes = read_bounded(&path, MAX_FILE)?;
        self.read.insert(path, bytes.clone());
        Ok(bytes)
    }

    /// The content of `<field>-data`, or of the file that `<field>` names, and a label for errors.
    fn either(
        &mut self,
        field: &str,
        data: &Option<String>,
        file: &Option<String>,
    ) -> Result<Option<(Vec<u8>, String)>, String> {
        match (given(data), given(file)) {
            (Some(data), _) => {
                let data: String = data.split_whitespace().collect();
                let bytes =
                    openssl::base64::decode_block(&data).map_err(|_| format!("{field}-data: it is not base64"))?;
                Ok(Some((bytes, format!("{field}-data"))))
            }
            (None, Some(file)) => {
                let label = format!("{field} {file}");
                let bytes = self.read(file).map_err(|e| format!("{label}: {e}; the kubelet keeps it up to date"))?;
                Ok(Some((bytes, label)))
            }
            (None, None) => Ok(None),
        }
    }
}

/// The first certificate of a PEM file, and its user.
fn identity(pem: &[u8]) -> Result<(X509, String), String> {
    let chain = X509::stack_from_pem(pem).map_err(|e| format!("it cannot be parsed: {e}"))?;
    let leaf = chain.into_iter().next().ok_or("it has no certificate")?;
    let name = leaf.subject_name().entries_by_nid(Nid::COMMONNAME).next().and_then(|cn| cn.data().to_string().ok());
    let name = printable(&name.unwrap_or_default(), 300);
    Ok((leaf, name))
}

/// Whether `name` is an RFC 1123 subdomain, as node names are. Such a name is safe in the path of a URL.
fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// Converts the key to PKCS#8, the only form that reqwest accepts with OpenSSL. The kubelet writes SEC1 (`EC PRIVATE
/// KEY`).
fn pkcs8(pem: &[u8], certificate: &X509Ref) -> Result<Vec<u8>, String> {
    // The callback prevents a prompt for a passphrase on the terminal, so an encrypted key is refused.
    let key = PKey::private_key_from_pem_callback(pem, |_| Ok(0))
        .map_err(|_| "it has no readable key; the key must be PEM and not encrypted")?;
    let public = certificate.public_key().map_err(|e| e.to_string())?;
    if !public.public_eq(&key) {
        return Err("it is not the key of client-certificate; right after a rotation this corrects itself".to_owned());
    }
    key.private_key_to_pem_pkcs8().map_err(|e| format!("the key cannot be converted: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use openssl::ec::{EcGroup, EcKey};
    use openssl::hash::MessageDigest;
    use openssl::x509::X509Name;

    /// A self-signed certificate of `user`, then its key in SEC1, as in the kubelet's file.
    fn certificate(user: &str) -> Vec<u8> {
        let ec = EcKey::generate(&EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap()).unwrap();
        let key = PKey::from_ec_key(ec.clone()).unwrap();
        let mut name = X509Name::builder().unwrap();
        name.append_entry_by_nid(Nid::COMMONNAME, user).unwrap();
        let name = name.build();
        let mut builder = X509::builder().unwrap();
        builder.set_subject_name(&name).unwrap();
        builder.set_issuer_name(&name).unwrap();
        builder.set_pubkey(&key).unwrap();
        builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
        builder.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        [builder.build().to_pem().unwrap(), ec.private_key_to_pem().unwrap()].concat()
    }

    fn tree() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let (config, pem) = (directory.path().join("kubeconfig"), directory.path().join("kubelet.pem"));
        std::fs::write(&pem, certificate("system:node:worker-0.example.com")).unwrap();
        let authority = openssl::base64::encode_block(&certificate("authority"));
        let client = pem.display();
        let text = format!(
            "kind: Config
current-context: default-context
clusters:
- cluster:
    certificate-authority-data: {authority}
    server: https://127.0.0.1:6443/
  name: default-cluster
contexts:
- context:
    cluster: default-cluster
    user: default-auth
  name: default-context
users:
- name: default-auth
  user:
    client-certificate: {client}
    client-key: {client}
"
        );
        std::fs::write(&config, text).unwrap();
        (directory, config, pem)
    }

    #[test]
    fn a_kubelets_kubeconfig_is_read() {
        let (_directory, config, _) = tree();
        let access = load(&config, None).unwrap();
        assert_eq!(access.server, "https://127.0.0.1:6443");
        assert_eq!(access.node, "worker-0.example.com");
        let Credentials::Certificate { chain, key } = access.credentials else { panic!("a certificate") };
        assert!(key.starts_with(b"-----BEGIN PRIVATE KEY-----"));
        assert!(chain.starts_with(b"-----BEGIN CERTIFICATE-----"));
    }

    #[test]
    fn errors_have_the_field_or_file_and_the_fault() {
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
            let error = load(&config, None).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(expected), "{from}: {error}");
        }
        std::fs::write(&config, &good).unwrap();
        std::fs::write(&pem, certificate("admin")).unwrap();
        assert!(load(&config, None).map(|_| ()).unwrap_err().to_string().contains("the user is admin"));
        std::fs::remove_file(&pem).unwrap();
        assert!(load(&config, None).map(|_| ()).unwrap_err().to_string().contains("kubelet.pem"));
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
