//! Checks of the units that run bootc, on the same node without rpm-ostree.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{AGENT, HOLD, Node, RPM_OSTREED, Teller};
use crate::booted::container::TICK;
use crate::booted::directives;
use crate::booted::node::{
    self,
    bootc::{CALLED, FAIL, FAIL_LATE, PROGRAMS, WORDS},
};
use crate::booted::outside::DEADLINE;
use crate::booted::sandbox::Process;
use crate::image::Pushed;
use crate::mcc::annotation;
use crate::policy::Policy;
use crate::world::NODE;

const STATUS: &str = "rebase-agent-bootc-status.socket";
const STATUS_SERVICE: &str = "rebase-agent-bootc-status@";
const SOCKET: &str = "/run/rebase-agent/bootc-status.sock";
const SWITCH: &str = "rebase-agent-bootc@";
const SWITCH_SIGNED: &str = "rebase-agent-bootc-signed@";
const PULL: &str = "rebase-agent-pull@";
const PULL_SIGNED: &str = "rebase-agent-pull-signed@";
const SIGNED: &str = "--enforce-container-sigpolicy";
/// Length of a digest in a reason.
const SHORT: usize = "sha256:".len() + 12;
/// Instances that look like an option, a specifier, a variable, a shell command and a second argument.
const TRICKY: [&str; 3] = ["--apply", "-- --transport=dir /", "%n %% $HOME ${PATH} $(reboot) ; \"a\\b' \n-x"];

impl Node<'_> {
    pub(super) async fn tell_of_bootc(&mut self, teller: &Teller, running: &Pushed) -> Result<()> {
        teller.step("rpm-ostree is taken away: the agent has bootc instead", self.changes_to_bootc(running)).await?;
        teller.step("every directive of bootc's units is in force", self.has_bootcs_directives()).await?;
        teller.step("no instance of them becomes an option", self.instances_are_arguments()).await?;
        teller.step("a held node pulls a signed image and stages it when it is released", self.switches()).await?;
        teller.step("SIGKILL during a switch: the restarted agent waits for it", self.finds_its_switch()).await?;
        teller.step("a retarget during a switch stops it and starts another", self.stops_its_switch()).await?;
        teller.step("a switch fails before staging, another after it", self.reports_failures()).await?;
        let last = self.outside.signed("10").await?;
        teller.step("a policy that rejects by default", self.switches_signed(&last)).await?;
        let boot = self.boot_id().await?;
        teller.step("released: drained, down through logind, up again", self.releases(true)).await?;
        teller.step("bootc's deployment is booted, the node uncordoned and Done", self.arrives(&last, &boot)).await
    }

    async fn changes_to_bootc(&self, running: &Pushed) -> Result<String> {
        self.outside.demand_sigstore(&self.container.path("/"), Policy::accept_by_default())?;
        for program in PROGRAMS {
            symlink(node::PROGRAM, self.container.path(program))?;
        }
        fs::create_dir_all(self.container.path(WORDS))?;
        // The bus still lists the name as activatable.
        self.container.ok(&["systemctl", "mask", "--now", "--quiet", RPM_OSTREED]).await?;
        self.container.ok(&["systemctl", "preset", "--quiet", AGENT, STATUS]).await?;
        self.container.ok(&["systemctl", "start", STATUS]).await?;
        let mode = fs::metadata(self.container.path(SOCKET))?.permissions().mode() & 0o777;
        ensure!(mode == 0o600, "the socket's mode is {mode:o}");
        self.container.ok(&["systemctl", "restart", AGENT]).await?;
        self.container.wait_property(AGENT, "StatusText", DEADLINE, |text| text.contains("Done")).await?;
        let process = Process::of(&self.container, AGENT).await?;
        process.has_no_privileges()?;
        process.writes_only(&[])?;
        let asked = self.calls("status").await?;
        ensure!(!asked.is_empty(), "bootc was not asked");
        let other = asked.iter().find(|call| *call != &["status", "--format=json", "--format-version=1"]);
        ensure!(other.is_none(), "bootc was asked {other:?}");
        self.is_arrived(running)?;
        let text = self.container.ok(&["rebase-agent", "status"]).await?;
        let row = text.lines().find(|line| line.trim_start().starts_with("Backend")).context("no row Backend")?;
        let row = row.split_whitespace().collect::<Vec<_>>().join(" ");
        ensure!(row == "Backend bootc: rpm-ostree is not on the system bus", "`{row}`");
        Ok(format!("{row}; its socket has mode {mode:o}"))
    }

    async fn has_bootcs_directives(&self) -> Result<String> {
        let mut count = directives::compare(&self.container, STATUS).await?;
        for template in [STATUS_SERVICE, SWITCH, SWITCH_SIGNED, PULL, PULL_SIGNED] {
            count += directives::compare(&self.container, &format!("{template}instance.service")).await?;
        }
        Ok(format!("{count} of them"))
    }

    async fn instances_are_arguments(&self) -> Result<String> {
        let before = self.calls("switch").await?.len();
        let mut expected = Vec::new();
        for (template, options) in [(SWITCH, &[][..]), (SWITCH_SIGNED, &[SIGNED])] {
            for text in TRICKY {
                let unit = self.unit(template, text).await?;
                let started = self.container.run(&["systemctl", "start", "--", &unit]).await?;
                ensure!(!started.status.success(), "bootc switches to `{text}`");
                expected.push(call(options, text));
                // The agent resets the units that it started.
                self.container.ok(&["systemctl", "reset-failed", "--", &unit]).await?;
            }
        }
        let calls = self.calls("switch").await?.split_off(before);
        ensure!(calls == expected, "bootc was called with {calls:?}");
        for (template, prefix) in
            [(PULL, "ostree-unverified-registry:"), (PULL_SIGNED, "ostree-image-signed:docker://")]
        {
            let unit = self.unit(template, TRICKY[2]).await?;
            let started = self.container.run(&["systemctl", "start", "--", &unit]).await?;
            ensure!(!started.status.success(), "`{}` is pulled", TRICKY[2]);
            self.container.ok(&["systemctl", "reset-failed", "--", &unit]).await?;
            let calls = self.calls("container").await?;
            ensure!(calls.last() == Some(&pull_of(prefix, TRICKY[2])), "ostree was called with {calls:?}");
        }
        Ok(format!("{} started by hand, the last with {}", calls.len() + 2, json!(calls.last())))
    }

    async fn switches(&self) -> Result<String> {
        let image = self.outside.signed("4").await?;
        self.outside.store().annotate("kubectl-annotate", NODE, HOLD, Some("held by the test"))?;
        let before = self.calls("switch").await?.len();
        let pulls = self.calls("container").await?.len();
        self.outside.target("4", &image);
        self.outside.wait_reason("Held").await?;
        ensure!(self.deployments()?.iter().all(|deployment| !deployment.staged), "something is staged on a held node");
        let pulled = self.calls("container").await?.split_off(pulls);
        let pull = pull_of("ostree-unverified-registry:", &image.pullspec());
        ensure!(pulled == [pull], "ostree was called with {pulled:?}");
        self.outside.drains.block_drains(true);
        self.outside.store().annotate("kubectl-annotate", NODE, HOLD, None)?;
        self.is_staged(&image).await?;
        let calls = self.calls("switch").await?.split_off(before);
        ensure!(calls == [switch_to(&image, &[])], "bootc was called with {calls:?}");
        let unit = self.unit(SWITCH, &image.pullspec()).await?;
        let ended = self.container.property(&unit, "Result").await?;
        ensure!(ended == "success", "{unit} ended with {ended}");
        let finalizer = self.container.property(super::FINALIZER, "ActiveState").await?;
        ensure!(finalizer == "active", "the finalizer is {finalizer}");
        Ok(calls.concat().join(" "))
    }

    async fn finds_its_switch(&self) -> Result<String> {
        let image = self.outside.signed("5").await?;
        let before = self.calls("switch").await?.len();
        self.hold_up(&image).await?;
        self.outside.retarget("5", &image)?;
        let (unit, switch) = self.runs(&image).await?;
        let main = self.container.property(AGENT, "MainPID").await?;
        self.container.ok(&["systemctl", "kill", "--signal=KILL", "--kill-whom=main", AGENT]).await?;
        // It waits for the unit that does more than it would ask for.
        self.is_back(&main, "Fetching").await?;
        ensure!(self.container.property(&unit, "MainPID").await? == switch, "the switch is not the same process");
        self.container.ok(&["bash", "-c", "echo go on >$0", &word(&image)]).await?;
        self.is_staged(&image).await?;
        let calls = self.calls("switch").await?.split_off(before);
        ensure!(calls == [switch_to(&image, &[])], "bootc was called with {calls:?}");
        Ok("1 switch, the same process".to_owned())
    }

    async fn stops_its_switch(&self) -> Result<String> {
        let (first, second) = (self.outside.signed("6").await?, self.outside.signed("7").await?);
        let before = self.calls("switch").await?.len();
        self.hold_up(&first).await?;
        self.outside.retarget("6", &first)?;
        let (unit, _) = self.runs(&first).await?;
        self.outside.retarget("7", &second)?;
        self.is_staged(&second).await?;
        let state = self.container.property(&unit, "ActiveState").await?;
        let result = self.container.property(&unit, "Result").await?;
        ensure!((state.as_str(), result.as_str()) == ("inactive", "success"), "{unit} is {state}, {result}");
        let calls = self.calls("switch").await?.split_off(before);
        ensure!(calls == [switch_to(&first, &[]), switch_to(&second, &[])], "bootc was called with {calls:?}");
        self.nothing_failed().await?;
        Ok("stopped, then switched; no unit is left failed".to_owned())
    }

    async fn reports_failures(&self) -> Result<String> {
        let (failing, late) = (self.outside.signed("8").await?, self.outside.signed("9").await?);
        fs::write(self.container.path(&word(&failing)), FAIL)?;
        fs::write(self.container.path(&word(&late)), FAIL_LATE)?;
        self.outside.retarget("8", &failing)?;
        self.outside.wait_reason("StageFailed").await?;
        self.nothing_failed().await?;
        let node = self.outside.node()?;
        let reason = annotation(&node, "reason").unwrap_or_default();
        let unit = self.unit(SWITCH, &failing.pullspec()).await?;
        ensure!(reason.contains(&unit) && reason.contains("exit-code 1"), "the reason is `{reason}`");
        self.outside.retarget("9", &late)?;
        self.is_staged(&late).await?;
        self.nothing_failed().await?;
        let log = self.container.ok(&["journalctl", "--quiet", "--output=cat", "--boot", "--unit", AGENT]).await?;
        ensure!(log.contains("the image is staged nevertheless"), "the agent does not report the failed switch");
        Ok(reason.to_owned())
    }

    async fn switches_signed(&self, image: &Pushed) -> Result<String> {
        self.outside.demand_sigstore(&self.container.path("/"), Policy::reject_by_default())?;
        let before = self.calls("switch").await?.len();
        self.outside.retarget("10", image)?;
        self.is_staged(image).await?;
        let calls = self.calls("switch").await?.split_off(before);
        ensure!(calls == [switch_to(image, &[SIGNED])], "bootc was called with {calls:?}");
        let staged =
            self.deployments()?.into_iter().find(|deployment| deployment.staged).context("nothing is staged")?;
        ensure!(staged.reference.starts_with("ostree-image-signed:"), "its origin is {}", staged.reference);
        Ok(staged.reference)
    }

    /// The arguments of every call of `command` in this boot.
    async fn calls(&self, command: &str) -> Result<Vec<Vec<String>>> {
        self.container.ok(&["journalctl", "--sync"]).await?;
        let units = ["--unit=rebase-agent-bootc*", "--unit=rebase-agent-pull*"];
        let journal = [&["journalctl", "--quiet", "--output=cat", "--boot"], &units[..]].concat();
        let log = self.container.ok(&journal).await?;
        let calls = log.lines().filter_map(|line| line.strip_prefix(CALLED)).map(serde_json::from_str);
        let mut calls = calls.collect::<Result<Vec<Vec<String>>, _>>()?;
        calls.retain(|arguments| arguments.first().is_some_and(|first| first == command));
        Ok(calls)
    }

    /// The instance name for `text`, in systemd's own escaping.
    async fn unit(&self, template: &str, text: &str) -> Result<String> {
        self.container.ok(&["systemd-escape", &format!("--template={template}.service"), "--", text]).await
    }

    /// Makes the switch to `image` wait for a word.
    async fn hold_up(&self, image: &Pushed) -> Result<()> {
        self.container.ok(&["mkfifo", &word(image)]).await.map(|_| ())
    }

    /// Waits until the switch to `image` runs and has logged its arguments; returns its unit and its process.
    async fn runs(&self, image: &Pushed) -> Result<(String, String)> {
        let began = Instant::now();
        while self.calls("switch").await?.last() != Some(&switch_to(image, &[])) {
            ensure!(began.elapsed() < DEADLINE, "after {DEADLINE:?}, no switch to {} runs", image.digest);
            tokio::time::sleep(TICK).await;
        }
        let unit = self.unit(SWITCH, &image.pullspec()).await?;
        let process = self.container.property(&unit, "MainPID").await?;
        ensure!(process != "0", "{unit} does not run any more");
        Ok((unit, process))
    }

    /// Waits until `image` is staged and waits for its drain.
    async fn is_staged(&self, image: &Pushed) -> Result<()> {
        let waits = |reason: &str| reason.starts_with("DrainPending") && reason.contains(&image.digest[..SHORT]);
        let is_waiting = |node: &Value| annotation(node, "reason").is_some_and(waits);
        self.outside.wait(&format!("{} waiting for its drain", image.digest), is_waiting).await?;
        let staged =
            self.deployments()?.into_iter().find(|deployment| deployment.staged).context("nothing is staged")?;
        ensure!(staged.digest == image.digest, "{} is staged", staged.digest);
        Ok(())
    }
}

fn word(image: &Pushed) -> String {
    format!("{WORDS}/{}", image.digest)
}

fn pull_of(prefix: &str, image: &str) -> Vec<String> {
    let image = format!("{prefix}{image}");
    ["container", "image", "pull", "--quiet", "/sysroot/ostree/repo", &image].map(str::to_owned).to_vec()
}

fn call(options: &[&str], image: &str) -> Vec<String> {
    [&["switch", "--quiet"], options, &["--", image]].concat().into_iter().map(str::to_owned).collect()
}

fn switch_to(image: &Pushed, options: &[&str]) -> Vec<String> {
    call(options, &image.pullspec())
}
