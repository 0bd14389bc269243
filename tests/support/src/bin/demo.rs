//! The story of one node, told by the agent itself.

fn main() {}
