//! What a daemon tells of the caches that no daemon uses, when it starts and when it lacks memory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::{info, warn};

use super::folders::{Cache, ImageState, caches};
use super::remembered;
use super::terminal::visible;
use crate::arena::{Arena, ArenaFile, Seen};
use crate::config::{Config, MemoryDir, Socket};
use crate::error::{ErrorKind, Result};
use crate::recover::write_back::Unwritten;
use crate::systemd::ServiceManager;
use crate::units::counted;

/// Where daemons keep caches unless they are told otherwise.
const DEFAULT_MEMORY_DIR: &str = "/dev/shm";

/// Logs the fd-store entries that no device uses. They stay in the fd store: they may hold the only copy of a guest's
/// data.
pub fn warn_unclaimed(config: &Config, manager: &Arc<ServiceManager>) {
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

/// What a cache file holds, for the operator.
fn description(file: ArenaFile) -> Result<String> {
    let Some(header) = file.header()? else { return Ok("empty".to_owned()) };
    let image = visible(&header.image.path);
    if header.frames == 0 {
        return Ok(format!("{image}: no pages; {}", remembered(header.guest)));
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
struct Unheld {
    count: u64,
    dirty: u64,
    bytes: u64,
}

impl Unheld {
    /// Those in this user's folder below a memory directory, as far as `counts` says.
    fn below(memory_dir: &Path, mut counts: impl FnMut(&Cache) -> bool) -> Self {
        let mut unheld = Self::default();
        for cache in all_below(memory_dir).iter().filter(|cache| !cache.seen.is_locked && counts(cache)) {
            let survey = cache.seen.survey.as_ref().ok().and_then(Option::as_ref);
            unheld.count += 1;
            unheld.dirty += u64::from(survey.is_some_and(crate::arena::Survey::is_dirty));
            unheld.bytes += survey.map_or(0, |survey| survey.memory_bytes);
        }
        unheld
    }
}

/// The caches in this user's folder below a memory directory.
fn all_below(memory_dir: &Path) -> Vec<Cache> {
    let found = caches(&ArenaFile::dir(memory_dir)).unwrap_or_default();
    found.into_iter().filter_map(|(_, cache)| cache.ok()).collect()
}

/// What is known of the cache files in this user's folder below a memory directory.
pub(in crate::recover) fn caches_below(memory_dir: &Path) -> Vec<Seen> {
    all_below(memory_dir).into_iter().map(|cache| cache.seen).collect()
}

/// The memory directories of a configuration, and the default one.
fn memory_dirs(config: &Config) -> BTreeSet<PathBuf> {
    let configured = config.devices.iter().filter_map(|device| match &device.cache.memory_dir {
        MemoryDir::Path(path) => Some(path.clone()),
        MemoryDir::Systemd => None,
    });
    configured.chain([PathBuf::from(DEFAULT_MEMORY_DIR)]).collect()
}

/// Removes the caches that hold nothing and whose images are gone, and logs how many others no daemon uses. Those of
/// the configured images are not counted.
///
/// => The devices are open: their caches are in use.
pub fn warn_unheld(config: &Config) {
    let images: BTreeSet<PathBuf> =
        config.devices.iter().map(|device| device.image.canonicalize().unwrap_or(device.image.clone())).collect();
    for memory_dir in memory_dirs(config) {
        for cache in all_below(&memory_dir) {
            if cache.is_prunable() && cache.image == ImageState::Gone {
                remove(&cache);
            }
        }
        let is_other = |cache: &Cache| match &cache.seen.survey {
            Ok(Some(survey)) => !images.contains(&survey.header.image.path),
            _ => true,
        };
        let unheld = Unheld::below(&memory_dir, is_other);
        if unheld.count > 0 {
            warn!("{}", describe(&unheld, &memory_dir));
        }
    }
}

/// Removes a clean cache whose image is gone.
fn remove(cache: &Cache) {
    let Ok(file) = ArenaFile::open_existing(&cache.path, crate::arena::Whose::Own) else { return };
    // Looked at again, now that it is locked.
    if file.survey().is_ok_and(|survey| survey.is_none_or(|survey| !survey.is_dirty())) {
        file.remove();
        info!("removed {}: it held nothing that its image, which is gone, lacked", visible(&cache.path));
    }
}

fn describe(unheld: &Unheld, memory_dir: &Path) -> String {
    let Unheld { count, dirty, bytes } = unheld;
    let list = match memory_dir == Path::new(DEFAULT_MEMORY_DIR) {
        true => "genblk recover".to_owned(),
        false => format!("genblk recover --memory-dir {}", visible(memory_dir)),
    };
    let caches = counted(*count, "cache");
    let mib = bytes >> 20;
    format!(
        "{}: {caches} that no daemon uses, {dirty} of them dirty, take {mib} MiB; list them with \"{list}\"",
        visible(memory_dir)
    )
}

/// For an error about memory: which memory the caches take that no daemon uses; `None` if there are none.
pub fn hint_for(memory_dir: &MemoryDir) -> Option<String> {
    let memory_dir = match memory_dir {
        MemoryDir::Path(path) => path,
        MemoryDir::Systemd => Path::new(DEFAULT_MEMORY_DIR),
    };
    let unheld = Unheld::below(memory_dir, |_| true);
    (unheld.count > 0).then(|| describe(&unheld, memory_dir))
}

/// Memory in bytes that the caches of these images, given by their paths, take in this user's folder below a memory
/// directory.
pub fn bytes_kept_for(memory_dir: &Path, images: &BTreeSet<PathBuf>) -> u64 {
    let surveys = all_below(memory_dir).into_iter().filter_map(|cache| cache.seen.survey.ok().flatten());
    surveys.filter(|survey| images.contains(&survey.header.image.path)).map(|survey| survey.memory_bytes).sum()
}

/// Checks that no other user could have made or can change this user's folder below a memory directory.
///
/// # Errors
/// [`ErrorKind::Ledger`] when one could.
pub fn check_folder(memory_dir: &Path) -> Result<()> {
    match caches(&ArenaFile::dir(memory_dir)) {
        Err(e) if e.kind() == ErrorKind::Ledger => Err(e),
        _ => Ok(()),
    }
}
