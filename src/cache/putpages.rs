//! putpages: write-back in clusters (genfs_putpages).
//!
//! A cluster extends from a dirty page backward, then forward, over other dirty pages, and bridges gaps of one or two
//! clean pages in memory. Its first and last page may be only partly valid and dirty. It is at most as long as the
//! store's longest operation, and never crosses the border of a 1 MiB region. A cluster is one vectored write. Its
//! frames are copy-on-write until it ends: a guest that writes such a page gets a new frame.

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{Epoch, Fault, OpKind, PageId, PageNo, SECTORS_PER_PAGE, SectorMask, SectorSpan, Urgency, low_u8};

use super::pages::{COPY_ON_WRITE, FAILED, NONE};
use super::store_health::Cause;
use super::store_ops::{Outcome, StoreOp};
use super::{PageCache, REGION_PAGES};

/// Longest gap of clean pages that a cluster bridges, by writing them too.
const BRIDGE_PAGES: u64 = 2;

impl PageCache {
    /// Writes the page as part of a cluster. Returns the page after the cluster; `None`: the page can't be written now.
    pub(super) fn put_cluster(&mut self, id: PageId) -> Option<PageNo> {
        if !self.can_write_back(id) {
            return None;
        }
        if self.pages[id].valid != SectorMask::ALL && !self.is_block_aligned(id) {
            if self.fill(id) {
                self.submit_run();
            } else {
                self.writeback.lacks_frame = true;
            }
            if self.pages[id].valid != SectorMask::ALL {
                return None;
            }
        }
        let span = self.cluster_of(id);
        let (mut frames, mut ids) = self.store_ops.vectors();
        let mut epoch = self.pages[id].epoch;
        for page_no in span.pages().iter() {
            let id = self.pages.find(page_no).expect("a cluster's pages are in memory");
            let page = &self.pages[id];
            if !page.dirty.is_empty() && page.epoch.at_or_before(epoch) {
                epoch = page.epoch;
            }
            ids.push(id);
            frames.push(page.frame().expect("a dirty or valid page has a frame"));
        }
        self.submit_write(StoreOp {
            frames,
            ids,
            epoch,
            urgency: Urgency::Background,
            ..StoreOp::without_pages(OpKind::Write, span)
        });
        Some(span.pages().end())
    }

    /// Whether the first dirty run of a page consists of whole blocks of the store. If not, the sectors that the page
    /// lacks are read in before its write-back.
    pub(super) fn is_block_aligned(&self, id: PageId) -> bool {
        let block = self.settings.block_sectors;
        self.pages[id].dirty.first_run().is_some_and(|(first, count)| first % block == 0 && count % block == 0)
    }

    /// The cluster around a page: the fully valid pages, and at each end a dirty run of a partly valid page. In a
    /// partition that is not aligned to a page, each block of the guest lies in two pages: without those runs it would
    /// take two writes.
    fn cluster_of(&self, id: PageId) -> SectorSpan {
        let page = &self.pages[id];
        let no = page.no().0;
        let is_whole = page.valid == SectorMask::ALL;
        let run = page.dirty.first_run().filter(|_| !is_whole);
        let (first_sector, count) = run.unwrap_or((0, low_u8(SECTORS_PER_PAGE)));
        let sector = no * SECTORS_PER_PAGE + u64::from(first_sector);
        let (mut start, mut end) = (sector, sector + u64::from(count));
        // A page that failed is written alone, so that one bad sector holds up no other page.
        if !page.is(FAILED) {
            let region = no / REGION_PAGES * REGION_PAGES;
            let length_max = u64::from(self.settings.cluster_pages_max);
            let mut first = no;
            if start.is_multiple_of(SECTORS_PER_PAGE) {
                let lowest = region.max((no + 1).saturating_sub(length_max));
                first = self.extend_down(no, lowest);
                start = first * SECTORS_PER_PAGE;
                if first > lowest
                    && let Some(sectors) = self.trailing_dirty_run(first - 1)
                {
                    first -= 1;
                    start -= sectors;
                }
            }
            if end.is_multiple_of(SECTORS_PER_PAGE) {
                let highest = (region + REGION_PAGES).min(first + length_max);
                let last = self.extend_up(no + 1, highest);
                let sectors = if last < highest { self.leading_dirty_run(last) } else { None };
                end = last * SECTORS_PER_PAGE + sectors.unwrap_or(0);
            }
        }
        SectorSpan::new(start, end.min(self.settings.image_sectors) - start)
    }

    /// The first page of a cluster that includes page `no`, and none below `lowest`.
    fn extend_down(&self, no: u64, lowest: u64) -> u64 {
        let (mut first, mut reach) = (no, no);
        while reach > lowest && first - reach <= BRIDGE_PAGES && self.can_bridge(reach - 1) {
            reach -= 1;
            if self.extends_cluster(reach) {
                first = reach;
            }
        }
        first
    }

    /// The page after a cluster that includes the page before `end`, and none from `highest` on.
    fn extend_up(&self, mut end: u64, highest: u64) -> u64 {
        let mut reach = end;
        while reach < highest && reach - end <= BRIDGE_PAGES && self.can_bridge(reach) {
            reach += 1;
            if self.extends_cluster(reach - 1) {
                end = reach;
            }
        }
        end
    }

    /// The length of the leading dirty run of a partially valid page, if a cluster may end with it.
    fn leading_dirty_run(&self, no: u64) -> Option<u64> {
        let dirty = self.dirty_part(no)?;
        dirty.first_run().filter(|(first, _)| *first == 0).map(|(_, count)| u64::from(count)).filter(|count| {
            // The end of a run is the end of a block.
            count.is_multiple_of(u64::from(self.settings.block_sectors))
        })
    }

    /// The length of the trailing dirty run of a partially valid page, if a cluster may begin with it.
    fn trailing_dirty_run(&self, no: u64) -> Option<u64> {
        let count = u64::from(self.dirty_part(no)?.0.leading_ones());
        (count > 0 && count.is_multiple_of(u64::from(self.settings.block_sectors))).then_some(count)
    }

    /// The dirty sectors of a partially valid page, if it may be written with others now.
    fn dirty_part(&self, no: u64) -> Option<SectorMask> {
        let id = self.pages.find(PageNo(no))?;
        let page = &self.pages[id];
        (page.valid != SectorMask::ALL && !page.is(FAILED) && self.can_write_back(id)).then_some(page.dirty)
    }

    /// Whether a page can be part of a cluster: all of it is valid, and no operation, writer or range holds it. It is
    /// dirty, or clean and known not to be a hole: the store may have no space for a hole, and the cluster would fail.
    fn can_bridge(&self, no: u64) -> bool {
        self.pages.find(PageNo(no)).is_some_and(|id| {
            let page = &self.pages[id];
            let fills_no_hole = !page.dirty.is_empty() || self.holes.is_data(page.no());
            let is_free = !page.busy() && !page.is(FAILED) && !self.ranges.contain(page.no());
            page.valid == SectorMask::ALL && fills_no_hole && is_free
        })
    }

    /// Whether it is worthwhile to extend a cluster to this page.
    fn extends_cluster(&self, no: u64) -> bool {
        self.pages.find(PageNo(no)).is_some_and(|id| self.can_write_back(id))
    }

    /// Submits a write. The frames of its pages are copy-on-write until it ends.
    fn submit_write(&mut self, op: StoreOp) {
        self.pages.hold_epoch(op.epoch);
        for (&id, &frame) in op.ids.iter().zip(&op.frames) {
            self.pages.hold_frame(frame);
            let writing = op.span.sectors_in(self.pages[id].no());
            self.pages.change(id, |page| {
                page.writing = writing;
                page.dirty = page.dirty.without(writing);
                page.set(COPY_ON_WRITE);
            });
        }
        self.stats.store_writes += 1;
        self.stats.store_written_sectors += op.span.count;
        self.submit_op(op);
    }

    /// A cluster has ended (genfs: uvm_aio_aiodone).
    pub(super) fn write_done(&mut self, op: &StoreOp, outcome: &Outcome) {
        self.throttle.write_ended(op.ids.len() as u64, self.store_ops.writes(), self.now);
        self.holes.cut_runs(op.span.pages());
        let is_ignored = |fault: &Fault| {
            planted(PlantedBug::WriteErrorIgnored) || planted(PlantedBug::NoSpaceIgnored) && *fault == Fault::NoSpace
        };
        let fault = outcome.fault().filter(|fault| !is_ignored(fault));
        for (&id, &frame) in op.ids.iter().zip(&op.frames) {
            match fault {
                None if self.is_in_doubt(op) => self.page_not_written(id, op.epoch),
                None => self.page_written(id),
                Some(_) => {
                    self.page_not_written(id, op.epoch);
                    self.pages.change(id, |page| page.set(FAILED));
                }
            }
            self.pages.release_frame(frame);
            if self.pages[id].waiters() != NONE {
                self.deliver_to_waiters(id);
            }
        }
        self.submit_run();
        self.pages.release_epoch(op.epoch);
        match fault {
            None => {
                self.flushing.note_unsynced_write();
                self.store_succeeded(Cause::Write);
            }
            Some(fault) => {
                if fault.may_be_a_reset() && !planted(PlantedBug::FailedWriteDoubtsNothing) {
                    self.doubt_unsynced(op.syncs);
                }
                self.flushing.sync_before_retry();
                self.cluster_failed(op.epoch, fault);
            }
        }
    }

    fn page_written(&mut self, id: PageId) {
        let no = self.pages[id].no();
        self.holes.mark_data(no);
        // Before the change below: the page must never count as clean and durable.
        self.mark_unsynced(id);
        self.pages.change(id, |page| {
            page.writing = SectorMask::NONE;
            page.clear(COPY_ON_WRITE | FAILED);
        });
        if planted(PlantedBug::RewriteIsLost) {
            self.pages.change(id, |page| page.dirty = SectorMask::NONE);
        }
    }

    /// Makes the page dirty again, and the clean pages that the cluster bridged: the contents of the range on the store
    /// are undefined.
    fn page_not_written(&mut self, id: PageId, epoch: Epoch) {
        let epoch = self.epoch_after_failure(epoch);
        self.forget_unread(id);
        let beyond = self.pages.beyond_image(self.pages[id].no());
        self.pages.change(id, |page| {
            if page.dirty.is_empty() || epoch.at_or_before(page.epoch) {
                page.epoch = epoch;
            }
            page.dirty = page.dirty.or(page.writing).without(beyond);
            page.writing = SectorMask::NONE;
            page.clear(COPY_ON_WRITE);
        });
    }

    /// A page can't be written, because the rest of its store block can't be read in.
    pub(super) fn page_cannot_be_written(&mut self, id: PageId, fault: Fault) {
        self.pages.change(id, |page| page.set(FAILED));
        self.cluster_failed(self.pages[id].epoch, fault);
    }

    fn cluster_failed(&mut self, epoch: Epoch, fault: Fault) {
        self.stats.write_errors += 1;
        self.store_failed(fault, Cause::Write);
        if self.health.refused().is_some() {
            self.fail_flushes(epoch, fault);
        }
    }
}
