//! One update as a story: the guest's journal as it is written, the annotations of the Node, and the reboot in between.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use support::events::Event;

use crate::journal::Journal;
use crate::lab::{Kind, Lab, Stock, UPDATE, WORK};

struct Teller(Instant);

impl Teller {
    fn line(&self, who: &str, text: &str) {
        println!("{:6.1}s  {who:<9} {text}", self.0.elapsed().as_secs_f64());
    }

    fn chapter(&self, title: &str) {
        println!("\n{:6.1}s  == {title}", self.0.elapsed().as_secs_f64());
    }
}

/// Runs the story; any deviation is an error.
pub async fn tell(stock: &Stock) -> Result<()> {
    let mut lab = Lab::new(stock, "demo", Kind::Plain, None).await?;
    let teller = Arc::new(Teller(Instant::now()));
    let told = teller.clone();
    lab.events.listen(move |event| {
        if let Event::NodeChanged { manager, changes, .. } = event {
            for (key, value) in changes {
                let key = key.rsplit_once('/').map_or(key.as_str(), |(_, key)| key);
                told.line("node", &format!("{key}={}   ({manager})", shorten(value.as_deref().unwrap_or("(removed)"))));
            }
        }
    });
    let listener = tokio::spawn(listen(lab.vm.journal.clone(), teller.clone()));
    let outcome = story(&mut lab, &teller).await;
    listener.abort();
    match outcome {
        Ok(()) => lab.end(false).await,
        Err(error) => {
            let kept = lab.keep_evidence().await;
            return Err(error).with_context(|| format!("the story went another way; see {}", kept.display()));
        }
    }
    println!("\ndemo: the node is Done ({:.0} s)", teller.0.elapsed().as_secs_f64());
    Ok(())
}

async fn story(lab: &mut Lab, teller: &Teller) -> Result<()> {
    teller.chapter("the power goes on: image 1, for the first time");
    lab.power_on().await?;
    teller.line("machine", &format!("boots {}", shorten(&lab.booted_digest().await?)));
    let installed = lab.installed.clone();
    lab.wait_done(&installed).await?;

    teller.chapter("the pool gets image 2, which is not signed: refused, nothing touched");
    let unsigned = lab.unsigned().await?;
    let before = lab.deployments().await?;
    lab.target(&unsigned);
    lab.wait_reason("Degraded", "SignatureMissing", WORK).await?;
    ensure!(lab.deployments().await? == before && lab.drains.drains() == 0, "the unsigned image changed something");

    teller.chapter("the pool gets image 3, signed: verified, staged while workloads run, drained, rebooted into");
    let image = lab.signed().await?;
    lab.target(&image);
    lab.vm.wait_off(UPDATE).await?;
    teller.line("machine", "is down; the boot loader's next choice is read from its disk");
    lab.power_on().await?;
    teller.line("machine", &format!("boots {}", shorten(&lab.booted_digest().await?)));
    lab.wait_done(&image).await?;
    lab.arrived(&image).await?;
    let (_, status) = lab.vm.status("rebase-agent status").await?;
    println!(
        "\n# rebase-agent status\n{}\n\n# ostree admin status\n{}",
        status.trim_end(),
        lab.deployments().await?.trim_end()
    );
    Ok(())
}

/// Prints the journal of the agent and of the programs that work for it.
async fn listen(journal: Journal, teller: Arc<Teller>) {
    let mut told = 0;
    let mut changes = journal.changes();
    loop {
        let entries = journal.since(told, |_| true);
        told += entries.len();
        for entry in entries {
            let who = match (entry.field("SYSLOG_IDENTIFIER"), entry.field("_SYSTEMD_UNIT")) {
                (Some("rebase-agent"), _) => "agent",
                (_, Some("rpm-ostreed.service")) => "rpm-ostree",
                (Some("bootc"), _) => "bootc",
                // Its other output repeats the same facts.
                (_, Some("ostree-finalize-staged.service")) if entry.field("_TRANSPORT") == Some("journal") => "ostree",
                _ => continue,
            };
            teller.line(who, &shorten(entry.message().trim()));
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Shortens digests to twelve digits.
fn shorten(text: &str) -> String {
    let mut parts = text.split("sha256:");
    let mut short = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let digits = part.bytes().take_while(u8::is_ascii_hexdigit).count();
        let (digest, rest) = part.split_at(digits);
        short.push_str(&format!("sha256:{}{rest}", digest.get(..12).unwrap_or(digest)));
    }
    short
}
