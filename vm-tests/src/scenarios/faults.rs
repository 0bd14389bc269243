//! Scenarios that cannot fail prove nothing: for each deliberate fault of the agent, one scenario must fail.

use anyhow::{Context as _, Result, ensure};

use super::power::STAGED;
use super::{WithLab, neighbours, power, refusal};
use crate::lab::{Kind, Lab, Stock, WORK};

/// The fault, the scenario that finds it, a part of its error, and the least number of agent messages with that id: a
/// scenario that only timed out may have failed for another reason.
const CAUGHT: [(&str, WithLab, &str, &str, usize); 4] = [
    ("no-verify", |lab| Box::pin(refusal::unsigned(lab)), "the daemon was asked for an unverified image", STAGED, 0),
    (
        "early-reboot",
        |lab| Box::pin(neighbours::finalizer_late(lab)),
        "the agent reports the inactive finalizer",
        REBOOTING,
        1,
    ),
    (TRUSTING, |lab| Box::pin(neighbours::no_effect(lab)), "the agent reports the missing change", STAGED, 1),
    ("forget-attempt", |lab| Box::pin(power::finalization_fails(lab)), "Degraded", REBOOTING, 3),
];
/// The fault that takes a transaction's end for its effect.
const TRUSTING: &str = "trust-transaction";
/// The agent's message that a reboot was accepted.
const REBOOTING: &str = "d8e6f4a2c0b94715936e5d7c8b1a0f42";
/// The number of attempts to write by the agent with the fault `write`.
const WRITES: usize = 4;

/// Each fault in its own guest.
pub async fn are_caught(stock: &Stock) -> Result<()> {
    let mut missed = Vec::new();
    for (fault, scenario, how, id, times) in CAUGHT {
        if let Some(why) = neighbours::cannot_change_nothing(stock).filter(|_| fault == TRUSTING) {
            println!("{:>14}  {fault} is skipped: {why}", "");
            continue;
        }
        let name = format!("fault-{fault}");
        let mut lab = Lab::start(stock, &name, Kind::Faults, Some(fault)).await.context(fault)?;
        let said = match scenario(&mut lab).await {
            Ok(()) => String::new(),
            Err(error) => format!("{error:#}"),
        };
        let did = lab.vm.journal.since(0, |entry| entry.has_id(id)).len();
        if said.contains(how) && did >= times {
            let said = said.lines().next().unwrap_or_default();
            lab.say(&format!("{fault} is caught: {said}"));
            lab.end(false).await;
        } else {
            let kept = lab.keep_evidence().await;
            let kept = kept.display();
            missed.push(format!(
                "{fault} is not caught by `{how}`, after {did} agent messages, but by `{said}`; see {kept}"
            ));
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

/// The sandbox stops every write that the agent tries.
async fn writes_are_stopped(lab: &mut Lab) -> Result<()> {
    lab.vm
        .journal
        .wait(0, WORK, "the deliberate writes", |entry| entry.message().starts_with("deliberate write"))
        .await?;
    let (_, written) = lab.vm.status("ls -d /{etc,run,usr/bin,var/lib}/rebase-agent-fault 2>/dev/null").await?;
    ensure!(written.is_empty(), "written: {written}");
    let tried = lab.vm.journal.since(0, |entry| entry.message().starts_with("deliberate write"));
    let stopped = tried.iter().filter(|entry| entry.message().contains("was stopped")).count();
    ensure!(stopped == tried.len() && stopped >= WRITES, "{stopped} of {} deliberate writes were stopped", tried.len());
    lab.say("write is stopped by the sandbox, everywhere");
    Ok(())
}
