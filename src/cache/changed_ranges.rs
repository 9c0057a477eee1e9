//! Ranges that a discard, or a failed discard or zero, has changed on the store, and that no successful Sync covers.
//!
//! The store may lose such a change, as it may lose a write, and then has the old contents again. The cache does not
//! write the range again, because its contents are undefined. But a guest may have read it in between: the clean page
//! of that read then differs from the store, and the next daemon would find an image that does not match its cache. So
//! a failure after which the store may have lost the change drops all clean sectors of the range: also in busy pages,
//! and the result of a read in flight.
//!
//! The store may lose the change together with the death of the daemon, for example if an NBD server loses what was
//! not synced. So a range is recorded in the memory that outlives the daemon (`FrameMemory::note_changed`) from before
//! its discard starts until a Sync covers it. The next daemon drops the clean pages of such a range, does not compare
//! them with the image (`recover/proof.rs`), and keeps the record until its first successful Sync.

use std::collections::BTreeMap;

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{OpKind, PageId, PageNo, PageSpan, SectorSpan, Unmap};

use super::PageCache;
use super::page_ranges::PageRanges;

/// Most ranges in a list. If there are more, ranges are merged: the cost is that more pages are dropped and read in
/// again.
const RANGES_MAX: usize = 64;
/// One in this many slots is in use. A range is noted before the notes are cleared that it replaces, and the notes of a
/// daemon that died in between stay until the next one has its own.
const SLOTS_PER_RANGE: usize = 4;

/// See the documentation of the module. As with pages (`flush.rs`), one list has the ranges that the Sync in flight
/// covers, the other one later ones.
#[derive(Debug)]
pub(super) struct ChangedRanges {
    lists: [PageRanges; 2],
    notes: Notes,
}

/// The ranges that are noted: those of both lists and those of the discards in flight, or more.
#[derive(Debug)]
struct Notes {
    ranges: PageRanges,
    /// The slot of each note, by first page and number of pages.
    slots: BTreeMap<(PageNo, u64), usize>,
    free: Vec<usize>,
}

impl ChangedRanges {
    /// No ranges, and free slots for notes.
    pub fn new(slots: usize) -> Self {
        assert!(slots >= SLOTS_PER_RANGE, "a range needs {SLOTS_PER_RANGE} slots");
        let ranges = PageRanges::new(slots / SLOTS_PER_RANGE);
        let notes = Notes { ranges, slots: BTreeMap::new(), free: (0..slots).rev().collect() };
        Self { lists: [(); 2].map(|()| PageRanges::new(RANGES_MAX)), notes }
    }

    /// Whether a range reaches past the page before `page`.
    pub fn reach_beyond(&self, page: PageNo) -> bool {
        let ranges = self.lists.iter().chain([&self.notes.ranges]);
        ranges.flat_map(PageRanges::iter).any(|span| span.end() > page)
    }

    /// Whether the page may be in a range.
    pub fn contain(&self, no: PageNo) -> bool {
        self.notes.ranges.includes(PageSpan::new(no, 1))
    }

    /// Moves the ranges of list `from` to the other one.
    pub fn join_lists(&mut self, from: usize) {
        let [first, second] = &mut self.lists;
        if from == 0 { second.append(first) } else { first.append(second) }
    }
}

impl PageCache {
    /// A discard has succeeded, or a range operation has failed.
    pub(super) fn note_changed_range(&mut self, span: SectorSpan) {
        self.flushing.note_unsynced_write();
        self.changed_ranges.lists[self.flushing.fresh()].insert(span.pages());
        self.note_change(span.pages());
    }

    /// A successful Sync covers a list.
    pub(super) fn changes_synced(&mut self, list: usize) {
        let ChangedRanges { lists, notes } = &mut self.changed_ranges;
        lists[list].clear();
        if notes.slots.is_empty() {
            return;
        }
        notes.ranges.clear();
        lists.iter().flat_map(PageRanges::iter).for_each(|span| notes.ranges.insert(span));
        self.ranges.discarding().for_each(|span| notes.ranges.insert(span));
        self.write_notes();
    }

    /// The store may be about to change a range, or has: notes it for the next daemon.
    pub(super) fn note_change(&mut self, span: PageSpan) {
        let notes = &mut self.changed_ranges.notes;
        if !notes.ranges.includes(span) && !planted(PlantedBug::DiscardIsNotNoted) {
            notes.ranges.insert(span);
            self.write_notes();
        }
    }

    /// Makes the notes those of the present ranges.
    ///
    /// => The daemon may die at any point: each range stays within a note that it is in before and after.
    fn write_notes(&mut self) {
        let notes = &mut self.changed_ranges.notes;
        let wanted: Vec<(PageNo, u64)> = notes.ranges.iter().map(|span| (span.first, span.count)).collect();
        let is_stale = |note: &(PageNo, u64)| wanted.binary_search(note).is_err();
        let mut stale: Vec<usize> =
            notes.slots.iter().filter(|(note, _)| is_stale(note)).map(|(_, &slot)| slot).collect();
        notes.slots.retain(|note, _| !is_stale(note));
        for (first, count) in wanted {
            if self.changed_ranges.notes.slots.contains_key(&(first, count)) {
                continue;
            }
            let slot = self.changed_ranges.notes.free.pop().unwrap_or_else(|| {
                // Only a forged ledger has so many notes.
                let slot = stale.pop().expect("there are more slots than ranges");
                self.pages.note_changed(slot, None);
                slot
            });
            self.pages.note_changed(slot, Some(self.span_of(first, count)));
            self.changed_ranges.notes.slots.insert((first, count), slot);
        }
        for slot in stale {
            self.pages.note_changed(slot, None);
            self.changed_ranges.notes.free.push(slot);
        }
    }

    /// The previous daemon noted these ranges. Its clean pages there may differ from the image.
    pub(super) fn restore_changed_ranges(&mut self, noted: impl IntoIterator<Item = (usize, SectorSpan)>) {
        let image = PageNo(self.image_pages());
        for (slot, span) in noted {
            let (first, end) = (span.pages().first, span.pages().end().min(image));
            let notes = &mut self.changed_ranges.notes;
            notes.free.retain(|&free| free != slot);
            let replaced = if first < end { notes.slots.insert((first, end.0 - first.0), slot) } else { Some(slot) };
            if let Some(slot) = replaced {
                notes.free.push(slot);
                self.pages.note_changed(slot, None);
            }
            if first < end {
                let span = PageSpan::new(first, end.0 - first.0);
                self.changed_ranges.notes.ranges.insert(span);
                self.changed_ranges.lists[self.flushing.fresh()].insert(span);
                self.forget_clean(self.span_of(span.first, span.count));
                self.flushing.request_sync();
            }
        }
        self.write_notes();
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
