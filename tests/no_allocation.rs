//! Cached data is served without the heap: once the tables have grown to their size, neither a read that hits nor a
//! write to a dirty page allocates, in the cache and in the worker that takes the request from its ring and completes
//! it.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::daemon::TempDir;
use common::shadow::Shadow;
use common::workload::{Client, ClientOptions};
use genblk::arena::Arena;
use genblk::cache::{
    Access, Admitted, CopyResult, Notice, Outcome, PageCache, Piece, PolicyKind, Settings, Stats, Ticket,
};
use genblk::config::{DeviceConfig, Socket};
use genblk::service::Service;
use genblk::store::file::{FileImage, OpenOptions};
use genblk::units::{SectorSpan, Tick};

/// The system's allocator, with one counter for each thread and one for all worker threads.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static THREAD_ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}
static COUNT_WORKERS: AtomicBool = AtomicBool::new(false);
static WORKER_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The start of a worker thread's name.
const WORKER_PREFIX: &[u8] = b"genblk ";

/// Counts an allocation of the current thread.
///
/// => It must not allocate itself.
fn count_allocation() {
    // A thread that is ending has no counter any more, and its count is not read.
    let _ = THREAD_ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
    if COUNT_WORKERS.load(Ordering::Relaxed) && is_worker_thread() {
        WORKER_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

fn is_worker_thread() -> bool {
    let mut name = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes to the buffer, which has 16.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name.starts_with(WORKER_PREFIX)
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_allocation();
        // SAFETY: the caller upholds the contract of alloc().
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of dealloc(), and the block came from `System`.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count_allocation();
        // SAFETY: the caller upholds the contract of realloc(), and the block came from `System`.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// How many times this thread allocates while `act` runs.
fn allocations(act: impl FnOnce()) -> u64 {
    let before = THREAD_ALLOCATIONS.get();
    act();
    THREAD_ALLOCATIONS.get() - before
}

/// How many times worker threads allocate while `act` runs.
fn worker_allocations(act: impl FnOnce()) -> u64 {
    // Tests run in parallel: only one at a time may count workers.
    static COUNTING: Mutex<()> = Mutex::new(());
    let _counting = COUNTING.lock().expect("no test fails while it counts");
    let before = WORKER_ALLOCATIONS.load(Ordering::Relaxed);
    COUNT_WORKERS.store(true, Ordering::Relaxed);
    act();
    COUNT_WORKERS.store(false, Ordering::Relaxed);
    WORKER_ALLOCATIONS.load(Ordering::Relaxed) - before
}

/// The counters count: otherwise a count of 0 would prove nothing.
#[test]
fn the_counting_allocator_counts_allocations() {
    let mut grown = Vec::with_capacity(1);
    assert_eq!(allocations(|| grown.extend([1, 2])), 1, "growing a vector is one allocation");
    assert_eq!(allocations(|| drop(grown)), 0, "freeing memory is none");
    let allocate_in_worker = || {
        let worker = std::thread::Builder::new().name("genblk counted".to_owned());
        let thread = worker.spawn(|| drop(Box::new(7))).expect("a thread can be started");
        thread.join().expect("the thread does not panic");
    };
    assert!(worker_allocations(allocate_in_worker) > 0, "a worker's allocation is counted");
}

/// How many pages the tests use: fewer than 1 MiB of them, which would be written back as soon as all of it is dirty.
const PAGES: u64 = 240;

/// A cache and the lists that its owner reuses from turn to turn.
struct Owner {
    cache: PageCache,
    pieces: Vec<Piece>,
    notices: Vec<Notice>,
    tags: Vec<u32>,
}

impl Owner {
    fn new(policy: PolicyKind) -> Self {
        // So long that write-back does not start.
        let settings =
            Settings { policy, flush_target_us: 1_000_000, dirty_pages_max: 1024, ..Settings::of(1024, 1 << 20) };
        let arena = Arena::anonymous(1024).expect("4 MiB can be mapped");
        let cache = PageCache::new(settings, Box::new(Arc::new(arena)));
        Self { cache, pieces: Vec::new(), notices: Vec::new(), tags: Vec::new() }
    }

    /// Reads `pages` pages; returns whether all of them were cached.
    fn read(&mut self, page: u64, pages: u64) -> bool {
        assert_eq!(self.cache.read(access(page, pages), &mut self.pieces), Admitted::All);
        let cached = self.pieces.iter().map(|piece| u64::from(piece.count)).sum::<u64>() == pages * 8;
        self.pieces.drain(..).for_each(|piece| self.cache.finish_read(&piece));
        self.end_turn();
        cached
    }

    fn write(&mut self, page: u64, pages: u64) {
        assert_eq!(self.cache.write(access(page, pages), &mut self.pieces), Admitted::All);
        self.pieces.drain(..).for_each(|piece| self.cache.finish_write(&piece, CopyResult::Complete));
        self.end_turn();
    }

    fn end_turn(&mut self) {
        self.cache.pump(Tick::from_us(1));
        self.cache.take_ops(|op| self.tags.push(op.tag));
        self.tags.drain(..).for_each(|tag| self.cache.complete(tag, &Outcome::Done, Tick::from_us(1)));
        self.cache.take_notices(&mut self.notices);
        for notice in self.notices.drain(..) {
            if let Notice::Ready(_, piece) = notice {
                self.cache.finish_read(&piece);
            }
        }
    }
}

fn access(page: u64, pages: u64) -> Access {
    Access::new(Ticket(0), SectorSpan::new(page * 8, pages * 8))
}

#[test]
fn a_cache_hit_allocates_nothing() {
    for policy in [PolicyKind::S3Fifo, PolicyKind::Lru] {
        let mut owner = Owner::new(policy);
        for page in (0..PAGES).step_by(16) {
            owner.read(page, 16);
        }
        assert!(owner.read(0, 16), "the lists of the owner grow here");
        let count = allocations(|| {
            (0..10_000).for_each(|n| assert!(owner.read(n * 7 % (PAGES - 16), 16), "the pages were read before"));
        });
        assert_eq!(count, 0, "reads that hit, {policy:?}");
    }
}

#[test]
fn a_write_to_a_dirty_page_allocates_nothing() {
    let mut owner = Owner::new(PolicyKind::S3Fifo);
    (0..PAGES).step_by(16).for_each(|page| owner.write(page, 16));
    let count = allocations(|| (0..10_000).for_each(|n| owner.write(n * 7 % (PAGES - 16), 16)));
    assert_eq!(count, 0, "writes to dirty pages");
}

/// Requests in a round, which takes some hundredths of a second.
const ROUND: u64 = 500;

/// The whole path: ring, parser, cache, copy, completion. Write-back allocates, and it starts when the machine stalls,
/// because that looks like an idle guest. So rounds in which pages were written back do not count.
#[test]
fn a_worker_serves_cached_requests_without_allocating() {
    let directory = TempDir::new("no-allocation");
    let (image, socket) = (directory.path().join("disk.img"), directory.path().join("blk.sock"));
    Shadow::patchwork(8 << 20, 31).write_image(&image);
    let mut config = DeviceConfig::new("counted", Socket::Path(socket.clone()), image);
    config.cache.size_bytes = 16 << 20;
    let image = FileImage::open(&config.image, &OpenOptions::default()).expect("the image opens");
    // So long that write-back does not start.
    config.cache.flush_target_ms = 1000;
    let running = Service::with_image(&config, image).and_then(Service::start).expect("the device is served");
    let mut client = Client::connect(&socket, &ClientOptions::default());
    let bytes = [0x5a; 8192];
    let mut undisturbed_rounds = 0;
    for round in 0..30 {
        for page in (0..PAGES).step_by(2) {
            client.write(page * 8, &bytes);
            client.read(page * 8, bytes.len());
        }
        let before = running.stats();
        let count = worker_allocations(|| {
            for n in 0..ROUND {
                client.read(n * 7 % (PAGES - 1) * 8, bytes.len());
                client.write(n * 11 % (PAGES - 1) * 8, &bytes);
            }
        });
        let after = running.stats();
        assert!(after.read_hit_pages >= before.read_hit_pages + ROUND * 2, "all reads were hits");
        let writeback_state = |stats: &Stats| (stats.store_writes, stats.syncs, stats.dirty_pages);
        if writeback_state(&after) == writeback_state(&before) && after.dirty_pages >= PAGES {
            assert_eq!(count, 0, "round {round}: a worker allocated while it served cached data");
            undisturbed_rounds += 1;
        }
    }
    assert!(undisturbed_rounds >= 3, "only {undisturbed_rounds} of 30 rounds were undisturbed");
    drop(client);
    running.shutdown().expect("everything can be written back");
}
