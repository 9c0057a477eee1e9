//! A device on a failing image, served in this process: the tests control when faults come and go.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::daemon::TempDir;
use common::faulty_device::FaultyDevice;
use common::flood::Flood;
use common::raw_ring::{Ring, Segment};
use common::request::{OK, Payload, header, range};
use common::session::{Session, SessionOptions};
use common::shadow::Shadow;
use common::wait::{ABSENCE, TIMEOUT, poll_until};
use common::workload::{Client, ClientOptions, FaultRules, IoPlan, random_io, read_everything, settle};
use genblk::config::{DeviceConfig, OnError, Socket};
use genblk::disk_protocol::{DeviceReply, DeviceRequest};
use genblk::service::{Running, Service};
use genblk::store::Backing;
use genblk::store::faulty::{Faults, FaultyImage};
use genblk::store::file::{FileImage, OpenOptions};
use genblk::units::{Fault, OpClass};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_WRITE_ZEROES};

const IMAGE_BYTES: usize = 32 << 20;
const HEALING: Duration = Duration::from_secs(20);

/// Runs random I/O while `inject` makes the image fail; heals the image at each checkpoint and at the end.
fn check_random_io_with(name: &str, seed: u64, workers: u16, inject: impl Fn(&Faults)) {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, seed);
    let device = FaultyDevice::new(name, &shadow, |config| config.workers = workers);
    let mut client = device.client(workers.max(2));
    let failing = AtomicBool::new(true);
    inject(&device.faults);
    for round in 0..4 {
        let plan = IoPlan { requests: 3000, seed: seed + round, checkpoints: 1, read_only: false };
        failing.store(true, Ordering::Relaxed);
        inject(&device.faults);
        let mut heal = |_: &Shadow| {
            device.faults.heal();
            failing.store(false, Ordering::Relaxed);
        };
        let mut faults = FaultRules { may_fail: &|| failing.load(Ordering::Relaxed), after_flush: &mut heal };
        let report = random_io(&mut client, &mut shadow, &plan, &mut faults);
        assert_eq!(report.completed, 3000, "every request completes: {report:?}");
        device.faults.heal();
        settle(&mut client, HEALING);
        read_everything(&mut client, &shadow);
    }
    let failed: u64 = OpClass::ALL.iter().map(|&kind| device.faults.failed(kind)).sum();
    assert!(failed > 20, "only {failed} operations failed");
    drop(client);
    device.shutdown(&shadow);
}

#[test]
fn failed_reads_are_reported_and_lose_no_data() {
    check_random_io_with("faulty-reads", 11, 1, |faults| faults.fail_randomly(OpClass::Read, 20_000, 1, Fault::Media));
}

#[test]
fn failed_writes_are_retried() {
    check_random_io_with("faulty-writes", 12, 1, |faults| {
        faults.fail_randomly(OpClass::Write, 50_000, 2, Fault::Media);
    });
}

#[test]
fn freeing_space_on_a_full_disk_loses_no_data() {
    check_random_io_with("full-disk", 13, 1, |faults| faults.fail_randomly(OpClass::Write, 100_000, 3, Fault::NoSpace));
}

#[test]
fn failed_syncs_make_their_pages_dirty_again() {
    check_random_io_with("faulty-syncs", 14, 1, |faults| faults.fail_randomly(OpClass::Sync, 300_000, 4, Fault::Media));
}

#[test]
fn all_operations_may_fail_with_two_workers() {
    check_random_io_with("all-faulty", 15, 2, |faults| {
        for (seed, kind) in (5..).zip(OpClass::ALL) {
            faults.fail_randomly(kind, 30_000, seed, Fault::Media);
        }
    });
}

#[test]
fn devices_of_one_image_shut_down_during_a_shared_read() {
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
    let one = Service::with_image(&config, faulty).expect("the image opens");
    let services = [one.sharing_image_of(&other).expect("the devices share it"), one];
    let [other, one] = services.map(|service| service.start().expect("the device is served"));
    let options = ClientOptions { read_only: true, ..ClientOptions::default() };
    let [mut reader, mut waiter] = ["one", "other"].map(|name| Client::connect(&directory.path().join(name), &options));
    // The reader reads on until readahead runs while its reads hit.
    let mut sector = 0;
    let mut read_next = || {
        reader.read(sector, 4096);
        sector += 8;
    };
    (0..64).for_each(|_| read_next());
    faults.delay(OpClass::Read, DELAY);
    let reads = faults.ops(OpClass::Read);
    while faults.ops(OpClass::Read) == reads {
        read_next();
    }
    let (missed, pages) = (one.stats().read_miss_pages, one.stats().resident_pages);
    let waiting = thread::spawn(move || waiter.try_read((pages - 16) * 8, 64 << 10));
    poll_until("the other device to wait", TIMEOUT, || (one.stats().read_miss_pages > missed).then_some(()));
    let shutdown = thread::spawn(move || {
        let mut devices = [one, other];
        devices.iter().for_each(Running::stop_accepting);
        devices.iter_mut().try_for_each(Running::quiesce)?;
        devices.into_iter().try_for_each(Running::shutdown)
    });
    poll_until("the shutdown", TIMEOUT, || shutdown.is_finished().then_some(()));
    shutdown.join().expect("no thread panics").expect("the devices shut down without an error");
    assert!(waiting.join().expect("no thread panics").is_some(), "a request that was taken completes");
}

#[test]
fn a_shrink_that_fails_leaves_the_whole_disk_to_the_guest() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 41);
    let device = FaultyDevice::new("failed-shrink", &shadow, |_| {});
    let mut client = device.client(1);
    let last = IMAGE_BYTES as u64 / 512 - 8;
    client.write(last, &[1; 4096]);
    device.faults.fail_always(OpClass::Sync, Fault::Media);
    let request = DeviceRequest::Shrink { size_bytes: IMAGE_BYTES as u64 / 2 };
    let reply = device.running().handle().execute(&request, 1);
    assert!(matches!(reply, DeviceReply::Failed { .. }), "{reply:?}");
    device.faults.heal();
    client.write(last, &[2; 4096]);
    shadow.write(last, &[2; 4096]);
    assert_eq!(client.read(last, 4096), vec![2; 4096]);
    settle(&mut client, HEALING);
    drop(client);
    device.shutdown(&shadow);
}

/// Whoever ends the daemon may have repaired the disk, and has no need to resume the device first.
#[test]
fn a_stopped_device_writes_everything_at_shutdown_if_its_image_works_again() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 42);
    let device = FaultyDevice::new("stopped", &shadow, |config| {
        config.cache.on_error = OnError::Stop;
        config.cache.dirty_age_max_ms = 600_000;
    });
    let mut client = device.client(1);
    client.write(80, &[1; 4096]);
    shadow.write(80, &[1; 4096]);
    device.faults.fail_always(OpClass::Write, Fault::Media);
    assert!(!client.flush(), "the image fails");
    device.faults.heal();
    assert!(!client.flush(), "the device has stopped");
    drop(client);
    device.shutdown(&shadow);
}

#[test]
fn a_new_front_end_is_served_while_earlier_writes_are_held() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 32);
    let device = FaultyDevice::new("held", &shadow, |config| {
        config.cache.on_error = OnError::Hold;
        config.cache.hold_max_ms = 60_000;
    });
    let mut client = device.client(1);
    device.faults.fail_always(OpClass::Write, Fault::Media);
    client.write(80, &[0x5a; 4096]);
    shadow.write(80, &[0x5a; 4096]);
    drop(client);
    let connected = Instant::now();
    let mut client = device.client(1);
    assert_eq!(client.read(80, 4096), [0x5a; 4096]);
    assert!(connected.elapsed() < TIMEOUT, "served after {:?}", connected.elapsed());
    device.faults.heal();
    drop(client);
    device.shutdown(&shadow);
}

#[test]
fn a_failing_image_fails_the_flush_but_not_the_write() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 21);
    let device = FaultyDevice::new("flush-fails", &shadow, |_| {});
    let mut client = device.client(1);
    device.faults.fail_always(OpClass::Write, Fault::Media);
    let bytes = vec![0x5a; 4096];
    client.write(80, &bytes);
    shadow.write(80, &bytes);
    assert!(!client.flush(), "the image fails the write, so the FLUSH must fail");
    assert_eq!(client.read(80, 4096), bytes, "a read that hits succeeds");
    assert!(!client.flush(), "the FLUSH fails as long as the image does");
    device.faults.heal();
    assert!(client.flush(), "a FLUSH retries at once");
    drop(client);
    device.shutdown(&shadow);
}

#[test]
fn writes_at_the_dirty_limit_of_a_failing_image_fail_promptly() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 22);
    let device = FaultyDevice::new("limit", &shadow, |_| {});
    let mut client = device.client(1);
    device.faults.fail_always(OpClass::Write, Fault::NoSpace);
    let plan = IoPlan { requests: 4000, seed: 23, checkpoints: 1, read_only: false };
    let mut shadow = shadow;
    let mut faults = FaultRules { may_fail: &|| true, after_flush: &mut |_| {} };
    let started = Instant::now();
    let report = random_io(&mut client, &mut shadow, &plan, &mut faults);
    assert!(report.failed > 0, "the dirty limit, a quarter of 4 MiB, is reached: {report:?}");
    assert!(started.elapsed() < Duration::from_secs(60), "no request waits for the image to recover");
    device.faults.heal();
    settle(&mut client, HEALING);
    read_everything(&mut client, &shadow);
    drop(client);
    device.shutdown(&shadow);
}

/// T1.
#[test]
fn a_flush_syncs_the_image() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 24);
    let device = FaultyDevice::new("flush-syncs", &shadow, |_| {});
    let mut client = device.client(1);
    let before = device.faults.ops(OpClass::Sync);
    client.write(0, &[1; 512]);
    assert!(client.flush());
    assert_eq!(device.faults.ops(OpClass::Sync), before + 1);
    assert!(client.flush());
    assert_eq!(device.faults.ops(OpClass::Sync), before + 1, "no write since: no second Sync");
}

/// An earlier daemon may have changed the image and died before it saw the changes end.
#[test]
fn the_first_flush_of_a_daemon_syncs_the_image() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 33);
    let device = FaultyDevice::new("first-flush", &shadow, |_| {});
    let mut client = device.client(1);
    assert!(client.flush());
    assert_eq!(device.faults.ops(OpClass::Sync), 1, "the first FLUSH syncs, although nothing was written");
    assert!(client.flush());
    assert_eq!(device.faults.ops(OpClass::Sync), 1, "the second one has nothing to sync");
}

#[test]
fn dirty_age_max_ms_bounds_the_time_until_a_write_is_synced() {
    const AGE_MS: u32 = 1000;
    const AGE: Duration = Duration::from_millis(AGE_MS as u64);
    let shadow = Shadow::patchwork(IMAGE_BYTES, 34);
    let device = FaultyDevice::new("age", &shadow, |config| config.cache.dirty_age_max_ms = AGE_MS);
    let ops = |class| device.faults.ops(class);
    let mut session = Session::open(device.socket(), &SessionOptions::default());
    // Three times the limit, because the machine may be loaded.
    let await_sync = |syncs: u64| {
        poll_until("a Sync without a FLUSH", 3 * AGE, || (ops(OpClass::Sync) > syncs).then_some(()));
    };
    let write_and_await_sync = |session: &mut Session, byte: u8| {
        let (writes, syncs) = (ops(OpClass::Write), ops(OpClass::Sync));
        session.write(80, &[byte; 4096]);
        poll_until("early write-back", AGE, || (ops(OpClass::Write) > writes).then_some(()));
        await_sync(syncs);
    };
    // Written back because the guest is idle.
    write_and_await_sync(&mut session, 1);
    let syncs = ops(OpClass::Sync);
    assert_eq!(session.write_zeroes(&[range(80, 8, 0)]), OK);
    await_sync(syncs);
    // Written back because the guest flushes often.
    for byte in 2..4 {
        session.write(80, &[byte; 4096]);
        session.flush();
    }
    write_and_await_sync(&mut session, 4);
}

#[test]
fn the_next_front_end_finds_the_cache_warm() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 25);
    let device = FaultyDevice::new("warm", &shadow, |config| config.cache.size_bytes = 64 << 20);
    read_everything(&mut device.client(1), &shadow);
    let cold = device.faults.bytes(OpClass::Read);
    assert!(cold > 0, "the first pass reads from the image");
    read_everything(&mut device.client(1), &shadow);
    assert_eq!(device.faults.bytes(OpClass::Read), cold, "the second pass does not");
    assert!(device.running().stats().read_hit_pages > 0);
}

/// Pages that no Sync has covered stay in memory. They must not take all of it: reads need frames too.
#[test]
fn reads_continue_while_every_sync_fails() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 27);
    let device = FaultyDevice::new("no-sync", &shadow, |config| config.cache.dirty_age_max_ms = 100);
    let mut client = device.client(1);
    device.faults.fail_always(OpClass::Sync, Fault::Media);
    let pages = IMAGE_BYTES as u64 / 4096;
    let started = Instant::now();
    let mut failed = 0;
    // Twice as many pages as the cache has, slowly enough for write-back to clean some.
    for page in (0..pages).step_by(4) {
        if client.try_write(page * 8, &[9; 4096]) {
            shadow.write(page * 8, &[9; 4096]);
        } else {
            failed += 1;
            shadow.doubt_write(page * 8, &[9; 4096]);
            thread::sleep(Duration::from_millis(1));
        }
        if page % 64 == 0 {
            assert!(!client.flush(), "no Sync succeeds");
        }
    }
    assert!(failed > 0, "the number of unstable pages has a limit");
    for page in (1..pages).step_by(64) {
        let found = client.read(page * 8, 4096);
        assert_eq!(shadow.check(page * 8, &found), Ok(()));
    }
    // It takes seconds. If each request waited for a retry, it would take minutes.
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    device.faults.heal();
    settle(&mut client, HEALING);
    read_everything(&mut client, &shadow);
    drop(client);
    device.shutdown(&shadow);
}

/// Another process shrinks the image, and later restores its size.
#[test]
fn a_shrunk_image_is_never_extended() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 26);
    let device = FaultyDevice::new("shrinks", &shadow, |_| {});
    let mut client = device.client(1);
    let file = File::options().write(true).open(device.image()).expect("the image can be opened");
    let (half, hole) = (IMAGE_BYTES as u64 / 2, IMAGE_BYTES as u64 / 512 - 8);
    // Beyond the middle, and cached: known to be data.
    let data = half / 512 + 8;
    client.read(data, 4096);
    file.set_len(half).expect("the image can be shrunk");
    for sector in [0, data] {
        client.write(sector, &[7; 4096]);
        shadow.write(sector, &[7; 4096]);
    }
    assert!(!client.try_write(hole, &[7; 4096]), "a hole beyond the end cannot be allocated");
    assert!(client.try_read(half / 512 + 2048, 4096).is_none(), "a read beyond the end fails");
    assert!(!client.flush(), "the dirty page lies beyond the end of the image");
    assert_eq!(file.metadata().expect("the image exists").len(), half, "no write extended the image");
    assert_eq!(client.read(data, 4096), [7; 4096], "the page is cached");
    file.set_len(IMAGE_BYTES as u64).expect("the image can get its size back");
    assert!(client.flush(), "the dirty page is inside the image again");
    assert_eq!(client.read(0, 4096), [7; 4096]);
    shadow.discard(half / 512, half / 512);
    shadow.write(data, &[7; 4096]);
    drop(client);
    device.shutdown(&shadow);
}

#[test]
fn a_grown_or_deleted_image_is_served_at_its_old_size() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 28);
    let device = FaultyDevice::new("grows", &shadow, |_| {});
    let mut client = device.client(1);
    let file = File::options().write(true).open(device.image()).expect("the image can be opened");
    let twice = 2 * IMAGE_BYTES as u64;
    file.set_len(twice).expect("the image can be extended");
    let kept = device.image().with_extension("kept");
    fs::hard_link(device.image(), &kept).expect("the image can get a second link");
    for sector in [0, IMAGE_BYTES as u64 / 512 - 8] {
        client.write(sector, &[5; 4096]);
        shadow.write(sector, &[5; 4096]);
    }
    assert!(client.flush());
    assert_eq!(client.sectors(), IMAGE_BYTES as u64 / 512);
    assert_eq!(file.metadata().expect("the image exists").len(), twice, "the device does not truncate the image");

    file.set_len(IMAGE_BYTES as u64).expect("the image can be shrunk again");
    fs::remove_file(&kept).and_then(|()| fs::remove_file(device.image())).expect("both links can be removed");
    client.write(80, &[6; 4096]);
    assert!(client.flush(), "the open file still takes writes");
    assert_eq!(client.read(80, 4096), [6; 4096]);
    drop(client);
    // The image is no longer linked: there is no file to check.
    device.shutdown_without_image();
}

/// Nanoseconds of processor time of the worker of the device "drains".
fn worker_activity() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc is mounted");
    let worker = tasks
        .map(|task| task.expect("this process exists").path())
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == "genblk drains"));
    let ns_on_processor = worker.filter_map(|task| {
        let schedstat = fs::read_to_string(task.join("schedstat")).ok()?;
        schedstat.split(' ').next()?.parse::<u64>().ok()
    });
    ns_on_processor.sum()
}

/// A front-end that loses its daemon takes the base for the next one from the used ring. So the daemon must complete
/// every request that it took before it closes the connection.
#[test]
fn shutdown_completes_requests_in_flight_before_it_disconnects() {
    const SYNC: Duration = Duration::from_millis(600);
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 29);
    let device = FaultyDevice::new("hangs-up", &shadow, |config| config.name = "drains".to_owned());
    device.faults.delay(OpClass::Sync, SYNC);
    let mut session = Session::open(device.socket(), &SessionOptions::default());
    session.write(0, &[3; 512]);
    shadow.write(0, &[3; 512]);
    let flush = session.submit(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    poll_until("the FLUSH to reach the image", TIMEOUT, || (device.faults.ops(OpClass::Sync) > 0).then_some(()));
    let before = session.rings[0].used_idx();
    let busy = worker_activity();
    device.running().stop_accepting();
    // Time for the worker to stop its ring. A request that comes now is left to the next daemon.
    thread::sleep(ABSENCE);
    session.submit(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    poll_until("the daemon to close the connection", TIMEOUT, || session.is_closed().then_some(()));
    let busy = Duration::from_nanos(worker_activity() - busy);
    assert!(busy < SYNC / 120, "the worker should sleep while it drains; it was busy for {busy:?}");
    assert_eq!(session.rings[0].used_idx(), before + 1, "the first FLUSH is complete, the second one not taken");
    assert_eq!(session.memory.byte(flush.status), OK);
    device.shutdown(&shadow);
}

/// The front-end has sent a part of a message.
#[test]
fn a_front_end_stalled_within_a_message_does_not_delay_shutdown() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 30);
    let device = FaultyDevice::new("stalls", &shadow, |_| {});
    let session = Session::open(device.socket(), &SessionOptions::default());
    (&session.socket).write_all(&[1, 0, 0]).expect("the daemon reads the socket");
    // Time for the daemon to start reading the message.
    thread::sleep(ABSENCE);
    let started = Instant::now();
    device.shutdown(&shadow);
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
}

/// 16 requests with `segments` segments of `sectors` sectors each go to a slow image; the ring stops when the first
/// operation has begun. Returns the number of bytes that the image has zeroed or discarded until then.
fn bytes_until_stopped(kind: u32, class: OpClass, sectors: u32, segments: u16) -> u64 {
    const REQUESTS: u16 = 16;
    const IMAGE_BYTES: u64 = 4 << 30;
    let directory = TempDir::new("stop-ranges");
    let (image, socket) = (directory.path().join("disk.img"), directory.path().join("blk.sock"));
    File::create(&image).and_then(|file| file.set_len(IMAGE_BYTES)).expect("an image can be created");
    let file: Arc<dyn Backing> = FileImage::open(&image, &OpenOptions::default()).expect("the image opens");
    let (faulty, faults) = FaultyImage::new(file);
    let config = DeviceConfig::new("faulty", Socket::Path(socket.clone()), image);
    let running = Service::with_image(&config, faulty).and_then(Service::start).expect("the device is served");
    let options = SessionOptions { queue_size: 64, region_bytes: 1 << 20, ..SessionOptions::default() };
    let mut session = Session::open(&socket, &options);
    let memory = &session.memory;
    let payload_bytes = 16 * segments;
    let (head, status, payload) = (memory.alloc(16, 16), memory.alloc(1, 1), memory.alloc(payload_bytes.into(), 16));
    memory.write(head, &header(kind, 0));
    let start = |nth: u16| u64::from(nth) * u64::from(sectors) % (IMAGE_BYTES / 512);
    memory.write(payload, &(0..segments).flat_map(|nth| range(start(nth), sectors, 0)).collect::<Vec<u8>>());
    let buffers =
        [Segment::readable(head, 16), Segment::readable(payload, payload_bytes.into()), Segment::writable(status, 1)];
    let flood = Flood::of(&session, Ring::table_of(&buffers), status);
    faults.delay(class, Duration::from_millis(100));
    flood.submit(&mut session, 0, REQUESTS);
    poll_until("the first operation", TIMEOUT, || (faults.ops(class) > 0).then_some(()));
    let base = session.stop_ring(0);
    let bytes = faults.bytes(class);
    assert_eq!(base, session.rings[0].used_idx(), "a request that has not completed counts as not taken");
    faults.heal();
    session.start_ring(0);
    session.rings[0].notify();
    poll_until("all requests to complete", TIMEOUT, || (session.rings[0].used_idx() == REQUESTS).then_some(()));
    assert_eq!(session.memory.byte(status), OK);
    drop(session);
    running.shutdown().expect("no data is left");
    bytes
}

#[test]
fn a_ring_that_stops_waits_for_at_most_128_mib_of_zeros_or_discards() {
    for (kind, class, sectors, segments) in [
        (VIRTIO_BLK_T_DISCARD, OpClass::Discard, 1 << 21, 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, OpClass::Zero, 1 << 15, 32),
        (VIRTIO_BLK_T_WRITE_ZEROES, OpClass::Zero, 1 << 15, 1),
    ] {
        let bytes = bytes_until_stopped(kind, class, sectors, segments);
        assert!(bytes <= 128 << 20, "{class:?}, {segments} segments: {} MiB", bytes >> 20);
    }
}
