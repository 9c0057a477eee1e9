//! Finds the cache files of this user, or, for root, those of all users.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Report;
use super::terminal::visible;
use crate::arena::{AllowedOwner, ArenaFile, FileSummary, GuestState, Header};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::recover::proof::{Proof, superseded};
use crate::store::file::{identity_and_token, recorded_tenure};
use crate::store::is_remote;
use crate::sys::process::effective_uid;
use crate::tenure::token::ChangeVerdict;

/// Name of root's directory; the names of other users' directories continue with a hyphen and the UID.
const DIR_NAME: &str = "genblk";

/// A cache file, and what was found out about it.
#[derive(Debug)]
pub(super) struct CacheFile {
    pub(super) path: PathBuf,
    pub(super) summary: FileSummary,
}

/// The present state of a cache's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ImageState {
    /// It is at its path, unchanged.
    Present,
    /// It is at its path, but another program than the cache's daemon has changed it.
    Changed,
    /// Nothing exists at its path.
    Deleted,
    /// Its file system is not mounted, or its device is not attached.
    Unmounted,
    /// Another image is at its path.
    Replaced,
    /// It has the record of a later tenure: the cache is never used again.
    Overtaken,
    /// It cannot be inspected, or the cache file does not name it.
    Unknown,
}

/// Which part of a cache file is still needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CacheNeed {
    /// All of it: it holds unwritten data or a report of data loss for the guest, or is in use.
    All,
    /// Its header, which records the guest's state; its pages can be freed.
    Header,
    /// Nothing: it can be removed.
    None,
}

impl CacheFile {
    /// Inspects the file at `path`.
    ///
    /// # Errors
    /// As [`ArenaFile::examine`].
    pub(super) fn examine(path: PathBuf, allowed: AllowedOwner) -> Result<Self> {
        let summary = ArenaFile::examine(&path, allowed)?;
        Ok(Self { path, summary })
    }

    /// The state of its image. May wait for the image's file system.
    pub(super) fn image(&self) -> ImageState {
        match &self.summary.survey {
            // A forged file could contain a path relative to the operator's working directory.
            Ok(Some(survey)) if survey.header.image.path.is_absolute() => image_state(&survey.header),
            _ => ImageState::Unknown,
        }
    }

    /// Which part of it is still needed.
    pub(super) fn needed(&self) -> CacheNeed {
        match &self.summary.survey {
            _ if self.summary.is_locked => CacheNeed::All,
            Ok(None) => CacheNeed::None,
            Ok(Some(survey)) if survey.is_of_this_boot && !survey.is_dirty() => {
                let header = &survey.header;
                if header.guest == GuestState::FRESH {
                    CacheNeed::None
                } else if header.frames > 0 && self.image() == ImageState::Deleted {
                    // The image may have been renamed, and its guest may still run.
                    CacheNeed::Header
                } else {
                    CacheNeed::All
                }
            }
            _ => CacheNeed::All,
        }
    }
}

/// The state of the image of the cache with this header.
fn image_state(header: &Header) -> ImageState {
    let (path, identity) = (&header.image.path, &header.image.identity);
    if is_remote(path) {
        return ImageState::Unknown;
    }
    match identity_and_token(path) {
        Ok((found, token)) if is_same_image(&found, identity) => match header.last_seen.judge(&token) {
            _ if is_overtaken(header) => ImageState::Overtaken,
            ChangeVerdict::Changed(_) => ImageState::Changed,
            _ => ImageState::Present,
        },
        Ok(_) => ImageState::Replaced,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            let dir = path.parent().and_then(|dir| fs::metadata(dir).ok());
            let is_mounted = dir.is_some_and(|dir| dir.dev() == identity.device);
            if is_mounted { ImageState::Deleted } else { ImageState::Unmounted }
        }
        Err(_) => ImageState::Unknown,
    }
}

/// Whether the cache's image has the record of a later tenure.
fn is_overtaken(header: &Header) -> bool {
    let ImageId { inode, .. } = header.image.identity;
    let last = recorded_tenure(&header.image.path).filter(|record| record.inode == inode);
    !header.is_set_aside && matches!(superseded(header, last.as_ref()), Some(Proof::Overtaken(_)))
}

/// Whether two identities are those of one image, whose file system may now have another device number.
fn is_same_image(found: &ImageId, known: &ImageId) -> bool {
    let is_remounted = known.born_ns != 0 && (found.inode, found.born_ns) == (known.inode, known.born_ns);
    found == known || is_remounted
}

/// The users whose files this process may inspect.
pub(super) fn allowed_owner() -> AllowedOwner {
    if effective_uid() == 0 { AllowedOwner::Anyone } else { AllowedOwner::Own }
}

/// The directories with cache files in `directory`, which is a memory directory or such a directory itself: that of
/// this user, or for root those of all users.
///
/// # Errors
/// [`ErrorKind::Memory`] when `directory` cannot be read.
pub(super) fn cache_dirs(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io(ErrorKind::Memory, format!("cannot read {}", directory.display()), e);
    let entries: Vec<_> = fs::read_dir(directory).map_err(failed)?.flatten().collect();
    if directory.file_name().is_some_and(|name| owner_of_cache_dir(name).is_some()) {
        return Ok(vec![directory.to_path_buf()]);
    }
    let user = effective_uid();
    let is_ours = |name: &OsStr| owner_of_cache_dir(name).is_some_and(|owner| user == 0 || owner == user);
    let mut dirs: Vec<PathBuf> = entries
        .iter()
        .filter(|entry| is_ours(&entry.file_name()) && entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(fs::DirEntry::path)
        .collect();
    // A directory under another name.
    if dirs.is_empty() && entries.iter().any(|entry| is_cache_name(&entry.file_name())) {
        dirs.push(directory.to_path_buf());
    }
    dirs.sort();
    Ok(dirs)
}

/// The user whose directory has this name; `None`: it is not such a directory.
fn owner_of_cache_dir(name: &OsStr) -> Option<u32> {
    let rest = name.to_str()?.strip_prefix(DIR_NAME)?;
    if rest.is_empty() { Some(0) } else { rest.strip_prefix('-')?.parse().ok() }
}

fn is_cache_name(name: &OsStr) -> bool {
    name.to_str().is_some_and(ImageId::is_file_name)
}

/// The cache files in a directory, each with the result of inspecting it.
///
/// => Reads the ledger of each, which takes time in proportion to the caches: see [`cache_files`].
///
/// # Errors
/// [`ErrorKind::Memory`] when the directory cannot be read; [`ErrorKind::Ledger`] when another user could have put
/// files there.
fn caches(dir: &Path) -> Result<Vec<(PathBuf, Result<CacheFile>)>> {
    let (paths, allowed) = cache_files(dir)?;
    Ok(paths.into_iter().map(|path| (path.clone(), CacheFile::examine(path, allowed))).collect())
}

/// The caches in `directory`, a memory directory or a directory of caches itself. The report gets the directories that
/// cannot be read.
///
/// # Errors
/// [`ErrorKind::Memory`] when the directory cannot be read.
pub(super) fn caches_in(directory: &Path, report: &mut Report) -> Result<Vec<(PathBuf, Result<CacheFile>)>> {
    let mut found = Vec::new();
    for dir in cache_dirs(directory)? {
        match caches(&dir) {
            Ok(caches) => found.extend(caches),
            Err(error) => report.fail(&visible(&dir), &error),
        }
    }
    Ok(found)
}

/// The paths of the cache files in a directory, and the users who may own them.
///
/// # Errors
/// As [`caches`].
pub(super) fn cache_files(dir: &Path) -> Result<(Vec<PathBuf>, AllowedOwner)> {
    let failed = |e| Error::io(ErrorKind::Memory, format!("cannot read {}", dir.display()), e);
    let metadata = fs::metadata(dir).map_err(failed)?;
    let allowed = if metadata.uid() == effective_uid() { AllowedOwner::Own } else { allowed_owner() };
    ArenaFile::check_dir(dir, allowed)?;
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)
        .map_err(failed)?
        .flatten()
        .filter(|entry| is_cache_name(&entry.file_name()))
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    Ok((paths, allowed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_directories_are_recognised_by_their_names() {
        for (name, owner) in
            [("genblk", Some(0)), ("genblk-1000", Some(1000)), ("genblk-", None), ("genblkx", None), ("genblk-a", None)]
        {
            assert_eq!(owner_of_cache_dir(OsStr::new(name)), owner, "{name}");
        }
    }
}
