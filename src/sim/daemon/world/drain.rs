//! A ring that drains while a long read is in progress.

use super::super::guest::GuestAction;
use super::World;
use crate::device::budget::Budget;
use crate::fault_injection::run_with;
use crate::units::{ImageHoles, SECTORS_PER_PAGE, SectorSpan};

/// Pages of a window, and of a read, which is long.
const WINDOW_PAGES: u64 = 3;
const READ_PAGES: u64 = 4;
/// Steps of a worker after which it has finished its present work.
const STEPS: u32 = 20;

/// The first window has two operations, with a page between them that is in memory. When one of them ends, more than
/// half of the window is done, and the next window would be due. Returns whether a world has such operations.
fn stop_within_a_long_read(seed: u64) -> bool {
    let mut world = World::new(seed);
    if world.settings.holes == ImageHoles::Possible {
        // The worker's maps would count as operations too.
        return false;
    }
    world.settings.readahead_pages_max = 0;
    world.scenario.crash_points_max = None;
    world.budget = Budget { window_pages: WINDOW_PAGES, long_pages: WINDOW_PAGES, ..Budget::default() };
    world.image.heal();
    world.step_worker(0);
    world.complete_all_requests();
    world.submit(0, GuestAction::Read, SectorSpan::new(SECTORS_PER_PAGE, SECTORS_PER_PAGE));
    world.complete_all_requests();
    let before = world.image.submitted();
    world.submit(0, GuestAction::Read, SectorSpan::new(0, READ_PAGES * SECTORS_PER_PAGE));
    (0..STEPS).for_each(|_| _ = world.step_worker(0));
    if world.image.submitted() != before + 2 {
        // The page did not stay in memory.
        return false;
    }
    world.stop_ring(0);
    loop {
        (0..STEPS).for_each(|_| _ = world.step_worker(0));
        assert_eq!(world.image.submitted(), before + 2, "the ring drains");
        if world.poll_control() {
            break;
        }
        world.now_us = world.image.next_event().expect("two operations");
        world.image.advance(world.now_us);
    }
    // The next ring serves it from its beginning.
    world.complete_all_requests();
    true
}

#[test]
fn a_draining_ring_starts_no_further_window_of_a_long_request() {
    let stopped =
        |seed: &u64| run_with(None, || stop_within_a_long_read(*seed)).unwrap_or_else(|_| panic!("seed {seed}"));
    let count = (0..100).filter(stopped).count();
    assert!(count > 20, "{count} worlds have such operations");
}
