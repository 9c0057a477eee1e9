//! The configuration space: struct virtio_blk_config (virtio 1.2, section 5.2.4), and the feature bits that belong to
//! it.
//!
//! The front-end reads and writes it for the guest. Only the cache mode can be written.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::units::{PAGE_BYTES, SECTOR_BYTES};
use crate::virtio::{DISCARD_BYTES_MAX, DISCARD_BYTES_MIN, MAX_DISCARD_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, SEG_MAX};

#[cfg(test)]
mod tests;

/// Length of the fields up to `unused1`. Those after it belong to features that are never offered, and read as 0.
const CONFIG_BYTES: usize = 60;

/// Most bytes of one read: the vhost crate rejects configuration messages that reach further.
const READ_BYTES_MAX: usize = 4096;

/// Older versions of cloud-hypervisor send offsets that count from the start of virtio-mmio registers, where the
/// structure is at 0x100. The structure is shorter than that, so such an offset is unambiguous.
const MMIO_CONFIG_OFFSET: u32 = 0x100;

/// Offsets of the fields.
mod field {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SEG_MAX: usize = 12;
    pub(super) const BLK_SIZE: usize = 20;
    pub(super) const PHYSICAL_BLOCK_EXP: usize = 24;
    pub(super) const MIN_IO_SIZE: usize = 26;
    pub(super) const OPT_IO_SIZE: usize = 28;
    pub(super) const WRITEBACK: usize = 32;
    pub(super) const NUM_QUEUES: usize = 34;
    pub(super) const MAX_DISCARD_SECTORS: usize = 36;
    pub(super) const MAX_DISCARD_SEG: usize = 40;
    pub(super) const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(super) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
}

/// The limits of DISCARD, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// The smallest unit that a discard frees (`discard_sector_alignment`).
    pub alignment_sectors: u32,
    /// Most sectors of a segment (`max_discard_sectors`).
    pub max_sectors: u32,
}

impl DiscardLimits {
    /// The limits for an image that frees `granularity_bytes` at least (0: unknown), and whose device discards at most
    /// `device_max_bytes` in one piece.
    ///
    /// => The maximum is a multiple of the alignment, and at least one unit of it: Linux does not split discards at a
    ///    maximum below the alignment, so each would exceed the maximum.
    pub fn new(granularity_bytes: u32, device_max_bytes: u64) -> Self {
        // To discard part of a page, the cache would have to read and keep the rest.
        let unit = u64::from(granularity_bytes).max(PAGE_BYTES) / SECTOR_BYTES;
        let most = device_max_bytes.clamp(DISCARD_BYTES_MIN, DISCARD_BYTES_MAX) / SECTOR_BYTES;
        let max = (most / unit * unit).max(unit);
        let sectors = |count: u64| u32::try_from(count).expect("below 4 GiB in bytes");
        Self { alignment_sectors: sectors(unit), max_sectors: sectors(max) }
    }
}

/// The properties of the disk that are reported to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskParameters {
    /// Size in sectors.
    pub capacity_sectors: u64,
    /// Logical block size in bytes: a power of two, at least 512. Requests always count in sectors of 512 bytes.
    pub block_bytes: u32,
    /// Physical block size in bytes: a power of two times `block_bytes`; otherwise `block_bytes` is reported.
    pub physical_block_bytes: u32,
    /// Preferred I/O size in bytes; 0: unknown.
    pub optimal_io_bytes: u32,
    /// The limits of DISCARD.
    pub discard: DiscardLimits,
    /// Number of request queues, at least 1.
    pub num_queues: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Whether DISCARD is supported.
    pub can_discard: bool,
    /// Whether WRITE ZEROES is supported.
    pub can_zero: bool,
    /// Whether WRITE ZEROES may free space.
    pub zero_may_unmap: bool,
}

impl DiskParameters {
    /// The feature bits to offer; the vhost-user layer adds its own.
    ///
    /// => SIZE_MAX is not offered, like QEMU's own device. FreeBSD attaches no disk with a limit below its largest
    ///    transfer (1 MiB, or the value of kern.maxphys).
    /// => FLUSH is always offered (a device SHOULD, and with CONFIG_WCE it MUST: section 5.2.5.2), and no feature that
    ///    changes data together with RO.
    pub fn features(&self) -> u64 {
        let writable = !self.read_only;
        let offers = [
            (VIRTIO_F_VERSION_1, true),
            (VIRTIO_RING_F_EVENT_IDX, true),
            (VIRTIO_RING_F_INDIRECT_DESC, true),
            (VIRTIO_BLK_F_SEG_MAX, true),
            (VIRTIO_BLK_F_BLK_SIZE, true),
            (VIRTIO_BLK_F_TOPOLOGY, true),
            (VIRTIO_BLK_F_FLUSH, true),
            (VIRTIO_BLK_F_CONFIG_WCE, true),
            (VIRTIO_BLK_F_MQ, self.num_queues > 1),
            (VIRTIO_BLK_F_RO, self.read_only),
            (VIRTIO_BLK_F_DISCARD, writable && self.can_discard),
            (VIRTIO_BLK_F_WRITE_ZEROES, writable && self.can_zero),
        ];
        offers.into_iter().filter(|&(_, offered)| offered).fold(0, |bits, (bit, _)| bits | 1 << bit)
    }
}

/// The cache mode after the driver has acknowledged features: whether completed writes may stay volatile until a FLUSH.
///
/// => Without FLUSH the guest cannot make a write stable, so every write is stable when it completes. With CONFIG_WCE
///    the field MUST start as 0 then (section 5.2.5.2); without it the driver may assume write-through (section
///    5.2.5.1).
/// => With FLUSH the device may start in either mode: it starts as configured.
pub fn initial_writeback(acked_features: u64, configured: bool) -> bool {
    acked_features & (1 << VIRTIO_BLK_F_FLUSH) != 0 && configured
}

/// Whether a read of `size` bytes at `offset` includes the cache mode.
pub fn includes_writeback(offset: u32, size: u32) -> bool {
    let read = u64::from(offset)..u64::from(offset) + u64::from(size);
    read.contains(&(field::WRITEBACK as u64))
}

/// The configuration space of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
}

impl ConfigSpace {
    /// The configuration space of a disk, in this cache mode.
    pub fn new(parameters: &DiskParameters, writeback: bool) -> Self {
        let mut space = Self { bytes: [0; CONFIG_BYTES] };
        space.set_capacity(parameters.capacity_sectors);
        space.put(field::SEG_MAX, SEG_MAX.to_le_bytes());
        space.put(field::NUM_QUEUES, parameters.num_queues.to_le_bytes());
        space.set_writeback(writeback);
        space.put_topology(parameters);
        space.put_discard(parameters);
        space
    }

    /// Fills in the block sizes. The topology counts in logical blocks; `alignment_offset` stays 0.
    fn put_topology(&mut self, parameters: &DiskParameters) {
        let sector = u32::try_from(SECTOR_BYTES).expect("512");
        let block = parameters.block_bytes.max(sector);
        let ratio = parameters.physical_block_bytes / block;
        let exponent = if ratio.is_power_of_two() { ratio.trailing_zeros() } else { 0 };
        self.put(field::BLK_SIZE, block.to_le_bytes());
        self.put(field::PHYSICAL_BLOCK_EXP, [u8::try_from(exponent).expect("below 32")]);
        let min_io = u16::try_from(1u32 << exponent).unwrap_or(u16::MAX);
        self.put(field::MIN_IO_SIZE, min_io.to_le_bytes());
        self.put(field::OPT_IO_SIZE, (parameters.optimal_io_bytes / block).to_le_bytes());
    }

    /// Fills in the limits of DISCARD and WRITE ZEROES; they stay 0 if the feature is not offered.
    fn put_discard(&mut self, parameters: &DiskParameters) {
        let features = parameters.features();
        if features & (1 << VIRTIO_BLK_F_DISCARD) != 0 {
            let DiscardLimits { alignment_sectors, max_sectors } = parameters.discard;
            self.put(field::MAX_DISCARD_SECTORS, max_sectors.to_le_bytes());
            self.put(field::MAX_DISCARD_SEG, MAX_DISCARD_SEGMENTS.to_le_bytes());
            self.put(field::DISCARD_SECTOR_ALIGNMENT, alignment_sectors.to_le_bytes());
        }
        if features & (1 << VIRTIO_BLK_F_WRITE_ZEROES) != 0 {
            self.put(field::MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            self.put(field::MAX_WRITE_ZEROES_SEG, MAX_DISCARD_SEGMENTS.to_le_bytes());
            self.put(field::WRITE_ZEROES_MAY_UNMAP, [u8::from(parameters.zero_may_unmap)]);
        }
    }

    fn put<const N: usize>(&mut self, offset: usize, value: [u8; N]) {
        self.bytes[offset..offset + N].copy_from_slice(&value);
    }

    /// Sets a new size; the caller notifies the front-end of the change.
    pub fn set_capacity(&mut self, sectors: u64) {
        self.put(field::CAPACITY, sectors.to_le_bytes());
    }

    /// Sets the cache mode: 1 is write-back, 0 is write-through.
    pub fn set_writeback(&mut self, writeback: bool) {
        self.put(field::WRITEBACK, [u8::from(writeback)]);
    }

    /// Whether the cache mode is write-back.
    pub fn writeback(&self) -> bool {
        self.bytes[field::WRITEBACK] != 0
    }

    /// Reads `size` bytes from `offset`, at most 4096; they are 0 past the end of the structure.
    pub fn read(&self, offset: u32, size: u32) -> Vec<u8> {
        let start = structure_offset(offset);
        let len = (size as usize).min(READ_BYTES_MAX);
        let mut bytes = self.bytes.get(start..).unwrap_or_default().to_vec();
        bytes.resize(len, 0);
        bytes
    }

    /// Decodes a write of `bytes` at `offset`. Returns the new cache mode if it is one; anything else has no effect.
    ///
    /// => The only valid write is a single byte, 0 or 1, to `writeback` (section 5.2.6.1). The caller, which has the
    ///    negotiated features, decides whether to apply it.
    pub fn write(&self, offset: u32, bytes: &[u8]) -> Option<bool> {
        match (structure_offset(offset), bytes) {
            (field::WRITEBACK, [0]) => Some(false),
            (field::WRITEBACK, [1]) => Some(true),
            _ => None,
        }
    }
}

/// Converts a front-end's offset to an offset in the structure.
fn structure_offset(offset: u32) -> usize {
    offset.checked_sub(MMIO_CONFIG_OFFSET).unwrap_or(offset) as usize
}
