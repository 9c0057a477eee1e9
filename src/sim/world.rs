//! One simulated world: a guest, the page cache, a disk, and a clock, all driven by one seed.
//!
//! The world does what `device/` and `cached_image.rs` do with the real cache, in an order that chance decides: copies are
//! done late, operations end in any order, fail, and are torn.

use std::collections::BTreeMap;

use crate::cache::{Access, Admitted, Health, Notice, Outcome, PageCache, Piece, Settings, StoreOpRef, Ticket};
use crate::prng::Prng;
use crate::units::{Fault, FrameId, OpKind, SectorSpan, Tick};

use super::PlantedBug;
use super::disk::Disk;
use super::failure_oracle::{Asked, FailureOracle};
use super::memory::{GARBAGE, Memory};
use super::oracle::{Knowledge, Oracle};
use super::scenario::{BREAKAGES, FailureClass, Scenario, settings};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestOp {
    Read,
    Write { version: u32 },
    Zero { unmap: bool },
    Discard,
    Flush,
}

impl GuestOp {
    fn asked(self) -> Asked {
        match self {
            GuestOp::Read => Asked::Read,
            GuestOp::Write { .. } => Asked::Write,
            GuestOp::Zero { .. } | GuestOp::Discard => Asked::Range,
            GuestOp::Flush => Asked::Flush,
        }
    }

    /// Its end is not defined if another write overlaps it.
    fn excludes_others(self) -> bool {
        matches!(self, GuestOp::Zero { .. } | GuestOp::Discard)
    }
}

/// A guest's request under way.
#[derive(Debug)]
struct GuestRequest {
    kind: GuestOp,
    span: SectorSpan,
    sent: u64,
    sent_at: Tick,
    admitted: u32,
    settled: u64,
    failed: bool,
    /// Bytes of a write could not be copied from the guest.
    cut: bool,
    known: Knowledge,
}

/// A store operation under way.
#[derive(Debug)]
struct DiskOp {
    kind: OpKind,
    span: SectorSpan,
    first_sector: u8,
    frames: Vec<FrameId>,
    /// Write: what the frames held when it was submitted; they must hold it to the end.
    content: Vec<u32>,
    /// Map: the answer, if it was taken at once.
    map: Option<Vec<(u64, bool)>>,
    /// Sync: when it began, on the disk's clock.
    began: u64,
    ends_at: u64,
}

impl DiskOp {
    /// Frame and sector within it of the operation's `n`th sector.
    fn place(&self, n: usize) -> (FrameId, usize) {
        let sector = usize::from(self.first_sector) + n;
        (self.frames[sector / 8], sector % 8)
    }
}

/// A disk that fails is tried again after this time at the latest.
const PAUSE_US_MAX: u64 = 5_000_000;

/// See the module.
#[derive(Debug)]
pub(super) struct World {
    prng: Prng,
    scenario: Scenario,
    settings: Settings,
    planted: Option<PlantedBug>,
    cache: PageCache,
    memory: Memory,
    disk: Disk,
    oracle: Oracle,
    failures: FailureOracle,
    now_us: u64,
    step: u64,
    /// Turns in a row, at one moment, after which nothing was under way.
    turns_in_vain: u32,
    version: u32,
    next_ticket: u64,
    requests: BTreeMap<u64, GuestRequest>,
    operations: BTreeMap<u32, DiskOp>,
    copies: Vec<(u64, Piece)>,
    resumes: Vec<u64>,
    pub completed: u64,
}

impl World {
    /// A world from a seed.
    pub fn new(seed: u64, planted: Option<PlantedBug>) -> Self {
        let mut prng = Prng::new(seed);
        let settings = settings(&mut prng);
        let memory = Memory::new(settings.frames, prng.pick(&[1, 4, 64]));
        let mut cache = PageCache::new(settings.clone(), Box::new(memory.clone()));
        cache.planted = planted;
        let hole_percent = if settings.sparse { prng.pick(&[10, 50, 100]) } else { 0 };
        let sectors = settings.image_sectors as usize;
        let disk = Disk::new(sectors, |_| prng.percent(hole_percent));
        let scenario = Scenario::new(&mut prng);
        Self {
            oracle: Oracle::new(sectors),
            failures: FailureOracle::default(),
            prng,
            scenario,
            settings,
            planted,
            cache,
            memory,
            disk,
            now_us: 0,
            step: 0,
            turns_in_vain: 0,
            version: 0,
            next_ticket: 0,
            requests: BTreeMap::new(),
            operations: BTreeMap::new(),
            copies: Vec::new(),
            resumes: Vec::new(),
            completed: 0,
        }
    }

    /// Safety: chance rules for `steps` steps. Liveness: in some worlds the disk breaks for good, and every request must
    /// complete all the same; then all faults heal, and every request must complete again. Then what the guest wrote
    /// must survive a power cut.
    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.one_step(true);
        }
        self.scenario.steps_per_death = None;
        if self.prng.percent(30) {
            self.scenario.broken = self.prng.pick(&BREAKAGES);
            for _ in 0..steps / 3 {
                self.one_step(true);
            }
            self.settle();
        }
        self.scenario.fault_percent = 0;
        self.scenario.broken = &[];
        self.cache.resume();
        self.settle();
        self.send(GuestOp::Flush, SectorSpan::new(0, 0));
        self.settle();
        self.power_cut();
    }

    fn settle(&mut self) {
        let mut left = 200_000u64;
        while !self.requests.is_empty() {
            self.one_step(false);
            left -= 1;
            let waiting = self.requests.len();
            assert!(left > 0, "liveness: {waiting} requests never complete: {:?}", self.cache.stats());
        }
    }

    fn one_step(&mut self, guest_is_active: bool) {
        self.step += 1;
        // More often while a Sync is out: then most is in doubt.
        let syncing = self.operations.values().any(|op| op.kind == OpKind::Sync);
        let likelier = if syncing { 10 } else { 1 };
        let dies = self.scenario.steps_per_death.is_some_and(|steps| self.prng.below(steps / likelier) == 0);
        if dies {
            // Somewhere within the step, or else after it.
            self.memory.crash_after(self.prng.below(12));
        }
        let mut happened = true;
        match self.prng.below(10) {
            0..=2 if guest_is_active && self.requests.len() < self.scenario.requests_max => self.guest_acts(),
            3..=4 if !self.copies.is_empty() => self.copy_one(),
            5 if !self.resumes.is_empty() => {
                let at = self.prng.below(self.resumes.len() as u64) as usize;
                let ticket = self.resumes.swap_remove(at);
                self.admit(ticket, true);
            }
            6 if self.prng.percent(3) => {
                self.power_cut();
                happened = false;
            }
            7 if self.prng.percent(2) => self.cache.resume(),
            _ => happened = self.time_passes(),
        }
        if happened && !self.memory.is_dead() {
            self.turn_ends();
        }
        if dies {
            self.next_daemon();
        }
        if happened && !dies {
            self.assert_progress_possible();
        }
        let pinned: Vec<_> = self.copies.iter().flat_map(|(_, piece)| piece.frames()).collect();
        self.cache.check(&pinned);
    }

    fn guest_acts(&mut self) {
        let sectors = self.disk.sectors() as u64;
        let longest = self.prng.pick(&[1, 8, 24, 200]).min(sectors);
        let count = self.prng.between(1, longest);
        let mut start = self.prng.below(sectors - count + 1);
        if self.prng.percent(50) {
            // A hot tenth, so that requests meet.
            start %= (sectors / 10).max(1);
        }
        let span = SectorSpan::new(start, count.min(sectors - start));
        let kind = match self.prng.below(100) {
            _ if self.prng.percent(self.scenario.zero_percent) => GuestOp::Zero { unmap: self.prng.percent(50) },
            0..=39 => GuestOp::Read,
            40..=79 => {
                self.version += 1;
                GuestOp::Write { version: self.version }
            }
            80..=83 => GuestOp::Discard,
            _ => return self.send(GuestOp::Flush, SectorSpan::new(0, 0)),
        };
        let clashes = |other: &GuestRequest| {
            let meet = span.start < other.span.end() && other.span.start < span.end();
            meet && (!self.scenario.overlap || kind.excludes_others() || other.kind.excludes_others())
        };
        if !self.requests.values().any(clashes) {
            self.send(kind, span);
        }
    }

    fn send(&mut self, kind: GuestOp, span: SectorSpan) {
        let (first, count) = (span.start as usize, span.count as usize);
        let known_sectors = if kind == GuestOp::Flush { self.disk.sectors() } else { count };
        let known = self.oracle.knowledge(first, known_sectors);
        match kind {
            GuestOp::Write { version } => self.write_starts(first, count, version),
            GuestOp::Zero { .. } => self.write_starts(first, count, 0),
            GuestOp::Discard => {
                self.oracle.discard_starts(first, count);
                for request in self.requests.values_mut() {
                    request.known.forget(first, count);
                }
            }
            GuestOp::Read | GuestOp::Flush => {}
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let sent_at = Tick(self.now_us);
        let request = GuestRequest {
            kind,
            span,
            sent: self.step,
            sent_at,
            admitted: 0,
            settled: 0,
            failed: false,
            cut: false,
            known,
        };
        self.requests.insert(ticket, request);
        self.admit(ticket, false);
    }

    fn write_starts(&mut self, first: usize, count: usize, version: u32) {
        self.oracle.write_starts(first, count, version);
        for request in self.requests.values_mut() {
            request.known.add_candidate(first, count, version);
        }
    }

    /// Brings a request, or what is left of it, before the cache.
    fn admit(&mut self, ticket: u64, resumed: bool) {
        let request = self.requests.get_mut(&ticket).expect("a request that is admitted is under way");
        let name = Ticket(ticket);
        let access = Access { ticket: name, span: request.span, from: request.admitted, resumed };
        let mut pieces = Vec::new();
        let admitted = match request.kind {
            GuestOp::Read => self.cache.read(access, &mut pieces),
            GuestOp::Write { .. } => self.cache.write(access, &mut pieces),
            GuestOp::Zero { unmap } => {
                self.cache.zero(name, request.span, unmap);
                return;
            }
            GuestOp::Discard => {
                self.cache.discard(name, request.span);
                return;
            }
            GuestOp::Flush => return self.cache.flush(name),
        };
        if self.memory.is_dead() {
            return;
        }
        self.copies.extend(pieces.into_iter().map(|piece| (ticket, piece)));
        match admitted {
            Admitted::All => request.admitted = request.span.count as u32,
            Admitted::Until(at) => request.admitted = at,
            Admitted::Refused(at, _) => {
                request.failed = true;
                request.settled += request.span.count - u64::from(at);
                request.admitted = request.span.count as u32;
                self.finish_if_settled(ticket);
            }
        }
    }

    /// Copies one piece, at a time of chance's choice.
    fn copy_one(&mut self) {
        let at = self.prng.below(self.copies.len() as u64) as usize;
        let (ticket, piece) = self.copies.swap_remove(at);
        let request = self.requests.get_mut(&ticket).expect("a piece belongs to a request");
        let cut = matches!(request.kind, GuestOp::Write { .. }) && self.prng.percent(2);
        let count = if cut { self.prng.below(u64::from(piece.count)) as usize } else { piece.count as usize };
        for n in 0..count {
            let place = usize::from(piece.first) + n;
            match request.kind {
                GuestOp::Read => {
                    let seen = piece.frame.map_or(0, |frame| self.memory.get(frame, place));
                    let sector = request.span.start + u64::from(piece.at) + n as u64;
                    assert!(
                        request.known.allows(piece.at as usize + n, seen),
                        "a read of sector {sector} (page {}) returned version {seen}, expected one of {:?}",
                        sector / 8,
                        request.known
                    );
                }
                GuestOp::Write { version } => {
                    self.memory.set(piece.frame.expect("a write has memory"), place, version);
                }
                _ => unreachable!("only reads and writes have pieces"),
            }
        }
        request.settled += u64::from(piece.count);
        match request.kind {
            GuestOp::Read => self.cache.finish_read(&piece),
            _ => self.cache.finish_write(&piece, !cut),
        }
        request.cut |= cut;
        if !self.memory.is_dead() {
            self.finish_if_settled(ticket);
        }
    }

    fn finish_if_settled(&mut self, ticket: u64) {
        let request = &self.requests[&ticket];
        assert!(request.settled <= request.span.count, "I10: more came than was asked for");
        if request.settled == request.span.count {
            let good = !request.failed && !request.cut;
            self.finish(ticket, good);
        }
    }

    fn finish(&mut self, ticket: u64, good: bool) {
        let request = self.requests.remove(&ticket).expect("I10: a request completes once");
        self.completed += 1;
        let (asked, now) = (request.kind.asked(), Tick(self.now_us));
        let excused = good || request.cut || self.failures.may_fail(asked, request.sent_at, &self.settings, now);
        assert!(excused, "{asked:?} of {:?} fails without a reason: {:?}", request.span, self.failures);
        let (first, count) = (request.span.start as usize, request.span.count as usize);
        match request.kind {
            GuestOp::Write { version } => self.oracle.write_ends(first, count, version, request.sent, self.step, good),
            GuestOp::Zero { .. } => self.oracle.write_ends(first, count, 0, request.sent, self.step, good),
            GuestOp::Flush if good => {
                self.oracle.flushed(&request.known);
                if self.prng.percent(20) {
                    self.power_cut();
                }
            }
            GuestOp::Flush | GuestOp::Read | GuestOp::Discard => {}
        }
    }

    /// A request that waits, waits for something: an operation, a copy, or a moment that the cache has named. That moment is
    /// now if the disk is well, else the end of a pause. Turn after turn at one moment must bring something.
    fn assert_progress_possible(&mut self) {
        let under_way = !self.operations.is_empty() || !self.copies.is_empty() || !self.resumes.is_empty();
        let deadline = self.cache.next_deadline();
        let due = deadline.is_some_and(|at| at.0 <= self.now_us);
        self.turns_in_vain = if due && !under_way { self.turns_in_vain + 1 } else { 0 };
        assert!(self.turns_in_vain < 1000, "liveness: turn after turn brings nothing for {:?}", self.requests);
        let soon = self.now_us + PAUSE_US_MAX;
        let named = due || self.cache.health() != Health::Healthy && deadline.is_some_and(|at| at.0 <= soon);
        let somebody = under_way || named || self.requests.is_empty();
        assert!(somebody, "liveness: nothing is under way, and nobody will act for {:?}", self.requests);
    }

    /// The next operation ends, or the clock moves to the cache's next deadline. False: there was neither, and a worker
    /// would sleep on.
    fn time_passes(&mut self) -> bool {
        let next = self.operations.iter().map(|(&tag, op)| (op.ends_at, tag)).min();
        let deadline = self.cache.next_deadline().map(|tick| tick.0);
        match (next, deadline) {
            (Some((ends_at, tag)), deadline) if deadline.is_none_or(|at| ends_at <= at) => {
                self.now_us = self.now_us.max(ends_at);
                self.operation_ends(tag);
            }
            (_, Some(at)) => self.now_us = self.now_us.max(at),
            _ => {
                self.now_us += 1;
                return false;
            }
        }
        true
    }

    fn operation_ends(&mut self, tag: u32) {
        let op = self.operations.remove(&tag).expect("chosen above");
        let failed = self.fails(&op);
        self.reaches_disk(&op, failed);
        let (first, count) = (op.span.start as usize, op.span.count as usize);
        let outcome = match op.kind {
            OpKind::Write if failed && self.settings.allocate => Outcome::Failed(Fault::Media),
            _ if failed => Outcome::Failed(self.prng.pick(&[Fault::Media, Fault::NoSpace])),
            OpKind::Map => Outcome::Mapped(op.map.unwrap_or_else(|| self.disk.map(first, count))),
            _ => Outcome::Done,
        };
        if let Outcome::Failed(fault) = outcome {
            self.failures.failed(op.kind, fault, &self.settings, Tick(self.now_us));
        }
        self.cache.complete(tag, &outcome, Tick(self.now_us));
    }

    /// Whether chance lets an operation fail.
    fn fails(&mut self, op: &DiskOp) -> bool {
        let percent = match self.scenario.fault_percent {
            // Rare, and what hangs on it is most: often enough to be met.
            1.. if op.kind == OpKind::Sync => 30,
            percent => percent,
        };
        let broken = FailureClass::of(op.kind).is_some_and(|class| self.scenario.broken.contains(&class));
        broken || self.prng.percent(percent)
    }

    /// What an operation does to disk and memory, whoever hears of it.
    fn reaches_disk(&mut self, op: &DiskOp, failed: bool) {
        let (first, count) = (op.span.start as usize, op.span.count as usize);
        match op.kind {
            OpKind::Read => {
                for n in 0..count {
                    let (frame, at) = op.place(n);
                    // A failed read leaves anything behind.
                    self.memory.set(frame, at, if failed { GARBAGE } else { self.disk.read(first + n) });
                }
            }
            OpKind::Write => {
                for (n, &version) in op.content.iter().enumerate() {
                    let (frame, at) = op.place(n);
                    assert_eq!(self.memory.get(frame, at), version, "a frame changed on its way to the disk");
                    // A failed write is torn.
                    if !failed || self.prng.percent(50) {
                        self.disk.write(first + n, version);
                    }
                }
            }
            OpKind::Sync => self.disk.sync_ends(op.began, !failed),
            OpKind::Zero { unmap } if !failed => self.disk.zero(first, count, unmap),
            OpKind::Discard if !failed && self.prng.percent(50) => self.disk.zero(first, count, true),
            OpKind::Allocate if !failed => self.disk.allocate(first, count),
            OpKind::Zero { .. } | OpKind::Discard | OpKind::Map | OpKind::Allocate => {}
        }
    }

    fn turn_ends(&mut self) {
        self.cache.pump(Tick(self.now_us));
        if self.memory.is_dead() {
            return;
        }
        let mut plans = Vec::new();
        self.cache.take_ops(|plan: StoreOpRef<'_>| {
            let StoreOpRef { tag, kind, span, first_sector, frames, .. } = plan;
            let frames = frames.to_vec();
            let op = DiskOp { kind, span, first_sector, frames, content: Vec::new(), map: None, began: 0, ends_at: 0 };
            plans.push((tag, op));
        });
        for (tag, op) in plans {
            self.submit(tag, op);
        }
        let mut notices = Vec::new();
        self.cache.take_notices(&mut notices);
        for notice in notices {
            match notice {
                Notice::Ready(Ticket(ticket), piece) => self.copies.push((ticket, piece)),
                Notice::Unreadable(Ticket(ticket), sectors, _) => {
                    let request = self.requests.get_mut(&ticket).expect("a notice is for a request under way");
                    request.failed = true;
                    request.settled += u64::from(sectors);
                    self.finish_if_settled(ticket);
                }
                Notice::Resume(Ticket(ticket)) => self.resumes.push(ticket),
                Notice::Done(Ticket(ticket), result) => self.finish(ticket, result.is_ok()),
            }
        }
    }

    fn submit(&mut self, tag: u32, mut op: DiskOp) {
        let (first, count) = (op.span.start as usize, op.span.count as usize);
        match op.kind {
            OpKind::Write => {
                op.content = (0..count).map(|n| op.place(n)).map(|(frame, at)| self.memory.get(frame, at)).collect();
                assert!(!op.content.contains(&GARBAGE), "garbage on its way to the disk");
                // A discard that has happened and that no daemon lived to hear of has given back what was reserved.
                let promised = self.settings.allocate && !self.scenario.daemon_crashes;
                let has_space = !promised || self.disk.has_space(first, count);
                assert!(has_space, "a write that completed may fail for lack of space: {:?}", op.span);
            }
            OpKind::Sync => op.began = self.disk.sync_begins(),
            // The map is taken now or when the operation ends: both are right answers.
            OpKind::Map if self.prng.percent(50) => op.map = Some(self.disk.map(first, count)),
            _ => {}
        }
        op.ends_at = self.now_us + self.prng.between(1, self.scenario.latency_us_max);
        self.operations.insert(tag, op);
    }

    /// The daemon is dead. What it had sent to the disk ends there, and nobody hears of it; then the next one takes its
    /// memory over, and the front-end hands it what was in flight.
    fn next_daemon(&mut self) {
        self.memory.restore_crash_image();
        for op in std::mem::take(&mut self.operations).into_values() {
            let failed = self.fails(&op);
            self.reaches_disk(&op, failed);
        }
        self.copies.clear();
        self.resumes.clear();
        self.cache = PageCache::new(self.settings.clone(), Box::new(self.memory.clone()));
        self.cache.planted = self.planted;
        self.cache.restore(self.memory.records(), self.memory.pending_zeroes());
        if !self.scenario.replays {
            self.requests.clear();
        }
        for ticket in self.requests.keys().copied().collect::<Vec<_>>() {
            let request = self.requests.get_mut(&ticket).expect("collected above");
            (request.admitted, request.settled, request.failed) = (0, 0, false);
            self.admit(ticket, false);
        }
    }

    /// Looks at what a power cut now would leave; the world goes on as if nothing had happened.
    fn power_cut(&mut self) {
        for sector in 0..self.disk.sectors() {
            let left = self.disk.after_power_cut(sector, &mut self.prng);
            assert!(
                self.oracle.may_survive(sector, left),
                "after a power cut sector {sector} (page {}) holds version {left}: {:?}",
                sector / 8,
                self.oracle.knowledge(sector, 1)
            );
        }
    }
}
