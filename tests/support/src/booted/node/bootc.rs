//! bootc, limited to the shipped units: `status`, `switch` and `ostree container image pull`, on the disk of
//! rpm-ostreed's double, with the same real pull, under a lock that the kernel lists.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Error, Result, bail, ensure};
use clap::Parser;
use serde_json::json;

use super::{OSNAME, daemon};
use crate::bootc::status;
use crate::events::Events;
use crate::rpmostreed::{Reference, Sysroot};

/// The places of bootc and ostree in the container; the files there are this program, which checks its own name.
pub const PROGRAMS: [&str; 2] = ["/usr/bin/bootc", "/usr/bin/ostree"];
/// The directory of the story's words for switches; each file is named after the image's digest.
pub const WORDS: &str = "/run/bootc-words";
/// Makes the switch fail before staging.
pub const FAIL: &str = "fail";
/// Makes the switch fail after staging: a bound image could not be pulled.
pub const FAIL_LATE: &str = "fail late";
/// Prefix of the arguments, as JSON, in the journal.
pub const CALLED: &str = "called with ";
/// The lock that every program takes to change or read the deployments.
const LOCK: &str = "/ostree/lock";

#[derive(Debug, Parser)]
#[command(name = "bootc")]
enum Command {
    Status {
        #[arg(long)]
        format: String,
        #[arg(long)]
        format_version: u32,
    },
    Switch {
        #[arg(long)]
        quiet: bool,
        #[arg(long)]
        enforce_container_sigpolicy: bool,
        image: String,
    },
}

fn log(arguments: &[OsString]) -> Vec<String> {
    let shown: Vec<_> = arguments.iter().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    eprintln!("{CALLED}{}", json!(shown));
    shown
}

/// Runs `ostree container image pull`.
pub async fn pull(arguments: &[OsString]) -> Result<()> {
    let arguments = log(arguments);
    let [_, _, _, quiet, repository, image] = arguments.as_slice() else { bail!("{arguments:?}") };
    ensure!(quiet == "--quiet", "progress would go to the journal, line by line");
    ensure!(repository == "/sysroot/ostree/repo", "there is no repository {repository}");
    let sysroot = Arc::new(Sysroot::running(Path::new("/"), OSNAME)?);
    let image = Reference::parse(image).map_err(Error::msg)?;
    daemon(Events::new(), sysroot)?.import(&image).await.map_err(Error::msg)?;
    Ok(())
}

/// Runs one command of bootc.
pub async fn run(arguments: &[OsString]) -> Result<()> {
    log(arguments);
    let command = Command::try_parse_from(arguments)?;
    let sysroot = Arc::new(Sysroot::running(Path::new("/"), OSNAME)?);
    let lock = fs::File::options().write(true).open(LOCK)?;
    lock.lock()?;
    match command {
        Command::Status { format, format_version } => {
            ensure!((format.as_str(), format_version) == ("json", 1), "status as {format} {format_version}");
            print!("{}", status(&sysroot.load()));
            Ok(())
        }
        Command::Switch { quiet, enforce_container_sigpolicy, image } => {
            ensure!(quiet, "progress would go to the journal, line by line");
            switch(sysroot, Reference { signed: enforce_container_sigpolicy, name: image }).await
        }
    }
}

async fn switch(sysroot: Arc<Sysroot>, target: Reference) -> Result<()> {
    let deployments = sysroot.load();
    // `host.spec` is the staged image, or else the booted one.
    let spec = deployments.iter().find(|d| d.staged).or(deployments.iter().find(|d| d.booted));
    if spec.is_some_and(|spec| spec.reference == target.canonical()) {
        println!("Image specification is unchanged.");
        return Ok(());
    }
    // Reading a pipe there waits for a writer.
    let digest = target.name.rsplit('@').next().unwrap_or_default();
    let word = fs::read_to_string(Path::new(WORDS).join(digest)).unwrap_or_default();
    ensure!(word != FAIL, "Switching: Pulling: something went wrong");
    let daemon = daemon(Events::new(), sysroot)?;
    let image = daemon.import(&target).await.map_err(Error::msg).context("Switching: Pulling")?;
    daemon.stage_imported(image).await.map_err(Error::msg).context("Switching: Staging")?;
    ensure!(word != FAIL_LATE, "Switching: Pulling bound image");
    println!("Queued for next boot: {}", target.canonical());
    Ok(())
}
