//! The size of the cache changes while it is used.
//!
//! It uses the first frames of its memory. To grow, it takes more of them, once the owner has allocated their memory.
//! To shrink, it stops using the last ones: pages that are in them move to frames that stay, and the policy evicts
//! as many pages as no longer have room. So hot pages stay, wherever they are. A frame
//! that a copy or a store operation holds leaves after that; dirty pages move as they are, and nothing waits for the
//! image unless there are more of them than the new size has room for.
//!
//! Each turn does a part, so no guest waits for a change of size. The owner learns from [`FrameMemory::use_frames`] how
//! many frames are in use: only then may the memory of others go.
//!
//! [`FrameMemory::use_frames`]: super::FrameMemory::use_frames

use crate::units::{PageId, Tick};

use super::PageCache;
use super::write::FILL_FRAMES;

/// Frames that are added in a turn, with the slots of their pages: less than 100 us.
const ADDED_FRAMES_MAX: u32 = 4096;
/// Frames that begin to leave in a turn.
const LEAVING_FRAMES_MAX: u32 = 16_384;
/// Frames of the free list, and slots of the page table, that a turn looks at.
const SCANNED_MAX: u32 = 4096;
/// Pages that are moved in a turn: 1 MiB is copied with the cache locked.
const MOVED_PAGES_MAX: u32 = 256;
/// Pages that are evicted in a turn while frames leave.
pub(super) const EVICTED_PAGES_MAX: u32 = 1024;
/// The pause after a turn that could move nothing, in microseconds: what holds the frames is in flight.
const PAUSE_US: u64 = 1000;

/// A change of size.
#[derive(Debug, Default)]
pub(super) struct Resize {
    /// When the next step is due; `None`: there is no change.
    due: Option<Tick>,
    /// The next slot of the page table to look at.
    next_slot: u32,
    /// A page was moved since slot 0.
    has_moved: bool,
    /// How many frames are in use as far as the memory knows.
    published: u32,
    /// Pages moved since the cache was created.
    moved_pages: u64,
}

impl Resize {
    /// When the next step is due; `None`: there is no change.
    pub fn due(&self) -> Option<Tick> {
        self.due
    }
}

impl PageCache {
    /// The cache has `count` frames from now on, as far as it may ([`super::Settings::frames_max`]): it grows or
    /// shrinks in the turns that follow.
    ///
    /// => Their memory is allocated.
    pub fn set_frames(&mut self, count: u32) {
        let count = count.clamp(1, self.settings.frames_max.max(self.settings.frames));
        self.settings.frames = count;
        self.pages.announce_frames(count);
        // Before the first of them is used. Those that are leaving may be among the last ones.
        self.publish_frames_in_use(count.max(self.resize.published));
        (self.resize.due, self.resize.next_slot, self.resize.has_moved) = (Some(self.now), 0, false);
    }

    /// Number of frames that the cache is to have.
    pub fn frames_wanted(&self) -> u32 {
        self.settings.frames
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

    /// How many frames are to be free beyond the reserve: a page that moves needs one.
    pub(super) fn frames_to_move_to(&self) -> u32 {
        let frames = self.pages.frames();
        let beyond = frames.total().saturating_sub(self.settings.frames);
        beyond.saturating_add(frames.leaving_held()).min(MOVED_PAGES_MAX)
    }

    /// Does a part of a change of size.
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
            self.pause_unless(self.pages.frames().total() < limit);
        } else if self.pages.frames().leaving_listed() > 0 {
            self.pages.retire_listed(SCANNED_MAX);
        } else if !self.pages.frames().have_left() {
            self.move_pages();
        }
        if self.pages.frames().total() == wanted && self.pages.frames().have_left() {
            self.publish_frames_in_use(wanted);
            self.resize.due = None;
        }
    }

    /// Tells the memory how many frames are in use, unless it knows.
    pub(super) fn publish_frames_in_use(&mut self, count: u32) {
        if self.resize.published != count {
            self.resize.published = count;
            self.pages.publish_frames_in_use(count);
        }
    }

    /// The next step is due at once if this one did something; else it waits for what is in flight.
    fn pause_unless(&mut self, has_advanced: bool) {
        if !has_advanced {
            self.resize.due = Some(self.now.plus_us(PAUSE_US));
        }
    }

    /// Moves pages out of the frames that are leaving. The next turn goes on where this one ends.
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
        self.pause_unless(room > 0 && (!is_pass_over || self.resize.has_moved));
        if is_pass_over {
            (self.resize.next_slot, self.resize.has_moved) = (0, false);
        }
    }
}
