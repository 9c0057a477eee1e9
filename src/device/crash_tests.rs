//! A daemon is killed between any two stores of a ring: the next daemon completes exactly the requests that the driver
//! still waits for.
//!
//! The test explores a small world exhaustively: a queue of two descriptors, in which the driver places a few requests,
//! and every order in which the ring can take, complete and publish them. In each step the daemon dies in every way
//! that the order of the step's stores allows, and the next daemon dies in the same ways while it recovers.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileMemory};

use super::control::RingSetup;
use super::inflight::{InflightTracker, ring_bytes};
use super::ring::Ring;
use crate::fault_injection::{PlantedBug, run_with};
use crate::shared_memory::trace::{TraceEvent, crash_states, record};
use crate::virtio::GuestRam;
use crate::virtio::split::{QueueLayout, QueuePosition};

/// Descriptors of the queue. Each request is one.
const SIZE: u16 = 2;
/// Requests that the driver makes.
const REQUESTS: u16 = 4;
/// The queue's first position: its indices wrap after two requests.
const START: u16 = u16::MAX - 1;

/// Offset of the version in a ring's part of the inflight region.
const VERSION_AT: usize = 8;
const AVAIL: u64 = 0x100;
const USED: u64 = 0x200;
const RAM_BYTES: usize = 0x300;
const LAYOUT: QueueLayout =
    QueueLayout { size: SIZE, desc_table: 0, avail_ring: AVAIL, used_ring: USED, event_idx: false };

/// All memory that outlives a daemon.
struct Memory {
    ram: Arc<GuestRam>,
    inflight: Arc<MmapRegion>,
}

impl Memory {
    fn new() -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap();
        Self {
            ram: Arc::new(GuestRam::new(Arc::new(ram))),
            inflight: Arc::new(MmapRegion::new(ring_bytes(SIZE)).unwrap()),
        }
    }

    /// Its bytes: those of guest memory, then those of the inflight region.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM_BYTES + ring_bytes(SIZE)];
        let (ram, inflight) = bytes.split_at_mut(RAM_BYTES);
        self.ram.read_slice(ram, GuestAddress(0)).unwrap();
        self.inflight.as_volatile_slice().copy_to(inflight);
        bytes
    }

    fn set_bytes(&self, bytes: &[u8]) {
        let (ram, inflight) = bytes.split_at(RAM_BYTES);
        self.ram.write_slice(ram, GuestAddress(0)).unwrap();
        self.inflight.as_volatile_slice().copy_from(inflight);
    }

    /// `before` with the stores of `events` to this memory.
    fn after<'a>(&self, before: &[u8], events: impl IntoIterator<Item = &'a TraceEvent>) -> Vec<u8> {
        let mut bytes = before.to_vec();
        let ram = self.ram.slice(GuestAddress(0), RAM_BYTES).unwrap().ptr_guard().as_ptr().addr();
        let inflight = self.inflight.as_ptr().addr();
        for event in events {
            let TraceEvent::Store(store) = event else { panic!("a ring changes no file") };
            let at = match store.address.checked_sub(inflight).filter(|&at| at < ring_bytes(SIZE)) {
                Some(at) => RAM_BYTES + at,
                None => store.address - ram,
            };
            bytes[at..at + store.bytes.len()].copy_from_slice(&store.bytes);
        }
        bytes
    }

    /// The ring of a new daemon, to which the front-end sends the base `base`.
    fn ring(&self, base: u16) -> Ring {
        let setup = RingSetup {
            layout: LAYOUT,
            position: QueuePosition { next_avail: base, next_used: base },
            kick: File::open("/dev/null").unwrap(),
            call_fd: None,
            err_fd: None,
            memory: Arc::clone(&self.ram),
            tracker: Some(InflightTracker::new(Arc::clone(&self.inflight), 0, SIZE)),
        };
        Ring::new("disk", 0, setup)
    }

    fn le16(&self, at: u64) -> u16 {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }
}

fn entry(index: u16) -> u64 {
    u64::from(index % SIZE)
}

/// The bytes that the request at an available index writes to guest memory.
fn length_of(index: u16) -> u32 {
    1000 + u32::from(index)
}

/// The state of the driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Driver {
    submitted: u16,
    /// Number of used elements that it has read.
    seen: u16,
    /// The requests that it waits for, in the order of submission: available index and head of each.
    waiting: VecDeque<(u16, u16)>,
}

impl Driver {
    /// The head of its next request; `None`: all requests are submitted, or all descriptors are in use.
    fn free_head(&self) -> Option<u16> {
        let is_free = |head: &u16| self.waiting.iter().all(|(_, used)| used != head);
        (0..SIZE).find(is_free).filter(|_| self.submitted < REQUESTS)
    }

    fn submit(&mut self, memory: &Memory, head: u16) {
        let index = START.wrapping_add(self.submitted);
        memory.ram.write_obj(head, GuestAddress(AVAIL + 4 + entry(index) * 2)).unwrap();
        memory.ram.write_obj(index.wrapping_add(1), GuestAddress(AVAIL + 2)).unwrap();
        self.submitted += 1;
        self.waiting.push_back((index, head));
    }

    /// Takes the new elements of the used ring.
    fn reap(&mut self, memory: &Memory) -> Result<(), String> {
        while START.wrapping_add(self.seen) != memory.le16(USED + 2) {
            let element = USED + 4 + entry(START.wrapping_add(self.seen)) * 8;
            let [head, len]: [u32; 2] = [0, 4].map(|at| memory.ram.read_obj(GuestAddress(element + at)).unwrap());
            let request = self.waiting.iter().position(|&(_, waiting)| u32::from(waiting) == head);
            let Some((index, _)) = request.and_then(|at| self.waiting.remove(at)) else {
                return Err(format!("the used ring has head {head}, for which nothing waits: {self:?}"));
            };
            if len != length_of(index) {
                return Err(format!("request {index} completes with length {len}"));
            }
            self.seen += 1;
        }
        Ok(())
    }

    /// Checks that the ring of a new daemon takes the requests that the driver waits for, each once and in order.
    fn check_taken(&self, ring: &mut Ring) -> Result<(), String> {
        let (mut taken, mut heads) = (Vec::new(), Vec::new());
        while ring.has_more() {
            ring.take(1, &mut heads);
            if heads.is_empty() {
                break;
            }
            taken.append(&mut heads);
        }
        let waiting: Vec<u16> = self.waiting.iter().map(|&(_, head)| head).collect();
        if taken == waiting { Ok(()) } else { Err(format!("the next daemon takes {taken:?}; {waiting:?} wait")) }
    }
}

/// How a planted bug changes the stores of a step.
type Reordering = fn(&mut Vec<TraceEvent>);

/// The state of the world, and the progress of its exploration.
struct World {
    live: Memory,
    /// The memory of the next daemon.
    scratch: Memory,
    reordering: Reordering,
    /// The daemon's last step, if the driver has done nothing since: the memory before it, and its events. The compiler
    /// may move relaxed stores of the next step before them.
    last: Option<(Vec<u8>, Vec<TraceEvent>)>,
    /// The crashes that are already checked.
    checked: HashSet<(Vec<u8>, Driver)>,
    /// The choices of this run, each with its number of possibilities.
    choices: Vec<(usize, usize)>,
    /// Number of choices made so far in this run.
    made: usize,
}

impl World {
    fn new(reordering: Reordering) -> Self {
        Self {
            live: Memory::new(),
            scratch: Memory::new(),
            reordering,
            last: None,
            checked: HashSet::new(),
            choices: Vec::new(),
            made: 0,
        }
    }

    /// One of `count` possibilities. Over all runs, each one is chosen after every sequence of earlier choices.
    fn choose(&mut self, count: usize) -> usize {
        if self.made == self.choices.len() {
            self.choices.push((0, count));
        }
        self.made += 1;
        self.choices[self.made - 1].0
    }

    /// Moves on to the next sequence of choices; returns whether there is one.
    fn next_run(&mut self) -> bool {
        self.made = 0;
        while let Some((chosen, count)) = self.choices.pop() {
            if chosen + 1 < count {
                self.choices.push((chosen + 1, count));
                return true;
            }
        }
        false
    }

    /// Runs a step of the daemon, and checks the remaining memory for each way in which the daemon can die in it.
    fn step<R>(&mut self, driver: &Driver, step: impl FnOnce(&Memory) -> R) -> Result<R, String> {
        let before = self.live.bytes();
        let (result, mut events) = record(|| step(&self.live));
        (self.reordering)(&mut events);
        let (earlier, last) = self.last.take().unwrap_or((before.clone(), Vec::new()));
        for state in crash_states(&[last, events.clone()].concat()) {
            let crashed = self.live.after(&earlier, state);
            self.check_crash(&crashed, driver, 1)?;
        }
        self.last = Some((before, events));
        Ok(result)
    }

    /// Checks what the next daemon does with memory of these bytes, and the memory that remains if it and `more_deaths
    /// - 1` of its successors die while they recover.
    fn check_crash(&mut self, bytes: &[u8], driver: &Driver, more_deaths: u32) -> Result<(), String> {
        if !self.checked.insert((bytes.to_vec(), driver.clone())) {
            return Ok(());
        }
        self.scratch.set_bytes(bytes);
        let mut driver = driver.clone();
        driver.reap(&self.scratch)?;
        // QEMU sends an old used index, cloud-hypervisor the available index; before the region is initialized, all
        // front-ends send the base with which the queue started.
        let is_initialized = InflightTracker::new(Arc::clone(&self.scratch.inflight), 0, SIZE).is_initialized();
        let bases = if is_initialized { vec![START, START.wrapping_add(driver.submitted)] } else { vec![START] };
        for base in bases {
            self.scratch.set_bytes(bytes);
            let (mut ring, events) = record(|| self.scratch.ring(base));
            driver.check_taken(&mut ring)?;
            if more_deaths > 0 {
                for state in crash_states(&events) {
                    let crashed = self.scratch.after(bytes, state);
                    self.check_crash(&crashed, &driver, more_deaths - 1)?;
                }
            }
        }
        Ok(())
    }

    /// One run: until every request has completed.
    fn run(&mut self) -> Result<(), String> {
        // An inflight region of version 0, with arbitrary contents.
        let mut bytes = [vec![0; RAM_BYTES], vec![0xff; ring_bytes(SIZE)]].concat();
        bytes[RAM_BYTES + VERSION_AT..][..2].fill(0);
        self.live.set_bytes(&bytes);
        self.live.ram.write_obj(START, GuestAddress(AVAIL + 2)).unwrap();
        self.live.ram.write_obj(START, GuestAddress(USED + 2)).unwrap();
        self.last = None;
        let mut driver = Driver::default();
        let mut ring = self.step(&driver, |memory| memory.ring(START))?;
        // Requests that the ring has taken, and the number of used elements that it has not published.
        let (mut taken, mut unpublished) = (Vec::new(), 0);
        while driver.seen < REQUESTS {
            let untaken = driver.waiting.len() - taken.len() - unpublished;
            let mut steps = Vec::new();
            steps.extend(driver.free_head().map(RingStep::Submit));
            steps.extend((1..=untaken).map(RingStep::Take));
            steps.extend((0..taken.len()).map(RingStep::Complete));
            steps.extend((unpublished > 0).then_some(RingStep::Publish));
            let chosen = self.choose(steps.len());
            match steps[chosen] {
                RingStep::Submit(head) => {
                    driver.submit(&self.live, head);
                    self.last = None;
                }
                RingStep::Take(count) => {
                    let mut heads = Vec::new();
                    self.step(&driver, |_| ring.take(count, &mut heads))?;
                    assert_eq!(heads.len(), count, "the heads are available");
                    let request = |head| *driver.waiting.iter().find(|(_, waiting)| *waiting == head).unwrap();
                    taken.extend(heads.into_iter().map(request));
                }
                RingStep::Complete(at) => {
                    let (index, head) = taken.remove(at);
                    self.step(&driver, |_| ring.push_used(head, length_of(index)))?;
                    unpublished += 1;
                }
                RingStep::Publish => {
                    self.step(&driver, |_| ring.publish())?;
                    driver.reap(&self.live)?;
                    self.last = None;
                    unpublished = 0;
                }
            }
        }
        Ok(())
    }

    /// All runs, until one fails.
    fn explore(&mut self) -> Result<(), String> {
        loop {
            self.run()?;
            if !self.next_run() {
                return Ok(());
            }
        }
    }
}

/// The possible next steps.
#[derive(Clone, Copy)]
enum RingStep {
    /// The driver makes a request available.
    Submit(u16),
    /// The ring takes this many heads.
    Take(usize),
    /// The ring pushes one of the requests that it has taken onto the used ring.
    Complete(usize),
    Publish,
}

#[test]
fn a_request_in_flight_at_a_crash_completes_exactly_once() {
    let mut world = World::new(|_| {});
    world.explore().unwrap();
    println!("{} crashes", world.checked.len());
    assert!(world.checked.len() > 500, "only {} different crashes", world.checked.len());
}

// The exploration finds what it is meant to find: a planted bug, and the same stores in a wrong order.

#[test]
fn the_crash_check_catches_marks_cleared_before_the_used_index_is_published() {
    let found = run_with(Some(PlantedBug::InflightClearedBeforePublishing), || World::new(|_| {}).explore());
    assert!(found.expect("it returns what it finds").is_err());
}

/// Lengths of the stores of a step. Taking stores counter and mark of each head (8, 1); completing stores the used
/// element and the links of the batch (4, 4, 2, 2); publishing stores the used index, clears the marks and records the
/// index (2, 1 ..., 2).
fn lengths(events: &[TraceEvent]) -> Vec<usize> {
    events.iter().map(|event| if let TraceEvent::Store(store) = event { store.bytes.len() } else { 0 }).collect()
}

/// Fails the test unless the exploration fails with this reordering.
#[track_caller]
fn assert_found(reordering: Reordering) {
    let found = World::new(reordering).explore();
    println!("{found:?}");
    assert!(found.is_err());
}

#[test]
fn the_crash_check_catches_an_index_recorded_before_the_marks_are_cleared() {
    assert_found(|events| {
        if matches!(lengths(events)[..], [2, 1, .., 2]) {
            events[1..].rotate_right(1);
        }
    });
}

#[test]
fn the_crash_check_catches_a_mark_set_before_its_counter() {
    assert_found(|events| {
        if lengths(events).starts_with(&[8, 1]) {
            events.chunks_mut(2).for_each(<[TraceEvent]>::reverse);
        }
    });
}

#[test]
fn the_crash_check_catches_a_region_marked_initialized_too_early() {
    assert_found(|events| {
        if lengths(events).starts_with(&[1, 1, 2, 2, 2]) {
            events.rotate_right(1);
        }
    });
}

#[test]
fn no_more_requests_are_in_flight_than_the_queue_has_descriptors() {
    let memory = Memory::new();
    let mut ring = memory.ring(START);
    let take_up_to = |ring: &mut Ring, available: u16| {
        memory.ram.write_obj(START.wrapping_add(available), GuestAddress(AVAIL + 2)).unwrap();
        let (has_more, mut heads) = (ring.has_more(), Vec::new());
        ring.take(8, &mut heads);
        (has_more, heads.len())
    };
    assert_eq!(take_up_to(&mut ring, SIZE), (true, 2));
    assert_eq!(take_up_to(&mut ring, 2 * SIZE), (false, 0), "the driver reuses descriptors that are in flight");
    ring.push_used(0, 0);
    ring.publish();
    assert_eq!(take_up_to(&mut ring, 2 * SIZE), (true, 1));
}

#[test]
fn a_request_returned_to_the_driver_is_not_marked_in_flight() {
    let memory = Memory::new();
    let mut ring = memory.ring(START);
    let mut driver = Driver::default();
    [0, 1].into_iter().for_each(|head| driver.submit(&memory, head));
    ring.take(2, &mut Vec::new());
    ring.push_used(0, 0);
    ring.publish();
    ring.suspend(1);
    ring.return_suspended();
    assert_eq!(ring.position().next_avail, START.wrapping_add(1));
    let mut next = InflightTracker::new(Arc::clone(&memory.inflight), 0, SIZE);
    assert_eq!(next.recover(memory.le16(USED + 2)), Some(Vec::new()));
}

#[test]
fn a_suspended_request_is_taken_again_after_a_change_of_memory() {
    let memory = Memory::new();
    let mut ring = memory.ring(START);
    Driver::default().submit(&memory, 1);
    ring.take(1, &mut Vec::new());
    ring.suspend(1);
    assert!(ring.is_drained() && !ring.has_more());
    ring.set_memory(&memory.ram);
    let (has_more, mut heads) = (ring.has_more(), Vec::new());
    ring.take(1, &mut heads);
    assert_eq!((has_more, heads), (true, vec![1]));
}

#[test]
fn a_call_descriptor_set_late_gets_the_pending_interrupt() {
    let memory = Memory::new();
    // The previous daemon may have died between a completion and its interrupt.
    let mut ring = memory.ring(START);
    let (mut interrupts, call_fd) = std::io::pipe().unwrap();
    ring.set_call_fd(Some(File::from(OwnedFd::from(call_fd))));
    drop(ring);
    let mut count = Vec::new();
    interrupts.read_to_end(&mut count).unwrap();
    assert_eq!(count, 1u64.to_ne_bytes());
}
