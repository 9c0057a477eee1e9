//! The bytes of frames as the tests of the cache see them: a version for each sector, which is the smallest thing that the
//! cache can name.

use std::sync::{Arc, Mutex};

use crate::cache::FrameMemory;
use crate::units::{FrameId, SectorMask};

/// What a frame holds before anything was put there: seen by a guest, it is a leak.
pub(crate) const GARBAGE: u32 = u32::MAX;

/// The frames; every clone is the same memory.
#[derive(Clone, Debug)]
pub(crate) struct Memory(Arc<Mutex<Vec<[u32; 8]>>>);

impl Memory {
    /// `frames` frames of garbage.
    pub fn new(frames: u32) -> Self {
        Self(Arc::new(Mutex::new(vec![[GARBAGE; 8]; frames as usize])))
    }

    pub fn get(&self, frame: FrameId, sector: usize) -> u32 {
        self.0.lock().unwrap()[frame.index()][sector]
    }

    pub fn set(&self, frame: FrameId, sector: usize, version: u32) {
        self.0.lock().unwrap()[frame.index()][sector] = version;
    }
}

fn sectors_of(mask: SectorMask) -> impl Iterator<Item = usize> {
    (0..8).filter(move |bit| mask.0 >> bit & 1 == 1)
}

impl FrameMemory for Memory {
    fn copy_sectors(&self, source: FrameId, target: FrameId, mask: SectorMask) {
        for sector in sectors_of(mask) {
            self.set(target, sector, self.get(source, sector));
        }
    }

    fn zero_sectors(&self, frame: FrameId, mask: SectorMask) {
        for sector in sectors_of(mask) {
            self.set(frame, sector, 0);
        }
    }
}
