//! Translates between the cache and the store: operations into requests, events into outcomes.

use log::{Level, log};

use crate::arena::Arena;
use crate::cache::{Health, Outcome, StoreOpRef};
use crate::store::{Event, IoRequest, Segment};
use crate::units::{Fault, PAGE_SIZE, SECTOR_BYTES, SECTOR_SIZE};

/// The request to the store for a cache operation. Adjacent frames become one segment.
pub(super) fn request_of(arena: &Arena, op: &StoreOpRef<'_>) -> IoRequest {
    let len = op.span.count * SECTOR_BYTES;
    let mut segments: Vec<Segment> = Vec::new();
    let mut left = usize::try_from(len).expect("an operation is far below 4 GiB");
    let mut skip = usize::from(op.first_sector) * SECTOR_SIZE;
    for &frame in op.frames {
        let base = arena.frame(frame).wrapping_add(skip);
        let len = left.min(PAGE_SIZE - skip);
        match segments.last_mut() {
            Some(last) if last.base.wrapping_add(last.len) == base => last.len += len,
            _ => segments.push(Segment { base, len }),
        }
        left -= len;
        skip = 0;
    }
    IoRequest {
        tag: u64::from(op.tag),
        op: op.kind,
        offset: op.span.start * SECTOR_BYTES,
        len,
        urgency: op.urgency,
        segments,
    }
}

/// Converts an event of the store to the tag and outcome for the cache, and the error number for the log.
pub(super) fn outcome_of(event: Event) -> (u32, Outcome, i32) {
    let (tag, outcome, errno) = match event {
        Event::Done { tag } => (tag, Outcome::Done, 0),
        Event::Mapped { tag, extents } => {
            let sectors = |len: u64| len / SECTOR_BYTES;
            let runs = extents.iter().map(|extent| (sectors(extent.len), extent.kind));
            (tag, Outcome::Mapped(runs.collect()), 0)
        }
        Event::Failed { tag, fault, errno } => (tag, Outcome::Failed(fault), errno),
    };
    (u32::try_from(tag).expect("the tag is the cache's, a u32"), outcome, errno)
}

/// Logs that an operation on the image of the device `name` has failed.
pub(super) fn log_failure(name: &str, health: Health, operation: &str, fault: Fault, errno: i32) {
    let level = match (health, fault) {
        // The cache has a fallback for unsupported operations, and a store itself logs what it has lost.
        (_, Fault::Unsupported | Fault::Lost) => Level::Debug,
        (Health::Healthy, _) => Level::Warn,
        // While the store is known to fail, every retry of a page would otherwise add a log line.
        _ => Level::Debug,
    };
    let reason = std::io::Error::from_raw_os_error(errno);
    log!(level, "{name}: {operation} failed on the image: {fault} ({reason})");
}
