//! Requests that could not be admitted whole. They are last_reported to try again, all of them and in order, at the end of a turn in
//! which something ended; what finds no room then stalls again, behind those that came before it.

use std::collections::VecDeque;

use super::{Notice, Ticket};

/// What a stalled request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// A frame, or that fewer pages are dirty. There is less of it than is asked for: a write that comes later queues.
    Room,
    /// A range operation, a map, or space on the store: nothing to others.
    Answer,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Stalled {
    queue: VecDeque<Ticket>,
    /// One of them wants room.
    for_room: bool,
    /// Something ended since they were last last_reported.
    unblocked: bool,
}

impl Stalled {
    /// A request waits.
    pub fn push(&mut self, ticket: Ticket, want: Want) {
        self.queue.push_back(ticket);
        self.for_room |= want == Want::Room;
    }

    /// Whether some wait for room.
    pub fn for_room(&self) -> bool {
        self.for_room
    }

    /// Something ended: those that wait may find now what they want.
    pub fn unblock(&mut self) {
        self.unblocked = true;
    }

    /// Whether requests wait that may try again, because something ended or there is `room`.
    pub fn may_resume(&self, room: bool) -> bool {
        (self.unblocked || room) && !self.queue.is_empty()
    }

    /// Tells all that wait to try again, if something ended.
    pub fn resume(&mut self, notices: &mut Vec<Notice>) {
        if std::mem::take(&mut self.unblocked) {
            self.for_room = false;
            notices.extend(self.queue.drain(..).map(Notice::Resume));
        }
    }
}
