//! Descriptor chains: the device serves every legal layout and survives every invalid one.

use vhost::VhostBackend;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::common::SECTOR_BYTES;
use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::guest_memory::{HIGH_GUEST_ADDR, LOW_GUEST_ADDR};
use crate::common::raw_ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, Ring, Segment};
use crate::common::request::{OK, Payload, STATUS_UNTOUCHED, assert_serves, header, pattern};
use crate::common::session::{Session, SessionOptions};
use crate::common::wait::{ABSENCE, TIMEOUT, poll_until, try_poll};
use crate::{IMAGE_BYTES, SPARE_SECTOR};

/// A guest address in no region.
const UNMAPPED: u64 = 0x4000_0000_0000;

/// A request type that virtio does not define.
const UNKNOWN_TYPE: u32 = 99;

fn start() -> Daemon {
    Daemon::start("chains", IMAGE_BYTES, &DaemonOptions::default())
}

/// Splits a buffer after `at` bytes.
fn split(segment: Segment, at: u32) -> [Segment; 2] {
    let rest = Segment { addr: segment.addr + u64::from(at), len: segment.len - at, ..segment };
    [Segment { len: at, ..segment }, rest]
}

/// Writes and reads the same sectors with chains that `submit` builds from a request's classic segments (header, data,
/// status), and checks the data.
#[track_caller]
fn write_and_read_back(session: &mut Session, name: &str, sector: u64, submit: impl Fn(&mut Ring, &[Segment]) -> u16) {
    let bytes = pattern(sector + 1, sector, 4096);
    let mut run = |kind, payload| {
        let (pending, segments) = session.prepare(kind, sector, payload);
        let head = submit(&mut session.rings[0], &segments);
        session.rings[0].notify();
        let used = session.rings[0]
            .try_wait_used(TIMEOUT)
            .unwrap_or_else(|| panic!("{name}: request type {kind} never completes"));
        assert_eq!(used.head, head, "{name}");
        let outcome = session.outcome(&pending, used);
        assert_eq!(outcome.status, OK, "{name}: request type {kind}");
        outcome.data
    };
    run(VIRTIO_BLK_T_OUT, Payload::Send(&bytes));
    let found = run(VIRTIO_BLK_T_IN, Payload::Receive(bytes.len()));
    assert!(found == bytes, "{name}: a read returns the written data");
}

#[test]
fn every_legal_layout_is_served() {
    let mut daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.assert_offers_modern_features();
    let mut sectors = (0..).step_by(8);
    let mut check = |name: &str, submit: &dyn Fn(&mut Ring, &[Segment]) -> u16| {
        write_and_read_back(&mut session, name, sectors.next().expect("endless"), submit);
    };

    check("direct", &|ring, segments| ring.submit(segments));
    check("indirect", &|ring, segments| ring.submit_indirect(segments));
    for direct in 1..3 {
        check(&format!("{direct} direct, then indirect"), &|ring, segments| {
            ring.submit_mixed(&segments[..direct], &segments[direct..])
        });
    }
    for at in 1..16 {
        let cut = |segments: &[Segment]| [&split(segments[0], at)[..], &segments[1..]].concat();
        check(&format!("header cut after {at} bytes"), &|ring, segments| ring.submit(&cut(segments)));
        check(&format!("indirect, header cut after {at} bytes"), &|ring, segments| {
            ring.submit_indirect(&cut(segments))
        });
    }
    for at in [1, 511, 512, 513, 4095] {
        check(&format!("data cut after {at} bytes"), &|ring, segments| {
            ring.submit(&[&segments[..1], &split(segments[1], at)[..], &segments[2..]].concat())
        });
    }
    check("data in 64 pieces", &|ring, segments| {
        let piece = |at: u32| Segment { addr: segments[1].addr + u64::from(at) * 64, len: 64, ..segments[1] };
        let pieces: Vec<Segment> = (0..64).map(piece).collect();
        ring.submit(&[&segments[..1], &pieces, &segments[2..]].concat())
    });
    daemon.assert_alive();
}

/// Header and data of a write, or data and status of a read, may share a descriptor: the device must not make
/// assumptions about message framing (virtio 1.2, section 2.7.4).
#[test]
fn descriptors_may_cross_header_data_and_status() {
    const DATA_BYTES: u32 = SECTOR_BYTES as u32;
    let mut daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(1, 40, SECTOR_BYTES);

    let joined = session.memory.alloc(16 + SECTOR_BYTES, 16);
    session.memory.write(joined, &[&header(VIRTIO_BLK_T_OUT, 40)[..], &bytes].concat());
    let status = session.memory.alloc(1, 1);
    session.memory.write(status, &[STATUS_UNTOUCHED]);
    session.rings[0].submit(&[Segment::readable(joined, 16 + DATA_BYTES), Segment::writable(status, 1)]);
    session.rings[0].notify();
    session.rings[0].wait_used(TIMEOUT);
    assert_eq!(session.memory.byte(status), OK, "header and data in one descriptor");

    let head = session.memory.alloc(16, 16);
    session.memory.write(head, &header(VIRTIO_BLK_T_IN, 40));
    let joined = session.memory.alloc(SECTOR_BYTES + 1, 16);
    session.memory.write(joined, &[STATUS_UNTOUCHED; SECTOR_BYTES + 1]);
    session.rings[0].submit(&[Segment::readable(head, 16), Segment::writable(joined, DATA_BYTES + 1)]);
    session.rings[0].notify();
    let used = session.rings[0].wait_used(TIMEOUT);
    assert_eq!(used.len, DATA_BYTES + 1, "the used length covers data and status");
    assert_eq!(session.memory.read(joined, SECTOR_BYTES), bytes, "data and status in one descriptor");
    assert_eq!(session.memory.byte(joined + u64::from(DATA_BYTES)), OK, "the status is the last byte");
    daemon.assert_alive();
}

/// An invalid request: type, sector, and the segments between header and status.
type Invalid = fn(&mut Session) -> (u32, u64, Vec<Segment>);

/// Allocates a valid data buffer.
fn buffer(session: &Session, len: usize) -> u64 {
    session.memory.alloc_in(1, len, 16)
}

const INVALID: &[(&str, Invalid)] = &[
    ("an unknown type", |_| (UNKNOWN_TYPE, 0, vec![])),
    ("an unknown type with data", |s| (UNKNOWN_TYPE, 0, vec![Segment::writable(buffer(s, 512), 512)])),
    ("GET_ID without data", |_| (VIRTIO_BLK_T_GET_ID, 0, vec![])),
    ("a read into unmapped memory", |_| (VIRTIO_BLK_T_IN, 0, vec![Segment::writable(UNMAPPED, 4096)])),
    ("a write from unmapped memory", |_| (VIRTIO_BLK_T_OUT, 0, vec![Segment::readable(UNMAPPED, 4096)])),
    ("a read across the end of a region", |s| {
        let end = HIGH_GUEST_ADDR + s.memory.regions()[1].len;
        (VIRTIO_BLK_T_IN, 0, vec![Segment::writable(end - 512, 4096)])
    }),
    ("an address that wraps", |_| (VIRTIO_BLK_T_IN, 0, vec![Segment::writable(u64::MAX - 511, 4096)])),
    ("a length of 4 GiB", |_| (VIRTIO_BLK_T_OUT, 0, vec![Segment::readable(LOW_GUEST_ADDR, 0xffff_fe00)])),
    ("a write of half a sector", |s| (VIRTIO_BLK_T_OUT, 0, vec![Segment::readable(buffer(s, 256), 256)])),
    ("a read of a sector and a byte", |s| (VIRTIO_BLK_T_IN, 0, vec![Segment::writable(buffer(s, 513), 513)])),
    ("a write across the end of the disk", |s| {
        (VIRTIO_BLK_T_OUT, s.capacity_sectors() - 1, vec![Segment::readable(buffer(s, 1024), 1024)])
    }),
    ("a read past the end of the disk", |s| {
        (VIRTIO_BLK_T_IN, s.capacity_sectors(), vec![Segment::writable(buffer(s, 512), 512)])
    }),
    ("a sector number that overflows", |s| {
        (VIRTIO_BLK_T_OUT, u64::MAX, vec![Segment::readable(buffer(s, 1024), 1024)])
    }),
    ("a sector number whose byte offset overflows", |s| {
        (VIRTIO_BLK_T_OUT, 1 << 55, vec![Segment::readable(buffer(s, 512), 512)])
    }),
    ("a discard of half a range", |s| (VIRTIO_BLK_T_DISCARD, 0, vec![Segment::readable(buffer(s, 8), 8)])),
    ("a write-zeroes with an unmapped range", |_| {
        (VIRTIO_BLK_T_WRITE_ZEROES, 0, vec![Segment::readable(UNMAPPED, 16)])
    }),
];

/// The request completes with an error status, and the disk is unchanged (T11, T22).
#[test]
fn an_invalid_request_gets_an_error_status() {
    let mut daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let before = pattern(3, 0, 4096);
    session.write(0, &before);
    for (name, invalid) in INVALID {
        let (kind, sector, data) = invalid(&mut session);
        let (pending, classic) = session.prepare(kind, sector, Payload::Empty);
        let head = session.rings[0].submit(&[&classic[..1], &data, &classic[1..]].concat());
        session.rings[0].notify();
        let used =
            session.rings[0].try_wait_used(TIMEOUT).unwrap_or_else(|| panic!("{name}: the request never completes"));
        assert_eq!(used.head, head, "{name}");
        let status = session.memory.byte(pending.status);
        assert_ne!(status, STATUS_UNTOUCHED, "{name}: the status was written");
        assert_ne!(status, OK, "{name}: the request failed");
        if kind == UNKNOWN_TYPE {
            assert_eq!(u32::from(status), VIRTIO_BLK_S_UNSUPP, "{name}");
        }
        assert_eq!(session.read(0, before.len()), before, "{name}: the disk is unchanged");
        daemon.assert_alive();
    }
}

/// A hostile chain that `submit` puts into the ring. If the device takes it for a write, it writes [`HOSTILE_DATA`] at
/// sector 0.
struct Hostile {
    name: &'static str,
    submit: fn(&mut Session),
}

/// The data of hostile writes.
const HOSTILE_DATA: [u8; SECTOR_BYTES] = [0xee; SECTOR_BYTES];

/// The descriptors of a valid write: header, data, status.
fn valid_write(session: &Session) -> Vec<Descriptor> {
    let (_, segments) = session.prepare(VIRTIO_BLK_T_OUT, 0, Payload::Send(&HOSTILE_DATA));
    Ring::table_of(&segments)
}

/// Makes a chain available that starts with `descriptor` in slot 0.
fn publish_first(session: &mut Session, descriptor: Descriptor) {
    session.rings[0].write_descriptor(0, descriptor);
    session.rings[0].publish(0);
}

/// Makes an indirect chain available whose descriptor gives `len` as the table's length.
fn publish_table(session: &mut Session, table: &[Descriptor], len: u32) {
    let addr = session.rings[0].write_table(table);
    publish_first(session, Descriptor { addr, len, flags: DESC_INDIRECT, next: 0 });
}

/// Makes a write available, as an indirect table, that `change` has made invalid.
fn publish_changed(session: &mut Session, change: impl Fn(&mut [Descriptor])) {
    let mut table = valid_write(session);
    change(&mut table);
    publish_table(session, &table, 48);
}

const HOSTILE: &[Hostile] = &[
    Hostile {
        name: "a chain that loops",
        submit: |session| {
            let table = valid_write(session);
            session.rings[0].write_descriptor(1, Descriptor { next: 0, flags: DESC_NEXT, ..table[1] });
            publish_first(session, Descriptor { next: 1, ..table[0] });
        },
    },
    Hostile {
        name: "a descriptor that is its own next",
        submit: |session| {
            let table = valid_write(session);
            publish_first(session, Descriptor { next: 0, ..table[0] });
        },
    },
    Hostile {
        name: "next outside the table",
        submit: |session| {
            let table = valid_write(session);
            publish_first(session, Descriptor { next: 0xfff0, ..table[0] });
        },
    },
    Hostile { name: "head outside the table", submit: |session| session.rings[0].publish(0xfff0) },
    Hostile {
        name: "avail.idx ahead by more than the ring",
        submit: |session| {
            let ring = &session.rings[0];
            ring.set_avail_idx(ring.next_avail().wrapping_add(ring.size() + 1));
        },
    },
    Hostile {
        name: "avail.idx going backwards",
        submit: |session| {
            let ring = &session.rings[0];
            ring.set_avail_idx(ring.next_avail().wrapping_sub(1));
        },
    },
    Hostile {
        name: "an indirect table of 17 bytes",
        submit: |session| {
            let table = valid_write(session);
            publish_table(session, &table, 17);
        },
    },
    Hostile {
        name: "an empty indirect table",
        submit: |session| {
            let table = valid_write(session);
            publish_table(session, &table, 0);
        },
    },
    Hostile {
        name: "an unmapped indirect table",
        submit: |session| {
            publish_first(session, Descriptor { addr: UNMAPPED, len: 48, flags: DESC_INDIRECT, next: 0 });
        },
    },
    Hostile {
        name: "an indirect table in an indirect table",
        submit: |session| {
            let inner = valid_write(session);
            let addr = session.rings[0].write_table(&inner);
            publish_table(session, &[Descriptor { addr, len: 48, flags: DESC_INDIRECT, next: 0 }], 16);
        },
    },
    Hostile {
        name: "an indirect descriptor with a next that loops",
        submit: |session| {
            let table = valid_write(session);
            // Only the header: the rest of the request would have to follow the descriptor that is its own next.
            let addr = session.rings[0].write_table(&table[..1]);
            let flags = DESC_INDIRECT | DESC_NEXT;
            publish_first(session, Descriptor { addr, len: 16, flags, next: 0 });
        },
    },
    Hostile {
        name: "an indirect table that loops",
        submit: |session| publish_changed(session, |table| table[1].next = 0),
    },
    Hostile {
        name: "an indirect table whose next leaves it",
        submit: |session| publish_changed(session, |table| table[1].next = 7),
    },
    Hostile {
        name: "a write-only header",
        submit: |session| publish_changed(session, |table| table[0].flags |= DESC_WRITE),
    },
    Hostile {
        name: "readable data after the status",
        submit: |session| {
            publish_changed(session, |table| {
                let (data, status) = (table[1], table[2]);
                table[1] = Descriptor { flags: DESC_WRITE | DESC_NEXT, next: 2, ..status };
                table[2] = Descriptor { flags: 0, next: 0, ..data };
            });
        },
    },
    Hostile { name: "a read-only status", submit: |session| publish_changed(session, |table| table[2].flags = 0) },
    Hostile { name: "an empty status", submit: |session| publish_changed(session, |table| table[2].len = 0) },
    Hostile {
        name: "an unmapped status",
        submit: |session| publish_changed(session, |table| table[2].addr = UNMAPPED),
    },
    Hostile {
        name: "a header of 8 bytes and nothing else",
        submit: |session| {
            let table = valid_write(session);
            publish_first(session, Descriptor { len: 8, flags: 0, next: 0, ..table[0] });
        },
    },
    Hostile {
        name: "an unmapped header",
        submit: |session| publish_changed(session, |table| table[0].addr = UNMAPPED),
    },
    Hostile {
        name: "only empty descriptors",
        submit: |session| {
            session.rings[0].submit(&[Segment::readable(LOW_GUEST_ADDR, 0); 4]);
        },
    },
];

/// A hostile chain may never complete, but the disk is unchanged, and the next front-end is served.
#[test]
fn hostile_chains_corrupt_no_data() {
    let mut daemon = start();
    let before = pattern(5, 0, 4096);
    Session::open(&daemon.socket(), &SessionOptions::default()).write(0, &before);
    for Hostile { name, submit } in HOSTILE {
        println!("{name}");
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        let served = session.rings[0].used_idx();
        submit(&mut session);
        session.rings[0].notify();
        // The chain may complete or not: only give the device the time to process it.
        try_poll(ABSENCE, || (session.rings[0].used_idx() != served).then_some(()));
        daemon.assert_alive();
        drop(session);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert!(session.read(0, before.len()) == before, "{name}: the disk is unchanged");
        drop(session);
        assert_serves(&daemon.socket(), SPARE_SECTOR);
    }
    daemon.assert_alive();
    daemon.stop();
}

/// A valid request with empty descriptors between its parts. The device may serve or fail it, but the
/// status must tell which.
#[test]
fn zero_length_descriptors_are_served_or_rejected() {
    let mut daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let (old, new) = (pattern(1, 0, 4096), pattern(2, 0, 4096));
    for indirect in [false, true] {
        session.write(0, &old);
        let (pending, classic) = session.prepare(VIRTIO_BLK_T_OUT, 0, Payload::Send(&new));
        let empty = Segment::readable(LOW_GUEST_ADDR, 0);
        let chain = [empty, classic[0], empty, classic[1], empty, classic[2]];
        let ring = &mut session.rings[0];
        if indirect {
            ring.submit_indirect(&chain);
        } else {
            ring.submit(&chain);
        }
        ring.notify();
        ring.wait_used(TIMEOUT);
        let status = session.memory.byte(pending.status);
        assert_ne!(status, STATUS_UNTOUCHED, "the status was written");
        let expected = if status == OK { &new } else { &old };
        assert!(&session.read(0, old.len()) == expected, "status {status} matches the disk");
    }
    daemon.assert_alive();
}

/// An indirect table with a length of 4 GiB that starts with a valid write. The device may serve or fail the write, but
/// must not read or allocate 4 GiB.
#[test]
fn the_daemon_survives_an_indirect_table_of_4_gib() {
    let mut daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let served = session.rings[0].used_idx();
    let table = valid_write(&session);
    publish_table(&mut session, &table, 0xffff_fff0);
    session.rings[0].notify();
    try_poll(ABSENCE, || (session.rings[0].used_idx() != served).then_some(()));
    drop(session);
    assert_serves(&daemon.socket(), SPARE_SECTOR);
    daemon.assert_alive();
}

/// A guest's memory may be shared in part, and a driver may be faulty: such a chain fails alone.
#[test]
fn a_chain_without_a_usable_status_byte_does_not_stop_its_ring() {
    let mut daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let old = pattern(1, 0, 4096);
    session.write(0, &old);
    let (_, segments) = session.prepare(VIRTIO_BLK_T_OUT, 0, Payload::Send(&[0xee; 4096]));
    let unmapped_status = Segment::writable(UNMAPPED, 1);
    let unmapped_header = Segment::readable(UNMAPPED, 16);
    let chains: [(&str, &[Segment], bool); 5] = [
        ("an unmapped status", &[segments[0], segments[1], unmapped_status], true),
        ("no status", &segments[..2], true),
        ("a status that wraps", &[segments[0], segments[1], Segment::writable(u64::MAX, 2)], true),
        ("an unmapped header and status", &[unmapped_header, segments[1], unmapped_status], false),
        ("an unmapped header and no status", &[unmapped_header], false),
    ];
    for (name, chain, completes) in chains {
        for round in 0..20 {
            // What completes keeps no room in the ring; what does not, keeps it: 20 times 3 and 20 of 128 descriptors.
            let head = session.rings[0].submit(chain);
            session.rings[0].notify();
            if completes {
                let used = session.rings[0].wait_used(TIMEOUT);
                assert_eq!((used.head, used.len), (head, 0), "{name}: nothing was written");
            }
            assert!(session.read(0, old.len()) == old, "{name}, round {round}: the ring goes on, and nothing changed");
        }
    }
    assert_eq!(session.rings[0].in_flight(), 40, "the driver must not take them for completed");
    let reports = || daemon.log().matches("reported once").count();
    poll_until("the report", TIMEOUT, || (reports() > 0).then_some(()));
    assert_eq!(reports(), 1, "{}", daemon.log());
    // They do not keep the ring from stopping.
    let base = session.stop_ring(0);
    session.set_up_ring(0, base);
    session.enable_ring(0, true);
    assert!(session.read(0, old.len()) == old);
    daemon.stop();
}

#[test]
fn a_broken_ring_does_not_stop_the_others() {
    let options = DaemonOptions { num_queues: 2, ..DaemonOptions::default() };
    let mut daemon = Daemon::start("chains", IMAGE_BYTES, &options);
    let options = SessionOptions { queues: 2, ..SessionOptions::default() };
    let mut session = Session::open(&daemon.socket(), &options);
    let error = EventFd::new(EFD_NONBLOCK).expect("an eventfd can be created");
    session.frontend.set_vring_err(1, &error).expect("SET_VRING_ERR");
    let broken = &session.rings[1];
    broken.set_avail_idx(broken.next_avail().wrapping_add(broken.size() + 1));
    broken.notify();
    for round in 0..50 {
        let bytes = pattern(round, 8 * round, 4096);
        session.write(8 * round, &bytes);
        assert_eq!(session.read(8 * round, 4096), bytes, "round {round}");
    }
    poll_until("the error descriptor", TIMEOUT, || error.read().ok());
    daemon.assert_alive();
}
