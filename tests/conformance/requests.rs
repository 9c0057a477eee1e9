//! Requests that are well formed: what each type must do, and what it must leave in guest memory.

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

/// Length of a serial number on the wire.
const SERIAL_BYTES: usize = 20;

/// Offsets in `struct virtio_blk_config`.
const CONFIG_MAX_DISCARD_SEG: u32 = 40;
const CONFIG_MAX_WRITE_ZEROES_SEG: u32 = 52;

/// First sector and count of ranges that begin and end within pages, within one page, and on pages' edges.
const RANGES: [(u64, u32); 5] = [(3, 1), (8, 8), (5, 20), (16, 64), (7, 121)];

fn start() -> Daemon {
    Daemon::start("requests", IMAGE_BYTES, &DaemonOptions::default())
}

/// The bytes that `count` sectors from sector `first` take in a buffer.
fn bytes_of((first, count): (u64, u32)) -> std::ops::Range<usize> {
    first as usize * SECTOR_BYTES..(first as usize + count as usize) * SECTOR_BYTES
}

/// A Linux guest's FLUSH has a header and a status and nothing between them. A server that does its work in a loop
/// over the data descriptors does none (T1).
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
        assert!(found == bytes, "round {round}: what was flushed is in the image");
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

/// GET_ID pads the serial with NULs to twenty bytes, writes nothing behind them, and writes none where the driver
/// gave it no room (T9, T14).
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
            assert!(outcome.data[SERIAL_BYTES..].iter().all(|&byte| byte == OLD), "nothing behind the serial");
        }

        // Less room than the specification demands: truncated or refused, but the bytes behind are not touched.
        let pending = session.submit(0, VIRTIO_BLK_T_GET_ID, 0, Payload::Receive(8));
        let behind = session.memory.alloc_in(1, 64, 1);
        session.memory.write(behind, &[OLD; 64]);
        session.rings[0].notify();
        let used = session.wait_for(0, 1)[&pending.head];
        let outcome = session.outcome(&pending, used);
        let truncated = outcome.status == OK && outcome.data == expected[..8];
        assert!(truncated || outcome.status == IOERR || outcome.status == UNSUPP, "{outcome:?}");
        assert_eq!(session.memory.read(behind, 64), [OLD; 64], "nothing behind the driver's room");

        let outcome = session.run(0, VIRTIO_BLK_T_GET_ID, 0, Payload::Empty);
        assert!(outcome.status == IOERR || outcome.status == UNSUPP, "GET_ID without room: {outcome:?}");
        daemon.assert_alive();
    }
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let directory = TempDir::new("requests");
    let before = pattern(9, 0, 1 << 20);
    std::fs::write(directory.path().join("image"), &before).expect("an image can be written");
    let options = DaemonOptions { read_only: true, ..DaemonOptions::default() };
    let mut daemon = Daemon::start_in(directory, &options);
    // The driver claims not to know RO: the device must not rely on its goodwill.
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
        assert_eq!(session.read(0, 4096), before[..4096], "{name} changed nothing that a guest sees");
    }
    drop(session);
    daemon.stop();
    assert!(daemon.image_bytes(0, before.len()) == before, "nothing changed in the image");
}

#[test]
fn write_zeroes_gives_zeros_and_nothing_more() {
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
            assert!(found == expected, "sectors {first}+{count} with flags {flags}, as read");
            session.flush();
            let found = daemon.image_bytes(base * SECTOR_BYTES as u64, expected.len());
            assert!(found == expected, "sectors {first}+{count} with flags {flags}, in the image");
        }
    }
}

#[test]
fn discard_leaves_its_neighbours_alone() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.has(VIRTIO_BLK_F_DISCARD), "DISCARD is offered");
    for ((first, count), base) in RANGES.into_iter().zip((0..).step_by(1024)) {
        let bytes = pattern(base + 1, base, 256 * SECTOR_BYTES);
        session.write(base, &bytes);
        assert_eq!(session.discard(&[range(base + first, count, 0)]), OK, "discard of {first}+{count}");
        session.flush();
        let gone = bytes_of((first, count));
        let found = session.read(base, bytes.len());
        assert!(found[..gone.start] == bytes[..gone.start], "before a discard of {first}+{count}");
        assert!(found[gone.end..] == bytes[gone.end..], "behind a discard of {first}+{count}");
        // What was discarded can be written again.
        session.write(base + first, &bytes[gone]);
        assert!(session.read(base, bytes.len()) == bytes, "a rewrite of {first}+{count}");
    }
}

/// virtio 1.2, section 5.2.6.2: unknown flags, and unmap in a discard, are UNSUPP; a range outside the disk fails.
#[test]
fn ranges_that_are_wrong_are_refused_whole() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(2, 0, 64 * SECTOR_BYTES);
    session.write(0, &bytes);
    let capacity = session.capacity_sectors();

    assert_eq!(session.discard(&[range(0, 8, UNMAP)]), UNSUPP, "discard with unmap");
    assert_eq!(session.discard(&[range(0, 8, 1 << 7)]), UNSUPP, "discard with an unknown flag");
    assert_eq!(session.write_zeroes(&[range(0, 8, 1 << 31)]), UNSUPP, "write-zeroes with an unknown flag");
    for (name, bad) in [
        ("over the end", range(capacity - 4, 8, 0)),
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
    assert!(session.read(0, bytes.len()) == bytes, "nothing was changed");
}

/// The sector in the header of a discard is reserved (section 5.2.6): it may be anything.
#[test]
fn the_header_of_a_discard_has_no_sector() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    // So many that they would be a sector, were they data.
    let ranges: Vec<u8> = (0..32).flat_map(|n| range(16 * n, 8, 0)).collect();
    let out: Vec<_> =
        (0..4).map(|_| session.submit(0, VIRTIO_BLK_T_DISCARD, u64::MAX, Payload::Send(&ranges))).collect();
    session.rings[0].notify();
    session.wait_for(0, out.len());
    for pending in out {
        assert_eq!(session.memory.byte(pending.status), OK);
    }
}

#[test]
fn several_ranges_in_one_request_are_all_done() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for (name, field) in [("discard", CONFIG_MAX_DISCARD_SEG), ("write-zeroes", CONFIG_MAX_WRITE_ZEROES_SEG)] {
        let most = session.config_u32(field);
        assert!(most >= 1, "{name} takes at least one range");
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
    // One wrong range among good ones fails the request.
    if session.config_u32(CONFIG_MAX_WRITE_ZEROES_SEG) >= 2 {
        let bad = range(session.capacity_sectors(), 1, 0);
        assert_ne!(session.write_zeroes(&[range(0, 1, 0), bad]), OK, "a wrong range among good ones");
    }
}

/// More requests than a 16-bit index can count.
#[test]
fn a_ring_wraps_its_indices() {
    const BATCH: usize = 16;
    let daemon = start();
    let options = SessionOptions { queue_size: 64, ..SessionOptions::default() };
    let mut session = Session::open(&daemon.socket(), &options);
    let bytes = pattern(4, 0, 4096);
    session.write(0, &bytes);
    let (pending, segments) = session.place(VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
    for _ in 0..(1 << 16) / BATCH + 8 {
        // The same memory for all of a batch: they read the same bytes.
        for _ in 0..BATCH {
            session.rings[0].submit(&segments);
        }
        session.rings[0].notify();
        session.wait_for(0, BATCH);
        assert_eq!(session.memory.byte(pending.status), OK);
    }
    assert!(session.memory.read(pending.data, 4096) == bytes, "what was written is read");
}
