//! \[3\] A virtio-blk device: its worker threads take requests from the guest's rings, through the cache, and back.
//!
//! Start with `worker.rs`: its numbered list is the life of every request. The files in the order in which a request
//! meets them:
//!
//! 1. [`ring`]: one virtqueue. Takes heads from the available ring.
//! 2. `inflight.rs`: records each head that was taken, so that the next daemon can complete it if this one dies.
//! 3. `pending.rs`: the table that holds a request until it completes. `requests.rs`: the lists through which a turn
//!    moves it.
//! 4. `admit.rs`: parses and checks the request, and admits it to the cache.
//! 5. `copy.rs`: copies its bytes between frames and guest memory.
//! 6. `complete.rs`: writes its status, and pushes it onto the used ring.
//! 7. `interrupt.rs`: notifies the driver.
//!
//! [`budget`] bounds the work of a turn and the work in progress, [`limits`] the rate at which requests start. Outside
//! this path are [`control`], the commands of the control plane to the workers, and `tally.rs`, which counts requests
//! and measures how long they take.

mod admit;
pub mod budget;
mod complete;
pub mod control;
mod copy;
#[cfg(test)]
mod crash_tests;
pub mod inflight;
mod interrupt;
pub mod limits;
mod pending;
mod requests;
pub mod ring;
mod tally;
pub mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::arena::Arena;
use crate::counters::worker::Counters;
use crate::virtio::config_space::{ConfigSpace, DiskParameters, initial_writeback};
use crate::virtio::request::RequestLimits;

use budget::Budget;
use limits::RateLimiter;

pub use control::{HeldRequests, RingSetup, Untracked, WorkerCommand, WorkerControl};
pub use worker::spawn;

/// No driver has acknowledged features yet.
const NO_FEATURES: u64 = u64::MAX;

/// The state that a device's workers share with each other and with the control plane.
#[derive(Debug)]
pub struct Device {
    /// The device's name; its log lines begin with it.
    pub name: String,
    /// The cache's memory, which records whether this guest has lost data.
    pub arena: Arc<Arena>,
    /// The properties against which requests are checked.
    pub disk: RequestLimits,
    /// The properties that the configuration space reports to the guest.
    pub parameters: DiskParameters,
    /// The configured cache mode: whether a completed write may stay volatile until a FLUSH.
    writeback_configured: AtomicBool,
    /// The features that the driver has acknowledged, or [`NO_FEATURES`].
    driver_features: AtomicU64,
    /// The cache mode at present, which the guest may have changed (CONFIG_WCE).
    writeback: AtomicBool,
    /// How long an idle worker polls before it sleeps, in microseconds.
    poll_us: AtomicU32,
    /// Limits the rates of its requests.
    pub limiter: RateLimiter,
    /// The counters of its workers.
    pub counters: Counters,
    /// The bounds of each worker.
    pub budget: Budget,
}

impl Device {
    /// A device that no driver has initialized yet.
    pub fn new(
        name: String,
        arena: Arc<Arena>,
        disk: RequestLimits,
        parameters: DiskParameters,
        writeback: bool,
        poll_us: u32,
        counters: Counters,
    ) -> Arc<Self> {
        let writeback_configured = AtomicBool::new(writeback);
        let writeback = AtomicBool::new(writeback && !arena.is_write_through());
        let budget = Budget::default();
        Arc::new(Self {
            name,
            arena,
            disk,
            parameters,
            writeback_configured,
            driver_features: AtomicU64::new(NO_FEATURES),
            writeback,
            poll_us: AtomicU32::new(poll_us),
            limiter: RateLimiter::default(),
            counters,
            budget,
        })
    }

    /// Whether a write completes before it is stable.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    /// Sets the cache mode that the guest chose (CONFIG_WCE).
    ///
    /// => Write-through stays until the guest chooses write-back again. A guest in write-through sends no FLUSH, and
    ///    does not repeat its choice when its front-end reconnects or the daemon is replaced. A front-end keeps its own
    ///    copy of the mode even across a reset of the guest, after which it may be either (virtio 1.2, section 5.2.5).
    pub fn choose_writeback(&self, writeback: bool) {
        self.arena.set_write_through(!writeback);
        self.writeback.store(writeback, Ordering::Release);
    }

    /// A driver initializes the device; `features` are those that it acknowledged, if any. Resets the cache mode,
    /// unless the guest chose write-through.
    pub fn start_with_features(&self, features: Option<u64>) {
        self.driver_features.store(features.unwrap_or(NO_FEATURES), Ordering::Release);
        self.reset_writeback();
    }

    /// How long an idle worker polls before it sleeps, in microseconds.
    pub fn poll_us(&self) -> u32 {
        self.poll_us.load(Ordering::Relaxed)
    }

    /// Applies a change of the configuration by the operator. A guest that chose write-through keeps it.
    ///
    /// => The mode applies to writes that are taken from now on. Writes before a switch to write-through are not
    ///    durable until a flush.
    pub fn reconfigure(&self, writeback: bool, poll_us: u32) {
        self.poll_us.store(poll_us, Ordering::Relaxed);
        if self.writeback_configured.swap(writeback, Ordering::AcqRel) != writeback {
            self.reset_writeback();
        }
    }

    /// Sets the initial mode for a driver with these features.
    fn reset_writeback(&self) {
        let configured = self.writeback_configured.load(Ordering::Acquire);
        let features = Some(self.driver_features.load(Ordering::Acquire)).filter(|features| *features != NO_FEATURES);
        let writeback = features.map_or(configured, |features| initial_writeback(features, configured));
        self.writeback.store(writeback && !self.arena.is_write_through(), Ordering::Release);
    }

    /// From now on the device reports this size to the guest and accepts requests up to it. Returns whether the size
    /// has changed.
    pub fn set_capacity(&self, capacity_sectors: u64) -> bool {
        let before = self.disk.capacity_sectors.get();
        self.disk.capacity_sectors.set(capacity_sectors);
        before != capacity_sectors
    }

    /// The cache gets a DISCARD or WRITE ZEROES in parts, split at multiples of this many sectors. It is a multiple of
    /// the smallest unit that a discard frees.
    fn range_part_sectors(&self) -> u64 {
        self.budget.range_part_sectors(self.parameters.discard.alignment_sectors.into())
    }

    /// The configuration space at present.
    pub fn config_space(&self) -> ConfigSpace {
        let capacity_sectors = self.disk.capacity_sectors.get();
        ConfigSpace::new(&DiskParameters { capacity_sectors, ..self.parameters.clone() }, self.writeback())
    }
}
