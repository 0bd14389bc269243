//! Objects of MCO that the agent reads besides its Node: the pool's MachineOSConfig (first byte 0 mod 3), its own
//! MachineConfigNode (1), and the pool in the name of a rendered config (2).
#![no_main]

use fuzz::{bounded, shown};
use libfuzzer_sys::fuzz_target;
use rebase_agent::cluster::ClusterError;
use rebase_agent::cluster::fuzzing::newest;
use rebase_agent::cluster::mcn::Shown;
use rebase_agent::cluster::pool::pool_of;

fn refused(error: &ClusterError) {
    assert!(matches!(error, ClusterError::Confused { .. }), "{error}");
    shown(&error.to_string(), 400);
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 3 {
        0 => match bounded(data.len(), 64, || newest(data)) {
            Ok(Some(image)) => assert!(!image.as_str().is_empty() && image.as_str().len() <= 4096),
            Ok(None) => {}
            Err(error) => refused(&error),
        },
        1 => {
            if let Err(error) = bounded(data.len(), 512, || Shown::parse(data)) {
                refused(&error);
            }
        }
        _ => {
            let name = String::from_utf8_lossy(data);
            if let Some(pool) = pool_of(&name) {
                // It becomes a part of a URL's path.
                assert!(pool.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.')), "{pool}");
                assert!(name.starts_with(&format!("rendered-{pool}-")) && !pool.starts_with('.'));
            }
        }
    }
});
