//! A device's interface for vhost-user-backend: features, configuration space, guest memory, and the vrings of
//! `vring.rs`.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use log::{info, warn};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;

use super::BackendMemory;
use super::vring::{Session, VringControl};
use crate::sys::memory::exclude_from_dumps;
use crate::units::Fault;
use crate::virtio::GuestRam;
use crate::virtio::config_space::includes_writeback;

/// Largest configuration space of the protocol (VHOST_USER_MAX_CONFIG_SIZE in QEMU).
const CONFIG_BYTES_MAX: usize = 256;

/// The protocol features that are passed to vhost-user-backend. `relay.rs` offers INFLIGHT_SHMFD as well.
pub(super) const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// One connection's view of a device.
#[derive(Clone)]
pub(super) struct Backend(Arc<BackendState>);

struct BackendState {
    session: Arc<Session>,
    queue_size: u16,
    /// The acknowledged features that decide the cache mode (FLUSH, CONFIG_WCE), as last set in this session.
    cache_features: Mutex<Option<u64>>,
}

impl Backend {
    /// A view for a new connection.
    pub fn new(session: &Arc<Session>, queue_size: u16) -> Self {
        session.device.start_with_features(None);
        Self(Arc::new(BackendState { session: Arc::clone(session), queue_size, cache_features: Mutex::new(None) }))
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringControl;

    fn num_queues(&self) -> usize {
        usize::from(self.0.session.device.parameters.num_queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.0.queue_size)
    }

    fn features(&self) -> u64 {
        self.0.session.device.parameters.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        PROTOCOL_FEATURES
    }

    /// => A front-end may repeat SET_FEATURES while the device runs. That does not change the mode that the guest set
    ///    by CONFIG_WCE.
    fn acked_features(&self, features: u64) {
        let chosen = features & (1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE);
        let mut last = self.0.cache_features.lock().expect("no thread panics with the features locked");
        if last.replace(chosen) != Some(chosen) {
            self.0.session.device.start_with_features(Some(features));
        }
    }

    fn reset_device(&self) {
        *self.0.cache_features.lock().expect("no thread panics with the features locked") = None;
        let Session { device, guest_started, .. } = &*self.0.session;
        guest_started.store(false, Ordering::Release);
        device.start_with_features(None);
        device.arena.clear_data_loss();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Each vring is informed by `VringT::set_queue_event_idx`.
    }

    /// => A front-end that reads the cache mode before its guest starts adopts that mode, so it gets the configured
    ///    one. A front-end that reconnects with a running guest does not read it, and the guest's choice stays.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let Session { device, guest_started, .. } = &*self.0.session;
        if device.arena.is_write_through() && !guest_started.load(Ordering::Acquire) && includes_writeback(offset, size)
        {
            device.arena.set_write_through(false);
            device
                .start_with_features(*self.0.cache_features.lock().expect("no thread panics with the features locked"));
        }
        device.config_space().read(offset, size)
    }

    /// => Only `writeback` can be set; a write to another field is ignored, as by other devices. A
    ///    write past VHOST_USER_MAX_CONFIG_SIZE is an error, which ends the connection.
    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let end = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(bytes.len()));
        if end.is_none_or(|end| end > CONFIG_BYTES_MAX) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let Session { device, workers, guest_started, .. } = &*self.0.session;
        if let Some(writeback) = device.config_space().write(offset, bytes) {
            guest_started.store(true, Ordering::Release);
            let flushed = workers.choose_writeback(device, writeback);
            info!("{}: the guest selected {}", device.name, if writeback { "write-back" } else { "write-through" });
            // From now on a completed write must be stable, including those that completed earlier.
            if let Some(flushed) = flushed
                && let Err(fault) = flushed.recv().unwrap_or(Err(Fault::Gone))
            {
                warn!(
                    "{}: flush for the switch to write-through failed ({fault}); dirty pages stay in memory",
                    device.name
                );
            }
        }
        Ok(())
    }

    /// => A region longer than its file is rejected: the first access past the end would raise SIGBUS.
    fn update_memory(&self, memory: BackendMemory) -> io::Result<()> {
        let memory = memory.memory().into_inner();
        for region in memory.iter() {
            let Some(file) = region.file_offset() else { continue };
            let end = file.start().checked_add(region.len());
            if end.is_none_or(|end| file.file().metadata().is_ok_and(|metadata| metadata.len() < end)) {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "a memory region is longer than its file"));
            }
        }
        for region in memory.iter() {
            let start = region.as_ptr().addr();
            if let Err(e) = exclude_from_dumps(start..start + region.size()) {
                warn!("{}: guest memory will be part of core dumps: {e}", self.0.session.device.name);
            }
        }
        self.0.session.set_memory(GuestRam::new(memory));
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn handle_event(&self, _: u16, _: EventSet, _: &[VringControl], _: usize) -> io::Result<()> {
        unreachable!("vhost-user-backend runs no worker threads")
    }
}
