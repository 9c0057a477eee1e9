//! What readahead does for readers of every kind, and what is demanded of it.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "numbers here are sizes of small simulations and shares of them"
)]

mod world;

pub use world::{Measured, StoreModel};

use crate::policy_report::Gate;
use crate::prng::Prng;
use world::{CACHE_PAGES, IMAGE_PAGES, Reader};

/// A reader in a hurry: 10 GB/s, which is what it takes to copy.
const COPY_NS_PER_PAGE: u64 = 400;
/// What a guest's own readahead asks for at a time (128 KiB).
const PIECE_PAGES: u64 = 32;

/// A disk beside the processor: 2 GB/s after 80 us.
const LOCAL: StoreModel = StoreModel { name: "local", latency_us: 80, bytes_per_us: 2000 };
/// A volume on the network: 500 MB/s after 1 ms.
const REMOTE: StoreModel = StoreModel { name: "remote", latency_us: 1000, bytes_per_us: 500 };
/// What a scan may cost the hot set, in points of its hits.
const SCAN_COST_MAX: f64 = 2.0;
/// The stores on which is measured.
pub const STORES: [StoreModel; 2] = [LOCAL, REMOTE];

/// Readers of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// So many streams far apart, in requests of so many pages.
    Streams(u64, u64),
    /// One reader of files of so many MiB, which lie anywhere.
    Files(u64),
    /// One stream whose reader uses three quarters of the store's bandwidth.
    Leisurely,
    /// One stream that a guest's queues have shuffled: eight requests under way, out of order by up to 32.
    Shuffled,
    /// 16 KiB out of every 256 KiB.
    Strided,
    /// Requests of so many pages anywhere in so many GiB, eight at a time.
    Random(u64, u64),
    /// Two streams, and beside them the random reads.
    Mixed,
}

/// Every pattern that is measured, in the order of the table.
const PATTERNS: [Pattern; 15] = [
    Pattern::Streams(1, PIECE_PAGES),
    Pattern::Streams(1, 1),
    Pattern::Streams(8, PIECE_PAGES),
    Pattern::Streams(64, PIECE_PAGES),
    Pattern::Files(16),
    Pattern::Files(1),
    Pattern::Leisurely,
    Pattern::Shuffled,
    Pattern::Strided,
    Pattern::Random(1, 64),
    Pattern::Random(1, 4),
    Pattern::Random(1, 1),
    Pattern::Random(PIECE_PAGES, 64),
    Pattern::Random(PIECE_PAGES, 4),
    Pattern::Mixed,
];

impl Pattern {
    /// For tables.
    fn name(self) -> String {
        match self {
            Self::Streams(count, pages) => {
                format!("{count} stream{}, {} KiB", if count == 1 { "" } else { "s" }, pages * 4)
            }
            Self::Files(mib) => format!("files of {mib} MiB"),
            Self::Leisurely => "1 stream, 3/4 speed".to_string(),
            Self::Shuffled => "1 stream, shuffled".to_string(),
            Self::Strided => "strided".to_string(),
            Self::Random(pages, gib) => format!("random {} KiB in {gib} GiB", pages * 4),
            Self::Mixed => "2 streams + random".to_string(),
        }
    }

    /// Runs readers that together read about `pages` pages.
    fn run(self, store: StoreModel, pages: u64) -> Measured {
        world::run(store, self.readers(store, pages))
    }

    fn readers(self, store: StoreModel, pages: u64) -> Vec<Reader> {
        match self {
            Self::Streams(count, request_pages) => {
                (0..count).map(|n| stream(n * (IMAGE_PAGES / count), pages / count, request_pages)).collect()
            }
            Self::Files(mib) => vec![reader(files(pages, mib << 8), 1)],
            Self::Leisurely => {
                let ns_per_page = world::PAGE_BYTES * 1000 / store.bytes_per_us * 4 / 3;
                vec![Reader { ns_per_page, ..stream(0, pages, PIECE_PAGES) }]
            }
            Self::Shuffled => vec![reader(shuffled(pages), 8)],
            Self::Strided => {
                let requests = (0..pages / 4).map(|n| (n * 64 % IMAGE_PAGES, 4));
                vec![reader(requests, 1)]
            }
            Self::Random(request_pages, gib) => vec![random(gib << 18, pages, request_pages)],
            Self::Mixed => {
                let streams = (0..2).map(|n| stream(n * (IMAGE_PAGES / 2), pages * 9 / 20, PIECE_PAGES));
                streams.chain([random(IMAGE_PAGES, pages / 10, 1)]).collect()
            }
        }
    }
}

/// A reader in a hurry.
fn reader(requests: impl Iterator<Item = (u64, u64)> + 'static, depth: usize) -> Reader {
    Reader { requests: Box::new(requests), depth, ns_per_page: COPY_NS_PER_PAGE, begins_ns: 0 }
}

/// A stream from `first`, one request after the other.
fn stream(first: u64, pages: u64, request_pages: u64) -> Reader {
    let requests = (0..pages / request_pages).map(move |n| (first + n * request_pages, request_pages));
    reader(requests, 1)
}

/// Requests of `request_pages` at random multiples of it.
fn random(image_pages: u64, pages: u64, request_pages: u64) -> Reader {
    let mut prng = Prng::new(11);
    let requests = (0..pages / request_pages)
        .map(move |_| (prng.below(image_pages / request_pages) * request_pages, request_pages));
    reader(requests, 8)
}

/// Files of so many pages at random places, each read from its start to its end.
fn files(pages: u64, file_pages: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut prng = Prng::new(17);
    (0..pages / file_pages).flat_map(move |_| {
        let first = prng.below(IMAGE_PAGES / file_pages) * file_pages;
        (0..file_pages / PIECE_PAGES).map(move |n| (first + n * PIECE_PAGES, PIECE_PAGES))
    })
}

/// Pieces of a stream in the order in which eight queues hand them on: a piece may be passed by those within the next 32.
fn shuffled(pages: u64) -> impl Iterator<Item = (u64, u64)> {
    const REACH: u64 = 32;
    let mut prng = Prng::new(13);
    let mut waiting: Vec<u64> = Vec::new();
    let mut next = 0;
    let pieces = pages / PIECE_PAGES;
    std::iter::from_fn(move || {
        while next < pieces && waiting.first().is_none_or(|oldest| next < oldest + REACH) && waiting.len() < 8 {
            waiting.push(next);
            next += 1;
        }
        if waiting.is_empty() {
            return None;
        }
        let piece = waiting.remove(prng.below(waiting.len() as u64) as usize);
        Some((piece * PIECE_PAGES, PIECE_PAGES))
    })
}

impl Measured {
    /// What the guests read in a second, as a share of what the store can send.
    fn of_store(&self, store: StoreModel) -> f64 {
        self.bytes_per_us / store.bytes_per_us as f64
    }

    /// Of the pages that guests read, the share that readahead had asked for before.
    fn coverage(&self) -> f64 {
        self.stats.readahead_used_pages as f64 / self.demanded as f64
    }

    /// Of the pages that readahead brought, the share that guests read.
    fn accuracy(&self) -> f64 {
        self.stats.readahead_used_pages as f64 / self.stats.readahead_pages.max(1) as f64
    }

    /// Of the pages that guests read, the share that readahead had asked for, but too late to be there.
    fn late(&self) -> f64 {
        let read_on_demand = self.fetched - self.stats.readahead_pages;
        (self.stats.read_miss_pages - read_on_demand) as f64 / self.demanded as f64
    }

    /// What the store had to read beyond what guests read, as a share of that.
    fn extra(&self) -> f64 {
        (self.stats.readahead_pages - self.stats.readahead_used_pages) as f64 / self.demanded as f64
    }
}

/// Runs every pattern on a store.
pub fn measure(store: StoreModel, pages: u64) -> Vec<(Pattern, Measured)> {
    PATTERNS.map(|pattern| (pattern, pattern.run(store, pages))).to_vec()
}

/// A row of the table for each pattern.
pub fn table(store: StoreModel, rows: &[(Pattern, Measured)]) -> String {
    let mut text = format!("{:<27}{:>11}", format!("{} store, %", store.name), "bandwidth");
    ["coverage", "accuracy", "late", "extra"].iter().for_each(|name| text += &format!("{name:>10}"));
    text += "\n";
    for (pattern, measured) in rows {
        text += &format!("{:<27}{:>11.1}", pattern.name(), 100.0 * measured.of_store(store));
        let shares = [measured.coverage(), measured.accuracy(), measured.late(), measured.extra()];
        shares.iter().for_each(|share| text += &format!("{:>10.2}", 100.0 * share));
        text += "\n";
    }
    text
}

/// What streams that scan so many pages, several times the cache, cost a hot set of half the cache, which another reader
/// reads at random beside them, in points of its hits. That a page comes in first and is asked for later, once, must not
/// make it look hot.
fn scan_cost(store: StoreModel, streams: u64, pages: u64) -> f64 {
    const HOT_PAGES: u64 = CACHE_PAGES as u64 / 2;
    /// One hot page for about four scanned ones.
    const SCANNED_PER_HOT: u64 = 4;
    /// How often each hot page is asked for before the scan, on the average.
    const WARM: u64 = 8;
    let mut prng = Prng::new(19);
    let ns_per_page = SCANNED_PER_HOT * world::PAGE_BYTES * 1000 / store.bytes_per_us;
    let begins_ns = HOT_PAGES * (store.latency_us * 1000 + WARM * ns_per_page);
    let asked = HOT_PAGES * WARM + pages / SCANNED_PER_HOT;
    let hot = (0..asked).map(move |_| (IMAGE_PAGES - HOT_PAGES + prng.below(HOT_PAGES), 1));
    let scan = Pattern::Streams(streams, PIECE_PAGES).readers(store, pages);
    let scan = scan.into_iter().map(|stream| Reader { begins_ns, ..stream });
    let measured = world::run(store, scan.chain([Reader { ns_per_page, ..reader(hot, 1) }]).collect());
    let in_vain = measured.stats.readahead_pages - measured.stats.readahead_used_pages;
    // A hot page or two may be asked for by nobody.
    let lost = (measured.fetched - in_vain - pages).saturating_sub(HOT_PAGES);
    100.0 * lost as f64 / (pages / SCANNED_PER_HOT) as f64
}

fn judge_scan(store: StoreModel, streams: u64, pages: u64) -> Gate {
    let cost = scan_cost(store, streams, pages);
    let says = format!(
        "a scan by {streams} with readahead on the {} store costs the hot set less than {SCAN_COST_MAX} points: {cost:.2}",
        store.name
    );
    Gate { holds: cost < SCAN_COST_MAX, says }
}

/// What is demanded of the patterns, and of a scan of so many pages.
pub fn judge(store: StoreModel, rows: &[(Pattern, Measured)], pages: u64) -> Vec<Gate> {
    let of_rows = rows.iter().filter_map(|(pattern, measured)| judge_row(*pattern, store, measured));
    of_rows.chain([1, 16, 64].map(|streams| judge_scan(store, streams, pages))).collect()
}

fn judge_row(pattern: Pattern, store: StoreModel, measured: &Measured) -> Option<Gate> {
    let at_least =
        |share: f64, min: f64, what: &str| (share >= min, format!("at least {} % {what}", min * 100.0), share);
    let (holds, demand, share) = match pattern {
        Pattern::Streams(1, _) => at_least(measured.of_store(store), 0.95, "of the store's bandwidth"),
        Pattern::Files(16) => at_least(measured.of_store(store), 0.6, "of the store's bandwidth"),
        Pattern::Streams(64, _) => at_least(measured.accuracy(), 0.95, "of what is read ahead is used"),
        Pattern::Random(..) | Pattern::Strided => {
            (measured.extra() <= 0.01, "at most 1 % is read in vain".to_string(), measured.extra())
        }
        _ => return None,
    };
    let says = format!("{} on the {} store: {demand}: {:.2} %", pattern.name(), store.name, 100.0 * share);
    Some(Gate { holds, says })
}
