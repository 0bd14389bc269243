//! The guest's journal as it is written, from its own port: it is complete even after a power cut.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::watch;

/// One record.
#[derive(Clone, Debug)]
pub struct Entry(Value);

impl Entry {
    /// A field, if it is text.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        self.0[name].as_str()
    }

    /// `MESSAGE`, also where journald stores bytes because of a control character.
    #[must_use]
    pub fn message(&self) -> String {
        match &self.0["MESSAGE"] {
            Value::Array(bytes) => {
                let bytes: Vec<u8> = bytes.iter().filter_map(|byte| byte.as_u64()?.try_into().ok()).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            text => text.as_str().unwrap_or_default().to_owned(),
        }
    }

    /// Whether the agent wrote it.
    #[must_use]
    pub fn is_agents(&self) -> bool {
        self.field("_SYSTEMD_UNIT") == Some("rebase-agent.service")
            && self.field("SYSLOG_IDENTIFIER") != Some("systemd")
    }

    /// Whether it has that `MESSAGE_ID`.
    #[must_use]
    pub fn has_id(&self, id: &str) -> bool {
        self.field("MESSAGE_ID") == Some(id)
    }
}

/// Every record so far.
#[derive(Clone)]
pub struct Journal(watch::Sender<Vec<Entry>>);

impl Journal {
    /// An empty journal.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(Vec::new()))
    }

    /// Reads records of a boot until the guest is gone, and also writes them to `file`.
    pub fn read(&self, stream: UnixStream, file: std::fs::File) {
        let (journal, mut file) = (self.clone(), tokio::fs::File::from_std(file));
        tokio::spawn(async move {
            let mut lines = BufReader::new(stream).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let _ = file.write_all(format!("{line}\n").as_bytes()).await;
                let _ = file.flush().await;
                // A line that the end of the guest cut off is ignored.
                if let Ok(fields) = serde_json::from_str(&line) {
                    journal.0.send_modify(|entries| entries.push(Entry(fields)));
                }
            }
        });
    }

    /// The number of records so far, as a start for later searches.
    #[must_use]
    pub fn mark(&self) -> usize {
        self.0.borrow().len()
    }

    /// All records since `mark` that `predicate` accepts.
    #[must_use]
    pub fn since(&self, mark: usize, predicate: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        self.0.borrow().iter().skip(mark).filter(|entry| predicate(entry)).cloned().collect()
    }

    /// Waits for the first record since `mark` that `predicate` accepts.
    pub async fn wait(
        &self,
        mark: usize,
        deadline: Duration,
        what: &str,
        predicate: impl Fn(&Entry) -> bool,
    ) -> Result<Entry> {
        let mut entries = self.0.subscribe();
        let found = |entries: &Vec<Entry>| entries.iter().skip(mark).find(|entry| predicate(entry)).cloned();
        let wait = async {
            loop {
                if let Some(entry) = found(&entries.borrow_and_update()) {
                    return entry;
                }
                // The sender lives in self.
                let _ = entries.changed().await;
            }
        };
        tokio::time::timeout(deadline, wait)
            .await
            .with_context(|| format!("not in the journal within {deadline:?}: {what}"))
    }

    /// Notifies about new records.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<Vec<Entry>> {
        self.0.subscribe()
    }
}

impl Default for Journal {
    fn default() -> Self {
        Self::new()
    }
}
