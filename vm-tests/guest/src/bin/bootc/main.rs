//! A stand-in for bootc, which Debian does not have: a thin `switch` and `status` over real work. It keeps the
//! original's guarantees: both need root, a mount namespace and the sysroot's lock, for which they wait without limit;
//! exit code 0 also means "nothing to do", 1 any failure and 2 wrong usage.

mod status;
mod switch;

use std::os::unix::fs::MetadataExt as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use ostree_ext::ostree::gio::Cancellable;
use ostree_ext::sysroot::SysrootLock;

const USAGE: &str = "usage: bootc switch [--quiet] [--enforce-container-sigpolicy] [--] IMAGE
       bootc status --format=json [--format-version=1]";

enum Command {
    Switch(switch::Options),
    Status,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(command) = parse(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) else {
        eprintln!("error: unexpected arguments: {arguments:?}\n\n{USAGE}");
        return ExitCode::from(2);
    };
    match run(&command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: &[&str]) -> Option<Command> {
    match arguments {
        ["switch", rest @ ..] => switch::Options::parse(rest).map(Command::Switch),
        ["status", "--format=json"] | ["status", "--format=json", "--format-version=1"] => Some(Command::Status),
        _ => None,
    }
}

fn run(command: &Command) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "This command must be executed as the root user");
    // Before any thread starts: threads would stay in the old namespace.
    if namespace("self")? == namespace("1")? {
        unshare(CloneFlags::CLONE_NEWNS).context("Creating a mount namespace")?;
    }
    let sysroot = lock()?;
    match command {
        Command::Status => status::print(&sysroot),
        Command::Switch(options) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(switch::run(&sysroot, options))
        }
    }
}

fn namespace(process: &str) -> Result<u64> {
    let path = format!("/proc/{process}/ns/mnt");
    Ok(std::fs::metadata(&path).with_context(|| format!("Reading {path}"))?.ino())
}

/// Waits until the lock is released, like the original.
fn lock() -> Result<SysrootLock> {
    let sysroot = guest::open()?;
    if !sysroot.try_lock()? {
        eprintln!("Waiting for sysroot lock...");
        sysroot.lock()?;
    }
    // The previous holder of the lock may have changed the sysroot.
    sysroot.load_if_changed(Cancellable::NONE)?;
    Ok(SysrootLock::from_assumed_locked(&sysroot))
}
