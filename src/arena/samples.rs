//! Hashes of some pages of the image. The header keeps them as long as the daemon does not change those pages.
//!
//! After a daemon dies while it changes its image, the times of the image prove little: a backup that is restored right
//! after its death has times close to those of the daemon's last write. The cache may then have no clean page to
//! compare with the image. These hashes always exist.
//!
//! Two of the pages are *witnesses*: among those that the daemon has written last, of which a Sync covers the write.
//! Any older copy of the image lacks that write, even if it is equal in all other pages that are compared. If the image
//! has it, all later writes are still dirty in the cache.

use super::ledger::{SAMPLE_SLOTS, SAMPLES_MAX, WITNESS_SLOTS, sample_at};
use super::{Arena, Persistence};
use crate::fault_injection::{PlantedBug, planted};
use crate::units::{FrameId, PageNo, SECTORS_PER_PAGE, SectorSpan, low_u8};

/// The hash of a page's bytes (FNV-1a): the same in every version of genblk.
pub fn hash_of(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The hash of a witness: as [`hash_of`], but of whole words, because a worker computes it.
pub fn word_hash_of(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    words.fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x0100_0000_01b3))
}

impl Arena {
    /// Records a page that was written to the image: the image has it, durably, as `frame` has it.
    ///
    /// => The caller serializes this with [`Arena::begin_change`]. The daemon may be killed at any point.
    pub fn record_witness(&self, page: PageNo, frame: FrameId) {
        let Persistence::Full { .. } = &self.persistence else { return };
        let [latest, earlier] = WITNESS_SLOTS.map(sample_at);
        let [last_page, last_hash] = [latest.0, latest.1].map(|at| self.memory.load(at));
        if [last_page, self.memory.load(earlier.0)].contains(&(page.0 + 1)) {
            return;
        }
        let hash = word_hash_of(&self.sectors(frame, 0, low_u8(SECTORS_PER_PAGE)));
        if last_page != 0 {
            self.store_sample(earlier, last_page, last_hash);
        }
        self.store_sample(latest, page.0 + 1, hash);
    }

    /// Stores a sample with the number of its page plus 1.
    fn store_sample(&self, (page_at, hash_at): (usize, usize), page: u64, hash: u64) {
        // The slot counts as empty until its page is stored.
        self.memory.store(page_at, 0);
        self.memory.store(hash_at, hash);
        self.memory.store(page_at, page);
    }

    /// Records the hashes of at most [`SAMPLES_MAX`] pages of the image, and removes those recorded before; witnesses
    /// stay.
    ///
    /// => No change of the image is in flight. The daemon may be killed at any point.
    pub fn record_samples(&self, samples: &[(PageNo, u64)]) {
        let Persistence::Full { .. } = &self.persistence else { return };
        for slot in 0..SAMPLES_MAX {
            match samples.get(slot) {
                Some(&(page, hash)) => self.store_sample(sample_at(slot), page.0 + 1, hash),
                None => self.memory.store(sample_at(slot).0, 0),
            }
        }
    }

    /// The recorded hashes of pages that the daemon has not changed since.
    pub fn samples(&self) -> Vec<(PageNo, u64)> {
        self.samples_in(0..SAMPLES_MAX)
    }

    /// The recorded hashes ([`word_hash_of`]) of pages that the daemon has written last, and not changed since.
    pub fn witnesses(&self) -> Vec<(PageNo, u64)> {
        self.samples_in(WITNESS_SLOTS)
    }

    fn samples_in(&self, slots: impl IntoIterator<Item = usize>) -> Vec<(PageNo, u64)> {
        let Persistence::Full { .. } = &self.persistence else { return Vec::new() };
        let slots = slots.into_iter().map(sample_at);
        slots
            .filter_map(|(page_at, hash_at)| {
                let page = self.memory.load(page_at).checked_sub(1)?;
                Some((PageNo(page), self.memory.load(hash_at)))
            })
            .collect()
    }

    /// Removes the hashes of pages that the daemon is about to change.
    pub(super) fn forget_samples(&self, span: SectorSpan) {
        if planted(PlantedBug::SamplesKept) {
            return;
        }
        let (first, end) = (span.start / SECTORS_PER_PAGE, span.end().div_ceil(SECTORS_PER_PAGE));
        for (page_at, _) in (0..SAMPLE_SLOTS).map(sample_at) {
            let page = self.memory.load(page_at);
            if page != 0 && (first..end).contains(&(page - 1)) {
                self.memory.store(page_at, 0);
            }
        }
    }
}
