//! Traces of page accesses, and the distributions that generators draw from.

use crate::prng::Prng;

/// An access to one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The number of the page. Pages are numbered from 0, with few gaps.
    pub page: u32,
    /// Whether it is a write. A written page is not read in, but occupies the cache anyway.
    pub write: bool,
}

/// The size of a workload.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Pages of the image.
    pub pages: u32,
    /// Accesses, approximately.
    pub accesses: usize,
}

/// A trace while its generator runs.
#[derive(Debug)]
pub struct Trace {
    pub scale: Scale,
    pub prng: Prng,
    accesses: Vec<Access>,
}

impl Trace {
    pub fn new(scale: Scale, seed: u64) -> Self {
        Self { scale, prng: Prng::new(seed), accesses: Vec::with_capacity(scale.accesses + 64) }
    }

    /// The accesses, cut to the scale.
    pub fn into_accesses(mut self) -> Vec<Access> {
        self.accesses.truncate(self.scale.accesses);
        self.accesses
    }

    /// Whether the trace has reached its length.
    pub fn is_full(&self) -> bool {
        self.len() >= self.scale.accesses
    }

    pub fn len(&self) -> usize {
        self.accesses.len()
    }

    /// The page that was accessed `ago` accesses ago; 1 is the last one.
    pub fn page_before(&self, ago: usize) -> u32 {
        self.accesses[self.accesses.len() - ago].page
    }

    pub fn read(&mut self, page: u32) {
        self.accesses.push(Access { page, write: false });
    }

    pub fn write(&mut self, page: u32) {
        self.accesses.push(Access { page, write: true });
    }

    /// A uniform number below `bound`.
    pub fn below(&mut self, bound: u32) -> u32 {
        self.prng.below(u64::from(bound)) as u32
    }

    /// A uniform number in 0..1.
    pub fn fraction(&mut self) -> f64 {
        (self.prng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A log-uniform number from `low` to `high`: every order of magnitude is equally likely.
    pub fn log_uniform(&mut self, low: f64, high: f64) -> u32 {
        (low * (high / low).powf(self.fraction())) as u32
    }

    /// This share (in thousandths) of the image, in pages.
    pub fn share(&self, permille: u32) -> u32 {
        (u64::from(self.scale.pages) * u64::from(permille) / 1000).max(1) as u32
    }
}

/// A Zipf distribution over the numbers below `count`: the probability of r is proportional to 1 / (r + 1)^exponent.
#[derive(Debug)]
pub struct Zipf {
    cumulative: Vec<f64>,
}

impl Zipf {
    pub fn new(count: u32, exponent: f64) -> Self {
        let mut sum = 0.0;
        let next = |rank: u32| {
            sum += f64::from(rank + 1).powf(-exponent);
            sum
        };
        Self { cumulative: (0..count).map(next).collect() }
    }

    pub fn draw(&self, trace: &mut Trace) -> u32 {
        let total = self.cumulative.last().expect("a distribution is not empty");
        let wanted = trace.fraction() * total;
        let rank = self.cumulative.partition_point(|&sum| sum < wanted);
        rank.min(self.cumulative.len() - 1) as u32
    }
}
