//! The shipped unit on a real systemd as PID 1 of a container: on the host, the surroundings of the node and the story;
//! in the container, the rest of the node, with bootc and ostree under their own names.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use support::booted::{node, story};

#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot the disk and run the story.
    Story {
        /// systemd's major version on that disk.
        #[arg(long)]
        version: u32,
        /// The disk, with the agent installed.
        #[arg(long)]
        root: PathBuf,
        /// The agent that `tests/support/faulty` builds.
        #[arg(long)]
        faulty: PathBuf,
        /// The directory of all other files.
        #[arg(long)]
        directory: PathBuf,
    },
    /// Run a part of the node.
    #[command(subcommand)]
    Node(Part),
}

#[derive(Debug, Subcommand)]
enum Part {
    /// The boot loader and the initramfs.
    Boot,
    /// rpm-ostreed.
    RpmOstreed,
    /// ostree-finalize-staged.service, when it is stopped.
    Finalize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().and_then(|path| Path::new(path).file_name()).unwrap_or_default().to_owned();
    let ended = match name.to_str() {
        Some("bootc") => node::bootc::run(&arguments).await,
        Some("ostree") => node::bootc::pull(&arguments).await,
        _ => match Options::parse_from(arguments).command {
            Command::Story { version, root, faulty, directory } => {
                story::tell(&story::Plan { version, root, faulty, directory }).await
            }
            Command::Node(Part::Boot) => node::boot(),
            Command::Node(Part::RpmOstreed) => node::rpm_ostreed().await,
            Command::Node(Part::Finalize) => node::finalize(),
        },
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("booted: {error:#}");
            ExitCode::FAILURE
        }
    }
}
