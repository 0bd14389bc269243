//! Errors of requests to the API server.

use std::path::PathBuf;
use std::time::Duration;

use super::MAX_BODY;
use crate::model::{Fault, Reason, printable};

/// An error of a request to the API server.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message is its documentation")]
pub enum ClusterError {
    #[error("{path} cannot be used: {why}")]
    Kubeconfig { path: PathBuf, why: String },
    #[error("the API server cannot be reached: {0}")]
    Connection(String),
    #[error("the API server was reached and its certificate is not trusted: {0}")]
    Untrusted(String),
    /// Status 401, and our certificate has expired.
    #[error(
        "the API server refuses the kubelet's certificate: {0}; the kubelet renews it, so see `oc get csr`, the \
         kubelet's log and this node's clock"
    )]
    CertificateExpired(String),
    /// Status 401, also after the credentials were read again.
    #[error("the API server refuses the kubelet's certificate; see `oc get csr` and the kubelet's log")]
    Unauthorized,
    /// Status 403.
    #[error("the API server forbids the request: {0}")]
    Forbidden(String),
    /// Status 404.
    #[error("the Node {0} does not exist; the kubelet creates it when it registers")]
    NotFound(String),
    /// Status 409 or 422: the Node is not the one that was read.
    #[error("the API server refused the change: {0}")]
    Refused(String),
    /// Status 410, also as an event of a watch.
    #[error("the watch expired")]
    Expired,
    /// Status 429 or 5xx. `retry_after` is the wait that the server requests.
    #[error("the API server returned {status}: {message}")]
    Busy { status: u16, message: String, retry_after: Option<Duration> },
    #[error(
        "the whole Node has more than {} MiB, so it is not read and the node does not reboot; lower nodeStatusMaxImages \
         in the pool's KubeletConfig, which bounds the list of images in the Node's status",
        MAX_BODY >> 20
    )]
    TooLarge,
    #[error("the API server's answer for {what} cannot be understood: {why}")]
    Confused { what: &'static str, why: String },
}

impl ClusterError {
    /// The reason word of this error.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Kubeconfig { .. } => Reason::KubeconfigInvalid,
            Self::Unauthorized | Self::CertificateExpired(_) | Self::Forbidden(_) => Reason::ClusterForbidden,
            Self::NotFound(_) => Reason::NodeNotFound,
            Self::TooLarge => Reason::NodeTooLarge,
            Self::Untrusted(_) => Reason::ClusterUntrusted,
            Self::Connection(_) | Self::Refused(_) | Self::Expired | Self::Busy { .. } | Self::Confused { .. } => {
                Reason::ClusterUnreachable
            }
        }
    }

    /// The wait that the server requests before the next request.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Busy { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

impl From<&ClusterError> for Fault {
    fn from(error: &ClusterError) -> Self {
        Self { reason: error.reason(), message: printable(&error.to_string(), 500) }
    }
}

pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    printable(&text, 300)
}

pub(super) fn connection(error: &reqwest::Error) -> ClusterError {
    let why = chain(error);
    match distrust(&why) {
        Some(hint) => ClusterError::Untrusted(format!("{hint} ({why})")),
        None => ClusterError::Connection(why),
    }
}

/// What is wrong with the server's certificate, by OpenSSL's message, which has no text of the server.
fn distrust(why: &str) -> Option<&'static str> {
    let (_, reason) = why.split_once("certificate verify failed")?;
    let has = |words: &str| reason.contains(words);
    Some(if has("not yet valid") {
        "it is not valid yet, so this node's clock is behind, or the clock that dated the certificate was ahead"
    } else if has("expired") {
        "it has expired, or this node's clock is ahead; renew the API server's certificate"
    } else if has("mismatch") {
        "it is for another name than the kubeconfig's server; correct server or tls-server-name in the kubeconfig"
    } else {
        "it is signed by another CA than the kubeconfig's certificate-authority; right after a rotation, wait until the \
         kubelet updates its file"
    })
}
