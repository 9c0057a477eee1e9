//! The commands that remove a cache: write it to its image, discard it, or remove caches without unwritten data.

use std::path::{Path, PathBuf};

use log::warn;

use super::cache_dirs::{allowed_owner, caches_in};
use super::leftovers::{Cleared, clear};
use super::terminal::{ProgressBar, confirm, is_interactive, visible};
use super::{Report, describe_guest_state};
use crate::arena::{AllowedOwner, Arena, ArenaFile, GuestData, GuestState, Survey};
use crate::error::{Error, ErrorKind, Result};
use crate::recover::operation::{check_belongs, end_tenure};
use crate::recover::write_back::write_back;
use crate::recover::{HAS_FILE, LOCK_TIMEOUT};
use crate::store::{self, file};
use crate::sys::process::effective_uid;
use crate::tenure::record::TenureState;
use crate::units::counted;

/// Whether the operator has consented in advance to an operation that cannot be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    /// No: ask on a terminal; refuse if there is none.
    Ask,
    /// Yes.
    Forced,
}

/// Arguments of [`recover`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// The cache file.
    pub cache: PathBuf,
    /// The new path of its image, if it has moved.
    pub image: Option<PathBuf>,
    /// Whether to write even to an image that cannot be shown to be the cache's.
    pub consent: Consent,
}

/// Writes the cache in a file to its image and removes the file; returns a message for the operator.
///
/// => A file that records a guest's state stays, without its pages, for the next daemon.
///
/// # Errors
/// [`ErrorKind::Ledger`] when the file is not a cache of this user and of this boot, or its image was replaced;
/// [`ErrorKind::Locked`] when a daemon serves the image; [`ErrorKind::Image`] when the image cannot be written.
pub fn recover(recovery: &Recovery) -> Result<String> {
    let path = &recovery.cache;
    let shown = visible(path);
    refuse_other_users(path)?;
    let file = ArenaFile::open_existing(path, AllowedOwner::Own)?;
    let Some(header) = file.header()? else {
        file.remove();
        return Ok(format!("removed {shown}, which was empty\n"));
    };
    if header.frames == 0 {
        let context = format!(
            "{shown} holds no pages, only the state of the guest; to delete it, run \"genblk recover --discard \
             {shown}\""
        );
        return Err(Error::new(ErrorKind::Ledger, context));
    }
    // Check that the ledger refers only to existing pages.
    file.survey()?;
    let image_path = recovery.image.as_ref().unwrap_or(&header.image.path);
    if !image_path.is_absolute() && !store::is_remote(image_path) && recovery.image.is_none() {
        let context = format!("the ledger in {shown} is damaged or forged: its image has no absolute path");
        return Err(Error::new(ErrorKind::Ledger, context));
    }
    let image_shown = visible(image_path);
    let options = file::OpenOptions { lock_timeout: LOCK_TIMEOUT, ..file::OpenOptions::default() };
    let image = store::open(None, image_path, &options).map_err(|e| {
        let is_path = !store::is_remote(&header.image.path);
        let is_moved = is_path && recovery.image.is_none() && !header.image.path.exists();
        match e.kind() {
            _ if is_moved => e.with_hint("if the image has moved, name it with --image PATH"),
            ErrorKind::Locked => e.with_hint(&format!("end that process first; {shown} stays as it is")),
            _ => e,
        }
    })?;
    let arena = Arena::attach(file, &header)?;
    let force = recovery.consent == Consent::Forced;
    if !force || recovery.image.is_none() {
        check_belongs(&arena, &header, &*image, force)?;
    }
    let mut progress = ProgressBar::new();
    let written = write_back(&arena, &*image, &mut |done, total| progress.show(done, total));
    drop(progress);
    let hint = format!("{shown} stays: run the command again once the image can be written");
    let written = written.map_err(|e| e.with_hint(&hint))?;
    let written = counted(written, "page");
    let file = arena.into_file().expect(HAS_FILE);
    // Before the file is removed: otherwise a daemon would report it as missing.
    end_tenure(&file, Some(&*image), header.tenure, TenureState::Clean)?;
    let guest = file.header()?.map_or(header.guest, |header| header.guest);
    if guest == GuestState::FRESH {
        file.remove();
        return Ok(format!("wrote {written} to {image_shown} and removed {shown}\n"));
    }
    file.shrink_to_header()?;
    let why = describe_guest_state(guest);
    Ok(format!("wrote {written} to {image_shown}; emptied {shown} and kept it, because {why}\n"))
}

/// Refuses another user's cache: root would write bytes of that user's choice to an image of that user's choice.
fn refuse_other_users(path: &Path) -> Result<()> {
    let user = effective_uid();
    if user != 0 {
        return Ok(());
    }
    let summary = ArenaFile::examine(path, AllowedOwner::Anyone)?;
    if summary.owner == user {
        return Ok(());
    }
    let (shown, owner) = (visible(path), summary.owner);
    let why = "root would write its contents to any image that it names";
    let hint = format!("recover it as that user: sudo -u '#{owner}' genblk recover {shown}");
    Err(Error::new(ErrorKind::Ledger, format!("{shown} belongs to user {owner}, and {why}; {hint}")))
}

/// Removes a cache file with everything in it; returns a message for the operator.
///
/// # Errors
/// [`ErrorKind::Ledger`] when the file is not a cache file, or holds unwritten data and there is no consent;
/// [`ErrorKind::Locked`] when a daemon uses it.
pub fn discard(path: &Path, consent: Consent) -> Result<String> {
    let shown = visible(path);
    let file = ArenaFile::open_existing(path, allowed_owner())?;
    // A file that cannot be read may hold unwritten data.
    let survey = file.survey();
    let held = match &survey {
        Ok(None) => None,
        Ok(Some(survey)) => held_by(survey),
        Err(e) => Some(format!("data that cannot be read ({e})")),
    };
    if let Some(held) = held.filter(|_| consent == Consent::Ask) {
        if !is_interactive() {
            let context = format!("{shown} holds {held}; to delete it, add --force");
            return Err(Error::new(ErrorKind::Ledger, context));
        }
        if !confirm(&format!("{shown} holds {held}. Delete it?")) {
            return Err(Error::new(ErrorKind::Ledger, format!("{shown} was kept")));
        }
    }
    if let Ok(Some(survey)) = &survey
        && let Err(e) = end_tenure_of(&file, survey)
    {
        warn!("{e}; the image's record still names the cache: see \"genblk take-over --help\"");
    }
    file.remove();
    Ok(format!("removed {shown}\n"))
}

/// Records that the tenure of a cache that is deleted has ended: in the record of the image, or next to the cache.
///
/// => The image of another user's cache is not opened: root would open any path that the user names.
fn end_tenure_of(file: &ArenaFile, survey: &Survey) -> Result<()> {
    let header = &survey.header;
    let is_lossless = header.guest.data == GuestData::Intact && !survey.is_dirty();
    let state = if is_lossless { TenureState::Clean } else { TenureState::Forfeited };
    let is_own = file.owner() == effective_uid() && header.image.path.is_absolute();
    let options = file::OpenOptions { lock_timeout: LOCK_TIMEOUT, ..file::OpenOptions::default() };
    let is_recorded = header.tenure.is_some_and(|tenure| tenure.is_recorded);
    let image = (is_own && is_recorded).then(|| store::open(None, &header.image.path, &options).ok()).flatten();
    end_tenure(file, image.as_deref(), header.tenure, state)
}

/// The data that is lost if a cache is deleted; `None`: none.
fn held_by(survey: &Survey) -> Option<String> {
    let (header, shown) = (&survey.header, visible(&survey.header.image.path));
    if survey.is_dirty() {
        let ranges = match survey.zero_ranges {
            0 => String::new(),
            ranges => format!(" and {} to be zeroed", counted(ranges, "range")),
        };
        let dirty = counted(survey.dirty_pages, "dirty page");
        return Some(format!("{dirty}{ranges}, not yet written to image {shown}"));
    }
    // If the image has a record, that replaces the loss marker.
    let is_only_note = header.guest.data == GuestData::Lost && !header.tenure.is_some_and(|tenure| tenure.is_recorded);
    is_only_note.then(|| format!("the only record that completed writes of image {shown} were lost"))
}

/// Removes the cache files in `directory` that hold no unwritten data; returns a report for the operator.
///
/// # Errors
/// [`ErrorKind::Memory`] when the directory cannot be read.
pub fn prune(directory: &Path) -> Result<Report> {
    let mut report = Report::default();
    let (mut removed, mut kept, mut bytes) = (0, 0, 0);
    for (path, cache) in caches_in(directory, &mut report)? {
        match cache.and_then(|cache| clear(&cache, end_tenure_of)) {
            Ok(Cleared::Kept) => kept += 1,
            Ok(Cleared::Removed(freed)) => {
                removed += 1;
                bytes += freed;
                report.text.push_str(&format!("removed {}\n", visible(&path)));
            }
            Ok(Cleared::Shrunk(freed)) => {
                kept += 1;
                bytes += freed;
                report.text.push_str(&format!("freed the pages of {}\n", visible(&path)));
            }
            Err(e) => {
                report.fail(&format!("kept {}", visible(&path)), &e);
                kept += 1;
            }
        }
    }
    let mib = bytes >> 20;
    report.text.push_str(&format!("removed {} ({mib} MiB), kept {kept}\n", counted(removed, "cache")));
    Ok(report)
}
