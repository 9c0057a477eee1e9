//! Checks the results that a guest gets, sector by sector.
//!
//! Reads and writes of a sector must be linearizable: each takes effect at one moment between its submission and its
//! completion, and a read returns the last effect before it. The oracle keeps every order of effects that explains all
//! results so far ([`History`]), and fails when none is left (Wing and Gong, "Testing and verifying concurrent
//! objects", 1993; here online, and for one register at a time).
//!
//! In addition, each sector has the set of values that may remain after a power cut (virtio 1.2, section 5.2.6.2). It
//! grows with every write. A write that a FLUSH, or write-through mode, has made durable removes the values of writes
//! that ended before it started.

use crate::units::SectorSpan;

/// The value of a sector. A write gives each of its sectors a unique value; zeros are 0.
pub(super) type SectorValue = u64;
/// Any value: the sector was discarded.
pub(super) const ANY: SectorValue = u64::MAX;
/// After more failed writes than this to a sector, with no success after them, its value counts as unknown.
const FAILED_MAX: usize = 2;

/// Identifies a request of the guest.
pub(super) type RequestId = u64;

/// A write, zero or discard that may take effect.
#[derive(Clone, Copy, Debug)]
struct Effect {
    id: RequestId,
    value: SectorValue,
    submitted: u64,
    /// When it failed: it may still take effect until a later write succeeds.
    failed: Option<u64>,
}

/// An order of effects that explains the results so far, reduced to the state that matters from now on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct History {
    current: SectorValue,
    /// For each read in flight, in the order of their numbers: the values that the sector has had since its submission.
    visible: Vec<Vec<SectorValue>>,
    /// Effects in flight that have taken place.
    applied: Vec<RequestId>,
}

impl History {
    fn apply(&mut self, effect: &Effect) {
        self.current = effect.value;
        self.applied.push(effect.id);
        self.applied.sort_unstable();
        for values in &mut self.visible {
            if let Err(at) = values.binary_search(&effect.value) {
                values.insert(at, effect.value);
            }
        }
    }

    /// The continuations in which effects in flight take place, with a last one that `is_last` accepts.
    fn continuations(&self, effects: &[Effect], is_last: &dyn Fn(&Effect) -> bool, found: &mut Vec<Self>) {
        for effect in effects {
            if self.applied.contains(&effect.id) {
                continue;
            }
            let mut next = self.clone();
            next.apply(effect);
            if is_last(effect) {
                found.push(next);
            } else {
                next.continuations(effects, is_last, found);
            }
        }
    }
}

/// A value that may remain after a power cut.
#[derive(Clone, Copy, Debug)]
struct Survivor {
    id: RequestId,
    value: SectorValue,
    submitted: u64,
    ended: Option<u64>,
    succeeded: bool,
}

#[derive(Clone, Debug)]
struct Sector {
    histories: Vec<History>,
    effects: Vec<Effect>,
    reads: Vec<RequestId>,
    survivors: Vec<Survivor>,
}

fn is(value: SectorValue, seen: SectorValue) -> bool {
    value == seen || value == ANY
}

impl Sector {
    fn holding(value: SectorValue) -> Self {
        let history = History { current: value, visible: Vec::new(), applied: Vec::new() };
        let survivor = Survivor { id: 0, value, submitted: 0, ended: Some(0), succeeded: true };
        Self { histories: vec![history], effects: Vec::new(), reads: Vec::new(), survivors: vec![survivor] }
    }

    /// The values that the sector may have now; `None` while too many effects are in flight.
    fn possible(&self) -> Option<Vec<SectorValue>> {
        self.effects.is_empty().then(|| self.histories.iter().map(|history| history.current).collect())
    }

    fn begin_read(&mut self, id: RequestId) {
        self.reads.push(id);
        for history in &mut self.histories {
            history.visible.push(vec![history.current]);
        }
    }

    /// Ends a read; `seen` is the value that it returned, if it succeeded. Returns whether some history explains that.
    fn end_read(&mut self, id: RequestId, seen: Option<SectorValue>) -> bool {
        let at = self.reads.iter().position(|&read| read == id).expect("a read begins before it ends");
        if let Some(seen) = seen {
            let mut explained = Vec::new();
            for history in &self.histories {
                if history.visible[at].iter().any(|&value| is(value, seen)) {
                    explained.push(history.clone());
                } else {
                    history.continuations(&self.effects, &|effect| is(effect.value, seen), &mut explained);
                }
            }
            self.histories = explained;
        }
        self.reads.remove(at);
        for history in &mut self.histories {
            history.visible.remove(at);
        }
        self.merge();
        !self.histories.is_empty()
    }

    fn begin_effect(&mut self, effect: Effect) {
        self.effects.push(effect);
        let Effect { id, value, submitted, .. } = effect;
        self.survivors.push(Survivor { id, value, submitted, ended: None, succeeded: false });
    }

    /// A request has ended, successfully or not.
    fn end_survivor(&mut self, id: RequestId, now: u64, succeeded: bool) {
        for survivor in self.survivors.iter_mut().filter(|survivor| survivor.id == id) {
            (survivor.ended, survivor.succeeded) = (Some(now), succeeded);
        }
    }

    /// A write that was submitted at `submitted` is durable.
    fn make_durable(&mut self, submitted: u64) {
        self.survivors.retain(|survivor| survivor.ended.is_none_or(|ended| ended >= submitted));
    }

    /// A FLUSH has completed that was sent at `at`, when the sector had one of the values `possible`.
    fn flush(&mut self, at: u64, possible: Option<&[SectorValue]>) {
        let ended_before = |survivor: &Survivor| survivor.ended.is_some_and(|ended| ended <= at);
        let covered = self.survivors.iter().filter(|survivor| survivor.succeeded && ended_before(survivor));
        if let Some(last) = covered.map(|survivor| survivor.submitted).max() {
            self.make_durable(last);
        }
        if let Some(possible) = possible {
            self.survivors.retain(|survivor| !ended_before(survivor) || possible.contains(&survivor.value));
        }
    }

    fn complete_effect(&mut self, id: RequestId) {
        let done = *self.effects.iter().find(|effect| effect.id == id).expect("a write begins before it ends");
        let mut explained = Vec::new();
        for history in &self.histories {
            if history.applied.contains(&id) {
                explained.push(history.clone());
            } else {
                history.continuations(&self.effects, &|effect| effect.id == id, &mut explained);
            }
        }
        self.histories = explained;
        self.retain_effects(|effect| effect.id != id && effect.failed.is_none_or(|at| at >= done.submitted));
        self.merge();
    }

    fn fail_effect(&mut self, id: RequestId, now: u64) {
        let effect = self.effects.iter_mut().find(|effect| effect.id == id).expect("a write begins before it ends");
        effect.failed = Some(now);
        self.end_survivor(id, now, false);
        if self.effects.iter().filter(|effect| effect.failed.is_some()).count() > FAILED_MAX {
            self.retain_effects(|effect| effect.failed.is_none());
            self.histories.iter_mut().for_each(|history| history.current = ANY);
            self.histories.iter_mut().flat_map(|history| &mut history.visible).for_each(|values| values.push(ANY));
            self.survivors.push(Survivor { id: 0, value: ANY, submitted: now, ended: Some(now), succeeded: false });
            self.merge();
        }
    }

    /// The effects of these requests have taken place already, or never will.
    fn settle(&mut self, requests: &[RequestId]) {
        let open: Vec<Effect> = self.effects.iter().filter(|effect| requests.contains(&effect.id)).copied().collect();
        let mut at = 0;
        while at < self.histories.len() && !open.is_empty() {
            let history = self.histories[at].clone();
            history.continuations(&open, &|_| true, &mut self.histories);
            at += 1;
        }
    }

    /// These requests are lost.
    fn lose(&mut self, lost: &[RequestId], now: u64) {
        self.settle(lost);
        lost.iter().for_each(|&id| self.end_survivor(id, now, false));
        self.retain_effects(|effect| !lost.contains(&effect.id));
        self.merge();
    }

    /// These requests are executed again.
    fn repeat(&mut self, repeated: &[RequestId]) {
        self.settle(repeated);
        for history in &mut self.histories {
            history.applied.retain(|id| !repeated.contains(id));
        }
        self.merge();
    }

    /// These requests may be executed again.
    fn may_repeat(&mut self, requests: &[RequestId]) {
        let mut once = self.clone();
        once.settle(requests);
        self.repeat(requests);
        self.histories.append(&mut once.histories);
        self.merge();
    }

    fn retain_effects(&mut self, keep: impl Fn(&Effect) -> bool) {
        self.effects.retain(keep);
        let effects = &self.effects;
        for history in &mut self.histories {
            history.applied.retain(|id| effects.iter().any(|effect| effect.id == *id));
        }
    }

    /// Removes duplicate histories.
    fn merge(&mut self) {
        if self.histories.len() > 1 {
            self.histories.sort_unstable();
            self.histories.dedup();
        }
    }
}

/// The guest's knowledge of the disk when it sent a FLUSH.
#[derive(Clone, Debug)]
pub(super) struct OracleSnapshot {
    at: u64,
    possible: Vec<Option<Vec<SectorValue>>>,
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Oracle {
    sectors: Vec<Sector>,
    /// Counts events.
    clock: u64,
}

impl Oracle {
    /// The oracle of a disk with these values, which are durable.
    pub fn new(values: impl Iterator<Item = SectorValue>) -> Self {
        Self { sectors: values.map(Sector::holding).collect(), clock: 1 }
    }

    /// The disk has grown by sectors with these values, which are durable.
    pub fn grow(&mut self, values: &[SectorValue]) {
        self.sectors.extend(values.iter().copied().map(Sector::holding));
    }

    /// The disk has shrunk to its former size.
    pub fn shrink(&mut self, sectors: u64) {
        self.sectors.truncate(sectors as usize);
    }

    fn over(&mut self, span: SectorSpan) -> &mut [Sector] {
        self.clock += 1;
        &mut self.sectors[span.start as usize..span.end() as usize]
    }

    /// The largest number of effects in flight on any sector of `span`.
    pub fn contention(&self, span: SectorSpan) -> usize {
        let sectors = &self.sectors[span.start as usize..span.end() as usize];
        sectors.iter().map(|sector| sector.effects.len() + sector.reads.len()).max().unwrap_or(0)
    }

    pub fn begin_read(&mut self, id: RequestId, span: SectorSpan) {
        self.over(span).iter_mut().for_each(|sector| sector.begin_read(id));
    }

    /// A read ends with the values that it returned; `None`: it failed or is lost.
    pub fn end_read(&mut self, id: RequestId, span: SectorSpan, seen: Option<&[SectorValue]>) {
        for (n, sector) in self.over(span).iter_mut().enumerate() {
            let value = seen.map(|values| values[n]);
            let before = sector.clone();
            let at = span.start + n as u64;
            assert!(
                sector.end_read(id, value),
                "request {id} read {:#x} in sector {at} (page {}), which no order of effects explains: {before:#x?}",
                value.unwrap_or(ANY),
                at / 8
            );
        }
    }

    /// A write is submitted; `value` returns the value for each sector.
    pub fn begin_write(&mut self, id: RequestId, span: SectorSpan, value: impl Fn(u64) -> SectorValue) {
        self.clock += 1;
        let submitted = self.clock;
        for (n, sector) in (span.start..).zip(self.over(span)) {
            sector.begin_effect(Effect { id, value: value(n), submitted, failed: None });
        }
    }

    /// A write succeeds. If it is `durable`, only its values or those of writes that it did not follow may remain after
    /// a power cut.
    pub fn complete_write(&mut self, id: RequestId, span: SectorSpan, durable: bool) {
        self.clock += 1;
        let now = self.clock;
        for sector in self.over(span) {
            let submitted = sector.effects.iter().find(|effect| effect.id == id).map(|effect| effect.submitted);
            sector.complete_effect(id);
            sector.end_survivor(id, now, true);
            if durable {
                sector.make_durable(submitted.expect("a write begins before it ends"));
            }
        }
    }

    pub fn fail_write(&mut self, id: RequestId, span: SectorSpan) {
        self.clock += 1;
        let now = self.clock;
        self.over(span).iter_mut().for_each(|sector| sector.fail_effect(id, now));
    }

    /// These requests are lost: effects that have not taken place never will.
    pub fn lose_writes(&mut self, lost: &[RequestId]) {
        self.clock += 1;
        let now = self.clock;
        self.sectors.iter_mut().for_each(|sector| sector.lose(lost, now));
    }

    /// The next daemon executes these requests again, whether or not they have already taken effect.
    pub fn repeat_writes(&mut self, repeated: &[RequestId]) {
        self.sectors.iter_mut().for_each(|sector| sector.repeat(repeated));
    }

    /// These requests may be executed again, whether or not they have already taken effect.
    pub fn may_repeat_writes(&mut self, requests: &[RequestId]) {
        if !requests.is_empty() {
            self.sectors.iter_mut().for_each(|sector| sector.may_repeat(requests));
        }
    }

    /// The state that a FLUSH sent now must make durable.
    pub fn snapshot(&mut self) -> OracleSnapshot {
        self.clock += 1;
        OracleSnapshot { at: self.clock, possible: self.sectors.iter().map(Sector::possible).collect() }
    }

    /// The FLUSH of this snapshot succeeds.
    pub fn complete_flush(&mut self, snapshot: &OracleSnapshot) {
        self.clock += 1;
        for (sector, possible) in self.sectors.iter_mut().zip(&snapshot.possible) {
            if sector.survivors.len() > 1 {
                sector.flush(snapshot.at, possible.as_deref());
            }
        }
    }

    /// Checks that `value` may remain in a sector after a power cut.
    pub fn check_survivor(&self, at: usize, value: SectorValue) {
        let sector = &self.sectors[at];
        let allowed = sector.survivors.iter().any(|survivor| is(survivor.value, value));
        assert!(allowed, "a power cut leaves {value:#x} in sector {at} (page {}): {sector:#x?}", at / 8);
    }

    /// Whether a sector may hold this value now, according to all results so far.
    pub fn may_hold(&self, at: usize, value: SectorValue) -> bool {
        let sector = &self.sectors[at];
        sector.histories.iter().any(|history| is(history.current, value)) || !sector.effects.is_empty()
    }

    /// Checks that the image, with no request in flight and the cache written back, has a value that the guest could
    /// read.
    pub fn check_quiet(&self, at: usize, value: SectorValue) {
        let sector = &self.sectors[at];
        assert!(self.may_hold(at, value), "the image holds {value:#x} in sector {at} (page {}): {sector:#x?}", at / 8);
    }
}

#[test]
fn a_replayed_write_may_overwrite_one_that_completed_meanwhile() {
    let read_back = |is_repeated: bool, value| {
        let mut sector = Sector::holding(0);
        let effect = |id| Effect { id, value: id, submitted: id, failed: None };
        sector.begin_effect(effect(1));
        sector.begin_read(2);
        assert!(sector.end_read(2, Some(1)), "a write in flight may be read");
        sector.begin_effect(effect(3));
        sector.complete_effect(3);
        if is_repeated {
            sector.may_repeat(&[1]);
        }
        sector.complete_effect(1);
        sector.begin_read(4);
        sector.end_read(4, Some(value))
    };
    assert!(read_back(true, 1) && read_back(true, 3));
    assert!(!read_back(false, 1) && read_back(false, 3), "each write takes effect once");
}
