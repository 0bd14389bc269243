//! Parties between a node and an honest registry: a registry that misbehaves at one place, and an HTTP proxy.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderValue, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use openssl::pkey::PKey;
use openssl::ssl::{Ssl, SslAcceptor, SslContext, SslMethod};
use openssl::x509::X509;
use reqwest::{Certificate, Client};
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_openssl::SslStream;

use crate::registry::ServerTls;

/// Larger than containers/image's limit for a manifest or a signature, 4 MiB.
const TOO_LARGE: usize = 5 << 20;

/// The place where a registry misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The first request of every conversation.
    Ping,
    /// Any manifest but a signature's.
    Manifest,
    /// The manifest of a signature attachment.
    Signature,
    /// The signed document.
    Payload,
    /// The image's config.
    Config,
}

/// The misbehaviour.
#[derive(Clone, Debug)]
pub enum Trick {
    /// Answers honestly.
    Honest,
    /// Answers with that status and an error document with that code and message.
    Error(u16, &'static str, String),
    /// Answers with that status and that web page.
    Page(u16, &'static str),
    /// Never answers.
    Hang,
    /// Closes the connection.
    Cut,
    /// Adds one space: still the same JSON, no longer the same digest.
    Tamper,
    /// Adds megabytes of space.
    Inflate,
    /// Sends the client to a token server, as quay.io does, which answers with that status.
    Token(u16),
    /// Answers with the honest registry's content of that path.
    Swap(String),
}

/// Serves TLS on a port of 127.0.0.1 and passes on the honest registry's content, until it is dropped.
#[derive(Debug)]
pub struct HostileRegistry {
    address: SocketAddr,
    played: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl HostileRegistry {
    /// Starts a registry in front of `upstream` (`host:port`, with a certificate of the same authority).
    pub async fn start(tls: &ServerTls, upstream: &str, place: Place, trick: Trick) -> Result<Self> {
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
        acceptor.set_certificate(&*X509::from_pem(tls.cert_pem.as_bytes())?)?;
        acceptor.set_private_key(&*PKey::private_key_from_pem(tls.key_pem.as_bytes())?)?;
        let context = acceptor.build().into_context();
        let client = Client::builder()
            .no_proxy()
            .tls_certs_only([Certificate::from_pem(tls.ca_pem.as_bytes())?])
            .pool_max_idle_per_host(0)
            .build()?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let played = Arc::new(AtomicUsize::new(0));
        let behaviour =
            Arc::new(Behaviour { client, upstream: upstream.into(), place, trick, played: Arc::clone(&played) });
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                tokio::spawn(serve(stream, context.clone(), Arc::clone(&behaviour)));
            }
        });
        Ok(Self { address, played, task })
    }

    /// The number of tricks played so far.
    pub fn played(&self) -> usize {
        self.played.load(Ordering::Relaxed)
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }
}

impl Drop for HostileRegistry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(stream: TcpStream, context: SslContext, behaviour: Arc<Behaviour>) -> Result<()> {
    let mut stream = SslStream::new(Ssl::new(&context)?, stream)?;
    std::pin::Pin::new(&mut stream).accept().await?;
    let service = service_fn(move |request| {
        let behaviour = Arc::clone(&behaviour);
        async move { behaviour.answer(request).await.map_err(io::Error::other) }
    });
    // A refused client or an intended cut is not an error of the test.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    Ok(())
}

struct Behaviour {
    client: Client,
    upstream: String,
    place: Place,
    trick: Trick,
    played: Arc<AtomicUsize>,
}

struct Good {
    status: u16,
    content_type: Option<HeaderValue>,
    challenge: Option<String>,
    body: Vec<u8>,
}

impl Behaviour {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>> {
        let accepts = request.headers().get_all(ACCEPT).iter().filter_map(|accept| accept.to_str().ok());
        let accepts = accepts.collect::<Vec<_>>().join(", ");
        let path = request.uri().path().to_owned();
        if let (Trick::Token(status), "/token") = (&self.trick, path.as_str()) {
            let body = br#"{"errors":[{"code":"UNAUTHORIZED","message":"msg"}]}"#.to_vec();
            return Good { status: *status, content_type: None, challenge: None, body }.response();
        }
        let mut good = self.fetch(&path, &accepts).await?;
        if place(&path, &good.body) != Some(self.place) {
            return good.response();
        }
        self.played.fetch_add(1, Ordering::Relaxed);
        match &self.trick {
            Trick::Honest => {}
            Trick::Error(status, code, message) => {
                let body = json!({ "errors": [{ "code": code, "message": message }] }).to_string().into_bytes();
                good = Good { status: *status, content_type: Some("application/json".parse()?), challenge: None, body };
            }
            Trick::Page(status, page) => {
                let body = page.as_bytes().into();
                good = Good { status: *status, content_type: Some("text/html".parse()?), challenge: None, body };
            }
            Trick::Token(_) => {
                let host = request.headers().get(HOST).context("no host")?.to_str()?;
                good.challenge = Some(format!("Bearer realm=\"https://{host}/token\",service=\"{host}\""));
                good.status = 401;
            }
            Trick::Hang => std::future::pending().await,
            Trick::Cut => anyhow::bail!("cut"),
            Trick::Tamper => pad(&mut good.body, 1),
            Trick::Inflate => pad(&mut good.body, TOO_LARGE),
            Trick::Swap(path) => good = self.fetch(path, &accepts).await?,
        }
        good.response()
    }

    async fn fetch(&self, path: &str, accepts: &str) -> Result<Good> {
        let mut request = self.client.get(format!("https://{}{path}", self.upstream));
        if !accepts.is_empty() {
            request = request.header(ACCEPT, accepts);
        }
        let response = request.send().await.with_context(|| path.to_owned())?;
        let (status, content_type) = (response.status().as_u16(), response.headers().get(CONTENT_TYPE).cloned());
        Ok(Good { status, content_type, challenge: None, body: response.bytes().await?.into() })
    }
}

impl Good {
    fn response(self) -> Result<Response<Full<Bytes>>> {
        let mut response = Response::builder().status(self.status);
        if let Some(content_type) = self.content_type {
            response = response.header(CONTENT_TYPE, content_type);
        }
        if let Some(challenge) = self.challenge {
            response = response.header(WWW_AUTHENTICATE, challenge);
        }
        Ok(response.body(Full::new(self.body.into()))?)
    }
}

/// Adds spaces after the opening brace.
fn pad(body: &mut Vec<u8>, count: usize) {
    body.splice(1..1, std::iter::repeat_n(b' ', count));
}

fn place(path: &str, body: &[u8]) -> Option<Place> {
    let holds = |text: &str| body.windows(text.len()).any(|window| window == text.as_bytes());
    match path {
        "/v2" | "/v2/" => Some(Place::Ping),
        path if path.contains("/manifests/") && path.ends_with(".sig") => Some(Place::Signature),
        path if path.contains("/manifests/") => Some(Place::Manifest),
        path if path.contains("/blobs/") && holds("\"critical\"") => Some(Place::Payload),
        path if path.contains("/blobs/") && holds("\"rootfs\"") => Some(Place::Config),
        _ => None,
    }
}

/// An HTTP proxy that tunnels every host to 127.0.0.1 and records the requested hosts, until it is dropped.
#[derive(Debug)]
pub struct ConnectProxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl ConnectProxy {
    /// Starts a proxy.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let asked = Arc::new(Mutex::new(Vec::new()));
        let targets = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(tunnel(stream, Arc::clone(&targets)));
            }
        });
        Ok(Self { address, asked, task })
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// `host:port` of every tunnel so far.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for ConnectProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn tunnel(stream: TcpStream, asked: Arc<Mutex<Vec<String>>>) -> Result<()> {
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        anyhow::ensure!(stream.read_line(&mut head).await? > 0, "the client went away");
    }
    let target = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).context("not a CONNECT")?;
    asked.lock().unwrap().push(target.to_owned());
    let (_, port) = target.rsplit_once(':').context("no port")?;
    let mut upstream = TcpStream::connect(("127.0.0.1", port.parse()?)).await?;
    stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
    tokio::io::copy_bidirectional(&mut stream, &mut upstream).await?;
    Ok(())
}

/// A port of 127.0.0.1 that waits for the first bytes of every connection, answers with these, and closes it, until the
/// handle is aborted.
pub async fn mumble(bytes: &'static [u8]) -> Result<(SocketAddr, JoinHandle<Infallible>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let task = tokio::spawn(async move {
        loop {
            if let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    // Closing with unread bytes would reset the connection before the answer is read.
                    let _ = stream.read(&mut [0; 4096]).await;
                    let _ = stream.write_all(bytes).await;
                });
            }
        }
    });
    Ok((address, task))
}
