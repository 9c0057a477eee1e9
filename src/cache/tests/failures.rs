//! Requests that wait and stores that fail: who has to wait for whom, and when all is well again.

use super::*;
use crate::units::{Fault, ImageHoles, OpKind, Unmap};

const NOW: Tick = Tick(1_000_000);
const FLUSH: Ticket = Ticket(77);

/// Pumps; returns the operations that this starts, which stay in op.
fn started(cache: &mut PageCache, now: Tick) -> Vec<(u32, OpKind, SectorSpan)> {
    let mut plans = Vec::new();
    cache.pump(now);
    cache.take_ops(|plan| plans.push((plan.tag, plan.kind, plan.span)));
    plans
}

/// Ends every operation of one kind with a fault, all others well, until `until` or until nothing is due any more;
/// returns how many have failed.
fn run_failing(cache: &mut PageCache, broken: OpKind, now: &mut Tick, until: Tick) -> usize {
    let mut failed = 0;
    while *now <= until {
        for (tag, kind, _) in started(cache, *now) {
            failed += usize::from(kind == broken);
            let outcome = if kind == broken { Outcome::Failed(Fault::Media) } else { Outcome::Done };
            cache.complete(tag, &outcome, *now);
        }
        *now = cache.next_deadline().map_or(Tick(until.0 + 1), |at| at.max(*now));
    }
    failed
}

/// What a flush has come to.
fn flush_result(cache: &mut PageCache) -> Option<Result<(), Fault>> {
    let mut notices = Vec::new();
    cache.take_notices(&mut notices);
    notices.into_iter().find_map(|notice| match notice {
        Notice::Done(FLUSH, result) => Some(result),
        _ => None,
    })
}

#[test]
fn a_write_elsewhere_does_not_wait_for_a_discard() {
    let mut cache = cache_of(1024, 1 << 20);
    assert!(cache.discard(Ticket(9), SectorSpan::new(0, 800)));
    assert_eq!(started(&mut cache, NOW).len(), 1);
    assert_eq!(cache.read(access(8, 8), &mut Vec::new()), Admitted::Until(0), "the range is locked");
    write(&mut cache, 8000, 8);
}

#[test]
fn a_flush_fails_if_the_rest_of_a_block_cannot_be_read() {
    let settings = Settings { block_sectors: 8, ..settings_of(1024, 1 << 20) };
    let mut cache = PageCache::new(settings, Box::new(NoBytes));
    let mut now = NOW;
    write(&mut cache, 3, 1);
    cache.flush(FLUSH);
    let reads = run_failing(&mut cache, OpKind::Read, &mut now, NOW.plus_us(10_000_000));
    assert!((2..20).contains(&reads), "it is read again now and then, and not at full speed: {reads} times");
    assert_eq!(flush_result(&mut cache), Some(Err(Fault::Media)));
    assert_eq!(cache.health(), Health::Reporting(Fault::Media));
    cache.flush(FLUSH);
    settle(&mut cache, now);
    assert_eq!(flush_result(&mut cache), Some(Ok(())));
    assert_eq!((cache.health(), cache.stats().dirty_pages), (Health::Healthy, 0));
}

#[test]
fn a_page_whose_failed_sectors_are_zeroed_has_failed_no_more() {
    let mut cache = cache_of(1024, 1 << 20);
    let mut now = NOW;
    write(&mut cache, 0, 12);
    cache.flush(FLUSH);
    run_failing(&mut cache, OpKind::Write, &mut now, NOW);
    assert_eq!(cache.health(), Health::Reporting(Fault::Media));
    assert!(cache.zero(Ticket(9), SectorSpan::new(0, 12), Unmap::Forbidden));
    settle(&mut cache, now);
    assert_eq!(cache.health(), Health::Healthy, "nothing is left that failed");
}

#[test]
fn a_write_held_for_space_is_not_held_for_longer_because_others_succeed() {
    let hold_us = 1_000_000;
    let settings = Settings {
        holes: ImageHoles::Possible,
        allocate: true,
        on_full: ErrorPolicy::Hold,
        hold_us,
        ..settings_of(1024, 1 << 20)
    };
    let mut cache = PageCache::new(settings, Box::new(NoBytes));
    // A page that is known to have its space.
    assert_eq!(cache.write(access(0, 8), &mut Vec::new()), Admitted::Until(0));
    settle(&mut cache, NOW);
    let mut access = access(100_000, 8);
    let mut now = NOW;
    let refused = loop {
        match cache.write(access, &mut Vec::new()) {
            Admitted::Refused(..) => break now,
            admitted => assert_eq!(admitted, Admitted::Until(0)),
        }
        access.resumed = true;
        for (tag, kind, _) in started(&mut cache, now) {
            let full = Outcome::Failed(Fault::NoSpace);
            cache.complete(tag, if kind == OpKind::Allocate { &full } else { &Outcome::Done }, now);
        }
        write(&mut cache, 0, 8);
        cache.flush(FLUSH);
        for _ in 0..2 {
            for (tag, kind, _) in started(&mut cache, now) {
                assert!(matches!(kind, OpKind::Write | OpKind::Sync), "{kind:?}");
                cache.complete(tag, &Outcome::Done, now);
            }
        }
        cache.pump(now);
        assert_eq!(flush_result(&mut cache), Some(Ok(())), "a flush does not wait for space");
        now = now.plus_us(hold_us / 4);
        assert!(now <= NOW.plus_us(3 * hold_us), "it is held for ever");
    };
    assert!(refused >= NOW.plus_us(hold_us), "it was to wait: {refused:?}");
}

#[test]
fn a_write_that_finds_too_many_writers_goes_on_when_one_leaves() {
    let mut cache = cache_of(1024, 1 << 20);
    let mut pieces = Vec::new();
    while cache.write(access(0, 8), &mut pieces) == Admitted::All {}
    assert_eq!(pieces.len(), 255);
    started(&mut cache, NOW);
    cache.finish_write(&pieces[0], CopyResult::Complete);
    started(&mut cache, NOW);
    let mut notices = Vec::new();
    cache.take_notices(&mut notices);
    assert_eq!(notices, [Notice::Resume(Ticket(1))]);
}

#[test]
fn space_far_out_on_an_image_is_asked_for_once_until_it_is_given_back() {
    let settings = Settings { holes: ImageHoles::Possible, allocate: true, ..settings_of(1024, 1 << 50) };
    let mut cache = PageCache::new(settings, Box::new(NoBytes));
    for far in [1 << 43, (1 << 44) - 8, (1 << 50) - 8] {
        assert_eq!(cache.write(access(far, 8), &mut Vec::new()), Admitted::Until(0));
        settle(&mut cache, NOW);
        write(&mut cache, far, 8);
        settle(&mut cache, NOW);
        assert!(cache.discard(Ticket(9), SectorSpan::new(far, 8)));
        settle(&mut cache, NOW);
        assert_eq!(cache.write(access(far, 8), &mut Vec::new()), Admitted::Until(0), "it may have been given back");
        settle(&mut cache, NOW);
    }
}

#[test]
fn a_store_without_holes_is_never_asked_for_them() {
    for (holes, can_map) in [(ImageHoles::Unmappable, false), (ImageHoles::NoneYet, true)] {
        let mut cache = PageCache::new(Settings { holes, ..settings_of(1024, 1 << 20) }, Box::new(NoBytes));
        assert!(cache.discard(Ticket(9), SectorSpan::new(0, 800)));
        settle(&mut cache, NOW);
        let asks = cache.read(access(0, 8), &mut Vec::new()) == Admitted::Until(0);
        assert_eq!(asks, can_map, "a read waits for a map only where one tells of what was discarded");
    }
}
