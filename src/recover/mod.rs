//! Recovery of a cache that an earlier daemon left in memory: the next daemon restores it, or the operator writes it to
//! its image.

mod kept;
mod left;
mod memory_dir;
mod operation;
mod operator;
mod proof;
mod search;
mod take_over;
#[cfg(test)]
mod tests;
mod write_back;

use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};

use crate::arena::{
    Arena, ArenaFile, ArenaSpec, DataPastEnd, GuestData, GuestState, Header, ImageFacts, NotCreated, SAMPLES_MAX,
    TenureFacts, check_memory,
};
use crate::config::{DeviceConfig, MemoryDir, NbdFlush, Survive};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::store::file::{LastTenure, NbdOptions};
use crate::store::named::NamedImage;
use crate::systemd::ServiceManager;
use crate::tenure::TenureId;
use crate::tenure::host::Boot;
use crate::tenure::record::{Record, TenureState};
use crate::tenure::token::wall_clock_ns;
use crate::units::{PAGE_BYTES, counted};

pub use kept::has_kept_cache;
pub use memory_dir::{check_memory_dir, file_system_of};
pub use operation::end_open_tenure;
pub use operator::{
    Consent, Recovery, Report, cache_memory_bytes, check_cache_dir, discard, has_unwritten_cache, hint_for,
    ignore_file_size_signal, list, prune, recover, warn_unused_fds, warn_unused_files,
};
#[cfg(test)]
pub(crate) use proof::NOTHING_TO_COMPARE;
pub use take_over::take_over;

use left::Leftovers;
use proof::samples_of;
use search::Candidate;
use write_back::{Unwritten, write_back};

/// How long to wait for the lock of an image or of a cache file. A killed daemon keeps its locks until the kernel has
/// finished its I/O, which can still change the image until then. A daemon that shuts down cleanly releases its cache
/// before its image. A daemon that is started right after either must wait instead of failing.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Log text for a cache of which no file outlives the daemon.
const VOLATILE_UNMARKED: &str = "using a cache that does not survive a crash";

const HAS_HEADER: &str = "a file with pages has a header";
const HAS_FILE: &str = "the arena was attached to a file";

/// The contents of the file that was found for an image.
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

/// The action for the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// Restore its cache.
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
/// `frames` is the configured size, and `frames_max` what it may become. Begins a tenure of the image, or continues the
/// one of the cache.
///
/// => No completed write is lost: dirty pages of a cache that does not fit are on the image when this returns. The new
/// arena also records the guest's state from the previous daemon (data loss, write-through).
/// => A cache is used only if it is proven to belong to the image in its present state. Otherwise a cache that holds
/// completed writes is an error, and any other is removed.
///
/// # Errors
/// [`ErrorKind::Memory`] when there is no memory for the cache; [`ErrorKind::Ledger`] when the file that the previous
/// daemon left cannot be read or does not belong to the image as it is now, and when another host may hold a cache;
/// [`ErrorKind::Image`] when its pages cannot be written to the image.
pub fn arena_for(
    config: &DeviceConfig,
    image: &dyn NamedImage,
    [frames, frames_max]: [usize; 2],
    manager: &Arc<ServiceManager>,
) -> Result<Arena> {
    let (name, facts) = (&config.name, search::facts_of(image));
    let left = Leftovers::find(config, image, &facts, manager)?;
    if config.read_only {
        return arena_for_reading(config, image, [frames, frames_max], left);
    }
    if left.may_have_died {
        image.quarantine_earlier_writes();
    }
    let new = NewCache { config, image, frames, frames_max, manager, facts: &facts, generation: left.generation + 1 };
    let guest = left.guest;
    let (found_at, file, header) = match left.usable {
        Some(Candidate { file, header, .. }) => (new.location_of(&file), file, Some(header)),
        None => match new.create_file() {
            Ok(file) => (FoundAt::Configured, file, None),
            Err(e) if e.kind() == ErrorKind::Memory && config.cache.survive != Survive::Always => {
                warn!("{name}: {e}; {VOLATILE_UNMARKED}");
                return new.anonymous(guest);
            }
            Err(e) => return Err(e),
        },
    };
    let contents = match &header {
        // It keeps its size: there is no memory for a new one with the configured size either.
        Some(header) if header.fits(1) && check_growth(header.reserved, frames).is_err() => Contents::FittingCache,
        header => Contents::of(header.as_ref(), frames),
    };
    let (arena, tenure) = match decide(contents, found_at, config.cache.survive) {
        Decision::Attach => {
            let header = header.expect(HAS_HEADER);
            let arena = Arena::attach(file, &header)?;
            reserve(config, &arena, frames)?;
            arena.move_to(&header.image, &facts).map_err(|beyond| data_past_end(image, &arena, beyond))?;
            if guest.data == GuestData::Lost {
                arena.set_data_loss();
            }
            if guest.write_through {
                arena.set_write_through(true);
            }
            arena.add_guest_formats(guest.formats);
            (arena, header.tenure.expect("a cache of this layout has a tenure"))
        }
        Decision::WriteBack => {
            let target = new.prepare_target(found_at)?;
            let arena = Arena::attach(file, &header.expect(HAS_HEADER))?;
            let dirty = counted(write_back(&arena, image, &mut |_, _| {})?, "dirty page");
            info!("{name}: found a cache that does not fit the configuration; wrote its {dirty} to the image");
            let guest = GuestState { formats: guest.formats | arena.guest_formats(), ..guest };
            new.close_last_tenure(left.record.as_ref(), arena.tenure());
            new.replace(arena.into_file().expect(HAS_FILE), target, guest)?
        }
        Decision::Create => {
            let target = new.prepare_target(found_at)?;
            new.close_last_tenure(left.record.as_ref(), header.and_then(|header| Some(header.tenure?.id)));
            new.replace(file, target, guest)?
        }
    };
    new.begin_tenure(&arena, tenure);
    if arena.has_data_loss() {
        warn_of_data_loss(name);
    }
    if arena.is_write_through() {
        info!("{name}: the guest selected write-through earlier; it stays in effect");
    }
    Ok(arena)
}

/// Checks that the host has memory for `frames` frames, of which a cache already has `found`.
fn check_growth(found: u64, frames: usize) -> Result<()> {
    (frames as u64).checked_sub(found).map_or(Ok(()), |more| check_memory(more * PAGE_BYTES))
}

/// Gives a cache that was found memory for `frames` frames. While there is no memory for more, it keeps the size that
/// it has: a guest waits for its disk.
fn reserve(config: &DeviceConfig, arena: &Arena, frames: usize) -> Result<()> {
    let found = arena.reserved_frames();
    let reserved = check_growth(found as u64, frames).and_then(|()| arena.reserve(frames));
    reserved.or_else(|error| {
        if found == 0 {
            return Err(error);
        }
        let mib = (found as u64 * PAGE_BYTES) >> 20;
        warn!("{}: {error}; the cache has {mib} MiB for now", config.name);
        Ok(())
    })
}

/// How the server of a device's image is treated.
pub fn nbd_options(config: &DeviceConfig) -> NbdOptions {
    let milliseconds = |n: u32| Duration::from_millis(n.into());
    NbdOptions {
        trusts_without_flush: config.nbd.flush == NbdFlush::None,
        give_up: Some(config.nbd.give_up_ms).filter(|n| *n > 0).map(milliseconds),
        quarantine: milliseconds(config.nbd.quarantine_ms),
    }
}

/// An error about insufficient memory, with the memory that unused caches take.
pub fn with_unused_caches(error: Error, config: &DeviceConfig) -> Error {
    let hint = if error.kind() == ErrorKind::Memory { hint_for(&config.cache.memory_dir) } else { None };
    match hint {
        Some(hint) => error.with_hint(&hint),
        None => error,
    }
}

fn warn_of_data_loss(name: &str) {
    warn!(
        "{name}: an earlier daemon died with completed writes that were never written to the image; all requests of \
         this guest fail until it resets the device"
    );
}

/// The error for a cache that holds completed writes past the end of its image.
fn data_past_end(image: &dyn NamedImage, arena: &Arena, beyond: DataPastEnd) -> Error {
    let file = arena.file().expect(HAS_FILE);
    let DataPastEnd { pages, ranges } = beyond;
    let (image, beyond) = (image.path().display(), Unwritten { pages, ranges });
    let context = format!("image {image} has shrunk: its cache {file} holds {beyond} past the end of the image");
    let keep = format!("make the image as large as it was and run \"genblk recover --force {file}\"");
    let hint = format!("to keep them, {keep}; otherwise {}", file.removal_hint());
    Error::new(ErrorKind::Ledger, format!("{context}; {hint}"))
}

/// The memory for the cache of a read-only device, which does not outlive the daemon.
///
/// => The caches of earlier daemons are only inspected and stay: a read-only device cannot write them to the image.
///
/// # Errors
/// As [`arena_for`], and [`ErrorKind::Ledger`] when an earlier daemon's cache holds writes that the image lacks: the
/// device would serve older data.
fn arena_for_reading(
    config: &DeviceConfig,
    image: &dyn NamedImage,
    [frames, frames_max]: [usize; 2],
    left: Leftovers,
) -> Result<Arena> {
    let name = &config.name;
    let mut guest = left.guest;
    if let Some(Candidate { file, header, .. }) = left.usable {
        guest = guest.merged_with(header.guest);
        if header.frames > 0 {
            let arena = Arena::attach(file, &header)?;
            let (unwritten, file) = (Unwritten::of(&arena), arena.file().expect(HAS_FILE));
            if unwritten != Unwritten::NOTHING {
                let context = format!("{name}: cannot serve image {} read-only", image.path().display());
                let why = format!("{file} holds {unwritten}, not yet written to the image");
                let keep = format!("to keep the data, remove read_only and {}", file.recovery_hint());
                let hint = format!("{keep}; otherwise {}", file.removal_hint());
                return Err(Error::new(ErrorKind::Ledger, format!("{context}: {why}; {hint}")));
            }
        }
    }
    let arena = Arena::anonymous_with_room(frames, frames_max)?;
    if guest.data == GuestData::Lost {
        warn_of_data_loss(name);
        arena.set_data_loss();
    }
    Ok(arena)
}

/// The inputs for a new cache of a device.
struct NewCache<'a> {
    config: &'a DeviceConfig,
    image: &'a dyn NamedImage,
    frames: usize,
    frames_max: usize,
    manager: &'a Arc<ServiceManager>,
    facts: &'a ImageFacts,
    /// Generation of a new tenure.
    generation: u64,
}

impl NewCache<'_> {
    /// Whether a file is at the configured location.
    fn location_of(&self, file: &ArenaFile) -> FoundAt {
        let is_configured = match &self.config.cache.memory_dir {
            MemoryDir::Systemd => file.is_in_fdstore(),
            MemoryDir::Path(memory_dir) => file.is_in(memory_dir),
        };
        if is_configured { FoundAt::Configured } else { FoundAt::Elsewhere }
    }

    /// A new file at the configured location.
    fn create_file(&self) -> Result<ArenaFile> {
        match &self.config.cache.memory_dir {
            MemoryDir::Path(directory) => ArenaFile::create_for(directory, self.facts),
            MemoryDir::Systemd => ArenaFile::create_in_fdstore(self.manager, self.facts),
        }
    }

    /// A new file at the configured location, if the one that was found is elsewhere.
    fn prepare_target(&self, found_at: FoundAt) -> Result<Option<ArenaFile>> {
        if found_at == FoundAt::Configured { Ok(None) } else { self.create_file().map(Some) }
    }

    /// Records that the tenure of the found cache has ended: everything is on the image.
    ///
    /// => If this daemon dies, or cannot create a cache, the next one does not report the old cache as missing.
    fn close_last_tenure(&self, record: Option<&Record>, tenure: Option<TenureId>) {
        let Some(record) = record.filter(|record| record.state == TenureState::Open && Some(record.tenure) == tenure)
        else {
            return;
        };
        if let Err(e) = self.image.write_record(&Record { state: TenureState::Clean, ..record.clone() }) {
            warn!("{}: cannot record that the image was released: {e}", self.config.name);
        }
    }

    /// A new arena in the file `target`, or without one in the file `found`, whose contents are on the image.
    ///
    /// => The guest's state in `found` is never lost: it stays there until the new arena has it.
    fn replace(&self, found: ArenaFile, target: Option<ArenaFile>, guest: GuestState) -> Result<(Arena, TenureFacts)> {
        // The new cache may need the old one's memory.
        found.shrink_to_header()?;
        match target {
            None => self.create(found, guest),
            Some(target) => {
                let guest = found.header()?.map_or(guest, |header| guest.merged_with(header.guest));
                let created = self.create(target, guest)?;
                found.remove();
                Ok(created)
            }
        }
    }

    /// A new arena in `file`, of the best kind that the configuration requests and for which the host has memory.
    ///
    /// => From the beginning its header records the state of the `guest`, merged with the state already in the file.
    fn create(&self, file: ArenaFile, guest: GuestState) -> Result<(Arena, TenureFacts)> {
        let tenure = self.new_tenure()?;
        let spec = ArenaSpec { frames: self.frames_max, reserved: self.frames, image: self.facts, tenure, guest };
        let survive = match check_memory_dir(self.config) {
            Err(error) if self.config.cache.survive == Survive::Auto => {
                warn!("{error}; using a cache that does not survive a crash");
                Survive::Never
            }
            _ => self.config.cache.survive,
        };
        if survive == Survive::Never {
            let created = Arena::loss_marker(file, &spec).map_err(|NotCreated { error, .. }| error);
            return created.map(|arena| (arena, tenure));
        }
        let NotCreated { error, file } = match Arena::persistent(file, &spec) {
            Err(failed) if failed.error.kind() == ErrorKind::Memory && survive == Survive::Auto => failed,
            result => return result.map(|arena| (arena, tenure)).map_err(|NotCreated { error, .. }| error),
        };
        match Arena::loss_marker(file, &spec) {
            Ok(arena) => {
                let error = with_unused_caches(error, self.config);
                warn!("{}: {error}; using a cache that does not survive a crash", self.config.name);
                Ok((arena, tenure))
            }
            // Shared memory has no room even for a marker. (A file that records the guest's state already has a header,
            // which becomes the marker.)
            Err(NotCreated { file, .. }) => {
                drop(file);
                // If there is no memory at all, the first error is more helpful.
                let Ok(arena) = Arena::anonymous_with_room(self.frames, self.frames_max) else { return Err(error) };
                warn!("{}: {error}; {VOLATILE_UNMARKED}", self.config.name);
                if guest.data == GuestData::Lost {
                    arena.set_data_loss();
                }
                arena.set_write_through(guest.write_through);
                arena.add_guest_formats(guest.formats);
                Ok((arena, tenure))
            }
        }
    }

    /// Memory that does not outlive the daemon, for a host on which not even a loss marker can be created. The image's
    /// record informs the next daemon.
    fn anonymous(&self, guest: GuestState) -> Result<Arena> {
        let arena = Arena::anonymous_with_room(self.frames, self.frames_max)?;
        if guest.data == GuestData::Lost {
            warn_of_data_loss(&self.config.name);
            arena.set_data_loss();
        }
        arena.set_write_through(guest.write_through);
        arena.add_guest_formats(guest.formats);
        if !self.begin_tenure(&arena, self.new_tenure()?) {
            warn!(
                "{}: no crash marker can be written in memory_dir, and no record of the image: if the daemon is \
                 killed, a loss of completed writes would go undetected",
                self.config.name
            );
        }
        Ok(arena)
    }

    fn new_tenure(&self) -> Result<TenureFacts> {
        let since = wall_clock_ns() / 1_000_000_000;
        let id = TenureId::new(self.generation)?;
        // As it will be: see begin_tenure().
        let is_recorded = self.image.last_tenure().is_ok_and(|last| last != LastTenure::NoRecords);
        Ok(TenureFacts { id, since, is_recorded, is_over: false })
    }

    /// Begins a tenure, or continues it: from now on the image's record states that the cache may hold writes not yet
    /// on the image. Returns whether the image has the record.
    ///
    /// => The change token is read afterwards, because the record changes the image's change time.
    fn begin_tenure(&self, arena: &Arena, tenure: TenureFacts) -> bool {
        let ImageId { inode, born_ns, .. } = self.facts.identity;
        let record = Record {
            tenure: tenure.id,
            state: TenureState::Open,
            since: tenure.since,
            boot: Boot::current(),
            inode,
            born_ns,
            cache: arena.cache_location(),
        };
        // Once the image has the record, the file must stay, even if the start fails.
        let is_kept = arena.is_kept_on_drop();
        arena.keep_on_drop(true);
        // The ledger first: a cache with an open tenure must not look like one that can be removed without loss.
        arena.set_recorded(tenure.is_recorded, false);
        let is_recorded = self.image.begin_tenure(record).unwrap_or_else(|e| {
            warn!(
                "{}: cannot record for other daemons that a cache holds writes of the image ({e}): one with another \
                 memory_dir or another user would not find the cache",
                self.config.name
            );
            false
        });
        arena.set_recorded(is_recorded, false);
        take_samples(&self.config.name, self.image, arena, is_recorded);
        if let Some(token) = self.image.change_token() {
            arena.record_token_now(token);
        }
        arena.keep_on_drop(is_kept);
        is_recorded
    }
}

/// Records hashes of pages of the image in the ledger, unless enough of the last ones are still valid. Log lines begin
/// with `name`.
///
/// => A discard of the last daemon may be lost as long as no Sync covers it. The hash of a page that it discarded would
/// then reject a good image, so a Sync comes first; writing the record of a new tenure includes one.
fn take_samples(name: &str, image: &dyn NamedImage, arena: &Arena, is_recorded: bool) {
    if arena.samples().len() >= SAMPLES_MAX / 2 {
        return;
    }
    let is_restored = arena.records().next().is_some();
    let sync = || image.writer().and_then(|mut writer| writer.sync());
    if (is_restored || !is_recorded)
        && let Err(e) = sync()
    {
        warn!("{name}: cannot sync the image ({e}); clean pages of its cache are read again");
        // The image may have lost a discard, and no later Sync reports that.
        arena.forget_clean();
        return;
    }
    arena.record_samples(&samples_of(image, arena));
}

#[cfg(test)]
mod decision_tests {
    use super::*;

    #[test]
    fn a_cache_is_restored_only_if_size_location_and_lifetime_match_the_configuration() {
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
