//! The daemon on a disk with a volatile write cache: after a power cut the platter holds what FLUSH and write-through
//! promise, with both I/O engines, also after the disk has failed syncs and lost its unsynced writes.
//!
//! The disk is a file on a FUSE file system that this process serves. No other test notices a store that ignores a
//! Sync: the host's page cache keeps the data. A host that cannot mount FUSE file systems skips these tests.
//!
//! | module | what it is |
//! |---|---|
//! | [`disk`] | the disk: platter, write cache, failures, power |
//! | [`mount`] | its file system |
//! | [`machine`] | the daemon on it |
//! | [`guest`] | a guest with random requests, which outlives daemons and power cuts |
//! | [`oracle`] | what each sector may hold, for a read and on the platter |
//!
//! Each of these bugs was planted by hand, and these tests found it:
//!
//! | bug | test |
//! |---|---|
//! | io_uring's Sync is a no-op | `a_flush_covers_completed_requests_with_io_uring` |
//! | the thread pool's Sync is a no-op | `a_flush_covers_completed_requests_with_threads` |
//! | a write-through WRITE ZEROES is not flushed | `a_write_through_request_is_stable_when_it_completes_with_*` |
//! | no flush when the guest turns write-through on | `turning_write_through_on_flushes_with_*` |
//! | a Sync covers writes that complete after its submission | `a_flush_covers_a_write_that_completed_during_a_sync` |
//! | only the writes of a failed Sync are repeated | `a_flush_covers_a_write_that_completed_during_a_failed_sync` |
//! | writes in flight at a failed Sync are not repeated | `a_flush_covers_a_write_that_completed_after_a_failed_sync` |
//! | after a failed Sync, zeroes are read from the disk | `a_flush_after_a_failed_sync_covers_what_was_lost_with_*` |
//! | after a failed write, unsynced ones are not repeated | `a_flush_after_a_failed_write_covers_what_was_lost` |

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sizes are small"
)]

#[path = "../common/mod.rs"]
mod common;
mod disk;
mod guest;
mod machine;
mod mount;
mod oracle;

use std::thread;
use std::time::{Duration, Instant};

use genblk::config::Engine;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_OUT};

use common::SECTOR_BYTES;
use common::daemon::has_ended;
use common::prng::{Prng, seed};
use common::request::{OK, Payload, Pending, pattern, range};
use common::session::Session;
use common::wait::{ABSENCE, TIMEOUT, poll_until};
use disk::{Loss, OpClass};
use guest::Guest;
use machine::{Machine, PATCH_BYTES};
use oracle::Oracle;

/// How long a test with random requests runs.
const RANDOM_TIME: Duration = Duration::from_secs(6);
/// VIRTIO_BLK_S_IOERR, the status of a request that failed.
const IOERR: u8 = 1;

/// Waits for the next completion, which must be that of `pending`. Returns its status.
#[track_caller]
fn status_of(session: &mut Session, pending: &Pending) -> u8 {
    let used = session.rings[0].wait_used(TIMEOUT);
    assert_eq!(used.head, pending.head, "the first request to complete");
    session.outcome(pending, used).status
}

/// Writes whole pages and parts of pages, to data and to holes, and zeroes data. Returns the first sector and the new
/// bytes of each range.
fn change_disk(session: &mut Session, mark: u64) -> Vec<(u64, Vec<u8>)> {
    let hole = (PATCH_BYTES / SECTOR_BYTES) as u64;
    let writes = [(0, 4096), (43, 512), (101, 1536), (hole, 4096), (hole + 801, 70 * 512)];
    let mut changed = Vec::new();
    for (first, len) in writes {
        let bytes = pattern(mark, first, len);
        session.write(first, &bytes);
        changed.push((first, bytes));
    }
    for (first, count) in [(16, 8), (201, 100)] {
        assert_eq!(session.write_zeroes(&[range(first, count, 0)]), OK);
        changed.push((first, vec![0; count as usize * SECTOR_BYTES]));
    }
    changed
}

// FLUSH.

fn a_flush_covers_completed_requests(engine: Engine) {
    let Some(mut machine) = Machine::start(engine, 1) else { return };
    let mut session = machine.session();
    for mark in 2..5 {
        let changed = change_disk(&mut session, mark);
        session.flush();
        changed.iter().for_each(|(first, bytes)| machine.assert_stable(*first, bytes));
    }
    let changed = change_disk(&mut session, 5);
    session.flush();
    machine.cut_power(Loss::All);
    machine.restore_power();
    let mut session = machine.session();
    for (first, bytes) in changed {
        assert!(session.read(first, bytes.len()) == bytes, "sector {first} after the power cut");
    }
}

#[test]
fn a_flush_covers_completed_requests_with_io_uring() {
    a_flush_covers_completed_requests(Engine::IoUring);
}

#[test]
fn a_flush_covers_completed_requests_with_threads() {
    a_flush_covers_completed_requests(Engine::Threads);
}

/// The guest may have ended, and then sends no FLUSH any more.
#[test]
fn a_disconnection_makes_completed_requests_stable() {
    let Some(mut machine) = Machine::start(Engine::IoUring, 8) else { return };
    machine.daemon.stop();
    machine.daemon.reconfigure("num_queues = 1\ncache.size = \"4M\"\ncache.dirty_age_max_ms = 600000");
    let mut session = machine.session();
    let changed = change_disk(&mut session, 2);
    drop(session);
    poll_until("a flush", TIMEOUT, || {
        let platter = machine.platter();
        let is_stable = |(first, bytes): &(u64, Vec<u8>)| platter[*first as usize * SECTOR_BYTES..].starts_with(bytes);
        changed.iter().all(is_stable).then_some(())
    });
}

/// The daemon dies during a Sync that fails and resets the disk. The next daemon does not see the failure.
fn a_flush_after_a_kill_covers_what_the_killed_daemon_wrote(engine: Engine) {
    let Some(mut machine) = Machine::start(engine, 2) else { return };
    let mut session = machine.session();
    let changed = change_disk(&mut session, 2);
    machine.disk.hold(OpClass::Sync);
    session.submit(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    session.rings[0].notify();
    machine.wait_until_held(OpClass::Sync, 1);
    let killed = machine.daemon.disk_processes();
    machine.daemon.signal(libc::SIGKILL);
    machine.disk.fail(OpClass::Sync, 100);
    // The killed process ends when its Sync does. Until then it has the listening socket.
    machine.disk.release(OpClass::Sync);
    machine.daemon.wait();
    poll_until("the killed process to end", TIMEOUT, || killed.iter().all(|pid| has_ended(*pid)).then_some(()));
    machine.disk.fail(OpClass::Sync, 0);
    machine.daemon.restart();
    let mut session = machine.session();
    for (first, bytes) in &changed {
        assert!(session.read(*first, bytes.len()) == *bytes, "sector {first} after the kill");
    }
    session.flush();
    changed.iter().for_each(|(first, bytes)| machine.assert_stable(*first, bytes));
}

#[test]
fn a_flush_after_a_kill_covers_what_the_killed_daemon_wrote_with_io_uring() {
    a_flush_after_a_kill_covers_what_the_killed_daemon_wrote(Engine::IoUring);
}

#[test]
fn a_flush_after_a_kill_covers_what_the_killed_daemon_wrote_with_threads() {
    a_flush_after_a_kill_covers_what_the_killed_daemon_wrote(Engine::Threads);
}

// Write-through.

fn a_write_through_request_is_stable_when_it_completes(engine: Engine) {
    let Some(machine) = Machine::start(engine, 3) else { return };
    let mut session = machine.session();
    session.set_writeback(false);
    for (first, len) in [(0, 4096), (43, 512), (512, 70 * 512)] {
        let bytes = pattern(2, first, len);
        session.write(first, &bytes);
        machine.assert_stable(first, &bytes);
    }
    for (first, count) in [(16, 8), (201, 100)] {
        assert_eq!(session.write_zeroes(&[range(first, count, 0)]), OK);
        machine.assert_stable(first, &vec![0; count as usize * SECTOR_BYTES]);
    }
}

#[test]
fn a_write_through_request_is_stable_when_it_completes_with_io_uring() {
    a_write_through_request_is_stable_when_it_completes(Engine::IoUring);
}

#[test]
fn a_write_through_request_is_stable_when_it_completes_with_threads() {
    a_write_through_request_is_stable_when_it_completes(Engine::Threads);
}

fn turning_write_through_on_flushes(engine: Engine) {
    let Some(machine) = Machine::start(engine, 4) else { return };
    let mut session = machine.session();
    let changed = change_disk(&mut session, 2);
    session.set_writeback(false);
    changed.iter().for_each(|(first, bytes)| machine.assert_stable(*first, bytes));
}

#[test]
fn turning_write_through_on_flushes_with_io_uring() {
    turning_write_through_on_flushes(Engine::IoUring);
}

#[test]
fn turning_write_through_on_flushes_with_threads() {
    turning_write_through_on_flushes(Engine::Threads);
}

// Syncs that fail.

fn a_flush_after_a_failed_sync_covers_what_was_lost(engine: Engine) {
    let Some(machine) = Machine::start(engine, 5) else { return };
    let mut session = machine.session();
    let changed = change_disk(&mut session, 2);
    machine.disk.fail(OpClass::Sync, 100);
    assert_eq!(session.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty).status, IOERR);
    machine.disk.fail(OpClass::Sync, 0);
    for (first, bytes) in &changed {
        assert!(session.read(*first, bytes.len()) == *bytes, "sector {first} after the reset");
    }
    session.flush();
    changed.iter().for_each(|(first, bytes)| machine.assert_stable(*first, bytes));
}

#[test]
fn a_flush_after_a_failed_sync_covers_what_was_lost_with_io_uring() {
    a_flush_after_a_failed_sync_covers_what_was_lost(Engine::IoUring);
}

#[test]
fn a_flush_after_a_failed_sync_covers_what_was_lost_with_threads() {
    a_flush_after_a_failed_sync_covers_what_was_lost(Engine::Threads);
}

/// A failed write resets the disk, which loses an earlier write. The next Sync succeeds.
#[test]
fn a_flush_after_a_failed_write_covers_what_was_lost() {
    for engine in [Engine::IoUring, Engine::Threads] {
        let Some(machine) = Machine::start(engine, 7) else { return };
        let mut session = machine.session();
        let (earlier, later) = ((0, pattern(2, 0, 4096)), (4096, pattern(3, 4096, 4096)));
        session.write(earlier.0, &earlier.1);
        poll_until("write-back while the guest is idle", TIMEOUT, || (machine.disk.unsynced() == 1).then_some(()));
        machine.disk.fail(OpClass::Write, 100);
        session.write(later.0, &later.1);
        assert_eq!(session.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty).status, IOERR);
        machine.disk.fail(OpClass::Write, 0);
        session.flush();
        for (first, bytes) in [earlier, later] {
            machine.assert_stable(first, &bytes);
        }
    }
}

/// When a write completes that is in flight together with a Sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteCompletes {
    DuringTheSync,
    AfterTheSync,
}

/// How the Sync of a test ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SyncEnds {
    Well,
    /// It fails, and the disk loses all unsynced writes.
    InAReset,
}

/// A Sync is in flight, and with it a write that it does not cover. (With io_uring only: the kernel locks a file on
/// FUSE during the write and sync system calls of the thread pool.)
fn a_flush_covers_a_write_in_flight_with_a_sync(write_completes: WriteCompletes, sync_ends: SyncEnds) {
    let Some(machine) = Machine::start(Engine::IoUring, 6) else { return };
    let mut session = machine.session();
    // Far apart: two store operations.
    let (covered, other) = ((0, pattern(2, 0, 4096)), (4096, pattern(3, 4096, 4096)));
    machine.disk.hold(OpClass::Write);
    machine.disk.hold(OpClass::Sync);
    session.write(covered.0, &covered.1);
    let flush = session.submit(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    session.rings[0].notify();
    machine.wait_until_held(OpClass::Write, 1);
    // The FLUSH does not cover this write. It is written back because the guest is idle.
    let write = session.submit(0, VIRTIO_BLK_T_OUT, other.0, Payload::Send(&other.1));
    session.rings[0].notify();
    assert_eq!(status_of(&mut session, &write), OK);
    machine.wait_until_held(OpClass::Write, 2);
    machine.disk.release_oldest(OpClass::Write);
    machine.wait_until_held(OpClass::Sync, 1);
    if write_completes == WriteCompletes::DuringTheSync {
        machine.disk.release(OpClass::Write);
        // Time for the daemon to reap the completion.
        thread::sleep(ABSENCE);
    }
    let (failing, status) = if sync_ends == SyncEnds::Well { (0, OK) } else { (100, IOERR) };
    machine.disk.fail(OpClass::Sync, failing);
    machine.disk.release(OpClass::Sync);
    assert_eq!(status_of(&mut session, &flush), status);
    machine.disk.fail(OpClass::Sync, 0);
    machine.disk.release(OpClass::Write);
    session.flush();
    for (first, bytes) in [covered, other] {
        machine.assert_stable(first, &bytes);
    }
}

#[test]
fn a_flush_covers_a_write_that_completed_during_a_sync() {
    a_flush_covers_a_write_in_flight_with_a_sync(WriteCompletes::DuringTheSync, SyncEnds::Well);
}

#[test]
fn a_flush_covers_a_write_that_completed_during_a_failed_sync() {
    a_flush_covers_a_write_in_flight_with_a_sync(WriteCompletes::DuringTheSync, SyncEnds::InAReset);
}

#[test]
fn a_flush_covers_a_write_that_completed_after_a_sync() {
    a_flush_covers_a_write_in_flight_with_a_sync(WriteCompletes::AfterTheSync, SyncEnds::Well);
}

#[test]
fn a_flush_covers_a_write_that_completed_after_a_failed_sync() {
    a_flush_covers_a_write_in_flight_with_a_sync(WriteCompletes::AfterTheSync, SyncEnds::InAReset);
}

// Random requests.

/// How the disk of a test with random requests behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failures {
    None,
    /// One Sync in four fails, and the disk loses all unsynced writes.
    Resets,
}

/// Runs random requests in rounds. A round ends with or without a power cut or a kill, and then with a FLUSH.
fn random_requests_survive(engine: Engine, failures: Failures, default_seed: u64) {
    let seed = seed(default_seed);
    let Some(mut machine) = Machine::start(engine, seed) else { return };
    let mut prng = Prng::new(seed);
    let mut guest = Guest::start(&machine.daemon, Oracle::new(&machine.platter()), seed);
    let end = Instant::now() + RANDOM_TIME;
    while Instant::now() < end {
        guest.may_fail = failures == Failures::Resets;
        machine.disk.fail(OpClass::Sync, if guest.may_fail { 25 } else { 0 });
        machine.disk.delay(Duration::from_micros(prng.pick(&[0, 300, 3000])));
        guest.set_write_through(prng.percent(25));
        guest.run(Instant::now() + Duration::from_millis(20 + prng.below(150)));
        match prng.below(3) {
            0 => {
                let platter = machine.cut_power(prng.pick(&[Loss::All, Loss::AllBut(30), Loss::AllBut(70)]));
                guest.oracle.check_platter(&platter).unwrap_or_else(|wrong| panic!("after a power cut: {wrong}"));
                machine.restore_power();
                guest = guest.reboot(&machine.daemon, &platter);
            }
            1 => {
                machine.daemon.kill();
                machine.daemon.restart();
                guest.reconnect(&machine.daemon);
            }
            _ => {}
        }
        guest.drain();
        machine.disk.fail(OpClass::Sync, 0);
        poll_until("a FLUSH to succeed", TIMEOUT, || guest.flush().then_some(()));
        guest.may_fail = false;
        guest.oracle.check_platter(&machine.platter()).unwrap_or_else(|wrong| panic!("after a FLUSH: {wrong}"));
        guest.check_everything();
    }
    println!("{} requests, {} FLUSHes, {} resets", guest.completed, guest.flushes, machine.disk.resets());
    assert!(guest.flushes > 10, "only {} FLUSHes succeeded", guest.flushes);
    assert_eq!(machine.disk.resets() > 0, failures == Failures::Resets, "whether the disk failed");
}

#[test]
fn random_requests_survive_power_cuts_and_kills_with_io_uring() {
    random_requests_survive(Engine::IoUring, Failures::None, 101);
}

#[test]
fn random_requests_survive_power_cuts_and_kills_with_threads() {
    random_requests_survive(Engine::Threads, Failures::None, 102);
}

#[test]
fn random_requests_survive_resets_of_the_disk_with_io_uring() {
    random_requests_survive(Engine::IoUring, Failures::Resets, 103);
}

#[test]
fn random_requests_survive_resets_of_the_disk_with_threads() {
    random_requests_survive(Engine::Threads, Failures::Resets, 104);
}
