//! Kernel arguments of rendered configs, as the kernel sees them after a real boot.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::disk::as_boot_loaders_pass;
use crate::lab::Lab;
use crate::oci::Extra;

/// The place of the rendered config in an image.
const CURRENT_CONFIG: &str = "etc/machine-config-daemon/currentconfig";
/// Quoted and repeated arguments, in an order that matters: `hugepages` belongs to the `hugepagesz` before it, and the
/// last `console` becomes /dev/console.
const FIRST: [&str; 6] = [
    "cgroup_no_v1=\"all\"",
    "psi=0",
    "console=tty0 console=ttyS0",
    "hugepagesz=1G hugepages=0",
    "hugepagesz=2M",
    "hugepages=4",
];
/// Another number of pages of the first size, the same of the second, and the consoles in the other order.
const SECOND: [&str; 6] = [
    "cgroup_no_v1=\"all\"",
    "psi=0",
    "console=ttyS0 console=tty0",
    "hugepagesz=1G hugepages=1",
    "hugepagesz=2M",
    "hugepages=4",
];
/// The same number of pages of both sizes, which repeats one argument, and one argument that the platform has, too.
const THIRD: [&str; 6] = [
    "cgroup_no_v1=\"all\"",
    "psi=0",
    "console=ttyS0 console=tty0",
    "hugepagesz=1G hugepages=4",
    "hugepagesz=2M",
    "hugepages=4 panic=-1",
];

/// Three configs in a row: after each update the command line has the platform's own arguments and those of the new
/// config in their order, nothing is left of the old config, and the node is Done.
pub async fn in_order(lab: &mut Lab) -> Result<()> {
    // The installed image has no config: arguments of the first config that are there already count as set by a config.
    let first = words(&FIRST.join(" "));
    let platform: Vec<_> = command_line(lab).await?.into_iter().filter(|argument| !first.contains(argument)).collect();
    ensure!(platform.iter().any(|argument| argument == "panic=-1"), "the platform's arguments are {platform:?}");
    for (number, config) in (1..).zip([&FIRST, &SECOND, &THIRD]) {
        let version = lab.version() + 1;
        let rendered = json!({
            "kind": "MachineConfig",
            "metadata": { "name": format!("rendered-worker-{version}") },
            "spec": { "kernelArguments": config },
        });
        let image = lab.signed_with(Extra::default().file(CURRENT_CONFIG, 0o644, rendered.to_string())).await?;
        lab.update(&image, version).await.with_context(|| format!("config {number}"))?;

        let wanted = words(&as_boot_loaders_pass(&config.join(" ")));
        let is = command_line(lab).await?;
        let name = |argument: &str| argument.split('=').next().unwrap_or_default().to_owned();
        let names: Vec<String> = wanted.iter().map(|argument| name(argument)).collect();
        let of_config: Vec<_> = is.iter().filter(|argument| names.contains(&name(argument))).cloned().collect();
        ensure!(of_config.ends_with(&wanted), "config {number} demands {wanted:?}; the command line is {is:?}");
        let (mut all, mut both) = (is.clone(), [platform.clone(), wanted].concat());
        all.sort();
        both.sort();
        ensure!(all == both, "with config {number}, platform and config demand {both:?}; the command line has {all:?}");
        let pages = lab.vm.run("cat /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages").await?;
        ensure!(pages.trim() == "4", "config {number} demands 4 pages of 2 MiB; the kernel has {}", pages.trim());
        let (code, status) = lab.vm.status("rebase-agent status").await?;
        ensure!(code == 0, "`rebase-agent status` of a node that is Done: status {code}, {status}");
        lab.say(&format!("config {number}: {}", is.join(" ")));
    }
    Ok(())
}

/// Removes the arguments that the boot loader and libostree add.
async fn command_line(lab: &mut Lab) -> Result<Vec<String>> {
    Ok(words(&lab.vm.run("cat /proc/cmdline").await?))
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().filter(|word| !word.starts_with("ostree=")).map(str::to_owned).collect()
}
