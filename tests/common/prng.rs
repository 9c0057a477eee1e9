//! A small deterministic random number generator, so that a failing run can be repeated from the seed it printed.

/// Xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled").
#[derive(Clone, Debug)]
pub struct Prng {
    state: u64,
}

impl Prng {
    /// A generator for `seed`; equal seeds give equal sequences.
    pub fn new(seed: u64) -> Self {
        Self { state: (seed ^ 0x9e37_79b9_7f4a_7c15).max(1) }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number in `0..bound`; `bound` must not be zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing is below zero");
        self.next_u64() % bound
    }

    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Fills `bytes` (a multiple of eight of them) with noise.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        let (words, rest) = bytes.as_chunks_mut::<8>();
        assert!(rest.is_empty(), "noise comes in words");
        for word in words {
            *word = self.next_u64().to_le_bytes();
        }
    }

    /// `len` bytes of noise.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes);
        bytes
    }
}

/// The seed of this run: `GENBLK_TEST_SEED` if it is set, otherwise `default`. Says so, for the log of a failure.
pub fn seed(default: u64) -> u64 {
    let seed = match std::env::var("GENBLK_TEST_SEED") {
        Ok(text) => text.parse().expect("GENBLK_TEST_SEED is a decimal number"),
        Err(_) => default,
    };
    println!("GENBLK_TEST_SEED={seed}");
    seed
}
