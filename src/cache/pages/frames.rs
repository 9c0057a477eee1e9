//! Reference counts of the frames, and the list of the free ones.
//!
//! A page in memory, each pin (a copy to or from guest memory in flight) and each store operation hold one reference to
//! their frame. A frame with no reference is free.
//!
//! The list is a queue in most caches: the frame that was freed first is taken first. Adjacent frames are mostly freed
//! together, so they are taken together again: a read into them is one segment for the store, and one piece to copy. A
//! cache that retains nothing uses a stack: it reuses the same few frames, which stay in the CPU's caches.
//!
//! The number of frames in use is limited, and the limit can change. Frames from the limit on are *leaving*: they do
//! not count as free, and each is *retired* once nothing holds it. A frame without memory is retired.

use super::super::growing::vec_for;
use crate::units::FrameId;

/// This frame is free; the other bits are the next free frame.
const FREE: u32 = 1 << 31;
/// No next free frame.
const END: u32 = FREE - 1;
/// This frame is retired: neither held nor in the list.
const RETIRED: u32 = FREE | (END - 1);

/// The order in which free frames are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reuse {
    /// The one that was freed first.
    OldestFirst,
    /// The one that was freed last.
    NewestFirst,
}

/// Reference counts and the free list, in one word for each frame: a count, or [`FREE`] and the next free frame, or
/// [`RETIRED`]. `Pages` alone changes them.
///
/// => Every frame is free, held or retired (I9): it is in the list, or has a count, or neither.
#[derive(Debug)]
pub(in crate::cache) struct Frames {
    words: Vec<u32>,
    /// The next free frame to be taken and the last one; [`END`] if none is free.
    free_head: u32,
    free_tail: u32,
    /// Frames in the list below the limit.
    free_count: u32,
    /// Frames in the list from the limit on.
    leaving_listed: u32,
    /// Held frames from the limit on.
    leaving_held: u32,
    /// Number of frames to use, counted from the first.
    limit: u32,
    reuse: Reuse,
}

impl Frames {
    /// `count` free frames, later at most `count_max`.
    pub(super) fn new(count: u32, count_max: u32, reuse: Reuse) -> Self {
        assert!(count > 0 && count < END - 1, "a cache has 1 to 2^31 frames");
        let mut words = vec_for(count_max);
        words.extend((1..=count).map(|next| FREE | if next == count { END } else { next }));
        let (free_head, free_tail) = (0, count - 1);
        Self { words, free_head, free_tail, free_count: count, leaving_listed: 0, leaving_held: 0, limit: count, reuse }
    }

    /// Takes these frames, with one reference each.
    ///
    /// => Call it while no frame is held.
    pub(super) fn claim(&mut self, claimed: impl IntoIterator<Item = FrameId>) {
        assert_eq!(self.free_count, self.limit, "a frame was taken before others were claimed");
        self.words.fill(0);
        for frame in claimed {
            self.words[frame.index()] = 1;
        }
        (self.free_head, self.free_tail, self.free_count) = (END, END, 0);
        for frame in 0..self.limit {
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

    /// Takes the first frame from the list.
    fn pop(&mut self) -> Option<u32> {
        if self.free_head == END {
            return None;
        }
        let frame = self.free_head;
        self.free_head = self.words[frame as usize] & !FREE;
        if self.free_head == END {
            self.free_tail = END;
        }
        if frame < self.limit {
            self.free_count -= 1;
        } else {
            self.leaving_listed -= 1;
        }
        Some(frame)
    }

    /// Takes a free frame, with one reference. It may be a leaving frame that is still in the list.
    pub(super) fn take(&mut self) -> Option<FrameId> {
        if self.free_count == 0 {
            return None;
        }
        let frame = self.pop()?;
        self.words[frame as usize] = 1;
        self.leaving_held += u32::from(frame >= self.limit);
        Some(FrameId(frame))
    }

    /// Uses more frames, up to the first `limit` ones. Frames that still leave stay in use.
    pub(super) fn raise_limit(&mut self, limit: u32) {
        assert!(limit < END - 1, "a cache has 1 to 2^31 frames");
        while self.limit < limit {
            let frame = self.limit;
            self.limit += 1;
            match self.words.get(frame as usize).copied() {
                Some(word) if word & FREE == 0 => self.leaving_held -= 1,
                Some(word) if word != RETIRED => {
                    (self.free_count, self.leaving_listed) = (self.free_count + 1, self.leaving_listed - 1);
                }
                Some(_) => self.append(frame),
                None => {
                    self.words.push(RETIRED);
                    self.append(frame);
                }
            }
        }
    }

    /// Uses fewer frames, while `spare` of them stay free: at best only the first `limit` ones. The others leave.
    ///
    /// => Spare frames that are in use do not leave: they would not become free again.
    pub(super) fn lower_limit(&mut self, limit: u32, spare: u32) {
        assert!(limit > 0, "a cache has 1 to 2^31 frames");
        while self.limit > limit && self.free_count >= spare {
            let is_held = self.words[self.limit as usize - 1] & FREE == 0;
            if is_held {
                self.leaving_held += 1;
            } else if self.free_count > spare {
                (self.free_count, self.leaving_listed) = (self.free_count - 1, self.leaving_listed + 1);
            } else {
                return;
            }
            self.limit -= 1;
        }
    }

    /// Retires leaving frames among the next `count` ones in the list.
    pub(super) fn retire_listed(&mut self, count: u32) {
        for _ in 0..count {
            if self.leaving_listed == 0 {
                return;
            }
            let Some(frame) = self.pop() else { return };
            if frame < self.limit {
                self.append(frame);
            } else {
                self.words[frame as usize] = RETIRED;
            }
        }
    }

    /// Whether no frame is leaving: all from the limit on are retired.
    pub fn all_retired(&self) -> bool {
        self.leaving_listed == 0 && self.leaving_held == 0
    }

    /// Whether a frame is leaving, or has left.
    pub(super) fn is_leaving(&self, frame: FrameId) -> bool {
        frame.0 >= self.limit
    }

    /// Number of leaving frames that are in the list.
    pub fn leaving_listed(&self) -> u32 {
        self.leaving_listed
    }

    /// Number of leaving frames that are held.
    pub fn leaving_held(&self) -> u32 {
        self.leaving_held
    }

    /// Adds a reference to a frame that is held.
    pub(super) fn hold(&mut self, frame: FrameId) {
        let word = &mut self.words[frame.index()];
        assert!(*word & FREE == 0, "{frame:?} is free: it must be taken first");
        *word += 1;
    }

    /// Drops a reference. Returns whether it was the last one, which frees the frame or retires it.
    pub(super) fn release(&mut self, frame: FrameId) -> bool {
        let word = &mut self.words[frame.index()];
        assert!(*word & FREE == 0 && *word > 0, "{frame:?} is released too often");
        *word -= 1;
        let freed = *word == 0;
        if freed && frame.0 >= self.limit {
            *word = RETIRED;
            self.leaving_held -= 1;
        } else if freed && self.reuse == Reuse::NewestFirst && self.free_head != END {
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

    /// Number of free frames, without leaving ones.
    pub fn free(&self) -> u32 {
        self.free_count
    }

    /// Number of frames to use.
    pub fn total(&self) -> u32 {
        self.limit
    }

    /// Number of frames that are not retired, of which those from [`Frames::total`] on are leaving.
    pub fn in_use(&self) -> u32 {
        self.limit + self.leaving_listed + self.leaving_held
    }

    /// All frames, including retired ones.
    pub(super) fn known(&self) -> impl Iterator<Item = FrameId> {
        (0..).map(FrameId).take(self.words.len())
    }

    /// Bytes of memory that the counts take.
    pub fn metadata_bytes(&self) -> usize {
        self.words.len() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_the_last_reference_frees_a_frame() {
        let mut frames = Frames::new(2, 2, Reuse::OldestFirst);
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
    fn the_frame_that_was_freed_first_is_taken_first() {
        let mut frames = Frames::new(8, 8, Reuse::OldestFirst);
        let held: Vec<FrameId> = std::iter::from_fn(|| frames.take()).collect();
        assert_eq!(held, (0..8).map(FrameId).collect::<Vec<_>>());
        for frame in [4, 5, 6, 0, 1].map(FrameId) {
            frames.release(frame);
        }
        assert_eq!(std::iter::from_fn(|| frames.take()).collect::<Vec<_>>(), [4, 5, 6, 0, 1].map(FrameId));
        let mut newest_first = Frames::new(3, 3, Reuse::NewestFirst);
        let held: Vec<FrameId> = std::iter::from_fn(|| newest_first.take()).collect();
        for frame in held {
            newest_first.release(frame);
        }
        assert_eq!(std::iter::from_fn(|| newest_first.take()).collect::<Vec<_>>(), [2, 1, 0].map(FrameId));
        let mut claimed = Frames::new(4, 4, Reuse::OldestFirst);
        claimed.claim([FrameId(1)]);
        assert_eq!(std::iter::from_fn(|| claimed.take()).collect::<Vec<_>>(), [0, 2, 3].map(FrameId));
    }

    #[test]
    #[should_panic(expected = "released too often")]
    fn releasing_a_free_frame_panics() {
        let mut frames = Frames::new(1, 1, Reuse::OldestFirst);
        frames.release(FrameId(0));
    }

    fn taken(frames: &mut Frames) -> Vec<u32> {
        std::iter::from_fn(|| frames.take()).map(|frame| frame.0).collect()
    }

    #[test]
    fn a_frame_above_the_limit_is_retired_once_nothing_holds_it() {
        let mut frames = Frames::new(8, 16, Reuse::OldestFirst);
        assert_eq!([0, 1, 2].map(|_| frames.take().unwrap().0), [0, 1, 2]);
        frames.lower_limit(2, 2);
        assert_eq!((frames.free(), frames.total()), (2, 5), "two stay free");
        // 2 is held, 3 and 4 are in the list.
        frames.lower_limit(2, 0);
        assert_eq!((frames.free(), frames.total(), frames.in_use()), (0, 2, 8));
        assert_eq!(frames.take(), None, "leaving frames are not free");
        frames.retire_listed(3);
        assert_eq!((frames.in_use(), frames.all_retired()), (5, false));
        frames.retire_listed(100);
        assert_eq!((frames.in_use(), frames.all_retired(), frames.leaving_held()), (3, false, 1));
        frames.release(FrameId(0));
        assert_eq!(frames.free(), 1);
        frames.release(FrameId(2));
        assert!(frames.all_retired());
        assert_eq!(frames.in_use(), 2);
        frames.raise_limit(12);
        assert_eq!((frames.free(), frames.in_use()), (11, 12));
        assert_eq!(taken(&mut frames), [&[0], (2..12).collect::<Vec<_>>().as_slice()].concat());
    }

    #[test]
    fn reverting_a_change_of_the_limit_restores_every_frame() {
        let mut frames = Frames::new(8, 8, Reuse::OldestFirst);
        let held = [0; 5].map(|_| frames.take().unwrap());
        frames.lower_limit(3, 0);
        frames.retire_listed(1);
        frames.raise_limit(8);
        assert!(frames.all_retired());
        assert_eq!((frames.free(), frames.in_use()), (3, 8));
        for frame in held {
            frames.release(frame);
        }
        assert_eq!(frames.free(), 8);
        let mut all = taken(&mut frames);
        all.sort_unstable();
        assert_eq!(all, (0..8).collect::<Vec<_>>());
    }
}
