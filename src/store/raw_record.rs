//! Records which images are raw although they appear to have another format.
//!
//! A guest may write any bytes to its disk, including the magic number of a format: a disk that is encrypted as a whole
//! begins with a LUKS header. If the format was not specified, QEMU fails such a write to the first sector, because at
//! the next start it would detect another format, and interpret bytes of the guest's choice as metadata. genblk
//! interprets no format, so such bytes do no harm. It lets the guest write them, and records in an extended attribute
//! of the image the formats whose headers its guest has written so far: after a crash the image may contain any of the
//! last writes. With that record the next start serves the image. If the image has no attributes (block devices, some
//! file systems), the cache file has the record.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use log::{info, warn};
use serde::{Deserialize, Serialize};

use super::format::{Format, Found, HEAD_BYTES, TAIL_BYTES, at_end, at_start, bit_of, detect};
use crate::error::{Error, ErrorKind};
use crate::sys;
use crate::units::SECTOR_SIZE;

/// The attribute. Its value is the names of the formats whose headers the guest has written since the image was
/// created.
const ATTRIBUTE: &CStr = c"user.genblk.format";
/// Between two names.
const SEPARATOR: char = ';';
/// Longest value of the attribute: all formats fit.
const VALUE_BYTES_MAX: usize = 512;

/// The format that was found in an image, and the formats whose headers its guest is known to have written.
#[derive(Debug)]
pub(super) struct FormatRecord {
    /// The format that the image appeared to have when it was opened.
    found: Option<Found>,
    state: Mutex<RecordState>,
    /// Whether formats are to be recorded in the image.
    is_pending: AtomicBool,
    /// Held by the thread that records them, which may wait for the image.
    recording: Mutex<()>,
}

#[derive(Debug)]
struct RecordState {
    known: Known,
    /// Formats whose headers the guest is writing. They are to be recorded in the image before that write is executed.
    pending: Vec<Format>,
}

/// This process's state of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    /// The names of the formats whose headers the guest has written; and those among them that the image's attribute
    /// has.
    written: Vec<String>,
    recorded: Vec<String>,
    /// The first and the last bytes of the image, with every write that was submitted.
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl Known {
    /// Applies a write, starting at sector `first`, to the copies of the image's ends. Returns the formats that the
    /// image appears to have because of it.
    fn apply(&mut self, first: u64, bytes: &[u8], image_sectors: u64) -> Vec<Format> {
        let mut found = Vec::new();
        let head_sectors = (self.head.len() / SECTOR_SIZE) as u64;
        if first < head_sectors {
            let at = usize::try_from(first).expect("within the head") * SECTOR_SIZE;
            let len = bytes.len().min(self.head.len() - at);
            let was = (at_start(&self.head), self.head[..SECTOR_SIZE].to_vec());
            self.head[at..at + len].copy_from_slice(&bytes[..len]);
            let is = (at_start(&self.head), self.head[..SECTOR_SIZE].to_vec());
            // A write of a page with such a header may contain other sectors of the header, unchanged.
            found.extend(is.0.filter(|_| was != is));
        }
        let end = first + (bytes.len() / SECTOR_SIZE) as u64;
        if end == image_sectors && self.tail.len() == TAIL_BYTES && bytes.len() >= TAIL_BYTES {
            let tail = &bytes[bytes.len() - TAIL_BYTES..];
            if self.tail != tail {
                self.tail.copy_from_slice(tail);
                found.extend(at_end(tail));
            }
        }
        found
    }
}

impl FormatRecord {
    /// Reads the first and the last bytes of an image, and its attribute.
    ///
    /// => The file is not yet open for direct I/O.
    ///
    /// # Errors
    /// Errors of pread(2).
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
        // Without an attribute, or with an unreadable one, the image counts as the format that it appears to have.
        let value = sys::xattr::get(file, ATTRIBUTE, VALUE_BYTES_MAX).ok().flatten().unwrap_or_default();
        let recorded: Vec<String> = String::from_utf8_lossy(&value).split(SEPARATOR).map(str::to_owned).collect();
        Ok(Self::new(found, Known { written: recorded.clone(), recorded, head, tail }))
    }

    fn new(found: Option<Found>, known: Known) -> Self {
        let state = Mutex::new(RecordState { known, pending: Vec::new() });
        Self { found, state, is_pending: AtomicBool::new(false), recording: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, RecordState> {
        self.state.lock().expect("no thread panics with the record locked")
    }

    /// The state from another process of the daemon, which has decided to serve the image as raw.
    pub(super) fn as_raw(known: Known) -> Self {
        Self::new(None, known)
    }

    /// The state of an image, for the process that serves it.
    pub(super) fn into_known(self) -> Known {
        self.state.into_inner().expect("no thread panics with the record locked").known
    }

    /// The format that the image appeared to have when it was opened, if not raw.
    pub(super) fn found(&self) -> Option<Found> {
        self.found
    }

    /// Whether a guest is recorded as the writer of the header that makes the image appear so.
    pub(super) fn is_guest_written(&self) -> bool {
        self.found.is_some_and(|found| self.state().known.recorded.iter().any(|name| name == found.format.name()))
    }

    /// The error that rejects the image at `path`, if it does not look raw and no record declares it as raw.
    pub(super) fn refusal(&self, path: &Path) -> Option<Error> {
        let found = self.found.filter(|_| !self.is_guest_written())?;
        Some(Error::new(ErrorKind::Image, found.refusal(path)))
    }

    /// Examines whether a guest's write of `bytes`, starting at sector `first`, writes the magic number of a format.
    /// Returns the formats that the image does not yet record, a bit for each ([`Format::bit`]). Does not wait:
    /// [`FormatRecord::record_pending`] records them before the write is executed.
    pub(super) fn inspect_guest_write(&self, first: u64, bytes: &[u8], image_sectors: u64) -> u64 {
        let mut state = self.state();
        let mut unrecorded = 0;
        for format in state.known.apply(first, bytes, image_sectors) {
            if !state.known.recorded.iter().any(|recorded| recorded == format.name()) {
                unrecorded |= format.bit();
                state.pending.push(format);
                self.is_pending.store(true, Ordering::Release);
            }
        }
        unrecorded
    }

    /// Whether [`FormatRecord::record_pending`] has work.
    pub(super) fn is_pending(&self) -> bool {
        self.is_pending.load(Ordering::Acquire)
    }

    /// Records in the image the headers that the guest is writing, if any. Log lines begin with `label`. May wait for
    /// the image, at most once for each format in the life of an image.
    ///
    /// => When this returns, all earlier findings are recorded, or cannot be recorded.
    pub(super) fn record_pending(&self, file: &File, label: &str) {
        if !self.is_pending() {
            return;
        }
        let _one_at_a_time = self.recording.lock().expect("no thread panics while it records");
        loop {
            let mut state = self.state();
            let Some(&format) = state.pending.first() else {
                self.is_pending.store(false, Ordering::Release);
                return;
            };
            let name = format.name();
            let known = &mut state.known;
            let is_new = !known.written.iter().any(|written| written == name);
            if is_new {
                known.written.push(name.to_owned());
            }
            let recorded = known.recorded.iter().filter(|name| !name.is_empty()).cloned();
            let names: Vec<String> = recorded.chain([name.to_owned()]).collect();
            drop(state);
            // No worker may wait for this, because it examines writes with the cache locked.
            let result = sys::xattr::set(file, ATTRIBUTE, names.join(&SEPARATOR.to_string()).as_bytes());
            let mut state = self.state();
            state.pending.retain(|pending| *pending != format);
            match result {
                Ok(()) => {
                    info!("{label}: its guest writes a {name} header; recorded, and still served as raw");
                    state.known.recorded = names;
                }
                Err(e) if is_new => warn!(
                    "{label}: its guest writes a {name} header, which can be recorded only in the cache, not in the \
                     image ({e}): set format = \"raw\" (--format raw), or a start after the next reboot of the host \
                     rejects the image"
                ),
                Err(_) => {}
            }
        }
    }

    /// Until the value is dropped, recording waits, as on a file system that does not respond.
    #[cfg(test)]
    pub(super) fn hold_recording(&self) -> MutexGuard<'_, ()> {
        self.recording.lock().unwrap()
    }

    /// The formats that the image records, a bit for each.
    pub(super) fn recorded_formats(&self) -> u64 {
        let state = self.state();
        state.known.recorded.iter().filter_map(|name| bit_of(name)).fold(0, |bits, bit| bits | bit)
    }
}

/// Up to `max` bytes, starting at byte `at`; fewer at the end of the file.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        let empty = Vec::new;
        Known { written: empty(), recorded: empty(), head: vec![0; HEAD_BYTES], tail: vec![0; TAIL_BYTES] }
    }

    /// A sector that begins with these bytes.
    fn sector(head: &[u8]) -> Vec<u8> {
        let mut sector = head.to_vec();
        sector.resize(SECTOR_SIZE, 0);
        sector
    }

    fn names(formats: &[Format]) -> Vec<&'static str> {
        formats.iter().map(|format| format.name()).collect()
    }

    #[test]
    fn each_write_of_a_format_header_is_recognised() {
        let mut known = known();
        assert_eq!(names(&known.apply(0, &sector(b"LUKS\xba\xbe\0\x02"), 64)), ["LUKS"]);
        assert_eq!(names(&known.apply(0, &sector(b"QFI\xfb\0\0\0\x03"), 64)), ["qcow2"], "another one in its place");
        assert!(known.apply(3, &sector(b"data"), 64).is_empty(), "a write next to the header shows nothing new");
        let page: Vec<u8> = known.head.clone();
        assert!(known.apply(0, &page, 64).is_empty(), "the same bytes again show nothing new");
    }

    #[test]
    fn a_format_completed_by_a_later_sector_is_recognised() {
        let mut known = known();
        assert!(known.apply(0, &[b'#'; SECTOR_SIZE], 64).is_empty());
        assert_eq!(names(&known.apply(1, &sector(b"\nversion=1\n"), 64)), ["VMDK"]);
    }

    #[test]
    fn a_format_footer_in_the_last_sector_is_recognised() {
        let mut footer = sector(b"conectix");
        footer[63] = 2;
        let mut known = known();
        assert!(known.apply(62, &footer, 64).is_empty());
        assert_eq!(names(&known.apply(63, &footer, 64)), ["VHD"]);
        assert!(known.apply(63, &footer, 64).is_empty());
    }
}
