//! Who vouches for an image: the keys and identities that the applicable requirements of the policy accept. The engine
//! does not tell which of several keys it used, so all are named.

use std::path::Path;

use openssl::pkey::PKey;
use openssl::sha::sha256;
use serde_json::Value;

use super::gate::{MAX_POLICY, Policy, Requirement};
use crate::files::read_bounded;
use crate::model::{PinnedImage, printable};

/// Longest text, in characters.
const MAX_TEXT: usize = 500;

/// The keys and identities that vouch for `image` under `policy`. Reads the files that the policy names.
pub(super) fn vouchers(policy: &Policy, image: &PinnedImage) -> String {
    let (_, requirements) = policy.applicable(image);
    let named: Vec<_> =
        requirements.iter().map(|one| voucher(one).join(" or ")).filter(|one| !one.is_empty()).collect();
    printable(&named.join(" and "), MAX_TEXT)
}

/// The alternatives of one requirement; none if it demands no signature.
fn voucher(requirement: &Requirement) -> Vec<String> {
    let gpg = match requirement.0.get("type").and_then(Value::as_str) {
        Some("signedBy") => true,
        Some("sigstoreSigned") => false,
        _ => return Vec::new(),
    };
    let mut found = Vec::new();
    for (name, value) in &requirement.0 {
        let texts = value.as_array().map_or_else(|| vec![value], |list| list.iter().collect());
        let texts = texts.into_iter().filter_map(Value::as_str);
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        match name.as_str() {
            "keyPath" | "keyPaths" => found.extend(texts.map(|path| match read_bounded(Path::new(path), MAX_POLICY) {
                Ok(bytes) => key(gpg, &bytes),
                Err(_) => format!("a key in {path}"),
            })),
            "keyData" | "keyDatas" => found.extend(texts.map(|data| {
                openssl::base64::decode_block(data).map_or_else(|_| "a key".to_owned(), |bytes| key(gpg, &bytes))
            })),
            "fulcio" => found.push(format!(
                "{} of {}",
                text("subjectEmail").unwrap_or("an identity"),
                text("oidcIssuer").unwrap_or("an issuer")
            )),
            "pki" => {
                let subject = text("subjectEmail").or_else(|| text("subjectHostname"));
                found.push(format!("a certificate of {}", subject.unwrap_or("the policy's CA")));
            }
            _ => {}
        }
    }
    found
}

/// A sigstore key by the SHA-256 of its DER form, as `openssl pkey -pubin -outform DER | sha256sum` prints it; a GPG keyring
/// by that of its bytes.
fn key(gpg: bool, bytes: &[u8]) -> String {
    let hex = |bytes: &[u8]| sha256(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let der = PKey::public_key_from_pem(bytes).and_then(|key| key.public_key_to_der());
    match der {
        Ok(der) if !gpg => format!("key sha256:{}", hex(&der)),
        _ => format!("keyring sha256:{}", hex(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEM: &str = "-----BEGIN PUBLIC KEY-----\n\
        MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaxfR8uEsQkf4vOblY6RA8ncDfYEt\n\
        6zOg9KE5RdiYwpZP40Li/hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9Q==\n\
        -----END PUBLIC KEY-----\n";

    #[test]
    fn every_key_and_identity_is_named() {
        let image = crate::trust::reference::parse(&format!("quay.io/o/i@sha256:{}", "ab".repeat(32))).unwrap();
        let of = |requirements: &str| {
            let policy = format!(r#"{{"default":[{requirements}]}}"#);
            vouchers(&Policy::parse(policy.as_bytes()).unwrap(), &image)
        };
        let data = openssl::base64::encode_block(PEM.as_bytes());
        let der = PKey::public_key_from_pem(PEM.as_bytes()).unwrap().public_key_to_der().unwrap();
        let hex: String = sha256(&der).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(of(&format!(r#"{{"type":"sigstoreSigned","keyData":"{data}"}}"#)), format!("key sha256:{hex}"));
        let two = format!(r#"{{"type":"sigstoreSigned","keyDatas":["{data}","{data}"]}}"#);
        assert_eq!(of(&two), format!("key sha256:{hex} or key sha256:{hex}"));
        let fulcio = r#"{"type":"sigstoreSigned","fulcio":{"oidcIssuer":"https://issuer","subjectEmail":"a@b\u001b"}}"#;
        assert_eq!(of(fulcio), "a@b\\u{1b} of https://issuer");
        assert_eq!(of(r#"{"type":"sigstoreSigned","pki":{"subjectHostname":"h"}}"#), "a certificate of h");
        let missing = r#"{"type":"signedBy","keyType":"GPGKeys","keyPath":"/nonexistent/k"}"#;
        assert_eq!(of(missing), "a key in /nonexistent/k");
        let gpg = of(r#"{"type":"signedBy","keyType":"GPGKeys","keyData":"AAAA"}"#);
        assert!(gpg.starts_with("keyring sha256:709e80c8"), "{gpg}");
        assert_eq!(of(&format!(r#"{fulcio},{{"type":"insecureAcceptAnything"}}"#)), "a@b\\u{1b} of https://issuer");
        assert!(of(&[fulcio; 100].join(",")).chars().count() <= MAX_TEXT);
    }
}
