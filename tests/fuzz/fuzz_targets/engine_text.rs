//! The engine's free text, most of which a registry may choose: its reason, and the parts that a message may quote.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use fuzz::{bounded, shown};
use libfuzzer_sys::fuzz_target;
use rebase_agent::model::{Fault, PinnedImage, Reason, printable};
use rebase_agent::trust::{Engine, NodePolicy, Settings, fuzzing, reference};

static ASKED: LazyLock<(Engine, NodePolicy, PinnedImage)> = LazyLock::new(|| {
    let engine = Engine::new(Settings {
        policy: PathBuf::new(),
        registries_d: PathBuf::new(),
        skopeo: PathBuf::new(),
        cert_dir: None,
        auth_files: Vec::new(),
        etc: PathBuf::new(),
        scratch: None,
        deadline: Duration::from_secs(60),
    });
    let policy = br#"{"default":[{"type":"sigstoreSigned"}]}"#;
    let policy = fuzzing::policy(policy, Path::new("/etc/containers/policy.json")).unwrap();
    let image = reference::parse(&format!("quay.io/o/i@sha256:{}", "ab".repeat(32))).unwrap();
    (engine, policy, image)
});

/// Reasons that a registry must not be able to cause with its answer: they stop the node until an operator acts.
const OF_THE_NODE: [Reason; 6] = [
    Reason::PolicyInvalid,
    Reason::PolicyRejects,
    Reason::GpgNeedsScratch,
    Reason::RegistryConfigInvalid,
    Reason::ResourcesExhausted,
    Reason::EngineUnfit,
];

fuzz_target!(|text: &str| {
    let (engine, policy, image) = &*ASKED;
    // `@` stands for the image's digest, so that the fuzzer can find it.
    let text = text.replace("@@", &image.to_string()).replace('@', image.digest().as_str());
    let secret = text.replace('?', "?X-Amz-Signature=5ecre7");
    let (error, fault) = bounded(secret.len(), 16, || {
        let error = fuzzing::classify(&secret, engine, policy, image, "default");
        let fault = Fault::from(&error);
        (error, fault)
    });
    shown(&fault.message, 900);
    assert_eq!(fault.reason, error.reason());
    assert!(
        secret.starts_with("invalid policy in ") || text.contains("5ecre7") || !error.to_string().contains("5ecre7")
    );
    for before in ["reading manifest @ in quay.io/o/i: ", "pinging container registry quay.io: ", "Get \"https://"] {
        let before = before.replace('@', image.digest().as_str());
        let quoted = fuzzing::classify(&format!("{before}{text}"), engine, policy, image, "default");
        assert!(!OF_THE_NODE.contains(&quoted.reason()), "{quoted}");
    }
    for limit in [0, 1, 80, 900] {
        let printed = printable(&text, limit);
        shown(&printed, limit.max(1));
        assert_eq!(printable(&printed, limit), printed);
    }
});
