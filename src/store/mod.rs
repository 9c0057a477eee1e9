//! \[6\] The image as the cache uses it: the contract of every store (raw file, block device, NBD export).
//!
//! Contract of a [`StoreQueue`]:
//!
//! - No method blocks, except dropping the queue. Operations that must block (hole maps, device ioctls) run on a
//!   helper thread, which notifies the wake fd.
//! - `submit` takes the request and the memory that its segments name, until the event with its tag is reaped; the
//!   bytes of a write do not change meanwhile.
//! - [`Limits::admissible`] checks range, alignment and segment sums before any store sees a request.
//! - A completed `Write` is readable, not durable. A `Sync` covers the operations whose events were reaped before it
//!   was submitted.
//! - A completed `Zero` reads as zeros. After a `Discard` the contents of the range are undefined.
//! - A store continues short transfers and never reports one as success. Operations complete in any order.
//! - `depth` is the only back-pressure.
//! - Dropping a queue first completes the operations that it accepted (for a bounded time): until then the kernel may
//!   write to their memory.
//!
//! Read [`mod@file`] first (an image with its queues), then `uring` (the normal engine), `threads` (for hosts that do
//! not allow io_uring), and `blocking` (every operation as plain system calls, which both engines use).
//! `restricted_ring` makes the rings. `image`, `probe`, `history`, `host_record`, `lock` and `raw_record` open an
//! image. [`nbd`] has the images on NBD servers. [`named`] is the interface of an image for recovery, and [`open()`]
//! opens an image in any store. A file of this module imports only files further down: open; nbd; file; uring, threads;
//! restricted_ring; pool; pool_queue; blocking; image; raw_record; named; handed; host_record; format, probe, history,
//! lock. [`faulty`] wraps any image and makes its operations fail.

mod blocking;
pub mod faulty;
pub mod file;
pub mod format;
mod handed;
mod history;
mod host_record;
mod image;
mod lock;
pub mod named;
pub mod nbd;
mod open;
mod open_checks;
mod options;
mod pool;
mod pool_queue;
mod probe;
mod raw_record;
mod registered_buffers;
mod restricted_ring;
#[cfg(test)]
mod tests;
mod threads;
mod uring;
mod wake;

pub use open::{is_remote, open, received};

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::sys;
pub use crate::sys::file::Segment;
use crate::tenure::token::ChangeToken;
use crate::units::{
    ExtentKind, Fault, ImageHoles, LiveSize, OpKind, PAGE_BYTES, SECTOR_BYTES, SectorSpan, Urgency, counted, low_u32,
};

/// How long a queue waits for its operations when it is dropped without [`StoreQueue::drain`]: Linux's timeout of a
/// SCSI disk's command.
pub const DRAIN_MAX: Duration = Duration::from_secs(30);

/// One operation. It owns the memory of its segments until its event is reaped.
#[derive(Debug)]
pub struct IoRequest {
    /// The caller's ID of the operation, which its event carries.
    pub tag: u64,
    /// The kind of the operation.
    pub op: OpKind,
    /// First byte of the range on the image; 0 for `Sync`.
    pub offset: u64,
    /// Length of the range in bytes; 0 for `Sync`.
    pub len: u64,
    /// Whether a request waits for the operation. A store that cannot start all operations immediately starts these
    /// first.
    pub urgency: Urgency,
    /// Memory, in order; empty except for `Read` and `Write`.
    pub segments: Vec<Segment>,
}

/// A run of bytes of the image that are of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len: u64,
    /// Data or hole.
    pub kind: ExtentKind,
}

/// The outcome of an operation, as reported by a queue.
#[derive(Debug)]
pub enum Event {
    /// The operation is complete.
    Done {
        /// From the request.
        tag: u64,
    },
    /// A `Map` is complete; the extents cover its range, in order. The last one may extend beyond the range, as far as
    /// the store knows it, but not beyond the image.
    Mapped {
        /// From the request.
        tag: u64,
        /// Runs of data and holes; neighbours differ in kind.
        extents: Vec<Extent>,
    },
    /// The operation failed. The contents of a read's memory and of a write's range are undefined.
    Failed {
        /// From the request.
        tag: u64,
        /// The cause.
        fault: Fault,
        /// The system's error number, for the log; 0 if there is none.
        errno: i32,
    },
}

/// A request that a queue did not accept, returned to the caller.
#[derive(Debug)]
pub enum Refused {
    /// `depth` operations are in flight: submit again after the next event.
    Full(IoRequest),
    /// The request violates the limits.
    Invalid(IoRequest),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full(_) => "the queue is full",
            Self::Invalid(_) => "the request violates the image's limits",
        })
    }
}

impl std::error::Error for Refused {}

/// The properties and capabilities of an image; fixed while it is open, except for its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Size of the image in bytes: a multiple of 512. It can change while the image is open.
    pub size_bytes: LiveSize,
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
    /// Smallest unit that `Discard` and `Zero` with [`Unmap::Allowed`](crate::units::Unmap) free, in bytes; 0 if
    /// unknown.
    pub discard_granularity: u32,
    /// Most bytes that the image's device discards in one piece; the kernel splits a larger `Discard`. `u64::MAX` for a
    /// file.
    pub discard_max_bytes: u64,
    /// Physical block size of the image's device in bytes; `block_bytes` if unknown.
    pub physical_block_bytes: u32,
    /// The device's preferred I/O size in bytes; 0 if unknown.
    pub optimal_io_bytes: u32,
    /// `Write`, `Zero`, `Discard` and `Allocate` are allowed.
    pub writable: bool,
    /// `Zero` works (otherwise it fails with `Unsupported`).
    pub can_zero: bool,
    /// `Discard` works.
    pub can_discard: bool,
    /// Holes at the time of opening. `Map` reports none on a device, nor on a file system without SEEK_HOLE.
    pub holes: ImageHoles,
}

impl Limits {
    /// The alignment of the offsets, lengths and segments of the cache's transfers, in bytes: `block_bytes`, or
    /// `memory_align` if that is larger. The cache places each sector at the same offset in a frame as in its page, so
    /// a transfer is aligned in memory only if it is aligned on the image.
    pub fn transfer_block_bytes(&self) -> u32 {
        self.block_bytes.max(self.memory_align)
    }

    /// Checks that a cache can observe these limits, given the sizes of its pages and operations.
    ///
    /// # Errors
    /// The limit that it cannot observe.
    pub fn check(&self) -> Result<(), String> {
        let page = low_u32(PAGE_BYTES);
        let size = self.size_bytes.get();
        let obstacle = if size == 0 || !size.is_multiple_of(SECTOR_BYTES) {
            format!("a size of {size} bytes is not a multiple of {SECTOR_BYTES}")
        } else if !self.block_bytes.is_power_of_two() || u64::from(self.block_bytes) < SECTOR_BYTES {
            format!("blocks of {} bytes are not supported", self.block_bytes)
        } else if !self.memory_align.is_power_of_two() || self.transfer_block_bytes() > page {
            format!("transfers aligned to {} bytes are not supported", self.transfer_block_bytes())
        } else if self.io_max_bytes < page || self.segments_max == 0 || self.depth == 0 {
            format!(
                "{} at a time of {} bytes in {} is less than a page needs",
                counted(self.depth.into(), "operation"),
                self.io_max_bytes,
                counted(self.segments_max.into(), "segment"),
            )
        } else {
            return Ok(());
        };
        Err(obstacle)
    }

    /// Whether the request is valid for this image. Every queue checks it in `submit`.
    ///
    /// => An admissible `Read` or `Write` is block-aligned, not empty, within the image and no longer than the largest
    ///    transfer; its segments are aligned and sum to its length. If the image ends within a block, a transfer may
    ///    end there too.
    pub fn admissible(&self, request: &IoRequest) -> bool {
        let Some(end) = request.offset.checked_add(request.len) else {
            return false;
        };
        let size = self.size_bytes.get();
        if end > size {
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
                    && (aligned(end) || end == size)
                    && sum == request.len
                    && request.segments.len() <= usize::from(self.segments_max)
                    && request.segments.iter().all(|s| memory_aligned(s.base.addr()))
                    && (request.segments.iter().all(|s| memory_aligned(s.len)) || end == size)
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

/// One worker's queue of operations on an open image. Every worker has its own; all share the file.
pub trait StoreQueue: Send {
    /// The properties and capabilities of the image.
    fn limits(&self) -> &Limits;
    /// A level-triggered file descriptor, readable while events wait. The worker polls it and never reads from it.
    fn wake_fd(&self) -> RawFd;
    /// Announces the memory (addresses) that most transfers will use; it stays mapped while operations are in flight. A
    /// store may prepare it, for example by pinning it.
    fn hint_memory(&mut self, _memory: Range<usize>) {}
    /// Only the part of that memory before address `end` is used from now on. When this returns, the store has released
    /// the rest, whose pages may be replaced.
    fn limit_memory(&mut self, _end: usize) {}
    /// Queues a request; it starts at the next [`StoreQueue::kick`] at the latest.
    ///
    /// # Errors
    /// [`Refused`] returns the request.
    fn submit(&mut self, request: IoRequest) -> Result<(), Refused>;
    /// Starts the queued requests. Called once per turn, before the worker sleeps.
    fn kick(&mut self);
    /// Clears the wake fd and appends the pending events, if any.
    fn reap(&mut self, events: &mut Vec<Event>);
    /// If the system did not accept the queued operations: the time after which to call [`StoreQueue::kick`] again,
    /// even without an event.
    fn retry_after(&self) -> Option<Duration> {
        None
    }
    /// Whether [`StoreQueue::reap`] may find an event. Makes no system call; for a worker that polls.
    ///
    /// => If the wake fd is readable, reap, whatever this returns.
    fn may_have_events(&mut self) -> bool {
        self.in_flight() > 0
    }
    /// Number of submitted operations whose events have not been reaped.
    fn in_flight(&self) -> usize;
    /// Waits until no operation is in flight, for at most `timeout`, and drops the events; returns whether that
    /// succeeded. Afterwards dropping the queue does not wait: operations in flight are left to the kernel.
    ///
    /// => After `false` the memory of all segments stays mapped until the process ends.
    fn drain(&mut self, timeout: Duration) -> bool;
}

/// [`StoreQueue::drain`], without its effect on a later drop.
///
/// => The queue's wake fd is readable while events wait.
pub fn wait_until_drained(queue: &mut dyn StoreQueue, timeout: Duration) -> bool {
    let until = Instant::now() + timeout;
    let mut events = Vec::new();
    loop {
        queue.kick();
        queue.reap(&mut events);
        let left = until.saturating_duration_since(Instant::now());
        if queue.in_flight() == 0 || left.is_zero() {
            return queue.in_flight() == 0;
        }
        let pause = queue.retry_after().map_or(left, |pause| left.min(pause + Duration::from_millis(1)));
        sys::poll::wait_readable(queue.wake_fd(), pause);
    }
}

impl fmt::Debug for dyn StoreQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreQueue").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

/// An image that is opened and locked once, with one [`StoreQueue`] per worker.
pub trait Backing: Send + Sync + fmt::Debug {
    /// The properties and capabilities of the image; the same for each of its queues.
    fn limits(&self) -> &Limits;

    /// Whether its queues communicate with a server over sockets.
    fn is_remote(&self) -> bool {
        false
    }

    /// Whether a write of these sectors may make the image appear to have a format other than raw.
    fn shows_format(&self, _span: SectorSpan) -> bool {
        false
    }

    /// The guest is writing `bytes` to the sectors from `first`, which may make the image appear to have a format other
    /// than raw: the next start must not reject the image for that. Returns the formats that the image does not yet
    /// record ([`format::Format::bit`]); it will record them before the write is executed, if possible.
    fn inspect_guest_write(&self, _first: u64, _bytes: &[u8]) -> u64 {
        0
    }

    /// The formats other than raw that the image records as written by its guest ([`format::Format::bit`]).
    fn recorded_formats(&self) -> u64 {
        0
    }

    /// Runs of data, in bytes, that were found when the image was opened; there may be more.
    fn data_runs(&self) -> Vec<Range<u64>> {
        Vec::new()
    }

    /// Creates a queue for another worker.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::System`] if an io_uring, a thread or a descriptor cannot be created.
    fn attach(&self) -> crate::error::Result<Box<dyn StoreQueue>>;

    /// The change token of the image; `None` if the host reports nothing.
    fn change_token(&self) -> Option<ChangeToken> {
        None
    }

    /// Whether [`Backing::idle_token`] may wait for a server.
    fn idle_token_may_wait(&self) -> bool {
        false
    }

    /// Like [`Backing::change_token`], if that is cheap enough to be called after each change; otherwise `None`.
    fn idle_token(&self) -> Option<ChangeToken> {
        None
    }

    /// Ends the current tenure, if any: records in the image that all data is on it. Returns whether there was one.
    ///
    /// # Errors
    /// Errors of fsetxattr(2) and fsync(2).
    fn end_tenure(&self) -> io::Result<bool> {
        Ok(false)
    }

    /// Records in the image that the cache no longer outlives the daemon, if there is a current tenure; returns whether
    /// there is.
    ///
    /// # Errors
    /// As [`Backing::end_tenure`].
    fn lose_cache(&self) -> io::Result<bool> {
        Ok(false)
    }
}
