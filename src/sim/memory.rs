//! The frame memory of a simulated cache: a version number for each sector, and the published record of each frame.
//!
//! A daemon may crash between any two steps of the cache in this memory. From then on the cache changes memory that the
//! next daemon does not get: [`SimulatedMemory::restore_crash_image`] restores the contents at the time of the crash.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::arena::sectors_within;
use crate::cache::FrameMemory;
use crate::units::{FrameId, FrameRecord, SectorMask, SectorSpan};

/// The version of memory that was never written. A guest that reads it has received foreign data.
pub(crate) const GARBAGE: u32 = u32::MAX;

/// Slots for changed ranges: 3 ranges are recorded at a time.
const CHANGED_SLOTS: usize = 12;

/// The part that survives a crash of the daemon.
#[derive(Clone, Debug)]
struct MemoryContents {
    versions: Vec<[u32; 8]>,
    records: Vec<Option<FrameRecord>>,
    zero_slots: Vec<Option<SectorSpan>>,
    changed_slots: Vec<Option<SectorSpan>>,
    /// Number of frames that have memory.
    in_use: usize,
}

#[derive(Debug)]
struct MemoryState {
    current: MemoryContents,
    steps_to_crash: Option<u64>,
    /// The contents at the time of the crash.
    crash_image: Option<MemoryContents>,
}

impl MemoryState {
    /// The cache is about to take a step.
    fn step(&mut self) {
        match &mut self.steps_to_crash {
            Some(0) if self.crash_image.is_none() => self.crash_image = Some(self.current.clone()),
            Some(left) => *left = left.saturating_sub(1),
            None => {}
        }
    }
}

/// See the documentation of the module. Clones share the memory.
#[derive(Clone, Debug)]
pub(crate) struct SimulatedMemory(Arc<Mutex<MemoryState>>);

impl SimulatedMemory {
    /// Memory of `frames` frames of garbage, and `zero_slots` empty slots for zeroed ranges.
    pub fn new(frames: u32, zero_slots: usize) -> Self {
        let frames = frames as usize;
        let current = MemoryContents {
            versions: vec![[GARBAGE; 8]; frames],
            records: vec![None; frames],
            zero_slots: vec![None; zero_slots],
            changed_slots: vec![None; CHANGED_SLOTS],
            in_use: frames,
        };
        Self(Arc::new(Mutex::new(MemoryState { current, steps_to_crash: None, crash_image: None })))
    }

    /// Checks that a frame has memory.
    fn check(state: &MemoryState, frame: FrameId, sector: usize) {
        let in_use = state.current.in_use;
        assert!(frame.index() + sector / 8 < in_use, "{frame:?} is used, and {in_use} frames have memory");
    }

    fn state(&self) -> MutexGuard<'_, MemoryState> {
        self.0.lock().expect("a world has one thread")
    }

    /// The version in a sector, counted from the frame's first; from 8 on they lie in the following frames.
    pub fn get(&self, frame: FrameId, sector: usize) -> u32 {
        let state = self.state();
        Self::check(&state, frame, sector);
        state.current.versions[frame.index() + sector / 8][sector % 8]
    }

    /// Sets the version in a sector, counted as in [`SimulatedMemory::get`].
    pub fn set(&self, frame: FrameId, sector: usize, version: u32) {
        let mut state = self.state();
        Self::check(&state, frame, sector);
        state.current.versions[frame.index() + sector / 8][sector % 8] = version;
    }

    /// Makes the daemon crash after `steps` more steps.
    pub fn crash_after(&self, steps: u64) {
        self.state().steps_to_crash = Some(steps);
    }

    /// Whether the daemon has crashed: all later steps of the cache have no effect.
    pub fn has_crashed(&self) -> bool {
        self.state().crash_image.is_some()
    }

    /// Restores the contents at the time of the crash; keeps the current contents if the daemon did not crash within
    /// its step.
    pub fn restore_crash_image(&self) {
        let mut state = self.state();
        state.steps_to_crash = None;
        if let Some(crash_image) = state.crash_image.take() {
            state.current = crash_image;
        }
    }

    /// The published frame records, for [`PageCache::restore`](crate::cache::PageCache::restore).
    pub fn records(&self) -> Vec<(FrameId, FrameRecord)> {
        let state = self.state();
        let records = (0..).map(FrameId).zip(&state.current.records);
        records.filter_map(|(frame, record)| record.map(|record| (frame, record))).collect()
    }

    /// Removes the sectors from `end` on from all records.
    pub fn forget_beyond(&self, end: u64) {
        for record in self.state().current.records.iter_mut().flatten() {
            let within = sectors_within(end, record.page);
            (record.valid, record.dirty) = (record.valid.and(within), record.dirty.and(within));
        }
    }

    /// The zeroed ranges with their slots, for [`PageCache::restore`](crate::cache::PageCache::restore).
    pub fn pending_zeroes(&self) -> Vec<(usize, SectorSpan)> {
        noted(&self.state().current.zero_slots)
    }

    /// The changed ranges, as [`SimulatedMemory::pending_zeroes`].
    pub fn changed_ranges(&self) -> Vec<(usize, SectorSpan)> {
        noted(&self.state().current.changed_slots)
    }
}

fn noted(slots: &[Option<SectorSpan>]) -> Vec<(usize, SectorSpan)> {
    slots.iter().enumerate().filter_map(|(slot, span)| span.map(|span| (slot, span))).collect()
}

fn sectors_of(mask: SectorMask) -> impl Iterator<Item = usize> {
    (0..8).filter(move |bit| mask.0 >> bit & 1 == 1)
}

impl FrameMemory for SimulatedMemory {
    fn copy_sectors(&self, source: FrameId, target: FrameId, mask: SectorMask) {
        let mut state = self.state();
        [source, target].iter().for_each(|frame| Self::check(&state, *frame, 0));
        for sector in sectors_of(mask) {
            state.step();
            let version = state.current.versions[source.index()][sector];
            state.current.versions[target.index()][sector] = version;
        }
    }

    fn zero_sectors(&self, frame: FrameId, mask: SectorMask) {
        let mut state = self.state();
        Self::check(&state, frame, 0);
        for sector in sectors_of(mask) {
            state.step();
            state.current.versions[frame.index()][sector] = 0;
        }
    }

    fn publish(&self, frame: FrameId, record: FrameRecord) {
        let mut state = self.state();
        Self::check(&state, frame, 0);
        state.step();
        state.current.records[frame.index()] = (!record.is_empty()).then_some(record);
    }

    fn use_frames(&self, count: u32) {
        let mut state = self.state();
        state.step();
        let count = count as usize;
        assert!(state.current.records[count..].iter().all(Option::is_none), "a record of a frame without memory");
        // The memory of the other frames is freed immediately.
        state.current.versions[count..].fill([GARBAGE; 8]);
        state.current.in_use = count;
    }

    fn zero_slots(&self) -> usize {
        self.state().current.zero_slots.len()
    }

    fn note_zero(&self, slot: usize, span: Option<SectorSpan>) {
        let mut state = self.state();
        state.step();
        state.current.zero_slots[slot] = span;
    }

    fn changed_slots(&self) -> usize {
        CHANGED_SLOTS
    }

    fn note_changed(&self, slot: usize, span: Option<SectorSpan>) {
        let mut state = self.state();
        state.step();
        assert!(span.is_none() || state.current.changed_slots[slot].is_none(), "a note is overwritten");
        state.current.changed_slots[slot] = span;
    }
}
