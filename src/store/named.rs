//! An image that a configuration names: its interface for the start of a daemon and for the operator's commands,
//! whatever its store.
//!
//! A [`Backing`] is enough to serve an image. To find the cache that an earlier daemon left, the start also needs the
//! identity and the recorded history of the image, and must read and write it without a worker.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::Backing;
use super::format::Format;
use super::handed::{ImageParts, IoLock};
use super::history::LastTenure;
use crate::error::Result;
use crate::image_id::ImageId;
use crate::tenure::record::{Record, TenureState};
use crate::tenure::token::ChangeToken;
use crate::units::{PAGE_SIZE, PageNo};

/// The reason to treat an image as raw, known before it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownRaw {
    /// The configuration declares it as raw.
    Configured,
    /// An earlier daemon has served it, and left its cache.
    KeptCache,
}

/// A page of an image, aligned for every direct I/O that an image may require.
#[derive(Clone, Debug)]
#[repr(C, align(4096))]
pub struct PageBytes(pub [u8; PAGE_SIZE]);

/// The location of an image's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// In a regular file.
    File,
    /// On a block device.
    Device,
    /// On a server.
    Remote,
}

/// See the documentation of the module. Every method may wait for the image, unless its comment says otherwise.
pub trait NamedImage: Backing {
    /// The path or URI by which it was opened. Does not wait.
    fn path(&self) -> &Path;

    /// A name that is the same for all names of the image, as far as they can be recognised as equal.
    fn canonical_path(&self) -> PathBuf;

    /// The identity of the image, which does not depend on its name. Does not wait.
    fn identity(&self) -> ImageId;

    /// A name that a block device keeps when it is attached again; empty if none is known. Does not wait.
    fn alias(&self) -> String {
        String::new()
    }

    /// The location of its bytes. Does not wait.
    fn kind(&self) -> ImageKind;

    /// The mode in which it is read and written, for the log. Does not wait.
    fn io_mode(&self) -> String;

    /// The format other than raw that the image appeared to have when it was opened. Does not wait.
    fn found_format(&self) -> Option<Format>;

    /// Rejects an image that appears to have a format other than raw, unless `known_raw` gives a reason to treat it as
    /// raw.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Image`] with the format, and the remedies.
    fn check_format(&self, known_raw: Option<KnownRaw>) -> Result<()>;

    /// The record of the image's last tenure.
    ///
    /// # Errors
    /// Errors of the store.
    fn last_tenure(&self) -> io::Result<LastTenure> {
        Ok(LastTenure::NoRecords)
    }

    /// Starts a tenure: writes its record to the image. `false` if the image cannot carry one.
    ///
    /// # Errors
    /// Errors of the store.
    fn begin_tenure(&self, _record: Record) -> io::Result<bool> {
        Ok(false)
    }

    /// Writes a record of a tenure that has ended, if the image can carry one.
    ///
    /// # Errors
    /// Errors of the store.
    fn write_record(&self, _record: &Record) -> io::Result<()> {
        Ok(())
    }

    /// The open tenures of other images that share bytes with this one: of a file and the loop devices on it, or of a
    /// disk and its partitions.
    fn overlapping_tenures(&self) -> Vec<Record> {
        Vec::new()
    }

    /// Ends those tenures in this state.
    ///
    /// # Errors
    /// Errors of the store.
    fn end_overlapping_tenures(&self, _state: TenureState) -> io::Result<()> {
        Ok(())
    }

    /// Whether the record of its tenure is a file of this host, which only the process that opened the image writes.
    fn is_recorded_on_host(&self) -> bool {
        false
    }

    /// The change token of the image when it was opened, before this daemon changed anything. Does not wait.
    fn found_token(&self) -> ChangeToken;

    /// An earlier daemon died while it was changing the image: the requests that it had sent may still be executed.
    /// Does not wait.
    fn quarantine_earlier_writes(&self) {}

    /// Checks that this many workers can serve the image. Does not wait.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Config`] with the reason.
    fn check_workers(&self, _workers: u16) -> Result<()> {
        Ok(())
    }

    /// Opens the image again for the process that serves it: a separate open file description with the image's lock and
    /// the I/O lock, or a way to request connections, and the properties that were determined when it was opened.
    ///
    /// => While that process, or the kernel on its behalf, may still access the image, [`NamedImage::is_io_locked`]
    ///    returns true for this lock.
    ///
    /// # Errors
    /// Errors of the store; [`io::ErrorKind::Unsupported`] if only the process that opened an image can serve it.
    fn reopen_for_process(&self, _io_lock: IoLock) -> io::Result<(File, ImageParts)> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether a descriptor that was handed out with this I/O lock is still open somewhere.
    fn is_io_locked(&self, _io_lock: IoLock) -> bool {
        false
    }

    /// Its present size in bytes, if that is cheap to determine: it must not wait for a file server. `None`: unknown.
    fn present_size(&self) -> Option<u64> {
        None
    }

    /// Grows the image to `size_bytes` if it is smaller; without a size, applies its present one. Returns the size with
    /// which it is served from now on. May wait.
    ///
    /// # Errors
    /// Why it cannot have that size; in that case nothing has changed.
    fn grow(&self, _size_bytes: Option<u64>) -> std::result::Result<u64, String> {
        Err("the size of this kind of image cannot change while it is served; detach the disk, and attach it again"
            .to_owned())
    }

    /// Checks whether the image can shrink to `size_bytes`. Returns the size with which it is served.
    ///
    /// # Errors
    /// Why it cannot.
    fn check_shrink(&self, _size_bytes: u64) -> std::result::Result<u64, String> {
        Err("the size of this kind of image cannot change while it is served; detach the disk, and attach it again"
            .to_owned())
    }

    /// Cuts the image to `size_bytes`, and serves it with that size from now on. May wait.
    ///
    /// => [`NamedImage::check_shrink`] has allowed it, and nobody uses the image beyond that end.
    ///
    /// # Errors
    /// Why it cannot be cut; in that case nothing has changed.
    fn truncate(&self, _size_bytes: u64) -> std::result::Result<(), String> {
        Err("this kind of image cannot shrink while it is served".to_owned())
    }

    /// Reads a page; the part past the end of the image is zeros.
    ///
    /// # Errors
    /// Errors of the store.
    fn read_page(&self, page: PageNo) -> io::Result<Box<PageBytes>>;

    /// Makes a range (in bytes) read as zeros and keeps its space.
    ///
    /// => No other operation on the range is in flight.
    ///
    /// # Errors
    /// Errors of the store.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Access for writing without a worker.
    ///
    /// # Errors
    /// Errors of the store.
    fn writer(&self) -> io::Result<Box<dyn BlockWriter + '_>>;
}

/// Writes to an image without a worker. Each method waits for the image.
pub trait BlockWriter {
    /// Writes whole sectors at byte `offset`.
    ///
    /// # Errors
    /// Errors of the store, and an error for a range past the end of the image.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes all writes durable.
    ///
    /// # Errors
    /// Errors of the store: writes since the last success are then in doubt.
    fn sync(&mut self) -> io::Result<()>;
}

impl fmt::Debug for dyn BlockWriter + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockWriter").finish_non_exhaustive()
    }
}
