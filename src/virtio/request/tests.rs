//! Tests of requests: every layout, and every check.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_SCSI_CMD, VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_T_ZONE_REPORT};
use vm_memory::Bytes;

use super::*;
use crate::prng::Prng;
use crate::virtio::Status;
use crate::virtio::guest_copy::write_status;
use crate::virtio::testing::{END, HIGH, HOLE, INDIRECT, NEXT, SEAM, WRITE, put, put_chain, ram};

mod discard;

const TABLE: u64 = 0x1000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x7000;
const SIZE: u16 = 64;

/// Every type of request that has a [`RequestKind`].
const ALL: [u32; 6] = [
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_T_GET_ID,
];

/// An address, a length, and WRITE or 0.
type Piece = (u64, u32, u16);

fn disk() -> RequestLimits {
    let serial = serial("genblk-1");
    let max_discard_sectors = 1 << 19;
    RequestLimits {
        capacity_sectors: 1000.into(),
        read_only: false,
        can_discard: true,
        max_discard_sectors,
        can_zero: true,
        serial,
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0xcc; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn is_out(kind: u32) -> bool {
    RequestKind::from_wire(kind).has_readable_data()
}

/// The request made of `buffers`, with a header for `kind` at [`HEADER`].
fn request(mem: &GuestRam, kind: u32, sector: u64, buffers: &[Piece]) -> Result<Request, Malformed> {
    mem.write_slice(&header(kind, sector), GuestAddress(HEADER)).unwrap();
    put_chain(mem, TABLE, buffers);
    parse_at(mem, 0)
}

/// Parses into a request that was used before, so that a field that is not reset is detected.
fn parse_at(mem: &GuestRam, head: u16) -> Result<Request, Malformed> {
    let stale = GuestRange { addr: GuestAddress(0xdead), len: 77 };
    let mut parsed = Request { kind: RequestKind::Read, data: vec![stale; 3], data_bytes: 231, ..Request::default() };
    parse(mem, &DescriptorTable::new(mem, GuestAddress(TABLE), u32::from(SIZE)), head, &mut parsed).map(|()| parsed)
}

/// A plain request: header, data of `len` bytes, status.
fn plain(mem: &GuestRam, kind: u32, sector: u64, len: u32) -> Request {
    let flag = if is_out(kind) { 0 } else { WRITE };
    request(mem, kind, sector, &[(HEADER, 16, 0), (DATA, len, flag), (STATUS, 1, WRITE)]).unwrap()
}

/// The address of each byte of the request's data.
fn addresses(request: &Request) -> Vec<u64> {
    assert!(request.data.iter().all(|r| r.len > 0));
    request.data.iter().flat_map(|r| r.addr.0..r.addr.0 + u64::from(r.len)).collect()
}

/// T20: header, data and status in every layout. The readable and the writable part are each cut into up to three
/// buffers at every pair of positions, with empty buffers between and after them, as plain descriptors and in an
/// indirect table. The request does not depend on the cuts.
#[test]
fn any_descriptor_layout_parses_to_the_same_request() {
    let mem = ram();
    // The readable and the writable bytes are contiguous each, so addresses identify a request's bytes.
    let (readable, writable, sector) = (HEADER, DATA, 0x0123_4567_89ab_cdef);
    for kind in ALL {
        mem.write_slice(&header(kind, sector), GuestAddress(readable)).unwrap();
        for (read_len, write_len) in [(16, 1), (16, 4), (19, 1), (19, 4)] {
            let expected: Vec<u64> = match RequestKind::from_wire(kind) {
                k if k.has_readable_data() => (readable + 16..readable + read_len).collect(),
                k if k.has_writable_data() => (writable..writable + write_len - 1).collect(),
                _ => vec![],
            };
            for (read_cuts, write_cuts) in pairs(&cuts(read_len), &cuts(write_len)) {
                let mut buffers = pieces(readable, read_cuts, read_len, 0);
                buffers.push((HOLE, 0, 0));
                buffers.extend(pieces(writable, write_cuts, write_len, WRITE));
                buffers.push((u64::MAX, 0, WRITE));
                for plain in [buffers.len(), 0, 1] {
                    put_layout(&mem, &buffers, plain);
                    let parsed = parse_at(&mem, 0).unwrap();
                    assert_eq!((parsed.kind, parsed.sector), (RequestKind::from_wire(kind), sector));
                    assert_eq!(addresses(&parsed), expected, "{buffers:?}");
                    assert_eq!(parsed.data_bytes, expected.len() as u64);
                    assert_eq!(parsed.status_addr, GuestAddress(writable + write_len - 1));
                }
            }
        }
    }
}

/// Every way to cut `len` bytes at two places, which may coincide with each other or an end.
fn cuts(len: u64) -> Vec<[u64; 2]> {
    (0..=len).flat_map(|a| (a..=len).map(move |b| [a, b])).collect()
}

fn pairs(first: &[[u64; 2]], second: &[[u64; 2]]) -> Vec<([u64; 2], [u64; 2])> {
    first.iter().flat_map(|&a| second.iter().map(move |&b| (a, b))).collect()
}

fn pieces(base: u64, cuts: [u64; 2], len: u64, flag: u16) -> Vec<Piece> {
    let piece = |from: u64, to: u64| (base + from, u32::try_from(to - from).unwrap(), flag);
    vec![piece(0, cuts[0]), piece(cuts[0], cuts[1]), piece(cuts[1], len)]
}

/// Writes the buffers as descriptors, those from `plain` on in an indirect table (T18).
fn put_layout(mem: &GuestRam, buffers: &[Piece], plain: usize) {
    if plain >= buffers.len() {
        return put_chain(mem, TABLE, buffers);
    }
    let (first, rest) = buffers.split_at(plain);
    for (index, &(addr, len, flags)) in (0u16..).zip(first) {
        put(mem, TABLE, index, (addr, len, flags | NEXT, index + 1));
    }
    let table_bytes = u32::try_from(rest.len() * 16).unwrap();
    put(mem, TABLE, u16::try_from(plain).unwrap(), (HIGH, table_bytes, INDIRECT, 0));
    put_chain(mem, HIGH, rest);
}

/// T22: for every kind of error in a request, its status byte is found if there is one.
#[test]
fn an_invalid_request_with_a_status_byte_can_be_answered() {
    let mem = ram();
    let answerable = Err(Malformed::WithStatus { status_addr: GuestAddress(STATUS) });
    let status = (STATUS, 1, WRITE);
    let cases: [&[Piece]; 10] = [
        &[status],
        &[(HEADER, 15, 0), status],
        &[(HEADER, 0, 0), status],
        &[(HEADER, 8, 0), (HEADER + 8, 7, 0), (DATA, 512, WRITE), status],
        &[(HOLE, 16, 0), status],
        &[(HOLE - 8, 16, 0), status],
        // A header after an unreadable first piece does not make the request readable.
        &[(HOLE, 4, 0), (HEADER, 16, 0), status],
        &[(u64::MAX - 3, 16, 0), status],
        &[status, (HEADER, 16, 0)],
        &[(HEADER, 16, 0), (DATA, 4, WRITE), (DATA, 4, 0), status],
    ];
    for buffers in cases {
        assert_eq!(request(&mem, VIRTIO_BLK_T_IN, 0, buffers), answerable, "{buffers:x?}");
        assert_eq!(request(&mem, VIRTIO_BLK_T_OUT, 0, buffers), answerable, "{buffers:x?}");
    }
}

#[test]
fn a_chain_without_a_usable_status_byte_breaks_the_ring() {
    let mem = ram();
    let head = (HEADER, 16, 0);
    let cases: [&[Piece]; 7] = [
        &[head],
        &[head, (DATA, 512, 0)],
        &[head, (STATUS, 0, WRITE)],
        &[head, (HOLE, 1, WRITE)],
        &[head, (DATA, 512, WRITE), (END, 1, WRITE)],
        &[head, (HOLE - 1, 2, WRITE)],
        &[head, (u64::MAX, 2, WRITE)],
    ];
    for buffers in cases {
        assert_eq!(request(&mem, VIRTIO_BLK_T_IN, 0, buffers), Err(Malformed::NoStatus), "{buffers:x?}");
    }
    put(&mem, TABLE, 0, (HEADER, 16, NEXT, 1));
    put(&mem, TABLE, 1, (STATUS, 1, WRITE | NEXT, 0));
    assert_eq!(parse_at(&mem, 0), Err(Malformed::Unreadable), "a loop");
    assert_eq!(parse_at(&mem, SIZE), Err(Malformed::Unreadable), "a head outside the table");
    let outside = [(HOLE, 16, 0), (DATA, 512, WRITE), (HOLE + 16, 1, WRITE)];
    assert_eq!(request(&mem, VIRTIO_BLK_T_IN, 0, &outside), Err(Malformed::Unreadable), "all of a driver's own memory");
}

#[test]
fn a_chain_longer_than_the_protocol_allows_is_answered_with_an_error() {
    let mem = ram();
    let status = (STATUS, 1, WRITE);
    let longest = request(&mem, 0, 0, &[(HEADER, 16, 0), (0, u32::MAX - 17, WRITE), status]).unwrap();
    assert_eq!((longest.data_bytes, longest.used_len(Status::Ok)), (u64::from(u32::MAX) - 17, u32::MAX - 16));
    assert_eq!(longest.check(&disk()), Err(Status::IoErr));
    let answerable = Err(Malformed::WithStatus { status_addr: GuestAddress(STATUS) });
    assert_eq!(request(&mem, 0, 0, &[(HEADER, 16, 0), (0, u32::MAX - 16, WRITE), status]), answerable);
    let many = [[(HEADER, 16, 0)].as_slice(), &[(0, u32::MAX, WRITE); 40], &[status]].concat();
    assert_eq!(request(&mem, 0, 0, &many), answerable);
}

#[test]
fn reads_and_writes_must_be_whole_sectors_within_the_disk() {
    let mem = ram();
    let most = 1000u64;
    let cases = [
        (0, 512, true),
        (0, 4096, true),
        (most - 1, 512, true),
        (most - 1, 1024, false),
        (most, 512, false),
        (u64::MAX, 512, false),
        (u64::MAX, 4096, false),
        (u64::MAX / 512, 512, false),
        (0, 511, false),
        (0, 513, false),
        (0, 1, false),
        // Empty ones within the disk are valid and move nothing.
        (0, 0, true),
        (most, 0, true),
        (most + 1, 0, false),
    ];
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        for (sector, len, valid) in cases {
            let expected = if valid { Ok(()) } else { Err(Status::IoErr) };
            assert_eq!(plain(&mem, kind, sector, len).check(&disk()), expected, "{kind} {sector} {len}");
        }
    }
    assert_eq!(plain(&mem, VIRTIO_BLK_T_IN, 8, 4096).span(), SectorSpan::new(8, 8));
}

/// T4: a read-only disk fails every request that would change it, and no other.
#[test]
fn a_read_only_disk_fails_every_kind_that_changes_data() {
    let mem = ram();
    let read_only = RequestLimits { read_only: true, ..disk() };
    for kind in ALL {
        let expected = if is_out(kind) { Err(Status::IoErr) } else { Ok(()) };
        assert_eq!(plain(&mem, kind, 0, 512).check(&read_only), expected, "{kind}");
        assert_eq!(plain(&mem, kind, 0, 512).check(&disk()), Ok(()), "{kind}");
    }
    assert_eq!(plain(&mem, VIRTIO_BLK_T_OUT, 0, 0).check(&read_only), Err(Status::IoErr));
}

#[test]
fn an_unoffered_request_type_is_unsupported() {
    let mem = ram();
    let kinds = [VIRTIO_BLK_T_SCSI_CMD, VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_T_ZONE_REPORT, 5, u32::MAX];
    for kind in kinds {
        let parsed = plain(&mem, kind, 0, 512);
        assert_eq!((parsed.kind, parsed.data.len()), (RequestKind::Unknown(kind), 0));
        assert_eq!(parsed.check(&disk()), Err(Status::Unsupported));
        assert_eq!(parsed.used_len(Status::IoErr), 1);
    }
    let plain_disk = RequestLimits { can_discard: false, can_zero: false, ..disk() };
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(plain(&mem, kind, 0, 16).check(&plain_disk), Err(Status::Unsupported));
    }
}

/// Part of T1: a FLUSH needs no data, and neither data nor a sector outside the disk makes it invalid.
#[test]
fn a_flush_is_valid_with_and_without_data() {
    let mem = ram();
    let bare = request(&mem, VIRTIO_BLK_T_FLUSH, u64::MAX, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]).unwrap();
    for parsed in [bare, plain(&mem, VIRTIO_BLK_T_FLUSH, u64::MAX, 4096)] {
        assert_eq!(parsed.check(&disk()), Ok(()));
        assert_eq!((parsed.data.len(), parsed.data_bytes, parsed.used_len(Status::Ok)), (0, 0, 1));
    }
}

/// T9 and T14: the serial is padded with NULs, truncated to the space of the data, and an error if there is none.
#[test]
fn the_serial_is_padded_and_never_written_past_the_data() {
    let mem = ram();
    assert_eq!(&serial("genblk-1"), b"genblk-1\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(&serial("a serial of more than twenty bytes"), b"a serial of more tha");
    for space in [0u32, 1, 7, 19, 20, 21, 512] {
        mem.write_slice(&[0xee; 600], GuestAddress(DATA)).unwrap();
        let parsed = plain(&mem, VIRTIO_BLK_T_GET_ID, 0, space);
        if space == 0 {
            assert_eq!(parsed.check(&disk()), Err(Status::IoErr));
            assert_eq!(parsed.used_len(Status::IoErr), 1);
            continue;
        }
        assert_eq!(parsed.check(&disk()), Ok(()));
        parsed.write_id(&mem, &disk()).unwrap();
        let len = space.min(20) as usize;
        let mut expected = vec![0xee; 600];
        expected[..len].copy_from_slice(&disk().serial[..len]);
        let mut seen = vec![0; 600];
        mem.read_slice(&mut seen, GuestAddress(DATA)).unwrap();
        assert_eq!(seen, expected);
        assert_eq!(parsed.used_len(Status::Ok), space.min(20) + 1);
    }
    let outside = [(HEADER, 16, 0), (HOLE, 20, WRITE), (STATUS, 1, WRITE)];
    let parsed = request(&mem, VIRTIO_BLK_T_GET_ID, 0, &outside).unwrap();
    assert_eq!(parsed.write_id(&mem, &disk()), Err(BadAddress));
}

/// T10: the used length counts the bytes written.
#[test]
fn the_used_length_counts_only_bytes_written_to_the_guest() {
    let mem = ram();
    for kind in ALL {
        let parsed = plain(&mem, kind, 0, 512);
        let expected = match parsed.kind {
            RequestKind::Read => 513,
            RequestKind::GetId => 21,
            _ => 1,
        };
        assert_eq!(parsed.used_len(Status::Ok), expected);
        assert_eq!(parsed.used_len(Status::IoErr), 1);
    }
}

/// Random descriptors and random memory behind them: every parse ends, every range satisfies the invariants of
/// [`Request`], and every request that passes its checks can be executed.
#[test]
fn random_chains_never_cause_a_panic() {
    let mem = ram();
    let (mut parsed_count, mut answerable, mut accepted) = (0, 0, 0);
    let (mut parsed, mut segments) = (Request::default(), Vec::new());
    for seed in 0..100_000 {
        let mut prng = Prng::new(seed);
        for index in 0..6 {
            let places = [HEADER, DATA, STATUS, HIGH, TABLE, HOLE - 3, SEAM - 5, END - 2, u64::MAX - 9];
            let addr = prng.pick(&places);
            let len = prng.pick(&[0, 1, 8, 16, 16, 17, 32, 48, 512, 4096, u32::MAX]);
            let flags = prng.pick(&[0, NEXT, NEXT, NEXT | WRITE, NEXT | WRITE, WRITE, INDIRECT, u16::MAX]);
            put(&mem, TABLE, index, (addr, len, flags, u16::try_from(prng.below(7)).unwrap()));
        }
        if seed % 2 == 0 {
            // Half of the chains start like a request.
            put(&mem, TABLE, 0, (HEADER, 16, NEXT, 1));
            put(&mem, TABLE, 5, (STATUS, 1, WRITE, 0));
        }
        for word in 0..8 {
            mem.write_obj(prng.next_u64() << 16 | prng.next_u64(), GuestAddress(HIGH + word * 8)).unwrap();
        }
        let kind = prng.pick(&[0, 1, 4, 8, 11, 13, 99]);
        mem.write_slice(&header(kind, prng.below(1100)), GuestAddress(HEADER)).unwrap();
        let head = if seed % 2 == 0 { 0 } else { u16::try_from(prng.below(7)).unwrap() };
        match parse(&mem, &DescriptorTable::new(&mem, GuestAddress(TABLE), 6), head, &mut parsed) {
            Err(Malformed::NoStatus | Malformed::Unreadable) => continue,
            Err(Malformed::WithStatus { status_addr }) => {
                assert_eq!(write_status(&mem, status_addr, Status::IoErr), Ok(()));
                answerable += 1;
                continue;
            }
            Ok(()) => parsed_count += 1,
        }
        assert_eq!(parsed.data_bytes, parsed.data.iter().map(|r| u64::from(r.len)).sum::<u64>());
        assert!(parsed.data.iter().all(|r| r.len > 0) && parsed.data_bytes < u64::from(u32::MAX));
        if parsed.check(&disk()).is_ok() {
            accepted += 1;
            if matches!(parsed.kind, RequestKind::Discard | RequestKind::WriteZeroes) {
                let _ = parsed.range_segments(&mem, &disk(), &mut segments);
                assert!(segments.iter().all(|s| s.span.end() <= disk().capacity_sectors.get()));
            }
            let _ = parsed.write_id(&mem, &disk());
        }
        assert_eq!(write_status(&mem, parsed.status_addr, Status::Ok), Ok(()));
    }
    let enough = parsed_count > 3_000 && answerable > 3_000 && accepted > 1_000;
    assert!(enough, "{parsed_count} parsed, {answerable} answerable, {accepted} accepted");
}
