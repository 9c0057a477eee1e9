//! The cache file loses its name while the daemon runs: that is told within seconds, and a loss of completed writes is
//! detected, as with a cache that does not outlive the daemon.

use std::fs;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::common::daemon::Daemon;
use super::common::request::{Payload, pattern};
use super::common::session::{Session, SessionOptions};
use super::{IOERR, start};

const DEVICE: &str = "cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000";

/// Removes the daemon's cache file in one of several ways, and waits until the daemon has noticed.
fn lose_file(daemon: &Daemon, way: &str) {
    let folder = daemon.directory().memory().join("genblk");
    let file = &daemon.directory().left()[0];
    match way {
        "file" => fs::remove_file(file),
        "folder" => fs::remove_dir_all(&folder),
        "everything" => fs::remove_dir_all(daemon.directory().memory()),
        _ => fs::rename(&folder, folder.with_extension("away")),
    }
    .expect("the file can be removed");
    daemon.await_log("the cache no longer survives a crash");
}

#[test]
fn a_kill_after_the_removal_of_the_cache_file_is_detected_as_a_loss() {
    for (way, survive) in
        [("file", "auto"), ("folder", "auto"), ("everything", "auto"), ("rename", "auto"), ("file", "never")]
    {
        let mut daemon = start(&format!("{DEVICE}\ncache.survive = {survive:?}"));
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.write(80, &pattern(1, 80, 4096));
        lose_file(&daemon, way);
        assert_eq!(session.read(80, 4096), pattern(1, 80, 4096), "{way}: the cache is still in use");
        daemon.kill();
        daemon.restart();
        let mut session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        let status = session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status;
        assert_eq!(status, IOERR, "{way}, {survive}: the guest must not read stale data");
    }
}

#[test]
fn an_unsynced_write_after_the_removal_of_the_cache_file_is_recorded() {
    for is_flushed in [false, true] {
        let mut daemon = start(DEVICE);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.read(80, 512);
        lose_file(&daemon, "file");
        session.write(80, &pattern(2, 80, 4096));
        if is_flushed {
            session.flush();
        }
        daemon.kill();
        daemon.restart();
        let mut session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        let status = session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status;
        assert_eq!(status == IOERR, !is_flushed, "flushed: {is_flushed}");
    }
}

#[test]
fn an_orderly_stop_after_the_removal_of_the_cache_file_writes_everything_back() {
    for signal in [libc::SIGTERM, libc::SIGUSR1] {
        let mut daemon = start(DEVICE);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.write(80, &pattern(3, 80, 4096));
        lose_file(&daemon, "file");
        drop(session);
        daemon.signal(signal);
        assert!(daemon.wait().success(), "{}", daemon.log());
        assert_eq!(daemon.image_bytes(80 * 512, 4096), pattern(3, 80, 4096), "signal {signal}");
        assert!(daemon.directory().left().is_empty(), "no marker is left");
    }
}
