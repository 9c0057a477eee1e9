//! Space before the write: what a write is about to fill has its space on the store before the write completes (genfs'
//! GOP_ALLOC), so that a completed write never fails later for lack of it.
//!
//! Space is asked for a region of 1 MiB at a time, ahead of the writer. Regions that have it are remembered in a table of
//! bounded size; for one that was forgotten the store is asked again, which costs little.

use crate::units::{Fault, OpKind, PageNo, SectorSpan, low_u32};

use super::store_health::Cause;
use super::store_ops::{Outcome, StoreOp};
use super::{PageCache, PlantedBug, REGION_PAGES};

/// No region.
const NONE: u32 = u32::MAX;
/// Least number of regions that are remembered: so many that the quotient of the last one on any image fits 32 bits.
const REGIONS_MIN: u32 = 256;

/// Whether a page has its space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    /// It has.
    There,
    /// The store is being asked.
    Wait,
    /// There is none.
    Refused(Fault),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Allocating {
    /// Regions with their space, each in the one place where it can be: the remainder of its number. What stands there is
    /// the quotient; [`NONE`]: nothing.
    reserved: Vec<u32>,
    /// Regions that the store is being asked for, and whether space was given back there meanwhile.
    asked: Vec<(u64, bool)>,
    /// The store can't.
    unsupported: bool,
    /// The operator has been last_reported so.
    last_reported: bool,
}

impl Allocating {
    /// For a cache of `frames` frames: a region for every 64 frames, so a cache of a quarter of the image remembers all.
    pub fn new(frames: u32) -> Self {
        let regions = (frames / 64).max(REGIONS_MIN) as usize;
        Self { reserved: vec![NONE; regions], asked: Vec::new(), unsupported: false, last_reported: false }
    }

    /// Where a region's place is, and what stands there if the region has its space.
    fn place_of(&self, region: u64) -> (usize, u32) {
        let places = self.reserved.len() as u64;
        (low_u32(region % places) as usize, low_u32(region / places))
    }

    /// The region has its space.
    fn remember(&mut self, region: u64) {
        let (place, quotient) = self.place_of(region);
        self.reserved[place] = quotient;
    }

    /// Whether the region is known to have its space.
    fn knows(&self, region: u64) -> bool {
        let (place, quotient) = self.place_of(region);
        self.reserved[place] == quotient
    }

    /// Space in the span was given back.
    pub fn forget(&mut self, span: SectorSpan) {
        let pages = span.pages();
        let touched = pages.first.0 / REGION_PAGES..pages.end().0.div_ceil(REGION_PAGES);
        let places = self.reserved.len() as u64;
        for (place, quotient) in (0..).zip(&mut self.reserved) {
            if *quotient != NONE && touched.contains(&(u64::from(*quotient) * places + place)) {
                *quotient = NONE;
            }
        }
        for (region, stale) in &mut self.asked {
            *stale |= touched.contains(region);
        }
    }

    /// Whether the store can't reserve space, and nobody has been last_reported.
    pub fn take_refusal(&mut self) -> bool {
        self.unsupported && !std::mem::replace(&mut self.last_reported, true)
    }

    /// Bytes of memory the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.reserved.capacity() * size_of::<u32>()
    }
}

impl PageCache {
    /// Whether a page may be written, as far as its space goes. `resumed`: whoever asks has waited for the answer.
    pub(super) fn space_for(&mut self, no: PageNo, resumed: bool) -> Space {
        if self.planted(PlantedBug::SpaceIsTakenForGranted) {
            return Space::There;
        }
        if !self.settings.allocate || self.allocating.unsupported || self.holes.is_data(no) {
            return Space::There;
        }
        let region = no.0 / REGION_PAGES;
        if self.allocating.knows(region) {
            return Space::There;
        }
        if self.allocating.asked.iter().any(|&(asked, _)| asked == region) {
            return Space::Wait;
        }
        match self.health.space_refused() {
            Some(fault) if resumed => return Space::Refused(fault),
            _ if self.health.holding() && !self.health.may_retry(self.now) => return Space::Wait,
            _ => {}
        }
        self.allocating.asked.push((region, false));
        self.stats.allocations += 1;
        let span = self.span_of(PageNo(region * REGION_PAGES), REGION_PAGES);
        self.store_ops.submit(StoreOp::without_pages(OpKind::Allocate, span));
        Space::Wait
    }

    /// The store has answered.
    pub(super) fn allocate_done(&mut self, op: &StoreOp, outcome: &Outcome) {
        let region = op.first_page().0 / REGION_PAGES;
        let index = self.allocating.asked.iter().position(|&(asked, _)| asked == region);
        let (_, stale) = self.allocating.asked.swap_remove(index.expect("an answer comes for a region asked for"));
        match outcome.fault() {
            Some(Fault::Unsupported) => self.allocating.unsupported = true,
            Some(fault) => self.store_failed(fault, Cause::Allocate),
            None => {
                self.health.clear_failure(Cause::Allocate);
                if !stale {
                    self.allocating.remember(region);
                }
            }
        }
    }

    /// Writes that are held for want of space try again when the pause is over.
    pub(super) fn retry_allocations(&mut self) {
        if self.health.waits_for_space() && self.health.may_retry(self.now) {
            self.stalled.unblock();
        }
    }
}
