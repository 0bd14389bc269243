//! The rebase agent.
