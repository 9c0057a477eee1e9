//! What a daemon that is gone has left in memory: taken over by the next one, or written to its image by hand.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};

use crate::arena::{Arena, ArenaFile};
use crate::config::{Config, DeviceConfig, MemoryDir, Socket, Survive};
use crate::error::{Error, ErrorKind, Result};
use crate::store::file::{self, FileImage};
use crate::systemd::ServiceManager;
use crate::units::{FrameId, FrameRecord, SECTOR_BYTES, SectorMask};

/// How long another's lock on an image, or on what is kept for it, is waited out. A daemon that was killed keeps its locks
/// until the kernel has finished its operations in flight, and that is right: until then they can still reach the image.
/// One that ends in order gives its memory back before it lets go of the image. A successor of either, started at once,
/// is to be served and not refused.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// The memory for a device's cache: a predecessor's if it left one of this shape, else new.
///
/// # Errors
/// [`ErrorKind::Memory`] when there is none; [`ErrorKind::Ledger`] when what a predecessor left can't be read, and
/// [`ErrorKind::Image`] when it could not be written to the image.
pub fn arena_for(
    config: &DeviceConfig,
    image: &FileImage,
    frames: usize,
    manager: &Arc<ServiceManager>,
) -> Result<Arena> {
    let (cache, name) = (&config.cache, &config.name);
    if config.read_only {
        return Arena::anonymous(frames);
    }
    let identity = image.identity();
    let wants_store = cache.memory_dir == MemoryDir::Systemd;
    let file = || match &cache.memory_dir {
        MemoryDir::Path(directory) => ArenaFile::open_for(directory, &identity, LOCK_PATIENCE),
        MemoryDir::Systemd => ArenaFile::create_in_fdstore(manager, &identity),
    };
    // What the service manager hands over holds a predecessor's writes, wherever the next cache is to be.
    let found = match ArenaFile::take_from_fdstore(manager, &identity)?.map_or_else(file, Ok) {
        Ok(found) => found,
        Err(e) if e.kind() == ErrorKind::Memory && cache.survive != Survive::Always => {
            warn!("{name}: {e}; the cache goes with the daemon, and nothing will tell if that loses anything");
            return Arena::anonymous(frames);
        }
        Err(e) => return Err(e),
    };
    let stays = found.is_in_fdstore() == wants_store;
    let left = found.header()?;
    let lost = left.as_ref().is_some_and(|header| header.lost);
    let through = left.as_ref().is_some_and(|header| header.write_through);
    let mut moved = None;
    let arena = match left {
        Some(header) if stays && header.fits(frames) && cache.survive != Survive::Never => {
            Arena::attach(found, &header)?
        }
        Some(header) if header.frames > 0 => {
            let arena = Arena::attach(found, &header)?;
            let written = write_back(&arena, image)?;
            info!("{name}: a cache of another shape or place was left: its {written} dirty pages are on the image now");
            arena.remove();
            fresh(config, file()?, image, frames, lost, &file)?
        }
        _ if stays => fresh(config, found, image, frames, lost, &file)?,
        _ => {
            moved = Some(found);
            fresh(config, file()?, image, frames, lost, &file)?
        }
    };
    if lost {
        warn!(
            "{name}: a daemon died with writes in its memory that had completed: every request of that guest fails until \
             it resets the device"
        );
        arena.set_data_loss();
    }
    if through {
        info!("{name}: its guest has chosen write-through, and keeps it");
        arena.set_write_through(true);
    }
    // Not before another place remembers what it says.
    moved.inspect(ArenaFile::remove);
    Ok(arena)
}

/// New memory in a file, as far as possible of the kind that the configuration asks for, which knows from its beginning
/// whether a predecessor has lost anything; `another` makes another file.
fn fresh(
    config: &DeviceConfig,
    file: ArenaFile,
    image: &FileImage,
    frames: usize,
    lost: bool,
    another: &dyn Fn() -> Result<ArenaFile>,
) -> Result<Arena> {
    let (identity, path, survive) = (image.identity(), image.path(), config.cache.survive);
    if survive == Survive::Never {
        return Arena::loss_marker(frames, file, identity, path, lost);
    }
    let kept = Arena::persistent(frames, file, identity, path, lost);
    let Err(e) = &kept else { return kept };
    if e.kind() != ErrorKind::Memory || survive == Survive::Always {
        return kept;
    }
    match another().and_then(|file| Arena::loss_marker(frames, file, identity, path, lost)) {
        Ok(marked) => {
            warn!("{}: {e}; the cache goes with the daemon", config.name);
            Ok(marked)
        }
        // There is no memory at all.
        Err(_) => kept,
    }
}

/// Zeroes what is to read as zeros, then writes everything dirty to the image, in the order of the image, and makes it
/// durable; returns how many pages it was.
///
/// => What is dirty was written after its range had been zeroed.
fn write_back(arena: &Arena, image: &FileImage) -> Result<usize> {
    let failed = |e| Error::io(ErrorKind::Image, format!("cannot write to image {}", image.path().display()), e);
    for (_, span) in arena.pending_zeroes() {
        image.zero(span.start * SECTOR_BYTES, span.count * SECTOR_BYTES).map_err(failed)?;
    }
    let file = OpenOptions::new().write(true).open(image.path()).map_err(failed)?;
    let mut dirty: Vec<(FrameId, FrameRecord)> =
        arena.records().filter(|(_, record)| !record.dirty.is_empty()).collect();
    dirty.sort_by_key(|(_, record)| record.page);
    for &(frame, record) in &dirty {
        write_page(arena, frame, record, &file).map_err(failed)?;
    }
    file.sync_all().map_err(failed)?;
    Ok(dirty.len())
}

fn write_page(arena: &Arena, frame: FrameId, record: FrameRecord, file: &File) -> std::io::Result<()> {
    let size = file.metadata()?.len();
    let mut mask = record.dirty;
    while let Some((first, count)) = mask.first_run() {
        let offset = record.page.offset_bytes() + u64::from(first) * SECTOR_BYTES;
        let bytes = arena.sectors(frame, first, count);
        if size != 0 && offset + bytes.len() as u64 > size {
            return Err(std::io::Error::other("the ledger speaks of pages beyond the image's end"));
        }
        file.write_all_at(&bytes, offset)?;
        mask = mask.without(SectorMask::run(first, count));
    }
    Ok(())
}

/// Says what the service manager keeps that no device uses. It stays there: it may hold writes that are nowhere else.
pub fn warn_unclaimed(config: &Config, manager: &Arc<ServiceManager>) {
    let sockets = config.devices.iter().filter_map(|device| match device.socket {
        Socket::Fd(fd) => Some(fd),
        Socket::Path(_) => None,
    });
    let unclaimed = manager.fdstore_unclaimed(&sockets.collect::<Vec<_>>());
    let described = unclaimed.iter().map(|name| match ArenaFile::take_named_from_fdstore(manager, name) {
        Ok(Some(file)) => format!("{name} ({})", about(file).unwrap_or_else(|e| e.to_string())),
        Ok(None) => name.clone(),
        Err(e) => format!("{name} ({e})"),
    });
    if !unclaimed.is_empty() {
        let described = described.collect::<Vec<_>>().join(", ");
        warn!("no device uses what the service manager has handed over, and it stays with it: {described}");
    }
}

/// The ledgers below `memory_dir` that no daemon holds, a line each.
///
/// # Errors
/// [`ErrorKind::Memory`] when the folder can't be read.
pub fn list(memory_dir: &Path) -> Result<String> {
    let folder = ArenaFile::dir(memory_dir);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok("nothing was left behind\n".to_owned()),
        Err(e) => return Err(Error::io(ErrorKind::Memory, format!("cannot read {}", folder.display()), e)),
    };
    let mut lines: Vec<String> = entries.flatten().filter_map(|entry| describe(&entry.path())).collect();
    lines.sort();
    if lines.is_empty() {
        lines.push("nothing was left behind\n".to_owned());
    }
    Ok(lines.concat())
}

/// A ledger's line; `None` if a daemon holds it.
fn describe(path: &Path) -> Option<String> {
    let file = ArenaFile::open_existing(path).ok()?;
    let about = about(file).unwrap_or_else(|e| e.to_string());
    Some(format!("{}: {about}\n", path.display()))
}

fn about(file: ArenaFile) -> Result<String> {
    let Some(header) = file.header()? else { return Ok("empty".to_owned()) };
    let image = header.image.display();
    if header.frames == 0 {
        let lost = if header.lost { "completed writes were lost with it" } else { "nothing was lost" };
        return Ok(format!("of {image}: a cache that went with its daemon; {lost}"));
    }
    let arena = Arena::attach(file, &header)?;
    let pages = arena.records().count();
    let dirty = arena.records().filter(|(_, record)| !record.dirty.is_empty()).count();
    let zeroed = match arena.pending_zeroes().count() {
        0 => String::new(),
        ranges => format!("; zeroed ranges: {ranges}"),
    };
    Ok(format!("of {image}: {pages} pages, {dirty} of them not on the image{zeroed}"))
}

/// Writes what was left in the file at `path` to its image, and removes it; says what it did.
///
/// # Errors
/// [`ErrorKind::Ledger`] when the file is no ledger of this boot, or its image is another now; [`ErrorKind::Locked`] when a
/// daemon serves the image; [`ErrorKind::Image`] when it can't be written.
pub fn recover(path: &Path) -> Result<String> {
    let file = ArenaFile::open_existing(path)?;
    let Some(header) = file.header()? else {
        file.remove();
        return Ok(format!("{}: it was empty, and is removed\n", path.display()));
    };
    if header.frames == 0 {
        let context = format!("{}: it holds no pages; --discard removes it", path.display());
        return Err(Error::new(ErrorKind::Ledger, context));
    }
    let options = file::OpenOptions { lock_patience: LOCK_PATIENCE, ..file::OpenOptions::default() };
    let image = FileImage::open(&header.image, &options)?;
    if image.identity() != header.identity {
        let context = format!("{}: {} is another image now", path.display(), header.image.display());
        return Err(Error::new(ErrorKind::Ledger, context));
    }
    let arena = Arena::attach(file, &header)?;
    let written = write_back(&arena, &image)?;
    arena.remove();
    Ok(format!("{written} pages are written to {}, and {} is removed\n", header.image.display(), path.display()))
}

/// Removes what was left in the file at `path`, whatever is in it.
///
/// # Errors
/// [`ErrorKind::Ledger`] when the file can't be a ledger; [`ErrorKind::Locked`] when a daemon holds it.
pub fn discard(path: &Path) -> Result<String> {
    ArenaFile::open_existing(path)?.remove();
    Ok(format!("{} is removed\n", path.display()))
}
