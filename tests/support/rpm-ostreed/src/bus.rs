//! The few helpers that a service needs to answer calls on a bus.
//!
//! Calls are answered from raw messages rather than through an object server: a double must be able to withhold a
//! reply, to send a signal before it, and to disconnect during a call.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;

use zbus::export::futures_core::Stream;
use zbus::message::{Flags, Message, Type};
use zbus::{Connection, DynamicType, MessageStream, OwnedVariant, Variant};

/// Connects to the bus at `address`.
pub async fn connect(address: &str) -> zbus::Result<Connection> {
    zbus::connection::Builder::address(address).build().await
}

/// Calls a method of the bus itself.
pub async fn bus_call<B>(connection: &Connection, method: &str, body: &B) -> zbus::Result<Message>
where
    B: serde::Serialize + DynamicType,
{
    connection
        .call_method(Some("org.freedesktop.DBus"), "/org/freedesktop/DBus", Some("org.freedesktop.DBus"), method, body)
        .await
}

/// The next message of a stream; `None` when the connection is closed.
pub async fn next(stream: &mut MessageStream) -> Option<zbus::Result<Message>> {
    poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
}

/// A variant of any value that fits into one.
pub fn variant<'a>(value: impl Into<Variant<'a>>) -> OwnedVariant {
    OwnedVariant::try_from(value.into()).expect("no file descriptors here")
}

/// The dictionary type of D-Bus options and property lists.
pub type Dict = HashMap<String, OwnedVariant>;

/// A string of a dictionary; like GVariant's typed lookup, another type counts as absent.
pub fn lookup_str(dict: &Dict, key: &str) -> Option<String> {
    dict.get(key).and_then(|value| String::try_from(value.clone()).ok())
}

/// A boolean of a dictionary; another type counts as absent.
pub fn lookup_bool(dict: &Dict, key: &str) -> Option<bool> {
    dict.get(key).and_then(|value| bool::try_from(value.clone()).ok())
}

/// A D-Bus error.
#[derive(Debug)]
pub struct Failure {
    /// Its name.
    pub name: String,
    /// Its message.
    pub text: String,
}

impl Failure {
    /// An error with this name and message.
    pub fn new(name: &str, text: impl Into<String>) -> Self {
        Self { name: name.to_owned(), text: text.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.text)
    }
}

impl std::error::Error for Failure {}

impl From<zbus::Error> for Failure {
    fn from(error: zbus::Error) -> Self {
        Self::new("org.freedesktop.DBus.Error.InvalidArgs", error.to_string())
    }
}

/// A service's reaction to a call: a reply, no reply at all, or an error.
pub type Answer = Result<Option<Message>, Failure>;

/// One incoming method call.
#[derive(Debug)]
pub struct Call {
    /// The whole message.
    pub message: Message,
    /// The object.
    pub path: String,
    /// The interface.
    pub interface: String,
    /// The method.
    pub member: String,
    /// The caller's name on the bus.
    pub sender: String,
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
    pub fn reply<B>(&self, body: &B) -> Answer
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
    pub fn unknown(&self) -> Answer {
        Err(Failure::new(
            "org.freedesktop.DBus.Error.UnknownMethod",
            format!("No such method “{}” of {} at {}", self.member, self.interface, self.path),
        ))
    }
}

/// An object at a path: introspection of one interface and its properties.
pub struct Interface {
    /// Name.
    pub name: &'static str,
    /// The content of the `<interface>` tags.
    pub members: &'static str,
    /// Current values.
    pub properties: Vec<(&'static str, OwnedVariant)>,
}

/// A service that answers calls on one connection.
pub trait Service: Send + Sync + 'static {
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
pub async fn serve<S: Service>(mut stream: MessageStream, service: Arc<S>) {
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
pub async fn properties_changed(connection: &Connection, path: &str, interface: &Interface) {
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
