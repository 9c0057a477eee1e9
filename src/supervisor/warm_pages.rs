//! Which pages of a device are in memory, and reading in others, by requests to its disk process.

use std::ops::ControlFlow;
use std::thread;
use std::time::{Duration, Instant};

use super::process::Process;
use crate::disk_protocol::{DeviceReply, DeviceRequest};

/// Limits of one request: extents, and time. The device may end between two requests.
const EXTENTS_PER_REQUEST: usize = 512;
const REQUEST_MS: u32 = 1000;
/// With a limited rate, so many requests are sent per second.
const REQUESTS_PER_SECOND: u64 = 10;

/// Pages: the first one, and their number.
pub(super) type PageExtent = (u64, u64);

/// Pages as extents.
fn extents_of(mut pages: Vec<u64>) -> Vec<PageExtent> {
    pages.sort_unstable();
    pages.dedup();
    let mut extents: Vec<PageExtent> = Vec::new();
    for page in pages {
        match extents.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            _ => extents.push((page, 1)),
        }
    }
    extents
}

/// The pages of a device that are in memory; `None` if its process does not reply before `until`, or ends.
pub(super) fn resident_pages(process: &Process, device: u32, until: Instant) -> Option<Vec<PageExtent>> {
    let (mut pages, mut from) = (Vec::new(), Some(0));
    while let Some(slot) = from {
        let left = until.saturating_duration_since(Instant::now());
        let reply = process.request(device, DeviceRequest::Resident { from: slot }).ok()?.recv_timeout(left);
        let Ok(DeviceReply::Resident { pages: more, next }) = reply else { return None };
        pages.extend(more);
        from = next;
    }
    Some(extents_of(pages))
}

/// How reading in pages has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WarmEnd {
    /// All pages are in memory, or are being read in.
    All,
    /// The cache filled up first.
    Full,
    /// The caller has ended it.
    Stopped,
    /// The device has ended.
    Gone,
}

/// Reads in pages, at most so many per second if `pages_per_second` is given. `check` is called between two requests
/// with the number of pages that are done.
pub(super) fn warm_pages(
    extents: &[PageExtent],
    process: &Process,
    device: u32,
    pages_per_second: Option<u64>,
    mut check: impl FnMut(u64) -> ControlFlow<()>,
) -> WarmEnd {
    let per_request = pages_per_second.map_or(u64::MAX, |rate| rate.div_ceil(REQUESTS_PER_SECOND).max(1));
    let mut left: Vec<PageExtent> = extents.iter().rev().copied().collect();
    let mut done = 0_u64;
    while !left.is_empty() {
        let begun = Instant::now();
        let mut part = take_pages(&mut left, per_request);
        let count = page_count(&part);
        while !part.is_empty() {
            let sent = process.request(device, DeviceRequest::Warm { extents: part, time_ms: REQUEST_MS });
            let Ok(Ok(DeviceReply::Warmed { left: rest, is_full })) = sent.map(|reply| reply.recv()) else {
                return WarmEnd::Gone;
            };
            if is_full {
                return WarmEnd::Full;
            }
            part = rest;
            if check(done.saturating_add(count.saturating_sub(page_count(&part)))).is_break() {
                return WarmEnd::Stopped;
            }
        }
        done = done.saturating_add(count);
        if pages_per_second.is_some() && !left.is_empty() {
            thread::sleep(Duration::from_millis(1000 / REQUESTS_PER_SECOND).saturating_sub(begun.elapsed()));
        }
    }
    WarmEnd::All
}

/// Number of pages of extents.
pub(super) fn page_count(extents: &[PageExtent]) -> u64 {
    extents.iter().fold(0, |sum: u64, (_, count)| sum.saturating_add(*count))
}

/// Takes extents with at most this many pages from the end of `left`, which is in reverse order.
pub(super) fn take_pages(left: &mut Vec<PageExtent>, mut pages: u64) -> Vec<PageExtent> {
    let mut taken = Vec::new();
    while let Some((first, count)) = left.pop_if(|_| pages > 0 && taken.len() < EXTENTS_PER_REQUEST) {
        let now = count.min(pages);
        taken.push((first, now));
        pages -= now;
        if now < count {
            left.push((first + now, count - now));
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_pages_form_one_extent() {
        assert_eq!(extents_of(vec![9, 1, 2, 3, 9, 10]), [(1, 3), (9, 2)]);
        assert_eq!(extents_of(Vec::new()), []);
    }

    #[test]
    fn a_part_is_limited_in_pages_and_extents() {
        let mut left = vec![(9, 5), (0, 4)];
        assert_eq!(take_pages(&mut left, 6), [(0, 4), (9, 2)]);
        assert_eq!(take_pages(&mut left, 100), [(11, 3)]);
        let mut many = vec![(0, 1); EXTENTS_PER_REQUEST + 1];
        assert_eq!(take_pages(&mut many, u64::MAX).len(), EXTENTS_PER_REQUEST);
    }
}
