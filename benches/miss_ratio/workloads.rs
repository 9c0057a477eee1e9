//! Traces of page accesses, made from a fixed seed: what guests do, and what is hard for one policy or another.

use crate::prng::Prng;

/// A page that is read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Which page, counted from 0 without gaps that matter.
    pub page: u32,
    /// A write; a page that is written need not be read in, but takes a place in the cache all the same.
    pub write: bool,
}

/// How much a workload does, and on how much.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Pages of the image.
    pub pages: u32,
    /// Accesses, about.
    pub accesses: usize,
}

/// A named way to make a trace.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// For tables.
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
    Workload { name: "lsm", make: super::lsm::lsm },
    Workload { name: "recency", make: recency },
];

impl Workload {
    /// The trace at a scale; the same each time.
    pub fn trace(&self, scale: Scale) -> Vec<Access> {
        let mut trace = Trace { scale, prng: Prng::new(42), accesses: Vec::with_capacity(scale.accesses + 64) };
        (self.make)(&mut trace);
        trace.accesses.truncate(scale.accesses);
        trace.accesses
    }
}

/// A trace in the making.
#[derive(Debug)]
pub(super) struct Trace {
    pub scale: Scale,
    pub prng: Prng,
    accesses: Vec<Access>,
}

impl Trace {
    /// Whether the trace is as long as it is to be.
    pub fn is_full(&self) -> bool {
        self.accesses.len() >= self.scale.accesses
    }

    pub fn read(&mut self, page: u32) {
        self.accesses.push(Access { page, write: false });
    }

    pub fn write(&mut self, page: u32) {
        self.accesses.push(Access { page, write: true });
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u32) -> u32 {
        self.prng.below(u64::from(bound)) as u32
    }

    /// A number in 0..1.
    fn fraction(&mut self) -> f64 {
        (self.prng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number from `low` to `high` whose logarithm is evenly spread: every order of magnitude is as likely.
    fn log_even(&mut self, low: f64, high: f64) -> u32 {
        (low * (high / low).powf(self.fraction())) as u32
    }

    /// This share (in thousandths) of the image, in pages.
    pub fn share(&self, permille: u32) -> u32 {
        (u64::from(self.scale.pages) * u64::from(permille) / 1000).max(1) as u32
    }
}

/// Numbers below `count`, the one of rank r with a chance in proportion to 1 / (r + 1)^exponent.
#[derive(Debug)]
pub(super) struct Zipf {
    cumulative: Vec<f64>,
}

impl Zipf {
    pub fn new(count: u32, exponent: f64) -> Self {
        let mut sum = 0.0;
        let next = |rank: u32| {
            sum += f64::from(rank + 1).powf(-exponent);
            sum
        };
        Self { cumulative: (0..count).map(next).collect() }
    }

    pub fn draw(&self, trace: &mut Trace) -> u32 {
        let total = self.cumulative.last().expect("a distribution over nothing");
        let wanted = trace.fraction() * total;
        let rank = self.cumulative.partition_point(|&sum| sum < wanted);
        rank.min(self.cumulative.len() - 1) as u32
    }
}

/// Independent draws: nothing but popularity.
fn zipf(trace: &mut Trace, exponent: f64) {
    let pages = Zipf::new(trace.scale.pages, exponent);
    while !trace.is_full() {
        let page = pages.draw(trace);
        trace.read(page);
    }
}

// The five patterns of the simulator that NetBSD keeps beside its page daemon (sys/uvm/pdsim).

/// All pages in order, over and over.
fn pdsim_cycle(trace: &mut Trace) {
    for n in 0..trace.scale.accesses {
        trace.read((n % trace.scale.pages as usize) as u32);
    }
}

/// Every page as likely as any other.
fn pdsim_even(trace: &mut Trace) {
    while !trace.is_full() {
        let page = trace.below(trace.scale.pages);
        trace.read(page);
    }
}

/// The root of an even number: a page's chance rises in proportion to its number.
fn pdsim_root(trace: &mut Trace) {
    while !trace.is_full() {
        let page = root(trace, trace.scale.pages);
        trace.read(page);
    }
}

/// The square of an even number: the chance falls with the root of the page's number.
fn pdsim_square(trace: &mut Trace) {
    let pages = u64::from(trace.scale.pages);
    while !trace.is_full() {
        let x = trace.prng.below(pages);
        trace.read((x * x / pages) as u32);
    }
}

/// The root pattern, moved on by one page with each access: the hot pages are always about to grow cold.
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

/// Regions of every size, each read through two to six times: nested-loop joins, compilers, test suites.
fn loops(trace: &mut Trace) {
    while !trace.is_full() {
        let longest = f64::from(trace.share(300));
        let length = trace.log_even(longest / 600.0, longest).max(1);
        let start = trace.below(trace.scale.pages - length);
        for _ in 0..2 + trace.below(5) {
            (start..start + length).for_each(|page| trace.read(page));
        }
    }
}

/// Six accesses in ten go to a hot twentieth of the image; the others are a backup that reads all of it in order.
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

/// A database: transactions read 8 KiB rows by popularity, change some of them, and end with a write to a journal that
/// goes round a fiftieth of the image.
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
        // Two commits in three fit the journal's last page.
        journal = (journal + u32::from(trace.prng.percent(33))) % journal_pages;
    }
}

/// A guest that is started again and again: short runs all over the image, most of them once in a start and in the
/// same order each time, some (libraries) often; between two starts it works by popularity.
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

/// Every other access goes back to what was accessed a while ago, however long, and nothing is popular for its own
/// sake: where LRU is right and whoever looks for frequency is wrong.
fn recency(trace: &mut Trace) {
    let mut fresh = 0;
    while !trace.is_full() {
        let longest = trace.accesses.len().min(trace.share(200) as usize);
        if longest < 8 || trace.prng.percent(50) {
            trace.read(fresh);
            fresh = (fresh + 1) % trace.scale.pages;
        } else {
            let ago = trace.log_even(2.0, longest as f64) as usize;
            let page = trace.accesses[trace.accesses.len() - ago].page;
            trace.read(page);
        }
    }
}
