//! The cache as its owner sees it: what is planned, what is handed out, what it costs.

use super::*;
use crate::prng::Prng;
use crate::units::{ExtentKind, ImageHoles, OpKind, Unmap};

mod eager;
mod failures;
mod small_world;

/// Memory without bytes: these tests look at names only.
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

fn settings_of(frames: u32, image_sectors: u64) -> Settings {
    Settings {
        frames,
        image_sectors,
        block_sectors: 1,
        holes: ImageHoles::NoneYet,
        cluster_pages_max: 256,
        retain: true,
        policy: PolicyKind::S3Fifo,
        readahead_pages_max: 512,
        flush_target_us: 250_000,
        dirty_pages_max: frames / 4,
        dirty_age_us: 5_000_000,
        allocate: false,
        on_error: ErrorPolicy::Report,
        on_full: ErrorPolicy::Report,
        hold_us: 0,
    }
}

fn cache_of(frames: u32, image_sectors: u64) -> PageCache {
    PageCache::new(settings_of(frames, image_sectors), Box::new(NoBytes))
}

fn access(start: u64, count: u64) -> Access {
    Access { ticket: Ticket(1), span: SectorSpan::new(start, count), from: 0, resumed: false }
}

/// Pumps and ends every operation well; returns what they were.
fn settle(cache: &mut PageCache, now: Tick) -> Vec<(OpKind, SectorSpan)> {
    let mut done = Vec::new();
    loop {
        cache.pump(now);
        let mut tags = Vec::new();
        cache.take_ops(|plan| {
            tags.push(plan.tag);
            done.push((plan.kind, plan.span));
        });
        if tags.is_empty() {
            return done;
        }
        for tag in tags {
            cache.complete(tag, &Outcome::Done, now);
        }
        give_back(cache);
    }
}

/// Gives back what came in for reads; returns how many pieces that was.
fn give_back(cache: &mut PageCache) -> usize {
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

/// Reads; returns whether all of it was in memory.
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
fn the_tables_take_at_most_1_5_percent() {
    for frames in [16_384, 65_536, 100_000, 262_144] {
        let mut cache = cache_of(frames, 1 << 34);
        let budget = frames as usize * 4096 * 15 / 1000;
        assert!(cache.metadata_bytes() <= budget, "{frames} frames: {} > {budget}", cache.metadata_bytes());
        // The most that may be dirty, each page in a group of its own: the worst the dirty set can meet.
        for n in 0..u64::from(frames / 4) {
            write(&mut cache, n * 128, 8);
        }
        assert!(cache.metadata_bytes() <= budget, "{frames} dirty: {} > {budget}", cache.metadata_bytes());
        let small_image = cache_of(frames, 1 << 20).metadata_bytes();
        assert_eq!(small_image, cache_of(frames, 1 << 40).metadata_bytes(), "the image does not count");
    }
}

/// The pieces of a request: sector within it, first sector in the frame, sectors, and frames.
fn shapes(pieces: &[Piece]) -> Vec<(u32, u8, u32, usize)> {
    pieces.iter().map(|piece| (piece.at, piece.first, piece.count, piece.frames().count())).collect()
}

#[test]
fn what_lies_in_a_row_is_one_piece() {
    let mut cache = cache_of(1024, 1 << 20);
    write(&mut cache, 24, 8);
    let mut pieces = Vec::new();
    // Page 3 came before the others: its frame lies elsewhere.
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
    // What comes in later comes in a row, too.
    assert!(!read(&mut cache, 800, 40));
    let mut tags = Vec::new();
    cache.take_ops(|plan| tags.push(plan.tag));
    tags.into_iter().for_each(|tag| cache.complete(tag, &Outcome::Done, Tick(1)));
    let mut notices = Vec::new();
    cache.take_notices(&mut notices);
    let piece_of = |notice| if let Notice::Ready(_, piece) = notice { Some(piece) } else { None };
    let came: Vec<Piece> = notices.into_iter().filter_map(piece_of).collect();
    assert_eq!(shapes(&came), [(0, 0, 40, 5)]);
    came.iter().for_each(|piece| cache.finish_read(piece));
    cache.check(&[]);
}

#[test]
fn a_read_behind_a_write_that_failed_finds_the_hole() {
    let mut cache =
        PageCache::new(Settings { holes: ImageHoles::Possible, ..settings_of(64, 1 << 10) }, Box::new(NoBytes));
    let (mut written, mut pieces) = (Vec::new(), Vec::new());
    assert_eq!(cache.write(access(0, 8), &mut written), Admitted::All);
    assert_eq!(cache.read(access(0, 8), &mut pieces), Admitted::All);
    assert!(pieces.is_empty(), "it waits for the writer");
    cache.finish_write(&written[0], CopyResult::Incomplete);
    let mut maps = Vec::new();
    cache.take_ops(|plan| maps.push((plan.tag, plan.kind, plan.span.count)));
    let [(tag, OpKind::Map, sectors)] = maps[..] else { panic!("where the holes are is not known yet: {maps:?}") };
    cache.complete(tag, &Outcome::Mapped(vec![(sectors, ExtentKind::Hole)]), Tick(1));
    cache.pump(Tick(1));
    assert_eq!(give_back(&mut cache), 1, "zeros");
    cache.check(&[]);
}

#[test]
fn whole_and_partial_writes_read_nothing() {
    let mut cache = cache_of(1024, 1 << 20);
    write(&mut cache, 0, 64);
    write(&mut cache, 131, 3);
    let plans = settle(&mut cache, Tick(1_000_000));
    assert!(plans.iter().all(|(kind, _)| *kind != OpKind::Read), "{plans:?}");
    assert!(plans.contains(&(OpKind::Write, SectorSpan::new(131, 3))), "only the sectors that were written: {plans:?}");
    cache.check(&[]);
}

#[test]
fn a_read_merges_what_is_missing_and_skips_what_is_there() {
    let mut cache = cache_of(1024, 1 << 20);
    write(&mut cache, 16, 8);
    assert!(!read(&mut cache, 0, 48));
    let reads: Vec<_> = settle(&mut cache, Tick(1)).into_iter().filter(|(kind, _)| *kind == OpKind::Read).collect();
    let demanded = [SectorSpan::new(0, 16), SectorSpan::new(24, 24)];
    assert_eq!(reads.iter().map(|(_, span)| *span).take(2).collect::<Vec<_>>(), demanded);
    assert!(read(&mut cache, 0, 48), "now all of it is there");
}

#[test]
fn nothing_is_read_or_written_beyond_the_image() {
    let mut cache = cache_of(1024, 8 * 4 + 3);
    assert!(!read(&mut cache, 16, 19));
    write(&mut cache, 30, 5);
    let plans = settle(&mut cache, Tick(1_000_000));
    assert!(plans.iter().all(|(_, span)| span.end() <= 35), "{plans:?}");
    cache.check(&[]);
}

#[test]
fn clusters_bridge_short_gaps_and_stay_in_their_region() {
    let mut cache = cache_of(4096, 1 << 20);
    for page in 250..262 {
        read(&mut cache, page * 8, 8);
    }
    settle(&mut cache, Tick(1));
    for page in [250, 253, 254, 255, 256, 257, 261] {
        write(&mut cache, page * 8, 8);
    }
    let plans = settle(&mut cache, Tick(1_000_000));
    let mut pages: Vec<_> = plans
        .iter()
        .filter(|(kind, _)| *kind == OpKind::Write)
        .map(|(_, span)| (span.start / 8, span.end() / 8))
        .collect();
    pages.sort_unstable();
    assert_eq!(pages, [(250, 256), (256, 258), (261, 262)], "a gap of two is bridged, of three not; 256 is a border");
}

#[test]
fn what_a_sequential_writer_leaves_behind_is_written_whole() {
    // Of a store whose longest operation is shorter than the aligned 1 MiB that is written behind the writer.
    let settings = Settings { cluster_pages_max: 96, ..settings_of(4096, 1 << 20) };
    let mut cache = PageCache::new(settings, Box::new(NoBytes));
    for start in (0..2048).step_by(256) {
        write(&mut cache, start, 256);
    }
    let written: u64 = settle(&mut cache, Tick(1)).iter().map(|(_, span)| span.count).sum();
    assert_eq!(written, 2048);
}

#[test]
fn write_back_in_the_background_keeps_the_store_busy() {
    let mut cache =
        PageCache::new(Settings { dirty_pages_max: 4000, ..settings_of(16_000, 1 << 24) }, Box::new(NoBytes));
    // One page in each of 3600 groups: all have been written just now, and none will be again.
    for page in 0..3600 {
        write(&mut cache, page * 16 * 8, 8);
    }
    let mut pumps = 0;
    while cache.stats().dirty_pages > 2800 {
        pumps += 1;
        cache.pump(Tick(1));
        let mut tags = Vec::new();
        cache.take_ops(|plan| tags.push(plan.tag));
        tags.into_iter().for_each(|tag| cache.complete(tag, &Outcome::Done, Tick(1)));
    }
    // A round of the cursor, in which it lets each group be once, and 800 writes, up to 32 at a time.
    assert!(pumps < 150, "{pumps} pumps");
}

#[test]
fn the_background_leaves_alone_what_is_written_again_and_again() {
    let mut cache = cache_of(1024, 1 << 20);
    for page in 0..120 {
        write(&mut cache, page * 16 * 8, 8);
    }
    let mut written = Vec::new();
    for _ in 0..100 {
        write(&mut cache, 5 * 16 * 8, 8);
        written.extend(settle(&mut cache, Tick(1)).iter().map(|(_, span)| span.start / 8 / 16));
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
    cache.pump(Tick(1));
    let mut plans = Vec::new();
    cache.take_ops(|plan| plans.push((plan.tag, plan.span)));
    assert_eq!(plans.len(), 1, "only the page of the closed epoch goes: {plans:?}");
    assert_eq!(plans[0].1, SectorSpan::new(0, 8));
}

#[test]
fn a_sequential_reader_finds_nearly_everything_read_ahead() {
    let mut cache = cache_of(16_384, 1 << 20);
    let hits = (0..8192u64)
        .filter(|page| {
            let hit = read(&mut cache, page * 8, 8);
            settle(&mut cache, Tick(*page));
            hit
        })
        .count();
    assert!(hits > 8192 * 98 / 100, "{hits} of 8192 pages were there");
}

/// Reads so many pages in a row, 128 KiB at a time; returns how many were there.
fn read_in_a_row(cache: &mut PageCache, first: u64, pages: u64, now: Tick) -> u64 {
    let there = (first..first + pages).step_by(32).filter(|page| {
        let hit = read(cache, page * 8, 256);
        settle(cache, now);
        hit
    });
    there.count() as u64 * 32
}

/// Files end where their readers stop, and the window beyond stays unread in a cache that nothing has filled yet.
#[test]
fn what_earlier_readers_left_unread_does_not_end_readahead() {
    let mut cache = cache_of(65_536, 1 << 30);
    for file in 0..40 {
        // Five files a second.
        let hits = read_in_a_row(&mut cache, file * 65_536, 512, Tick(file * 200_000));
        assert!(hits > 256, "{hits} of the 512 pages of file {file} were there");
    }
    let reads_before = cache.stats().store_reads;
    let hits = read_in_a_row(&mut cache, 40 * 65_536, 8192, Tick(20_000_000));
    assert!(hits > 8192 * 98 / 100, "{hits} of 8192 pages were there");
    let reads = cache.stats().store_reads - reads_before;
    assert!(reads < 8192 / 128, "{reads} reads, though all that may lie unread is this reader's");
}

#[test]
fn random_reads_read_almost_nothing_ahead() {
    let mut cache = cache_of(16_384, 1 << 26);
    let mut prng = Prng::new(1);
    for step in 0..4000u64 {
        read(&mut cache, prng.below(1 << 23) * 8, 8);
        settle(&mut cache, Tick(step));
    }
    assert!(cache.stats().readahead_pages < 40, "{} pages of 4000", cache.stats().readahead_pages);
}

#[test]
fn streams_that_get_no_window_are_followed_as_long_as_they_go() {
    // Three pages may lie unread, which is too little for eight streams.
    let mut cache = cache_of(64, 1 << 20);
    for page in 0..1000 {
        for stream in 0..8 {
            read(&mut cache, (stream << 16) + page * 8, 8);
            settle(&mut cache, Tick(page));
        }
    }
    let stats = cache.stats();
    assert_eq!(stats.read_hit_pages + stats.read_miss_pages, 8000);
}

/// Memory that writes down what a successor would find, in words.
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
        self.0.lock().unwrap().push(if span.is_some() { "zeroed" } else { "forgotten" });
    }
}

/// A successor zeroes what is noted and takes for stable what is clean: in another order it would zero what was written
/// after the zero. Chance meets that too seldom for the simulator.
#[test]
fn a_sync_forgets_the_ranges_that_it_covers_before_pages_written_there_are_clean() {
    let log = PublishLog::default();
    let mut cache = PageCache::new(settings_of(64, 1 << 20), Box::new(log.clone()));
    assert!(cache.zero(Ticket(1), SectorSpan::new(0, 64), Unmap::Forbidden));
    settle(&mut cache, Tick(1));
    write(&mut cache, 8, 8);
    cache.flush(Ticket(2));
    settle(&mut cache, Tick(2));
    assert_eq!(*log.0.lock().unwrap(), ["zeroed", "dirty", "forgotten", "clean"]);
}

#[test]
fn a_gibibyte_is_taken_over_in_less_than_a_second() {
    const FRAMES: u32 = 1 << 18;
    let mut cache = cache_of(FRAMES, 1 << 30);
    let all = SectorMask::ALL;
    let records = (0..FRAMES - 4096).map(|n| {
        let dirty = if n % 8 == 0 { all } else { SectorMask::NONE };
        (FrameId(n), FrameRecord { page: PageNo(u64::from(n) * 7), valid: all, dirty })
    });
    let started = std::time::Instant::now();
    let (pages, dirty) = cache.restore(records, []);
    let took = started.elapsed();
    assert_eq!((pages, dirty), (FRAMES - 4096, (FRAMES - 4096) / 8));
    assert!(took.as_millis() < 1000, "{took:?}");
    cache.check(&[]);
}

#[test]
fn a_stream_that_is_read_ahead_does_not_push_out_what_is_in_use() {
    let mut cache = cache_of(2048, 1 << 26);
    let mut prng = Prng::new(1);
    let mut hot_read_hits = |cache: &mut PageCache| {
        let hit = read(cache, prng.below(1500) * 8, 8);
        settle(cache, Tick(1));
        hit
    };
    (0..40_000).for_each(|_| {
        hot_read_hits(&mut cache);
    });
    // Ten times the cache, a sector at a time; LRU would have lost four reads in ten.
    let mut hits = 0;
    for sector in 80_000..80_000 + 20_480 * 8 {
        read(&mut cache, sector, 1);
        if sector % 8 == 0 {
            hits += u32::from(hot_read_hits(&mut cache));
        }
    }
    assert!(hits > 20_480 * 9 / 10, "{hits} of 20480 reads of hot pages hit");
}
