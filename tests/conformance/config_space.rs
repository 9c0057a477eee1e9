//! The configuration space: GET_CONFIG, SET_CONFIG, and the cache mode that a driver sets there.

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use crate::common::SECTOR_BYTES;
use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::raw_message::{self, Reply, number};
use crate::common::request::{assert_serves, pattern};
use crate::common::session::{CONFIG_BYTES, CONFIG_WRITEBACK, Session, SessionOptions, feature};
use crate::{IMAGE_BYTES, SPARE_SECTOR};

/// Size of the header of a GET_CONFIG or SET_CONFIG payload.
const CONFIG_HEADER_BYTES: usize = 12;

fn start() -> Daemon {
    Daemon::start("config", IMAGE_BYTES, &DaemonOptions::default())
}

/// The body of a GET_CONFIG or SET_CONFIG message.
fn config_body(offset: u32, size: u32, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_le_bytes()[..], &size.to_le_bytes(), &0_u32.to_le_bytes(), bytes].concat()
}

/// The configuration that a new front-end reads.
fn fresh_config(daemon: &Daemon) -> Vec<u8> {
    Session::open(&daemon.socket(), &SessionOptions::default()).config(0, CONFIG_BYTES)
}

#[test]
fn config_reads_of_every_offset_and_size_are_correct() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let whole = session.config(0, CONFIG_BYTES);
    assert_eq!(session.capacity_sectors(), IMAGE_BYTES / SECTOR_BYTES as u64, "the capacity is the image's size");
    assert!(whole[8..].iter().any(|&byte| byte != 0), "the fields after the capacity distinguish offsets");
    for offset in 0..CONFIG_BYTES {
        for len in 1..=CONFIG_BYTES - offset {
            let found = session.config(offset as u32, len);
            assert_eq!(found, whole[offset..offset + len], "{len} bytes at {offset}");
        }
    }
}

/// Reads that start inside the configuration and end after it, that start after it, or that use the offset of the PCI
/// configuration window as old versions of cloud-hypervisor do (T7, T14).
#[test]
fn config_reads_past_the_end_do_not_stop_the_daemon() {
    /// Size of the largest configuration that virtio 1.2 defines. Bytes between ours and this may have any value.
    const CONFIG_BYTES_MAX: usize = 96;
    const LEGACY_WINDOW: u32 = 0x100;
    let mut daemon = start();
    let whole = fresh_config(&daemon);
    for (offset, size) in
        [(56, 8), (60, 4), (0, 256), (64, 64), (255, 1), (LEGACY_WINDOW, 60), (LEGACY_WINDOW, 8), (u32::MAX, 8)]
    {
        let session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
        let body = config_body(offset, size, &vec![0; size as usize]);
        match raw_message::exchange(&session.socket, number::GET_CONFIG, 0, &body, &[]) {
            // The daemon may reject the read: with a reply without data, or by closing the connection.
            Reply::Closed => {}
            Reply::Payload(reply) if reply.len() <= CONFIG_HEADER_BYTES => {}
            Reply::Payload(reply) => {
                let found = &reply[CONFIG_HEADER_BYTES..];
                assert_eq!(found.len(), size as usize, "the reply to a read at {offset} has the requested size");
                let legacy = offset == LEGACY_WINDOW && found == &whole[..size as usize];
                let plausible = found.iter().zip(offset as usize..).all(|(&byte, at)| match whole.get(at) {
                    Some(&known) => byte == known,
                    None => byte == 0 || at < CONFIG_BYTES_MAX,
                });
                assert!(plausible || legacy, "{size} bytes at {offset}: {found:?}");
            }
            Reply::Silent => panic!("GET_CONFIG of {size} bytes at {offset} got no reply"),
        }
        daemon.assert_alive();
        drop(session);
        assert_serves(&daemon.socket(), SPARE_SECTOR);
    }
}

/// T3. The device may reject or ignore the other writes.
#[test]
fn only_writeback_can_be_set() {
    let mut daemon = start();
    let mut before = fresh_config(&daemon);
    before[CONFIG_WRITEBACK as usize] = 0;
    let capacity = (1_u64 << 40).to_le_bytes();
    for (offset, bytes) in [(0, &capacity[..]), (8, &[0xff; 8]), (20, &[0xff; 4]), (28, &[0xff; 8]), (56, &[1])] {
        let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
        // An error if the device rejects the write, success if it ignores it: both are correct.
        let _ = session.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes);
        drop(session);
        let mut after = fresh_config(&daemon);
        after[CONFIG_WRITEBACK as usize] = 0;
        assert_eq!(before, after, "{} bytes written at {offset}", bytes.len());
        daemon.assert_alive();
    }
    for (offset, size) in [(0, 4000), (32, 0), (u32::MAX, 8), (250, 16)] {
        let session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
        let body = config_body(offset, size, &vec![0xff; size.min(64) as usize]);
        let reply = session.raw(number::SET_CONFIG, &body);
        assert!(!reply.is_acknowledged(), "SET_CONFIG of {size} bytes at {offset}");
        drop(session);
        assert_serves(&daemon.socket(), SPARE_SECTOR);
    }
    daemon.assert_alive();
}

/// `writeback` starts as 1 if and only if writes may be volatile, which needs a driver that can flush (T5, T17).
#[test]
fn a_driver_that_cannot_flush_gets_write_through() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_ne!(session.offered & feature(VIRTIO_BLK_F_FLUSH), 0, "FLUSH is offered");
    assert_ne!(session.offered & feature(VIRTIO_BLK_F_CONFIG_WCE), 0, "CONFIG_WCE is offered");
    assert_eq!(session.config(CONFIG_WRITEBACK, 1), [1], "with FLUSH the cache is in write-back mode");
    drop(session);

    for (name, excluded) in
        [("CONFIG_WCE alone", &[VIRTIO_BLK_F_FLUSH][..]), ("neither", &[VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_CONFIG_WCE])]
    {
        let mut session = Session::open(&daemon.socket(), &SessionOptions::without(excluded));
        if session.has(VIRTIO_BLK_F_CONFIG_WCE) {
            assert_eq!(session.config(CONFIG_WRITEBACK, 1), [0], "{name}: the cache is in write-through mode");
        }
        assert_completed_writes_are_on_the_image(&daemon, &mut session, name);
    }
}

/// T6.
#[test]
fn write_through_takes_effect_as_soon_as_it_is_set() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let before = pattern(1, 2048, 1 << 20);
    session.write(2048, &before);
    session.set_writeback(false);
    assert_completed_writes_are_on_the_image(&daemon, &mut session, "writeback set to 0");
    session.flush();
    assert!(
        daemon.image_bytes(2048 * SECTOR_BYTES as u64, before.len()) == before,
        "a FLUSH still covers earlier writes"
    );
    session.set_writeback(true);
    let bytes = pattern(2, 0, 4096);
    session.write(0, &bytes);
    session.flush();
    assert_eq!(daemon.image_bytes(0, bytes.len()), bytes, "a FLUSH works after the return to write-back mode");
}

/// A guest that chose write-through sends no FLUSH, and its front-end does not set `writeback` again when it
/// reconnects. A new front-end gets the default.
#[test]
fn a_guest_keeps_write_through_across_reconnections() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.set_writeback(false);
    for _ in 0..2 {
        session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        assert_completed_writes_are_on_the_image(&daemon, &mut session, "after a reconnection");
        assert_eq!(session.config(CONFIG_WRITEBACK, 1), [0], "a running guest keeps its mode");
    }
    // Front-ends keep their copy of the mode across a reset.
    session.reset();
    session.start_ring(0);
    assert_completed_writes_are_on_the_image(&daemon, &mut session, "after a reset");
    drop(session);
    let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.config(0, 8).len(), 8, "the capacity can be read");
    assert_eq!(session.config(CONFIG_WRITEBACK, 1), [1], "a new front-end gets the default");
}

/// A front-end that resets the device and reads the cache mode adopts what it reads: it gets the default.
#[test]
fn a_front_end_that_reads_the_cache_mode_after_a_reset_gets_the_default() {
    let daemon = start();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.set_writeback(false);
    session.reset();
    assert_eq!(session.config(CONFIG_WRITEBACK, 1), [1]);
}

/// Front-ends may repeat SET_FEATURES while the device runs (QEMU does for dirty logging).
#[test]
fn repeated_set_features_keeps_the_guests_cache_mode() {
    let options = DaemonOptions { cache_mode: "writethrough", ..DaemonOptions::default() };
    let daemon = Daemon::start("repeated", IMAGE_BYTES, &options);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.config(CONFIG_WRITEBACK, 1), [0]);
    session.set_writeback(true);
    session.frontend.set_features(session.features).expect("SET_FEATURES");
    assert_eq!(session.config(CONFIG_WRITEBACK, 1), [1]);
}

/// Checks that writes of several sizes and alignments are on the image as soon as they complete.
#[track_caller]
fn assert_completed_writes_are_on_the_image(daemon: &Daemon, session: &mut Session, name: &str) {
    for ((sector, sectors), mark) in [(0, 8), (3, 1), (15, 2), (64, 256), (1000, 9)].into_iter().zip(100..) {
        let bytes = pattern(mark, sector, sectors * SECTOR_BYTES);
        session.write(sector, &bytes);
        let found = daemon.image_bytes(sector * SECTOR_BYTES as u64, bytes.len());
        assert!(found == bytes, "{name}: a completed write of {sectors} sectors at {sector} is on the image");
    }
}
