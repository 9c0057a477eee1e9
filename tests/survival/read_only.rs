//! A read-only device beside the cache that an earlier daemon left for its image: it never serves data that is older
//! than a completed write, and it leaves the cache as it is.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::common::daemon::{Daemon, Ended, run_to_end, server_binary};
use super::common::request::{OK, Payload, pattern, range};
use super::common::session::{Session, SessionOptions};
use super::{IOERR, start, write_and_kill};

const WRITER: &str = "cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000";
const READER: &str = "read_only = true\ncache.size = \"8M\"";

/// Runs the daemon with the device `device`; it must exit.
fn run(daemon: &mut Daemon, device: &str) -> Ended {
    daemon.configure(device);
    run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()))
}

fn genblk_recover(arguments: &[&str]) {
    let ended = run_to_end(Command::new(server_binary()).arg("recover").args(arguments));
    assert!(ended.status.success(), "{ended:?}");
}

#[test]
fn a_read_only_start_is_refused_while_a_cache_is_dirty() {
    let mut daemon = start(WRITER);
    let (_guest, bytes) = write_and_kill(&mut daemon);
    let left = daemon.directory().left();
    let cache = fs::read(&left[0]).expect("the file can be read");
    fs::set_permissions(daemon.image(), fs::Permissions::from_mode(0o444)).expect("permissions can be changed");
    let refused = run(&mut daemon, READER);
    let file = left[0].to_str().expect("UTF-8");
    let image = daemon.image().display().to_string();
    let message = format!(
        "genblk: disk0: cannot serve image {image} read-only: {file} holds 4 dirty pages, not yet written to the \
         image; to keep the data, remove read_only and start the daemon again, or run \"genblk recover {file}\"; \
         otherwise remove it with \"genblk recover --discard {file}\"\n"
    );
    assert_eq!((refused.status.code(), refused.stderr.as_str()), (Some(1), message.as_str()));
    assert_eq!(daemon.directory().left(), left, "the cache stays");
    assert!(fs::read(file).expect("the file stays") == cache, "the cache is unchanged");

    fs::set_permissions(daemon.image(), fs::Permissions::from_mode(0o644)).expect("permissions can be changed");
    genblk_recover(&[file]);
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.read(80, bytes.len()) == bytes);
}

#[test]
fn a_read_only_start_is_refused_while_a_cache_has_a_pending_zero() {
    let mut daemon = start(WRITER);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.write_zeroes(&[range(88, 64, 0)]), OK);
    daemon.kill();
    let refused = run(&mut daemon, READER);
    assert!(refused.stderr.contains(" holds 0 dirty pages and 1 range to be zeroed, not yet written "), "{refused:?}");
    let left = daemon.directory().left();
    genblk_recover(&["--discard", "--force", left[0].to_str().expect("UTF-8")]);
    daemon.restart();
}

#[test]
fn a_read_only_start_leaves_a_clean_cache_for_the_next_writer() {
    let mut daemon = start(WRITER);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(3, 80, 16 << 10);
    session.write(80, &bytes);
    session.flush();
    drop(session);
    daemon.signal(libc::SIGUSR1);
    assert!(daemon.wait().success(), "{}", daemon.log());
    let left = daemon.directory().left();
    daemon.reconfigure(READER);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.read(80, bytes.len()) == bytes);
    drop(session);
    daemon.stop();
    assert_eq!(daemon.directory().left(), left, "the cache stays");
    daemon.reconfigure(WRITER);
    daemon.await_log("restored 4 cached pages (0 dirty)");
}

#[test]
fn a_read_only_device_fails_requests_after_a_data_loss() {
    let mut daemon = start(&format!("{WRITER}\ncache.survive = \"never\""));
    let (session, _) = write_and_kill(&mut daemon);
    let left = daemon.directory().left();
    daemon.reconfigure(READER);
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let status = session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status;
    assert_eq!(status, IOERR, "the guest must not read stale data");
    assert_eq!(daemon.directory().left(), left, "the marker stays");
    drop(session);
    Session::open(&daemon.socket(), &SessionOptions::default()).read(80, 512);
}
