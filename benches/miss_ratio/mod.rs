//! Miss ratios of replacement policies over synthetic traces.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "numbers here are sizes of small simulations and shares of them"
)]

pub mod algorithms;
pub mod gates;
mod lsm;
pub mod table;
pub mod trace;
pub mod trace_file;
pub mod workloads;

use genblk::cache::PolicyKind;
use genblk::cache::policy::MiniSimulation;

use algorithms::{Algorithm, Simulation};
use trace::Access;

/// The cache of the guest, between the workload and genblk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// None: the guest opens its disk with `O_DIRECT`.
    Raw,
    /// An LRU cache this many times as large as genblk's. It absorbs reads that hit it, and passes writes on.
    BehindGuest(u32),
}

impl Level {
    /// Every level, in the order of the table.
    pub const ALL: [Self; 3] = [Self::Raw, Self::BehindGuest(1), Self::BehindGuest(4)];

    /// Its name in tables.
    pub fn name(self) -> String {
        match self {
            Self::Raw => "raw".to_string(),
            Self::BehindGuest(times) => format!("guest x{times}"),
        }
    }

    /// The part of `trace` that reaches genblk, if genblk has a cache of `cache_pages`.
    fn filter(self, trace: &[Access], cache_pages: u32) -> Vec<Access> {
        let Self::BehindGuest(times) = self else {
            return trace.to_vec();
        };
        let mut guest = MiniSimulation::new(PolicyKind::Lru, cache_pages * times);
        let passes = |access: &Access| !Simulation::access(&mut guest, *access) || access.write;
        trace.iter().copied().filter(passes).collect()
    }
}

/// The miss ratios of every algorithm, for one workload, level and cache size.
#[derive(Clone, Debug)]
pub struct Cell {
    pub workload: String,
    pub level: Level,
    /// Cache size in thousandths of the footprint.
    pub permille: u32,
    /// Misses in percent of the accesses that reach genblk, in the order of [`Algorithm::ALL`].
    miss_percent: [f64; Algorithm::ALL.len()],
}

impl Cell {
    /// The miss ratio of one algorithm, in percent.
    pub fn of(&self, algorithm: Algorithm) -> f64 {
        self.miss_percent[algorithm as usize]
    }

    /// By how many percentage points genblk's miss ratio exceeds that of `algorithm`.
    pub fn points_behind(&self, algorithm: Algorithm) -> f64 {
        self.of(Algorithm::Genblk) - self.of(algorithm)
    }
}

/// Measures every algorithm over a trace, at every level, with cache sizes in thousandths of the trace's footprint.
pub fn measure(workload: &str, trace: &[Access], sizes_permille: &[u32]) -> Vec<Cell> {
    let page_count = trace.iter().map(|access| access.page + 1).max().unwrap_or(0);
    let mut seen = vec![false; page_count as usize];
    trace.iter().for_each(|access| seen[access.page as usize] = true);
    let footprint = seen.iter().filter(|seen| **seen).count() as u64;
    let mut cells = Vec::new();
    for level in Level::ALL {
        for &permille in sizes_permille {
            let cache_pages = (footprint * u64::from(permille) / 1000).max(1) as u32;
            let accesses = level.filter(trace, cache_pages);
            let percent = |algorithm: Algorithm| {
                100.0 * algorithm.misses(&accesses, page_count, cache_pages) as f64 / accesses.len().max(1) as f64
            };
            let miss_percent = Algorithm::ALL.map(percent);
            cells.push(Cell { workload: workload.to_string(), level, permille, miss_percent });
        }
    }
    cells
}
