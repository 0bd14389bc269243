//! Checks of the files that operators get with the program: the units as reviewed and as systemd reads them, and a
//! README, manual page and catalog that match the code.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]
#![allow(clippy::disallowed_methods, reason = "tests may make calls that the agent must not")]

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use clap::CommandFactory as _;
use clap_mangen::Man;
use rebase_agent::cli::{Cli, EXIT_CODES};
use rebase_agent::decide::Rule;
use rebase_agent::host::Deadlines;
use rebase_agent::journal::id;
use rebase_agent::model::{Deployment, HostFacts, NodeFacts, Reason};
use support::skip::skip;

const AGENT: &str = env!("CARGO_BIN_EXE_rebase-agent-under-test");

/// The unit, directive by directive. A change of the unit changes this list, too.
const UNIT: &[(&str, &str, &str)] = &[
    ("Unit", "Description", "Follow the pool's desired OS image"),
    ("Unit", "ConditionPathExists", "/run/ostree-booted"),
    ("Unit", "Wants", "network-online.target"),
    ("Unit", "After", "network-online.target kubelet.service multi-user.target boot-complete.target"),
    ("Unit", "After", "ostree-finalize-staged.service"),
    ("Unit", "StartLimitIntervalSec", "0"),
    ("Service", "Type", "notify"),
    ("Service", "ExecStart", "/usr/bin/rebase-agent run"),
    ("Service", "WatchdogSec", "360"),
    ("Service", "Restart", "always"),
    ("Service", "RestartSec", "30"),
    ("Service", "RestartPreventExitStatus", "5"),
    ("Service", "CapabilityBoundingSet", ""),
    ("Service", "AmbientCapabilities", ""),
    ("Service", "NoNewPrivileges", "yes"),
    ("Service", "LimitCORE", "0"),
    ("Service", "MemoryMax", "536870912"),
    ("Service", "TasksMax", "1024"),
    ("Service", "OOMPolicy", "continue"),
    ("Service", "UMask", "0077"),
    ("Service", "KeyringMode", "private"),
    ("Service", "ProtectSystem", "strict"),
    ("Service", "ReadOnlyPaths", "/run /dev /tmp /var/tmp -/sys/fs/fuse/connections"),
    ("Service", "ProtectHome", "yes"),
    ("Service", "PrivateMounts", "yes"),
    ("Service", "PrivateTmp", "yes"),
    ("Service", "PrivateDevices", "yes"),
    ("Service", "PrivateUsers", "yes"),
    ("Service", "ProtectClock", "yes"),
    ("Service", "ProtectControlGroups", "yes"),
    ("Service", "ProtectHostname", "yes"),
    ("Service", "ProtectKernelLogs", "yes"),
    ("Service", "ProtectKernelModules", "yes"),
    ("Service", "ProtectKernelTunables", "yes"),
    ("Service", "ProtectProc", "invisible"),
    ("Service", "ProcSubset", "all"),
    ("Service", "LockPersonality", "yes"),
    ("Service", "MemoryDenyWriteExecute", "yes"),
    ("Service", "RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6 AF_NETLINK"),
    ("Service", "RestrictNamespaces", "yes"),
    ("Service", "RestrictRealtime", "yes"),
    ("Service", "RestrictSUIDSGID", "yes"),
    ("Service", "RemoveIPC", "yes"),
    ("Service", "SystemCallArchitectures", "native"),
    ("Service", "SystemCallFilter", "@system-service landlock_create_ruleset landlock_add_rule landlock_restrict_self"),
    ("Service", "SystemCallFilter", "~@privileged @resources"),
    ("Service", "SystemCallErrorNumber", "EPERM"),
    ("Install", "WantedBy", "multi-user.target"),
];

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(file(path)).unwrap()
}

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// systemd.syntax(7), as far as these files use it: sections, comments, one directive per line.
fn directives(text: &str) -> Vec<(String, String, String)> {
    let mut section = String::new();
    let mut found = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';'])) {
        assert!(!line.ends_with('\\'), "a continued line: {line}");
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            name.clone_into(&mut section);
        } else {
            let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("no directive: {line}"));
            found.push((section.clone(), key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    found
}

#[test]
fn unit_has_exactly_the_reviewed_directives() {
    let unit = directives(&read("systemd/rebase-agent.service"));
    let unit: Vec<_> = unit.iter().map(|(s, k, v)| (s.as_str(), k.as_str(), v.as_str())).collect();
    for directive in UNIT {
        assert!(unit.contains(directive), "missing or changed: {directive:?}");
    }
    for directive in &unit {
        assert!(UNIT.contains(directive), "new or changed: {directive:?}");
    }
    // Lists may be given in parts; repeating another directive would be a mistake.
    let single = unit.iter().filter(|(_, key, _)| !["After", "SystemCallFilter"].contains(key));
    let keys: BTreeSet<_> = single.clone().map(|(section, key, _)| (section, key)).collect();
    assert_eq!(keys.len(), single.count(), "a directive is given twice");
}

#[test]
fn systemd_accepts_the_unit() {
    if Command::new("systemd-analyze").arg("--version").stdout(Stdio::null()).status().is_err() {
        return skip("systemd-analyze is not installed, so systemd does not check the unit");
    }
    // A copy with the path of the program under test.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rebase-agent.service");
    let unit = read("systemd/rebase-agent.service");
    assert_eq!(unit.matches("/usr/bin/rebase-agent").count(), 1);
    std::fs::write(&path, unit.replace("/usr/bin/rebase-agent", AGENT)).unwrap();
    let security = ["security", "--offline=yes", "--no-pager", "--threshold=15"];
    let exposed = run(Command::new("systemd-analyze").args(security).arg(&path));
    assert!(exposed.status.success(), "more exposed than 1.5: {}", String::from_utf8_lossy(&exposed.stdout));
    let verify = run(Command::new("systemd-analyze").args(["verify", "--man=no", "--recursive-errors=no"]).arg(&path));
    let said = String::from_utf8_lossy(&verify.stderr);
    // Other units of this machine may be faulty.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("rebase-agent")).collect();
    assert!(verify.status.success() && ours.is_empty(), "{}: {said}", verify.status);
}

/// Copies the proxy variables out of MCO's file.
const PROXY_ONLY: &str = concat!(
    r#"-/usr/bin/sed -nE "/^[[:space:]]*(https?|no)_proxy[[:space:]]*=/Iw /run/rebase-agent-bootc/proxy.env""#,
    " /etc/mco/proxy.env"
);

/// The units that stage through bootc, as reviewed; `SIGNED` replaces their description and command for signed origins.
const SWITCH: &[(&str, &str, &str)] = &[
    ("Unit", "Description", "Stage %I with bootc"),
    ("Unit", "Documentation", "man:rebase-agent(8) man:bootc-switch(8)"),
    ("Unit", "After", "network-online.target ostree-finalize-staged.service"),
    ("Unit", "StartLimitIntervalSec", "0"),
    ("Service", "Type", "oneshot"),
    ("Service", "ExecStart", ":/usr/bin/bootc switch --quiet -- %I"),
    ("Service", "PrivateMounts", "yes"),
    ("Service", "RuntimeDirectory", "rebase-agent-bootc"),
    ("Service", "RuntimeDirectoryMode", "0700"),
    ("Service", "ExecStartPre", PROXY_ONLY),
    ("Service", "EnvironmentFile", "-/run/rebase-agent-bootc/proxy.env"),
    ("Service", "TimeoutStartSec", "2h"),
    ("Service", "TimeoutStopSec", "30"),
    ("Service", "SuccessExitStatus", "SIGTERM"),
];

const SIGNED: [(&str, &str, &str); 2] = [
    ("Unit", "Description", "Stage %I with bootc, signed"),
    ("Service", "ExecStart", ":/usr/bin/bootc switch --quiet --enforce-container-sigpolicy -- %I"),
];

/// The units that pull an image for bootc, as reviewed.
const PULL: &[(&str, &str, &str)] = &[
    ("Unit", "Description", "Pull %I"),
    ("Unit", "Documentation", "man:rebase-agent(8)"),
    ("Unit", "After", "network-online.target"),
    ("Unit", "StartLimitIntervalSec", "0"),
    ("Service", "Type", "oneshot"),
    ("Service", "ExecStart", PULL_PLAIN),
    ("Service", "PrivateMounts", "yes"),
    ("Service", "RuntimeDirectory", "rebase-agent-bootc"),
    ("Service", "RuntimeDirectoryMode", "0700"),
    ("Service", "ExecStartPre", PROXY_ONLY),
    ("Service", "EnvironmentFile", "-/run/rebase-agent-bootc/proxy.env"),
    ("Service", "TimeoutStartSec", "2h"),
    ("Service", "TimeoutStopSec", "30"),
    ("Service", "SuccessExitStatus", "SIGTERM"),
    ("Service", "Nice", "10"),
    ("Service", "IOSchedulingClass", "idle"),
];

/// The reference is the shell's argument and never a part of its script.
const PULL_PLAIN: &str = concat!(
    ":/usr/bin/sh -c 'mount -o remount,bind,rw /sysroot; exec ostree container image pull --quiet /sysroot/ostree/repo ",
    r#""ostree-unverified-registry:$1"' sh %I"#
);
const PULL_SIGNED: &str = concat!(
    ":/usr/bin/sh -c 'mount -o remount,bind,rw /sysroot; exec ostree container image pull --quiet /sysroot/ostree/repo ",
    r#""ostree-image-signed:docker://$1"' sh %I"#
);
const SIGNED_PULL: [(&str, &str, &str); 2] =
    [("Unit", "Description", "Pull %I, signed"), ("Service", "ExecStart", PULL_SIGNED)];

const STATUS_SOCKET: &[(&str, &str, &str)] = &[
    ("Unit", "Description", "Report bootc status to the rebase agent"),
    ("Unit", "Documentation", "man:rebase-agent(8)"),
    ("Unit", "ConditionPathExists", "/usr/bin/bootc"),
    ("Unit", "ConditionPathExists", "/run/ostree-booted"),
    ("Socket", "ListenStream", "/run/rebase-agent/bootc-status.sock"),
    ("Socket", "SocketMode", "0600"),
    ("Socket", "DirectoryMode", "0755"),
    ("Socket", "Accept", "yes"),
    ("Socket", "MaxConnections", "8"),
    ("Socket", "RemoveOnStop", "yes"),
    ("Install", "WantedBy", "sockets.target"),
];

const STATUS: &[(&str, &str, &str)] = &[
    ("Unit", "Description", "Report bootc status to the rebase agent"),
    ("Unit", "Documentation", "man:rebase-agent(8) man:bootc-status(8)"),
    ("Unit", "CollectMode", "inactive-or-failed"),
    ("Service", "Type", "exec"),
    ("Service", "ExecStart", "/usr/bin/bootc status --format=json --format-version=1"),
    ("Service", "StandardInput", "null"),
    ("Service", "StandardOutput", "socket"),
    ("Service", "StandardError", "journal"),
    ("Service", "PrivateMounts", "yes"),
    ("Service", "RuntimeMaxSec", "60"),
    ("Service", "TimeoutStopSec", "10"),
];

#[test]
fn bootc_units_have_exactly_the_reviewed_directives() {
    type Directives<'a> = &'a [(&'static str, &'static str, &'static str)];
    let signed = |plain: Directives<'_>, changed: Directives<'_>| {
        let mut unit = plain.to_vec();
        for directive in &mut unit {
            *directive = changed.iter().copied().find(|other| other.1 == directive.1).unwrap_or(*directive);
        }
        unit
    };
    for (name, reviewed) in [
        ("rebase-agent-bootc@.service", SWITCH),
        ("rebase-agent-bootc-signed@.service", &signed(SWITCH, &SIGNED)),
        ("rebase-agent-pull@.service", PULL),
        ("rebase-agent-pull-signed@.service", &signed(PULL, &SIGNED_PULL)),
        ("rebase-agent-bootc-status.socket", STATUS_SOCKET),
        ("rebase-agent-bootc-status@.service", STATUS),
    ] {
        let unit = directives(&read(&format!("systemd/{name}")));
        let unit: Vec<_> = unit.iter().map(|(s, k, v)| (s.as_str(), k.as_str(), v.as_str())).collect();
        assert_eq!(unit, reviewed, "{name}");
        // Only a unit's main program enters the domain that may change the system.
        let reviewed = [PROXY_ONLY, PULL_PLAIN, PULL_SIGNED];
        let programs = unit.iter().filter(|(_, key, command)| key.starts_with("Exec") && !reviewed.contains(command));
        for (_, key, command) in programs {
            assert!(*key == "ExecStart" && command.trim_start_matches(':').starts_with("/usr/bin/bootc "), "{command}");
            assert!(!command.contains('$') && !command.replace("%I", "").contains('%'), "{command}");
        }
    }
    // The shorter time limit gives the better message: the unit reports that bootc took too long, the agent only that
    // it waited.
    let deadlines = Deadlines::default();
    assert!(Duration::from_secs(2 * 60 * 60) < deadlines.whole);
    assert!(Duration::from_secs(60) >= deadlines.status, "bootc would be cut off while the agent waits");
}

const METRICS_SOCKET: &[(&str, &str, &str)] = &[
    ("Unit", "Description", "Print the rebase agent's metrics"),
    ("Unit", "Documentation", "man:rebase-agent(8)"),
    ("Unit", "ConditionPathExists", "/run/ostree-booted"),
    ("Socket", "ListenStream", "/run/rebase-agent/public/metrics.promsock"),
    ("Socket", "SocketMode", "0660"),
    ("Socket", "DirectoryMode", "0755"),
    ("Socket", "Accept", "yes"),
    ("Socket", "MaxConnections", "4"),
    ("Socket", "RemoveOnStop", "yes"),
    ("Install", "WantedBy", "sockets.target"),
];

/// What the metrics' unit has in place of the agent's directives up to the sandbox.
const METRICS: &[(&str, &str, &str)] = &[
    ("Unit", "Description", "Print the rebase agent's metrics"),
    ("Unit", "Documentation", "man:rebase-agent(8)"),
    ("Unit", "CollectMode", "inactive-or-failed"),
    ("Service", "Type", "exec"),
    ("Service", "ExecStart", "/usr/bin/rebase-agent metrics"),
    ("Service", "StandardInput", "null"),
    ("Service", "StandardOutput", "socket"),
    ("Service", "StandardError", "journal"),
    ("Service", "RuntimeMaxSec", "30"),
    ("Service", "TimeoutStopSec", "5"),
];

/// The metrics' unit has the agent's sandbox, with lower bounds and without the engine's.
#[test]
fn metrics_units_have_exactly_the_reviewed_directives() {
    let unit = |name: &str| directives(&read(&format!("systemd/{name}")));
    let strings = |list: &[(&str, &str, &str)]| -> Vec<(String, String, String)> {
        list.iter().map(|(s, k, v)| ((*s).to_owned(), (*k).to_owned(), (*v).to_owned())).collect()
    };
    assert_eq!(unit("rebase-agent-metrics.socket"), strings(METRICS_SOCKET));
    let sandbox = UNIT.iter().skip_while(|(_, key, _)| *key != "CapabilityBoundingSet");
    let sandbox = sandbox.filter(|(section, key, _)| *section == "Service" && *key != "OOMPolicy");
    let bounded = sandbox.map(|(section, key, value)| match *key {
        "MemoryMax" => (*section, *key, "134217728"),
        "TasksMax" => (*section, *key, "64"),
        _ => (*section, *key, *value),
    });
    let expected: Vec<_> = METRICS.iter().copied().chain(bounded).collect();
    assert_eq!(unit("rebase-agent-metrics@.service"), strings(&expected));
}

/// Runs the real sed on contents that MCO's file could have.
#[test]
fn only_proxy_variables_reach_bootc() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from.env"), directory.path().join("to.env"));
    let script =
        PROXY_ONLY.split('"').nth(1).unwrap().replace("/run/rebase-agent-bootc/proxy.env", to.to_str().unwrap());
    let filter = || run(Command::new("/usr/bin/sed").arg("-nE").arg(&script).arg(&from)).status.success();
    let proxies = ["HTTP_PROXY=http://p:1", "HTTPS_PROXY=\"http://q\"", " NO_PROXY =.local,10.0.0.0/8", "no_proxy=a"];
    let others = ["LD_PRELOAD=/x.so", "PATH=/x", "# HTTP_PROXY=x", "XHTTP_PROXY=x", "ALL_PROXY=x", "A=B\\", "=", ""];
    std::fs::write(&from, [proxies, ["LD_AUDIT=/x", "HTTP_PROXYX=x", "x no_proxy=x", "HOME=/x"]].concat().join("\n"))
        .unwrap();
    assert!(filter());
    assert_eq!(std::fs::read_to_string(&to).unwrap().lines().collect::<Vec<_>>(), proxies);
    std::fs::write(&from, others.join("\n")).unwrap();
    assert!(filter());
    assert_eq!(std::fs::read_to_string(&to).unwrap(), "");
    // Without MCO's file, no variables of an earlier start are left.
    std::fs::write(&to, "HTTP_PROXY=old").unwrap();
    std::fs::remove_file(&from).unwrap();
    assert!(!filter());
    assert_eq!(std::fs::read_to_string(&to).unwrap(), "");
}

#[test]
fn systemd_accepts_the_bootc_units() {
    if Command::new("systemd-analyze").arg("--version").stdout(Stdio::null()).status().is_err() {
        return skip("systemd-analyze is not installed, so systemd does not check bootc's units");
    }
    let directory = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| {
        let path = directory.path().join(to);
        std::fs::write(&path, read(&format!("systemd/{from}")).replace("/usr/bin/bootc ", "/bin/true ")).unwrap();
        path
    };
    // systemd-analyze takes the text after a colon as an alias of the unit.
    let instance = format!(r"quay.io-a\x2db-c_d\x40sha256\x3a{}", "0".repeat(64));
    copy("rebase-agent-bootc-status@.service", "rebase-agent-bootc-status@.service");
    let units = [
        copy("rebase-agent-bootc@.service", &format!("rebase-agent-bootc@{instance}.service")),
        copy("rebase-agent-bootc-signed@.service", &format!("rebase-agent-bootc-signed@{instance}.service")),
        copy("rebase-agent-pull@.service", &format!("rebase-agent-pull@{instance}.service")),
        copy("rebase-agent-pull-signed@.service", &format!("rebase-agent-pull-signed@{instance}.service")),
        copy("rebase-agent-bootc-status.socket", "rebase-agent-bootc-status.socket"),
    ];
    let verify = run(Command::new("systemd-analyze").args(["verify", "--man=no", "--recursive-errors=no"]).args(units));
    let said = String::from_utf8_lossy(&verify.stderr);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("rebase-agent")).collect();
    assert!(verify.status.success() && ours.is_empty(), "{}: {said}", verify.status);
}

#[test]
fn systemd_accepts_the_metrics_units() {
    if Command::new("systemd-analyze").arg("--version").stdout(Stdio::null()).status().is_err() {
        return skip("systemd-analyze is not installed, so systemd does not check the metrics' units");
    }
    let directory = tempfile::tempdir().unwrap();
    let units = ["rebase-agent-metrics@.service", "rebase-agent-metrics.socket"].map(|name| {
        let path = directory.path().join(name);
        std::fs::write(&path, read(&format!("systemd/{name}")).replace("/usr/bin/rebase-agent", AGENT)).unwrap();
        path
    });
    let verify =
        run(Command::new("systemd-analyze").args(["verify", "--man=no", "--recursive-errors=no"]).args(&units));
    let said = String::from_utf8_lossy(&verify.stderr);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("rebase-agent")).collect();
    assert!(verify.status.success() && ours.is_empty(), "{}: {said}", verify.status);
    let security = ["security", "--offline=yes", "--no-pager", "--threshold=15"];
    let exposed = run(Command::new("systemd-analyze").args(security).arg(&units[0]));
    assert!(exposed.status.success(), "more exposed than 1.5: {}", String::from_utf8_lossy(&exposed.stdout));
}

/// Asks a systemd manager that loads units and starts none how it reads the instances.
#[test]
fn instance_name_is_exactly_one_argument() {
    const SYSTEMD: &str = "/usr/lib/systemd/systemd";
    if !Path::new(SYSTEMD).exists() {
        return skip("systemd is not installed, so it does not read the instances");
    }
    let directory = tempfile::tempdir().unwrap();
    let (units, home) = (directory.path().join("units"), directory.path().join("home"));
    for (path, mode) in [(directory.path(), 0o755), (&units, 0o755), (&home, 0o777)] {
        std::fs::create_dir_all(path).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    for unit in [
        "rebase-agent-bootc@.service",
        "rebase-agent-bootc-signed@.service",
        "rebase-agent-pull@.service",
        "rebase-agent-pull-signed@.service",
    ] {
        std::fs::write(units.join(unit), read(&format!("systemd/{unit}"))).unwrap();
    }
    let cases = [
        (r"rebase-agent-bootc@quay.io:5000-a\x2db-c_d\x40sha256:0123.service", "-- quay.io:5000/a-b/c_d@sha256:0123"),
        (r"rebase-agent-bootc-signed@q.io-o\x40sha256:0.service", "--enforce-container-sigpolicy -- q.io/o@sha256:0"),
        // No image has such a name; systemd passes it on as one argument, and bootc refuses it.
        (r"rebase-agent-bootc@\x2d\x2dapply.service", "--quiet -- --apply"),
        (r"rebase-agent-bootc@a\x20\x24HOME\x20\x25i\x3b.service", r#"-- "a \$HOME %i;""#),
        (r"rebase-agent-pull@q.io-o\x40sha256:0.service", r#"unverified-registry:\$1\"" sh q.io/o@sha256:0"#),
        (r"rebase-agent-pull-signed@a\x20\x24HOME\x3b.service", r#"docker://\$1\"" sh "a \$HOME;""#),
    ];
    let names: Vec<&str> = cases.iter().map(|(name, _)| *name).collect();
    let target = format!("[Unit]\nDescription=All\nWants={}\n", names.join(" "));
    std::fs::write(units.join("default.target"), target).unwrap();
    for target in ["basic.target", "sysinit.target", "shutdown.target"] {
        std::fs::write(units.join(target), "[Unit]\nDescription=Something else\n").unwrap();
    }
    // The manager refuses to run as root for this.
    let mut command = match std::fs::metadata(&units).unwrap().uid() {
        0 => Command::new("setpriv"),
        _ => Command::new("env"),
    };
    if command.get_program() == "setpriv" {
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    }
    command.arg(SYSTEMD);
    command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", &home).env("XDG_RUNTIME_DIR", &home);
    let output = run(command.env("SYSTEMD_UNIT_PATH", &units).args(["--user", "--test"]));
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let started: Vec<&str> = said.lines().filter_map(|line| line.trim().strip_prefix("Command Line: ")).collect();
    let started: Vec<&str> = started.into_iter().filter(|line| !line.starts_with("/usr/bin/sed ")).collect();
    assert_eq!(started.len(), cases.len(), "{said}");
    for (name, arguments) in cases {
        let program = if name.contains("pull") { "/usr/bin/sh -c " } else { "/usr/bin/bootc switch " };
        let found = started.iter().any(|line| line.starts_with(program) && line.ends_with(arguments));
        assert!(found, "{name}: {started:?}");
    }
}

#[test]
fn unit_runs_a_command_of_the_agent() {
    let unit = read("systemd/rebase-agent.service");
    let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/rebase-agent ")).unwrap();
    let help = run(Command::new(AGENT).args(command.split(' ')).arg("--help"));
    assert!(help.status.success(), "{}", String::from_utf8_lossy(&help.stderr));
}

#[test]
fn preset_and_tmpfiles_name_existing_files() {
    let lines = |path: &str| -> Vec<String> {
        read(path).lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect()
    };
    let enabled = [
        "enable rebase-agent.service",
        "enable rebase-agent-bootc-status.socket",
        "enable rebase-agent-metrics.socket",
    ];
    assert_eq!(lines("systemd/80-rebase-agent.preset"), enabled);
    // The first place where ostree's pull looks.
    assert_eq!(lines("systemd/10-ostree-auth.conf"), ["L /run/ostree/auth.json - - - - /var/lib/kubelet/config.json"]);
    let (readme, mut named) = (read("README.md"), 0);
    let mut directories = vec![file("systemd")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
            } else {
                let name = entry.file_name().into_string().unwrap();
                assert!(readme.contains(&name), "README.md does not name systemd's {name}");
                named += 1;
            }
        }
    }
    assert!(named > 10, "only {named} files were looked for");
}

#[test]
fn readme_names_every_option() {
    let mut named = BTreeSet::new();
    for command in ["run", "status", "explain", "metrics", "verify"] {
        let help = run(Command::new(AGENT).args([command, "--help"]));
        let help = String::from_utf8(help.stdout).unwrap();
        let words = help.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-'));
        named.extend(words.filter(|w| w.starts_with("REBASE_AGENT_") || w.starts_with("--")).map(str::to_owned));
    }
    assert!(named.iter().filter(|word| word.starts_with("REBASE_AGENT_")).count() >= 11, "{named:?}");
    let readme = read("README.md");
    for word in named.iter().filter(|word| !["--help", "--version", "--"].contains(&word.as_str())) {
        assert!(readme.contains(&format!("`{word}")), "README.md does not explain {word}");
    }
}

/// The texts in backticks in a line of Markdown.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// The path of a file or directory of this repository, if `word` begins like one.
fn path_of(word: &str) -> Option<&str> {
    let ours = [".ci/", "selinux/", "src/", "systemd/", "tests/", "vm-tests/"];
    // Files below target/ are build output.
    ours.iter().any(|start| word.starts_with(start)).then(|| word.trim_end_matches(['.', ',', ';', ':']))
}

#[test]
fn readme_names_existing_paths() {
    let (readme, mut named) = (read("README.md"), 0);
    for line in readme.lines() {
        let words = match line.strip_prefix("    ") {
            Some(command) => vec![command],
            None => quoted(line).collect(),
        };
        for path in words.iter().filter_map(|word| path_of(word.split(' ').next()?)) {
            assert!(file(path).exists(), "README.md names {path}, which does not exist: {line}");
            named += 1;
        }
    }
    assert!(named >= 50, "only {named} paths were found");
}

/// In "Where to find it", each name after a path in a row must occur in that file.
#[test]
fn readme_places_every_name_in_the_right_file() {
    let readme = read("README.md");
    let section = readme.split("### Where to find it").nth(1).unwrap().split("\n#").next().unwrap();
    let (mut wrong, mut found) = (Vec::new(), 0);
    for line in section.lines() {
        let mut at = None;
        for word in quoted(line) {
            if let Some(path) = path_of(word) {
                at = Some((path, std::fs::read_to_string(file(path)).unwrap_or_default()));
            } else if let Some((path, text)) = &at {
                found += 1;
                if !text.contains(word) {
                    wrong.push(format!("{path} has no `{word}`"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "README.md is wrong:\n{}", wrong.join("\n"));
    assert!(found >= 15, "only {found} words were looked for");
}

/// The fields that `--json` can print, from the parts that have a default.
#[test]
fn readme_names_the_json_fields() {
    let readme = read("README.md");
    let section = readme.split("### JSON").nth(1).unwrap().split("\n## ").next().unwrap();
    let objects = [
        serde_json::to_value(NodeFacts::default()),
        serde_json::to_value(HostFacts::default()),
        serde_json::to_value(Deployment::default()),
    ];
    for object in objects.map(Result::unwrap) {
        for field in object.as_object().unwrap().keys() {
            assert!(section.contains(&format!("`{field}`")), "README.md does not name the field {field} of the JSON");
        }
    }
}

/// Checks a table of README.md that is made from the code: its heading, then the rows. `UPDATE_DOCS=1` writes it.
fn is_table(heading: &str, rows: impl Iterator<Item = String>) {
    let readme = read("README.md");
    let start = readme.find(heading).unwrap_or_else(|| panic!("README.md has no table `{heading}`"));
    let (before, rest) = readme.split_at(start);
    let rest = rest.split_once("\n\n").map_or("", |(_, rest)| rest);
    let lines = heading.matches('|').count().saturating_sub(1);
    let table = format!("{heading}\n{}|\n{}\n\n", "|---".repeat(lines), rows.collect::<Vec<_>>().join("\n"));
    is_current("README.md", &format!("{before}{table}{rest}"));
}

#[test]
fn readme_has_the_rules() {
    is_table(
        "| rule | when | then | state |",
        Rule::ALL.iter().map(|rule| {
            let [when, then, state] = rule.row();
            format!("| {rule} | {when} | {then} | {state} |")
        }),
    );
}

#[test]
fn readme_has_the_reasons() {
    is_table(
        "| reason | severity | what it means | what to do |",
        Reason::ALL.iter().map(|reason| {
            let (severity, meaning, help) = (reason.severity().as_str(), reason.meaning(), reason.help());
            format!("| `{reason}` | {severity} | {meaning} | {help} |")
        }),
    );
}

#[test]
fn readme_names_every_message_id() {
    let readme = read("README.md");
    for (name, id) in id::ALL {
        assert_eq!(
            readme.matches(&format!("| {id} |")).count(),
            1,
            "README.md should explain the message id of {name}"
        );
    }
}

#[test]
fn catalog_explains_exactly_the_known_message_ids() {
    let catalog = read("systemd/rebase-agent.catalog");
    let mut explained: Vec<&str> = catalog.lines().filter_map(|line| line.strip_prefix("-- ")).collect();
    let mut sent: Vec<&str> = id::ALL.iter().map(|(_, id)| *id).collect();
    explained.sort_unstable();
    sent.sort_unstable();
    assert_eq!(explained, sent);
    // journalctl fills these in; the placeholder of a field that the agent never sends would stay as it is.
    let sends = ["@REBASE_AGENT_REASON@", "@REBASE_AGENT_RULE@", "@REBASE_AGENT_IMAGE@"];
    for word in catalog.split_whitespace().filter(|word| word.matches('@').count() > 1) {
        assert!(sends.contains(&word.trim_end_matches(['.', ','])), "{word}");
    }
}

#[test]
fn journalctl_accepts_the_catalog() {
    let Some(journalctl) = ["/usr/bin/journalctl", "/bin/journalctl"].into_iter().find(|path| Path::new(path).exists())
    else {
        return skip("journalctl is not installed, so it does not compile the catalog");
    };
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("usr/lib/systemd/catalog");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::create_dir_all(root.path().join("var/lib/systemd/catalog")).unwrap();
    std::fs::copy(file("systemd/rebase-agent.catalog"), directory.join("rebase-agent.catalog")).unwrap();
    let root = root.path().to_str().unwrap();
    let updated = run(Command::new(journalctl).args(["--root", root, "--update-catalog"]));
    assert!(updated.status.success(), "{updated:?}");
    let listed = run(Command::new(journalctl).args(["--root", root, "--list-catalog"]));
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for (name, id) in id::ALL {
        assert!(listed.contains(id), "{name}: {listed}");
    }
}

/// `%files` of the package, with the macros that RHEL and Fedora define.
fn packaged() -> Vec<String> {
    let spec = read("systemd/rebase-agent.spec");
    let files = spec.split_once("%files\n").unwrap().1;
    let macros = [
        ("%{name}", "rebase-agent"),
        ("%{_docdir}", "/usr/share/doc"),
        ("%{_bindir}", "/usr/bin"),
        ("%{_unitdir}", "/usr/lib/systemd/system"),
        ("%{_presetdir}", "/usr/lib/systemd/system-preset"),
        ("%{_tmpfilesdir}", "/usr/lib/tmpfiles.d"),
        ("%{_journalcatalogdir}", "/usr/lib/systemd/catalog"),
        ("%{_datadir}", "/usr/share"),
        ("%{_mandir}", "/usr/share/man"),
    ];
    let expand = |line: &str| macros.iter().fold(line.to_owned(), |line, (name, value)| line.replace(name, value));
    files.lines().filter(|line| !line.is_empty() && !line.starts_with("%license")).map(expand).collect()
}

#[test]
fn installed_and_packaged_files_are_the_same() {
    let destination = tempfile::tempdir().unwrap();
    let module = destination.path().join("module.pp");
    std::fs::write(&module, "").unwrap();
    let root = destination.path().join("root");
    let installed = run(Command::new(file("systemd/install"))
        .env("REBASE_AGENT_BINARY", AGENT)
        .env("REBASE_AGENT_POLICY_MODULE", &module)
        .arg(&root));
    assert!(installed.status.success(), "{installed:?}");
    let found = run(Command::new("find").arg(&root).args(["-type", "f", "-printf", "/%P %m\n"]));
    let found = String::from_utf8(found.stdout).unwrap();
    let matches = |pattern: &str, path: &str| match pattern.split_once('*') {
        Some((start, end)) => path.starts_with(start) && path.ends_with(end),
        None => path == pattern || (pattern.ends_with('/') && path.starts_with(pattern)),
    };
    let packaged: Vec<String> = packaged().into_iter().filter(|line| !line.starts_with("%doc")).collect();
    let mut used = BTreeSet::new();
    for line in found.lines() {
        let (path, mode) = line.rsplit_once(' ').unwrap();
        assert_eq!(mode, if path.starts_with("/usr/bin/") { "755" } else { "644" }, "{path}");
        let path = if path.ends_with("/module.pp") { "/usr/share/selinux/packages/rebase_agent.pp" } else { path };
        let by = packaged.iter().find(|pattern| matches(pattern, path));
        used.insert(by.unwrap_or_else(|| panic!("the package has no {path}: {packaged:?}")));
    }
    assert_eq!(used.len(), packaged.len(), "{packaged:?} names more than is installed: {found}");
    assert!(found.contains("/usr/bin/rebase-agent "), "{found}");
    assert!(!found.contains("/usr/lib/systemd/system/rebase-agent.service.d/"), "an example is in force: {found}");
}

/// Checks that the file at `path` is up to date. `UPDATE_DOCS=1` writes it.
fn is_current(path: &str, text: &str) {
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(file(path), text).unwrap();
    }
    assert!(
        read(path) == text,
        "{path} differs from the code: UPDATE_DOCS=1 cargo test --test unit_files -- --test-threads=1 writes it"
    );
}

/// cargo finds no tests by itself here, so a forgotten file would never run.
#[test]
fn every_test_file_is_in_a_manifest() {
    let manifests = read("Cargo.toml") + &read("tests/Cargo.toml");
    for entry in std::fs::read_dir(file("tests")).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        let test = if entry.path().join("main.rs").exists() { format!("{name}/main.rs") } else { name };
        let listed = manifests.contains(&format!("path = \"{test}\""))
            || manifests.contains(&format!("path = \"tests/{test}\""));
        assert!(!test.ends_with(".rs") || listed, "tests/{test} is in neither Cargo.toml nor tests/Cargo.toml");
    }
}

#[test]
fn shell_completion_is_up_to_date() {
    let mut script = Vec::new();
    clap_complete::generate(clap_complete::Shell::Bash, &mut Cli::command(), "rebase-agent", &mut script);
    is_current("systemd/rebase-agent.bash", &String::from_utf8(script).unwrap());
}

/// The files that the agent reads, each with its writer.
const FILES: &[(&str, &str)] = &[
    ("/var/lib/kubelet/kubeconfig", "The kubelet's credentials for the API server; the kubelet writes it."),
    ("/etc/containers/policy.json", "The signature policy, and the keys that it names; MCO writes it."),
    (
        "/etc/containers/registries.d, /etc/containers/registries.conf",
        "Signature storage and mirrors; MCO writes them.",
    ),
    (
        "/run/ostree/auth.json, /etc/ostree/auth.json, /usr/lib/ostree/auth.json",
        "Registry credentials; the first file that exists is used.",
    ),
    ("/etc/systemd/system/rebase-agent.service.d/*.conf", "Drop-ins with REBASE_AGENT_ variables: the configuration."),
];

const EXAMPLES: &[(&str, &str)] = &[
    ("rebase-agent status", "Shows the desired, booted and staged image, and what the node waits for."),
    ("rebase-agent status --verify", "Also verifies the desired image."),
    ("rebase-agent explain", "Shows which rule applies now and what it would do."),
    ("rebase-agent explain SignatureMissing", "Shows what a reason means and what to do about it."),
    ("rebase-agent metrics", "Prints the same facts for a scraper."),
    ("rebase-agent verify quay.io/example/os@sha256:DIGEST", "Checks whether the node's policy accepts an image."),
    ("journalctl -x -u rebase-agent", "Shows the journal with an explanation of each message."),
];

/// One page for all: the program, then each command under its own heading.
#[test]
fn man_page_is_up_to_date() {
    let mut page = Vec::new();
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let man = Man::new(command.clone()).section("8").date("").manual("System administration");
    man.render_title(&mut page).unwrap();
    man.render_name_section(&mut page).unwrap();
    man.render_synopsis_section(&mut page).unwrap();
    man.render_description_section(&mut page).unwrap();
    man.render_options_section(&mut page).unwrap();
    for sub in command.get_subcommands() {
        let title = sub.get_name().to_uppercase();
        // Options of every command are explained once, above.
        let man = Man::new(sub.clone().mut_args(|arg| match arg.is_global_set() || arg.get_id() == "help" {
            true => arg.hide(true),
            false => arg,
        }));
        let mut part = Vec::new();
        man.render_synopsis_section(&mut part).unwrap();
        man.render_description_section(&mut part).unwrap();
        man.render_options_section(&mut part).unwrap();
        // Sections of the command become paragraphs of its heading.
        let part = String::from_utf8(part).unwrap().replace(".SH ", ".SS ");
        page.extend_from_slice(format!(".SH {title}\n{part}").as_bytes());
    }
    let mut page = String::from_utf8(page).unwrap();
    let escaped = |text: &str| text.replace('\\', "\\\\").replace('-', "\\-");
    let mut section = |title: &str, rows: &[(&str, &str)]| {
        page.push_str(&format!(".SH {title}\n"));
        for (name, text) in rows {
            page.push_str(&format!(".TP\n\\fB{}\\fR\n{}\n", escaped(name), escaped(text)));
        }
    };
    section("EXIT STATUS", EXIT_CODES);
    section("FILES", FILES);
    section("EXAMPLES", EXAMPLES);
    is_current("systemd/rebase-agent.8", &page);
}
