//! Answers: a request whose data has moved is made stable if it must be, held back if the cache is filling up, and then
//! answered on its ring.

use std::cmp::Reverse;

use crate::cache::PageCache;
use crate::units::Tick;
use crate::virtio::Status;
use crate::virtio::guest_copy::write_status;
use crate::virtio::request::RequestKind;

use super::pending::{Slot, Stage};
use super::requests::Requests;
use super::ring::Ring;

impl Requests {
    /// A request all of whose parts are settled is finished, or goes on to be made stable (write-write_through).
    pub(super) fn finish_if_settled(&mut self, cache: &mut PageCache, slot: Slot) {
        let ticket = self.pending.ticket(slot);
        let pending = &mut self.pending[slot];
        if !pending.is_settled() {
            return;
        }
        let changes_data = matches!(pending.request.kind, RequestKind::Write | RequestKind::WriteZeroes);
        if changes_data && pending.write_through && pending.status == Status::Ok {
            pending.stage = Stage::Flush;
            cache.flush(ticket);
        } else {
            self.finished.push(slot);
        }
    }

    /// Answers what is finished; what is to be held back waits for its time.
    pub(super) fn complete_all(&mut self, rings: &mut [Option<Ring>], now: Tick) {
        for at in 0..self.finished.len() {
            let slot = self.finished[at];
            let delay_us = std::mem::take(&mut self.pending[slot].delay_us);
            if delay_us > 0 {
                self.held_back.push(Reverse((now.plus_us(delay_us), slot)));
            } else {
                self.complete(rings, slot);
            }
        }
        self.finished.clear();
        while let Some(&Reverse((due, slot))) = self.held_back.peek()
            && due <= now
        {
            self.held_back.pop();
            self.complete(rings, slot);
        }
        for ring in rings.iter_mut().flatten() {
            ring.publish();
        }
    }

    fn complete(&mut self, rings: &mut [Option<Ring>], slot: Slot) {
        let pending = &self.pending[slot];
        let ring = rings[usize::from(pending.ring)].as_mut().expect("a ring with requests out is there");
        // The address was checked when the request was parsed; if the memory went since, nobody reads the status.
        let _ = write_status(&ring.memory, pending.request.status_addr, pending.status);
        ring.push_used(pending.request.head, pending.request.used_len(pending.status));
        self.pending.release(slot);
    }

    /// When the first answer that is held back is due.
    pub(super) fn next_completion(&self) -> Option<Tick> {
        self.held_back.peek().map(|&Reverse((due, _))| due)
    }
}
