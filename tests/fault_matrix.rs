//! Every kind of image failure, at every time, under every policy, with the results that the guest must get.
//!
//! Short transfers are not covered here: the store continues them, and its own tests check that (`src/store/tests.rs`).
//! An operation that takes too long is either a delay, for which every policy waits, or a [`Fault::TimedOut`].

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::faulty_device::FaultyDevice;
use common::shadow::Shadow;
use common::workload::Client;
use genblk::config::OnError;
use genblk::store::faulty::Faults;
use genblk::units::{Fault, OpClass};

const IMAGE_BYTES: usize = 8 << 20;
/// The longest time that requests wait under [`OnError::Hold`].
const HOLD: Duration = Duration::from_millis(1500);
/// Time after which the image heals, in [`When::Healed`].
const HEALING: Duration = Duration::from_millis(400);
/// First sectors of pages that the test writes. They lie apart, so that each page is a store operation of its own.
const WRITTEN: [u64; 4] = [80, 2080, 4080, 6080];
/// First sectors of pages that the test reads: data, and not cached before.
const COLD: [u64; 4] = [1080, 3080, 5200, 7200];
/// Sectors in holes, each in a MiB of its own, so that each needs an Allocate of its own.
const HOLES: [u64; 4] = [8800, 10848, 12896, 14944];
const PAGE: usize = 4096;

/// When the image fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// At the first operation of the class.
    First,
    /// At the third operation of the class.
    Third,
    Always,
    /// Always, until [`HEALING`] has passed.
    Healed,
}

/// One case of the matrix.
#[derive(Clone, Copy, Debug)]
struct Cell {
    policy: OnError,
    op: OpClass,
    fault: Fault,
    when: When,
}

/// The result of the first FLUSH after the image has started to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FlushResult {
    /// It succeeds immediately.
    Succeeds,
    /// It fails immediately.
    Fails,
    /// It waits until the image recovers, and succeeds.
    Waits,
    /// It waits for [`HOLD`], and fails.
    TimesOut,
}

impl Cell {
    /// Number of operations of the failing class that four requests need.
    fn ops(self) -> u32 {
        if self.op == OpClass::Sync { 1 } else { 4 }
    }

    /// Whether the failure happens: there is no third Sync, and of a reservation that finds no space, what is written
    /// is tried alone.
    fn happens(self) -> bool {
        let once = matches!(self.when, When::First | When::Third);
        let tried_alone = once && self.op == OpClass::Allocate && self.fault == Fault::NoSpace;
        !tried_alone && (self.when != When::Third || self.ops() >= 3)
    }

    /// First sectors of the four writes while the image fails.
    fn targets(self) -> [u64; 4] {
        if self.op == OpClass::Allocate { HOLES } else { WRITTEN }
    }

    /// The expected result of FLUSH.
    fn flush_result(self) -> FlushResult {
        match (self.policy, self.when) {
            _ if self.op == OpClass::Read || !self.happens() => FlushResult::Succeeds,
            (OnError::Stop, _) => FlushResult::Fails,
            // The writes that found no space have failed: a FLUSH does not cover them.
            _ if self.op == OpClass::Allocate => FlushResult::Succeeds,
            (OnError::Report, _) => FlushResult::Fails,
            (OnError::Hold, When::Always) => FlushResult::TimesOut,
            (OnError::Hold, When::First | When::Third | When::Healed) => FlushResult::Waits,
        }
    }

    /// How many of four reads that miss fail.
    fn failing_reads(self) -> usize {
        match self.when {
            _ if self.op != OpClass::Read => 0,
            When::First | When::Third => 1,
            When::Always | When::Healed => 4,
        }
    }

    /// How many of four writes fail.
    fn failing_writes(self) -> usize {
        match (self.policy, self.when) {
            _ if self.op != OpClass::Allocate || !self.happens() => 0,
            (OnError::Report, When::First | When::Third) => 1,
            (OnError::Report, When::Always | When::Healed) => 4,
            (OnError::Hold, When::First | When::Third | When::Healed) => 0,
            // The first one waits for HOLD; then the device fails all of them.
            (OnError::Hold, When::Always) => 4,
            (OnError::Stop, When::Third) => 2,
            (OnError::Stop, When::First | When::Always | When::Healed) => 4,
        }
    }

    fn inject(self, faults: &Faults) {
        match self.when {
            When::First => faults.fail_nth(self.op, 1, self.fault),
            When::Third => faults.fail_nth(self.op, 3, self.fault),
            When::Always | When::Healed => faults.fail_always(self.op, self.fault),
        }
    }

    fn run(self) {
        let mut shadow = Shadow::patchwork(IMAGE_BYTES, 31);
        let device = FaultyDevice::new("matrix", &shadow, |config| {
            config.cache.readahead_max_bytes = 0;
            config.cache.hold_max_ms = u32::try_from(HOLD.as_millis()).expect("a short time");
            // No page is written back because of its age during the test.
            config.cache.dirty_age_max_ms = 600_000;
            (config.cache.on_error, config.cache.on_full) = (self.policy, self.policy);
        });
        let mut client = device.client(1);
        // Two writes of each page before the FLUSH: then write-back does not start ahead of the next FLUSH either.
        (0..2).for_each(|_| assert_eq!(self.write(&mut client, &mut shadow, WRITTEN, 1), 0));
        assert!(client.flush(), "{self:?}: the image is healthy");

        self.inject(&device.faults);
        let writes = device.faults.ops(OpClass::Write);
        self.check_writes(&mut client, &mut shadow, &device.faults);
        let failing = COLD.iter().filter(|&&sector| client.try_read(sector, PAGE).is_none()).count();
        // Under `stop`, a read that misses fails too.
        let stopped = self.op == OpClass::Allocate && self.policy == OnError::Stop && self.happens();
        let expected = if stopped { COLD.len() } else { self.failing_reads() };
        assert_eq!(failing, expected, "{self:?}: reads from the image");
        self.check_flush(&mut client, &device.faults);
        check_cached(&mut client, &shadow, self);
        if self.policy == OnError::Stop && self.flush_result() == FlushResult::Fails {
            self.check_stopped(&mut client, &shadow, &device);
        }

        device.faults.heal();
        device.running().resume();
        assert_eq!(
            self.write(&mut client, &mut shadow, HOLES, 4),
            0,
            "{self:?}: the image is healed, and there is space"
        );
        assert!(client.flush(), "{self:?}: the image is healed, and a FLUSH succeeds");
        let rewritten = device.faults.ops(OpClass::Write) - writes >= 2 * WRITTEN.len() as u64 + HOLES.len() as u64;
        let sync_failed = self.op == OpClass::Sync && self.happens();
        assert!(rewritten || !sync_failed, "{self:?}: pages of a failed Sync are written again");
        drop(client);
        device.shutdown(&shadow);
    }

    /// Writes a page at each sector; returns the number of failed writes.
    fn write(self, client: &mut Client, shadow: &mut Shadow, sectors: [u64; 4], mark: u8) -> usize {
        let mut failed = 0;
        for sector in sectors {
            if client.try_write(sector, &[mark; PAGE]) {
                shadow.write(sector, &[mark; PAGE]);
            } else {
                assert_eq!(self.op, OpClass::Allocate, "{self:?}: a write fails only if it needs space");
                failed += 1;
            }
        }
        failed
    }

    fn check_writes(self, client: &mut Client, shadow: &mut Shadow, faults: &Faults) {
        // A write waits for the image only if it needs space.
        let heals = self.op == OpClass::Allocate && self.when == When::Healed && self.policy == OnError::Hold;
        let (failed, took) = timed(heals, faults, || self.write(client, shadow, self.targets(), 2));
        assert_eq!(failed, self.failing_writes(), "{self:?}: writes");
        if heals {
            assert!(took >= HEALING, "{self:?}: completed before the image healed: {took:?}");
        } else if failed > 0 && self.policy == OnError::Hold {
            assert!(took >= HOLD && took < 3 * HOLD, "{self:?}: failed after {took:?}");
        } else {
            assert!(took < HOLD, "{self:?}: completed after {took:?}");
        }
    }

    fn check_flush(self, client: &mut Client, faults: &Faults) {
        let (succeeded, took) = timed(self.when == When::Healed, faults, || client.flush());
        let expected = self.flush_result();
        assert_eq!(succeeded, matches!(expected, FlushResult::Succeeds | FlushResult::Waits), "{self:?}: the FLUSH");
        match expected {
            FlushResult::Succeeds => {}
            // With `Healed`, `took` includes the time until the healing thread ends.
            FlushResult::Fails => assert!(took < HOLD, "{self:?}: completed after {took:?}"),
            FlushResult::Waits if self.when == When::Healed => {
                assert!(took >= HEALING, "{self:?}: completed before the image healed: {took:?}");
            }
            FlushResult::Waits => assert!(took < HOLD, "{self:?}: retried after {took:?}"),
            FlushResult::TimesOut => assert!(took >= HOLD && took < 3 * HOLD, "{self:?}: failed after {took:?}"),
        }
    }

    /// The device does not use the image although it is healed: cached data can be read, and all other requests fail.
    fn check_stopped(self, client: &mut Client, shadow: &Shadow, device: &FaultyDevice) {
        device.faults.heal();
        let writes = device.faults.ops(OpClass::Write);
        assert!(client.try_read(7680, PAGE).is_none(), "{self:?}: a read from the image while stopped");
        assert!(!client.try_write(80, &[3; PAGE]), "{self:?}: a write while stopped");
        assert!(!client.flush(), "{self:?}: a FLUSH while stopped");
        check_cached(client, shadow, self);
        assert_eq!(device.faults.ops(OpClass::Write), writes, "{self:?}: no write-back while stopped");
    }
}

/// The written pages are cached, and can be read in every case.
fn check_cached(client: &mut Client, shadow: &Shadow, cell: Cell) {
    for sector in WRITTEN {
        let found = client.try_read(sector, PAGE).unwrap_or_else(|| panic!("{cell:?}: sector {sector} is cached"));
        assert_eq!(shadow.check(sector, &found), Ok(()), "{cell:?}: the cached data");
    }
}

/// Runs `act`, and returns how long it took. If `heals`, the image heals meanwhile.
fn timed<T>(heals: bool, faults: &Faults, act: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let result = thread::scope(|scope| {
        if heals {
            scope.spawn(|| {
                thread::sleep(HEALING);
                faults.heal();
            });
        }
        act()
    });
    (result, started.elapsed())
}

fn every_cell(policy: OnError) {
    let whens = [When::First, When::Third, When::Always, When::Healed];
    // The cells mostly wait: run them in parallel.
    thread::scope(|scope| {
        for op in [OpClass::Read, OpClass::Write, OpClass::Sync, OpClass::Allocate] {
            scope.spawn(move || {
                for fault in [Fault::Media, Fault::NoSpace, Fault::TimedOut] {
                    whens.into_iter().for_each(|when| Cell { policy, op, fault, when }.run());
                }
            });
        }
    });
}

#[test]
fn policy_report_fails_requests_at_once() {
    every_cell(OnError::Report);
}

#[test]
fn policy_hold_waits_for_the_image() {
    every_cell(OnError::Hold);
}

#[test]
fn policy_stop_stops_the_device_until_it_is_resumed() {
    every_cell(OnError::Stop);
}

/// A delay is not a failure, however long it is.
#[test]
fn every_policy_waits_for_a_slow_image() {
    for policy in [OnError::Report, OnError::Hold, OnError::Stop] {
        let mut shadow = Shadow::patchwork(IMAGE_BYTES, 32);
        let device = FaultyDevice::new("slow", &shadow, |config| {
            config.cache.hold_max_ms = 100;
            (config.cache.on_error, config.cache.on_full) = (policy, policy);
        });
        let mut client = device.client(1);
        for kind in OpClass::ALL {
            device.faults.delay(kind, Duration::from_millis(200));
        }
        for sector in [WRITTEN[0], HOLES[0]] {
            client.write(sector, &[1; PAGE]);
            shadow.write(sector, &[1; PAGE]);
        }
        assert!(client.try_read(COLD[0], PAGE).is_some() && client.flush(), "{policy:?}");
        drop(client);
        device.shutdown(&shadow);
    }
}

#[test]
fn on_full_applies_to_a_full_disk_and_on_error_to_other_failures() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 33);
    let device = FaultyDevice::new("own-policy", &shadow, |config| {
        config.cache.hold_max_ms = u32::try_from(HOLD.as_millis()).expect("a short time");
        (config.cache.on_error, config.cache.on_full) = (OnError::Stop, OnError::Hold);
    });
    let mut client = device.client(1);
    client.write(80, &[1; PAGE]);
    shadow.write(80, &[1; PAGE]);
    device.faults.fail_always(OpClass::Write, Fault::NoSpace);
    let (succeeded, took) = timed(true, &device.faults, || client.flush());
    assert!(succeeded && took >= HEALING, "the FLUSH waits for space: {succeeded} after {took:?}");

    device.faults.fail_nth(OpClass::Write, 1, Fault::Media);
    client.write(80, &[2; PAGE]);
    shadow.write(80, &[2; PAGE]);
    assert!(!client.flush() && !client.flush(), "another error stops the device, although the image is healthy again");
    device.running().resume();
    assert!(client.flush());
    drop(client);
    device.shutdown(&shadow);
}

/// A device on a sparse image whose file system has no space left.
fn device_on_a_full_disk(policy: OnError) -> FaultyDevice {
    let shadow = Shadow::zeros(IMAGE_BYTES);
    let device = FaultyDevice::new("full", &shadow, |config| {
        config.cache.hold_max_ms = u32::try_from(HOLD.as_millis()).expect("a short time");
        config.cache.on_full = policy;
    });
    device.faults.fail_always(OpClass::Allocate, Fault::NoSpace);
    device
}

#[test]
fn a_write_without_space_fails_and_the_flush_succeeds() {
    let device = device_on_a_full_disk(OnError::Report);
    let mut client = device.client(1);
    assert!(!client.try_write(80, &[1; PAGE]), "there is no space");
    assert!(client.flush(), "no completed write lacks space");
    device.faults.heal();
    // For a second only what is written is reserved.
    thread::sleep(Duration::from_millis(1100));
    assert!(client.flush());
    assert!(client.try_write(80, &[2; PAGE]), "there is space again");
    device.faults.fail_always(OpClass::Allocate, Fault::NoSpace);
    assert!(client.try_write(88, &[3; PAGE]) && client.flush(), "space was allocated ahead of the writer");
}

#[test]
fn a_write_under_hold_waits_for_space_up_to_the_limit() {
    let device = device_on_a_full_disk(OnError::Hold);
    let mut client = device.client(1);
    let started = Instant::now();
    assert!(!client.try_write(80, &[1; PAGE]) && started.elapsed() >= HOLD, "{:?}", started.elapsed());

    let device = device_on_a_full_disk(OnError::Hold);
    let mut client = device.client(1);
    let healed = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(HEALING);
            device.faults.heal();
        });
        client.try_write(80, &[2; PAGE])
    });
    assert!(healed && client.flush(), "the write waits for the space");
}

#[test]
fn an_image_that_cannot_reserve_space_still_takes_writes() {
    let device = device_on_a_full_disk(OnError::Report);
    device.faults.fail_always(OpClass::Allocate, Fault::Unsupported);
    let mut client = device.client(1);
    assert!(client.try_write(80, &[1; PAGE]) && client.flush());
    assert_eq!(device.faults.ops(OpClass::Allocate), 1, "Allocate is tried once");
}
