//! The configuration space: struct virtio_blk_config (virtio 1.2, section 5.2.4), and the features that go with it.
//!
//! The space is what the front-end copies from and to; of what it writes, only the cache mode counts.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::units::{PAGE_SIZE, SECTOR_BYTES};
use crate::virtio::{MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, SEG_MAX, SIZE_MAX};

#[cfg(test)]
mod tests;

/// Length of the fields served, up to `unused1`. The fields after it belong to features never offered and read as 0.
const CONFIG_BYTES: usize = 60;

/// Largest read answered: the vhost crate refuses configuration messages that reach beyond this.
const READ_BYTES_MAX: usize = 4096;

/// Older cloud-hypervisor sends offsets as a virtio-mmio window counts them, from 0x100. The structure ends far below, so
/// such an offset can't mean anything else.
const MMIO_CONFIG_OFFSET: u32 = 0x100;

/// Places of the fields in the structure.
mod field {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SIZE_MAX: usize = 8;
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

/// The disk as the guest is to see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskParameters {
    /// Size in sectors.
    pub capacity_sectors: u64,
    /// Logical block in bytes: a power of two, 512 or more. The protocol counts in sectors all the same.
    pub block_bytes: u32,
    /// Physical block in bytes: a power of two times `block_bytes`, else taken as `block_bytes`.
    pub physical_block_bytes: u32,
    /// Preferred I/O size in bytes; 0: unknown.
    pub optimal_io_bytes: u32,
    /// Granularity below which a discard frees nothing, in bytes; 0: unknown.
    pub discard_granularity_bytes: u32,
    /// Request queues, one or more.
    pub num_queues: u16,
    /// The guest may only read.
    pub read_only: bool,
    /// DISCARD works.
    pub can_discard: bool,
    /// WRITE ZEROES works.
    pub can_zero: bool,
    /// WRITE ZEROES may free space.
    pub zero_may_unmap: bool,
}

impl DiskParameters {
    /// The features to offer; the vhost-user layer adds its own.
    ///
    /// => FLUSH always (a device SHOULD, and MUST with CONFIG_WCE: section 5.2.5.2). Mutating features never with RO.
    pub fn features(&self) -> u64 {
        let writable = !self.read_only;
        let offers = [
            (VIRTIO_F_VERSION_1, true),
            (VIRTIO_RING_F_EVENT_IDX, true),
            (VIRTIO_RING_F_INDIRECT_DESC, true),
            (VIRTIO_BLK_F_SIZE_MAX, true),
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

/// The cache mode when the guest has chosen its features: whether completed writes may stay volatile until a FLUSH.
///
/// => Without FLUSH the guest can't make a write stable, so each is on completion: with CONFIG_WCE the field MUST start
///    as 0 (section 5.2.5.2), without it the driver may deduce write-through (section 5.2.5.1).
/// => With FLUSH the device may start either way: as configured.
pub fn initial_writeback(acked_features: u64, configured: bool) -> bool {
    acked_features & (1 << VIRTIO_BLK_F_FLUSH) != 0 && configured
}

/// Whether a read of `size` bytes at `offset` tells of the cache mode.
pub fn tells_writeback(offset: u32, size: u32) -> bool {
    let read = u64::from(offset)..u64::from(offset) + u64::from(size);
    read.contains(&(field::WRITEBACK as u64))
}

/// The configuration space of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
}

impl ConfigSpace {
    /// The space for a disk.
    pub fn new(parameters: &DiskParameters, writeback: bool) -> Self {
        let mut space = Self { bytes: [0; CONFIG_BYTES] };
        space.set_capacity(parameters.capacity_sectors);
        space.put(field::SIZE_MAX, SIZE_MAX.to_le_bytes());
        space.put(field::SEG_MAX, SEG_MAX.to_le_bytes());
        space.put(field::NUM_QUEUES, parameters.num_queues.to_le_bytes());
        space.set_writeback(writeback);
        space.put_topology(parameters);
        space.put_discard(parameters);
        space
    }

    /// Block sizes; the topology counts in logical blocks. `alignment_offset` stays 0.
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

    /// Limits of DISCARD and WRITE ZEROES; 0 where the feature isn't offered.
    fn put_discard(&mut self, parameters: &DiskParameters) {
        let features = parameters.features();
        if features & (1 << VIRTIO_BLK_F_DISCARD) != 0 {
            // Below a page the cache itself would have to read and keep the rest of it.
            let page = u32::try_from(PAGE_SIZE).expect("4096");
            let granularity = parameters.discard_granularity_bytes.max(page);
            let sectors = u64::from(granularity) / SECTOR_BYTES;
            let sectors = u32::try_from(sectors).expect("smaller than the u32 it came from");
            self.put(field::MAX_DISCARD_SECTORS, MAX_DISCARD_SECTORS.to_le_bytes());
            self.put(field::MAX_DISCARD_SEG, MAX_DISCARD_SEGMENTS.to_le_bytes());
            self.put(field::DISCARD_SECTOR_ALIGNMENT, sectors.to_le_bytes());
        }
        if features & (1 << VIRTIO_BLK_F_WRITE_ZEROES) != 0 {
            self.put(field::MAX_WRITE_ZEROES_SECTORS, MAX_DISCARD_SECTORS.to_le_bytes());
            self.put(field::MAX_WRITE_ZEROES_SEG, MAX_DISCARD_SEGMENTS.to_le_bytes());
            self.put(field::WRITE_ZEROES_MAY_UNMAP, [u8::from(parameters.zero_may_unmap)]);
        }
    }

    fn put<const N: usize>(&mut self, offset: usize, value: [u8; N]) {
        self.bytes[offset..offset + N].copy_from_slice(&value);
    }

    /// Shows a new size; the caller tells the front-end of the change.
    pub fn set_capacity(&mut self, sectors: u64) {
        self.put(field::CAPACITY, sectors.to_le_bytes());
    }

    /// Shows the cache mode: 1 write-back, 0 write-through.
    pub fn set_writeback(&mut self, writeback: bool) {
        self.put(field::WRITEBACK, [u8::from(writeback)]);
    }

    /// The cache mode shown.
    pub fn writeback(&self) -> bool {
        self.bytes[field::WRITEBACK] != 0
    }

    /// `size` bytes from `offset`, zeros where the structure has ended; never more than 4096.
    pub fn read(&self, offset: u32, size: u32) -> Vec<u8> {
        let start = structure_offset(offset);
        let len = (size as usize).min(READ_BYTES_MAX);
        let mut answer = self.bytes.get(start..).unwrap_or_default().to_vec();
        answer.resize(len, 0);
        answer
    }

    /// Takes the front-end's write of `bytes` at `offset`: the new cache mode, if that is what it was.
    ///
    /// => Only a single byte, 0 or 1, to `writeback` counts (section 5.2.6.1); all else is for the device to say. The
    ///    caller, who knows the negotiated features, decides whether to call [`Self::set_writeback`].
    pub fn write(&self, offset: u32, bytes: &[u8]) -> Option<bool> {
        match (structure_offset(offset), bytes) {
            (field::WRITEBACK, [0]) => Some(false),
            (field::WRITEBACK, [1]) => Some(true),
            _ => None,
        }
    }
}

/// The place in the structure that a front-end's offset means.
fn structure_offset(offset: u32) -> usize {
    offset.checked_sub(MMIO_CONFIG_OFFSET).unwrap_or(offset) as usize
}
