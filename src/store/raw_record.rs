//! Which images are raw although they do not look so.
//!
//! A guest may write any bytes to its disk, the magic number of a format among them: a disk that is encrypted as a
//! whole begins with a LUKS header. QEMU, where the format was not given, fails such a write to the first sector,
//! because it would take the image for another format at the next start, and read what a guest has chosen as its
//! metadata. genblk interprets no format, so nothing is to be feared from such bytes. It lets the guest write them, and
//! records in an extended attribute of the image that its guest has done so. With that record the next start serves the
//! image.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use log::{info, warn};

use super::format::{Format, Found, HEAD_BYTES, TAIL_BYTES, detect};
use crate::error::{Error, ErrorKind};
use crate::sys;

/// The attribute. Its value is the name of the format that the guest wrote.
const ATTRIBUTE: &CStr = c"user.genblk.format";
/// Longest value of the attribute.
const VALUE_BYTES_MAX: usize = 64;

/// What an image was found to be, and what its guest is known to have written.
#[derive(Debug)]
pub(super) struct ImageFormat {
    /// What it looked like when it was opened.
    found: Option<Found>,
    /// The format that the guest has written, as far as this process or the image's attribute knows.
    recorded: Mutex<Option<String>>,
}

impl ImageFormat {
    /// Looks at the first and the last bytes of an image, and at its attribute.
    ///
    /// => The file is not open for direct I/O yet.
    ///
    /// # Errors
    /// Those of pread(2).
    pub(super) fn of(file: &File, size_bytes: u64) -> io::Result<Self> {
        let head = read_up_to(file, 0, HEAD_BYTES)?;
        let tail = match size_bytes.checked_sub(TAIL_BYTES as u64) {
            Some(at) => read_up_to(file, at, TAIL_BYTES)?,
            None => Vec::new(),
        };
        let read = |at: u64| {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, at).ok().map(|()| u64::from_le_bytes(word))
        };
        let found = detect(size_bytes, &head, &tail, &read);
        // Without an attribute, and with one that cannot be read, the image is what it looks like.
        let value = sys::xattr::get(file, ATTRIBUTE, VALUE_BYTES_MAX).ok().flatten();
        let recorded = value.map(|value| String::from_utf8_lossy(&value).into_owned());
        Ok(Self { found, recorded: Mutex::new(recorded) })
    }

    /// What the image looked like when it was opened, if not raw.
    pub(super) fn found(&self) -> Option<Found> {
        self.found
    }

    /// Whether it is on record that a guest wrote what makes the image look so.
    pub(super) fn is_guest_written(&self) -> bool {
        let recorded = self.recorded.lock().expect("no thread panics with the record locked");
        self.found.is_some_and(|found| recorded.as_deref() == Some(found.format.name()))
    }

    /// The error that refuses the image at `path`, if it does not look raw and no record says that it is.
    pub(super) fn refusal(&self, path: &Path) -> Option<Error> {
        let found = self.found.filter(|_| !self.is_guest_written())?;
        Some(Error::new(ErrorKind::Image, found.refusal(path)))
    }

    /// Records at the image that the guest is writing the magic number of `format`. Log lines begin with `label`.
    ///
    /// => Waits for the image: before the write is submitted, so that the image's change time is known when the write
    ///    is complete. It happens once in the life of most images, if at all.
    pub(super) fn note_guest_writes(&self, format: Format, file: &File, label: &str) {
        let name = format.name();
        let mut recorded = self.recorded.lock().expect("no thread panics with the record locked");
        if recorded.as_deref() == Some(name) {
            return;
        }
        *recorded = Some(name.to_owned());
        match sys::xattr::set(file, ATTRIBUTE, name.as_bytes()) {
            Ok(()) => info!("{label}: its guest writes a {name} header; recorded, and still served as raw"),
            Err(e) => warn!(
                "{label}: its guest writes a {name} header, and that cannot be recorded at the image ({e}): set \
                 format = \"raw\" (--format raw), or the next start without a kept cache refuses it"
            ),
        }
    }
}

/// Up to `max` bytes from byte `at` on; fewer at the end of the file.
fn read_up_to(file: &File, at: u64, max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; max];
    let mut len = 0;
    while len < max {
        match file.read_at(&mut bytes[len..], at + len as u64) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}
