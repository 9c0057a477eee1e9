//! The file that holds an arena: its location, its image, and the lock that restricts it to one process.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::ended;
use super::ledger::{HEADER_BYTES, Header, ImageFacts, SET_ASIDE, boot_id, field};
use super::mapping::{self, MEMFD_NAME, Mapping};
use super::survey::{self, Survey};
use super::trust::{AllowedOwner, DirEntry, TrustedDir};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::sys::dir::OpenMode;
use crate::sys::memfd;
use crate::sys::process::{DEATH_TIMEOUT, effective_uid, is_dying};
use crate::systemd::ServiceManager;
use crate::tenure::TenureId;
use crate::tenure::record::{CacheLocation, TenureState};

/// How long to wait before the next attempt to lock a file that another process has locked.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// How long to wait for a process that only examines a file.
const EXAMINE_TIMEOUT: Duration = Duration::from_millis(100);

/// Name of root's directory of arenas.
const DIRECTORY: &str = "genblk";
/// Prefix of the names of other users' directories of arenas.
const DIRECTORY_OF_USER: &str = "genblk-";
/// Most names that are tried for a new file. As many caches of one image, less one, may remain from earlier daemons.
const NAMES_MAX: u32 = 64;

/// Prefix of an arena's name in the service manager's fd store.
const FDSTORE_PREFIX: &str = "genblk-cache-";

/// An open file for an image's arena, which no other daemon has open.
#[derive(Debug)]
pub struct ArenaFile {
    pub(super) file: File,
    location: Location,
    /// The name of a file that has a path, in its open directory.
    entry: Option<DirEntry>,
}

/// The result of [`ArenaFile::examine`].
#[derive(Debug)]
pub struct FileSummary {
    /// The user that owns the file.
    pub owner: u32,
    /// Whether a process uses the file.
    pub is_locked: bool,
    /// That process, if it can be identified.
    pub holder: Option<u32>,
    /// The contents of the file, or the reason why they cannot be read.
    pub survey: Result<Option<Survey>>,
}

/// A file whose name only another process has.
#[derive(Clone, Debug)]
pub(super) struct FileDescription {
    pub(super) shown: String,
    pub(super) recovery_hint: String,
    pub(super) removal_hint: String,
    pub(super) is_in_fdstore: bool,
    /// This process no longer needs the file: nothing in it is to be kept.
    pub(super) is_removed: Arc<AtomicBool>,
}

/// The location of a file that outlives the daemon.
#[derive(Debug)]
enum Location {
    /// At a path in shared memory; the file is locked.
    Path(PathBuf),
    /// At a location that another process of the daemon has. That process removes the file when this one has ended.
    Received(Box<FileDescription>),
    /// In the fd store of the service manager, which passes it only to the next daemon of the same unit.
    FdStore { manager: Arc<ServiceManager>, name: String },
}

impl fmt::Display for ArenaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.location {
            Location::Path(path) => write!(f, "{}", path.display()),
            Location::Received(description) => f.write_str(&description.shown),
            Location::FdStore { name, .. } => write!(f, "fd-store entry {name}"),
        }
    }
}

impl ArenaFile {
    /// A file that another process of the daemon has opened and locked.
    pub(super) fn received(file: File, description: FileDescription) -> Self {
        Self { file, location: Location::Received(Box::new(description)), entry: None }
    }

    /// A file that replaces this one, which was received from another process: it is removed in the same way.
    pub(super) fn replace_received(&self, file: File) -> Option<Self> {
        let Location::Received(description) = &self.location else { return None };
        Some(Self::received(file, (**description).clone()))
    }

    /// The directory of this user's arenas in `memory_dir`.
    pub fn dir(memory_dir: &Path) -> PathBuf {
        match effective_uid() {
            0 => memory_dir.join(DIRECTORY),
            user => memory_dir.join(format!("{DIRECTORY_OF_USER}{user}")),
        }
    }

    /// Creates and locks a file for a new cache of an image, in this user's directory in `memory_dir`, which is also
    /// created if needed.
    ///
    /// => Other files stay unchanged: the caller has already looked for caches of the image. An empty file is reused.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the file cannot be created; [`ErrorKind::Ledger`] when another user could have made
    /// or can change it (or [`ErrorKind::Memory`], if the directory is empty).
    pub fn create_for(memory_dir: &Path, image: &ImageFacts) -> Result<Self> {
        let directory = Self::dir(memory_dir);
        make_dir(&directory)?;
        let mut last = None;
        for serial in 0..NAMES_MAX {
            let path = directory.join(image.identity.file_name(image.size_bytes, serial));
            match Self::open(&path, OpenMode::Create, AllowedOwner::Own, Duration::ZERO) {
                Ok(file) if matches!(file.header(), Ok(None)) => return Ok(file),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Locked => last = Some(e),
                // A location that cannot be trusted, in which no cache was kept: a daemon that keeps its cache
                // elsewhere loses nothing.
                Err(e) if e.kind() == ErrorKind::Ledger && is_empty(&directory) => {
                    return Err(Error::new(ErrorKind::Memory, e.to_string()));
                }
                Err(e) => return Err(e),
            }
        }
        let context = format!(
            "cannot keep the cache in {}: it has too many caches of this image; remove unused ones with \
             \"genblk recover --prune\"",
            directory.display()
        );
        Err(last.unwrap_or_else(|| Error::new(ErrorKind::Memory, context)))
    }

    /// Opens and locks an existing file.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when the file does not have the name of an arena. Such a file must stay unchanged: a disk
    /// image that begins with zeros, for example, looks like an empty arena. [`ErrorKind::Locked`] when another process
    /// holds its lock. Otherwise like [`ArenaFile::create_for`].
    pub fn open_existing(path: &Path, allowed: AllowedOwner) -> Result<Self> {
        Self::open_within(path, allowed, EXAMINE_TIMEOUT)
    }

    /// Like [`ArenaFile::open_existing`], but waits at most `timeout` for another process to release its lock.
    ///
    /// # Errors
    /// As [`ArenaFile::open_existing`].
    pub fn open_within(path: &Path, allowed: AllowedOwner, timeout: Duration) -> Result<Self> {
        let shown = path.display();
        fs::symlink_metadata(path).map_err(|e| Error::io(ErrorKind::Memory, format!("cannot open {shown}"), e))?;
        if !path.file_name().and_then(OsStr::to_str).is_some_and(ImageId::is_file_name) {
            return Err(Error::new(ErrorKind::Ledger, format!("not a genblk cache file: {shown}")));
        }
        Self::open(path, OpenMode::ReadWrite, allowed, timeout)
    }

    /// The header of a file, which another process may use at the same time; `None` if it has none, or does not have
    /// the name of an arena.
    ///
    /// => The header may be from an earlier boot.
    ///
    /// # Errors
    /// As [`ArenaFile::open_existing`], and [`ErrorKind::Ledger`] for an unknown layout.
    pub fn peek(path: &Path, allowed: AllowedOwner) -> Result<Option<Header>> {
        if !path.file_name().and_then(OsStr::to_str).is_some_and(ImageId::is_file_name) {
            return Ok(None);
        }
        let (directory, name) = split(path)?;
        let file = TrustedDir::open(directory, allowed)?.open_file(name, OpenMode::Read, path)?;
        survey::header_of(&file, path)
    }

    /// The header of an entry of the service manager's fd store, which stays there; otherwise like [`ArenaFile::peek`].
    ///
    /// # Errors
    /// As [`ArenaFile::peek`].
    pub fn peek_in_fdstore(manager: &ServiceManager, name: &str) -> Result<Option<Header>> {
        if !name.starts_with(FDSTORE_PREFIX) {
            return Ok(None);
        }
        let shown = format!("fd-store entry {name}");
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot read {shown}"), e);
        match manager.fdstore_peek(name).map_err(failed)? {
            Some(file) => survey::header_of(&file, Path::new(&shown)),
            None => Ok(None),
        }
    }

    /// The arena directories of all users in `memory_dir`; none if it does not exist.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when `memory_dir` cannot be listed.
    pub fn dirs(memory_dir: &Path) -> Result<Vec<PathBuf>> {
        let is_ours = |name: &OsStr| name == DIRECTORY || name.to_string_lossy().starts_with(DIRECTORY_OF_USER);
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot list {}", memory_dir.display()), e);
        let entries = match fs::read_dir(memory_dir) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            // The user may access it but not list it.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                return Ok([Self::dir(memory_dir)].into_iter().filter(|path| path.is_dir()).collect());
            }
            entries => entries.and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(failed)?,
        };
        let named = entries.into_iter().filter(|entry| is_ours(&entry.file_name()));
        Ok(named.map(|entry| entry.path()).filter(|path| path.is_dir() && !path.is_symlink()).collect())
    }

    /// The location of the file, for the record of a tenure.
    pub fn cache_location(&self) -> CacheLocation {
        match &self.location {
            Location::Path(path) => CacheLocation::Path(path.canonicalize().unwrap_or_else(|_| path.clone())),
            Location::Received(description) => CacheLocation::Path(PathBuf::from(&description.shown)),
            Location::FdStore { name, .. } => CacheLocation::FdStore(name.clone()),
        }
    }

    /// Whether the file is in this user's directory in `memory_dir`.
    pub fn is_in(&self, memory_dir: &Path) -> bool {
        let directory = Self::dir(memory_dir);
        let directory = directory.canonicalize().unwrap_or(directory);
        matches!(self.cache_location(), CacheLocation::Path(path) if path.parent() == Some(&directory))
    }

    /// Records in the directory of the file, which is about to be removed, that its tenure has ended: in
    /// [`TenureState::Clean`] if all data is on the image. If the image's own record could not be changed, the next
    /// daemon looks there.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] or [`ErrorKind::Ledger`] when that cannot be recorded.
    pub fn record_tenure_end(&self, tenure: TenureId, state: TenureState) -> Result<()> {
        match &self.location {
            Location::Path(path) => {
                ended::record(&TrustedDir::open(split(path)?.0, AllowedOwner::Anyone)?, path, tenure, state)
            }
            Location::FdStore { .. } | Location::Received(_) => {
                Err(Error::new(ErrorKind::Memory, format!("cannot record next to {self} that its image was released")))
            }
        }
    }

    /// How a tenure whose cache was at `path` has ended, if [`ArenaFile::record_tenure_end`] was called for it.
    pub fn recorded_tenure_end(path: &Path, allowed: AllowedOwner, tenure: TenureId) -> Option<TenureState> {
        ended::state_of(path, allowed, tenure)
    }

    /// Sets the file aside: no daemon uses it, and its pages stay for the operator.
    ///
    /// => The file may belong to another user, who can shrink it meanwhile. So it is mapped only if write(2) does not
    ///    work.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the file cannot be changed.
    pub fn set_aside(&self) -> Result<()> {
        let map = || Mapping::new(&self.file, HEADER_BYTES).map(|map| map.store(field::IS_SET_ASIDE, SET_ASIDE));
        let written = match self.file.write_all_at(&SET_ASIDE.to_le_bytes(), field::IS_SET_ASIDE as u64) {
            // hugetlbfs has no write(2).
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && self.owner() == effective_uid() => map(),
            result => result,
        };
        written.map_err(|e| Error::io(ErrorKind::Memory, format!("cannot mark {self} as set aside"), e))
    }

    /// Checks that no other user could have put a file into a directory.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when another user could have done so; [`ErrorKind::Memory`] when the directory cannot be
    /// opened.
    pub fn check_dir(directory: &Path, allowed: AllowedOwner) -> Result<()> {
        TrustedDir::open(directory, allowed).map(drop)
    }

    /// Whether a process uses a file. Takes the lock for a moment, if it is free.
    pub fn is_held(path: &Path, allowed: AllowedOwner) -> bool {
        let opened = split(path)
            .and_then(|(directory, name)| TrustedDir::open(directory, allowed)?.open_file(name, OpenMode::Read, path));
        opened.is_ok_and(|file| file.try_lock_shared().is_err())
    }

    /// Examines a file without its lock: a daemon may use it at the same time.
    ///
    /// # Errors
    /// As [`ArenaFile::open_existing`].
    pub fn examine(path: &Path, allowed: AllowedOwner) -> Result<FileSummary> {
        let (directory, name) = split(path)?;
        let dir = TrustedDir::open(directory, allowed)?;
        let file = dir.open_file(name, OpenMode::Read, path)?;
        // A daemon that starts at this moment retries; another examination is not affected.
        let is_locked = file.try_lock_shared().is_err();
        let _ = file.unlock();
        let holder = if is_locked { lock_holder(&file) } else { None };
        Ok(FileSummary { owner: dir.owner(), is_locked, holder, survey: Survey::of(&file, path) })
    }

    /// Opens and locks a file.
    fn open(path: &Path, access: OpenMode, allowed: AllowedOwner, timeout: Duration) -> Result<Self> {
        let began = Instant::now();
        let (directory, name) = split(path)?;
        loop {
            let dir = TrustedDir::open(directory, allowed)?;
            let file = dir.open_file(name, access, path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::Error(e)) => {
                    return Err(Error::io(ErrorKind::Memory, format!("cannot lock {}", path.display()), e));
                }
                Err(TryLockError::WouldBlock) => {
                    let holder = lock_holder(&file);
                    let will_be_free = !timeout.is_zero() && holder.is_some_and(is_dying);
                    if began.elapsed() < if will_be_free { DEATH_TIMEOUT } else { timeout } {
                        // The owner may remove the file meanwhile, so open it again.
                        std::thread::sleep(LOCK_RETRY);
                        continue;
                    }
                    let holder = holder.map_or_else(String::new, |pid| format!(" (pid {pid})"));
                    let context = format!("another genblk process{holder} uses {}", path.display());
                    return Err(Error::new(ErrorKind::Locked, context));
                }
            }
            // The previous owner may have removed the file between open() and the lock.
            let entry = dir.entry(name);
            if entry.leads_to(&file) {
                return Ok(Self { file, location: Location::Path(path.to_path_buf()), entry: Some(entry) });
            }
        }
    }

    /// Creates a new, empty file at the path of this one, whose name was removed.
    ///
    /// # Errors
    /// As [`ArenaFile::create_for`], without waiting; [`ErrorKind::Ledger`] when the name leads to another file.
    pub fn recreate(&self) -> Result<Self> {
        let Location::Path(path) = &self.location else {
            return Err(Error::new(ErrorKind::Memory, format!("cannot replace {self}")));
        };
        make_dir(split(path)?.0)?;
        let file = Self::open(path, OpenMode::Create, AllowedOwner::Own, Duration::ZERO)?;
        match file.file.metadata() {
            Ok(metadata) if metadata.len() == 0 => Ok(file),
            _ => Err(Error::new(ErrorKind::Ledger, format!("another file has the path of {self}"))),
        }
    }

    /// The contents of the file; `None`: it holds nothing.
    ///
    /// # Errors
    /// As for [`Survey`]: [`ErrorKind::Ledger`] for a file that is damaged or forged.
    pub fn survey(&self) -> Result<Option<Survey>> {
        Survey::of(&self.file, Path::new(&self.to_string()))
    }

    /// The user that owns the file.
    pub fn owner(&self) -> u32 {
        self.file.metadata().map_or(u32::MAX, |metadata| metadata.uid())
    }

    /// Whether the next daemon would find the file, because its name still leads to it.
    pub fn is_reachable(&self) -> bool {
        match &self.location {
            // Check the path: its directory may have been removed or renamed.
            Location::Path(path) => path_leads_to(&self.file, path),
            // The process that has its name checks it.
            Location::FdStore { .. } | Location::Received(_) => true,
        }
    }

    /// Creates a file in the service manager's fd store.
    ///
    /// => The service manager has received the file before this returns, and so before the file holds any data.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the service manager does not keep it.
    pub fn create_in_fdstore(manager: &Arc<ServiceManager>, image: &ImageFacts) -> Result<Self> {
        let name = fdstore_name(manager, image);
        let create = || {
            let file = memfd::create(MEMFD_NAME)?;
            manager.fdstore_push(&name, &file)?;
            Ok(file)
        };
        let file =
            create().map_err(|e| Error::io(ErrorKind::Memory, "cannot keep the cache in systemd's fd store", e))?;
        Ok(Self { file, location: Location::FdStore { manager: Arc::clone(manager), name }, entry: None })
    }

    /// Takes an arena's entry of the service manager's fd store by its name; `None` if there is none, if it is empty,
    /// or if the name is not one of an arena.
    ///
    /// # Errors
    /// As [`ArenaFile::header`].
    pub fn take_named_from_fdstore(manager: &Arc<ServiceManager>, name: &str) -> Result<Option<Self>> {
        if !name.starts_with(FDSTORE_PREFIX) {
            return Ok(None);
        }
        let taken = manager.fdstore_take(name);
        let taken = taken.map_err(|e| Error::io(ErrorKind::Memory, format!("cannot take fd-store entry {name}"), e))?;
        let Some(file) = taken else { return Ok(None) };
        let location = Location::FdStore { manager: Arc::clone(manager), name: name.to_owned() };
        let file = Self { file, location, entry: None };
        if file.header()?.is_none() {
            // Its daemon died before it wrote any data to the file, or after it had written everything to the image.
            file.remove();
            return Ok(None);
        }
        Ok(Some(file))
    }

    /// Whether the file is in the service manager's fd store.
    pub fn is_in_fdstore(&self) -> bool {
        match &self.location {
            Location::Path(_) => false,
            Location::Received(description) => description.is_in_fdstore,
            Location::FdStore { .. } => true,
        }
    }

    /// How the operator can write the file's data to the image.
    pub fn recovery_hint(&self) -> String {
        match &self.location {
            Location::Path(path) => {
                format!("start the daemon again, or run \"genblk recover {}\"", path.display())
            }
            Location::Received(description) => description.recovery_hint.clone(),
            Location::FdStore { .. } => "start the unit again".to_owned(),
        }
    }

    /// How the operator can remove the file.
    pub fn removal_hint(&self) -> String {
        match &self.location {
            Location::Path(path) => format!("remove it with \"genblk recover --discard {}\"", path.display()),
            Location::Received(description) => description.removal_hint.clone(),
            Location::FdStore { .. } => {
                "stop the unit and remove it with \"systemctl clean --what=fdstore UNIT\"".to_owned()
            }
        }
    }

    /// Seals a file in the fd store against shrinking, which would raise SIGBUS in every process that maps it.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] for errors of fcntl(2).
    pub(super) fn seal(&self) -> Result<()> {
        let sealed = if self.is_in_fdstore() { memfd::forbid_shrinking(&self.file) } else { Ok(()) };
        sealed.map_err(|e| Error::io(ErrorKind::Memory, format!("cannot seal {self}"), e))
    }

    /// The header that the previous daemon wrote; `None` if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] for an unknown layout, and for an arena from an earlier boot of the host.
    pub fn header(&self) -> Result<Option<Header>> {
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot read {self}"), e);
        if self.file.metadata().map_err(failed)?.len() < HEADER_BYTES as u64 {
            return Ok(None);
        }
        // Mapped, because a file of huge pages can't be read.
        let mapping = Mapping::new(&self.file, HEADER_BYTES).map_err(failed)?;
        let mut bytes = [0; HEADER_BYTES];
        mapping.read(0, &mut bytes);
        let header = Header::decode(&bytes, self)?;
        if header.as_ref().is_some_and(|header| header.boot != boot_id()) {
            let hint = self.removal_hint();
            let why = "was written before the host's last boot, so its contents cannot be trusted";
            return Err(Error::new(ErrorKind::Ledger, format!("{self} {why}; {hint}")));
        }
        Ok(header)
    }

    /// Frees the file's memory except its header, which then has a frame count of 0: a loss marker. A file without a
    /// header becomes empty.
    ///
    /// => The daemon may be killed at any point: the recorded state of the guest stays.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the file cannot be changed; [`ErrorKind::Ledger`] as [`ArenaFile::header`].
    pub fn shrink_to_header(&self) -> Result<()> {
        let kept = if self.header()?.is_some() { HEADER_BYTES } else { 0 };
        let shrink = || {
            if kept > 0 {
                let mapping = Mapping::new(&self.file, HEADER_BYTES)?;
                mapping.store(field::FRAMES, 0);
                // A huge page is not freed in part, and the next cache's ledger must not find old contents in it.
                let rest = mapping.bytes() - HEADER_BYTES;
                if rest > 0 {
                    mapping.zero(HEADER_BYTES, rest);
                }
            }
            match mapping::set_length(&self.file, kept) {
                // The file is sealed.
                Err(_) if self.is_in_fdstore() => mapping::free_behind(&self.file, kept),
                result => result,
            }
        };
        shrink().map_err(|e| Error::io(ErrorKind::Memory, format!("cannot free the memory of {self}"), e))
    }

    /// Removes the file.
    pub fn remove(&self) {
        match &self.location {
            // If the file was already removed, another daemon's file may have its path.
            Location::Path(_) => {
                if let Some(entry) = self.entry.as_ref().filter(|entry| entry.leads_to(&self.file)) {
                    let _ = entry.unlink();
                }
            }
            Location::Received(description) => description.is_removed.store(true, Ordering::Release),
            Location::FdStore { manager, name } => {
                // The service manager does not confirm the removal, and the image changes from now on. So clear the
                // magic number: the next daemon must find no pages in the file if it receives it after all.
                let _ = self.file.write_all_at(&[0; 8], 0);
                manager.fdstore_remove(name);
            }
        }
    }
}

impl Drop for ArenaFile {
    /// Removes a file that is still empty.
    fn drop(&mut self) {
        if self.file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
            self.remove();
        }
    }
}

/// Whether `path` still leads to the open file.
fn path_leads_to(file: &File, path: &Path) -> bool {
    let (ours, found) = (file.metadata(), fs::symlink_metadata(path));
    matches!((ours, found), (Ok(ours), Ok(found)) if ours.ino() == found.ino() && ours.dev() == found.dev())
}

/// The name of an image's arena in the fd store. sd_notify(3) allows 255 characters and no colon.
///
/// => It differs from all names that the service manager passed: removing an entry removes all entries of the same
///    name.
fn fdstore_name(manager: &ServiceManager, image: &ImageFacts) -> String {
    let passed = manager.fdstore_names();
    let name = |serial| format!("{FDSTORE_PREFIX}{}", image.identity.file_name(image.size_bytes, serial));
    (0..NAMES_MAX).map(name).find(|name| !passed.contains(name)).unwrap_or_else(|| name(NAMES_MAX))
}

/// The directory and the name of a file.
fn split(path: &Path) -> Result<(&Path, &OsStr)> {
    let directory = path.parent().map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir });
    directory
        .zip(path.file_name())
        .ok_or_else(|| Error::new(ErrorKind::Ledger, format!("not a genblk cache file: {}", path.display())))
}

/// The process that holds the lock of a file (proc_locks(5)); `None` if it is in another PID namespace.
fn lock_holder(file: &File) -> Option<u32> {
    let metadata = file.metadata().ok()?;
    let (major, minor) = (libc::major(metadata.dev()), libc::minor(metadata.dev()));
    let id = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    // "1: FLOCK  ADVISORY  WRITE 1234 00:1a:5678 0 EOF"
    let mut held = locks.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let words = held.find(|words| words.get(1) == Some(&"FLOCK") && words.get(5) == Some(&id.as_str()))?;
    words[4].parse().ok().filter(|pid| *pid > 0)
}

/// Whether a directory has no entry.
fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none())
}

/// Creates a directory that only this user can write to, unless it exists.
fn make_dir(directory: &Path) -> Result<()> {
    match DirBuilder::new().recursive(true).mode(0o700).create(directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::io(ErrorKind::Memory, format!("cannot keep the cache in {}", directory.display()), e))
        }
        _ => Ok(()),
    }
}
