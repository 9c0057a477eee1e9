//! An arena in two processes of a daemon. The first process has created or found it, has its name, and keeps it. The
//! second process maps and uses it, and may die and be replaced.
//!
//! The second process gets descriptors and never a name: it requests the removal of a file, and the first one removes
//! it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::file::FileDescription;
use super::ledger::{HEADER_BYTES, boot_id, is_too_large, set_boot_id};
use super::lost_file::LossMarker;
use super::mapping::Mapping;
use super::{Arena, ArenaFile, GuestData, GuestState, Persistence, bytes_of};
use crate::error::{Error, ErrorKind, Result};
use crate::tenure::token::ChangeToken;
use crate::units::counted;

/// The kind of the arena; see [`super`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum ArenaKind {
    Persistent,
    LossMarker,
    Anonymous,
}

/// The description of an arena for the process that uses it. The descriptors come with it, in the order of
/// [`KeptArena::descriptors`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArenaParts {
    kind: ArenaKind,
    frames: usize,
    /// How many frames are known to have memory, if no file records it.
    #[serde(default, skip_serializing_if = "is_zero")]
    reserved: usize,
    /// The file, for messages; empty if there is none.
    shown: String,
    recovery_hint: String,
    removal_hint: String,
    is_in_fdstore: bool,
    /// Whether a loss marker has replaced a file that lost its name.
    has_substitute: bool,
    /// The known state of the guest, if no file records it.
    data_loss: bool,
    write_through: bool,
    formats: u64,
    /// The host's boot ID, to be compared with that of a header.
    boot: [u8; 16],
}

/// A message without the number means that it is unknown.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero(reserved: &usize) -> bool {
    *reserved == 0
}

/// A received arena, and whether its file is to be removed in the end.
#[derive(Debug)]
pub struct ReceivedArena {
    /// The arena.
    pub arena: Arena,
    /// Set when the arena is dropped and its file, or the loss marker that replaced it, is to be removed; for an arena
    /// without a file, when everything in it is on the image.
    pub is_removed: Arc<AtomicBool>,
}

impl ReceivedArena {
    /// Maps an arena that another process of the daemon passes on.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when descriptors are missing; otherwise as [`Arena::attach`].
    pub fn new(parts: &ArenaParts, files: impl IntoIterator<Item = File>) -> Result<Self> {
        set_boot_id(parts.boot);
        let mut files = files.into_iter();
        let missing = || Error::new(ErrorKind::System, "a descriptor of the cache is missing");
        let is_removed = Arc::new(AtomicBool::new(false));
        let named = |file| ArenaFile::received(file, parts.file_description(&is_removed));
        let map = |file: &File, bytes| {
            Mapping::new(file, bytes).map_err(|e| Error::io(ErrorKind::Memory, "cannot map the cache", e))
        };
        let first = files.next().ok_or_else(missing)?;
        let (frames, counts) = (parts.frames, [parts.reserved, parts.frames]);
        let guest = GuestState {
            data: if parts.data_loss { GuestData::Lost } else { GuestData::Intact },
            write_through: parts.write_through,
            formats: parts.formats,
        };
        let mut arena = match parts.kind {
            ArenaKind::Persistent => {
                let file = named(first);
                let header = file.header()?.ok_or_else(|| Error::new(ErrorKind::Ledger, format!("{file} is empty")))?;
                if header.frames != frames as u64 {
                    let context = format!("{file} has {} instead of {frames}", counted(header.frames, "frame"));
                    return Err(Error::new(ErrorKind::Ledger, context));
                }
                Arena::attach(file, &header)?
            }
            ArenaKind::LossMarker => {
                let (memory, file) = (map(&first, bytes_of(frames, 0)?)?, named(files.next().ok_or_else(missing)?));
                let guest = file.header()?.map_or(guest, |header| guest.merged_with(header.guest));
                let marker = map(&file.file, HEADER_BYTES)?;
                Arena::new(memory, counts, 0, Persistence::LossMarker(LossMarker { marker, file }), guest)
                    .backed_by(first)
            }
            ArenaKind::Anonymous => {
                let memory = map(&first, bytes_of(frames, 0)?)?;
                Arena::new(memory, counts, 0, Persistence::None, guest).backed_by(first)
            }
        };
        if parts.has_substitute {
            let file = named(files.next().ok_or_else(missing)?);
            let marker = map(&file.file, HEADER_BYTES)?;
            // A new arena has no substitute yet.
            let _ = arena.substitute.set(LossMarker { marker, file });
        }
        arena.is_released = Some(Arc::clone(&is_removed));
        Ok(Self { arena, is_removed })
    }
}

impl ArenaParts {
    fn file_description(&self, is_removed: &Arc<AtomicBool>) -> FileDescription {
        FileDescription {
            shown: self.shown.clone(),
            recovery_hint: self.recovery_hint.clone(),
            removal_hint: self.removal_hint.clone(),
            is_in_fdstore: self.is_in_fdstore,
            is_removed: Arc::clone(is_removed),
        }
    }
}

impl Arena {
    /// An empty file that replaces one that lost its name, received from the process that has the name, for
    /// [`Arena::replace_lost_file`].
    pub fn received_marker(&self, file: File) -> Option<ArenaFile> {
        let lost = match &self.persistence {
            Persistence::None => return None,
            Persistence::LossMarker(LossMarker { file, .. }) | Persistence::Full { file, .. } => file,
        };
        lost.replace_received(file)
    }

    /// Whether another process of the daemon keeps the arena, and ends its tenure when it is released.
    pub fn is_kept_elsewhere(&self) -> bool {
        self.is_released.is_some()
    }

    /// Everything in the arena is on the image. An arena with a file reports that by the removal of the file.
    pub fn release(&self) {
        if let (Persistence::None, Some(is_released)) = (&self.persistence, &self.is_released) {
            is_released.store(true, Ordering::Release);
        }
    }

    /// The arena as kept by the process that does not use it. It is no longer mapped.
    pub fn into_kept(mut self) -> KeptArena {
        let (frames, reserved, memory) = (self.frames, self.reserved_frames(), self.memory_file.take());
        let (data_loss, write_through, formats) = (self.has_data_loss(), self.is_write_through(), self.guest_formats());
        let (kind, file) = match std::mem::replace(&mut self.persistence, Persistence::None) {
            Persistence::None => (ArenaKind::Anonymous, None),
            Persistence::LossMarker(LossMarker { file, .. }) => (ArenaKind::LossMarker, Some(file)),
            Persistence::Full { file, .. } => (ArenaKind::Persistent, Some(file)),
        };
        let (substitute, is_lost) = (None, false);
        KeptArena { kind, frames, reserved, memory, file, substitute, is_lost, data_loss, write_through, formats }
    }
}

/// An arena that another process uses.
#[derive(Debug)]
pub struct KeptArena {
    kind: ArenaKind,
    frames: usize,
    /// How many frames are known to have memory, if no file records it.
    reserved: usize,
    /// The memory of an arena without a named file.
    memory: Option<File>,
    /// The file that outlives the daemon.
    file: Option<ArenaFile>,
    /// The file that replaces `file` once the name of `file` no longer leads to it.
    substitute: Option<ArenaFile>,
    /// The name of `file` no longer leads to it.
    is_lost: bool,
    data_loss: bool,
    write_through: bool,
    formats: u64,
}

impl KeptArena {
    /// The description of the arena for the process that uses it.
    pub fn parts(&self) -> ArenaParts {
        let text = |text: fn(&ArenaFile) -> String| self.file.as_ref().map_or_else(String::new, text);
        ArenaParts {
            kind: self.kind,
            frames: self.frames,
            reserved: self.reserved,
            shown: text(ArenaFile::to_string),
            recovery_hint: text(ArenaFile::recovery_hint),
            removal_hint: text(ArenaFile::removal_hint),
            is_in_fdstore: self.file.as_ref().is_some_and(ArenaFile::is_in_fdstore),
            has_substitute: self.substitute.is_some(),
            data_loss: self.data_loss,
            write_through: self.write_through,
            formats: self.formats,
            boot: boot_id(),
        }
    }

    /// The descriptors that go with [`KeptArena::parts`].
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let files = [self.file.as_ref(), self.substitute.as_ref()].into_iter().flatten();
        self.memory.iter().map(AsFd::as_fd).chain(files.map(|file| file.file.as_fd())).collect()
    }

    /// The file that outlives the daemon, if its name leads to it; for messages.
    pub fn file(&self) -> Option<&ArenaFile> {
        self.file.as_ref().filter(|_| self.kind == ArenaKind::Persistent && !self.is_lost)
    }

    /// Whether the ledger, if there is one, can number all pages of an image of this size.
    pub fn has_room_for(&self, size_bytes: u64) -> bool {
        self.kind != ArenaKind::Persistent || !is_too_large(size_bytes)
    }

    /// Whether the name of the file, if it has one, still leads to it.
    pub fn is_reachable(&self) -> bool {
        self.is_lost || self.file.as_ref().is_none_or(ArenaFile::is_reachable)
    }

    /// The file's name no longer leads to it. Creates an empty file at its path, for a loss marker.
    ///
    /// # Errors
    /// As [`ArenaFile::recreate`]: a loss of completed writes would go undetected.
    pub fn replace_lost_file(&mut self) -> Result<Option<BorrowedFd<'_>>> {
        self.is_lost = true;
        let Some(file) = &self.file else { return Ok(None) };
        Ok(Some(self.substitute.insert(file.recreate()?).file.as_fd()))
    }

    /// The process that used the arena died. The next one restores its pages. If the pages were only in the memory of
    /// that process, the guest must be informed that completed writes may be lost.
    pub fn record_death(&mut self, is_read_only: bool) {
        // The size may have changed before the death.
        self.reserved = 0;
        if self.kind == ArenaKind::Anonymous && !is_read_only {
            self.data_loss = true;
        }
    }

    /// Records the image's change token for the next daemon.
    ///
    /// => No process changes the image or uses the arena.
    ///
    /// # Errors
    /// As [`Arena::attach`].
    pub fn record_token(&mut self, token: ChangeToken) -> Result<()> {
        let Some(arena) = self.attach()? else { return Ok(()) };
        arena.record_token_now(token);
        self.file = arena.into_file();
        Ok(())
    }

    /// Records that its tenure has ended, although its file stays.
    ///
    /// => No process changes the image or uses the arena.
    ///
    /// # Errors
    /// As [`Arena::attach`].
    pub fn record_end(&mut self) -> Result<()> {
        let Some(arena) = self.attach()? else { return Ok(()) };
        arena.set_recorded(true, true);
        self.file = arena.into_file();
        Ok(())
    }

    /// The arena with its pages; `None` if its pages are not in its file.
    fn attach(&mut self) -> Result<Option<Arena>> {
        let Some(file) = self.file.as_ref().filter(|_| self.kind == ArenaKind::Persistent) else { return Ok(None) };
        match file.header()?.filter(|header| header.frames > 0) {
            Some(header) => Arena::attach(self.file.take().expect("it is there"), &header).map(Some),
            None => Ok(None),
        }
    }

    /// Whether the arena has a file that the next daemon will find, and that shows that the image lacks nothing.
    ///
    /// => No process uses the arena.
    pub fn is_written(&self) -> bool {
        let has_file = self.file.is_some() && !self.is_lost;
        has_file && self.holds_unwritten().is_ok_and(|holds| !holds)
    }

    /// Whether the arena holds data that is nowhere else, according to its file.
    ///
    /// => No process uses the arena.
    ///
    /// # Errors
    /// As [`ArenaFile::survey`].
    pub fn holds_unwritten(&self) -> Result<bool> {
        let Some(file) = &self.file else { return Ok(false) };
        Ok(file.survey()?.is_some_and(|survey| survey.is_dirty() || survey.header.guest.data == GuestData::Lost))
    }

    /// Removes the files: the process that used the arena has written everything to the image.
    pub fn remove(self) {
        self.file.into_iter().chain(self.substitute).for_each(|file| file.remove());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::FrameId;

    #[test]
    fn the_next_user_of_an_anonymous_arena_maps_the_same_bytes() {
        let kept = Arena::anonymous(2).unwrap().into_kept();
        let attach = || {
            let files = kept.descriptors().into_iter().map(|fd| fd.try_clone_to_owned().unwrap().into());
            ReceivedArena::new(&kept.parts(), files.collect::<Vec<File>>()).unwrap()
        };
        let first = attach();
        first.arena.zero_sectors(FrameId(1), crate::units::SectorMask::ALL);
        drop(first);
        assert_eq!(attach().arena.frames(), 2);
    }

    #[test]
    fn only_the_death_of_a_writer_marks_an_anonymous_arena_as_lost() {
        let mut kept = Arena::anonymous(1).unwrap().into_kept();
        kept.record_death(true);
        assert!(!kept.parts().data_loss);
        kept.record_death(false);
        assert!(kept.parts().data_loss);
    }
}
