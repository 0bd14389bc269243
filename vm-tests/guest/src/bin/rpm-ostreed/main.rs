//! A stand-in for rpm-ostree's daemon, which Debian does not have: its interface over real work. The sysroot is loaded
//! before the name is claimed, and an idle daemon exits.

mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use guest::Said;
use rpm_ostreed::bus::Failure;
use rpm_ostreed::{Daemon, Deployment, Happened, Host};
use tokio::process::Command;
use tokio::sync::mpsc;
use zbus::Connection;

use work::Worker;

/// Without clients and transaction, the daemon exits after this long.
const IDLE: Duration = Duration::from_secs(60);

/// This machine.
struct Machine;

type Transaction = rpm_ostreed::Transaction<Machine>;

impl Host for Machine {
    type Lock = Worker;

    async fn load(&self) -> Vec<Deployment> {
        match load().await {
            Ok(deployments) => deployments,
            Err(error) => {
                eprintln!("reading the sysroot: {error:#}");
                std::process::exit(1)
            }
        }
    }

    async fn lock(&self) -> Result<Worker, Failure> {
        work::lock().await
    }

    async fn work(&self, transaction: &Arc<Transaction>, worker: Worker) -> Result<(), String> {
        let (said, mut saying) = mpsc::unbounded_channel();
        let (cancel, outcome) = worker.start(transaction.job().clone(), said);
        let mut cancel = Some(cancel);
        loop {
            tokio::select! {
                text = transaction.cancelled(), if cancel.is_some() => {
                    let _ = cancel.take().map(|cancel| cancel.send(text));
                }
                said = saying.recv() => match said {
                    Some(Said::Message(text)) => transaction.message(&text).await,
                    Some(Said::TaskBegin(text)) => transaction.task_begin(&text).await,
                    Some(Said::TaskEnd(text)) => transaction.task_end(&text).await,
                    None => break,
                },
            }
        }
        outcome.await.unwrap_or_else(|_| Err("the transaction's thread died".to_owned()))
    }

    async fn reboot(&self) {
        match Command::new("systemctl").arg("reboot").status().await {
            Ok(status) if status.success() => {}
            Ok(status) => eprintln!("systemctl reboot: {status}"),
            Err(error) => eprintln!("systemctl reboot: {error}"),
        }
    }

    fn socket(&self) -> PathBuf {
        "/run/rpm-ostree-transaction.sock".into()
    }

    fn hear(&self, happened: Happened<'_>) {
        match happened {
            Happened::Requested(_) => {}
            Happened::Started(txn) => println!("Initiated txn {} for {}: {}", txn.method, txn.client, txn.title),
            Happened::Said(text) | Happened::Logged(text) => println!("{text}"),
            Happened::Finished(txn, None) => println!("Txn {} on {} successful", txn.method, txn.object),
            Happened::Finished(txn, Some(text)) => println!("Txn {} on {} failed: {text}", txn.method, txn.object),
        }
    }
}

async fn load() -> Result<Vec<Deployment>> {
    tokio::task::spawn_blocking(work::load).await?
}

#[tokio::main]
async fn main() -> Result<()> {
    load().await.context("Opening the sysroot")?;
    let daemon = Arc::new(Daemon::new(Machine));
    daemon.start(Connection::system().await?).await?;
    // Idle for long enough: exit, to be activated again.
    loop {
        let changed = tokio::time::timeout(IDLE, daemon.changed()).await;
        if changed.is_err() && daemon.is_idle() {
            println!("In idle state; will auto-exit");
            daemon.stop().await;
            return Ok(());
        }
    }
}
