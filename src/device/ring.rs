//! One virtqueue as its worker runs it: takes available heads, pushes used elements, interrupts the driver.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use log::{error, info, warn};
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::budget::Budget;
use super::control::RingSetup;
use super::inflight::InflightTracker;
use super::interrupt::Interrupt;
use super::limits::HeldHead;
use crate::fault_injection::{PlantedBug, planted};
use crate::units::{Tick, counted};
use crate::virtio::GuestRam;
use crate::virtio::chain::DescriptorTable;
use crate::virtio::request::Malformed;
use crate::virtio::split::{QueueLayout, QueuePosition, SplitQueue};

/// Number of bytes of each region that must read as zeros for guest memory to count as blank.
const BLANK_BYTES: usize = 1 << 20;

/// A running virtqueue.
///
/// Public for the copy server in `benches/load/limit.rs`, which uses this code and only copies.
#[derive(Debug)]
pub struct Ring {
    /// The device and the ring; its log lines begin with it.
    label: String,
    layout: QueueLayout,
    /// `None`: the queue is not in guest memory at present, and is not served.
    queue: Option<SplitQueue>,
    /// The position at which the queue was last mapped.
    mapped_at: QueuePosition,
    /// The guest's memory.
    pub memory: Arc<GuestRam>,
    kick: File,
    interrupt: Option<Interrupt>,
    /// Reports to the front-end that the driver is faulty.
    error: Option<Interrupt>,
    /// The driver waits for an interrupt that has not been sent.
    interrupt_due: bool,
    /// Number of requests that were taken and have not completed.
    in_flight: u16,
    /// The pages of the requests in flight: see [`Budget::load_of`](super::budget::Budget::load_of).
    load: u64,
    /// Nothing is taken while `load` is this or more.
    load_max: u64,
    /// The next request, if one of the operator's limits holds it back.
    pub(super) held: Option<HeldHead>,
    /// `held` is not due yet: nothing is taken.
    is_held: bool,
    /// Requests in flight whose chains cannot be read yet; retried with the next memory table.
    unreadable: Vec<u16>,
    /// The driver has kicked.
    kicked: bool,
    /// The log already has a line about a chain that no status could complete.
    reported: bool,
    /// This vring's part of the inflight region, which the next daemon reads.
    tracker: Option<InflightTracker>,
    /// The requests that the previous daemon left in flight are known.
    recovered: bool,
    /// Heads that the previous daemon took and did not complete, and suspended ones, in reverse order. They are taken
    /// before any other.
    resubmissions: Vec<u16>,
    /// A long request was suspended because the ring drains: nothing is taken until new memory is set.
    suspended: bool,
    /// The driver violated the protocol in a way that no status can report: nothing more is taken.
    broken: bool,
}

impl Ring {
    /// Starts vring `index` of `device`.
    ///
    /// => Interrupts the driver immediately. The previous daemon may have died between a completion and its interrupt,
    ///    and with EVENT_IDX no later completion would make up for that.
    pub fn new(device: &str, index: u16, setup: RingSetup) -> Self {
        let RingSetup { layout, position, kick, call_fd, err_fd, memory, tracker } = setup;
        let mut ring = Self {
            label: format!("{device}: vring {index}"),
            layout,
            queue: None,
            mapped_at: position,
            memory,
            kick,
            interrupt: call_fd.map(Interrupt::new),
            error: err_fd.map(Interrupt::new),
            interrupt_due: true,
            in_flight: 0,
            load: 0,
            load_max: Budget::default().ring_pages,
            held: None,
            is_held: false,
            unreadable: Vec::new(),
            kicked: false,
            reported: false,
            tracker,
            recovered: false,
            resubmissions: Vec::new(),
            suspended: false,
            broken: false,
        };
        ring.map_queue();
        ring.trigger_if_due();
        ring
    }

    /// Maps the queue in guest memory. On the first success, recovers the requests of the previous daemon.
    fn map_queue(&mut self) {
        self.queue = SplitQueue::new(&self.memory, self.layout, self.mapped_at);
        if self.queue.is_none() {
            let QueueLayout { size, desc_table, avail_ring, used_ring, .. } = self.layout;
            error!(
                "{}: not served: its rings overlap, are misaligned, outside guest memory, or across two regions of it \
                 (size {size}, descriptor table {desc_table:#x}, available ring {avail_ring:#x}, used ring \
                 {used_ring:#x})",
                self.label
            );
        } else if !std::mem::replace(&mut self.recovered, true) {
            self.recover();
        }
    }

    /// Finds the requests that the previous daemon took and did not complete. The used ring shows which ones it
    /// completed, the inflight region which ones it took.
    ///
    /// => Together they determine the ring's position, whatever base the front-end sent. QEMU's may be older than the
    ///    last completion; cloud-hypervisor's may skip heads that no daemon has taken.
    fn recover(&mut self) {
        let (Some(queue), Some(tracker)) = (&mut self.queue, &mut self.tracker) else { return };
        let used = queue.used_idx();
        let Some(heads) = tracker.recover(used) else { return };
        let Ok(count) = u16::try_from(heads.len()) else { return };
        queue.set_position(QueuePosition { next_avail: used.wrapping_add(count), next_used: used });
        if count > 0 {
            let requests = counted(u64::from(count), "request");
            info!("{}: resubmitting {requests} that the previous daemon left in flight", self.label);
            self.resubmissions = heads;
            self.resubmissions.reverse();
        }
    }

    /// Whether every request that this daemon or the previous one took has completed, except those that cannot be read.
    pub fn is_drained(&self) -> bool {
        usize::from(self.in_flight) == self.unreadable.len() && !self.has_resubmissions()
            || planted(PlantedBug::DrainEndsEarly)
    }

    /// Whether an inflight region records its requests, so that the next daemon can repeat them.
    pub fn is_tracked(&self) -> bool {
        self.tracker.is_some()
    }

    /// Whether requests of the previous daemon are still to be taken.
    pub fn has_resubmissions(&self) -> bool {
        !self.resubmissions.is_empty() && !self.suspended && self.is_usable()
    }

    /// Sets the load at which nothing more is taken.
    pub(super) fn set_load_max(&mut self, pages: u64) {
        self.load_max = pages;
    }

    /// Whether requests with pages were taken and not completed.
    pub(super) fn has_load(&self) -> bool {
        self.load > 0
    }

    /// The number of pages that can still be taken. The request that exceeds it is the last one taken.
    pub(super) fn load_left(&self) -> u64 {
        self.load_max.saturating_sub(self.load)
    }

    /// Adds the pages of requests that were taken.
    pub(super) fn add_load(&mut self, pages: u64) {
        self.load = self.load.saturating_add(pages);
    }

    /// Updates whether the limits of this generation hold the next request back. Returns when it is due.
    pub(super) fn hold(&mut self, generation: u32, now: Tick) -> Option<Tick> {
        let due = self.held.filter(|head| head.generation == generation && head.ready_at > now);
        self.is_held = due.is_some();
        due.map(|head| head.ready_at)
    }

    /// Subtracts the pages of a request that is no longer in flight.
    pub(super) fn remove_load(&mut self, pages: u64) {
        self.load = self.load.saturating_sub(pages);
    }

    /// The request at `head`, which was taken and has not completed, is to be taken again: by this ring when it has
    /// drained, or by the next one after this ring has stopped.
    pub(super) fn suspend(&mut self, head: u16) {
        self.in_flight -= 1;
        self.resubmissions.push(head);
        self.suspended = true;
    }

    /// Returns the suspended requests that were taken last to the driver, as if they had not been taken. The others
    /// keep their mark in the inflight region, where the next ring finds them.
    ///
    /// => The ring has drained, and stops.
    pub(super) fn return_suspended(&mut self) {
        let is_due = self.suspended && !planted(PlantedBug::LongRequestForgotten);
        let Some(queue) = self.queue.as_mut().filter(|_| is_due) else { return };
        while let Some(&last) = self.resubmissions.first()
            && queue.return_head(last)
        {
            self.resubmissions.remove(0);
            if let Some(tracker) = &mut self.tracker {
                tracker.return_head(last);
            }
        }
    }

    /// Whether requests can be taken and completed now.
    fn is_usable(&self) -> bool {
        self.queue.is_some() && !self.broken
    }

    /// Makes `epoll` report each kick with `token`.
    ///
    /// => A kick is an edge, and the descriptor is never read. It belongs to the front-end, which may have made it
    ///    blocking, passed it for two rings, or read it itself; a read could block forever.
    ///
    /// # Errors
    /// The error of epoll_ctl(2).
    pub fn watch_kicks(&self, epoll: &Epoll, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        epoll.ctl(ControlOperation::Add, self.kick.as_raw_fd(), event)
    }

    /// Stops `epoll` from reporting kicks.
    pub fn unwatch_kicks(&self, epoll: &Epoll) {
        // Fails if they were never watched.
        let _ = epoll.ctl(ControlOperation::Delete, self.kick.as_raw_fd(), EpollEvent::default());
    }

    /// Sets the descriptor that interrupts the driver; sends an interrupt that is due.
    pub fn set_call_fd(&mut self, call_fd: Option<File>) {
        self.interrupt = call_fd.map(Interrupt::new);
        self.trigger_if_due();
    }

    /// Sets the descriptor that reports a faulty driver to the front-end.
    pub fn set_err_fd(&mut self, err_fd: Option<File>) {
        self.error = err_fd.map(Interrupt::new);
        if self.broken {
            self.signal_error();
        }
    }

    /// Reports to the front-end that the driver is faulty.
    fn signal_error(&mut self) {
        if let Some(Err(e)) = self.error.as_mut().map(Interrupt::trigger) {
            warn!("{}: cannot signal an error to the front-end: {e}", self.label);
        }
    }

    /// Uses new guest memory. A ring outside the new memory pauses until it is inside again: a front-end that changes a
    /// region removes it first.
    pub fn set_memory(&mut self, memory: &Arc<GuestRam>) {
        self.mapped_at = self.position();
        self.memory = Arc::clone(memory);
        self.map_queue();
        // The inflight region already records them.
        self.in_flight -= u16::try_from(self.unreadable.len()).expect("they are in flight");
        self.resubmissions.extend(self.unreadable.drain(..).rev());
        self.suspended = false;
    }

    /// The device's position in the queue.
    pub fn position(&self) -> QueuePosition {
        self.queue.as_ref().map_or(self.mapped_at, SplitQueue::position)
    }

    /// The descriptor table, read from `memory`, which is the ring's memory.
    pub fn table<'a>(&self, memory: &'a GuestRam) -> DescriptorTable<'a> {
        DescriptorTable::new(memory, GuestAddress(self.layout.desc_table), u32::from(self.layout.size))
    }

    /// Appends up to `max` of the next heads to `heads`, which is empty. [`Ring::commit`] takes them.
    ///
    /// => Whatever the guest writes, no more heads are in flight than the ring has descriptors.
    pub fn peek(&mut self, max: usize, heads: &mut Vec<u16>) {
        let max = max.min(usize::from(self.layout.size.saturating_sub(self.in_flight)));
        let Some(queue) = self.queue.as_mut().filter(|_| !self.broken && max > 0) else { return };
        if !self.resubmissions.is_empty() {
            heads.extend(self.resubmissions.iter().rev().take(max));
        } else if queue.peek(max, heads).is_err() {
            self.mark_broken("more heads are available than it has descriptors");
        }
    }

    /// Takes the heads that [`Ring::peek`] returned, or only the first ones.
    pub fn commit(&mut self, heads: &[u16]) {
        let count = u16::try_from(heads.len()).expect("no more than the ring's size");
        if !self.resubmissions.is_empty() {
            // The inflight region already records them, in their order.
            self.resubmissions.truncate(self.resubmissions.len().saturating_sub(heads.len()));
        } else if let Some(queue) = &mut self.queue {
            queue.advance(count);
            if let Some(tracker) = &mut self.tracker {
                heads.iter().for_each(|&head| tracker.take(head));
            }
        }
        self.in_flight += count;
    }

    /// Takes up to `max` heads into `heads`, which is empty.
    pub fn take(&mut self, max: usize, heads: &mut Vec<u16>) {
        self.peek(max, heads);
        self.commit(heads);
    }

    /// Whether there are heads that could be taken now.
    pub fn has_more(&self) -> bool {
        self.is_usable()
            && self.in_flight < self.layout.size
            && self.load < self.load_max
            && (self.has_resubmissions() || !self.is_held && self.queue.as_ref().is_some_and(SplitQueue::has_available))
    }

    /// Adds the chain at `head`, with `len` bytes written to it, to the used ring. [`Ring::publish`] makes it visible
    /// to the driver.
    pub fn push_used(&mut self, head: u16, len: u32) {
        self.in_flight -= 1;
        if let Some(queue) = &mut self.queue {
            queue.push_used(head, len);
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.begin_completion(head);
        }
    }

    /// Handles a chain that no status can complete. The ring continues.
    pub fn reject(&mut self, head: u16, malformed: Malformed) {
        if !std::mem::replace(&mut self.reported, true) {
            let outcome = match malformed {
                Malformed::Unreadable => "its request never completes",
                _ => "its request completes without a status",
            };
            error!(
                "{}: descriptor {head}: {malformed}: {outcome}; the front-end must share all of the guest's memory, or \
                 the driver is faulty (this is reported once)",
                self.label
            );
            self.signal_error();
        }
        match malformed {
            Malformed::Unreadable => self.unreadable.push(head),
            _ => self.push_used(head, 0),
        }
    }

    fn mark_broken(&mut self, why: &str) {
        if !self.broken {
            error!("{}: broken, and not served until it is set up again: {why}", self.label);
            self.broken = true;
            self.signal_error();
        }
    }

    /// The driver of the first ring has kicked. If no request is available and guest memory is blank, the front-end has
    /// passed descriptors of the memory but does not share it: the guest would hang without any message.
    ///
    /// => Kicks without a request are common (QEMU sends one at the start), blank memory is not: the firmware or the
    ///    VMM has written to its start before the first kick.
    pub fn check_first_kick(&mut self) {
        if std::mem::replace(&mut self.kicked, true) || self.position().next_avail != 0 || self.has_more() {
            return;
        }
        if self.memory.is_blank(BLANK_BYTES) {
            error!(
                "{}: kicked, but guest memory reads as zeros; the front-end must share it (QEMU: share=on for the \
                 memory backend)",
                self.label
            );
        }
    }

    /// Publishes every chain pushed since the last call, and interrupts the driver if it requested that.
    pub fn publish(&mut self) {
        let Some(queue) = self.queue.as_mut().filter(|queue| queue.has_unpublished()) else { return };
        let used = queue.position().next_used;
        if planted(PlantedBug::InflightClearedBeforePublishing)
            && let Some(tracker) = &mut self.tracker
        {
            tracker.end_completion(used);
        }
        self.interrupt_due |= queue.publish();
        self.trigger_if_due();
        if let Some(tracker) = &mut self.tracker {
            tracker.end_completion(used);
        }
    }

    /// Interrupts the driver if that is due and the front-end has sent a call descriptor.
    fn trigger_if_due(&mut self) {
        let Some(interrupt) = self.interrupt.as_mut().filter(|_| self.interrupt_due) else { return };
        self.interrupt_due = false;
        match interrupt.trigger() {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => error!(
                "{}: interrupts stopped: the call eventfd is full and blocking; they resume when the front-end sets \
                     another one",
                self.label
            ),
            Err(e) => warn!("{}: cannot interrupt the guest: {e}", self.label),
        }
    }

    /// Disables the driver's kicks: the worker polls.
    pub fn disable_notification(&mut self) {
        if let Some(queue) = &mut self.queue {
            queue.disable_notification();
        }
    }

    /// Enables the driver's kicks. Returns whether heads became available meanwhile, for which it may not have kicked.
    pub fn enable_notification(&mut self) -> bool {
        !self.broken && self.queue.as_mut().is_some_and(SplitQueue::enable_notification) && self.has_more()
    }
}
