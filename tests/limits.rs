//! Limits of a guest's rates: exact, set while the disk is served, and without effect on other guests.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use common::operator::{call, genblk, start, stdout_of};
use common::request::Payload;
use common::session::{Session, SessionOptions};
use common::wait::{ABSENCE, TIMEOUT, poll_until};

/// Requests that a guest keeps in flight.
const DEPTH: usize = 32;
/// Largest deviation of a rate, in percent.
const TOLERANCE: u32 = 2;
/// How often a rate may be too low, because the machine did not run the guest.
const ATTEMPTS: u32 = 5;

fn set(control: &Path, keys: &[&str]) {
    stdout_of(&genblk(control, &[&["set", "d0"], keys].concat()));
}

/// How long so many reads take, which a guest with two rings makes as fast as it can.
fn read_many(session: &mut Session, count: usize, bytes: usize) -> Duration {
    let begun = Instant::now();
    let (mut submitted, mut completed) = (0, 0);
    while completed < count {
        while submitted < count && submitted - completed < DEPTH {
            session.submit(submitted % 2, VIRTIO_BLK_T_IN, 0, Payload::Receive(bytes));
            session.rings[submitted % 2].notify();
            submitted += 1;
        }
        for ring in &mut session.rings {
            while ring.take_used().is_some() {
                completed += 1;
            }
        }
        thread::sleep(Duration::from_micros(200));
    }
    begun.elapsed()
}

/// Checks that so many reads take `expected`. Never less; and not more, unless the machine is too slow.
#[track_caller]
fn assert_takes(session: &mut Session, count: usize, bytes: usize, expected: Duration) {
    let slack = expected * TOLERANCE / 100;
    // The saved part is used up first.
    read_many(session, count / 2, bytes);
    for attempt in 1..=ATTEMPTS {
        let found = read_many(session, count, bytes);
        assert!(found >= expected - slack, "{count} reads of {bytes} bytes took {found:?}, not {expected:?}");
        if found <= expected + slack {
            return;
        }
        assert!(attempt < ATTEMPTS, "{count} reads of {bytes} bytes took {found:?}, not {expected:?}");
    }
}

fn two_rings(region_bytes: u64) -> SessionOptions {
    SessionOptions { queues: 2, region_bytes, ..SessionOptions::default() }
}

#[test]
fn a_read_limit_sets_the_rate_of_a_guest() {
    let (daemon, control) = start("limits-rate");
    let mut session = Session::open(&daemon.socket_of(0), &two_rings(256 << 20));
    session.read(0, 65536);
    set(&control, &["limits.read_iops=1000", "limits.burst_ms=200"]);
    assert_takes(&mut session, 1500, 512, Duration::from_millis(1500));
    set(&control, &["limits.read_iops=0", "limits.total_bytes_per_second=8M"]);
    assert_takes(&mut session, 192, 65536, Duration::from_millis(1500));
    let statistics = call(&control, "Statistics", &json!({"device": "d0"}));
    let device = &statistics["parameters"]["devices"][0];
    assert!(device["limited"].as_u64() > Some(100) && device["limited_us"].as_u64() > Some(1_000_000), "{device}");
    let mut reads = device["requests"].as_array().expect("kinds of requests").iter();
    let reads = reads.find(|requests| requests["operation"] == json!("read")).expect("reads");
    let memory = reads["from_memory"]["max_ns"].as_u64().expect("there were reads");
    assert!(reads["waited"]["count"].as_u64() < Some(200), "a limit is no wait for the image: {reads}");
    assert!(memory < 1_000_000_000, "a latency begins after the limit: {reads}");
}

/// The processor time of a process.
fn processor_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
    // USER_HZ is 100 on every platform of genblk.
    Duration::from_millis(ticks * 10)
}

/// A daemon, and a guest whose limit lets nothing more be written for minutes. A write waits in its first ring.
macro_rules! guest_that_owes {
    ($name:literal, $daemon:ident, $control:ident, $session:ident, $held:ident) => {
        let ($daemon, $control) = start($name);
        let mut $session = Session::open(&$daemon.socket_of(0), &two_rings(8 << 20));
        set(&$control, &["limits.write_bytes_per_second=4K", "limits.burst_ms=10"]);
        $session.write(0, &[1; 1 << 20]);
        let $held = $session.submit(0, VIRTIO_BLK_T_OUT, 4096, Payload::Send(&[2; 4096]));
        $session.rings[0].notify();
        assert!($session.rings[0].try_wait_used(ABSENCE).is_none(), "the limit holds it back");
    };
}

#[test]
fn requests_held_by_a_limit_delay_neither_reads_nor_flushes_nor_a_stop() {
    guest_that_owes!("limits-held", daemon, control, session, held);
    let pid = daemon.disk_process("d0");
    let before = processor_time(pid);
    thread::sleep(Duration::from_secs(1));
    let spent = processor_time(pid) - before;
    assert!(spent < Duration::from_millis(300), "a worker that waits for a limit used {spent:?} of a second");
    for (kind, payload) in [(VIRTIO_BLK_T_IN, Payload::Receive(4096)), (4, Payload::Empty)] {
        assert_eq!(session.run(1, kind, 0, payload).status, 0, "of kind {kind}, on the other ring");
    }
    let begun = Instant::now();
    session.stop_ring(0);
    assert!(begun.elapsed() < TIMEOUT / 2, "a ring that stops does not wait for its limit");
    session.start_ring(0);
    assert!(session.rings[0].try_wait_used(ABSENCE).is_none(), "a ring that starts again is not let off");
    set(&control, &["limits.write_bytes_per_second=0"]);
    session.rings[0].notify();
    let used = session.rings[0].wait_used(TIMEOUT);
    assert_eq!(session.outcome(&held, used).status, 0);
    assert_eq!(session.read(4096, 4096), vec![2; 4096]);
}

#[test]
fn limits_can_change_while_requests_wait() {
    guest_that_owes!("limits-set", daemon, control, session, held);
    set(&control, &["limits.write_bytes_per_second=1G"]);
    let used = session.rings[0].wait_used(TIMEOUT);
    assert_eq!(session.outcome(&held, used).status, 0, "without another kick");
    let listed = call(&control, "List", &json!({}));
    let limits = &listed["parameters"]["devices"][0]["limits"];
    assert_eq!((&limits["write_bytes_per_second"], &limits["read_iops"]), (&json!(1 << 30), &Value::Null));
    let text = stdout_of(&genblk(&control, &["config"]));
    assert!(text.contains("limits.write_bytes_per_second = \"1G\""), "{text}");
    // Limits are for the next process of the disk, too.
    set(&control, &["limits.write_bytes_per_second=4K"]);
    common::daemon::send(daemon.disk_process("d0"), libc::SIGKILL);
    let mut session = session.reconnect(&daemon.socket_of(0));
    (0..2).for_each(|ring| session.start_ring(ring));
    session.write(0, &[1; 1 << 20]);
    session.submit(0, VIRTIO_BLK_T_OUT, 4096, Payload::Send(&[2; 4096]));
    session.rings[0].notify();
    assert!(session.rings[0].try_wait_used(ABSENCE).is_none(), "the limit holds it back");
    daemon.terminate();
    poll_until("the end of the daemon, which does not wait for limits", TIMEOUT, || {
        common::daemon::has_ended(daemon.id()).then_some(())
    });
}
