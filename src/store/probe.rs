//! The properties of a file or block device, determined when an image is opened: sizes, limits of a transfer, discard,
//! direct I/O.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::str::FromStr;

use crate::sys;
use crate::sys::file::FallocateMode;
use crate::sys::file_system::FileSystem;
use crate::units::PAGE_BYTES;

/// Largest transfer: more than the longest readahead window.
const IO_MAX_BYTES: u32 = 4 << 20;
/// IOV_MAX of Linux: just enough for a transfer of [`IO_MAX_BYTES`] from scattered pages.
const SEGMENTS_MAX: u16 = 1024;
/// No real device has smaller limits than these; a lower value in sysfs is ignored.
const IO_BYTES_MIN: u32 = 64 << 10;
const SEGMENTS_MIN: u16 = 16;

/// [`crate::units::SECTOR_BYTES`] in the type of block sizes.
const SECTOR: u32 = 512;
/// The largest block that direct I/O may require: a page, the unit of caching.
const BLOCK_MAX: u32 = 4096;

/// Sizes and transfer limits of an image, as the host reports them.
#[derive(Debug)]
pub(super) struct BlockGeometry {
    /// Size of the image in bytes.
    pub(super) size_bytes: u64,
    /// Logical block size of a block device in bytes; `None` for a regular file.
    pub(super) device_block: Option<u32>,
    /// Physical block size in bytes, of the device itself or of the one below the file.
    pub(super) physical_block: u32,
    /// Preferred I/O size in bytes; 0 if unknown.
    pub(super) optimal_io: u32,
    /// Smallest unit that a discard frees, in bytes; 0 if unknown, or if a device has no discard.
    pub(super) discard_granularity: u32,
    /// Most bytes of a discard; `u64::MAX` for a regular file.
    pub(super) discard_max_bytes: u64,
    /// Largest transfer in bytes.
    pub(super) io_max_bytes: u32,
    /// Most segments of a transfer.
    pub(super) segments_max: u16,
}

impl BlockGeometry {
    /// Queries the kernel.
    pub(super) fn of(file: &File, metadata: &Metadata) -> io::Result<Self> {
        let is_device = metadata.file_type().is_block_device();
        let (io_max_bytes, segments_max) = transfer_limits(if is_device { metadata.rdev() } else { metadata.dev() });
        if is_device {
            let sizes = sys::block::block_sizes(file)?;
            return Ok(Self {
                size_bytes: sys::block::size_bytes(file)?,
                device_block: Some(sizes.logical.max(SECTOR)),
                physical_block: sizes.physical,
                optimal_io: sizes.optimal_io,
                discard_granularity: queue_attribute(metadata.rdev(), "discard_granularity").unwrap_or(0),
                discard_max_bytes: queue_attribute(metadata.rdev(), "discard_max_bytes").unwrap_or(0),
                io_max_bytes,
                segments_max,
            });
        }
        Ok(Self {
            size_bytes: metadata.len(),
            device_block: None,
            physical_block: queue_attribute(metadata.dev(), "physical_block_size").unwrap_or(SECTOR),
            optimal_io: 0,
            // A file system allocates and frees a file's space in its blocks.
            discard_granularity: u32::try_from(metadata.blksize()).unwrap_or(0),
            discard_max_bytes: u64::MAX,
            io_max_bytes,
            segments_max,
        })
    }
}

/// The largest transfer, as (bytes, segments), that block device number `device` takes in one piece. The kernel would
/// split a larger one, but not in a submission that must not block: io_uring then passes it to a kernel thread, which
/// costs more than the transfer itself.
fn transfer_limits(device: u64) -> (u32, u16) {
    let bytes = queue_attribute(device, "max_sectors_kb").map_or(IO_MAX_BYTES, |kib: u32| kib.saturating_mul(1024));
    let segments =
        queue_attribute(device, "max_segments").map_or(SEGMENTS_MAX, |n: u32| u16::try_from(n).unwrap_or(u16::MAX));
    let bytes = bytes.clamp(IO_BYTES_MIN, IO_MAX_BYTES);
    (bytes - bytes % BLOCK_MAX, segments.clamp(SEGMENTS_MIN, SEGMENTS_MAX))
}

/// A number from a block device's queue directory in sysfs; for a partition, from its disk's. `None` if the file system
/// has no block device of its own, or if the number does not fit.
fn queue_attribute<T: FromStr>(device: u64, name: &str) -> Option<T> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    ["queue", "../queue"].iter().find_map(|queue| {
        let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{queue}/{name}")).ok()?;
        text.trim().parse().ok()
    })
}

/// Whether a range of the image can be discarded.
///
/// => On an unknown file system, the test changes the file's change time, but no other time: the next daemon compares
///    times with those that this one has recorded.
pub(super) fn can_discard(file: &File, geometry: &BlockGeometry) -> bool {
    if geometry.device_block.is_some() {
        // The second one is 0 if the administrator has disabled discards.
        return geometry.discard_granularity > 0 && geometry.discard_max_bytes > 0;
    }
    if FileSystem::of(file).is_ok_and(|file_system| file_system.punches_holes()) {
        return true;
    }
    let modified = file.metadata().and_then(|metadata| metadata.modified());
    // Punching a hole beyond the end of the file changes none of its bytes.
    let beyond = geometry.size_bytes.next_multiple_of(PAGE_BYTES);
    let can_discard = match sys::file::fallocate(file, FallocateMode::PunchHole, beyond, PAGE_BYTES) {
        Ok(()) => true,
        Err(error) => !sys::is_unsupported(sys::errno_of(&error)),
    };
    if let Ok(modified) = modified
        && let Err(error) = file.set_modified(modified)
    {
        log::debug!("cannot restore an image's modification time: {error}");
    }
    can_discard
}

/// Alignment of transfers in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Alignment of offsets and lengths on the image.
    pub(super) block: u32,
    /// Alignment of memory addresses and segment lengths.
    pub(super) memory: u32,
}

impl Alignment {
    /// For I/O through the host's page cache, which accepts any memory. The block is a sector, the unit of requests.
    pub(super) const BUFFERED: Self = Self { block: SECTOR, memory: 1 };
}

/// Enables direct I/O; returns its alignment, or `None` after a warning that begins with `label` and gives the reason.
pub(super) fn try_direct(file: &File, label: &str, geometry: &BlockGeometry) -> Option<Alignment> {
    match enable_direct(file, geometry) {
        Ok(alignment) => Some(alignment),
        Err(reason) => {
            if let Err(error) = sys::file::set_direct(file, false) {
                log::debug!("{label}: cannot clear O_DIRECT: {error}");
            }
            log::warn!("{label}: no direct I/O ({reason}); the host's page cache keeps a second copy of its data");
            None
        }
    }
}

/// Sets O_DIRECT and reads the first block with it. The error is the reason for the log.
fn enable_direct(file: &File, geometry: &BlockGeometry) -> Result<Alignment, String> {
    sys::file::set_direct(file, true).map_err(|e| format!("cannot set O_DIRECT: {e}"))?;
    let candidates = match sys::file::direct_alignment(file) {
        Some(reported) if reported.offset == 0 => {
            return Err("the file system does not support it for this file".to_owned());
        }
        Some(reported) => vec![Alignment { block: reported.offset.max(SECTOR), memory: reported.memory }],
        // The kernel does not report it: try the usual values of devices.
        None => {
            [geometry.device_block.unwrap_or(SECTOR), BLOCK_MAX].map(|block| Alignment { block, memory: 1 }).to_vec()
        }
    };
    let mut reason = String::new();
    for candidate in candidates {
        match supported(candidate, geometry.size_bytes) {
            Err(obstacle) => reason = obstacle,
            Ok(alignment) => match probe_read(file, alignment.block) {
                Ok(()) => return Ok(alignment),
                Err(error) => reason = format!("a read of {} bytes failed: {error}", alignment.block),
            },
        }
    }
    Err(reason)
}

/// The alignment of genblk's transfers to an image of `size_bytes` bytes that requires `reported`. The error names the
/// requirement that genblk cannot meet.
fn supported(reported: Alignment, size_bytes: u64) -> Result<Alignment, String> {
    let Alignment { block, memory } = Alignment { memory: reported.memory.max(reported.block), ..reported };
    if !block.is_power_of_two() || !memory.is_power_of_two() || memory > BLOCK_MAX {
        return Err(format!(
            "it requires blocks of {block} bytes and memory aligned to {memory} bytes; genblk supports powers \
             of two up to {BLOCK_MAX}"
        ));
    }
    if !size_bytes.is_multiple_of(u64::from(block)) {
        return Err(format!("the image's size is not a multiple of the {block}-byte blocks that it needs"));
    }
    Ok(Alignment { block, memory })
}

/// Reads the first block in the same way as a transfer.
fn probe_read(file: &File, block: u32) -> io::Result<()> {
    #[repr(align(4096))]
    struct AlignedBlock([u8; BLOCK_MAX as usize]);
    let mut memory = AlignedBlock([0; BLOCK_MAX as usize]);
    file.read_exact_at(&mut memory.0[..block as usize], 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_alignment_may_exceed_the_block_size_but_not_a_page() {
        let supported = |block, memory| supported(Alignment { block, memory }, 8192 + 512);
        assert_eq!(supported(512, 4), Ok(Alignment { block: 512, memory: 512 }));
        assert_eq!(supported(512, 4096), Ok(Alignment { block: 512, memory: 4096 }));
        let obstacle = supported(512, 8192).unwrap_err();
        assert!(
            obstacle.starts_with("it requires blocks of 512 bytes and memory aligned to 8192 bytes;"),
            "{obstacle}"
        );
        assert!(supported(8192, 8192).is_err() && supported(513, 4096).is_err() && supported(512, 1000).is_err());
        assert!(supported(4096, 4096).is_err(), "the last block would be cut off");
    }
}
