//! What the operator sees of the caches that earlier daemons left, and the commands that end them.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use log::warn;

use super::LOCK_PATIENCE;
use super::write_back::{Unwritten, write_back};
use crate::arena::{Arena, ArenaFile, GuestData, GuestState};
use crate::config::{Config, Socket};
use crate::error::{Error, ErrorKind, Result};
use crate::store::file::{self, FileImage};
use crate::systemd::ServiceManager;
use crate::units::counted;

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
    let file = arena.into_file().expect(super::HAS_FILE);
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
