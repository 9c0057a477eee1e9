//! Step 6 of a turn: finished requests complete on their rings. A write is first made stable if necessary, and is
//! delayed while the cache fills up.

use std::cmp::Reverse;

use crate::cache::PageCache;
use crate::fault_injection::{PlantedBug, planted};
use crate::units::Tick;
use crate::virtio::Status;
use crate::virtio::guest_copy::write_status;
use crate::virtio::request::RequestKind;

use super::pending::{PendingSlot, Stage};
use super::requests::Requests;
use super::ring::Ring;

impl Requests {
    /// Finishes a request if all its parts are settled; in write-through mode, a change of data is made stable first.
    pub(super) fn finish_if_settled(&mut self, cache: &mut PageCache, slot: PendingSlot) {
        let ticket = self.pending.ticket(slot);
        let pending = &mut self.pending[slot];
        if !pending.is_settled() {
            return self.continue_if_due(slot);
        }
        let changes_data = match pending.request.kind {
            RequestKind::Write => true,
            RequestKind::WriteZeroes => !planted(PlantedBug::ZeroesNotFlushed),
            _ => false,
        };
        if changes_data && pending.write_through && pending.status == Status::Ok {
            pending.stage = Stage::Flush;
            cache.flush(ticket);
        } else {
            self.finished.push(slot);
        }
    }

    /// Completes finished requests, or queues those to be delayed; completes delayed ones that are due. Publishes the
    /// completions.
    pub(super) fn complete_all(&mut self, rings: &mut [Option<Ring>], now: Tick) {
        for at in 0..self.finished.len() {
            let slot = self.finished[at];
            let delay_us = std::mem::take(&mut self.pending[slot].delay_us);
            if delay_us > 0 {
                self.tally.was_throttled(delay_us);
                self.delayed.push(Reverse((now.plus_us(delay_us), slot)));
            } else {
                self.complete(rings, slot);
            }
        }
        self.finished.clear();
        while let Some(&Reverse((due, slot))) = self.delayed.peek()
            && due <= now
        {
            self.delayed.pop();
            self.complete(rings, slot);
        }
        for ring in rings.iter_mut().flatten() {
            ring.publish();
        }
    }

    fn complete(&mut self, rings: &mut [Option<Ring>], slot: PendingSlot) {
        let pending = &self.pending[slot];
        let ring = rings[usize::from(pending.ring)].as_mut().expect("a ring stops only when it has no requests");
        // The address was in guest memory when the request was parsed. If it no longer is, no driver can read the
        // status.
        let _ = write_status(&ring.memory, pending.request.status_addr, pending.status);
        ring.remove_load(pending.load);
        ring.push_used(pending.request.head, pending.request.used_len(pending.status));
        self.tally.completed(pending);
        self.pending.release(slot);
    }

    /// When the next delayed completion is due.
    pub(super) fn next_delayed(&self) -> Option<Tick> {
        self.delayed.peek().map(|&Reverse((due, _))| due)
    }
}
