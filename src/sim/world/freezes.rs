//! Freezes of a simulated world: at any step a host's operator may freeze the cache, or thaw it.

use crate::units::SectorSpan;

use super::{Guest, GuestOp, Scenario, World};

/// Of 1000 steps, the number that start a freeze if there is none, or end one.
const BEGIN_PER_MILLE: u64 = 10;
const END_PER_MILLE: u64 = 8;
/// How long a freeze may last, in microseconds.
const TIMES_US: [u64; 3] = [50, 10_000, 10_000_000];

impl World {
    /// The world for a seed, with an operator that freezes the cache.
    pub fn with_freezes(seed: u64) -> Self {
        let world = Self::new(seed);
        Self { scenario: Scenario { freezes: true, ..world.scenario }, ..world }
    }

    /// Starts or ends a freeze, in some steps.
    ///
    /// => None starts while the guest waits for its requests: each freeze makes the cache retry immediately on a
    ///    failing disk, and the hold time of requests passes only in pauses.
    pub(super) fn freeze_or_thaw(&mut self, guest: Guest) {
        let freezes = self.requests.values().any(|request| matches!(request.op, GuestOp::Freeze { .. }));
        if self.cache.is_frozen() || freezes {
            if self.prng.below(1000) < END_PER_MILLE {
                self.cache.thaw();
            }
        } else if guest == Guest::Active && self.prng.below(1000) < BEGIN_PER_MILLE {
            let until_us = self.now_us + self.prng.pick(&TIMES_US);
            let holds_reads = self.prng.percent(30);
            self.submit_request(GuestOp::Freeze { until_us, holds_reads }, SectorSpan::new(0, 0));
        }
    }

    /// While the cache is frozen, no sector of the disk may change, and a power cut must lose nothing.
    pub(super) fn check_frozen(&mut self) {
        if !self.cache.is_frozen() {
            self.frozen_disk = None;
            return;
        }
        let sectors = 0..self.disk.sectors();
        let current: Vec<u32> = sectors.map(|sector| self.disk.read(sector)).collect();
        match &self.frozen_disk {
            Some(before) => {
                let start = &current[..before.len()];
                assert!(*before == start, "the disk has changed while the cache was frozen");
            }
            None => {
                let left = self.check_power_cut();
                // Data of an earlier daemon's writes that a failed Sync has lost cannot be written again.
                let lost = left.iter().zip(&current).position(|(left, current)| left != current);
                let is_durable = lost.is_none() || self.failures.has_failed() || self.failed_unreported;
                assert!(is_durable, "a frozen disk is not durable in sector {lost:?} at step {}", self.step);
                self.counts.freezes += 1;
                self.frozen_disk = Some(current);
            }
        }
    }
}
