//! The contents of a cache file, read without mapping it: the file may belong to another user, who can shrink it
//! meanwhile (which would raise SIGBUS), or to a running daemon.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::frames_at;
use super::ledger::{HEADER_BYTES, Header, RANGE_SLOT_BYTES, RANGE_SLOTS, RECORD_BYTES, boot_id, decode_record};
use super::mapping::Mapping;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::process::effective_uid;
use crate::tenure::token::age_of;
use crate::units::{PAGE_BYTES, PAGE_SIZE, PageNo, SECTOR_BYTES, SECTOR_SIZE, SectorMask, SectorSpan};

/// Number of bytes of the ledger that are read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A summary of a cache file.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Its header.
    pub header: Header,
    /// Whether it was created since the host's last boot; otherwise its contents are meaningless.
    pub is_of_this_boot: bool,
    /// Pages that it holds.
    pub pages: u64,
    /// Number of dirty pages among them.
    pub dirty_pages: u64,
    /// Ranges that must read as zeros and may have other contents on the image.
    pub zero_ranges: u64,
    /// The first sector of the image, if the cache holds it.
    pub first_sector: Option<Vec<u8>>,
    /// Memory that it takes, in bytes.
    pub memory_bytes: u64,
    /// How long ago its daemon last wrote to the image; if it never did, the time since the last change of the file.
    pub age: Duration,
}

impl Survey {
    /// Reads an open file; `None`: it has no header, so it holds nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when it is not a cache file of a layout that this version supports, or contradicts itself;
    /// [`ErrorKind::Memory`] when it cannot be read. `shown` names it in messages.
    pub(super) fn of(file: &File, shown: &Path) -> Result<Option<Self>> {
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot read {}", shown.display()), e);
        let metadata = file.metadata().map_err(failed)?;
        let Some(header) = header_of(file, shown)? else { return Ok(None) };
        let mut survey = Self {
            is_of_this_boot: header.boot == boot_id(),
            header,
            pages: 0,
            dirty_pages: 0,
            zero_ranges: 0,
            first_sector: None,
            memory_bytes: metadata.blocks().saturating_mul(SECTOR_BYTES),
            age: Duration::ZERO,
        };
        survey.age = match survey.header.last_seen.heartbeat_ns {
            0 => metadata.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok()).unwrap_or_default(),
            heartbeat_ns => age_of(heartbeat_ns),
        };
        if survey.header.frames > 0 && survey.is_of_this_boot {
            survey.count(file, metadata.len(), metadata.uid() != effective_uid(), shown)?;
        }
        Ok(Some(survey))
    }

    /// Whether it holds data that the image lacks.
    pub fn is_dirty(&self) -> bool {
        self.is_of_this_boot && self.dirty_pages + self.zero_ranges > 0
    }

    /// Reads the ledger and checks its references.
    fn count(&mut self, file: &File, file_bytes: u64, is_foreign: bool, shown: &Path) -> Result<()> {
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot read {}", shown.display()), e);
        let damaged = |why: &str| {
            let context = format!("the ledger in {} is damaged or forged: {why}", shown.display());
            Err(Error::new(ErrorKind::Ledger, context))
        };
        let frames = usize::try_from(self.header.frames).unwrap_or(usize::MAX);
        let reserved = usize::try_from(self.header.reserved).map_or(frames, |reserved| reserved.min(frames));
        let frames_at = frames_at(&self.header, frames);
        let needed = frames.checked_mul(PAGE_SIZE).and_then(|bytes| bytes.checked_add(frames_at));
        if needed.is_none_or(|needed| needed as u64 > file_bytes) {
            return damaged("it is longer than its file");
        }
        // The memory of the records is allocated before they are used. Without this check, a sparse file of another
        // user could keep root busy for a very long time.
        if is_foreign && (reserved * RECORD_BYTES) as u64 > self.memory_bytes {
            return damaged("it takes less memory than it describes");
        }
        let image_bytes = self.header.image_bytes();
        let (sectors, pages) = (image_bytes / SECTOR_BYTES, image_bytes.div_ceil(PAGE_BYTES));
        if let Some(at) = self.header.zero_slots_at() {
            let mut slots = vec![0; RANGE_SLOTS * RANGE_SLOT_BYTES];
            read(file, &mut slots, at as u64).map_err(failed)?;
            for slot in words(&slots).collect::<Vec<_>>().chunks(2) {
                let span = SectorSpan::new(slot[0], slot[1]);
                if span.count > 0 && span.start.checked_add(span.count).is_none_or(|end| end > sectors) {
                    return damaged("it refers to sectors past the end of the image");
                }
                self.zero_ranges += u64::from(span.count > 0);
            }
        }
        let (mut at, end) = (self.header.records_at(), self.header.records_at() + reserved * RECORD_BYTES);
        let mut chunk = vec![0; CHUNK_BYTES];
        while at < end {
            let len = CHUNK_BYTES.min(end - at);
            read(file, &mut chunk[..len], at as u64).map_err(failed)?;
            let first = (at - self.header.records_at()) / RECORD_BYTES;
            for (frame, word) in (first..).zip(words(&chunk[..len])) {
                let Some(record) = decode_record(word) else { continue };
                if record.page.0 >= pages {
                    return damaged("it refers to pages past the end of the image");
                }
                self.pages += 1;
                self.dirty_pages += u64::from(!record.dirty.is_empty());
                if record.page == PageNo(0) && record.valid.contains(SectorMask::run(0, 1)) {
                    let mut sector = vec![0; SECTOR_SIZE];
                    read(file, &mut sector, (frames_at + frame * PAGE_SIZE) as u64).map_err(failed)?;
                    self.first_sector = Some(sector);
                }
            }
            at += len;
        }
        Ok(())
    }
}

/// The header of a file; `None` if it has none.
///
/// # Errors
/// [`ErrorKind::Ledger`] when it is not a cache file of a layout that this version supports; [`ErrorKind::Memory`] when
/// it cannot be read. `shown` names it in messages.
pub(super) fn header_of(file: &File, shown: &Path) -> Result<Option<Header>> {
    let failed = |e| Error::io(ErrorKind::Memory, format!("cannot read {}", shown.display()), e);
    if file.metadata().map_err(failed)?.len() < HEADER_BYTES as u64 {
        return Ok(None);
    }
    let mut bytes = [0; HEADER_BYTES];
    read(file, &mut bytes, 0).map_err(failed)?;
    Header::decode(&bytes, &shown.display())
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
}

/// Reads bytes of the file; from a mapping if the file system has no read(2), like hugetlbfs before Linux 5.
fn read(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    match file.read_exact_at(bytes, at) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            let at = usize::try_from(at).map_err(io::Error::other)?;
            Mapping::for_reading(file, at + bytes.len())?.read(at, bytes);
            Ok(())
        }
        result => result,
    }
}
