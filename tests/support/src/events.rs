//! The events around the node, in order. Every double reports them here; a story, a test or a crash point listens.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use tokio::sync::broadcast;

/// One event. Doubles emit it *before* they answer the call that caused it, so that a listener can kill the agent
/// before the agent learns of its success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Annotations (and `spec.unschedulable` under that name) of a Node changed; `None` is a removed key.
    NodeChanged {
        /// The field manager of the write.
        manager: String,
        /// The node.
        node: String,
        /// Key to new value.
        changes: BTreeMap<String, Option<String>>,
    },
    /// A method that creates a transaction was called on rpm-ostreed, or `bootc switch` was run.
    TransactionRequested {
        /// `rebase`, `cleanup`, `kernel-args`, `finalize-deployment`, `switch` or `pull`.
        method: String,
        /// The reference or another characteristic argument.
        argument: String,
    },
    /// `Start` was called and this call started the transaction.
    TransactionStarted {
        /// The transaction's title.
        title: String,
    },
    /// A `Message` of the running transaction.
    TransactionMessage(String),
    /// The transaction ended.
    TransactionFinished {
        /// The title.
        title: String,
        /// The error text, if it failed.
        error: Option<String>,
    },
    /// A deployment is staged now.
    Staged {
        /// Its container image reference.
        reference: String,
        /// Its ostree checksum.
        checksum: String,
    },
    /// The staged deployment is no longer locked: any reboot boots it.
    Unlocked {
        /// Its container image reference.
        reference: String,
    },
    /// A unit was started over D-Bus.
    UnitStarted(String),
    /// logind accepted a reboot.
    RebootAccepted,
    /// The machine is down: every process of the boot is gone.
    Down,
    /// The machine is up again.
    Booted {
        /// The new boot id.
        boot_id: String,
        /// The container image reference it booted.
        reference: String,
    },
    /// The agent's process started.
    AgentStarted {
        /// Its process id.
        pid: u32,
    },
    /// The agent sent `READY=1`.
    AgentReady,
    /// The agent sent `STATUS=`.
    AgentStatus(String),
    /// The agent wrote a line to standard error.
    AgentLine(String),
    /// The agent's process ended.
    AgentExited {
        /// Exit code, or the negated signal number.
        code: i32,
    },
}

type Listener = Box<dyn Fn(&Event) + Send + Sync>;

/// The receivers of events: synchronous listeners first, then all subscribers.
#[derive(Clone)]
pub struct Events {
    listeners: Arc<Mutex<Vec<Listener>>>,
    sender: broadcast::Sender<Event>,
}

impl Events {
    /// A sender without listeners.
    #[must_use]
    pub fn new() -> Self {
        Self { listeners: Arc::default(), sender: broadcast::channel(4096).0 }
    }

    /// Calls `listener` synchronously for every later event, in the task that emits it.
    pub fn listen(&self, listener: impl Fn(&Event) + Send + Sync + 'static) {
        self.listeners.lock().unwrap().push(Box::new(listener));
    }

    /// A queue of all later events.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.sender.subscribe()
    }

    /// Reports an event to all receivers.
    pub fn emit(&self, event: Event) {
        for listener in self.listeners.lock().unwrap().iter() {
            listener(&event);
        }
        let _ = self.sender.send(event);
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}
