//! Checks that systemd applied every directive of a unit file. An unknown or misspelt directive is only a warning to
//! systemd, and a missing sandbox is not visible from inside either.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};

use super::container::Container;

/// Compares every directive of the `[Service]` or `[Socket]` section of `unit`'s file with the property that systemd
/// shows; returns their number.
pub async fn compare(container: &Container, unit: &str) -> Result<usize> {
    let path = container.property(unit, "FragmentPath").await?;
    let text = std::fs::read_to_string(container.path(&path)).with_context(|| path.clone())?;
    let shown = container.ok(&["systemctl", "show", "--all", unit]).await?;
    let shown: BTreeMap<&str, &str> = shown.lines().filter_map(|line| line.split_once('=')).collect();
    let own = if unit.ends_with(".socket") { "Socket" } else { "Service" };
    let written = section(&text, own)?;
    ensure!(!written.is_empty(), "{path} has no [{own}] section");
    let instance =
        unit.split_once('@').and_then(|(_, rest)| rest.rsplit_once('.')).map_or("", |(instance, _)| instance);
    let mut wrong = Vec::new();
    for (directive, values) in &written {
        let outcome = match directive.as_str() {
            "SystemCallFilter" => same_calls(container, values, shown.get("SystemCallFilter")).await,
            _ => same(directive, values, &shown, instance),
        };
        if let Err(error) = outcome {
            wrong.push(format!("{directive}={}: {error:#}", values.join(" | ")));
        }
    }
    ensure!(wrong.is_empty(), "systemd does not have {} of {path}: {}", wrong.len(), wrong.join("; "));
    Ok(written.len())
}

/// Directives of the section `own` in order, with the values of all their lines.
fn section(text: &str, own: &str) -> Result<Vec<(String, Vec<String>)>> {
    let mut section = "";
    let mut directives: Vec<(String, Vec<String>)> = Vec::new();
    let joined = text.replace("\\\n", " ");
    for line in joined.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';'])) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name;
        } else if section == own {
            let (key, value) = line.split_once('=').with_context(|| format!("not a directive: {line}"))?;
            match directives.iter_mut().find(|(known, _)| known == key) {
                Some((_, values)) => values.push(value.to_owned()),
                None => directives.push((key.to_owned(), vec![value.to_owned()])),
            }
        }
    }
    Ok(directives)
}

fn words(values: &[String]) -> BTreeSet<&str> {
    values.iter().flat_map(|value| value.split_whitespace()).collect()
}

/// Some properties have another name or another format than their directive.
fn same(directive: &str, values: &[String], shown: &BTreeMap<&str, &str>, instance: &str) -> Result<()> {
    let property = match directive {
        "WatchdogSec" => "WatchdogUSec",
        "RestartSec" => "RestartUSec",
        "TimeoutSec" | "TimeoutStartSec" => "TimeoutStartUSec",
        "TimeoutStopSec" => "TimeoutStopUSec",
        "RuntimeMaxSec" => "RuntimeMaxUSec",
        "EnvironmentFile" => "EnvironmentFiles",
        "ListenStream" => "Listen",
        // The other property does not show the prefix characters of the program.
        "ExecStart" => "ExecStartEx",
        "ExecStartPre" => "ExecStartPreEx",
        other => other,
    };
    let actual = *shown.get(property).context("this systemd has no such property")?;
    let last = values.last().map(String::as_str).unwrap_or_default();
    let equal = match directive {
        "ExecStart" | "ExecStartPre" => {
            let (command, flags) = match (last.strip_prefix(':'), last.strip_prefix('-')) {
                (Some(command), _) => (command, "no-env-expand"),
                (_, Some(command)) => (command, "ignore-failure"),
                _ => (last, ""),
            };
            // systemd shows the arguments without their quotes, but for quotes inside other quotes.
            let unquoted = |text: &str| text.replace(['"', '\''], "");
            let command = unquoted(&command.replace("%I", instance));
            unquoted(actual).contains(&format!("argv[]={command} ; flags={flags} ;"))
        }
        "ListenStream" => actual == format!("{last} (Stream)"),
        "EnvironmentFile" => match last.strip_prefix('-') {
            Some(path) => actual == format!("{path} (ignore_errors=yes)"),
            None => actual == format!("{last} (ignore_errors=no)"),
        },
        _ if directive.ends_with("Sec") => seconds(actual) == seconds(last),
        // ioprio_set(2).
        "IOSchedulingClass" => (last, actual) == ("idle", "3"),
        "SuccessExitStatus" => last.trim_start_matches("SIG") == actual,
        "SystemCallErrorNumber" => number_of(last) == number_of(actual),
        _ => match boolean(last).zip(boolean(actual)) {
            Some((wanted, found)) => wanted == found,
            None => words(values) == actual.split_whitespace().collect(),
        },
    };
    ensure!(equal, "systemd has `{actual}`");
    Ok(())
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "yes" | "true" | "on" | "1" => Some(true),
        "no" | "false" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// Seconds of a time span in systemd's format, `1min 30s` or `90`.
fn seconds(text: &str) -> Option<u64> {
    text.split_whitespace()
        .map(|part| {
            let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            let (number, unit) = part.split_at(digits);
            let scale = match unit {
                "" | "s" | "sec" => 1,
                "min" | "m" => 60,
                "h" => 3600,
                "d" => 86_400,
                _ => return None,
            };
            Some(number.parse::<u64>().ok()? * scale)
        })
        .sum()
}

/// systemd shows the number of the errno that the file names.
fn number_of(errno: &str) -> Option<i32> {
    match errno {
        "EPERM" => Some(1),
        "EACCES" => Some(13),
        "ENOSYS" => Some(38),
        other => other.parse().ok(),
    }
}

/// systemd shows single calls: the expectation is the content of the named groups as this systemd knows them.
async fn same_calls(container: &Container, values: &[String], shown: Option<&&str>) -> Result<()> {
    let shown = shown.context("this systemd has no such property")?;
    let mut expected = BTreeSet::new();
    for (index, value) in values.iter().enumerate() {
        let (taken, list) = match value.strip_prefix('~') {
            Some(list) if index > 0 => (true, list),
            // The first line gives the kind of the list; calls that every program needs are in every allow list.
            _ if value.starts_with('~') => bail!("this test does not understand a deny list"),
            _ => (false, value.as_str()),
        };
        if index == 0 {
            expected.extend(expand(container, "@default").await?);
        }
        for word in list.split_whitespace() {
            let calls = expand(container, word.split(':').next().unwrap_or(word)).await?;
            if taken {
                expected.retain(|call| !calls.contains(call));
            } else {
                expected.extend(calls);
            }
        }
    }
    let actual: BTreeSet<String> = shown.split_whitespace().map(str::to_owned).collect();
    let more: Vec<_> = actual.difference(&expected).collect();
    ensure!(more.is_empty(), "systemd allows more: {more:?}");
    // Calls of other architectures or of kernels that this libseccomp does not know cannot be allowed; calls that the
    // unit names must be.
    for word in words(values).iter().filter(|word| !word.starts_with(['@', '~'])) {
        ensure!(actual.contains(*word), "systemd does not allow {word}");
    }
    let fewer = expected.difference(&actual).count();
    ensure!(fewer * 4 < expected.len(), "systemd allows {} of {} calls", actual.len(), expected.len());
    Ok(())
}

/// The calls of a group, or the call itself.
async fn expand(container: &Container, word: &str) -> Result<BTreeSet<String>> {
    if !word.starts_with('@') {
        return Ok(BTreeSet::from([word.to_owned()]));
    }
    let mut calls = BTreeSet::new();
    let mut groups = vec![word.to_owned()];
    let mut seen = BTreeSet::new();
    while let Some(group) = groups.pop() {
        if !seen.insert(group.clone()) {
            continue;
        }
        let text = container.ok(&["systemd-analyze", "syscall-filter", &group]).await?;
        for line in text.lines().skip(1).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if line.starts_with('@') {
                groups.push(line.to_owned());
            } else {
                calls.insert(line.to_owned());
            }
        }
    }
    ensure!(!calls.is_empty(), "{word} is no group of calls");
    Ok(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_read_as_systemd_reads_them() {
        let text = "[Unit]\nA=1\n[Service]\n# B=2\nC=x \\\n  y\nD=\nC=z\n[Install]\nE=1\n";
        let expected =
            vec![("C".to_owned(), vec!["x    y".to_owned(), "z".to_owned()]), ("D".to_owned(), vec![String::new()])];
        assert_eq!(section(text, "Service").unwrap(), expected);
    }

    #[test]
    fn values_are_compared_by_meaning() {
        let shown = BTreeMap::from([
            ("WatchdogUSec", "6min"),
            ("PrivateDevices", "yes"),
            ("ReadOnlyPaths", "/dev /run"),
            ("CapabilityBoundingSet", ""),
            ("EnvironmentFiles", "/etc/x (ignore_errors=yes)"),
            ("SystemCallErrorNumber", "1"),
            ("ExecStartEx", "{ path=/bin/a ; argv[]=/bin/a -- x ; flags=no-env-expand ; start_time=[n/a] ; }"),
            ("ExecStartPreEx", "{ path=/bin/b ; argv[]=/bin/b a b /c ; flags=ignore-failure ; start_time=[n/a] ; }"),
            ("Listen", "/run/s (Stream)"),
            ("SuccessExitStatus", "TERM"),
        ]);
        let same = |directive: &str, value: &str| same(directive, &[value.to_owned()], &shown, "x").is_ok();
        assert!(same("WatchdogSec", "360") && !same("WatchdogSec", "36"));
        assert!(same("PrivateDevices", "true") && !same("PrivateDevices", "no"));
        assert!(same("ReadOnlyPaths", "/run /dev") && !same("ReadOnlyPaths", "/run"));
        assert!(same("CapabilityBoundingSet", "") && !same("CapabilityBoundingSet", "CAP_CHOWN"));
        assert!(same("EnvironmentFile", "-/etc/x") && !same("EnvironmentFile", "/etc/x"));
        assert!(same("SystemCallErrorNumber", "EPERM") && !same("SystemCallErrorNumber", "EACCES"));
        assert!(same("ExecStart", ":/bin/a -- %I") && !same("ExecStart", ":/bin/a %I"));
        assert!(!same("ExecStart", "/bin/a -- %I"), "its variables would be expanded");
        assert!(same("ExecStartPre", "-/bin/b \"a b\" /c") && !same("ExecStartPre", "/bin/b \"a b\" /c"));
        assert!(same("SuccessExitStatus", "SIGTERM") && !same("SuccessExitStatus", "SIGKILL"));
        assert!(same("ListenStream", "/run/s") && !same("ListenStream", "/run/t"));
        assert!(!same("ProtectEverything", "yes"));
    }
}
