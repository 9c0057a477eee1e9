//! \[2\] The guest's side: descriptor chains become typed requests, bytes move between guest and host memory, and the
//! configuration space says what the disk is.
//!
//! Nothing here trusts the guest. What is read from its memory is read once, checked, then used; every loop and every
//! allocation is bounded by a constant of this module or by the size of the queue; a lie costs the liar an error
//! status or its ring, never a panic.

pub mod chain;
pub mod config_space;
pub mod guest_copy;
mod ram;
pub mod request;
pub mod split;
#[cfg(test)]
mod testing;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

use crate::units::Fault;

pub use ram::GuestRam;

/// How a request ended, as its status byte tells the driver (virtio 1.2, section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK: it succeeded.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR: it was invalid, or the device failed.
    IoErr = 1,
    /// VIRTIO_BLK_S_UNSUPP: the device does not offer it.
    Unsupported = 2,
}

const _: () = assert!(Status::Ok as u32 == VIRTIO_BLK_S_OK);
const _: () = assert!(Status::IoErr as u32 == VIRTIO_BLK_S_IOERR);
const _: () = assert!(Status::Unsupported as u32 == VIRTIO_BLK_S_UNSUPP);

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Unsupported => Self::Unsupported,
            Fault::NoSpace | Fault::Media | Fault::Fenced | Fault::Gone | Fault::TimedOut | Fault::Invalid => {
                Self::IoErr
            }
        }
    }
}

/// Most data segments of one request: a queue of 128 less the header's and the status byte's descriptor, what QEMU and
/// cloud-hypervisor offer too. A hint for the driver; a chain may have up to [`chain::CHAIN_DESCRIPTORS_MAX`].
pub const SEG_MAX: u32 = 126;

/// Most bytes of one data segment. With [`SEG_MAX`] a request is at most 15.75 MiB for a driver that heeds both: above
/// the 1280 KiB that Linux sends by default, and small enough that one request can't fill a small cache. SPDK offers
/// the same. UEFI firmware ignores it, so it is a hint, not a check.
pub const SIZE_MAX: u32 = 128 << 10;

/// Most sectors of one DISCARD or WRITE ZEROES segment: 16 MiB, as QEMU's vhost-user export offers, so that one segment
/// can't keep the store busy for long while other requests wait.
pub const MAX_DISCARD_SECTORS: u32 = 32768;

/// Most segments of one DISCARD or WRITE ZEROES request: 512 bytes of payload fit on the stack, and a request frees at
/// most 512 MiB.
pub const MAX_DISCARD_SEGMENTS: u32 = 32;
