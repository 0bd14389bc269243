//! The agent's facts, as plain data. Depends on no other module and has no effects.

pub mod annotations;
mod decision;
mod host;
mod image;
mod node;
mod reason;

pub use decision::{Action, Annotate, Fault, Now, Observed, Reading, Work};
pub use host::{Backend, BootId, Deployment, HostFacts, Inhibitor, MachineFacts, Transaction, UnitState};
pub use image::{
    Digest, ImageFacts, PinnedImage, Pullspec, ReferenceError, is_image, is_named, is_staged, name_of, parse,
};
pub use node::{Attempt, LastUpdate, NodeFacts, NodeState, OtherWriter, Verified};
pub use reason::{Reason, Severity};

pub use crate::text::printable;
