//! The cache that an earlier daemon left in memory: the next daemon restores it, or the operator writes it to its
//! image.

mod kept;
mod memory_dir;
mod operator;
mod write_back;

use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};

use crate::arena::{Arena, ArenaFile, ArenaSpec, GuestData, GuestState, Header, NotCreated};
use crate::config::{DeviceConfig, MemoryDir, Survive};
use crate::error::{Error, ErrorKind, Result};
use crate::store::file::FileImage;
use crate::systemd::ServiceManager;
use crate::units::counted;

pub use kept::has_kept_cache;
pub use memory_dir::{check_memory_dir, file_system_of};
pub use operator::{
    Consent, Recovery, bytes_kept_for, check_folder, discard, hint_for, list, prune, recover, warn_unclaimed,
    warn_unheld,
};

use write_back::{Unwritten, write_back};

/// How long to wait for the lock of an image or of a cache file. A killed daemon keeps its locks until the kernel has
/// finished its I/O, and rightly so: until then that I/O can still change the image. A daemon that ends in order
/// releases its cache before its image. A daemon that is started at once in place of either must wait, and not fail.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// What the log says where no file outlives the daemon.
const VOLATILE_UNMARKED: &str = "using a cache that does not survive a crash; data loss would go undetected";

const HAS_HEADER: &str = "a file with pages has a header";
const HAS_FILE: &str = "the arena was attached to a file";

/// What the file that was found for an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contents {
    /// No pages: the file is new, or a loss marker.
    NoPages,
    /// A cache of the configured size in the newest layout.
    FittingCache,
    /// Another cache.
    OtherCache,
}

/// Where the file was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FoundAt {
    /// At the location that the configuration names.
    Configured,
    /// In the service manager's fd store, while the configuration names a directory.
    Elsewhere,
}

/// What to do with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// Restore the cache that it holds.
    Attach,
    /// Write its dirty pages to the image, and create a new cache.
    WriteBack,
    /// Create a new cache.
    Create,
}

/// The decision table of recovery.
fn decide(contents: Contents, found_at: FoundAt, survive: Survive) -> Decision {
    match (contents, found_at, survive) {
        (Contents::FittingCache, FoundAt::Configured, Survive::Auto | Survive::Always) => Decision::Attach,
        (Contents::FittingCache | Contents::OtherCache, _, _) => Decision::WriteBack,
        (Contents::NoPages, _, _) => Decision::Create,
    }
}

impl Contents {
    fn of(header: Option<&Header>, frames: usize) -> Self {
        match header {
            None => Self::NoPages,
            Some(header) if header.frames == 0 => Self::NoPages,
            Some(header) if header.fits(frames) => Self::FittingCache,
            Some(_) => Self::OtherCache,
        }
    }
}

/// The memory for a device's cache: the one that the previous daemon left if it fits the configuration, else a new one.
/// `frames` is the configured size.
///
/// => No completed write is lost: dirty pages of a cache that does not fit are on the image when this returns. What the
///    previous daemon knew of its guest (data loss, write-through) is recorded in the new arena as well.
///
/// # Errors
/// [`ErrorKind::Memory`] when there is no memory for the cache; [`ErrorKind::Ledger`] when the file that the previous
/// daemon left cannot be read; [`ErrorKind::Image`] when its pages cannot be written to the image.
pub fn arena_for(
    config: &DeviceConfig,
    image: &FileImage,
    frames: usize,
    manager: &Arc<ServiceManager>,
) -> Result<Arena> {
    if config.read_only {
        return arena_for_reading(config, image, frames, manager);
    }
    let name = &config.name;
    let new = NewCache { config, image, frames, manager };
    // The fd store may hold completed writes even if the configuration names another location now.
    let found = match ArenaFile::take_from_fdstore(manager, &image.identity())? {
        Some(file) => Ok(file),
        None => new.open_file(),
    };
    let file = match found {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::Memory && config.cache.survive != Survive::Always => {
            warn!("{name}: {e}; {VOLATILE_UNMARKED}");
            return Arena::anonymous(frames);
        }
        Err(e) => return Err(e),
    };
    let found_at = new.location_of(&file);
    let header = file.header()?;
    let arena = match decide(Contents::of(header.as_ref(), frames), found_at, config.cache.survive) {
        Decision::Attach => Arena::attach(file, &header.expect(HAS_HEADER))?,
        Decision::WriteBack => {
            let target = new.prepare_target(found_at, &file)?;
            let arena = Arena::attach(file, &header.expect(HAS_HEADER))?;
            let dirty = counted(write_back(&arena, image, &mut |_, _| {})?, "dirty page");
            info!("{name}: found a cache that does not fit the configuration; wrote its {dirty} to the image");
            new.replace(arena.into_file().expect(HAS_FILE), target)?
        }
        Decision::Create => {
            let target = new.prepare_target(found_at, &file)?;
            new.replace(file, target)?
        }
    };
    if arena.has_data_loss() {
        warn_of_data_loss(name);
    }
    if arena.is_write_through() {
        info!("{name}: the guest selected write-through earlier; it stays in effect");
    }
    Ok(arena)
}

fn warn_of_data_loss(name: &str) {
    warn!(
        "{name}: an earlier daemon died with completed writes that the image lacks; all requests of this guest fail \
         until it resets the device"
    );
}

/// The memory for the cache of a read-only device, which does not outlive the daemon.
///
/// => The caches of earlier daemons are only looked at: a device that cannot write to the image serves it beside them.
///
/// # Errors
/// As [`arena_for`], and [`ErrorKind::Ledger`] when an earlier daemon's cache holds writes that the image lacks: the
/// device would serve older data.
fn arena_for_reading(
    config: &DeviceConfig,
    image: &FileImage,
    frames: usize,
    manager: &Arc<ServiceManager>,
) -> Result<Arena> {
    let (name, identity) = (&config.name, image.identity());
    let in_directory = match &config.cache.memory_dir {
        MemoryDir::Path(directory) => ArenaFile::find_for(directory, &identity, LOCK_PATIENCE)?,
        MemoryDir::Systemd => None,
    };
    let mut guest = GuestState::FRESH;
    for file in [ArenaFile::take_from_fdstore(manager, &identity)?, in_directory].into_iter().flatten() {
        let Some(header) = file.header()? else { continue };
        guest = guest.or(header.guest);
        if header.frames == 0 {
            continue;
        }
        let arena = Arena::attach(file, &header)?;
        let (unwritten, file) = (Unwritten::of(&arena), arena.file().expect(HAS_FILE));
        if unwritten != Unwritten::NOTHING {
            let context = format!("{name}: cannot serve image {} read-only", image.path().display());
            let why = format!("{file} holds {unwritten}, which the image lacks");
            let keep = format!("to keep the data, remove read_only and {}", file.recovery_hint());
            let hint = format!("{keep}; otherwise {}", file.removal_hint());
            return Err(Error::new(ErrorKind::Ledger, format!("{context}: {why}; {hint}")));
        }
    }
    let arena = Arena::anonymous(frames)?;
    if guest.data == GuestData::Lost {
        warn_of_data_loss(name);
        arena.set_data_loss();
    }
    Ok(arena)
}

/// What a new cache for a device is made from.
struct NewCache<'a> {
    config: &'a DeviceConfig,
    image: &'a FileImage,
    frames: usize,
    manager: &'a Arc<ServiceManager>,
}

impl NewCache<'_> {
    /// Whether a file is at the configured location.
    fn location_of(&self, file: &ArenaFile) -> FoundAt {
        let wants_fdstore = self.config.cache.memory_dir == MemoryDir::Systemd;
        if file.is_in_fdstore() == wants_fdstore { FoundAt::Configured } else { FoundAt::Elsewhere }
    }

    /// The file at the configured location; a new one if there is none.
    fn open_file(&self) -> Result<ArenaFile> {
        let identity = self.image.identity();
        match &self.config.cache.memory_dir {
            MemoryDir::Path(directory) => ArenaFile::open_for(directory, &identity, LOCK_PATIENCE),
            MemoryDir::Systemd => ArenaFile::create_in_fdstore(self.manager, &identity),
        }
    }

    /// The file at the configured location, if the one that was `found` is elsewhere.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when it holds writes that the image lacks, as a daemon with another configuration may have
    /// left them: nothing tells which of the two files has the newer ones.
    fn prepare_target(&self, found_at: FoundAt, found: &ArenaFile) -> Result<Option<ArenaFile>> {
        if found_at == FoundAt::Configured {
            return Ok(None);
        }
        let file = self.open_file()?;
        let Some(header) = file.header()?.filter(|header| header.frames > 0) else { return Ok(Some(file)) };
        let arena = Arena::attach(file, &header)?;
        let file = arena.file().expect(HAS_FILE);
        match Unwritten::of(&arena) {
            Unwritten::NOTHING => Ok(arena.into_file()),
            unwritten => {
                let context = format!("found two caches of image {}, {found} and {file}", self.image.path().display());
                let hint = format!("write them first with \"genblk recover {file}\", or remove them with --discard");
                Err(Error::new(ErrorKind::Ledger, format!("{context}; the second holds {unwritten}; {hint}")))
            }
        }
    }

    /// A new arena in the file `target`, or in the file `found` without one. What `found` holds is on the image.
    ///
    /// => What `found` records of the guest is recorded at any time: it stays until the new arena has it.
    fn replace(&self, found: ArenaFile, target: Option<ArenaFile>) -> Result<Arena> {
        // The new cache may need the old one's memory.
        found.shrink_to_header()?;
        match target {
            None => self.create(found, GuestState::FRESH),
            Some(target) => {
                let guest = found.header()?.map_or(GuestState::FRESH, |header| header.guest);
                let arena = self.create(target, guest)?;
                found.remove();
                Ok(arena)
            }
        }
    }

    /// A new arena in `file`, of the best kind that the configuration asks for and the host has memory for.
    ///
    /// => From the beginning its header records what became of the `guest`, and what the file records of it already.
    fn create(&self, file: ArenaFile, guest: GuestState) -> Result<Arena> {
        let spec = ArenaSpec { frames: self.frames, identity: self.image.identity(), image: self.image.path(), guest };
        let survive = self.config.cache.survive;
        if survive == Survive::Never {
            return Arena::loss_marker(file, &spec).map_err(|NotCreated { error, .. }| error);
        }
        let NotCreated { error, file } = match Arena::persistent(file, &spec) {
            Err(failed) if failed.error.kind() == ErrorKind::Memory && survive == Survive::Auto => failed,
            result => return result.map_err(|NotCreated { error, .. }| error),
        };
        match Arena::loss_marker(file, &spec) {
            Ok(arena) => {
                warn!("{}: {error}; using a cache that does not survive a crash", self.config.name);
                Ok(arena)
            }
            // Shared memory has no room for even a marker. (A file that records something of the guest has a header
            // already, which becomes the marker.)
            Err(NotCreated { file, .. }) => {
                drop(file);
                // Without any memory the first error says more.
                let Ok(arena) = Arena::anonymous(self.frames) else { return Err(error) };
                warn!("{}: {error}; {VOLATILE_UNMARKED}", self.config.name);
                if guest.data == GuestData::Lost {
                    arena.set_data_loss();
                }
                arena.set_write_through(guest.write_through);
                Ok(arena)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_is_restored_only_if_size_location_and_lifetime_are_as_configured() {
        for survive in [Survive::Auto, Survive::Always, Survive::Never] {
            for found_at in [FoundAt::Configured, FoundAt::Elsewhere] {
                for contents in [Contents::FittingCache, Contents::OtherCache] {
                    let fits = contents == Contents::FittingCache
                        && found_at == FoundAt::Configured
                        && survive != Survive::Never;
                    let expected = if fits { Decision::Attach } else { Decision::WriteBack };
                    assert_eq!(decide(contents, found_at, survive), expected, "{contents:?} {found_at:?} {survive:?}");
                }
            }
        }
    }

    #[test]
    fn a_file_without_pages_is_never_attached() {
        for survive in [Survive::Auto, Survive::Always, Survive::Never] {
            assert_eq!(decide(Contents::NoPages, FoundAt::Configured, survive), Decision::Create);
            assert_eq!(decide(Contents::NoPages, FoundAt::Elsewhere, survive), Decision::Create);
        }
    }
}
