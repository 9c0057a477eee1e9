//! Stores to memory that outlives the process: the arena's header, ledger and frames, the used ring, the inflight
//! region.
//!
//! The daemon can be killed between any two of them, and the next daemon continues from the state of the memory at that
//! point. Stores go through this module, so that tests can stop the daemon before any of them (`crash_point`), or
//! record the stores of a step and check how the next daemon handles each part of them (`trace`). Outside tests it
//! costs nothing.

use std::fs::File;
use std::sync::atomic::Ordering;

use vm_memory::AtomicInteger;

use crate::fault_injection::crash_point;

#[cfg(test)]
pub(crate) mod trace;

/// Stores a word.
#[inline(always)]
pub(crate) fn store<A: AtomicInteger>(word: &A, value: A::V, order: Ordering)
where
    A::V: Copy + Into<u64>,
{
    crash_point();
    word.store(value, order);
    #[cfg(test)]
    trace::stored(std::ptr::from_ref(word).addr(), &value.into().to_le_bytes()[..size_of::<A>()], order);
}

/// Records that bytes were copied to `address`, in no particular order; `bytes` returns them.
#[inline(always)]
pub(crate) fn copied(address: *const u8, bytes: impl FnOnce() -> Vec<u8>) {
    #[cfg(test)]
    trace::stored(address.addr(), &bytes(), Ordering::Relaxed);
    #[cfg(not(test))]
    let _ = (address, bytes);
}

/// A change to a file in shared memory as a whole, or to its mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileChange {
    /// The file is now mapped at this address, from its first byte on, with this length in bytes.
    Mapped(usize, usize),
    /// The file now has this length in bytes.
    Length(u64),
    /// Everything from this byte on now reads as zeros.
    ZerosFrom(u64),
}

/// Records that a file was changed or mapped.
#[inline(always)]
pub(crate) fn changed(file: &File, change: FileChange) {
    #[cfg(test)]
    trace::changed(file, change);
    #[cfg(not(test))]
    let _ = (file, change);
}
