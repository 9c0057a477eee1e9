//! Guest writes: into frames immediately, without waiting for the store.
//!
//! A write pins its frames, its owner copies the bytes, and [`PageCache::finish_write`] makes them valid and dirty. In
//! between the sectors are *pending*: a read-in must not touch them, and a page with writers is not written back.
//!
//! The frame of a page under write-back is copy-on-write. A write to such a page takes a new frame, copies the
//! contents of the old one, and leaves the old frame to the store (Linux: stable pages); nothing is read.

use crate::units::{PageId, PageNo, SECTORS_PER_PAGE, SectorMask, SectorSpan};

use super::allocate::Space;
use super::pages::{COPY_ON_WRITE, NONE, READING, RECENT};
use super::stalled::StallReason;
use super::{Access, Admitted, Attempt, CopyResult, PageCache, PagePart, Piece};

/// Frames that writes leave free. A page whose dirty sectors do not fill the store's blocks has the rest read in before
/// its write-back; if such pages took all frames, none of them could ever be cleaned.
pub(super) const FILL_FRAMES: u32 = 1;
/// One in this many frames stays evictable. Otherwise, with a store that fails every Sync, pages that are not durable
/// would take all frames, and reads would wait for a frame until the store recovers.
const EVICTABLE_PART: u32 = 4;

impl PageCache {
    /// Admits a write: every admitted sector is in a piece, which the owner fills now.
    ///
    /// => The owner returns every piece with [`PageCache::finish_write`].
    /// => A write stalls at the dirty limit, or when no frame is free. While the store fails, a write at the limit is
    ///    refused.
    pub fn write(&mut self, access: Access, pieces: &mut Vec<Piece>) -> Admitted {
        self.writeback.note_guest_io(self.now);
        let mut at = access.from;
        if let Some(fault) = self.health.stopped() {
            return Admitted::Refused(at, fault);
        }
        if access.attempt == Attempt::New && access.from == 0 {
            self.account_write(access.span.pages());
        }
        let must_queue = access.attempt == Attempt::New && self.stalled.for_room();
        let mut reason = if must_queue { StallReason::Room } else { StallReason::StoreOp };
        let mut guess = access.guess;
        while at < access.until
            && let Some(part) = PagePart::of(access.span, at)
        {
            if must_queue || self.freeze.holds_writes() || self.is_range_locked(part.no) {
                break;
            }
            let found = self.pages.find_near(guess, part.no);
            let makes_dirty = found.is_none_or(|id| !self.pages[id].is_dirty_or_writeback());
            if makes_dirty && !self.has_room_for_dirty(found) {
                if let Some(fault) = self.health.refused() {
                    return Admitted::Refused(at, fault);
                }
                self.stats.throttled += 1;
                reason = StallReason::Room;
                break;
            }
            match if makes_dirty {
                self.space_for(part.no, access.span.pages(), access.attempt)
            } else {
                Space::Allocated
            } {
                Space::Allocated => {}
                Space::Pending => break,
                Space::Refused(fault) => return Admitted::Refused(at, fault),
            }
            let Some(id) = self.take_for_writing(found, part.no, part.mask()) else {
                reason = StallReason::Room;
                break;
            };
            let frame = self.pages[id].frame().expect("a page being written has a frame");
            self.pages.hold_frame(frame);
            part.piece(id, Some(frame)).join(pieces);
            guess = id.next();
            at += u32::from(part.count);
        }
        if at >= access.until {
            Admitted::All
        } else {
            self.stalled.push(access.ticket, reason);
            self.stats.stalls += 1;
            Admitted::Until(at)
        }
    }

    /// Whether the page may become dirty: below the dirty limit, and while one in
    /// [`EVICTABLE_PART`] frames holds a durable page or is free.
    fn has_room_for_dirty(&self, found: Option<PageId>) -> bool {
        let makes_unstable = found.is_none_or(|id| !self.pages[id].is_not_durable());
        let frames = self.pages.frames().total();
        let unstable_max = frames - frames / EVICTABLE_PART;
        self.write_back_cost() < self.throttle.limit_pages()
            && (!makes_unstable || self.pages.dirty().unstable_pages() < unstable_max)
    }

    /// Microseconds by which the owner must delay the completion of a write of this many sectors: the delay grows with
    /// the number of dirty pages.
    pub fn write_delay_us(&self, sectors: u64) -> u64 {
        let pages = self.pages.dirty().dirty_or_writeback_pages();
        self.throttle.delay_us(pages, self.write_back_cost(), sectors)
    }

    /// Prepares a page for a writer of `mask`: in the table, with a frame of its own. `None`: no frame or
    /// slot is free, or the page's count of writers is full.
    fn take_for_writing(&mut self, found: Option<PageId>, no: PageNo, mask: SectorMask) -> Option<PageId> {
        let id = match found {
            Some(id) if self.pages[id].writers == u8::MAX => return None,
            Some(id) if self.pages[id].is(COPY_ON_WRITE) => {
                self.copy_on_write(id)?;
                id
            }
            Some(id) => {
                if self.pages[id].frame().is_none() && self.pages.frames().free() <= FILL_FRAMES {
                    return None;
                }
                self.pages.ensure_frame(id)?;
                id
            }
            None => {
                if self.pages.frames().free() <= FILL_FRAMES {
                    return None;
                }
                let id = self.pages.insert(no)?;
                self.pages.ensure_frame(id).expect("a frame is free");
                id
            }
        };
        if let Some(period) = self.pages.take_unread(id) {
            self.count_wasted_readahead(no, period);
            self.pages.first_touch(id, no);
        } else if found.is_none() {
            self.pages.first_touch(id, no);
        } else {
            self.pages.touch(id, no);
        }
        self.stats.write_pages += 1;
        self.pages.change(id, |page| {
            page.writers += 1;
            page.pending = page.pending.or(mask);
        });
        Some(id)
    }

    /// Gives the page a new frame, and leaves the old one to its store operation.
    fn copy_on_write(&mut self, id: PageId) -> Option<()> {
        if self.pages.frames().free() <= FILL_FRAMES {
            return None;
        }
        self.pages.copy_on_write(id)?;
        self.stats.copied_on_write += 1;
        Some(())
    }

    /// Takes back a piece of a write.
    ///
    /// => After an incomplete copy only sectors that were valid before are dirty: they hold old bytes, new bytes or a
    ///    mixture.
    pub fn finish_write(&mut self, piece: &Piece, result: CopyResult) {
        piece.frames().for_each(|frame| self.pages.release_frame(frame));
        let mut id = piece.page;
        let start = self.pages[id].no().0 * SECTORS_PER_PAGE + u64::from(piece.first);
        let span = SectorSpan::new(start, u64::from(piece.count));
        let mut at = 0;
        while let Some(part) = PagePart::of(span, at) {
            if at > 0 {
                id = self.pages.find_near(id.next(), part.no).expect("a page with a writer stays in the table");
            }
            self.finish_page_write(id, part.mask(), result);
            at += u32::from(part.count);
        }
    }

    /// A writer of `mask` has finished with the page.
    fn finish_page_write(&mut self, id: PageId, mask: SectorMask, result: CopyResult) {
        let epoch = self.pages.dirty().current();
        let no = self.pages[id].no();
        if self.pages[id].writers == u8::MAX {
            self.stalled.unblock();
        }
        if self.pages.dirty().dirty_pages() == 0 && !self.flushing.has_unsynced() {
            self.writeback.start_aging(self.now, self.settings.dirty_age_us);
        }
        self.pages.change(id, |page| {
            page.writers -= 1;
            if page.writers == 0 {
                page.pending = SectorMask::NONE;
            }
            let changed = match result {
                CopyResult::Complete => mask,
                CopyResult::Incomplete => mask.and(page.valid),
            };
            if page.dirty.is_empty() {
                page.epoch = epoch;
            }
            page.valid = page.valid.or(changed);
            page.dirty = page.dirty.or(changed);
            page.mark(RECENT);
        });
        self.writeback.note_write(self.pages.dirty(), no);
        self.writeback.reset_progress();
        self.writer_left(id);
    }

    /// After a writer has finished: serves the page's waiters, or removes an empty page.
    fn writer_left(&mut self, id: PageId) {
        let page = &self.pages[id];
        if page.waiters() != NONE {
            self.deliver_to_waiters(id);
            self.submit_run();
        } else if page.valid.is_empty() && page.writers == 0 && !page.is(READING) {
            self.remove_page(id);
        }
    }
}
