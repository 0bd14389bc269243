//! Signatures with a certified key, as issued by Fulcio or a private authority, and with an entry in a transparency
//! log, as in Rekor. Everything works without a network.

use anyhow::Result;
use openssl::asn1::{Asn1Integer, Asn1Object, Asn1OctetString, Asn1Time};
use openssl::base64::encode_block;
use openssl::bn::BigNum;
use openssl::hash::MessageDigest;
use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName};
use openssl::x509::{X509, X509Builder, X509Extension, X509NameBuilder};
use serde_json::{Map, Value, json};

use crate::image::Pushed;
use crate::registry::Registry;
use crate::sign::{KeyKind, Signer, attach_annotated, payload};

/// Fulcio's extension for the identity provider: as plain bytes, not as DER.
const ISSUER: &str = "1.3.6.1.4.1.57264.1.1";
const CERTIFICATE: &str = "dev.sigstore.cosign/certificate";
const CHAIN: &str = "dev.sigstore.cosign/chain";
const BUNDLE: &str = "dev.sigstore.cosign/bundle";
const HOUR: i64 = 3600;

/// A certificate authority for signers.
#[derive(Debug)]
pub struct Authority {
    certificate: X509,
    signer: Signer,
}

/// The content of a signer's certificate.
#[derive(Clone, Copy, Debug)]
pub struct Leaf<'a> {
    /// The subject's address.
    pub email: &'a str,
    /// The identity provider: Fulcio's extension.
    pub issuer: Option<&'a str>,
    /// Whether the certificate may sign code, which is required.
    pub code_signing: bool,
    /// Seconds from now until the certificate expires.
    pub until: i64,
}

impl<'a> Leaf<'a> {
    /// A certificate that any authority would issue for an hour.
    pub fn new(email: &'a str) -> Self {
        Self { email, issuer: None, code_signing: true, until: HOUR }
    }
}

/// A key and its certificate.
#[derive(Debug)]
pub struct Certified {
    signer: Signer,
    certificate_pem: String,
    chain_pem: String,
}

impl Authority {
    /// A new authority with a new key.
    pub fn generate() -> Self {
        let signer = Signer::generate(KeyKind::P256);
        let mut builder = certificate("test authority", &signer, -HOUR, 24 * HOUR);
        builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        builder.append_extension(KeyUsage::new().critical().key_cert_sign().build().unwrap()).unwrap();
        builder.set_issuer_name(&name("test authority")).unwrap();
        builder.sign(&signer.key, MessageDigest::sha256()).unwrap();
        Self { certificate: builder.build(), signer }
    }

    /// Its certificate, for a policy's `caData` or `caRootsData` (in base64).
    pub fn pem(&self) -> String {
        String::from_utf8(self.certificate.to_pem().unwrap()).unwrap()
    }

    /// A new key and a certificate for it.
    pub fn issue(&self, leaf: &Leaf<'_>) -> Certified {
        let signer = Signer::generate(KeyKind::P256);
        let mut builder = certificate("signer", &signer, (-HOUR).min(leaf.until - HOUR), leaf.until);
        builder.set_issuer_name(self.certificate.subject_name()).unwrap();
        builder.append_extension(KeyUsage::new().critical().digital_signature().build().unwrap()).unwrap();
        let mut usage = ExtendedKeyUsage::new();
        let usage = if leaf.code_signing { usage.code_signing() } else { usage.client_auth() };
        builder.append_extension(usage.build().unwrap()).unwrap();
        let context = builder.x509v3_context(Some(&self.certificate), None);
        let address = SubjectAlternativeName::new().email(leaf.email).build(&context).unwrap();
        builder.append_extension(address).unwrap();
        if let Some(issuer) = leaf.issuer {
            let (oid, bytes) = (Asn1Object::from_str(ISSUER), Asn1OctetString::new_from_bytes(issuer.as_bytes()));
            let extension = X509Extension::new_from_der(&oid.unwrap(), false, &bytes.unwrap()).unwrap();
            builder.append_extension(extension).unwrap();
        }
        builder.sign(&self.signer.key, MessageDigest::sha256()).unwrap();
        let certificate_pem = String::from_utf8(builder.build().to_pem().unwrap()).unwrap();
        Certified { signer, certificate_pem, chain_pem: self.pem() }
    }
}

/// A transparency log: it only promises that it has seen a signature.
#[derive(Debug)]
pub struct Log {
    signer: Signer,
}

impl Log {
    /// A new log with a new key.
    pub fn generate() -> Self {
        Self { signer: Signer::generate(KeyKind::P256) }
    }

    /// Its key, for a policy's `rekorPublicKeyData` (in base64).
    pub fn public_key_pem(&self) -> String {
        self.signer.public_key_pem()
    }

    /// The promise: a signed entry timestamp over the entry, in the form of RFC 8785, which here means sorted keys.
    fn bundle(&self, payload: &[u8], signature: &[u8], verifier_pem: &str) -> String {
        let body = json!({
            "apiVersion": "0.0.1",
            "kind": "hashedrekord",
            "spec": {
                "data": { "hash": { "algorithm": "sha256", "value": hex(&openssl::sha::sha256(payload)) } },
                "signature": {
                    "content": encode_block(signature),
                    "publicKey": { "content": encode_block(verifier_pem.as_bytes()) },
                },
            },
        });
        let der = self.signer.key.public_key_to_der().unwrap();
        let entry = json!({
            "body": encode_block(body.to_string().as_bytes()),
            "integratedTime": std::time::UNIX_EPOCH.elapsed().unwrap().as_secs(),
            "logID": hex(&openssl::sha::sha256(&der)),
            "logIndex": 1,
        });
        let timestamp = self.signer.sign_bytes(entry.to_string().as_bytes());
        json!({ "SignedEntryTimestamp": encode_block(&timestamp), "Payload": entry }).to_string()
    }
}

/// Signs an image with a certified key under its own identity (`host/repo:tag` or `host/repo`), and has `log` promise
/// that it has seen the signature.
pub async fn sign_certified(
    registry: &Registry,
    image: &Pushed,
    identity: &str,
    by: &Certified,
    log: Option<&Log>,
) -> Result<()> {
    let mut annotations = Map::new();
    annotations.insert(CERTIFICATE.into(), by.certificate_pem.as_str().into());
    annotations.insert(CHAIN.into(), by.chain_pem.as_str().into());
    sign_logged(registry, image, identity, &by.signer, &by.certificate_pem, log, annotations).await
}

/// Signs an image with a bare key, and has `log` promise that it has seen the signature.
pub async fn sign_keyed(registry: &Registry, image: &Pushed, identity: &str, signer: &Signer, log: &Log) -> Result<()> {
    sign_logged(registry, image, identity, signer, &signer.public_key_pem(), Some(log), Map::new()).await
}

async fn sign_logged(
    registry: &Registry,
    image: &Pushed,
    identity: &str,
    signer: &Signer,
    verifier_pem: &str,
    log: Option<&Log>,
    mut annotations: Map<String, Value>,
) -> Result<()> {
    let payload = payload(identity, &image.digest);
    let signature = signer.sign_bytes(&payload);
    if let Some(log) = log {
        annotations.insert(BUNDLE.into(), log.bundle(&payload, &signature, verifier_pem).into());
    }
    attach_annotated(registry, &image.digest, &image.repo, payload, &signature, annotations).await
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn name(common: &str) -> openssl::x509::X509Name {
    let mut name = X509NameBuilder::new().unwrap();
    name.append_entry_by_text("CN", common).unwrap();
    name.build()
}

fn certificate(subject: &str, signer: &Signer, from: i64, until: i64) -> X509Builder {
    let now = i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap();
    let mut serial = BigNum::new().unwrap();
    serial.rand(127, openssl::bn::MsbOption::ONE, false).unwrap();
    let mut builder = X509Builder::new().unwrap();
    builder.set_version(2).unwrap();
    builder.set_serial_number(&Asn1Integer::from_bn(&serial).unwrap()).unwrap();
    builder.set_subject_name(&name(subject)).unwrap();
    builder.set_pubkey(&signer.key).unwrap();
    builder.set_not_before(&Asn1Time::from_unix(now + from).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::from_unix(now + until).unwrap()).unwrap();
    builder
}
