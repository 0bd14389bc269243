//! The API server's own record of requests.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use serde::Deserialize;

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// The user, such as `system:node:worker-0`.
    pub user: String,
    /// The `User-Agent` header.
    pub agent: String,
    /// `list`, `watch`, `get`, `patch` and so on.
    pub verb: String,
    /// Path and query.
    pub uri: String,
    /// The status code; 0 for a request that is not answered yet.
    pub status: u16,
}

impl Request {
    /// Whether it changes an object.
    #[must_use]
    pub fn is_write(&self) -> bool {
        !matches!(&*self.verb, "get" | "list" | "watch")
    }
}

/// All requests up to some moment, in the order of their first record.
#[derive(Clone, Debug, Default)]
pub struct Audit(Vec<Request>);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    #[serde(rename = "auditID")]
    audit_id: String,
    verb: String,
    #[serde(rename = "requestURI")]
    request_uri: String,
    user: User,
    user_agent: Option<String>,
    response_status: Option<Status>,
}

#[derive(Deserialize)]
struct User {
    username: Option<String>,
}

#[derive(Deserialize)]
struct Status {
    code: Option<u16>,
}

impl Audit {
    /// Reads the log; a line that is not complete yet is left out.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let mut requests: Vec<Request> = Vec::new();
        let mut known: BTreeMap<String, usize> = BTreeMap::new();
        for line in BufReader::new(std::fs::File::open(path)?).lines() {
            let Ok(record) = serde_json::from_str::<Record>(&line?) else { continue };
            // A watch has one record at its beginning and one at its end.
            let at = *known.entry(record.audit_id).or_insert(requests.len());
            let request = Request {
                user: record.user.username.unwrap_or_default(),
                agent: record.user_agent.unwrap_or_default(),
                verb: record.verb,
                uri: record.request_uri,
                status: record.response_status.and_then(|status| status.code).unwrap_or_default(),
            };
            match requests.get_mut(at) {
                Some(earlier) => *earlier = request,
                None => requests.push(request),
            }
        }
        Ok(Self(requests))
    }

    /// The requests of the agents, on all nodes or on this one.
    pub fn of_agents<'a>(&'a self, node: Option<&'a str>) -> impl Iterator<Item = &'a Request> {
        let ours = move |request: &&Request| {
            let user = request.user.strip_prefix("system:node:");
            request.agent.starts_with("rebase-agent/") && node.is_none_or(|node| user == Some(node))
        };
        self.0.iter().filter(ours)
    }
}
