//! The number of frames of an arena that have memory, always the first ones. A cache can grow and shrink while it is
//! used. So an arena has addresses, and room in its file, for the largest possible number of frames, but memory only
//! for those that the cache uses.
//!
//! The header records that number. It is never too large: memory is allocated before the header counts it, and the
//! header stops counting it before it is freed. A frame whose record is not empty has memory: the cache empties the
//! records of frames before it stops using them. So the next daemon finds every page, at whatever instruction this one
//! dies. It may find memory that the header does not count, and frees it ([`Arena::free_uncounted`]).

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ledger::field;
use super::mapping;
use super::{Arena, ArenaSpec, Persistence, frames_at, record_at};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::file_system::FileSystem;
use crate::units::{PAGE_BYTES, PAGE_SIZE};

/// Frames whose memory is freed in one step: 8 MiB.
const STEP_FRAMES: usize = 2048;

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Reservation {
    /// Number of frames that have memory. Held while memory is allocated, freed or populated.
    reserved: Mutex<usize>,
    /// Number of frames that the cache uses.
    in_use: AtomicUsize,
}

impl Reservation {
    /// A reservation for the first `frames` frames.
    pub fn new(frames: usize) -> Self {
        Self { reserved: Mutex::new(frames), in_use: AtomicUsize::new(frames) }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        // A simulated death, which is a panic at any store, must not hide the state of the arena at that time.
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The parts of an arena's file that have memory if its first `reserved` frames do: the part before the frames, and the
/// frames. `records` is the offset of the table of records, `offset` that of the frames.
pub(super) fn parts_of(records: usize, offset: usize, reserved: usize) -> [Range<usize>; 2] {
    let frames = offset..offset.saturating_add(reserved.saturating_mul(PAGE_SIZE));
    [0..record_at(records, reserved).min(offset), frames]
}

/// Checks that a cache of `wanted` bytes fits into an arena with room for `room` bytes.
///
/// # Errors
/// [`ErrorKind::Memory`] if not.
pub fn check_room(room: u64, wanted: u64) -> Result<()> {
    if wanted <= room {
        return Ok(());
    }
    let context = format!("the cache has room for {} MiB, and {} MiB are requested", room >> 20, wanted >> 20);
    let hint = "cache.size_max sets the room; it takes effect after detach and attach";
    Err(Error::new(ErrorKind::Memory, format!("{context}; {hint}")))
}

/// The number of frames for which a new arena has room.
///
/// => A mapping of huge pages takes them all from the host when it is created, so there is room only for the frames
///    that have memory.
pub(super) fn room_for(file: &std::fs::File, spec: &ArenaSpec<'_>) -> usize {
    match FileSystem::of(file) {
        Ok(file_system) if !file_system.is_hugetlbfs => spec.frames.max(spec.reserved),
        _ => spec.reserved,
    }
}

impl Arena {
    /// Number of frames that have memory: the first ones.
    pub fn reserved_frames(&self) -> usize {
        *self.reservation.lock()
    }

    /// Offset of the table of records; `None` in an arena without one.
    fn records_at(&self) -> Option<usize> {
        if let Persistence::Full { records, .. } = &self.persistence { Some(*records) } else { None }
    }

    /// The parts of the mapping that have memory if `reserved` frames do.
    fn parts(&self, reserved: usize) -> [Range<usize>; 2] {
        match self.records_at() {
            Some(records) => parts_of(records, self.offset, reserved),
            None => [0..0, self.offset..self.offset + reserved * PAGE_SIZE],
        }
    }

    /// Calls `act` with the parts of the mapping that have memory, which do not change meanwhile.
    pub(super) fn with_reserved<R>(&self, act: impl FnOnce(&[Range<usize>; 2]) -> R) -> R {
        let reserved = self.reservation.lock();
        act(&self.parts(*reserved))
    }

    /// Allocates memory for the first `frames` frames.
    ///
    /// => The host is known to have it ([`super::check_memory`]).
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the arena has no room for them, or the host no memory; in that case nothing has
    /// changed.
    pub fn reserve(&self, frames: usize) -> Result<()> {
        let mut reserved = self.reservation.lock();
        if frames <= *reserved {
            return Ok(());
        }
        let bytes = |frames: usize| frames as u64 * PAGE_BYTES;
        check_room(bytes(self.frames), bytes(frames))?;
        let file = self.backing_file();
        let [old_table, old_frames] = self.parts(*reserved);
        let [table, new_frames] = self.parts(frames);
        let added = [old_table.end.min(table.end)..table.end, old_frames.end..new_frames.end];
        if let Err(e) = mapping::allocate_parts(file, &added) {
            // Free the memory that was allocated before the failure.
            let _ = mapping::free_part(file, old_frames.end..new_frames.end);
            let context = format!("cannot allocate {} MiB more for the cache", bytes(frames - *reserved) >> 20);
            return Err(Error::io(ErrorKind::Memory, context, e));
        }
        *reserved = frames;
        self.record_reserved(frames);
        Ok(())
    }

    /// The cache uses only the first `count` frames from now on; the others hold nothing.
    pub fn set_frames_in_use(&self, count: usize) {
        self.reservation.in_use.store(count, Ordering::Release);
    }

    /// Number of frames that the cache uses: the first ones.
    pub fn frames_in_use(&self) -> usize {
        self.reservation.in_use.load(Ordering::Acquire)
    }

    /// The addresses of the frames that the cache uses.
    pub fn addresses_in_use(&self) -> Range<usize> {
        let all = self.addresses();
        all.start..all.end.min(all.start + self.frames_in_use() * PAGE_SIZE)
    }

    /// Frees a part of the memory of frames that the cache does not use. Returns whether there is more.
    ///
    /// => No io_uring instance keeps that memory pinned.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the kernel does not free it.
    pub fn free_unused(&self) -> Result<bool> {
        let mut reserved = self.reservation.lock();
        // The cache starts to use more frames only after reserve(), which waits for this lock.
        let kept = self.frames_in_use().max(reserved.saturating_sub(STEP_FRAMES));
        if kept >= *reserved {
            return Ok(false);
        }
        let [_, old] = self.parts(*reserved);
        let [_, new] = self.parts(kept);
        self.record_reserved(kept);
        *reserved = kept;
        let freed = mapping::free_part(self.backing_file(), new.end..old.end);
        freed.map_err(|e| Error::io(ErrorKind::Memory, "cannot free memory of the cache", e))?;
        Ok(self.frames_in_use() < kept)
    }

    /// Frees memory that an earlier user of the arena left beyond the frames that the header counts.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the kernel does not free it.
    pub fn free_uncounted(&self) -> Result<()> {
        let reserved = self.reservation.lock();
        let ([_, counted], [_, all]) = (self.parts(*reserved), self.parts(self.frames));
        let freed = mapping::free_part(self.backing_file(), counted.end..all.end);
        freed.map_err(|e| Error::io(ErrorKind::Memory, "cannot free memory of the cache", e))
    }

    fn record_reserved(&self, frames: usize) {
        if let (Persistence::Full { .. }, Some(header)) = (&self.persistence, self.header()) {
            header.store(field::UNRESERVED, (self.frames - frames) as u64);
        }
    }

    /// The file that provides the memory of the frames.
    fn backing_file(&self) -> &std::fs::File {
        match (&self.persistence, &self.memory_file) {
            (Persistence::Full { file, .. }, _) => &file.file,
            (_, Some(file)) => file,
            (_, None) => unreachable!("frames that are not in a file with a name are in one without"),
        }
    }
}

/// Offset of the first frame in a new arena.
pub(super) fn offset_in_new(spec: &ArenaSpec<'_>) -> usize {
    frames_at(&super::Header::new(spec), spec.frames)
}

#[cfg(test)]
mod tests {
    use super::super::crash_tests::Directory;
    use super::*;
    use crate::arena::GuestState;
    use crate::arena::crash_tests::spec_with_room;
    use crate::units::{FrameId, FrameRecord, PageNo, SectorMask};
    use std::os::unix::fs::MetadataExt;

    const RECORD: FrameRecord = FrameRecord { page: PageNo(3), valid: SectorMask::ALL, dirty: SectorMask::NONE };

    fn kib(file: &std::fs::File) -> u64 {
        file.metadata().unwrap().blocks() / 2
    }

    #[test]
    fn reserving_frames_allocates_memory_and_shrinking_frees_it() {
        let dir = Directory::new(&[]);
        let spec = spec_with_room(4096, 16_384, GuestState::FRESH);
        let arena = Arena::persistent(dir.file(), &spec).unwrap();
        let (file, mib) = (arena.backing_file().try_clone().unwrap(), 1024);
        let is_about = |expected: u64| (expected..expected + 300).contains(&kib(&file));
        assert!(is_about(16 * mib), "{} KiB", kib(&file));
        assert_eq!((arena.frames(), arena.reserved_frames()), (16_384, 4096));
        arena.reserve(10_240).unwrap();
        arena.set_frames_in_use(10_240);
        assert!(is_about(40 * mib), "{} KiB", kib(&file));
        arena.publish(FrameId(9000), RECORD);
        assert!(arena.reserve(16_385).unwrap_err().to_string().contains("cache.size_max"));
        assert!(!arena.free_unused().unwrap(), "all of it is in use");
        arena.publish(FrameId(9000), FrameRecord::empty(PageNo(3)));
        arena.set_frames_in_use(1024);
        while arena.free_unused().unwrap() {}
        assert!(is_about(4 * mib), "{} KiB", kib(&file));
        assert_eq!(arena.reserved_frames(), 1024);
        // The header of the file has the same number.
        arena.publish(FrameId(1000), RECORD);
        arena.keep_on_drop(true);
        // Both hold the lock of the file.
        drop((arena, file));
        let file = dir.file();
        let header = file.header().unwrap().unwrap();
        assert_eq!((header.frames, header.reserved), (16_384, 1024));
        let arena = Arena::attach(file, &header).unwrap();
        assert_eq!((arena.reserved_frames(), arena.records().count()), (1024, 1));
    }

    #[test]
    fn a_restart_finds_the_pages_in_frames_that_were_added() {
        let dir = Directory::new(&[]);
        let arena = Arena::persistent(dir.file(), &spec_with_room(1024, 4096, GuestState::FRESH)).unwrap();
        arena.reserve(2048).unwrap();
        arena.publish(FrameId(2000), RECORD);
        arena.keep_on_drop(true);
        drop(arena);
        let file = dir.file();
        let header = file.header().unwrap().unwrap();
        let arena = Arena::attach(file, &header).unwrap();
        assert_eq!((arena.reserved_frames(), arena.records().count()), (2048, 1));
    }

    #[test]
    fn an_anonymous_arena_grows_and_shrinks() {
        let arena = Arena::anonymous_with_room(1024, 8192).unwrap();
        let file = arena.backing_file().try_clone().unwrap();
        assert_eq!(kib(&file), 4096);
        arena.reserve(8192).unwrap();
        assert_eq!(kib(&file), 32_768);
        arena.set_frames_in_use(100);
        while arena.free_unused().unwrap() {}
        assert_eq!(kib(&file), 400);
    }
}
