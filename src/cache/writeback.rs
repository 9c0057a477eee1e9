//! When dirty pages are written back, and in which order (genfs' syncer, and WOW: Gill and Modha, FAST 2005).
//!
//! A cursor sweeps the dirty set in ascending order and wraps around (CSCAN). It skips a 64 KiB group once if a guest
//! wrote to it since the cursor last passed, so that hot pages are written less often. Sweeps do not skip if they serve
//! a FLUSH, old pages, or a reclaim that finds no clean page, if the image is idle, or if they run ahead of a FLUSH.
//!
//! Ageing needs no timestamp per page: the current epoch is closed twice per age limit, and the pages of closed epochs
//! are written. Nothing runs while every page is clean.

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{Epoch, PageId, PageNo, Tick, low_u32};

use super::pages::{DirtySet, FAILED, GROUP_PAGES, Group, READING, RECENT};
use super::{PageCache, REGION_PAGES};

/// Most writes in flight.
const DEPTH_MAX: u32 = 32;
/// Most writes in flight for a sweep that no request waits for: half as many, so that the operations of requests wait
/// less.
const DEPTH_UNAWAITED: u32 = DEPTH_MAX / 2;
/// Epochs are closed this many times per age limit: a page waits up to half the limit for its epoch to end, and is
/// written in the other half.
const EPOCHS_PER_AGE: u64 = 2;
/// Without guest I/O for this long, write-back runs at full speed.
const IDLE_US: u64 = 100_000;
/// Most groups that a sweep examines, unless it is a background sweep: a bound on the time of one pump.
const SWEEP_GROUPS: usize = 512;
/// Fewest groups that a background sweep examines. While guests write, every pump runs one such sweep, and the cursor
/// must return to a hot group late, or the group is written too often.
const SWEEP_GROUPS_COLD: usize = 8;
/// A round of the cursor takes about this many background sweeps if thousands of groups are dirty. In a workload that
/// writes each group once, sweeps of only [`SWEEP_GROUPS_COLD`] groups would starve the store.
const SWEEPS_PER_ROUND: usize = 64;

/// The state of the sweeps.
#[derive(Debug, Default)]
pub(super) struct Writeback {
    /// The group at which the next sweep starts.
    cursor: u64,
    /// Background write-back has exceeded its start threshold, and has not yet fallen to its stop threshold.
    running: bool,
    /// A reclaim found no clean page.
    pub pressure: bool,
    /// Write-back has work for another turn: a sweep ended at its bound, or something changed that it waits for.
    needs_turn: bool,
    /// Groups examined since a write was last started.
    groups_without_progress: usize,
    /// A page could not be completed for its write: no frame was free, or the store's map was unknown.
    pub lacks_frame: bool,
    last_guest_io: Tick,
    /// The last epoch that was closed for its age and is not yet written.
    aged: Option<Epoch>,
    next_aging: Tick,
    /// The last page of each region that a sequential writer has filled.
    filled_region_ends: Vec<PageNo>,
}

impl Writeback {
    /// An empty state. The contents of the image age from now on.
    pub fn new(age_us: u64) -> Self {
        let mut writeback = Self::default();
        writeback.start_aging(Tick::ZERO, age_us);
        writeback
    }

    /// A page that could not be written back before may be writable now.
    pub fn reset_progress(&mut self) {
        self.groups_without_progress = 0;
    }

    /// Frames became free: pages that lacked one are retried, in another turn.
    pub fn made_room(&mut self) {
        if std::mem::take(&mut self.lacks_frame) {
            self.reset_progress();
            self.request_turn();
        }
    }

    /// Write-back has work for another turn, immediately.
    pub fn request_turn(&mut self) {
        self.needs_turn = true;
    }

    /// A guest sent a request: the image is not idle.
    pub fn note_guest_io(&mut self, now: Tick) {
        self.last_guest_io = now;
    }

    /// The first page becomes dirty: its age counts from now.
    pub fn start_aging(&mut self, now: Tick, age_us: u64) {
        self.next_aging = now.plus_us(age_us / EPOCHS_PER_AGE);
    }

    /// A guest wrote a page. If that fills a region, the next pump writes the region.
    pub fn note_write(&mut self, dirty: &DirtySet, no: PageNo) {
        if no.0 % REGION_PAGES == REGION_PAGES - 1 {
            let first = PageNo(no.0 + 1 - REGION_PAGES);
            if (0..REGION_PAGES / GROUP_PAGES).all(|group| dirty.group_is_full(first.plus(group * GROUP_PAGES))) {
                self.filled_region_ends.push(no);
            }
        }
    }
}

/// Which dirty pages a sweep takes.
#[derive(Clone, Copy, Debug)]
enum Scope {
    /// Those of closed epochs up to this one, recent or not.
    UpTo(Epoch),
    /// All, but recent groups are skipped once.
    Cold,
    /// All.
    All,
    /// All, ahead of a FLUSH, at the guest's rate, which must not count as the store's bandwidth.
    Ahead,
}

impl PageCache {
    /// Starts the write-back that is due.
    pub(super) fn write_back(&mut self) {
        self.writeback.needs_turn = false;
        if self.health.stopped().is_some() || self.freeze.is_on() {
            return;
        }
        self.age();
        if self.health.may_retry(self.now) && !self.flushing.may_retry() {
            self.flushing.request_sync();
        }
        if self.pages.dirty().dirty_pages() == 0 {
            self.writeback.running = false;
            self.writeback.pressure = false;
            self.writeback.filled_region_ends.clear();
            return;
        }
        if let Some(upto) = self.flushing.unwritten_up_to() {
            self.sweep(Scope::UpTo(upto), DEPTH_MAX);
        }
        // A stream that competes with a FLUSH would otherwise take half of the disk's bandwidth and double the time of
        // the FLUSH.
        let flush_needs_store = self.writeback.needs_turn || self.store_ops.writes() >= DEPTH_MAX;
        if self.flushing.unwritten_up_to().is_none() || !flush_needs_store {
            for last in std::mem::take(&mut self.writeback.filled_region_ends) {
                self.write_behind(last);
            }
        }
        if let Some(upto) = self.writeback.aged {
            self.sweep(Scope::UpTo(upto), DEPTH_UNAWAITED);
        }
        self.write_back_in_background();
    }

    /// Writes the region that ends with page `last`: in several clusters if the store's longest operation is shorter.
    fn write_behind(&mut self, last: PageNo) {
        let mut next = PageNo(last.0 + 1 - REGION_PAGES);
        while next <= last {
            let end = self.pages.find(next).and_then(|id| self.put_cluster(id));
            if end.is_some() {
                self.throttle.write_started(self.now);
            }
            next = end.unwrap_or(next.plus(1));
        }
    }

    /// Write-back that no request waits for:
    ///
    /// - at full speed while guests are idle or frames run out;
    /// - between the thresholds in proportion to the dirty pages: it reaches full speed at the setpoint of the
    ///   throttle, before the throttle delays the first write;
    /// - otherwise ahead of the next FLUSH, if `eager.rs` finds it worthwhile, and no FLUSH in progress needs the
    ///   store.
    fn write_back_in_background(&mut self) {
        let idle = self.now.since_us(self.writeback.last_guest_io) >= IDLE_US;
        let cost = self.write_back_cost();
        let start = self.throttle.start_threshold_pages();
        if cost > start {
            self.writeback.running = true;
        } else if cost < self.throttle.stop_pages() {
            self.writeback.running = false;
        }
        // Stalled requests wait for room, and no write in flight will free any.
        let starving = self.stalled.for_room() && self.store_ops.writes() == 0;
        if idle || std::mem::take(&mut self.writeback.pressure) || starving {
            self.sweep(Scope::All, DEPTH_MAX);
        } else if self.writeback.running {
            let over = u64::from(cost.saturating_sub(start));
            let room = u64::from((self.throttle.setpoint_pages() - start).max(1));
            let depth = 1 + low_u32((u64::from(DEPTH_MAX - 1) * over / room).min(u64::from(DEPTH_MAX - 1)));
            self.sweep(Scope::Cold, depth);
        } else if self.eager.is_on() && self.flushing.no_flush_waits() && self.health.may_retry(self.now) {
            self.sweep(Scope::Ahead, DEPTH_UNAWAITED);
        }
    }

    /// The cost of writing all pages that are dirty or under write-back, in the unit of the dirty limit.
    pub(super) fn write_back_cost(&self) -> u32 {
        let dirty = self.pages.dirty();
        let operations =
            dirty.runs().max(dirty.dirty_pages() / self.settings.cluster_pages_max) + self.store_ops.writes();
        self.throttle.cost(dirty.dirty_or_writeback_pages(), operations)
    }

    /// Closes the epoch [`EPOCHS_PER_AGE`] times per age limit. Requests a Sync when an aged epoch is written.
    fn age(&mut self) {
        let oldest = self.pages.dirty().oldest();
        if let Some(aged) = self.writeback.aged
            && oldest.is_none_or(|oldest| !oldest.at_or_before(aged))
        {
            self.writeback.aged = None;
            self.flushing.request_sync();
        }
        if self.now >= self.writeback.next_aging {
            let was_slow = self.writeback.aged.is_some();
            if self.pages.dirty().dirty_pages() > 0 {
                self.writeback.aged = Some(self.pages.close_epoch());
            }
            // Pages written back for another reason age too, until a Sync covers them. That Sync follows anyway once
            // the aged epoch is written, unless that takes long.
            if self.unsynced_ages() && (self.writeback.aged.is_none() || was_slow) {
                self.flushing.request_sync();
            }
            self.writeback.next_aging = self.now.plus_us(self.settings.dirty_age_us / EPOCHS_PER_AGE);
        }
    }

    /// Writes dirty pages in scope, in ascending order from the cursor, until `depth` writes are in flight.
    fn sweep(&mut self, scope: Scope, depth: u32) {
        let mut wrapped = false;
        let start = self.writeback.cursor;
        let cold = matches!(scope, Scope::Cold);
        let groups_max = match scope {
            Scope::Cold => SWEEP_GROUPS_COLD.max(self.pages.dirty().groups() / SWEEPS_PER_ROUND),
            Scope::UpTo(_) | Scope::All | Scope::Ahead => SWEEP_GROUPS,
        };
        for _ in 0..groups_max {
            if self.store_ops.writes() >= depth {
                return;
            }
            let Some((number, group)) = self.pages.dirty().next_group(self.writeback.cursor) else {
                if wrapped {
                    return;
                }
                wrapped = true;
                self.writeback.cursor = 0;
                continue;
            };
            if wrapped && number > start {
                return;
            }
            self.writeback.cursor = number + 1;
            self.writeback.groups_without_progress += 1;
            if !(cold && self.take_recently_written(number, group)) {
                self.sweep_group(number, group, scope, depth);
            }
        }
        // A background sweep continues at the next request or when guests are idle. The others continue immediately,
        // until a whole round of the cursor has started no write. A background sweep does so too while the completions
        // of writes are delayed, because the next request may come only after the sweep has made room: its first round
        // skips recent groups, its second does not.
        let delays = cold && self.write_back_cost() > self.throttle.setpoint_pages();
        let rounds = if delays { 2 } else { usize::from(!cold) };
        self.writeback.needs_turn |= self.writeback.groups_without_progress < rounds * self.pages.dirty().groups();
    }

    /// Whether a guest wrote a page of the group since the cursor last passed. Clears that mark, since the cursor
    /// passes now.
    fn take_recently_written(&mut self, number: u64, group: Group) -> bool {
        let (mut recent, mut guess) = (false, PageId::NONE);
        for no in group.pages(number) {
            if let Some(id) = self.pages.find_near(guess, no) {
                recent |= self.pages.take_mark(id, RECENT);
                guess = id.next();
            }
        }
        recent
    }

    /// Writes the pages of one group that are in scope. The cursor moves past a cluster that extends beyond the group.
    fn sweep_group(&mut self, number: u64, group: Group, scope: Scope, depth: u32) {
        for no in group.pages(number) {
            if self.store_ops.writes() >= depth {
                self.writeback.cursor = number;
                return;
            }
            let Some(id) = self.pages.find(no) else { continue };
            let in_scope = match scope {
                Scope::UpTo(upto) => self.pages[id].epoch.at_or_before(upto),
                Scope::Cold | Scope::All | Scope::Ahead => true,
            };
            if in_scope && let Some(end) = self.put_cluster(id) {
                if !matches!(scope, Scope::Ahead) {
                    self.throttle.write_started(self.now);
                }
                self.writeback.groups_without_progress = 0;
                self.writeback.cursor = self.writeback.cursor.max(end.0 / GROUP_PAGES);
            }
        }
    }

    /// Whether the page has dirty sectors that may be written now (I6).
    pub(super) fn can_write_back(&self, id: PageId) -> bool {
        let page = &self.pages[id];
        !page.dirty.is_empty()
            && page.writing.is_empty()
            && page.writers == 0
            && !page.is(READING)
            && (!page.is(FAILED) || self.health.may_retry(self.now) && self.flushing.may_retry())
            && !self.ranges.contain(page.no())
    }

    /// Whether data on the store is covered by no Sync.
    fn unsynced_ages(&self) -> bool {
        self.flushing.has_unsynced() && !planted(PlantedBug::AgeForgetsUnsynced)
    }

    /// When write-back next has work without a request or a completion.
    pub(super) fn writeback_deadline(&self) -> Option<Tick> {
        if self.freeze.is_on() {
            return self.freeze.until();
        }
        [self.freeze.until(), self.next_write_back()].into_iter().flatten().min()
    }

    fn next_write_back(&self) -> Option<Tick> {
        if self.writeback.needs_turn {
            return Some(self.now);
        }
        if self.health.stopped().is_some() {
            return None;
        }
        let retry = self.health.retry_at().filter(|&at| at > self.now);
        let aging = Some(self.writeback.next_aging).filter(|&at| at > self.now);
        if self.pages.dirty().dirty_pages() == 0 {
            let aging = aging.filter(|_| self.unsynced_ages());
            let sync = retry.filter(|_| self.flushing.needs_sync() || self.ranges.is_redoing_zeroes());
            let space = retry.filter(|_| self.health.waits_for_space());
            return [sync, space, aging, self.hold_ends()].into_iter().flatten().min();
        }
        let idle_at = self.writeback.last_guest_io.plus_us(IDLE_US);
        let idle = (idle_at > self.now).then_some(idle_at);
        [Some(self.writeback.next_aging), idle, retry, self.hold_ends()].into_iter().flatten().min()
    }
}
