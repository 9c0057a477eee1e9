//! The operator limits the guest's rate, and changes the limits at any time.

use super::World;
use crate::device::limits::{RateLimit, RateLimits};
use crate::prng::Prng;

/// The present limits, and the requests that they allow.
#[derive(Debug)]
pub(super) struct LimitedRate {
    prng: Prng,
    limits: RateLimits,
    /// When they were set, and the number of requests that had completed then.
    from_us: u64,
    completed: u64,
    /// Upper bound of the number of requests that were taken before.
    taken: u64,
}

impl LimitedRate {
    /// Limits, in a third of the worlds.
    pub fn new(seed: u64) -> Option<Self> {
        let prng = Prng::new(seed ^ 0x11317);
        let limits = RateLimits::default();
        (seed % 3 == 1).then_some(Self { prng, limits, from_us: 0, completed: 0, taken: 0 })
    }

    fn choose(&mut self) {
        let mut limit = || RateLimit {
            requests: self.prng.pick(&[0, 0, 500, 20_000]),
            bytes: self.prng.pick(&[0, 0, 1 << 20, 50 << 20]),
        };
        let (read, write, total) = (limit(), limit(), limit());
        self.limits = RateLimits { read, write, total, burst_ms: self.prng.pick(&[10, 1000]) };
    }
}

impl World {
    /// Occasionally the operator sets other limits.
    pub fn change_limits(&mut self) {
        if let Some(limited) = &mut self.limited
            && self.life.is_some()
            && limited.prng.below(200) == 0
        {
            limited.choose();
            self.set_limits();
        }
    }

    /// Applies the limits, to a new daemon or after a change.
    pub fn set_limits(&mut self) {
        let in_flight = self.rings.iter().map(|ring| ring.in_flight() as u64).sum();
        if let (Some(limited), Some(life)) = (&mut self.limited, &self.life) {
            life.device.limiter.set(&limited.limits);
            life.workers.wake();
            (limited.from_us, limited.completed, limited.taken) = (self.now_us, self.limited_completed, in_flight);
        }
    }

    /// A request that counts against the limits has completed.
    pub fn check_limits(&mut self) {
        self.limited_completed += 1;
        let Some(LimitedRate { limits, from_us, completed, taken, .. }) = &self.limited else { return };
        let rate = limits.total.requests;
        let us = self.now_us - from_us + u64::from(limits.burst_ms) * 1000;
        // Each ring may have one more request: tokens of a stopped ring are returned.
        let allowed = taken + rate * us / 1_000_000 + self.rings.len() as u64 + 1;
        let count = self.limited_completed - completed;
        assert!(rate == 0 || count <= allowed, "{count} requests in {us} us with a limit of {rate}/s");
    }
}
