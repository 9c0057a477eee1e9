//! The table of pending requests: those taken from a ring and not yet completed.

use crate::cache::Ticket;
use crate::cached_image::WorkerPort;
use crate::units::{SectorSpan, Tick, low_u32};
use crate::virtio::Status;
use crate::virtio::request::{RangeSegment, Request, RequestKind};

use super::budget::{BUFFERS_KEPT_MAX, BUFFERS_MAX, REQUESTS_MAX};

/// The stage of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The slot is free.
    Free,
    /// Its data moves between guest and cache, or its ranges are zeroed or discarded.
    Data,
    /// The cache makes its data stable.
    Flush,
}

/// A pending request.
#[derive(Debug)]
pub(super) struct Pending {
    /// The parsed request. The slot's next request reuses the memory of its vectors, so that serving it allocates
    /// nothing.
    pub request: Request,
    /// The segments of a DISCARD or WRITE ZEROES; empty for other kinds. Its memory is reused too.
    pub ranges: Vec<RangeSegment>,
    /// The index of its ring.
    pub ring: u16,
    pub stage: Stage,
    /// For a DISCARD or WRITE ZEROES: the cache gets its segments in parts, split at multiples of this many sectors.
    pub part_sectors: u64,
    /// Number of sectors (or parts of segments) that the cache has admitted.
    admitted: u32,
    /// Number of sectors (or parts of segments) that are done or have failed.
    settled: u64,
    /// The cache has stalled it, and a notice will resume it.
    pub stalled: bool,
    /// It is in the list of requests to continue.
    pub continuing: bool,
    /// Its ring drains: the cache admits no more of it.
    pub is_cut: bool,
    /// Its share of the load of its ring.
    pub load: u64,
    /// Its final status; [`Status::Ok`] until something fails.
    pub status: Status,
    /// For a write: it completes only when its data is stable.
    pub write_through: bool,
    /// The start of the turn that took it.
    pub since: Tick,
    /// For a write: the delay of its completion, in microseconds.
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
    /// Sectors (or parts of segments) that are admitted and not settled.
    in_progress: u64,
    /// Buffers for which the slots hold memory.
    buffers: usize,
}

/// The index of a slot.
pub(super) type PendingSlot = u32;

impl Pending {
    /// Number of its sectors (or parts of segments).
    pub fn total(&self) -> u64 {
        if self.ranges.is_empty() {
            self.request.span().count
        } else {
            self.ranges.iter().map(|range| parts(range.span, self.part_sectors)).sum()
        }
    }

    /// The sector after the last one that it is about; 0 if it is about none.
    pub fn end_sector(&self) -> u64 {
        match self.request.kind {
            RequestKind::Read | RequestKind::Write => self.request.span().end(),
            _ => self.ranges.iter().map(|range| range.span.end()).max().unwrap_or(0),
        }
    }

    /// Number of pages of a DISCARD or WRITE ZEROES.
    pub fn range_pages(&self) -> u64 {
        self.ranges.iter().map(|range| range.span.pages().count).sum()
    }

    /// Number of sectors (or parts of segments) that the cache has admitted.
    pub fn admitted(&self) -> u32 {
        self.admitted
    }

    /// Number of sectors (or parts of segments) that are done or have failed.
    pub fn settled(&self) -> u64 {
        self.settled
    }

    /// Number of sectors (or parts of segments) that are admitted and not settled.
    pub fn outstanding(&self) -> u64 {
        u64::from(self.admitted) - self.settled
    }

    /// Part `nth` of the segments of a DISCARD or WRITE ZEROES; `None` after the last.
    pub fn range_part(&self, mut nth: u64) -> Option<RangeSegment> {
        for range in &self.ranges {
            let count = parts(range.span, self.part_sectors);
            if nth < count {
                let first = (range.span.start / self.part_sectors + nth) * self.part_sectors;
                let start = first.max(range.span.start);
                let end = (first + self.part_sectors).min(range.span.end());
                return Some(RangeSegment { span: SectorSpan::new(start, end - start), unmap: range.unmap });
            }
            nth -= count;
        }
        None
    }

    /// Whether every sector (or part of a segment) is done or has failed.
    pub fn is_settled(&self) -> bool {
        self.settled >= self.total()
    }
}

/// Number of parts of a segment, which is not empty.
fn parts(span: SectorSpan, part_sectors: u64) -> u64 {
    span.end().div_ceil(part_sectors) - span.start / part_sectors
}

impl PendingTable {
    /// An empty table; `base` is the ticket of the worker with a local part of 0.
    pub fn new(base: Ticket) -> Self {
        Self { base, slots: Vec::new(), free: Vec::new(), in_progress: 0, buffers: 0 }
    }

    /// Takes a free slot for a request of `ring`, in the turn that started at `since`.
    pub fn take(&mut self, ring: u16, since: Tick) -> PendingSlot {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Pending {
                request: Request::default(),
                ranges: Vec::new(),
                ring,
                stage: Stage::Free,
                part_sectors: 1,
                admitted: 0,
                settled: 0,
                stalled: false,
                continuing: false,
                is_cut: false,
                load: 0,
                status: Status::Ok,
                write_through: false,
                since,
                delay_us: 0,
                generation: 0,
            });
            u32::try_from(self.slots.len() - 1).expect("bounded by REQUESTS_MAX")
        });
        let pending = &mut self.slots[slot as usize];
        // 15 bits: the highest bit of the local part marks flushes of the control plane.
        pending.generation = (pending.generation + 1) & 0x7fff;
        (pending.ring, pending.stage, pending.since) = (ring, Stage::Data, since);
        (pending.admitted, pending.settled, pending.status) = (0, 0, Status::Ok);
        (pending.write_through, pending.delay_us) = (false, 0);
        (pending.stalled, pending.continuing, pending.is_cut, pending.load) = (false, false, false, 0);
        pending.ranges.clear();
        slot
    }

    /// Number of pending requests.
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether one more request may be taken, however large it is.
    pub fn has_room(&self) -> bool {
        self.in_use() < REQUESTS_MAX && self.buffers < BUFFERS_MAX
    }

    /// Sectors (or parts of segments) of all requests that are admitted and not settled.
    pub fn in_progress(&self) -> u64 {
        self.in_progress
    }

    /// Counts the buffers of a request that was parsed into a slot that had memory for `before` buffers.
    pub fn count_buffers(&mut self, slot: PendingSlot, before: usize) {
        self.buffers = self.buffers + self.slots[slot as usize].request.data.capacity() - before;
    }

    /// The cache has admitted a request up to this sector (or part of a segment).
    pub fn admit(&mut self, slot: PendingSlot, up_to: u32) {
        let pending = &mut self.slots[slot as usize];
        self.in_progress += u64::from(up_to - pending.admitted);
        pending.admitted = up_to;
    }

    /// This many sectors (or parts of segments) are done or have failed.
    pub fn settle(&mut self, slot: PendingSlot, count: u64) {
        let pending = &mut self.slots[slot as usize];
        pending.settled += count;
        self.in_progress -= count;
    }

    /// The rest will not be admitted, and counts as settled.
    pub fn skip_rest(&mut self, slot: PendingSlot) {
        let pending = &mut self.slots[slot as usize];
        let total = pending.total();
        pending.settled += total - u64::from(pending.admitted);
        pending.admitted = u32::try_from(total).expect("a request is below 4 GiB");
    }

    /// The slots of the requests that are in progress.
    pub fn slots_in_use(&self) -> impl Iterator<Item = PendingSlot> + '_ {
        (0..).zip(&self.slots).filter(|(_, pending)| pending.stage != Stage::Free).map(|(slot, _)| slot)
    }

    /// Frees the slot: its request has completed.
    ///
    /// => Guests can make a slot use much memory. So a slot keeps its memory for the next request only while all slots
    ///    together have little.
    pub fn release(&mut self, slot: PendingSlot) {
        let pending = &mut self.slots[slot as usize];
        pending.stage = Stage::Free;
        if self.buffers > BUFFERS_KEPT_MAX {
            self.buffers -= pending.request.data.capacity();
            pending.request.data = Vec::new();
        }
        self.free.push(slot);
    }

    /// The ticket that identifies the slot's request in the cache.
    pub fn ticket(&self, slot: PendingSlot) -> Ticket {
        let generation = u64::from(self.slots[slot as usize].generation);
        Ticket(self.base.0 | generation << 32 | u64::from(slot))
    }

    /// The slot of the request with this ticket.
    ///
    /// # Panics
    /// If the request is not pending: the cache reported its end twice.
    pub fn slot_of(&self, ticket: Ticket) -> PendingSlot {
        let slot = low_u32(WorkerPort::local_part(ticket));
        assert_eq!(self.ticket(slot), ticket, "a notice is about a pending request");
        slot
    }
}

impl std::ops::Index<PendingSlot> for PendingTable {
    type Output = Pending;
    fn index(&self, slot: PendingSlot) -> &Pending {
        &self.slots[slot as usize]
    }
}

impl std::ops::IndexMut<PendingSlot> for PendingTable {
    fn index_mut(&mut self, slot: PendingSlot) -> &mut Pending {
        &mut self.slots[slot as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Unmap;

    /// A request with `buffers` buffers.
    fn take_large(table: &mut PendingTable, buffers: usize) -> PendingSlot {
        let slot = table.take(0, Tick::ZERO);
        let before = table[slot].request.data.capacity();
        table[slot].request.data.reserve_exact(buffers);
        table.count_buffers(slot, before);
        slot
    }

    #[test]
    fn requests_that_have_completed_leave_room_for_others() {
        let mut table = PendingTable::new(Ticket(0));
        for _ in 0..3 {
            let slots: Vec<PendingSlot> = (0..128).map(|_| take_large(&mut table, 1024)).collect();
            assert!(!table.has_room(), "their buffers take all of the memory that there is for buffers");
            slots.into_iter().for_each(|slot| table.release(slot));
            assert!(table.has_room());
        }
    }

    #[test]
    fn the_parts_of_a_range_request_cover_its_segments_in_order() {
        let mut table = PendingTable::new(Ticket(0));
        let slot = table.take(0, Tick::ZERO);
        let pending = &mut table[slot];
        pending.part_sectors = 100;
        for (start, count) in [(150, 10), (0, 100), (250, 300), (399, 2)] {
            pending.ranges.push(RangeSegment { span: SectorSpan::new(start, count), unmap: Unmap::Forbidden });
        }
        let parts: Vec<_> = (0..).map_while(|nth| pending.range_part(nth)).map(|part| part.span).collect();
        let expected = [(150, 10), (0, 100), (250, 50), (300, 100), (400, 100), (500, 50), (399, 1), (400, 1)];
        assert_eq!(parts, expected.map(|(start, count)| SectorSpan::new(start, count)));
        pending.settled = parts.len() as u64 - 1;
        assert!(!pending.is_settled());
        pending.settled += 1;
        assert!(pending.is_settled());
    }

    #[test]
    fn a_range_request_reaches_to_the_end_of_its_last_segment() {
        let mut table = PendingTable::new(Ticket(0));
        let slot = table.take(0, Tick::ZERO);
        table[slot].request.kind = RequestKind::Discard;
        assert_eq!(table[slot].end_sector(), 0);
        for (start, count) in [(150, 10), (0, 100), (250, 300), (399, 2)] {
            let range = RangeSegment { span: SectorSpan::new(start, count), unmap: Unmap::Allowed };
            table[slot].ranges.push(range);
        }
        assert_eq!(table[slot].end_sector(), 550);
    }
}
