//! The memory of the cache's frames: a mapping of shared memory, divided into frames of 4 KiB.
//!
//! The arena provides addresses. The page cache decides which thread may access a frame's bytes, by its references
//! (pins, store operations, residency).
//!
//! There are three kinds of arena:
//!
//! - *Persistent*: a file with a ledger of the contents of each frame (`ledger.rs`). The cache outlives the daemon.
//! - *Loss marker*: anonymous memory, and a small file that records whether the daemon's death loses data.
//! - *Anonymous*: nothing outlives the daemon.
//!
//! Dropping an arena removes its file, unless the file holds data that is nowhere else, or is kept for the next daemon
//! ([`Arena::keep_on_drop`]).

mod changes;
#[cfg(test)]
mod crash_tests;
mod create;
mod ended;
mod file;
mod guest;
mod handed;
mod ledger;
mod lost_file;
mod mapping;
#[cfg(test)]
mod marker_tests;
mod populate;
mod reserve;
mod samples;
mod survey;
mod trust;

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::error::{Error, ErrorKind, Result};
use crate::tenure::record::CacheLocation;
use crate::units::{
    FrameId, FrameRecord, PAGE_SIZE, PageNo, SECTOR_BYTES, SECTOR_SIZE, SECTORS_PER_PAGE, SectorMask, SectorSpan,
    low_u8,
};

#[cfg(test)]
pub use changes::HEARTBEAT_AT;
pub use changes::IdlePoint;
pub use create::check_memory;
pub use file::{ArenaFile, FileSummary};
pub use handed::{ArenaParts, KeptArena, ReceivedArena};
pub use ledger::{ArenaSpec, GuestData, GuestState, Header, ImageFacts, RANGE_SLOTS, SAMPLES_MAX, TenureFacts};
pub use populate::Populator;
pub use reserve::check_room;
pub use samples::{hash_of, word_hash_of};
pub use survey::Survey;
pub use trust::AllowedOwner;

use ledger::{RANGE_SLOT_BYTES, RECORD_BYTES, field};
use lost_file::LossMarker;
use mapping::Mapping;
use reserve::Reservation;

/// The memory of a cache; see the documentation of the module.
#[derive(Debug)]
pub struct Arena {
    memory: Mapping,
    /// Number of frames for which there is room.
    frames: usize,
    /// Number of frames that have memory.
    reservation: Reservation,
    /// Offset of the first frame in `memory`.
    offset: usize,
    persistence: Persistence,
    /// A previous daemon lost completed writes of the guest, and the guest has not reset the device since.
    data_loss: AtomicBool,
    /// The guest has selected write-through.
    write_through: AtomicBool,
    /// See [`GuestState::formats`].
    formats: AtomicU64,
    /// The marker that replaces the file once its name no longer leads to it: the cache then no longer outlives the
    /// daemon.
    substitute: OnceLock<LossMarker>,
    /// The file lost its name, and no marker replaced it.
    is_unmarked: AtomicBool,
    /// The memory of an arena that is not in a file with a name.
    memory_file: Option<File>,
    /// See [`Arena::keep_on_drop`].
    keep_on_drop: AtomicBool,
    /// Held while the image's change token is stored.
    token: Mutex<()>,
    /// For an arena that another process keeps: tells it that nothing in the arena is needed any more.
    is_released: Option<Arc<AtomicBool>>,
}

/// The contents of a cache that lie past the end of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataPastEnd {
    /// Dirty pages past the end of the image.
    pub pages: usize,
    /// Ranges past the end of the image that must read as zeros.
    pub ranges: usize,
}

/// The file in which no arena could be created, returned to the caller.
#[derive(Debug)]
pub struct NotCreated {
    /// The cause.
    pub error: Error,
    /// The file.
    pub file: ArenaFile,
}

impl fmt::Display for NotCreated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

/// As for [`Error`], the text contains the whole cause.
impl std::error::Error for NotCreated {}

/// The part of an arena that outlives the daemon.
#[derive(Debug)]
enum Persistence {
    None,
    /// Only a loss marker.
    LossMarker(LossMarker),
    /// Everything.
    Full {
        file: ArenaFile,
        /// Offset of the table of ranges that must read as zeros; `None` in layout 1.
        zero_slots: Option<usize>,
        /// Offset of the table of ranges that the store may have changed; `None` before layout 5.
        changed_slots: Option<usize>,
        /// Offset of the frames' records.
        records: usize,
    },
}

impl Arena {
    /// Number of frames for which there is room; [`Arena::reserved_frames`] have memory.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// First byte of a frame.
    ///
    /// # Panics
    /// If `frame` is not in this arena: the page cache's bookkeeping is broken.
    pub fn frame(&self, frame: FrameId) -> *mut u8 {
        self.memory.at(self.frame_offset(frame))
    }

    /// Offset of a frame in the mapping.
    fn frame_offset(&self, frame: FrameId) -> usize {
        assert!(frame.index() < self.frames, "{frame:?} is outside the arena");
        self.offset + frame.index() * PAGE_SIZE
    }

    /// The addresses of everything that is mapped.
    pub fn mapped(&self) -> Range<usize> {
        let first = self.memory.at(0).addr();
        first..first + self.memory.bytes()
    }

    /// The addresses of all frames, which are contiguous.
    pub fn addresses(&self) -> Range<usize> {
        let first = self.memory.at(self.offset).expose_provenance();
        first..first + self.frames * PAGE_SIZE
    }

    /// Records the contents of a frame.
    ///
    /// => The frame's bytes are already in place.
    pub fn publish(&self, frame: FrameId, record: FrameRecord) {
        match &self.persistence {
            Persistence::None => {}
            Persistence::LossMarker(_) => {}
            Persistence::Full { records, .. } => {
                self.memory.store(record_at(*records, frame.index()), ledger::encode_record(record));
            }
        }
        if let Some(LossMarker { marker, .. }) = self.marker() {
            mark_unwritten(marker, !record.dirty.is_empty());
        }
    }

    /// Records in a slot that a range must read as zeros; `None` clears the slot.
    ///
    /// => A slot in use is cleared before it takes another range.
    pub fn note_zero(&self, slot: usize, span: Option<SectorSpan>) {
        match &self.persistence {
            Persistence::None => {}
            Persistence::LossMarker(_) => {}
            Persistence::Full { zero_slots, .. } => self.note_range(*zero_slots, slot, span),
        }
        if let Some(LossMarker { marker, .. }) = self.marker() {
            mark_unwritten(marker, span.is_some());
        }
    }

    /// Records in a slot that the store may have changed a range, and may lose the change; `None` clears the slot.
    ///
    /// => As [`Arena::note_zero`].
    pub fn note_changed(&self, slot: usize, span: Option<SectorSpan>) {
        if let Persistence::Full { changed_slots, .. } = &self.persistence {
            self.note_range(*changed_slots, slot, span);
        }
    }

    /// Stores a range in a slot of the table at offset `table`, or clears the slot.
    fn note_range(&self, table: Option<usize>, slot: usize, span: Option<SectorSpan>) {
        let (start, count) = range_slot(table.expect("a cache runs only in the newest layout"), slot);
        if let Some(span) = span {
            // The slot counts as empty until its count is stored.
            self.memory.store(start, span.start);
        }
        self.memory.store(count, span.map_or(0, |span| span.count));
    }

    /// The recorded ranges that must read as zeros, each with its slot.
    pub fn pending_zeroes(&self) -> impl Iterator<Item = (usize, SectorSpan)> {
        self.noted_ranges(if let Persistence::Full { zero_slots, .. } = &self.persistence { *zero_slots } else { None })
    }

    /// The recorded ranges that the store may have changed, each with its slot.
    ///
    /// => They may reach past the end of the image.
    pub fn changed_ranges(&self) -> impl Iterator<Item = (usize, SectorSpan)> {
        let table = if let Persistence::Full { changed_slots, .. } = &self.persistence { *changed_slots } else { None };
        // A forged range may end nowhere.
        self.noted_ranges(table).filter(|(_, span)| span.start.checked_add(span.count).is_some())
    }

    /// The ranges in the table at offset `table`, each with its slot.
    fn noted_ranges(&self, table: Option<usize>) -> impl Iterator<Item = (usize, SectorSpan)> {
        table.into_iter().flat_map(|at| (0..RANGE_SLOTS).map(move |slot| (at, slot))).filter_map(|(at, slot)| {
            let (start, count) = range_slot(at, slot);
            let span = SectorSpan::new(self.memory.load(start), self.memory.load(count));
            (span.count > 0).then_some((slot, span))
        })
    }

    fn store_in_header(&self, at: usize, value: u64) {
        self.header().inspect(|header| header.store(at, value));
    }

    /// Moves the arena from the image `old` to the image `new`: the same image with another size, device number or
    /// path.
    ///
    /// => The daemon may be killed at any point. Contents past the end of the image are removed, and so are the sectors
    ///    past the old end within the last page: the ledger may mark them as valid, but they were never read.
    ///
    /// # Errors
    /// The completed writes past the end of the new image; in that case nothing has changed.
    pub fn move_to(&self, old: &ImageFacts, new: &ImageFacts) -> std::result::Result<(), DataPastEnd> {
        let (old_sectors, sectors) = (old.size_bytes / SECTOR_BYTES, new.size_bytes / SECTOR_BYTES);
        let beyond = |record: &FrameRecord| record.dirty.without(sectors_within(sectors, record.page));
        if sectors < old_sectors {
            let pages = self.records().filter(|(_, record)| !beyond(record).is_empty()).count();
            let ranges = self.pending_zeroes().filter(|(_, span)| span.end() > sectors).count();
            if pages + ranges > 0 {
                return Err(DataPastEnd { pages, ranges });
            }
        }
        if sectors != old_sectors {
            for (frame, record) in self.records() {
                let within = sectors_within(old_sectors.min(sectors), record.page);
                let (valid, dirty) = (record.valid.and(within), record.dirty.and(within));
                if valid != record.valid {
                    self.publish(frame, FrameRecord { valid, dirty, ..record });
                }
            }
        }
        if old != new {
            ledger::image_words(new).into_iter().for_each(|(at, word)| self.store_in_header(at, word));
        }
        Ok(())
    }

    /// The image has grown to `size_bytes` bytes.
    ///
    /// => Call it before any page beyond the old end is published: the next daemon rejects a ledger with such a page.
    pub fn set_image_size(&self, size_bytes: u64) {
        self.store_in_header(field::SIZE_BYTES, size_bytes);
    }

    /// Whether the ledger, if there is one, can number all pages of an image of this size.
    pub fn has_room_for(&self, size_bytes: u64) -> bool {
        !matches!(self.persistence, Persistence::Full { .. }) || !ledger::is_too_large(size_bytes)
    }

    /// The mapping that starts with the header, if the arena has a header.
    fn header(&self) -> Option<&Mapping> {
        match (self.marker(), &self.persistence) {
            (Some(LossMarker { marker, .. }), _) => Some(marker),
            (None, Persistence::Full { .. }) => Some(&self.memory),
            (None, _) => None,
        }
    }

    /// The recorded contents of the frames, without empty records.
    pub fn records(&self) -> impl Iterator<Item = (FrameId, FrameRecord)> {
        let (count, at) = match &self.persistence {
            Persistence::Full { records, .. } => (self.reserved_frames(), *records),
            _ => (0, 0),
        };
        (0..count).filter_map(move |index| {
            let record = ledger::decode_record(self.memory.load(record_at(at, index)))?;
            Some((FrameId(u32::try_from(index).expect("a cache has fewer than 2^31 frames")), record))
        })
    }

    /// Removes the records of clean sectors: the image may lack them.
    pub fn forget_clean(&self) {
        for (frame, record) in self.records().filter(|(_, record)| record.valid != record.dirty) {
            self.publish(frame, FrameRecord { valid: record.dirty, ..record });
        }
    }

    /// Whether dropping the arena leaves its file for the next daemon (`true`), or removes it if nothing in it is
    /// dirty.
    pub fn keep_on_drop(&self, keep: bool) {
        self.keep_on_drop.store(keep, Ordering::Release);
    }

    /// Whether dropping the arena leaves its file for the next daemon.
    pub fn is_kept_on_drop(&self) -> bool {
        self.keep_on_drop.load(Ordering::Acquire)
    }

    /// The file of a persistent arena, with its contents, so that it can be kept, replaced or removed; `None` for
    /// another kind of arena.
    pub fn into_file(mut self) -> Option<ArenaFile> {
        match std::mem::replace(&mut self.persistence, Persistence::None) {
            Persistence::Full { file, .. } => Some(file),
            _ => None,
        }
    }

    /// A copy of `count` sectors of a frame, starting at its sector `first`.
    ///
    /// => No other thread writes them meanwhile.
    pub fn sectors(&self, frame: FrameId, first: u8, count: u8) -> Vec<u8> {
        assert!(usize::from(first) + usize::from(count) <= PAGE_SIZE / SECTOR_SIZE, "sectors of one frame");
        let mut bytes = vec![0; usize::from(count) * SECTOR_SIZE];
        self.memory.read(self.frame_offset(frame) + usize::from(first) * SECTOR_SIZE, &mut bytes);
        bytes
    }

    /// The file in which the frames outlive the daemon; `None` if they do not.
    pub fn file(&self) -> Option<&ArenaFile> {
        match &self.persistence {
            Persistence::Full { file, .. } if self.substitute.get().is_none() && !self.is_unmarked() => Some(file),
            _ => None,
        }
    }

    /// The location of the part that outlives the daemon, for the record of a tenure.
    pub fn cache_location(&self) -> CacheLocation {
        match &self.persistence {
            Persistence::None => CacheLocation::Memory,
            Persistence::LossMarker(LossMarker { file, .. }) | Persistence::Full { file, .. } => file.cache_location(),
        }
    }

    /// Bytes of memory in addition to the frames.
    pub fn overhead_bytes(&self) -> usize {
        self.with_reserved(|[table, _]| table.len().next_multiple_of(PAGE_SIZE))
    }

    /// Whether the arena holds data that is nowhere else, or such data is lost and the guest has not detected it yet.
    pub fn holds_unwritten(&self) -> bool {
        let is_marked = self.header().is_some_and(|header| header.load(field::UNWRITTEN) != 0);
        is_marked
            || self.pending_zeroes().next().is_some()
            || self.records().any(|(_, record)| !record.dirty.is_empty())
    }

    /// Copies the sectors of `mask` from one frame to the same sectors of another.
    ///
    /// => The caller (the page cache, under its lock) owns the target's sectors, and nothing writes the source's
    ///    sectors meanwhile.
    pub fn copy_sectors(&self, source: FrameId, target: FrameId, mask: SectorMask) {
        let (source, target) = (self.frame_offset(source), self.frame_offset(target));
        each_run(mask, |offset, len| self.memory.copy(source + offset, target + offset, len));
    }

    /// Fills the sectors of `mask` with zeros.
    ///
    /// => The caller owns those sectors.
    pub fn zero_sectors(&self, frame: FrameId, mask: SectorMask) {
        let target = self.frame_offset(frame);
        each_run(mask, |offset, len| self.memory.zero(target + offset, len));
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.holds_unwritten() || self.is_kept_on_drop() {
            return;
        }
        match (self.marker(), &self.persistence) {
            (Some(LossMarker { file, .. }), _) if !self.has_guest_choices() => file.remove(),
            (None, Persistence::Full { file, .. }) => {
                // A loss marker is small enough to keep just for the guest's choices.
                let is_kept = self.has_guest_choices() && file.shrink_to_header().is_ok();
                if !is_kept {
                    file.remove();
                }
            }
            _ => {}
        }
    }
}

/// The sectors of a page that are within an image of `image_sectors` sectors.
pub fn sectors_within(image_sectors: u64, page: PageNo) -> SectorMask {
    match image_sectors.saturating_sub(page.0.saturating_mul(SECTORS_PER_PAGE)) {
        SECTORS_PER_PAGE.. => SectorMask::ALL,
        within => SectorMask::run(0, low_u8(within)),
    }
}

/// Offset of the first of `frames` frames of a persistent arena. For the excessive frame count of a forged header, it
/// exceeds the length of any file.
fn frames_at(header: &Header, frames: usize) -> usize {
    let records_end = frames.saturating_mul(RECORD_BYTES).saturating_add(header.records_at());
    records_end.checked_next_multiple_of(PAGE_SIZE).unwrap_or(usize::MAX)
}

/// Sets the word of a loss marker if there is `unwritten` data, unless it is already set.
fn mark_unwritten(marker: &Mapping, unwritten: bool) {
    if unwritten && marker.load(field::UNWRITTEN) == 0 {
        marker.store(field::UNWRITTEN, 1);
    }
}

/// Bytes of `frames` frames at offset `offset`, including everything before them.
fn bytes_of(frames: usize, offset: usize) -> Result<usize> {
    frames
        .checked_mul(PAGE_SIZE)
        .and_then(|bytes| bytes.checked_add(offset))
        .ok_or_else(|| Error::new(ErrorKind::Memory, format!("a cache of {frames} pages exceeds the address space")))
}

/// Offset of a frame's record in a table of records at offset `at`.
fn record_at(at: usize, index: usize) -> usize {
    at + index * RECORD_BYTES
}

/// Offsets of a slot's first sector and number of sectors, in a table of ranges at offset `at`.
fn range_slot(at: usize, slot: usize) -> (usize, usize) {
    assert!(slot < RANGE_SLOTS, "slot {slot} is outside the table");
    let at = at + slot * RANGE_SLOT_BYTES;
    (at, at + 8)
}

/// Calls `f(offset, length)`, both in bytes, for each run of sectors in `mask`.
fn each_run(mut mask: SectorMask, mut f: impl FnMut(usize, usize)) {
    while let Some((first, count)) = mask.first_run() {
        f(usize::from(first) * SECTOR_SIZE, usize::from(count) * SECTOR_SIZE);
        mask = mask.without(SectorMask::run(first, count));
    }
}

#[cfg(test)]
mod tests;
