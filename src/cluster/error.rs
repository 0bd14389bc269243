//! Why the API server could not be asked, or did not answer.

use std::path::PathBuf;
use std::time::Duration;

use super::MAX_BODY;
use crate::model::{Fault, Reason, printable};

/// Why the API server could not be asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The kubeconfig, or a file it names.
    #[error("{path} cannot be used: {why}")]
    Kubeconfig {
        /// The kubeconfig.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No connection, or it broke.
    #[error("the API server cannot be reached: {0}")]
    Connection(String),
    /// It was reached, and its certificate is not accepted.
    #[error("the API server was reached and its certificate is not trusted: {0}")]
    Untrusted(String),
    /// 401, and our certificate has expired.
    #[error(
        "the API server refuses the kubelet's certificate: {0}; the kubelet renews it, so see `oc get csr`, the \
         kubelet's log and this node's clock"
    )]
    CertificateExpired(String),
    /// 401, also after the credentials were read anew.
    #[error("the API server refuses the kubelet's certificate; see `oc get csr` and the kubelet's log")]
    Unauthorized,
    /// 403.
    #[error("the API server forbids the request: {0}")]
    Forbidden(String),
    /// 404.
    #[error("the Node {0} does not exist; the kubelet creates it when it registers")]
    NotFound(String),
    /// 409 or 422: the Node is not the one we read.
    #[error("the API server refused the change: {0}")]
    Refused(String),
    /// 410, or its like inside a watch.
    #[error("the watch expired")]
    Expired,
    /// 429 and 5xx.
    #[error("the API server is not well: status {status} {message}")]
    Busy {
        /// HTTP status.
        status: u16,
        /// Its words.
        message: String,
        /// How long it asks us to wait.
        retry_after: Option<Duration>,
    },
    /// An answer larger than the agent takes.
    #[error(
        "the whole Node has more than {} MiB, so it is not read and the node does not reboot; lower nodeStatusMaxImages \
         in the pool's KubeletConfig, which bounds the list of images in the Node's status",
        MAX_BODY >> 20
    )]
    TooLarge,
    /// An answer that makes no sense.
    #[error("the API server's answer for {what} makes no sense: {why}")]
    Confused {
        /// What was asked.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
}

impl ClusterError {
    /// The stable word.
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

    /// How long the server asks us to stay away.
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

/// What is wrong with the server's certificate, by OpenSSL's words for it, of which the server chooses none.
fn distrust(why: &str) -> Option<&'static str> {
    let (_, reason) = why.split_once("certificate verify failed")?;
    let has = |words: &str| reason.contains(words);
    Some(if has("not yet valid") {
        "it is not valid yet, so this node's clock is behind, or the server's was ahead"
    } else if has("expired") {
        "it has expired, or this node's clock is ahead; renew the API server's certificate"
    } else if has("mismatch") {
        "it is for another name than the kubeconfig's server; correct server or tls-server-name there"
    } else {
        "it is by another CA than the kubeconfig's certificate-authority; right after a rotation the kubelet's file follows"
    })
}
