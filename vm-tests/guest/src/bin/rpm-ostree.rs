//! The part of rpm-ostree's command line that the tests need: `rebase REFERENCE` and `cleanup -p`, sent to the daemon
//! on the bus.

use std::collections::HashMap;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use futures_util::StreamExt as _;
use zbus::{Connection, MessageStream, OwnedObjectPath, Proxy, Variant};

const NAME: &str = "org.projectatomic.rpmostree1";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let bus = Connection::system().await?;
    let sysroot: Proxy<'_> =
        Proxy::new(&bus, NAME, "/org/projectatomic/rpmostree1/Sysroot", "org.projectatomic.rpmostree1.Sysroot").await?;
    let id = HashMap::from([("id", Variant::from("cli"))]);
    sysroot.call::<_, _, ()>("RegisterClient", &(&id,)).await?;
    let booted: OwnedObjectPath = sysroot.get_property("Booted").await?;
    let os: Proxy<'_> = Proxy::new(&bus, NAME, booted, "org.projectatomic.rpmostree1.OS").await?;
    let title = format!("rpm-ostree {}", arguments.join(" "));
    let options = HashMap::from([("initiating-command-line", Variant::from(title))]);
    let address: String = match arguments.as_slice() {
        ["rebase", reference] => os.call("Rebase", &(&options, *reference, Vec::<String>::new())).await?,
        ["cleanup", "-p"] => os.call("Cleanup", &(vec!["pending-deploy"],)).await?,
        _ => bail!("usage: rpm-ostree rebase REFERENCE | cleanup -p"),
    };
    follow(&address).await
}

async fn follow(address: &str) -> Result<()> {
    let peer = zbus::connection::Builder::address(address).p2p().build().await?;
    // Subscribed before Start, so that no signal is missed.
    let mut messages = MessageStream::from(&peer);
    let start = peer.call_method(None::<&str>, "/", Some("org.projectatomic.rpmostree1.Transaction"), "Start", &());
    start.await?;
    while let Some(message) = messages.next().await {
        let message = message?;
        let header = message.header();
        match header.member().map(|member| member.as_str()) {
            Some("Message") => println!("{}", message.body().deserialize::<String>()?),
            Some("Finished") => {
                let (success, text): (bool, String) = message.body().deserialize()?;
                return if success { Ok(()) } else { bail!("{text}") };
            }
            _ => {}
        }
    }
    Err(anyhow::anyhow!("the daemon went away")).context("transaction")
}
