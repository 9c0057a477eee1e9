//! Every order of the steps of two threads. Each model also runs with a step left out or in the wrong place: it must
//! fail then, or it proves nothing.

use std::panic::catch_unwind;

use genblk_loom::notification::{enable, publish};
use genblk_loom::sync::{AtomicU16, EventFd, Ordering, fence};
use genblk_loom::waker::Waker;
use loom::sync::{Arc, Mutex};
use loom::thread;

const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
/// An event index at which nothing happens in these models.
const NEVER: u16 = 100;

/// Whether a model has an order of steps in which it fails.
fn fails(model: fn()) -> bool {
    catch_unwind(|| loom::model(model)).is_err()
}

// The used ring: the device publishes, the driver waits for an interrupt.

/// Runs a device that publishes an element with `publish`, and a driver that enables interrupts and looks once more.
fn driver_waits(event_idx: bool, publish: fn(&AtomicU16, &AtomicU16, bool, u16, u16) -> bool) {
    let wanted = AtomicU16::new(if event_idx { NEVER } else { NO_INTERRUPT });
    let words = Arc::new((AtomicU16::new(0), wanted));
    let device = {
        let words = Arc::clone(&words);
        thread::spawn(move || publish(&words.0, &words.1, event_idx, 0, 1))
    };
    // Event index 0: interrupt when the used index moves on from 0. Flags 0: interrupt always.
    words.1.store(0, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    let sees = words.0.load(Ordering::Acquire) == 1;
    let is_interrupted = device.join().unwrap();
    assert!(sees || is_interrupted, "the driver waits forever");
}

fn publish_without_fence(used_idx: &AtomicU16, wanted: &AtomicU16, event_idx: bool, old: u16, new: u16) -> bool {
    used_idx.store(new, Ordering::Release);
    let wanted = wanted.load(Ordering::Relaxed);
    if event_idx { new.wrapping_sub(wanted).wrapping_sub(1) < new.wrapping_sub(old) } else { wanted & 1 == 0 }
}

#[test]
fn a_driver_is_interrupted_or_sees_the_used_index() {
    loom::model(|| driver_waits(true, publish));
    loom::model(|| driver_waits(false, publish));
    assert!(fails(|| driver_waits(true, publish_without_fence)), "the model misses the fence with EVENT_IDX");
    assert!(fails(|| driver_waits(false, publish_without_fence)), "the model misses the fence without EVENT_IDX");
}

/// A driver that polls: what it finds behind the used index is complete.
fn driver_polls(publish: fn(&AtomicU16, &AtomicU16, bool, u16, u16) -> bool) {
    let words = Arc::new((AtomicU16::new(0), AtomicU16::new(NEVER), AtomicU16::new(0)));
    let device = {
        let words = Arc::clone(&words);
        thread::spawn(move || {
            words.2.store(7, Ordering::Relaxed);
            publish(&words.0, &words.1, true, 0, 1)
        })
    };
    if words.0.load(Ordering::Acquire) == 1 {
        assert_eq!(words.2.load(Ordering::Relaxed), 7, "the element is not there yet");
    }
    device.join().unwrap();
}

fn publish_relaxed(used_idx: &AtomicU16, _: &AtomicU16, _: bool, _: u16, new: u16) -> bool {
    used_idx.store(new, Ordering::Relaxed);
    true
}

#[test]
fn a_driver_that_sees_the_used_index_sees_the_elements() {
    loom::model(|| driver_polls(publish));
    assert!(fails(|| driver_polls(publish_relaxed)), "the model misses the order of the stores");
}

// The available ring: the driver makes a head available, the device goes to sleep.

/// Runs a driver that makes a head available and kicks if the device wants it, and a device that enables kicks with
/// `enable`.
fn device_sleeps(event_idx: bool, enable: fn(&AtomicU16, &AtomicU16, bool, u16) -> bool) {
    let wanted = AtomicU16::new(if event_idx { NEVER } else { NO_NOTIFY });
    let words = Arc::new((AtomicU16::new(0), wanted));
    let driver = {
        let words = Arc::clone(&words);
        thread::spawn(move || {
            words.0.store(1, Ordering::Release);
            fence(Ordering::SeqCst);
            let wanted = words.1.load(Ordering::Relaxed);
            if event_idx { wanted == 0 } else { wanted & NO_NOTIFY == 0 }
        })
    };
    let sees = enable(&words.0, &words.1, event_idx, 0);
    let kicks = driver.join().unwrap();
    assert!(sees || kicks, "the device sleeps forever");
}

fn enable_without_fence(avail_idx: &AtomicU16, wanted: &AtomicU16, event_idx: bool, next: u16) -> bool {
    wanted.store(if event_idx { next } else { 0 }, Ordering::Relaxed);
    avail_idx.load(Ordering::Acquire) != next
}

#[test]
fn a_device_is_kicked_or_sees_the_available_index() {
    loom::model(|| device_sleeps(true, enable));
    loom::model(|| device_sleeps(false, enable));
    assert!(fails(|| device_sleeps(true, enable_without_fence)), "the model misses the fence with EVENT_IDX");
    assert!(fails(|| device_sleeps(false, enable_without_fence)), "the model misses the fence without EVENT_IDX");
}

// Mailboxes: a thread queues a message and wakes the worker, which looks at the flag, or sleeps on the eventfd.

struct Mailbox {
    messages: Mutex<Vec<u8>>,
    waker: Waker,
}

/// A worker, as `device/worker.rs` runs it: a turn takes the flag, and then the messages; between turns it sleeps until
/// the eventfd is readable, and clears it. Loom reports a worker that sleeps forever as a deadlock.
fn worker(mailbox: &Mailbox, eventfd: &EventFd, count: usize) {
    let mut received = 0;
    loop {
        if mailbox.waker.take_notified() {
            received += std::mem::take(&mut *mailbox.messages.lock().unwrap()).len();
        }
        if received == count {
            return;
        }
        eventfd.wait();
        mailbox.waker.clear();
    }
}

fn queue_then_notify(mailbox: &Mailbox, message: u8) {
    mailbox.messages.lock().unwrap().push(message);
    mailbox.waker.notify().unwrap();
}

fn notify_then_queue(mailbox: &Mailbox, message: u8) {
    mailbox.waker.notify().unwrap();
    mailbox.messages.lock().unwrap().push(message);
}

fn mailbox_model(senders: u8, send: fn(&Mailbox, u8)) {
    let mailbox = Arc::new(Mailbox { messages: Mutex::new(Vec::new()), waker: Waker::new().unwrap() });
    let eventfd = EventFd::last();
    let sending: Vec<_> = (0..senders)
        .map(|message| {
            let mailbox = Arc::clone(&mailbox);
            thread::spawn(move || send(&mailbox, message))
        })
        .collect();
    worker(&mailbox, &eventfd, usize::from(senders));
    sending.into_iter().for_each(|sender| sender.join().unwrap());
}

#[test]
fn a_worker_that_goes_to_sleep_misses_no_message() {
    loom::model(|| mailbox_model(1, queue_then_notify));
    // Every order of three threads takes minutes: these have at most three switches that nothing forces.
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(|| mailbox_model(2, queue_then_notify));
    assert!(fails(|| mailbox_model(1, notify_then_queue)), "the model misses the order of message and notification");
}
