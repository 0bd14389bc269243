//! The rebase agent: observe, decide, act, report.
//!
//! Only `host` speaks D-Bus, only `cluster` speaks HTTP, and only `trust` reads a signature policy.
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "tests lay out the files that the agent only reads"))]

pub mod agent;
pub mod backoff;
pub mod cli;
pub mod cluster;
pub mod commands;
pub mod confine;
pub mod decide;
pub mod files;
pub mod host;
pub mod journal;
pub mod kernel_arguments;
pub mod lane;
pub mod model;
pub mod observe;
pub mod report;
#[cfg(test)]
#[path = "../tests/support/src/skip.rs"]
mod skip;
pub mod text;
pub mod time;
pub mod trust;
