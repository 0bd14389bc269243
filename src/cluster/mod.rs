//! The API server: reads and patches our own Node with the kubelet's credentials. Only this module speaks HTTP.

mod error;
pub mod event;
mod kubeconfig;
pub mod mcn;
pub mod node;
pub mod pool;
mod watch;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Certificate, Client, Identity, Method, Proxy, Response, StatusCode, redirect};
use serde::Deserialize;
use tokio::time::Instant;

use crate::model::annotations::MCO;
use crate::model::printable;
use crate::report::Patch;
pub use error::ClusterError;
use error::{chain, connection};
use kubeconfig::{Access, Credentials};
use node::{Heard, NodeObject, VERDICT};
pub use watch::{Told, follow};

/// Our field manager, which distinguishes our writes from the MCD's.
pub const MANAGER: &str = "rebase-agent";

/// Idle time of a connection before it is probed. With the next two, a dead peer is noticed within 60 s, also on a silent
/// watch.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Interval of unanswered probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Number of unanswered probes after which the connection is closed.
const KEEPALIVE_RETRIES: u32 = 3;
/// Longest `Retry-After` that is accepted, so that a wrong one cannot silence the node for ever.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10 * 60);
/// Largest answer, in bytes; a whole Node lists every image on the node.
const MAX_BODY: usize = 4 << 20;
const METADATA: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
const FULL: &str = "application/json";
const MERGE_PATCH: &str = "application/merge-patch+json";

/// Time limits of the requests.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Longest random wait before the first request, which spreads the load of machines that were switched on together.
    pub first: Duration,
    /// Making a connection.
    pub connect: Duration,
    /// Reading or patching one object.
    pub request: Duration,
    /// How long a watch may stay open after its announced end. Until then it may be silent: API servers on etcd 3.4 send
    /// bookmarks only about 2 s before the end.
    pub grace: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        let [first, connect, request, grace] = [2, 10, 15, 5].map(Duration::from_secs);
        Self { first, connect, request, grace }
    }
}

/// A client of the API server for one node.
pub struct Api {
    kubeconfig: PathBuf,
    node: Option<String>,
    timing: Timing,
    /// See [`Heard::wrote`].
    wrote: AtomicU64,
    /// The latest `Date` of a response, in milliseconds since the epoch, and when it was received.
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

    /// The URL of our MachineConfigNode, with a subresource and query.
    fn mcn(&self, more: &str) -> String {
        let group = "machineconfiguration.openshift.io/v1";
        format!("{}/apis/{group}/machineconfignodes/{}{more}", self.access.server, self.access.node)
    }

    /// The URL of the list that contains only our Node.
    fn list_url(&self) -> String {
        format!("{}/api/v1/nodes?fieldSelector=metadata.name%3D{}", self.access.server, self.access.node)
    }
}

impl Api {
    /// Creates a client and reads nothing yet. `node` is the node's name, for credentials that do not contain it.
    #[must_use]
    pub fn new(kubeconfig: PathBuf, node: Option<String>, timing: Timing) -> Self {
        Self { kubeconfig, node, timing, wrote: AtomicU64::new(0), clock: Mutex::new(None), session: Mutex::new(None) }
    }

    /// Reads the credentials again, and keeps the connections if they did not change.
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

    /// Drops the connections: a new one may reach another, healthy API server.
    fn forget(&self) {
        *self.session.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
    }

    /// Our Node's metadata, and the version to watch from. This is a list request because the version of a list is
    /// current. The version of an idle Node is often older than the few minutes of history that API servers keep.
    ///
    /// # Errors
    /// See [`ClusterError`].
    pub async fn metadata(&self) -> Result<(NodeObject, String), ClusterError> {
        let (json, asked, node) = self.ask(Method::GET, METADATA_LIST, Session::list_url, None).await?;
        let (object, version) = listed(&json, &node)?;
        Ok((self.own(object, Some(asked), &node)?, version))
    }

    /// Our whole Node. Only its spec shows whether the node is schedulable.
    ///
    /// # Errors
    /// See [`ClusterError`].
    pub async fn full(&self) -> Result<NodeObject, ClusterError> {
        let (json, asked, node) = self.ask(Method::GET, FULL, Session::url, None).await?;
        self.own(&json, Some(asked), &node)
    }

    /// The API server's time in milliseconds since the epoch: its latest `Date` plus the time since. `None` before its
    /// first answer. Its timestamps are compared with this, never with the node's clock, which may be wrong.
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

    /// Applies `patch` to the annotations of the Node with `uid`, and returns the changed Node.
    ///
    /// # Errors
    /// See [`ClusterError`].
    pub async fn patch(&self, uid: &str, patch: &Patch) -> Result<NodeObject, ClusterError> {
        let body = serde_json::json!({ "metadata": { "uid": uid, "annotations": patch } });
        let url = |session: &Session| format!("{}?fieldManager={MANAGER}", session.url());
        let (json, asked, node) = self.ask(Method::PATCH, METADATA, url, Some((MERGE_PATCH, body.to_string()))).await?;
        let node = self.own(&json, Some(asked), &node)?;
        if VERDICT.iter().any(|key| patch.contains_key(&format!("{MCO}{key}"))) {
            self.wrote.fetch_max(node.wrote, Relaxed);
        }
        Ok(node)
    }

    /// Parses `json`, received now, and checks that it is our Node.
    fn own(&self, json: &[u8], asked: Option<Instant>, node: &str) -> Result<NodeObject, ClusterError> {
        let parsed = NodeObject::parse(json, Heard { asked, at: Instant::now(), wrote: self.wrote.load(Relaxed) })?;
        if parsed.facts.name == node {
            return Ok(parsed);
        }
        let why = format!("it is about the Node {}", printable(&parsed.facts.name, 253));
        Err(ClusterError::Confused { what: "the Node", why })
    }

    /// Sends a request; `body` comes with its media type. Returns the body of a successful answer, the time of the request,
    /// and the name of our Node.
    async fn ask(
        &self,
        method: Method,
        accept: &'static str,
        url: impl Fn(&Session) -> String,
        body: Option<(&'static str, String)>,
    ) -> Result<(Vec<u8>, Instant, String), ClusterError> {
        let once = async || {
            let session = self.session()?;
            let mut request = session.client.request(method.clone(), url(&session)).timeout(self.timing.request);
            request = request.header(ACCEPT, accept);
            if let Some((kind, body)) = &body {
                request = request.header(CONTENT_TYPE, *kind).body(body.clone());
            }
            let asked = Instant::now();
            let response = request.send().await.map_err(|e| connection(&e))?;
            self.take_date(response.headers());
            let json = checked(response, &session.access.node).await?;
            Ok((json, asked, session.access.node))
        };
        let mut answer = once().await;
        // The certificate may have been rotated after it was read.
        if matches!(answer, Err(ClusterError::Unauthorized)) {
            self.forget();
            answer = once().await;
        }
        if matches!(answer, Err(ClusterError::Unauthorized))
            && let Some(expired) = self.session().ok().and_then(|session| session.access.expired())
        {
            answer = Err(ClusterError::CertificateExpired(expired));
        }
        let refused = matches!(answer, Err(ClusterError::NotFound(_) | ClusterError::Forbidden(_)));
        if answer.is_err() && !refused {
            self.forget();
        }
        answer
    }
}

/// Resolves every name to the addresses of one host: `tls-server-name` is the name in the certificate, not the server's
/// address.
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

/// The body of a successful answer; an error for every other answer.
async fn checked(mut response: Response, node: &str) -> Result<Vec<u8>, ClusterError> {
    let status = response.status();
    let retry_after = retry_after(response.headers());
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| connection(&e))? {
        if body.len().saturating_add(chunk.len()) > MAX_BODY {
            if status.is_success() {
                return Err(ClusterError::TooLarge);
            }
            break;
        }
        body.extend_from_slice(&chunk);
    }
    if matches!(status, StatusCode::OK | StatusCode::CREATED) {
        return Ok(body);
    }
    Err(refusal(status, retry_after, &body, node))
}

/// `Retry-After` in seconds; API servers do not use the form with a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

/// The error for a status other than 200 and 201. Pure.
fn refusal(status: StatusCode, retry_after: Option<Duration>, body: &[u8], node: &str) -> ClusterError {
    #[derive(Deserialize)]
    struct Status {
        message: String,
    }
    let message = serde_json::from_slice::<Status>(body).map(|status| printable(&status.message, 300));
    let message = message.unwrap_or_else(|_| "the answer has no message".to_owned());
    match status.as_u16() {
        401 => ClusterError::Unauthorized,
        403 => ClusterError::Forbidden(message),
        404 => ClusterError::NotFound(node.to_owned()),
        409 | 422 => ClusterError::Refused(message),
        410 => ClusterError::Expired,
        429 | 500..=599 => ClusterError::Busy { status: status.as_u16(), message, retry_after },
        other => ClusterError::Confused { what: "the Node", why: format!("status {other}: {message}") },
    }
}

/// Our Node in a list that contains only it, and the list's version. Pure. A list without a version is an error, because
/// a watch from no version, or from 0, may begin at any old state.
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
        more => Err(confused(&format!("it has {} Nodes", more.len()))),
    }
}

/// The private parsers, for tests/fuzz: the server and the node in a kubeconfig, and the watch.
#[cfg(fuzzing)]
#[allow(missing_docs, reason = "the names are those of the parsers")]
pub mod fuzzing {
    use super::watch::{Lines, event};
    use super::{Api, ClusterError as Error, NodeObject, kubeconfig};
    use crate::model::Pullspec;
    pub fn newest(json: &[u8]) -> Result<Option<Pullspec>, Error> {
        super::pool::newest(json)
    }
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
    fn lists_have_our_node_and_a_version() {
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
