//! The surroundings of one node in the tests. Real where the real software can be installed (registry, images,
//! signatures, skopeo, D-Bus, TLS); doubles with the faults of the original for the API server and its controllers,
//! rpm-ostreed, bootc, systemd and logind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]
#![allow(clippy::disallowed_methods, reason = "the doubles own the disk that the agent must not write")]

pub mod apiserver;
pub mod bootc;
pub mod booted;
pub mod bus;
pub mod controlplane;
pub mod events;
pub mod gpg;
pub mod hostile_registry;
pub mod image;
pub mod logind;
pub mod machine;
pub mod mcc;
pub mod pki;
pub mod policy;
pub mod proxy;
pub mod registry;
pub mod rpmostreed;
pub mod sign;
pub mod sigstore;
pub mod skip;
pub mod systemd;
pub mod tools;
pub mod trace;
pub mod world;
