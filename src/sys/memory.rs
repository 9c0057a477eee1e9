//! Advice to the kernel about mapped memory (madvise(2)), and to the allocator.

use std::io;
use std::ops::Range;

/// Excludes memory, given by its addresses, from core dumps of this process (MADV_DONTDUMP). The start is a multiple of
/// the page size.
///
/// # Errors
/// Errors of madvise(2): ENOMEM if a part of the range is not mapped.
pub fn exclude_from_dumps(addresses: Range<usize>) -> io::Result<()> {
    let start = std::ptr::without_provenance_mut(addresses.start);
    // SAFETY: this advice changes no byte and no mapping, only whether the kernel dumps the range.
    match unsafe { libc::madvise(start, addresses.len(), libc::MADV_DONTDUMP) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the allocator query the system now, instead of later on any thread. The GNU C library opens a file of sysfs
/// when it chooses the number of its arenas, and one of proc when it first returns memory of an arena other than the
/// first (vm.overcommit_memory).
pub fn prepare_allocator() {
    #[cfg(target_env = "gnu")]
    {
        const FOR_EACH_PROCESSOR: usize = 8;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let arenas = libc::c_int::try_from(processors * FOR_EACH_PROCESSOR).unwrap_or(libc::c_int::MAX);
        // SAFETY: a plain call; the allocator takes the number or ignores it.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
        // A new thread has an arena of its own. If it cannot be started, the process cannot serve anything either.
        _ = std::thread::Builder::new().spawn(exercise_trimming).map(std::thread::JoinHandle::join);
    }
}

/// Allocates and frees so much memory, in blocks from an arena, that the allocator returns memory to the system.
pub fn exercise_trimming() {
    /// Below the minimum size of a block with a mapping of its own (M_MMAP_THRESHOLD), which grows.
    const BLOCK: usize = 64 << 10;
    /// More than an arena may keep (M_TRIM_THRESHOLD), which grows with the largest mapping that was freed.
    const TOTAL: usize = 32 << 20;
    let blocks: Vec<Vec<u8>> = (0..TOTAL / BLOCK).map(|_| Vec::with_capacity(BLOCK)).collect();
    drop(std::hint::black_box(blocks));
}
