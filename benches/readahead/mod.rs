//! The access patterns for readahead, and the requirements on it.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "numbers here are sizes of small simulations and shares of them"
)]

mod simulation;

pub use simulation::{Measured, StoreModel};

use crate::policy_report::Gate;
use crate::prng::Prng;
use simulation::{CACHE_PAGES, IMAGE_PAGES, Reader};

/// The time that a fast reader spends on a page: copying it at 10 GB/s.
const COPY_NS_PER_PAGE: u64 = 400;
/// The request size of the guest's own readahead (128 KiB).
const CHUNK_PAGES: u64 = 32;

/// A local disk: 2 GB/s, 80 us.
const LOCAL: StoreModel = StoreModel { name: "local", latency_us: 80, bytes_per_us: 2000 };
/// A network volume: 500 MB/s, 1 ms.
const REMOTE: StoreModel = StoreModel { name: "remote", latency_us: 1000, bytes_per_us: 500 };
/// By how many points a scan may lower the hit ratio of the hot set.
const SCAN_COST_MAX: f64 = 2.0;
/// The simulated stores.
pub const STORES: [StoreModel; 2] = [LOCAL, REMOTE];

/// An access pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// This many sequential streams far apart, with requests of this many pages.
    Streams(u64, u64),
    /// One reader of files of this many MiB, at random offsets.
    Files(u64),
    /// One stream whose reader needs three quarters of the store's bandwidth.
    Paced,
    /// One stream that the guest's queues have reordered: eight requests in flight, out of order by up to 32.
    Shuffled,
    /// 16 KiB out of every 256 KiB.
    Strided,
    /// Random requests of this many pages in this many GiB, eight at a time.
    Random(u64, u64),
    /// Two streams beside random reads.
    Mixed,
}

/// Every pattern, in the order of the table.
const PATTERNS: [Pattern; 17] = [
    Pattern::Streams(1, CHUNK_PAGES),
    Pattern::Streams(1, 1),
    Pattern::Streams(8, CHUNK_PAGES),
    Pattern::Streams(64, CHUNK_PAGES),
    Pattern::Streams(100, 4),
    Pattern::Streams(300, 4),
    Pattern::Files(16),
    Pattern::Files(1),
    Pattern::Paced,
    Pattern::Shuffled,
    Pattern::Strided,
    Pattern::Random(1, 64),
    Pattern::Random(1, 4),
    Pattern::Random(1, 1),
    Pattern::Random(CHUNK_PAGES, 64),
    Pattern::Random(CHUNK_PAGES, 4),
    Pattern::Mixed,
];

impl Pattern {
    /// Its name in tables.
    fn name(self) -> String {
        match self {
            Self::Streams(count, pages) => {
                format!("{count} stream{}, {} KiB", if count == 1 { "" } else { "s" }, pages * 4)
            }
            Self::Files(mib) => format!("files of {mib} MiB"),
            Self::Paced => "1 stream, 3/4 speed".to_string(),
            Self::Shuffled => "1 stream, shuffled".to_string(),
            Self::Strided => "strided".to_string(),
            Self::Random(pages, gib) => format!("random {} KiB in {gib} GiB", pages * 4),
            Self::Mixed => "2 streams + random".to_string(),
        }
    }

    /// Runs readers that read about `pages` pages together.
    fn run(self, store: StoreModel, pages: u64) -> Measured {
        simulation::run(store, self.readers(store, pages))
    }

    fn readers(self, store: StoreModel, pages: u64) -> Vec<Reader> {
        match self {
            Self::Streams(count, request_pages) => {
                (0..count).map(|n| stream(n * (IMAGE_PAGES / count), pages / count, request_pages)).collect()
            }
            Self::Files(mib) => vec![reader(files(pages, mib << 8), 1)],
            Self::Paced => {
                let ns_per_page = simulation::PAGE_BYTES * 1000 / store.bytes_per_us * 4 / 3;
                vec![Reader { ns_per_page, ..stream(0, pages, CHUNK_PAGES) }]
            }
            Self::Shuffled => vec![reader(shuffled(pages), 8)],
            Self::Strided => {
                let requests = (0..pages / 4).map(|n| (n * 64 % IMAGE_PAGES, 4));
                vec![reader(requests, 1)]
            }
            Self::Random(request_pages, gib) => vec![random(gib << 18, pages, request_pages)],
            Self::Mixed => {
                let streams = (0..2).map(|n| stream(n * (IMAGE_PAGES / 2), pages * 9 / 20, CHUNK_PAGES));
                streams.chain([random(IMAGE_PAGES, pages / 10, 1)]).collect()
            }
        }
    }
}

/// A fast reader.
fn reader(requests: impl Iterator<Item = (u64, u64)> + 'static, depth: usize) -> Reader {
    Reader { requests: Box::new(requests), depth, ns_per_page: COPY_NS_PER_PAGE, starts_ns: 0 }
}

/// A sequential stream from `first`, with one request at a time.
fn stream(first: u64, pages: u64, request_pages: u64) -> Reader {
    let requests = (0..pages / request_pages).map(move |n| (first + n * request_pages, request_pages));
    reader(requests, 1)
}

/// Requests of `request_pages` pages at random multiples of that.
fn random(image_pages: u64, pages: u64, request_pages: u64) -> Reader {
    let mut prng = Prng::new(11);
    let requests = (0..pages / request_pages)
        .map(move |_| (prng.below(image_pages / request_pages) * request_pages, request_pages));
    reader(requests, 8)
}

/// Files of `file_pages` pages at random offsets, each read sequentially.
fn files(pages: u64, file_pages: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut prng = Prng::new(17);
    (0..pages / file_pages).flat_map(move |_| {
        let first = prng.below(IMAGE_PAGES / file_pages) * file_pages;
        (0..file_pages / CHUNK_PAGES).map(move |n| (first + n * CHUNK_PAGES, CHUNK_PAGES))
    })
}

/// The chunks of a stream in the order in which eight queues submit them: each of the next 32 chunks may overtake a
/// chunk.
fn shuffled(pages: u64) -> impl Iterator<Item = (u64, u64)> {
    const REACH: u64 = 32;
    let mut prng = Prng::new(13);
    let mut waiting: Vec<u64> = Vec::new();
    let mut next = 0;
    let chunks = pages / CHUNK_PAGES;
    std::iter::from_fn(move || {
        while next < chunks && waiting.first().is_none_or(|oldest| next < oldest + REACH) && waiting.len() < 8 {
            waiting.push(next);
            next += 1;
        }
        if waiting.is_empty() {
            return None;
        }
        let chunk = waiting.remove(prng.below(waiting.len() as u64) as usize);
        Some((chunk * CHUNK_PAGES, CHUNK_PAGES))
    })
}

impl Measured {
    /// The guests' throughput as a share of the store's bandwidth.
    fn bandwidth(&self, store: StoreModel) -> f64 {
        self.bytes_per_us / store.bytes_per_us as f64
    }

    /// The share of the guests' pages that readahead requested before the guests did.
    fn coverage(&self) -> f64 {
        self.stats.readahead_used_pages as f64 / self.demanded as f64
    }

    /// The share of readahead's pages that guests used.
    fn accuracy(&self) -> f64 {
        self.stats.readahead_used_pages as f64 / self.stats.readahead_pages.max(1) as f64
    }

    /// The share of the guests' pages that readahead had requested, but that had not arrived yet.
    fn late(&self) -> f64 {
        let read_on_demand = self.fetched - self.stats.readahead_pages;
        (self.stats.read_miss_pages - read_on_demand) as f64 / self.demanded as f64
    }

    /// Pages that were read ahead and never used, as a share of the guests' pages.
    fn extra(&self) -> f64 {
        (self.stats.readahead_pages - self.stats.readahead_used_pages) as f64 / self.demanded as f64
    }
}

/// Runs every pattern on a store.
pub fn measure(store: StoreModel, pages: u64) -> Vec<(Pattern, Measured)> {
    PATTERNS.map(|pattern| (pattern, pattern.run(store, pages))).to_vec()
}

/// The table of a store, with a row for each pattern.
pub fn table(store: StoreModel, rows: &[(Pattern, Measured)]) -> String {
    let mut text = format!("{:<27}{:>11}", format!("{} store, %", store.name), "bandwidth");
    ["coverage", "accuracy", "late", "extra"].iter().for_each(|name| text += &format!("{name:>10}"));
    text += "\n";
    for (pattern, measured) in rows {
        text += &format!("{:<27}{:>11.1}", pattern.name(), 100.0 * measured.bandwidth(store));
        let shares = [measured.coverage(), measured.accuracy(), measured.late(), measured.extra()];
        shares.iter().for_each(|share| text += &format!("{:>10.2}", 100.0 * share));
        text += "\n";
    }
    text
}

/// By how many points a scan lowers the hit ratio of a hot set. The streams of the scan read `pages` pages, several
/// times the cache; another reader reads the hot set, half the cache, at random. A page that is read ahead and then
/// used once must not look hot.
fn scan_cost(store: StoreModel, streams: u64, pages: u64) -> f64 {
    const HOT_PAGES: u64 = CACHE_PAGES as u64 / 2;
    /// About four scanned pages per hot page.
    const SCANNED_PER_HOT: u64 = 4;
    /// Average accesses to each hot page before the scan.
    const WARM_UP: u64 = 8;
    let mut prng = Prng::new(19);
    let ns_per_page = SCANNED_PER_HOT * simulation::PAGE_BYTES * 1000 / store.bytes_per_us;
    let starts_ns = HOT_PAGES * (store.latency_us * 1000 + WARM_UP * ns_per_page);
    let hot_accesses = HOT_PAGES * WARM_UP + pages / SCANNED_PER_HOT;
    let hot = (0..hot_accesses).map(move |_| (IMAGE_PAGES - HOT_PAGES + prng.below(HOT_PAGES), 1));
    let scan = Pattern::Streams(streams, CHUNK_PAGES).readers(store, pages);
    let scan = scan.into_iter().map(|stream| Reader { starts_ns, ..stream });
    let measured = simulation::run(store, scan.chain([Reader { ns_per_page, ..reader(hot, 1) }]).collect());
    let unused = measured.stats.readahead_pages - measured.stats.readahead_used_pages;
    // Saturating: a few hot pages may never be accessed.
    let lost = (measured.fetched - unused - pages).saturating_sub(HOT_PAGES);
    100.0 * lost as f64 / (pages / SCANNED_PER_HOT) as f64
}

fn judge_scan(store: StoreModel, streams: u64, pages: u64) -> Gate {
    let cost = scan_cost(store, streams, pages);
    let message = format!(
        "a scan by {streams} streams with readahead, {} store, costs the hot set less than {SCAN_COST_MAX} points of \
         hits: {cost:.2}",
        store.name
    );
    Gate { passed: cost < SCAN_COST_MAX, message }
}

/// The verdicts on the patterns, and on scans of `pages` pages.
pub fn judge(store: StoreModel, rows: &[(Pattern, Measured)], pages: u64) -> Vec<Gate> {
    let of_rows = rows.iter().filter_map(|(pattern, measured)| judge_row(*pattern, store, measured));
    of_rows.chain([1, 16, 64].map(|streams| judge_scan(store, streams, pages))).collect()
}

fn judge_row(pattern: Pattern, store: StoreModel, measured: &Measured) -> Option<Gate> {
    let at_least =
        |share: f64, min: f64, what: &str| (share >= min, format!("at least {} % {what}", min * 100.0), share);
    let (passed, requirement, share) = match pattern {
        Pattern::Streams(1, _) => at_least(measured.bandwidth(store), 0.95, "of the store's bandwidth"),
        Pattern::Files(16) => at_least(measured.bandwidth(store), 0.6, "of the store's bandwidth"),
        Pattern::Streams(64, _) => at_least(measured.accuracy(), 0.95, "of the pages read ahead are used"),
        Pattern::Random(..) | Pattern::Strided => {
            (measured.extra() <= 0.01, "at most 1 % extra pages".to_string(), measured.extra())
        }
        _ => return None,
    };
    let message = format!("{} on the {} store: {requirement}: {:.2} %", pattern.name(), store.name, 100.0 * share);
    Some(Gate { passed, message })
}
