//! Requests that were in flight when a daemon died (vhost-user specification, "Inflight I/O tracking").

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::raw_message::{self, FLAG_NEED_REPLY, Reply, number};
use crate::common::request::{OK, Payload, Pending, assert_serves, pattern};
use crate::common::session::{Session, SessionOptions};
use crate::common::wait::{ABSENCE, PATIENCE, poll_until, try_poll};
use crate::{IMAGE_BYTES, SPARE_SECTOR};

const QUEUE_SIZE: u16 = 128;
/// The specification's layout of a ring's part: where its fields are, and how long a descriptor's state is.
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

fn wish() -> VhostUserInflight {
    VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues: 1, queue_size: QUEUE_SIZE }
}

/// A session whose ring is laid out and not started, and the region for it.
fn session_with_region(daemon: &Daemon) -> (Session, VhostUserInflight, File) {
    let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
    session.share_memory();
    session.add_ring(QUEUE_SIZE);
    let (region, file) = session.frontend.get_inflight_fd(&wish()).expect("GET_INFLIGHT_FD");
    assert!(region.mmap_size >= DESCRIPTORS + u64::from(QUEUE_SIZE) * DESCRIPTOR_BYTES, "{}", region.mmap_size);
    (session, region, file)
}

/// Notes in the region that a daemon took the chain at `head` as its `counter`th.
fn mark(file: &File, head: u16, counter: u64) {
    file.write_all_at(&1_u16.to_le_bytes(), VERSION).expect("the region can be written");
    let state = DESCRIPTORS + u64::from(head) * DESCRIPTOR_BYTES;
    file.write_all_at(&[1], state).expect("the region can be written");
    file.write_all_at(&counter.to_le_bytes(), state + COUNTER).expect("the region can be written");
}

/// The heads that the region says are owed.
fn marked(file: &File) -> Vec<u16> {
    let owed = |head: &u16| {
        let mut mark = [0];
        file.read_exact_at(&mut mark, DESCRIPTORS + u64::from(*head) * DESCRIPTOR_BYTES)
            .expect("the region can be read");
        mark != [0]
    };
    (0..QUEUE_SIZE).filter(owed).collect()
}

/// Four writes to one sector, of which the predecessor took all, in another order than that of their descriptors, and
/// answered the second one.
fn four_writes(session: &mut Session) -> Vec<Pending> {
    let write =
        |session: &mut Session, mark| session.submit(0, VIRTIO_BLK_T_OUT, 0, Payload::Send(&pattern(mark, 0, 512)));
    (1..=4).map(|mark| write(session, mark)).collect()
}

#[test]
fn what_a_predecessor_owes_is_answered_once_and_in_order() {
    // The predecessor answered these together, and may have died before or after it noted that the used ring shows them.
    for (answered, noted) in [(&[1][..], false), (&[1], true), (&[1, 0], false), (&[1, 0], true)] {
        let daemon = start();
        let (mut session, region, file) = session_with_region(&daemon);
        let write_at = |bytes: &[u8], at| file.write_all_at(bytes, at).expect("the region can be written");
        let state = |head: u16| DESCRIPTORS + u64::from(head) * DESCRIPTOR_BYTES;
        let writes = four_writes(&mut session);
        let heads: Vec<u16> = writes.iter().map(|pending| pending.head).collect();
        for (counter, &n) in (10..).zip(&[3, 1, 0, 2]) {
            mark(&file, heads[n], counter);
        }
        let mut last = 0;
        for (entry, &n) in (0..).zip(answered) {
            write_at(&u16::to_le_bytes(last), state(heads[n]) + NEXT);
            last = heads[n];
            session.rings[0].answer_as_device(entry, last);
        }
        write_at(&last.to_le_bytes(), LAST_BATCH_HEAD);
        if noted {
            answered.iter().for_each(|&n| write_at(&[0], state(heads[n])));
            write_at(&u16::try_from(answered.len()).expect("four at most").to_le_bytes(), USED_IDX);
        }
        session.frontend.set_inflight_fd(&region, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
        // As QEMU does after a daemon's death: on from the used index.
        session.start_ring(0);
        let used = session.wait_for(0, 4);
        assert_eq!(used.len(), 4, "each once");
        for (n, write) in writes.iter().enumerate() {
            let is_done = session.memory.byte(write.status) == OK;
            assert_eq!(is_done, !answered.contains(&n), "write {n}: what had been answered is not done again");
        }
        let late = try_poll(ABSENCE / 4, || (session.rings[0].used_idx() != 4).then_some(()));
        assert!(late.is_none(), "nothing more is answered");
        assert_eq!(session.read(0, 512), pattern(3, 0, 512), "the one taken last was done last");
        // The guest is called first, then the marks go.
        poll_until("the marks to go", PATIENCE, || marked(&file).is_empty().then_some(()));
    }
}

/// Where a ring goes on is decided by the used ring and the region, not by what the front-end says: QEMU says where the
/// used ring was when the connection broke, cloud-hypervisor where the available ring is.
#[test]
fn a_ring_goes_on_after_what_was_answered_whatever_base_the_front_end_gives() {
    for base in [0, 1, 4] {
        let daemon = start();
        let (mut session, region, file) = session_with_region(&daemon);
        session.frontend.set_inflight_fd(&region, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
        session.start_ring(0);
        session.stop_ring(0);
        let writes = four_writes(&mut session);
        // The predecessor has answered two requests and owes none.
        for (entry, write) in (0..).zip(&writes[..2]) {
            session.rings[0].answer_as_device(entry, write.head);
        }
        file.write_all_at(&2_u16.to_le_bytes(), USED_IDX).expect("the region can be written");
        session.set_up_ring(0, base);
        session.enable_ring(0, true);
        assert_eq!(session.wait_for(0, 4).len(), 4, "base {base}: each once");
        for (n, write) in writes.iter().enumerate() {
            let done = session.memory.byte(write.status) == OK;
            assert_eq!(done, n >= 2, "base {base}: write {n} is done by who has not yet answered it");
        }
        let late = try_poll(ABSENCE / 4, || (session.rings[0].used_idx() != 4).then_some(()));
        assert!(late.is_none(), "base {base}: nothing is answered twice");
        assert_eq!(session.stop_ring(0), 4);
    }
}

#[test]
fn a_ring_with_a_region_stops_and_goes_on_like_any_other() {
    let daemon = start();
    let (mut session, region, file) = session_with_region(&daemon);
    session.frontend.set_inflight_fd(&region, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
    session.start_ring(0);
    for round in 0..50 {
        session.write(round, &pattern(round, round, 512));
        assert!(session.read(round, 512) == pattern(round, round, 512));
    }
    assert_eq!(session.stop_ring(0), 100);
    assert!(marked(&file).is_empty(), "a stopped ring owes nothing");
    session.start_ring(0);
    assert!(session.read(7, 512) == pattern(7, 7, 512));
}

/// Replies come in the order of the questions, whoever in the daemon gives them.
#[test]
fn a_region_is_given_in_its_turn() {
    let daemon = start();
    let session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
    let question = |number: u32, body: &[u8]| {
        [&number.to_le_bytes()[..], &1_u32.to_le_bytes(), &(body.len() as u32).to_le_bytes(), body].concat()
    };
    let mut shape = [0; 20];
    shape[16..18].copy_from_slice(&1_u16.to_le_bytes());
    shape[18..20].copy_from_slice(&QUEUE_SIZE.to_le_bytes());
    let questions = [
        question(number::GET_FEATURES, &[]),
        question(number::GET_INFLIGHT_FD, &shape),
        question(number::GET_FEATURES, &[]),
        question(number::GET_QUEUE_NUM, &[]),
    ];
    std::io::Write::write_all(&mut &session.socket, &questions.concat()).expect("the daemon listens");
    let lengths: Vec<usize> = (0..questions.len())
        .map(|_| match raw_message::receive(&session.socket) {
            Reply::Payload(payload) => payload.len(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(lengths, [8, 20, 8, 8], "features, region, features, number of queues");
}

#[test]
fn a_region_that_is_none_ends_the_session_and_nothing_else() {
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
