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
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            operations: self.operations + other.operations,
            deaths: self.deaths + other.deaths,
            witnesses: self.witnesses + other.witnesses,
        }
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { requests, operations, deaths, .. } = self;
        write!(f, "{requests} requests, {operations} operations of the disk, {deaths} deaths of the daemon")
    }
}

/// Runs one seed.
fn run(seed: u64, planted: Option<PlantedBug>) -> std::thread::Result<Counts> {
    run_with(planted, || {
        let mut world = World::new(seed);
        world.run(STEPS);
        world.counts
    })
}

/// Runs a small world of `steps` steps that takes its first decisions from `script`.
///
/// # Panics
/// When the oracle finds a bug.
pub(crate) fn run_scripted(script: &[u8], steps: u64) {
    let mut prng = Prng::scripted(script);
    World::of(scenario::small_settings(&mut prng), prng).run(steps);
}

/// Runs one seed; a failure names it.
fn run_named(seed: u64) -> Counts {
    run(seed, None).unwrap_or_else(|_| panic!("seed {seed} failed: replay it with `make sim SEED={seed}`"))
}

/// Runs seeds.
fn run_all(seeds: impl Iterator<Item = u64>) -> Counts {
    seeds.map(run_named).fold(Counts::default(), Counts::add)
}

#[test]
fn fixed_seeds_keep_every_guarantee() {
    let counts = run_all(0..FIXED_SEEDS);
    assert!(
        counts.requests > 100_000 && counts.deaths > 10_000,
        "too little happened in {FIXED_SEEDS} worlds: {counts}"
    );
}

#[test]
fn random_seeds_keep_every_guarantee() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("the clock is set");
    let first = u64::from(clock.subsec_nanos()) << 32 | clock.as_secs() & 0xffff_ffff;
    run_all(first..first + 30);
}

#[test]
fn every_witness_of_a_sync_is_on_the_disk_as_it_is_in_its_frame() {
    let witnesses = run_all(0..100).witnesses;
    assert!(witnesses > 100, "only {witnesses} witnesses");
}

/// Runs one seed with a server in place of the disk, which is restarted occasionally.
fn run_with_restarts(seed: u64, planted: Option<PlantedBug>) -> std::thread::Result<()> {
    run_with(planted, || World::with_restarts(seed).run(STEPS))
}

#[test]
fn a_server_that_is_restarted_loses_nothing_and_fails_nothing() {
    for seed in 0..FIXED_SEEDS / 4 {
        assert!(run_with_restarts(seed, None).is_ok(), "seed {seed} with restarts failed");
    }
    let finds = |seed: &u64| run_with_restarts(*seed, Some(PlantedBug::LostIsNotDoubted)).is_err();
    assert!((0..FIXED_SEEDS).any(|seed| finds(&seed)), "no seed finds a loss that is not repaired");
}

/// Runs one seed with an operator that freezes the cache between any two steps.
fn run_with_freezes(seed: u64) -> std::thread::Result<u64> {
    run_with(None, || {
        let mut world = World::with_freezes(seed);
        world.run(STEPS);
        world.freezes
    })
}

/// Runs seeds with freezes. Returns how often a cache was frozen.
fn freeze_all(seeds: std::ops::Range<u64>) -> u64 {
    seeds.map(|seed| run_with_freezes(seed).unwrap_or_else(|_| panic!("seed {seed} with freezes failed"))).sum()
}

#[test]
fn a_frozen_disk_does_not_change_and_is_what_a_flush_leaves() {
    let freezes = freeze_all(0..FREEZE_SEEDS);
    // A Sync fails, and its daemon dies before the failure is reported to it.
    freeze_all(80_000_931..80_000_932);
    assert!(freezes > FREEZE_SEEDS, "only {freezes} freezes");
}

/// Runs one seed with an image that grows and shrinks between any two steps.
fn run_with_growth(seed: u64, planted: Option<PlantedBug>) -> std::thread::Result<[u64; 4]> {
    run_with(planted, || {
        let mut world = World::with_growth(seed);
        world.run(STEPS);
        world.growths()
    })
}

/// Runs seeds with growth. Returns the sums of [`World::growths`].
fn grow_all(seeds: std::ops::Range<u64>) -> [u64; 4] {
    let run = |seed| run_with_growth(seed, None).unwrap_or_else(|_| panic!("seed {seed} with growth failed"));
    seeds.map(run).fold([0; 4], |sums, counts| std::array::from_fn(|index| sums[index] + counts[index]))
}

#[test]
fn an_image_that_grows_and_shrinks_keeps_every_guarantee() {
    let counts = grow_all(0..GROWTH_SEEDS);
    assert!(counts.iter().all(|count| *count > 100), "too little happened: {counts:?}");
}

/// Runs one seed with an operator that changes the size of the cache between any two steps. Returns the number of
/// changes, and the number of pages that have moved for them.
fn run_with_sizes(seed: u64) -> std::thread::Result<(u64, u64)> {
    run_with(None, || {
        let mut world = World::with_sizes(seed);
        world.run(STEPS);
        (world.sizes.sizes, world.sizes.moved_pages)
    })
}

/// Runs seeds with changes of size. Returns the number of changes, and the number of pages that have moved.
fn resize_all(seeds: std::ops::Range<u64>) -> (u64, u64) {
    seeds.fold((0, 0), |(sizes, pages), seed| {
        let (more, moved) = run_with_sizes(seed).unwrap_or_else(|_| panic!("seed {seed} with sizes failed"));
        (sizes + more, pages + moved)
    })
}

#[test]
fn a_cache_whose_size_changes_between_any_two_steps_keeps_every_guarantee() {
    let (sizes, moved) = resize_all(0..SIZE_SEEDS);
    assert!(sizes > 10 * SIZE_SEEDS && moved > SIZE_SEEDS, "only {sizes} changes of size, {moved} pages moved");
}

/// Runs the seed `GENBLK_SIM_SEED`, and `GENBLK_SIM_COUNT` seeds from `GENBLK_SIM_FIRST` (1000) on; without these
/// variables, nothing. The Makefile's target `sim` sets them.
#[test]
fn seeds_from_the_environment() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    if let Some(seed) = number("GENBLK_SIM_SEED") {
        println!("cache: seed {seed}: {}", run_named(seed));
        println!("cache: seed {seed} with freezes: {:?}", run_with_freezes(seed));
        println!("cache: seed {seed} with growth: {:?}", run_with_growth(seed, None));
        println!("cache: seed {seed} with sizes: {:?}", run_with_sizes(seed));
    }
    if let Some(count) = number("GENBLK_SIM_COUNT") {
        let first = number("GENBLK_SIM_FIRST").unwrap_or(1000);
        println!("cache: {count} seeds: {}", run_all(first..first + count));
        println!("cache: {count} seeds with an operator: {} freezes", freeze_all(first..first + count));
        let [applied, found, cut, uncut] = grow_all(first..first + count);
        println!("cache: {count} seeds with growth: applied {applied} times, found by {found} daemons");
        println!("cache: {count} seeds with growth: {cut} images cut, {uncut} not cut after all");
        println!("cache: {count} seeds with sizes: {:?} changes and moved pages", resize_all(first..first + count));
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
        let finds = |seed: &u64| run(*seed, Some(bug)).is_err();
        let seed = Some(known).filter(finds).or_else(|| (0..2000).find(finds));
        let seed = seed.unwrap_or_else(|| panic!("2000 seeds do not find {bug:?}"));
        println!("seed {seed} finds {bug:?}");
    }
}
