//! \[4\] An image with its cache (NetBSD UVM's `uvm_object`). Here the cache's operations become requests to the store,
//! and the store's events become calls of the cache.
//!
//! A cached image outlives connections: the cache is warm for a guest that reboots and for a front-end that reconnects.
//! It belongs to one writable device, or to any number of read-only ones. Each worker thread uses it through a
//! [`WorkerPort`] with a store queue of its own; a port reaps what it submitted. A notice about another worker's
//! request goes through that worker's mailbox.

mod leave;
mod report;
mod rest;
#[cfg(test)]
mod tenure_tests;
mod translate;

use std::collections::VecDeque;
use std::fs::File;
use std::mem;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::{Level, error, info, warn};

use crate::arena::{Arena, Populator, ZERO_SLOTS};
use crate::cache::{FrameMemory, Health, Notice, PageCache, Piece, Settings, Stats, StoreOpRef, Ticket};
use crate::counters::worker::WorkerCounters;
use crate::error::{Error, ErrorKind, Result};
use crate::fault_injection::{PlantedBug, planted};
use crate::store::{Backing, DRAIN_MAX, Event, IoRequest, Limits, Refused, StoreQueue};
use crate::tenure::record::CachePlace;
use crate::units::{
    FrameId, FrameRecord, OpKind, PAGE_BYTES, SECTOR_BYTES, SECTOR_SIZE, SECTORS_PER_PAGE, SectorMask, SectorSpan,
    Tick, Urgency, counted, low_u8,
};
use crate::waker::Waker;

use report::report_health;
use rest::RestRecorder;
use translate::{outcome_of, request_of};

/// A ticket holds the worker's number above this bit, and below it the local part, whose meaning only the worker knows.
const WORKER_SHIFT: u32 = 48;
/// Pages whose operations are completed in one go, or a few more: other workers wait for the cache meanwhile. A few
/// hundred microseconds.
const REAPED_PAGES_MAX: usize = 2048;

impl FrameMemory for Arc<Arena> {
    fn copy_sectors(&self, source: FrameId, target: FrameId, mask: SectorMask) {
        Arena::copy_sectors(self, source, target, mask);
    }

    fn zero_sectors(&self, frame: FrameId, mask: SectorMask) {
        Arena::zero_sectors(self, frame, mask);
    }

    fn publish(&self, frame: FrameId, record: FrameRecord) {
        Arena::publish(self, frame, record);
    }

    fn zero_slots(&self) -> usize {
        ZERO_SLOTS
    }

    fn note_zero(&self, slot: usize, span: Option<SectorSpan>) {
        Arena::note_zero(self, slot, span);
    }
}

/// Notices to a worker from other workers, and its waker.
#[derive(Debug)]
struct Mailbox {
    notices: Mutex<Vec<Notice>>,
    waker: Arc<Waker>,
}

/// A device that uses an image.
#[derive(Debug)]
struct Reader {
    device: String,
    /// Number of its workers that use the image; none once it has left.
    ports: usize,
}

/// An image, its page cache, and the cache's memory.
#[derive(Debug)]
pub struct CachedImage {
    /// The name of the device for which it was opened; its log lines begin with it.
    name: String,
    cache: Mutex<PageCache>,
    /// Declared before the arena, which it uses until it is dropped.
    _populator: Populator,
    arena: Arc<Arena>,
    backing: Arc<dyn Backing>,
    mailboxes: Mutex<Vec<Arc<Mailbox>>>,
    /// The devices that have used it.
    readers: Mutex<Vec<Reader>>,
    /// Number of those that use it at present.
    reader_count: AtomicUsize,
    /// Rings that run without an inflight region, of all workers of all devices: a request on one of them may need what
    /// any worker has submitted to the store.
    pub untracked_rings: AtomicU32,
    /// When tick 0 was.
    opened: Instant,
    /// Records the image's change token.
    rest: RestRecorder,
}

impl CachedImage {
    /// An image with a cache in `arena`, which has as many frames as `settings` says. Restores what the previous daemon
    /// left in the arena. Log lines begin with `name`.
    pub fn new(name: &str, backing: Arc<dyn Backing>, arena: Arena, settings: Settings) -> Arc<Self> {
        let arena = Arc::new(arena);
        let mut cache = PageCache::new(settings, Box::new(Arc::clone(&arena)));
        for run in backing.data_runs() {
            cache.learn_data(SectorSpan::new(run.start / SECTOR_BYTES, (run.end - run.start) / SECTOR_BYTES));
        }
        let (pages, dirty) = cache.restore(arena.records(), arena.pending_zeroes());
        if pages > 0 {
            let pages = counted(u64::from(pages), "cached page");
            info!("{name}: restored {pages} ({dirty} dirty) left by the previous daemon");
        }
        let rest = RestRecorder::start(name, &backing, &arena);
        Arc::new(Self {
            name: name.to_owned(),
            rest,
            cache: Mutex::new(cache),
            untracked_rings: AtomicU32::new(0),
            _populator: Populator::start(name, &arena),
            arena,
            backing,
            mailboxes: Mutex::default(),
            readers: Mutex::default(),
            reader_count: AtomicUsize::new(0),
            opened: Instant::now(),
        })
    }

    /// The cache's memory.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// The image's properties and capabilities.
    pub fn limits(&self) -> &Limits {
        self.backing.limits()
    }

    /// The image has grown to `size_bytes` bytes, and may be used up to there. Waits for no operation.
    ///
    /// # Errors
    /// Why the cache cannot follow; nothing has changed then.
    pub fn grow(&self, size_bytes: u64) -> std::result::Result<(), String> {
        let mut cache = self.lock();
        let before = self.limits().size_bytes.get();
        if size_bytes <= before {
            return Ok(());
        }
        if !size_bytes.is_multiple_of(PAGE_BYTES) || !before.is_multiple_of(PAGE_BYTES) {
            let why = "changes only when the disk is attached anew";
            return Err(format!("a size that is not a multiple of {PAGE_BYTES} {why}"));
        }
        if !self.arena.has_room_for(size_bytes) {
            return Err("the cache of an image above 4 PiB cannot outlive the daemon".to_owned());
        }
        self.arena.set_image_size(size_bytes);
        self.limits().size_bytes.set(size_bytes);
        cache.grow(size_bytes / SECTOR_BYTES);
        Ok(())
    }

    /// Whether the image is at a server.
    pub fn is_remote(&self) -> bool {
        self.backing.is_remote()
    }

    /// The cache's statistics.
    pub fn stats(&self) -> Stats {
        let stats = self.lock().stats();
        Stats { metadata_bytes: stats.metadata_bytes + self.arena.overhead_bytes() as u64, ..stats }
    }

    /// The name of the cache's file no longer leads to it: the cache is from now on one that does not outlive the
    /// daemon. `marker` is an empty file in its place, or why there is none. Waits for nothing: returns it if a worker
    /// uses the cache at the moment.
    ///
    /// # Errors
    /// The marker, to be passed again.
    pub fn lose_cache_file(
        &self,
        marker: std::result::Result<File, String>,
    ) -> std::result::Result<(), std::result::Result<File, String>> {
        let Ok(cache) = self.cache.try_lock() else { return Err(marker) };
        let (name, file) = (&self.name, self.arena.file().map_or_else(String::new, |file| format!(" {file}")));
        let replaced = marker.and_then(|marker| {
            let marker = self.arena.received_marker(marker).ok_or("the cache has no file")?;
            self.arena.replace_lost_file(marker, !cache.is_stable()).map_err(|e| e.to_string())
        });
        drop(cache);
        error!(
            "{name}: the cache file{file} was removed or replaced while the daemon runs (by rm, or RemoveIPC= of \
             logind); the cache does not survive a crash any more; stop the daemon with SIGTERM and start it again to \
             get one that does"
        );
        if let Err(cause) = replaced {
            self.arena.note_unmarked_loss();
            self.note_lost_cache(cause);
        }
        Ok(())
    }

    /// Records at the image that its cache does not survive, because no marker could be created (`cause`). On a thread
    /// of its own: the image may not answer.
    fn note_lost_cache(&self, cause: String) {
        let (name, backing) = (self.name.clone(), Arc::clone(&self.backing));
        let record = move || {
            if !backing.lose_cache().is_ok_and(|is_recorded| is_recorded) {
                error!("{name}: the next daemon would not notice a loss of completed writes ({cause})");
            }
        };
        if let Err(e) = thread::Builder::new().name("lost cache".to_owned()).spawn(record) {
            error!("{}: the next daemon would not notice a loss of completed writes ({e})", self.name);
        }
    }

    /// Microseconds since the image was opened.
    pub fn now(&self) -> Tick {
        Tick::from_ns(u64::try_from(self.opened.elapsed().as_nanos()).expect("584 years"))
    }

    /// Ends the tenure if everything is on the image, and records the image's change token for the next daemon.
    ///
    /// => The record comes first: a cache file that is removed must not be missed by the next daemon.
    fn end_tenure(&mut self) {
        let cache = self.cache.get_mut().unwrap_or_else(PoisonError::into_inner);
        if cache.ops_in_flight() > 0 {
            // The image hangs. It must not be waited for: the next daemon finds the cache by the record, and the ledger
            // says what may be missing.
            self.arena.keep_on_drop(true);
            return;
        }
        self.rest.end();
        self.arena.remove_guest_formats(self.backing.recorded_formats());
        // The ledger says more than the cache: it calls clean what an earlier daemon has synced.
        let is_written =
            if self.arena.place() == CachePlace::Memory { cache.is_stable() } else { !self.arena.holds_unwritten() };
        // A guest that has not learned of a loss must learn of it from the next daemon.
        let is_over = is_written && !self.arena.has_data_loss();
        match is_over.then(|| self.backing.end_tenure()) {
            Some(Err(e)) => {
                warn!("{}: cannot record at the image that everything is on it ({e}); its cache stays", self.name);
                self.arena.keep_on_drop(true);
            }
            Some(Ok(true)) => self.arena.set_recorded(true, true),
            _ => {}
        }
        if let Some(token) = self.backing.change_token() {
            self.arena.record_token_now(token);
        }
    }

    fn lock(&self) -> MutexGuard<'_, PageCache> {
        // A thread that panicked in the cache found an invariant broken: the cache must not be used any more.
        self.cache.lock().expect("no thread panics with the cache locked")
    }

    /// Wakes all workers of all devices that use the image.
    pub fn wake_workers(&self) {
        let mailboxes = self.mailboxes.lock().expect("no thread panics with the list locked");
        wake(&self.name, &mailboxes);
    }

    /// Moves notices that are not for `worker` to the mailboxes of their workers. Returns those mailboxes, whose
    /// workers the caller wakes.
    #[inline]
    fn route_notices(&self, worker: u64, notices: &mut Vec<Notice>) -> Vec<Arc<Mailbox>> {
        if notices.iter().all(|notice| worker_of(notice) == worker) {
            return Vec::new();
        }
        self.post_to_others(worker, notices)
    }

    fn post_to_others(&self, worker: u64, notices: &mut Vec<Notice>) -> Vec<Arc<Mailbox>> {
        let mut recipients: Vec<Arc<Mailbox>> = Vec::new();
        let mailboxes = self.mailboxes.lock().expect("no thread panics with the list locked");
        notices.retain(|notice| {
            let other = worker_of(notice);
            if other == worker {
                return true;
            }
            if planted(PlantedBug::NoticeDropped) {
                return false;
            }
            let mailbox = &mailboxes[usize::try_from(other).expect("16 bits")];
            mailbox.notices.lock().expect("no thread panics with a mailbox locked").push(*notice);
            if !recipients.iter().any(|known| Arc::ptr_eq(known, mailbox)) {
                recipients.push(Arc::clone(mailbox));
            }
            false
        });
        recipients
    }

    /// The oldest operation of the cache that has not completed, if there is one: what it does, the sectors that it
    /// touches, and for how long it has been in flight. `None` while a worker uses the cache.
    pub fn oldest_op(&self) -> Option<Option<(OpKind, SectorSpan, Duration)>> {
        let oldest = self.cache.try_lock().ok()?.oldest_op();
        let age = |since| Duration::from_micros(self.now().since_us(since));
        Some(oldest.map(|(kind, span, since)| (kind, span, age(since))))
    }

    /// As [`CachedImage::stats`]; `None` while a worker uses the cache.
    pub fn try_stats(&self) -> Option<Stats> {
        Some(self.cache.try_lock().ok()?.stats())
    }

    /// Whether the image lacks completed writes or has not made them durable; `true` while a worker uses the cache.
    pub fn has_unstable_data(&self) -> bool {
        self.cache.try_lock().map_or(true, |cache| !cache.is_stable())
    }

    /// The port of one more worker thread, of the device with this name, which counts its store operations.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if the store's queue or a descriptor cannot be created.
    pub fn port(self: &Arc<Self>, device: &str, counters: WorkerCounters) -> Result<WorkerPort> {
        let mut store = self.backing.attach()?;
        store.hint_memory(self.arena.addresses());
        let waker = Waker::new().map_err(|e| Error::io(ErrorKind::System, "cannot make an eventfd for a worker", e))?;
        let mailbox = Arc::new(Mailbox { notices: Mutex::default(), waker: Arc::new(waker) });
        let mut mailboxes = self.mailboxes.lock().expect("no thread panics with the list locked");
        mailboxes.push(Arc::clone(&mailbox));
        let worker = mailboxes.len() as u64 - 1;
        drop(mailboxes);
        let reader = self.reader_of(device);
        Ok(WorkerPort {
            image: Arc::clone(self),
            worker,
            reader,
            mailbox,
            counters,
            store,
            store_ready: false,
            backlog: VecDeque::new(),
            events: Vec::new(),
            reaped: VecDeque::new(),
            notices: Vec::new(),
            closed: false,
        })
    }
}

impl CachedImage {
    /// The number of a device among those that use the image. From the second one on, the cache is shared fairly.
    fn reader_of(&self, device: &str) -> usize {
        let mut readers = self.readers.lock().expect("no thread panics with the list locked");
        let known = readers.iter().position(|reader| reader.device == device);
        // The number of a device that has left is free.
        if let Some(reader) = known.or_else(|| readers.iter().position(|reader| reader.ports == 0)) {
            let known = &mut readers[reader];
            device.clone_into(&mut known.device);
            known.ports += 1;
            if known.ports == 1 {
                self.lock().set_reader_present(reader, true);
            }
            self.count_readers(&readers);
            return reader;
        }
        readers.push(Reader { device: device.to_owned(), ports: 1 });
        if readers.len() > 1 {
            self.lock().share(readers.len());
        }
        self.count_readers(&readers);
        readers.len() - 1
    }

    /// A worker of a reader ends its use of the image.
    fn leave(&self, reader: usize) {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers[reader].ports -= 1;
        if readers[reader].ports == 0
            && readers.len() > 1
            && let Ok(mut cache) = self.cache.lock()
        {
            cache.set_reader_present(reader, false);
        }
        self.count_readers(&readers);
    }

    fn count_readers(&self, readers: &[Reader]) {
        let present = readers.iter().filter(|reader| reader.ports > 0).count();
        self.reader_count.store(present, Ordering::Relaxed);
    }
}

impl Drop for CachedImage {
    fn drop(&mut self) {
        self.end_tenure();
    }
}

/// One worker's access to a cached image.
#[derive(Debug)]
pub struct WorkerPort {
    image: Arc<CachedImage>,
    worker: u64,
    /// The device's number among those that use the image.
    reader: usize,
    mailbox: Arc<Mailbox>,
    counters: WorkerCounters,
    store: Box<dyn StoreQueue>,
    /// The store's descriptor was readable; its events were not reaped since.
    store_ready: bool,
    /// Requests to submit, and those that the store's queue had no space for.
    backlog: VecDeque<IoRequest>,
    events: Vec<Event>,
    /// Events that were reaped and not yet reported to the cache.
    reaped: VecDeque<Event>,
    notices: Vec<Notice>,
    /// [`WorkerPort::close`] was called.
    closed: bool,
}

impl WorkerPort {
    /// The image behind the port.
    pub fn image(&self) -> &Arc<CachedImage> {
        &self.image
    }

    /// Whether several devices use the image.
    pub fn is_shared(&self) -> bool {
        self.image.reader_count.load(Ordering::Relaxed) > 1
    }

    /// The descriptor that is readable while the store has events.
    pub fn store_fd(&self) -> RawFd {
        self.store.wake_fd()
    }

    /// Records that the store's descriptor was readable.
    pub fn set_store_ready(&mut self) {
        self.store_ready = true;
    }

    /// The waker by which other threads wake this worker.
    pub fn waker(&self) -> &Arc<Waker> {
        &self.mailbox.waker
    }

    /// This worker's ticket with the local part `local`, which has at most 48 bits.
    pub fn ticket(&self, local: u64) -> Ticket {
        debug_assert!(local >> WORKER_SHIFT == 0, "the local part of a ticket has 48 bits");
        Ticket(self.worker << WORKER_SHIFT | local)
    }

    /// The local part of a ticket.
    pub fn local_part(ticket: Ticket) -> u64 {
        ticket.0 & ((1 << WORKER_SHIFT) - 1)
    }

    /// The address of a piece's first byte; `None`: the piece is zeros.
    pub fn memory(&self, piece: &Piece) -> Option<*mut u8> {
        let offset = usize::from(piece.first) * SECTOR_SIZE;
        // The offset is within the frame. `wrapping_add` needs no proof of that.
        piece.frame.map(|frame| self.image.arena.frame(frame).wrapping_add(offset))
    }

    /// Reaps the store's events and, if the waker was `notified`, notices from other workers. Returns whether there are
    /// any of either.
    pub fn reap(&mut self, notified: bool) -> bool {
        if mem::take(&mut self.store_ready) || self.store.may_have_events() {
            self.store.reap(&mut self.events);
            self.reaped.extend(self.events.drain(..));
        }
        if notified {
            let mut mail = self.mailbox.notices.lock().expect("no thread panics with a mailbox locked");
            self.notices.append(&mut mail);
        }
        !self.reaped.is_empty() || !self.notices.is_empty()
    }

    /// Locks the cache: completes the reaped store operations (of those with very many pages, the first ones), then
    /// calls `act` with the cache and its notices to this worker. Afterwards submits all store operations, if a request
    /// waits for one of them.
    pub fn with_cache<R>(&mut self, now: Tick, act: impl FnOnce(&mut PageCache, &mut Vec<Notice>) -> R) -> R {
        let Self { image, worker, reader, reaped, notices, counters, .. } = self;
        let mut cache = image.lock();
        if !reaped.is_empty() {
            image.arena.end_changes();
        }
        let mut pages = 0;
        while pages < REAPED_PAGES_MAX
            && let Some(event) = reaped.pop_front()
        {
            // While the store is known to fail, every retry of a page would otherwise be a log line.
            let level = if cache.health() == Health::Healthy { Level::Warn } else { Level::Debug };
            let (tag, outcome) = outcome_of(&image.name, level, event);
            pages += cache.pages_of_op(tag);
            let (kind, span, since) = cache.operation(tag);
            let bytes = outcome.fault().is_none().then(|| span.count * SECTOR_BYTES);
            counters.store_completed(kind.into(), now.since_ns(since), bytes);
            cache.complete(tag, &outcome, now);
        }
        cache.take_notices(notices);
        let recipients = image.route_notices(*worker, notices);
        cache.set_reader(*reader);
        let result = act(&mut cache, notices);
        let awaited = take_ops(&mut cache, image, counters, &mut self.backlog);
        let rest = if cache.changes_in_flight() == 0 { image.arena.rest_point() } else { None };
        drop(cache);
        wake(&image.name, &recipients);
        if awaited {
            self.submit();
        }
        if let Some(rest) = rest {
            self.image.rest.note(rest, &self.image.backing, &self.image.arena);
        }
        result
    }

    /// Ends a turn, with the cache locked: calls `act`, then pumps the cache. Afterwards submits all store operations,
    /// and delivers notices to other workers. Returns when the cache must be pumped next, even if nothing else happens.
    pub fn end_turn(&mut self, now: Tick, act: impl FnOnce(&mut PageCache)) -> Option<Tick> {
        let Self { image, worker, notices, counters, .. } = self;
        let mut cache = image.lock();
        act(&mut cache);
        cache.pump(now);
        take_ops(&mut cache, image, counters, &mut self.backlog);
        cache.take_notices(notices);
        if cache.is_stable() {
            image.arena.all_written();
        }
        while let Some(event) = cache.take_health_event() {
            report_health(&image.name, event, cache.stats().dirty_pages);
        }
        let deadline = cache.next_deadline();
        drop(cache);
        wake(&image.name, &image.route_notices(*worker, notices));
        self.submit();
        let retry = self.store.retry_after().map(|pause| now.plus_us(low_us(pause)));
        match (deadline, retry) {
            _ if !self.notices.is_empty() => Some(now),
            (Some(deadline), Some(retry)) => Some(deadline.min(retry)),
            (due, None) | (None, due) => due,
        }
    }

    /// Submits the backlog to the store, as far as the store's queue has space.
    fn submit(&mut self) {
        let has_backlog = !self.backlog.is_empty();
        while let Some(request) = self.backlog.pop_front() {
            match self.store.submit(request) {
                Ok(()) => {}
                Err(Refused::Full(request)) => {
                    self.backlog.push_front(request);
                    break;
                }
                Err(Refused::Invalid(request)) => {
                    unreachable!("the cache keeps to limits that were checked: {request:?} {:?}", self.store.limits())
                }
            }
        }
        self.store.kick();
        if has_backlog {
            // The image's modification time may be that of this call, on a loaded host long after the heartbeat before.
            self.image.arena.end_changes();
        }
    }
}

impl Drop for WorkerPort {
    /// => What is in flight keeps the cache's memory mapped, however the port ends: no other mapping may come to lie
    ///    there.
    fn drop(&mut self) {
        if !self.closed {
            self.close(DRAIN_MAX);
        }
        self.image.leave(self.reader);
    }
}

/// Wakes the workers that have new notices.
#[inline]
fn wake(name: &str, recipients: &[Arc<Mailbox>]) {
    for mailbox in recipients {
        if let Err(e) = mailbox.waker.notify() {
            warn!("{name}: cannot wake a worker thread: {e}");
        }
    }
}

/// Moves the cache's new store operations to the backlog. Returns whether a request waits for one of them.
#[inline]
fn take_ops(
    cache: &mut PageCache,
    image: &CachedImage,
    counters: &WorkerCounters,
    backlog: &mut VecDeque<IoRequest>,
) -> bool {
    cache.has_new_ops() && take_new_ops(cache, image, counters, backlog)
}

fn take_new_ops(
    cache: &mut PageCache,
    image: &CachedImage,
    counters: &WorkerCounters,
    backlog: &mut VecDeque<IoRequest>,
) -> bool {
    let mut awaited = false;
    cache.take_ops(|op| {
        awaited |= op.urgency == Urgency::Demand;
        counters.store_submitted(op.kind.into());
        if op.kind.is_change() {
            image.arena.begin_change(op.span);
        }
        if op.kind == OpKind::Write && image.backing.shows_format(op.span) {
            note_ends(image, &op);
        }
        backlog.push_back(request_of(&image.arena, &op));
    });
    awaited
}

/// Tells the store what a write puts into the first page and the last sector of the image.
fn note_ends(image: &CachedImage, op: &StoreOpRef<'_>) {
    let note = |first, bytes: Vec<u8>| {
        let unrecorded = image.backing.note_guest_write(first, &bytes);
        // In the ledger at once: whether the image can record it is known only after this write has begun.
        if unrecorded != 0 {
            image.arena.add_guest_formats(unrecorded);
        }
    };
    let in_first_page = SECTORS_PER_PAGE.saturating_sub(op.span.start).min(op.span.count);
    if in_first_page > 0 {
        note(op.span.start, image.arena.sectors(op.frames[0], op.first_sector, low_u8(in_first_page)));
    }
    if op.span.end() == image.limits().size_bytes.get() / SECTOR_BYTES {
        let last = u64::from(op.first_sector) + op.span.count - 1;
        let frame = op.frames[usize::try_from(last / SECTORS_PER_PAGE).expect("an operation has few pages")];
        note(op.span.end() - 1, image.arena.sectors(frame, low_u8(last % SECTORS_PER_PAGE), 1));
    }
}

/// A pause in microseconds.
fn low_us(pause: Duration) -> u64 {
    u64::try_from(pause.as_micros()).unwrap_or(u64::MAX)
}

fn worker_of(notice: &Notice) -> u64 {
    let (Notice::Ready(ticket, _) | Notice::Unreadable(ticket, ..) | Notice::Resume(ticket) | Notice::Done(ticket, _)) =
        notice;
    ticket.0 >> WORKER_SHIFT
}
