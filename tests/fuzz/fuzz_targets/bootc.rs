//! Input from a bootc host: the status (first byte 0 mod 3), libostree's record of the staged deployment (1), a unit
//! name (2).
#![no_main]

use fuzz::{bounded, shown};
use libfuzzer_sys::fuzz_target;
use rebase_agent::host::HostError;
use rebase_agent::host::fuzzing::{bootc_status, image_of_unit, staged_record};
use rebase_agent::model::{Digest, Fault};
use rebase_agent::trust::reference;

fn status(json: &[u8]) {
    let deployments = match bounded(json.len(), 256, || bootc_status(json)) {
        Ok(deployments) => deployments,
        Err(error) => {
            let told = matches!(error, HostError::NotBootc | HostError::Composefs | HostError::Confused { .. });
            assert!(told, "{error}");
            return shown(&Fault::from(&error).message, 900);
        }
    };
    assert_eq!(deployments.iter().filter(|deployment| deployment.booted).count(), 1);
    assert!(deployments.iter().skip(1).all(|deployment| !deployment.staged), "the staged deployment comes first");
    for deployment in &deployments {
        assert!(!(deployment.booted && deployment.staged));
        assert!(deployment.id.starts_with(&format!("{}-{}.", deployment.osname, deployment.checksum)));
        if let Some(version) = &deployment.version {
            shown(version, 100);
        }
        if let Some(digest) = &deployment.digest {
            assert_eq!(Digest::parse(digest.as_str()).as_ref(), Some(digest));
        }
        assert!(deployment.rendered_config.is_none() && deployment.arguments.is_none());
    }
}

fn note(bytes: &[u8]) {
    // An element of length zero still needs a framing offset, which the container's size limits.
    let arguments = bounded(bytes.len(), 256, || staged_record(bytes).arguments);
    let length: usize = arguments.iter().flatten().map(String::len).sum();
    assert!(length <= bytes.len(), "an argument is read twice");
    assert!(arguments.iter().flatten().count() <= bytes.len());
}

fn unit(name: &str) {
    let Some(image) = bounded(name.len(), 64, || image_of_unit(name)) else { return };
    assert_eq!(reference::parse(&image.to_string()).as_ref(), Ok(&image));
    let instance = name.split_once('@').unwrap().1;
    assert!(!instance.is_empty() && instance.ends_with(".service"));
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 3 {
        0 => status(data),
        1 => note(data),
        _ => unit(&String::from_utf8_lossy(data)),
    }
});
