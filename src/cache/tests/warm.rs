//! Warming: pages that were cached earlier are read in, with a lower priority than everything else.

use super::*;
use crate::units::{Fault, PageSpan, Urgency};

fn settings(frames: u32) -> Settings {
    Settings { readahead_pages_max: 0, ..Settings::of(frames, 1 << 20) }
}

#[test]
fn warmed_pages_are_resident_and_listed() {
    let mut cache = cache_with(settings(1024));
    write(&mut cache, 80, 8);
    let span = PageSpan::new(PageNo(5), 300);
    let (next, step) = cache.warm(span);
    assert_eq!((next, step), (PageNo(5 + 257), WarmStep::Done), "a part at a time, without resident pages");
    complete_all(&mut cache, Tick::from_us(1));
    assert_eq!(cache.warm(PageSpan::new(next, span.end().0 - next.0)), (span.end(), WarmStep::Done));
    complete_all(&mut cache, Tick::from_us(2));
    cache.check(&[]);
    assert!(read(&mut cache, 40, 2400), "all of it is in memory");
    let (mut pages, next) = cache.resident(0, u32::MAX);
    pages.sort_unstable();
    assert_eq!((pages, next), (span.iter().collect(), None));
    assert_eq!(cache.warm(PageSpan::new(PageNo(1 << 40), 7)).0, PageNo((1 << 40) + 7), "no page is past the image");
}

#[test]
fn warming_waits_for_guests_and_for_the_store() {
    let mut cache = cache_with(settings(1024));
    let span = PageSpan::new(PageNo(100), 8);
    assert!(!read(&mut cache, 0, 8));
    assert_eq!(cache.warm(span), (PageNo(100), WarmStep::Busy), "a guest waits for a page");
    complete_all(&mut cache, Tick::from_us(1));
    for part in 0..4 {
        assert_eq!(cache.warm(PageSpan::new(PageNo(1000 + 100 * part), 1)).1, WarmStep::Done);
    }
    assert_eq!(cache.warm(span).1, WarmStep::Busy, "operations in flight are few");
    complete_all(&mut cache, Tick::from_us(2));
    assert_eq!(cache.warm(span), (span.end(), WarmStep::Done));
    complete_all(&mut cache, Tick::from_us(3));
    cache.check(&[]);
}

#[test]
fn warming_evicts_none_of_its_own_pages_and_leaves_frames_free() {
    let mut cache = cache_with(settings(1024));
    let mut next = PageNo(0);
    for round in 1.. {
        let step;
        (next, step) = cache.warm(PageSpan::new(next, 10_000));
        complete_all(&mut cache, Tick::from_us(round));
        if step == WarmStep::Full {
            break;
        }
    }
    let stats = cache.stats();
    assert_eq!(stats.evicted_pages, 0);
    assert!(stats.frames_free > 32 && stats.frames_free < 128, "{stats:?}");
    assert!(next.0 > 850 && next.0 < 1024);
}

/// Warms as much of a span as fits.
fn warm_all(cache: &mut PageCache, span: PageSpan, from_us: u64) -> WarmStep {
    let mut next = span.first;
    for round in from_us.. {
        let step;
        (next, step) = cache.warm(PageSpan::new(next, span.end().0 - next.0));
        complete_all(cache, Tick::from_us(round));
        if step == WarmStep::Full || next == span.end() {
            return step;
        }
    }
    unreachable!("a span has an end")
}

/// Reads pages, each in a request of its own.
fn read_pages(cache: &mut PageCache, pages: std::ops::Range<u64>, from_us: u64) {
    for (step, no) in pages.enumerate() {
        read(cache, no * 8, 8);
        complete_all(cache, Tick::from_us(from_us + step as u64));
    }
}

#[test]
fn warming_evicts_cold_pages_but_no_hot_ones() {
    let mut cache = cache_with(settings(1024));
    // Pages that are used again after their burst are hot; then a scan fills the cache.
    read_pages(&mut cache, 0..100, 1);
    read_pages(&mut cache, 10_000..10_400, 1000);
    read_pages(&mut cache, 0..100, 2000);
    read_pages(&mut cache, 20_000..22_000, 3000);
    let list = PageSpan::new(PageNo(50_000), 500);
    assert_eq!(warm_all(&mut cache, list, 10_000), WarmStep::Done);
    cache.check(&[]);
    let resident: std::collections::BTreeSet<PageNo> = cache.resident(0, u32::MAX).0.into_iter().collect();
    assert!(list.iter().all(|page| resident.contains(&page)), "all of the list is in memory");
    let hot = (0..100).filter(|page| resident.contains(&PageNo(*page))).count();
    assert_eq!(hot, 100, "the hot pages stay");
    // A list that does not fit leaves its beginning, and the hot pages.
    let long = PageSpan::new(PageNo(60_000), 5000);
    assert_eq!(warm_all(&mut cache, long, 20_000), WarmStep::Full);
    let resident: std::collections::BTreeSet<PageNo> = cache.resident(0, u32::MAX).0.into_iter().collect();
    assert!(list.iter().all(|page| resident.contains(&page)), "an earlier list is not replaced by a later one");
    assert_eq!((0..100).filter(|page| resident.contains(&PageNo(*page))).count(), 100);
    let stats = cache.stats();
    assert_eq!((stats.readahead_used_pages, stats.readahead_wasted_pages), (0, 0), "warming is no readahead");
}

#[test]
fn every_whole_page_is_listed_exactly_once() {
    let mut cache = cache_with(settings(256));
    (0..50).for_each(|page| write(&mut cache, page * 8, 8));
    write(&mut cache, 200 * 8, 3);
    let (mut pages, mut from) = (Vec::new(), Some(0));
    while let Some(slot) = from {
        let (part, next) = cache.resident(slot, 7);
        pages.extend(part);
        from = next;
    }
    pages.sort_unstable();
    assert_eq!(pages, (0..50).map(PageNo).collect::<Vec<_>>());
}

#[test]
fn a_page_is_warmed_once_the_extent_map_knows_it() {
    let mut cache = cache_with(Settings { holes: ImageHoles::Possible, ..settings(1024) });
    let span = PageSpan::new(PageNo(3), 2);
    assert_eq!(cache.warm(span), (PageNo(3), WarmStep::Busy));
    let mut maps = Vec::new();
    cache.take_ops(|op| maps.push((op.tag, op.kind, op.span.count)));
    let [(tag, OpKind::Map, sectors)] = maps[..] else { panic!("a Map comes first: {maps:?}") };
    cache.complete(tag, &Outcome::Mapped(vec![(sectors, ExtentKind::Data)]), Tick::from_us(1));
    assert_eq!(cache.warm(span), (span.end(), WarmStep::Done));
    complete_all(&mut cache, Tick::from_us(2));
    assert!(read(&mut cache, 24, 16));
}

/// The operations that the cache has queued.
fn queued(cache: &mut PageCache) -> Vec<(u32, OpKind, Urgency)> {
    let mut ops = Vec::new();
    cache.take_ops(|op| ops.push((op.tag, op.kind, op.urgency)));
    ops
}

#[test]
fn pages_of_a_range_operation_are_not_warmed() {
    let mut cache = cache_with(settings(1024));
    assert!(cache.discard(Ticket(7), SectorSpan::new(0, 64)));
    cache.pump(Tick::from_us(1));
    assert!(matches!(queued(&mut cache)[..], [(_, OpKind::Discard, _)]));
    assert_eq!(cache.warm(PageSpan::new(PageNo(0), 8)), (PageNo(8), WarmStep::Done));
    assert_eq!(queued(&mut cache), []);
    cache.check(&[]);
}

#[test]
fn a_failed_warming_does_not_fail_a_waiting_request() {
    let mut cache = cache_with(settings(1024));
    cache.warm(PageSpan::new(PageNo(5), 1));
    let [(tag, OpKind::Read, Urgency::Background)] = queued(&mut cache)[..] else { panic!("a read") };
    assert!(!read(&mut cache, 40, 8));
    cache.complete(tag, &Outcome::Failed(Fault::Media), Tick::from_us(1));
    let [(tag, OpKind::Read, Urgency::Demand)] = queued(&mut cache)[..] else { panic!("a read for the guest") };
    cache.complete(tag, &Outcome::Done, Tick::from_us(2));
    assert_eq!(return_pieces(&mut cache), 1);
    // Later misses are the guest's own.
    cache.warm(PageSpan::new(PageNo(7), 1));
    queued(&mut cache);
    assert!(!read(&mut cache, 4000, 8));
    assert!(matches!(queued(&mut cache)[..], [(_, OpKind::Read, Urgency::Demand)]));
}
