//! The cache grows and shrinks while it is used.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::*;
use crate::cache::resize::EVICTED_PAGES_MAX;

const FRAMES: u32 = 4096;

/// Everything that was published to the memory: the records of frames, and the number of frames in use.
#[derive(Clone, Debug, Default)]
struct Ledger(Arc<Mutex<LedgerState>>);

#[derive(Debug, Default)]
struct LedgerState {
    records: BTreeMap<u32, FrameRecord>,
    in_use: u32,
}

impl Ledger {
    fn in_use(&self) -> u32 {
        self.0.lock().unwrap().in_use
    }

    /// The pages that are recorded as dirty, in order.
    fn dirty(&self) -> Vec<u64> {
        let state = self.0.lock().unwrap();
        let dirty = state.records.values().filter(|record| !record.dirty.is_empty());
        let mut pages: Vec<u64> = dirty.map(|record| record.page.0).collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }
}

impl FrameMemory for Ledger {
    fn copy_sectors(&self, source: FrameId, target: FrameId, _: SectorMask) {
        let in_use = self.in_use();
        assert!(source.0 < in_use && target.0 < in_use, "{source:?} to {target:?}: {in_use} frames are in use");
    }
    fn zero_sectors(&self, _: FrameId, _: SectorMask) {}
    fn publish(&self, frame: FrameId, record: FrameRecord) {
        let mut state = self.0.lock().unwrap();
        assert!(frame.0 < state.in_use, "{frame:?}: {} frames are in use", state.in_use);
        state.records.remove(&frame.0);
        if !record.is_empty() {
            state.records.insert(frame.0, record);
        }
    }
    fn use_frames(&self, count: u32) {
        let mut state = self.0.lock().unwrap();
        assert!(state.records.keys().all(|&frame| frame < count), "a frame that leaves is recorded");
        state.in_use = count;
    }
    fn zero_slots(&self) -> usize {
        4
    }
    fn note_zero(&self, _: usize, _: Option<SectorSpan>) {}
}

fn settings(frames: u32) -> Settings {
    Settings {
        frames_max: 4 * FRAMES,
        readahead_pages_max: 0,
        dirty_pages_max: frames,
        ..Settings::of(frames, 1 << 24)
    }
}

/// A cache that restores nothing.
fn cache_of(frames: u32) -> (PageCache, Ledger) {
    let ledger = Ledger::default();
    let mut cache = PageCache::new(settings(frames), Box::new(ledger.clone()));
    cache.restore([], [], []);
    cache.throttle.restored(u32::MAX);
    cache.pump(Tick::ZERO);
    (cache, ledger)
}

/// Reads a page, from the store if it is not in memory. Returns whether it was.
fn read_page(cache: &mut PageCache, page: u64) -> bool {
    let hit = read(cache, page * 8, 8);
    if !hit {
        let now = cache.now;
        complete_all(cache, now);
    }
    hit
}

/// Takes turns without store operations until the size has changed. Returns their number.
fn turns_to_resize(cache: &mut PageCache) -> u32 {
    for turn in 0..10_000 {
        if cache.is_resized() {
            return turn;
        }
        cache.pump(cache.now.plus_us(100));
    }
    panic!("the size does not change");
}

#[test]
fn a_shrinking_cache_keeps_hot_pages_of_any_frame() {
    let (mut cache, ledger) = cache_of(FRAMES);
    let hot: Vec<u64> = (0..700).map(|n| n * 5).collect();
    (0..u64::from(FRAMES)).for_each(|page| _ = read_page(&mut cache, page));
    for round in 1..4 {
        (0..300).for_each(|page| _ = read_page(&mut cache, round * 100_000 + page));
        hot.iter().for_each(|&page| _ = read_page(&mut cache, page));
    }
    cache.set_frames(FRAMES / 4);
    turns_to_resize(&mut cache);
    cache.check(&[]);
    assert_eq!((ledger.in_use(), cache.stats().frames), (FRAMES / 4, u64::from(FRAMES / 4)));
    assert!(cache.moved_pages() > 200, "{} pages have moved", cache.moved_pages());
    assert!(cache.stats().frames_free < 100, "no more were evicted than had to be: {:?}", cache.stats());
    let hits = hot.iter().filter(|&&page| read_page(&mut cache, page)).count();
    assert!(hits > 680, "{hits} of 700 hot pages are left");
}

#[test]
fn a_growing_cache_keeps_its_pages_and_uses_the_new_frames() {
    let (mut cache, ledger) = cache_of(FRAMES);
    (0..u64::from(FRAMES) - 100).for_each(|page| _ = read_page(&mut cache, page));
    let evicted = cache.stats().evicted_pages;
    cache.set_frames(4 * FRAMES);
    assert_eq!(ledger.in_use(), 4 * FRAMES, "the memory is announced before it is used");
    assert!(turns_to_resize(&mut cache) >= 3, "in several turns");
    (0..4 * u64::from(FRAMES) - 200).for_each(|page| _ = read_page(&mut cache, page));
    assert_eq!(cache.stats().evicted_pages, evicted);
    cache.check(&[]);
    // Back again, and up again.
    for frames in [FRAMES, 1024, 4 * FRAMES, 5000] {
        cache.set_frames(frames);
        turns_to_resize(&mut cache);
        cache.check(&[]);
        assert_eq!((ledger.in_use(), cache.stats().frames), (frames, frames.into()));
    }
    cache.set_frames(100 * FRAMES);
    turns_to_resize(&mut cache);
    assert_eq!(cache.stats().frames, u64::from(4 * FRAMES), "no more than there may be");
}

#[test]
fn dirty_pages_stay_recorded_while_they_move() {
    let (mut cache, ledger) = cache_of(FRAMES);
    (0..u64::from(FRAMES) * 3 / 4).for_each(|page| _ = read_page(&mut cache, page));
    let dirty: Vec<u64> = (0..400).map(|n| 10_000 + n * 7).collect();
    dirty.iter().for_each(|&page| write(&mut cache, page * 8, 8));
    cache.set_frames(FRAMES / 4);
    for _ in 0..1000 {
        cache.pump(Tick::ZERO);
        assert_eq!(ledger.dirty(), dirty);
    }
    let mut ops = 0;
    cache.take_ops(|op| ops += u32::from(op.kind == OpKind::Write));
    assert_eq!((cache.is_resized(), ops), (true, 0), "no write to the store was needed");
    cache.check(&[]);
    assert!(dirty.iter().all(|&page| read(&mut cache, page * 8, 8)));
}

#[test]
fn a_shrink_first_writes_back_dirty_pages_that_do_not_fit() {
    let (mut cache, ledger) = cache_of(FRAMES);
    (0..3000).for_each(|page| write(&mut cache, page * 8, 8));
    cache.reconfigure(&settings(1024));
    for _ in 0..100 {
        cache.pump(cache.now.plus_us(2000));
    }
    assert!(!cache.is_resized() && ledger.dirty().len() == 3000, "nothing is lost while the store does nothing");
    for _ in 0..100 {
        let now = cache.now.plus_us(2000);
        complete_all(&mut cache, now);
        cache.check(&[]);
    }
    assert_eq!((cache.is_resized(), ledger.in_use()), (true, 1024));
}

#[test]
fn a_pinned_frame_is_retired_after_its_copy_or_transfer() {
    let (mut cache, ledger) = cache_of(FRAMES);
    (0..u64::from(FRAMES) - 200).for_each(|page| _ = read_page(&mut cache, page));
    let mut pieces = Vec::new();
    cache.read(access((u64::from(FRAMES) - 400) * 8, 64), &mut pieces);
    // A read from the store takes free frames, which are among the last ones.
    assert!(!read(&mut cache, 8_000_000, 8));
    cache.set_frames(1024);
    let mut tags = Vec::new();
    for _ in 0..1000 {
        cache.pump(cache.now.plus_us(2000));
        cache.take_ops(|op| tags.push(op.tag));
        assert!(!cache.is_resized() && ledger.in_use() == FRAMES, "the frames are in use");
    }
    let due = cache.next_deadline().expect("it is tried again");
    assert!(cache.now.since_us(due) == 0 && due != cache.now, "after a pause");
    let pinned: Vec<FrameId> = pieces.iter().flat_map(Piece::frames).collect();
    pieces.drain(..).for_each(|piece| cache.finish_read(&piece));
    for tag in tags {
        cache.complete(tag, &Outcome::Done, cache.now);
    }
    return_pieces(&mut cache);
    assert!(pinned.iter().all(|frame| frame.0 > 1024), "{pinned:?}");
    cache.now = cache.now.plus_us(2000);
    turns_to_resize(&mut cache);
    assert_eq!(ledger.in_use(), 1024);
    cache.check(&[]);
}

/// In a cache of this size, a shrink that takes half of the free frames makes the reserve lack more than a turn may
/// evict.
#[test]
fn a_turn_evicts_and_moves_a_bounded_number_of_pages() {
    const LARGE: u32 = 500_000;
    const FREE: u32 = 2600;
    const READ_PAGES: u64 = 200;
    let (mut cache, _) = cache_of(LARGE);
    for page in (0..u64::from(LARGE - FREE) / READ_PAGES).map(|n| n * READ_PAGES) {
        assert!(!read(&mut cache, page * 8, READ_PAGES * 8));
        complete_all(&mut cache, Tick::ZERO);
    }
    cache.set_frames(LARGE / 5 * 4);
    let (mut turns, mut most_evicted) = (0, 0);
    while !cache.is_resized() {
        let before = (cache.stats().evicted_pages, cache.moved_pages());
        cache.pump(cache.now.plus_us(100));
        let evicted = cache.stats().evicted_pages - before.0;
        assert!(evicted <= u64::from(EVICTED_PAGES_MAX) && cache.moved_pages() - before.1 <= 256);
        most_evicted = most_evicted.max(evicted);
        turns += 1;
        assert!(turns < 10_000, "the size does not change");
    }
    assert_eq!(most_evicted, u64::from(EVICTED_PAGES_MAX), "the bound is reached");
    assert!(turns > 100, "{turns} turns");
}

/// Each dirty page has a part of a block of the store: its write needs a frame into which the rest is read.
#[test]
fn a_shrink_leaves_frames_for_blocks_that_must_be_read_in() {
    const SMALL: u32 = 64;
    let settings = Settings { block_sectors: 8, frames_max: SMALL, ..settings(SMALL) };
    let ledger = Ledger::default();
    let mut cache = PageCache::new(settings, Box::new(ledger.clone()));
    cache.restore([], [], []);
    cache.throttle.restored(u32::MAX);
    for page in 0..48 {
        write(&mut cache, page * 3 * 8, 1);
    }
    cache.set_frames(SMALL / 2);
    for _ in 0..10 {
        cache.pump(cache.now.plus_us(100));
    }
    cache.flush(Ticket(9));
    for _ in 0..100 {
        let now = cache.now.plus_us(2000);
        complete_all(&mut cache, now);
    }
    cache.check(&[]);
    assert_eq!((ledger.dirty().len(), cache.is_resized(), ledger.in_use()), (0, true, SMALL / 2));
}

#[test]
fn a_larger_leftover_cache_is_restored_and_shrunk() {
    let (mut cache, ledger) = cache_of(FRAMES);
    (0..2000).for_each(|page| _ = read_page(&mut cache, page));
    (5000..5600).for_each(|page| write(&mut cache, page * 8, 8));
    let records: Vec<_> =
        ledger.0.lock().unwrap().records.iter().map(|(&frame, &record)| (FrameId(frame), record)).collect();
    let mut next = PageCache::new(settings(1024), Box::new(ledger.clone()));
    assert_eq!(next.restore(records, [], []), (2600, 600));
    let mut written = 0;
    while !next.is_resized() {
        let now = next.now.plus_us(2000);
        let ops = complete_all(&mut next, now);
        written += ops.iter().filter(|(kind, _)| *kind == OpKind::Write).map(|(_, span)| span.count / 8).sum::<u64>();
        next.check(&[]);
    }
    assert_eq!((ledger.in_use(), written + ledger.dirty().len() as u64), (1024, 600));
}

#[test]
fn readers_share_the_current_size_of_the_cache() {
    let (mut cache, _) = cache_of(FRAMES);
    cache.share(2);
    cache.set_frames(1024);
    turns_to_resize(&mut cache);
    cache.set_reader(1);
    (0..400).for_each(|page| _ = read_page(&mut cache, page));
    cache.set_reader(0);
    (0..8000).for_each(|page| _ = read_page(&mut cache, 10_000 + page));
    let hits = (0..400).filter(|&page| read_page(&mut cache, page)).count();
    assert!(hits > 390, "{hits} of 400 pages of the other reader are left");
}
