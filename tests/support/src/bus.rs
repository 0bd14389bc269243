//! A private system bus: a real `dbus-daemon`, and the few helpers that a service needs to answer calls on it.
//!
//! Calls are answered from raw messages rather than through an object server: doubles must be able to withhold a
//! reply, to send a signal before it, and to disconnect during a call.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::future::{Future, poll_fn};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use zbus::export::futures_core::Stream;
use zbus::message::{Flags, Message, Type};
use zbus::{Connection, DynamicType, MessageStream, OwnedVariant, Variant};

/// A running `dbus-daemon`. It is killed when this is dropped, and with this process.
#[derive(Debug)]
pub struct Bus {
    child: Child,
    dir: PathBuf,
    address: String,
}

impl Bus {
    /// Starts a bus whose socket, configuration and service files are in `dir`.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        let services = dir.join("bus-services");
        std::fs::create_dir_all(&services)?;
        let socket = dir.join("bus.sock");
        let _ = std::fs::remove_file(&socket);
        let config = dir.join("bus.conf");
        std::fs::write(
            &config,
            format!(
                r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <servicedir>{services}</servicedir>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_type="method_call"/>
    <allow send_type="method_return"/>
    <allow send_type="error"/>
    <allow send_type="signal"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
  </policy>
</busconfig>
"#,
                socket = socket.display(),
                services = services.display(),
            ),
        )?;
        // The bus asks systemd to activate a service, as on a real node.
        // The shell holds a pipe from this process: the daemon ends with this process in every case.
        let mut child = Command::new("sh")
            .args(["-c", "dbus-daemon \"$@\" & exec >&-; read -r line; kill $!; wait", "bus"])
            .arg(format!("--config-file={}", config.display()))
            .args(["--nofork", "--nopidfile", "--print-address=1", "--systemd-activation"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("starting dbus-daemon")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no pipe")?).read_line(&mut line)?;
        if line.trim().is_empty() {
            drop(child.stdin.take());
            let _ = child.wait();
            bail!("dbus-daemon refused {}", config.display());
        }
        Ok(Self { child, dir: dir.to_owned(), address: format!("unix:path={}", socket.display()) })
    }

    /// The value for `DBUS_SYSTEM_BUS_ADDRESS`.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// A new connection to this bus.
    pub async fn connect(&self) -> Connection {
        connect(&self.address).await.expect("the private bus answers")
    }

    /// Makes `name` activatable through systemd's `unit`.
    pub fn activatable(&self, name: &str, unit: &str) -> anyhow::Result<()> {
        std::fs::write(
            self.dir.join("bus-services").join(format!("{name}.service")),
            format!("[D-BUS Service]\nName={name}\nExec=/bin/false\nUser=root\nSystemdService={unit}\n"),
        )?;
        Ok(())
    }

    /// Makes the bus read its service files again.
    pub async fn reload(&self) -> anyhow::Result<()> {
        bus_call(&self.connect().await, "ReloadConfig", &()).await?;
        Ok(())
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Connects to the bus at `address`.
pub(crate) async fn connect(address: &str) -> zbus::Result<Connection> {
    zbus::connection::Builder::address(address).build().await
}

/// Calls a method of the bus itself.
pub(crate) async fn bus_call<B>(connection: &Connection, method: &str, body: &B) -> zbus::Result<Message>
where
    B: serde::Serialize + DynamicType,
{
    connection
        .call_method(Some("org.freedesktop.DBus"), "/org/freedesktop/DBus", Some("org.freedesktop.DBus"), method, body)
        .await
}

/// The next message of a stream; `None` when the connection is closed.
pub(crate) async fn next(stream: &mut MessageStream) -> Option<zbus::Result<Message>> {
    poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
}

/// A variant of any value that fits into one.
pub(crate) fn variant<'a>(value: impl Into<Variant<'a>>) -> OwnedVariant {
    OwnedVariant::try_from(value.into()).expect("no file descriptors here")
}

/// The dictionary type of D-Bus options and property lists.
pub(crate) type Dict = HashMap<String, OwnedVariant>;

/// A string of a dictionary; like GVariant's typed lookup, another type counts as absent.
pub(crate) fn lookup_str(dict: &Dict, key: &str) -> Option<String> {
    dict.get(key).and_then(|value| String::try_from(value.clone()).ok())
}

/// A boolean of a dictionary; another type counts as absent.
pub(crate) fn lookup_bool(dict: &Dict, key: &str) -> Option<bool> {
    dict.get(key).and_then(|value| bool::try_from(value.clone()).ok())
}

/// A D-Bus error.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) name: String,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(name: &str, text: impl Into<String>) -> Self {
        Self { name: name.to_owned(), text: text.into() }
    }
}

impl From<zbus::Error> for Failure {
    fn from(error: zbus::Error) -> Self {
        Self::new("org.freedesktop.DBus.Error.InvalidArgs", error.to_string())
    }
}

/// A service's reaction to a call: a reply, no reply at all, or an error.
pub(crate) type Answer = Result<Option<Message>, Failure>;

/// One incoming method call.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) message: Message,
    pub(crate) path: String,
    pub(crate) interface: String,
    pub(crate) member: String,
    pub(crate) sender: String,
}

impl Call {
    fn new(message: Message) -> Self {
        let header = message.header();
        let text = |value: Option<String>| value.unwrap_or_default();
        let (path, interface, member, sender) = (
            text(header.path().map(|v| v.to_string())),
            text(header.interface().map(|v| v.to_string())),
            text(header.member().map(|v| v.to_string())),
            text(header.sender().map(|v| v.to_string())),
        );
        Self { message, path, interface, member, sender }
    }

    /// The reply with `body`.
    pub(crate) fn reply<B>(&self, body: &B) -> Answer
    where
        B: serde::Serialize + DynamicType,
    {
        Ok(Some(Message::method_return(&self.message.header()).build(body)?))
    }

    /// The error reply.
    fn refuse(&self, failure: &Failure) -> zbus::Result<Message> {
        Message::error(&self.message.header(), failure.name.as_str()).build(&(failure.text.as_str(),))
    }

    /// The error for a missing member.
    pub(crate) fn unknown(&self) -> Answer {
        Err(Failure::new(
            "org.freedesktop.DBus.Error.UnknownMethod",
            format!("No such method “{}” of {} at {}", self.member, self.interface, self.path),
        ))
    }
}

/// An object at a path: introspection of one interface and its properties.
pub(crate) struct Interface {
    /// Name.
    pub(crate) name: &'static str,
    /// The content of the `<interface>` tags.
    pub(crate) members: &'static str,
    /// Current values.
    pub(crate) properties: Vec<(&'static str, OwnedVariant)>,
}

/// A service that answers calls on one connection.
pub(crate) trait Service: Send + Sync + 'static {
    /// The object at `path`; empty where there is none.
    fn at(&self, path: &str) -> Vec<Interface>;
    /// Answers a call to a non-standard interface.
    fn call(self: &Arc<Self>, connection: &Connection, call: &Call) -> impl Future<Output = Answer> + Send;
    /// Whether the service exits instead of answering this call.
    fn leaves(self: &Arc<Self>) -> impl Future<Output = bool> + Send {
        async { false }
    }
    /// Receives a signal.
    fn signal(self: &Arc<Self>, message: &Message) -> impl Future<Output = ()> + Send {
        let _ = message;
        async {}
    }
}

/// Serves until the connection closes, one message after the other, like a daemon with one main loop.
pub(crate) async fn serve<S: Service>(mut stream: MessageStream, service: Arc<S>) {
    let connection = Connection::from(&stream);
    while let Some(Ok(message)) = next(&mut stream).await {
        match message.message_type() {
            Type::MethodCall => {}
            Type::Signal => {
                service.signal(&message).await;
                continue;
            }
            _ => continue,
        }
        if service.leaves().await {
            return;
        }
        let call = Call::new(message);
        let answer = match standard(&*service, &call) {
            Some(answer) => answer,
            None => service.call(&connection, &call).await,
        };
        let reply = match answer {
            Ok(None) => continue,
            Ok(Some(reply)) => reply,
            Err(failure) => call.refuse(&failure).expect("an error message can be built"),
        };
        if !call.message.primary_header().flags().contains(Flags::NO_REPLY_EXPECTED) {
            let _ = connection.send(&reply).await;
        }
    }
}

fn standard<S: Service>(service: &S, call: &Call) -> Option<Answer> {
    match (call.interface.as_str(), call.member.as_str()) {
        ("org.freedesktop.DBus.Peer", "Ping") => Some(call.reply(&())),
        ("org.freedesktop.DBus.Introspectable", "Introspect") => {
            Some(call.reply(&(introspect(&service.at(&call.path)),)))
        }
        ("org.freedesktop.DBus.Properties", _) => Some(properties(&service.at(&call.path), call)),
        _ => None,
    }
}

fn introspect(interfaces: &[Interface]) -> String {
    let mut xml = String::from("<node>\n");
    for interface in interfaces {
        let _ = write!(xml, "<interface name=\"{}\">\n{}\n", interface.name, interface.members.trim());
        for (name, value) in &interface.properties {
            let _ = writeln!(xml, "<property name=\"{name}\" type=\"{}\" access=\"read\"/>", value.value_signature());
        }
        xml.push_str("</interface>\n");
    }
    xml.push_str("</node>\n");
    xml
}

fn properties(interfaces: &[Interface], call: &Call) -> Answer {
    let body = call.message.body();
    let find = |name: &str| {
        interfaces.iter().find(|interface| interface.name == name).ok_or_else(|| {
            Failure::new(
                "org.freedesktop.DBus.Error.UnknownInterface",
                format!("No such interface “{name}” at {}", call.path),
            )
        })
    };
    match call.member.as_str() {
        "Get" => {
            let (interface, property): (String, String) = body.deserialize()?;
            let value = find(&interface)?.properties.iter().find(|(name, _)| *name == property);
            match value {
                Some((_, value)) => call.reply(&(value,)),
                None => Err(Failure::new(
                    "org.freedesktop.DBus.Error.UnknownProperty",
                    format!("No such property “{property}”"),
                )),
            }
        }
        "GetAll" => {
            let (interface,): (String,) = body.deserialize()?;
            let all: HashMap<&str, &OwnedVariant> =
                find(&interface)?.properties.iter().map(|(name, value)| (*name, value)).collect();
            call.reply(&(all,))
        }
        "Set" => Err(Failure::new("org.freedesktop.DBus.Error.AccessDenied", "Rejected by the bus policy")),
        _ => call.unknown(),
    }
}

/// Emits `PropertiesChanged` for every property of an interface.
pub(crate) async fn properties_changed(connection: &Connection, path: &str, interface: &Interface) {
    let changed: HashMap<&str, &OwnedVariant> =
        interface.properties.iter().map(|(name, value)| (*name, value)).collect();
    let none: Vec<&str> = Vec::new();
    let _ = connection
        .emit_signal(
            None::<&str>,
            path,
            "org.freedesktop.DBus.Properties",
            "PropertiesChanged",
            &(interface.name, changed, none),
        )
        .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bus_answers_and_dies() {
        let dir = tempfile::tempdir().unwrap();
        let bus = Bus::start(dir.path()).unwrap();
        let connection = bus.connect().await;
        assert!(connection.unique_name().is_some());
        assert!(bus.address().starts_with("unix:path="));
        drop(bus);
        connection.closed().await;
    }
}
