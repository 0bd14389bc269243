//! The node's signature engine, `skopeo experimental-image-proxy`: the one program the agent starts.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use cap_std_ext::cmdext::CapStdExtCommandExt as _;
use containers_image_proxy::{Error as ProxyError, ImageProxy, ImageProxyConfig, OpenedImage};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{NodePolicy, RegistryError, Settings};
use crate::model::{PinnedImage, printable};

/// First protocol that evaluates the policy at all; older engines accept everything.
const ENFORCING_PROTOCOL: (u64, u64, u64) = (0, 2, 6);
/// First skopeo whose proxy honours `--policy`; 1.13 speaks the protocol above and ignores the option.
const ENFORCING_SKOPEO: (u64, u64) = (1, 14);
/// Between the engine's own end (SIGTERM at the deadline) and ours; then SIGKILL follows.
const KILL_AFTER: Duration = Duration::from_secs(5);
/// Passed on to the engine: how a unit drop-in tells it about a proxy.
const PROXY_VARIABLES: [&str; 6] = ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"];

/// What the engine read under the verified digest.
pub struct Fetched {
    /// Manifest digest; for an index, that of this architecture's instance.
    pub instance: String,
    /// OCI manifest.
    pub manifest: Vec<u8>,
    /// OCI config.
    pub config: Vec<u8>,
}

/// Identity of the program file whose version was checked last: device, inode, time of change. No time of
/// modification: ostree sets all of them to the same.
type Checked = (u64, u64, i64, i64);

/// The engine and how it is started.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    checked: Mutex<Option<Checked>>,
}

impl Engine {
    /// Starts nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, checked: Mutex::new(None) }
    }

    /// How it was set up.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Has the engine open `image` under `policy`. The child has a deadline, a clean environment, and dies with us.
    pub(super) async fn fetch(
        &self,
        policy: &NodePolicy,
        image: &PinnedImage,
        scope: &str,
    ) -> Result<Fetched, RegistryError> {
        // Later than the engine's last end, so that nothing is left running when this returns.
        let limit = self.settings.deadline.saturating_add(KILL_AFTER.saturating_mul(2));
        match tokio::time::timeout(limit, self.fetch_unbounded(policy, image, scope)).await {
            Ok(result) => result,
            Err(_) => Err(self.deadline(image)),
        }
    }

    async fn fetch_unbounded(
        &self,
        policy: &NodePolicy,
        image: &PinnedImage,
        scope: &str,
    ) -> Result<Fetched, RegistryError> {
        let started = std::time::Instant::now();
        let asked = self.question(policy, image, scope);
        let classify = |error: ProxyError| {
            // The limit of timeout(1) shows as whatever the proxy's end breaks first.
            if started.elapsed() >= self.settings.deadline {
                return self.deadline(image);
            }
            classify(error, &asked)
        };
        self.check_version().await?;
        let bytes = sealed(&policy.bytes).map_err(|e| self.unfit(format!("no sealed memory for the policy: {e}")))?;
        // No registry is involved yet.
        let proxy = ImageProxy::new_with_config(self.config(&bytes, started.elapsed())).await.map_err(|error| {
            let ended = format!("it does not start: {}", printable(&error.to_string(), 400));
            self.unfit(if started.elapsed() < self.settings.deadline { ended } else { format!("{ended} (deadline)") })
        })?;
        drop(bytes);
        let version = proxy.protocol_version();
        if (version.major, version.minor, version.patch) < ENFORCING_PROTOCOL {
            return Err(
                self.unfit(format!("its proxy protocol {version} does not enforce the policy; skopeo 1.14 does"))
            );
        }
        let opened = proxy.open_image(&format!("docker://{image}")).await.map_err(classify)?;
        // `finalize` panics while a request is under way, which it may be after a failure: then the socket's end, or
        // the deadline, ends the engine.
        let fetched = read(&proxy, &opened).await.map_err(classify)?;
        // A proxy that stays is ended by its deadline; what it read has been checked.
        if let Err(error) = proxy.finalize().await {
            tracing::debug!("the engine did not end cleanly: {}", printable(&error.to_string(), 300));
        }
        Ok(fetched)
    }

    fn config(&self, policy: &File, spent: Duration) -> ImageProxyConfig {
        let mut command = self.command(spent);
        command.arg(&self.settings.skopeo);
        command.arg("--policy").arg(format!("/proc/self/fd/{}", policy.as_raw_fd()));
        command.arg("--registries.d").arg(&self.settings.registries_d);
        let authfile = self.authfile().cloned();
        let mut config = ImageProxyConfig::default();
        config.auth_anonymous = authfile.is_none();
        config.authfile = authfile;
        config.certificate_directory = self.settings.cert_dir.clone();
        config.skopeo_cmd = Some(command);
        config
    }

    fn authfile(&self) -> Option<&PathBuf> {
        self.settings.auth_files.iter().find(|path| path.exists())
    }

    /// The kernel ends it with the thread that spawns, which is the runtime's only one and the process's first, or waits
    /// for it; `timeout` bounds what the proxy itself does not. (setpriv(1) would need a system call of @privileged.)
    #[allow(clippy::disallowed_methods, reason = "the one program the agent starts")]
    fn command(&self, spent: Duration) -> Command {
        let left = self.settings.deadline.saturating_sub(spent);
        // Rounded up: an engine that ends before the deadline has another reason to.
        let seconds = left.as_secs().saturating_add(u64::from(left.subsec_nanos() > 0)).max(1);
        let mut command = Command::new("timeout");
        command.lifecycle_bind_to_parent_thread();
        command.arg("-k").arg(KILL_AFTER.as_secs().to_string()).arg(seconds.to_string());
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/nonexistent");
        if let Some(scratch) = &self.settings.scratch {
            command.env("TMPDIR", scratch);
        }
        for name in PROXY_VARIABLES {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command
    }

    /// An engine that ignores `--policy` would fail open, so its version is read before its first use and again
    /// whenever the file changes.
    async fn check_version(&self) -> Result<(), RegistryError> {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(&self.settings.skopeo).map_err(|e| self.unfit(e.to_string()))?;
        let identity = (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
        let checked = || self.checked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *checked() == Some(identity) {
            return Ok(());
        }
        let mut command = self.command(Duration::ZERO);
        command.arg(&self.settings.skopeo).arg("--version").stdin(std::process::Stdio::null());
        let output = tokio::task::spawn_blocking(move || command.output())
            .await
            .map_err(|e| self.unfit(e.to_string()))?
            .map_err(|e| self.unfit(format!("timeout cannot be started: {e}")))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = parse_version(&text).ok_or_else(|| {
            let said = format!("{} {}", text, String::from_utf8_lossy(&output.stderr));
            self.unfit(format!("it does not tell its version: {}", printable(&said, 200)))
        })?;
        if version < ENFORCING_SKOPEO {
            let (major, minor) = version;
            return Err(
                self.unfit(format!("skopeo {major}.{minor} does not enforce the policy it is given; 1.14 does"))
            );
        }
        *checked() = Some(identity);
        Ok(())
    }

    fn unfit(&self, why: impl Into<String>) -> RegistryError {
        RegistryError::Engine { skopeo: self.settings.skopeo.clone(), why: why.into() }
    }

    fn deadline(&self, image: &PinnedImage) -> RegistryError {
        RegistryError::Deadline { image: image.clone(), seconds: self.settings.deadline.as_secs() }
    }

    pub(super) fn question<'a>(&self, policy: &'a NodePolicy, image: &'a PinnedImage, scope: &'a str) -> Question<'a> {
        let credentials = match self.authfile() {
            Some(path) => format!("with the credentials in {}", path.display()),
            None => "without credentials, as there is no ostree auth file".to_owned(),
        };
        let scratch =
            self.settings.scratch.as_ref().map_or_else(|| "/tmp".to_owned(), |path| path.display().to_string());
        Question { image, policy: &policy.path, scope, credentials, scratch }
    }
}

/// What the engine was asked, and how.
pub(super) struct Question<'a> {
    image: &'a PinnedImage,
    policy: &'a Path,
    scope: &'a str,
    credentials: String,
    /// Where GnuPG makes its home.
    scratch: String,
}

fn classify(error: ProxyError, asked: &Question<'_>) -> RegistryError {
    match error {
        ProxyError::RequestInitiationFailure { error, .. } | ProxyError::RetryableRequestFailure { error, .. } => {
            classify_text(&error, asked)
        }
        other => RegistryError::Unreachable { image: asked.image.clone(), why: printable(&other.to_string(), 500) },
    }
}

async fn read(proxy: &ImageProxy, opened: &OpenedImage) -> Result<Fetched, ProxyError> {
    // Under a tampered registry OpenImage may pass and only GetManifest finds out, so both must succeed. The engine
    // stops either document at 4 MiB.
    let (instance, manifest) = proxy.fetch_manifest_raw_oci(opened).await?;
    let config = proxy.fetch_config_raw(opened).await?;
    Ok(Fetched { instance, manifest, config })
}

/// `skopeo version 1.18.0` → (1, 18). Pure.
fn parse_version(text: &str) -> Option<(u64, u64)> {
    let mut parts = text.trim().strip_prefix("skopeo version ")?.split(['.', '-', ' ']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The engine's free text, by anchored match only: what follows an anchor may come from the registry. Pure.
pub(super) fn classify_text(text: &str, asked: &Question<'_>) -> RegistryError {
    const REJECTED: [&str; 17] = [
        "cryptographic signature verification ",
        "invalid signature when validating",
        "Signature for identity ",
        "Signature for digest ",
        "Signature by ",
        "None of the signatures were accepted",
        "Invalid GPG signature",
        "No public keys imported",
        "parsing signature ",
        "Required email ",
        "Unexpected subject hostname",
        "veryfing leaf certificate failed",
        "parsing leaf certificate",
        "missing dev.sigstore.cosign/",
        "Unexpected Fulcio OIDC issuer",
        "Fulcio certificate is missing the issuer extension",
        "No public key verified against the RekorSET",
    ];
    const UNUSABLE: [&str; 5] =
        ["invalid policy in ", "open ", "parsing public key ", "Unknown key ", "no policy.json file"];
    const DAMAGED: [&str; 2] = ["Manifest does not match provided manifest digest", "Download config.json digest "];
    const NO_INSTANCE: [&str; 2] = ["no image found in image index for ", "no image found in manifest list for "];
    let Question { image, scope, policy, scratch, .. } = asked;
    let (image, scope, path) = ((*image).clone(), (*scope).to_owned(), policy.to_path_buf());
    let why = printable(&without_queries(text), 500);
    let starts = |anchors: &[&str]| anchors.iter().any(|anchor| text.starts_with(anchor));
    if text.starts_with("A signature was required, but no signature exists") {
        RegistryError::SignatureMissing { image, scope }
    } else if starts(&REJECTED) {
        // Said of a good signature too: `cosign sign` names no tag, and the default rule wants one.
        let tagless = text.contains(&format!("identity \"{}\" is not accepted", image.name()));
        let hint = if tagless {
            "; it names no tag, as cosign's do: use signedIdentity matchRepository, or sign with \
             --sign-container-identity and a tag"
        } else {
            ""
        };
        RegistryError::SignatureRejected { image, scope, why, hint }
    } else if text == format!("Running image docker://{image} is rejected by policy.") {
        RegistryError::Rejects { path, image, scope }
    } else if starts(&[&format!("mkdir {scratch}/containers-ephemeral-gpg-")]) {
        RegistryError::GpgScratch { scope, why }
    } else if starts(&UNUSABLE) {
        // The engine knows the policy by the name of our descriptor only.
        let named = text.strip_prefix("invalid policy in ").and_then(|rest| rest.split_once(": "));
        let why = named.map_or(why, |(_, rest)| printable(rest, 500));
        RegistryError::Policy { path, why }
    } else if starts(&DAMAGED) {
        RegistryError::Invalid { image, why }
    } else if starts(&NO_INSTANCE) {
        RegistryError::NoInstance { image, why }
    } else {
        classify_transport(text, why, asked)
    }
}

/// A blob store's presigned URLs are long enough to push the cause out of sight, and secret while they last. Pure.
pub(crate) fn without_queries(text: &str) -> String {
    let mut parts = text.split('?');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(['"', ' ']).unwrap_or(part.len());
        out.push_str("?…");
        out.push_str(part.get(end..).unwrap_or_default());
    }
    out
}

/// The rest of [`classify_text`]: between these classes a registry may choose as it likes. Pure.
fn classify_transport(text: &str, why: String, asked: &Question<'_>) -> RegistryError {
    const DENIED: [&str; 3] = [
        "unable to retrieve auth token",
        "Requesting bearer token: invalid status code from registry 403 ",
        "getting username and password: ",
    ];
    let image = asked.image.clone();
    // The last word is that of the registry that the reference names.
    let text = match text.strip_prefix("(Mirrors also failed: [") {
        Some(rest) => rest.rsplit_once(&format!("]): {image}: ")).map_or(rest, |(_, own)| own),
        None => text,
    };
    let host = image.name().split_once('/').map_or(image.name(), |(host, _)| host);
    let after = |anchor: String, words: &[&str]| {
        text.strip_prefix(&anchor).is_some_and(|rest| words.iter().any(|word| rest.starts_with(word)))
    };
    let reading = || format!("reading manifest {} in {}: ", image.digest(), image.name());
    let pinging = format!("pinging container registry {host}: Get \"https://{host}/v2/\": ");
    if after(reading(), &["manifest unknown", "name unknown"]) {
        RegistryError::ManifestMissing(image)
    } else if after(reading(), &["authentication required", "unauthorized", "denied"])
        || DENIED.iter().any(|anchor| text.starts_with(anchor))
    {
        RegistryError::Denied { image, why, credentials: asked.credentials.clone() }
    } else if after(pinging, &["tls: failed to verify certificate: ", "x509: "]) {
        RegistryError::Untrusted { image, why }
    } else {
        RegistryError::Unreachable { image, why }
    }
}

/// `bytes` in memory that nobody can change, inheritable by the child. Not close-on-exec: the engine is the only
/// program the agent starts.
fn sealed(bytes: &[u8]) -> std::io::Result<File> {
    let fd = memfd_create("policy.json", MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    file.rewind()?;
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Reason;
    use crate::registry::reference;

    #[test]
    fn engine_texts_are_classified_by_their_start_only() {
        let hex = "ab".repeat(32);
        let image = reference::parse(&format!("quay.io/o/i@sha256:{hex}")).unwrap();
        let asked = Question {
            image: &image,
            policy: Path::new("/etc/containers/policy.json"),
            scope: "default",
            credentials: "without credentials".into(),
            scratch: "/tmp".into(),
        };
        let manifest = format!("reading manifest sha256:{hex} in quay.io/o/i: ");
        for (text, reason) in [
            ("A signature was required, but no signature exists".to_owned(), Reason::SignatureMissing),
            ("Signature for identity \"x\" is not accepted".to_owned(), Reason::SignatureRejected),
            ("cryptographic signature verification failed: x".to_owned(), Reason::SignatureRejected),
            ("None of the signatures were accepted, reasons: a; b".to_owned(), Reason::SignatureRejected),
            (format!("Running image docker://{image} is rejected by policy."), Reason::PolicyRejects),
            ("open /etc/key.pub: no such file or directory".to_owned(), Reason::PolicyInvalid),
            (format!("{manifest}manifest unknown"), Reason::ManifestMissing),
            (format!("{manifest}authentication required"), Reason::RegistryDenied),
            (
                format!("{manifest}received unexpected HTTP status: 503 Service Unavailable"),
                Reason::RegistryUnreachable,
            ),
            (
                format!("{manifest}unknown: A signature was required, but no signature exists"),
                Reason::RegistryUnreachable,
            ),
            ("reading manifest x: manifest unknown".to_owned(), Reason::RegistryUnreachable),
            ("pinging container registry h: dial tcp".to_owned(), Reason::RegistryUnreachable),
            ("mkdir /tmp/containers-ephemeral-gpg-1: read-only file system".to_owned(), Reason::GpgNeedsScratch),
            ("mkdir /var/containers-ephemeral-gpg-1: no space left on device".to_owned(), Reason::RegistryUnreachable),
            (
                "pinging container registry quay.io: Get \"https://quay.io/v2/\": x509: certificate has expired".into(),
                Reason::RegistryUntrusted,
            ),
            (
                format!("(Mirrors also failed: [m.example: reading manifest]): {image}: {manifest}manifest unknown"),
                Reason::ManifestMissing,
            ),
            (
                format!("(Mirrors also failed: [m]): {image}: A signature was required, but no signature exists"),
                Reason::RegistryUnreachable,
            ),
            ("Manifest does not match provided manifest digest sha256:0".to_owned(), Reason::ImageInvalid),
            (String::new(), Reason::RegistryUnreachable),
        ] {
            assert_eq!(classify_text(&text, &asked).reason(), reason, "{text}");
        }
        let presigned = format!("Get \"https://cdn.example/blob?Signature={}&Token=t\": EOF", "s".repeat(900));
        let error = classify_text(&presigned, &asked).to_string();
        assert!(error.ends_with("Get \"https://cdn.example/blob?…\": EOF"), "{error}");
        let error = classify_text("x\n\u{1b}[2J fake", &asked);
        assert!(!error.to_string().contains(['\n', '\u{1b}']), "{error}");
    }

    #[test]
    fn versions_are_told_apart() {
        assert_eq!(parse_version("skopeo version 1.18.0\n"), Some((1, 18)));
        assert_eq!(parse_version("skopeo version 1.9.3 commit: x"), Some((1, 9)));
        assert_eq!(parse_version("skopeo version 1.22.0-dev"), Some((1, 22)));
        assert_eq!(parse_version("1.18"), None);
        assert!(parse_version("skopeo version 1.9.3").unwrap() < ENFORCING_SKOPEO);
    }

    #[test]
    fn the_policy_bytes_are_sealed() {
        let mut file = sealed(b"{}").unwrap();
        assert!(file.write_all(b"x").is_err());
        assert!(file.set_len(0).is_err());
    }
}
