//! Miss ratios of replacement policies over synthetic traces.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "numbers here are sizes of small simulations and shares of them"
)]

pub mod gates;
mod lsm;
pub mod rivals;
pub mod table;
pub mod trace_file;
pub mod workloads;

use genblk::cache::PolicyKind;
use genblk::cache::policy::MiniSimulation;

use rivals::{Contender, Rival};
use workloads::Access;

/// What stands between the workload and genblk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Nothing: the guest opens its disk with `O_DIRECT`.
    Raw,
    /// The guest's own page cache, so many times genblk's; LRU. Writes go through it, reads that hit it stay there.
    BehindGuest(u32),
}

impl Level {
    /// Every level that is measured.
    pub const ALL: [Self; 3] = [Self::Raw, Self::BehindGuest(1), Self::BehindGuest(4)];

    /// For tables.
    pub fn name(self) -> String {
        match self {
            Self::Raw => "raw".to_string(),
            Self::BehindGuest(times) => format!("guest x{times}"),
        }
    }

    /// What is left of `trace` for a cache of `cache_pages`.
    fn filter(self, trace: &[Access], cache_pages: u32) -> Vec<Access> {
        let Self::BehindGuest(times) = self else {
            return trace.to_vec();
        };
        let mut guest = MiniSimulation::new(PolicyKind::Lru, cache_pages * times);
        let comes_through = |access: &Access| !Contender::access(&mut guest, *access) || access.write;
        trace.iter().copied().filter(comes_through).collect()
    }
}

/// A trace at a level with a cache of a size, and what every rival makes of it.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The workload's name.
    pub workload: String,
    /// Where genblk stands.
    pub level: Level,
    /// Size of the cache in thousandths of the footprint.
    pub permille: u32,
    /// Misses in percent of the accesses that come through to the cache, in the order of [`Rival::ALL`].
    miss_percent: [f64; Rival::ALL.len()],
}

impl Cell {
    /// Misses of one rival, in percent.
    pub fn of(&self, rival: Rival) -> f64 {
        self.miss_percent[rival as usize]
    }

    /// By how many points genblk misses more often than `rival`.
    pub fn behind(&self, rival: Rival) -> f64 {
        self.of(Rival::Ours) - self.of(rival)
    }
}

/// Measures every rival over a trace, at every level and with caches of so many thousandths of its footprint.
pub fn measure(workload: &str, trace: &[Access], sizes_permille: &[u32]) -> Vec<Cell> {
    let page_count = trace.iter().map(|access| access.page + 1).max().unwrap_or(0);
    let mut seen = vec![false; page_count as usize];
    trace.iter().for_each(|access| seen[access.page as usize] = true);
    let footprint = seen.iter().filter(|seen| **seen).count() as u64;
    let mut cells = Vec::new();
    for level in Level::ALL {
        for &permille in sizes_permille {
            let cache_pages = (footprint * u64::from(permille) / 1000).max(1) as u32;
            let left = level.filter(trace, cache_pages);
            let percent =
                |rival: Rival| 100.0 * rival.misses(&left, page_count, cache_pages) as f64 / left.len().max(1) as f64;
            let miss_percent = Rival::ALL.map(percent);
            cells.push(Cell { workload: workload.to_string(), level, permille, miss_percent });
        }
    }
    cells
}
