//! A double of systemd's manager on the bus: the units that a rebase uses, jobs, and D-Bus activation.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;
use zbus::message::Message;
use zbus::{Connection, MessageStream, ObjectPath, OwnedVariant};

use crate::bus::{self, Answer, Bus, Call, Failure, Interface, Service, variant};
use crate::events::{Event, Events};

const NAME: &str = "org.freedesktop.systemd1";
const MANAGER: &str = "/org/freedesktop/systemd1";
const UNITS: &str = "/org/freedesktop/systemd1/unit/";

/// The work of a unit's start: an error fails the job.
type Hook = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync>;

/// The same for a template, with the instance as argument.
type TemplateHook = Arc<dyn Fn(String) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync>;

/// A start job that has not ended.
#[derive(Clone)]
struct Starting {
    number: u32,
    stop: Arc<Notify>,
    stopped: Arc<Notify>,
}

/// One unit with its properties.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// `loaded`, `not-found`.
    pub load: String,
    /// `active`, `inactive`, `activating`, `deactivating`, `failed`.
    pub active: String,
    /// `running`, `exited`, `dead`, `failed`, …
    pub sub: String,
    /// `success`, `exit-code`, …
    pub result: String,
    /// The exit code, or the signal that ended it.
    pub exec_main_status: i32,
    /// The last `STATUS=`.
    pub status_text: String,
    /// The main process, 0 if none.
    pub main_pid: u32,
    /// Whether systemd has it in memory; `GetUnit` refuses a unit that is not loaded.
    pub in_memory: bool,
    /// The sub state after a successful start: `running`, `exited`, or `dead` for a plain oneshot.
    pub started_sub: String,
}

impl Unit {
    /// An inactive unit that is installed.
    #[must_use]
    pub fn installed(started_sub: &str) -> Self {
        Self {
            load: "loaded".to_owned(),
            active: "inactive".to_owned(),
            sub: "dead".to_owned(),
            result: "success".to_owned(),
            exec_main_status: 0,
            status_text: String::new(),
            main_pid: 0,
            in_memory: false,
            started_sub: started_sub.to_owned(),
        }
    }

    fn missing() -> Self {
        Self { load: "not-found".to_owned(), in_memory: true, ..Self::installed("running") }
    }
}

struct Inner {
    events: Events,
    connection: Connection,
    units: Mutex<BTreeMap<String, Unit>>,
    hooks: Mutex<HashMap<String, Hook>>,
    /// The unit that an alias names.
    aliases: Mutex<HashMap<String, String>>,
    /// Templates by the part before the instance, `@` included.
    templates: Mutex<HashMap<String, TemplateHook>>,
    starting: Mutex<HashMap<String, Starting>>,
    refusals: Mutex<HashMap<String, String>>,
    results: Mutex<HashMap<String, String>>,
    subscribers: Mutex<HashSet<String>>,
    started: Mutex<Vec<String>>,
    jobs: AtomicU32,
    merged: AtomicU32,
    always_early: AtomicBool,
    loses_signals: AtomicBool,
    version: Mutex<String>,
}

/// The handle to the double.
#[derive(Clone)]
pub struct Systemd {
    inner: Arc<Inner>,
}

impl fmt::Debug for Systemd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Systemd").field("units", &self.inner.units).finish_non_exhaustive()
    }
}

impl Systemd {
    /// Takes systemd's name on `bus`.
    pub async fn start(bus: &Bus, events: Events) -> anyhow::Result<Self> {
        let connection = bus.connect().await;
        let inner = Arc::new(Inner {
            events,
            connection: connection.clone(),
            units: Mutex::default(),
            hooks: Mutex::default(),
            aliases: Mutex::default(),
            templates: Mutex::default(),
            starting: Mutex::default(),
            refusals: Mutex::default(),
            results: Mutex::default(),
            subscribers: Mutex::default(),
            started: Mutex::default(),
            jobs: AtomicU32::new(1),
            merged: AtomicU32::new(0),
            always_early: AtomicBool::new(false),
            loses_signals: AtomicBool::new(false),
            version: Mutex::new("257.3-1.el10".to_owned()),
        });
        let this = Self { inner };
        this.reset(false);
        let stream = MessageStream::from(&connection);
        tokio::spawn(bus::serve(stream, this.inner.clone()));
        for rule in ["type='signal',member='NameOwnerChanged'", "type='signal',member='ActivationRequest'"] {
            bus::bus_call(&connection, "AddMatch", &(rule,)).await?;
        }
        connection.request_name(NAME).await?;
        Ok(this)
    }

    /// Forgets every unit's state, as a boot does. `bootloader_update` installs that unit.
    pub fn reset(&self, bootloader_update: bool) {
        let mut units = BTreeMap::new();
        for (name, started) in [
            ("ostree-finalize-staged.service", "exited"),
            ("ostree-boot-complete.service", "exited"),
            ("kubelet.service", "running"),
            ("rpm-ostreed.service", "running"),
            ("rebase-agent.service", "running"),
        ] {
            units.insert(name.to_owned(), Unit::installed(started));
        }
        if bootloader_update {
            units.insert("bootloader-update.service".to_owned(), Unit::installed("dead"));
        }
        self.stop_jobs();
        *self.inner.units.lock().unwrap() = units;
    }

    /// Ends every running job, as at shutdown.
    pub fn stop_jobs(&self) {
        self.inner.starting.lock().unwrap().values().for_each(|starting| starting.stop.notify_one());
    }

    /// Installs a template, e.g. `switch@`, whose instances are oneshots that run this.
    pub fn install_template<F>(&self, prefix: &str, hook: impl Fn(String) -> F + Send + Sync + 'static)
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        let hook: TemplateHook = Arc::new(move |instance| Box::pin(hook(instance)));
        self.inner.templates.lock().unwrap().insert(prefix.to_owned(), hook);
    }

    /// The unit's current state.
    #[must_use]
    pub fn unit(&self, name: &str) -> Option<Unit> {
        self.inner.units.lock().unwrap().get(name).cloned()
    }

    /// Changes a unit, installing it if necessary, and notifies its watchers.
    pub fn update(&self, name: &str, change: impl FnOnce(&mut Unit)) {
        {
            let mut units = self.inner.units.lock().unwrap();
            let unit = units.entry(name.to_owned()).or_insert_with(|| Unit::installed("running"));
            change(unit);
            unit.in_memory = true;
        }
        let (inner, name) = (self.inner.clone(), name.to_owned());
        tokio::spawn(async move { inner.tell(&name).await });
    }

    /// Sets a unit's states.
    pub fn set(&self, name: &str, active: &str, sub: &str) {
        self.update(name, |unit| {
            active.clone_into(&mut unit.active);
            sub.clone_into(&mut unit.sub);
        });
    }

    /// Makes a unit failed with a result, e.g. `exit-code`.
    pub fn fail(&self, name: &str, result: &str) {
        self.update(name, |unit| {
            "failed".clone_into(&mut unit.active);
            "failed".clone_into(&mut unit.sub);
            result.clone_into(&mut unit.result);
            unit.exec_main_status = 1;
        });
    }

    /// Removes a unit's file.
    pub fn uninstall(&self, name: &str) {
        self.inner.units.lock().unwrap().remove(name);
    }

    /// Makes `alias` another name of the unit `name`.
    pub fn alias(&self, alias: &str, name: &str) {
        self.inner.aliases.lock().unwrap().insert(alias.to_owned(), name.to_owned());
    }

    /// The work of a start of `name` in addition to changing its state.
    pub fn on_start<F>(&self, name: &str, hook: impl Fn() -> F + Send + Sync + 'static)
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.inner.hooks.lock().unwrap().insert(name.to_owned(), Arc::new(move || Box::pin(hook())));
    }

    /// Later starts of `name` fail with this result (`exit-code`, `timeout`, …); `None` ends that.
    pub fn refuse_start(&self, name: &str, result: Option<&str>) {
        let mut refusals = self.inner.refusals.lock().unwrap();
        match result {
            Some(result) => refusals.insert(name.to_owned(), result.to_owned()),
            None => refusals.remove(name),
        };
    }

    /// Later start jobs of `name` end with this result (`canceled`, `dependency`, …) and do no work; `None` ends that.
    pub fn end_jobs(&self, name: &str, result: Option<&str>) {
        let mut results = self.inner.results.lock().unwrap();
        match result {
            Some(result) => results.insert(name.to_owned(), result.to_owned()),
            None => results.remove(name),
        };
    }

    /// Sends every `JobRemoved` before the reply; otherwise every second one.
    pub fn job_removed_early(&self, always: bool) {
        self.inner.always_early.store(always, Ordering::SeqCst);
    }

    /// Whether no `JobRemoved` is sent, as when systemd re-executes itself at the wrong moment.
    pub fn lose_signals(&self, lost: bool) {
        self.inner.loses_signals.store(lost, Ordering::SeqCst);
    }

    /// Sets the `Version` property.
    pub fn set_version(&self, version: &str) {
        version.clone_into(&mut self.inner.version.lock().unwrap());
    }

    /// The number of starts that were merged into an existing job.
    #[must_use]
    pub fn merged(&self) -> u32 {
        self.inner.merged.load(Ordering::SeqCst)
    }

    /// Every unit that a client started, in order.
    #[must_use]
    pub fn started(&self) -> Vec<String> {
        self.inner.started.lock().unwrap().clone()
    }

    /// Starts a unit as a dependency: its hook runs, and `Events` gets no report.
    pub async fn activate(&self, name: &str) -> Result<(), String> {
        self.inner.run(name).await
    }
}

impl Inner {
    /// Runs the start of a unit that is installed.
    async fn run(self: &Arc<Self>, name: &str) -> Result<(), String> {
        let refusal = self.refusals.lock().unwrap().get(name).cloned();
        if self.units.lock().unwrap().get(name).is_some_and(|unit| unit.active == "active") && refusal.is_none() {
            return Ok(());
        }
        self.change(name, |unit| {
            "activating".clone_into(&mut unit.active);
            "start".clone_into(&mut unit.sub);
            unit.in_memory = true;
        });
        let hook = self.hooks.lock().unwrap().get(name).cloned();
        let template = self.template(name);
        let outcome = match (refusal, hook, template) {
            (Some(result), ..) => Err(result),
            (None, Some(hook), _) => hook().await,
            (None, None, Some((hook, instance))) => hook(instance).await,
            (None, None, None) => Ok(()),
        };
        self.change(name, |unit| match &outcome {
            Ok(()) => {
                let active = if unit.started_sub == "dead" { "inactive" } else { "active" };
                active.clone_into(&mut unit.active);
                unit.sub.clone_from(&unit.started_sub);
                "success".clone_into(&mut unit.result);
            }
            Err(result) => {
                "failed".clone_into(&mut unit.active);
                "failed".clone_into(&mut unit.sub);
                unit.result.clone_from(result);
                unit.exec_main_status = 1;
            }
        });
        self.tell(name).await;
        outcome
    }

    fn template(&self, name: &str) -> Option<(TemplateHook, String)> {
        let (prefix, instance) = name.split_once('@')?;
        let hook = self.templates.lock().unwrap().get(&format!("{prefix}@")).cloned()?;
        Some((hook, instance.strip_suffix(".service")?.to_owned()))
    }

    /// Runs the start of a unit until it has started or is stopped: the job's result.
    async fn start(self: &Arc<Self>, name: &str, job: Starting) -> String {
        let result = tokio::select! {
            outcome = self.run(name) => if outcome.is_ok() { "done" } else { "failed" },
            // A program that ends on SIGTERM has not failed.
            () = job.stop.notified() => {
                self.change(name, |unit| {
                    "inactive".clone_into(&mut unit.active);
                    "dead".clone_into(&mut unit.sub);
                });
                "canceled"
            }
        };
        if self.template(name).is_some() {
            // An inactive unit without a reference is unloaded.
            self.change(name, |unit| unit.in_memory = unit.active != "inactive");
        }
        self.starting.lock().unwrap().remove(name);
        job.stopped.notify_one();
        result.to_owned()
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Unit)) {
        if let Some(unit) = self.units.lock().unwrap().get_mut(name) {
            change(unit);
        }
    }

    async fn tell(self: &Arc<Self>, name: &str) {
        let path = unit_path(name);
        if self.subscribers.lock().unwrap().is_empty() {
            return;
        }
        for interface in self.unit_interfaces(name, false) {
            bus::properties_changed(&self.connection, &path, &interface).await;
        }
    }

    fn installed(&self, name: &str) -> bool {
        if self.template(name).is_some() {
            let oneshot = || Unit { in_memory: true, ..Unit::installed("dead") };
            self.units.lock().unwrap().entry(name.to_owned()).or_insert_with(oneshot);
        }
        self.units.lock().unwrap().get(name).is_some_and(|unit| unit.load == "loaded")
    }

    fn unit_interfaces(&self, name: &str, load: bool) -> Vec<Interface> {
        let mut units = self.units.lock().unwrap();
        let unit = units.entry(name.to_owned()).or_insert_with(Unit::missing);
        unit.in_memory |= load;
        vec![
            Interface {
                name: "org.freedesktop.systemd1.Unit",
                members: "",
                properties: vec![
                    ("Id", variant(name)),
                    ("LoadState", variant(unit.load.as_str())),
                    ("ActiveState", variant(unit.active.as_str())),
                    ("SubState", variant(unit.sub.as_str())),
                ],
            },
            Interface {
                name: "org.freedesktop.systemd1.Service",
                members: "",
                properties: vec![
                    ("Result", variant(unit.result.as_str())),
                    ("ExecMainStatus", variant(unit.exec_main_status)),
                    ("StatusText", variant(unit.status_text.as_str())),
                    ("MainPID", variant(unit.main_pid)),
                ],
            },
        ]
    }

    /// The unit behind a caller's name, which is loaded if necessary.
    fn load(&self, name: &str) -> Result<String, Failure> {
        let invalid = |text| Failure::new("org.freedesktop.DBus.Error.InvalidArgs", text);
        if !is_unit_name(name) {
            return Err(invalid(format!("Unit name {name} is not valid.")));
        }
        if name.contains("@.") {
            return Err(invalid(format!("Unit name {name} is missing the instance name.")));
        }
        let id = self.aliases.lock().unwrap().get(name).cloned().unwrap_or_else(|| name.to_owned());
        self.installed(&id);
        self.unit_interfaces(&id, true);
        Ok(id)
    }

    fn is_masked(&self, name: &str) -> bool {
        self.units.lock().unwrap().get(name).is_some_and(|unit| unit.load == "masked")
    }

    async fn job(self: &Arc<Self>, call: &Call, name: String, stop: bool, mode: &str) -> Answer {
        // Masked units may be stopped, and for missing ones only the error text differs.
        match (self.installed(&name), self.is_masked(&name), stop) {
            (true, ..) | (false, true, true) => {}
            (false, true, false) => {
                return Err(Failure::new("org.freedesktop.systemd1.UnitMasked", format!("Unit {name} is masked.")));
            }
            (false, false, true) => return Err(no_such_unit(format!("Unit {name} not loaded."))),
            (false, false, false) => return Err(no_such_unit(format!("Unit {name} not found."))),
        }
        let running = self.starting.lock().unwrap().get(&name).cloned();
        if stop && mode == "fail" && running.is_some() {
            return Err(Failure::new(
                "org.freedesktop.systemd1.TransactionIsDestructive",
                format!(
                    "Transaction for {name}/stop is destructive ({name} has 'start' job queued, but 'stop' is included in transaction)."
                ),
            ));
        }
        if let (false, Some(Starting { number, .. })) = (stop, &running) {
            self.merged.fetch_add(1, Ordering::SeqCst);
            return call.reply(&(ObjectPath::try_from(format!("{MANAGER}/job/{number}"))?,));
        }
        let number = self.jobs.fetch_add(1, Ordering::SeqCst);
        let job = format!("{MANAGER}/job/{number}");
        let starting = Starting { number, stop: Arc::new(Notify::new()), stopped: Arc::new(Notify::new()) };
        if let (true, Some(running)) = (stop, &running) {
            running.stop.notify_one();
        } else if stop {
            self.change(&name, |unit| {
                "inactive".clone_into(&mut unit.active);
                "dead".clone_into(&mut unit.sub);
            });
        } else {
            self.starting.lock().unwrap().insert(name.clone(), starting.clone());
            self.started.lock().unwrap().push(name.clone());
            self.events.emit(Event::UnitStarted(name.clone()));
        }
        // A slow start does not block other calls.
        let quick = self.template(&name).is_none() && number.is_multiple_of(2);
        let early = self.always_early.load(Ordering::SeqCst) || quick;
        let reply = call.reply(&(ObjectPath::try_from(job.as_str())?,));
        let this = self.clone();
        let work = async move {
            let ended = this.results.lock().unwrap().get(&name).cloned();
            let result = match ended {
                Some(result) if !stop => {
                    this.starting.lock().unwrap().remove(&name);
                    result
                }
                _ if stop => {
                    if let Some(running) = running {
                        running.stopped.notified().await;
                    }
                    "done".to_owned()
                }
                _ => this.start(&name, starting).await,
            };
            // Broadcast to all clients, once any client has subscribed.
            let heard = !this.subscribers.lock().unwrap().is_empty() && !this.loses_signals.load(Ordering::SeqCst);
            if heard {
                let path = ObjectPath::try_from(job.as_str()).expect("a valid path");
                let _ = this
                    .connection
                    .emit_signal(
                        None::<&str>,
                        MANAGER,
                        "org.freedesktop.systemd1.Manager",
                        "JobRemoved",
                        &(number, path, name, result),
                    )
                    .await;
            }
        };
        if early {
            work.await;
        } else {
            tokio::spawn(async move {
                tokio::task::yield_now().await;
                work.await;
            });
        }
        reply
    }
}

/// fnmatch(3) with a single `*`.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        Some((before, after)) => {
            name.len() >= before.len() + after.len() && name.starts_with(before) && name.ends_with(after)
        }
        None => pattern == name,
    }
}

/// `unit_name_is_valid`, limited to characters, length and suffix.
fn is_unit_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    let known =
        ["service", "socket", "target", "scope", "mount", "timer", "path", "slice", "device", "swap", "automount"];
    let suffix = name.rsplit_once('.').filter(|(stem, _)| !stem.is_empty() && !stem.starts_with('@'));
    name.len() < 256 && name.bytes().all(allowed) && suffix.is_some_and(|(_, suffix)| known.contains(&suffix))
}

fn no_such_unit(text: String) -> Failure {
    Failure::new("org.freedesktop.systemd1.NoSuchUnit", text)
}

/// The object path of a unit.
#[must_use]
pub fn unit_path(name: &str) -> String {
    let mut path = String::from(UNITS);
    for (index, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (byte.is_ascii_digit() && index > 0) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("_{byte:02x}"));
        }
    }
    path
}

fn unit_name(path: &str) -> Option<String> {
    let escaped = path.strip_prefix(UNITS)?.as_bytes();
    let mut name = Vec::new();
    let mut index = 0;
    while index < escaped.len() {
        if escaped[index] == b'_' {
            let digits = std::str::from_utf8(escaped.get(index + 1..index + 3)?).ok()?;
            name.push(u8::from_str_radix(digits, 16).ok()?);
            index += 3;
        } else {
            name.push(escaped[index]);
            index += 1;
        }
    }
    String::from_utf8(name).ok()
}

const MANAGER_MEMBERS: &str = r#"
<method name="Subscribe"/>
<method name="Unsubscribe"/>
<method name="GetUnit"><arg name="name" type="s" direction="in"/><arg name="unit" type="o" direction="out"/></method>
<method name="LoadUnit"><arg name="name" type="s" direction="in"/><arg name="unit" type="o" direction="out"/></method>
<method name="StartUnit"><arg name="name" type="s" direction="in"/><arg name="mode" type="s" direction="in"/><arg name="job" type="o" direction="out"/></method>
<method name="StopUnit"><arg name="name" type="s" direction="in"/><arg name="mode" type="s" direction="in"/><arg name="job" type="o" direction="out"/></method>
<method name="ResetFailedUnit"><arg name="name" type="s" direction="in"/></method>
<method name="ListUnitsByNames"><arg name="names" type="as" direction="in"/><arg name="units" type="a(ssssssouso)" direction="out"/></method>
<method name="ListUnitsByPatterns"><arg name="states" type="as" direction="in"/><arg name="patterns" type="as" direction="in"/><arg name="units" type="a(ssssssouso)" direction="out"/></method>
<signal name="JobRemoved"><arg name="id" type="u"/><arg name="job" type="o"/><arg name="unit" type="s"/><arg name="result" type="s"/></signal>
"#;

impl Service for Inner {
    fn at(&self, path: &str) -> Vec<Interface> {
        if path == MANAGER {
            let version: OwnedVariant = variant(self.version.lock().unwrap().as_str());
            return vec![Interface {
                name: "org.freedesktop.systemd1.Manager",
                members: MANAGER_MEMBERS,
                properties: vec![("Version", version)],
            }];
        }
        // Reading a unit's object loads the unit, even a missing one.
        unit_name(path).map_or_else(Vec::new, |name| self.unit_interfaces(&name, true))
    }

    async fn call(self: &Arc<Self>, _connection: &Connection, call: &Call) -> Answer {
        if call.path != MANAGER {
            return call.unknown();
        }
        let body = call.message.body();
        match call.member.as_str() {
            "Subscribe" => {
                let new = self.subscribers.lock().unwrap().insert(call.sender.clone());
                if !new {
                    return Err(Failure::new(
                        "org.freedesktop.systemd1.AlreadySubscribed",
                        "Client is already subscribed.",
                    ));
                }
                call.reply(&())
            }
            "Unsubscribe" => {
                self.subscribers.lock().unwrap().remove(&call.sender);
                call.reply(&())
            }
            "GetUnit" => {
                let (name,): (String,) = body.deserialize()?;
                let there = self.units.lock().unwrap().get(&name).is_some_and(|unit| unit.in_memory);
                if !there {
                    return Err(no_such_unit(format!("Unit {name} not loaded.")));
                }
                call.reply(&(ObjectPath::try_from(unit_path(&name))?,))
            }
            "LoadUnit" => {
                let (name,): (String,) = body.deserialize()?;
                let name = self.load(&name)?;
                call.reply(&(ObjectPath::try_from(unit_path(&name))?,))
            }
            "StartUnit" | "StopUnit" => {
                let (name, mode): (String, String) = body.deserialize()?;
                let name = self.load(&name)?;
                if !["replace", "fail", "isolate", "ignore-dependencies", "ignore-requirements"]
                    .contains(&mode.as_str())
                {
                    return Err(Failure::new(
                        "org.freedesktop.DBus.Error.InvalidArgs",
                        format!("Job mode {mode} invalid"),
                    ));
                }
                self.job(call, name, call.member == "StopUnit", &mode).await
            }
            "ResetFailedUnit" => {
                let (name,): (String,) = body.deserialize()?;
                if !self.units.lock().unwrap().get(&name).is_some_and(|unit| unit.in_memory) {
                    return Err(no_such_unit(format!("Unit {name} not loaded.")));
                }
                self.change(&name, |unit| {
                    if unit.active == "failed" {
                        "inactive".clone_into(&mut unit.active);
                        "dead".clone_into(&mut unit.sub);
                        "success".clone_into(&mut unit.result);
                    }
                });
                self.tell(&name).await;
                call.reply(&())
            }
            "ListUnitsByNames" => {
                let (names,): (Vec<String>,) = body.deserialize()?;
                let mut rows = Vec::new();
                // A row has the unit's real name, which may differ from the requested one.
                for name in names.iter().filter(|name| is_unit_name(name)) {
                    let name = self.load(name)?;
                    let unit = self.units.lock().unwrap().get(&name).cloned().unwrap_or_else(Unit::missing);
                    let path = ObjectPath::try_from(unit_path(&name))?;
                    let none = ObjectPath::try_from("/")?;
                    let description = name.clone();
                    rows.push((name, description, unit.load, unit.active, unit.sub, "", path, 0_u32, "", none));
                }
                call.reply(&(rows,))
            }
            "ListUnitsByPatterns" => {
                let (states, patterns): (Vec<String>, Vec<String>) = body.deserialize()?;
                let units = self.units.lock().unwrap().clone();
                let mut rows = Vec::new();
                for (name, unit) in units {
                    let words = [&unit.load, &unit.active, &unit.sub];
                    let wanted = states.is_empty() || words.iter().any(|word| states.contains(word));
                    let named = patterns.is_empty() || patterns.iter().any(|pattern| matches(pattern, &name));
                    if unit.in_memory && wanted && named {
                        let path = ObjectPath::try_from(unit_path(&name))?;
                        let none = ObjectPath::try_from("/")?;
                        let description = name.clone();
                        rows.push((name, description, unit.load, unit.active, unit.sub, "", path, 0_u32, "", none));
                    }
                }
                call.reply(&(rows,))
            }
            _ => call.unknown(),
        }
    }

    async fn signal(self: &Arc<Self>, message: &Message) {
        let header = message.header();
        let body = message.body();
        match header.member().map(|member| member.as_str()) {
            Some("NameOwnerChanged") => {
                if let Ok((name, _, new)) = body.deserialize::<(String, String, String)>()
                    && new.is_empty()
                {
                    self.subscribers.lock().unwrap().remove(&name);
                }
            }
            Some("ActivationRequest") => {
                let Ok((unit,)) = body.deserialize::<(String,)>() else { return };
                let this = self.clone();
                tokio::spawn(async move {
                    if this.installed(&unit) && this.run(&unit).await.is_ok() {
                        return;
                    }
                    let _ = this
                        .connection
                        .emit_signal(
                            Some("org.freedesktop.DBus"),
                            MANAGER,
                            "org.freedesktop.systemd1.Activator",
                            "ActivationFailure",
                            &(unit.as_str(), "org.freedesktop.systemd1.NoSuchUnit", "Unit failed to start."),
                        )
                        .await;
                });
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn call<B: serde::Serialize + zbus::DynamicType>(
        connection: &Connection,
        path: &str,
        interface: &str,
        method: &str,
        body: &B,
    ) -> zbus::Result<Message> {
        connection.call_method(Some(NAME), path, Some(interface), method, body).await
    }

    const MANAGER_INTERFACE: &str = "org.freedesktop.systemd1.Manager";

    #[test]
    fn unit_paths_round_trip() {
        let path = unit_path("ostree-finalize-staged.service");
        assert_eq!(path, "/org/freedesktop/systemd1/unit/ostree_2dfinalize_2dstaged_2eservice");
        assert_eq!(unit_name(&path).unwrap(), "ostree-finalize-staged.service");
    }

    #[tokio::test]
    async fn units_start_stop_and_fail_through_jobs() {
        let dir = tempfile::tempdir().unwrap();
        let bus = Bus::start(dir.path()).unwrap();
        let systemd = Systemd::start(&bus, Events::new()).await.unwrap();
        let client = bus.connect().await;
        let error = call(&client, MANAGER, MANAGER_INTERFACE, "GetUnit", &("kubelet.service",)).await.unwrap_err();
        assert!(error.to_string().contains("NoSuchUnit"), "{error}");
        let reply = call(&client, MANAGER, MANAGER_INTERFACE, "LoadUnit", &("nothing.service",)).await.unwrap();
        let body = reply.body();
        let (path,): (ObjectPath<'_>,) = body.deserialize().unwrap();
        let reply = call(
            &client,
            path.as_str(),
            "org.freedesktop.DBus.Properties",
            "Get",
            &("org.freedesktop.systemd1.Unit", "LoadState"),
        )
        .await
        .unwrap();
        let (state,): (OwnedVariant,) = reply.body().deserialize().unwrap();
        assert_eq!(String::try_from(state).unwrap(), "not-found");

        call(&client, MANAGER, MANAGER_INTERFACE, "Subscribe", &()).await.unwrap();
        bus::bus_call(&client, "AddMatch", &("type='signal',member='JobRemoved'",)).await.unwrap();
        let mut stream = MessageStream::from(&client);
        for _ in 0..2 {
            systemd.set("kubelet.service", "inactive", "dead");
            call(&client, MANAGER, MANAGER_INTERFACE, "StartUnit", &("kubelet.service", "replace")).await.unwrap();
            let removed = tokio::time::timeout(Duration::from_secs(5), async {
                loop {
                    let message = bus::next(&mut stream).await.unwrap().unwrap();
                    if message.header().member().is_some_and(|member| member.as_str() == "JobRemoved") {
                        return message;
                    }
                }
            })
            .await
            .unwrap();
            assert_eq!(removed.body().signature().to_string_no_parens(), "uoss");
        }
        assert_eq!(systemd.unit("kubelet.service").unwrap().active, "active");
        systemd.refuse_start("kubelet.service", Some("timeout"));
        systemd.set("kubelet.service", "inactive", "dead");
        systemd.activate("kubelet.service").await.unwrap_err();
        assert_eq!(systemd.unit("kubelet.service").unwrap().result, "timeout");
        systemd.update("masked.service", |unit| "masked".clone_into(&mut unit.load));
        systemd.install_template("switch@", |_| async { Ok(()) });
        for (method, name, why) in [
            ("StartUnit", "no.service", "NoSuchUnit: Unit no.service not found."),
            ("StopUnit", "no.service", "NoSuchUnit: Unit no.service not loaded."),
            ("StartUnit", "masked.service", "UnitMasked: Unit masked.service is masked."),
            ("StartUnit", "a b.service", "InvalidArgs: Unit name a b.service is not valid."),
            ("StartUnit", "noname", "InvalidArgs: Unit name noname is not valid."),
            ("StartUnit", "switch@.service", "InvalidArgs: Unit name switch@.service is missing the instance name."),
        ] {
            let error = call(&client, MANAGER, MANAGER_INTERFACE, method, &(name, "fail")).await.unwrap_err();
            assert!(error.to_string().contains(why), "{method} {name}: {error}");
        }
        // Instances are known by their template, and masked units may be stopped.
        for name in ["switch@1.service", "masked.service"] {
            call(&client, MANAGER, MANAGER_INTERFACE, "StopUnit", &(name, "replace")).await.unwrap();
        }
        systemd.alias("other.service", "kubelet.service");
        let names = vec!["other.service", "a b.service", "no.service"];
        let reply = call(&client, MANAGER, MANAGER_INTERFACE, "ListUnitsByNames", &(names,)).await.unwrap();
        type Row =
            (String, String, String, String, String, String, zbus::OwnedObjectPath, u32, String, zbus::OwnedObjectPath);
        let (rows,): (Vec<Row>,) = reply.body().deserialize().unwrap();
        let rows: Vec<_> = rows.iter().map(|row| (row.0.as_str(), row.2.as_str())).collect();
        assert_eq!(rows, [("kubelet.service", "loaded"), ("no.service", "not-found")]);
    }
}
