//! A double of logind's manager on the bus: reboot, inhibitors, wall messages.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use zbus::{Connection, MessageStream};

use crate::bus::{self, Answer, Bus, Call, Failure, Interface, Service, variant};
use crate::events::{Event, Events};

const NAME: &str = "org.freedesktop.login1";
const PATH: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
const WALL_MESSAGE_MAX: usize = 4096;

/// One inhibitor lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inhibitor {
    /// Colon-separated, e.g. `shutdown:sleep`.
    pub what: String,
    /// The holder.
    pub who: String,
    /// Its reason.
    pub why: String,
    /// `block`, `block-weak` or `delay`.
    pub mode: String,
    /// The holder's user.
    pub uid: u32,
    /// The holder's process.
    pub pid: u32,
}

impl Inhibitor {
    /// A `block` lock on shutdown.
    #[must_use]
    pub fn block(who: &str, why: &str) -> Self {
        Self {
            what: "shutdown".to_owned(),
            who: who.to_owned(),
            why: why.to_owned(),
            mode: "block".to_owned(),
            uid: 0,
            pid: 1234,
        }
    }
}

type Reboot = Arc<dyn Fn() + Send + Sync>;

struct Inner {
    events: Events,
    connection: Connection,
    inhibitors: Mutex<Vec<Inhibitor>>,
    wall: Mutex<Option<(String, bool)>>,
    going_down: AtomicBool,
    asleep: AtomicBool,
    root_overrides: AtomicBool,
    refusal: Mutex<Option<(String, String)>>,
    lose_reply: AtomicBool,
    reboot: Mutex<Option<Reboot>>,
}

/// The handle to the double.
#[derive(Clone)]
pub struct Logind {
    inner: Arc<Inner>,
}

impl fmt::Debug for Logind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logind").field("inhibitors", &self.inner.inhibitors).finish_non_exhaustive()
    }
}

impl Logind {
    /// Takes logind's name on `bus`.
    pub async fn start(bus: &Bus, events: Events) -> anyhow::Result<Self> {
        let connection = bus.connect().await;
        let inner = Arc::new(Inner {
            events,
            connection: connection.clone(),
            inhibitors: Mutex::default(),
            wall: Mutex::default(),
            going_down: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            root_overrides: AtomicBool::new(false),
            refusal: Mutex::default(),
            lose_reply: AtomicBool::new(false),
            reboot: Mutex::default(),
        });
        tokio::spawn(bus::serve(MessageStream::from(&connection), inner.clone()));
        connection.request_name(NAME).await?;
        Ok(Self { inner })
    }

    /// Sets the action after an accepted reboot.
    pub fn on_reboot(&self, hook: impl Fn() + Send + Sync + 'static) {
        *self.inner.reboot.lock().unwrap() = Some(Arc::new(hook));
    }

    /// Takes a lock for another program.
    pub fn add_inhibitor(&self, inhibitor: Inhibitor) {
        self.inner.inhibitors.lock().unwrap().push(inhibitor);
        self.changed();
    }

    /// Releases all locks of `who`.
    pub fn remove_inhibitor(&self, who: &str) {
        self.inner.inhibitors.lock().unwrap().retain(|inhibitor| inhibitor.who != who);
        self.changed();
    }

    /// The text and the enabled flag of the last `SetWallMessage`.
    #[must_use]
    pub fn wall_message(&self) -> Option<(String, bool)> {
        self.inner.wall.lock().unwrap().clone()
    }

    /// `true`: as in systemd 252, where root overrides block locks; `false`: as in 257, where they apply to root.
    pub fn root_overrides_inhibitors(&self, overrides: bool) {
        self.inner.root_overrides.store(overrides, Ordering::SeqCst);
    }

    /// Every reboot is refused with this error name and text; `None` ends that.
    pub fn refuse_reboot(&self, error: Option<(&str, &str)>) {
        *self.inner.refusal.lock().unwrap() = error.map(|(name, text)| (name.to_owned(), text.to_owned()));
    }

    /// The next accepted reboot gets no reply.
    pub fn lose_reboot_reply(&self) {
        self.inner.lose_reply.store(true, Ordering::SeqCst);
    }

    /// Whether a shutdown is in progress.
    #[must_use]
    pub fn preparing_for_shutdown(&self) -> bool {
        self.inner.going_down.load(Ordering::SeqCst)
    }

    /// Sets whether a suspend is in progress.
    pub fn suspend(&self, asleep: bool) {
        self.inner.asleep.store(asleep, Ordering::SeqCst);
    }

    /// Reboots the machine for another client, e.g. an operator with `systemctl reboot -i`.
    pub async fn reboot(&self) {
        self.inner.begin().await;
    }

    /// Resets the state, as a boot does.
    pub fn reset(&self) {
        self.inner.going_down.store(false, Ordering::SeqCst);
        self.inner.inhibitors.lock().unwrap().clear();
        *self.inner.wall.lock().unwrap() = None;
        self.changed();
    }

    fn changed(&self) {
        let inner = self.inner.clone();
        tokio::spawn(async move { inner.tell().await });
    }
}

impl Inner {
    async fn tell(&self) {
        for interface in self.at(PATH) {
            bus::properties_changed(&self.connection, PATH, &interface).await;
        }
    }

    fn inhibited(&self, modes: &[&str]) -> String {
        let inhibitors = self.inhibitors.lock().unwrap();
        let mut what: Vec<&str> = inhibitors
            .iter()
            .filter(|inhibitor| modes.contains(&inhibitor.mode.as_str()))
            .flat_map(|inhibitor| inhibitor.what.split(':'))
            .collect();
        what.sort_unstable();
        what.dedup();
        what.join(":")
    }

    fn blocks(&self, modes: &[&str]) -> bool {
        self.inhibited(modes).split(':').any(|what| what == "shutdown")
    }

    /// Accepts a reboot.
    async fn begin(&self) {
        if self.going_down.swap(true, Ordering::SeqCst) {
            return;
        }
        self.events.emit(Event::RebootAccepted);
        let _ = self.connection.emit_signal(None::<&str>, PATH, MANAGER, "PrepareForShutdown", &(true,)).await;
        self.tell().await;
        let hook = self.reboot.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook();
        }
    }

    /// systemd 252 checks for a running operation and lets root pass inhibitors; 257 checks inhibitors first, for root
    /// as well.
    async fn asked(&self, call: &Call) -> Answer {
        let refusal = self.refusal.lock().unwrap().clone();
        if let Some((name, text)) = refusal {
            return Err(Failure::new(&name, text));
        }
        let active = match (self.going_down.load(Ordering::SeqCst), self.asleep.load(Ordering::SeqCst)) {
            (true, _) => Some("reboot"),
            (false, true) => Some("suspend"),
            (false, false) => None,
        };
        let old = self.root_overrides.load(Ordering::SeqCst);
        if !old && self.blocks(&["block"]) {
            return Err(Failure::new(
                "org.freedesktop.DBus.Error.AccessDenied",
                "Access denied due to active block inhibitor",
            ));
        }
        if let Some(active) = active {
            let text = match old {
                true => "There's already a shutdown or sleep operation in progress".to_owned(),
                false => format!("Action {active} already in progress, refusing requested reboot operation."),
            };
            return Err(Failure::new("org.freedesktop.login1.OperationInProgress", text));
        }
        self.begin().await;
        if self.lose_reply.swap(false, Ordering::SeqCst) {
            return Ok(None);
        }
        call.reply(&())
    }
}

const MEMBERS: &str = r#"
<method name="Reboot"><arg name="interactive" type="b" direction="in"/></method>
<method name="SetWallMessage"><arg name="wall_message" type="s" direction="in"/><arg name="enable" type="b" direction="in"/></method>
<method name="ListInhibitors"><arg name="inhibitors" type="a(ssssuu)" direction="out"/></method>
<signal name="PrepareForShutdown"><arg name="start" type="b"/></signal>
"#;

impl Service for Inner {
    fn at(&self, path: &str) -> Vec<Interface> {
        if path != PATH {
            return Vec::new();
        }
        vec![Interface {
            name: MANAGER,
            members: MEMBERS,
            properties: vec![
                ("PreparingForShutdown", variant(self.going_down.load(Ordering::SeqCst))),
                ("BlockInhibited", variant(self.inhibited(&["block", "block-weak"]))),
                ("DelayInhibited", variant(self.inhibited(&["delay"]))),
            ],
        }]
    }

    async fn call(self: &Arc<Self>, _connection: &Connection, call: &Call) -> Answer {
        if call.path != PATH {
            return call.unknown();
        }
        let body = call.message.body();
        match call.member.as_str() {
            "Reboot" => {
                let (_interactive,): (bool,) = body.deserialize()?;
                self.asked(call).await
            }
            "SetWallMessage" => {
                let (text, enabled): (String, bool) = body.deserialize()?;
                if text.len() > WALL_MESSAGE_MAX {
                    let why =
                        format!("Wall message too long, maximum permitted length is {WALL_MESSAGE_MAX} characters.");
                    return Err(Failure::new("org.freedesktop.DBus.Error.InvalidArgs", why));
                }
                *self.wall.lock().unwrap() = Some((text, enabled));
                call.reply(&())
            }
            "ListInhibitors" => {
                let rows: Vec<(String, String, String, String, u32, u32)> = self
                    .inhibitors
                    .lock()
                    .unwrap()
                    .iter()
                    .cloned()
                    .map(|i| (i.what, i.who, i.why, i.mode, i.uid, i.pid))
                    .collect();
                call.reply(&(rows,))
            }
            _ => call.unknown(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn inhibitors_bind_root_and_reboots_do_not_nest() {
        let dir = tempfile::tempdir().unwrap();
        let bus = Bus::start(dir.path()).unwrap();
        let logind = Logind::start(&bus, Events::new()).await.unwrap();
        let client = bus.connect().await;
        let reboot = async || client.call_method(Some(NAME), PATH, Some(MANAGER), "Reboot", &(false,)).await;
        logind.add_inhibitor(Inhibitor::block("backup", "copying"));
        let error = reboot().await.unwrap_err().to_string();
        assert!(error.contains("Access denied due to active block inhibitor"), "{error}");
        let reply = client.call_method(Some(NAME), PATH, Some(MANAGER), "ListInhibitors", &()).await.unwrap();
        assert_eq!(reply.body().signature().to_string(), "a(ssssuu)");
        logind.root_overrides_inhibitors(true);
        logind.suspend(true);
        let error = reboot().await.unwrap_err().to_string();
        assert!(error.contains("already a shutdown or sleep"), "{error}");
        logind.suspend(false);
        reboot().await.unwrap();
        let error = reboot().await.unwrap_err().to_string();
        assert!(error.contains("already a shutdown"), "{error}");
        logind.root_overrides_inhibitors(false);
        let error = reboot().await.unwrap_err().to_string();
        assert!(error.contains("Access denied due to active block inhibitor"), "{error}");
        logind.remove_inhibitor("backup");
        let error = reboot().await.unwrap_err().to_string();
        assert!(error.contains("Action reboot already in progress, refusing requested reboot operation."), "{error}");
        assert!(logind.preparing_for_shutdown());
    }
}
