//! The file that a named arena lives in: where it is, whose it is, and that only one process holds it.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ledger::{HEADER_BYTES, Header, boot_id};
use super::mapping::{self, Mapping};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::systemd::ServiceManager;

/// How often a file that another process holds is looked at again.
const PAUSE: Duration = Duration::from_millis(20);

/// What the names of arenas in the service manager's store begin with.
const FDSTORE_PREFIX: &str = "genblk-cache-";

/// An open file for an image's arena, that no other daemon has.
#[derive(Debug)]
pub struct ArenaFile {
    pub(super) file: File,
    location: Location,
}

/// Where a file outlives the daemon.
#[derive(Debug)]
enum Location {
    /// At a path in shared memory, locked.
    Path(PathBuf),
    /// With the service manager, which hands it to nobody but the next daemon of the same unit.
    Store { manager: Arc<ServiceManager>, name: String },
}

impl fmt::Display for ArenaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.location {
            Location::Path(path) => write!(f, "{}", path.display()),
            Location::Store { name, .. } => write!(f, "the service manager's descriptor {name}"),
        }
    }
}

impl ArenaFile {
    /// The folder of this user's arenas below `memory_dir`.
    pub fn dir(memory_dir: &Path) -> PathBuf {
        match user() {
            0 => memory_dir.join("genblk"),
            user => memory_dir.join(format!("genblk-{user}")),
        }
    }

    /// The file of an image, in this user's folder below `memory_dir`, which is made if it is not there.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when there can be no such file, or others could touch it; [`ErrorKind::Locked`] when another
    /// process holds it for longer than `patience`.
    pub fn open_for(memory_dir: &Path, identity: &ImageId, patience: Duration) -> Result<Self> {
        let directory = Self::dir(memory_dir);
        make_private_dir(&directory)?;
        Self::open(&directory.join(identity.file_name()), true, patience)
    }

    /// A file that is there.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] for what can't be an arena, and is better not touched: a disk image, for one, may look like an
    /// empty arena; otherwise as [`ArenaFile::open_for`], without patience.
    pub fn open_existing(path: &Path) -> Result<Self> {
        let metadata = fs::symlink_metadata(path);
        let metadata =
            metadata.map_err(|e| Error::io(ErrorKind::Memory, format!("cannot open {}", path.display()), e))?;
        let is_named_so = path.file_name().and_then(OsStr::to_str).is_some_and(ImageId::is_file_name);
        if !metadata.is_file() || !is_named_so {
            let context = format!("{} is not what a genblk has left behind", path.display());
            return Err(Error::new(ErrorKind::Ledger, context));
        }
        Self::open(path, false, Duration::ZERO)
    }

    fn open(path: &Path, create: bool, patience: Duration) -> Result<Self> {
        let until = Instant::now() + patience;
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot open {}", path.display()), e);
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(create).truncate(false).mode(0o600);
            let file = options.custom_flags(libc::O_NOFOLLOW).open(path).map_err(failed)?;
            if let Err(e) = file.try_lock() {
                if Instant::now() < until {
                    // It may be gone by then: it is opened anew.
                    std::thread::sleep(PAUSE);
                    continue;
                }
                let context = format!("{} is held by another genblk", path.display());
                return Err(Error::io(ErrorKind::Locked, context, e.into()));
            }
            // Who held it before may have taken it away while we came.
            if is_at(&file, path) {
                return Ok(Self { file, location: Location::Path(path.to_path_buf()) });
            }
        }
    }

    /// A new one in the service manager's store, which has it before this returns, and so before anything is put there.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the service manager does not keep it.
    pub fn create_in_fdstore(manager: &Arc<ServiceManager>, identity: &ImageId) -> Result<Self> {
        let name = fdstore_name(identity);
        let make = || {
            let file = mapping::memfd()?;
            manager.fdstore_push(&name, &file)?;
            Ok(file)
        };
        let file = make().map_err(|e| Error::io(ErrorKind::Memory, "systemd can't keep the cache", e))?;
        Ok(Self { file, location: Location::Store { manager: Arc::clone(manager), name } })
    }

    /// What a predecessor left in the service manager's store for an image; `None`: nothing.
    ///
    /// # Errors
    /// As [`ArenaFile::header`].
    pub fn take_from_fdstore(manager: &Arc<ServiceManager>, identity: &ImageId) -> Result<Option<Self>> {
        Self::take_named_from_fdstore(manager, &fdstore_name(identity))
    }

    /// What is in the service manager's store under a name of ours; `None`: nothing, or no name of ours.
    ///
    /// # Errors
    /// As [`ArenaFile::header`].
    pub fn take_named_from_fdstore(manager: &Arc<ServiceManager>, name: &str) -> Result<Option<Self>> {
        let Some(file) =
            Some(name).filter(|name| name.starts_with(FDSTORE_PREFIX)).and_then(|name| manager.fdstore_take(name))
        else {
            return Ok(None);
        };
        let file = Self { file, location: Location::Store { manager: Arc::clone(manager), name: name.to_owned() } };
        if file.header()?.is_none() {
            // Its daemon died before there was anything in it, or when all of it was on the image.
            file.remove();
            return Ok(None);
        }
        Ok(Some(file))
    }

    /// Whether the service manager has it.
    pub fn is_in_fdstore(&self) -> bool {
        matches!(self.location, Location::Store { .. })
    }

    /// What the operator can do so that nothing in it is lost.
    pub fn recovery_hint(&self) -> String {
        match &self.location {
            Location::Path(path) => format!("for the next start, or for \"genblk recover {}\"", path.display()),
            Location::Store { .. } => "for the unit's next start".to_owned(),
        }
    }

    /// What the operator can do to be rid of it.
    fn removal_hint(&self) -> String {
        match &self.location {
            Location::Path(path) => format!("\"genblk recover --discard {}\" removes it", path.display()),
            Location::Store { .. } => {
                "\"systemctl clean --what=fdstore\" removes it when the unit is stopped".to_owned()
            }
        }
    }

    /// Sees to it that nobody can make the file of a stored arena shorter: that would be SIGBUS to whoever has it mapped.
    pub(super) fn seal(&self) -> io::Result<()> {
        // SAFETY: a plain system call on our own descriptor.
        if self.is_in_fdstore()
            && unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) } < 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// What a predecessor has left. `None`: nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] for an arena of another layout, or of another boot of the host.
    pub fn header(&self) -> Result<Option<Header>> {
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot read {self}"), e);
        if self.file.metadata().map_err(failed)?.len() < HEADER_BYTES as u64 {
            return Ok(None);
        }
        // Mapped, because a file of huge pages can't be read.
        let mapping = Mapping::new(&self.file, HEADER_BYTES).map_err(failed)?;
        let header = Header::decode(&mapping.read::<HEADER_BYTES>(), self)?;
        match &header {
            Some(header) if header.boot != boot_id() => {
                let context = format!(
                    "{self} is from before the host's last start, and what it holds can't be trusted; {}",
                    self.removal_hint()
                );
                Err(Error::new(ErrorKind::Ledger, context))
            }
            _ => Ok(header),
        }
    }

    /// Leaves nothing of the file but its header. False: that can't be.
    pub(super) fn shrink_to_header(&self) -> bool {
        !self.is_in_fdstore() && self.file.set_len(HEADER_BYTES as u64).is_ok()
    }

    /// Removes the file: nothing in it is needed.
    pub fn remove(&self) {
        match &self.location {
            // If it is not ours, it has been removed before, and somebody else has made another.
            Location::Path(path) if is_at(&self.file, path) => drop(fs::remove_file(path)),
            Location::Path(_) => {}
            Location::Store { manager, name } => {
                // Nobody says when the service manager has let go of it. A successor must not take pages for clean that
                // the image may not have any more by then, so it is to find nothing.
                let _ = self.file.write_all_at(&[0; 8], 0);
                manager.fdstore_remove(name);
            }
        }
    }
}

impl Drop for ArenaFile {
    /// A file that nothing was put into is removed.
    fn drop(&mut self) {
        if self.file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
            self.remove();
        }
    }
}

/// Whether the file is what is at a path.
fn is_at(file: &File, path: &Path) -> bool {
    let (ours, there) = (file.metadata(), fs::symlink_metadata(path));
    matches!((ours, there), (Ok(ours), Ok(there)) if ours.ino() == there.ino() && ours.dev() == there.dev())
}

/// A descriptor's name of its own for each image; at most 255 characters, and no colon (sd_notify(3)).
fn fdstore_name(identity: &ImageId) -> String {
    format!("{FDSTORE_PREFIX}{}", identity.file_name())
}

/// Makes a directory that nobody else can reach into, or sees that it is one.
fn make_private_dir(directory: &Path) -> Result<()> {
    let shown = directory.display();
    let failed = |e| Error::io(ErrorKind::Memory, format!("cannot keep the cache in {shown}"), e);
    match DirBuilder::new().recursive(true).mode(0o700).create(directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
        _ => {}
    }
    let metadata = fs::metadata(directory).map_err(failed)?;
    if !metadata.is_dir() || metadata.uid() != user() || metadata.mode() & 0o022 != 0 {
        let why = "it is not a directory that only this user can write";
        return Err(Error::new(ErrorKind::Memory, format!("cannot keep the cache in {shown}: {why}")));
    }
    Ok(())
}

fn user() -> u32 {
    // SAFETY: geteuid() has no preconditions and can't fail.
    unsafe { libc::geteuid() }
}
