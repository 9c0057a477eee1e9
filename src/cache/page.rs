//! One page: its state bits, who may change them, and the table that finds a page by its number.
//!
//! A page's state is told by its masks (UVM's flags in parentheses):
//!
//! | state   | bits                                  | goes to                                       |
//! |---------|---------------------------------------|-----------------------------------------------|
//! | Absent  | not in the table                      | Reading, Dirty                                |
//! | Reading | `READING`: a read-in is in flight     | Clean, Dirty, Absent (PG_BUSY, PG_FAKE)       |
//! | Clean   | dirty and writing empty               | Dirty, Absent (PG_CLEAN)                      |
//! | Dirty   | dirty not empty                       | Writing, Absent (!PG_CLEAN)                   |
//! | Writing | writing not empty: frame frozen       | Clean, Dirty (PG_BUSY in pageout)             |
//!
//! A page can be Reading and Dirty (written while its other sectors are read in), and Writing and Dirty (written again
//! while its frozen frame is on the way to the store). It is never Reading and Writing: two operations on one page
//! would overlap on the store.

use hashbrown::HashTable;

use super::readahead::Period;
use crate::units::{Epoch, FrameId, PageId, PageNo, SectorMask, low_u32};

/// "No frame", "no waiter", "no page" in the packed fields.
pub(super) const NONE: u32 = u32::MAX;

/// A read-in of the page is in flight.
pub(super) const READING: u8 = 1 << 0;
/// The page's frame belongs to a write in flight: a write must take a new frame (stable pages).
pub(super) const FROZEN: u8 = 1 << 1;
/// Brought in by readahead and not asked for yet.
pub(super) const PREFETCHED: u8 = 1 << 2;
/// Reading this page starts the next readahead window.
pub(super) const MARKER: u8 = 1 << 3;
/// The last write-back of the page failed: it is retried alone, after a pause.
pub(super) const FAILED: u8 = 1 << 4;
/// Written to the store and not yet covered by a good Sync: not evictable. One bit for the writes that the Sync in
/// flight covers and one for those it does not; `flush.rs` says which is which.
pub(super) const UNSYNCED: [u8; 2] = [1 << 5, 1 << 6];
/// Written by a guest since the cursor of write-back last passed; meaningful while dirty.
pub(super) const RECENT: u8 = 1 << 7;

/// What is told of a frame to the memory behind it, so that a successor can take the page over if the daemon dies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Sectors whose bytes in the frame are right.
    pub valid: SectorMask,
    /// Sectors that the store may not have, or not durably; among the valid ones.
    pub dirty: SectorMask,
}

impl Record {
    /// Of a frame that holds nothing.
    pub const NONE: Self = Self { valid: SectorMask::NONE, dirty: SectorMask::NONE };
}

/// A page of the image in memory: 24 bytes, so that the metadata of a cache stays below 1.5 % of it.
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

    /// The memory of the page; none while its first read-in is in flight.
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
    pub fn record(&self) -> Record {
        if self.frame == NONE {
            return Record::NONE;
        }
        let unsynced = self.any(UNSYNCED[0] | UNSYNCED[1]);
        let dirty = if unsynced { self.valid } else { self.dirty.or(self.writing) };
        Record { valid: self.valid.without(self.pending).or(dirty), dirty }
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
/// => The slot that became free first is taken first: pages that follow each other came in, and go, together, and lie side
///    by side as long as nothing comes between them.
#[derive(Debug)]
pub(super) struct PageTable {
    slots: Vec<Page>,
    /// The next slot to be taken, and the last, chained by `waiters`; [`NONE`] where none is free.
    free: u32,
    free_last: u32,
    resident: u32,
    index: HashTable<u32>,
}

/// Pages in a row that have places in a row in the index, as a power of two.
const ROW_BITS: u32 = 3;

/// Multiplicative hash of a row of pages; the upper bits of the product are well mixed, so fold them down.
///
/// => The low bits say where the index looks first, the highest ones are the fingerprint that it compares there. Pages
///    that follow each other come and go together: a row of them takes one line of the index, and no two have the same
///    fingerprint.
fn hash(no: PageNo) -> u64 {
    let (row, place) = (no.0 >> ROW_BITS, no.0 & ((1 << ROW_BITS) - 1));
    let product = (row ^ row >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = product ^ product >> 32;
    (mixed << ROW_BITS | place) ^ place << (u64::BITS - ROW_BITS)
}

impl PageTable {
    /// A table for at most `pages` pages.
    pub fn new(pages: u32) -> Self {
        let mut slots = vec![Page::new(NOWHERE); pages as usize];
        for (next, slot) in (1..).zip(&mut slots) {
            slot.waiters = if next == pages { NONE } else { next };
        }
        Self { slots, free: 0, free_last: pages - 1, resident: 0, index: HashTable::with_capacity(pages as usize) }
    }

    /// The page with this number, if it is in memory.
    pub fn find(&self, no: PageNo) -> Option<PageId> {
        self.index.find(hash(no), |&id| self.slots[id as usize].no() == no).map(|&id| PageId(id))
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
        let slots = &self.slots;
        self.index.insert_unique(hash(no), id, |&id| hash(slots[id as usize].no()));
        self.resident += 1;
        Some(PageId(id))
    }

    /// Takes a page out of the table.
    pub fn remove(&mut self, id: PageId) {
        let no = self.slots[id.index()].no();
        let entry = self.index.find_entry(hash(no), |&other| other == id.0);
        entry.expect("a page that is removed is in the index").remove();
        self.slots[id.index()] = Page::new(NOWHERE);
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
        self.index.iter().map(|&id| (PageId(id), &self.slots[id as usize]))
    }

    /// Bytes of memory the table takes.
    pub fn metadata_bytes(&self) -> usize {
        // hashbrown: a control byte and an entry for each bucket; buckets are a power of two at most 7/8 full.
        let buckets = (self.slots.len() * 8 / 7).next_power_of_two();
        self.slots.capacity() * size_of::<Page>() + buckets * (size_of::<u32>() + 1)
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
    fn a_page_takes_24_bytes() {
        assert_eq!(size_of::<Page>(), 24);
    }

    #[test]
    fn pages_in_a_row_lie_side_by_side_and_are_told_apart() {
        for row in (0..1000).map(|n: u64| n * n * 8) {
            let hashes: Vec<u64> = (row..row + 8).map(|no| hash(PageNo(no))).collect();
            assert!(hashes.iter().all(|hash| hash & 0xffff == hashes[0] & 0xffff | hash & 7), "{hashes:x?}");
            let mut fingerprints: Vec<u64> = hashes.iter().map(|hash| hash >> 57).collect();
            fingerprints.sort_unstable();
            fingerprints.dedup();
            assert_eq!(fingerprints.len(), 8, "{hashes:x?}");
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
