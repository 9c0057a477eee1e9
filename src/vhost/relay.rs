//! The relay between a front-end and vhost-user-backend. It forwards every message and adds what vhost-user-backend
//! lacks:
//!
//! - It offers INFLIGHT_SHMFD, and handles GET_INFLIGHT_FD and SET_INFLIGHT_FD itself.
//! - It offers BACKEND_REQ, and keeps the channel of SET_BACKEND_REQ_FD (`config_change.rs`).
//! - It sorts a memory table by guest address: vhost-user-backend rejects any other order.
//! - It lets a front-end start a new session on its connection. QEMU sends a second SET_OWNER when a device is
//!   unplugged and another one is plugged on the same character device; vhost-user-backend rejects it, and would keep
//!   the memory of the first device.
//! - It does not forward protocol features that were not offered, nor features that an earlier version of genblk
//!   offered.
//! - It rejects a front-end that does not share the guest's memory, more regions than the reported maximum, regions
//!   whose addresses wrap, and memory that may hang; vhost-user-backend checks none of that.
//!
//! Front-ends may send several requests before they read a reply, so the relay's own replies must keep their place
//! among those of vhost-user-backend. For each request that the relay handles, it sends GET_FEATURES to
//! vhost-user-backend and replaces that reply with its own.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;

use log::info;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_SIZE_MAX;
use vmm_sys_util::eventfd::EventFd;

use super::backend::PROTOCOL_FEATURES;
use super::config_change::ConfigChange;
use super::vring::{Session, VringControl};
use super::wire::Message;
use crate::sys::file_system::FileSystem;
use crate::sys::memfd::is_on_memory_fs;
use crate::sys::poll::wait_any_readable;

/// Advice for the operator if a front-end does not share the guest's memory, the most common mistake in a VMM's
/// configuration, with which a guest's disk would hang without any message.
const ADVICE: &str = "the front-end shares no memory: add share=on to its memory backend (QEMU: -object \
     memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram; libvirt: <memoryBacking><source \
     type='memfd'/><access mode='shared'/></memoryBacking>)";

const GET_FEATURES: u32 = FrontendReq::GET_FEATURES as u32;
const SET_FEATURES: u32 = FrontendReq::SET_FEATURES as u32;
const SET_OWNER: u32 = FrontendReq::SET_OWNER as u32;
const SET_MEM_TABLE: u32 = FrontendReq::SET_MEM_TABLE as u32;
const SET_VRING_ADDR: u32 = FrontendReq::SET_VRING_ADDR as u32;
const ADD_MEM_REG: u32 = FrontendReq::ADD_MEM_REG as u32;
const REM_MEM_REG: u32 = FrontendReq::REM_MEM_REG as u32;
const GET_PROTOCOL_FEATURES: u32 = FrontendReq::GET_PROTOCOL_FEATURES as u32;
const SET_PROTOCOL_FEATURES: u32 = FrontendReq::SET_PROTOCOL_FEATURES as u32;
const GET_INFLIGHT_FD: u32 = FrontendReq::GET_INFLIGHT_FD as u32;
const SET_INFLIGHT_FD: u32 = FrontendReq::SET_INFLIGHT_FD as u32;

const SET_BACKEND_REQ_FD: u32 = FrontendReq::SET_BACKEND_REQ_FD as u32;
const GET_CONFIG: u32 = FrontendReq::GET_CONFIG as u32;
const SET_VRING_KICK: u32 = FrontendReq::SET_VRING_KICK as u32;

/// The protocol features that vhost-user-backend lacks, or does not use.
const ADDED: u64 = VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits() | VhostUserProtocolFeatures::BACKEND_REQ.bits();

/// Features that earlier versions of genblk offered. The guest of such a version keeps them when its front-end connects
/// to this one, and vhost-user-backend ends the connection if a feature was not offered. SIZE_MAX limits the size of
/// the driver's buffers: this version accepts those and larger ones.
const NO_LONGER_OFFERED: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX;

/// The number of memory regions that vhost-user-backend reports to front-ends (GET_MAX_MEM_SLOTS), and does not check.
const REGIONS_MAX: usize = 509;

/// Bytes of a memory table's header (number of regions, padding), and of one region's description.
const TABLE_HEADER_BYTES: usize = 8;
const REGION_BYTES: usize = 32;

/// The message to send to the front-end when vhost-user-backend replies to GET_FEATURES.
#[derive(Debug)]
enum Reply {
    /// The reply itself: the front-end requested the features.
    PassThrough,
    /// This message: the relay handled the front-end's request, and sent GET_FEATURES only to keep the order of
    /// replies.
    Replace(Message),
    /// None: like `Replace`, for a request without a reply.
    Swallow,
    /// None yet: vhost-user-backend has handled all messages before this second SET_OWNER.
    NewOwner(Message),
}

/// How a relay ended.
#[derive(Debug)]
pub(super) enum RelayEnd {
    /// One end has disconnected, or the session must end.
    Disconnected,
    /// The front-end starts a new session on the same connection.
    NewOwner(NewOwner),
}

/// The messages that a front-end which starts a new session has already sent: its SET_OWNER, and before that the
/// protocol features.
#[derive(Debug)]
pub(super) struct NewOwner {
    set_owner: Message,
    set_protocol_features: Option<Message>,
}

/// The two ends of a session, and the pending replies.
pub(super) struct Relay<'a> {
    front_end: &'a UnixStream,
    backend_end: UnixStream,
    /// Becomes readable when the session must end.
    stop: &'a EventFd,
    session: &'a Session,
    rings: &'a [VringControl],
    config_change: &'a ConfigChange,
    /// Number of memory regions that the front-end shares.
    regions: usize,
    /// The front-end has sent SET_OWNER.
    owned: bool,
    /// The front-end has sent a second SET_OWNER, and waits until all earlier messages are handled.
    held: bool,
    /// The last protocol features that the front-end has set.
    protocol_features: Option<u64>,
    /// The action for each GET_FEATURES to which vhost-user-backend has yet to reply.
    replies: VecDeque<Reply>,
    /// The log has a line about guest memory that is on a disk.
    told_of_memory: Cell<bool>,
}

impl<'a> Relay<'a> {
    /// A relay between a front-end and vhost-user-backend.
    pub fn new(
        front_end: &'a UnixStream,
        backend_end: UnixStream,
        stop: &'a EventFd,
        session: &'a Session,
        rings: &'a [VringControl],
        config_change: &'a ConfigChange,
    ) -> Self {
        let (regions, owned, held, protocol_features, replies) = (0, false, false, None, VecDeque::new());
        Self {
            front_end,
            backend_end,
            stop,
            session,
            rings,
            config_change,
            regions,
            owned,
            held,
            protocol_features,
            replies,
            told_of_memory: Cell::new(false),
        }
    }

    /// Sends vhost-user-backend the messages that the front-end of a new session has already sent.
    ///
    /// # Errors
    /// Errors of the socket.
    pub fn start_session(&mut self, owner: NewOwner) -> io::Result<()> {
        // vhost-user-backend acknowledges messages only to a front-end that has requested the features.
        self.reply_in_order(Reply::Swallow)?;
        if let Some(message) = owner.set_protocol_features {
            self.forward_request(message)?;
        }
        self.forward_request(owner.set_owner)
    }

    /// Forwards messages until one end disconnects, the session must end, or the front-end starts a new one.
    ///
    /// # Errors
    /// The error of a socket; [`io::ErrorKind::TimedOut`] for a front-end that stalls within a message;
    /// [`io::ErrorKind::InvalidData`] for a malformed inflight message; [`io::ErrorKind::Unsupported`] for a front-end
    /// that does not share the guest's memory.
    pub fn run(mut self) -> io::Result<RelayEnd> {
        loop {
            let [stop, from_backend, from_front_end] = if self.held {
                let [stop, from_backend] = wait_any_readable([self.stop, &self.backend_end])?;
                [stop, from_backend, false]
            } else {
                wait_any_readable([self.stop, &self.backend_end, self.front_end])?
            };
            if stop {
                return Ok(RelayEnd::Disconnected);
            }
            if from_backend {
                let Some(message) = Message::receive(&self.backend_end)? else { return Ok(RelayEnd::Disconnected) };
                if let Some(owner) = self.forward_reply(message)? {
                    return Ok(RelayEnd::NewOwner(owner));
                }
            }
            if from_front_end {
                let Some(message) = Message::receive(self.front_end)? else { return Ok(RelayEnd::Disconnected) };
                self.forward_request(message)?;
            }
        }
    }

    /// Forwards a message from the front-end, or handles it here.
    fn forward_request(&mut self, mut message: Message) -> io::Result<()> {
        match message.request {
            GET_FEATURES => self.replies.push_back(Reply::PassThrough),
            SET_OWNER if self.owned => {
                self.held = true;
                return self.reply_in_order(Reply::NewOwner(message));
            }
            SET_OWNER => self.owned = true,
            SET_FEATURES => change_bits(&mut message, |bits| bits & !NO_LONGER_OFFERED),
            SET_PROTOCOL_FEATURES => {
                change_bits(&mut message, |bits| bits & PROTOCOL_FEATURES.bits());
                self.protocol_features = message.u64_at(0);
            }
            SET_MEM_TABLE => {
                sort_table(&mut message);
                self.check_regions(&message)?;
                self.regions = message.files.len();
            }
            ADD_MEM_REG => {
                self.check_regions(&message)?;
                self.regions += 1;
                if self.regions > REGIONS_MAX {
                    return Err(invalid(format!("the front-end added more than {REGIONS_MAX} memory regions")));
                }
            }
            REM_MEM_REG => self.regions = self.regions.saturating_sub(1),
            // QEMU sets up rings without sharing memory if none of its memory backends has a descriptor.
            SET_VRING_ADDR if self.regions == 0 => return Err(not_shared()),
            GET_INFLIGHT_FD => {
                let reply = self.session.inflight.create_region(&message)?;
                return self.reply_in_order(Reply::Replace(reply));
            }
            SET_INFLIGHT_FD => {
                let done = message.needs_reply().then(|| Message::reply(SET_INFLIGHT_FD, vec![0; 8], Vec::new()));
                message.files.iter().try_for_each(|file| self.check_memory(file))?;
                let record = self.session.bus_errors.map(|records| records.inflight);
                self.session.inflight.set_region(message, record)?;
                return self.reply_in_order(done.map_or(Reply::Swallow, Reply::Replace));
            }
            SET_BACKEND_REQ_FD => {
                let done = message.needs_reply().then(|| Message::reply(SET_BACKEND_REQ_FD, vec![0; 8], Vec::new()));
                self.config_change.set_channel(message.files.into_iter().next());
                return self.reply_in_order(done.map_or(Reply::Swallow, Reply::Replace));
            }
            GET_CONFIG => self.config_change.mark_read(),
            SET_VRING_KICK => self.config_change.repeat(),
            _ => {}
        }
        message.send(&self.backend_end)
    }

    /// Rejects memory that the front-end has mapped privately, and regions with an address that wraps. `message` is a
    /// memory table or a single region, which have the same layout.
    fn check_regions(&self, message: &Message) -> io::Result<()> {
        let regions = message.payload.get(TABLE_HEADER_BYTES..).unwrap_or_default().chunks_exact(REGION_BYTES);
        for (region, file) in regions.zip(&message.files) {
            let field = |at: usize| u64::from_le_bytes(region[at..at + 8].try_into().expect("eight bytes"));
            let [guest_address, size, address, offset] = [0, 8, 16, 24].map(field);
            if [guest_address, address, offset].iter().any(|start| start.checked_add(size).is_none()) {
                return Err(invalid(format!("a memory region of {size:#x} bytes at {guest_address:#x} wraps")));
            }
            self.check_memory(file)?;
            if self.session.broker.is_private(self.session.peer_pid, address, file) {
                return Err(not_shared());
            }
        }
        Ok(())
    }

    /// Rejects a file whose pages another process or machine may provide: an access to it could hang a worker. What
    /// front-ends share is in memory: a memfd, or a file on tmpfs or hugetlbfs. A disk with a process of its own also
    /// accepts a file on a disk (QEMU: memory-backend-file), for which only that disk waits.
    fn check_memory(&self, file: &File) -> io::Result<()> {
        const ADVICE: &str = "share a memfd, or a file on tmpfs or hugetlbfs";
        if is_on_memory_fs(file) {
            return Ok(());
        }
        if self.session.shares_process {
            let context = "memory in a file on a disk may delay the other disks of its process";
            return Err(invalid(format!("{context}; {ADVICE}, or give this disk its own process (isolate, group)")));
        }
        let system = FileSystem::of(file)?;
        if system.may_hang() {
            return Err(invalid(format!("memory on {} may hang; {ADVICE}", system.name())));
        }
        if !system.is_memory() && !self.told_of_memory.replace(true) {
            let name = &self.session.device.name;
            info!("{name}: guest memory is on {}: its disk waits when that file system does; {ADVICE}", system.name());
        }
        Ok(())
    }

    /// Sends GET_FEATURES to vhost-user-backend; `reply` replaces its result, so that replies stay in order.
    fn reply_in_order(&mut self, reply: Reply) -> io::Result<()> {
        self.replies.push_back(reply);
        let question = Message { request: GET_FEATURES, flags: 1, payload: Vec::new(), files: Vec::new() };
        question.send(&self.backend_end)
    }

    /// Forwards a reply of vhost-user-backend, or its replacement. Returns the owner if the front-end starts a new
    /// session.
    fn forward_reply(&mut self, mut message: Message) -> io::Result<Option<NewOwner>> {
        match message.request {
            GET_PROTOCOL_FEATURES => change_bits(&mut message, |bits| bits | ADDED),
            GET_FEATURES => match self.replies.pop_front() {
                Some(Reply::Replace(reply)) => message = reply,
                Some(Reply::Swallow) => return Ok(None),
                Some(Reply::NewOwner(set_owner)) => return self.handle_second_owner(set_owner),
                Some(Reply::PassThrough) | None => {}
            },
            _ => {}
        }
        message.send(self.front_end).map(|()| None)
    }

    /// Handles a second SET_OWNER, after everything before it is done.
    ///
    /// => While a vring runs, the message has no effect, as with other back-ends.
    fn handle_second_owner(&mut self, set_owner: Message) -> io::Result<Option<NewOwner>> {
        self.held = false;
        if self.rings.iter().any(VringControl::is_running) {
            let done = set_owner.needs_reply().then(|| Message::reply(SET_OWNER, vec![0; 8], Vec::new()));
            return done.map_or(Ok(()), |reply| reply.send(self.front_end)).map(|()| None);
        }
        let set_protocol_features = self.protocol_features.map(|features| Message {
            request: SET_PROTOCOL_FEATURES,
            flags: 1,
            payload: features.to_le_bytes().to_vec(),
            files: Vec::new(),
        });
        Ok(Some(NewOwner { set_owner, set_protocol_features }))
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn not_shared() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, ADVICE)
}

/// Changes the feature bits in a message's payload.
fn change_bits(message: &mut Message, change: impl FnOnce(u64) -> u64) {
    if let Some(bits) = message.u64_at(0) {
        message.payload[..8].copy_from_slice(&change(bits).to_le_bytes());
    }
}

/// Sorts a memory table by guest address, each region with its descriptor. A malformed table stays unchanged, and
/// vhost-user-backend rejects it.
fn sort_table(message: &mut Message) {
    let regions = message.payload.len().saturating_sub(TABLE_HEADER_BYTES) / REGION_BYTES;
    if message.payload.len() != TABLE_HEADER_BYTES + regions * REGION_BYTES || message.files.len() != regions {
        return;
    }
    let files = std::mem::take(&mut message.files);
    let mut table: Vec<_> =
        message.payload[TABLE_HEADER_BYTES..].chunks_exact(REGION_BYTES).map(<[u8]>::to_vec).zip(files).collect();
    table.sort_by_key(|(region, _)| u64::from_le_bytes(region[..8].try_into().expect("eight bytes")));
    message.payload.truncate(TABLE_HEADER_BYTES);
    for (region, file) in table {
        message.payload.extend(region);
        message.files.push(file);
    }
}
