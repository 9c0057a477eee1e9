//! Generators of request offsets.

use crate::job::{Client, Pattern};
use crate::prng::Prng;

/// The offsets of a client's requests.
#[derive(Clone, Debug)]
pub struct Offsets {
    start: u64,
    blocks: u64,
    block_bytes: u64,
    state: Generator,
}

#[derive(Clone, Debug)]
enum Generator {
    Random,
    Streams { next: Vec<u64>, of_slot: Vec<usize>, depth: usize },
    Zipf(Zipf),
}

impl Offsets {
    pub fn new(client: &Client) -> Self {
        let block_bytes = client.block_bytes as u64;
        let blocks = (client.region.end - client.region.start) / block_bytes;
        assert!(blocks > 0, "the region holds at least one block");
        let state = match client.pattern {
            Pattern::Random => Generator::Random,
            Pattern::Sequential { streams } => Generator::Streams {
                next: (0..streams).map(|stream| blocks * stream / streams).collect(),
                of_slot: (0..client.depth).map(|slot| slot % streams as usize).collect(),
                depth: client.depth,
            },
            Pattern::Zipf { theta } => Generator::Zipf(Zipf::new(blocks, theta)),
        };
        Self { start: client.region.start, blocks, block_bytes, state }
    }

    /// The offset of the next request in this slot.
    pub fn next(&mut self, prng: &mut Prng, slot: usize) -> u64 {
        let block = match &mut self.state {
            Generator::Random => prng.below(self.blocks),
            Generator::Streams { next, of_slot, depth } => {
                let stream = of_slot[slot];
                of_slot[slot] = (stream + *depth) % next.len();
                let block = next[stream];
                next[stream] = (block + 1) % self.blocks;
                block
            }
            Generator::Zipf(zipf) => zipf.next(prng),
        };
        self.start + block * self.block_bytes
    }
}

/// A Zipf distribution after Gray et al., "Quickly generating billion-record synthetic databases" (SIGMOD 1994). A hash
/// scatters the ranks, as in YCSB.
#[derive(Clone, Debug)]
struct Zipf {
    blocks: u64,
    theta: f64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    fn new(blocks: u64, theta: f64) -> Self {
        let zeta = |count: u64| (1..=count).map(|rank| (rank as f64).powf(-theta)).sum::<f64>();
        let all = zeta(blocks);
        let eta = (1.0 - (2.0 / blocks as f64).powf(1.0 - theta)) / (1.0 - zeta(2) / all);
        Self { blocks, theta, zeta: all, eta }
    }

    fn next(&self, prng: &mut Prng) -> u64 {
        let uniform = (prng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let scaled = uniform * self.zeta;
        let rank = if scaled < 1.0 {
            0
        } else if scaled < 1.0 + 0.5_f64.powf(self.theta) {
            1
        } else {
            let share = self.eta.mul_add(uniform - 1.0, 1.0).powf(1.0 / (1.0 - self.theta));
            (self.blocks as f64 * share) as u64
        };
        // Use the upper bits of the product: its lower bits hardly depend on the upper bits of the rank.
        (rank.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % self.blocks
    }
}
