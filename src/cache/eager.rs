//! Write-back ahead of the FLUSH (eager writeback: Lee, Tyson and Farrens, MICRO 2000, there for lines of a processor's
//! cache).
//!
//! A guest that syncs often, and little at a time, as a database does, waits in each FLUSH for what it wrote just before.
//! What the store is to have in a moment can go at once: the store works while the guest does, and the FLUSH finds
//! little left.
//!
//! That costs where patience would have spared the store an operation: a page that is written again before the FLUSH,
//! and a run that grows, go twice instead of once (and a FLUSH right after waits for one after the other). So the writes
//! between two FLUSHes are counted, and those among them that would have gone along with an earlier one; what held of
//! the last interval is expected of the next.

use crate::units::{PageNo, PageSpan};

use super::PageCache;
use super::pages::{Page, UNSYNCED};

/// An interval with more pages (1 MiB) is a bulk of writes, for the cursor to put in order.
const PAGES_MAX: u64 = 256;
/// At most one of so many writes would have gone along with another: a third more operations, but for what would have been
/// bridged.
const MERGED_SHARE: u32 = 4;

/// What guests have written since the last FLUSH.
#[derive(Debug, Default)]
pub(super) struct Eager {
    pages: u64,
    writes: u32,
    /// Those that would have gone along with an earlier one.
    merged: u32,
    /// It would have was_worthwhile to write at once, in the interval before.
    was_worthwhile: bool,
}

impl Eager {
    /// Whether what is dirty is to go to the store at once.
    pub fn is_on(&self) -> bool {
        self.was_worthwhile && self.is_worthwhile()
    }

    /// Whether the interval can still be one that pays.
    fn is_short(&self) -> bool {
        self.pages <= PAGES_MAX
    }

    fn is_worthwhile(&self) -> bool {
        self.is_short() && self.merged * MERGED_SHARE <= self.writes
    }

    /// A FLUSH ends the interval. One without writes says nothing of those to come.
    pub fn flushed(&mut self) {
        if self.pages > 0 {
            *self = Self { was_worthwhile: self.is_worthwhile(), ..Self::default() };
        }
    }
}

impl PageCache {
    /// A guest writes these pages.
    pub(super) fn account_write(&mut self, span: PageSpan) {
        if !self.eager.is_short() {
            return;
        }
        self.eager.pages += span.count;
        let before = span.first.0.checked_sub(1).map(PageNo);
        let touched = [before, Some(span.first), Some(span.first.plus(span.count))];
        let mut merges = false;
        for id in touched.into_iter().flatten().filter_map(|no| self.pages.find(no)) {
            if self.pages[id].writers > 0 {
                // They come together and go together.
                return;
            }
            merges |= self.written_since_flush(&self.pages[id]);
        }
        self.eager.writes += 1;
        self.eager.merged += u32::from(merges);
    }

    /// Whether the page was written in this interval. It may be on the store by now, but no Sync covers it then.
    fn written_since_flush(&self, page: &Page) -> bool {
        let unsynced = page.is(UNSYNCED[self.flushing.fresh()]);
        page.epoch == self.pages.dirty().current() && (!page.dirty.is_empty() || !page.writing.is_empty() || unsynced)
    }
}
