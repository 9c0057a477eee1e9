//! Creating an arena: in anonymous memory, with a loss marker, in a new file, or in the file of an earlier daemon.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Mutex, OnceLock};

use super::file::ArenaFile;
use super::ledger::{self, ArenaSpec, GuestData, GuestState, HEADER_BYTES, Header};
use super::lost_file::LossMarker;
use super::mapping::{self, MEMFD_NAME, Mapping};
use super::reserve::{Reservation, offset_in_new, parts_of, room_for};
use super::{Arena, NotCreated, Persistence, bytes_of, frames_at};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::memfd;
use crate::units::{PAGE_BYTES, SECTOR_BYTES, SectorSpan};

impl Arena {
    /// `frames` frames of zeroed memory that is freed with the daemon.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the host has less memory available. All memory is reserved now, so that no request of
    /// a guest fails for lack of memory later.
    pub fn anonymous(frames: usize) -> Result<Self> {
        Self::anonymous_with_room(frames, frames)
    }

    /// Like [`Arena::anonymous`], with memory for `reserved` frames and room for `frames`.
    ///
    /// # Errors
    /// As [`Arena::anonymous`].
    pub fn anonymous_with_room(reserved: usize, frames: usize) -> Result<Self> {
        let frames = frames.max(reserved);
        let (file, memory) = match anonymous_memory(reserved, frames) {
            // As in Arena::persistent().
            Err(_) if frames > reserved => return Self::anonymous_with_room(reserved, reserved),
            created => created?,
        };
        Ok(Self::new(memory, [reserved, frames], 0, Persistence::None, GuestState::FRESH).backed_by(file))
    }

    /// Like [`Arena::anonymous`], with a marker in `file` that shows the next daemon whether this one's death lost
    /// data.
    ///
    /// => All data in the file is on the image. The recorded state of the guest stays.
    ///
    /// # Errors
    /// As [`Arena::anonymous`].
    pub fn loss_marker(file: ArenaFile, spec: &ArenaSpec<'_>) -> std::result::Result<Self, NotCreated> {
        let create = || {
            let memory = anonymous_memory(spec.reserved, spec.frames)?;
            let (marker, header) = create_contents(&file, &ArenaSpec { frames: 0, reserved: 0, ..*spec })?;
            Ok((memory, marker, header.guest))
        };
        match create() {
            Ok((memory, marker, guest)) => {
                let persistence = Persistence::LossMarker(LossMarker { marker, file });
                let (memory_file, memory) = memory;
                Ok(Self::new(memory, [spec.reserved, spec.frames], 0, persistence, guest).backed_by(memory_file))
            }
            Err(error) => Err(NotCreated { error, file }),
        }
    }

    /// Frames of zeroed memory in `file`, which outlives the daemon.
    ///
    /// => All data in the file is on the image. The recorded state of the guest stays.
    ///
    /// # Errors
    /// As [`Arena::anonymous`], and for an image of more than 4 PiB.
    pub fn persistent(file: ArenaFile, spec: &ArenaSpec<'_>) -> std::result::Result<Self, NotCreated> {
        let spec = &ArenaSpec { frames: room_for(&file.file, spec), ..*spec };
        let create = |spec: &ArenaSpec<'_>| {
            if ledger::is_too_large(spec.image.size_bytes) {
                let context = "the cache of an image above 4 PiB cannot outlive the daemon";
                return Err(Error::new(ErrorKind::Memory, context));
            }
            create_contents(&file, spec)
        };
        match create(spec) {
            Ok((memory, header)) => Ok(Self::with_file(memory, spec.frames, file, &header)),
            // The room may exceed the host's limit on file sizes: then the cache gets no room to grow.
            Err(error) if spec.frames > spec.reserved => match create(&ArenaSpec { frames: spec.reserved, ..*spec }) {
                Ok((memory, header)) => Ok(Self::with_file(memory, spec.reserved, file, &header)),
                Err(_) => Err(NotCreated { error, file }),
            },
            Err(error) => Err(NotCreated { error, file }),
        }
    }

    /// The arena that the previous daemon left in `file`; `header` is the file's header.
    ///
    /// => Dropping the arena keeps its file unless [`Arena::keep_on_drop`] was set to false: a daemon that fails to
    ///    start must leave the cache to the next one.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when the file contradicts its header or the image's size; [`ErrorKind::Memory`] when it
    /// cannot be mapped.
    pub fn attach(file: ArenaFile, header: &Header) -> Result<Self> {
        let frames = usize::try_from(header.frames).unwrap_or(usize::MAX);
        let bytes = bytes_of(frames, frames_at(header, frames))?;
        let length = file.file.metadata().map_or(0, |metadata| metadata.len());
        if length < bytes as u64 {
            let context = format!("{file} is truncated: it has {length} bytes, and its header requires {bytes}");
            return Err(Error::new(ErrorKind::Ledger, context));
        }
        file.seal()?;
        let memory = Mapping::new(&file.file, bytes)
            .map_err(|e| Error::io(ErrorKind::Memory, format!("cannot map {file}"), e))?;
        let arena = Self::with_file(memory, frames, file, header);
        arena.keep_on_drop(true);
        let sectors = header.image.size_bytes / SECTOR_BYTES;
        let fits = |span: SectorSpan| span.start.checked_add(span.count).is_some_and(|end| end <= sectors);
        let pages = header.image_bytes().div_ceil(PAGE_BYTES);
        let what = if !arena.pending_zeroes().all(|(_, span)| fits(span)) {
            "sectors"
        } else if !arena.records().all(|(_, record)| record.page.0 < pages) {
            "pages"
        } else {
            return Ok(arena);
        };
        let (file, image) = (arena.file().expect("it is persistent"), header.image.path.display());
        let context =
            format!("the ledger in {file} is damaged or forged: it refers to {what} past the end of image {image}");
        Err(Error::new(ErrorKind::Ledger, format!("{context}; {}", file.removal_hint())))
    }

    /// A persistent arena in a file whose header and length are valid.
    pub(super) fn with_file(memory: Mapping, frames: usize, file: ArenaFile, header: &Header) -> Self {
        let (zero_slots, changed_slots) = (header.zero_slots_at(), header.changed_slots_at());
        let persistence = Persistence::Full { file, zero_slots, changed_slots, records: header.records_at() };
        let reserved = usize::try_from(header.reserved).map_or(frames, |reserved| reserved.min(frames));
        Self::new(memory, [reserved, frames], frames_at(header, frames), persistence, header.guest)
    }

    /// An arena with memory for `reserved` of its `frames` frames.
    pub(super) fn new(
        memory: Mapping,
        [reserved, frames]: [usize; 2],
        offset: usize,
        persistence: Persistence,
        guest: GuestState,
    ) -> Self {
        let reservation = Reservation::new(reserved);
        let data_loss = AtomicBool::new(guest.data == GuestData::Lost);
        let write_through = AtomicBool::new(guest.write_through);
        let formats = AtomicU64::new(guest.formats);
        let substitute = OnceLock::new();
        let (keep_on_drop, token) = (AtomicBool::new(false), Mutex::default());
        let (memory_file, is_unmarked) = (None, AtomicBool::new(false));
        Self {
            memory,
            frames,
            reservation,
            offset,
            persistence,
            data_loss,
            write_through,
            formats,
            substitute,
            memory_file,
            is_unmarked,
            keep_on_drop,
            token,
            is_released: None,
        }
    }

    /// The arena, with this unnamed file as its memory.
    pub(super) fn backed_by(mut self, memory: File) -> Self {
        self.memory_file = Some(memory);
        self
    }
}

/// Checks that the host has `bytes` bytes of memory available.
///
/// # Errors
/// [`ErrorKind::Memory`] with the amount that is available.
pub fn check_memory(bytes: u64) -> Result<()> {
    let context = || format!("cannot allocate caches of {bytes} bytes");
    mapping::check_available(bytes).map_err(|e| Error::io(ErrorKind::Memory, context(), e))
}

/// Memory for `reserved` frames, mapped with room for `frames`, and the file that provides it.
fn anonymous_memory(reserved: usize, frames: usize) -> Result<(File, Mapping)> {
    let (bytes, room) = (bytes_of(reserved, 0)?, bytes_of(frames, 0)?);
    let create = || {
        let file = memfd::create(MEMFD_NAME)?;
        mapping::allocate(&file, room, std::slice::from_ref(&(0..bytes)))?;
        let mapping = Mapping::new(&file, room)?;
        Ok((file, mapping))
    };
    create().map_err(|e| Error::io(ErrorKind::Memory, format!("cannot allocate a cache of {bytes} bytes"), e))
}

/// Replaces a file's contents by a new, empty arena; returns the file's mapping and its header.
///
/// => The daemon may be killed at any point. The recorded state of the guest never leaves its header: a former arena
///    first becomes a loss marker, which then gets its frames by one store.
fn create_contents(file: &ArenaFile, spec: &ArenaSpec<'_>) -> Result<(Mapping, Header)> {
    let recorded = file.header()?.map_or(GuestState::FRESH, |header| header.guest);
    let guest = recorded.merged_with(spec.guest);
    let header = Header::new(&ArenaSpec { guest, ..*spec });
    file.shrink_to_header()?;
    let (bytes, parts) = match spec.frames {
        0 => (HEADER_BYTES, [0..HEADER_BYTES, 0..0]),
        frames => {
            let offset = offset_in_new(spec);
            (bytes_of(frames, offset)?, parts_of(header.records_at(), offset, spec.reserved))
        }
    };
    let create = || {
        mapping::allocate(&file.file, bytes, &parts)?;
        Mapping::new(&file.file, bytes)
    };
    let memory = create().map_err(|e| {
        // Free the allocated memory. Dropping the file removes it if it is empty.
        let _ = if guest == GuestState::FRESH { mapping::set_length(&file.file, 0) } else { Ok(()) };
        let _ = file.shrink_to_header();
        let cache = header.reserved * PAGE_BYTES;
        Error::io(ErrorKind::Memory, format!("cannot allocate a cache of {cache} bytes in {file}"), e)
    })?;
    file.seal()?;
    header.words().into_iter().for_each(|(at, word)| memory.store(at, word));
    Ok((memory, header))
}
