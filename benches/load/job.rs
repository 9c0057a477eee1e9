//! What a load is, and what came of it.

use std::ops::Range;
use std::time::Duration;

use hdrhistogram::Histogram;

/// Where the next request goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// Anywhere in the region, evenly.
    Random,
    /// So many sequential streams, each from its own place in the region; a slot in flight stays with its stream.
    Sequential { streams: u64 },
    /// Few blocks often, most blocks seldom (Zipf's law with this exponent), scattered over the region.
    Zipf { theta: f64 },
}

/// What an actor's requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    Reads,
    Writes,
    /// Reads, and so many writes in a hundred requests.
    Mixed {
        write_percent: u64,
    },
    /// FLUSH and nothing else.
    Flushes,
}

/// One thread of a client with a queue of its own.
#[derive(Clone, Debug)]
pub struct Actor {
    pub does: Does,
    pub pattern: Pattern,
    /// Bytes of the image that are used.
    pub region: Range<u64>,
    pub block_bytes: usize,
    /// Requests in flight.
    pub depth: usize,
    /// A FLUSH after so many writes, beside them in the queue.
    pub flush_after_writes: Option<u32>,
    /// No more than this; none: as fast as it goes.
    pub requests_per_second: Option<f64>,
    /// Ends then, at the latest.
    pub lasts: Duration,
    /// Ends when so much has been asked for, at the latest.
    pub bytes_max: u64,
    /// The first part of the time, which is not counted.
    pub ramp: Duration,
}

impl Actor {
    /// Requests of one kind and size over a region, one at a time, for a second.
    pub fn new(does: Does, pattern: Pattern, region: Range<u64>, block_bytes: usize) -> Self {
        let (lasts, ramp) = (Duration::from_secs(1), Duration::ZERO);
        let (flush_after_writes, requests_per_second, bytes_max) = (None, None, u64::MAX);
        let depth = 1;
        Self {
            does,
            pattern,
            region,
            block_bytes,
            depth,
            flush_after_writes,
            requests_per_second,
            lasts,
            bytes_max,
            ramp,
        }
    }

    pub fn depth(self, depth: usize) -> Self {
        Self { depth, ..self }
    }

    pub fn lasts_ms(self, ramp: u64, counted: u64) -> Self {
        Self { ramp: Duration::from_millis(ramp), lasts: Duration::from_millis(ramp + counted), ..self }
    }

    pub fn bytes_max(self, bytes_max: u64) -> Self {
        Self { bytes_max, ..self }
    }

    pub fn per_second(self, requests: f64) -> Self {
        Self { requests_per_second: Some(requests), ..self }
    }

    pub fn flush_after_writes(self, writes: u32) -> Self {
        Self { flush_after_writes: Some(writes), ..self }
    }

    /// Memory for the data in flight.
    pub fn buffer_bytes(&self) -> usize {
        self.depth * self.block_bytes
    }
}

/// How a client learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It looks at the ring all the time.
    Poll,
    /// It sleeps until it is called.
    Interrupt,
}

/// Everything that one run of a client does.
#[derive(Clone, Debug)]
pub struct Job {
    pub actors: Vec<Actor>,
    pub wait: Wait,
    /// The run ends with a FLUSH, which counts into its time.
    pub ends_with_flush: bool,
}

impl Job {
    pub fn of(actor: Actor, wait: Wait) -> Self {
        Self { actors: vec![actor], wait, ends_with_flush: false }
    }

    /// The same, `factor` times as long.
    pub fn scaled(&self, factor: f64) -> Self {
        let mut job = self.clone();
        for actor in &mut job.actors {
            actor.lasts = actor.lasts.mul_f64(factor);
            actor.ramp = actor.ramp.mul_f64(factor);
            if actor.bytes_max != u64::MAX {
                let blocks = (actor.bytes_max as f64 * factor) as u64 / actor.block_bytes as u64;
                actor.bytes_max = blocks.max(1) * actor.block_bytes as u64;
            }
        }
        job
    }
}

/// What an actor has seen, the ramp left out; latencies in nanoseconds.
#[derive(Clone, Debug)]
pub struct Tally {
    pub reads: Histogram<u64>,
    pub writes: Histogram<u64>,
    pub flushes: Histogram<u64>,
    pub bytes: u64,
    pub elapsed: Duration,
    /// Requests of the whole run, the ramp too: what the server's processor time is divided by.
    pub requests: u64,
}

impl Tally {
    pub fn new() -> Self {
        // Three digits are one part in a thousand: far below the noise.
        let histogram = || Histogram::new(3).expect("3 digits are possible");
        let (reads, writes, flushes) = (histogram(), histogram(), histogram());
        Self { reads, writes, flushes, bytes: 0, elapsed: Duration::ZERO, requests: 0 }
    }

    /// Requests that were counted.
    pub fn counted(&self) -> u64 {
        self.reads.len() + self.writes.len() + self.flushes.len()
    }

    /// The latencies of all requests.
    pub fn all(&self) -> Histogram<u64> {
        let mut all = self.reads.clone();
        for more in [&self.writes, &self.flushes] {
            all.add(more).expect("histograms that resize hold everything");
        }
        all
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// One for each actor.
    pub tallies: Vec<Tally>,
    /// Processor time that the server took; not a number where there is none.
    pub server_cpu_us: f64,
    /// What reached the device: operations and bytes.
    pub device_writes: (u64, u64),
}

impl Outcome {
    /// A run without a server or a device to look at.
    pub fn bare(tallies: Vec<Tally>) -> Self {
        Self { tallies, server_cpu_us: f64::NAN, device_writes: (0, 0) }
    }
}
