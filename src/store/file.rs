//! A raw image, a regular file or a block device, with a queue for every worker.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Once};

use super::format::Format;
use super::handed::FileParts;
pub use super::handed::{ImageParts, IoLock};
use super::history;
pub use super::history::LastTenure;
use super::host_record::{self, HostRecord};
use super::image::OpenImage;
use super::named::{BlockWriter, ImageKind, NamedImage};
pub use super::named::{KnownRaw, PageBytes};
use super::open_checks;
pub use super::open_checks::Inspection;
pub use super::options::{IoEngine, NbdOptions, OpenOptions};
use super::threads::ThreadQueue;
use super::uring::UringQueue;
use super::{Backing, Limits, StoreQueue, blocking};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::sys;
use crate::tenure::TenureId;
use crate::tenure::record::{CacheLocation, Record, TenureState};
use crate::tenure::token::ChangeToken;
use crate::units::{PAGE_BYTES, PAGE_SIZE, PageNo, SECTOR_BYTES, SectorSpan, Unmap};

/// The identity and the change token of the image at `path`. The image is not opened, because the path may come from an
/// untrusted file.
///
/// # Errors
/// Errors of open(2) and stat(2).
pub fn identity_and_token(path: &Path) -> io::Result<(ImageId, ChangeToken)> {
    open_checks::identity_and_token(path)
}

/// The record of the last tenure of the image at `path`, which may come from an untrusted file: only a regular file is
/// opened. `None` also if the record cannot be read.
pub fn recorded_tenure(path: &Path) -> Option<Record> {
    open_checks::recorded_tenure(path)
}

/// Ends the open tenure with this ID in this state, if a record of this host has it: for an image that cannot be
/// opened. Returns whether there is one.
///
/// # Errors
/// Errors of writing a file of this host.
pub fn end_recorded_tenure(tenure: TenureId, state: TenureState) -> io::Result<bool> {
    host_record::end(tenure, state)
}

/// Whether a block device is a partition.
pub fn is_partition(device: u64) -> bool {
    history::is_partition(device)
}

/// Examines the image at `path` like a daemon that opens it, without locking it. Blocks.
///
/// # Errors
/// The errors of [`FileImage::open`]. [`ErrorKind::Locked`] for a block device that is in use, but not by a daemon.
pub fn inspect(path: &Path, read_only: bool) -> Result<Inspection> {
    open_checks::inspect(path, read_only)
}

/// Checks that this process may use io_uring.
///
/// # Errors
/// Errors of io_uring_setup(2).
pub fn check_uring() -> io::Result<()> {
    io_uring::IoUring::new(1).map(drop)
}

/// A raw image, opened and locked. The lock lasts as long as this value and its queues.
#[derive(Debug)]
pub struct FileImage {
    image: Arc<OpenImage>,
    engine: IoEngine,
    /// Logs once that threads replace io_uring.
    fallback_warning: Once,
    /// The record of the current tenure.
    tenure: Mutex<Option<Record>>,
    /// Whether the image cannot carry the record of its tenure, so that this host has it.
    is_recorded_on_host: bool,
    /// The place of the image among the records of this host; `None` if another process opened the image, and so writes
    /// its record.
    host_record: Option<HostRecord>,
}

impl FileImage {
    /// Opens and locks the image at `path`. Blocks: not for a worker's thread.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] if it is missing, neither a regular file nor a block device, empty, too large, not a
    /// multiple of 512 bytes long, or can't be opened; [`ErrorKind::Locked`] if another opener's lock conflicts. Every
    /// error names the image.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        Self::open_labelled(format!("image {}", path.display()), path, options)
    }

    /// Like [`FileImage::open`], for the device of this name: log lines about the image begin with it.
    ///
    /// # Errors
    /// As [`FileImage::open`].
    pub fn open_for(device: &str, path: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        Self::open_labelled(format!("{device}: image {}", path.display()), path, options)
    }

    fn open_labelled(label: String, path: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        let image = OpenImage::open(label, path, options)?;
        let is_recorded_on_host =
            image.is_device() || matches!(history::last_tenure(&image.file), Ok(LastTenure::NoRecords));
        let host_record = HostRecord::of(&image.file, image.identity(), &canonical(path));
        let host_record = host_record.inspect_err(|e| log::warn!("{}: {e}", image.label())).ok();
        Ok(Arc::new(Self {
            image: Arc::new(image),
            engine: options.engine,
            fallback_warning: Once::new(),
            tenure: Mutex::default(),
            is_recorded_on_host,
            host_record,
        }))
    }

    /// An image that another process of the daemon has opened and passed on.
    ///
    /// # Errors
    /// [`ErrorKind::System`] for a record of a tenure that this genblk cannot read.
    pub(super) fn received(file: File, mut parts: FileParts) -> Result<Arc<Self>> {
        let record = parts.tenure.take().map(|bytes| Record::decode(&bytes)).transpose();
        let record = record.map_err(|why| {
            Error::new(ErrorKind::System, format!("cannot read the record of the last daemon: {why}"))
        })?;
        let (engine, is_recorded_on_host) = (parts.engine, parts.is_recorded_on_host);
        Ok(Arc::new(Self {
            image: Arc::new(OpenImage::received(file, parts)),
            engine,
            fallback_warning: Once::new(),
            tenure: Mutex::new(record),
            is_recorded_on_host,
            host_record: None,
        }))
    }

    /// The identity of the image, which does not depend on its name: equal for two names of one image.
    pub fn identity(&self) -> ImageId {
        self.image.identity()
    }

    /// The format other than raw that the image appeared to have when it was opened.
    pub fn found_format(&self) -> Option<Format> {
        self.image.format().found().map(|found| found.format)
    }

    /// Rejects an image that appears to have a format other than raw, unless `known_raw` gives a reason to treat it as
    /// raw, or the guest is recorded as the writer of that format's header. If such an image is served, logs the
    /// reason.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] with the format, the command that converts it, and how to serve it unchanged.
    pub fn check_format(&self, known_raw: Option<KnownRaw>) -> Result<()> {
        let format = self.image.format();
        let Some(found) = format.found() else { return Ok(()) };
        let (label, name) = (self.image.label(), found.format);
        let why = match known_raw {
            Some(KnownRaw::Configured) => "format = \"raw\" is set",
            _ if format.is_guest_written() => "its guest has written the header",
            Some(KnownRaw::KeptCache) => "it was served before, and its cache was kept",
            // A device cannot carry a record, and guests' disks that are encrypted as a whole are common. A LUKS
            // container that the host created loses nothing as long as the guest does not format it.
            None if self.image.is_device() && found.format == Format::Luks => {
                log::warn!(
                    "{label} begins with a LUKS header; served as raw, because it is a block device: if its guest has \
                     written the header, set format = \"raw\" (--format raw)"
                );
                return Ok(());
            }
            None => return format.refusal(self.image.path()).map_or(Ok(()), Err),
        };
        log::info!("{label} looks like {name}; served as raw, because {why}");
        Ok(())
    }

    /// Whether transfers bypass the host's page cache.
    pub fn direct(&self) -> bool {
        self.image.is_direct()
    }

    /// Makes the kernel's queue refuse the next `count` submissions.
    #[cfg(test)]
    pub fn refuse_submissions(&self, count: u64) {
        self.image.refuse_submissions(count);
    }

    /// Limits every system call to `bytes` from now on, so that transfers are short.
    #[cfg(test)]
    pub(super) fn limit_transfers(&self, bytes: usize) {
        self.image.limit_transfers(bytes);
    }

    /// Makes every write of a thread take at least this long from now on.
    #[cfg(test)]
    pub(super) fn slow_writes(&self, milliseconds: u64) {
        self.image.slow_writes(milliseconds);
    }

    /// See [`super::raw_record::FormatRecord::hold_recording`].
    #[cfg(test)]
    pub(super) fn hold_recording(&self) -> MutexGuard<'_, ()> {
        self.image.format().hold_recording()
    }

    /// Makes a range (in bytes) read as zeros and keeps its space. Blocks.
    ///
    /// => No other operation on the range is in flight.
    ///
    /// # Errors
    /// The error of fallocate(2), pread(2) or pwrite(2).
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        blocking::zero(&self.image, offset, len, Unmap::Forbidden)
    }

    /// Opens the image again, for writing through the host's page cache: the same file, whatever its path leads to now.
    ///
    /// # Errors
    /// Errors of open(2).
    fn reopen_buffered(&self) -> io::Result<File> {
        File::options().write(true).open(format!("/proc/self/fd/{}", self.image.file.as_raw_fd()))
    }

    /// Reads a page; the part past the end of the image is zeros. Blocks.
    ///
    /// # Errors
    /// The error of pread(2).
    pub fn read_page(&self, page: PageNo) -> io::Result<Box<PageBytes>> {
        let mut bytes = Box::new(PageBytes([0; PAGE_SIZE]));
        let within = self.limits().size_bytes.get().saturating_sub(page.offset_bytes()).min(PAGE_BYTES);
        let within = usize::try_from(within).expect("at most a page");
        self.image.file.read_exact_at(&mut bytes.0[..within], page.offset_bytes())?;
        Ok(bytes)
    }

    /// The record of the last tenure: at the image, or on this host if the image cannot carry one.
    ///
    /// # Errors
    /// Errors of fgetxattr(2).
    pub fn last_tenure(&self) -> io::Result<LastTenure> {
        if self.is_recorded_on_host {
            return Ok(self.host_record.as_ref().map_or(LastTenure::NoRecords, HostRecord::last));
        }
        history::last_tenure(&self.image.file)
    }

    /// Starts a tenure: writes its record, and syncs the image. `false` if there is no place for it.
    ///
    /// # Errors
    /// Errors of fsetxattr(2) and fsync(2); errors of writing a file of this host.
    pub fn begin_tenure(&self, record: Record) -> io::Result<bool> {
        let last = self.last_tenure()?;
        if last == LastTenure::NoRecords {
            return Ok(false);
        }
        if last != LastTenure::Recorded(record.clone()) {
            self.write_record(&record)?;
            if self.is_recorded_on_host {
                self.image.file.sync_all()?;
            }
        }
        *self.tenure() = Some(record);
        Ok(true)
    }

    /// The open tenures of images that share bytes with this one: of a file and the loop devices on it, or of a disk
    /// and its partitions.
    pub fn overlapping_tenures(&self) -> Vec<Record> {
        let of_file = self.image.file_behind.as_ref().and_then(open_tenure_of);
        of_file.into_iter().chain(self.host_record.iter().flat_map(HostRecord::overlapping_tenures)).collect()
    }

    /// Ends those tenures in this state.
    ///
    /// # Errors
    /// As [`FileImage::begin_tenure`].
    pub fn end_overlapping_tenures(&self, state: TenureState) -> io::Result<()> {
        if let Some(file) = &self.image.file_behind
            && let Some(record) = open_tenure_of(file)
        {
            history::write_record(file, &Record { state, ..record })?;
        }
        self.host_record.iter().try_for_each(|place| place.end_overlapping_tenures(state))
    }

    /// Writes a record of a tenure, and makes it durable if it is at the image.
    ///
    /// # Errors
    /// As [`FileImage::begin_tenure`].
    pub fn write_record(&self, record: &Record) -> io::Result<()> {
        if !self.is_recorded_on_host {
            return history::write_record(&self.image.file, record);
        }
        self.host_record.as_ref().ok_or(io::ErrorKind::Unsupported)?.write(record)
    }

    fn tenure(&self) -> MutexGuard<'_, Option<Record>> {
        self.tenure.lock().expect("no thread panics with the record locked")
    }

    /// The change token of the image when it was opened, before this daemon changed anything.
    pub fn found_token(&self) -> ChangeToken {
        self.image.found_token()
    }

    /// A name that a block device keeps when it is attached again; empty for a regular file, or if none is known.
    pub fn alias(&self) -> String {
        self.image.alias()
    }

    /// Whether the image is a block device, as opposed to a regular file.
    pub fn is_device(&self) -> bool {
        self.image.is_device()
    }

    /// The path at which the image was opened.
    pub fn path(&self) -> &Path {
        self.image.path()
    }

    /// The path of the image without symbolic links.
    pub fn canonical_path(&self) -> PathBuf {
        canonical(self.path())
    }
}

impl NamedImage for FileImage {
    fn path(&self) -> &Path {
        self.path()
    }

    fn canonical_path(&self) -> PathBuf {
        self.canonical_path()
    }

    fn identity(&self) -> ImageId {
        self.identity()
    }

    fn alias(&self) -> String {
        self.alias()
    }

    fn kind(&self) -> ImageKind {
        if self.is_device() { ImageKind::Device } else { ImageKind::File }
    }

    fn io_mode(&self) -> String {
        if self.direct() { "O_DIRECT" } else { "buffered I/O" }.to_owned()
    }

    fn found_format(&self) -> Option<Format> {
        self.found_format()
    }

    fn check_format(&self, known_raw: Option<KnownRaw>) -> Result<()> {
        self.check_format(known_raw)
    }

    fn last_tenure(&self) -> io::Result<LastTenure> {
        self.last_tenure()
    }

    fn begin_tenure(&self, record: Record) -> io::Result<bool> {
        self.begin_tenure(record)
    }

    fn write_record(&self, record: &Record) -> io::Result<()> {
        self.write_record(record)
    }

    fn overlapping_tenures(&self) -> Vec<Record> {
        self.overlapping_tenures()
    }

    fn end_overlapping_tenures(&self, state: TenureState) -> io::Result<()> {
        self.end_overlapping_tenures(state)
    }

    fn is_recorded_on_host(&self) -> bool {
        self.is_recorded_on_host
    }

    fn found_token(&self) -> ChangeToken {
        self.found_token()
    }

    fn reopen_for_process(&self, io_lock: IoLock) -> io::Result<(File, ImageParts)> {
        let (file, known) = self.image.reopen(io_lock)?;
        // The process that serves the image writes no files of this host.
        let is_recorded_on_host = self.is_recorded_on_host;
        let record = self.tenure().as_ref().filter(|_| !is_recorded_on_host).map(Record::encode);
        let parts = self.image.parts(known, self.engine, record);
        Ok((file, ImageParts::File(FileParts { is_recorded_on_host, ..parts })))
    }

    fn is_io_locked(&self, io_lock: IoLock) -> bool {
        self.image.is_io_locked(io_lock)
    }

    fn present_size(&self) -> Option<u64> {
        if self.image.is_device() || self.image.is_on_local_fs() { self.image.size_now().ok() } else { None }
    }

    fn grow(&self, size_bytes: Option<u64>) -> std::result::Result<u64, String> {
        self.image.grow(size_bytes)
    }

    fn check_shrink(&self, size_bytes: u64) -> std::result::Result<u64, String> {
        self.image.check_shrink(size_bytes)
    }

    fn truncate(&self, size_bytes: u64) -> std::result::Result<(), String> {
        self.image.truncate(size_bytes)
    }

    fn read_page(&self, page: PageNo) -> io::Result<Box<PageBytes>> {
        self.read_page(page)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }

    fn writer(&self) -> io::Result<Box<dyn BlockWriter + '_>> {
        Ok(Box::new(BufferedWriter { file: self.reopen_buffered()?, image: &self.image }))
    }
}

/// The path without symbolic links.
fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
}

/// The open tenure that a file records, unless it was copied from another file.
fn open_tenure_of(file: &File) -> Option<Record> {
    let LastTenure::Recorded(record) = history::last_tenure(file).ok()? else { return None };
    let is_own = file.metadata().is_ok_and(|found| found.ino() == record.inode);
    (is_own && record.state == TenureState::Open).then_some(record)
}

/// Writes to the file that was opened and checked, not to the one at its path now.
struct BufferedWriter<'a> {
    file: File,
    image: &'a OpenImage,
}

impl BlockWriter for BufferedWriter<'_> {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.image.record_guest_formats();
        // 0 for a block device, which itself fails a write past its end.
        let file_bytes = self.file.metadata()?.len();
        if file_bytes != 0 && offset + bytes.len() as u64 > file_bytes {
            return Err(io::Error::other("it has shrunk"));
        }
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl Backing for FileImage {
    fn limits(&self) -> &Limits {
        &self.image.limits
    }

    fn shows_format(&self, span: SectorSpan) -> bool {
        self.image.shows_format(span.start * SECTOR_BYTES, span.end() * SECTOR_BYTES)
    }

    fn inspect_guest_write(&self, first: u64, bytes: &[u8]) -> u64 {
        self.image.format().inspect_guest_write(first, bytes, self.image.limits.size_bytes.get() / SECTOR_BYTES)
    }

    fn recorded_formats(&self) -> u64 {
        self.image.format().recorded_formats()
    }

    fn change_token(&self) -> Option<ChangeToken> {
        self.image.change_token().ok()
    }

    fn idle_token_may_wait(&self) -> bool {
        !self.image.is_on_local_fs()
    }

    fn idle_token(&self) -> Option<ChangeToken> {
        // Reading a device's attributes in sysfs takes many system calls.
        if self.image.is_device() { None } else { self.change_token() }
    }

    fn end_tenure(&self) -> io::Result<bool> {
        let Some(record) = self.tenure().take() else { return Ok(false) };
        self.write_record(&Record { state: TenureState::Clean, ..record }).map(|()| true)
    }

    fn lose_cache(&self) -> io::Result<bool> {
        let mut tenure = self.tenure();
        let Some(record) = tenure.as_mut() else { return Ok(self.is_recorded_on_host) };
        record.cache = CacheLocation::Memory;
        self.write_record(record).map(|()| true)
    }

    fn data_runs(&self) -> Vec<Range<u64>> {
        self.image.data_runs.clone()
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        let path = self.image.path().display();
        let failed = |action: &str, error: io::Error| {
            Error::io(ErrorKind::System, format!("image {path}: cannot {action}"), error)
        };
        if self.engine != IoEngine::Threads {
            match UringQueue::new(Arc::clone(&self.image)) {
                Ok(queue) => return Ok(Box::new(queue)),
                // Whatever the reason: a disk that is served by threads is better than no disk.
                Err(error) if self.engine == IoEngine::Auto => self.fallback_warning.call_once(|| {
                    let (label, hint) = (self.image.label(), uring_hint(&error));
                    log::warn!("{label}: io_uring is not available ({error}{hint}); using threads");
                }),
                Err(error) => return Err(failed(&format!("set up io_uring{}", uring_hint(&error)), error)),
            }
        }
        match ThreadQueue::new(Arc::clone(&self.image)) {
            Ok(queue) => Ok(Box::new(queue)),
            Err(error) => Err(failed("start I/O threads", error)),
        }
    }
}

/// A hint at why io_uring could not be set up, to follow the error.
fn uring_hint(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            format!("; RLIMIT_MEMLOCK is {}", sys::process::describe_limit(sys::process::Limit::LockedMemory))
        }
        Some(libc::EMFILE) => {
            format!("; RLIMIT_NOFILE is {}", sys::process::describe_limit(sys::process::Limit::Descriptors))
        }
        Some(libc::EPERM | libc::EACCES) => {
            "; kernel.io_uring_disabled, a seccomp filter or a security module forbids it".to_owned()
        }
        Some(libc::ENOSYS | libc::EINVAL) => "; the kernel lacks it or a part of it".to_owned(),
        _ => String::new(),
    }
}
