//! What a guest may see: for each sector the versions that it may hold now, and those that may be found after a power
//! cut (virtio 1.2, section 5.2.6.2: a write is stable when a FLUSH sent after its completion has completed).

/// One write to a sector, as the guest knows it. Times are steps of the world.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    version: u32,
    ended: Option<u64>,
}

#[derive(Clone, Debug)]
struct Sector {
    /// What it may hold now.
    current: Vec<Candidate>,
    /// What it may hold after a power cut now; `None`: anything, for it was discarded and no later write is stable.
    durable: Option<Vec<u32>>,
    /// Discarded, and not written since: it may hold anything.
    wild: bool,
}

/// The guest's knowledge of the disk.
#[derive(Debug)]
pub(super) struct Oracle {
    sectors: Vec<Sector>,
}

/// What the guest knew when it sent a request, for each of the request's sectors; `None`: anything.
#[derive(Clone, Debug)]
pub(super) struct Knowledge {
    first: usize,
    allowed: Vec<Option<Vec<u32>>>,
}

impl Oracle {
    /// `count` sectors of version 0.
    pub fn new(count: usize) -> Self {
        let sector =
            Sector { current: vec![Candidate { version: 0, ended: Some(0) }], durable: Some(vec![0]), wild: false };
        Self { sectors: vec![sector; count] }
    }

    /// A write (or zero: version 0) of the range is sent.
    pub fn write_starts(&mut self, first: usize, count: usize, version: u32) {
        for sector in &mut self.sectors[first..first + count] {
            sector.current.push(Candidate { version, ended: None });
            if let Some(durable) = &mut sector.durable {
                durable.push(version);
            }
        }
    }

    /// A write sent at `started` has ended now. One that failed may have happened or not.
    pub fn write_ends(&mut self, first: usize, count: usize, version: u32, started: u64, now: u64, good: bool) {
        for sector in &mut self.sectors[first..first + count] {
            let own = sector.current.iter_mut().find(|c| c.version == version && c.ended.is_none());
            own.expect("a write that ends had started").ended = Some(now);
            if good {
                // What ended before this write was sent has been overwritten.
                sector.current.retain(|c| c.ended.is_none_or(|ended| ended >= started));
                sector.wild = false;
            }
        }
    }

    /// A discard of the range is sent: until it is written again it may hold anything.
    pub fn discard_starts(&mut self, first: usize, count: usize) {
        for sector in &mut self.sectors[first..first + count] {
            sector.wild = true;
            sector.durable = None;
        }
    }

    /// What a read or a flush that is sent now may find.
    pub fn knowledge(&self, first: usize, count: usize) -> Knowledge {
        let allowed = |sector: &Sector| {
            (!sector.wild).then(|| sector.current.iter().map(|candidate| candidate.version).collect())
        };
        Knowledge { first, allowed: self.sectors[first..first + count].iter().map(allowed).collect() }
    }

    /// A flush has completed well: what it knew, and what was sent later, is all that a power cut may leave.
    pub fn flushed(&mut self, then: &Knowledge) {
        for (sector, allowed) in self.sectors.iter_mut().zip(&then.allowed) {
            if allowed.is_some() {
                sector.durable.clone_from(allowed);
            }
        }
    }

    /// Whether a sector may hold `version` after a power cut.
    pub fn may_survive(&self, sector: usize, version: u32) -> bool {
        self.sectors[sector].durable.as_ref().is_none_or(|durable| durable.contains(&version))
    }
}

impl Knowledge {
    /// A write is sent while the request is under way: its version may be seen too.
    pub fn add_candidate(&mut self, first: usize, count: usize, version: u32) {
        self.each(first, count, |allowed| {
            if let Some(allowed) = allowed {
                allowed.push(version);
            }
        });
    }

    /// A discard is sent while the request is under way.
    pub fn forget(&mut self, first: usize, count: usize) {
        self.each(first, count, |allowed| *allowed = None);
    }

    fn each(&mut self, first: usize, count: usize, mut change: impl FnMut(&mut Option<Vec<u32>>)) {
        for (at, allowed) in self.allowed.iter_mut().enumerate() {
            if (first..first + count).contains(&(self.first + at)) {
                change(allowed);
            }
        }
    }

    /// Whether the `at`th sector of the request may hold `version`.
    pub fn allows(&self, at: usize, version: u32) -> bool {
        self.allowed[at].as_ref().is_none_or(|allowed| allowed.contains(&version))
    }
}
