//! The file that a named arena lives in: where it is, whose it is, and that only one process holds it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::ledger::{HEADER_BYTES, Header, Identity};
use super::mapping::Mapping;
use crate::error::{Error, ErrorKind, Result};

/// An open and locked file for an image's arena.
#[derive(Debug)]
pub struct Home {
    pub(super) file: File,
    path: PathBuf,
}

impl Home {
    /// The folder of this user's arenas below `memory_dir`.
    pub fn folder(memory_dir: &Path) -> PathBuf {
        match user() {
            0 => memory_dir.join("genblk"),
            user => memory_dir.join(format!("genblk-{user}")),
        }
    }

    /// The file of an image, in this user's folder below `memory_dir`, which is made if it is not there.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when there can be no such file, or others could touch it; [`ErrorKind::Locked`] when another
    /// process holds it.
    pub fn of(memory_dir: &Path, identity: &Identity) -> Result<Self> {
        let directory = Self::folder(memory_dir);
        make_private(&directory)?;
        Self::open(&directory.join(identity.file_name()), true)
    }

    /// A file that is there.
    ///
    /// # Errors
    /// As [`Home::of`].
    pub fn existing(path: &Path) -> Result<Self> {
        Self::open(path, false)
    }

    fn open(path: &Path, create: bool) -> Result<Self> {
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot open {}", path.display()), e);
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(create).truncate(false).mode(0o600);
            let file = options.custom_flags(libc::O_NOFOLLOW).open(path).map_err(failed)?;
            if let Err(e) = file.try_lock() {
                let context = format!("{} is held by another genblk", path.display());
                return Err(Error::io(ErrorKind::Locked, context, e.into()));
            }
            // Who held it before may have taken it away while we came.
            let home = Self { file, path: path.to_path_buf() };
            if home.is_at_its_path() {
                return Ok(home);
            }
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a predecessor has left. `None`: nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] for an arena of another layout, or of another boot of the host.
    pub fn header(&self) -> Result<Option<Header>> {
        let failed = |e| Error::io(ErrorKind::Memory, format!("cannot read {}", self.path.display()), e);
        if self.file.metadata().map_err(failed)?.len() < HEADER_BYTES as u64 {
            return Ok(None);
        }
        // Mapped, because a file of huge pages can't be read.
        let mapping = Mapping::new(&self.file, HEADER_BYTES).map_err(failed)?;
        let header = Header::decode(&mapping.read::<HEADER_BYTES>(), &self.path)?;
        match &header {
            Some(header) if header.boot != boot() => {
                let path = self.path.display();
                let context = format!(
                    "{path} is from before the host's last start, and what it holds can't be trusted; \
                     \"genblk recover --discard {path}\" removes it"
                );
                Err(Error::new(ErrorKind::Ledger, context))
            }
            _ => Ok(header),
        }
    }

    /// Removes the file: nothing in it is needed.
    pub fn remove(&self) {
        // If it is not ours, it has been removed before, and somebody else has made another.
        if self.is_at_its_path() {
            let _ = fs::remove_file(&self.path);
        }
    }

    fn is_at_its_path(&self) -> bool {
        let (ours, there) = (self.file.metadata(), fs::symlink_metadata(&self.path));
        matches!((ours, there), (Ok(ours), Ok(there)) if ours.ino() == there.ino() && ours.dev() == there.dev())
    }
}

impl Drop for Home {
    /// A file that nothing was put into is removed.
    fn drop(&mut self) {
        if self.file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
            self.remove();
        }
    }
}

/// Makes a directory that nobody else can reach into, or sees that it is one.
fn make_private(directory: &Path) -> Result<()> {
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

/// The host's boot, as 16 bytes; zeros where the kernel doesn't say.
pub(super) fn boot() -> [u8; 16] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).unwrap_or(0).to_be_bytes()
}
