//! The requests of one worker, in the lists through which a turn moves them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use crate::cache::{Piece, Ticket};
use crate::units::{Fault, Tick};
use crate::virtio::guest_copy::BadAddress;

use super::Device;
use super::pending::{PendingTable, Slot};

/// A piece of a write after its copy, which may have failed half-way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written {
    pub slot: Slot,
    pub piece: Piece,
    pub copied: Result<(), BadAddress>,
}

/// The requests of a worker and where they stand; `admit.rs`, `copy.rs` and `complete.rs` move them along.
#[derive(Debug)]
pub(super) struct Requests {
    pub device: Arc<Device>,
    pub pending: PendingTable,
    /// Heads just taken from a ring.
    pub heads: Vec<u16>,
    /// Requests to be put to the cache for the first time ...
    pub incoming: Vec<Slot>,
    /// ... and those that were told to resume: they go first, or who came later would take what they have waited for.
    pub resumed: Vec<Slot>,
    /// Pieces of one request, on their way to `copies`.
    pub pieces: Vec<Piece>,
    /// Pieces to be copied.
    pub copies: Vec<(Slot, Piece)>,
    /// Pieces of writes to be given back to the cache.
    pub written: Vec<Written>,
    /// The same of reads.
    pub read: Vec<Piece>,
    /// Requests to be answered.
    pub finished: Vec<Slot>,
    /// Answers that wait for their time, because the cache is filling up.
    pub held_back: BinaryHeap<Reverse<(Tick, Slot)>>,
    /// The control plane's flushes.
    drains: Vec<(Ticket, Sender<Result<(), Fault>>)>,
    next_drain: u64,
    base: Ticket,
}

/// Tickets of the control plane's flushes have this bit of the worker's own part set.
const DRAIN: u64 = 1 << 47;

impl Requests {
    pub fn new(device: Arc<Device>, base: Ticket) -> Self {
        Self {
            device,
            pending: PendingTable::new(base),
            heads: Vec::new(),
            incoming: Vec::new(),
            resumed: Vec::new(),
            pieces: Vec::new(),
            copies: Vec::new(),
            written: Vec::new(),
            read: Vec::new(),
            finished: Vec::new(),
            held_back: BinaryHeap::new(),
            drains: Vec::new(),
            next_drain: 0,
            base,
        }
    }

    /// A ticket for a flush of the control plane's.
    pub fn drain_ticket(&mut self, answer: Sender<Result<(), Fault>>) -> Ticket {
        let ticket = Ticket(self.base.0 | DRAIN | self.next_drain);
        self.next_drain = (self.next_drain + 1) % DRAIN;
        self.drains.push((ticket, answer));
        ticket
    }

    /// Where the control plane's flush with this ticket stands in the list.
    pub fn drain_of(&self, ticket: Ticket) -> Option<usize> {
        self.drains.iter().position(|(other, _)| *other == ticket)
    }

    /// A flush of the control plane's has ended.
    pub fn drained(&mut self, ticket: Ticket, result: Result<(), Fault>) {
        let at = self.drain_of(ticket).expect("the caller has looked");
        let (_, answer) = self.drains.swap_remove(at);
        // Who asked may have gone away.
        let _ = answer.send(result);
    }
}
