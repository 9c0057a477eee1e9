//! Which pages of the image are known to be holes: a bounded cache of the store's extent maps, by region of 1 MiB.
//!
//! The maps are hints with one hard rule: a page that they call a hole reads as zeros on the store. So the end of a
//! write-back clears the bits of its pages, also in a map that was requested before; and a zero or a discard makes its
//! regions unknown.

use crate::units::{ExtentKind, ImageHoles, OpKind, PageNo, PageSpan, SECTORS_PER_PAGE};

use super::store_ops::{Outcome, StoreOp};
use super::{FRAMES_PER_REGION, PageCache, REGION_PAGES, SectorSpan};

/// Words of a region's bitmap.
#[expect(clippy::cast_possible_truncation, reason = "a region has 256 pages")]
const WORDS: usize = REGION_PAGES as usize / u64::BITS as usize;
/// Fewest slots of the table: a tiny cache still knows the holes of the last 16 MiB or more that its guest used.
const SLOTS_MIN: u32 = 16;

/// What is known of a page on the store (NBD, QEMU: block status).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockStatus {
    /// Has to be read.
    Data,
    /// Reads as zeros.
    Hole,
    /// The store has to be asked for a map.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MapState {
    Empty,
    /// A Map is in flight.
    Mapping {
        /// Holes of the region changed since it was requested: its result is of no use.
        stale: bool,
    },
    Known,
    /// The Map failed: all pages count as data, and their space as not allocated.
    Failed,
}

#[derive(Clone, Debug)]
struct MappedRegion {
    number: u64,
    state: MapState,
    /// Known: pages that are holes. Mapping: pages that were written since it was requested.
    bits: [u64; WORDS],
}

/// A direct-mapped table of regions.
#[derive(Debug)]
pub(super) struct Holes {
    /// Whether the image may have holes, and whether the store can report them.
    image: ImageHoles,
    regions: Vec<MappedRegion>,
}

/// A page's bit in the bitmap of its region: the word, and the mask within it.
fn bit(no: PageNo) -> (usize, u64) {
    let index = no.0 % REGION_PAGES;
    let bits = u64::from(u64::BITS);
    ((index / bits) as usize, 1 << (index % bits))
}

impl Holes {
    /// For a cache of `frames` frames.
    pub fn new(image: ImageHoles, frames: u32) -> Self {
        let empty = MappedRegion { number: 0, state: MapState::Empty, bits: [0; WORDS] };
        let slots = (frames / FRAMES_PER_REGION).max(SLOTS_MIN) as usize;
        Self { image, regions: vec![empty; slots] }
    }

    fn index(&self, no: PageNo) -> (u64, usize) {
        let number = no.0 / REGION_PAGES;
        (number, (number % self.regions.len() as u64) as usize)
    }

    fn slot(&mut self, no: PageNo) -> (u64, &mut MappedRegion) {
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
        if !matches!(region.state, MapState::Known | MapState::Failed) || region.number != number {
            return BlockStatus::Unknown;
        }
        let (word, mask) = bit(no);
        if region.bits[word] & mask != 0 { BlockStatus::Hole } else { BlockStatus::Data }
    }

    /// Whether the page is known to have its space on the store.
    pub fn is_data(&self, no: PageNo) -> bool {
        let (number, index) = self.index(no);
        let region = &self.regions[index];
        let (word, mask) = bit(no);
        let known = region.state == MapState::Known && region.number == number;
        self.image != ImageHoles::Possible || known && region.bits[word] & mask == 0
    }

    /// Begins a Map of the region of `no`. False: the region's slot has one in flight.
    fn begin_map(&mut self, no: PageNo) -> bool {
        let (number, region) = self.slot(no);
        if matches!(region.state, MapState::Mapping { .. }) {
            return false;
        }
        *region = MappedRegion { number, state: MapState::Mapping { stale: false }, bits: [0; WORDS] };
        true
    }

    /// The page was written to the store.
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
            MapState::Known | MapState::Failed => region.bits[word] &= !mask,
            MapState::Mapping { .. } => region.bits[word] |= mask,
            MapState::Empty => {}
        }
    }

    /// The holes in the span have changed: makes its regions unknown. From now on the image may have holes, if the
    /// store can report them.
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

    /// The Map of a region has ended, with runs of (sectors, kind) from its first sector on; no runs: it failed.
    fn end_map(&mut self, first: PageNo, runs: &[(u64, ExtentKind)]) {
        let (number, region) = self.slot(first);
        let MapState::Mapping { stale } = region.state else {
            unreachable!("a Map that ends was begun");
        };
        assert_eq!(region.number, number, "a region keeps its slot during a Map");
        if stale {
            region.state = MapState::Empty;
            return;
        }
        let written = std::mem::take(&mut region.bits);
        region.state = if runs.is_empty() { MapState::Failed } else { MapState::Known };
        let mut sector = 0;
        for &(sectors, kind) in runs {
            let end = sector + sectors;
            if kind == ExtentKind::Hole {
                // Only whole pages, but for the image's last one, which the end of the image may cut.
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
        for (holes, written) in region.bits.iter_mut().zip(written) {
            *holes &= !written;
        }
    }

    /// Bytes of memory that the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.regions.capacity() * size_of::<MappedRegion>()
    }
}

impl PageCache {
    /// Asks the store for a map of the region of `no`, unless one is in flight.
    pub(super) fn ask_for_map(&mut self, no: PageNo) {
        if !self.holes.begin_map(no) {
            return;
        }
        let first = PageNo(no.0 / REGION_PAGES * REGION_PAGES);
        self.stats.maps += 1;
        self.submit_op(StoreOp::without_pages(OpKind::Map, self.span_of(first, REGION_PAGES)));
    }

    /// A Map has ended. If it failed, the pages of its region count as data.
    pub(super) fn map_done(&mut self, op: &StoreOp, outcome: &Outcome) {
        let runs: &[(u64, ExtentKind)] = match outcome {
            Outcome::Mapped(runs) => runs,
            _ => &[],
        };
        debug_assert!(runs.is_empty() || runs.iter().map(|run| run.0).sum::<u64>() == op.span.count);
        self.holes.end_map(op.first_page(), runs);
    }

    /// Space in `span` was freed or zeroed on the store.
    pub(super) fn forget_holes(&mut self, span: SectorSpan) {
        self.allocating.forget(span);
        self.holes.forget(span.pages());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION_SECTORS: u64 = REGION_PAGES * SECTORS_PER_PAGE;

    #[test]
    fn a_page_that_is_partly_a_hole_is_data() {
        let mut holes = Holes::new(ImageHoles::Possible, 1024);
        assert_eq!(holes.status(PageNo(3)), BlockStatus::Unknown);
        assert!(holes.begin_map(PageNo(3)));
        assert!(!holes.begin_map(PageNo(4)), "a Map of the same region is in flight");
        // Data up to the middle of page 1, a hole to the middle of page 3, data to the end of the region.
        let rest = REGION_SECTORS - 28;
        holes.end_map(PageNo(0), &[(12, ExtentKind::Data), (16, ExtentKind::Hole), (rest, ExtentKind::Data)]);
        let seen: Vec<_> = (0..5).map(|no| holes.status(PageNo(no))).collect();
        assert_eq!(
            seen,
            [BlockStatus::Data, BlockStatus::Data, BlockStatus::Hole, BlockStatus::Data, BlockStatus::Data]
        );
    }

    #[test]
    fn a_page_written_during_a_map_is_data() {
        let mut holes = Holes::new(ImageHoles::Possible, 1024);
        assert!(holes.begin_map(PageNo(0)));
        holes.mark_data(PageNo(7));
        holes.end_map(PageNo(0), &[(REGION_SECTORS, ExtentKind::Hole)]);
        assert_eq!(holes.status(PageNo(7)), BlockStatus::Data);
        assert_eq!(holes.status(PageNo(8)), BlockStatus::Hole);
        holes.mark_data(PageNo(8));
        assert_eq!(holes.status(PageNo(8)), BlockStatus::Data);
    }

    #[test]
    fn a_map_that_was_under_way_during_a_discard_is_ignored() {
        let mut holes = Holes::new(ImageHoles::Possible, 1024);
        assert!(holes.begin_map(PageNo(0)));
        holes.forget(PageSpan::new(PageNo(10), 1));
        holes.end_map(PageNo(0), &[(REGION_SECTORS, ExtentKind::Data)]);
        assert_eq!(holes.status(PageNo(0)), BlockStatus::Unknown);
    }

    #[test]
    fn the_partial_last_page_of_an_image_can_be_a_hole() {
        let mut holes = Holes::new(ImageHoles::Possible, 1024);
        assert!(holes.begin_map(PageNo(0)));
        // An image of 2 pages and 3 sectors, all a hole.
        holes.end_map(PageNo(0), &[(19, ExtentKind::Hole)]);
        assert_eq!(holes.status(PageNo(2)), BlockStatus::Hole);
        assert_eq!(holes.status(PageNo(3)), BlockStatus::Data);
    }
}
