//! Answers: a request whose data has moved is made stable if it must be, held back if the cache is filling up, and then
//! answered on its ring.

use std::cmp::Reverse;

use crate::cache::PageCache;
use crate::units::Tick;
use crate::virtio::STATUS_OK;
use crate::virtio::request::Kind;
use crate::virtio::segments::write_status;

use super::pending::{Slot, Stage};
use super::ring::Ring;
use super::worker::Traffic;

impl Traffic {
    /// A request all of whose parts are settled is finished, or goes on to be made stable (write-through).
    pub(super) fn finish_if_settled(&mut self, cache: &mut PageCache, slot: Slot) {
        let ticket = self.pending.ticket(slot);
        let pending = &mut self.pending[slot];
        if !pending.is_settled() {
            return;
        }
        let changes_data = matches!(pending.request.kind, Kind::Write | Kind::WriteZeroes);
        if changes_data && pending.through && pending.failure.is_none() {
            pending.stage = Stage::Flush;
            cache.flush(ticket);
        } else {
            self.finished.push(slot);
        }
    }

    /// Answers what is finished; what is to be held back waits for its time.
    pub(super) fn answer_all(&mut self, rings: &mut [Option<Ring>], now: Tick) {
        for at in 0..self.finished.len() {
            let slot = self.finished[at];
            let delay_us = std::mem::take(&mut self.pending[slot].delay_us);
            if delay_us > 0 {
                self.held_back.push(Reverse((now.plus_us(delay_us), slot)));
            } else {
                self.answer(rings, slot);
            }
        }
        self.finished.clear();
        while let Some(&Reverse((due, slot))) = self.held_back.peek()
            && due <= now
        {
            self.held_back.pop();
            self.answer(rings, slot);
        }
        for ring in rings.iter_mut().flatten() {
            ring.publish();
        }
    }

    fn answer(&mut self, rings: &mut [Option<Ring>], slot: Slot) {
        let pending = &self.pending[slot];
        let ring = rings[usize::from(pending.ring)].as_mut().expect("a ring with requests out is there");
        let status = pending.failure.unwrap_or(STATUS_OK);
        // The address was checked when the request was parsed; if the memory went since, nobody reads the status.
        let _ = write_status(&ring.memory, pending.request.status, status);
        ring.answer(pending.request.head, pending.request.used_len(status == STATUS_OK));
        self.pending.release(slot);
    }

    /// When the first answer that is held back is due.
    pub(super) fn next_answer(&self) -> Option<Tick> {
        self.held_back.peek().map(|&Reverse((due, _))| due)
    }
}
