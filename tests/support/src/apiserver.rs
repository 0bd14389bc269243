//! The API server as one node sees it: TLS with client certificates, the node authorizer, `NodeRestriction`, watches
//! with a bounded history, metadata-only objects, managed fields, and every way it can fail.
//!
//! [`Store`] is the state; controllers and tests write through it without TLS, by the same code path. [`ApiServer`]
//! serves it.

mod error;
mod fields;
mod serve;
mod store;

pub use error::ApiError;
pub use serve::ApiServer;
pub use store::{Expired, Fault, RequestRecord, Scope, Snapshot, Store};

#[cfg(test)]
mod tests;
