//! Workloads: patterns of guests, and patterns that are hard for some policies. Each makes its trace from a fixed seed.

use super::lsm;
use super::trace::{Access, Scale, Trace, Zipf};

/// A named generator of traces.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its name in tables.
    pub name: &'static str,
    make: fn(&mut Trace),
}

/// Every workload, in the order of the table.
pub const WORKLOADS: &[Workload] = &[
    Workload { name: "zipf 0.6", make: |trace| zipf(trace, 0.6) },
    Workload { name: "zipf 0.8", make: |trace| zipf(trace, 0.8) },
    Workload { name: "zipf 0.99", make: |trace| zipf(trace, 0.99) },
    Workload { name: "zipf 1.2", make: |trace| zipf(trace, 1.2) },
    Workload { name: "pdsim cycle", make: pdsim_cycle },
    Workload { name: "pdsim even", make: pdsim_even },
    Workload { name: "pdsim root", make: pdsim_root },
    Workload { name: "pdsim square", make: pdsim_square },
    Workload { name: "pdsim drift", make: pdsim_drift },
    Workload { name: "loops", make: loops },
    Workload { name: "scan+hot set", make: scan_over_hot_set },
    Workload { name: "oltp+journal", make: oltp },
    Workload { name: "boot", make: boot },
    Workload { name: "lsm", make: lsm::lsm },
    Workload { name: "recency", make: recency },
];

impl Workload {
    /// The trace of this scale. It is the same each time.
    pub fn trace(&self, scale: Scale) -> Vec<Access> {
        let mut trace = Trace::new(scale, 42);
        (self.make)(&mut trace);
        trace.into_accesses()
    }
}

/// Independent draws from a Zipf distribution: popularity without locality in time.
fn zipf(trace: &mut Trace, exponent: f64) {
    let pages = Zipf::new(trace.scale.pages, exponent);
    while !trace.is_full() {
        let page = pages.draw(trace);
        trace.read(page);
    }
}

// The five patterns of NetBSD's page daemon simulator (sys/uvm/pdsim).

/// All pages in order, repeatedly.
fn pdsim_cycle(trace: &mut Trace) {
    for n in 0..trace.scale.accesses {
        trace.read((n % trace.scale.pages as usize) as u32);
    }
}

/// Uniformly random pages.
fn pdsim_even(trace: &mut Trace) {
    while !trace.is_full() {
        let page = trace.below(trace.scale.pages);
        trace.read(page);
    }
}

/// The square root of a uniform number: the probability of a page is proportional to its number.
fn pdsim_root(trace: &mut Trace) {
    while !trace.is_full() {
        let page = root(trace, trace.scale.pages);
        trace.read(page);
    }
}

/// The square of a uniform number: the probability of a page falls with the square root of its number.
fn pdsim_square(trace: &mut Trace) {
    let pages = u64::from(trace.scale.pages);
    while !trace.is_full() {
        let x = trace.prng.below(pages);
        trace.read((x * x / pages) as u32);
    }
}

/// The root pattern, shifted by one page with each access: hot pages soon turn cold.
fn pdsim_drift(trace: &mut Trace) {
    let window = (trace.scale.accesses / 20) as u32;
    for n in 0..trace.scale.accesses {
        let page = root(trace, window) + n as u32;
        trace.read(page);
    }
}

fn root(trace: &mut Trace, pages: u32) -> u32 {
    ((trace.fraction().sqrt() * f64::from(pages)) as u32).min(pages - 1)
}

// What guests do.

/// Regions of every size, each read sequentially two to six times: nested-loop joins, compilers, test suites.
fn loops(trace: &mut Trace) {
    while !trace.is_full() {
        let longest = f64::from(trace.share(300));
        let length = trace.log_uniform(longest / 600.0, longest).max(1);
        let start = trace.below(trace.scale.pages - length);
        for _ in 0..2 + trace.below(5) {
            (start..start + length).for_each(|page| trace.read(page));
        }
    }
}

/// 60 % of the accesses go to a hot twentieth of the image. The others are a backup that reads the image sequentially.
fn scan_over_hot_set(trace: &mut Trace) {
    let hot_pages = trace.share(50);
    let hot = Zipf::new(hot_pages, 0.7);
    let mut scanned = 0;
    while !trace.is_full() {
        if trace.prng.percent(60) {
            let page = hot.draw(trace);
            trace.read(page);
        } else {
            trace.read(scanned);
            scanned = (scanned + 1) % trace.scale.pages;
        }
    }
}

/// A database: transactions read 8 KiB rows by popularity, change some of them, and end with a write to a journal,
/// which cycles through a fiftieth of the image.
fn oltp(trace: &mut Trace) {
    let journal_pages = trace.share(20);
    let rows = Zipf::new((trace.scale.pages - journal_pages) / 2, 0.99);
    let mut journal = 0;
    while !trace.is_full() {
        for _ in 0..4 {
            let row = journal_pages + 2 * rows.draw(trace);
            (row..row + 2).for_each(|page| trace.read(page));
            if trace.prng.percent(30) {
                (row..row + 2).for_each(|page| trace.write(page));
            }
        }
        trace.write(journal);
        // Two commits in three still fit into the last page of the journal.
        journal = (journal + u32::from(trace.prng.percent(33))) % journal_pages;
    }
}

/// A guest that boots repeatedly. Each boot reads short runs all over the image in the same order: most runs once, some
/// of them (libraries) often. Between two boots it accesses pages by popularity.
fn boot(trace: &mut Trace) {
    let mut runs = Vec::new();
    let mut left = i64::from(trace.share(80));
    while left > 0 {
        let length = 1 + trace.below(16);
        runs.push((trace.below(trace.scale.pages - length), length));
        left -= i64::from(length);
    }
    let work = Zipf::new(trace.scale.pages, 0.9);
    let work_between = trace.scale.accesses / 16;
    while !trace.is_full() {
        for n in 0..runs.len() {
            read_run(trace, runs[n]);
            if trace.prng.percent(30) {
                let library = trace.below(runs.len().min(200) as u32);
                read_run(trace, runs[library as usize]);
            }
        }
        for _ in 0..work_between {
            let page = work.draw(trace);
            trace.read(page);
        }
    }
}

fn read_run(trace: &mut Trace, (start, length): (u32, u32)) {
    (start..start + length).for_each(|page| trace.read(page));
}

/// Every other access repeats an earlier one from a log-uniform distance, and no page is popular in itself: LRU is the
/// right policy, and policies that count frequency are wrong.
fn recency(trace: &mut Trace) {
    let mut fresh = 0;
    while !trace.is_full() {
        let longest = trace.len().min(trace.share(200) as usize);
        if longest < 8 || trace.prng.percent(50) {
            trace.read(fresh);
            fresh = (fresh + 1) % trace.scale.pages;
        } else {
            let ago = trace.log_uniform(2.0, longest as f64) as usize;
            let page = trace.page_before(ago);
            trace.read(page);
        }
    }
}
