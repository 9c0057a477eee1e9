//! Requests on their way into the cache: taken from a ring, parsed, checked, and put to the cache under its lock.

use std::sync::Arc;

use crate::cache::{Access, Admitted, Notice, PageCache};
use crate::error::status_byte;
use crate::virtio::request::{Kind, Malformed, parse};
use crate::virtio::segments::write_status;
use crate::virtio::{STATUS_IOERR, STATUS_OK};

use super::pending::{Slot, Stage};
use super::ring::Ring;
use super::worker::Traffic;

/// Requests taken from one ring in one turn.
const BATCH: usize = 64;

impl Traffic {
    /// Takes what a ring has, answers what is wrong or needs no cache, and lines the rest up.
    pub(super) fn take_from(&mut self, index: u16, ring: &mut Ring) -> bool {
        self.heads.clear();
        ring.take(BATCH, &mut self.heads);
        let memory = Arc::clone(&ring.memory);
        let table = ring.table(&memory);
        table.foresee(&memory, &self.heads);
        for at in 0..self.heads.len() {
            let head = self.heads[at];
            let slot = self.pending.take(index);
            let parsed = parse(&memory, &table, head, &mut self.pending[slot].request);
            match parsed {
                Ok(()) => self.line_up(slot, ring),
                Err(Malformed::WithStatus { status }) => {
                    // The address was checked by the parser; if the memory went since, nobody reads the status.
                    let _ = write_status(&memory, status, STATUS_IOERR);
                    ring.answer(head, 1);
                    self.pending.release(slot);
                }
                Err(Malformed::NoStatus) => {
                    ring.give_up(head);
                    self.pending.release(slot);
                }
            }
        }
        !self.heads.is_empty()
    }

    /// Checks a request against the disk; what the cache is not needed for is finished at once.
    fn line_up(&mut self, slot: Slot, ring: &Ring) {
        let device = &self.device;
        let pending = &mut self.pending[slot];
        let request = &pending.request;
        pending.through = !device.writeback();
        // What this guest believes to be in the disk is gone: it is told with each request, until it begins anew.
        let alive = if device.arena.is_lost() { Err(STATUS_IOERR) } else { Ok(()) };
        let checked = alive.and_then(|()| request.check(&device.disk)).and_then(|()| match request.kind {
            Kind::Discard | Kind::WriteZeroes => {
                request.range_segments(&ring.memory, &device.disk, &mut pending.ranges)
            }
            Kind::GetId => request.write_id(&ring.memory, &device.disk).map_err(|_| STATUS_IOERR),
            _ => Ok(()),
        });
        let nothing_to_do = match request.kind {
            Kind::Read | Kind::Write => request.data_bytes == 0,
            Kind::Discard | Kind::WriteZeroes => pending.ranges.is_empty(),
            Kind::GetId => true,
            Kind::Flush | Kind::Unknown(_) => false,
        };
        if let Err(status) = checked {
            pending.failure = Some(status).filter(|&status| status != STATUS_OK);
            self.finished.push(slot);
        } else if nothing_to_do {
            self.finished.push(slot);
        } else {
            self.arrivals.push((slot, false));
        }
    }

    /// Puts every request that is lined up to the cache.
    pub(super) fn admit_all(&mut self, cache: &mut PageCache) {
        let Self { arrivals, pending, .. } = self;
        if arrivals.len() > 1 {
            cache.foresee(arrivals.iter().map(|&(slot, _)| pending[slot].request.span().pages().first));
        }
        for at in 0..self.arrivals.len() {
            let (slot, resumed) = self.arrivals[at];
            self.admit(cache, slot, resumed);
        }
        self.arrivals.clear();
    }

    /// Puts a request, or what is left of it, to the cache.
    fn admit(&mut self, cache: &mut PageCache, slot: Slot, resumed: bool) {
        let ticket = self.pending.ticket(slot);
        let pending = &mut self.pending[slot];
        let access = Access { ticket, span: pending.request.span(), from: pending.admitted, resumed };
        self.pieces.clear();
        let admitted = match pending.request.kind {
            Kind::Read => cache.read(access, &mut self.pieces),
            Kind::Write => {
                if !pending.through {
                    pending.delay_us = cache.write_delay_us(access.span.count);
                }
                cache.write(access, &mut self.pieces)
            }
            Kind::Flush => {
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
                pending.failure = Some(status_byte(fault));
                self.finish_if_settled(cache, slot);
            }
        }
    }

    fn admit_ranges(&mut self, cache: &mut PageCache, slot: Slot) {
        let ticket = self.pending.ticket(slot);
        let pending = &mut self.pending[slot];
        while let Some(range) = pending.ranges.get(pending.admitted as usize) {
            let taken_on = match pending.request.kind {
                Kind::WriteZeroes => cache.zero(ticket, range.span, range.unmap),
                _ => cache.discard(ticket, range.span),
            };
            if !taken_on {
                return;
            }
            pending.admitted += 1;
        }
    }

    /// What the cache has to say of requests admitted earlier.
    pub(super) fn hear(&mut self, cache: &mut PageCache, notice: Notice) {
        match notice {
            Notice::Ready(ticket, piece) => self.copies.push((self.pending.slot_of(ticket), piece)),
            Notice::Unreadable(ticket, sectors, fault) => {
                let slot = self.pending.slot_of(ticket);
                self.pending[slot].settled += u64::from(sectors);
                self.pending[slot].failure = Some(status_byte(fault));
                self.finish_if_settled(cache, slot);
            }
            Notice::Resume(ticket) => self.arrivals.push((self.pending.slot_of(ticket), true)),
            Notice::Done(ticket, result) if self.drain_of(ticket).is_some() => self.drained(ticket, result),
            Notice::Done(ticket, result) => {
                let slot = self.pending.slot_of(ticket);
                let pending = &mut self.pending[slot];
                if let Err(fault) = result {
                    pending.failure = Some(status_byte(fault));
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
