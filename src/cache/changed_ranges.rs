//! Ranges that a discard, or a failed discard or zero, has changed on the store, and that no successful Sync covers.
//!
//! The store may lose such a change, as it may lose a write, and then has the old contents again. The cache does not
//! write the range again, because its contents are undefined. But a guest may have read it in between: the clean page
//! of that read then differs from the store, and the next daemon would find an image that does not match its cache. So
//! a failure after which the store may have lost the change drops all clean sectors of the range: also in busy pages,
//! and the result of a read in flight. The discards of the previous daemon are unknown: until the first Sync of a
//! restored cache, the whole image counts as changed.

use crate::units::{OpKind, PageId, PageSpan, SectorSpan, Unmap};

use super::PageCache;
use super::page_ranges::PageRanges;

/// Most ranges in a list. If there are more, ranges are merged: the cost is that more pages are dropped and read in
/// again.
const RANGES_MAX: usize = 64;

/// See the documentation of the module. As with pages (`flush.rs`), one list has the ranges that the Sync in flight
/// covers, the other one later ones.
#[derive(Debug)]
pub(super) struct ChangedRanges {
    lists: [PageRanges; 2],
}

impl Default for ChangedRanges {
    fn default() -> Self {
        Self { lists: [(); 2].map(|()| PageRanges::new(RANGES_MAX)) }
    }
}

impl ChangedRanges {
    /// Adds a range to a list.
    pub fn add(&mut self, list: usize, span: PageSpan) {
        self.lists[list].insert(span);
    }

    /// Moves the ranges of list `from` to the other one.
    pub fn join_lists(&mut self, from: usize) {
        let [first, second] = &mut self.lists;
        if from == 0 { second.append(first) } else { first.append(second) }
    }

    /// A successful Sync covers a list.
    pub fn clear(&mut self, list: usize) {
        self.lists[list].clear();
    }
}

impl PageCache {
    /// A discard has succeeded, or a range operation has failed.
    pub(super) fn note_changed_range(&mut self, span: SectorSpan) {
        self.flushing.note_unsynced_write();
        self.changed_ranges.add(self.flushing.fresh(), span.pages());
    }

    /// The store may have lost the changes of a list that no Sync covers: its clean pages, the reads in flight, and the
    /// reported holes in it are no longer valid.
    pub(super) fn doubt_changed_ranges(&mut self, list: usize) {
        let changed = &self.changed_ranges.lists[list];
        let spans: Vec<PageSpan> = changed.iter().collect();
        let is_long = spans.iter().map(|span| span.count).sum::<u64>() > u64::from(self.pages.len());
        let ids: Vec<PageId> = if is_long {
            self.pages.iter().filter(|(_, page)| changed.contains(page.no())).map(|(id, _)| id).collect()
        } else {
            spans.iter().flat_map(|&span| self.pages.within(span)).collect()
        };
        for span in spans {
            self.forget_holes(self.span_of(span.first, span.count), OpKind::Zero { unmap: Unmap::Forbidden });
            self.store_ops.doubt_reads(span);
        }
        ids.into_iter().for_each(|id| self.forget_lost(id));
    }

    /// Drops the clean sectors of a page, which the store may have lost. A page that no Sync covers is written again as
    /// a whole: it keeps all its sectors.
    fn forget_lost(&mut self, id: PageId) {
        let page = &self.pages[id];
        if page.is_unsynced() {
            return;
        }
        let beyond = self.pages.beyond_image(page.no());
        let kept = page.valid.and(page.dirty.or(page.writing).or(beyond));
        if page.busy() || !kept.without(beyond).is_empty() {
            self.pages.change(id, |page| page.valid = kept);
        } else {
            self.remove_page(id);
        }
    }
}
