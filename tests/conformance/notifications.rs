//! Notifications in both directions: none is lost, and none comes that was not requested (T21).

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::time::Duration;

use vhost::VhostBackend;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempfile::TempFile;

use crate::IMAGE_BYTES;
use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::raw_message::number;
use crate::common::request::{OK, Payload, assert_serves, pattern};
use crate::common::session::{Session, SessionOptions};
use crate::common::wait::{ABSENCE, TIMEOUT, poll_until, readable, try_poll};

/// VHOST_USER_VRING_NOFD_MASK: this SET_VRING_CALL of ring 0 carries no descriptor.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// Number of requests for one notification.
const BATCH: u16 = 32;

fn start() -> Daemon {
    Daemon::start("notify", IMAGE_BYTES, &DaemonOptions::default())
}

/// Submits [`BATCH`] reads of one page with one notification.
fn submit_batch(session: &mut Session) {
    session.memory.free_all_in(1);
    for _ in 0..BATCH {
        session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
    }
    session.rings[0].notify();
}

/// Waits for all completions of a batch, and ignores interrupts.
#[track_caller]
fn take_batch(session: &mut Session) {
    for n in 0..BATCH {
        poll_until(&format!("request {n} of a batch"), TIMEOUT, || session.rings[0].take_used());
    }
}

/// Number of interrupts since the last look. The last interrupt may follow its completion, so this waits a little.
fn count_interrupts(session: &Session, expected: u64) -> u64 {
    let mut interrupts = 0;
    try_poll(ABSENCE, || {
        interrupts += session.rings[0].take_interrupts();
        // Wait for the full time, unless there are too many already.
        (interrupts > expected).then_some(())
    });
    interrupts
}

#[test]
fn without_event_idx_there_are_no_more_interrupts_than_completions() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(!session.has(VIRTIO_RING_F_EVENT_IDX));
    session.read(0, 4096);
    for round in 0..10 {
        session.rings[0].take_interrupts();
        submit_batch(&mut session);
        take_batch(&mut session);
        let interrupts = count_interrupts(&session, u64::from(BATCH));
        assert!(
            (1..=u64::from(BATCH)).contains(&interrupts),
            "round {round}: {interrupts} interrupts for {BATCH} requests"
        );
    }
}

#[test]
fn a_driver_that_polls_gets_no_interrupts() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.read(0, 4096);
    count_interrupts(&session, u64::MAX);
    session.rings[0].disable_interrupts();
    for round in 0..5 {
        submit_batch(&mut session);
        take_batch(&mut session);
        let interrupts = count_interrupts(&session, 0);
        assert_eq!(interrupts, 0, "round {round}: interrupts despite VIRTQ_AVAIL_F_NO_INTERRUPT");
    }
}

#[test]
fn event_idx_gives_exactly_one_interrupt() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::with_event_idx());
    assert!(session.has(VIRTIO_RING_F_EVENT_IDX), "EVENT_IDX is offered");
    session.read(0, 4096);
    count_interrupts(&session, u64::MAX);
    for nth in [1, 2, BATCH / 2, BATCH] {
        let start = session.rings[0].used_idx();
        session.rings[0].set_used_event(start.wrapping_add(nth - 1));
        submit_batch(&mut session);
        take_batch(&mut session);
        assert_eq!(count_interrupts(&session, 1), 1, "an interrupt for completion {nth} of {BATCH}");
    }
}

#[test]
fn no_interrupt_comes_before_used_event_is_reached() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::with_event_idx());
    session.read(0, 4096);
    count_interrupts(&session, u64::MAX);
    let far = session.rings[0].used_idx().wrapping_add(0x4000);
    session.rings[0].set_used_event(far);
    for round in 0..5 {
        submit_batch(&mut session);
        take_batch(&mut session);
        assert_eq!(count_interrupts(&session, 0), 0, "round {round}: interrupts long before used_event");
    }
}

/// A daemon may crash between a completion and its interrupt. The guest sleeps, and with EVENT_IDX no later completion
/// would wake it. So the next daemon triggers an interrupt when it starts the ring.
#[test]
fn a_guest_that_missed_an_interrupt_in_a_crash_is_woken() {
    let daemon = start();
    for options in [SessionOptions::default(), SessionOptions::with_event_idx()] {
        let mut session = Session::negotiate(&daemon.socket(), &options);
        session.share_memory();
        session.add_ring(128);
        let pending = session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
        session.rings[0].push_used_as_device(0, pending.head);
        session.start_ring(0);
        assert!(readable(&[session.rings[0].call_fd()], TIMEOUT), "the new daemon triggers the missed interrupt");
    }
}

/// A front-end may replace the call descriptor after requests have completed.
#[test]
fn a_new_call_descriptor_gets_the_missed_interrupt() {
    let daemon = start();
    for options in [SessionOptions::default(), SessionOptions::with_event_idx()] {
        let mut session = Session::open(&daemon.socket(), &options);
        session.read(0, 4096);
        session.raw(number::SET_VRING_CALL, &NO_DESCRIPTOR.to_le_bytes());
        count_interrupts(&session, u64::MAX);
        session.rings[0].set_used_event(1);
        // With EVENT_IDX the driver wants an interrupt for the first of these only.
        for used in [2, 3] {
            session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
            session.rings[0].notify();
            let is_used = || (session.rings[0].used_idx() == used).then_some(());
            poll_until("a completion without an interrupt", TIMEOUT, is_used);
        }
        session.frontend.set_vring_call(0, &session.rings[0].call).expect("SET_VRING_CALL");
        assert!(readable(&[session.rings[0].call_fd()], TIMEOUT), "the new descriptor gets the missed interrupt");
    }
}

/// The driver notifies the device only when notifications are enabled, and sleeps until an interrupt. It never hangs:
/// after it enables notifications, the device must look at the ring once more.
#[test]
fn no_notification_is_lost_in_either_direction() {
    const ROUNDS: u64 = 4000;
    let daemon = start();
    for options in [SessionOptions::default(), SessionOptions::with_event_idx()] {
        let mut session = Session::open(&daemon.socket(), &options);
        let event_idx = session.has(VIRTIO_RING_F_EVENT_IDX);
        let bytes = pattern(1, 0, 4096);
        session.write(0, &bytes);
        let (pending, segments) = session.prepare(VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
        for round in 0..ROUNDS {
            let depth = 1 + (round % 7) as usize;
            for _ in 0..depth {
                let before = session.rings[0].next_avail();
                session.rings[0].submit(&segments);
                session.rings[0].notify_if_enabled(before);
            }
            session.wait_for(0, depth);
            assert_eq!(session.memory.byte(pending.status), OK, "round {round}, EVENT_IDX {event_idx}");
        }
        assert!(session.memory.read(pending.data, 4096) == bytes, "a read returns the written data");
    }
}

/// A blocking descriptor of the front-end must not block a worker, which serves other rings too.
#[test]
fn two_rings_may_share_a_blocking_kick_descriptor() {
    let options = DaemonOptions { num_queues: 2, ..DaemonOptions::default() };
    let daemon = Daemon::start("shared-kick", IMAGE_BYTES, &options);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.add_ring(128);
    session.start_ring(1);
    let shared = EventFd::new(0).expect("an eventfd can be created");
    for index in 0..2 {
        session.frontend.set_vring_kick(index, &shared).expect("SET_VRING_KICK");
        session.rings[index].kick = shared.try_clone().expect("a descriptor can be duplicated");
    }
    for round in 0..20 {
        let read = session.run(round % 2, VIRTIO_BLK_T_IN, 0, Payload::Receive(4096));
        assert_eq!(read.status, OK, "round {round}");
        // In some rounds the worker sleeps when the notification comes.
        std::thread::sleep(Duration::from_millis(u64::from(round % 5 == 0)));
    }
    drop(session);
    assert_serves(&daemon.socket(), 0);
}

#[test]
fn a_full_blocking_call_descriptor_does_not_block_the_worker() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let full = EventFd::new(0).expect("an eventfd can be created");
    full.write(u64::MAX - 1).expect("the eventfd is empty");
    session.frontend.set_vring_call(0, &full).expect("SET_VRING_CALL");
    for _ in 0..3 {
        submit_batch(&mut session);
        take_batch(&mut session);
    }
    drop(session);
    assert_serves(&daemon.socket(), 0);
}

/// An interrupt is a write of eight bytes, which must not go to whatever file a front-end passes.
#[test]
fn a_regular_file_as_call_descriptor_is_not_written() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let file = TempFile::new().expect("a file can be created").into_file();
    let call = file.try_clone().expect("a descriptor can be duplicated").into_raw_fd();
    // SAFETY: nothing else owns the descriptor.
    let call = unsafe { EventFd::from_raw_fd(call) };
    session.frontend.set_vring_call(0, &call).expect("SET_VRING_CALL");
    submit_batch(&mut session);
    take_batch(&mut session);
    drop(session);
    assert_serves(&daemon.socket(), 0);
    assert_eq!(file.metadata().expect("the file is open").len(), 0, "an interrupt was written to the file");
}

/// VMMs replace the descriptor of a running ring, for example when the guest masks its interrupt.
#[test]
fn a_replaced_call_descriptor_gets_the_interrupts_of_a_running_ring() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(1, 0, 512));
    let call = EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
    session.frontend.set_vring_call(0, &call).expect("SET_VRING_CALL");
    session.rings[0].call = call;
    session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(512));
    session.rings[0].notify();
    poll_until("the completion", TIMEOUT, || session.rings[0].take_used());
    assert!(readable(&[session.rings[0].call.as_raw_fd()], TIMEOUT));
}
