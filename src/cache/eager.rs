//! Write-back ahead of a FLUSH (eager writeback: Lee, Tyson and Farrens, MICRO 2000, for lines of a CPU's cache).
//!
//! A guest that flushes often and little at a time, as a database does, waits in each FLUSH for the pages that it has
//! just written. If they are written back immediately, the store works in parallel with the guest, and little is left
//! for the FLUSH.
//!
//! That costs an operation wherever waiting would have saved one: a page that is written again before the FLUSH, or a
//! run of pages that grows, is written to the store twice, and a FLUSH soon after waits for one write after the other.
//! So the cache counts the writes between two FLUSHes, and how many of them a write-back at the FLUSH would have merged
//! with an earlier write. The counts of one interval predict the next.

use crate::units::{PageNo, PageSpan};

use super::pages::{Page, UNSYNCED};
use super::{PageCache, REGION_PAGES};

/// Most pages of an interval (1 MiB). More pages are bulk writing, for which write-back in the order of the cursor
/// saves more.
const PAGES_MAX: u64 = REGION_PAGES;
/// Eager write-back is worthwhile if at most one write in four would have been merged: then it costs at most a third
/// more operations, not counting bridged gaps.
const WRITES_PER_MERGED: u32 = 4;

/// The writes of guests since the last FLUSH.
#[derive(Debug, Default)]
pub(super) struct EagerWriteback {
    pages: u64,
    writes: u32,
    /// Writes that write-back at the FLUSH would have merged with an earlier one.
    merged: u32,
    /// Eager write-back would have been worthwhile in the previous interval.
    was_worthwhile: bool,
}

impl EagerWriteback {
    /// Whether to write dirty pages back immediately.
    pub fn is_on(&self) -> bool {
        self.was_worthwhile && self.is_worthwhile()
    }

    /// Whether the interval is not yet bulk writing.
    fn is_short(&self) -> bool {
        self.pages <= PAGES_MAX
    }

    /// Whether eager write-back is worthwhile, judging by the interval so far.
    fn is_worthwhile(&self) -> bool {
        self.is_short() && self.merged * WRITES_PER_MERGED <= self.writes
    }

    /// A FLUSH ends the interval. An interval without writes predicts nothing and is ignored.
    pub fn flushed(&mut self) {
        if self.pages > 0 {
            *self = Self { was_worthwhile: self.is_worthwhile(), ..Self::default() };
        }
    }
}

impl PageCache {
    /// Counts a guest's write to these pages.
    pub(super) fn account_write(&mut self, span: PageSpan) {
        if !self.eager.is_short() {
            return;
        }
        self.eager.pages += span.count;
        let before = span.first.0.checked_sub(1).map(PageNo);
        let neighbours = [before, Some(span.first), Some(span.first.plus(span.count))];
        let mut would_merge = false;
        for id in neighbours.into_iter().flatten().filter_map(|no| self.pages.find(no)) {
            if self.pages[id].writers > 0 {
                // Writes that are in flight together will be written back together, so they count as one.
                return;
            }
            would_merge |= self.written_since_flush(&self.pages[id]);
        }
        self.eager.writes += 1;
        self.eager.merged += u32::from(would_merge);
    }

    /// Whether the page was written since the last FLUSH. It may already be on the store, but no Sync covers it.
    fn written_since_flush(&self, page: &Page) -> bool {
        let unsynced = page.is(UNSYNCED[self.flushing.fresh()]);
        page.epoch == self.pages.dirty().current() && (!page.dirty.is_empty() || !page.writing.is_empty() || unsynced)
    }
}
