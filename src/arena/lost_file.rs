//! What happens when the file of an arena loses its name while the daemon runs: an operator removes it, logind does
//! (RemoveIPC=), or another file system is mounted over its directory. The memory stays, and with it the cache, but the
//! next daemon cannot find it. So from then on the cache is one that does not outlive the daemon.

use super::ledger::{HEADER_BYTES, field};
use super::mapping::{self, Mapping};
use super::{Arena, ArenaFile, Persistence};
use crate::error::{Error, ErrorKind, Result};

/// A header with a word that is set while the cache holds data that is nowhere else.
#[derive(Debug)]
pub(super) struct LossMarker {
    pub(super) marker: Mapping,
    pub(super) file: ArenaFile,
}

impl Arena {
    /// What tells the next daemon whether this one's death loses data; `None` while the cache outlives the daemon, or
    /// nothing does.
    pub(super) fn marker(&self) -> Option<&LossMarker> {
        self.substitute.get().or(match &self.persistence {
            Persistence::LossMarker(marker) => Some(marker),
            _ => None,
        })
    }

    /// Whether the next daemon would find the arena's file, or there is none to be found.
    pub fn is_reachable(&self) -> bool {
        self.substitute.get().is_some()
            || match &self.persistence {
                Persistence::None => true,
                Persistence::LossMarker(LossMarker { file, .. }) | Persistence::Full { file, .. } => {
                    file.is_reachable()
                }
            }
    }

    /// Puts a loss marker in the place of a file whose name no longer leads to it: the cache does not outlive the
    /// daemon any more, and the next daemon must know whether that lost data. `holds_unwritten` tells whether it would
    /// now.
    ///
    /// => The caller (the page cache, under its lock) publishes nothing meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] or [`ErrorKind::Ledger`] when the marker cannot be created: the loss would go undetected.
    pub fn replace_lost_file(&self, holds_unwritten: bool) -> Result<()> {
        let (header, file) = match &self.persistence {
            Persistence::None => return Ok(()),
            Persistence::LossMarker(LossMarker { marker, file }) => (marker, file),
            Persistence::Full { file, .. } => (&self.memory, file),
        };
        let file = file.recreate()?;
        let create = || {
            mapping::allocate(&file.file, HEADER_BYTES)?;
            let marker = Mapping::new(&file.file, HEADER_BYTES)?;
            for at in (0..HEADER_BYTES).step_by(size_of::<u64>()) {
                let word = match at {
                    field::MAGIC | field::FRAMES => 0,
                    field::UNWRITTEN => u64::from(holds_unwritten || self.has_data_loss()),
                    _ => header.load(at),
                };
                marker.store(at, word);
            }
            // The magic number is the last word of a header.
            marker.store(field::MAGIC, header.load(field::MAGIC));
            Ok(marker)
        };
        let marker = create().map_err(|e| Error::io(ErrorKind::Memory, format!("cannot write {file}"), e))?;
        // It is not set twice: no other thread replaces the file.
        let _ = self.substitute.set(LossMarker { marker, file });
        Ok(())
    }
}
