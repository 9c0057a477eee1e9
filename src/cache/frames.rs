//! Which frames are free, and how many hold each of the others.
//!
//! A frame is held by residency (its page), by pins (copies to and from guests under way), and by store operations in
//! op. Whoever takes a reference gives it back; at none the frame is free.
//!
//! What became free first is taken first. So frames in a row, which left the cache together, come back in a row: a read
//! into them is one segment for the store, and their bytes are copied in one piece. A cache that keeps nothing does it the
//! other way round: few frames, which stay in the processor's caches, are used over and over.

use crate::units::FrameId;

const FREE: u32 = 1 << 31;
const END: u32 = FREE - 1;

/// Reference counts and the free list in one word a frame: a count, or [`FREE`] and the next free frame.
#[derive(Debug)]
pub(super) struct Frames {
    words: Vec<u32>,
    /// The next frame to be taken, and the last; [`END`] where none is free.
    free_head: u32,
    free_tail: u32,
    free_count: u32,
    /// What became free last is taken first.
    newest_first: bool,
}

impl Frames {
    /// `count` free frames. `newest_first`: what becomes free last is taken first.
    pub fn new(count: u32, newest_first: bool) -> Self {
        assert!(count > 0 && count < END, "a cache has 1 to 2^31 frames");
        let words = (1..=count).map(|next| FREE | if next == count { END } else { next }).collect();
        Self { words, free_head: 0, free_tail: count - 1, free_count: count, newest_first }
    }

    /// Takes these frames, with one reference each, out of an allocator that has given out none.
    pub fn claim(&mut self, claimed: impl IntoIterator<Item = FrameId>) {
        assert_eq!(self.free_count, self.total(), "frames are claimed before any is taken");
        self.words.fill(0);
        for frame in claimed {
            self.words[frame.index()] = 1;
        }
        (self.free_head, self.free_tail, self.free_count) = (END, END, 0);
        for frame in 0..self.total() {
            if self.words[frame as usize] == 0 {
                self.put(frame);
            }
        }
    }

    /// Puts a frame behind those that are free.
    fn put(&mut self, frame: u32) {
        self.words[frame as usize] = FREE | END;
        match self.free_tail {
            END => self.free_head = frame,
            tail => self.words[tail as usize] = FREE | frame,
        }
        self.free_tail = frame;
        self.free_count += 1;
    }

    /// Takes a free frame, with one reference.
    pub fn take(&mut self) -> Option<FrameId> {
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

    /// One more reference to a frame that is held.
    pub fn hold(&mut self, frame: FrameId) {
        let word = &mut self.words[frame.index()];
        assert!(*word & FREE == 0, "{frame:?} is free and can't be held");
        *word += 1;
    }

    /// Gives a reference back; the last one frees the frame. Whether it did.
    pub fn release(&mut self, frame: FrameId) -> bool {
        let word = &mut self.words[frame.index()];
        assert!(*word & FREE == 0 && *word > 0, "{frame:?} is released once too often");
        *word -= 1;
        let freed = *word == 0;
        if freed && self.newest_first && self.free_head != END {
            *word = FREE | self.free_head;
            self.free_head = frame.0;
            self.free_count += 1;
        } else if freed {
            self.put(frame.0);
        }
        freed
    }

    /// References to a frame that is held.
    pub fn references(&self, frame: FrameId) -> u32 {
        let word = self.words[frame.index()];
        if word & FREE == 0 { word } else { 0 }
    }

    /// Frames nobody holds.
    pub fn free(&self) -> u32 {
        self.free_count
    }

    /// All frames.
    pub fn total(&self) -> u32 {
        u32::try_from(self.words.len()).expect("checked in new()")
    }

    /// Bytes of memory the counts take.
    pub fn metadata_bytes(&self) -> usize {
        self.words.capacity() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_free_again_when_its_last_reference_goes() {
        let mut frames = Frames::new(2, false);
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
    fn frames_come_back_in_the_order_in_which_they_went() {
        let mut frames = Frames::new(8, false);
        let held: Vec<FrameId> = std::iter::from_fn(|| frames.take()).collect();
        assert_eq!(held, (0..8).map(FrameId).collect::<Vec<_>>());
        for frame in [4, 5, 6, 0, 1].map(FrameId) {
            frames.release(frame);
        }
        assert_eq!(std::iter::from_fn(|| frames.take()).collect::<Vec<_>>(), [4, 5, 6, 0, 1].map(FrameId));
        let mut newest_first = Frames::new(3, true);
        let held: Vec<FrameId> = std::iter::from_fn(|| newest_first.take()).collect();
        for frame in held {
            newest_first.release(frame);
        }
        assert_eq!(std::iter::from_fn(|| newest_first.take()).collect::<Vec<_>>(), [2, 1, 0].map(FrameId));
        let mut claimed = Frames::new(4, false);
        claimed.claim([FrameId(1)]);
        assert_eq!(std::iter::from_fn(|| claimed.take()).collect::<Vec<_>>(), [0, 2, 3].map(FrameId));
    }

    #[test]
    #[should_panic(expected = "released once too often")]
    fn releasing_a_free_frame_is_caught() {
        let mut frames = Frames::new(1, false);
        frames.release(FrameId(0));
    }
}
