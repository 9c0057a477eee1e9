//! The layout of a named arena: a header that says whose memory it is, a ledger of what each frame holds, the frames.
//!
//! The daemon writes an entry after the bytes it speaks of, in one store, so that whatever kills the daemon leaves a
//! ledger that is right. Everything here must be readable by the next version, or be refused by it: a change of the
//! layout changes [`LAYOUT`].
//!
//! | bytes | what |
//! |---|---|
//! | 0 to 4095 | the header, see [`Header`]; its first word is written last |
//! | then, but in layout 1 | 256 ranges that are to read as zeros: first sector, sectors (0: none), 8 bytes each |
//! | then | 8 bytes for each frame: page number (40 bits), valid and dirty sectors (8 bits each), 0; padded to 4096 |
//! | then | the frames |
//!
//! An arena whose cache is not to survive has a header alone, with a mark that says whether anything was lost.

use std::fmt::Display;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::units::{FrameRecord, PAGE_SIZE, PageNo, SectorMask};

/// What the first eight bytes hold.
const MAGIC: u64 = u64::from_le_bytes(*b"genblk\0L");
/// Version of the layout. One that is older is read if this says how; one that is newer is refused.
const LAYOUT: u64 = 2;
/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = PAGE_SIZE;
/// Bytes of an entry.
pub(super) const RECORD_BYTES: usize = 8;
/// Zeroed ranges that an arena can note.
pub const ZERO_SLOTS: usize = PAGE_SIZE / ZERO_SLOT_BYTES;
/// Bytes of one.
pub(super) const ZERO_SLOT_BYTES: usize = 16;
/// Bits of a page number in an entry.
const PAGE_BITS: u32 = 40;

/// What stands at the beginning of a named arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows the header.
    layout: u64,
    /// The image.
    pub identity: ImageId,
    /// Frames; 0 in an arena that only marks whether anything was lost.
    pub frames: u64,
    /// The host's boot: memory of another boot is not what it seems.
    pub boot: [u8; 16],
    /// Where the image was, for the operator.
    pub image: PathBuf,
    /// A daemon died, and what its cache held was lost with it.
    pub lost: bool,
    /// The guest has chosen write-through.
    pub write_through: bool,
}

/// Where the header's other parts are: eight words come first.
const BOOT: std::ops::Range<usize> = 64..80;
const PATH_LEN: usize = 80;
/// The word that is set while a volatile arena holds what the image has not.
pub(super) const UNWRITTEN: usize = 88;
const PATH: usize = 96;
/// The word that is set once the guest has chosen write-through; the path ends before it.
pub(super) const WRITE_THROUGH: usize = HEADER_BYTES - 8;
/// The word with the number of frames.
pub(super) const FRAMES: usize = 24;

impl Header {
    /// The header of a new arena; `lost`: something that a predecessor's cache held is gone.
    pub(super) fn new(identity: ImageId, frames: u64, image: &Path, lost: bool) -> Self {
        let image = image.canonicalize().unwrap_or_else(|_| image.to_path_buf());
        Self { layout: LAYOUT, identity, frames, boot: boot_id(), image, lost, write_through: false }
    }

    /// Whether a cache of `frames` frames can go on in the arena as it is.
    pub fn fits(&self, frames: usize) -> bool {
        self.layout == LAYOUT && self.frames == frames as u64
    }

    /// Where the table of zeroed ranges is; `None` in an arena that has none.
    pub(super) fn zero_slots_at(&self) -> Option<usize> {
        (self.layout > 1).then_some(HEADER_BYTES)
    }

    /// Where the frames' entries begin.
    pub(super) fn records_at(&self) -> usize {
        self.zero_slots_at().map_or(HEADER_BYTES, |at| at + ZERO_SLOTS * ZERO_SLOT_BYTES)
    }

    /// The header's bytes, and its first word, which is to be written when everything else is in place.
    pub(super) fn encode(&self) -> ([u8; HEADER_BYTES], u64) {
        let mut bytes = [0; HEADER_BYTES];
        let ImageId { device, inode, born_ns, size_bytes } = self.identity;
        let words = [0, self.layout, PAGE_SIZE as u64, self.frames, device, inode, born_ns, size_bytes];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes[BOOT].copy_from_slice(&self.boot);
        bytes[UNWRITTEN..UNWRITTEN + 8].copy_from_slice(&u64::from(self.lost).to_le_bytes());
        let path = self.image.as_os_str().as_bytes();
        let path = &path[..path.len().min(WRITE_THROUGH - PATH)];
        bytes[PATH_LEN..PATH_LEN + 8].copy_from_slice(&(path.len() as u64).to_le_bytes());
        bytes[PATH..PATH + path.len()].copy_from_slice(path);
        bytes[WRITE_THROUGH..].copy_from_slice(&u64::from(self.write_through).to_le_bytes());
        (bytes, MAGIC)
    }

    /// Reads a header. `None`: its daemon died before it was written; there is nothing in the arena.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when it is of another layout, or none at all.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES], file: &impl Display) -> Result<Option<Self>> {
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"));
        let refused = |why: String| Err(Error::new(ErrorKind::Ledger, format!("{file}: {why}")));
        match word(0) {
            0 => return Ok(None),
            MAGIC => {}
            _ => return refused("it is no ledger of genblk's".to_owned()),
        }
        if !(1..=LAYOUT).contains(&word(1)) || word(2) != PAGE_SIZE as u64 {
            return refused(format!("its layout is {}, and this genblk reads up to {LAYOUT}", word(1)));
        }
        let identity = ImageId { device: word(4), inode: word(5), born_ns: word(6), size_bytes: word(7) };
        let path_len = usize::try_from(word(PATH_LEN / 8)).unwrap_or(usize::MAX).min(WRITE_THROUGH - PATH);
        let image = std::ffi::OsString::from_vec(bytes[PATH..PATH + path_len].to_vec()).into();
        Ok(Some(Self {
            layout: word(1),
            identity,
            frames: word(3),
            boot: bytes[BOOT].try_into().expect("16 bytes"),
            image,
            lost: word(UNWRITTEN / 8) != 0,
            write_through: word(WRITE_THROUGH / 8) != 0,
        }))
    }
}

/// The host's boot, as 16 bytes; zeros where the kernel doesn't say.
pub(super) fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).unwrap_or(0).to_be_bytes()
}

/// A record as a ledger word; 0 for a frame that holds nothing.
pub(super) fn encode_record(record: FrameRecord) -> u64 {
    debug_assert!(record.page.0 >> PAGE_BITS == 0, "Arena::persistent() refuses an image with more than 2^40 pages");
    if record.is_empty() {
        return 0;
    }
    record.page.0 | u64::from(record.valid.0) << PAGE_BITS | u64::from(record.dirty.0) << (PAGE_BITS + 8)
}

/// The record in a ledger word; `None` if the frame holds nothing.
pub(super) fn decode_record(word: u64) -> Option<FrameRecord> {
    let [.., valid, dirty, _] = word.to_le_bytes();
    let page = PageNo(word & ((1 << PAGE_BITS) - 1));
    (word != 0).then_some(FrameRecord { page, valid: SectorMask(valid), dirty: SectorMask(dirty) })
}

/// Images with more pages than an entry can name (4 PiB).
pub(super) fn too_large(identity: &ImageId) -> bool {
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
            lost: false,
            write_through: false,
        }
    }

    fn with_magic(header: &Header) -> [u8; HEADER_BYTES] {
        let (mut bytes, magic) = header.encode();
        bytes[..8].copy_from_slice(&magic.to_le_bytes());
        bytes
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        for header in [header(), Header { lost: true, ..header() }, Header { write_through: true, ..header() }] {
            assert_eq!(Header::decode(&with_magic(&header), &"f").unwrap(), Some(header));
        }
        assert_eq!(Header::decode(&header().encode().0, &"f").unwrap(), None, "not finished");
    }

    #[test]
    fn another_layout_is_refused() {
        for at in [0, 8, 16] {
            let mut bytes = with_magic(&header());
            bytes[at] ^= 0x40;
            assert_eq!(Header::decode(&bytes, &"f").unwrap_err().kind(), ErrorKind::Ledger, "byte {at}");
        }
    }

    #[test]
    fn an_older_layout_is_read_and_does_not_fit() {
        let old = Header { layout: 1, ..header() };
        assert_eq!(Header::decode(&with_magic(&old), &"f").unwrap(), Some(old.clone()));
        assert!(header().fits(1024) && !header().fits(1023) && !old.fits(1024));
        assert_eq!((old.records_at(), header().records_at()), (4096, 8192));
    }

    #[test]
    fn an_entry_is_one_word() {
        let record = FrameRecord { page: PageNo((1 << 40) - 1), valid: SectorMask(0xf1), dirty: SectorMask(0x81) };
        assert_eq!(decode_record(encode_record(record)), Some(record));
        assert_eq!(encode_record(FrameRecord { valid: SectorMask::NONE, ..record }), 0);
        assert_eq!(decode_record(0), None);
    }
}
