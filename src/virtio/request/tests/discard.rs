//! Tests of the payload of DISCARD and WRITE ZEROES.

use super::*;

fn raw_segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [sector.to_le_bytes().as_slice(), &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// The result of [`Request::range_segments`] for these segments, in buffers of `cut` bytes across the seam of two
/// regions.
fn segments_of(kind: u32, raw: &[(u64, u32, u32)], cut: usize) -> Result<Vec<RangeSegment>, Status> {
    let mem = ram();
    let bytes: Vec<u8> = raw.iter().flat_map(|&(sector, count, flags)| raw_segment(sector, count, flags)).collect();
    let mut buffers = vec![(HEADER, 16, 0)];
    for (addr, piece) in (SEAM - 24..).step_by(cut).zip(bytes.chunks(cut)) {
        mem.write_slice(piece, GuestAddress(addr)).unwrap();
        buffers.push((addr, u32::try_from(piece.len()).unwrap(), 0));
    }
    buffers.push((STATUS, 1, WRITE));
    let parsed = request(&mem, kind, 0, &buffers).unwrap();
    let big = RequestLimits { capacity_sectors: (1 << 20).into(), ..disk() };
    parsed.check(&big)?;
    let stale = RangeSegment { span: SectorSpan::new(9, 9), unmap: Unmap::Allowed };
    let mut segments = vec![stale];
    let result = parsed.range_segments(&mem, &big, &mut segments);
    assert!(result.is_ok() || segments.is_empty());
    result.map(|()| segments)
}

#[test]
fn range_segments_may_be_split_across_buffers_anywhere() {
    let raw: Vec<_> = (0..32u32).map(|n| (u64::from(n) * 5000, n % 3 * 100, 0)).collect();
    let expected: Vec<_> = raw
        .iter()
        .filter(|&&(_, count, _)| count > 0)
        .map(|&(start, count, _)| RangeSegment {
            span: SectorSpan::new(start, u64::from(count)),
            unmap: Unmap::Forbidden,
        })
        .collect();
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for cut in [9, 16, 17, 24, 100, 512] {
            assert_eq!(segments_of(kind, &raw, cut).as_ref(), Ok(&expected), "cut {cut}");
        }
        for cut in 1..=16 {
            assert_eq!(segments_of(kind, &raw[1..2], cut).as_deref(), Ok(&expected[..1]), "cut {cut}");
        }
    }
}

#[test]
fn unknown_flags_are_reported_before_any_other_error() {
    let (discard, zero) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    let unmapped = RangeSegment { span: SectorSpan::new(1, 2), unmap: Unmap::Allowed };
    assert_eq!(segments_of(zero, &[(1, 2, 1)], 16), Ok(vec![unmapped]));
    assert_eq!(segments_of(discard, &[(1, 2, 1)], 16), Err(Status::Unsupported));
    for flags in [2, 3, 1 << 31, u32::MAX] {
        for kind in [discard, zero] {
            assert_eq!(segments_of(kind, &[(1, 2, flags)], 16), Err(Status::Unsupported), "{flags}");
            assert_eq!(segments_of(kind, &[(u64::MAX, 2, 0), (1, 2, flags)], 16), Err(Status::Unsupported));
            assert_eq!(segments_of(kind, &[(1, 2, 0), (1, 0, flags)], 16), Err(Status::Unsupported));
        }
    }
}

#[test]
fn segments_outside_the_disk_or_the_limits_are_errors() {
    let end = 1u64 << 20;
    let bad = [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX, u32::MAX), (end + 1, 0), (0, u32::MAX)];
    for (kind, max) in [(VIRTIO_BLK_T_DISCARD, disk().max_discard_sectors), (VIRTIO_BLK_T_WRITE_ZEROES, 32768)] {
        let bad = bad.into_iter().chain([(0, max + 1)]);
        for (sector, count) in bad {
            assert_eq!(segments_of(kind, &[(sector, count, 0)], 16), Err(Status::IoErr), "{sector} {count}");
            assert_eq!(segments_of(kind, &[(0, 1, 0), (sector, count, 0)], 16), Err(Status::IoErr));
        }
        assert_eq!(segments_of(kind, &[(0, max, 0), (end, 0, 0)], 16).unwrap().len(), 1);
        assert_eq!(segments_of(kind, &[(0, 1, 0); 32], 512).unwrap().len(), 32);
        assert_eq!(segments_of(kind, &[(0, 1, 0); 33], 528), Err(Status::IoErr));
        assert_eq!(segments_of(kind, &[], 16), Err(Status::IoErr));
    }
    let mem = ram();
    for len in [15, 17, 31, 40_000] {
        assert_eq!(plain(&mem, VIRTIO_BLK_T_DISCARD, 0, len).check(&disk()), Err(Status::IoErr));
    }
    let unmapped = [(HEADER, 16, 0), (HOLE, 16, 0), (STATUS, 1, WRITE)];
    let parsed = request(&mem, VIRTIO_BLK_T_DISCARD, 0, &unmapped).unwrap();
    assert_eq!(parsed.range_segments(&mem, &disk(), &mut vec![]), Err(Status::IoErr));
}
