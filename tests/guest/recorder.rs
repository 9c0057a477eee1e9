//! An image that remembers everything that was done to it, as dm-log-writes does, and what a power cut at any moment could
//! have left.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::slice;
use std::sync::{Arc, Mutex};

use genblk::error::Result;
use genblk::store::{Backing, Event, IoRequest, Limits, Refused, StoreQueue};
use genblk::units::OpKind;

/// What a power cut leaves whole: ext4 writes the two sectors of its superblock in place, and counts on them. (Disks write
/// at least this much at once: their physical blocks have 4096 bytes.)
const UNTORN_BYTES: usize = 1024;

/// What an operation did.
#[derive(Debug)]
enum Change {
    Write(Vec<u8>),
    /// Zeros, or a discard, which leaves zeros in a file.
    Zero(usize),
    Sync,
}

#[derive(Debug)]
struct Operation {
    offset: usize,
    change: Change,
}

/// A moment in the life of an operation, by its number.
#[derive(Clone, Copy, Debug)]
enum Moment {
    Submitted(usize),
    Completed(usize),
}

/// Everything that was done, in order.
#[derive(Debug, Default)]
pub struct Log {
    operations: Vec<Operation>,
    moments: Vec<Moment>,
}

/// The log of an image in use.
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Mutex<Log>>);

impl Recorder {
    /// Wraps an image.
    pub fn image(&self, inner: Arc<dyn Backing>) -> Arc<dyn Backing> {
        Arc::new(RecordedImage { inner, recorder: self.clone() })
    }

    /// How many moments there have been.
    pub fn now(&self) -> usize {
        self.0.lock().unwrap().moments.len()
    }

    /// The log, when the image is not in use any more.
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
        Ok(Box::new(RecordedStore { inner, recorder, out: HashMap::new() }))
    }
}

struct RecordedStore {
    inner: Box<dyn StoreQueue>,
    recorder: Recorder,
    /// Numbers of the operations under way, by their tags.
    out: HashMap<u64, usize>,
}

/// What a request changes; `None`: nothing.
fn change_of(request: &IoRequest) -> Option<Change> {
    let len = usize::try_from(request.len).unwrap();
    match request.op {
        OpKind::Write => {
            // SAFETY: the request owns the memory of its segments until its event, and nobody writes to it.
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
        // Held meanwhile: what another worker's store sees complete comes before or after all of this.
        let mut log = self.recorder.0.lock().unwrap();
        self.inner.submit(request)?;
        if let Some(change) = change {
            let number = log.operations.len();
            log.operations.push(Operation { offset, change });
            log.moments.push(Moment::Submitted(number));
            self.out.insert(tag, number);
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
            if let Some(number) = self.out.remove(tag) {
                self.recorder.0.lock().unwrap().moments.push(Moment::Completed(number));
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
}

/// What is known of the image at a moment: what no power cut can take, and what one may.
#[derive(Debug)]
pub struct Replay<'a> {
    log: &'a Log,
    /// Whether a Sync makes anything durable. (It does; a checker that does not notice when it doesn't is none.)
    syncs_count: bool,
    stable: Vec<u8>,
    /// Operations that a power cut may undo, in the order in which they were submitted, each with the moment of its end.
    volatile: Vec<(usize, Option<usize>)>,
    /// When each Sync under way was submitted.
    syncs: HashMap<usize, usize>,
    now: usize,
}

impl<'a> Replay<'a> {
    /// Before the first operation: the image is `stable`.
    pub fn new(log: &'a Log, stable: Vec<u8>, syncs_count: bool) -> Self {
        Self { log, syncs_count, stable, volatile: Vec::new(), syncs: HashMap::new(), now: 0 }
    }

    /// Goes on to a moment.
    pub fn advance(&mut self, to: usize) {
        while self.now < to {
            match self.log.moments[self.now] {
                Moment::Submitted(number) if matches!(self.log.operations[number].change, Change::Sync) => {
                    self.syncs.insert(number, self.now);
                }
                Moment::Submitted(number) => self.volatile.push((number, None)),
                Moment::Completed(number) => match self.syncs.remove(&number) {
                    Some(submitted) => self.synced(submitted),
                    None => {
                        let entry = self.volatile.iter_mut().find(|(other, _)| *other == number);
                        entry.expect("what completes was submitted").1 = Some(self.now);
                    }
                },
            }
            self.now += 1;
        }
    }

    /// A Sync submitted at that moment is done: what had completed by then is stable.
    fn synced(&mut self, submitted: usize) {
        if !self.syncs_count {
            return;
        }
        let Self { log, stable, volatile, .. } = self;
        volatile.retain(|&(number, completed)| {
            let covered = completed.is_some_and(|completed| completed < submitted);
            if covered {
                apply(&log.operations[number], stable, || true);
            }
            !covered
        });
    }

    /// What a power cut now may leave: `chance(percent)` decides about each operation and each of its pieces.
    pub fn power_cut(&self, mut chance: impl FnMut(u64) -> bool) -> Vec<u8> {
        let mut image = self.stable.clone();
        for &(number, completed) in &self.volatile {
            if chance(50) {
                // Torn if it was on its way, and sometimes if it lay in the disk's cache.
                let torn = completed.is_none() || chance(20);
                apply(&self.log.operations[number], &mut image, || !torn || chance(50));
            }
        }
        image
    }
}

/// Does an operation to an image, as far as `reaches` says of each piece that is not torn.
fn apply(operation: &Operation, image: &mut [u8], mut reaches: impl FnMut() -> bool) {
    let len = match &operation.change {
        Change::Write(bytes) => bytes.len(),
        Change::Zero(len) => *len,
        Change::Sync => 0,
    };
    let (mut begin, end) = (operation.offset, operation.offset + len);
    while begin < end {
        let next = (begin + 1).next_multiple_of(UNTORN_BYTES).min(end);
        if reaches() {
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
    /// How many moments it has.
    pub fn len(&self) -> usize {
        self.moments.len()
    }
}
