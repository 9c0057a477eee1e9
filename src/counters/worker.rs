//! The counters of one worker, which is the only writer of its block.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::latency::{BUCKETS, bucket_of};
use super::layout::{
    ACTIVITY, BLOCK_WORDS, HISTOGRAM_WORDS, OPERATIONS, REQUEST_SIZES, REQUESTS, STORE, STORE_OPERATIONS, STORE_SIZES,
    TOTALS_WORDS,
};
use super::sizes::{SIZE_BUCKETS, size_bucket_of};
use super::{Class, Operation};
use crate::sys::shared_words::{SharedWords, WordBlock};
use crate::units::OpClass;

/// How a worker spends its time, and the delays caused by rate limits and by write-back that is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Turns that found work.
    Turns,
    /// The number of sleeps.
    Sleeps,
    /// The number of polling phases before a sleep.
    Polls,
    /// The number of those that found work.
    FruitfulPolls,
    /// Nanoseconds in turns that found work.
    BusyNs,
    /// Requests that a rate limit delayed at the head of their ring.
    Limited,
    /// The sum of these delays in nanoseconds.
    LimitedNs,
    /// Writes whose completion was delayed because many pages were dirty.
    Throttled,
    /// The sum of these delays in nanoseconds.
    ThrottledNs,
}

/// The counters of all workers of a device.
#[derive(Clone, Debug)]
pub struct Counters {
    words: Arc<SharedWords>,
    first: usize,
    workers: usize,
}

impl Counters {
    /// Counters for this many workers, in new memory.
    ///
    /// # Errors
    /// Errors of memfd_create(2) and mmap(2).
    pub fn new(workers: usize) -> io::Result<Self> {
        // At least one worker: a mapping cannot be empty.
        let (words, _) = SharedWords::create(workers.max(1) * BLOCK_WORDS)?;
        Ok(Self::within(Arc::new(words), 0, workers))
    }

    /// The counters of this many workers in `words`, from the word `first` on.
    pub(crate) fn within(words: Arc<SharedWords>, first: usize, workers: usize) -> Self {
        Self { words, first, workers }
    }

    /// The number of workers.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// The counters of a worker that is starting. Requests that an earlier process of the device left in flight no
    /// longer count as in flight: this process counts them when it takes them again.
    ///
    /// => Each worker has one writer.
    ///
    /// # Panics
    /// If there is no such worker.
    pub fn of_worker(&self, worker: usize) -> WorkerCounters {
        assert!(worker < self.workers(), "worker {worker} of {}", self.workers());
        let counters = WorkerCounters(WordBlock::new(&self.words, self.first + worker * BLOCK_WORDS));
        counters.forget_in_flight();
        counters
    }

    /// A worker's words, for reading.
    pub(super) fn block(&self, worker: usize) -> &[AtomicU64] {
        &self.words.words()[self.first + worker * BLOCK_WORDS..][..BLOCK_WORDS]
    }
}

/// Adds to a word. There is no other writer, so a load and a store suffice instead of a locked addition.
#[inline]
fn add(word: &AtomicU64, more: u64) {
    word.store(word.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

/// One worker's counters.
///
/// => Clones may be used by parts of the same worker, never by other threads.
#[derive(Clone, Debug)]
pub struct WorkerCounters(WordBlock<BLOCK_WORDS>);

impl WorkerCounters {
    fn completed(&self, histogram: usize) -> u64 {
        (histogram..histogram + BUCKETS).map(|at| self.0[at].load(Ordering::Relaxed)).sum()
    }

    /// Sets the numbers of begun requests and operations to those of completed ones.
    fn forget_in_flight(&self) {
        for operation in Operation::ALL {
            let classes = Class::ALL.into_iter().filter(|class| class.operation == operation);
            let completed = classes.map(|class| self.completed(REQUESTS + class.index() * HISTOGRAM_WORDS)).sum();
            self.0[OPERATIONS + operation as usize * TOTALS_WORDS].store(completed, Ordering::Relaxed);
        }
        for class in OpClass::ALL {
            let completed = self.completed(STORE + class as usize * HISTOGRAM_WORDS);
            self.0[STORE_OPERATIONS + class as usize * TOTALS_WORDS].store(completed, Ordering::Relaxed);
        }
    }

    fn add(&self, at: usize, more: u64) {
        add(&self.0[at], more);
    }

    fn record(&self, histogram: usize, ns: u64, count: u64) {
        let histogram = &self.0[histogram..histogram + HISTOGRAM_WORDS];
        add(&histogram[bucket_of(ns)], count);
        add(&histogram[BUCKETS], ns.saturating_mul(count));
        let max = &histogram[BUCKETS + 1];
        if ns > max.load(Ordering::Relaxed) {
            max.store(ns, Ordering::Relaxed);
        }
    }

    /// Counts a request that was taken from its ring.
    pub fn request_taken(&self, operation: Operation) {
        self.add(OPERATIONS + operation as usize * TOTALS_WORDS, 1);
    }

    /// Uncounts a taken request that is returned to its ring. It is counted when it is taken again.
    pub fn request_withdrawn(&self, operation: Operation) {
        self.add(OPERATIONS + operation as usize * TOTALS_WORDS, u64::MAX);
    }

    /// Counts the result of a request that moved `bytes`. Its latency follows ([`Self::requests_completed`]).
    pub fn request_ended(&self, operation: Operation, bytes: u64, succeeded: bool) {
        let totals = OPERATIONS + operation as usize * TOTALS_WORDS;
        if succeeded {
            self.add(totals + 2, bytes);
            if operation != Operation::Flush {
                self.add(REQUEST_SIZES + operation as usize * SIZE_BUCKETS + size_bucket_of(bytes), 1);
            }
        } else {
            self.add(totals + 1, 1);
        }
    }

    /// Counts `count` completed requests of a class, each after `ns` nanoseconds.
    pub fn requests_completed(&self, class: Class, ns: u64, count: u64) {
        self.record(REQUESTS + class.index() * HISTOGRAM_WORDS, ns, count);
    }

    /// Counts a submitted operation on the image.
    pub fn store_submitted(&self, class: OpClass) {
        self.add(STORE_OPERATIONS + class as usize * TOTALS_WORDS, 1);
    }

    /// Counts an operation on the image that completed after `ns` nanoseconds; `bytes` is `None` if it failed.
    pub fn store_completed(&self, class: OpClass, ns: u64, bytes: Option<u64>) {
        self.record(STORE + class as usize * HISTOGRAM_WORDS, ns, 1);
        let totals = STORE_OPERATIONS + class as usize * TOTALS_WORDS;
        match bytes {
            Some(bytes) => {
                self.add(totals + 2, bytes);
                if bytes > 0 {
                    self.add(STORE_SIZES + class as usize * SIZE_BUCKETS + size_bucket_of(bytes), 1);
                }
            }
            None => self.add(totals + 1, 1),
        }
    }

    /// Adds to an activity counter of the worker.
    pub fn count(&self, activity: Activity, more: u64) {
        self.add(ACTIVITY + activity as usize, more);
    }
}
