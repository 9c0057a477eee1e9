//! Fair shares of the cache if several devices (readers) use one image.
//!
//! Each page counts for one reader: the one for which it was read in, or one with a free share that requested it later.
//! While a reader exceeds its share, the pages of readers within theirs are not evicted. So a reader that scans the
//! image, or whose working set does not fit, evicts its own pages. A detached reader has no share: the others divide
//! it.

use crate::units::{PageId, low_u32};

/// Readers that are counted separately; all later ones count as one.
const READERS_MAX: usize = 256;

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct ReaderShares {
    /// The reader for which each slot's page counts.
    reader_of_slot: Vec<u8>,
    /// Pages of the cache, to be divided into shares.
    capacity: u32,
    /// Pages of each reader.
    pages: Vec<u32>,
    /// Whether each reader uses the image at present.
    present: Vec<bool>,
    /// The reader whose request the cache is handling.
    current: u8,
}

impl ReaderShares {
    /// `count` readers of a cache of `capacity` pages with `slots` slots. Pages that are already in memory count for
    /// the first reader.
    pub fn new(count: usize, slots: u32, capacity: u32, resident: u32) -> Self {
        let mut pages = vec![0; count.min(READERS_MAX)];
        pages[0] = resident;
        let present = vec![true; pages.len()];
        Self { reader_of_slot: vec![0; slots as usize], capacity, pages, present, current: 0 }
    }

    /// Sets the number of slots, which never decreases.
    pub fn add_slots(&mut self, slots: u32) {
        self.reader_of_slot.resize(self.reader_of_slot.len().max(slots as usize), 0);
    }

    /// Sets the number of pages of the cache.
    pub fn set_capacity(&mut self, capacity: u32) {
        self.capacity = capacity;
    }

    /// Sets the number of readers, which never decreases.
    pub fn set_count(&mut self, count: usize) {
        self.pages.resize(count.clamp(self.pages.len(), READERS_MAX), 0);
        self.present.resize(self.pages.len(), true);
    }

    /// A reader detaches, or one with the same number attaches again. Readers that count as one never detach.
    pub fn set_present(&mut self, reader: usize, is_present: bool) {
        if reader + 1 < READERS_MAX
            && let Some(present) = self.present.get_mut(reader)
        {
            *present = is_present;
        }
    }

    /// Sets the reader that sends the following requests.
    pub fn set_current(&mut self, reader: usize) {
        self.current = u8::try_from(reader.min(self.pages.len() - 1)).expect("256 readers at most");
    }

    /// Pages that each present reader is guaranteed.
    fn share(&self) -> u32 {
        let readers = self.present.iter().filter(|present| **present).count();
        low_u32(u64::from(self.capacity) / readers.max(1) as u64)
    }

    /// Pages that this reader is guaranteed.
    fn share_of(&self, reader: u8) -> u32 {
        if self.present[usize::from(reader)] { self.share() } else { 0 }
    }

    /// A page is inserted for the current reader.
    pub fn insert(&mut self, id: PageId) {
        self.reader_of_slot[id.index()] = self.current;
        self.pages[usize::from(self.current)] += 1;
    }

    /// A page is removed.
    pub fn remove(&mut self, id: PageId) {
        self.pages[usize::from(self.reader_of_slot[id.index()])] -= 1;
    }

    /// The current reader uses a page. The page now counts for it if it has a free share and the other reader does not.
    pub fn touch(&mut self, id: PageId) {
        let (owner, current) = (self.reader_of_slot[id.index()], self.current);
        let (of_owner, of_current) = (self.share_of(owner), self.share_of(current));
        if owner != current
            && self.pages[usize::from(owner)] > of_owner
            && self.pages[usize::from(current)] < of_current
        {
            self.remove(id);
            self.insert(id);
        }
    }

    /// Whether a reader exceeds its share, so that the pages of the others are protected.
    pub fn protect(&self) -> bool {
        let share = self.share();
        self.pages.iter().zip(&self.present).any(|(&pages, &present)| present && pages > share)
    }

    /// Whether a page counts for a reader that is within its share.
    pub fn is_within_share(&self, id: PageId) -> bool {
        let reader = self.reader_of_slot[id.index()];
        self.pages[usize::from(reader)] <= self.share_of(reader)
    }

    /// Bytes of memory that the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.reader_of_slot.capacity() + self.pages.capacity() * size_of::<u32>()
    }
}
