//! The dirty set: the dirty pages in the order of the image, and the epochs that are not yet on the store.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};

use crate::units::{Epoch, PageNo};

use super::page::{FAILED, Page};
use crate::cache::REGION_PAGES;

/// Pages of a group (64 KiB): one bit each in a `u16`.
pub(in crate::cache) const GROUP_PAGES: u64 = 16;

/// The attributes of a page that the dirty set counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageTally {
    dirty: Option<Epoch>,
    dirty_or_writeback: bool,
    unstable: bool,
    failed: bool,
}

impl PageTally {
    /// The tally of a page that is not in memory.
    pub const ABSENT: Self = Self { dirty: None, dirty_or_writeback: false, unstable: false, failed: false };

    pub fn of(page: &Page) -> Self {
        Self {
            dirty: (!page.dirty.is_empty()).then_some(page.epoch),
            dirty_or_writeback: page.is_dirty_or_writeback(),
            unstable: page.is_not_durable(),
            failed: page.is(FAILED),
        }
    }

    /// Whether the page counted `before` against a limit and no longer does.
    pub fn makes_room(self, before: Self) -> bool {
        before.dirty_or_writeback && !self.dirty_or_writeback || before.unstable && !self.unstable
    }
}

/// The dirty pages of 64 KiB of the image, a bit for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::cache) struct Group(u16);

impl Group {
    const FULL: Self = Self(u16::MAX);

    /// Whether the page at this position of the group is dirty; false outside the group.
    fn contains(self, at: u64) -> bool {
        u32::from(self.0) >> at & 1 == 1
    }

    /// The dirty pages of group `number`.
    pub fn pages(self, number: u64) -> impl Iterator<Item = PageNo> {
        (0..GROUP_PAGES).filter(move |bit| self.0 >> bit & 1 == 1).map(move |bit| PageNo(number * GROUP_PAGES + bit))
    }
}

/// The dirty pages, and how many pages and writes belong to each epoch. `Pages` alone changes it.
#[derive(Debug)]
pub(in crate::cache) struct DirtySet {
    /// By the number of the group; no group is empty.
    groups: BTreeMap<u64, Group>,
    /// Oldest first, with the number of the epoch's dirty pages and writes in flight; epochs with a count of zero are
    /// removed.
    epochs: VecDeque<(Epoch, u32)>,
    current: Epoch,
    dirty_pages: u32,
    /// Dirty pages without a dirty page directly before them in their region.
    runs: u32,
    dirty_or_writeback_pages: u32,
    unstable_pages: u32,
    failed_pages: u32,
}

impl Default for DirtySet {
    fn default() -> Self {
        Self {
            groups: BTreeMap::new(),
            epochs: VecDeque::new(),
            current: Epoch(1),
            dirty_pages: 0,
            runs: 0,
            dirty_or_writeback_pages: 0,
            unstable_pages: 0,
            failed_pages: 0,
        }
    }
}

impl DirtySet {
    /// The epoch of the present writes of guests.
    pub fn current(&self) -> Epoch {
        self.current
    }

    /// Number of pages with dirty sectors.
    pub fn dirty_pages(&self) -> u32 {
        self.dirty_pages
    }

    /// Number of runs of dirty pages: no run crosses the border of a region, as no cluster does.
    pub fn runs(&self) -> u32 {
        self.runs
    }

    /// Number of pages that are dirty, under write-back or being filled by a writer.
    pub fn dirty_or_writeback_pages(&self) -> u32 {
        self.dirty_or_writeback_pages
    }

    /// Number of pages that are not durable: none of them can be evicted.
    pub fn unstable_pages(&self) -> u32 {
        self.unstable_pages
    }

    /// Number of pages whose last write-back failed.
    pub fn failed_pages(&self) -> u32 {
        self.failed_pages
    }

    /// The oldest epoch that is not wholly on the store: some of its pages are dirty or under write-back.
    pub fn oldest(&self) -> Option<Epoch> {
        self.epochs.front().map(|&(epoch, _)| epoch)
    }

    /// Closes the current epoch, unless it is empty; returns the last closed epoch.
    pub(super) fn close_epoch(&mut self) -> Epoch {
        if self.epochs.back().is_some_and(|&(epoch, _)| epoch == self.current) {
            self.current = self.current.next();
        }
        Epoch(self.current.0.wrapping_sub(1))
    }

    /// The tally of page `no` changed.
    pub(super) fn recount(&mut self, no: PageNo, before: PageTally, after: PageTally) {
        if before.dirty != after.dirty {
            if let Some(epoch) = before.dirty {
                self.release_epoch(epoch);
                self.dirty_pages -= 1;
            }
            if let Some(epoch) = after.dirty {
                self.hold_epoch(epoch);
                self.dirty_pages += 1;
            }
            if before.dirty.is_some() != after.dirty.is_some() {
                self.toggle(no);
            }
        }
        self.dirty_or_writeback_pages =
            self.dirty_or_writeback_pages + u32::from(after.dirty_or_writeback) - u32::from(before.dirty_or_writeback);
        self.unstable_pages = self.unstable_pages + u32::from(after.unstable) - u32::from(before.unstable);
        self.failed_pages = self.failed_pages + u32::from(after.failed) - u32::from(before.failed);
    }

    /// The page becomes dirty, or clean.
    fn toggle(&mut self, no: PageNo) {
        let (number, at) = (no.0 / GROUP_PAGES, no.0 % GROUP_PAGES);
        let is_dirty =
            |no: u64| self.groups.get(&(no / GROUP_PAGES)).is_some_and(|group| group.contains(no % GROUP_PAGES));
        // Only at the ends of a group, because each lookup in another group takes as long as one in its own.
        let joins_below = at == 0 && !no.0.is_multiple_of(REGION_PAGES) && is_dirty(no.0 - 1);
        let joins_above = at == GROUP_PAGES - 1 && !(no.0 + 1).is_multiple_of(REGION_PAGES) && is_dirty(no.0 + 1);
        let mut joined = u32::from(joins_below) + u32::from(joins_above);
        match self.groups.entry(number) {
            Entry::Vacant(slot) => {
                slot.insert(Group(1 << at));
                self.runs = self.runs + 1 - joined;
            }
            Entry::Occupied(mut slot) => {
                let group = slot.get_mut();
                joined += u32::from(at > 0 && group.contains(at - 1)) + u32::from(group.contains(at + 1));
                group.0 ^= 1 << at;
                if group.contains(at) {
                    self.runs = self.runs + 1 - joined;
                } else {
                    self.runs = self.runs + joined - 1;
                }
                if group.0 == 0 {
                    slot.remove();
                }
            }
        }
    }

    /// One more page or write belongs to `epoch`.
    pub(super) fn hold_epoch(&mut self, epoch: Epoch) {
        match self.epochs.iter().rposition(|&(other, _)| other.at_or_before(epoch)) {
            Some(at) if self.epochs[at].0 == epoch => self.epochs[at].1 += 1,
            Some(at) => self.epochs.insert(at + 1, (epoch, 1)),
            None => self.epochs.push_front((epoch, 1)),
        }
    }

    /// One page or write fewer belongs to `epoch`.
    pub(super) fn release_epoch(&mut self, epoch: Epoch) {
        let at = self.epochs.iter().rposition(|&(other, _)| other == epoch).expect("the epoch is held");
        self.epochs[at].1 -= 1;
        if self.epochs[at].1 == 0 {
            self.epochs.remove(at);
        }
    }

    /// Whether all pages of the group of `no` are dirty.
    pub fn group_is_full(&self, no: PageNo) -> bool {
        self.groups.get(&(no.0 / GROUP_PAGES)).is_some_and(|&group| group == Group::FULL)
    }

    /// The first group with dirty pages, starting at group `from`.
    pub fn next_group(&self, from: u64) -> Option<(u64, Group)> {
        self.groups.range(from..).next().map(|(&number, &group)| (number, group))
    }

    /// Number of groups with dirty pages.
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// The dirty pages in order.
    pub fn iter(&self) -> impl Iterator<Item = PageNo> {
        self.groups.iter().flat_map(|(&number, &group)| group.pages(number))
    }

    /// Bytes of memory that the groups take, estimated: the nodes of a B-tree are two thirds full on average.
    pub fn metadata_bytes(&self) -> usize {
        self.groups.len() * (size_of::<u64>() + size_of::<Group>()) * 3 / 2
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]
mod tests {
    use super::*;
    use crate::prng::Prng;

    fn dirty(epoch: u32) -> PageTally {
        PageTally { dirty: Some(Epoch(epoch)), dirty_or_writeback: true, unstable: true, failed: false }
    }

    #[test]
    fn an_epoch_ends_when_its_last_page_is_clean() {
        let mut set = DirtySet::default();
        set.recount(PageNo(5), PageTally::ABSENT, dirty(1));
        assert_eq!(set.close_epoch(), Epoch(1));
        assert_eq!(set.close_epoch(), Epoch(1), "an empty epoch is not closed again");
        set.recount(PageNo(40), PageTally::ABSENT, dirty(2));
        assert_eq!(set.oldest(), Some(Epoch(1)));
        set.recount(PageNo(5), dirty(1), PageTally::ABSENT);
        assert_eq!(set.oldest(), Some(Epoch(2)));
        assert!(set.iter().eq([PageNo(40)]));
    }

    #[test]
    fn a_run_of_dirty_pages_spans_groups_but_not_regions() {
        let mut prng = Prng::new(1);
        let mut set = DirtySet::default();
        let mut pages = vec![false; 3 * REGION_PAGES as usize];
        for step in 0..20_000 {
            let at = if prng.percent(50) { prng.below(40) + 240 } else { prng.below(3 * REGION_PAGES) } as usize;
            pages[at] = !pages[at];
            let (before, after) = if pages[at] { (PageTally::ABSENT, dirty(1)) } else { (dirty(1), PageTally::ABSENT) };
            set.recount(PageNo(at as u64), before, after);
            let starts = |at: &usize| pages[*at] && (at.is_multiple_of(REGION_PAGES as usize) || !pages[at - 1]);
            assert_eq!(set.runs() as usize, (0..pages.len()).filter(starts).count(), "step {step}");
        }
    }

    #[test]
    fn an_older_epoch_sorts_before_newer_ones_across_the_wrap() {
        let mut set = DirtySet::default();
        set.hold_epoch(Epoch(3));
        set.hold_epoch(Epoch(u32::MAX));
        assert_eq!(set.oldest(), Some(Epoch(u32::MAX)), "epochs wrap");
        set.release_epoch(Epoch(u32::MAX));
        assert_eq!(set.oldest(), Some(Epoch(3)));
    }
}
