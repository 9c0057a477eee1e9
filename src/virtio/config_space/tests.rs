//! Tests of the configuration space and the feature bits.

use std::mem::offset_of;

use virtio_bindings::virtio_blk::virtio_blk_config;

use super::*;

fn parameters() -> DiskParameters {
    DiskParameters {
        capacity_sectors: 0x0123_4567_89ab,
        block_bytes: 512,
        physical_block_bytes: 4096,
        optimal_io_bytes: 1 << 20,
        discard: DiscardLimits::new(65536, u64::MAX),
        num_queues: 4,
        read_only: false,
        can_discard: true,
        can_zero: true,
        zero_may_unmap: true,
    }
}

fn number(space: &ConfigSpace, offset: usize, size: u32) -> u64 {
    let mut bytes = space.read(u32::try_from(offset).unwrap(), size);
    bytes.resize(8, 0);
    u64::from_le_bytes(bytes.try_into().unwrap())
}

/// The fields are at the offsets of the kernel's structure, with the values of the parameters.
#[test]
fn config_fields_have_the_offsets_of_linux() {
    let space = ConfigSpace::new(&parameters(), true);
    let expected = [
        (offset_of!(virtio_blk_config, capacity), 8, 0x0123_4567_89ab),
        (offset_of!(virtio_blk_config, size_max), 4, 0),
        (offset_of!(virtio_blk_config, seg_max), 4, 126),
        (offset_of!(virtio_blk_config, geometry), 4, 0),
        (offset_of!(virtio_blk_config, blk_size), 4, 512),
        (offset_of!(virtio_blk_config, physical_block_exp), 1, 3),
        (offset_of!(virtio_blk_config, alignment_offset), 1, 0),
        (offset_of!(virtio_blk_config, min_io_size), 2, 8),
        (offset_of!(virtio_blk_config, opt_io_size), 4, 2048),
        (offset_of!(virtio_blk_config, wce), 1, 1),
        (offset_of!(virtio_blk_config, unused), 1, 0),
        (offset_of!(virtio_blk_config, num_queues), 2, 4),
        (offset_of!(virtio_blk_config, max_discard_sectors), 4, 1 << 21),
        (offset_of!(virtio_blk_config, max_discard_seg), 4, 32),
        (offset_of!(virtio_blk_config, discard_sector_alignment), 4, 128),
        (offset_of!(virtio_blk_config, max_write_zeroes_sectors), 4, 32768),
        (offset_of!(virtio_blk_config, max_write_zeroes_seg), 4, 32),
        (offset_of!(virtio_blk_config, write_zeroes_may_unmap), 1, 1),
        (offset_of!(virtio_blk_config, unused1), 3, 0),
        (offset_of!(virtio_blk_config, max_secure_erase_sectors), 8, 0),
    ];
    for (offset, size, value) in expected {
        assert_eq!(number(&space, offset, size), value, "offset {offset}");
    }
    assert_eq!(CONFIG_BYTES, offset_of!(virtio_blk_config, max_secure_erase_sectors));
}

/// T7 and T14: a read of any offset and size returns exactly those bytes.
#[test]
fn a_read_returns_the_bytes_at_its_offset() {
    let space = ConfigSpace::new(&parameters(), true);
    let whole = space.read(0, 256);
    assert_eq!(&whole[..CONFIG_BYTES], &space.bytes);
    assert!(whole[CONFIG_BYTES..].iter().all(|&byte| byte == 0));
    for offset in 0..100u32 {
        for size in 0..100u32 {
            let expected = &whole[offset as usize..(offset + size) as usize];
            assert_eq!(space.read(offset, size), expected);
            assert_eq!(
                space.read(0x100 + offset, size),
                expected,
                "older versions of cloud-hypervisor count from 0x100"
            );
        }
    }
    assert_eq!(space.read(u32::MAX, 4), [0; 4]);
    assert_eq!(space.read(0, u32::MAX).len(), READ_BYTES_MAX);
}

/// T3: of all writes at any offset, only a 0 or 1 to `writeback` has an effect.
#[test]
fn only_the_cache_mode_can_be_written() {
    let space = ConfigSpace::new(&parameters(), true);
    for offset in (0..300).chain([u32::MAX]) {
        let is_writeback = offset == 32 || offset == 0x100 + 32;
        assert_eq!(space.write(offset, &[0]), is_writeback.then_some(false));
        assert_eq!(space.write(offset, &[1]), is_writeback.then_some(true));
        for bytes in [[].as_slice(), &[2], &[255], &[0, 0], &[1, 0, 0, 0], &[1; 60]] {
            assert_eq!(space.write(offset, bytes), None, "{offset} {bytes:?}");
        }
    }
}

#[test]
fn the_cache_mode_and_the_capacity_can_change() {
    let mut space = ConfigSpace::new(&parameters(), false);
    assert!(!space.writeback());
    space.set_writeback(true);
    assert!(space.writeback());
    assert_eq!(space.read(32, 2), [1, 0]);
    space.set_capacity(77);
    assert_eq!(number(&space, 0, 8), 77);
}

/// T17: without FLUSH the cache is write-through, whatever is configured.
#[test]
fn the_cache_starts_write_through_unless_the_guest_can_flush() {
    let (flush, wce) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
    for configured in [false, true] {
        assert!(!initial_writeback(0, configured));
        assert!(!initial_writeback(wce, configured));
        assert_eq!(initial_writeback(flush, configured), configured);
        assert_eq!(initial_writeback(flush | wce, configured), configured);
    }
}

#[test]
fn features_follow_the_disk_parameters() {
    let has = |parameters: &DiskParameters, bit: u32| parameters.features() & (1 << bit) != 0;
    let full = parameters();
    let always = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
    ];
    let cases = [
        (full.clone(), [true, true, true, false]),
        (DiskParameters { read_only: true, ..full.clone() }, [false, false, true, true]),
        (DiskParameters { can_discard: false, ..full.clone() }, [false, true, true, false]),
        (DiskParameters { can_zero: false, num_queues: 1, ..full }, [true, false, false, false]),
    ];
    for (parameters, [discard, zero, mq, read_only]) in cases {
        assert!(always.iter().all(|&bit| has(&parameters, bit)));
        assert_eq!(has(&parameters, VIRTIO_BLK_F_DISCARD), discard);
        assert_eq!(has(&parameters, VIRTIO_BLK_F_WRITE_ZEROES), zero);
        assert_eq!(has(&parameters, VIRTIO_BLK_F_MQ), mq);
        assert_eq!(has(&parameters, VIRTIO_BLK_F_RO), read_only);
        let space = ConfigSpace::new(&parameters, false);
        assert_eq!(number(&space, field::MAX_DISCARD_SEG, 4) != 0, discard);
        assert_eq!(number(&space, field::MAX_WRITE_ZEROES_SEG, 4) != 0, zero);
        assert_eq!(space.read(56, 1), [u8::from(zero)]);
    }
}

#[test]
fn the_discard_maximum_is_a_multiple_of_the_alignment_and_follows_the_device() {
    const MIB: u64 = 1 << 20;
    let cases = [
        // (granularity, maximum of the device) -> (alignment, maximum), all in bytes
        ((0, u64::MAX), (4096, 1024 * MIB)),
        ((512, 0), (4096, 16 * MIB)),
        ((512, 4096), (4096, 16 * MIB)),
        ((65536, 256 * MIB), (65536, 256 * MIB)),
        ((12288, 100 * MIB), (12288, 100 * MIB / 12288 * 12288)),
        ((32 << 20, 0), (32 * MIB, 32 * MIB)),
        ((2 << 30, u64::MAX), (2048 * MIB, 2048 * MIB)),
        ((u32::MAX, u64::MAX), ((1 << 32) - 512, (1 << 32) - 512)),
    ];
    for ((granularity, device_max), (alignment, max)) in cases {
        let limits = DiscardLimits::new(granularity, device_max);
        let bytes = |sectors: u32| u64::from(sectors) * SECTOR_BYTES;
        assert_eq!((bytes(limits.alignment_sectors), bytes(limits.max_sectors)), (alignment, max), "{granularity}");
    }
}

/// Even nonsensical sizes from a store cause no panic.
#[test]
fn any_block_size_gives_a_valid_topology() {
    for block_bytes in [0, 1, 512, 4096, u32::MAX] {
        for physical_block_bytes in [0, 511, 512, 1536, 4096, 1 << 31, u32::MAX] {
            let odd = DiskParameters { block_bytes, physical_block_bytes, optimal_io_bytes: 0, ..parameters() };
            let space = ConfigSpace::new(&odd, true);
            let exponent = number(&space, field::PHYSICAL_BLOCK_EXP, 1);
            assert_eq!(number(&space, field::MIN_IO_SIZE, 2), (1u64 << exponent).min(0xffff));
            assert_eq!(number(&space, field::OPT_IO_SIZE, 4), 0);
        }
    }
}

#[test]
fn config_sizes_are_in_logical_blocks() {
    let large = DiskParameters { block_bytes: 4096, zero_may_unmap: false, ..parameters() };
    let space = ConfigSpace::new(&large, true);
    assert_eq!(number(&space, offset_of!(virtio_blk_config, opt_io_size), 4), 256);
    assert_eq!(number(&space, offset_of!(virtio_blk_config, write_zeroes_may_unmap), 1), 0);
}

#[test]
fn a_read_of_any_range_around_the_cache_mode_includes_it() {
    let offset = u32::try_from(offset_of!(virtio_blk_config, wce)).unwrap();
    for (start, size, includes) in
        [(offset, 1, true), (0, 60, true), (offset - 1, 2, true), (offset - 1, 1, false), (offset + 1, 8, false)]
    {
        assert_eq!(includes_writeback(start, size), includes, "{size} bytes at {start}");
    }
    assert!(!includes_writeback(u32::MAX, u32::MAX));
}
