//! The API server's HTTP side, on top of the store.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, DATE, HeaderMap, RETRY_AFTER, USER_AGENT};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::ssl::{Ssl, SslAcceptor, SslContext, SslMethod, SslOptions, SslSessionCacheMode, SslVerifyMode};
use openssl::stack::Stack;
use openssl::x509::store::{X509Store, X509StoreBuilder};
use openssl::x509::{X509, X509NameRef, X509PurposeId, X509Ref, X509StoreContext};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_openssl::SslStream;

use super::mcn;
use super::store::{Change, Expired, Fate, Fault, RequestRecord, Scope, Store};
use super::{ApiError, Crd};
use crate::events::Events;
use crate::pki::Pki;

const BODY_LIMIT: usize = 3 * 1024 * 1024;
/// The path of a MachineOSConfig, before its name.
const POOLS: &str = "/apis/machineconfiguration.openshift.io/v1/machineosconfigs/";
/// Time before its end at which a watch gets its last bookmark.
const LAST_BOOKMARK: Duration = Duration::from_secs(2);

/// Serves a [`Store`] over HTTPS on a port of 127.0.0.1 until it is dropped.
pub struct ApiServer {
    store: Store,
    address: SocketAddr,
    trust: Arc<Mutex<Trust>>,
    down: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

/// Settings of new connections.
#[derive(Clone)]
struct Trust {
    tls: SslContext,
    clients: Arc<X509Store>,
}

impl Trust {
    fn new(pki: &Pki) -> Result<Self> {
        Self::presenting(pki, pki.server(&["kubernetes", "api-int.test.example"]))
    }

    fn presenting(pki: &Pki, (certificate, key): (String, String)) -> Result<Self> {
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
        acceptor.set_certificate(&*X509::from_pem(certificate.as_bytes())?)?;
        acceptor.set_private_key(&*PKey::private_key_from_pem(key.as_bytes())?)?;
        acceptor.set_session_cache_mode(SslSessionCacheMode::OFF);
        acceptor.set_options(SslOptions::NO_TICKET);
        let mut authorities = Stack::<openssl::x509::X509Name>::new()?;
        authorities.push(pki.ca().subject_name().to_owned()?)?;
        acceptor.set_client_ca_list(authorities);
        // The handshake accepts any certificate; each request checks whether it is valid.
        acceptor.set_verify_callback(SslVerifyMode::PEER, |_, _| {
            forget_errors();
            true
        });
        let mut clients = X509StoreBuilder::new()?;
        clients.add_cert(pki.ca())?;
        clients.set_purpose(X509PurposeId::SSL_CLIENT)?;
        Ok(Self { tls: acceptor.build().into_context(), clients: Arc::new(clients.build()) })
    }

    fn authenticate(&self, certificate: Option<&X509Ref>) -> Result<User, ApiError> {
        let Some(certificate) = certificate else {
            return Ok(User { name: "system:anonymous".to_owned(), groups: Vec::new() });
        };
        let verified = X509StoreContext::new().and_then(|mut context| {
            context.init(&self.clients, certificate, &*Stack::new()?, |context| context.verify_cert())
        });
        if !matches!(verified, Ok(true)) {
            forget_errors();
            return Err(ApiError::new(401, None, "Unauthorized"));
        }
        let subject = certificate.subject_name();
        let name = entries(subject, Nid::COMMONNAME).pop().unwrap_or_default();
        Ok(User { name, groups: entries(subject, Nid::ORGANIZATIONNAME) })
    }
}

/// Clears the thread's OpenSSL error queue: errors of a verification would count as those of a connection.
fn forget_errors() {
    drop(ErrorStack::get());
}

fn entries(name: &X509NameRef, nid: Nid) -> Vec<String> {
    name.entries_by_nid(nid).filter_map(|entry| entry.data().to_string().ok()).collect()
}

struct User {
    name: String,
    groups: Vec<String>,
}

impl User {
    fn node(&self) -> Option<&str> {
        let name = self.name.strip_prefix("system:node:")?;
        self.groups.iter().any(|group| group == "system:nodes").then_some(name)
    }

    fn admin(&self) -> bool {
        self.groups.iter().any(|group| group == "system:masters")
    }

    fn forbidden(&self, verb: &str, name: &str, more: &str) -> ApiError {
        let mut why =
            format!("User \"{}\" cannot {verb} resource \"nodes\" in API group \"\" at the cluster scope", self.name);
        if !more.is_empty() {
            why = format!("{why}: {more}");
        }
        ApiError::forbidden(name, &why)
    }
}

impl ApiServer {
    /// Starts a server with a new store. Must be called inside a Tokio runtime.
    ///
    /// # Errors
    /// If the port cannot be bound or the certificates cannot be made.
    pub fn start(pki: &Pki, events: Events) -> Result<Self> {
        Self::serve(pki, Store::new(events))
    }

    /// Starts a server with an existing store.
    ///
    /// # Errors
    /// As [`ApiServer::start`].
    pub fn serve(pki: &Pki, store: Store) -> Result<Self> {
        let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let address = listener.local_addr()?;
        let trust = Arc::new(Mutex::new(Trust::new(pki)?));
        let (told, down) = watch::channel(false);
        let task = tokio::spawn(run(listener, address, store.clone(), Arc::clone(&trust), told));
        Ok(Self { store, address, trust, down, task })
    }

    /// `https://127.0.0.1:port`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The address it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The server's state.
    #[must_use]
    pub fn store(&self) -> Store {
        self.store.clone()
    }

    /// Every request so far.
    #[must_use]
    pub fn requests(&self) -> Vec<RequestRecord> {
        self.store.requests()
    }

    /// Starts an outage: the listener and all connections are closed when this returns.
    pub async fn stop(&self) {
        self.set_down(true).await;
    }

    /// Ends an outage: the same port accepts connections when this returns.
    pub async fn restart(&self) {
        self.set_down(false).await;
    }

    async fn set_down(&self, down: bool) {
        self.store.set_down(down);
        self.down.clone().wait_for(|now| *now == down).await.expect("the server runs");
    }

    /// Later connections use a certificate of another authority and accept its clients.
    ///
    /// # Errors
    /// If the certificates cannot be made.
    pub fn rotate(&self, pki: &Pki) -> Result<()> {
        *self.trust.lock().unwrap() = Trust::new(pki)?;
        Ok(())
    }

    /// Later connections use this certificate and key (PEM), and accept clients of `pki`.
    ///
    /// # Errors
    /// If they are not a certificate and its key.
    pub fn present(&self, pki: &Pki, server: (String, String)) -> Result<()> {
        *self.trust.lock().unwrap() = Trust::presenting(pki, server)?;
        Ok(())
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let listener = std::net::TcpListener::bind(address).with_context(|| format!("bind {address}"))?;
    listener.set_nonblocking(true)?;
    Ok(TcpListener::from_std(listener)?)
}

async fn run(
    listener: TcpListener,
    address: SocketAddr,
    store: Store,
    trust: Arc<Mutex<Trust>>,
    told: watch::Sender<bool>,
) {
    let mut wanted = store.downs();
    let mut listener = Some(listener);
    loop {
        let mut connections = JoinSet::new();
        while let Some(open) = &listener {
            tokio::select! {
                _ = wanted.wait_for(|down| *down) => listener = None,
                Some(_) = connections.join_next() => {}
                Ok((stream, _)) = open.accept() => {
                    let trust = trust.lock().unwrap().clone();
                    connections.spawn(connection(stream, store.clone(), trust));
                }
            }
        }
        connections.shutdown().await;
        told.send_replace(true);
        if wanted.wait_for(|down| !*down).await.is_err() {
            return;
        }
        while listener.is_none() {
            match listen(address) {
                Ok(open) => listener = Some(open),
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
        told.send_replace(false);
    }
}

async fn connection(stream: TcpStream, store: Store, trust: Trust) {
    let _ = stream.set_nodelay(true);
    let Ok(ssl) = Ssl::new(&trust.tls) else { return };
    let Ok(mut stream) = SslStream::new(ssl, stream) else { return };
    if Pin::new(&mut stream).accept().await.is_err() {
        return;
    }
    let certificate = stream.ssl().peer_certificate();
    let service = service_fn(|request| {
        let user = match (bearer(&request, &store), &certificate) {
            (Some(user), None) => user,
            _ => trust.authenticate(certificate.as_deref()),
        };
        let (answer, store) = (answer(request, &store, user), store.clone());
        async move {
            let mut response = answer.await?;
            response.headers_mut().insert(DATE, store.date().parse().unwrap());
            Ok::<_, io::Error>(response)
        }
    });
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// The user of a request with a token, if it has one.
fn bearer(request: &Request<Incoming>, store: &Store) -> Option<Result<User, ApiError>> {
    let token = request.headers().get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?;
    let known = store.state().tokens.get(token).cloned();
    Some(match known {
        Some((name, groups)) => Ok(User { name, groups }),
        None => Err(ApiError::new(401, None, "Unauthorized")),
    })
}

/// A complete body, or one that is sent piece by piece.
enum Reply {
    Whole(Option<Bytes>),
    Fed(mpsc::UnboundedReceiver<io::Result<Bytes>>),
}

impl Body for Reply {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Fed(feed) => feed.poll_recv(context).map(|part| part.map(|part| part.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Fed(_) => SizeHint::default(),
        }
    }
}

/// The format of objects, from the `Accept` header.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Full,
    Metadata,
    MetadataList,
}

impl Shape {
    fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let accept =
            headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect::<Vec<_>>().join(",");
        if accept.trim().is_empty() {
            return Ok(Self::Full);
        }
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            if !matches!(parts.next(), Some("application/json" | "application/*" | "*/*")) {
                continue;
            }
            let (mut kind, mut version, mut group) = (None, None, None);
            for (key, value) in parts.filter_map(|part| part.split_once('=')) {
                match key {
                    "as" => kind = Some(value),
                    "v" => version = Some(value),
                    "g" => group = Some(value),
                    _ => {}
                }
            }
            match (kind, version, group) {
                (None, _, _) => return Ok(Self::Full),
                (Some("PartialObjectMetadata"), Some("v1"), Some("meta.k8s.io")) => return Ok(Self::Metadata),
                (Some("PartialObjectMetadataList"), Some("v1"), Some("meta.k8s.io")) => return Ok(Self::MetadataList),
                _ => {}
            }
        }
        let types = "application/json, application/yaml, application/vnd.kubernetes.protobuf";
        Err(ApiError::new(406, None, format!("only the following media types are accepted: {types}")))
    }

    fn object(self, object: Value) -> Result<Value, ApiError> {
        match self {
            Self::Full => Ok(object),
            Self::Metadata => Ok(partial(&object)),
            Self::MetadataList => {
                let why =
                    "you requested PartialObjectMetadataList, but the requested object is not a list (*core.Node)";
                Err(ApiError::new(406, None, why))
            }
        }
    }

    fn list(self, items: Vec<Value>, version: u64) -> Result<Value, ApiError> {
        let metadata = json!({"resourceVersion": version.to_string()});
        match self {
            Self::Full => {
                let mut items = items;
                for item in &mut items {
                    // Items of a typed list have no type of their own.
                    item.as_object_mut().unwrap().retain(|key, _| key != "kind" && key != "apiVersion");
                }
                Ok(json!({"kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": items}))
            }
            Self::MetadataList => {
                let items: Vec<_> = items.iter().map(partial).collect();
                // As Go encodes an empty list.
                let items = if items.is_empty() { Value::Null } else { items.into() };
                let (kind, version) = ("PartialObjectMetadataList", "meta.k8s.io/v1");
                Ok(json!({"kind": kind, "apiVersion": version, "metadata": metadata, "items": items}))
            }
            Self::Metadata => {
                let why = "you requested PartialObjectMetadata, but the requested object is a list (*core.NodeList)";
                Err(ApiError::new(406, None, why))
            }
        }
    }

    fn bookmark(self, version: u64) -> Value {
        let metadata = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
        if self == Self::Full {
            json!({"kind": "Node", "apiVersion": "v1", "metadata": metadata, "spec": {}, "status": {}})
        } else {
            partial(&json!({"metadata": metadata}))
        }
    }
}

fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
}

/// A parsed request.
struct Call {
    method: Method,
    path: String,
    query: Vec<(String, String)>,
    headers: HeaderMap,
}

impl Call {
    fn parameter(&self, key: &str) -> Option<&str> {
        let found = self.query.iter().find(|(known, _)| known == key)?;
        Some(found.1.as_str()).filter(|value| !value.is_empty())
    }

    fn flag(&self, key: &str) -> bool {
        matches!(self.parameter(key), Some("1" | "true"))
    }

    fn scope(&self) -> Scope {
        if self.path.starts_with("/apis/") {
            Scope::Mcn
        } else if self.path.ends_with("/events") {
            Scope::Event
        } else if self.method != Method::GET {
            Scope::Write
        } else if self.flag("watch") {
            Scope::Watch
        } else {
            Scope::Read
        }
    }

    /// The node in the path; `None` for the collection.
    fn node(&self) -> Result<Option<&str>, ApiError> {
        let unknown = || ApiError::new(404, None, "the server could not find the requested resource");
        match self.path.strip_prefix("/api/v1/nodes").ok_or_else(unknown)? {
            "" | "/" => Ok(None),
            rest => match rest.strip_prefix('/').filter(|name| !name.contains('/')) {
                Some(name) => Ok(Some(name)),
                None => Err(unknown()),
            },
        }
    }

    /// The node that the field selector selects.
    fn selected(&self) -> Result<Option<&str>, ApiError> {
        let Some(selector) = self.parameter("fieldSelector") else { return Ok(None) };
        let value = selector.strip_prefix("metadata.name=").map(|value| value.strip_prefix('=').unwrap_or(value));
        match value.filter(|value| !value.contains([',', '='])) {
            Some(name) => Ok(Some(name)),
            None => Err(ApiError::new(400, None, format!("field label not supported: {selector}"))),
        }
    }

    fn version(&self) -> Result<Option<u64>, ApiError> {
        let Some(text) = self.parameter("resourceVersion") else { return Ok(None) };
        let invalid =
            |_| ApiError::new(400, None, format!("resourceVersion: Invalid value: \"{text}\": strconv.ParseUint"));
        text.parse().map(Some).map_err(invalid)
    }

    fn manager(&self) -> String {
        let agent = self.headers.get(USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        self.parameter("fieldManager").unwrap_or_else(|| agent.split('/').next().unwrap_or_default()).to_owned()
    }
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let hex: Vec<u8> = rest.by_ref().take(2).collect();
                std::str::from_utf8(&hex).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok()).unwrap_or(b'?')
            }
            byte => byte,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The store's answer to a call.
enum Answer {
    Json(Value),
    Created(Value),
    Text(&'static str),
    Watch(Watch),
}

struct Watch {
    name: Option<String>,
    from: Option<u64>,
    shape: Shape,
    bookmarks: bool,
    timeout: Duration,
}

/// Updates the record of one request.
#[derive(Clone)]
struct Recorder(Store, usize);

impl Recorder {
    fn status(&self, status: u16) {
        self.0.state().requests[self.1].status = status;
    }

    fn received(&self, body: &[u8]) {
        self.0.state().requests[self.1].body = String::from_utf8_lossy(body).into_owned();
    }

    fn sent(&self, bytes: usize) {
        self.0.state().requests[self.1].bytes += bytes as u64;
    }
}

async fn answer(
    request: Request<Incoming>,
    store: &Store,
    user: Result<User, ApiError>,
) -> io::Result<Response<Reply>> {
    let (head, body) = request.into_parts();
    let text = |value: Option<&hyper::header::HeaderValue>| {
        value.and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
    };
    let record = RequestRecord {
        method: head.method.to_string(),
        path_and_query: head.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
        user: user.as_ref().map(|user| user.name.clone()).unwrap_or_default(),
        user_agent: text(head.headers.get(USER_AGENT)),
        body: String::new(),
        status: 0,
        bytes: 0,
        at: Instant::now(),
    };
    let recorder = {
        let mut state = store.state();
        state.requests.push(record);
        Recorder(store.clone(), state.requests.len() - 1)
    };
    let pairs = head.uri.query().unwrap_or_default().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let call = Call {
        method: head.method,
        path: decode(head.uri.path()),
        query: pairs.map(|(key, value)| (decode(key), decode(value))).collect(),
        headers: head.headers,
    };
    let Ok(body) = Limited::new(body, BODY_LIMIT).collect().await else {
        let error = ApiError::new(413, None, format!("Request entity too large: limit is {BODY_LIMIT}"));
        return Ok(whole(&recorder, 413, "application/json", None, error.status().to_string()));
    };
    let body = body.to_bytes();
    recorder.received(&body);

    let fault = store.next_fault(call.scope());
    match &fault {
        Some(Fault::Status { code, retry_after }) => {
            let error = ApiError::new(*code, None, "a fault was injected");
            return Ok(whole(&recorder, *code, "application/json", *retry_after, error.status().to_string()));
        }
        Some(Fault::Page { code, body }) => return Ok(whole(&recorder, *code, "text/html", None, body.clone())),
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Drop) => return Err(io::ErrorKind::ConnectionAborted.into()),
        Some(Fault::Delay(time)) => sleep(*time).await,
        _ => {}
    }
    let result = user.and_then(|user| handle(store, &user, &call, &body));
    if fault == Some(Fault::Lost) {
        return Err(io::ErrorKind::ConnectionAborted.into());
    }
    let cut = fault == Some(Fault::Cut);
    let (code, kind, body) = match result {
        Ok(Answer::Watch(watch)) => {
            recorder.status(200);
            let (feed, fed) = mpsc::unbounded_channel();
            tokio::spawn(watch.run(store.clone(), recorder, feed, cut));
            return Ok(Response::builder().header(CONTENT_TYPE, "application/json").body(Reply::Fed(fed)).unwrap());
        }
        Ok(Answer::Json(value)) => (200, "application/json", value.to_string()),
        Ok(Answer::Created(value)) => (201, "application/json", value.to_string()),
        Ok(Answer::Text(text)) => (200, "text/plain", text.to_owned()),
        Err(error) => (error.code, "application/json", error.status().to_string()),
    };
    if !cut {
        return Ok(whole(&recorder, code, kind, None, body));
    }
    let (feed, fed) = mpsc::unbounded_channel();
    let half = Bytes::copy_from_slice(&body.as_bytes()[..body.len() / 2]);
    recorder.status(code);
    recorder.sent(half.len());
    let _ = feed.send(Ok(half));
    // An error at once would keep hyper from sending the earlier data.
    tokio::spawn(async move {
        sleep(Duration::from_millis(20)).await;
        let _ = feed.send(Err(io::ErrorKind::ConnectionAborted.into()));
    });
    let response = Response::builder().status(code).header(CONTENT_TYPE, kind).header(CONTENT_LENGTH, body.len());
    Ok(response.body(Reply::Fed(fed)).unwrap())
}

fn whole(recorder: &Recorder, code: u16, kind: &str, retry_after: Option<u32>, body: String) -> Response<Reply> {
    recorder.status(code);
    recorder.sent(body.len());
    let mut response = Response::builder().status(code).header(CONTENT_TYPE, kind);
    if let Some(seconds) = retry_after {
        response = response.header(RETRY_AFTER, seconds);
    }
    response.body(Reply::Whole(Some(body.into()))).unwrap()
}

fn handle(store: &Store, user: &User, call: &Call, body: &[u8]) -> Result<Answer, ApiError> {
    match call.path.as_str() {
        "/healthz" | "/livez" | "/readyz" => return Ok(Answer::Text("ok")),
        "/version" => return Ok(Answer::Json(json!({"major": "1", "minor": "36", "gitVersion": "v1.36.0"}))),
        path if let Some(pool) = path.strip_prefix(POOLS).filter(|_| call.method == Method::GET) => {
            return machine_os_config(store, user, pool).map(Answer::Json);
        }
        _ => {}
    }
    if let Some(path) = call.path.strip_prefix(&format!("/apis/{}/machineconfignodes/", mcn::API)) {
        return machine_config_node(store, user, call, path, body);
    }
    let events = call.path.strip_prefix("/api/v1/namespaces/").and_then(|rest| rest.strip_suffix("/events"));
    if let (Some(namespace), &Method::POST, true) = (events, &call.method, user.node().is_some() || user.admin()) {
        let invalid = |error| ApiError::new(400, None, format!("error decoding: {error}"));
        let event = serde_json::from_slice(body).map_err(invalid)?;
        return store.tell_event(namespace, event).map(Answer::Created);
    }
    if user.node().is_none() && !user.admin() || user.node().is_some() && !call.path.starts_with("/api/v1/nodes") {
        let verb = call.method.as_str().to_lowercase();
        let why = format!("User \"{}\" cannot {verb} path \"{}\"", user.name, call.path);
        return Err(ApiError::new(403, None, format!("forbidden: {why}")));
    }
    let node = call.node()?;
    match (&call.method, node) {
        (&Method::GET, Some(name)) => {
            let shape = Shape::of(&call.headers)?;
            readable(user, "get", Some(name))?;
            if call.flag("watch") {
                return watch(store, call, Some(name), shape);
            }
            shape.object(store.node(name).ok_or_else(|| ApiError::not_found(name))?).map(Answer::Json)
        }
        (&Method::GET, None) => {
            let shape = Shape::of(&call.headers)?;
            let watches = call.flag("watch");
            // The authorizer knows only selectors that it can parse.
            readable(user, if watches { "watch" } else { "list" }, call.selected().unwrap_or_default())?;
            let selected = call.selected()?;
            if watches {
                return watch(store, call, selected, shape);
            }
            let (version, items) = store.list(selected);
            shape.list(items, version).map(Answer::Json)
        }
        (&Method::PATCH, Some(name)) => {
            let kind = call.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
            let kind = kind.split(';').next().unwrap_or_default().trim();
            let known = ["application/merge-patch+json", "application/strategic-merge-patch+json"];
            if !known.contains(&kind) {
                let why = format!(
                    "the body of the request was in an unknown format - accepted media types include: {}",
                    known.join(", ")
                );
                return Err(ApiError::new(415, None, why));
            }
            let shape = Shape::of(&call.headers)?;
            let invalid = |error| ApiError::new(400, None, format!("error decoding patch: {error}"));
            let patch: Value = serde_json::from_slice(body).map_err(invalid)?;
            let manager = call.manager();
            if manager.len() > 128 {
                return Err(ApiError::new(
                    422,
                    None,
                    "PatchOptions is invalid: fieldManager: Too long: may not be more than 128 bytes",
                ));
            }
            // Checked before anything is written, as in the real server.
            shape.object(Value::Null)?;
            shape.object(store.patch(&manager, name, &patch, user.node())?).map(Answer::Json)
        }
        (method, name) if user.node().is_some() => {
            Err(user.forbidden(&method.as_str().to_lowercase(), name.unwrap_or_default(), ""))
        }
        _ => Err(ApiError::new(405, None, "the server does not allow this method on the requested resource")),
    }
}

/// GET of a MachineConfigNode, and server-side apply of its status. Nodes need the rights that the agent's manifests
/// grant, and the admission policy in them limits writes to the node's own object.
fn machine_config_node(store: &Store, user: &User, call: &Call, path: &str, body: &[u8]) -> Result<Answer, ApiError> {
    let (name, subresource) = path.split_once('/').map_or((path, ""), |(name, rest)| (name, rest));
    let (verb, resource) = match (&call.method, subresource) {
        (&Method::GET, "") => ("get", "machineconfignodes"),
        (&Method::PATCH, "status") => ("patch", "machineconfignodes/status"),
        _ => return Err(ApiError::new(405, None, "the server does not allow this method on the requested resource")),
    };
    let granted = store.state().mcns.granted && user.node().is_some();
    if !granted && !user.admin() {
        let why = format!(
            "User \"{}\" cannot {verb} resource \"{resource}\" in API group \"machineconfiguration.openshift.io\" at the \
             cluster scope",
            user.name
        );
        return Err(mcn::error(403, name, &why));
    }
    if store.crd() == Crd::Absent {
        return Err(mcn::error(404, "", ""));
    }
    if verb == "get" {
        return store.mcn(name).ok_or_else(|| mcn::error(404, name, "")).map(Answer::Json);
    }
    if call.headers.get(CONTENT_TYPE).is_none_or(|kind| kind != "application/apply-patch+yaml") {
        return Err(ApiError::new(415, None, "only server-side apply is served here"));
    }
    let Some(manager) = call.parameter("fieldManager") else {
        let why = "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch";
        return Err(ApiError::new(422, None, why));
    };
    if let Some(node) = user.node().filter(|node| *node != name) {
        let why = format!("ValidatingAdmissionPolicy: system:node:{node} may write only its own MachineConfigNode");
        return Err(mcn::error(403, name, &why));
    }
    let invalid = |error| ApiError::new(400, None, format!("error decoding YAML: {error}"));
    let object: Value = serde_json::from_slice(body).map_err(invalid)?;
    store.apply_mcn(manager, name, &object, call.flag("force")).map(Answer::Json)
}

/// The MachineOSConfig of a pool after a finished build, for nodes with the right to read it.
fn machine_os_config(store: &Store, user: &User, pool: &str) -> Result<Value, ApiError> {
    let state = store.state();
    if user.node().is_none() || state.pools.is_empty() {
        let why = format!("User \"{}\" cannot get resource \"machineosconfigs\" at the cluster scope", user.name);
        return Err(ApiError::new(403, None, format!("forbidden: {why}")));
    }
    let image = state.pools.get(pool);
    let image = image.ok_or_else(|| ApiError::new(404, None, format!("machineosconfigs \"{pool}\" not found")))?;
    Ok(json!({
        "apiVersion": "machineconfiguration.openshift.io/v1", "kind": "MachineOSConfig",
        "metadata": {"name": pool, "resourceVersion": state.version.to_string()},
        "spec": {
            "machineConfigPool": {"name": pool},
            "imageBuilder": {"imageBuilderType": "Job"},
            "renderedImagePushSecret": {"name": "push"},
            "renderedImagePushSpec": "registry.example.com/os:latest",
            "containerFile": [{"containerfileArch": "NoArch", "content": "FROM configs AS final\nRUN dnf install -y tcpdump"}],
        },
        "status": {"observedGeneration": 1, "currentImagePullSpec": image, "machineOSBuild": {"name": format!("{pool}-1")}},
    }))
}

fn readable(user: &User, verb: &str, name: Option<&str>) -> Result<(), ApiError> {
    match user.node() {
        Some(node) if name != Some(node) => {
            let name = name.unwrap_or_default();
            let why = format!("node '{node}' cannot read '{name}', only its own Node object");
            Err(user.forbidden(verb, name, &why))
        }
        _ => Ok(()),
    }
}

fn watch(store: &Store, call: &Call, name: Option<&str>, shape: Shape) -> Result<Answer, ApiError> {
    let from = call.version()?.filter(|version| *version != 0);
    let state = store.state();
    if let Some(from) = from.filter(|from| *from < state.floor && state.expired == Expired::Response) {
        return Err(ApiError::expired(from, state.floor));
    }
    let timeout = call.parameter("timeoutSeconds").and_then(|text| text.parse().ok()).filter(|seconds| *seconds > 0);
    Ok(Answer::Watch(Watch {
        name: name.map(str::to_owned),
        from,
        shape: if shape == Shape::Full { Shape::Full } else { Shape::Metadata },
        bookmarks: call.flag("allowWatchBookmarks"),
        timeout: Duration::from_secs(timeout.unwrap_or(1800)),
    }))
}

impl Watch {
    async fn run(
        self,
        store: Store,
        recorder: Recorder,
        feed: mpsc::UnboundedSender<io::Result<Bytes>>,
        mut cut: bool,
    ) {
        let mut send = |kind: &str, object: Value| {
            let line = json!({"type": kind, "object": object}).to_string() + "\n";
            let line = if cut { &line.as_bytes()[..line.len() / 2] } else { line.as_bytes() };
            recorder.sent(line.len());
            let _ = feed.send(Ok(Bytes::copy_from_slice(line)));
            std::mem::take(&mut cut)
        };
        let id = store.open_watch();
        let mut changed = store.changed();
        let mut controlled = store.controlled();
        let mut end = pin!(sleep_until(Instant::now() + self.timeout));
        let mut last = pin!(sleep_until(Instant::now() + self.timeout - LAST_BOOKMARK.min(self.timeout / 2)));
        let mut told_last = false;
        let period = store.state().bookmarks;
        let mut bookmark = pin!(sleep(period.unwrap_or(self.timeout)));
        let mut abort = false;

        let mut cursor = self.from.unwrap_or_default();
        let mut fresh = self.from.is_none();
        loop {
            changed.borrow_and_update();
            controlled.borrow_and_update();
            match store.fate(id) {
                Fate::Live => {}
                Fate::Ended => break,
                Fate::Mute => {
                    feed.closed().await;
                    return;
                }
            }
            match self.news(&store, &mut cursor, std::mem::take(&mut fresh)) {
                Err(error) => {
                    send("ERROR", error.status());
                    break;
                }
                Ok(news) => {
                    for change in news {
                        let object = self.shape.object(change.object).expect("a watch shows single objects");
                        abort |= send(change.kind, object);
                    }
                }
            }
            if abort {
                sleep(Duration::from_millis(20)).await;
                let _ = feed.send(Err(io::ErrorKind::ConnectionAborted.into()));
                return;
            }
            tokio::select! {
                () = feed.closed() => return,
                _ = changed.changed() => {}
                _ = controlled.changed() => {}
                () = &mut bookmark => {
                    bookmark.set(sleep(period.unwrap_or(self.timeout)));
                    if self.bookmarks && period.is_some() && cursor <= store.state().version {
                        abort |= send("BOOKMARK", self.shape.bookmark(cursor));
                    }
                }
                () = &mut last, if !told_last => {
                    told_last = true;
                    // A watch from a future version stays silent.
                    if self.bookmarks && cursor <= store.state().version {
                        abort |= send("BOOKMARK", self.shape.bookmark(cursor));
                    }
                }
                () = &mut end => return,
            }
        }
    }

    /// The changes after `cursor`, which advances; first the current nodes, if no version was requested.
    fn news(&self, store: &Store, cursor: &mut u64, fresh: bool) -> Result<Vec<Change>, ApiError> {
        let wanted = |name: &str| self.name.as_deref().is_none_or(|wanted| wanted == name);
        let state = store.state();
        if fresh {
            *cursor = state.version;
            let nodes = state.nodes.iter().filter(|(name, _)| wanted(name));
            let added = nodes.map(|(name, object)| Change {
                version: state.version,
                at: Instant::now(),
                kind: "ADDED",
                name: name.clone(),
                object: object.clone(),
            });
            return Ok(added.collect());
        }
        if *cursor < state.floor {
            return Err(ApiError::expired(*cursor, state.floor));
        }
        let news = state.history.iter().filter(|change| change.version > *cursor && wanted(&change.name));
        let news = news.cloned().collect();
        *cursor = state.version.max(*cursor);
        Ok(news)
    }
}
