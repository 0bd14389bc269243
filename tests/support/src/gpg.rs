//! GPG signatures in a lookaside directory, for `signedBy` rules.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

use crate::image::Pushed;

/// A GnuPG home with one key. Its daemon ends when this is dropped.
#[derive(Debug)]
pub struct GpgSigner {
    home: TempDir,
}

impl GpgSigner {
    /// A new key without a passphrase.
    pub fn generate() -> Result<Self> {
        // The directory holds the GnuPG agent's socket, whose path must be short.
        let signer = Self { home: tempfile::Builder::new().prefix("gpg").tempdir_in("/tmp")? };
        signer.gpg(&["--passphrase", "", "--quick-gen-key", "Test <os@example.test>", "ed25519", "sign", "never"])?;
        Ok(signer)
    }

    /// Writes the public key to a file, for a policy's `keyPath`.
    pub fn write_public(&self, path: &Path) -> Result<()> {
        fs::write(path, self.gpg(&["--export"])?).with_context(|| format!("writing {}", path.display()))
    }

    /// Signs the manifest that the image's reference names, as `identity` (`host/repo:tag`), into a lookaside
    /// directory.
    pub fn sign(&self, lookaside: &Path, image: &Pushed, identity: &str) -> Result<()> {
        let payload = json!({
            "critical": {
                "identity": { "docker-reference": identity },
                "image": { "docker-manifest-digest": image.digest },
                "type": "atomic container signature",
            },
            "optional": {},
        });
        let file = self.home.path().join("payload");
        fs::write(&file, payload.to_string())?;
        let signature = self.gpg(&["--sign", "--output", "-", &file.display().to_string()])?;
        let directory = lookaside.join(format!("{}@{}", image.repo, image.digest.replace(':', "=")));
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("signature-1"), signature)?;
        Ok(())
    }

    fn gpg(&self, args: &[&str]) -> Result<Vec<u8>> {
        let output = Command::new("gpg")
            .args(["--quiet", "--batch", "--no-tty", "--homedir"])
            .arg(self.home.path())
            .args(args)
            .stdin(Stdio::null())
            .output()
            .context("starting gpg: run tests/support/install")?;
        ensure!(output.status.success(), "gpg {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(output.stdout)
    }
}

impl Drop for GpgSigner {
    fn drop(&mut self) {
        // Otherwise the GnuPG agent would notice the missing directory only after a minute.
        let _ = Command::new("gpgconf").arg("--homedir").arg(self.home.path()).args(["--kill", "all"]).status();
    }
}
