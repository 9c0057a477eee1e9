//! \[3\] A virtio-blk device: where a request meets the cache.
//!
//! Read `worker.rs` first: its [`worker`] loop is the life of every request. `ring.rs` takes requests from the guest's
//! rings and gives them back, `pending.rs` keeps them meanwhile, `admit.rs` brings them before the cache, `copy.rs` moves
//! their bytes, `complete.rs` answers them, `call.rs` calls the guest; `inflight.rs` notes for a successor what is still owed.
//! `control.rs` is how the control plane speaks to a worker.

mod admit;
mod complete;
pub mod control;
mod copy;
pub mod inflight;
mod interrupt;
mod pending;
mod requests;
pub mod ring;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::arena::Arena;
use crate::virtio::config_space::{ConfigSpace, DiskParameters, initial_writeback};
use crate::virtio::request::Disk;

pub use control::{Command, Control, RingSetup};
pub use worker::spawn;

/// What all of a device's workers and its control plane share.
#[derive(Debug)]
pub struct Device {
    /// Names the device in the log.
    pub name: String,
    /// The cache's memory, which knows whether its guest has lost anything.
    pub arena: Arc<Arena>,
    /// What requests are checked against.
    pub disk: Disk,
    /// What the guest is told of the disk.
    pub parameters: DiskParameters,
    /// Whether writes may stay volatile until a FLUSH, as configured.
    writeback_configured: bool,
    /// The same, as the guest has it now (CONFIG_WCE).
    writeback: AtomicBool,
    /// How long a worker looks for more work before it sleeps.
    pub poll_us: u32,
}

impl Device {
    /// A device that no guest has configured yet.
    pub fn new(
        name: String,
        arena: Arc<Arena>,
        disk: Disk,
        parameters: DiskParameters,
        writeback: bool,
        poll_us: u32,
    ) -> Arc<Self> {
        let writeback_configured = writeback;
        let writeback = AtomicBool::new(writeback && !arena.is_write_through());
        Arc::new(Self { name, arena, disk, parameters, writeback_configured, writeback, poll_us })
    }

    /// Whether a write completes before it is stable.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    /// The guest chose the cache mode (CONFIG_WCE).
    ///
    /// => Write-through, once chosen, stays until it is taken back: the guest sends no FLUSH any more, and goes on so although
    ///    its front-end comes back, to this daemon or the next, and says nothing of it. A front-end keeps its own copy of
    ///    the mode even over a reset of the guest, after which it can be either (virtio 1.2, section 5.2.5).
    pub fn choose_writeback(&self, writeback: bool) {
        self.arena.set_write_through(!writeback);
        self.writeback.store(writeback, Ordering::Release);
    }

    /// A driver starts, with these features if it has chosen them: the cache mode starts anew, unless it is write-through by
    /// choice.
    pub fn start_with_features(&self, features: Option<u64>) {
        let configured = self.writeback_configured;
        let writeback = features.map_or(configured, |features| initial_writeback(features, configured));
        self.writeback.store(writeback && !self.arena.is_write_through(), Ordering::Release);
    }

    /// The configuration space as it is now.
    pub fn config_space(&self) -> ConfigSpace {
        ConfigSpace::new(&self.parameters, self.writeback())
    }
}
