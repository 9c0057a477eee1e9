//! Reading the counters: the sums over a device's workers at one time.

use std::sync::atomic::{AtomicU64, Ordering};

use super::latency::{BUCKETS, Latencies};
use super::layout::{
    ACTIVITY, ACTIVITY_WORDS, HISTOGRAM_WORDS, OPERATIONS, REQUEST_SIZES, REQUESTS, STORE, STORE_OPERATIONS,
    STORE_SIZES, TOTALS_WORDS,
};
use super::sizes::{SIZE_BUCKETS, Sizes};
use super::worker::{Activity, Counters};
use super::{Class, Operation};
use crate::units::OpClass;

/// Totals of a kind of request or operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// The number that have begun.
    pub begun: u64,
    /// The number that completed with an error.
    pub errors: u64,
    /// Bytes moved by those without an error.
    pub bytes: u64,
}

/// A copy of a device's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// By [`Class::ALL`].
    requests: [Latencies; Class::ALL.len()],
    /// By [`Operation::ALL`].
    operations: [Totals; Operation::ALL.len()],
    /// By [`OpClass::ALL`].
    store: [Latencies; OpClass::ALL.len()],
    store_operations: [Totals; OpClass::ALL.len()],
    /// By [`Operation::ALL`].
    request_sizes: [Sizes; Operation::ALL.len()],
    /// By [`OpClass::ALL`].
    store_sizes: [Sizes; OpClass::ALL.len()],
    /// Of each worker.
    activities: Vec<[u64; ACTIVITY_WORDS]>,
}

impl Snapshot {
    /// Reads the counters. Requests that complete meanwhile may be in some of them and not in others.
    pub fn read(counters: &Counters) -> Self {
        let mut snapshot = Self::default();
        for worker in 0..counters.workers() {
            snapshot.add(counters.block(worker));
        }
        snapshot
    }

    fn add(&mut self, block: &[AtomicU64]) {
        let histograms = self.requests.iter_mut().zip(block[REQUESTS..].chunks_exact(HISTOGRAM_WORDS));
        histograms.for_each(|(sum, words)| sum.add(&latencies(words)));
        let histograms = self.store.iter_mut().zip(block[STORE..].chunks_exact(HISTOGRAM_WORDS));
        histograms.for_each(|(sum, words)| sum.add(&latencies(words)));
        let totals = self.operations.iter_mut().zip(block[OPERATIONS..].chunks_exact(TOTALS_WORDS));
        totals.for_each(|(sum, words)| sum.add(words));
        let totals = self.store_operations.iter_mut().zip(block[STORE_OPERATIONS..].chunks_exact(TOTALS_WORDS));
        totals.for_each(|(sum, words)| sum.add(words));
        for (sizes, at) in [(&mut self.request_sizes[..], REQUEST_SIZES), (&mut self.store_sizes[..], STORE_SIZES)] {
            let histograms = sizes.iter_mut().zip(block[at..].chunks_exact(SIZE_BUCKETS));
            for (sum, word) in histograms.flat_map(|(sizes, words)| sizes.iter_mut().zip(words)) {
                *sum = sum.saturating_add(load(word));
            }
        }
        self.activities.push(std::array::from_fn(|at| load(&block[ACTIVITY + at])));
    }

    /// Latencies of a class of requests.
    pub fn requests(&self, class: Class) -> &Latencies {
        &self.requests[class.index()]
    }

    /// Totals of a kind of request.
    pub fn operation(&self, operation: Operation) -> Totals {
        self.operations[operation as usize]
    }

    /// The number of completed requests of a kind.
    pub fn completed(&self, operation: Operation) -> u64 {
        let classes = Class::ALL.into_iter().filter(|class| class.operation == operation);
        classes.fold(0, |sum: u64, class| sum.saturating_add(self.requests(class).count()))
    }

    /// The number of requests of a kind that were taken from a ring and have not completed.
    pub fn in_flight(&self, operation: Operation) -> u64 {
        self.operation(operation).begun.saturating_sub(self.completed(operation))
    }

    /// Latencies of a kind of operation on the image.
    pub fn store(&self, class: OpClass) -> &Latencies {
        &self.store[class as usize]
    }

    /// Totals of a kind of operation on the image.
    pub fn store_operation(&self, class: OpClass) -> Totals {
        self.store_operations[class as usize]
    }

    /// Sizes of the requests of a kind that moved bytes.
    pub fn request_sizes(&self, operation: Operation) -> &Sizes {
        &self.request_sizes[operation as usize]
    }

    /// Sizes of the operations on the image of a kind.
    pub fn store_sizes(&self, class: OpClass) -> &Sizes {
        &self.store_sizes[class as usize]
    }

    /// The number of workers.
    pub fn workers(&self) -> usize {
        self.activities.len()
    }

    /// An activity counter of a worker.
    pub fn activity(&self, worker: usize, activity: Activity) -> u64 {
        self.activities[worker][activity as usize]
    }
}

impl Totals {
    fn add(&mut self, words: &[AtomicU64]) {
        for (sum, word) in [&mut self.begun, &mut self.errors, &mut self.bytes].into_iter().zip(words) {
            *sum = sum.saturating_add(load(word));
        }
    }
}

fn load(word: &AtomicU64) -> u64 {
    word.load(Ordering::Relaxed)
}

fn latencies(words: &[AtomicU64]) -> Latencies {
    let counts = std::array::from_fn(|bucket| load(&words[bucket]));
    Latencies { counts, sum_ns: load(&words[BUCKETS]), max_ns: load(&words[BUCKETS + 1]) }
}

#[cfg(test)]
mod tests {
    use super::super::Served;
    use super::*;

    #[test]
    fn a_snapshot_sums_the_counters_of_all_workers() {
        let counters = Counters::new(2).unwrap();
        let read = Class::new(Operation::Read, Served::Memory);
        let workers = [0, 1].map(|worker| counters.of_worker(worker));
        for (worker, ns) in workers.iter().zip([1000, 9000]) {
            worker.request_taken(Operation::Read);
            worker.request_taken(Operation::Read);
            worker.request_ended(Operation::Read, 4096, true);
            worker.requests_completed(read, ns, 1);
            worker.store_submitted(OpClass::Sync);
            worker.count(Activity::Turns, ns);
        }
        workers[1].store_completed(OpClass::Sync, 77, None);
        let snapshot = Snapshot::read(&counters);
        assert_eq!(snapshot.requests(read).count(), 2);
        assert_eq!((snapshot.requests(read).sum_ns, snapshot.requests(read).max_ns), (10_000, 9000));
        assert_eq!((snapshot.completed(Operation::Read), snapshot.in_flight(Operation::Read)), (2, 2));
        assert_eq!(snapshot.operation(Operation::Read), Totals { begun: 4, errors: 0, bytes: 8192 });
        assert_eq!(snapshot.store_operation(OpClass::Sync), Totals { begun: 2, errors: 1, bytes: 0 });
        assert_eq!(snapshot.store(OpClass::Sync).count(), 1);
        let turns = |worker| snapshot.activity(worker, Activity::Turns);
        assert_eq!((snapshot.workers(), turns(0), turns(1)), (2, 1000, 9000));
    }

    #[test]
    fn requests_in_flight_of_a_dead_process_are_not_counted() {
        let counters = Counters::new(1).unwrap();
        let worker = counters.of_worker(0);
        (0..3).for_each(|_| worker.request_taken(Operation::Write));
        worker.requests_completed(Class::new(Operation::Write, Served::Memory), 5, 1);
        worker.store_submitted(OpClass::Read);
        assert_eq!(Snapshot::read(&counters).in_flight(Operation::Write), 2);
        counters.of_worker(0).request_taken(Operation::Write);
        let snapshot = Snapshot::read(&counters);
        assert_eq!((snapshot.in_flight(Operation::Write), snapshot.completed(Operation::Write)), (1, 1));
        assert_eq!(snapshot.store_operation(OpClass::Read).begun, 0);
    }

    #[test]
    fn no_two_counters_share_memory() {
        let counters = Counters::new(1).unwrap();
        let worker = counters.of_worker(0);
        for class in Class::ALL {
            worker.requests_completed(class, 1 << 40, 1);
            worker.requests_completed(class, 0, 1);
        }
        for operation in Operation::ALL {
            worker.request_taken(operation);
            worker.request_ended(operation, 1, true);
            worker.request_ended(operation, 1, false);
        }
        for class in OpClass::ALL {
            worker.store_submitted(class);
            worker.store_completed(class, 1 << 40, Some(1));
            worker.store_completed(class, 0, None);
        }
        worker.count(Activity::Turns, 1);
        worker.count(Activity::BusyNs, 1);
        worker.count(Activity::LimitedNs, 1);
        let snapshot = Snapshot::read(&counters);
        let once = Totals { begun: 1, errors: 1, bytes: 1 };
        assert!(snapshot.requests.iter().chain(&snapshot.store).all(|latencies| latencies.count() == 2));
        assert!(snapshot.operations.iter().chain(&snapshot.store_operations).all(|totals| *totals == once));
        let counted = |sizes: &Sizes| sizes.iter().sum::<u64>();
        assert_eq!(snapshot.request_sizes.map(|sizes| counted(&sizes)), [1, 1, 0, 1, 1], "a FLUSH has no size");
        assert!(snapshot.store_sizes.iter().all(|sizes| counted(sizes) == 1));
        assert_eq!(snapshot.activities, [[1, 0, 0, 0, 1, 0, 1, 0, 0]]);
    }
}
