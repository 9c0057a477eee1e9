//! Reference counts of the frames, and the list of the free ones.
//!
//! A page in memory, each pin (a copy to or from guest memory in flight) and each store operation hold one reference to
//! their frame. A frame with no reference is free.
//!
//! The list is a queue in most caches: the frame that was freed first is taken first. Adjacent frames are mostly freed
//! together, so they are taken together again: a read into them is one segment for the store, and one piece to copy. A
//! cache that retains nothing uses a stack: it reuses the same few frames, which stay in the CPU's caches.

use crate::units::FrameId;

/// This frame is free; the other bits are the next free frame.
const FREE: u32 = 1 << 31;
/// No next free frame.
const END: u32 = FREE - 1;

/// Which of the free frames is taken next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reuse {
    /// The one that was freed first.
    OldestFirst,
    /// The one that was freed last.
    NewestFirst,
}

/// Reference counts and the free list, in one word for each frame: a count, or [`FREE`] and the next free frame.
/// `Pages` alone changes them.
///
/// => Every frame is free or held (I9): it has a count, or is in the list.
#[derive(Debug)]
pub(in crate::cache) struct Frames {
    words: Vec<u32>,
    /// The next free frame to be taken and the last one; [`END`] where none is free.
    free_head: u32,
    free_tail: u32,
    free_count: u32,
    reuse: Reuse,
}

impl Frames {
    /// `count` free frames.
    pub(super) fn new(count: u32, reuse: Reuse) -> Self {
        assert!(count > 0 && count < END, "a cache has 1 to 2^31 frames");
        let words = (1..=count).map(|next| FREE | if next == count { END } else { next }).collect();
        Self { words, free_head: 0, free_tail: count - 1, free_count: count, reuse }
    }

    /// Takes these frames, with one reference each.
    ///
    /// => No frame is held yet.
    pub(super) fn claim(&mut self, claimed: impl IntoIterator<Item = FrameId>) {
        assert_eq!(self.free_count, self.total(), "a frame was taken before others were claimed");
        self.words.fill(0);
        for frame in claimed {
            self.words[frame.index()] = 1;
        }
        (self.free_head, self.free_tail, self.free_count) = (END, END, 0);
        for frame in 0..self.total() {
            if self.words[frame as usize] == 0 {
                self.append(frame);
            }
        }
    }

    /// Adds a frame to the end of the free list.
    fn append(&mut self, frame: u32) {
        self.words[frame as usize] = FREE | END;
        match self.free_tail {
            END => self.free_head = frame,
            tail => self.words[tail as usize] = FREE | frame,
        }
        self.free_tail = frame;
        self.free_count += 1;
    }

    /// Takes a free frame, with one reference.
    pub(super) fn take(&mut self) -> Option<FrameId> {
        if self.free_head == END {
            return None;
        }
        let frame = self.free_head;
        self.free_head = self.words[frame as usize] & !FREE;
        if self.free_head == END {
            self.free_tail = END;
        }
        self.words[frame as usize] = 1;
        self.free_count -= 1;
        Some(FrameId(frame))
    }

    /// Adds a reference to a frame that is held.
    pub(super) fn hold(&mut self, frame: FrameId) {
        let word = &mut self.words[frame.index()];
        assert!(*word & FREE == 0, "{frame:?} is free: it must be taken first");
        *word += 1;
    }

    /// Drops a reference. Returns whether it was the last one, which frees the frame.
    pub(super) fn release(&mut self, frame: FrameId) -> bool {
        let word = &mut self.words[frame.index()];
        assert!(*word & FREE == 0 && *word > 0, "{frame:?} is released too often");
        *word -= 1;
        let freed = *word == 0;
        if freed && self.reuse == Reuse::NewestFirst && self.free_head != END {
            *word = FREE | self.free_head;
            self.free_head = frame.0;
            self.free_count += 1;
        } else if freed {
            self.append(frame.0);
        }
        freed
    }

    /// References to a frame; 0 if it is free.
    pub fn references(&self, frame: FrameId) -> u32 {
        let word = self.words[frame.index()];
        if word & FREE == 0 { word } else { 0 }
    }

    /// Number of free frames.
    pub fn free(&self) -> u32 {
        self.free_count
    }

    /// Number of frames.
    pub fn total(&self) -> u32 {
        u32::try_from(self.words.len()).expect("checked in new()")
    }

    /// Bytes of memory that the counts take.
    pub fn metadata_bytes(&self) -> usize {
        self.words.capacity() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_the_last_reference_frees_a_frame() {
        let mut frames = Frames::new(2, Reuse::OldestFirst);
        let a = frames.take().unwrap();
        let b = frames.take().unwrap();
        assert_ne!(a, b);
        assert_eq!(frames.take(), None);
        frames.hold(a);
        frames.release(a);
        assert_eq!((frames.free(), frames.references(a)), (0, 1));
        frames.release(a);
        assert_eq!(frames.free(), 1);
        assert_eq!(frames.take(), Some(a));
    }

    #[test]
    fn frames_are_taken_in_the_order_in_which_they_were_freed() {
        let mut frames = Frames::new(8, Reuse::OldestFirst);
        let held: Vec<FrameId> = std::iter::from_fn(|| frames.take()).collect();
        assert_eq!(held, (0..8).map(FrameId).collect::<Vec<_>>());
        for frame in [4, 5, 6, 0, 1].map(FrameId) {
            frames.release(frame);
        }
        assert_eq!(std::iter::from_fn(|| frames.take()).collect::<Vec<_>>(), [4, 5, 6, 0, 1].map(FrameId));
        let mut newest_first = Frames::new(3, Reuse::NewestFirst);
        let held: Vec<FrameId> = std::iter::from_fn(|| newest_first.take()).collect();
        for frame in held {
            newest_first.release(frame);
        }
        assert_eq!(std::iter::from_fn(|| newest_first.take()).collect::<Vec<_>>(), [2, 1, 0].map(FrameId));
        let mut claimed = Frames::new(4, Reuse::OldestFirst);
        claimed.claim([FrameId(1)]);
        assert_eq!(std::iter::from_fn(|| claimed.take()).collect::<Vec<_>>(), [0, 2, 3].map(FrameId));
    }

    #[test]
    #[should_panic(expected = "released too often")]
    fn releasing_a_free_frame_is_caught() {
        let mut frames = Frames::new(1, Reuse::OldestFirst);
        frames.release(FrameId(0));
    }
}
