//! The statistics page of a device: its disk process writes it a few times a second, and the supervisor reads it.
//!
//! It is shared memory instead of a message, so neither process ever waits for the other: the supervisor can read the
//! last state of a process that is stopped, hangs or has died, and a busy supervisor makes no queue grow.
//!
//! The layout is fixed: words of 64 bits, listed below. A later version may append words, but never changes the meaning
//! of one: [`WORDS`] leaves room. The workers' counters follow ([`crate::counters`]), each with its own writer. One
//! thread writes the page itself. From a sequence number, odd during a change, the reader knows whether the words are
//! consistent.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::cache::Stats;
use crate::counters::BLOCK_WORDS;
use crate::counters::worker::Counters;
use crate::sys::clock::monotonic_ns;
use crate::sys::regions::{BusErrorRecord, FrontEndRecords};
use crate::sys::shared_words::SharedWords;
use crate::units::{OpKind, SectorSpan, Unmap};

/// Words of the page: two pages of 4 KiB.
pub const WORDS: usize = 1024;
/// The first word: this layout.
const MAGIC: u64 = u64::from_le_bytes(*b"genblkS1");
/// How often a reader tries to get consistent words.
const ATTEMPTS: usize = 16;

/// Indices of the words.
mod word {
    pub const MAGIC: usize = 0;
    pub const SEQUENCE: usize = 1;
    /// When the page was last written, in nanoseconds of CLOCK_MONOTONIC.
    pub const WRITTEN_AT: usize = 2;
    // 3 and 4 were counters that are now in the cache's statistics.
    /// 1 if the death of the process or of the daemon would lose completed writes.
    pub const HAS_VOLATILE_DIRTY_DATA: usize = 5;
    /// The oldest operation in flight: the code of its kind (0: none), its sectors, and since when.
    pub const OLDEST_KIND: usize = 6;
    pub const OLDEST_START: usize = 7;
    pub const OLDEST_COUNT: usize = 8;
    pub const OLDEST_SINCE: usize = 9;
    /// 1 if a front-end waits to be accepted; the process ID and user ID of the one that is served.
    pub const IS_BUSY: usize = 10;
    pub const HOLDER_PID: usize = 11;
    pub const HOLDER_UID: usize = 12;
    /// The memory whose access raised SIGBUS: a code of [`super::TruncatedMemory`]; 0: none.
    pub const TRUNCATED_MEMORY: usize = 13;
    /// 1 if a front-end is served, and its process ID and user ID.
    pub const HAS_FRONT_END: usize = 14;
    pub const FRONT_END_PID: usize = 15;
    pub const FRONT_END_UID: usize = 16;
    pub const IMAGE_BYTES: usize = 17;
    /// 1 if the cache is frozen: it does not change the image.
    pub const IS_FROZEN: usize = 18;
    /// The cache's statistics, in the order of [`crate::cache::Stats`].
    pub const CACHE: usize = 64;
    /// What the counters among them had reached when the present process started.
    pub const CACHE_BASE: usize = 512;
}

/// Memory whose file was truncated while the process used it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TruncatedMemory {
    /// The guest's memory, which the front-end shares.
    Guest,
    /// The inflight region, which the front-end keeps.
    Inflight,
    /// The cache.
    Cache,
}

impl TruncatedMemory {
    const ALL: [Self; 3] = [Self::Guest, Self::Inflight, Self::Cache];

    /// In words, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Guest => "the file of the guest's memory was truncated by the front-end",
            Self::Inflight => "the file of the inflight region was truncated by the front-end",
            Self::Cache => "the cache's file was truncated, or its memory could not be read",
        }
    }

    fn code(self) -> u64 {
        Self::ALL.iter().position(|kind| *kind == self).map_or(0, |at| at as u64 + 1)
    }

    fn of(code: u64) -> Option<Self> {
        Self::ALL.get(usize::try_from(code).ok()?.checked_sub(1)?).copied()
    }
}

/// The oldest operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OldestOp {
    /// Its kind.
    pub kind: OpKind,
    /// Its sectors.
    pub span: SectorSpan,
    /// For how long it has been in flight.
    pub age: Duration,
}

impl OldestOp {
    /// The operation in words, for messages.
    pub fn describe(&self) -> String {
        self.kind.describe(self.span)
    }
}

/// The published state of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskState {
    /// The cache's statistics.
    pub cache: Stats,
    /// Size of the image in bytes.
    pub image_bytes: u64,
    /// Whether the end of the daemon would lose completed writes that are only in a volatile cache.
    pub has_volatile_dirty_data: bool,
    /// The oldest operation in flight.
    pub oldest: Option<OldestOp>,
    /// Process ID and user ID of the front-end that is served while another one waits to be accepted.
    pub busy_with: Option<(u32, u32)>,
    /// Process ID and user ID of the front-end that is served.
    pub front_end: Option<(u32, u32)>,
    /// Whether the cache is frozen.
    pub is_frozen: bool,
}

/// The page of one device. The words of the workers' counters follow it.
#[derive(Debug)]
pub struct StatsPage {
    words: Arc<SharedWords>,
    workers: usize,
    /// When it was created or mapped, in microseconds since 1970.
    since_us: u64,
}

impl StatsPage {
    /// A new page for a device with this many workers, and the file by which another process can map it.
    ///
    /// # Errors
    /// Errors of memfd_create(2) and mmap(2).
    pub fn create(workers: usize) -> io::Result<(Self, File)> {
        let (words, file) = SharedWords::create(WORDS + workers * BLOCK_WORDS)?;
        words.store(word::MAGIC, MAGIC);
        Ok((Self { words: Arc::new(words), workers, since_us: wall_clock_us() }, file))
    }

    /// Maps the page in a file of [`StatsPage::create`].
    ///
    /// # Errors
    /// Errors of mmap(2); [`io::ErrorKind::InvalidData`] for a page of another layout.
    pub fn open(file: &File, workers: usize) -> io::Result<Self> {
        let words = SharedWords::map(file, WORDS + workers * BLOCK_WORDS)?;
        if words.load(word::MAGIC) != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a statistics page of another layout"));
        }
        Ok(Self { words: Arc::new(words), workers, since_us: wall_clock_us() })
    }

    /// Since when this page counts, in microseconds since 1970.
    pub fn since_us(&self) -> u64 {
        self.since_us
    }

    /// The counters of the device's workers.
    pub fn counters(&self) -> Counters {
        Counters::within(Arc::clone(&self.words), WORDS, self.workers)
    }

    /// Prepares the page for another process that will write it. The counters continue.
    ///
    /// => The last process has ended.
    pub fn begin_process(&self) {
        let sequence = self.words.load(word::SEQUENCE);
        self.words.store(word::SEQUENCE, sequence | 1);
        for counter in 0..Stats::COUNTERS {
            self.words.store(word::CACHE_BASE + counter, self.cache_number(counter));
            self.words.store(word::CACHE + counter, 0);
        }
        self.words.store(word::SEQUENCE, (sequence | 1).wrapping_add(1));
        self.words.store(word::WRITTEN_AT, 0);
        self.words.store(word::OLDEST_KIND, 0);
        self.words.store(word::HAS_FRONT_END, 0);
        self.words.store(word::TRUNCATED_MEMORY, 0);
    }

    /// Writes the device's state.
    ///
    /// => Only one thread calls this at a time.
    pub fn publish(&self, state: &DiskState) {
        let words = &*self.words;
        let sequence = words.load(word::SEQUENCE);
        words.store(word::SEQUENCE, sequence | 1);
        let now = monotonic_ns();
        words.store(word::WRITTEN_AT, now);
        for (index, number) in state.cache.to_array().into_iter().enumerate() {
            words.store(word::CACHE + index, number);
        }
        words.store(word::IMAGE_BYTES, state.image_bytes);
        words.store(word::IS_FROZEN, state.is_frozen.into());
        words.store(word::HAS_FRONT_END, state.front_end.is_some().into());
        let (pid, uid) = state.front_end.unwrap_or_default();
        words.store(word::FRONT_END_PID, pid.into());
        words.store(word::FRONT_END_UID, uid.into());
        words.store(word::HAS_VOLATILE_DIRTY_DATA, state.has_volatile_dirty_data.into());
        words.store(word::OLDEST_KIND, state.oldest.map_or(0, |oldest| code_of(oldest.kind)));
        if let Some(OldestOp { span, age, .. }) = state.oldest {
            words.store(word::OLDEST_START, span.start);
            words.store(word::OLDEST_COUNT, span.count);
            words.store(word::OLDEST_SINCE, now.saturating_sub(nanoseconds(age)));
        }
        words.store(word::IS_BUSY, state.busy_with.is_some().into());
        let (pid, uid) = state.busy_with.unwrap_or_default();
        words.store(word::HOLDER_PID, pid.into());
        words.store(word::HOLDER_UID, uid.into());
        words.store(word::SEQUENCE, (sequence | 1).wrapping_add(1));
    }

    /// The device's state when its process last wrote the page. The age of the oldest operation continues to grow.
    pub fn read(&self) -> DiskState {
        let words = &*self.words;
        for _ in 0..ATTEMPTS {
            let sequence = words.load(word::SEQUENCE);
            let state = self.read_once();
            if sequence.is_multiple_of(2) && words.load(word::SEQUENCE) == sequence {
                return state;
            }
        }
        // The process died during a change: each word is still valid by itself.
        self.read_once()
    }

    /// A number of the cache's statistics.
    fn cache_number(&self, index: usize) -> u64 {
        let base = if index < Stats::COUNTERS { self.words.load(word::CACHE_BASE + index) } else { 0 };
        self.words.load(word::CACHE + index).saturating_add(base)
    }

    fn read_once(&self) -> DiskState {
        let load = |index| self.words.load(index);
        let age = monotonic_ns().saturating_sub(load(word::OLDEST_SINCE));
        let oldest = kind_of(load(word::OLDEST_KIND)).map(|kind| OldestOp {
            kind,
            span: SectorSpan { start: load(word::OLDEST_START), count: load(word::OLDEST_COUNT) },
            age: Duration::from_nanos(age),
        });
        let small = |index| u32::try_from(load(index)).unwrap_or(0);
        let process = |pid, uid| (small(pid), small(uid));
        DiskState {
            cache: Stats::from_array(std::array::from_fn(|index| self.cache_number(index))),
            image_bytes: load(word::IMAGE_BYTES),
            is_frozen: load(word::IS_FROZEN) != 0,
            has_volatile_dirty_data: load(word::HAS_VOLATILE_DIRTY_DATA) != 0,
            oldest,
            busy_with: (load(word::IS_BUSY) != 0).then(|| process(word::HOLDER_PID, word::HOLDER_UID)),
            front_end: (load(word::HAS_FRONT_END) != 0).then(|| process(word::FRONT_END_PID, word::FRONT_END_UID)),
        }
    }

    /// When the process last wrote the page, by CLOCK_MONOTONIC; 0: never.
    pub fn written_at_ns(&self) -> u64 {
        self.words.load(word::WRITTEN_AT)
    }

    /// The time since the process last wrote the page; `None` if it never has.
    pub fn silent_for(&self) -> Option<Duration> {
        match self.words.load(word::WRITTEN_AT) {
            0 => None,
            at => Some(Duration::from_nanos(monotonic_ns().saturating_sub(at))),
        }
    }

    /// What the SIGBUS handler records on this page about an access to memory of the device.
    pub fn bus_error_record(&'static self, memory: TruncatedMemory) -> BusErrorRecord {
        BusErrorRecord { word: &self.words.words()[word::TRUNCATED_MEMORY], code: memory.code() }
    }

    /// What it records about an access to memory that the front-end shares.
    pub fn front_end_records(&'static self) -> FrontEndRecords {
        let record = |memory| self.bus_error_record(memory);
        FrontEndRecords { guest: record(TruncatedMemory::Guest), inflight: record(TruncatedMemory::Inflight) }
    }

    /// Records memory as the SIGBUS handler does.
    #[cfg(test)]
    pub(crate) fn record_truncated_memory(&self, memory: TruncatedMemory) {
        self.words.store(word::TRUNCATED_MEMORY, memory.code());
    }

    /// Writes any word, as a compromised process could.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn overwrite(&self, index: usize, value: u64) {
        self.words.store(index, value);
    }

    /// Takes the record of the memory whose access raised SIGBUS in the process that ended.
    pub fn take_truncated_memory(&self) -> Option<TruncatedMemory> {
        let found = TruncatedMemory::of(self.words.load(word::TRUNCATED_MEMORY));
        self.words.store(word::TRUNCATED_MEMORY, 0);
        found
    }
}

fn wall_clock_us() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The kinds of operations, in the order of their codes.
const KINDS: [OpKind; 7] = [
    OpKind::Read,
    OpKind::Write,
    OpKind::Sync,
    OpKind::Zero { unmap: Unmap::Forbidden },
    OpKind::Discard,
    OpKind::Map,
    OpKind::Allocate,
];

fn code_of(kind: OpKind) -> u64 {
    let kind = if matches!(kind, OpKind::Zero { .. }) { KINDS[3] } else { kind };
    KINDS.iter().position(|known| *known == kind).map_or(0, |at| at as u64 + 1)
}

fn kind_of(code: u64) -> Option<OpKind> {
    KINDS.get(usize::try_from(code).ok()?.checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn the_reader_sees_published_statistics_with_growing_ages() {
        let (reader, file) = StatsPage::create(1).unwrap();
        assert_eq!((reader.read(), reader.silent_for()), (DiskState::default(), None));
        let writer = StatsPage::open(&file, 1).unwrap();
        let oldest = OldestOp { kind: OpKind::Write, span: SectorSpan::new(8, 16), age: Duration::from_secs(7) };
        let state = DiskState {
            cache: Stats { completed_ops: 3, dirty_pages: 4, ..Stats::default() },
            image_bytes: 4096,
            has_volatile_dirty_data: true,
            oldest: Some(oldest),
            busy_with: Some((17, 0)),
            front_end: Some((18, 1)),
            is_frozen: true,
        };
        writer.publish(&state);
        std::thread::sleep(Duration::from_millis(2));
        let found = reader.read();
        let age = found.oldest.unwrap().age;
        assert!(age > oldest.age && age < oldest.age + Duration::from_secs(60), "{age:?}");
        let aged = Some(OldestOp { age: oldest.age, ..found.oldest.unwrap() });
        assert_eq!(DiskState { oldest: aged, ..found }, state);
        assert_eq!(found.oldest.unwrap().describe(), "a write of 8192 bytes at byte 4096");
        assert!(reader.silent_for().unwrap() < Duration::from_secs(60));
        writer.publish(&DiskState::default());
        assert_eq!(reader.read(), DiskState::default());
    }

    #[test]
    fn counters_of_the_cache_continue_in_the_next_process() {
        let (page, _file) = StatsPage::create(1).unwrap();
        let state = |evicted_pages, sync_errors, frames| {
            let cache = Stats { evicted_pages, sync_errors, frames, ..Stats::default() };
            DiskState { cache, ..DiskState::default() }
        };
        page.publish(&state(7, 2, 1024));
        for expected in [7 + 5, 7 + 5 + 5] {
            page.begin_process();
            assert_eq!(page.read().cache.evicted_pages, expected - 5, "before it has written");
            page.publish(&state(5, 0, 512));
            assert_eq!(page.read(), state(expected, 2, 512));
        }
    }

    #[test]
    fn a_report_of_truncated_memory_is_read_once() {
        let page: &'static StatsPage = Box::leak(Box::new(StatsPage::create(1).unwrap().0));
        for memory in TruncatedMemory::ALL {
            let BusErrorRecord { word, code } = page.bus_error_record(memory);
            word.store(code, Ordering::Release);
            assert_eq!(page.take_truncated_memory(), Some(memory));
            assert_eq!(page.take_truncated_memory(), None);
        }
    }

    #[test]
    fn every_store_operation_kind_has_its_own_code() {
        for kind in KINDS {
            assert_eq!(kind_of(code_of(kind)), Some(kind));
        }
        assert_eq!(kind_of(0), None);
        assert_eq!(kind_of(99), None);
    }
}
