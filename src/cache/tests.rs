//! The cache from its owner's side: the operations that it submits, the pieces that it returns, and its memory
//! consumption.

use super::*;
use crate::prng::Prng;
use crate::units::{ExtentKind, ImageHoles, OpKind, Unmap};

mod allocate;
mod changed_ranges;
mod durability;
mod eager;
mod failures;
mod flush_target;
mod image_size;
mod resize;
mod sharing;
mod small_world;
mod warm;
mod writers;

/// Memory without bytes: these tests check only frame numbers.
#[derive(Debug)]
struct NoBytes;

impl FrameMemory for NoBytes {
    fn copy_sectors(&self, _: FrameId, _: FrameId, _: SectorMask) {}
    fn zero_sectors(&self, _: FrameId, _: SectorMask) {}
    fn publish(&self, _: FrameId, _: FrameRecord) {}
    fn zero_slots(&self) -> usize {
        4
    }
    fn note_zero(&self, _: usize, _: Option<SectorSpan>) {}
}

fn cache_of(frames: u32, image_sectors: u64) -> PageCache {
    cache_with(Settings::of(frames, image_sectors))
}

/// A cache with the highest dirty limit until the store's speed has been measured.
fn cache_with(settings: Settings) -> PageCache {
    let mut cache = PageCache::new(settings, Box::new(NoBytes));
    cache.throttle.restored(u32::MAX);
    cache
}

fn access(start: u64, count: u64) -> Access {
    Access::new(Ticket(1), SectorSpan::new(start, count))
}

/// Pumps until no operation is left, and completes each with success. Returns the operations.
fn complete_all(cache: &mut PageCache, now: Tick) -> Vec<(OpKind, SectorSpan)> {
    let mut done = Vec::new();
    loop {
        cache.pump(now);
        let mut tags = Vec::new();
        cache.take_ops(|op| {
            tags.push(op.tag);
            done.push((op.kind, op.span));
        });
        if tags.is_empty() {
            return done;
        }
        for tag in tags {
            cache.complete(tag, &Outcome::Done, now);
        }
        return_pieces(cache);
    }
}

/// Returns the pieces that were read in to the cache. Returns their number.
fn return_pieces(cache: &mut PageCache) -> usize {
    let mut notices = Vec::new();
    cache.take_notices(&mut notices);
    let mut pieces = 0;
    for notice in notices {
        if let Notice::Ready(_, piece) = notice {
            cache.finish_read(&piece);
            pieces += 1;
        }
    }
    pieces
}

fn write(cache: &mut PageCache, start: u64, count: u64) {
    let mut pieces = Vec::new();
    assert_eq!(cache.write(access(start, count), &mut pieces), Admitted::All);
    for piece in pieces {
        cache.finish_write(&piece, CopyResult::Complete);
    }
}

/// Reads, and reports whether all of it was in memory.
fn read(cache: &mut PageCache, start: u64, count: u64) -> bool {
    let mut pieces = Vec::new();
    assert_eq!(cache.read(access(start, count), &mut pieces), Admitted::All);
    let sectors: u64 = pieces.iter().map(|piece| u64::from(piece.count)).sum();
    for piece in pieces {
        cache.finish_read(&piece);
    }
    sectors == count
}

#[test]
fn metadata_takes_at_most_1_5_percent_of_the_cache() {
    for frames in [16_384, 65_536, 100_000, 262_144] {
        let mut cache = cache_of(frames, 1 << 34);
        let budget = frames as usize * 4096 * 15 / 1000;
        assert!(cache.metadata_bytes() <= budget, "{frames} frames: {} > {budget}", cache.metadata_bytes());
        // The worst case of the dirty set: as many dirty pages as the limit allows, each in a group of its own.
        for n in 0..u64::from(frames / 4) {
            write(&mut cache, n * 128, 8);
        }
        assert!(cache.metadata_bytes() <= budget, "{frames} dirty: {} > {budget}", cache.metadata_bytes());
        let small_image = cache_of(frames, 1 << 20).metadata_bytes();
        assert_eq!(small_image, cache_of(frames, 1 << 40).metadata_bytes(), "the size of the image does not matter");
    }
}

/// The pieces of a request: first sector in the request and in the frame, number of sectors and of frames.
fn shapes(pieces: &[Piece]) -> Vec<(u32, u8, u32, usize)> {
    pieces.iter().map(|piece| (piece.at, piece.first, piece.count, piece.frames().count())).collect()
}

#[test]
fn contiguous_sectors_and_frames_form_one_piece() {
    let mut cache = cache_of(1024, 1 << 20);
    write(&mut cache, 24, 8);
    let mut pieces = Vec::new();
    // Page 3 was written before the others: its frame is not adjacent to theirs.
    cache.write(access(3, 42), &mut pieces);
    assert_eq!(shapes(&pieces), [(0, 3, 21, 3), (21, 0, 8, 1), (29, 0, 13, 2)]);
    let pinned: Vec<FrameId> = pieces.iter().flat_map(Piece::frames).collect();
    cache.check(&pinned);
    pieces.drain(..).for_each(|piece| cache.finish_write(&piece, CopyResult::Complete));
    cache.check(&[]);
    cache.read(access(3, 42), &mut pieces);
    assert_eq!(shapes(&pieces), [(0, 3, 21, 3), (21, 0, 8, 1), (29, 0, 13, 2)]);
    pieces.drain(..).for_each(|piece| cache.finish_read(&piece));
    cache.check(&[]);
    // Pages that are read in later also make one piece.
    assert!(!read(&mut cache, 800, 40));
    let mut tags = Vec::new();
    cache.take_ops(|op| tags.push(op.tag));
    tags.into_iter().for_each(|tag| cache.complete(tag, &Outcome::Done, Tick::from_us(1)));
    let mut notices = Vec::new();
    cache.take_notices(&mut notices);
    let piece_of = |notice| if let Notice::Ready(_, piece) = notice { Some(piece) } else { None };
    let read_in: Vec<Piece> = notices.into_iter().filter_map(piece_of).collect();
    assert_eq!(shapes(&read_in), [(0, 0, 40, 5)]);
    read_in.iter().for_each(|piece| cache.finish_read(piece));
    cache.check(&[]);
}

#[test]
fn a_read_behind_a_failed_write_sees_the_old_hole() {
    let mut cache = cache_with(Settings { holes: ImageHoles::Possible, ..Settings::of(64, 1 << 10) });
    let (mut written, mut pieces) = (Vec::new(), Vec::new());
    assert_eq!(cache.write(access(0, 8), &mut written), Admitted::All);
    assert_eq!(cache.read(access(0, 8), &mut pieces), Admitted::All);
    assert!(pieces.is_empty(), "it waits for the writer");
    cache.finish_write(&written[0], CopyResult::Incomplete);
    let mut maps = Vec::new();
    cache.take_ops(|op| maps.push((op.tag, op.kind, op.span.count)));
    let [(tag, OpKind::Map, sectors)] = maps[..] else { panic!("a Map must come first: {maps:?}") };
    cache.complete(tag, &Outcome::Mapped(vec![(sectors, ExtentKind::Hole)]), Tick::from_us(1));
    cache.pump(Tick::from_us(1));
    assert_eq!(return_pieces(&mut cache), 1, "a piece of zeros");
    cache.check(&[]);
}

#[test]
fn writes_of_whole_and_partial_pages_read_nothing() {
    let mut cache = cache_of(1024, 1 << 20);
    write(&mut cache, 0, 64);
    write(&mut cache, 131, 3);
    let ops = complete_all(&mut cache, Tick::from_us(1_000_000));
    assert!(ops.iter().all(|(kind, _)| *kind != OpKind::Read), "{ops:?}");
    assert!(ops.contains(&(OpKind::Write, SectorSpan::new(131, 3))), "only the sectors that were written: {ops:?}");
    cache.check(&[]);
}

#[test]
fn a_read_merges_missing_pages_and_skips_cached_ones() {
    let mut cache = cache_of(1024, 1 << 20);
    write(&mut cache, 16, 8);
    assert!(!read(&mut cache, 0, 48));
    let reads: Vec<_> =
        complete_all(&mut cache, Tick::from_us(1)).into_iter().filter(|(kind, _)| *kind == OpKind::Read).collect();
    let demand_reads = [SectorSpan::new(0, 16), SectorSpan::new(24, 24)];
    assert_eq!(reads.iter().map(|(_, span)| *span).take(2).collect::<Vec<_>>(), demand_reads);
    assert!(read(&mut cache, 0, 48), "now all of it is in memory");
}

#[test]
fn nothing_is_read_or_written_beyond_the_image() {
    let mut cache = cache_of(1024, 8 * 4 + 3);
    assert!(!read(&mut cache, 16, 19));
    write(&mut cache, 30, 5);
    let ops = complete_all(&mut cache, Tick::from_us(1_000_000));
    assert!(ops.iter().all(|(_, span)| span.end() <= 35), "{ops:?}");
    cache.check(&[]);
}

#[test]
fn clusters_bridge_short_gaps_and_stay_in_their_region() {
    let mut cache = cache_of(4096, 1 << 20);
    for page in 250..262 {
        read(&mut cache, page * 8, 8);
    }
    complete_all(&mut cache, Tick::from_us(1));
    for page in [250, 253, 254, 255, 256, 257, 261] {
        write(&mut cache, page * 8, 8);
    }
    let ops = complete_all(&mut cache, Tick::from_us(1_000_000));
    let mut pages: Vec<_> = ops
        .iter()
        .filter(|(kind, _)| *kind == OpKind::Write)
        .map(|(_, span)| (span.start / 8, span.end() / 8))
        .collect();
    pages.sort_unstable();
    assert_eq!(pages, [(250, 256), (256, 258), (261, 262)], "a gap of two is bridged, of three not; 256 is a border");
}

/// The writes to the store that a pump starts for an idle guest, in order.
fn written_when_idle(cache: &mut PageCache) -> Vec<SectorSpan> {
    let ops = complete_all(cache, Tick::from_us(1_000_000));
    let mut spans: Vec<_> = ops.iter().filter(|(kind, _)| *kind == OpKind::Write).map(|(_, span)| *span).collect();
    spans.sort_unstable_by_key(|span| span.start);
    spans
}

/// A partition that starts at sector 63: each block of the guest lies in two pages.
#[test]
fn a_block_that_spans_two_pages_takes_one_write() {
    for block in [1, 8] {
        let mut cache = cache_with(Settings { block_sectors: block, ..Settings::of(4096, 1 << 20) });
        for n in [0, 100, 1000] {
            write(&mut cache, 63 + n * 8, 8);
        }
        let spans = written_when_idle(&mut cache);
        let want = |n: u64| if block == 1 { SectorSpan::new(63 + n * 8, 8) } else { SectorSpan::new(56 + n * 8, 16) };
        assert_eq!(spans, [0, 100, 1000].map(want), "a store with blocks of {block} sectors");
        cache.check(&[]);
    }
}

#[test]
fn a_run_of_blocks_that_each_span_two_pages_takes_one_write() {
    let mut cache = cache_of(4096, 1 << 20);
    for n in [3, 0, 2, 1, 4] {
        write(&mut cache, 63 + n * 8, 8);
    }
    assert_eq!(written_when_idle(&mut cache), [SectorSpan::new(63, 40)]);
}

#[test]
fn parts_of_pages_with_a_gap_between_them_are_written_separately() {
    let mut cache = cache_of(4096, 1 << 20);
    // The ends of pages 1 and 2, with clean sectors between them; page 4 whole, next to a part of page 5 that does not
    // adjoin; both ends of page 8.
    for (start, count) in [(14, 2), (22, 2), (32, 8), (41, 3), (64, 1), (71, 1)] {
        write(&mut cache, start, count);
    }
    let want =
        [(14, 2), (22, 2), (32, 8), (41, 3), (64, 1), (71, 1)].map(|(start, count)| SectorSpan::new(start, count));
    assert_eq!(written_when_idle(&mut cache), want);
    cache.check(&[]);
}

#[test]
fn without_unmap_no_range_operation_frees_space() {
    let settings =
        Settings { unmap: false, holes: ImageHoles::Possible, allocate: true, ..Settings::of(4096, 1 << 20) };
    let mut cache = cache_with(settings);
    assert!(cache.discard(Ticket(7), SectorSpan::new(0, 800)));
    assert_eq!(complete_all(&mut cache, Tick::from_us(1)), []);
    assert!(cache.zero(Ticket(8), SectorSpan::new(0, 800), Unmap::Allowed));
    let zero = OpKind::Zero { unmap: Unmap::Forbidden };
    assert_eq!(complete_all(&mut cache, Tick::from_us(2)), [(zero, SectorSpan::new(0, 800))]);
}

#[test]
fn a_region_filled_by_sequential_writes_is_written_back_in_one_operation() {
    // The store's longest operation is shorter than a region.
    let settings = Settings { cluster_pages_max: 96, ..Settings::of(4096, 1 << 20) };
    let mut cache = cache_with(settings);
    for start in (0..2048).step_by(256) {
        write(&mut cache, start, 256);
    }
    let written: u64 = complete_all(&mut cache, Tick::from_us(1)).iter().map(|(_, span)| span.count).sum();
    assert_eq!(written, 2048);
}

#[test]
fn background_write_back_keeps_the_store_busy() {
    let mut cache = cache_with(Settings { dirty_pages_max: 4000, ..Settings::of(16_000, 1 << 24) });
    // One page in each of 3600 groups: each was written just now, and is not written again.
    for page in 0..3600 {
        write(&mut cache, page * 16 * 8, 8);
    }
    let mut pumps = 0;
    while cache.stats().dirty_pages > 2800 {
        pumps += 1;
        cache.pump(Tick::from_us(1));
        let mut tags = Vec::new();
        cache.take_ops(|op| tags.push(op.tag));
        tags.into_iter().for_each(|tag| cache.complete(tag, &Outcome::Done, Tick::from_us(1)));
    }
    // A round of the cursor that skips each group once, and then 800 writes, up to 32 at a time.
    assert!(pumps < 150, "{pumps} pumps");
}

#[test]
fn background_write_back_skips_a_constantly_rewritten_page() {
    let mut cache = cache_of(1024, 1 << 20);
    for page in 0..120 {
        write(&mut cache, page * 16 * 8, 8);
    }
    let mut written = Vec::new();
    for _ in 0..100 {
        write(&mut cache, 5 * 16 * 8, 8);
        written.extend(complete_all(&mut cache, Tick::from_us(1)).iter().map(|(_, span)| span.start / 8 / 16));
    }
    written.sort_unstable();
    assert!(written.len() > 60 && written.is_sorted_by(|a, b| a < b), "{written:?}");
    assert!(!written.contains(&5), "{written:?}");
}

#[test]
fn a_flush_does_not_wait_for_later_writes() {
    let mut cache = cache_of(1024, 1 << 20);
    write(&mut cache, 0, 8);
    cache.flush(Ticket(7));
    write(&mut cache, 800, 8);
    cache.pump(Tick::from_us(1));
    let mut ops = Vec::new();
    cache.take_ops(|op| ops.push((op.tag, op.span)));
    assert_eq!(ops.len(), 1, "only the page of the closed epoch is written: {ops:?}");
    assert_eq!(ops[0].1, SectorSpan::new(0, 8));
}

#[test]
fn nearly_all_reads_of_a_sequential_reader_hit() {
    let mut cache = cache_of(16_384, 1 << 20);
    let hits = (0..8192u64)
        .filter(|page| {
            let hit = read(&mut cache, page * 8, 8);
            complete_all(&mut cache, Tick::from_us(*page));
            hit
        })
        .count();
    assert!(hits > 8192 * 98 / 100, "{hits} of 8192 pages hit");
}

/// Reads adjacent pages, 128 KiB at a time. Returns how many of them hit.
fn read_sequentially(cache: &mut PageCache, first: u64, pages: u64, now: Tick) -> u64 {
    let hits = (first..first + pages).step_by(32).filter(|page| {
        let hit = read(cache, page * 8, 256);
        complete_all(cache, now);
        hit
    });
    hits.count() as u64 * 32
}

/// A reader stops at the end of its file, and the window beyond stays unread as long as the cache is not full.
#[test]
fn unread_windows_do_not_stop_later_readahead() {
    let mut cache = cache_of(65_536, 1 << 30);
    for file in 0..40 {
        // Five files a second.
        let hits = read_sequentially(&mut cache, file * 65_536, 512, Tick::from_us(file * 200_000));
        assert!(hits > 256, "{hits} of the 512 pages of file {file} hit");
    }
    let reads_before = cache.stats().store_reads;
    let hits = read_sequentially(&mut cache, 40 * 65_536, 8192, Tick::from_us(20_000_000));
    assert!(hits > 8192 * 98 / 100, "{hits} of 8192 pages hit");
    let reads = cache.stats().store_reads - reads_before;
    assert!(reads < 8192 / 128, "{reads} reads: the windows are short, although no other reader has unread pages");
}

/// Streams of one image that alternate: each reads 16 KiB at a time.
#[test]
fn hundreds_of_streams_are_read_ahead() {
    for streams in [64, 100, 300] {
        let mut cache = cache_of(16_384, 1 << 30);
        for turn in 0..64 {
            for stream in 0..streams {
                read(&mut cache, (stream << 20) + turn * 32, 32);
                complete_all(&mut cache, Tick::from_us((turn * streams + stream) * 100));
            }
        }
        let stats = cache.stats();
        let (pages, reads) = (64 * 4 * streams, 64 * streams);
        let used = stats.readahead_used_pages;
        assert!(used * 10 > pages * 6, "{streams} streams: readahead read in {used} of {pages} pages");
        assert!(stats.store_reads * 10 < reads * 9, "{streams} streams: {} store reads for {reads}", stats.store_reads);
        cache.check(&[]);
    }
}

#[test]
fn random_reads_beside_streams_do_not_displace_them() {
    let mut cache = cache_of(65_536, 1 << 30);
    let mut prng = Prng::new(1);
    for turn in 0..100 {
        for stream in 0..50 {
            read(&mut cache, (stream << 20) + turn * 32, 32);
            complete_all(&mut cache, Tick::from_us(turn * 1000));
        }
        for _ in 0..500 {
            read(&mut cache, (1 << 29) + prng.below(1 << 25) * 8, 8);
            complete_all(&mut cache, Tick::from_us(turn * 1000));
        }
    }
    let used = cache.stats().readahead_used_pages;
    assert!(used > 50 * 400 * 8 / 10, "readahead read in {used} of {} pages of the streams", 50 * 400);
}

#[test]
fn random_reads_cause_almost_no_readahead() {
    let mut cache = cache_of(16_384, 1 << 26);
    let mut prng = Prng::new(1);
    for step in 0..4000u64 {
        read(&mut cache, prng.below(1 << 23) * 8, 8);
        complete_all(&mut cache, Tick::from_us(step));
    }
    assert!(cache.stats().readahead_pages < 40, "{} pages of 4000", cache.stats().readahead_pages);
}

#[test]
fn a_stream_without_a_readahead_window_is_still_served() {
    // Readahead may hold three unread pages, which is too few for a window.
    let mut cache = cache_of(64, 1 << 20);
    for page in 0..1000 {
        for stream in 0..8 {
            read(&mut cache, (stream << 16) + page * 8, 8);
            complete_all(&mut cache, Tick::from_us(page));
        }
    }
    let stats = cache.stats();
    assert_eq!(stats.read_hit_pages + stats.read_miss_pages, 8000);
}

/// Memory that logs the kind of everything that is published.
#[derive(Clone, Debug, Default)]
struct PublishLog(std::sync::Arc<std::sync::Mutex<Vec<&'static str>>>);

impl FrameMemory for PublishLog {
    fn copy_sectors(&self, _: FrameId, _: FrameId, _: SectorMask) {}
    fn zero_sectors(&self, _: FrameId, _: SectorMask) {}
    fn publish(&self, _: FrameId, record: FrameRecord) {
        if !record.is_empty() {
            self.0.lock().unwrap().push(if record.dirty.is_empty() { "clean" } else { "dirty" });
        }
    }
    fn zero_slots(&self) -> usize {
        4
    }
    fn note_zero(&self, _: usize, span: Option<SectorSpan>) {
        self.0.lock().unwrap().push(if span.is_some() { "zero noted" } else { "zero cleared" });
    }
}

/// The next daemon zeroes the recorded ranges, and treats clean pages as durable. In the opposite order it would zero a
/// page that was written after the zero. The simulator rarely produces that case.
#[test]
fn a_sync_clears_pending_zeroes_before_it_publishes_pages_as_clean() {
    let log = PublishLog::default();
    let mut cache = PageCache::new(Settings::of(64, 1 << 20), Box::new(log.clone()));
    assert!(cache.zero(Ticket(1), SectorSpan::new(0, 64), Unmap::Forbidden));
    complete_all(&mut cache, Tick::from_us(1));
    write(&mut cache, 8, 8);
    cache.flush(Ticket(2));
    complete_all(&mut cache, Tick::from_us(2));
    assert_eq!(*log.0.lock().unwrap(), ["zero noted", "dirty", "zero cleared", "clean"]);
}

#[test]
fn a_cache_of_1_gib_is_restored_in_less_than_a_second() {
    const FRAMES: u32 = 1 << 18;
    let mut cache = cache_of(FRAMES, 1 << 30);
    let all = SectorMask::ALL;
    let records = (0..FRAMES - 4096).map(|n| {
        let dirty = if n % 8 == 0 { all } else { SectorMask::NONE };
        (FrameId(n), FrameRecord { page: PageNo(u64::from(n) * 7), valid: all, dirty })
    });
    let started = std::time::Instant::now();
    let (pages, dirty) = cache.restore(records, [], []);
    let took = started.elapsed();
    assert_eq!((pages, dirty), (FRAMES - 4096, (FRAMES - 4096) / 8));
    assert!(took.as_millis() < 1000, "{took:?}");
    cache.check(&[]);
}

#[test]
fn a_scan_with_readahead_does_not_evict_hot_pages() {
    let mut cache = cache_of(2048, 1 << 26);
    let mut prng = Prng::new(1);
    let mut hot_read_hits = |cache: &mut PageCache| {
        let hit = read(cache, prng.below(1500) * 8, 8);
        complete_all(cache, Tick::from_us(1));
        hit
    };
    (0..40_000).for_each(|_| {
        hot_read_hits(&mut cache);
    });
    // A scan of ten times the cache, a sector at a time. With LRU four reads in ten of hot pages would miss.
    let mut hits = 0;
    for sector in 80_000..80_000 + 20_480 * 8 {
        read(&mut cache, sector, 1);
        if sector % 8 == 0 {
            hits += u32::from(hot_read_hits(&mut cache));
        }
    }
    assert!(hits > 20_480 * 9 / 10, "{hits} of 20480 reads of hot pages hit");
}
