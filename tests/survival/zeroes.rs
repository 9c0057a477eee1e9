//! WRITE_ZEROES requests that completed but that no sync covers: no frame holds the zeros, yet they survive the daemon.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::common::SECTOR_BYTES;
use super::common::daemon::{Daemon, run_to_end, server_binary};
use super::common::request::{OK, Payload, pattern, range};
use super::common::session::{Session, SessionOptions};
use super::tenures::remove_record;
use super::{IOERR, start, write_and_kill};

const DEVICE: &str = "cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000";
/// The zeroed sectors.
const FIRST: u64 = 90;
const COUNT: usize = 60;
/// The one of them that is written later.
const WRITTEN: u64 = 100;

/// Zeroes a range that was flushed before, then writes a part of it, and kills the daemon. The image loses the zeros,
/// as after a sync that failed.
fn zero_and_kill(daemon: &mut Daemon) -> Session {
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let stable = pattern(1, 0, 256 * SECTOR_BYTES);
    session.write(0, &stable);
    session.flush();
    assert_eq!(session.write_zeroes(&[range(FIRST, COUNT as u32, 0)]), OK);
    session.write(WRITTEN, &pattern(2, WRITTEN, SECTOR_BYTES));
    daemon.kill();
    let image = File::options().write(true).open(daemon.image()).expect("the image can be opened");
    // The next daemon must take what the image lacks for a lost write, not for a write by someone else.
    let modified = image.metadata().and_then(|metadata| metadata.modified()).expect("the image has times");
    image.write_all_at(&stable, 0).expect("the image can be written");
    image.set_modified(modified).expect("times can be set");
    session
}

/// What the guest must read from its first 256 sectors.
fn expected() -> Vec<u8> {
    let mut bytes = pattern(1, 0, 256 * SECTOR_BYTES);
    let at = |sector: u64| sector as usize * SECTOR_BYTES;
    bytes[at(FIRST)..at(FIRST) + COUNT * SECTOR_BYTES].fill(0);
    bytes[at(WRITTEN)..at(WRITTEN + 1)].copy_from_slice(&pattern(2, WRITTEN, SECTOR_BYTES));
    bytes
}

#[test]
fn the_next_daemon_repeats_pending_zeroes() {
    let mut daemon = start(DEVICE);
    let session = zero_and_kill(&mut daemon);
    // A daemon that dies at once must not forget the range.
    daemon.restart();
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert!(session.read(0, 256 * SECTOR_BYTES) == expected());
    session.flush();
    assert!(daemon.image_bytes(0, 256 * SECTOR_BYTES) == expected());
    daemon.stop();
    assert!(daemon.directory().left().is_empty(), "no cache is left");
}

#[test]
fn a_daemon_of_another_cache_size_repeats_pending_zeroes() {
    let mut daemon = start(DEVICE);
    let _guest = zero_and_kill(&mut daemon);
    daemon.reconfigure("cache.size = \"64M\"");
    assert!(daemon.image_bytes(0, 256 * SECTOR_BYTES) == expected());
}

#[test]
fn genblk_recover_lists_and_repeats_pending_zeroes() {
    let mut daemon = start(DEVICE);
    let _guest = zero_and_kill(&mut daemon);
    let left = daemon.directory().left();
    let genblk = |argument: &std::path::Path| {
        let option = if argument.is_dir() { &["recover", "--memory-dir"][..] } else { &["recover"] };
        run_to_end(Command::new(server_binary()).args(option).arg(argument)).stdout
    };
    let listed = genblk(&daemon.directory().memory());
    assert!(listed.contains("  1 range to be zeroed\n"), "{listed}");
    let recovered = genblk(&left[0]);
    assert!(recovered.starts_with("wrote 1 page to "), "{recovered}");
    assert!(daemon.image_bytes(0, 256 * SECTOR_BYTES) == expected());
    assert!(daemon.directory().left().is_empty());
}

#[test]
fn losing_pending_zeroes_of_a_volatile_cache_is_a_data_loss() {
    let mut daemon = start(&format!("{DEVICE}\ncache.survive = \"never\""));
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.write_zeroes(&[range(FIRST, COUNT as u32, 0)]), OK);
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert_eq!(session.run(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(512)).status, IOERR);
}

/// Layout 1 has no tables of ranges; the frames' records come in their place.
#[test]
fn a_cache_of_layout_1_is_written_to_the_image() {
    let mut daemon = start(DEVICE);
    let (_guest, bytes) = write_and_kill(&mut daemon);
    let left = &daemon.directory().left()[0];
    let mut ledger = std::fs::read(left).expect("the file can be read");
    ledger.drain(4096..12_288);
    ledger[8] = 1;
    std::fs::write(left, ledger).expect("the file can be written");
    // Versions with that layout recorded no tenures.
    remove_record(&daemon.image());
    daemon.restart();
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes);
    let message = "found a cache that does not fit the configuration; wrote its 4 dirty pages to the image";
    assert!(daemon.log().contains(message), "{}", daemon.log());
}
