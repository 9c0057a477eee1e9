//! Handles an arena's file that loses its name while the daemon runs: an operator or logind (RemoveIPC=) removes it, or
//! another file system is mounted over its directory. The memory and thus the cache stay, but the next daemon cannot
//! find the file. So from then on the cache does not outlive the daemon.

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
    /// The marker that shows the next daemon whether this one's death lost data; `None` if the cache outlives the
    /// daemon, or nothing does.
    pub(super) fn marker(&self) -> Option<&LossMarker> {
        self.substitute.get().or(match &self.persistence {
            Persistence::LossMarker(marker) => Some(marker),
            _ => None,
        })
    }

    /// Whether the next daemon would find the arena's file, or there is no file.
    pub fn is_reachable(&self) -> bool {
        self.substitute.get().is_some()
            || match &self.persistence {
                Persistence::None => true,
                Persistence::LossMarker(LossMarker { file, .. }) | Persistence::Full { file, .. } => {
                    file.is_reachable()
                }
            }
    }

    /// The arena's file lost its name, and no marker replaced it.
    pub fn record_unmarked_loss(&self) {
        self.is_unmarked.store(true, Ordering::Release);
    }

    /// Whether the arena's file lost its name, and no marker replaced it.
    pub(super) fn is_unmarked(&self) -> bool {
        self.is_unmarked.load(Ordering::Acquire)
    }

    /// Replaces a file whose name no longer leads to it by a loss marker: the cache no longer outlives the daemon, and
    /// the marker must show the next daemon whether that lost data. `file` is a new, empty file at the same path, and
    /// `holds_unwritten` states whether a loss would occur now.
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
            // The magic number is the last word to be stored.
            marker.store(field::MAGIC, header.load(field::MAGIC));
            Ok(marker)
        };
        let marker = create().map_err(|e| Error::io(ErrorKind::Memory, format!("cannot write {file}"), e))?;
        // It is not set twice: no other thread replaces the file.
        let _ = self.substitute.set(LossMarker { marker, file });
        Ok(())
    }
}
