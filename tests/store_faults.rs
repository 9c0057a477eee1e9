//! The image that fails on demand: each fault hits the operations that it is set for, and the counters are right.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod store_kit;

use std::sync::Arc;
use std::time::{Duration, Instant};

use genblk::store::faulty::{Faults, FaultyImage};
use genblk::store::file::{FileImage, OpenOptions};
use genblk::store::{Backing, Event, Refused};
use genblk::units::{Fault, OpClass, OpKind, Unmap};
use store_kit::{Buffer, Driver, Image, MIB, pattern, readable, tag_of};

fn faulty(name: &str) -> (Image, Arc<dyn Backing>, Faults) {
    let image = Image::file(name, MIB);
    let opened = FileImage::open(&image.path, &OpenOptions::default()).unwrap();
    let (backing, faults) = FaultyImage::new(opened);
    (image, backing, faults)
}

fn write(driver: &mut Driver, offset: u64, buffer: &mut Buffer) -> Event {
    let len = buffer.len();
    driver.try_run(OpKind::Write, offset, len as u64, vec![buffer.segment(0, len)])
}

#[test]
fn a_planned_failure_of_an_operation_does_not_change_the_image() {
    let (_image, backing, faults) = faulty("nth");
    let mut driver = Driver::new(&backing);
    let mut buffer = Buffer::copy_of(&pattern(4096, 1));
    faults.fail_nth(OpClass::Write, 3, Fault::NoSpace);
    for number in 1..=5u64 {
        let event = write(&mut driver, number * 4096, &mut buffer);
        driver.run(OpKind::Sync, 0, 0, Vec::new());
        let stored = driver.read(number * 4096, 4096);
        if number == 3 {
            assert!(matches!(event, Event::Failed { fault: Fault::NoSpace, errno: libc::ENOSPC, .. }), "{event:?}");
            assert!(stored.iter().all(|&byte| byte == 0), "a failed write must not reach the image");
        } else {
            assert!(matches!(event, Event::Done { .. }), "write {number}: {event:?}");
            assert!(stored == buffer.bytes());
        }
    }
    assert_eq!(
        (faults.ops(OpClass::Write), faults.bytes(OpClass::Write), faults.failed(OpClass::Write)),
        (5, 20480, 1)
    );
    assert_eq!((faults.ops(OpClass::Sync), faults.bytes(OpClass::Sync), faults.failed(OpClass::Sync)), (5, 0, 0));
    assert_eq!(faults.ops(OpClass::Read), 5);
}

#[test]
fn a_permanent_fault_hits_all_workers_until_it_is_healed() {
    let (_image, backing, faults) = faulty("always");
    let (mut a, mut b) = (Driver::new(&backing), Driver::new(&backing));
    faults.clone().fail_always(OpClass::Sync, Fault::Media);
    for driver in [&mut a, &mut b] {
        for _ in 0..3 {
            let event = driver.try_run(OpKind::Sync, 0, 0, Vec::new());
            assert!(matches!(event, Event::Failed { fault: Fault::Media, errno: libc::EIO, .. }), "{event:?}");
        }
        driver.read(0, 4096);
    }
    faults.heal();
    a.run(OpKind::Sync, 0, 0, Vec::new());
    assert_eq!((faults.ops(OpClass::Sync), faults.failed(OpClass::Sync)), (7, 6));
}

#[test]
fn random_failures_repeat_with_their_seed() {
    let (_image, backing, faults) = faulty("random");
    let mut driver = Driver::new(&backing);
    let mut outcome = |seed| {
        faults.fail_randomly(OpClass::Zero, 250_000, seed, Fault::TimedOut);
        (0..400)
            .map(|_| {
                matches!(
                    driver.try_run(OpKind::Zero { unmap: Unmap::Allowed }, 0, 4096, Vec::new()),
                    Event::Failed { .. }
                )
            })
            .collect::<Vec<bool>>()
    };
    let first = outcome(7);
    assert_eq!(first, outcome(7));
    assert_ne!(first, outcome(8));
    let failures = first.iter().filter(|&&failed| failed).count();
    assert!((60..=140).contains(&failures), "{failures} of 400 failed, at a rate of one in four");
}

#[test]
fn a_delayed_operation_completes_after_a_later_one_and_wakes_its_worker() {
    let (_image, backing, faults) = faulty("delay");
    let mut driver = Driver::new(&backing);
    let mut buffer = Buffer::copy_of(&pattern(4096, 2));
    let delay = Duration::from_millis(200);
    faults.delay(OpClass::Write, delay);
    let start = Instant::now();
    let slow = driver.start(OpKind::Write, 0, 4096, vec![buffer.segment(0, 4096)]);
    let mut other = Buffer::filled(4096, 0xee);
    let fast = driver.start(OpKind::Read, 0, 4096, vec![other.segment(0, 4096)]);
    driver.queue.kick();
    let mut order = Vec::new();
    while driver.queue.in_flight() > 0 {
        assert!(readable(driver.queue.wake_fd(), 30_000));
        let mut events = Vec::new();
        driver.queue.reap(&mut events);
        order.extend(events.iter().map(tag_of));
        if order.len() == 1 {
            // If the reap was due to the timer, the write has started and may complete at any time.
            assert!(
                start.elapsed() >= delay || !readable(driver.queue.wake_fd(), 0),
                "the wake fd is not readable during the delay"
            );
        }
    }
    assert_eq!(order, [fast, slow]);
    assert!(start.elapsed() >= delay);
    assert!(other.bytes().iter().all(|&byte| byte == 0), "the read came before the write");
    assert!(driver.read(0, 4096) == buffer.bytes());
}

#[test]
fn delayed_operations_count_toward_the_queue_depth() {
    let (_image, backing, faults) = faulty("depth");
    let depth = u64::from(backing.limits().depth);
    faults.delay(OpClass::Write, Duration::from_secs(3600));
    let mut driver = Driver::new(&backing);
    let want = pattern(4096, 3);
    let mut buffer = Buffer::copy_of(&want);
    for number in 0..depth {
        driver.start(OpKind::Write, number % 2 * 4096, 4096, vec![buffer.segment(0, 4096)]);
    }
    let request = driver.request(OpKind::Read, 0, 4096, vec![buffer.segment(0, 4096)]);
    assert!(matches!(driver.queue.submit(request), Err(Refused::Full(_))));
    drop(driver);
    buffer.fill(0);
    assert!(Driver::new(&backing).read(4096, 4096) == want);
    assert_eq!(faults.ops(OpClass::Write), depth, "the refused operation is not counted");
}
