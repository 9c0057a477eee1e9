//! Finds the caches that may belong to an image, wherever earlier daemons left them.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::LOCK_TIMEOUT;
use super::proof::MatchStrength;
use super::write_back::Unwritten;
use crate::arena::{AllowedOwner, ArenaFile, Header, ImageFacts};
use crate::config::MemoryDir;
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::store::file::{identity_and_token, is_partition};
use crate::store::named::{ImageKind, NamedImage};
use crate::sys::process::effective_uid;
use crate::systemd::ServiceManager;
use crate::tenure::record::{CacheLocation, Record};

/// The directory in which daemons keep caches by default.
const DEFAULT_MEMORY_DIR: &str = "/dev/shm";

/// The facts that a header records about an image.
pub(super) fn facts_of(image: &dyn NamedImage) -> ImageFacts {
    ImageFacts {
        identity: image.identity(),
        size_bytes: image.limits().size_bytes.get(),
        path: image.canonical_path(),
        alias: image.alias(),
    }
}

/// Whether a record was written for this file, and not for another one from which this file was copied.
pub(super) fn is_of(record: &Record, facts: &ImageFacts) -> bool {
    let ImageId { inode, born_ns, .. } = facts.identity;
    let is_same_file = record.inode == inode && (record.born_ns == born_ns || record.born_ns == 0 || born_ns == 0);
    is_same_file && !is_of_original(record, facts)
}

/// Whether the file for which a record was written still exists at the path in its cache, and is another file than this
/// one: files in a snapshot of a file system have the inode numbers, creation times and records of the originals.
fn is_of_original(record: &Record, facts: &ImageFacts) -> bool {
    let CacheLocation::Path(path) = &record.cache else { return false };
    let Ok(Some(header)) = ArenaFile::peek(path, allowed_owner()) else { return false };
    header.tenure.is_some_and(|tenure| tenure.id == record.tenure) && is_copy(&header.image, &facts.identity)
}

/// A cache that may belong to an image.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) file: ArenaFile,
    pub(super) header: Header,
    pub(super) match_strength: MatchStrength,
    /// Unwritten data in a cache of another user. Such a file is read but not mapped, because that user can truncate
    /// it.
    pub(super) foreign: Option<Unwritten>,
}

impl Candidate {
    /// Its data that is not yet on the image.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] for a ledger that is damaged, [`ErrorKind::Memory`] for one that cannot be read.
    pub(super) fn unwritten(&self) -> Result<Unwritten> {
        let none = Unwritten::NOTHING;
        let Some(survey) = self.file.survey()? else { return Ok(none) };
        Ok(self.foreign.unwrap_or_else(|| Unwritten::surveyed(&survey)))
    }
}

/// A search for the caches of an image.
#[derive(Debug)]
pub(super) struct Search<'a> {
    pub(super) image: &'a dyn NamedImage,
    pub(super) facts: &'a ImageFacts,
    /// The image's record, if it has one that was written for it.
    pub(super) record: Option<&'a Record>,
    /// The records of images that share bytes with this one.
    pub(super) overlapping: &'a [Record],
    pub(super) memory_dir: &'a MemoryDir,
    pub(super) manager: &'a Arc<ServiceManager>,
}

impl Search<'_> {
    /// All caches that may belong to the image, opened and locked: those of the fd store first, then by path.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] when another process uses one that belongs to the image; [`ErrorKind::Ledger`] for one
    /// that cannot be read, [`ErrorKind::Memory`] for one that cannot be opened.
    pub(super) fn run(&self) -> Result<Vec<Candidate>> {
        self.candidates()?.filter_map(Result::transpose).collect()
    }

    /// As [`Search::run`], but an error with one cache does not hide the others.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] for a directory that cannot be listed.
    pub(super) fn run_through(&self) -> Result<(Vec<Candidate>, Vec<Error>)> {
        let (mut found, mut problems) = (Vec::new(), Vec::new());
        for result in self.candidates()? {
            match result {
                Ok(candidate) => found.extend(candidate),
                Err(e) => problems.push(e),
            }
        }
        Ok((found, problems))
    }

    /// The candidate in each place.
    fn candidates(&self) -> Result<impl Iterator<Item = Result<Option<Candidate>>>> {
        let named = self.manager.fdstore_names().into_iter().map(|name| self.candidate_in_fdstore(&name));
        let filed = self.paths()?.into_iter().map(|path| self.candidate_at(&path));
        Ok(named.chain(filed))
    }

    fn candidate_in_fdstore(&self, name: &str) -> Result<Option<Candidate>> {
        let peeked = ArenaFile::peek_in_fdstore(self.manager, name);
        let Some(match_strength) = self.match_strength_of(peeked, OsStr::new(name))? else { return Ok(None) };
        let Some(file) = ArenaFile::take_named_from_fdstore(self.manager, name)? else { return Ok(None) };
        self.candidate(file, match_strength)
    }

    fn candidate_at(&self, path: &PathBuf) -> Result<Option<Candidate>> {
        let is_recorded = self.recorded_paths().any(|recorded| recorded == path);
        let peeked = match ArenaFile::peek(path, allowed_owner()) {
            Err(e) if is_recorded && e.kind() == ErrorKind::Memory => {
                if path.try_exists().is_ok_and(|exists| !exists) {
                    return Ok(None);
                }
                return Err(self.unreachable(path, &e));
            }
            // Skip other users' files, and files removed meanwhile. But a file that cannot be opened for lack of
            // resources may be the image's cache.
            Err(e) if e.kind() == ErrorKind::Memory && !e.is_lack_of_resources() => return Ok(None),
            peeked => peeked,
        };
        let name = path.file_name().unwrap_or_default();
        let match_strength = match self.match_strength_of(peeked, name) {
            Err(e) if !is_recorded && !is_in_own_directory(path) && !e.is_lack_of_resources() => return Ok(None),
            match_strength => match_strength?,
        };
        let Some(match_strength) = match_strength else { return Ok(None) };
        self.open(path, match_strength, is_recorded)
    }

    fn open(&self, path: &Path, match_strength: MatchStrength, is_recorded: bool) -> Result<Option<Candidate>> {
        match ArenaFile::open_within(path, allowed_owner(), LOCK_TIMEOUT) {
            Ok(file) => self.candidate(file, match_strength),
            Err(e) if e.kind() == ErrorKind::Locked && is_recorded => Err(e),
            // A running daemon uses it for another image: this image's lock is ours.
            Err(e) if e.kind() == ErrorKind::Locked && match_strength == MatchStrength::Similar => Ok(None),
            Err(_) if !path.exists() => Ok(None),
            Err(e) if e.kind() == ErrorKind::Memory => Err(self.unreachable(path, &e)),
            Err(e) => Err(e),
        }
    }

    fn candidate(&self, file: ArenaFile, match_strength: MatchStrength) -> Result<Option<Candidate>> {
        if !file.is_in_fdstore() && file.owner() != effective_uid() {
            let survey = file.survey().ok().flatten().filter(|survey| survey.is_of_this_boot);
            return Ok(survey.map(|survey| {
                let unwritten = Unwritten::surveyed(&survey);
                Candidate { file, header: survey.header, match_strength, foreign: Some(unwritten) }
            }));
        }
        // Read again: before it was locked, another process could change it.
        let header = file.header()?;
        Ok(header.map(|header| Candidate { file, header, match_strength, foreign: None }))
    }

    fn unreachable(&self, path: &Path, error: &Error) -> Error {
        let (image, path) = (self.image.path().display(), path.display());
        let context = format!("the cache of image {image} is in {path}, which cannot be used ({error})");
        let remedy = if error.is_lack_of_rights() { "run as the user of that file; " } else { "" };
        let hint = format!(
            "{remedy}to serve the image without that cache's completed writes, run \"genblk take-over {image}\""
        );
        Error::new(ErrorKind::Ledger, format!("{context}; {hint}"))
    }

    /// The paths of caches in records.
    fn recorded_paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.record.into_iter().chain(self.overlapping).filter_map(|record| match &record.cache {
            CacheLocation::Path(path) => Some(path),
            _ => None,
        })
    }

    /// The files that are inspected, each once.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] for a directory that cannot be listed, except those of other users: it may hold the cache.
    fn paths(&self) -> Result<Vec<PathBuf>> {
        let mut memory_dirs = vec![PathBuf::from(DEFAULT_MEMORY_DIR)];
        if let MemoryDir::Path(configured) = self.memory_dir {
            memory_dirs.insert(0, configured.clone());
        }
        let mut paths: Vec<PathBuf> = self.recorded_paths().cloned().collect();
        let directories =
            memory_dirs.iter().map(|memory_dir| ArenaFile::dirs(memory_dir)).collect::<Result<Vec<_>>>()?;
        for directory in directories.into_iter().flatten() {
            let directory = directory.canonicalize().unwrap_or(directory);
            if !self.is_trusted(&directory) {
                continue;
            }
            let mut files = match files_in(&directory) {
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => Vec::new(),
                files => files
                    .map_err(|e| Error::io(ErrorKind::Memory, format!("cannot list {}", directory.display()), e))?,
            };
            files.sort();
            paths.extend(files);
        }
        let mut seen = std::collections::HashSet::new();
        paths.retain(|path| seen.insert(path.clone()));
        Ok(paths)
    }

    /// Whether a directory's caches are trusted: only its owner can write to it, and the owner may write to the image.
    /// Otherwise a user could forge a cache for another user's image.
    fn is_trusted(&self, directory: &Path) -> bool {
        let Ok(directory) = fs::metadata(directory) else { return false };
        let is_private = directory.mode() & 0o022 == 0;
        if self.image.kind() == ImageKind::Remote {
            // It is unknown which users may write to the image.
            return is_private && directory.uid() == effective_uid();
        }
        let Ok(image) = fs::metadata(self.image.path()) else { return false };
        let others_may_write = image.mode() & 0o022 != 0;
        is_private && (directory.uid() == effective_uid() || directory.uid() == image.uid() || others_may_write)
    }

    /// How strongly a header indicates that its cache belongs to the image; `None`: it does not. `name` is that of its
    /// file.
    ///
    /// # Errors
    /// The header cannot be read, and by its name the file belongs to the image, or no file can be read at present.
    fn match_strength_of(&self, peeked: Result<Option<Header>>, name: &OsStr) -> Result<Option<MatchStrength>> {
        let first_name = self.facts.identity.file_name(0, 0);
        let prefix = first_name.trim_end_matches('0');
        match peeked {
            Ok(header) => Ok(header.and_then(|header| self.match_strength(&header))),
            Err(e) if e.is_lack_of_resources() || name.to_string_lossy().contains(prefix) => Err(e),
            Err(e) => {
                log::debug!("{}: {e}", name.display());
                Ok(None)
            }
        }
    }

    /// How strongly a header indicates that its cache belongs to the image; `None`: it does not.
    pub(super) fn match_strength(&self, header: &Header) -> Option<MatchStrength> {
        let (left, image) = (&header.image, self.facts);
        let recorded = self.record.map(|record| record.tenure);
        if recorded.is_some() && recorded == header.tenure.map(|tenure| tenure.id)
            || left.identity == image.identity && image.identity.inode != 0
        {
            return Some(MatchStrength::Same);
        }
        if self.overlapping.iter().any(|record| header.tenure.is_some_and(|tenure| tenure.id == record.tenure)) {
            return Some(MatchStrength::OtherAccess);
        }
        let (old, new) = (&left.identity, &image.identity);
        let is_device = self.image.kind() == ImageKind::Device;
        let is_behind =
            |device: &ImageFacts, file: &ImageFacts| file.alias.is_empty() && is_loop_on(device, &file.path);
        if is_device && is_behind(image, left) && has_identity(&left.path, old) || !is_device && is_behind(left, image)
        {
            return Some(MatchStrength::OtherAccess);
        }
        if is_device && overlap(left, image) {
            return Some(MatchStrength::OtherAccess);
        }
        if !is_device && old.inode == new.inode && old.born_ns == new.born_ns && old.born_ns != 0 {
            // The file system was remounted, unless the original still exists.
            return if is_copy(left, new) { None } else { Some(MatchStrength::Same) };
        }
        if is_device && !left.alias.is_empty() && !image.alias.is_empty() {
            return (left.alias == image.alias).then_some(MatchStrength::Same);
        }
        let are_both_born = old.born_ns != 0 && new.born_ns != 0;
        let was_replaced = !is_device && (old.device == new.device || are_both_born);
        (left.path == image.path && !was_replaced).then_some(MatchStrength::Similar)
    }
}

/// Whether a block device is a loop device on the file at `path`, or a partition of one.
fn is_loop_on(device: &ImageFacts, path: &Path) -> bool {
    let file = device.alias.strip_prefix("loop:").and_then(|rest| rest.strip_prefix(path.to_str()?));
    file.is_some_and(|offset| offset.starts_with(':'))
}

/// Whether two block devices have bytes in common, because one is a partition of the other. So may a partition that no
/// longer exists.
fn overlap(one: &ImageFacts, other: &ImageFacts) -> bool {
    let (first, second) = (&one.identity, &other.identity);
    // The kernel's sequence number of a partition is that of its disk.
    let is_same_disk = first.inode == second.inode && first.inode != 0 && (first.born_ns, second.born_ns) == (0, 0);
    let are_devices = !one.path.is_file() && !other.path.is_file();
    let are_partitions = is_partition(first.device) && is_partition(second.device);
    is_same_disk && are_devices && first.device != second.device && !are_partitions
}

/// Whether the path leads to this file, perhaps under another device number.
pub(super) fn has_identity(path: &Path, identity: &ImageId) -> bool {
    identity_and_token(path).is_ok_and(|(found, _)| (found.inode, found.born_ns) == (identity.inode, identity.born_ns))
}

/// Whether a file is in a directory of this user.
fn is_in_own_directory(path: &Path) -> bool {
    let directory = path.parent().and_then(|directory| fs::metadata(directory).ok());
    directory.is_some_and(|directory| directory.uid() == effective_uid())
}

/// The files in a directory.
fn files_in(directory: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect()
}

/// Whether a file is a copy of the image of a cache, as in a snapshot: the path of the image leads to its twin in
/// another file system.
///
/// => Device numbers change when file systems are mounted again, so the recorded one shows nothing.
fn is_copy(of: &ImageFacts, file: &ImageId) -> bool {
    identity_and_token(&of.path).is_ok_and(|(twin, _)| {
        let is_same_file = twin.inode == file.inode && twin.born_ns == file.born_ns && file.inode != 0;
        is_same_file && of.identity.inode == file.inode && twin.device != file.device
    })
}

/// The users whose caches are read. Root reads all of them, but uses only its own.
pub(super) fn allowed_owner() -> AllowedOwner {
    if effective_uid() == 0 { AllowedOwner::Anyone } else { AllowedOwner::Own }
}
