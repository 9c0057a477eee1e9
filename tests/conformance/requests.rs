//! Well-formed requests: what each type must do, and what it must write to guest memory.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::IMAGE_BYTES;
use crate::common::SECTOR_BYTES;
use crate::common::daemon::{Daemon, DaemonOptions, TempDir};
use crate::common::request::{OK, Payload, pattern, range};
use crate::common::session::{Session, SessionOptions, feature};

const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNMAP: u32 = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

/// VIRTIO_BLK_ID_BYTES: the length of a serial in guest memory.
const SERIAL_BYTES: usize = 20;

/// Offsets in `struct virtio_blk_config`.
const CONFIG_MAX_DISCARD_SECTORS: u32 = 36;
const CONFIG_MAX_DISCARD_SEG: u32 = 40;
const CONFIG_DISCARD_ALIGNMENT: u32 = 44;
const CONFIG_MAX_WRITE_ZEROES_SEG: u32 = 52;

/// First sector and count of ranges that start and end inside pages, inside one page, and at page boundaries.
const RANGES: [(u64, u32); 5] = [(3, 1), (8, 8), (5, 20), (16, 64), (7, 121)];

fn start() -> Daemon {
    Daemon::start("requests", IMAGE_BYTES, &DaemonOptions::default())
}

/// The byte range of `count` sectors from sector `first` in a buffer.
fn bytes_of((first, count): (u64, u32)) -> std::ops::Range<usize> {
    first as usize * SECTOR_BYTES..(first as usize + count as usize) * SECTOR_BYTES
}

/// A Linux guest's FLUSH has only a header and a status. A server that loops over data descriptors does nothing (T1).
#[test]
fn a_flush_of_two_descriptors_reaches_the_image() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for round in 0..20 {
        let sector = 64 * round;
        let bytes = pattern(round + 1, sector, 4096);
        session.write(sector, &bytes);
        session.flush();
        let found = daemon.image_bytes(sector * SECTOR_BYTES as u64, bytes.len());
        assert!(found == bytes, "round {round}: the image holds the flushed data");
    }
}

#[test]
fn the_used_length_counts_what_was_written() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(1, 8, 4096);
    let expected = [
        (VIRTIO_BLK_T_OUT, 8, Payload::Send(&bytes), 1),
        (VIRTIO_BLK_T_IN, 8, Payload::Receive(4096), 4097),
        (VIRTIO_BLK_T_IN, 8, Payload::Receive(512), 513),
        (VIRTIO_BLK_T_FLUSH, 0, Payload::Empty, 1),
        (VIRTIO_BLK_T_GET_ID, 0, Payload::Receive(SERIAL_BYTES), SERIAL_BYTES as u32 + 1),
        (77, 0, Payload::Empty, 1),
    ];
    for (kind, sector, payload, len) in expected {
        let outcome = session.run(0, kind, sector, payload);
        assert_eq!(outcome.used_len, len, "used length of request type {kind}");
    }
}

/// GET_ID pads the serial with NULs to 20 bytes, writes nothing after them, and does not write past a shorter buffer
/// (T9, T14).
#[test]
fn a_serial_is_padded_and_never_overruns_its_buffer() {
    const OLD: u8 = 0xcc;
    for serial in ["short", "exactly-20-bytes-abc"] {
        let options = DaemonOptions { serial, ..DaemonOptions::default() };
        let mut daemon = Daemon::start("requests", IMAGE_BYTES, &options);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        let mut expected = serial.as_bytes().to_vec();
        expected.resize(SERIAL_BYTES, 0);

        for room in [SERIAL_BYTES, 64] {
            let pending = session.submit(0, VIRTIO_BLK_T_GET_ID, 0, Payload::Receive(room));
            session.memory.write(pending.data, &vec![OLD; room]);
            session.rings[0].notify();
            let used = session.wait_for(0, 1)[&pending.head];
            let outcome = session.outcome(&pending, used);
            assert_eq!(outcome.status, OK, "GET_ID into {room} bytes");
            assert_eq!(outcome.data[..SERIAL_BYTES], expected, "GET_ID into {room} bytes");
            assert!(
                outcome.data[SERIAL_BYTES..].iter().all(|&byte| byte == OLD),
                "bytes after the serial are unchanged"
            );
        }

        // A buffer shorter than the specification requires: the device may truncate or fail, but must not write past
        // it.
        let pending = session.submit(0, VIRTIO_BLK_T_GET_ID, 0, Payload::Receive(8));
        let after = session.memory.alloc_in(1, 64, 1);
        session.memory.write(after, &[OLD; 64]);
        session.rings[0].notify();
        let used = session.wait_for(0, 1)[&pending.head];
        let outcome = session.outcome(&pending, used);
        let truncated = outcome.status == OK && outcome.data == expected[..8];
        assert!(truncated || outcome.status == IOERR || outcome.status == UNSUPP, "{outcome:?}");
        assert_eq!(session.memory.read(after, 64), [OLD; 64], "bytes after the buffer are unchanged");

        let outcome = session.run(0, VIRTIO_BLK_T_GET_ID, 0, Payload::Empty);
        assert!(outcome.status == IOERR || outcome.status == UNSUPP, "GET_ID without a buffer: {outcome:?}");
        daemon.assert_alive();
    }
}

#[test]
fn a_read_only_disk_rejects_every_write() {
    let directory = TempDir::new("requests");
    let before = pattern(9, 0, 1 << 20);
    std::fs::write(directory.path().join("image"), &before).expect("an image can be written");
    let options = DaemonOptions { read_only: true, ..DaemonOptions::default() };
    let mut daemon = Daemon::start_in(directory, &options);
    // The driver does not accept RO: the device must reject writes anyway.
    let mut session = Session::open(&daemon.socket(), &SessionOptions::without(&[VIRTIO_BLK_F_RO]));
    assert_ne!(session.offered & feature(VIRTIO_BLK_F_RO), 0, "RO is offered");

    let bytes = pattern(1, 0, 4096);
    let (whole, unmapped) = (range(0, 8, 0), range(0, 8, UNMAP));
    for (name, kind, payload) in [
        ("OUT", VIRTIO_BLK_T_OUT, Payload::Send(&bytes)),
        ("DISCARD", VIRTIO_BLK_T_DISCARD, Payload::Send(&whole)),
        ("WRITE_ZEROES", VIRTIO_BLK_T_WRITE_ZEROES, Payload::Send(&whole)),
        ("WRITE_ZEROES with unmap", VIRTIO_BLK_T_WRITE_ZEROES, Payload::Send(&unmapped)),
    ] {
        let outcome = session.run(0, kind, 0, payload);
        assert!(outcome.status == IOERR || outcome.status == UNSUPP, "{name}: {outcome:?}");
        assert_eq!(session.read(0, 4096), before[..4096], "{name} changed the disk");
    }
    drop(session);
    daemon.stop();
    assert!(daemon.image_bytes(0, before.len()) == before, "the image is unchanged");
}

#[test]
fn write_zeroes_zeroes_exactly_its_range() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.has(VIRTIO_BLK_F_WRITE_ZEROES), "WRITE_ZEROES is offered");
    let mut bases = (0..).step_by(1024);
    for (first, count) in RANGES {
        for flags in [0, UNMAP] {
            let base = bases.next().expect("endless");
            let mut expected = pattern(base + 1, base, 256 * SECTOR_BYTES);
            session.write(base, &expected);
            assert_eq!(session.write_zeroes(&[range(base + first, count, flags)]), OK, "{first}+{count} {flags}");
            expected[bytes_of((first, count))].fill(0);
            let found = session.read(base, expected.len());
            assert!(found == expected, "sectors {first}+{count} with flags {flags}, read by the guest");
            session.flush();
            let found = daemon.image_bytes(base * SECTOR_BYTES as u64, expected.len());
            assert!(found == expected, "sectors {first}+{count} with flags {flags}, on the image");
        }
    }
}

#[test]
fn a_discard_changes_nothing_outside_its_range() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.has(VIRTIO_BLK_F_DISCARD), "DISCARD is offered");
    for ((first, count), base) in RANGES.into_iter().zip((0..).step_by(1024)) {
        let bytes = pattern(base + 1, base, 256 * SECTOR_BYTES);
        session.write(base, &bytes);
        assert_eq!(session.discard(&[range(base + first, count, 0)]), OK, "discard of {first}+{count}");
        session.flush();
        let discarded = bytes_of((first, count));
        let found = session.read(base, bytes.len());
        assert!(found[..discarded.start] == bytes[..discarded.start], "before a discard of {first}+{count}");
        assert!(found[discarded.end..] == bytes[discarded.end..], "after a discard of {first}+{count}");
        // A discarded range can be written again.
        session.write(base + first, &bytes[discarded]);
        assert!(session.read(base, bytes.len()) == bytes, "a rewrite of {first}+{count}");
    }
}

/// fstrim frees all free space at a time. The daemon executes a large discard in parts.
#[test]
fn a_discard_of_the_advertised_maximum_succeeds() {
    const DISK_BYTES: u64 = 4 << 30;
    let daemon = Daemon::start("requests", DISK_BYTES, &DaemonOptions::default());
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let (max, alignment) =
        (session.config_u32(CONFIG_MAX_DISCARD_SECTORS), session.config_u32(CONFIG_DISCARD_ALIGNMENT));
    assert!(u64::from(max) * SECTOR_BYTES as u64 >= 1 << 30, "{max} sectors at a time");
    assert!(alignment > 0 && max.is_multiple_of(alignment), "{max} sectors are a multiple of {alignment}");
    // Around the borders of what is discarded, and within: on the image, and in memory only.
    let (first, end) = (u64::from(alignment), u64::from(alignment) + 2 * u64::from(max));
    let sectors: Vec<u64> = [first - 8, first, first + 8, end - 8, end]
        .into_iter()
        .chain((1..32).map(|n| first + n * u64::from(max) / 16))
        .collect();
    for (nth, &sector) in sectors.iter().enumerate() {
        session.write(sector, &pattern(3, sector, 4096));
        if nth % 2 == 0 {
            session.flush();
        }
    }
    assert_eq!(session.discard(&[range(first, max, 0), range(first + u64::from(max), max, 0)]), OK);
    for &sector in &sectors {
        let found = session.read(sector, 4096);
        if (first..end).contains(&sector) {
            assert!(found.iter().all(|&byte| byte == 0), "sector {sector} is discarded: a file reads as zeros");
        } else {
            assert!(found == pattern(3, sector, 4096), "sector {sector} is kept");
        }
    }
    assert_eq!(session.discard(&[range(0, max + 1, 0)]), IOERR, "more than the disk allows");
}

/// virtio 1.2, section 5.2.6.2: unknown flags, and unmap in a discard, give UNSUPP; a range outside the disk gives
/// IOERR.
#[test]
fn a_request_with_an_invalid_range_changes_nothing() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(2, 0, 64 * SECTOR_BYTES);
    session.write(0, &bytes);
    let capacity = session.capacity_sectors();

    assert_eq!(session.discard(&[range(0, 8, UNMAP)]), UNSUPP, "discard with unmap");
    assert_eq!(session.discard(&[range(0, 8, 1 << 7)]), UNSUPP, "discard with an unknown flag");
    assert_eq!(session.write_zeroes(&[range(0, 8, 1 << 31)]), UNSUPP, "write-zeroes with an unknown flag");
    for (name, bad) in [
        ("across the end", range(capacity - 4, 8, 0)),
        ("past the end", range(capacity + 1, 8, 0)),
        ("overflowing", range(u64::MAX - 3, 8, 0)),
        ("overflowing in bytes", range(1 << 55, 8, 0)),
        ("of all sectors there can be", range(8, u32::MAX, 0)),
    ] {
        assert_eq!(session.discard(&[bad]), IOERR, "discard {name}");
        assert_eq!(session.write_zeroes(&[bad]), IOERR, "write-zeroes {name}");
    }
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let outcome = session.run(0, kind, 0, Payload::Empty);
        assert_ne!(outcome.status, OK, "request type {kind} without a range");
    }
    assert!(session.read(0, bytes.len()) == bytes, "the disk is unchanged");
}

/// The sector in the header of a discard is reserved (section 5.2.6): it may have any value.
#[test]
fn a_discard_ignores_the_sector_in_its_header() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    // 32 ranges take 512 bytes, as one sector of data would.
    let ranges: Vec<u8> = (0..32).flat_map(|n| range(16 * n, 8, 0)).collect();
    let in_flight: Vec<_> =
        (0..4).map(|_| session.submit(0, VIRTIO_BLK_T_DISCARD, u64::MAX, Payload::Send(&ranges))).collect();
    session.rings[0].notify();
    session.wait_for(0, in_flight.len());
    for pending in in_flight {
        assert_eq!(session.memory.byte(pending.status), OK);
    }
}

#[test]
fn every_range_of_a_request_is_processed() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for (name, field) in [("discard", CONFIG_MAX_DISCARD_SEG), ("write-zeroes", CONFIG_MAX_WRITE_ZEROES_SEG)] {
        let most = session.config_u32(field);
        assert!(most >= 1, "{name} allows at least one range");
        let count = most.min(16);
        let ranges: Vec<[u8; 16]> = (0..u64::from(count)).map(|n| range(16 * n + 3, 5, 0)).collect();
        let mut expected = pattern(6, 0, 16 * count as usize * SECTOR_BYTES);
        session.write(0, &expected);
        let status = if name == "discard" { session.discard(&ranges) } else { session.write_zeroes(&ranges) };
        assert_eq!(status, OK, "{name} of {count} ranges");
        let found = session.read(0, expected.len());
        for n in 0..u64::from(count) {
            let hole = bytes_of((16 * n + 3, 5));
            if name == "write-zeroes" {
                expected[hole].fill(0);
            } else {
                expected[hole.clone()].copy_from_slice(&found[hole]);
            }
        }
        assert!(found == expected, "{name} of {count} ranges");
    }
    // One invalid range among valid ones fails the request.
    if session.config_u32(CONFIG_MAX_WRITE_ZEROES_SEG) >= 2 {
        let bad = range(session.capacity_sectors(), 1, 0);
        assert_ne!(session.write_zeroes(&[range(0, 1, 0), bad]), OK, "an invalid range among valid ones");
    }
}

/// The test sends more than 2^16 requests.
#[test]
fn a_ring_wraps_its_indices() {
    const BATCH: usize = 16;
    let daemon = start();
    let options = SessionOptions { queue_size: 64, ..SessionOptions::default() };
    let mut session = Session::open(&daemon.socket(), &options);
    let bytes = pattern(4, 0, 4096);
    session.write(0, &bytes);
    let (pending, segments) = session.prepare(VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
    for _ in 0..(1 << 16) / BATCH + 8 {
        // All requests of a batch use the same memory: they read the same data.
        for _ in 0..BATCH {
            session.rings[0].submit(&segments);
        }
        session.rings[0].notify();
        session.wait_for(0, BATCH);
        assert_eq!(session.memory.byte(pending.status), OK);
    }
    assert!(session.memory.read(pending.data, 4096) == bytes, "a read returns the written data");
}
