//! The memory of a simulated cache: a version for each sector, and what was last published of each frame. It can be stopped
//! between any two steps that the cache takes in it, as a killed daemon's is.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::cache::FrameMemory;
use crate::units::{FrameId, FrameRecord, SectorMask, SectorSpan};

/// What a frame holds before anything was put there: seen by a guest, it is a leak.
pub(crate) const GARBAGE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Contents {
    versions: Vec<[u32; 8]>,
    ledger: Vec<Option<FrameRecord>>,
    zeroed: Vec<Option<SectorSpan>>,
}

#[derive(Debug)]
struct MemoryState {
    now: Contents,
    /// Steps until the daemon dies.
    steps_to_crash: Option<u64>,
    /// What was there when it died.
    dead: Option<Contents>,
}

impl MemoryState {
    /// The cache is about to take a step.
    fn step(&mut self) {
        match &mut self.steps_to_crash {
            Some(0) if self.dead.is_none() => self.dead = Some(self.now.clone()),
            Some(left) => *left = left.saturating_sub(1),
            None => {}
        }
    }
}

/// See the module. Clones share the memory.
#[derive(Clone, Debug)]
pub(crate) struct Memory(Arc<Mutex<MemoryState>>);

impl Memory {
    /// Frames of garbage, and places for zeroed ranges.
    pub fn new(frames: u32, places: usize) -> Self {
        let frames = frames as usize;
        let (versions, ledger, zeroed) = (vec![[GARBAGE; 8]; frames], vec![None; frames], vec![None; places]);
        let now = Contents { versions, ledger, zeroed };
        Self(Arc::new(Mutex::new(MemoryState { now, steps_to_crash: None, dead: None })))
    }

    fn state(&self) -> MutexGuard<'_, MemoryState> {
        self.0.lock().expect("a world has one thread")
    }

    /// The version in a sector of a frame; beyond the frame's end, in one of those that follow.
    pub fn get(&self, frame: FrameId, sector: usize) -> u32 {
        self.state().now.versions[frame.index() + sector / 8][sector % 8]
    }

    /// Puts a version there.
    pub fn set(&self, frame: FrameId, sector: usize, version: u32) {
        self.state().now.versions[frame.index() + sector / 8][sector % 8] = version;
    }

    /// The daemon dies before the step after `steps` more.
    pub fn crash_after(&self, steps: u64) {
        self.state().steps_to_crash = Some(steps);
    }

    /// Whether the daemon has died: nothing that it did since has happened.
    pub fn is_dead(&self) -> bool {
        self.state().dead.is_some()
    }

    /// Makes the memory again what it was when the daemon died, or takes it as it is.
    pub fn restore_crash_image(&self) {
        let mut state = self.state();
        state.steps_to_crash = None;
        if let Some(dead) = state.dead.take() {
            state.now = dead;
        }
    }

    /// What a successor finds.
    pub fn records(&self) -> Vec<(FrameId, FrameRecord)> {
        let state = self.state();
        let noted = (0..).map(FrameId).zip(&state.now.ledger);
        noted.filter_map(|(frame, noted)| noted.map(|record| (frame, record))).collect()
    }

    /// The zeroed ranges that a successor finds, by their places.
    pub fn pending_zeroes(&self) -> Vec<(usize, SectorSpan)> {
        let state = self.state();
        state.now.zeroed.iter().enumerate().filter_map(|(place, noted)| noted.map(|span| (place, span))).collect()
    }
}

fn sectors_of(mask: SectorMask) -> impl Iterator<Item = usize> {
    (0..8).filter(move |bit| mask.0 >> bit & 1 == 1)
}

impl FrameMemory for Memory {
    fn copy_sectors(&self, source: FrameId, target: FrameId, mask: SectorMask) {
        let mut state = self.state();
        for sector in sectors_of(mask) {
            state.step();
            let version = state.now.versions[source.index()][sector];
            state.now.versions[target.index()][sector] = version;
        }
    }

    fn zero_sectors(&self, frame: FrameId, mask: SectorMask) {
        let mut state = self.state();
        for sector in sectors_of(mask) {
            state.step();
            state.now.versions[frame.index()][sector] = 0;
        }
    }

    fn publish(&self, frame: FrameId, record: FrameRecord) {
        let mut state = self.state();
        state.step();
        state.now.ledger[frame.index()] = (!record.is_empty()).then_some(record);
    }

    fn zero_slots(&self) -> usize {
        self.state().now.zeroed.len()
    }

    fn note_zero(&self, place: usize, span: Option<SectorSpan>) {
        let mut state = self.state();
        state.step();
        state.now.zeroed[place] = span;
    }
}
