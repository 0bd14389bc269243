//! Input from rpm-ostreed: the property `Deployments`, and the signals of a transaction.
//!
//! The first byte chooses: an unchanged reply body (0 mod 3), deployments with the relevant keys and any values (1), a
//! signal (2). All of them are parsed from a message's bytes, as in the agent.
#![no_main]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use arbitrary::{Arbitrary, Unstructured};
use fuzz::{bounded, shown};
use libfuzzer_sys::fuzz_target;
use rebase_agent::host::fuzzing::{deployment, heard, property};
use rebase_agent::model::{Deployment, Digest, Fault};
use zbus::{Message, OwnedVariant, Variant};

#[derive(Arbitrary, Debug)]
enum Key {
    Id,
    Osname,
    Checksum,
    Booted,
    Staged,
    Pinned,
    Version,
    Reference,
    Digest,
    Metadata,
    BaseChecksum,
    Initramfs,
    Packages,
    Removals,
    ManifestDigest,
    ImageConfig,
    Other(String),
}

impl Key {
    fn name(self) -> String {
        match self {
            Self::Id => "id",
            Self::Osname => "osname",
            Self::Checksum => "checksum",
            Self::Booted => "booted",
            Self::Staged => "staged",
            Self::Pinned => "pinned",
            Self::Version => "version",
            Self::Reference => "container-image-reference",
            Self::Digest => "container-image-reference-digest",
            Self::Metadata => "base-commit-meta",
            Self::BaseChecksum => "base-checksum",
            Self::Initramfs => "regenerate-initramfs",
            Self::Packages => "requested-packages",
            Self::Removals => "base-removals",
            Self::ManifestDigest => "ostree.manifest-digest",
            Self::ImageConfig => "ostree.container.image-config",
            Self::Other(name) => return name,
        }
        .to_owned()
    }
}

#[derive(Arbitrary, Debug)]
enum Value {
    Text(String),
    Image(bool, String),
    Digest([u8; 32]),
    Config(String),
    Flag(bool),
    Number(u64),
    List(Vec<String>),
    Pairs(Vec<(String, u32)>),
    Dict(Vec<(Key, Value)>),
}

impl Value {
    fn variant(self) -> Variant<'static> {
        let hex = |bytes: [u8; 32]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        match self {
            // D-Bus strings have no NUL.
            Self::Text(text) => text.replace('\0', "").into(),
            Self::Image(true, name) => format!("ostree-unverified-registry:{}", name.replace('\0', "")).into(),
            Self::Image(false, name) => format!("ostree-image-signed:docker://{}", name.replace('\0', "")).into(),
            Self::Digest(bytes) => format!("sha256:{}", hex(bytes)).into(),
            Self::Config(label) => serde_json::json!({
                "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}, "history": [],
                "config": {"Labels": {"machineconfig": label}},
            })
            .to_string()
            .into(),
            Self::Flag(flag) => flag.into(),
            Self::Number(number) => number.into(),
            Self::List(list) => list.into_iter().map(|text| text.replace('\0', "")).collect::<Vec<_>>().into(),
            Self::Pairs(pairs) => {
                pairs.into_iter().map(|(text, number)| (text.replace('\0', ""), number)).collect::<Vec<_>>().into()
            }
            Self::Dict(entries) => Variant::from(dict(entries)),
        }
    }
}

fn dict(entries: Vec<(Key, Value)>) -> HashMap<String, Variant<'static>> {
    entries.into_iter().map(|(key, value)| (key.name().replace('\0', ""), value.variant())).collect()
}

fn call() -> zbus::message::Builder<'static> {
    Message::method_call("/org/projectatomic/rpmostree1/Sysroot", "GetAll")
}

fn check(deployment: &Deployment) {
    if let Some(version) = &deployment.version {
        shown(version, 100);
    }
    if let Some(config) = &deployment.rendered_config {
        shown(config, 253);
        assert!(!config.is_empty());
    }
    if let Some(digest) = &deployment.digest {
        assert_eq!(Digest::parse(digest.as_str()).as_ref(), Some(digest));
    }
    assert!(deployment.arguments.is_none() && deployment.wanted_arguments.is_none());
}

fn reply(message: &Message) -> Option<Vec<Option<Deployment>>> {
    let length = message.data().len();
    let parsed = bounded(length, 256, || {
        let properties: HashMap<String, OwnedVariant> = message.body().deserialize().ok()?;
        let dicts: Vec<HashMap<String, OwnedVariant>> = property(&properties, "Deployments")?;
        Some(dicts.iter().map(deployment).collect::<Vec<_>>())
    })?;
    parsed.iter().flatten().for_each(check);
    Some(parsed)
}

fn signal(member: &str, message: &Message) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let teller = Arc::clone(&told);
    let ended = bounded(message.data().len(), 64, || {
        heard("the transaction", message, &move |text| teller.lock().unwrap().push(text))
    });
    told.lock().unwrap().iter().for_each(|text| shown(text, 200));
    assert!(ended.is_none() || member == "Finished");
    if let Some(Err(error)) = ended {
        let fault = Fault::from(&error);
        shown(&fault.message, 900);
        assert_eq!(fault.reason, error.reason());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 3 {
        0 => {
            // SAFETY: no descriptors; invalid bytes are the purpose, and the daemon's bytes may be invalid, too.
            let message = unsafe { call().build_raw_body(data, "a{sv}", Vec::new()) };
            reply(&message.unwrap());
        }
        1 => {
            let Ok(given) = Vec::<Vec<(Key, Value)>>::arbitrary_take_rest(Unstructured::new(data)) else { return };
            let given: Vec<_> = given.into_iter().map(dict).collect();
            let count = given.len();
            let complete: Vec<bool> = given.iter().map(complete).collect();
            let body = HashMap::from([("Deployments", Variant::from(given))]);
            let Ok(message) = call().build(&body) else { return };
            // Variants with too many levels are refused as a whole.
            let Some(parsed) = reply(&message) else { return };
            assert_eq!(parsed.len(), count);
            assert_eq!(parsed.iter().map(Option::is_some).collect::<Vec<_>>(), complete);
        }
        _ => {
            let mut data = Unstructured::new(data);
            let Ok((member, success, whole)) = data.arbitrary::<(u8, bool, bool)>() else { return };
            let member = ["Finished", "Message", "TaskBegin", "PercentProgress"][usize::from(member % 4)];
            let text = String::from_utf8_lossy(data.take_rest()).replace('\0', "");
            let interface = "org.projectatomic.rpmostree1.Transaction";
            let builder = Message::signal("/", interface, member);
            let message = if whole { builder.build(&(success, text)) } else { builder.build(&text) };
            signal(member, &message.unwrap());
        }
    }
});

/// Whether a deployment has at least the required fields.
fn complete(dict: &HashMap<String, Variant<'static>>) -> bool {
    ["id", "osname", "checksum"].iter().all(|key| matches!(dict.get(*key), Some(Variant::Str(_))))
}
