//! `bootc switch`: an import under the node's policy, a staged deployment, and a marker that a reboot is due.

use anyhow::{Context as _, Result};
use guest::Said;
use ostree_ext::container::{ImageReference, OstreeImageReference, SignatureSource, Transport};
use ostree_ext::sysroot::SysrootLock;

use crate::status::Host;

/// Read by kured and other tools that reboot nodes.
const REBOOT_REQUIRED: &str = "/run/reboot-required";

/// The requested switch.
pub struct Options {
    image: String,
    enforce: bool,
    quiet: bool,
}

impl Options {
    /// Parses the command line after `switch`.
    pub fn parse(arguments: &[&str]) -> Option<Self> {
        let (mut enforce, mut quiet, mut image, mut is_plain) = (false, false, None, false);
        for &argument in arguments {
            match argument {
                "--" if !is_plain => is_plain = true,
                "--quiet" if !is_plain => quiet = true,
                "--enforce-container-sigpolicy" if !is_plain => enforce = true,
                option if !is_plain && option.starts_with('-') => return None,
                _ if image.is_some() => return None,
                name => image = Some(name.to_owned()),
            }
        }
        Some(Self { image: image?, enforce, quiet })
    }

    fn target(&self) -> OstreeImageReference {
        let sigverify = match self.enforce {
            true => SignatureSource::ContainerPolicy,
            false => SignatureSource::ContainerPolicyAllowInsecure,
        };
        let imgref = ImageReference { transport: Transport::Registry, name: self.image.clone() };
        OstreeImageReference { sigverify, imgref }
    }
}

/// Stages the image, unless it boots next anyway.
pub async fn run(sysroot: &SysrootLock, options: &Options) -> Result<()> {
    let target = options.target();
    let host = Host::of(sysroot)?;
    let booted = host.booted.as_ref().context("This command requires a booted host system")?;
    if host.specified().is_some_and(|image| image == target) {
        println!("Image specification is unchanged.");
        return Ok(());
    }
    eprintln!("Switching to image: {}", options.image);
    let image = guest::import(sysroot, &target, |said| match said {
        Said::Message(text) if !options.quiet => println!("{text}"),
        _ => {}
    })
    .await?;
    // The origin is new: other settings of the old one are lost.
    let (origin, arguments) = (guest::origin(&target), guest::arguments(booted));
    guest::stage(sysroot, &image.merge_commit, &origin, booted, &arguments, false)?;
    // A failure from here on leaves the image staged.
    guest::tidy(sysroot)?;
    std::fs::write(REBOOT_REQUIRED, "bootc: Reboot required for image update\n").context("Writing reboot-required")?;
    println!("Queued for next boot: {target}");
    if let Some(version) = image.version() {
        println!("  Version: {version}");
    }
    println!("  Digest: {}", image.manifest_digest);
    Ok(())
}
