//! The client's state of an operation, and of the reply that is being received.

use std::ops::Range;
use std::time::Duration;

use crate::store::{Extent, IoRequest};

/// The phase of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// It waits to be sent, or for a connection.
    Waiting,
    /// It waits at least until this time: a request of an earlier connection may still change its range, or, if it is
    /// a Sync, another queue has an obsolete connection.
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
    /// The cookie of the request in flight.
    pub cookie: u64,
    /// Bytes of the range that earlier requests have completed.
    pub done: u64,
    /// Bytes of the request in flight.
    pub part_bytes: u64,
    /// The error that the server reported.
    pub error: Option<u32>,
    /// For a read: the ranges that have arrived, in order, without adjacent ones.
    pub arrived: Vec<Range<u64>>,
    /// For a map: the extents that are known so far.
    pub extents: Vec<Extent>,
    /// Length of those extents in bytes.
    pub known: u64,
    /// For a map: the chunks that were written and not flushed when it was submitted.
    pub written: Vec<u64>,
    /// For a Sync: its number.
    pub flush: u64,
    /// The number of possible losses when it was submitted.
    pub losses: u64,
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
        (self.phase, self.done, self.part_bytes, self.error, self.known) = (Phase::Waiting, 0, 0, None, 0);
        self.arrived.clear();
        self.extents.clear();
    }
}

/// How a server violated the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Violation(pub &'static str);

/// The part of a reply to which the next byte belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Receiving {
    Header,
    /// Data of a read, for byte `at` of its memory and the following ones.
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
