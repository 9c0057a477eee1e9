//! The table: what is measured, on what, against whom, and what is to be reached.

use crate::job::{Actor, Does, Job, Outcome, Pattern, Wait};
use crate::medium::Medium;
use crate::throttle::Rate;

const KIB: usize = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The whole image. Sixteen times genblk's default cache.
pub const IMAGE_BYTES: u64 = 4 * GIB;
/// What cached rows use: half of genblk's default cache, and far more than a processor's own.
const HOT: std::ops::Range<u64> = 0..128 * MIB;
/// What absorbed writes use: a quarter of the smallest dirty limit, so that write-back has no need to begin.
const ABSORBED: std::ops::Range<u64> = 0..4 * MIB;
const ALL: std::ops::Range<u64> = 0..IMAGE_BYTES;
/// genblk's default `flush_target_ms`.
const FLUSH_TARGET_MS: f64 = 250.0;

const SEQUENTIAL: Pattern = Pattern::Sequential { streams: 1 };

/// A number of an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    Iops,
    MibPerSecond,
    MedianUs,
    P99Us,
    FlushP99Ms,
    Seconds,
    /// The server's processor time for a request.
    CpuUs,
    /// Mean size of the writes that reached the device.
    WriteKib,
    /// The 99th percentile of the first actor's reads, over the same with that actor alone.
    P99OverIdle,
}

impl Measure {
    pub fn higher_is_better(self) -> bool {
        matches!(self, Self::Iops | Self::MibPerSecond | Self::WriteKib)
    }

    pub fn unit(self) -> &'static str {
        match self {
            Self::Iops => "requests/s",
            Self::MibPerSecond => "MiB/s",
            Self::MedianUs => "p50, us",
            Self::P99Us => "p99, us",
            Self::FlushP99Ms => "p99 of FLUSH, ms",
            Self::Seconds => "s",
            Self::CpuUs => "CPU us/request",
            Self::WriteKib => "KiB/device write",
            Self::P99OverIdle => "p99, x idle",
        }
    }

    /// The number; `idle` is the outcome with the first actor alone, where the row asks for it.
    pub fn of(self, outcome: &Outcome, idle: Option<&Outcome>) -> f64 {
        let first = &outcome.tallies[0];
        let seconds = first.elapsed.as_secs_f64();
        let us =
            |outcome: &Outcome, quantile: f64| outcome.tallies[0].all().value_at_quantile(quantile) as f64 / 1000.0;
        match self {
            Self::Iops => first.counted() as f64 / seconds,
            Self::MibPerSecond => first.bytes as f64 / MIB as f64 / seconds,
            Self::MedianUs => us(outcome, 0.5),
            Self::P99Us => us(outcome, 0.99),
            Self::FlushP99Ms => {
                let mut flushes = first.flushes.clone();
                for tally in &outcome.tallies[1..] {
                    flushes.add(&tally.flushes).expect("histograms that resize hold everything");
                }
                flushes.value_at_quantile(0.99) as f64 / 1e6
            }
            Self::Seconds => seconds,
            Self::CpuUs => {
                let requests: u64 = outcome.tallies.iter().map(|tally| tally.requests).sum();
                outcome.server_cpu_us / requests as f64
            }
            Self::WriteKib => {
                let (operations, bytes) = outcome.device_writes;
                bytes as f64 / 1024.0 / operations as f64
            }
            Self::P99OverIdle => us(outcome, 0.99) / us(idle.expect("the row asks for it"), 0.99),
        }
    }
}

/// What genblk is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// The lowest of the row's bounds.
    Limit,
    /// The best of the peers.
    Peers,
    /// The best of qemu-storage-daemon's exports.
    Qemu,
    /// The peer whose name begins so, if it was given.
    Named(&'static str),
    /// genblk with a cache that does not outlive it: what the ledger costs.
    Volatile,
    /// No other: the number itself.
    Itself,
}

/// What is to be reached: at least `factor` times the other's number where higher is better, else at most that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Place in the row's measures.
    pub measure: usize,
    pub factor: f64,
    pub against: Against,
}

/// What bounds a row.
#[derive(Clone, Debug)]
pub enum Bound {
    /// The bare server.
    Copy,
    /// io_uring with O_DIRECT on the device.
    Device(Job),
    /// genblk itself, with all that is read in its cache already: the part of the image that is read instead.
    Cached(std::ops::Range<u64>),
}

/// A line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: &'static str,
    pub title: &'static str,
    pub medium: Medium,
    /// Run before, on a connection of its own.
    pub warm: Option<Job>,
    pub job: Job,
    /// Whether the first actor is measured alone before.
    pub idle: bool,
    pub measures: Vec<Measure>,
    pub bounds: Vec<Bound>,
    pub targets: Vec<Target>,
}

impl Row {
    fn new(name: &'static str, title: &'static str, medium: Medium, job: Job, measures: &[Measure]) -> Self {
        let measures = measures.to_vec();
        let (warm, idle, bounds, targets) = (None, false, Vec::new(), Vec::new());
        Self { name, title, medium, warm, job, idle, measures, bounds, targets }
    }

    /// The end of what the row uses of the image.
    pub fn reach(&self) -> u64 {
        let bounds =
            self.bounds.iter().filter_map(|bound| if let Bound::Device(job) = bound { Some(job) } else { None });
        let jobs = self.warm.iter().chain([&self.job]).chain(bounds);
        jobs.flat_map(|job| &job.actors).map(|actor| actor.region.end).max().unwrap_or(0)
    }

    /// The same in the first `bytes` of the image.
    pub fn within(mut self, bytes: u64) -> Self {
        for actor in self.warm.iter_mut().chain([&mut self.job]).flat_map(|job| &mut job.actors) {
            actor.region.end = actor.region.end.min(bytes);
        }
        self
    }

    fn warmed(self, does: Does, region: std::ops::Range<u64>) -> Self {
        Self { warm: Some(warming(does, region)), ..self }
    }

    fn bound(mut self, bound: Bound) -> Self {
        self.bounds.push(bound);
        self
    }

    fn target(mut self, measure: usize, factor: f64, against: Against) -> Self {
        self.targets.push(Target { measure, factor, against });
        self
    }
}

/// One pass over a region.
pub fn warming(does: Does, region: std::ops::Range<u64>) -> Job {
    let bytes = region.end - region.start;
    let actor = Actor::new(does, SEQUENTIAL, region, 128 * KIB).depth(8).bytes_max(bytes).lasts_ms(0, 60_000);
    Job::of(actor, Wait::Interrupt)
}

/// Every row, in the order of the report.
pub fn all() -> Vec<Row> {
    let mut rows = cached();
    rows.extend(cold());
    rows.extend(slow());
    rows
}

/// Everything is in memory: what the path of a request costs.
fn cached() -> Vec<Row> {
    use Against::{Limit, Named, Peers, Qemu, Volatile};
    use Measure::{CpuUs, Iops, MedianUs, MibPerSecond};
    let hypervisor = Named("cloud-hypervisor");
    let reads = |depth| Actor::new(Does::Reads, Pattern::Random, HOT, 4 * KIB).depth(depth).lasts_ms(200, 800);
    let row = |name, title, actor, wait, measures: &[Measure]| {
        Row::new(name, title, Medium::Memory, Job::of(actor, wait), measures)
            .warmed(Does::Reads, HOT)
            .bound(Bound::Copy)
    };
    let writes = Actor::new(Does::Writes, Pattern::Random, ABSORBED, 4 * KIB).depth(32).lasts_ms(200, 800);
    let stream = Actor::new(Does::Reads, SEQUENTIAL, HOT, 128 * KIB).depth(8).lasts_ms(200, 800);
    vec![
        row("read-poll", "4 KiB random read, cached, depth 32, polling", reads(32), Wait::Poll, &[Iops, CpuUs])
            .target(0, 0.9, Limit)
            .target(0, 4.0, Qemu)
            .target(0, 3.0, hypervisor)
            .target(1, 1.2, Limit)
            .target(0, 0.95, Volatile),
        row("read-call", "4 KiB random read, cached, depth 32, interrupts", reads(32), Wait::Interrupt, &[Iops])
            .target(0, 0.9, Limit)
            .target(0, 4.0, Qemu)
            .target(0, 2.0, hypervisor),
        row("latency-poll", "4 KiB random read, cached, depth 1, polling", reads(1), Wait::Poll, &[MedianUs])
            .target(0, 1.5, Limit),
        row("latency-call", "4 KiB random read, cached, depth 1, interrupts", reads(1), Wait::Interrupt, &[MedianUs])
            .target(0, 1.0, Peers),
        row("write-absorbed", "4 KiB random write, absorbed, depth 32, polling", writes, Wait::Poll, &[Iops])
            .warmed(Does::Writes, ABSORBED)
            .target(0, 0.8, Limit)
            .target(0, 4.0, Qemu)
            .target(0, 3.2, hypervisor)
            .target(0, 0.95, Volatile),
        row("stream-cached", "128 KiB sequential read, cached, depth 8, polling", stream, Wait::Poll, &[MibPerSecond])
            .target(0, 0.9, Limit)
            .target(0, 2.2, Peers),
    ]
}

/// The image has to be read, from a device that is fast.
fn cold() -> Vec<Row> {
    use Measure::{CpuUs, Iops, MibPerSecond};
    let stream = |name, title, streams, block_bytes, depth, bytes, target| {
        let pattern = Pattern::Sequential { streams };
        let actor = Actor::new(Does::Reads, pattern, ALL, block_bytes).depth(depth);
        let job = Job::of(actor.bytes_max(bytes).lasts_ms(0, 2000), Wait::Interrupt);
        Row::new(name, title, Medium::Disk, job, &[MibPerSecond, CpuUs])
            .bound(Bound::Cached(HOT))
            .bound(Bound::Device(device_job(Does::Reads, GIB)))
            .target(0, target, Against::Limit)
            .target(0, 1.5, Against::Peers)
    };
    let random = Actor::new(Does::Reads, Pattern::Random, ALL, 4 * KIB).depth(32).lasts_ms(200, 800);
    let random = Job::of(random, Wait::Interrupt);
    let write = Actor::new(Does::Writes, SEQUENTIAL, ALL, 128 * KIB).depth(8).bytes_max(GIB).lasts_ms(0, 30_000);
    let write = Job { ends_with_flush: true, ..Job::of(write, Wait::Interrupt) };
    let (small, large) = (4 * KIB, 128 * KIB);
    vec![
        stream("cold-4k-1", "4 KiB sequential read, cold, depth 1", 1, small, 1, 256 * MIB, 0.9),
        stream("cold-128k-1", "128 KiB sequential read, cold, depth 1", 1, large, 1, GIB, 0.9),
        stream("cold-128k-8", "128 KiB sequential read, cold, depth 8", 1, large, 8, GIB, 0.9),
        // Less than of the others is asked for: 16 windows share the readahead's budget.
        stream("cold-streams", "16 interleaved sequential readers of 128 KiB, cold", 16, large, 16, GIB, 0.85),
        Row::new("cold-random", "4 KiB random read, cold, depth 32", Medium::Disk, random.clone(), &[Iops, CpuUs])
            .bound(Bound::Device(random))
            .target(0, 0.95, Against::Limit),
        Row::new(
            "stream-write",
            "128 KiB sequential write, depth 8, then FLUSH",
            Medium::Disk,
            write,
            &[MibPerSecond, CpuUs],
        )
        .bound(Bound::Device(device_job(Does::Writes, GIB)))
        .target(0, 0.95, Against::Limit),
    ]
}

/// What the device does at most: large requests, many at a time.
fn device_job(does: Does, bytes: u64) -> Job {
    let actor = Actor::new(does, SEQUENTIAL, ALL, 1 << 20).depth(32).bytes_max(bytes).lasts_ms(0, 30_000);
    Job { ends_with_flush: does == Does::Writes, ..Job::of(actor, Wait::Interrupt) }
}

/// The device is slow: what the cache keeps from it.
fn slow() -> Vec<Row> {
    use Against::{Itself, Peers};
    use Measure::{FlushP99Ms, MedianUs, P99OverIdle, P99Us, Seconds, WriteKib};
    let disk = |mib: u64, operations| Medium::SlowDisk(Rate { bytes: mib * MIB, operations });
    let over = Actor::new(Does::Writes, Pattern::Random, ALL, 4 * KIB).depth(32).bytes_max(GIB).lasts_ms(0, 60_000);
    let over = Job { ends_with_flush: true, ..Job::of(over, Wait::Interrupt) };
    let zipf = Actor::new(Does::Mixed { write_percent: 30 }, Pattern::Zipf { theta: 0.99 }, 0..GIB, 8 * KIB);
    let zipf = zipf.depth(4).flush_after_writes(32).lasts_ms(1000, 2000);
    // Twice what the disk writes.
    let overload = Actor::new(Does::Writes, Pattern::Random, 0..GIB, 64 * KIB).depth(8).lasts_ms(1000, 4000);
    let flushes = Actor::new(Does::Flushes, Pattern::Random, 0..GIB, 4 * KIB).per_second(1.0).lasts_ms(1000, 4000);
    let overload = vec![overload.per_second((200 * MIB / (64 * KIB as u64)) as f64), flushes];
    let reader = Actor::new(Does::Reads, Pattern::Random, HOT, 4 * KIB).lasts_ms(300, 1200);
    let writer = Actor::new(Does::Writes, Pattern::Random, GIB..IMAGE_BYTES, 64 * KIB).depth(4).lasts_ms(300, 1200);
    let job = |actors| Job { actors, wait: Wait::Interrupt, ends_with_flush: false };
    let beside = Row::new(
        "reads-beside",
        "4 KiB cached read, depth 1, while write-back runs at full speed",
        disk(200, 50_000),
        job(vec![reader, writer]),
        &[P99OverIdle, P99Us],
    );
    vec![
        Row::new(
            "write-over",
            "4 KiB random write of 1 GiB over 4 GiB, depth 32, then FLUSH",
            disk(500, 60_000),
            over,
            &[Seconds, WriteKib],
        )
        .target(0, 0.6, Peers),
        Row::new(
            "zipf-mix",
            "8 KiB zipf 0.99, 30 % writes, over 4 x the cache, FLUSH every 32 writes, depth 4",
            disk(200, 20_000),
            Job::of(zipf, Wait::Interrupt),
            &[MedianUs, P99Us],
        )
        .target(0, 1.0, Peers)
        .target(1, 1.0, Peers),
        Row::new(
            "flush-overload",
            "FLUSH every second under twice the disk's write speed",
            disk(100, 50_000),
            job(overload),
            &[FlushP99Ms],
        )
        .target(0, 1.5 * FLUSH_TARGET_MS, Itself),
        Row { idle: true, ..beside }.warmed(Does::Reads, HOT).target(0, 1.3, Itself),
    ]
}
