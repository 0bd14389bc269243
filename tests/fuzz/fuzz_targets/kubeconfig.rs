//! The kubeconfig: for any content, the agent gets one HTTPS URL and one node name, or an error without a key or token.
//!
//! `@CA@`, `@CERT@`, `@KEY@` and `@TOKEN@` stand for real ones; `kubelet.pem` next to the kubeconfig holds certificate
//! and key, `token` the token.
#![no_main]

use std::sync::LazyLock;

use fuzz::{bounded, shown};
use libfuzzer_sys::fuzz_target;
use openssl::asn1::Asn1Time;
use openssl::base64::encode_block;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::{X509, X509Name};
use rebase_agent::cluster::fuzzing::load;
use rebase_agent::model::Fault;
use tempfile::TempDir;

const TOKEN: &str = "5ecre7-5ecre7-5ecre7";
const NODE: &str = "worker-0.example.com";

struct World {
    directory: TempDir,
    certificate: String,
    key: String,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let ec = EcKey::generate(&EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap()).unwrap();
    let key = PKey::from_ec_key(ec.clone()).unwrap();
    let mut name = X509Name::builder().unwrap();
    name.append_entry_by_nid(Nid::COMMONNAME, &format!("system:node:{NODE}")).unwrap();
    let mut certificate = X509::builder().unwrap();
    certificate.set_subject_name(&name.build()).unwrap();
    certificate.set_pubkey(&key).unwrap();
    certificate.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    certificate.set_not_after(&Asn1Time::days_from_now(365).unwrap()).unwrap();
    certificate.sign(&key, MessageDigest::sha256()).unwrap();
    let (certificate, key) = (certificate.build().to_pem().unwrap(), ec.private_key_to_pem().unwrap());
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("kubelet.pem"), [certificate.as_slice(), &key].concat()).unwrap();
    std::fs::write(directory.path().join("token"), TOKEN).unwrap();
    World { directory, certificate: encode_block(&certificate), key: encode_block(&key) }
});

/// Whether secrets appear only in their own fields: an error may quote every other field, such as the path of a file.
fn in_their_place(text: &str) -> bool {
    let belongs = |line: &str| {
        let line = line.trim_start();
        !(line.contains("@KEY@") || line.contains("@TOKEN@"))
            || matches!(line, "client-key-data: @KEY@" | "token: @TOKEN@")
    };
    !text.contains(['"', '\'', '|', '>', '?', '&', '*', '!', '%', '\r', '\u{85}', '\u{2028}', '\u{2029}'])
        && text.lines().all(belongs)
}

fuzz_target!(|text: &str| {
    let world = &*WORLD;
    let whole = text.replace("@CA@", &world.certificate).replace("@CERT@", &world.certificate);
    let whole = whole.replace("@KEY@", &world.key).replace("@TOKEN@", TOKEN);
    let path = world.directory.path().join("kubeconfig");
    std::fs::write(&path, &whole).unwrap();
    for node in [None, Some(NODE)] {
        // The YAML parser gets most of the input, and its budgets do not depend on the length.
        match bounded(whole.len() + (8 << 10), 512, || load(&path, node)) {
            Ok((server, name)) => {
                assert!(node.is_none_or(|node| node == name), "{name}");
                let (host, rest) = server.strip_prefix("https://").unwrap().split_once('/').unwrap_or((&server, ""));
                assert!(!host.is_empty() && !host.contains('@') && !rest.contains(['?', '#']), "{server}");
                assert!(server.is_ascii() && !server.contains([' ', '\n']) && !server.ends_with('/'), "{server}");
                let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-".contains(&b);
                assert!(name.bytes().all(plain) && (1..254).contains(&name.len()) && !name.contains(".."), "{name}");
            }
            Err(error) => {
                let message = Fault::from(&error).message;
                shown(&message, 500);
                if in_their_place(text) {
                    let key = &world.key[..24];
                    assert!(!message.contains("5ecre7") && !message.contains(key), "{message}");
                }
            }
        }
    }
});
