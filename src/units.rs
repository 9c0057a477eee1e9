//! The vocabulary that every layer shares: positions on the image (pages, sectors), memory (frames), time (ticks,
//! epochs), store operations and their faults.
//!
//! A [`PageNo`] is a position on the image, a [`PageId`] the slot of the page table that describes the page, a
//! [`FrameId`] the arena memory that holds its bytes. Three types, so that the compiler rejects one where another is
//! meant.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Bytes of a sector, the unit of every virtio-blk request (virtio 1.2, section 5.2).
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a page, the unit of caching.
pub const PAGE_BYTES: u64 = 4096;
/// [`SECTOR_BYTES`] for indexing memory.
pub const SECTOR_SIZE: usize = 512;
/// [`PAGE_BYTES`] for indexing memory.
pub const PAGE_SIZE: usize = 4096;
/// Sectors per page: one bit each in a [`SectorMask`].
pub const SECTORS_PER_PAGE: u64 = PAGE_BYTES / SECTOR_BYTES;

/// A size that can change while it is used, in the unit of its name. Clones share it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(from = "u64", into = "u64")]
pub struct LiveSize(Arc<AtomicU64>);

impl LiveSize {
    /// The present size.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Changes it.
    pub fn set(&self, size: u64) {
        self.0.store(size, Ordering::Release);
    }
}

impl From<u64> for LiveSize {
    fn from(size: u64) -> Self {
        Self(Arc::new(AtomicU64::new(size)))
    }
}

impl From<LiveSize> for u64 {
    fn from(size: LiveSize) -> Self {
        size.get()
    }
}

impl PartialEq for LiveSize {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl Eq for LiveSize {}

/// A page's position on the image: its byte offset / 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNo(pub u64);

impl PageNo {
    /// First byte of the page on the image.
    pub fn offset_bytes(self) -> u64 {
        self.0 * PAGE_BYTES
    }

    /// The page `count` pages after this one.
    #[must_use]
    pub fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

/// A slot of the page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(pub u32);

impl PageId {
    /// No slot: no table has so many.
    pub const NONE: Self = Self(u32::MAX);

    /// The slot after this one.
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }

    /// Index of the slot in the table.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A 4 KiB frame of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameId(pub u32);

impl FrameId {
    /// Index of the frame in the arena.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A contiguous run of sectors on the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorSpan {
    /// First sector.
    pub start: u64,
    /// Number of sectors.
    pub count: u64,
}

impl SectorSpan {
    /// The sectors of page `no` that lie in the span.
    pub fn sectors_in(self, no: PageNo) -> SectorMask {
        let start = no.0 * SECTORS_PER_PAGE;
        let first = low_u8(self.start.saturating_sub(start).min(SECTORS_PER_PAGE));
        let end = low_u8(self.end().saturating_sub(start).min(SECTORS_PER_PAGE));
        if first < end { SectorMask::run(first, end - first) } else { SectorMask::NONE }
    }

    /// `count` sectors from `start`.
    pub fn new(start: u64, count: u64) -> Self {
        Self { start, count }
    }

    /// First sector after the span.
    pub fn end(self) -> u64 {
        self.start + self.count
    }

    /// The pages that the span touches.
    pub fn pages(self) -> PageSpan {
        let first = self.start / SECTORS_PER_PAGE;
        PageSpan { first: PageNo(first), count: self.end().div_ceil(SECTORS_PER_PAGE).saturating_sub(first) }
    }
}

/// A contiguous run of pages on the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSpan {
    /// First page.
    pub first: PageNo,
    /// Number of pages.
    pub count: u64,
}

impl PageSpan {
    /// `count` pages from `first`.
    pub fn new(first: PageNo, count: u64) -> Self {
        Self { first, count }
    }

    /// First page after the span.
    pub fn end(self) -> PageNo {
        self.first.plus(self.count)
    }

    /// Whether `page` lies in the span.
    pub fn contains(self, page: PageNo) -> bool {
        page >= self.first && page < self.end()
    }

    /// Whether the two spans share a page.
    pub fn overlaps(self, other: Self) -> bool {
        self.first < other.end() && other.first < self.end()
    }

    /// The pages in order.
    pub fn iter(self) -> impl Iterator<Item = PageNo> {
        (self.first.0..self.end().0).map(PageNo)
    }
}

/// A set of sectors of one page: bit `n` is the page's sector `n`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SectorMask(pub u8);

impl SectorMask {
    /// No sector.
    pub const NONE: Self = Self(0);
    /// All eight sectors.
    pub const ALL: Self = Self(0xff);

    /// `count` sectors from sector `first` of the page.
    ///
    /// => `first + count` is at most 8.
    pub fn run(first: u8, count: u8) -> Self {
        debug_assert!(u64::from(first) + u64::from(count) <= SECTORS_PER_PAGE);
        if count == 8 { Self::ALL } else { Self(((1u8 << count) - 1) << first) }
    }

    /// Whether no sector is in the mask.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether every sector of `other` is in the mask.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Sectors in both masks.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Sectors in either mask.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Sectors in `self` and not in `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The lowest run of adjacent sectors, as (first, count); `None` for the empty mask.
    pub fn first_run(self) -> Option<(u8, u8)> {
        if self.0 == 0 {
            return None;
        }
        let first = low_u8(u64::from(self.0.trailing_zeros()));
        let count = low_u8(u64::from((self.0 >> first).trailing_ones()));
        Some((first, count))
    }

    /// Number of sectors.
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }
}

/// The low 32 bits of a number.
pub fn low_u32(number: u64) -> u32 {
    let [a, b, c, d, ..] = number.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The low 16 bits of a number.
pub fn low_u16(number: u64) -> u16 {
    let [a, b, ..] = number.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// The low 8 bits of a number.
pub fn low_u8(number: u64) -> u8 {
    let [low, ..] = number.to_le_bytes();
    low
}

/// A flush epoch: a FLUSH closes the current one and opens the next; a dirty page carries the epoch of its first write
/// that no FLUSH has covered.
///
/// Epochs wrap. Those alive at the same time span less than half of the `u32` range, so [`Epoch::at_or_before`]
/// compares by distance, like TCP sequence numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(pub u32);

impl Epoch {
    /// Whether [`Epoch::at_or_before`] would soon mistake this epoch for one after `current`.
    pub fn is_about_to_wrap(self, current: Self) -> bool {
        current.0.wrapping_sub(self.0) > u32::MAX / 4
    }

    /// Whether `self` was opened no later than `other`.
    pub fn at_or_before(self, other: Self) -> bool {
        other.0.wrapping_sub(self.0) < 1 << 31
    }

    /// The epoch opened after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// A time since the image was opened, or since the simulation began, to a nanosecond.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick {
    ns: u64,
}

impl Tick {
    /// When the image was opened, or the simulation began.
    pub const ZERO: Self = Self::from_ns(0);

    /// This many nanoseconds after [`Tick::ZERO`].
    pub const fn from_ns(ns: u64) -> Self {
        Self { ns }
    }

    /// This many microseconds after [`Tick::ZERO`].
    pub const fn from_us(us: u64) -> Self {
        Self::ZERO.plus_us(us)
    }

    /// The tick `us` microseconds later.
    #[must_use]
    pub const fn plus_us(self, us: u64) -> Self {
        Self { ns: self.ns.saturating_add(us.saturating_mul(1000)) }
    }

    /// The tick `us` microseconds earlier, or [`Tick::ZERO`].
    #[must_use]
    pub const fn minus_us(self, us: u64) -> Self {
        Self { ns: self.ns.saturating_sub(us.saturating_mul(1000)) }
    }

    /// Whole microseconds from `earlier` to `self`; 0 if `earlier` is later.
    pub const fn since_us(self, earlier: Self) -> u64 {
        self.since_ns(earlier) / 1000
    }

    /// Nanoseconds from `earlier` to `self`; 0 if `earlier` is later.
    pub const fn since_ns(self, earlier: Self) -> u64 {
        self.ns.saturating_sub(earlier.ns)
    }
}

/// Why an operation on a store failed. `virtio::Status` is the status that the guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// ENOSPC, EDQUOT: no space for the write.
    NoSpace,
    /// EIO and similar: the medium failed.
    Media,
    /// Another owner has taken the image; every later operation fails too.
    Fenced,
    /// The image or its server no longer exists; every later operation fails too.
    Gone,
    /// The operation did not complete within the store's time limit.
    TimedOut,
    /// The store does not support this operation.
    Unsupported,
    /// The request was malformed (range, alignment, segment sum).
    Invalid,
    /// Only for a Sync: the store has lost writes that were not durable, and works again. All writes that no successful
    /// Sync covers are in doubt.
    Lost,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSpace => "no space",
            Self::Media => "I/O error",
            Self::Fenced => "fenced by another owner",
            Self::Gone => "gone",
            Self::TimedOut => "timed out",
            Self::Unsupported => "not supported",
            Self::Invalid => "invalid request",
            Self::Lost => "unsynced writes lost",
        })
    }
}

impl StdError for Fault {}

impl Fault {
    /// Whether the device may have been reset, and so may have lost writes that were not durable. The other faults mean
    /// that the operation could not start.
    pub fn may_be_a_reset(self) -> bool {
        matches!(self, Self::Media | Self::Fenced | Self::Gone | Self::TimedOut)
    }
}

/// A number with its noun, for messages: "1 page", "2 pages". `noun` is the singular of one that takes an "s".
pub fn counted(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// Whether a range's space on the store may be freed when the range is zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmap {
    /// The store may free it (virtio: VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP).
    Allowed,
    /// It stays allocated (Linux: REQ_NOUNMAP).
    Forbidden,
}

/// Whether an image has holes, and whether its store can map them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageHoles {
    /// The store can't tell holes from data, and has no space to reserve: a block device.
    Unmappable,
    /// The image has no holes, but a discard or zero may make some.
    NoneYet,
    /// The image may have holes.
    Possible,
}

/// The status of a part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Any contents.
    Data,
    /// Reads as zeros without I/O.
    Hole,
}

/// The operations of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Read the range into memory.
    Read,
    /// Write memory to the range.
    Write,
    /// Make all writes durable whose completion was seen before this operation was submitted.
    Sync,
    /// Make the range read as zeros.
    Zero {
        /// Whether the range's space may be freed.
        unmap: Unmap,
    },
    /// Drop the range's contents; reads of it return undefined data afterwards.
    Discard,
    /// Report which parts of the range are data and which are holes, and where the last part ends.
    Map,
    /// Allocate space for the holes of the range.
    Allocate,
}

/// Whether a request waits for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A request waits for it.
    Demand,
    /// No request waits for it yet: readahead or write-back.
    Background,
}

/// [`OpKind`] without its details: operations are counted, and tests make them fail, by class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpClass {
    /// [`OpKind::Read`]
    Read,
    /// [`OpKind::Write`]
    Write,
    /// [`OpKind::Sync`]
    Sync,
    /// [`OpKind::Zero`], with or without unmap.
    Zero,
    /// [`OpKind::Discard`]
    Discard,
    /// [`OpKind::Allocate`]
    Allocate,
    /// [`OpKind::Map`]
    Map,
}

impl OpClass {
    /// All of them, in the order of the counters.
    pub const ALL: [Self; 7] =
        [Self::Read, Self::Write, Self::Sync, Self::Zero, Self::Discard, Self::Allocate, Self::Map];
}

impl From<OpKind> for OpClass {
    fn from(kind: OpKind) -> Self {
        match kind {
            OpKind::Read => Self::Read,
            OpKind::Write => Self::Write,
            OpKind::Sync => Self::Sync,
            OpKind::Zero { .. } => Self::Zero,
            OpKind::Discard => Self::Discard,
            OpKind::Allocate => Self::Allocate,
            OpKind::Map => Self::Map,
        }
    }
}

impl OpKind {
    /// The operation on `span` in words, for messages.
    pub fn describe(self, span: SectorSpan) -> String {
        // They may be any numbers: the statistics may come from a compromised disk process.
        let [bytes, at] = [span.count, span.start].map(|sectors| sectors.saturating_mul(SECTOR_BYTES));
        match self {
            Self::Sync => self.with_article().to_owned(),
            _ => format!("{} of {bytes} bytes at byte {at}", self.with_article()),
        }
    }

    /// The operation in words, with an article.
    fn with_article(self) -> &'static str {
        match self {
            Self::Read => "a read",
            Self::Write => "a write",
            Self::Sync => "a sync",
            Self::Zero { .. } => "a write-zeroes",
            Self::Discard => "a discard",
            Self::Map => "a query for holes",
            Self::Allocate => "an allocation of space",
        }
    }

    /// Whether the operation changes the image or its attributes.
    pub fn is_change(self) -> bool {
        matches!(self, Self::Write | Self::Zero { .. } | Self::Discard | Self::Allocate)
    }
}

/// The contents of a frame, as recorded in the ledger for a later daemon that restores the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRecord {
    /// The page whose bytes the frame holds.
    pub page: PageNo,
    /// Sectors whose bytes in the frame are current; none: the frame is empty.
    pub valid: SectorMask,
    /// Sectors that may not be durable on the store: not written, or written and not synced. A subset of `valid`.
    pub dirty: SectorMask,
}

impl FrameRecord {
    /// The record of a frame that no longer holds `page`.
    pub fn empty(page: PageNo) -> Self {
        Self { page, valid: SectorMask::NONE, dirty: SectorMask::NONE }
    }

    /// Whether the frame is empty.
    pub fn is_empty(&self) -> bool {
        self.valid.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_of_one_takes_the_singular() {
        let counts = [0, 1, 2].map(|count| counted(count, "dirty page"));
        assert_eq!(counts, ["0 dirty pages", "1 dirty page", "2 dirty pages"]);
    }

    #[test]
    fn epochs_compare_across_the_wrap() {
        let last = Epoch(u32::MAX);
        assert!(last.at_or_before(last.next()) && !last.next().at_or_before(last) && last.at_or_before(last));
    }

    /// The rule advances an old epoch well before the comparison would mistake it for a later one.
    #[test]
    fn an_epoch_is_about_to_wrap_before_it_compares_as_later() {
        for current in [Epoch(0), Epoch(7), Epoch(u32::MAX)] {
            let before = |distance: u32| Epoch(current.0.wrapping_sub(distance));
            assert!(!before(0).is_about_to_wrap(current) && !before(u32::MAX / 4).is_about_to_wrap(current));
            for distance in [u32::MAX / 4 + 1, (1 << 31) - 1] {
                let epoch = before(distance);
                assert!(epoch.is_about_to_wrap(current) && epoch.at_or_before(current), "{distance}");
            }
        }
    }
}
