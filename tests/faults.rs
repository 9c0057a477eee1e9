//! A device over an image that fails: served in this process, so that the faults can be told when to come and go.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::bench::Bench;
use common::daemon::TempDir;
use common::request::{OK, Payload};
use common::session::{Session, SessionOptions};
use common::shadow::Shadow;
use common::wait::{ABSENCE, PATIENCE, poll_until};
use common::workload::{self, Client, ClientOptions, IoPlan, random_io, read_everything, settle};
use genblk::config::{DeviceConfig, OnError, Socket};
use genblk::service::{Running, Service, shutdown_all};
use genblk::store::Backing;
use genblk::store::faulty::{Faults, FaultyImage, OpClass};
use genblk::store::file::{FileImage, OpenOptions};
use genblk::units::Fault;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_FLUSH;

const IMAGE_BYTES: usize = 32 << 20;
const HEALING: Duration = Duration::from_secs(20);

/// Random requests while `inject` has the image fail; healed at each checkpoint and at the end.
fn random_io_with(name: &str, seed: u64, workers: u16, inject: impl Fn(&Faults)) {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, seed);
    let bench = Bench::new(name, &shadow, |config| config.workers = workers);
    let mut client = bench.client(workers.max(2));
    let failing = AtomicBool::new(true);
    inject(&bench.faults);
    for round in 0..4 {
        let plan = IoPlan { requests: 3000, seed: seed + round, checkpoints: 1, read_only: false };
        failing.store(true, Ordering::Relaxed);
        inject(&bench.faults);
        let mut flushed = |_: &Shadow| {
            bench.faults.heal();
            failing.store(false, Ordering::Relaxed);
        };
        let mut faults = workload::Faults { allowed: &|| failing.load(Ordering::Relaxed), flushed: &mut flushed };
        let report = random_io(&mut client, &mut shadow, &plan, &mut faults);
        assert_eq!(report.completed, 3000, "every request completes: {report:?}");
        bench.faults.heal();
        settle(&mut client, HEALING);
        read_everything(&mut client, &shadow);
    }
    let failed: u64 = OpClass::ALL.iter().map(|&kind| bench.faults.failed(kind)).sum();
    assert!(failed > 20, "the image did fail: {failed} times");
    drop(client);
    bench.end(&shadow);
}

#[test]
fn reads_that_fail_are_told_and_nothing_else_is_lost() {
    random_io_with("faulty-reads", 11, 1, |faults| faults.fail_randomly(OpClass::Read, 20_000, 1, Fault::Media));
}

#[test]
fn writes_that_fail_are_tried_again() {
    random_io_with("faulty-writes", 12, 1, |faults| faults.fail_randomly(OpClass::Write, 50_000, 2, Fault::Media));
}

#[test]
fn a_full_disk_that_gets_room_again_loses_nothing() {
    random_io_with("full-disk", 13, 1, |faults| faults.fail_randomly(OpClass::Write, 100_000, 3, Fault::NoSpace));
}

#[test]
fn syncs_that_fail_make_their_writes_dirty_again() {
    random_io_with("faulty-syncs", 14, 1, |faults| faults.fail_randomly(OpClass::Sync, 300_000, 4, Fault::Media));
}

#[test]
fn everything_may_fail_at_once_with_two_workers() {
    random_io_with("all-faulty", 15, 2, |faults| {
        for (seed, kind) in (5..).zip(OpClass::ALL) {
            faults.fail_randomly(kind, 30_000, seed, Fault::Media);
        }
    });
}

#[test]
fn devices_on_one_image_end_although_one_waits_for_what_the_other_reads() {
    const DELAY: Duration = Duration::from_secs(1);
    let directory = TempDir::new("two-readers");
    let image = directory.path().join("disk.img");
    fs::write(&image, vec![7; IMAGE_BYTES]).expect("the image is written");
    let file: Arc<dyn Backing> = FileImage::open(&image, &OpenOptions::default()).expect("the image opens");
    let (faulty, faults) = FaultyImage::new(file);
    let [config, other] = ["one", "other"].map(|name| {
        let socket = Socket::Path(directory.path().join(name));
        DeviceConfig { read_only: true, ..DeviceConfig::new(name, socket, image.clone()) }
    });
    let one = Service::with_image(&config, faulty).expect("the image is opened");
    let services = [one.sharing_image_of(&other).expect("it is shared"), one];
    let [other, one] = services.map(|service| service.start().expect("the device is served"));
    let options = ClientOptions { read_only: true, ..ClientOptions::default() };
    let [mut reader, mut waiter] = ["one", "other"].map(|name| Client::connect(&directory.path().join(name), &options));
    // The reader goes on until it finds in memory what it asks for, and more is read ahead for it meanwhile.
    let mut sector = 0;
    let mut go_on = || {
        reader.read(sector, 4096);
        sector += 8;
    };
    (0..64).for_each(|_| go_on());
    faults.delay(OpClass::Read, DELAY);
    let reads = faults.ops(OpClass::Read);
    while faults.ops(OpClass::Read) == reads {
        go_on();
    }
    let (missed, pages) = (one.stats().read_miss_pages, one.stats().resident_pages);
    let waiting = thread::spawn(move || waiter.try_read((pages - 16) * 8, 64 << 10));
    poll_until("the other to wait", PATIENCE, || (one.stats().read_miss_pages > missed).then_some(()));
    let ended = thread::spawn(move || shutdown_all(vec![one, other], Running::shutdown));
    poll_until("the end", PATIENCE, || ended.is_finished().then_some(()));
    ended.join().expect("nothing panics").expect("the devices end well");
    assert!(waiting.join().expect("nothing panics").is_some(), "what was taken is answered");
}

#[test]
fn a_front_end_is_served_while_the_last_ones_writes_are_held() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 32);
    let bench = Bench::new("held", &shadow, |config| {
        config.cache.on_error = OnError::Hold;
        config.cache.hold_max_ms = 60_000;
    });
    let mut client = bench.client(1);
    bench.faults.fail_always(OpClass::Write, Fault::Media);
    client.write(80, &[0x5a; 4096]);
    shadow.write(80, &[0x5a; 4096]);
    drop(client);
    let came = Instant::now();
    let mut client = bench.client(1);
    assert_eq!(client.read(80, 4096), [0x5a; 4096]);
    assert!(came.elapsed() < PATIENCE, "it was served after {:?}", came.elapsed());
    bench.faults.heal();
    drop(client);
    bench.end(&shadow);
}

#[test]
fn a_failing_image_fails_the_flush_and_not_the_write() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 21);
    let bench = Bench::new("flush-fails", &shadow, |_| {});
    let mut client = bench.client(1);
    bench.faults.fail_always(OpClass::Write, Fault::Media);
    let bytes = vec![0x5a; 4096];
    client.write(80, &bytes);
    shadow.write(80, &bytes);
    assert!(!client.flush(), "the image refuses the write, so the flush must fail");
    assert_eq!(client.read(80, 4096), bytes, "a read that hits goes on");
    assert!(!client.flush(), "and again, while it refuses");
    bench.faults.heal();
    assert!(client.flush(), "a flush asks the image at once");
    drop(client);
    bench.end(&shadow);
}

#[test]
fn at_the_dirty_limit_of_a_failing_image_writes_fail_and_do_not_hang() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 22);
    let bench = Bench::new("limit", &shadow, |_| {});
    let mut client = bench.client(1);
    bench.faults.fail_always(OpClass::Write, Fault::NoSpace);
    let plan = IoPlan { requests: 4000, seed: 23, checkpoints: 1, read_only: false };
    let mut shadow = shadow;
    let mut faults = workload::Faults { allowed: &|| true, flushed: &mut |_| {} };
    let started = Instant::now();
    let report = random_io(&mut client, &mut shadow, &plan, &mut faults);
    assert!(report.failed > 0, "a quarter of 4 MiB is soon full: {report:?}");
    assert!(started.elapsed() < Duration::from_secs(60), "nothing waits for an image that does not heal");
    bench.faults.heal();
    settle(&mut client, HEALING);
    read_everything(&mut client, &shadow);
    drop(client);
    bench.end(&shadow);
}

/// T1: a FLUSH reaches the image as a sync.
#[test]
fn a_flush_is_a_sync_of_the_image() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 24);
    let bench = Bench::new("flush-syncs", &shadow, |_| {});
    let mut client = bench.client(1);
    let before = bench.faults.ops(OpClass::Sync);
    client.write(0, &[1; 512]);
    assert!(client.flush());
    assert_eq!(bench.faults.ops(OpClass::Sync), before + 1);
    assert!(client.flush());
    assert_eq!(bench.faults.ops(OpClass::Sync), before + 1, "nothing was written since: no second sync");
}

#[test]
fn the_next_front_end_finds_the_cache_warm() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 25);
    let bench = Bench::new("warm", &shadow, |config| config.cache.size_bytes = 64 << 20);
    read_everything(&mut bench.client(1), &shadow);
    let cold = bench.faults.bytes(OpClass::Read);
    assert!(cold > 0, "the first pass reads the image");
    read_everything(&mut bench.client(1), &shadow);
    assert_eq!(bench.faults.bytes(OpClass::Read), cold, "the second does not");
    assert!(bench.running().stats().read_hit_pages > 0);
}

/// What no Sync has covered stays in memory: it may not take all of it, or a read would wait as long as the image fails.
#[test]
fn reads_go_on_while_no_sync_succeeds() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 27);
    let bench = Bench::new("no-sync", &shadow, |config| config.cache.dirty_age_max_ms = 100);
    let mut client = bench.client(1);
    bench.faults.fail_always(OpClass::Sync, Fault::Media);
    let pages = IMAGE_BYTES as u64 / 4096;
    let started = Instant::now();
    let mut refused = 0;
    // Twice as many pages as the cache has, slowly enough for write-back to make room for more.
    for page in (0..pages).step_by(4) {
        if client.try_write(page * 8, &[9; 4096]) {
            shadow.write(page * 8, &[9; 4096]);
        } else {
            refused += 1;
            shadow.doubt_write(page * 8, &[9; 4096]);
            thread::sleep(Duration::from_millis(1));
        }
        if page % 64 == 0 {
            assert!(!client.flush(), "nothing is durable");
        }
    }
    assert!(refused > 0, "what is not durable has its bound");
    for page in (1..pages).step_by(64) {
        let found = client.read(page * 8, 4096);
        assert_eq!(shadow.check(page * 8, &found), Ok(()));
    }
    // Seconds; minutes where each request waits for the next try.
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    bench.faults.heal();
    settle(&mut client, HEALING);
    read_everything(&mut client, &shadow);
    drop(client);
    bench.end(&shadow);
}

/// Somebody else shrinks the image, and later gives it its size back.
#[test]
fn an_image_that_shrinks_is_never_made_to_grow_again() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 26);
    let bench = Bench::new("shrinks", &shadow, |_| {});
    let mut client = bench.client(1);
    let file = File::options().write(true).open(bench.image()).expect("the image can be opened");
    let (half, hole) = (IMAGE_BYTES as u64 / 2, IMAGE_BYTES as u64 / 512 - 8);
    // Beyond the middle, and in memory: known to be no hole.
    let data = half / 512 + 8;
    client.read(data, 4096);
    file.set_len(half).expect("it can be shrunk");
    for sector in [0, data] {
        client.write(sector, &[7; 4096]);
        shadow.write(sector, &[7; 4096]);
    }
    assert!(!client.try_write(hole, &[7; 4096]), "a hole beyond the end can't have its space");
    assert!(client.try_read(half / 512 + 2048, 4096).is_none(), "there is nothing to read");
    assert!(!client.flush(), "the page beyond the end has no place any more");
    assert_eq!(file.metadata().expect("it is there").len(), half, "nothing was written beyond the end");
    assert_eq!(client.read(data, 4096), [7; 4096], "it is in memory");
    file.set_len(IMAGE_BYTES as u64).expect("it can be given its size back");
    assert!(client.flush(), "and now it has a place");
    assert_eq!(client.read(0, 4096), [7; 4096]);
    shadow.discard(half / 512, half / 512);
    shadow.write(data, &[7; 4096]);
    drop(client);
    bench.end(&shadow);
}

/// The guest's disk keeps the size that it was served with.
#[test]
fn an_image_that_grows_or_is_deleted_is_served_as_it_was() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 28);
    let bench = Bench::new("grows", &shadow, |_| {});
    let mut client = bench.client(1);
    let file = File::options().write(true).open(bench.image()).expect("the image can be opened");
    let twice = 2 * IMAGE_BYTES as u64;
    file.set_len(twice).expect("it can be made longer");
    let kept = bench.image().with_extension("kept");
    fs::hard_link(bench.image(), &kept).expect("the image can have a second name");
    for sector in [0, IMAGE_BYTES as u64 / 512 - 8] {
        client.write(sector, &[5; 4096]);
        shadow.write(sector, &[5; 4096]);
    }
    assert!(client.flush());
    assert_eq!(client.sectors(), IMAGE_BYTES as u64 / 512);
    assert_eq!(file.metadata().expect("it is there").len(), twice, "nobody takes away what others have added");

    file.set_len(IMAGE_BYTES as u64).expect("it can be shortened again");
    fs::remove_file(&kept).and_then(|()| fs::remove_file(bench.image())).expect("both names can go");
    client.write(80, &[6; 4096]);
    assert!(client.flush(), "the file is there as long as it is open");
    assert_eq!(client.read(80, 4096), [6; 4096]);
    drop(client);
    // Only the open file has the bytes now.
    bench.end_without_image();
}

/// Nanoseconds for which the worker of the device "drains" had a processor.
fn worker_activity() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc is mounted");
    let worker = tasks
        .map(|task| task.expect("we live").path())
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == "genblk drains"));
    let ns_on_processor = worker.filter_map(|task| {
        let schedstat = fs::read_to_string(task.join("schedstat")).ok()?;
        schedstat.split(' ').next()?.parse::<u64>().ok()
    });
    ns_on_processor.sum()
}

/// A front-end that loses its daemon looks at the used ring to see where the next one goes on: the daemon answers what it took,
/// and only then hangs up.
#[test]
fn a_daemon_that_ends_answers_what_it_took_before_it_hangs_up() {
    const SYNC: Duration = Duration::from_millis(600);
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 29);
    let bench = Bench::new("hangs-up", &shadow, |config| config.name = "drains".to_owned());
    bench.faults.delay(OpClass::Sync, SYNC);
    let mut session = Session::open(bench.socket(), &SessionOptions::default());
    session.write(0, &[3; 512]);
    shadow.write(0, &[3; 512]);
    let flush = session.submit(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    poll_until("the flush to reach the image", PATIENCE, || (bench.faults.ops(OpClass::Sync) > 0).then_some(()));
    let before = session.rings[0].used_idx();
    let busy = worker_activity();
    bench.running().stop_accepting();
    // Time for the ring to be told; what comes now is for the next daemon.
    thread::sleep(ABSENCE);
    session.submit(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    poll_until("the daemon to hang up", PATIENCE, || session.has_hung_up().then_some(()));
    let busy = Duration::from_nanos(worker_activity() - busy);
    assert!(busy < SYNC / 120, "a worker that drains a ring sleeps, and was busy for {busy:?}");
    assert_eq!(session.rings[0].used_idx(), before + 1, "nothing is on its way any more");
    assert_eq!(session.memory.byte(flush.status), OK);
    bench.end(&shadow);
}

/// A front-end that stalls in the middle of a message keeps nobody from ending the device.
#[test]
fn a_front_end_that_stalls_does_not_hold_up_the_end() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 30);
    let bench = Bench::new("stalls", &shadow, |_| {});
    let session = Session::open(bench.socket(), &SessionOptions::default());
    (&session.socket).write_all(&[1, 0, 0]).expect("the daemon listens");
    // Time for the daemon to begin reading it.
    thread::sleep(ABSENCE);
    let started = Instant::now();
    bench.end(&shadow);
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
}
