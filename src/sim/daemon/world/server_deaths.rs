//! The image is on a server that dies together with the daemon and loses what no Sync covers.

use super::super::guest::{GuestAction, SECTORS_MAX};
use super::super::oracle::RequestId;
use super::World;
use crate::prng::Prng;
use crate::units::{SECTORS_PER_PAGE, SectorSpan};

/// What happens to the server, with a generator of its own.
#[derive(Debug)]
pub(super) struct ServerDeaths {
    prng: Prng,
    /// What the guest discarded last, and may read.
    discarded: Option<SectorSpan>,
    /// The read of that.
    read: Option<RequestId>,
    /// That read has completed: server and daemon die now.
    is_due: bool,
    /// The server has lost unsynced changes, and no daemon has started since.
    pub has_forgotten: bool,
}

impl ServerDeaths {
    /// In two fifths of the worlds.
    pub fn new(seed: u64) -> Option<Self> {
        let prng = Prng::new(seed ^ 0x5e7d);
        (seed % 5 < 2).then_some(Self { prng, discarded: None, read: None, is_due: false, has_forgotten: false })
    }
}

impl World {
    /// The guest may discard the pages of the span, or read what it has discarded. Returns whether it does.
    pub fn submit_discard_or_read(&mut self, span: SectorSpan) -> bool {
        let next_id = self.next_id;
        let Some(ServerDeaths { prng, discarded, read, .. }) = &mut self.server_deaths else { return false };
        if !prng.percent(20) {
            return false;
        }
        let (action, span) = match discarded.take() {
            Some(discarded) => {
                *read = Some(next_id);
                (GuestAction::Read, discarded)
            }
            None => {
                // Only whole pages are discarded on the disk.
                let (start, end) = (span.pages().first.0 * SECTORS_PER_PAGE, span.pages().end().0 * SECTORS_PER_PAGE);
                let end = end.min(start + SECTORS_MAX).min(self.settings.image_sectors);
                (GuestAction::Discard, SectorSpan::new(start, end - start))
            }
        };
        let ring = prng.below(self.scenario.rings as u64) as usize;
        self.oracle.contention(span) == 0 && self.submit(ring, action, span)
    }

    /// A request of the guest has completed.
    pub fn record_completed(&mut self, id: RequestId, action: &GuestAction, span: SectorSpan) {
        let Some(deaths) = &mut self.server_deaths else { return };
        match action {
            GuestAction::Discard => deaths.discarded = Some(span),
            GuestAction::Read if deaths.read == Some(id) => deaths.is_due = deaths.prng.percent(50),
            _ => {}
        }
    }

    /// Server and daemon die, if that is due.
    pub fn kill_server_and_daemon(&mut self) {
        let Some(deaths) = &mut self.server_deaths else { return };
        if std::mem::take(&mut deaths.is_due) && self.life.is_some() && self.scenario.crash_points_max.is_some() {
            self.daemon_died();
        }
    }

    /// The daemon has died. The server may have died with it.
    pub fn server_may_die(&mut self) {
        if let Some(deaths) = &mut self.server_deaths
            && deaths.prng.percent(50)
        {
            self.image.lose_unsynced();
            deaths.has_forgotten = true;
        }
    }
}
