//! Memory that other processes can truncate: an access beyond the new end of its file raises SIGBUS. The handler of
//! that signal finds here whose memory it was, and records that; it may not lock, allocate or read /proc.

use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

/// What the handler records about a range: a code, in a word that another process reads.
#[derive(Clone, Copy, Debug)]
pub struct BusErrorRecord {
    /// The word.
    pub word: &'static AtomicU64,
    /// The code; 0 means that nothing is recorded.
    pub code: u64,
}

/// What the handler records about the memory that a front-end shares.
#[derive(Clone, Copy, Debug)]
pub struct FrontEndRecords {
    /// The guest's memory.
    pub guest: BusErrorRecord,
    /// The inflight region.
    pub inflight: BusErrorRecord,
}

/// A registered range, until this is dropped.
#[derive(Debug)]
pub struct Registration(&'static Entry);

/// A range and its record. Entries are never freed, but used again.
#[derive(Debug)]
struct Entry {
    start: AtomicUsize,
    /// 0 while no range is registered here.
    end: AtomicUsize,
    word: AtomicPtr<AtomicU64>,
    code: AtomicU64,
    next: *const Entry,
}

// SAFETY: `next` never changes, and the entry that it points to is never freed; all other fields are atomics.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

/// The list of all entries, which the handler walks.
static FIRST: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());
/// Entries without a range.
static FREE: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());

fn free_entries() -> MutexGuard<'static, Vec<&'static Entry>> {
    FREE.lock().expect("no thread panics with the entries locked")
}

/// Makes the handler of SIGBUS write `record` if the access was to this range.
pub fn register(range: &Range<usize>, record: BusErrorRecord) -> Registration {
    let mut free = free_entries();
    let entry = free.pop().unwrap_or_else(|| add_entry(&free));
    entry.word.store(ptr::from_ref(record.word).cast_mut(), Ordering::Release);
    entry.code.store(record.code, Ordering::Release);
    entry.start.store(range.start, Ordering::Release);
    entry.end.store(range.end, Ordering::Release);
    Registration(entry)
}

/// Adds an entry to the list. The caller holds the lock, so there is no other writer.
fn add_entry(_: &MutexGuard<'_, Vec<&'static Entry>>) -> &'static Entry {
    let (none, next) = (AtomicPtr::new(ptr::null_mut()), FIRST.load(Ordering::Acquire));
    let (start, end, code) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicU64::new(0));
    let entry: &'static Entry = Box::leak(Box::new(Entry { start, end, word: none, code, next }));
    FIRST.store(ptr::from_ref(entry).cast_mut(), Ordering::Release);
    entry
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::Release);
        free_entries().push(self.0);
    }
}

impl Entry {
    fn contains(&self, address: usize) -> bool {
        let end = self.end.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Acquire);
        // The end is 0 while another thread changes the start.
        (start..end).contains(&address) && self.end.load(Ordering::Acquire) == end
    }
}

/// Writes the records of all ranges with this address. May be called in a signal handler.
pub fn record_bus_error(address: usize) {
    let mut at: *const Entry = FIRST.load(Ordering::Acquire);
    // SAFETY: a pointer in the list is null or that of an entry, and entries are never freed.
    while let Some(entry) = unsafe { at.as_ref() } {
        if entry.contains(address) {
            // SAFETY: as the range is registered, this is the address of a word that lives as long as the process.
            let word = unsafe { &*entry.word.load(Ordering::Acquire) };
            word.store(entry.code.load(Ordering::Acquire), Ordering::Release);
        }
        at = entry.next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bus_error_is_recorded_for_the_owner_of_the_range_as_long_as_it_is_registered() {
        static WORDS: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
        // Addresses that no mapping has.
        let add = |range, word: usize, code| register(&range, BusErrorRecord { word: &WORDS[word], code });
        let found = |address| {
            record_bus_error(address);
            [0, 1].map(|word: usize| WORDS[word].swap(0, Ordering::AcqRel))
        };
        let (first, second) = (add(16..32, 0, 1), add(32..40, 1, 2));
        assert_eq!([15, 16, 31, 32, 39, 40].map(found), [[0, 0], [1, 0], [1, 0], [0, 2], [0, 2], [0, 0]]);
        drop(first);
        assert_eq!([16, 32].map(found), [[0, 0], [0, 2]]);
        let shared = [add(8..40, 0, 3), second];
        assert_eq!([8, 32].map(found), [[3, 0], [3, 2]]);
        drop(shared);
        assert_eq!([8, 32].map(found), [[0, 0], [0, 0]]);
    }
}
