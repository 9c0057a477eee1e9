//! Ghosts: the names of pages that left the cache not long ago, in four bytes each.

use crate::units::{PageNo, low_u16, low_u32};

/// An entry can lie in this many places; a new one takes that of the oldest. So nearly all live out their time, and a
/// look-up stays in one cache line.
const WAYS: usize = 8;
/// Ticks of the clock while as many pages leave as the table has entries.
const TICKS: u32 = 256;

/// A table of entries with 16 bits of hash and 16 bits of time.
#[derive(Debug)]
pub(super) struct Ghost {
    sets: Vec<[u32; WAYS]>,
    /// Pages that left.
    left: u32,
    /// Of those, one tick of the clock.
    tick_pages: u32,
    /// Ticks that a ghost lives.
    life: u32,
}

impl Ghost {
    /// Room for the ghosts of `pages` pages.
    pub fn new(pages: u32) -> Self {
        let sets = vec![[0; WAYS]; (pages as usize).div_ceil(WAYS).max(1)];
        Self { sets, left: 0, tick_pages: (pages / TICKS).max(1), life: TICKS }
    }

    /// A ghost lives until so many pages have left after it.
    pub fn set_life(&mut self, pages: u32) {
        self.life = pages / self.tick_pages;
    }

    /// Bytes of memory the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.sets.capacity() * size_of::<[u32; WAYS]>()
    }

    /// A page left.
    pub fn insert(&mut self, no: PageNo) {
        let (at, mark) = self.place(no);
        let now = self.now();
        let age = |entry: u32| if entry == 0 { u32::MAX } else { age(now, entry) };
        let oldest = self.sets[at].iter_mut().max_by_key(|entry| age(**entry)).expect("a set has places");
        *oldest = u32::from(mark) << 16 | u32::from(now);
        self.left = self.left.wrapping_add(1);
    }

    /// Whether the page's ghost lives; it is gone afterwards.
    pub fn take(&mut self, no: PageNo) -> bool {
        let (at, mark) = self.place(no);
        let (now, life) = (self.now(), self.life);
        let Some(entry) = self.sets[at].iter_mut().find(|entry| **entry >> 16 == u32::from(mark)) else {
            return false;
        };
        age(now, std::mem::take(entry)) <= life
    }

    /// The set of a page, and its fingerprint (never 0: 0 marks an empty place).
    fn place(&self, no: PageNo) -> (usize, u16) {
        let mixed = (no.0 ^ no.0 >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let at = (u64::from(low_u32(mixed >> 32)) * self.sets.len() as u64) >> 32;
        let mark = low_u16(mixed.wrapping_mul(0x94d0_49bb_1331_11eb) >> 48);
        (usize::try_from(at).expect("below the table's length"), mark.max(1))
    }

    fn now(&self) -> u16 {
        low_u16(u64::from(self.left / self.tick_pages))
    }
}

/// Ticks since an entry was made.
fn age(now: u16, entry: u32) -> u32 {
    u32::from(now.wrapping_sub(low_u16(u64::from(entry))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearly_all_ghosts_live_out_their_time_and_no_longer() {
        let mut ghost = Ghost::new(10_000);
        ghost.set_life(9000);
        (0..20_000).for_each(|page| ghost.insert(PageNo(page)));
        let alive = (12_000..20_000).filter(|&page| ghost.take(PageNo(page))).count();
        assert!(alive > 7600, "{alive} of the last 8000");
        let dead = (0..10_000).filter(|&page| ghost.take(PageNo(page))).count();
        assert!(dead < 10, "{dead} of the first 10000");
        assert!(!ghost.take(PageNo(19_999)), "a ghost is taken once");
    }
}
