//! A small fleet in virtual time: the rollout keeps its goal only with prefetch, the spread saves the registry, and idle
//! nodes are a light load for the API server. tests/fleet measures large ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::disallowed_methods, reason = "they are disallowed in the agent, not in its tests")]

#[allow(dead_code, reason = "tests/fleet prints the other figures")]
#[path = "support/fleet/herd.rs"]
mod herd;
#[path = "support/fleet/rollout.rs"]
mod rollout;

use std::time::Duration;

use rebase_agent::decide::limits::MINUTE;
use rollout::{Hint, Plan};

const PLAN: Plan = Plan {
    nodes: 20,
    unavailable: 1,
    pull: 10 * MINUTE,
    drain: 5 * MINUTE,
    reboot: 5 * MINUTE,
    spread: 15 * MINUTE,
    hint: Hint::Pool,
};

#[test]
fn rollout_takes_drains_and_reboots_and_one_pull() {
    for seed in 0..5 {
        for unavailable in [1, 2] {
            let plan = Plan { unavailable, ..PLAN };
            let with = plan.simulate(seed).unwrap();
            assert!(with.took <= plan.goal(), "{} min of {}", with.took / MINUTE, plan.goal() / MINUTE);
            assert_eq!(with.pulls.len(), plan.nodes, "each node pulls once");
        }
    }
}

#[test]
fn rollout_without_prefetch_pulls_in_every_turn() {
    let without = Plan { hint: Hint::None, ..PLAN };
    let took = without.simulate(1).unwrap().took;
    assert!(took >= 20 * 20 * MINUTE && took > without.goal(), "{} min", took / MINUTE);
}

#[test]
fn pulls_are_spread_although_all_nodes_hear_of_the_image_at_once() {
    let at_once = Plan { nodes: 100, hint: Hint::Annotation, ..PLAN };
    let spread = at_once.simulate(1).unwrap().worst_minute();
    let together = Plan { spread: 0, ..at_once }.simulate(1).unwrap().worst_minute();
    assert!(together == 100 && spread <= 20, "{together} pulls in a minute without spread, {spread} with it");
}

#[tokio::test(start_paused = true)]
async fn idle_nodes_ask_rarely_and_come_back_one_after_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let herd = herd::measure(16, directory.path()).await.unwrap();
    let reads = herd.node.requests + herd.pool.requests;
    assert!(reads <= 30.0, "{reads} requests of a node in an hour: {herd:#?}");
    assert!(herd.node.requests > 15.0 && herd.pool.requests > 1.0, "{herd:#?}");
    assert!(herd.restart.spread >= Duration::from_secs(30), "{herd:#?}");
    assert!(herd.restart.requests <= 10 && herd.update.requests <= 10, "{herd:#?}");
}
