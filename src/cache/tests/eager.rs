//! Write-back ahead of a FLUSH: which pages are written immediately, and which wait for the FLUSH.

use super::*;
use crate::units::{Fault, OpKind};

const NOW: Tick = Tick::from_us(1);
/// Distance in sectors of pages that no cluster can join: five groups.
const APART: u64 = 5 * 16 * 8;
const NOTHING: [u64; 0] = [];

/// Writes a page at each of these sectors in turn. Returns the sectors that are written to the store meanwhile.
fn written_ahead(cache: &mut PageCache, starts: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let mut written = Vec::new();
    for start in starts {
        write(cache, start, 8);
        written.extend(complete_all(cache, NOW).iter().map(|(_, span)| span.start));
    }
    written
}

fn flush(cache: &mut PageCache) {
    cache.flush(Ticket(7));
    complete_all(cache, NOW);
}

/// Pumps. Returns the tags of the operations that this starts; they stay in flight.
fn started(cache: &mut PageCache) -> Vec<u32> {
    let mut tags = Vec::new();
    cache.pump(NOW);
    cache.take_ops(|op| tags.push(op.tag));
    tags
}

/// A cache after an interval in which the guest wrote a page at each of these sectors in turn, and then sent a FLUSH.
fn after_interval(starts: impl IntoIterator<Item = u64>) -> PageCache {
    let mut cache = cache_of(4096, 1 << 20);
    written_ahead(&mut cache, starts);
    flush(&mut cache);
    cache
}

#[test]
fn pages_of_a_frequently_flushing_guest_are_written_eagerly() {
    let apart = || (0..8).map(|at| at * APART);
    assert_eq!(written_ahead(&mut cache_of(4096, 1 << 20), apart()), NOTHING, "the first interval predicts nothing");
    let mut cache = after_interval(apart());
    for _ in 0..3 {
        assert!(written_ahead(&mut cache, apart()).into_iter().eq(apart()));
        flush(&mut cache);
    }
}

#[test]
fn a_page_written_once_before_each_flush_is_written_eagerly() {
    let mut cache = after_interval([0]);
    for _ in 0..3 {
        assert_eq!(written_ahead(&mut cache, [0]), [0]);
        flush(&mut cache);
    }
}

#[test]
fn a_flush_without_preceding_writes_is_ignored() {
    let mut cache = after_interval([0; 8]);
    flush(&mut cache);
    assert_eq!(written_ahead(&mut cache, [APART]), NOTHING);
}

#[test]
fn mergeable_writes_wait_for_the_flush() {
    let again: fn(u64) -> u64 = |_| 0;
    let up = |at| at * 8;
    let down = |at| (100 - at) * 8;
    for place in [again, up, down] {
        let mut cache = after_interval((0..32).map(place));
        assert_eq!(written_ahead(&mut cache, (0..32).map(place)), NOTHING);
    }
}

#[test]
fn a_change_in_the_guests_behaviour_takes_effect_within_the_interval() {
    let mut cache = after_interval((0..8).map(|at| at * APART));
    // At the first write, the repeated writes cannot be predicted.
    assert_eq!(written_ahead(&mut cache, [0; 32]), [0]);
    flush(&mut cache);
    assert_eq!(written_ahead(&mut cache, [APART]), NOTHING);
}

#[test]
fn a_write_of_many_pages_counts_as_one() {
    let mut cache = cache_of(4096, 1 << 20);
    // The pages of two runs take frames alternately, so the frames of a later write are not adjacent.
    (0..64).for_each(|page| write(&mut cache, page % 2 * APART + page / 2 * 8, 8));
    flush(&mut cache);
    for _ in 0..2 {
        write(&mut cache, 0, 16 * 8);
        flush(&mut cache);
    }
    write(&mut cache, 0, 16 * 8);
    assert_eq!(complete_all(&mut cache, NOW), [(OpKind::Write, SectorSpan::new(0, 16 * 8))]);
}

#[test]
fn concurrent_adjacent_writes_count_as_one() {
    let mut cache = cache_of(4096, 1 << 20);
    let batch = |cache: &mut PageCache, first: u64| {
        let mut pieces = Vec::new();
        for page in first..first + 8 {
            assert_eq!(cache.write(access(page * 8, 8), &mut pieces), Admitted::All);
        }
        pieces.iter().for_each(|piece| cache.finish_write(piece, CopyResult::Complete));
    };
    // A run that grows by eight pages at a time: seven of the eight writes would have merged with an earlier one.
    (0..8).for_each(|at| batch(&mut cache, at * 8));
    flush(&mut cache);
    batch(&mut cache, 800);
    assert_eq!(complete_all(&mut cache, NOW), []);
}

#[test]
fn a_bulk_write_counts_as_bulk_while_another_write_is_in_progress() {
    let mut cache = after_interval([0, APART]);
    let mut pieces = Vec::new();
    assert_eq!(cache.write(access(0, 8), &mut pieces), Admitted::All);
    cache.flush(Ticket(7));
    assert_eq!(cache.write(access(8, 300 * 8), &mut pieces), Admitted::All);
    pieces.iter().for_each(|piece| cache.finish_write(piece, CopyResult::Complete));
    complete_all(&mut cache, NOW);
    flush(&mut cache);
    assert_eq!(written_ahead(&mut cache, [APART]), NOTHING, "the last interval was bulk writing");
    flush(&mut cache);
    assert_eq!(written_ahead(&mut cache, [APART]), [APART]);
}

#[test]
fn a_page_rewritten_under_eager_write_back_counts_as_merged() {
    let apart = || (0..8).map(|at| at * APART);
    let mut cache = after_interval(apart());
    apart().for_each(|start| write(&mut cache, start, 8));
    let tags = started(&mut cache);
    apart().for_each(|start| write(&mut cache, start, 8));
    tags.into_iter().for_each(|tag| cache.complete(tag, &Outcome::Done, NOW));
    flush(&mut cache);
    assert_eq!(written_ahead(&mut cache, [0]), NOTHING);
}

#[test]
fn a_page_rewritten_during_its_write_for_a_flush_does_not_count_as_merged() {
    let apart = || (0..8).map(|at| at * APART);
    let mut cache = cache_of(4096, 1 << 20);
    apart().for_each(|start| write(&mut cache, start, 8));
    cache.flush(Ticket(7));
    let tags = started(&mut cache);
    apart().for_each(|start| write(&mut cache, start, 8));
    tags.into_iter().for_each(|tag| cache.complete(tag, &Outcome::Done, NOW));
    flush(&mut cache);
    assert_eq!(written_ahead(&mut cache, [0]), [0]);
}

#[test]
fn nothing_is_written_eagerly_to_a_failing_store() {
    let mut cache = after_interval([0, APART]);
    write(&mut cache, 0, 8);
    for tag in started(&mut cache) {
        cache.complete(tag, &Outcome::Failed(Fault::Media), NOW);
    }
    write(&mut cache, APART, 8);
    assert_eq!(started(&mut cache).len(), 0);
    flush(&mut cache);
    assert!(cache.is_durable());
}

#[test]
fn a_flush_covers_a_page_that_was_rewritten_under_eager_write_back() {
    let mut cache = after_interval([0, APART]);
    write(&mut cache, 0, 8);
    cache.pump(NOW);
    write(&mut cache, 0, 8);
    cache.flush(Ticket(7));
    let writes = complete_all(&mut cache, NOW).iter().filter(|(kind, _)| *kind == OpKind::Write).count();
    assert_eq!((writes, cache.is_durable()), (2, true));
}

#[test]
fn eager_write_back_does_not_lower_the_measured_bandwidth() {
    let settings = Settings { dirty_pages_max: 16_000, ..Settings::of(64_000, 1 << 24) };
    let mut cache = cache_with(settings);
    let mut now = NOW;
    // A second of writes that take a millisecond each, one at a time.
    for at in 0..1000 {
        write(&mut cache, at % 7 * APART, 8);
        cache.pump(now);
        now = now.plus_us(1000);
        complete_all(&mut cache, now);
        if at % 5 == 4 {
            cache.flush(Ticket(7));
            complete_all(&mut cache, now);
        }
    }
    assert!(cache.stats().store_writes >= 1000);
    assert_eq!(cache.stats().dirty_limit_pages, 16_000);
}

#[test]
fn bulk_writes_are_not_written_eagerly() {
    let bulk = || (0..300).map(|at| at * APART);
    assert_eq!(written_ahead(&mut after_interval(bulk()), [0]), NOTHING);
    let mut cache = after_interval([0, APART]);
    assert_eq!(written_ahead(&mut cache, bulk()).len(), 256);
}

#[test]
fn eager_write_back_uses_half_the_queue_depth_of_a_flush() {
    let mut cache = after_interval([0, APART]);
    (0..64).for_each(|at| write(&mut cache, at * APART, 8));
    assert_eq!(started(&mut cache).len() + started(&mut cache).len(), 16);
}
