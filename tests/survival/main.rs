//! The daemon dies, or is exchanged, and the guest lives on: every write that completed is there, and every request is
//! answered once.
//!
//! `GENBLK_KILLS` sets how often the daemon is killed (`make soak` kills it 200 times).

#![allow(clippy::cast_possible_truncation, reason = "sizes here are chosen by the tests, and small")]

#[path = "../common/mod.rs"]
mod common;
mod guest;
mod huge_pages;
mod systemd;
mod zeroed;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use common::SECTOR_BYTES;
use common::daemon::{Daemon, TempDir, run_to_end, server_binary};
use common::prng::{Prng, seed};
use common::request::{OK, Payload, pattern};
use common::session::{Session, SessionOptions};
use common::wait::{PATIENCE, poll_until, try_poll};
use guest::{FrontEnd, Guest};

const IMAGE_BYTES: u64 = 16 << 20;
const IMAGE_SECTORS: u64 = IMAGE_BYTES / SECTOR_BYTES as u64;
/// virtio-blk's status of a request that failed.
const IOERR: u8 = 1;

/// How often the daemon dies in a test.
fn kills() -> u64 {
    std::env::var("GENBLK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(20)
}

fn start(device: &str) -> Daemon {
    start_in(TempDir::new("kill"), device)
}

fn start_in(directory: TempDir, device: &str) -> Daemon {
    make_image(&directory);
    Daemon::start_configured(directory, &[device])
}

/// Makes a new image of zeros in a directory.
fn make_image(directory: &TempDir) {
    File::create(directory.path().join("image")).and_then(|image| image.set_len(IMAGE_BYTES)).expect("an image");
}

/// A daemon on a new image is ended by `signal` and started again, over and over, under load. `ended` looks at what it has
/// left.
fn survives(
    mut daemon: Daemon,
    front_end: FrontEnd,
    (signal, times): (i32, u64),
    default_seed: u64,
    ended: impl Fn(&mut Daemon),
) -> Daemon {
    let seed = seed(default_seed);
    let mut prng = Prng::new(seed);
    let mut guest = Guest::attach(front_end, &daemon, IMAGE_SECTORS, seed);
    for round in 0..times {
        guest.run(Instant::now() + Duration::from_micros(prng.below(120_000)));
        daemon.signal(signal);
        guest.reconnect(&mut daemon, |daemon| {
            let status = daemon.wait();
            assert_eq!(status.success(), signal != libc::SIGKILL, "{}", daemon.log());
            ended(daemon);
            daemon.restart();
        });
        guest.check_everything();
        assert!(guest.completed > round, "the guest does something");
    }
    guest.run(Instant::now() + Duration::from_millis(50));
    guest.flush();
    stop_and_compare(&guest, &mut daemon);
    daemon
}

/// At the end the image is the disk that the guest knows, and nothing is left in memory.
fn stop_and_compare(guest: &Guest, daemon: &mut Daemon) {
    daemon.stop();
    guest.assert_image(&daemon.image_bytes(0, IMAGE_BYTES as usize));
    assert!(daemon.directory().left().is_empty(), "an orderly end leaves nothing in memory");
}

/// How often a test kills the daemon.
fn killed() -> (i32, u64) {
    (libc::SIGKILL, kills())
}

/// What an upgrade leaves.
fn one_cache(daemon: &mut Daemon) {
    assert_eq!(daemon.directory().left().len(), 1, "the cache is left for the next daemon");
}

#[test]
fn completed_writes_survive_kills() {
    survives(start("num_queues = 4\ncache.size = \"6M\""), FrontEnd::Qemu, killed(), 201, |_| {});
}

#[test]
fn completed_writes_survive_kills_under_cloud_hypervisor() {
    survives(start("num_queues = 4\ncache.size = \"6M\""), FrontEnd::CloudHypervisor, killed(), 208, |_| {});
}

#[test]
fn completed_writes_survive_kills_of_two_workers() {
    let daemon = start("num_queues = 4\nworkers = 2\ncache.size = \"6M\"");
    survives(daemon, FrontEnd::Qemu, killed(), 202, |_| {});
}

#[test]
fn completed_writes_survive_kills_of_threads() {
    let daemon = start("num_queues = 4\nengine = \"threads\"\ncache.size = \"32M\"");
    survives(daemon, FrontEnd::Qemu, killed(), 203, |_| {});
}

#[test]
fn upgrades_under_cloud_hypervisor_leave_the_guest_unharmed() {
    let daemon = start("num_queues = 4\ncache.size = \"6M\"");
    survives(daemon, FrontEnd::CloudHypervisor, (libc::SIGUSR1, 5), 209, one_cache);
}

#[test]
fn an_upgrade_keeps_the_cache_warm_and_the_guest_unharmed() {
    // Large enough for the whole image.
    let daemon = start("num_queues = 4\ncache.size = \"32M\"");
    let daemon = survives(daemon, FrontEnd::Qemu, (libc::SIGUSR1, 5), 204, one_cache);
    let pages = |line: &str| {
        let (before, _) = line.split_once(" cached pages (")?;
        before.rsplit(' ').next()?.parse::<u64>().ok()
    };
    let taken: Vec<u64> = daemon.log().lines().filter_map(pages).collect();
    assert_eq!(taken.len(), 5, "{}", daemon.log());
    // How much there is depends on how long the guest was at work before.
    assert!(taken[4] > 1000, "{taken:?}");
}

#[test]
fn an_upgrade_of_a_gibibyte_pauses_less_than_a_second() {
    const FILLED: u64 = 768 << 20;
    let directory = TempDir::new("gibibyte");
    // In memory, so that no disk is measured; the cache reads it with readahead and all.
    let image = directory.memory().join("image");
    std::fs::create_dir_all(directory.memory()).expect("a directory can be made");
    std::fs::write(&image, vec![1; usize::try_from(FILLED).expect("64 bits")]).expect("an image can be written");
    std::os::unix::fs::symlink(&image, directory.path().join("image")).expect("a link can be made");
    let mut daemon = Daemon::start_configured(directory, &["cache.size = \"1G\"\ncache.survive = \"always\""]);
    let options = SessionOptions { region_bytes: 64 << 20, ..SessionOptions::default() };
    let mut session = Session::open(&daemon.socket(), &options);
    for at in (0..FILLED).step_by(64 << 20) {
        // Sixteen times to the same place in the guest's memory.
        let (pending, segments) = session.place(VIRTIO_BLK_T_IN, at / 512, Payload::Receive(4 << 20));
        let data = std::iter::repeat_n(segments[1], 16);
        let chain: Vec<_> = [segments[0]].into_iter().chain(data).chain([segments[2]]).collect();
        session.rings[0].submit(&chain);
        session.rings[0].notify();
        let used = session.rings[0].wait_used(PATIENCE);
        assert_eq!(session.outcome(&pending, used).status, OK);
    }
    // The shortest of three counts: these machines are shared.
    let pause = |_| {
        let begin = Instant::now();
        daemon.signal(libc::SIGUSR1);
        assert!(daemon.wait().success(), "{}", daemon.log());
        daemon.restart();
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.read(0, 4096);
        begin.elapsed()
    };
    drop(session);
    let pauses: Vec<Duration> = (0..3).map(pause).collect();
    assert!(daemon.log().contains("restored 196608 cached pages"), "{}", daemon.log());
    assert!(pauses.iter().min().is_some_and(|pause| *pause < Duration::from_secs(1)), "{pauses:?}");
}

/// A session with one ring, and a write on it that completed and was not flushed.
fn write_and_die(daemon: &mut Daemon) -> (Session, Vec<u8>) {
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(7, 80, 16 << 10);
    session.write(80, &bytes);
    daemon.kill();
    (session, bytes)
}

#[test]
fn another_size_of_cache_finds_everything() {
    let mut daemon = start("cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000");
    let (session, bytes) = write_and_die(&mut daemon);
    daemon.reconfigure("cache.size = \"16M\"");
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert!(session.read(80, bytes.len()) == bytes);
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "what had another shape was written to the image");
}

#[test]
fn a_volatile_cache_fails_its_guest_until_the_guest_begins_anew() {
    const VOLATILE: &str = "cache.survive = \"never\"\ncache.dirty_age_max_ms = 600000";
    let mut daemon = start(VOLATILE);
    let (session, _) = write_and_die(&mut daemon);
    // Even a daemon that dies before the guest is back must not make it forgotten, and one that can't start at all.
    for _ in 0..2 {
        daemon.restart();
        daemon.kill();
    }
    daemon.configure("cache.survive = \"always\"\ncache.size = \"900G\"");
    let refused = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
    assert!(refused.stderr.contains("no memory for a cache of "), "{refused:?}");
    daemon.reconfigure(VOLATILE);
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        let payload = if kind == VIRTIO_BLK_T_IN { Payload::Receive(512) } else { Payload::Send(&[1; 512]) };
        assert_eq!(session.run(0, kind, 0, payload).status, IOERR, "the guest believes in what is gone");
    }
    assert!(daemon.log().contains("every request of that guest fails until it resets the device"), "{}", daemon.log());
    drop(session);
    let mut anew = Session::open(&daemon.socket(), &SessionOptions::default());
    anew.write(0, &pattern(8, 0, 512));
    assert_eq!(anew.read(0, 512), pattern(8, 0, 512));
}

#[test]
fn a_volatile_cache_that_lost_nothing_serves_its_guest_again() {
    let mut daemon = start("cache.survive = \"never\"");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(9, 80, 4096));
    session.flush();
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert_eq!(session.read(80, 4096), pattern(9, 80, 4096));
}

#[test]
fn a_reset_does_not_hide_what_a_volatile_cache_would_lose() {
    let mut daemon = start("cache.survive = \"never\"\ncache.dirty_age_max_ms = 600000");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(9, 80, 4096));
    // The guest begins anew, and reads what only the cache has.
    session.reset();
    session.start_ring(0);
    assert_eq!(session.read(80, 4096), pattern(9, 80, 4096));
    daemon.kill();
    let on_image = daemon.image_bytes(80 * 512, 4096) == pattern(9, 80, 4096);
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let status = session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(4096)).status;
    assert!(status == IOERR || on_image, "the guest has read what is gone, and is told nothing");
}

/// It waits for the image, and then finds everything else free: socket and ledger go before the image does.
#[test]
fn a_successor_that_is_started_early_is_not_refused() {
    let mut daemon = start("cache.size = \"512M\"");
    for round in 0..8 {
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.write(80, &pattern(round, 80, 4096));
        drop(session);
        let log = File::create(daemon.directory().path().join("successor.log")).expect("a log file");
        let mut successor = Command::new(server_binary());
        successor.arg("--config").arg(daemon.config()).stderr(log);
        let mut successor = successor.spawn().expect("the binary can be started");
        // It is there, and waits, or nearly so.
        std::thread::sleep(Duration::from_millis(20 * round));
        daemon.signal(if round % 2 == 0 { libc::SIGUSR1 } else { libc::SIGTERM });
        assert!(daemon.wait().success());
        let serves = try_poll(PATIENCE, || UnixStream::connect(daemon.socket()).map(drop).ok());
        let log = std::fs::read_to_string(daemon.directory().path().join("successor.log"));
        assert!(serves.is_some(), "round {round}: {log:?}");
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert_eq!(session.read(80, 4096), pattern(round, 80, 4096));
        drop(session);
        successor.kill().and_then(|()| successor.wait()).expect("it can be killed");
        daemon.restart();
    }
}

#[test]
fn a_successor_that_cannot_start_leaves_the_cache_for_the_next() {
    let mut daemon = start("");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(6, 80, 16 << 10));
    session.flush();
    daemon.signal(libc::SIGUSR1);
    assert!(daemon.wait().success(), "{}", daemon.log());
    std::fs::write(daemon.socket(), "in the way").expect("a file can be written");
    let refused = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
    assert!(refused.stderr.contains("is not a socket"), "{refused:?}");
    std::fs::remove_file(daemon.socket()).expect("it can be removed");
    daemon.restart();
    assert!(daemon.log().contains("restored 4 cached pages"), "{}", daemon.log());
}

#[test]
fn write_through_outlives_the_daemon() {
    for survive in ["auto", "never"] {
        let mut daemon = start(&format!("cache.survive = {survive:?}\ncache.dirty_age_max_ms = 600000"));
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.set_writeback(false);
        for (round, signal) in (1..).zip([libc::SIGKILL, libc::SIGTERM, libc::SIGUSR1, libc::SIGTERM]) {
            daemon.signal(signal);
            daemon.wait();
            daemon.restart();
            session = session.reconnect(&daemon.socket());
            session.start_ring(0);
            let bytes = pattern(round, 80, 4096);
            session.write(80, &bytes);
            let found = daemon.image_bytes(80 * 512, bytes.len());
            assert!(found == bytes, "{survive}: after signal {signal} a completed write is in the image");
        }
        session.set_writeback(true);
        drop(session);
        daemon.stop();
        assert!(daemon.directory().left().is_empty(), "nothing is left to remember");
    }
}

#[test]
fn what_was_left_is_written_although_no_front_end_comes() {
    let mut daemon = start("");
    let (session, bytes) = write_and_die(&mut daemon);
    drop(session);
    daemon.restart();
    let written = || (daemon.image_bytes(80 * 512, bytes.len()) == bytes).then_some(());
    poll_until("what was left to be written", PATIENCE, written);
}

#[test]
fn what_was_left_is_listed_and_written_back_by_hand() {
    let mut daemon = start("cache.dirty_age_max_ms = 600000");
    let (session, bytes) = write_and_die(&mut daemon);
    drop(session);
    let [left] = &daemon.directory().left()[..] else { panic!("one cache is left") };
    let genblk = |arguments: &[&str]| run_to_end(Command::new(server_binary()).arg("recover").args(arguments));

    let memory = daemon.directory().memory();
    let listed = genblk(&["--memory-dir", memory.to_str().expect("UTF-8")]);
    let line = format!("{}: of {}: 4 pages, 4 of them not on the image\n", left.display(), daemon.image().display());
    assert_eq!(listed.stdout, line, "{listed:?}");

    let left = left.to_str().expect("UTF-8");
    let recovered = genblk(&[left]);
    assert!(recovered.status.success() && recovered.stdout.starts_with("4 pages are written to "), "{recovered:?}");
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "what completed is on the image");
    assert!(daemon.directory().left().is_empty());
    assert!(!genblk(&[left]).status.success(), "there is nothing more to recover");
}

#[test]
fn what_is_no_ledger_is_not_touched_by_recovery() {
    let directory = TempDir::new("mistaken");
    let image = directory.path().join("image");
    // A disk image often begins with zeros, as an empty ledger does; and a short file is no longer than one.
    for bytes in [vec![0; 1 << 20], b"ten bytes.".to_vec(), Vec::new()] {
        std::fs::write(&image, &bytes).expect("it can be written");
        for arguments in [vec!["recover"], vec!["recover", "--discard"]] {
            let ended = run_to_end(Command::new(server_binary()).args(arguments).arg(&image));
            assert!(
                !ended.status.success() && ended.stderr.contains("image is not what a genblk has left"),
                "{ended:?}"
            );
            assert_eq!(std::fs::read(&image).expect("it is still there"), bytes);
        }
    }
}

#[test]
fn a_ledger_that_a_daemon_holds_is_left_alone() {
    let daemon = start("");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(1, 0, 512));
    let left = daemon.directory().left();
    for arguments in [vec!["recover"], vec!["recover", "--discard"]] {
        let ended = run_to_end(Command::new(server_binary()).args(arguments).arg(&left[0]));
        assert!(!ended.status.success() && ended.stderr.contains("is held by another genblk"), "{ended:?}");
    }
    assert_eq!(session.read(0, 512), pattern(1, 0, 512));
}

#[test]
fn a_ledger_of_another_boot_or_layout_is_refused() {
    // The first byte of the layout's number, and of the boot's.
    for at in [8, 64] {
        let mut daemon = start("cache.size = \"8M\"");
        drop(write_and_die(&mut daemon));
        let left = daemon.directory().left();
        let file = File::options().read(true).write(true).open(&left[0]).expect("it can be opened");
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, at).expect("it can be read");
        std::os::unix::fs::FileExt::write_all_at(&file, &[byte[0] ^ 1], at).expect("it can be written");
        drop(file);
        let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(ended.stderr.contains(left[0].to_str().expect("UTF-8")), "{ended:?}");
        assert_eq!(daemon.directory().left(), left, "and left where it is");
    }
}

#[test]
fn a_new_image_at_an_old_path_does_not_meet_an_old_ledger() {
    let mut daemon = start("");
    drop(write_and_die(&mut daemon));
    std::fs::remove_file(daemon.image()).expect("the image can be removed");
    make_image(daemon.directory());
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.read(80, 512), [0; 512]);
    assert_eq!(daemon.directory().left().len(), 2, "the old one is there for the operator");
    assert_eq!(session.run(0, VIRTIO_BLK_T_OUT, 80, Payload::Send(&[1; 512])).status, OK);
}
