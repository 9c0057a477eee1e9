//! A front-end's connection with hand-made rings, set up step by step: a test can stop after any step.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::guest_memory::GuestMemory;
use super::raw_message::{self, FLAG_NEED_REPLY, Reply};
use super::raw_ring::Ring;
use super::wait::{TIMEOUT, poll_until, readable};

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Size of `struct virtio_blk_config` up to the write-zeroes fields.
pub const CONFIG_BYTES: usize = 60;
/// Offset of `writeback` in it.
pub const CONFIG_WRITEBACK: u32 = 32;

/// The bit of feature number `number`.
pub fn feature(number: u32) -> u64 {
    1 << number
}

/// All features that this driver supports. Not supported: legacy bits that change when interrupts come, dirty logging,
/// and an IOMMU.
fn known_features() -> u64 {
    let block = feature(VIRTIO_BLK_F_WRITE_ZEROES + 1) - 1;
    let rings = feature(VIRTIO_RING_F_INDIRECT_DESC) | feature(VIRTIO_RING_F_EVENT_IDX);
    block | rings | feature(VIRTIO_F_VERSION_1) | PROTOCOL_FEATURES
}

/// The protocol features that this front-end uses.
fn used_protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
}

/// The options of a front-end.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Virtio features to accept if they are offered.
    pub features: u64,
    pub queues: usize,
    pub queue_size: u16,
    /// Bytes in each of the two memory regions.
    pub region_bytes: u64,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            features: known_features() & !feature(VIRTIO_RING_F_EVENT_IDX),
            queues: 1,
            queue_size: 128,
            region_bytes: 8 << 20,
        }
    }
}

impl SessionOptions {
    /// The default, with EVENT_IDX.
    pub fn with_event_idx() -> Self {
        Self { features: known_features(), ..Self::default() }
    }

    /// The default, without the given features.
    pub fn without(features: &[u32]) -> Self {
        let excluded = features.iter().fold(0, |mask, &number| mask | feature(number));
        let options = Self::default();
        Self { features: options.features & !excluded, ..options }
    }
}

/// A connection. For the daemon, dropping it looks like a crash of the front-end.
pub struct Session {
    pub frontend: Frontend,
    /// The same connection, for hand-made messages.
    pub socket: UnixStream,
    pub memory: Arc<GuestMemory>,
    pub rings: Vec<Ring>,
    /// Virtio features that the device offered.
    pub offered: u64,
    /// Virtio features that are negotiated.
    pub features: u64,
    /// Protocol features that the daemon offered.
    pub protocol: VhostUserProtocolFeatures,
}

impl Session {
    /// Connects and starts all rings.
    #[track_caller]
    pub fn open(socket: &Path, options: &SessionOptions) -> Self {
        let mut session = Self::negotiate(socket, options);
        session.share_memory();
        for index in 0..options.queues {
            session.add_ring(options.queue_size);
            session.start_ring(index);
        }
        session
    }

    /// Connects and negotiates features; no memory is shared and no ring is set up.
    #[track_caller]
    pub fn negotiate(socket: &Path, options: &SessionOptions) -> Self {
        let memory = GuestMemory::standard(options.region_bytes);
        Self::negotiate_with(socket, options.features, memory)
    }

    /// As [`Session::negotiate`], with guest memory of the caller's layout.
    #[track_caller]
    pub fn negotiate_with(socket: &Path, features: u64, memory: GuestMemory) -> Self {
        Self::negotiate_for(socket, features, Arc::new(memory), Vec::new())
    }

    /// Connects to another daemon for the same guest: shares the same memory, with the rings in it, and starts no ring.
    #[track_caller]
    pub fn reconnect(self, socket: &Path) -> Self {
        let Self { frontend, socket: old, memory, rings, features, .. } = self;
        drop((frontend, old));
        let mut session = Self::negotiate_for(socket, features, memory, rings);
        session.share_memory();
        session
    }

    /// As [`Session::reconnect`], with the messages of cloud-hypervisor: it sends no second GET_PROTOCOL_FEATURES, and
    /// sets the protocol features before the virtio features.
    #[track_caller]
    pub fn reconnect_unasked(self, socket: &Path) -> Self {
        let Self { frontend, socket: old, memory, rings, features, protocol, .. } = self;
        drop((frontend, old));
        let (stream, mut frontend, offered) = Self::connect_and_get_features(socket);
        frontend.set_protocol_features(protocol & used_protocol_features()).expect("SET_PROTOCOL_FEATURES");
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features).expect("SET_FEATURES");
        let mut session = Self { frontend, socket: stream, memory, rings, offered, features, protocol };
        session.share_memory();
        session
    }

    /// Starts a new session on the same connection, as QEMU does when a device is unplugged and another one plugged:
    /// protocol features first, then SET_OWNER, then the features. Nothing is shared or set up.
    #[track_caller]
    pub fn new_session(mut self) -> Self {
        let protocol = self.frontend.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
        self.frontend.set_protocol_features(protocol & used_protocol_features()).expect("SET_PROTOCOL_FEATURES");
        self.frontend.get_queue_num().expect("GET_QUEUE_NUM");
        self.frontend.get_max_mem_slots().expect("GET_MAX_MEM_SLOTS");
        self.frontend.set_owner().expect("SET_OWNER");
        assert_eq!(self.frontend.get_features().expect("GET_FEATURES"), self.offered);
        self.frontend.set_features(self.features).expect("SET_FEATURES");
        self
    }

    #[track_caller]
    fn negotiate_for(socket: &Path, features: u64, memory: Arc<GuestMemory>, rings: Vec<Ring>) -> Self {
        let (stream, mut frontend, offered) = Self::connect_and_get_features(socket);
        let features = offered & features;
        frontend.set_features(features).expect("SET_FEATURES");
        let protocol = frontend.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
        frontend.set_protocol_features(protocol & used_protocol_features()).expect("SET_PROTOCOL_FEATURES");
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        Self { frontend, socket: stream, memory, rings, offered, features, protocol }
    }

    /// Connects and negotiates nothing yet; also returns the offered virtio features.
    #[track_caller]
    fn connect_and_get_features(socket: &Path) -> (UnixStream, Frontend, u64) {
        let stream = connect(socket);
        // The `vhost` crate's own limit on ring numbers must not hide a missing limit of the daemon.
        let frontend = Frontend::from_stream(stream.try_clone().expect("a socket can be duplicated"), 1 << 16);
        frontend.set_owner().expect("SET_OWNER");
        let offered = frontend.get_features().expect("GET_FEATURES");
        assert_ne!(offered & PROTOCOL_FEATURES, 0, "protocol features are offered");
        (stream, frontend, offered)
    }

    /// Shares all regions of the guest's memory.
    #[track_caller]
    pub fn share_memory(&mut self) {
        self.frontend.set_mem_table(&self.memory.region_infos()).expect("SET_MEM_TABLE");
    }

    /// Resets the device as for a reboot of the guest, and sets features and memory again; no ring is set up.
    #[track_caller]
    pub fn reset(&mut self) {
        self.frontend.reset_device().expect("RESET_DEVICE");
        self.frontend.set_features(self.features).expect("SET_FEATURES after a reset");
        self.share_memory();
    }

    /// Creates one more ring in the guest's memory; the device does not know it yet.
    pub fn add_ring(&mut self, size: u16) {
        let ring = Ring::new(&self.memory, size, 0, self.has(VIRTIO_RING_F_EVENT_IDX));
        self.rings.push(ring);
    }

    /// Sets up ring `index` in the device, with `used.idx` as its base, and enables it.
    #[track_caller]
    pub fn start_ring(&mut self, index: usize) {
        let base = self.rings[index].used_idx();
        self.set_up_ring(index, base);
        self.enable_ring(index, true);
    }

    /// Sets up ring `index` in the device without enabling it; `base` is the entry that the device takes next.
    #[track_caller]
    pub fn set_up_ring(&mut self, index: usize, base: u16) {
        let ring = &self.rings[index];
        self.frontend.set_vring_num(index, ring.size()).expect("SET_VRING_NUM");
        self.frontend.set_vring_base(index, base).expect("SET_VRING_BASE");
        self.frontend.set_vring_addr(index, &ring_addresses(ring)).expect("SET_VRING_ADDR");
        self.frontend.set_vring_call(index, &ring.call).expect("SET_VRING_CALL");
        self.frontend.set_vring_kick(index, &ring.kick).expect("SET_VRING_KICK");
    }

    /// SET_VRING_ENABLE.
    #[track_caller]
    pub fn enable_ring(&mut self, index: usize, enable: bool) {
        self.frontend.set_vring_enable(index, enable).expect("SET_VRING_ENABLE");
    }

    /// Stops ring `index`; returns the entry that the device would take next.
    #[track_caller]
    pub fn stop_ring(&mut self, index: usize) -> u16 {
        let base = self.frontend.get_vring_base(index).expect("GET_VRING_BASE");
        u16::try_from(base).expect("a split ring's base is 16 bits wide")
    }

    /// Whether the daemon has closed the connection. The caller must not expect a reply.
    pub fn is_closed(&self) -> bool {
        readable(&[self.socket.as_raw_fd()], Duration::ZERO)
    }

    /// Whether feature `number` is negotiated.
    pub fn has(&self, number: u32) -> bool {
        self.features & feature(number) != 0
    }

    /// Sends a hand-made message and requests an acknowledgement.
    pub fn raw(&self, number: u32, body: &[u8]) -> Reply {
        raw_message::exchange(&self.socket, number, FLAG_NEED_REPLY, body, &[])
    }

    /// `len` bytes of the configuration space at `offset`.
    #[track_caller]
    pub fn config(&mut self, offset: u32, len: usize) -> Vec<u8> {
        let blank = vec![0; len];
        let (_, bytes) = self
            .frontend
            .get_config(offset, len as u32, VhostUserConfigFlags::WRITABLE, &blank)
            .unwrap_or_else(|error| panic!("GET_CONFIG of {len} bytes at {offset}: {error}"));
        bytes
    }

    /// A little-endian 32-bit field of the configuration space.
    #[track_caller]
    pub fn config_u32(&mut self, offset: u32) -> u32 {
        u32::from_le_bytes(self.config(offset, 4).try_into().expect("four bytes"))
    }

    /// The device's size in sectors.
    #[track_caller]
    pub fn capacity_sectors(&mut self) -> u64 {
        u64::from_le_bytes(self.config(0, 8).try_into().expect("eight bytes"))
    }

    /// Sets `writeback` in the configuration space: 1 for write-back, 0 for write-through.
    #[track_caller]
    pub fn set_writeback(&mut self, writeback: bool) {
        assert!(self.has(VIRTIO_BLK_F_CONFIG_WCE) && self.has(VIRTIO_BLK_F_FLUSH), "the driver can set writeback");
        self.frontend
            .set_config(CONFIG_WRITEBACK, VhostUserConfigFlags::WRITABLE, &[u8::from(writeback)])
            .expect("SET_CONFIG of writeback");
        assert_eq!(self.config(CONFIG_WRITEBACK, 1), [u8::from(writeback)], "writeback has the value that was set");
    }

    /// Checks that the device offers the features that every test needs.
    #[track_caller]
    pub fn assert_offers_modern_features(&self) {
        for number in [VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX, VIRTIO_BLK_F_FLUSH] {
            assert_ne!(self.offered & feature(number), 0, "feature {number} is offered");
        }
    }
}

/// A ring's addresses in the form that vhost-user messages need.
pub fn ring_addresses(ring: &Ring) -> VringConfigData {
    VringConfigData {
        queue_max_size: ring.size(),
        queue_size: ring.size(),
        flags: 0,
        desc_table_addr: GuestMemory::user_addr(ring.desc_addr()),
        used_ring_addr: GuestMemory::user_addr(ring.used_addr()),
        avail_ring_addr: GuestMemory::user_addr(ring.avail_addr()),
        log_addr: None,
    }
}

/// Connects to a daemon, which may be between two front-ends. Reads and writes have a timeout.
#[track_caller]
pub fn connect(socket: &Path) -> UnixStream {
    let stream = poll_until("the daemon to accept a connection", TIMEOUT, || match UnixStream::connect(socket) {
        Ok(stream) => Some(stream),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => None,
        Err(error) => panic!("connecting to {}: {error}", socket.display()),
    });
    stream.set_read_timeout(Some(TIMEOUT)).expect("a socket's timeout can be set");
    stream.set_write_timeout(Some(TIMEOUT)).expect("a socket's timeout can be set");
    stream
}
