//! The node's signature engine, `skopeo experimental-image-proxy`: the only program that the agent starts.

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
use crate::files::{Stamp, read_bounded};
use crate::model::{PinnedImage, printable};

/// First protocol that evaluates the policy; older engines accept every image.
const ENFORCING_PROTOCOL: (u64, u64, u64) = (0, 2, 6);
/// First skopeo whose proxy uses `--policy`; 1.13 has the protocol above but ignores the option.
const ENFORCING_SKOPEO: (u64, u64) = (1, 14);
/// By how much the limit of the whole verification exceeds that of the engine's start.
const START_MARGIN: Duration = Duration::from_millis(100);
/// How long an engine may take to exit after the last read. Then it is terminated.
const FINALIZE: Duration = Duration::from_secs(5);
/// How long the search for the place of an unsigned image may take. Without a result the message has no place.
const LOOK: Duration = Duration::from_secs(10);
/// The policy of that search, whose result is only used in a message.
const NO_DEMANDS: &[u8] = br#"{"default":[{"type":"insecureAcceptAnything"}]}"#;
/// Largest auth file read, in bytes; a cluster's pull secret has a few kilobytes.
const MAX_AUTH_FILE: u64 = 1 << 20;

/// The documents that the engine read for the verified digest.
pub struct Fetched {
    /// Manifest digest; for an index, that of this architecture's instance.
    pub instance: String,
    /// OCI manifest.
    pub manifest: Vec<u8>,
    /// OCI config.
    pub config: Vec<u8>,
}

/// The engine and its settings. Clones share their state.
#[derive(Clone, Debug)]
pub struct Engine {
    settings: Arc<Settings>,
    /// The stamp of the program whose version was checked last.
    checked: Arc<Mutex<Option<Stamp>>>,
    /// Held while an engine runs, so that only one runs at a time.
    one: Arc<tokio::sync::Mutex<()>>,
}

impl Engine {
    /// Creates the handle and starts no process.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings: Arc::new(settings), checked: Arc::default(), one: Arc::default() }
    }

    /// The settings of verification.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Opens `image` in the engine under `policy` and reads its manifest and config. The engine has a deadline and a clean
    /// environment, and ends with this future: the kernel terminates it with the thread that started it. Therefore it
    /// has its own thread.
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
                // The task that waits for the engine was queued before this one, so it has begun now. If it had not, the
                // runtime would drop it and the engine would never be reaped.
                let _ = tokio::task::spawn_blocking(|| ()).await;
                result
            });
            // A thread of the runtime may still wait for the engine. It reaps the engine, which ends with this thread.
            runtime.shutdown_background();
            if let Some(result) = result {
                // The caller may have been dropped.
                let _ = answer.send(result);
            }
            drop(one);
        };
        let started = std::thread::Builder::new().name("engine".to_owned()).spawn(work);
        started.map_err(|error| self.broken("cannot start a thread for the engine", &error))?;
        answered.await.unwrap_or_else(|_| Err(self.unfit("its thread ended without an answer")))
    }

    async fn fetch_bounded(&self, policy: &[u8], asked: &Question) -> Result<Fetched, TrustError> {
        // Longer than the limit of a start, whose error names the engine.
        let limit = self.settings.deadline.saturating_add(START_MARGIN);
        let result = tokio::time::timeout(limit, self.fetch_unbounded(policy, asked)).await;
        match result.unwrap_or_else(|_| Err(self.deadline(&asked.image))) {
            // The engine ignores a proxy whose URL it cannot parse, or connects to a wrong host.
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
        // The engine contacts no registry before it has started.
        let left = || self.settings.deadline.saturating_sub(started.elapsed());
        let silent = |_| self.unfit("it did not start before the deadline");
        tokio::time::timeout(left(), self.check_version()).await.map_err(silent)??;
        let bytes = sealed(policy).map_err(|error| self.broken("cannot seal the policy in memory", &error))?;

        let begun =
            tokio::time::timeout(left(), ImageProxy::new_with_config(self.config(&bytes))).await.map_err(silent)?;
        let proxy = begun.map_err(|error| {
            let text = error.to_string();
            let scarce = match &error {
                ProxyError::SkopeoSpawnError(error) | ProxyError::Io(error) => is_scarce(error),
                _ => is_scarcity(&text),
            };
            self.failed(scarce, format!("it does not start: {}", printable(&text, 400)))
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
        // On a failure return without `finalize`, which panics if a request is still running. The end of the thread
        // terminates the engine.
        let fetched = read(&proxy, &opened).await.map_err(classify)?;
        // All documents are read and checked. An engine that does not exit is terminated with its thread.
        match tokio::time::timeout(FINALIZE, proxy.finalize()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!("the engine exited with an error: {}", printable(&error.to_string(), 300))
            }
            Err(_) => tracing::debug!("the engine did not exit by itself"),
        }
        Ok(fetched)
    }

    /// Finds the place and the kind of an image without a signature, for the message. `enforcing` is the engine that
    /// refused the image.
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

    /// The command of the engine. The kernel sends it SIGTERM when the thread that spawned it ends. timeout(1) is not
    /// used: a signal right after its fork leaves the child behind without a deadline, and skopeo does not notice a
    /// closed socket during a request.
    #[allow(clippy::disallowed_methods, reason = "the only program that the agent starts")]
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

    /// The proxy's variables, each with its source.
    fn proxies(&self) -> Vec<(&'static str, String, String)> {
        let (file, path) = (self.proxy_file(), self.settings.etc.join(PROXY_FILE));
        let in_file = proxy::variables(&file);
        let of = |name| match in_file.iter().find(|(other, _)| *other == name) {
            Some((_, value)) => Some((name, (*value).to_owned(), path.display().to_string())),
            None => Some((name, std::env::var(name).ok()?, "the environment of rebase-agent.service".to_owned())),
        };
        PROXY_VARIABLES.into_iter().filter_map(of).collect()
    }

    /// The error for the first variable that is not a usable proxy.
    fn faulty_proxy(&self) -> Option<TrustError> {
        let urls = self.proxies().into_iter().filter(|(name, ..)| !name.eq_ignore_ascii_case("NO_PROXY"));
        let mut faults = urls.filter_map(|(name, value, place)| Some((name, place, proxy::fault(&value)?)));
        faults.next().map(|(name, place, why)| TrustError::Proxy { name, place, why })
    }

    /// The file with the cluster's proxy, which MCO writes; empty if it does not exist. It overrides a drop-in's variables.
    fn proxy_file(&self) -> String {
        let path = self.settings.etc.join(PROXY_FILE);
        let bytes = read_bounded(&path, MAX_PROXY_FILE).unwrap_or_else(|error| {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!("cannot read {}, so its proxy is not used: {error}", path.display());
            }
            Vec::new()
        });
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Checks the engine's version before its first use and whenever the program changes. An engine that ignores
    /// `--policy` would accept every image.
    async fn check_version(&self) -> Result<(), TrustError> {
        std::fs::metadata(&self.settings.skopeo).map_err(|e| self.broken("not found", &e))?;
        let stamp = Some(Stamp::of(&self.settings.skopeo));
        let checked = || self.checked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *checked() == stamp {
            return Ok(());
        }
        let mut command = self.command();
        command.arg("--version").stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        // Started by this thread, so that it ends with the thread.
        let child = command.spawn().map_err(|error| self.broken("it cannot be started", &error))?;
        let output = tokio::task::spawn_blocking(move || child.wait_with_output())
            .await
            .map_err(|error| self.unfit(error.to_string()))?
            .map_err(|error| self.broken("its exit status cannot be read", &error))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = parse_version(&text).ok_or_else(|| {
            let said = format!("{} {}", text, String::from_utf8_lossy(&output.stderr));
            self.failed(is_scarcity(&said), format!("it does not report its version: {}", printable(&said, 200)))
        })?;
        if version < ENFORCING_SKOPEO {
            let (major, minor) = version;
            return Err(
                self.unfit(format!("skopeo {major}.{minor} does not enforce the policy it is given; 1.14 does"))
            );
        }
        *checked() = stamp;
        Ok(())
    }

    fn unfit(&self, why: impl Into<String>) -> TrustError {
        TrustError::Engine { skopeo: self.settings.skopeo.clone(), why: why.into() }
    }

    /// The error for a failed start: a shortage, or an unfit engine.
    fn failed(&self, scarce: bool, why: String) -> TrustError {
        match scarce {
            true => TrustError::Scarce { why: format!("{}: {why}", self.settings.skopeo.display()) },
            false => self.unfit(why),
        }
    }

    /// The error for a failed system call.
    fn broken(&self, what: &str, error: &std::io::Error) -> TrustError {
        self.failed(is_scarce(error), format!("{what}: {error}"))
    }

    fn deadline(&self, image: &PinnedImage) -> TrustError {
        TrustError::Deadline { image: image.clone(), seconds: self.settings.deadline.as_secs() }
    }

    pub(super) fn question(&self, policy: &NodePolicy, image: &PinnedImage, scope: &str) -> Question {
        let auth = self.authfile().map(|path| (path.clone(), read_bounded(path, MAX_AUTH_FILE).unwrap_or_default()));
        Question {
            image: image.clone(),
            settings: Arc::clone(&self.settings),
            scope: scope.to_owned(),
            demands: policy.policy.demands(image),
            auth,
            mirrors: mirrors::mirrors(&registries_conf(&self.settings.etc), image.name()),
        }
    }
}

/// `registries.conf` and the files of `registries.conf.d`, in the engine's order. Unreadable files are left out.
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

/// Whether the kernel has no file descriptor, process or memory left, which is no fault of the engine.
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
    // With a tampered registry OpenImage may pass and only GetManifest fails, so both must succeed. The engine limits
    // each document to 4 MiB.
    let (instance, manifest) = proxy.fetch_manifest_raw_oci(opened).await?;
    let config = proxy.fetch_config_raw(opened).await?;
    Ok(Fetched { instance, manifest, config })
}

/// Parses `skopeo version 1.18.0` to (1, 18). Pure.
fn parse_version(text: &str) -> Option<(u64, u64)> {
    let mut parts = text.trim().strip_prefix("skopeo version ")?.split(['.', '-', ' ']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Copies `bytes` to sealed memory that no process can change. Not close-on-exec, so that the engine inherits it; the
/// agent starts no other program.
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
    fn versions_of_skopeo_are_parsed() {
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
