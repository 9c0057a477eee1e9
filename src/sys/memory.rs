//! Advice to the kernel about mapped memory (madvise(2)).

use std::io;
use std::ops::Range;

/// Keeps memory, given by its addresses, out of core dumps of this process (MADV_DONTDUMP). The start is a multiple of
/// the page size.
///
/// # Errors
/// Those of madvise(2): ENOMEM if a part of the range is not mapped.
pub fn exclude_from_dumps(addresses: Range<usize>) -> io::Result<()> {
    let start = std::ptr::without_provenance_mut(addresses.start);
    // SAFETY: this advice changes no byte and no mapping, only whether the kernel dumps the range.
    match unsafe { libc::madvise(start, addresses.len(), libc::MADV_DONTDUMP) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
