//! Checks that a message names a way out: an action that the reader can take, with commands that exist.
#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods, reason = "a part of tests")]

use std::collections::BTreeSet;
use std::sync::LazyLock;

use clap::CommandFactory as _;
use rebase_agent::cli::Cli;
use rebase_agent::cluster::ClusterError;
use rebase_agent::cluster::mcn::obstacle;
use rebase_agent::model::annotations::{ATTEMPT, HOLD, MCO, PREFETCH, RETRY, UNTRUSTED};

/// Commands that solve or explain a problem, as their tools accept them. A word in capitals stands for one argument.
/// Check the tool's manual before you add one.
const COMMANDS: &[&str] = &[
    "bootc rollback",
    "bootc status",
    "bootc upgrade --from-downloaded",
    "df -h PATH",
    "journalctl -b -1",
    "journalctl -b -1 -u UNIT",
    "journalctl -u UNIT",
    "lslocks",
    "oc adm node-logs NODE -u UNIT",
    "oc apply -k PATH",
    "oc describe node NODE",
    "oc edit RESOURCE",
    "oc get crd NAME",
    "oc get csr",
    "oc get machineconfignode NODE -w -o wide",
    "oc get machineconfignodes",
    "oc get pdb -A",
    "oc get pods -o wide -n NAMESPACE",
    "oc rollout restart deployment/machine-config-controller -n NAMESPACE",
    "ostree admin config-diff",
    "ostree admin undeploy 0",
    "ostree admin undeploy INDEX",
    "ostree container image pull",
    "rpm-ostree cancel",
    "rpm-ostree cleanup -p",
    "rpm-ostree cleanup -r",
    "rpm-ostree kargs --editor",
    "rpm-ostree reset",
    "rpm-ostree rollback",
    "rpm-ostree status",
    "rpm-ostree status --json",
    "systemctl cat UNIT",
    "systemctl disable --now UNIT",
    "systemctl enable --now UNIT",
    "systemctl list-units PATTERN",
    "systemctl status UNIT",
    "systemd-inhibit --list",
];

/// Commands and parts of them that a text may mention and that are no way out.
const MENTIONED: &[&str] = &[
    "bootc",
    "bootc status --format=json --format-version=1",
    "bootc switch",
    "journalctl -u",
    "journalctl -x",
    "oc",
    "oc delete -k",
    "rpm-ostree",
    "systemctl disable",
    "systemctl status",
];

/// First words of a clause that tells the reader to act.
const INSTRUCTIONS: &[&str] = &[
    "annotate", "build", "correct", "delete", "free", "give", "hand", "install", "let", "look", "lower", "push", "put",
    "raise", "remove", "set", "sign", "take",
];

/// Names of MCO's annotations.
const ANNOTATIONS: &[&str] = &[
    "controlPlaneTopology",
    "currentConfig",
    "currentImage",
    "desiredConfig",
    "desiredDrain",
    "desiredImage",
    "firstPivotConfig",
    "lastAppliedDrain",
    "reason",
    "rebuild",
    "state",
];

/// Checks that `message` names a way out, and that every command and every annotation in it exists.
///
/// # Errors
/// One sentence that names the missing or unknown part.
pub fn names_a_way_out(message: &str) -> Result<(), String> {
    let commands = commands(message)?;
    let annotations = annotations(message)?;
    if commands || annotations || clauses(message).any(instructs) || options(message) {
        return Ok(());
    }
    Err(format!("names no command, annotation, option or instruction that tests/ways_out.rs knows: {message}"))
}

/// Whether a command in backticks solves or explains a problem; an error if a command does not exist.
fn commands(message: &str) -> Result<bool, String> {
    let mut found = false;
    for quoted in message.split('`').skip(1).step_by(2) {
        let words: Vec<&str> = quoted.split_whitespace().collect();
        let is = |form: &&&str| {
            let form: Vec<&str> = form.split(' ').collect();
            let alike = |(form, word): (&&str, &&str)| form == word || form.chars().all(|c| c.is_ascii_uppercase());
            form.len() == words.len() && form.iter().zip(&words).all(alike)
        };
        let program = |form: &&str| form.split(' ').next() == words.first().copied();
        if words.first() == Some(&"rebase-agent") {
            found |= is_ours(&words)?;
        } else if COMMANDS.iter().any(|form| is(&form)) {
            found = true;
        } else if COMMANDS.iter().any(program) && !MENTIONED.iter().any(|form| is(&form)) {
            return Err(format!("`{quoted}` is no command that tests/ways_out.rs knows"));
        }
    }
    Ok(found)
}

/// Whether the agent's command line has the subcommand and the options; a bare `rebase-agent` is only a mention.
fn is_ours(words: &[&str]) -> Result<bool, String> {
    let cli = Cli::command();
    let Some(name) = words.get(1) else { return Ok(false) };
    let sub = cli.find_subcommand(name).ok_or(format!("`rebase-agent {name}` is no command of the agent"))?;
    let known = |option: &str| option == "help" || sub.get_arguments().any(|arg| arg.get_long() == Some(option));
    let mut options = words.iter().filter_map(|word| word.strip_prefix("--"));
    match options.find(|option| !known(option)) {
        Some(option) => Err(format!("`rebase-agent {name}` has no option --{option}")),
        None => Ok(true),
    }
}

/// Whether an annotation is named; an error if an annotation does not exist.
fn annotations(message: &str) -> Result<bool, String> {
    let mut found = false;
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-./".contains(c);
    for word in message.split(|c: char| !is_part(c)).map(|word| word.trim_end_matches(['.', '-', '/'])) {
        if word.contains("openshift.io/") {
            let known = match word.strip_prefix(MCO) {
                Some(name) => ANNOTATIONS.contains(&name),
                None => [ATTEMPT, HOLD, PREFETCH, RETRY, UNTRUSTED].contains(&word),
            };
            if !known {
                return Err(format!("{word} is no annotation that tests/ways_out.rs knows"));
            }
            found = true;
        }
    }
    Ok(found)
}

/// Whether an option of the agent or its environment variable is named.
fn options(message: &str) -> bool {
    static KNOWN: LazyLock<BTreeSet<String>> = LazyLock::new(|| {
        let cli = Cli::command();
        let commands = cli.get_subcommands().chain([&cli]).flat_map(clap::Command::get_arguments);
        let names = commands.flat_map(|arg| {
            let variable = arg.get_env().map(|name| name.to_string_lossy().into_owned());
            [arg.get_long().map(|long| format!("--{long}")), variable]
        });
        names.flatten().collect()
    });
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    message.split(|c: char| !is_part(c)).any(|word| KNOWN.contains(word))
}

/// The parts of a message between punctuation marks followed by a space, without a leading `or` or `and`.
fn clauses(message: &str) -> impl Iterator<Item = &str> {
    [". ", "; ", ": ", ", "]
        .iter()
        .fold(vec![message], |parts, mark| parts.into_iter().flat_map(|part| part.split(mark)).collect())
        .into_iter()
        .map(|clause| clause.trim_start_matches("or ").trim_start_matches("and "))
}

fn instructs(clause: &str) -> bool {
    let mut words = clause.split(' ');
    let (first, rest) = (words.next().unwrap_or_default().to_lowercase(), words.collect::<Vec<_>>());
    // "see the log" counts where no command for that log works everywhere.
    let log = first == "see" && rest.iter().any(|word| word.trim_matches(['.', ',']) == "log");
    log || (INSTRUCTIONS.contains(&first.as_str()) && !rest.is_empty())
}

#[test]
fn existing_commands_are_accepted_as_a_way_out() {
    for message in [
        "the pull failed; see `journalctl -u rpm-ostreed`",
        "x is staged: `ostree admin undeploy 0` drops it",
        "`backup` inhibits the shutdown. See `systemd-inhibit --list`",
        "rolled back; delete the annotation rebase-agent.openshift.io/attempt to try again",
        "too old; the floor is --minimum-created",
        "too old (REBASE_AGENT_MINIMUM_CREATED)",
        "the image has no signature; sign it",
        "the drain is late; see the machine-config-controller's log. The agent keeps waiting",
        "see `rebase-agent explain --json`",
    ] {
        assert_eq!(names_a_way_out(message), Ok(()), "{message}");
    }
}

#[test]
fn obstacles_of_the_machineconfignode_name_a_way_out() {
    let errors = [ClusterError::Forbidden, ClusterError::NotFound, ClusterError::Refused];
    for error in errors.map(|error| error("the server's text".to_owned())) {
        assert_eq!(names_a_way_out(&obstacle(&error).unwrap()), Ok(()), "{error}");
    }
}

#[test]
fn commands_that_do_not_exist_are_no_way_out() {
    for (message, why) in [
        ("`nonsense` is not pinned", "names no command"),
        ("the signature is missing", "names no command"),
        ("it went wrong, see below", "names no command"),
        ("the annotation is set and no signature follows", "names no command"),
        ("`bootc switch` failed", "names no command"),
        ("see `journalctl`", "is no command"),
        ("end it with `rpm-ostree cleanup --pending-please`", "is no command"),
        ("sign it, or run `rpm-ostree cleanup`", "is no command"),
        ("run `rebase-agent explane`", "is no command of the agent"),
        ("run `rebase-agent status --jsn`", "has no option --jsn"),
        ("delete rebase-agent.openshift.io/atempt", "is no annotation"),
        ("annotate it with machineconfiguration.openshift.io/rebuilt.", "is no annotation"),
    ] {
        let error = names_a_way_out(message).expect_err(message);
        assert!(error.contains(why), "{message}: {error}");
    }
}

/// Covers texts that no case and no walk reaches: every message in the source, README.md and the catalog.
#[test]
fn every_command_in_messages_and_documents_exists() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("README.md"), root.join("systemd/rebase-agent.catalog")];
    let mut directories = vec![root.join("src")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() { directories.push(entry) } else { files.push(entry) }
        }
    }
    let mut wrong = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let is_code = file.extension().is_some_and(|extension| extension == "rs");
        let text = text.split("\n#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let lines = text.lines().filter(|line| !is_code || !line.trim_start().starts_with("//"));
        // A string continues in the next line.
        let joined: String = lines.map(|line| line.trim().trim_end_matches('\\').to_owned() + " ").collect();
        for quoted in joined.split('`').skip(1).step_by(2) {
            if let Err(why) = commands(&format!("`{quoted}`")) {
                wrong.push(format!("{}: {why}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
