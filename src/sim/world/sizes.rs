//! Changes of size in a simulated world: in any step an operator may change the number of frames of the cache.

use super::super::memory::SimulatedMemory;
use super::super::scenario::Scenario;
use super::World;

/// Of 1000 steps, the number that change the size.
const CHANGES_PER_MILLE: u64 = 15;
/// Numbers of frames to choose from.
const SIZES: [u32; 6] = [12, 13, 24, 48, 100, 160];
/// Most turns that a change of size may take while nothing is in flight.
const TURNS_MAX: u32 = 10_000;

impl World {
    /// The world for a seed, with an operator that changes the size of the cache.
    pub fn with_sizes(seed: u64) -> Self {
        let world = Self::new(seed);
        let mut world = Self { scenario: Scenario { live_sizes: true, ..world.scenario }, ..world };
        world.reserve_frames();
        world
    }

    /// Gives a new cache as much memory as it may ever use.
    fn reserve_frames(&mut self) {
        let largest = SIZES.into_iter().max().expect("there are sizes");
        self.settings.frames_max = self.settings.frames.max(largest);
        self.memory = SimulatedMemory::new(self.settings.frames_max, self.scenario.zero_slots);
        self.start_writer();
    }

    /// Changes the size, in some steps.
    pub(super) fn change_size(&mut self) {
        if !self.scenario.live_sizes || self.is_reader() || self.prng.below(1000) >= CHANGES_PER_MILLE {
            return;
        }
        let frames = self.prng.pick(&SIZES);
        self.settings.frames = frames;
        self.settings.dirty_pages_max = self.prng.pick(&[frames / 4, frames / 2]);
        self.cache.reconfigure(&self.settings);
        self.counts.resizes += 1;
    }

    /// Nothing is in flight, and the disk is healthy: the size must soon be the requested one.
    pub(super) fn check_size(&mut self) {
        if !self.scenario.live_sizes {
            return;
        }
        for turn in 0..TURNS_MAX {
            if turn % 100 == 0 {
                // Failures before the disk was healed may have stopped the store.
                self.cache.resume();
            }
            if self.cache.is_resized() {
                self.counts.moved_pages += self.cache.moved_pages();
                let stats = self.cache.stats();
                return assert_eq!(stats.frames, u64::from(self.settings.frames), "{stats:?}");
            }
            self.advance_time();
            self.end_turn();
        }
        panic!("the size of the cache does not change: {:?}", self.cache.stats());
    }
}
