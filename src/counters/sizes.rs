//! Histograms of sizes, by powers of two: from one sector to 16 MiB and more.

use crate::units::SECTOR_BYTES;

/// Buckets of a histogram.
pub const SIZE_BUCKETS: usize = 16;

/// The number of sizes counted in each bucket.
pub type Sizes = [u64; SIZE_BUCKETS];

/// The bucket of a size. Sizes below a sector are counted in the first, and those of 16 MiB and more in the last one.
pub fn size_bucket_of(bytes: u64) -> usize {
    let octave = (bytes / SECTOR_BYTES).max(1).ilog2() as usize;
    octave.min(SIZE_BUCKETS - 1)
}

/// The smallest size of a bucket in bytes; the first bucket also counts smaller ones.
pub fn least_size_of(bucket: usize) -> u64 {
    SECTOR_BYTES << bucket
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_within_the_bounds_of_its_bucket() {
        for bucket in 0..SIZE_BUCKETS {
            let least = least_size_of(bucket);
            assert_eq!([least, least + 1, least * 2 - 1].map(size_bucket_of), [bucket; 3]);
        }
        assert_eq!([0, 1, 511].map(size_bucket_of), [0; 3]);
        assert_eq!([1 << 25, u64::MAX].map(size_bucket_of), [SIZE_BUCKETS - 1; 2]);
    }
}
