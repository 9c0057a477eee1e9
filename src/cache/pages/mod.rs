//! The only access to a page's state: page table, dirty set, frames, their memory, and replacement queues.
//!
//! [`Pages`] keeps them consistent with each other. The rest of the cache reads all of it, and changes it only through
//! the functions here, because nothing else can get a `&mut Page`:
//!
//! - [`Pages::change`] changes everything that is counted or published: masks, epoch, writers, state flags.
//! - [`Pages::mark`] and similar functions change hints and the chain of waiters, which nothing counts.
//! - [`Pages::adopt_frame`] and [`Pages::copy_on_write`] give a page its frame; [`Pages::take_frame`],
//!   [`Pages::hold_frame`] and [`Pages::release_frame`] count references to frames.
//! - [`Pages::insert`], [`Pages::remove`], [`Pages::evict`] and [`Pages::restore`] add and remove pages.
//!
//! So these functions uphold invariants I1 to I5 and I9 (see [`super::PageCache`]):
//!
//! - I1: `insert`, `remove` and `evict` change the table and the replacement queues together.
//! - I2 and I4: `change` and `forget` pass every change of a page's `PageTally` to the dirty set.
//! - I3: `adopt_frame`, `copy_on_write` and `restore` take a page's own reference to its frame, and `forget` drops it.
//!   Each pin and store operation takes and drops its own.
//! - I5: `change` checks it, with every other rule on a single page, in builds with debug assertions.
//! - I9: `Frames` has each frame in its free list or counts its references.

mod check;
mod dirty;
mod frames;
mod page;
mod readers;
mod resize;
mod table;

use std::ops::Index;

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{
    Epoch, FrameId, FrameRecord, PageId, PageNo, PageSpan, SECTORS_PER_PAGE, SectorMask, SectorSpan, low_u8,
};

use super::policy::{self, Policy, Verdict};
use super::{FrameMemory, Settings};

pub(super) use dirty::{DirtySet, GROUP_PAGES, Group};
pub(super) use frames::Frames;
pub(super) use page::{COPY_ON_WRITE, FAILED, MARKER, NONE, Page, Period, READING, RECENT, UNSYNCED};

use dirty::PageTally;
use frames::Reuse;
use page::Mark;
use readers::ReaderShares;
use table::PageTable;

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Pages {
    table: PageTable,
    dirty: DirtySet,
    frames: Frames,
    memory: Box<dyn FrameMemory>,
    policy: Box<dyn Policy>,
    /// `None` while one device uses the cache.
    readers: Option<ReaderShares>,
    image_sectors: u64,
    /// See [`Pages::has_made_room`].
    made_room: bool,
}

impl Pages {
    /// An empty cache whose frames are `memory`.
    pub fn new(settings: &Settings, memory: Box<dyn FrameMemory>) -> Self {
        let (count, count_max) = (settings.frames, settings.frames_max.max(settings.frames));
        let reuse = if settings.retain { Reuse::OldestFirst } else { Reuse::NewestFirst };
        Self {
            table: PageTable::new(count, count_max, settings.page_key),
            dirty: DirtySet::default(),
            frames: Frames::new(count, count_max, reuse),
            memory,
            policy: policy::new(settings.policy, count, count_max, settings.page_key),
            readers: None,
            image_sectors: settings.image_sectors,
            made_room: false,
        }
    }

    // Lookups.

    /// The page with this number, if it is in memory.
    pub fn find(&self, no: PageNo) -> Option<PageId> {
        self.table.find(no)
    }

    /// Like [`Pages::find`]. Much faster if the page is in the slot `guess`.
    pub fn find_near(&self, guess: PageId, no: PageNo) -> Option<PageId> {
        self.table.find_near(guess, no)
    }

    /// Number of pages in memory.
    pub fn len(&self) -> u32 {
        self.table.len()
    }

    /// The pages of a span that are in memory, in no order.
    pub fn within(&self, span: PageSpan) -> Vec<PageId> {
        self.table.within(span)
    }

    /// The pages in memory, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (PageId, &Page)> {
        self.table.iter()
    }

    /// The dirty pages and their epochs.
    pub fn dirty(&self) -> &DirtySet {
        &self.dirty
    }

    /// The frames' reference counts.
    pub fn frames(&self) -> &Frames {
        &self.frames
    }

    /// Looks up pages: `found` gets the slot of each, or [`PageId::NONE`]. Each step reads one link of the lookups of
    /// all pages: no read depends on the one before it, and no branch waits for an unfinished read.
    pub fn find_all(&self, pages: impl Iterator<Item = PageNo> + Clone, found: &mut Vec<PageId>) {
        found.clear();
        found.extend(pages.clone().map(|no| self.table.chain_start(no)));
        found.iter().for_each(|&start| self.table.prefetch_slot(start));
        for (no, slot) in pages.zip(found) {
            let id = self.table.find_in_chain(*slot, no);
            if let Some(id) = id {
                let frame = self.table[id].frame();
                std::hint::black_box((frame.map(|frame| self.frames.references(frame)), self.policy.contains(id)));
            }
            *slot = id.unwrap_or(PageId::NONE);
        }
    }

    /// Bytes of memory that the tables take, without the frames themselves.
    pub fn metadata_bytes(&self) -> usize {
        self.table.metadata_bytes()
            + self.frames.metadata_bytes()
            + self.policy.metadata_bytes()
            + self.dirty.metadata_bytes()
            + self.readers.as_ref().map_or(0, ReaderShares::metadata_bytes)
    }

    /// The sectors of a page that lie beyond the end of the image (genfs: past diskeof).
    pub fn beyond_image(&self, no: PageNo) -> SectorMask {
        let start = no.0 * SECTORS_PER_PAGE;
        match self.image_sectors.saturating_sub(start) {
            SECTORS_PER_PAGE.. => SectorMask::NONE,
            inside => SectorMask::ALL.without(SectorMask::run(0, low_u8(inside))),
        }
    }

    /// Whether a frame became free, or a page no longer counts against a limit, since [`Pages::take_made_room`]: a
    /// stalled request may find room now.
    pub fn has_made_room(&self) -> bool {
        self.made_room
    }

    /// Like [`Pages::has_made_room`], and resets it.
    pub fn take_made_room(&mut self) -> bool {
        std::mem::take(&mut self.made_room)
    }

    /// The image has another size.
    pub fn set_image_sectors(&mut self, image_sectors: u64) {
        self.image_sectors = image_sectors;
    }

    // A page's state.

    /// Changes a page's masks, epoch, writers and state flags, and everything that depends on them: dirty set and
    /// counters (I2, I4), and the published record of the frame.
    pub fn change<R>(&mut self, id: PageId, mutate: impl FnOnce(&mut Page) -> R) -> R {
        let beyond = self.beyond_image(self.table[id].no());
        let page = &mut self.table[id];
        let before = PageTally::of(page);
        let published = (page.frame(), page.record(beyond));
        let result = mutate(page);
        if cfg!(debug_assertions) {
            page.check();
        }
        let after = PageTally::of(page);
        let no = page.no();
        let current = (page.frame(), page.record(beyond));
        // Inline, not in a function of its own: most changes leave the tally unchanged.
        if before != after {
            self.recount(no, before, after);
        }
        if published != current {
            self.publish(id, published, current);
        }
        result
    }

    /// Sets a mark.
    pub fn mark(&mut self, id: PageId, mark: Mark) {
        self.table[id].mark(mark);
    }

    /// Clears a mark; returns whether it was set.
    pub fn take_mark(&mut self, id: PageId, mark: Mark) -> bool {
        let page = &mut self.table[id];
        let was_set = page.is_marked(mark);
        if was_set {
            page.unmark(mark);
        }
        was_set
    }

    /// Marks a page as read in by readahead in `period`, or as warmed; no guest has requested it yet.
    pub fn mark_unread(&mut self, id: PageId, period: Period) {
        self.table[id].set_unread_since(Some(period));
    }

    /// A guest requests the page: if it was unread readahead, returns its period.
    pub fn take_unread(&mut self, id: PageId) -> Option<Period> {
        let page = &mut self.table[id];
        let since = page.unread_since();
        if since.is_some() {
            page.set_unread_since(None);
        }
        since
    }

    /// Sets the head of a page's chain of waiters, and returns the former head; [`NONE`] is an empty chain.
    pub fn replace_waiters(&mut self, id: PageId, head: u32) -> u32 {
        debug_assert!(self.table.is_resident(id), "{id:?} is a free slot: it has no waiters");
        self.table[id].replace_waiters(head)
    }

    /// The tally of page `no` changed.
    fn recount(&mut self, no: PageNo, before: PageTally, after: PageTally) {
        self.dirty.recount(no, before, after);
        self.made_room |= after.makes_room(before);
    }

    /// Publishes the contents of a page's frame to the memory.
    ///
    /// => While a page moves, two frames are recorded with its bytes for a moment; there is never a moment without one.
    fn publish(
        &self,
        id: PageId,
        (old_frame, old): (Option<FrameId>, FrameRecord),
        (frame, record): (Option<FrameId>, FrameRecord),
    ) {
        if let Some(frame) = frame {
            self.memory.publish(frame, with_planted_bug(&self.table[id], record));
        }
        if let Some(old_frame) = old_frame
            && Some(old_frame) != frame
            && !old.is_empty()
        {
            self.memory.publish(old_frame, FrameRecord::empty(old.page));
        }
    }

    // Adding and removing pages.

    /// Inserts an absent page, without a frame; `None` if no slot is free.
    pub fn insert(&mut self, no: PageNo) -> Option<PageId> {
        let id = self.table.insert(no)?;
        self.policy.insert(id, no);
        if let Some(readers) = &mut self.readers {
            readers.insert(id);
        }
        Some(id)
    }

    /// Removes a page that is not busy from the cache, and returns its last state. Its dirty data is lost.
    pub fn remove(&mut self, id: PageId) -> Page {
        self.policy.remove(id);
        self.forget(id)
    }

    /// Evicts the page that the policy chooses among the first `steps_max` that it proposes; returns its last state.
    /// Calls `on_kept` for each proposed page that may not be evicted.
    pub fn evict(&mut self, steps_max: u32, mut on_kept: impl FnMut(&Page)) -> Option<Page> {
        let Self { table, frames, policy, readers, .. } = self;
        let protecting = readers.as_ref().filter(|readers| readers.protect());
        let mut judge = |id: PageId| {
            let page = &table[id];
            let is_protected = protecting.is_some_and(|readers| readers.is_within_share(id));
            if !is_protected && is_evictable(page, frames) {
                Verdict::Evict { used: page.unread_since().is_none() }
            } else {
                on_kept(page);
                Verdict::Keep
            }
        };
        let victim = policy.evict(steps_max, &mut judge, &|id| table[id].no())?;
        Some(self.forget(victim))
    }

    /// Evicts a page that guests have used only once, or in one burst; returns its last state. `None`: the next such
    /// page may not be evicted, or was read in for no request.
    pub fn evict_cold(&mut self) -> Option<Page> {
        let Self { table, frames, policy, .. } = self;
        let mut is_cold = |id: PageId| is_evictable(&table[id], frames) && table[id].unread_since().is_none();
        let victim = policy.evict_cold(&mut is_cold, &|id| table[id].no())?;
        Some(self.forget(victim))
    }

    /// The evictable pages in `count` slots of the table, starting at slot `from`.
    pub fn evictable(&self, from: u32, count: u32) -> Vec<PageId> {
        let slots = from..from.saturating_add(count).min(self.table.capacity());
        let is_clean = |id: &PageId| self.table.is_resident(*id) && is_evictable(&self.table[*id], &self.frames);
        slots.map(PageId).filter(is_clean).collect()
    }

    /// The pages in `count` slots of the table, starting at slot `from`, whose sectors are all valid.
    pub fn whole_pages(&self, from: u32, count: u32) -> Vec<PageNo> {
        let slots = from..from.saturating_add(count).min(self.table.capacity());
        let resident = slots.map(PageId).filter(|id| self.table.is_resident(*id)).map(|id| &self.table[id]);
        resident.filter(|page| page.valid == SectorMask::ALL).map(Page::no).collect()
    }

    /// Number of slots of the table.
    pub fn slots(&self) -> u32 {
        self.table.capacity()
    }

    /// Removes a page from the table that is no longer on a replacement queue.
    fn forget(&mut self, id: PageId) -> Page {
        debug_assert!(!self.table[id].busy(), "{:?} is removed while busy", self.table[id]);
        let page = self.table.remove(id);
        if let Some(readers) = &mut self.readers {
            readers.remove(id);
        }
        let tally = PageTally::of(&page);
        if tally != PageTally::ABSENT {
            self.recount(page.no(), tally, PageTally::ABSENT);
        }
        if let Some(frame) = page.frame() {
            self.memory.publish(frame, FrameRecord::empty(page.no()));
            self.release_frame(frame);
        }
        page
    }

    /// Fills an empty cache from the records that the previous daemon published of the frames.
    pub fn restore(&mut self, records: impl IntoIterator<Item = (FrameId, FrameRecord)>) {
        assert_eq!(self.len(), 0, "only an empty cache can be restored");
        let mut restored = Vec::new();
        for (frame, record) in records {
            let no = record.page;
            let beyond = self.beyond_image(no);
            let is_useful = !record.valid.without(beyond).is_empty();
            match if is_useful && self.find(no).is_none() { self.insert(no) } else { None } {
                Some(id) => restored.push((id, frame, record, beyond)),
                None => self.memory.publish(frame, FrameRecord::empty(no)),
            }
        }
        self.frames.claim(restored.iter().map(|&(_, frame, ..)| frame));
        let epoch = self.dirty.current();
        for &(id, frame, record, beyond) in &restored {
            self.change(id, |page| {
                page.set_frame(frame);
                page.valid = record.valid.or(beyond);
                page.dirty = record.dirty.without(beyond);
                page.epoch = epoch;
            });
        }
    }

    /// A guest requests a page for the first time since it was inserted.
    pub fn first_touch(&mut self, id: PageId, no: PageNo) {
        self.policy.first_touch(id, no);
    }

    /// A guest requests a page again.
    #[inline]
    pub fn touch(&mut self, id: PageId, no: PageNo) {
        self.policy.touch(id, no);
        if let Some(readers) = &mut self.readers {
            readers.touch(id);
        }
    }

    /// Sets the number of devices that use the cache; each has a fair share of it.
    pub fn share(&mut self, readers: usize) {
        match &mut self.readers {
            Some(known) => known.set_count(readers),
            None => {
                self.readers = Some(ReaderShares::new(readers, self.slots(), self.frames.total(), self.table.len()));
            }
        }
    }

    /// A device detaches from the image, or one with its number attaches again.
    pub fn set_reader_present(&mut self, reader: usize, is_present: bool) {
        if let Some(readers) = &mut self.readers {
            readers.set_present(reader, is_present);
        }
    }

    /// Sets the device that sends the following requests.
    pub fn set_reader(&mut self, reader: usize) {
        if let Some(readers) = &mut self.readers {
            readers.set_current(reader);
        }
    }

    // Frames.

    /// Takes a free frame, with one reference: for [`Pages::adopt_frame`], or for a store operation.
    pub fn take_frame(&mut self) -> Option<FrameId> {
        self.frames.take()
    }

    /// Adds a reference to a frame: a pin, or a store operation.
    pub fn hold_frame(&mut self, frame: FrameId) {
        self.frames.hold(frame);
    }

    /// Drops a reference to a frame.
    pub fn release_frame(&mut self, frame: FrameId) {
        self.made_room |= self.frames.release(frame);
    }

    /// The page's frame; takes a free one for it if it has none.
    pub fn ensure_frame(&mut self, id: PageId) -> Option<FrameId> {
        if let Some(frame) = self.table[id].frame() {
            return Some(frame);
        }
        let frame = self.frames.take()?;
        self.adopt_frame(id, frame);
        Some(frame)
    }

    /// Gives this frame to a page without one; the frame's reference becomes the page's. Sectors beyond the image are
    /// zeroed and valid; no other sector is valid yet.
    pub fn adopt_frame(&mut self, id: PageId, frame: FrameId) {
        debug_assert_eq!(self.table[id].frame(), None, "a second frame for {:?}", self.table[id]);
        let beyond = self.beyond_image(self.table[id].no());
        if !beyond.is_empty() {
            self.memory.zero_sectors(frame, beyond);
        }
        self.change(id, |page| {
            page.set_frame(frame);
            page.valid = beyond;
        });
    }

    /// Moves a page to a free frame, with all valid sectors, and leaves the old frame to its store operation.
    /// `None`: no frame is free.
    pub fn copy_on_write(&mut self, id: PageId) -> Option<()> {
        let new = self.frames.take()?;
        let page = &self.table[id];
        let old = page.frame().expect("a page under write-back has a frame");
        // Copy also the sectors that the guest is about to write: if the store fails, these are the only copy of
        // earlier writes.
        self.memory.copy_sectors(old, new, page.valid);
        self.release_frame(old);
        self.change(id, |page| {
            page.set_frame(new);
            page.clear(COPY_ON_WRITE);
        });
        Some(())
    }

    /// Copies sectors from the frame of a read-in to the page's own frame.
    ///
    /// => Only sectors that the page lacks, and that no writer is filling (I7).
    pub fn copy_from(&mut self, id: PageId, source: FrameId, mask: SectorMask) {
        let target = self.table[id].frame().expect("sectors are copied into a frame");
        self.memory.copy_sectors(source, target, mask);
    }

    /// Fills sectors of the page's frame with zeros.
    pub fn zero_sectors(&mut self, id: PageId, mask: SectorMask) {
        let frame = self.table[id].frame().expect("sectors are zeroed in a frame");
        self.memory.zero_sectors(frame, mask);
    }

    /// See [`FrameMemory::note_zero`].
    pub fn note_zero(&mut self, slot: usize, span: Option<SectorSpan>) {
        self.memory.note_zero(slot, span);
    }

    /// See [`FrameMemory::note_changed`].
    pub fn note_changed(&mut self, slot: usize, span: Option<SectorSpan>) {
        self.memory.note_changed(slot, span);
    }

    // Epochs.

    /// Closes the current epoch, unless it is empty; returns the last closed epoch.
    pub fn close_epoch(&mut self) -> Epoch {
        self.dirty.close_epoch()
    }

    /// A store write with pages of `epoch` starts. The epoch is not on the store until that write has ended.
    pub fn hold_epoch(&mut self, epoch: Epoch) {
        self.dirty.hold_epoch(epoch);
    }

    /// A write to the store with pages of `epoch` has ended.
    pub fn release_epoch(&mut self, epoch: Epoch) {
        self.dirty.release_epoch(epoch);
    }
}

/// Whether a page may be evicted: nothing else holds its frame, it is not busy, and all of it is durable on the store.
fn is_evictable(page: &Page, frames: &Frames) -> bool {
    let in_use = page.frame().is_none_or(|frame| frames.references(frame) > 1);
    !in_use && !page.is_unsynced() && !page.busy() && page.dirty.is_empty()
}

/// The record to publish of a page, changed by a planted bug of this kind if one is set.
fn with_planted_bug(page: &Page, record: FrameRecord) -> FrameRecord {
    if planted(PlantedBug::TailIsPublished) && page.is_unsynced() {
        return FrameRecord { dirty: page.valid, ..record };
    }
    if planted(PlantedBug::UnsyncedPublishedAsClean) {
        FrameRecord { dirty: page.dirty.or(page.writing), ..record }
    } else if planted(PlantedBug::WritebackPublishedAsClean) && !page.is_unsynced() {
        FrameRecord { dirty: page.dirty, ..record }
    } else {
        record
    }
}

impl Index<PageId> for Pages {
    type Output = Page;
    fn index(&self, id: PageId) -> &Page {
        &self.table[id]
    }
}
