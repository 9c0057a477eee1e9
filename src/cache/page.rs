//! One page: its state bits, who may change them, and the table that finds a page by its number.
//!
//! A page's state is last_reported by its masks (UVM's flags in parentheses):
//!
//! | state   | bits                                  | goes to                                       |
//! |---------|---------------------------------------|-----------------------------------------------|
//! | Absent  | not in the table                      | Reading, Dirty                                |
//! | Reading | `READING`: a read-in is in op     | Clean, Dirty, Absent (PG_BUSY, PG_FAKE)       |
//! | Clean   | dirty and writing empty               | Dirty, Absent (PG_CLEAN)                      |
//! | Dirty   | dirty not empty                       | Writing, Absent (!PG_CLEAN)                   |
//! | Writing | writing not empty: frame frozen       | Clean, Dirty (PG_BUSY in pageout)             |
//!
//! A page can be Reading and Dirty (written while its other sectors are read in), and Writing and Dirty (written again
//! while its frozen frame is on the way to the store). It is never Reading and Writing: two operations on one page
//! would overlap on the store.

use super::readahead::Period;
use crate::units::{Epoch, FrameId, FrameRecord, PageId, PageNo, SectorMask, low_u32};

/// "No frame", "no waiter", "no page" in the packed fields.
pub(super) const NONE: u32 = u32::MAX;

/// A read-in of the page is in op.
pub(super) const READING: u8 = 1 << 0;
/// The page's frame belongs to a write in op: a write must take a new frame (stable pages).
pub(super) const FROZEN: u8 = 1 << 1;
/// Brought in by readahead and not asked for yet.
pub(super) const PREFETCHED: u8 = 1 << 2;
/// Reading this page starts the next readahead window.
pub(super) const MARKER: u8 = 1 << 3;
/// The last write-back of the page failed: it is retried alone, after a pause.
pub(super) const FAILED: u8 = 1 << 4;
/// Written to the store and not yet covered by a good Sync: not evictable. One bit for the writes that the Sync in
/// op covers and one for those it does not; `flush.rs` says which is which.
pub(super) const UNSYNCED: [u8; 2] = [1 << 5, 1 << 6];
/// Written by a guest since the cursor of write-back last passed; meaningful while dirty.
pub(super) const RECENT: u8 = 1 << 7;

/// A page of the image in memory: 28 bytes, so that the metadata of a cache stays below 1.5 % of it.
#[derive(Clone, Debug)]
pub(super) struct Page {
    no_low: u32,
    no_high: u16,
    /// Writers that hold a pin and have not committed.
    pub writers: u8,
    /// Sectors those writers are filling.
    pub pending: SectorMask,
    frame: u32,
    /// Epoch of the first un-flushed write; meaningful while dirty. See [`Page::period`] for what else it holds.
    pub epoch: Epoch,
    /// First waiter for the page, or [`NONE`].
    pub waiters: u32,
    /// The next page with the same place in the index, or [`NONE`].
    next: u32,
    /// Sectors whose bytes in the frame are right.
    pub valid: SectorMask,
    /// Sectors newer than the store.
    pub dirty: SectorMask,
    /// Sectors on their way to the store.
    pub writing: SectorMask,
    flags: u8,
}

impl Page {
    fn new(no: PageNo) -> Self {
        let no_high = u16::try_from(no.0 >> 32).expect("an image has fewer than 2^48 pages");
        Self {
            no_low: low_u32(no.0),
            no_high,
            writers: 0,
            pending: SectorMask::NONE,
            frame: NONE,
            epoch: Epoch(0),
            waiters: NONE,
            next: NONE,
            valid: SectorMask::NONE,
            dirty: SectorMask::NONE,
            writing: SectorMask::NONE,
            flags: 0,
        }
    }

    /// Where the page lies on the image.
    pub fn no(&self) -> PageNo {
        PageNo(u64::from(self.no_high) << 32 | u64::from(self.no_low))
    }

    /// The memory of the page; none while its first read-in is in op.
    pub fn frame(&self) -> Option<FrameId> {
        (self.frame != NONE).then_some(FrameId(self.frame))
    }

    /// Gives the page its memory.
    pub fn set_frame(&mut self, frame: FrameId) {
        self.frame = frame.0;
    }

    /// Of a page that is [`PREFETCHED`], and so not dirty: when it was read ahead.
    pub fn period(&self) -> Period {
        Period(self.epoch.0)
    }

    /// The page is read ahead now.
    pub fn set_period(&mut self, period: Period) {
        self.epoch = Epoch(period.0);
    }

    /// Whether all the flags in `flags` are set.
    pub fn is(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// Sets `flags`.
    pub fn set(&mut self, flags: u8) {
        self.flags |= flags;
    }

    /// Clears `flags`.
    pub fn clear(&mut self, flags: u8) {
        self.flags &= !flags;
    }

    /// Whether any of the flags in `flags` is set.
    pub fn any(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// Whether an operation or a writer holds the page: it may be neither evicted nor dropped.
    pub fn busy(&self) -> bool {
        self.is(READING) || !self.writing.is_empty() || self.writers > 0 || self.waiters != NONE
    }

    /// What a successor would have to know of the page.
    ///
    /// => Clean sectors that a writer is filling are not valid: if it never ends, the store has the bytes to go by. Dirty
    ///    ones stay, for nobody else has anything.
    pub fn record(&self) -> FrameRecord {
        if self.frame == NONE {
            return FrameRecord::empty(self.no());
        }
        let unsynced = self.any(UNSYNCED[0] | UNSYNCED[1]);
        let dirty = if unsynced { self.valid } else { self.dirty.or(self.writing) };
        FrameRecord { page: self.no(), valid: self.valid.without(self.pending).or(dirty), dirty }
    }

    /// Invariants of a single page (I5, and the combinations the state table forbids).
    pub fn check(&self) {
        assert!(self.valid.contains(self.dirty), "{:?}: dirty sectors are valid: {self:?}", self.no());
        assert!(self.frame != NONE || self.valid.is_empty(), "{:?}: valid needs a frame: {self:?}", self.no());
        assert!(!self.is(READING) || self.writing.is_empty(), "{:?}: Reading and Writing", self.no());
        let has_something = !self.dirty.or(self.writing).is_empty();
        assert!(!self.is(FAILED) || has_something, "{:?}: nothing is left to fail: {self:?}", self.no());
        assert!(!self.is(FROZEN) || !self.writing.is_empty(), "{:?}: frozen only while writing", self.no());
        assert!(self.writers > 0 || self.pending.is_empty(), "{:?}: pending needs a writer", self.no());
        assert!(!(self.is(FROZEN) && self.writers > 0), "{:?}: a frozen frame is being written", self.no());
    }
}

/// The number of a slot's page while it has none.
const NOWHERE: PageNo = PageNo((1 << 48) - 1);

/// All pages in memory, found by number. Slots are as many as frames, so inserting never allocates.
///
/// The index is a table of chains through the pages, as UVM's were: it takes what it takes, whatever comes and goes. A
/// table with open addresses fills up with marks of what went, and is put in order all at once, with a pause of 50 ms
/// for a cache of 4 GiB.
///
/// => The slot that became free first is taken first: pages that follow each other came in, and go, together, and lie side
///    by side as long as nothing comes between them.
#[derive(Debug)]
pub(super) struct PageTable {
    slots: Vec<Page>,
    /// The next slot to be taken, and the last, chained by `waiters`; [`NONE`] where none is free.
    free: u32,
    free_last: u32,
    resident: u32,
    index: Vec<Row>,
}

/// Pages that follow each other come and go together: a row of them has places in a row.
const ROW_PAGES: usize = 8;

/// The first page of each of eight chains, or [`NONE`]; in one line of the processor's cache.
#[derive(Clone, Debug)]
#[repr(align(32))]
struct Row([u32; ROW_PAGES]);

impl PageTable {
    /// A table for at most `pages` pages.
    pub fn new(pages: u32) -> Self {
        let mut slots = vec![Page::new(NOWHERE); pages as usize];
        for (next, slot) in (1..).zip(&mut slots) {
            slot.waiters = if next == pages { NONE } else { next };
        }
        let rows = (pages as usize * 3 / 2).div_ceil(ROW_PAGES);
        Self { slots, free: 0, free_last: pages - 1, resident: 0, index: vec![Row([NONE; ROW_PAGES]); rows] }
    }

    /// Where the page's chain begins: the row by a multiplicative hash, whose upper bits are well mixed, and the place in
    /// it by the page's among its neighbours.
    fn place(&self, no: PageNo) -> (usize, usize) {
        let row = no.0 / ROW_PAGES as u64;
        let mixed = (row ^ row >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        // Of pages that are far from each other, all may be the first among their neighbours.
        let in_row = (no.0 ^ mixed) % ROW_PAGES as u64;
        (low_u32((mixed * self.index.len() as u64) >> 32) as usize, low_u32(in_row) as usize)
    }

    /// The first page of the chain at a place, or [`NONE`].
    fn first(&self, (row, in_row): (usize, usize)) -> u32 {
        self.index[row].0[in_row]
    }

    fn set_first(&mut self, (row, in_row): (usize, usize), id: u32) {
        self.index[row].0[in_row] = id;
    }

    /// The pages from `id` on that have the same place.
    fn chain(&self, mut id: u32) -> impl Iterator<Item = (PageId, &Page)> {
        std::iter::from_fn(move || {
            let page = self.slots.get(id as usize)?;
            Some((PageId(std::mem::replace(&mut id, page.next)), page))
        })
    }

    /// The page with this number, if it is in memory.
    pub fn find(&self, no: PageNo) -> Option<PageId> {
        self.chain(self.first(self.place(no))).find(|(_, page)| page.no() == no).map(|(id, _)| id)
    }

    /// As [`PageTable::find`], where the page before it was found in `previous`: most often it lies in the next slot.
    pub fn find_after(&self, previous: Option<PageId>, no: PageNo) -> Option<PageId> {
        let guess = previous.map(|previous| PageId(previous.0 + 1));
        match guess.filter(|guess| self.slots.get(guess.index()).is_some_and(|page| page.no() == no)) {
            None => self.find(no),
            found => found,
        }
    }

    /// Makes a slot for a page that is not in the table; `None` if every slot is taken.
    pub fn insert(&mut self, no: PageNo) -> Option<PageId> {
        debug_assert!(self.find(no).is_none(), "{no:?} is in the table already");
        if self.free == NONE {
            return None;
        }
        let id = self.free;
        let slot = &mut self.slots[id as usize];
        self.free = slot.waiters;
        if self.free == NONE {
            self.free_last = NONE;
        }
        *slot = Page::new(no);
        let place = self.place(no);
        // At the chain's end, which has just been looked at in vain; so what goes, which is old, stands at its beginning.
        match self.chain(self.first(place)).last() {
            Some((last, _)) => self.slots[last.index()].next = id,
            None => self.set_first(place, id),
        }
        self.resident += 1;
        Some(PageId(id))
    }

    /// Takes a page out of the table.
    pub fn remove(&mut self, id: PageId) {
        let place = self.place(self.slots[id.index()].no());
        let next = std::mem::replace(&mut self.slots[id.index()], Page::new(NOWHERE)).next;
        let before = self.chain(self.first(place)).find(|(_, page)| page.next == id.0).map(|(before, _)| before);
        match before {
            Some(before) => self.slots[before.index()].next = next,
            None => self.set_first(place, next),
        }
        match self.free_last {
            NONE => self.free = id.0,
            last => self.slots[last as usize].waiters = id.0,
        }
        self.free_last = id.0;
        self.resident -= 1;
    }

    /// Number of pages in the table.
    pub fn len(&self) -> u32 {
        self.resident
    }

    /// The pages in the table, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (PageId, &Page)> {
        (0..).map(PageId).zip(&self.slots).filter(|(_, page)| page.no() != NOWHERE)
    }

    /// Bytes of memory the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Page>() + self.index.capacity() * size_of::<Row>()
    }
}

impl std::ops::Index<PageId> for PageTable {
    type Output = Page;
    fn index(&self, id: PageId) -> &Page {
        &self.slots[id.index()]
    }
}

impl std::ops::IndexMut<PageId> for PageTable {
    fn index_mut(&mut self, id: PageId) -> &mut Page {
        &mut self.slots[id.index()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_takes_28_bytes() {
        assert_eq!(size_of::<Page>(), 28);
    }

    #[test]
    fn pages_in_a_row_have_places_in_a_row() {
        let table = PageTable::new(1000);
        for first in (0..1000).map(|n: u64| n * n * 8) {
            let (rows, mut places): (Vec<usize>, Vec<usize>) =
                (first..first + 8).map(|no| table.place(PageNo(no))).unzip();
            places.sort_unstable();
            assert_eq!((rows, places), (vec![table.place(PageNo(first)).0; 8], (0..8).collect()));
        }
    }

    #[test]
    fn chains_stay_short_whatever_comes_and_goes() {
        const PAGES: u64 = 10_000;
        let spread: [fn(u64) -> u64; 4] =
            [|n| n, |n| n * 8, |n| n << 18, |n| n.wrapping_mul(0x5851_f42d_4c95_7f2d) >> 24];
        for number in spread {
            let mut table = PageTable::new(low_u32(PAGES));
            for n in 0..4 * PAGES {
                if n >= PAGES {
                    table.remove(table.find(PageNo(number(n - PAGES))).expect("it came in before"));
                }
                table.insert(PageNo(number(n))).expect("a slot is free");
            }
            let steps_to = |no: PageNo| {
                let mut chain = table.chain(table.first(table.place(no)));
                1 + chain.position(|(_, page)| page.no() == no).expect("it is there") as u64
            };
            let steps: u64 = (3 * PAGES..4 * PAGES).map(|n| steps_to(PageNo(number(n)))).sum();
            assert!(steps < 2 * PAGES, "{steps} steps for {PAGES} pages");
            assert_eq!(table.iter().count() as u64, PAGES);
        }
    }

    #[test]
    fn pages_are_found_until_removed_and_slots_are_reused() {
        let mut table = PageTable::new(3);
        let far = PageNo(1 << 40);
        let ids: Vec<_> = [PageNo(0), PageNo(7), far].into_iter().map(|no| table.insert(no).unwrap()).collect();
        assert_eq!(table.insert(PageNo(9)), None, "every slot is taken");
        assert_eq!(table.find(far), Some(ids[2]));
        assert_eq!(table[ids[2]].no(), far);
        table.remove(ids[1]);
        assert_eq!(table.find(PageNo(7)), None);
        assert_eq!(table.insert(PageNo(9)), Some(ids[1]));
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn a_page_is_found_from_the_one_before_it_wherever_it_lies() {
        let mut table = PageTable::new(8);
        let ids: Vec<PageId> = [4, 5, 6, 9].into_iter().map(|no| table.insert(PageNo(no)).unwrap()).collect();
        assert_eq!(table.find_after(Some(ids[0]), PageNo(5)), Some(ids[1]), "in the next slot");
        assert_eq!(table.find_after(Some(ids[3]), PageNo(5)), Some(ids[1]), "elsewhere");
        assert_eq!(table.find_after(None, PageNo(5)), Some(ids[1]));
        assert_eq!(table.find_after(Some(ids[2]), PageNo(7)), None, "another page lies there");
        table.remove(ids[1]);
        assert_eq!(table.find_after(Some(ids[0]), PageNo(5)), None, "it has gone");
        assert_eq!(table.find_after(Some(PageId(7)), PageNo(4)), Some(ids[0]), "there is no next slot");
        // Slots come back in the order in which they became free.
        table.remove(ids[0]);
        let taken: Vec<u32> = (20..26).map(|no| table.insert(PageNo(no)).unwrap().0).collect();
        assert_eq!(taken, [4, 5, 6, 7, 1, 0]);
        assert_eq!(table.insert(PageNo(30)), None);
    }
}
