//! The file that holds an arena: where it is, which image it belongs to, and the lock that keeps it to one process.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ledger::{HEADER_BYTES, Header, boot_id, field};
use super::mapping::{self, MEMFD_NAME, Mapping};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::sys::memfd;
use crate::sys::process::effective_uid;
use crate::systemd::ServiceManager;

/// How long to wait before the next attempt to lock a file that another process has locked.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Prefix of an arena's name in the service manager's fd store.
const FDSTORE_PREFIX: &str = "genblk-cache-";

/// An open file for an image's arena, which no other daemon has open.
#[derive(Debug)]
pub struct ArenaFile {
    pub(super) file: File,
    location: Location,
}

/// Where a file outlives the daemon.
#[derive(Debug)]
enum Location {
    /// At a path in shared memory; the file is locked.
    Path(PathBuf),
    /// In the fd store of the service manager, which passes it only to the next daemon of the same unit.
    FdStore { manager: Arc<ServiceManager>, name: String },
}

impl fmt::Display for ArenaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.location {
            Location::Path(path) => write!(f, "{}", path.display()),
            Location::FdStore { name, .. } => write!(f, "fd-store entry {name}"),
        }
    }
}

impl ArenaFile {
    /// The directory of this user's arenas below `memory_dir`.
    pub fn dir(memory_dir: &Path) -> PathBuf {
        match effective_uid() {
            0 => memory_dir.join("genblk"),
            user => memory_dir.join(format!("genblk-{user}")),
        }
    }

    /// Opens and locks the file of an image, in this user's directory below `memory_dir`; creates both if needed.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the file cannot be created, or another user could change it; [`ErrorKind::Locked`]
    /// when another process holds its lock for longer than `patience`.
    pub fn open_for(memory_dir: &Path, identity: &ImageId, patience: Duration) -> Result<Self> {
        let directory = Self::dir(memory_dir);
        make_private_dir(&directory)?;
        let mut options = OpenOptions::new();
        Self::open(options.create(true).truncate(false), &directory.join(identity.file_name()), patience)
    }

    /// As [`ArenaFile::open_for`], but creates nothing: `None` if there is no file.
    ///
    /// => A directory that another user can write to counts as one without a file: no daemon keeps a cache there.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the file cannot be opened, or it is unknown whether there is one;
    /// [`ErrorKind::Locked`] as [`ArenaFile::open_for`].
    pub fn find_for(memory_dir: &Path, identity: &ImageId, patience: Duration) -> Result<Option<Self>> {
        let directory = Self::dir(memory_dir);
        let path = directory.join(identity.file_name());
        let found = is_private_dir(&directory).and_then(|is_private| Ok((is_private, fs::symlink_metadata(&path)?)));
        match found {
            Ok((false, _)) => Ok(None),
            Ok((true, _)) => Self::open(&mut OpenOptions::new(), &path, patience).map(Some),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(Error::io(ErrorKind::Memory, format!("cannot open {}", path.display()), e)),
        }
    }

    /// Opens and locks an existing file.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when the file is not named as an arena is. Such a file must stay as it is: a disk image
    /// that begins with zeros, for example, looks like an empty arena. Otherwise as [`ArenaFile::open_for`], without
    /// waiting.
    pub fn open_existing(path: &Path) -> Result<Self> {
        let shown = path.display();
        let metadata =
            fs::symlink_metadata(path).map_err(|e| Error::io(ErrorKind::Memory, format!("cannot open {shown}"), e))?;
        let has_name = path.file_name().and_then(OsStr::to_str).is_some_and(ImageId::is_file_name);
        if !metadata.is_file() || !has_name {
            return Err(Error::new(ErrorKind::Ledger, format!("not a genblk cache file: {shown}")));
        }
        Self::open(&mut OpenOptions::new(), path, Duration::ZERO)
    }

    fn open(options: &mut OpenOptions, path: &Path, patience: Duration) -> Result<Self> {
        let until = Instant::now() + patience;
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot open {}", path.display()), e);
        options.read(true).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        loop {
            let file = options.open(path).map_err(failed)?;
            if let Err(e) = file.try_lock() {
                if Instant::now() < until {
                    // The owner may remove the file meanwhile, so open it again.
                    std::thread::sleep(LOCK_RETRY);
                    continue;
                }
                let context = format!("another genblk process uses {}", path.display());
                return Err(Error::io(ErrorKind::Locked, context, e.into()));
            }
            // The previous owner may have removed the file between open() and the lock.
            if is_at(&file, path) {
                return Ok(Self { file, location: Location::Path(path.to_path_buf()) });
            }
        }
    }

    /// Creates a file in the service manager's fd store.
    ///
    /// => The service manager has the file before this returns, and so before it holds any data.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the service manager does not keep it.
    pub fn create_in_fdstore(manager: &Arc<ServiceManager>, identity: &ImageId) -> Result<Self> {
        let name = fdstore_name(identity);
        let create = || {
            let file = memfd::create(MEMFD_NAME)?;
            manager.fdstore_push(&name, &file)?;
            Ok(file)
        };
        let file =
            create().map_err(|e| Error::io(ErrorKind::Memory, "cannot keep the cache in systemd's fd store", e))?;
        Ok(Self { file, location: Location::FdStore { manager: Arc::clone(manager), name } })
    }

    /// Takes what the previous daemon left for an image in the service manager's fd store; `None` if that is nothing.
    ///
    /// # Errors
    /// As [`ArenaFile::header`].
    pub fn take_from_fdstore(manager: &Arc<ServiceManager>, identity: &ImageId) -> Result<Option<Self>> {
        Self::take_named_from_fdstore(manager, &fdstore_name(identity))
    }

    /// Whether an earlier daemon has left something for an image in the service manager's fd store.
    pub fn is_named_in_fdstore(manager: &ServiceManager, identity: &ImageId) -> bool {
        manager.fdstore_unclaimed(&[]).contains(&fdstore_name(identity))
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
        let file = Self { file, location: Location::FdStore { manager: Arc::clone(manager), name: name.to_owned() } };
        if file.header()?.is_none() {
            // Its daemon died before it put anything in, or after it had written everything to the image.
            file.remove();
            return Ok(None);
        }
        Ok(Some(file))
    }

    /// Whether the file is in the service manager's fd store.
    pub fn is_in_fdstore(&self) -> bool {
        matches!(self.location, Location::FdStore { .. })
    }

    /// How the operator gets the file's data to the image.
    pub fn recovery_hint(&self) -> String {
        match &self.location {
            Location::Path(path) => {
                format!("start the daemon again, or run \"genblk recover {}\"", path.display())
            }
            Location::FdStore { .. } => "start the unit again".to_owned(),
        }
    }

    /// How the operator removes the file.
    pub fn removal_hint(&self) -> String {
        match &self.location {
            Location::Path(path) => format!("remove it with \"genblk recover --discard {}\"", path.display()),
            Location::FdStore { .. } => {
                "stop the unit and remove it with \"systemctl clean --what=fdstore UNIT\"".to_owned()
            }
        }
    }

    /// Makes it impossible to shrink a file in the fd store, which would raise SIGBUS in every process that maps it.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] for those of fcntl(2).
    pub(super) fn seal(&self) -> Result<()> {
        let sealed = if self.is_in_fdstore() { memfd::forbid_shrinking(&self.file) } else { Ok(()) };
        sealed.map_err(|e| Error::io(ErrorKind::Memory, format!("cannot seal {self}"), e))
    }

    /// The header that the previous daemon left; `None` if it left none.
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

    /// Frees the file's memory except its header, which then says that there are no frames: a loss marker. A file
    /// without a header becomes empty.
    ///
    /// => The daemon may be killed at any point: what the header records of the guest stays.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the file cannot be changed; [`ErrorKind::Ledger`] as [`ArenaFile::header`].
    pub fn shrink_to_header(&self) -> Result<()> {
        let kept = if self.header()?.is_some() { HEADER_BYTES } else { 0 };
        let shrink = || {
            if kept > 0 {
                Mapping::new(&self.file, HEADER_BYTES)?.store(field::FRAMES, 0);
            }
            match mapping::set_length(&self.file, kept) {
                // It is sealed.
                Err(_) if self.is_in_fdstore() => mapping::free_behind(&self.file, kept),
                result => result,
            }
        };
        shrink().map_err(|e| Error::io(ErrorKind::Memory, format!("cannot free the memory of {self}"), e))
    }

    /// Removes the file.
    pub fn remove(&self) {
        match &self.location {
            Location::Path(path) if is_at(&self.file, path) => drop(fs::remove_file(path)),
            // Already removed; the path may hold another daemon's file by now.
            Location::Path(_) => {}
            Location::FdStore { manager, name } => {
                // The service manager does not confirm the removal, and the image changes from now on. So the next
                // daemon must find no pages in the file, should it still get it: clear the magic number.
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
fn is_at(file: &File, path: &Path) -> bool {
    let (ours, found) = (file.metadata(), fs::symlink_metadata(path));
    matches!((ours, found), (Ok(ours), Ok(found)) if ours.ino() == found.ino() && ours.dev() == found.dev())
}

/// The name of an image's arena in the fd store. sd_notify(3) allows 255 characters and no colon.
fn fdstore_name(identity: &ImageId) -> String {
    format!("{FDSTORE_PREFIX}{}", identity.file_name())
}

/// Creates a directory that only this user can write to, or checks that an existing one is so.
fn make_private_dir(directory: &Path) -> Result<()> {
    let context = format!("cannot keep the cache in {}", directory.display());
    let failed = |e| Error::io(ErrorKind::Memory, context.clone(), e);
    match DirBuilder::new().recursive(true).mode(0o700).create(directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
        _ => {}
    }
    if !is_private_dir(directory).map_err(failed)? {
        let why = "it is not a directory that only this user can write to";
        return Err(Error::new(ErrorKind::Memory, format!("{context}: {why}")));
    }
    Ok(())
}

/// Whether a path leads to a directory that only this user can write to.
fn is_private_dir(directory: &Path) -> io::Result<bool> {
    let metadata = fs::metadata(directory)?;
    let is_writable_by_others = metadata.mode() & 0o022 != 0;
    Ok(metadata.is_dir() && metadata.uid() == effective_uid() && !is_writable_by_others)
}
