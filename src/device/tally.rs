//! Measures how long requests take, from the turn that takes a request from its ring to its completion.
//!
//! Reading the clock takes as long as a tenth of a cached request. So requests that a turn completes from memory share
//! one reading, which usually is the one that starts the next turn. If other work follows the completions (the turn has
//! store operations to submit, or it had waited for some), the clock is read before that work: the time of a request
//! does not include readahead or write-back that follows it.

use crate::counters::worker::{Activity, WorkerCounters};
use crate::counters::{Class, Operation, Served};
use crate::units::{SECTOR_BYTES, Tick};
use crate::virtio::Status;
use crate::virtio::request::RequestKind;

use super::pending::Pending;

/// A worker that does not sleep counts its turns at least once in this many turns.
const UNCOUNTED_TURNS_MAX: u64 = 64;

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Tally {
    counters: WorkerCounters,
    /// The start of the present turn.
    turn: Tick,
    /// The present turn has found work.
    has_work: bool,
    /// Turns that found work and are not yet counted, and their time.
    turns: u64,
    busy_ns: u64,
    /// Number of requests that the turn has both taken and completed, by [`Operation::ALL`].
    quick: [u64; Operation::ALL.len()],
    /// Requests of earlier turns that this one has completed, and the start of those turns.
    waited: Vec<(Class, Tick)>,
    /// The operations with `quick` requests, as bits.
    quick_operations: u8,
}

impl Tally {
    /// A tally without any counts.
    pub fn new(counters: WorkerCounters) -> Self {
        Self {
            counters,
            turn: Tick::ZERO,
            has_work: false,
            turns: 0,
            busy_ns: 0,
            quick: [0; Operation::ALL.len()],
            waited: Vec::new(),
            quick_operations: 0,
        }
    }

    /// Starts a turn.
    #[inline]
    pub fn begin_turn(&mut self, now: Tick) {
        self.count_requests(now);
        if std::mem::take(&mut self.has_work) {
            self.turns += 1;
            self.busy_ns += now.since_ns(self.turn);
            if self.turns == UNCOUNTED_TURNS_MAX {
                self.count_turns();
            }
        }
        self.turn = now;
    }

    /// Counts the turns before the present one.
    pub fn count_turns(&mut self) {
        self.counters.count(Activity::Turns, std::mem::take(&mut self.turns));
        self.counters.count(Activity::BusyNs, std::mem::take(&mut self.busy_ns));
    }

    /// The present turn has found work. It lasts until the next one starts: a worker does not sleep after such a turn.
    pub fn found_work(&mut self) {
        self.has_work = true;
    }

    /// The start of the present turn.
    pub fn turn(&self) -> Tick {
        self.turn
    }

    /// Counts a request that was taken.
    pub fn taken(&mut self, kind: RequestKind) {
        if let Some(operation) = operation_of(kind) {
            self.counters.request_taken(operation);
        }
    }

    /// Counts a request that a limit has held back since `since`.
    pub fn was_limited(&self, since: Tick) {
        self.counters.count(Activity::Limited, 1);
        self.counters.count(Activity::LimitedNs, self.turn.since_ns(since));
    }

    /// Counts a write whose completion is delayed by this time.
    pub fn was_throttled(&self, delay_us: u64) {
        self.counters.count(Activity::Throttled, 1);
        self.counters.count(Activity::ThrottledNs, delay_us * 1000);
    }

    /// A request that was taken is returned to the driver.
    pub fn withdrawn(&mut self, kind: RequestKind) {
        if let Some(operation) = operation_of(kind) {
            self.counters.request_withdrawn(operation);
        }
    }

    /// Counts a request that completes.
    pub fn completed(&mut self, pending: &Pending) {
        let Pending { request, ranges, status, since, .. } = pending;
        let Some(operation) = operation_of(request.kind) else { return };
        let bytes = match operation {
            Operation::Read | Operation::Write => request.data_bytes,
            _ => ranges.iter().map(|range| range.span.count * SECTOR_BYTES).sum(),
        };
        self.counters.request_ended(operation, bytes, *status == Status::Ok);
        if *since == self.turn {
            self.quick[operation as usize] += 1;
            self.quick_operations |= 1 << operation as u8;
        } else {
            self.waited.push((Class::new(operation, Served::Waited), *since));
        }
    }

    /// Whether the time of some completed requests is not counted yet.
    pub fn is_open(&self) -> bool {
        self.quick_operations != 0 || self.has_waited()
    }

    /// Whether the time of some completed requests of earlier turns is not counted yet.
    pub fn has_waited(&self) -> bool {
        !self.waited.is_empty()
    }

    /// Counts the completed requests, with `now` as the time of their completion.
    pub fn count_requests(&mut self, now: Tick) {
        let ns = now.since_ns(self.turn);
        let mut operations = std::mem::take(&mut self.quick_operations);
        while operations != 0 {
            let operation = Operation::ALL[operations.trailing_zeros() as usize];
            let count = std::mem::take(&mut self.quick[operation as usize]);
            self.counters.requests_completed(Class::new(operation, Served::Memory), ns, count);
            operations &= operations - 1;
        }
        for (class, since) in self.waited.drain(..) {
            self.counters.requests_completed(class, now.since_ns(since), 1);
        }
    }
}

/// The operation as which a request is counted; `None` for requests without I/O.
fn operation_of(kind: RequestKind) -> Option<Operation> {
    match kind {
        RequestKind::Read => Some(Operation::Read),
        RequestKind::Write => Some(Operation::Write),
        RequestKind::Flush => Some(Operation::Flush),
        RequestKind::Discard => Some(Operation::Discard),
        RequestKind::WriteZeroes => Some(Operation::WriteZeroes),
        RequestKind::GetId | RequestKind::Unknown(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::pending::PendingTable;
    use super::*;
    use crate::cache::Ticket;
    use crate::counters::latency::bucket_of;
    use crate::counters::snapshot::Snapshot;
    use crate::counters::worker::Counters;

    #[test]
    fn a_latency_runs_from_the_requests_own_turn_to_the_next_clock_reading() {
        let counters = Counters::new(1).unwrap();
        let mut tally = Tally::new(counters.of_worker(0));
        let mut table = PendingTable::new(Ticket(0));
        tally.begin_turn(Tick::from_ns(1000));
        let (read, flush) = (table.take(0, tally.turn()), table.take(0, tally.turn()));
        (table[read].request.kind, table[read].request.data_bytes) = (RequestKind::Read, 4096);
        table[flush].request.kind = RequestKind::Flush;
        for slot in [read, read, flush] {
            tally.taken(table[slot].request.kind);
        }
        tally.withdrawn(RequestKind::Read);
        tally.completed(&table[read]);
        assert!(tally.is_open() && !tally.has_waited());
        tally.begin_turn(Tick::from_ns(1500));
        table[flush].status = Status::IoErr;
        tally.completed(&table[flush]);
        assert!(tally.has_waited());
        tally.count_requests(Tick::from_ns(4000));
        assert!(!tally.is_open());
        let snapshot = Snapshot::read(&counters);
        let of = |operation, served| snapshot.requests(Class::new(operation, served));
        assert_eq!(of(Operation::Read, Served::Memory).counts[bucket_of(500)], 1);
        assert_eq!(of(Operation::Flush, Served::Waited).counts[bucket_of(3000)], 1);
        assert_eq!((of(Operation::Read, Served::Waited).count(), snapshot.operation(Operation::Read).bytes), (0, 4096));
        assert_eq!(snapshot.in_flight(Operation::Read), 0, "one was withdrawn");
        let flushes = snapshot.operation(Operation::Flush);
        assert_eq!((flushes.begun, flushes.errors, flushes.bytes), (1, 1, 0));
    }
}
