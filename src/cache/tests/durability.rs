//! When data becomes durable without failures, and which data is in doubt after a failure.

use std::collections::VecDeque;

use crate::units::{Fault, OpKind};

use super::*;

const FLUSH: Ticket = Ticket(77);
const SECOND_US: u64 = 1_000_000;

/// Pumps at each deadline until `until`; every operation succeeds. Returns the number of Syncs.
fn run_until(cache: &mut PageCache, now: &mut Tick, until: Tick) -> usize {
    let is_sync = |(kind, _): &&(OpKind, SectorSpan)| *kind == OpKind::Sync;
    let mut syncs = 0;
    loop {
        syncs += complete_all(cache, *now).iter().filter(is_sync).count();
        match cache.next_deadline() {
            Some(at) if at <= until => *now = at.max(now.plus_us(1)),
            _ => break,
        }
    }
    *now = until;
    syncs + complete_all(cache, *now).iter().filter(is_sync).count()
}

/// Pumps once; returns the operations that this starts, which stay in flight.
fn started(cache: &mut PageCache, now: Tick) -> Vec<(u32, OpKind, SectorSpan)> {
    cache.pump(now);
    let mut ops = Vec::new();
    cache.take_ops(|op| ops.push((op.tag, op.kind, op.span)));
    ops
}

/// Pumps once, and completes the operations; those of kind `broken` fail. Returns all of them.
fn pump_once(cache: &mut PageCache, now: Tick, broken: Option<OpKind>) -> Vec<(OpKind, SectorSpan)> {
    let ops = started(cache, now);
    for &(tag, kind, _) in &ops {
        let outcome = if Some(kind) == broken { Outcome::Failed(Fault::TimedOut) } else { Outcome::Done };
        cache.complete(tag, &outcome, now);
    }
    ops.into_iter().map(|(_, kind, span)| (kind, span)).collect()
}

#[test]
fn the_first_flush_of_a_cache_sends_a_sync() {
    let mut cache = cache_of(1024, 1 << 20);
    cache.flush(FLUSH);
    assert_eq!(complete_all(&mut cache, Tick::from_us(1)), [(OpKind::Sync, SectorSpan::new(0, 0))]);
    cache.flush(FLUSH);
    assert_eq!(complete_all(&mut cache, Tick::from_us(2)), [], "nothing was written since");
}

#[test]
fn a_write_already_written_back_is_synced_within_the_age_limit() {
    let mut cache = cache_of(4096, 1 << 20);
    let mut now = Tick::from_us(1);
    write(&mut cache, 0, 8);
    run_until(&mut cache, &mut now, Tick::from_us(5 * SECOND_US));
    assert!(cache.is_durable(), "{:?}", cache.stats());
    assert_eq!(cache.next_deadline(), None, "nothing is left to do");
}

#[test]
fn a_trickle_of_writes_is_synced_once_per_age_limit() {
    let mut cache = cache_of(65_536, 1 << 24);
    let mut now = Tick::from_us(1);
    let mut syncs = 0;
    // Five pages a second out of a hundred, for ten minutes; the age limit is 5 s.
    for n in 0..3000 {
        write(&mut cache, n % 100 * 160, 8);
        let until = now.plus_us(SECOND_US / 5);
        syncs += run_until(&mut cache, &mut now, until);
    }
    assert!((120..=300).contains(&syncs), "{syncs} Syncs in 600 s");
}

#[test]
fn a_shorter_age_limit_applies_to_data_that_is_dirty_already() {
    let settings = Settings { dirty_age_us: 600 * SECOND_US, ..Settings::of(1024, 1 << 20) };
    let mut cache = cache_with(settings.clone());
    let mut now = Tick::from_us(SECOND_US);
    // The guest keeps reading, so nothing is written because it is idle.
    let mut run = |cache: &mut PageCache, seconds: u64| {
        let mut syncs = 0;
        for _ in 0..seconds * 20 {
            read(cache, 80, 8);
            let until = now.plus_us(SECOND_US / 20);
            syncs += run_until(cache, &mut now, until);
        }
        syncs
    };
    read(&mut cache, 80, 8);
    run(&mut cache, 1);
    write(&mut cache, 0, 8);
    run(&mut cache, 20);
    assert!(!cache.is_durable(), "the age limit is far away");
    cache.reconfigure(&Settings { dirty_age_us: SECOND_US, ..settings });
    assert!(run(&mut cache, 3) > 0);
    assert!(cache.is_durable());
}

#[test]
fn a_store_that_is_slower_than_the_age_limit_is_synced_too() {
    let mut cache = cache_of(65_536, 1 << 24);
    let mut in_flight = VecDeque::new();
    let mut syncs = 0;
    // Writes to 64 pages for two minutes, without a pause. Each Write takes 3 s; the age limit is 5 s.
    for step in 1..12_000 {
        let now = Tick::from_us(step * SECOND_US / 100);
        write(&mut cache, step % 64 * 160, 8);
        while let Some(&(tag, done)) = in_flight.front()
            && done <= now
        {
            in_flight.pop_front();
            cache.complete(tag, &Outcome::Done, now);
        }
        for (tag, kind, _) in started(&mut cache, now) {
            if kind == OpKind::Sync {
                syncs += 1;
                cache.complete(tag, &Outcome::Done, now);
            } else {
                in_flight.push_back((tag, now.plus_us(3 * SECOND_US)));
            }
        }
    }
    assert!(syncs >= 12, "{syncs} Syncs in 120 s");
}

#[test]
fn a_flush_continues_at_once_when_its_last_page_becomes_writable() {
    for pumps in 0..8 {
        let settings = Settings { block_sectors: 8, dirty_pages_max: 8000, ..Settings::of(16_000, 1 << 24) };
        let mut cache = cache_with(settings);
        let now = Tick::from_us(SECOND_US);
        cache.pump(now);
        // One sector of a block: the rest must be read before the page can be written back.
        write(&mut cache, 100_000 * 8, 1);
        cache.flush(FLUSH);
        cache.pump(now);
        let mut read = Vec::new();
        cache.take_ops(|op| read.push(op.tag));
        // Many groups are dirty for later flushes.
        (0..1500).for_each(|group| write(&mut cache, group * 16 * 8, 8));
        (0..pumps).for_each(|_| cache.pump(now));
        cache.complete(read[0], &Outcome::Done, now);
        let mut written = Vec::new();
        for _ in 0..100 {
            cache.pump(now);
            cache.take_ops(|op| written.push(op.span));
            if cache.next_deadline() != Some(now) {
                break;
            }
        }
        let goes_on = written.iter().any(|span: &SectorSpan| span.start == 100_000 * 8);
        assert!(goes_on, "{pumps} turns before: {written:?}");
    }
}

/// A page that readahead read in becomes dirty when a cluster that bridges it fails: it no longer counts as unread.
#[test]
fn a_failed_cluster_does_not_corrupt_the_count_of_unread_pages() {
    for broken in [OpKind::Write, OpKind::Sync] {
        let mut cache = cache_of(16_384, 1 << 20);
        for (pages, now) in [(0..64, Tick::from_us(1)), (64..80, Tick::from_us(30 * SECOND_US))] {
            for page in pages {
                read(&mut cache, page * 8, 8);
                complete_all(&mut cache, now);
            }
        }
        let is_unread =
            |no: &u64| cache.pages.find(PageNo(*no)).is_some_and(|id| cache.pages[id].unread_since().is_some());
        let unread: Vec<u64> = (80..400).filter(is_unread).collect();
        let between = unread[2..].iter().copied().find(|no| unread.contains(&(no - 1)) && unread.contains(&(no + 1)));
        let between = between.expect("three unread pages in a row");
        write(&mut cache, (between - 1) * 8, 8);
        write(&mut cache, (between + 1) * 8, 8);
        cache.flush(FLUSH);
        for _ in 0..3 {
            pump_once(&mut cache, Tick::from_us(30 * SECOND_US), Some(broken));
        }
        cache.check(&[]);
    }
}

/// A device: it cannot report holes.
#[test]
fn zeros_lost_by_a_failed_sync_are_read_from_memory() {
    let mut cache = cache_of(1024, 1 << 20);
    let now = Tick::from_us(SECOND_US);
    assert!(cache.zero(Ticket(9), SectorSpan::new(0, 64), Unmap::Forbidden));
    complete_all(&mut cache, now);
    cache.flush(FLUSH);
    let ops = pump_once(&mut cache, now, Some(OpKind::Sync));
    assert_eq!(ops, [(OpKind::Sync, SectorSpan::new(0, 0))]);
    // In the pause before the zero is repeated.
    assert!(read(&mut cache, 0, 64), "zeros need no store");
    let ops = pump_once(&mut cache, now.plus_us(1000), None);
    assert!(ops.iter().all(|(kind, _)| *kind != OpKind::Read), "{ops:?}");
    let later = complete_all(&mut cache, now.plus_us(10 * SECOND_US));
    assert!(later.iter().any(|(kind, _)| matches!(kind, OpKind::Zero { .. })), "{later:?}");
    assert!(cache.is_durable());
}

/// A device or a server that was away may come back without what was not synced.
#[test]
fn a_failure_after_which_the_device_may_have_reset_puts_unsynced_pages_in_doubt() {
    let may_have_reset = [Fault::Media, Fault::Fenced, Fault::Gone, Fault::TimedOut];
    let others = [Fault::NoSpace, Fault::Invalid, Fault::Unsupported];
    for (fault, is_in_doubt) in may_have_reset.map(|fault| (fault, true)).into_iter().chain(others.map(|f| (f, false)))
    {
        let mut cache = cache_of(1024, 1 << 20);
        let now = Tick::from_us(SECOND_US);
        write(&mut cache, 0, 8);
        write(&mut cache, 8000, 8);
        cache.flush(FLUSH);
        let writes = started(&mut cache, now);
        assert_eq!(writes.len(), 2, "{writes:?}");
        cache.complete(writes[0].0, &Outcome::Done, now);
        cache.complete(writes[1].0, &Outcome::Failed(fault), now);
        // Until the retry of the one that failed.
        let mut rewritten = false;
        for second in 2..40 {
            let ops = pump_once(&mut cache, Tick::from_us(second * SECOND_US), None);
            rewritten |= ops.contains(&(OpKind::Write, writes[0].2));
        }
        assert!(cache.is_durable(), "{fault:?}");
        assert_eq!(rewritten, is_in_doubt, "{fault:?}");
    }
}

/// Otherwise a page that fails forever would put the others in doubt forever.
#[test]
fn a_failed_write_is_retried_only_after_a_sync_of_the_others() {
    let mut cache = cache_of(1024, 1 << 20);
    let (mut now, far) = (Tick::from_us(SECOND_US), 8000);
    write(&mut cache, 0, 8);
    write(&mut cache, far, 8);
    cache.flush(FLUSH);
    let mut order = Vec::new();
    for _ in 0..20 {
        loop {
            let ops = started(&mut cache, now);
            if ops.is_empty() {
                break;
            }
            for (tag, kind, span) in ops {
                let fails = kind == OpKind::Write && span.start == 0;
                order.push((kind, span.start));
                cache.complete(tag, &if fails { Outcome::Failed(Fault::Media) } else { Outcome::Done }, now);
            }
        }
        now = now.plus_us(SECOND_US);
    }
    let failed = order.iter().enumerate().filter(|(_, op)| **op == (OpKind::Write, 0));
    let failed: Vec<usize> = failed.map(|(at, _)| at).collect();
    assert!(failed.len() > 2, "it is tried again: {order:?}");
    let of_others = order[failed[0]..failed[1]].to_vec();
    assert!(of_others.contains(&(OpKind::Sync, 0)), "no Sync comes before the second try: {order:?}");
    let rewritten = order[failed[1]..].iter().filter(|op| **op == (OpKind::Write, far)).count();
    assert_eq!(rewritten, 0, "a durable page is written again: {order:?}");
}

/// The Sync was submitted before the device lost its write cache, and covers zeros that are lost.
#[test]
fn a_flush_waits_for_repeated_zeros_even_if_its_sync_succeeded() {
    let mut cache = cache_of(1024, 1 << 20);
    let now = Tick::from_us(SECOND_US);
    cache.flush(Ticket(1));
    complete_all(&mut cache, now);
    assert!(cache.zero(Ticket(9), SectorSpan::new(0, 64), Unmap::Forbidden));
    complete_all(&mut cache, now);
    cache.flush(FLUSH);
    let sync = started(&mut cache, now);
    assert_eq!(sync.len(), 1, "{sync:?}");
    // A write fails meanwhile, which is the sign of the reset.
    assert!(cache.zero(Ticket(10), SectorSpan::new(8000, 64), Unmap::Forbidden));
    let other = started(&mut cache, now);
    assert!(matches!(other[..], [(_, OpKind::Zero { .. }, _)]), "{other:?}");
    cache.complete(other[0].0, &Outcome::Failed(Fault::Media), now);
    cache.complete(sync[0].0, &Outcome::Done, now);
    cache.pump(now);
    let mut notices = Vec::new();
    cache.take_notices(&mut notices);
    let done = notices.iter().any(|notice| matches!(notice, Notice::Done(FLUSH, Ok(()))));
    assert!(!done, "the FLUSH completes before the zeros are repeated: {notices:?}");
    let ops = complete_all(&mut cache, now.plus_us(10 * SECOND_US));
    let kinds: Vec<bool> = ops.iter().map(|(kind, _)| *kind == OpKind::Sync).collect();
    assert!(ops.iter().any(|(_, span)| *span == SectorSpan::new(0, 64)) && kinds.last() == Some(&true), "{ops:?}");
    assert!(cache.is_durable());
}

/// The loss marker of a cache that does not survive is set when the zero starts, and cleared when all is durable.
#[test]
fn a_cache_is_not_durable_while_a_zero_is_in_flight() {
    let mut cache = cache_of(1024, 1 << 20);
    let now = Tick::from_us(SECOND_US);
    cache.flush(Ticket(1));
    complete_all(&mut cache, now);
    assert!(cache.is_durable());
    assert!(cache.zero(Ticket(9), SectorSpan::new(0, 64), Unmap::Forbidden));
    let zero = started(&mut cache, now);
    assert!(!cache.is_durable());
    cache.complete(zero[0].0, &Outcome::Done, now);
    assert!(!cache.is_durable());
    cache.flush(FLUSH);
    complete_all(&mut cache, now);
    assert!(cache.is_durable());
}

/// The server of a remote image was restarted, and its write cache is lost.
#[test]
fn a_store_that_lost_its_write_cache_gets_writes_and_zeros_again() {
    let mut cache = cache_of(1024, 1 << 20);
    let now = Tick::from_us(SECOND_US);
    write(&mut cache, 0, 8);
    assert!(cache.zero(Ticket(9), SectorSpan::new(4000, 64), Unmap::Forbidden));
    cache.flush(FLUSH);
    // The write, and the zero that was submitted with it.
    for (tag, kind, _) in started(&mut cache, now) {
        assert_ne!(kind, OpKind::Sync);
        cache.complete(tag, &Outcome::Done, now);
    }
    let sync = started(&mut cache, now);
    assert!(matches!(sync[..], [(_, OpKind::Sync, _)]), "{sync:?}");
    // In flight when the loss is reported: it may have been executed before that.
    write(&mut cache, 8000, 8);
    let mut notices = Vec::new();
    cache.complete(sync[0].0, &Outcome::Failed(Fault::Lost), now);
    assert_eq!(cache.health(), Health::Healthy);
    let again = complete_all(&mut cache, now);
    let has = |kind: OpKind, start: u64| again.iter().any(|(op, span)| *op == kind && span.start == start);
    assert!(has(OpKind::Write, 0) && has(OpKind::Zero { unmap: Unmap::Forbidden }, 4000), "{again:?}");
    let last = again.last().expect("operations follow");
    assert_eq!(last.0, OpKind::Sync, "{again:?}");
    cache.take_notices(&mut notices);
    let results = |ticket: Ticket| notices.iter().filter(move |n| matches!(n, Notice::Done(t, _) if *t == ticket));
    assert_eq!(results(FLUSH).count(), 1, "{notices:?}");
    assert!(notices.iter().all(|notice| !matches!(notice, Notice::Done(_, Err(_)))), "{notices:?}");
    assert_eq!(cache.health(), Health::Healthy);
}

/// The device resets and fails an operation, but the queue reports this failure only after the success of a Sync that
/// followed the reset: the data that the Sync was to cover is lost, and is written again.
#[test]
fn a_failure_reaped_after_a_sync_voids_the_sync() {
    let late_operations: [fn(&mut PageCache) -> bool; 2] = [
        |cache| cache.zero(Ticket(10), SectorSpan::new(8000, 64), Unmap::Forbidden),
        |cache| cache.discard(Ticket(10), SectorSpan::new(8000, 64)),
    ];
    for (start_late, fails) in late_operations.into_iter().flat_map(|start| [(start, false), (start, true)]) {
        let mut cache = cache_of(1024, 1 << 20);
        let now = Tick::from_us(SECOND_US);
        write(&mut cache, 0, 8);
        cache.flush(FLUSH);
        let first = started(&mut cache, now);
        assert!(matches!(first[..], [(_, OpKind::Write, _)]), "{first:?}");
        // A later request is in flight at the same time as the Sync.
        assert!(start_late(&mut cache));
        let other = started(&mut cache, now);
        cache.complete(first[0].0, &Outcome::Done, now);
        let sync = started(&mut cache, now);
        assert!(matches!(sync[..], [(_, OpKind::Sync, _)]), "{sync:?}");
        cache.complete(sync[0].0, &Outcome::Done, now);
        assert_eq!(started(&mut cache, now), []);
        assert!(!cache.is_durable(), "the page is in doubt while the other operation may report a reset");
        let outcome = if fails { Outcome::Failed(Fault::Media) } else { Outcome::Done };
        cache.complete(other[0].0, &outcome, now);
        // An operation that starts after the Sync has succeeded says nothing about the time before it.
        cache.flush(Ticket(78));
        let ops = started(&mut cache, now);
        match ops[..] {
            [(_, OpKind::Write, span)] => assert!(fails && span == SectorSpan::new(0, 8), "{ops:?}"),
            [(_, OpKind::Sync, _)] => assert!(!fails, "the page is not written again"),
            _ => panic!("{ops:?}"),
        }
    }
}

/// Otherwise a page that fails forever would have the others written again forever.
#[test]
fn a_failure_after_a_sync_leaves_its_pages_durable() {
    let mut cache = cache_of(1024, 1 << 20);
    let now = Tick::from_us(SECOND_US);
    write(&mut cache, 0, 8);
    cache.flush(FLUSH);
    let first = started(&mut cache, now);
    assert!(cache.zero(Ticket(10), SectorSpan::new(8000, 64), Unmap::Forbidden));
    let before = started(&mut cache, now);
    cache.complete(first[0].0, &Outcome::Done, now);
    let sync = started(&mut cache, now);
    cache.complete(sync[0].0, &Outcome::Done, now);
    assert!(cache.zero(Ticket(11), SectorSpan::new(80_000, 64), Unmap::Forbidden));
    let after = started(&mut cache, now);
    assert!(matches!(after[..], [(_, OpKind::Zero { .. }, _)]), "{after:?}");
    cache.complete(after[0].0, &Outcome::Failed(Fault::Media), now);
    cache.complete(before[0].0, &Outcome::Done, now);
    let ops = complete_all(&mut cache, now.plus_us(10 * SECOND_US));
    assert!(!ops.iter().any(|(kind, _)| *kind == OpKind::Write), "a durable page is written again: {ops:?}");
}

/// The operation may have destroyed the contents of the page on the store.
#[test]
fn a_page_is_rewritten_if_a_discard_of_its_range_fails_before_the_sync() {
    let mut cache = cache_of(1024, 1 << 20);
    let now = Tick::from_us(SECOND_US);
    write(&mut cache, 0, 8);
    cache.flush(FLUSH);
    assert_eq!(pump_once(&mut cache, now, None), [(OpKind::Write, SectorSpan::new(0, 8))]);
    let sync = started(&mut cache, now);
    assert!(matches!(sync[..], [(_, OpKind::Sync, _)]), "{sync:?}");
    cache.discard(Ticket(9), SectorSpan::new(0, 64));
    let discard = started(&mut cache, now);
    assert!(matches!(discard[..], [(_, OpKind::Discard, _)]), "{discard:?}");
    cache.complete(discard[0].0, &Outcome::Failed(Fault::NoSpace), now);
    cache.complete(sync[0].0, &Outcome::Done, now);
    cache.flush(Ticket(78));
    let again = started(&mut cache, now);
    assert!(matches!(again[..], [(_, OpKind::Write, span)] if span == SectorSpan::new(0, 8)), "{again:?}");
}

/// A disk that loses a discard has the old contents again, so it no longer has the data that was read in between.
#[test]
fn a_lost_discard_invalidates_pages_read_after_it() {
    for is_lost in [false, true] {
        let mut cache = cache_with(Settings { holes: ImageHoles::Unmappable, ..Settings::of(1024, 1 << 20) });
        let now = Tick::from_us(SECOND_US);
        cache.discard(Ticket(9), SectorSpan::new(0, 64));
        complete_all(&mut cache, now);
        for start in [8, 8000] {
            read(&mut cache, start, 8);
            complete_all(&mut cache, now);
        }
        cache.flush(FLUSH);
        let sync = started(&mut cache, now);
        assert!(matches!(sync[..], [(_, OpKind::Sync, _)]), "{sync:?}");
        let outcome = if is_lost { Outcome::Failed(Fault::Lost) } else { Outcome::Done };
        cache.complete(sync[0].0, &outcome, now);
        assert_eq!(cache.pages.find(PageNo(1)).is_none(), is_lost);
        assert!(cache.pages.find(PageNo(1000)).is_some(), "a page elsewhere stays");
        complete_all(&mut cache, now.plus_us(10 * SECOND_US));
        assert!(cache.is_durable());
    }
}

/// A cache over a device with a discarded range, and the Sync that is to cover the discard.
fn discarded_and_syncing(between: impl Fn(&mut PageCache, Tick)) -> (PageCache, Tick, u32) {
    let mut cache = cache_with(Settings { holes: ImageHoles::Unmappable, ..Settings::of(1024, 1 << 20) });
    let now = Tick::from_us(SECOND_US);
    cache.discard(Ticket(9), SectorSpan::new(0, 64));
    complete_all(&mut cache, now);
    between(&mut cache, now);
    cache.flush(FLUSH);
    cache.take_notices(&mut Vec::new());
    let sync = started(&mut cache, now).into_iter().find(|(_, kind, _)| *kind == OpKind::Sync);
    let (tag, ..) = sync.expect("the flush sends a Sync");
    (cache, now, tag)
}

#[test]
fn a_lost_discard_invalidates_a_read_in_flight() {
    for (is_lost, is_late) in [(false, false), (true, false), (true, true)] {
        let read_tag = std::cell::Cell::new(0);
        let (mut cache, now, sync) = discarded_and_syncing(|cache, now| {
            let mut pieces = Vec::new();
            assert_eq!(cache.read(access(8, 8), &mut pieces), Admitted::All);
            let read = started(cache, now);
            assert!(matches!(read[..], [(_, OpKind::Read, _)]), "{read:?}");
            read_tag.set(read[0].0);
        });
        let outcome = if is_lost { Outcome::Failed(Fault::Lost) } else { Outcome::Done };
        cache.complete(sync, &outcome, now);
        if is_late {
            // The next Sync succeeds before the read ends.
            let later = now.plus_us(10 * SECOND_US);
            assert_eq!(pump_once(&mut cache, later, None), [(OpKind::Sync, SectorSpan::new(0, 0))]);
        }
        cache.complete(read_tag.get(), &Outcome::Done, now.plus_us(10 * SECOND_US));
        let mut notices = Vec::new();
        cache.take_notices(&mut notices);
        let piece = notices.iter().find_map(|notice| match notice {
            Notice::Ready(Ticket(1), piece) => Some(*piece),
            _ => None,
        });
        let piece = piece.expect("the read completes");
        assert_eq!(cache.pages.find(PageNo(1)).is_none(), is_lost);
        cache.finish_read(&piece);
        cache.check(&[]);
    }
}

#[test]
fn a_lost_discard_invalidates_clean_sectors_beside_a_write_in_progress() {
    let pieces = std::cell::RefCell::new(Vec::new());
    let (mut cache, now, sync) = discarded_and_syncing(|cache, now| {
        read(cache, 8, 8);
        complete_all(cache, now);
        // The bytes of the guest's write are being copied.
        assert_eq!(cache.write(access(8, 1), &mut pieces.borrow_mut()), Admitted::All);
    });
    cache.complete(sync, &Outcome::Failed(Fault::Lost), now);
    pieces.borrow().iter().for_each(|piece| cache.finish_write(piece, CopyResult::Complete));
    let page = &cache.pages[cache.pages.find(PageNo(1)).expect("it is dirty")];
    assert_eq!((page.valid, page.dirty), (SectorMask::run(0, 1), SectorMask::run(0, 1)));
    cache.check(&[]);
}

#[test]
fn a_failed_sync_drops_only_pages_of_the_discarded_ranges() {
    let (mut cache, now, sync) = discarded_and_syncing(|cache, now| {
        cache.discard(Ticket(9), SectorSpan::new(1 << 19, 64));
        complete_all(cache, now);
        for start in [8, 8000, (1 << 19) + 8] {
            read(cache, start, 8);
            complete_all(cache, now);
        }
    });
    cache.complete(sync, &Outcome::Failed(Fault::Lost), now);
    let found = [1, 1000, (1 << 16) + 1].map(|no| cache.pages.find(PageNo(no)).is_some());
    assert_eq!(found, [false, true, false]);
}

/// The store may lose the discards of the previous daemon, until the first Sync covers them.
#[test]
fn clean_pages_of_a_discard_by_the_last_daemon_are_dropped_until_a_sync_succeeds() {
    for is_lost in [false, true] {
        let mut cache = cache_with(Settings { holes: ImageHoles::Unmappable, ..Settings::of(1024, 1 << 20) });
        let now = Tick::from_us(SECOND_US);
        let record = |page, dirty| FrameRecord { page: PageNo(page), valid: SectorMask::ALL, dirty };
        let dirty = SectorMask::run(0, 2);
        let records = [(3, 5, SectorMask::NONE), (4, 6, dirty), (5, 900, SectorMask::NONE)];
        let records = records.map(|(frame, page, dirty)| (FrameId(frame), record(page, dirty)));
        cache.restore(records, [], [(2, SectorSpan::new(0, 64))]);
        assert!(cache.pages.find(PageNo(5)).is_none());
        assert_eq!(cache.pages[cache.pages.find(PageNo(6)).unwrap()].valid, dirty, "the rest of the page is dropped");
        assert!(cache.pages.find(PageNo(900)).is_some(), "a page elsewhere stays");
        read(&mut cache, 40, 8);
        let ops = started(&mut cache, now);
        let (syncs, others): (Vec<_>, Vec<_>) = ops.into_iter().partition(|(_, kind, _)| *kind == OpKind::Sync);
        assert_eq!(syncs.len(), 1, "a Sync is sent without a FLUSH");
        others.iter().for_each(|&(tag, ..)| cache.complete(tag, &Outcome::Done, now));
        return_pieces(&mut cache);
        assert!(cache.pages.find(PageNo(5)).is_some());
        cache.complete(syncs[0].0, &if is_lost { Outcome::Failed(Fault::Lost) } else { Outcome::Done }, now);
        assert_eq!(cache.pages.find(PageNo(5)).is_none(), is_lost);
        assert!(cache.pages.find(PageNo(6)).is_some() && cache.pages.find(PageNo(900)).is_some());
        complete_all(&mut cache, now.plus_us(100 * SECOND_US));
        assert!(cache.is_durable());
    }
}

/// The Sync succeeds while a write is in flight that could report a reset before it. When that write ends, a discard
/// has started to change a page that the Sync covers.
#[test]
fn a_page_stays_dirty_while_a_discard_of_its_range_is_in_flight() {
    let mut cache = cache_of(1024, 1 << 20);
    let now = Tick::from_us(SECOND_US);
    write(&mut cache, 0, 8);
    cache.flush(FLUSH);
    assert_eq!(pump_once(&mut cache, now, None), [(OpKind::Write, SectorSpan::new(0, 8))]);
    let sync = started(&mut cache, now);
    write(&mut cache, 8000, 8);
    cache.flush(Ticket(78));
    let late = started(&mut cache, now);
    assert!(matches!((&sync[..], &late[..]), ([(_, OpKind::Sync, _)], [(_, OpKind::Write, _)])), "{sync:?} {late:?}");
    cache.complete(sync[0].0, &Outcome::Done, now);
    cache.discard(Ticket(9), SectorSpan::new(0, 64));
    let discard = started(&mut cache, now);
    assert!(matches!(discard[..], [(_, OpKind::Discard, _)]), "{discard:?}");
    assert!(cache.pages.find(PageNo(0)).is_some(), "it is in doubt");
    cache.complete(late[0].0, &Outcome::Done, now);
    assert!(cache.pages.find(PageNo(0)).is_none());
}

/// Two Syncs have succeeded, and a third one fails: the zeros that the first two cover are not repeated, because their
/// ranges may have been written since.
#[test]
fn a_zero_covered_by_a_successful_sync_is_never_repeated() {
    let mut cache = cache_of(1024, 1 << 20);
    let now = Tick::from_us(SECOND_US);
    let zero = |start| SectorSpan::new(start, 64);
    assert!(cache.zero(Ticket(9), zero(0), Unmap::Forbidden));
    assert_eq!(pump_once(&mut cache, now, None).len(), 1);
    cache.flush(FLUSH);
    let sync = started(&mut cache, now);
    assert!(cache.zero(Ticket(10), zero(8000), Unmap::Forbidden));
    let late = started(&mut cache, now);
    cache.complete(sync[0].0, &Outcome::Done, now);
    write(&mut cache, 0, 8);
    cache.flush(Ticket(78));
    let expected = [(OpKind::Write, SectorSpan::new(0, 8)), (OpKind::Sync, SectorSpan::new(0, 0))];
    assert_eq!([pump_once(&mut cache, now, None), pump_once(&mut cache, now, None)].concat(), expected);
    cache.complete(late[0].0, &Outcome::Done, now);
    cache.flush(Ticket(79));
    assert_eq!(pump_once(&mut cache, now, Some(OpKind::Sync)), [(OpKind::Sync, SectorSpan::new(0, 0))]);
    let ops = complete_all(&mut cache, now.plus_us(10 * SECOND_US));
    assert_eq!(zeroed(&ops), [zero(8000)]);
    assert!(cache.is_durable());
}

/// The spans of the zeros among operations.
fn zeroed(ops: &[(OpKind, SectorSpan)]) -> Vec<SectorSpan> {
    ops.iter().filter(|(kind, _)| matches!(kind, OpKind::Zero { .. })).map(|(_, span)| *span).collect()
}

/// A completed FLUSH covers the write. A zero over it would undo the write until the page is written again.
#[test]
fn a_repeated_zero_skips_pages_written_since() {
    let mut cache = cache_of(1024, 1 << 20);
    let now = Tick::from_us(SECOND_US);
    assert!(cache.zero(Ticket(9), SectorSpan::new(0, 64), Unmap::Forbidden));
    assert_eq!(pump_once(&mut cache, now, None).len(), 1);
    // It is in flight at the end of each Sync, so no Sync is confirmed.
    assert!(cache.zero(Ticket(10), SectorSpan::new(8000, 64), Unmap::Forbidden));
    let (zeroes, syncs): (Vec<_>, Vec<_>) =
        started(&mut cache, now).into_iter().partition(|(_, kind, _)| *kind != OpKind::Sync);
    syncs.iter().for_each(|&(tag, ..)| cache.complete(tag, &Outcome::Done, now));
    write(&mut cache, 16, 8);
    cache.flush(FLUSH);
    let durable = [pump_once(&mut cache, now, None), pump_once(&mut cache, now, None)].concat();
    assert_eq!(durable, [(OpKind::Write, SectorSpan::new(16, 8)), (OpKind::Sync, SectorSpan::new(0, 0))]);
    // In the same page as the zero's end; this part was never written.
    write(&mut cache, 62, 4);
    cache.flush(Ticket(78));
    let failed = [pump_once(&mut cache, now, None), pump_once(&mut cache, now, Some(OpKind::Sync))].concat();
    assert!(failed.contains(&(OpKind::Sync, SectorSpan::new(0, 0))), "{failed:?}");
    zeroes.iter().for_each(|&(tag, ..)| cache.complete(tag, &Outcome::Done, now));
    let ops = complete_all(&mut cache, now.plus_us(10 * SECOND_US));
    let near: Vec<SectorSpan> = zeroed(&ops).into_iter().filter(|span| span.start < 8000).collect();
    assert_eq!(near, [SectorSpan::new(0, 16), SectorSpan::new(24, 38)], "{ops:?}");
    assert!(cache.is_durable(), "{:?}", cache.stats());
}

#[test]
fn a_flush_of_a_zero_waits_for_the_write_that_replaced_it() {
    let mut cache = cache_of(1024, 1 << 20);
    let now = Tick::from_us(SECOND_US);
    let span = SectorSpan::new(16, 8);
    assert!(cache.zero(Ticket(9), span, Unmap::Forbidden));
    assert_eq!(pump_once(&mut cache, now, None).len(), 1);
    cache.flush(FLUSH);
    assert_eq!(pump_once(&mut cache, now, Some(OpKind::Sync)).len(), 1);
    // In the pause before the zero is repeated, a write starts. It ends after a flush that does not include it, and
    // replaces the whole zero.
    let mut pieces = Vec::new();
    assert_eq!(cache.write(access(16, 8), &mut pieces), Admitted::All);
    cache.flush(Ticket(78));
    pieces.iter().for_each(|piece| cache.finish_write(piece, CopyResult::Complete));
    let later = now.plus_us(10 * SECOND_US);
    let sync = (OpKind::Sync, SectorSpan::new(0, 0));
    let mut notices = Vec::new();
    assert_eq!(pump_once(&mut cache, later, None), [(OpKind::Write, span), sync], "this Sync does not cover the write");
    assert_eq!(pump_once(&mut cache, later, None), [sync]);
    cache.take_notices(&mut notices);
    assert!(!notices.contains(&Notice::Done(Ticket(78), Ok(()))), "{notices:?}");
    assert_eq!(pump_once(&mut cache, later, None), []);
    cache.take_notices(&mut notices);
    assert!(notices.contains(&Notice::Done(Ticket(78), Ok(()))), "{notices:?}");
}

#[test]
fn a_zero_repeated_by_the_next_daemon_skips_dirty_pages() {
    let mut cache = cache_of(1024, 1 << 20);
    let record = |page, first, count| FrameRecord {
        page: PageNo(page),
        valid: SectorMask::ALL,
        dirty: SectorMask::run(first, count),
    };
    let records = [(FrameId(3), record(2, 2, 3)), (FrameId(4), record(7, 6, 2))];
    // The second page was also written behind the end of the zero.
    cache.restore(records, [(0, SectorSpan::new(0, 60))], []);
    let ops = complete_all(&mut cache, Tick::from_us(SECOND_US));
    assert_eq!(zeroed(&ops), [SectorSpan::new(0, 18), SectorSpan::new(21, 39)], "{ops:?}");
}

#[test]
fn clean_pages_of_a_pending_zero_are_not_restored() {
    let mut cache = cache_of(1024, 1 << 20);
    let record = |page, dirty| FrameRecord { page: PageNo(page), valid: SectorMask::ALL, dirty };
    let records = [(FrameId(3), record(2, SectorMask::NONE)), (FrameId(4), record(3, SectorMask::ALL))];
    cache.restore(records, [(0, SectorSpan::new(0, 64))], []);
    let found = [2, 3].map(|no| cache.pages.find(PageNo(no)).is_some());
    assert_eq!(found, [false, true], "the dirty page was written after the zero");
}

/// Its block must be read in before its write.
#[test]
fn a_flush_that_waited_for_a_frame_continues_in_the_next_turn() {
    let mut cache = cache_with(Settings { block_sectors: 8, readahead_pages_max: 0, ..Settings::of(64, 1 << 20) });
    write(&mut cache, 0, 1);
    let mut pinned = Vec::new();
    assert_eq!(cache.read(access(8, 63 * 8), &mut pinned), Admitted::All);
    cache.flush(Ticket(7));
    let now = Tick::from_us(1);
    loop {
        cache.pump(now);
        let mut tags = Vec::new();
        cache.take_ops(|op| tags.push(op.tag));
        if tags.is_empty() {
            break;
        }
        tags.iter().for_each(|&tag| cache.complete(tag, &Outcome::Done, now));
        let mut notices = Vec::new();
        cache.take_notices(&mut notices);
        for notice in notices {
            let Notice::Ready(_, piece) = notice else { panic!("nothing is durable: {notice:?}") };
            pinned.push(piece);
        }
    }
    assert_eq!((cache.stats().frames_free, cache.stats().dirty_pages), (0, 1));
    assert_ne!(cache.next_deadline(), Some(now), "nothing can be done");
    pinned.iter().for_each(|piece| cache.finish_read(piece));
    cache.pump(now);
    assert_eq!(cache.next_deadline(), Some(now), "reclaim has freed frames");
    let written = complete_all(&mut cache, now);
    assert!(written.iter().any(|(kind, _)| *kind == OpKind::Sync), "{written:?}");
    cache.check(&[]);
}

#[test]
fn a_zero_whose_repetition_fails_is_repeated_after_the_pause() {
    let settings = Settings { on_error: ErrorPolicy::Hold, hold_us: 60 * SECOND_US, ..Settings::of(64, 1 << 12) };
    let mut cache = cache_with(settings);
    let zero = OpKind::Zero { unmap: Unmap::Forbidden };
    assert!(cache.zero(Ticket(2), SectorSpan::new(0, 64), Unmap::Forbidden));
    pump_once(&mut cache, Tick::from_us(1), None);
    assert!(cache.discard(Ticket(3), SectorSpan::new(128, 64)));
    pump_once(&mut cache, Tick::from_us(2), Some(OpKind::Discard));
    cache.flush(FLUSH);
    assert_eq!(pump_once(&mut cache, Tick::from_us(3), Some(zero)), [(zero, SectorSpan::new(0, 64))]);
    let due = cache.next_deadline().expect("the flush waits");
    assert_eq!(due.since_us(Tick::from_us(3)), 100_000);
    assert_eq!(pump_once(&mut cache, due, None), [(zero, SectorSpan::new(0, 64))]);
}

#[test]
fn zeros_that_find_no_free_slot_need_no_flush() {
    let mut cache = cache_of(64, 1 << 12);
    for nth in 0..9 {
        assert!(cache.zero(Ticket(nth), SectorSpan::new(nth * 64, 8), Unmap::Forbidden));
    }
    assert_eq!(zeroed(&complete_all(&mut cache, Tick::from_us(1))).len(), 9);
}

#[test]
fn a_freeze_waits_for_a_zero_that_waits_for_a_read() {
    let mut cache = cache_of(64, 1 << 12);
    let now = Tick::from_us(1);
    assert_eq!(cache.read(access(0, 8), &mut Vec::new()), Admitted::All);
    let reads = started(&mut cache, now);
    assert!(cache.zero(Ticket(2), SectorSpan::new(0, 8), Unmap::Forbidden));
    cache.freeze(Ticket(3), Tick::from_us(SECOND_US), false);
    assert_eq!(zeroed(&complete_all(&mut cache, now)), []);
    assert!(!cache.is_frozen());
    reads.iter().for_each(|(tag, ..)| cache.complete(*tag, &Outcome::Done, now));
    assert_eq!(zeroed(&complete_all(&mut cache, now)), [SectorSpan::new(0, 8)]);
    // The flush of the zero starts in the next turn.
    complete_all(&mut cache, now);
    assert!(cache.is_frozen());
}
