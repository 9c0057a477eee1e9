//! Requests between their ring and their answer.

use crate::cache::Ticket;
use crate::cached_image::WorkerPort;
use crate::units::low_u32;
use crate::virtio::Status;
use crate::virtio::request::{RangeSegment, Request};

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The slot is free.
    Idle,
    /// Data moves between guest and cache, or ranges are zeroed or discarded.
    Data,
    /// The cache makes it stable.
    Flush,
}

/// A request that was taken from a ring.
#[derive(Debug)]
pub(super) struct Pending {
    /// As parsed; its vectors are used again.
    pub request: Request,
    /// Pieces of a DISCARD or WRITE ZEROES.
    pub ranges: Vec<RangeSegment>,
    /// Its ring.
    pub ring: u16,
    pub stage: Stage,
    /// Sectors (or ranges) that the cache has taken on.
    pub admitted: u32,
    /// Sectors (or ranges) that are done or have failed.
    pub settled: u64,
    /// How it ends; [`Status::Ok`] until something fails.
    pub status: Status,
    /// Writes: whether the answer must wait until the data is stable.
    pub write_through: bool,
    /// Writes: microseconds by which the answer is held back.
    pub delay_us: u64,
    /// Tells this request from earlier ones in the slot.
    generation: u16,
}

/// All requests of a worker, in slots that are used again.
#[derive(Debug)]
pub(super) struct PendingTable {
    /// The ticket that the worker's own parts are added to.
    base: Ticket,
    slots: Vec<Pending>,
    free: Vec<u32>,
}

/// A slot's name.
pub(super) type Slot = u32;

impl Pending {
    /// How many sectors (or ranges) there are.
    fn total(&self) -> u64 {
        if self.ranges.is_empty() { self.request.span().count } else { self.ranges.len() as u64 }
    }

    /// Whether every part is done or has failed.
    pub fn is_settled(&self) -> bool {
        self.settled >= self.total()
    }
}

impl PendingTable {
    /// No requests yet; `base` names the worker.
    pub fn new(base: Ticket) -> Self {
        Self { base, slots: Vec::new(), free: Vec::new() }
    }

    /// A free slot.
    pub fn take(&mut self, ring: u16) -> Slot {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Pending {
                request: Request::default(),
                ranges: Vec::new(),
                ring,
                stage: Stage::Idle,
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
        // 15 bits: the topmost of the worker's own part marks flushes of the control plane.
        pending.generation = (pending.generation + 1) & 0x7fff;
        (pending.ring, pending.stage) = (ring, Stage::Data);
        (pending.admitted, pending.settled, pending.status) = (0, 0, Status::Ok);
        (pending.write_through, pending.delay_us) = (false, 0);
        pending.ranges.clear();
        slot
    }

    /// Requests that are under way.
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The slot's request is answered.
    pub fn release(&mut self, slot: Slot) {
        self.slots[slot as usize].stage = Stage::Idle;
        self.free.push(slot);
    }

    /// The name of the slot's request before the cache.
    pub fn ticket(&self, slot: Slot) -> Ticket {
        let generation = u64::from(self.slots[slot as usize].generation);
        Ticket(self.base.0 | generation << 32 | u64::from(slot))
    }

    /// The slot of a ticket.
    ///
    /// # Panics
    /// If its request is not under way: the cache answered twice.
    pub fn slot_of(&self, ticket: Ticket) -> Slot {
        let slot = low_u32(WorkerPort::local_part(ticket));
        assert_eq!(self.ticket(slot), ticket, "a notice is for a request that is under way");
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
