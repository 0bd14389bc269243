//! Backoff and jitter of retries. Pure but for [`random`].

/// Exponential backoff in milliseconds: `first`, doubled by every further failure, up to `cap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    first: u64,
    cap: u64,
}

impl Backoff {
    /// For transient failures: the network, a busy daemon.
    pub const TRANSIENT: Self = Self { first: 5_000, cap: 5 * 60_000 };
    /// For refusals, which only a change of policy, image or node can lift. Retried, because the agent may not notice that
    /// change.
    pub const REFUSAL: Self = Self { first: 10 * 60_000, cap: 10 * 60_000 };
    /// For writes that the API server refuses until a person acts, or until another controller has created the object.
    pub const CLUSTER_REFUSAL: Self = Self { first: 60_000, cap: 60 * 60_000 };
    /// For requests to the API server.
    pub const CLUSTER: Self = Self { first: 1_000, cap: 60_000 };

    /// The delay after `failures` failures in a row; 0 after none.
    #[must_use]
    pub fn delay(self, failures: u32) -> u64 {
        match failures.checked_sub(1) {
            None => 0,
            Some(doublings) => self.first.saturating_mul(1u64.checked_shl(doublings).unwrap_or(u64::MAX)).min(self.cap),
        }
    }
}

/// Adds up to a quarter to `delay`. `random` is uniform over all of `u64`.
#[must_use]
pub fn jittered(delay: u64, random: u64) -> u64 {
    delay.saturating_add(random.checked_rem(delay / 4 + 1).unwrap_or(0))
}

/// A time in `0..=delay`, uniformly distributed, so that nodes that start together do not send requests together.
#[must_use]
pub fn full_jitter(delay: u64, random: u64) -> u64 {
    random.checked_rem(delay.saturating_add(1)).unwrap_or(0)
}

/// A random number that is good enough to spread nodes: the standard library seeds every hasher from the kernel.
#[must_use]
pub fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_cap() {
        let delays: Vec<_> = (0..9).map(|n| Backoff::CLUSTER.delay(n)).collect();
        assert_eq!(delays, [0, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]);
        assert_eq!(Backoff::TRANSIENT.delay(u32::MAX), 5 * 60_000);
    }

    #[test]
    fn jitter_stays_in_its_interval() {
        for random in [0, 1, 250, 251, u64::MAX] {
            assert!((1_000..=1_250).contains(&jittered(1_000, random)));
            assert!(full_jitter(1_000, random) <= 1_000);
        }
        assert_eq!(jittered(u64::MAX, u64::MAX), u64::MAX);
        assert_eq!(full_jitter(0, 7), 0);
    }
}
