//! Growth of a simulated world's image: the disk grows between any two steps, and the daemon grows its image later, or
//! dies before that. The next daemon serves the image with its present size.

use crate::prng::Prng;
use crate::units::{ImageHoles, SECTORS_PER_PAGE};

use super::{Guest, World};

/// Of 1000 steps, the number that make the disk larger, and the number that let a daemon apply a growth.
const GROW_PER_MILLE: u64 = 8;
const APPLY_PER_MILLE: u64 = 100;
/// Of 100 daemons, the number that find a larger disk than their predecessors.
const BETWEEN_LIVES_PERCENT: u64 = 10;
/// Maximum number of times that an image grows.
const GROWTHS_MAX: u32 = 20;
/// Of 100 sizes, the number that are a multiple of the page: a daemon can only grow from one such size to another.
const WHOLE_PAGES_PERCENT: u64 = 95;
/// Largest growth in sectors: up to a page, some pages, and more than a region of the hole map.
const SECTORS_MAX: [u64; 3] = [8, 100, 1200];

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Growth {
    prng: Prng,
    /// Of 100 added pages, the number that are holes.
    hole_percent: u64,
    times_left: u32,
    /// First sector of the part that was added last.
    added_at: u64,
}

impl Growth {
    pub fn new(seed: u64) -> Self {
        let mut prng = Prng::new(seed ^ 0x6772_6f77);
        let hole_percent = prng.pick(&[0, 50, 100]);
        Self { prng, hole_percent, times_left: GROWTHS_MAX, added_at: 0 }
    }
}

/// Whether a size in sectors is a whole number of pages.
fn is_whole_pages(sectors: u64) -> bool {
    sectors.is_multiple_of(SECTORS_PER_PAGE)
}

impl World {
    /// The world for a seed, with an image that grows; in some worlds, an operator also freezes the cache.
    pub fn with_growth(seed: u64) -> Self {
        let world = if seed.is_multiple_of(4) { Self::with_freezes(seed) } else { Self::new(seed) };
        Self { growth: Some(Growth::new(seed)), ..world }
    }

    /// In some cases, the start of a request of this many sectors near the former end of the image.
    pub(super) fn start_near_old_end(&mut self, count: u64) -> Option<u64> {
        let growth = self.growth.as_ref()?;
        let start = growth.added_at.saturating_sub(count / 2).min(self.capacity() - count);
        self.prng.percent(20).then_some(start)
    }

    /// Number of sectors that the daemon serves.
    pub(super) fn served_sectors(&self) -> u64 {
        self.settings.image_sectors - self.base
    }

    /// In some steps, the disk grows, or the daemon applies the growth, or the disk shrinks.
    pub(super) fn change_disk_size(&mut self, guest: Guest) {
        self.shrink_or_advance(guest);
        let Some(growth) = &mut self.growth else { return };
        if growth.prng.below(1000) < GROW_PER_MILLE {
            self.grow_disk();
        } else if growth.prng.below(1000) < APPLY_PER_MILLE {
            self.apply_growth();
        }
    }

    /// Makes the disk larger; the added part may be holes, zeros, or other data.
    fn grow_disk(&mut self) {
        let Some(growth) = self.growth.as_mut().filter(|growth| growth.times_left > 0) else { return };
        growth.times_left -= 1;
        let before = self.disk.sectors() as u64;
        let most = growth.prng.pick(&SECTORS_MAX);
        let mut after = before + growth.prng.between(1, most);
        if growth.prng.percent(WHOLE_PAGES_PERCENT) {
            after = after.next_multiple_of(SECTORS_PER_PAGE);
        }
        let has_data = growth.prng.percent(50);
        if has_data {
            self.version += 1;
        }
        let version = if has_data { self.version } else { 0 };
        let can_map = self.settings.holes != ImageHoles::Unmappable;
        let hole_percent = if can_map { growth.hole_percent } else { 0 };
        let added = self.disk.grow(after as usize, version, |_| growth.prng.percent(hole_percent));
        self.oracle.grow(&added);
        growth.added_at = before;
    }

    /// The daemon serves the disk with its present size, if it can grow to it.
    fn apply_growth(&mut self) {
        let (served, present) = (self.served_sectors(), self.disk.sectors() as u64);
        if !self.shrinks.is_shrinking() && present > served && is_whole_pages(served) && is_whole_pages(present) {
            self.settings.image_sectors = self.base + present;
            self.cache.grow(self.settings.image_sectors);
            self.counts.growths += 1;
        }
    }

    /// Between two daemons the disk may grow; the next one serves its present size, and ignores the records of sectors
    /// beyond the old end.
    pub(super) fn grow_between_lives(&mut self) {
        let Some(growth) = &mut self.growth else { return };
        if growth.prng.percent(BETWEEN_LIVES_PERCENT) {
            self.grow_disk();
        }
        let (served, present) = (self.served_sectors(), self.disk.sectors() as u64);
        if present > served {
            self.memory.forget_beyond(self.settings.image_sectors);
            self.settings.image_sectors = self.base + present;
            self.counts.found_larger += 1;
        }
    }
}
