//! The counters of a device: known requests give exactly their counts, bytes and latencies.

mod common;

use std::time::{Duration, Instant};

use common::faulty_device::FaultyDevice;
use common::request::{OK, Payload, range};
use common::session::{Session, SessionOptions};
use common::shadow::Shadow;
use common::wait::{TIMEOUT, poll_until};
use genblk::counters::snapshot::Snapshot;
use genblk::counters::worker::Activity;
use genblk::counters::{Class, Operation, Served};
use genblk::units::{Fault, OpClass};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

const IMAGE_BYTES: usize = 8 << 20;
const QUEUES: usize = 4;
/// The image has data and holes in turn, each of so many sectors.
const CHUNK_SECTORS: u64 = 512;

/// Waits until the device has counted `requests` requests, of all kinds, and none is in flight.
fn snapshot_after(device: &FaultyDevice, requests: u64) -> Snapshot {
    poll_until("the requests are counted", TIMEOUT, || {
        let snapshot = device.running().counters();
        let completed: u64 = Operation::ALL.map(|operation| snapshot.completed(operation)).iter().sum();
        let in_flight: u64 = Operation::ALL.map(|operation| snapshot.in_flight(operation)).iter().sum();
        (completed == requests && in_flight == 0).then_some(snapshot)
    })
}

fn check_that_known_requests_are_counted(workers: u16) {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 41);
    let device = FaultyDevice::new("counted", &shadow, |config| config.workers = workers);
    let options = SessionOptions { queues: QUEUES, ..SessionOptions::default() };
    let mut session = Session::open(device.socket(), &options);
    let started = Instant::now();
    let mut run =
        |nth: usize, kind, sector, payload: Payload<'_>| session.run(nth % QUEUES, kind, sector, payload).status;
    // Each page is written first, so that every read finds it in memory.
    for nth in 0..100 {
        assert_eq!(run(nth, VIRTIO_BLK_T_OUT, nth as u64 * 8, Payload::Send(&[7; 4096])), OK);
    }
    for nth in 0..600 {
        let (page, sectors) = (nth as u64 % 100, nth % 8 + 1);
        assert_eq!(run(nth, VIRTIO_BLK_T_IN, page * 8, Payload::Receive(sectors * 512)), OK);
    }
    for nth in 0..100 {
        assert_eq!(run(nth, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty), OK);
        assert_eq!(run(nth, VIRTIO_BLK_T_DISCARD, 0, Payload::Send(&range(8000, 8, 0))), OK);
        assert_eq!(run(nth, VIRTIO_BLK_T_WRITE_ZEROES, 0, Payload::Send(&range(9000, 16, 0))), OK);
    }
    for nth in 0..50 {
        assert_ne!(run(nth, VIRTIO_BLK_T_IN, IMAGE_BYTES as u64, Payload::Receive(512)), OK, "beyond the end");
        run(nth, VIRTIO_BLK_T_GET_ID, 0, Payload::Receive(20));
    }
    let elapsed_ns = u64::try_from(started.elapsed().as_nanos()).expect("584 years");
    let snapshot = snapshot_after(&device, 1050);
    let totals = |operation| {
        let totals = snapshot.operation(operation);
        (totals.begun, totals.errors, totals.bytes)
    };
    assert_eq!(totals(Operation::Write), (100, 0, 100 * 4096));
    assert_eq!(totals(Operation::Read), (650, 50, 75 * (1..=8).sum::<u64>() * 512), "failed requests move no bytes");
    assert_eq!(totals(Operation::Flush), (100, 0, 0));
    assert_eq!(totals(Operation::Discard), (100, 0, 100 * 8 * 512));
    assert_eq!(totals(Operation::WriteZeroes), (100, 0, 100 * 16 * 512));
    let read = |served| snapshot.requests(Class::new(Operation::Read, served));
    assert_eq!((read(Served::Memory).count(), read(Served::Waited).count()), (650, 0));
    let total_ns: u64 = Class::ALL.map(|class| snapshot.requests(class).sum_ns).iter().sum();
    assert!(total_ns > 0 && total_ns <= elapsed_ns, "one request at a time: {total_ns} ns of {elapsed_ns} ns");
    assert_eq!(snapshot.workers(), usize::from(workers));
    for worker in 0..workers.into() {
        assert!(snapshot.activity(worker, Activity::Turns) > 0, "each worker served rings");
    }
    let syncs = snapshot.store(OpClass::Sync).count();
    assert_eq!(syncs, device.faults.ops(OpClass::Sync), "operations on the image are counted as the image saw them");
    assert_eq!(snapshot.store_operation(OpClass::Sync).begun, syncs);
}

#[test]
fn known_requests_are_counted_exactly_by_one_worker() {
    check_that_known_requests_are_counted(1);
}

#[test]
fn known_requests_are_counted_exactly_by_four_workers() {
    check_that_known_requests_are_counted(4);
}

#[test]
fn an_idle_device_counts_nothing() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 42);
    let device = FaultyDevice::new("idle", &shadow, |_| {});
    let snapshot = device.running().counters();
    for class in Class::ALL {
        let latencies = snapshot.requests(class);
        assert_eq!((latencies.count(), latencies.quantile(990), latencies.mean_ns()), (0, None, None), "{class:?}");
    }
    assert!(Operation::ALL.iter().all(|&operation| snapshot.in_flight(operation) == 0));
}

#[test]
fn only_a_read_from_the_image_counts_its_wait() {
    const SLOW: Duration = Duration::from_millis(200);
    let shadow = Shadow::patchwork(IMAGE_BYTES, 43);
    let device = FaultyDevice::new("slow-image", &shadow, |_| {});
    let mut session = Session::open(device.socket(), &SessionOptions::default());
    device.faults.delay(OpClass::Read, SLOW);
    session.read(0, 4096);
    session.read(0, 4096);
    device.faults.heal();
    device.faults.fail_always(OpClass::Read, Fault::Media);
    assert_ne!(session.run(0, VIRTIO_BLK_T_IN, 16 * CHUNK_SECTORS, Payload::Receive(4096)).status, OK);
    let snapshot = snapshot_after(&device, 3);
    let slow_ns = u64::try_from(SLOW.as_nanos()).expect("584 years");
    let (waited, memory) = (Class::new(Operation::Read, Served::Waited), Class::new(Operation::Read, Served::Memory));
    assert!(snapshot.requests(waited).max_ns >= slow_ns, "{} ns", snapshot.requests(waited).max_ns);
    assert_eq!((snapshot.requests(waited).count(), snapshot.requests(memory).count()), (2, 1));
    assert!(snapshot.requests(memory).max_ns < slow_ns, "{} ns", snapshot.requests(memory).max_ns);
    assert_eq!(snapshot.operation(Operation::Read).errors, 1);
    let reads = snapshot.store_operation(OpClass::Read);
    assert!(reads.errors >= 1 && reads.bytes >= 4096, "{reads:?}");
    assert!(snapshot.store(OpClass::Read).max_ns >= slow_ns);
}

#[test]
fn writes_that_are_delayed_for_write_back_are_counted() {
    let shadow = Shadow::patchwork(IMAGE_BYTES, 43);
    let device = FaultyDevice::new("counted-throttled", &shadow, |config| config.cache.flush_target_ms = 50);
    device.faults.delay(OpClass::Write, Duration::from_millis(20));
    let mut session = Session::open(device.socket(), &SessionOptions::default());
    let until = Instant::now() + TIMEOUT;
    let mut page = 0;
    let throttled = loop {
        assert!(Instant::now() < until, "no write was delayed");
        for _ in 0..100 {
            page = (page + 7) % (IMAGE_BYTES as u64 / 4096);
            assert_eq!(session.run(0, VIRTIO_BLK_T_OUT, page * 8, Payload::Send(&[7; 4096])).status, OK);
        }
        let snapshot = device.running().counters();
        let [count, ns] = [Activity::Throttled, Activity::ThrottledNs].map(|activity| snapshot.activity(0, activity));
        if count > 0 {
            break (count, ns);
        }
    };
    // A write is delayed by a microsecond at least, and by 100 ms at most.
    assert!((throttled.0 * 1000..=throttled.0 * 100_000_000).contains(&throttled.1), "{throttled:?}");
}
