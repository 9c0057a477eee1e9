//! The ghost queue: the recently evicted pages, in four bytes each.

use crate::units::{PageNo, low_u16, low_u32};

/// Entries of a set; a new entry replaces the oldest one of its set. With eight, nearly all ghosts live out their
/// lifetime, and a lookup stays in one cache line.
const WAYS: usize = 8;
/// Ticks of the clock during as many evictions as the table has entries: the resolution of a lifetime.
const AGE_STEPS: u32 = 256;

/// A set-associative table of entries with 16 bits of fingerprint and 16 bits of time; 0 is an empty entry.
///
/// Time is measured in evictions, so that a lifetime is a number of pages.
#[derive(Debug)]
pub(super) struct Ghost {
    sets: Vec<[u32; WAYS]>,
    /// Number of pages inserted.
    inserted: u32,
    /// Insertions in a tick of the clock.
    tick_pages: u32,
    life_ticks: u32,
    /// Random, so that a guest cannot choose pages of the same set.
    key: u64,
}

impl Ghost {
    /// A table for the ghosts of `pages` pages; `key` is random.
    pub fn new(pages: u32, key: u64) -> Self {
        let sets = vec![[0; WAYS]; (pages as usize).div_ceil(WAYS).max(1)];
        Self { sets, inserted: 0, tick_pages: (pages / AGE_STEPS).max(1), life_ticks: AGE_STEPS, key }
    }

    /// Makes room for the ghosts of `pages` pages. A larger table starts empty.
    pub fn set_pages(&mut self, pages: u32) {
        if (pages as usize).div_ceil(WAYS) > self.sets.len() {
            *self = Self::new(pages, self.key);
        }
    }

    /// Sets the lifetime of a ghost: until `pages` more pages are inserted.
    pub fn set_life(&mut self, pages: u32) {
        self.life_ticks = pages / self.tick_pages;
    }

    /// Bytes of memory that the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.sets.capacity() * size_of::<[u32; WAYS]>()
    }

    /// Inserts a page that is being evicted.
    pub fn insert(&mut self, no: PageNo) {
        let (set, fingerprint) = self.place(no);
        let now = self.now();
        let age = |entry: u32| if entry == 0 { u32::MAX } else { age_ticks(now, entry) };
        let oldest = self.sets[set].iter_mut().max_by_key(|entry| age(**entry)).expect("a set has entries");
        *oldest = u32::from(fingerprint) << 16 | u32::from(now);
        self.inserted = self.inserted.wrapping_add(1);
    }

    /// Removes the page's ghost. Returns whether there was one within its lifetime.
    pub fn take(&mut self, no: PageNo) -> bool {
        let (set, fingerprint) = self.place(no);
        let (now, life) = (self.now(), self.life_ticks);
        let Some(entry) = self.sets[set].iter_mut().find(|entry| **entry >> 16 == u32::from(fingerprint)) else {
            return false;
        };
        age_ticks(now, std::mem::take(entry)) <= life
    }

    /// The set of a page, and its fingerprint, which is never 0. The hash is like the finalizer of SplitMix64 (Steele
    /// et al., OOPSLA 2014), with its multipliers.
    fn place(&self, no: PageNo) -> (usize, u16) {
        let mixed = (no.0 ^ no.0 >> 29 ^ self.key).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let set = (u64::from(low_u32(mixed >> 32)) * self.sets.len() as u64) >> 32;
        let fingerprint = low_u16(mixed.wrapping_mul(0x94d0_49bb_1331_11eb) >> 48);
        (usize::try_from(set).expect("below the table's length"), fingerprint.max(1))
    }

    fn now(&self) -> u16 {
        low_u16(u64::from(self.inserted / self.tick_pages))
    }
}

/// Ticks since an entry was made.
fn age_ticks(now: u16, entry: u32) -> u32 {
    u32::from(now.wrapping_sub(low_u16(u64::from(entry))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearly_all_ghosts_live_exactly_their_lifetime() {
        let mut ghost = Ghost::new(10_000, 0);
        ghost.set_life(9000);
        (0..20_000).for_each(|page| ghost.insert(PageNo(page)));
        let alive = (12_000..20_000).filter(|&page| ghost.take(PageNo(page))).count();
        assert!(alive > 7600, "{alive} of the last 8000");
        let dead = (0..10_000).filter(|&page| ghost.take(PageNo(page))).count();
        assert!(dead < 10, "{dead} of the first 10000");
        assert!(!ghost.take(PageNo(19_999)), "a ghost is taken only once");
    }
}
