//! The benchmarks of replacement and readahead in small, with their demands, and what they stand on.

#[path = "../benches/bare_cache/mod.rs"]
mod bare_cache;
#[path = "../benches/miss_ratio/mod.rs"]
mod miss_ratio;
#[path = "../benches/policy_report/mod.rs"]
#[allow(dead_code, reason = "what the benchmarks print is none of the tests' business")]
mod policy_report;
#[path = "common/prng.rs"]
#[allow(dead_code, reason = "shared with the other tests, which use more of it")]
mod prng;
#[path = "../benches/readahead/mod.rs"]
mod readahead;

use bare_cache::{InstantStoreCache, defaults};
use genblk::cache::policy::MiniSimulation;
use genblk::cache::{PolicyKind, Settings};
use genblk::units::PageNo;
use miss_ratio::algorithms::Algorithm;
use miss_ratio::gates::LruTolerance;
use miss_ratio::trace::{Access, Scale};
use miss_ratio::workloads::WORKLOADS;
use miss_ratio::{Cell, gates, measure, table, trace_file};
use policy_report::Gate;

fn reads(pages: &[u32]) -> Vec<Access> {
    pages.iter().map(|&page| Access { page, write: false }).collect()
}

fn not_met(gates: Vec<Gate>) -> Vec<String> {
    gates.into_iter().filter(|gate| !gate.passed).map(|gate| gate.message).collect()
}

#[test]
fn the_demands_on_replacement_are_met_in_small() {
    let scale = Scale { pages: 8000, accesses: 80_000 };
    let sizes = [10, 100];
    let cells: Vec<Cell> =
        WORKLOADS.iter().flat_map(|workload| measure(workload.name, &workload.trace(scale), &sizes)).collect();
    for cell in &cells {
        let best = Algorithm::ALL.map(|algorithm| cell.of(algorithm)).into_iter().fold(100.0, f64::min);
        assert!(cell.of(Algorithm::Opt) <= best, "nobody is better than OPT: {cell:?}");
    }
    let missed = not_met(gates::judge(&cells, LruTolerance { max: 1.0, noise: 0.35 }));
    assert!(missed.is_empty(), "{missed:#?}\n{}", table::render(&cells, &sizes));
}

#[test]
fn the_demands_on_readahead_are_met_in_small() {
    for store in readahead::STORES {
        let pages = 1 << 18;
        let rows = readahead::measure(store, pages);
        let missed = not_met(readahead::judge(store, &rows, pages));
        assert!(missed.is_empty(), "{missed:#?}\n{}", readahead::table(store, &rows));
    }
}

/// The demands on replacement are put to a model, for speed; this says that they hold for the page cache itself.
#[test]
fn the_cache_misses_what_its_model_misses() {
    const PAGES: u32 = 16_000;
    const FRAMES: u32 = 1600;
    /// What a cache of this size keeps free.
    const RESERVE: u32 = 64;
    /// Whether a loop fits turns on the last frames.
    const POINTS_MAX: f64 = 2.5;
    let scale = Scale { pages: PAGES, accesses: 160_000 };
    for workload in WORKLOADS {
        let trace = workload.trace(scale);
        let image_pages = 1 + trace.iter().map(|access| u64::from(access.page)).max().expect("a trace is not empty");
        let mut model = MiniSimulation::new(PolicyKind::S3Fifo, FRAMES - RESERVE);
        let missed = trace.iter().filter(|access| !model.access(PageNo(access.page.into()))).count();
        for readahead_pages_max in [0, 512] {
            let mut cache = InstantStoreCache::new(Settings { readahead_pages_max, ..defaults(FRAMES, image_pages) });
            for access in &trace {
                let ask = if access.write { InstantStoreCache::write } else { InstantStoreCache::read };
                ask(&mut cache, PageNo(access.page.into()), 1);
                cache.turn();
            }
            let stats = cache.stats();
            // What came in went again or is there; what was read ahead in vain, nobody had asked for.
            let came_in = stats.evicted_pages + u64::from(FRAMES - RESERVE) - stats.readahead_wasted_pages;
            let points = 100.0 * (came_in as f64 - missed as f64) / trace.len() as f64;
            assert!(
                points.abs() < POINTS_MAX,
                "{}, readahead up to {readahead_pages_max}: {points:.2} points more misses than the model",
                workload.name
            );
        }
    }
}

#[test]
fn a_workload_makes_the_same_trace_each_time_and_stays_within_its_scale() {
    let scale = Scale { pages: 3000, accesses: 20_000 };
    for workload in WORKLOADS {
        let trace = workload.trace(scale);
        assert_eq!(trace.len(), scale.accesses, "{}", workload.name);
        assert!(trace == workload.trace(scale), "{} is different each time", workload.name);
    }
}

#[test]
fn algorithms_do_as_their_authors_say() {
    // A loop of four over three places.
    let trace = reads(&[0, 1, 2, 3, 0, 1, 2, 3]);
    assert_eq!(Algorithm::Lru.misses(&trace, 4, 3), 8);
    assert_eq!(Algorithm::Clock.misses(&trace, 4, 3), 8);
    assert_eq!(Algorithm::Opt.misses(&trace, 4, 3), 5);
    // ARC keeps pages that were seen twice through pages that are seen once.
    let mut pages = vec![0, 1, 0, 1];
    pages.extend(2..40);
    pages.extend([0, 1]);
    assert_eq!(Algorithm::Lru.misses(&reads(&pages), 40, 4), 42);
    assert_eq!(Algorithm::Arc.misses(&reads(&pages), 40, 4), 40);
    // CLOCK passes over a page that was asked for again.
    assert_eq!(Algorithm::Clock.misses(&reads(&[0, 1, 0, 2, 0]), 3, 2), 3);
}

#[test]
fn the_table_at_the_head_of_the_benchmark_has_every_workload() {
    let source = include_str!("../benches/miss_ratio.rs");
    for workload in WORKLOADS {
        assert!(source.contains(&format!("//! {} ", workload.name)), "{} is missing: --table", workload.name);
    }
}

#[test]
fn a_trace_file_is_read_page_by_page() {
    let text = "time,op,sector,count\n# two pages\n0.5, R, 1000, 9\n\n1,write,1000,1\n2,flush,0,0\n3,r,8,8\n";
    let trace = trace_file::read(text.as_bytes()).unwrap();
    let seen: Vec<(u32, bool)> = trace.iter().map(|access| (access.page, access.write)).collect();
    assert_eq!(seen, [(0, false), (1, false), (0, true), (2, false)]);
}

#[test]
fn a_bad_line_of_a_trace_file_is_named_with_what_is_wrong() {
    let cases = [
        ("1,r,0,8\n2,r,x,8\n", "line 2: the sector \"x\" is not a whole number"),
        ("1,r,0\n", "line 1: 3 fields; there have to be 4: time, op, sector, count"),
        ("now,r,0,8\n", "line 1: the time \"now\" is not a number"),
        ("1,append,0,8\n", "line 1: the op \"append\" is not one of read, write, flush, discard"),
        ("1,r,0,0\n", "line 1: the count 0 is not from 1 to 1048576"),
        ("1,r,18446744073709551615,8\n", "line 1: the sector 18446744073709551615 is too large"),
        ("# nothing\n", "no line reads or writes anything"),
    ];
    for (text, fault) in cases {
        assert_eq!(trace_file::read(text.as_bytes()).unwrap_err(), fault, "{text}");
    }
}
