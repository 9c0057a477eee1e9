//! What the client knows of an operation, and of the reply that is arriving.

use std::ops::Range;
use std::time::Duration;

use crate::store::{Extent, IoRequest};

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// It waits to be sent, or for a connection.
    Waiting,
    /// A request of an earlier connection may still change its range: it waits until then.
    Held(Duration),
    /// It is being sent, or waits for its reply.
    Sent,
}

/// An operation.
#[derive(Debug)]
pub(super) struct Slot {
    pub request: IoRequest,
    /// In the order of submission.
    pub serial: u64,
    pub phase: Phase,
    /// A part of it was sent, on any connection.
    pub was_sent: bool,
    /// Of the request in flight.
    pub cookie: u64,
    /// Bytes of the range that earlier requests have done.
    pub done: u64,
    /// Bytes of the request in flight.
    pub part: u64,
    /// The error that the server reported.
    pub error: Option<u32>,
    /// A read: what has arrived, as ranges that do not touch, in order.
    pub arrived: Vec<Range<u64>>,
    /// A map: what is known so far.
    pub extents: Vec<Extent>,
    /// Length of what is known in bytes.
    pub known: u64,
    /// A map: chunks that were written and not flushed when it was submitted.
    pub written: Vec<u64>,
    /// A Sync: its number.
    pub flush: u64,
}

impl Slot {
    pub fn range(&self) -> Range<u64> {
        self.request.offset..self.request.offset + self.request.len
    }

    /// Whether all of a read has arrived.
    pub fn has_arrived(&self) -> bool {
        matches!(self.arrived.as_slice(), [only] if *only == (0..self.request.len))
    }

    pub fn restart(&mut self) {
        (self.phase, self.done, self.part, self.error, self.known) = (Phase::Waiting, 0, 0, None, 0);
        self.arrived.clear();
        self.extents.clear();
    }
}

/// How a server broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Violation(pub &'static str);

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Receiving {
    Header,
    /// Data of a read, from byte `at` of its memory on.
    Data {
        slot: usize,
        at: u64,
        left: u64,
        is_last: bool,
    },
    /// Descriptors of a map.
    Extents {
        slot: usize,
        left: u64,
        is_last: bool,
    },
}
