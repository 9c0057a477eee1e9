//! \[6\] The backing image: what any store (raw file, block device, later NBD and RBD) promises the cache.
//!
//! Contract:
//! => No method blocks. What must block (open, close, hole maps) runs on a helper thread and pokes the wake fd.
//! => `submit` owns the request and the memory its segments name until the event with its tag; the bytes of a write do
//!    not change meanwhile.
//! => Ranges, alignment and segment sums are checked by [`Limits::admissible`] before any store sees them.
//! => A finished `Write` is readable, not durable. `Sync` covers what was reaped before it was submitted.
//! => A finished `Zero` reads as zeros. After `Discard` nothing is known of the range.
//! => Short transfers are continued, never taken for success. Completion order is free.
//! => `depth` is the only back-pressure.
//! => Dropping a store first finishes what was accepted (for a bounded time): the kernel may still write to its memory.
//!
//! Read [`file`] first (what an image is), then `uring` (the normal engine), `threads` (where io_uring is forbidden)
//! and `blocking` (each operation as plain system calls, which both engines lean on).

mod blocking;
pub mod faulty;
pub mod file;
mod lock;
mod pool;
mod registered_buffers;
#[cfg(test)]
mod tests;
mod threads;
mod uring;

use std::ops::Range;
use std::os::fd::RawFd;

pub use crate::sys::file::Segment;
use crate::units::{Fault, OpKind, SECTOR_BYTES};

/// One operation; owns the memory of its segments until its event is reaped.
#[derive(Debug)]
pub struct IoRequest {
    /// The caller's name for the operation; comes back in its event.
    pub tag: u64,
    /// What to do.
    pub op: OpKind,
    /// First byte on the image; 0 for `Sync`.
    pub offset: u64,
    /// Length in bytes; 0 for `Sync`.
    pub len: u64,
    /// Memory, in order; empty but for `Read` and `Write`.
    pub segments: Vec<Segment>,
}

/// Data or hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// May hold anything.
    Data,
    /// Reads as zeros without I/O.
    Hole,
}

/// A run of the image of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len: u64,
    /// Data or hole.
    pub kind: ExtentKind,
}

/// What a store reports.
#[derive(Debug)]
pub enum Event {
    /// The operation with this tag is done, in full.
    Done {
        /// From the request.
        tag: u64,
    },
    /// A `Map` is done; the extents cover its range exactly, in order.
    Mapped {
        /// From the request.
        tag: u64,
        /// Runs of data and holes.
        extents: Vec<Extent>,
    },
    /// The operation failed; of a read's memory and a write's range nothing is known.
    Failed {
        /// From the request.
        tag: u64,
        /// Why.
        fault: Fault,
        /// The system's error number, for the log; 0 where there is none.
        errno: i32,
    },
}

/// A refused request comes back to the caller.
#[derive(Debug)]
pub enum Refused {
    /// `depth` operations are in flight: try again after the next event.
    Full(IoRequest),
    /// The request breaks the limits.
    Invalid(IoRequest),
}

/// What a store can do; fixed while it is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the image in bytes: a multiple of 512.
    pub size_bytes: u64,
    /// Offsets and lengths of reads and writes are multiples of this (512 to 4096).
    pub block_bytes: u32,
    /// Segment addresses and lengths are multiples of this.
    pub memory_align: u32,
    /// Largest transfer of one request in bytes.
    pub io_max_bytes: u32,
    /// Most segments of one request.
    pub segments_max: u16,
    /// Most operations in flight.
    pub depth: u16,
    /// Granularity below which `Discard` and `Zero { unmap }` free nothing, in bytes; 0: unknown.
    pub discard_granularity: u32,
    /// Physical block size of the image's device in bytes, where known, else `block_bytes`.
    pub physical_block_bytes: u32,
    /// The device's preferred I/O size in bytes; 0: unknown.
    pub optimal_io_bytes: u32,
    /// Writes, Zero, Discard and Allocate are allowed.
    pub writable: bool,
    /// `Zero` works (else it fails with `Unsupported`).
    pub can_zero: bool,
    /// `Discard` works.
    pub can_discard: bool,
    /// `Map` can tell of holes: not of a device's, nor on a file system that does not know them.
    pub can_map: bool,
    /// The image had holes when it was opened.
    pub sparse: bool,
}

impl Limits {
    /// The one range check in front of every store.
    ///
    /// => A `Read` or `Write` is block-aligned, not empty, within the image and the largest transfer, and its segments
    ///    are aligned and sum to its length. The image's last block may end before a block boundary: then the transfer
    ///    ends there too.
    pub fn admissible(&self, request: &IoRequest) -> bool {
        let Some(end) = request.offset.checked_add(request.len) else {
            return false;
        };
        if end > self.size_bytes {
            return false;
        }
        let block = u64::from(self.block_bytes);
        match request.op {
            OpKind::Sync => request.len == 0 && request.segments.is_empty(),
            OpKind::Read | OpKind::Write => {
                let sum: u64 = request.segments.iter().map(|s| s.len as u64).sum();
                let aligned = |n: u64| n.is_multiple_of(block);
                let memory_aligned = |n: usize| n.is_multiple_of(self.memory_align as usize);
                (request.op == OpKind::Read || self.writable)
                    && request.len > 0
                    && request.len <= u64::from(self.io_max_bytes)
                    && aligned(request.offset)
                    && (aligned(end) || end == self.size_bytes)
                    && sum == request.len
                    && request.segments.len() <= usize::from(self.segments_max)
                    && request.segments.iter().all(|s| memory_aligned(s.base.addr()))
                    && (request.segments.iter().all(|s| memory_aligned(s.len)) || end == self.size_bytes)
            }
            OpKind::Map => request.len > 0 && request.segments.is_empty(),
            OpKind::Zero { .. } | OpKind::Discard | OpKind::Allocate => {
                self.writable
                    && request.len > 0
                    && request.offset.is_multiple_of(SECTOR_BYTES)
                    && request.len.is_multiple_of(SECTOR_BYTES)
                    && request.segments.is_empty()
            }
        }
    }
}

/// An open image as one worker sees it. Every worker has its own; all share the file.
pub trait StoreQueue: Send {
    /// What the store can do.
    fn limits(&self) -> &Limits;
    /// A level-triggered file descriptor, readable while events wait; polled by the worker, never read by it.
    fn wake_fd(&self) -> RawFd;
    /// Where the memory of most transfers will lie, addresses that stay mapped as long as operations are in flight: a store may
    /// ready itself for it.
    fn hint_memory(&mut self, _memory: Range<usize>) {}
    /// Queues a request; it starts at the next [`StoreQueue::kick`] at the latest.
    ///
    /// # Errors
    /// [`Refused`] gives the request back.
    fn submit(&mut self, request: IoRequest) -> Result<(), Refused>;
    /// Starts what was queued. Once per turn, before sleeping.
    fn kick(&mut self);
    /// Appends the events that wait and clears the wake fd; finding nothing is normal.
    fn reap(&mut self, events: &mut Vec<Event>);
    /// Whether [`StoreQueue::reap`] could find something, told without a system call, for a worker that looks all the time.
    ///
    /// => A wake fd that is readable is reason enough to reap, whatever this says.
    fn may_have_events(&mut self) -> bool {
        self.in_flight() > 0
    }
    /// Operations submitted and not yet reaped.
    fn in_flight(&self) -> usize;
}

/// What a store belongs to: an image that is open and locked once, with one [`StoreQueue`] per worker on it.
pub trait Backing: Send + Sync + std::fmt::Debug {
    /// What the image can do; the same for each of its stores.
    fn limits(&self) -> &Limits;

    /// A store for one more worker.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::System`] when the host refuses a ring, a thread or a descriptor.
    fn attach(&self) -> crate::error::Result<Box<dyn StoreQueue>>;
}
