//! Warming: pages that were cached earlier are read in, with a lower priority than everything else.

use super::*;
use crate::units::PageSpan;

fn settings(frames: u32) -> Settings {
    Settings { readahead_pages_max: 0, ..Settings::of(frames, 1 << 20) }
}

#[test]
fn a_warmed_cache_has_the_pages_and_lists_them() {
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
fn warming_evicts_nothing_and_leaves_memory_free() {
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
