//! The image grows: another process makes it larger between any two steps, and the daemon is notified later, or dies
//! before that. The next daemon serves it with its present size.

use super::super::guest::{SECTORS_MAX, written};
use super::World;
use crate::prng::Prng;
use crate::units::{ImageHoles, SECTOR_BYTES, SECTORS_PER_PAGE};

/// Of 1000 steps, the number that make the disk larger, and the number that notify a daemon of a growth.
const GROW_PER_MILLE: u64 = 4;
const APPLY_PER_MILLE: u64 = 50;
/// Of 100 daemons, the number that find a larger disk than their predecessors.
const BETWEEN_LIVES_PERCENT: u64 = 10;
/// How often an image grows at most, and by how many sectors.
const GROWTHS_MAX: u32 = 10;
const ADDED_MAX: [u64; 3] = [8, 64, 600];
/// Of 100 sizes, the number that are a multiple of the page: a daemon can only grow from one such size to another.
const WHOLE_PAGES_PERCENT: u64 = 90;

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Growth {
    prng: Prng,
    /// Of 100 added pages, the number that are holes.
    hole_percent: u64,
    times_left: u32,
    /// First sector of the part that was added last.
    added_at: u64,
    /// Number of sectors that the last daemon served.
    served: u64,
}

impl Growth {
    /// The growth of an image of `served` sectors.
    pub fn new(seed: u64, served: u64) -> Self {
        let mut prng = Prng::new(seed ^ 0x6772_6f77);
        let hole_percent = prng.pick(&[0, 50, 100]);
        Self { prng, hole_percent, times_left: GROWTHS_MAX, added_at: 0, served }
    }
}

/// Whether a size in sectors is a whole number of pages.
fn is_whole_pages(sectors: u64) -> bool {
    sectors.is_multiple_of(SECTORS_PER_PAGE)
}

impl World {
    /// In some steps, the disk grows, or the daemon is notified.
    pub fn grow_or_apply(&mut self) {
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
        let before = self.image.values().len() as u64;
        let most = growth.prng.pick(&ADDED_MAX);
        let mut after = before + growth.prng.between(1, most);
        // An image of large blocks ends at the end of a block.
        if self.settings.block_sectors > 1 || growth.prng.percent(WHOLE_PAGES_PERCENT) {
            after = after.next_multiple_of(SECTORS_PER_PAGE);
        }
        let number = if growth.prng.percent(50) { self.next_id } else { 0 };
        self.next_id += 1;
        let value = |sector| if number == 0 { 0 } else { written(number, sector) };
        let values: Vec<_> = (before..after).map(value).collect();
        let can_map = self.settings.holes != ImageHoles::Unmappable;
        let hole_percent = if can_map { growth.hole_percent } else { 0 };
        self.image.grow(&values, |_| growth.prng.percent(hole_percent));
        self.oracle.grow(&values);
        if let Some(backup) = &mut self.backup {
            backup.extend(&values);
        }
        growth.added_at = before;
        self.directory.grow_image(after * SECTOR_BYTES);
    }

    /// The daemon serves the disk with its present size, if it can grow to it.
    fn apply_growth(&mut self) {
        let (served, present) = (self.settings.image_sectors, self.image.values().len() as u64);
        let Some(life) = self.life.as_ref().filter(|_| present > served) else { return };
        if is_whole_pages(served) && is_whole_pages(present) {
            match life.grow(present * SECTOR_BYTES) {
                Ok(()) => {
                    self.settings.image_sectors = present;
                    self.record_served();
                }
                Err(_) => self.daemon_died(),
            }
        }
    }

    /// Between two daemons the disk may grow; the next one serves it with its present size.
    pub fn find_growth(&mut self) {
        let Some(growth) = &mut self.growth else { return };
        if growth.prng.percent(BETWEEN_LIVES_PERCENT) {
            self.grow_disk();
        }
        self.serve_whole_image();
    }

    /// Records the size with which a daemon serves the image.
    pub fn record_served(&mut self) {
        let sectors = self.settings.image_sectors;
        self.directory.keep_growth();
        self.growth.iter_mut().for_each(|growth| growth.served = sectors);
    }

    fn serve_whole_image(&mut self) {
        self.settings.image_sectors = self.image.values().len() as u64;
        self.image.serve_all();
    }

    /// Whether the image has grown since the last daemon served it.
    pub fn has_grown(&self) -> bool {
        self.growth.as_ref().is_some_and(|growth| growth.served < self.image.values().len() as u64)
    }

    /// The next daemon cannot determine whether the cache belongs to the image: the operator restores the image's old
    /// size.
    pub fn undo_growth(&mut self) {
        let served = self.growth.as_ref().expect("the image has grown").served;
        self.image.shrink(served);
        self.oracle.shrink(served);
        if let Some(backup) = &mut self.backup {
            backup.truncate(served as usize);
        }
        self.directory.undo_growth(served * SECTOR_BYTES);
        self.serve_whole_image();
    }

    /// Start of a request, near the former end of the image.
    pub fn start_near_old_end(&mut self) -> Option<u64> {
        let growth = self.growth.as_mut().filter(|growth| growth.added_at > 0)?;
        let start = (growth.added_at + growth.prng.below(SECTORS_MAX)).saturating_sub(SECTORS_MAX / 2);
        growth.prng.percent(20).then_some(start.min(self.settings.image_sectors - 1))
    }
}
