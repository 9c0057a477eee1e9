//! A daemon's reports about caches that no daemon uses, at its start and when memory is insufficient.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use log::{info, warn};

use super::cache_dirs::{CacheFile, CacheNeed, ImageState, allowed_owner, cache_files};
use super::describe_guest_state;
use super::terminal::visible;
use crate::arena::{Arena, ArenaFile, FileSummary, GuestState, Header, Survey};
use crate::config::{Config, DeviceConfig, MemoryDir, Socket};
use crate::error::{ErrorKind, Result};
use crate::recover::operation::end_tenure;
use crate::recover::write_back::Unwritten;
use crate::systemd::ServiceManager;
use crate::tenure::record::TenureState;
use crate::units::counted;

/// The directory in which daemons keep caches by default.
const DEFAULT_MEMORY_DIR: &str = "/dev/shm";
/// Longest wait for the file system of an image's path.
const RESOLVE_MAX: Duration = Duration::from_secs(1);

/// Logs the fd-store entries that no device uses. They stay in the fd store: they may hold the only copy of a guest's
/// data.
pub fn warn_unused_fds(config: &Config, manager: &Arc<ServiceManager>) {
    let sockets = config.devices.iter().filter_map(|device| match device.socket {
        Socket::Fd(fd) => Some(fd),
        Socket::Path(_) => None,
    });
    let unclaimed = manager.fdstore_unclaimed(&sockets.collect::<Vec<_>>());
    let described = unclaimed.iter().map(|name| match ArenaFile::take_named_from_fdstore(manager, name) {
        Ok(Some(file)) => format!("{name} ({})", description(file).unwrap_or_else(|e| e.to_string())),
        Ok(None) => name.clone(),
        Err(e) => format!("{name} ({e})"),
    });
    if !unclaimed.is_empty() {
        let described = described.collect::<Vec<_>>().join(", ");
        warn!("fd-store entries not used by any configured device (left in place): {described}");
    }
}

/// The contents of a cache file, for the operator.
fn description(file: ArenaFile) -> Result<String> {
    let Some(header) = file.header()? else { return Ok("empty".to_owned()) };
    let image = visible(&header.image.path);
    if header.frames == 0 {
        return Ok(format!("{image}: no pages; {}", describe_guest_state(header.guest)));
    }
    let arena = Arena::attach(file, &header)?;
    let pages = counted(arena.records().count() as u64, "cached page");
    let Unwritten { pages: dirty, ranges } = Unwritten::of(&arena);
    let zeroes = match ranges {
        0 => String::new(),
        ranges => format!(", {} to be zeroed", counted(ranges as u64, "range")),
    };
    Ok(format!("{image}: {pages} ({dirty} dirty){zeroes}"))
}

/// Caches of a memory directory that no process uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct UnusedCaches {
    count: u64,
    dirty: u64,
    bytes: u64,
}

impl UnusedCaches {
    /// Counts a cache. One without pages is not counted: it takes almost no memory, and the next daemon of its image
    /// uses it.
    fn add(&mut self, cache: &CacheFile) {
        let survey = cache.summary.survey.as_ref().ok().and_then(Option::as_ref);
        if survey.is_some_and(|survey| survey.header.frames == 0) {
            return;
        }
        self.count += 1;
        self.dirty += u64::from(survey.is_some_and(Survey::is_dirty));
        self.bytes += survey.map_or(0, |survey| survey.memory_bytes);
    }
}

/// The caches in this user's folder below a memory directory that no process uses. Those in use are neither locked nor
/// read.
fn unused_caches_in(memory_dir: &Path) -> Vec<CacheFile> {
    let Ok((paths, allowed)) = cache_files(&ArenaFile::dir(memory_dir)) else { return Vec::new() };
    let unused = paths.into_iter().filter(|path| !ArenaFile::is_held(path, allowed));
    unused.filter_map(|path| CacheFile::examine(path, allowed).ok()).filter(|cache| !cache.summary.is_locked).collect()
}

/// The cache files in this user's folder below a memory directory whose headers satisfy `is_wanted`.
pub(in crate::recover) fn caches_below(
    memory_dir: &Path,
    mut is_wanted: impl FnMut(&Header) -> bool,
) -> Vec<FileSummary> {
    let Ok((paths, allowed)) = cache_files(&ArenaFile::dir(memory_dir)) else { return Vec::new() };
    let wanted = paths.into_iter().filter(|path| {
        let header = ArenaFile::peek(path, allowed).ok().flatten();
        header.is_some_and(|header| is_wanted(&header))
    });
    wanted.filter_map(|path| ArenaFile::examine(&path, allowed).ok()).collect()
}

/// The memory directories of devices, and the default one.
fn memory_dirs<'a>(devices: impl IntoIterator<Item = &'a DeviceConfig>) -> BTreeSet<PathBuf> {
    let configured = devices.into_iter().filter_map(|device| match &device.cache.memory_dir {
        MemoryDir::Path(path) => Some(path.clone()),
        MemoryDir::Systemd => None,
    });
    configured.chain([PathBuf::from(DEFAULT_MEMORY_DIR)]).collect()
}

/// Whether a cache that an earlier daemon left for the image at a device's path holds unwritten data. Does not wait for
/// the image, which may not answer.
pub fn has_unwritten_cache(config: &DeviceConfig) -> bool {
    let memory_dirs = memory_dirs([config]);
    let image = resolve_in_time(&config.image);
    let is_of_image = |path: &Path| *path == config.image || *path == image;
    let mut caches =
        memory_dirs.iter().flat_map(|directory| caches_below(directory, |header| is_of_image(&header.image.path)));
    caches.any(|summary| matches!(&summary.survey, Ok(Some(survey)) if survey.is_dirty()))
}

/// The path without symbolic links, or the path itself if its file system does not answer in time.
fn resolve_in_time(path: &Path) -> PathBuf {
    let (sender, resolved) = channel();
    let asked = path.to_path_buf();
    let ask = move || drop(sender.send(asked.canonicalize()));
    let thread = thread::Builder::new().name("resolve".to_owned()).spawn(ask);
    let answer = thread.ok().and_then(|_| resolved.recv_timeout(RESOLVE_MAX).ok());
    answer.and_then(io::Result::ok).unwrap_or_else(|| path.to_path_buf())
}

/// Removes the caches that hold no unwritten data and whose images no longer exist, and logs how many others no daemon
/// uses.
///
/// => The devices are open, so their caches are in use. If a configured image has replaced another one, the cache of
/// the replaced one is among the others.
pub fn warn_unused_files(config: &Config) {
    for memory_dir in memory_dirs(&config.devices) {
        let mut unused = UnusedCaches::default();
        for cache in unused_caches_in(&memory_dir) {
            let may_clear = cache.needed() != CacheNeed::All && cache.image() == ImageState::Deleted;
            // The image is no longer at its path, so its record cannot be changed.
            let note =
                |file: &ArenaFile, survey: &Survey| end_tenure(file, None, survey.header.tenure, TenureState::Clean);
            match may_clear.then(|| clear(&cache, note)) {
                Some(Ok(Cleared::Removed(_))) => {
                    info!(
                        "removed cache {}: its image no longer exists, and it held no unwritten data",
                        visible(&cache.path)
                    );
                }
                Some(Ok(Cleared::Shrunk(_))) => {}
                Some(Err(e)) => {
                    warn!("cannot remove {}, which holds no unwritten data: {e}", visible(&cache.path));
                    unused.add(&cache);
                }
                Some(Ok(Cleared::Kept)) | None => {
                    warn_of_replaced_image(config, &cache);
                    unused.add(&cache);
                }
            }
        }
        if unused.count > 0 {
            warn!("{}", describe(&unused, &memory_dir));
        }
    }
}

/// Warns of a cache with unwritten data of an image that another file has replaced at the path of a configured image.
fn warn_of_replaced_image(config: &Config, cache: &CacheFile) {
    let Ok(Some(survey)) = &cache.summary.survey else { return };
    let path = &survey.header.image.path;
    let is_image = |device: &&DeviceConfig| device.image == *path || resolve_in_time(&device.image) == *path;
    if !survey.is_dirty() || cache.image() != ImageState::Replaced {
        return;
    }
    if let Some(device) = config.devices.iter().find(is_image) {
        let (image, file) = (visible(path), visible(&cache.path));
        warn!(
            "{}: another file has replaced image {image}; {file}, the cache of the replaced one, holds {}, not yet \
             written: to write it to the replaced file, wherever that is now, run \"genblk recover --force --image \
             PATH {file}\"; to delete it, \"genblk recover --discard {file}\"",
            device.name,
            Unwritten::surveyed(survey)
        );
    }
}

/// The result of clearing a cache, with the bytes of memory that it freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cleared {
    Kept,
    Shrunk(u64),
    Removed(u64),
}

/// Frees the part of a cache that is no longer needed, without losing data. Before it removes a cache, calls
/// `end_tenure`, which ensures that the next daemon does not report the cache as missing.
///
/// # Errors
/// Errors of `end_tenure`, and of opening the file. The file stays then.
pub(super) fn clear(cache: &CacheFile, end_tenure: impl Fn(&ArenaFile, &Survey) -> Result<()>) -> Result<Cleared> {
    let needed = cache.needed();
    if needed == CacheNeed::All {
        return Ok(Cleared::Kept);
    }
    let file = ArenaFile::open_existing(&cache.path, allowed_owner())?;
    // Inspected again, now that it is locked.
    let survey = file.survey()?;
    let is_same = |survey: &Survey| {
        !survey.is_dirty() && (needed == CacheNeed::Header || survey.header.guest == GuestState::FRESH)
    };
    match &survey {
        Some(survey) if !is_same(survey) => return Ok(Cleared::Kept),
        Some(survey) if needed == CacheNeed::Header => {
            file.shrink_to_header()?;
            return Ok(Cleared::Shrunk(survey.memory_bytes));
        }
        Some(survey) => end_tenure(&file, survey)?,
        None => {}
    }
    file.remove();
    Ok(Cleared::Removed(survey.map_or(0, |survey| survey.memory_bytes)))
}

fn describe(unused: &UnusedCaches, memory_dir: &Path) -> String {
    let UnusedCaches { count, dirty, bytes } = unused;
    let list = match memory_dir == Path::new(DEFAULT_MEMORY_DIR) {
        true => "genblk recover".to_owned(),
        false => format!("genblk recover --memory-dir {}", visible(memory_dir)),
    };
    let caches = counted(*count, "cache");
    let mib = bytes >> 20;
    format!("{}: {caches} in use by no daemon ({dirty} dirty, {mib} MiB); list with \"{list}\"", visible(memory_dir))
}

/// A hint for an error about insufficient memory: the memory that unused caches take; `None` if there are none.
pub fn hint_for(memory_dir: &MemoryDir) -> Option<String> {
    let memory_dir = match memory_dir {
        MemoryDir::Path(path) => path,
        MemoryDir::Systemd => Path::new(DEFAULT_MEMORY_DIR),
    };
    let mut unused = UnusedCaches::default();
    unused_caches_in(memory_dir).iter().for_each(|cache| unused.add(cache));
    (unused.count > 0).then(|| describe(&unused, memory_dir))
}

/// Memory in bytes that the caches of these images, given by their paths, take in this user's folder below a memory
/// directory.
pub fn cache_memory_bytes(memory_dir: &Path, images: &BTreeSet<PathBuf>) -> u64 {
    let kept = caches_below(memory_dir, |header| images.contains(&header.image.path));
    kept.into_iter().filter_map(|summary| summary.survey.ok().flatten()).map(|survey| survey.memory_bytes).sum()
}

/// Checks that no other user could have created or can change this user's folder below a memory directory.
///
/// # Errors
/// [`ErrorKind::Ledger`] when one could.
pub fn check_cache_dir(memory_dir: &Path) -> Result<()> {
    match cache_files(&ArenaFile::dir(memory_dir)) {
        Err(e) if e.kind() == ErrorKind::Ledger => Err(e),
        _ => Ok(()),
    }
}
