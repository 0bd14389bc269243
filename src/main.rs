//! The program: parses the command line, confines the process before any thread exists, and runs the command.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use rebase_agent::cli::{Cli, Paths, exit};
use rebase_agent::cluster::{Api, Timing};
use rebase_agent::commands::dispatch;
use rebase_agent::confine::confine;
use rebase_agent::host::Host;
use rebase_agent::host::boot::Root;
use rebase_agent::journal;
use rebase_agent::observe::Neighbours;
use rebase_agent::trust::{Engine, Settings};

/// The auth files in the order of ostree-ext, so that the agent uses the same credentials as the pull.
const AUTH_FILES: [&str; 3] = ["run/ostree/auth.json", "etc/ostree/auth.json", "usr/lib/ostree/auth.json"];

fn main() -> ExitCode {
    let cli = Cli::parse();
    let confinement = match confine(cli.paths.scratch.as_deref(), cli.require_landlock) {
        Ok(confinement) => confinement,
        Err(error) => return fail(&error),
    };
    let journal = journal::init(cli.log);
    let neighbours = neighbours(&cli.paths);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let code = runtime.block_on(dispatch(cli.command, neighbours, confinement));
    // A thread may still wait for an engine. The kernel terminates the engine with this process.
    runtime.shutdown_background();
    journal.flush();
    code
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("rebase-agent: {error}");
    ExitCode::from(exit::UNREADABLE)
}

fn neighbours(paths: &Paths) -> Neighbours {
    let root = Root::new(paths.root.clone());
    Neighbours {
        api: Arc::new(Api::new(paths.kubeconfig.clone(), paths.node_name.clone(), Timing::default())),
        engine: Arc::new(Engine::new(Settings {
            policy: paths.policy.clone(),
            registries_d: paths.registries_d.clone(),
            skopeo: paths.skopeo.clone(),
            cert_dir: paths.cert_dir.clone(),
            auth_files: AUTH_FILES.iter().map(|file| root.join(file)).collect(),
            etc: root.join("etc"),
            scratch: paths.scratch.clone(),
            deadline: Duration::from_secs(paths.verify_timeout),
        })),
        host: Host::new(root, None).with_backend(paths.backend.backend()),
    }
}
