//! The host adapter against doubles of rpm-ostree, bootc, systemd and logind on a private bus. Images, signatures,
//! the registry and the pulls are real.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::disallowed_methods, reason = "the tests own the disk that the agent must not write")]

mod backend;
mod bootc;
mod deployments;
mod errors;
mod kernel_arguments;
mod lab;
mod login;
mod transactions;
mod units;
