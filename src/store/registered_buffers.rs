//! Memory that the kernel keeps pinned for a ring (io_uring's registered buffers).
//!
//! For a transfer with O_DIRECT the kernel looks up and pins every page of its memory, marks it dirty and lets it go again:
//! a fifth of a worker's time where a device is fast. The cache's memory is always the same, so a ring keeps it pinned, in
//! chunks, each when it is first used: nothing waits for the whole, and what is never used costs nothing. A transfer whose
//! memory lies in one chunk names the chunk's buffer; any other goes the usual way.
//!
//! Pinned memory counts against the user's limit (RLIMIT_MEMLOCK), once for each ring, where the daemon has no
//! CAP_IPC_LOCK: when the limit is reached, what is registered stays so, and the rest goes the usual way.

use std::io;
use std::ops::Range;

use io_uring::Submitter;
use log::info;

use super::Segment;

/// Bytes of a chunk at least: frames that are taken together most often lie in one, and to pin it takes a millisecond.
const CHUNK_BYTES_MIN: usize = 32 << 20;
/// Buffers that a ring can have (IORING_MAX_REG_BUFFERS).
const CHUNKS_MAX: usize = 1 << 14;

/// The chunks of one ring.
#[derive(Debug, Default)]
pub(super) struct RegisteredBuffers {
    memory: Range<usize>,
    chunk_bytes: usize,
    /// Whether each chunk is registered; empty where the kernel has refused.
    registered: Vec<bool>,
    /// The kernel takes no more.
    full: bool,
}

impl RegisteredBuffers {
    /// None is registered yet. `memory` (addresses) stays mapped as long as the ring has operations in flight.
    pub fn new(ring: &Submitter, memory: Range<usize>) -> Self {
        let chunk_bytes = memory.len().div_ceil(CHUNKS_MAX).next_power_of_two().max(CHUNK_BYTES_MIN);
        let chunks = memory.len().div_ceil(chunk_bytes);
        match ring.register_buffers_sparse(u32::try_from(chunks).expect("no more than CHUNKS_MAX")) {
            Ok(()) => Self { memory, chunk_bytes, registered: vec![false; chunks], full: false },
            // Linux before 5.19.
            Err(_) => Self::default(),
        }
    }

    /// The number of the buffer that holds all of the segments, if there is one or can be.
    pub fn buffer_of(&mut self, ring: &Submitter, segments: &[Segment]) -> Option<u16> {
        let chunk = self.chunk_of(segments.first()?)?;
        let together = segments.iter().all(|segment| self.chunk_of(segment) == Some(chunk));
        let registered = together && (self.registered[chunk] || self.register(ring, chunk));
        u16::try_from(chunk).ok().filter(|_| registered)
    }

    /// The chunk that holds all of the segment.
    fn chunk_of(&self, segment: &Segment) -> Option<usize> {
        let first = segment.base.addr().checked_sub(self.memory.start)?;
        let last = first.checked_add(segment.len)?.checked_sub(1)?;
        let chunk = first.checked_div(self.chunk_bytes)?;
        (last < self.memory.len() && last / self.chunk_bytes == chunk).then_some(chunk)
    }

    /// Lets go of all of it; no operation is in flight.
    pub fn release(&mut self, ring: &Submitter) -> io::Result<()> {
        let any = !std::mem::take(self).registered.is_empty();
        if any { ring.unregister_buffers() } else { Ok(()) }
    }

    fn register(&mut self, ring: &Submitter, chunk: usize) -> bool {
        if self.full {
            return false;
        }
        let start = self.memory.start + chunk * self.chunk_bytes;
        let len = self.chunk_bytes.min(self.memory.end - start);
        let buffer = libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(start), iov_len: len };
        let place = u32::try_from(chunk).expect("no more than CHUNKS_MAX");
        // SAFETY: the memory is mapped, and the kernel's pin keeps its pages whatever becomes of the mapping.
        match unsafe { ring.register_buffers_update(place, &[buffer], None) } {
            Ok(()) => self.registered[chunk] = true,
            Err(error) => {
                info!("io_uring keeps no more of the cache's memory pinned ({error}): transfers pin it each time");
                self.full = true;
            }
        }
        self.registered[chunk]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_holds_what_lies_wholly_in_it() {
        const MIB: usize = 1 << 20;
        let start = 7 * MIB;
        let fixed = RegisteredBuffers {
            memory: start..start + 100 * MIB,
            chunk_bytes: CHUNK_BYTES_MIN,
            registered: vec![false; 4],
            full: false,
        };
        let chunk = |from: usize, len: usize| {
            fixed.chunk_of(&Segment { base: std::ptr::without_provenance_mut(start + from), len })
        };
        assert_eq!(chunk(0, 32 * MIB), Some(0));
        assert_eq!(chunk(0, 32 * MIB + 1), None);
        assert_eq!(chunk(32 * MIB - 512, 512), Some(0));
        assert_eq!(chunk(32 * MIB, 512), Some(1));
        assert_eq!(chunk(96 * MIB, 4 * MIB), Some(3), "the last is short");
        assert_eq!(chunk(96 * MIB, 4 * MIB + 1), None);
        assert_eq!(chunk(96 * MIB, usize::MAX), None);
        assert_eq!(fixed.chunk_of(&Segment { base: std::ptr::without_provenance_mut(start - 1), len: 2 }), None);
        let none = RegisteredBuffers::default();
        assert_eq!(none.chunk_of(&Segment { base: std::ptr::without_provenance_mut(start), len: 512 }), None);
    }
}
