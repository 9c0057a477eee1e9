//! Steps 2 and 3 of a turn: requests are taken from a ring, parsed and checked, and admitted to the cache under its
//! lock.

use crate::cache::{Access, Admitted, Notice, PageCache};
use crate::virtio::chain::DescriptorTable;
use crate::virtio::request::{Malformed, RequestKind, parse};
use crate::virtio::{GuestRam, Status};

use super::pending::{Slot, Stage};
use super::requests::Requests;
use super::ring::Ring;

/// Most requests taken from one ring in one turn, so that a busy ring does not keep the others waiting.
const BATCH_MAX: usize = 64;

impl Requests {
    /// Takes requests from a ring. Those that need no cache are finished, the others are queued for admission. Returns
    /// whether the ring had any.
    pub(super) fn take_from(&mut self, index: u16, ring: &mut Ring) -> bool {
        let (mut heads, mut rejected) = (std::mem::take(&mut self.heads), std::mem::take(&mut self.rejected));
        ring.take(BATCH_MAX, &mut heads);
        let taken = !heads.is_empty();
        let table = ring.table(&ring.memory);
        if heads.len() > 1 {
            table.prefetch_heads(&ring.memory, &heads);
        }
        for head in heads.drain(..) {
            if let Err(malformed) = self.accept_chain(index, &ring.memory, &table, head) {
                rejected.push((head, malformed));
            }
        }
        rejected.drain(..).for_each(|(head, malformed)| ring.reject(head, malformed));
        (self.heads, self.rejected) = (heads, rejected);
        taken
    }

    /// Makes a pending request of the chain at `head`.
    ///
    /// # Errors
    /// Why the chain cannot be completed with a status.
    fn accept_chain(
        &mut self,
        index: u16,
        memory: &GuestRam,
        table: &DescriptorTable<'_>,
        head: u16,
    ) -> Result<(), Malformed> {
        let slot = self.pending.take(index);
        let pending = &mut self.pending[slot];
        match parse(memory, table, head, &mut pending.request) {
            Ok(()) => self.enqueue(slot, memory),
            Err(Malformed::WithStatus { status_addr }) => {
                (pending.request.status_addr, pending.status) = (status_addr, Status::IoErr);
                self.finished.push(slot);
            }
            Err(malformed) => {
                self.pending.release(slot);
                return Err(malformed);
            }
        }
        Ok(())
    }

    /// Checks a request against the disk, and queues it for admission; finishes it at once if it needs no cache.
    fn enqueue(&mut self, slot: Slot, memory: &GuestRam) {
        let device = &self.device;
        let pending = &mut self.pending[slot];
        let request = &pending.request;
        pending.write_through = !device.writeback();
        pending.part_sectors = device.range_part_sectors;
        // Writes that this guest has seen complete are lost: every request fails until the guest resets the device.
        let intact = if device.arena.has_data_loss() { Err(Status::IoErr) } else { Ok(()) };
        let checked = intact.and_then(|()| request.check(&device.disk)).and_then(|()| match request.kind {
            RequestKind::Discard | RequestKind::WriteZeroes => {
                request.range_segments(memory, &device.disk, &mut pending.ranges)
            }
            RequestKind::GetId => request.write_id(memory, &device.disk).map_err(|_| Status::IoErr),
            _ => Ok(()),
        });
        let nothing_to_do = match request.kind {
            RequestKind::Read | RequestKind::Write => request.data_bytes == 0,
            RequestKind::Discard | RequestKind::WriteZeroes => pending.ranges.is_empty(),
            RequestKind::GetId => true,
            RequestKind::Flush | RequestKind::Unknown(_) => false,
        };
        if let Err(status) = checked {
            pending.status = status;
            self.finished.push(slot);
        } else if nothing_to_do {
            self.finished.push(slot);
        } else {
            self.incoming.push(slot);
        }
    }

    /// Admits every queued request to the cache.
    pub(super) fn admit_all(&mut self, cache: &mut PageCache) {
        for at in 0..self.resumed.len() {
            self.admit(cache, self.resumed[at], true);
        }
        self.resumed.clear();
        let Self { incoming, pending, .. } = self;
        if incoming.len() > 1 {
            let requests = incoming.iter().map(|&slot| &pending[slot].request);
            let transfers = requests.filter(|request| matches!(request.kind, RequestKind::Read | RequestKind::Write));
            cache.prefetch_lookups(transfers.map(|request| request.span().pages().first));
        }
        for at in 0..self.incoming.len() {
            self.admit(cache, self.incoming[at], false);
        }
        self.incoming.clear();
    }

    /// Admits a request, or what is left of it, to the cache.
    fn admit(&mut self, cache: &mut PageCache, slot: Slot, resumed: bool) {
        let ticket = self.pending.ticket(slot);
        let pending = &mut self.pending[slot];
        let access = Access { ticket, span: pending.request.span(), from: pending.admitted, resumed };
        self.pieces.clear();
        let admitted = match pending.request.kind {
            RequestKind::Read => cache.read(access, &mut self.pieces),
            RequestKind::Write => {
                if !pending.write_through {
                    pending.delay_us = cache.write_delay_us(access.span.count);
                }
                cache.write(access, &mut self.pieces)
            }
            RequestKind::Flush => {
                pending.stage = Stage::Flush;
                return cache.flush(ticket);
            }
            _ => return self.admit_ranges(cache, slot),
        };
        self.copies.extend(self.pieces.drain(..).map(|piece| (slot, piece)));
        let count = u32::try_from(access.span.count).expect("a request is below 4 GiB");
        match admitted {
            Admitted::All => pending.admitted = count,
            Admitted::Until(at) => pending.admitted = at,
            Admitted::Refused(at, fault) => {
                pending.admitted = count;
                pending.settled += u64::from(count - at);
                pending.status = Status::from(fault);
                self.finish_if_settled(cache, slot);
            }
        }
    }

    /// Admits the parts of a DISCARD or WRITE ZEROES, up to one that has to wait.
    fn admit_ranges(&mut self, cache: &mut PageCache, slot: Slot) {
        let ticket = self.pending.ticket(slot);
        let pending = &mut self.pending[slot];
        while let Some(part) = pending.range_part(pending.admitted.into()) {
            let admitted = match pending.request.kind {
                RequestKind::WriteZeroes => cache.zero(ticket, part.span, part.unmap),
                _ => cache.discard(ticket, part.span),
            };
            if !admitted {
                return;
            }
            pending.admitted += 1;
        }
    }

    /// Handles what the cache reports about a request that was admitted earlier.
    pub(super) fn handle_notice(&mut self, cache: &mut PageCache, notice: Notice) {
        match notice {
            Notice::Ready(ticket, piece) => self.copies.push((self.pending.slot_of(ticket), piece)),
            Notice::Unreadable(ticket, sectors, fault) => {
                let slot = self.pending.slot_of(ticket);
                self.pending[slot].settled += u64::from(sectors);
                self.pending[slot].status = Status::from(fault);
                self.finish_if_settled(cache, slot);
            }
            Notice::Resume(ticket) => self.resumed.push(self.pending.slot_of(ticket)),
            Notice::Done(ticket, result) => {
                if self.end_control_flush(ticket, result) {
                    return;
                }
                let slot = self.pending.slot_of(ticket);
                let pending = &mut self.pending[slot];
                if let Err(fault) = result {
                    pending.status = Status::from(fault);
                }
                if pending.stage == Stage::Flush {
                    self.finished.push(slot);
                } else {
                    pending.settled += 1;
                    self.finish_if_settled(cache, slot);
                }
            }
        }
    }
}
