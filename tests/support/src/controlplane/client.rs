//! A client of the real API server, for everyone but the agent.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use reqwest::{Certificate, Identity, Method};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::POLL;
use crate::pki::Pki;

const DEADLINE: Duration = Duration::from_secs(30);

/// A user with a client certificate.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    url: String,
}

/// An answer of any status.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body, `Null` if it is not JSON.
    pub body: Value,
}

impl Answer {
    /// The body of a success; an error with the server's message otherwise.
    ///
    /// # Errors
    /// If the status is no success.
    pub fn ok(self) -> anyhow::Result<Value> {
        ensure!((200..300).contains(&self.status), "status {}: {}", self.status, self.body["message"]);
        Ok(self.body)
    }

    /// The same, with `None` for 404.
    ///
    /// # Errors
    /// If the status is neither a success nor 404.
    pub fn found(self) -> anyhow::Result<Option<Value>> {
        if self.status == 404 { Ok(None) } else { self.ok().map(Some) }
    }
}

impl Client {
    /// A client of the server at `url` with a certificate for this user and these groups.
    ///
    /// # Errors
    /// If the TLS library refuses the certificate.
    pub fn new(url: &str, pki: &Pki, user: &str, groups: &[&str]) -> anyhow::Result<Self> {
        let (certificate, key) = pki.client(user, groups);
        let http = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([Certificate::from_pem(pki.ca_pem().as_bytes())?])
            .identity(Identity::from_pkcs8_pem(certificate.as_bytes(), key.as_bytes())?)
            .user_agent("rebase-agent-tests")
            .timeout(DEADLINE)
            .build()?;
        Ok(Self { http, url: url.to_owned() })
    }

    /// Any request; `path` begins with a slash. One that the server is too busy for is repeated.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn send(&self, method: Method, path: &str, body: Option<(&str, &Value)>) -> anyhow::Result<Answer> {
        let what = format!("{method} {path}");
        let began = Instant::now();
        loop {
            let url = format!("{}{path}", self.url);
            let mut request = self.http.request(method.clone(), url).header(ACCEPT, "application/json");
            if let Some((kind, body)) = body {
                request = request.header(CONTENT_TYPE, kind).body(body.to_string());
            }
            let response = request.send().await.with_context(|| what.clone())?;
            let status = response.status().as_u16();
            // The storage of a new resource is not ready at once.
            if status == 429 && began.elapsed() < DEADLINE {
                sleep(POLL).await;
                continue;
            }
            let text = response.text().await.with_context(|| what.clone())?;
            return Ok(Answer { status, body: serde_json::from_str(&text).unwrap_or_default() });
        }
    }

    /// Reads an object.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.send(Method::GET, path, None).await
    }

    /// Creates an object in the collection `path`.
    ///
    /// # Errors
    /// If the server refuses it.
    pub async fn create(&self, path: &str, object: &Value) -> anyhow::Result<Value> {
        let answer = self.send(Method::POST, path, Some(("application/json", object))).await?;
        answer.ok().with_context(|| format!("create in {path}"))
    }

    /// Applies a JSON merge patch.
    ///
    /// # Errors
    /// If the server refuses it.
    pub async fn merge(&self, path: &str, patch: &Value) -> anyhow::Result<Value> {
        let answer = self.send(Method::PATCH, path, Some(("application/merge-patch+json", patch))).await?;
        answer.ok().with_context(|| format!("patch {path}"))
    }

    /// Applies a strategic merge patch.
    ///
    /// # Errors
    /// If the server refuses it.
    pub async fn strategic(&self, path: &str, patch: &Value) -> anyhow::Result<Value> {
        let answer = self.send(Method::PATCH, path, Some(("application/strategic-merge-patch+json", patch))).await?;
        answer.ok().with_context(|| format!("patch {path}"))
    }

    /// Deletes an object at once, if it exists.
    ///
    /// # Errors
    /// If the server refuses it.
    pub async fn delete(&self, path: &str) -> anyhow::Result<()> {
        let now = json!({"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0});
        let answer = self.send(Method::DELETE, path, Some(("application/json", &now))).await?;
        answer.found().map(drop).with_context(|| format!("delete {path}"))
    }
}
