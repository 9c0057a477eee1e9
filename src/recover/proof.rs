//! Checks whether an earlier daemon's cache belongs to an image in its present state: that no other process has changed
//! the image since.
//!
//! Three checks follow each other: whether a later tenure has held the image; what the change tokens show; and, if they
//! are inconclusive, whether the image is equal to the clean pages of the cache, and to the hashes in the ledger of a
//! few pages that are not in the cache (`arena/samples.rs`).

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use super::write_back::Unwritten;
use crate::arena::{Arena, Header, SAMPLES_MAX, hash_of, sectors_within, word_hash_of};
use crate::fault_injection::{PlantedBug, planted};
use crate::store::named::NamedImage;
use crate::tenure::record::{Record, TenureState};
use crate::tenure::token::ChangeVerdict;
use crate::units::{
    FrameId, FrameRecord, PAGE_BYTES, PageNo, SECTOR_BYTES, SECTOR_SIZE, SectorMask, SectorSpan, counted,
};

/// Most pages that are compared.
const SAMPLE_PAGES: usize = 200;
/// Pages that are compared if they are in the cache, because every mount of a file system changes one of them: the
/// superblocks of ext4 and XFS, of btrfs, and the same in a first partition at 1 MiB.
const SUPERBLOCK_PAGES: [u64; 6] = [0, 1, 16, 256, 257, 272];
/// Pages spread over the data whose hashes are recorded, besides those.
const SPREAD_PAGES: u64 = (SAMPLES_MAX - SUPERBLOCK_PAGES.len()) as u64;

/// A reason why a cache cannot be proven to belong to an image.
pub(crate) const NOTHING_TO_COMPARE: &str = "the cache has no clean page to compare";

/// Why a cache that was set aside is not used.
pub(super) const SET_ASIDE: &str = "it was set aside by \"genblk take-over\"";

/// Whether a cache may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    /// No other process has changed the image.
    Proven,
    /// Another process may have: the evidence is inconclusive, and no clean page could be compared.
    Unproven(String),
    /// Another process has changed the image, for this reason.
    Refuted(String),
    /// A later tenure has held the image.
    Overtaken(String),
}

/// How strongly a cache's header indicates that it belongs to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum MatchStrength {
    /// It is of a loop device on the image, of the file behind the loop device that is the image, of a partition of the
    /// image, or of the disk of the partition that is the image: it holds data of the same bytes, but no daemon uses it
    /// for this image.
    OtherAccess,
    /// It may belong: the path is the same, and nothing indicates another image.
    Similar,
    /// It belongs, by the file's identity, the name of the device, or the image's record.
    Same,
}

/// Whether the image's `record` shows that another tenure has held it after the one of `header`.
pub(super) fn superseded(header: &Header, record: Option<&Record>) -> Option<Proof> {
    if header.is_set_aside {
        return Some(Proof::Overtaken(SET_ASIDE.to_owned()));
    }
    let tenure = header.tenure?;
    let record = record?;
    if record.tenure == tenure.id || planted(PlantedBug::GenerationNotCompared) {
        return None;
    }
    if tenure.is_recorded && tenure.id.generation > record.tenure.generation {
        let why = "the image carries the record of an earlier daemon: an older copy was restored";
        return Some(Proof::Refuted(why.to_owned()));
    }
    if tenure.id.generation > record.tenure.generation {
        // The record of its tenure could not be written, for example because the disk was full.
        return None;
    }
    let (ours, later) = (tenure.id.generation, record.tenure.generation);
    Some(Proof::Overtaken(format!(
        "its generation is {ours}; a later daemon has opened the image, as generation {later}"
    )))
}

/// Whether the image records that the tenure of `header` has ended. A daemon records that only when everything is on
/// the image, and an operator only for a cache that is written or given up.
fn has_ended(header: &Header, record: Option<&Record>) -> bool {
    // If the record of a tenure that continues an ended one could not be written, the header says so.
    let is_recorded = header.tenure.is_some_and(|tenure| {
        tenure.is_recorded && !tenure.is_over && record.is_some_and(|record| record.tenure == tenure.id)
    });
    is_recorded && record.is_some_and(|record| record.state != TenureState::Open)
}

/// Whether the cache in `arena`, with this header, may be used for `image`.
pub(super) fn prove(
    arena: &Arena,
    header: &Header,
    match_strength: MatchStrength,
    image: &dyn NamedImage,
    record: Option<&Record>,
) -> Proof {
    if let Some(objection) = superseded(header, record) {
        return objection;
    }
    if has_ended(header, record) && Unwritten::of(arena) != Unwritten::NOTHING {
        return Proof::Overtaken(
            "it is an old copy: the image records that this cache was written back and released".to_owned(),
        );
    }
    if planted(PlantedBug::ProofSkipped) {
        return Proof::Proven;
    }
    // Versions without tenures compared only the identity and the size.
    let is_known_image = header.tenure.is_none() && header.image.size_bytes == image.limits().size_bytes.get();
    let verdict = match header.last_seen.judge(&image.found_token()) {
        _ if planted(PlantedBug::TokenNotCompared) => ChangeVerdict::Plausible,
        verdict => verdict,
    };
    let doubt = match verdict {
        ChangeVerdict::Unchanged => return Proof::Proven,
        ChangeVerdict::Changed(why) => return Proof::Refuted(why),
        ChangeVerdict::Plausible if match_strength == MatchStrength::Same => None,
        ChangeVerdict::Plausible => Some("it may be another file at the same path".to_owned()),
        ChangeVerdict::Unknown(_) if is_known_image && match_strength == MatchStrength::Same => None,
        ChangeVerdict::Unknown(why) => Some(why),
    };
    let known_bytes = header.image.size_bytes.min(image.limits().size_bytes.get());
    match (compare_pages(arena, image, known_bytes / SECTOR_BYTES), doubt) {
        (Comparison::Differs(page), doubt) => {
            let why = doubt.map_or_else(String::new, |doubt| format!("{doubt}, and "));
            Proof::Refuted(format!("{why}page {} of the image differs from the cache", page.0))
        }
        (Comparison::Equal(0), Some(doubt)) => Proof::Unproven(format!("{doubt}, and {NOTHING_TO_COMPARE}")),
        (Comparison::Equal(pages), doubt) => {
            if let Some(doubt) = doubt {
                let pages = counted(pages as u64, "page");
                log::info!(
                    "image {}: {doubt}; compared {pages} with its cache, all equal; using the cache",
                    image.path().display()
                );
            }
            Proof::Proven
        }
    }
}

/// The result of a comparison.
enum Comparison {
    /// This page differs.
    Differs(PageNo),
    /// This many pages are equal.
    Equal(usize),
}

/// Compares the image with the cache's clean pages and with the hashes in the ledger, up to `known_sectors` sectors.
fn compare_pages(arena: &Arena, image: &dyn NamedImage, known_sectors: u64) -> Comparison {
    if planted(PlantedBug::SampleSkipped) {
        return Comparison::Equal(SAMPLE_PAGES);
    }
    let clean = match compare_sample(arena, image, known_sectors) {
        Comparison::Equal(clean) => clean,
        differs => return differs,
    };
    let image_pages = image.limits().size_bytes.get() / PAGE_BYTES;
    // They reveal an older copy of the image, but show nothing about other changes: so they do not count.
    for (page, hash) in arena.witnesses().into_iter().filter(|(page, _)| page.0 < image_pages) {
        if image.read_page(page).is_ok_and(|bytes| word_hash_of(&bytes.0) != hash) {
            return Comparison::Differs(page);
        }
    }
    let mut equal = 0;
    for (page, hash) in arena.samples().into_iter().filter(|(page, _)| page.0 < image_pages) {
        match image.read_page(page) {
            Ok(bytes) if hash_of(&bytes.0) != hash => return Comparison::Differs(page),
            Ok(_) => equal += 1,
            Err(_) => {}
        }
    }
    Comparison::Equal(clean + equal)
}

/// Pages of an image with their hashes, for the ledger of `arena`: those that every mount changes, and a sample spread
/// over its data. Dirty pages are left out: they may be on the image without being durable there, and prove nothing.
pub(super) fn samples_of(image: &dyn NamedImage, arena: &Arena) -> Vec<(PageNo, u64)> {
    let image_pages = image.limits().size_bytes.get() / PAGE_BYTES;
    let mut runs: Vec<Range<u64>> =
        image.data_runs().into_iter().map(|run| run.start.div_ceil(PAGE_BYTES)..run.end / PAGE_BYTES).collect();
    runs.retain(|run| run.start < run.end);
    if runs.is_empty() {
        runs.push(0..image_pages);
    }
    let data_pages: u64 = runs.iter().map(|run| run.end - run.start).sum();
    let spread = (0..SPREAD_PAGES).filter_map(|n| {
        let mut left = data_pages * (4 * n + 1) / (4 * SPREAD_PAGES);
        let run = runs.iter().find(|run| {
            let is_within = left < run.end - run.start;
            left -= if is_within { 0 } else { run.end - run.start };
            is_within
        })?;
        Some(run.start + left)
    });
    let (mut pages, telltale): (BTreeSet<u64>, BTreeSet<u64>) = (spread.collect(), SUPERBLOCK_PAGES.into());
    pages.extend(telltale);
    let records = arena.records().filter(|(_, record)| !record.dirty.is_empty());
    let dirty: HashSet<u64> = records.map(|(_, record)| record.page.0).collect();
    let is_zeroed = |page: u64| arena.pending_zeroes().any(|(_, span)| !span.sectors_in(PageNo(page)).is_empty());
    let is_changed = |page: u64| arena.changed_ranges().any(|(_, span)| span.pages().contains(PageNo(page)));
    let is_settled = |page: u64| !dirty.contains(&page) && !is_zeroed(page) && !is_changed(page);
    let is_known = |page: &u64| *page < image_pages && is_settled(*page);
    let pages = pages.into_iter().filter(is_known).take(SAMPLES_MAX);
    pages.filter_map(|page| Some((PageNo(page), hash_of(&image.read_page(PageNo(page)).ok()?.0)))).collect()
}

/// Compares clean pages of a cache with the image: all of them if they are few, otherwise a sample spread over the
/// image.
fn compare_sample(arena: &Arena, image: &dyn NamedImage, known_sectors: u64) -> Comparison {
    // Pending zeroes may not be on the image yet either, and the store may have lost unsynced discards.
    let zeroes: Vec<SectorSpan> = arena.pending_zeroes().map(|(_, span)| span).collect();
    let changed: Vec<SectorSpan> = arena.changed_ranges().map(|(_, span)| span).collect();
    let clean = |(frame, record): (FrameId, FrameRecord)| {
        // In a page that the end of the image cuts, the ledger marks sectors as valid that were never read.
        let known = record.valid.without(record.dirty).and(sectors_within(known_sectors, record.page));
        let mask = zeroes.iter().fold(known, |mask, span| mask.without(span.sectors_in(record.page)));
        let is_changed = changed.iter().any(|span| span.pages().contains(record.page));
        (!mask.is_empty() && !is_changed).then_some((record.page, frame, mask))
    };
    // A page that was being moved is recorded twice. If one of the records is dirty, the other proves nothing.
    let dirty: HashSet<PageNo> =
        arena.records().filter(|(_, record)| !record.dirty.is_empty()).map(|(_, record)| record.page).collect();
    let mut pages: Vec<(PageNo, FrameId, SectorMask)> = arena.records().filter_map(clean).collect();
    pages.sort_unstable_by_key(|(page, _, mask)| (*page, mask.0));
    pages.retain(|(page, ..)| !dirty.contains(page));
    let step = pages.len().div_ceil(SAMPLE_PAGES).max(1);
    let chosen = pages.iter().enumerate().filter(|(n, (page, ..))| n % step == 0 || SUPERBLOCK_PAGES.contains(&page.0));
    let mut equal = 0;
    for (_, &(page, frame, mask)) in chosen {
        match is_equal(arena, image, page, frame, mask) {
            Some(true) => equal += 1,
            Some(false) => return Comparison::Differs(page),
            // A page that cannot be read proves nothing.
            None => {}
        }
    }
    Comparison::Equal(equal)
}

/// Whether these sectors of a frame are equal to the image; `None` if they cannot be read.
fn is_equal(arena: &Arena, image: &dyn NamedImage, page: PageNo, frame: FrameId, mask: SectorMask) -> Option<bool> {
    let mut left = mask;
    let bytes = image.read_page(page).ok()?;
    while let Some((first, count)) = left.first_run() {
        let start = usize::from(first) * SECTOR_SIZE;
        let cached = arena.sectors(frame, first, count);
        if bytes.0[start..start + cached.len()] != cached[..] {
            return Some(false);
        }
        left = left.without(SectorMask::run(first, count));
    }
    Some(true)
}
