//! getpages: guest reads, and the read-in of missing sectors (genfs_getpages).
//!
//! A read walks its pages once. It gets valid sectors immediately, as pinned pieces, and holes as zeros. Missing
//! sectors are read in: adjacent pages are merged into one operation, valid pages are skipped, and nothing beyond the
//! image is read.
//!
//! A read-in always fills a frame of its own. When it ends, a page without a frame adopts that frame, and a page that
//! was partly written takes only the sectors that it lacks. So a write never waits for a read-in (PGO_OVERWRITE), and a
//! read-in can't undo a write.
//!
//! A request holds no pin while it waits: each piece is delivered as soon as it is read in, and its owner returns it.
//! So requests that wait for each other's frames can't deadlock, however small the cache.

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{Fault, FrameId, OpKind, PageId, PageNo, PageSpan, SectorMask, Urgency};

use super::holes::BlockStatus;
use super::pages::{MARKER, NONE, Page, Period, READING};
use super::stalled::StallReason;
use super::store_ops::{Outcome, StoreOp};
use super::{Access, Admitted, Notice, PageCache, PagePart, Piece, Ticket};

/// The part of a read that waits for a page.
#[derive(Clone, Copy, Debug)]
struct Waiter {
    ticket: Ticket,
    /// First sector within the request.
    at: u32,
    /// First sector within the page.
    first: u8,
    count: u8,
    /// The next waiter for the same page, or [`NONE`].
    next: u32,
}

/// The waiters for all pages, in one pool: each page has a chain of them.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    pool: Vec<Waiter>,
    free: Vec<u32>,
}

/// Adjacent missing pages that are being collected into one read.
#[derive(Debug, Default)]
pub(super) struct MissRun {
    /// Collected by readahead: no request waits for it yet.
    pub(super) is_readahead: bool,
    first: Option<PageNo>,
    ids: Vec<PageId>,
    frames: Vec<FrameId>,
}

/// Why an absent page is not read in now.
enum CannotRead {
    /// No frame is free, or the hole map has been requested.
    Wait,
    /// It reads as zeros and needs no frame.
    Hole,
}

impl PageCache {
    /// Admits a read: pieces that can be copied now are added to `pieces`, the rest is delivered in notices.
    ///
    /// => The owner returns every piece with [`PageCache::finish_read`].
    pub fn read(&mut self, access: Access, pieces: &mut Vec<Piece>) -> Admitted {
        self.writeback.note_guest_io(self.now);
        let stopped = self.health.stopped();
        let mut at = access.from;
        let mut missed = false;
        let (mut marker, mut guess) = (None, access.guess);
        while at < access.until
            && let Some(part) = PagePart::of(access.span, at)
        {
            if self.freeze.holds_reads() || self.is_range_locked(part.no) {
                break;
            }
            let found = self.pages.find_near(guess, part.no);
            guess = found.map_or(guess, PageId::next);
            match found {
                Some(id) if self.pages[id].valid.contains(part.mask()) => {
                    marker = marker.or(self.hit(id, part, pieces));
                }
                // A stopped store gets no new read; reads in flight continue.
                _ if stopped.is_some() => break,
                Some(id) if self.wait_for(id, part, access.ticket) => missed = true,
                Some(_) => break,
                None => match self.begin_read_in(part.no) {
                    Ok(id) => {
                        self.pages.first_touch(id, part.no);
                        self.stats.read_miss_pages += 1;
                        self.enqueue_waiter(id, Waiter::new(access.ticket, part));
                        missed = true;
                    }
                    Err(CannotRead::Hole) => {
                        self.stats.read_hole_pages += 1;
                        part.piece(PageId::NONE, None).join(pieces);
                    }
                    Err(CannotRead::Wait) => break,
                },
            }
            at += u32::from(part.count);
        }
        self.submit_run();
        if missed {
            self.read_ahead_after_miss(access.part().pages());
        } else if let Some(no) = marker {
            self.read_ahead_after_marker(no);
        }
        if at >= access.until {
            Admitted::All
        } else if let Some(fault) = stopped {
            Admitted::Refused(at, fault)
        } else {
            let no_frame = self.pages.frames().free() == 0;
            let reason = if no_frame { StallReason::Room } else { StallReason::StoreOp };
            self.stalled.push(access.ticket, reason);
            self.stats.stalls += 1;
            Admitted::Until(at)
        }
    }

    /// Looks up the first pages of the next requests, for [`Access::guess`]. Without it, the lookup of each request
    /// misses the CPU's cache in turn; here those misses overlap.
    pub fn find_all(&self, pages: impl Iterator<Item = PageNo> + Clone, found: &mut Vec<PageId>) {
        self.pages.find_all(pages, found);
    }

    /// Takes back a piece of a read.
    pub fn finish_read(&mut self, piece: &Piece) {
        piece.frames().for_each(|frame| self.pages.release_frame(frame));
    }

    /// The hit path: a pin and a touch, no allocation. Returns the page's number if it has the readahead marker.
    fn hit(&mut self, id: PageId, part: PagePart, pieces: &mut Vec<Piece>) -> Option<PageNo> {
        self.stats.read_hit_pages += 1;
        let page = &self.pages[id];
        let frame = page.frame().expect("valid sectors lie in a frame");
        let marked = page.is_marked(MARKER);
        match page.unread_since() {
            Some(period) => self.first_demand(id, part.no, period),
            None => self.pages.touch(id, part.no),
        }
        if marked {
            self.pages.take_mark(id, MARKER);
        }
        self.pages.hold_frame(frame);
        part.piece(id, Some(frame)).join(pieces);
        marked.then_some(part.no)
    }

    /// A guest requests for the first time a page that was read ahead in `period`, or warmed.
    fn first_demand(&mut self, id: PageId, no: PageNo, period: Period) {
        self.pages.take_unread(id);
        if period == Period::WARMED {
            // It was in memory before: this use is not the first one.
            return self.pages.touch(id, no);
        }
        self.streams.remove_unread(period);
        self.pages.first_touch(id, no);
        self.stats.readahead_used_pages += 1;
    }

    /// Makes a read wait for a page that is in the table and lacks sectors. False: they can't be read in now.
    fn wait_for(&mut self, id: PageId, part: PagePart, ticket: Ticket) -> bool {
        if let Some(period) = self.pages[id].unread_since() {
            self.first_demand(id, part.no, period);
            self.pages.take_mark(id, MARKER);
        }
        let page = &self.pages[id];
        let writers_bring_all = page.pending.or(page.valid).contains(part.mask());
        if !page.is(READING) && !writers_bring_all && !self.fill(id) {
            return false;
        }
        self.stats.read_miss_pages += 1;
        self.enqueue_waiter(id, Waiter::new(ticket, part));
        // A hole is filled with zeros immediately.
        self.deliver_to_waiters(id);
        true
    }

    /// Starts the read-in of an absent page.
    fn begin_read_in(&mut self, no: PageNo) -> Result<PageId, CannotRead> {
        if self.zeroed_sectors(no).or(self.pages.beyond_image(no)) == SectorMask::ALL {
            return Err(CannotRead::Hole);
        }
        match self.holes.status(no) {
            BlockStatus::Hole => return Err(CannotRead::Hole),
            BlockStatus::Unknown => {
                self.request_map(no);
                return Err(CannotRead::Wait);
            }
            BlockStatus::Data => {}
        }
        if self.pages.frames().free() == 0 {
            return Err(CannotRead::Wait);
        }
        let id = self.pages.insert(no).ok_or(CannotRead::Wait)?;
        let frame = self.pages.take_frame().expect("a frame is free");
        self.join_run(id, frame);
        Ok(id)
    }

    /// Starts the read-in of an absent page that no guest has requested. Returns true if it is read, false if it is a
    /// hole; `None`: no frame is free, or the hole map has been requested.
    pub(super) fn begin_warming(&mut self, no: PageNo) -> Option<bool> {
        match self.begin_read_in(no) {
            Ok(id) => {
                self.pages.mark_unread(id, Period::WARMED);
                Some(true)
            }
            Err(CannotRead::Hole) => Some(false),
            Err(CannotRead::Wait) => None,
        }
    }

    /// Starts the read-in of the missing sectors of a page in the table. False: no frame is free, or the hole map has
    /// been requested.
    ///
    /// => A page under write-back is not read (I6): the end of the write serves its waiters again.
    pub(super) fn fill(&mut self, id: PageId) -> bool {
        if !self.pages[id].writing.is_empty() {
            return true;
        }
        let no = self.pages[id].no();
        let missing = missing_sectors(&self.pages[id]);
        let status = if self.zeroed_sectors(no).contains(missing) { BlockStatus::Hole } else { self.holes.status(no) };
        match status {
            BlockStatus::Unknown => {
                self.request_map(no);
                false
            }
            BlockStatus::Hole => match self.pages.ensure_frame(id) {
                Some(_) => {
                    // Computed again: sectors beyond the end of the image become valid as soon as the page has a frame.
                    let missing = missing_sectors(&self.pages[id]);
                    self.pages.zero_sectors(id, missing);
                    self.pages.change(id, |page| page.valid = page.valid.or(missing));
                    true
                }
                None => false,
            },
            BlockStatus::Data => match self.pages.take_frame() {
                Some(frame) => {
                    self.join_run(id, frame);
                    true
                }
                None => false,
            },
        }
    }

    /// Adds a page to the read that is being collected; the store reads into `frame`.
    fn join_run(&mut self, id: PageId, frame: FrameId) {
        let no = self.pages[id].no();
        let length = self.run.ids.len() as u64;
        let adjoins = self.run.first.is_some_and(|first| first.plus(length) == no);
        if !adjoins || length == u64::from(self.settings.cluster_pages_max) {
            self.submit_run();
            self.run.first = Some(no);
        }
        self.pages.change(id, |page| page.set(READING));
        self.run.ids.push(id);
        self.run.frames.push(frame);
    }

    /// Submits the collected read, if there is one.
    pub(super) fn submit_run(&mut self) {
        let Some(first) = self.run.first.take() else {
            return;
        };
        let (mut frames, mut ids) = self.store_ops.vectors();
        frames.append(&mut self.run.frames);
        ids.append(&mut self.run.ids);
        let span = self.span_of(first, ids.len() as u64);
        self.stats.store_reads += 1;
        self.stats.store_read_sectors += span.count;
        let urgency = if self.run.is_readahead { Urgency::Background } else { Urgency::Demand };
        self.submit_op(StoreOp { frames, ids, urgency, ..StoreOp::without_pages(OpKind::Read, span) });
    }

    /// A read-in has ended.
    pub(super) fn read_done(&mut self, op: &StoreOp, outcome: &Outcome) {
        for (&id, &frame) in op.ids.iter().zip(&op.frames) {
            match outcome.fault() {
                None => self.page_read_in(id, frame, op.is_lost),
                Some(fault) => self.page_not_read(id, frame, fault, op.urgency),
            }
        }
        self.submit_run();
    }

    /// The store has filled `frame` for the page. The page adopts the frame, or copies from it the sectors that it
    /// lacks (I7). Sectors that a zero has zeroed meanwhile are zeros, whatever the store returned.
    ///
    /// => `is_lost`: the store may since have lost the data that it returned. The waiters get the data, and the page
    ///    does not keep it.
    fn page_read_in(&mut self, id: PageId, frame: FrameId, is_lost: bool) {
        let zeroed = self.zeroed_sectors(self.pages[id].no());
        let ready = match self.pages[id].frame() {
            None => {
                self.pages.adopt_frame(id, frame);
                if !zeroed.is_empty() {
                    self.pages.zero_sectors(id, zeroed);
                }
                SectorMask::ALL.without(self.pages[id].pending)
            }
            Some(_) => {
                let mut missing = missing_sectors(&self.pages[id]);
                if planted(PlantedBug::ReadInOverwritesDirty) {
                    missing = SectorMask::ALL;
                }
                self.pages.copy_from(id, frame, missing.without(zeroed));
                if !zeroed.is_empty() {
                    self.pages.zero_sectors(id, missing.and(zeroed));
                }
                self.pages.release_frame(frame);
                missing.or(self.pages[id].valid)
            }
        };
        self.pages.change(id, |page| {
            page.clear(READING);
            if !is_lost {
                page.valid = ready;
            }
        });
        self.deliver_ready(id, ready);
        if is_lost {
            self.remove_if_empty(id);
        }
    }

    /// The page could not be read. If the read was on demand, its waiters fail; if it was readahead, they get a read of
    /// their own. An empty page is removed. The write-back of a dirty page that needed the read-in has failed.
    fn page_not_read(&mut self, id: PageId, frame: FrameId, fault: Fault, urgency: Urgency) {
        self.pages.change(id, |page| page.clear(READING));
        self.stats.read_errors += 1;
        if urgency == Urgency::Demand {
            self.pages.release_frame(frame);
            let mut chain = self.pages.replace_waiters(id, NONE);
            while chain != NONE {
                let waiter = self.waiters.take(&mut chain);
                self.notices.push(Notice::Unreadable(waiter.ticket, u32::from(waiter.count), fault));
            }
        } else if self.pages[id].waiters() != NONE {
            self.submit_run();
            self.join_run(id, frame);
            return;
        } else {
            self.pages.release_frame(frame);
        }
        let page = &self.pages[id];
        if page.frame().is_none() && !page.busy() {
            self.remove_page(id);
        } else if !page.dirty.is_empty() && !self.is_block_aligned(id) {
            self.page_cannot_be_written(id, fault);
        }
    }

    /// Delivers a page to the waiting reads whose sectors are now valid. If other reads still wait and neither a
    /// read-in nor a writer will make their sectors valid, starts a read-in.
    pub(super) fn deliver_to_waiters(&mut self, id: PageId) {
        self.deliver_ready(id, self.pages[id].valid);
    }

    /// Like [`PageCache::deliver_to_waiters`], but the frame has the sectors `ready` only now.
    fn deliver_ready(&mut self, id: PageId, ready: SectorMask) {
        let mut chain = self.pages.replace_waiters(id, NONE);
        while chain != NONE {
            let waiter = self.waiters.take(&mut chain);
            let Waiter { ticket, at, first, count, .. } = waiter;
            match self.pages[id].frame() {
                Some(frame) if ready.contains(SectorMask::run(first, count)) => {
                    self.pages.hold_frame(frame);
                    self.deliver(ticket, Piece { frame: Some(frame), page: id, first, count: u32::from(count), at });
                }
                _ => self.enqueue_waiter(id, waiter),
            }
        }
        self.fill_for_waiters(id);
    }

    /// Removes a page without data from the store or a guest that is not in use.
    fn remove_if_empty(&mut self, id: PageId) {
        let page = &self.pages[id];
        if !page.busy() && page.valid.without(self.pages.beyond_image(page.no())).is_empty() {
            self.remove_page(id);
        }
    }

    /// Reports that a piece of a read is ready; adjacent pieces are merged.
    fn deliver(&mut self, ticket: Ticket, piece: Piece) {
        if let Some(Notice::Ready(other, last)) = self.notices.last_mut()
            && *other == ticket
            && last.absorb(&piece)
        {
            return;
        }
        self.notices.push(Notice::Ready(ticket, piece));
    }

    /// Reads in the sectors that the waiters of a page need; if that is not possible now, the next pump retries.
    fn fill_for_waiters(&mut self, id: PageId) {
        let page = &self.pages[id];
        if page.waiters() == NONE || page.is(READING) || page.writers > 0 {
            return;
        }
        if !self.fill(id) {
            self.unfilled.push(id);
        } else if self.pages[id].valid == SectorMask::ALL {
            // A hole was filled immediately: no read-in follows whose end would deliver it.
            self.deliver_to_waiters(id);
        }
    }

    /// Retries the waiters of pages that lacked a frame or a hole map.
    pub(super) fn retry_unfilled(&mut self) {
        for id in std::mem::take(&mut self.unfilled) {
            if self.pages[id].waiters() != NONE {
                self.deliver_to_waiters(id);
            }
        }
        self.submit_run();
    }

    fn enqueue_waiter(&mut self, id: PageId, waiter: Waiter) {
        let next = self.pages[id].waiters();
        self.pages.replace_waiters(id, self.waiters.put(Waiter { next, ..waiter }));
    }

    /// Readahead: reads in the absent pages of `window` while frames are free, and returns where it stopped. The first
    /// page that it reads in gets the marker, if that is due.
    ///
    /// => It never waits, and leaves half of the free reserve to requests.
    pub(super) fn read_ahead_window(&mut self, window: PageSpan, marker_due: &mut bool) -> PageNo {
        self.run.is_readahead = true;
        let mut next = window.first;
        while self.health.stopped().is_none()
            && next < window.end()
            && next.0 < self.readable_pages()
            && !self.ranges.contain(next)
        {
            if self.pages.find(next).is_none() {
                let room = self.pages.frames().free() > self.reserve() / 2 && self.streams.may_read_ahead();
                match if room { self.begin_read_in(next) } else { Err(CannotRead::Wait) } {
                    Ok(id) => {
                        self.stats.readahead_pages += 1;
                        self.pages.mark_unread(id, self.streams.add_unread());
                        if std::mem::take(marker_due) {
                            self.pages.mark(id, MARKER);
                        }
                    }
                    Err(CannotRead::Hole) => {}
                    Err(CannotRead::Wait) => break,
                }
            }
            next = next.plus(1);
        }
        self.submit_run();
        self.run.is_readahead = false;
        next
    }
}

/// The sectors that the page lacks and that no writer is filling.
fn missing_sectors(page: &Page) -> SectorMask {
    SectorMask::ALL.without(page.valid).without(page.pending)
}

impl Waiter {
    /// A waiter that is in no chain yet.
    fn new(ticket: Ticket, part: PagePart) -> Self {
        let PagePart { first, count, at, .. } = part;
        Self { ticket, at, first, count, next: NONE }
    }
}

impl Waiters {
    fn put(&mut self, waiter: Waiter) -> u32 {
        if let Some(slot) = self.free.pop() {
            self.pool[slot as usize] = waiter;
            return slot;
        }
        self.pool.push(waiter);
        u32::try_from(self.pool.len() - 1).expect("waiters are bounded by the requests in flight")
    }

    /// Takes the first waiter from `chain`.
    fn take(&mut self, chain: &mut u32) -> Waiter {
        let waiter = self.pool[*chain as usize];
        self.free.push(*chain);
        *chain = waiter.next;
        waiter
    }

    /// Number of waiters in all chains, for the check of the invariants.
    pub fn in_use(&self) -> usize {
        self.pool.len() - self.free.len()
    }

    /// Length of a chain.
    pub fn chain_len(&self, mut chain: u32) -> usize {
        let mut len = 0;
        while chain != NONE {
            chain = self.pool[chain as usize].next;
            len += 1;
        }
        len
    }
}
