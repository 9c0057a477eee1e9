//! Advice to the kernel about mapped memory (madvise(2)), and to the allocator.

use std::io;
use std::ops::Range;

/// Keeps memory, given by its addresses, out of core dumps of this process (MADV_DONTDUMP). The start is a multiple of
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

/// Sets the number of the allocator's arenas to what it would choose by itself. The GNU C library does so late, on any
/// thread, and opens a file of sysfs for it.
pub fn fix_arena_limit() {
    #[cfg(target_env = "gnu")]
    {
        const FOR_EACH_PROCESSOR: usize = 8;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let arenas = libc::c_int::try_from(processors * FOR_EACH_PROCESSOR).unwrap_or(libc::c_int::MAX);
        // SAFETY: a plain call; the allocator takes the number or ignores it.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
    }
}
