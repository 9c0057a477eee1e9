//! The page cache with guests that read, over a store of which only latency and bandwidth are known; the clock is
//! simulated, and no byte moves.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use genblk::cache::{Access, Admitted, Notice, Outcome, PageCache, Settings, Stats, Ticket};
use genblk::units::{OpKind, SECTORS_PER_PAGE, SectorSpan, Tick};

use crate::bare_cache::{bare_cache, defaults};

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// Pages of the image (64 GiB).
pub const IMAGE_PAGES: u64 = 1 << 24;
/// Pages of the cache (256 MiB).
pub const CACHE_PAGES: u32 = 1 << 16;
/// What a guest takes for a request besides waiting for it: the call alone, without what it does with each page.
const REQUEST_NS: u64 = 500;

/// What is known of a store. Latencies overlap; bytes come one after the other.
#[derive(Clone, Copy, Debug)]
pub struct StoreModel {
    /// For tables.
    pub name: &'static str,
    /// From a read's start to its first byte.
    pub latency_us: u64,
    /// Bytes in a microsecond, which is megabytes in a second.
    pub bytes_per_us: u64,
}

/// Someone who reads: so many requests at a time, in this order.
pub struct Reader {
    /// First page and number of pages of each request.
    pub requests: Box<dyn Iterator<Item = (u64, u64)>>,
    /// Requests under way at a time.
    pub depth: usize,
    /// What it takes to use a page.
    pub ns_per_page: u64,
    /// When it begins.
    pub begins_ns: u64,
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Bytes that guests read, in a microsecond.
    pub bytes_per_us: f64,
    /// Pages that guests read.
    pub demanded: u64,
    /// Pages that came from the store.
    pub fetched: u64,
    /// The cache's own count at the end.
    pub stats: Stats,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A read ends.
    Done(u32),
    /// The store says of so many sectors that none are holes.
    Mapped(u32, u64),
    /// A reader is ready for another request.
    Ready(usize),
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Pending {
    reader: usize,
    span: SectorSpan,
    sectors_left: u64,
    admitted: u32,
}

struct World {
    cache: PageCache,
    store: StoreModel,
    readers: Vec<Reader>,
    pending: Vec<Option<Pending>>,
    free_tickets: Vec<usize>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    event_count: u64,
    now_ns: u64,
    /// When the store has sent all that it was asked for.
    store_idle_ns: u64,
    demanded: u64,
}

/// Lets the readers read to their end.
pub fn run(store: StoreModel, readers: Vec<Reader>) -> Measured {
    let mut world = World::new(store, readers);
    for reader in 0..world.readers.len() {
        for _ in 0..world.readers[reader].depth {
            world.at(world.readers[reader].begins_ns, Event::Ready(reader));
        }
    }
    let mut last_request_ns = 0;
    while let Some(Reverse((at, _, event))) = world.events.pop() {
        world.now_ns = at;
        match event {
            Event::Done(tag) => world.cache.complete(tag, &Outcome::Done, world.tick()),
            Event::Mapped(tag, sectors) => {
                world.cache.complete(tag, &Outcome::Mapped(vec![(sectors, false)]), world.tick());
            }
            Event::Ready(reader) => {
                last_request_ns = at;
                world.next_request(reader);
            }
        }
        world.end_turn();
    }
    assert!(world.pending.iter().all(Option::is_none), "every request was answered");
    let stats = world.cache.stats();
    Measured {
        bytes_per_us: (world.demanded * PAGE_BYTES) as f64 * 1000.0 / last_request_ns as f64,
        demanded: world.demanded,
        fetched: stats.store_read_sectors / SECTORS_PER_PAGE,
        stats,
    }
}

impl World {
    fn new(store: StoreModel, readers: Vec<Reader>) -> Self {
        Self {
            cache: bare_cache(Settings { sparse: true, ..defaults(CACHE_PAGES, IMAGE_PAGES) }),
            store,
            readers,
            pending: Vec::new(),
            free_tickets: Vec::new(),
            events: BinaryHeap::new(),
            event_count: 0,
            now_ns: 0,
            store_idle_ns: 0,
            demanded: 0,
        }
    }

    fn tick(&self) -> Tick {
        Tick(self.now_ns / 1000)
    }

    fn at(&mut self, ns: u64, event: Event) {
        // Events of one time come in the order in which they were made.
        self.event_count += 1;
        self.events.push(Reverse((ns, self.event_count, event)));
    }

    /// A reader asks for more, if there is more that it wants.
    fn next_request(&mut self, reader: usize) {
        let Some((first, count)) = self.readers[reader].requests.next() else {
            return;
        };
        self.demanded += count;
        let span = SectorSpan::new(first * SECTORS_PER_PAGE, count * SECTORS_PER_PAGE);
        let pending = Some(Pending { reader, span, sectors_left: span.count, admitted: 0 });
        let ticket = self.free_tickets.pop().unwrap_or(self.pending.len());
        if ticket == self.pending.len() {
            self.pending.push(pending);
        } else {
            self.pending[ticket] = pending;
        }
        self.admit(ticket, false);
    }

    /// Asks the cache for what it has not admitted yet of a request.
    fn admit(&mut self, ticket: usize, resumed: bool) {
        let Pending { span, admitted, .. } = self.pending[ticket].expect("a request under way");
        let mut pieces = Vec::new();
        let access = Access { ticket: Ticket(ticket as u64), span, from: admitted, resumed };
        if let Admitted::Until(admitted) = self.cache.read(access, &mut pieces) {
            self.pending[ticket].as_mut().expect("a request under way").admitted = admitted;
        }
        for piece in pieces {
            self.cache.finish_read(&piece);
            self.deliver(ticket, u64::from(piece.count));
        }
    }

    /// Sectors of a request have come; with the last of them its reader goes on after a while.
    fn deliver(&mut self, ticket: usize, sectors: u64) {
        let pending = self.pending[ticket].as_mut().expect("a request under way");
        pending.sectors_left -= sectors;
        if pending.sectors_left == 0 {
            let pages = pending.span.count / SECTORS_PER_PAGE;
            let reader = pending.reader;
            self.pending[ticket] = None;
            self.free_tickets.push(ticket);
            let busy_ns = REQUEST_NS + pages * self.readers[reader].ns_per_page;
            self.at(self.now_ns + busy_ns, Event::Ready(reader));
        }
    }

    /// Pumps, hands the store what the cache wants, and the guests what has come; until nothing moves.
    fn end_turn(&mut self) {
        loop {
            self.cache.pump(self.tick());
            let mut plans = Vec::new();
            self.cache.take_ops(|plan| plans.push((plan.tag, plan.kind, plan.span.count)));
            for (tag, kind, sectors) in plans {
                self.start(tag, kind, sectors);
            }
            let mut notices = Vec::new();
            self.cache.take_notices(&mut notices);
            if notices.is_empty() {
                return;
            }
            notices.into_iter().for_each(|notice| self.obey(notice));
        }
    }

    /// The store begins an operation; it answers what it holds of an extent map after its latency.
    fn start(&mut self, tag: u32, kind: OpKind, sectors: u64) {
        let answer_ns = self.now_ns + self.store.latency_us * 1000;
        match kind {
            OpKind::Read => {
                self.store_idle_ns = self.store_idle_ns.max(answer_ns) + sectors * 512 * 1000 / self.store.bytes_per_us;
                self.at(self.store_idle_ns, Event::Done(tag));
            }
            OpKind::Map => self.at(answer_ns, Event::Mapped(tag, sectors)),
            _ => unreachable!("nobody writes"),
        }
    }

    fn obey(&mut self, notice: Notice) {
        let number = |Ticket(number): Ticket| number as usize;
        match notice {
            Notice::Ready(ticket, piece) => {
                self.cache.finish_read(&piece);
                self.deliver(number(ticket), u64::from(piece.count));
            }
            Notice::Resume(ticket) => self.admit(number(ticket), true),
            Notice::Unreadable(..) | Notice::Done(..) => unreachable!("nothing fails, and only reads are asked for"),
        }
    }
}
