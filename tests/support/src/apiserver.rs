//! The API server as one node sees it: TLS with client certificates, the node authorizer, `NodeRestriction`, watches
//! with a bounded history, metadata-only objects, managed fields, and every way it can fail. Of other resources it serves what nodes use: the status of MachineConfigNodes,
//! and Events.
//!
//! [`Store`] is the state; controllers and tests write through it without TLS, by the same code path. [`ApiServer`]
//! serves it.

mod error;
mod fields;
mod mcn;
mod serve;
mod store;

pub use error::ApiError;
pub use mcn::Crd;
pub use serve::ApiServer;
pub(crate) use store::rfc3339;
pub use store::{Expired, Fault, RequestRecord, Scope, Snapshot, Store};

#[cfg(test)]
mod tests;
