//! End-to-end tests: from an independent virtio-blk driver through the daemon and its cache to the image file, and
//! back.
//!
//! `GENBLK_E2E_REQUESTS` sets the number of random requests, `GENBLK_TEST_SEED` their seed.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sizes and indices here are chosen by the tests, and small"
)]

mod common;

use std::fs::File;
use std::time::Duration;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use common::SECTOR_BYTES;
use common::daemon::{Daemon, DaemonOptions, TempDir};
use common::prng::{Prng, seed};
use common::request::{OK, Payload, pattern};
use common::session::{Session, SessionOptions};
use common::shadow::Shadow;
use common::wait::{TIMEOUT, poll_until, try_poll};
use common::workload::{Client, ClientOptions, FaultRules, IoPlan, random_io, read_everything, settle};

/// Size of the image: many times the cache.
const IMAGE_BYTES: usize = 128 << 20;
const CACHE_SIZE: &str = "6M";

/// How long a flush may take on a healthy store.
const FLUSH_LIMIT: Duration = Duration::from_secs(10);

fn requests(default: u64) -> u64 {
    std::env::var("GENBLK_E2E_REQUESTS")
        .map_or(default, |text| text.parse().expect("GENBLK_E2E_REQUESTS is a decimal number"))
}

/// A directory with an image that holds `shadow`.
fn image_of(shadow: &Shadow) -> TempDir {
    let directory = TempDir::new("e2e");
    shadow.write_image(&directory.path().join("image"));
    directory
}

/// A daemon whose image holds `shadow`.
fn serve(shadow: &Shadow, options: &DaemonOptions) -> Daemon {
    Daemon::start_in(image_of(shadow), options)
}

/// Runs random I/O on a healthy store and checks it against the shadow: each read, the whole disk at the end, and the
/// image file, both after flushes and after the daemon has exited.
fn check_random_io(start: impl FnOnce(TempDir) -> Daemon, client_options: &ClientOptions, plan: &IoPlan) {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, plan.seed);
    let mut daemon = start(image_of(&shadow));
    let image = daemon.image();
    let mut client = Client::connect(&daemon.socket(), client_options);
    let mut check_image = |shadow: &Shadow| {
        if let Err(mismatch) = shadow.check_image(&image) {
            panic!("seed {}: the image after a FLUSH: {mismatch:x?}", plan.seed);
        }
    };
    let mut faults = FaultRules { may_fail: &|| false, after_flush: &mut check_image };
    let report = random_io(&mut client, &mut shadow, plan, &mut faults);
    assert_eq!(report.completed, plan.requests, "every request completes");
    assert_eq!(report.failed, 0, "no request fails");
    settle(&mut client, FLUSH_LIMIT);
    read_everything(&mut client, &shadow);
    drop(client);
    daemon.stop();
    if let Err(mismatch) = shadow.check_image(&daemon.image()) {
        panic!("seed {}: the image after the daemon has exited: {mismatch:x?}", plan.seed);
    }
}

fn small_cache(num_queues: usize) -> DaemonOptions {
    DaemonOptions { cache_size: CACHE_SIZE, num_queues, ..DaemonOptions::default() }
}

/// Starts a daemon by command-line options.
fn with_options(options: DaemonOptions) -> impl FnOnce(TempDir) -> Daemon {
    move |directory| Daemon::start_in(directory, &options)
}

fn write_back(queues: usize, poll: bool, default_seed: u64) {
    let client = ClientOptions { queues, poll, ..ClientOptions::default() };
    let plan = IoPlan { requests: requests(100_000), seed: seed(default_seed), checkpoints: 8, read_only: false };
    check_random_io(with_options(small_cache(queues)), &client, &plan);
}

#[test]
fn random_io_on_one_queue_with_interrupts_reads_back() {
    write_back(1, false, 101);
}

#[test]
fn random_io_on_four_queues_with_interrupts_reads_back() {
    write_back(4, false, 102);
}

#[test]
fn random_io_on_one_polled_queue_reads_back() {
    write_back(1, true, 103);
}

#[test]
fn random_io_on_four_polled_queues_reads_back() {
    write_back(4, true, 104);
}

#[test]
fn random_io_in_write_through_mode_reads_back() {
    let daemon = DaemonOptions { cache_mode: "writethrough", ..small_cache(2) };
    let client = ClientOptions { queues: 2, ..ClientOptions::default() };
    let plan = IoPlan { requests: requests(20_000), seed: seed(105), checkpoints: 4, read_only: false };
    check_random_io(with_options(daemon), &client, &plan);
}

#[test]
fn random_io_without_a_cache_reads_back() {
    let daemon = DaemonOptions { cache_mode: "none", ..small_cache(2) };
    let client = ClientOptions { queues: 2, ..ClientOptions::default() };
    let plan = IoPlan { requests: requests(20_000), seed: seed(106), checkpoints: 4, read_only: false };
    check_random_io(with_options(daemon), &client, &plan);
}

#[test]
fn random_reads_of_a_read_only_image_return_its_data() {
    let daemon = DaemonOptions { read_only: true, ..small_cache(2) };
    let client = ClientOptions { queues: 2, read_only: true, ..ClientOptions::default() };
    let plan = IoPlan { requests: requests(20_000), seed: seed(107), checkpoints: 2, read_only: true };
    check_random_io(with_options(daemon), &client, &plan);
}

/// As [`check_random_io`], on a device from a configuration file; `device` is the TOML of its table.
fn check_random_io_on_a_configured_device(device: &str, default_seed: u64) {
    let client = ClientOptions { queues: 4, ..ClientOptions::default() };
    let plan = IoPlan { requests: requests(20_000), seed: seed(default_seed), checkpoints: 4, read_only: false };
    let start = |directory| Daemon::start_configured(directory, &[device]);
    check_random_io(start, &client, &plan);
}

#[test]
fn random_io_with_the_threads_engine_reads_back() {
    check_random_io_on_a_configured_device("engine = \"threads\"\ncache.size = \"6M\"", 112);
}

#[test]
fn random_io_with_two_workers_on_four_queues_reads_back() {
    check_random_io_on_a_configured_device("num_queues = 4\nworkers = 2\ncache.size = \"6M\"", 113);
}

#[test]
fn two_workers_without_a_cache_read_and_write_the_right_data() {
    check_random_io_on_a_configured_device(
        "num_queues = 4\nworkers = 2\ncache.size = \"6M\"\ncache.mode = \"none\"",
        114,
    );
}

#[test]
fn random_io_with_lru_and_buffered_io_reads_back() {
    let device = "direct = false\npoll_us = 0\ncache.size = \"6M\"\ncache.policy = \"lru\"\ncache.readahead_max = 0";
    check_random_io_on_a_configured_device(device, 115);
}

/// The tests above rely on it.
#[test]
fn the_daemon_uses_the_configured_engine_and_workers() {
    let shadow = Shadow::zeros(1 << 20);
    let cases = [("engine = \"threads\"\nworkers = 3", 0, 3), ("engine = \"io_uring\"\nworkers = 2", 2, 2)];
    for (device, rings, workers) in cases {
        let mut daemon = Daemon::start_configured(image_of(&shadow), &[device]);
        // The daemon listens before its threads run.
        poll_until(device, TIMEOUT, || (daemon.threads("genblk disk0") == workers).then_some(()));
        assert_eq!(daemon.io_urings(), rings, "{device}");
        daemon.stop();
    }
}

/// A golden image: the cache holds it once, and what one guest has read is a hit for the other.
#[test]
fn read_only_devices_of_one_image_share_its_cache() {
    const DATA_MIB: u64 = 16;
    let shadow = Shadow::patchwork(32 << 20, 116);
    let reader = "read_only = true\ncache.size = \"64M\"";
    let mut daemon = Daemon::start_configured(image_of(&shadow), &[reader, reader]);
    let options = ClientOptions { read_only: true, ..ClientOptions::default() };
    let mut clients = [0, 1].map(|device| Client::connect(&daemon.socket_of(device), &options));
    assert_eq!(daemon.mapped_caches(), 1, "the devices share one cache");
    // The first client reads half of the image, the second all of it, then the first the rest: each hits pages that the
    // other has read in.
    for first in (0..shadow.sectors() / 2).step_by(256) {
        shadow.check(first, &clients[0].read(first, 256 * SECTOR_BYTES)).expect("the first half");
    }
    read_everything(&mut clients[1], &shadow);
    read_everything(&mut clients[0], &shadow);
    drop(clients);
    daemon.stop();
    for device in ["disk0", "disk1"] {
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains(&format!("{device}: reads: "))).expect("statistics");
        let once = format!("; {DATA_MIB} MiB read from the image");
        assert!(line.contains(&once), "the image's data is read once: {line}");
    }
    shadow.check_image(&daemon.image()).expect("no test wrote to the image");
}

/// Number of log lines that contain `what`.
fn count(log: &str, what: &str) -> usize {
    log.lines().filter(|line| line.contains(what)).count()
}

/// The image is a real file that shrinks: the dirty page's place no longer exists.
#[test]
fn sighup_resumes_a_stopped_device() {
    const HALF: u64 = 2 << 20;
    let mut shadow = Shadow::patchwork(2 * HALF as usize, 117);
    let mut daemon = Daemon::start_configured(image_of(&shadow), &["cache.size = \"6M\"\ncache.on_error = \"stop\""]);
    let mut client = Client::connect(&daemon.socket(), &ClientOptions::default());
    let beyond = HALF / SECTOR_BYTES as u64 + 8;
    client.read(beyond, 4096);
    let file = File::options().write(true).open(daemon.image()).expect("the image can be opened");
    file.set_len(HALF).expect("the image can be shrunk");
    client.write(beyond, &[7; 4096]);
    shadow.write(beyond, &[7; 4096]);
    assert!(!client.flush(), "the page lies beyond the end of the image");
    let stopped = "disk0: write-back stopped (gone); only cached data can be read; 1 dirty page kept; \
                   check the disk, then run \"genblk resume disk0\"";
    daemon.signal(libc::SIGHUP);
    poll_until("a retry to fail", TIMEOUT, || (count(&daemon.log(), stopped) == 2).then_some(()));
    assert_eq!(count(&daemon.log(), "write-back recovered"), 0, "the image is still too short");
    file.set_len(2 * HALF).expect("the image can get its size back");
    shadow.discard(beyond + 8, HALF / SECTOR_BYTES as u64 - 16);
    assert!(!client.flush() && !client.try_write(0, &[8; 4096]), "a stopped device stays stopped until SIGHUP");
    assert_eq!(client.read(beyond, 4096), [7; 4096], "cached data can be read");

    daemon.signal(libc::SIGHUP);
    poll_until("the device to resume", TIMEOUT, || client.flush().then_some(()));
    client.write(0, &[8; 4096]);
    shadow.write(0, &[8; 4096]);
    drop(client);
    daemon.stop();
    let log = daemon.log();
    for (what, times) in
        [("has shrunk from 4194304 to 2097152 bytes", 1), (stopped, 2), ("disk0: write-back recovered", 1)]
    {
        assert_eq!(count(&log, what), times, "{what}: {log}");
    }
    shadow.discard(HALF / SECTOR_BYTES as u64, 8);
    shadow.check_image(&daemon.image()).expect("the image holds every write");
}

/// A front-end disconnects without a FLUSH, and another one connects: it finds all of the cache, with its dirty pages.
#[test]
fn written_data_survives_a_reconnection() {
    let mut prng = Prng::new(seed(108));
    let mut shadow = Shadow::zeros(IMAGE_BYTES);
    let mut daemon = serve(&shadow, &small_cache(1));
    for _ in 0..10 {
        let mut client = Client::connect(&daemon.socket(), &ClientOptions::default());
        for _ in 0..50 {
            let first = prng.below(shadow.sectors() - 128);
            let sectors = 1 + prng.below(128) as usize;
            let bytes = prng.bytes(sectors * SECTOR_BYTES);
            client.write(first, &bytes);
            shadow.write(first, &bytes);
        }
        drop(client);
        let mut client = Client::connect(&daemon.socket(), &ClientOptions::default());
        // Twice: the second pass hits pages that the first one read in.
        read_everything(&mut client, &shadow);
        for first in (0..8192).step_by(128) {
            shadow.check(first, &client.read(first, 64 << 10)).expect("the hot range keeps its data");
        }
    }
    daemon.stop();
    shadow.check_image(&daemon.image()).expect("the image holds everything");
}

/// Without a FLUSH, too: the image holds every write, and the next daemon serves it.
#[test]
fn sigterm_writes_all_dirty_pages_back() {
    let mut prng = Prng::new(seed(109));
    let mut shadow = Shadow::zeros(32 << 20);
    let mut daemon = serve(&shadow, &small_cache(1));
    for round in 0..5 {
        let mut client = Client::connect(&daemon.socket(), &ClientOptions::default());
        for _ in 0..40 {
            let first = prng.below(shadow.sectors() - 64);
            let sectors = 1 + prng.below(64) as usize;
            let bytes = prng.bytes(sectors * SECTOR_BYTES);
            client.write(first, &bytes);
            shadow.write(first, &bytes);
        }
        if round % 2 == 0 {
            drop(client);
            daemon.stop();
        } else {
            // The front-end is still connected and idle.
            daemon.stop();
            drop(client);
        }
        shadow.check_image(&daemon.image()).expect("the image holds everything");
        daemon.restart();
        let mut client = Client::connect(&daemon.socket(), &ClientOptions::default());
        read_everything(&mut client, &shadow);
    }
}

/// SIGTERM with requests in flight: the image holds the writes that completed; the others are old or new, sector by
/// sector.
#[test]
fn sigterm_under_load_keeps_every_completed_write() {
    const REQUEST_BYTES: usize = 32 << 10;
    const REQUESTS: u64 = 100;
    let mut prng = Prng::new(seed(110));
    for round in 1..=10 {
        let mut shadow = Shadow::zeros(32 << 20);
        let mut daemon = serve(&shadow, &small_cache(1));
        let options = SessionOptions { queue_size: 512, ..SessionOptions::default() };
        let mut session = Session::open(&daemon.socket(), &options);
        let started = session.rings[0].used_idx();
        let mut in_flight = Vec::new();
        for n in 0..REQUESTS {
            let sector = n * 600;
            let bytes = pattern(round, sector, REQUEST_BYTES);
            let pending = session.submit(0, VIRTIO_BLK_T_OUT, sector, Payload::Send(&bytes));
            in_flight.push((sector, bytes, pending));
        }
        session.rings[0].notify();
        let awaited = prng.below(REQUESTS) as u16;
        try_poll(TIMEOUT, || (session.rings[0].used_idx().wrapping_sub(started) >= awaited).then_some(()));
        daemon.stop();
        let mut completed = 0;
        while let Some(used) = session.rings[0].take_used() {
            let (sector, bytes, pending) =
                in_flight.iter().find(|(_, _, pending)| pending.head == used.head).expect("a request of this test");
            assert_eq!(session.memory.byte(pending.status), OK, "round {round}: sector {sector}");
            shadow.write(*sector, bytes);
            completed += 1;
        }
        assert!(completed >= awaited, "round {round}: no completion is lost");
        for (sector, bytes, _) in &in_flight {
            if shadow.check(*sector, bytes).is_err() {
                shadow.doubt_write(*sector, bytes);
            }
        }
        shadow.check_image(&daemon.image()).expect("the image holds every completed write");
    }
}

#[test]
fn a_completed_write_is_on_the_image_in_write_through_mode() {
    let mut prng = Prng::new(seed(111));
    let shadow = Shadow::patchwork(32 << 20, 111);
    let daemon = serve(&shadow, &DaemonOptions { cache_mode: "writethrough", ..small_cache(1) });
    let mut client = Client::connect(&daemon.socket(), &ClientOptions::default());
    for round in 0..300 {
        let count = 1 + prng.below(if round % 20 == 0 { 2048 } else { 24 });
        let first = prng.below(shadow.sectors() - count);
        let bytes = prng.bytes(count as usize * SECTOR_BYTES);
        client.write(first, &bytes);
        let found = daemon.image_bytes(first * SECTOR_BYTES as u64, bytes.len());
        assert!(found == bytes, "round {round}: a completed write of {count} sectors at {first} is on the image");
        if round % 10 == 0 {
            assert!(client.read(first, bytes.len()) == bytes, "round {round}: a read returns the written data");
        }
    }
}

#[test]
fn the_shadow_detects_wrong_data() {
    let (old, new, other) = (pattern(1, 8, 2048), pattern(2, 8, 2048), pattern(3, 8, 2048));
    let mut shadow = Shadow::zeros(1 << 20);
    assert!(shadow.check(8, &[0; 2048]).is_ok());
    shadow.write(8, &old);
    assert!(shadow.check(8, &old).is_ok());
    assert_eq!(shadow.check(8, &new).expect_err("another version").sector, 8);
    assert_eq!(shadow.check(8, &[0; 2048]).expect_err("an older version").sector, 8);

    // After a failed write each sector is old or new.
    shadow.doubt_write(8, &new);
    let torn = [&new[..512], &old[512..1024], &new[1024..]].concat();
    assert!(shadow.check(8, &old).is_ok() && shadow.check(8, &new).is_ok() && shadow.check(8, &torn).is_ok());
    let wrong = [&new[..512], &other[512..1024], &new[1024..]].concat();
    assert_eq!(shadow.check(8, &wrong).expect_err("a third version").sector, 9);
    shadow.write(8, &other);
    assert!(shadow.check(8, &new).is_err(), "a write that succeeds leaves one possible value");

    // After a discard a sector may hold anything, until it is written again.
    shadow.discard(8, 2);
    assert!(shadow.check(8, &[&new[..1024], &other[1024..]].concat()).is_ok());
    assert_eq!(shadow.check(8, &new).expect_err("behind the discard").sector, 10);
    shadow.write_zeroes(8, 1);
    assert_eq!(shadow.check(8, &[&new[..1024], &other[1024..]].concat()).expect_err("zeroed").sector, 8);
}
