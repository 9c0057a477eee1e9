//! Guest memory that changes under running rings, and tables of it that are wrong.

use std::os::fd::RawFd;

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::IMAGE_BYTES;
use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::guest_memory::{GuestMemory, HIGH_GUEST_ADDR, LOW_GUEST_ADDR, Region};
use crate::common::raw_message::{self, FLAG_NEED_REPLY, Reply, number, vring_state};
use crate::common::raw_ring::Segment;
use crate::common::request::{OK, Payload, Pending, STATUS_UNTOUCHED, assert_serves, pattern};
use crate::common::session::{Session, SessionOptions};
use crate::common::wait::PATIENCE;

/// Bytes in each region of these tests.
const REGION_BYTES: u64 = 8 << 20;

/// Where a third region comes and goes.
const HOTPLUG_GUEST_ADDR: u64 = 0x2_0000_0000;

fn start() -> Daemon {
    Daemon::start("memory", IMAGE_BYTES, &DaemonOptions::default())
}

/// Low memory, high memory, and a third region for plugging in and out.
fn three_regions() -> GuestMemory {
    let starts = [LOW_GUEST_ADDR, HIGH_GUEST_ADDR, HOTPLUG_GUEST_ADDR];
    let regions = starts.into_iter().zip((0..).step_by(REGION_BYTES as usize));
    GuestMemory::new(regions.map(|(guest_addr, offset)| Region { guest_addr, offset, len: REGION_BYTES }).collect())
}

/// A session on three regions of which only the first two are shared yet.
fn open_with_two_of_three(daemon: &Daemon) -> Session {
    let features = SessionOptions::default().features;
    let mut session = Session::negotiate_with(&daemon.socket(), features, three_regions());
    session.frontend.set_mem_table(&session.memory.region_infos()[..2]).expect("SET_MEM_TABLE");
    session.add_ring(128);
    session.start_ring(0);
    session
}

/// T13, T16: QEMU sends a new table whenever memory is plugged or a device's window moves, with rings running.
#[test]
fn a_new_table_does_not_disturb_requests_in_flight() {
    const REQUESTS: u64 = 32;
    const REQUEST_BYTES: usize = 64 << 10;
    let daemon = start();
    let mut session = open_with_two_of_three(&daemon);
    let tables: [Vec<VhostUserMemoryRegionInfo>; 2] =
        [session.memory.region_infos(), session.memory.region_infos()[..2].to_vec()];
    for round in 0..16 {
        let kind = if round % 2 == 0 { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        // A read finds what the write before it left.
        let mark = round / 2 + 1;
        session.memory.free_all_in(1);
        let out: Vec<(u64, Pending)> = (0..REQUESTS)
            .map(|n| {
                let sector = (mark * REQUESTS + n) * 128;
                let bytes = pattern(mark, sector, REQUEST_BYTES);
                let receive = Payload::Receive(REQUEST_BYTES);
                let payload = if kind == VIRTIO_BLK_T_OUT { Payload::Send(&bytes) } else { receive };
                (sector, session.submit(0, kind, sector, payload))
            })
            .collect();
        session.rings[0].notify();
        session.frontend.set_mem_table(&tables[round as usize % 2]).expect("SET_MEM_TABLE with rings running");
        session.wait_for(0, out.len());
        for (sector, pending) in out {
            assert_eq!(session.memory.byte(pending.status), OK, "round {round}: sector {sector}");
            let found = session.memory.read(pending.data, REQUEST_BYTES);
            assert!(found == pattern(mark, sector, REQUEST_BYTES), "round {round}: sector {sector}");
        }
    }
}

/// ADD_MEM_REG and REM_MEM_REG: memory that is there is used; memory that is gone is not, whatever the guest says.
#[test]
fn regions_come_and_go() {
    let mut daemon = start();
    let mut session = open_with_two_of_three(&daemon);
    assert!(session.frontend.get_max_mem_slots().expect("GET_MAX_MEM_SLOTS") >= 8, "room for a VMM's regions");
    let third = session.memory.region_info(session.memory.regions()[2]);
    let bytes = pattern(7, 0, 4096);
    session.write(0, &bytes);
    for round in 0..10 {
        for plugged in [false, true] {
            if plugged {
                session.frontend.add_mem_region(&third).expect("ADD_MEM_REG");
            }
            session.memory.write(HOTPLUG_GUEST_ADDR, &[0; 4096]);
            let (pending, classic) = session.place(VIRTIO_BLK_T_IN, 0, Payload::Empty);
            let data = Segment::writable(HOTPLUG_GUEST_ADDR, 4096);
            session.rings[0].submit(&[classic[0], data, classic[1]]);
            session.rings[0].notify();
            session.rings[0].wait_used(PATIENCE);
            let status = session.memory.byte(pending.status);
            let found = session.memory.read(HOTPLUG_GUEST_ADDR, 4096);
            if plugged {
                assert_eq!(status, OK, "round {round}: a read into new memory");
                assert!(found == bytes, "round {round}: what was written is read");
                session.frontend.remove_mem_region(&third).expect("REM_MEM_REG");
            } else {
                assert!(status != OK && status != STATUS_UNTOUCHED, "round {round}: a read into absent memory");
                assert!(found.iter().all(|&byte| byte == 0), "round {round}: memory that was taken away is alone");
            }
        }
    }
    daemon.assert_alive();
}

/// A region that changes is taken away and added again, and the rings may lie in it. Meanwhile they stand where they stood.
#[test]
fn a_ring_whose_memory_went_goes_on_when_it_is_back() {
    let daemon = start();
    let mut session = open_with_two_of_three(&daemon);
    let of_rings = session.memory.region_info(session.memory.regions()[0]);
    for round in 0..6 {
        let bytes = pattern(round, round, 512);
        session.write(round, &bytes);
        session.frontend.remove_mem_region(&of_rings).expect("REM_MEM_REG");
        let restarts = round % 2 == 1;
        if restarts {
            assert_eq!(
                u64::from(session.stop_ring(0)),
                round * 2 + 1,
                "where a ring stands does not depend on its memory"
            );
        }
        session.frontend.add_mem_region(&of_rings).expect("ADD_MEM_REG");
        if restarts {
            session.start_ring(0);
        }
        assert!(session.read(round, 512) == bytes, "round {round}");
    }
}

/// A ring may lie where no memory is until it comes.
#[test]
fn a_ring_that_is_set_up_before_its_memory_is_served_when_that_comes() {
    let daemon = start();
    let features = SessionOptions::default().features;
    let mut session = Session::negotiate_with(&daemon.socket(), features, three_regions());
    let regions = session.memory.region_infos();
    session.frontend.set_mem_table(&regions).expect("SET_MEM_TABLE");
    session.add_ring(128);
    session.set_up_ring(0, 0);
    session.frontend.set_mem_table(&regions[1..]).expect("SET_MEM_TABLE");
    session.enable_ring(0, true);
    session.frontend.set_mem_table(&regions).expect("SET_MEM_TABLE");
    session.write(0, &pattern(1, 0, 512));
    assert!(session.read(0, 512) == pattern(1, 0, 512));
}

/// A front-end that shares every region with ADD_MEM_REG and never sends a table.
#[test]
fn memory_can_be_shared_region_by_region() {
    let daemon = start();
    let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
    for region in session.memory.region_infos().iter().rev() {
        session.frontend.add_mem_region(region).expect("ADD_MEM_REG");
    }
    session.add_ring(128);
    session.start_ring(0);
    let bytes = pattern(8, 0, 1 << 20);
    session.write(0, &bytes);
    assert!(session.read(0, bytes.len()) == bytes, "what was written is read");
}

/// The protocol does not say that a table is sorted by guest address.
#[test]
fn a_table_in_any_order_is_served() {
    let daemon = start();
    let features = SessionOptions::default().features;
    let memory = GuestMemory::new(vec![
        Region { guest_addr: HIGH_GUEST_ADDR, offset: REGION_BYTES, len: REGION_BYTES },
        Region { guest_addr: LOW_GUEST_ADDR, offset: 0, len: REGION_BYTES },
    ]);
    let mut session = Session::negotiate_with(&daemon.socket(), features, memory);
    session.share_memory();
    session.add_ring(128);
    session.start_ring(0);
    let bytes = pattern(9, 0, 1 << 20);
    session.write(0, &bytes);
    assert!(session.read(0, bytes.len()) == bytes, "what was written is read");
}

/// Data may lie over the seam of two regions that are neighbours in the guest and strangers in the host.
#[test]
fn a_segment_may_span_neighbouring_regions() {
    let daemon = start();
    let features = SessionOptions::default().features;
    // The offsets are the wrong way round: one mapping of both would not do.
    let seam = LOW_GUEST_ADDR + REGION_BYTES;
    let memory = GuestMemory::new(vec![
        Region { guest_addr: LOW_GUEST_ADDR, offset: REGION_BYTES, len: REGION_BYTES },
        Region { guest_addr: seam, offset: 0, len: REGION_BYTES },
    ]);
    let mut session = Session::negotiate_with(&daemon.socket(), features, memory);
    session.share_memory();
    session.add_ring(128);
    session.start_ring(0);
    let bytes = pattern(10, 0, 8192);
    let half = bytes.len() / 2 - 100;
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN] {
        let (pending, classic) = session.place(kind, 0, Payload::Empty);
        let start = seam - half as u64;
        let segment = Segment { addr: start, len: bytes.len() as u32, writable: kind == VIRTIO_BLK_T_IN };
        if kind == VIRTIO_BLK_T_OUT {
            session.memory.write(start, &bytes[..half]);
            session.memory.write(seam, &bytes[half..]);
        } else {
            session.memory.write(start, &vec![0; half]);
            session.memory.write(seam, &vec![0; bytes.len() - half]);
        }
        session.rings[0].submit(&[classic[0], segment, classic[1]]);
        session.rings[0].notify();
        session.rings[0].wait_used(PATIENCE);
        assert_eq!(session.memory.byte(pending.status), OK, "request type {kind}");
        let found = [session.memory.read(start, half), session.memory.read(seam, bytes.len() - half)].concat();
        assert!(found == bytes, "request type {kind}");
    }
}

/// The body of a SET_MEM_TABLE that claims `claimed` regions.
fn table_body(claimed: u32, regions: &[VhostUserMemoryRegionInfo]) -> Vec<u8> {
    let mut body = [claimed.to_le_bytes(), [0; 4]].concat();
    for region in regions {
        for word in [region.guest_phys_addr, region.memory_size, region.userspace_addr, region.mmap_offset] {
            body.extend_from_slice(&word.to_le_bytes());
        }
    }
    body
}

/// The body of an ADD_MEM_REG.
fn region_body(region: &VhostUserMemoryRegionInfo) -> Vec<u8> {
    [&[0; 8][..], &table_body(0, std::slice::from_ref(region))[8..]].concat()
}

/// A message that no daemon can do as asked, and the descriptors that come with it.
type Refused = fn(&Session) -> (u32, Vec<u8>, Vec<RawFd>);

const REFUSED: &[(&str, Refused)] = &[
    ("GET_VRING_BASE of ring 4000", |_| (number::GET_VRING_BASE, vring_state(4000, 0), vec![])),
    ("SET_VRING_NUM of ring 4000", |_| (number::SET_VRING_NUM, vring_state(4000, 128), vec![])),
    ("SET_VRING_BASE of ring 4000", |_| (number::SET_VRING_BASE, vring_state(4000, 0), vec![])),
    ("SET_VRING_ENABLE of ring 4000", |_| (number::SET_VRING_ENABLE, vring_state(4000, 1), vec![])),
    ("SET_VRING_NUM of a million entries", |_| (number::SET_VRING_NUM, vring_state(0, 1 << 20), vec![])),
    ("SET_VRING_ADDR of ring 4000", |_| {
        (number::SET_VRING_ADDR, [&vring_state(4000, 0)[..], &[0; 32]].concat(), vec![])
    }),
    ("SET_MEM_TABLE that claims 1000 regions", |s| {
        let infos = s.memory.region_infos();
        (number::SET_MEM_TABLE, table_body(1000, &infos), infos.iter().map(|info| info.mmap_handle).collect())
    }),
    ("SET_MEM_TABLE without descriptors", |s| (number::SET_MEM_TABLE, table_body(2, &s.memory.region_infos()), vec![])),
    ("SET_MEM_TABLE of regions that overlap", |s| {
        let first = s.memory.region_infos()[0];
        let second = VhostUserMemoryRegionInfo { guest_phys_addr: first.guest_phys_addr + 4096, ..first };
        (number::SET_MEM_TABLE, table_body(2, &[first, second]), vec![first.mmap_handle; 2])
    }),
    ("SET_MEM_TABLE of a region that wraps", |s| {
        let info = VhostUserMemoryRegionInfo { guest_phys_addr: u64::MAX - 4095, ..s.memory.region_infos()[0] };
        (number::SET_MEM_TABLE, table_body(1, &[info]), vec![info.mmap_handle])
    }),
    ("SET_MEM_TABLE of a region without bytes", |s| {
        let info = VhostUserMemoryRegionInfo { memory_size: 0, ..s.memory.region_infos()[0] };
        (number::SET_MEM_TABLE, table_body(1, &[info]), vec![info.mmap_handle])
    }),
    ("ADD_MEM_REG of memory that is there", |s| {
        let info = s.memory.region_infos()[0];
        (number::ADD_MEM_REG, region_body(&info), vec![info.mmap_handle])
    }),
    ("SET_FEATURES of every bit", |_| (number::SET_FEATURES, u64::MAX.to_le_bytes().to_vec(), vec![])),
    ("a message that does not exist", |_| (200, vec![0; 8], vec![])),
];

/// T19. With REPLY_ACK, zero means done: a message that was refused is answered with something else, or with the end
/// of the session, and never costs the daemon its life.
#[test]
fn refused_messages_are_not_acknowledged() {
    let mut daemon = start();
    for (name, refused) in REFUSED {
        let session = Session::open(&daemon.socket(), &SessionOptions::default());
        let (number, body, fds) = refused(&session);
        let reply = raw_message::exchange(&session.socket, number, FLAG_NEED_REPLY, &body, &fds);
        assert_ne!(reply, Reply::Silent, "{name}: an answer was asked for");
        assert!(!reply.is_acknowledged(), "{name}: refused, and acknowledged as done");
        drop(session);
        daemon.assert_alive();
        assert_serves(&daemon.socket(), 0);
    }
}
