//! What there is with bootc only.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::update;
use crate::disk::Disk;
use crate::journal::Entry;
use crate::lab::{Kind, Lab, Stock};

const BOOTC: &str = "/usr/bin/bootc";
/// Where the overlay of the test has the program that does the work.
const BEHIND: &str = "/usr/libexec/bootc-behind-the-overlay";
/// The first word of the overlay's program in the journal.
const MARK: &str = "overlay's-bootc";
const PLAIN_UNIT: &str = "rebase-agent-bootc@";
const SIGNED_UNIT: &str = "rebase-agent-bootc-signed@";
const STATUS_UNIT: &str = "rebase-agent-bootc-status@";

/// Where the policy accepts anything by default, bootc enforces nothing and says so; where it does not, the origin of
/// what the agent has it stage demands a signature.
pub async fn signed(lab: &mut Lab) -> Result<()> {
    let image = lab.signed().await?;
    let enforced = format!("bootc switch --quiet --enforce-container-sigpolicy -- {}", image.pullspec());
    let (code, said) = lab.vm.status(&enforced).await?;
    ensure!(code == 1 && said.contains("insecureAcceptAnything"), "enforcing on a lax policy: status {code}, {said}");
    ensure!(!lab.is_staged().await?, "what was refused is staged");

    lab.vm.run("sed -i s/insecureAcceptAnything/reject/ /etc/containers/policy.json").await?;
    let mark = lab.vm.journal.mark();
    let version = lab.version();
    lab.update(&image, version).await?;
    ensure!(!said_by(lab, mark, SIGNED_UNIT, "").is_empty(), "bootc was not told to enforce the policy");
    ensure!(said_by(lab, mark, PLAIN_UNIT, "").is_empty(), "bootc was told not to enforce the policy");
    let origin =
        lab.vm.run("cat $(readlink -f \"/$(tr ' ' '\\n' </proc/cmdline | sed -n 's,^ostree=/,,p')\").origin").await?;
    let wanted = format!("container-image-reference=ostree-image-signed:docker://{}", image.pullspec());
    ensure!(origin.lines().any(|line| line == wanted), "the origin is {origin}");
    lab.vm.run("bootc status --format=json | grep -q '\"signature\":\"containerPolicy\"'").await.map(drop)
}

/// What the agent's units start is the `/usr/bin/bootc` that the overlay brings.
pub async fn overlay(stock: &Stock) -> Result<()> {
    if stock.image_options.iter().any(|option| option == "--overlay") {
        println!("{:>14}  skipped: this run has an overlay of its own", "");
        return Ok(());
    }
    let tree = stock.runs.join("overlay-tree");
    make_tree(&tree, &stock.image(Kind::Plain).await?.join("disk.raw"))?;
    let mut with_overlay = stock.clone();
    with_overlay.image_options.extend(["--overlay".to_owned(), tree.display().to_string()]);
    let mut lab = Lab::start(&with_overlay, "overlay", Kind::Plain, None).await?;
    match is_started(&mut lab).await {
        Ok(()) => lab.end(false).await,
        Err(error) => {
            let kept = lab.keep_evidence().await;
            return Err(error).with_context(|| format!("console, journal and disk are in {}", kept.display()));
        }
    }
    fs::remove_dir_all(&tree).context("removing the overlay")
}

async fn is_started(lab: &mut Lab) -> Result<()> {
    ensure!(lab.vm.read(BOOTC).await? == script().into_bytes(), "{BOOTC} is not the overlay's");
    update::forward(lab).await?;
    let switches = said_by(lab, 0, PLAIN_UNIT, &format!("{MARK} switch "));
    let statuses = said_by(lab, 0, STATUS_UNIT, &format!("{MARK} status "));
    ensure!(switches.len() == 1, "the overlay's bootc switched {} times in one update", switches.len());
    let boots: std::collections::BTreeSet<_> = statuses.iter().filter_map(|entry| entry.field("_BOOT_ID")).collect();
    ensure!(boots.len() == 2, "the overlay's bootc told its status in {} boots of two", boots.len());
    let told = [&switches, &statuses].map(|entries| entries.first().map(Entry::message).unwrap_or_default());
    lab.say(&format!("from the overlay, {} times: {}; {}", switches.len() + statuses.len(), told[0], told[1]));
    Ok(())
}

/// Leaves a mark and does the work.
fn script() -> String {
    format!("#!/bin/sh\necho \"{MARK} $*\" >&2\nexec {BEHIND} \"$@\"\n")
}

/// An overlay as somebody would make it, with the program of that disk in it, stand-in or not.
fn make_tree(tree: &Path, disk: &Path) -> Result<()> {
    match fs::remove_dir_all(tree) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).context("an old overlay"),
        _ => {}
    }
    let within = |path: &str| tree.join(path.trim_start_matches('/'));
    for path in [BOOTC, BEHIND] {
        fs::create_dir_all(within(path).parent().context("a file in a directory")?)?;
    }
    let disk = Disk::open(disk);
    let entry = disk.entry()?;
    let root =
        entry.options.split(' ').find_map(|option| option.strip_prefix("ostree=")).context("no ostree= option")?;
    disk.extract(&format!("{root}{BOOTC}"), &within(BEHIND))?;
    fs::write(within(BOOTC), script())?;
    for path in [BOOTC, BEHIND] {
        fs::set_permissions(within(path), fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// What bootc said in units of that name since `mark`, if it begins with `words`.
fn said_by(lab: &Lab, mark: usize, unit: &str, words: &str) -> Vec<Entry> {
    lab.vm.journal.since(mark, |entry| {
        entry.field("_SYSTEMD_UNIT").is_some_and(|name| name.starts_with(unit)) && entry.message().starts_with(words)
    })
}
