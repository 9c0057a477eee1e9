//! An image on an NBD server.
//!
//! The layers, from the wire up: `wire` (numbers), `handshake` and `client` with `receive` and `slot` (state machines
//! without I/O), `memory` (copies into an operation's memory), `suspects` (writes that dead connections may still carry
//! out), `losses` (breaks of which the cache must be told), `unflushed` (ranges that maps must not report as holes),
//! `notifier` (wakes a worker), `remote` (the state that queues share), `connect` and `server` (connections,
//! established on threads that may wait), `connector` (connections for queues in another process), `queue` (a worker's
//! socket), `silence` (when its peer is dead), `backing` (the image in the process that serves it), `host_lock`, and
//! here the image in the process that opens it.

mod backing;
mod client;
mod connect;
mod connector;
mod handshake;
mod host_lock;
mod losses;
mod memory;
mod notifier;
mod queue;
mod receive;
mod remote;
mod server;
mod silence;
#[cfg(test)]
mod simulation;
mod slot;
mod suspects;
mod unflushed;
mod wire;

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::format::{Format, Found, HEAD_BYTES, TAIL_BYTES, detect};
use super::handed::{ImageParts, IoLock, NbdParts};
use super::named::{BlockWriter, ImageKind, KnownRaw, NamedImage, PageBytes};
use super::options::OpenOptions;
use super::{Backing, Event, IoRequest, Limits, Segment, StoreQueue};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::nbd_uri::{NbdUri, ServerAddress};
use crate::sys;
use crate::tenure::token::ChangeToken;
use crate::units::{Fault, ImageHoles, OpKind, PAGE_BYTES, PageNo, SECTOR_BYTES, SectorSpan, Unmap, Urgency};

use backing::NO_MULTI_CONN;
pub(super) use backing::NbdBacking;
use connector::Connector;
use host_lock::HostLock;
use queue::NbdQueue;
use remote::Remote;
use server::ExportServer;
use wire::{Export, export_flag};

/// Most operations in flight of one queue. Servers execute 16 at a time; the others are in transit meanwhile.
const DEPTH: u16 = 128;
/// Longest transfer of one request: a longer one would only delay others.
const IO_BYTES_MAX: u32 = 4 << 20;
/// Bytes that an operation without a worker moves at a time.
const STEP_BYTES: u64 = 1 << 20;
/// The device number in the identity of every export, which no real device has.
const NBD_DEVICE: u64 = u64::from_be_bytes(*b"\0\0\0\0\0nbd");
/// How long a read without a worker may take, and any other operation: a FLUSH may write what the server has cached.
const READ_MAX: Duration = Duration::from_secs(30);
const CHANGE_MAX: Duration = Duration::from_secs(300);
/// When the log reports that such an operation takes long.
const REPORT_AFTER: Duration = Duration::from_secs(5);
/// How often a thread that waits for the server checks it, if nothing wakes the thread.
const CHECK_PERIOD: Duration = Duration::from_secs(1);

/// An export that this process has opened by its name.
#[derive(Debug)]
pub struct NbdImage {
    server: Arc<ExportServer>,
    backing: NbdBacking,
    /// The format other than raw that the export appeared to have when it was opened.
    found: Option<Found>,
}

impl NbdImage {
    /// Connects to the export that `name` names, for the device called `device`. Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] for a wrong URI, a server that is unreachable or refuses the export, an export without
    /// FLUSH (unless the options permit that), a read-only export, and an invalid size. [`ErrorKind::Locked`] if a
    /// daemon of this host writes to it.
    pub fn open(device: Option<&str>, name: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        let failed = |why: String| Error::new(ErrorKind::Image, format!("image {}: {why}", name.display()));
        let text = name.to_str().ok_or_else(|| failed("is not UTF-8".to_owned()))?;
        let uri = NbdUri::parse(text).map_err(|why| failed(format!("the URI {why}")))?;
        let path = PathBuf::from(uri.to_string());
        let label = device.map_or_else(|| format!("image {uri}"), |device| format!("{device}: image {uri}"));
        let lock = lock(&uri, options)?;
        let connection = ExportServer::first_connection(&uri)
            .map_err(|e| Error::io(ErrorKind::Image, format!("cannot open image {}", name.display()), e))?;
        let export = connection.export;
        check(&export, options).map_err(failed)?;
        let limits = limits_of(&export, options.read_only);
        let remote = Arc::new(Remote::new(label, export, options.nbd.quarantine));
        let access = (options.read_only, limits.io_max_bytes);
        let server = ExportServer::new(uri, Arc::clone(&remote), connection, access, options.nbd.give_up, lock);
        let backing = NbdBacking::new(remote, limits, path);
        let mut image = Self { server: Arc::new(server), backing, found: None };
        image.found = image
            .detect_format()
            .map_err(|e| Error::io(ErrorKind::Image, format!("cannot read image {}", name.display()), e))?;
        Ok(Arc::new(image))
    }

    fn size_bytes(&self) -> u64 {
        self.backing.limits.size_bytes.get()
    }

    fn detect_format(&self) -> io::Result<Option<Found>> {
        let size = self.size_bytes();
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
        let end = (offset + len).min(self.size_bytes());
        let mut bytes = Vec::new();
        for page in first..end.div_ceil(PAGE_BYTES) {
            bytes.extend_from_slice(&self.read_page(PageNo(page))?.0);
        }
        let skip = usize::try_from(offset - first * PAGE_BYTES).expect("less than a page");
        bytes.drain(..skip);
        bytes.truncate(usize::try_from(end.saturating_sub(offset)).map_err(io::Error::other)?);
        Ok(bytes)
    }

    /// Runs one operation on a connection of its own, or on the idle connection. Waits for the server.
    fn run(&self, op: OpKind, offset: u64, len: u64, segments: Vec<Segment>) -> io::Result<()> {
        let (remote, limits) = (&self.backing.remote, &self.backing.limits);
        let connection = self.server.take_connection(remote.has_changed())?;
        let mut queue = NbdQueue::new(Arc::clone(remote), limits.clone(), Some(connection), None)?;
        let result = run_on(&mut queue, op, offset, len, segments);
        if let Some(connection) = queue.into_connection() {
            self.server.put_back(connection);
        }
        result
    }

    fn segments_of(bytes: &mut [u8]) -> Vec<Segment> {
        vec![Segment { base: bytes.as_mut_ptr(), len: bytes.len() }]
    }
}

/// Takes the lock of an export, or checks that it is free.
fn lock(uri: &NbdUri, options: &OpenOptions) -> Result<Option<HostLock>> {
    let mut canonical = uri.clone();
    if let ServerAddress::Unix(path) = &mut canonical.server
        && let (Some(directory), Some(socket)) = (path.parent(), path.file_name())
        && let Ok(directory) = directory.canonicalize()
    {
        *path = directory.join(socket);
    }
    let [high, low] = hashes(&canonical.to_string());
    let name = format!("genblk/nbd/{high:016x}{low:016x}");
    let result = match options.read_only {
        true => HostLock::check_free(&name, options.lock_timeout).map(|()| None),
        false => HostLock::acquire(&name, options.lock_timeout),
    };
    result.map_err(|e| {
        let kind = if e.kind() == io::ErrorKind::AddrInUse { ErrorKind::Locked } else { ErrorKind::System };
        Error::new(kind, format!("cannot lock image {uri}: {e}"))
    })
}

/// Runs one operation on a queue and waits for it.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] if the server does not answer: an operation without a worker delays the start of a
/// daemon, or a command. The server may still execute it.
fn run_on(queue: &mut NbdQueue, op: OpKind, offset: u64, len: u64, segments: Vec<Segment>) -> io::Result<()> {
    let what = op.describe(SectorSpan::new(offset / SECTOR_BYTES, len / SECTOR_BYTES));
    let request = IoRequest { tag: 0, op, offset, len, urgency: Urgency::Demand, segments };
    queue.submit(request).map_err(|refused| io::Error::new(io::ErrorKind::InvalidInput, refused.to_string()))?;
    let mut events = Vec::new();
    // A change may have to wait for a quarantine first.
    let (started, quarantine) = (Instant::now(), queue.remote().quarantined_for());
    let limit = quarantine + if op == OpKind::Read { READ_MAX } else { CHANGE_MAX };
    let mut is_reported = false;
    loop {
        queue.kick();
        queue.reap(&mut events);
        match events.pop() {
            Some(Event::Failed { fault, .. }) if fault == Fault::Lost => return Err(io::Error::other(fault)),
            Some(Event::Failed { errno, .. }) => return Err(io::Error::from_raw_os_error(errno)),
            Some(_) => return Ok(()),
            None => drop(sys::poll::wait_readable(queue.wake_fd(), CHECK_PERIOD)),
        }
        let waited = started.elapsed();
        if waited >= limit {
            queue.abandon();
            let why = format!("the server has not answered {what} for {} s", limit.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        if waited >= quarantine + REPORT_AFTER && !mem::replace(&mut is_reported, true) {
            warn!("{}: waiting for the server to answer {what}", queue.remote().label);
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
        return Err("the server exports it read-only; set read_only = true (--read-only)".to_owned());
    }
    if !export.has(export_flag::SEND_FLUSH) && !options.nbd.trusts_without_flush {
        return Err("the server has no FLUSH, so durability cannot be guaranteed; set read_only = true, or \
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
        size_bytes: export.size_bytes.into(),
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

/// An ID of 128 bits for a text (FNV-1a from two starting points), the same in every version.
fn hashes(text: &str) -> [u64; 2] {
    [0xcbf2_9ce4_8422_2325, 0x6c62_272e_07bb_0142].map(|start: u64| {
        text.bytes().fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    })
}

impl Backing for NbdImage {
    fn limits(&self) -> &Limits {
        self.backing.limits()
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn shows_format(&self, span: SectorSpan) -> bool {
        self.backing.shows_format(span)
    }

    fn inspect_guest_write(&self, first: u64, bytes: &[u8]) -> u64 {
        self.backing.inspect_guest_write(first, bytes)
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        {
            let mut connector = self.backing.connector.lock().expect("no thread panics with the connector locked");
            if connector.is_none() {
                let failed = |e| Error::io(ErrorKind::System, "cannot start the thread that connects", e);
                let socket = connector::spawn(&self.server).map_err(failed)?;
                *connector = Some(Arc::new(Connector::new(socket.into())));
            }
        }
        self.backing.attach()
    }

    fn change_token(&self) -> Option<ChangeToken> {
        self.backing.change_token()
    }

    fn idle_token(&self) -> Option<ChangeToken> {
        self.backing.idle_token()
    }
}

impl NamedImage for NbdImage {
    fn path(&self) -> &Path {
        &self.backing.path
    }

    fn canonical_path(&self) -> PathBuf {
        self.backing.path.clone()
    }

    fn identity(&self) -> ImageId {
        let [inode, born_ns] = hashes(&self.server.uri.to_string());
        ImageId { device: NBD_DEVICE, inode: inode | 1, born_ns }
    }

    fn kind(&self) -> ImageKind {
        ImageKind::Remote
    }

    fn io_mode(&self) -> String {
        self.backing.io_mode().to_owned()
    }

    fn found_format(&self) -> Option<Format> {
        self.found.map(|found| found.format)
    }

    fn check_format(&self, known_raw: Option<KnownRaw>) -> Result<()> {
        let (Some(found), label) = (self.found, &self.backing.remote.label) else { return Ok(()) };
        let name = found.format;
        match known_raw {
            Some(KnownRaw::Configured) => {
                info!("{label} looks like {name}; served as raw, because format = \"raw\" is set");
            }
            Some(KnownRaw::KeptCache) => {
                info!("{label} looks like {name}; served as raw, because it was served before, and its cache was kept");
            }
            // As for a block device: guests' disks that are encrypted as a whole are common.
            None if found.format == Format::Luks => warn!(
                "{label} begins with a LUKS header; served as raw: if its guest has written the header, set format = \
                 \"raw\" (--format raw)"
            ),
            None => return Err(Error::new(ErrorKind::Image, found.refusal(&self.backing.path))),
        }
        Ok(())
    }

    fn found_token(&self) -> ChangeToken {
        // A server reports nothing else.
        ChangeToken { size_bytes: self.size_bytes(), ..ChangeToken::default() }
    }

    fn check_workers(&self, workers: u16) -> Result<()> {
        if self.backing.allows(workers.into()) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Config, format!("image {}: {NO_MULTI_CONN}", self.backing.path.display())))
    }

    fn reopen_for_process(&self, _io_lock: IoLock) -> io::Result<(File, ImageParts)> {
        let (remote, milliseconds) = (&self.backing.remote, |time: Duration| u64::try_from(time.as_millis()));
        let parts = NbdParts {
            limits: self.backing.limits.clone(),
            uri: self.server.uri.to_string(),
            label: remote.label.clone(),
            promised: remote.promised,
            quarantine_ms: milliseconds(remote.quarantine).unwrap_or(u64::MAX),
            quarantined_ms: milliseconds(self.server.quarantined_for()).unwrap_or(u64::MAX),
        };
        // A process that has ended accesses nothing, and what it has sent is in quarantine: no I/O lock is needed.
        Ok((OwnedFd::from(connector::spawn(&self.server)?).into(), ImageParts::Nbd(parts)))
    }

    fn quarantine_earlier_writes(&self) {
        self.server.quarantine_earlier_writes();
    }

    fn read_page(&self, page: PageNo) -> io::Result<Box<PageBytes>> {
        let mut bytes = Box::new(PageBytes([0; crate::units::PAGE_SIZE]));
        let len = self.size_bytes().saturating_sub(page.offset_bytes()).min(PAGE_BYTES);
        if len > 0 {
            let within = usize::try_from(len).expect("at most a page");
            self.run(OpKind::Read, page.offset_bytes(), len, Self::segments_of(&mut bytes.0[..within]))?;
        }
        Ok(bytes)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.backing.limits.can_zero {
            return self.run(OpKind::Zero { unmap: Unmap::Forbidden }, offset, len, Vec::new());
        }
        let mut zeros =
            vec![0; usize::try_from(STEP_BYTES.min(u64::from(self.backing.limits.io_max_bytes))).expect("small")];
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
        // The segment must not be written through: the borrowed slice ensures that, but the segment's type does not.
        let mut bytes = bytes.to_vec();
        self.0.run(OpKind::Write, offset, bytes.len() as u64, NbdImage::segments_of(&mut bytes))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.run(OpKind::Sync, 0, 0, Vec::new())
    }
}
