//! The image lock: the same bytes that QEMU locks (block/file-posix.c), so that each refuses the other's images.
//!
//! QEMU describes an opener by the permissions it takes and those it does not share with others. Permission `n` taken
//! is a shared lock on byte 100 + n; permission `n` not shared is one on byte 200 + n. All locks are shared ones, so
//! that a read-only descriptor can hold them; a conflict is found by asking who holds the opposite byte. The locks
//! belong to the open file description: they end with it, and a second opener in the same process conflicts too.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::file::OpenOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::file::{is_byte_locked, lock_byte, unlock_byte};

/// Byte of permission 0 taken (RAW_LOCK_PERM_BASE).
const TAKEN_BASE: u64 = 100;
/// Byte of permission 0 not shared (RAW_LOCK_SHARED_BASE).
const UNSHARED_BASE: u64 = 200;

/// How often a conflict is looked at again.
const PAUSE: Duration = Duration::from_millis(20);

// Permissions by bit number (BLK_PERM_* in QEMU's include/block/block-common.h).
const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// Nobody else may change the image under us, be it open for writing or as one of many readers: a changed byte would
/// make the cache wrong.
const UNSHARED: [u64; 2] = [WRITE, RESIZE];

/// Locks an image until [`release`], or until its file is closed for good.
///
/// => A writable opener excludes every other but one that shares writes on purpose; readers share with readers.
///
/// # Errors
/// [`ErrorKind::Locked`] when another opener's locks conflict, [`ErrorKind::Image`] when locking itself fails. A file
/// system without locks is no error: a warning says so.
pub(super) fn acquire(file: &File, path: &Path, options: &OpenOptions) -> Result<()> {
    let until = Instant::now() + options.lock_patience;
    loop {
        match try_acquire(file, path, options.read_only) {
            Err(error) if error.kind() == ErrorKind::Locked && Instant::now() < until => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
}

fn try_acquire(file: &File, path: &Path, read_only: bool) -> Result<()> {
    let taken: &[u64] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE] };
    if let Err(error) = is_byte_locked(file, TAKEN_BASE) {
        log::warn!("image {}: its file system has no locks ({error}); nothing guards it", path.display());
        return Ok(());
    }
    // A refused opener must not stand in the way of the next.
    take_and_check(file, path, taken).inspect_err(|_| release(file, path))
}

/// Takes everything first, then looks: of two that open at once at least one sees the other.
fn take_and_check(file: &File, path: &Path, taken: &[u64]) -> Result<()> {
    for &bit in taken {
        take(file, path, TAKEN_BASE + bit)?;
    }
    for bit in UNSHARED {
        take(file, path, UNSHARED_BASE + bit)?;
    }
    for &bit in taken {
        let refusal = if bit == WRITE { "does not allow a writer" } else { "does not allow a reader" };
        check(file, path, UNSHARED_BASE + bit, refusal)?;
    }
    for bit in UNSHARED {
        check(file, path, TAKEN_BASE + bit, if bit == WRITE { "writes to it" } else { "may resize it" })?;
    }
    Ok(())
}

/// Ends the lock before the file is closed.
///
/// => Closing alone would do it late: a child process that was forked and has not reached exec() still holds a copy of
///    the descriptor, and a ring lets go of its registered file in the background.
pub(super) fn release(file: &File, path: &Path) {
    for byte in (0..=RESIZE).flat_map(|bit| [TAKEN_BASE + bit, UNSHARED_BASE + bit]) {
        if let Err(error) = unlock_byte(file, byte) {
            log::debug!("image {}: cannot unlock byte {byte}: {error}", path.display());
        }
    }
}

/// Takes a shared lock on one byte.
fn take(file: &File, path: &Path, byte: u64) -> Result<()> {
    match lock_byte(file, byte) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(conflict(path, "holds an exclusive lock on it"))
        }
        Err(error) => Err(failed(path, error)),
    }
}

/// Fails if another opener holds `byte`.
fn check(file: &File, path: &Path, byte: u64, held: &str) -> Result<()> {
    match is_byte_locked(file, byte) {
        Ok(false) => Ok(()),
        Ok(true) => Err(conflict(path, held)),
        Err(error) => Err(failed(path, error)),
    }
}

fn conflict(path: &Path, held: &str) -> Error {
    Error::new(ErrorKind::Locked, format!("image {} is in use: another opener {held}", path.display()))
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::io(ErrorKind::Image, format!("cannot lock image {}", path.display()), error)
}
