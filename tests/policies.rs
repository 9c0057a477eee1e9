//! The benchmarks of replacement and readahead at a small scale, with their demands, and tests of their tools.

#[path = "../benches/bare_cache/mod.rs"]
mod bare_cache;
#[path = "../benches/miss_ratio/mod.rs"]
mod miss_ratio;
#[path = "../benches/policy_report/mod.rs"]
#[allow(dead_code, reason = "the tests do not print the benchmarks' reports")]
mod policy_report;
#[path = "common/prng.rs"]
#[allow(dead_code, reason = "shared with the other tests, which use more of it")]
mod prng;
#[path = "../benches/readahead/mod.rs"]
mod readahead;

use bare_cache::InstantStoreCache;
use genblk::cache::policy::MiniSimulation;
use genblk::cache::{PolicyKind, Settings};
use genblk::units::{PageNo, SECTORS_PER_PAGE};
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
fn replacement_meets_its_targets_at_a_small_scale() {
    let scale = Scale { pages: 8000, accesses: 80_000 };
    let sizes = [10, 100];
    let cells: Vec<Cell> =
        WORKLOADS.iter().flat_map(|workload| measure(workload.name, &workload.trace(scale), &sizes)).collect();
    for cell in &cells {
        let best = Algorithm::ALL.map(|algorithm| cell.of(algorithm)).into_iter().fold(100.0, f64::min);
        assert!(cell.of(Algorithm::Opt) <= best, "no algorithm beats OPT: {cell:?}");
    }
    let missed = not_met(gates::judge(&cells, LruTolerance { max: 1.0, noise: 0.35 }));
    assert!(missed.is_empty(), "{missed:#?}\n{}", table::render(&cells, &sizes));
}

#[test]
fn readahead_meets_its_targets_at_a_small_scale() {
    for store in readahead::STORES {
        let pages = 1 << 18;
        let rows = readahead::measure(store, pages);
        let missed = not_met(readahead::judge(store, &rows, pages));
        assert!(missed.is_empty(), "{missed:#?}\n{}", readahead::table(store, &rows));
    }
}

/// For speed, the demands on replacement are measured with a simulation of the policy alone. This test transfers them
/// to the page cache.
#[test]
fn the_page_cache_misses_as_often_as_the_mini_simulation() {
    const PAGES: u32 = 16_000;
    const FRAMES: u32 = 1600;
    /// Number of frames that a cache of this size keeps free.
    const RESERVE: u32 = 64;
    /// Tolerance in percentage points: the last few frames decide whether a loop fits into the cache.
    const POINTS_MAX: f64 = 2.5;
    let scale = Scale { pages: PAGES, accesses: 160_000 };
    for workload in WORKLOADS {
        let trace = workload.trace(scale);
        let image_pages = 1 + trace.iter().map(|access| u64::from(access.page)).max().expect("a trace is not empty");
        let mut simulation = MiniSimulation::new(PolicyKind::S3Fifo, FRAMES - RESERVE);
        let misses = trace.iter().filter(|access| !simulation.access(PageNo(access.page.into()))).count();
        for readahead_pages_max in [0, 512] {
            let mut cache = InstantStoreCache::new(Settings {
                readahead_pages_max,
                ..Settings::of(FRAMES, image_pages * SECTORS_PER_PAGE)
            });
            for access in &trace {
                let access_page = if access.write { InstantStoreCache::write } else { InstantStoreCache::read };
                access_page(&mut cache, PageNo(access.page.into()), 1);
                cache.turn();
            }
            let stats = cache.stats();
            // A page that was read in was evicted, or is resident. Unread readahead is not a miss.
            let read_in = stats.evicted_pages + u64::from(FRAMES - RESERVE) - stats.readahead_wasted_pages;
            let points = 100.0 * (read_in as f64 - misses as f64) / trace.len() as f64;
            assert!(
                points.abs() < POINTS_MAX,
                "{}, readahead up to {readahead_pages_max}: {points:.2} points more misses than the simulation",
                workload.name
            );
        }
    }
}

#[test]
fn a_workload_gives_the_same_trace_each_time_within_its_scale() {
    let scale = Scale { pages: 3000, accesses: 20_000 };
    for workload in WORKLOADS {
        let trace = workload.trace(scale);
        assert_eq!(trace.len(), scale.accesses, "{}", workload.name);
        assert!(trace == workload.trace(scale), "{} is different each time", workload.name);
    }
}

#[test]
fn each_policy_matches_its_paper_on_small_traces() {
    // A loop over four pages, with a cache of three.
    let trace = reads(&[0, 1, 2, 3, 0, 1, 2, 3]);
    assert_eq!(Algorithm::Lru.misses(&trace, 4, 3), 8);
    assert_eq!(Algorithm::Clock.misses(&trace, 4, 3), 8);
    assert_eq!(Algorithm::Opt.misses(&trace, 4, 3), 5);
    // ARC keeps pages that were accessed twice during a scan of pages that are accessed once.
    let mut pages = vec![0, 1, 0, 1];
    pages.extend(2..40);
    pages.extend([0, 1]);
    assert_eq!(Algorithm::Lru.misses(&reads(&pages), 40, 4), 42);
    assert_eq!(Algorithm::Arc.misses(&reads(&pages), 40, 4), 40);
    // CLOCK does not evict a page that was accessed again.
    assert_eq!(Algorithm::Clock.misses(&reads(&[0, 1, 0, 2, 0]), 3, 2), 3);
}

#[test]
fn the_table_in_the_benchmarks_doc_has_every_workload() {
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
fn an_error_in_a_trace_file_names_the_line_and_the_cause() {
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
