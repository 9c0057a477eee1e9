//! Only those cache files are used that no other user could have created or can change. A forged ledger would make a
//! daemon, or root's "genblk recover", write bytes of the forger's choice to an image of the forger's choice.
//!
//! Everything is checked on open descriptors. A file is opened and removed relative to its open directory, because the
//! path of the directory may change meanwhile.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::dir::{OpenMode, open_at, stat_at, unlink_at};
use crate::sys::process::effective_uid;

/// Mode bits by which group and others may write.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// Mode bit by which everyone may write.
const WRITABLE_BY_ALL: u32 = 0o002;
/// Mode bit by which only the owner of a file may rename or remove it.
const STICKY: u32 = 0o1000;

/// The owners whose files are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowedOwner {
    /// Files of this user.
    Own,
    /// Files of every user. For root, which may list and remove them, but must not trust their contents.
    Anyone,
}

/// An open directory of cache files, which only its owner can write to.
#[derive(Debug)]
pub(super) struct TrustedDir {
    dir: File,
    owner: u32,
}

impl TrustedDir {
    /// Opens and checks a directory.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when another user could have created a file in it; [`ErrorKind::Memory`] when it cannot be
    /// opened.
    pub(super) fn open(path: &Path, allowed: AllowedOwner) -> Result<Self> {
        let shown = path.display();
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot open {shown}"), e);
        let distrusted = |why: String| {
            let context = format!("caches in {shown} cannot be trusted: {why}");
            Err(Error::new(ErrorKind::Ledger, format!("{context}; remove it, or use another memory directory")))
        };
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let dir = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)) => {
                return distrusted("it is not a directory".to_owned());
            }
            result => result.map_err(failed)?,
        };
        let metadata = dir.metadata().map_err(failed)?;
        let (owner, user) = (metadata.uid(), effective_uid());
        if owner != user && (allowed == AllowedOwner::Own || user != 0) {
            return distrusted(format!("it belongs to user {owner}, not to user {user}"));
        }
        if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
            return distrusted(format!("other users can write to it (mode {:o})", metadata.mode() & 0o7777));
        }
        let (_, _, parent) = stat_at(&dir, OsStr::new("..")).map_err(failed)?;
        if parent & WRITABLE_BY_ALL != 0 && parent & STICKY == 0 {
            return distrusted("everyone can replace it, because the directory above it is not sticky".to_owned());
        }
        Ok(Self { dir, owner })
    }

    /// Opens a file in the directory.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when another user could have made the file or can change it; [`ErrorKind::Memory`] when it
    /// cannot be opened. `shown` names it in messages.
    pub(super) fn open_file(&self, name: &OsStr, access: OpenMode, shown: &Path) -> Result<File> {
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot open {}", shown.display()), e);
        let distrusted = |why: String| {
            Err(Error::new(ErrorKind::Ledger, format!("cache file {} cannot be trusted: {why}", shown.display())))
        };
        let file = match open_at(&self.dir, name, access) {
            Err(e) if e.raw_os_error() == Some(libc::ELOOP) => return distrusted("it is a symbolic link".to_owned()),
            result => result.map_err(failed)?,
        };
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(Error::new(ErrorKind::Ledger, format!("not a genblk cache file: {}", shown.display())));
        }
        if metadata.uid() != self.owner {
            return distrusted(format!("it belongs to user {}, and its directory to {}", metadata.uid(), self.owner));
        }
        if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
            return distrusted(format!("other users can write to it (mode {:o})", metadata.mode() & 0o7777));
        }
        if metadata.nlink() > 1 {
            return distrusted("it has more than one hard link".to_owned());
        }
        Ok(file)
    }

    /// Creates an empty file of the directory's owner, unless there is a file of this name.
    ///
    /// # Errors
    /// Errors of open(2) and fchown(2).
    pub(super) fn create_file(&self, name: &OsStr) -> io::Result<()> {
        match open_at(&self.dir, name, OpenMode::CreateNew) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            // In the directory of another user, a file of root would not be trusted.
            Ok(file) if self.owner != effective_uid() => fchown(&file, Some(self.owner), None),
            result => result.map(drop),
        }
    }

    /// The name of an open file in the directory.
    pub(super) fn entry(self, name: &OsStr) -> DirEntry {
        DirEntry { dir: self.dir, name: name.to_owned() }
    }

    /// The directory's owner.
    pub(super) fn owner(&self) -> u32 {
        self.owner
    }
}

/// A name in an open directory.
#[derive(Debug)]
pub(super) struct DirEntry {
    dir: File,
    name: OsString,
}

impl DirEntry {
    /// Whether the name leads to the open file.
    pub(super) fn leads_to(&self, file: &File) -> bool {
        let (ours, found) = (file.metadata(), stat_at(&self.dir, &self.name));
        matches!((ours, found), (Ok(ours), Ok((dev, ino, _))) if (ours.dev(), ours.ino()) == (dev, ino))
    }

    /// Removes the name.
    pub(super) fn unlink(&self) -> io::Result<()> {
        unlink_at(&self.dir, &self.name)
    }
}
