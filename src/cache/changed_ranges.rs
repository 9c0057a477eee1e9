//! Ranges that a discard has changed on the store, or a discard or zero that failed, and that no successful Sync
//! covers.
//!
//! The store may lose such a change, as it may lose a write, and then has the old contents again. Nobody writes the
//! range again, because its contents are undefined. But a guest may have read it in between: what it read stays in the
//! cache as a clean page, which the store no longer has. The next daemon would find an image that its cache does not
//! belong to. So a page that is read in from such a range counts as written: it stays in memory and is recorded as
//! dirty until a Sync covers it, and is written if that Sync fails. If many pages are not durable already, it is
//! dropped as soon as its readers have it.
//!
//! The previous daemon may have left such changes anywhere: so the first Sync of a cache that was restored covers the
//! whole image.
//!
//! One span that includes all of them is enough: a Sync follows soon, and a page too many costs nothing but its place
//! until then.

use crate::units::{OpKind, PageId, SectorSpan, Unmap};

use super::PageCache;

/// While so large a part of the frames has pages that are not durable, pages that are only read do not join them: there
/// may be no successful Sync for long, and reads need frames.
const READ_UNSTABLE_PART: u32 = 2;

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

    /// The previous daemon may have changed anything.
    pub(super) fn note_changes_before_restore(&mut self) {
        self.changed_ranges.add(self.flushing.fresh(), SectorSpan::new(0, self.settings.image_sectors));
    }

    /// The store may have lost the changes of a list that no Sync covers: what it told of holes in it is void.
    pub(super) fn doubt_changed_ranges(&mut self, list: usize) {
        if let Some(span) = self.changed_ranges.lists[list] {
            self.forget_holes(span, OpKind::Zero { unmap: Unmap::Forbidden });
        }
    }

    /// The page got contents from the store. False: it should count as written, and too many pages do so already.
    pub(super) fn note_read_in(&mut self, id: PageId) -> bool {
        let page = &self.pages[id];
        let no = page.no();
        // A writer may be about to fill what the read-in was for.
        let has_clean = !page.valid.without(page.dirty).is_empty();
        let changed = self.changed_ranges.lists.iter().flatten().any(|span| span.pages().contains(no));
        if !(changed && has_clean) {
            return true;
        }
        let has_room = page.is_unstable()
            || self.pages.dirty().unstable_pages() < self.pages.frames().total() / READ_UNSTABLE_PART;
        if has_room {
            self.flushing.note_unsynced_write();
            self.mark_unsynced(id);
        }
        has_room
    }
}
