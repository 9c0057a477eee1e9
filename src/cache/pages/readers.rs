//! Which reader's pages are in memory, where several devices read one image: fair shares of the cache.
//!
//! Each page counts for one reader: the one that brought it in, or one with a free share that asked for it later. While
//! a reader has more than its share, the pages of readers that have not are not evicted. So a reader that scans the
//! image, or uses more of it than fits, evicts its own pages. A reader that has left has no share: the others have it.

use crate::units::{PageId, low_u32};

/// Readers that are told apart; all later ones count as one.
const READERS_MAX: usize = 256;

/// See the module.
#[derive(Debug)]
pub(super) struct Readers {
    /// The reader for which each slot's page counts.
    of: Vec<u8>,
    /// Pages of the cache, of which each reader has a share.
    capacity: u32,
    /// Pages of each reader.
    pages: Vec<u32>,
    /// Whether each reader uses the image at present.
    present: Vec<bool>,
    /// The reader whose request the cache handles.
    current: u8,
}

impl Readers {
    /// `count` readers of a cache of `capacity` pages with so many slots. Pages that are in memory already count for
    /// the first reader.
    pub fn new(count: usize, slots: u32, capacity: u32, resident: u32) -> Self {
        let mut pages = vec![0; count.min(READERS_MAX)];
        pages[0] = resident;
        let present = vec![true; pages.len()];
        Self { of: vec![0; slots as usize], capacity, pages, present, current: 0 }
    }

    /// There are `slots` slots from now on, no fewer than before.
    pub fn add_slots(&mut self, slots: u32) {
        self.of.resize(self.of.len().max(slots as usize), 0);
    }

    /// The cache is to have `capacity` pages.
    pub fn set_capacity(&mut self, capacity: u32) {
        self.capacity = capacity;
    }

    /// There are `count` readers now, no fewer than before.
    pub fn set_count(&mut self, count: usize) {
        self.pages.resize(count.clamp(self.pages.len(), READERS_MAX), 0);
        self.present.resize(self.pages.len(), true);
    }

    /// A reader leaves, or one with the same number comes back. Several that count as one never leave.
    pub fn set_present(&mut self, reader: usize, is_present: bool) {
        if reader + 1 < READERS_MAX
            && let Some(present) = self.present.get_mut(reader)
        {
            *present = is_present;
        }
    }

    /// The requests that follow are this reader's.
    pub fn set_current(&mut self, reader: usize) {
        self.current = u8::try_from(reader.min(self.pages.len() - 1)).expect("256 readers at most");
    }

    /// Pages of which each reader may be sure that is present.
    fn share(&self) -> u32 {
        let readers = self.present.iter().filter(|present| **present).count();
        low_u32(u64::from(self.capacity) / readers.max(1) as u64)
    }

    /// Pages of which this reader may be sure.
    fn share_of(&self, reader: u8) -> u32 {
        if self.present[usize::from(reader)] { self.share() } else { 0 }
    }

    /// A page is inserted for the current reader.
    pub fn insert(&mut self, id: PageId) {
        self.of[id.index()] = self.current;
        self.pages[usize::from(self.current)] += 1;
    }

    /// A page is removed.
    pub fn remove(&mut self, id: PageId) {
        self.pages[usize::from(self.of[id.index()])] -= 1;
    }

    /// The current reader uses a page: it counts for that one now, if it has a free share and the other has not.
    pub fn touch(&mut self, id: PageId) {
        let (owner, current) = (self.of[id.index()], self.current);
        let (of_owner, of_current) = (self.share_of(owner), self.share_of(current));
        if owner != current
            && self.pages[usize::from(owner)] > of_owner
            && self.pages[usize::from(current)] < of_current
        {
            self.remove(id);
            self.insert(id);
        }
    }

    /// Whether a reader has more than its share, so that the pages of the others are protected.
    pub fn protect(&self) -> bool {
        let share = self.share();
        self.pages.iter().zip(&self.present).any(|(&pages, &present)| present && pages > share)
    }

    /// Whether a page counts for a reader that has no more than its share.
    pub fn is_within_share(&self, id: PageId) -> bool {
        let reader = self.of[id.index()];
        self.pages[usize::from(reader)] <= self.share_of(reader)
    }

    /// Bytes of memory that this takes.
    pub fn metadata_bytes(&self) -> usize {
        self.of.capacity() + self.pages.capacity() * size_of::<u32>()
    }
}
