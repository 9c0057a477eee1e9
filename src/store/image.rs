//! An open image: the file, locked, with its limits. All queues of an image share one.
//!
//! Opening determines every field of [`Limits`]. The image is opened for direct I/O (O_DIRECT) if its file system
//! supports that, because a page that the host also caches takes memory twice. Otherwise a warning is logged, and I/O
//! goes through the host's page cache.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use log::warn;

use super::format::HEAD_BYTES;
use super::handed::{FileParts, IoLock};
use super::history;
use super::lock::{self, LockMode};
use super::open_checks::{
    check_size, check_type, file_behind, has_writer, identity_of, open_file, refuse_copy_under_way,
};
use super::options::{IoEngine, OpenOptions};
use super::probe::{Alignment, BlockGeometry, can_discard, try_direct};
use super::raw_record::{FormatRecord, Known};
use super::{IoRequest, Limits, Segment};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::sys;
use crate::sys::file_system::FileSystem;
use crate::tenure::token::ChangeToken;
use crate::units::{ImageHoles, OpKind, PAGE_BYTES};

/// Most operations in flight per queue: enough to keep a fast disk busy from one worker, and few enough to bound how
/// long a flush waits.
const DEPTH: u16 = 256;

/// Most runs of data that are searched for when an image is opened ...
const RUNS_MAX: usize = 64;
/// ... and the longest time for that.
const RUNS_TIMEOUT: Duration = Duration::from_millis(200);

/// An open, locked image. The lock ends when this is dropped.
#[derive(Debug)]
pub(super) struct OpenImage {
    pub(super) file: File,
    pub(super) limits: Limits,
    path: PathBuf,
    /// The device, if the image was opened for one, and the image; the prefix of log lines.
    label: String,
    identity: ImageId,
    /// See [`super::Backing::data_runs`].
    pub(super) data_runs: Vec<Range<u64>>,
    direct: bool,
    /// Logical block size of a block device in bytes; `None` for a regular file.
    device_block: Option<u32>,
    format: FormatRecord,
    /// The number of a block device; `None` for a regular file.
    device_number: Option<u64>,
    /// The file behind a loop device, with the lock of that image.
    pub(super) file_behind: Option<File>,
    found_token: ChangeToken,
    /// See [`OpenImage::is_on_local_fs`].
    is_on_local_fs: bool,
    /// Whether this process opened the image by its path, and may read its attributes from the host.
    is_opened_here: bool,
    reported: Reported,
    #[cfg(test)]
    test_limits: TestLimits,
}

/// Restrictions that tests put on an image's operations.
#[cfg(test)]
#[derive(Debug, Default)]
struct TestLimits {
    /// Most bytes that one system call moves; 0: no limit.
    transfer_max: std::sync::atomic::AtomicUsize,
    /// Minimum time of a write of a thread, in milliseconds.
    write_ms: AtomicU64,
    /// This many submissions to io_uring fail.
    refused_submissions: AtomicU64,
}

/// The last reported state of a file that others can change.
#[derive(Debug)]
struct Reported {
    size_bytes: AtomicU64,
    deleted: AtomicBool,
}

impl OpenImage {
    /// Opens and locks the image at `path`; its log lines begin with `label`. See [`super::file::FileImage::open`].
    pub(super) fn open(label: String, path: &Path, options: &OpenOptions) -> Result<Self> {
        let unusable = |error| Error::io(ErrorKind::Image, format!("cannot open image {}", path.display()), error);
        let access = if options.read_only { LockMode::ReadOnly } else { LockMode::ReadWrite };
        // Checked before the open: opening a FIFO would wait for its other end.
        check_type(path, &std::fs::metadata(path).map_err(unusable)?)?;
        let may_have_writer = access == LockMode::ReadWrite && has_writer(path);
        let file = open_file(path, access)?;
        let metadata = file.metadata().map_err(unusable)?;
        check_type(path, &metadata)?;
        lock::acquire(&file, path, &label, access, options.lock_timeout).map_err(|error| {
            let device = history::loop_device_on(path).filter(|_| error.kind() == ErrorKind::Locked);
            match device {
                Some(device) => error.with_hint(&format!("loop device {} has the same bytes", device.display())),
                None => error,
            }
        })?;
        let file_behind = lock_file_behind(&file, path, &label, access, options.lock_timeout)?;
        if may_have_writer {
            refuse_copy_under_way(&file, path, &label)?;
        }
        // Read the size only now: an earlier daemon, or a copy, may have changed it until the lock was released.
        let metadata = file.metadata().map_err(unusable)?;
        let geometry = BlockGeometry::of(&file, &metadata).map_err(unusable)?;
        let device_number = metadata.file_type().is_block_device().then(|| metadata.rdev());
        // Before any step that may change the file's times.
        let found_token = history::change_token(&file, geometry.size_bytes, device_number, options.direct);
        let format = FormatRecord::of(&file, geometry.size_bytes).map_err(unusable)?;
        // A qcow2 or gzip file can have any number of bytes: its format, not its size, is the error to report.
        check_size(path, geometry.size_bytes).map_err(|error| format.refusal(path).unwrap_or(error))?;
        let direct = if options.direct { try_direct(&file, &label, &geometry) } else { None };
        let alignment = direct.unwrap_or(Alignment::BUFFERED);
        let writable = access == LockMode::ReadWrite;
        let is_file = geometry.device_block.is_none();
        let data_runs = if is_file { first_data_runs(&file, geometry.size_bytes) } else { None };
        let limits = Limits {
            size_bytes: geometry.size_bytes.into(),
            block_bytes: alignment.block,
            memory_align: alignment.memory,
            io_max_bytes: geometry.io_max_bytes,
            segments_max: geometry.segments_max,
            depth: DEPTH,
            discard_granularity: geometry.discard_granularity,
            discard_max_bytes: geometry.discard_max_bytes,
            physical_block_bytes: geometry.physical_block.max(alignment.block).max(alignment.memory),
            optimal_io_bytes: geometry.optimal_io,
            writable,
            // Always: if the host has no command for it, genblk writes zeros.
            can_zero: writable,
            can_discard: writable && can_discard(&file, &geometry),
            holes: match &data_runs {
                None => ImageHoles::Unmappable,
                Some(runs) if *runs == std::slice::from_ref(&(0..geometry.size_bytes)) => ImageHoles::NoneYet,
                Some(_) => ImageHoles::Possible,
            },
        };
        let identity = identity_of(&file, &metadata);
        let is_on_local_fs = FileSystem::of(&file).is_ok_and(|found| found.is_local());
        Ok(Self {
            file,
            limits,
            path: path.to_path_buf(),
            label,
            identity,
            data_runs: data_runs.unwrap_or_default(),
            direct: direct.is_some(),
            device_block: geometry.device_block,
            format,
            device_number,
            file_behind,
            found_token: found_token.unwrap_or_default(),
            is_on_local_fs,
            is_opened_here: true,
            reported: Reported { size_bytes: AtomicU64::new(geometry.size_bytes), deleted: AtomicBool::new(false) },
            #[cfg(test)]
            test_limits: TestLimits::default(),
        })
    }

    /// An image that another process of the daemon has opened. `file` is a separate open file description.
    pub(super) fn received(file: File, parts: FileParts) -> Self {
        let size_bytes = parts.limits.size_bytes.get();
        Self {
            file,
            limits: parts.limits,
            path: PathBuf::from(parts.path),
            label: parts.label,
            identity: parts.identity,
            data_runs: parts.data_runs,
            direct: parts.is_direct,
            device_block: parts.device_block,
            format: FormatRecord::as_raw(parts.known),
            device_number: parts.device_number,
            file_behind: None,
            found_token: ChangeToken::default(),
            is_on_local_fs: parts.is_on_local_fs,
            is_opened_here: false,
            reported: Reported { size_bytes: AtomicU64::new(size_bytes), deleted: AtomicBool::new(false) },
            #[cfg(test)]
            test_limits: TestLimits::default(),
        }
    }

    /// The properties of the image, for another process of the daemon.
    pub(super) fn parts(&self, known: Known, engine: IoEngine, tenure: Option<Vec<u8>>) -> FileParts {
        FileParts {
            limits: self.limits.clone(),
            path: self.path.to_string_lossy().into_owned(),
            label: self.label.clone(),
            identity: self.identity,
            data_runs: self.data_runs.clone(),
            is_direct: self.direct,
            device_block: self.device_block,
            device_number: self.device_number,
            is_on_local_fs: self.is_on_local_fs,
            known,
            engine,
            is_recorded_on_host: false,
            tenure,
        }
    }

    /// Opens the file again, as another open file description with the image's lock and the I/O lock. Returns it with
    /// its present format.
    pub(super) fn reopen(&self, io_lock: IoLock) -> std::io::Result<(File, Known)> {
        let writable = self.limits.writable;
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let file = File::options().read(true).write(writable).open(path)?;
        // Before direct I/O is enabled, which reads only whole blocks.
        let known = FormatRecord::of(&file, self.limits.size_bytes.get())?.into_known();
        if self.direct {
            sys::file::set_direct(&file, true)?;
        }
        lock::share(&file, if writable { LockMode::ReadWrite } else { LockMode::ReadOnly });
        // It fails only where the file system has no locks.
        let _ = sys::file::lock_byte(&file, io_lock.0);
        Ok((file, known))
    }

    /// Whether another open file description holds the I/O lock. Always false on a file system without locks.
    pub(super) fn is_io_locked(&self, io_lock: IoLock) -> bool {
        sys::file::is_byte_locked(&self.file, io_lock.0).unwrap_or(false)
    }

    /// The present size of the file or device.
    pub(super) fn size_now(&self) -> std::io::Result<u64> {
        if self.is_device() { sys::block::size_bytes(&self.file) } else { Ok(self.file.metadata()?.len()) }
    }

    /// See [`super::named::NamedImage::grow`].
    pub(super) fn grow(&self, wanted: Option<u64>) -> std::result::Result<u64, String> {
        let failed = |e: std::io::Error| format!("image {}: {e}", self.path.display());
        let (served, now) = (self.limits.size_bytes.get(), self.size_now().map_err(failed)?);
        let wanted = wanted.unwrap_or(now);
        if wanted < served {
            let advice = "to make it smaller, and lose the data beyond the new end, add --shrink";
            return Err(format!("it has {served} bytes; {advice}"));
        }
        check_whole_pages(served, wanted)?;
        check_size(&self.path, wanted).map_err(|error| error.to_string())?;
        if wanted > now && self.is_device() {
            return Err(format!("device {} has {now} bytes; grow the device first", self.path.display()));
        }
        if wanted > now && !self.limits.writable {
            return Err("the image is read-only".to_owned());
        }
        if wanted > now {
            self.file.set_len(wanted).map_err(failed)?;
        }
        self.limits.size_bytes.set(wanted);
        Ok(wanted)
    }

    /// See [`super::named::NamedImage::check_shrink`].
    pub(super) fn check_shrink(&self, wanted: u64) -> std::result::Result<u64, String> {
        let served = self.limits.size_bytes.get();
        if wanted >= served {
            return Ok(served);
        }
        check_whole_pages(served, wanted)?;
        check_size(&self.path, wanted).map_err(|error| error.to_string())?;
        if !self.limits.writable {
            return Err("the image is read-only".to_owned());
        }
        if self.is_device() {
            let device = self.path.display();
            return Err(format!("{device} is a block device: detach the disk, shrink the device, and attach it again"));
        }
        Ok(served)
    }

    /// See [`super::named::NamedImage::truncate`].
    pub(super) fn truncate(&self, size_bytes: u64) -> std::result::Result<(), String> {
        self.file.set_len(size_bytes).map_err(|e| format!("image {}: {e}", self.path.display()))?;
        self.limits.size_bytes.set(size_bytes);
        // It has been cut, whatever this returns. After a power cut it may have its old size, and is served with that.
        if let Err(e) = self.file.sync_all() {
            warn!("{}: was cut to {size_bytes} bytes, but a power cut may undo that: {e}", self.label);
        }
        Ok(())
    }

    /// The path at which the image was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The prefix of log lines about the image.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// The identity of the image, which does not depend on its path.
    pub(super) fn identity(&self) -> ImageId {
        self.identity
    }

    /// Whether transfers bypass the host's page cache.
    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether the image is a block device, as opposed to a regular file.
    pub(super) fn is_device(&self) -> bool {
        self.device_block.is_some()
    }

    /// The formats other than raw that were found in the image.
    pub(super) fn format(&self) -> &FormatRecord {
        &self.format
    }

    /// Whether a write of these bytes may make the image appear to have a format other than raw.
    pub(super) fn shows_format(&self, first: u64, end: u64) -> bool {
        first < HEAD_BYTES as u64 || end == self.limits.size_bytes.get()
    }

    /// Whether a thread has to record formats in the image before it executes this write; a worker must not wait for
    /// that.
    pub(super) fn must_record_formats(&self, request: &IoRequest) -> bool {
        self.format.is_pending() && self.shows_format(request.offset, request.offset + request.len)
    }

    /// Records in the image the formats whose headers its guest is writing. May wait for the image.
    pub(super) fn record_guest_formats(&self) {
        self.format.record_pending(&self.file, &self.label);
    }

    /// The change token of the image.
    pub(super) fn change_token(&self) -> std::io::Result<ChangeToken> {
        if !self.is_opened_here && self.is_device() {
            // It is in sysfs, at paths that only the process that opened the image may use.
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        history::change_token(&self.file, self.limits.size_bytes.get(), self.device_number, self.direct)
    }

    /// The change token of the image when it was opened.
    pub(super) fn found_token(&self) -> ChangeToken {
        self.found_token
    }

    /// Whether fstat(2) never waits, because the file system is local.
    pub(super) fn is_on_local_fs(&self) -> bool {
        self.is_on_local_fs
    }

    /// A name that a block device keeps when it is attached again; empty for a regular file.
    pub(super) fn alias(&self) -> String {
        self.device_number.map_or_else(String::new, history::alias)
    }

    /// Whether the file is still long enough for an operation that changes it; a write beyond its end would make it
    /// grow again. Logs changes since the last check.
    pub(super) fn still_covers(&self, request: &IoRequest) -> bool {
        if self.is_device() || matches!(request.op, OpKind::Read | OpKind::Map) {
            return true;
        }
        // Workers call this, so it must not wait for a file server. If it fails, the operation itself reports the
        // error.
        let Some((now, links)) = sys::file::cached_size_and_links(&self.file) else { return true };
        let label = &self.label;
        let before = self.reported.size_bytes.swap(now, Ordering::Relaxed);
        let opened = self.limits.size_bytes.get();
        if now < before && now < opened {
            log::error!("{label} has shrunk from {before} to {now} bytes: writes beyond its end fail");
        } else if now != before && now < opened {
            log::warn!("{label} now has {now} bytes; it had {opened} when it was opened");
        }
        if links == 0 && !self.reported.deleted.swap(true, Ordering::Relaxed) {
            log::error!(
                "{label} was deleted: it is still served, but its data is lost when this daemon ends; copy \
                 it from inside the guest before"
            );
        }
        request.offset + request.len <= now
    }

    /// The whole blocks of a range that fallocate and BLKDISCARD accept, as (first, end): the whole range on a regular
    /// file, whole logical blocks on a device; `None` if the range has no whole block.
    pub(super) fn whole_blocks(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let block = u64::from(self.device_block.unwrap_or(1));
        let (first, end) = (offset.next_multiple_of(block), (offset + len) / block * block);
        (first < end).then_some((first, end))
    }

    /// The first part of a transfer if a test limits what one system call moves; a later call moves the rest.
    #[cfg(test)]
    pub(super) fn limited_start(&self, segments: &[Segment]) -> Option<Segment> {
        let max = self.test_limits.transfer_max.load(Ordering::Relaxed);
        (max > 0).then(|| Segment { base: segments[0].base, len: segments[0].len.min(max) })
    }

    /// Outside tests, no system call is limited.
    #[cfg(not(test))]
    pub(super) fn limited_start(&self, _segments: &[Segment]) -> Option<Segment> {
        None
    }

    /// Delays a write of a thread, if a test requires that.
    pub(super) fn delay_write(&self) {
        #[cfg(test)]
        std::thread::sleep(Duration::from_millis(self.test_limits.write_ms.load(Ordering::Relaxed)));
    }

    /// Makes every write of a thread take at least this long from now on.
    #[cfg(test)]
    pub(super) fn slow_writes(&self, milliseconds: u64) {
        self.test_limits.write_ms.store(milliseconds, Ordering::Relaxed);
    }

    /// Makes this many submissions to io_uring fail from now on.
    #[cfg(test)]
    pub(super) fn refuse_submissions(&self, count: u64) {
        self.test_limits.refused_submissions.store(count, Ordering::Relaxed);
    }

    /// Whether this submission fails.
    #[cfg(test)]
    pub(super) fn refuses_submission(&self) -> bool {
        let refuse = |left: u64| left.checked_sub(1);
        self.test_limits.refused_submissions.fetch_update(Ordering::Relaxed, Ordering::Relaxed, refuse).is_ok()
    }

    /// Limits every system call to `bytes` from now on, so that transfers are short.
    #[cfg(test)]
    pub(super) fn limit_transfers(&self, bytes: usize) {
        self.test_limits.transfer_max.store(bytes, Ordering::Relaxed);
    }
}

impl Drop for OpenImage {
    fn drop(&mut self) {
        lock::release(&self.file, &self.label);
        self.file_behind.iter().for_each(|file| lock::release(file, &self.label));
    }
}

/// Locks the file behind a loop device, which is the same image, or contains it; `None` for any other image, and for a
/// file that no path leads to.
fn lock_file_behind(
    device: &File,
    path: &Path,
    label: &str,
    access: LockMode,
    timeout: Duration,
) -> Result<Option<File>> {
    let Some((file, file_path, access)) = file_behind(device, access) else { return Ok(None) };
    lock::acquire(&file, &file_path, label, access, timeout).map_err(|error| {
        let context = format!("{} is a loop device on {}, with the same bytes", path.display(), file_path.display());
        Error::new(error.kind(), format!("{context}: {error}"))
    })?;
    Ok(Some(file))
}

/// The first runs of data of a file; `None` if its file system cannot find holes. On a fragmented file the kernel walks
/// over all extents of a run to find its end: doing it here keeps that out of the first requests of the guest.
fn first_data_runs(file: &File, size_bytes: u64) -> Option<Vec<Range<u64>>> {
    let deadline = Instant::now() + RUNS_TIMEOUT;
    let (mut runs, mut at) = (Vec::new(), 0);
    while at < size_bytes && runs.len() < RUNS_MAX && Instant::now() < deadline {
        let data = match sys::file::seek_data(file, at) {
            Ok(data) => data.min(size_bytes),
            // No data up to the end of the file.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => size_bytes,
            Err(_) => return None,
        };
        at = if data < size_bytes { sys::file::seek_hole(file, data).ok()?.clamp(data, size_bytes) } else { data };
        if data < at {
            runs.push(data..at);
        }
    }
    Some(runs)
}

/// Whether an image of `served` bytes can get `wanted` bytes while it is served.
fn check_whole_pages(served: u64, wanted: u64) -> std::result::Result<(), String> {
    if wanted.is_multiple_of(PAGE_BYTES) && served.is_multiple_of(PAGE_BYTES) {
        return Ok(());
    }
    let hint = "for other sizes, detach the disk, and attach it again";
    Err(format!("the old or the new size is not a multiple of {PAGE_BYTES} bytes; {hint}"))
}
