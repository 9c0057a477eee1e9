//! The daemon is killed or upgraded while the guest runs: no completed write is lost, and each request completes
//! exactly once.
//!
//! `GENBLK_KILLS` sets how often a test kills the daemon (`make soak` kills it 200 times).

#![allow(clippy::cast_possible_truncation, reason = "the tests use small sizes")]

mod changes;
#[path = "../common/mod.rs"]
mod common;
mod cut_page;
mod guest;
mod huge_pages;
mod lost_file;
mod moved;
mod operator;
mod random_order;
mod read_only;
mod remounts;
mod systemd;
mod tenures;
mod tools;
mod unrecorded;
mod zeroes;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use common::SECTOR_BYTES;
use common::daemon::{Daemon, TempDir, kill_all, run_to_end, server_binary};
use common::prng::{Prng, seed};
use common::request::{OK, Payload, pattern};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until, try_poll};
use guest::{FrontEnd, Guest};

const IMAGE_BYTES: u64 = 16 << 20;
const IMAGE_SECTORS: u64 = IMAGE_BYTES / SECTOR_BYTES as u64;
/// VIRTIO_BLK_S_IOERR, the status of a request that failed.
const IOERR: u8 = 1;

/// How a test ends the daemon, and how often.
#[derive(Clone, Copy, Debug)]
struct Ends {
    signal: i32,
    times: u64,
}

impl Ends {
    /// Kills it as often as `GENBLK_KILLS` says.
    fn kills() -> Self {
        let times = std::env::var("GENBLK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
        Self { signal: libc::SIGKILL, times }
    }

    /// Upgrades it: the daemon leaves its cache for the next one.
    fn upgrades(times: u64) -> Self {
        Self { signal: libc::SIGUSR1, times }
    }
}

fn start(device: &str) -> Daemon {
    start_in(TempDir::new("kill"), device)
}

fn start_in(directory: TempDir, device: &str) -> Daemon {
    make_image(&directory);
    Daemon::start_configured(directory, &[device])
}

/// Creates an image of zeros in a directory.
fn make_image(directory: &TempDir) {
    File::create(directory.path().join("image"))
        .and_then(|image| image.set_len(IMAGE_BYTES))
        .expect("an image can be created");
}

/// Ends a daemon on an image of zeros and starts it again, over and over, under load, and checks the guest's data each
/// time. `check_ended` looks at what the ended daemon left.
fn assert_survives(
    mut daemon: Daemon,
    front_end: FrontEnd,
    ends: Ends,
    default_seed: u64,
    check_ended: impl Fn(&mut Daemon),
) -> Daemon {
    let seed = seed(default_seed);
    let mut prng = Prng::new(seed);
    let mut guest = Guest::attach(front_end, &daemon, IMAGE_SECTORS, seed);
    for round in 0..ends.times {
        guest.run(Instant::now() + Duration::from_micros(prng.below(120_000)));
        daemon.signal(ends.signal);
        guest.reconnect(&mut daemon, |daemon| {
            let status = daemon.wait();
            assert_eq!(status.success(), ends.signal != libc::SIGKILL, "{}", daemon.log());
            check_ended(daemon);
            daemon.restart();
        });
        guest.check_everything();
        assert!(guest.completed > round, "the guest completes requests in each round");
    }
    guest.run(Instant::now() + Duration::from_millis(50));
    guest.flush();
    stop_and_compare(&guest, &mut daemon);
    daemon
}

/// Stops the daemon; the image then holds what the guest wrote, and nothing is left in memory.
fn stop_and_compare(guest: &Guest, daemon: &mut Daemon) {
    daemon.stop();
    guest.assert_image(&daemon.image_bytes(0, IMAGE_BYTES as usize));
    assert!(daemon.directory().left().is_empty(), "an orderly end leaves no cache in memory");
}

/// An upgraded daemon leaves its cache.
fn assert_cache_left(daemon: &mut Daemon) {
    assert_eq!(daemon.directory().left().len(), 1, "the cache stays for the next daemon");
}

#[test]
fn completed_writes_survive_kills() {
    assert_survives(start("num_queues = 4\ncache.size = \"6M\""), FrontEnd::Qemu, Ends::kills(), 201, |_| {});
}

#[test]
fn completed_writes_survive_kills_under_cloud_hypervisor() {
    assert_survives(
        start("num_queues = 4\ncache.size = \"6M\""),
        FrontEnd::CloudHypervisor,
        Ends::kills(),
        208,
        |_| {},
    );
}

#[test]
fn completed_writes_survive_kills_with_two_workers() {
    let daemon = start("num_queues = 4\nworkers = 2\ncache.size = \"6M\"");
    assert_survives(daemon, FrontEnd::Qemu, Ends::kills(), 202, |_| {});
}

#[test]
fn completed_writes_survive_kills_with_the_threads_engine() {
    let daemon = start("num_queues = 4\nengine = \"threads\"\ncache.size = \"32M\"");
    assert_survives(daemon, FrontEnd::Qemu, Ends::kills(), 203, |_| {});
}

#[test]
fn upgrades_under_cloud_hypervisor_lose_no_data() {
    let daemon = start("num_queues = 4\ncache.size = \"6M\"");
    assert_survives(daemon, FrontEnd::CloudHypervisor, Ends::upgrades(5), 209, assert_cache_left);
}

#[test]
fn upgrades_keep_the_cache_warm() {
    // The cache holds the whole image.
    let daemon = start("num_queues = 4\ncache.size = \"32M\"");
    let daemon = assert_survives(daemon, FrontEnd::Qemu, Ends::upgrades(5), 204, assert_cache_left);
    let pages = |line: &str| {
        let (before, _) = line.split_once(" cached pages (")?;
        before.rsplit(' ').next()?.parse::<u64>().ok()
    };
    let restored: Vec<u64> = daemon.log().lines().filter_map(pages).collect();
    assert_eq!(restored.len(), 5, "{}", daemon.log());
    // The earlier numbers depend on how far the guest got.
    assert!(restored[4] > 1000, "{restored:?}");
}

#[test]
fn an_upgrade_with_a_cache_of_one_gib_pauses_for_less_than_a_second() {
    const FILLED: u64 = 768 << 20;
    let directory = TempDir::new("gibibyte");
    // An image in memory, so that the disk's speed does not matter. Reading it fills the cache.
    let image = directory.memory().join("image");
    std::fs::create_dir_all(directory.memory()).expect("a directory can be created");
    std::fs::write(&image, vec![1; usize::try_from(FILLED).expect("64 bits")]).expect("an image can be written");
    std::os::unix::fs::symlink(&image, directory.path().join("image")).expect("a link can be created");
    let mut daemon = Daemon::start_configured(directory, &["cache.size = \"1G\"\ncache.survive = \"always\""]);
    let options = SessionOptions { region_bytes: 64 << 20, ..SessionOptions::default() };
    let mut session = Session::open(&daemon.socket(), &options);
    for at in (0..FILLED).step_by(64 << 20) {
        // Sixteen segments with the same guest memory.
        let (pending, segments) = session.prepare(VIRTIO_BLK_T_IN, at / 512, Payload::Receive(4 << 20));
        let data = std::iter::repeat_n(segments[1], 16);
        let chain: Vec<_> = [segments[0]].into_iter().chain(data).chain([segments[2]]).collect();
        session.rings[0].submit(&chain);
        session.rings[0].notify();
        let used = session.rings[0].wait_used(TIMEOUT);
        assert_eq!(session.outcome(&pending, used).status, OK);
    }
    // The shortest of three pauses counts: other processes share the machine.
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
    daemon.await_log("restored 196608 cached pages");
    assert!(pauses.iter().min().is_some_and(|pause| *pause < Duration::from_secs(1)), "{pauses:?}");
}

/// Completes a write that is not flushed, then kills the daemon; returns the session and the bytes written.
fn write_and_kill(daemon: &mut Daemon) -> (Session, Vec<u8>) {
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(7, 80, 16 << 10);
    session.write(80, &bytes);
    daemon.kill();
    (session, bytes)
}

#[test]
fn a_cache_that_cannot_grow_to_the_configured_size_is_written_to_the_image() {
    let mut daemon = start("cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000");
    let (session, bytes) = write_and_kill(&mut daemon);
    daemon.reconfigure("cache.size = \"16M\"\ncache.dirty_age_max_ms = 600000");
    daemon.await_log("(4 dirty) left by the previous daemon");
    daemon.kill();
    daemon.reconfigure("cache.size = \"64M\"");
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert!(session.read(80, bytes.len()) == bytes);
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "the dirty pages are on the image");
}

#[test]
fn every_request_fails_after_a_data_loss_until_the_guest_resets_the_device() {
    const VOLATILE: &str = "cache.survive = \"never\"\ncache.dirty_age_max_ms = 600000";
    let mut daemon = start(VOLATILE);
    let (session, _) = write_and_kill(&mut daemon);
    // Neither a daemon that dies before the guest reconnects nor one that cannot start may forget the loss.
    for _ in 0..2 {
        daemon.restart();
        daemon.kill();
    }
    fail_to_start(&mut daemon, VOLATILE);
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH] {
        let payload = match kind {
            VIRTIO_BLK_T_IN => Payload::Receive(512),
            VIRTIO_BLK_T_OUT => Payload::Send(&[1; 512]),
            _ => Payload::Empty,
        };
        let status = session.run(0, kind, 0, payload).status;
        assert_eq!(status, IOERR, "the guest must not read stale data, nor take what is lost for durable");
    }
    assert!(daemon.log().contains("all requests of this guest fail until it resets the device"), "{}", daemon.log());
    drop(session);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(8, 0, 512));
    assert_eq!(session.read(0, 512), pattern(8, 0, 512));
}

/// A daemon has died and lost a write of a guest whose ring has an inflight region; its successor runs the ring from 0.
fn lose_a_write_of_a_ring_with_a_region() -> (Daemon, Session) {
    let mut daemon = start("cache.survive = \"never\"\ncache.dirty_age_max_ms = 600000");
    let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
    session.share_memory();
    session.add_ring(128);
    let wish = VhostUserInflight { num_queues: 1, queue_size: 128, ..VhostUserInflight::default() };
    let (region, file) = session.frontend.get_inflight_fd(&wish).expect("GET_INFLIGHT_FD");
    session.frontend.set_inflight_fd(&region, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
    session.start_ring(0);
    session.write(80, &pattern(7, 80, 512));
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.frontend.set_inflight_fd(&region, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
    session.set_up_ring(0, 0);
    session.enable_ring(0, true);
    (daemon, session)
}

/// The base of a ring is 0 also after its indices have wrapped. The inflight region shows that the guest was running.
#[test]
fn a_ring_restart_at_0_without_a_reset_does_not_end_a_data_loss() {
    let (_daemon, mut session) = lose_a_write_of_a_ring_with_a_region();
    let status = session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status;
    assert_eq!(status, IOERR, "the guest must not read stale data");
}

#[test]
fn a_reset_ends_a_data_loss_even_with_an_unchanged_inflight_region() {
    let (_daemon, mut session) = lose_a_write_of_a_ring_with_a_region();
    session.reset();
    session.rings.clear();
    session.add_ring(128);
    session.start_ring(0);
    assert_eq!(session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status, OK);
}

/// QEMU stops the rings of a guest that reboots, and starts them again at 0, on the same connection.
#[test]
fn a_guest_that_reboots_on_its_connection_ends_a_data_loss() {
    let mut daemon = start("cache.survive = \"never\"\ncache.dirty_age_max_ms = 600000");
    let (session, _) = write_and_kill(&mut daemon);
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert_eq!(session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status, IOERR);
    session.stop_ring(0);
    session.rings.clear();
    session.add_ring(128);
    session.start_ring(0);
    assert_eq!(session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status, OK);
}

#[test]
fn a_guest_of_a_clean_volatile_cache_continues_after_a_kill() {
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
fn a_reset_does_not_clear_the_loss_marker_of_a_dirty_cache() {
    let mut daemon = start("cache.survive = \"never\"\ncache.dirty_age_max_ms = 600000");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(9, 80, 4096));
    // After the reset the guest still reads data that only the cache has.
    session.reset();
    session.start_ring(0);
    assert_eq!(session.read(80, 4096), pattern(9, 80, 4096));
    daemon.kill();
    let on_image = daemon.image_bytes(80 * 512, 4096) == pattern(9, 80, 4096);
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let status = session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(4096)).status;
    assert!(status == IOERR || on_image, "the guest read data that is lost now, and its requests do not fail");
}

/// It waits for the image's lock, and then finds the socket and the cache file free.
#[test]
fn a_replacing_daemon_waits_for_the_old_one_to_end() {
    let mut daemon = start("cache.size = \"512M\"");
    for round in 0..8 {
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.write(80, &pattern(round, 80, 4096));
        drop(session);
        let log = File::create(daemon.directory().path().join("next.log")).expect("a log file");
        let mut next = Command::new(server_binary());
        next.arg("--config").arg(daemon.config()).stderr(log);
        let mut next = next.spawn().expect("the binary can be started");
        // By now it waits for the lock in most rounds.
        std::thread::sleep(Duration::from_millis(20 * round));
        daemon.signal(if round % 2 == 0 { libc::SIGUSR1 } else { libc::SIGTERM });
        assert!(daemon.wait().success());
        let serves = try_poll(TIMEOUT, || UnixStream::connect(daemon.socket()).map(drop).ok());
        let log = std::fs::read_to_string(daemon.directory().path().join("next.log"));
        assert!(serves.is_some(), "round {round}: {log:?}");
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert_eq!(session.read(80, 4096), pattern(round, 80, 4096));
        drop(session);
        kill_all(&mut next);
        daemon.restart();
    }
}

#[test]
fn a_daemon_that_cannot_start_leaves_the_cache_for_the_next() {
    let mut daemon = start("");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(6, 80, 16 << 10));
    session.flush();
    daemon.signal(libc::SIGUSR1);
    assert!(daemon.wait().success(), "{}", daemon.log());
    std::fs::write(daemon.socket(), "in the way").expect("a file can be written");
    let refused = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
    assert!(refused.stderr.contains("is not a socket"), "{refused:?}");
    std::fs::remove_file(daemon.socket()).expect("the file can be removed");
    daemon.restart();
    daemon.await_log("restored 4 cached pages");
}

#[test]
fn the_write_through_mode_survives_a_restart() {
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
            assert!(found == bytes, "{survive}: after signal {signal} a completed write is on the image");
        }
        session.set_writeback(true);
        drop(session);
        daemon.stop();
        assert!(daemon.directory().left().is_empty(), "no file is left");
    }
}

/// A configuration for which no host has the memory.
const TOO_LARGE: &str = "cache.survive = \"never\"\ncache.size = \"900G\"";

/// Starts the daemon with a cache for which the host has no memory; it must fail. Then restarts it with `device`.
fn fail_to_start(daemon: &mut Daemon, device: &str) {
    daemon.configure(TOO_LARGE);
    let refused = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
    assert!(refused.stderr.contains("cannot allocate a cache of "), "{refused:?}");
    daemon.reconfigure(device);
}

#[test]
fn the_write_through_mode_survives_a_failed_start() {
    const DEVICE: &str = "cache.dirty_age_max_ms = 600000";
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGUSR1] {
        let mut daemon = start(DEVICE);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.set_writeback(false);
        daemon.signal(signal);
        daemon.wait();
        fail_to_start(&mut daemon, DEVICE);
        let mut session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        let bytes = pattern(1, 80, 4096);
        session.write(80, &bytes);
        let found = daemon.image_bytes(80 * 512, bytes.len());
        assert!(found == bytes, "after signal {signal} a completed write is on the image");
    }
}

#[test]
fn a_recorded_data_loss_survives_the_replacement_of_its_cache() {
    let mut daemon = start("cache.survive = \"never\"\ncache.dirty_age_max_ms = 600000");
    let (session, _) = write_and_kill(&mut daemon);
    daemon.reconfigure("cache.size = \"8M\"");
    daemon.kill();
    fail_to_start(&mut daemon, "cache.size = \"16M\"");
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let status = session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status;
    assert_eq!(status, IOERR, "the guest must not read stale data");
}

#[test]
fn restored_dirty_pages_are_written_back_without_a_front_end() {
    let mut daemon = start("");
    let (session, bytes) = write_and_kill(&mut daemon);
    drop(session);
    daemon.restart();
    let written = || (daemon.image_bytes(80 * 512, bytes.len()) == bytes).then_some(());
    poll_until("the dirty pages to be written", TIMEOUT, written);
}

#[test]
fn genblk_recover_writes_a_cache_to_its_image() {
    let mut daemon = start("cache.dirty_age_max_ms = 600000");
    let (session, bytes) = write_and_kill(&mut daemon);
    drop(session);
    let [left] = &daemon.directory().left()[..] else { panic!("there must be one cache") };
    let genblk = |arguments: &[&str]| run_to_end(Command::new(server_binary()).arg("recover").args(arguments));

    let left = left.to_str().expect("UTF-8");
    let recovered = genblk(&[left]);
    assert!(recovered.status.success() && recovered.stdout.starts_with("wrote 4 pages to "), "{recovered:?}");
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "the completed write is on the image");
    assert!(daemon.directory().left().is_empty());
    assert!(!genblk(&[left]).status.success(), "there is no cache any more");
}

#[test]
fn genblk_recover_keeps_the_write_through_mode() {
    const DEVICE: &str = "cache.dirty_age_max_ms = 600000";
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.set_writeback(false);
    daemon.kill();
    let [left] = &daemon.directory().left()[..] else { panic!("there must be one cache") };
    let recovered = run_to_end(Command::new(server_binary()).arg("recover").arg(left));
    assert!(recovered.stdout.contains(" and kept it, because the guest selected "), "{recovered:?}");
    assert_eq!(std::fs::metadata(left).expect("the file stays").len(), 4096);
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let bytes = pattern(1, 80, 4096);
    session.write(80, &bytes);
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "a completed write is on the image");
}

#[test]
fn genblk_recover_refuses_a_file_that_is_not_a_cache() {
    let directory = TempDir::new("mistaken");
    let image = directory.path().join("image");
    // An image that begins with zeros looks like an empty cache file, and so does a file shorter than a header.
    for bytes in [vec![0; 1 << 20], b"ten bytes.".to_vec(), Vec::new()] {
        std::fs::write(&image, &bytes).expect("the file can be written");
        for arguments in [vec!["recover"], vec!["recover", "--discard"]] {
            let ended = run_to_end(Command::new(server_binary()).args(arguments).arg(&image));
            assert!(!ended.status.success() && ended.stderr.contains("not a genblk cache file: "), "{ended:?}");
            assert_eq!(std::fs::read(&image).expect("the file still exists"), bytes);
        }
    }
}

#[test]
fn genblk_recover_refuses_a_cache_that_a_daemon_uses() {
    let daemon = start("");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(1, 0, 512));
    let left = daemon.directory().left();
    for arguments in [vec!["recover"], vec!["recover", "--discard"]] {
        let ended = run_to_end(Command::new(server_binary()).args(arguments).arg(&left[0]));
        assert!(!ended.status.success() && ended.stderr.contains("another genblk process (pid "), "{ended:?}");
    }
    assert_eq!(session.read(0, 512), pattern(1, 0, 512));
}

#[test]
fn a_cache_of_an_earlier_boot_or_an_unknown_layout_is_refused() {
    // The first byte of the layout's version, and of the boot ID.
    for at in [8, 64] {
        let mut daemon = start("cache.size = \"8M\"");
        drop(write_and_kill(&mut daemon));
        let left = daemon.directory().left();
        let file = File::options().read(true).write(true).open(&left[0]).expect("the file can be opened");
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, at).expect("the file can be read");
        std::os::unix::fs::FileExt::write_all_at(&file, &[byte[0] ^ 0x40], at).expect("the file can be written");
        drop(file);
        let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(ended.stderr.contains(left[0].to_str().expect("UTF-8")), "{ended:?}");
        assert_eq!(daemon.directory().left(), left, "the file stays");
    }
}

#[test]
fn a_new_image_at_an_old_path_gets_no_old_cache() {
    let mut daemon = start("");
    drop(write_and_kill(&mut daemon));
    std::fs::remove_file(daemon.image()).expect("the image can be removed");
    make_image(daemon.directory());
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.read(80, 512), [0; 512]);
    assert_eq!(daemon.directory().left().len(), 2, "the old cache stays for the operator");
    assert_eq!(session.run(0, VIRTIO_BLK_T_OUT, 80, Payload::Send(&[1; 512])).status, OK);
}
