//! Requests that were in flight when a daemon crashed (vhost-user specification, "Inflight I/O tracking").

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::raw_message::{self, FLAG_NEED_REPLY, Reply, number};
use crate::common::request::{OK, Payload, Pending, assert_serves, pattern};
use crate::common::session::{Session, SessionOptions};
use crate::common::wait::{ABSENCE, TIMEOUT, poll_until, try_poll};
use crate::{IMAGE_BYTES, SPARE_SECTOR};

const QUEUE_SIZE: u16 = 128;
/// Offsets in a ring's part of the region (QueueRegionSplit), and the size of a descriptor's state.
const VERSION: u64 = 8;
const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX: u64 = 14;
const DESCRIPTORS: u64 = 16;
const DESCRIPTOR_BYTES: u64 = 16;
const NEXT: u64 = 6;
const COUNTER: u64 = 8;

fn start() -> Daemon {
    Daemon::start("inflight", IMAGE_BYTES, &DaemonOptions::default())
}

fn requested_region() -> VhostUserInflight {
    VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues: 1, queue_size: QUEUE_SIZE }
}

/// A session with a ring that is not started, and its inflight region.
fn session_with_region(daemon: &Daemon) -> (Session, VhostUserInflight, File) {
    let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
    session.share_memory();
    session.add_ring(QUEUE_SIZE);
    let (region, file) = session.frontend.get_inflight_fd(&requested_region()).expect("GET_INFLIGHT_FD");
    assert!(region.mmap_size >= DESCRIPTORS + u64::from(QUEUE_SIZE) * DESCRIPTOR_BYTES, "{}", region.mmap_size);
    (session, region, file)
}

/// Marks the chain at `head` as in flight, taken by a daemon as its request number `counter`.
fn mark_in_flight(file: &File, head: u16, counter: u64) {
    file.write_all_at(&1_u16.to_le_bytes(), VERSION).expect("the region can be written");
    let state = DESCRIPTORS + u64::from(head) * DESCRIPTOR_BYTES;
    file.write_all_at(&[1], state).expect("the region can be written");
    file.write_all_at(&counter.to_le_bytes(), state + COUNTER).expect("the region can be written");
}

/// The heads that the region marks as in flight.
fn heads_in_flight(file: &File) -> Vec<u16> {
    let is_in_flight = |head: &u16| {
        let mut mark = [0];
        file.read_exact_at(&mut mark, DESCRIPTORS + u64::from(*head) * DESCRIPTOR_BYTES)
            .expect("the region can be read");
        mark != [0]
    };
    (0..QUEUE_SIZE).filter(is_in_flight).collect()
}

/// Submits four writes to one sector.
fn four_writes(session: &mut Session) -> Vec<Pending> {
    let write =
        |session: &mut Session, mark| session.submit(0, VIRTIO_BLK_T_OUT, 0, Payload::Send(&pattern(mark, 0, 512)));
    (1..=4).map(|mark| write(session, mark)).collect()
}

#[test]
fn resubmitted_requests_complete_once_and_in_order() {
    // The previous daemon completed these in one batch. It crashed before or after it cleared their marks.
    for (completed, cleared) in [(&[1][..], false), (&[1], true), (&[1, 0], false), (&[1, 0], true)] {
        let daemon = start();
        let (mut session, region, file) = session_with_region(&daemon);
        let write_at = |bytes: &[u8], at| file.write_all_at(bytes, at).expect("the region can be written");
        let state = |head: u16| DESCRIPTORS + u64::from(head) * DESCRIPTOR_BYTES;
        let writes = four_writes(&mut session);
        let heads: Vec<u16> = writes.iter().map(|pending| pending.head).collect();
        for (counter, &n) in (10..).zip(&[3, 1, 0, 2]) {
            mark_in_flight(&file, heads[n], counter);
        }
        let mut last = 0;
        for (entry, &n) in (0..).zip(completed) {
            write_at(&u16::to_le_bytes(last), state(heads[n]) + NEXT);
            last = heads[n];
            session.rings[0].push_used_as_device(entry, last);
        }
        write_at(&last.to_le_bytes(), LAST_BATCH_HEAD);
        if cleared {
            completed.iter().for_each(|&n| write_at(&[0], state(heads[n])));
            write_at(&u16::try_from(completed.len()).expect("four at most").to_le_bytes(), USED_IDX);
        }
        session.frontend.set_inflight_fd(&region, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
        // Like QEMU after a crash of the daemon: the base is the used index.
        session.start_ring(0);
        let used = session.wait_for(0, 4);
        assert_eq!(used.len(), 4, "each write completes once");
        for (n, write) in writes.iter().enumerate() {
            let is_done = session.memory.byte(write.status) == OK;
            assert_eq!(is_done, !completed.contains(&n), "write {n}: only writes that had not completed are repeated");
        }
        let late = try_poll(ABSENCE / 4, || (session.rings[0].used_idx() != 4).then_some(()));
        assert!(late.is_none(), "no write completes twice");
        assert_eq!(session.read(0, 512), pattern(3, 0, 512), "the write that was taken last is repeated last");
        // The device notifies the driver first, then clears the marks.
        poll_until("the marks to be cleared", TIMEOUT, || heads_in_flight(&file).is_empty().then_some(()));
    }
}

/// The used ring and the region decide where a ring resumes, not the front-end's base: QEMU sends the used index of the
/// moment when the connection broke, cloud-hypervisor the available index.
#[test]
fn a_ring_resumes_after_its_completed_requests_for_any_base() {
    for base in [0, 1, 4] {
        let daemon = start();
        let (mut session, region, file) = session_with_region(&daemon);
        session.frontend.set_inflight_fd(&region, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
        session.start_ring(0);
        session.stop_ring(0);
        let writes = four_writes(&mut session);
        // The previous daemon completed two requests and had no others in flight.
        for (entry, write) in (0..).zip(&writes[..2]) {
            session.rings[0].push_used_as_device(entry, write.head);
        }
        file.write_all_at(&2_u16.to_le_bytes(), USED_IDX).expect("the region can be written");
        session.set_up_ring(0, base);
        session.enable_ring(0, true);
        assert_eq!(session.wait_for(0, 4).len(), 4, "base {base}: each write completes once");
        for (n, write) in writes.iter().enumerate() {
            let done = session.memory.byte(write.status) == OK;
            assert_eq!(done, n >= 2, "base {base}: write {n}: only writes that had not completed are done");
        }
        let late = try_poll(ABSENCE / 4, || (session.rings[0].used_idx() != 4).then_some(()));
        assert!(late.is_none(), "base {base}: no write completes twice");
        assert_eq!(session.stop_ring(0), 4);
    }
}

#[test]
fn a_ring_with_an_inflight_region_stops_and_resumes() {
    let daemon = start();
    let (mut session, region, file) = session_with_region(&daemon);
    session.frontend.set_inflight_fd(&region, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
    session.start_ring(0);
    for round in 0..50 {
        session.write(round, &pattern(round, round, 512));
        assert!(session.read(round, 512) == pattern(round, round, 512));
    }
    assert_eq!(session.stop_ring(0), 100);
    assert!(heads_in_flight(&file).is_empty(), "a stopped ring has no requests in flight");
    session.start_ring(0);
    assert!(session.read(7, 512) == pattern(7, 7, 512));
}

/// Replies come in the order of the messages, although different parts of the daemon send them.
#[test]
fn replies_stay_in_order_around_the_inflight_region() {
    let daemon = start();
    let session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
    let message = |number: u32, body: &[u8]| {
        [&number.to_le_bytes()[..], &1_u32.to_le_bytes(), &(body.len() as u32).to_le_bytes(), body].concat()
    };
    let mut shape = [0; 20];
    shape[16..18].copy_from_slice(&1_u16.to_le_bytes());
    shape[18..20].copy_from_slice(&QUEUE_SIZE.to_le_bytes());
    let messages = [
        message(number::GET_FEATURES, &[]),
        message(number::GET_INFLIGHT_FD, &shape),
        message(number::GET_FEATURES, &[]),
        message(number::GET_QUEUE_NUM, &[]),
    ];
    std::io::Write::write_all(&mut &session.socket, &messages.concat()).expect("the daemon reads the socket");
    let lengths: Vec<usize> = (0..messages.len())
        .map(|_| match raw_message::receive(&session.socket) {
            Reply::Payload(payload) => payload.len(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(lengths, [8, 20, 8, 8], "features, region, features, number of queues");
}

/// The front-end creates the region for smaller queues than it sets up: nothing could be recorded.
#[test]
fn a_ring_that_is_larger_than_its_inflight_region_is_not_served() {
    let daemon = start();
    let (mut session, region, file) = session_with_region(&daemon);
    session.frontend.set_inflight_fd(&region, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
    session.add_ring(QUEUE_SIZE * 2);
    session.rings.swap(0, 1);
    session.start_ring(0);
    daemon
        .await_log("vring 0: not served: it has size 256, and the front-end's inflight region is for 1 queues of size");
    session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(512));
    session.rings[0].notify();
    assert!(session.rings[0].try_wait_used(ABSENCE).is_none(), "a request that could not be recorded");
    drop(session);
    assert_serves(&daemon.socket(), SPARE_SECTOR);
}

#[test]
fn an_invalid_inflight_region_ends_only_its_session() {
    let mut daemon = start();
    let shape = |size: u64, offset: u64, queues: u16, queue_size: u16| {
        let halves = [queues.to_le_bytes(), queue_size.to_le_bytes()].concat();
        [&size.to_le_bytes()[..], &offset.to_le_bytes(), &halves].concat()
    };
    let part = DESCRIPTORS + 128 * DESCRIPTOR_BYTES + 48;
    let cases = [
        (number::GET_INFLIGHT_FD, shape(0, 0, 0, 128), false),
        (number::GET_INFLIGHT_FD, shape(0, 0, u16::MAX, u16::MAX), false),
        (number::GET_INFLIGHT_FD, vec![1, 2, 3], false),
        (number::SET_INFLIGHT_FD, shape(part, 0, 1, 128), false),
        (number::SET_INFLIGHT_FD, shape(part, 4096, 1, 128), true),
        (number::SET_INFLIGHT_FD, shape(part, u64::MAX, 1, 128), true),
        (number::SET_INFLIGHT_FD, shape(16, 0, 1, 128), true),
        (number::SET_INFLIGHT_FD, shape(part, 0, 1024, 32768), true),
    ];
    for (number, body, with_file) in cases {
        let (session, _, file) = session_with_region(&daemon);
        let fds = [file.as_raw_fd()];
        let fds = if with_file { &fds[..] } else { &[] };
        let reply = raw_message::exchange(&session.socket, number, FLAG_NEED_REPLY, &body, fds);
        assert_eq!(reply, Reply::Closed, "{number} {body:?}");
        daemon.assert_alive();
        assert_serves(&daemon.socket(), SPARE_SECTOR);
    }
}

/// A reply that nobody asked for would be taken for the reply to the next message.
#[test]
fn a_message_gets_no_reply_unless_the_front_end_asks_for_one() {
    let daemon = start();
    let (session, region, file) = session_with_region(&daemon);
    session.socket.set_read_timeout(Some(ABSENCE)).expect("a timeout can be set");
    let shape = [region.num_queues.to_le_bytes(), region.queue_size.to_le_bytes()].concat();
    let body = [region.mmap_size.to_le_bytes().to_vec(), region.mmap_offset.to_le_bytes().to_vec(), shape].concat();
    let reply = raw_message::exchange(&session.socket, number::SET_INFLIGHT_FD, 0, &body, &[file.as_raw_fd()]);
    assert_eq!(reply, Reply::Silent);
    session.socket.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
    let features = raw_message::exchange(&session.socket, number::GET_FEATURES, 0, &[], &[]);
    assert_eq!(features, Reply::Payload(session.offered.to_le_bytes().to_vec()));
}
