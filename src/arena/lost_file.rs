//! What happens when the file of an arena loses its name while the daemon runs: an operator removes it, logind does
//! (RemoveIPC=), or another file system is mounted over its directory. The memory stays, and with it the cache, but the
//! next daemon cannot find it. So from then on the cache is one that does not outlive the daemon.

use std::sync::atomic::Ordering;

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

    /// The arena's file lost its name, and nothing took its place.
    pub fn note_unmarked_loss(&self) {
        self.is_unmarked.store(true, Ordering::Release);
    }

    /// Whether its file lost its name, and nothing took its place.
    pub(super) fn is_unmarked(&self) -> bool {
        self.is_unmarked.load(Ordering::Acquire)
    }

    /// Puts a loss marker in the place of a file whose name no longer leads to it: the cache does not outlive the
    /// daemon any more, and the next daemon must know whether that lost data. `file` is a new, empty file in its place,
    /// and `holds_unwritten` tells whether a loss would occur now.
    ///
    /// => The caller (the page cache, under its lock) publishes nothing meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the marker cannot be written: the loss would go undetected.
    pub fn replace_lost_file(&self, file: ArenaFile, holds_unwritten: bool) -> Result<()> {
        let header = match &self.persistence {
            Persistence::None => return Ok(()),
            Persistence::LossMarker(LossMarker { marker, .. }) => marker,
            Persistence::Full { .. } => &self.memory,
        };
        let create = || {
            mapping::allocate(&file.file, HEADER_BYTES, std::slice::from_ref(&(0..HEADER_BYTES)))?;
            let marker = Mapping::new(&file.file, HEADER_BYTES)?;
            for at in (0..HEADER_BYTES).step_by(size_of::<u64>()) {
                let word = match at {
                    field::MAGIC | field::FRAMES | field::UNRESERVED => 0,
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
