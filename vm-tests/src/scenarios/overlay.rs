//! A host tool in an overlay.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};

use super::update;
use crate::backend::Backend;
use crate::disk::Disk;
use crate::lab::{Kind, Lab, Stock};

/// The place of the real program in the test's overlay.
const BEHIND: &str = "/usr/libexec/behind-the-overlay";
/// The first word of the overlay's program in the journal.
const MARK: &str = "of-the-overlay";

/// The files that an overlay must have to replace the stand-in, and the one that the test wraps.
struct Tool {
    wrapped: &'static str,
    others: &'static [&'static str],
    /// Prefix of the names of its units.
    units: &'static str,
}

fn tool(backend: Backend) -> Tool {
    match backend {
        Backend::RpmOstree => Tool {
            wrapped: "/usr/libexec/rpm-ostreed",
            others: &[
                "/usr/bin/rpm-ostree",
                "/usr/lib/systemd/system/rpm-ostreed.service",
                "/usr/share/dbus-1/system-services/org.projectatomic.rpmostree1.service",
                "/usr/share/dbus-1/system.d/org.projectatomic.rpmostree1.conf",
            ],
            units: "rpm-ostreed.service",
        },
        Backend::Bootc => Tool { wrapped: "/usr/bin/bootc", others: &[], units: "rebase-agent-bootc" },
    }
}

/// A library that the programs need and a version of one, each with a name of the same length that is not there.
const NEEDED: [[&str; 2]; 2] = [["libostree-1.so.1", "libabsent-1.so.1"], ["GLIBC_2.34", "GLIBC_9.34"]];
/// The Debian package that would have the missing one.
const PACKAGE: &str = "libabsent-1-1";

/// The agent stages with the host tool of the overlay. An overlay that lacks a library is refused.
pub async fn is_used(stock: &Stock) -> Result<()> {
    let tool = tool(stock.backend);
    let tree = stock.runs.join("overlay-tree");
    make_tree(&tool, &tree, &stock.image(Kind::Plain).await?.join("disk.raw"))?;
    let mut with_overlay = stock.clone();
    with_overlay.image_options.extend(["--overlay".to_owned(), tree.display().to_string()]);
    let mut lab = Lab::start(&with_overlay, "overlay", Kind::Plain, None).await?;
    match is_started(&tool, &mut lab).await {
        Ok(()) => lab.end(false).await,
        Err(error) => {
            let kept = lab.keep_evidence().await;
            return Err(error).with_context(|| format!("console, journal and disk are in {}", kept.display()));
        }
    }
    is_refused_without_library(&with_overlay, &tree).await?;
    fs::remove_dir_all(&tree).context("removing the overlay")
}

/// The build names the program, the missing library or version, and the likely package.
async fn is_refused_without_library(stock: &Stock, tree: &Path) -> Result<()> {
    let program = tree.join(BEHIND.trim_start_matches('/'));
    let mut bytes = fs::read(&program)?;
    for [needed, absent] in NEEDED {
        let place = bytes.windows(needed.len()).position(|part| part == needed.as_bytes());
        let place = place.with_context(|| format!("{BEHIND} does not need {needed}"))?;
        bytes.splice(place..place + needed.len(), absent.bytes());
    }
    fs::write(&program, bytes)?;
    let output = stock.builds(Kind::Plain).stderr(Stdio::piped()).output().await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "an image was built with a program that lacks a library");
    for part in NEEDED.map(|[_, absent]| absent).iter().chain(&[BEHIND, PACKAGE]) {
        ensure!(said.contains(part), "the build does not name {part}: {said}");
    }
    Ok(())
}

async fn is_started(tool: &Tool, lab: &mut Lab) -> Result<()> {
    ensure!(lab.vm.read(tool.wrapped).await? == script().into_bytes(), "{} is not the overlay's", tool.wrapped);
    update::forward(lab).await?;
    let said = lab.vm.journal.since(0, |entry| {
        entry.field("_SYSTEMD_UNIT").is_some_and(|unit| unit.starts_with(tool.units))
            && entry.message().starts_with(MARK)
    });
    let boots: BTreeSet<_> = said.iter().filter_map(|entry| entry.field("_BOOT_ID")).collect();
    ensure!(boots.len() == 2, "{} of the overlay ran in {} boots of two", tool.wrapped, boots.len());
    lab.say(&format!("{} of the overlay was started {} times in an update", tool.wrapped, said.len()));
    Ok(())
}

/// A script that leaves a mark and runs the real program.
fn script() -> String {
    format!("#!/bin/sh\necho \"{MARK} $*\" >&2\nexec {BEHIND} \"$@\"\n")
}

/// An overlay as a user would make it, with the programs of that disk in it, stand-ins or not.
fn make_tree(tool: &Tool, tree: &Path, disk: &Path) -> Result<()> {
    match fs::remove_dir_all(tree) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).context("an old overlay"),
        _ => {}
    }
    let disk = Disk::open(disk);
    let entry = disk.entry()?;
    let root =
        entry.options.split(' ').find_map(|option| option.strip_prefix("ostree=")).context("no ostree= option")?;
    let place = |path: &str, mode: u32, from: Option<&str>| -> Result<()> {
        let to = tree.join(path.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a file in a directory")?)?;
        match from {
            Some(from) => disk.extract(&format!("{root}{from}"), &to)?,
            None => fs::write(&to, script())?,
        }
        fs::set_permissions(&to, fs::Permissions::from_mode(mode)).context(to.display().to_string())
    };
    place(BEHIND, 0o755, Some(tool.wrapped))?;
    place(tool.wrapped, 0o755, None)?;
    for path in tool.others {
        place(path, if path.starts_with("/usr/bin/") { 0o755 } else { 0o644 }, Some(path))?;
    }
    Ok(())
}
