//! Front-ends that connect, disconnect, crash or reset their device, and clients that do not speak vhost-user.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
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
use crate::common::raw_message::{FLAG_NEED_REPLY, Reply, exchange, exchange_with_length, number};
use crate::common::raw_ring::Ring;
use crate::common::request::{OK, Payload, assert_serves, pattern};
use crate::common::session::{Session, SessionOptions, connect, feature};
use crate::common::wait::{ABSENCE, TIMEOUT, try_poll};
use crate::{IMAGE_BYTES, SPARE_SECTOR};

fn start() -> Daemon {
    Daemon::start("sessions", IMAGE_BYTES, &DaemonOptions::default())
}

#[test]
fn the_documented_features_are_offered() {
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
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ] {
        assert_ne!(session.offered & feature(number), 0, "feature {number} is offered");
    }
    assert_eq!(session.offered & feature(VIRTIO_BLK_F_RO), 0, "a writable disk is not read-only");
    // FreeBSD attaches no disk whose SIZE_MAX is below its largest transfer, which an administrator can set.
    assert_eq!(session.offered & feature(VIRTIO_BLK_F_SIZE_MAX), 0, "no limit of a segment's size");
    let protocol = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE;
    assert!(session.protocol.contains(protocol), "{:?}", session.protocol);
    let config = session.config(CONFIG_NUM_QUEUES, 2);
    assert_eq!(u16::from_le_bytes([config[0], config[1]]), 4, "the configured number of queues");
    assert!(session.frontend.get_queue_num().expect("GET_QUEUE_NUM") >= 4);
}

/// A daemon of version 0.1.0 offered SIZE_MAX. Its guest keeps the feature when a newer daemon takes its place.
#[test]
fn a_guest_of_an_earlier_version_keeps_its_features() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.features |= feature(VIRTIO_BLK_F_SIZE_MAX);
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    session.write(0, &pattern(1, 0, 4096));
    assert_eq!(session.read(0, 4096), pattern(1, 0, 4096));
}

/// A front-end that sets features which were not offered gets only the others. LOG_SHMFD would let it pass a log of
/// dirty pages, into which nothing is written.
#[test]
fn protocol_features_that_were_not_offered_have_no_effect() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let all = u64::MAX.to_le_bytes();
    let reply = exchange(&session.socket, number::SET_PROTOCOL_FEATURES, FLAG_NEED_REPLY, &all, &[]);
    assert!(reply.is_acknowledged(), "{reply:?}");
    assert_eq!(session.read(0, 512), [0; 512], "the features that were offered are in effect");
    let log = daemon.directory().path().join("dirty-log");
    let log = File::options().read(true).write(true).create(true).truncate(true).open(log).expect("a file for the log");
    log.set_len(1 << 20).expect("it can grow");
    let body = [(1_u64 << 20).to_le_bytes(), [0; 8]].concat();
    let reply = exchange(&session.socket, number::SET_LOG_BASE, 0, &body, &[log.as_raw_fd()]);
    assert_eq!(reply, Reply::Closed);
    assert_serves(&daemon.socket(), SPARE_SECTOR);
}

/// T16. Fifty front-ends crash with requests in flight. The next one is served like the first, and the daemon leaks no
/// file descriptor.
#[test]
fn crashed_front_ends_leak_no_descriptors() {
    const FRONT_ENDS: u64 = 50;
    /// By then the daemon has opened all descriptors that it keeps.
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
        // Crash before, during or after the requests.
        let awaited = prng.below(32) as u16;
        try_poll(TIMEOUT, || (session.rings[0].used_idx().wrapping_sub(started) >= awaited).then_some(()));
        drop(session);
        daemon.assert_alive();
        if nth == WARM_UP {
            descriptors = idle_descriptors(&daemon);
        }
    }
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.read(0, kept.len()) == kept, "seed {seed}: a read returns the written data");
    drop(session);
    let closed = try_poll(TIMEOUT, || (daemon.open_descriptors() <= descriptors).then_some(()));
    assert!(closed.is_some(), "{} descriptors are open, expected at most {descriptors}", daemon.open_descriptors());
    daemon.stop();
}

/// Number of descriptors of the daemon without a front-end: the minimum over some time.
fn idle_descriptors(daemon: &Daemon) -> usize {
    let mut least = daemon.open_descriptors();
    try_poll(4 * ABSENCE, || {
        least = least.min(daemon.open_descriptors());
        None::<()>
    });
    least
}

#[test]
fn a_second_front_end_is_served_after_the_first() {
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
    assert!(found == bytes, "the second front-end reads the first one's data");
}

/// RESET_DEVICE stops the rings. Set up again, the device works, and the disk keeps its data.
#[test]
fn a_reset_device_can_be_set_up_again() {
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
        // Like a VMM whose guest reboots, the front-end shares its memory again after the reset.
        session.share_memory();
        session.rings[0] = Ring::new(&session.memory, 128, 0, false);
        session.start_ring(0);
        let found = session.run(0, VIRTIO_BLK_T_IN, 8 * round, Payload::Receive(4096));
        assert_eq!(found.status, OK, "round {round}");
        assert!(found.data == bytes, "round {round}: the disk keeps its data");
    }
    daemon.assert_alive();
}

/// QEMU unplugs a device and plugs another one on the same character device: all messages of a new front-end, on the
/// connection of the old one, whose rings have stopped and whose memory was never unmapped.
#[test]
fn a_front_end_can_start_a_new_session_on_its_connection() {
    let mut daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for round in 1..=5 {
        let bytes = pattern(round, 8 * round, 4096);
        session.write(8 * round, &bytes);
        session.stop_ring(0);
        session = session.new_session();
        for region in session.memory.region_infos() {
            session.frontend.add_mem_region(&region).expect("ADD_MEM_REG");
        }
        session.rings = vec![Ring::new(&session.memory, 128, 0, false)];
        session.start_ring(0);
        assert!(session.read(8 * round, bytes.len()) == bytes, "round {round}: the disk keeps its data");
    }
    // A second SET_OWNER while a ring runs changes nothing.
    session.frontend.set_owner().expect("SET_OWNER of a running device");
    session.write(0, &pattern(9, 0, 4096));
    assert!(session.read(0, 4096) == pattern(9, 0, 4096));
    daemon.stop();
}

/// Random bytes, or only a part of a message.
#[test]
fn the_daemon_survives_garbage_on_the_socket() {
    let mut daemon = start();
    let mut prng = Prng::new(seed(17));
    for case in 0..20 {
        let mut socket = connect(&daemon.socket());
        match case {
            0 => {}
            1 => send(&mut socket, &[1]),
            // A part of a header, and a header without its body.
            2 => send(&mut socket, &[1, 0, 0, 0, 1, 0]),
            3 => send(&mut socket, &[&2_u32.to_le_bytes()[..], &1_u32.to_le_bytes(), &8_u32.to_le_bytes()].concat()),
            4 => {
                exchange_with_length(&socket, number::SET_MEM_TABLE, FLAG_NEED_REPLY, u32::MAX, &[0; 64], &[]);
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
    // The daemon may close the connection before it has read everything.
    let _ = socket.write_all(bytes);
}
