//! The journal: structured fields and stable message ids when standard error is the journal, plain text otherwise.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use tracing::field::{Field, Value, Visit};
use tracing::{Dispatch, Event, Level, Metadata, Subscriber, dispatcher};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format;
use tracing_subscriber::layer::Context;
use tracing_subscriber::prelude::*;

use crate::lane::Lane;

/// How long the end of the process waits for its last messages to be written.
const FLUSH: Duration = Duration::from_secs(1);
/// Most fields of one event; ours have four at most.
const FIELDS: usize = 16;

/// `MESSAGE_ID`s; each is explained in the journal catalog, so none ever changes its meaning.
pub mod id {
    /// The agent started.
    pub const STARTED: &str = "4d6ba9b1f6f94b0a9e4c6a7d2f0c1e35";
    /// The agent stops.
    pub const STOPPING: &str = "0c9a2f4be7d84e6f8f1f3c5d7a90b264";
    /// Another rule applies now.
    pub const DECIDED: &str = "b3f1d2c47a5e4f0c9b8e6d1a2c3f4e57";
    /// The node is Degraded or Unreconcilable now.
    pub const REFUSED: &str = "7e2c4a9d1b3f4856a0c9e8d7f6b5a413";
    /// An image's signature was verified.
    pub const VERIFIED: &str = "e5a8c1d03f7b4926b4d7f0a1c2e3d486";
    /// An action failed and will be tried again.
    pub const FAILED: &str = "19d4b7e2c5f04a83966e1f0d8c7b2a35";
    /// The image is staged.
    pub const STAGED: &str = "5c0e7f9a2d4b4163885f3a6b9d1c7e20";
    /// The Node's annotations were changed.
    pub const REPORTED: &str = "a1f3c5e7092b4d6f8a0c2e4f61738594";
    /// The reboot was accepted.
    pub const REBOOTING: &str = "d8e6f4a2c0b94715936e5d7c8b1a0f42";
    /// The node runs what is desired.
    pub const DONE: &str = "62b0d9f8e7c6453a94b1a2d3c4e5f607";

    /// The node runs what is desired, and its policy refuses the image.
    pub const UNTRUSTED: &str = "f0a6d3b81c2e4795a8b4c7d9e1f20356";

    /// All of them with their names, for the catalog test.
    pub const ALL: &[(&str, &str)] = &[
        ("STARTED", STARTED),
        ("STOPPING", STOPPING),
        ("DECIDED", DECIDED),
        ("REFUSED", REFUSED),
        ("VERIFIED", VERIFIED),
        ("FAILED", FAILED),
        ("STAGED", STAGED),
        ("REPORTED", REPORTED),
        ("REBOOTING", REBOOTING),
        ("DONE", DONE),
        ("UNTRUSTED", UNTRUSTED),
    ];
}

/// One event, owned: what the journal is sent, on the thread that may block.
struct Record {
    metadata: &'static Metadata<'static>,
    fields: Vec<(Field, String)>,
}

impl Record {
    fn of(event: &Event<'_>) -> Self {
        let mut record = Self { metadata: event.metadata(), fields: Vec::new() };
        event.record(&mut record);
        record
    }

    /// Tells the current subscriber.
    fn dispatch(&self) {
        let set = self.metadata.fields();
        // A pair without a value is passed over.
        let Some(spare) = set.iter().next() else { return };
        let values: [(&Field, Option<&dyn Value>); FIELDS] = std::array::from_fn(|at| match self.fields.get(at) {
            Some((field, text)) => (field, Some(text as &dyn Value)),
            None => (&spare, None),
        });
        Event::dispatch(self.metadata, &set.value_set(&values));
    }
}

impl Visit for Record {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.fields.push((field.clone(), format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.push((field.clone(), value.to_owned()));
    }
}

/// Hands every event to the thread that writes to the journal: its socket blocks while journald is busy.
struct Queue(&'static Lane<Record>);

impl<S: Subscriber> tracing_subscriber::Layer<S> for Queue {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        self.0.send(Record::of(event));
    }
}

/// The way to the journal, for [`Journal::flush`].
#[derive(Debug)]
pub struct Journal(Option<&'static Lane<Record>>);

impl Journal {
    /// Waits a moment for the last messages to be written.
    pub fn flush(&self) {
        if let Some(lane) = self.0 {
            lane.flush(FLUSH);
        }
    }
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.metadata.name())
    }
}

/// Sets up logging for the whole process. Without a journal, messages go to standard error, and a warning first.
pub fn init(level: Level) -> Journal {
    let filter = LevelFilter::from_level(level);
    let registry = tracing_subscriber::registry().with(filter);
    let failure = match stderr_is_journal().then(|| lane(filter)) {
        Some(Ok(lane)) => {
            registry.with(Queue(lane)).init();
            return Journal(Some(lane));
        }
        Some(Err(error)) => Some(error),
        None => None,
    };
    // A person reads this: the sentence alone, without the fields that repeat it for programs.
    let fields = format::debug_fn(|writer, field, value| match field.name() {
        "message" => write!(writer, "{value:?}"),
        _ => Ok(()),
    });
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
    registry.with(layer.without_time().with_target(false).fmt_fields(fields)).init();
    if let Some(error) = failure {
        tracing::warn!(
            "the journal's socket /run/systemd/journal/socket cannot be used: {error}; messages go to standard error, \
             without their fields. See `systemctl status systemd-journald.socket`"
        );
    }
    Journal(None)
}

/// The thread that writes to the journal. It lives as long as the process, as the global subscriber does.
fn lane(filter: LevelFilter) -> io::Result<&'static Lane<Record>> {
    let layer = tracing_journald::layer()?.with_field_prefix(None);
    let journal = Dispatch::new(tracing_subscriber::registry().with(filter).with(layer));
    let other = journal.clone();
    let lost = move |number: u64| {
        dispatcher::with_default(&other, || {
            tracing::warn!(
                message_id = id::FAILED,
                "{number} messages were dropped: the journal did not take them in time"
            );
        });
    };
    let lane =
        Lane::new("journal", move |record: Record| dispatcher::with_default(&journal, || record.dispatch()), lost)?;
    Ok(Box::leak(Box::new(lane)))
}

/// systemd sets `JOURNAL_STREAM` to device and inode of the stream it connected; a redirected one differs.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    nix::sys::stat::fstat(io::stderr().as_fd()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Keeps the records of what passes.
    struct Kept(Arc<Mutex<Vec<Record>>>);

    impl<S: Subscriber> tracing_subscriber::Layer<S> for Kept {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(Record::of(event));
        }
    }

    #[test]
    fn a_record_dispatched_later_says_the_same() {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let subscriber = Dispatch::new(tracing_subscriber::registry().with(Kept(kept.clone())));
        dispatcher::with_default(&subscriber, || {
            tracing::warn!(message_id = id::FAILED, rebase_agent_reason = %"Done", "one {}", 1);
            let record = kept.lock().unwrap().pop().unwrap();
            record.dispatch();
            let again = kept.lock().unwrap().pop().unwrap();
            assert_eq!(record.fields, again.fields);
            assert_eq!((again.metadata.level(), again.metadata.line()), (&Level::WARN, record.metadata.line()));
            let texts: Vec<_> = again.fields.iter().map(|(field, text)| (field.name(), text.as_str())).collect();
            assert_eq!(texts, [("message", "one 1"), ("message_id", id::FAILED), ("rebase_agent_reason", "Done")]);
        });
    }

    #[test]
    fn message_ids_are_unique_128_bit_words() {
        let mut ids: Vec<_> = id::ALL.iter().map(|(_, id)| *id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), id::ALL.len());
        for id in ids {
            assert!(id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')), "{id}");
        }
    }
}
