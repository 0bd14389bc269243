//! Logging: structured fields and stable message ids if standard error is the journal, plain text otherwise.

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

/// How long the process waits at its end until the last messages are written.
const FLUSH: Duration = Duration::from_secs(1);
/// Most fields of one event; ours have at most four.
const FIELDS: usize = 16;

/// The `MESSAGE_ID`s. The journal catalog explains each, so its meaning never changes.
pub mod id {
    /// Defines a constant for each id, and the list of all.
    macro_rules! ids {
        ($($(#[$doc:meta])* $name:ident = $id:literal;)*) => {
            $($(#[$doc])* pub const $name: &str = $id;)*

            /// All ids with their names, for the test of the catalog.
            pub const ALL: &[(&str, &str)] = &[$((stringify!($name), $name)),*];
        };
    }

    ids! {
        /// The agent started.
        STARTED = "4d6ba9b1f6f94b0a9e4c6a7d2f0c1e35";
        /// The agent stops.
        STOPPING = "0c9a2f4be7d84e6f8f1f3c5d7a90b264";
        /// The decision changed.
        DECIDED = "b3f1d2c47a5e4f0c9b8e6d1a2c3f4e57";
        /// The decision makes the node Degraded or Unreconcilable.
        REFUSED = "7e2c4a9d1b3f4856a0c9e8d7f6b5a413";
        /// An image's signature was verified.
        VERIFIED = "e5a8c1d03f7b4926b4d7f0a1c2e3d486";
        /// An action failed and is retried later.
        FAILED = "19d4b7e2c5f04a83966e1f0d8c7b2a35";
        /// The image was pulled into the host's storage; nothing is staged.
        FETCHED = "44851c5680cf4ce1a20b3f5698fa25d7";
        /// The image is staged.
        STAGED = "5c0e7f9a2d4b4163885f3a6b9d1c7e20";
        /// The Node's annotations were changed.
        REPORTED = "a1f3c5e7092b4d6f8a0c2e4f61738594";
        /// The reboot was accepted.
        REBOOTING = "d8e6f4a2c0b94715936e5d7c8b1a0f42";
        /// The node runs the desired image.
        DONE = "62b0d9f8e7c6453a94b1a2d3c4e5f607";
        /// The node runs the desired image, but the node's policy refuses it.
        UNTRUSTED = "f0a6d3b81c2e4795a8b4c7d9e1f20356";
        /// Our MachineConfigNode cannot be written as it should be.
        UNSHOWN = "9b3e6a41d7c04f5c8e2d1f60a7b9c358";
    }
}

/// An owned copy of an event, for the thread that writes to the journal and may block.
#[derive(Debug)]
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

    /// Sends the event to the current subscriber.
    fn dispatch(&self) {
        let set = self.metadata.fields();
        // Pairs without a value are ignored.
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

/// Queues every event for the thread that writes to the journal, whose socket blocks while journald is busy.
struct Queue(&'static Lane<Record>);

impl<S: Subscriber> tracing_subscriber::Layer<S> for Queue {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        self.0.send(Record::of(event));
    }
}

/// The queue to the journal; `None` if messages go to standard error.
#[derive(Debug)]
pub struct Journal(Option<&'static Lane<Record>>);

impl Journal {
    /// Waits up to one second until the last messages are written.
    pub fn flush(&self) {
        if let Some(lane) = self.0 {
            lane.flush(FLUSH);
        }
    }
}

/// Sets up logging for the whole process. If the journal's socket fails, messages go to standard error after a warning.
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
    // For a person at a terminal, print only the message, without the fields for programs.
    let fields = format::debug_fn(|writer, field, value| match field.name() {
        "message" => write!(writer, "{value:?}"),
        _ => Ok(()),
    });
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
    registry.with(layer.without_time().with_target(false).fmt_fields(fields)).init();
    if let Some(error) = failure {
        tracing::warn!(
            "cannot use the journal's socket /run/systemd/journal/socket: {error}; messages go to standard error without \
             their fields. See `systemctl status systemd-journald.socket`"
        );
    }
    Journal(None)
}

/// Starts the thread that writes to the journal. It runs as long as the process, as the global subscriber does.
fn lane(filter: LevelFilter) -> io::Result<&'static Lane<Record>> {
    let layer = tracing_journald::layer()?.with_field_prefix(None);
    let journal = Dispatch::new(tracing_subscriber::registry().with(filter).with(layer));
    let other = journal.clone();
    let lost = move |number: u64| {
        dispatcher::with_default(&other, || {
            tracing::warn!(
                message_id = id::FAILED,
                "{number} messages were dropped, because the journal did not accept them in time"
            );
        });
    };
    let lane =
        Lane::new("journal", move |record: Record| dispatcher::with_default(&journal, || record.dispatch()), lost)?;
    Ok(Box::leak(Box::new(lane)))
}

/// Whether standard error is the journal. systemd sets `JOURNAL_STREAM` to device and inode of the stream that it
/// connected; a redirected stream has others.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    nix::sys::stat::fstat(io::stderr().as_fd()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A layer that records all events.
    struct Kept(Arc<Mutex<Vec<Record>>>);

    impl<S: Subscriber> tracing_subscriber::Layer<S> for Kept {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(Record::of(event));
        }
    }

    #[test]
    fn a_record_dispatched_later_has_the_same_fields() {
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
