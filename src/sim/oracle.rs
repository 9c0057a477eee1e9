//! The data oracle: for each sector the versions that the guest may read now, and those that it may find after a power
//! cut.
//!
//! virtio 1.2, section 5.2.6.2: a write is stable once a FLUSH that was sent after its completion has completed.

use crate::units::SectorSpan;

/// A write to a sector from the guest's point of view. Times are steps of the world.
#[derive(Clone, Copy, Debug)]
struct PossibleWrite {
    version: u32,
    ended: Option<u64>,
}

/// Versions of a sector, usually so few that they need no allocation.
#[derive(Clone, Debug, Default)]
struct Versions {
    first: [u32; 3],
    len: u8,
    more: Vec<u32>,
}

impl Versions {
    fn push(&mut self, version: u32) {
        match self.first.get_mut(usize::from(self.len)) {
            Some(free) => {
                *free = version;
                self.len += 1;
            }
            None => self.more.push(version),
        }
    }

    fn contains(&self, version: u32) -> bool {
        self.first[..usize::from(self.len)].contains(&version) || self.more.contains(&version)
    }
}

impl FromIterator<u32> for Versions {
    fn from_iter<I: IntoIterator<Item = u32>>(versions: I) -> Self {
        let mut collected = Self::default();
        versions.into_iter().for_each(|version| collected.push(version));
        collected
    }
}

#[derive(Clone, Debug)]
struct Sector {
    /// The writes whose version a read may return.
    current: Vec<PossibleWrite>,
    /// The versions that the sector may hold after a power cut; `None`: any version, because it was discarded and no
    /// later write is stable.
    durable: Option<Versions>,
    /// Discarded, and not written since: a read may return any version.
    unconstrained: bool,
}

/// The guest's knowledge of the disk.
#[derive(Debug)]
pub(super) struct Oracle {
    sectors: Vec<Sector>,
}

/// The versions that a request may find, by sector, according to the knowledge when it was sent; `None`: any.
#[derive(Clone, Debug)]
pub(super) struct Knowledge {
    first: usize,
    allowed: Vec<Option<Versions>>,
}

impl Oracle {
    /// The oracle of a disk of `count` sectors that hold version 0.
    pub fn new(count: usize) -> Self {
        Self::of(&vec![0; count])
    }

    /// The oracle of a disk that holds these versions.
    pub fn of(versions: &[u32]) -> Self {
        let sector = |&version: &u32| Sector {
            current: vec![PossibleWrite { version, ended: Some(0) }],
            durable: Some([version].into_iter().collect()),
            unconstrained: false,
        };
        Self { sectors: versions.iter().map(sector).collect() }
    }

    /// The disk has grown by sectors that hold these versions.
    pub fn grow(&mut self, versions: &[u32]) {
        self.sectors.append(&mut Self::of(versions).sectors);
    }

    /// The disk was cut to `sectors` sectors.
    pub fn cut(&mut self, sectors: usize) {
        self.sectors.truncate(sectors);
    }

    fn sectors_of(&mut self, span: SectorSpan) -> &mut [Sector] {
        &mut self.sectors[span.start as usize..span.end() as usize]
    }

    /// The guest sends a write, or a zero (version 0).
    pub fn begin_write(&mut self, span: SectorSpan, version: u32) {
        for sector in self.sectors_of(span) {
            sector.current.push(PossibleWrite { version, ended: None });
            if let Some(durable) = &mut sector.durable {
                durable.push(version);
            }
        }
    }

    /// The write that was sent at `sent` succeeds at `now`.
    pub fn complete_write(&mut self, span: SectorSpan, version: u32, sent: u64, now: u64) {
        self.end_write(span, version, now);
        for sector in self.sectors_of(span) {
            // It overwrote every write that had ended before it was sent.
            sector.current.retain(|c| c.ended.is_none_or(|ended| ended >= sent));
            sector.unconstrained = false;
        }
    }

    /// The write fails at `now`: any part of it may be on the disk.
    pub fn fail_write(&mut self, span: SectorSpan, version: u32, now: u64) {
        self.end_write(span, version, now);
    }

    fn end_write(&mut self, span: SectorSpan, version: u32, now: u64) {
        for sector in self.sectors_of(span) {
            let own = sector.current.iter_mut().find(|c| c.version == version && c.ended.is_none());
            own.expect("a write begins before it ends").ended = Some(now);
        }
    }

    /// A read that was sent at `sent` has returned `seen`. If no write ended or was in flight since, only that version
    /// remains possible.
    pub fn narrow(&mut self, span: SectorSpan, seen: &[Option<u32>], sent: u64) {
        for (sector, seen) in self.sectors_of(span).iter_mut().zip(seen) {
            let quiet = sector.current.iter().all(|c| c.ended.is_some_and(|ended| ended < sent));
            if let Some(seen) = seen
                && quiet
                && !sector.unconstrained
            {
                sector.current.retain(|c| c.version == *seen);
            }
        }
    }

    /// Every write that ended before `step` must be durable, because of the age limit.
    pub fn complete_age(&mut self, step: u64) {
        for sector in &mut self.sectors {
            let quiet = sector.current.iter().all(|c| c.ended.is_some_and(|ended| ended < step));
            if quiet && !sector.unconstrained {
                sector.durable = Some(sector.current.iter().map(|c| c.version).collect());
            }
        }
    }

    /// The guest sends a discard: the range may hold anything until it is written again.
    pub fn begin_discard(&mut self, span: SectorSpan) {
        for sector in self.sectors_of(span) {
            sector.unconstrained = true;
            sector.durable = None;
        }
    }

    /// The versions that a request sent now may find in `count` sectors from `first`.
    pub fn knowledge(&self, first: usize, count: usize) -> Knowledge {
        let allowed = |sector: &Sector| {
            (!sector.unconstrained).then(|| sector.current.iter().map(|candidate| candidate.version).collect())
        };
        Knowledge { first, allowed: self.sectors[first..first + count].iter().map(allowed).collect() }
    }

    /// A FLUSH succeeds: after a power cut a sector may hold only the versions that it could hold when the FLUSH was
    /// sent (`at_send`), or a later write.
    pub fn complete_flush(&mut self, at_send: &Knowledge) {
        for (sector, allowed) in self.sectors.iter_mut().zip(&at_send.allowed) {
            if allowed.is_some() {
                sector.durable.clone_from(allowed);
            }
        }
    }

    /// Whether a sector may hold `version` after a power cut.
    pub fn may_survive(&self, sector: usize, version: u32) -> bool {
        self.sectors[sector].durable.as_ref().is_none_or(|durable| durable.contains(version))
    }
}

impl Knowledge {
    /// The guest sends a write while the request is in flight: the request may also find the new version.
    pub fn add_candidate(&mut self, span: SectorSpan, version: u32) {
        for allowed in self.overlap(span).iter_mut().flatten() {
            allowed.push(version);
        }
    }

    /// The guest sends a discard while the request is in flight: the request may find any version there.
    pub fn forget(&mut self, span: SectorSpan) {
        self.overlap(span).fill(None);
    }

    /// The disk was cut to `sectors` sectors: what comes there later is not what the request knew.
    pub fn cut(&mut self, sectors: usize) {
        self.allowed.truncate(sectors.saturating_sub(self.first));
    }

    /// The part of the request's sectors that lies in `span`.
    fn overlap(&mut self, span: SectorSpan) -> &mut [Option<Versions>] {
        let within = |sector: u64| (sector as usize).saturating_sub(self.first).min(self.allowed.len());
        let (from, to) = (within(span.start), within(span.end()));
        &mut self.allowed[from..to]
    }

    /// Whether sector `at` of the request may hold `version`.
    pub fn allows(&self, at: usize, version: u32) -> bool {
        self.allowed[at].as_ref().is_none_or(|allowed| allowed.contains(version))
    }
}
