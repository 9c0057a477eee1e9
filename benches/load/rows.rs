//! The rows of the comparison: what each measures, on which medium, and its targets.

use std::ops::Range;

use crate::job::{Client, CompletionMode, Job, JobStats, Ops, Pattern};
use crate::medium::Medium;
use crate::throttle::Rate;

const KIB: usize = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Size of the image: sixteen times genblk's default cache.
pub const IMAGE_BYTES: u64 = 4 * GIB;
/// The region of cached reads: half of genblk's default cache, and far more than the CPU caches hold.
const HOT: Range<u64> = 0..128 * MIB;
/// The region of absorbed writes: a sixteenth of the dirty limit of a fast store, so that write-back need not start.
const ABSORBED: Range<u64> = 0..4 * MIB;
const ALL: Range<u64> = 0..IMAGE_BYTES;
/// genblk's default `flush_target_ms`.
const FLUSH_TARGET_MS: f64 = 250.0;

const SEQUENTIAL: Pattern = Pattern::Sequential { streams: 1 };

/// What is computed from the result of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    Iops,
    MibPerSecond,
    MedianUs,
    P99Us,
    P999Us,
    FlushP99Ms,
    Seconds,
    /// The server's CPU time per request.
    CpuUs,
    /// Mean size of the writes that reached the device.
    WriteKib,
    /// The 99th percentile of the first client's reads, relative to that of the same client alone.
    P99OverUnloaded,
}

impl Measure {
    pub fn higher_is_better(self) -> bool {
        matches!(self, Self::Iops | Self::MibPerSecond | Self::WriteKib)
    }

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iops => "requests/s",
            Self::MibPerSecond => "MiB/s",
            Self::MedianUs => "p50, us",
            Self::P99Us => "p99, us",
            Self::P999Us => "p99.9, us",
            Self::FlushP99Ms => "p99 of FLUSH, ms",
            Self::Seconds => "seconds",
            Self::CpuUs => "CPU us/request",
            Self::WriteKib => "KiB/device write",
            Self::P99OverUnloaded => "p99, x unloaded",
        }
    }

    /// The number; `unloaded` is the result of the first client alone, for rows that measure it.
    pub fn of(self, stats: &JobStats, unloaded: Option<&JobStats>) -> f64 {
        let first = &stats.clients[0];
        let seconds = first.elapsed.as_secs_f64();
        let us = |stats: &JobStats, quantile: f64| stats.clients[0].all().value_at_quantile(quantile) as f64 / 1000.0;
        match self {
            Self::Iops => first.measured() as f64 / seconds,
            Self::MibPerSecond => first.bytes as f64 / MIB as f64 / seconds,
            Self::MedianUs => us(stats, 0.5),
            Self::P99Us => us(stats, 0.99),
            Self::P999Us => us(stats, 0.999),
            Self::FlushP99Ms => {
                let mut flushes = first.flushes.clone();
                for client in &stats.clients[1..] {
                    flushes.add(&client.flushes).expect("a resizable histogram takes any value");
                }
                flushes.value_at_quantile(0.99) as f64 / 1e6
            }
            Self::Seconds => seconds,
            Self::CpuUs => {
                let requests: u64 = stats.clients.iter().map(|client| client.requests).sum();
                stats.server_cpu_us / requests as f64
            }
            Self::WriteKib => {
                let (operations, bytes) = stats.device_writes;
                bytes as f64 / 1024.0 / operations as f64
            }
            Self::P99OverUnloaded => us(stats, 0.99) / us(unloaded.expect("the row measures it"), 0.99),
        }
    }
}

/// What genblk is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// The lowest of the row's limits.
    Limit,
    /// The best peer.
    Peers,
    /// The best of qemu-storage-daemon's exports.
    Qemu,
    /// The peer whose name starts with this, if there is one.
    Named(&'static str),
    /// genblk with a cache that does not survive a crash: shows the cost of the ledger.
    Volatile,
    /// Another build of genblk.
    Base,
    /// Nothing: the target is a number.
    Constant,
}

/// A target: at least `factor` times the other number where higher is better, otherwise at most that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Index into the row's measures.
    pub measure: usize,
    pub factor: f64,
    pub against: Against,
}

/// How a limit of a row is measured.
#[derive(Clone, Debug)]
pub enum LimitKind {
    /// The copy server of `limit.rs`.
    Copy,
    /// io_uring with O_DIRECT on the device.
    Device(Job),
    /// genblk itself, reading this region, all of which is in its cache.
    Cached(Range<u64>),
}

/// A row of the comparison.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its name on the command line and in tables.
    pub key: &'static str,
    /// What it does, for people.
    pub title: &'static str,
    /// What else distinguishes it.
    pub conditions: &'static str,
    pub medium: Medium,
    /// Runs first, on its own connection.
    pub warm_up: Option<Job>,
    pub job: Job,
    /// Whether to measure the first client alone before the job.
    pub unloaded: bool,
    pub measures: Vec<Measure>,
    pub limits: Vec<LimitKind>,
    pub targets: Vec<Target>,
}

impl Row {
    fn new(key: &'static str, title: &'static str, medium: Medium, job: Job, measures: &[Measure]) -> Self {
        let (warm_up, unloaded, conditions) = (None, false, "");
        let (measures, limits, targets) = (measures.to_vec(), Vec::new(), Vec::new());
        Self { key, title, conditions, medium, warm_up, job, unloaded, measures, limits, targets }
    }

    /// The end of the part of the image that the row uses.
    pub fn image_end(&self) -> u64 {
        let devices = self.limits.iter().filter_map(|limit| match limit {
            LimitKind::Device(job) => Some(job),
            LimitKind::Copy | LimitKind::Cached(_) => None,
        });
        let jobs = self.warm_up.iter().chain([&self.job]).chain(devices);
        jobs.flat_map(|job| &job.clients).map(|client| client.region.end).max().unwrap_or(0)
    }

    /// The same row, limited to the first `bytes` of the image.
    pub fn clipped_to(mut self, bytes: u64) -> Self {
        for client in self.warm_up.iter_mut().chain([&mut self.job]).flat_map(|job| &mut job.clients) {
            client.region.end = client.region.end.min(bytes);
        }
        self
    }

    fn with(self, conditions: &'static str) -> Self {
        Self { conditions, ..self }
    }

    fn warmed_up(self, ops: Ops, region: Range<u64>) -> Self {
        Self { warm_up: Some(warm_up(ops, region)), ..self }
    }

    fn limit(mut self, limit: LimitKind) -> Self {
        self.limits.push(limit);
        self
    }

    fn target(mut self, measure: usize, factor: f64, against: Against) -> Self {
        self.targets.push(Target { measure, factor, against });
        self
    }
}

/// One pass over a region.
pub fn warm_up(ops: Ops, region: Range<u64>) -> Job {
    let bytes = region.end - region.start;
    let client = Client::new(ops, SEQUENTIAL, region, 128 * KIB).depth(8).bytes_max(bytes).runs_ms(0, 60_000);
    Job::of(client, CompletionMode::Interrupt)
}

/// Every row, in the order of the report.
pub fn all() -> Vec<Row> {
    let mut rows = cached();
    rows.extend(cold());
    rows.extend(throttled());
    rows
}

/// All data is in memory: these rows measure the path of a request.
fn cached() -> Vec<Row> {
    use Against::{Limit, Named, Peers, Qemu, Volatile};
    use CompletionMode::{Interrupt, Polling};
    use Measure::{CpuUs, Iops, MedianUs, MibPerSecond, P99Us, P999Us};
    let cloud_hypervisor = Named("cloud-hypervisor");
    let reads = |depth| Client::new(Ops::Reads, Pattern::Random, HOT, 4 * KIB).depth(depth).runs_ms(200, 800);
    let row = |key, title, client, mode, measures: &[Measure]| {
        Row::new(key, title, Medium::Memory, Job::of(client, mode), measures)
            .warmed_up(Ops::Reads, HOT)
            .limit(LimitKind::Copy)
    };
    const LATENCY: &[Measure] = &[MedianUs, P99Us, P999Us];
    let writes = Client::new(Ops::Writes, Pattern::Random, ABSORBED, 4 * KIB).depth(32).runs_ms(200, 800);
    let stream = Client::new(Ops::Reads, SEQUENTIAL, HOT, 128 * KIB).depth(8).runs_ms(200, 800);
    vec![
        row(
            "read-poll",
            "4 KiB random read, cached, queue depth 32, polling",
            reads(32),
            Polling,
            &[Iops, CpuUs, P99Us, P999Us],
        )
        .target(0, 0.9, Limit)
        .target(0, 4.0, Qemu)
        .target(0, 3.0, cloud_hypervisor)
        .target(1, 1.2, Limit)
        .target(2, 1.0, Peers)
        .target(3, 1.0, Peers)
        .target(0, 0.95, Volatile),
        row(
            "read-call",
            "4 KiB random read, cached, queue depth 32, interrupts",
            reads(32),
            Interrupt,
            &[Iops, P99Us, P999Us],
        )
        .target(0, 0.9, Limit)
        .target(0, 4.0, Qemu)
        .target(0, 2.0, cloud_hypervisor)
        .target(1, 1.0, Peers)
        .target(2, 1.0, Peers),
        row("latency-poll", "4 KiB random read, cached, queue depth 1, polling", reads(1), Polling, LATENCY)
            .target(0, 1.5, Limit)
            .target(1, 1.0, Peers)
            .target(2, 1.0, Peers),
        row("latency-call", "4 KiB random read, cached, queue depth 1, interrupts", reads(1), Interrupt, LATENCY)
            .target(0, 1.0, Peers)
            .target(1, 1.0, Peers)
            .target(2, 1.0, Peers),
        row(
            "write-absorbed",
            "4 KiB random write, absorbed, queue depth 32, polling",
            writes,
            Polling,
            &[Iops, P99Us, P999Us],
        )
        .with("over 4 MiB, so that write-back need not start")
        .warmed_up(Ops::Writes, ABSORBED)
        .target(0, 0.8, Limit)
        .target(0, 4.0, Qemu)
        .target(0, 3.2, cloud_hypervisor)
        .target(0, 0.95, Volatile)
        .target(1, 1.0, Peers)
        .target(2, 1.0, Peers),
        row(
            "stream-cached",
            "128 KiB sequential read, cached, queue depth 8, polling",
            stream,
            Polling,
            &[MibPerSecond],
        )
        .target(0, 0.9, Limit)
        .target(0, 2.2, Peers),
    ]
}

/// The data is read from or written to a fast disk.
fn cold() -> Vec<Row> {
    use Measure::{CpuUs, Iops, MibPerSecond};
    let stream = |key, title, streams, block_bytes, depth, bytes, target| {
        let pattern = Pattern::Sequential { streams };
        let client = Client::new(Ops::Reads, pattern, ALL, block_bytes).depth(depth);
        let job = Job::of(client.bytes_max(bytes).runs_ms(0, 2000), CompletionMode::Interrupt);
        Row::new(key, title, Medium::Disk, job, &[MibPerSecond, CpuUs])
            .limit(LimitKind::Cached(HOT))
            .limit(LimitKind::Device(device_job(Ops::Reads, GIB)))
            .target(0, target, Against::Limit)
            .target(0, 1.5, Against::Peers)
    };
    let random = Client::new(Ops::Reads, Pattern::Random, ALL, 4 * KIB).depth(32).runs_ms(200, 800);
    let random = Job::of(random, CompletionMode::Interrupt);
    let write = Client::new(Ops::Writes, SEQUENTIAL, ALL, 128 * KIB).depth(8).bytes_max(GIB).runs_ms(0, 30_000);
    let write = Job { ends_with_flush: true, ..Job::of(write, CompletionMode::Interrupt) };
    let (small, large) = (4 * KIB, 128 * KIB);
    vec![
        stream("cold-4k-1", "4 KiB sequential read, cold, queue depth 1", 1, small, 1, 256 * MIB, 0.9),
        stream("cold-128k-1", "128 KiB sequential read, cold, queue depth 1", 1, large, 1, GIB, 0.9),
        stream("cold-128k-8", "128 KiB sequential read, cold, queue depth 8", 1, large, 8, GIB, 0.9),
        // A lower target than the others: 16 windows share the budget of readahead.
        stream("cold-streams", "16 sequential streams of 128 KiB reads, cold", 16, large, 16, GIB, 0.85)
            .with("interleaved in one queue, queue depth 16"),
        Row::new(
            "cold-random",
            "4 KiB random read, cold, queue depth 32",
            Medium::Disk,
            random.clone(),
            &[Iops, CpuUs],
        )
        .limit(LimitKind::Device(random))
        .target(0, 0.95, Against::Limit),
        Row::new("stream-write", "128 KiB sequential write, then FLUSH", Medium::Disk, write, &[MibPerSecond, CpuUs])
            .with("1 GiB, queue depth 8")
            .limit(LimitKind::Device(device_job(Ops::Writes, GIB)))
            .target(0, 0.95, Against::Limit),
    ]
}

/// The device's highest throughput: large requests at a high queue depth.
fn device_job(ops: Ops, bytes: u64) -> Job {
    let client = Client::new(ops, SEQUENTIAL, ALL, 1 << 20).depth(32).bytes_max(bytes).runs_ms(0, 30_000);
    Job { ends_with_flush: ops == Ops::Writes, ..Job::of(client, CompletionMode::Interrupt) }
}

/// FLUSHes of a slow disk, beside random writes of this size as fast as they complete, from the start of the daemon on.
fn slow_flushes(key: &'static str, conditions: &'static str, medium: Medium, block_bytes: usize) -> Row {
    let writes = Client::new(Ops::Writes, Pattern::Random, 0..GIB, block_bytes).depth(8).runs_ms(0, 8000);
    let flushes = Client::new(Ops::Flushes, Pattern::Random, 0..GIB, 4 * KIB).per_second(2.0).runs_ms(0, 8000);
    let job = Job { clients: vec![writes, flushes], mode: CompletionMode::Interrupt, ends_with_flush: false };
    Row::new(key, "FLUSH of a slow disk under random writes", medium, job, &[Measure::FlushP99Ms])
        .with(conditions)
        .target(0, 2.0 * FLUSH_TARGET_MS, Against::Constant)
}

/// The disk is throttled: these rows measure how much of its slowness the cache hides.
fn throttled() -> Vec<Row> {
    use Against::{Constant, Peers};
    use Measure::{FlushP99Ms, MedianUs, P99OverUnloaded, P99Us, Seconds, WriteKib};
    let disk = |mib: u64, operations| Medium::SlowDisk(Rate { bytes: mib * MIB, operations });
    let over = Client::new(Ops::Writes, Pattern::Random, ALL, 4 * KIB).depth(32).bytes_max(GIB).runs_ms(0, 60_000);
    let over = Job { ends_with_flush: true, ..Job::of(over, CompletionMode::Interrupt) };
    let zipf = Client::new(Ops::Mixed { write_percent: 30 }, Pattern::Zipf { theta: 0.99 }, 0..GIB, 8 * KIB);
    let zipf = zipf.depth(4).flush_after_writes(32).runs_ms(1000, 2000);
    // Twice the write speed of the disk.
    let overload = Client::new(Ops::Writes, Pattern::Random, 0..GIB, 64 * KIB).depth(8).runs_ms(1000, 4000);
    let flushes = Client::new(Ops::Flushes, Pattern::Random, 0..GIB, 4 * KIB).per_second(1.0).runs_ms(1000, 4000);
    let overload = vec![overload.per_second((200 * MIB / (64 * KIB as u64)) as f64), flushes];
    let reader = Client::new(Ops::Reads, Pattern::Random, HOT, 4 * KIB).runs_ms(300, 1200);
    let writer = Client::new(Ops::Writes, Pattern::Random, GIB..IMAGE_BYTES, 64 * KIB).depth(4).runs_ms(300, 1200);
    let job = |clients| Job { clients, mode: CompletionMode::Interrupt, ends_with_flush: false };
    let reads_beside = Row::new(
        "reads-beside",
        "4 KiB cached read during full-speed write-back",
        disk(200, 50_000),
        job(vec![reader, writer]),
        &[P99OverUnloaded, P99Us],
    );
    vec![
        Row::new("write-over", "4 KiB random write, then FLUSH", disk(500, 60_000), over, &[Seconds, WriteKib])
            .with("1 GiB of writes over 4 GiB, queue depth 32; disk limited to 500 MiB/s and 60 000 operations/s")
            .target(0, 0.6, Peers),
        Row::new(
            "zipf-mix",
            "8 KiB mixed I/O with FLUSHes, Zipf, 30 % writes",
            disk(200, 20_000),
            Job::of(zipf, CompletionMode::Interrupt),
            &[MedianUs, P99Us],
        )
        .with(
            "exponent 0.99, region 4 times the cache, a FLUSH every 32 writes, queue depth 4; disk limited to \
             200 MiB/s and 20 000 operations/s",
        )
        .target(0, 1.0, Peers)
        .target(1, 1.0, Peers),
        Row::new(
            "flush-overload",
            "FLUSH under writes at twice the disk's speed",
            disk(100, 50_000),
            job(overload),
            &[FlushP99Ms],
        )
        .with(
            "a FLUSH each second, beside 64 KiB random writes at 200 MiB/s; disk limited to 100 MiB/s and 50 000 \
             operations/s",
        )
        .target(0, 1.5 * FLUSH_TARGET_MS, Constant),
        slow_flushes("flush-20m", "20 MiB/s", disk(20, 50_000), 64 * KIB),
        slow_flushes("flush-5m", "5 MiB/s", disk(5, 50_000), 64 * KIB),
        slow_flushes("flush-200ops", "200 operations/s", disk(200, 200), 4 * KIB),
        Row { unloaded: true, ..reads_beside }
            .with(
                "random, queue depth 1, beside 64 KiB random writes at queue depth 4; disk limited to 200 MiB/s and \
                 50 000 operations/s",
            )
            .warmed_up(Ops::Reads, HOT)
            .target(0, 1.3, Constant),
    ]
}
