//! A worker's port to a cached image: its access to the cache and to the store.

mod close;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::mem;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use log::warn;

use crate::cache::{Notice, PageCache, Piece, StoreOpRef, Ticket};
use crate::counters::worker::WorkerCounters;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{DRAIN_MAX, Event, IoRequest, Refused, StoreQueue};
use crate::units::{OpKind, SECTOR_BYTES, SECTOR_SIZE, SECTORS_PER_PAGE, Tick, Urgency, low_u8};
use crate::waker::Waker;

use super::report::report_health;
use super::translate::{log_failure, outcome_of, request_of};
use super::{AttachedDevice, CachedImage, Mailbox};

/// The upper bits of a ticket, from this one on, are the worker's number; the lower ones are the local part, which only
/// the worker interprets.
const WORKER_SHIFT: u32 = 48;
/// Pages whose operations are completed in one go, or a few more, because other workers wait for the cache meanwhile.
/// This takes a few hundred microseconds.
const REAPED_PAGES_MAX: usize = 2048;

impl CachedImage {
    /// Creates the port of another worker thread of the device with this name. The port counts its store operations in
    /// `counters`.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if the store's queue or a descriptor cannot be created.
    pub fn port(self: &Arc<Self>, device: &str, counters: WorkerCounters) -> Result<WorkerPort> {
        let mut store = self.backing.attach()?;
        let waker =
            Waker::new().map_err(|e| Error::io(ErrorKind::System, "cannot create an eventfd for a worker", e))?;
        let mailbox = Mailbox { notices: Mutex::default(), memory_seen: AtomicU64::default(), waker: Arc::new(waker) };
        let mailbox = Arc::new(mailbox);
        let mut mailboxes = self.mailboxes.lock();
        mailboxes.push(Arc::clone(&mailbox));
        let worker = mailboxes.len() as u64 - 1;
        drop(mailboxes);
        // After the mailbox is in the list, which ensures that every later change reaches this worker.
        store.hint_memory(self.arena.addresses());
        store.limit_memory(self.arena.addresses_in_use().end);
        let reader = self.attach(device);
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

    /// Attaches a worker of `device`, and returns the device's number among those that are attached. From the second
    /// device on, the cache is shared fairly.
    fn attach(&self, device: &str) -> usize {
        let mut devices = self.devices.lock().expect("no thread panics with the list locked");
        let known = devices.iter().position(|known| known.name == device);
        // The number of a device that has detached is free.
        if let Some(number) = known.or_else(|| devices.iter().position(|known| known.ports == 0)) {
            let known = &mut devices[number];
            device.clone_into(&mut known.name);
            known.ports += 1;
            if known.ports == 1 {
                self.lock().set_reader_present(number, true);
            }
            self.count_attached(&devices);
            return number;
        }
        devices.push(AttachedDevice { name: device.to_owned(), ports: 1 });
        if devices.len() > 1 {
            self.lock().share(devices.len());
        }
        self.count_attached(&devices);
        devices.len() - 1
    }

    /// Detaches a worker of the device with this number.
    fn detach(&self, number: usize) {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices[number].ports -= 1;
        if devices[number].ports == 0
            && devices.len() > 1
            && let Ok(mut cache) = self.cache.lock()
        {
            cache.set_reader_present(number, false);
        }
        self.count_attached(&devices);
    }

    fn count_attached(&self, devices: &[AttachedDevice]) {
        let attached = devices.iter().filter(|device| device.ports > 0).count();
        self.device_count.store(attached, Ordering::Relaxed);
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
    /// The store's descriptor was readable, and its events have not been reaped since.
    store_ready: bool,
    /// Requests to submit, including those that did not fit into the store's queue.
    backlog: VecDeque<IoRequest>,
    events: Vec<Event>,
    /// Events that were reaped and are not yet reported to the cache.
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
        self.image.device_count.load(Ordering::Relaxed) > 1
    }

    /// The descriptor that is readable while the store has events.
    pub fn store_fd(&self) -> RawFd {
        self.store.wake_fd()
    }

    /// Records that the store's descriptor was readable.
    pub fn set_store_ready(&mut self) {
        self.store_ready = true;
    }

    /// The waker with which other threads wake this worker.
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

    /// The address of a piece's first byte; `None`: the piece reads as zeros.
    pub fn memory(&self, piece: &Piece) -> Option<*mut u8> {
        let offset = usize::from(piece.first) * SECTOR_SIZE;
        // The offset is within the frame. `wrapping_add` needs no proof of that.
        piece.frame.map(|frame| self.image.arena.frame(frame).wrapping_add(offset))
    }

    /// Reaps the store's events and, if the waker was `notified`, notices from other workers. Returns whether there
    /// were any.
    pub fn reap(&mut self, notified: bool) -> bool {
        if mem::take(&mut self.store_ready) || self.store.may_have_events() {
            self.store.reap(&mut self.events);
            self.reaped.extend(self.events.drain(..));
        }
        if notified {
            let mut mail = self.mailbox.notices.lock().expect("no thread panics with a mailbox locked");
            self.notices.append(&mut mail);
            drop(mail);
            self.follow_memory();
        }
        !self.reaped.is_empty() || !self.notices.is_empty()
    }

    /// Makes the store unpin memory that the cache no longer uses.
    fn follow_memory(&mut self) {
        let change = self.image.mailboxes.memory_changes.load(Ordering::Acquire);
        if self.mailbox.memory_seen.load(Ordering::Relaxed) != change {
            self.store.limit_memory(self.image.arena.addresses_in_use().end);
            self.mailbox.memory_seen.store(change, Ordering::Release);
        }
    }

    /// Locks the cache: completes the reaped store operations (only the first ones if they have very many pages), then
    /// calls `act` with the cache and its notices to this worker. Afterwards submits all store operations, if a request
    /// waits for one of them.
    pub fn with_cache<R>(&mut self, now: Tick, act: impl FnOnce(&mut PageCache, &mut Vec<Notice>) -> R) -> R {
        let Self { image, worker, reader, reaped, notices, counters, .. } = self;
        let mut cache = image.lock();
        if !reaped.is_empty() {
            image.arena.heartbeat();
        }
        let mut pages = 0;
        while pages < REAPED_PAGES_MAX
            && let Some(event) = reaped.pop_front()
        {
            let (tag, outcome, errno) = outcome_of(event);
            pages += cache.pages_of_op(tag);
            let (kind, span, since) = cache.operation(tag);
            if let Some(fault) = outcome.fault() {
                log_failure(&image.name, cache.health(), &kind.describe(span), fault, errno);
            }
            let bytes = outcome.fault().is_none().then(|| span.count * SECTOR_BYTES);
            counters.store_completed(kind.into(), now.since_ns(since), bytes);
            cache.complete(tag, &outcome, now);
        }
        if let Some((page, frame)) = cache.take_witness() {
            image.arena.record_witness(page, frame);
        }
        cache.take_notices(notices);
        let recipients = image.route_notices(*worker, notices);
        cache.set_reader(*reader);
        let result = act(&mut cache, notices);
        let awaited = take_ops(&mut cache, image, counters, &mut self.backlog);
        let idle = if cache.changes_in_flight() == 0 { image.arena.idle_point() } else { None };
        drop(cache);
        wake(&image.name, &recipients);
        if awaited {
            self.submit();
        }
        if let Some(idle) = idle {
            self.image.token_recorder.record_when_idle(idle, &self.image.backing, &self.image.arena);
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
        if cache.is_durable() {
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

    /// Submits the backlog to the store, as far as it fits into the store's queue.
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
            // The image's modification time may be that of this call, which on a loaded host can be long after the last
            // heartbeat.
            self.image.arena.heartbeat();
        }
    }
}

impl Drop for WorkerPort {
    /// => The cache's memory must stay mapped until the operations in flight end, even if the port is dropped: they
    ///    would write to another mapping at its addresses.
    fn drop(&mut self) {
        if !self.closed {
            self.close(DRAIN_MAX);
        }
        self.mailbox.memory_seen.store(u64::MAX, Ordering::Release);
        self.image.detach(self.reader);
    }
}

/// Wakes the workers that have new notices.
#[inline]
pub(super) fn wake(name: &str, recipients: &[Arc<Mailbox>]) {
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
            report_boundary_write(image, &op);
        }
        backlog.push_back(request_of(&image.arena, &op));
    });
    awaited
}

/// Reports to the store the data that a write puts into the first page and the last sector of the image.
fn report_boundary_write(image: &CachedImage, op: &StoreOpRef<'_>) {
    let note = |first, bytes: Vec<u8>| {
        let unrecorded = image.backing.inspect_guest_write(first, &bytes);
        // Record it in the ledger immediately: whether the image can record it is known only after this write has
        // started.
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

/// The number of the worker whose request a notice is about.
pub(super) fn worker_of(notice: &Notice) -> u64 {
    let (Notice::Ready(ticket, _) | Notice::Unreadable(ticket, ..) | Notice::Resume(ticket) | Notice::Done(ticket, _)) =
        notice;
    ticket.0 >> WORKER_SHIFT
}
