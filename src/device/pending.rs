//! The table of pending requests: those taken from a ring and not yet completed.

use crate::cache::Ticket;
use crate::cached_image::WorkerPort;
use crate::units::low_u32;
use crate::virtio::Status;
use crate::virtio::request::{RangeSegment, Request};

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The slot is free.
    Free,
    /// Its data moves between guest and cache, or its ranges are zeroed or discarded.
    Data,
    /// The cache makes it stable.
    Flush,
}

/// A pending request.
#[derive(Debug)]
pub(super) struct Pending {
    /// As parsed. The slot's next request reuses the memory of its vectors, so that serving it allocates nothing.
    pub request: Request,
    /// The segments of a DISCARD or WRITE ZEROES; empty for other kinds. Its memory is reused, too.
    pub ranges: Vec<RangeSegment>,
    /// The index of its ring.
    pub ring: u16,
    pub stage: Stage,
    /// How many sectors (or ranges) the cache has admitted.
    pub admitted: u32,
    /// How many sectors (or ranges) are done or have failed.
    pub settled: u64,
    /// How it ends; [`Status::Ok`] until something fails.
    pub status: Status,
    /// Of a write: it completes only when its data is stable.
    pub write_through: bool,
    /// Of a write: by how many microseconds its completion is delayed.
    pub delay_us: u64,
    /// Distinguishes this request from earlier ones in the slot.
    generation: u16,
}

/// The pending requests of a worker, in slots that are reused.
#[derive(Debug)]
pub(super) struct PendingTable {
    /// The ticket of the worker with a local part of 0.
    base: Ticket,
    slots: Vec<Pending>,
    free: Vec<u32>,
}

/// The index of a slot.
pub(super) type Slot = u32;

impl Pending {
    /// How many sectors (or ranges) it has.
    fn total(&self) -> u64 {
        if self.ranges.is_empty() { self.request.span().count } else { self.ranges.len() as u64 }
    }

    /// Whether every sector (or range) is done or has failed.
    pub fn is_settled(&self) -> bool {
        self.settled >= self.total()
    }
}

impl PendingTable {
    /// An empty table; `base` is the ticket of the worker with a local part of 0.
    pub fn new(base: Ticket) -> Self {
        Self { base, slots: Vec::new(), free: Vec::new() }
    }

    /// Takes a free slot for a request of `ring`.
    pub fn take(&mut self, ring: u16) -> Slot {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Pending {
                request: Request::default(),
                ranges: Vec::new(),
                ring,
                stage: Stage::Free,
                admitted: 0,
                settled: 0,
                status: Status::Ok,
                write_through: false,
                delay_us: 0,
                generation: 0,
            });
            u32::try_from(self.slots.len() - 1).expect("bounded by the rings' sizes")
        });
        let pending = &mut self.slots[slot as usize];
        // 15 bits: the highest bit of the local part marks flushes of the control plane.
        pending.generation = (pending.generation + 1) & 0x7fff;
        (pending.ring, pending.stage) = (ring, Stage::Data);
        (pending.admitted, pending.settled, pending.status) = (0, 0, Status::Ok);
        (pending.write_through, pending.delay_us) = (false, 0);
        pending.ranges.clear();
        slot
    }

    /// How many requests are pending.
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Frees the slot: its request has completed.
    pub fn release(&mut self, slot: Slot) {
        self.slots[slot as usize].stage = Stage::Free;
        self.free.push(slot);
    }

    /// The ticket by which the cache knows the slot's request.
    pub fn ticket(&self, slot: Slot) -> Ticket {
        let generation = u64::from(self.slots[slot as usize].generation);
        Ticket(self.base.0 | generation << 32 | u64::from(slot))
    }

    /// The slot of the request with this ticket.
    ///
    /// # Panics
    /// If the request is not pending: the cache reported its end twice.
    pub fn slot_of(&self, ticket: Ticket) -> Slot {
        let slot = low_u32(WorkerPort::local_part(ticket));
        assert_eq!(self.ticket(slot), ticket, "a notice is about a pending request");
        slot
    }
}

impl std::ops::Index<Slot> for PendingTable {
    type Output = Pending;
    fn index(&self, slot: Slot) -> &Pending {
        &self.slots[slot as usize]
    }
}

impl std::ops::IndexMut<Slot> for PendingTable {
    fn index_mut(&mut self, slot: Slot) -> &mut Pending {
        &mut self.slots[slot as usize]
    }
}
