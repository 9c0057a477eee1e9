//! The decisions that the seed makes before a world starts.

use super::store::Behaviour;
use crate::cache::{ErrorPolicy, PolicyKind, Settings};
use crate::device::budget::Budget;
use crate::prng::Prng;
use crate::store::Limits;
use crate::units::{ImageHoles, PAGE_BYTES, SECTOR_BYTES};

/// The behaviour of guest, front-end, disk and daemon in one world.
#[derive(Debug)]
pub(super) struct Scenario {
    pub workers: usize,
    pub rings: usize,
    pub queue_size: u16,
    pub event_idx: bool,
    /// Most requests that the guest keeps in flight.
    pub requests_max: usize,
    /// The guest sends requests that overlap others in flight.
    pub overlap: bool,
    /// Requests start in this many sectors of the image.
    pub hot_sectors: u64,
    /// Most crash points that a daemon passes before it dies; `None`: daemons do not die.
    pub crash_points_max: Option<u64>,
    /// Of 100 connections, the number in which the front-end keeps an inflight region.
    pub inflight_percent: u64,
    /// Of 1000 steps, the number that are an action of the front-end or the operator.
    pub control_permille: u64,
    /// Power cuts occur.
    pub power_cuts: bool,
    /// Of 100 requests, the numbers of reads, writes, zeros and discards; the rest are FLUSHes.
    pub mix: [u64; 4],
    /// The configured cache mode is write-back.
    pub writeback: bool,
    /// Successors have caches of another size.
    pub resizes: bool,
    /// The cache outlives its daemon (`survive = "always"`). Otherwise only a loss marker does (`"never"`).
    pub survives: bool,
    /// Of 100 successors, the number that are read-only.
    pub reader_percent: u64,
    /// The operator stops the daemon for some time (SIGSTOP).
    pub freezes: bool,
    pub behaviour: Behaviour,
    pub hole_percent: u64,
}

impl Scenario {
    pub fn new(prng: &mut Prng, image_sectors: u64, holes: ImageHoles) -> Self {
        let workers = prng.pick(&[1, 1, 2, 4]);
        let survives = prng.percent(85);
        Self {
            workers,
            rings: workers * if workers < 4 { prng.pick(&[1, 2]) } else { 1 },
            queue_size: prng.pick(&[4, 16, 32]),
            event_idx: prng.percent(70),
            requests_max: prng.pick(&[1, 4, 16, 64]),
            overlap: prng.percent(60),
            hot_sectors: prng.pick(&[16, 64, image_sectors]).min(image_sectors),
            crash_points_max: prng.pick(&[None, Some(100), Some(1000), Some(4000)]),
            inflight_percent: if survives { prng.pick(&[0, 50, 100, 100]) } else { 0 },
            control_permille: prng.pick(&[0, 2, 10, 30]),
            power_cuts: prng.percent(20),
            mix: prng.pick(&[[40, 40, 5, 3], [70, 20, 2, 2], [20, 50, 20, 2], [30, 60, 0, 0], [30, 40, 10, 10]]),
            writeback: prng.percent(85),
            resizes: prng.percent(20),
            survives,
            freezes: prng.percent(30),
            reader_percent: if survives { prng.pick(&[0, 0, 0, 30]) } else { 0 },
            behaviour: Behaviour {
                latency_us_max: prng.pick(&[10, 1000, 100_000]),
                fault_percent: prng.pick(&[0, 0, 0, 2, 15]),
                resets: DISK_RESETS && prng.percent(50),
            },
            hole_percent: if holes == ImageHoles::Possible { prng.pick(&[10, 50, 100]) } else { 0 },
        }
    }
}

/// The bounds of the workers: the defaults, or so small that most requests take several turns.
pub(super) fn budget(prng: &mut Prng) -> Budget {
    if prng.percent(40) {
        return Budget::default();
    }
    Budget {
        turn_pages: prng.pick(&[1, 2, 8]),
        window_pages: prng.pick(&[1, 1, 2]),
        worker_pages: prng.pick(&[1, 4, 16]),
        shared_pages: 1,
        ring_pages: prng.pick(&[1, 4, 16]),
        long_pages: prng.pick(&[1, 2, 100]),
        zeroed_pages_per_page: 1,
        range_part_pages: prng.pick(&[1, 100]),
    }
}

/// Whether disks lose unsynced writes when a Sync fails.
const DISK_RESETS: bool = true;

/// Random settings of a cache, with the limits of the image that it caches.
pub(super) fn settings(prng: &mut Prng) -> (Settings, Limits) {
    let frames = prng.pick(&[32, 48, 96, 128]);
    let (sparse, allocate) = (prng.percent(50), prng.percent(50));
    let can_map = sparse || allocate || prng.percent(50);
    let block_sectors = prng.pick(&[1, 1, 1, 8]);
    let image_sectors = prng.between(64, 1000);
    let cluster_pages_max = prng.pick(&[1, 3, 8, 64]);
    let settings = Settings {
        frames,
        frames_max: frames,
        image_sectors,
        block_sectors,
        holes: match (sparse, can_map) {
            (true, _) => ImageHoles::Possible,
            (false, true) => ImageHoles::NoneYet,
            (false, false) => ImageHoles::Unmappable,
        },
        cluster_pages_max,
        retain: prng.percent(90),
        policy: prng.pick(&[PolicyKind::S3Fifo, PolicyKind::Lru]),
        readahead_pages_max: prng.pick(&[0, 4, 64]),
        flush_target_us: 250_000,
        dirty_pages_max: prng.pick(&[frames / 4, frames / 2, frames]),
        dirty_age_us: prng.pick(&[10_000, 1_000_000]),
        allocate,
        unmap: true,
        on_error: prng.pick(&[ErrorPolicy::Report, ErrorPolicy::Report, ErrorPolicy::Hold, ErrorPolicy::Stop]),
        on_full: prng.pick(&[ErrorPolicy::Report, ErrorPolicy::Hold, ErrorPolicy::Stop]),
        page_key: 0,
        hold_us: prng.pick(&[10_000, 10_000_000]),
    };
    // An image that ends within a block has smaller blocks, and needs memory with a larger alignment.
    let transfer_bytes = u32::from(block_sectors) * SECTOR_BYTES as u32;
    let ends_within_block = !image_sectors.is_multiple_of(u64::from(block_sectors));
    let limits = Limits {
        size_bytes: (image_sectors * SECTOR_BYTES).into(),
        block_bytes: if ends_within_block { SECTOR_BYTES as u32 } else { transfer_bytes },
        memory_align: if ends_within_block { transfer_bytes } else { SECTOR_BYTES as u32 },
        io_max_bytes: cluster_pages_max * PAGE_BYTES as u32,
        segments_max: cluster_pages_max as u16,
        depth: prng.pick(&[1, 2, 8, 64]),
        discard_granularity: 0,
        discard_max_bytes: u64::MAX,
        physical_block_bytes: transfer_bytes,
        optimal_io_bytes: 0,
        writable: true,
        can_zero: true,
        can_discard: true,
        holes: settings.holes,
    };
    (settings, limits)
}
