//! The ledger's records of changes of the image: the heartbeat, the change token of an idle point (no change in
//! flight), and the tenure.

use super::ledger::{self, field, token_field};
use super::{Arena, Persistence};
use crate::tenure::TenureId;
use crate::tenure::token::{ChangeToken, wall_clock_ns};
use crate::units::{PAGE_BYTES, SectorSpan};

/// A moment at which no change of the image was in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdlePoint {
    /// Number of changes before it.
    changes: u64,
    /// Bytes of those changes.
    changed_bytes: u64,
}

/// Offset of the heartbeat in a cache's file, for the simulator.
#[cfg(test)]
pub const HEARTBEAT_AT: u64 = field::HEARTBEAT as u64;

impl Arena {
    /// Records that the daemon starts to change the image: these sectors, or an unknown part of them.
    ///
    /// => The caller serializes changes and [`Arena::idle_point`].
    pub fn begin_change(&self, span: SectorSpan) {
        if let Persistence::Full { .. } = &self.persistence {
            // The store may write whole blocks of the device, up to a page.
            let bytes = span.pages().count * PAGE_BYTES;
            self.forget_samples(span);
            self.memory.store(field::CHANGES, self.memory.load(field::CHANGES).wrapping_add(1));
            self.memory.store(field::CHANGED_BYTES, self.memory.load(field::CHANGED_BYTES).wrapping_add(bytes));
            self.memory.store(field::HEARTBEAT, wall_clock_ns());
        }
    }

    /// Records that the daemon is alive, if changes of the image may be in flight or have just ended. Any thread may
    /// call it.
    ///
    /// => The image executes a change at any time between its begin and its end. So that the next daemon knows until
    ///    when this one could have changed the image, the time is recorded all the while.
    pub fn heartbeat(&self) {
        if self.has_old_token() {
            self.memory.store(field::HEARTBEAT, wall_clock_ns());
        }
    }

    /// The present idle point; `None` if the change token of an earlier one is still valid.
    ///
    /// => No change of the image is in flight.
    pub fn idle_point(&self) -> Option<IdlePoint> {
        let (changes, changed_bytes) = (self.memory_word(field::CHANGES), self.memory_word(field::CHANGED_BYTES));
        self.has_old_token().then_some(IdlePoint { changes, changed_bytes })
    }

    /// Whether changes have started since the change token was recorded.
    fn has_old_token(&self) -> bool {
        matches!(self.persistence, Persistence::Full { .. })
            && self.memory.load(self.token_at() + token_field::AT) != self.memory.load(field::CHANGES).wrapping_add(1)
    }

    /// Offset of the valid change token.
    fn token_at(&self) -> usize {
        ledger::token_at(self.memory.load(field::TOKEN_SLOT))
    }

    fn memory_word(&self, at: usize) -> u64 {
        if let Persistence::Full { .. } = &self.persistence { self.memory.load(at) } else { 0 }
    }

    /// Records the image's change token, which was read after the idle point `idle`. Does nothing if a newer one may
    /// have been recorded since.
    ///
    /// => The daemon may be killed at any point: the old token is valid until the new one is stored.
    pub fn record_token(&self, idle: IdlePoint, token: ChangeToken) {
        let Persistence::Full { .. } = &self.persistence else { return };
        let _serialized = self.token.lock().expect("no thread panics with the token locked");
        if self.memory.load(field::CHANGES) != idle.changes {
            return;
        }
        let slot = 1 - self.memory.load(field::TOKEN_SLOT).min(1);
        let at = ledger::token_at(slot);
        for (index, word) in token.words().into_iter().enumerate() {
            self.memory.store(at + token_field::TOKEN + 8 * index, word);
        }
        self.memory.store(at + token_field::CHANGED_BYTES, idle.changed_bytes);
        self.memory.store(at + token_field::AT, idle.changes.wrapping_add(1));
        self.memory.store(field::TOKEN_SLOT, slot);
    }

    /// Records the image's change token at the start or at the end of a tenure, whatever was recorded before.
    ///
    /// => No change of the image is in flight.
    pub fn record_token_now(&self, token: ChangeToken) {
        let (changes, changed_bytes) = (self.memory_word(field::CHANGES), self.memory_word(field::CHANGED_BYTES));
        self.record_token(IdlePoint { changes, changed_bytes }, token);
    }

    /// Records whether the image has the record of the tenure, and whether that record marks the tenure as over.
    pub fn set_recorded(&self, is_recorded: bool, is_over: bool) {
        let word = ledger::recorded_word(is_recorded, is_over);
        if self.header().is_some_and(|header| header.load(field::IS_RECORDED) != word) {
            self.store_in_header(field::IS_RECORDED, word);
        }
    }

    /// The name of the tenure that the header records; `None` without a header.
    pub fn tenure(&self) -> Option<TenureId> {
        let header = self.header()?;
        let [low, high] = [0, 8].map(|at| u128::from(header.load(field::TENURE_ID + at)));
        Some(TenureId { generation: header.load(field::GENERATION), id: low | high << 64 })
    }
}
