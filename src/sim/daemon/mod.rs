//! The simulator of the whole daemon: one seed determines all events, on one thread.
//!
//! Everything between guest memory and the image is the daemon's real code: workers with their rings, inflight marks,
//! mailboxes and wakers, the cached image, the arena in a file with its ledger, and recovery. Simulated are the disk
//! (`store.rs`), the guest's driver (`guest.rs`), the front-end and the operator (`control.rs`), and the clock. The
//! world (`world.rs`) decides which worker takes a turn next, and what the others do in between.
//!
//! A daemon dies at a random [`crash_point`](crate::fault_injection::crash_point): between two stores to memory that
//! outlives it. Its successor gets the arena and the inflight region in that state. The oracle (`oracle.rs`) checks the
//! results that the guest gets.
//!
//! `make sim SEED=n` replays one seed here too.

mod guest;
mod life;
mod oracle;
mod scenario;
mod store;
mod world;

use super::Counts;
use crate::fault_injection::{PlantedBug, run_with};

use world::World;

/// Random steps of a world.
const STEPS: u64 = 2000;

/// Runs one seed.
fn run(seed: u64, planted: Option<PlantedBug>) -> std::thread::Result<Counts> {
    run_with(planted, || {
        let mut world = World::new(seed);
        world.run(STEPS);
        world.counts()
    })
}

/// Runs seeds; a failure names its seed.
fn run_all(seeds: impl Iterator<Item = u64>) -> Counts {
    seeds.fold(Counts::default(), |sum, seed| match run(seed, None) {
        Ok(counts) => sum + counts,
        Err(_) => panic!("daemon: seed {seed} failed: replay it with `make sim SEED={seed}`"),
    })
}

#[test]
fn fixed_seeds_keep_every_guarantee_of_the_daemon() {
    let counts = run_all(0..500);
    assert!(counts.requests > 40_000 && counts.deaths > 1000, "too little happened: {counts}");
}

#[test]
fn random_seeds_keep_every_guarantee_of_the_daemon() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("the clock is set");
    let first = u64::from(clock.subsec_nanos()) << 32 | clock.as_secs() & 0xffff_ffff;
    run_all(first..first + 20);
}

/// Runs the seed `GENBLK_SIM_SEED`, and `GENBLK_SIM_COUNT` seeds from `GENBLK_SIM_FIRST` (1000) on; without these
/// variables, nothing. The Makefile's target `sim` sets them.
#[test]
fn seeds_from_the_environment_keep_every_guarantee_of_the_daemon() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    if let Some(seed) = number("GENBLK_SIM_SEED") {
        println!("daemon: seed {seed}: {}", run_all(seed..seed + 1));
    }
    if let Some(count) = number("GENBLK_SIM_COUNT") {
        let first = number("GENBLK_SIM_FIRST").unwrap_or(1000);
        println!("daemon: {count} seeds: {}", run_all(first..first + count));
    }
}

/// Planted bugs outside the cache.
const PLANTED: [PlantedBug; 11] = [
    PlantedBug::InflightClearedBeforePublishing,
    PlantedBug::ZeroesNotFlushed,
    PlantedBug::SwitchNotFlushed,
    PlantedBug::ReadCompletesBeforeCopy,
    PlantedBug::LedgerBeforeCopy,
    PlantedBug::NoticeDropped,
    PlantedBug::DrainEndsEarly,
    PlantedBug::LongRequestForgotten,
    PlantedBug::ProofSkipped,
    PlantedBug::AbandonLosesUntracked,
    PlantedBug::DiscardIsNotNoted,
];

#[test]
fn the_simulator_finds_every_planted_bug_of_the_daemon_within_500_seeds() {
    for bug in PLANTED {
        let found = (0..500).find(|&seed| run(seed, Some(bug)).is_err());
        let seed = found.unwrap_or_else(|| panic!("500 seeds do not find {bug:?}"));
        println!("seed {seed} finds {bug:?}");
    }
}
