//! The operator's `resident` and `warm`: what of a disk is in memory, and reading in parts of it.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use log::info;
use serde_json::{Value, json};

use super::operator::{Operator, invalid_texts, link_of};
use super::warm_pages::{PageExtent, WarmEnd, page_count, resident_pages, take_pages, warm_pages};
use crate::control::change::{ChangeClient, Refusal};
use crate::control::wire::{ByteExtent, FlushProgress, ResidentExtents, Warmed};
use crate::units::PAGE_BYTES;

/// Extents of one reply of `Resident`: less than 1 MiB of JSON.
const EXTENTS_PER_REPLY: usize = 16_384;
/// How long `Resident` waits for the disk process.
const RESIDENT_TIMEOUT: Duration = Duration::from_secs(10);
/// The interval of the replies that report progress.
const PROGRESS: Duration = Duration::from_secs(1);
/// Most problems of a list that an error reports.
const PROBLEMS_MAX: usize = 10;

/// Extents of an image of `image_bytes` as pages, of which at most `bytes_max`; or what is wrong with them.
fn pages_of(extents: &[ByteExtent], image_bytes: u64, bytes_max: Option<u64>) -> Result<Vec<PageExtent>, Vec<String>> {
    let (mut pages, mut problems) = (Vec::new(), Vec::new());
    for (index, ByteExtent { offset, bytes }) in extents.iter().enumerate() {
        match offset.checked_add(*bytes).filter(|end| *bytes > 0 && *end <= image_bytes) {
            Some(end) => {
                let first = offset / PAGE_BYTES;
                pages.push((first, end.div_ceil(PAGE_BYTES) - first));
            }
            None if *bytes == 0 => problems.push(format!("extents[{index}]: {offset}+0 is empty")),
            None => problems.push(format!(
                "extents[{index}]: {offset}+{bytes} is beyond the end of the image, which has {image_bytes} bytes"
            )),
        }
    }
    if !problems.is_empty() {
        let more = problems.len().saturating_sub(PROBLEMS_MAX);
        problems.truncate(PROBLEMS_MAX);
        problems.extend((more > 0).then(|| format!("and {more} others")));
        return Err(problems);
    }
    pages.reverse();
    Ok(take_all(pages, bytes_max.map_or(u64::MAX, |bytes| bytes / PAGE_BYTES)))
}

/// As [`take_pages`], without a limit of extents.
fn take_all(mut left: Vec<PageExtent>, pages: u64) -> Vec<PageExtent> {
    let (mut taken, mut room) = (Vec::new(), pages);
    loop {
        let part = take_pages(&mut left, room);
        room -= page_count(&part).min(room);
        if part.is_empty() {
            return taken;
        }
        taken.extend(part);
    }
}

impl Operator {
    /// Reads extents of a disk into its cache; without extents, the whole disk.
    pub(super) fn warm(
        &self,
        device: &str,
        extents: Option<&[ByteExtent]>,
        (bytes_max, bytes_per_second): (Option<u64>, Option<u64>),
        client: &ChangeClient,
    ) -> Result<Value, Refusal> {
        let entry = self.overview.entry(device)?;
        let link = link_of(&entry)?;
        let image_bytes = entry.page.read().image_bytes;
        let all = [ByteExtent { offset: 0, bytes: image_bytes }];
        let pages =
            pages_of(extents.unwrap_or(&all), image_bytes, bytes_max).map_err(|problems| invalid_texts(&problems))?;
        let total_bytes = page_count(&pages) * PAGE_BYTES;
        let mut reported = Instant::now();
        let check = |done: u64| {
            if client.wait_disconnected(Duration::ZERO) {
                return ControlFlow::Break(());
            }
            if reported.elapsed() >= PROGRESS {
                reported = Instant::now();
                let progress = FlushProgress { done_bytes: done * PAGE_BYTES, total_bytes };
                client.send_progress(&Warmed { progress: Some(progress), full: None });
            }
            ControlFlow::Continue(())
        };
        let rate = bytes_per_second.map(|bytes| (bytes / PAGE_BYTES).max(1));
        match warm_pages(&pages, &link.process, link.device, rate, check) {
            WarmEnd::Gone => Err(Refusal::refused(device, "it is no longer served")),
            WarmEnd::Stopped => {
                info!("{device}: warming has ended early: its client has disconnected");
                Ok(json!(Warmed { progress: None, full: Some(false) }))
            }
            end => Ok(json!(Warmed { progress: None, full: Some(end == WarmEnd::Full) })),
        }
    }

    /// What of a disk is in memory. A client that accepts more than one reply gets it in parts.
    pub(super) fn resident(&self, device: &str, client: &ChangeClient) -> Result<Value, Refusal> {
        let entry = self.overview.entry(device)?;
        let link = link_of(&entry)?;
        // The list of a large cache takes much memory.
        let Ok(_resident) = self.resident.try_lock() else {
            return Err(Refusal::new("Busy", json!({ "what": "resident" })));
        };
        let pages = resident_pages(&link.process, link.device, Instant::now() + RESIDENT_TIMEOUT);
        let pages = pages.ok_or_else(|| Refusal::refused(device, "its disk process does not reply"))?;
        let of_pages =
            |&(first, count): &PageExtent| ByteExtent { offset: first * PAGE_BYTES, bytes: count * PAGE_BYTES };
        let mut extents = pages.iter().map(of_pages);
        if !client.accepts_progress() && pages.len() > EXTENTS_PER_REPLY {
            let why = format!("{} extents are in memory, too many for one reply; call with \"more\"", pages.len());
            return Err(Refusal::refused(device, why));
        }
        loop {
            let part: Vec<ByteExtent> = extents.by_ref().take(EXTENTS_PER_REPLY).collect();
            if extents.len() == 0 {
                return Ok(json!(ResidentExtents { extents: part }));
            }
            client.send_progress(&ResidentExtents { extents: part });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, bytes: u64) -> ByteExtent {
        ByteExtent { offset, bytes }
    }

    #[test]
    fn extents_are_rounded_to_pages_and_limited_to_the_byte_budget() {
        let extents = [extent(4095, 2), extent(1 << 20, 8192), extent(0, 1)];
        assert_eq!(pages_of(&extents, 2 << 20, None), Ok(vec![(0, 2), (256, 2), (0, 1)]));
        assert_eq!(pages_of(&extents, 2 << 20, Some(3 * 4096)), Ok(vec![(0, 2), (256, 1)]));
        assert_eq!(pages_of(&extents, 2 << 20, Some(0)), Ok(Vec::new()));
        let many: Vec<_> = (0..2000).map(|index| extent(index * 8192, 4096)).collect();
        assert_eq!(pages_of(&many, 1 << 30, None).map(|pages| pages.len()), Ok(2000));
    }

    #[test]
    fn every_invalid_extent_is_counted_and_the_first_are_listed() {
        let extents = [extent(0, 4096), extent(4096, 0), extent(u64::MAX, 2), extent(8192, 4096)];
        let problems = pages_of(&extents, 8192, None).unwrap_err();
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[0].starts_with("extents[1]: 4096+0 is empty"), "{problems:?}");
        assert!(problems[2].contains("beyond the end of the image, which has 8192 bytes"), "{problems:?}");
        let problems = pages_of(&vec![extent(1, 0); 1000], 8192, None).unwrap_err();
        assert_eq!((problems.len(), problems[10].as_str()), (11, "and 990 others"));
    }
}
