//! `genblk take-over`: the operator gives up the completed writes that a cache may hold, so that the image can be
//! served as it is.

use std::path::Path;
use std::sync::Arc;

use super::LOCK_PATIENCE;
use super::search::{Search, facts_of, is_of};
use super::write_back::Unwritten;
use crate::arena::{Arena, ImageFacts};
use crate::config::MemoryDir;
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::store;
use crate::store::file::{LastTenure, OpenOptions};
use crate::store::named::NamedImage;
use crate::systemd::ServiceManager;
use crate::tenure::TenureId;
use crate::tenure::host::Boot;
use crate::tenure::record::{CachePlace, Record, State};
use crate::tenure::token::wall_clock_ns;

/// Sets every cache of the image aside that a daemon left below `memory_dir`, at the default place, or where the
/// image's record says, and ends the image's last tenure. Returns a message for the operator.
///
/// => The next daemon serves the image as it is. A guest that outlived the last one must reset the device first.
/// => Caches stay for "genblk recover", and no daemon uses them any more.
///
/// # Errors
/// [`ErrorKind::Locked`] when a daemon serves the image; [`ErrorKind::Image`] when it cannot be opened or its record
/// cannot be written.
pub fn take_over(path: &Path, memory_dir: &Path) -> Result<String> {
    let options = OpenOptions { lock_patience: LOCK_PATIENCE, ..OpenOptions::default() };
    let image = store::open(None, path, &options)?;
    let (facts, shown) = (facts_of(&*image), path.display());
    let failed = |e| Error::io(ErrorKind::Image, format!("cannot change the record of image {shown}"), e);
    let last = image.last_tenure().map_err(failed)?;
    let record = match &last {
        LastTenure::Recorded(record) if is_of(record, &facts) => Some(record),
        _ => None,
    };
    let (set_aside, newest) = set_caches_aside(&*image, &facts, record, memory_dir)?;
    let is_open = record.is_some_and(|record| record.state == State::Open) || matches!(last, LastTenure::Unreadable(_));
    if set_aside.is_empty() && !is_open {
        return Ok(format!("image {shown} is free: nothing was changed\n"));
    }
    if last != LastTenure::NoRecords {
        let generation = newest.max(record.map_or(0, |record| record.tenure.generation)) + 1;
        image.write_record(&forfeited(&facts, generation)?).map_err(failed)?;
    }
    let lines: String = set_aside.iter().map(|line| format!("set aside: {line}\n")).collect();
    Ok(format!("{lines}image {shown} can be served as it is\n"))
}

/// Sets aside the caches that hold completed writes of the image; returns a line for each, and the newest generation
/// among all that were found.
fn set_caches_aside(
    image: &dyn NamedImage,
    facts: &ImageFacts,
    record: Option<&Record>,
    memory_dir: &Path,
) -> Result<(Vec<String>, u64)> {
    let (memory_dir, manager) = (&MemoryDir::Path(memory_dir.to_path_buf()), &Arc::new(ServiceManager::default()));
    let found = match (Search { image, facts, record, memory_dir, manager }).run() {
        // What cannot be read cannot be set aside; its generation is older than the new one all the same.
        Err(e) if e.kind() != ErrorKind::Locked => return Ok((vec![e.to_string()], 0)),
        found => found?,
    };
    let (mut lines, mut newest) = (Vec::new(), 0);
    for candidate in found {
        let header = candidate.header;
        newest = newest.max(header.tenure.map_or(0, |tenure| tenure.id.generation));
        if header.frames == 0 {
            continue;
        }
        let (file, unwritten) = match candidate.foreign {
            Some(unwritten) => (candidate.file, unwritten),
            None => {
                let arena = Arena::attach(candidate.file, &header)?;
                let unwritten = Unwritten::of(&arena);
                (arena.into_file().expect(super::HAS_FILE), unwritten)
            }
        };
        if unwritten != Unwritten::NOTHING {
            file.set_aside()?;
            lines.push(format!("{file}, which holds {unwritten}"));
        }
    }
    Ok((lines, newest))
}

/// The record of a tenure that the operator has ended.
fn forfeited(facts: &ImageFacts, generation: u64) -> Result<Record> {
    let ImageId { inode, born_ns, .. } = facts.identity;
    Ok(Record {
        tenure: TenureId::new(generation)?,
        state: State::Forfeited,
        since: wall_clock_ns() / 1_000_000_000,
        boot: Boot::current(),
        inode,
        born_ns,
        cache: CachePlace::Memory,
    })
}
