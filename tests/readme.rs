//! README.md's commands: those that need neither a cluster nor root are run, and the others are compared with the tools
//! they name. The tests find them by content, so README.md can be rearranged freely.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]
#![allow(clippy::disallowed_methods, reason = "tests may make calls that the agent must not")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use support::skip::skip;
use support::tools;
use support::world::{World, WorldOptions};

const AGENT: &str = env!("CARGO_BIN_EXE_rebase-agent-under-test");
/// README.md's placeholder for an image, and for a reason.
const IMAGE: &str = "REGISTRY/REPOSITORY@sha256:DIGEST";
const REASON: &str = "REASON";
/// Exit codes: done, refused, in progress. Others mean an unknown command line or no node.
const ANSWERS: [i32; 3] = [0, 3, 4];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn readme() -> String {
    std::fs::read_to_string(root().join("README.md")).unwrap()
}

/// The code blocks, indented or fenced, and the text between them.
fn parts(text: &str) -> (Vec<String>, String) {
    let (mut blocks, mut prose, mut fenced) = (vec![String::new()], String::new(), false);
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if let Some(code) = line.strip_prefix("    ").or(fenced.then_some(line)) {
            blocks.last_mut().unwrap().push_str(&format!("{code}\n"));
            continue;
        } else {
            prose.push_str(&format!("{line}\n"));
        }
        blocks.push(String::new());
    }
    blocks.retain(|block| !block.is_empty());
    (blocks, prose)
}

/// The lines of all blocks, with continued lines joined and comments removed.
fn lines(text: &str) -> Vec<String> {
    let joined = parts(text).0.concat().replace("\\\n", " ");
    joined.lines().map(|line| line.split(" #").next().unwrap_or_default().trim().to_owned()).collect()
}

/// The texts in backticks outside of blocks.
fn spans(text: &str) -> Vec<String> {
    let spaced = |span: &str| span.split_whitespace().collect::<Vec<_>>().join(" ");
    parts(text).1.split('`').skip(1).step_by(2).map(spaced).collect()
}

/// Every command that begins with `program`, without repetition.
fn commands(program: &str) -> Vec<String> {
    let text = readme();
    let mut found = [lines(&text), spans(&text)].concat();
    found.retain(|command| command.split(' ').next() == Some(program));
    found.sort();
    found.dedup();
    found
}

fn bash(script: &str, input: &str) -> Output {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), input).unwrap();
    let stdin = Stdio::from(std::fs::File::open(file.path()).unwrap());
    Command::new("bash").args(["-c", script]).current_dir(root()).stdin(stdin).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn every_kind_of_command_in_the_readme_is_found() {
    let text = "A `b c\nd` e:\n\n    one  # first\n    two \\\n      more\n\n```\nthree '#1'\n```\n";
    assert_eq!(spans(text), ["b c d"]);
    assert_eq!(lines(text), ["one", "two    more", "three '#1'"]);
    assert_eq!(parts(text).0.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_commands_do_what_the_readme_says() {
    let world = World::new(WorldOptions::new(Path::new(AGENT))).await.unwrap();
    world.target("1", &world.installed);
    world.machine.power_on().await.unwrap();
    world.wait_done(&world.installed).await.unwrap();
    let commands = commands("rebase-agent");
    assert!(commands.iter().any(|command| command.contains(IMAGE)), "no image is verified: {commands:?}");
    for command in &commands {
        let (agent, filters) = command.split_once('|').unwrap_or((command, ""));
        let agent = agent.replace(IMAGE, &world.installed.pullspec()).replace(REASON, "StageFailed");
        let mut words: Vec<&str> = agent.split_whitespace().skip(1).collect();
        match words.as_slice() {
            [] => continue,
            // Skips the bare name of the command or service.
            ["verify"] | ["run", ..] => words.push("--help"),
            _ => {}
        }
        let (code, out, err) = world.command(&words).await.unwrap();
        assert!(ANSWERS.contains(&code), "`{command}` ends with {code}: {out}{err}");
        if !filters.is_empty() {
            if tools::on_path("jq").is_none() && filters.contains("jq") {
                return skip("jq is not installed, so README.md's filters are not run");
            }
            let filtered = bash(&format!("set -o pipefail; cat | {filters}"), &out);
            assert!(filtered.status.success() && !filtered.stdout.is_empty(), "`{command}`: {}", said(&filtered));
        }
    }
}

#[test]
fn engine_that_enforces_nothing_is_refused() {
    const ENGINE: &str = "target/tools/bin/skopeo-unenforcing";
    let text = readme();
    let block = parts(&text).0.into_iter().find(|block| block.contains(ENGINE)).unwrap();
    let Some(engine) = tools::unenforcing_skopeo() else {
        return skip("no skopeo here evaluates no policy; on Debian, tests/support/install fetches one");
    };
    assert!(block.contains("target/debug/rebase-agent "), "{block}");
    let script = block.replace("target/debug/rebase-agent ", &format!("{AGENT} "));
    let output = bash(&script.replace(ENGINE, engine.to_str().unwrap()), "");
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).starts_with("EngineUnfit: "), "{}", said(&output));
}

#[test]
fn options_of_repository_programs_exist() {
    let text = readme();
    let mut seen = 0;
    for command in [lines(&text), spans(&text)].concat() {
        let mut words = command.split_whitespace();
        let Some(program) = words.next().filter(|word| word.contains('/') && !word.starts_with(['/', '-'])) else {
            continue;
        };
        let file = root().join(program);
        let Ok(source) = std::fs::read_to_string(&file) else { continue };
        // A script without --help could run anything.
        if !source.starts_with("#!/bin/bash") || !source.contains("-h | --help)") {
            assert!(!command.contains(" --"), "`{command}`: {program} has no --help");
            continue;
        }
        let help = Command::new(&file).arg("--help").stdin(Stdio::null()).output().unwrap();
        assert!(help.status.success(), "{program} --help: {}", said(&help));
        for option in words.filter(|word| word.starts_with("--")) {
            let option = option.split(['=', ',']).next().unwrap_or_default();
            assert!(said(&help).contains(option), "`{command}`: {program} --help does not know {option}");
        }
        seen += 1;
    }
    assert!(seen >= 10, "only {seen} commands were found");
}

#[test]
fn named_tests_exist() {
    let sources =
        Command::new("find").arg(root().join("tests")).args(["-maxdepth", "2", "-name", "*.rs"]).output().unwrap();
    let sources: String =
        String::from_utf8(sources.stdout).unwrap().lines().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let manifests = ["Cargo.toml", "tests/Cargo.toml"].map(|path| std::fs::read_to_string(root().join(path)).unwrap());
    let mut seen = 0;
    for command in commands("cargo") {
        let words: Vec<&str> = command.split(' ').collect();
        let Some(at) = words.iter().position(|word| *word == "--test" || *word == "--lib") else { continue };
        seen += 1;
        let filter = match words.get(at..).unwrap_or_default() {
            ["--test", name, filter @ ..] => {
                let listed = manifests.iter().any(|text| text.contains(&format!("[[test]]\nname = \"{name}\"")));
                assert!(listed, "`{command}`: there is no test {name}");
                filter.first().filter(|word| !word.starts_with('-'))
            }
            ["--lib", module, ..] => {
                let path = root().join("src").join(module.replace("::", "/"));
                let exists = path.with_extension("rs").exists() || path.join("mod.rs").exists();
                assert!(exists, "`{command}`: there is no module {module}");
                None
            }
            _ => None,
        };
        if let Some(filter) = filter {
            assert!(sources.contains(&format!("fn {filter}")), "`{command}`: no test begins with {filter}");
        }
    }
    assert!(seen >= 3, "only {seen} commands were found");
}

#[test]
fn patch_files_exist() {
    let text = readme();
    let files: Vec<&str> =
        text.lines().filter_map(|line| line.split_once(" --patch-file ")).map(|(_, file)| file).collect();
    for file in &files {
        let patch = std::fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(patch.contains(&format!("--patch-file {file}")), "{file} does not say how it is applied");
    }
    assert!(!files.is_empty());
}

#[test]
fn journalctl_options_exist() {
    if tools::on_path("journalctl").is_none() {
        return skip("journalctl is not installed, so README.md's are not run");
    }
    let directory = tempfile::tempdir().unwrap();
    let text = readme();
    let commands: Vec<String> = lines(&text).into_iter().filter(|line| line.starts_with("journalctl ")).collect();
    for command in &commands {
        let nowhere = format!("journalctl --no-pager --directory={} ", directory.path().display());
        let output = bash(&command.replacen("journalctl ", &nowhere, 1), "");
        // journalctl parses options before it opens files.
        let parsed = output.status.success() || said(&output).contains("No journal files were found");
        assert!(parsed, "`{command}`: {}", said(&output));
    }
    assert!(!commands.is_empty());
}
