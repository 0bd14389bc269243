//! The outside of a node: the API server with its controllers, a registry, and the signer of the images.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::node::OSNAME;
use crate::apiserver::{ApiServer, Store};
use crate::events::Events;
use crate::gpg::GpgSigner;
use crate::image::{ImageSpec, Pushed};
use crate::machine::Engine;
use crate::mcc::{self, Delays, DrainController, PREFIX, PoolController, PoolSpec};
use crate::pki::{Pki, write_kubeconfig};
use crate::policy::{Identity, Policy, RegistriesD, Requirement};
use crate::registry::{Registry, ServerTls};
use crate::rpmostreed::{self, Sysroot};
use crate::sign::{KeyKind, Signer, sign};
use crate::tools;
use crate::world::{NODE, REPOSITORY};

/// Longest wait for the node; an update takes a few seconds.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// All outside services; they end when this is dropped.
pub struct Outside {
    api: ApiServer,
    /// The pool's half of MCC.
    pub pool: PoolController,
    /// The drain controller's half of MCC.
    pub drains: DrainController,
    registry: Registry,
    signer: Signer,
    /// The image that the node is installed with.
    pub installed: Pushed,
}

impl Outside {
    /// Starts all services with their files in `directory`, and installs image 1 on the disk at `root`.
    pub async fn new(directory: &Path, root: &Path) -> Result<Self> {
        let events = Events::new();
        let pki = Pki::new();
        let (cert_pem, key_pem) = pki.server(&[]);
        let tls = ServerTls { cert_pem, key_pem, ca_pem: pki.ca_pem() };
        let registry = Registry::start(&directory.join("registry"), tls).await?;
        let signer = Signer::generate(KeyKind::P256);
        let api = ApiServer::start(&pki, events)?;
        api.store().create_node(NODE, &[]);
        let pool = PoolController::start(api.store(), PoolSpec::worker(&[NODE]));
        let drains = DrainController::start(api.store(), Delays::short());
        let installed = push(&registry, "1").await?;
        let this = Self { api, pool, drains, registry, signer, installed };
        this.sign(&this.installed, "1").await?;
        this.furnish(&pki, root)?;
        this.install(directory, root).await?;
        Ok(this)
    }

    /// The files that MCS, the kubelet and MCO's template leave on a node, at their real places.
    fn furnish(&self, pki: &Pki, root: &Path) -> Result<()> {
        let pem = Path::new("/var/lib/kubelet/pki/kubelet-client-current.pem");
        let kubelet = root.join("var/lib/kubelet");
        fs::create_dir_all(kubelet.join("pki"))?;
        write_private(&inside(root, pem), &pki.kubelet_pem(NODE))?;
        write_kubeconfig(&kubelet.join("kubeconfig"), &self.api.url(), &pki.ca_pem(), pem);

        self.demand_sigstore(root, Policy::accept_by_default())?;
        let certificates = root.join("etc/containers/certs.d").join(self.registry.host());
        fs::create_dir_all(&certificates)?;
        fs::write(certificates.join("ca.crt"), pki.ca_pem())?;

        let pullspec = self.installed.pullspec();
        let pairs = [
            ("currentConfig", "rendered-worker-1"),
            ("desiredConfig", "rendered-worker-1"),
            ("currentImage", pullspec.as_str()),
            ("desiredImage", pullspec.as_str()),
            ("state", "Done"),
        ];
        let annotations: Value =
            pairs.iter().map(|(key, value)| (format!("{PREFIX}{key}"), Value::from(*value))).collect();
        let daemon = root.join("etc/machine-config-daemon");
        fs::create_dir_all(&daemon)?;
        fs::write(daemon.join("node-annotations.json"), annotations.to_string())?;
        Ok(())
    }

    /// The installer accepts any image.
    async fn install(&self, directory: &Path, root: &Path) -> Result<()> {
        let policy = directory.join("installer-policy.json");
        Policy::accept_by_default().write(&policy)?;
        let registries_d = directory.join("installer-registries.d");
        fs::create_dir_all(&registries_d)?;
        let engine = Engine { skopeo: tools::skopeo()?, policy, registries_d, cert_dir: self.registry.cert_dir() };
        let reference = format!("ostree-unverified-registry:{}", self.installed.pullspec());
        let arguments = ["root=UUID=0a1b", "rw"].map(str::to_owned);
        rpmostreed::install(&Sysroot::create(root, OSNAME)?, &engine, &reference, &arguments).await
    }

    async fn sign(&self, image: &Pushed, tag: &str) -> Result<()> {
        let name = format!("{}:{tag}", image.repository());
        sign(&self.registry, &image.digest, &image.repo, &name, &self.signer).await
    }

    /// The node at `root` accepts OS images only with the signer's signature from now on; `policy` decides about
    /// others.
    pub fn demand_sigstore(&self, root: &Path, policy: Policy) -> Result<()> {
        let (key, containers) = (Path::new("/etc/containers/os.pub"), root.join("etc/containers"));
        let scope = format!("{}/example", self.registry.host());
        RegistriesD::new().attachments(&scope, true).write(&containers.join("registries.d/os.yaml"))?;
        self.signer.write_public(&inside(root, key))?;
        policy.scope(&scope, [Requirement::sigstore_key_path(key)]).write(&containers.join("policy.json"))
    }

    /// The node at `root` accepts OS images only with a GPG signature from now on; `image` gets one.
    pub fn demand_gpg(&self, root: &Path, image: &Pushed, tag: &str) -> Result<()> {
        let (signer, containers) = (GpgSigner::generate()?, root.join("etc/containers"));
        let (key, lookaside) = (Path::new("/etc/containers/os.gpg"), Path::new("/etc/containers/lookaside"));
        signer.write_public(&inside(root, key))?;
        signer.sign(&inside(root, lookaside), image, &format!("{}:{tag}", image.repository()))?;
        let scope = format!("{}/example", self.registry.host());
        let lookaside = format!("file://{}", lookaside.display());
        RegistriesD::new().lookaside(&scope, &lookaside).write(&containers.join("registries.d/os.yaml"))?;
        let rule = Requirement::gpg_key_path(key).identity(&Identity::MatchRepository);
        Policy::accept_by_default().scope(&scope, [rule]).write(&containers.join("policy.json"))
    }

    /// A new, unsigned image for `rendered-worker-<version>`.
    pub async fn unsigned(&self, version: &str) -> Result<Pushed> {
        push(&self.registry, version).await
    }

    /// The same, signed.
    pub async fn signed(&self, version: &str) -> Result<Pushed> {
        let image = self.unsigned(version).await?;
        self.sign(&image, version).await?;
        Ok(image)
    }

    /// Gives the pool a new target.
    pub fn target(&self, version: &str, image: &Pushed) {
        self.pool.set_target(&format!("rendered-worker-{version}"), image.pullspec().as_str());
    }

    /// The same, and the node gets the target at once: MCC would wait until its earlier target is done.
    pub fn retarget(&self, version: &str, image: &Pushed) -> Result<()> {
        self.target(version, image);
        let config = format!("rendered-worker-{version}");
        let annotations = json!({
            format!("{PREFIX}desiredConfig"): config,
            format!("{PREFIX}desiredImage"): image.pullspec(),
        });
        self.store().patch_as("kubectl-annotate", NODE, json!({"metadata": {"annotations": annotations}}))?;
        Ok(())
    }

    /// The API server's objects.
    #[must_use]
    pub fn store(&self) -> Store {
        self.api.store()
    }

    /// The Node as it is now.
    pub fn node(&self) -> Result<Value> {
        self.store().node(NODE).context("the Node is gone")
    }

    /// The kubelet's part: the Node is Ready while the machine is up.
    pub fn set_up(&self, boot_id: Option<&str>) {
        if let Some(boot_id) = boot_id {
            self.store().set_boot_id(NODE, boot_id);
        }
        self.store().set_ready(NODE, boot_id.is_some());
    }

    /// Waits until `predicate` accepts the Node; the error shows its last state.
    pub async fn wait(&self, what: &str, predicate: impl Fn(&Value) -> bool) -> Result<Value> {
        match self.store().wait_for(NODE, DEADLINE, predicate).await {
            Ok(node) => Ok(node),
            Err(error) => {
                let annotations = self.store().node(NODE).map(|node| node["metadata"]["annotations"].clone());
                Err(error).with_context(|| format!("{what} did not happen; the Node has {annotations:#?}"))
            }
        }
    }

    /// Waits until the node reports Done on `image`.
    pub async fn wait_done(&self, image: &Pushed) -> Result<()> {
        let pullspec = image.pullspec();
        let done =
            |node: &Value| mcc::is_node_done(node) && mcc::annotation(node, "currentImage") == Some(pullspec.as_str());
        self.wait(&format!("Done on {}", image.digest), done).await.map(|_| ())
    }

    /// Waits until the reason starts with this word.
    pub async fn wait_reason(&self, word: &str) -> Result<()> {
        let starts = |node: &Value| mcc::annotation(node, "reason").is_some_and(|reason| reason.starts_with(word));
        self.wait(&format!("the reason {word}"), starts).await.map(|_| ())
    }
}

async fn push(registry: &Registry, version: &str) -> Result<Pushed> {
    let spec = ImageSpec::new(version).rendered_config(&format!("rendered-worker-{version}"));
    registry.push(REPOSITORY, version, &spec).await
}

fn inside(root: &Path, path: &Path) -> std::path::PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}
