//! The rebase agent: observe, decide, act, report.
//!
//! Each directory is one neighbour: nothing outside `host` speaks D-Bus, nothing outside `cluster` HTTP, nothing
//! outside `registry` reads a signature policy.

pub mod decide;
pub mod host;
pub mod model;
pub mod registry;
pub mod report;
pub mod schedule;
