//! The simulated image: a [`Backing`] whose disk has a volatile write cache.
//!
//! An operation takes effect at one time and its queue reports it at another, in any order. Until a Sync succeeds, a
//! write may or may not reach the medium. A Sync covers the operations whose events were reaped before it was
//! submitted, and no other.
//!
//! A [`SectorValue`] fills all 512 bytes of its sector, so that a mixture of two values is detected.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::oracle::SectorValue;
use crate::error::Result;
use crate::fault_injection::crash_point;
use crate::prng::Prng;
use crate::store::{Backing, Event, Extent, IoRequest, Limits, Refused, Segment, StoreQueue};
use crate::units::{ExtentKind, Fault, OpKind, SECTOR_BYTES, SECTOR_SIZE, SectorSpan, Unmap};

/// Contents of memory after a failed read. A guest that reads it has received garbage.
const GARBAGE: SectorValue = 0xdead_dead_dead_dead;
const WORDS: usize = SECTOR_SIZE / 8;
const SECTORS_PER_PAGE: usize = 8;

/// A sector filled with `value`.
pub(super) fn sector_of(value: SectorValue) -> [u8; SECTOR_SIZE] {
    let mut bytes = [0; SECTOR_SIZE];
    bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
    bytes
}

/// The value of a sector; `None`: a mixture of values.
pub(super) fn value_of(sector: &[u8]) -> Option<SectorValue> {
    let mut words = sector.chunks(8).map(|word| SectorValue::from_le_bytes(word.try_into().expect("eight bytes")));
    let first = words.next()?;
    words.all(|word| word == first).then_some(first)
}

/// The behaviour of the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Behaviour {
    /// The longest time until an effect, and from there to its event.
    pub latency_us_max: u64,
    /// Of 100 operations, the number that fail.
    pub fault_percent: u64,
    /// A failed Sync loses every unsynced write; reads return the old data immediately.
    pub resets: bool,
}

/// A write that no Sync has covered.
#[derive(Clone, Copy, Debug)]
struct Unsynced {
    value: SectorValue,
    operation: u64,
    is_discard: bool,
    /// When its event was reaped.
    reaped_at: Option<u64>,
}

#[derive(Debug)]
struct DiskOperation {
    id: u64,
    queue: usize,
    request: IoRequest,
    /// The disk's clock when it was submitted.
    began: u64,
    effect_at: u64,
    event_at: u64,
    /// The result for its event, once it has taken effect.
    outcome: Option<Event>,
}

#[derive(Debug)]
struct EventQueue {
    wake: EventFd,
    /// The events, each with its operation.
    events: Vec<(u64, Event)>,
    in_flight: usize,
}

#[derive(Debug)]
struct MediumState {
    prng: Prng,
    behaviour: Behaviour,
    now_us: u64,
    current: Vec<SectorValue>,
    durable: Vec<SectorValue>,
    unsynced: Vec<Vec<Unsynced>>,
    /// By page.
    hole: Vec<bool>,
    /// Counts Syncs.
    clock: u64,
    next_id: u64,
    operations: Vec<DiskOperation>,
    queues: Vec<EventQueue>,
    /// Events that a queue's owner has reaped.
    reaped: u64,
    faults: u64,
    /// See [`SimulatedImage::forbid_changes`].
    changes_forbidden: bool,
}

/// See the documentation of the module. Clones share the disk.
#[derive(Clone, Debug)]
pub(super) struct SimulatedImage {
    limits: Limits,
    disk: Arc<Mutex<MediumState>>,
}

impl SimulatedImage {
    /// An image of zeros; pages for which `hole` returns true are holes.
    pub fn new(limits: Limits, behaviour: Behaviour, mut prng: Prng, hole_percent: u64) -> Self {
        let sectors = (limits.size_bytes.get() / SECTOR_BYTES) as usize;
        let hole = (0..sectors.div_ceil(SECTORS_PER_PAGE)).map(|_| prng.percent(hole_percent)).collect();
        let disk = MediumState {
            prng,
            behaviour,
            now_us: 0,
            current: vec![0; sectors],
            durable: vec![0; sectors],
            unsynced: vec![Vec::new(); sectors],
            hole,
            clock: 1,
            next_id: 0,
            operations: Vec::new(),
            queues: Vec::new(),
            reaped: 0,
            faults: 0,
            changes_forbidden: false,
        };
        Self { limits, disk: Arc::new(Mutex::new(disk)) }
    }

    fn disk(&self) -> MutexGuard<'_, MediumState> {
        self.disk.lock().expect("no panic with the disk locked")
    }

    /// The disk never fails from now on.
    pub fn heal(&self) {
        self.disk().behaviour.fault_percent = 0;
    }

    /// Whether an operation that changes the disk is an error of the daemon.
    pub fn forbid_changes(&self, forbidden: bool) {
        self.disk().changes_forbidden = forbidden;
    }

    /// Whether an operation has failed.
    pub fn has_failed(&self) -> bool {
        self.disk().faults > 0
    }

    /// Number of operations that were submitted.
    pub fn submitted(&self) -> u64 {
        self.disk().next_id
    }

    /// Number of operations that were submitted or reaped: each is progress.
    pub fn activity(&self) -> u64 {
        let disk = self.disk();
        disk.next_id + disk.reaped
    }

    /// Performs all effects and events that are due at `now_us`.
    pub fn advance(&self, now_us: u64) {
        let mut disk = self.disk();
        disk.now_us = now_us;
        while let Some((at, _)) = disk.next_event()
            && at <= now_us
        {
            disk.step();
        }
    }

    /// The time of the next effect or event.
    pub fn next_event(&self) -> Option<u64> {
        self.disk().next_event().map(|(at, _)| at)
    }

    /// The daemon's queues no longer exist, and report no more operations. All operations in flight take effect after
    /// an orderly end, and any subset of them after the daemon's death.
    pub fn end_operations(&self, orderly: bool) {
        let mut disk = self.disk();
        for operation in std::mem::take(&mut disk.operations) {
            if operation.outcome.is_none() && (orderly || disk.prng.percent(50)) {
                disk.apply(&operation);
            }
        }
        disk.queues.clear();
        // The kernel has completed the operations before the next daemon can open the image.
        let clock = disk.clock;
        disk.unsynced.iter_mut().flatten().for_each(|write| write.reaped_at = write.reaped_at.or(Some(clock)));
    }

    /// Makes the disk larger, by sectors of these values; pages of zeros for which `hole` returns true are holes. The
    /// daemon does not serve the new part before it is notified.
    pub fn grow(&self, values: &[SectorValue], hole: impl FnMut(usize) -> bool) {
        let mut disk = self.disk();
        let sectors = disk.current.len() + values.len();
        disk.current.extend(values);
        disk.durable.extend(values);
        disk.unsynced.resize(sectors, Vec::new());
        let pages = disk.hole.len()..sectors.div_ceil(SECTORS_PER_PAGE);
        disk.hole.extend(pages.map(hole));
        disk.fill_holes();
    }

    /// Shrinks the disk to its former size; the added part was never used.
    pub fn shrink(&self, sectors: u64) {
        let mut disk = self.disk();
        let sectors = sectors as usize;
        disk.current.truncate(sectors);
        disk.durable.truncate(sectors);
        disk.unsynced.truncate(sectors);
        disk.hole.truncate(sectors.div_ceil(SECTORS_PER_PAGE));
    }

    /// A daemon opens the image with its present size.
    pub fn serve_all(&self) {
        self.limits.size_bytes.set(self.disk().current.len() as u64 * SECTOR_BYTES);
    }

    /// The values of all sectors.
    pub fn values(&self) -> Vec<SectorValue> {
        self.disk().current.clone()
    }

    /// Whether the values of these sectors can no longer be lost, except by later writes.
    pub fn is_durable(&self, span: SectorSpan) -> bool {
        let disk = self.disk();
        let mut sectors = (span.start..span.end()).map_while(|sector| usize::try_from(sector).ok());
        sectors.all(|sector| match disk.unsynced.get(sector) {
            Some(unsynced) => unsynced.is_empty() && disk.current[sector] == disk.durable[sector],
            None => true,
        })
    }

    /// Like [`SimulatedImage::values`], after the host has dropped the pages that a failed Sync has left in its memory.
    pub fn reopened(&self) -> Vec<SectorValue> {
        let mut disk = self.disk();
        let MediumState { current, durable, unsynced, .. } = &mut *disk;
        for ((current, durable), unsynced) in current.iter_mut().zip(durable).zip(unsynced) {
            if !unsynced.iter().any(|write| write.value == *current) {
                *current = *durable;
            }
        }
        disk.fill_holes();
        disk.current.clone()
    }

    /// Writes that reach the image outside the daemon, and are durable if `synced`.
    pub fn replace(&self, values: &[SectorValue], synced: bool) {
        let mut disk = self.disk();
        let (clock, id) = (disk.clock, disk.next_id);
        disk.next_id += 1;
        for (sector, &value) in values.iter().enumerate() {
            if disk.current[sector] != value {
                disk.write(sector, value, id);
            }
        }
        disk.unsynced.iter_mut().flatten().for_each(|write| write.reaped_at = write.reaped_at.or(Some(clock)));
        if synced {
            disk.clock += 1;
            let began = disk.clock;
            disk.complete_sync(began);
        }
    }

    /// A state that may remain after a power cut now: a value for each sector.
    pub fn after_power_cut(&self) -> Vec<SectorValue> {
        let mut disk = self.disk();
        let MediumState { prng, durable, unsynced, .. } = &mut *disk;
        let left = |(durable, unsynced): (&SectorValue, &Vec<Unsynced>)| match prng.below(unsynced.len() as u64 + 1)
            as usize
        {
            0 => *durable,
            n => unsynced[n - 1].value,
        };
        durable.iter().zip(unsynced.iter()).map(left).collect()
    }

    /// The server of the disk dies with the daemon, and loses what no Sync covers.
    pub fn lose_unsynced(&self) {
        self.disk().lose_unsynced();
    }

    /// Cuts the power; `left` remains.
    pub fn cut_power(&self, left: &[SectorValue]) {
        let mut disk = self.disk();
        disk.operations.clear();
        disk.queues.clear();
        disk.durable.copy_from_slice(left);
        disk.lose_unsynced();
    }
}

impl MediumState {
    /// The time of the next effect or event, and the index of its operation.
    fn next_event(&self) -> Option<(u64, usize)> {
        let time = |operation: &DiskOperation| {
            if operation.outcome.is_none() { operation.effect_at } else { operation.event_at }
        };
        self.operations.iter().enumerate().map(|(index, operation)| (time(operation), index)).min()
    }

    /// Performs the next effect or event.
    fn step(&mut self) {
        let (_, index) = self.next_event().expect("the caller has seen it");
        let mut operation = self.operations.swap_remove(index);
        if let Some(event) = operation.outcome.take() {
            let queue = &mut self.queues[operation.queue];
            queue.events.push((operation.id, event));
            queue.wake.write(1).expect("an eventfd takes a count");
        } else {
            operation.outcome = Some(self.apply(&operation));
            self.operations.push(operation);
        }
    }

    /// Performs the effect of an operation on disk and memory, and returns its event.
    fn apply(&mut self, operation: &DiskOperation) -> Event {
        let DiskOperation { id, request, began, .. } = operation;
        let tag = request.tag;
        let first = (request.offset / SECTOR_BYTES) as usize;
        let count = (request.len / SECTOR_BYTES) as usize;
        let percent = match self.behaviour.fault_percent {
            // Syncs are rare and their failures matter most, so they fail more often.
            1.. if request.op == OpKind::Sync => 20,
            percent => percent,
        };
        let failed = self.prng.percent(percent);
        match request.op {
            OpKind::Read => {
                let values = (first..first + count).map(|at| if failed { GARBAGE } else { self.current[at] });
                fill(&request.segments, &values.collect::<Vec<_>>());
            }
            OpKind::Write => {
                for (sector, value) in (first..).zip(contents(&request.segments)) {
                    // A failed write is torn.
                    if !failed || self.prng.percent(50) {
                        self.write(sector, value, *id);
                    }
                }
            }
            OpKind::Sync if failed => self.fail_sync(*began),
            OpKind::Sync => self.complete_sync(*began),
            OpKind::Zero { unmap } if !failed => self.zero(first, count, unmap, *id),
            OpKind::Discard if !failed && self.prng.percent(50) => {
                self.zero(first, count, Unmap::Allowed, *id);
                let discarded =
                    self.unsynced[first..first + count].iter_mut().filter_map(|unsynced| unsynced.last_mut());
                discarded.for_each(|write| write.is_discard = true);
            }
            OpKind::Map if !failed => return Event::Mapped { tag, extents: self.extents(first, count) },
            OpKind::Zero { .. } | OpKind::Discard if failed => {
                // A failed operation is torn, and destroys the contents of sectors.
                for sector in first..first + count {
                    if self.prng.percent(50) {
                        (self.current[sector], self.durable[sector]) = (0, 0);
                        self.unsynced[sector].clear();
                    }
                }
            }
            OpKind::Zero { .. } | OpKind::Discard | OpKind::Map | OpKind::Allocate => {}
        }
        if failed {
            self.faults += 1;
            return Event::Failed { tag, fault: self.prng.pick(&[Fault::Media, Fault::NoSpace]), errno: 0 };
        }
        Event::Done { tag }
    }

    fn write(&mut self, sector: usize, value: SectorValue, operation: u64) {
        self.current[sector] = value;
        self.unsynced[sector].push(Unsynced { value, operation, is_discard: false, reaped_at: None });
        self.hole[sector / SECTORS_PER_PAGE] = false;
    }

    fn zero(&mut self, first: usize, count: usize, unmap: Unmap, operation: u64) {
        for sector in first..first + count {
            let was_hole = self.hole[sector / SECTORS_PER_PAGE];
            self.write(sector, 0, operation);
            self.hole[sector / SECTORS_PER_PAGE] = was_hole;
        }
        if unmap == Unmap::Allowed {
            let whole = first.div_ceil(SECTORS_PER_PAGE)..(first + count) / SECTORS_PER_PAGE;
            whole.for_each(|page| self.hole[page] = true);
        }
    }

    fn complete_sync(&mut self, began: u64) {
        for (durable, unsynced) in self.durable.iter_mut().zip(&mut self.unsynced) {
            if let Some(last) = unsynced.iter().rposition(|write| write.reaped_at.is_some_and(|at| at < began)) {
                *durable = unsynced[last].value;
                unsynced.drain(..=last);
            }
        }
    }

    fn fail_sync(&mut self, began: u64) {
        if self.behaviour.resets {
            return self.lose_unsynced();
        }
        // Like kernels with pages whose write-back fails: reads still return them, and no later Sync covers them. A
        // discard leaves no such pages.
        for (durable, unsynced) in self.durable.iter_mut().zip(&mut self.unsynced) {
            let is_covered = |write: &Unsynced| write.reaped_at.is_some_and(|at| at < began);
            if unsynced.iter().rfind(|write| is_covered(write)).is_some_and(|write| write.is_discard) {
                *durable = 0;
            }
            unsynced.retain(|write| !is_covered(write));
        }
    }

    /// Loses all data that is not durable.
    fn lose_unsynced(&mut self) {
        self.current.copy_from_slice(&self.durable);
        self.unsynced.iter_mut().for_each(Vec::clear);
        self.fill_holes();
    }

    /// A page with data is not a hole.
    fn fill_holes(&mut self) {
        for (hole, page) in self.hole.iter_mut().zip(self.current.chunks(SECTORS_PER_PAGE)) {
            *hole &= page.iter().all(|value| *value == 0);
        }
    }

    fn extents(&self, first: usize, count: usize) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        for sector in first..self.hole.len() * SECTORS_PER_PAGE {
            let kind = if self.hole[sector / SECTORS_PER_PAGE] { ExtentKind::Hole } else { ExtentKind::Data };
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.len += SECTOR_BYTES,
                Some(_) if sector >= first + count => break,
                _ => extents.push(Extent { len: SECTOR_BYTES, kind }),
            }
        }
        extents
    }
}

/// Fills memory with sectors of these values.
fn fill(segments: &[Segment], values: &[SectorValue]) {
    let mut values = values.iter();
    for segment in segments {
        for at in (0..segment.len).step_by(SECTOR_SIZE) {
            let sector = sector_of(*values.next().expect("the segments have the request's length"));
            let target = segment.base.wrapping_add(at);
            // SAFETY: the request owns the segment's memory until its event is reaped; both hold a sector here.
            unsafe { std::ptr::copy_nonoverlapping(sector.as_ptr(), target, SECTOR_SIZE) };
        }
    }
}

/// The values of the sectors in memory.
fn contents(segments: &[Segment]) -> Vec<SectorValue> {
    let mut values = Vec::new();
    for segment in segments {
        for at in (0..segment.len).step_by(8 * WORDS) {
            let mut sector = [0; SECTOR_SIZE];
            // SAFETY: as in fill().
            unsafe {
                std::ptr::copy_nonoverlapping(segment.base.wrapping_add(at), sector.as_mut_ptr(), SECTOR_SIZE);
            };
            values.push(value_of(&sector).expect("a frame holds whole sectors"));
        }
    }
    values
}

impl Backing for SimulatedImage {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an eventfd");
        let descriptor = wake.as_raw_fd();
        let mut disk = self.disk();
        disk.queues.push(EventQueue { wake, events: Vec::new(), in_flight: 0 });
        Ok(Box::new(SimulatedQueue { image: self.clone(), index: disk.queues.len() - 1, descriptor }))
    }
}

#[derive(Debug)]
struct SimulatedQueue {
    image: SimulatedImage,
    index: usize,
    descriptor: RawFd,
}

impl StoreQueue for SimulatedQueue {
    fn limits(&self) -> &Limits {
        &self.image.limits
    }

    fn wake_fd(&self) -> RawFd {
        self.descriptor
    }

    fn submit(&mut self, request: IoRequest) -> std::result::Result<(), Refused> {
        crash_point();
        if !self.image.limits.admissible(&request) {
            return Err(Refused::Invalid(request));
        }
        let mut disk = self.image.disk();
        let is_change = !matches!(request.op, OpKind::Read | OpKind::Map | OpKind::Sync);
        assert!(!(is_change && disk.changes_forbidden), "a read-only daemon submits {:?}", request.op);
        if disk.queues[self.index].in_flight >= usize::from(self.image.limits.depth) {
            return Err(Refused::Full(request));
        }
        disk.queues[self.index].in_flight += 1;
        if request.op == OpKind::Sync {
            disk.clock += 1;
        }
        let latency = disk.behaviour.latency_us_max;
        let effect_at = disk.now_us + disk.prng.between(0, latency);
        let event_at = effect_at + disk.prng.between(0, latency);
        let (id, began, queue) = (disk.next_id, disk.clock, self.index);
        disk.next_id += 1;
        disk.operations.push(DiskOperation { id, queue, request, began, effect_at, event_at, outcome: None });
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, events: &mut Vec<Event>) {
        let mut disk = self.image.disk();
        let MediumState { queues, unsynced, clock, reaped, .. } = &mut *disk;
        let queue = &mut queues[self.index];
        let _ = queue.wake.read();
        queue.in_flight -= queue.events.len();
        *reaped += queue.events.len() as u64;
        for (id, event) in queue.events.drain(..) {
            let own = unsynced.iter_mut().flatten().filter(|write| write.operation == id);
            own.for_each(|write| write.reaped_at = Some(*clock));
            events.push(event);
        }
    }

    fn may_have_events(&mut self) -> bool {
        !self.image.disk().queues[self.index].events.is_empty()
    }

    fn in_flight(&self) -> usize {
        self.image.disk().queues.get(self.index).map_or(0, |queue| queue.in_flight)
    }

    /// The simulated kernel completes operations in flight at any later time.
    fn drain(&mut self, _timeout: Duration) -> bool {
        true
    }
}
