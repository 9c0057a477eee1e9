//! A page cache without data, for benchmarks of its decisions and its CPU time.

use genblk::cache::{
    Access, Admitted, Attempt, CopyResult, FrameMemory, Notice, Outcome, PageCache, Piece, Settings, Stats, Ticket,
};
use genblk::units::{FrameId, FrameRecord, PageNo, SECTORS_PER_PAGE, SectorMask, SectorSpan, Tick};

/// Frames without data.
#[derive(Debug)]
struct NoMemory;

impl FrameMemory for NoMemory {
    fn copy_sectors(&self, _: FrameId, _: FrameId, _: SectorMask) {}
    fn zero_sectors(&self, _: FrameId, _: SectorMask) {}
    fn publish(&self, _: FrameId, _: FrameRecord) {}
    fn zero_slots(&self) -> usize {
        1
    }
    fn note_zero(&self, _: usize, _: Option<SectorSpan>) {}
}

/// A page cache without data.
pub fn bare_cache(settings: Settings) -> PageCache {
    PageCache::new(settings, Box::new(NoMemory))
}

/// A page cache with one guest, on a store whose operations succeed at the end of the turn.
pub struct InstantStoreCache {
    cache: PageCache,
    now: Tick,
    pieces: Vec<Piece>,
    notices: Vec<Notice>,
    tags: Vec<u32>,
}

impl InstantStoreCache {
    /// The simulated duration of a turn.
    const TURN_US: u64 = 20;

    /// An empty cache.
    pub fn new(settings: Settings) -> Self {
        let cache = bare_cache(settings);
        Self { cache, now: Tick::ZERO, pieces: Vec::new(), notices: Vec::new(), tags: Vec::new() }
    }

    pub fn stats(&self) -> Stats {
        self.cache.stats()
    }

    /// Reads pages; misses complete with the next turn.
    pub fn read(&mut self, first: PageNo, pages: u64) {
        assert_eq!(self.cache.read(access(first, pages), &mut self.pieces), Admitted::All);
        self.pieces.drain(..).for_each(|piece| self.cache.finish_read(&piece));
    }

    /// Writes pages; at the dirty limit it takes turns until write-back has made room.
    pub fn write(&mut self, first: PageNo, pages: u64) {
        let mut access = access(first, pages);
        loop {
            let admitted = self.cache.write(access, &mut self.pieces);
            self.pieces.drain(..).for_each(|piece| self.cache.finish_write(&piece, CopyResult::Complete));
            match admitted {
                Admitted::All => return,
                Admitted::Until(from) => access = Access { from, attempt: Attempt::Resumed, ..access },
                Admitted::Refused(..) => unreachable!("nothing fails"),
            }
            self.turn();
        }
    }

    /// Pumps the cache and completes its store operations, until there are none left.
    pub fn turn(&mut self) {
        self.now = self.now.plus_us(Self::TURN_US);
        loop {
            self.cache.pump(self.now);
            self.cache.take_ops(|plan| self.tags.push(plan.tag));
            if self.tags.is_empty() {
                return;
            }
            self.tags.drain(..).for_each(|tag| self.cache.complete(tag, &Outcome::Done, self.now));
            self.cache.take_notices(&mut self.notices);
            for notice in self.notices.drain(..) {
                match notice {
                    Notice::Ready(_, piece) => self.cache.finish_read(&piece),
                    Notice::Resume(_) => {}
                    Notice::Unreadable(..) | Notice::Done(..) => {
                        unreachable!("nothing fails, and the guest does not flush")
                    }
                }
            }
        }
    }
}

fn access(first: PageNo, pages: u64) -> Access {
    let span = SectorSpan::new(first.0 * SECTORS_PER_PAGE, pages * SECTORS_PER_PAGE);
    Access::new(Ticket(0), span)
}
