//! The memory of an operation: pieces of its segments, and copies into them.

use crate::store::Segment;

/// Appends the pieces of `segments` that hold `len` bytes, starting at byte `at`; at most `pieces_max` pieces.
pub(super) fn pieces(segments: &[Segment], at: u64, len: u64, pieces_max: usize, pieces: &mut Vec<Segment>) {
    let (mut skip, mut left) = (offset(at), offset(len));
    for segment in segments {
        if left == 0 || pieces.len() == pieces_max {
            return;
        }
        if skip >= segment.len {
            skip -= segment.len;
            continue;
        }
        let len = left.min(segment.len - skip);
        pieces.push(Segment { base: segment.base.wrapping_add(skip), len });
        (skip, left) = (0, left - len);
    }
}

/// Copies bytes to byte `at` of the memory.
pub(super) fn copy_in(segments: &[Segment], at: u64, mut bytes: &[u8]) {
    let mut targets = Vec::new();
    pieces(segments, at, bytes.len() as u64, usize::MAX, &mut targets);
    for target in targets {
        let (now, later) = bytes.split_at(target.len);
        // SAFETY: the memory is of a request that has not completed, so the queue owns it (the contract of `submit`),
        // and the piece lies within its segment. `now` is the client's own buffer.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), target.base, now.len()) };
        bytes = later;
    }
}

/// Zeroes `len` bytes, starting at byte `at`.
pub(super) fn zero(segments: &[Segment], at: u64, len: u64) {
    let mut targets = Vec::new();
    pieces(segments, at, len, usize::MAX, &mut targets);
    for target in targets {
        // SAFETY: as in copy_in().
        unsafe { std::ptr::write_bytes(target.base, 0, target.len) };
    }
}

/// A copy of the contents of segments, which the tests' server takes from the wire.
#[cfg(test)]
pub(super) fn copy_out(segments: &[Segment], at: u64, len: u64) -> Vec<u8> {
    let mut sources = Vec::new();
    pieces(segments, at, len, usize::MAX, &mut sources);
    let mut bytes = Vec::new();
    for source in sources {
        // SAFETY: as in copy_in(); no other thread writes to the memory meanwhile.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(source.base, source.len) });
    }
    bytes
}

fn offset(bytes: u64) -> usize {
    usize::try_from(bytes).expect("admissible() bounds a transfer")
}
