//! One page in memory: its number, its frame and its state.
//!
//! The masks and flags of a page give its state (the flags of NetBSD's UVM in parentheses):
//!
//! | state   | bits                               | next state                                |
//! |---------|------------------------------------|-------------------------------------------|
//! | Absent  | not in the table                   | Reading, Dirty                            |
//! | Reading | `READING`: a read-in is in flight  | Clean, Dirty, Absent (PG_BUSY, PG_FAKE)   |
//! | Clean   | `dirty` and `writing` empty        | Dirty, Absent (PG_CLEAN)                  |
//! | Dirty   | `dirty` not empty                  | Writing, Absent (!PG_CLEAN)               |
//! | Writing | `writing` not empty: copy-on-write | Clean, Dirty (PG_BUSY in pageout)         |
//!
//! A page can be Reading and Dirty: it was written while its other sectors were being read in. It can be Writing and
//! Dirty: it was written again while its old frame was under write-back. It is never Reading and Writing: two
//! operations on one page would overlap on the store.

use std::ops::BitOr;

use crate::units::{Epoch, FrameId, FrameRecord, PageNo, SectorMask, low_u32};

/// "No frame", "no waiter" or "no page" in the packed fields.
pub(in crate::cache) const NONE: u32 = u32::MAX;

/// Flags that are part of a page's state. Only `Pages::change` changes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cache) struct Flags(u8);

/// A read-in of the page is in flight.
pub(in crate::cache) const READING: Flags = Flags(1 << 0);
/// The page's frame belongs to a write in flight: a guest's write takes a new frame (Linux: stable pages).
pub(in crate::cache) const COPY_ON_WRITE: Flags = Flags(1 << 1);
/// The last write-back of the page failed: it is retried alone, after a pause.
pub(in crate::cache) const FAILED: Flags = Flags(1 << 4);
/// Written to the store, and no successful Sync covers it yet: not evictable. One flag marks the writes that the Sync
/// in flight covers, the other one later writes; `flush.rs` determines which is which.
pub(in crate::cache) const UNSYNCED: [Flags; 2] = [Flags(1 << 5), Flags(1 << 6)];

/// Hints on a page, which no counter and no invariant depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cache) struct Mark(u8);

/// Readahead read the page in, and no guest has requested it yet. See [`Page::unread_since`].
pub(super) const READ_AHEAD: Mark = Mark(1 << 2);
/// Reading this page starts the next readahead window.
pub(in crate::cache) const MARKER: Mark = Mark(1 << 3);
/// A guest wrote the page since the cursor of write-back last passed it; meaningful while the page is dirty.
pub(in crate::cache) const RECENT: Mark = Mark(1 << 7);

impl BitOr for Flags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A span of about a second, in which readahead counts the pages that it reads in; wraps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::cache) struct Period(pub u32);

impl Period {
    /// Of a page that was warmed: it does not count as readahead.
    pub const WARMED: Self = Self(u32::MAX);
}

/// A page of the image in memory: 28 bytes, so that the metadata of a cache stays below 1.5 % of its size.
///
/// Only the owner of the table, `Pages`, hands out a `&mut Page`, and only to the closures of `Pages::change`.
#[derive(Clone, Debug)]
pub(in crate::cache) struct Page {
    no_low: u32,
    no_high: u16,
    /// Writers that hold a pin and have not finished.
    pub writers: u8,
    /// Sectors that those writers are filling.
    pub pending: SectorMask,
    frame: u32,
    /// Epoch of the first write that no flush covers; meaningful while dirty. An unread prefetched page is not dirty,
    /// and has its [`Period`] here.
    pub epoch: Epoch,
    /// First waiter for the page, or [`NONE`]. In a free slot: the next free slot.
    waiters: u32,
    /// The next page of the same chain of the index, or [`NONE`].
    pub(super) next: u32,
    /// Sectors whose bytes in the frame are valid.
    pub valid: SectorMask,
    /// Sectors newer than the store.
    pub dirty: SectorMask,
    /// Sectors under write-back.
    pub writing: SectorMask,
    flags: u8,
}

impl Page {
    pub(super) fn new(no: PageNo) -> Self {
        let no_high = u16::try_from(no.0 >> 32).expect("an image has fewer than 2^48 pages");
        Self {
            no_low: low_u32(no.0),
            no_high,
            writers: 0,
            pending: SectorMask::NONE,
            frame: NONE,
            epoch: Epoch(0),
            waiters: NONE,
            next: NONE,
            valid: SectorMask::NONE,
            dirty: SectorMask::NONE,
            writing: SectorMask::NONE,
            flags: 0,
        }
    }

    /// The page's number on the image.
    pub fn no(&self) -> PageNo {
        PageNo(u64::from(self.no_high) << 32 | u64::from(self.no_low))
    }

    /// The page's memory; none while its first read-in is in flight.
    pub fn frame(&self) -> Option<FrameId> {
        (self.frame != NONE).then_some(FrameId(self.frame))
    }

    pub(super) fn set_frame(&mut self, frame: FrameId) {
        self.frame = frame.0;
    }

    /// First waiter for the page, or [`NONE`].
    pub fn waiters(&self) -> u32 {
        self.waiters
    }

    /// Sets the first waiter, and returns the former one.
    pub(super) fn replace_waiters(&mut self, first: u32) -> u32 {
        std::mem::replace(&mut self.waiters, first)
    }

    /// The period in which readahead read the page in, if no guest has requested it since.
    pub fn unread_since(&self) -> Option<Period> {
        self.is_marked(READ_AHEAD).then_some(Period(self.epoch.0))
    }

    /// Marks the page as read ahead in `period`, or as requested by a guest.
    pub(super) fn set_unread_since(&mut self, period: Option<Period>) {
        match period {
            Some(Period(number)) => {
                debug_assert!(self.dirty.is_empty(), "{:?}: a dirty page needs its epoch", self.no());
                self.epoch = Epoch(number);
                self.mark(READ_AHEAD);
            }
            None => self.unmark(READ_AHEAD),
        }
    }

    /// Whether all of `flags` are set.
    pub fn is(&self, flags: Flags) -> bool {
        self.flags & flags.0 == flags.0
    }

    /// Sets `flags`.
    pub fn set(&mut self, flags: Flags) {
        self.flags |= flags.0;
    }

    /// Clears `flags`.
    pub fn clear(&mut self, flags: Flags) {
        self.flags &= !flags.0;
    }

    /// Whether the mark is set.
    pub fn is_marked(&self, mark: Mark) -> bool {
        self.flags & mark.0 != 0
    }

    /// Sets a mark.
    pub fn mark(&mut self, mark: Mark) {
        self.flags |= mark.0;
    }

    pub(super) fn unmark(&mut self, mark: Mark) {
        self.flags &= !mark.0;
    }

    /// Whether the page is dirty, under write-back or being filled by a writer (Linux: NR_DIRTY + NR_WRITEBACK).
    pub fn is_dirty_or_writeback(&self) -> bool {
        !self.dirty.is_empty() || !self.writing.is_empty() || self.writers > 0
    }

    /// Whether the page is not durable: [`Page::is_dirty_or_writeback`] or [`Page::is_unsynced`] (NFS: unstable).
    pub fn is_not_durable(&self) -> bool {
        self.is_dirty_or_writeback() || self.is_unsynced()
    }

    /// Whether the page was written to the store and no successful Sync covers it.
    pub fn is_unsynced(&self) -> bool {
        self.flags & (UNSYNCED[0] | UNSYNCED[1]).0 != 0
    }

    /// Whether an operation, a writer or a waiter uses the page: it may be neither evicted nor removed.
    pub fn busy(&self) -> bool {
        self.is(READING) || !self.writing.is_empty() || self.writers > 0 || self.waiters != NONE
    }

    /// The record from which the next daemon restores the page's frame.
    ///
    /// => Sectors `beyond` the end of the image are never dirty: the image has no place for them.
    /// => Clean sectors that a writer is filling are not valid: if the write never ends, the store still has their
    ///    bytes. Dirty sectors stay valid, because the frame has the only copy.
    pub(super) fn record(&self, beyond: SectorMask) -> FrameRecord {
        if self.frame == NONE {
            return FrameRecord::empty(self.no());
        }
        let dirty = if self.is_unsynced() { self.valid } else { self.dirty.or(self.writing) };
        let dirty = dirty.without(beyond);
        FrameRecord { page: self.no(), valid: self.valid.without(self.pending).or(dirty), dirty }
    }

    /// Checks I5 and the combinations that the state table rules out.
    pub(super) fn check(&self) {
        assert!(self.valid.contains(self.dirty), "I5: {:?}: a dirty sector is not valid: {self:?}", self.no());
        assert!(
            self.frame != NONE || self.valid.is_empty(),
            "{:?}: valid sectors without a frame: {self:?}",
            self.no()
        );
        assert!(!self.is(READING) || self.writing.is_empty(), "{:?}: Reading and Writing: {self:?}", self.no());
        let dirty_or_writing = !self.dirty.or(self.writing).is_empty();
        assert!(!self.is(FAILED) || dirty_or_writing, "{:?}: failed with nothing to write: {self:?}", self.no());
        assert!(
            !self.is(COPY_ON_WRITE) || !self.writing.is_empty(),
            "{:?}: copy-on-write and not Writing: {self:?}",
            self.no()
        );
        assert!(self.writers > 0 || self.pending.is_empty(), "{:?}: pending without a writer: {self:?}", self.no());
        assert!(
            !self.is(COPY_ON_WRITE) || self.writers == 0,
            "{:?}: a writer has a copy-on-write frame: {self:?}",
            self.no()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_takes_28_bytes() {
        assert_eq!(size_of::<Page>(), 28);
    }
}
