//! Guest memory that changes while rings run, and invalid memory tables.

use std::fs::{self, File};
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::IMAGE_BYTES;
use crate::common::daemon::{Daemon, DaemonOptions, TempDir, server_binary};
use crate::common::guest_memory::{GuestMemory, HIGH_GUEST_ADDR, LOW_GUEST_ADDR, Region};
use crate::common::raw_message::{self, FLAG_NEED_REPLY, Reply, number, vring_state};
use crate::common::raw_ring::{Ring, Segment};
use crate::common::request::{OK, Payload, Pending, STATUS_UNTOUCHED, assert_serves, pattern};
use crate::common::session::{Session, SessionOptions, ring_addresses};
use crate::common::wait::{ABSENCE, TIMEOUT, poll_until};

/// Size of each region in these tests.
const REGION_BYTES: u64 = 8 << 20;

/// Guest address of the region that is plugged and unplugged.
const HOTPLUG_GUEST_ADDR: u64 = 0x2_0000_0000;

fn start() -> Daemon {
    Daemon::start("memory", IMAGE_BYTES, &DaemonOptions::default())
}

/// Low memory, high memory, and a third region to plug and unplug.
fn three_regions() -> GuestMemory {
    let starts = [LOW_GUEST_ADDR, HIGH_GUEST_ADDR, HOTPLUG_GUEST_ADDR];
    let regions = starts.into_iter().zip((0..).step_by(REGION_BYTES as usize));
    GuestMemory::new(regions.map(|(guest_addr, offset)| Region { guest_addr, offset, len: REGION_BYTES }).collect())
}

/// A session with three regions, of which it shares only the first two.
fn open_with_two_of_three_regions(daemon: &Daemon) -> Session {
    let features = SessionOptions::default().features;
    let mut session = Session::negotiate_with(&daemon.socket(), features, three_regions());
    session.frontend.set_mem_table(&session.memory.region_infos()[..2]).expect("SET_MEM_TABLE");
    session.add_ring(128);
    session.start_ring(0);
    session
}

/// T13, T16: QEMU sends a new table when memory is plugged or a BAR moves, while rings run.
#[test]
fn a_new_memory_table_does_not_disturb_requests_in_flight() {
    const REQUESTS: u64 = 32;
    const REQUEST_BYTES: usize = 64 << 10;
    let daemon = start();
    let mut session = open_with_two_of_three_regions(&daemon);
    let tables: [Vec<VhostUserMemoryRegionInfo>; 2] =
        [session.memory.region_infos(), session.memory.region_infos()[..2].to_vec()];
    for round in 0..16 {
        let kind = if round % 2 == 0 { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        // A read round returns the data of the write round before it.
        let mark = round / 2 + 1;
        session.memory.free_all_in(1);
        let in_flight: Vec<(u64, Pending)> = (0..REQUESTS)
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
        session.wait_for(0, in_flight.len());
        for (sector, pending) in in_flight {
            assert_eq!(session.memory.byte(pending.status), OK, "round {round}: sector {sector}");
            let found = session.memory.read(pending.data, REQUEST_BYTES);
            assert!(found == pattern(mark, sector, REQUEST_BYTES), "round {round}: sector {sector}");
        }
    }
}

/// ADD_MEM_REG and REM_MEM_REG: the device uses a region that is added, and does not touch one that is removed.
#[test]
fn memory_regions_can_be_added_and_removed() {
    let mut daemon = start();
    let mut session = open_with_two_of_three_regions(&daemon);
    assert!(session.frontend.get_max_mem_slots().expect("GET_MAX_MEM_SLOTS") >= 8, "enough slots for a VMM");
    let third = session.memory.region_info(session.memory.regions()[2]);
    let bytes = pattern(7, 0, 4096);
    session.write(0, &bytes);
    for round in 0..10 {
        for plugged in [false, true] {
            if plugged {
                session.frontend.add_mem_region(&third).expect("ADD_MEM_REG");
            }
            session.memory.write(HOTPLUG_GUEST_ADDR, &[0; 4096]);
            let (pending, classic) = session.prepare(VIRTIO_BLK_T_IN, 0, Payload::Empty);
            let data = Segment::writable(HOTPLUG_GUEST_ADDR, 4096);
            session.rings[0].submit(&[classic[0], data, classic[1]]);
            session.rings[0].notify();
            session.rings[0].wait_used(TIMEOUT);
            let status = session.memory.byte(pending.status);
            let found = session.memory.read(HOTPLUG_GUEST_ADDR, 4096);
            if plugged {
                assert_eq!(status, OK, "round {round}: a read into new memory");
                assert!(found == bytes, "round {round}: a read returns the written data");
                session.frontend.remove_mem_region(&third).expect("REM_MEM_REG");
            } else {
                assert!(status != OK && status != STATUS_UNTOUCHED, "round {round}: a read into removed memory");
                assert!(found.iter().all(|&byte| byte == 0), "round {round}: removed memory is unchanged");
            }
        }
    }
    daemon.assert_alive();
}

/// A driver's own memory may be in a region that is shared late.
#[test]
fn a_chain_in_unshared_memory_completes_once_it_is_shared() {
    let daemon = start();
    let mut session = open_with_two_of_three_regions(&daemon);
    let third = session.memory.region_info(session.memory.regions()[2]);
    let bytes = pattern(7, 0, 4096);
    session.write(0, &bytes);
    let (pending, classic) = session.prepare(VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
    let (header, status) = (HOTPLUG_GUEST_ADDR, HOTPLUG_GUEST_ADDR + 16);
    let request = session.memory.read(classic[0].addr, 16);
    session.memory.write(header, &request);
    session.memory.write(status, &[STATUS_UNTOUCHED]);
    let head = session.rings[0].submit(&[Segment::readable(header, 16), classic[1], Segment::writable(status, 1)]);
    session.rings[0].notify();
    assert!(session.rings[0].try_wait_used(ABSENCE).is_none(), "its status would be old");
    session.frontend.add_mem_region(&third).expect("ADD_MEM_REG");
    let used = session.rings[0].wait_used(TIMEOUT);
    assert_eq!((used.head, session.memory.byte(status)), (head, OK));
    assert!(session.memory.read(pending.data, 4096) == bytes);
    let stopped = raw_message::exchange(&session.socket, number::GET_VRING_BASE, 0, &vring_state(0, 0), &[]);
    assert_eq!(stopped, Reply::Payload(vring_state(0, 2)), "the ring has nothing in flight, so it stops");
}

/// The page is not in the cache, so the write would have brought all of its bytes.
#[test]
fn a_write_from_unshared_memory_fails_without_changing_the_image() {
    let directory = TempDir::new("not-shared");
    let bytes = pattern(3, 0, 4096);
    let image = File::create(directory.path().join("image")).expect("an image");
    image.set_len(IMAGE_BYTES).and_then(|()| image.write_all_at(&bytes, 0)).expect("an image");
    let daemon = Daemon::start_by(directory, &[""], Command::new(server_binary()));
    let mut session = open_with_two_of_three_regions(&daemon);
    let (pending, classic) = session.prepare(VIRTIO_BLK_T_OUT, 0, Payload::Empty);
    session.rings[0].submit(&[classic[0], Segment::readable(HOTPLUG_GUEST_ADDR, 4096), classic[1]]);
    session.rings[0].notify();
    session.rings[0].wait_used(TIMEOUT);
    assert_ne!(session.memory.byte(pending.status), OK);
    assert!(session.read(0, 4096) == bytes);
}

/// A front-end changes a region by removing and adding it, and rings may lie in it. They keep their positions
/// meanwhile.
#[test]
fn a_ring_resumes_when_its_memory_is_added_again() {
    let daemon = start();
    let mut session = open_with_two_of_three_regions(&daemon);
    let of_rings = session.memory.region_info(session.memory.regions()[0]);
    for round in 0..6 {
        let bytes = pattern(round, round, 512);
        session.write(round, &bytes);
        session.frontend.remove_mem_region(&of_rings).expect("REM_MEM_REG");
        let restarts = round % 2 == 1;
        if restarts {
            assert_eq!(u64::from(session.stop_ring(0)), round * 2 + 1, "a ring keeps its position without its memory");
        }
        session.frontend.add_mem_region(&of_rings).expect("ADD_MEM_REG");
        if restarts {
            session.start_ring(0);
        }
        assert!(session.read(round, 512) == bytes, "round {round}");
    }
}

#[test]
fn a_ring_set_up_before_its_memory_starts_when_the_memory_is_shared() {
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

/// A front-end may share every region with ADD_MEM_REG, without SET_MEM_TABLE.
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
    assert!(session.read(0, bytes.len()) == bytes, "a read returns the written data");
}

/// The protocol does not require a table sorted by guest address.
#[test]
fn an_unsorted_memory_table_is_accepted() {
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
    assert!(session.read(0, bytes.len()) == bytes, "a read returns the written data");
}

/// A buffer may span two regions that are adjacent in guest memory and not in the daemon's address space.
#[test]
fn a_buffer_may_span_adjacent_regions() {
    let daemon = start();
    let features = SessionOptions::default().features;
    // The offsets are in reverse order: one mapping cannot cover both regions.
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
        let (pending, classic) = session.prepare(kind, 0, Payload::Empty);
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
        session.rings[0].wait_used(TIMEOUT);
        assert_eq!(session.memory.byte(pending.status), OK, "request type {kind}");
        let found = [session.memory.read(start, half), session.memory.read(seam, bytes.len() - half)].concat();
        assert!(found == bytes, "request type {kind}");
    }
}

/// The daemon's lines that say what to change.
fn advice(daemon: &Daemon) -> usize {
    daemon.log().matches("add share=on").count()
}

/// QEMU with share=off: what the guest writes would stay in QEMU.
#[test]
fn memory_that_is_mapped_privately_is_refused() {
    let daemon = start();
    let attempt = |flags| {
        let session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
        let mut info = session.memory.region_infos()[0];
        let file = File::open(format!("/proc/self/fd/{}", info.mmap_handle)).expect("a memfd can be opened again");
        let len = info.memory_size as usize;
        let mapping: MmapRegion =
            MmapRegion::build(Some(FileOffset::new(file, info.mmap_offset)), len, libc::PROT_READ, flags)
                .expect("a memfd can be mapped");
        info.userspace_addr = mapping.get_slice(0, 1).expect("it is mapped").ptr_guard().as_ptr().addr() as u64;
        session.frontend.set_mem_table(&[info]).is_ok()
    };
    assert!(attempt(libc::MAP_SHARED), "a shared mapping");
    assert_eq!(advice(&daemon), 0);
    for _ in 0..3 {
        assert!(!attempt(libc::MAP_PRIVATE), "a private mapping");
    }
    poll_until("the log's advice", TIMEOUT, || (advice(&daemon) == 1).then_some(()));
    assert_serves(&daemon.socket(), 0);
}

/// Where the front-end's mappings cannot be seen (another PID namespace): a guest that kicks for nothing, in memory
/// that was never written to.
#[test]
fn a_kick_in_blank_memory_is_reported_once() {
    let daemon = start();
    let reports = || daemon.log().matches("guest memory reads as zeros").count();
    let session = Session::open(&daemon.socket(), &SessionOptions::default());
    for _ in 0..3 {
        session.rings.iter().for_each(Ring::notify);
        poll_until("the report", TIMEOUT, || (reports() == 1).then_some(()));
    }
    drop(session);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.memory.write(LOW_GUEST_ADDR + 4096, &[1]);
    session.rings[0].notify();
    session.write(0, &pattern(1, 0, 512));
    assert_eq!(reports(), 1, "a kick for nothing of a guest that runs: {}", daemon.log());
}

/// QEMU without a memory backend shares nothing, and sets up its rings anyway; with reconnect=1 every second.
#[test]
fn rings_without_memory_are_refused_with_advice_once() {
    let daemon = start();
    let connected = || daemon.log().matches("front-end connected").count();
    for _ in 0..5 {
        let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
        session.add_ring(128);
        session.frontend.set_vring_num(0, 128).expect("SET_VRING_NUM");
        let addresses = ring_addresses(&session.rings[0]);
        session.frontend.set_vring_addr(0, &addresses).expect_err("the ring is in no memory");
    }
    poll_until("the advice", TIMEOUT, || (advice(&daemon) > 0).then_some(()));
    assert_eq!((connected(), advice(&daemon)), (1, 1), "{}", daemon.log());
    assert_serves(&daemon.socket(), 0);
    poll_until("the line of a front-end that works", TIMEOUT, || (connected() > 1).then_some(()));
    assert_eq!((connected(), advice(&daemon)), (2, 1), "{}", daemon.log());
}

/// The body of a SET_MEM_TABLE that declares `declared` regions.
fn table_body(declared: u32, regions: &[VhostUserMemoryRegionInfo]) -> Vec<u8> {
    let mut body = [declared.to_le_bytes(), [0; 4]].concat();
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

/// A message that the daemon must reject, with its descriptors.
type Rejected = fn(&Session) -> (u32, Vec<u8>, Vec<RawFd>);

const REJECTED: &[(&str, Rejected)] = &[
    ("GET_VRING_BASE of ring 4000", |_| (number::GET_VRING_BASE, vring_state(4000, 0), vec![])),
    ("SET_VRING_NUM of ring 4000", |_| (number::SET_VRING_NUM, vring_state(4000, 128), vec![])),
    ("SET_VRING_BASE of ring 4000", |_| (number::SET_VRING_BASE, vring_state(4000, 0), vec![])),
    ("SET_VRING_ENABLE of ring 4000", |_| (number::SET_VRING_ENABLE, vring_state(4000, 1), vec![])),
    ("SET_VRING_NUM of a million entries", |_| (number::SET_VRING_NUM, vring_state(0, 1 << 20), vec![])),
    ("SET_VRING_ADDR of ring 4000", |_| {
        (number::SET_VRING_ADDR, [&vring_state(4000, 0)[..], &[0; 32]].concat(), vec![])
    }),
    ("SET_MEM_TABLE that declares 1000 regions", |s| {
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
    ("SET_MEM_TABLE of an empty region", |s| {
        let info = VhostUserMemoryRegionInfo { memory_size: 0, ..s.memory.region_infos()[0] };
        (number::SET_MEM_TABLE, table_body(1, &[info]), vec![info.mmap_handle])
    }),
    ("SET_MEM_TABLE of a region whose user address wraps", |s| {
        let info = VhostUserMemoryRegionInfo { userspace_addr: u64::MAX - 4095, ..s.memory.region_infos()[0] };
        (number::SET_MEM_TABLE, table_body(1, &[info]), vec![info.mmap_handle])
    }),
    ("SET_MEM_TABLE of a region that is longer than its file", |s| {
        let whole = s.memory.region_infos()[0];
        let info = VhostUserMemoryRegionInfo { memory_size: whole.memory_size + (1 << 30), ..whole };
        (number::SET_MEM_TABLE, table_body(1, &[info]), vec![info.mmap_handle])
    }),
    ("ADD_MEM_REG of an existing region", |s| {
        let info = s.memory.region_infos()[0];
        (number::ADD_MEM_REG, region_body(&info), vec![info.mmap_handle])
    }),
    ("ADD_MEM_REG of a region that wraps", |s| {
        let info = VhostUserMemoryRegionInfo { guest_phys_addr: u64::MAX - 4095, ..s.memory.region_infos()[0] };
        (number::ADD_MEM_REG, region_body(&info), vec![info.mmap_handle])
    }),
    ("ADD_MEM_REG of a region whose user address wraps", |s| {
        let whole = s.memory.region_infos()[0];
        let info = VhostUserMemoryRegionInfo { guest_phys_addr: 1 << 40, userspace_addr: u64::MAX - 4095, ..whole };
        (number::ADD_MEM_REG, region_body(&info), vec![info.mmap_handle])
    }),
    ("SET_FEATURES of every bit", |_| (number::SET_FEATURES, u64::MAX.to_le_bytes().to_vec(), vec![])),
    ("a message that does not exist", |_| (200, vec![0; 8], vec![])),
];

/// GET_MAX_MEM_SLOTS says how many regions there may be.
#[test]
fn no_more_memory_regions_than_slots_are_accepted() {
    let daemon = start();
    let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
    let slots = session.frontend.get_max_mem_slots().expect("GET_MAX_MEM_SLOTS");
    let whole = session.memory.region_infos()[0];
    let region = |nth: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: nth << 20,
        userspace_addr: (nth + 1) << 20,
        memory_size: 4096,
        ..whole
    };
    let add = |session: &mut Session, nth: u64| session.frontend.add_mem_region(&region(nth));
    for nth in 0..slots {
        add(&mut session, nth).expect("ADD_MEM_REG");
    }
    session.frontend.remove_mem_region(&region(0)).expect("REM_MEM_REG");
    add(&mut session, 0).expect("ADD_MEM_REG where one was removed");
    add(&mut session, slots).expect_err("one region more than there are slots");
}

/// T19. With REPLY_ACK, zero means success. To reject a message, the daemon replies with another value, or closes the
/// connection; it must not crash.
#[test]
fn rejected_messages_are_not_acknowledged() {
    let mut daemon = start();
    for (name, message) in REJECTED {
        let session = Session::open(&daemon.socket(), &SessionOptions::default());
        let (number, body, fds) = message(&session);
        let reply = raw_message::exchange(&session.socket, number, FLAG_NEED_REPLY, &body, &fds);
        assert_ne!(reply, Reply::Silent, "{name}: a reply was requested");
        assert!(!reply.is_acknowledged(), "{name}: acknowledged as done");
        drop(session);
        daemon.assert_alive();
        assert_serves(&daemon.socket(), 0);
    }
}

/// A front-end with its guest memory in a file on a disk, as QEMU's memory-backend-file can be.
fn with_memory_on_a_disk(socket: &Path, directory: &Path) -> Session {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(directory.join("ram"));
    let regions = GuestMemory::standard_regions(1 << 20);
    let memory = GuestMemory::in_file(file.expect("a file can be created"), regions);
    Session::negotiate_with(socket, SessionOptions::default().features, memory)
}

#[test]
fn guest_memory_on_a_disk_is_refused_where_disks_share_a_process() {
    let directory = TempDir::new("ram");
    fs::write(directory.path().join("image"), [7; 1 << 20]).expect("an image can be written");
    let shared = "read_only = true\ncache.size = \"4M\"";
    let mut daemon = Daemon::start_configured(directory, &[shared, &format!("{shared}\nisolate = true")]);
    let [shared, isolated] = [0, 1].map(|disk| daemon.socket_of(disk));
    let session = with_memory_on_a_disk(&shared, daemon.directory().path());
    session.frontend.set_mem_table(&session.memory.region_infos()).expect_err("another disk may share the process");
    daemon.await_log("disk0: closed the connection of the front-end: memory in a file on a disk may delay the other");
    drop(session);
    Session::open(&shared, &SessionOptions::default()).read(0, 4096);
    let mut session = with_memory_on_a_disk(&isolated, daemon.directory().path());
    session.share_memory();
    session.add_ring(16);
    session.start_ring(0);
    assert_eq!(session.read(0, 4096), [7; 4096]);
    daemon.await_log("disk1: guest memory is on ");
    drop(session);
    daemon.stop();
}
