//! A bounded queue to a separate thread, for writes to the journal and systemd, which may block and must not stop the
//! agent's loop.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Most queued items.
const QUEUE: usize = 256;
/// Interval at which a flush tries again to enter a full queue.
const FULL_POLL: Duration = Duration::from_millis(5);
/// Stack of the thread, in bytes; it only writes datagrams.
const STACK: usize = 256 << 10;

enum Item<T> {
    Work(T),
    Flush(SyncSender<()>),
}

/// The sender of the queue. Items that do not fit are dropped and counted.
#[derive(Debug)]
pub struct Lane<T> {
    queue: SyncSender<Item<T>>,
    dropped: Arc<AtomicU64>,
}

impl<T: Send + 'static> Lane<T> {
    /// Starts the thread. `work` writes one item. After a written item, `lost` receives the number of items that were
    /// dropped before.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn new(
        name: &str,
        mut work: impl FnMut(T) + Send + 'static,
        lost: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Self> {
        let (queue, items) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let count = dropped.clone();
        let run = move || {
            for item in items {
                match item {
                    Item::Work(item) => {
                        work(item);
                        match count.swap(0, Relaxed) {
                            0 => {}
                            number => lost(number),
                        }
                    }
                    // The caller of the flush may have stopped waiting.
                    Item::Flush(done) => drop(done.try_send(())),
                }
            }
        };
        thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(run)?;
        Ok(Self { queue, dropped })
    }

    /// Queues `item`, or drops it if the queue is full. Never waits.
    pub fn send(&self, item: T) {
        if self.queue.try_send(Item::Work(item)).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Waits until all queued items are written, for at most `patience`.
    pub fn flush(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let (done, heard) = sync_channel(1);
        let mut item = Item::Flush(done);
        while let Err(refused) = self.queue.try_send(item) {
            match refused {
                TrySendError::Full(back) if Instant::now() < until => item = back,
                _ => return,
            }
            thread::sleep(FULL_POLL);
        }
        // A timeout does not matter, because the process exits next.
        let _ = heard.recv_timeout(until.saturating_duration_since(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    #[test]
    fn a_blocked_writer_drops_messages_and_does_not_block_the_sender() {
        let (open, gate) = channel::<()>();
        let (began, beginning) = channel();
        let (told, lost) = channel();
        let written = Arc::new(Mutex::new(Vec::new()));
        let list = written.clone();
        let work = move |number: usize| {
            began.send(()).unwrap();
            let _ = gate.recv();
            list.lock().unwrap().push(number);
        };
        let lane = Lane::new("test", work, move |number| told.send(number).unwrap()).unwrap();
        lane.send(0);
        beginning.recv().unwrap();
        // Now the writer blocks.
        (1..=QUEUE + 44).for_each(|number| lane.send(number));
        lane.flush(Duration::ZERO);
        drop(open);
        assert_eq!(lost.recv().unwrap(), 44);
        lane.flush(Duration::from_secs(60));
        assert_eq!(*written.lock().unwrap(), (0..=QUEUE).collect::<Vec<_>>());
        assert!(lost.try_recv().is_err(), "said once");
    }
}
