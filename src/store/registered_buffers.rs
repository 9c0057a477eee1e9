//! Memory that the kernel keeps pinned for a ring (io_uring's registered buffers).
//!
//! For a transfer with O_DIRECT the kernel looks up and pins every page of its memory, marks it dirty and unpins it
//! again: a fifth of a worker's time on a fast device. The cache's memory is always the same, so a ring keeps it
//! pinned. It pins chunks, each at its first use: no transfer waits for the whole memory, and unused memory costs
//! nothing. A transfer whose memory lies in one chunk names the chunk's buffer; any other is submitted without one.
//!
//! Unless the daemon has CAP_IPC_LOCK, pinned memory counts against the user's limit (RLIMIT_MEMLOCK), once for each
//! ring. When the limit is reached, the registered chunks stay, and other memory is pinned for each transfer.
//!
//! A cache may use only a part of its memory, and the host frees the rest: pages of the rest that stayed pinned would
//! no longer be the cache's memory when the cache uses it again. So no chunk extends beyond the part in use.

use std::io;
use std::mem;
use std::ops::Range;

use io_uring::Submitter;

use super::Segment;

/// Smallest chunk: frames that are allocated together mostly lie in one, and pinning it takes about a millisecond.
const CHUNK_BYTES_MIN: usize = 32 << 20;
/// Replaces a buffer that is no longer registered.
const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
/// Most buffers that a ring can have (IORING_MAX_REG_BUFFERS).
const CHUNKS_MAX: usize = 1 << 14;

/// The chunks of one ring. Chunk `n` is the ring's buffer `n`.
///
/// => The default has no memory, and no buffer for any segment.
#[derive(Debug, Default)]
pub(super) struct RegisteredBuffers {
    /// Addresses of the memory.
    memory: Range<usize>,
    /// Number of its bytes in use.
    used: usize,
    /// A power of two; the last chunk may be shorter.
    chunk_bytes: usize,
    /// Number of registered bytes of each chunk; empty if the kernel lacks sparse buffer tables.
    registered: Vec<usize>,
    /// A registration has failed; no further one is tried.
    exhausted: bool,
}

impl RegisteredBuffers {
    /// A table for `memory` (addresses) with no chunk registered yet; the default if the kernel has no such tables
    /// (before Linux 5.19).
    ///
    /// => The memory stays mapped while the io_uring has operations in flight.
    pub fn new(ring: &Submitter, memory: Range<usize>) -> Self {
        let chunk_bytes = memory.len().div_ceil(CHUNKS_MAX).next_power_of_two().max(CHUNK_BYTES_MIN);
        let chunks = memory.len().div_ceil(chunk_bytes);
        match ring.register_buffers_sparse(u32::try_from(chunks).expect("no more than CHUNKS_MAX")) {
            Ok(()) => {
                let used = memory.len();
                Self { memory, used, chunk_bytes, registered: vec![0; chunks], exhausted: false }
            }
            Err(_) => Self::default(),
        }
    }

    /// The number of the buffer that holds all of the segments; registers it at its first use. `None` if they do not
    /// lie in one chunk, or if it cannot be registered.
    ///
    /// # Errors
    /// The kernel's, when a registration fails for the first time; there is no further attempt.
    pub fn buffer_of(&mut self, ring: &Submitter, segments: &[Segment]) -> io::Result<Option<u16>> {
        let Some(chunk) = segments.first().and_then(|segment| self.chunk_of(segment)) else {
            return Ok(None);
        };
        if segments.iter().any(|segment| self.chunk_of(segment) != Some(chunk)) {
            return Ok(None);
        }
        if self.registered[chunk] < self.bytes_of(chunk) {
            if self.exhausted {
                return Ok(None);
            }
            self.register(ring, chunk).inspect_err(|_| self.exhausted = true)?;
        }
        Ok(u16::try_from(chunk).ok())
    }

    /// The chunk that contains the whole segment.
    fn chunk_of(&self, segment: &Segment) -> Option<usize> {
        let first = segment.base.addr().checked_sub(self.memory.start)?;
        let last = first.checked_add(segment.len)?.checked_sub(1)?;
        let chunk = first.checked_div(self.chunk_bytes)?;
        (last < self.used && last / self.chunk_bytes == chunk).then_some(chunk)
    }

    /// Number of bytes of a chunk that are in use.
    fn bytes_of(&self, chunk: usize) -> usize {
        self.chunk_bytes.min(self.used.saturating_sub(chunk * self.chunk_bytes))
    }

    /// Only the memory before address `end` is used from now on: unregisters every chunk that extends beyond it.
    pub fn limit(&mut self, ring: &Submitter, end: usize) {
        self.used = end.saturating_sub(self.memory.start).min(self.memory.len());
        for chunk in 0..self.registered.len() {
            if self.registered[chunk] > self.bytes_of(chunk) {
                self.registered[chunk] = 0;
                // If this fails, the chunk stays pinned, but is not used before it is registered again.
                let _ = Self::update(ring, chunk, NOTHING);
            }
        }
    }

    /// Unregisters all buffers. No operation may be in flight.
    pub fn release(&mut self, ring: &Submitter) -> io::Result<()> {
        let any = !mem::take(self).registered.is_empty();
        if any { ring.unregister_buffers() } else { Ok(()) }
    }

    fn register(&mut self, ring: &Submitter, chunk: usize) -> io::Result<()> {
        let start = self.memory.start + chunk * self.chunk_bytes;
        let len = self.bytes_of(chunk);
        let buffer = libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(start), iov_len: len };
        if mem::take(&mut self.registered[chunk]) > 0 {
            // The chunk has become longer. Two registrations at a time would both count against the limit.
            let _ = Self::update(ring, chunk, NOTHING);
        }
        Self::update(ring, chunk, buffer)?;
        self.registered[chunk] = len;
        Ok(())
    }

    /// Replaces the buffer of a chunk. Operations in flight keep the old one until they end.
    fn update(ring: &Submitter, chunk: usize, buffer: libc::iovec) -> io::Result<()> {
        let number = u32::try_from(chunk).expect("no more than CHUNKS_MAX");
        // SAFETY: the memory is mapped, and the kernel's pin keeps its pages even if the mapping ends.
        unsafe { ring.register_buffers_update(number, &[buffer], None) }.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_uses_a_registered_buffer_only_within_one_chunk() {
        const MIB: usize = 1 << 20;
        let start = 7 * MIB;
        let fixed = RegisteredBuffers {
            memory: start..start + 100 * MIB,
            used: 100 * MIB,
            chunk_bytes: CHUNK_BYTES_MIN,
            registered: vec![0; 4],
            exhausted: false,
        };
        let chunk = |from: usize, len: usize| {
            fixed.chunk_of(&Segment { base: std::ptr::without_provenance_mut(start + from), len })
        };
        assert_eq!(chunk(0, 32 * MIB), Some(0));
        assert_eq!(chunk(0, 32 * MIB + 1), None);
        assert_eq!(chunk(32 * MIB - 512, 512), Some(0));
        assert_eq!(chunk(32 * MIB, 512), Some(1));
        assert_eq!(chunk(96 * MIB, 4 * MIB), Some(3), "the last chunk is shorter");
        assert_eq!(chunk(96 * MIB, 4 * MIB + 1), None);
        assert_eq!(chunk(96 * MIB, usize::MAX), None);
        assert_eq!(fixed.chunk_of(&Segment { base: std::ptr::without_provenance_mut(start - 1), len: 2 }), None);
        let part =
            RegisteredBuffers { used: 40 * MIB, registered: vec![0; 4], memory: start..start + 100 * MIB, ..fixed };
        let part_of = |from: usize, len: usize| {
            part.chunk_of(&Segment { base: std::ptr::without_provenance_mut(start + from), len })
        };
        assert_eq!((part_of(39 * MIB, MIB), part_of(39 * MIB, MIB + 1)), (Some(1), None), "the rest is not used");
        assert_eq!([0, 1, 2].map(|chunk| part.bytes_of(chunk)), [32 * MIB, 8 * MIB, 0]);
        let none = RegisteredBuffers::default();
        assert_eq!(none.chunk_of(&Segment { base: std::ptr::without_provenance_mut(start), len: 512 }), None);
    }
}
