//! The part of rpm-ostree's command line that the tests need: `rebase REFERENCE` and `cleanup -p`, sent to the daemon
//! on the bus.

use std::collections::HashMap;
use std::process::ExitCode;

use anyhow::{Error, Result, bail};
use rpm_ostreed::{NAME, OS, SYSROOT, SYSROOT_PATH, follow};
use zbus::{Connection, OwnedObjectPath, Proxy, Variant};

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
    let sysroot: Proxy<'_> = Proxy::new(&bus, NAME, SYSROOT_PATH, SYSROOT).await?;
    let id = HashMap::from([("id", Variant::from("cli"))]);
    sysroot.call::<_, _, ()>("RegisterClient", &(&id,)).await?;
    let booted: OwnedObjectPath = sysroot.get_property("Booted").await?;
    let os: Proxy<'_> = Proxy::new(&bus, NAME, booted, OS).await?;
    let title = format!("rpm-ostree {}", arguments.join(" "));
    let options = HashMap::from([("initiating-command-line", Variant::from(title))]);
    let address: String = match arguments.as_slice() {
        ["rebase", reference] => os.call("Rebase", &(&options, *reference, Vec::<String>::new())).await?,
        ["cleanup", "-p"] => os.call("Cleanup", &(vec!["pending-deploy"],)).await?,
        _ => bail!("usage: rpm-ostree rebase REFERENCE | cleanup -p"),
    };
    follow(&address, |text| println!("{text}")).await.map_err(Error::msg)
}
