//! How the cost grows: one thing at a time is made larger, and the rest stays.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::job::{Actor, Does, Job, Pattern, Wait};
use crate::medium::{Media, Medium, MemoryFile};
use crate::report::{median, show, table};
use crate::rows::warming;
use crate::servers::{Contestant, Server};
use crate::session;

const KIB: usize = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const PAGE_BYTES: u64 = 4096;

/// How often each point is measured.
const ROUNDS: usize = 3;
/// What a hit is measured on, whatever the sizes are: more than a processor's own caches hold.
const HOT_BYTES: u64 = 32 * MIB;
/// How long a daemon is watched that has nothing to do.
const IDLE: Duration = Duration::from_secs(10);

/// One thing that grows.
struct Part {
    name: &'static str,
    title: &'static str,
    points: Vec<Point>,
}

/// One size of it.
struct Point {
    label: String,
    who: Contestant,
    /// Size of each device's image, and how much of it is data.
    images: Vec<(u64, u64)>,
    on_disk: bool,
    cache_bytes: u64,
    warm: Option<Job>,
    /// What is measured, one after the other, each on all devices.
    jobs: Vec<(&'static str, Job)>,
}

impl Point {
    /// genblk with these lines in its device's table, over one image with as much data as half the cache, but no more
    /// than 2 GiB: cache and image share the machine's memory.
    fn new(label: impl Into<String>, device: &str, cache_bytes: u64) -> Self {
        let cache = format!("size = {cache_bytes}");
        let who = Contestant::genblk_with("genblk", device, &cache);
        let image_bytes = (cache_bytes / 2).min(2 * GIB);
        let images = vec![(image_bytes, image_bytes)];
        Self { label: label.into(), who, images, on_disk: false, cache_bytes, warm: None, jobs: Vec::new() }
    }

    fn warm(self, does: Does, region: Range<u64>) -> Self {
        Self { warm: Some(warming(does, region)), ..self }
    }

    /// Pages of all caches. Their tables and frames are made at the start, however many are in use.
    fn cache_pages(&self) -> f64 {
        (self.cache_bytes / PAGE_BYTES) as f64 * self.images.len() as f64
    }

    fn job(mut self, what: &'static str, job: Job) -> Self {
        self.jobs.push((what, job));
        self
    }
}

/// Random reads of what is cached: so many clients, `depth` in flight in all.
fn hits(region: Range<u64>, clients: usize, depth: usize) -> Job {
    let depth = (depth / clients).max(1);
    let actor = Actor::new(Does::Reads, Pattern::Random, region, 4 * KIB).depth(depth).lasts_ms(200, 800);
    Job { actors: vec![actor; clients], wait: Wait::Interrupt, ends_with_flush: false }
}

fn parts() -> Vec<Part> {
    let part = |name, title, points| Part { name, title, points };
    vec![
        part("cache", "Cache size; half of it is filled (2 GiB at most) and read, everything is a hit", cache_sizes()),
        part("image", "Image size, sparse; what is read lies at its end, and is cached", image_sizes()),
        part("devices", "Devices in one daemon, all at work, 32 requests in flight in all", devices()),
        part("queues", "Queues of one device, each with a client, 32 requests in flight in all", queues()),
        part("streams", "Sequential readers, cold, 128 KiB each, from a fast disk", streams()),
        part(
            "allocate",
            "Space for holes, reserved before a write completes or when it is written back",
            allocations(),
        ),
    ]
}

fn cache_sizes() -> Vec<Point> {
    let sizes = [(64 * MIB, "64 MiB"), (256 * MIB, "256 MiB"), (GIB, "1 GiB"), (4 * GIB, "4 GiB"), (8 * GIB, "8 GiB")];
    let point = |(bytes, label): (u64, &str)| {
        let point = Point::new(label, "", bytes);
        let all = 0..point.images[0].0;
        point
            .warm(Does::Reads, all.clone())
            .job("a hit within 32 MiB", hits(0..HOT_BYTES, 1, 32))
            .job("a hit anywhere", hits(all, 1, 32))
    };
    sizes.into_iter().map(point).collect()
}

fn image_sizes() -> Vec<Point> {
    let sizes = [(GIB, "1 GiB"), (64 * GIB, "64 GiB"), (TIB, "1 TiB"), (16 * TIB, "16 TiB")];
    let point = |(bytes, label): (u64, &str)| {
        let end = bytes - HOT_BYTES..bytes;
        let mut point = Point::new(label, "", 256 * MIB).warm(Does::Writes, end.clone()).job("a hit", hits(end, 1, 32));
        point.images = vec![(bytes, 0)];
        point
    };
    sizes.into_iter().map(point).collect()
}

fn devices() -> Vec<Point> {
    let point = |count: usize| {
        let mut point = Point::new(count.to_string(), "", 64 * MIB)
            .warm(Does::Reads, 0..HOT_BYTES)
            .job("a hit", hits(0..HOT_BYTES, count, 32));
        point.images = vec![(HOT_BYTES, HOT_BYTES); count];
        point
    };
    [1, 2, 4, 8, 16].map(point).into()
}

fn queues() -> Vec<Point> {
    let point = |(workers, queues): (usize, usize)| {
        let label = format!("{queues} with {workers} worker{}", if workers == 1 { "" } else { "s" });
        Point::new(label, &format!("workers = {workers}"), 256 * MIB)
            .warm(Does::Reads, 0..HOT_BYTES)
            .job("a hit", hits(0..HOT_BYTES, queues, 32))
    };
    [(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8)].map(point).into()
}

fn streams() -> Vec<Point> {
    let point = |streams: usize| {
        let pattern = Pattern::Sequential { streams: streams as u64 };
        let actor = Actor::new(Does::Reads, pattern, 0..2 * GIB, 128 * KIB).depth(streams);
        let job = Job::of(actor.bytes_max(GIB).lasts_ms(0, 3000), Wait::Interrupt);
        let mut point = Point::new(streams.to_string(), "", 256 * MIB).job("a read", job);
        point.images = vec![(2 * GIB, 2 * GIB)];
        point.on_disk = true;
        point
    };
    [1, 4, 16, 64].map(point).into()
}

/// Writes into holes, more than the cache holds, and a FLUSH.
fn allocations() -> Vec<Point> {
    let point = |(when, pattern, label): (&str, Pattern, &'static str)| {
        let writes = Actor::new(Does::Writes, pattern, 0..GIB, 4 * KIB).depth(32);
        let job = Job::of(writes.bytes_max(256 * MIB).lasts_ms(0, 30_000), Wait::Interrupt);
        let mut point = Point::new(format!("allocate = \"{when}\""), "", 64 * MIB);
        point.who = Contestant::genblk_with("genblk", "", &format!("size = \"64M\"\nallocate = \"{when}\""));
        point.images = vec![(GIB, 0)];
        point.job(label, Job { ends_with_flush: true, ..job })
    };
    let (in_order, anywhere) = (Pattern::Sequential { streams: 1 }, Pattern::Random);
    [
        ("on-write", in_order, "a sequential write"),
        ("on-writeback", in_order, "a sequential write"),
        ("on-write", anywhere, "a random write"),
        ("on-writeback", anywhere, "a random write"),
    ]
    .map(point)
    .into()
}

/// What a point's round gave.
struct Numbers {
    start_ms: f64,
    /// Memory of the daemon's own: the cache's tables and the process. Frames and guests' memory are shared memory.
    anonymous_kib: f64,
    /// For each job: requests a second, MiB a second, processor time for a request.
    jobs: Vec<(f64, f64, f64)>,
}

/// Measures the parts of these names, all without any; the text of the report.
///
/// # Errors
/// What kept it from being measured.
pub fn run(names: &[String]) -> Result<String, String> {
    let mut text = String::new();
    for part in parts().iter().filter(|part| names.is_empty() || names.iter().any(|name| name == part.name)) {
        text += &format!("## {}\n\n{}\n", part.title, measure(part)?);
    }
    if names.is_empty() || names.iter().any(|name| name == "idle") {
        text += &format!("## Nothing to do\n\n{}", idle()?);
    }
    Ok(text)
}

fn measure(part: &Part) -> Result<String, String> {
    let mut rounds: Vec<Vec<Numbers>> = part.points.iter().map(|_| Vec::new()).collect();
    for _ in 0..ROUNDS {
        for (point, numbers) in part.points.iter().zip(&mut rounds) {
            numbers.push(sample(point)?);
        }
    }
    let mut lines = Vec::new();
    for (point, rounds) in part.points.iter().zip(&rounds) {
        let of = |pick: &dyn Fn(&Numbers) -> f64| show(median(&rounds.iter().map(pick).collect::<Vec<_>>()));
        for (at, (what, _)) in point.jobs.iter().enumerate() {
            lines.push(vec![
                point.label.clone(),
                (*what).to_string(),
                of(&|numbers| numbers.jobs[at].0),
                of(&|numbers| numbers.jobs[at].1),
                of(&|numbers| numbers.jobs[at].2),
                of(&|numbers| numbers.start_ms),
                of(&|numbers| numbers.anonymous_kib / 1024.0),
                of(&|numbers| numbers.anonymous_kib * 1024.0 / point.cache_pages()),
            ]);
        }
    }
    eprintln!("{}: done", part.name);
    let head = [
        "",
        "what",
        "requests/s",
        "MiB/s",
        "CPU us/request",
        "start-up ms",
        "own memory MiB",
        "bytes per page of cache",
    ];
    Ok(table(&head.map(ToString::to_string), &lines))
}

fn sample(point: &Point) -> Result<Numbers, String> {
    let failed = |e: std::io::Error| format!("no image: {e}");
    let (first_bytes, first_data) = point.images[0];
    // The first image may be served from a disk; the others only lie beside it.
    let mut media = Media::new(first_bytes).map_err(failed)?;
    media.fill(first_data).map_err(failed)?;
    let medium = media.open(if point.on_disk { Medium::Disk } else { Medium::Memory }).map_err(failed)?;
    let mut others = Vec::new();
    for (bytes, data) in &point.images[1..] {
        let mut file = MemoryFile::new(*bytes).map_err(failed)?;
        file.fill(*data).map_err(failed)?;
        others.push(file);
    }
    let images: Vec<_> = [medium.path.clone()].into_iter().chain(others.iter().map(MemoryFile::path)).collect();
    let begin = Instant::now();
    let server = Server::start(&point.who, media.folder(), &images, 1)?;
    let start_ms = begin.elapsed().as_secs_f64() * 1000.0;
    server.settle();
    let devices: Vec<usize> = (0..images.len()).collect();
    for device in &devices {
        if let Some(warm) = &point.warm {
            session::run(&server, &[*device], warm)?;
        }
    }
    let mut jobs = Vec::new();
    for (_, job) in &point.jobs {
        jobs.push(rates(&session::run(&server, &devices, job)?));
    }
    let anonymous_kib = server.status("RssAnon") as f64;
    Ok(Numbers { start_ms, anonymous_kib, jobs })
}

fn rates(outcome: &crate::job::Outcome) -> (f64, f64, f64) {
    let sum = |of: &dyn Fn(&crate::job::Tally) -> f64| outcome.tallies.iter().map(of).sum::<f64>();
    let requests = sum(&|tally| tally.counted() as f64 / tally.elapsed.as_secs_f64());
    let mib = sum(&|tally| tally.bytes as f64 / MIB as f64 / tally.elapsed.as_secs_f64());
    (requests, mib, outcome.server_cpu_us / sum(&|tally| tally.requests as f64))
}

/// A daemon without a front-end, and one whose front-end asks for nothing (any more).
fn idle() -> Result<String, String> {
    let mut media = Media::new(GIB).map_err(|e| format!("no image: {e}"))?;
    media.fill(HOT_BYTES).map_err(|e| format!("no image: {e}"))?;
    let medium = media.open(Medium::Memory).map_err(|e| format!("no image: {e}"))?;
    let server = Server::start(&Contestant::genblk(), media.folder(), std::slice::from_ref(&medium.path), 1)?;
    server.settle();
    let mut lines = vec![watch("no front-end", &server)];
    let job = hits(0..HOT_BYTES, 1, 1);
    let guest = session::connect(&server, 0, &job, 1)?;
    lines.push(watch("a front-end that asks for nothing", &server));
    drop(guest);
    session::run(&server, &[0], &warming(Does::Writes, 0..HOT_BYTES))?;
    let guest = session::connect(&server, 0, &job, 1)?;
    // What was written leaves the cache by age: that is work, and it ends.
    std::thread::sleep(IDLE);
    lines.push(watch("the same, 10 s after it has written 32 MiB", &server));
    drop(guest);
    let head = ["a daemon with", "CPU ms in 10 s", "times a thread went to sleep"].map(ToString::to_string);
    Ok(table(&head, &lines))
}

fn watch(what: &str, server: &Server) -> Vec<String> {
    std::thread::sleep(Duration::from_millis(200));
    let (cpu_us, sleeps) = (server.cpu_us(), server.sleeps());
    std::thread::sleep(IDLE);
    let cpu_ms = (server.cpu_us() - cpu_us) / 1000.0;
    vec![what.to_string(), format!("{cpu_ms:.0}"), (server.sleeps() - sleeps).to_string()]
}

/// Writes the report.
///
/// # Errors
/// The system's.
pub fn write(folder: &Path, machine: &str, text: &str) -> std::io::Result<()> {
    let head = format!(
        "# How genblk's cost grows\n\nWritten by `make bench-scale`; medians of {ROUNDS} rounds. One worker, interrupts, \
         4 KiB reads where nothing else is said.\n\n{machine}\n"
    );
    fs::write(folder.join("SCALE.md"), head + text)
}
