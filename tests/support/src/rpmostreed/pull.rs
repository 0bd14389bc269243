//! Getting container images into the sysroot: the reference grammar, the real pull with skopeo, the image store.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

use super::Transaction;
use super::sysroot::{Sysroot, sha256_hex};
use crate::machine::Engine;

/// A parsed image reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    /// `ostree-image-signed`.
    pub(crate) signed: bool,
    /// The part after `docker://`.
    pub(crate) name: String,
}

impl Reference {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let invalid = || format!("Invalid refspec {text}");
        let registry =
            |rest: &str| rest.strip_prefix("docker://").or_else(|| rest.strip_prefix("registry:")).map(str::to_owned);
        let (signed, name) = if let Some(rest) = text.strip_prefix("ostree-image-signed:") {
            (true, registry(rest).ok_or_else(invalid)?)
        } else if let Some(rest) = text.strip_prefix("ostree-unverified-registry:") {
            (false, rest.to_owned())
        } else if let Some(rest) = text.strip_prefix("ostree-unverified-image:") {
            (false, registry(rest).ok_or_else(invalid)?)
        } else {
            return Err(invalid());
        };
        if name.is_empty() || name.starts_with('/') {
            return Err(invalid());
        }
        Ok(Self { signed, name })
    }

    /// The spelling that origins store.
    pub(crate) fn canonical(&self) -> String {
        if self.signed {
            format!("ostree-image-signed:docker://{}", self.name)
        } else {
            format!("ostree-unverified-registry:{}", self.name)
        }
    }
}

/// The place in the image store for the image that an origin names.
pub(crate) fn store_key(reference: &str) -> String {
    let name = Reference::parse(reference).map_or_else(|_| reference.to_owned(), |parsed| parsed.name);
    sha256_hex(name.as_bytes())
}

/// An image that is in the store.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) reference: String,
    pub(crate) digest: String,
    pub(crate) manifest: String,
    pub(crate) config: String,
    pub(crate) version: Option<String>,
    pub(crate) timestamp: u64,
    /// The path, and whether the file is compressed.
    pub(crate) layers: Vec<(PathBuf, bool)>,
    layer_digests: Vec<String>,
    size: u64,
}

fn blob(layout: &Path, digest: &str) -> PathBuf {
    layout.join("blobs").join(digest.replace(':', "/"))
}

fn text(value: &Value, pointer: &str) -> Option<String> {
    value.pointer(pointer).and_then(Value::as_str).map(str::to_owned)
}

impl Image {
    /// The image in the store that an origin names.
    pub(crate) fn stored(sysroot: &Sysroot, reference: &str) -> Result<Self, String> {
        Self::open(&sysroot.images_dir().join(store_key(reference)), reference)
            .map_err(|error| format!("Missing base image ref: {error}"))
    }

    /// Reads the one image of an OCI layout.
    fn open(layout: &Path, reference: &str) -> Result<Self, String> {
        let read = |path: PathBuf| fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()));
        let json = |body: &str| serde_json::from_str::<Value>(body).map_err(|e| e.to_string());
        let index = json(&read(layout.join("index.json"))?)?;
        let digest = text(&index, "/manifests/0/digest").ok_or("no manifest in the layout")?;
        let manifest = read(blob(layout, &digest))?;
        let parsed = json(&manifest)?;
        let config = read(blob(layout, &text(&parsed, "/config/digest").ok_or("no config")?))?;
        let parsed_config = json(&config)?;
        let mut layers = Vec::new();
        let mut layer_digests = Vec::new();
        let mut size = 0;
        for layer in parsed.get("layers").and_then(Value::as_array).into_iter().flatten() {
            let digest = text(layer, "/digest").ok_or("a layer without digest")?;
            let media = text(layer, "/mediaType").unwrap_or_default();
            layers.push((blob(layout, &digest), media.ends_with("gzip")));
            layer_digests.push(digest);
            size += layer.get("size").and_then(Value::as_u64).unwrap_or_default();
        }
        let label =
            |key: &str| parsed_config.get("config")?.get("Labels")?.get(key).and_then(Value::as_str).map(str::to_owned);
        if label("ostree.bootable").is_none() {
            return Err("Preparing import: Target image does not have ostree.bootable label".to_owned());
        }
        let native = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let architecture = text(&parsed_config, "/architecture").unwrap_or_default();
        if architecture != native {
            return Err(format!("Preparing import: Image has architecture {architecture}; expected {native}"));
        }
        Ok(Self {
            reference: reference.to_owned(),
            digest,
            manifest,
            version: label("org.opencontainers.image.version").or_else(|| label("version")),
            timestamp: text(&parsed_config, "/created").and_then(|time| seconds(&time)).unwrap_or_default(),
            config,
            layers,
            layer_digests,
            size,
        })
    }
}

/// Seconds since the epoch of an RFC 3339 time in UTC.
fn seconds(time: &str) -> Option<u64> {
    let number = |from: usize, to: usize| time.get(from..to)?.parse::<i64>().ok();
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let of_era = shifted - era * 400;
    let of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    u64::try_from(days * 86_400 + number(11, 13)? * 3600 + number(14, 16)? * 60 + number(17, 19)?).ok()
}

fn default_is_insecure(policy: &Path) -> Result<bool, String> {
    let body = fs::read(policy).map_err(|e| format!("Opening {}: {e}", policy.display()))?;
    let policy: Value = serde_json::from_slice(&body).map_err(|e| format!("Parsing policy: {e}"))?;
    let rules = policy.get("default").and_then(Value::as_array);
    Ok(rules.is_some_and(|rules| {
        rules.len() == 1 && rules[0].get("type").and_then(Value::as_str) == Some("insecureAcceptAnything")
    }))
}

/// Reports to a transaction's clients, if there is a transaction.
pub(crate) async fn say(transaction: Option<&Arc<Transaction>>, message: &str) {
    if let Some(transaction) = transaction {
        transaction.message(message).await;
    }
}

static DOWNLOADS: AtomicU64 = AtomicU64::new(0);

/// Pulls `reference` into the image store.
pub(crate) async fn pull(
    engine: &Engine,
    sysroot: &Sysroot,
    reference: &Reference,
    transaction: Option<&Arc<Transaction>>,
) -> Result<Image, String> {
    let canonical = reference.canonical();
    say(transaction, &format!("Pulling manifest: {canonical}")).await;
    if reference.signed && default_is_insecure(&engine.policy)? {
        return Err("Creating importer: containers-policy.json specifies a default of `insecureAcceptAnything`; \
                    refusing usage"
            .to_owned());
    }
    let layout = sysroot.images_dir().join(store_key(&canonical));
    // An imported digest is never fetched again: no network access and no signature check.
    if !(reference.name.contains("@sha256:") && layout.join("index.json").exists()) {
        let number = DOWNLOADS.fetch_add(1, Ordering::SeqCst);
        let temporary = sysroot.images_dir().join(format!("incoming-{number}"));
        copy(engine, sysroot, &reference.name, &temporary).await.map_err(|error| {
            format!("Creating importer: failed to invoke method OpenImage: failed to invoke method OpenImage: {error}")
        })?;
        if let Err(error) = Image::open(&temporary, &canonical) {
            let _ = fs::remove_dir_all(&temporary);
            return Err(error);
        }
        let _ = fs::remove_dir_all(&layout);
        fs::rename(&temporary, &layout).map_err(|e| e.to_string())?;
    }
    let image = Image::open(&layout, &canonical)?;
    say(transaction, &format!("Importing: {canonical} (digest: {})", image.digest)).await;
    say(transaction, &format!("ostree chunk layers needed: {} ({} bytes)", image.layers.len(), image.size)).await;
    if let Some(transaction) = transaction {
        for digest in &image.layer_digests {
            transaction.task_begin(&format!("Fetching ostree chunk {digest}")).await;
            transaction.task_end("done").await;
        }
    }
    Ok(image)
}

async fn copy(engine: &Engine, sysroot: &Sysroot, name: &str, layout: &Path) -> Result<(), String> {
    let mut command = tokio::process::Command::new(&engine.skopeo);
    command.arg("--policy").arg(&engine.policy).arg("--registries.d").arg(&engine.registries_d);
    command.arg("copy").arg("--src-cert-dir").arg(&engine.cert_dir);
    // The layout cannot hold signatures; they are checked and then dropped.
    command.args(["--preserve-digests", "--remove-signatures"]);
    let auth = ["run/ostree/auth.json", "etc/ostree/auth.json", "usr/lib/ostree/auth.json"]
        .iter()
        .map(|path| sysroot.root().join(path))
        .find(|path| path.exists());
    match auth {
        Some(path) => command.arg("--src-authfile").arg(path),
        None => command.arg("--src-no-creds"),
    };
    command.arg(format!("docker://{name}")).arg(format!("oci:{}:x", layout.display()));
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = loop {
        match command.output().await {
            // A new script may still be open in a child that another thread is about to start.
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            other => break other,
        }
    };
    let output = output.map_err(|error| format!("spawning {}: {error}", engine.skopeo.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let message = last_message(&stderr).unwrap_or_else(|| output.status.to_string());
    // `copy` adds a prefix to the messages of the image proxy.
    let ours = format!("initializing source docker://{name}: ");
    let rest = message.strip_prefix(&ours).or_else(|| message.strip_prefix("Source image rejected: "));
    Err(rest.map_or_else(|| message.clone(), str::to_owned))
}

/// skopeo's last message, without its log format.
fn last_message(stderr: &str) -> Option<String> {
    let line = stderr.lines().rev().find(|line| !line.trim().is_empty())?;
    let Some((_, quoted)) = line.split_once("msg=") else { return Some(line.to_owned()) };
    serde_json::Deserializer::from_str(quoted)
        .into_iter::<String>()
        .next()
        .and_then(Result::ok)
        .or_else(|| Some(quoted.trim_matches('"').to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_parsed() {
        let spellings =
            ["ostree-unverified-image:docker://q.io/a/b@sha256:00", "ostree-unverified-registry:q.io/a/b@sha256:00"];
        for spelling in spellings {
            assert_eq!(Reference::parse(spelling).unwrap().canonical(), spellings[1]);
        }
        Reference::parse("ostree-image-signed:q.io/a/b").unwrap_err();
        Reference::parse("q.io/a/b").unwrap_err();
    }

    #[test]
    fn times_and_messages_are_parsed() {
        assert_eq!(seconds("1970-01-02T00:00:01Z"), Some(86_401));
        assert_eq!(seconds("2026-02-03T04:05:06.789Z"), Some(1_770_091_506));
        let line = "warn\ntime=\"2026-01-01T00:00:00Z\" level=fatal msg=\"Source image rejected: \\\"x\\\" no\"\n";
        assert_eq!(last_message(line).unwrap(), "Source image rejected: \"x\" no");
    }
}
