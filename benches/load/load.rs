//! The load itself: each actor of a job keeps its queue full, and notes how long each request took.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use crate::job::{Actor, Does, Job, Tally};
use crate::machine;
use crate::pattern::Offsets;
use crate::prng::Prng;
use crate::queue::{Op, Queue};

/// Runs a job, each actor on a queue and a thread of its own, which keeps to a processor as long as one is left for the
/// server. As many queues as actors, or more.
pub fn run<Q: Queue>(queues: &mut [Q], job: &Job) -> Vec<Tally> {
    let begin = Barrier::new(job.actors.len());
    std::thread::scope(|scope| {
        let begin = &begin;
        let threads: Vec<_> = (1..)
            .zip(job.actors.iter().zip(queues))
            .map(|(seed, (actor, queue))| {
                scope.spawn(move || {
                    machine::keep_to_processor(seed as usize);
                    let run = Run::new(actor, queue, seed);
                    begin.wait();
                    run.go(job.ends_with_flush)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("an actor ends")).collect()
    })
}

/// An actor at work.
struct Run<'a, Q> {
    actor: &'a Actor,
    queue: &'a mut Q,
    offsets: Offsets,
    prng: Prng,
    /// What is in flight, by slot, and since when.
    slots: Vec<(Op, Instant)>,
    free: Vec<usize>,
    asked_bytes: u64,
    asked: u64,
    writes_to_flush: u32,
    begin: Instant,
    tally: Tally,
}

impl<'a, Q: Queue> Run<'a, Q> {
    fn new(actor: &'a Actor, queue: &'a mut Q, seed: u64) -> Self {
        let begin = Instant::now();
        queue.prepare(actor.block_bytes);
        Self {
            actor,
            queue,
            offsets: Offsets::new(actor),
            prng: Prng::new(seed),
            slots: vec![(Op::Flush, begin); actor.depth],
            free: (0..actor.depth).rev().collect(),
            asked_bytes: 0,
            asked: 0,
            writes_to_flush: actor.flush_after_writes.unwrap_or(0),
            begin,
            tally: Tally::new(),
        }
    }

    fn go(mut self, ends_with_flush: bool) -> Tally {
        self.begin = Instant::now();
        let mut done = Vec::with_capacity(self.actor.depth);
        let mut now = self.begin;
        loop {
            let due = self.fill(now);
            if self.free.len() < self.actor.depth {
                now = self.collect(&mut done);
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
            now = self.collect(&mut done);
        }
        self.tally.elapsed = now - self.begin - self.actor.ramp.min(now - self.begin);
        self.tally
    }

    /// Submits what may be submitted now. When a request has to wait for its time: until when.
    fn fill(&mut self, now: Instant) -> Option<Instant> {
        while now < self.begin + self.actor.lasts && self.asked_bytes < self.actor.bytes_max {
            if let Some(rate) = self.actor.requests_per_second {
                let due = self.begin + Duration::from_secs_f64(self.asked as f64 / rate);
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
        self.asked += 1;
        let writes = match self.actor.does {
            Does::Flushes => return Op::Flush,
            Does::Reads => false,
            Does::Writes => true,
            Does::Mixed { write_percent } => self.prng.chance(write_percent),
        };
        if self.actor.flush_after_writes.is_some() && writes {
            if self.writes_to_flush == 0 {
                self.writes_to_flush = self.actor.flush_after_writes.unwrap_or(0);
                return Op::Flush;
            }
            self.writes_to_flush -= 1;
        }
        let offset = self.offsets.next(&mut self.prng, slot);
        let len = self.actor.block_bytes;
        self.asked_bytes += len as u64;
        if writes { Op::Write { offset, len } } else { Op::Read { offset, len } }
    }

    fn submit(&mut self, slot: usize, op: Op, now: Instant) {
        self.slots[slot] = (op, now);
        self.queue.submit(slot, op);
    }

    /// Waits for completions and counts them; returns the time.
    fn collect(&mut self, done: &mut Vec<(usize, i32)>) -> Instant {
        self.queue.wait(done);
        // One look at the clock for all that came together.
        let now = Instant::now();
        let counts = now >= self.begin + self.actor.ramp;
        for (slot, result) in done.drain(..) {
            let (op, since) = self.slots[slot];
            assert!(result >= 0, "{op:?} failed: {}", std::io::Error::from_raw_os_error(-result));
            self.free.push(slot);
            self.tally.requests += 1;
            if counts {
                self.count(op, now - since);
            }
        }
        now
    }

    fn count(&mut self, op: Op, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        let (histogram, bytes) = match op {
            Op::Read { len, .. } => (&mut self.tally.reads, len),
            Op::Write { len, .. } => (&mut self.tally.writes, len),
            Op::Flush => (&mut self.tally.flushes, 0),
        };
        histogram.record(ns).expect("a histogram that resizes takes any value");
        self.tally.bytes += bytes as u64;
    }
}
