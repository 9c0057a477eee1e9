//! The operations that wait for a thread of a pool: reads precede writes, and neither occupies all threads.
//!
//! With one first-in-first-out queue, a read of a guest would wait behind dozens of slow writes of the write-back. With
//! strict priorities, a guest that reads all the time would stop the write-back, and with it every FLUSH. So there are
//! lanes in order of urgency, an operation that was passed over too often runs first, and only some of the threads run
//! operations that change the image: the others stay free for reads.

use std::collections::VecDeque;

use super::IoRequest;
use crate::units::{OpKind, Urgency};

/// The lanes, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// Reads that a request may wait for, and the maps that precede them.
    Reads,
    /// Syncs, zeros, discards and allocations: a request may wait for each of them.
    Changes,
    /// Readahead.
    Readahead,
    /// Write-back.
    WriteBack,
}

const LANES: usize = 4;
/// An operation runs first after this many more urgent ones have passed the head of its lane. A reader then gets at
/// most 8 of 9 turns of a thread.
const PASSED_MAX: u32 = 8;

impl Lane {
    pub(super) fn of(request: &IoRequest) -> Self {
        match request.op {
            OpKind::Read if request.urgency == Urgency::Demand => Self::Reads,
            OpKind::Map => Self::Reads,
            OpKind::Read => Self::Readahead,
            OpKind::Write => Self::WriteBack,
            OpKind::Sync | OpKind::Zero { .. } | OpKind::Discard | OpKind::Allocate => Self::Changes,
        }
    }

    /// Whether its operations change the image: these may be slow, and must not occupy all threads.
    pub(super) fn is_change(self) -> bool {
        matches!(self, Self::Changes | Self::WriteBack)
    }
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct PoolQueue {
    lanes: [VecDeque<IoRequest>; LANES],
    /// By lane: number of operations of other lanes that were taken while the head of this one waited.
    passed: [u32; LANES],
    /// Number of operations that change the image and are being run.
    changes: usize,
    /// Most of them at a time.
    changes_max: usize,
}

impl PoolQueue {
    /// A queue from which at most `changes_max` operations at a time change the image.
    pub(super) fn new(changes_max: usize) -> Self {
        Self { lanes: Default::default(), passed: [0; LANES], changes: 0, changes_max }
    }

    pub(super) fn push(&mut self, request: IoRequest) {
        self.lanes[Lane::of(&request) as usize].push_back(request);
    }

    /// The operation to run now, if one may run. Call [`PoolQueue::completed`] with its lane when it has ended.
    pub(super) fn pop(&mut self) -> Option<(Lane, IoRequest)> {
        let lane = self.next_lane()?;
        let request = self.lanes[lane as usize].pop_front().expect("the next lane is not empty");
        for other in [Lane::Reads, Lane::Changes, Lane::Readahead, Lane::WriteBack] {
            let waits = other != lane && self.may_run(other);
            let passed = &mut self.passed[other as usize];
            *passed = if waits { *passed + 1 } else { 0 };
        }
        self.changes += usize::from(lane.is_change());
        Some((lane, request))
    }

    /// An operation from this lane has ended.
    pub(super) fn completed(&mut self, lane: Lane) {
        self.changes -= usize::from(lane.is_change());
    }

    /// Whether [`PoolQueue::pop`] returns an operation.
    pub(super) fn is_ready(&self) -> bool {
        self.next_lane().is_some()
    }

    /// Number of waiting operations.
    pub(super) fn len(&self) -> usize {
        self.lanes.iter().map(VecDeque::len).sum()
    }

    /// Drops the waiting operations.
    pub(super) fn clear(&mut self) {
        self.lanes.iter_mut().for_each(VecDeque::clear);
    }

    /// The lane whose head runs next: one that was passed over too often, otherwise the most urgent one.
    fn next_lane(&self) -> Option<Lane> {
        let ready = || {
            [Lane::Reads, Lane::Changes, Lane::Readahead, Lane::WriteBack]
                .into_iter()
                .filter(|lane| self.may_run(*lane))
        };
        ready().find(|lane| self.passed[*lane as usize] >= PASSED_MAX).or_else(|| ready().next())
    }

    /// Whether the head of the lane may run now.
    fn may_run(&self, lane: Lane) -> bool {
        !self.lanes[lane as usize].is_empty() && (!lane.is_change() || self.changes < self.changes_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Unmap;

    fn request(op: OpKind, urgency: Urgency) -> IoRequest {
        IoRequest { tag: 0, op, offset: 0, len: 4096, urgency, segments: Vec::new() }
    }

    fn queue_of(requests: impl IntoIterator<Item = IoRequest>) -> PoolQueue {
        let mut queue = PoolQueue::new(4);
        requests.into_iter().for_each(|request| queue.push(request));
        queue
    }

    #[test]
    fn a_read_that_a_request_waits_for_overtakes_the_queue() {
        let changes = [OpKind::Sync, OpKind::Zero { unmap: Unmap::Forbidden }, OpKind::Discard, OpKind::Allocate];
        let mut queue = queue_of(changes.map(|op| request(op, Urgency::Demand)));
        queue.push(request(OpKind::Write, Urgency::Background));
        queue.push(request(OpKind::Read, Urgency::Background));
        queue.push(request(OpKind::Read, Urgency::Demand));
        let order: Vec<Lane> = std::iter::from_fn(|| queue.pop()).map(|(lane, _)| lane).take(3).collect();
        assert_eq!(order, [Lane::Reads, Lane::Changes, Lane::Changes]);
    }

    #[test]
    fn writes_never_occupy_every_thread() {
        let mut queue = queue_of((0..64).map(|_| request(OpKind::Write, Urgency::Background)));
        let running: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(running.len(), 4, "more writes may not run");
        assert!(!queue.is_ready());
        queue.push(request(OpKind::Read, Urgency::Demand));
        assert_eq!(queue.pop().map(|(lane, _)| lane), Some(Lane::Reads));
        queue.completed(Lane::WriteBack);
        assert_eq!(queue.pop().map(|(lane, _)| lane), Some(Lane::WriteBack));
    }

    #[test]
    fn continuous_reads_do_not_starve_write_back() {
        let mut queue =
            queue_of([request(OpKind::Write, Urgency::Background), request(OpKind::Read, Urgency::Background)]);
        let mut order = Vec::new();
        for _ in 0..40 {
            queue.push(request(OpKind::Read, Urgency::Demand));
            order.extend(queue.pop().map(|(lane, _)| lane));
        }
        assert!(order[..12].contains(&Lane::WriteBack), "{order:?}");
        assert!(order[..24].contains(&Lane::Readahead), "{order:?}");
    }

    #[test]
    fn queued_operations_are_counted_and_can_be_dropped() {
        let mut queue = queue_of((0..64).map(|_| request(OpKind::Write, Urgency::Background)));
        queue.pop();
        assert_eq!(queue.len(), 63);
        queue.clear();
        assert_eq!((queue.len(), queue.is_ready()), (0, false));
    }
}
