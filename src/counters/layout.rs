//! The position of each counter in a worker's block, in words.

use super::latency::BUCKETS;
use super::sizes::SIZE_BUCKETS;
use super::{Class, Operation};
use crate::units::OpClass;

/// A histogram: its buckets, then the sum and the maximum of the values in nanoseconds.
pub const HISTOGRAM_WORDS: usize = BUCKETS + 2;
/// The totals of an operation: the number that have begun, the number that failed, and the bytes that the successful
/// ones moved.
pub const TOTALS_WORDS: usize = 3;

pub const REQUESTS: usize = 0;
pub const OPERATIONS: usize = REQUESTS + Class::ALL.len() * HISTOGRAM_WORDS;
pub const STORE: usize = OPERATIONS + Operation::ALL.len() * TOTALS_WORDS;
pub const STORE_OPERATIONS: usize = STORE + OpClass::ALL.len() * HISTOGRAM_WORDS;
pub const ACTIVITY: usize = STORE_OPERATIONS + OpClass::ALL.len() * TOTALS_WORDS;
pub const ACTIVITY_WORDS: usize = 9;
pub const REQUEST_SIZES: usize = ACTIVITY + ACTIVITY_WORDS;
pub const STORE_SIZES: usize = REQUEST_SIZES + Operation::ALL.len() * SIZE_BUCKETS;
/// A worker's block, in whole cache lines of 8 words: no line has two writers.
pub const BLOCK_WORDS: usize = (STORE_SIZES + OpClass::ALL.len() * SIZE_BUCKETS).next_multiple_of(8);
