//! The oracle: a copy of the disk that knows what a read of each sector may return.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::SECTOR_BYTES;
use super::prng::Prng;

/// One sector's bytes.
type Sector = [u8; SECTOR_BYTES];

/// What the oracle knows of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Knowledge {
    /// It holds exactly the shadow's bytes.
    Known,
    /// It may hold any data: it was discarded, and not written since.
    Anything,
    /// It holds the shadow's bytes or one of the alternatives: a write to it failed.
    InDoubt,
}

/// A sector with data that it must not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    pub sector: u64,
    pub found: [u8; 16],
    pub expected: [u8; 16],
    /// Number of values that it may hold.
    pub candidates: usize,
}

/// The expected contents of the disk.
#[derive(Clone, Debug)]
pub struct Shadow {
    bytes: Vec<u8>,
    knowledge: Vec<Knowledge>,
    alternatives: HashMap<u64, Vec<Sector>>,
}

/// The byte range of `count` sectors from `first`.
fn byte_range(first: u64, count: u64) -> std::ops::Range<usize> {
    first as usize * SECTOR_BYTES..(first + count) as usize * SECTOR_BYTES
}

impl Shadow {
    /// A disk of `len` zero bytes.
    pub fn zeros(len: usize) -> Self {
        assert_eq!(len % SECTOR_BYTES, 0, "a disk has whole sectors");
        Self {
            bytes: vec![0; len],
            knowledge: vec![Knowledge::Known; len / SECTOR_BYTES],
            alternatives: HashMap::new(),
        }
    }

    /// A disk of `len` bytes that alternates between 256 KiB of noise and 256 KiB of zeros, which become holes.
    pub fn patchwork(len: usize, seed: u64) -> Self {
        let mut shadow = Self::zeros(len);
        let mut prng = Prng::new(seed);
        for patch in shadow.bytes.chunks_exact_mut(256 << 10).step_by(2) {
            prng.fill(patch);
        }
        shadow
    }

    /// Writes the disk to a new file at `path`, with a hole for each aligned 64 KiB of zeros.
    pub fn write_image(&self, path: &Path) {
        let image = File::create(path).expect("an image can be created");
        image.set_len(self.bytes.len() as u64).expect("an image can be sized");
        for (at, piece) in self.bytes.chunks(64 << 10).enumerate() {
            if piece.iter().any(|&byte| byte != 0) {
                image.write_all_at(piece, (at * (64 << 10)) as u64).expect("an image can be written");
            }
        }
    }

    /// Number of sectors.
    pub fn sectors(&self) -> u64 {
        self.knowledge.len() as u64
    }

    /// Notes that a write of `bytes` at `first` has succeeded.
    pub fn write(&mut self, first: u64, bytes: &[u8]) {
        let count = (bytes.len() / SECTOR_BYTES) as u64;
        self.bytes[byte_range(first, count)].copy_from_slice(bytes);
        self.set_knowledge(first, count, Knowledge::Known);
    }

    /// Notes that a write-zeroes has succeeded.
    pub fn write_zeroes(&mut self, first: u64, count: u64) {
        self.bytes[byte_range(first, count)].fill(0);
        self.set_knowledge(first, count, Knowledge::Known);
    }

    /// Notes that a discard has succeeded, or has failed after a part of its range.
    pub fn discard(&mut self, first: u64, count: u64) {
        self.set_knowledge(first, count, Knowledge::Anything);
    }

    fn set_knowledge(&mut self, first: u64, count: u64, knowledge: Knowledge) {
        self.knowledge[first as usize..(first + count) as usize].fill(knowledge);
        if !self.alternatives.is_empty() {
            for sector in first..first + count {
                self.alternatives.remove(&sector);
            }
        }
    }

    /// Notes that a write of `bytes` at `first` has failed: each sector holds its old or its new data.
    pub fn doubt_write(&mut self, first: u64, bytes: &[u8]) {
        for (sector, new) in (first..).zip(bytes.as_chunks::<SECTOR_BYTES>().0) {
            let knowledge = &mut self.knowledge[sector as usize];
            if *knowledge != Knowledge::Anything {
                *knowledge = Knowledge::InDoubt;
                self.alternatives.entry(sector).or_default().push(*new);
            }
        }
    }

    /// Notes that a write-zeroes has failed.
    pub fn doubt_write_zeroes(&mut self, first: u64, count: u64) {
        self.doubt_write(first, &vec![0; count as usize * SECTOR_BYTES]);
    }

    /// Checks `found`, which was read at `first`, against the shadow.
    pub fn check(&self, first: u64, found: &[u8]) -> Result<(), Mismatch> {
        let count = (found.len() / SECTOR_BYTES) as u64;
        if found == &self.bytes[byte_range(first, count)] {
            return Ok(());
        }
        for (sector, found) in (first..).zip(found.as_chunks::<SECTOR_BYTES>().0) {
            let shadow = &self.bytes[byte_range(sector, 1)];
            let alternatives = self.alternatives.get(&sector).map_or(&[][..], Vec::as_slice);
            let possible = match self.knowledge[sector as usize] {
                Knowledge::Anything => true,
                Knowledge::Known => found == shadow,
                Knowledge::InDoubt => found == shadow || alternatives.contains(found),
            };
            if !possible {
                let start = |bytes: &[u8]| bytes[..16].try_into().expect("sixteen bytes");
                let candidates = 1 + alternatives.len();
                return Err(Mismatch { sector, found: start(found), expected: start(shadow), candidates });
            }
        }
        Ok(())
    }

    /// Checks a whole image file against the shadow.
    pub fn check_image(&self, path: &Path) -> Result<(), Mismatch> {
        let image = File::open(path).expect("the image exists");
        let len = image.metadata().expect("the image has a size").len();
        assert_eq!(len, self.bytes.len() as u64, "the image keeps its size");
        let mut piece = vec![0; 1 << 20];
        for first in (0..self.sectors()).step_by(piece.len() / SECTOR_BYTES) {
            let start = first as usize * SECTOR_BYTES;
            let len = piece.len().min(self.bytes.len() - start);
            image.read_exact_at(&mut piece[..len], start as u64).expect("the image can be read");
            self.check(first, &piece[..len])?;
        }
        Ok(())
    }
}
