//! Write-back ahead of the FLUSH: what goes at once, and what is better kept.

use super::*;
use crate::units::{Fault, OpKind};

const NOW: Tick = Tick(1);
/// Pages that have nothing to do with each other.
const APART: u64 = 5 * 16 * 8;
const NOTHING: [u64; 0] = [];

/// Writes a page at each of these sectors in turn; returns what goes to the store meanwhile.
fn early(cache: &mut PageCache, starts: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let mut early = Vec::new();
    for start in starts {
        write(cache, start, 8);
        early.extend(settle(cache, NOW).iter().map(|(_, span)| span.start));
    }
    early
}

fn flush(cache: &mut PageCache) {
    cache.flush(Ticket(7));
    settle(cache, NOW);
}

/// Pumps; returns the operations that this starts, which stay in op.
fn started(cache: &mut PageCache) -> Vec<u32> {
    let mut tags = Vec::new();
    cache.pump(NOW);
    cache.take_ops(|plan| tags.push(plan.tag));
    tags
}

/// A cache whose guest wrote to these places one by one, and then asked for a FLUSH.
fn after_interval(starts: impl IntoIterator<Item = u64>) -> PageCache {
    let mut cache = cache_of(4096, 1 << 20);
    early(&mut cache, starts);
    flush(&mut cache);
    cache
}

#[test]
fn who_syncs_little_and_often_is_written_ahead_for() {
    let apart = || (0..8).map(|at| at * APART);
    assert_eq!(early(&mut cache_of(4096, 1 << 20), apart()), NOTHING, "nobody knows when the FLUSH comes");
    let mut cache = after_interval(apart());
    for _ in 0..3 {
        assert!(early(&mut cache, apart()).into_iter().eq(apart()));
        flush(&mut cache);
    }
}

#[test]
fn a_page_that_is_written_once_before_each_flush_goes_at_once() {
    let mut cache = after_interval([0]);
    for _ in 0..3 {
        assert_eq!(early(&mut cache, [0]), [0]);
        flush(&mut cache);
    }
}

#[test]
fn a_flush_of_nothing_changes_nothing() {
    let mut cache = after_interval([0; 8]);
    flush(&mut cache);
    assert_eq!(early(&mut cache, [APART]), NOTHING);
}

#[test]
fn what_would_go_along_with_what_came_before_waits_for_the_flush() {
    let again: fn(u64) -> u64 = |_| 0;
    let up = |at| at * 8;
    let down = |at| (100 - at) * 8;
    for place in [again, up, down] {
        let mut cache = after_interval((0..32).map(place));
        assert_eq!(early(&mut cache, (0..32).map(place)), NOTHING);
    }
}

#[test]
fn a_guest_that_changes_its_ways_is_noticed_within_the_interval() {
    let mut cache = after_interval((0..8).map(|at| at * APART));
    // It could not be known of the first that it comes again.
    assert_eq!(early(&mut cache, [0; 32]), [0]);
    flush(&mut cache);
    assert_eq!(early(&mut cache, [APART]), NOTHING);
}

#[test]
fn a_write_of_many_pages_is_one_write() {
    let mut cache = cache_of(4096, 1 << 20);
    // Two runs of frames, in turn: the pages of a later write lie apart in memory.
    (0..64).for_each(|page| write(&mut cache, page % 2 * APART + page / 2 * 8, 8));
    flush(&mut cache);
    for _ in 0..2 {
        write(&mut cache, 0, 16 * 8);
        flush(&mut cache);
    }
    write(&mut cache, 0, 16 * 8);
    assert_eq!(settle(&mut cache, NOW), [(OpKind::Write, SectorSpan::new(0, 16 * 8))]);
}

#[test]
fn writes_that_come_together_count_as_one() {
    let mut cache = cache_of(4096, 1 << 20);
    let batch = |cache: &mut PageCache, first: u64| {
        let mut pieces = Vec::new();
        for page in first..first + 8 {
            assert_eq!(cache.write(access(page * 8, 8), &mut pieces), Admitted::All);
        }
        pieces.iter().for_each(|piece| cache.finish_write(piece, CopyResult::Complete));
    };
    // A run that grows by eight pages at a time: seven of eight times it would have gone along.
    (0..8).for_each(|at| batch(&mut cache, at * 8));
    flush(&mut cache);
    batch(&mut cache, 800);
    assert_eq!(settle(&mut cache, NOW), []);
}

#[test]
fn a_bulk_that_comes_together_with_what_was_before_the_flush_ends_with_the_next() {
    let mut cache = after_interval([0, APART]);
    let mut pieces = Vec::new();
    assert_eq!(cache.write(access(0, 8), &mut pieces), Admitted::All);
    cache.flush(Ticket(7));
    assert_eq!(cache.write(access(8, 300 * 8), &mut pieces), Admitted::All);
    pieces.iter().for_each(|piece| cache.finish_write(piece, CopyResult::Complete));
    settle(&mut cache, NOW);
    flush(&mut cache);
    assert_eq!(early(&mut cache, [APART]), NOTHING, "the last interval was a bulk");
    flush(&mut cache);
    assert_eq!(early(&mut cache, [APART]), [APART]);
}

#[test]
fn what_is_written_again_on_its_way_to_the_store_would_have_gone_once() {
    let apart = || (0..8).map(|at| at * APART);
    let mut cache = after_interval(apart());
    apart().for_each(|start| write(&mut cache, start, 8));
    let tags = started(&mut cache);
    apart().for_each(|start| write(&mut cache, start, 8));
    tags.into_iter().for_each(|tag| cache.complete(tag, &Outcome::Done, NOW));
    flush(&mut cache);
    assert_eq!(early(&mut cache, [0]), NOTHING);
}

#[test]
fn what_is_written_again_while_a_flush_writes_it_would_have_gone_twice() {
    let apart = || (0..8).map(|at| at * APART);
    let mut cache = cache_of(4096, 1 << 20);
    apart().for_each(|start| write(&mut cache, start, 8));
    cache.flush(Ticket(7));
    let tags = started(&mut cache);
    apart().for_each(|start| write(&mut cache, start, 8));
    tags.into_iter().for_each(|tag| cache.complete(tag, &Outcome::Done, NOW));
    flush(&mut cache);
    assert_eq!(early(&mut cache, [0]), [0]);
}

#[test]
fn nothing_goes_ahead_to_a_store_that_fails() {
    let mut cache = after_interval([0, APART]);
    write(&mut cache, 0, 8);
    for tag in started(&mut cache) {
        cache.complete(tag, &Outcome::Failed(Fault::Media), NOW);
    }
    write(&mut cache, APART, 8);
    assert_eq!(started(&mut cache).len(), 0);
    flush(&mut cache);
    assert!(cache.is_stable());
}

#[test]
fn a_page_that_is_written_again_on_its_way_to_the_store_is_not_lost_to_the_flush() {
    let mut cache = after_interval([0, APART]);
    write(&mut cache, 0, 8);
    cache.pump(NOW);
    write(&mut cache, 0, 8);
    cache.flush(Ticket(7));
    let writes = settle(&mut cache, NOW).iter().filter(|(kind, _)| *kind == OpKind::Write).count();
    assert_eq!((writes, cache.is_stable()), (2, true));
}

#[test]
fn a_trickle_does_not_pass_for_a_slow_store() {
    let settings = Settings { dirty_pages_max: 16_000, ..settings_of(64_000, 1 << 24) };
    let mut cache = PageCache::new(settings, Box::new(NoBytes));
    let mut now = NOW;
    // A second of writes that take a millisecond each, one at a time.
    for at in 0..1000 {
        write(&mut cache, at % 7 * APART, 8);
        cache.pump(now);
        now = now.plus_us(1000);
        settle(&mut cache, now);
        if at % 5 == 4 {
            cache.flush(Ticket(7));
            settle(&mut cache, now);
        }
    }
    assert!(cache.stats().store_writes >= 1000);
    assert_eq!(cache.stats().dirty_limit_pages, 16_000);
}

#[test]
fn a_bulk_of_writes_is_left_to_the_cursor() {
    let bulk = || (0..300).map(|at| at * APART);
    assert_eq!(early(&mut after_interval(bulk()), [0]), NOTHING);
    let mut cache = after_interval([0, APART]);
    assert_eq!(early(&mut cache, bulk()).len(), 256);
}

#[test]
fn half_as_many_writes_are_in_flight_ahead_of_a_flush_as_for_one() {
    let mut cache = after_interval([0, APART]);
    (0..64).for_each(|at| write(&mut cache, at * APART, 8));
    assert_eq!(started(&mut cache).len() + started(&mut cache).len(), 16);
}
