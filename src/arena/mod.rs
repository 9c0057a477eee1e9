//! The memory behind FrameIds: a mapping of shared memory, cut into 4 KiB frames.
//!
//! The arena hands out addresses; who may touch a frame's bytes is decided by the page cache's references (pins, store
//! operations, residency), never here.
//!
//! A *kept* arena is a file with a ledger of what each frame holds (`ledger.rs`), so that the cache outlives the daemon
//! that filled it. A *marked* one persistence no more than whether anything was lost. A *private* one persistence nothing. Dropping an
//! arena removes its file, unless something in it is nowhere else or it was left for a successor.

mod file;
mod ledger;
mod mapping;
mod populate;

use std::ops::Range;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::units::{FrameId, FrameRecord, PAGE_BYTES, PAGE_SIZE, SECTOR_BYTES, SECTOR_SIZE, SectorMask, SectorSpan};

pub use file::ArenaFile;
pub use ledger::{Header, ZERO_SLOTS};
pub use populate::Populator;

use ledger::{FRAMES, HEADER_BYTES, RECORD_BYTES, UNWRITTEN, WRITE_THROUGH, ZERO_SLOT_BYTES};
use mapping::Mapping;

/// See the module.
#[derive(Debug)]
pub struct Arena {
    memory: Mapping,
    frames: usize,
    /// Where the frames begin.
    offset: usize,
    persistence: Persistence,
    /// A predecessor's memory went with it, and with it what a guest believes to be in the image.
    lost: AtomicBool,
    /// The guest has chosen write-through.
    write_through: AtomicBool,
}

/// What of an arena outlives the daemon.
#[derive(Debug)]
enum Persistence {
    None,
    /// A word that is set while something is nowhere else.
    LossMarker {
        marker: Mapping,
        file: ArenaFile,
    },
    /// Everything.
    Full {
        file: ArenaFile,
        /// Where the zeroed ranges are noted; none in the first layout.
        zero_slots: Option<usize>,
        /// Where the frames' entries begin.
        records: usize,
        keep_on_drop: AtomicBool,
    },
}

impl Arena {
    /// `frames` frames of zeroed memory that goes with the daemon.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the host refuses, or has less memory available than that; the memory is reserved now,
    /// so that a guest's request never meets a shortage later.
    pub fn anonymous(frames: usize) -> Result<Self> {
        Ok(Self::new(anonymous_memory(frames)?, frames, 0, Persistence::None))
    }

    /// As [`Arena::anonymous`], with a marker in `file` of whether the daemon's death would lose anything, or `lost`: whether a
    /// predecessor's did.
    ///
    /// # Errors
    /// As [`Arena::anonymous`].
    pub fn loss_marker(frames: usize, file: ArenaFile, identity: ImageId, image: &Path, lost: bool) -> Result<Self> {
        let memory = anonymous_memory(frames)?;
        let marker = new_file(&file, HEADER_BYTES, &Header::new(identity, 0, image, lost))?;
        Ok(Self::new(memory, frames, 0, Persistence::LossMarker { marker, file }))
    }

    /// `frames` frames of zeroed memory that outlive the daemon in `file`; `lost` as for [`Arena::loss_marker`].
    ///
    /// # Errors
    /// As [`Arena::anonymous`].
    pub fn persistent(frames: usize, file: ArenaFile, identity: ImageId, image: &Path, lost: bool) -> Result<Self> {
        let header = Header::new(identity, frames as u64, image, lost);
        let bytes = bytes_of(frames, offset_of(&header, frames))?;
        if ledger::too_large(&identity) {
            return Err(Error::new(ErrorKind::Memory, "an image above 4 PiB can't have a kept cache"));
        }
        let memory = new_file(&file, bytes, &header)?;
        Self::with_file(memory, frames, file, &header)
    }

    /// The arena that a predecessor left in `file`; `header` is what stands there.
    ///
    /// => It stays as it is, though it be dropped, until [`Arena::keep_on_drop`] says otherwise: who can't start may have started too early.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when the file is not what its header says; [`ErrorKind::Memory`] when it can't be mapped.
    pub fn attach(file: ArenaFile, header: &Header) -> Result<Self> {
        let frames = usize::try_from(header.frames).unwrap_or(usize::MAX);
        let bytes = bytes_of(frames, offset_of(header, frames))?;
        let length = file.file.metadata().map_or(0, |metadata| metadata.len());
        if length < bytes as u64 {
            let context = format!("{file}: its header speaks of {bytes} bytes, and it has {length}");
            return Err(Error::new(ErrorKind::Ledger, context));
        }
        let memory = Mapping::new(&file.file, bytes)
            .map_err(|e| Error::io(ErrorKind::Memory, format!("cannot map {file}"), e))?;
        let arena = Self::with_file(memory, frames, file, header)?;
        arena.write_through.store(header.write_through, Ordering::Release);
        let sectors = header.identity.size_bytes / SECTOR_BYTES;
        let fits = |span: SectorSpan| span.start.checked_add(span.count).is_some_and(|end| end <= sectors);
        arena.keep_on_drop(true);
        if arena.pending_zeroes().all(|(_, span)| fits(span)) {
            return Ok(arena);
        }
        let context = format!("a ledger of {} speaks of sectors that it does not have", header.image.display());
        Err(Error::new(ErrorKind::Ledger, context))
    }

    /// A kept arena whose file is whole.
    fn with_file(memory: Mapping, frames: usize, file: ArenaFile, header: &Header) -> Result<Self> {
        file.seal().map_err(|e| Error::io(ErrorKind::Memory, format!("cannot seal {file}"), e))?;
        let (zero_slots, records) = (header.zero_slots_at(), header.records_at());
        let persistence = Persistence::Full { file, zero_slots, records, keep_on_drop: AtomicBool::new(false) };
        Ok(Self::new(memory, frames, offset_of(header, frames), persistence))
    }

    fn new(memory: Mapping, frames: usize, offset: usize, persistence: Persistence) -> Self {
        Self {
            memory,
            frames,
            offset,
            persistence,
            lost: AtomicBool::new(false),
            write_through: AtomicBool::new(false),
        }
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
    pub fn publish(&self, frame: FrameId, record: FrameRecord) {
        match &self.persistence {
            Persistence::None => {}
            Persistence::LossMarker { marker, .. } => note_unwritten(marker, !record.dirty.is_empty()),
            Persistence::Full { records, .. } => {
                self.record(*records, frame.index()).store(ledger::encode_record(record), Ordering::Release)
            }
        }
    }

    /// Notes in a place that a range is to read as zeros; `None`: the place is empty.
    pub fn note_zero(&self, place: usize, span: Option<SectorSpan>) {
        match &self.persistence {
            Persistence::None => {}
            Persistence::LossMarker { marker, .. } => note_unwritten(marker, span.is_some()),
            Persistence::Full { zero_slots, .. } => {
                let (start, count) = self.zero_slot(zero_slots.expect("a cache goes on in a new layout only"), place);
                if let Some(span) = span {
                    // The place was empty, and is until there is a count.
                    start.store(span.start, Ordering::Release);
                }
                count.store(span.map_or(0, |span| span.count), Ordering::Release);
            }
        }
    }

    /// The ranges that are to read as zeros by their places, as last noted.
    pub fn pending_zeroes(&self) -> impl Iterator<Item = (usize, SectorSpan)> {
        let noted = if let Persistence::Full { zero_slots, .. } = &self.persistence { *zero_slots } else { None };
        noted.into_iter().flat_map(|at| (0..ZERO_SLOTS).map(move |place| (at, place))).filter_map(|(at, place)| {
            let (start, count) = self.zero_slot(at, place);
            let span = SectorSpan::new(start.load(Ordering::Acquire), count.load(Ordering::Acquire));
            (span.count > 0).then_some((place, span))
        })
    }

    /// A predecessor died and took what it held with it. This is remembered until [`Arena::clear_data_loss`], by whatever
    /// daemon runs then.
    pub fn set_data_loss(&self) {
        self.lost.store(true, Ordering::Release);
        self.loss_word().inspect(|word| word.store(1, Ordering::Release));
    }

    /// Whether a guest may believe in data that is gone.
    pub fn has_data_loss(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// The guest begins anew, and believes in nothing but the image.
    ///
    /// => Only a loss is forgotten: the same word may say that something is unwritten now, which the guest still reads. While
    ///    there is a loss every request fails, so nothing is.
    pub fn clear_data_loss(&self) {
        if self.lost.swap(false, Ordering::AcqRel) {
            self.loss_word().inspect(|word| word.store(0, Ordering::Release));
        }
    }

    /// Remembers whether the guest has chosen write-through: for this daemon, and where the arena or its marker outlives it for
    /// the next, whose front-end will not say it again.
    pub fn set_write_through(&self, write_through: bool) {
        self.write_through.store(write_through, Ordering::Release);
        self.header().inspect(|header| header.word(WRITE_THROUGH).store(write_through.into(), Ordering::Release));
    }

    /// Whether the guest has chosen write-through.
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Acquire)
    }

    fn loss_word(&self) -> Option<&AtomicU64> {
        self.header().map(|header| header.word(UNWRITTEN))
    }

    /// Where the header is, in an arena that has one.
    fn header(&self) -> Option<&Mapping> {
        match &self.persistence {
            Persistence::None => None,
            Persistence::LossMarker { marker, .. } => Some(marker),
            Persistence::Full { .. } => Some(&self.memory),
        }
    }

    /// What frames hold, as last noted.
    pub fn records(&self) -> impl Iterator<Item = (FrameId, FrameRecord)> {
        let (noted, at) =
            if let Persistence::Full { records, .. } = &self.persistence { (self.frames, *records) } else { (0, 0) };
        (0..noted).filter_map(move |index| {
            let record = ledger::decode_record(self.record(at, index).load(Ordering::Acquire))?;
            Some((FrameId(u32::try_from(index).expect("a cache has fewer than 2^31 frames")), record))
        })
    }

    /// Everything is on the image: the daemon's death would lose nothing.
    pub fn all_written(&self) {
        if let Persistence::LossMarker { marker, .. } = &self.persistence
            && marker.word(UNWRITTEN).load(Ordering::Relaxed) != 0
            && !self.has_data_loss()
        {
            marker.word(UNWRITTEN).store(0, Ordering::Release);
        }
    }

    /// Whether dropping the arena leaves its file for the next daemon (`true`), or removes it once nothing in it is dirty.
    pub fn keep_on_drop(&self, keep: bool) {
        if let Persistence::Full { keep_on_drop, .. } = &self.persistence {
            keep_on_drop.store(keep, Ordering::Release);
        }
    }

    /// Removes the file of an arena whose contents are on the image.
    pub fn remove(self) {
        if let Persistence::Full { file, .. } = &self.persistence {
            file.remove();
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
    pub fn file(&self) -> Option<&ArenaFile> {
        match &self.persistence {
            Persistence::Full { file, .. } => Some(file),
            _ => None,
        }
    }

    /// Bytes of memory beside the frames.
    pub fn overhead_bytes(&self) -> usize {
        self.offset
    }

    /// The word of a frame among the entries that begin at byte `at`.
    fn record(&self, at: usize, index: usize) -> &AtomicU64 {
        self.memory.word(at + index * RECORD_BYTES)
    }

    /// First sector and number of sectors of a place in the table of zeroed ranges that begins at byte `at`.
    fn zero_slot(&self, at: usize, place: usize) -> (&AtomicU64, &AtomicU64) {
        assert!(place < ZERO_SLOTS, "place {place} is outside the table");
        (self.memory.word(at + place * ZERO_SLOT_BYTES), self.memory.word(at + place * ZERO_SLOT_BYTES + 8))
    }

    /// Whether something in the arena is nowhere else.
    fn holds_unwritten(&self) -> bool {
        let marked = self.loss_word().is_some_and(|word| word.load(Ordering::Relaxed) != 0);
        marked || self.pending_zeroes().next().is_some() || self.records().any(|(_, record)| !record.dirty.is_empty())
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
        match &self.persistence {
            Persistence::Full { file, keep_on_drop, .. } if !unwritten && !keep_on_drop.load(Ordering::Acquire) => {
                // A header without frames is the marker of an arena that has gone.
                self.memory.word(FRAMES).store(0, Ordering::Release);
                if !(self.is_write_through() && file.shrink_to_header()) {
                    file.remove();
                }
            }
            Persistence::LossMarker { file, .. } if !unwritten && !self.is_write_through() => file.remove(),
            _ => {}
        }
    }
}

/// Bytes before the first of `frames` frames of a kept arena.
fn offset_of(header: &Header, frames: usize) -> usize {
    frames.saturating_mul(RECORD_BYTES).saturating_add(header.records_at()).next_multiple_of(PAGE_SIZE)
}

/// The daemon's death would lose something from now on, if it would not have before.
fn note_unwritten(marker: &Mapping, unwritten: bool) {
    if unwritten && marker.word(UNWRITTEN).load(Ordering::Relaxed) == 0 {
        marker.word(UNWRITTEN).store(1, Ordering::Release);
    }
}

/// Bytes of `frames` frames behind `offset` bytes.
fn bytes_of(frames: usize, offset: usize) -> Result<usize> {
    frames
        .checked_mul(PAGE_SIZE)
        .and_then(|bytes| bytes.checked_add(offset))
        .ok_or_else(|| Error::new(ErrorKind::Memory, format!("a cache of {frames} pages overflows the address space")))
}

fn anonymous_memory(frames: usize) -> Result<Mapping> {
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
/// => A marker that tells of a loss stands in the file until the header that tells of it too takes its place: the daemon may be
///    killed meanwhile.
fn new_file(file: &ArenaFile, bytes: usize, header: &Header) -> Result<Mapping> {
    let stays = if header.lost { HEADER_BYTES as u64 } else { 0 };
    let make = || {
        file.file.set_len(stays)?;
        mapping::allocate(&file.file, bytes)?;
        Mapping::new(&file.file, bytes)
    };
    let memory = make().map_err(|e| {
        // What could not be made whole takes no room, and goes with its file.
        let _ = file.file.set_len(stays);
        let cache = header.frames * PAGE_BYTES;
        Error::io(ErrorKind::Memory, format!("no memory for a cache of {cache} bytes in {file}"), e)
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
            let identity = ImageId { device: 1, inode: 2, born_ns: 3, size_bytes: 1 << 30 };
            let header = Header::new(identity, frames as u64, Path::new("/image"), false);
            let bytes = offset_of(&header, frames);
            assert!(bytes <= frames * PAGE_SIZE / 500 + 3 * PAGE_SIZE, "{bytes} for {mib} MiB");
        }
    }

    #[test]
    fn sectors_are_copied_and_zeroed_by_mask_only() {
        let arena = Arena::anonymous(2).unwrap();
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
            assert_eq!(Arena::anonymous(frames).unwrap_err().kind(), ErrorKind::Memory);
        }
    }
}
