//! A record of what this thread stores to memory that outlives the process, and the states in which a killed daemon can
//! leave that memory.

use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;

use super::FileChange;

/// A store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TracedStore {
    /// Address of its first byte.
    pub address: usize,
    /// What it stores.
    pub bytes: Vec<u8>,
    order: Ordering,
}

impl TracedStore {
    fn range(&self) -> Range<usize> {
        self.address..self.address + self.bytes.len()
    }

    fn overlaps(&self, other: &Self) -> bool {
        let (one, two) = (self.range(), other.range());
        one.start < two.end && two.start < one.end
    }
}

/// A recorded event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TraceEvent {
    Store(TracedStore),
    File(FileId, FileChange),
}

/// Device and inode of a file.
pub(crate) type FileId = (u64, u64);

/// What distinguishes a file from every other.
pub(crate) fn file_id(file: &File) -> FileId {
    let metadata = file.metadata().expect("an open file has metadata");
    (metadata.dev(), metadata.ino())
}

impl TraceEvent {
    /// Whether the compiler may move the event before those that precede it, or after those that follow it.
    fn is_ordered(&self) -> bool {
        matches!(self, Self::File(..)) || matches!(self, Self::Store(store) if store.order != Ordering::Relaxed)
    }
}

thread_local! {
    static TRACE: RefCell<Option<Vec<TraceEvent>>> = const { RefCell::new(None) };
}

/// Runs `step`; returns its result and the events of this thread meanwhile.
pub(crate) fn record<R>(step: impl FnOnce() -> R) -> (R, Vec<TraceEvent>) {
    let outer = TRACE.replace(Some(Vec::new()));
    assert!(outer.is_none(), "records do not nest");
    let result = step();
    (result, TRACE.take().expect("it is being recorded"))
}

pub(super) fn stored(address: usize, bytes: &[u8], order: Ordering) {
    note(|| TraceEvent::Store(TracedStore { address, bytes: bytes.to_vec(), order }));
}

pub(super) fn changed(file: &File, change: FileChange) {
    note(|| TraceEvent::File(file_id(file), change));
}

fn note(event: impl FnOnce() -> TraceEvent) {
    TRACE.with_borrow_mut(|trace| {
        if let Some(trace) = trace {
            trace.push(event());
        }
    });
}

/// Each set of `events` that a daemon which is killed during the step can leave behind, in program order.
///
/// => An ordered event (a store with Release, a system call) happens after all events before it. A relaxed store can
///    happen before any store that precedes it, except one to the same bytes, because the compiler may move it there.
pub(crate) fn crash_states(events: &[TraceEvent]) -> Vec<Vec<&TraceEvent>> {
    let mut states = Vec::new();
    extend(events, &mut Vec::new(), &mut Vec::new(), &mut states);
    states
}

/// Adds to `states` every state that begins with `happened` and lacks `skipped`; `rest` are the events after these.
fn extend<'a>(
    rest: &'a [TraceEvent],
    happened: &mut Vec<&'a TraceEvent>,
    skipped: &mut Vec<&'a TraceEvent>,
    states: &mut Vec<Vec<&'a TraceEvent>>,
) {
    let Some((event, rest)) = rest.split_first() else {
        states.push(happened.clone());
        return;
    };
    let can_pass = |other: &&TraceEvent| match (event, *other) {
        (TraceEvent::Store(store), TraceEvent::Store(other)) => !event.is_ordered() && !store.overlaps(other),
        _ => false,
    };
    if skipped.iter().all(can_pass) {
        happened.push(event);
        extend(rest, happened, skipped, states);
        happened.pop();
    }
    skipped.push(event);
    extend(rest, happened, skipped, states);
    skipped.pop();
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::shared_memory::store;

    /// For each state, the values stored in it.
    fn states_of(step: impl FnOnce()) -> Vec<Vec<u8>> {
        let ((), events) = record(step);
        let value = |event: &&TraceEvent| if let TraceEvent::Store(store) = event { store.bytes[0] } else { 0 };
        let mut states: Vec<Vec<u8>> =
            crash_states(&events).iter().map(|state| state.iter().map(value).collect()).collect();
        states.sort();
        states
    }

    #[test]
    fn ordered_stores_happen_in_order_and_relaxed_ones_in_any() {
        let [a, b, c] = [const { AtomicU64::new(0) }; 3];
        let release = states_of(|| (1..).zip([&a, &b]).for_each(|(value, word)| store(word, value, Ordering::Release)));
        assert_eq!(release, [vec![], vec![1], vec![1, 2]]);
        let relaxed = states_of(|| {
            store(&a, 1, Ordering::Relaxed);
            store(&b, 2, Ordering::Relaxed);
            store(&c, 3, Ordering::Release);
        });
        assert_eq!(relaxed, [vec![], vec![1], vec![1, 2], vec![1, 2, 3], vec![2]]);
        let early = states_of(|| {
            store(&a, 1, Ordering::Release);
            store(&b, 2, Ordering::Relaxed);
        });
        assert_eq!(early, [vec![], vec![1], vec![1, 2], vec![2]]);
        let same = states_of(|| [1, 2].into_iter().for_each(|value| store(&a, value, Ordering::Relaxed)));
        assert_eq!(same, [vec![], vec![1], vec![1, 2]], "the second store to a word cannot come first");
    }
}
