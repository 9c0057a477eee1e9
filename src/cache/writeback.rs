//! When dirty pages are written back, and in which order (genfs' syncer, and WOW: Gill and Modha, FAST 2005).
//!
//! A cursor sweeps the dirty set upwards and starts again at the bottom (CSCAN); a 64 KiB group that was written since
//! the cursor last passed is skipped once, so that what is hot is written less often. FLUSH, old age, a reclaim that
//! finds no clean page, idleness, and what goes ahead of a FLUSH override the skip.
//!
//! Age needs no timestamps: every half of the age limit the current epoch is closed, and what belongs to closed epochs
//! is written. Nothing runs while all is clean.

use crate::units::{Epoch, PageId, PageNo, Tick, low_u32};

use super::PageCache;
use super::pages::{DirtySet, GROUP_PAGES, Group};
use super::pages::{FAILED, READING, RECENT};

/// Pages of an aligned piece that a sequential writer fills and that is then written at once (1 MiB).
const BEHIND_PAGES: u64 = 256;
/// Writes in op at full speed.
const DEPTH_MAX: u32 = 32;
/// Without guest I/O for this long, write-back runs at full speed.
const IDLE_US: u64 = 100_000;
/// Groups looked at in one sweep that somebody waits for.
const SWEEP_GROUPS: usize = 512;
/// Groups looked at in one sweep of the background, and the sweeps that a round of the cursor takes at least. Each pump
/// while guests write comes by here, and a group that is hot is only worth writing when the cursor has been away from it
/// for a while; but where thousands of groups are dirty and each was written once, few at a time would starve the store.
const SWEEP_GROUPS_COLD: usize = 8;
const SWEEPS_PER_ROUND: usize = 64;

/// The state of the sweeps.
#[derive(Debug, Default)]
pub(super) struct Writeback {
    cursor: u64,
    /// Between the start and the stop threshold.
    running: bool,
    /// A reclaim found no clean page.
    pub pressure: bool,
    /// A sweep ended at its bound.
    more: bool,
    /// Groups looked at since one had something that could go.
    groups_without_progress: usize,
    note_guest_io: Tick,
    aged: Option<Epoch>,
    next_aging: Tick,
    /// Pages round which a sequential writer has filled an aligned 1 MiB.
    behind: Vec<PageNo>,
}

impl Writeback {
    /// A guest asked for something.
    pub fn note_guest_io(&mut self, now: Tick) {
        self.note_guest_io = now;
    }

    /// The first page becomes dirty: its age counts from now.
    pub fn ages_from(&mut self, now: Tick, age_us: u64) {
        self.next_aging = now.plus_us(age_us / 2);
    }

    /// A page has been written by a guest: a filled 1 MiB is written at once.
    pub fn note_write(&mut self, dirty: &DirtySet, no: PageNo) {
        if no.0 % BEHIND_PAGES == BEHIND_PAGES - 1 {
            let first = PageNo(no.0 + 1 - BEHIND_PAGES);
            if (0..BEHIND_PAGES / GROUP_PAGES).all(|group| dirty.group_is_full(first.plus(group * GROUP_PAGES))) {
                self.behind.push(no);
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
    /// All, as they come: how fast the store takes them says nothing of how fast it could.
    Ahead,
}

impl PageCache {
    /// Starts the write-back that is due.
    pub(super) fn write_back(&mut self) {
        self.writeback.more = false;
        if self.health.stopped().is_some() {
            return;
        }
        self.age();
        if self.pages.dirty().dirty_pages() == 0 {
            self.writeback.running = false;
            self.writeback.pressure = false;
            self.writeback.behind.clear();
            return;
        }
        for last in std::mem::take(&mut self.writeback.behind) {
            self.write_behind(last);
        }
        if let Some(upto) = self.flushing.unwritten_upto() {
            self.sweep(Scope::UpTo(upto), DEPTH_MAX);
        }
        if let Some(upto) = self.writeback.aged {
            self.sweep(Scope::UpTo(upto), DEPTH_MAX / 2);
        }
        self.write_back_in_background();
    }

    /// Writes the aligned 1 MiB that ends with page `last`, in as many clusters as the store's longest operation makes of it.
    fn write_behind(&mut self, last: PageNo) {
        let mut next = PageNo(last.0 + 1 - BEHIND_PAGES);
        while next <= last {
            let end = self.pages.find(next).and_then(|id| self.put_cluster(id));
            if end.is_some() {
                self.throttle.write_started(self.now);
            }
            next = end.unwrap_or(next.plus(1));
        }
    }

    /// Write-back that nobody waits for: at full speed while guests are idle or frames run out, else in proportion to
    /// how far what may be dirty is used up, and at full speed again before the first write is held back; else ahead of the
    /// next FLUSH, where that pays, and not while one is under way, which has more use for the store.
    fn write_back_in_background(&mut self) {
        let idle = self.now.since_us(self.writeback.note_guest_io) >= IDLE_US;
        let dirty_or_writeback = self.pages.dirty().dirty_or_writeback_pages();
        let start = self.throttle.start_pages();
        if dirty_or_writeback > start {
            self.writeback.running = true;
        } else if dirty_or_writeback < self.throttle.stop_pages() {
            self.writeback.running = false;
        }
        // Nothing under way would bring the room that is waited for.
        let starving = self.stalled.for_room() && self.store_ops.writes() == 0;
        if idle || std::mem::take(&mut self.writeback.pressure) || starving {
            self.sweep(Scope::All, DEPTH_MAX);
        } else if self.writeback.running {
            let over = u64::from(dirty_or_writeback.saturating_sub(start));
            let room = u64::from((self.throttle.setpoint_pages() - start).max(1));
            let depth = 1 + low_u32((u64::from(DEPTH_MAX - 1) * over / room).min(u64::from(DEPTH_MAX - 1)));
            self.sweep(Scope::Cold, depth);
        } else if self.eager.is_on() && self.flushing.none_waits() && self.health.may_retry(self.now) {
            self.sweep(Scope::Ahead, DEPTH_MAX / 2);
        }
    }

    /// Closes the current epoch every half of the age limit; when an aged epoch is written, asks for a Sync.
    fn age(&mut self) {
        let oldest = self.pages.dirty().oldest();
        if let Some(aged) = self.writeback.aged
            && oldest.is_none_or(|oldest| !oldest.at_or_before(aged))
        {
            self.writeback.aged = None;
            self.flushing.want_sync();
        }
        if self.now >= self.writeback.next_aging {
            if self.pages.dirty().dirty_pages() > 0 {
                self.writeback.aged = Some(self.pages.close_epoch());
            }
            self.writeback.next_aging = self.now.plus_us(self.settings.dirty_age_us / 2);
        }
    }

    /// Sends dirty pages in scope to the store, upwards from the cursor, until `depth` writes are in op.
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
            if !(cold && self.was_recent(number, group)) {
                self.sweep_group(number, group, scope, depth);
            }
        }
        // A sweep of the background goes on at the next request or when guests are idle; others go on at once, until they
        // have been round without finding anything that can go.
        self.writeback.more |= !cold && self.writeback.groups_without_progress < self.pages.dirty().groups();
    }

    /// Whether a page of the group was written since the cursor last passed, which it does now.
    fn was_recent(&mut self, number: u64, group: Group) -> bool {
        let mut recent = false;
        let mut previous = None;
        for no in group.pages(number) {
            previous = self.pages.find_after(previous, no);
            if let Some(id) = previous {
                recent |= self.pages.take_mark(id, RECENT);
            }
        }
        recent
    }

    /// Writes the pages of one group that are in scope; the cursor moves past a cluster that reaches further.
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

    /// Whether the page may go to the store now.
    pub(super) fn can_be_put(&self, id: PageId) -> bool {
        let page = &self.pages[id];
        !page.dirty.is_empty()
            && page.writing.is_empty()
            && page.writers == 0
            && !page.is(READING)
            && (!page.is(FAILED) || self.health.may_retry(self.now))
            && !self.ranges.block(page.no())
    }

    /// When write-back has something to do although nothing happens.
    pub(super) fn writeback_deadline(&self) -> Option<Tick> {
        if self.writeback.more {
            return Some(self.now);
        }
        if self.health.stopped().is_some() {
            return None;
        }
        let retry = self.health.retry_at().filter(|&at| at > self.now);
        if self.pages.dirty().dirty_pages() == 0 {
            let sync = retry.filter(|_| self.flushing.sync_is_awaited() || self.ranges.redoing());
            let space = retry.filter(|_| self.health.waits_for_space());
            return [sync, space, self.hold_ends()].into_iter().flatten().min();
        }
        let idle_at = self.writeback.note_guest_io.plus_us(IDLE_US);
        let idle = (idle_at > self.now).then_some(idle_at);
        [Some(self.writeback.next_aging), idle, retry, self.hold_ends()].into_iter().flatten().min()
    }
}
