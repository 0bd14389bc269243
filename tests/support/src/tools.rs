//! The programs that the tests run: their places, and running one with a deadline.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::process::Command;

/// The oldest skopeo that the tests may use: its image proxy evaluates the policy that it gets.
const LEAST_SKOPEO: (u32, u32) = (1, 14);

/// The directory cargo builds into, with the tools of `tests/support/install` in `tools/`.
pub fn target_dir() -> PathBuf {
    let running = std::env::current_exe().ok();
    let above = running.iter().flat_map(|exe| exe.ancestors().skip(1)).map(Path::to_path_buf);
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().join("target");
    let fallback = named.clone().unwrap_or_else(|| default.clone());
    above.chain(named).chain([default]).find(|dir| dir.join("tools/bin").is_dir()).unwrap_or(fallback)
}

/// A skopeo that enforces the containers policy: `REBASE_TEST_SKOPEO`, the one `tests/support/install` fetched, or
/// the system's if it is new enough.
pub fn skopeo() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("REBASE_TEST_SKOPEO") {
        return Ok(path.into());
    }
    let installed = target_dir().join("tools/bin/skopeo");
    if installed.exists() {
        return Ok(installed);
    }
    let Some(system) = on_path("skopeo") else {
        bail!("no skopeo at {} and none on PATH: run tests/support/install", installed.display());
    };
    match skopeo_version(&system) {
        Some(version) if version >= LEAST_SKOPEO => Ok(system),
        version => bail!(
            "no skopeo at {}, and {} ({}) does not enforce a policy, which takes {}.{}: run tests/support/install",
            installed.display(),
            system.display(),
            version.map_or("of no known version".into(), |(major, minor)| format!("{major}.{minor}")),
            LEAST_SKOPEO.0,
            LEAST_SKOPEO.1,
        ),
    }
}

/// A skopeo whose image proxy evaluates no policy at all (1.9), which the agent must refuse. `None` where
/// `tests/support/install` cannot provide one: without a Debian archive.
pub fn unenforcing_skopeo() -> Option<PathBuf> {
    let path = target_dir().join("tools/bin/skopeo-unenforcing");
    path.exists().then_some(path)
}

/// The registry server: `REBASE_TEST_REGISTRY`, or Debian's or Fedora's name for it on PATH.
pub fn docker_registry() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("REBASE_TEST_REGISTRY") {
        return Ok(path.into());
    }
    on_path("docker-registry")
        .or_else(|| on_path("registry"))
        .context("no docker-registry on PATH: run tests/support/install")
}

/// The program of that name on PATH.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// A command for a program that must end with the tests in every case: the kernel kills it when the thread that spawned
/// it ends. So spawn it from a thread that lives long enough, never through `spawn_blocking`.
pub fn child(program: &Path) -> std::process::Command {
    let Some(setpriv) = on_path("setpriv") else { return std::process::Command::new(program) };
    let mut command = std::process::Command::new(setpriv);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Runs a command to its end, without standard input. After the deadline the command is killed and the call fails; the
/// caller checks the exit status.
pub async fn run(mut command: Command, deadline: Duration) -> Result<Output> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let shown = format!("{:?}", command.as_std());
    match tokio::time::timeout(deadline, command.output()).await {
        Ok(output) => output.with_context(|| format!("running {shown}")),
        Err(_) => bail!("not finished after {deadline:?}: {shown}"),
    }
}

/// The same as [`run`], but every failure is an error with the command's output; returns its standard output.
pub async fn run_ok(command: Command, deadline: Duration) -> Result<String> {
    let shown = format!("{:?}", command.as_std());
    let output = run(command, deadline).await?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{} from {shown}: {}{stdout}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(stdout)
}

/// A port of 127.0.0.1 without a listener, below those that the kernel gives to outgoing connections, so that a server
/// may stop and return to it. The same process gets each port once.
pub fn free_port() -> u16 {
    static NEXT: Mutex<Option<u16>> = Mutex::new(None);
    const PORTS: std::ops::Range<u16> = 12000..32000;
    let mut next = NEXT.lock().unwrap();
    loop {
        // Test binaries run in parallel: each starts at another port.
        let start = || PORTS.start + (std::process::id().wrapping_mul(61) % u32::from(PORTS.end - PORTS.start)) as u16;
        let port = next.unwrap_or_else(start);
        *next = Some(if port + 1 < PORTS.end { port + 1 } else { PORTS.start });
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn skopeo_version(program: &Path) -> Option<(u32, u32)> {
    let output = std::process::Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    parse_version(std::str::from_utf8(&output.stdout).ok()?)
}

/// `skopeo version 1.18.0 commit: …`
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix("skopeo version ")?.split(['.', '-', ' ', '\n']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(parse_version("skopeo version 1.9.3\n"), Some((1, 9)));
        assert_eq!(parse_version("skopeo version 1.18.0 commit: 1"), Some((1, 18)));
        assert_eq!(parse_version("skopeo version 1.22.0-dev"), Some((1, 22)));
        assert_eq!(parse_version("podman version 5.4.0"), None);
        assert!(parse_version("skopeo version 1.9.3") < Some(LEAST_SKOPEO));
    }

    #[test]
    fn free_ports_differ() {
        assert_ne!(free_port(), free_port());
    }

    #[tokio::test]
    async fn command_has_a_deadline() {
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let error = run(sleep, Duration::from_millis(50)).await.unwrap_err().to_string();
        assert!(error.contains("not finished after 50ms") && error.contains("sleep"), "{error}");
    }

    #[tokio::test]
    async fn failed_command_shows_its_output() {
        let mut sh = Command::new("sh");
        sh.args(["-c", "echo reason >&2; exit 3"]);
        let error = run_ok(sh, Duration::from_secs(10)).await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("reason"), "{error}");
    }
}
