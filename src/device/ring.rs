//! One virtqueue, as a worker runs it: heads come out, used entries go in, the guest is called when it wants to be.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use log::{error, info};
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::control::RingSetup;
use super::inflight::InflightTracker;
use super::interrupt::Interrupt;
use crate::virtio::GuestRam;
use crate::virtio::chain::DescriptorTable;
use crate::virtio::split::{QueueLayout, QueuePosition, SplitQueue};

/// A ring that runs.
///
/// Public for the benchmark's limit: a server on this very code that does nothing but copy.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    layout: QueueLayout,
    /// `None`: it does not lie in guest memory now, and is not served.
    queue: Option<SplitQueue>,
    /// Where it stood when it was last looked up in guest memory.
    looked_up_at: QueuePosition,
    /// The guest's memory.
    pub memory: Arc<GuestRam>,
    kick: File,
    interrupt: Option<Interrupt>,
    /// The guest waits for a call that it has not got yet.
    interrupt_due: bool,
    /// Requests taken and not yet answered.
    in_flight: u16,
    /// Where they are noted for a successor.
    track: Option<InflightTracker>,
    /// What a predecessor has left is known.
    recovered: bool,
    /// What a predecessor has taken and not answered, last one first: it is taken before anything else.
    resubmit: Vec<u16>,
    /// The guest broke the rules in a way that can't be answered: nothing more is taken.
    broken: bool,
}

impl Ring {
    /// A ring from its setup.
    ///
    /// => The guest is called at once: a predecessor may have died between an answer and the call for it, and with EVENT_IDX
    ///    no later answer would make up for that.
    pub fn new(index: u16, setup: RingSetup) -> Self {
        let RingSetup { layout, position, kick, call_fd, memory, track } = setup;
        let mut ring = Self {
            index,
            layout,
            queue: None,
            looked_up_at: position,
            memory,
            kick,
            interrupt: call_fd.map(Interrupt::new),
            interrupt_due: true,
            in_flight: 0,
            track,
            recovered: false,
            resubmit: Vec::new(),
            broken: false,
        };
        ring.look_up();
        ring.trigger_if_due();
        ring
    }

    /// Looks the ring up in guest memory; when it is found first, takes up what a predecessor has left.
    fn look_up(&mut self) {
        self.queue = SplitQueue::new(&self.memory, self.layout, self.looked_up_at);
        if self.queue.is_none() {
            error!(
                "ring {} is not served: it does not lie in the guest's memory as it must: {:x?}",
                self.index, self.layout
            );
        } else if !std::mem::replace(&mut self.recovered, true) {
            self.recover();
        }
    }

    /// Takes up what a predecessor has left: the used ring says what it has answered, the inflight region what it owes.
    ///
    /// => Together they say where the ring goes on, whatever base the front-end gave: QEMU's may be older than the last
    ///    answer, and cloud-hypervisor's is beyond what nobody has taken yet.
    fn recover(&mut self) {
        let (Some(queue), Some(track)) = (&mut self.queue, &mut self.track) else { return };
        let used = queue.used_idx();
        let Some(owed) = track.recover(used) else { return };
        let Ok(count) = u16::try_from(owed.len()) else { return };
        queue.go_on_at(QueuePosition { next_avail: used.wrapping_add(count), next_used: used });
        if count > 0 {
            info!("ring {}: {count} requests are taken up that were in flight", self.index);
            self.resubmit = owed;
            self.resubmit.reverse();
        }
    }

    /// Whether every request that was taken, by us or by a predecessor, has been answered.
    pub fn is_drained(&self) -> bool {
        self.in_flight == 0 && !self.has_resubmissions()
    }

    /// Whether a predecessor has left requests that are not taken up yet.
    pub fn has_resubmissions(&self) -> bool {
        !self.resubmit.is_empty() && self.works()
    }

    /// Whether requests can be taken and answered.
    fn works(&self) -> bool {
        self.queue.is_some() && !self.broken
    }

    /// Has `epoll` tell of each kick, with this token.
    ///
    /// => A kick is an edge, and is not read: the descriptor is the front-end's, which may have made it blocking, given it to
    ///    two rings, or read it itself. A read could wait for ever.
    ///
    /// # Errors
    /// What the system says.
    pub fn watch_kicks(&self, epoll: &Epoll, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        epoll.ctl(ControlOperation::Add, self.kick.as_raw_fd(), event)
    }

    /// Has `epoll` tell of kicks no longer.
    pub fn forget_kicks(&self, epoll: &Epoll) {
        // It may never have been watched; then there is nothing to undo.
        let _ = epoll.ctl(ControlOperation::Delete, self.kick.as_raw_fd(), EpollEvent::default());
    }

    /// Use this to call the guest from now on.
    pub fn set_call_fd(&mut self, call_fd: Option<File>) {
        self.interrupt = call_fd.map(Interrupt::new);
        self.trigger_if_due();
    }

    /// New guest memory. If the ring does not lie in it, it stands still until it does again: a front-end that changes a
    /// region takes it away first.
    pub fn use_memory(&mut self, memory: &Arc<GuestRam>) {
        self.looked_up_at = self.position();
        self.memory = Arc::clone(memory);
        self.look_up();
    }

    /// Where the ring stands.
    pub fn position(&self) -> QueuePosition {
        self.queue.as_ref().map_or(self.looked_up_at, SplitQueue::position)
    }

    /// The descriptor table in `memory`, which is the ring's.
    pub fn table<'a>(&self, memory: &'a GuestRam) -> DescriptorTable<'a> {
        DescriptorTable::new(memory, GuestAddress(self.layout.desc_table), u32::from(self.layout.size))
    }

    /// Takes up to `most` heads off the available ring.
    ///
    /// => No more are out at a time than the ring has descriptors, whatever the guest writes.
    pub fn take(&mut self, most: usize, heads: &mut Vec<u16>) {
        let most = most.min(usize::from(self.layout.size.saturating_sub(self.in_flight)));
        let Some(queue) = self.queue.as_mut().filter(|_| !self.broken && most > 0) else { return };
        if !self.resubmit.is_empty() {
            // They are noted already, in their order.
            heads.extend(self.resubmit.drain(self.resubmit.len().saturating_sub(most)..).rev());
        } else if queue.take(most, heads).is_err() {
            self.fail("more is available than it has descriptors");
        } else if let Some(track) = &mut self.track {
            heads.iter().for_each(|&head| track.taken(head));
        }
        self.in_flight += u16::try_from(heads.len()).expect("no more than the ring's size");
    }

    /// Whether the guest has made something available that could be taken.
    pub fn has_more(&self) -> bool {
        self.works()
            && self.in_flight < self.layout.size
            && (self.has_resubmissions() || self.queue.as_ref().is_some_and(SplitQueue::has_available))
    }

    /// Gives a chain back, with `len` bytes written; [`Ring::publish`] shows it to the guest.
    pub fn push_used(&mut self, head: u16, len: u32) {
        self.in_flight -= 1;
        if let Some(queue) = &mut self.queue {
            queue.put_used(head, len);
        }
        if let Some(track) = &mut self.track {
            track.begin_completion(head);
        }
    }

    /// A chain that can't be answered: nothing more is taken from this ring.
    pub fn break_on(&mut self, head: u16) {
        self.in_flight -= 1;
        self.fail(&format!("chain {head} has no byte for a status"));
    }

    fn fail(&mut self, why: &str) {
        if !self.broken {
            error!("ring {} is out of service until it is set up again: {why}", self.index);
        }
        self.broken = true;
    }

    /// Shows the guest what was answered since the last time, and calls it if it wants that.
    pub fn publish(&mut self) {
        let Some(queue) = self.queue.as_mut().filter(|queue| queue.has_unpublished()) else { return };
        self.interrupt_due |= queue.publish();
        let used = queue.position().next_used;
        self.trigger_if_due();
        if let Some(track) = &mut self.track {
            track.end_completion(used);
        }
    }

    /// Calls the guest if that is due and it has said how.
    fn trigger_if_due(&mut self) {
        let Some(interrupt) = self.interrupt.as_mut().filter(|_| self.interrupt_due) else { return };
        self.interrupt_due = false;
        interrupt.trigger();
    }

    /// The guest need not kick: we are looking.
    pub fn disable_notification(&mut self) {
        if let Some(queue) = &mut self.queue {
            queue.disable_notification();
        }
    }

    /// The guest is to kick from now on. True: something came meanwhile, look again.
    pub fn enable_notification(&mut self) -> bool {
        !self.broken && self.queue.as_mut().is_some_and(SplitQueue::enable_notification) && self.has_more()
    }
}
