//! The relay between a front-end and vhost-user-backend. It forwards every message and adds what vhost-user-backend
//! lacks:
//!
//! - It offers INFLIGHT_SHMFD, and handles GET_INFLIGHT_FD and SET_INFLIGHT_FD itself.
//! - It sorts a memory table by guest address: vhost-user-backend refuses any other order.
//!
//! Front-ends may send several requests before they read a reply, so the relay's own replies must keep their place
//! among those of vhost-user-backend. For each request that the relay handles, it sends GET_FEATURES to
//! vhost-user-backend and replaces that reply with its own.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use vmm_sys_util::eventfd::EventFd;

use super::inflight::Inflight;
use super::wire::Message;
use crate::sys::poll::wait_any_readable;

const GET_FEATURES: u32 = FrontendReq::GET_FEATURES as u32;
const SET_MEM_TABLE: u32 = FrontendReq::SET_MEM_TABLE as u32;
const GET_PROTOCOL_FEATURES: u32 = FrontendReq::GET_PROTOCOL_FEATURES as u32;
const SET_PROTOCOL_FEATURES: u32 = FrontendReq::SET_PROTOCOL_FEATURES as u32;
const GET_INFLIGHT_FD: u32 = FrontendReq::GET_INFLIGHT_FD as u32;
const SET_INFLIGHT_FD: u32 = FrontendReq::SET_INFLIGHT_FD as u32;

/// The protocol feature that vhost-user-backend lacks.
const INFLIGHT_SHMFD: u64 = VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits();

/// Bytes of a memory table's header (number of regions, padding), and of one region's description.
const TABLE_HEADER_BYTES: usize = 8;
const REGION_BYTES: usize = 32;

/// What the front-end gets in place of a reply of vhost-user-backend to GET_FEATURES.
#[derive(Debug)]
enum Reply {
    /// The reply itself: the front-end asked for the features.
    PassThrough,
    /// This message: the relay handled the front-end's request, and sent GET_FEATURES only to keep the order of
    /// replies.
    Replace(Message),
    /// Nothing: as `Replace`, for a request without a reply.
    Swallow,
}

/// The two ends of a session, and the replies on their way between them.
#[derive(Debug)]
pub(super) struct Relay<'a> {
    front_end: &'a UnixStream,
    backend_end: UnixStream,
    /// Readable once the session must end.
    stop: &'a EventFd,
    inflight: &'a Inflight,
    /// What the front-end gets for each GET_FEATURES that vhost-user-backend has yet to reply to.
    replies: VecDeque<Reply>,
}

impl<'a> Relay<'a> {
    /// A relay between a front-end and vhost-user-backend.
    pub fn new(front_end: &'a UnixStream, backend_end: UnixStream, stop: &'a EventFd, inflight: &'a Inflight) -> Self {
        Self { front_end, backend_end, stop, inflight, replies: VecDeque::new() }
    }

    /// Forwards messages until one end disconnects or the session must end.
    ///
    /// # Errors
    /// The error of a socket; [`io::ErrorKind::TimedOut`] for a front-end that stalls within a message;
    /// [`io::ErrorKind::InvalidData`] for a malformed inflight message.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            let [stop, from_backend, from_front_end] =
                wait_any_readable([self.stop, &self.backend_end, self.front_end])?;
            if stop {
                return Ok(());
            }
            if from_backend {
                let Some(message) = Message::receive(&self.backend_end)? else { return Ok(()) };
                self.forward_reply(message)?;
            }
            if from_front_end {
                let Some(message) = Message::receive(self.front_end)? else { return Ok(()) };
                self.forward_request(message)?;
            }
        }
    }

    /// Forwards a message from the front-end, or handles it here.
    fn forward_request(&mut self, mut message: Message) -> io::Result<()> {
        match message.request {
            GET_FEATURES => self.replies.push_back(Reply::PassThrough),
            SET_PROTOCOL_FEATURES => change_bits(&mut message, |bits| bits & !INFLIGHT_SHMFD),
            SET_MEM_TABLE => sort_table(&mut message),
            GET_INFLIGHT_FD => {
                let reply = self.inflight.create_region(&message)?;
                return self.reply_in_order(Reply::Replace(reply));
            }
            SET_INFLIGHT_FD => {
                let done = message.needs_reply().then(|| Message::reply(SET_INFLIGHT_FD, vec![0; 8], Vec::new()));
                self.inflight.set_region(message)?;
                return self.reply_in_order(done.map_or(Reply::Swallow, Reply::Replace));
            }
            _ => {}
        }
        message.send(&self.backend_end)
    }

    /// Sends GET_FEATURES to vhost-user-backend; `reply` takes the place of what it returns, so that replies stay in
    /// order.
    fn reply_in_order(&mut self, reply: Reply) -> io::Result<()> {
        self.replies.push_back(reply);
        let question = Message { request: GET_FEATURES, flags: 1, payload: Vec::new(), files: Vec::new() };
        question.send(&self.backend_end)
    }

    /// Forwards a reply of vhost-user-backend, or what takes its place.
    fn forward_reply(&mut self, mut message: Message) -> io::Result<()> {
        match message.request {
            GET_PROTOCOL_FEATURES => change_bits(&mut message, |bits| bits | INFLIGHT_SHMFD),
            GET_FEATURES => match self.replies.pop_front() {
                Some(Reply::Replace(reply)) => message = reply,
                Some(Reply::Swallow) => return Ok(()),
                Some(Reply::PassThrough) | None => {}
            },
            _ => {}
        }
        message.send(self.front_end)
    }
}

/// Changes the feature bits in a message's payload.
fn change_bits(message: &mut Message, change: impl FnOnce(u64) -> u64) {
    if let Some(bits) = message.u64_at(0) {
        message.payload[..8].copy_from_slice(&change(bits).to_le_bytes());
    }
}

/// Sorts a memory table by guest address, each region with its descriptor. A malformed table stays as it is, and
/// vhost-user-backend refuses it.
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
