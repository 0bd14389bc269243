//! The pool's newest image, from its MachineOSConfig: MCC gives it to the pool's nodes one after the other.

use std::time::Duration;

use reqwest::Method;
use serde::Deserialize;

use super::{Api, ClusterError, FULL};
use crate::backoff::{full_jitter, jittered};
use crate::model::{Pullspec, printable};

/// Length of the hash at the end of a rendered config's name.
const HASH: usize = 32;
/// Longest image that is read, in bytes; longer ones are no pullspecs.
const MAX_IMAGE: usize = 4096;

/// The pool in the name of a rendered config, `rendered-<pool>-<hash>`. A pool's name may have dashes, too. Pure.
#[must_use]
pub fn pool_of(config: &str) -> Option<&str> {
    let (pool, hash) = config.strip_prefix("rendered-")?.rsplit_once('-')?;
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    let named = !pool.is_empty() && pool.chars().all(is_name) && !pool.starts_with(['-', '.']);
    (named && hash.len() == HASH && hash.chars().all(|c| c.is_ascii_hexdigit())).then_some(pool)
}

/// How long after its start an agent first reads the pool's image: a random time of up to `poll`, so that nodes that start
/// together do not read together. `random` is uniform over all of `u64`. Pure.
#[must_use]
pub fn first_read(poll: Duration, random: u64) -> Duration {
    scaled(poll, random, full_jitter)
}

/// How long after one read of the pool's image the next one follows: twice `poll`, so that an idle node sends less than 30
/// requests an hour. Pure.
#[must_use]
pub fn next_read(poll: Duration, random: u64) -> Duration {
    scaled(poll.saturating_mul(2), random, jittered)
}

fn scaled(time: Duration, random: u64, jitter: fn(u64, u64) -> u64) -> Duration {
    Duration::from_millis(jitter(u64::try_from(time.as_millis()).unwrap_or(u64::MAX), random))
}

impl Api {
    /// The image of the newest finished build for `pool`; `None` before the first one. The MachineOSConfig of a pool has the
    /// pool's name.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] without a MachineOSConfig, [`ClusterError::Forbidden`] without the right to read it; see
    /// [`ClusterError`].
    pub async fn pool_image(&self, pool: &str) -> Result<Option<Pullspec>, ClusterError> {
        let url = |session: &super::Session| {
            format!("{}/apis/machineconfiguration.openshift.io/v1/machineosconfigs/{pool}", session.access.server)
        };
        let (json, ..) = self.ask(Method::GET, FULL, url, None).await?;
        newest(&json)
    }
}

/// `status.currentImagePullSpec` of a MachineOSConfig. Pure.
pub(super) fn newest(json: &[u8]) -> Result<Option<Pullspec>, ClusterError> {
    #[derive(Deserialize)]
    struct MachineOsConfig {
        #[serde(default)]
        status: Status,
    }
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Status {
        current_image_pull_spec: Option<String>,
    }
    let confused = |why: &str| ClusterError::Confused { what: "the MachineOSConfig", why: printable(why, 200) };
    let object: MachineOsConfig = serde_json::from_slice(json).map_err(|e| confused(&e.to_string()))?;
    match object.status.current_image_pull_spec.filter(|image| !image.is_empty()) {
        Some(image) if image.len() > MAX_IMAGE => Err(confused("its image is longer than a pullspec")),
        image => Ok(image.map(Pullspec::from)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_is_the_middle_of_a_rendered_configs_name() {
        let hash = "0123456789abcdef0123456789abcdef";
        for (config, pool) in [
            (format!("rendered-worker-{hash}"), Some("worker")),
            (format!("rendered-gpu-a.100-{hash}"), Some("gpu-a.100")),
            (format!("rendered--{hash}"), None),
            (format!("rendered-../nodes-{hash}"), None),
            (format!("rendered-a/b-{hash}"), None),
            (format!("rendered-worker-{hash}0"), None),
            (format!("worker-{hash}"), None),
            ("rendered-worker".to_owned(), None),
            (String::new(), None),
        ] {
            assert_eq!(pool_of(&config), pool, "{config}");
        }
    }

    #[test]
    fn newest_image_is_in_the_status() {
        let image = |json: &str| newest(json.as_bytes()).map(|image| image.map(String::from));
        let finished = r#"{"kind":"MachineOSConfig","status":{"currentImagePullSpec":"q.io/os@sha256:1","other":[1]}}"#;
        assert_eq!(image(finished).unwrap().as_deref(), Some("q.io/os@sha256:1"));
        for none in [r#"{}"#, r#"{"status":{}}"#, r#"{"status":{"currentImagePullSpec":""}}"#] {
            assert_eq!(image(none).unwrap(), None);
        }
        for bad in ["", "7", r#"{"status":{"currentImagePullSpec":7}}"#, r#"{"status":null}"#] {
            assert!(matches!(image(bad), Err(ClusterError::Confused { .. })), "{bad}");
        }
        let long = format!(r#"{{"status":{{"currentImagePullSpec":"{}"}}}}"#, "a".repeat(5000));
        assert!(image(&long).is_err());
    }
}
