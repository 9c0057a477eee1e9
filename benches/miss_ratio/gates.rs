//! The requirements on genblk's policy.

use genblk::cache::PolicyKind;
use genblk::cache::policy::MiniSimulation;
use genblk::units::PageNo;

use super::algorithms::Algorithm;
use super::trace::Access;
use super::{Cell, Level};
use crate::policy_report::Gate;
use crate::prng::Prng;

/// By how many points genblk's miss ratio may exceed that of LRU. Adapting has a price, which is higher on shorter
/// traces; and of two equally good policies either may be ahead by chance.
#[derive(Clone, Copy, Debug)]
pub struct LruTolerance {
    /// In any cell.
    pub max: f64,
    /// In [`AS_GOOD_AS_LRU_PERCENT`] of the cells: the effect of chance.
    pub noise: f64,
}

/// The percentage of cells that must be as good as with LRU.
const AS_GOOD_AS_LRU_PERCENT: usize = 95;
/// So many points behind ARC count as good as ARC.
const ARC_TOLERANCE: f64 = 1.0;
/// The percentage of cells that must be as good as with ARC.
const AS_GOOD_AS_ARC_PERCENT: usize = 80;
/// By how many points a scan may lower the hit ratio of the hot set.
const SCAN_COST_MAX: f64 = 2.0;
/// The share of OPT's hits in a loop that is a fifth longer than the cache. LRU has no hits there.
const LOOP_OF_OPT_MIN: f64 = 0.5;

/// Judges the cells; there must be at least one.
pub fn judge(cells: &[Cell], lru: LruTolerance) -> Vec<Gate> {
    vec![
        never_far_behind_lru(cells, lru.max),
        mostly_as_good_as(Algorithm::Lru, lru.noise, AS_GOOD_AS_LRU_PERCENT, cells),
        mostly_as_good_as(Algorithm::Arc, ARC_TOLERANCE, AS_GOOD_AS_ARC_PERCENT, cells),
        scan_gate(),
        loop_gate(),
    ]
}

fn never_far_behind_lru(cells: &[Cell], max: f64) -> Gate {
    let worst = worst_against(cells, Algorithm::Genblk);
    let behind = worst.points_behind(Algorithm::Lru);
    let arc = worst_against(cells, Algorithm::Arc);
    let message = format!(
        "never more than {max} points behind LRU: at worst {behind:.2} ({}), ARC {:.2} ({})",
        describe(worst),
        arc.of(Algorithm::Arc) - arc.of(Algorithm::Lru),
        describe(arc)
    );
    Gate { passed: behind <= max, message }
}

/// The cell where `algorithm` is worst relative to LRU.
fn worst_against(cells: &[Cell], algorithm: Algorithm) -> &Cell {
    let behind = |cell: &Cell| cell.of(algorithm) - cell.of(Algorithm::Lru);
    cells.iter().max_by(|a, b| behind(a).total_cmp(&behind(b))).expect("there is a cell")
}

/// Requires genblk to be ahead of `algorithm`, or at most `points` behind it, in `percent` of the cells.
fn mostly_as_good_as(algorithm: Algorithm, points: f64, percent: usize, cells: &[Cell]) -> Gate {
    let good = cells.iter().filter(|cell| cell.points_behind(algorithm) <= points).count();
    let all = cells.len();
    let message =
        format!("within {points} points of {} in {percent} % of the cells: in {good} of {all}", algorithm.name());
    Gate { passed: good * 100 >= all * percent, message }
}

fn describe(cell: &Cell) -> String {
    let level = if cell.level == Level::Raw { String::new() } else { format!(", {}", cell.level.name()) };
    format!("{} at {} %{level}", cell.workload, f64::from(cell.permille) / 10.0)
}

fn scan_gate() -> Gate {
    let mut worst = 0.0f64;
    let mut lru = 0.0f64;
    for hot_percent in [25, 50, 75] {
        for scanned_per_hot in [1, 4] {
            worst = worst.max(scan_cost(PolicyKind::S3Fifo, hot_percent, scanned_per_hot));
            lru = lru.max(scan_cost(PolicyKind::Lru, hot_percent, scanned_per_hot));
        }
    }
    let message = format!(
        "a scan of ten times the cache costs the hot set less than {SCAN_COST_MAX} points of hits: {worst:.2}, \
         LRU {lru:.2}"
    );
    Gate { passed: worst < SCAN_COST_MAX, message }
}

/// By how many points a scan of ten times the cache lowers the hit ratio of a hot set, which fills `hot_percent` of the
/// cache. The scan reads `scanned_per_hot` pages after each access to a hot page.
fn scan_cost(kind: PolicyKind, hot_percent: u32, scanned_per_hot: u32) -> f64 {
    const CACHE_PAGES: u32 = 2000;
    let hot_pages = u64::from(CACHE_PAGES * hot_percent / 100);
    let mut prng = Prng::new(7);
    let mut cache = MiniSimulation::new(kind, CACHE_PAGES);
    let accesses = 10 * CACHE_PAGES / scanned_per_hot;
    let mut hot_hits = |scanned_per_hot: u32, accesses: u32| {
        let mut scanned = hot_pages..;
        let mut hits = 0;
        for _ in 0..accesses {
            hits += u32::from(cache.access(PageNo(prng.below(hot_pages))));
            for page in scanned.by_ref().take(scanned_per_hot as usize) {
                cache.access(PageNo(page));
            }
        }
        hits
    };
    hot_hits(0, 10 * CACHE_PAGES);
    let before = hot_hits(0, accesses);
    let during = hot_hits(scanned_per_hot, accesses);
    100.0 * (f64::from(before) - f64::from(during)) / f64::from(accesses)
}

fn loop_gate() -> Gate {
    const CACHE_PAGES: u32 = 2000;
    let pages = CACHE_PAGES * 6 / 5;
    let trace: Vec<Access> = (0..20 * pages).map(|n| Access { page: n % pages, write: false }).collect();
    let hits = |algorithm: Algorithm| (trace.len() - algorithm.misses(&trace, pages, CACHE_PAGES)) as f64;
    let share = hits(Algorithm::Genblk) / hits(Algorithm::Opt);
    let message = format!(
        "a loop a fifth longer than the cache has at least {LOOP_OF_OPT_MIN} of OPT's hits: {share:.2}, LRU {:.2}",
        hits(Algorithm::Lru) / hits(Algorithm::Opt)
    );
    Gate { passed: share >= LOOP_OF_OPT_MIN, message }
}
