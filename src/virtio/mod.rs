//! \[2\] The guest's side: virtqueues, descriptor chains that become typed requests, copies between guest and host
//! memory, and the configuration space.
//!
//! Nothing here trusts the guest. Each value in its memory is read once, checked, and then used. Every loop and every
//! allocation is bounded by a constant of this module or by the size of the queue. A driver that violates the
//! specification gets an error status, or at worst its ring is marked broken; it never causes a panic.

pub mod chain;
pub mod config_space;
pub mod guest_copy;
mod notification;
mod ram;
pub mod request;
pub mod split;
#[cfg(test)]
mod testing;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

use crate::units::Fault;

pub use ram::GuestRam;

/// The result of a request; its value is the status byte (virtio 1.2, section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK: the request succeeded.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR: the request was invalid, or the device failed.
    IoErr = 1,
    /// VIRTIO_BLK_S_UNSUPP: the device does not support the request.
    Unsupported = 2,
}

const _: () = assert!(Status::Ok as u32 == VIRTIO_BLK_S_OK);
const _: () = assert!(Status::IoErr as u32 == VIRTIO_BLK_S_IOERR);
const _: () = assert!(Status::Unsupported as u32 == VIRTIO_BLK_S_UNSUPP);

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Unsupported => Self::Unsupported,
            Fault::NoSpace
            | Fault::Media
            | Fault::Fenced
            | Fault::Gone
            | Fault::TimedOut
            | Fault::Invalid
            | Fault::Lost => Self::IoErr,
        }
    }
}

/// Most data segments of one request: a queue of 128 minus the descriptors of the header and the status byte. QEMU and
/// cloud-hypervisor offer the same. A hint for the driver; a chain may have up to [`chain::CHAIN_DESCRIPTORS_MAX`].
pub const SEG_MAX: u32 = 126;

/// Most bytes of one DISCARD segment, unless the smallest unit that a discard frees is larger: see
/// [`DiscardLimits`](config_space::DiscardLimits). It is large because guests discard all of their free space at one
/// time (fstrim), and bounded because a request, with up to [`MAX_DISCARD_SEGMENTS`] segments, cannot be cancelled.
pub const DISCARD_BYTES_MAX: u64 = 1 << 30;

/// Minimum of that limit, whatever the image's device prefers: the kernel itself splits a discard, and an additional
/// request of the guest costs more than that.
pub const DISCARD_BYTES_MIN: u64 = 16 << 20;

/// Most sectors of one WRITE ZEROES segment: 16 MiB, like QEMU's vhost-user export. If neither file system nor device
/// can zero a range, zeros are written.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 32768;

/// Most segments of one DISCARD or WRITE ZEROES request. Their 512 bytes fit on the stack.
pub const MAX_DISCARD_SEGMENTS: u32 = 32;
