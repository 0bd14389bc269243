//! The node's signature engine, `skopeo experimental-image-proxy`: the one program the agent starts.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cap_std_ext::cmdext::CapStdExtCommandExt as _;
use containers_image_proxy::{Error as ProxyError, ImageProxy, ImageProxyConfig, OpenedImage};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::engine_text::{Level, Question, Unsigned, classify_text, is_scarcity, signature_tag, where_to_sign};
use super::proxy::{MAX_PROXY_FILE, PROXY_FILE, PROXY_VARIABLES};
use super::{NodePolicy, Settings, TrustError, mirrors, proxy};
use crate::files::read_bounded;
use crate::model::{PinnedImage, printable};

/// First protocol that evaluates the policy at all; older engines accept everything.
const ENFORCING_PROTOCOL: (u64, u64, u64) = (0, 2, 6);
/// First skopeo whose proxy honours `--policy`; 1.13 speaks the protocol above and ignores the option.
const ENFORCING_SKOPEO: (u64, u64) = (1, 14);
/// Between the limit of an engine's start and that of the whole verification.
const START_MARGIN: Duration = Duration::from_millis(100);
/// For an engine to end by itself once all is read; it is ended after that.
const FINALIZE: Duration = Duration::from_secs(5);
/// For a look at where an unsigned image is; without an answer by then the refusal says less.
const LOOK: Duration = Duration::from_secs(10);
/// For that look alone, whose outcome is words.
const NO_DEMANDS: &[u8] = br#"{"default":[{"type":"insecureAcceptAnything"}]}"#;
/// Largest auth file read, in bytes; a cluster's pull secret comes to a few kilobytes.
const MAX_AUTH_FILE: u64 = 1 << 20;
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

/// The engine and how it is started. Clones share everything.
#[derive(Clone, Debug)]
pub struct Engine {
    settings: Arc<Settings>,
    checked: Arc<Mutex<Option<Checked>>>,
    /// Held while one runs: a series of retargets must not leave a series of engines.
    one: Arc<tokio::sync::Mutex<()>>,
}

impl Engine {
    /// Starts nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings: Arc::new(settings), checked: Arc::default(), one: Arc::default() }
    }

    /// How it was set up.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Has the engine open `image` under `policy`. The child has a deadline, a clean environment, and ends with this
    /// future: the kernel ends it with the thread that started it, so that it gets a thread of its own.
    pub(super) async fn fetch(
        &self,
        policy: &NodePolicy,
        image: &PinnedImage,
        scope: &str,
    ) -> Result<Fetched, TrustError> {
        let one = Arc::clone(&self.one).lock_owned().await;
        let asked = self.question(policy, image, scope);
        let (engine, bytes) = (self.clone(), policy.bytes.clone());
        let (mut answer, answered) = tokio::sync::oneshot::channel();
        let work = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(answer.send(Err(engine.broken("no runtime", &error)))),
            };
            let result = runtime.block_on(async {
                let result = tokio::select! {
                    result = engine.fetch_bounded(&bytes, &asked) => Some(result),
                    () = answer.closed() => None,
                };
                // Who waits for the engine is queued before this, and by now begun: else it would be dropped with the
                // runtime, and the engine never reaped.
                let _ = tokio::task::spawn_blocking(|| ()).await;
                result
            });
            // Threads of the runtime may still wait for the engine, which ends, and is reaped there, once this one has.
            runtime.shutdown_background();
            if let Some(result) = result {
                // Who asked may be gone by now.
                let _ = answer.send(result);
            }
            drop(one);
        };
        let started = std::thread::Builder::new().name("engine".to_owned()).spawn(work);
        started.map_err(|error| self.broken("no thread for the engine", &error))?;
        answered.await.unwrap_or_else(|_| Err(self.unfit("its thread ended without an answer")))
    }

    async fn fetch_bounded(&self, policy: &[u8], asked: &Question) -> Result<Fetched, TrustError> {
        // Later than the limit of a start, which names the engine.
        let limit = self.settings.deadline.saturating_add(START_MARGIN);
        let result = tokio::time::timeout(limit, self.fetch_unbounded(policy, asked)).await;
        match result.unwrap_or_else(|_| Err(self.deadline(&asked.image))) {
            // The engine passes over a proxy whose URL it does not understand, or asks a host that is none.
            Err(error @ (TrustError::Unreachable { .. } | TrustError::Deadline { .. })) => {
                Err(self.faulty_proxy().unwrap_or(error))
            }
            result => result,
        }
    }

    async fn fetch_unbounded(&self, policy: &[u8], asked: &Question) -> Result<Fetched, TrustError> {
        let started = std::time::Instant::now();
        let image = &asked.image;
        let classify = |error: ProxyError| classify(error, asked);
        // Until it has started, no registry can be what is slow.
        let left = || self.settings.deadline.saturating_sub(started.elapsed());
        let silent = |_| self.unfit("it does not start (deadline)");
        tokio::time::timeout(left(), self.check_version()).await.map_err(silent)??;
        let bytes = sealed(policy).map_err(|error| self.broken("no sealed memory for the policy", &error))?;
        // No registry is involved yet.
        let begun =
            tokio::time::timeout(left(), ImageProxy::new_with_config(self.config(&bytes))).await.map_err(silent)?;
        let proxy = begun.map_err(|error| {
            let text = error.to_string();
            let scarce = match &error {
                ProxyError::SkopeoSpawnError(error) | ProxyError::Io(error) => is_scarce(error),
                _ => is_scarcity(&text),
            };
            let ended = format!("it does not start: {}", printable(&text, 400));
            if scarce {
                return self.scarce(ended);
            }
            self.unfit(ended)
        })?;
        drop(bytes);
        let version = proxy.protocol_version();
        if (version.major, version.minor, version.patch) < ENFORCING_PROTOCOL {
            return Err(
                self.unfit(format!("its proxy protocol {version} does not enforce the policy; skopeo 1.14 does"))
            );
        }
        let opened = match proxy.open_image(&format!("docker://{image}")).await.map_err(classify) {
            Err(TrustError::SignatureMissing { image, scope, .. }) => {
                let found = tokio::time::timeout(left().min(LOOK), self.look(&proxy, asked)).await.unwrap_or_default();
                return Err(TrustError::SignatureMissing { image, scope, hint: where_to_sign(asked, &found) });
            }
            opened => opened?,
        };
        // `finalize` panics while a request is under way, which it may be after a failure: then the end of the thread
        // ends the engine.
        let fetched = read(&proxy, &opened).await.map_err(classify)?;
        // What it read has been checked; one that stays is ended with its thread.
        match tokio::time::timeout(FINALIZE, proxy.finalize()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("the engine did not end cleanly: {}", printable(&error.to_string(), 300)),
            Err(_) => tracing::debug!("the engine did not end by itself"),
        }
        Ok(fetched)
    }

    /// Where an image without a signature is, and what it is. `enforcing` is the engine that refused it.
    async fn look(&self, enforcing: &ImageProxy, asked: &Question) -> Unsigned {
        let mut found = Unsigned::default();
        let Ok(policy) = sealed(NO_DEMANDS) else { return found };
        let Ok(proxy) = ImageProxy::new_with_config(self.config(&policy)).await else { return found };
        let (name, digest) = (asked.image.name(), asked.image.digest().as_str());
        for mirror in &asked.mirrors {
            if proxy.open_image(&format!("docker://{mirror}@{digest}")).await.is_ok() {
                found.mirror = Some(mirror.clone());
                break;
            }
        }
        found.looked = true;
        let place = found.mirror.as_deref().unwrap_or(name);
        found.attached = proxy.open_image(&format!("docker://{place}:{}", signature_tag(digest))).await.is_ok();
        let Ok(opened) = proxy.open_image(&format!("docker://{name}@{digest}")).await else { return found };
        let Ok((instance, _)) = proxy.fetch_manifest_raw_oci(&opened).await else { return found };
        found.level = if instance == digest {
            Level::Image
        } else if enforcing.open_image(&format!("docker://{name}@{instance}")).await.is_ok() {
            Level::SignedInstance(printable(&instance, 100))
        } else {
            Level::Index
        };
        found
    }

    fn config(&self, policy: &File) -> ImageProxyConfig {
        let mut command = self.command();
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

    /// The kernel ends it, by SIGTERM, with the thread that spawns it. Not through timeout(1): a signal that meets that
    /// between its fork and its note of the child leaves the child behind, without a deadline, and skopeo in the middle
    /// of a request does not notice that its socket was closed.
    #[allow(clippy::disallowed_methods, reason = "the one program the agent starts")]
    fn command(&self) -> Command {
        let mut command = Command::new(&self.settings.skopeo);
        command.lifecycle_bind_to_parent_thread();
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/nonexistent");
        if let Some(scratch) = &self.settings.scratch {
            command.env("TMPDIR", scratch);
        }
        command.envs(self.proxies().into_iter().map(|(name, value, _)| (name, value)));
        command
    }

    /// The proxy's variables, and where each is from.
    fn proxies(&self) -> Vec<(&'static str, String, String)> {
        let file = self.proxy_file();
        let in_file = proxy::variables(&file);
        let of = |name: &'static str| {
            let value = in_file.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned());
            let from_file = value.map(|value| (name, value, self.settings.etc.join(PROXY_FILE).display().to_string()));
            let from_environment = || {
                let value = std::env::var(name).ok()?;
                Some((name, value, "the environment of rebase-agent.service".to_owned()))
            };
            from_file.or_else(from_environment)
        };
        PROXY_VARIABLES.into_iter().filter_map(of).collect()
    }

    /// The first proxy that is none.
    fn faulty_proxy(&self) -> Option<TrustError> {
        let urls = self.proxies().into_iter().filter(|(name, ..)| !name.eq_ignore_ascii_case("NO_PROXY"));
        let mut faults = urls.filter_map(|(name, value, place)| Some((name, place, proxy::fault(&value)?)));
        faults.next().map(|(name, place, why)| TrustError::Proxy { name, place, why })
    }

    /// What MCO says of the cluster's proxy, which wins over a drop-in's variables; empty where there is none.
    fn proxy_file(&self) -> String {
        let path = self.settings.etc.join(PROXY_FILE);
        match read_bounded(&path, MAX_PROXY_FILE) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => {
                if error.kind() != std::io::ErrorKind::NotFound {
                    tracing::warn!("{} is ignored, so no proxy is taken from it: {error}", path.display());
                }
                String::new()
            }
        }
    }

    /// An engine that ignores `--policy` would fail open, so its version is read before its first use and again
    /// whenever the file changes.
    async fn check_version(&self) -> Result<(), TrustError> {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(&self.settings.skopeo).map_err(|e| self.broken("not found", &e))?;
        let identity = (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
        let checked = || self.checked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *checked() == Some(identity) {
            return Ok(());
        }
        let mut command = self.command();
        command.arg("--version").stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        // Started by this thread, so that it ends with it.
        let child = command.spawn().map_err(|error| self.broken("it cannot be started", &error))?;
        let output = tokio::task::spawn_blocking(move || child.wait_with_output())
            .await
            .map_err(|error| self.unfit(error.to_string()))?
            .map_err(|error| self.broken("it cannot be awaited", &error))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = parse_version(&text).ok_or_else(|| {
            let said = format!("{} {}", text, String::from_utf8_lossy(&output.stderr));
            let why = format!("it does not tell its version: {}", printable(&said, 200));
            if is_scarcity(&said) { self.scarce(why) } else { self.unfit(why) }
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

    fn unfit(&self, why: impl Into<String>) -> TrustError {
        TrustError::Engine { skopeo: self.settings.skopeo.clone(), why: why.into() }
    }

    fn scarce(&self, why: impl Into<String>) -> TrustError {
        TrustError::Scarce { why: format!("{}: {}", self.settings.skopeo.display(), why.into()) }
    }

    /// What the kernel refused: for want of something, or because the engine is unfit.
    fn broken(&self, what: &str, error: &std::io::Error) -> TrustError {
        let why = format!("{what}: {error}");
        if is_scarce(error) { self.scarce(why) } else { self.unfit(why) }
    }

    fn deadline(&self, image: &PinnedImage) -> TrustError {
        TrustError::Deadline { image: image.clone(), seconds: self.settings.deadline.as_secs() }
    }

    pub(super) fn question(&self, policy: &NodePolicy, image: &PinnedImage, scope: &str) -> Question {
        let settings = &self.settings;
        let auth = settings.auth_files.iter().find(|path| path.exists());
        let auth = auth.map(|path| (path.clone(), read_bounded(path, MAX_AUTH_FILE).unwrap_or_default()));
        let scratch = settings.scratch.as_ref().map_or_else(|| "/tmp".to_owned(), |path| path.display().to_string());
        Question {
            image: image.clone(),
            skopeo: settings.skopeo.clone(),
            policy: policy.path.clone(),
            scope: scope.to_owned(),
            demands: policy.policy.demands(image),
            auth,
            scratch,
            registries_d: settings.registries_d.clone(),
            mirrors: mirrors::mirrors(&registries_conf(&settings.etc), image.name()),
        }
    }
}

/// `registries.conf` and what is in `registries.conf.d`, in the engine's order; what cannot be read is left out.
fn registries_conf(etc: &Path) -> String {
    let main = etc.join("containers/registries.conf");
    let more = std::fs::read_dir(etc.join("containers/registries.conf.d")).into_iter().flatten().flatten();
    let mut more: Vec<_> =
        more.map(|entry| entry.path()).filter(|path| path.extension() == Some("conf".as_ref())).collect();
    more.sort();
    let read = |path: PathBuf| read_bounded(&path, mirrors::MAX_CONF).ok();
    let texts = std::iter::once(main).chain(more).filter_map(read);
    texts.map(|bytes| String::from_utf8_lossy(&bytes).into_owned() + "\n").collect()
}

/// Whether the kernel refused for want of descriptors, processes or memory, which says nothing of the engine.
pub(super) fn is_scarce(error: &std::io::Error) -> bool {
    [Errno::EMFILE, Errno::ENFILE, Errno::EAGAIN, Errno::ENOMEM]
        .map(|errno| Some(errno as i32))
        .contains(&error.raw_os_error())
}

fn classify(error: ProxyError, asked: &Question) -> TrustError {
    match error {
        ProxyError::RequestInitiationFailure { error, method }
        | ProxyError::RetryableRequestFailure { error, method } => classify_text(&method, &error, asked),
        other => TrustError::Unreachable { image: asked.image.clone(), why: printable(&other.to_string(), 500) },
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
