//! A cache in huge pages survives its daemon like any other, and so does what a smaller file records of the guest. A
//! shortage of huge pages keeps the daemon from starting.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::common::daemon::{TempDir, run_to_end, server_binary};
use super::common::request::{Payload, pattern};
use super::common::session::{Session, SessionOptions};
use super::guest::FrontEnd;
use super::{Ends, IOERR, assert_survives, start_in, write_and_kill};

/// Number of the host's huge pages of 2 MiB, and of those that are free.
const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// Held by the test that reserves huge pages: the host has one number of them.
static RESERVATION: Mutex<()> = Mutex::new(());

/// Huge pages reserved for a test, mounted where the daemons of a directory keep their caches.
struct HugePages {
    _reservation: MutexGuard<'static, ()>,
    mount_point: PathBuf,
    /// The host's number of huge pages before the test.
    count_before: u64,
}

fn number(path: &str) -> u64 {
    fs::read_to_string(path).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

fn run(program: &str, arguments: &[&str], path: &Path) -> bool {
    Command::new(program).args(arguments).arg(path).status().is_ok_and(|status| status.success())
}

impl HugePages {
    /// `None`, after a message, if the host has no such pages, or does not let this user reserve them.
    fn new(directory: &TempDir, pages: u64) -> Option<Self> {
        let reserved = Self::reserve(directory.memory(), pages);
        if reserved.is_none() {
            println!("SKIPPED: this user cannot reserve huge pages of 2 MiB on this host");
        }
        reserved
    }

    fn reserve(mount_point: PathBuf, pages: u64) -> Option<Self> {
        // A test that failed with the lock held has returned its pages.
        let reservation = RESERVATION.lock().unwrap_or_else(PoisonError::into_inner);
        fs::create_dir_all(&mount_point).expect("a directory can be created");
        run("mount", &["-t", "hugetlbfs", "-o", "pagesize=2M", "none"], &mount_point).then_some(())?;
        let reserved = Self { _reservation: reservation, mount_point, count_before: number(COUNT) };
        fs::write(COUNT, (reserved.count_before + pages).to_string()).ok()?;
        (number(FREE) == pages).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        run("umount", &["--lazy"], &self.mount_point);
        // TempDir could not remove it while it was mounted.
        let _ = fs::remove_dir(&self.mount_point);
        let _ = fs::write(COUNT, self.count_before.to_string());
    }
}

#[test]
fn a_cache_in_huge_pages_survives_kills() {
    let directory = TempDir::new("huge");
    let Some(pages) = HugePages::new(&directory, 8) else { return };
    let device = "num_queues = 4\ncache.size = \"6M\"\ncache.survive = \"always\"";
    let kills = Ends { signal: libc::SIGKILL, times: 3 };
    let mut daemon = assert_survives(start_in(directory, device), FrontEnd::Qemu, kills, 205, |_| {});
    assert_eq!(number(FREE), 8, "an orderly end frees the pages");

    // A cache of another size needs the first one's pages, so they must be free once its contents are on the image.
    daemon.restart();
    let (session, bytes) = write_and_kill(&mut daemon);
    daemon.reconfigure("cache.size = \"14M\"\ncache.survive = \"always\"");
    drop(session);
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "the dirty pages are on the image");
    daemon.stop();

    daemon.configure("cache.size = \"32M\"\ncache.survive = \"always\"");
    let refused = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(refused.stderr.contains("cannot allocate a cache of 33554432 bytes in "), "{refused:?}");
    assert_eq!(number(FREE), 8, "the failed attempt frees its pages");
    drop(daemon);
    drop(pages);
}

#[test]
fn a_volatile_cache_with_its_marker_in_huge_pages_reports_a_data_loss() {
    const VOLATILE: &str = "cache.survive = \"never\"\ncache.dirty_age_max_ms = 600000";
    let directory = TempDir::new("huge");
    let Some(pages) = HugePages::new(&directory, 8) else { return };
    let mut daemon = start_in(directory, VOLATILE);
    let (session, _) = write_and_kill(&mut daemon);
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let status = session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status;
    assert_eq!(status, IOERR, "the guest must not read stale data");
    drop(session);
    Session::open(&daemon.socket(), &SessionOptions::default()).write(0, &pattern(8, 0, 512));
    daemon.stop();
    assert_eq!(number(FREE), 8, "an orderly end frees the marker");
    drop(daemon);
    drop(pages);
}

#[test]
fn the_write_through_mode_is_kept_in_one_huge_page() {
    let directory = TempDir::new("huge");
    let Some(pages) = HugePages::new(&directory, 8) else { return };
    let mut daemon = start_in(directory, "cache.size = \"6M\"\ncache.dirty_age_max_ms = 600000");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.set_writeback(false);
    daemon.stop();
    assert_eq!(number(FREE), 7, "the choice takes one page, the cache none");
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let bytes = pattern(3, 80, 4096);
    session.write(80, &bytes);
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "a completed write is on the image");
    session.set_writeback(true);
    drop(session);
    daemon.stop();
    assert_eq!(number(FREE), 8, "without the choice nothing is kept");
    drop(daemon);
    drop(pages);
}

#[test]
fn genblk_recover_lists_a_cache_in_huge_pages_and_writes_it_back() {
    let directory = TempDir::new("huge");
    let Some(_pages) = HugePages::new(&directory, 6) else { return };
    let mut daemon =
        start_in(directory, "cache.size = \"8M\"\ncache.survive = \"always\"\ncache.dirty_age_max_ms = 600000");
    let (_, bytes) = write_and_kill(&mut daemon);
    let genblk = |argument: &Path| run_to_end(Command::new(server_binary()).arg("recover").arg(argument));
    let left = daemon.directory().left().remove(0);
    let listed = genblk(left.parent().expect("a file has a folder"));
    assert!(listed.stdout.contains("  10            4 "), "MiB and dirty pages: {listed:?}");
    let recovered = genblk(&left);
    assert!(recovered.stdout.starts_with("wrote 4 pages to "), "{recovered:?}");
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "the completed write is on the image");
}
