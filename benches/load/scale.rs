//! How the cost grows: each sweep increases one quantity and keeps the others.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::figures::median;
use crate::job::{Client, ClientStats, CompletionMode, Job, JobStats, Ops, Pattern};
use crate::medium::{Media, Medium, MemoryFile};
use crate::report::{bullets, show, table};
use crate::rows::warm_up;
use crate::servers::{Server, ServerSpec};
use crate::session;

const KIB: usize = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const PAGE_BYTES: u64 = 4096;

/// How often each point is measured; the report has the medians.
const ROUNDS: usize = 3;
/// The region of hits, whatever the sizes are: more than the CPU caches hold.
const HOT_BYTES: u64 = 32 * MIB;
/// How long an idle daemon is observed.
const IDLE: Duration = Duration::from_secs(10);

/// One quantity that grows.
struct Sweep {
    name: &'static str,
    title: &'static str,
    points: Vec<Point>,
}

/// One value of it.
struct Point {
    label: String,
    spec: ServerSpec,
    /// For each device: the size of its image, and how many bytes of it are data.
    images: Vec<(u64, u64)>,
    on_disk: bool,
    cache_bytes: u64,
    warm_up: Option<Job>,
    /// The jobs to measure, one after the other. Each runs on all devices.
    jobs: Vec<(&'static str, Job)>,
}

impl Point {
    /// genblk with these lines in the table of its device, over one image that is full of data and half as large as the
    /// cache. At most 2 GiB, because cache and image share the machine's memory.
    fn new(label: impl Into<String>, device: &str, cache_bytes: u64) -> Self {
        let cache = format!("size = {cache_bytes}");
        let spec = ServerSpec::genblk_with("genblk", device, &cache);
        let image_bytes = (cache_bytes / 2).min(2 * GIB);
        let images = vec![(image_bytes, image_bytes)];
        Self { label: label.into(), spec, images, on_disk: false, cache_bytes, warm_up: None, jobs: Vec::new() }
    }

    fn warmed_up(self, ops: Ops, region: Range<u64>) -> Self {
        Self { warm_up: Some(warm_up(ops, region)), ..self }
    }

    /// Pages of all caches. genblk allocates their tables at the start, however many are in use.
    fn cache_pages(&self) -> f64 {
        (self.cache_bytes / PAGE_BYTES) as f64 * self.images.len() as f64
    }

    fn job(mut self, what: &'static str, job: Job) -> Self {
        self.jobs.push((what, job));
        self
    }
}

/// Random reads of cached data by this many clients, with `depth` requests in flight in total.
fn hits(region: Range<u64>, clients: usize, depth: usize) -> Job {
    let depth = (depth / clients).max(1);
    let client = Client::new(Ops::Reads, Pattern::Random, region, 4 * KIB).depth(depth).runs_ms(200, 800);
    Job { clients: vec![client; clients], mode: CompletionMode::Interrupt, ends_with_flush: false }
}

fn sweeps() -> Vec<Sweep> {
    let sweep = |name, title, points| Sweep { name, title, points };
    vec![
        sweep("cache", "Cache size (hits only; the image is half as large as the cache, at most 2 GiB)", cache_sizes()),
        sweep("image", "Image size (sparse image; cached reads at its end)", image_sizes()),
        sweep("devices", "Devices in one daemon (all active; 32 requests in flight in total, or on each)", devices()),
        sweep("queues", "Queues of one device (a client for each; 32 requests in flight in total)", queues()),
        sweep("streams", "Sequential streams (cold 128 KiB reads from a fast disk)", streams()),
        sweep("allocate", "Allocation of holes, before a write completes or during write-back", allocations()),
        sweep("space", "Space that a sparse image takes for the data that is written", spaces()),
    ]
}

fn cache_sizes() -> Vec<Point> {
    let sizes = [(64 * MIB, "64 MiB"), (256 * MIB, "256 MiB"), (GIB, "1 GiB"), (4 * GIB, "4 GiB"), (8 * GIB, "8 GiB")];
    let point = |(bytes, label): (u64, &str)| {
        let point = Point::new(label, "", bytes);
        let all = 0..point.images[0].0;
        point
            .warmed_up(Ops::Reads, all.clone())
            .job("hit within 32 MiB", hits(0..HOT_BYTES, 1, 32))
            .job("hit anywhere", hits(all, 1, 32))
    };
    sizes.into_iter().map(point).collect()
}

fn image_sizes() -> Vec<Point> {
    let sizes = [(GIB, "1 GiB"), (64 * GIB, "64 GiB"), (TIB, "1 TiB"), (16 * TIB, "16 TiB")];
    let point = |(bytes, label): (u64, &str)| {
        let end = bytes - HOT_BYTES..bytes;
        let mut point =
            Point::new(label, "", 256 * MIB).warmed_up(Ops::Writes, end.clone()).job("hit", hits(end, 1, 32));
        point.images = vec![(bytes, 0)];
        point
    };
    sizes.into_iter().map(point).collect()
}

fn devices() -> Vec<Point> {
    let point = |count: usize| {
        let mut point = Point::new(count.to_string(), "", 64 * MIB)
            .warmed_up(Ops::Reads, 0..HOT_BYTES)
            .job("hit, 32 in flight in total", hits(0..HOT_BYTES, count, 32))
            .job("hit, 32 in flight on each", hits(0..HOT_BYTES, count, 32 * count));
        point.images = vec![(HOT_BYTES, HOT_BYTES); count];
        point
    };
    [1, 2, 4, 8, 16].map(point).into()
}

fn queues() -> Vec<Point> {
    let point = |(workers, queues): (usize, usize)| {
        let label = format!("{queues} with {workers} worker{}", if workers == 1 { "" } else { "s" });
        Point::new(label, &format!("workers = {workers}"), 256 * MIB)
            .warmed_up(Ops::Reads, 0..HOT_BYTES)
            .job("hit", hits(0..HOT_BYTES, queues, 32))
    };
    [(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8)].map(point).into()
}

fn streams() -> Vec<Point> {
    let point = |streams: usize| {
        let pattern = Pattern::Sequential { streams: streams as u64 };
        let client = Client::new(Ops::Reads, pattern, 0..2 * GIB, 128 * KIB).depth(streams);
        let job = Job::of(client.bytes_max(GIB).runs_ms(0, 3000), CompletionMode::Interrupt);
        let mut point = Point::new(streams.to_string(), "", 256 * MIB).job("read", job);
        point.images = vec![(2 * GIB, 2 * GIB)];
        point.on_disk = true;
        point
    };
    [1, 4, 16, 64, 100, 300].map(point).into()
}

/// Writes into holes, of more data than the cache holds, and a FLUSH.
fn allocations() -> Vec<Point> {
    let point = |(when, pattern, what): (&str, Pattern, &'static str)| {
        let writes = Client::new(Ops::Writes, pattern, 0..GIB, 4 * KIB).depth(32);
        let job = Job::of(writes.bytes_max(256 * MIB).runs_ms(0, 30_000), CompletionMode::Interrupt);
        let mut point = Point::new(format!("allocate = \"{when}\""), "", 64 * MIB);
        point.spec = ServerSpec::genblk_with("genblk", "", &format!("size = \"64M\"\nallocate = \"{when}\""));
        point.images = vec![(GIB, 0)];
        point.job(what, Job { ends_with_flush: true, ..job })
    };
    let (sequential, random) = (Pattern::Sequential { streams: 1 }, Pattern::Random);
    [
        ("on-write", sequential, "sequential write"),
        ("on-writeback", sequential, "sequential write"),
        ("on-write", random, "random write"),
        ("on-writeback", random, "random write"),
    ]
    .map(point)
    .into()
}

/// First writes into a sparse image of 100 GiB, and a FLUSH.
fn spaces() -> Vec<Point> {
    let point = |(pattern, what, bytes): (Pattern, &'static str, u64)| {
        let writes = Client::new(Ops::Writes, pattern, 0..100 * GIB, 4 * KIB).depth(32);
        let job = Job::of(writes.bytes_max(bytes).runs_ms(0, 30_000), CompletionMode::Interrupt);
        let mut point = Point::new(what, "", 64 * MIB);
        point.images = vec![(100 * GIB, 0)];
        point.job(what, Job { ends_with_flush: true, ..job })
    };
    let (sequential, random) = (Pattern::Sequential { streams: 1 }, Pattern::Random);
    [(random, "random write", 16 * MIB), (sequential, "sequential write", 256 * MIB)].map(point).into()
}

/// The result of one round of a point.
struct Numbers {
    /// The space of the first image over the data of its jobs.
    space: f64,
    start_ms: f64,
    /// Anonymous memory of the daemon: the tables of the cache, and the process itself. Frames and guest memory are
    /// shared memory.
    anonymous_kib: f64,
    jobs: Vec<Rates>,
}

/// The result of one job.
struct Rates {
    requests: f64,
    mib: f64,
    /// CPU time per request.
    cpu_us: f64,
    /// Requests per second of the slowest client over those of the fastest.
    fairness: f64,
}

/// Measures the sweeps with these names, or all without names. Returns the text of the report.
///
/// # Errors
/// A server or an image could not be set up.
pub fn run(names: &[String]) -> Result<String, String> {
    let mut text = String::new();
    let chosen = |name: &str| names.is_empty() || names.iter().any(|wanted| wanted == name);
    for sweep in sweeps().iter().filter(|sweep| chosen(sweep.name)) {
        text += &format!("## {}\n\n{}\n", sweep.title, measure(sweep)?);
    }
    if chosen("idle") {
        text += &format!("## Idle daemon\n\n{}", idle()?);
    }
    Ok(text)
}

fn measure(sweep: &Sweep) -> Result<String, String> {
    let mut rounds: Vec<Vec<Numbers>> = sweep.points.iter().map(|_| Vec::new()).collect();
    for _ in 0..ROUNDS {
        for (point, numbers) in sweep.points.iter().zip(&mut rounds) {
            numbers.push(sample(point)?);
        }
    }
    let mut lines = Vec::new();
    for (point, rounds) in sweep.points.iter().zip(&rounds) {
        let of = |pick: &dyn Fn(&Numbers) -> f64| show(median(&rounds.iter().map(pick).collect::<Vec<_>>()));
        for (at, (what, _)) in point.jobs.iter().enumerate() {
            lines.push(vec![
                point.label.clone(),
                (*what).to_string(),
                of(&|numbers| numbers.jobs[at].requests),
                of(&|numbers| numbers.jobs[at].mib),
                of(&|numbers| numbers.jobs[at].cpu_us),
                if point.jobs[at].1.clients.len() > 1 { of(&|numbers| numbers.jobs[at].fairness) } else { "-".into() },
                of(&|numbers| numbers.start_ms),
                of(&|numbers| numbers.anonymous_kib / 1024.0),
                of(&|numbers| numbers.anonymous_kib * 1024.0 / point.cache_pages()),
                // Of a full image, or of reads, it says nothing.
                if sweep.name == "space" { of(&|numbers| numbers.space) } else { "-".to_string() },
            ]);
        }
    }
    eprintln!("{}: done", sweep.name);
    let head = [
        sweep.name,
        "what",
        "requests/s",
        "MiB/s",
        "CPU us/request",
        "slowest/fastest",
        "start-up ms",
        "private MiB",
        "bytes/cache page",
        "space/data",
    ];
    Ok(table(&head.map(ToString::to_string), &lines))
}

fn sample(point: &Point) -> Result<Numbers, String> {
    let failed = |e: std::io::Error| format!("cannot create the image: {e}");
    let (first_bytes, first_data) = point.images[0];
    // Only the first image may be on a loop device.
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
    let server = Server::start(&point.spec, media.directory(), &images, 1)?;
    let start_ms = begin.elapsed().as_secs_f64() * 1000.0;
    server.wait_until_idle();
    let devices: Vec<usize> = (0..images.len()).collect();
    for device in &devices {
        if let Some(warm_up) = &point.warm_up {
            session::run(&server, &[*device], warm_up)?;
        }
    }
    let (mut jobs, mut bytes) = (Vec::new(), 0);
    for (_, job) in &point.jobs {
        let stats = session::run(&server, &devices, job)?;
        bytes += stats.clients.iter().map(|client| client.bytes).sum::<u64>();
        jobs.push(rates(&stats));
    }
    let anonymous_kib = server.anonymous_kib() as f64;
    let blocks = std::fs::metadata(&images[0]).map_err(failed)?.blocks();
    Ok(Numbers { space: (blocks * 512) as f64 / bytes as f64, start_ms, anonymous_kib, jobs })
}

fn rates(stats: &JobStats) -> Rates {
    let per_second = |client: &ClientStats| client.measured() as f64 / client.elapsed.as_secs_f64();
    let sum = |of: &dyn Fn(&ClientStats) -> f64| stats.clients.iter().map(of).sum::<f64>();
    let slowest = stats.clients.iter().map(per_second).fold(f64::INFINITY, f64::min);
    let fastest = stats.clients.iter().map(per_second).fold(0.0, f64::max);
    Rates {
        requests: sum(&per_second),
        mib: sum(&|client| client.bytes as f64 / MIB as f64 / client.elapsed.as_secs_f64()),
        cpu_us: stats.server_cpu_us / sum(&|client| client.requests as f64),
        fairness: slowest / fastest,
    }
}

/// A daemon without a front-end, and one whose front-end sends no requests.
fn idle() -> Result<String, String> {
    let mut media = Media::new(GIB).map_err(|e| format!("cannot create the image: {e}"))?;
    media.fill(HOT_BYTES).map_err(|e| format!("cannot create the image: {e}"))?;
    let medium = media.open(Medium::Memory).map_err(|e| format!("cannot create the image: {e}"))?;
    let server = Server::start(&ServerSpec::genblk(), media.directory(), std::slice::from_ref(&medium.path), 1)?;
    server.wait_until_idle();
    let mut lines = vec![observe("no front-end", &server)];
    let job = hits(0..HOT_BYTES, 1, 1);
    let guest = session::connect(&server, 0, &job, 1)?;
    lines.push(observe("an idle front-end", &server));
    drop(guest);
    session::run(&server, &[0], &warm_up(Ops::Writes, 0..HOT_BYTES))?;
    let guest = session::connect(&server, 0, &job, 1)?;
    // Write-back by age has to finish first.
    std::thread::sleep(IDLE);
    lines.push(observe("an idle front-end, 10 s after it wrote 32 MiB", &server));
    drop(guest);
    let head = ["daemon with", "CPU ms in 10 s", "voluntary context switches"].map(ToString::to_string);
    Ok(table(&head, &lines))
}

fn observe(what: &str, server: &Server) -> Vec<String> {
    std::thread::sleep(Duration::from_millis(200));
    let (cpu_us, sleeps) = (server.cpu_us(), server.sleeps());
    std::thread::sleep(IDLE);
    let cpu_ms = (server.cpu_us() - cpu_us) / 1000.0;
    vec![what.to_string(), format!("{cpu_ms:.0}"), (server.sleeps() - sleeps).to_string()]
}

const LEGEND: &str = "\
- start-up ms: the time until the daemon listens
- slowest/fastest: the requests per second of the slowest client over those of the fastest
- private MiB: anonymous memory of the daemon; frames and guest memory are shared memory and not included
- bytes/cache page: the same for each page that the cache can hold
- space/data: what the image takes on the host's file system, over what was written
";

/// The whole report.
pub fn document(machine: &[String], text: &str) -> String {
    format!(
        "# How genblk's cost grows\n\n\
         `make bench-scale` writes this file, with the medians of {ROUNDS} rounds. One worker per device, interrupts,\n\
         and 4 KiB random reads unless a section says otherwise.\n\n{}\n{LEGEND}\n{text}",
        bullets(machine)
    )
}
