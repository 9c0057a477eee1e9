//! Every kind of failure of the image, at every time, under every policy: what the guest must see.
//!
//! Short transfers are not among them: the store continues them below all this (`tests/store_faults.rs`). A request that
//! takes too long is a delay, which must be waited for, or a fault of its own ([`Fault::TimedOut`]).

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::bench::Bench;
use common::shadow::Shadow;
use common::workload::Client;
use genblk::config::OnError;
use genblk::store::faulty::{Faults, OpKind};
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
    op: OpKind,
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
        if self.op == OpKind::Sync { 1 } else { 4 }
    }

    /// Whether the failure comes at all: there is no third Sync.
    fn comes(self) -> bool {
        self.when != When::Third || self.ops() >= 3
    }

    /// The table of what FLUSH says.
    fn flush(self) -> Flush {
        if self.op == OpKind::Read || !self.comes() {
            return Flush::Good;
        }
        match (self.policy, self.when) {
            (OnError::Report | OnError::Stop, _) => Flush::Fails,
            (OnError::Hold, When::Always) => Flush::GivesUp,
            (OnError::Hold, When::First | When::Third | When::Healed) => Flush::Waits,
        }
    }

    /// How many of four reads of what is not in memory fail.
    fn failing_reads(self) -> usize {
        match self.when {
            _ if self.op != OpKind::Read => 0,
            When::First | When::Third => 1,
            When::Always | When::Healed => 4,
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
        let mut write = |client: &mut Client, mark: u8| {
            for sector in WRITTEN {
                client.write(sector, &[mark; PAGE]);
                shadow.write(sector, &[mark; PAGE]);
            }
        };
        write(&mut client, 1);
        assert!(client.flush(), "{self:?}: the image is well");

        self.inject(&bench.faults);
        write(&mut client, 2);
        let failing = COLD.iter().filter(|&&sector| client.try_read(sector, PAGE).is_none()).count();
        assert_eq!(failing, self.failing_reads(), "{self:?}: reads from the image");
        self.check_flush(&mut client, &bench.faults);
        assert_eq!(client.read(WRITTEN[1], PAGE), [2; PAGE], "{self:?}: what is in memory is read in every case");
        if self.policy == OnError::Stop && self.flush() == Flush::Fails {
            self.check_stopped(&mut client, &bench);
        }

        bench.faults.heal();
        bench.running().resume();
        assert!(client.flush(), "{self:?}: healed, and everything is stable");
        drop(client);
        bench.end(&shadow);
    }

    fn check_flush(self, client: &mut Client, faults: &Faults) {
        let started = Instant::now();
        let good = thread::scope(|scope| {
            if self.when == When::Healed {
                scope.spawn(|| {
                    thread::sleep(HEALING);
                    faults.heal();
                });
            }
            client.flush()
        });
        let took = started.elapsed();
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
    fn check_stopped(self, client: &mut Client, bench: &Bench) {
        bench.faults.heal();
        let writes = bench.faults.ops(OpKind::Write);
        assert!(client.try_read(7680, PAGE).is_none(), "{self:?}: a read from the image while stopped");
        assert!(!client.try_write(80, &[3; PAGE]), "{self:?}: a write while stopped");
        assert!(!client.flush(), "{self:?}: a flush while stopped");
        assert_eq!(client.read(WRITTEN[2], PAGE), [2; PAGE], "{self:?}: what is in memory is read");
        assert_eq!(bench.faults.ops(OpKind::Write), writes, "{self:?}: nothing is tried while stopped");
    }
}

fn every_cell(policy: OnError) {
    let whens = [When::First, When::Third, When::Always, When::Healed];
    // Each cell mostly waits: they wait together.
    thread::scope(|scope| {
        for op in [OpKind::Read, OpKind::Write, OpKind::Sync] {
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

#[test]
fn a_slow_image_is_waited_for_under_every_policy() {
    for policy in [OnError::Report, OnError::Hold, OnError::Stop] {
        let mut shadow = Shadow::patchwork(IMAGE_BYTES, 32);
        let bench = Bench::new("slow", &shadow, |config| config.cache.on_error = policy);
        let mut client = bench.client(1);
        for kind in OpKind::ALL {
            bench.faults.delay(kind, Duration::from_millis(200));
        }
        client.write(80, &[1; PAGE]);
        shadow.write(80, &[1; PAGE]);
        assert!(client.try_read(COLD[0], PAGE).is_some() && client.flush(), "{policy:?}");
        drop(client);
        bench.end(&shadow);
    }
}

/// A sparse image whose file system has no space left.
fn full(policy: OnError) -> Bench {
    let shadow = Shadow::zeros(IMAGE_BYTES);
    let bench = Bench::new("full", &shadow, |config| {
        config.cache.hold_max_ms = u32::try_from(HOLD.as_millis()).expect("it is short");
        config.cache.on_full = policy;
    });
    bench.faults.fail_always(OpKind::Allocate, Fault::NoSpace);
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
    bench.faults.fail_always(OpKind::Allocate, Fault::NoSpace);
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
    bench.faults.fail_always(OpKind::Allocate, Fault::Unsupported);
    let mut client = bench.client(1);
    assert!(client.try_write(80, &[1; PAGE]) && client.flush());
    assert_eq!(bench.faults.ops(OpKind::Allocate), 1, "it is asked once");
}
