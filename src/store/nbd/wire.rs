//! The constants of the NBD protocol, and its request header.

pub(super) use crate::store::handed::Export;
use crate::units::{Fault, OpKind, Unmap};

/// Flags of an export in the transmission phase.
pub(super) mod export_flag {
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Bytes of a request's header.
pub(super) const REQUEST_BYTES: usize = 28;

pub(super) mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// WRITE_ZEROES keeps the space.
const NO_HOLE: u16 = 1 << 1;

pub(super) mod chunk {
    /// Flag: the last chunk of a reply.
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    /// Types with this bit report errors.
    pub const ERROR: u16 = 1 << 15;
}

/// A flag of base:allocation: the extent reads as zeros. (NBD_STATE_HOLE does not imply that.)
pub(super) const STATE_ZERO: u32 = 1 << 1;

/// The server is shutting down: it executes nothing more.
pub(super) const ESHUTDOWN: u32 = 108;

impl Export {
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether the server can zero any range of sectors.
    pub fn can_zero(&self) -> bool {
        self.has(export_flag::SEND_WRITE_ZEROES) && self.block_min <= 512
    }
}

/// The header of a request.
pub(super) fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
    let mut header = [0; REQUEST_BYTES];
    header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&command.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..].copy_from_slice(&len.to_be_bytes());
    header
}

/// The command of an operation, and its flags; `None` if NBD has none.
pub(super) fn command_of(op: OpKind) -> Option<(u16, u16)> {
    Some(match op {
        OpKind::Read => (command::READ, 0),
        OpKind::Write => (command::WRITE, 0),
        OpKind::Sync => (command::FLUSH, 0),
        OpKind::Discard => (command::TRIM, 0),
        OpKind::Zero { unmap: Unmap::Allowed } => (command::WRITE_ZEROES, 0),
        OpKind::Zero { unmap: Unmap::Forbidden } => (command::WRITE_ZEROES, NO_HOLE),
        OpKind::Map => (command::BLOCK_STATUS, 0),
        OpKind::Allocate => return None,
    })
}

/// The fault for an error of the protocol (a Linux error number).
pub(super) fn fault_of(error: u32) -> Fault {
    match i32::try_from(error).unwrap_or(libc::EIO) {
        libc::ENOSPC => Fault::NoSpace,
        libc::EOPNOTSUPP => Fault::Unsupported,
        libc::EINVAL | libc::EOVERFLOW => Fault::Invalid,
        _ => Fault::Media,
    }
}

/// A big-endian number at an offset that the caller has checked.
pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

/// Like [`be16`].
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Like [`be16`].
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
