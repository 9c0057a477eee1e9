//! Changes the number of frames, and with it the number of slots of the page table.
//!
//! Slots and the index only grow: they take 1.5 % of the largest size of the cache.

use super::Pages;
use crate::units::PageId;

impl Pages {
    /// Sets the number of frames that the cache is to have: the policy and the shares change immediately.
    /// [`Pages::add_frames`] and [`Pages::remove_frames`] then change the frames themselves.
    pub fn announce_frames(&mut self, count: u32) {
        self.policy.set_pages(count);
        if let Some(readers) = &mut self.readers {
            readers.set_capacity(count);
        }
    }

    /// Uses more frames, up to the first `limit` ones.
    ///
    /// => Their memory is allocated.
    pub fn add_frames(&mut self, limit: u32) {
        if limit > self.table.capacity() {
            self.table.grow(limit);
            self.policy.add_slots(limit);
            if let Some(readers) = &mut self.readers {
                readers.add_slots(limit);
            }
        }
        self.made_room |= limit > self.frames.total();
        self.frames.raise_limit(limit);
    }

    /// Uses fewer frames, while `spare` of them stay free: at best only the first `limit` ones. The others leave.
    pub fn remove_frames(&mut self, limit: u32, spare: u32) {
        self.frames.lower_limit(limit, spare);
    }

    /// See [`super::Frames::retire_listed`].
    pub fn retire_listed(&mut self, count: u32) {
        self.frames.retire_listed(count);
    }

    /// Reports to the memory that the first `count` frames are in use, and that the others hold nothing.
    pub fn publish_frames_in_use(&self, count: u32) {
        self.memory.use_frames(count);
    }

    /// Whether the page is in a frame that is leaving.
    pub fn is_in_leaving_frame(&self, id: PageId) -> bool {
        self.table.is_resident(id) && self.table[id].frame().is_some_and(|frame| self.frames.is_leaving(frame))
    }

    /// Moves a page out of its frame into a free one, with all valid sectors. False: something else holds the frame, or
    /// no frame is free.
    pub fn move_to_free_frame(&mut self, id: PageId) -> bool {
        let page = &self.table[id];
        let old = page.frame().expect("a page that is moved has a frame");
        if self.frames.references(old) > 1 {
            return false;
        }
        let Some(new) = self.frames.take() else { return false };
        self.memory.copy_sectors(old, new, page.valid);
        self.change(id, |page| page.set_frame(new));
        self.release_frame(old);
        true
    }
}
