//! The cache that an earlier daemon left in memory: the next daemon restores it, or the operator writes it to its
//! image.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};

use crate::arena::{Arena, ArenaFile, ArenaSpec, GuestData, GuestState, Header, NotCreated};
use crate::config::{Config, DeviceConfig, MemoryDir, Socket, Survive};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Backing;
use crate::store::file::{self, FileImage};
use crate::systemd::ServiceManager;
use crate::units::{FrameId, FrameRecord, PageNo, SECTOR_BYTES, SECTORS_PER_PAGE, SectorMask, counted, low_u8};

/// How long to wait for the lock of an image or of a cache file. A killed daemon keeps its locks until the kernel has
/// finished its I/O, and rightly so: until then that I/O can still change the image. A daemon that ends in order
/// releases its cache before its image. A daemon that is started at once in place of either must wait, and not fail.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(2);

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
            warn!("{name}: {e}; using a cache that does not survive a crash; data loss would go undetected");
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
            let dirty = counted(write_back(&arena, image)?, "dirty page");
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
            // The host has no memory at all; the first error says more.
            Err(_) => Err(error),
        }
    }
}

/// What a cache holds and its image lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unwritten {
    /// Number of dirty pages.
    pages: usize,
    /// Number of ranges that must read as zeros.
    ranges: usize,
}

impl Unwritten {
    const NOTHING: Self = Self { pages: 0, ranges: 0 };

    fn of(arena: &Arena) -> Self {
        let pages = arena.records().filter(|(_, record)| !record.dirty.is_empty()).count();
        Self { pages, ranges: arena.pending_zeroes().count() }
    }
}

impl fmt::Display for Unwritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", counted(self.pages as u64, "dirty page"))?;
        match self.ranges {
            0 => Ok(()),
            ranges => write!(f, " and {} to be zeroed", counted(ranges as u64, "range")),
        }
    }
}

/// Zeroes the ranges that must read as zeros, then writes the dirty pages to the image in the order of their offsets,
/// and syncs it; returns the number of pages.
///
/// => Zeroes come first: a dirty page in such a range was written after the range was zeroed.
/// => Nothing is written past the end of the image, of which the last page may have only a part: earlier versions of
///    genblk recorded its other sectors as dirty too.
fn write_back(arena: &Arena, image: &FileImage) -> Result<u64> {
    let failed = |e| Error::io(ErrorKind::Image, format!("cannot write to image {}", image.path().display()), e);
    let image_sectors = image.limits().size_bytes / SECTOR_BYTES;
    let mut dirty: Vec<(FrameId, FrameRecord)> =
        arena.records().filter(|(_, record)| !record.dirty.is_empty()).collect();
    dirty.sort_by_key(|(_, record)| record.page);
    for (_, record) in &mut dirty {
        let within = sectors_within(image_sectors, record.page);
        if within.is_empty() {
            return Err(failed(io::Error::other("the ledger refers to pages past the end of the image")));
        }
        record.dirty = record.dirty.and(within);
    }
    dirty.retain(|(_, record)| !record.dirty.is_empty());
    for (_, span) in arena.pending_zeroes() {
        image.zero(span.start * SECTOR_BYTES, span.count * SECTOR_BYTES).map_err(failed)?;
    }
    let file = OpenOptions::new().write(true).open(image.path()).map_err(failed)?;
    for &(frame, record) in &dirty {
        write_page(arena, frame, record, &file).map_err(failed)?;
    }
    file.sync_all().map_err(failed)?;
    Ok(dirty.len() as u64)
}

/// The sectors of a page that are within an image of `image_sectors` sectors.
fn sectors_within(image_sectors: u64, page: PageNo) -> SectorMask {
    match image_sectors.saturating_sub(page.0 * SECTORS_PER_PAGE) {
        SECTORS_PER_PAGE.. => SectorMask::ALL,
        within => SectorMask::run(0, low_u8(within)),
    }
}

fn write_page(arena: &Arena, frame: FrameId, record: FrameRecord, file: &File) -> io::Result<()> {
    // 0 for a block device, which fails a write past its end.
    let file_bytes = file.metadata()?.len();
    let mut mask = record.dirty;
    while let Some((first, count)) = mask.first_run() {
        let offset = record.page.offset_bytes() + u64::from(first) * SECTOR_BYTES;
        let bytes = arena.sectors(frame, first, count);
        if file_bytes != 0 && offset + bytes.len() as u64 > file_bytes {
            return Err(io::Error::other("it has shrunk"));
        }
        file.write_all_at(&bytes, offset)?;
        mask = mask.without(SectorMask::run(first, count));
    }
    Ok(())
}

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

/// The cache files below `memory_dir` that no daemon uses, a line each.
///
/// # Errors
/// [`ErrorKind::Memory`] when the directory cannot be read.
pub fn list(memory_dir: &Path) -> Result<String> {
    let directory = ArenaFile::dir(memory_dir);
    let failed = |e| Error::io(ErrorKind::Memory, format!("cannot read {}", directory.display()), e);
    let mut lines: Vec<String> = match fs::read_dir(&directory) {
        Ok(entries) => entries.flatten().filter_map(|entry| list_line(&entry.path())).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(failed(e)),
    };
    lines.sort();
    if lines.is_empty() {
        lines.push(format!("no unused cache in {}\n", directory.display()));
    }
    Ok(lines.concat())
}

/// The line of a cache file in the list; `None` if a daemon uses it.
fn list_line(path: &Path) -> Option<String> {
    let file = ArenaFile::open_existing(path).ok()?;
    let description = description(file).unwrap_or_else(|e| e.to_string());
    Some(format!("{}: {description}\n", path.display()))
}

/// What a cache file holds, for the operator.
fn description(file: ArenaFile) -> Result<String> {
    let Some(header) = file.header()? else { return Ok("empty".to_owned()) };
    let image = header.image.display();
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

/// What a file records of its guest, for the operator.
fn remembered(guest: GuestState) -> &'static str {
    match (guest.data, guest.write_through) {
        (GuestData::Lost, _) => "completed writes were lost",
        (GuestData::Intact, true) => "the guest selected write-through",
        (GuestData::Intact, false) => "no data was lost",
    }
}

/// Writes the cache in the file at `path` to its image and removes the file; returns a message for the operator.
///
/// => A file that records something of its guest stays, without its pages: the next daemon must know it.
///
/// # Errors
/// [`ErrorKind::Ledger`] when the file is not a cache of this boot, or its image was replaced; [`ErrorKind::Locked`]
/// when a daemon serves the image; [`ErrorKind::Image`] when the image cannot be written.
pub fn recover(path: &Path) -> Result<String> {
    let shown = path.display();
    let file = ArenaFile::open_existing(path)?;
    let Some(header) = file.header()? else {
        file.remove();
        return Ok(format!("removed {shown}, which was empty\n"));
    };
    if header.frames == 0 {
        let context = format!("{shown} holds no pages; remove it with --discard");
        return Err(Error::new(ErrorKind::Ledger, context));
    }
    let image_shown = header.image.display();
    let options = file::OpenOptions { lock_patience: LOCK_PATIENCE, ..file::OpenOptions::default() };
    let image = FileImage::open(&header.image, &options)?;
    if image.identity() != header.identity {
        let context = format!("{shown} belongs to an image that {image_shown} has replaced");
        return Err(Error::new(ErrorKind::Ledger, context));
    }
    let arena = Arena::attach(file, &header)?;
    let written = counted(write_back(&arena, &image)?, "page");
    let file = arena.into_file().expect(HAS_FILE);
    if header.guest == GuestState::FRESH {
        file.remove();
        return Ok(format!("wrote {written} to {image_shown} and removed {shown}\n"));
    }
    file.shrink_to_header()?;
    let why = remembered(header.guest);
    Ok(format!("wrote {written} to {image_shown}; {shown} stays without its pages, because {why}\n"))
}

/// Removes the cache file at `path` with everything in it; returns a message for the operator.
///
/// # Errors
/// [`ErrorKind::Ledger`] when the file is not a cache file; [`ErrorKind::Locked`] when a daemon uses it.
pub fn discard(path: &Path) -> Result<String> {
    ArenaFile::open_existing(path)?.remove();
    Ok(format!("removed {}\n", path.display()))
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
    fn a_page_that_the_image_cuts_has_only_its_first_sectors_within_it() {
        let within = |image_sectors| [0, 1, 2].map(|page| sectors_within(image_sectors, PageNo(page)).0);
        assert_eq!(within(1), [0b0000_0001, 0, 0]);
        assert_eq!(within(8), [0xff, 0, 0]);
        assert_eq!(within(13), [0xff, 0b0001_1111, 0]);
        assert_eq!(within(16), [0xff, 0xff, 0]);
        assert_eq!(within(23), [0xff, 0xff, 0b0111_1111]);
    }

    #[test]
    fn a_file_without_pages_is_never_attached() {
        for survive in [Survive::Auto, Survive::Always, Survive::Never] {
            assert_eq!(decide(Contents::NoPages, FoundAt::Configured, survive), Decision::Create);
            assert_eq!(decide(Contents::NoPages, FoundAt::Elsewhere, survive), Decision::Create);
        }
    }
}
