//! Offsets, one after the other.

use crate::job::{Actor, Pattern};
use crate::prng::Prng;

/// The places of an actor's requests.
#[derive(Clone, Debug)]
pub struct Offsets {
    start: u64,
    blocks: u64,
    block_bytes: u64,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Random,
    Streams { next: Vec<u64>, of_slot: Vec<usize>, depth: usize },
    Zipf(Zipf),
}

impl Offsets {
    pub fn new(actor: &Actor) -> Self {
        let block_bytes = actor.block_bytes as u64;
        let blocks = (actor.region.end - actor.region.start) / block_bytes;
        assert!(blocks > 0, "a region holds a block");
        let kind = match actor.pattern {
            Pattern::Random => Kind::Random,
            Pattern::Sequential { streams } => Kind::Streams {
                next: (0..streams).map(|stream| blocks * stream / streams).collect(),
                of_slot: (0..actor.depth).map(|slot| slot % streams as usize).collect(),
                depth: actor.depth,
            },
            Pattern::Zipf { theta } => Kind::Zipf(Zipf::new(blocks, theta)),
        };
        Self { start: actor.region.start, blocks, block_bytes, kind }
    }

    /// The place of the next request in this slot.
    pub fn next(&mut self, prng: &mut Prng, slot: usize) -> u64 {
        let block = match &mut self.kind {
            Kind::Random => prng.below(self.blocks),
            Kind::Streams { next, of_slot, depth } => {
                let stream = of_slot[slot];
                of_slot[slot] = (stream + *depth) % next.len();
                let block = next[stream];
                next[stream] = (block + 1) % self.blocks;
                block
            }
            Kind::Zipf(zipf) => zipf.next(prng),
        };
        self.start + block * self.block_bytes
    }
}

/// Zipf's law by the method of Gray et al., "Quickly generating billion-record synthetic databases" (SIGMOD 1994), with
/// the ranks scattered by a hash as YCSB does.
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
        let even = (prng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let scaled = even * self.zeta;
        let rank = if scaled < 1.0 {
            0
        } else if scaled < 1.0 + 0.5_f64.powf(self.theta) {
            1
        } else {
            let reach = self.eta.mul_add(even - 1.0, 1.0).powf(1.0 / (1.0 - self.theta));
            (self.blocks as f64 * reach) as u64
        };
        // The upper half of the product: its lower bits hardly depend on the rank's upper ones.
        (rank.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % self.blocks
    }
}
