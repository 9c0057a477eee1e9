//! Which pages of the image are known to be holes: a bounded memory of the store's extent maps.
//!
//! The image is looked at in regions of 1 MiB. What is remembered of a region is a hint with one hard rule: a page
//! called a hole reads as zeros on the store. So a write-back that ends clears the bit of its pages, a map that was
//! taken while such a write ended has those pages cleared, and a zero or discard makes the region unknown.

use crate::units::{ExtentKind, ImageHoles, OpKind, PageNo, PageSpan, SECTORS_PER_PAGE};

use super::store_ops::{Outcome, StoreOp};
use super::{PageCache, REGION_PAGES, SectorSpan};

const WORDS: usize = (REGION_PAGES / 64) as usize;

/// What is known of a page's place on the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockStatus {
    /// Must be read.
    Data,
    /// Reads as zeros.
    Hole,
    /// The store has to be asked.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MapState {
    Empty,
    /// The store is being asked; `stale`: the answer will be out of date.
    Mapping {
        stale: bool,
    },
    Known,
    /// The store could not say: taken for data.
    Guessed,
}

#[derive(Clone, Debug)]
struct Region {
    number: u64,
    state: MapState,
    /// Known: pages that are holes. Mapping: pages that have become data meanwhile.
    bits: [u64; WORDS],
}

/// A direct-mapped table of regions.
#[derive(Debug)]
pub(super) struct Holes {
    image: ImageHoles,
    regions: Vec<Region>,
}

fn bit(no: PageNo) -> (usize, u64) {
    let index = no.0 % REGION_PAGES;
    ((index / 64) as usize, 1 << (index % 64))
}

impl Holes {
    /// For a cache of `frames` frames: one region for every 64 frames, so a cache of 1 % of the image knows it all.
    pub fn new(image: ImageHoles, frames: u32) -> Self {
        let empty = Region { number: 0, state: MapState::Empty, bits: [0; WORDS] };
        Self { image, regions: vec![empty; (frames / 64).max(16) as usize] }
    }

    fn index(&self, no: PageNo) -> (u64, usize) {
        let number = no.0 / REGION_PAGES;
        (number, (number % self.regions.len() as u64) as usize)
    }

    fn slot(&mut self, no: PageNo) -> (u64, &mut Region) {
        let (number, index) = self.index(no);
        (number, &mut self.regions[index])
    }

    /// What is known of a page.
    pub fn status(&self, no: PageNo) -> BlockStatus {
        if self.image != ImageHoles::Possible {
            return BlockStatus::Data;
        }
        let (number, index) = self.index(no);
        let region = &self.regions[index];
        if !matches!(region.state, MapState::Known | MapState::Guessed) || region.number != number {
            return BlockStatus::Unknown;
        }
        let (word, mask) = bit(no);
        if region.bits[word] & mask != 0 { BlockStatus::Hole } else { BlockStatus::Data }
    }

    /// Whether the page is known to have its space.
    pub fn is_data(&self, no: PageNo) -> bool {
        let (number, index) = self.index(no);
        let region = &self.regions[index];
        let (word, mask) = bit(no);
        let known = region.state == MapState::Known && region.number == number;
        self.image != ImageHoles::Possible || known && region.bits[word] & mask == 0
    }

    /// Whether the region of `no` may be asked for now; then it counts as being asked.
    fn begin_map(&mut self, no: PageNo) -> bool {
        let (number, region) = self.slot(no);
        if matches!(region.state, MapState::Mapping { .. }) {
            return false;
        }
        *region = Region { number, state: MapState::Mapping { stale: false }, bits: [0; WORDS] };
        true
    }

    /// The page has been written on the store.
    pub fn mark_data(&mut self, no: PageNo) {
        if self.image != ImageHoles::Possible {
            return;
        }
        let (number, region) = self.slot(no);
        if region.number != number {
            return;
        }
        let (word, mask) = bit(no);
        match region.state {
            MapState::Known | MapState::Guessed => region.bits[word] &= !mask,
            MapState::Mapping { .. } => region.bits[word] |= mask,
            MapState::Empty => {}
        }
    }

    /// Holes have come or gone in the span: ask again. The image may have holes from now on, if the store can tell of them.
    pub fn forget(&mut self, span: PageSpan) {
        if self.image == ImageHoles::NoneYet {
            self.image = ImageHoles::Possible;
        }
        let mut number = span.first.0 / REGION_PAGES;
        while number * REGION_PAGES < span.end().0 {
            let (_, region) = self.slot(PageNo(number * REGION_PAGES));
            if region.number == number {
                match &mut region.state {
                    MapState::Mapping { stale } => *stale = true,
                    state => *state = MapState::Empty,
                }
            }
            number += 1;
        }
    }

    /// The store's answer for a region: runs of (sectors, hole) from its first sector; an empty answer means all data.
    fn learn(&mut self, first: PageNo, runs: &[(u64, ExtentKind)]) {
        let (number, region) = self.slot(first);
        let MapState::Mapping { stale } = region.state else {
            unreachable!("an answer comes for a region that was asked for");
        };
        assert_eq!(region.number, number, "a region that is being asked for keeps its slot");
        if stale {
            region.state = MapState::Empty;
            return;
        }
        let became_data = std::mem::take(&mut region.bits);
        region.state = if runs.is_empty() { MapState::Guessed } else { MapState::Known };
        let mut sector = 0;
        for &(sectors, kind) in runs {
            let end = sector + sectors;
            if kind == ExtentKind::Hole {
                // Whole pages only; the image's last page may be cut short.
                for page in sector.div_ceil(SECTORS_PER_PAGE)..end.div_ceil(SECTORS_PER_PAGE) {
                    let is_tail = end < (page + 1) * SECTORS_PER_PAGE;
                    if !is_tail || end == runs.iter().map(|run| run.0).sum::<u64>() {
                        let (word, mask) = bit(PageNo(page));
                        region.bits[word] |= mask;
                    }
                }
            }
            sector = end;
        }
        for (holes, data) in region.bits.iter_mut().zip(became_data) {
            *holes &= !data;
        }
    }

    /// Bytes of memory the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.regions.capacity() * size_of::<Region>()
    }
}

impl PageCache {
    /// Asks the store for the extents round `no`, unless it is being asked already.
    pub(super) fn ask_for_map(&mut self, no: PageNo) {
        if !self.holes.begin_map(no) {
            return;
        }
        let first = PageNo(no.0 / REGION_PAGES * REGION_PAGES);
        self.stats.maps += 1;
        self.store_ops.submit(StoreOp::without_pages(OpKind::Map, self.span_of(first, REGION_PAGES)));
    }

    /// The store has answered; a failed answer takes everything for data.
    pub(super) fn map_done(&mut self, op: &StoreOp, outcome: &Outcome) {
        let runs: &[(u64, ExtentKind)] = match outcome {
            Outcome::Mapped(runs) => runs,
            _ => &[],
        };
        debug_assert!(runs.is_empty() || runs.iter().map(|run| run.0).sum::<u64>() == op.span.count);
        self.holes.learn(op.first_page(), runs);
    }

    /// Space in `span` was given back or zeroed on the store.
    pub(super) fn forget_holes(&mut self, span: SectorSpan) {
        self.allocating.forget(span);
        self.holes.forget(span.pages());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_of_a_hole_are_holes() {
        let mut holes = Holes::new(ImageHoles::Possible, 1024);
        assert_eq!(holes.status(PageNo(3)), BlockStatus::Unknown);
        assert!(holes.begin_map(PageNo(3)));
        assert!(!holes.begin_map(PageNo(4)), "asked already");
        // Data up to the middle of page 1, a hole to the middle of page 3, data to the end of the region.
        holes.learn(PageNo(0), &[(12, ExtentKind::Data), (16, ExtentKind::Hole), (2048 - 28, ExtentKind::Data)]);
        let seen: Vec<_> = (0..5).map(|no| holes.status(PageNo(no))).collect();
        assert_eq!(
            seen,
            [BlockStatus::Data, BlockStatus::Data, BlockStatus::Hole, BlockStatus::Data, BlockStatus::Data]
        );
    }

    #[test]
    fn a_page_written_while_the_map_was_taken_is_data() {
        let mut holes = Holes::new(ImageHoles::Possible, 1024);
        assert!(holes.begin_map(PageNo(0)));
        holes.mark_data(PageNo(7));
        holes.learn(PageNo(0), &[(2048, ExtentKind::Hole)]);
        assert_eq!(holes.status(PageNo(7)), BlockStatus::Data);
        assert_eq!(holes.status(PageNo(8)), BlockStatus::Hole);
        holes.mark_data(PageNo(8));
        assert_eq!(holes.status(PageNo(8)), BlockStatus::Data);
    }

    #[test]
    fn a_map_that_a_discard_overtook_is_thrown_away() {
        let mut holes = Holes::new(ImageHoles::Possible, 1024);
        assert!(holes.begin_map(PageNo(0)));
        holes.forget(PageSpan::new(PageNo(10), 1));
        holes.learn(PageNo(0), &[(2048, ExtentKind::Data)]);
        assert_eq!(holes.status(PageNo(0)), BlockStatus::Unknown);
    }

    #[test]
    fn the_cut_tail_page_of_an_image_can_be_a_hole() {
        let mut holes = Holes::new(ImageHoles::Possible, 1024);
        assert!(holes.begin_map(PageNo(0)));
        // An image of 2 pages and 3 sectors, all a hole.
        holes.learn(PageNo(0), &[(19, ExtentKind::Hole)]);
        assert_eq!(holes.status(PageNo(2)), BlockStatus::Hole);
        assert_eq!(holes.status(PageNo(3)), BlockStatus::Data);
    }
}
