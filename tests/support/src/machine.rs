//! To come.

use std::path::PathBuf;

/// The program that pulls images, and the files it is pointed at.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The `skopeo` binary.
    pub skopeo: PathBuf,
    /// Its `policy.json`.
    pub policy: PathBuf,
    /// Its `registries.d`.
    pub registries_d: PathBuf,
    /// The directory with the registry's certificate authority.
    pub cert_dir: PathBuf,
}
