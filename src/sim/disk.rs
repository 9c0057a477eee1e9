//! The simulated disk: a volatile write cache over a platter, holes, faults, and power cuts.
//!
//! A sector holds a version number; 0 stands for zeros. What has been written since the last good Sync may or may not
//! be on the platter. A Sync that fails drops what it was to make durable, as kernels do: the data can still be read,
//! and a later Sync says nothing of it.

use crate::prng::Prng;

/// What was written to a sector since it was last durable.
#[derive(Clone, Copy, Debug)]
struct Written {
    version: u32,
    at: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Disk {
    now: Vec<u32>,
    platter: Vec<u32>,
    log: Vec<Vec<Written>>,
    /// A page that was never written, or has been unmapped.
    hole: Vec<bool>,
    /// Has space, although it may be a hole.
    reserved: Vec<bool>,
    /// Counts Syncs, so that a Sync knows what came before it.
    clock: u64,
}

const SECTORS_PER_PAGE: usize = 8;

impl Disk {
    /// `sectors` sectors; the pages for which `hole` says so are holes, the others hold version 0 as data.
    pub fn new(sectors: usize, hole: impl FnMut(usize) -> bool) -> Self {
        Self {
            now: vec![0; sectors],
            platter: vec![0; sectors],
            log: vec![Vec::new(); sectors],
            hole: (0..sectors.div_ceil(SECTORS_PER_PAGE)).map(hole).collect(),
            reserved: vec![false; sectors.div_ceil(SECTORS_PER_PAGE)],
            clock: 1,
        }
    }

    /// Reserves space for every page of a range.
    pub fn allocate(&mut self, first: usize, count: usize) {
        self.reserved[first / SECTORS_PER_PAGE..(first + count).div_ceil(SECTORS_PER_PAGE)].fill(true);
    }

    /// Whether every page of a range has its space.
    pub fn has_space(&self, first: usize, count: usize) -> bool {
        let pages = first / SECTORS_PER_PAGE..(first + count).div_ceil(SECTORS_PER_PAGE);
        pages.into_iter().all(|page| self.reserved[page] || !self.hole[page])
    }

    /// Number of sectors.
    pub fn sectors(&self) -> usize {
        self.now.len()
    }

    /// The version in a sector.
    pub fn read(&self, sector: usize) -> u32 {
        self.now[sector]
    }

    /// Writes a sector.
    pub fn write(&mut self, sector: usize, version: u32) {
        self.now[sector] = version;
        self.log[sector].push(Written { version, at: self.clock });
        self.hole[sector / SECTORS_PER_PAGE] = false;
    }

    /// Zeroes a range; whole pages become holes if `unmap`.
    pub fn zero(&mut self, first: usize, count: usize, unmap: bool) {
        for sector in first..first + count {
            let was_hole = self.hole[sector / SECTORS_PER_PAGE];
            self.write(sector, 0);
            self.hole[sector / SECTORS_PER_PAGE] = was_hole;
        }
        if unmap {
            for page in first.div_ceil(SECTORS_PER_PAGE)..self.hole.len() {
                if ((page + 1) * SECTORS_PER_PAGE).min(self.sectors()) > first + count {
                    break;
                }
                self.hole[page] = true;
                self.reserved[page] = false;
            }
        }
    }

    /// Runs of (sectors, hole) over a range that starts on a page.
    pub fn map(&self, first: usize, count: usize) -> Vec<(u64, bool)> {
        let mut runs: Vec<(u64, bool)> = Vec::new();
        for sector in first..first + count {
            let hole = self.hole[sector / SECTORS_PER_PAGE];
            match runs.last_mut() {
                Some(run) if run.1 == hole => run.0 += 1,
                _ => runs.push((1, hole)),
            }
        }
        runs
    }

    /// A Sync is submitted: returns what [`Disk::sync_ends`] wants to know.
    pub fn sync_begins(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The Sync that began at `began` ends.
    pub fn sync_ends(&mut self, began: u64, good: bool) {
        for (platter, log) in self.platter.iter_mut().zip(&mut self.log) {
            if let Some(last) = log.iter().rposition(|written| written.at < began) {
                if good {
                    *platter = log[last].version;
                }
                log.drain(..=last);
            }
        }
    }

    /// What a sector may hold if the power is cut now.
    pub fn after_power_cut(&self, sector: usize, prng: &mut Prng) -> u32 {
        let log = &self.log[sector];
        match prng.below(log.len() as u64 + 1) as usize {
            0 => self.platter[sector],
            n => log[n - 1].version,
        }
    }
}
