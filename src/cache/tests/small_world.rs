//! Exhaustive test of getpages: an image of four pages, each page in each state, and every request to them.
//!
//! A *scene* is a run of pages at the end of the image, each in a state of its own, and a request. Scenes of one, two
//! and three pages have every read and every write that begins in the run's first page and ends in its last. So each
//! page is requested in every way, as a whole or from or up to any sector, next to every other page. The position of
//! the run in the image matters only at the image's end.
//!
//! Scenes of four pages have the requests that begin and end at the edges of a page or within [`PART`]: those of all
//! four pages, and those of the middle ones. Pages next to a request do not affect getpages, but may affect the
//! write-back that follows.
//!
//! Each scene is played in two orders: operations complete in the order of their submission and pieces are returned
//! immediately, or in reverse order and late. Scenes of one and two pages are played in other shapes too: an image that
//! ends within its last page, a store of large blocks, and a cache without a hole map. `world.rs` plays a scene and
//! checks it.

#![allow(clippy::cast_possible_truncation, reason = "positions on an image of 32 sectors index arrays")]

mod world;

use crate::cache::*;
use crate::fault_injection::{PlantedBug, run_with};
use world::{PAGES, World};

/// The state of a page before the request: the states of `pages/page.rs`, their combinations, and partly valid pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageState {
    /// Data on the store, nothing in memory.
    Absent,
    /// Nothing on the store, nothing in memory.
    Hole,
    /// A read-in is in flight.
    Reading,
    /// The frame has the same contents as the store.
    Clean,
    /// All of it was written.
    Dirty,
    /// The sectors of [`PART`] were written. The others are on the store only.
    Partial,
    /// All of it was written and is under write-back.
    Writing,
    /// Like Partial, but the other sectors are a hole.
    PartialHole,
    /// [`PART`] was written while a read-in is in flight.
    ReadingDirty,
    /// [`PART`] was written again while all of the page is under write-back.
    WritingDirty,
    /// [`PART`] was written and is under write-back. The other sectors are on the store only.
    WritingPart,
}

use PageState::{
    Absent, Clean, Dirty, Hole, Partial, PartialHole, Reading, ReadingDirty, Writing, WritingDirty, WritingPart,
};

/// The simple states of a page.
const SIMPLE: [PageState; 7] = [Absent, Hole, Reading, Clean, Dirty, Partial, Writing];
/// The simple states and their combinations.
const ALL: [PageState; 11] =
    [Absent, Hole, Reading, Clean, Dirty, Partial, Writing, PartialHole, ReadingDirty, WritingDirty, WritingPart];

/// The sectors that are written of a partly written page. The truncated last page of an image has them too.
const PART: SectorMask = SectorMask(0b0001_1100);

impl PageState {
    /// Whether the page is a hole on the store.
    fn is_hole(self) -> bool {
        matches!(self, Hole | PartialHole)
    }

    /// Whether a read-in is in flight.
    fn is_reading(self) -> bool {
        matches!(self, Reading | ReadingDirty)
    }

    /// The sectors that a read finds in memory.
    fn valid(self) -> SectorMask {
        match self {
            Absent | Hole | Reading => SectorMask::NONE,
            Partial | PartialHole | ReadingDirty | WritingPart => PART,
            Clean | Dirty | Writing | WritingDirty => SectorMask::ALL,
        }
    }

    /// The sectors that a flush has to write.
    fn dirty(self) -> SectorMask {
        match self {
            Dirty => SectorMask::ALL,
            Partial | PartialHole | ReadingDirty | WritingDirty => PART,
            _ => SectorMask::NONE,
        }
    }
}

/// The image and the store of a scene.
#[derive(Clone, Copy, Debug)]
struct Shape {
    image_sectors: u64,
    block_sectors: u8,
    /// The cache has the hole map. If not, it has to request it first.
    mapped: bool,
}

const WHOLE: Shape = Shape { image_sectors: 32, block_sectors: 1, mapped: true };
const CUT: Shape = Shape { image_sectors: 29, ..WHOLE };
const BLOCKS: Shape = Shape { block_sectors: 8, ..WHOLE };
const UNMAPPED: Shape = Shape { mapped: false, ..WHOLE };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// The order in which operations complete and pieces are returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// Pieces are returned immediately, and the oldest operation completes first.
    Prompt,
    /// The newest operation completes first, and pieces are returned when all have completed.
    Late,
}

/// One test case.
#[derive(Clone, Copy, Debug)]
struct Scene<'a> {
    shape: Shape,
    /// The states of the image's last pages; all pages before them are Absent.
    states: &'a [PageState],
    direction: Direction,
    span: SectorSpan,
    order: Order,
}

impl Scene<'_> {
    /// The state of a page.
    fn state(&self, page: usize) -> PageState {
        let before = PAGES - self.states.len();
        page.checked_sub(before).map_or(Absent, |at| self.states[at])
    }

    /// The sectors of a page that are requested.
    fn requested(&self, page: usize) -> SectorMask {
        let sectors = (0..8).filter(|sector| {
            let sector = (page * 8 + sector) as u64;
            (self.span.start..self.span.end()).contains(&sector)
        });
        SectorMask(sectors.fold(0, |mask, sector| mask | 1 << sector))
    }
}

/// Sectors of a page at which requests begin and end: all of them.
const EVERY: [u64; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
/// The first and the last sector, and one of [`PART`].
const EDGES: [u64; 3] = [0, 3, 7];

/// The spans from one of `sectors` of page `first` to one of page `last`.
fn requests(first: u64, last: u64, sectors: &[u64]) -> Vec<SectorSpan> {
    let ends = sectors.iter().flat_map(|from| sectors.iter().map(move |to| (first * 8 + from, last * 8 + to)));
    ends.filter(|(from, to)| from <= to).map(|(from, to)| SectorSpan::new(from, to + 1 - from)).collect()
}

/// Visits every scene of `length` pages in `states`, for every request.
fn each_scene(
    shapes: &[Shape],
    length: usize,
    states: &[PageState],
    requests: &[SectorSpan],
    visit: &mut dyn FnMut(&Scene<'_>),
) {
    each_run(states, length, &mut |run| {
        for &shape in shapes {
            // No part of a page can be written to a store whose block is a page.
            if shape.block_sectors == 8 && run.contains(&WritingPart) {
                continue;
            }
            for &span in requests.iter().filter(|span| span.end() <= shape.image_sectors) {
                for direction in [Direction::Read, Direction::Write] {
                    for order in [Order::Prompt, Order::Late] {
                        visit(&Scene { shape, states: run, direction, span, order });
                    }
                }
            }
        }
    });
}

/// Visits every run of `length` states.
fn each_run(states: &[PageState], length: usize, visit: &mut dyn FnMut(&[PageState])) {
    let mut run = vec![Absent; length];
    for number in 0..(0..length).fold(1, |count, _| count * states.len()) {
        let mut rest = number;
        for state in &mut run {
            *state = states[rest % states.len()];
            rest /= states.len();
        }
        visit(&run);
    }
}

/// Whether the scene passes all checks.
fn passes(scene: &Scene<'_>, planted: Option<PlantedBug>) -> bool {
    run_with(planted, || World::new(scene).play()).is_ok()
}

/// Plays every scene. There must be at least `scenes_min` of them.
fn play_all(shapes: &[Shape], length: usize, states: &[PageState], requests: &[SectorSpan], scenes_min: u32) {
    let mut played = 0;
    each_scene(shapes, length, states, requests, &mut |scene| {
        assert!(passes(scene, None), "the panic above is of {scene:?}");
        played += 1;
    });
    assert!(played >= scenes_min, "only {played} scenes");
}

#[test]
fn every_state_and_shape_of_one_page_keeps_the_invariants() {
    play_all(&[WHOLE, CUT, BLOCKS, UNMAPPED], 1, &ALL, &requests(3, 3, &EVERY), 5_000);
}

#[test]
fn every_state_and_shape_of_two_pages_keeps_the_invariants() {
    play_all(&[WHOLE, CUT, BLOCKS, UNMAPPED], 2, &ALL, &requests(2, 3, &EVERY), 100_000);
}

#[test]
fn every_simple_state_of_three_pages_keeps_the_invariants() {
    play_all(&[WHOLE], 3, &SIMPLE, &requests(1, 3, &EVERY), 80_000);
}

#[test]
fn every_simple_state_of_four_pages_keeps_the_invariants() {
    let middle = [requests(1, 1, &EDGES), requests(1, 2, &EDGES)].concat();
    let all = [requests(0, 3, &EDGES), middle].concat();
    play_all(&[WHOLE], 4, &SIMPLE, &all, 200_000);
}

#[test]
fn planted_bugs_are_found_in_a_single_page() {
    for bug in [PlantedBug::RewriteIsLost, PlantedBug::ReadInOverwritesDirty] {
        let mut found = 0;
        let mut try_it = |scene: &Scene<'_>| found += u32::from(!passes(scene, Some(bug)));
        each_scene(&[WHOLE], 1, &ALL, &requests(3, 3, &EDGES), &mut try_it);
        assert!(found > 0, "{bug:?} was not found");
    }
}
