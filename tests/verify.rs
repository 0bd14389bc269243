//! Verification of an image as an operator sees it: `rebase-agent verify`, confined as the service is, with the real
//! engine and a real registry. Every call also checks that no engine is left running and that the text is safe to
//! print.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]
#![allow(clippy::disallowed_methods, reason = "the tests own the disk that the agent must not write")]

#[path = "verify/engine.rs"]
mod engine;
#[path = "verify/hostile.rs"]
mod hostile;
#[path = "verify/places.rs"]
mod places;
#[path = "verify/transport.rs"]
mod transport;
#[path = "verify/trust.rs"]
mod trust;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rebase_agent::model::{ImageFacts, Reason};
use serde_json::Value;
use support::image::{ImageSpec, Pushed};
use support::pki::Pki;
use support::policy::{Identity, Policy, RegistriesD, Requirement};
use support::registry::{Credentials, Registry, ServerTls};
use support::sign::{KeyKind, Signer, sign};
use support::{tools, trace};
use tempfile::TempDir;
use tokio::process::Command;

const REPO: &str = "ns/os";
/// A host name that only a proxy can resolve.
const NAMED: &str = "registry.test.example";
/// Longest sentence that an annotation may get.
const LONGEST: usize = 900;
/// Exit codes of `verify`.
const REFUSED: i32 = 3;
const NOT_YET: i32 = 4;

/// A registry, and a node that trusts one key for everything in it.
struct Node {
    dir: TempDir,
    tls: ServerTls,
    registry: Registry,
    signer: Signer,
}

/// Output of the agent.
#[derive(Debug)]
struct Outcome {
    code: i32,
    said: Value,
    stderr: String,
    took: Duration,
}

impl Node {
    async fn new() -> Self {
        Self::with(None).await
    }

    async fn with(credentials: Option<Credentials>) -> Self {
        let dir = tempfile::Builder::new().prefix("verify-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let pki = Pki::new();
        let (cert_pem, key_pem) = pki.server(&[NAMED]);
        let tls = ServerTls { cert_pem, key_pem, ca_pem: pki.ca_pem() };
        let at = dir.path().join("registry");
        let registry = match credentials {
            None => Registry::start(&at, tls.clone()).await.unwrap(),
            Some(credentials) => Registry::start_with_password(&at, tls.clone(), credentials).await.unwrap(),
        };
        let node = Self { dir, tls, registry, signer: Signer::generate(KeyKind::P256) };
        node.signer.write_public(&node.key()).unwrap();
        node.attachments(&RegistriesD::new().attachments(&node.registry.host(), true));
        node.require([node.requirement()]);
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn key(&self) -> PathBuf {
        self.path("key.pub")
    }

    /// The node's key, with an identity rule that accepts cosign's signatures.
    fn requirement(&self) -> Requirement {
        Requirement::sigstore_key_path(&self.key()).identity(&Identity::MatchRepository)
    }

    /// Requires this for every image in the registry; other images are accepted.
    fn require(&self, requirements: impl IntoIterator<Item = Requirement>) {
        self.policy(&Policy::accept_by_default().scope(&self.registry.host(), requirements));
    }

    fn policy(&self, policy: &Policy) {
        policy.write(&self.path("policy.json")).unwrap();
    }

    fn attachments(&self, registries_d: &RegistriesD) {
        registries_d.write(&self.path("registries.d/tests.yaml")).unwrap();
    }

    /// A program that replaces the engine: a shell script, with the real engine in `$REAL`.
    fn engine(&self, name: &str, body: &str) -> PathBuf {
        let path = self.path(name);
        let real = tools::skopeo().unwrap();
        fs::write(&path, format!("#!/bin/sh\nREAL={}\n{body}\n", real.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    async fn push(&self, spec: &ImageSpec) -> Pushed {
        self.registry.push(REPO, "tag", spec).await.unwrap()
    }

    /// An image signed with the node's key, as cosign signs.
    async fn signed(&self) -> Pushed {
        let pushed = self.push(&ImageSpec::default().rendered_config("rendered-worker-1")).await;
        self.sign(&pushed).await;
        pushed
    }

    async fn sign(&self, pushed: &Pushed) {
        self.sign_as(pushed, &pushed.repository(), &self.signer).await;
    }

    async fn sign_as(&self, pushed: &Pushed, identity: &str, signer: &Signer) {
        sign(&self.registry, &pushed.digest, REPO, identity, signer).await.unwrap();
    }

    /// `rebase-agent verify` on this node.
    fn command(&self, pullspec: &str) -> Command {
        let mut command = Command::from(trace::agent(Path::new(env!("CARGO_BIN_EXE_rebase-agent-under-test"))));
        command.args(["verify", pullspec]);
        for (name, value) in [
            ("POLICY", self.path("policy.json")),
            ("REGISTRIES_D", self.path("registries.d")),
            ("SKOPEO", tools::skopeo().unwrap()),
            ("CERT_DIR", self.registry.cert_dir()),
            ("ROOT", self.path("root")),
        ] {
            command.env(format!("REBASE_AGENT_{name}"), value);
        }
        command
    }

    async fn verify(&self, pullspec: &str) -> Outcome {
        self.verify_with(pullspec, &[]).await
    }

    /// Runs with these variables added, or removed where the value is empty.
    async fn verify_with(&self, pullspec: &str, env: &[(&str, &str)]) -> Outcome {
        let mut command = self.command(pullspec);
        command.arg("--json");
        for (name, value) in env {
            match *value {
                "" => command.env_remove(name),
                value => command.env(name, value),
            };
        }
        let started = Instant::now();
        let output = tools::run(command, Duration::from_secs(60)).await.unwrap();
        let took = started.elapsed();
        let left = self.engines_after(Duration::from_secs(5)).await;
        assert!(left.is_empty(), "left running: {left:?}");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let said = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}{stderr}", String::from_utf8_lossy(&output.stdout)));
        Outcome { code: output.status.code().unwrap_or(-1), said, stderr, took }
    }

    /// Command lines of processes that work for this node.
    fn engines(&self) -> Vec<String> {
        let here = self.dir.path().to_str().unwrap();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(here) && line.contains("registries.d") {
                found.push(line);
            }
        }
        found
    }

    /// The remaining processes once none is left, or at the end of the patience.
    async fn engines_after(&self, patience: Duration) -> Vec<String> {
        let started = Instant::now();
        loop {
            let found = self.engines();
            if found.is_empty() || started.elapsed() > patience {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Outcome {
    #[track_caller]
    fn facts(&self) -> ImageFacts {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_value(self.said.clone()).unwrap()
    }

    /// The sentence of a refusal with that reason, checked to be safe for an annotation and a terminal.
    #[track_caller]
    fn refused(&self, reason: Reason) -> &str {
        let message = self.said["message"].as_str().unwrap_or_default();
        assert_eq!(self.said["reason"], reason.as_str(), "{message}");
        let transient = [
            Reason::RegistryUnreachable,
            Reason::RegistryDenied,
            Reason::RegistryUntrusted,
            Reason::DeadlineExceeded,
            Reason::ResourcesExhausted,
        ];
        assert_eq!(self.code, if transient.contains(&reason) { NOT_YET } else { REFUSED }, "{message}");
        assert!(!message.is_empty() && message.chars().count() <= LONGEST, "{message}");
        assert!(!message.contains(char::is_control), "{message:?}");
        message
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
