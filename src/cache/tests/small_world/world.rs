//! Plays one scene: the cache, a disk of four pages, and the checks at every step.

use super::{Direction, Order, PART, PageState, Scene};
use crate::cache::pages::{COPY_ON_WRITE, READING};
use crate::cache::*;
use crate::sim::disk::SimulatedDisk;
use crate::sim::memory::{GARBAGE, SimulatedMemory};
use crate::units::{ExtentKind, ImageHoles, OpKind};

/// Pages of the image.
pub(super) const PAGES: usize = 4;
const SECTORS: usize = PAGES * 8;
/// Enough frames that no request waits for one.
const FRAMES: u32 = 48;
/// Time does not advance, so that pages are written back only for a test or a FLUSH.
const NOW: Tick = Tick::ZERO;

/// Versions of a sector: the initial contents of the disk, the first and the second write of the scene, the request.
const OLD_VERSION: u32 = 1000;
const FIRST: u32 = 2000;
const SECOND: u32 = 3000;
const REQUEST_VERSION: u32 = 4000;

const FLUSH: Ticket = Ticket(u64::MAX);

/// A store operation in flight.
#[derive(Debug)]
struct Operation {
    tag: u32,
    kind: OpKind,
    span: SectorSpan,
    frames: Vec<FrameId>,
    /// Write: the contents of the frames at its submission.
    content: Vec<u32>,
}

impl Operation {
    fn sectors(&self) -> std::ops::Range<usize> {
        self.span.start as usize..self.span.end() as usize
    }

    /// The position of a sector of the image in memory: the frame, and the sector within it.
    fn place(&self, sector: usize) -> (FrameId, usize) {
        (self.frames[sector / 8 - self.span.start as usize / 8], sector % 8)
    }
}

/// A guest's read or write.
#[derive(Debug)]
struct Transfer {
    direction: Direction,
    span: SectorSpan,
    admitted: u32,
    /// One bit for each sector whose piece has been returned.
    done: u32,
    /// The guest's version of each sector at the submission.
    version_before: [u32; SECTORS],
}

impl Transfer {
    /// The position of each sector of a piece on the image and in its frame.
    fn places(&self, piece: &Piece) -> impl Iterator<Item = (usize, usize)> + use<> {
        let sector = self.span.start as usize + piece.at as usize;
        (sector..).zip(usize::from(piece.first)..).take(piece.count as usize)
    }
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct World<'a> {
    scene: &'a Scene<'a>,
    cache: PageCache,
    memory: SimulatedMemory,
    disk: SimulatedDisk,
    /// The guest's version of each sector, and the two before it.
    guest: [[u32; 3]; SECTORS],
    operations: Vec<Operation>,
    requests: Vec<Transfer>,
    /// Pieces that are not returned yet, each with the index of its request.
    pieces: Vec<(usize, Piece)>,
    /// Pages of the reads that were submitted since the scene's request.
    pages_read: Vec<usize>,
    order: Order,
    flushed: bool,
}

impl<'a> World<'a> {
    pub fn new(scene: &'a Scene<'a>) -> Self {
        let settings = Settings {
            frames: FRAMES,
            image_sectors: scene.shape.image_sectors,
            block_sectors: scene.shape.block_sectors,
            holes: ImageHoles::Possible,
            readahead_pages_max: 0,
            dirty_pages_max: FRAMES,
            ..Settings::of(FRAMES, 1)
        };
        let memory = SimulatedMemory::new(FRAMES, 1);
        let cache = PageCache::new(settings, Box::new(memory.clone()));
        let mut disk = SimulatedDisk::new(scene.shape.image_sectors as usize, |page| scene.state(page).is_hole());
        let mut guest = [[0; 3]; SECTORS];
        for (sector, versions) in guest.iter_mut().enumerate().take(disk.sectors()) {
            if !scene.state(sector / 8).is_hole() {
                *versions = [OLD_VERSION + sector as u32; 3];
                disk.write(sector, versions[0]);
            }
        }
        Self {
            scene,
            cache,
            memory,
            disk,
            guest,
            operations: Vec::new(),
            requests: Vec::new(),
            pieces: Vec::new(),
            pages_read: Vec::new(),
            order: Order::Prompt,
            flushed: false,
        }
    }

    /// Sets up the scene, makes the request, completes everything, flushes, and reads everything back from the store.
    pub fn play(mut self) {
        self.set_scene();
        self.make_request();
        self.complete_all();
        self.flush();
        self.check_pages_read();
        self.each_page(|_| true, Self::drop_page);
        self.submit(Direction::Read, SectorSpan::new(0, self.scene.shape.image_sectors), 0);
        self.complete_all();
    }

    /// Brings each page into its state.
    fn set_scene(&mut self) {
        self.cache.request_map(PageNo(0));
        self.turn();
        self.complete(0);
        // Pages are put under write-back first, while no other pages are dirty that a cluster could include.
        self.each_page(|state| matches!(state, PageState::Writing | PageState::WritingDirty), Self::write_page);
        self.each_page(|state| state == PageState::WritingPart, |world, page| world.write_part(page, FIRST));
        self.each_page(|_| true, Self::put);
        self.each_page(|state| state == PageState::WritingDirty, |world, page| world.write_part(page, SECOND));
        self.each_page(PageState::is_reading, Self::read_page);
        self.each_page(
            |state| state == PageState::Clean,
            |world, page| {
                world.read_page(page);
                world.complete(world.operations.len() - 1);
            },
        );
        let in_part = |state| matches!(state, PageState::Partial | PageState::PartialHole | PageState::ReadingDirty);
        self.each_page(in_part, |world, page| world.write_part(page, FIRST));
        self.each_page(|state| state == PageState::Dirty, Self::write_page);
        (0..PAGES).for_each(|page| self.check_state(page));
        if !self.scene.shape.mapped {
            self.cache.forget_holes(self.page_span(0), OpKind::Discard);
        }
    }

    /// Checks that the page is in the state that the scene requires.
    fn check_state(&self, page: usize) {
        let state = self.scene.state(page);
        let Some(id) = self.find(page) else {
            return assert!(matches!(state, PageState::Absent | PageState::Hole), "page {page} should be {state:?}");
        };
        let held = &self.cache.pages[id];
        let inside = SectorMask::run(0, self.page_span(page).count as u8);
        // Sectors beyond the image are valid as soon as the page has a frame.
        let beyond = if held.frame().is_some() { SectorMask::ALL.without(inside) } else { SectorMask::NONE };
        assert_eq!(held.valid, state.valid().or(beyond), "page {page} should be {state:?}");
        assert_eq!(held.dirty, state.dirty().and(inside), "page {page} should be {state:?}");
        assert_eq!(held.is(READING), state.is_reading(), "page {page} should be {state:?}");
        assert_eq!(
            held.is(COPY_ON_WRITE),
            matches!(state, PageState::Writing | PageState::WritingPart),
            "page {page} should be {state:?}"
        );
    }

    fn each_page(&mut self, wanted: impl Fn(PageState) -> bool, mut act: impl FnMut(&mut Self, usize)) {
        for page in 0..PAGES {
            if wanted(self.scene.state(page)) {
                act(self, page);
            }
        }
    }

    /// The sectors of a page, truncated at the end of the image.
    fn page_span(&self, page: usize) -> SectorSpan {
        let start = page as u64 * 8;
        SectorSpan::new(start, (self.scene.shape.image_sectors - start).min(8))
    }

    fn read_page(&mut self, page: usize) {
        self.submit(Direction::Read, self.page_span(page), 0);
    }

    fn write_page(&mut self, page: usize) {
        self.submit(Direction::Write, self.page_span(page), FIRST);
    }

    fn write_part(&mut self, page: usize, version: u32) {
        let (first, count) = PART.first_run().expect("a part is not empty");
        let start = self.page_span(page).start + u64::from(first);
        self.submit(Direction::Write, SectorSpan::new(start, u64::from(count)), version);
    }

    /// Writes back a dirty page and its cluster.
    fn put(&mut self, page: usize) {
        if let Some(id) = self.find(page) {
            self.cache.put_cluster(id);
            self.collect();
        }
    }

    /// Removes a page from the cache, as a reclaim does: it is not in use, and the store has its contents.
    fn drop_page(&mut self, page: usize) {
        if let Some(id) = self.find(page) {
            self.cache.remove_page(id);
        }
    }

    fn find(&self, page: usize) -> Option<PageId> {
        self.cache.pages.find(PageNo(page as u64))
    }

    /// Makes the scene's request. Checks which sectors it reads from the store, and how many it gets immediately.
    fn make_request(&mut self) {
        self.pages_read.clear();
        self.order = self.scene.order;
        let submitted_before = self.operations.len();
        self.submit(self.scene.direction, self.scene.span, REQUEST_VERSION);
        if self.scene.shape.mapped {
            let submitted: Vec<_> =
                self.operations[submitted_before..].iter().map(|operation| operation.span).collect();
            assert_eq!(submitted, self.runs_to_read(), "each run of missing pages is read by one operation");
            let request = self.requests.len() - 1;
            let held: u32 = self.pieces.iter().filter(|(of, _)| *of == request).map(|(_, piece)| piece.count).sum();
            let at_once = self.requests[request].done.count_ones() + held;
            assert_eq!(at_once, self.sectors_at_once(), "sectors that need not wait are ready immediately");
        }
        if self.scene.direction == Direction::Read {
            self.each_page(
                |state| state == PageState::Hole,
                |world, page| {
                    assert_eq!(world.find(page), None, "a read of a hole inserts no page");
                },
            );
        }
    }

    /// Whether the request has to wait for sectors of a page.
    fn waits_for(&self, page: usize) -> bool {
        let state = self.scene.state(page);
        self.scene.direction == Direction::Read
            && !state.is_hole()
            && !state.valid().contains(self.scene.requested(page))
    }

    /// The runs of adjacent pages that the request has to read in, without pages whose read-in is already in flight.
    fn runs_to_read(&self) -> Vec<SectorSpan> {
        let mut runs: Vec<SectorSpan> = Vec::new();
        for page in 0..PAGES {
            let state = self.scene.state(page);
            if !self.waits_for(page) || state.is_reading() || state == PageState::WritingPart {
                continue;
            }
            let span = self.page_span(page);
            match runs.last_mut() {
                Some(run) if run.end() == span.start => run.count += span.count,
                _ => runs.push(span),
            }
        }
        runs
    }

    /// Number of the request's sectors that need not wait.
    fn sectors_at_once(&self) -> u32 {
        (0..PAGES).filter(|&page| !self.waits_for(page)).map(|page| self.scene.requested(page).count()).sum()
    }

    /// Checks that each page was read once since the request if necessary, and otherwise not at all.
    fn check_pages_read(&mut self) {
        self.pages_read.sort_unstable();
        let expected: Vec<usize> = (0..PAGES).filter(|&page| self.has_to_be_read(page)).collect();
        assert_eq!(self.pages_read, expected, "pages read since the request");
    }

    /// Whether a page has to be read for the request, or for the flush after it: a store whose block is a page needs
    /// all of its sectors to write it.
    fn has_to_be_read(&self, page: usize) -> bool {
        let state = self.scene.state(page);
        let written =
            if self.scene.direction == Direction::Write { self.scene.requested(page) } else { SectorMask::NONE };
        let is_dirty = !state.dirty().or(written).is_empty();
        let for_flush = self.scene.shape.block_sectors == 8 && is_dirty && state.valid().or(written) != SectorMask::ALL;
        !state.is_hole() && !state.is_reading() && (self.waits_for(page) || for_flush)
    }

    /// Flushes, and checks that the store has all the data.
    fn flush(&mut self) {
        self.cache.flush(FLUSH);
        self.complete_all();
        assert!(self.flushed, "the flush does not end");
        for sector in 0..self.disk.sectors() {
            assert_eq!(self.disk.read(sector), self.guest[sector][0], "sector {sector} of the store after a flush");
        }
    }

    /// Submits a guest's request.
    fn submit(&mut self, direction: Direction, span: SectorSpan, version: u32) {
        if direction == Direction::Write {
            for sector in span.start as usize..span.end() as usize {
                self.guest[sector].rotate_right(1);
                self.guest[sector][0] = version + sector as u32;
            }
        }
        let version_before = self.guest.map(|versions| versions[0]);
        self.requests.push(Transfer { direction, span, admitted: 0, done: 0, version_before });
        self.admit(self.requests.len() - 1, Attempt::New);
        self.collect();
    }

    fn admit(&mut self, index: usize, attempt: Attempt) {
        let request = &mut self.requests[index];
        let access = Access { from: request.admitted, attempt, ..Access::new(Ticket(index as u64), request.span) };
        let mut pieces = Vec::new();
        let admitted = match request.direction {
            Direction::Read => self.cache.read(access, &mut pieces),
            Direction::Write => self.cache.write(access, &mut pieces),
        };
        request.admitted = match admitted {
            Admitted::All => request.span.count as u32,
            Admitted::Until(at) if request.direction == Direction::Read => at,
            _ => panic!("no write should stall here: {admitted:?}"),
        };
        pieces.into_iter().for_each(|piece| self.take(index, piece));
    }

    /// Takes operations and notices until there are no more. In the prompt order, returns pieces immediately.
    fn collect(&mut self) {
        loop {
            if self.order == Order::Prompt {
                self.return_pieces();
            }
            let (mut operations, mut notices) = (Vec::new(), Vec::new());
            self.cache.take_ops(|StoreOpRef { tag, kind, span, frames, .. }| {
                operations.push(Operation { tag, kind, span, frames: frames.to_vec(), content: Vec::new() });
            });
            self.cache.take_notices(&mut notices);
            if operations.is_empty() && notices.is_empty() {
                return self.check();
            }
            for operation in operations {
                self.begin(operation);
            }
            for notice in notices {
                self.handle_notice(notice);
            }
        }
    }

    fn begin(&mut self, mut operation: Operation) {
        let span = operation.span;
        assert!(span.end() <= self.scene.shape.image_sectors, "{:?} of {span:?} ends past the image", operation.kind);
        match operation.kind {
            OpKind::Read => {
                for no in span.pages().iter() {
                    self.check_read(no);
                    self.pages_read.push(no.0 as usize);
                }
            }
            OpKind::Write => {
                operation.content = self.content(&operation);
                assert!(!operation.content.contains(&GARBAGE), "garbage is written to the disk");
            }
            _ => {}
        }
        self.operations.push(operation);
    }

    /// Checks that a page that is read in lacks sectors and is not a hole. (That it gets a frame of its own, I7, is
    /// checked by `PageCache::check`.)
    fn check_read(&self, no: PageNo) {
        let id = self.cache.pages.find(no).expect("a page that is read is in the table");
        assert_ne!(self.cache.pages[id].valid, SectorMask::ALL, "{no:?} is read although all of it is valid");
        let kind = self.disk.map(no.0 as usize * 8, 1)[0].1;
        assert_eq!(kind, ExtentKind::Data, "{no:?} is read although it is a hole");
    }

    fn content(&self, operation: &Operation) -> Vec<u32> {
        operation
            .sectors()
            .map(|sector| operation.place(sector))
            .map(|(frame, at)| self.memory.get(frame, at))
            .collect()
    }

    /// Completes an operation with success, and ends the turn.
    fn complete(&mut self, index: usize) {
        let operation = self.operations.remove(index);
        match operation.kind {
            OpKind::Read => {
                for sector in operation.sectors() {
                    let (frame, at) = operation.place(sector);
                    self.memory.set(frame, at, self.disk.read(sector));
                }
            }
            OpKind::Write => {
                assert_eq!(self.content(&operation), operation.content, "a frame changed during its write");
                for (sector, &version) in operation.sectors().zip(&operation.content) {
                    self.disk.write(sector, version);
                }
            }
            _ => {}
        }
        let outcome = match operation.kind {
            OpKind::Map => Outcome::Mapped(self.disk.map(0, self.disk.sectors())),
            _ => Outcome::Done,
        };
        self.cache.complete(operation.tag, &outcome, NOW);
        self.turn();
    }

    fn turn(&mut self) {
        self.cache.pump(NOW);
        self.collect();
    }

    fn handle_notice(&mut self, notice: Notice) {
        match notice {
            Notice::Ready(ticket, piece) => self.take(ticket.0 as usize, piece),
            Notice::Resume(ticket) => self.admit(ticket.0 as usize, Attempt::Resumed),
            Notice::Done(FLUSH, Ok(())) => self.flushed = true,
            Notice::Done(..) | Notice::Unreadable(..) => panic!("nothing should fail here: {notice:?}"),
        }
    }

    /// Takes a piece. A piece of a write is filled immediately.
    fn take(&mut self, index: usize, piece: Piece) {
        if self.requests[index].direction == Direction::Write {
            let frame = piece.frame.expect("a piece of a write has frames");
            for (sector, place) in self.requests[index].places(&piece) {
                self.memory.set(frame, place, self.guest[sector][0]);
            }
        }
        self.pieces.push((index, piece));
    }

    /// Returns every piece. Checks the bytes of reads.
    fn return_pieces(&mut self) {
        for (index, piece) in std::mem::take(&mut self.pieces) {
            let request = &mut self.requests[index];
            let returned = SectorSpan::new(u64::from(piece.at), u64::from(piece.count));
            for sector in returned.start..returned.end() {
                assert_eq!(request.done >> sector & 1, 0, "I10: {returned:?} of {request:?} was ready twice");
                request.done |= 1 << sector;
            }
            if request.direction == Direction::Write {
                self.cache.finish_write(&piece, CopyResult::Complete);
            } else {
                self.check_bytes(index, &piece);
                self.cache.finish_read(&piece);
            }
        }
    }

    /// Checks that a read returns the version of its submission, or a newer one.
    fn check_bytes(&self, index: usize, piece: &Piece) {
        let request = &self.requests[index];
        for (sector, place) in request.places(piece) {
            let seen = piece.frame.map_or(0, |frame| self.memory.get(frame, place));
            let versions = self.guest[sector];
            let before = versions.iter().position(|&version| version == request.version_before[sector]);
            let allowed = &versions[..=before.expect("a sector is written at most twice meanwhile")];
            assert!(allowed.contains(&seen), "sector {sector} was read as {seen}, which is none of {allowed:?}");
        }
    }

    /// Completes everything that is in flight.
    fn complete_all(&mut self) {
        loop {
            self.turn();
            match (self.order, self.operations.len()) {
                (_, 0) if self.pieces.is_empty() => break,
                (_, 0) => self.return_pieces(),
                (Order::Prompt, _) => self.complete(0),
                (Order::Late, count) => self.complete(count - 1),
            }
        }
        for request in &self.requests {
            assert_eq!(
                u64::from(request.done.count_ones()),
                request.span.count,
                "I10: a sector of {request:?} was never ready"
            );
        }
    }

    fn check(&self) {
        let pinned: Vec<_> = self.pieces.iter().flat_map(|(_, piece)| piece.frames()).collect();
        self.cache.check(&pinned);
    }
}
