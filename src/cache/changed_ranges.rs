//! Ranges that a discard has changed on the store, or a discard or zero that failed, and that no successful Sync
//! covers.
//!
//! The store may lose such a change, as it may lose a write, and then has the old contents again. The cache does not
//! write the range again, because its contents are undefined. But a guest may have read it in between: what it read is
//! a clean page, which the store no longer has, and the next daemon would find an image that its cache does not belong
//! to. So a failure after which the store may have lost the change drops the clean pages of the range.
//!
//! One span that includes all of them is enough: a Sync follows soon, and a page too many is read in again.

use crate::units::{OpKind, SectorSpan, Unmap};

use super::PageCache;

/// See the module. As with pages (`flush.rs`), one list is for what the Sync in flight covers, and one for later ones.
#[derive(Debug, Default)]
pub(super) struct ChangedRanges {
    lists: [Option<SectorSpan>; 2],
}

impl ChangedRanges {
    fn add(&mut self, list: usize, span: SectorSpan) {
        let span = self.lists[list].map_or(span, |known| {
            let start = known.start.min(span.start);
            SectorSpan::new(start, known.end().max(span.end()) - start)
        });
        self.lists[list] = Some(span);
    }

    /// Moves one list to the other.
    pub fn join_lists(&mut self, from: usize, to: usize) {
        if let Some(span) = self.lists[from].take() {
            self.add(to, span);
        }
    }

    /// A successful Sync covers a list.
    pub fn clear(&mut self, list: usize) {
        self.lists[list] = None;
    }
}

impl PageCache {
    /// A discard has succeeded, or a range operation has failed.
    pub(super) fn note_changed_range(&mut self, span: SectorSpan) {
        self.flushing.note_unsynced_write();
        self.changed_ranges.add(self.flushing.fresh(), span);
    }

    /// The store may have lost the changes of a list that no Sync covers: neither its clean pages nor what the store
    /// told of holes in it is true any more.
    pub(super) fn doubt_changed_ranges(&mut self, list: usize) {
        if let Some(span) = self.changed_ranges.lists[list] {
            self.forget_holes(span, OpKind::Zero { unmap: Unmap::Forbidden });
            self.forget_clean(span);
        }
    }
}
