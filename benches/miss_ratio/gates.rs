//! What is demanded of genblk's policy.

use genblk::cache::PolicyKind;
use genblk::cache::policy::MiniSimulation;
use genblk::units::PageNo;

use super::rivals::Rival;
use super::workloads::Access;
use super::{Cell, Level};
use crate::policy_report::Gate;
use crate::prng::Prng;

/// How many points behind LRU genblk may be. That is the price of finding out which share is right, and grows as traces get
/// shorter; and of two policies that do equally well either may be ahead by chance.
#[derive(Clone, Copy, Debug)]
pub struct BehindLru {
    /// In any cell.
    pub max: f64,
    /// In [`AS_GOOD_AS_LRU_PERCENT`] of the cells: no more than chance makes of it.
    pub by_chance: f64,
}

/// So many cells in a hundred have to be as good as with LRU.
const AS_GOOD_AS_LRU_PERCENT: usize = 95;
/// This much behind ARC is as good as ARC.
const BEHIND_ARC: f64 = 1.0;
/// So many cells in a hundred have to be as good.
const AS_GOOD_AS_ARC_PERCENT: usize = 80;
/// What a scan may cost the hot set, in points of its hits.
const SCAN_COST_MAX: f64 = 2.0;
/// Share of OPT's hits in a loop a fifth longer than the cache, where LRU has none.
const LOOP_OF_OPT_MIN: f64 = 0.5;

/// Judges the cells, which must not be empty.
pub fn judge(cells: &[Cell], behind_lru: BehindLru) -> Vec<Gate> {
    vec![
        never_far_behind_lru(cells, behind_lru.max),
        mostly_as_good_as(Rival::Lru, behind_lru.by_chance, AS_GOOD_AS_LRU_PERCENT, cells),
        mostly_as_good_as(Rival::Arc, BEHIND_ARC, AS_GOOD_AS_ARC_PERCENT, cells),
        scan_gate(),
        loop_gate(),
    ]
}

fn never_far_behind_lru(cells: &[Cell], behind_max: f64) -> Gate {
    let worst = worst_against(cells, Rival::Ours);
    let behind = worst.behind(Rival::Lru);
    let arc = worst_against(cells, Rival::Arc);
    let says = format!(
        "never more than {behind_max} points behind LRU: at worst {behind:.2} ({}), ARC {:.2} ({})",
        place(worst),
        arc.of(Rival::Arc) - arc.of(Rival::Lru),
        place(arc)
    );
    Gate { holds: behind <= behind_max, says }
}

/// The cell where `rival` does worst against LRU.
fn worst_against(cells: &[Cell], rival: Rival) -> &Cell {
    let behind = |cell: &Cell| cell.of(rival) - cell.of(Rival::Lru);
    cells.iter().max_by(|a, b| behind(a).total_cmp(&behind(b))).expect("something was measured")
}

/// Demands that genblk is within `points` of `rival`, or ahead, in `percent` of the cells.
fn mostly_as_good_as(rival: Rival, points: f64, percent: usize, cells: &[Cell]) -> Gate {
    let good = cells.iter().filter(|cell| cell.behind(rival) <= points).count();
    let all = cells.len();
    let says = format!("within {points} points of {} in {percent} % of the cells: in {good} of {all}", rival.name());
    Gate { holds: good * 100 >= all * percent, says }
}

fn place(cell: &Cell) -> String {
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
    let says = format!(
        "a scan of ten times the cache costs the hot set less than {SCAN_COST_MAX} points: {worst:.2}, LRU {lru:.2}"
    );
    Gate { holds: worst < SCAN_COST_MAX, says }
}

/// What a scan of ten times the cache costs a hot set that fills `hot_percent` of it, in points of the hot set's hits.
/// After each access to a hot page the scan reads `scanned_per_hot` pages.
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
    let hits = |rival: Rival| (trace.len() - rival.misses(&trace, pages, CACHE_PAGES)) as f64;
    let share = hits(Rival::Ours) / hits(Rival::Opt);
    let says = format!(
        "a loop a fifth longer than the cache has {} of OPT's hits: {share:.2}, LRU {:.2}",
        LOOP_OF_OPT_MIN,
        hits(Rival::Lru) / hits(Rival::Opt)
    );
    Gate { holds: share >= LOOP_OF_OPT_MIN, says }
}
