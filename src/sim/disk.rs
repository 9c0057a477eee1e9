//! The simulated disk: a volatile write cache in front of a durable medium, with holes and power cuts.
//!
//! Each sector holds a version number instead of bytes; version 0 means zeros. Until a Sync succeeds, a write may or
//! may not have reached the medium. The writes that a failed Sync loses depend on the disk ([`SyncFailure`]). A later
//! successful Sync never restores them.

use crate::prng::Prng;
use crate::units::{ExtentKind, Unmap};

/// A write to a sector that is not known to be durable.
#[derive(Clone, Copy, Debug)]
struct UnsyncedWrite {
    version: u32,
    /// The disk's clock at the time of the write.
    at: u64,
}

/// See the documentation of the module.
#[derive(Debug)]
pub(crate) struct SimulatedDisk {
    /// The version that a read returns, by sector.
    current: Vec<u32>,
    /// The version that is certainly on the medium, by sector.
    durable: Vec<u32>,
    /// By sector, oldest write first.
    unsynced: Vec<Vec<UnsyncedWrite>>,
    /// By page: never written, or unmapped since.
    hole: Vec<bool>,
    /// By page: whether space is allocated, even if it is a hole.
    allocated: Vec<bool>,
    /// Counts Syncs, to determine which writes precede a Sync.
    clock: u64,
}

const SECTORS_PER_PAGE: usize = 8;

/// The effect of a failed Sync on writes that are not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SyncFailure {
    /// The writes that it should have made durable never reach the medium, but reads still return them: like a kernel
    /// that drops its dirty pages after a failed write-back.
    DropsEarlier,
    /// The same, also for later writes.
    DropsAll,
    /// The disk was reset and its write cache is lost: reads return the contents of the medium.
    Resets,
}

impl SimulatedDisk {
    /// A disk of `sectors` sectors. Pages for which `hole` returns true are holes; the others hold version 0 as data.
    pub fn new(sectors: usize, hole: impl FnMut(usize) -> bool) -> Self {
        Self {
            current: vec![0; sectors],
            durable: vec![0; sectors],
            unsynced: vec![Vec::new(); sectors],
            hole: (0..sectors.div_ceil(SECTORS_PER_PAGE)).map(hole).collect(),
            allocated: vec![false; sectors.div_ceil(SECTORS_PER_PAGE)],
            clock: 1,
        }
    }

    /// Grows the disk to `sectors` sectors: the pages for which `hole` returns true are holes; the others, and the rest
    /// of the page with the old end, hold `version`. Returns the versions of the added sectors.
    pub fn grow(&mut self, sectors: usize, version: u32, hole: impl FnMut(usize) -> bool) -> Vec<u32> {
        let before = self.sectors();
        self.hole.extend((self.hole.len()..sectors.div_ceil(SECTORS_PER_PAGE)).map(hole));
        self.allocated.resize(self.hole.len(), false);
        if let Some(cut) = self.hole.get_mut(before / SECTORS_PER_PAGE)
            && !before.is_multiple_of(SECTORS_PER_PAGE)
            && version != 0
        {
            *cut = false;
        }
        let added = (before..sectors).map(|at| if self.hole[at / SECTORS_PER_PAGE] { 0 } else { version });
        let added: Vec<u32> = added.collect();
        self.current.extend(&added);
        self.durable.extend(&added);
        self.unsynced.resize(sectors, Vec::new());
        added
    }

    /// Cuts the disk to `sectors` sectors, a multiple of the page.
    pub fn cut(&mut self, sectors: usize) {
        self.current.truncate(sectors);
        self.durable.truncate(sectors);
        self.unsynced.truncate(sectors);
        self.hole.truncate(sectors / SECTORS_PER_PAGE);
        self.allocated.truncate(sectors / SECTORS_PER_PAGE);
    }

    /// Allocates space for every page of a range.
    pub fn allocate(&mut self, first: usize, count: usize) {
        self.allocated[first / SECTORS_PER_PAGE..(first + count).div_ceil(SECTORS_PER_PAGE)].fill(true);
    }

    /// Whether space is allocated for every page of a range.
    pub fn has_space(&self, first: usize, count: usize) -> bool {
        let pages = first / SECTORS_PER_PAGE..(first + count).div_ceil(SECTORS_PER_PAGE);
        pages.into_iter().all(|page| self.allocated[page] || !self.hole[page])
    }

    /// Number of sectors.
    pub fn sectors(&self) -> usize {
        self.current.len()
    }

    /// The version that a read of the sector returns.
    pub fn read(&self, sector: usize) -> u32 {
        self.current[sector]
    }

    /// The version that is certainly on the medium.
    pub fn durable(&self, sector: usize) -> u32 {
        self.durable[sector]
    }

    /// Writes a sector.
    pub fn write(&mut self, sector: usize, version: u32) {
        self.current[sector] = version;
        self.unsynced[sector].push(UnsyncedWrite { version, at: self.clock });
        self.hole[sector / SECTORS_PER_PAGE] = false;
    }

    /// Zeroes a range; if unmap is allowed, its whole pages become holes.
    pub fn zero(&mut self, first: usize, count: usize, unmap: Unmap) {
        for sector in first..first + count {
            let was_hole = self.hole[sector / SECTORS_PER_PAGE];
            self.write(sector, 0);
            self.hole[sector / SECTORS_PER_PAGE] = was_hole;
        }
        if unmap == Unmap::Allowed {
            for page in first.div_ceil(SECTORS_PER_PAGE)..self.hole.len() {
                if ((page + 1) * SECTORS_PER_PAGE).min(self.sectors()) > first + count {
                    break;
                }
                self.hole[page] = true;
                self.allocated[page] = false;
            }
        }
    }

    /// A failed zero or discard has destroyed the sector's contents.
    pub fn tear(&mut self, sector: usize) {
        (self.current[sector], self.durable[sector]) = (0, 0);
        self.unsynced[sector].clear();
    }

    /// Runs of (sectors, kind) over a range that starts on a page boundary; the last one in full.
    pub fn map(&self, first: usize, count: usize) -> Vec<(u64, ExtentKind)> {
        let mut runs: Vec<(u64, ExtentKind)> = Vec::new();
        for sector in first..self.sectors() {
            let kind = if self.hole[sector / SECTORS_PER_PAGE] { ExtentKind::Hole } else { ExtentKind::Data };
            match runs.last_mut() {
                Some(run) if run.1 == kind => run.0 += 1,
                Some(_) if sector >= first + count => break,
                _ => runs.push((1, kind)),
            }
        }
        runs
    }

    /// Starts a Sync; returns the time that [`SimulatedDisk::complete_sync`] or [`SimulatedDisk::fail_sync`] takes.
    pub fn begin_sync(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The Sync that started at `began` succeeds: earlier writes are durable.
    pub fn complete_sync(&mut self, began: u64) {
        for (durable, unsynced) in self.durable.iter_mut().zip(&mut self.unsynced) {
            if let Some(last) = drop_earlier(unsynced, began) {
                *durable = last.version;
            }
        }
    }

    /// The Sync that started at `began` fails.
    pub fn fail_sync(&mut self, began: u64, failure: SyncFailure) {
        match failure {
            SyncFailure::DropsEarlier => {
                for unsynced in &mut self.unsynced {
                    drop_earlier(unsynced, began);
                }
            }
            SyncFailure::DropsAll => self.unsynced.iter_mut().for_each(Vec::clear),
            SyncFailure::Resets => self.reset(),
        }
    }

    /// The disk loses its write cache: every sector returns to its last durable version.
    pub fn reset(&mut self) {
        for (sector, unsynced) in self.unsynced.iter_mut().enumerate() {
            if !unsynced.is_empty() {
                unsynced.clear();
                self.current[sector] = self.durable[sector];
                if self.current[sector] != 0 {
                    self.hole[sector / SECTORS_PER_PAGE] = false;
                }
            }
        }
    }

    /// Cuts the power; `left` remains. Reservations of space are lost.
    pub fn cut_power(&mut self, left: &[u32]) {
        self.unsynced.iter_mut().for_each(Vec::clear);
        self.current.copy_from_slice(left);
        self.durable.copy_from_slice(left);
        self.allocated.fill(false);
        for (hole, page) in self.hole.iter_mut().zip(left.chunks(SECTORS_PER_PAGE)) {
            *hole &= page.iter().all(|version| *version == 0);
        }
    }

    /// A version that the sector may hold after a power cut now: the durable one, or that of an unsynced write.
    pub fn after_power_cut(&self, sector: usize, prng: &mut Prng) -> u32 {
        let unsynced = &self.unsynced[sector];
        match prng.below(unsynced.len() as u64 + 1) as usize {
            0 => self.durable[sector],
            n => unsynced[n - 1].version,
        }
    }
}

/// Drops the writes before `time`; returns the last of them.
fn drop_earlier(writes: &mut Vec<UnsyncedWrite>, time: u64) -> Option<UnsyncedWrite> {
    let last = writes.iter().rposition(|write| write.at < time)?;
    writes.drain(..=last).next_back()
}
