//! The commands that end a cache: write it to its image, throw it away, remove what holds nothing.

use std::path::{Path, PathBuf};

use log::warn;

use super::folders::{ImageState, caches, folders, whose};
use super::remembered;
use super::terminal::{Progress, ask, is_interactive, visible};
use crate::arena::{Arena, ArenaFile, GuestData, GuestState, Survey, Whose};
use crate::error::{Error, ErrorKind, Result};
use crate::recover::operation::{check_belongs, settle};
use crate::recover::write_back::write_back;
use crate::recover::{HAS_FILE, LOCK_PATIENCE};
use crate::store::{self, file};
use crate::sys::process::effective_uid;
use crate::tenure::record::State;
use crate::units::counted;

/// Whether the operator has consented beforehand to what cannot be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    /// No: ask on a terminal, and refuse without one.
    Ask,
    /// Yes.
    Forced,
}

/// What to write to which image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// The cache file.
    pub cache: PathBuf,
    /// Where its image is now, if it has moved.
    pub image: Option<PathBuf>,
    /// Whether to write even to an image that is not shown to be the cache's.
    pub consent: Consent,
}

/// Writes the cache in a file to its image and removes the file; returns a message for the operator.
///
/// => A file that records something of its guest stays, without its pages: the next daemon must know it.
///
/// # Errors
/// [`ErrorKind::Ledger`] when the file is not a cache of this user and of this boot, or its image was replaced;
/// [`ErrorKind::Locked`] when a daemon serves the image; [`ErrorKind::Image`] when the image cannot be written.
pub fn recover(recovery: &Recovery) -> Result<String> {
    let path = &recovery.cache;
    let shown = visible(path);
    refuse_other_users(path)?;
    let file = ArenaFile::open_existing(path, Whose::Own)?;
    let Some(header) = file.header()? else {
        file.remove();
        return Ok(format!("removed {shown}, which was empty\n"));
    };
    if header.frames == 0 {
        let context = format!("{shown} holds no pages; remove it with --discard");
        return Err(Error::new(ErrorKind::Ledger, context));
    }
    // Checks what the ledger refers to.
    file.survey()?;
    let image_path = recovery.image.as_ref().unwrap_or(&header.image.path);
    if !image_path.is_absolute() && recovery.image.is_none() {
        let context = format!("the ledger in {shown} is damaged or forged: its image has no absolute path");
        return Err(Error::new(ErrorKind::Ledger, context));
    }
    let image_shown = visible(image_path);
    let options = file::OpenOptions { lock_patience: LOCK_PATIENCE, ..file::OpenOptions::default() };
    let image = store::open(None, image_path, &options).map_err(|e| {
        let is_moved = recovery.image.is_none() && !header.image.path.exists();
        if is_moved { e.with_hint("if the image has moved, name it with --image PATH") } else { e }
    })?;
    let arena = Arena::attach(file, &header)?;
    if recovery.consent != Consent::Forced {
        check_belongs(&arena, &header, &*image)?;
    }
    let mut progress = Progress::new();
    let written = write_back(&arena, &*image, &mut |done, total| progress.show(done, total))?;
    drop(progress);
    let written = counted(written, "page");
    // Before the file goes: a daemon must not miss it.
    settle(&*image, header.tenure, State::Clean);
    let file = arena.into_file().expect(HAS_FILE);
    if header.guest == GuestState::FRESH {
        file.remove();
        return Ok(format!("wrote {written} to {image_shown} and removed {shown}\n"));
    }
    file.shrink_to_header()?;
    let why = remembered(header.guest);
    Ok(format!("wrote {written} to {image_shown}; {shown} stays without its pages, because {why}\n"))
}

/// Refuses another user's cache: root would write what that user says to whatever image he names.
fn refuse_other_users(path: &Path) -> Result<()> {
    let user = effective_uid();
    if user != 0 {
        return Ok(());
    }
    let seen = ArenaFile::look_at(path, Whose::Anyone)?;
    if seen.owner == user {
        return Ok(());
    }
    let (shown, owner) = (visible(path), seen.owner);
    let why = "root would write what it says to whatever image it names";
    let hint = format!("recover it as that user: sudo -u '#{owner}' genblk recover {shown}");
    Err(Error::new(ErrorKind::Ledger, format!("{shown} belongs to user {owner}, and {why}; {hint}")))
}

/// Removes a cache file with everything in it; returns a message for the operator.
///
/// # Errors
/// [`ErrorKind::Ledger`] when the file is not a cache file, or holds data that the image lacks and there is no consent;
/// [`ErrorKind::Locked`] when a daemon uses it.
pub fn discard(path: &Path, consent: Consent) -> Result<String> {
    let shown = visible(path);
    let file = ArenaFile::open_existing(path, whose())?;
    // A file that cannot be read may hold anything.
    let survey = file.survey();
    let held = match &survey {
        Ok(None) => None,
        Ok(Some(survey)) => survey.is_dirty().then(|| describe(survey)),
        Err(e) => Some(format!("what cannot be read ({e})")),
    };
    if let Some(held) = held.filter(|_| consent == Consent::Ask) {
        if !is_interactive() {
            let context = format!("{shown} holds {held}; to throw that away, add --force");
            return Err(Error::new(ErrorKind::Ledger, context));
        }
        if !ask(&format!("{shown} holds {held}. Throw that away?")) {
            return Err(Error::new(ErrorKind::Ledger, format!("{shown} was kept")));
        }
    }
    if let Ok(Some(survey)) = &survey
        && let Err(e) = settle_discarded(&file, survey)
    {
        warn!("{e}; the image's record still names the cache: see \"genblk take-over --help\"");
    }
    file.remove();
    Ok(format!("removed {shown}\n"))
}

/// Records at the image of a cache that is thrown away that its tenure has ended.
///
/// # Errors
/// Those of [`store::open`]; [`ErrorKind::Ledger`] for another user's cache: root would open whatever it names.
fn settle_discarded(file: &ArenaFile, survey: &Survey) -> Result<()> {
    let header = &survey.header;
    if !header.tenure.is_some_and(|tenure| tenure.is_recorded) || !header.image.path.is_absolute() {
        return Ok(());
    }
    if file.owner() != effective_uid() {
        let (image, owner) = (visible(&header.image.path), file.owner());
        let context = format!("image {image} was not opened, because user {owner} has named it");
        return Err(Error::new(ErrorKind::Ledger, context));
    }
    let is_lossless = header.guest.data == GuestData::Intact && !survey.is_dirty();
    let options = file::OpenOptions { lock_patience: LOCK_PATIENCE, ..file::OpenOptions::default() };
    let image = store::open(None, &header.image.path, &options)?;
    settle(&*image, header.tenure, if is_lossless { State::Clean } else { State::Forfeited });
    Ok(())
}

/// What is lost with a cache.
fn describe(survey: &Survey) -> String {
    let ranges = match survey.zero_ranges {
        0 => String::new(),
        ranges => format!(" and {} to be zeroed", counted(ranges, "range")),
    };
    let dirty = counted(survey.dirty_pages, "dirty page");
    format!("{dirty}{ranges} of image {}, which the image lacks", visible(&survey.header.image.path))
}

/// Removes the cache files in `directory` from which nothing would be lost; returns a message for the operator.
///
/// # Errors
/// [`ErrorKind::Memory`] when the directory cannot be read.
pub fn prune(directory: &Path) -> Result<String> {
    let mut text = String::new();
    let (mut removed, mut kept, mut bytes) = (0, 0, 0);
    for folder in folders(directory)? {
        for (path, cache) in caches(&folder)? {
            if !cache.as_ref().is_ok_and(super::folders::Cache::is_prunable) {
                kept += 1;
                continue;
            }
            // Looked at again, now that it is locked.
            let Ok(file) = ArenaFile::open_existing(&path, whose()) else { continue };
            let (Ok(survey), owner) = (file.survey(), file.owner()) else { continue };
            let is_clean = survey.as_ref().is_none_or(|survey| !survey.is_dirty());
            if is_clean && (owner == effective_uid() || effective_uid() == 0) {
                let settled = survey.as_ref().map_or(Ok(()), |survey| settle_discarded(&file, survey));
                // An image that is there and whose record names the cache would be refused without it.
                if let (Err(e), Ok(cache)) = (settled, &cache)
                    && !matches!(cache.image, ImageState::Gone | ImageState::Replaced)
                {
                    text.push_str(&format!("kept {}: {e}\n", visible(&path)));
                    kept += 1;
                    continue;
                }
                file.remove();
                removed += 1;
                bytes += survey.map_or(0, |survey| survey.memory_bytes);
                text.push_str(&format!("removed {}\n", visible(&path)));
            }
        }
    }
    let mib = bytes >> 20;
    text.push_str(&format!("removed {} ({mib} MiB), kept {kept}\n", counted(removed, "cache")));
    Ok(text)
}
