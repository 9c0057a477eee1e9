//! The decisions that the seed makes before a world starts: the cache's settings, and the behaviour of guest, disk and
//! daemon.

use std::ops::Range;

use crate::cache::{ErrorPolicy, PolicyKind, Settings};
use crate::prng::Prng;
use crate::units::{ImageHoles, OpKind};

use super::disk::SyncFailure;

/// The behaviour of guest, disk and daemon in one world.
#[derive(Debug)]
pub(super) struct Scenario {
    /// Of 100 store operations, the number that fail.
    pub fault_percent: u64,
    /// The longest time of a store operation.
    pub latency_us_max: u64,
    /// Most requests that the guest keeps in flight.
    pub requests_max: usize,
    /// The guest sends reads and writes that overlap requests in flight.
    pub overlap: bool,
    /// Daemons crash.
    pub daemon_crashes: bool,
    /// Steps between two crashes, on average; `None` if daemons do not crash, and in the liveness phase.
    pub steps_per_crash: Option<u64>,
    /// After a crash the front-end submits the requests in flight again. Otherwise they never complete.
    pub resubmits: bool,
    /// Of 100 requests, the number that zero a range.
    pub zero_percent: u64,
    /// Operations that always fail, until the world heals the disk.
    pub broken: &'static [FailureClass],
    /// The writes that a failed Sync loses.
    pub sync_failure: SyncFailure,
    /// A write or zero that fails with an I/O error is the sign of a reset: the disk has lost its write cache.
    pub failed_write_resets: bool,
    /// Some completions reach the guest later than the cache reports them.
    pub late_completions: bool,
    /// The next daemon has other settings than the one that crashed.
    pub settings_change: bool,
    /// The next daemon has a cache of another size.
    pub resizes: bool,
    /// The next daemon may be read-only.
    pub readers: bool,
    /// Some crashes are power cuts.
    pub power_cuts: bool,
    /// The operator stops the daemon for some time (SIGSTOP).
    pub stops: bool,
    /// Number of zeroed ranges that the memory can record.
    pub zero_slots: usize,
    /// The disk is a server that is occasionally restarted, and loses its write cache: the next Sync reports that.
    /// Nothing else fails.
    pub restarts: bool,
    /// An operator occasionally freezes the cache.
    pub freezes: bool,
    /// An operator occasionally changes the size of the cache.
    pub live_sizes: bool,
}

impl Scenario {
    pub fn new(prng: &mut Prng, zero_slots: usize) -> Self {
        let daemon_crashes = prng.percent(50);
        Self {
            fault_percent: prng.pick(&[0, 0, 1, 5, 30]),
            latency_us_max: prng.pick(&[10, 1000, 100_000]),
            requests_max: prng.pick(&[1, 4, 32, 200]),
            overlap: prng.percent(50),
            daemon_crashes,
            steps_per_crash: daemon_crashes.then_some(prng.pick(&[30, 300])),
            resubmits: prng.percent(70),
            zero_percent: prng.pick(&[0, 5, 30]),
            broken: &[],
            sync_failure: prng.pick(&[SyncFailure::DropsEarlier, SyncFailure::DropsAll, SyncFailure::Resets]),
            failed_write_resets: prng.percent(30),
            late_completions: prng.percent(50),
            settings_change: prng.percent(50),
            resizes: prng.percent(30),
            readers: prng.percent(30),
            power_cuts: prng.percent(30),
            stops: prng.percent(30),
            zero_slots,
            restarts: false,
            freezes: false,
            live_sizes: false,
        }
    }

    /// The disk is a server that is occasionally restarted.
    pub fn with_restarts(self) -> Self {
        let sync_failure = SyncFailure::Resets;
        Self { restarts: true, fault_percent: 0, failed_write_resets: false, sync_failure, ..self }
    }
}

/// Store operations that fail together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FailureClass {
    Read,
    Write,
    Sync,
    Allocate,
    /// Zero and Discard.
    Range,
}

impl FailureClass {
    pub fn of(kind: OpKind) -> Option<Self> {
        match kind {
            OpKind::Read => Some(Self::Read),
            OpKind::Write => Some(Self::Write),
            OpKind::Sync => Some(Self::Sync),
            OpKind::Allocate => Some(Self::Allocate),
            OpKind::Zero { .. } | OpKind::Discard => Some(Self::Range),
            OpKind::Map => None,
        }
    }
}

/// Ways in which a disk breaks until it is healed.
pub(super) const BREAKAGES: [&[FailureClass]; 7] = [
    &[FailureClass::Read],
    &[FailureClass::Read, FailureClass::Write],
    &[FailureClass::Write],
    &[FailureClass::Sync],
    &[FailureClass::Allocate],
    &[FailureClass::Write, FailureClass::Allocate],
    &[FailureClass::Write, FailureClass::Sync, FailureClass::Allocate, FailureClass::Range],
];

/// Changes the settings that the next daemon may change while it keeps the memory of the last one.
pub(super) fn change_settings(settings: &mut Settings, prng: &mut Prng) {
    settings.cluster_pages_max = prng.pick(&[1, 3, 8, 256]);
    settings.policy = prng.pick(&[PolicyKind::S3Fifo, PolicyKind::Lru]);
    settings.readahead_pages_max = prng.pick(&[0, 4, 64, 512]);
    settings.retain = prng.percent(90);
    settings.dirty_age_us = prng.pick(&[10_000, 1_000_000]);
    // If every frame were dirty, a block that is larger than before could not be completed.
    if settings.dirty_pages_max <= settings.frames / 2 {
        settings.block_sectors = prng.pick(&[1, 2, 8]);
        settings.dirty_pages_max = prng.pick(&[settings.frames / 4, settings.frames / 2]);
    }
}

/// Most frames of a small cache, and sizes of a small image.
const SMALL_FRAMES: u32 = 24;
const SMALL_SECTORS: Range<u64> = 40..400;

/// Sizes of caches, in frames.
pub(super) const FRAMES: [u32; 4] = [12, 24, 48, 160];

/// Random settings of a cache and an image that are so small that a run takes milliseconds, whatever the decisions are.
pub(super) fn small_settings(prng: &mut Prng) -> Settings {
    let settings = settings(prng);
    let frames = settings.frames.min(SMALL_FRAMES);
    Settings {
        frames,
        frames_max: frames,
        dirty_pages_max: settings.dirty_pages_max.min(frames),
        image_sectors: SMALL_SECTORS.start + settings.image_sectors % (SMALL_SECTORS.end - SMALL_SECTORS.start),
        ..settings
    }
}

/// Random settings of a cache.
pub(super) fn settings(prng: &mut Prng) -> Settings {
    let many_groups = prng.percent(2);
    let frames = if many_groups { 2000 } else { prng.pick(&FRAMES) };
    let (sparse, allocate) = (prng.percent(60), prng.percent(50));
    // A device can neither map holes nor reserve space.
    let can_map = sparse || allocate || prng.percent(50);
    let block_sectors = prng.pick(&[1, 1, 2, 8]);
    // Memory may require a larger alignment than the image's size has: then the image ends within a block.
    let (least, most) = match prng.below(20) {
        _ if many_groups => (130_000, 200_000),
        0 => (20_000, 60_000),
        _ => (40, 3000),
    };
    let image_sectors = prng.between(least, most);
    Settings {
        frames,
        frames_max: frames,
        image_sectors,
        block_sectors,
        holes: match (sparse, can_map) {
            (true, _) => ImageHoles::Possible,
            (false, true) => ImageHoles::NoneYet,
            (false, false) => ImageHoles::Unmappable,
        },
        cluster_pages_max: prng.pick(&[1, 3, 8, 256]),
        retain: prng.percent(90),
        policy: prng.pick(&[PolicyKind::S3Fifo, PolicyKind::Lru]),
        readahead_pages_max: prng.pick(&[0, 4, 64, 512]),
        flush_target_us: 250_000,
        dirty_pages_max: prng.pick(&[frames / 4, frames / 2, frames]),
        dirty_age_us: prng.pick(&[10_000, 1_000_000]),
        allocate,
        unmap: true,
        on_error: prng.pick(&[ErrorPolicy::Report, ErrorPolicy::Report, ErrorPolicy::Hold, ErrorPolicy::Stop]),
        on_full: prng.pick(&[ErrorPolicy::Report, ErrorPolicy::Hold, ErrorPolicy::Stop]),
        page_key: 0,
        hold_us: prng.pick(&[10_000, 10_000_000]),
    }
}
