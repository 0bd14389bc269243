//! Scenarios that cannot fail prove nothing: an agent that misbehaves in one way must be caught by one.

use anyhow::{Context as _, Result, ensure};

use super::{WithLab, neighbours, power, refusal};
use crate::lab::{Kind, Lab, Stock, WORK};

/// The fault, the scenario that catches it, and a word of how.
const CAUGHT: [(&str, &str, WithLab); 4] = [
    ("no-verify", "the daemon was asked for an unverified image", |lab| Box::pin(refusal::unsigned(lab))),
    ("early-reboot", "the agent misses the finalizer", |lab| Box::pin(neighbours::finalizer_late(lab))),
    ("trust-transaction", "the agent does not believe it", |lab| Box::pin(neighbours::no_effect(lab))),
    ("forget-attempt", "Degraded", |lab| Box::pin(power::finalization_fails(lab))),
];
/// What the agent with the fault `write` says of each of its tries.
const WRITES: usize = 4;

/// Each fault in a guest of its own.
pub async fn are_caught(stock: &Stock) -> Result<()> {
    let mut missed = Vec::new();
    for (fault, how, scenario) in CAUGHT {
        let name = format!("fault-{fault}");
        let mut lab = Lab::start(stock, &name, Kind::Faults, Some(fault)).await.context(fault)?;
        let said = match scenario(&mut lab).await {
            Ok(()) => String::new(),
            Err(error) => format!("{error:#}"),
        };
        if said.contains(how) {
            lab.say(&format!("{fault} is caught: {}", said.lines().next().unwrap_or_default()));
            lab.end(false).await;
        } else {
            let kept = lab.keep_evidence().await;
            missed.push(format!("{fault} is not caught by `{how}` but by `{said}`; see {}", kept.display()));
        }
    }
    let mut lab = Lab::start(stock, "fault-write", Kind::Faults, Some("write")).await.context("write")?;
    match writes_are_stopped(&mut lab).await {
        Ok(()) => lab.end(false).await,
        Err(error) => {
            let kept = lab.keep_evidence().await;
            missed.push(format!("write: {error:#}; see {}", kept.display()));
        }
    }
    ensure!(missed.is_empty(), "{}", missed.join("\n"));
    Ok(())
}

/// What an agent tries to write, the sandbox stops.
async fn writes_are_stopped(lab: &mut Lab) -> Result<()> {
    lab.vm
        .journal
        .wait(0, WORK, "the deliberate writes", |entry| entry.message().starts_with("deliberate write"))
        .await?;
    lab.vm.run("! ls -d /etc/rebase-agent-fault /run/rebase-agent-fault /usr/bin/rebase-agent-fault /var/lib/rebase-agent-fault 2>/dev/null").await?;
    let tried = lab.vm.journal.since(0, |entry| entry.message().starts_with("deliberate write"));
    let stopped = tried.iter().filter(|entry| entry.message().contains("was stopped")).count();
    ensure!(stopped == tried.len() && stopped >= WRITES, "{stopped} of {} deliberate writes were stopped", tried.len());
    lab.say("write is stopped by the sandbox, everywhere");
    Ok(())
}
