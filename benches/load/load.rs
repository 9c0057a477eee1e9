//! The load generator: each client of a job keeps its queue full and records the latency of each request.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use crate::job::{Client, ClientStats, Job, Ops};
use crate::machine;
use crate::pattern::Offsets;
use crate::prng::Prng;
use crate::queue::{Op, Queue};

/// Runs a job: each client drives one queue from its own thread. The thread is pinned to a CPU as long as one is left
/// for the server. There must be a queue for each client.
pub fn run<Q: Queue>(queues: &mut [Q], job: &Job) -> Vec<ClientStats> {
    let start = Barrier::new(job.clients.len());
    std::thread::scope(|scope| {
        let start = &start;
        let threads: Vec<_> = (1..)
            .zip(job.clients.iter().zip(queues))
            .map(|(seed, (client, queue))| {
                scope.spawn(move || {
                    machine::pin_to_processor(seed as usize);
                    let run = Run::new(client, queue, seed);
                    start.wait();
                    run.go(job.ends_with_flush)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a client thread does not panic")).collect()
    })
}

/// A client while it runs.
struct Run<'a, Q> {
    client: &'a Client,
    queue: &'a mut Q,
    offsets: Offsets,
    prng: Prng,
    /// The request in each slot, and when it was submitted.
    slots: Vec<(Op, Instant)>,
    free: Vec<usize>,
    issued_bytes: u64,
    issued: u64,
    writes_to_flush: u32,
    begin: Instant,
    stats: ClientStats,
}

impl<'a, Q: Queue> Run<'a, Q> {
    fn new(client: &'a Client, queue: &'a mut Q, seed: u64) -> Self {
        let begin = Instant::now();
        queue.prepare(client.block_bytes);
        Self {
            client,
            queue,
            offsets: Offsets::new(client),
            prng: Prng::new(seed),
            slots: vec![(Op::Flush, begin); client.depth],
            free: (0..client.depth).rev().collect(),
            issued_bytes: 0,
            issued: 0,
            writes_to_flush: client.flush_after_writes.unwrap_or(0),
            begin,
            stats: ClientStats::new(),
        }
    }

    fn go(mut self, ends_with_flush: bool) -> ClientStats {
        self.begin = Instant::now();
        let mut done = Vec::with_capacity(self.client.depth);
        let mut now = self.begin;
        loop {
            let due = self.fill(now);
            if self.free.len() < self.client.depth {
                now = self.reap(&mut done);
            } else if let Some(due) = due {
                std::thread::sleep(due.saturating_duration_since(now));
                now = Instant::now();
            } else {
                break;
            }
        }
        if ends_with_flush {
            let slot = self.free.pop().expect("nothing is in flight");
            self.submit(slot, Op::Flush, now);
            now = self.reap(&mut done);
        }
        self.stats.elapsed = now - self.begin - self.client.ramp.min(now - self.begin);
        self.stats
    }

    /// Submits what may be submitted now. Returns when the next request is due, if the client has not finished.
    fn fill(&mut self, now: Instant) -> Option<Instant> {
        while now < self.begin + self.client.duration && self.issued_bytes < self.client.bytes_max {
            if let Some(rate) = self.client.requests_per_second {
                let due = self.begin + Duration::from_secs_f64(self.issued as f64 / rate);
                if due > now {
                    return Some(due);
                }
            }
            let Some(slot) = self.free.pop() else { return Some(now) };
            let op = self.next_op(slot);
            self.submit(slot, op, now);
        }
        None
    }

    fn next_op(&mut self, slot: usize) -> Op {
        self.issued += 1;
        let writes = match self.client.ops {
            Ops::Flushes => return Op::Flush,
            Ops::Reads => false,
            Ops::Writes => true,
            Ops::Mixed { write_percent } => self.prng.percent(write_percent),
        };
        if self.client.flush_after_writes.is_some() && writes {
            if self.writes_to_flush == 0 {
                self.writes_to_flush = self.client.flush_after_writes.unwrap_or(0);
                return Op::Flush;
            }
            self.writes_to_flush -= 1;
        }
        let offset = self.offsets.next(&mut self.prng, slot);
        let len = self.client.block_bytes;
        self.issued_bytes += len as u64;
        if writes { Op::Write { offset, len } } else { Op::Read { offset, len } }
    }

    fn submit(&mut self, slot: usize, op: Op, now: Instant) {
        self.slots[slot] = (op, now);
        self.queue.submit(slot, op);
    }

    /// Waits for completions and records them; returns the time of the completions.
    fn reap(&mut self, done: &mut Vec<(usize, i32)>) -> Instant {
        self.queue.wait(done);
        // One clock read for the whole batch.
        let now = Instant::now();
        let after_ramp = now >= self.begin + self.client.ramp;
        for (slot, result) in done.drain(..) {
            let (op, since) = self.slots[slot];
            assert!(result >= 0, "{op:?} failed: {}", std::io::Error::from_raw_os_error(-result));
            self.free.push(slot);
            self.stats.requests += 1;
            if after_ramp {
                self.record(op, now - since);
            }
        }
        now
    }

    fn record(&mut self, op: Op, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX).max(1);
        let (histogram, bytes) = match op {
            Op::Read { len, .. } => (&mut self.stats.reads, len),
            Op::Write { len, .. } => (&mut self.stats.writes, len),
            Op::Flush => (&mut self.stats.flushes, 0),
        };
        histogram.record(ns).expect("a histogram that resizes takes any value");
        self.stats.bytes += bytes as u64;
    }
}
