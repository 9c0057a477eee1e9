//! Requests that could not be admitted whole. At the end of a turn in which something ended, a notice makes the owner
//! retry each of them, oldest first. Requests that still find no room stall again, in the same order.

use std::collections::VecDeque;

use super::{Notice, Ticket};

/// The condition that a stalled request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StallReason {
    /// A free frame, or fewer dirty pages. Requests compete for these, so later writes queue behind this one.
    Room,
    /// The end of a range operation, a map or an allocation. Requests for other pages need not wait.
    StoreOp,
}

/// See the documentation of the module.
#[derive(Debug, Default)]
pub(super) struct StalledRequests {
    queue: VecDeque<Ticket>,
    /// One of them waits for room.
    for_room: bool,
    /// An operation has ended since they were last resumed.
    unblocked: bool,
}

impl StalledRequests {
    /// Adds a request.
    pub fn push(&mut self, ticket: Ticket, reason: StallReason) {
        self.queue.push_back(ticket);
        self.for_room |= reason == StallReason::Room;
    }

    /// Removes a request that its owner abandons. Returns whether it was stalled.
    pub fn withdraw(&mut self, ticket: Ticket) -> bool {
        let before = self.queue.len();
        self.queue.retain(|other| *other != ticket);
        self.queue.len() < before
    }

    /// Whether a request waits for room.
    pub fn for_room(&self) -> bool {
        self.for_room
    }

    /// An operation has ended that a stalled request may wait for.
    pub fn unblock(&mut self) {
        self.unblocked = true;
    }

    /// Whether stalled requests are to be resumed, because an operation has ended or there is `room`.
    pub fn may_resume(&self, room: bool) -> bool {
        (self.unblocked || room) && !self.queue.is_empty()
    }

    /// Resumes all stalled requests, if an operation has ended.
    pub fn resume(&mut self, notices: &mut Vec<Notice>) {
        if std::mem::take(&mut self.unblocked) {
            self.for_room = false;
            notices.extend(self.queue.drain(..).map(Notice::Resume));
        }
    }
}
