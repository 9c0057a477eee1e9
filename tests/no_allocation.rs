//! What is in the cache is served without the heap: once the tables have their size, neither a read that hits nor a write
//! to a dirty page allocates; not in the cache, and not in the worker that carries the request from its ring and back.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::daemon::TempDir;
use common::shadow::Shadow;
use common::workload::{Client, ClientOptions};
use genblk::arena::Arena;
use genblk::cache::{
    Access, Admitted, ErrorPolicy, Notice, Outcome, PageCache, Piece, PolicyKind, Settings, Stats, Ticket,
};
use genblk::config::{DeviceConfig, Socket};
use genblk::service::Service;
use genblk::units::{SectorSpan, Tick};

/// The system's allocator, with a count for each thread and one for all worker threads.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static OF_THIS_THREAD: Cell<u64> = const { Cell::new(0) };
}
static WORKERS_ARE_WATCHED: AtomicBool = AtomicBool::new(false);
static OF_WORKERS: AtomicU64 = AtomicU64::new(0);

/// What a worker thread's name begins with.
const WORKER: &[u8] = b"genblk ";

/// => It must not allocate itself.
fn note_allocation() {
    // A thread that ends has no counter any more, and nobody looks at it.
    let _ = OF_THIS_THREAD.try_with(|count| count.set(count.get() + 1));
    if WORKERS_ARE_WATCHED.load(Ordering::Relaxed) && this_is_a_worker() {
        OF_WORKERS.fetch_add(1, Ordering::Relaxed);
    }
}

fn this_is_a_worker() -> bool {
    let mut name = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes to the buffer, which has as many.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name.starts_with(WORKER)
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note_allocation();
        // SAFETY: the caller keeps to alloc's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps to dealloc's contract, and the block came from `System`.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note_allocation();
        // SAFETY: the caller keeps to realloc's contract, and the block came from `System`.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// Allocations of this thread while `act` runs.
fn allocations(act: impl FnOnce()) -> u64 {
    let before = OF_THIS_THREAD.get();
    act();
    OF_THIS_THREAD.get() - before
}

/// Allocations of worker threads while `act` runs.
fn worker_allocations(act: impl FnOnce()) -> u64 {
    // Tests run side by side: one at a time may have workers and watch them.
    static WATCH: Mutex<()> = Mutex::new(());
    let _watch = WATCH.lock().expect("no test fails while it watches");
    let before = OF_WORKERS.load(Ordering::Relaxed);
    WORKERS_ARE_WATCHED.store(true, Ordering::Relaxed);
    act();
    WORKERS_ARE_WATCHED.store(false, Ordering::Relaxed);
    OF_WORKERS.load(Ordering::Relaxed) - before
}

/// The counters themselves: a count of nothing proves nothing.
#[test]
fn allocations_are_counted() {
    let mut grown = Vec::with_capacity(1);
    assert_eq!(allocations(|| grown.extend([1, 2])), 1, "growing a vector is one allocation");
    assert_eq!(allocations(|| drop(grown)), 0, "giving memory back is none");
    let as_a_worker = || {
        let worker = std::thread::Builder::new().name("genblk counted".to_owned());
        let thread = worker.spawn(|| drop(Box::new(7))).expect("a thread can be started");
        thread.join().expect("it ends well");
    };
    assert!(worker_allocations(as_a_worker) > 0, "a worker's allocation is seen");
}

/// Pages in use; fewer than make a whole MiB, which would be written back as soon as it is dirty from end to end.
const PAGES: u64 = 240;

/// A cache and what its owner keeps from turn to turn.
struct Owner {
    cache: PageCache,
    pieces: Vec<Piece>,
    notices: Vec<Notice>,
    tags: Vec<u32>,
}

impl Owner {
    fn new(policy: PolicyKind) -> Self {
        let settings = Settings {
            frames: 1024,
            image_sectors: 1 << 20,
            block_sectors: 1,
            sparse: false,
            can_map: true,
            cluster_pages_max: 256,
            retain: true,
            policy,
            readahead_pages_max: 512,
            flush_target_us: 250_000,
            dirty_pages_max: 1024,
            dirty_age_us: 5_000_000,
            allocate: false,
            on_error: ErrorPolicy::Report,
            on_full: ErrorPolicy::Report,
            hold_us: 0,
        };
        let arena = Arena::anonymous(1024).expect("4 MiB can be had");
        let cache = PageCache::new(settings, Box::new(Arc::new(arena)));
        Self { cache, pieces: Vec::new(), notices: Vec::new(), tags: Vec::new() }
    }

    /// Reads `pages` pages; returns whether all of them were there.
    fn read(&mut self, page: u64, pages: u64) -> bool {
        assert_eq!(self.cache.read(access(page, pages), &mut self.pieces), Admitted::All);
        let there = self.pieces.iter().map(|piece| u64::from(piece.count)).sum::<u64>() == pages * 8;
        self.pieces.drain(..).for_each(|piece| self.cache.finish_read(&piece));
        self.end_turn();
        there
    }

    fn write(&mut self, page: u64, pages: u64) {
        assert_eq!(self.cache.write(access(page, pages), &mut self.pieces), Admitted::All);
        self.pieces.drain(..).for_each(|piece| self.cache.finish_write(&piece, true));
        self.end_turn();
    }

    fn end_turn(&mut self) {
        self.cache.pump(Tick(1));
        self.cache.take_ops(|plan| self.tags.push(plan.tag));
        self.tags.drain(..).for_each(|tag| self.cache.complete(tag, &Outcome::Done, Tick(1)));
        self.cache.take_notices(&mut self.notices);
        for notice in self.notices.drain(..) {
            if let Notice::Ready(_, piece) = notice {
                self.cache.finish_read(&piece);
            }
        }
    }
}

fn access(page: u64, pages: u64) -> Access {
    Access { ticket: Ticket(0), span: SectorSpan::new(page * 8, pages * 8), from: 0, resumed: false }
}

#[test]
fn a_hit_in_the_cache_allocates_nothing() {
    for policy in [PolicyKind::S3Fifo, PolicyKind::Lru] {
        let mut owner = Owner::new(policy);
        for page in (0..PAGES).step_by(16) {
            owner.read(page, 16);
        }
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

/// Requests of a round: some hundredths of a second.
const ROUND: u64 = 500;

/// The whole way: ring, parser, cache, copy, answer. Write-back allocates, and starts on its own account when the machine
/// stalls, which looks like an idle guest: rounds in which pages were written back don't count.
#[test]
fn a_worker_serves_what_is_cached_without_allocating() {
    let directory = TempDir::new("no-allocation");
    let (image, socket) = (directory.path().join("disk.img"), directory.path().join("blk.sock"));
    Shadow::patchwork(8 << 20, 31).write_image(&image);
    let mut config = DeviceConfig::new("counted", Socket::Path(socket.clone()), image);
    config.cache.size_bytes = 16 << 20;
    let running = Service::open(&config, &mut HashMap::new(), &Arc::default())
        .and_then(Service::start)
        .expect("the device is served");
    let mut client = Client::connect(&socket, &ClientOptions::default());
    let bytes = [0x5a; 8192];
    let mut undisturbed = 0;
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
        assert!(after.read_hit_pages >= before.read_hit_pages + ROUND * 2, "they were hits");
        let touched = |stats: &Stats| (stats.store_writes, stats.syncs, stats.dirty_pages);
        if touched(&after) == touched(&before) && after.dirty_pages >= PAGES {
            assert_eq!(count, 0, "round {round}: a worker allocated to serve what is cached");
            undisturbed += 1;
        }
    }
    assert!(undisturbed >= 3, "only {undisturbed} of 30 rounds were undisturbed");
    drop(client);
    running.shutdown().expect("everything can be written");
}
