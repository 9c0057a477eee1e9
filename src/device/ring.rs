//! One virtqueue, as a worker runs it: heads come out, used entries go in, the guest is called when it wants to be.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use log::{error, info, warn};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::control::{RingPosition, RingSetup};
use super::inflight::RingTrack;
use crate::virtio::GuestRam;

/// A ring that runs.
///
/// Public for the benchmark's limit: a server on this very code that does nothing but copy.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    /// The guest's memory.
    pub memory: Arc<GuestRam>,
    kick: File,
    call: Option<File>,
    /// Requests taken and not yet answered.
    in_flight: u16,
    /// Where they are noted for a successor.
    track: Option<RingTrack>,
    /// What a predecessor has taken and not answered, last one first: it is taken before anything else.
    owed: Vec<u16>,
    /// Something was answered since the guest was last called.
    answered: bool,
    /// The guest broke the rules in a way that can't be answered: nothing more is taken.
    broken: bool,
}

impl Ring {
    /// A ring from its setup.
    ///
    /// => A ring that does not lie in guest memory is broken from the start: it owes nobody an answer.
    pub fn new(index: u16, setup: RingSetup) -> Self {
        let RingSetup { size, desc_table, avail_ring, used_ring, next_avail, next_used, event_idx, .. } = setup;
        let mut broken = false;
        let configure = || -> Result<Queue, QueueError> {
            let mut queue = Queue::new(size)?;
            queue.try_set_size(size)?;
            queue.try_set_desc_table_address(GuestAddress(desc_table))?;
            queue.try_set_avail_ring_address(GuestAddress(avail_ring))?;
            queue.try_set_used_ring_address(GuestAddress(used_ring))?;
            queue.set_next_avail(next_avail);
            queue.set_next_used(next_used);
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
            Ok(queue)
        };
        let queue = configure().unwrap_or_else(|e| {
            error!("ring {index} is set up wrongly: {e}");
            broken = true;
            Queue::new(1).expect("1 is a power of two")
        });
        if !broken && !queue.is_valid(&*setup.memory) {
            error!("ring {index} does not lie in the guest's memory");
            broken = true;
        }
        let RingSetup { kick, call, memory, track, .. } = setup;
        let mut ring =
            Self { queue, memory, kick, call, in_flight: 0, track, owed: Vec::new(), answered: false, broken };
        ring.recover(index);
        ring
    }

    /// Takes up what a predecessor has left: the used ring says what it has answered, the inflight region what it owes.
    ///
    /// => Together they say where the ring goes on, whatever base the front-end gave: QEMU's may be older than the last
    ///    answer, and cloud-hypervisor's is beyond what nobody has taken yet.
    fn recover(&mut self, index: u16) {
        let Some(track) = self.track.as_mut().filter(|_| !self.broken) else { return };
        let Ok(used) = self.queue.used_idx(&*self.memory, Ordering::Acquire) else { return };
        let Some(owed) = track.recover(used.0) else { return };
        let Ok(count) = u16::try_from(owed.len()) else { return };
        self.queue.set_next_used(used.0);
        self.queue.set_next_avail(used.0.wrapping_add(count));
        if count > 0 {
            info!("ring {index}: {count} requests are taken up that were in flight");
            self.owed = owed;
            self.owed.reverse();
        }
    }

    /// Whether every request that was taken, by us or by a predecessor, has been answered.
    pub fn is_drained(&self) -> bool {
        self.in_flight == 0 && !self.owes()
    }

    /// Whether a predecessor has left requests that are not taken up yet.
    pub fn owes(&self) -> bool {
        !self.owed.is_empty() && !self.broken
    }

    /// Readable when the guest has made something available.
    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes the kick, so that it is seen once. Nothing there is normal.
    pub fn take_kick(&mut self) {
        let mut count = [0; 8];
        // The descriptor is the front-end's and may block: it is read only when epoll says that it is readable.
        let _ = self.kick.read(&mut count);
    }

    /// Use this to call the guest from now on.
    pub fn set_call(&mut self, call: Option<File>) {
        self.call = call;
    }

    /// New guest memory: the ring must lie in it, or it is broken.
    pub fn use_memory(&mut self, memory: &Arc<GuestRam>) {
        self.memory = Arc::clone(memory);
        if !self.broken && !self.queue.is_valid(&**memory) {
            self.fail("it does not lie in the guest's new memory");
        }
    }

    /// Where the ring stands.
    pub fn position(&self) -> RingPosition {
        RingPosition { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// The descriptor table and its length, for parsing.
    pub fn descriptors(&self) -> (GuestAddress, u16) {
        (GuestAddress(self.queue.desc_table()), self.queue.size())
    }

    /// Takes up to `most` heads off the available ring.
    ///
    /// => No more are out at a time than the ring has descriptors, whatever the guest writes.
    pub fn take(&mut self, most: usize, heads: &mut Vec<u16>) {
        let most = most.min(usize::from(self.queue.size() - self.in_flight.min(self.queue.size())));
        if self.broken || most == 0 {
            return;
        }
        if !self.owed.is_empty() {
            // They are noted already, in their order.
            heads.extend(self.owed.drain(self.owed.len().saturating_sub(most)..).rev());
        } else {
            match self.queue.iter(&*self.memory) {
                Ok(available) => heads.extend(available.take(most).map(|chain| chain.head_index())),
                Err(error) => self.fail(&format!("its available index is wrong ({error})")),
            }
            if let Some(track) = &mut self.track {
                heads.iter().for_each(|&head| track.taken(head));
            }
        }
        self.in_flight += u16::try_from(heads.len()).expect("no more than the ring's size");
    }

    /// Whether the guest has made something available that could be taken.
    pub fn has_more(&self) -> bool {
        let has = |idx: std::num::Wrapping<u16>| idx.0 != self.queue.next_avail();
        !self.broken
            && self.in_flight < self.queue.size()
            && (self.owes() || self.queue.avail_idx(&*self.memory, Ordering::Acquire).is_ok_and(has))
    }

    /// Gives a chain back, with `len` bytes written.
    pub fn answer(&mut self, head: u16, len: u32) {
        self.in_flight -= 1;
        if let Some(track) = &self.track {
            track.answering(head);
        }
        if let Err(error) = self.queue.add_used(&*self.memory, head, len) {
            self.fail(&format!("an answer can't be given ({error})"));
        } else if let Some(track) = &self.track {
            track.answered(head, self.queue.next_used());
        }
        self.answered = true;
    }

    /// A chain that can't be answered: nothing more is taken from this ring.
    pub fn give_up(&mut self, head: u16) {
        self.in_flight -= 1;
        self.fail(&format!("chain {head} has no byte for a status"));
    }

    fn fail(&mut self, why: &str) {
        if !self.broken {
            error!("a ring is out of service until it is set up again: {why}");
        }
        self.broken = true;
    }

    /// Calls the guest if something was answered and it wants to know.
    pub fn call_guest(&mut self) {
        if !std::mem::take(&mut self.answered) {
            return;
        }
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(&*self.memory).unwrap_or(true)
        } else {
            // virtio-queue does not look at this flag (virtio 1.2, section 2.7.7.2).
            let flags: Result<u16, _> = self.memory.load(GuestAddress(self.queue.avail_ring()), Ordering::SeqCst);
            flags.is_ok_and(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        };
        if wanted
            && let Some(call) = &mut self.call
            && let Err(error) = call.write(&1u64.to_ne_bytes())
        {
            warn!("cannot call the guest: {error}");
        }
    }

    /// The guest need not kick: we are looking.
    pub fn quiet_kicks(&mut self) {
        // With EVENT_IDX this is no work at all; a failure shows at the next take.
        let _ = self.queue.disable_notification(&*self.memory);
    }

    /// The guest is to kick from now on. True: something came meanwhile, look again.
    pub fn want_kicks(&mut self) -> bool {
        !self.broken && self.queue.enable_notification(&*self.memory).unwrap_or(false) && self.has_more()
    }
}
