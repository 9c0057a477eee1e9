//! Shrinks of a simulated world's image: between any two steps an operator may start to make it smaller. The guest
//! sends no more requests beyond the new end; once the earlier ones have completed and everything is flushed, the
//! daemon uses the image only up to there, and the disk is cut. Or the cut fails, and the daemon uses the whole image
//! again: then nothing may be lost. The daemon may die at any time.

use crate::units::{SECTORS_PER_PAGE, SectorSpan};

use super::super::operations::GuestOp;
use super::{Guest, World};

/// Of 1000 steps, the number in which a shrink begins.
const SHRINK_PER_MILLE: u64 = 6;
/// Of 100 shrinks, the number whose cut fails.
const CUT_FAILS_PERCENT: u64 = 30;
/// The operator gives up after this many steps.
const STEPS_MAX: u64 = 400;
/// Smallest size, in sectors.
const SECTORS_MIN: u64 = 64;
/// Largest part that is cut: some pages, and more than a region of the hole map.
const CUT_SECTORS_MAX: [u64; 3] = [8, 200, 2500];

/// A shrink in progress.
#[derive(Clone, Copy, Debug)]
struct Shrink {
    /// The new size in sectors.
    to: u64,
    since_step: u64,
    /// The daemon that shrinks.
    daemon: u64,
}

/// See the documentation of the module.
#[derive(Debug, Default)]
pub(super) struct Shrinks {
    current: Option<Shrink>,
    /// Number of daemons that have started.
    pub daemons: u64,
}

impl Shrinks {
    pub fn is_shrinking(&self) -> bool {
        self.current.is_some()
    }
}

impl World {
    /// Number of sectors that the daemon reports to the guest.
    pub(super) fn capacity(&self) -> u64 {
        self.shrinks.current.map_or(self.served_sectors(), |shrink| shrink.to)
    }

    /// In some steps, a shrink begins or advances.
    pub(super) fn shrink_or_advance(&mut self, guest: Guest) {
        if self.growth.is_none() || self.scenario.freezes {
            return;
        }
        // A daemon that died, or stopped, has forgotten it.
        let daemon = self.shrinks.daemons;
        self.shrinks.current = self.shrinks.current.filter(|shrink| shrink.daemon == daemon);
        match self.shrinks.current {
            Some(_) if guest == Guest::Waiting => self.give_up_shrink(),
            None if guest == Guest::Waiting => {}
            Some(shrink) => self.advance_shrink(shrink),
            None if self.prng.below(1000) < SHRINK_PER_MILLE => self.begin_shrink(),
            None => {}
        }
    }

    fn begin_shrink(&mut self) {
        let served = self.served_sectors();
        let is_whole = served == self.disk.sectors() as u64 && served.is_multiple_of(SECTORS_PER_PAGE);
        if self.is_reader() || !is_whole || served < 2 * SECTORS_MIN {
            return;
        }
        let most = self.prng.pick(&CUT_SECTORS_MAX).min(served - SECTORS_MIN);
        let cut = self.prng.between(SECTORS_PER_PAGE, most).next_multiple_of(SECTORS_PER_PAGE);
        let to = served - cut.min(served - SECTORS_MIN);
        self.shrinks.current = Some(Shrink { to, since_step: self.step, daemon: self.shrinks.daemons });
        self.cache.announce_shrink(Some(self.base + to));
    }

    fn advance_shrink(&mut self, Shrink { to, since_step, .. }: Shrink) {
        if self.step - since_step > STEPS_MAX {
            return self.give_up_shrink();
        }
        let is_in_use = self.requests.values().any(|request| request.span.end() > to);
        if is_in_use || self.memory.has_crashed() {
            return;
        }
        self.cache.drop_beyond_end(0, u32::MAX);
        let has_shrunk = self.cache.shrink().is_some();
        if self.memory.has_crashed() {
            return;
        }
        if has_shrunk {
            self.end_shrink(to);
        } else if !self.requests.values().any(|request| matches!(request.op, GuestOp::Flush)) {
            self.submit_request(GuestOp::Flush, SectorSpan::new(0, 0));
        }
    }

    fn give_up_shrink(&mut self) {
        self.cache.announce_shrink(None);
        self.shrinks.current = None;
    }

    /// The daemon uses the image only up to sector `to`.
    fn end_shrink(&mut self, to: u64) {
        self.shrinks.current = None;
        let before = self.settings.image_sectors;
        if self.prng.percent(CUT_FAILS_PERCENT) {
            self.counts.uncut += 1;
            return self.cache.grow(before);
        }
        self.disk.cut(to as usize);
        self.oracle.cut(to as usize);
        self.requests.values_mut().for_each(|request| request.known.cut(to as usize));
        self.settings.image_sectors = self.base + to;
        self.counts.cuts += 1;
    }
}
