//! Files that another user, or an older genblk, may have written: caches and configurations. And the limits of a store.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::OnceLock;

use super::input::Input;
use crate::arena::{AllowedOwner, Arena, ArenaFile};
use crate::config::{CacheMode, Config};
use crate::image_id::ImageId;
use crate::store::{IoRequest, Limits, Segment};
use crate::units::{ImageHoles, OpKind, PAGE_SIZE, SECTOR_BYTES, Unmap, Urgency};

/// Length of a header, and where its fields are in every layout: `arena/ledger.rs`.
const HEADER_BYTES: usize = 4096;
const MAGIC: (usize, u64) = (0, u64::from_le_bytes(*b"genblk\0L"));
const LAYOUT: usize = 8;
const PAGE_SIZE_AT: usize = 16;
const FRAMES: usize = 24;
const SIZE_BYTES: usize = 56;
const BOOT: usize = 64;

/// A cache file: whatever its bytes, it is refused, or all that it refers to exists.
///
/// Input: layout, frames, pages of the image; changes of the header (offset, value) up to one at 0xffff; length of the
/// file; then the words of tables and records.
pub(super) fn ledger_decode(input: &[u8]) {
    let mut input = Input::new(input);
    let layout = input.pick(&[3u64, 2, 1, 4, 5, u64::MAX]);
    let frames = input.below(9);
    let image_bytes = u64::from(input.u16()) * SECTOR_BYTES;
    let tables = PAGE_SIZE * if layout == 1 { 1 } else { 2 + usize::from(layout == 5) };
    let mut bytes = vec![0; HEADER_BYTES + tables + frames * PAGE_SIZE];
    let put = |bytes: &mut [u8], at: usize, word: u64| bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    put(&mut bytes, MAGIC.0, MAGIC.1);
    put(&mut bytes, LAYOUT, layout);
    put(&mut bytes, PAGE_SIZE_AT, PAGE_SIZE as u64);
    put(&mut bytes, FRAMES, frames as u64);
    put(&mut bytes, SIZE_BYTES, image_bytes);
    bytes[BOOT..BOOT + 16].copy_from_slice(&boot_id());
    loop {
        let at = usize::from(input.u16());
        if at + 8 > HEADER_BYTES || input.is_empty() {
            break;
        }
        put(&mut bytes, at, input.u64());
    }
    let len = if input.u8() == 1 { usize::from(input.u16()) } else { bytes.len() };
    // Half of the words are records, the others slots for zeroed ranges.
    let mut at = HEADER_BYTES;
    while !input.is_empty() && at + PAGE_SIZE + 8 <= bytes.len() {
        put(&mut bytes, at, input.u64());
        put(&mut bytes, at + PAGE_SIZE, input.u64());
        at += 8;
    }
    bytes.truncate(len);
    let path = cache_path();
    fs::write(&path, &bytes).expect("a file in shared memory");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("our own file");
    let file = ArenaFile::open_existing(&path, AllowedOwner::Own).expect("nobody else uses it");
    let survey = file.survey();
    if let Ok(Some(survey)) = &survey {
        assert!(survey.dirty_pages <= survey.pages && survey.pages <= survey.header.frames, "{survey:?}");
    }
    let Ok(Some(header)) = file.header() else { return };
    // As recovery does, which attaches only to what holds pages.
    if header.frames == 0 {
        return;
    }
    let Ok(arena) = Arena::attach(file, &header) else { return };
    let pages = header.image.size_bytes.div_ceil(PAGE_SIZE as u64);
    for (_, record) in arena.records() {
        assert!(record.page.0 < pages, "{record:?} of an image of {pages} pages");
    }
    for (_, span) in arena.pending_zeroes() {
        assert!(span.end() <= header.image.size_bytes / SECTOR_BYTES, "{span:?} of an image of {pages} pages");
    }
    for (_, span) in arena.changed_ranges() {
        assert!(span.start.checked_add(span.count).is_some(), "{span:?} has no end");
    }
    if let Ok(Some(survey)) = survey {
        assert_eq!(survey.pages, arena.records().count() as u64);
    }
}

/// Where the cache file is: named as one is, in a directory of this process.
fn cache_path() -> PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        let path = PathBuf::from(format!("/dev/shm/genblk-fuzz-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).recursive(true).create(&path).expect("a directory in shared memory");
        path
    });
    directory.join(ImageId { device: 1, inode: 2, born_ns: 3 }.file_name(4096, 0))
}

/// Removes what the targets left in shared memory.
#[cfg(test)]
pub(super) fn clean_up() {
    let path = cache_path();
    // It may not exist.
    let _ = fs::remove_dir_all(path.parent().expect("it is in a directory"));
}

/// The boot ID as a header has it.
fn boot_id() -> [u8; 16] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("Linux has one");
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let mut id = [0; 16];
    for (at, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).expect("hexadecimal digits");
    }
    id
}

/// A configuration: each problem names a line, and one that is accepted has every value in its range.
pub(super) fn config(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    match Config::from_toml(text) {
        Err(problems) => {
            assert!(!problems.is_empty(), "refused without a reason");
            // An error at the end of a text that ends with a line feed is in the line after it.
            let lines = text.lines().count() + 1;
            for problem in &problems {
                let line = problem.line.unwrap_or(1);
                assert!(line <= lines, "line {line} of {lines}: {problem:?}");
            }
        }
        Ok(config) => {
            assert!(!config.devices.is_empty());
            for device in &config.devices {
                assert!((1..=256).contains(&device.num_queues), "{device:?}");
                assert!((1..=device.num_queues.min(8)).contains(&device.workers), "{device:?}");
                assert!(device.queue_size.is_power_of_two() && device.queue_size <= 32768, "{device:?}");
                assert!(device.serial.len() <= 20 && device.serial.is_ascii(), "{device:?}");
                assert!(device.socket_mode <= 0o777, "{device:?}");
                assert!(device.cache.dirty_max_percent <= 100, "{device:?}");
                let has_cache = device.cache.mode != CacheMode::None;
                assert!(!has_cache || device.cache.size_bytes >= PAGE_SIZE as u64, "{device:?}");
                let same_name = config.devices.iter().filter(|other| other.name == device.name);
                assert_eq!(same_name.count(), 1, "two devices have the name {}", device.name);
            }
        }
    }
}

/// Whether a request is within the limits: as in whole numbers that cannot overflow.
pub(super) fn store_limits(input: &[u8]) {
    let mut input = Input::new(input);
    let block_bytes = input.pick(&[512, 4096, 1024]);
    let memory_align = input.pick(&[512, 4, 4096]);
    let size_bytes = input.pick(&[1u64 << 20, 512, 4608, u64::MAX / 512 * 512]);
    let limits = Limits {
        size_bytes: size_bytes.into(),
        block_bytes,
        memory_align,
        io_max_bytes: input.pick(&[1 << 20, 4096, u32::MAX]),
        segments_max: input.pick(&[256, 1, 2]),
        depth: 1,
        discard_granularity: 0,
        discard_max_bytes: u64::MAX,
        physical_block_bytes: block_bytes,
        optimal_io_bytes: 0,
        writable: input.u8() != 1,
        can_zero: true,
        can_discard: true,
        holes: ImageHoles::Possible,
    };
    let unmap = Unmap::Allowed;
    let ops = [OpKind::Read, OpKind::Write, OpKind::Sync, OpKind::Map, OpKind::Discard, OpKind::Allocate];
    let op = input.pick(&[&ops[..], &[OpKind::Zero { unmap }]].concat());
    let mut number = |choices: &[u64]| if input.u8() < 200 { input.pick(choices) } else { input.u64() };
    let offset = number(&[0, 512, 4096, size_bytes, size_bytes - 512, 1, u64::MAX]);
    let len = number(&[0, 512, 4096, 8192, size_bytes, 1 << 20, 100, u64::MAX]);
    let mut segments = Vec::new();
    for _ in 0..input.below(5) {
        let base = std::ptr::without_provenance_mut(input.pick(&[0x10000usize, 0x10200, 0x10004, 0x10001]));
        segments.push(Segment { base, len: input.pick(&[4096usize, 512, 8192, 0, 100]) });
    }
    let expected = is_within(&limits, op, offset, len, &segments);
    let request = IoRequest { tag: 0, op, offset, len, urgency: Urgency::Demand, segments };
    assert_eq!(limits.admissible(&request), expected, "{request:?} within {limits:?}");
    // Any limits may be checked.
    let _ = limits.check();
}

/// The model of [`Limits::admissible`].
fn is_within(limits: &Limits, op: OpKind, offset: u64, len: u64, segments: &[Segment]) -> bool {
    let (start, bytes, size) = (u128::from(offset), u128::from(len), u128::from(limits.size_bytes.get()));
    let end = start + bytes;
    let is_multiple = |number: u128, unit: u32| number.is_multiple_of(u128::from(unit));
    let at_end = end == size;
    if end > size {
        return false;
    }
    match op {
        OpKind::Sync => bytes == 0 && segments.is_empty(),
        OpKind::Map => bytes > 0 && segments.is_empty(),
        OpKind::Zero { .. } | OpKind::Discard | OpKind::Allocate => {
            let sectors = u32::try_from(SECTOR_BYTES).expect("it is 512");
            let whole = is_multiple(start, sectors) && is_multiple(bytes, sectors);
            limits.writable && bytes > 0 && whole && segments.is_empty()
        }
        OpKind::Read | OpKind::Write => {
            let whole = is_multiple(start, limits.block_bytes) && (is_multiple(end, limits.block_bytes) || at_end);
            let aligned = segments.iter().all(|segment| {
                let (address, len) = (segment.base.addr() as u128, segment.len as u128);
                is_multiple(address, limits.memory_align) && (is_multiple(len, limits.memory_align) || at_end)
            });
            (op == OpKind::Read || limits.writable)
                && (1..=u128::from(limits.io_max_bytes)).contains(&bytes)
                && whole
                && aligned
                && segments.len() <= usize::from(limits.segments_max)
                && segments.iter().map(|segment| segment.len as u128).sum::<u128>() == bytes
        }
    }
}
