//! Follows our Node: read, watch, read again.

use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::ACCEPT;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::error::connection;
use super::{Api, ClusterError, METADATA, NodeObject, checked, refusal};
use crate::backoff::{Backoff, full_jitter, jittered, random};
use crate::model::printable;

/// Largest line of a watch, in bytes: 256 KiB of annotations and the fields that the API server adds.
const MAX_LINE: usize = 2 << 20;

/// Longest pause of an idle node after its watch broke off or a read failed. A restarted API server ends the watches of all
/// nodes at once, and their requests come back over this time. A node at work returns at once.
const RETURN: Duration = Duration::from_secs(90);

/// A state of our Node, or the error of reading it.
pub type Told = Result<NodeObject, ClusterError>;

/// Follows our Node for ever: read, watch until the watch ends, read again. Where watching is forbidden or does not work,
/// the reads alone are enough, only slower. `poll` is the length of a watch, and with it the time between two reads. A
/// watch is never resumed without a read, at the cost of one request per `poll`: the read notices a watch that sends
/// nothing, and a restored database.
pub async fn follow(api: std::sync::Arc<Api>, poll: Duration, told: mpsc::Sender<Told>) {
    let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let spread = |duration: Duration| Duration::from_millis(jittered(milliseconds(duration), random()));
    let (mut early, mut idle): (u32, bool) = (0, false);
    sleep(Duration::from_millis(full_jitter(milliseconds(api.timing.first), random()))).await;
    loop {
        let length = spread(poll);
        let began = Instant::now();
        let (read, ended) = match api.metadata().await {
            Ok((node, since)) => {
                idle = node.facts.is_done();
                if told.send(Ok(node)).await.is_err() {
                    return;
                }
                (true, api.watch(&since, length, &told, &mut idle).await)
            }
            Err(error) => (false, Err(error)),
        };
        let left = length.saturating_sub(began.elapsed());
        early = if left < length / 2 { 0 } else { early.saturating_add(1) };
        let backoff = Backoff::CLUSTER.delay(early.max(1));
        let pause = match &ended {
            // The Node may be read but not watched, so wait for the next read.
            Err(ClusterError::Forbidden(_)) if read => left,
            Ok(()) | Err(ClusterError::Connection(_) | ClusterError::Busy { .. }) if idle => {
                Duration::from_millis(full_jitter(milliseconds(RETURN.min(length)), random()))
            }
            // A server that ends each watch at its beginning would be asked without end.
            Ok(()) => Duration::from_millis(full_jitter(backoff, random())),
            Err(_) => Duration::from_millis(jittered(backoff, random())),
        };
        let pause = if read { pause.min(left) } else { pause };
        let asked_for = ended.as_ref().err().and_then(ClusterError::retry_after).map(spread);
        if let Err(error) = ended {
            tracing::debug!("following the Node: {error}");
            api.forget();
            // A broken watch says nothing about the Node, unless the Node was deleted. The next read reports its state.
            let telling = !read || matches!(error, ClusterError::NotFound(_));
            if telling && told.send(Err(error)).await.is_err() {
                return;
            }
        }
        sleep(pause.max(asked_for.unwrap_or_default())).await;
    }
}

impl Api {
    /// Watches our Node from version `since` until the server ends the watch after `length`. Sends every state to `told`, and
    /// keeps in `idle` whether the last one is Done.
    async fn watch(
        &self,
        since: &str,
        length: Duration,
        told: &mpsc::Sender<Told>,
        idle: &mut bool,
    ) -> Result<(), ClusterError> {
        let session = self.session()?;
        let url = format!(
            "{}&watch=1&allowWatchBookmarks=true&resourceVersion={since}&timeoutSeconds={}",
            session.list_url(),
            length.as_secs().max(1)
        );
        let request =
            session.client.get(url).header(ACCEPT, METADATA).timeout(length.saturating_add(self.timing.grace));
        let silent = |_| ClusterError::Connection("the API server did not answer the request for a watch".to_owned());
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
                    *idle = node.facts.is_done();
                    if told.send(Ok(node)).await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// The Node of one watch event; `None` for a bookmark. Pure.
pub(super) fn event<'a>(line: &'a [u8], node: &str) -> Result<Option<&'a [u8]>, ClusterError> {
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
        other => Err(confused(format!("it has an event of the unknown type {other}"))),
    }
}

/// Splits a byte stream into lines of bounded length. Pure.
#[derive(Default)]
pub(super) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    pub(super) fn push(&mut self, chunk: &[u8]) -> Result<Vec<Vec<u8>>, ClusterError> {
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
            let why = format!("it has a line of more than {MAX_LINE} bytes");
            return Err(ClusterError::Confused { what: "the watch", why });
        }
        Ok(lines)
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
    fn lines_allocate_only_their_length() {
        let lines = Lines::default().push(&b"{}\n".repeat(10_000)).unwrap();
        assert_eq!(lines.len(), 10_000);
        assert!(lines.iter().map(Vec::capacity).sum::<usize>() < 1 << 20);
    }

    #[test]
    fn each_type_of_event_is_parsed() {
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
}
