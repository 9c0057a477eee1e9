//! The guest's requests: submitting them, and judging their results.

use super::super::guest::{Completed, GuestAction, Ring, SECTORS_MAX, Submitted, written};
use super::super::life::Life;
use super::super::oracle::ANY;
use super::World;
use crate::units::SectorSpan;

/// Rounds of the last phase after which a request in flight counts as stuck.
const ROUNDS_MAX: u32 = 100_000;
/// Most effects and reads in flight on a sector: the oracle tries all their orders.
const CONTENTION_MAX: usize = 3;

impl World {
    /// The guest submits a request of a random kind to a random span, unless it has enough in flight.
    pub(super) fn submit_random_request(&mut self) {
        let in_flight: usize = self.rings.iter().map(Ring::in_flight).sum();
        if in_flight >= self.scenario.requests_max {
            return;
        }
        let start = self.start_near_old_end().unwrap_or_else(|| self.prng.below(self.scenario.hot_sectors));
        let longest = self.prng.pick(&[1, 8, SECTORS_MAX]).min(self.settings.image_sectors - start);
        let span = SectorSpan::new(start, self.prng.between(1, longest));
        if self.submit_discard_or_read(span) {
            return;
        }
        let contention_max = if self.scenario.overlap { CONTENTION_MAX } else { 1 };
        if self.oracle.contention(span) >= contention_max {
            return;
        }
        let [reads, writes, zeros, discards] = self.scenario.mix;
        let action = match self.prng.below(100) {
            n if n < reads => GuestAction::Read,
            n if n < reads + writes => GuestAction::Write(self.next_id),
            n if n < reads + writes + zeros => GuestAction::Zero { unmap: self.prng.percent(50) },
            n if n < reads + writes + zeros + discards => GuestAction::Discard,
            _ => GuestAction::Flush(self.oracle.snapshot()),
        };
        let ring = self.prng.below(self.scenario.rings as u64) as usize;
        self.submit(ring, action, span);
    }

    /// Submits a request if its ring has space.
    pub(super) fn submit(&mut self, ring: usize, action: GuestAction, span: SectorSpan) -> bool {
        if !self.rings[ring].has_space() {
            return false;
        }
        let id = self.next_id;
        self.next_id += 1;
        match action {
            GuestAction::Read => self.oracle.begin_read(id, span),
            GuestAction::Write(number) => self.oracle.begin_write(id, span, |sector| written(number, sector)),
            GuestAction::Zero { .. } => self.oracle.begin_write(id, span, |_| 0),
            GuestAction::Discard => self.oracle.begin_write(id, span, |_| ANY),
            GuestAction::Flush(_) => {}
        }
        let request = Submitted { id, action, span, write_through: self.write_through };
        self.rings[ring].submit(request, &mut self.prng);
        true
    }

    /// The driver reads a ring, if it was interrupted.
    pub(super) fn handle_interrupt(&mut self, ring: usize) -> bool {
        if !self.rings[ring].take_interrupt() {
            return false;
        }
        for completed in self.rings[ring].reap() {
            self.complete(completed);
        }
        true
    }

    pub(super) fn complete(&mut self, completed: Completed) {
        let Completed { request, succeeded, values } = completed;
        let Submitted { id, action, span, write_through } = request;
        self.completed += 1;
        self.record_completed(id, &action, span);
        if !matches!(action, GuestAction::Flush(_)) {
            self.check_limits();
        }
        let is_change = matches!(action, GuestAction::Write(_) | GuestAction::Zero { .. } | GuestAction::Discard);
        let may_fail = self.image.has_failed() || self.is_reader && is_change;
        assert!(succeeded || may_fail, "request {id} ({action:?}) fails for no reason");
        assert!(!(succeeded && self.is_reader && is_change), "request {id} ({action:?}) changes a read-only disk");
        match action {
            GuestAction::Read => self.oracle.end_read(id, span, succeeded.then_some(&values[..])),
            GuestAction::Flush(snapshot) if succeeded => {
                self.oracle.complete_flush(&snapshot);
                if self.prng.percent(30) {
                    self.check_power_cut();
                }
            }
            GuestAction::Flush(_) => {}
            GuestAction::Write(_) | GuestAction::Zero { .. } | GuestAction::Discard if succeeded => {
                let is_discard = matches!(action, GuestAction::Discard);
                let durable = !is_discard && write_through.is_some() && write_through == self.write_through;
                self.oracle.complete_write(id, span, durable);
                if durable && self.prng.percent(30) {
                    self.check_power_cut();
                }
            }
            GuestAction::Write(_) | GuestAction::Zero { .. } | GuestAction::Discard => self.oracle.fail_write(id, span),
        }
    }

    /// Runs until no request is in flight and no action of the front-end in progress.
    pub fn complete_all_requests(&mut self) {
        for _ in 0..ROUNDS_MAX {
            self.image.advance(self.now_us);
            let mut progress = self.poll_control();
            self.control_steps += u64::from(progress);
            for worker in 0..self.scenario.workers {
                progress |= self.step_worker(worker);
            }
            for ring in 0..self.scenario.rings {
                progress |= self.handle_interrupt(ring);
            }
            let in_flight: usize = self.rings.iter().map(Ring::in_flight).sum();
            let all_interrupted = self.rings.iter().all(|ring| !ring.awaits_interrupt);
            if in_flight == 0 && all_interrupted && self.session.is_serving() {
                return;
            }
            if !progress {
                let next = self.next_event();
                let at = next.unwrap_or_else(|| panic!("liveness: nothing will complete {in_flight} requests"));
                self.now_us = self.now_us.max(at);
            }
        }
        let (now, next, stats) = (self.now_us, self.image.next_event(), self.life.as_ref().map(Life::describe));
        panic!("liveness: requests do not complete: now {now}, the disk's next event {next:?}, {stats:?}");
    }

    /// The guest reads the whole image.
    pub(super) fn read_everything(&mut self) {
        let sectors = self.settings.image_sectors;
        let mut start = 0;
        while start < sectors {
            let span = SectorSpan::new(start, SECTORS_MAX.min(sectors - start));
            let ring = self.prng.below(self.scenario.rings as u64) as usize;
            if self.submit(ring, GuestAction::Read, span) {
                start = span.end();
            } else {
                self.complete_all_requests();
            }
        }
        self.complete_all_requests();
    }

    /// The guest sends a FLUSH. Returns whether it succeeds.
    pub(super) fn flush(&mut self) -> bool {
        let snapshot = self.oracle.snapshot();
        let span = SectorSpan::new(0, 0);
        let id = self.next_id;
        self.next_id += 1;
        let request = Submitted { id, action: GuestAction::Flush(snapshot), span, write_through: None };
        self.rings[0].submit(request, &mut self.prng);
        loop {
            self.image.advance(self.now_us);
            let mut progress = false;
            for worker in 0..self.scenario.workers {
                progress |= self.step_worker(worker);
            }
            if self.rings[0].take_interrupt() {
                if let Some(completed) = self.rings[0].reap().pop() {
                    let succeeded = completed.succeeded;
                    self.complete(completed);
                    return succeeded;
                }
            } else if !progress {
                let at = self.next_event().expect("liveness: nothing will complete a FLUSH");
                self.now_us = self.now_us.max(at);
            }
        }
    }
}
