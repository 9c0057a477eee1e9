//! The server's side of the NBD protocol, for the servers of the tests.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;
/// The state of an extent of base:allocation that is a hole and reads as zeros.
pub const HOLE_OF_ZEROS: u32 = 3;

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The flags of an export with FLUSH, TRIM, WRITE_ZEROES and multi-conn.
pub const FLAGS: u16 = 1 | 1 << 2 | FLAG_TRIM | 1 << 6 | FLAG_MULTI_CONN;
pub const FLAG_TRIM: u16 = 1 << 5;
pub const FLAG_MULTI_CONN: u16 = 1 << 8;

/// Negotiates with structured replies and base:allocation for an export of `size` bytes.
pub fn negotiate(stream: &mut UnixStream, size: u64) -> io::Result<()> {
    negotiate_as(stream, size, FLAGS, true)
}

/// The same with these flags, and without base:allocation unless `has_extents`.
pub fn negotiate_as(stream: &mut UnixStream, size: u64, flags_of_export: u16, has_extents: bool) -> io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let (option, len) = (word(&header, 8), word(&header, 12));
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(data);
            stream.write_all(&bytes)
        };
        match option {
            // Structured replies.
            8 => reply(1, &[])?,
            // A context, and it is base:allocation.
            10 => {
                if has_extents {
                    reply(4, &[&1u32.to_be_bytes()[..], b"base:allocation"].concat())?;
                }
                reply(1, &[])?;
            }
            7 => {
                reply(3, &[&[0, 0][..], &size.to_be_bytes(), &flags_of_export.to_be_bytes()].concat())?;
                return reply(1, &[]);
            }
            _ => reply(1 << 31 | 1, &[])?,
        }
    }
}

/// A chunk of a structured reply.
pub fn chunk(flags: u16, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33efu32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The next request and the data of a write; `None`: the client disconnects.
pub fn receive(stream: &mut UnixStream) -> io::Result<Option<(Request, Vec<u8>)>> {
    let mut header = [0; 28];
    stream.read_exact(&mut header)?;
    let command = u16::from_be_bytes([header[6], header[7]]);
    let (cookie, offset, len) = (long(&header, 8), long(&header, 16), word(&header, 24));
    let mut payload = vec![0; if command == WRITE { len as usize } else { 0 }];
    stream.read_exact(&mut payload)?;
    Ok((command != DISCONNECT).then_some((Request { command, cookie, offset, len }, payload)))
}
