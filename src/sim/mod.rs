//! The simulator: runs the page cache through random orders of events, one world for each seed.
//!
//! The seed determines everything: the cache's settings, the guest's requests, the latency and the order of store
//! operations, transient and permanent faults, torn writes, crashes of the daemon and power cuts. A world has two
//! phases:
//!
//! - Safety: the guest sends random requests while the disk fails at random and daemons crash. Every few steps the
//!   cache's invariants are recounted. The data oracle (`oracle.rs`) checks the result of each read and the state that
//!   would remain after a power cut; the failure oracle (`failure_oracle.rs`) checks that no request fails without a
//!   reason.
//! - Liveness: daemons no longer crash. In some worlds the disk first breaks, and every request must still complete,
//!   with success or with an error. Then the disk is healed: every request must complete, a FLUSH must succeed, and a
//!   power cut after it must leave all data that the guest wrote. At no time may a request wait for an event that
//!   cannot occur.
//!
//! [`PlantedBug`]s prove that the oracles detect bugs: each is a bug in the cache that a test enables, and the
//! simulator must find it.
//!
//! `make sim SEED=n` replays one seed, `make sim N=1000` runs a thousand. The unit tests run a fixed set of seeds and a
//! few random ones.

#![allow(clippy::cast_possible_truncation, reason = "a simulated disk is small, and indexes vectors all the time")]

#[cfg(test)]
mod daemon;
pub(crate) mod disk;
mod failure_oracle;
pub(crate) mod memory;
mod operations;
mod oracle;
mod scenario;
mod world;

use std::ops::Add;

use crate::fault_injection::{PlantedBug, run_with};
use crate::prng::Prng;

use world::World;

/// Steps of the safety phase.
const STEPS: u64 = 1500;
/// Seeds that every test run uses.
const FIXED_SEEDS: u64 = 700;
/// The same with an operator that freezes the cache; `make sim` runs more.
const FREEZE_SEEDS: u64 = 200;
/// The same with an image that grows.
const GROWTH_SEEDS: u64 = 200;
/// The same with an operator that changes the size of the cache.
const SIZE_SEEDS: u64 = 200;

/// Counts of events in worlds.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Requests of guests that completed.
    requests: u64,
    /// Operations that were submitted to disks.
    operations: u64,
    /// Daemons that died.
    deaths: u64,
    /// Witnesses of Syncs.
    witnesses: u64,
    /// Times that the cache was frozen.
    freezes: u64,
    /// Growths of the image that a daemon applied while it served it.
    growths: u64,
    /// Daemons that found a larger image than their predecessor's.
    found_larger: u64,
    /// Times that the image was cut, and that it was not, after the daemon had stopped using its end.
    cuts: u64,
    uncut: u64,
    /// Changes of the cache's size.
    resizes: u64,
    /// Pages that the last daemon of a world has moved for them.
    moved_pages: u64,
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            operations: self.operations + other.operations,
            deaths: self.deaths + other.deaths,
            witnesses: self.witnesses + other.witnesses,
            freezes: self.freezes + other.freezes,
            growths: self.growths + other.growths,
            found_larger: self.found_larger + other.found_larger,
            cuts: self.cuts + other.cuts,
            uncut: self.uncut + other.uncut,
            resizes: self.resizes + other.resizes,
            moved_pages: self.moved_pages + other.moved_pages,
        }
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { requests, operations, deaths, .. } = self;
        write!(f, "{requests} requests, {operations} operations of the disk, {deaths} deaths of the daemon")
    }
}

/// What happens to a world beside the requests of its guest, faults and crashes.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Nothing.
    Plain,
    /// The disk is a server, which is restarted occasionally.
    Restarts,
    /// An operator freezes the cache between any two steps.
    Freezes,
    /// The image grows and shrinks between any two steps.
    Growth,
    /// An operator changes the size of the cache between any two steps.
    Sizes,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Plain, Self::Restarts, Self::Freezes, Self::Growth, Self::Sizes];

    /// The world for a seed.
    fn world(self, seed: u64) -> World {
        match self {
            Self::Plain => World::new(seed),
            Self::Restarts => World::with_restarts(seed),
            Self::Freezes => World::with_freezes(seed),
            Self::Growth => World::with_growth(seed),
            Self::Sizes => World::with_sizes(seed),
        }
    }

    /// Runs one seed.
    fn run(self, seed: u64, planted: Option<PlantedBug>) -> std::thread::Result<Counts> {
        run_with(planted, || {
            let mut world = self.world(seed);
            world.run(STEPS);
            world.counts
        })
    }

    /// Runs seeds; a failure names its seed.
    fn run_all(self, seeds: impl Iterator<Item = u64>) -> Counts {
        let run = |seed| {
            self.run(seed, None)
                .unwrap_or_else(|_| panic!("seed {seed} failed ({self:?}): replay it with `make sim SEED={seed}`"))
        };
        seeds.map(run).fold(Counts::default(), Counts::add)
    }
}

/// Runs a small world of `steps` steps that takes its first decisions from `script`.
///
/// # Panics
/// When the oracle finds a bug.
pub(crate) fn run_scripted(script: &[u8], steps: u64) {
    let mut prng = Prng::scripted(script);
    World::of(scenario::small_settings(&mut prng), prng).run(steps);
}

#[test]
fn fixed_seeds_keep_every_guarantee() {
    let counts = Kind::Plain.run_all(0..FIXED_SEEDS);
    assert!(
        counts.requests > 100_000 && counts.deaths > 10_000,
        "too little happened in {FIXED_SEEDS} worlds: {counts}"
    );
}

#[test]
fn random_seeds_keep_every_guarantee() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("the clock is set");
    let first = u64::from(clock.subsec_nanos()) << 32 | clock.as_secs() & 0xffff_ffff;
    Kind::Plain.run_all(first..first + 30);
}

#[test]
fn every_witness_of_a_sync_is_equal_on_the_disk_and_in_its_frame() {
    let witnesses = Kind::Plain.run_all(0..100).witnesses;
    assert!(witnesses > 100, "only {witnesses} witnesses");
}

#[test]
fn an_nbd_server_restart_loses_no_data_and_fails_no_request() {
    Kind::Restarts.run_all(0..FIXED_SEEDS / 4);
    let finds = |seed: &u64| Kind::Restarts.run(*seed, Some(PlantedBug::LostIsNotDoubted)).is_err();
    assert!((0..FIXED_SEEDS).any(|seed| finds(&seed)), "no seed finds a loss that is not repaired");
}

#[test]
fn a_frozen_image_is_unchanging_and_equals_the_flushed_state() {
    // In the last one, a Sync fails, and its daemon dies before the failure is reported to it.
    let counts = Kind::Freezes.run_all((0..FREEZE_SEEDS).chain([80_000_931]));
    assert!(counts.freezes > FREEZE_SEEDS, "only {} freezes", counts.freezes);
}

#[test]
fn an_image_that_grows_and_shrinks_keeps_every_guarantee() {
    let counts = Kind::Growth.run_all(0..GROWTH_SEEDS);
    let Counts { growths, found_larger, cuts, uncut, .. } = counts;
    assert!([growths, found_larger, cuts, uncut].iter().all(|count| *count > 50), "too little happened: {counts:?}");
}

#[test]
fn a_cache_that_resizes_at_random_keeps_every_guarantee() {
    let counts = Kind::Sizes.run_all(0..SIZE_SEEDS);
    assert!(counts.resizes > 10 * SIZE_SEEDS && counts.moved_pages > SIZE_SEEDS, "too little happened: {counts:?}");
}

/// Runs the seed `GENBLK_SIM_SEED`, and `GENBLK_SIM_COUNT` seeds from `GENBLK_SIM_FIRST` (1000) on; without these
/// variables, nothing. The Makefile's target `sim` sets them.
#[test]
fn seeds_from_the_environment_keep_every_guarantee() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    for kind in Kind::ALL {
        if let Some(seed) = number("GENBLK_SIM_SEED") {
            println!("cache ({kind:?}): seed {seed}: {:?}", kind.run_all(seed..seed + 1));
        }
        if let Some(count) = number("GENBLK_SIM_COUNT") {
            let first = number("GENBLK_SIM_FIRST").unwrap_or(1000);
            println!("cache ({kind:?}): {count} seeds: {}", kind.run_all(first..first + count));
        }
    }
}

/// Each planted bug with the first seed that finds it. A change of the cache or of the simulator may change the seed:
/// the test then searches for another, and prints it.
const FOUND_BY: [(PlantedBug, u64); 20] = [
    (PlantedBug::RewriteIsLost, 13),
    (PlantedBug::ReadInOverwritesDirty, 1),
    (PlantedBug::WriteErrorIgnored, 4),
    (PlantedBug::WritebackPublishedAsClean, 10),
    (PlantedBug::UnsyncedPublishedAsClean, 41),
    (PlantedBug::ZeroNotPublished, 24),
    (PlantedBug::NoSpaceIgnored, 29),
    (PlantedBug::WriteSkipsAllocation, 1),
    (PlantedBug::HoldNeverEnds, 116),
    (PlantedBug::StopUsesUpHold, 11),
    (PlantedBug::HoldFailsAtOnce, 11),
    (PlantedBug::SyncDoubtsTooLittle, 2),
    (PlantedBug::FailedWriteDoubtsNothing, 10),
    (PlantedBug::InFlightIsTrusted, 27),
    (PlantedBug::SyncCountsAtOnce, 160),
    (PlantedBug::ZeroIsNotedLate, 215),
    (PlantedBug::ZeroesAreReadFromStore, 266),
    (PlantedBug::AgeForgetsUnsynced, 1),
    (PlantedBug::SpaceIsRetriedEveryTurn, 143),
    (PlantedBug::TailIsPublished, 96),
];

#[test]
fn the_simulator_finds_every_planted_bug_within_2000_seeds() {
    for (bug, known) in FOUND_BY {
        let finds = |seed: &u64| Kind::Plain.run(*seed, Some(bug)).is_err();
        let seed = Some(known).filter(finds).or_else(|| (0..2000).find(finds));
        let seed = seed.unwrap_or_else(|| panic!("2000 seeds do not find {bug:?}"));
        println!("seed {seed} finds {bug:?}");
    }
}
