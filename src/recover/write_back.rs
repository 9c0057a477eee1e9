//! The data of a cache that is not yet on its image, and writing it to the image.

use std::fmt;
use std::io;

use crate::arena::{Arena, Survey, sectors_within};
use crate::error::{Error, ErrorKind, Result};
use crate::store::named::{BlockWriter, NamedImage};
use crate::units::{FrameId, FrameRecord, SECTOR_BYTES, SECTORS_PER_PAGE, SectorMask, SectorSpan, counted};

/// The data of a cache that is not yet on its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unwritten {
    /// Number of dirty pages.
    pub(super) pages: usize,
    /// Number of ranges that must read as zeros.
    pub(super) ranges: usize,
}

impl Unwritten {
    pub(super) const NOTHING: Self = Self { pages: 0, ranges: 0 };

    pub(super) fn of(arena: &Arena) -> Self {
        let pages = arena.records().filter(|(_, record)| !record.dirty.is_empty()).count();
        Self { pages, ranges: arena.pending_zeroes().count() }
    }

    /// As [`Unwritten::of`], for a surveyed file.
    pub(super) fn surveyed(survey: &Survey) -> Self {
        let count = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        Self { pages: count(survey.dirty_pages), ranges: count(survey.zero_ranges) }
    }
}

impl fmt::Display for Unwritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", counted(self.pages as u64, "dirty page"))?;
        match self.ranges {
            0 => Ok(()),
            ranges => write!(f, " and {} to be zeroed", counted(ranges as u64, "range")),
        }
    }
}

/// Zeroes the ranges that must read as zeros, then writes the dirty pages to the image in the order of their offsets,
/// and syncs it; returns the number of pages. Calls `progress` with how many of how many pages are written.
///
/// => A dirty sector in such a range was written after the range was zeroed. It is not zeroed: a FLUSH may have made
/// its write durable.
/// => The ledger records that the image is being changed: if a daemon dies in the middle, the next one still recognizes
/// the cache as the image's.
/// => Nothing is written past the end of the image, even if its last page is partial: earlier versions of genblk
/// recorded the other sectors of that page as dirty too.
pub(super) fn write_back(arena: &Arena, image: &dyn NamedImage, progress: &mut dyn FnMut(u64, u64)) -> Result<u64> {
    let failed = |e| Error::io(ErrorKind::Image, format!("cannot write to image {}", image.path().display()), e);
    let image_sectors = image.limits().size_bytes.get() / SECTOR_BYTES;
    image.quarantine_earlier_writes();
    let mut dirty: Vec<(FrameId, FrameRecord)> =
        arena.records().filter(|(_, record)| !record.dirty.is_empty()).collect();
    dirty.sort_by_key(|(_, record)| record.page);
    for (_, record) in &mut dirty {
        let within = sectors_within(image_sectors, record.page);
        if within.is_empty() {
            return Err(failed(io::Error::other("the ledger refers to pages past the end of the image")));
        }
        record.dirty = record.dirty.and(within);
    }
    dirty.retain(|(_, record)| !record.dirty.is_empty());
    if arena.pending_zeroes().any(|(_, span)| span.end() > image_sectors) {
        return Err(failed(io::Error::other("the ledger refers to sectors past the end of the image")));
    }
    for piece in arena.pending_zeroes().flat_map(|(_, span)| without_dirty(span, &dirty)) {
        arena.begin_change(piece);
        image.zero(piece.start * SECTOR_BYTES, piece.count * SECTOR_BYTES).map_err(failed)?;
    }
    let mut writer = image.writer().map_err(failed)?;
    for (done, &(frame, record)) in dirty.iter().enumerate() {
        arena.begin_change(SectorSpan::new(record.page.0 * SECTORS_PER_PAGE, SECTORS_PER_PAGE));
        record_formats(arena, frame, record, image);
        write_page(arena, frame, record, &mut *writer).map_err(failed)?;
        progress(done as u64 + 1, dirty.len() as u64);
    }
    writer.sync().map_err(failed)?;
    arena.remove_guest_formats(image.recorded_formats());
    Ok(dirty.len() as u64)
}

/// The parts of a range that are not dirty; `dirty` is in the order of the pages.
pub(super) fn without_dirty(span: SectorSpan, dirty: &[(FrameId, FrameRecord)]) -> Vec<SectorSpan> {
    let (mut pieces, mut start) = (Vec::new(), span.start);
    let first = dirty.partition_point(|(_, record)| record.page < span.pages().first);
    for (_, record) in dirty[first..].iter().take_while(|(_, record)| span.pages().contains(record.page)) {
        let mut mask = record.dirty.and(span.sectors_in(record.page));
        while let Some((first, count)) = mask.first_run() {
            let at = record.page.0 * SECTORS_PER_PAGE + u64::from(first);
            if at > start {
                pieces.push(SectorSpan::new(start, at - start));
            }
            start = at + u64::from(count);
            mask = mask.without(SectorMask::run(first, count));
        }
    }
    if start < span.end() {
        pieces.push(SectorSpan::new(start, span.end() - start));
    }
    pieces
}

/// Records that the guest has written the header of another format, as a daemon does before such a write.
fn record_formats(arena: &Arena, frame: FrameId, record: FrameRecord, image: &dyn NamedImage) {
    let mut mask = record.dirty;
    while let Some((first, count)) = mask.first_run() {
        let sector = record.page.0 * SECTORS_PER_PAGE + u64::from(first);
        if image.shows_format(SectorSpan::new(sector, count.into())) {
            arena.add_guest_formats(image.inspect_guest_write(sector, &arena.sectors(frame, first, count)));
        }
        mask = mask.without(SectorMask::run(first, count));
    }
}

fn write_page(arena: &Arena, frame: FrameId, record: FrameRecord, writer: &mut dyn BlockWriter) -> io::Result<()> {
    let mut mask = record.dirty;
    while let Some((first, count)) = mask.first_run() {
        let offset = record.page.offset_bytes() + u64::from(first) * SECTOR_BYTES;
        writer.write_at(&arena.sectors(frame, first, count), offset)?;
        mask = mask.without(SectorMask::run(first, count));
    }
    Ok(())
}
