//! One simulated world: a guest, the page cache, a disk and a clock, all driven by one seed.
//!
//! The world calls the cache like `device/` and `cached_image.rs`, but the seed determines the order: copies are late,
//! store operations complete in any order, fail, and tear their writes.

mod checks;
mod effects;
mod freezes;
mod growth;
mod lives;
mod shrinks;
mod sizes;

use std::collections::BTreeMap;

use crate::cache::{
    Access, Admitted, Attempt, CopyResult, Notice, Outcome, PageCache, Piece, Settings, StoreOpRef, Ticket,
};
use crate::prng::Prng;
use crate::units::{Fault, ImageHoles, OpKind, SectorSpan, Tick, Unmap};

use super::Counts;
use super::disk::SimulatedDisk;
use super::failure_oracle::FailureOracle;
use super::memory::{GARBAGE, SimulatedMemory};
use super::operations::{DiskOp, GuestOp, GuestRequest};
use super::oracle::Oracle;
use super::scenario::{BREAKAGES, Scenario, settings};
use growth::Growth;

/// In some worlds page numbers exceed 32 bits. (A multiple of the regions by which the cache requests hole maps and
/// space.)
const HIGH_SECTOR: u64 = 1 << 37;

/// The invariants are recounted once per this many steps: a violation does not disappear again.
const STEPS_PER_CHECK: u64 = 4;

/// Steps between two stops of the daemon, on average.
const STEPS_PER_STOP: u64 = 200;

/// The behaviour of the guest in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    /// It submits new requests.
    Active,
    /// It waits for its requests in flight.
    Waiting,
}

/// A reset of the disk that a failing write indicates: whether the cache has been informed of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    /// The write is in flight.
    Unreported,
    /// The write was reaped, or its daemon died, in this step.
    Reported(u64),
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct World {
    prng: Prng,
    scenario: Scenario,
    settings: Settings,
    cache: PageCache,
    memory: SimulatedMemory,
    /// While the daemon is read-only: the memory that the last writer left.
    memory_of_writer: Option<SimulatedMemory>,
    disk: SimulatedDisk,
    /// The guest uses the end of the image, from this sector on; disk and oracle contain only that part.
    base: u64,
    oracle: Oracle,
    failures: FailureOracle,
    /// The last reset, until a FLUSH has succeeded that was sent after the reset was reported to the cache: until then
    /// a power cut may lose data that earlier FLUSHes covered.
    reset: Option<Reset>,
    now_us: u64,
    step: u64,
    /// Counts the progress of requests: admissions, copies, completions, and operations of the store.
    progress: u64,
    /// The version of the last write.
    version: u32,
    next_ticket: u64,
    requests: BTreeMap<u64, GuestRequest>,
    operations: BTreeMap<u32, DiskOp>,
    /// Pieces to copy, with their requests.
    copies: Vec<(u64, Piece)>,
    /// Requests that the cache has resumed.
    resumable: Vec<u64>,
    /// Requests that the cache has completed, but that have not completed for the guest, and whether they succeeded.
    pending_completions: Vec<(u64, bool)>,
    /// Prints the events on this sector: `GENBLK_SIM_TRACE`.
    traced_sector: Option<u64>,
    pub counts: Counts,
    /// The disk's contents since the cache was frozen.
    frozen_disk: Option<Vec<u32>>,
    /// A Sync has failed, and its daemon died before the failure was reported to it: no daemon can know which data the
    /// disk has lost.
    failed_unreported: bool,
    /// The image grows.
    growth: Option<Growth>,
    /// The image shrinks.
    shrinks: shrinks::Shrinks,
}

impl World {
    /// The world for a seed.
    pub fn new(seed: u64) -> Self {
        let mut prng = Prng::new(seed);
        Self::of(settings(&mut prng), prng)
    }

    /// The world of a cache with these settings, in which all else results from `prng`.
    pub fn of(mut settings: Settings, mut prng: Prng) -> Self {
        let sectors = settings.image_sectors as usize;
        let base = prng.pick(&[0, 0, 0, HIGH_SECTOR]);
        settings.image_sectors += base;
        let zero_slots = prng.pick(&[1, 4, 64]);
        let memory = SimulatedMemory::new(settings.frames, zero_slots);
        let cache = PageCache::new(settings.clone(), Box::new(memory.clone()));
        let hole_percent = if settings.holes == ImageHoles::Possible { prng.pick(&[10, 50, 100]) } else { 0 };
        let disk = SimulatedDisk::new(sectors, |_| prng.percent(hole_percent));
        let scenario = Scenario::new(&mut prng, zero_slots);
        Self {
            oracle: Oracle::new(sectors),
            failures: FailureOracle::default(),
            reset: None,
            prng,
            scenario,
            settings,
            cache,
            memory,
            memory_of_writer: None,
            disk,
            base,
            now_us: 0,
            step: 0,
            progress: 0,
            version: 0,
            next_ticket: 0,
            requests: BTreeMap::new(),
            operations: BTreeMap::new(),
            copies: Vec::new(),
            resumable: Vec::new(),
            pending_completions: Vec::new(),
            traced_sector: std::env::var("GENBLK_SIM_TRACE").ok().and_then(|sector| sector.parse().ok()),
            counts: Counts::default(),
            frozen_disk: None,
            failed_unreported: false,
            growth: None,
            shrinks: shrinks::Shrinks::default(),
        }
    }

    /// Runs the safety phase for `steps` steps, then the liveness phase: see [`super`].
    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.run_step(Guest::Active);
        }
        self.scenario.steps_per_crash = None;
        self.end_reader();
        self.check_age_limit();
        if self.prng.percent(30) {
            self.scenario.broken = self.prng.pick(&BREAKAGES);
            for _ in 0..steps / 3 {
                self.run_step(Guest::Active);
            }
            self.complete_all_requests();
        }
        self.scenario.restarts = false;
        self.scenario.fault_percent = 0;
        self.scenario.broken = &[];
        self.cache.resume();
        self.complete_all_requests();
        self.submit_request(GuestOp::Flush, SectorSpan::new(0, 0));
        self.complete_all_requests();
        self.check_size();
        self.check_power_cut();
    }

    /// One random event, then a worker's turn; in some steps the daemon crashes.
    fn run_step(&mut self, guest: Guest) {
        self.step += 1;
        // A crash during a Sync is the hardest case, so it occurs ten times as often.
        let is_syncing = self.operations.values().any(|op| op.kind == OpKind::Sync);
        let frequency = if is_syncing { 10 } else { 1 };
        let crashes = self.scenario.steps_per_crash.is_some_and(|steps| self.prng.below(steps / frequency) == 0);
        if crashes {
            // Within this step, or at its end if the cache takes fewer steps in memory.
            self.memory.crash_after(self.prng.below(12));
        }
        if guest == Guest::Active && self.scenario.stops && self.prng.below(STEPS_PER_STOP) == 0 {
            self.stop_daemon();
        }
        if self.scenario.freezes {
            self.freeze_or_thaw(guest);
        }
        self.change_disk_size(guest);
        self.change_size();
        let mut worker_runs = true;
        match self.prng.below(10) {
            0..=2 if guest == Guest::Active && self.requests.len() < self.scenario.requests_max => {
                self.submit_random_request();
            }
            3..=4 if !self.copies.is_empty() => self.copy_piece(),
            5 if !self.resumable.is_empty() => {
                let at = self.prng.below(self.resumable.len() as u64) as usize;
                let ticket = self.resumable.swap_remove(at);
                self.admit(ticket, Attempt::Resumed);
            }
            6 if self.prng.percent(3) => {
                self.check_power_cut();
                worker_runs = false;
            }
            7 if self.prng.percent(2) => self.cache.resume(),
            8 if !self.pending_completions.is_empty() => {
                let at = self.prng.below(self.pending_completions.len() as u64) as usize;
                let (ticket, succeeded) = self.pending_completions.swap_remove(at);
                self.complete_for_guest(ticket, succeeded);
            }
            _ => worker_runs = self.advance_time(),
        }
        if worker_runs && !self.memory.has_crashed() {
            self.end_turn();
            if self.prng.percent(10) {
                self.take_immediate_turns();
            }
        }
        if self.scenario.freezes && !crashes {
            self.check_frozen();
        }
        if crashes {
            self.start_next_daemon();
        }
        if worker_runs && !crashes {
            self.assert_progress_possible();
        }
        if crashes || self.step.is_multiple_of(STEPS_PER_CHECK) {
            let pinned: Vec<_> = self.copies.iter().flat_map(|(_, piece)| piece.frames()).collect();
            self.cache.check(&pinned);
        }
    }

    fn submit_random_request(&mut self) {
        let sectors = self.capacity();
        let longest = self.prng.pick(&[1, 8, 24, 200]).min(sectors);
        let count = self.prng.between(1, longest);
        let mut start = self.prng.below(sectors - count + 1);
        if self.prng.percent(50) {
            // A hot tenth of the disk, so that requests overlap.
            start %= (sectors / 10).max(1);
        }
        if self.prng.percent(5) {
            // The image may end within the last page.
            start = sectors - count;
        }
        start = self.start_near_old_end(count).unwrap_or(start);
        let span = SectorSpan::new(start, count.min(sectors - start));
        let op = match self.prng.below(100) {
            0..=79 if self.is_reader() => GuestOp::Read,
            _ if self.is_reader() => return self.submit_request(GuestOp::Flush, SectorSpan::new(0, 0)),
            _ if self.prng.percent(self.scenario.zero_percent) => {
                let unmap = self.prng.pick(&[Unmap::Allowed, Unmap::Forbidden]);
                GuestOp::Zero { unmap }
            }
            0..=39 => GuestOp::Read,
            40..=79 => {
                self.version += 1;
                GuestOp::Write { version: self.version }
            }
            80..=83 => GuestOp::Discard,
            _ => return self.submit_request(GuestOp::Flush, SectorSpan::new(0, 0)),
        };
        let conflicts = |other: &GuestRequest| {
            let overlaps = span.start < other.span.end() && other.span.start < span.end();
            overlaps && (!self.scenario.overlap || op.excludes_others() || other.op.excludes_others())
        };
        if !self.requests.values().any(conflicts) {
            self.submit_request(op, span);
        }
    }

    fn submit_request(&mut self, op: GuestOp, span: SectorSpan) {
        let is_flush = matches!(op, GuestOp::Flush | GuestOp::Freeze { .. });
        let known_sectors = if is_flush { self.disk.sectors() } else { span.count as usize };
        let known = self.oracle.knowledge(span.start as usize, known_sectors);
        match op {
            GuestOp::Write { version } => self.begin_write(span, version),
            GuestOp::Zero { .. } => self.begin_write(span, 0),
            GuestOp::Discard => {
                self.oracle.begin_discard(span);
                for request in self.requests.values_mut() {
                    request.known.forget(span);
                }
            }
            GuestOp::Read | GuestOp::Flush | GuestOp::Freeze { .. } => {}
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.trace(span, || format!("guest sends {ticket}: {op:?} {span:?}"));
        self.requests.insert(ticket, GuestRequest::new(op, span, self.step, Tick::from_us(self.now_us), known));
        self.admit(ticket, Attempt::New);
    }

    fn begin_write(&mut self, span: SectorSpan, version: u32) {
        self.oracle.begin_write(span, version);
        for request in self.requests.values_mut() {
            request.known.add_candidate(span, version);
        }
    }

    /// Passes a request to the cache, or its part that is not yet admitted.
    fn admit(&mut self, ticket: u64, attempt: Attempt) {
        let request = self.requests.get_mut(&ticket).expect("a request that is admitted is in flight");
        let name = Ticket(ticket);
        let span = SectorSpan::new(self.base + request.span.start, request.span.count);
        let access = Access { from: request.admitted, attempt, ..Access::new(name, span) };
        let mut pieces = Vec::new();
        let admitted = match request.op {
            GuestOp::Read => self.cache.read(access, &mut pieces),
            GuestOp::Write { .. } => self.cache.write(access, &mut pieces),
            GuestOp::Zero { unmap } => {
                self.cache.zero(name, span, unmap);
                return;
            }
            GuestOp::Discard => {
                self.cache.discard(name, span);
                return;
            }
            GuestOp::Flush => return self.cache.flush(name),
            GuestOp::Freeze { until_us, holds_reads } => {
                return self.cache.freeze(name, Tick::from_us(until_us), holds_reads);
            }
        };
        if self.memory.has_crashed() {
            return;
        }
        self.copies.extend(pieces.into_iter().map(|piece| (ticket, piece)));
        match admitted {
            Admitted::All => {
                request.admitted = request.span.count as u32;
                self.progress += 1;
            }
            Admitted::Until(at) => {
                self.progress += u64::from(at > request.admitted);
                request.admitted = at;
            }
            Admitted::Refused(at, _) => {
                request.failed = true;
                request.settled += request.span.count - u64::from(at);
                request.admitted = request.span.count as u32;
                self.complete_if_settled(ticket);
            }
        }
    }

    /// Copies one piece between guest and cache; checks the result of a read.
    fn copy_piece(&mut self) {
        let at = self.prng.below(self.copies.len() as u64) as usize;
        let (ticket, piece) = self.copies.swap_remove(at);
        self.progress += 1;
        let request = self.requests.get_mut(&ticket).expect("a piece belongs to a request");
        let copy_fails = matches!(request.op, GuestOp::Write { .. }) && self.prng.percent(2);
        let count = if copy_fails { self.prng.below(u64::from(piece.count)) as usize } else { piece.count as usize };
        for n in 0..count {
            let in_frame = usize::from(piece.first) + n;
            match request.op {
                GuestOp::Read => {
                    let seen = piece.frame.map_or(0, |frame| self.memory.get(frame, in_frame));
                    let sector = request.span.start + u64::from(piece.at) + n as u64;
                    assert!(
                        request.known.allows(piece.at as usize + n, seen),
                        "a read of sector {sector} (page {}) returned version {seen}, expected one of {:?}",
                        sector / 8,
                        request.known
                    );
                    request.seen[piece.at as usize + n] = Some(seen);
                }
                GuestOp::Write { version } => {
                    self.memory.set(piece.frame.expect("a write has memory"), in_frame, version);
                }
                _ => unreachable!("only reads and writes have pieces"),
            }
        }
        request.settled += u64::from(piece.count);
        match request.op {
            GuestOp::Read => self.cache.finish_read(&piece),
            _ if copy_fails => self.cache.finish_write(&piece, CopyResult::Incomplete),
            _ => self.cache.finish_write(&piece, CopyResult::Complete),
        }
        request.copy_failed |= copy_fails;
        if !self.memory.has_crashed() {
            self.complete_if_settled(ticket);
        }
    }

    fn complete_if_settled(&mut self, ticket: u64) {
        let request = &self.requests[&ticket];
        assert!(request.settled <= request.span.count, "I10: more sectors settle than the request has");
        if request.settled == request.span.count {
            let succeeded = !request.failed && !request.copy_failed;
            self.complete_request(ticket, succeeded);
        }
    }

    fn complete_request(&mut self, ticket: u64, succeeded: bool) {
        self.progress += 1;
        if self.scenario.late_completions && self.prng.percent(50) {
            self.pending_completions.push((ticket, succeeded));
        } else {
            self.complete_for_guest(ticket, succeeded);
        }
    }

    /// A request completes for the guest.
    fn complete_for_guest(&mut self, ticket: u64, succeeded: bool) {
        let request = self.requests.remove(&ticket).expect("I10: a request completes once");
        self.counts.requests += 1;
        self.trace(request.span, || format!("completion of {ticket}: {:?}, succeeded: {succeeded}", request.op));
        let (class, now) = (request.op.class(), Tick::from_us(self.now_us));
        let may_end = matches!(request.op, GuestOp::Freeze { .. });
        let may_fail =
            may_end || request.copy_failed || self.failures.may_fail(class, request.sent_at, &self.settings, now);
        assert!(succeeded || may_fail, "{class:?} of {:?} failed without a reason: {:?}", request.span, self.failures);
        match request.op {
            GuestOp::Write { version } => self.end_write(&request, version, succeeded),
            GuestOp::Zero { .. } => self.end_write(&request, 0, succeeded),
            GuestOp::Flush | GuestOp::Freeze { .. } if succeeded => {
                if matches!(self.reset, Some(Reset::Reported(step)) if step < request.sent_step) {
                    self.reset = None;
                }
                self.oracle.complete_flush(&request.known);
                if self.prng.percent(20) {
                    self.check_power_cut();
                }
            }
            GuestOp::Read if succeeded => self.oracle.narrow(request.span, &request.seen, request.sent_step),
            GuestOp::Flush | GuestOp::Freeze { .. } | GuestOp::Read | GuestOp::Discard => {}
        }
    }

    fn end_write(&mut self, request: &GuestRequest, version: u32, succeeded: bool) {
        if succeeded {
            self.oracle.complete_write(request.span, version, request.sent_step, self.step);
        } else {
            self.oracle.fail_write(request.span, version, self.step);
        }
    }

    /// Performs the next effect or completion of an operation, or moves the clock to the cache's next deadline. Returns
    /// false if nothing is reported to the cache: a worker would continue to sleep.
    fn advance_time(&mut self) -> bool {
        let next_event = |op: &DiskOp| if op.failed.is_none() { op.effect_at } else { op.ends_at };
        let next = self.operations.iter().map(|(&tag, op)| (next_event(op), tag)).min();
        let deadline = self.cache.next_deadline().map(|tick| tick.since_us(Tick::ZERO));
        match (next, deadline) {
            (Some((at, tag)), deadline) if deadline.is_none_or(|due| at <= due) => {
                self.now_us = self.now_us.max(at);
                if self.operations[&tag].failed.is_none() {
                    self.take_effect(tag);
                    return false;
                }
                self.complete_operation(tag);
            }
            (_, Some(at)) => self.now_us = self.now_us.max(at),
            _ => {
                self.now_us += 1;
                return false;
            }
        }
        true
    }

    /// An operation in flight takes effect; the cache is notified later.
    fn take_effect(&mut self, tag: u32) {
        let mut op = self.operations.remove(&tag).expect("an operation in flight");
        let failed = self.draw_failure(&op);
        self.apply_to_disk(&op, failed);
        op.failed = Some(failed);
        self.trace(op.span, || format!("operation {tag} takes effect: {:?} {:?}, failed: {failed}", op.kind, op.span));
        self.operations.insert(tag, op);
    }

    fn complete_operation(&mut self, tag: u32) {
        let op = self.operations.remove(&tag).expect("an operation in flight");
        self.progress += 1;
        let failed = op.failed.expect("it has taken effect");
        if self.has_reset(&op) && !self.operations.values().any(|op| self.has_reset(op)) {
            self.reset = Some(Reset::Reported(self.step));
        }
        self.trace(op.span, || format!("operation {tag} completes: {:?}", op.kind));
        let (first, count) = (op.span.start as usize, op.span.count as usize);
        let outcome = match op.kind {
            _ if self.has_reset(&op) => {
                let may_be_a_reset = [Fault::Media, Fault::Fenced, Fault::Gone, Fault::TimedOut];
                Outcome::Failed(self.prng.pick(&may_be_a_reset))
            }
            OpKind::Sync if failed && self.scenario.restarts => Outcome::Failed(Fault::Lost),
            OpKind::Write if failed && self.settings.allocate => Outcome::Failed(Fault::Media),
            _ if failed => Outcome::Failed(self.prng.pick(&[Fault::Media, Fault::NoSpace])),
            OpKind::Map => Outcome::Mapped(op.map.unwrap_or_else(|| self.disk.map(first, count))),
            _ => Outcome::Done,
        };
        if let Outcome::Failed(fault) = outcome
            && fault != Fault::Lost
        {
            self.failures.record_failure(op.kind, fault, &self.settings, Tick::from_us(self.now_us));
        }
        self.cache.complete(tag, &outcome, Tick::from_us(self.now_us));
        self.check_witness();
    }

    /// Ends a worker's turn: submits the operations that the cache requests, and handles its notices.
    fn end_turn(&mut self) {
        self.cache.pump(Tick::from_us(self.now_us));
        if self.memory.has_crashed() {
            return;
        }
        let mut ops = Vec::new();
        let base = self.base;
        self.cache.take_ops(|op: StoreOpRef<'_>| ops.push((op.tag, DiskOp::new(&op, base))));
        for (tag, op) in ops {
            self.submit_operation(tag, op);
        }
        let mut notices = Vec::new();
        self.cache.take_notices(&mut notices);
        for notice in notices {
            match notice {
                Notice::Ready(Ticket(ticket), piece) => self.copies.push((ticket, piece)),
                Notice::Unreadable(Ticket(ticket), sectors, _) => {
                    let request = self.requests.get_mut(&ticket).expect("a notice names a request in flight");
                    request.failed = true;
                    request.settled += u64::from(sectors);
                    self.complete_if_settled(ticket);
                }
                Notice::Resume(Ticket(ticket)) => self.resumable.push(ticket),
                Notice::Done(Ticket(ticket), result) => self.complete_request(ticket, result.is_ok()),
            }
        }
    }

    fn submit_operation(&mut self, tag: u32, mut op: DiskOp) {
        self.progress += 1;
        self.counts.operations += 1;
        self.check_operation(op.kind);
        assert!(!op.kind.is_change() || !self.cache.is_frozen(), "a frozen cache submits {:?}", op.kind);
        let (first, count) = (op.span.start as usize, op.span.count as usize);
        match op.kind {
            OpKind::Write => {
                let frame_sectors = (0..count).map(|n| op.frame_sector(n));
                op.content = frame_sectors.map(|(frame, at)| self.memory.get(frame, at)).collect();
                assert!(!op.content.contains(&GARBAGE), "a write to the disk contains garbage");
                // A Discard that completes after its daemon's crash frees space that the next daemon regards as
                // allocated. A Sync that fails may lose allocations before the failure is reported to the cache.
                let has_lost = self.operations.values().any(|op| op.kind == OpKind::Sync && op.failed == Some(true));
                let space_is_promised = self.settings.allocate && !self.scenario.daemon_crashes && !has_lost;
                let has_space = !space_is_promised || self.disk.has_space(first, count);
                assert!(has_space, "a completed write may fail for lack of space: {:?}", op.span);
            }
            OpKind::Sync => op.began = self.disk.begin_sync(),
            // The map may be determined at submission or at completion: both are correct.
            OpKind::Map if self.prng.percent(50) => op.map = Some(self.disk.map(first, count)),
            _ => {}
        }
        self.trace(op.span, || {
            let at = self.traced_sector.and_then(|sector| sector.checked_sub(op.span.start)).unwrap_or(0) as usize;
            format!("cache submits {tag}: {:?} {:?}, content {:?}", op.kind, op.span, op.content.get(at))
        });
        op.effect_at = self.now_us + self.prng.between(1, self.scenario.latency_us_max);
        op.ends_at = op.effect_at + self.prng.below(self.scenario.latency_us_max);
        self.operations.insert(tag, op);
    }
}
