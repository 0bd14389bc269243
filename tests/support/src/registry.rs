//! A real registry on the loopback interface, and a client that pushes to it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::{Certificate, Client, Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::image::{Blob, ImageSpec, Manifest, Media, Pushed};
use crate::tools;

/// Longest answer of a registry, and longest upload.
const DEADLINE: Duration = Duration::from_secs(30);

/// Distinguishes this registry from another one that won the race for its port.
const NAME_HEADER: &str = "x-test-registry";

/// The server's certificate and key, as PEM texts.
#[derive(Clone, Debug)]
pub struct ServerTls {
    /// The server's certificate, valid for the address 127.0.0.1.
    pub cert_pem: String,
    /// Its private key.
    pub key_pem: String,
    /// The CA that signed it.
    pub ca_pem: String,
}

/// A user of a registry, with the line for an htpasswd file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub user: &'static str,
    /// The password.
    pub password: &'static str,
    htpasswd: &'static str,
}

impl Credentials {
    /// The only user. Registries need bcrypt, so the hash is a constant instead of computed.
    pub const PULLER: Self = Self {
        user: "puller",
        password: "rebase",
        htpasswd: "puller:$2y$04$abcdefghijklmnopqrstuueIuZpdqriemtZLJAPuHhHHJQ7D8clNW\n",
    };

    /// An auth file (`auth.json`, `/etc/ostree/auth.json`) with this user's credentials for that host.
    pub fn auth_file(&self, host: &str) -> Value {
        let auth = openssl::base64::encode_block(format!("{}:{}", self.user, self.password).as_bytes());
        json!({ "auths": { host: { "auth": auth } } })
    }
}

/// `docker-registry` serving TLS on 127.0.0.1 with its storage on disk. It is killed when this is dropped, and when
/// the thread that started it ends.
#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    port: u16,
    name: String,
    credentials: Option<Credentials>,
    client: Client,
    child: Option<Child>,
}

impl Registry {
    /// Starts a registry that allows anonymous push and pull. `dir` keeps its storage, configuration and log.
    pub async fn start(dir: &Path, tls: ServerTls) -> Result<Self> {
        Self::start_with(dir, tls, None).await
    }

    /// Starts a registry that requires these credentials for every request.
    pub async fn start_with_password(dir: &Path, tls: ServerTls, credentials: Credentials) -> Result<Self> {
        Self::start_with(dir, tls, Some(credentials)).await
    }

    /// Starts a registry on that port of 127.0.0.1, or fails.
    pub async fn start_on(dir: &Path, tls: ServerTls, credentials: Option<Credentials>, port: u16) -> Result<Self> {
        let mut registry = Self::prepare(dir, tls, credentials)?;
        registry.listen_on(port).await?;
        Ok(registry)
    }

    async fn start_with(dir: &Path, tls: ServerTls, credentials: Option<Credentials>) -> Result<Self> {
        let mut registry = Self::prepare(dir, tls, credentials)?;
        // Another process may take the port between the check and the server's bind.
        let mut failure = None;
        for _ in 0..5 {
            match registry.listen_on(tools::free_port()).await {
                Ok(()) => return Ok(registry),
                Err(error) if format!("{error:#}").contains("address already in use") => failure = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(failure.expect("a failure after five attempts"))
    }

    async fn listen_on(&mut self, port: u16) -> Result<()> {
        self.port = port;
        self.name = format!("{}-{port}", std::process::id());
        self.spawn().await
    }

    fn prepare(dir: &Path, tls: ServerTls, credentials: Option<Credentials>) -> Result<Self> {
        let dir = std::path::absolute(dir)?;
        for sub in ["storage", "tls", "certs"] {
            fs::create_dir_all(dir.join(sub)).with_context(|| format!("creating {sub} in {}", dir.display()))?;
        }
        fs::write(dir.join("tls/server.pem"), &tls.cert_pem)?;
        fs::write(dir.join("tls/server.key"), &tls.key_pem)?;
        fs::write(dir.join("certs/ca.crt"), &tls.ca_pem)?;
        if let Some(credentials) = credentials {
            fs::write(dir.join("htpasswd"), credentials.htpasswd)?;
        }
        // Connections are not kept: the registry may be stopped, and the test's runtime may end, at any time.
        let client = Client::builder()
            .no_proxy()
            .tls_certs_only([Certificate::from_pem(tls.ca_pem.as_bytes())?])
            .pool_max_idle_per_host(0)
            .timeout(DEADLINE)
            .build()?;
        Ok(Self { dir, port: 0, name: String::new(), credentials, client, child: None })
    }

    /// `127.0.0.1:PORT`, the first part of references to its images.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A directory with the CA, as for skopeo's `--cert-dir` and `certs.d`.
    pub fn cert_dir(&self) -> PathBuf {
        self.dir.join("certs")
    }

    /// Kills the server. Its storage and its port remain.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // A server that has already exited is fine.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts the server again on the same port with the same storage, killing it first if it runs.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop();
        self.spawn().await
    }

    /// Builds an image and uploads it. The tag names the index, or the only manifest.
    pub async fn push(&self, repo: &str, tag: &str, spec: &ImageSpec) -> Result<Pushed> {
        let image = spec.build();
        for blob in &image.blobs {
            self.put_blob(repo, blob).await?;
        }
        let mut instance_digests = BTreeMap::new();
        for (architecture, manifest) in &image.instances {
            self.put_manifest(repo, &manifest.digest, manifest).await?;
            instance_digests.insert(architecture.clone(), manifest.digest.clone());
        }
        let top = image.top();
        self.put_manifest(repo, tag, top).await?;
        Ok(Pushed { host: self.host(), repo: repo.into(), digest: top.digest.clone(), instance_digests })
    }

    /// Uploads a blob, unless the repository has it.
    pub async fn put_blob(&self, repo: &str, blob: &Blob) -> Result<()> {
        let known = self.send(Method::HEAD, &format!("{repo}/blobs/{}", blob.digest), HeaderMap::new(), vec![]).await?;
        if known.status() == StatusCode::OK {
            return Ok(());
        }
        let upload = self.send(Method::POST, &format!("{repo}/blobs/uploads/"), HeaderMap::new(), vec![]).await?;
        let upload = expect(StatusCode::ACCEPTED, upload).await?;
        let location = upload.headers().get(LOCATION).context("an upload without a location")?.to_str()?;
        let mut url = upload.url().join(location)?;
        url.query_pairs_mut().append_pair("digest", &blob.digest);
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, "application/octet-stream".parse()?)]);
        expect(StatusCode::CREATED, self.request(Method::PUT, url, headers, blob.bytes.clone()).await?).await?;
        Ok(())
    }

    /// Uploads a manifest under a tag or its own digest.
    pub async fn put_manifest(&self, repo: &str, reference: &str, manifest: &Manifest) -> Result<()> {
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, manifest.media_type.parse()?)]);
        let path = format!("{repo}/manifests/{reference}");
        let response = self.send(Method::PUT, &path, headers, manifest.bytes.clone()).await?;
        expect(StatusCode::CREATED, response).await?;
        Ok(())
    }

    /// The manifest of that tag or digest; `None` if it does not exist.
    pub async fn manifest(&self, repo: &str, reference: &str) -> Result<Option<Manifest>> {
        let headers = [Media::Oci, Media::Docker2]
            .iter()
            .flat_map(|media| [media.manifest(), media.index()])
            .map(|media_type| Ok((ACCEPT, media_type.parse()?)))
            .collect::<Result<HeaderMap>>()?;
        let response = self.send(Method::GET, &format!("{repo}/manifests/{reference}"), headers, vec![]).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let response = expect(StatusCode::OK, response).await?;
        let media_type =
            response.headers().get(CONTENT_TYPE).context("a manifest without a type")?.to_str()?.to_string();
        let Blob { digest, bytes } = Blob::new(response.bytes().await?.to_vec());
        Ok(Some(Manifest { media_type, digest, bytes }))
    }

    /// Makes a manifest and the tags that name it unavailable.
    pub async fn delete_manifest(&self, repo: &str, digest: &str) -> Result<()> {
        let path = format!("{repo}/manifests/{digest}");
        expect(StatusCode::ACCEPTED, self.send(Method::DELETE, &path, HeaderMap::new(), vec![]).await?).await?;
        Ok(())
    }

    async fn send(&self, method: Method, path: &str, headers: HeaderMap, body: Vec<u8>) -> Result<Response> {
        self.request(method, format!("https://{}/v2/{path}", self.host()).parse()?, headers, body).await
    }

    async fn request(&self, method: Method, url: reqwest::Url, headers: HeaderMap, body: Vec<u8>) -> Result<Response> {
        let shown = format!("{method} {url}");
        let mut request = self.client.request(method, url).headers(headers).body(body);
        if let Some(credentials) = self.credentials {
            request = request.basic_auth(credentials.user, Some(credentials.password));
        }
        request.send().await.context(shown)
    }

    async fn spawn(&mut self) -> Result<()> {
        let config = self.dir.join("config.yml");
        fs::write(&config, self.config().to_string())?;
        let log = self.log_path();
        let output = File::create(&log)?;
        let child = tools::child(&tools::docker_registry()?)
            .arg("serve")
            .arg(&config)
            // REGISTRY_* would override the configuration.
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("starting the registry")?;
        self.child = Some(child);
        let answer = self.wait_for_answer().await;
        if answer.is_err() {
            self.stop();
        }
        answer.with_context(|| format!("registry at {}: {}", self.host(), fs::read_to_string(&log).unwrap_or_default()))
    }

    async fn wait_for_answer(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            let answer = self.send(Method::GET, "", HeaderMap::new(), vec![]).await;
            if let Some(status) = self.child.as_mut().context("stopped")?.try_wait()? {
                bail!("ended with {status}");
            }
            match answer {
                Ok(response) => {
                    let name = response.headers().get(NAME_HEADER).map(|name| name.as_bytes());
                    ensure!(name == Some(self.name.as_bytes()), "another server: address already in use");
                    expect(StatusCode::OK, response).await?;
                    return Ok(());
                }
                Err(error) if start.elapsed() > DEADLINE => return Err(error.context("no answer")),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// JSON is also YAML.
    fn config(&self) -> Value {
        let mut config = json!({
            "version": "0.1",
            "log": { "level": "error", "accesslog": { "disabled": true } },
            "storage": {
                "filesystem": { "rootdirectory": self.dir.join("storage") },
                "delete": { "enabled": true },
                "maintenance": { "uploadpurging": { "enabled": false } },
            },
            "http": {
                "addr": self.host(),
                "secret": self.name,
                "headers": { NAME_HEADER: [self.name] },
                "tls": { "certificate": self.dir.join("tls/server.pem"), "key": self.dir.join("tls/server.key") },
            },
        });
        if self.credentials.is_some() {
            config["auth"] = json!({ "htpasswd": { "realm": "tests", "path": self.dir.join("htpasswd") } });
        }
        config
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("registry.log")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn expect(status: StatusCode, response: Response) -> Result<Response> {
    if response.status() != status {
        let shown = format!("{} from {}", response.status(), response.url());
        bail!("{shown}: {}", response.text().await.unwrap_or_default());
    }
    Ok(response)
}

/// Certificates and a registry for the tests of this crate, independent of other modules.
#[cfg(test)]
pub(crate) mod testing {
    use openssl::asn1::Asn1Time;
    use openssl::bn::BigNum;
    use openssl::ec::{EcGroup, EcKey};
    use openssl::hash::MessageDigest;
    use openssl::nid::Nid;
    use openssl::pkey::{PKey, Private};
    use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
    use openssl::x509::{X509, X509Builder, X509NameBuilder};
    use tempfile::TempDir;

    use super::*;

    pub(crate) fn tls() -> ServerTls {
        let (ca_key, key) = (new_key(), new_key());
        let mut ca = certificate("ca", "ca", 1, &ca_key);
        ca.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        ca.sign(&ca_key, MessageDigest::sha256()).unwrap();
        let mut server = certificate("server", "ca", 2, &key);
        let address = SubjectAlternativeName::new().ip("127.0.0.1").build(&server.x509v3_context(None, None)).unwrap();
        server.append_extension(address).unwrap();
        server.sign(&ca_key, MessageDigest::sha256()).unwrap();
        let pem = |certificate: X509| String::from_utf8(certificate.to_pem().unwrap()).unwrap();
        ServerTls {
            cert_pem: pem(server.build()),
            key_pem: String::from_utf8(key.private_key_to_pem_pkcs8().unwrap()).unwrap(),
            ca_pem: pem(ca.build()),
        }
    }

    fn new_key() -> PKey<Private> {
        let curve = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        PKey::from_ec_key(EcKey::generate(&curve).unwrap()).unwrap()
    }

    fn certificate(subject: &str, issuer: &str, serial: u32, key: &PKey<Private>) -> X509Builder {
        let name = |common: &str| {
            let mut name = X509NameBuilder::new().unwrap();
            name.append_entry_by_text("CN", common).unwrap();
            name.build()
        };
        let mut builder = X509::builder().unwrap();
        builder.set_version(2).unwrap();
        builder.set_serial_number(&BigNum::from_u32(serial).unwrap().to_asn1_integer().unwrap()).unwrap();
        builder.set_subject_name(&name(subject)).unwrap();
        builder.set_issuer_name(&name(issuer)).unwrap();
        builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
        builder.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
        builder.set_pubkey(key).unwrap();
        builder
    }

    pub(crate) async fn registry() -> (TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::start(dir.path(), tls()).await.unwrap();
        (dir, registry)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{registry, tls};
    use super::*;

    #[tokio::test]
    async fn pulled_image_equals_the_built_one() {
        let (_dir, registry) = registry().await;
        let spec = ImageSpec::new("9.6.1").payload_mib(2);
        let pushed = registry.push("ns/os", "one", &spec).await.unwrap();
        let manifest = registry.manifest("ns/os", "one").await.unwrap().unwrap();
        assert_eq!(manifest.digest, pushed.digest);
        assert_eq!(manifest.media_type, Media::Oci.manifest());
        assert_eq!(pushed.pullspec(), format!("{}/ns/os@{}", registry.host(), manifest.digest));
        assert_eq!(registry.push("ns/os", "one", &spec).await.unwrap(), pushed);
        assert!(registry.manifest("ns/os", "two").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn pulled_index_has_its_instances() {
        let (_dir, registry) = registry().await;
        for media in [Media::Oci, Media::Docker2] {
            let spec = ImageSpec::default().architectures(["amd64", "arm64"]).media(media);
            let pushed = registry.push("ns/os", "list", &spec).await.unwrap();
            let index = registry.manifest("ns/os", &pushed.digest).await.unwrap().unwrap();
            assert_eq!((index.media_type.as_str(), &index.digest), (media.index(), &pushed.digest));
            for digest in pushed.instance_digests.values() {
                assert_eq!(registry.manifest("ns/os", digest).await.unwrap().unwrap().media_type, media.manifest());
            }
        }
    }

    #[tokio::test]
    async fn images_survive_a_restart_on_the_same_port() {
        let (_dir, mut registry) = registry().await;
        let pushed = registry.push("os", "one", &ImageSpec::default()).await.unwrap();
        registry.stop();
        assert!(registry.manifest("os", "one").await.is_err());
        registry.restart().await.unwrap();
        assert_eq!(registry.manifest("os", "one").await.unwrap().unwrap().digest, pushed.digest);
        registry.delete_manifest("os", &pushed.digest).await.unwrap();
        assert!(registry.manifest("os", "one").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn registry_can_require_a_password() {
        let dir = tempfile::tempdir().unwrap();
        let mut registry = Registry::start_with_password(dir.path(), tls(), Credentials::PULLER).await.unwrap();
        registry.push("os", "one", &ImageSpec::default()).await.unwrap();
        assert_eq!(
            Credentials::PULLER.auth_file("a.example"),
            json!({ "auths": { "a.example": { "auth": "cHVsbGVyOnJlYmFzZQ==" } } })
        );
        registry.credentials = None;
        let error = registry.manifest("os", "one").await.unwrap_err().to_string();
        assert!(error.starts_with("401 Unauthorized"), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_cannot_start_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let tls = ServerTls { key_pem: "no key".into(), ..tls() };
        let error = format!("{:#}", Registry::start(dir.path(), tls).await.unwrap_err());
        assert!(error.contains("failed to find any PEM data"), "{error}");
    }

    #[tokio::test]
    async fn a_taken_port_is_recognised() {
        let (_dir, registry) = registry().await;
        let (_other_dir, mut other) = testing::registry().await;
        other.port = registry.port;
        let error = format!("{:#}", other.restart().await.unwrap_err());
        assert!(error.contains("address already in use"), "{error}");
    }
}
