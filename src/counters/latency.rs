//! Latency histograms with log-linear buckets: each power of two from 8 ns to 2^36 ns (68 s) is divided into 8 buckets
//! of equal width, and each time below 8 ns has its own bucket. So a time is known to one part in eight. (The
//! scheme of HdrHistogram, <http://hdrhistogram.org>, with 3 bits of precision.)

/// Buckets of each power of two.
const PER_OCTAVE: u64 = 1 << PRECISION_BITS;
const PRECISION_BITS: u32 = 3;
/// Times of 2^36 ns and more are counted in the last bucket.
const LIMIT_BITS: u32 = 36;
/// Buckets of a histogram: 272.
pub const BUCKETS: usize = ((LIMIT_BITS - PRECISION_BITS + 1) << PRECISION_BITS) as usize;

/// The bucket of a time.
pub fn bucket_of(ns: u64) -> usize {
    if ns < PER_OCTAVE {
        return usize::try_from(ns).expect("below 8");
    }
    let octave = ns.ilog2();
    if octave >= LIMIT_BITS {
        return BUCKETS - 1;
    }
    let shift = octave - PRECISION_BITS;
    // The bits below the highest one select the bucket within the octave.
    let within = (ns >> shift) & (PER_OCTAVE - 1);
    usize::try_from(u64::from(shift + 1) * PER_OCTAVE + within).expect("below BUCKETS")
}

/// The upper bound of a bucket's times in nanoseconds (exclusive); the lower bound is that of the previous bucket. The
/// last bucket also counts longer times.
pub fn bound_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < PER_OCTAVE {
        return bucket + 1;
    }
    let (octave, within) = (bucket / PER_OCTAVE - 1, bucket % PER_OCTAVE);
    (PER_OCTAVE + within + 1) << octave
}

/// A histogram as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Latencies {
    /// The number of times counted in each bucket.
    pub counts: [u64; BUCKETS],
    /// Their sum in nanoseconds.
    pub sum_ns: u64,
    /// The longest of them; 0 if there is none.
    pub max_ns: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], sum_ns: 0, max_ns: 0 }
    }
}

impl Latencies {
    /// The number of times counted.
    pub fn count(&self) -> u64 {
        // A disk process may have written any numbers: reading them must not overflow.
        self.counts.iter().fold(0, |sum: u64, count| sum.saturating_add(*count))
    }

    /// Adds the times of `other`.
    pub fn add(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, more)| *count = count.saturating_add(*more));
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// The times that were counted after `earlier` was read. The longest of them is known only to the bucket.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut counts = self.counts;
        counts.iter_mut().zip(&earlier.counts).for_each(|(count, before)| *count = count.saturating_sub(*before));
        let max_ns = match counts.iter().rposition(|count| *count > 0) {
            Some(last) => self.max_ns.min(bound_of(last)),
            None => 0,
        };
        Self { counts, sum_ns: self.sum_ns.saturating_sub(earlier.sum_ns), max_ns }
    }

    /// The time in nanoseconds that this share of the times (in thousandths) does not exceed: the bound of its bucket,
    /// or the longest time if that is shorter. `None` if nothing was counted.
    pub fn quantile(&self, thousandths: u64) -> Option<u64> {
        let count = self.count();
        let rank = count.saturating_mul(thousandths).div_ceil(1000).max(1);
        let mut below = 0u64;
        let bucket = self.counts.iter().position(|of_bucket| {
            below = below.saturating_add(*of_bucket);
            below >= rank
        })?;
        Some(bound_of(bucket).min(self.max_ns))
    }

    /// The mean in nanoseconds; `None` if nothing was counted.
    pub fn mean_ns(&self) -> Option<u64> {
        self.sum_ns.checked_div(self.count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_within_the_bounds_of_its_bucket() {
        let near_powers = (0..LIMIT_BITS).flat_map(|bits| [(1u64 << bits) - 1, 1 << bits, (1 << bits) + 1]);
        for ns in (0..5000).chain(near_powers).chain([(1 << LIMIT_BITS) - 1]) {
            let bucket = bucket_of(ns);
            assert!(ns < bound_of(bucket), "{ns} ns is in bucket {bucket}");
            assert!(bucket == 0 || ns >= bound_of(bucket - 1), "{ns} ns is in bucket {bucket}");
        }
        assert_eq!(bound_of(BUCKETS - 1), 1 << LIMIT_BITS);
        assert_eq!(bucket_of(1 << LIMIT_BITS), BUCKETS - 1);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_bucket_is_at_most_an_eighth_of_its_lower_bound_wide() {
        for bucket in 8..BUCKETS {
            let (from, to) = (bound_of(bucket - 1), bound_of(bucket));
            assert!((to - from) * 8 <= from, "bucket {bucket} goes from {from} to {to} ns");
        }
    }

    fn latencies(times: &[u64]) -> Latencies {
        let mut latencies = Latencies::default();
        for &ns in times {
            latencies.counts[bucket_of(ns)] += 1;
            latencies.sum_ns += ns;
            latencies.max_ns = latencies.max_ns.max(ns);
        }
        latencies
    }

    #[test]
    fn an_empty_histogram_has_neither_quantiles_nor_a_mean() {
        let nothing = Latencies::default();
        assert_eq!((nothing.quantile(500), nothing.mean_ns(), nothing.count()), (None, None, 0));
    }

    #[test]
    fn quantiles_are_exact_to_one_bucket() {
        let times: Vec<u64> = (1..=1000).map(|n| n * 1000).collect();
        let latencies = latencies(&times);
        for (thousandths, exact) in [(500, 500_000), (990, 990_000), (999, 999_000)] {
            let found = latencies.quantile(thousandths).unwrap();
            assert!((exact..=exact + exact / 8).contains(&found), "{found} ns for {exact} ns");
        }
        assert_eq!(latencies.quantile(1000), Some(1_000_000));
        assert_eq!(latencies.mean_ns(), Some(500_500));
    }

    #[test]
    fn a_difference_of_histograms_has_the_times_counted_between_them() {
        let (before, after) = (latencies(&[10, 5_000_000]), latencies(&[10, 5_000_000, 70, 70]));
        let between = after.since(&before);
        assert_eq!((between.count(), between.sum_ns), (2, 140));
        assert!((70..=79).contains(&between.max_ns), "the greatest was counted before: {} ns", between.max_ns);
        assert_eq!(after.since(&after), Latencies::default());
        let mut sum = before;
        sum.add(&between);
        assert_eq!((sum.counts, sum.sum_ns), (after.counts, after.sum_ns));
    }
}
