//! An image that a configuration names: what the start of a daemon and the operator's commands ask of it, whatever
//! store it is in.
//!
//! A [`Backing`] is enough to serve an image. To find the cache that an earlier daemon left, the start must also know
//! which image it is and what it tells about its past, and read and write it without a worker.

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
use crate::tenure::record::Record;
use crate::tenure::token::ChangeToken;
use crate::units::{PAGE_SIZE, PageNo};

/// How it is known, before an image is opened, that it is raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownRaw {
    /// The operator says so.
    Configured,
    /// An earlier daemon has served it, and left its cache.
    KeptCache,
}

/// A page of an image, aligned for every direct I/O that an image may demand.
#[derive(Clone, Debug)]
#[repr(C, align(4096))]
pub struct PageBytes(pub [u8; PAGE_SIZE]);

/// Where the bytes of an image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// In a regular file.
    File,
    /// On a block device.
    Device,
    /// At a server.
    Remote,
}

/// See the module. Every method but those with another comment may wait for the image.
pub trait NamedImage: Backing {
    /// The name by which it was opened: a path or a URI. Does not wait.
    fn path(&self) -> &Path;

    /// The same name for all names of the image, as far as they can be told apart from others.
    fn canonical_path(&self) -> PathBuf;

    /// What the image is, whatever its name. Does not wait.
    fn identity(&self) -> ImageId;

    /// A name that a block device keeps when it is attached again; empty if none is known. Does not wait.
    fn alias(&self) -> String {
        String::new()
    }

    /// Where its bytes are. Does not wait.
    fn kind(&self) -> ImageKind;

    /// How it is read and written, for the log. Does not wait.
    fn io_mode(&self) -> String;

    /// The format other than raw that the image looked like when it was opened. Does not wait.
    fn found_format(&self) -> Option<Format>;

    /// Refuses an image that looks like another format than raw, unless `known_raw` says that it is raw anyway.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Image`] with the format, and what the operator can do.
    fn check_format(&self, known_raw: Option<KnownRaw>) -> Result<()>;

    /// What the image says of its last tenure.
    ///
    /// # Errors
    /// Those of the store.
    fn last_tenure(&self) -> io::Result<LastTenure> {
        Ok(LastTenure::NoRecords)
    }

    /// Begins a tenure: writes its record to the image. `false` if the image cannot carry one.
    ///
    /// # Errors
    /// Those of the store.
    fn begin_tenure(&self, _record: Record) -> io::Result<bool> {
        Ok(false)
    }

    /// Writes a record of a tenure that has ended, if the image can carry one.
    ///
    /// # Errors
    /// Those of the store.
    fn write_record(&self, _record: &Record) -> io::Result<()> {
        Ok(())
    }

    /// What was known about the last change of the image when it was opened, before this daemon changed anything. Does
    /// not wait.
    fn found_token(&self) -> ChangeToken;

    /// An earlier daemon has died while it was changing the image: what it had sent may still be executed. Does not
    /// wait.
    fn quarantine_earlier_writes(&self) {}

    /// Checks that so many workers can serve the image. Does not wait.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Config`] with the reason.
    fn check_workers(&self, _workers: u16) -> Result<()> {
        Ok(())
    }

    /// The image once more, for the process that serves it: an open file description of its own with the image's lock
    /// and the I/O lock, or a way to ask for connections, and what was found out about the image.
    ///
    /// => While that process, or the kernel on its behalf, may still access the image, [`NamedImage::is_io_locked`]
    ///    returns true for this lock.
    ///
    /// # Errors
    /// Those of the store; [`io::ErrorKind::Unsupported`] for one whose images only the process can serve that has
    /// opened them.
    fn hand_out(&self, _fence: IoLock) -> io::Result<(File, ImageParts)> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether a descriptor that was handed out with this I/O lock is still open somewhere.
    fn is_io_locked(&self, _fence: IoLock) -> bool {
        false
    }

    /// Its present size in bytes, if that is cheap to find out: waits for no file server. `None`: it is not known.
    fn present_size(&self) -> Option<u64> {
        None
    }

    /// Grows the image to `size_bytes` if it is smaller; without a size, takes its present one. Returns the size up to
    /// which it is served from now on. May wait.
    ///
    /// # Errors
    /// Why it cannot have that size; nothing has changed then.
    fn grow(&self, _size_bytes: Option<u64>) -> std::result::Result<u64, String> {
        Err("an image of this kind changes its size only when the disk is detached and attached again".to_owned())
    }

    /// Reads a page; what lies past the end of the image is zeros.
    ///
    /// # Errors
    /// Those of the store.
    fn read_page(&self, page: PageNo) -> io::Result<Box<PageBytes>>;

    /// Makes a range (in bytes) read as zeros and keeps its space.
    ///
    /// => No other operation on the range is in flight.
    ///
    /// # Errors
    /// Those of the store.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Access for writing without a worker.
    ///
    /// # Errors
    /// Those of the store.
    fn writer(&self) -> io::Result<Box<dyn BlockWriter + '_>>;
}

/// Writes to an image without a worker. Each method waits for the image.
pub trait BlockWriter {
    /// Writes whole sectors at byte `offset`.
    ///
    /// # Errors
    /// Those of the store, and for a range past the end of the image.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes everything durable that was written.
    ///
    /// # Errors
    /// Those of the store: what was written since the last success is in doubt.
    fn sync(&mut self) -> io::Result<()>;
}

impl fmt::Debug for dyn BlockWriter + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockWriter").finish_non_exhaustive()
    }
}
