//! Waiting requests and failing stores: which request waits for what, and when the store is healthy again.

use super::*;
use crate::units::{Fault, ImageHoles, OpKind, Unmap};

const NOW: Tick = Tick::from_us(1_000_000);
const FLUSH: Ticket = Ticket(77);

/// Pumps. Returns the operations that this starts; they stay in flight.
fn started(cache: &mut PageCache, now: Tick) -> Vec<(u32, OpKind, SectorSpan)> {
    let mut ops = Vec::new();
    cache.pump(now);
    cache.take_ops(|op| ops.push((op.tag, op.kind, op.span)));
    ops
}

/// Runs the cache until `until`, or until nothing is due. Operations of the kind `broken` fail, all others succeed.
/// Returns the number of those that failed.
fn run_failing(cache: &mut PageCache, broken: OpKind, now: &mut Tick, until: Tick) -> usize {
    let mut failed = 0;
    while *now <= until {
        for (tag, kind, _) in started(cache, *now) {
            failed += usize::from(kind == broken);
            let outcome = if kind == broken { Outcome::Failed(Fault::Media) } else { Outcome::Done };
            cache.complete(tag, &outcome, *now);
        }
        *now = cache.next_deadline().map_or(until.plus_us(1), |at| at.max(*now));
    }
    failed
}

/// The result of the FLUSH, if it has completed.
fn flush_result(cache: &mut PageCache) -> Option<Result<(), Fault>> {
    let mut notices = Vec::new();
    cache.take_notices(&mut notices);
    notices.into_iter().find_map(|notice| match notice {
        Notice::Done(FLUSH, result) => Some(result),
        _ => None,
    })
}

#[test]
fn a_write_outside_a_discard_does_not_wait_for_it() {
    let mut cache = cache_of(1024, 1 << 20);
    assert!(cache.discard(Ticket(9), SectorSpan::new(0, 800)));
    assert_eq!(started(&mut cache, NOW).len(), 1);
    assert_eq!(cache.read(access(8, 8), &mut Vec::new()), Admitted::Until(0), "the range is locked");
    write(&mut cache, 8000, 8);
}

#[test]
fn a_flush_fails_if_the_rest_of_a_block_cannot_be_read() {
    let settings = Settings { block_sectors: 8, ..Settings::of(1024, 1 << 20) };
    let mut cache = cache_with(settings);
    let mut now = NOW;
    write(&mut cache, 3, 1);
    cache.flush(FLUSH);
    let reads = run_failing(&mut cache, OpKind::Read, &mut now, NOW.plus_us(10_000_000));
    assert!((2..20).contains(&reads), "the read is retried after pauses: {reads} reads");
    assert_eq!(flush_result(&mut cache), Some(Err(Fault::Media)));
    assert_eq!(cache.health(), Health::Reporting(Fault::Media));
    cache.flush(FLUSH);
    complete_all(&mut cache, now);
    assert_eq!(flush_result(&mut cache), Some(Ok(())));
    assert_eq!((cache.health(), cache.stats().dirty_pages), (Health::Healthy, 0));
}

#[test]
fn zeroing_the_failed_sectors_makes_the_store_healthy() {
    let mut cache = cache_of(1024, 1 << 20);
    let mut now = NOW;
    write(&mut cache, 0, 12);
    cache.flush(FLUSH);
    run_failing(&mut cache, OpKind::Write, &mut now, NOW);
    assert_eq!(cache.health(), Health::Reporting(Fault::Media));
    assert!(cache.zero(Ticket(9), SectorSpan::new(0, 12), Unmap::Forbidden));
    complete_all(&mut cache, now);
    assert_eq!(cache.health(), Health::Healthy, "no failed page is left");
}

#[test]
fn successful_writes_do_not_extend_the_hold_of_a_write_without_space() {
    let hold_us = 1_000_000;
    let settings = Settings {
        holes: ImageHoles::Possible,
        allocate: true,
        on_full: ErrorPolicy::Hold,
        hold_us,
        ..Settings::of(1024, 1 << 20)
    };
    let mut cache = cache_with(settings);
    // A page that is known to be allocated.
    assert_eq!(cache.write(access(0, 8), &mut Vec::new()), Admitted::Until(0));
    complete_all(&mut cache, NOW);
    let mut access = access(100_000, 8);
    let mut now = NOW;
    let refused = loop {
        match cache.write(access, &mut Vec::new()) {
            Admitted::Refused(..) => break now,
            admitted => assert_eq!(admitted, Admitted::Until(0)),
        }
        access.attempt = Attempt::Resumed;
        // The reservation of the rounded range, and then that of the page alone.
        for _ in 0..2 {
            for (tag, kind, _) in started(&mut cache, now) {
                let full = Outcome::Failed(Fault::NoSpace);
                cache.complete(tag, if kind == OpKind::Allocate { &full } else { &Outcome::Done }, now);
            }
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
        assert!(now <= NOW.plus_us(3 * hold_us), "the hold does not end");
    };
    assert!(refused >= NOW.plus_us(hold_us), "the hold ended too early: {refused:?}");
}

#[test]
fn a_write_to_a_page_with_255_writers_resumes_when_one_finishes() {
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
fn space_at_the_end_of_a_huge_image_is_allocated_once_until_it_is_freed() {
    let settings = Settings { holes: ImageHoles::Possible, allocate: true, ..Settings::of(1024, 1 << 50) };
    let mut cache = cache_with(settings);
    for far in [1 << 43, (1 << 44) - 8, (1 << 50) - 8] {
        assert_eq!(cache.write(access(far, 8), &mut Vec::new()), Admitted::Until(0));
        complete_all(&mut cache, NOW);
        write(&mut cache, far, 8);
        complete_all(&mut cache, NOW);
        assert!(cache.discard(Ticket(9), SectorSpan::new(far, 8)));
        complete_all(&mut cache, NOW);
        assert_eq!(cache.write(access(far, 8), &mut Vec::new()), Admitted::Until(0), "the discard may have freed it");
        complete_all(&mut cache, NOW);
    }
}

#[test]
fn a_store_that_cannot_map_holes_gets_no_map_request() {
    for (holes, can_map) in [(ImageHoles::Unmappable, false), (ImageHoles::NoneYet, true)] {
        let mut cache = cache_with(Settings { holes, ..Settings::of(1024, 1 << 20) });
        assert!(cache.discard(Ticket(9), SectorSpan::new(0, 800)));
        complete_all(&mut cache, NOW);
        let waits_for_map = cache.read(access(0, 8), &mut Vec::new()) == Admitted::Until(0);
        assert_eq!(waits_for_map, can_map, "after a discard, a read waits for a Map if the store can map");
    }
}

#[test]
fn a_write_waiting_for_space_is_retried_once_per_pause() {
    let settings = Settings {
        holes: ImageHoles::Possible,
        allocate: true,
        on_full: ErrorPolicy::Hold,
        hold_us: 10_000_000,
        ..Settings::of(1024, 1 << 20)
    };
    let mut cache = PageCache::new(settings, Box::new(NoBytes));
    let write = |cache: &mut PageCache| {
        assert_eq!(
            cache.write(Access { attempt: Attempt::Resumed, ..access(0, 8) }, &mut Vec::new()),
            Admitted::Until(0)
        );
    };
    write(&mut cache);
    let allocations = started(&mut cache, NOW);
    cache.complete(allocations[0].0, &Outcome::Failed(Fault::NoSpace), NOW);
    // The range of the request is tried alone.
    let mut alone = Vec::new();
    cache.take_ops(|op| alone.push(op.tag));
    cache.complete(alone[0], &Outcome::Failed(Fault::NoSpace), NOW);
    let mut resumed_at = Vec::new();
    let mut now = NOW;
    for _ in 0..100 {
        cache.pump(now);
        let mut notices = Vec::new();
        cache.take_notices(&mut notices);
        if notices == [Notice::Resume(Ticket(1))] {
            resumed_at.push(now);
            // Its allocation stays in flight. A worker that received a notice takes another turn immediately.
            write(&mut cache);
            continue;
        }
        now = cache.next_deadline().expect("the hold ends").max(now);
        if now >= NOW.plus_us(10_000_000) {
            break;
        }
    }
    assert_eq!(resumed_at.len(), 2, "after the failure, and after the pause: {resumed_at:?}");
}

/// The process was stopped for longer than the hold: the failed operation is retried before the requests fail.
#[test]
fn time_spent_stopped_does_not_count_toward_the_hold() {
    // The operator may have resumed the image earlier, with no operation tried since.
    for is_resumed in [false, true] {
        let settings = Settings { on_error: ErrorPolicy::Hold, hold_us: 2_000_000, ..Settings::of(1024, 1 << 20) };
        let mut cache = PageCache::new(settings, Box::new(NoBytes));
        let mut now = NOW;
        write(&mut cache, 0, 8);
        cache.flush(FLUSH);
        run_failing(&mut cache, OpKind::Write, &mut now, NOW.plus_us(500_000));
        assert!(matches!(cache.health(), Health::Holding(_)), "{:?}", cache.health());
        assert_eq!(flush_result(&mut cache), None, "the requests are held");
        if is_resumed {
            cache.resume();
        }
        // A minute later, with a write in flight that fails when the process continues.
        now = NOW.plus_us(60_000_000);
        run_failing(&mut cache, OpKind::Write, &mut now, NOW.plus_us(60_500_000));
        assert_eq!(flush_result(&mut cache), None, "the hold continues");
        assert!(matches!(cache.health(), Health::Holding(_)), "{:?}", cache.health());
        // The image keeps failing: now the hold ends on time.
        run_failing(&mut cache, OpKind::Write, &mut now, NOW.plus_us(63_000_000));
        assert_eq!(flush_result(&mut cache), Some(Err(Fault::Media)));
    }
}

/// A write that hangs does not look like a process that was stopped.
#[test]
fn a_hold_ends_on_time_even_if_a_write_hangs() {
    let settings = Settings { on_error: ErrorPolicy::Hold, hold_us: 2_000_000, ..Settings::of(1024, 1 << 20) };
    let mut cache = PageCache::new(settings, Box::new(NoBytes));
    let mut now = NOW;
    write(&mut cache, 0, 8);
    cache.flush(FLUSH);
    run_failing(&mut cache, OpKind::Write, &mut now, NOW.plus_us(10_000));
    // The retry never ends.
    let mut result = None;
    while now < NOW.plus_us(10_000_000) && result.is_none() {
        started(&mut cache, now);
        result = flush_result(&mut cache);
        if result.is_none() {
            now = cache.next_deadline().expect("the hold ends").max(now.plus_us(1));
        }
    }
    assert_eq!(result, Some(Err(Fault::Media)));
    assert!(now < NOW.plus_us(2_500_000), "{now:?}");
}

/// If the daemon died meanwhile, the next one would treat them as the store's contents.
#[test]
fn clean_pages_are_dropped_before_their_range_is_discarded_or_zeroed() {
    for discards in [true, false] {
        let mut cache = cache_of(1024, 1 << 20);
        read(&mut cache, 80, 8);
        complete_all(&mut cache, NOW);
        write(&mut cache, 88, 8);
        let span = SectorSpan::new(80, 16);
        let began = if discards { cache.discard(FLUSH, span) } else { cache.zero(FLUSH, span, Unmap::Forbidden) };
        assert!(began);
        let ops = started(&mut cache, NOW);
        assert!(matches!(ops[..], [(_, OpKind::Discard | OpKind::Zero { .. }, _)]), "{ops:?}");
        let resident = [10, 11].map(|no| cache.pages.find(PageNo(no)).is_some());
        assert_eq!(resident, [false, true], "the dirty page stays until the operation has succeeded");
    }
}

/// The pages that a failed Sync puts in doubt are written again, successfully, before each further Sync.
#[test]
fn successful_writes_do_not_extend_the_hold_of_a_failing_sync() {
    let settings = Settings { on_error: ErrorPolicy::Hold, hold_us: 2_000_000, ..Settings::of(1024, 1 << 20) };
    let mut cache = PageCache::new(settings, Box::new(NoBytes));
    let mut now = NOW;
    write(&mut cache, 0, 8);
    cache.flush(FLUSH);
    // The first Sync is submitted when the page has aged, 1.5 s later.
    run_failing(&mut cache, OpKind::Sync, &mut now, NOW.plus_us(1_600_000));
    assert!(matches!(cache.health(), Health::Holding(_)), "{:?}", cache.health());
    assert_eq!(flush_result(&mut cache), None, "it is held");
    run_failing(&mut cache, OpKind::Sync, &mut now, NOW.plus_us(3_600_000));
    assert_eq!(flush_result(&mut cache), Some(Err(Fault::Media)), "{now:?} {:?}", cache.health());
}

#[test]
fn a_flush_retries_a_failed_write_at_once() {
    let mut cache = cache_with(Settings { on_error: ErrorPolicy::Report, ..Settings::of(1024, 1 << 20) });
    let mut now = NOW;
    write(&mut cache, 0, 8);
    // The pause grows with each attempt.
    let until = now.plus_us(30_000_000);
    assert!(run_failing(&mut cache, OpKind::Write, &mut now, until) > 3);
    now = until;
    assert_eq!(started(&mut cache, now), [], "the write pauses");
    cache.flush(FLUSH);
    let retried = started(&mut cache, now);
    assert!(matches!(retried[..], [(_, OpKind::Write, _)]), "{retried:?}");
}

#[test]
fn a_stopped_store_stays_stopped_when_the_settings_for_failures_change() {
    let settings = Settings { on_error: ErrorPolicy::Stop, ..Settings::of(1024, 1 << 20) };
    let mut cache = cache_with(settings.clone());
    let mut now = NOW;
    write(&mut cache, 0, 8);
    cache.flush(FLUSH);
    run_failing(&mut cache, OpKind::Write, &mut now, NOW.plus_us(1_000_000));
    assert!(matches!(flush_result(&mut cache), Some(Err(_))));
    let health = cache.health();
    assert!(matches!(health, Health::Stopped(_)), "{health:?}");
    cache.reconfigure(&Settings { hold_us: settings.hold_us + 1, on_full: ErrorPolicy::Hold, ..settings });
    assert_eq!(cache.health(), health);
    cache.flush(FLUSH);
    assert_eq!(started(&mut cache, now), [], "only the operator resumes it");
    cache.resume();
    cache.flush(FLUSH);
    assert!(!started(&mut cache, now).is_empty());
}
