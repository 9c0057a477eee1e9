//! An image whose size is no multiple of 4096: its last page has sectors past its end, which are never written to it,
//! whatever a ledger says of them.

use std::fs::{self, File};
use std::process::Command;

use super::common::SECTOR_BYTES;
use super::common::daemon::{Daemon, TempDir, run_to_end, server_binary};
use super::common::request::pattern;
use super::common::session::{Session, SessionOptions};

const DEVICE: &str = "cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000";
const PAGE: u64 = 4096;
/// Sectors of the image before its last page.
const WHOLE: u64 = (16 << 20) / SECTOR_BYTES as u64;
/// Offset of the frames' records in a ledger.
const RECORDS_AT: usize = 12_288;

/// Kills a daemon with a completed write of all sectors, `tail` in number, of the last page of its image; returns the
/// bytes. The page's record says that it is dirty as a whole, as earlier versions of genblk recorded it.
fn write_tail_and_kill(tail: u64) -> (Daemon, Vec<u8>) {
    let directory = TempDir::new("cut");
    let image = File::create(directory.path().join("image"));
    image.and_then(|image| image.set_len((WHOLE + tail) * SECTOR_BYTES as u64)).expect("an image can be created");
    let mut daemon = Daemon::start_configured(directory, &[DEVICE]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(2, WHOLE, tail as usize * SECTOR_BYTES);
    session.write(WHOLE, &bytes);
    daemon.kill();
    let left = &daemon.directory().left()[0];
    let mut ledger = fs::read(left).expect("the file can be read");
    let (frames, []) = ledger[RECORDS_AT..].as_chunks_mut::<8>() else { panic!("the file has whole words") };
    let page = |record: &[u8; 8]| u64::from_le_bytes(*record) & ((1 << 40) - 1);
    let record = frames.iter_mut().find(|record| page(record) == WHOLE * SECTOR_BYTES as u64 / PAGE);
    record.expect("the page is recorded")[5..7].fill(0xff);
    fs::write(left, ledger).expect("the file can be written");
    (daemon, bytes)
}

/// Fails the test unless the image ends with these bytes, at its old size.
fn assert_tail(daemon: &Daemon, bytes: &[u8]) {
    let whole = WHOLE * SECTOR_BYTES as u64;
    assert!(daemon.image_bytes(whole, bytes.len()) == bytes, "the completed write is on the image");
    let size = fs::metadata(daemon.image()).expect("the image exists").len();
    assert_eq!(size, whole + bytes.len() as u64, "the image keeps its size");
}

#[test]
fn genblk_recover_writes_a_partial_last_page() {
    for tail in [1, 7] {
        let (daemon, bytes) = write_tail_and_kill(tail);
        let left = daemon.directory().left();
        let recovered = run_to_end(Command::new(server_binary()).arg("recover").arg(&left[0]));
        assert!(recovered.status.success() && recovered.stdout.starts_with("wrote 1 page to "), "{recovered:?}");
        assert_tail(&daemon, &bytes);
        assert!(daemon.directory().left().is_empty());
    }
}

#[test]
fn a_daemon_of_any_cache_size_writes_back_a_partial_last_page() {
    for size in ["8M", "16M"] {
        let (mut daemon, bytes) = write_tail_and_kill(3);
        daemon.reconfigure(&format!("cache.size = {size:?}"));
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert!(session.read(WHOLE, bytes.len()) == bytes);
        session.flush();
        drop(session);
        daemon.stop();
        assert_tail(&daemon, &bytes);
    }
}
