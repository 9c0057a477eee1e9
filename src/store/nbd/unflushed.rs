//! The ranges of the image that were written since the last FLUSH.
//!
//! A server with a write cache may report the extents of the store below it: nbdkit's cache filter (cache=writeback)
//! reports a hole for cached data that it has not written. So ranges written since the last FLUSH count as data,
//! whatever the server reports. All queues of an image share the list.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use crate::store::Extent;
use crate::units::ExtentKind;

/// Granularity of the list in bytes. A partly written chunk counts as written.
const CHUNK_BYTES: u64 = 64 << 10;

/// See the documentation of the module.
#[derive(Debug, Default)]
pub(super) struct Unflushed(Mutex<WrittenChunks>);

#[derive(Debug, Default)]
struct WrittenChunks {
    /// Number of FLUSHes that were submitted.
    flushes: u64,
    /// The number of the first FLUSH that covers the writes to a chunk.
    covered_by: HashMap<u64, u64>,
}

fn chunks_of(range: &Range<u64>) -> Range<u64> {
    range.start / CHUNK_BYTES..range.end.div_ceil(CHUNK_BYTES)
}

impl Unflushed {
    fn lock(&self) -> MutexGuard<'_, WrittenChunks> {
        self.0.lock().expect("no thread panics with the list locked")
    }

    /// A write of this range has completed.
    pub fn note_write(&self, range: &Range<u64>) {
        let mut list = self.lock();
        let next = list.flushes + 1;
        list.covered_by.extend(chunks_of(range).map(|chunk| (chunk, next)));
    }

    /// A FLUSH is submitted; returns its number.
    pub fn begin_flush(&self) -> u64 {
        let mut list = self.lock();
        list.flushes += 1;
        list.flushes
    }

    /// The FLUSH with this number has succeeded.
    pub fn flushed(&self, number: u64) {
        self.lock().covered_by.retain(|_, covered_by| *covered_by > number);
    }

    /// The chunks of a range that were written.
    pub fn within(&self, range: &Range<u64>) -> Vec<u64> {
        let list = self.lock();
        chunks_of(range).filter(|chunk| list.covered_by.contains_key(chunk)).collect()
    }
}

/// A map that starts at `offset`, with these chunks as data. Adjacent extents may have the same kind.
pub(super) fn with_data(extents: &[Extent], offset: u64, written: &[u64]) -> Vec<Extent> {
    if written.is_empty() {
        return extents.to_vec();
    }
    let (mut parts, mut at) = (Vec::with_capacity(extents.len()), offset);
    for extent in extents {
        let end = at + extent.len;
        while at < end {
            let chunk = at / CHUNK_BYTES;
            let is_data = extent.kind == ExtentKind::Data || written.contains(&chunk);
            let until = if extent.kind == ExtentKind::Data { end } else { end.min((chunk + 1) * CHUNK_BYTES) };
            parts.push(Extent { len: until - at, kind: if is_data { ExtentKind::Data } else { ExtentKind::Hole } });
            at = until;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_counts_as_data_until_a_later_flush_succeeds() {
        let unflushed = Unflushed::default();
        let whole = 0..1 << 20;
        let early = unflushed.begin_flush();
        unflushed.note_write(&(65_000..66_000));
        unflushed.flushed(early);
        assert_eq!(unflushed.within(&whole), [0, 1]);
        let extents = [Extent { len: 1 << 20, kind: ExtentKind::Hole }];
        let data: u64 = with_data(&extents, 0, &[0, 1])
            .iter()
            .filter(|extent| extent.kind == ExtentKind::Data)
            .map(|extent| extent.len)
            .sum();
        assert_eq!(data, 2 * CHUNK_BYTES);
        let flush = unflushed.begin_flush();
        unflushed.note_write(&(0..512));
        unflushed.flushed(flush);
        assert_eq!(unflushed.within(&whole), [0]);
    }
}
