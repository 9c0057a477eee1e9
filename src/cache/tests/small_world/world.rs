//! The world that one scene is played in: the cache, four pages of disk, and what must hold at every step.

use super::super::settings_of;
use super::{Direction, Order, PART, PageState, Scene};
use crate::cache::pages::{FROZEN, READING};
use crate::cache::*;
use crate::sim::disk::Disk;
use crate::sim::memory::{GARBAGE, Memory};
use crate::units::{ExtentKind, ImageHoles, OpKind};

/// Pages of the image.
pub(super) const PAGES: usize = 4;
const SECTORS: usize = PAGES * 8;
/// Enough that nothing waits for a frame.
const FRAMES: u32 = 48;
/// The clock stands, so that nothing is written back but what a test or a flush asks for.
const NOW: Tick = Tick(0);

/// Versions of a sector: as it was on the disk, as the scene's pages were written, and rewritten, and by the request.
const OLD: u32 = 1000;
const FIRST: u32 = 2000;
const SECOND: u32 = 3000;
const REQUEST: u32 = 4000;

const FLUSH: Ticket = Ticket(u64::MAX);

/// A store operation under way.
#[derive(Debug)]
struct Operation {
    tag: u32,
    kind: OpKind,
    span: SectorSpan,
    frames: Vec<FrameId>,
    /// Write: what the frames held when it began.
    content: Vec<u32>,
}

impl Operation {
    fn sectors(&self) -> std::ops::Range<usize> {
        self.span.start as usize..self.span.end() as usize
    }

    /// Frame and sector within it of a sector of the image.
    fn place(&self, sector: usize) -> (FrameId, usize) {
        (self.frames[sector / 8 - self.span.start as usize / 8], sector % 8)
    }
}

/// A guest's read or write.
#[derive(Debug)]
struct Request {
    op: Direction,
    span: SectorSpan,
    admitted: u32,
    /// One bit for each sector whose piece has been given back.
    settled: u32,
    /// What the guest knew of each sector when it asked.
    known: [u32; SECTORS],
}

impl Request {
    /// Each sector of a piece: where it is on the image, and in its frame.
    fn places(&self, piece: &Piece) -> impl Iterator<Item = (usize, usize)> + use<> {
        let sector = self.span.start as usize + piece.at as usize;
        (sector..).zip(usize::from(piece.first)..).take(piece.count as usize)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct World<'a> {
    scene: &'a Scene<'a>,
    cache: PageCache,
    memory: Memory,
    disk: Disk,
    /// What each sector holds for a guest, and what it held before and before that.
    guest: [[u32; 3]; SECTORS],
    operations: Vec<Operation>,
    requests: Vec<Request>,
    /// Pieces that were handed out and not yet given back, each with its request.
    pieces: Vec<(usize, Piece)>,
    /// Pages of the reads that were begun since the request came.
    pages_read: Vec<usize>,
    order: Order,
    flushed: bool,
}

impl<'a> World<'a> {
    pub fn new(scene: &'a Scene<'a>, planted: Option<PlantedBug>) -> Self {
        let settings = Settings {
            frames: FRAMES,
            image_sectors: scene.shape.image_sectors,
            block_sectors: scene.shape.block_sectors,
            holes: ImageHoles::Possible,
            readahead_pages_max: 0,
            dirty_pages_max: FRAMES,
            ..settings_of(FRAMES, 1)
        };
        let memory = Memory::new(FRAMES, 1);
        let mut cache = PageCache::new(settings, Box::new(memory.clone()));
        cache.plant(planted);
        let mut disk = Disk::new(scene.shape.image_sectors as usize, |page| scene.state(page).is_hole());
        let mut guest = [[0; 3]; SECTORS];
        for (sector, versions) in guest.iter_mut().enumerate().take(disk.sectors()) {
            if !scene.state(sector / 8).is_hole() {
                *versions = [OLD + sector as u32; 3];
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

    /// Sets the scene, makes the request, lets everything end, flushes, and reads everything back from the store.
    pub fn play(mut self) {
        self.set_scene();
        self.make_request();
        self.settle();
        self.flush();
        self.check_pages_read();
        self.each_page(|_| true, Self::drop_page);
        self.ask(Direction::Read, SectorSpan::new(0, self.scene.shape.image_sectors), 0);
        self.settle();
    }

    /// Brings each page into its state.
    fn set_scene(&mut self) {
        self.cache.ask_for_map(PageNo(0));
        self.turn();
        self.end(0);
        // Written pages go to the store before anything else is in memory that a cluster could take along.
        self.each_page(|state| matches!(state, PageState::Writing | PageState::WritingDirty), Self::write_page);
        self.each_page(|state| state == PageState::WritingPart, |world, page| world.write_part(page, FIRST));
        self.each_page(|_| true, Self::put);
        self.each_page(|state| state == PageState::WritingDirty, |world, page| world.write_part(page, SECOND));
        self.each_page(PageState::is_reading, Self::read_page);
        self.each_page(
            |state| state == PageState::Clean,
            |world, page| {
                world.read_page(page);
                world.end(world.operations.len() - 1);
            },
        );
        let in_part = |state| matches!(state, PageState::Partial | PageState::PartialHole | PageState::ReadingDirty);
        self.each_page(in_part, |world, page| world.write_part(page, FIRST));
        self.each_page(|state| state == PageState::Dirty, Self::write_page);
        (0..PAGES).for_each(|page| self.check_state(page));
        if !self.scene.shape.mapped {
            self.cache.forget_holes(self.page_span(0));
        }
    }

    /// The page is in the state that the scene wants.
    fn check_state(&self, page: usize) {
        let state = self.scene.state(page);
        let Some(id) = self.find(page) else {
            return assert!(matches!(state, PageState::Absent | PageState::Hole), "page {page} is to be {state:?}");
        };
        let held = &self.cache.pages[id];
        let inside = SectorMask::run(0, self.page_span(page).count as u8);
        // What lies beyond the image is known as soon as there is memory for it.
        let beyond = if held.frame().is_some() { SectorMask::ALL.without(inside) } else { SectorMask::NONE };
        assert_eq!(held.valid, state.valid().or(beyond), "page {page} is to be {state:?}");
        assert_eq!(held.dirty, state.dirty().and(inside), "page {page} is to be {state:?}");
        assert_eq!(held.is(READING), state.is_reading(), "page {page} is to be {state:?}");
        assert_eq!(
            held.is(FROZEN),
            matches!(state, PageState::Writing | PageState::WritingPart),
            "page {page}: {state:?}"
        );
    }

    fn each_page(&mut self, wanted: impl Fn(PageState) -> bool, mut act: impl FnMut(&mut Self, usize)) {
        for page in 0..PAGES {
            if wanted(self.scene.state(page)) {
                act(self, page);
            }
        }
    }

    /// The sectors of a page, cut at the end of the image.
    fn page_span(&self, page: usize) -> SectorSpan {
        let start = page as u64 * 8;
        SectorSpan::new(start, (self.scene.shape.image_sectors - start).min(8))
    }

    fn read_page(&mut self, page: usize) {
        self.ask(Direction::Read, self.page_span(page), 0);
    }

    fn write_page(&mut self, page: usize) {
        self.ask(Direction::Write, self.page_span(page), FIRST);
    }

    fn write_part(&mut self, page: usize, version: u32) {
        let (first, count) = PART.first_run().expect("a part is not empty");
        let start = self.page_span(page).start + u64::from(first);
        self.ask(Direction::Write, SectorSpan::new(start, u64::from(count)), version);
    }

    /// Sends a dirty page, and what goes with it, to the store.
    fn put(&mut self, page: usize) {
        if let Some(id) = self.find(page) {
            self.cache.put_cluster(id);
            self.collect();
        }
    }

    /// Takes a page out of the cache, as a reclaim does: nothing holds it, and the store has it.
    fn drop_page(&mut self, page: usize) {
        if let Some(id) = self.find(page) {
            self.cache.remove_page(id);
        }
    }

    fn find(&self, page: usize) -> Option<PageId> {
        self.cache.pages.find(PageNo(page as u64))
    }

    /// The scene's request: what it reads, and what it gets at once, is known to the sector.
    fn make_request(&mut self) {
        self.pages_read.clear();
        self.order = self.scene.order;
        let begun_before = self.operations.len();
        self.ask(self.scene.op, self.scene.span, REQUEST);
        if self.scene.shape.mapped {
            let begun: Vec<_> = self.operations[begun_before..].iter().map(|operation| operation.span).collect();
            assert_eq!(begun, self.runs_to_read(), "what is missing is read, in one operation for each run of pages");
            let request = self.requests.len() - 1;
            let waiting: u32 = self.pieces.iter().filter(|(of, _)| *of == request).map(|(_, piece)| piece.count).sum();
            let at_once = self.requests[request].settled.count_ones() + waiting;
            assert_eq!(at_once, self.sectors_there(), "what is there is handed out at once");
        }
        if self.scene.op == Direction::Read {
            self.each_page(
                |state| state == PageState::Hole,
                |world, page| {
                    assert_eq!(world.find(page), None, "a hole takes no page");
                },
            );
        }
    }

    /// Whether the request has to wait for sectors of a page.
    fn waits_for(&self, page: usize) -> bool {
        let state = self.scene.state(page);
        self.scene.op == Direction::Read && !state.is_hole() && !state.valid().contains(self.scene.wanted(page))
    }

    /// The runs of neighbouring pages that the request has to read, none of which is under way.
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

    /// How many of the request's sectors need not wait.
    fn sectors_there(&self) -> u32 {
        (0..PAGES).filter(|&page| !self.waits_for(page)).map(|page| self.scene.wanted(page).count()).sum()
    }

    /// Since the request came each page was read once if it had to be, and else not at all.
    fn check_pages_read(&mut self) {
        self.pages_read.sort_unstable();
        let expected: Vec<usize> = (0..PAGES).filter(|&page| self.has_to_be_read(page)).collect();
        assert_eq!(self.pages_read, expected, "pages read since the request came");
    }

    /// Whether a page has to be read for the request, or for the flush after it: a store of whole blocks takes no page
    /// of which only a part is known.
    fn has_to_be_read(&self, page: usize) -> bool {
        let state = self.scene.state(page);
        let written = if self.scene.op == Direction::Write { self.scene.wanted(page) } else { SectorMask::NONE };
        let is_dirty = !state.dirty().or(written).is_empty();
        let for_flush = self.scene.shape.block_sectors == 8 && is_dirty && state.valid().or(written) != SectorMask::ALL;
        !state.is_hole() && !state.is_reading() && (self.waits_for(page) || for_flush)
    }

    /// Everything is on the store.
    fn flush(&mut self) {
        self.cache.flush(FLUSH);
        self.settle();
        assert!(self.flushed, "a flush ends");
        for sector in 0..self.disk.sectors() {
            assert_eq!(self.disk.read(sector), self.guest[sector][0], "sector {sector} of the store after a flush");
        }
    }

    /// A guest's request, as far as the cache takes it now.
    fn ask(&mut self, op: Direction, span: SectorSpan, version: u32) {
        if op == Direction::Write {
            for sector in span.start as usize..span.end() as usize {
                self.guest[sector].rotate_right(1);
                self.guest[sector][0] = version + sector as u32;
            }
        }
        let known = self.guest.map(|versions| versions[0]);
        self.requests.push(Request { op, span, admitted: 0, settled: 0, known });
        self.admit(self.requests.len() - 1, false);
        self.collect();
    }

    fn admit(&mut self, index: usize, resumed: bool) {
        let request = &mut self.requests[index];
        let access = Access { ticket: Ticket(index as u64), span: request.span, from: request.admitted, resumed };
        let mut pieces = Vec::new();
        let admitted = match request.op {
            Direction::Read => self.cache.read(access, &mut pieces),
            Direction::Write => self.cache.write(access, &mut pieces),
        };
        request.admitted = match admitted {
            Admitted::All => request.span.count as u32,
            Admitted::Until(at) if request.op == Direction::Read => at,
            _ => panic!("a write waits for nothing here: {admitted:?}"),
        };
        pieces.into_iter().for_each(|piece| self.take(index, piece));
    }

    /// Takes the cache's plans and notices until there are no more, and gives back what is ready.
    fn collect(&mut self) {
        loop {
            if self.order == Order::Prompt {
                self.give_back_all();
            }
            let (mut plans, mut notices) = (Vec::new(), Vec::new());
            self.cache.take_ops(|StoreOpRef { tag, kind, span, frames, .. }| {
                plans.push(Operation { tag, kind, span, frames: frames.to_vec(), content: Vec::new() });
            });
            self.cache.take_notices(&mut notices);
            if plans.is_empty() && notices.is_empty() {
                return self.check();
            }
            for operation in plans {
                self.begin(operation);
            }
            for notice in notices {
                self.hear(notice);
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
                assert!(!operation.content.contains(&GARBAGE), "garbage on its way to the disk");
            }
            _ => {}
        }
        self.operations.push(operation);
    }

    /// A read brings something that is not there, and that is not a hole (I7; `check` sees that it has its own frame).
    fn check_read(&self, no: PageNo) {
        let id = self.cache.pages.find(no).expect("a page that is read is in the table");
        assert_ne!(self.cache.pages[id].valid, SectorMask::ALL, "{no:?} is read although all of it is there");
        assert_eq!(
            self.disk.map(no.0 as usize * 8, 1),
            [(1, ExtentKind::Data)],
            "{no:?} is read although it is a hole"
        );
    }

    fn content(&self, operation: &Operation) -> Vec<u32> {
        operation
            .sectors()
            .map(|sector| operation.place(sector))
            .map(|(frame, at)| self.memory.get(frame, at))
            .collect()
    }

    /// An operation ends well, and so does the turn.
    fn end(&mut self, index: usize) {
        let operation = self.operations.remove(index);
        match operation.kind {
            OpKind::Read => {
                for sector in operation.sectors() {
                    let (frame, at) = operation.place(sector);
                    self.memory.set(frame, at, self.disk.read(sector));
                }
            }
            OpKind::Write => {
                assert_eq!(self.content(&operation), operation.content, "a frame changed on its way to the disk");
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

    fn hear(&mut self, notice: Notice) {
        match notice {
            Notice::Ready(ticket, piece) => self.take(ticket.0 as usize, piece),
            Notice::Resume(ticket) => self.admit(ticket.0 as usize, true),
            Notice::Done(FLUSH, Ok(())) => self.flushed = true,
            Notice::Done(..) | Notice::Unreadable(..) => panic!("nothing fails here: {notice:?}"),
        }
    }

    /// A piece is handed out: written bytes go into it at once.
    fn take(&mut self, index: usize, piece: Piece) {
        if self.requests[index].op == Direction::Write {
            let frame = piece.frame.expect("a write has memory");
            for (sector, place) in self.requests[index].places(&piece) {
                self.memory.set(frame, place, self.guest[sector][0]);
            }
        }
        self.pieces.push((index, piece));
    }

    /// Gives every piece back; bytes that are read are looked at now.
    fn give_back_all(&mut self) {
        for (index, piece) in std::mem::take(&mut self.pieces) {
            let request = &mut self.requests[index];
            let came = SectorSpan::new(u64::from(piece.at), u64::from(piece.count));
            for sector in came.start..came.end() {
                assert_eq!(request.settled >> sector & 1, 0, "I10: {came:?} of {request:?} came twice");
                request.settled |= 1 << sector;
            }
            if request.op == Direction::Write {
                self.cache.finish_write(&piece, CopyResult::Complete);
            } else {
                self.check_bytes(index, &piece);
                self.cache.finish_read(&piece);
            }
        }
    }

    /// A read finds what the guest knew when it asked, or anything newer.
    fn check_bytes(&self, index: usize, piece: &Piece) {
        let request = &self.requests[index];
        for (sector, place) in request.places(piece) {
            let seen = piece.frame.map_or(0, |frame| self.memory.get(frame, place));
            let versions = self.guest[sector];
            let known = versions.iter().position(|&version| version == request.known[sector]);
            let allowed = &versions[..=known.expect("few writes come meanwhile")];
            assert!(allowed.contains(&seen), "sector {sector} was read as {seen}, and not one of {allowed:?}");
        }
    }

    /// Lets everything end that is under way.
    fn settle(&mut self) {
        loop {
            self.turn();
            match (self.order, self.operations.len()) {
                (_, 0) if self.pieces.is_empty() => break,
                (_, 0) => self.give_back_all(),
                (Order::Prompt, _) => self.end(0),
                (Order::Late, count) => self.end(count - 1),
            }
        }
        for request in &self.requests {
            assert_eq!(u64::from(request.settled.count_ones()), request.span.count, "every sector comes: {request:?}");
        }
    }

    fn check(&self) {
        let pinned: Vec<_> = self.pieces.iter().flat_map(|(_, piece)| piece.frames()).collect();
        self.cache.check(&pinned);
    }
}
