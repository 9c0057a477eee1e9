//! Every kind of failure of the image, at every time, under every policy: what the guest must see.
//!
//! Short transfers are not among them: the store continues them below all this, and its own tests cut them short
//! (`src/store/tests.rs`). A request that takes too long is a delay, which must be waited for, or a fault of its own
//! ([`Fault::TimedOut`]).

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::bench::Bench;
use common::shadow::Shadow;
use common::workload::Client;
use genblk::config::OnError;
use genblk::store::faulty::{Faults, OpClass};
use genblk::units::Fault;

const IMAGE_BYTES: usize = 8 << 20;
/// Requests wait for so long under [`OnError::Hold`].
const HOLD: Duration = Duration::from_millis(1500);
/// When the image heals, where it does.
const HEALING: Duration = Duration::from_millis(400);
/// Sectors of pages that lie apart, so that each is an operation of its own: these are written ...
const WRITTEN: [u64; 4] = [80, 2080, 4080, 6080];
/// ... and these are read: data of the image, and in memory only if somebody has asked for them.
const COLD: [u64; 4] = [1080, 3080, 5200, 7200];
/// Sectors in holes, each in a MiB of its own, so that each needs a reservation of its own.
const HOLES: [u64; 4] = [8800, 10848, 12896, 14944];
const PAGE: usize = 4096;

/// When the image fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    First,
    Third,
    Always,
    /// Always, until [`HEALING`] has passed.
    Healed,
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    policy: OnError,
    op: OpClass,
    fault: Fault,
    when: When,
}

/// What becomes of the first FLUSH after the image has begun to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    /// It succeeds.
    Good,
    /// It fails at once.
    Fails,
    /// It waits until the image is well, and succeeds.
    Waits,
    /// It waits as long as it may, and fails.
    GivesUp,
}

impl Cell {
    /// Operations of the kind that fails which the four requests of a test make.
    fn ops(self) -> u32 {
        if self.op == OpClass::Sync { 1 } else { 4 }
    }

    /// Whether the failure comes at all: there is no third Sync.
    fn comes(self) -> bool {
        self.when != When::Third || self.ops() >= 3
    }

    /// Where the four writes go that meet the failure, or come before it.
    fn targets(self) -> [u64; 4] {
        if self.op == OpClass::Allocate { HOLES } else { WRITTEN }
    }

    /// The table of what FLUSH says.
    fn flush(self) -> Flush {
        match (self.policy, self.when) {
            _ if self.op == OpClass::Read || !self.comes() => Flush::Good,
            (OnError::Stop, _) => Flush::Fails,
            // The writes that found no space have not completed: a FLUSH owes them nothing.
            _ if self.op == OpClass::Allocate => Flush::Good,
            (OnError::Report, _) => Flush::Fails,
            (OnError::Hold, When::Always) => Flush::GivesUp,
            (OnError::Hold, When::First | When::Third | When::Healed) => Flush::Waits,
        }
    }

    /// How many of four reads of what is not in memory fail.
    fn failing_reads(self) -> usize {
        match self.when {
            _ if self.op != OpClass::Read => 0,
            When::First | When::Third => 1,
            When::Always | When::Healed => 4,
        }
    }

    /// The table of how many of four writes fail.
    fn failing_writes(self) -> usize {
        match (self.policy, self.when) {
            _ if self.op != OpClass::Allocate => 0,
            (OnError::Report, When::First | When::Third) => 1,
            (OnError::Report, When::Always | When::Healed) => 4,
            (OnError::Hold, When::First | When::Third | When::Healed) => 0,
            // The first of them waits for all of them.
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
        let bench = Bench::new("matrix", &shadow, |config| {
            config.cache.readahead_max_bytes = 0;
            config.cache.hold_max_ms = u32::try_from(HOLD.as_millis()).expect("it is short");
            // Nothing is written back of its own accord while the test looks.
            config.cache.dirty_age_max_ms = 600_000;
            (config.cache.on_error, config.cache.on_full) = (self.policy, self.policy);
        });
        let mut client = bench.client(1);
        // Twice before the FLUSH: for such a guest nothing is written ahead of the next one either.
        (0..2).for_each(|_| assert_eq!(self.write(&mut client, &mut shadow, WRITTEN, 1), 0));
        assert!(client.flush(), "{self:?}: the image is well");

        self.inject(&bench.faults);
        let writes = bench.faults.ops(OpClass::Write);
        self.check_writes(&mut client, &mut shadow, &bench.faults);
        let failing = COLD.iter().filter(|&&sector| client.try_read(sector, PAGE).is_none()).count();
        // Under "stop" a read of what is not in memory fails with everything else.
        let stopped = self.op == OpClass::Allocate && self.policy == OnError::Stop;
        let expected = if stopped { COLD.len() } else { self.failing_reads() };
        assert_eq!(failing, expected, "{self:?}: reads from the image");
        self.check_flush(&mut client, &bench.faults);
        check_kept(&mut client, &shadow, self);
        if self.policy == OnError::Stop && self.flush() == Flush::Fails {
            self.check_stopped(&mut client, &shadow, &bench);
        }

        bench.faults.heal();
        bench.running().resume();
        assert_eq!(self.write(&mut client, &mut shadow, HOLES, 4), 0, "{self:?}: healed, and there is space");
        assert!(client.flush(), "{self:?}: healed, and everything is stable");
        let rewritten = bench.faults.ops(OpClass::Write) - writes >= 2 * WRITTEN.len() as u64 + HOLES.len() as u64;
        let in_doubt = self.op == OpClass::Sync && self.comes();
        assert!(rewritten || !in_doubt, "{self:?}: what a failed Sync was to cover is written again");
        drop(client);
        bench.end(&shadow);
    }

    /// Writes a page to each sector; returns how many of them failed.
    fn write(self, client: &mut Client, shadow: &mut Shadow, sectors: [u64; 4], mark: u8) -> usize {
        let mut failed = 0;
        for sector in sectors {
            if client.try_write(sector, &[mark; PAGE]) {
                shadow.write(sector, &[mark; PAGE]);
            } else {
                assert_eq!(self.op, OpClass::Allocate, "{self:?}: a write to memory waits for nothing");
                failed += 1;
            }
        }
        failed
    }

    fn check_writes(self, client: &mut Client, shadow: &mut Shadow, faults: &Faults) {
        // A write meets the failure itself only where it asks for space.
        let heals = self.op == OpClass::Allocate && self.when == When::Healed && self.policy == OnError::Hold;
        let (failed, took) = timed(heals, faults, || self.write(client, shadow, self.targets(), 2));
        assert_eq!(failed, self.failing_writes(), "{self:?}: writes");
        if heals {
            assert!(took >= HEALING, "{self:?}: before it healed: {took:?}");
        } else if failed > 0 && self.policy == OnError::Hold {
            assert!(took >= HOLD && took < 3 * HOLD, "{self:?}: gave up after {took:?}");
        } else {
            assert!(took < HOLD, "{self:?}: told after {took:?}");
        }
    }

    fn check_flush(self, client: &mut Client, faults: &Faults) {
        let (good, took) = timed(self.when == When::Healed, faults, || client.flush());
        let expected = self.flush();
        assert_eq!(good, matches!(expected, Flush::Good | Flush::Waits), "{self:?}: the flush");
        match expected {
            Flush::Good => {}
            // The thread that heals is waited for in every case.
            Flush::Fails => assert!(took < HOLD, "{self:?}: told after {took:?}"),
            Flush::Waits if self.when == When::Healed => {
                assert!(took >= HEALING, "{self:?}: before it healed: {took:?}");
            }
            Flush::Waits => assert!(took < HOLD, "{self:?}: tried again after {took:?}"),
            Flush::GivesUp => assert!(took >= HOLD && took < 3 * HOLD, "{self:?}: gave up after {took:?}"),
        }
    }

    /// The image is left alone: what is in memory can be read, and nothing else goes, although the image may be well again.
    fn check_stopped(self, client: &mut Client, shadow: &Shadow, bench: &Bench) {
        bench.faults.heal();
        let writes = bench.faults.ops(OpClass::Write);
        assert!(client.try_read(7680, PAGE).is_none(), "{self:?}: a read from the image while stopped");
        assert!(!client.try_write(80, &[3; PAGE]), "{self:?}: a write while stopped");
        assert!(!client.flush(), "{self:?}: a flush while stopped");
        check_kept(client, shadow, self);
        assert_eq!(bench.faults.ops(OpClass::Write), writes, "{self:?}: nothing is tried while stopped");
    }
}

/// What was written is in memory, and is read in every case.
fn check_kept(client: &mut Client, shadow: &Shadow, cell: Cell) {
    for sector in WRITTEN {
        let found = client.try_read(sector, PAGE).unwrap_or_else(|| panic!("{cell:?}: {sector} is in memory"));
        assert_eq!(shadow.check(sector, &found), Ok(()), "{cell:?}: what is in memory");
    }
}

/// Does something, while the image heals if it is to; and says how long it took.
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
    // Each cell mostly waits: they wait together.
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
fn failures_are_reported() {
    every_cell(OnError::Report);
}

#[test]
fn failures_are_waited_out() {
    every_cell(OnError::Hold);
}

#[test]
fn failures_stop_the_device_until_it_is_resumed() {
    every_cell(OnError::Stop);
}

/// A store that is slow has not failed: however long it takes, no policy has a say.
#[test]
fn a_slow_image_is_waited_for_under_every_policy() {
    for policy in [OnError::Report, OnError::Hold, OnError::Stop] {
        let mut shadow = Shadow::patchwork(IMAGE_BYTES, 32);
        let bench = Bench::new("slow", &shadow, |config| {
            config.cache.hold_max_ms = 100;
            (config.cache.on_error, config.cache.on_full) = (policy, policy);
        });
        let mut client = bench.client(1);
        for kind in OpClass::ALL {
            bench.faults.delay(kind, Duration::from_millis(200));
        }
        for sector in [WRITTEN[0], HOLES[0]] {
            client.write(sector, &[1; PAGE]);
            shadow.write(sector, &[1; PAGE]);
        }
        assert!(client.try_read(COLD[0], PAGE).is_some() && client.flush(), "{policy:?}");
        drop(client);
        bench.end(&shadow);
    }
}

#[test]
fn a_full_disk_has_a_policy_of_its_own() {
    let mut shadow = Shadow::patchwork(IMAGE_BYTES, 33);
    let bench = Bench::new("own-policy", &shadow, |config| {
        config.cache.hold_max_ms = u32::try_from(HOLD.as_millis()).expect("it is short");
        (config.cache.on_error, config.cache.on_full) = (OnError::Stop, OnError::Hold);
    });
    let mut client = bench.client(1);
    client.write(80, &[1; PAGE]);
    shadow.write(80, &[1; PAGE]);
    bench.faults.fail_always(OpClass::Write, Fault::NoSpace);
    let (good, took) = timed(true, &bench.faults, || client.flush());
    assert!(good && took >= HEALING, "a full disk is waited for: {good} after {took:?}");

    bench.faults.fail_nth(OpClass::Write, 1, Fault::Media);
    client.write(80, &[2; PAGE]);
    shadow.write(80, &[2; PAGE]);
    assert!(!client.flush() && !client.flush(), "any other error stops the device, although the image is well again");
    bench.running().resume();
    assert!(client.flush());
    drop(client);
    bench.end(&shadow);
}

/// A sparse image whose file system has no space left.
fn full(policy: OnError) -> Bench {
    let shadow = Shadow::zeros(IMAGE_BYTES);
    let bench = Bench::new("full", &shadow, |config| {
        config.cache.hold_max_ms = u32::try_from(HOLD.as_millis()).expect("it is short");
        config.cache.on_full = policy;
    });
    bench.faults.fail_always(OpClass::Allocate, Fault::NoSpace);
    bench
}

#[test]
fn a_write_that_finds_no_space_fails_and_no_flush_does() {
    let bench = full(OnError::Report);
    let mut client = bench.client(1);
    assert!(!client.try_write(80, &[1; PAGE]), "there is no space");
    assert!(client.flush(), "nothing that completed is without space");
    bench.faults.heal();
    assert!(client.try_write(80, &[2; PAGE]), "there is again");
    bench.faults.fail_always(OpClass::Allocate, Fault::NoSpace);
    assert!(client.try_write(88, &[3; PAGE]) && client.flush(), "space was reserved ahead of the writer");
}

#[test]
fn a_write_waits_for_space_and_gives_up() {
    let bench = full(OnError::Hold);
    let mut client = bench.client(1);
    let started = Instant::now();
    assert!(!client.try_write(80, &[1; PAGE]) && started.elapsed() >= HOLD, "{:?}", started.elapsed());

    let bench = full(OnError::Hold);
    let mut client = bench.client(1);
    let healed = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(HEALING);
            bench.faults.heal();
        });
        client.try_write(80, &[2; PAGE])
    });
    assert!(healed && client.flush(), "space came while it waited");
}

#[test]
fn an_image_that_cannot_reserve_space_is_written_all_the_same() {
    let bench = full(OnError::Report);
    bench.faults.fail_always(OpClass::Allocate, Fault::Unsupported);
    let mut client = bench.client(1);
    assert!(client.try_write(80, &[1; PAGE]) && client.flush());
    assert_eq!(bench.faults.ops(OpClass::Allocate), 1, "it is asked once");
}
