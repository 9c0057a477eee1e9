//! Finds the listener of an abstract Unix socket by a query to the kernel (sock_diag(7)). Unlike a connection, the
//! query takes no place in the listener's queue.

use std::fs::File;
use std::io::{self, Read, Write};

use super::socket::new_socket;

/// A listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListeningSocket {
    /// The user that created it.
    pub uid: u32,
    /// Its inode: a process that has it open has a descriptor that leads to `socket:[N]`, where N is this number.
    pub inode: u32,
}

/// NETLINK_SOCK_DIAG and SOCK_DIAG_BY_FAMILY of linux/sock_diag.h.
const NETLINK_SOCK_DIAG: libc::c_int = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// UDIAG_SHOW_NAME, UDIAG_SHOW_UID and the attributes that they request (linux/unix_diag.h).
const SHOW_NAME: u32 = 0x01;
const SHOW_UID: u32 = 0x40;
const ATTRIBUTE_NAME: u16 = 0;
const ATTRIBUTE_UID: u16 = 7;
/// The set of states with TCP_LISTEN alone.
const LISTENING: u32 = 1 << 10;
/// Lengths of a netlink header, and of a unix_diag_msg, in bytes.
const HEADER_BYTES: usize = 16;
const MESSAGE_BYTES: usize = 16;
/// Enough for each part of a reply: the kernel sends parts of up to 32 KiB.
const PART_BYTES: usize = 1 << 16;

/// The process that listens on an abstract name, in this network namespace; `None` if there is none.
///
/// # Errors
/// Errors of socket(2), sendto(2) and recvfrom(2); [`io::ErrorKind::Unsupported`] if the kernel does not report the
/// user.
pub fn listener_of(abstract_name: &[u8]) -> io::Result<Option<ListeningSocket>> {
    let mut socket = File::from(new_socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?);
    socket.write_all(&request())?;
    let name = [&[0], abstract_name].concat();
    let mut part = vec![0; PART_BYTES];
    let mut found = None;
    loop {
        let len = socket.read(&mut part)?;
        let mut rest = &part[..len];
        while let Some((kind, payload, after)) = next_message(rest) {
            rest = after;
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(found),
                libc::NLMSG_ERROR => {
                    let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ if found.is_none() => found = listener_named(&name, payload)?,
                _ => {}
            }
        }
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// A request for all listening Unix sockets: an nlmsghdr and a unix_diag_req.
fn request() -> Vec<u8> {
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_DUMP).expect("small constants");
    let family = u8::try_from(libc::AF_UNIX).expect("a small constant");
    let body =
        [[family, 0, 0, 0], LISTENING.to_ne_bytes(), [0; 4], (SHOW_NAME | SHOW_UID).to_ne_bytes(), [0; 4], [0; 4]];
    let body = body.concat();
    let len = u32::try_from(HEADER_BYTES + body.len()).expect("a short message");
    let mut message = len.to_ne_bytes().to_vec();
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number, and the sender's port.
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// The first message of a part: its kind, its payload, and the rest of the part.
fn next_message(part: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*part.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*part.get(4..)?.first_chunk()?);
    let payload = part.get(HEADER_BYTES..len)?;
    Some((kind, payload, part.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// The socket of a unix_diag_msg, if it has this name.
fn listener_named(name: &[u8], message: &[u8]) -> io::Result<Option<ListeningSocket>> {
    let Some(inode) = message.get(4..).and_then(<[u8]>::first_chunk) else { return Ok(None) };
    let (mut is_named, mut uid) = (false, None);
    let mut rest = message.get(MESSAGE_BYTES..).unwrap_or_default();
    while let Some((kind, value, after)) = next_attribute(rest) {
        rest = after;
        match kind {
            ATTRIBUTE_NAME => is_named = value == name,
            ATTRIBUTE_UID => uid = value.first_chunk().map(|uid| u32::from_ne_bytes(*uid)),
            _ => {}
        }
    }
    match (is_named, uid) {
        (false, _) => Ok(None),
        (true, None) => Err(io::ErrorKind::Unsupported.into()),
        (true, Some(uid)) => Ok(Some(ListeningSocket { uid, inode: u32::from_ne_bytes(*inode) })),
    }
}

/// The first attribute: its kind, its value, and the rest.
fn next_attribute(attributes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
    let kind = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?);
    let value = attributes.get(4..len)?;
    Some((kind, value, attributes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};

    use super::*;
    use crate::sys::process::effective_uid;

    #[test]
    fn the_owner_of_a_listener_is_found_without_connecting() {
        let name = format!("genblk/diag-test/{}", std::process::id());
        assert_eq!(listener_of(name.as_bytes()).unwrap(), None);
        let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let found = listener_of(name.as_bytes()).unwrap().expect("it listens");
        assert_eq!(found.uid, effective_uid());
        assert_eq!(listener_of(&name.as_bytes()[1..]).unwrap(), None, "the whole name is compared");
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "no connection waits");
        drop(listener);
        assert_eq!(listener_of(name.as_bytes()).unwrap(), None);
    }

    #[test]
    fn a_truncated_netlink_message_is_refused() {
        let message = request();
        assert!(next_message(&message).is_some_and(|(kind, ..)| kind == SOCK_DIAG_BY_FAMILY));
        for len in 0..message.len() {
            assert_eq!(next_message(&message[..len]), None, "{len} bytes");
        }
        let mut attribute = vec![9, 0, 7, 0, 1, 2, 3, 4, 5];
        assert_eq!(next_attribute(&attribute), Some((7, &[1, 2, 3, 4, 5][..], &[][..])));
        attribute[0] = 3;
        assert_eq!(next_attribute(&attribute), None, "shorter than its header");
    }
}
