//! The layout of an arena's file: a header that names the image, a ledger of what each frame holds, the frames.
//!
//! The daemon changes a frame's record in one store, after the bytes that the record describes. So the ledger is
//! correct whenever the daemon dies. The next version of genblk must either read this layout or refuse it: every change
//! of the layout changes [`LAYOUT`].
//!
//! | bytes | content |
//! |---|---|
//! | 0 to 4095 | the header, see [`Header`]; its first word is written last |
//! | next 4096, not in layout 1 | 256 slots for ranges that must read as zeros: first sector, sectors (0: unused) |
//! | next, padded to 4096 | 8 bytes a frame: page number (40 bits), valid sectors (8), dirty sectors (8), 0 (8) |
//! | next | the frames |
//!
//! A loss marker (of a cache that does not survive its daemon) is a header alone.

use std::ffi::OsString;
use std::fmt::Display;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::units::{FrameRecord, PAGE_SIZE, PageNo, SectorMask};

/// The first eight bytes of a finished header.
const MAGIC: u64 = u64::from_le_bytes(*b"genblk\0L");
/// Version of the layout. This genblk reads this version and older ones; it refuses newer ones.
const LAYOUT: u64 = 2;
/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = PAGE_SIZE;
/// Bytes of a frame's record.
pub(super) const RECORD_BYTES: usize = 8;
/// Slots of the table of ranges that must read as zeros.
pub const ZERO_SLOTS: usize = PAGE_SIZE / ZERO_SLOT_BYTES;
/// Bytes of such a slot.
pub(super) const ZERO_SLOT_BYTES: usize = 16;
/// Bits of a page number in a record.
const PAGE_BITS: u32 = 40;

/// Offsets of the header's fields in bytes. A field is one little-endian word unless its comment says otherwise.
pub(super) mod field {
    pub const MAGIC: usize = 0;
    pub const LAYOUT: usize = 8;
    /// Bytes of a page.
    pub const PAGE_SIZE: usize = 16;
    /// Number of frames.
    pub const FRAMES: usize = 24;
    // The image's identity.
    pub const DEVICE: usize = 32;
    pub const INODE: usize = 40;
    pub const BORN_NS: usize = 48;
    pub const SIZE_BYTES: usize = 56;
    /// The host's boot ID, 16 bytes.
    pub const BOOT: usize = 64;
    /// Length of the image's path in bytes.
    pub const PATH_LEN: usize = 80;
    /// Not 0 while a loss marker's cache holds data that the image lacks, and in any arena after such data was lost.
    pub const UNWRITTEN: usize = 88;
    /// The image's path: bytes up to `WRITE_THROUGH`, of which `PATH_LEN` are in use.
    pub const PATH: usize = 96;
    /// Not 0 once the guest has selected write-through: the last word of the header.
    pub const WRITE_THROUGH: usize = super::HEADER_BYTES - 8;
}

/// Longest path that a header holds, in bytes; a longer one is cut off.
const PATH_BYTES_MAX: usize = field::WRITE_THROUGH - field::PATH;

/// What became of the completed writes of a guest that outlived the previous daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestData {
    /// Each is in the arena or on the image.
    Intact,
    /// A daemon died with writes in its cache that were nowhere else. The guest does not know yet.
    Lost,
}

/// What the file of an arena records of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestState {
    /// Whether a daemon died and lost data of the guest.
    pub data: GuestData,
    /// Whether the guest has selected write-through.
    pub write_through: bool,
}

impl GuestState {
    /// Nothing to remember: the state of a guest that no file records.
    pub const FRESH: Self = Self { data: GuestData::Intact, write_through: false };

    /// What either of two files records.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let data = if self.data == GuestData::Lost { GuestData::Lost } else { other.data };
        Self { data, write_through: self.write_through || other.write_through }
    }
}

/// What the header of a new arena records.
#[derive(Clone, Copy, Debug)]
pub struct ArenaSpec<'a> {
    /// Number of frames of the cache.
    pub frames: usize,
    /// The image's identity.
    pub identity: ImageId,
    /// The image's path, for the operator.
    pub image: &'a Path,
    /// What earlier files record of the guest.
    pub guest: GuestState,
}

/// The header of an arena's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of the layout.
    layout: u64,
    /// The image's identity.
    pub identity: ImageId,
    /// Number of frames; 0 in a loss marker.
    pub frames: u64,
    /// The host's boot ID when the arena was created: memory does not survive a boot.
    pub boot: [u8; 16],
    /// The image's path, for the operator.
    pub image: PathBuf,
    /// What it records of the guest.
    pub guest: GuestState,
}

impl Header {
    /// The header of a new arena.
    pub(super) fn new(spec: &ArenaSpec<'_>) -> Self {
        let ArenaSpec { frames, identity, image, guest } = *spec;
        let image = image.canonicalize().unwrap_or_else(|_| image.to_path_buf());
        let frames = frames as u64;
        Self { layout: LAYOUT, identity, frames, boot: boot_id(), image, guest }
    }

    /// Whether a cache of `frames` frames can use the arena as it is.
    pub fn fits(&self, frames: usize) -> bool {
        self.layout == LAYOUT && self.frames == frames as u64
    }

    /// Size of the image in bytes.
    pub(super) fn image_bytes(&self) -> u64 {
        self.identity.size_bytes
    }

    /// Offset of the table of ranges that must read as zeros; `None` in a layout that has none.
    pub(super) fn zero_slots_at(&self) -> Option<usize> {
        (self.layout > 1).then_some(HEADER_BYTES)
    }

    /// Offset of the frames' records.
    pub(super) fn records_at(&self) -> usize {
        self.zero_slots_at().map_or(HEADER_BYTES, |at| at + ZERO_SLOTS * ZERO_SLOT_BYTES)
    }

    /// The header's words, each with its offset, in the order in which they are to be stored.
    ///
    /// => Only the last two complete it: with a frame count of 0 it is a loss marker, and without the first word it is
    ///    no header. So a new header may replace one that has no frames, which is then valid all the time.
    pub(super) fn words(&self) -> Vec<(usize, u64)> {
        let ImageId { device, inode, born_ns, size_bytes } = self.identity;
        let path = self.image.as_os_str().as_bytes();
        let path = &path[..path.len().min(PATH_BYTES_MAX)];
        let mut words = vec![
            (field::LAYOUT, self.layout),
            (field::PAGE_SIZE, PAGE_SIZE as u64),
            (field::DEVICE, device),
            (field::INODE, inode),
            (field::BORN_NS, born_ns),
            (field::SIZE_BYTES, size_bytes),
            (field::PATH_LEN, path.len() as u64),
            (field::UNWRITTEN, u64::from(self.guest.data == GuestData::Lost)),
            (field::WRITE_THROUGH, u64::from(self.guest.write_through)),
        ];
        let mut put = |at: usize, bytes: &[u8]| {
            for (offset, chunk) in (at..).step_by(8).zip(bytes.chunks(8)) {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                words.push((offset, u64::from_le_bytes(word)));
            }
        };
        put(field::BOOT, &self.boot);
        put(field::PATH, path);
        words.extend([(field::FRAMES, self.frames), (field::MAGIC, MAGIC)]);
        words
    }

    /// Reads a header. `None`: the daemon died before it finished the header, so the arena holds nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when the bytes are no header or of a layout that this genblk does not know; `file` names
    /// the file in the message.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES], file: &impl Display) -> Result<Option<Self>> {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let error = |why: String| Err(Error::new(ErrorKind::Ledger, format!("{file}: {why}")));
        match word(field::MAGIC) {
            0 => return Ok(None),
            MAGIC => {}
            _ => return error("bad magic: not a genblk ledger".to_owned()),
        }
        let layout = word(field::LAYOUT);
        if !(1..=LAYOUT).contains(&layout) {
            return error(format!("unknown ledger layout {layout}: this genblk reads layouts 1 to {LAYOUT}"));
        }
        let page_size = word(field::PAGE_SIZE);
        if page_size != PAGE_SIZE as u64 {
            return error(format!("the ledger's page size is {page_size}, not {PAGE_SIZE}"));
        }
        let path_len = usize::try_from(word(field::PATH_LEN)).unwrap_or(usize::MAX).min(PATH_BYTES_MAX);
        Ok(Some(Self {
            layout,
            identity: ImageId {
                device: word(field::DEVICE),
                inode: word(field::INODE),
                born_ns: word(field::BORN_NS),
                size_bytes: word(field::SIZE_BYTES),
            },
            frames: word(field::FRAMES),
            boot: bytes[field::BOOT..field::BOOT + 16].try_into().expect("16 bytes"),
            image: OsString::from_vec(bytes[field::PATH..field::PATH + path_len].to_vec()).into(),
            guest: GuestState {
                data: if word(field::UNWRITTEN) == 0 { GuestData::Intact } else { GuestData::Lost },
                write_through: word(field::WRITE_THROUGH) != 0,
            },
        }))
    }
}

/// The host's boot ID (random(4)); zeros if the kernel does not report it.
pub(super) fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).unwrap_or(0).to_be_bytes()
}

/// A record as a word of the ledger; 0 for an empty record.
pub(super) fn encode_record(record: FrameRecord) -> u64 {
    debug_assert!(record.page.0 >> PAGE_BITS == 0, "Arena::persistent() refuses images of more than 2^40 pages");
    if record.is_empty() {
        return 0;
    }
    record.page.0 | u64::from(record.valid.0) << PAGE_BITS | u64::from(record.dirty.0) << (PAGE_BITS + 8)
}

/// The record in a word of the ledger; `None` if it is empty.
pub(super) fn decode_record(word: u64) -> Option<FrameRecord> {
    let [.., valid, dirty, _] = word.to_le_bytes();
    let page = PageNo(word & ((1 << PAGE_BITS) - 1));
    (word != 0).then_some(FrameRecord { page, valid: SectorMask(valid), dirty: SectorMask(dirty) })
}

/// Whether an image has more pages than a record can number (4 PiB).
pub(super) fn is_too_large(identity: &ImageId) -> bool {
    identity.size_bytes.div_ceil(PAGE_SIZE as u64) >> PAGE_BITS != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let identity = ImageId { device: 0xfd00, inode: 12, born_ns: 7, size_bytes: 1 << 30 };
        Header {
            layout: LAYOUT,
            identity,
            frames: 1024,
            boot: [3; 16],
            image: "/srv/a.img".into(),
            guest: GuestState::FRESH,
        }
    }

    fn encode(header: &Header) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        for (at, word) in header.words() {
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_header_is_decoded_as_it_was_encoded() {
        let lost = GuestState { data: GuestData::Lost, ..GuestState::FRESH };
        let write_through = GuestState { write_through: true, ..GuestState::FRESH };
        let long = "/".repeat(PATH_BYTES_MAX + 1);
        for guest in [GuestState::FRESH, lost, write_through] {
            let header = Header { guest, ..header() };
            assert_eq!(Header::decode(&encode(&header), &"f").unwrap(), Some(header));
        }
        let cut = Header { image: long[1..].into(), guest: write_through, ..header() };
        let long = Header { image: long.into(), ..cut.clone() };
        assert_eq!(Header::decode(&encode(&long), &"f").unwrap(), Some(cut), "a path that is too long is cut off");
    }

    #[test]
    fn a_foreign_header_is_refused() {
        for at in [0, 8, 16] {
            let mut bytes = encode(&header());
            bytes[at] ^= 0x40;
            assert_eq!(Header::decode(&bytes, &"f").unwrap_err().kind(), ErrorKind::Ledger, "byte {at}");
        }
    }

    #[test]
    fn an_older_layout_is_read_but_does_not_fit() {
        let old = Header { layout: 1, ..header() };
        assert_eq!(Header::decode(&encode(&old), &"f").unwrap(), Some(old.clone()));
        assert!(header().fits(1024) && !header().fits(1023) && !old.fits(1024));
        assert_eq!((old.records_at(), header().records_at()), (4096, 8192));
    }

    #[test]
    fn a_record_is_decoded_as_it_was_encoded() {
        let record = FrameRecord { page: PageNo((1 << 40) - 1), valid: SectorMask(0xf1), dirty: SectorMask(0x81) };
        assert_eq!(decode_record(encode_record(record)), Some(record));
        assert_eq!(encode_record(FrameRecord { valid: SectorMask::NONE, ..record }), 0);
        assert_eq!(decode_record(0), None);
    }
}
