//! The pseudo-random generator of all tests and benchmarks. A run repeats from the seed that it printed.
//!
//! The unit tests under src/ and the benchmarks include this file as a module of their own.

/// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled", 2016).
#[derive(Clone, Debug)]
pub struct Prng {
    state: u64,
    /// What the next numbers are to be, two bytes for each: their upper bits.
    script: std::vec::IntoIter<u8>,
}

impl Prng {
    /// A generator for `seed`; equal seeds give equal sequences.
    ///
    /// One step of splitmix64 (Steele, Lea, Flood 2014) mixes the seed: neighbouring seeds give unrelated sequences.
    pub fn new(seed: u64) -> Self {
        let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        state = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ state >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 31;
        // xorshift never leaves the state 0.
        Self { state: state.max(1), script: Vec::new().into_iter() }
    }

    /// A generator whose first numbers are those of `script`, two bytes each, for a fuzzer that decides what happens.
    pub fn scripted(script: &[u8]) -> Self {
        Self { script: Vec::from(script).into_iter(), ..Self::new(script.len() as u64) }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        if let (Some(high), Some(low)) = (self.script.next(), self.script.next()) {
            return u64::from(high) << 56 | u64::from(low) << 48;
        }
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number in `0..bound`; `bound` must not be zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "no number is below zero");
        // The high half of the product: the upper bits of xorshift64* are its best.
        let scaled = (u128::from(self.next_u64()) * u128::from(bound)) >> 64;
        u64::try_from(scaled).expect("the high half of a product is less than either factor")
    }

    /// A number in `low..=high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True with a probability of `percent` in a hundred.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of `choices`, each as likely as the others.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        let at = self.below(choices.len() as u64);
        choices[usize::try_from(at).expect("an index of a slice")]
    }

    /// Fills `bytes` with noise.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&self.next_u64().to_le_bytes()[..word.len()]);
        }
    }

    /// `len` bytes of noise.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes);
        bytes
    }
}

/// The seed of this run: `GENBLK_TEST_SEED` if it is set, otherwise `default`. Prints it, for the log of a failure.
pub fn seed(default: u64) -> u64 {
    let seed = match std::env::var("GENBLK_TEST_SEED") {
        Ok(text) => text.parse().expect("GENBLK_TEST_SEED is a decimal number"),
        Err(_) => default,
    };
    println!("GENBLK_TEST_SEED={seed}");
    seed
}
