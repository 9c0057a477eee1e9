//! What one worker counts. It is the only writer of its block.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::latency::{BUCKETS, bucket_of};
use super::layout::{
    ACTIVITY, BLOCK_WORDS, HISTOGRAM_WORDS, OPERATIONS, REQUESTS, STORE, STORE_OPERATIONS, TOTALS_WORDS,
};
use super::{Class, Operation, StoreClass};

/// How a worker spends its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Turns that found work.
    Turns,
    /// Times that it slept.
    Sleeps,
    /// Times that it polled before it would have slept.
    Polls,
    /// Of those, times that a poll found work.
    FruitfulPolls,
    /// Nanoseconds in turns that found work.
    BusyNs,
}

/// The counters of all workers of a device.
#[derive(Clone, Debug)]
pub struct Counters {
    words: Arc<[AtomicU64]>,
}

impl Counters {
    /// Counters that are 0, for this many workers.
    pub fn new(workers: usize) -> Self {
        Self { words: (0..workers * BLOCK_WORDS).map(|_| AtomicU64::new(0)).collect() }
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.words.len() / BLOCK_WORDS
    }

    /// The counters of a worker.
    ///
    /// => Each worker has one writer.
    ///
    /// # Panics
    /// If there is no such worker.
    pub fn of_worker(&self, worker: usize) -> WorkerCounters {
        assert!(worker < self.workers(), "worker {worker} of {}", self.workers());
        WorkerCounters { words: Arc::clone(&self.words), first: worker * BLOCK_WORDS }
    }

    /// A worker's words, for reading.
    pub(super) fn block(&self, worker: usize) -> &[AtomicU64] {
        &self.words[worker * BLOCK_WORDS..][..BLOCK_WORDS]
    }
}

/// One worker's counters.
///
/// => Clones are for parts of the same worker, never for other threads.
#[derive(Clone, Debug)]
pub struct WorkerCounters {
    words: Arc<[AtomicU64]>,
    first: usize,
}

impl WorkerCounters {
    fn word(&self, at: usize) -> &AtomicU64 {
        &self.words[self.first + at]
    }

    /// Adds to a word. There is no other writer, so that a load and a store do what a locked addition would.
    fn add(&self, at: usize, more: u64) {
        let word = self.word(at);
        word.store(word.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    fn record(&self, histogram: usize, ns: u64, count: u64) {
        self.add(histogram + bucket_of(ns), count);
        self.add(histogram + BUCKETS, ns.saturating_mul(count));
        let max = self.word(histogram + BUCKETS + 1);
        if ns > max.load(Ordering::Relaxed) {
            max.store(ns, Ordering::Relaxed);
        }
    }

    /// A request was taken from its ring.
    pub fn request_taken(&self, operation: Operation) {
        self.add(OPERATIONS + operation as usize * TOTALS_WORDS, 1);
    }

    /// A request that was taken goes back to its ring. It counts again when it is taken again.
    pub fn request_withdrawn(&self, operation: Operation) {
        self.add(OPERATIONS + operation as usize * TOTALS_WORDS, u64::MAX);
    }

    /// A request that moved `bytes` completes with success or not. Its latency follows ([`Self::requests_completed`]).
    pub fn request_ended(&self, operation: Operation, bytes: u64, succeeded: bool) {
        let totals = OPERATIONS + operation as usize * TOTALS_WORDS;
        if succeeded {
            self.add(totals + 2, bytes);
        } else {
            self.add(totals + 1, 1);
        }
    }

    /// `count` requests of a class completed, each after `ns` nanoseconds.
    pub fn requests_completed(&self, class: Class, ns: u64, count: u64) {
        self.record(REQUESTS + class.index() * HISTOGRAM_WORDS, ns, count);
    }

    /// An operation on the image was submitted.
    pub fn store_submitted(&self, class: StoreClass) {
        self.add(STORE_OPERATIONS + class as usize * TOTALS_WORDS, 1);
    }

    /// An operation on the image completed after `ns` nanoseconds; `bytes` is `None` if it failed.
    pub fn store_completed(&self, class: StoreClass, ns: u64, bytes: Option<u64>) {
        self.record(STORE + class as usize * HISTOGRAM_WORDS, ns, 1);
        let totals = STORE_OPERATIONS + class as usize * TOTALS_WORDS;
        match bytes {
            Some(bytes) => self.add(totals + 2, bytes),
            None => self.add(totals + 1, 1),
        }
    }

    /// Adds to what is known of the worker's time.
    pub fn count(&self, activity: Activity, more: u64) {
        self.add(ACTIVITY + activity as usize, more);
    }
}
