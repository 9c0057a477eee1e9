//! The memory behind FrameIds: a mapping of shared memory, cut into 4 KiB frames.
//!
//! The arena hands out addresses; who may touch a frame's bytes is decided by the page cache's references (pins, store
//! operations, residency), never here.
//!
//! A *kept* arena is a file with a ledger of what each frame holds (`ledger.rs`), so that the cache outlives the daemon
//! that filled it. A *marked* one keeps no more than whether anything was lost. A *private* one keeps nothing. Dropping an
//! arena removes its file, unless something in it is nowhere else or it was left for a successor.

mod home;
mod ledger;
mod mapping;
mod populate;

use std::ops::Range;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::units::{FrameId, PAGE_BYTES, PAGE_SIZE, SECTOR_BYTES, SECTOR_SIZE, SectorMask, SectorSpan};

pub use home::Home;
pub use ledger::{Entry, Header, Identity, ZEROED_MAX};
pub use populate::Populator;

use ledger::{ENTRY_BYTES, FRAMES, HEADER_BYTES, THROUGH, UNWRITTEN, ZEROED_BYTES};
use mapping::Mapping;

/// See the module.
#[derive(Debug)]
pub struct Arena {
    memory: Mapping,
    frames: usize,
    /// Where the frames begin.
    offset: usize,
    keeps: Keeps,
    /// A predecessor's memory went with it, and with it what a guest believes to be in the image.
    lost: AtomicBool,
    /// The guest has chosen write-through.
    through: AtomicBool,
}

/// What of an arena outlives the daemon.
#[derive(Debug)]
enum Keeps {
    Nothing,
    /// A word that is set while something is nowhere else.
    Mark {
        mark: Mapping,
        home: Home,
    },
    /// Everything.
    All {
        home: Home,
        /// Where the zeroed ranges are noted; none in the first layout.
        zeroed: Option<usize>,
        /// Where the frames' entries begin.
        entries: usize,
        left: AtomicBool,
    },
}

impl Arena {
    /// `frames` frames of zeroed memory that goes with the daemon.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the host refuses, or has less memory available than that; the memory is reserved now,
    /// so that a guest's request never meets a shortage later.
    pub fn private(frames: usize) -> Result<Self> {
        Ok(Self::new(private_memory(frames)?, frames, 0, Keeps::Nothing))
    }

    /// As [`Arena::private`], with a mark in `home` of whether the daemon's death would lose anything, or `lost`: whether a
    /// predecessor's did.
    ///
    /// # Errors
    /// As [`Arena::private`].
    pub fn marked(frames: usize, home: Home, identity: Identity, image: &Path, lost: bool) -> Result<Self> {
        let memory = private_memory(frames)?;
        let mark = new_file(&home, HEADER_BYTES, &Header::new(identity, 0, image, lost))?;
        Ok(Self::new(memory, frames, 0, Keeps::Mark { mark, home }))
    }

    /// `frames` frames of zeroed memory that outlive the daemon in `home`; `lost` as for [`Arena::marked`].
    ///
    /// # Errors
    /// As [`Arena::private`].
    pub fn kept(frames: usize, home: Home, identity: Identity, image: &Path, lost: bool) -> Result<Self> {
        let header = Header::new(identity, frames as u64, image, lost);
        let bytes = bytes_of(frames, offset_of(&header, frames))?;
        if ledger::too_large(&identity) {
            return Err(Error::new(ErrorKind::Memory, "an image above 4 PiB can't have a kept cache"));
        }
        let memory = new_file(&home, bytes, &header)?;
        Self::of_home(memory, frames, home, &header)
    }

    /// The arena that a predecessor left in `home`; `header` is what stands there.
    ///
    /// => It stays as it is, though it be dropped, until [`Arena::take_up`]: who can't start may have started too early.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when the file is not what its header says; [`ErrorKind::Memory`] when it can't be mapped.
    pub fn resumed(home: Home, header: &Header) -> Result<Self> {
        let frames = usize::try_from(header.frames).unwrap_or(usize::MAX);
        let bytes = bytes_of(frames, offset_of(header, frames))?;
        let length = home.file.metadata().map_or(0, |metadata| metadata.len());
        if length < bytes as u64 {
            let context = format!("{home}: its header speaks of {bytes} bytes, and it has {length}");
            return Err(Error::new(ErrorKind::Ledger, context));
        }
        let memory = Mapping::new(&home.file, bytes)
            .map_err(|e| Error::io(ErrorKind::Memory, format!("cannot map {home}"), e))?;
        let arena = Self::of_home(memory, frames, home, header)?;
        arena.through.store(header.through, Ordering::Release);
        let sectors = header.identity.size_bytes / SECTOR_BYTES;
        let fits = |span: SectorSpan| span.start.checked_add(span.count).is_some_and(|end| end <= sectors);
        arena.leave();
        if arena.zeroed().all(|(_, span)| fits(span)) {
            return Ok(arena);
        }
        let context = format!("a ledger of {} speaks of sectors that it does not have", header.image.display());
        Err(Error::new(ErrorKind::Ledger, context))
    }

    /// A kept arena whose file is whole.
    fn of_home(memory: Mapping, frames: usize, home: Home, header: &Header) -> Result<Self> {
        home.seal().map_err(|e| Error::io(ErrorKind::Memory, format!("cannot seal {home}"), e))?;
        let (zeroed, entries) = (header.zeroed_at(), header.entries_at());
        let keeps = Keeps::All { home, zeroed, entries, left: AtomicBool::new(false) };
        Ok(Self::new(memory, frames, offset_of(header, frames), keeps))
    }

    fn new(memory: Mapping, frames: usize, offset: usize, keeps: Keeps) -> Self {
        Self { memory, frames, offset, keeps, lost: AtomicBool::new(false), through: AtomicBool::new(false) }
    }

    /// Number of frames.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// First byte of a frame.
    ///
    /// # Panics
    /// If `frame` is not of this arena: the page cache's bookkeeping is broken.
    pub fn frame(&self, frame: FrameId) -> *mut u8 {
        assert!(frame.index() < self.frames, "{frame:?} is outside the arena");
        self.memory.at(self.offset + frame.index() * PAGE_SIZE)
    }

    /// The addresses of all frames, which follow each other.
    pub fn addresses(&self) -> Range<usize> {
        let first = self.memory.at(self.offset).expose_provenance();
        first..first + self.frames * PAGE_SIZE
    }

    /// Notes what a frame holds, whose bytes are in place.
    pub fn publish(&self, frame: FrameId, entry: Entry) {
        match &self.keeps {
            Keeps::Nothing => {}
            Keeps::Mark { mark, .. } => note_unwritten(mark, !entry.dirty.is_empty()),
            Keeps::All { entries, .. } => self.entry(*entries, frame.index()).store(entry.encode(), Ordering::Release),
        }
    }

    /// Notes in a place that a range is to read as zeros; `None`: the place is empty.
    pub fn note_zeroed(&self, place: usize, span: Option<SectorSpan>) {
        match &self.keeps {
            Keeps::Nothing => {}
            Keeps::Mark { mark, .. } => note_unwritten(mark, span.is_some()),
            Keeps::All { zeroed, .. } => {
                let (start, count) = self.place(zeroed.expect("a cache goes on in a new layout only"), place);
                if let Some(span) = span {
                    // The place was empty, and is until there is a count.
                    start.store(span.start, Ordering::Release);
                }
                count.store(span.map_or(0, |span| span.count), Ordering::Release);
            }
        }
    }

    /// The ranges that are to read as zeros by their places, as last noted.
    pub fn zeroed(&self) -> impl Iterator<Item = (usize, SectorSpan)> {
        let noted = if let Keeps::All { zeroed, .. } = &self.keeps { *zeroed } else { None };
        noted.into_iter().flat_map(|at| (0..ZEROED_MAX).map(move |place| (at, place))).filter_map(|(at, place)| {
            let (start, count) = self.place(at, place);
            let span = SectorSpan::new(start.load(Ordering::Acquire), count.load(Ordering::Acquire));
            (span.count > 0).then_some((place, span))
        })
    }

    /// A predecessor died and took what it held with it. This is remembered until [`Arena::begin_anew`], by whatever
    /// daemon runs then.
    pub fn remember_loss(&self) {
        self.lost.store(true, Ordering::Release);
        self.loss_word().inspect(|word| word.store(1, Ordering::Release));
    }

    /// Whether a guest may believe in data that is gone.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// The guest begins anew, and believes in nothing but the image.
    ///
    /// => Only a loss is forgotten: the same word may say that something is unwritten now, which the guest still reads. While
    ///    there is a loss every request fails, so nothing is.
    pub fn begin_anew(&self) {
        if self.lost.swap(false, Ordering::AcqRel) {
            self.loss_word().inspect(|word| word.store(0, Ordering::Release));
        }
    }

    /// Remembers whether the guest has chosen write-through: for this daemon, and where the arena or its mark outlives it for
    /// the next, whose front-end will not say it again.
    pub fn remember_through(&self, through: bool) {
        self.through.store(through, Ordering::Release);
        self.header().inspect(|header| header.word(THROUGH).store(through.into(), Ordering::Release));
    }

    /// Whether the guest has chosen write-through.
    pub fn is_through(&self) -> bool {
        self.through.load(Ordering::Acquire)
    }

    fn loss_word(&self) -> Option<&AtomicU64> {
        self.header().map(|header| header.word(UNWRITTEN))
    }

    /// Where the header is, in an arena that has one.
    fn header(&self) -> Option<&Mapping> {
        match &self.keeps {
            Keeps::Nothing => None,
            Keeps::Mark { mark, .. } => Some(mark),
            Keeps::All { .. } => Some(&self.memory),
        }
    }

    /// What frames hold, as last noted.
    pub fn entries(&self) -> impl Iterator<Item = (FrameId, Entry)> {
        let (noted, at) = if let Keeps::All { entries, .. } = &self.keeps { (self.frames, *entries) } else { (0, 0) };
        (0..noted).filter_map(move |index| {
            let entry = Entry::decode(self.entry(at, index).load(Ordering::Acquire))?;
            Some((FrameId(u32::try_from(index).expect("a cache has fewer than 2^31 frames")), entry))
        })
    }

    /// Everything is on the image: the daemon's death would lose nothing.
    pub fn all_written(&self) {
        if let Keeps::Mark { mark, .. } = &self.keeps
            && mark.word(UNWRITTEN).load(Ordering::Relaxed) != 0
            && !self.is_lost()
        {
            mark.word(UNWRITTEN).store(0, Ordering::Release);
        }
    }

    /// Leaves a kept arena as it is for a successor, when it is dropped.
    pub fn leave(&self) {
        self.set_left(true);
    }

    /// A kept arena goes when it is dropped, if all of it is on the image: whoever has resumed it serves it now.
    pub fn take_up(&self) {
        self.set_left(false);
    }

    fn set_left(&self, leave: bool) {
        if let Keeps::All { left, .. } = &self.keeps {
            left.store(leave, Ordering::Release);
        }
    }

    /// Removes the file of an arena whose contents are on the image.
    pub fn remove(self) {
        if let Keeps::All { home, .. } = &self.keeps {
            home.remove();
        }
    }

    /// A copy of sectors of a frame that nobody else touches.
    pub fn sectors(&self, frame: FrameId, first: u8, count: u8) -> Vec<u8> {
        let mut bytes = vec![0; usize::from(count) * SECTOR_SIZE];
        let base = self.frame(frame).wrapping_add(usize::from(first) * SECTOR_SIZE);
        assert!(usize::from(first) + usize::from(count) <= PAGE_SIZE / SECTOR_SIZE, "sectors of one frame");
        // SAFETY: the sectors lie in the frame, and the vector is as long as they are.
        unsafe { ptr::copy_nonoverlapping(base, bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }

    /// The file in which the frames outlive the daemon.
    pub fn kept_in(&self) -> Option<&Home> {
        match &self.keeps {
            Keeps::All { home, .. } => Some(home),
            _ => None,
        }
    }

    /// Bytes of memory beside the frames.
    pub fn overhead_bytes(&self) -> usize {
        self.offset
    }

    /// The word of a frame among the entries that begin at byte `at`.
    fn entry(&self, at: usize, index: usize) -> &AtomicU64 {
        self.memory.word(at + index * ENTRY_BYTES)
    }

    /// First sector and number of sectors of a place in the table of zeroed ranges that begins at byte `at`.
    fn place(&self, at: usize, place: usize) -> (&AtomicU64, &AtomicU64) {
        assert!(place < ZEROED_MAX, "place {place} is outside the table");
        (self.memory.word(at + place * ZEROED_BYTES), self.memory.word(at + place * ZEROED_BYTES + 8))
    }

    /// Whether something in the arena is nowhere else.
    fn holds_unwritten(&self) -> bool {
        let marked = self.loss_word().is_some_and(|word| word.load(Ordering::Relaxed) != 0);
        marked || self.zeroed().next().is_some() || self.entries().any(|(_, entry)| !entry.dirty.is_empty())
    }

    /// Copies the sectors of `mask` from one frame to the same places of another.
    pub fn copy_sectors(&self, source: FrameId, target: FrameId, mask: SectorMask) {
        let (source, target) = (self.frame(source), self.frame(target));
        each_run(mask, |offset, len| {
            // SAFETY: both frames lie in the arena and are distinct pages; the caller (the page cache, under its lock)
            // owns the target's sectors.
            unsafe { ptr::copy_nonoverlapping(source.add(offset), target.add(offset), len) };
        });
    }

    /// Fills the sectors of `mask` with zeros.
    pub fn zero_sectors(&self, frame: FrameId, mask: SectorMask) {
        let target = self.frame(frame);
        each_run(mask, |offset, len| {
            // SAFETY: the frame lies in the arena; the caller owns those sectors.
            unsafe { ptr::write_bytes(target.add(offset), 0, len) };
        });
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let unwritten = self.holds_unwritten();
        match &self.keeps {
            Keeps::All { home, left, .. } if !unwritten && !left.load(Ordering::Acquire) => {
                // A header without frames is the mark of an arena that has gone.
                self.memory.word(FRAMES).store(0, Ordering::Release);
                if !(self.is_through() && home.shrink_to_header()) {
                    home.remove();
                }
            }
            Keeps::Mark { home, .. } if !unwritten && !self.is_through() => home.remove(),
            _ => {}
        }
    }
}

/// Bytes before the first of `frames` frames of a kept arena.
fn offset_of(header: &Header, frames: usize) -> usize {
    frames.saturating_mul(ENTRY_BYTES).saturating_add(header.entries_at()).next_multiple_of(PAGE_SIZE)
}

/// The daemon's death would lose something from now on, if it would not have before.
fn note_unwritten(mark: &Mapping, unwritten: bool) {
    if unwritten && mark.word(UNWRITTEN).load(Ordering::Relaxed) == 0 {
        mark.word(UNWRITTEN).store(1, Ordering::Release);
    }
}

/// Bytes of `frames` frames behind `offset` bytes.
fn bytes_of(frames: usize, offset: usize) -> Result<usize> {
    frames
        .checked_mul(PAGE_SIZE)
        .and_then(|bytes| bytes.checked_add(offset))
        .ok_or_else(|| Error::new(ErrorKind::Memory, format!("a cache of {frames} pages overflows the address space")))
}

fn private_memory(frames: usize) -> Result<Mapping> {
    let bytes = bytes_of(frames, 0)?;
    let make = || {
        let file = mapping::memfd()?;
        mapping::allocate(&file, bytes)?;
        Mapping::new(&file, bytes)
    };
    make().map_err(|e| Error::io(ErrorKind::Memory, format!("no memory for a cache of {bytes} bytes"), e))
}

/// Makes a file anew: memory first, then the header, whose first word says that the rest is right.
///
/// => A mark that tells of a loss stands in the file until the header that tells of it too takes its place: the daemon may be
///    killed meanwhile.
fn new_file(home: &Home, bytes: usize, header: &Header) -> Result<Mapping> {
    let stays = if header.lost { HEADER_BYTES as u64 } else { 0 };
    let make = || {
        home.file.set_len(stays)?;
        mapping::allocate(&home.file, bytes)?;
        Mapping::new(&home.file, bytes)
    };
    let memory = make().map_err(|e| {
        // What could not be made whole takes no room, and goes with its home.
        let _ = home.file.set_len(stays);
        let cache = header.frames * PAGE_BYTES;
        Error::io(ErrorKind::Memory, format!("no memory for a cache of {cache} bytes in {home}"), e)
    })?;
    let (encoded, magic) = header.encode();
    memory.write(&encoded, magic);
    Ok(memory)
}

/// Calls `f(offset, length)` in bytes for each run of sectors in `mask`.
fn each_run(mut mask: SectorMask, mut f: impl FnMut(usize, usize)) {
    let sector = SECTOR_SIZE;
    while let Some((first, count)) = mask.first_run() {
        f(usize::from(first) * sector, usize::from(count) * sector);
        mask = mask.without(SectorMask::run(first, count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ledger_takes_0_2_percent_and_three_pages_at_most() {
        for mib in [4, 6, 256, 8192] {
            let frames = (mib << 20) / PAGE_SIZE;
            let identity = Identity { device: 1, inode: 2, born_ns: 3, size_bytes: 1 << 30 };
            let header = Header::new(identity, frames as u64, Path::new("/image"), false);
            let bytes = offset_of(&header, frames);
            assert!(bytes <= frames * PAGE_SIZE / 500 + 3 * PAGE_SIZE, "{bytes} for {mib} MiB");
        }
    }

    #[test]
    fn sectors_are_copied_and_zeroed_by_mask_only() {
        let arena = Arena::private(2).unwrap();
        let (a, b) = (FrameId(0), FrameId(1));
        // SAFETY: both frames belong to this test alone.
        unsafe {
            ptr::write_bytes(arena.frame(a), 7, PAGE_SIZE);
            ptr::write_bytes(arena.frame(b), 9, PAGE_SIZE);
        }
        arena.copy_sectors(a, b, SectorMask(0b0010_0110));
        arena.zero_sectors(b, SectorMask(0b1000_0000));
        let expected = [9, 7, 7, 9, 9, 7, 9, 0];
        for (sector, want) in expected.into_iter().enumerate() {
            for byte in 0..512 {
                // SAFETY: within the frame.
                assert_eq!(unsafe { *arena.frame(b).add(sector * 512 + byte) }, want);
            }
        }
    }

    #[test]
    fn an_arena_beyond_memory_is_refused_with_a_clear_error() {
        for frames in [1 << 40, usize::MAX / 2] {
            assert_eq!(Arena::private(frames).unwrap_err().kind(), ErrorKind::Memory);
        }
    }
}
