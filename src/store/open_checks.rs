//! What an image must be to be opened: its type, its size, and who else may have it open.

use std::fs::{File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::format::Format;
use super::history::{self, LastTenure};
use super::lock::{self, LockMode};
use super::probe::BlockGeometry;
use super::raw_record::FormatRecord;
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::sys;
use crate::tenure::record::Record;
use crate::tenure::token::ChangeToken;
use crate::units::{PAGE_BYTES, SECTOR_BYTES};

/// Images have fewer bytes than this (512 PiB): a page number has 48 bits (`cache/pages/page.rs`), and not every value
/// is a page.
const SIZE_LIMIT: u64 = PAGE_BYTES << 47;

/// How long to retry opening a device that is in use: the kernel releases a ring of a daemon that has just ended in the
/// background, and tools that scan devices open them briefly.
const BUSY_TIMEOUT: Duration = Duration::from_millis(500);
/// How long to watch an image that another process has open for writing, and how often to check it.
const COPY_TIMEOUT: Duration = Duration::from_millis(300);
const COPY_PAUSE: Duration = Duration::from_millis(20);
/// The name of this program's processes: a process that has just ended may still be closing the image.
const OWN_NAME: &str = "genblk";
/// Pause between two such attempts.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// Opens the image, and retries for a moment if another process is just about to close it.
pub(super) fn open_file(path: &Path, access: LockMode) -> Result<File> {
    let writable = access == LockMode::ReadWrite;
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(writable);
    let is_device = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
    if is_device && writable {
        // O_EXCL without O_CREAT, on a block device: fail if it is mounted, or part of a RAID set or a volume group.
        options.custom_flags(libc::O_EXCL);
    }
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        let error = match options.open(path) {
            Ok(file) if is_device && writable => return refuse_read_only_device(path, &file).map(|()| file),
            Ok(file) => return Ok(file),
            Err(error) => error,
        };
        let busy = is_device && error.raw_os_error() == Some(libc::EBUSY);
        if busy && Instant::now() < deadline {
            thread::sleep(BUSY_PAUSE);
            continue;
        }
        if is_device && writable && !busy {
            // Some drivers fail the open of a read-only device, others only its writes.
            File::open(path).map_or(Ok(()), |file| refuse_read_only_device(path, &file))?;
        }
        let kind = if busy { ErrorKind::Locked } else { ErrorKind::Image };
        let purpose = if writable { "for writing" } else { "for reading" };
        let hint = match error.raw_os_error() {
            Some(libc::EROFS) => " (its file system is mounted read-only; read_only = true serves it so)",
            Some(libc::EBUSY) => " (it is mounted, or part of a RAID set or a volume group, or another process has it)",
            _ => "",
        };
        return Err(Error::io(kind, format!("cannot open image {} {purpose}{hint}", path.display()), error));
    }
}

/// Whether a process has the image, a regular file, open for writing.
pub(super) fn has_writer(path: &Path) -> bool {
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    file.is_ok_and(|file| file.metadata().is_ok_and(|m| m.is_file()) && sys::file::is_open_for_writing(&file))
}

/// Fails if another process is writing the image: a copy may be in progress, and an incomplete image must not be
/// served. A process that merely has it open is logged.
///
/// => The image is locked, so that process ignores image locks.
pub(super) fn refuse_copy_under_way(file: &File, path: &Path, label: &str) -> Result<()> {
    let state = || file.metadata().ok().map(|m| (m.len(), m.blocks(), m.mtime(), m.mtime_nsec()));
    let before = state();
    let Some((pid, name)) = sys::process::other_process_with(file).filter(|(_, name)| name != OWN_NAME) else {
        return Ok(());
    };
    let until = Instant::now() + COPY_TIMEOUT;
    while Instant::now() < until {
        thread::sleep(COPY_PAUSE);
        if state() != before {
            let shown = path.display();
            let context = format!("image {shown} is being written by pid {pid} ({name})");
            let hint = "wait until that has ended: a copy may be under way";
            return Err(Error::new(ErrorKind::Locked, format!("{context}; {hint}")));
        }
    }
    log::warn!("{label}: pid {pid} ({name}) has it open; that process ignores image locks and can corrupt the image");
    Ok(())
}

/// Fails for a device that is set to read-only: it could be opened for writing, but no write would reach it.
fn refuse_read_only_device(path: &Path, file: &File) -> Result<()> {
    // A failure of the ioctl does not mean that writes fail.
    if !sys::block::is_read_only(file).unwrap_or(false) {
        return Ok(());
    }
    let shown = path.display();
    let remedy = format!("make it writable (\"blockdev --setrw {shown}\"), or set read_only = true (--read-only)");
    Err(Error::new(ErrorKind::Image, format!("image {shown} is a read-only block device: {remedy}")))
}

/// Fails for anything but a regular file or a block device.
pub(super) fn check_type(path: &Path, metadata: &Metadata) -> Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let message = format!("image {} is neither a regular file nor a block device", path.display());
    Err(Error::new(ErrorKind::Image, message))
}

/// Fails for a size that no image can have.
pub(super) fn check_size(path: &Path, size_bytes: u64) -> Result<()> {
    let problem = if size_bytes == 0 {
        "is empty".to_owned()
    } else if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        format!("has {size_bytes} bytes, which is not a multiple of {SECTOR_BYTES}")
    } else if size_bytes >= SIZE_LIMIT {
        format!("has {size_bytes} bytes; the size must be below {SIZE_LIMIT}")
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Image, format!("image {} {problem}", path.display())))
}

/// The properties of an image, determined without locking it.
#[derive(Debug)]
pub struct Inspection {
    /// Whether another process has the image open in a way that excludes this access.
    pub is_in_use: bool,
    /// The identity of the image.
    pub identity: ImageId,
    /// The format that the image appears to have instead of raw, and the error with which it is rejected if nothing
    /// shows that it is raw.
    pub format_refusal: Option<(Format, Error)>,
}

/// The file behind a loop device with its path, and the access to it by one that accesses the device.
pub(super) fn file_behind(device: &File, access: LockMode) -> Option<(File, PathBuf, LockMode)> {
    let number = device.metadata().ok().filter(|found| found.file_type().is_block_device())?.rdev();
    let on = sys::block::loop_file(device)?;
    let (file, path) = history::file_behind(number, on)?;
    let is_whole = (on.offset, on.size_limit) == (0, 0) && !history::is_partition(number);
    Some((file, path, if is_whole { access } else { access.to_part() }))
}

/// Opens the image at `path` like a daemon, and closes it again; see [`super::file::inspect`].
pub(super) fn inspect(path: &Path, read_only: bool) -> Result<Inspection> {
    let unusable = |error| Error::io(ErrorKind::Image, format!("cannot open image {}", path.display()), error);
    let access = if read_only { LockMode::ReadOnly } else { LockMode::ReadWrite };
    check_type(path, &std::fs::metadata(path).map_err(unusable)?)?;
    let (file, is_busy) = match open_file(path, access) {
        // A block device that is in use: by a daemon if it has locks, otherwise by a file system.
        Err(error) if error.kind() == ErrorKind::Locked => {
            let file = File::open(path).map_err(unusable)?;
            if !lock::is_in_use(&file, access) {
                return Err(error);
            }
            (file, true)
        }
        result => (result?, false),
    };
    let metadata = file.metadata().map_err(unusable)?;
    check_type(path, &metadata)?;
    let geometry = BlockGeometry::of(&file, &metadata).map_err(unusable)?;
    let format = FormatRecord::of(&file, geometry.size_bytes).map_err(unusable)?;
    check_size(path, geometry.size_bytes).map_err(|error| format.refusal(path).unwrap_or(error))?;
    let found = format.found().map(|found| found.format);
    let is_luks_device = geometry.device_block.is_some() && found == Some(Format::Luks);
    let is_used_behind = || file_behind(&file, access).is_some_and(|(file, _, access)| lock::is_in_use(&file, access));
    Ok(Inspection {
        is_in_use: is_busy || lock::is_in_use(&file, access) || is_used_behind(),
        identity: identity_of(&file, &metadata),
        format_refusal: if is_luks_device { None } else { found.zip(format.refusal(path)) },
    })
}

/// The identity and the change token of the image at `path`; see [`super::file::identity_and_token`].
pub(super) fn identity_and_token(path: &Path) -> std::io::Result<(ImageId, ChangeToken)> {
    // O_PATH does not really open it: the file may be a FIFO, or a device whose driver reacts to each open.
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() {
        let (disk_sequence, token) = history::read_device_token(metadata.rdev());
        return Ok((ImageId { device: metadata.rdev(), inode: disk_sequence, born_ns: 0 }, token));
    }
    let identity = ImageId { device: metadata.dev(), inode: metadata.ino(), born_ns: sys::file::birth_ns(&file) };
    Ok((identity, history::token_of_file(&metadata)))
}

/// The record of the last tenure of the image at `path`; see [`super::file::recorded_tenure`].
pub(super) fn recorded_tenure(path: &Path) -> Option<Record> {
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    // fgetxattr(2) does not accept a descriptor with O_PATH.
    match history::last_tenure(&File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?) {
        Ok(LastTenure::Recorded(record)) => Some(record),
        _ => None,
    }
}

/// Two nodes of one block device have different inodes, but one device number.
pub(super) fn identity_of(file: &File, metadata: &Metadata) -> ImageId {
    if metadata.file_type().is_block_device() {
        return ImageId { device: metadata.rdev(), inode: sys::block::disk_sequence(file), born_ns: 0 };
    }
    ImageId { device: metadata.dev(), inode: metadata.ino(), born_ns: sys::file::birth_ns(file) }
}
