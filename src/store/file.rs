//! A raw image: a regular file or a block device, opened and locked once, with a store for every worker.
//!
//! Opening decides everything that [`Limits`] says. Direct I/O (O_DIRECT) is used where the file system has it,
//! because a page that the host caches too is memory spent twice; where it has not, a warning says so and the host's
//! cache serves.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::thread;
use std::time::{Duration, Instant};

use super::threads::ThreadQueue;
use super::uring::UringQueue;
use super::{Backing, IoRequest, Limits, StoreQueue, blocking, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::sys;
use crate::sys::file::FallocateMode;
use crate::units::{OpKind, PAGE_BYTES, SECTOR_BYTES};

/// Largest transfer: the longest readahead window, and then some.
const IO_MAX_BYTES: u32 = 4 << 20;
/// The system's IOV_MAX: a transfer of [`IO_MAX_BYTES`] from scattered pages just fits.
const SEGMENTS_MAX: u16 = 1024;
/// No device asks for smaller transfers or fewer segments than this; what says otherwise is not believed.
const IO_BYTES_MIN: u32 = 64 << 10;
const SEGMENTS_MIN: u16 = 16;
/// Enough to keep a fast disk busy from one worker, and little enough to bound what a flush can queue up behind.
const DEPTH: u16 = 256;

/// How operations reach the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring, or threads where the host forbids it (a log line says so).
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// A pool of threads with plain system calls.
    Threads,
}

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Open for reading alone; any number of readers may share an image.
    pub read_only: bool,
    /// How operations reach the kernel.
    pub engine: IoEngine,
    /// Bypass the host's page cache where the file system can.
    pub direct: bool,
    /// How long to wait for another opener's lock to go.
    pub lock_patience: Duration,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { read_only: false, engine: IoEngine::Auto, direct: true, lock_patience: Duration::ZERO }
    }
}

/// An open raw image. The lock on it lasts as long as this value and its stores.
#[derive(Debug)]
pub struct FileImage {
    image: Arc<OpenImage>,
    engine: IoEngine,
    fell_back: Once,
}

impl FileImage {
    /// Opens and locks the image at `path`. Blocks: not for a worker's thread.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] if it is missing, neither a regular file nor a block device, empty, too large, not a
    /// multiple of 512 bytes long, or can't be opened; [`ErrorKind::Locked`] if another opener's lock excludes us. Every error names
    /// the image.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        let image = OpenImage::open(path, options)?;
        Ok(Arc::new(Self { image: Arc::new(image), engine: options.engine, fell_back: Once::new() }))
    }

    /// What the image is, whatever its name: equal for two names of one image.
    pub fn identity(&self) -> ImageId {
        self.image.identity
    }

    /// Whether transfers bypass the host's page cache.
    pub fn direct(&self) -> bool {
        self.image.direct
    }

    /// From now on a system call moves no more than `bytes`, as one may that is cut short.
    #[cfg(test)]
    pub(super) fn cut_transfers(&self, bytes: usize) {
        self.image.moved_max.store(bytes, Ordering::Relaxed);
    }

    /// Makes a range read as zeros. Blocks, and nobody else may have an operation there.
    ///
    /// # Errors
    /// The system's own.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        blocking::zero(&self.image, offset, len, false)
    }

    /// Where the image was opened.
    pub fn path(&self) -> &Path {
        &self.image.path
    }
}

impl Backing for FileImage {
    fn limits(&self) -> &Limits {
        &self.image.limits
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        let failed = |what: &str, error: io::Error| {
            Error::io(ErrorKind::System, format!("image {}: no {what}", self.image.path.display()), error)
        };
        if self.engine != IoEngine::Threads {
            match UringQueue::new(Arc::clone(&self.image)) {
                Ok(store) => return Ok(Box::new(store)),
                // ENOSYS: not in this kernel; EPERM: forbidden (seccomp, io_uring_disabled); EINVAL: too old to know
                // what we ask of it.
                Err(error)
                    if self.engine == IoEngine::Auto
                        && matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EINVAL)) =>
                {
                    self.fell_back.call_once(|| {
                        let path = self.image.path.display();
                        log::warn!("image {path}: the host refuses io_uring ({error}); using threads");
                    });
                }
                Err(error) => return Err(failed("io_uring", error)),
            }
        }
        match ThreadQueue::new(Arc::clone(&self.image)) {
            Ok(store) => Ok(Box::new(store)),
            Err(error) => Err(failed("thread pool", error)),
        }
    }
}

/// What every store of an image shares: the open file and what it can do.
#[derive(Debug)]
pub(super) struct OpenImage {
    pub(super) file: File,
    pub(super) limits: Limits,
    path: PathBuf,
    identity: ImageId,
    direct: bool,
    /// Logical block size of a block device; `None` for a regular file.
    device_block: Option<u32>,
    seen: Seen,
    /// How many bytes one system call moves at most; 0: as many as it can.
    #[cfg(test)]
    pub(super) moved_max: std::sync::atomic::AtomicUsize,
}

/// What the operator was last told of a file that others can change.
#[derive(Debug)]
struct Seen {
    size_bytes: AtomicU64,
    deleted: AtomicBool,
}

impl OpenImage {
    fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let unusable = |error| Error::io(ErrorKind::Image, format!("cannot open image {}", path.display()), error);
        // Looked at before it is opened: to open a FIFO would wait for its other end.
        check_type(path, &std::fs::metadata(path).map_err(unusable)?)?;
        let file = open_file(path, options.read_only)?;
        let metadata = file.metadata().map_err(unusable)?;
        check_type(path, &metadata)?;
        lock::acquire(&file, path, options)?;

        let geometry = BlockGeometry::of(&file, &metadata).map_err(unusable)?;
        check_size(path, geometry.size_bytes)?;
        let alignment = if options.direct { try_direct(&file, path, &geometry) } else { None };
        let (block_bytes, memory_align) = alignment.unwrap_or((SECTOR, 1));
        let writable = !options.read_only;
        let is_file = geometry.device_block.is_none();
        let first_hole = is_file.then(|| sys::file::seek_hole(&file, 0).ok()).flatten();
        let limits = Limits {
            size_bytes: geometry.size_bytes,
            block_bytes,
            memory_align,
            io_max_bytes: geometry.io_max_bytes,
            segments_max: geometry.segments_max,
            depth: DEPTH,
            discard_granularity: geometry.discard_granularity,
            physical_block_bytes: geometry.physical_block.max(block_bytes),
            optimal_io_bytes: geometry.optimal_io,
            writable,
            // Always: where the host has no command for it, zeros are written.
            can_zero: writable,
            can_discard: writable && can_discard(&file, &geometry),
            can_map: first_hole.is_some(),
            sparse: first_hole.is_some_and(|hole| hole < geometry.size_bytes),
        };
        let identity = identity_of(&file, &metadata, geometry.size_bytes);
        Ok(Self {
            file,
            limits,
            path: path.to_path_buf(),
            identity,
            direct: alignment.is_some(),
            device_block: geometry.device_block,
            seen: Seen { size_bytes: AtomicU64::new(geometry.size_bytes), deleted: AtomicBool::new(false) },
            #[cfg(test)]
            moved_max: std::sync::atomic::AtomicUsize::new(0),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_device(&self) -> bool {
        self.device_block.is_some()
    }

    /// Whether the file still reaches as far as an operation that changes it; a write beyond its end would make it grow
    /// again. What has changed since the last look is logged.
    pub(super) fn still_holds(&self, request: &IoRequest) -> bool {
        if self.is_device() || matches!(request.op, OpKind::Read | OpKind::Map) {
            return true;
        }
        // A look that fails says nothing of the operation, which will say itself what is wrong.
        let Ok(metadata) = self.file.metadata() else { return true };
        let (path, now) = (self.path.display(), metadata.len());
        let before = self.seen.size_bytes.swap(now, Ordering::Relaxed);
        let opened = self.limits.size_bytes;
        if now < before && now < opened {
            log::error!("image {path} has shrunk from {before} to {now} bytes: what lies beyond can't be written");
        } else if now != before {
            log::warn!("image {path} has now {now} bytes; it is served with {opened}, as it was opened");
        }
        if metadata.nlink() == 0 && !self.seen.deleted.swap(true, Ordering::Relaxed) {
            log::error!("image {path} was deleted: it is served, and will be gone when this daemon ends");
        }
        request.offset + request.len <= now
    }

    /// (first, end) of the whole blocks of a range that fallocate and BLKDISCARD take: all of it on a regular file,
    /// whole logical blocks on a device; `None` where there is none.
    pub(super) fn whole_blocks(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let block = u64::from(self.device_block.unwrap_or(1));
        let (first, end) = (offset.next_multiple_of(block), (offset + len) / block * block);
        (first < end).then_some((first, end))
    }
}

impl Drop for OpenImage {
    fn drop(&mut self) {
        lock::release(&self.file, &self.path);
    }
}

/// [`SECTOR_BYTES`] as block sizes are kept.
const SECTOR: u32 = 512;
/// The largest block that direct I/O may ask for: a page, the unit of caching.
const BLOCK_MAX: u32 = 4096;

/// How long a device that somebody holds is asked for again: the ring of a predecessor that has just ended lets go in
/// the background, and tools that scan devices hold them for a moment.
const BUSY_MAX: Duration = Duration::from_millis(500);

fn open_file(path: &Path, read_only: bool) -> Result<File> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(!read_only);
    let is_device = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
    if is_device && !read_only {
        // On a block device without O_CREAT: fail if it is mounted, or part of a RAID set or a volume group.
        options.custom_flags(libc::O_EXCL);
    }
    let deadline = Instant::now() + BUSY_MAX;
    loop {
        let error = match options.open(path) {
            Ok(file) => return Ok(file),
            Err(error) => error,
        };
        let busy = is_device && error.raw_os_error() == Some(libc::EBUSY);
        if busy && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
            continue;
        }
        let kind = if busy { ErrorKind::Locked } else { ErrorKind::Image };
        let how = if read_only { "for reading" } else { "for writing" };
        return Err(Error::io(kind, format!("cannot open image {} {how}", path.display()), error));
    }
}

fn check_type(path: &Path, metadata: &Metadata) -> Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let message = format!("image {} is neither a regular file nor a block device", path.display());
    Err(Error::new(ErrorKind::Image, message))
}

/// 512 PiB: a page's number has 48 bits (`cache/page.rs`), and not all of them are pages.
const SIZE_LIMIT: u64 = PAGE_BYTES << 47;

fn check_size(path: &Path, size_bytes: u64) -> Result<()> {
    let problem = if size_bytes == 0 {
        "is empty".to_owned()
    } else if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        format!("has {size_bytes} bytes, which is not a multiple of {SECTOR_BYTES}")
    } else if size_bytes >= SIZE_LIMIT {
        format!("has {size_bytes} bytes; below {SIZE_LIMIT} are possible")
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Image, format!("image {} {problem}", path.display())))
}

/// Two nodes of one block device have different inodes, but one device number.
fn identity_of(file: &File, metadata: &Metadata, size_bytes: u64) -> ImageId {
    if metadata.file_type().is_block_device() {
        return ImageId { device: metadata.rdev(), inode: sys::block::disk_sequence(file), born_ns: 0, size_bytes };
    }
    ImageId { device: metadata.dev(), inode: metadata.ino(), born_ns: sys::file::birth_ns(file), size_bytes }
}

/// What the host says of the image.
#[derive(Debug)]
struct BlockGeometry {
    size_bytes: u64,
    device_block: Option<u32>,
    physical_block: u32,
    optimal_io: u32,
    discard_granularity: u32,
    io_max_bytes: u32,
    segments_max: u16,
}

impl BlockGeometry {
    fn of(file: &File, metadata: &Metadata) -> io::Result<Self> {
        let is_device = metadata.file_type().is_block_device();
        let (io_max_bytes, segments_max) = one_piece(if is_device { metadata.rdev() } else { metadata.dev() });
        if is_device {
            let sizes = sys::block::block_sizes(file)?;
            return Ok(Self {
                size_bytes: sys::block::size_bytes(file)?,
                device_block: Some(sizes.logical.max(SECTOR)),
                physical_block: sizes.physical,
                optimal_io: sizes.optimal_io,
                discard_granularity: queue_attribute(metadata.rdev(), "discard_granularity").unwrap_or(0),
                io_max_bytes,
                segments_max,
            });
        }
        Ok(Self {
            size_bytes: metadata.len(),
            device_block: None,
            physical_block: queue_attribute(metadata.dev(), "physical_block_size").unwrap_or(SECTOR),
            optimal_io: 0,
            // A file's space comes and goes in blocks of its file system.
            discard_granularity: u32::try_from(metadata.blksize()).unwrap_or(0),
            io_max_bytes,
            segments_max,
        })
    }
}

/// The largest transfer, in bytes and in segments, that the device under an image takes in one piece. The kernel would cut
/// a larger one up, but not while it may not wait: io_uring then hands it to a thread that may, which costs more than the
/// transfer does.
fn one_piece(device: u64) -> (u32, u16) {
    let bytes = queue_attribute(device, "max_sectors_kb").map_or(IO_MAX_BYTES, |kib| kib.saturating_mul(1024));
    let segments =
        queue_attribute(device, "max_segments").map_or(SEGMENTS_MAX, |n| u16::try_from(n).unwrap_or(u16::MAX));
    let bytes = bytes.clamp(IO_BYTES_MIN, IO_MAX_BYTES);
    (bytes - bytes % BLOCK_MAX, segments.clamp(SEGMENTS_MIN, SEGMENTS_MAX))
}

/// A number from a block device's queue directory in sysfs; a partition has its disk's. `None` for a file system
/// without a block device of its own, or a number that does not fit.
fn queue_attribute(device: u64, name: &str) -> Option<u32> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    ["queue", "../queue"].iter().find_map(|queue| {
        let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{queue}/{name}")).ok()?;
        text.trim().parse().ok()
    })
}

fn can_discard(file: &File, geometry: &BlockGeometry) -> bool {
    if geometry.device_block.is_some() {
        return geometry.discard_granularity > 0;
    }
    // Beyond the end there is nothing to lose.
    let beyond = geometry.size_bytes.next_multiple_of(PAGE_BYTES);
    match sys::file::fallocate(file, FallocateMode::PunchHole, beyond, PAGE_BYTES) {
        Ok(()) => true,
        Err(error) => !sys::is_unsupported(sys::errno_of(&error)),
    }
}

/// Switches direct I/O on; returns (block, memory) alignment, or `None` after saying why not.
fn try_direct(file: &File, path: &Path, geometry: &BlockGeometry) -> Option<(u32, u32)> {
    match switch_direct(file, geometry) {
        Ok(alignment) => Some(alignment),
        Err(reason) => {
            if let Err(error) = sys::file::set_direct(file, false) {
                log::debug!("image {}: O_DIRECT was not on ({error})", path.display());
            }
            let path = path.display();
            log::warn!("image {path}: no direct I/O ({reason}); the host's page cache holds its data a second time");
            None
        }
    }
}

fn switch_direct(file: &File, geometry: &BlockGeometry) -> std::result::Result<(u32, u32), String> {
    sys::file::set_direct(file, true).map_err(|e| format!("its file system refuses it: {e}"))?;
    let candidates = match sys::file::direct_alignment(file) {
        Some(alignment) if alignment.offset == 0 => return Err("its file system has none for this file".to_owned()),
        Some(alignment) => vec![(alignment.offset.max(SECTOR), alignment.memory)],
        // The kernel does not tell: try what devices use.
        None => vec![(geometry.device_block.unwrap_or(SECTOR), 1), (BLOCK_MAX, 1)],
    };
    let mut reason = String::new();
    for (block, memory) in candidates {
        let memory = memory.max(block);
        if !block.is_power_of_two() || !memory.is_power_of_two() || memory > BLOCK_MAX {
            reason = format!("it wants blocks of {block} and memory aligned to {memory} bytes");
        } else if !geometry.size_bytes.is_multiple_of(u64::from(block)) {
            reason = format!("its size is not a multiple of its {block}-byte blocks");
        } else if let Err(error) = probe_read(file, block) {
            reason = format!("a read of {block} bytes failed: {error}");
        } else {
            return Ok((block, memory));
        }
    }
    Err(reason)
}

/// Reads the first block as a transfer would.
fn probe_read(file: &File, block: u32) -> io::Result<()> {
    #[repr(align(4096))]
    struct Block([u8; BLOCK_MAX as usize]);
    let mut memory = Block([0; BLOCK_MAX as usize]);
    file.read_exact_at(&mut memory.0[..block as usize], 0)
}
