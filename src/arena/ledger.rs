//! The layout of an arena's file: a header that names the image, a ledger with the contents of each frame, the frames.
//!
//! The daemon changes a frame's record in one store, after the bytes that the record describes. So the ledger is
//! consistent whenever the daemon dies. The next version of genblk must either read this layout or reject it: every
//! change of the layout changes [`LAYOUT`].
//!
//! | bytes | content |
//! |---|---|
//! | 0 to 4095 | the header, see [`Header`]; its first word is written last |
//! | next 4096, not in layout 1 | 256 slots for ranges that must read as zeros: first sector, sectors (0: unused) |
//! | next 4096, from layout 5 on | 256 such slots for ranges whose changes the store may lose |
//! | next, padded to 4096 | 8 bytes a frame: page number (40 bits), valid sectors (8), dirty sectors (8), 0 (8) |
//! | next | the frames; the first ones have memory (`reserve.rs`), and so have their records |
//!
//! A loss marker (of a cache that does not survive its daemon) is a header alone.
//!
//! Layout 3 adds the tenure and the last known state of the image ([`LastSeen`]) to the header: the size no longer
//! identifies the image, so that a grown image keeps its cache. Layout 4 adds hashes of pages of the image
//! (`samples.rs`), and the formats whose headers the guest has written. Layout 5 adds the second table of ranges.

use std::ffi::OsString;
use std::fmt::Display;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::tenure::TenureId;
use crate::tenure::token::{ChangeToken, LastSeen};
use crate::units::{FrameRecord, PAGE_SIZE, PageNo, SectorMask};

/// The first eight bytes of a finished header.
const MAGIC: u64 = u64::from_le_bytes(*b"genblk\0L");
/// Version of the layout. This genblk reads this version and older ones; it rejects newer ones.
const LAYOUT: u64 = 5;
/// The first layout whose header names a tenure.
const FIRST_WITH_TENURES: u64 = 3;
/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = PAGE_SIZE;
/// Bytes of a frame's record.
pub(super) const RECORD_BYTES: usize = 8;
/// The first layout with a table of ranges that the store may have changed.
const FIRST_WITH_CHANGED_RANGES: u64 = 5;
/// Slots of a table of ranges: of those that must read as zeros, or of those that the store may have changed.
pub const RANGE_SLOTS: usize = PAGE_SIZE / RANGE_SLOT_BYTES;
/// Bytes of such a slot.
pub(super) const RANGE_SLOT_BYTES: usize = 16;
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
    // The image's identity, and its size.
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
    /// The image's path: bytes up to `ALIAS` (layouts 1 and 2: up to `WRITE_THROUGH`), of which `PATH_LEN` are in use.
    pub const PATH: usize = 96;
    /// Another name of a block device's image, which it keeps when it is attached again: bytes up to `GENERATION`.
    pub const ALIAS: usize = 3072;
    /// Generation of the tenure; 0 in layouts 1 and 2.
    pub const GENERATION: usize = 3584;
    /// ID of the tenure, 16 bytes.
    pub const TENURE_ID: usize = 3592;
    /// When the tenure began, in seconds since 1970.
    pub const SINCE: usize = 3608;
    /// Not 0 if the image has the record of the tenure; 2 if that record marks the tenure as over.
    pub const IS_RECORDED: usize = 3616;
    /// `SET_ASIDE` (in layout 3: not 0) once the operator has set the cache aside: no daemon uses it.
    pub const IS_SET_ASIDE: usize = 3624;
    /// Length of `ALIAS` in bytes.
    pub const ALIAS_LEN: usize = 3632;
    /// The last time when the daemon is known to have lived while it changed the image, in nanoseconds since 1970.
    pub const HEARTBEAT: usize = 3640;
    /// Number of changes of the image that the daemon has started.
    pub const CHANGES: usize = 3648;
    /// Bytes of those changes.
    pub const CHANGED_BYTES: usize = 3656;
    /// The slot of the valid token, 0 or 1: the other one is being stored.
    pub const TOKEN_SLOT: usize = 3664;
    /// Two change tokens of the image, of `TOKEN_BYTES` each: see [`super::token_field`].
    pub const TOKENS: usize = 3672;
    /// Pages of the image with their hashes, `SAMPLE_SLOTS` pairs of words: see [`super::sample_at`].
    pub const SAMPLES: usize = 3800;
    /// Formats whose headers the guest has written, if the image cannot record that: `GuestState::formats`.
    pub const GUEST_FORMATS: usize = 4056;
    /// Number of frames at the end that have no memory.
    pub const UNRESERVED: usize = 4064;
    /// Not 0 once the guest has selected write-through: the last word of the header.
    pub const WRITE_THROUGH: usize = super::HEADER_BYTES - 8;
}

/// Offsets of the fields of a change token.
pub(super) mod token_field {
    /// 1 + the number of changes that had started when the token was taken; 0: there is no token.
    pub const AT: usize = 0;
    /// `CHANGED_BYTES` when the token was taken.
    pub const CHANGED_BYTES: usize = 8;
    /// The token, `ChangeToken::WORDS` words.
    pub const TOKEN: usize = 16;
}

/// Marks a cache as set aside, in any layout. In layouts 1 and 2 it is where a path of more than 3528 bytes would be.
pub(super) const SET_ASIDE: u64 = u64::from_le_bytes(*b"setaside");

/// Bytes of a change token and its fields.
const TOKEN_BYTES: usize = token_field::TOKEN + 8 * ChangeToken::WORDS;

/// Offset of a change token.
pub(super) fn token_at(slot: u64) -> usize {
    if slot == 0 { field::TOKENS } else { field::TOKENS + TOKEN_BYTES }
}

/// Pairs of words for pages of the image with their hashes.
pub(super) const SAMPLE_SLOTS: usize = (field::GUEST_FORMATS - field::SAMPLES) / 16;
/// The last slots are for pages that the daemon has written last; the latest one comes first.
pub(super) const WITNESS_SLOTS: [usize; 2] = [SAMPLE_SLOTS - 2, SAMPLE_SLOTS - 1];
/// Most other pages whose hashes fit in a header.
pub const SAMPLES_MAX: usize = SAMPLE_SLOTS - WITNESS_SLOTS.len();

/// Offsets of the number of a page (plus 1; 0: the slot is empty) and of its hash.
pub(super) fn sample_at(slot: usize) -> (usize, usize) {
    (field::SAMPLES + 16 * slot, field::SAMPLES + 16 * slot + 8)
}

/// The first layout with samples and formats.
const FIRST_WITH_SAMPLES: u64 = 4;

/// Longest path that a header holds, in bytes; a longer one is cut off.
const PATH_BYTES_MAX: usize = field::ALIAS - field::PATH;
/// The same for layouts 1 and 2.
const OLD_PATH_BYTES_MAX: usize = field::WRITE_THROUGH - field::PATH;
/// Longest other name that a header holds, in bytes; a longer one is left out.
const ALIAS_BYTES_MAX: usize = field::GENERATION - field::ALIAS;

/// The state of a guest's completed writes after the previous daemon has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestData {
    /// All of them are in the arena or on the image.
    Intact,
    /// A daemon died with writes in its cache that were nowhere else. The guest has not detected that yet.
    Lost,
}

/// The state of the guest that an arena's file records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestState {
    /// Whether a daemon died and lost data of the guest.
    pub data: GuestData,
    /// Whether the guest has selected write-through.
    pub write_through: bool,
    /// Formats other than raw whose headers the guest has written to its disk, a bit for each, if the image cannot
    /// record that.
    pub formats: u64,
}

impl GuestState {
    /// Nothing to record: the state of a guest without a file.
    pub const FRESH: Self = Self { data: GuestData::Intact, write_through: false, formats: 0 };

    /// Combines the states that two files record.
    #[must_use]
    pub fn merged_with(self, other: Self) -> Self {
        let data = if self.data == GuestData::Lost { GuestData::Lost } else { other.data };
        let write_through = self.write_through || other.write_through;
        Self { data, write_through, formats: self.formats | other.formats }
    }
}

/// The facts about its image that a header records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFacts {
    /// The image's identity.
    pub identity: ImageId,
    /// The image's size in bytes.
    pub size_bytes: u64,
    /// The image's path.
    pub path: PathBuf,
    /// Another name of a block device's image, which it keeps when it is attached again; empty if there is none.
    pub alias: String,
}

/// The tenure that a header belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TenureFacts {
    /// Its ID.
    pub id: TenureId,
    /// Its start, in seconds since 1970.
    pub since: u64,
    /// Whether the image has a record of it.
    pub is_recorded: bool,
    /// Whether that record marks it as over.
    pub is_over: bool,
}

/// The specification of a new arena and its header.
#[derive(Clone, Copy, Debug)]
pub struct ArenaSpec<'a> {
    /// Number of frames for which there is room.
    pub frames: usize,
    /// Number of frames that get memory immediately.
    pub reserved: usize,
    /// The image.
    pub image: &'a ImageFacts,
    /// The tenure.
    pub tenure: TenureFacts,
    /// The state of the guest that earlier files record.
    pub guest: GuestState,
}

/// The header of an arena's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of the layout.
    layout: u64,
    /// The image.
    pub image: ImageFacts,
    /// Number of frames for which there is room; 0 in a loss marker.
    pub frames: u64,
    /// Number of frames that have memory, counted from the first.
    pub reserved: u64,
    /// The host's boot ID when the arena was created: memory does not survive a boot.
    pub boot: [u8; 16],
    /// The tenure; `None` in layouts 1 and 2.
    pub tenure: Option<TenureFacts>,
    /// Whether the operator has set the cache aside: no daemon uses it.
    pub is_set_aside: bool,
    /// The last known state of the image.
    pub last_seen: LastSeen,
    /// The recorded state of the guest.
    pub guest: GuestState,
}

impl Header {
    /// The header of a new arena.
    pub(super) fn new(spec: &ArenaSpec<'_>) -> Self {
        let ArenaSpec { frames, reserved, image, tenure, guest } = *spec;
        Self {
            layout: LAYOUT,
            image: image.clone(),
            frames: frames as u64,
            reserved: reserved.min(frames) as u64,
            boot: boot_id(),
            tenure: Some(tenure),
            is_set_aside: false,
            last_seen: LastSeen::default(),
            guest,
        }
    }

    /// Whether a cache of `frames` frames can use the arena: it has room for them.
    pub fn fits(&self, frames: usize) -> bool {
        self.layout == LAYOUT && self.frames >= frames as u64
    }

    /// Whether this is the header of a cache of the image, in a layout that does not record which formats' headers the
    /// guest has written.
    pub fn predates_format_records(&self, identity: &ImageId) -> bool {
        self.layout < FIRST_WITH_SAMPLES && self.frames > 0 && self.image.identity == *identity
    }

    /// Size of the image in bytes.
    pub(super) fn image_bytes(&self) -> u64 {
        self.image.size_bytes
    }

    /// Offset of the table of ranges that must read as zeros; `None` in a layout that has none.
    pub(super) fn zero_slots_at(&self) -> Option<usize> {
        (self.layout > 1).then_some(HEADER_BYTES)
    }

    /// Offset of the table of ranges that the store may have changed; `None` in a layout that has none.
    pub(super) fn changed_slots_at(&self) -> Option<usize> {
        (self.layout >= FIRST_WITH_CHANGED_RANGES).then_some(HEADER_BYTES + RANGE_SLOTS * RANGE_SLOT_BYTES)
    }

    /// Offset of the frames' records.
    pub(super) fn records_at(&self) -> usize {
        let last_table = self.changed_slots_at().or(self.zero_slots_at());
        last_table.map_or(HEADER_BYTES, |at| at + RANGE_SLOTS * RANGE_SLOT_BYTES)
    }

    /// The header's words, each with its offset, in the order in which they are to be stored.
    ///
    /// => Only the last two words complete it: with a frame count of 0 it is a loss marker, and without the magic
    ///    number it is no header. So a new header may replace a loss marker, which stays valid all the time.
    pub(super) fn words(&self) -> Vec<(usize, u64)> {
        let mut words = vec![
            (field::LAYOUT, self.layout),
            (field::PAGE_SIZE, PAGE_SIZE as u64),
            (field::UNWRITTEN, u64::from(self.guest.data == GuestData::Lost)),
            (field::WRITE_THROUGH, u64::from(self.guest.write_through)),
            (field::GUEST_FORMATS, self.guest.formats),
            (field::UNRESERVED, self.frames - self.reserved),
            (field::TOKEN_SLOT, 0),
            (field::TOKENS + token_field::AT, 0),
            (field::HEARTBEAT, 0),
            (field::CHANGES, 0),
            (field::CHANGED_BYTES, 0),
        ];
        words.extend((0..SAMPLE_SLOTS).map(|slot| (sample_at(slot).0, 0)));
        words.extend(image_words(&self.image));
        if let Some(TenureFacts { id, since, is_recorded, is_over }) = self.tenure {
            words.extend(tenure_words(id));
            let recorded = recorded_word(is_recorded, is_over);
            words.extend([(field::SINCE, since), (field::IS_RECORDED, recorded), (field::IS_SET_ASIDE, 0)]);
        }
        put(&mut words, field::BOOT, &self.boot);
        words.extend([(field::FRAMES, self.frames), (field::MAGIC, MAGIC)]);
        words
    }

    /// Reads a header. `None`: the daemon died before it finished the header, so the arena holds nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when the bytes are not a header, or have a layout that this genblk does not support;
    /// `file` names the file in the message.
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
        let has_tenure = layout >= FIRST_WITH_TENURES;
        let text = |at: usize, len: usize, len_max: usize| {
            let len = usize::try_from(word(len)).unwrap_or(usize::MAX).min(len_max);
            bytes[at..at + len].to_vec()
        };
        let path_max = if has_tenure { PATH_BYTES_MAX } else { OLD_PATH_BYTES_MAX };
        let alias = if has_tenure { text(field::ALIAS, field::ALIAS_LEN, ALIAS_BYTES_MAX) } else { Vec::new() };
        Ok(Some(Self {
            layout,
            image: ImageFacts {
                identity: ImageId {
                    device: word(field::DEVICE),
                    inode: word(field::INODE),
                    born_ns: word(field::BORN_NS),
                },
                size_bytes: word(field::SIZE_BYTES),
                path: OsString::from_vec(text(field::PATH, field::PATH_LEN, path_max)).into(),
                alias: String::from_utf8(alias).unwrap_or_default(),
            },
            frames: word(field::FRAMES),
            reserved: match layout {
                FIRST_WITH_SAMPLES.. => word(field::FRAMES).saturating_sub(word(field::UNRESERVED)),
                _ => word(field::FRAMES),
            },
            boot: bytes[field::BOOT..field::BOOT + 16].try_into().expect("16 bytes"),
            tenure: has_tenure.then(|| TenureFacts {
                id: TenureId {
                    generation: word(field::GENERATION),
                    id: u128::from(word(field::TENURE_ID)) | u128::from(word(field::TENURE_ID + 8)) << 64,
                },
                since: word(field::SINCE),
                is_recorded: word(field::IS_RECORDED) != 0,
                is_over: word(field::IS_RECORDED) == 2,
            }),
            is_set_aside: if has_tenure {
                word(field::IS_SET_ASIDE) != 0
            } else {
                let is_free = word(field::PATH_LEN) <= (field::IS_SET_ASIDE - field::PATH) as u64;
                is_free && word(field::IS_SET_ASIDE) == SET_ASIDE
            },
            last_seen: if has_tenure { last_seen(word) } else { LastSeen::default() },
            guest: GuestState {
                data: if word(field::UNWRITTEN) == 0 { GuestData::Intact } else { GuestData::Lost },
                write_through: word(field::WRITE_THROUGH) != 0,
                formats: if layout >= FIRST_WITH_SAMPLES { word(field::GUEST_FORMATS) } else { 0 },
            },
        }))
    }
}

/// The word of a header that describes the record in the image.
pub(super) fn recorded_word(is_recorded: bool, is_over: bool) -> u64 {
    u64::from(is_recorded) + u64::from(is_recorded && is_over)
}

/// The words of a header for the image, each with its offset.
pub(super) fn image_words(image: &ImageFacts) -> Vec<(usize, u64)> {
    let ImageFacts { identity: ImageId { device, inode, born_ns }, size_bytes, path, alias } = image;
    let path = path.as_os_str().as_bytes();
    let path = &path[..path.len().min(PATH_BYTES_MAX)];
    let alias = if alias.len() <= ALIAS_BYTES_MAX { alias.as_bytes() } else { &[] };
    let mut words = vec![
        (field::DEVICE, *device),
        (field::INODE, *inode),
        (field::BORN_NS, *born_ns),
        (field::SIZE_BYTES, *size_bytes),
        (field::PATH_LEN, path.len() as u64),
        (field::ALIAS_LEN, alias.len() as u64),
    ];
    put(&mut words, field::PATH, path);
    put(&mut words, field::ALIAS, alias);
    words
}

/// The words of a header for the ID of the tenure, each with its offset.
fn tenure_words(tenure: TenureId) -> [(usize, u64); 3] {
    let bytes = tenure.id.to_le_bytes();
    let half = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    [(field::GENERATION, tenure.generation), (field::TENURE_ID, half(0)), (field::TENURE_ID + 8, half(8))]
}

/// Appends the words for `bytes`, starting at offset `at`.
fn put(words: &mut Vec<(usize, u64)>, at: usize, bytes: &[u8]) {
    for (offset, chunk) in (at..).step_by(8).zip(bytes.chunks(8)) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        words.push((offset, u64::from_le_bytes(word)));
    }
}

/// The last known state of the image, from the words of a header.
fn last_seen(word: impl Fn(usize) -> u64) -> LastSeen {
    let token = token_at(word(field::TOKEN_SLOT));
    let at = word(token + token_field::AT);
    if at == 0 {
        return LastSeen { heartbeat_ns: word(field::HEARTBEAT), ..LastSeen::default() };
    }
    LastSeen {
        token: ChangeToken::from_words(std::array::from_fn(|index| word(token + token_field::TOKEN + 8 * index))),
        is_at_rest: at == word(field::CHANGES).wrapping_add(1),
        served_bytes: word(field::SIZE_BYTES),
        heartbeat_ns: word(field::HEARTBEAT),
        changed_bytes: word(field::CHANGED_BYTES).wrapping_sub(word(token + token_field::CHANGED_BYTES)),
    }
}

/// See [`boot_id`].
static BOOT_ID: OnceLock<[u8; 16]> = OnceLock::new();

/// The host's boot ID (random(4)); zeros if the kernel does not report it.
pub(super) fn boot_id() -> [u8; 16] {
    *BOOT_ID.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        u128::from_str_radix(&digits, 16).unwrap_or(0).to_be_bytes()
    })
}

/// Sets the host's boot ID, for a process that may open no path.
pub(super) fn set_boot_id(boot: [u8; 16]) {
    // The boot ID is the same for every arena.
    let _ = BOOT_ID.set(boot);
}

/// A record as a word of the ledger; 0 for an empty record.
pub(super) fn encode_record(record: FrameRecord) -> u64 {
    debug_assert!(record.page.0 >> PAGE_BITS == 0, "Arena::persistent() rejects images of more than 2^40 pages");
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
pub(super) fn is_too_large(size_bytes: u64) -> bool {
    size_bytes.div_ceil(PAGE_SIZE as u64) >> PAGE_BITS != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let image = ImageFacts {
            identity: ImageId { device: 0xfd00, inode: 12, born_ns: 7 },
            size_bytes: 1 << 30,
            path: "/srv/a.img".into(),
            alias: "loop:/srv/a.img".to_owned(),
        };
        let id = TenureId { generation: 5, id: u128::MAX - 77 };
        Header {
            layout: LAYOUT,
            image,
            frames: 1024,
            reserved: 1000,
            boot: [3; 16],
            tenure: Some(TenureFacts { id, since: 99, is_recorded: true, is_over: false }),
            is_set_aside: false,
            last_seen: LastSeen::default(),
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
    fn an_encoded_header_decodes_to_itself() {
        let lost = GuestState { data: GuestData::Lost, ..GuestState::FRESH };
        let write_through = GuestState { write_through: true, ..GuestState::FRESH };
        let long = "/".repeat(PATH_BYTES_MAX + 1);
        let formats = GuestState { formats: 1 << 24 | 1, ..GuestState::FRESH };
        for guest in [GuestState::FRESH, lost, write_through, formats] {
            let header = Header { guest, ..header() };
            assert_eq!(Header::decode(&encode(&header), &"f").unwrap(), Some(header));
        }
        let with_path = |path: &str| ImageFacts { path: path.into(), ..header().image };
        let cut = Header { image: with_path(&long[1..]), guest: write_through, ..header() };
        let long = Header { image: with_path(&long), ..cut.clone() };
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
    fn an_older_layout_is_readable_but_does_not_fit() {
        for (layout, records_at) in [(1, 4096), (2, 8192)] {
            let image = ImageFacts { alias: String::new(), ..header().image };
            let old = Header { layout, tenure: None, image, reserved: 1024, ..header() };
            // The path of the image may be longer than in the newest layout.
            let path = "/".repeat(OLD_PATH_BYTES_MAX);
            let mut bytes = encode(&old);
            bytes[field::PATH..field::WRITE_THROUGH].copy_from_slice(path.as_bytes());
            bytes[field::PATH_LEN..field::PATH_LEN + 8].copy_from_slice(&(path.len() as u64).to_le_bytes());
            let old = Header { image: ImageFacts { path: path.into(), ..old.image.clone() }, ..old };
            assert_eq!(Header::decode(&bytes, &"f").unwrap(), Some(old.clone()));
            assert!(!old.fits(1024));
            assert_eq!(old.records_at(), records_at);
        }
        assert!(header().fits(1024) && header().fits(1023) && !header().fits(1025));
        assert_eq!(header().records_at(), 12288);
    }

    #[test]
    fn a_layout_without_samples_is_readable_but_does_not_fit() {
        let old = Header { layout: 3, reserved: 1024, ..header() };
        let mut bytes = encode(&old);
        bytes[field::GUEST_FORMATS] = 1;
        assert_eq!(Header::decode(&bytes, &"f").unwrap(), Some(old.clone()));
        assert!(!old.fits(1024));
    }

    #[test]
    fn a_layout_without_changed_ranges_is_readable_but_does_not_fit() {
        let old = Header { layout: 4, ..header() };
        assert_eq!(Header::decode(&encode(&old), &"f").unwrap(), Some(old.clone()));
        assert_eq!((old.changed_slots_at(), old.records_at(), old.fits(1024)), (None, 8192, false));
    }

    #[test]
    fn an_encoded_frame_record_decodes_to_itself() {
        let record = FrameRecord { page: PageNo((1 << 40) - 1), valid: SectorMask(0xf1), dirty: SectorMask(0x81) };
        assert_eq!(decode_record(encode_record(record)), Some(record));
        assert_eq!(encode_record(FrameRecord { valid: SectorMask::NONE, ..record }), 0);
        assert_eq!(decode_record(0), None);
    }
}
