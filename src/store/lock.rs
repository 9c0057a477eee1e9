//! The image lock: the bytes that QEMU locks (block/file-posix.c), so that genblk and QEMU each reject an image that
//! the other has open.
//!
//! QEMU describes an opener by the permissions that it takes and by those that it does not share with others. A lock on
//! byte 100 + n means that permission `n` is taken, a lock on byte 200 + n that it is not shared. All locks are shared
//! locks, so that a read-only descriptor can hold them; an opener detects a conflict by testing whether another one
//! holds the opposite byte. The locks belong to the open file description: they end with it, and a second opener in the
//! same process conflicts too.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::file::{is_byte_locked, lock_byte, unlock_byte};
use crate::sys::process::{DEATH_TIMEOUT, other_process_with};

/// The access of an opener to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LockMode {
    /// Reads it; any number of readers may share an image.
    ReadOnly,
    /// Reads and writes it, as the only opener.
    ReadWrite,
    /// Reads a part of it, of which others may write other parts: the part behind a loop device.
    PartReadOnly,
    /// Reads and writes a part of it, of which others may write other parts.
    PartReadWrite,
}

impl LockMode {
    /// The permissions that it takes.
    fn taken(self) -> &'static [u64] {
        match self {
            Self::ReadOnly | Self::PartReadOnly => &[CONSISTENT_READ],
            Self::ReadWrite | Self::PartReadWrite => &[CONSISTENT_READ, WRITE],
        }
    }

    /// The permissions that it does not share. No other opener may change the bytes of the image, whether this one has
    /// it open for writing or as one of many readers: a changed byte would make the cache wrong.
    fn unshared(self) -> &'static [u64] {
        match self {
            Self::ReadOnly | Self::ReadWrite => &[WRITE, RESIZE],
            Self::PartReadOnly | Self::PartReadWrite => &[RESIZE],
        }
    }

    /// The same access to a part of a file.
    pub(super) fn to_part(self) -> Self {
        match self {
            Self::ReadOnly | Self::PartReadOnly => Self::PartReadOnly,
            Self::ReadWrite | Self::PartReadWrite => Self::PartReadWrite,
        }
    }
}

/// Byte of permission 0 taken (RAW_LOCK_PERM_BASE).
const TAKEN_BASE: u64 = 100;
/// Byte of permission 0 not shared (RAW_LOCK_SHARED_BASE).
const UNSHARED_BASE: u64 = 200;

/// How long to wait before checking for a conflict again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// The same, if each check also searches for the processes that have the image open.
const DEATH_RETRY_PAUSE: Duration = Duration::from_millis(200);

// Permissions by bit number (BLK_PERM_* in QEMU's include/block/block-common.h).
const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// Locks an image until [`release`], or until the last copy of its descriptor is closed. Waits for at most `timeout`
/// while another opener's locks conflict, and longer if no living process can be found that has the image open. Log
/// lines begin with `label`.
///
/// => A writer excludes every other opener except one that shares writes on purpose. Readers share with readers.
///
/// # Errors
/// [`ErrorKind::Locked`] when another opener's locks conflict, [`ErrorKind::Image`] when locking itself fails. A file
/// system without locks is not an error: a warning is logged.
pub(super) fn acquire(file: &File, path: &Path, label: &str, access: LockMode, timeout: Duration) -> Result<()> {
    let began = Instant::now();
    let mut is_reported = false;
    loop {
        match try_acquire(file, path, label, access) {
            Err(error) if error.kind() == ErrorKind::Locked && began.elapsed() < timeout => {
                std::thread::sleep(RETRY_PAUSE);
            }
            Err(error) if error.kind() == ErrorKind::Locked => {
                // The locks belong to open file descriptions, so the kernel does not report which process holds them.
                let user = other_process_with(file).map(|(pid, name)| format!("; pid {pid} ({name}) has it open"));
                if user.is_none() && !timeout.is_zero() && began.elapsed() < DEATH_TIMEOUT {
                    // Most likely the lock of a killed daemon of which only I/O in flight remains; or that of a process
                    // which is not visible to this user.
                    if !std::mem::replace(&mut is_reported, true) {
                        let max = DEATH_TIMEOUT.as_secs();
                        log::info!("{label}: locked, but no visible process has it open; waiting up to {max} s");
                    }
                    std::thread::sleep(DEATH_RETRY_PAUSE);
                    continue;
                }
                return Err(Error::new(ErrorKind::Locked, format!("{error}{}", user.unwrap_or_default())));
            }
            result => return result,
        }
    }
}

fn try_acquire(file: &File, path: &Path, label: &str, access: LockMode) -> Result<()> {
    if let Err(error) = is_byte_locked(file, TAKEN_BASE) {
        log::warn!("{label}: the file system has no locks ({error}); nothing keeps other writers out");
        return Ok(());
    }
    // After a conflict, the locks taken so far must not block the next opener.
    take_and_check(file, path, access).inspect_err(|_| release(file, label))
}

/// Whether another opener's locks conflict with this access now. Takes no lock.
pub(super) fn is_in_use(file: &File, access: LockMode) -> bool {
    let unshared = access.taken().iter().map(|permission| UNSHARED_BASE + permission);
    let mut bytes = unshared.chain(access.unshared().iter().map(|permission| TAKEN_BASE + permission));
    // A file system without locks has none.
    bytes.any(|byte| is_byte_locked(file, byte).unwrap_or(false))
}

/// Takes every lock first, and then checks for conflicts: of two openers at the same time, at least one finds the
/// other.
fn take_and_check(file: &File, path: &Path, access: LockMode) -> Result<()> {
    for permission in access.taken() {
        take(file, path, TAKEN_BASE + permission)?;
    }
    for permission in access.unshared() {
        take(file, path, UNSHARED_BASE + permission)?;
    }
    for &permission in access.taken() {
        let conflict = if permission == WRITE { "does not allow a writer" } else { "does not allow a reader" };
        check(file, path, UNSHARED_BASE + permission, conflict)?;
    }
    for &permission in access.unshared() {
        let conflict = if permission == WRITE { "writes to it" } else { "may resize it" };
        check(file, path, TAKEN_BASE + permission, conflict)?;
    }
    Ok(())
}

/// Releases the lock before the file is closed.
///
/// => A close alone would release it late: a forked child process has a copy of the descriptor until its exec(), and
///    the kernel releases a ring's registered file in the background.
pub(super) fn release(file: &File, label: &str) {
    for byte in (0..=RESIZE).flat_map(|permission| [TAKEN_BASE + permission, UNSHARED_BASE + permission]) {
        if let Err(error) = unlock_byte(file, byte) {
            log::debug!("{label}: cannot unlock byte {byte}: {error}");
        }
    }
}

/// Locks another open file description of an image that this process has locked, in the same way.
///
/// => It needs no check: the locks of the first one exclude all others.
pub(super) fn share(file: &File, access: LockMode) {
    let unshared = access.unshared().iter().map(|permission| UNSHARED_BASE + permission);
    for byte in access.taken().iter().map(|permission| TAKEN_BASE + permission).chain(unshared) {
        // Fails only on a file system without locks, which the log has reported.
        let _ = lock_byte(file, byte);
    }
}

/// Takes a shared lock on one byte.
fn take(file: &File, path: &Path, byte: u64) -> Result<()> {
    match lock_byte(file, byte) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(in_use(path, "holds an exclusive lock on it"))
        }
        Err(error) => Err(cannot_lock(path, error)),
    }
}

/// Fails if another opener holds `byte`; `conflict` describes what that means.
fn check(file: &File, path: &Path, byte: u64, conflict: &str) -> Result<()> {
    match is_byte_locked(file, byte) {
        Ok(false) => Ok(()),
        Ok(true) => Err(in_use(path, conflict)),
        Err(error) => Err(cannot_lock(path, error)),
    }
}

fn in_use(path: &Path, conflict: &str) -> Error {
    Error::new(ErrorKind::Locked, format!("image {} is in use: another opener {conflict}", path.display()))
}

fn cannot_lock(path: &Path, error: io::Error) -> Error {
    Error::io(ErrorKind::Image, format!("cannot lock image {}", path.display()), error)
}
