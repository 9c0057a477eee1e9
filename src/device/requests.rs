//! The requests of one worker, in the lists through which a turn moves them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use crate::cache::{Piece, Ticket};
use crate::counters::worker::WorkerCounters;
use crate::units::{Fault, PageId, SECTORS_PER_PAGE, Tick};
use crate::virtio::guest_copy::BadAddress;
use crate::virtio::request::Malformed;

use super::Device;
use super::budget::Budget;
use super::pending::{PendingSlot, PendingTable};
use super::tally::Tally;

/// A piece of a write whose copy has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct CopiedPiece {
    pub slot: PendingSlot,
    pub piece: Piece,
    /// After an error, an unknown part of the piece has been copied.
    pub result: Result<(), BadAddress>,
}

/// The requests of a worker. `admit.rs`, `copy.rs` and `complete.rs` move them from list to list.
///
/// => Between turns every list is empty, except `delayed`, the control plane's flushes, and those that exceeded a
///    turn's budget: `resumed`, `incoming`, `continuing` and `finished`.
#[derive(Debug)]
pub(super) struct Requests {
    pub device: Arc<Device>,
    pub tally: Tally,
    pub pending: PendingTable,
    /// Other devices use the same image.
    pub is_shared: bool,
    /// The generation of the limits under which requests are taken: see [`super::limits::RateLimiter`].
    pub limits: u32,
    /// Heads just taken from a ring.
    pub heads: Vec<u16>,
    /// Those of `heads` that no status can complete.
    pub rejected: Vec<(u16, Malformed)>,
    /// Requests to admit to the cache for the first time.
    pub incoming: VecDeque<PendingSlot>,
    /// Requests that the cache has resumed. They precede `incoming`, or later requests would take the room that they
    /// waited for.
    pub resumed: VecDeque<PendingSlot>,
    /// Requests whose next window is to be admitted.
    pub continuing: VecDeque<PendingSlot>,
    /// Pieces of the request being admitted, before they join `copies`.
    pub pieces: Vec<Piece>,
    /// Where the first page of each incoming request is, as far as that was looked up.
    pub found: Vec<PageId>,
    /// Pieces to copy.
    pub copies: Vec<(PendingSlot, Piece)>,
    /// Reads that are not finished, of which a piece was copied.
    pub unfinished: Vec<PendingSlot>,
    /// Copied pieces of writes, to return to the cache.
    pub written: Vec<CopiedPiece>,
    /// Copied pieces of reads, to return to the cache.
    pub read: Vec<Piece>,
    /// Pieces that a planted bug copies too late.
    #[cfg(test)]
    pub postponed: Vec<(PendingSlot, Piece)>,
    /// Requests to complete.
    pub finished: Vec<PendingSlot>,
    /// Finished writes whose completion is delayed because the cache is filling up, with the time of completion.
    pub delayed: BinaryHeap<Reverse<(Tick, PendingSlot)>>,
    /// Flushes of the control plane in progress, and the receivers of their results.
    control_flushes: Vec<(Ticket, Sender<Result<(), Fault>>)>,
    next_control_flush: u64,
    base: Ticket,
}

/// This bit of a ticket's local part marks a flush of the control plane.
const CONTROL_FLUSH: u64 = 1 << 47;

impl Requests {
    /// Empty lists; `base` is the ticket of the worker with a local part of 0.
    pub fn new(device: Arc<Device>, base: Ticket, counters: WorkerCounters) -> Self {
        Self {
            device,
            tally: Tally::new(counters),
            pending: PendingTable::new(base),
            is_shared: false,
            limits: 0,
            heads: Vec::new(),
            rejected: Vec::new(),
            incoming: VecDeque::new(),
            resumed: VecDeque::new(),
            continuing: VecDeque::new(),
            pieces: Vec::new(),
            found: Vec::new(),
            copies: Vec::new(),
            unfinished: Vec::new(),
            written: Vec::new(),
            read: Vec::new(),
            #[cfg(test)]
            postponed: Vec::new(),
            finished: Vec::new(),
            delayed: BinaryHeap::new(),
            control_flushes: Vec::new(),
            next_control_flush: 0,
            base,
        }
    }

    /// Whether new requests may be taken: the earlier ones are admitted, and the work in progress is within its bounds.
    pub fn can_take(&self) -> bool {
        self.resumed.is_empty() && self.incoming.is_empty() && self.can_admit() && self.pending.has_room()
    }

    /// Whether the work in progress allows more to be admitted.
    pub fn can_admit(&self) -> bool {
        let Budget { worker_pages, shared_pages, .. } = self.device.budget;
        let pages = if self.is_shared { shared_pages } else { worker_pages };
        self.pending.in_progress() < pages * SECTORS_PER_PAGE
    }

    /// Whether the last turn left work for the next one.
    pub fn has_work(&self) -> bool {
        let to_admit = !(self.resumed.is_empty() && self.incoming.is_empty() && self.continuing.is_empty());
        !self.finished.is_empty() || to_admit && self.can_admit()
    }

    /// Whether a request for sectors at or after `end` is in progress.
    pub fn reach_beyond(&self, end: u64) -> bool {
        self.pending.slots_in_use().any(|slot| self.pending[slot].end_sector() > end)
    }

    /// Returns a ticket for a flush of the control plane, whose result goes to `reply`.
    pub fn start_control_flush(&mut self, reply: Sender<Result<(), Fault>>) -> Ticket {
        let ticket = Ticket(self.base.0 | CONTROL_FLUSH | self.next_control_flush);
        self.next_control_flush = (self.next_control_flush + 1) % CONTROL_FLUSH;
        self.control_flushes.push((ticket, reply));
        ticket
    }

    /// Replies to a flush of the control plane. Returns false if `ticket` belongs to a request of the guest.
    pub fn end_control_flush(&mut self, ticket: Ticket, result: Result<(), Fault>) -> bool {
        let Some(at) = self.control_flushes.iter().position(|(other, _)| *other == ticket) else { return false };
        let (_, reply) = self.control_flushes.swap_remove(at);
        // The requester may have stopped waiting for the reply.
        let _ = reply.send(result);
        true
    }
}
