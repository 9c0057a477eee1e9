//! A discrete-event simulation: the page cache with guests that read, on a store that has a latency and a bandwidth.
//! Time is simulated, and no data is moved.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use genblk::cache::{Access, Admitted, Attempt, Notice, Outcome, PageCache, Settings, Stats, Ticket};
use genblk::units::{ExtentKind, ImageHoles, OpKind, SECTORS_PER_PAGE, SectorSpan, Tick};

use crate::bare_cache::bare_cache;

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// Pages of the image (64 GiB).
pub const IMAGE_PAGES: u64 = 1 << 24;
/// Pages of the cache (256 MiB).
pub const CACHE_PAGES: u32 = 1 << 16;
/// The guest's overhead per request, without the time that it spends on each page.
const REQUEST_NS: u64 = 500;

/// A simulated store. The latencies of requests overlap, their transfers do not.
#[derive(Clone, Copy, Debug)]
pub struct StoreModel {
    /// Its name in tables.
    pub name: &'static str,
    /// From the start of a read to its first byte.
    pub latency_us: u64,
    /// Bytes per microsecond, which is MB/s.
    pub bytes_per_us: u64,
}

/// A reader: submits its requests in order.
pub struct Reader {
    /// First page and number of pages of each request.
    pub requests: Box<dyn Iterator<Item = (u64, u64)>>,
    /// Queue depth.
    pub depth: usize,
    /// The time that it spends on each page.
    pub ns_per_page: u64,
    /// When it starts.
    pub starts_ns: u64,
}

/// The result of a run.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// The guests' throughput.
    pub bytes_per_us: f64,
    /// Pages that guests read.
    pub demanded: u64,
    /// Pages that the store read.
    pub fetched: u64,
    /// The statistics of the cache at the end.
    pub stats: Stats,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A read of the store ends.
    Done(u32),
    /// An extent query ends: this many sectors are data.
    Mapped(u32, u64),
    /// A reader submits its next request.
    Ready(usize),
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Pending {
    reader: usize,
    span: SectorSpan,
    sectors_left: u64,
    admitted: u32,
}

struct Simulation {
    cache: PageCache,
    store: StoreModel,
    readers: Vec<Reader>,
    pending: Vec<Option<Pending>>,
    free_tickets: Vec<usize>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    event_count: u64,
    now_ns: u64,
    /// When the store will have finished all transfers.
    store_idle_ns: u64,
    demanded: u64,
}

/// Runs the readers to their end.
pub fn run(store: StoreModel, readers: Vec<Reader>) -> Measured {
    let mut simulation = Simulation::new(store, readers);
    for reader in 0..simulation.readers.len() {
        for _ in 0..simulation.readers[reader].depth {
            simulation.schedule(simulation.readers[reader].starts_ns, Event::Ready(reader));
        }
    }
    let mut last_request_ns = 0;
    while let Some(Reverse((at, _, event))) = simulation.events.pop() {
        simulation.now_ns = at;
        match event {
            Event::Done(tag) => simulation.cache.complete(tag, &Outcome::Done, simulation.tick()),
            Event::Mapped(tag, sectors) => {
                simulation.cache.complete(tag, &Outcome::Mapped(vec![(sectors, ExtentKind::Data)]), simulation.tick());
            }
            Event::Ready(reader) => {
                last_request_ns = at;
                simulation.next_request(reader);
            }
        }
        simulation.end_turn();
    }
    assert!(simulation.pending.iter().all(Option::is_none), "every request completed");
    let stats = simulation.cache.stats();
    Measured {
        bytes_per_us: (simulation.demanded * PAGE_BYTES) as f64 * 1000.0 / last_request_ns as f64,
        demanded: simulation.demanded,
        fetched: stats.store_read_sectors / SECTORS_PER_PAGE,
        stats,
    }
}

impl Simulation {
    fn new(store: StoreModel, readers: Vec<Reader>) -> Self {
        Self {
            cache: bare_cache(Settings {
                holes: ImageHoles::Possible,
                ..Settings::of(CACHE_PAGES, IMAGE_PAGES * SECTORS_PER_PAGE)
            }),
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
        Tick::from_ns(self.now_ns)
    }

    fn schedule(&mut self, ns: u64, event: Event) {
        // Events with equal times keep the order in which they were scheduled.
        self.event_count += 1;
        self.events.push(Reverse((ns, self.event_count, event)));
    }

    /// Submits the next request of a reader, if there is one.
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
        self.admit(ticket, Attempt::New);
    }

    /// Admits the rest of a request to the cache, as far as the cache allows.
    fn admit(&mut self, ticket: usize, attempt: Attempt) {
        let Pending { span, admitted, .. } = self.pending[ticket].expect("the request is in flight");
        let mut pieces = Vec::new();
        let access = Access { from: admitted, attempt, ..Access::new(Ticket(ticket as u64), span) };
        if let Admitted::Until(admitted) = self.cache.read(access, &mut pieces) {
            self.pending[ticket].as_mut().expect("the request is in flight").admitted = admitted;
        }
        for piece in pieces {
            self.cache.finish_read(&piece);
            self.deliver(ticket, u64::from(piece.count));
        }
    }

    /// Counts arrived sectors of a request. After the last one its reader is busy for a while, then submits the next
    /// request.
    fn deliver(&mut self, ticket: usize, sectors: u64) {
        let pending = self.pending[ticket].as_mut().expect("the request is in flight");
        pending.sectors_left -= sectors;
        if pending.sectors_left == 0 {
            let pages = pending.span.count / SECTORS_PER_PAGE;
            let reader = pending.reader;
            self.pending[ticket] = None;
            self.free_tickets.push(ticket);
            let busy_ns = REQUEST_NS + pages * self.readers[reader].ns_per_page;
            self.schedule(self.now_ns + busy_ns, Event::Ready(reader));
        }
    }

    /// Pumps the cache, starts its store operations, and handles its notices, until nothing is left to do.
    fn end_turn(&mut self) {
        loop {
            self.cache.pump(self.tick());
            let mut ops = Vec::new();
            self.cache.take_ops(|op| ops.push((op.tag, op.kind, op.span.count)));
            for (tag, kind, sectors) in ops {
                self.start(tag, kind, sectors);
            }
            let mut notices = Vec::new();
            self.cache.take_notices(&mut notices);
            if notices.is_empty() {
                return;
            }
            notices.into_iter().for_each(|notice| self.handle_notice(notice));
        }
    }

    /// Starts a store operation. An extent query takes the latency of the store.
    fn start(&mut self, tag: u32, kind: OpKind, sectors: u64) {
        let first_byte_ns = self.now_ns + self.store.latency_us * 1000;
        match kind {
            OpKind::Read => {
                self.store_idle_ns =
                    self.store_idle_ns.max(first_byte_ns) + sectors * 512 * 1000 / self.store.bytes_per_us;
                self.schedule(self.store_idle_ns, Event::Done(tag));
            }
            OpKind::Map => self.schedule(first_byte_ns, Event::Mapped(tag, sectors)),
            _ => unreachable!("readers do not write"),
        }
    }

    fn handle_notice(&mut self, notice: Notice) {
        let number = |Ticket(number): Ticket| number as usize;
        match notice {
            Notice::Ready(ticket, piece) => {
                self.cache.finish_read(&piece);
                self.deliver(number(ticket), u64::from(piece.count));
            }
            Notice::Resume(ticket) => self.admit(number(ticket), Attempt::Resumed),
            Notice::Unreadable(..) | Notice::Done(..) => unreachable!("nothing fails, and readers only read"),
        }
    }
}
