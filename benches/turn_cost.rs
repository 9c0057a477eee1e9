//! The CPU time of a cached request in a worker: `make bench-turn`.
//!
//! One thread, one ring, and every page in memory. What remains is what genblk does for a request: it takes the chain,
//! looks its page up, copies 4 KiB, and completes. There is no vhost-user, no system call and no sleep, so the figures
//! are far steadier than the rows of `make bench`; measure both versions of a change alternately. One request a turn
//! shows what a turn costs, many what a request costs. Arguments choose rows, for a profiler: `read-1`, `write-64`.

#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "small constants, and times")]

#[path = "../tests/common/prng.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod prng;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use genblk::arena::Arena;
use genblk::cache::Settings;
use genblk::cached_image::CachedImage;
use genblk::counters::worker::Counters;
use genblk::device::worker::Worker;
use genblk::device::{Device, RingSetup, WorkerCommand, WorkerControl};
use genblk::store::file::{FileImage, OpenOptions};
use genblk::units::{PAGE_BYTES, SECTOR_BYTES, SECTORS_PER_PAGE};
use genblk::virtio::GuestRam;
use genblk::virtio::config_space::{DiscardLimits, DiskParameters};
use genblk::virtio::request::{RequestLimits, serial};
use genblk::virtio::split::{QueueLayout, QueuePosition};
use prng::Prng;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Pages that are read and written.
const PAGES: u64 = 1 << 14;
const IMAGE_PAGES: u64 = 2 * PAGES;
/// Requests in a measurement.
const REQUESTS: usize = 1 << 18;
const ROUNDS: usize = 15;
const BATCHES: [usize; 3] = [1, 8, 64];
const QUEUE_SIZE: u16 = 256;

const READ: u32 = 0;
const WRITE: u32 = 1;

fn main() {
    // "cargo test" runs this, too, without "--bench": a smoke test.
    let smoke_test = !std::env::args().any(|arg| arg == "--bench");
    let (requests, rounds) = if smoke_test { (REQUESTS / 64, 1) } else { (REQUESTS, ROUNDS) };
    let mut guest = Guest::new();
    // Names of rows, for a profiler.
    let rows: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    println!("{:>15}{:>18}{:>18}", "requests a turn", "nanoseconds", "least");
    for (kind, name) in [(READ, "read"), (WRITE, "write")] {
        for batch in BATCHES {
            let row = format!("{name}-{batch}");
            if rows.is_empty() || rows.contains(&row) {
                let mut rounds: Vec<f64> = (0..rounds).map(|_| guest.measure(kind, batch, requests)).collect();
                rounds.sort_by(f64::total_cmp);
                println!("{row:>15}{:>18.1}{:>18.1}", rounds[rounds.len() / 2], rounds[0]);
            }
        }
    }
}

/// The page that a driver uses. Every other one: a full region is written back at once.
fn page(index: u64) -> u64 {
    index * 2
}

/// A file that is removed with its owner.
struct TemporaryImage(PathBuf);

impl TemporaryImage {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("genblk-turn-cost.{}", std::process::id()));
        let file = File::create(&path).expect("the temporary directory is writable");
        file.set_len(IMAGE_PAGES * PAGE_BYTES).expect("there is space");
        Self(path)
    }
}

impl Drop for TemporaryImage {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A driver with one ring, and the worker that serves it. Each request is a chain of three descriptors, for which the
/// driver has fixed memory.
struct Guest {
    worker: Worker,
    cached: Arc<CachedImage>,
    _control: WorkerControl,
    ram: Arc<GuestMemoryMmap>,
    available: u16,
    prng: Prng,
    _image: TemporaryImage,
}

const DESCRIPTORS: u64 = 0;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
/// Header and status of a chain, 32 bytes each.
const HEADERS: u64 = 0x8000;
const BUFFERS: u64 = 0x10_0000;
const RAM_BYTES: usize = 0x20_0000;

impl Guest {
    fn new() -> Self {
        let image = TemporaryImage::new();
        let options = OpenOptions { direct: false, ..OpenOptions::default() };
        let file = FileImage::open(&image.0, &options).expect("a new file");
        let frames = 8 * IMAGE_PAGES as u32;
        let arena = Arena::anonymous(frames as usize).expect("memory");
        // No write-back: the pages stay dirty, and the dirty limit is far.
        let settings = Settings {
            cluster_pages_max: 64,
            flush_target_us: 1 << 40,
            dirty_pages_max: frames,
            dirty_age_us: 1 << 40,
            ..Settings::of(frames, IMAGE_PAGES * SECTORS_PER_PAGE)
        };
        let cached = CachedImage::new("bench", file, arena, settings);
        let device = device_of(&cached);
        let (mut worker, control) = Worker::new(&device, &cached, 0).expect("descriptors");
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("memory"));
        let setup = RingSetup {
            layout: QueueLayout {
                size: QUEUE_SIZE,
                desc_table: DESCRIPTORS,
                avail_ring: AVAIL,
                used_ring: USED,
                event_idx: true,
            },
            position: QueuePosition { next_avail: 0, next_used: 0 },
            kick: File::from(OwnedFd::from(UnixStream::pair().expect("a descriptor that can be polled").0)),
            call_fd: None,
            err_fd: None,
            memory: Arc::new(GuestRam::new(Arc::clone(&ram))),
            tracker: None,
        };
        let started = control.request(|reply| WorkerCommand::Start(0, Box::new(setup), reply));
        worker.turn(cached.now());
        started.try_recv().expect("the ring has started");
        let mut guest =
            Self { worker, cached, _control: control, ram, available: 0, prng: Prng::new(1), _image: image };
        guest.prepare_chains();
        // Every page that is used is in memory, and dirty.
        for index in 0..PAGES {
            guest.submit(WRITE, 0, page(index));
            guest.finish(1);
        }
        guest
    }

    fn prepare_chains(&self) {
        for chain in 0..u64::from(QUEUE_SIZE) / 4 {
            let (first, header) = (chain * 4, HEADERS + chain * 64);
            let parts = [(header, 16u32), (BUFFERS + chain * PAGE_BYTES, PAGE_BYTES as u32), (header + 32, 1)];
            for (at, (addr, len)) in (first..).zip(parts) {
                let descriptor = GuestAddress(DESCRIPTORS + at * 16);
                self.ram.write_obj(addr, descriptor).expect("in memory");
                self.ram.write_obj(len, GuestAddress(descriptor.0 + 8)).expect("in memory");
                self.ram.write_obj(at as u16 + 1, GuestAddress(descriptor.0 + 14)).expect("in memory");
            }
        }
    }

    fn submit(&mut self, kind: u32, chain: u64, page: u64) {
        let (first, header) = (chain * 4, HEADERS + chain * 64);
        const NEXT: u16 = 1;
        const DEVICE_WRITES: u16 = 2;
        let data = if kind == READ { NEXT | DEVICE_WRITES } else { NEXT };
        for (at, flags) in (first..).zip([NEXT, data, DEVICE_WRITES]) {
            self.ram.write_obj(flags, GuestAddress(DESCRIPTORS + at * 16 + 12)).expect("in memory");
        }
        self.ram.write_obj(kind, GuestAddress(header)).expect("in memory");
        self.ram.write_obj(page * PAGE_BYTES / SECTOR_BYTES, GuestAddress(header + 8)).expect("in memory");
        self.ram.write_obj(0xffu8, GuestAddress(header + 32)).expect("in memory");
        let entry = AVAIL + 4 + u64::from(self.available % QUEUE_SIZE) * 2;
        self.ram.write_obj(first as u16, GuestAddress(entry)).expect("in memory");
        self.available = self.available.wrapping_add(1);
    }

    /// Makes the submitted requests available, and has the worker complete them. Returns how long that took.
    fn finish(&mut self, batch: usize) -> Duration {
        self.ram.write_obj(self.available, GuestAddress(AVAIL + 2)).expect("in memory");
        let begun = Instant::now();
        loop {
            self.worker.turn(self.cached.now());
            if self.ram.read_obj::<u16>(GuestAddress(USED + 2)).expect("in memory") == self.available {
                break;
            }
        }
        let elapsed = begun.elapsed();
        for chain in 0..batch as u64 {
            let status: u8 = self.ram.read_obj(GuestAddress(HEADERS + chain * 64 + 32)).expect("in memory");
            assert_eq!(status, 0, "the request has succeeded");
        }
        elapsed
    }

    /// Nanoseconds per request, of requests to random pages, so many in a turn.
    fn measure(&mut self, kind: u32, batch: usize, requests: usize) -> f64 {
        let mut elapsed = Duration::ZERO;
        for _ in 0..requests / batch {
            for chain in 0..batch {
                let page = page(self.prng.below(PAGES));
                self.submit(kind, chain as u64, page);
            }
            elapsed += self.finish(batch);
        }
        let stats = self.cached.stats();
        assert_eq!((stats.store_reads, stats.store_writes), (0, 0), "every request is absorbed");
        elapsed.as_nanos() as f64 / requests as f64
    }
}

fn device_of(cached: &CachedImage) -> Arc<Device> {
    let limits = cached.limits();
    let capacity_sectors = limits.size_bytes.get() / SECTOR_BYTES;
    let parameters = DiskParameters {
        capacity_sectors,
        block_bytes: 512,
        physical_block_bytes: limits.physical_block_bytes,
        optimal_io_bytes: 0,
        discard: DiscardLimits::new(limits.discard_granularity, limits.discard_max_bytes),
        num_queues: 1,
        read_only: false,
        can_discard: true,
        can_zero: true,
        zero_may_unmap: true,
    };
    let disk = RequestLimits {
        capacity_sectors: capacity_sectors.into(),
        read_only: false,
        can_discard: true,
        max_discard_sectors: parameters.discard.max_sectors,
        can_zero: true,
        serial: serial("bench"),
    };
    let counters = Counters::new(1).expect("memory for counters");
    Device::new("bench".to_owned(), Arc::clone(cached.arena()), disk, parameters, true, 0, counters)
}
