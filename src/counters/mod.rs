//! Counters of a device's activity: requests with their latencies, operations on the image, and how the workers spend
//! their time.
//!
//! The counters are words of shared memory, so another process can read them at any time. Each worker thread has its
//! own block and is its only writer: counting is a load and a store, never a locked instruction. A reader gets each
//! word whole, but the words of a block at slightly different times.
//!
//! Read [`latency`] first (the buckets of a histogram; [`sizes`] has those of sizes), then [`worker`] (the counters of
//! a worker), then [`snapshot`] (reading them).

pub mod latency;
mod layout;
pub mod sizes;
pub mod snapshot;
pub mod worker;

/// A kind of request of the guest (virtio 1.2, section 5.2.6) that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes,
}

impl Operation {
    /// All of them, in the order of the counters.
    pub const ALL: [Self; 5] = [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes];
}

/// Whether a request was completed from memory alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It was completed in the turn that took it from its ring, without waiting.
    Memory,
    /// It waited: for the image, for space in the cache, or because of the limit on dirty pages.
    Waited,
}

/// Classes of requests, each with its own histogram: reads and writes by how they were served, and the other
/// operations.
///
/// => The number of requests *is* the sum of the histograms' buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// The operation.
    pub operation: Operation,
    /// How it was served; [`Served::Waited`] for all but reads and writes.
    pub served: Served,
}

impl Class {
    /// All of them, in the order of the counters.
    pub const ALL: [Self; 7] = [
        Self { operation: Operation::Read, served: Served::Memory },
        Self { operation: Operation::Read, served: Served::Waited },
        Self { operation: Operation::Write, served: Served::Memory },
        Self { operation: Operation::Write, served: Served::Waited },
        Self { operation: Operation::Flush, served: Served::Waited },
        Self { operation: Operation::Discard, served: Served::Waited },
        Self { operation: Operation::WriteZeroes, served: Served::Waited },
    ];

    /// The class of a request. Each operation other than reads and writes has one class.
    pub const fn new(operation: Operation, served: Served) -> Self {
        match operation {
            Operation::Read | Operation::Write => Self { operation, served },
            _ => Self { operation, served: Served::Waited },
        }
    }

    /// Its place in [`Class::ALL`].
    pub const fn index(self) -> usize {
        match (self.operation, self.served) {
            (Operation::Read, Served::Memory) => 0,
            (Operation::Read, Served::Waited) => 1,
            (Operation::Write, Served::Memory) => 2,
            (Operation::Write, Served::Waited) => 3,
            (Operation::Flush, _) => 4,
            (Operation::Discard, _) => 5,
            (Operation::WriteZeroes, _) => 6,
        }
    }
}

/// Size of the counters of a worker, in words of 64 bits.
pub const BLOCK_WORDS: usize = layout::BLOCK_WORDS;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_has_its_own_index() {
        for (index, class) in Class::ALL.into_iter().enumerate() {
            assert_eq!(class.index(), index);
            assert_eq!(Class::new(class.operation, class.served), class);
        }
        let flush = Class::new(Operation::Flush, Served::Memory);
        assert_eq!(flush, Class::ALL[4], "a FLUSH has one histogram, however it was served");
    }
}
