//! Changes the size of the cache while it is used.
//!
//! The cache uses the first frames of its memory. To grow, it uses more of them, once the owner has allocated their
//! memory. To shrink, it stops using the last ones: their pages move to frames that stay, and the policy evicts the
//! pages that exceed the new size. So hot pages stay, wherever they are. A frame that a copy or a store operation holds
//! leaves when it is released. Dirty pages move without being written back: nothing waits for the image unless more
//! pages are dirty than the new size has frames.
//!
//! Each turn does a part, so no guest waits for a change of size. The cache reports the number of frames in use with
//! [`FrameMemory::use_frames`]: only then may the owner free the memory of the others.
//!
//! [`FrameMemory::use_frames`]: super::FrameMemory::use_frames

use crate::units::{PageId, Tick};

use super::PageCache;
use super::write::FILL_FRAMES;

/// Most frames that are added in a turn, with the slots of their pages: less than 100 us.
const ADDED_FRAMES_MAX: u32 = 4096;
/// Most frames that start to leave in a turn.
const LEAVING_FRAMES_MAX: u32 = 16_384;
/// Most frames of the free list, and slots of the page table, that a turn scans.
const SCANNED_MAX: u32 = 4096;
/// Most pages that are moved in a turn: 1 MiB is copied with the cache locked.
const MOVED_PAGES_MAX: u32 = 256;
/// Most pages that are evicted in a turn while frames leave.
pub(super) const EVICTED_PAGES_MAX: u32 = 1024;
/// The pause after a turn that could move nothing, in microseconds: operations in flight hold the frames.
const PAUSE_US: u64 = 1000;

/// A change of size.
#[derive(Debug, Default)]
pub(super) struct Resize {
    /// When the next step is due; `None`: no change is in progress.
    due: Option<Tick>,
    /// The next slot of the page table to scan.
    next_slot: u32,
    /// A page was moved since the scan passed slot 0.
    has_moved: bool,
    /// The number of frames in use that was last reported to the memory.
    published: u32,
    /// Pages moved since the cache was created.
    moved_pages: u64,
}

impl Resize {
    /// When the next step is due; `None`: no change is in progress.
    pub fn due(&self) -> Option<Tick> {
        self.due
    }
}

impl PageCache {
    /// Sets the number of frames to `count`, limited by [`super::Settings::frames_max`]: the cache grows or shrinks in
    /// the following turns.
    ///
    /// => Their memory is allocated.
    pub fn set_frames(&mut self, count: u32) {
        let count = count.clamp(1, self.settings.frames_max.max(self.settings.frames));
        self.settings.frames = count;
        self.pages.announce_frames(count);
        // Before the first of them is used. Frames that are leaving may be among the last ones.
        self.publish_frames_in_use(count.max(self.resize.published));
        (self.resize.due, self.resize.next_slot, self.resize.has_moved) = (Some(self.now), 0, false);
    }

    /// Pages that were moved to another frame because theirs left, since the cache was created.
    pub fn moved_pages(&self) -> u64 {
        self.resize.moved_pages
    }

    /// Whether the cache has reached its wanted number of frames.
    pub fn is_resized(&self) -> bool {
        self.resize.due.is_none()
    }

    /// Frames that a change of size leaves free: for requests, and for the blocks that must be completed before they
    /// can be written.
    fn spare_frames(&self) -> u32 {
        (self.reserve() / 2).max(FILL_FRAMES + 1)
    }

    /// Number of frames to keep free beyond the reserve, for pages that move.
    pub(super) fn frames_to_move_to(&self) -> u32 {
        let frames = self.pages.frames();
        let beyond = frames.total().saturating_sub(self.settings.frames);
        beyond.saturating_add(frames.leaving_held()).min(MOVED_PAGES_MAX)
    }

    /// Does the next part of a change of size.
    pub(super) fn advance_resize(&mut self) {
        if self.resize.due.is_none_or(|due| self.now < due) {
            return;
        }
        self.resize.due = Some(self.now);
        let (wanted, limit) = (self.settings.frames, self.pages.frames().total());
        if limit < wanted {
            self.pages.add_frames(wanted.min(limit.saturating_add(ADDED_FRAMES_MAX)));
        } else if limit > wanted {
            let spare = self.spare_frames();
            self.pages.remove_frames(wanted.max(limit.saturating_sub(LEAVING_FRAMES_MAX)), spare);
            self.pause_unless_advanced(self.pages.frames().total() < limit);
        } else if self.pages.frames().leaving_listed() > 0 {
            self.pages.retire_listed(SCANNED_MAX);
        } else if !self.pages.frames().all_retired() {
            self.move_pages();
        }
        if self.pages.frames().total() == wanted && self.pages.frames().all_retired() {
            self.publish_frames_in_use(wanted);
            self.resize.due = None;
        }
    }

    /// Reports the number of frames in use to the memory, if it has changed.
    pub(super) fn publish_frames_in_use(&mut self, count: u32) {
        if self.resize.published != count {
            self.resize.published = count;
            self.pages.publish_frames_in_use(count);
        }
    }

    /// The next step is due immediately if this one did something; otherwise it waits for operations in flight.
    fn pause_unless_advanced(&mut self, has_advanced: bool) {
        if !has_advanced {
            self.resize.due = Some(self.now.plus_us(PAUSE_US));
        }
    }

    /// Moves pages out of the frames that are leaving. The next turn continues where this one ends.
    fn move_pages(&mut self) {
        let end = self.resize.next_slot.saturating_add(SCANNED_MAX).min(self.pages.slots());
        let room = self.pages.frames().free().saturating_sub(self.spare_frames());
        let mut left = room.min(MOVED_PAGES_MAX);
        while self.resize.next_slot < end && left > 0 {
            let id = PageId(self.resize.next_slot);
            if self.pages.is_in_leaving_frame(id) && self.pages.move_to_free_frame(id) {
                self.resize.moved_pages += 1;
                self.resize.has_moved = true;
                left -= 1;
            }
            self.resize.next_slot += 1;
        }
        let is_pass_over = self.resize.next_slot == self.pages.slots();
        self.pause_unless_advanced(room > 0 && (!is_pass_over || self.resize.has_moved));
        if is_pass_over {
            (self.resize.next_slot, self.resize.has_moved) = (0, false);
        }
    }
}
