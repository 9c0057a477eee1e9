//! Front-ends that come, go, die, reset their device, or were never front-ends at all.

use std::io::Write;
use std::os::unix::net::UnixStream;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::common::SECTOR_BYTES;
use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::prng::{Prng, seed};
use crate::common::raw_message::{FLAG_NEED_REPLY, exchange_claiming, number};
use crate::common::raw_ring::Ring;
use crate::common::request::{OK, Payload, assert_serves, pattern};
use crate::common::session::{Session, SessionOptions, connect, feature};
use crate::common::wait::{ABSENCE, PATIENCE, try_poll};
use crate::{IMAGE_BYTES, SPARE_SECTOR};

fn start() -> Daemon {
    Daemon::start("sessions", IMAGE_BYTES, &DaemonOptions::default())
}

#[test]
fn everything_promised_is_offered() {
    const CONFIG_NUM_QUEUES: u32 = 34;
    let options = DaemonOptions { num_queues: 4, ..DaemonOptions::default() };
    let daemon = Daemon::start("sessions", IMAGE_BYTES, &options);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for number in [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ] {
        assert_ne!(session.offered & feature(number), 0, "feature {number} is offered");
    }
    assert_eq!(session.offered & feature(VIRTIO_BLK_F_RO), 0, "a writable disk is not read-only");
    let protocol = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE;
    assert!(session.protocol.contains(protocol), "{:?}", session.protocol);
    let config = session.config(CONFIG_NUM_QUEUES, 2);
    assert_eq!(u16::from_le_bytes([config[0], config[1]]), 4, "as many queues as were configured");
    assert!(session.frontend.get_queue_num().expect("GET_QUEUE_NUM") >= 4);
}

/// T16. Fifty front-ends die with requests in flight; the fifty-first finds the daemon as the first did, and no
/// file descriptor was lost on the way.
#[test]
fn front_ends_that_vanish_leave_nothing_behind() {
    const FRONT_ENDS: u64 = 50;
    /// By then the daemon has opened what it opens once and keeps.
    const WARM_UP: u64 = 5;
    let seed = seed(16);
    let mut prng = Prng::new(seed);
    let mut daemon = start();
    let kept = pattern(1, 0, 1 << 20);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &kept);
    drop(session);
    let mut descriptors = 0;
    for nth in 0..FRONT_ENDS {
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        let started = session.rings[0].used_idx();
        for _ in 0..32 {
            let sector = 2048 + prng.below(IMAGE_BYTES / SECTOR_BYTES as u64 - 4096);
            if prng.percent(50) {
                session.submit(0, VIRTIO_BLK_T_IN, sector, Payload::Receive(64 << 10));
            } else {
                session.submit(0, VIRTIO_BLK_T_OUT, sector, Payload::Send(&pattern(nth, sector, 64 << 10)));
            }
        }
        session.rings[0].notify();
        // Die before, amid or after the work.
        let some = prng.below(32) as u16;
        try_poll(PATIENCE, || (session.rings[0].used_idx().wrapping_sub(started) >= some).then_some(()));
        drop(session);
        daemon.assert_alive();
        if nth == WARM_UP {
            descriptors = idle_descriptors(&daemon);
        }
    }
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.read(0, kept.len()) == kept, "seed {seed}: what was written is read");
    drop(session);
    let left = try_poll(PATIENCE, || (daemon.open_descriptors() <= descriptors).then_some(()));
    assert!(left.is_some(), "{} descriptors are open, {descriptors} were", daemon.open_descriptors());
    daemon.stop();
}

/// How many descriptors the daemon holds once it has let go of its last front-end: the least that is seen.
fn idle_descriptors(daemon: &Daemon) -> usize {
    let mut least = daemon.open_descriptors();
    try_poll(4 * ABSENCE, || {
        least = least.min(daemon.open_descriptors());
        None::<()>
    });
    least
}

/// A front-end that comes while another is served waits for its turn, and gets it.
#[test]
fn the_next_front_end_is_served_after_this_one() {
    let daemon = start();
    let mut first = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(3, 0, 4096);
    let second = std::thread::spawn({
        let socket = daemon.socket();
        move || Session::open(&socket, &SessionOptions::default()).read(0, 4096)
    });
    for _ in 0..200 {
        first.write(0, &bytes);
    }
    drop(first);
    let found = second.join().expect("the second front-end is served");
    assert!(found == bytes, "and finds what the first one wrote");
}

/// RESET_DEVICE stops the rings; set up anew, the device is as good as new, and the disk as it was.
#[test]
fn a_reset_device_starts_anew() {
    let mut daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for round in 1..=10 {
        let bytes = pattern(round, 8 * round, 4096);
        session.write(8 * round, &bytes);
        session.frontend.reset_device().expect("RESET_DEVICE");
        let before = session.rings[0].used_idx();
        session.submit(0, VIRTIO_BLK_T_OUT, 8 * round, Payload::Send(&[0xee; 512]));
        session.rings[0].notify();
        let late = try_poll(ABSENCE / 4, || (session.rings[0].used_idx() != before).then_some(()));
        assert!(late.is_none(), "round {round}: a ring was served after the reset");

        session.frontend.set_features(session.features).expect("SET_FEATURES after a reset");
        // A front-end that sees a reset through, as a VMM does when its guest boots again, shares its memory anew.
        session.share_memory();
        session.rings[0] = Ring::new(&session.memory, 128, 0, false);
        session.start_ring(0);
        let found = session.run(0, VIRTIO_BLK_T_IN, 8 * round, Payload::Receive(4096));
        assert_eq!(found.status, OK, "round {round}");
        assert!(found.data == bytes, "round {round}: the disk is as it was");
    }
    daemon.assert_alive();
}

/// What is not a vhost-user message at all, or only half of one.
#[test]
fn rubbish_on_the_socket_is_survived() {
    let mut daemon = start();
    let mut prng = Prng::new(seed(17));
    for case in 0..20 {
        let mut socket = connect(&daemon.socket());
        match case {
            0 => {}
            1 => send(&mut socket, &[1]),
            // Half a header, and a header whose body never comes.
            2 => send(&mut socket, &[1, 0, 0, 0, 1, 0]),
            3 => send(&mut socket, &[&2_u32.to_le_bytes()[..], &1_u32.to_le_bytes(), &8_u32.to_le_bytes()].concat()),
            4 => {
                exchange_claiming(&socket, number::SET_MEM_TABLE, FLAG_NEED_REPLY, u32::MAX, &[0; 64], &[]);
            }
            _ => {
                let noise = prng.bytes(8 << (case % 8));
                send(&mut socket, &noise);
            }
        }
        drop(socket);
        daemon.assert_alive();
        assert_serves(&daemon.socket(), SPARE_SECTOR);
    }
}

fn send(socket: &mut UnixStream, bytes: &[u8]) {
    // The daemon may hang up before it has all of it.
    let _ = socket.write_all(bytes);
}
