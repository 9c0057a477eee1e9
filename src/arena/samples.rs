//! Hashes of some pages of the image. The header keeps them as long as the daemon does not change those pages.
//!
//! After a daemon dies while it changes its image, the times of the image prove little: a backup that is restored right
//! after its death has times close to those of the daemon's last write. The cache may then have no clean page to
//! compare with the image. These hashes always exist.

use super::ledger::{SAMPLES_MAX, sample_at};
use super::{Arena, Persistence};
use crate::fault_injection::{PlantedBug, planted};
use crate::units::{PageNo, SECTORS_PER_PAGE, SectorSpan};

/// The hash of a page's bytes (FNV-1a): the same in every version of genblk.
pub fn hash_of(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Arena {
    /// Records the hashes of at most [`SAMPLES_MAX`] pages of the image, and removes those recorded before.
    ///
    /// => No change of the image is in flight. The daemon may be killed at any point.
    pub fn record_samples(&self, samples: &[(PageNo, u64)]) {
        let Persistence::Full { .. } = &self.persistence else { return };
        for slot in 0..SAMPLES_MAX {
            let (page_at, hash_at) = sample_at(slot);
            self.memory.store(page_at, 0);
            if let Some(&(page, hash)) = samples.get(slot) {
                self.memory.store(hash_at, hash);
                // The slot counts as empty until its page is stored.
                self.memory.store(page_at, page.0 + 1);
            }
        }
    }

    /// The recorded hashes of pages that the daemon has not changed since.
    pub fn samples(&self) -> Vec<(PageNo, u64)> {
        let Persistence::Full { .. } = &self.persistence else { return Vec::new() };
        let slots = (0..SAMPLES_MAX).map(sample_at);
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
        for (page_at, _) in (0..SAMPLES_MAX).map(sample_at) {
            let page = self.memory.load(page_at);
            if page != 0 && (first..end).contains(&(page - 1)) {
                self.memory.store(page_at, 0);
            }
        }
    }
}
