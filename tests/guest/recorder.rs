//! An image that records every operation, as dm-log-writes does, and a replay that gives the image after a power cut at
//! any moment.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::slice;
use std::sync::{Arc, Mutex};

use genblk::error::Result;
use genblk::store::{Backing, Event, IoRequest, Limits, Refused, StoreQueue};
use genblk::units::OpKind;

/// The unit that a power cut does not tear. ext4 writes the two sectors of its superblock in place and relies on this;
/// disks with physical blocks of 4096 bytes provide it.
const UNTORN_BYTES: usize = 1024;

/// The effect of an operation.
#[derive(Debug)]
enum Change {
    Write(Vec<u8>),
    /// A zero, or a discard, which leaves zeros in a file.
    Zero(usize),
    Sync,
}

#[derive(Debug)]
struct Operation {
    offset: usize,
    change: Change,
}

/// An event in the log: an operation, by its number, is submitted or completes.
#[derive(Clone, Copy, Debug)]
enum LogEvent {
    Submitted(usize),
    Completed(usize),
}

/// All operations and their events, in order.
#[derive(Debug, Default)]
pub struct Log {
    operations: Vec<Operation>,
    events: Vec<LogEvent>,
}

/// The log of an image in use.
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Mutex<Log>>);

impl Recorder {
    /// Wraps an image.
    pub fn image(&self, inner: Arc<dyn Backing>) -> Arc<dyn Backing> {
        Arc::new(RecordedImage { inner, recorder: self.clone() })
    }

    /// Number of events so far.
    pub fn events(&self) -> usize {
        self.0.lock().unwrap().events.len()
    }

    /// Takes the log, once the image is no longer in use.
    pub fn finish(self) -> Log {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

#[derive(Debug)]
struct RecordedImage {
    inner: Arc<dyn Backing>,
    recorder: Recorder,
}

impl Backing for RecordedImage {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        let (inner, recorder) = (self.inner.attach()?, self.recorder.clone());
        Ok(Box::new(RecordedStore { inner, recorder, in_flight: HashMap::new() }))
    }
}

struct RecordedStore {
    inner: Box<dyn StoreQueue>,
    recorder: Recorder,
    /// The numbers of the operations in flight, by their tags.
    in_flight: HashMap<u64, usize>,
}

/// The change that a request makes; `None` if it makes none.
fn change_of(request: &IoRequest) -> Option<Change> {
    let len = usize::try_from(request.len).unwrap();
    match request.op {
        OpKind::Write => {
            // SAFETY: the request owns the memory of its segments until its event, and no thread writes to it.
            let piece = |segment: &genblk::store::Segment| unsafe { slice::from_raw_parts(segment.base, segment.len) };
            Some(Change::Write(request.segments.iter().map(piece).collect::<Vec<_>>().concat()))
        }
        OpKind::Zero { .. } | OpKind::Discard => Some(Change::Zero(len)),
        OpKind::Sync => Some(Change::Sync),
        OpKind::Read | OpKind::Map | OpKind::Allocate => None,
    }
}

impl StoreQueue for RecordedStore {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn wake_fd(&self) -> RawFd {
        self.inner.wake_fd()
    }

    fn submit(&mut self, request: IoRequest) -> std::result::Result<(), Refused> {
        let (tag, offset) = (request.tag, usize::try_from(request.offset).unwrap());
        let change = change_of(&request);
        // The lock is held during the submission, so that completions of other workers are logged before or after it.
        let mut log = self.recorder.0.lock().unwrap();
        self.inner.submit(request)?;
        if let Some(change) = change {
            let number = log.operations.len();
            log.operations.push(Operation { offset, change });
            log.events.push(LogEvent::Submitted(number));
            self.in_flight.insert(tag, number);
        }
        Ok(())
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        let before = events.len();
        self.inner.reap(events);
        for event in &events[before..] {
            let Event::Done { tag } = event else { continue };
            if let Some(number) = self.in_flight.remove(tag) {
                self.recorder.0.lock().unwrap().events.push(LogEvent::Completed(number));
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn drain(&mut self, timeout: std::time::Duration) -> bool {
        self.inner.drain(timeout)
    }
}

/// What a completed Sync does in a replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syncs {
    /// It makes earlier operations durable, as on any disk.
    MakeDurable,
    /// It does nothing: proves that the checks notice this.
    DoNothing,
}

/// The state of the image at an event: the data that is durable, and the operations that a power cut may undo.
#[derive(Debug)]
pub struct Replay<'a> {
    log: &'a Log,
    syncs: Syncs,
    durable: Vec<u8>,
    /// Operations that a power cut may undo, in order of submission, each with the event of its completion.
    volatile: Vec<(usize, Option<usize>)>,
    /// By number of each Sync in flight: the event of its submission.
    syncs_in_flight: HashMap<usize, usize>,
    /// Number of replayed events.
    position: usize,
}

impl<'a> Replay<'a> {
    /// Starts before the first operation, with the image's contents at that time.
    pub fn new(log: &'a Log, durable: Vec<u8>, syncs: Syncs) -> Self {
        Self { log, syncs, durable, volatile: Vec::new(), syncs_in_flight: HashMap::new(), position: 0 }
    }

    /// Replays up to event `to`.
    pub fn advance(&mut self, to: usize) {
        while self.position < to {
            match self.log.events[self.position] {
                LogEvent::Submitted(number) if matches!(self.log.operations[number].change, Change::Sync) => {
                    self.syncs_in_flight.insert(number, self.position);
                }
                LogEvent::Submitted(number) => self.volatile.push((number, None)),
                LogEvent::Completed(number) => match self.syncs_in_flight.remove(&number) {
                    Some(submitted) => self.complete_sync(submitted),
                    None => {
                        let entry = self.volatile.iter_mut().find(|(other, _)| *other == number);
                        entry.expect("an operation is submitted before it completes").1 = Some(self.position);
                    }
                },
            }
            self.position += 1;
        }
    }

    /// A Sync submitted at event `submitted` completes: operations that had completed by then are durable.
    fn complete_sync(&mut self, submitted: usize) {
        if self.syncs == Syncs::DoNothing {
            return;
        }
        let Self { log, durable, volatile, .. } = self;
        volatile.retain(|&(number, completed)| {
            let covered = completed.is_some_and(|completed| completed < submitted);
            if covered {
                apply(&log.operations[number], durable, || true);
            }
            !covered
        });
    }

    /// An image that a power cut at this event may leave. `chance(percent)` decides for each operation, and for each
    /// piece of a torn one, whether it is on the image.
    pub fn power_cut(&self, mut chance: impl FnMut(u64) -> bool) -> Vec<u8> {
        let mut image = self.durable.clone();
        for &(number, completed) in &self.volatile {
            if chance(50) {
                // An operation in flight is torn, and sometimes one in the disk's write cache.
                let torn = completed.is_none() || chance(20);
                apply(&self.log.operations[number], &mut image, || !torn || chance(50));
            }
        }
        image
    }
}

/// Applies the pieces of an operation for which `is_written` returns true.
fn apply(operation: &Operation, image: &mut [u8], mut is_written: impl FnMut() -> bool) {
    let len = match &operation.change {
        Change::Write(bytes) => bytes.len(),
        Change::Zero(len) => *len,
        Change::Sync => 0,
    };
    let (mut begin, end) = (operation.offset, operation.offset + len);
    while begin < end {
        let next = (begin + 1).next_multiple_of(UNTORN_BYTES).min(end);
        if is_written() {
            match &operation.change {
                Change::Write(bytes) => {
                    image[begin..next].copy_from_slice(&bytes[begin - operation.offset..next - operation.offset]);
                }
                _ => image[begin..next].fill(0),
            }
        }
        begin = next;
    }
}

impl Log {
    /// Number of events.
    pub fn len(&self) -> usize {
        self.events.len()
    }
}
