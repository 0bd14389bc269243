//! Neighbour 1, the API server: our own Node, through the kubelet's own credentials. The only place that speaks HTTP.

mod kubeconfig;
pub mod node;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Certificate, Client, Identity, Method, Proxy, Response, StatusCode, redirect};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use crate::backoff::{Backoff, full_jitter, jittered, random};
use crate::model::annotations::MCO;
use crate::model::{Fault, Reason, printable};
use crate::report::Patch;
use kubeconfig::{Access, Credentials};
use node::{Heard, NodeObject, VERDICT};

/// Our field manager, by which the API server keeps our writes apart from the MCD's.
pub const MANAGER: &str = "rebase-agent";

/// A connection that is idle for so long is probed. With the two below, a peer that is gone is noticed in 60 s, however
/// long its watch may be silent.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Time between two probes that are not answered.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Probes without an answer after which the connection is closed.
const KEEPALIVE_RETRIES: u32 = 3;
/// Most that a server's `Retry-After` is believed: a nonsensical one must not silence the node for ever.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10 * 60);
/// Largest answer, in bytes; a whole Node lists every image on it.
const MAX_BODY: usize = 4 << 20;
/// Largest watch line, in bytes: 256 KiB of annotations and what the API server adds.
const MAX_LINE: usize = 2 << 20;

const METADATA: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
const FULL: &str = "application/json";
const MERGE_PATCH: &str = "application/merge-patch+json";

/// How long things may take. The defaults are the service's.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Most that the very first request waits: enough to spread a rack that was switched on together.
    pub first: Duration,
    /// Making a connection.
    pub connect: Duration,
    /// Reading or patching one object.
    pub request: Duration,
    /// How long past its announced end a watch may stay open. Until then it may be silent: API servers on etcd 3.4 send
    /// bookmarks only about 2 s before the end.
    pub grace: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        let [first, connect, request, grace] = [2, 10, 15, 5].map(Duration::from_secs);
        Self { first, connect, request, grace }
    }
}

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

/// The API server, seen by one node.
pub struct Api {
    kubeconfig: PathBuf,
    node: Option<String>,
    timing: Timing,
    /// See [`Heard::wrote`].
    wrote: AtomicU64,
    /// The latest `Date` of a response, in milliseconds since the epoch, and when it came.
    clock: Mutex<Option<(u64, Instant)>>,
    session: Mutex<Option<Session>>,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("kubeconfig", &self.kubeconfig).finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct Session {
    access: Access,
    client: Client,
}

impl Session {
    fn url(&self) -> String {
        format!("{}/api/v1/nodes/{}", self.access.server, self.access.node)
    }

    /// The collection that holds our Node alone.
    fn list_url(&self) -> String {
        format!("{}/api/v1/nodes?fieldSelector=metadata.name%3D{}", self.access.server, self.access.node)
    }
}

impl Api {
    /// Reads nothing yet. `node` is the node's name where the credentials are not the kubelet's and do not tell it.
    #[must_use]
    pub fn new(kubeconfig: PathBuf, node: Option<String>, timing: Timing) -> Self {
        Self { kubeconfig, node, timing, wrote: AtomicU64::new(0), clock: Mutex::new(None), session: Mutex::new(None) }
    }

    /// Reads the credentials anew; the connections are kept only while nothing in them changed.
    fn session(&self) -> Result<Session, ClusterError> {
        let access = kubeconfig::load(&self.kubeconfig, self.node.as_deref())?;
        let mut kept = self.session.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*kept {
            Some(session) if session.access == access => Ok(session.clone()),
            _ => {
                let client = client(&access, self.timing.connect)
                    .map_err(|why| ClusterError::Kubeconfig { path: self.kubeconfig.clone(), why })?;
                let session = Session { access, client };
                *kept = Some(session.clone());
                Ok(session)
            }
        }
    }

    /// Drops the connections: another one may lead to another, healthier server.
    fn forget(&self) {
        *self.session.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
    }

    /// Our Node's metadata, and the version to watch from. It is listed, not read: API servers keep a few minutes of
    /// history, and the version of an idle Node is often older, while that of a list is the database's own.
    ///
    /// # Errors
    /// See [`ClusterError`].
    pub async fn metadata(&self) -> Result<(NodeObject, String), ClusterError> {
        let (json, asked, node) = self.ask(Method::GET, METADATA_LIST, Session::list_url, None).await?;
        let (object, version) = listed(&json, &node)?;
        Ok((self.own(object, Some(asked), &node)?, version))
    }

    /// Our whole Node, which alone tells whether it is schedulable.
    ///
    /// # Errors
    /// See [`ClusterError`].
    pub async fn full(&self) -> Result<NodeObject, ClusterError> {
        let (json, asked, node) = self.ask(Method::GET, FULL, Session::url, None).await?;
        self.own(&json, Some(asked), &node)
    }

    /// The API server's time in milliseconds since the epoch: its latest `Date` and what has passed since. `None` before
    /// its first answer. What it stamps is compared with this, never with the node's clock, which may be wrong.
    #[must_use]
    pub fn time(&self) -> Option<u64> {
        let (date, at) = (*self.clock.lock().unwrap_or_else(std::sync::PoisonError::into_inner))?;
        Some(date.saturating_add(u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)))
    }

    fn take_date(&self, headers: &HeaderMap) {
        if let Some(date) = headers.get(DATE).and_then(|date| date.to_str().ok()).and_then(node::http_date) {
            *self.clock.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some((date, Instant::now()));
        }
    }

    /// Applies `patch` to the annotations of the Node that has `uid`, and returns it as it is then.
    ///
    /// # Errors
    /// See [`ClusterError`].
    pub async fn patch(&self, uid: &str, patch: &Patch) -> Result<NodeObject, ClusterError> {
        let body = serde_json::json!({ "metadata": { "uid": uid, "annotations": patch } });
        let url = |session: &Session| format!("{}?fieldManager={MANAGER}", session.url());
        let (json, asked, node) = self.ask(Method::PATCH, METADATA, url, Some(body.to_string())).await?;
        let node = self.own(&json, Some(asked), &node)?;
        if VERDICT.iter().any(|key| patch.contains_key(&format!("{MCO}{key}"))) {
            self.wrote.fetch_max(node.wrote, Relaxed);
        }
        Ok(node)
    }

    /// `json`, heard now, if it is our Node.
    fn own(&self, json: &[u8], asked: Option<Instant>, node: &str) -> Result<NodeObject, ClusterError> {
        let parsed = NodeObject::parse(json, Heard { asked, at: Instant::now(), wrote: self.wrote.load(Relaxed) })?;
        if parsed.facts.name == node {
            return Ok(parsed);
        }
        let why = format!("it tells of the Node {}", printable(&parsed.facts.name, 253));
        Err(ClusterError::Confused { what: "the Node", why })
    }

    /// The body of a good answer, when it was asked for, and the name of our Node.
    async fn ask(
        &self,
        method: Method,
        accept: &'static str,
        url: impl Fn(&Session) -> String,
        body: Option<String>,
    ) -> Result<(Vec<u8>, Instant, String), ClusterError> {
        let once = async || {
            let session = self.session()?;
            let mut request = session.client.request(method.clone(), url(&session)).timeout(self.timing.request);
            request = request.header(ACCEPT, accept);
            if let Some(body) = &body {
                request = request.header(CONTENT_TYPE, MERGE_PATCH).body(body.clone());
            }
            let asked = Instant::now();
            let response = request.send().await.map_err(|e| connection(&e))?;
            self.take_date(response.headers());
            let json = checked(response, &session.access.node).await?;
            Ok((json, asked, session.access.node))
        };
        let mut answer = once().await;
        // The certificate may have been rotated between our reading it and its use.
        if matches!(answer, Err(ClusterError::Unauthorized)) {
            self.forget();
            answer = once().await;
        }
        if matches!(answer, Err(ClusterError::Unauthorized))
            && let Some(expired) = self.session().ok().and_then(|session| session.access.expired())
        {
            answer = Err(ClusterError::CertificateExpired(expired));
        }
        if answer.is_err() {
            self.forget();
        }
        answer
    }

    /// Watches our Node from `since` until the server ends the watch after `length`; tells every state it sees.
    async fn watch(&self, since: &str, length: Duration, told: &mpsc::Sender<Told>) -> Result<(), ClusterError> {
        let session = self.session()?;
        let url = format!(
            "{}&watch=1&allowWatchBookmarks=true&resourceVersion={since}&timeoutSeconds={}",
            session.list_url(),
            length.as_secs().max(1)
        );
        let request =
            session.client.get(url).header(ACCEPT, METADATA).timeout(length.saturating_add(self.timing.grace));
        let silent = |_| ClusterError::Connection("the API server accepted a watch and fell silent".to_owned());
        let response = timeout(self.timing.request, request.send()).await.map_err(silent)?;
        let mut response = response.map_err(|e| connection(&e))?;
        if response.status() != StatusCode::OK {
            return checked(response, &session.access.node).await.map(|_| ());
        }
        let mut lines = Lines::default();
        loop {
            let Some(chunk) = response.chunk().await.map_err(|e| connection(&e))? else { return Ok(()) };
            for line in lines.push(&chunk)? {
                if let Some(object) = event(&line, &session.access.node)? {
                    let node = self.own(object, None, &session.access.node)?;
                    if told.send(Ok(node)).await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// A state of our Node, or why there is none.
pub type Told = Result<NodeObject, ClusterError>;

/// Follows our Node for ever: read, watch until the watch ends, read again. The watch only makes it quicker; where it
/// is not allowed or does not work, the reads alone keep us informed. `poll` is the length of a watch, and with it the
/// time between two reads. A watch is never resumed without a read: the read is what finds out that a watch told
/// nothing, or that the database was restored, and it is one request in a `poll`.
pub async fn follow(api: std::sync::Arc<Api>, poll: Duration, told: mpsc::Sender<Told>) {
    let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let spread = |duration: Duration| Duration::from_millis(jittered(milliseconds(duration), random()));
    let mut early: u32 = 0;
    sleep(Duration::from_millis(full_jitter(milliseconds(api.timing.first), random()))).await;
    loop {
        let length = spread(poll);
        let began = Instant::now();
        let (read, ended) = match api.metadata().await {
            Ok((node, since)) => {
                if told.send(Ok(node)).await.is_err() {
                    return;
                }
                (true, api.watch(&since, length, &told).await)
            }
            Err(error) => (false, Err(error)),
        };
        let left = length.saturating_sub(began.elapsed());
        early = if left < length / 2 { 0 } else { early.saturating_add(1) };
        let backoff = Backoff::CLUSTER.delay(early.max(1));
        let pause = match &ended {
            // A server that ends every watch when it restarts would be asked by every node at once; one that ends them
            // as soon as they begin, without end.
            Ok(()) => Duration::from_millis(full_jitter(backoff, random())),
            // It may be read and not be watched: then the reads must suffice.
            Err(ClusterError::Forbidden(_)) if read => left,
            Err(_) => Duration::from_millis(jittered(backoff, random())),
        };
        let pause = if read { pause.min(left) } else { pause };
        let asked_for = ended.as_ref().err().and_then(ClusterError::retry_after).map(spread);
        if let Err(error) = ended {
            tracing::debug!("following the Node: {error}");
            api.forget();
            // A watch that breaks says nothing about the Node, except that it is gone; the next read will.
            let telling = !read || matches!(error, ClusterError::NotFound(_));
            if telling && told.send(Err(error)).await.is_err() {
                return;
            }
        }
        sleep(pause.max(asked_for.unwrap_or_default())).await;
    }
}

/// Resolves every name to the addresses of one host: `tls-server-name` is what the certificate says, not where it is.
struct Elsewhere(String);

impl reqwest::dns::Resolve for Elsewhere {
    fn resolve(&self, _: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let host = self.0.clone();
        Box::pin(async move {
            let addresses: Vec<_> = tokio::net::lookup_host((host, 0)).await?.collect();
            Ok(Box::new(addresses.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

fn client(access: &Access, connect: Duration) -> Result<Client, String> {
    let explain = |error: reqwest::Error| chain(&error);
    let mut builder = Client::builder()
        .tls_certs_only(Certificate::from_pem_bundle(&access.ca).map_err(explain)?)
        .user_agent(concat!("rebase-agent/", env!("CARGO_PKG_VERSION")))
        // API traffic bypasses the proxy that image pulls use.
        .no_proxy()
        .redirect(redirect::Policy::none())
        .https_only(true)
        .connect_timeout(connect)
        .tcp_keepalive(KEEPALIVE)
        .tcp_keepalive_interval(KEEPALIVE_INTERVAL)
        .tcp_keepalive_retries(KEEPALIVE_RETRIES);
    builder = match &access.credentials {
        Credentials::Certificate { chain, key } => {
            builder.identity(Identity::from_pkcs8_pem(chain, key).map_err(explain)?)
        }
        Credentials::Token(token) => {
            let mut bearer = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|e| e.to_string())?;
            bearer.set_sensitive(true);
            builder.default_headers(HeaderMap::from_iter([(AUTHORIZATION, bearer)]))
        }
    };
    if let Some(proxy) = &access.proxy {
        builder = builder.proxy(Proxy::all(proxy.clone()).map_err(explain)?);
    }
    if let Some(host) = &access.host {
        builder = builder.dns_resolver(Elsewhere(host.clone()));
    }
    builder.build().map_err(explain)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    printable(&text, 300)
}

fn connection(error: &reqwest::Error) -> ClusterError {
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

/// The body of a good answer; an error for every other.
async fn checked(mut response: Response, node: &str) -> Result<Vec<u8>, ClusterError> {
    let status = response.status();
    let retry_after = retry_after(response.headers());
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| connection(&e))? {
        if body.len().saturating_add(chunk.len()) > MAX_BODY {
            if status == StatusCode::OK {
                return Err(ClusterError::TooLarge);
            }
            break;
        }
        body.extend_from_slice(&chunk);
    }
    if status == StatusCode::OK {
        return Ok(body);
    }
    Err(refusal(status, retry_after, &body, node))
}

/// `Retry-After` in seconds; the date form is not used by API servers.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

/// What a status other than 200 means. Pure.
fn refusal(status: StatusCode, retry_after: Option<Duration>, body: &[u8], node: &str) -> ClusterError {
    #[derive(Deserialize)]
    struct Status {
        message: String,
    }
    let message = serde_json::from_slice::<Status>(body).map(|status| printable(&status.message, 300));
    let message = message.unwrap_or_default();
    match status.as_u16() {
        401 => ClusterError::Unauthorized,
        403 => ClusterError::Forbidden(message),
        404 => ClusterError::NotFound(node.to_owned()),
        409 | 422 => ClusterError::Refused(message),
        410 => ClusterError::Expired,
        429 | 500..=599 => ClusterError::Busy { status: status.as_u16(), message, retry_after },
        other => ClusterError::Confused { what: "the Node", why: format!("status {other} {message}") },
    }
}

/// Our Node in a list of it alone, and the list's version. Pure. A watch without a version, or from 0, begins anywhere;
/// so a list without a proper one is an error.
fn listed<'a>(json: &'a [u8], node: &str) -> Result<(&'a [u8], String), ClusterError> {
    #[derive(Deserialize)]
    struct List<'a> {
        metadata: Metadata,
        #[serde(borrow)]
        items: Option<Vec<&'a serde_json::value::RawValue>>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        resource_version: String,
    }
    let confused = |why: &str| ClusterError::Confused { what: "the list of our Node", why: printable(why, 200) };
    let list: List<'a> = serde_json::from_slice(json).map_err(|e| confused(&e.to_string()))?;
    let version = list.metadata.resource_version;
    if !version.parse::<u64>().is_ok_and(|version| version > 0) || version.starts_with('+') {
        return Err(confused(&format!("its resourceVersion is `{version}`, not a positive number")));
    }
    match list.items.unwrap_or_default().as_slice() {
        [] => Err(ClusterError::NotFound(node.to_owned())),
        [item] => Ok((item.get().as_bytes(), version)),
        more => Err(confused(&format!("it holds {} Nodes", more.len()))),
    }
}

/// The Node of one watch event; `None` for a bookmark. Pure.
fn event<'a>(line: &'a [u8], node: &str) -> Result<Option<&'a [u8]>, ClusterError> {
    #[derive(Deserialize)]
    struct Event<'a> {
        r#type: &'a str,
        #[serde(borrow)]
        object: &'a serde_json::value::RawValue,
    }
    #[derive(Deserialize)]
    struct Status {
        code: u16,
    }
    let confused = |why: String| ClusterError::Confused { what: "the watch", why: printable(&why, 200) };
    let event: Event<'_> = serde_json::from_slice(line).map_err(|e| confused(e.to_string()))?;
    let object = event.object.get().as_bytes();
    match event.r#type {
        "ADDED" | "MODIFIED" => Ok(Some(object)),
        "BOOKMARK" => Ok(None),
        "DELETED" => Err(ClusterError::NotFound(node.to_owned())),
        "ERROR" => {
            let status: Status = serde_json::from_slice(object).map_err(|e| confused(e.to_string()))?;
            let status = StatusCode::from_u16(status.code).map_err(|e| confused(e.to_string()))?;
            Err(refusal(status, None, object, node))
        }
        other => Err(confused(format!("an event of type {other}"))),
    }
}

/// Cuts a byte stream into lines of bounded length. Pure.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn push(&mut self, chunk: &[u8]) -> Result<Vec<Vec<u8>>, ClusterError> {
        let mut lines = Vec::new();
        for piece in chunk.split_inclusive(|byte| *byte == b'\n') {
            self.rest.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.rest);
                if !line.trim_ascii().is_empty() {
                    lines.push(line);
                }
            }
        }
        if self.rest.len() > MAX_LINE {
            let why = format!("a line of more than {MAX_LINE} bytes");
            return Err(ClusterError::Confused { what: "the watch", why });
        }
        Ok(lines)
    }
}

/// What tests/fuzz reaches of the private parsers: the server and the node in a kubeconfig, and the watch.
#[cfg(fuzzing)]
#[allow(missing_docs, reason = "the names are those of the parsers")]
pub mod fuzzing {
    use super::{Api, ClusterError as Error, Lines, NodeObject, event, kubeconfig};
    pub fn load(path: &std::path::Path, node: Option<&str>) -> Result<(String, String), Error> {
        kubeconfig::load(path, node).map(|access| (access.server, access.node))
    }
    pub fn watch(chunks: &[&[u8]], api: &Api, node: &str, told: &mut Vec<NodeObject>) -> Result<(), Error> {
        let mut lines = Lines::default();
        chunks.iter().try_for_each(|chunk| {
            let objects = lines.push(chunk)?.into_iter().map(|line| Ok(event(&line, node)?.map(<[u8]>::to_vec)));
            objects.filter_map(Result::transpose).try_for_each(|json| Ok(told.push(api.own(&json?, None, node)?)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_may_come_in_any_pieces() {
        let text = b"one\n\ntwo\nthree";
        for size in 1..=text.len() {
            let mut lines = Lines::default();
            let mut all = Vec::new();
            for chunk in text.chunks(size) {
                all.extend(lines.push(chunk).unwrap());
            }
            assert_eq!(all, [b"one\n".to_vec(), b"two\n".to_vec()]);
            assert_eq!(lines.rest, b"three");
        }
        assert!(Lines::default().push(&vec![b'x'; MAX_LINE + 1]).is_err());
    }

    #[test]
    fn lines_take_what_they_are_long() {
        let lines = Lines::default().push(&b"{}\n".repeat(10_000)).unwrap();
        assert_eq!(lines.len(), 10_000);
        assert!(lines.iter().map(Vec::capacity).sum::<usize>() < 1 << 20);
    }

    #[test]
    fn events_are_told_apart() {
        let object = r#"{"metadata":{"name":"n","uid":"u","resourceVersion":"1"}}"#;
        let event = |kind: &str, object: &str| {
            let line = format!(r#"{{"type":"{kind}","object":{object}}}"#);
            event(line.as_bytes(), "n").map(|object| object.map(<[u8]>::to_vec))
        };
        assert!(event("ADDED", object).unwrap().is_some());
        assert!(event("MODIFIED", object).unwrap().is_some());
        assert!(event("BOOKMARK", r#"{"metadata":{"resourceVersion":"2"}}"#).unwrap().is_none());
        assert!(matches!(event("DELETED", object), Err(ClusterError::NotFound(_))));
        assert!(matches!(event("ERROR", r#"{"kind":"Status","code":410}"#), Err(ClusterError::Expired)));
        assert!(matches!(event("ERROR", r#"{"code":500,"message":"x"}"#), Err(ClusterError::Busy { .. })));
        for bad in ["{}", "1", "\"x\""] {
            assert!(event("ERROR", bad).is_err());
        }
        assert!(event("PARTY", object).is_err());
    }

    #[test]
    fn lists_hold_our_node_and_a_version() {
        let object = r#"{"metadata":{"name":"n","uid":"u","resourceVersion":"1"}}"#;
        let list = |version: &str, items: &str| {
            let json = format!(r#"{{"metadata":{{"resourceVersion":{version}}},"items":{items}}}"#);
            listed(json.as_bytes(), "n").map(|(object, version)| (object.to_vec(), version))
        };
        assert_eq!(list("\"7\"", &format!("[{object}]")).unwrap(), (object.as_bytes().to_vec(), "7".to_owned()));
        for none in ["[]", "null"] {
            assert!(matches!(list("\"7\"", none), Err(ClusterError::NotFound(node)) if node == "n"));
        }
        for version in ["\"\"", "\"0\"", "\"+7\"", "\"7&watch=0\"", "7", "null"] {
            assert!(matches!(list(version, &format!("[{object}]")), Err(ClusterError::Confused { .. })), "{version}");
        }
        assert!(list("\"7\"", &format!("[{object},{object}]")).is_err());
    }

    #[test]
    fn statuses_are_told_apart() {
        let body = br#"{"kind":"Status","message":"node \"n\" is\nforbidden","code":403}"#;
        let of = |status: u16| refusal(StatusCode::from_u16(status).unwrap(), None, body, "n");
        assert!(matches!(of(401), ClusterError::Unauthorized));
        assert_eq!(of(403).to_string(), "the API server forbids the request: node \"n\" is forbidden");
        assert!(matches!(of(404), ClusterError::NotFound(_)));
        assert!(matches!(of(409), ClusterError::Refused(_)));
        assert!(matches!(of(422), ClusterError::Refused(_)));
        assert!(matches!(of(429), ClusterError::Busy { .. }));
        assert!(matches!(of(503), ClusterError::Busy { .. }));
        assert!(matches!(of(302), ClusterError::Confused { .. }));
    }
}
