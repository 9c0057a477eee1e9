//! An image at an NBD server.
//!
//! The layers, from the wire up: `wire` (numbers), `handshake` and `client` with `receive` and `slot` (state machines
//! without I/O), `memory` (copies into an operation's memory), `suspects` (what dead connections may still do),
//! `connect` and `remote` (connections, made on threads that may wait), `queue` (a worker's socket), and here the
//! image.

mod client;
mod connect;
mod handshake;
mod memory;
mod queue;
mod receive;
mod remote;
#[cfg(test)]
mod simulation;
mod slot;
mod suspects;
mod wire;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use log::{info, warn};

use super::format::{Format, Found, HEAD_BYTES, TAIL_BYTES, at_start, detect};
use super::handed::{ImageParts, IoFence};
use super::named::{BlockWriter, ImageKind, KnownRaw, NamedImage, PageBytes};
use super::options::OpenOptions;
use super::{Backing, Event, IoRequest, Limits, Segment, StoreQueue};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::nbd_uri::NbdUri;
use crate::sys;
use crate::tenure::token::ChangeToken;
use crate::units::{Fault, ImageHoles, OpKind, PAGE_BYTES, PageNo, SECTOR_BYTES, SECTOR_SIZE, SectorSpan, Unmap};

use queue::NbdQueue;
use remote::Remote;
use wire::{Export, export_flag};

/// Most operations in flight of one queue. Servers work on 16 at a time; the others are on their way.
const DEPTH: u16 = 128;
/// Longest transfer of one request: longer ones only keep others waiting.
const IO_BYTES_MAX: u32 = 4 << 20;
/// Bytes that requests without a worker move at a time.
const STEP_BYTES: u64 = 1 << 20;
/// The device number in the identity of every export: no device has it.
const NBD_DEVICE: u64 = u64::from_be_bytes(*b"\0\0\0\0\0nbd");
/// How often a thread that waits for the server looks at it, if nothing wakes it.
const LOOK: Duration = Duration::from_secs(1);

/// An export, connected.
#[derive(Debug)]
pub struct NbdImage {
    remote: Arc<Remote>,
    limits: Limits,
    /// The canonical URI.
    path: PathBuf,
    /// What the export looked like when it was opened.
    found: Option<Found>,
    /// How many queues may be attached.
    can_multi_conn: bool,
    attached: Mutex<usize>,
}

impl NbdImage {
    /// Connects to the export that `name` names, for the device called `device`. Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] for a wrong URI, a server that cannot be reached or refuses, an export without FLUSH
    /// (unless the options say that it needs none) or that may only be read, and one of a size that no disk has.
    pub fn open(device: Option<&str>, name: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        let failed = |why: String| Error::new(ErrorKind::Image, format!("image {}: {why}", name.display()));
        let text = name.to_str().ok_or_else(|| failed("is not UTF-8".to_owned()))?;
        let uri = NbdUri::parse(text).map_err(|why| failed(format!("the URI {why}")))?;
        let path = PathBuf::from(uri.to_string());
        let label = device.map_or_else(|| format!("image {uri}"), |device| format!("{device}: image {uri}"));
        let connection = Remote::first_connection(&uri)
            .map_err(|e| Error::io(ErrorKind::Image, format!("cannot open image {}", name.display()), e))?;
        let export = connection.export;
        check(&export, options).map_err(failed)?;
        let limits = limits_of(&export, options.read_only);
        let can_multi_conn = export.has(export_flag::CAN_MULTI_CONN);
        let remote = Remote::new(uri, label, connection, options.read_only, limits.io_max_bytes, options.nbd);
        let remote = Arc::new(remote);
        let mut image = Self { remote, limits, path, found: None, can_multi_conn, attached: Mutex::new(0) };
        image.found = image
            .look_at_format()
            .map_err(|e| Error::io(ErrorKind::Image, format!("cannot read image {}", name.display()), e))?;
        Ok(Arc::new(image))
    }

    fn look_at_format(&self) -> io::Result<Option<Found>> {
        let size = self.limits.size_bytes;
        let head = self.read(0, (HEAD_BYTES as u64).min(size))?;
        let tail = match size.checked_sub(TAIL_BYTES as u64) {
            Some(at) => self.read(at, TAIL_BYTES as u64)?,
            None => Vec::new(),
        };
        let word = |at: u64| self.read(at, 8).ok()?.try_into().ok().map(u64::from_le_bytes);
        Ok(detect(size, &head, &tail, &word))
    }

    /// Any bytes of the image.
    fn read(&self, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        let first = offset / PAGE_BYTES;
        let end = (offset + len).min(self.limits.size_bytes);
        let mut bytes = Vec::new();
        for page in first..end.div_ceil(PAGE_BYTES) {
            bytes.extend_from_slice(&self.read_page(PageNo(page))?.0);
        }
        let skip = usize::try_from(offset - first * PAGE_BYTES).expect("less than a page");
        bytes.drain(..skip);
        bytes.truncate(usize::try_from(end.saturating_sub(offset)).map_err(io::Error::other)?);
        Ok(bytes)
    }

    /// Runs one operation on a connection of its own, or on the one that no queue uses. Waits for the server.
    fn run(&self, op: OpKind, offset: u64, len: u64, segments: Vec<Segment>) -> io::Result<()> {
        let connection = self.remote.take_connection()?;
        let mut queue = NbdQueue::new(Arc::clone(&self.remote), self.limits.clone(), connection)?;
        let result = run_on(&mut queue, op, offset, len, segments);
        if let Some(connection) = queue.into_connection() {
            self.remote.put_back(connection);
        }
        result
    }

    fn segments_of(bytes: &mut [u8]) -> Vec<Segment> {
        vec![Segment { base: bytes.as_mut_ptr(), len: bytes.len() }]
    }
}

/// Runs one operation on a queue and waits for it.
fn run_on(queue: &mut NbdQueue, op: OpKind, offset: u64, len: u64, segments: Vec<Segment>) -> io::Result<()> {
    let request = IoRequest { tag: 0, op, offset, len, demand: true, segments };
    queue.submit(request).map_err(|refused| io::Error::new(io::ErrorKind::InvalidInput, refused.to_string()))?;
    let mut events = Vec::new();
    loop {
        queue.kick();
        queue.reap(&mut events);
        match events.pop() {
            Some(Event::Failed { fault, .. }) if fault == Fault::Lost => return Err(io::Error::other(fault)),
            Some(Event::Failed { errno, .. }) => return Err(io::Error::from_raw_os_error(errno)),
            Some(_) => return Ok(()),
            None => drop(sys::poll::wait_readable(queue.wake_fd(), LOOK)),
        }
    }
}

/// Checks that an export can be served.
fn check(export: &Export, options: &OpenOptions) -> std::result::Result<(), String> {
    let size = export.size_bytes;
    if size == 0 || !size.is_multiple_of(SECTOR_BYTES) {
        return Err(format!("a size of {size} bytes is not a multiple of {SECTOR_BYTES}"));
    }
    if options.read_only {
        return Ok(());
    }
    if export.has(export_flag::READ_ONLY) {
        return Err("the server lets it be read only; set read_only = true (--read-only)".to_owned());
    }
    if !export.has(export_flag::SEND_FLUSH) && !options.nbd.trusts_without_flush {
        return Err("the server has no FLUSH, so nothing tells whether a write is durable; set read_only = true, or \
                    nbd_flush = \"none\" if the server has no volatile cache at all"
            .to_owned());
    }
    Ok(())
}

fn limits_of(export: &Export, read_only: bool) -> Limits {
    let writable = !read_only;
    let block_bytes = export.block_min.max(512);
    let can_discard = writable && export.has(export_flag::SEND_TRIM);
    Limits {
        size_bytes: export.size_bytes,
        block_bytes,
        memory_align: 1,
        io_max_bytes: export.block_max.min(IO_BYTES_MAX) / block_bytes * block_bytes,
        segments_max: 1024,
        depth: DEPTH,
        discard_granularity: if can_discard { export.block_preferred.max(512) } else { 0 },
        discard_max_bytes: u64::MAX,
        physical_block_bytes: export.block_preferred.clamp(block_bytes, 4096.max(block_bytes)),
        optimal_io_bytes: 0,
        writable,
        can_zero: writable && export.can_zero(),
        can_discard,
        holes: if export.allocation.is_some() { ImageHoles::Possible } else { ImageHoles::Unmappable },
    }
}

/// A name of 128 bits for a text (FNV-1a from two starting points): equal in every version.
fn hashes(text: &str) -> [u64; 2] {
    [0xcbf2_9ce4_8422_2325, 0x6c62_272e_07bb_0142].map(|start: u64| {
        text.bytes().fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    })
}

impl Backing for NbdImage {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn shows_format(&self, span: SectorSpan) -> bool {
        span.start == 0
    }

    fn note_guest_write(&self, first: u64, bytes: &[u8]) -> u64 {
        let Some(format) = bytes.get(..SECTOR_SIZE).filter(|_| first == 0).and_then(at_start) else { return 0 };
        warn!(
            "{}: its guest writes a {} header, and that cannot be recorded at the server: set format = \"raw\" \
             (--format raw), or a start without the kept cache refuses it",
            self.remote.label,
            format.name()
        );
        format.bit()
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        let mut attached = self.attached.lock().expect("no thread panics with the count locked");
        if *attached > 0 && !self.can_multi_conn && self.limits.writable {
            let why = "its server does not promise that a FLUSH covers other connections (multi-conn); set workers = 1";
            return Err(Error::new(ErrorKind::Config, format!("image {}: {why}", self.path.display())));
        }
        let failed = |e| Error::io(ErrorKind::Image, format!("cannot connect to image {}", self.path.display()), e);
        let connection = self.remote.take_connection().map_err(failed)?;
        let system = |e| Error::io(ErrorKind::System, format!("image {}: cannot make a queue", self.path.display()), e);
        let mut queue = NbdQueue::new(Arc::clone(&self.remote), self.limits.clone(), connection).map_err(system)?;
        queue.start_connector().map_err(system)?;
        *attached += 1;
        Ok(Box::new(queue))
    }

    fn change_token(&self) -> Option<ChangeToken> {
        Some(self.found_token())
    }

    fn rest_token(&self) -> Option<ChangeToken> {
        self.change_token()
    }
}

impl NamedImage for NbdImage {
    fn path(&self) -> &Path {
        &self.path
    }

    fn canonical_path(&self) -> PathBuf {
        self.path.clone()
    }

    fn identity(&self) -> ImageId {
        let [inode, born_ns] = hashes(&self.remote.uri.to_string());
        ImageId { device: NBD_DEVICE, inode: inode | 1, born_ns }
    }

    fn kind(&self) -> ImageKind {
        ImageKind::Remote
    }

    fn io_mode(&self) -> String {
        let flush = if self.remote.promised.has(export_flag::SEND_FLUSH) { "with FLUSH" } else { "without FLUSH" };
        format!("NBD {flush}")
    }

    fn found_format(&self) -> Option<Format> {
        self.found.map(|found| found.format)
    }

    fn check_format(&self, known_raw: Option<KnownRaw>) -> Result<()> {
        let (Some(found), label) = (self.found, &self.remote.label) else { return Ok(()) };
        let name = found.format;
        match known_raw {
            Some(KnownRaw::Configured) => {
                info!("{label} looks like {name}; served as raw, because the configuration says so");
            }
            Some(KnownRaw::KeptCache) => {
                info!("{label} looks like {name}; served as raw, because it was served before, and its cache was kept");
            }
            // As for a block device: a guest's disk that is encrypted as a whole is common.
            None if found.format == Format::Luks => warn!(
                "{label} begins with a LUKS header; served as raw: if its guest has written that, set format = \
                 \"raw\" (--format raw)"
            ),
            None => return Err(Error::new(ErrorKind::Image, found.refusal(&self.path))),
        }
        Ok(())
    }

    fn found_token(&self) -> ChangeToken {
        // A server tells nothing else.
        ChangeToken { size_bytes: self.limits.size_bytes, ..ChangeToken::default() }
    }

    fn hand_out(&self, _fence: IoFence) -> io::Result<(File, ImageParts)> {
        let why = "exports of NBD servers cannot be handed to the process that serves a disk yet";
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }

    fn fear_earlier_writes(&self) {
        self.remote.fear_earlier_writes();
    }

    fn read_page(&self, page: PageNo) -> io::Result<Box<PageBytes>> {
        let mut bytes = Box::new(PageBytes([0; crate::units::PAGE_SIZE]));
        let len = self.limits.size_bytes.saturating_sub(page.offset_bytes()).min(PAGE_BYTES);
        if len > 0 {
            let within = usize::try_from(len).expect("at most a page");
            self.run(OpKind::Read, page.offset_bytes(), len, Self::segments_of(&mut bytes.0[..within]))?;
        }
        Ok(bytes)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.limits.can_zero {
            return self.run(OpKind::Zero { unmap: Unmap::Forbidden }, offset, len, Vec::new());
        }
        let mut zeros = vec![0; usize::try_from(STEP_BYTES.min(u64::from(self.limits.io_max_bytes))).expect("small")];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let step = (end - at).min(zeros.len() as u64);
            let within = usize::try_from(step).expect("a step is small");
            self.run(OpKind::Write, at, step, Self::segments_of(&mut zeros[..within]))?;
            at += step;
        }
        Ok(())
    }

    fn writer(&self) -> io::Result<Box<dyn BlockWriter + '_>> {
        Ok(Box::new(ExportWriter(self)))
    }
}

/// Writes to an export one request at a time.
struct ExportWriter<'a>(&'a NbdImage);

impl BlockWriter for ExportWriter<'_> {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        // What is written must not change, which a borrowed slice ensures; the segment's type does not tell.
        let mut bytes = bytes.to_vec();
        self.0.run(OpKind::Write, offset, bytes.len() as u64, NbdImage::segments_of(&mut bytes))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.run(OpKind::Sync, 0, 0, Vec::new())
    }
}
