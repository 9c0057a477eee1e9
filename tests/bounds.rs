//! The harm that a hostile guest or front-end can do to others: it costs them only bounded time and bounded memory.
//!
//! A hostile guest floods its ring with legal requests for 4 GiB each; bystanders are measured meanwhile. The limits
//! are those of a debug build on a loaded machine: without the bounds the waits are of many seconds.

#![allow(clippy::cast_possible_truncation, reason = "sizes and indices here are chosen by the test, and small")]

mod common;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions, TempDir};
use common::flood::{BUFFER_BYTES, BUFFERS, Flood};
use common::raw_ring::{Ring, Segment};
use common::request::{OK, Payload, header};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES};

/// Bytes of the image, nearly all of it a hole.
const IMAGE_BYTES: u64 = 16 << 30;
/// Longest wait for another guest's request or a control message. The daemon's own bounds are 5 and 100 ms.
const WAIT_MAX: Duration = Duration::from_millis(1500);

fn options(queues: usize) -> SessionOptions {
    SessionOptions { queues, queue_size: 128, region_bytes: 16 << 20, ..SessionOptions::default() }
}

fn start(name: &str, options: &DaemonOptions) -> Daemon {
    Daemon::start(name, IMAGE_BYTES, options)
}

/// The longest of `count` reads of 4 KiB on ring `queue`.
fn longest_read(session: &mut Session, queue: usize, count: usize) -> Duration {
    let read = |session: &mut Session| {
        let begun = Instant::now();
        let outcome = session.run(queue, VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
        assert_eq!(outcome.status, OK);
        begun.elapsed()
    };
    (0..count).map(|_| read(session)).max().expect("at least one read")
}

fn timed<T>(act: impl FnOnce() -> T) -> (Duration, T) {
    let begun = Instant::now();
    let result = act();
    (begun.elapsed(), result)
}

#[test]
fn reads_of_4_gib_delay_neither_other_queues_nor_control_messages() {
    let mut daemon = start("bounds", &DaemonOptions { num_queues: 2, ..DaemonOptions::default() });
    let mut session = Session::open(&daemon.socket(), &options(2));
    longest_read(&mut session, 1, 1);
    let flood = Flood::new(&session, VIRTIO_BLK_T_IN, 0, BUFFERS);
    flood.submit(&mut session, 0, 128);
    thread::sleep(Duration::from_millis(50));
    let longest = longest_read(&mut session, 1, 20);
    assert!(longest < WAIT_MAX, "a read of another queue takes {longest:?}");
    let (stopped, _) = timed(|| session.stop_ring(1));
    assert!(stopped < WAIT_MAX, "GET_VRING_BASE of an idle ring takes {stopped:?}");
    let (stopped, base) = timed(|| session.stop_ring(0));
    assert!(stopped < WAIT_MAX, "GET_VRING_BASE of the flooded ring takes {stopped:?}");
    // Requests that were not completed count as not taken: the ring resumes there, and each request completes once.
    assert_eq!(base, session.rings[0].used_idx());
    flood.shrink_pending_chains(&session);
    session.start_ring(0);
    session.rings[0].notify();
    poll_until("all requests to complete", TIMEOUT, || (session.rings[0].used_idx() == 128).then_some(()));
    let mut heads: Vec<u16> = (0..128).map(|_| session.rings[0].take_used().expect("it completed").head).collect();
    heads.sort_unstable();
    assert_eq!(heads, (0..128).collect::<Vec<u16>>());
    assert_eq!(session.memory.byte(flood.status), OK);
    daemon.stop();
}

#[test]
fn memory_and_features_can_change_during_a_4_gib_request() {
    let mut daemon = start("bounds", &DaemonOptions::default());
    let mut session = Session::open(&daemon.socket(), &options(1));
    let flood = Flood::new(&session, VIRTIO_BLK_T_IN, 0, BUFFERS);
    flood.submit(&mut session, 0, 4);
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(20));
        let (taken, ()) = timed(|| session.share_memory());
        assert!(taken < WAIT_MAX, "SET_MEM_TABLE takes {taken:?}");
    }
    assert!(session.rings[0].used_idx() < 4, "the requests are long");
    flood.shrink_pending_chains(&session);
    session.stop_ring(0);
    session.start_ring(0);
    session.rings[0].notify();
    poll_until("all requests to complete", TIMEOUT, || (session.rings[0].used_idx() == 4).then_some(()));
    daemon.stop();
}

#[test]
fn sigterm_ends_a_daemon_whose_guest_floods_it() {
    for (name, kind, buffers) in [("reads", VIRTIO_BLK_T_IN, BUFFERS), ("writes", VIRTIO_BLK_T_OUT, BUFFERS)] {
        let mut daemon = start("bounds", &DaemonOptions::default());
        let mut session = Session::open(&daemon.socket(), &options(1));
        let flood = Flood::new(&session, kind, 0, buffers);
        flood.submit(&mut session, 0, 128);
        thread::sleep(Duration::from_millis(50));
        daemon.terminate();
        let (ended, status) = timed(|| daemon.wait());
        assert!(status.success(), "{name}: {status}");
        // Dirty pages of 16 MiB are written before the end.
        assert!(ended < WAIT_MAX + Duration::from_secs(3), "{name}: the end takes {ended:?}");
    }
}

#[test]
fn whole_disk_discards_and_zeroes_do_not_delay_control_messages() {
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let daemon = start("bounds", &DaemonOptions::default());
        let mut session = Session::open(&daemon.socket(), &options(1));
        let memory = &session.memory;
        let (head, status, payload) = (memory.alloc(16, 16), memory.alloc(1, 1), memory.alloc(32 * 16, 16));
        memory.write(head, &header(kind, 0));
        // As large as the disk says: 1 GiB for a discard, 16 MiB for zeros.
        let sectors = if kind == VIRTIO_BLK_T_DISCARD { 1 << 21 } else { 1 << 15 };
        let ranges: Vec<u8> = (0..32u64)
            .flat_map(|nth| common::request::range(nth * sectors % (IMAGE_BYTES / 512), sectors as u32, 0))
            .collect();
        memory.write(payload, &ranges);
        let segments = [Segment::readable(head, 16), Segment::readable(payload, 32 * 16), Segment::writable(status, 1)];
        let descriptors = Ring::table_of(&segments);
        let flood = Flood::of(&session, descriptors, status);
        flood.submit(&mut session, 0, 128);
        thread::sleep(Duration::from_millis(50));
        let (stopped, base) = timed(|| session.stop_ring(0));
        assert!(stopped < WAIT_MAX, "GET_VRING_BASE takes {stopped:?}");
        assert_eq!(base, session.rings[0].used_idx());
    }
}

/// Anonymous memory of a process in bytes: its own, without its caches and the guests' memory.
fn anonymous_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon lives");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("Linux tells it");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[test]
fn no_guest_grows_the_daemon_by_more_than_64_mib() {
    const DATA_BYTES: u64 = 48 << 20;
    let directory = TempDir::new("bounds");
    let image = File::create(directory.path().join("image")).expect("an image can be created");
    std::io::Write::write_all(&mut &image, &vec![0x5a; DATA_BYTES as usize]).expect("space for an image");
    let mut daemon = Daemon::start_in(directory, &DaemonOptions { num_queues: 4, ..DaemonOptions::default() });
    let mut session = Session::open(&daemon.socket(), &options(4));
    let before = anonymous_bytes(daemon.id());
    // Each of 512 reads is for the same 48 MiB, which do not fit into the cache.
    let flood = Flood::new(&session, VIRTIO_BLK_T_IN, 0, (DATA_BYTES / u64::from(BUFFER_BYTES)) as usize);
    (0..4).for_each(|queue| flood.submit(&mut session, queue, 128));
    let mut most = before;
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        most = most.max(anonymous_bytes(daemon.id()));
        thread::sleep(Duration::from_millis(5));
    }
    let grown = (most - before) >> 20;
    assert!(grown < 64, "the daemon has grown by {grown} MiB");
    for queue in 0..4 {
        session.stop_ring(queue);
    }
    daemon.stop();
}

/// The cached reads of one reader of a golden image, while another one reads all of it without end.
#[test]
fn a_flood_of_one_reader_does_not_starve_another_of_the_same_image() {
    let directory = TempDir::new("bounds");
    let image = File::create(directory.path().join("image")).expect("an image can be created");
    image.set_len(IMAGE_BYTES).expect("an image can be sized");
    let device = "read_only = true\ncache.size = \"16M\"";
    let mut daemon = Daemon::start_configured(directory, &[device, device]);
    let mut hostile = Session::open(&daemon.socket_of(0), &options(1));
    let mut bystander = Session::open(&daemon.socket_of(1), &options(1));
    bystander.read(0, 4096);
    let flood = Flood::new(&hostile, VIRTIO_BLK_T_IN, 0, BUFFERS);
    flood.submit(&mut hostile, 0, 128);
    thread::sleep(Duration::from_millis(50));
    let longest = longest_read(&mut bystander, 0, 100);
    assert!(longest < WAIT_MAX, "a read of another guest takes {longest:?}");
    let (stopped, _) = timed(|| hostile.stop_ring(0));
    assert!(stopped < WAIT_MAX, "GET_VRING_BASE takes {stopped:?}");
    daemon.stop();
}

#[test]
fn a_call_eventfd_that_becomes_blocking_stalls_neither_ring_nor_shutdown() {
    let mut daemon = start("bounds", &DaemonOptions { num_queues: 2, ..DaemonOptions::default() });
    let mut session = Session::open(&daemon.socket(), &options(2));
    session.read(0, 4096);
    // After the daemon has looked at it.
    let call = &session.rings[0].call;
    call.write(u64::MAX - 1 - call.read().unwrap_or(0)).expect("the counter has room");
    // SAFETY: a plain system call on an open descriptor: it clears O_NONBLOCK.
    assert_eq!(unsafe { libc::fcntl(call.as_raw_fd(), libc::F_SETFL, 0) }, 0);
    for _ in 0..3 {
        let completed = session.rings[0].used_idx();
        session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
        session.rings[0].notify();
        let (served, ()) = timed(|| {
            poll_until("the read to complete", TIMEOUT, || (session.rings[0].used_idx() != completed).then_some(()));
        });
        assert!(served < WAIT_MAX, "a read takes {served:?}");
        let longest = longest_read(&mut session, 1, 1);
        assert!(longest < WAIT_MAX, "a read of another queue takes {longest:?}");
    }
    daemon.await_log("interrupts stopped: the call eventfd is full and blocking");
    assert_eq!(daemon.log().matches("interrupts stopped").count(), 1, "it is logged once");
    daemon.terminate();
    let (ended, status) = timed(|| daemon.wait());
    assert!(status.success() && ended < WAIT_MAX + Duration::from_secs(3), "{status} after {ended:?}");
}

#[test]
fn a_full_call_eventfd_is_not_an_error() {
    let daemon = start("bounds", &DaemonOptions::default());
    let mut session = Session::open(&daemon.socket(), &options(1));
    session.read(0, 4096);
    let call = &session.rings[0].call;
    call.write(u64::MAX - 1 - call.read().unwrap_or(0)).expect("the counter has room");
    for _ in 0..10 {
        let completed = session.rings[0].used_idx();
        session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(512));
        session.rings[0].notify();
        poll_until("the read to complete", TIMEOUT, || (session.rings[0].used_idx() != completed).then_some(()));
    }
    assert!(!daemon.log().contains("interrupt"), "{}", daemon.log());
}

#[test]
fn isolated_readers_of_an_image_have_separate_caches() {
    let directory = TempDir::new("bounds");
    fs::write(directory.path().join("image"), vec![7; 4 << 20]).expect("space for an image");
    let device = |isolate: bool| format!("read_only = true\ncache.size = \"4M\"\nisolate = {isolate}");
    let (isolated, shared) = (device(true), device(false));
    let daemon = Daemon::start_configured(directory, &[&isolated, &isolated, &shared, &shared]);
    for device in 0..4 {
        Session::open(&daemon.socket_of(device), &options(1)).read(0, 4096);
    }
    // Two of their own, and one that is shared.
    assert_eq!(daemon.mapped_caches(), 3);
}
