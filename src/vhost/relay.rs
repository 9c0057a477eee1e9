//! What stands between a front-end and vhost-user-backend: it carries every message, and mends what the crate can't say.
//!
//! - INFLIGHT_SHMFD, which the crate refuses: offered and answered here.
//! - A memory table in another order than that of guest addresses, which the crate refuses: sorted.
//!
//! Answers of our own stand in the right place among the crate's, whatever the front-end sends ahead: a GET_FEATURES goes
//! to the crate instead, and its reply is exchanged for ours.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use vmm_sys_util::eventfd::EventFd;

use super::inflight::Inflight;
use super::wire::Message;

const GET_FEATURES: u32 = FrontendReq::GET_FEATURES as u32;
const SET_MEM_TABLE: u32 = FrontendReq::SET_MEM_TABLE as u32;
const GET_PROTOCOL_FEATURES: u32 = FrontendReq::GET_PROTOCOL_FEATURES as u32;
const SET_PROTOCOL_FEATURES: u32 = FrontendReq::SET_PROTOCOL_FEATURES as u32;
const GET_INFLIGHT_FD: u32 = FrontendReq::GET_INFLIGHT_FD as u32;
const SET_INFLIGHT_FD: u32 = FrontendReq::SET_INFLIGHT_FD as u32;

/// The protocol feature that the crate lacks.
const INFLIGHT_SHMFD: u64 = VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits();

/// A memory table's header (number of regions, padding) and the length of one region's description.
const TABLE_HEADER_BYTES: usize = 8;
const REGION_BYTES: usize = 32;

/// The two ends of a session, and what is between them.
#[derive(Debug)]
pub(super) struct Relay<'a> {
    front_end: &'a UnixStream,
    crate_end: UnixStream,
    /// Readable once the session is to end.
    stop: &'a EventFd,
    inflight: &'a Inflight,
    /// For each GET_FEATURES that the crate has not answered: what the front-end is to get in place of the answer. `None`:
    /// the answer itself; `Some(None)`: nothing.
    exchanged: VecDeque<Option<Option<Message>>>,
}

impl<'a> Relay<'a> {
    /// A relay between a front-end and the crate.
    pub fn new(front_end: &'a UnixStream, crate_end: UnixStream, stop: &'a EventFd, inflight: &'a Inflight) -> Self {
        Self { front_end, crate_end, stop, inflight, exchanged: VecDeque::new() }
    }

    /// Carries messages until one end hangs up, or the session is to end.
    ///
    /// # Errors
    /// What a socket says, or what is wrong with a message that is answered here. A front-end that stalls in the middle of a
    /// message is one that is lost.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            let [stop, from_crate, from_front_end] = readable([self.stop, &self.crate_end, self.front_end])?;
            if stop {
                return Ok(());
            }
            if from_crate {
                let Some(message) = Message::receive(&self.crate_end)? else { return Ok(()) };
                self.answer(message)?;
            }
            if from_front_end {
                let Some(message) = Message::receive(self.front_end)? else { return Ok(()) };
                self.ask(message)?;
            }
        }
    }

    /// A message from the front-end.
    fn ask(&mut self, mut message: Message) -> io::Result<()> {
        match message.request {
            GET_FEATURES => self.exchanged.push_back(None),
            SET_PROTOCOL_FEATURES => change_bits(&mut message, |bits| bits & !INFLIGHT_SHMFD),
            SET_MEM_TABLE => sort_table(&mut message),
            GET_INFLIGHT_FD => {
                let reply = self.inflight.make(&message)?;
                return self.ask_instead(Some(reply));
            }
            SET_INFLIGHT_FD => {
                let done = message.needs_reply().then(|| Message::reply(SET_INFLIGHT_FD, vec![0; 8], Vec::new()));
                self.inflight.adopt(message)?;
                return self.ask_instead(done);
            }
            _ => {}
        }
        message.send(&self.crate_end)
    }

    /// Asks the crate something else, for which the front-end gets `reply`.
    fn ask_instead(&mut self, reply: Option<Message>) -> io::Result<()> {
        self.exchanged.push_back(Some(reply));
        let question = Message { request: GET_FEATURES, flags: 1, payload: Vec::new(), files: Vec::new() };
        question.send(&self.crate_end)
    }

    /// A reply of the crate's.
    fn answer(&mut self, mut message: Message) -> io::Result<()> {
        match message.request {
            GET_PROTOCOL_FEATURES => change_bits(&mut message, |bits| bits | INFLIGHT_SHMFD),
            GET_FEATURES => match self.exchanged.pop_front() {
                Some(Some(Some(reply))) => message = reply,
                Some(Some(None)) => return Ok(()),
                Some(None) | None => {}
            },
            _ => {}
        }
        message.send(self.front_end)
    }
}

/// Changes the feature bits that are a message's payload.
fn change_bits(message: &mut Message, change: impl FnOnce(u64) -> u64) {
    if let Some(bits) = message.u64_at(0) {
        message.payload[..8].copy_from_slice(&change(bits).to_le_bytes());
    }
}

/// Sorts a memory table by guest address, each region with its descriptor. One that is malformed stays as it is: the
/// crate refuses it.
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

/// Waits until one of them has something to say, or has hung up.
pub(super) fn readable<const N: usize>(descriptors: [&dyn AsRawFd; N]) -> io::Result<[bool; N]> {
    let mut polled = descriptors.map(|one| libc::pollfd { fd: one.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    // SAFETY: the array is ours and its length is right.
    while unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, -1) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(polled.map(|one| one.revents != 0))
}
