//! Hand-made vhost-user messages, which may be invalid: the `vhost` crate's front-end would not send them.

use std::io::{self, Read};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Message numbers (vhost-user specification, "Front-end message types").
pub mod number {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const ADD_MEM_REG: u32 = 37;
}

const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
/// Requests a reply to a message that has none of its own.
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// The daemon's reaction to a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A reply with this payload.
    Payload(Vec<u8>),
    /// It closed the connection.
    Closed,
    /// No reply within the socket's read timeout.
    Silent,
}

impl Reply {
    /// Whether the daemon acknowledged the message as done (a payload of zero).
    pub fn is_acknowledged(&self) -> bool {
        matches!(self, Self::Payload(payload) if payload.as_slice() == [0; 8])
    }
}

/// Sends one message; returns the reaction.
pub fn exchange(socket: &UnixStream, number: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> Reply {
    let len = u32::try_from(body.len()).expect("messages are small");
    exchange_with_length(socket, number, flags, len, body, fds)
}

/// Sends one message whose header declares a body of `declared` bytes, whatever follows; returns the reaction.
pub fn exchange_with_length(
    socket: &UnixStream,
    number: u32,
    flags: u32,
    declared: u32,
    body: &[u8],
    fds: &[RawFd],
) -> Reply {
    let mut message = Vec::new();
    message.extend_from_slice(&number.to_le_bytes());
    message.extend_from_slice(&(flags | VERSION).to_le_bytes());
    message.extend_from_slice(&declared.to_le_bytes());
    message.extend_from_slice(body);
    let sent = if fds.is_empty() {
        socket.send_with_fds(&[&message[..]], &[])
    } else {
        socket.send_with_fds(&[&message[..]], fds)
    };
    if sent.is_err() {
        return Reply::Closed;
    }
    receive(socket)
}

/// Receives one reply.
pub fn receive(socket: &UnixStream) -> Reply {
    let mut header = [0; 12];
    match read_all(socket, &mut header) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Reply::Silent,
        Err(_) => return Reply::Closed,
    }
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    assert_ne!(word(4) & FLAG_REPLY, 0, "the message is a reply");
    let mut payload = vec![0; word(8) as usize];
    match read_all(socket, &mut payload) {
        Ok(()) => Reply::Payload(payload),
        Err(_) => Reply::Closed,
    }
}

fn read_all(mut socket: &UnixStream, bytes: &mut [u8]) -> io::Result<()> {
    socket.read_exact(bytes)
}

/// The payload of a vring message: the ring's index and a number.
pub fn vring_state(index: u32, num: u32) -> Vec<u8> {
    [index.to_le_bytes(), num.to_le_bytes()].concat()
}
