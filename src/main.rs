//! The one file that knows production paths: parse, confine before any thread exists, run.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use rebase_agent::agent;
use rebase_agent::cli::{self, Cli, Command, Explanation, Look, Paths, Service, Status, Trust, Tuning};
use rebase_agent::cluster::{Api, Timing};
use rebase_agent::confine::{Confinement, confine};
use rebase_agent::decide::decide;
use rebase_agent::decide::{Memory, Outcome};
use rebase_agent::host::Host;
use rebase_agent::host::boot::Root;
use rebase_agent::host::leftovers::leftovers;
use rebase_agent::journal::{self, id};
use rebase_agent::model::{Fault, Now, Observed, PinnedImage, Severity, Work};
use rebase_agent::observe::{Neighbours, everything};
use rebase_agent::registry::{self, Engine, reference};
use rebase_agent::report::report;

const KUBECONFIG: &str = "/var/lib/kubelet/kubeconfig";
const POLICY: &str = "/etc/containers/policy.json";
const REGISTRIES_D: &str = "/etc/containers/registries.d";
const SKOPEO: &str = "/usr/bin/skopeo";
/// As ostree-ext looks for them, so that the agent asks with the credentials that the pull will use.
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
    let code = runtime.block_on(async {
        match cli.command {
            Command::Run(tuning) => run(neighbours, confinement, &tuning).await,
            Command::Status(look) => status(&neighbours, &look).await,
            Command::Explain(look) => explain(&neighbours, &look).await,
            Command::Verify { pullspec, json } => verify(&neighbours, &pullspec, json).await,
        }
    });
    // A thread may still wait for an engine that its own deadline ends; the kernel ends it with us.
    runtime.shutdown_background();
    journal.flush();
    code
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("rebase-agent: {error}");
    ExitCode::from(cli::UNREADABLE)
}

fn neighbours(paths: &Paths) -> Neighbours {
    let or = |path: &Option<PathBuf>, default: &str| path.clone().unwrap_or_else(|| default.into());
    let root = Root::new(or(&paths.root, "/"));
    Neighbours {
        api: Arc::new(Api::new(or(&paths.kubeconfig, KUBECONFIG), paths.node_name.clone(), Timing::default())),
        engine: Arc::new(Engine::new(registry::Settings {
            policy: or(&paths.policy, POLICY),
            registries_d: or(&paths.registries_d, REGISTRIES_D),
            skopeo: or(&paths.skopeo, SKOPEO),
            cert_dir: paths.cert_dir.clone(),
            auth_files: AUTH_FILES.iter().map(|file| root.join(file)).collect(),
            etc: root.join("etc"),
            scratch: paths.scratch.clone(),
            deadline: Duration::from_secs(paths.verify_timeout),
        })),
        host: Host::new(root, None).with_backend(paths.backend.backend()),
    }
}

async fn run(neighbours: Neighbours, confinement: Confinement, tuning: &Tuning) -> ExitCode {
    if let Err(error) = neighbours.host.check_kind() {
        tracing::error!("{error}");
        return ExitCode::from(cli::NOT_IMAGE_MODE);
    }
    let (version, landlock) = (env!("CARGO_PKG_VERSION"), confinement.sentence());
    tracing::info!(message_id = id::STARTED, "rebase-agent {version}; {landlock}");
    #[cfg(feature = "faults")]
    rebase_agent::faults::announce(neighbours.host.root());
    let settings = agent::Settings { limits: tuning.limits(), poll: Duration::from_secs(tuning.poll), confinement };
    match agent::run(neighbours, settings).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// What is observed now, and what a fresh process would remember: nothing, or the verification it was asked for.
struct Seen {
    observed: Observed,
    memory: Memory,
    trust: Option<Trust>,
}

async fn see(neighbours: &Neighbours, look: &Look) -> Seen {
    let observed = everything(neighbours).await;
    let desired = observed.cluster.known().and_then(|node| node.desired().cloned());
    let mut seen = Seen { observed, memory: Memory::default(), trust: None };
    match &desired {
        Some(image) if look.verify => match registry::verify(&neighbours.engine, image).await {
            Ok(verified) => {
                let facts = verified.facts().clone();
                seen.trust = Some(Trust::Verified(Box::new(facts.clone())));
                seen.memory.verified.insert(image.clone(), facts);
            }
            Err(error) => {
                seen.trust = Some(Trust::Refused(Fault::from(&error).message));
                let outcome = Outcome::Failed(Fault::from(&error));
                seen.memory.finished(&Work::Verify { image: image.clone() }, outcome, now(neighbours));
            }
        },
        _ => seen.trust = cli::required(&neighbours.engine.settings().policy, desired.as_ref()),
    }
    seen
}

/// A process that only looks has no past: its monotonic clock stands at zero.
fn now(neighbours: &Neighbours) -> Now {
    let unix = neighbours.api.time().unwrap_or_else(|| {
        let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(unix.as_millis()).unwrap_or(u64::MAX)
    });
    Now { mono: 0, unix }
}

async fn status(neighbours: &Neighbours, look: &Look) -> ExitCode {
    let (seen, service) = tokio::join!(see(neighbours, look), neighbours.host.service_status());
    let decision = decide(&seen.observed, &seen.memory, &look.tuning.limits(), now(neighbours));
    let code = cli::exit_code(&seen.observed, &decision);
    let service = match service {
        Ok((status, active)) => Service::new(active, &status),
        Err(error) => Service::new("unknown".to_owned(), &error.to_string()),
    };
    let Observed { cluster, host, machine, .. } = seen.observed;
    let backend = match neighbours.host.backend().await {
        Ok(chosen) => format!("{}: {}", chosen.backend, chosen.why),
        Err(error) => format!("none: {error}"),
    };
    let leftovers = leftovers(neighbours.host.root());
    let status = Status { backend, cluster, host, machine, trust: seen.trust, leftovers, service, decision };
    print(look.json, &status, || status.text());
    ExitCode::from(code)
}

async fn explain(neighbours: &Neighbours, look: &Look) -> ExitCode {
    let Seen { observed, memory, .. } = see(neighbours, look).await;
    let decision = decide(&observed, &memory, &look.tuning.limits(), now(neighbours));
    let code = cli::exit_code(&observed, &decision);
    let patch = observed.cluster.known().map(|node| report(node, &decision)).unwrap_or_default();
    let explanation = Explanation { observed, decision, patch };
    print(look.json, &explanation, || explanation.text());
    ExitCode::from(code)
}

async fn verify(neighbours: &Neighbours, pullspec: &str, json: bool) -> ExitCode {
    let image: PinnedImage = match reference::parse(pullspec) {
        Ok(image) => image,
        Err(error) => return refused(json, "ImageMalformed", &error.to_string(), cli::REFUSED),
    };
    match registry::verify(&neighbours.engine, &image).await {
        Ok(verified) => {
            let facts = verified.facts();
            print(json, facts, || {
                format!(
                    "verified {}\n  by rule      {}\n  manifest     {}\n  architecture {}\n  bootable     {}\n  \
                     built from   {}\n  created      {}\n  size         {} MiB\n  pulled as    {}\n",
                    facts.image,
                    facts.vouched_by,
                    facts.instance,
                    facts.architecture,
                    if facts.bootable { "yes" } else { "no" },
                    facts.rendered_config.as_deref().unwrap_or("(no machineconfig label)"),
                    facts.created.map_or_else(|| "(not told)".to_owned(), rebase_agent::time::text),
                    facts.size >> 20,
                    verified.to_pull()
                )
            });
            ExitCode::SUCCESS
        }
        Err(error) => {
            let unknown = error.reason().severity() == Severity::Transient;
            let code = if unknown { cli::NOT_YET } else { cli::REFUSED };
            refused(json, error.reason().as_str(), &Fault::from(&error).message, code)
        }
    }
}

fn refused(json: bool, reason: &str, message: &str, code: u8) -> ExitCode {
    let value = serde_json::json!({ "reason": reason, "message": message });
    print(json, &value, || format!("{reason}: {message}\n"));
    ExitCode::from(code)
}

fn print(json: bool, value: &impl serde::Serialize, text: impl FnOnce() -> String) {
    use std::io::Write as _;
    let out = if json {
        serde_json::to_string_pretty(value).map(|json| json + "\n").unwrap_or_else(|error| format!("{error}\n"))
    } else {
        text()
    };
    // A reader that went away is not an error worth a word.
    let _ = std::io::stdout().write_all(out.as_bytes());
}
