//! `genblk take-over`: the operator gives up completed writes that a cache may hold, so that the image can be served in
//! its present state.

use std::path::Path;
use std::sync::Arc;

use super::LOCK_TIMEOUT;
use super::left::{MovedCache, is_over, recorded_end};
use super::search::{Search, facts_of, is_of};
use super::write_back::Unwritten;
use crate::arena::{GuestData, Header, ImageFacts};
use crate::config::MemoryDir;
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::store;
use crate::store::file::{LastTenure, OpenOptions};
use crate::systemd::ServiceManager;
use crate::tenure::TenureId;
use crate::tenure::host::Boot;
use crate::tenure::record::{CacheLocation, Record, TenureState};
use crate::tenure::token::wall_clock_ns;

/// Sets aside every cache of the image below `memory_dir`, in the default directory, or at the path in the image's
/// record, and ends the image's last tenure. Returns a message for the operator.
///
/// => The next daemon serves the image in its present state. If completed writes may be lost, a guest that outlived the
/// last daemon must reset the device first.
/// => Caches stay for "genblk recover", and no daemon uses them again.
///
/// # Errors
/// [`ErrorKind::Locked`] when a daemon serves the image; [`ErrorKind::Image`] when it cannot be opened or its record
/// cannot be written; the next daemon's error, if that still could not serve the image.
pub fn take_over(path: &Path, memory_dir: &Path) -> Result<String> {
    let options = OpenOptions { lock_timeout: LOCK_TIMEOUT, ..OpenOptions::default() };
    let image = store::open(None, path, &options)?;
    let (facts, shown) = (facts_of(&*image), path.display());
    let failed = |e| Error::io(ErrorKind::Image, format!("cannot change the record of image {shown}"), e);
    let last = image.last_tenure().map_err(failed)?;
    let record = match &last {
        LastTenure::Recorded(record) if is_of(record, &facts) => Some(record),
        _ => None,
    };
    let (memory_dir, manager) = (&MemoryDir::Path(memory_dir.to_path_buf()), &Arc::new(ServiceManager::default()));
    let overlapping = image.overlapping_tenures();
    let search = Search { image: &*image, facts: &facts, record, overlapping: &overlapping, memory_dir, manager };
    let (found, problems) = search.run_through()?;
    if let Some(position) = problems.iter().position(|e| e.kind() == ErrorKind::Locked) {
        return Err(problems.into_iter().nth(position).expect("it is there"));
    }
    // The cache of an original that no longer exists stays as it is, for the image that was moved.
    let moved = MovedCache::of(&*image, &facts);
    let generation_of = |header: &Header| header.tenure.map_or(0, |tenure| tenure.id.generation);
    let found_tenures = found.iter().filter_map(|candidate| Some(candidate.header.tenure?.id)).collect();
    let is_other_missing = overlapping.iter().any(|record| !is_over(record, &found_tenures));
    let newest = found.iter().map(|candidate| generation_of(&candidate.header)).max().unwrap_or(0);
    let recorded = record.filter(|record| record.state == TenureState::Open);
    let is_recorded = |header: &Header| recorded.is_some_and(|r| header.tenure.is_some_and(|t| t.id == r.tenure));
    let mut last_end = recorded.map(|record| recorded_end(record).unwrap_or(TenureState::Forfeited));
    let mut lossy = Vec::new();
    for candidate in found {
        match candidate.unwritten() {
            Ok(Unwritten::NOTHING) => {
                // The recorded cache was found, and all its data is on the image.
                if is_recorded(&candidate.header) && candidate.header.guest.data == GuestData::Intact {
                    last_end = Some(TenureState::Clean);
                }
            }
            Ok(unwritten) => lossy.push((candidate.file, format!("holds {unwritten}"))),
            Err(e) => lossy.push((candidate.file, format!("cannot be read ({e})"))),
        }
    }
    if matches!(last, LastTenure::Unreadable(_)) || !lossy.is_empty() || moved.is_some() || is_other_missing {
        last_end = Some(TenureState::Forfeited);
    }
    let is_free = last_end.is_none_or(|state| state == TenureState::Clean) && problems.is_empty();
    if is_free {
        if let (Some(record), Some(TenureState::Clean)) = (recorded, last_end) {
            image.write_record(&Record { state: TenureState::Clean, ..record.clone() }).map_err(failed)?;
        }
        return Ok(format!("image {shown}: nothing to take over; no cache holds unwritten data\n"));
    }
    // The record first: if that fails, nothing has changed.
    let generation = newest.max(record.map_or(0, |record| record.tenure.generation)) + 1;
    let new_record = record_of_end(&facts, generation, last_end.unwrap_or(TenureState::Forfeited))?;
    let has_records = last != LastTenure::NoRecords;
    if has_records {
        image.write_record(&new_record).map_err(failed)?;
    }
    image.end_overlapping_tenures(TenureState::Forfeited).map_err(failed)?;
    let mut lines = String::new();
    for (file, holds) in lossy {
        file.set_aside()?;
        lines.push_str(&format!("set aside: {file}, which {holds}\n"));
    }
    lines.extend(moved.map(|moved| format!("not used: {}\n", moved.describe())));
    // Check what the next daemon would find.
    let record = has_records.then_some(&new_record);
    let search = Search { image: &*image, facts: &facts, record, overlapping: &[], memory_dir, manager };
    let hint = format!(
        "image {shown} cannot be served while that file exists: delete it with \"genblk recover --discard --force\""
    );
    search.run().map_err(|e| e.with_hint(&hint))?;
    // Each error ends with advice that no longer applies.
    let reason = |e: &Error| e.to_string().split("; ").next().map_or_else(String::new, str::to_owned);
    let unseen = problems.iter().map(|e| format!("ignored from now on: {}\n", reason(e))).collect::<String>();
    Ok(format!("{lines}{unseen}image {shown} can be served now\n"))
}

/// The record of a tenure that the operator has ended.
fn record_of_end(facts: &ImageFacts, generation: u64, state: TenureState) -> Result<Record> {
    let ImageId { inode, born_ns, .. } = facts.identity;
    Ok(Record {
        tenure: TenureId::new(generation)?,
        state,
        since: wall_clock_ns() / 1_000_000_000,
        boot: Boot::current(),
        inode,
        born_ns,
        cache: CacheLocation::Memory,
    })
}
