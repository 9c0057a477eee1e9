//! How the rings of a worker share its turns, in worlds without deaths or failures.

use std::sync::atomic::Ordering;

use super::super::guest::GuestAction;
use super::super::scenario::{Scenario, settings};
use super::World;
use crate::cache::Settings;
use crate::device::budget::Budget;
use crate::fault_injection::run_with;
use crate::prng::Prng;
use crate::store::Limits;
use crate::units::{ImageHoles, SECTORS_PER_PAGE, SectorSpan};

/// Number of worlds in which a property is checked.
const WORLDS: usize = 20;
/// Turns in which a ring with a request must be served, if it shares its worker with one other ring.
const TURNS_MAX: u32 = 8;
/// Pages that the rings of a worker may have in progress, and pages that the guest requests on each busy ring.
const SHARED_PAGES: u64 = 4;
const REQUESTED_PAGES: u64 = 6;

/// The results of `check` in the first worlds that are suitable.
fn check_worlds<R>(
    is_suitable: impl Fn(&Scenario, &Settings, &Limits) -> bool,
    check: impl Fn(u64) -> R,
) -> impl Iterator<Item = R> {
    let suits = move |seed: &u64| {
        let mut prng = Prng::new(*seed);
        let (settings, limits) = settings(&mut prng);
        is_suitable(&Scenario::new(&mut prng, settings.image_sectors, settings.holes), &settings, &limits)
    };
    let run = move |seed| run_with(None, || check(seed)).unwrap_or_else(|_| panic!("seed {seed}"));
    (0..).filter(suits).take(WORLDS).map(run)
}

/// A world in which nothing fails, after `prepare`, with a daemon that serves a connected front-end.
fn calm_world(seed: u64, prepare: impl FnOnce(&mut World)) -> World {
    let mut world = World::new(seed);
    world.scenario.crash_points_max = None;
    world.scenario.reader_percent = 0;
    world.restores = None;
    world.growth = None;
    prepare(&mut world);
    world.image.heal();
    world.step_worker(0);
    world.complete_all_requests();
    world
}

/// Each turn has the budget for one request. One ring always has another request; the other one has a single request.
fn read_beside_a_busy_ring(seed: u64) {
    let mut world = calm_world(seed, |world| {
        world.budget = Budget { turn_pages: 1, ..Budget::default() };
        world.settings.readahead_pages_max = 0;
    });
    let read = |world: &mut World, ring| world.submit(ring, GuestAction::Read, SectorSpan::new(0, 1));
    assert!(read(&mut world, 0));
    world.complete_all_requests();
    for busy in [0, 1] {
        let other = 1 - busy;
        while read(&mut world, busy) {}
        assert!(read(&mut world, other));
        let mut turns = 0;
        while world.rings[other].in_flight() > 0 {
            assert!(turns < TURNS_MAX, "ring {other} waits behind ring {busy}");
            turns += u32::from(world.step_worker(0));
            (0..2).for_each(|ring| _ = world.handle_interrupt(ring));
            while read(&mut world, busy) {}
        }
        world.complete_all_requests();
    }
}

#[test]
fn a_busy_ring_does_not_keep_another_ring_of_its_worker_waiting() {
    let is_suitable = |scenario: &Scenario, _: &Settings, _: &Limits| (scenario.workers, scenario.rings) == (1, 2);
    check_worlds(is_suitable, read_beside_a_busy_ring).for_each(drop);
}

/// A ring is counted as untracked exactly while it runs without an inflight region.
fn count_untracked_rings(seed: u64) {
    let mut world = calm_world(seed, |world| world.scenario.inflight_percent = 0);
    let count = |world: &World| {
        let life = world.life.as_ref().expect("the daemon lives");
        life.cached.untracked_rings.load(Ordering::Relaxed) as usize
    };
    let rings = world.rings.len();
    assert_eq!(count(&world), rings);
    // It is started again without a stop.
    world.start_rings(&[0]);
    world.complete_all_requests();
    assert_eq!(count(&world), rings, "the ring that was replaced no longer runs");
    // The front-end sends an inflight region, and starts the ring again.
    world.add_inflight_region();
    world.stop_ring(0);
    world.complete_all_requests();
    assert_eq!(count(&world), rings - 1);
}

#[test]
fn a_ring_is_untracked_only_while_it_runs_without_an_inflight_region() {
    check_worlds(|_, _, _| true, count_untracked_rings).for_each(drop);
}

/// The pages that a worker with two rings reads at a time if this many of them are busy.
fn pages_in_progress(seed: u64, busy_rings: usize) -> u64 {
    let mut world = calm_world(seed, |world| {
        world.budget = Budget { turn_pages: 1, window_pages: 1, ring_pages: SHARED_PAGES, ..Budget::default() };
        world.settings.readahead_pages_max = 0;
    });
    let before = world.image.submitted();
    for n in 0..REQUESTED_PAGES * busy_rings as u64 {
        // No two of them are adjacent, so each is an operation of its own.
        let span = SectorSpan::new(2 * n * SECTORS_PER_PAGE, 1);
        assert!(world.submit(n as usize % busy_rings, GuestAction::Read, span));
    }
    (0..200).for_each(|_| _ = world.step_worker(0));
    let in_progress = world.image.submitted() - before;
    world.complete_all_requests();
    in_progress
}

#[test]
fn active_rings_share_the_budget_of_their_worker() {
    let is_suitable = |scenario: &Scenario, settings: &Settings, limits: &Limits| {
        let has_room = settings.frames >= 48 && settings.image_sectors >= 4 * REQUESTED_PAGES * SECTORS_PER_PAGE;
        // A map of the image would be an operation too.
        let maps_nothing = settings.holes == ImageHoles::Unmappable;
        let rings = (scenario.workers, scenario.rings, scenario.queue_size);
        has_room && maps_nothing && limits.depth >= 8 && rings == (1, 2, 32)
    };
    for busy_rings in [1, 2] {
        for pages in check_worlds(is_suitable, |seed| pages_in_progress(seed, busy_rings)) {
            assert_eq!(pages, SHARED_PAGES, "{busy_rings} busy rings");
        }
    }
}
