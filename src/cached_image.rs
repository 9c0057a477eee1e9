//! \[4\] An image with its cache (UVM's `uvm_object`): the place where the cache's plans become store requests, and the
//! store's events cache calls.
//!
//! A cached image outlives every connection, so a guest that reboots or a front-end that comes back finds it warm. One
//! writable device has it, or any number of read-only ones. Each worker thread reaches it through a [`WorkerPort`] of its
//! own, with its own store: what a port submits, it reaps. A notice for a request of another worker goes through that
//! worker's mailbox.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use log::{Level, error, info, log, warn};

use crate::arena::{Arena, Populator, ZERO_SLOTS};
use crate::cache::{
    FrameMemory, Health, HealthEvent, Notice, Outcome, PageCache, Piece, Settings, Stats, StoreOpRef, Ticket,
};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Backing, Event, IoRequest, Limits, Refused, Segment, StoreQueue};
use crate::units::{
    Fault, FrameId, FrameRecord, PAGE_SIZE, SECTOR_BYTES, SECTOR_SIZE, SectorMask, SectorSpan, Tick, counted,
};
use crate::waker::Waker;

/// Bits of a ticket that name the worker; the rest is the worker's own business.
const WORKER_SHIFT: u32 = 48;

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

    fn note_zero(&self, place: usize, span: Option<SectorSpan>) {
        Arena::note_zero(self, place, span);
    }
}

/// Notices for a worker from other workers, and the waker that wakes it.
#[derive(Debug)]
struct Mailbox {
    notices: Mutex<Vec<Notice>>,
    waker: Arc<Waker>,
}

/// An image, its page cache, and the memory of both.
#[derive(Debug)]
pub struct CachedImage {
    /// What the log calls it.
    name: String,
    cache: Mutex<PageCache>,
    /// Declared before the arena, which it uses.
    _populator: Populator,
    arena: Arc<Arena>,
    backing: Arc<dyn Backing>,
    mailboxes: Mutex<Vec<Arc<Mailbox>>>,
    epoch: Instant,
}

impl CachedImage {
    /// An image with a cache of the given shape in `arena`, which has as many frames; what a predecessor left there is
    /// taken over. `name` is for the log.
    pub fn new(name: &str, backing: Arc<dyn Backing>, arena: Arena, settings: Settings) -> Arc<Self> {
        let arena = Arc::new(arena);
        let mut cache = PageCache::new(settings, Box::new(Arc::clone(&arena)));
        let (pages, dirty) = cache.restore(arena.records(), arena.pending_zeroes());
        if pages > 0 {
            let pages = counted(u64::from(pages), "cached page");
            info!("{name}: restored {pages} ({dirty} dirty) left by the previous daemon");
        }
        Arc::new(Self {
            name: name.to_owned(),
            cache: Mutex::new(cache),
            _populator: Populator::start(name, &arena),
            arena,
            backing,
            mailboxes: Mutex::default(),
            epoch: Instant::now(),
        })
    }

    /// The memory of the cache.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// What the image can do.
    pub fn limits(&self) -> &Limits {
        self.backing.limits()
    }

    /// What the cache did and holds.
    pub fn stats(&self) -> Stats {
        let stats = self.lock().stats();
        Stats { metadata_bytes: stats.metadata_bytes + self.arena.overhead_bytes() as u64, ..stats }
    }

    /// Microseconds since the image was opened.
    pub fn now(&self) -> Tick {
        Tick(u64::try_from(self.epoch.elapsed().as_micros()).expect("584 000 years"))
    }

    fn lock(&self) -> MutexGuard<'_, PageCache> {
        // A thread that panicked inside the cache has broken an invariant: nobody may go on with it.
        self.cache.lock().expect("no thread panics with the cache locked")
    }

    /// Hands on the notices that are not for `worker`; returns who has got some, and is to be woken.
    fn route_notices(&self, worker: u64, notices: &mut Vec<Notice>) -> Vec<Arc<Mailbox>> {
        let mut recipients: Vec<Arc<Mailbox>> = Vec::new();
        if notices.iter().all(|notice| worker_of(notice) == worker) {
            return recipients;
        }
        let mailboxes = self.mailboxes.lock().expect("nobody panics holding the list");
        notices.retain(|notice| {
            let other = worker_of(notice);
            if other == worker {
                return true;
            }
            let mailbox = &mailboxes[usize::try_from(other).expect("16 bits")];
            mailbox.notices.lock().expect("nobody panics holding a mailbox").push(*notice);
            if !recipients.iter().any(|known| Arc::ptr_eq(known, mailbox)) {
                recipients.push(Arc::clone(mailbox));
            }
            false
        });
        recipients
    }

    /// A way in for one more worker thread.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the host refuses the store's ring or a descriptor.
    pub fn port(self: &Arc<Self>) -> Result<WorkerPort> {
        let mut store = self.backing.attach()?;
        store.hint_memory(self.arena.addresses());
        let waker = Waker::new().map_err(|e| Error::io(ErrorKind::System, "cannot make an eventfd for a worker", e))?;
        let mailbox = Arc::new(Mailbox { notices: Mutex::default(), waker: Arc::new(waker) });
        let mut mailboxes = self.mailboxes.lock().expect("nobody panics holding the list");
        mailboxes.push(Arc::clone(&mailbox));
        let worker = mailboxes.len() as u64 - 1;
        Ok(WorkerPort {
            image: Arc::clone(self),
            worker,
            mailbox,
            store,
            store_ready: false,
            backlog: VecDeque::new(),
            events: Vec::new(),
            notices: Vec::new(),
        })
    }
}

/// One worker's way into an image.
#[derive(Debug)]
pub struct WorkerPort {
    image: Arc<CachedImage>,
    worker: u64,
    mailbox: Arc<Mailbox>,
    store: Box<dyn StoreQueue>,
    /// The store's descriptor was readable.
    store_ready: bool,
    /// Requests that are to be submitted, or that the store had no room for.
    backlog: VecDeque<IoRequest>,
    events: Vec<Event>,
    notices: Vec<Notice>,
}

impl WorkerPort {
    /// The image behind the port.
    pub fn image(&self) -> &Arc<CachedImage> {
        &self.image
    }

    /// Readable while store events wait.
    pub fn store_fd(&self) -> RawFd {
        self.store.wake_fd()
    }

    /// The store's descriptor was found readable.
    pub fn set_store_ready(&mut self) {
        self.store_ready = true;
    }

    /// Rung when another thread has something for this worker.
    pub fn waker(&self) -> &Arc<Waker> {
        &self.mailbox.waker
    }

    /// A ticket of this worker's.
    pub fn ticket(&self, own: u64) -> Ticket {
        debug_assert!(own >> WORKER_SHIFT == 0, "a worker's own part has 48 bits");
        Ticket(self.worker << WORKER_SHIFT | own)
    }

    /// The worker's own part of a ticket.
    pub fn local_part(ticket: Ticket) -> u64 {
        ticket.0 & ((1 << WORKER_SHIFT) - 1)
    }

    /// First byte of a piece's memory; `None`: zeros.
    pub fn memory(&self, piece: &Piece) -> Option<*mut u8> {
        let offset = usize::from(piece.first) * SECTOR_SIZE;
        // `wrapping_add` for a plain address: the offset stays within the frame.
        piece.frame.map(|frame| self.image.arena.frame(frame).wrapping_add(offset))
    }

    /// Collects what the store has finished and, if the waker `notified`, what other workers left. Whether there is anything.
    pub fn reap(&mut self, notified: bool) -> bool {
        if std::mem::take(&mut self.store_ready) || self.store.may_have_events() {
            self.store.reap(&mut self.events);
        }
        if notified {
            let mut mail = self.mailbox.notices.lock().expect("nobody panics holding a mailbox");
            self.notices.append(&mut mail);
        }
        !self.events.is_empty() || !self.notices.is_empty()
    }

    /// Opens the cache for the worker: the events collected go in, then `act` gets the cache and what it has to say to this
    /// worker. If a request waits for the store after that, all plans are sent off.
    pub fn with_cache<R>(&mut self, now: Tick, act: impl FnOnce(&mut PageCache, &mut Vec<Notice>) -> R) -> R {
        let Self { image, worker, events, notices, .. } = self;
        let mut cache = image.lock();
        for event in events.drain(..) {
            // Of a store that is known to fail, each page that is tried again would be a line.
            let level = if cache.health() == Health::Healthy { Level::Warn } else { Level::Debug };
            let (tag, outcome) = outcome_of(&image.name, level, event);
            cache.complete(tag, &outcome, now);
        }
        cache.take_notices(notices);
        let recipients = image.route_notices(*worker, notices);
        let result = act(&mut cache, notices);
        let awaited = take_ops(&mut cache, &image.arena, &mut self.backlog);
        drop(cache);
        wake(&recipients);
        if awaited {
            self.submit();
        }
        result
    }

    /// The end of a turn: after `act` the cache starts what is due, all its plans go to the store, its notices to their
    /// workers. Returns when the cache wants to be pumped although nothing happens.
    pub fn end_turn(&mut self, now: Tick, act: impl FnOnce(&mut PageCache)) -> Option<Tick> {
        let Self { image, worker, notices, .. } = self;
        let mut cache = image.lock();
        act(&mut cache);
        cache.pump(now);
        take_ops(&mut cache, &image.arena, &mut self.backlog);
        cache.take_notices(notices);
        if cache.is_stable() {
            image.arena.all_written();
        }
        while let Some(event) = cache.take_health_event() {
            report_health(&image.name, event, cache.stats().dirty_pages);
        }
        let deadline = cache.next_deadline();
        drop(cache);
        wake(&image.route_notices(*worker, notices));
        self.submit();
        if self.notices.is_empty() { deadline } else { Some(now) }
    }

    /// Hands the cache's plans to the store, and starts them.
    fn submit(&mut self) {
        while let Some(request) = self.backlog.pop_front() {
            match self.store.submit(request) {
                Ok(()) => {}
                Err(Refused::Full(request)) => {
                    self.backlog.push_front(request);
                    break;
                }
                Err(Refused::Invalid(request)) => {
                    unreachable!("the cache keeps to the store's limits: {request:?} {:?}", self.store.limits())
                }
            }
        }
        self.store.kick();
    }
}

/// Rings the bells of workers that have got something.
fn wake(recipients: &[Arc<Mailbox>]) {
    for mailbox in recipients {
        if let Err(error) = mailbox.waker.notify() {
            warn!("cannot wake a worker: {error}");
        }
    }
}

/// Takes what the cache wants the store to do. Whether a request waits for any of it.
fn take_ops(cache: &mut PageCache, arena: &Arena, backlog: &mut VecDeque<IoRequest>) -> bool {
    let mut awaited = false;
    cache.take_ops(|op| {
        awaited |= op.demand;
        backlog.push_back(request_of(arena, &op));
    });
    awaited
}

/// Reports a change of the image's health to the operator: which requests suffer, what is kept, what to do.
fn report_health(name: &str, event: HealthEvent, dirty_pages: u64) {
    let errors = |fault| match fault {
        // Of a full image, what needs no new space still succeeds: FLUSHes, too.
        Fault::NoSpace => "requests that need new space return errors",
        _ => "FLUSH returns errors",
    };
    let remedy = |fault| match fault {
        Fault::NoSpace => "free space on the image's file system",
        _ => "check the disk",
    };
    let kept = format!("{} kept", counted(dirty_pages, "dirty page"));
    match event {
        HealthEvent::NoReservations => info!(
            "{name}: the image's file system does not support fallocate; FLUSH, not the write, will report a full disk"
        ),
        HealthEvent::Health(Health::Healthy) => info!("{name}: write-back recovered"),
        HealthEvent::Health(Health::Reporting(fault)) => {
            error!("{name}: write-back failing ({fault}); {}; {kept} and retried; {}", errors(fault), remedy(fault));
        }
        HealthEvent::Health(Health::Holding(fault)) => error!(
            "{name}: write-back failing ({fault}); requests that need the image wait; {kept} and retried; {}",
            remedy(fault)
        ),
        HealthEvent::Health(Health::Stopped(fault)) => error!(
            "{name}: write-back stopped ({fault}); only cached data can be read; {kept}; {}, then send SIGHUP",
            remedy(fault)
        ),
    }
}

fn worker_of(notice: &Notice) -> u64 {
    let (Notice::Ready(ticket, _) | Notice::Unreadable(ticket, ..) | Notice::Resume(ticket) | Notice::Done(ticket, _)) =
        notice;
    ticket.0 >> WORKER_SHIFT
}

/// A cache's op as a store's request: neighbouring frames become one segment.
fn request_of(arena: &Arena, op: &StoreOpRef<'_>) -> IoRequest {
    let len = op.span.count * SECTOR_BYTES;
    let mut segments: Vec<Segment> = Vec::new();
    let mut left = usize::try_from(len).expect("an operation is at most some megabytes");
    let mut skip = usize::from(op.first_sector) * SECTOR_SIZE;
    for &frame in op.frames {
        let base = arena.frame(frame).wrapping_add(skip);
        let len = left.min(PAGE_SIZE - skip);
        match segments.last_mut() {
            Some(last) if last.base.wrapping_add(last.len) == base => last.len += len,
            _ => segments.push(Segment { base, len }),
        }
        left -= len;
        skip = 0;
    }
    IoRequest { tag: u64::from(op.tag), op: op.kind, offset: op.span.start * SECTOR_BYTES, len, segments }
}

/// A store's event as the cache's outcome; a failure is logged at `level`.
fn outcome_of(name: &str, level: Level, event: Event) -> (u32, Outcome) {
    let (tag, outcome) = match event {
        Event::Done { tag } => (tag, Outcome::Done),
        Event::Mapped { tag, extents } => {
            let sectors = |len: u64| len / SECTOR_BYTES;
            let runs = extents.iter().map(|extent| (sectors(extent.len), extent.kind));
            (tag, Outcome::Mapped(runs.collect()))
        }
        Event::Failed { tag, fault, errno } => {
            let reason = std::io::Error::from_raw_os_error(errno);
            // The cache falls back where an operation is not supported.
            let level = if fault == Fault::Unsupported { Level::Debug } else { level };
            log!(level, "{name}: an operation on the image failed: {fault} ({reason})");
            (tag, Outcome::Failed(fault))
        }
    };
    (u32::try_from(tag).expect("tags are the cache's own"), outcome)
}
