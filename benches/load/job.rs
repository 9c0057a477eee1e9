//! The description of a load, and its result.

use std::ops::Range;
use std::time::Duration;

use hdrhistogram::Histogram;

/// How the offsets of requests are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// Uniformly random over the region.
    Random,
    /// This many sequential streams, which start at equal distances in the region. Requests take the streams in turn.
    Sequential { streams: u64 },
    /// Zipf-distributed with this exponent; the popular blocks are scattered over the region.
    Zipf { theta: f64 },
}

/// The operations of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ops {
    Reads,
    Writes,
    /// Reads, with this percentage of writes.
    Mixed {
        write_percent: u64,
    },
    /// Only FLUSH requests.
    Flushes,
}

/// One client thread, which drives one queue.
#[derive(Clone, Debug)]
pub struct Client {
    pub ops: Ops,
    pub pattern: Pattern,
    /// The part of the image that it uses, in bytes.
    pub region: Range<u64>,
    pub block_bytes: usize,
    /// Queue depth: requests in flight.
    pub depth: usize,
    /// Send a FLUSH after this many writes. The queue does not drain for it.
    pub flush_after_writes: Option<u32>,
    /// Upper bound on the request rate; `None`: as fast as possible.
    pub requests_per_second: Option<f64>,
    /// Stop after this time, the ramp included.
    pub duration: Duration,
    /// Stop after requests for this many bytes.
    pub bytes_max: u64,
    /// The first part of the time, which the statistics exclude.
    pub ramp: Duration,
}

impl Client {
    /// A client at queue depth 1 that runs for one second.
    pub fn new(ops: Ops, pattern: Pattern, region: Range<u64>, block_bytes: usize) -> Self {
        let (duration, ramp) = (Duration::from_secs(1), Duration::ZERO);
        let (flush_after_writes, requests_per_second, bytes_max) = (None, None, u64::MAX);
        let depth = 1;
        Self {
            ops,
            pattern,
            region,
            block_bytes,
            depth,
            flush_after_writes,
            requests_per_second,
            duration,
            bytes_max,
            ramp,
        }
    }

    pub fn depth(self, depth: usize) -> Self {
        Self { depth, ..self }
    }

    pub fn runs_ms(self, ramp: u64, measured: u64) -> Self {
        Self { ramp: Duration::from_millis(ramp), duration: Duration::from_millis(ramp + measured), ..self }
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

    /// Memory for the data of all requests in flight.
    pub fn buffer_bytes(&self) -> usize {
        self.depth * self.block_bytes
    }
}

/// How a client waits for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionMode {
    /// It polls the used ring.
    Polling,
    /// It sleeps until the device notifies it.
    Interrupt,
}

/// A load: clients that run at the same time.
#[derive(Clone, Debug)]
pub struct Job {
    pub clients: Vec<Client>,
    pub mode: CompletionMode,
    /// Each client ends with a FLUSH, which counts towards its time.
    pub ends_with_flush: bool,
}

impl Job {
    pub fn of(client: Client, mode: CompletionMode) -> Self {
        Self { clients: vec![client], mode, ends_with_flush: false }
    }

    /// Whether any client sends a FLUSH.
    pub fn flushes(&self) -> bool {
        let sends_flush = |client: &Client| client.ops == Ops::Flushes || client.flush_after_writes.is_some();
        self.ends_with_flush || self.clients.iter().any(sends_flush)
    }

    /// The same job for `factor` times the time and data.
    pub fn scaled(&self, factor: f64) -> Self {
        let mut job = self.clone();
        for client in &mut job.clients {
            client.duration = client.duration.mul_f64(factor);
            client.ramp = client.ramp.mul_f64(factor);
            if client.bytes_max != u64::MAX {
                let blocks = (client.bytes_max as f64 * factor) as u64 / client.block_bytes as u64;
                client.bytes_max = blocks.max(1) * client.block_bytes as u64;
            }
        }
        job
    }
}

/// What one client measured after its ramp. Latencies are in nanoseconds.
#[derive(Clone, Debug)]
pub struct ClientStats {
    pub reads: Histogram<u64>,
    pub writes: Histogram<u64>,
    pub flushes: Histogram<u64>,
    pub bytes: u64,
    pub elapsed: Duration,
    /// Requests of the whole run, including the ramp: the divisor for the server's CPU time.
    pub requests: u64,
}

impl ClientStats {
    pub fn new() -> Self {
        // Three digits resolve one part in a thousand, far below the noise.
        let histogram = || Histogram::new(3).expect("3 digits are possible");
        let (reads, writes, flushes) = (histogram(), histogram(), histogram());
        Self { reads, writes, flushes, bytes: 0, elapsed: Duration::ZERO, requests: 0 }
    }

    /// Requests after the ramp.
    pub fn measured(&self) -> u64 {
        self.reads.len() + self.writes.len() + self.flushes.len()
    }

    /// The latencies of all operations together.
    pub fn all(&self) -> Histogram<u64> {
        let mut all = self.reads.clone();
        for more in [&self.writes, &self.flushes] {
            all.add(more).expect("histograms that resize hold everything");
        }
        all
    }
}

/// The result of a job.
#[derive(Clone, Debug)]
pub struct JobStats {
    /// The statistics of each client.
    pub clients: Vec<ClientStats>,
    /// CPU time that the server used; NaN without a server.
    pub server_cpu_us: f64,
    /// Writes that reached the device: operations and bytes.
    pub device_writes: (u64, u64),
}

impl JobStats {
    /// A result without figures of a server or a device.
    pub fn clients_only(clients: Vec<ClientStats>) -> Self {
        Self { clients, server_cpu_us: f64::NAN, device_writes: (0, 0) }
    }
}
