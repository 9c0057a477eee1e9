//! Zeros that a guest was promised and that no Sync covers: no frame holds them, and they are there all the same.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::common::SECTOR_BYTES;
use super::common::daemon::{Daemon, run_to_end, server_binary};
use super::common::request::{OK, Payload, pattern, range};
use super::common::session::{Session, SessionOptions};
use super::{IOERR, start, write_and_die};

const DEVICE: &str = "cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000";
/// The sectors that are zeroed, and one of them that is written later.
const FIRST: u64 = 90;
const COUNT: usize = 60;
const WRITTEN: u64 = 100;

/// A session with one ring whose guest has zeroed what was stable, and then written a part. The daemon is dead, and the
/// image has lost the zeros, as after a Sync that failed.
fn zero_and_die(daemon: &mut Daemon) -> Session {
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let stable = pattern(1, 0, 256 * SECTOR_BYTES);
    session.write(0, &stable);
    session.flush();
    assert_eq!(session.write_zeroes(&[range(FIRST, COUNT as u32, 0)]), OK);
    session.write(WRITTEN, &pattern(2, WRITTEN, SECTOR_BYTES));
    daemon.kill();
    let image = File::options().write(true).open(daemon.image()).expect("the image is there");
    image.write_all_at(&stable, 0).expect("the image can be written");
    session
}

/// What the guest knows of its first 256 sectors.
fn expected() -> Vec<u8> {
    let mut bytes = pattern(1, 0, 256 * SECTOR_BYTES);
    let at = |sector: u64| sector as usize * SECTOR_BYTES;
    bytes[at(FIRST)..at(FIRST) + COUNT * SECTOR_BYTES].fill(0);
    bytes[at(WRITTEN)..at(WRITTEN + 1)].copy_from_slice(&pattern(2, WRITTEN, SECTOR_BYTES));
    bytes
}

#[test]
fn a_successor_zeroes_again_what_no_sync_covers() {
    let mut daemon = start(DEVICE);
    let session = zero_and_die(&mut daemon);
    // One that dies at once must not make it forgotten.
    daemon.restart();
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert!(session.read(0, 256 * SECTOR_BYTES) == expected());
    session.flush();
    assert!(daemon.image_bytes(0, 256 * SECTOR_BYTES) == expected());
    daemon.stop();
    assert!(daemon.directory().left().is_empty(), "nothing is left to be zeroed");
}

#[test]
fn another_size_of_cache_zeroes_again_what_no_sync_covers() {
    let mut daemon = start(DEVICE);
    let _guest = zero_and_die(&mut daemon);
    daemon.reconfigure("cache.size = \"16M\"");
    assert!(daemon.image_bytes(0, 256 * SECTOR_BYTES) == expected());
}

#[test]
fn zeros_that_no_sync_covers_are_listed_and_written_by_hand() {
    let mut daemon = start(DEVICE);
    let _guest = zero_and_die(&mut daemon);
    let left = daemon.directory().left();
    let genblk = |argument: &std::path::Path| {
        let option = if argument.is_dir() { &["recover", "--memory-dir"][..] } else { &["recover"] };
        run_to_end(Command::new(server_binary()).args(option).arg(argument)).stdout
    };
    let listed = genblk(&daemon.directory().memory());
    assert!(listed.ends_with(" pages, 1 of them not on the image; zeroed ranges: 1\n"), "{listed}");
    let recovered = genblk(&left[0]);
    assert!(recovered.starts_with("1 pages are written to "), "{recovered}");
    assert!(daemon.image_bytes(0, 256 * SECTOR_BYTES) == expected());
    assert!(daemon.directory().left().is_empty());
}

#[test]
fn a_volatile_cache_fails_a_guest_whose_zeros_no_sync_covers() {
    let mut daemon = start(&format!("{DEVICE}\ncache.survive = \"never\""));
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.write_zeroes(&[range(FIRST, COUNT as u32, 0)]), OK);
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert_eq!(session.run(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(512)).status, IOERR);
}

/// Layout 1 has no table of zeroed ranges, and the frames' entries in its place.
#[test]
fn a_ledger_of_the_first_layout_is_written_to_the_image() {
    let mut daemon = start(DEVICE);
    let (_guest, bytes) = write_and_die(&mut daemon);
    let left = &daemon.directory().left()[0];
    let mut ledger = std::fs::read(left).expect("it can be read");
    ledger.drain(4096..8192);
    ledger[8] = 1;
    std::fs::write(left, ledger).expect("it can be written");
    daemon.restart();
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes);
    let told = "a cache of another shape or place was left: its 4 dirty pages are on the image now";
    assert!(daemon.log().contains(told), "{}", daemon.log());
}
