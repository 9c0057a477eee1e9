//! Kicks and interrupts: none lost, and none that nobody asked for (T21).

use std::time::Duration;

use vhost::VhostBackend;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use crate::IMAGE_BYTES;
use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::raw_message::number;
use crate::common::request::{OK, Payload, assert_serves, pattern};
use crate::common::session::{Session, SessionOptions};
use crate::common::wait::{ABSENCE, PATIENCE, poll_until, readable, try_poll};

/// In a SET_VRING_CALL of ring 0: no descriptor comes with it.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// Requests made available with one kick.
const BATCH: u16 = 32;

fn start() -> Daemon {
    Daemon::start("notify", IMAGE_BYTES, &DaemonOptions::default())
}

/// Makes [`BATCH`] reads of one page available with one kick.
fn submit_batch(session: &mut Session) {
    session.memory.free_all_in(1);
    for _ in 0..BATCH {
        session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
    }
    session.rings[0].notify();
}

/// Waits, without looking at interrupts, until the whole batch has completed, and takes it.
#[track_caller]
fn take_batch(session: &mut Session) {
    for n in 0..BATCH {
        poll_until(&format!("request {n} of a batch"), PATIENCE, || session.rings[0].take_used());
    }
}

/// Interrupts that have come; the last one may follow the completion that it tells of, so there is a grace period.
fn calls_after(session: &Session, expected: u64) -> u64 {
    let mut calls = 0;
    try_poll(ABSENCE, || {
        calls += session.rings[0].drain_calls();
        // Watch to the end for more than were expected.
        (calls > expected).then_some(())
    });
    calls
}

#[test]
fn without_event_idx_there_are_no_more_interrupts_than_completions() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(!session.has(VIRTIO_RING_F_EVENT_IDX));
    session.read(0, 4096);
    for round in 0..10 {
        session.rings[0].drain_calls();
        submit_batch(&mut session);
        take_batch(&mut session);
        let calls = calls_after(&session, u64::from(BATCH));
        assert!((1..=u64::from(BATCH)).contains(&calls), "round {round}: {calls} interrupts for {BATCH} requests");
    }
}

#[test]
fn a_driver_that_polls_gets_no_interrupts() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.read(0, 4096);
    calls_after(&session, u64::MAX);
    session.rings[0].forbid_interrupts();
    for round in 0..5 {
        submit_batch(&mut session);
        take_batch(&mut session);
        let calls = calls_after(&session, 0);
        assert_eq!(calls, 0, "round {round}: interrupts in spite of VIRTQ_AVAIL_F_NO_INTERRUPT");
    }
}

#[test]
fn event_idx_asks_for_one_interrupt_and_gets_one() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::with_event_idx());
    assert!(session.has(VIRTIO_RING_F_EVENT_IDX), "EVENT_IDX is offered");
    session.read(0, 4096);
    calls_after(&session, u64::MAX);
    for nth in [1, 2, BATCH / 2, BATCH] {
        let start = session.rings[0].used_idx();
        session.rings[0].set_used_event(start.wrapping_add(nth - 1));
        submit_batch(&mut session);
        take_batch(&mut session);
        assert_eq!(calls_after(&session, 1), 1, "an interrupt for completion {nth} of {BATCH}");
    }
}

#[test]
fn event_idx_that_is_not_reached_keeps_the_device_quiet() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::with_event_idx());
    session.read(0, 4096);
    calls_after(&session, u64::MAX);
    let far = session.rings[0].used_idx().wrapping_add(0x4000);
    session.rings[0].set_used_event(far);
    for round in 0..5 {
        submit_batch(&mut session);
        take_batch(&mut session);
        assert_eq!(calls_after(&session, 0), 0, "round {round}: interrupts long before used_event");
    }
}

/// A daemon may die between the answer that it shows and the call that tells of it. The guest sleeps, and with EVENT_IDX
/// no later answer would wake it: whoever takes over the ring calls.
#[test]
fn a_guest_that_sleeps_through_a_death_is_woken() {
    let daemon = start();
    for options in [SessionOptions::default(), SessionOptions::with_event_idx()] {
        let mut session = Session::negotiate(&daemon.socket(), &options);
        session.share_memory();
        session.add_ring(128);
        let pending = session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
        session.rings[0].answer_as_device(0, pending.head);
        session.start_ring(0);
        assert!(readable(&[session.rings[0].call_fd()], PATIENCE), "a call for what nobody has told the guest of");
    }
}

/// A call descriptor may come after the ring has begun to answer.
#[test]
fn a_call_descriptor_that_comes_late_is_told_of_what_it_missed() {
    let daemon = start();
    for options in [SessionOptions::default(), SessionOptions::with_event_idx()] {
        let mut session = Session::open(&daemon.socket(), &options);
        session.read(0, 4096);
        session.raw(number::SET_VRING_CALL, &NO_DESCRIPTOR.to_le_bytes());
        calls_after(&session, u64::MAX);
        session.rings[0].set_used_event(1);
        session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
        session.rings[0].notify();
        poll_until("an answer without a call", PATIENCE, || (session.rings[0].used_idx() == 2).then_some(()));
        session.frontend.set_vring_call(0, &session.rings[0].call).expect("SET_VRING_CALL");
        assert!(readable(&[session.rings[0].call_fd()], PATIENCE), "a call for what it has missed");
    }
}

/// A driver that kicks only when the device asks for it, and sleeps until an interrupt, is never left waiting: the
/// device must look once more after it has armed its notification.
#[test]
fn no_kick_and_no_interrupt_is_lost() {
    const ROUNDS: u64 = 4000;
    let daemon = start();
    for options in [SessionOptions::default(), SessionOptions::with_event_idx()] {
        let mut session = Session::open(&daemon.socket(), &options);
        let event_idx = session.has(VIRTIO_RING_F_EVENT_IDX);
        let bytes = pattern(1, 0, 4096);
        session.write(0, &bytes);
        let (pending, segments) = session.place(VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
        for round in 0..ROUNDS {
            let depth = 1 + (round % 7) as usize;
            for _ in 0..depth {
                let before = session.rings[0].next_avail();
                session.rings[0].submit(&segments);
                session.rings[0].notify_if_wanted(before);
            }
            session.wait_for(0, depth);
            assert_eq!(session.memory.byte(pending.status), OK, "round {round}, EVENT_IDX {event_idx}");
        }
        assert!(session.memory.read(pending.data, 4096) == bytes, "what was written is read");
    }
}

/// A descriptor of the front-end's that blocks must not hold up a worker, which serves other rings, or other guests.
#[test]
fn two_rings_may_share_a_kick_that_blocks() {
    let options = DaemonOptions { num_queues: 2, ..DaemonOptions::default() };
    let daemon = Daemon::start("shared-kick", IMAGE_BYTES, &options);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.add_ring(128);
    session.start_ring(1);
    let shared = EventFd::new(0).expect("an eventfd can be made");
    for index in 0..2 {
        session.frontend.set_vring_kick(index, &shared).expect("SET_VRING_KICK");
        session.rings[index].kick = shared.try_clone().expect("it can be duplicated");
    }
    for round in 0..20 {
        let read = session.run(round % 2, VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
        assert_eq!(read.status, OK, "round {round}");
        // Now and then the worker is asleep when the kick comes.
        std::thread::sleep(Duration::from_millis(u64::from(round % 5 == 0)));
    }
    drop(session);
    assert_serves(&daemon.socket(), 0);
}

#[test]
fn a_call_that_is_full_and_blocks_is_left_alone() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let full = EventFd::new(0).expect("an eventfd can be made");
    full.write(u64::MAX - 1).expect("there is room");
    session.frontend.set_vring_call(0, &full).expect("SET_VRING_CALL");
    for _ in 0..3 {
        submit_batch(&mut session);
        take_batch(&mut session);
    }
    drop(session);
    assert_serves(&daemon.socket(), 0);
}
