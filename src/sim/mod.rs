//! The simulated world: the page cache run through millions of orderings, one seed each.
//!
//! `make sim SEED=n` replays one seed, `make sim N=1000` runs many; a fixed set and a few random seeds run with the
//! unit tests. A seed decides everything: the cache's shape, the guest's requests, latencies, reordering, faults that
//! pass and faults that stay, torn writes and power cuts.

#![allow(clippy::cast_possible_truncation, reason = "a simulated disk is small, and indexes vectors all the time")]

pub(crate) mod disk;
mod failure_oracle;
pub(crate) mod memory;
mod oracle;
mod scenario;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use world::World;

/// A deliberate bug in the cache that the simulator must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PlantedBug {
    /// A write-back that ends takes the page for clean although it was written again meanwhile.
    RewriteIsLost,
    /// A read-in lands on sectors that a guest has written.
    ReadInOverwritesDirty,
    /// A cluster's error is taken for success.
    ClusterIgnoresError,
    /// A page that is on its way to the store is noted as clean: who dies meanwhile loses it.
    WritingIsClean,
    /// A page that no Sync has covered is noted as clean: a successor whose Sync fails does not write it again.
    WrittenIsStable,
    /// A range that was zeroed is not noted: a successor whose Sync fails does not zero it again.
    ZeroedIsForgotten,
    /// A write-back that finds the disk full is taken for success.
    FullDiskDropsPages,
    /// A write into a hole does not wait for its space.
    SpaceIsTakenForGranted,
    /// Requests that wait for a disk wait for ever.
    HoldNeverEnds,
    /// Requests fail at once although they were to wait for the disk.
    HoldReports,
}

impl PlantedBug {
    #[cfg(test)]
    const ALL: [Self; 10] = [
        Self::RewriteIsLost,
        Self::ReadInOverwritesDirty,
        Self::ClusterIgnoresError,
        Self::WritingIsClean,
        Self::WrittenIsStable,
        Self::ZeroedIsForgotten,
        Self::FullDiskDropsPages,
        Self::SpaceIsTakenForGranted,
        Self::HoldNeverEnds,
        Self::HoldReports,
    ];
}

/// Steps of chance in one world; the liveness phase comes on top.
const STEPS: u64 = 1500;

/// Runs one seed; returns how many requests completed.
fn run(seed: u64, planted: Option<PlantedBug>) -> u64 {
    let mut world = World::new(seed, planted);
    world.run(STEPS);
    world.completed
}

/// Runs a seed and says which one it was if it fails.
fn run_and_name(seed: u64) -> u64 {
    match catch_unwind(AssertUnwindSafe(|| run(seed, None))) {
        Ok(completed) => completed,
        Err(_) => panic!("seed {seed} failed: replay it with `make sim SEED={seed}`"),
    }
}

#[test]
fn fixed_seeds_hold_every_promise() {
    let completed: u64 = (0..300).map(run_and_name).sum();
    assert!(completed > 25_000, "the worlds do something: {completed} requests");
}

#[test]
fn random_seeds_hold_every_promise() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("the clock is set");
    let first = u64::from(clock.subsec_nanos()) << 32 | clock.as_secs() & 0xffff_ffff;
    for seed in first..first + 10 {
        run_and_name(seed);
    }
}

/// `GENBLK_SIM_SEED` replays one seed, `GENBLK_SIM_COUNT` runs seeds from 1000 on; without either there is nothing to
/// do. See the Makefile's target `sim`.
#[test]
fn seeds_from_the_environment() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    if let Some(seed) = number("GENBLK_SIM_SEED") {
        println!("seed {seed}: {} requests", run(seed, None));
    }
    if let Some(count) = number("GENBLK_SIM_COUNT") {
        let completed: u64 = (1000..1000 + count).map(run_and_name).sum();
        println!("{count} seeds: {completed} requests");
    }
}

#[test]
fn every_planted_bug_is_found_within_2000_seeds() {
    for bug in PlantedBug::ALL {
        let found = (0..2000).find(|&seed| catch_unwind(AssertUnwindSafe(|| run(seed, Some(bug)))).is_err());
        let seed = found.unwrap_or_else(|| panic!("{bug:?} was not found"));
        println!("{bug:?} is found by seed {seed}");
    }
}
