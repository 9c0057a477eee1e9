//! The known holes of the image: a bounded cache of the store's extent maps, by region of 1 MiB, and of the runs that
//! extend beyond the requested region (`runs.rs`).
//!
//! The maps are hints with one hard rule: a page marked as a hole reads as zeros on the store. So the end of a
//! write-back clears the bits of its pages, also in a map that was requested earlier; and a zero or a discard makes its
//! regions unknown.

use crate::units::{ExtentKind, ImageHoles, OpKind, PageNo, PageSpan, SECTORS_PER_PAGE, Unmap};

use super::runs::Runs;
use super::store_ops::{Outcome, StoreOp};
use super::{FRAMES_PER_REGION, PageCache, REGION_PAGES, REGION_WORDS, SectorSpan, bit_of};

/// Fewest slots of the table: even a tiny cache has the holes of the last 16 MiB or more that its guest used.
const SLOTS_MIN: u32 = 16;

/// The known state of a page on the store (NBD, QEMU: block status).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockStatus {
    /// The page has to be read.
    Data,
    /// The page reads as zeros.
    Hole,
    /// A map has to be requested from the store.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MapState {
    Empty,
    /// A Map is in flight.
    Mapping {
        /// Holes of the region have changed since the Map was requested: its result is discarded.
        stale: bool,
        /// When it was requested, on the clock of [`HoleMap`].
        since: u32,
    },
    Known,
    /// The Map failed: all pages count as data that is not known to be allocated.
    Failed,
}

#[derive(Clone, Debug)]
struct MappedRegion {
    number: u64,
    state: MapState,
    /// Known: pages that are holes. Mapping: pages that were written since it was requested.
    bits: [u64; REGION_WORDS],
}

/// A direct-mapped table of regions.
#[derive(Debug)]
pub(super) struct HoleMap {
    /// Whether the image may have holes, and whether the store can report them.
    image: ImageHoles,
    image_sectors: u64,
    regions: Vec<MappedRegion>,
    runs: Runs,
    /// Counts changes of the store's holes; wraps.
    clock: u32,
    /// When a range was last zeroed or discarded, on that clock: since then, a run of data may have holes.
    freed: u32,
    /// When a page was last written: since then, a hole may have data.
    written: u32,
}

/// The whole pages of a span. If the end of the image lies within its last page, that page counts as whole.
fn whole_pages(span: SectorSpan, image_sectors: u64) -> PageSpan {
    let first = span.start.div_ceil(SECTORS_PER_PAGE);
    let end = if span.end() == image_sectors { span.pages().end().0 } else { span.end() / SECTORS_PER_PAGE };
    PageSpan::new(PageNo(first), end.saturating_sub(first))
}

impl HoleMap {
    /// A map for an image of `image_sectors` sectors, and a cache of `frames` frames.
    pub fn new(image: ImageHoles, image_sectors: u64, frames: u32) -> Self {
        let empty = MappedRegion { number: 0, state: MapState::Empty, bits: [0; REGION_WORDS] };
        let slots = (frames / FRAMES_PER_REGION).max(SLOTS_MIN) as usize;
        let runs = Runs::new(frames);
        Self { image, image_sectors, regions: vec![empty; slots], runs, clock: 0, freed: 0, written: 0 }
    }

    fn index(&self, no: PageNo) -> (u64, usize) {
        let number = no.0 / REGION_PAGES;
        (number, (number % self.regions.len() as u64) as usize)
    }

    fn slot(&mut self, no: PageNo) -> (u64, &mut MappedRegion) {
        let (number, index) = self.index(no);
        (number, &mut self.regions[index])
    }

    /// The known state of a page.
    pub fn status(&self, no: PageNo) -> BlockStatus {
        if self.image != ImageHoles::Possible {
            return BlockStatus::Data;
        }
        let (number, index) = self.index(no);
        let region = &self.regions[index];
        if !matches!(region.state, MapState::Known | MapState::Failed) || region.number != number {
            return match self.runs.kind(no) {
                Some(ExtentKind::Data) => BlockStatus::Data,
                Some(ExtentKind::Hole) => BlockStatus::Hole,
                None => BlockStatus::Unknown,
            };
        }
        let (word, mask) = bit_of(no);
        if region.bits[word] & mask != 0 { BlockStatus::Hole } else { BlockStatus::Data }
    }

    /// Whether the page is known to be data, so that it is allocated on the store.
    pub fn is_data(&self, no: PageNo) -> bool {
        let (number, index) = self.index(no);
        let region = &self.regions[index];
        let (word, mask) = bit_of(no);
        let known = region.state == MapState::Known && region.number == number;
        self.image != ImageHoles::Possible
            || known && region.bits[word] & mask == 0
            || self.runs.kind(no) == Some(ExtentKind::Data)
    }

    /// The pages of the region of `no` that are known to be data; none if the region is unknown.
    pub fn data_pages(&self, no: PageNo) -> [u64; REGION_WORDS] {
        let (number, index) = self.index(no);
        let region = &self.regions[index];
        let known = region.state == MapState::Known && region.number == number;
        if known { region.bits.map(|holes| !holes) } else { [0; REGION_WORDS] }
    }

    /// Starts a Map of the region of `no`. False: the slot of the region already has one in flight.
    fn begin_map(&mut self, no: PageNo) -> bool {
        let since = self.clock;
        let (number, region) = self.slot(no);
        if matches!(region.state, MapState::Mapping { .. }) {
            return false;
        }
        *region = MappedRegion { number, state: MapState::Mapping { stale: false, since }, bits: [0; REGION_WORDS] };
        true
    }

    /// A write to the store has ended: whatever its outcome, its pages may be data now.
    pub fn cut_runs(&mut self, span: PageSpan) {
        if self.image == ImageHoles::Possible {
            self.clock = self.clock.wrapping_add(1);
            self.written = self.clock;
            self.runs.mark_data(span);
        }
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
        let (word, mask) = bit_of(no);
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
            self.runs.record(SectorSpan::new(0, self.image_sectors).pages(), ExtentKind::Data);
        }
        self.clock = self.clock.wrapping_add(1);
        self.freed = self.clock;
        self.runs.cut(span);
        let touched = span.first.0 / REGION_PAGES..span.end().0.div_ceil(REGION_PAGES);
        let make_unknown = |region: &mut MappedRegion| match &mut region.state {
            MapState::Mapping { stale, .. } => *stale = true,
            state => *state = MapState::Empty,
        };
        // Walk the slots or the regions, whichever are fewer.
        if touched.end - touched.start > self.regions.len() as u64 {
            self.regions.iter_mut().filter(|region| touched.contains(&region.number)).for_each(make_unknown);
            return;
        }
        for number in touched {
            let (_, region) = self.slot(PageNo(number * REGION_PAGES));
            if region.number == number {
                make_unknown(region);
            }
        }
    }

    /// The image has grown to `image_sectors` sectors. The state of the region that contains the old end becomes
    /// unknown.
    ///
    /// => Both ends are multiples of a page.
    pub fn grow(&mut self, image_sectors: u64) {
        let end = SectorSpan::new(0, self.image_sectors).pages().end();
        self.forget(PageSpan::new(end, 1));
        self.image_sectors = image_sectors;
    }

    /// The image has shrunk to `image_sectors` sectors.
    ///
    /// => The pages beyond are forgotten. Both ends are multiples of a page.
    pub fn shrink(&mut self, image_sectors: u64) {
        self.image_sectors = image_sectors;
    }

    /// The Map of a region has ended, with runs of (sectors, kind) from its first sector on; no runs: it failed.
    fn end_map(&mut self, first: PageNo, runs: &[(u64, ExtentKind)]) {
        let (freed, written, image_sectors) = (self.freed, self.written, self.image_sectors);
        let (number, region) = self.slot(first);
        let MapState::Mapping { stale, since } = region.state else {
            unreachable!("a Map that ends was begun");
        };
        assert_eq!(region.number, number, "a region keeps its slot during a Map");
        if stale {
            region.state = MapState::Empty;
            return;
        }
        let written_pages = std::mem::take(&mut region.bits);
        region.state = if runs.is_empty() { MapState::Failed } else { MapState::Known };
        let mut last = (PageSpan::new(first, 0), ExtentKind::Data);
        let mut sector = first.0 * SECTORS_PER_PAGE;
        for &(sectors, kind) in runs {
            last = (whole_pages(SectorSpan::new(sector, sectors), image_sectors), kind);
            if kind == ExtentKind::Hole {
                for no in last.0.iter().take_while(|no| no.0 / REGION_PAGES == number) {
                    let (word, mask) = bit_of(no);
                    region.bits[word] |= mask;
                }
            }
            sector += sectors;
        }
        for (holes, written) in region.bits.iter_mut().zip(written_pages) {
            *holes &= !written;
        }
        let (span, kind) = last;
        // An old change may be mistaken for a recent one. That costs another Map.
        let is_since = |changed: u32| changed != since && changed.wrapping_sub(since) < u32::MAX / 2;
        let changed = is_since(freed) || kind == ExtentKind::Hole && is_since(written);
        if span.end().0 > (number + 1) * REGION_PAGES && !changed {
            self.runs.record(span, kind);
        }
    }

    /// Bytes of memory that the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.regions.capacity() * size_of::<MappedRegion>() + self.runs.metadata_bytes()
    }
}

impl PageCache {
    /// Requests a map of the region of `no` from the store, unless one is in flight.
    pub(super) fn request_map(&mut self, no: PageNo) {
        if !self.holes.begin_map(no) {
            return;
        }
        let first = PageNo(no.0 / REGION_PAGES * REGION_PAGES);
        self.stats.maps += 1;
        self.submit_op(StoreOp::without_pages(OpKind::Map, self.span_of(first, REGION_PAGES)));
    }

    /// Records that the whole span is data on the store.
    ///
    /// => Call it only before the first request: later, a zero or discard might have made holes.
    pub fn record_data(&mut self, span: SectorSpan) {
        let pages = whole_pages(span, self.settings.image_sectors);
        if self.holes.image == ImageHoles::Possible && pages.count > 0 {
            self.holes.runs.record(pages, ExtentKind::Data);
        }
    }

    /// A Map has ended. If it failed, the pages of its region count as data.
    pub(super) fn map_done(&mut self, op: &StoreOp, outcome: &Outcome) {
        let runs: &[(u64, ExtentKind)] = match outcome {
            Outcome::Mapped(runs) => runs,
            _ => &[],
        };
        debug_assert!(runs.is_empty() || runs.iter().map(|run| run.0).sum::<u64>() >= op.span.count);
        self.holes.end_map(op.first_page(), runs);
    }

    /// A range operation of this kind has changed the space in `span` on the store.
    pub(super) fn forget_holes(&mut self, span: SectorSpan, kind: OpKind) {
        let frees = matches!(kind, OpKind::Discard | OpKind::Zero { unmap: Unmap::Allowed });
        self.allocating.forget(span.pages(), frees);
        self.holes.forget(span.pages());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION_SECTORS: u64 = REGION_PAGES * SECTORS_PER_PAGE;
    const IMAGE_SECTORS: u64 = 1 << 20;

    fn holes_of(image_sectors: u64) -> HoleMap {
        HoleMap::new(ImageHoles::Possible, image_sectors, 1024)
    }

    #[test]
    fn a_partial_hole_counts_as_data() {
        let mut holes = holes_of(IMAGE_SECTORS);
        assert_eq!(holes.status(PageNo(3)), BlockStatus::Unknown);
        assert!(holes.begin_map(PageNo(3)));
        assert!(!holes.begin_map(PageNo(4)), "a Map of the same region is in flight");
        // Data up to the middle of page 1, a hole up to the middle of page 3, then data to the end of the region.
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
        let mut holes = holes_of(IMAGE_SECTORS);
        assert!(holes.begin_map(PageNo(0)));
        holes.mark_data(PageNo(7));
        holes.end_map(PageNo(0), &[(REGION_SECTORS, ExtentKind::Hole)]);
        assert_eq!(holes.status(PageNo(7)), BlockStatus::Data);
        assert_eq!(holes.status(PageNo(8)), BlockStatus::Hole);
        holes.mark_data(PageNo(8));
        assert_eq!(holes.status(PageNo(8)), BlockStatus::Data);
    }

    #[test]
    fn a_map_in_flight_during_a_discard_is_ignored() {
        let mut holes = holes_of(IMAGE_SECTORS);
        assert!(holes.begin_map(PageNo(0)));
        holes.forget(PageSpan::new(PageNo(10), 1));
        holes.end_map(PageNo(0), &[(REGION_SECTORS, ExtentKind::Data)]);
        assert_eq!(holes.status(PageNo(0)), BlockStatus::Unknown);
    }

    #[test]
    fn the_partial_last_page_of_an_image_can_be_a_hole() {
        let mut holes = holes_of(19);
        assert!(holes.begin_map(PageNo(0)));
        // An image of 2 pages and 3 sectors, all a hole.
        holes.end_map(PageNo(0), &[(19, ExtentKind::Hole)]);
        assert_eq!(holes.status(PageNo(2)), BlockStatus::Hole);
        assert_eq!(holes.status(PageNo(3)), BlockStatus::Data);
    }
    /// A region of the image far beyond the requested one: only a recorded run gives its state.
    const FAR: PageNo = PageNo(50 * REGION_PAGES + 7);

    #[test]
    fn a_run_is_recorded_past_the_end_of_its_region() {
        for (kind, status) in [(ExtentKind::Data, BlockStatus::Data), (ExtentKind::Hole, BlockStatus::Hole)] {
            let mut holes = holes_of(IMAGE_SECTORS);
            assert!(holes.begin_map(PageNo(3)));
            holes.end_map(PageNo(0), &[(IMAGE_SECTORS, kind)]);
            assert_eq!((holes.status(PageNo(3)), holes.status(FAR)), (status, status));
            holes.forget(PageSpan::new(FAR, 1));
            assert_eq!((holes.status(FAR), holes.status(FAR.plus(1))), (BlockStatus::Unknown, status));
        }
    }

    #[test]
    fn a_page_changed_during_a_map_is_unknown_even_in_another_region() {
        for kind in [ExtentKind::Data, ExtentKind::Hole] {
            let mut holes = holes_of(IMAGE_SECTORS);
            assert!(holes.begin_map(PageNo(0)));
            if kind == ExtentKind::Hole {
                holes.cut_runs(PageSpan::new(FAR, 1));
            } else {
                holes.forget(PageSpan::new(FAR, 1));
            }
            holes.end_map(PageNo(0), &[(IMAGE_SECTORS, kind)]);
            assert_eq!(holes.status(FAR), BlockStatus::Unknown, "{kind:?}");
        }
    }

    #[test]
    fn a_page_written_after_a_map_is_no_longer_a_hole() {
        let mut holes = holes_of(IMAGE_SECTORS);
        assert!(holes.begin_map(PageNo(0)));
        holes.end_map(PageNo(0), &[(IMAGE_SECTORS, ExtentKind::Hole)]);
        holes.cut_runs(PageSpan::new(FAR, 1));
        assert_eq!((holes.status(FAR), holes.status(FAR.plus(1))), (BlockStatus::Unknown, BlockStatus::Hole));
    }

    #[test]
    fn a_run_excludes_pages_that_it_covers_only_in_part() {
        let mut holes = holes_of(IMAGE_SECTORS);
        assert!(holes.begin_map(PageNo(0)));
        // The hole ends in the middle of a page.
        holes.end_map(PageNo(0), &[(FAR.0 * SECTORS_PER_PAGE + 4, ExtentKind::Hole)]);
        assert_eq!(holes.status(PageNo(FAR.0 - 1)), BlockStatus::Hole);
        assert_eq!(holes.status(FAR), BlockStatus::Unknown);
    }

    #[test]
    fn forgetting_a_huge_span_takes_no_longer_than_the_size_of_the_table() {
        // 2^40 pages: a walk over their regions would take minutes.
        let sectors = 1 << 43;
        let mut holes = holes_of(sectors);
        let far = PageNo((1 << 40) - 5);
        for no in [PageNo(0), far] {
            assert!(holes.begin_map(no));
            holes.end_map(PageNo(no.0 / REGION_PAGES * REGION_PAGES), &[(REGION_SECTORS, ExtentKind::Hole)]);
            assert_eq!(holes.status(no), BlockStatus::Hole);
        }
        assert!(holes.begin_map(PageNo(REGION_PAGES)));
        holes.forget(PageSpan::new(PageNo(1), (1 << 40) - 1));
        holes.end_map(PageNo(REGION_PAGES), &[(REGION_SECTORS, ExtentKind::Hole)]);
        let seen = [PageNo(0), PageNo(REGION_PAGES), far].map(|no| holes.status(no));
        assert_eq!(seen, [BlockStatus::Unknown; 3]);
    }

    #[test]
    fn the_first_discard_of_an_image_without_holes_makes_only_its_range_unknown() {
        let mut holes = HoleMap::new(ImageHoles::NoneYet, IMAGE_SECTORS, 1024);
        holes.forget(PageSpan::new(PageNo(5), 10));
        assert_eq!((holes.status(PageNo(5)), holes.status(FAR)), (BlockStatus::Unknown, BlockStatus::Data));
    }
}
