//! How much space is reserved ahead of writes into holes.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use super::*;
use crate::units::{Fault, PageSpan};

/// A cache over an image that is one hole, and the space that its store has reserved.
struct SparseImage {
    cache: PageCache,
    now: Tick,
    reserved: Vec<SectorSpan>,
    /// Number of free sectors on the store.
    space_left: u64,
}

impl SparseImage {
    fn new() -> Self {
        let settings = Settings { holes: ImageHoles::Possible, allocate: true, ..Settings::of(65_536, 1 << 26) };
        let cache = PageCache::new(settings, Box::new(NoBytes));
        Self { cache, now: Tick::from_us(1), reserved: Vec::new(), space_left: u64::MAX }
    }

    /// Writes `count` pages, starting at page `first`. Returns the pages that were reserved for that; `None`: the write
    /// failed.
    fn try_write(&mut self, first: u64, count: u64) -> Option<Vec<PageSpan>> {
        let mut access = access(first * 8, count * 8);
        let mut reserved = Vec::new();
        loop {
            let mut pieces = Vec::new();
            let admitted = self.cache.write(access, &mut pieces);
            pieces.iter().for_each(|piece| self.cache.finish_write(piece, CopyResult::Complete));
            match admitted {
                Admitted::All => return Some(reserved),
                Admitted::Refused(..) => return None,
                Admitted::Until(from) => access = Access { from, attempt: Attempt::Resumed, ..access },
            }
            reserved.extend(self.turn());
        }
    }

    fn write(&mut self, first: u64, count: u64) -> Vec<PageSpan> {
        self.try_write(first, count).expect("there is space")
    }

    /// Ends a turn, and completes all operations. Returns the pages that the store has reserved.
    fn turn(&mut self) -> Vec<PageSpan> {
        let mut reserved = Vec::new();
        loop {
            self.cache.pump(self.now);
            let mut ops = Vec::new();
            self.cache.take_ops(|op| ops.push((op.tag, op.kind, op.span)));
            if ops.is_empty() {
                self.cache.take_notices(&mut Vec::new());
                return reserved;
            }
            for (tag, kind, span) in ops {
                let mut outcome = Outcome::Done;
                if kind == OpKind::Allocate {
                    let new: u64 = (span.start..span.end()).filter(|at| !self.has_space(*at)).count() as u64;
                    if new <= self.space_left {
                        self.space_left -= new;
                        self.reserved.push(span);
                        reserved.push(span.pages());
                    } else {
                        outcome = Outcome::Failed(Fault::NoSpace);
                    }
                }
                self.cache.complete(tag, &outcome, self.now);
            }
        }
    }

    fn has_space(&self, sector: u64) -> bool {
        self.reserved.iter().any(|span| (span.start..span.end()).contains(&sector))
    }

    fn trim(&mut self, first: u64, count: u64) {
        assert!(self.cache.discard(Ticket(9), SectorSpan::new(first * 8, count * 8)));
        assert_eq!(self.turn(), []);
    }
}

fn span(first: u64, count: u64) -> PageSpan {
    PageSpan::new(PageNo(first), count)
}

/// Pages of some spans, each counted once.
fn pages_of(spans: &[PageSpan]) -> u64 {
    let mut pages: Vec<u64> = spans.iter().flat_map(|span| span.iter()).map(|no| no.0).collect();
    pages.sort_unstable();
    pages.dedup();
    pages.len() as u64
}

#[test]
fn a_random_write_reserves_the_aligned_32_kib_around_it() {
    let mut image = SparseImage::new();
    assert_eq!(image.write(1003, 1), [span(1000, 8)]);
    assert_eq!(image.write(1001, 4), [], "there is space now");
    assert_eq!(image.write(5006, 4), [span(5000, 16)]);
}

#[test]
fn random_4_kib_writes_take_at_most_16_times_their_size() {
    let mut prng = Prng::new(1);
    // From writes far apart to writes so dense that most pages are written.
    for image_pages in [1 << 22, 1 << 16, 1 << 14, 1 << 12] {
        let mut image = SparseImage::new();
        let (mut reserved, mut written) = (Vec::new(), Vec::new());
        for _ in 0..2500 {
            let page = prng.below(image_pages);
            reserved.extend(image.write(page, 1));
            written.push(span(page, 1));
            image.turn();
        }
        let (reserved, written) = (pages_of(&reserved), pages_of(&written));
        assert!(reserved <= 16 * written, "{image_pages} pages: {written} written, {reserved} reserved");
    }
}

#[test]
fn a_sequential_write_stream_takes_at_most_a_tenth_more_space_than_its_size() {
    for request in [1, 4, 32, 256] {
        let mut image = SparseImage::new();
        let mut reserved = Vec::new();
        for at in (0..12_000).step_by(request as usize) {
            reserved.extend(image.write(100_000 + at, request));
            image.turn();
            let written = at + request;
            let taken = pages_of(&reserved);
            assert!(written < 1024 || taken * 10 <= written * 11, "{written} pages written, {taken} reserved");
        }
        assert!(reserved.len() < 120, "{} reservations for 12 000 pages", reserved.len());
    }
}

#[test]
fn a_region_is_reserved_whole_once_most_of_it_is_allocated() {
    let mut image = SparseImage::new();
    image.write(0, 192);
    assert_eq!(image.write(250, 1), [span(0, 256)]);
}

#[test]
fn a_nearly_full_disk_reserves_only_the_written_pages() {
    let mut image = SparseImage::new();
    image.space_left = 20 * 8;
    assert_eq!(image.write(1003, 1), [span(1000, 8)]);
    assert_eq!(image.write(2003, 1), [span(2000, 8)]);
    for n in 3..7 {
        assert_eq!(image.write(n * 1000 + 3, 1), [span(n * 1000 + 3, 1)], "4 pages are left");
    }
    assert_eq!(image.try_write(7003, 1), None);
    // A second later, reservations are rounded again.
    image.space_left = 100 * 8;
    image.now = image.now.plus_us(2_000_000);
    image.cache.pump(image.now);
    assert_eq!(image.write(8003, 1), [span(8000, 8)]);
}

#[test]
fn a_trimmed_range_is_not_reserved_again() {
    let mut image = SparseImage::new();
    image.write(0, 256);
    image.turn();
    image.trim(16, 240);
    assert_eq!(image.write(0, 1), [], "the page has kept its space");
    assert_eq!(image.write(20, 1), [span(20, 1)]);
    assert_eq!(image.write(100, 4), [span(100, 4)]);
    // Pages that were never written are not trimmed.
    assert_eq!(image.write(300, 1), [span(296, 8)]);
}

/// A discard also makes the map of its region unknown, and another cache has no record of the space.
#[test]
fn a_reservation_never_extends_into_a_trimmed_range() {
    let mut image = SparseImage::new();
    image.trim(1004, 1000);
    assert_eq!(image.write(1002, 1), [span(1000, 4)]);
    assert_eq!(image.write(2005, 1), [span(2004, 4)]);
}

#[test]
fn a_discard_voids_a_reservation_in_flight() {
    let mut image = SparseImage::new();
    let mut pieces = Vec::new();
    assert_eq!(image.cache.write(access(8000, 8), &mut pieces), Admitted::Until(0));
    let mut ops = Vec::new();
    image.cache.take_ops(|op| ops.push((op.tag, op.kind)));
    let [(tag, OpKind::Allocate)] = ops[..] else { panic!("a reservation comes first: {ops:?}") };
    image.trim(1000, 8);
    image.cache.complete(tag, &Outcome::Done, image.now);
    assert_eq!(image.write(1000, 1), [span(1000, 1)], "reserved again, and only what is written");
}

/// After a failed Map, holes are read from the store like data, although no space is allocated for them.
#[test]
fn after_a_failed_map_a_cluster_does_not_bridge_a_possible_hole() {
    let mut cache = cache_with(Settings { holes: ImageHoles::Possible, ..Settings::of(1024, 1 << 20) });
    let now = Tick::from_us(1);
    assert_eq!(cache.read(access(8, 8), &mut Vec::new()), Admitted::Until(0));
    // Without runs of data and holes, a Map has failed.
    complete_all(&mut cache, now);
    assert!(!read(&mut cache, 8, 8));
    complete_all(&mut cache, now);
    assert!(read(&mut cache, 8, 8), "the page is clean");
    write(&mut cache, 0, 8);
    write(&mut cache, 16, 8);
    cache.flush(Ticket(2));
    let ops = complete_all(&mut cache, now);
    let written: Vec<_> = ops.iter().filter(|(kind, _)| *kind == OpKind::Write).map(|(_, span)| *span).collect();
    assert_eq!(written, [SectorSpan::new(0, 8), SectorSpan::new(16, 8)]);
}

/// Completes all operations but a reservation. Returns the tag of that.
fn complete_others(image: &mut SparseImage) -> Option<u32> {
    let mut reservation = None;
    loop {
        image.cache.pump(image.now);
        let mut ops = Vec::new();
        image.cache.take_ops(|op| ops.push((op.tag, op.kind)));
        if ops.is_empty() {
            return reservation;
        }
        for (tag, kind) in ops {
            if kind == OpKind::Allocate {
                reservation = Some(tag);
            } else {
                image.cache.complete(tag, &Outcome::Done, image.now);
            }
        }
    }
}

/// A reservation changes the image as well.
#[test]
fn a_freeze_waits_for_a_reservation() {
    let mut image = SparseImage::new();
    let mut access = access(0, 8);
    let reservation = loop {
        assert_eq!(image.cache.write(access, &mut Vec::new()), Admitted::Until(0));
        access.attempt = Attempt::Resumed;
        if let Some(tag) = complete_others(&mut image) {
            break tag;
        }
    };
    image.cache.freeze(Ticket(7), image.now.plus_us(1_000_000), false);
    assert_eq!(complete_others(&mut image), None);
    assert!(!image.cache.is_frozen());
    image.cache.complete(reservation, &Outcome::Done, image.now);
    assert_eq!(complete_others(&mut image), None);
    assert!(image.cache.is_frozen());
}
